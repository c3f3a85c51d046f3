"""Hopper's kernels as nvcc compiles them: wide asynchronous products, and the softmax in their shadow."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnfuse import build, machine, machine_sm90

ROOT = Path(__file__).parent.parent
REASON = build.why_not()
if REASON is None:
    try:
        machine.cuobjdump()
    except FileNotFoundError as error:
        REASON = str(error)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[machine_sm90.Kernel]:
    """From the objects that installing has left in build/cuda where it has."""
    output = tmp_path_factory.mktemp("cuda") / f"_cuda{build.SUFFIX}"
    build.build_cuda(ROOT / "build" / "cuda", output, quiet=True)
    return machine_sm90.read_build()


def test_every_instance_is_there(kernels: list[machine_sm90.Kernel]) -> None:
    assert {k.name for k in kernels} == {
        f"attn_fwd_kernel<{dtype}, {dim}>" for dtype in ("bf16", "fp16") for dim in (64, 128, 256)
    }


def test_the_registers_at_entry_are_what_setmaxnreg_starts_from(kernels: list[machine_sm90.Kernel]) -> None:
    """65536 by the threads of a block; else setmaxnreg would be ignored, and ptxas would say so."""
    for kernel in kernels:
        assert kernel.registers == (128 if "64>" in kernel.name else 168), kernel.name


def test_ptxas_has_nothing_to_complain_of(kernels: list[machine_sm90.Kernel]) -> None:
    """C7508 and C7510 to C7514: products made to wait for each other, setmaxnreg ignored."""
    assert [(k.name, k.complaints) for k in kernels if k.complaints] == []


def test_the_products_are_the_wide_ones(kernels: list[machine_sm90.Kernel]) -> None:
    wanted = {"64": ["64x112x16", "64x64x16"], "128": ["64x128x16"], "256": ["64x80x16", "64x256x16"]}
    for kernel in kernels:
        names = [x.name.split(".")[1] for x in kernel.step.instructions if x.name.startswith("HGMMA")]
        dim = kernel.name.split(", ")[1].rstrip(">")
        assert list(dict.fromkeys(names)) == wanted[dim], kernel.name
        # Q K^T in steps of 16 of the head dim, P V in steps of 16 of the columns
        assert len(names) == int(dim) // 16 + kernel.scores // 8, kernel.name


def test_a_step_touches_no_local_memory(kernels: list[machine_sm90.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.step.count("LDL") == kernel.step.count("STL") == 0, kernel.name


def test_the_exponentials_stand_between_the_two_waits(kernels: list[machine_sm90.Kernel]) -> None:
    """Behind the wait for Q K^T and before that for P V: what they take is hidden behind P V."""
    for kernel in kernels:
        scores_ready, out_ready = (kernel.step.places("WARPGROUP.DEPBAR", f"gsb0, {n}") for n in ("0x1", "0x0"))
        exponentials = kernel.step.places("MUFU.EX2")
        assert len(scores_ready) == len(out_ready) == 1, kernel.name
        assert len(exponentials) == kernel.scores + 2  # and two that rescale
        assert scores_ready[0] < min(exponentials) and max(exponentials) < out_ready[0], kernel.name


def test_a_step_takes_turns_once(kernels: list[machine_sm90.Kernel]) -> None:
    for kernel in kernels:
        turns = 0 if "256>" in kernel.name else 1
        assert kernel.step.count("BAR.SYNC") == kernel.step.count("BAR.ARV") == turns, kernel.name


def test_few_instructions_a_score(kernels: list[machine_sm90.Kernel]) -> None:
    for kernel in kernels:
        # 4.5 are the softmax's own: FMNMX, FFMA, MUFU, FADD and half an F2FP. At 256 a tile has 40 scores a thread
        # to share what every tile costs.
        assert 4.5 < kernel.per_score <= (7.3 if "256>" not in kernel.name else 9.6), kernel.name
