"""Hopper's kernels (csrc/sm90), run on the CPU by csrc/emulation as on a card of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sanitized
import torch
from hopper_backward_faults import ROWS
from hopper_faults import ITEMS

import attnfuse
from attnfuse import Source, build, testing
from attnfuse.backends import cuda

ROOT = Path(__file__).parent.parent
# What cannot be described by tensor maps (head dims that are no multiple of 8) runs in the sm_80 kernels.
CASES = [
    c
    for c in testing.cases()
    if not (c.alibi or c.dropout_p or any(s.mask for s in c.sources) or c.dim % 8 or (c.value_dim or 8) % 8)
]
CROSSING = [c for c in CASES if c.family == "long"]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests of the backend run what it is"),
    pytest.mark.skipif(build.why_no_emulation() is not None, reason=str(build.why_no_emulation())),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulated machine as a card of compute capability 9.0, put back afterwards."""
    monkeypatch.setenv("ATTNFUSE_EMULATE", "1")
    module = cuda.emulation()
    module.set_architecture(90)
    yield module
    module.set_architecture(80)
    module.set_seed(0)
    module.set_multiprocessors(2)


def check(one: testing.Case, dtype: torch.dtype = torch.bfloat16, gradients: bool = False) -> None:
    for result in testing.judge(one, "cuda", dtype, gradients=gradients):
        assert result.passed, f"{one} {result.quantity}: error {result.error:.3g} over {result.budget:.3g}"


def schedule(*tensors: torch.Tensor) -> str:
    q, k, v = tensors
    return str(attnfuse.explain(q, [Source(k, v)], backend="cuda"))


@pytest.mark.parametrize("one", CASES, ids=str)
def test_conformance(one: testing.Case) -> None:
    problem = testing.build(one, torch.bfloat16)
    told = cuda.describe(problem)
    assert "forward: wgmma" in told and "backward: wgmma" in told
    check(one, gradients=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_conformance_in_another_order_of_threads_and_copies(seed: int, hopper: Any) -> None:
    """One block, which walks every item, or several."""
    hopper.set_seed(seed)
    hopper.set_multiprocessors(seed)
    for one in [*CROSSING, ITEMS]:
        check(one, [torch.bfloat16, torch.float16][seed % 2], gradients=True)


@pytest.mark.parametrize("seed, dim", [(1, 64), (2, 128), (3, 96), (4, 256)])
def test_blocks_that_walk_many_tiles(seed: int, dim: int, hopper: Any) -> None:
    """More tiles of rows than there are stages, so that every barrier goes through several phases."""
    hopper.set_seed(seed)
    check(replace(ROWS, dim=dim), [torch.bfloat16, torch.float16][seed % 2], gradients=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1, 2)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...]) -> None:
    """dQ alone has a kernel of its own; keys without dQ leave its product out."""
    exact = [torch.randn(1, 2, n, 64, dtype=torch.float64) for n in (150, 140, 140)]

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.bfloat16().to(dtype).requires_grad_(n in wanted) for n, x in enumerate(exact)]
        out = attnfuse.attention(*given, backend=backend)
        return list(torch.autograd.grad(out.square().sum(), [given[n] for n in wanted]))

    truth = gradients("reference", torch.float64)
    for ours, theirs, true in zip(gradients("cuda", torch.bfloat16), gradients("reference", torch.bfloat16), truth):
        budget = 2 * testing.difference(theirs, true) + torch.finfo(torch.bfloat16).eps * testing.size(true)
        assert testing.difference(ours, true) <= budget


def test_the_same_bits_every_time_where_asked_for(hopper: Any) -> None:
    """dQ has a kernel of its own then; dK and dV are added up by nobody else in any case."""
    given = [some(1, 2, n, 64).requires_grad_() for n in (200, 300, 300)]
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for seed in (1, 2):
            hopper.set_seed(seed)
            out = attnfuse.attention(*given, backend="cuda")
            found.append(torch.autograd.grad(out.float().square().sum(), given))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*found))


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize(
    "dim, tile, rows, backward",
    [(40, "192x112", "128x128", "64x128"), (64, "192x112", "128x128", "64x128"),
     (96, "128x128", "128x96", "80x128"), (128, "128x128", "128x96", "80x128"), (256, "128x80", "128x48", "64x128")],
)  # fmt: skip
def test_explain_tells_the_tile_and_the_schedule(dim: int, tile: str, rows: str, backward: str) -> None:
    told = schedule(*(some(1, 2, 9, dim) for _ in range(3)))
    assert f"attn_fwd {tile}" in told and "forward: wgmma" in told and "persistent" in told
    assert f"attn_bwd_dkdv {backward}" in told and f"attn_bwd_dq {rows}" in told and "backward: wgmma" in told


def test_what_no_tensor_map_describes_runs_in_the_older_kernel() -> None:
    """The rule of csrc/launchers.cpp: rows on 16 bytes that do not overlap."""
    q, k, v = (some(2, 3, 20, 64) for _ in range(3))
    assert "wgmma" in schedule(q, k, v)
    assert "wgmma" in schedule(q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
    one_head = some(2, 1, 20, 64)
    for others in (
        (q, k, some(2, 3, 20, 65)[..., 1:]),  # rows off 16 bytes
        (q, k, some(2, 3, 20, 36)),  # no multiple of 8
        (q, one_head.expand(2, 3, 20, 64), v),  # a stride of 0
        (q, k, some(2, 3, 19 * 32 + 64).unfold(-1, 64, 32)),  # rows that overlap
    ):
        told = schedule(*others)
        assert "mma.sync" in told and "wgmma" not in told
        exact = attnfuse.attention(*(x.double() for x in others), backend="reference")
        ours, theirs = (
            testing.difference(attnfuse.attention(*others, backend=backend), exact) for backend in ("cuda", "reference")
        )
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * testing.size(exact)


def test_an_older_card_has_the_older_kernel(hopper: Any) -> None:
    q, k, v = (some(1, 1, 20, 64) for _ in range(3))
    hopper.set_architecture(80)
    assert "mma.sync" in schedule(q, k, v)


@pytest.mark.parametrize("given", ["70", "9.0", ""])
def test_an_architecture_that_is_not_emulated(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_EMULATE_ARCH", given)
    assert cuda.available() == f"ATTNFUSE_EMULATE_ARCH must be 80 or 90, got {given!r}"


def test_results_do_not_depend_on_the_batch(hopper: Any) -> None:
    """A sample alone, and the same in a padded batch among others: the same bits, whoever computes it."""
    q, k, v = (some(3, 2, 150, 64) for _ in range(3))
    lengths = torch.tensor([150, 70, 0], dtype=torch.int32)
    whole = attnfuse.attention(q, k, v, key_mask=torch.arange(150) < lengths[:, None], backend="cuda")
    hopper.set_multiprocessors(5)
    alone = attnfuse.attention(q[1:2], k[1:2, :, :70], v[1:2, :, :70], backend="cuda")
    assert torch.equal(whole[1:2], alone) and not whole[2].any()


EVERY_CASE = """
import sys
import torch
from attnfuse import testing

torch.set_num_threads(1)
checks = 0
for case in testing.cases():
    if str(case) in sys.argv[1:] and testing.serves(case, "cuda", torch.bfloat16) is None:
        for result in testing.judge(case, "cuda", torch.bfloat16, gradients=True):
            checks += 1
            assert result.passed, (str(case), result.quantity)
print(checks)
"""


@pytest.mark.slow
def test_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    """The cases that cross tiles and a few others, under address and undefined-behaviour sanitizers."""
    names = ["long-three-sources", "long-hole-tiles", "long-head-dim-128", "presence-all-absent", "window-both"]
    done = sanitized.run(EVERY_CASE, *names, counts=tmp_path, ATTNFUSE_EMULATE_ARCH="90")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(done.stdout) >= 30


def test_an_environment_variable_keeps_to_the_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = testing.build(CROSSING[0], torch.bfloat16)
    assert "wgmma" in cuda.describe(problem)
    monkeypatch.setattr(cuda, "NEWEST", "80")
    assert "mma.sync" in cuda.describe(problem)
    check(CROSSING[0])
    monkeypatch.setattr(cuda, "NEWEST", "91")
    with pytest.raises(RuntimeError, match="ATTNFUSE_CUDA_ARCH must be 80 or 90, got '91'"):
        attnfuse.attention(problem.query, problem.query, problem.query, backend="cuda")
