"""Reading Hopper's machine code without a GPU: the way around a kernel's main loop, as machine.py reads the others.

    python -m attnfuse.machine_sm90     every sm_90a kernel in build/cuda, as a table

ptxas puts what is rarely taken (a wait that has to repeat, a masked tile) out of line, so that the stretch between a
branch and its target is no loop anyone runs. What is read here is the step: the shortest way from a warpgroup's matrix
product back to itself, which is the loop of a tile that is full.
"""

from __future__ import annotations

import heapq
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import build, machine
from .cli import table

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_PREDICATE = re.compile(r"\bU?P\d\b")
# What ptxas says when products wait for each other, or when setmaxnreg is ignored.
COMPLAINTS = re.compile(r"\(C75\d\d\)[^\n]*")


class Instruction(NamedTuple):
    at: int
    predicate: str
    name: str  # with its modifiers
    operands: str


class Step(NamedTuple):
    """The instructions of one tile, in order, from the first matrix product on."""

    instructions: list[Instruction]

    @property
    def names(self) -> Counter[str]:
        return Counter(x.name for x in self.instructions)

    def count(self, prefix: str) -> int:
        return sum(x.name.startswith(prefix) for x in self.instructions)

    def places(self, prefix: str, operands: str = "") -> list[int]:
        """Where in the step these instructions stand."""
        return [n for n, x in enumerate(self.instructions) if x.name.startswith(prefix) and operands in x.operands]


class Kernel(NamedTuple):
    name: str  # as in csrc, such as attn_fwd_kernel<bf16, 64>
    registers: int  # at entry
    local: int  # bytes of local memory of a thread
    step: Step
    complaints: list[str]  # of ptxas

    @property
    def scores(self) -> int:
        """Scores of a tile that one thread holds: a float32 accumulator each."""
        widths = [int(found[1]) for x in self.step.instructions if (found := re.match(r"HGMMA\.64x(\d+)x16", x.name))]
        return widths[0] // 2

    @property
    def per_score(self) -> float:
        return len(self.step.instructions) / self.scores


def step(sass: str) -> Step:
    """The shortest way around. Raises ValueError where no loop holds a product."""
    code = [Instruction(int(at, 16), *rest) for at, *rest in _INSTRUCTION.findall(sass)]
    number = {x.at: n for n, x in enumerate(code)}
    after = [_successors(code, number, n) for n in range(len(code))]
    ways = [way for n, x in enumerate(code) if x.name.startswith("HGMMA") and (way := _cycle(after, n))]
    if not ways:
        raise ValueError("no loop holds a matrix product")
    shortest = min(map(len, ways))
    # Of the products of one step, the first in the code: Q K^T.
    found = min((way for way in ways if len(way) == shortest), key=lambda way: way[0])
    return Step([code[n] for n in found])


def _successors(code: Sequence[Instruction], number: dict[int, int], n: int) -> list[int]:
    instruction = code[n]
    follows = [n + 1] if n + 1 < len(code) else []
    if instruction.name.startswith("BRA"):
        target = re.findall(r"0x([0-9a-f]+)", instruction.operands)
        is_conditional = bool(instruction.predicate) or _PREDICATE.search(instruction.operands) is not None
        return [*([number[int(target[-1], 16)]] if target else []), *(follows if is_conditional else [])]
    if instruction.name.startswith(("EXIT", "RET")):
        return follows if instruction.predicate else []
    return follows


def _cycle(after: list[list[int]], begin: int) -> list[int]:
    """The fewest instructions from `begin` back to it; empty if there is no way."""
    distance, before = {begin: 0}, dict[int, int]()
    heap = [(0, begin)]
    while heap:
        steps, n = heapq.heappop(heap)
        for following in after[n]:
            if following == begin:
                way = [n]
                while way[-1] != begin:
                    way.append(before[way[-1]])
                return way[::-1]
            if steps + 1 < distance.get(following, sys.maxsize):
                distance[following], before[following] = steps + 1, n
                heapq.heappush(heap, (steps + 1, following))
    return []


def kernels(object_file: Path) -> list[Kernel]:
    """The kernels in an object file that build_cuda has compiled for sm_90a, with what ptxas said of them."""
    log = object_file.parent.parent / f"{object_file.stem}.ptxas.txt"
    said = COMPLAINTS.findall(log.read_text()) if log.exists() else []
    listing = machine._printed(machine.cuobjdump(), "-sass", str(object_file))
    usage = {k.name: k for k in machine.kernels(object_file)}
    found = []
    for function in re.split(r"\n\s*Function : ", listing)[1:]:
        mangled, _, sass = function.partition("\n")
        kernel = usage[machine._demangled(mangled.strip())]
        complaints = [line for line in said if mangled.strip() in line]
        name = kernel.name.removeprefix("sm90::")
        found.append(Kernel(name, kernel.registers, kernel.local, step(sass), complaints))
    return sorted(found, key=lambda k: k.name)


def read_build(folder: Path = machine.ROOT / "build" / "cuda") -> list[Kernel]:
    """Every sm_90a kernel that setup.py has compiled. Raises FileNotFoundError if there are none."""
    objects = sorted((folder / "instances").glob(f"*{build.HOPPER_SUFFIX}.o"))
    if not objects:
        raise FileNotFoundError(f"{folder} holds no kernels for sm_90a: install attnfuse where there is an nvcc")
    return [kernel for path in objects for kernel in kernels(path)]


COLUMNS = ("kernel", "registers", "local bytes", "step", "per score", "HGMMA", "MUFU", "local in step")


def row(kernel: Kernel) -> tuple[str, ...]:
    """A kernel's line of the table."""
    inside = kernel.step
    wide = ", ".join(f"{n} x {name.split('.')[1]}" for name, n in inside.names.items() if name.startswith("HGMMA"))
    local = inside.count("LDL") + inside.count("STL")
    return (
        kernel.name, str(kernel.registers), str(kernel.local), str(len(inside.instructions)),
        f"{kernel.per_score:.2f}", wide, str(inside.count("MUFU")), str(local),
    )  # fmt: skip


def main() -> int:
    try:
        found = read_build()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    table.show(COLUMNS, [row(kernel) for kernel in found])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
