# mypy: ignore-errors
"""Forward: out, lse and the mass of each source in one pass over the keys of all sources.

    p_ij = e^(z_ij - m_i);  acc_i = sum_j dropout(p_ij) v_j;  l_i = sum_j p_ij     with m_i the running maximum
    out = acc / l;  lse = m + log l;  mass_s = l_s e^(m_s - m) / l

Grid: one axis of tiles * B * Hq, tiles fastest and last rows first (under a causal mask they are the longest). A
program owns rows [first, first + BLOCK_M) of one head and walks every source's columns in tiles of BLOCK_N:

               columns ->                 . masked: bounds, bands and masks are looked at
      rows   . # # # # # .                # full: every row sees every column, nothing is looked at
             .   . # # # # .              blank: no row sees the tile, it is not visited
"""

import triton
import triton.language as tl

from .tile import (
    base,
    column_range,
    describe_rows,
    dot,
    folds,
    head_slope,
    in_units,
    kept,
    load_full,
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

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_tile(
    acc, m, l, q, keys, values, source, shared, bias, slope, offset, b, h, i, start, hi,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr = False,
):  # fmt: skip
    """One step of the online softmax over columns start .. start + BLOCK_N; l counts this source only.

    keys and values are pointers, or descriptors if DESCRIBED, which a masked tile must not be.
    """
    FOLDS: tl.constexpr = folds(shared.rising, shared.to_cap, slope, source.pairs)
    j = start + tl.arange(0, BLOCK_N)
    if MASKED:
        columns_seen = seen_columns(source, b, j, 0, hi)
        k = load_rows(keys, source.key.row, start, BLOCK_N, D, D_PAD, columns_seen)
    else:
        k = load_full(keys, source.key.row, start, BLOCK_N, D, D_PAD, DESCRIBED)
    dots = dot(q, tl.trans(k), None, PRECISION)  # (BLOCK_M, BLOCK_N)

    pairs = None
    if MASKED:
        pairs = load_pairs(source, b, h, i[:, None], j[None, :], shared.rows)
    if FOLDS:
        z = dots
    else:
        z, _ = logits(dots, shared, bias, slope, pairs, i[:, None], j[None, :], offset)
    if MASKED:
        inside = (i < shared.rows)[:, None]
        seen = seen_pairs(source, pairs, i[:, None], j[None, :], offset, columns_seen[None, :], inside, hi)
        z = tl.where(seen, z, float("-inf"))
    largest = tl.max(z, 1)
    if FOLDS:
        largest = largest * shared.to_units
        if bias is not None:
            largest += bias
    m_new = tl.maximum(m, largest)
    m_safe = m_new
    if MASKED or bias is not None:
        # A row that has seen nothing yet has maximum -inf: -inf - -inf would be NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FOLDS:
        shift = -m_safe
        if bias is not None:
            shift += bias
        p = power(z * shared.to_units + shift[:, None], shared)  # one fused multiply-add before the exponential
    else:
        p = power(z - m_safe[:, None], shared)
    fade = power(m - m_safe, shared)
    l = l * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    if shared.seed is not None:
        p = tl.where(kept(shared, source, b, h, i[:, None], j[None, :]), p * shared.rescale, 0.0)
    if MASKED:
        if source.pairs is not None or source.left is not None:
            # A column that no row of the tile sees may hold NaN, and 0 * NaN is NaN.
            columns_seen = columns_seen & (tl.max(seen.to(tl.int32), 0) != 0)
        v = load_rows(values, source.value.row, start, BLOCK_N, DV, DV_PAD, columns_seen)
    else:
        v = load_full(values, source.value.row, start, BLOCK_N, DV, DV_PAD, DESCRIBED)
    acc = dot(p.to(v.dtype), v, acc, PRECISION)
    return acc, m_new, l


@triton.jit
def attn_fwd(
    query, out, lse_ptr, mass_ptr, sinks, sources, shared, tiles,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOURCES: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """query (B, Hq, Nq, D) -> out (B, Hq, Nq, Dv), lse (B, Hq, Nq), mass (B, Hq, Nq, S) unless None.

    DESCRIBED: full tiles come by descriptor, under the conditions of `describe_rows`.
    """
    program = tl.program_id(0)
    first = (tiles - 1 - program % tiles) * BLOCK_M
    h = program // tiles % shared.heads
    b = program // tiles // shared.heads
    i = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(first + BLOCK_M, shared.rows) - 1
    hkv = h // shared.group

    q = load_rows(base(query, b, h), query.row, first, BLOCK_M, D, D_PAD, i < shared.rows)
    slope = head_slope(shared, b, h)
    acc = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    maxima = ()  # per source: the maximum when it ended, and its own sum below it
    sums = ()
    for s in tl.static_range(SOURCES):
        source = sources[s]
        length = source_length(source, b)
        offset = source_offset(source, b)
        bias = source_bias(source, shared, b, h)
        keys = base(source.key, b, hkv)
        values = base(source.value, b, hkv)
        lo, full_lo, full_hi, hi = column_range(source, length, offset, first, last, BLOCK_N)
        m_before = m
        l_s = tl.zeros((BLOCK_M,), tl.float32)
        if source.left is not None:
            for start in range(lo, tl.minimum(full_lo, hi), BLOCK_N):
                acc, m, l_s = attend_tile(
                    acc, m, l_s, q, keys, values, source, shared, bias, slope, offset, b, h, i, start, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, True,
                )  # fmt: skip
        if source.key_mask is None and source.pairs is None:
            full_keys = keys
            full_values = values
            if DESCRIBED:
                full_keys = describe_rows(keys, source.key.row, source.columns, BLOCK_N, D)
                full_values = describe_rows(values, source.value.row, source.columns, BLOCK_N, DV)
            for start in range(full_lo, full_hi, BLOCK_N):
                acc, m, l_s = attend_tile(
                    acc, m, l_s, q, full_keys, full_values, source, shared, bias, slope, offset, b, h, i, start, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, False, DESCRIBED,
                )  # fmt: skip
        for start in range(full_hi, hi, BLOCK_N):
            acc, m, l_s = attend_tile(
                acc, m, l_s, q, keys, values, source, shared, bias, slope, offset, b, h, i, start, hi,
                D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, True,
            )  # fmt: skip
        m_safe = tl.where(m == float("-inf"), 0.0, m)
        l = l * power(m_before - m_safe, shared) + l_s
        if mass_ptr is not None:
            maxima = maxima + (m,)
            sums = sums + (l_s,)

    live = l > 0.0
    if sinks is not None:
        sink = in_units(tl.load(sinks + h), shared)
        m_final = tl.maximum(m, sink)
        fade = power(m - m_final, shared)
        acc = acc * fade[:, None]
        l = l * fade + power(sink - m_final, shared)
        m = m_final
    l_safe = tl.where(live, l, 1.0)
    m_safe = tl.where(live, m, 0.0)
    at = (tl.cast(b, tl.int64) * shared.heads + h) * shared.rows + i
    if shared.natural is None:
        lse = LN2 * (m_safe + tl.log2(l_safe))
    else:
        lse = m_safe + tl.log(l_safe)
    tl.store(lse_ptr + at, tl.where(live, lse, float("-inf")), mask=i < shared.rows)
    if mass_ptr is not None:
        for s in tl.static_range(SOURCES):
            mass = tl.where(live, sums[s] * power(maxima[s] - m_safe, shared) / l_safe, 0.0)
            tl.store(mass_ptr + at * SOURCES + s, mass, mask=i < shared.rows)
    acc = tl.where(live[:, None], acc / l_safe[:, None], 0.0)
    store_rows(base(out, b, h), out.row, first, BLOCK_M, DV, DV_PAD, shared.rows, acc)
