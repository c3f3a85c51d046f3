"""The table in the repository: one line for each tile loop of each kernel, and what makes a kernel worse.

Worse is, for a kernel of the same name:

    more local-memory instructions in a loop, or in its ordinary iteration
    more instructions for a score element
    a lower predicted ceiling
    more shared memory than a block may have
    a loop or a kernel that is no longer there

More registers alone are not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import build
from .model import MACHINES
from .reading import LoopReading, Reading

PATH = build.CSRC.parent / "docs" / "machine_code.csv"
# A rounding of the printed numbers is no difference.
SMALLEST = 0.006


class Line(NamedTuple):
    """A line of the table, every field as it is printed; "" is unknown, and a kernel without tiles has no loop."""

    language: str
    arch: str
    kernel: str
    loop: str
    toolchain: str
    tile: str
    registers: str
    local_bytes: str
    shared_bytes: str
    blocks_per_sm: str
    local_in_loops: str  # of the kernel's loop that has most
    tiles: str
    instructions: str
    per_element: str
    repeated: str  # products done over products needed
    tensor: str
    ex2: str
    fp32: str
    issue: str
    shared: str
    binding: str
    ceiling: str
    overlapped: str
    local_in_step: str  # of an ordinary iteration
    mix: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.language, self.arch, self.kernel, self.loop

    @property
    def name(self) -> str:
        return " ".join((self.language, self.arch, self.kernel, self.loop))


def lines(readings: Iterable[Reading]) -> list[Line]:
    """The table's lines of some readings, sorted."""
    found = [line for reading in readings for line in _lines(reading)]
    return sorted(found, key=lambda x: (x.language, x.arch.rjust(6), x.kernel, x.loop))


def _lines(reading: Reading) -> list[Line]:
    head = (reading.language, f"sm_{reading.arch}", reading.kernel)
    whole = (
        reading.toolchain, reading.tile, str(reading.registers), str(reading.local), str(reading.shared),
        str(reading.blocks), str(reading.loop_local),
    )  # fmt: skip
    if not reading.loops:
        return [Line(*head, "", *whole, *("",) * (len(Line._fields) - 11))]
    return [Line(*head, loop.name, *whole, *_cells(loop)) for loop in reading.loops]


def _cells(loop: LoopReading) -> tuple[str, ...]:
    tensor, ceiling, overlapped = loop.tensor, loop.ceiling, loop.overlapped
    return (
        str(loop.tiles), str(loop.instructions), f"{loop.per_element:.2f}", f"{loop.repeated:.2f}",
        "" if tensor is None else f"{tensor:.0f}",
        *(f"{x:.0f}" for x in (loop.ex2, loop.fp32, loop.issue, loop.shared)), loop.binding,
        "" if ceiling is None else f"{ceiling:.0f}", "" if overlapped is None else f"{overlapped:.2f}",
        str(loop.step_local),
        " ".join(f"{name}:{count}" for name, count in loop.mix.items()),
    )  # fmt: skip


def to_csv(found: Sequence[Line]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Line._fields)
    writer.writerows(found)
    return out.getvalue()


def from_csv(text: str) -> list[Line]:
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != Line._fields:
        raise ValueError(f"{PATH.name} must begin with the columns {', '.join(Line._fields)}")
    return [Line(*row) for row in rows[1:]]


def kept(path: Path = PATH) -> list[Line]:
    """The table in the repository. Raises FileNotFoundError."""
    return from_csv(path.read_text())


def merged(old: Sequence[Line], new: Sequence[Line]) -> list[Line]:
    """The old table with the kernels of the new one in place of theirs."""
    read = {line.key[:3] for line in new}
    all_lines = [line for line in old if line.key[:3] not in read] + list(new)
    return sorted(all_lines, key=lambda x: (x.language, x.arch.rjust(6), x.kernel, x.loop))


def worse(old: Sequence[Line], new: Sequence[Line]) -> list[str]:
    """In which kernel, and how, `new` is worse than `old`. Kernels that only one of them has are not compared."""
    found = []
    now = {line.key: line for line in new}
    read = {line.key[:3] for line in new}
    for line in new:
        limit = MACHINES[int(line.arch.removeprefix("sm_"))].block_shared * 1024
        if int(line.shared_bytes) > limit:
            found.append(f"{line.name}: {line.shared_bytes} bytes of shared memory, a block may have {limit}")
    for was in old:
        if was.key[:3] not in read:
            continue
        line = now.get(was.key)  # type: ignore[assignment]
        if line is None:
            found.append(f"{was.name}: the loop is no longer there")
            continue
        for field, sign, what in (
            ("local_in_loops", 1, "local-memory instructions in a loop"),
            ("local_in_step", 1, "local-memory instructions in an ordinary iteration"),
            ("per_element", 1, "instructions for a score element"),
            ("ceiling", -1, "TFLOP/s of predicted ceiling"),
        ):
            before, after = getattr(was, field), getattr(line, field)
            if before and (not after or sign * (float(after) - float(before)) > SMALLEST):
                found.append(f"{was.name}: {after or 'unknown'} {what}, was {before}")
    return found
