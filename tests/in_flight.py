"""Which registers of a kernel a wgmma still owns where other instructions touch them: what no emulation can tell.

A product owns its accumulators, and of a left operand in registers those, from its issue to the wait for its group.
ptxas gives registers that the source calls free to other variables; this walks every path of the machine code, with
the groups that are under way on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attnfuse.machine.flow import Flow
from attnfuse.machine.model import WARP, shared_bytes
from attnfuse.machine.sass import Instruction


class Product(NamedTuple):
    accumulators: range
    left: range  # empty where the left operand is in shared memory


Groups = tuple[frozenset[Product], ...]

# Of these the first operand is not written to.
_READS_ONLY = ("ST", "RED", "ATOMS", "BAR", "SYNCS", "U", "R2UR", "R2P", "VOTEU", "WARPSYNC", "ISETP", "FSETP", "PLOP3")


def product_of(x: Instruction) -> Product:
    """What an HGMMA owns: half a register of float32 for each column, and four registers of a left operand."""
    columns = int(x.name.split(".")[1].split("x")[1])
    first, second = (operand.strip() for operand in x.operands.split(",")[:2])
    accumulators = int(first.removeprefix("R"))
    left = int(second.removeprefix("R")) if second.startswith("R") else None
    return Product(
        range(accumulators, accumulators + columns // 2), range(0) if left is None else range(left, left + 4)
    )


def touched(x: Instruction) -> tuple[set[int], set[int]]:
    """Registers that may be written to, and those that are named at all, an address or an operand of any width."""
    moved = int(shared_bytes(x)) // (4 * WARP)  # registers of a load, a store or an atomic
    wide = 2 if "WIDE" in x.name or x.opcode == "CS2R" else max(moved, 1)
    written: set[int] = set()
    named: set[int] = set()
    for n, operand in enumerate(x.operands.split(",")):
        for number in map(int, re.findall(r"(?<![UA-Z])R(\d+)", operand)):
            address = "[" in operand
            found = range(number, number + (2 if address and ".64" in operand else 1 if address else wide))
            if n > 0 and not address and not x.opcode.startswith(("ST", "RED")):
                found = range(number, number + 1)  # sources are single but for what is stored
            named.update(found)
            if n == 0 and not address and not x.opcode.startswith(_READS_ONLY):
                written.update(found)
    return written, named


def overlapping(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def hazards(code: Sequence[Instruction], waits: bool = True) -> list[str]:
    """Each place that touches what a product under way owns. Without `waits`, as if none were ever waited for."""
    flow = Flow(code)
    found: dict[str, None] = {}
    seen: set[tuple[int, Groups]] = set()
    waiting: list[tuple[int, Groups]] = [(root, (frozenset(),)) for root in flow.roots]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        block, groups = state  # the last group is not committed yet
        for x in flow.blocks[block]:
            owned = [product for group in groups for product in group]
            for what in _clashes(x, owned):
                found[f"{x.address:#x} {x.name} {x.operands}: {what}"] = None
            if x.opcode == "HGMMA":
                groups = (*groups[:-1], groups[-1] | {product_of(x)})
                if "gsb0" in x.operands:
                    groups = (*groups, frozenset())
            elif waits and x.name.startswith("WARPGROUP.DEPBAR"):
                left = int(re.findall(r"0x([0-9a-f]+)", x.operands)[-1], 16)
                groups = groups[-1 - left :]
            elif x.opcode == "EXIT" and not x.guard and any(groups):
                found[f"{x.address:#x}: products are under way at the end"] = None
        if len(groups) < 8:  # more are never under way: without waits there is no end of them
            waiting += [(to, groups) for to in flow.next[block]]
    return list(found)


def _clashes(x: Instruction, owned: list[Product]) -> Iterator[str]:
    if x.opcode == "HGMMA":
        mine = product_of(x)
        for other in owned:
            if mine.accumulators != other.accumulators and overlapping(mine.accumulators, other.accumulators):
                yield "other accumulators of a product under way"
            if overlapping(mine.accumulators, other.left):
                yield "accumulates over the left operand of a product under way"
            if overlapping(mine.left, other.accumulators):
                yield "takes accumulators of a product under way"
        return
    if not owned:
        return
    written, named = touched(x)
    for other in owned:
        if named & set(other.accumulators):
            yield "touches accumulators of a product under way"
        if written & set(other.left):
            yield "writes to the left operand of a product under way"
