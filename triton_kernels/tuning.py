"""Tile shapes by architecture, dtype, head dim and pass: the only place that knows them.

The rows were chosen from machine code (`attnfuse inspect`): shared memory within the architecture's limit, and no local
memory in the loops of the 16-bit kernels at head dims 64 and 128. None has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use
INTERPRETER = 0  # the "architecture" of TRITON_INTERPRET=1


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
    """The tile of `pass_` ("fwd", "dq" or "dkdv") on `arch` (80, 90, ...; INTERPRETER; any other: generic).

    heavy: some source has an (i, j) mask, or there is dropout or a softcap.
    """
    if arch == INTERPRETER:
        return Tile(32, 16, 4, 1) if pass_ == "fwd" else Tile(16, 32, 4, 1)
    bucket = max(64, padded(head_dim))
    if dtype == torch.float32:
        return _SINGLE[bucket][pass_]
    if heavy:
        return _HEAVY[bucket][pass_]
    # sm_120 has sm_80's instructions; what is not known is served as the oldest.
    family = 90 if arch == 90 else 100 if 100 <= arch < 120 else 80
    return _HALF[family][bucket][pass_]


def described(arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, heavy: bool = False) -> bool:
    """Whether the forward reads full tiles by tensor descriptor, given rows that begin at multiples of 16 bytes.

    From Hopper on the copy engine (TMA) then computes the addresses: 0.5 instructions less for each score element of
    the full tiles. A head dim that is padded would be read past its end, and a heavy tile is masked throughout.
    """
    whole = head_dim == padded(head_dim) and value_dim == padded(value_dim)
    return (arch >= 90 or arch == INTERPRETER) and dtype != torch.float32 and whole and not heavy
