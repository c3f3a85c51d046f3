# mypy: ignore-errors
"""Backward in two passes, each of which owns what it writes: the same bits every time (only the gradient
of a mask that broadcasts is added up with atomics). Or in one, which adds up dq with atomics beside dk and dv.

    p = e^(z - lse);  dp = dropout(dout . v);  dz = p (dp - delta_s);  ds = dz (1 - tanh^2)
    delta_s = sum(dout out) - dlse - g_s + sum_t mass_t g_t          g = the gradient of mass
    dq = scale sum_j ds k;   dk = scale sum_i ds q;   dv = sum_i dropout(p) dout

Grids, each one axis of tiles * heads * B, tiles fastest:

    attn_bwd_delta   a program owns BLOCK_M rows: delta (the part that all sources share)
    attn_bwd_dq      a program owns BLOCK_M rows of one head and walks all sources, as the forward does
    attn_bwd_dkdv    launched once a source: a program owns BLOCK_N keys of one key head, and walks the rows of every
                     query head of its group; tiles are transposed, (keys, rows), so that p and ds are left operands

With `dq_sum` (one pass) attn_bwd_dkdv takes the place of attn_bwd_dq too: each tile's ds^T k is added to the rows of
dq_sum in memory (Dao, FlashAttention-2, arXiv:2307.08691), five products a tile instead of seven, and q, dout, k and v
are read by one kernel. Sums over a row it does not make: they would be atomics as well.

               rows ->                    . masked     # full, nothing is looked at     blank: not visited
      keys   # # # # # .                  rows past Nq, and dead rows (lse -inf), are read as 0 with
               . # # # .                  lse +inf, so that p = 0; full tiles hold neither
"""

import triton
import triton.language as tl

from .tile import (
    base,
    column_range,
    dot,
    folds,
    head_slope,
    in_units,
    kept,
    load_pairs,
    load_rows,
    logits,
    power,
    row_range,
    seen_columns,
    seen_pairs,
    source_bias,
    source_length,
    source_offset,
    store_rows,
)


@triton.jit
def attn_bwd_delta(
    out, grad_out, lse_ptr, grad_lse, mass_ptr, grad_mass, delta_ptr, heads, rows, tiles,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, Nq) = sum(grad_out out) - grad_lse + sum_t mass_t g_t; 0 in dead rows."""
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    h = program // tiles % heads
    b = program // tiles // heads
    i = first + tl.arange(0, BLOCK_M)
    at = (tl.cast(b, tl.int64) * heads + h) * rows + i
    live = tl.load(lse_ptr + at, mask=i < rows, other=float("-inf")) != float("-inf")
    o = load_rows(base(out, b, h), out.row, first, BLOCK_M, DV, DV_PAD, live)
    do = load_rows(base(grad_out, b, h), grad_out.row, first, BLOCK_M, DV, DV_PAD, live)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=live, other=0.0)
    if grad_mass is not None:
        for t in tl.static_range(SOURCES):
            g = tl.load(grad_mass + at * SOURCES + t, mask=live, other=0.0)
            delta += g * tl.load(mass_ptr + at * SOURCES + t, mask=live, other=0.0)
    tl.store(delta_ptr + at, delta, mask=i < rows)


@triton.jit
def load_row_state(lse_ptr, delta_ptr, grad_mass, shared, at, inside, s, SOURCES: tl.constexpr):
    """lse in the units of z (+inf in dead rows and past the last), delta of source s, and which rows live."""
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    live = lse != float("-inf")
    lse = tl.where(live, in_units(lse, shared), float("inf"))
    delta = tl.load(delta_ptr + at, mask=live, other=0.0)
    if grad_mass is not None:
        delta -= tl.load(grad_mass + at * SOURCES + s, mask=live, other=0.0)
    return lse, delta, live


@triton.jit
def weights(z, lse, shared, bias, FOLDS: tl.constexpr):
    """p = e^(z - lse), z being the bare products q . k if FOLDS (see `folds`)."""
    if FOLDS:
        shift = -lse
        if bias is not None:
            shift += bias
        p = power(z * shared.to_units + shift, shared)
    else:
        p = power(z - lse, shared)
    return p


@triton.jit
def dq_tile(
    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta, live, keys, values, source, shared, bias, slope, offset,
    b, h, i, start, hi,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr, FAR_SUMS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add columns start .. start + BLOCK_N to dq and to the row sums of `attn_bwd_dq`."""
    FOLDS: tl.constexpr = folds(shared.rising, shared.to_cap, slope, source.pairs)
    j = start + tl.arange(0, BLOCK_N)
    columns_seen = None
    if MASKED:
        columns_seen = seen_columns(source, b, j, 0, hi)
    k = load_rows(keys, source.key.row, start, BLOCK_N, D, D_PAD, columns_seen)
    dots = dot(q, tl.trans(k), None, PRECISION)  # (BLOCK_M, BLOCK_N)
    v = load_rows(values, source.value.row, start, BLOCK_N, DV, DV_PAD, columns_seen)
    dp = dot(do, tl.trans(v), None, PRECISION)  # (BLOCK_M, BLOCK_N)

    pairs = None
    if MASKED:
        pairs = load_pairs(source, b, h, i[:, None], j[None, :], shared.rows)
    if FOLDS:
        z = dots
    else:
        z, slack = logits(dots, shared, bias, slope, pairs, i[:, None], j[None, :], offset)
    if MASKED:
        seen = seen_pairs(source, pairs, i[:, None], j[None, :], offset, columns_seen[None, :], live[:, None], hi)
        z = tl.where(seen, z, float("-inf"))
    p = weights(z, lse[:, None], shared, bias, FOLDS)
    if shared.seed is not None:
        dp = tl.where(kept(shared, source, b, h, i[:, None], j[None, :]), dp * shared.rescale, 0.0)
    dz = p * (dp - delta[:, None])
    if MASKED:
        dz = tl.where(seen, dz, 0.0)
    if SUMS:
        dz_sum += tl.sum(dz, 1)
        p_sum += tl.sum(p, 1)
    if FAR_SUMS:
        far = tl.abs(j[None, :] - i[:, None] - offset).to(tl.float32)
        dz_far += tl.sum(dz * far, 1)
        p_far += tl.sum(p * far, 1)
    ds = dz
    if shared.to_cap is not None:
        ds = dz * slack
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
    if MASKED:
        if source.pairs is not None or source.left is not None:
            # A key that no row of the tile sees may hold NaN, and 0 * NaN is NaN.
            k = tl.where((tl.max(seen.to(tl.int32), 0) != 0)[:, None], k, 0.0)
    dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    return dq, dz_sum, p_sum, dz_far, p_far


@triton.jit
def attn_bwd_dq(
    query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_query, sums, far_sums, sources, shared, scale, tiles,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOURCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query (B, Hq, Nq, D); unless None, sums over each row's columns, of dz and of p:

    sums (B, Hq, Nq, S, 2) source by source, far_sums (B, Hq, Nq, 2) over all, each term times |j - (i + offset)|.
    """
    program = tl.program_id(0)
    first = (tiles - 1 - program % tiles) * BLOCK_M
    h = program // tiles % shared.heads
    b = program // tiles // shared.heads
    i = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(first + BLOCK_M, shared.rows) - 1
    at = (tl.cast(b, tl.int64) * shared.heads + h) * shared.rows + i
    hkv = h // shared.group

    lse, delta, live = load_row_state(lse_ptr, delta_ptr, None, shared, at, i < shared.rows, 0, 1)
    q = load_rows(base(query, b, h), query.row, first, BLOCK_M, D, D_PAD, live)
    do = load_rows(base(grad_out, b, h), grad_out.row, first, BLOCK_M, DV, DV_PAD, live)
    slope = head_slope(shared, b, h)
    SUMS: tl.constexpr = sums is not None
    FAR_SUMS: tl.constexpr = far_sums is not None
    dq = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    dz_far = tl.zeros((BLOCK_M,), tl.float32)
    p_far = tl.zeros((BLOCK_M,), tl.float32)
    for s in tl.static_range(SOURCES):
        source = sources[s]
        length = source_length(source, b)
        offset = source_offset(source, b)
        bias = source_bias(source, shared, b, h)
        keys = base(source.key, b, hkv)
        values = base(source.value, b, hkv)
        lo, full_lo, full_hi, hi = column_range(source, length, offset, first, last, BLOCK_N)
        delta_s = delta
        if grad_mass is not None:
            delta_s = delta - tl.load(grad_mass + at * SOURCES + s, mask=live, other=0.0)
        dz_sum = tl.zeros((BLOCK_M,), tl.float32)
        p_sum = tl.zeros((BLOCK_M,), tl.float32)
        if source.left is not None:
            for start in range(lo, tl.minimum(full_lo, hi), BLOCK_N):
                dq, dz_sum, p_sum, dz_far, p_far = dq_tile(
                    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, source,
                    shared, bias, slope,
                    offset, b, h, i, start, hi, D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, SUMS, FAR_SUMS, True,
                )  # fmt: skip
        if source.key_mask is None and source.pairs is None:
            for start in range(full_lo, full_hi, BLOCK_N):
                dq, dz_sum, p_sum, dz_far, p_far = dq_tile(
                    dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, source,
                    shared, bias, slope,
                    offset, b, h, i, start, hi, D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, SUMS, FAR_SUMS, False,
                )  # fmt: skip
        for start in range(full_hi, hi, BLOCK_N):
            dq, dz_sum, p_sum, dz_far, p_far = dq_tile(
                dq, dz_sum, p_sum, dz_far, p_far, q, do, lse, delta_s, live, keys, values, source, shared, bias, slope,
                offset, b, h, i, start, hi, D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, SUMS, FAR_SUMS, True,
            )  # fmt: skip
        if sums is not None:
            tl.store(sums + (at * SOURCES + s) * 2, dz_sum, mask=i < shared.rows)
            tl.store(sums + (at * SOURCES + s) * 2 + 1, p_sum, mask=i < shared.rows)
    if far_sums is not None:
        tl.store(far_sums + at * 2, dz_far, mask=i < shared.rows)
        tl.store(far_sums + at * 2 + 1, p_far, mask=i < shared.rows)
    store_rows(base(grad_query, b, h), grad_query.row, first, BLOCK_M, D, D_PAD, shared.rows, dq * scale)


@triton.jit
def add_pairs_gradient(grad_pairs, dz, b, h, i, j, rows, columns, SUM_I: tl.constexpr, SUM_J: tl.constexpr,
                       ATOMIC: tl.constexpr):  # fmt: skip
    """dz (columns, rows) of one tile into the mask's own gradient; strides of grad_pairs are 0 where it broadcasts."""
    ptr = base(grad_pairs, b, h)
    by_row = tl.cast(i, tl.int64) * grad_pairs.row
    by_column = tl.cast(j, tl.int64) * grad_pairs.column
    if SUM_I and SUM_J:
        tl.atomic_add(ptr, tl.sum(tl.sum(dz, 1), 0), sem="relaxed")
    elif SUM_I:
        tl.atomic_add(ptr + by_column, tl.sum(dz, 1), mask=j < columns, sem="relaxed")
    elif SUM_J:
        tl.atomic_add(ptr + by_row, tl.sum(dz, 0), mask=i < rows, sem="relaxed")
    else:
        at = ptr + by_row[None, :] + by_column[:, None]
        inside = (i < rows)[None, :] & (j < columns)[:, None]
        if ATOMIC:
            tl.atomic_add(at, dz, mask=inside, sem="relaxed")
        else:
            tl.store(at, dz, mask=inside)


@triton.jit
def add_rows(ptr, start, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, x):
    """x (D_PAD, N), transposed, added to rows start .. start + N, all of which are there, of a dense (., D) matrix."""
    n = tl.arange(0, N)
    d = tl.arange(0, D_PAD)
    at = ptr + tl.cast(start, tl.int64) * D + (n[None, :] * D + d[:, None])
    if D == D_PAD:
        tl.atomic_add(at, x, sem="relaxed")
    else:
        tl.atomic_add(at, x, mask=tl.broadcast_to((d < D)[:, None], (D_PAD, N)), sem="relaxed")


@triton.jit
def dkdv_tile(
    dk, dv, k, v, query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_pairs, dq_sum, source, shared, bias, slope,
    offset, columns_seen, b, h, j, start, s, length,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    SOURCES: tl.constexpr, SUM_I: tl.constexpr, SUM_J: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add rows start .. start + BLOCK_M of head h to dk and dv; and, unless it is None, their dq of k to dq_sum."""
    FOLDS: tl.constexpr = folds(shared.rising, shared.to_cap, slope, source.pairs)
    i = start + tl.arange(0, BLOCK_M)
    at = (tl.cast(b, tl.int64) * shared.heads + h) * shared.rows + i
    if MASKED:
        lse, delta, live = load_row_state(lse_ptr, delta_ptr, grad_mass, shared, at, i < shared.rows, s, SOURCES)
    else:
        lse = in_units(tl.load(lse_ptr + at), shared)
        delta = tl.load(delta_ptr + at)
        if grad_mass is not None:
            delta -= tl.load(grad_mass + at * SOURCES + s)
        live = None
    q = load_rows(base(query, b, h), query.row, start, BLOCK_M, D, D_PAD, live)
    dots = dot(k, tl.trans(q), None, PRECISION)  # (BLOCK_N, BLOCK_M)
    pairs = None
    if MASKED:
        pairs = load_pairs(source, b, h, i[None, :], j[:, None], shared.rows)
    if FOLDS:
        z = dots
    else:
        z, slack = logits(dots, shared, bias, slope, pairs, i[None, :], j[:, None], offset)
    if MASKED:
        seen = seen_pairs(source, pairs, i[None, :], j[:, None], offset, columns_seen[:, None], live[None, :], length)
        z = tl.where(seen, z, float("-inf"))
    p = weights(z, lse[None, :], shared, bias, FOLDS)

    do = load_rows(base(grad_out, b, h), grad_out.row, start, BLOCK_M, DV, DV_PAD, live)
    dropped = p
    if shared.seed is not None:
        keep = kept(shared, source, b, h, i[None, :], j[:, None])
        dropped = tl.where(keep, p * shared.rescale, 0.0)
    dv = dot(dropped.to(do.dtype), do, dv, PRECISION)
    dp = dot(v, tl.trans(do), None, PRECISION)  # (BLOCK_N, BLOCK_M)
    if shared.seed is not None:
        dp = tl.where(keep, dp * shared.rescale, 0.0)
    dz = p * (dp - delta[None, :])
    if MASKED:
        dz = tl.where(seen, dz, 0.0)
        if grad_pairs is not None:
            add_pairs_gradient(grad_pairs, dz, b, h, i, j, shared.rows, source.columns, SUM_I, SUM_J, ATOMIC)
    if shared.to_cap is not None:
        dz = dz * slack
        if MASKED:
            dz = tl.where(seen, dz, 0.0)
    ds = dz.to(q.dtype)
    dk = dot(ds, q, dk, PRECISION)
    if dq_sum is not None:
        if MASKED:
            if source.pairs is not None:
                # A key that no row of the tile sees may hold NaN, and 0 * NaN is NaN.
                k = tl.where((tl.max(seen.to(tl.int32), 1) != 0)[:, None], k, 0.0)
        dq = dot(tl.trans(k), ds, None, PRECISION)  # (D_PAD, BLOCK_M), of which wgmma can make use: 64 rows at least
        add_rows(base(dq_sum, b, h), start, BLOCK_M, D, D_PAD, dq)
    return dk, dv


@triton.jit
def attn_bwd_dkdv(
    query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_key, grad_value, grad_pairs, dq_sum, source, shared, scale,
    tiles, s,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOURCES: tl.constexpr,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_key (B, Hkv, Ns, D) and grad_value (B, Hkv, Ns, Dv) of source s; unless None, its mask's gradient, and
    sum_j ds k (not scaled) added to dq_sum (B, Hq, Nq up to a multiple of BLOCK_M, D), float32, at first zeros."""
    program = tl.program_id(0)
    first = program % tiles * BLOCK_N
    key_heads = shared.heads // shared.group
    hkv = program // tiles % key_heads
    b = program // tiles // key_heads
    j = first + tl.arange(0, BLOCK_N)
    length = source_length(source, b)
    offset = source_offset(source, b)
    lo, full_lo, full_hi, hi = row_range(source, length, offset, shared.rows, first, BLOCK_N, BLOCK_M)

    begin = 0
    end = length
    if dq_sum is not None:
        # A key that no row sees may hold NaN, and ds^T k would take it to every row as 0 * NaN.
        if source.right is not None:
            end = tl.minimum(end, shared.rows + offset + source.right)
        if source.left is not None:
            begin = offset - source.left
    columns_seen = seen_columns(source, b, j, begin, end)
    k = load_rows(base(source.key, b, hkv), source.key.row, first, BLOCK_N, D, D_PAD, columns_seen)
    v = load_rows(base(source.value, b, hkv), source.value.row, first, BLOCK_N, DV, DV_PAD, columns_seen)
    dk = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, DV_PAD), tl.float32)
    for g in range(shared.group):
        h = hkv * shared.group + g
        bias = source_bias(source, shared, b, h)
        slope = head_slope(shared, b, h)
        if source.right is not None:
            for start in range(lo, tl.minimum(full_lo, hi), BLOCK_M):
                dk, dv = dkdv_tile(
                    dk, dv, k, v, query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_pairs, dq_sum, source, shared,
                    bias, slope, offset, columns_seen, b, h, j, start, s, length, D, DV, D_PAD, DV_PAD, BLOCK_M,
                    SOURCES, SUM_I, SUM_J, ATOMIC, PRECISION, True,
                )  # fmt: skip
        if source.key_mask is None and source.pairs is None:
            for start in range(full_lo, full_hi, BLOCK_M):
                dk, dv = dkdv_tile(
                    dk, dv, k, v, query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_pairs, dq_sum, source, shared,
                    bias, slope, offset, columns_seen, b, h, j, start, s, length, D, DV, D_PAD, DV_PAD, BLOCK_M,
                    SOURCES, SUM_I, SUM_J, ATOMIC, PRECISION, False,
                )  # fmt: skip
        for start in range(full_hi, hi, BLOCK_M):
            dk, dv = dkdv_tile(
                dk, dv, k, v, query, grad_out, lse_ptr, delta_ptr, grad_mass, grad_pairs, dq_sum, source, shared,
                bias, slope, offset, columns_seen, b, h, j, start, s, length, D, DV, D_PAD, DV_PAD, BLOCK_M,
                SOURCES, SUM_I, SUM_J, ATOMIC, PRECISION, True,
            )  # fmt: skip
    store_rows(base(grad_key, b, hkv), grad_key.row, first, BLOCK_N, D, D_PAD, source.columns, dk * scale)
    store_rows(base(grad_value, b, hkv), grad_value.row, first, BLOCK_N, DV, DV_PAD, source.columns, dv)
