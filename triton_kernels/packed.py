# mypy: ignore-errors
"""What the kernels for few queries and long keys share: packed rows, and one split's share of all keys.

Packed: the query heads of one key head stand below each other in one row tile, so that K and V are read once for all:

    row r = (head of the group) Nq + i        for r < group Nq

Split: a sample's visible tiles of BLOCK_N columns are counted through all sources, and each of `splits` programs takes
an equal run of them, wherever sources begin and end:

    source 0 # # # # # # # . .    source 1 . # # #     # visible to some row    . to none: in nobody's share
    split    0 0 0 0 1 1 1                   1 2 2

The count is the sample's own: a short sample of a padded batch is divided as it would be alone.
"""

import triton
import triton.language as tl

from .tile import column_range


@triton.jit
def packed_rows(shared, hkv, first, BLOCK_M: tl.constexpr):
    """Head, query and existence of rows first .. first + BLOCK_M; rows past the last stand for one of the last head."""
    r = first + tl.arange(0, BLOCK_M)
    h = hkv * shared.group + tl.minimum(r // shared.rows, shared.group - 1)
    return h, r % shared.rows, r < shared.group * shared.rows


@triton.jit
def query_span(shared, first, BLOCK_M: tl.constexpr):
    """The first and the last query of rows first .. first + BLOCK_M: all of them where the rows reach over heads."""
    end = tl.minimum(first + BLOCK_M, shared.group * shared.rows) - 1
    over = first // shared.rows != end // shared.rows
    return tl.where(over, 0, first % shared.rows), tl.where(over, shared.rows - 1, end % shared.rows)


@triton.jit
def load_packed(x, b, h, i, valid, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows (h, i) of x (B, Hq, Nq, D) as (rows, D_PAD); those not `valid` are 0."""
    d = tl.arange(0, D_PAD)
    rows = tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head + tl.cast(i, tl.int64) * x.row
    return tl.load(x.ptr + rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def tile_count(source, length, offset, first, last, BLOCK_N: tl.constexpr):
    """How many of the source's tiles some query of first .. last sees."""
    lo, _, _, hi = column_range(source, length, offset, first, last, BLOCK_N)
    return tl.maximum(tl.cdiv(hi, BLOCK_N) - lo // BLOCK_N, 0)


@triton.jit
def columns_of_share(lo, hi, before, begin, end, BLOCK_N: tl.constexpr):
    """Columns [start, stop) of a source that lie in tiles [begin, end) of the count, and the count behind the source.

    The source's visible columns are [lo, hi), `before` tiles of the count come before it.
    """
    count = tl.maximum(tl.cdiv(hi, BLOCK_N) - lo // BLOCK_N, 0)
    start = lo + tl.minimum(tl.maximum(begin - before, 0), count) * BLOCK_N
    stop = tl.minimum(lo + tl.minimum(tl.maximum(end - before, 0), count) * BLOCK_N, hi)
    return start, stop, before + count
