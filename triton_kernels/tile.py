# mypy: ignore-errors
"""What the forward and both backward kernels share: the arguments, and the steps of one tile.

Formula of one logit (row i, column j of a source, head h):

    z = scale q_i . k_j;  z = softcap tanh(z / softcap);  z += bias + mask_ij - slope |j - (i + offset)|

16-bit inputs have it in log2 units (everything times log2 e), so that p is one exp2; in float32 that conversion would
cost more accuracy than it saves time, and z stays natural (`Shared.natural`).

Index tensors i and j arrive ready to broadcast, so the same functions serve a (rows, columns) tile and its transpose:

    query-stationary   i (BLOCK_M, 1)   j (1, BLOCK_N)
    key-stationary     i (1, BLOCK_M)   j (BLOCK_N, 1)

Whatever a problem lacks is None, which Triton knows while compiling: an absent feature leaves no instruction.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Strided(NamedTuple):
    """A (B, H, N, D) tensor whose last dimension is contiguous, or a (B, H, rows, columns) mask with all four."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    column: Any = 1  # not None: to Triton 3.6 a tuple with a None in it is neither None nor not None


class Shared(NamedTuple):
    """What is the same for every source. Pointers are None where the problem has no such thing."""

    natural: Any  # 1: z is natural; None: z is in log2 units
    to_units: Any  # scale in the units of z, used without a softcap
    to_cap: Any  # scale / softcap, None without a softcap
    from_cap: Any  # softcap in the units of z
    slopes: Any  # (B, Hq) float32 by the strides that follow
    slope_batch: Any
    slope_head: Any
    seed: Any  # () int64, None without dropout
    drop_below: Any  # a Philox word below this is dropped
    rescale: Any  # 1 / (1 - dropout_p)
    heads: Any  # Hq
    rows: Any  # Nq
    group: Any  # query heads per key head
    rising: Any = None  # 1: to_units > 0, so that the largest product is the largest logit; None: it may not be


class Source(NamedTuple):
    """One source, as `problem.BoundSource` has it. `left` and `right` bound the band; causal is right = 0."""

    key: Any  # Strided (B, Hkv, Ns, D)
    value: Any  # Strided (B, Hkv, Ns, Dv)
    columns: Any  # Ns
    lengths: Any  # (B,) int32
    present: Any  # (B,) uint8
    key_mask: Any  # (B, Ns) uint8 by the two strides that follow
    key_mask_batch: Any
    key_mask_column: Any
    pairs: Any  # Strided (B, Hq, Nq, Ns), uint8 or float; stride 0 where it broadcasts
    bias: Any  # (B, Hq) float32 by the two strides that follow
    bias_batch: Any
    bias_head: Any
    offset: Any  # row i stands at column i + offset
    offsets: Any  # (B,) int32 in its place
    left: Any  # columns seen behind the row's own, None = all
    right: Any  # columns seen ahead of it, None = all
    column: Any  # the source's first column in the count that keys the dropout


@triton.jit
def base(x, b, h):
    """The address of x[b, h], in 64 bits."""
    return x.ptr + tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head


@triton.jit
def load_rows(ptr, stride, start, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, valid):
    """Rows start .. start + N of a (., D) matrix as (N, D_PAD); rows not `valid` (N,) are 0. valid None = all are."""
    n = tl.arange(0, N)
    d = tl.arange(0, D_PAD)
    # Only the tile's first row needs 64 bits; within a tile 32 reach far enough.
    at = ptr + tl.cast(start, tl.int64) * stride + (n[:, None] * stride + d[None, :])
    if valid is None:
        if D == D_PAD:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=d[None, :] < D, other=0.0)
    else:
        if D == D_PAD:
            x = tl.load(at, mask=valid[:, None], other=0.0)
        else:
            x = tl.load(at, mask=valid[:, None] & (d[None, :] < D), other=0.0)
    return x


@triton.jit
def describe_rows(ptr, stride, rows, N: tl.constexpr, D: tl.constexpr):
    """A tensor descriptor of a (rows, D) matrix, for loads of (N, D) at [row, 0] by the copy engine (TMA on Hopper).

    It needs D to be a power of two, and ptr and the stride to be multiples of 16 bytes.
    """
    at_least_one = tl.maximum(tl.cast(rows, tl.int32), 1)  # a descriptor of nothing is not one, even if not used
    return tl.make_tensor_descriptor(ptr, [at_least_one, D], [tl.cast(stride, tl.int64), 1], [N, D])


@triton.jit
def load_full(x, stride, start, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DESCRIBED: tl.constexpr):
    """Rows start .. start + N, all of which are there, of what x points to or, if DESCRIBED, describes."""
    if DESCRIBED:
        y = x.load([start, 0])
    else:
        y = load_rows(x, stride, start, N, D, D_PAD, None)
    return y


@triton.jit
def store_rows(ptr, stride, start, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, rows, x):
    """x (N, D_PAD) to rows start .. start + N of a (rows, D) matrix."""
    n = tl.arange(0, N)
    d = tl.arange(0, D_PAD)
    at = ptr + tl.cast(start, tl.int64) * stride + (n[:, None] * stride + d[None, :])
    inside = (start + n < rows)[:, None]
    if D != D_PAD:
        inside = inside & (d[None, :] < D)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b, added to acc (None = 0) in float32. PRECISION is tl.dot's, or "widened", for the interpreter."""
    if PRECISION == "widened":
        # Triton's interpreter keeps bfloat16 as uint16 and would multiply the bits.
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        product = tl.dot(a, b, acc, input_precision=PRECISION)
    return product


@triton.jit
def in_units(x, shared):
    """A natural logit x in the units of z."""
    if shared.natural is None:
        y = x * LOG2E
    else:
        y = x
    return y


@triton.jit
def power(z, shared):
    """e^z, z being in its units."""
    if shared.natural is None:
        y = tl.exp2(z)
    else:
        y = tl.exp(z)
    return y


@triton.jit
def source_length(source, b):
    """How many leading columns of the source sample b may see at all: 0 where it is absent."""
    length = tl.cast(source.columns, tl.int32)
    if source.lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(source.lengths + b), length), 0)
    if source.present is not None:
        length = tl.where(tl.load(source.present + b) != 0, length, 0)
    return length


@triton.jit
def source_offset(source, b):
    if source.offsets is not None:
        offset = tl.load(source.offsets + b)
    else:
        offset = tl.cast(source.offset, tl.int32)
    return offset


@triton.jit
def source_bias(source, shared, b, h):
    """The source's bias in the units of z, None without one."""
    if source.bias is None:
        bias = None
    else:
        bias = in_units(tl.load(source.bias + b * source.bias_batch + h * source.bias_head), shared)
    return bias


@triton.jit
def head_slope(shared, b, h):
    """The head's ALiBi slope in the units of z, None without one."""
    if shared.slopes is None:
        slope = None
    else:
        slope = in_units(tl.load(shared.slopes + b * shared.slope_batch + h * shared.slope_head), shared)
    return slope


@triton.jit
def column_range(source, length, offset, first, last, BLOCK: tl.constexpr):
    """For rows first .. last: columns [lo, hi) that some row sees, [full_lo, full_hi) that every row sees.

        lo   full_lo      full_hi   hi         lo, full_lo and full_hi stand on multiples of BLOCK,
         . . # # # # # # # .                   hi is exact; a mask with holes leaves nothing full
           . # # # # # # # # .
             # # # # # # # # # .
    """
    lo = 0
    hi = length
    full_lo = 0
    full_hi = length
    if source.right is not None:
        hi = tl.minimum(hi, tl.maximum(last + offset + source.right + 1, 0))
        full_hi = tl.minimum(hi, tl.maximum(first + offset + source.right + 1, 0))
    if source.left is not None:
        lo = tl.maximum(first + offset - source.left, 0) // BLOCK * BLOCK
        full_lo = tl.cdiv(tl.maximum(last + offset - source.left, 0), BLOCK) * BLOCK
        full_lo = tl.minimum(full_lo, tl.maximum(lo, tl.cdiv(hi, BLOCK) * BLOCK))
    if (source.key_mask is not None) or (source.pairs is not None):
        full_hi = full_lo
    else:
        full_hi = tl.maximum(full_hi // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def row_range(source, length, offset, rows, first, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """For columns first .. first + BLOCK_N: rows [lo, hi) that see one, [full_lo, full_hi) that see all of them.

    As `column_range`, turned: a column reaches rows j - offset - right .. j - offset + left.
    """
    last = tl.minimum(first + BLOCK_N, length) - 1
    lo = 0
    hi = rows
    full_lo = 0
    full_hi = rows
    if source.right is not None:
        lo = tl.maximum(first - offset - source.right, 0) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(last - offset - source.right, 0), BLOCK_M) * BLOCK_M
    if source.left is not None:
        hi = tl.minimum(hi, tl.maximum(last - offset + source.left + 1, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(first - offset + source.left + 1, 0))
    hi = tl.where(first >= length, 0, hi)
    full_lo = tl.minimum(full_lo, tl.maximum(lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M))
    if (source.key_mask is not None) or (source.pairs is not None):
        full_hi = full_lo
    else:
        full_hi = tl.where(first + BLOCK_N > length, 0, full_hi)
        full_hi = tl.maximum(full_hi // BLOCK_M * BLOCK_M, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def seen_columns(source, b, j, lo, hi):
    """Of columns j, which ones lie in [lo, hi) and are not masked as keys."""
    seen = (j >= lo) & (j < hi)
    if source.key_mask is not None:
        at = source.key_mask + tl.cast(b, tl.int64) * source.key_mask_batch
        at = at + tl.cast(j, tl.int64) * source.key_mask_column
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return seen


@triton.jit
def load_pairs(source, b, h, i, j, rows):
    """The source's (i, j) mask on this tile, None without one; outside the matrix 0."""
    if source.pairs is None:
        pairs = None
    else:
        at = base(source.pairs, b, h) + tl.cast(i, tl.int64) * source.pairs.row
        at = at + tl.cast(j, tl.int64) * source.pairs.column
        pairs = tl.load(at, mask=(i < rows) & (j < source.columns), other=0)
    return pairs


@triton.jit
def seen_pairs(source, pairs, i, j, offset, columns_seen, rows_live, hi=None):
    """Which pairs (i, j) are seen, given which columns are and which rows count at all.

    With hi, columns_seen need only tell the key mask: j < hi, the rows and the band's right edge are one comparison for
    each pair, of j with the row's own last column.
    """
    ahead = j - i - offset
    if hi is not None:
        end = tl.zeros_like(i) + hi
        if source.right is not None:
            end = tl.minimum(end, i + offset + source.right + 1)
        seen = j < tl.where(rows_live, end, 0)
        if source.key_mask is not None:
            seen = seen & columns_seen
    else:
        seen = columns_seen & rows_live
        if source.right is not None:
            seen = seen & (ahead <= source.right)
    if source.left is not None:
        seen = seen & (ahead >= -source.left)
    if source.pairs is not None:
        if pairs.dtype.is_floating():
            seen = seen & (pairs != float("-inf"))
        else:
            seen = seen & (pairs != 0)
    return seen


@triton.jit
def tanh(x):
    """tanh to float32 rounding, also near 0, where 1 - 2 / (e^2x + 1) would cancel.

    The polynomial for |x| < 0.625 is that of tanhf in Cephes (S. L. Moshier, netlib.org/cephes, single/tanhf.c).
    """
    a = tl.abs(x)
    y = x * x
    small = -5.70498872745e-3 * y + 2.06390887954e-2
    small = small * y - 5.37397155531e-2
    small = small * y + 1.33314422036e-1
    small = small * y - 3.33332819422e-1
    small = small * y * x + x
    large = 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def logits(dots, shared, bias, slope, pairs, i, j, offset):
    """z from the bare products q . k, and the slack 1 - tanh^2 of the softcap (without one: z)."""
    if shared.to_cap is None:
        z = dots * shared.to_units
        slack = z
    else:
        t = tanh(dots * shared.to_cap)
        z = t * shared.from_cap
        slack = 1.0 - t * t
    if bias is not None:
        z = z + bias
    if slope is not None:
        z = z - slope * tl.abs(j - i - offset).to(tl.float32)
    if pairs is not None:
        if pairs.dtype.is_floating():
            z = z + in_units(pairs.to(tl.float32), shared)
    return z, slack


@triton.constexpr_function
def folds(rising, to_cap, slope, pairs):
    """Whether z is to_units (q . k) + bias with to_units > 0: then neither its maximum nor its exponential needs z."""
    return rising is not None and to_cap is None and slope is None and pairs is None


@triton.jit
def kept(shared, source, b, h, i, j):
    """Which weights dropout keeps: Philox-4x32-10 keyed by the seed, counter (column, i, h, b), first word."""
    zero = (i + j) * 0
    c0 = zero + j + tl.cast(source.column, tl.int32)
    word, _, _, _ = tl.philox(tl.load(shared.seed), c0, zero + i, zero + h, zero + b)
    return word >= tl.cast(shared.drop_below, tl.uint32)
