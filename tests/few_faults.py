"""Faults to plant in csrc's kernels for few queries, as in faults.py; test_cuda_few.py builds and judges each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from faults import Fault

from attnfuse import testing
from attnfuse.backends import cuda

INSTANCES = ["attn_fwd_split_d64", "attn_bwd_few_d64", "attn_few_merge", "*_rows"]

_PACKED, _SPLIT, _FEW = (f"sm80/{name}.cuh" for name in ("packed", "attn_fwd_split", "attn_bwd_few"))

# Those of one file side by side: less is built anew.
FAULTS = [
    Fault("split: K is used one group too early", _SPLIT, "cp_async_wait<Tile::kSlots - 2>();\n        barrier();  // K",
          "cp_async_wait<Tile::kSlots - 1>();\n        barrier();  // K"),
    Fault("split: no barrier before a slot of K is filled again", _SPLIT, "barrier();  // V is there", "// V is there"),
    Fault("combine: a split's values are not rescaled", _SPLIT, "return exp2_approx(highest - largest);", "return highest == -infinity() ? 0.0f : 1.0f;"),
    Fault("queries of a tile over two heads span one head's", _PACKED, "last = over ? shape.rows - 1 : last_row % shape.rows;", "last = last_row % shape.rows;"),
    Fault("what no split wrote is read", _PACKED, "if (d < width && scale != 0.0f) {", "if (d < width) {"),
    Fault("few: no barrier before p and ds are read", _FEW, "barrier();  // p and ds are there", "// p and ds are there"),
    Fault("few: grad_key lands on grad_value before that is stored", _FEW, "    warp_sync();  // what stood here has been stored\n", ""),
    Fault("few: keys that no row sees keep what was there", _FEW, "if (tile < from || tile >= from + visible) {", "if (tile < from) {"),
    Fault("few: tiles of holes keep what was there", _FEW, "{ block.clear_keys(p.sources[tile.source], tile.start); };", "{};"),
    Fault("few: dead rows are read", _FEW, "!= infinity();", "!= -infinity();"),
]  # fmt: skip


def served() -> list[testing.Case]:
    """Cases that run at head dim 64 and in one tile of rows, those that cross tiles first: they catch the most."""
    one = testing.SourceCase
    crossing = [
        replace(c, rows=30) for c in testing.cases() if c.family == "long" and max(c.dim, c.value_dim or 0) <= 64
    ]
    packed = testing.Case(
        "few", "packed", (one(140, bias=True, causal=True, offset=70), one(90, bias=True)), heads=4, rows=7, aux=True
    )
    two_tiles = testing.Case("few", "two-tiles", (one(150, causal=True, offset=100),), heads=2, kv_heads=1, rows=40)
    chosen = ("sinks-dead-rows", "causal-lower-right-dead-rows", "lengths-two-sources")
    return [*crossing, packed, two_tiles, *(c for c in testing.cases() if str(c) in chosen)]


def trials() -> Iterator[tuple[str, Callable[[], list[testing.Result]]]]:
    """Memory that nothing has been written to holds NaN."""
    new_empty, empty_rows = torch.Tensor.new_empty, cuda.empty_rows

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.Tensor.new_empty = lambda *a, **k: poisoned(new_empty(*a, **k))  # type: ignore[method-assign]
    cuda.empty_rows = lambda x: poisoned(empty_rows(x))
    cuda.forward, cuda.backward = partial(cuda.forward, splits=3), partial(cuda.backward, splits=3)
    for case in served():
        yield str(case), partial(testing.judge, case, "cuda", torch.bfloat16)
