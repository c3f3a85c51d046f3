"""What a loop costs an SM by unit, and the ceiling that sets: a count, not a measurement.

One iteration of a loop keeps each unit of a streaming multiprocessor busy for so many clocks. If the units overlapped
perfectly, the busiest would set the pace and the tensor cores would run

    predicted ceiling = peak * needed / max(tensor, ex2, fp32, issue, shared)

with `needed` the clocks of the products a tile needs: `tensor` is more where a head dim is padded, or where several
warps compute the same. Latency, barriers and whatever does not overlap come on top: `published.py` has a kernel whose
authors timed it, beside its ceiling. Clocks per SM:

    issue    4 warp instructions a clock, every instruction of the iteration counted
    ex2      the MUFU unit: 16 results a clock (CUDA C++ Programming Guide, arithmetic throughput)
    fp32     fused multiply-adds, additions and multiplications: 64 results a clock on 8.0, else 128 (the same)
    shared   what passes the data path of L1 and shared memory, which are one: 128 bytes a clock (the same)
    tensor   bf16 with float32 sums: 2048 FLOP a clock on A100 (312 TFLOP/s), 4096 on H100 (989 TFLOP/s), 8192 on B200
             (2250 TFLOP/s), from the data sheets. mma.sync on 9.0 is counted at the same 4096: it is known to reach
             less than wgmma, how much less is not documented. 12.0 differs from card to card: unknown

The bytes of `shared`:

    loads, stores, atomics   of shared, global and local memory: 32 lanes x the width of the instruction, which the LSU
                             pipeline hands to L1 (Nsight Compute documentation, pipelines); ldmatrix and stmatrix
                             128 a matrix
    shuffles                 of the same pipeline: 32 results a clock (CUDA C++ Programming Guide), so 32 x 4
    wgmma                    its operands: A 64 x 16 unless it is in registers, B N x 16
    copies                   what they write to shared memory: LDGSTS by its width; what a bulk or tensor copy brings,
                             its instruction does not say: `Work.copied`
    bulk reductions          (cp.reduce.async.bulk) what they read there, which they do not say either: `Work.reduced`

Known to be coarse: bank conflicts are not seen, lanes that load from one address are counted like any others, and so
are those a predicate leaves out. Barriers in shared memory are not counted, nor are bulk stores: no tile loop has any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from .flow import COPIES, PRODUCTS, Loop
from .sass import Instruction


class Machine(NamedTuple):
    """One SM of an architecture, in clocks and bytes; None is unknown."""

    tensor: int | None  # bf16 FLOP a clock
    peak: int | None  # bf16 TFLOP/s of the card named
    fp32: int  # results a clock
    warps: int  # resident at most
    blocks: int
    shared: int  # KB of an SM
    block_shared: int  # KB a block may use
    card: str


# Limits are those of the CUDA C++ Programming Guide, compute capabilities.
MACHINES = {
    80: Machine(2048, 312, 64, 64, 32, 164, 163, "A100"),
    90: Machine(4096, 989, 128, 64, 32, 228, 227, "H100"),
    100: Machine(8192, 2250, 128, 64, 32, 228, 227, "B200"),
    120: Machine(None, None, 128, 48, 24, 100, 99, "12.0"),
}
ISSUE, EX2, BANKS = 4, 16, 128  # warp instructions, results and bytes a clock
REGISTERS, RESERVED = 65536, 1024  # of an SM; bytes of shared memory the system takes of each block
WARP = 32

# Instruction groups of the mix, first match counts. What is in none is "other".
GROUPS: dict[str, tuple[str, ...]] = {
    "product": PRODUCTS,
    "ex2": ("MUFU.EX2",),
    "mufu": ("MUFU",),
    "ffma": ("FFMA",),
    "fmul": ("FMUL",),
    "fadd": ("FADD",),
    "fmnmx": ("FMNMX",),
    "select": ("FSEL", "SEL", "FSET", "ISETP", "LOP3", "PLOP3", "R2P", "P2R"),
    "convert": ("F2F", "F2FP", "I2F", "F2I"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "copy": (*COPIES, "LDG", "STG", "RED", "ATOM", "UTMA", "UBLK", "LDGDEPBAR", "LDTM", "STTM"),
    "local": ("LDL", "STL"),
    "uniform": ("U", "R2UR", "S2UR", "VOTEU"),
    "integer": ("IADD", "IMAD", "LEA", "SHF", "VIADD", "IABS", "VIMNMX", "IMNMX", "PRMT", "MOV", "CS2R", "S2R", "I"),
    "barrier": ("BAR", "SYNC", "WARPGROUP", "WARPSYNC", "MEMBAR", "FENCE", "DEPBAR", "ARRIVES", "NANOSLEEP"),
}
# What moves 32 lanes x width. The width is told by a modifier such as U8, 64, S64, F32x4 or BF16x2, or it is 4 bytes.
WIDE = ("LDS", "STS", "ATOMS", "LDG", "STG", "LDGSTS", "LD", "ST", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG")
_WIDTH = re.compile(r"(?:[USBF]|BF)?(\d+)(?:x(\d+))?")
# Other modifiers with a digit: what L2 fetches beside, and how long it keeps it.
_NO_WIDTH = ("LTC64B", "LTC128B", "LTC256B", "ENL2")
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")


@dataclass(frozen=True)
class Work:
    """What a loop is about, which its machine code does not say: the tile of one iteration and the block around it."""

    rows: int
    columns: int
    warps: int  # that run the loop, of all warps of the block
    depths: tuple[int, ...] = ()  # of the products of a tile, 2 rows columns depth FLOP each; () = not told
    copied: int = 0  # bytes of a tile that come to shared memory; a bulk copy (TMA) does not say it
    shared: int = 0  # dynamic shared memory of the block, bytes
    block_warps: int | None = None  # of the whole block, where only some run the loop
    reduced: int = 0  # bytes of a tile that bulk reductions read from shared memory, which they do not say either

    @property
    def flops(self) -> int:
        return sum(2 * self.rows * self.columns * depth for depth in self.depths)


@dataclass(frozen=True)
class Cost:
    """One iteration of a loop on one SM, for one block."""

    tiles: int  # an iteration works on
    instructions: int  # of one warp
    per_element: float  # the same, for one score element of the tile
    repeated: float  # products done over products needed
    tensor: float | None  # clocks, None where unknown
    ex2: float
    fp32: float
    issue: float
    shared: float
    masked: bool  # every score element is compared with a mask
    overlapped: float | None  # share of the exponentials issued while a product is in flight; None without any
    mix: tuple[tuple[str, int], ...]  # instructions by group
    products: tuple[tuple[str, int], ...]  # by full name
    peak: int | None

    @cached_property
    def clocks(self) -> dict[str, float]:
        """Clocks by unit, as far as they are known."""
        found = {"ex2": self.ex2, "fp32": self.fp32, "issue": self.issue, "shared": self.shared}
        return found if self.tensor is None else {"tensor": self.tensor, **found}

    @property
    def binding(self) -> str:
        """The busiest unit."""
        if self.tensor is None:
            return "unknown"
        return max(self.clocks, key=lambda unit: self.clocks[unit])

    @property
    def ceiling(self) -> float | None:
        """TFLOP/s of the products, were that unit always busy; None where the tensor cores' rate is unknown."""
        if not self.tensor or self.peak is None:
            return None
        return self.peak * self.tensor / self.repeated / max(self.clocks.values())

    def share(self, unit: str) -> float | None:
        """Clocks of a unit relative to the tensor cores'."""
        return self.clocks[unit] / self.tensor if self.tensor else None


def cost(loop: Loop, work: Work, arch: int, bulk: bool = True, reduces: bool = True) -> Cost:
    """What one iteration of `loop` costs an SM of `arch` (80, 90, 100, 120).

    bulk: the kernel has bulk copies, which then bring the tile if the loop does not do it by other means.
    reduces: the kernel has bulk reductions, in the loop or in a warp beside it.
    Raises ValueError for an instruction whose width or shape cannot be told.
    """
    machine = MACHINES[arch]
    path = [x for x in loop.path if x.guard != "@!PT"]  # never executed, but issued
    flops = sum(_flops(x) for x in path) * work.warps
    described = any(x.opcode in ("UTCHMMA", "UTCQMMA") for x in path)  # its shape is in a register
    if not any(x.opcode in PRODUCTS for x in path):  # float32 without tensor cores
        flops = sum(x.opcode == "FFMA" for x in path) * WARP * 2 * work.warps
    tiles = _tiles(path, work, flops)
    # A loop may leave a product out that another one of its kernel has: then its tile needs less.
    repeated = max(1.0, flops / (work.flops * tiles)) if work.flops and not described else 1.0
    elements = work.rows * work.columns * tiles
    tensor: float | None = None
    if machine.tensor is not None:
        products = sum(_flops(x) for x in path) * work.warps
        tensor = (work.flops * tiles if described else products) / machine.tensor
        # tf32 runs at half the rate.
        if any("TF32" in x.name for x in path):
            tensor *= 2
    shared = sum(shared_bytes(x) for x in path) * work.warps
    if work.copied and bulk and not any(x.opcode == "LDGSTS" for x in path):
        shared += work.copied * tiles
    if reduces:
        shared += work.reduced * tiles
    mufu = sum(x.opcode == "MUFU" for x in path) * WARP * work.warps
    fp32 = sum(_fp32(x) for x in path) * WARP * work.warps
    infinite = sum(x.opcode in ("FSEL", "SEL") and "-INF" in x.operands for x in path) * WARP * work.warps
    mix: Counter[str] = Counter(_group(x.name) for x in loop.path)
    return Cost(
        tiles=tiles,
        instructions=len(loop.path),
        per_element=len(loop.path) * WARP * work.warps / elements,
        repeated=repeated,
        tensor=tensor,
        ex2=mufu / EX2,
        fp32=fp32 / machine.fp32,
        issue=len(loop.path) * work.warps / ISSUE,
        shared=shared / BANKS,
        masked=infinite >= elements / 2,
        overlapped=_overlapped(path),
        mix=tuple((name, mix[name]) for name in (*GROUPS, "other") if mix[name]),
        products=tuple(sorted(Counter(x.name for x in path if x.opcode in PRODUCTS).items())),
        peak=machine.peak,
    )


def _tiles(path: Sequence[Instruction], work: Work, flops: float) -> int:
    """How many tiles an iteration works on: by what it copies, else by its products. Both may count more than a tile,
    copies by what comes beside it, products by what is computed twice."""
    copied = sum(shared_bytes(x) for x in path if x.opcode == "LDGSTS" and x.name.endswith(".128")) * work.warps
    if copied and work.copied:
        return max(1, int(copied / work.copied))
    return max(1, int(flops / work.flops + 0.01)) if work.flops and not copied else 1


def blocks_per_sm(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many blocks an SM holds at once (CUDA C++ Programming Guide, compute capabilities)."""
    machine = MACHINES[arch]
    # A warp's registers are handed out in units of 256.
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256 * warps)
    by_shared = machine.shared * 1024 // (shared + RESERVED)
    return min(by_registers, by_shared, machine.warps // warps, machine.blocks)


def _flops(x: Instruction) -> float:
    """FLOP of a product for each warp that executes it."""
    if x.opcode == "HGMMA":
        shape = _SHAPE.search(x.name)
        if shape is None:
            raise ValueError(f"{x.name} at {x.address:#x} names no shape")
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k / 4  # four warps
    if x.opcode == "HMMA":
        digits = x.name.split(".")[1]  # 16816 is m16 n8 k16
        shapes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
        if digits not in shapes:
            raise ValueError(f"{x.name} at {x.address:#x} has a shape that is not known")
        return 2 * shapes[digits]
    return 0


def shared_bytes(x: Instruction) -> float:
    """Bytes a warp's instruction moves through L1 and shared memory; 0 for what is bulk, which does not say."""
    if x.opcode == "HGMMA":
        shape = _SHAPE.search(x.name)
        assert shape is not None
        m, n, k = map(int, shape.groups())
        first = x.operands.split(",")[1].strip()
        in_registers = first.startswith("R") and "gdesc" not in first
        return ((0 if in_registers else 2 * m * k) + 2 * n * k) / 4
    if x.opcode in ("LDSM", "STSM"):
        matrices = x.name.rsplit(".", 1)[-1]
        return 128.0 * int(matrices if matrices in ("2", "4") else 1)
    if x.opcode in WIDE:
        return float(WARP * _width(x))
    return 4.0 * WARP if x.opcode == "SHFL" else 0.0


def _width(x: Instruction) -> int:
    """Bytes of a thread that a load, a store or an atomic moves."""
    width = 4
    for part in x.name.split(".")[1:]:
        match = _WIDTH.fullmatch(part)
        if match is not None:
            width = int(match[1]) * int(match[2] or 1) // 8
        elif any(c.isdigit() for c in part) and part not in _NO_WIDTH:
            raise ValueError(f"{x.name} at {x.address:#x} has a modifier that is not known: {part}")
    return width


def _fp32(x: Instruction) -> int:
    """Results of a thread on the float32 pipe."""
    if x.opcode in ("FFMA", "FADD", "FMUL"):
        return 1
    return 2 if x.opcode in ("FFMA2", "FADD2", "FMUL2") else 0


@cache
def _group(name: str) -> str:
    for group, prefixes in GROUPS.items():
        if name.startswith(prefixes):
            return group
    return "other"


def _overlapped(path: Sequence[Instruction]) -> float | None:
    """wgmma is asynchronous: which share of the exponentials stands between a product and the wait for it."""
    if not any(x.opcode == "HGMMA" for x in path):
        return None
    flying, hidden, total = 0, 0, 0
    # Twice around: a product may still be in flight when the next iteration begins.
    for lap in (0, 1):
        for x in path:
            if x.opcode == "HGMMA" and "gsb0" in x.operands:
                flying += 1
            elif x.opcode == "WARPGROUP" and "DEPBAR" in x.name:
                left = re.findall(r"0x([0-9a-f]+)", x.operands)
                flying = min(flying, int(left[-1], 16) if left else 0)
            elif x.name.startswith("MUFU.EX2") and lap:
                total += 1
                hidden += flying > 0
    return hidden / total if total else None
