"""Two processes of one gloo group: run by test_torch.py as `python ranks.py RANK FILE`, FILE.RANK is the report.

Each check compares what the two ranks compute together with what one process computes alone, and raises if it differs.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import attnfuse
from attnfuse import AuxRequest
from attnfuse.integrations.torch import context_parallel_attention, replace_attention
from attnfuse.testing import difference, size

WORLD = 2
EPS = torch.finfo(torch.float32).eps


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert len(replace_attention(encoder).replaced) == 2
    return encoder


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) >= torch.tensor([[6], [3], [5], [6]])


def loss(module: nn.Module, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return module(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0).square().sum()


def alone() -> dict[str, torch.Tensor]:
    """One process's gradients over the whole batch."""
    one = model()
    (loss(one, *batch()) / WORLD).backward()
    return {name: p.grad for name, p in one.named_parameters()}


def check_gradients(found: dict[str, torch.Tensor]) -> None:
    for name, grad in alone().items():
        torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def ddp(rank: int) -> None:
    wrapped = DistributedDataParallel(model())
    part = slice(2 * rank, 2 * rank + 2)
    loss(wrapped, *(t[part] for t in batch())).backward()
    check_gradients({name: p.grad for name, p in wrapped.module.named_parameters()})


def fsdp2(rank: int) -> None:
    sharded = model()
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    part = slice(2 * rank, 2 * rank + 2)
    loss(sharded, *(t[part] for t in batch())).backward()
    parameters = dict(sharded.named_parameters())
    assert all(p.to_local().numel() < p.numel() for p in parameters.values()), "nothing is sharded"
    check_gradients({name: p.grad.full_tensor() for name, p in parameters.items()})


def context_parallel(
    rank: int, backend: str, rows: tuple[int, int], columns: tuple[int, int], **options: object
) -> None:
    """`rows` and `columns`: how many each rank holds."""
    generator = torch.Generator().manual_seed(2)
    masked = bool(options.pop("masked", False))
    total_rows, total_columns = sum(rows), sum(columns)
    shapes = [(2, 4, total_rows, 16), (2, 2, total_columns, 16), (2, 2, total_columns, 24)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    grad_out = torch.randn(2, 4, total_rows, 24, generator=generator)
    grad_lse = torch.randn(2, 4, total_rows, generator=generator)
    key_mask = torch.rand(2, total_columns, generator=generator) < 0.7 if masked else None
    if key_mask is not None:
        key_mask[0] = False  # a sample that sees nothing

    def cut(x: torch.Tensor, lengths: tuple[int, int], dim: int) -> torch.Tensor:
        return x.split(list(lengths), dim)[rank]

    mine = [cut(x, n, 2).clone().requires_grad_() for x, n in zip(whole, (rows, columns, columns))]
    out, aux = context_parallel_attention(
        *mine, key_mask=None if key_mask is None else cut(key_mask, columns, 1), enable_gqa=True, backend=backend,
        return_aux=AuxRequest(lse=True), **options,
    )  # fmt: skip
    live = aux.lse > float("-inf")
    grads = torch.autograd.grad((out, aux.lse), mine, (cut(grad_out, rows, 2), cut(grad_lse, rows, 2) * live))

    def single(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        tensors = [x.to(dtype).requires_grad_() for x in whole]
        out, aux = attnfuse.attention(
            *tensors, key_mask=key_mask, enable_gqa=True, return_aux=AuxRequest(lse=True), backend=backend, **options
        )
        live = aux.lse > float("-inf")
        found = torch.autograd.grad((out, aux.lse), tensors, (grad_out.to(dtype), grad_lse.to(dtype) * live))
        return [x.detach() for x in (out, aux.lse, *found)]

    names, counts = ("out", "lse", "dq", "dk", "dv"), (rows, rows, rows, columns, columns)
    oracle, plain = single(torch.float64, "reference"), single(torch.float32, "reference")
    for name, got, lengths, exact, one in zip(names, (out, aux.lse, *grads), counts, oracle, plain):
        exact, one = cut(exact, lengths, 2), cut(one, lengths, 2)
        dead = exact == float("-inf")
        assert torch.equal(dead, got == float("-inf")), f"{name}: -inf elsewhere"
        got, exact, one = (x.detach().double().masked_fill(dead, 0.0) for x in (got, exact, one))
        error, budget = difference(got, exact), 2 * difference(one, exact) + EPS * size(exact)
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


def disagreement(rank: int) -> None:
    """Ranks that hold different heads are told so, on both."""
    q = torch.randn(1, 2 + rank, 3, 8)
    try:
        context_parallel_attention(q, q, q)
    except ValueError as error:
        assert "must be the same on every rank" in str(error)
    else:
        raise AssertionError("different heads were accepted")


CHECKS = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "plain": lambda rank: context_parallel(rank, "aten", (5, 5), (7, 7)),
    "causal": lambda rank: context_parallel(rank, "aten", (6, 6), (6, 6), is_causal=True),
    "masked": lambda rank: context_parallel(rank, "aten", (6, 6), (6, 6), is_causal=True, masked=True),
    "uneven causal": lambda rank: context_parallel(rank, "triton", (7, 2), (3, 6), is_causal=True, softcap=3.0),
    "empty shard": lambda rank: context_parallel(rank, "triton", (4, 3), (0, 9), scale=0.4),
    "disagreement": disagreement,
}


def main() -> None:
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    report = {}
    for name, check in CHECKS.items():
        try:
            check(rank)
            report[name] = "passed"
        except Exception:
            report[name] = traceback.format_exc()
    with open(f"{file}.{rank}", "w") as handle:
        json.dump(report, handle)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
