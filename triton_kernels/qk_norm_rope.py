# mypy: ignore-errors
"""RMSNorm of each query and key head, then rotary position embedding: one pass over memory, forward and backward.

A row is one head of one token, x (D,); w its norm's weight; cos and sin (R/2,) of its position, R <= D:

    n = w x r,  r = 1 / sqrt(mean(x^2) + eps)                        without a weight: n = x
    y_a = n_a cos - n_b sin;  y_b = n_b cos + n_a sin;  y_t = n_t    without a table: y = n

    half-split     a a a a b b b b t t        a, b: the two of each rotated pair; t: the tail from R on
    interleaved    a b a b a b a b t t

Backward, x read again rather than saved, since it costs the same as saving n would:

    g_a = dy_a cos + dy_b sin;  g_b = dy_b cos - dy_a sin;  g_t = dy_t
    dx = r (w g - x r mean(w g x r));  dw = sum over rows of g x r

Grid: one axis, the query's programs and then the key's, so that one launch serves both. A program owns BLOCK rows of
one sample, counted in the order they lie in memory; in the backward `steps` such tiles, the weight gradient of which
it sums in registers into one line of `partial`. The lines are added afterwards, in one order: no atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

TILE = 4096  # bytes of a tile: two loads of 16 for each thread, one of a and one of b; not timed
WARPS = 4
PROGRAMS = 2048  # at most about so many in the backward: lines of `partial` to be added afterwards


class Rows(NamedTuple):
    """A (B, H, N, D) tensor as rows: of heads and positions, `inner` is the one that lies closer in memory."""

    ptr: Any
    batch: Any
    outer: Any
    inner: Any


class Part(NamedTuple):
    """The query or the key; what a call has not is None."""

    x: Any  # Rows; in the backward only where there is a norm
    y: Any  # Rows; in the backward its gradient
    grad_x: Any  # Rows
    weight: Any  # (D,)
    partial: Any  # (programs, D) float32
    cos: Any  # Rows of R / 2, stride 0 along the heads
    sin: Any  # Rows alike
    inner: Any  # size of the inner dimension
    rows: Any  # H N
    tiles: Any  # of one sample
    all_tiles: Any  # of all samples
    programs: Any


def blocks(half: int, tail: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK, HALF_PAD and TAIL_PAD for rows of `half` pairs and a tail: powers of two."""
    half_pad, tail_pad = (1 << max(size - 1, 0).bit_length() for size in (half, tail))
    width = (2 * half_pad if half else 0) + (tail_pad if tail else 0)
    return TILE // itemsize >> (width - 1).bit_length(), half_pad, tail_pad


@triton.jit
def row_pointers(rows, b, outer, inner, ALIGN: tl.constexpr):
    """Where each row begins, in 64 bits; every offset is a multiple of ALIGN elements."""
    offset = tl.cast(b, tl.int64) * rows.batch
    offset = offset + tl.cast(outer, tl.int64) * rows.outer + tl.cast(inner, tl.int64) * rows.inner
    return rows.ptr + tl.multiple_of(offset, ALIGN)


@triton.jit
def load_line(at, inside, SIZE: tl.constexpr, PAD: tl.constexpr):
    """SIZE elements from each of `at` (M,) as (M, PAD) float32; where not `inside` (M,), and beyond SIZE, 0."""
    d = tl.arange(0, PAD)[None, :]
    if SIZE == PAD:
        x = tl.load(at[:, None] + d, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(at[:, None] + d, mask=inside[:, None] & (d < SIZE), other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_line(at, inside, x, SIZE: tl.constexpr, PAD: tl.constexpr):
    """The reverse of `load_line`."""
    d = tl.arange(0, PAD)[None, :]
    keep = inside[:, None]
    if SIZE != PAD:
        keep = keep & (d < SIZE)
    tl.store(at[:, None] + d, x.to(at.dtype.element_ty), mask=keep)


@triton.jit
def load_row(
    at, inside, M: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """a and b (M, HALF_PAD) and the tail (M, TAIL_PAD) in float32; what a row lacks is 0 and never used."""
    a = tl.zeros((M, HALF_PAD), tl.float32)
    b = a
    t = tl.zeros((M, TAIL_PAD), tl.float32)
    if HALF > 0:
        if INTERLEAVED:
            pairs = load_line(at, inside, 2 * HALF, 2 * HALF_PAD)
            a, b = tl.split(tl.reshape(pairs, (M, HALF_PAD, 2)))
        else:
            a = load_line(at, inside, HALF, HALF_PAD)
            b = load_line(at + HALF, inside, HALF, HALF_PAD)
    if TAIL > 0:
        t = load_line(at + 2 * HALF, inside, TAIL, TAIL_PAD)
    return a, b, t


@triton.jit
def store_row(
    at, inside, a, b, t, M: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_row`."""
    if HALF > 0:
        if INTERLEAVED:
            store_line(at, inside, tl.reshape(tl.join(a, b), (M, 2 * HALF_PAD)), 2 * HALF, 2 * HALF_PAD)
        else:
            store_line(at, inside, a, HALF, HALF_PAD)
            store_line(at + HALF, inside, b, HALF, HALF_PAD)
    if TAIL > 0:
        store_line(at + 2 * HALF, inside, t, TAIL, TAIL_PAD)


@triton.jit
def mean_product(a, b, t, a2, b2, t2, HALF: tl.constexpr, TAIL: tl.constexpr):
    """(M, 1): the mean over a row of the product of two."""
    if HALF == 0:
        total = tl.sum(t * t2, 1)
    else:
        total = tl.sum(a * a2 + b * b2, 1)
        if TAIL > 0:
            total = total + tl.sum(t * t2, 1)
    return (total * (1.0 / (2 * HALF + TAIL)))[:, None]


@triton.jit
def place(part, tile, BLOCK: tl.constexpr):
    """Of a tile: the sample, each row's two indices, and which rows there are: none beyond the last tile."""
    r = tile % part.tiles * BLOCK + tl.arange(0, BLOCK)
    rows = tl.where(tile < part.all_tiles, part.rows, 0)
    return tile // part.tiles, r // part.inner, r % part.inner, r < rows


@triton.jit
def load_weight(
    part, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The weight as a row of (1, .) parts."""
    one = tl.arange(0, 1)
    return load_row(part.weight + one, one == 0, 1, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)


@triton.jit
def forward_tile(
    part, eps, tile, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    sample, outer, inner, inside = place(part, tile, BLOCK)
    at = row_pointers(part.x, sample, outer, inner, ALIGN)
    a, b, t = load_row(at, inside, BLOCK, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
    if part.weight is not None:
        w_a, w_b, w_t = load_weight(part, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
        r = tl.rsqrt(mean_product(a, b, t, a, b, t, HALF, TAIL) + eps)
        if HALF > 0:
            a = a * r * w_a
            b = b * r * w_b
        if TAIL > 0:
            t = t * r * w_t
    if HALF > 0:
        cos = load_line(row_pointers(part.cos, sample, outer, inner, TABLE_ALIGN), inside, HALF, HALF_PAD)
        sin = load_line(row_pointers(part.sin, sample, outer, inner, TABLE_ALIGN), inside, HALF, HALF_PAD)
        y_a = a * cos - b * sin
        b = b * cos + a * sin
        a = y_a
    at = row_pointers(part.y, sample, outer, inner, ALIGN)
    store_row(at, inside, a, b, t, BLOCK, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)


@triton.jit
def backward_tile(
    part, eps, tile, dw_a, dw_b, dw_t, w_a, w_b, w_t,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write grad_x of one tile; the weight's gradient is added to dw, row by row."""
    sample, outer, inner, inside = place(part, tile, BLOCK)
    at = row_pointers(part.y, sample, outer, inner, ALIGN)
    a, b, t = load_row(at, inside, BLOCK, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
    if HALF > 0:
        cos = load_line(row_pointers(part.cos, sample, outer, inner, TABLE_ALIGN), inside, HALF, HALF_PAD)
        sin = load_line(row_pointers(part.sin, sample, outer, inner, TABLE_ALIGN), inside, HALF, HALF_PAD)
        g_a = a * cos + b * sin
        b = b * cos - a * sin
        a = g_a
    if part.weight is not None:
        at = row_pointers(part.x, sample, outer, inner, ALIGN)
        x_a, x_b, x_t = load_row(at, inside, BLOCK, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
        r = tl.rsqrt(mean_product(x_a, x_b, x_t, x_a, x_b, x_t, HALF, TAIL) + eps)
        if HALF > 0:
            x_a = x_a * r
            x_b = x_b * r
            if part.partial is not None:
                dw_a += a * x_a
                dw_b += b * x_b
            a = a * w_a
            b = b * w_b
        if TAIL > 0:
            x_t = x_t * r
            if part.partial is not None:
                dw_t += t * x_t
            t = t * w_t
        along = mean_product(a, b, t, x_a, x_b, x_t, HALF, TAIL)
        if HALF > 0:
            a = r * (a - x_a * along)
            b = r * (b - x_b * along)
        if TAIL > 0:
            t = r * (t - x_t * along)
    at = row_pointers(part.grad_x, sample, outer, inner, ALIGN)
    store_row(at, inside, a, b, t, BLOCK, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
    return dw_a, dw_b, dw_t


@triton.jit
def backward_part(
    part, eps, program, steps, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, ...: `steps` of them, the last of which may lie beyond the end."""
    w_a = 1.0
    w_b = 1.0
    w_t = 1.0
    if part.weight is not None:
        w_a, w_b, w_t = load_weight(part, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)
    dw_a = tl.zeros((BLOCK, HALF_PAD), tl.float32)
    dw_b = tl.zeros((BLOCK, HALF_PAD), tl.float32)
    dw_t = tl.zeros((BLOCK, TAIL_PAD), tl.float32)
    for step in range(steps):
        dw_a, dw_b, dw_t = backward_tile(
            part, eps, program + step * part.programs, dw_a, dw_b, dw_t, w_a, w_b, w_t, HALF, HALF_PAD, TAIL,
            TAIL_PAD, BLOCK, ALIGN, TABLE_ALIGN, INTERLEAVED,
        )  # fmt: skip
    if part.partial is not None:
        one = tl.arange(0, 1)
        at = part.partial + program * (2 * HALF + TAIL) + one
        dw_a = tl.sum(dw_a, 0)[None, :]
        dw_b = tl.sum(dw_b, 0)[None, :]
        dw_t = tl.sum(dw_t, 0)[None, :]
        store_row(at, one == 0, dw_a, dw_b, dw_t, 1, HALF, HALF_PAD, TAIL, TAIL_PAD, INTERLEAVED)


@triton.jit
def qk_norm_rope_fwd(
    query, key, eps,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """query.y (B, Hq, N, D) from query.x, key.y (B, Hkv, N, D) from key.x."""
    program = tl.program_id(0)
    if program < query.programs:
        forward_tile(
            query, eps, program, HALF, HALF_PAD, TAIL, TAIL_PAD, BLOCK, ALIGN, TABLE_ALIGN, INTERLEAVED
        )  # fmt: skip
    else:
        forward_tile(
            key, eps, program - query.programs, HALF, HALF_PAD, TAIL, TAIL_PAD, BLOCK, ALIGN, TABLE_ALIGN,
            INTERLEAVED,
        )  # fmt: skip


@triton.jit
def qk_norm_rope_bwd(
    query, key, eps, steps, QUERY: tl.constexpr, KEY: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, TAIL: tl.constexpr, TAIL_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """grad_x and partial of the query if QUERY, and of the key if KEY: else it is None.

    Told apart by these, since to Triton 3.6 a tuple with a None in it is neither None nor not None.
    """
    program = tl.program_id(0)
    first_key = 0
    if QUERY:
        first_key = query.programs
        if program < query.programs:
            backward_part(
                query, eps, program, steps, HALF, HALF_PAD, TAIL, TAIL_PAD, BLOCK, ALIGN, TABLE_ALIGN, INTERLEAVED
            )  # fmt: skip
    if KEY:
        if program >= first_key:
            backward_part(
                key, eps, program - first_key, steps, HALF, HALF_PAD, TAIL, TAIL_PAD, BLOCK, ALIGN, TABLE_ALIGN,
                INTERLEAVED,
            )  # fmt: skip
