"""Tile shapes by architecture, dtype, head dim and pass: the only place that knows them.

The rows were chosen from machine code (`attnfuse inspect`): shared memory within the architecture's limit, and no local
memory in the loops of the 16-bit kernels at head dims 64 and 128. None has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use
INTERPRETER = 0  # the "architecture" of TRITON_INTERPRET=1
INTERPRETER_MULTIPROCESSORS = 132  # an H100's, so that what the interpreter proves is what runs there


class Tile(NamedTuple):
    block_m: int  # query rows
    block_n: int  # key columns
    num_warps: int
    num_stages: int


# 16 bit: {family: {padded head dim: {pass: tile}}}
_HALF = {
    80: {
        64: {"fwd": Tile(128, 64, 8, 3), "dq": Tile(64, 64, 4, 2), "dkdv": Tile(32, 128, 8, 2)},
        128: {"fwd": Tile(128, 64, 8, 2), "dq": Tile(64, 64, 4, 2), "dkdv": Tile(32, 64, 4, 2)},
        256: {"fwd": Tile(64, 32, 4, 2), "dq": Tile(64, 32, 8, 1), "dkdv": Tile(16, 64, 8, 1)},
    },
    90: {
        64: {"fwd": Tile(128, 128, 8, 3), "dq": Tile(128, 64, 8, 2), "dkdv": Tile(64, 128, 8, 2)},
        128: {"fwd": Tile(128, 128, 8, 2), "dq": Tile(128, 64, 8, 2), "dkdv": Tile(32, 128, 8, 2)},
        256: {"fwd": Tile(128, 64, 8, 2), "dq": Tile(64, 32, 8, 1), "dkdv": Tile(32, 64, 8, 1)},
    },
    100: {
        64: {"fwd": Tile(128, 128, 8, 3), "dq": Tile(128, 64, 8, 2), "dkdv": Tile(64, 128, 8, 2)},
        128: {"fwd": Tile(128, 128, 8, 2), "dq": Tile(128, 64, 8, 2), "dkdv": Tile(64, 128, 8, 2)},
        256: {"fwd": Tile(128, 64, 8, 2), "dq": Tile(64, 64, 8, 1), "dkdv": Tile(64, 64, 8, 1)},
    },
}
# The key-stationary pass that adds up dq too ("dkdv1"), 16 bit: {family: {padded head dim: tile}}.
_ONE_PASS = {
    80: {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 4, 2), 256: Tile(16, 64, 8, 1)},
    90: {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
    100: {64: Tile(64, 128, 8, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
}
# float32 runs on FMA units under "ieee": small tiles, operands pass through registers.
_SINGLE = {
    64: {"fwd": Tile(32, 32, 8, 1), "dq": Tile(32, 32, 8, 1), "dkdv": Tile(32, 32, 8, 1)},
    128: {"fwd": Tile(32, 32, 8, 1), "dq": Tile(32, 16, 8, 1), "dkdv": Tile(16, 32, 8, 1)},
    256: {"fwd": Tile(16, 16, 8, 1), "dq": Tile(16, 16, 8, 1), "dkdv": Tile(16, 16, 8, 1)},
}
# A tile that also holds a mask tile, dropout's counters or a softcap's slack has registers for half as much.
_HEAVY = {
    64: {"fwd": Tile(64, 64, 8, 1), "dq": Tile(64, 64, 8, 1), "dkdv": Tile(64, 64, 8, 1)},
    128: {"fwd": Tile(64, 64, 8, 1), "dq": Tile(64, 32, 8, 1), "dkdv": Tile(32, 64, 8, 1)},
    256: {"fwd": Tile(64, 32, 8, 1), "dq": Tile(32, 32, 8, 1), "dkdv": Tile(32, 32, 8, 1)},
}


def padded(dim: int) -> int:
    """The block a head dim is computed in: a power of two of at least 16, which is what `tl.dot` takes."""
    return max(16, 1 << (dim - 1).bit_length())


def tile(arch: int, dtype: torch.dtype, head_dim: int, pass_: str, heavy: bool = False) -> Tile:
    """The tile of `pass_` on `arch` (80, 90, ...; INTERPRETER; any other: generic).

    pass_: "fwd", "dq", "dkdv", or "dkdv1", which is dkdv that adds up dq too.
    heavy: some source has an (i, j) mask, or there is dropout or a softcap.
    """
    if arch == INTERPRETER:
        return {"fwd": Tile(32, 16, 4, 1), "dkdv1": Tile(32, 32, 4, 1)}.get(pass_, Tile(16, 32, 4, 1))
    bucket = max(64, padded(head_dim))
    if pass_ == "dkdv1":
        if dtype != torch.float32 and not heavy:
            return _ONE_PASS[_family(arch)][bucket]
        pass_ = "dkdv"
    if dtype == torch.float32:
        return _SINGLE[bucket][pass_]
    if heavy:
        return _HEAVY[bucket][pass_]
    return _HALF[_family(arch)][bucket][pass_]


def _family(arch: int) -> int:
    # sm_120 has sm_80's instructions; what is not known is served as the oldest.
    return 90 if arch == 90 else 100 if 100 <= arch < 120 else 80


# Where the plain backward takes one pass ("dkdv1") of itself: {(architecture, padded head dim)}, 16 bit and not heavy.
# At 64 and 128 the model sees 0 to 12 % less time in it (bench/notes.md) and does not know how fast the second-level
# cache adds; two passes give the same bits every time. So a pair is entered when a GPU has shown it to be faster:
# `attnfuse bench --against attnfuse-triton --against attnfuse-triton-onepass`.
ONE_PASS: frozenset[tuple[int, int]] = frozenset()


def one_pass(arch: int, dtype: torch.dtype, head_dim: int, heavy: bool = False) -> bool:
    """Whether the backward adds dq up by atomics where nothing (see backends/triton.py) stands against it."""
    return (arch, max(64, padded(head_dim))) in ONE_PASS and dtype != torch.float32 and not heavy


def described(arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, heavy: bool = False) -> bool:
    """Whether the forward reads full tiles by tensor descriptor, given rows that begin at multiples of 16 bytes.

    From Hopper on the copy engine (TMA) then computes the addresses: 0.5 instructions less for each score element of
    the full tiles. A head dim that is padded would be read past its end, and a heavy tile is masked throughout.
    """
    whole = head_dim == padded(head_dim) and value_dim == padded(value_dim)
    return (arch >= 90 or arch == INTERPRETER) and dtype != torch.float32 and whole and not heavy


# Few queries, long keys: rows are the packed ones of triton_kernels/packed.py, group Nq of them. How many ways keys are
# split, and from where on, is the same in every language: attnfuse/backends/few.py.


class FewTile(NamedTuple):
    """A tile's columns, warps and stages for up to 16 rows and for more, and the most rows it takes."""

    most: int
    narrow: tuple[int, int, int]
    wide: tuple[int, int, int]


# 16 bit, {family: {padded head dim: tile}}. The backward's bound is registers: q, dout, dq and four tiles of float32.
_SPLIT = {
    64: FewTile(128, (128, 4, 3), (64, 4, 3)),
    128: FewTile(128, (64, 4, 3), (64, 8, 2)),
    256: FewTile(64, (32, 4, 2), (32, 8, 2)),
}
_FEW = {
    # With sm_80's instructions what stays, q and dout, fills registers as the operands of four products.
    80: {
        64: FewTile(128, (128, 4, 2), (32, 8, 2)),
        128: FewTile(32, (64, 8, 2), (32, 8, 2)),
        256: FewTile(16, (32, 8, 1), (32, 8, 1)),
    },
    90: {
        64: FewTile(128, (128, 4, 2), (32, 8, 2)),
        128: FewTile(128, (64, 8, 2), (32, 8, 2)),
        256: FewTile(32, (32, 8, 1), (32, 8, 1)),
    },
    120: {
        64: FewTile(128, (128, 4, 2), (32, 8, 2)),
        128: FewTile(32, (64, 8, 2), (32, 8, 1)),
        256: FewTile(16, (32, 8, 1), (32, 8, 1)),
    },
}
_FEW_SINGLE = {
    64: FewTile(32, (32, 8, 1), (32, 8, 1)),
    128: FewTile(32, (16, 8, 1), (16, 8, 1)),
    256: FewTile(16, (16, 8, 1), (16, 8, 1)),
}


def few_tile(arch: int, dtype: torch.dtype, head_dim: int, pass_: str, rows: int, heavy: bool = False) -> Tile:
    """The tile of "split" (forward) or "few" (backward) for `rows` packed rows; block_m may be less than rows.

    The forward then takes several tiles of rows. The backward has room for no more than one: it serves rows only up
    to its largest block_m.
    """
    bucket = max(64, padded(head_dim))
    if arch == INTERPRETER:
        table = FewTile(32 if pass_ == "split" else 128, (32, 4, 1), (32, 4, 1))
    elif dtype == torch.float32:
        table = _FEW_SINGLE[bucket]
    elif pass_ == "split":
        table = _SPLIT[bucket]
    else:
        table = _FEW[90 if 90 <= arch < 120 else 120 if arch >= 120 else 80][bucket]
    block_m = min(padded(rows), table.most)
    block_n, warps, stages = table.narrow if block_m == 16 else table.wide
    if heavy and dtype != torch.float32 and arch != INTERPRETER:
        block_n, warps, stages = max(16, block_n // 2), 8, 1
    return Tile(block_m, block_n, warps, stages)


class MergeTile(NamedTuple):
    block_r: int  # rows of (B, Hq, Nq)
    chunk: int  # splits at once
    num_warps: int


def merge_tile(arch: int, head_dim: int) -> MergeTile:
    """How the partials of splits are added up, head dim being that of what is added."""
    if arch == INTERPRETER:
        return MergeTile(128, 2, 4)
    return MergeTile(max(1, 256 // max(64, padded(head_dim))), 16, 4)
