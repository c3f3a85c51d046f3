"""A reading: what one compiled kernel takes and what each of its tile loops costs, as plain data that can be kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import build
from .flow import BULK_COPIES, BULK_REDUCTIONS, Loop, loops
from .model import WARP, Work, blocks_per_sm, cost
from .sass import Function


@dataclass
class LoopReading:
    """A loop that multiplies tiles. Clocks are of one SM and one block, for one iteration."""

    name: str  # "full" where no element is masked, else "masked"; numbered where there are several
    tiles: int
    instructions: int
    per_element: float
    repeated: float
    tensor: float | None
    ex2: float
    fp32: float
    issue: float
    shared: float
    binding: str
    ceiling: float | None
    overlapped: float | None
    local: int  # local-memory instructions anywhere in the loop
    step_local: int  # of these, in an ordinary iteration
    mix: dict[str, int]
    products: dict[str, int]  # the wide instructions by full name


@dataclass
class Reading:
    """One kernel for one architecture. `error` tells why there is nothing else."""

    language: str
    arch: int
    kernel: str
    toolchain: str
    tile: str = ""
    registers: int = 0
    local: int = 0  # bytes of local memory of a thread
    shared: int = 0  # bytes of a block
    blocks: int = 0  # an SM holds at once
    loop_local: int = 0  # local-memory instructions in the loop that has most, of all loops
    loops: list[LoopReading] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # of ptxas: products that wait for each other, and the like
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.language} sm_{self.arch} {self.kernel}"


def read_function(
    function: Function, work: Work | None, language: str, arch: int, kernel: str, toolchain: str, tile: str
) -> Reading:
    """Read a disassembled kernel; work None is a kernel without tiles."""
    found = loops(function.code)
    reading = Reading(
        language,
        arch,
        kernel,
        toolchain,
        tile,
        function.registers,
        function.local,
        loop_local=max((loop.local for loop in found), default=0),
    )
    if work is None:
        return reading
    reading.shared = work.shared
    reading.blocks = blocks_per_sm(function.registers, work.shared, work.block_warps or work.warps, arch)
    counts: dict[str, int] = {}
    tiled = tile_loops(found, work)
    bulk, reduces = (any(x.opcode in which for x in function.code) for which in (BULK_COPIES, BULK_REDUCTIONS))
    # Of loops some of which reduce, the others have nothing to; where none does, a warp that does not multiply may.
    own = [any(x.opcode in BULK_REDUCTIONS for x in loop.path) for loop in tiled]
    for n, loop in enumerate(tiled):
        c = cost(loop, work, arch, bulk, own[n] if any(own) else reduces)
        kind = "masked" if c.masked else "full"
        counts[kind] = counts.get(kind, 0) + 1
        name = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
        reading.loops.append(
            LoopReading(
                name, c.tiles, c.instructions, c.per_element, c.repeated, c.tensor, c.ex2, c.fp32, c.issue, c.shared,
                c.binding, c.ceiling, c.overlapped, loop.local, loop.step_local, dict(c.mix), dict(c.products),
            )
        )  # fmt: skip
    return reading


def tile_loops(found: Sequence[Loop], work: Work) -> list[Loop]:
    """The loops that multiply tiles themselves: by tensor cores or, where the kernel uses none, by multiply-adds.

    A loop around another of them is none: what it multiplies itself are the tiles before the inner loop and after it.
    """
    multiplying = [loop for loop in found if loop.multiplies]
    around = {id(outer) for loop in multiplying for outer in _around(loop)}
    if multiplying:
        return [loop for loop in multiplying if id(loop) not in around]
    enough = work.flops / (2 * WARP * work.warps) / 2
    return [x for x in found if enough and sum(y.opcode == "FFMA" for y in x.own) >= enough]


def _around(loop: Loop) -> list[Loop]:
    found = []
    while loop.parent is not None:
        loop = loop.parent
        found.append(loop)
    return found


def recalled(key: Sequence[str]) -> Reading | None:
    """What was kept under a key, which names all that the reading depends on; None if nothing was."""
    try:
        return from_data(json.loads(_path(key).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep(key: Sequence[str], reading: Reading) -> None:
    """Keep a reading for `recalled`."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(reading)))
    partial.replace(path)


def _path(key: Sequence[str]) -> Path:
    return cache_dir() / f"{sha256(json.dumps([*key, _own_hash()]).encode()).hexdigest()[:32]}.json"


def from_data(data: dict[str, Any]) -> Reading:
    """The reading that `dataclasses.asdict` took apart."""
    return Reading(**{**data, "loops": [LoopReading(**loop) for loop in data["loops"]]})


def cache_dir() -> Path:
    """In a checkout its build folder, else the user's cache."""
    checkout = build.CSRC.parent
    if (checkout / "setup.py").exists() and os.access(checkout, os.W_OK):
        return checkout / "build" / "inspect"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnfuse" / "inspect"


@cache
def hash_of(*files: Path) -> str:
    """Of the contents of some files."""
    total = sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


@cache
def _own_hash() -> str:
    folder = Path(__file__).parent
    return hash_of(*(folder / name for name in ("sass.py", "flow.py", "model.py", "reading.py")))
