// What the kernels for few queries and long keys share: packed rows, a split's share of all column tiles, and sums of
// partials.
//
// Split: a sample's visible tiles of columns are counted through all sources, and each of `splits` blocks takes an
// equal run of them, wherever sources begin and end. The count is the sample's own: in a padded batch a short sample is
// divided as it would be alone.
//
//     source 0 # # # # # # # . .    source 1 . # # #     # visible to some row    . to none: in nobody's share
//     split    0 0 0 0 1 1 1                   1 2 2
#pragma once

#include "../core/fragment.cuh"
#include "../few.h"
#include "tile.cuh"

namespace attnfuse::sm80 {

struct alignas(8) FloatPair {
    float low, high;
};
struct alignas(16) FourFloats {
    float at[4];
};

// Where a packed row comes from. Rows past the last stand for one of the last head.
struct PackedRow {
    int head;  // of the group
    int i;

    __device__ __forceinline__ PackedRow(const Shape& shape, int row)
        : head(least(row / shape.rows, shape.group - 1)), i(row % shape.rows) {}
};

// The queries of packed rows first .. last: all of them where these reach over heads.
struct QuerySpan {
    int first, last;

    __device__ __forceinline__ QuerySpan(const Shape& shape, int first_row, int last_row) {
        const bool over = first_row / shape.rows != last_row / shape.rows;
        first = over ? 0 : first_row % shape.rows;
        last = over ? shape.rows - 1 : last_row % shape.rows;
    }
};

// Packed rows first .. first + ROWS of x (B, Hq, Nq, dim) into a tile (ROWS, D): zeros right of dim and in rows that
// are not valid(head of the group, i), which are not read, or past the last. Lands with the group it is committed to.
template <int ROWS, int D, int THREADS, typename T, typename Valid>
__device__ __forceinline__ void load_packed(
    SharedAddress tile, const Rows& x, const Shape& shape, int b, int key_head, int first, int dim, Valid valid) {
    constexpr int kChunks = D / 8;
    const T* base = head_base<const T>(x, b, key_head * shape.group);
#pragma unroll 1
    for (int at = thread_index(); at < ROWS * kChunks; at += THREADS) {
        const int row = first + at / kChunks, d = at % kChunks * 8;
        const PackedRow packed(shape, row);
        const bool reads = d < dim && row < shape.group * shape.rows && valid(packed.head, packed.i);
        const T* from = reads ? base + stride_by(packed.head, x.head) + stride_by(packed.i, x.row) + d : base;
        const SharedAddress to = chunk_address<D>(tile, at / kChunks, d / 8);
        if (x.aligned) {
            cp_async_16(to, from, reads);
        } else {
#pragma unroll 1
            for (int e = 0; e < 8; ++e) {
                store_shared_16(to + 2 * e, reads && d + e < dim ? load_global(from + e).bits : uint16_t{0});
            }
        }
    }
}

// The column tiles of one split's share, one after the other; valid() as long as there is one.
template <int COLUMNS>
struct ShareOfTiles : ColumnTiles<COLUMNS> {
    using Base = ColumnTiles<COLUMNS>;
    int begin = 0;  // the source's columns before this one are seen by none of the rows
    int left = 0;   // tiles of the share, from this one on

    // A source's visible columns are begin .. end - 1; returns how many tiles they touch.
    __device__ __forceinline__ static int visible(
        const SourceParams& s, int b, const QuerySpan& span, int& begin, int& end) {
        const int offset = source_offset(s, b);
        begin = most(span.first + offset - s.left, 0);
        end = least(span.last + offset + s.right + 1, source_length(s, b));
        return end > begin ? (end + COLUMNS - 1) / COLUMNS - begin / COLUMNS : 0;
    }

    // To the first tile of the share.
    template <typename Params>
    __device__ __forceinline__ ShareOfTiles(const Params& p, int b, const QuerySpan& span, int split) {
        int total = 0, from = 0, to = 0;
        for (int s = 0; s < p.shape.source_count; ++s) {
            total += visible(p.sources[s], b, span, from, to);
        }
        const int share = (total + p.splits - 1) / p.splits;
        int before = split * share;
        left = least(share, total - before);
        Base::source = p.shape.source_count;
        if (left <= 0) {
            return;
        }
        Base::source = 0;
        for (int tiles; (tiles = visible(p.sources[Base::source], b, span, begin, Base::end)) <= before;) {
            before -= tiles;
            ++Base::source;
        }
        Base::start = (begin / COLUMNS + before) * COLUMNS;
        look(p, b);
    }

    // On to the next tile of the share, whatever it holds.
    template <typename Params>
    __device__ __forceinline__ void step(const Params& p, int b, const QuerySpan& span) {
        Base::start += COLUMNS;
        if (--left == 0) {
            Base::source = p.shape.source_count;
            return;
        }
        while (Base::start >= Base::end) {
            ++Base::source;
            const int tiles = visible(p.sources[Base::source], b, span, begin, Base::end);
            Base::start = tiles == 0 ? Base::end : begin / COLUMNS * COLUMNS;
        }
        look(p, b);
    }

    // On to the first tile from here on in which anything is seen; skipped(tile) is called for those before it.
    template <typename Params, typename Skipped>
    __device__ __forceinline__ void find_seen(const Params& p, int b, const QuerySpan& span, Skipped skipped) {
        while (Base::valid(p) && Base::seen == 0) {
            skipped(*this);
            step(p, b, span);
        }
    }

  private:
    template <typename Params>
    __device__ __forceinline__ void look(const Params& p, int b) {
        Base::seen = kept_keys<COLUMNS>(p.sources[Base::source], b, Base::start) &
                     between(begin - Base::start, least(Base::end - Base::start, COLUMNS));
    }
};

// A row of B Hq Nq, in their order.
struct FlatRow {
    int b, h, i;

    __device__ __forceinline__ FlatRow(const Shape& shape, int row)
        : b(row / shape.rows / shape.heads), h(row / shape.rows % shape.heads), i(row % shape.rows) {}
};

__host__ __device__ __forceinline__ int64_t all_rows(const Shape& shape) {
    return int64_t{shape.batch} * shape.heads * shape.rows;
}

// Rows lane / 4 and + 8 of a warp's fragment (16, 8 N) to `to[0]` and `to[1]`, rows of a partial, from column `column`
// on and as far as `width`. A null row is not written.
template <int N>
__device__ __forceinline__ void store_partial(const float (&x)[N][4], float* const (&to)[2], int column, int width) {
    column += lane_index() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (to[r] == nullptr) {
            continue;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (column + 8 * n < width) {
                store_global(
                    reinterpret_cast<FloatPair*>(to[r] + column + 8 * n), FloatPair{x[n][2 * r], x[n][2 * r + 1]});
            }
        }
    }
}

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = 32 * kMergeWarps;
constexpr int kMergeBytes = kMergeWarps * 256 * 4;

// Row `row` of `to` (., dim) = factor sum_p weight(p) partial[p], by all threads of a block, the warps taking turns in
// the splits; a weight of 0 is that of a partial that nobody wrote. Always added up in the same order.
template <typename T, typename Weight>
__device__ __forceinline__ void merge_partials(
    const float* partial, const Shape& shape, int splits, int row, const Rows& to, int dim, float factor,
    Weight weight) {
    const int lane = lane_index(), width = partial_width(dim);
    float sum[2][4] = {};
#pragma unroll 4
    for (int p = warp_index(); p < splits; p += kMergeWarps) {
        const float scale = weight(p);
        const float* from = partial + (p * all_rows(shape) + row) * width;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int d = 4 * lane + 128 * part;
            if (d < width && scale != 0.0f) {
                const FourFloats x = load_global(reinterpret_cast<const FourFloats*>(from + d));
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sum[part][c] = multiply_add(x.at[c], scale, sum[part][c]);
                }
            }
        }
    }
    const SharedAddress mine = shared_base() + (warp_index() * 256 + 4 * lane) * 4;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        store_shared_pair(mine + part * 512, sum[part][0], sum[part][1]);
        store_shared_pair(mine + part * 512 + 8, sum[part][2], sum[part][3]);
    }
    barrier();  // every warp's sum is there
    const int d = 2 * thread_index();
    if (d >= dim) {
        return;
    }
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kMergeWarps; ++warp) {
        float x, y;
        load_shared_pair(x, y, shared_base() + (warp * 256 + d) * 4);
        low += x;
        high += y;
    }
    const uint32_t packed = pack<T>(low * factor, high * factor);
    const FlatRow flat(shape, row);
    T* out = head_base<T>(to, flat.b, flat.h) + stride_by(flat.i, to.row) + d;
    if (to.aligned) {
        store_global(reinterpret_cast<uint32_t*>(out), packed);
    } else {
        store_global(out, T{static_cast<uint16_t>(packed)});
        if (d + 1 < dim) {
            store_global(out + 1, T{static_cast<uint16_t>(packed >> 16)});
        }
    }
}

}  // namespace attnfuse::sm80
