# mypy: ignore-errors
"""Forward for few queries and long keys: the keys of all sources are split over programs, then merged.

    split p:  m_p = max_j z_ij;  acc_p = sum_j dropout(e^(z_ij - m_p)) v_j;  l_ps = sum_{j in s} e^(z_ij - m_p)
    merge:    m = max_p m_p (and the sink);  l = sum_p e^(m_p - m) sum_s l_ps (and e^(sink - m))
              out = sum_p e^(m_p - m) acc_p / l;  lse = m + log l;  mass_s = sum_p e^(m_p - m) l_ps / l

Grids, each one axis:

    attn_fwd_split     row tiles * splits * Hkv * B, row tiles fastest: those of one split read the same keys. A program
                       owns BLOCK_M packed rows (packed.py) and one split's run of column tiles:

                         columns of source 0 ->    of source 1 ->       . masked: bounds, bands, masks are looked at
                 rows    # # # #|# # # .           # #|# # # # .        # full: nothing is looked at
                         split 0|split 1              |split 2

    attn_fwd_combine   tiles of BLOCK_R rows of (B, Hq, Nq). A row that saw nothing in a split has m_p = -inf there;
                       its acc_p is neither written nor read.

Partials take 4 splits B Hq Nq (Dv + 1 + S) bytes (S = 1 where mass is not wanted). Splitting the keys of a decoding
step: Dao et al. 2023, "Flash-Decoding" (pytorch.org/blog/flash-decoding).
"""

import triton
import triton.language as tl

from .attn_fwd import LN2, attend_tile
from .packed import columns_of_share, load_packed, packed_rows, query_span, tile_count
from .tile import base, column_range, head_slope, in_units, power, source_bias, source_length, source_offset


@triton.jit
def attn_fwd_split(
    query, partial, maxima_ptr, sums_ptr, sources, shared, splits, tiles, all_rows,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SOURCES: tl.constexpr, MASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """query (B, Hq, Nq, D) -> float32 partial (splits, B, Hq, Nq, Dv), maxima (splits, B, Hq, Nq) in the units of z,

    sums (splits, B, Hq, Nq, S), or (splits, B, Hq, Nq, 1) over all sources without MASS. all_rows = B Hq Nq.
    """
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    split = program // tiles % splits
    key_heads = shared.heads // shared.group
    hkv = program // tiles // splits % key_heads
    b = program // tiles // splits // key_heads
    h, i, inside = packed_rows(shared, hkv, first, BLOCK_M)
    first_query, last_query = query_span(shared, first, BLOCK_M)

    total = 0
    for s in tl.static_range(SOURCES):
        source = sources[s]
        length = source_length(source, b)
        total += tile_count(source, length, source_offset(source, b), first_query, last_query, BLOCK_N)
    share = tl.cdiv(total, splits)
    begin = split * share
    before = 0

    q = load_packed(query, b, h, i, inside, D, D_PAD)
    slope = head_slope(shared, b, h[:, None])
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
        lo, full_lo, full_hi, hi = column_range(source, length, offset, first_query, last_query, BLOCK_N)
        start, stop, before = columns_of_share(lo, hi, before, begin, begin + share, BLOCK_N)
        if bias is not None:
            # All of a source's columns have it: the running maximum goes down by it while they are looked at.
            m -= bias
        m_before = m
        l_s = tl.zeros((BLOCK_M,), tl.float32)
        if source.left is not None:
            for at in range(start, tl.minimum(full_lo, stop), BLOCK_N):
                acc, m, l_s = attend_tile(
                    acc, m, l_s, q, keys, values, source, shared, None, slope, offset, b, h[:, None], i, at, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, True,
                )  # fmt: skip
        if source.key_mask is None and source.pairs is None:
            for at in range(tl.maximum(start, full_lo), tl.minimum(full_hi, stop), BLOCK_N):
                acc, m, l_s = attend_tile(
                    acc, m, l_s, q, keys, values, source, shared, None, slope, offset, b, h[:, None], i, at, hi,
                    D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, False,
                )  # fmt: skip
        for at in range(tl.maximum(start, full_hi), stop, BLOCK_N):
            acc, m, l_s = attend_tile(
                acc, m, l_s, q, keys, values, source, shared, None, slope, offset, b, h[:, None], i, at, hi,
                D, DV, D_PAD, DV_PAD, BLOCK_N, PRECISION, True,
            )  # fmt: skip
        if not MASS:
            l = l * power(m_before - tl.where(m == float("-inf"), 0.0, m), shared) + l_s
        if bias is not None:
            m += bias
        if MASS:
            maxima = maxima + (m,)
            sums = sums + (l_s,)

    row = (tl.cast(b, tl.int64) * shared.heads + h) * shared.rows + i
    row += tl.cast(split, tl.int64) * all_rows
    tl.store(maxima_ptr + row, m, mask=inside)
    if MASS:
        m_safe = tl.where(m == float("-inf"), 0.0, m)
        for s in tl.static_range(SOURCES):
            tl.store(sums_ptr + row * SOURCES + s, sums[s] * power(maxima[s] - m_safe, shared), mask=inside)
    else:
        tl.store(sums_ptr + row, l, mask=inside)
    d = tl.arange(0, DV_PAD)
    saw = inside & (m != float("-inf"))
    tl.store(partial + row[:, None] * DV + d[None, :], acc, mask=saw[:, None] & (d[None, :] < DV))


@triton.jit
def attn_fwd_combine(
    partial, maxima_ptr, sums_ptr, sinks, out, lse_ptr, mass_ptr, shared, splits, all_rows,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    SOURCES: tl.constexpr,
):  # fmt: skip
    """What attn_fwd_split left -> out (B, Hq, Nq, Dv), lse (B, Hq, Nq), mass (B, Hq, Nq, S) unless None."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < all_rows
    i = r % shared.rows
    h = r // shared.rows % shared.heads
    b = r // shared.rows // shared.heads
    p = tl.arange(0, SPLITS_PAD)
    at = tl.cast(p, tl.int64)[None, :] * all_rows + r[:, None]  # (BLOCK_R, SPLITS_PAD)
    there = inside[:, None] & (p < splits)[None, :]
    m = tl.load(maxima_ptr + at, mask=there, other=float("-inf"))
    top = tl.max(m, 1)
    live = top != float("-inf")
    if sinks is not None:
        sink = in_units(tl.load(sinks + h, mask=inside, other=0.0), shared)
        top = tl.maximum(top, sink)
    top = tl.where(live, top, 0.0)

    weights = power(m - top[:, None], shared)
    SUMS: tl.constexpr = 1 if mass_ptr is None else SOURCES
    l = tl.zeros((BLOCK_R,), tl.float32)
    parts = ()
    for s in tl.static_range(SUMS):
        part = tl.sum(weights * tl.load(sums_ptr + at * SUMS + s, mask=there, other=0.0), 1)
        l += part
        parts = parts + (part,)
    if sinks is not None:
        l += power(sink - top, shared)
    l = tl.where(live, l, 1.0)
    if shared.natural is None:
        lse = LN2 * (top + tl.log2(l))
    else:
        lse = top + tl.log(l)
    tl.store(lse_ptr + r, tl.where(live, lse, float("-inf")), mask=inside)
    if mass_ptr is not None:
        for s in tl.static_range(SUMS):
            tl.store(mass_ptr + tl.cast(r, tl.int64) * SUMS + s, tl.where(live, parts[s] / l, 0.0), mask=inside)

    d = tl.arange(0, DV_PAD)
    acc = tl.zeros((BLOCK_R, DV_PAD), tl.float32)
    for start in range(0, splits, CHUNK):
        some = start + tl.arange(0, CHUNK)
        some_at = tl.cast(some, tl.int64)[None, :] * all_rows + r[:, None]  # (BLOCK_R, CHUNK)
        some_there = inside[:, None] & (some < splits)[None, :]
        some_m = tl.load(maxima_ptr + some_at, mask=some_there, other=float("-inf"))
        saw = (some_m != float("-inf"))[:, :, None] & (d < DV)[None, None, :]
        x = tl.load(partial + some_at[:, :, None] * DV + d[None, None, :], mask=saw, other=0.0)
        acc += tl.sum(x * power(some_m - top[:, None], shared)[:, :, None], 1)  # over (BLOCK_R, CHUNK, DV_PAD)
    acc = acc / l[:, None]
    rows = tl.cast(b, tl.int64) * out.batch + tl.cast(h, tl.int64) * out.head + tl.cast(i, tl.int64) * out.row
    to = out.ptr + rows[:, None] + d[None, :]
    tl.store(to, acc.to(out.ptr.dtype.element_ty), mask=inside[:, None] & (d < DV)[None, :])
