"""`attnfuse inspect`: loops by control flow, clocks by unit, what makes a kernel worse; and the kernels' own promises.

The kernels are compiled for cards that are not here and held to the table in docs/machine_code.csv: line by line where
the compilers are those the table was made with, by what it promises of any compiler elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_flight import hazards

from attnfuse.build import BuildError
from attnfuse.cli.main import main
from attnfuse.machine import document, flow, pool, reading, sass, table, triton_code
from attnfuse.machine.flow import Flow, loops
from attnfuse.machine.model import Work, blocks_per_sm, cost
from attnfuse.machine.published import flash_attention_3

ROOT = Path(__file__).parent.parent


def code(text: str) -> list[sass.Instruction]:
    """Instructions from lines `[label:] [@guard] NAME operands`, addresses 16 apart; `label` as an operand is one."""
    lines = [line.split(";")[0].strip() for line in text.strip().splitlines()]
    labels = {line.split(":")[0]: n * 16 for n, line in enumerate(lines) if ":" in line}
    listing = []
    for n, line in enumerate(lines):
        words = line.split(":")[-1].split()
        words = [f"{labels[w]:#x}" if w in labels else w for w in words]
        listing.append(f"        /*{n * 16:04x}*/                   {' '.join(words)} ;")
    return sass.instructions("\n".join(listing))


# What the CUDA compiler makes of a loop: a rotated head, a skipped part, a part moved behind the end, padding.
LOOP = """
    MOV R0
    @!P0 BRA out
head: FADD R1
    @P1 BRA rare
    FMUL R2
back: IADD3 R3
    @P2 BRA head
out: EXIT
rare: STL [R1], R4
    BRA back
pad: BRA pad
"""


def test_a_loop_is_what_control_can_do() -> None:
    (loop,) = loops(code(LOOP))
    assert loop.begin == 0x20
    # The part behind the end belongs to the loop: between its first and last line it is not.
    assert sorted(loop.names) == ["BRA", "FADD", "FMUL", "IADD3", "STL"]
    assert (loop.local, loop.instructions, loop.depth) == (1, 7, 0)
    assert [x.name for x in loop.path] == ["FADD", "BRA", "FMUL", "IADD3", "BRA"]


def test_a_backward_branch_without_a_loop_is_none() -> None:
    text = """
        BRA later
    earlier: STL [R1], R4
        EXIT
    later: FADD R1
        BRA earlier
    """
    assert loops(code(text)) == []


def test_loops_nest() -> None:
    text = """
    outer: FADD R1
    inner: HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA inner
        @P3 BRA inner
        FMUL R2
        @P1 BRA outer
        EXIT
    """
    first, second = loops(code(text))
    assert (first.begin, first.depth, second.begin, second.depth) == (0, 0, 16, 1)
    assert second.parent is first
    assert not first.multiplies and second.multiplies  # the product is the inner loop's own
    assert len(second.code) == 3  # two back edges to one head are one loop
    assert [x.name for x in first.own] == ["FADD", "FMUL", "BRA"]


def test_a_loop_around_a_tile_loop_is_none() -> None:
    """A persistent block multiplies before its inner loop: the first tile of each item."""
    text = """
    item: HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
    tile: HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
        @P0 BRA tile
        @P1 BRA item
        EXIT
    """
    outer, inner = loops(code(text))
    assert outer.multiplies and inner.multiplies
    assert reading.tile_loops([outer, inner], Work(64, 128, 4)) == [inner]


def test_what_a_rare_tile_spills_is_not_in_the_step() -> None:
    text = """
    head: HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA full
        STL [R1], R4
        LDL R4, [R1]
    full: FADD R1
        @P1 BRA head
        EXIT
    """
    (loop,) = loops(code(text))
    assert (loop.local, loop.step_local) == (2, 0)
    (always,) = loops(code("head: HMMA.16816.F32 R4, R8, R12, R4\n STL [R1], R4\n @P1 BRA head\nEXIT"))
    assert (always.local, always.step_local) == (1, 1)


def test_the_path_takes_every_product_and_copy_and_the_least_beside() -> None:
    text = """
    head: HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA nomask
        FSEL R1, R1, -INF , P1
        FSEL R2, R2, -INF , P1
    nomask: @P1 BRA last
        LDGSTS.E.BYPASS.128 [R241], desc[UR40][R232.64]
    last: MUFU.EX2 R1, R1
        @P2 BRA head
        EXIT
    """
    (loop,) = loops(code(text))
    names = [x.opcode for x in loop.path]
    assert names == ["HMMA", "BRA", "BRA", "LDGSTS", "MUFU", "BRA"]
    assert len(loop.code) == 8


def test_the_path_adds_what_the_tile_adds() -> None:
    """Each part of dQ is asked whether the head dim has it: an ordinary tile has them all."""
    adds = "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4"
    for name in (adds, adds.replace("REDG", "RED"), "UBLKRED.G.S.ADD.F32.RN [UR8], [UR4], UR6"):
        text = f"""
        head: HMMA.16816.F32 R4, R8, R12, R4
            @P0 BRA second
            {name}
        second: @P1 BRA last
            {name}
        last: @P3 BRA next
            STG.E.128 desc[UR4][R2.64], R4
        next: @P2 BRA head
            EXIT
        """
        (loop,) = loops(code(text))
        assert [x.opcode for x in loop.path] == ["HMMA", "BRA", *[name.split(".")[0], "BRA"] * 2, "BRA"]


def test_threads_that_parted_meet_where_bssy_says() -> None:
    text = """
    head: BSSY B0, meet
        @P0 BRA side
        FADD R1
        BSYNC B0
    side: FMUL R2
        BSYNC B0
        EXIT
    meet: FFMA R3
        @P1 BRA head
        EXIT
    """
    (loop,) = loops(code(text))
    assert {"FADD", "FMUL", "FFMA"} <= set(loop.names)
    assert "EXIT" not in loop.names


def test_conditional_branches_of_every_spelling_fall_through() -> None:
    for branch in ("@P0 BRA there", "@!UP1 BRA there", "BRA P0, there", "BRA.U UP0, there", "BRA.U !UP2, there"):
        assert len(Flow(code(f"{branch}\n FADD R1\nthere: EXIT")).next[0]) == 2, branch
    assert Flow(code("BRA there\n FADD R1\nthere: EXIT")).next[0] == [2]
    assert Flow(code("BRA.DIV UR4, there\n FADD R1\nthere: EXIT")).next == [[]]  # never taken: one block


def test_a_computed_jump_is_refused() -> None:
    with pytest.raises(ValueError, match="BRX"):
        loops(code("BRX R2 -0x10\nEXIT"))


def synthetic(instructions: int, guarded: str = "") -> flow.Loop:
    """A loop such as FlashAttention-3's at head dim 128 with a 128 x 128 tile: 16 products, 66 exponentials."""
    lines = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24"] * 7
    lines += ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0"]
    lines += ["HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88"] * 7
    lines += ["HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR16].tnspB, R88, gsb0"]
    lines += ["WARPGROUP.DEPBAR.LE gsb0, 0x1", *["MUFU.EX2 R1, R1"] * 66, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    lines += [guarded] * bool(guarded)
    lines += ["FADD R1"] * (instructions - len(lines) - 1)
    (loop,) = loops(code("head: " + "\n".join(lines) + "\n @P0 BRA head\nEXIT"))
    return loop


FA3 = Work(128, 128, 8, (128, 128), copied=2 * 128 * 128 * 2)


def test_the_model_gives_the_published_shares() -> None:
    """469 instructions: 7.3 an element, MUFU 52 %, issue 46 %, shared memory 88 %, as published.py has it."""
    c = cost(synthetic(469), FA3, 90)
    assert (c.tiles, c.tensor) == (1, 2048)
    assert round(c.per_element, 1) == 7.3
    assert [round(100 * (c.share(unit) or 0)) for unit in ("ex2", "issue", "shared")] == [52, 46, 88]
    assert (c.binding, c.ceiling) == ("tensor", 989)
    assert c.overlapped == 1.0
    # A block that issues more than the tensor cores take is bound by it.
    slow = cost(synthetic(1200), FA3, 90)
    assert slow.binding == "issue" and slow.ceiling == pytest.approx(989 * 2048 / 2400)
    assert cost(synthetic(469), replace(FA3, rows=64), 90).tiles == 2  # two tiles an iteration
    wide = cost(synthetic(469), replace(FA3, depths=(96, 96)), 90)  # a head dim of 96 computed in 128
    assert (wide.tiles, wide.repeated) == (1, 128 / 96) and wide.ceiling == pytest.approx(989 * 96 / 128)


def test_what_warps_compute_twice_is_no_second_tile() -> None:
    """64 rows by eight warps of 16 rows each: every product is done twice, on one copied tile."""
    text = "head: HMMA.16816.F32 R4, R8, R12, R4\n" * 1 + "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]\n"
    (loop,) = loops(code(text + "@P0 BRA head\nEXIT"))
    c = cost(loop, Work(64, 8, 8, (16,), copied=8 * 512), 80)
    assert (c.tiles, c.repeated) == (1, 2.0)
    assert c.ceiling == pytest.approx(312 * (8 * 4096 / 2048) / 2 / 32)  # shared memory binds: 4096 bytes, 32 clocks
    assert cost(loop, Work(64, 8, 8, (16,), copied=4 * 512), 80).tiles == 2


def test_what_is_not_known_is_not_told() -> None:
    (loop,) = loops(code("head: HMMA.16816.F32.BF16 R4, R8, R12, R4\n MUFU.EX2 R1, R1\n @P0 BRA head\nEXIT"))
    c = cost(loop, Work(16, 8, 1, (16,)), 120)
    assert (c.tensor, c.ceiling, c.binding, c.overlapped) == (None, None, "unknown", None)
    assert c.ex2 == 2


def test_never_executed_instructions_are_issued_and_nothing_else() -> None:
    plain, filled = cost(synthetic(469), FA3, 90), cost(synthetic(469, "@!PT LDS RZ, [RZ]"), FA3, 90)
    assert (plain.shared, plain.issue) == (filled.shared, filled.issue)
    assert cost(synthetic(469, "LDS.128 R4, [R1]"), FA3, 90).shared == plain.shared + 8 * 512 / 128


A_PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR16].tnspB, R24, gsb0"


def moved(line: str) -> tuple[float, dict[str, int]]:
    """Bytes that an instruction moves for four warps, beside those of a product, and the mix."""
    work = Work(64, 64, 4, (16,))
    with_it, without = (loops(code(f"head: {A_PRODUCT}\n{x}@P0 BRA head\nEXIT"))[0] for x in (f"{line}\n", ""))
    c = cost(with_it, work, 90)
    return (c.shared - cost(without, work, 90).shared) * 128, dict(c.mix)


def test_shared_memory_is_counted_whichever_way_it_goes() -> None:
    """A product reads what is not in registers, transposed or not; what is bulk does not say what it moves."""
    assert moved("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4].tnspA, R24, gsb0")[0] == 2 * 64 * 16 * 2
    assert moved("HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR4].tnspB, R24, gsb0")[0] == 64 * 16 * 2
    bytes_stored, mix = moved("STSM.16.MT88.4 [R4], R8")
    assert bytes_stored == 4 * 512 and mix["shared"] == 1
    for name in ("UBLKCP.S.G [UR4], [UR8], UR6", "UBLKRED.G.S.ADD.F32.RN [UR8], [UR4], UR6", "LDC.64 R4, c[0x0][R1]"):
        assert moved(name)[0] == 0
    assert moved("UBLKRED.G.S.ADD.F32.RN [UR8], [UR4], UR6")[1]["copy"] == 1


# As cuobjdump of CUDA 13.0 prints them for sm_80, sm_90a, sm_100a and sm_120a: bytes of a thread.
WIDTHS = {
    "LDS": 4, "LDS.S16": 2, "LDS.U8": 1, "STS.64": 8, "LDS.128": 16, "ATOMS.ADD": 4, "ATOMS.CAST.SPIN.64": 8,
    "LDG.E": 4, "LDG.E.EF": 4, "LDG.E.S8.STRONG.SYS": 1, "LDG.E.EL.LTC128B.128.CONSTANT": 16, "LDG.E.ENL2.256": 32,
    "LDGSTS.E.BYPASS.LTC64B.128": 16, "LDGSTS.E.64": 8, "STG.E.NA.128": 16, "STG.E.U16": 2, "LD.E.64.STRONG.SYS": 8,
    "ST.E.128": 16, "LDL.LU.64": 8, "STL": 4, "ATOM.E.ADD.STRONG.GPU": 4, "ATOMG.E.EXCH.128.STRONG.GPU": 16,
    "ATOMG.E.MAX.S64.STRONG.GPU": 8, "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 4, "RED.E.ADD.F64.RN.STRONG.GPU": 8,
    "RED.E.ADD.F16x2.RN.STRONG.GPU": 4, "REDG.E.ADD.F32x2.FTZ.RN.STRONG.GPU": 8,
    "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 16, "REDG.E.MAX.BF16x8.RN.STRONG.GPU": 16, "SHFL.BFLY": 4, "SHFL.IDX": 4,
    "REDUX.MAX.S32": 0, "LDTM.x32": 0, "SYNCS.EXCH.64": 0,
}  # fmt: skip


@pytest.mark.parametrize("name, width", WIDTHS.items())
def test_what_goes_through_l1_is_counted_by_its_width(name: str, width: int) -> None:
    assert moved(f"{name} R4, R8")[0] == 4 * 32 * width
    assert moved(f"@!PT {name} R4, R8")[0] == 0


@pytest.mark.parametrize("name, part", [("REDG.E.ADD.F32_V4.RN", "F32_V4"), ("LDG.E.128B", "128B"), ("LDS.X4", "X4")])
def test_a_width_that_is_not_known_is_told(name: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"{name} at 0x10 has a modifier that is not known: {part}"):
        moved(f"{name} R4, R8")


def test_what_bulk_reductions_read_is_told_by_the_tile() -> None:
    """Where the kernel has any: in its loop, or in a warp beside those that multiply."""
    adds = "UBLKRED.G.S.ADD.F32.RN [UR8], [UR4], UR6"

    def shared(text: str, reduced: int = 64 * 64 * 4) -> float:
        function = sass.Function("kernel", "sm_90a", 128, 0, 0, code(text))
        work = Work(64, 64, 4, (16,), reduced=reduced)
        found = reading.read_function(function, work, "object", 90, "kernel", "", "").loops
        return found[-1].shared

    alone = f"head: {A_PRODUCT}\n@P0 BRA head\nEXIT"
    inside = f"head: {A_PRODUCT}\n{adds}\n@P0 BRA head\nEXIT"
    beside = f"@P1 BRA other\n{alone}\nother: {adds}\n@P0 BRA other\nEXIT"
    assert shared(alone) == shared(inside, 0) == 64 * 16 * 2 / 128
    assert shared(inside) == shared(beside) == shared(alone) + 128
    # Of two loops one of which adds, the other has nothing to add.
    assert shared(f"{alone[:-4]}{inside.replace('head', 'next')}") == shared(inside)
    assert shared(f"{inside[:-4]}{alone.replace('head', 'next')}") == shared(alone)


@pytest.mark.parametrize(
    "touch, what",
    [("FADD R1, R1, R87", "touches accumulators"), ("STS.128 [R2], R84", "touches accumulators"),
     ("MOV R59, R1", "writes to the left operand"), ("LDSM.16.M88.4 R56, [R2]", "writes to the left operand"),
     ("HGMMA.64x32x16.F32.BF16 R80, gdesc[UR8], R80, gsb0", "other accumulators"),
     ("HGMMA.64x32x16.F32.BF16 R48, gdesc[UR8], R48, gsb0", "accumulates over the left operand"),
     ("HGMMA.64x32x16.F32.BF16 R96, R24, gdesc[UR8], R96, gsb0", "takes accumulators")],
)  # fmt: skip
def test_what_a_product_owns_until_it_is_waited_for(touch: str, what: str) -> None:
    """Of the first of two groups: accumulators R24 to R87, or a left operand in R56 to R59, which others may read."""
    if "left operand" in what:
        first = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0\nFADD R1, R56, R2"
    else:
        first = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0"
    second = "HGMMA.64x16x16.F32.BF16 R160, gdesc[UR8], R160, gsb0"

    def found(wait: int) -> list[str]:
        waits = [f"WARPGROUP.DEPBAR.LE gsb0, {n:#x}" for n in (wait, 0)]
        return hazards(code("\n".join([first, second, waits[0], touch, waits[1], "EXIT"])))

    assert any(what in line for line in found(2)) and found(1) == []
    assert hazards(code(f"{second}\nEXIT"))[-1].endswith("products are under way at the end")


def test_a_loop_that_leaves_a_product_out_repeats_nothing() -> None:
    """As one does that has no dQ to make: its ceiling is not above the card's."""
    (loop,) = loops(code(f"head: {A_PRODUCT}\n@P0 BRA head\nEXIT"))
    whole, part = (cost(loop, Work(64, 64, 4, depths), 90) for depths in ((16,), (16, 16)))
    assert whole.repeated == part.repeated == 1.0 and part.ceiling == whole.ceiling


def test_wgmma_that_is_waited_for_hides_nothing() -> None:
    text = "head: HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0\n WARPGROUP.DEPBAR.LE gsb0, 0x0\n"
    (loop,) = loops(code(text + "MUFU.EX2 R1, R1\n @P0 BRA head\nEXIT"))
    assert cost(loop, Work(64, 128, 4, (16,)), 90).overlapped == 0.0


def test_masked_loops_are_told_by_their_selects() -> None:
    product, mask = "HMMA.16816.F32 R4, R8, R12, R4\n", "FSEL R1, R1, -INF , P0\n"
    (full,) = loops(code(f"head: {product}{mask}@P0 BRA head\nEXIT"))
    (masked,) = loops(code(f"head: {product}{mask * 4}@P0 BRA head\nEXIT"))
    work = Work(16, 8, 1, (16,))  # four elements a thread
    assert (cost(full, work, 80).masked, cost(masked, work, 80).masked) == (False, True)


def test_blocks_of_an_sm() -> None:
    assert blocks_per_sm(128, 0, 8, 90) == 2  # registers
    assert blocks_per_sm(129, 0, 8, 90) == 1  # handed out in units
    assert blocks_per_sm(32, 113 * 1024, 4, 90) == 2  # shared memory
    assert blocks_per_sm(32, 114 * 1024, 4, 90) == 1  # with what the system takes
    assert blocks_per_sm(16, 0, 32, 120) == 1  # 48 warps


def line(**changes: str) -> table.Line:
    blank = dict.fromkeys(table.Line._fields, "")
    usual = {
        "language": "cuda", "arch": "sm_90", "kernel": "k", "loop": "full", "shared_bytes": "1024", "registers": "128",
        "local_in_loops": "0", "local_in_step": "0", "per_element": "7.97", "ceiling": "989",
    }  # fmt: skip
    return table.Line(**{**blank, **usual, **changes})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"local_in_loops": "1"}, "1 local-memory instructions in a loop"),
        ({"local_in_step": "1"}, "1 local-memory instructions in an ordinary iteration"),
        ({"per_element": "8.01"}, "8.01 instructions for a score element, was 7.97"),
        ({"ceiling": "988"}, "988 TFLOP/s"),
        ({"ceiling": ""}, "unknown TFLOP/s"),
        ({"shared_bytes": str(228 * 1024)}, "bytes of shared memory"),
        ({"loop": "masked"}, "no longer there"),
    ],
)
def test_worse_is(changes: dict[str, str], told: str) -> None:
    (found,) = table.worse([line()], [line(**changes)])
    assert told in found


def test_more_registers_alone_are_not_worse() -> None:
    assert table.worse([line()], [line(registers="255", per_element="7.5")]) == []
    assert table.worse([line()], [line(kernel="another", local_in_loops="9")]) == []
    merged = table.merged([line(), line(kernel="b")], [line(registers="255")])
    assert [(x.kernel, x.registers) for x in merged] == [("b", "128"), ("k", "255")]


def test_the_table_and_its_documents_agree() -> None:
    kept = table.kept()
    assert table.from_csv(table.to_csv(kept)) == kept
    assert len({x.key for x in kept}) == len(kept) > 100
    assert document.ceilings(kept) == (document.DOCS / "predicted_ceilings.md").read_text()
    assert document.cuda(kept) == (document.DOCS / "cuda_machine_code.md").read_text()


# Work for `pool`, at the top so that another process can be sent it.
def a_reading(name: str) -> list[reading.Reading]:
    return [reading.Reading("none", 90, name, "")]


def test_what_is_announced_is_told() -> None:
    """The bar's time left is honest: what steps take adds up to what was announced, whatever ninja has left to do."""
    for ran in (["nvcc a", "nvcc b", "link"], ["nvcc a"], []):

        def run(told: Any, ran: list[str] = ran) -> Path:
            for command in ran:
                told(command)
            return Path("folder")

        def then(folder: Path) -> list[pool.Task]:
            return [pool.Task(f"{folder} {n}", 0.5, partial(a_reading, f"{folder} {n}")) for n in range(3)]

        tasks = [pool.Task(name, 2.0, partial(a_reading, name)) for name in ("one", "two")]
        build = pool.Build("sm_90", 4.0, 2, run, then, 1.5)
        steps: list[pool.Step] = []
        found = list(pool.done(tasks, [build], 2, steps.append))
        assert sorted(r.kernel for r in found) == ["folder 0", "folder 1", "folder 2", "one", "two"]
        assert sum(step.effort for step in steps) == pool.effort(tasks, [build]) == 13.5
        assert sorted(r.kernel for step in steps for r in step.readings) == sorted(r.kernel for r in found)


def test_a_build_that_fails_ends_it() -> None:
    def run(told: Any) -> Path:
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        list(pool.done([], [pool.Build("sm_90", 4.0, 2, run, lambda folder: [], 0.0)], 1))


def test_configurations_are_shared_out() -> None:
    wanted = triton_code.configs()
    tasks = pool.triton_tasks(wanted, 2)
    groups = [task.run.args[0] for task in tasks if isinstance(task.run, partial)]
    assert sorted(config for group in groups for config in group) == sorted(wanted)
    assert all(len({config.arch for config in group}) == 1 for group in groups)  # disassembled as one run
    assert all(len(group) > 1 or pool.seconds(group[0]) > 4 for group in groups[:-8])
    assert pool.effort(tasks, []) == pytest.approx(sum(map(pool.seconds, wanted)))
    assert max(task.effort for task in tasks) <= pool.TOGETHER
    longest = [max(map(pool.seconds, group)) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert len(pool.triton_tasks(wanted, 16)) >= 64  # enough for every process


# The Triton configurations that the table has, as `triton_code.configs` takes them: all but one kernel on sm_120.
KEPT: tuple[dict[str, Any], ...] = (
    {"archs": (80, 90, 100)},
    {"archs": (120,), "passes": [p for p in triton_code.PASSES if p != "dkdv1"]},
    # At 256 the one-pass tile takes more shared memory than a block has there; nothing chooses it (tuning.ONE_PASS).
    {"archs": (120,), "passes": ["dkdv1"], "head_dims": (64, 96, 128)},
)


def test_the_table_has_the_tuned_configurations() -> None:
    there = {(x.arch, x.kernel) for x in table.kept() if x.language == "triton"}
    wanted = [config for chosen in KEPT for config in triton_code.configs(**chosen)]
    assert there == {(f"sm_{c.arch}", c.kernel) for c in wanted}


def test_hopper_forwards_have_flashattention_3s_ceiling() -> None:
    """Or a higher one, as the table has them; tests/test_hopper_machine.py tells of the backward."""
    found = [x for x in table.kept() if x.kernel.startswith("sm90::attn_fwd") and x.loop]
    assert found
    for x in found:
        theirs = flash_attention_3("fwd", int(x.kernel.split(", ")[1].rstrip(">")))
        assert round(float(x.ceiling)) >= round(theirs.ceiling), x.name


def test_published_figures_are_those_of_their_machine_code() -> None:
    """Of each of FlashAttention-3's kernels one, and the shares by their ceiling's own definition."""
    for pass_ in ("fwd", "bwd"):
        for dim in (64, 128, 256):
            theirs = flash_attention_3(pass_, dim)
            assert theirs.title == f"{theirs.name} *"
            rows, columns = map(int, theirs.name.split()[-1].split("x"))
            # Clocks of the tensor cores and of issuing for a tile, by 8 warps, or by 12 for 192 rows.
            tensor = (2 if pass_ == "fwd" else 5) * 2 * rows * columns * dim / 4096
            warps = 12 if rows == 192 else 8
            assert theirs.issue == pytest.approx(theirs.instructions * warps / 4 / tensor, abs=0.006)
            assert theirs.per_element == pytest.approx(theirs.instructions * warps * 32 / rows / columns, abs=0.006)


def test_the_table_keeps_what_the_project_promises() -> None:
    hold_to_promises(table.kept())


def hold_to_promises(found: list[table.Line]) -> None:
    """What no compiler may change: see `worse` for what a known one may not."""
    assert table.worse([], found) == []  # shared memory
    for x in found:
        if (x.arch, x.kernel) in SPILLS:
            assert x.local_in_loops == SPILLS[x.arch, x.kernel], f"{x.name}: {x.local_in_loops}"
            continue
        heavy = x.kernel.endswith(("everything", "several"))
        ordinary = x.language == "cuda" or (" bf16 " in x.kernel and not heavy)
        if x.kernel.startswith("sm90::") and x.loop:  # masked tiles share the loop of the full ones
            assert x.local_in_step == "0", f"{x.name}: {x.local_in_step} local-memory instructions in its step"
        elif ordinary and any(d in x.kernel for d in (" d64 ", " d128 ", ", 64", ", 128")):
            assert x.local_in_loops == "0", f"{x.name}: {x.local_in_loops} local-memory instructions"
        pass_ = x.kernel.split()[0]
        few = pass_ in ("split", "split16", "few", "few16") and " bf16 " in x.kernel
        if pass_ in ("combine", "reduce") or (few and not heavy):  # at every head dim
            assert x.local_in_loops == "0", f"{x.name}: {x.local_in_loops} local-memory instructions"
        most = MOST.get((x.arch, x.kernel, x.loop))
        assert most is None or float(x.per_element) <= most, f"{x.name}: {x.per_element} instructions an element"


# What touches local memory although kernels of its kind should not, and how often.
SPILLS = {
    ("sm_100", "reduce bf16 d128 plain"): "2",
    ("sm_100", "split bf16 d64 causal"): "3",
    ("sm_120", "dkdv bf16 d128 causal"): "1",
    ("sm_120", "dkdv1 bf16 d64 causal"): "1",
    ("sm_120", "few bf16 d128 causal"): "1",
}
# Instructions for a score element at most.
MOST = {
    ("sm_90", "fwd bf16 d128 plain", "full"): 8.0,
    ("sm_90", "sm90::attn_fwd_kernel<bf16, 128>", "full"): 7.3,
    ("sm_90", "sm90::attn_fwd_kernel<fp16, 128>", "full"): 7.3,
}


def inspect(*arguments: str) -> list[Any]:
    """What `attnfuse inspect --json` prints, from a process of its own: this one may run under TRITON_INTERPRET=1."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "attnfuse", "inspect", "--json", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("["), done.stderr[-3000:]
    return json.loads(done.stdout)


def test_compiled_kernels_are_those_of_the_table() -> None:
    pytest.importorskip("triton")
    usual = ("--language", "triton", "--dtype", "bf16")
    plain = (*usual, "--variant", "plain", "--head-dim", "128")
    found = inspect(*usual, "--arch", "90", "80", "--variant", "plain", "causal", "--head-dim", "64", "128",
                    "--pass", "fwd", "dq", "dkdv", "dkdv1")  # fmt: skip
    found += inspect(*plain, "--arch", "100", "120", "--pass", "fwd")
    found += inspect(*plain, "--arch", "90", "--pass", "split", "split16", "combine", "few", "few16", "reduce")
    found += inspect(*plain, "--arch", "80", "120", "--pass", "split", "few")
    readings = [reading.from_data(data) for data in found]
    assert [f"{r.name}: {r.error}" for r in readings if r.error] == []
    assert len(readings) == 44
    fresh, kept = table.lines(readings), {x.key: x for x in table.kept()}
    hold_to_promises(fresh)
    for new in fresh:
        if new.toolchain == kept[new.key].toolchain:
            assert new == kept[new.key], "the table is not of these sources: attnfuse inspect --write"


def test_a_cubin_is_read_by_its_tile(tmp_path: Path) -> None:
    """Any machine code: here a kernel of another project's, or of a branch whose tile csrc does not tell."""
    pytest.importorskip("triton")
    script = tmp_path / "compile.py"
    script.write_text(
        """
import sys
import triton
from attnfuse.machine import triton_code
triton.runtime.driver.set_active(triton_code.stand_in(90))
kernel, arguments, constants = triton_code.arguments_of(triton_code.Config(90, "bf16", 64, "fwd", "plain"))
open(sys.argv[1], "wb").write(kernel.warmup(*arguments, grid=(1,), **constants).asm["cubin"])
"""
    )
    path = tmp_path / "kernel.cubin"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script), str(path)], env=environment, check=True)
    tile = ("--tile", "128x128", "--warps", "8", "--depths", "64", "64", "--copied", str(2 * 128 * 64 * 2))
    # Two at once, one behind the other, are two of the same.
    (alone,) = sass.functions(path)
    for function in sass.of_cubins([path.read_bytes()] * 2, 90):
        begin = function.code[0].address
        assert function[:5] == alone[:5] and len(function.code) == len(alone.code)
        assert [(x.address - begin, x.guard, x.name) for x in function.code] == [x[:3] for x in alone.code]
    (found,) = inspect("--object", str(path), *tile, "--shared", "114688")
    (full,) = [loop for loop in found["loops"] if loop["name"] == "full"]
    (kept,) = [x for x in table.kept() if x.key == ("triton", "sm_90", "fwd bf16 d64 plain", "full")]
    assert found["kernel"] == "attn_fwd" and full["tiles"] == 1
    if "triton " + __import__("triton").__version__ in kept.toolchain:
        assert f"{full['per_element']:.2f}" == kept.per_element
        assert f"{full['shared']:.0f}" == kept.shared and full["binding"] == kept.binding


def test_what_a_tile_copies_and_adds_is_taken_at_its_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
    head: {A_PRODUCT}
        UBLKCP.S.G [UR4], [UR8], UR6
        UBLKRED.G.S.ADD.F32.RN [UR8], [UR4], UR6
        @P0 BRA head
        EXIT
    """
    monkeypatch.setattr(sass, "functions", lambda path: [sass.Function("kernel", "sm_90a", 128, 0, 0, code(text))])
    given = ["inspect", "--json", "--object", str(tmp_path), "--tile", "64x64", "--warps", "4", "--depths", "16"]

    def shared(*arguments: str) -> Any:
        assert main([*given, *arguments]) == 0
        return json.loads(capsys.readouterr().out)[0]["loops"][0]["shared"]

    assert shared("--copied", "1280", "--reduced", "2560") == shared() + 30 == 46


def test_what_an_object_needs_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--object", "nowhere.o"]) == 2
    assert "--tile" in capsys.readouterr().err
    assert main(["inspect", "--object", str(tmp_path / "nowhere.o"), "--tile", "128x64"]) == 2
    assert "not there" in capsys.readouterr().err
