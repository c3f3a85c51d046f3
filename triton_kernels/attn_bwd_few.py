# mypy: ignore-errors
"""Backward for few queries and long keys, query-stationary: K and V are read once, dK and dV written once.

    p = e^(z - lse);  dp = dropout(dout . v);  dz = p (dp - delta_s);  ds = dz (1 - tanh^2)
    dv = sum_i dropout(p) dout;  dk = scale sum_i ds q;  dq = scale sum_j ds k          delta_s as in attn_bwd.py

All rows of a key head (packed.py) fit one tile: q, dout, lse and delta stay where they are while the keys stream by,
each tile's dk and dv hold all rows and are final, and dq grows in registers. Nothing is added with atomics: the same
bits every time. Tiles are transposed, (keys, rows): the keys give the matrix units their 64 rows however few the
queries are, and p and ds are left operands.

Grids, each one axis:

    attn_bwd_few         splits * Hkv * B, splits fastest. A program owns one split's run of column tiles in all
                         sources, and writes zeros to every splits-th of the tiles that no row sees

               rows ->        keys:
      keys   # # # # |        # full: nothing is looked at. Rows past the last, and dead rows (lse -inf), are read as
      split  # # # # |          0 with lse +inf, so that p = 0
        0    # # # # V        . masked
      -----  # # # #          o seen by no row: dk = dv = 0
        1    . . . .
             o o o o

    attn_bwd_few_reduce  tiles of BLOCK_R rows of (B, Hq, Nq): dq = scale sum over splits, in order

Partials take 4 splits B Hq Nq D bytes (none for one split: dq is then stored as it is), the row sums
8 splits B Hq Nq S more where they are asked for, and 8 splits B Hq Nq again for those of ALiBi slopes.
"""

import triton
import triton.language as tl

from .attn_bwd import load_row_state
from .packed import columns_of_share, load_packed, packed_rows, tile_count
from .tile import (
    base,
    column_range,
    dot,
    head_slope,
    kept,
    load_pairs,
    load_rows,
    logits,
    power,
    seen_columns,
    seen_pairs,
    source_bias,
    source_length,
    source_offset,
    store_rows,
)


@triton.jit
def few_tile(
    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta, live, keys, values, grad_keys, grad_values, grad_key,
    grad_value, source, shared, scale, bias, slope, offset, b, h, i, start, hi,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, DQ: tl.constexpr, SUMS: tl.constexpr, FAR_SUMS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of columns start .. start + BLOCK_N; add them to dq (D_PAD, BLOCK_M) and to the row sums."""
    j = start + tl.arange(0, BLOCK_N)
    columns_seen = None
    if MASKED:
        columns_seen = seen_columns(source, b, j, 0, hi)
    k = load_rows(keys, source.key.row, start, BLOCK_N, D, D_PAD, columns_seen)
    dots = dot(k, tl.trans(q), None, PRECISION)  # (BLOCK_N, BLOCK_M)
    v = load_rows(values, source.value.row, start, BLOCK_N, DV, DV_PAD, columns_seen)
    dp = dot(v, tl.trans(do), None, PRECISION)  # (BLOCK_N, BLOCK_M)

    pairs = None
    if MASKED:
        pairs = load_pairs(source, b, h, i[None, :], j[:, None], shared.rows)
    z, slack = logits(dots, shared, bias, slope, pairs, i[None, :], j[:, None], offset)
    if MASKED:
        seen = seen_pairs(source, pairs, i[None, :], j[:, None], offset, columns_seen[:, None], live[None, :])
        z = tl.where(seen, z, float("-inf"))
    p = power(z - lse[None, :], shared)
    dropped = p
    if shared.seed is not None:
        keep = kept(shared, source, b, h, i[None, :], j[:, None])
        dropped = tl.where(keep, p * shared.rescale, 0.0)
        dp = tl.where(keep, dp * shared.rescale, 0.0)
    if grad_value is not None:
        dv = dot(dropped.to(do.dtype), do, None, PRECISION)  # (BLOCK_N, DV_PAD)
        store_rows(grad_values, grad_value.row, start, BLOCK_N, DV, DV_PAD, source.columns, dv)
    dz = p * (dp - delta[None, :])
    if MASKED:
        dz = tl.where(seen, dz, 0.0)
    if SUMS:
        dz_sum += tl.sum(dz, 0)
        p_sum += tl.sum(p, 0)
    if FAR_SUMS:
        far = tl.abs(j[:, None] - i[None, :] - offset).to(tl.float32)
        dz_far += tl.sum(dz * far, 0)
        p_far += tl.sum(p * far, 0)
    ds = dz
    if shared.to_cap is not None:
        ds = dz * slack
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
    ds = ds.to(k.dtype)
    if grad_key is not None:
        dk = dot(ds, q, None, PRECISION)  # (BLOCK_N, D_PAD)
        store_rows(grad_keys, grad_key.row, start, BLOCK_N, D, D_PAD, source.columns, dk * scale)
    if DQ:
        if MASKED:
            if source.pairs is not None or source.left is not None:
                # A key that no row sees may hold NaN, and 0 * NaN is NaN.
                k = tl.where((tl.max(seen.to(tl.int32), 1) != 0)[:, None], k, 0.0)
        dq = dot(tl.trans(k), ds, dq, PRECISION)
    return dq, dz_sum, p_sum, dz_far, p_far


@triton.jit
def store_zeros(
    ptr, stride, split, splits, zero_to, zero_from, columns, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """This split's part of the tiles before zero_to and from zero_from on, of a (columns, D) matrix."""
    zero = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    for tile in range(split, zero_to, splits):
        store_rows(ptr, stride, tile * BLOCK_N, BLOCK_N, D, D_PAD, columns, zero)
    for tile in range(zero_from + split, tl.cdiv(columns, BLOCK_N), splits):
        store_rows(ptr, stride, tile * BLOCK_N, BLOCK_N, D, D_PAD, columns, zero)


@triton.jit
def attn_bwd_few(
    query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_query, partial, grads, sums, far_sums, sources, shared, scale,
    splits, all_rows,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SOURCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each source s grads[2 s] = grad_key (B, Hkv, Ns, D), grads[2 s + 1] = grad_value (B, Hkv, Ns, Dv), or None;

    grad_query (B, Hq, Nq, D) with one split, else its float32 partial (splits, B, Hq, Nq, D) without the scale, or
    neither; and of `attn_bwd_dq`'s row sums this split's part: sums (splits, B, Hq, Nq, S, 2), far_sums (.., 2).
    """
    program = tl.program_id(0)
    split = program % splits
    key_heads = shared.heads // shared.group
    hkv = program // splits % key_heads
    b = program // splits // key_heads
    h, i, inside = packed_rows(shared, hkv, 0, BLOCK_M)
    row = (tl.cast(b, tl.int64) * shared.heads + h) * shared.rows + i
    last = shared.rows - 1

    total = 0
    for s in tl.static_range(SOURCES):
        source = sources[s]
        total += tile_count(source, source_length(source, b), source_offset(source, b), 0, last, BLOCK_N)
    share = tl.cdiv(total, splits)
    begin = split * share
    before = 0

    lse, delta, live = load_row_state(lse_ptr, delta_ptr, None, shared, row, inside, 0, 1)
    q = load_packed(query, b, h, i, live, D, D_PAD)
    do = load_packed(grad_out, b, h, i, live, DV, DV_PAD)
    slope = head_slope(shared, b, h[None, :])
    DQ: tl.constexpr = (grad_query is not None) or (partial is not None)
    SUMS: tl.constexpr = sums is not None
    FAR_SUMS: tl.constexpr = far_sums is not None
    dq = tl.zeros((D_PAD, BLOCK_M), tl.float32)
    dz_far = tl.zeros((BLOCK_M,), tl.float32)
    p_far = tl.zeros((BLOCK_M,), tl.float32)
    to = row + tl.cast(split, tl.int64) * all_rows
    for s in tl.static_range(SOURCES):
        source = sources[s]
        grad_key = grads[2 * s]
        grad_value = grads[2 * s + 1]
        length = source_length(source, b)
        offset = source_offset(source, b)
        bias = source_bias(source, shared, b, h[None, :])
        keys = base(source.key, b, hkv)
        values = base(source.value, b, hkv)
        grad_keys = None
        grad_values = None
        if grad_key is not None:
            grad_keys = base(grad_key, b, hkv)
        if grad_value is not None:
            grad_values = base(grad_value, b, hkv)
        lo, full_lo, full_hi, hi = column_range(source, length, offset, 0, last, BLOCK_N)
        start, stop, before = columns_of_share(lo, hi, before, begin, begin + share, BLOCK_N)
        delta_s = delta
        if grad_mass is not None:
            delta_s = delta - tl.load(grad_mass + row * SOURCES + s, mask=live, other=0.0)
        dz_sum = tl.zeros((BLOCK_M,), tl.float32)
        p_sum = tl.zeros((BLOCK_M,), tl.float32)
        if source.left is not None:
            for at in range(start, tl.minimum(full_lo, stop), BLOCK_N):
                dq, dz_sum, p_sum, dz_far, p_far = few_tile(
                    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, grad_keys, grad_values,
                    grad_key, grad_value, source, shared, scale, bias, slope, offset, b, h[None, :], i, at, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, DQ, SUMS, FAR_SUMS, True,
                )  # fmt: skip
        if source.key_mask is None and source.pairs is None:
            for at in range(tl.maximum(start, full_lo), tl.minimum(full_hi, stop), BLOCK_N):
                dq, dz_sum, p_sum, dz_far, p_far = few_tile(
                    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, grad_keys, grad_values,
                    grad_key, grad_value, source, shared, scale, bias, slope, offset, b, h[None, :], i, at, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, DQ, SUMS, FAR_SUMS, False,
                )  # fmt: skip
        for at in range(tl.maximum(start, full_hi), stop, BLOCK_N):
            dq, dz_sum, p_sum, dz_far, p_far = few_tile(
                dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, grad_keys, grad_values,
                grad_key, grad_value, source, shared, scale, bias, slope, offset, b, h[None, :], i, at, hi,
                D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, DQ, SUMS, FAR_SUMS, True,
            )  # fmt: skip
        if sums is not None:
            tl.store(sums + (to * SOURCES + s) * 2, dz_sum, mask=inside)
            tl.store(sums + (to * SOURCES + s) * 2 + 1, p_sum, mask=inside)

        # Tiles before the first visible one and behind the last: nobody's share, everybody's part.
        zero_to = tl.minimum(lo // BLOCK_N, tl.cdiv(source.columns, BLOCK_N))
        zero_from = tl.maximum(tl.cdiv(hi, BLOCK_N), zero_to)
        if grad_key is not None:
            store_zeros(
                grad_keys, grad_key.row, split, splits, zero_to, zero_from, source.columns, BLOCK_N, D, D_PAD
            )  # fmt: skip
        if grad_value is not None:
            store_zeros(
                grad_values, grad_value.row, split, splits, zero_to, zero_from, source.columns, BLOCK_N, DV, DV_PAD
            )  # fmt: skip
    if far_sums is not None:
        tl.store(far_sums + to * 2, dz_far, mask=inside)
        tl.store(far_sums + to * 2 + 1, p_far, mask=inside)
    if DQ:
        d = tl.arange(0, D_PAD)[:, None]
        wanted = inside[None, :] & (d < D)
        if partial is None:
            rows = tl.cast(b, tl.int64) * grad_query.batch + tl.cast(h, tl.int64) * grad_query.head
            rows += tl.cast(i, tl.int64) * grad_query.row
            x = (dq * scale).to(grad_query.ptr.dtype.element_ty)
            tl.store(grad_query.ptr + rows[None, :] + d, x, mask=wanted)
        else:
            tl.store(partial + to[None, :] * D + d, dq, mask=wanted)


@triton.jit
def attn_bwd_few_reduce(
    partial, grad_query, heads, rows, scale, splits, all_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_query (B, Hq, Nq, D) = scale times the sum of partial (splits, B, Hq, Nq, D)."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D_PAD)
    inside = (r < all_rows)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK_R, D_PAD), tl.float32)
    for start in range(0, splits, CHUNK):
        p = start + tl.arange(0, CHUNK)
        at = tl.cast(p, tl.int64)[None, :] * all_rows + r[:, None]  # (BLOCK_R, CHUNK)
        there = inside[:, None, :] & (p < splits)[None, :, None]
        x = tl.load(partial + at[:, :, None] * D + d[None, None, :], mask=there, other=0.0)  # (BLOCK_R, CHUNK, D_PAD)
        acc += tl.sum(x, 1)
    i = r % rows
    h = r // rows % heads
    b = r // rows // heads
    at = tl.cast(b, tl.int64) * grad_query.batch + tl.cast(h, tl.int64) * grad_query.head
    at += tl.cast(i, tl.int64) * grad_query.row
    tl.store(grad_query.ptr + at[:, None] + d[None, :], (acc * scale).to(grad_query.ptr.dtype.element_ty), mask=inside)
