"""Hopper's kernels as nvcc compiles them: wide asynchronous products, and the softmax in their shadow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from in_flight import hazards, product_of

from attnfuse import build
from attnfuse.machine import cuda_code, sass
from attnfuse.machine.flow import Flow, loops
from attnfuse.machine.model import Work, cost
from attnfuse.machine.published import flash_attention_3
from attnfuse.machine.reading import LoopReading, Reading, tile_loops
from attnfuse.machine.sass import Instruction

REASON = cuda_code.why_not()
if REASON is None:
    try:
        sass.cuobjdump()
    except FileNotFoundError as error:
        REASON = str(error)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Kernel(NamedTuple):
    """What `attnfuse inspect` reads, and beside it the instructions of the step: the ordinary iteration over a tile."""

    reading: Reading
    step: Sequence[Instruction]

    @property
    def name(self) -> str:
        return self.reading.kernel

    @property
    def dim(self) -> int:
        return int(self.name.split(", ")[1].rstrip(">"))

    @property
    def loop(self) -> LoopReading:
        (loop,) = self.reading.loops
        return loop

    @property
    def widths(self) -> list[str]:
        return [x.name.split(".")[1] for x in self.step if x.opcode == "HGMMA"]

    @property
    def scores(self) -> int:
        """Scores of a tile that one thread holds: a float32 accumulator each."""
        return int(self.widths[0].split("x")[1]) // 2

    def count(self, prefix: str) -> int:
        return sum(x.name.startswith(prefix) for x in self.step)

    def places(self, prefix: str, operands: str = "") -> list[int]:
        """Where in the step these instructions stand."""
        return [n for n, x in enumerate(self.step) if x.name.startswith(prefix) and operands in x.operands]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The objects that installing has left in build/cuda where it has."""
    return cuda_code.installed()


@pytest.fixture(scope="module")
def kernels(folder: Path, readings: list[Reading]) -> list[Kernel]:
    steps = {}
    for path in (folder / "instances").glob(f"attn_fwd_*{build.HOPPER_SUFFIX}.o"):
        for function in sass.functions(path):
            assert function.arch == build.HOPPER
            (loop,) = tile_loops(loops(function.code), Work(1, 1, 1))
            # From the first product on: the loop may begin anywhere in it.
            first = next(n for n, x in enumerate(loop.path) if x.opcode == "HGMMA")
            steps[function.name] = loop.path[first:] + loop.path[:first]
    return [Kernel(reading, steps[reading.kernel]) for reading in readings if "_fwd_" in reading.kernel]


@pytest.fixture(scope="module")
def readings(folder: Path) -> list[Reading]:
    """Of Hopper's kernels."""
    return [r for r in cuda_code.read_all(90) if r.kernel.startswith("sm90::")]


@pytest.fixture(scope="module")
def backward(readings: list[Reading]) -> dict[str, Reading]:
    """The kernels that own keys, by head dim and gradients: "128, both"."""
    found = {}
    for reading in readings:
        match = re.fullmatch(r"sm90::attn_bwd_dkdv_kernel<bf16, (.*)>", reading.kernel)
        if match is not None:
            found[match[1]] = reading
    return found


def test_every_instance_is_there(kernels: list[Kernel]) -> None:
    assert Counter(k.name for k in kernels) == Counter(
        f"sm90::attn_fwd_kernel<{dtype}, {dim}>" for dtype in ("bf16", "fp16") for dim in (64, 128, 256)
    )


def test_they_are_not_read_for_other_cards() -> None:
    assert [r.name for r in cuda_code.read_all(80, (128,), ("fwd",)) if "sm90" in r.kernel] == []


def test_the_registers_at_entry_are_what_setmaxnreg_starts_from(kernels: list[Kernel]) -> None:
    """65536 by the threads of a block; else setmaxnreg would be ignored, and ptxas would say so."""
    for kernel in kernels:
        assert kernel.reading.registers == (128 if kernel.dim == 64 else 168), kernel.name


def test_ptxas_has_nothing_to_complain_of(readings: list[Reading]) -> None:
    """C7508 and C7510 to C7514: products made to wait for each other, setmaxnreg ignored."""
    assert [(r.kernel, r.complaints) for r in readings if r.complaints] == []


def test_what_ptxas_complains_of_is_told(tmp_path: Path) -> None:
    name = "_ZN8attnfuse4sm9015attn_fwd_kernelINS_4bf16ELi64EEEvNS0_16ForwardArgumentsE"
    said = f"(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function '{name}'"
    (tmp_path / "attn.ptxas.txt").write_text(f"ptxas info    : {said}\nptxas info    : Used 168 registers\n")
    assert list(cuda_code.complaints(tmp_path, "attn").values()) == [[said]]
    assert list(cuda_code.complaints(tmp_path, "attn")) == [sass.demangled(name)]


def test_the_products_are_the_wide_ones(kernels: list[Kernel]) -> None:
    wanted = {64: ["64x112x16", "64x64x16"], 128: ["64x128x16"], 256: ["64x80x16", "64x256x16"]}
    for kernel in kernels:
        assert list(dict.fromkeys(kernel.widths)) == wanted[kernel.dim], kernel.name
        # Q K^T in steps of 16 of the head dim, P V in steps of 16 of the columns
        assert len(kernel.widths) == kernel.dim // 16 + kernel.scores // 8, kernel.name


def test_a_step_is_one_tile(kernels: list[Kernel]) -> None:
    """As csrc gives its shape: its FLOP, nothing computed twice, a score's worth of columns in each thread."""
    for kernel in kernels:
        assert (kernel.loop.name, kernel.loop.tiles, kernel.loop.repeated) == ("full", 1, 1.0), kernel.name
        columns = re.match(r"\d+x(\d+) ", kernel.reading.tile)
        assert columns is not None and int(columns[1]) == 2 * kernel.scores, kernel.name
        assert kernel.loop.instructions == len(kernel.step)


def test_a_step_touches_no_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("LDL") == kernel.count("STL") == kernel.loop.step_local == 0, kernel.name


def test_the_exponentials_stand_between_the_two_waits(kernels: list[Kernel]) -> None:
    """Behind the wait for Q K^T and before that for P V: what they take is hidden behind P V."""
    for kernel in kernels:
        scores_ready, out_ready = (kernel.places("WARPGROUP.DEPBAR", f"gsb0, {n}") for n in ("0x1", "0x0"))
        exponentials = kernel.places("MUFU.EX2")
        assert len(scores_ready) == len(out_ready) == 1, kernel.name
        assert len(exponentials) == kernel.scores + 2  # and two that rescale
        assert scores_ready[0] < min(exponentials) and max(exponentials) < out_ready[0], kernel.name
        assert kernel.loop.overlapped == 1.0, kernel.name


def test_a_step_takes_turns_once(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        turns = 0 if kernel.dim == 256 else 1
        assert kernel.count("BAR.SYNC") == kernel.count("BAR.ARV") == turns, kernel.name


def test_few_instructions_a_score(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        # 4.5 are the softmax's own: FMNMX, FFMA, MUFU, FADD and half an F2FP. At 256 a tile has 40 scores a thread
        # to share what every tile costs.
        assert 4.5 < kernel.loop.per_element <= (7.3 if kernel.dim != 256 else 9.6), kernel.name


def test_the_ceiling_is_that_of_flashattention_3(kernels: list[Kernel]) -> None:
    """Or above it, at every head dim (published.py)."""
    for kernel in kernels:
        theirs = flash_attention_3("fwd", kernel.dim)
        assert kernel.loop.ceiling is not None and round(kernel.loop.ceiling) >= round(theirs.ceiling), kernel.name


def plain(reading: Reading) -> LoopReading:
    """Of the steps that make all that the kernel can make, the one without softcap: it has fewer instructions."""
    most = max(loop.tensor or 0 for loop in reading.loops)
    return min((loop for loop in reading.loops if loop.tensor == most), key=lambda loop: loop.instructions)


def test_the_backward_is_there(backward: dict[str, Reading]) -> None:
    assert set(backward) == {"64, both", "128, both", "256, value", "256, key"}


def test_the_backward_touches_no_local_memory(backward: dict[str, Reading]) -> None:
    for reading in backward.values():
        assert (reading.registers, reading.local, reading.loop_local) == (168, 0, 0), reading.kernel


def test_the_backwards_products_are_the_wide_ones(backward: dict[str, Reading]) -> None:
    """S^T and dP^T, dV and dK, dQ^T or dQ: how many of each width."""
    wanted = {
        "64, both": {"64x64x16": 2 * 4 + 2 * 4, "64x32x16": 8},
        "128, both": {"64x80x16": 2 * 8 + 8, "64x128x16": 2 * 5},
        "256, value": {"64x64x16": 16, "64x256x16": 4},
        "256, key": {"64x64x16": 2 * 16, "64x128x16": 8, "64x256x16": 4},
    }
    for name, reading in backward.items():
        widths: Counter[str] = Counter()
        for product, count in plain(reading).products.items():
            widths[product.split(".")[1]] += count
        assert widths == wanted[name], reading.kernel
        assert plain(reading).repeated == 1.0


def test_left_operands_are_in_registers(folder: Path) -> None:
    """At 64 those of every product: K, V, K^T, p and dS. Elsewhere p and dS, and of dV's launch at 256 half of K."""
    wanted = {"64, both": (0, 24), "128, both": (24, 34), "256, value": (8, 20), "256, key": (40, 44)}
    for dim in (64, 128, 256):
        for function in sass.functions(folder / "instances" / f"attn_bwd_d{dim}{build.HOPPER_SUFFIX}.o"):
            match = re.fullmatch(r"sm90::attn_bwd_dkdv_kernel<bf16, (.*)>", function.name)
            if match is not None:
                found = [
                    [x.operands.split(",")[1].strip().startswith("gdesc") for x in loop.path if x.opcode == "HGMMA"]
                    for loop in tile_loops(loops(function.code), Work(1, 1, 1))
                ]
                assert (sum(max(found, key=len)), max(map(len, found))) == wanted.pop(match[1]), function.name
    assert not wanted


def test_the_backward_adds_dq_as_it_says(folder: Path) -> None:
    """By bulk copies out of shared memory, or 16 bytes a thread out of the registers."""
    for dim in (64, 128, 256):
        for function in sass.functions(folder / "instances" / f"attn_bwd_d{dim}{build.HOPPER_SUFFIX}.o"):
            if "dkdv" in function.name and "value" not in function.name:
                bulk = sum(x.opcode == "UBLKRED" for x in function.code)
                wide = sum(x.name.startswith("REDG") and "F32x4" in x.name for x in function.code)
                assert (bulk > 0, wide > 0) == (dim == 64, dim != 64), function.name


def test_what_bulk_additions_read_is_counted(folder: Path, readings: list[Reading]) -> None:
    """4 bytes for each number of a tile of dQ, at 128 bytes a clock; of nothing where no bulk addition is."""
    found = {r.kernel: r for r in readings}
    for path in sorted((folder / "instances").glob(f"attn_bwd_d[0-9]*{build.HOPPER_SUFFIX}.o")):
        for function in [f for f in sass.functions(path) if "dkdv" in f.name]:
            dim, kernel = int(function.name.split(", ")[1]), found[function.name]
            rows, columns, warps = map(int, re.findall(r"\d+", kernel.tile))
            products = {"both": 5, "value": 2, "key": 4}[function.name.split(", ")[2].rstrip(">")]
            work = Work(rows, columns, warps - 4, (dim,) * products, 2 * rows * dim * 2)
            found_in = []
            for loop, read in zip(tile_loops(loops(function.code), work), kernel.loops, strict=True):
                bulk = any(x.opcode == "UBLKRED" for x in loop.path)
                assert read.shared == cost(loop, work, 90).shared + bulk * rows * dim * 4 / 128, function.name
                found_in.append(bulk)
            # Two with softcap and two without: one of each makes dQ.
            assert found_in.count(True) == (2 if dim == 64 else 0), function.name


def test_the_exponentials_of_the_backward_are_hidden(backward: dict[str, Reading]) -> None:
    """Behind dP^T; at 128 there are not registers enough for all, and dV alone has no product to hide them."""
    hidden = {name: plain(reading).overlapped for name, reading in backward.items()}
    assert hidden["64, both"] == hidden["256, key"] == 1.0
    assert hidden["128, both"] is not None and hidden["128, both"] > 0.25


def test_few_instructions_of_the_backward_a_score(backward: dict[str, Reading]) -> None:
    """Five are the softmax's own: FADD, FFMA, MUFU, FADD, FMUL, and a pair of halves of F2FP."""
    most = {"64, both": 13.4, "128, both": 13.6, "256, value": 8.1, "256, key": 17.4}
    for name, reading in backward.items():
        assert 5.0 < plain(reading).per_element <= most[name], reading.kernel


def test_the_backwards_ceilings_are_those_of_flashattention_3(backward: dict[str, Reading]) -> None:
    """Or above them, at every head dim; at 256 two launches take six products for five."""

    def ceiling(name: str) -> float:
        found = plain(backward[name]).ceiling
        assert found is not None
        return found

    two_launches = 5 / (2 / ceiling("256, value") + 4 / ceiling("256, key"))
    ours = {64: ceiling("64, both"), 128: ceiling("128, both"), 256: two_launches}
    for dim, found in ours.items():
        assert round(found) >= round(flash_attention_3("bwd", dim).ceiling), dim


def test_the_kernel_over_rows(readings: list[Reading]) -> None:
    """No local memory, all exponentials behind dP, and the tensor cores bind but at 256, where shared memory does."""
    found = {r.kernel: r for r in readings if r.kernel.startswith("sm90::attn_bwd_dq_kernel")}
    assert len(found) == 6
    for reading in found.values():
        assert (reading.registers, reading.local, reading.loop_local) == (168, 0, 0), reading.kernel
        assert plain(reading).overlapped == 1.0, reading.kernel
        wide = ", 256>" in reading.kernel
        assert plain(reading).binding == ("shared" if wide else "tensor"), reading.kernel
        assert plain(reading).per_element <= (14.7 if wide else 8.1), reading.kernel


def test_nobody_touches_what_a_product_under_way_owns(folder: Path) -> None:
    """Accumulators, and left operands in registers, on every path; and all are waited for in the end."""
    checked = 0
    for path in sorted((folder / "instances").glob(f"attn_*{build.HOPPER_SUFFIX}.o")):
        for function in sass.functions(path):
            if any(x.opcode == "HGMMA" for x in function.code):
                assert hazards(function.code) == [], function.name
                checked += 1
                if "bf16" in function.name:
                    assert len(hazards(function.code, waits=False)) > 20, function.name
    assert checked == 2 * (3 + 3 + 4)


def behind(code: Sequence[Instruction], register_count: Instruction) -> list[Instruction]:
    """What may be executed after a setmaxnreg, up to the end."""
    flow = Flow(code)
    ((start, at),) = [(n, b.index(register_count)) for n, b in enumerate(flow.blocks) if register_count in b]
    found, waiting, seen = list(flow.blocks[start][at:]), list(flow.next[start]), set()
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen.add(block)
            found += flow.blocks[block]
            waiting += flow.next[block]
    return found


def test_no_thread_uses_registers_that_it_has_not(folder: Path) -> None:
    """setmaxnreg leaves a thread so many: R0 to that number less one. Neither ptxas nor emulation says otherwise."""
    checked = 0
    for path in sorted((folder / "instances").glob(f"attn_*{build.HOPPER_SUFFIX}.o")):
        for function in sass.functions(path):
            for change in [x for x in function.code if x.opcode == "USETMAXREG"]:
                limit = int(re.findall(r"0x([0-9a-f]+)", change.operands)[-1], 16)
                code = behind(function.code, change)
                highest = max(int(n) for x in code for n in re.findall(r"\bR(\d+)\b", x.operands))
                products = [product_of(x) for x in code if x.opcode == "HGMMA"]
                highest = max([highest, *(p.accumulators.stop - 1 for p in products)])
                assert len(code) > 100 and highest < limit, (function.name, change.name, limit, highest)
                checked += 1
    # Of both dtypes three forwards, three over rows and four over keys: what the copying warps give, the others take.
    assert checked == 2 * (3 + 3 + 4) * 2
