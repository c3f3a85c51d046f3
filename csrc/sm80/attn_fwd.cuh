// Forward: out, lse and mass of a query over a list of sources, in one walk over all their keys (Dao, FlashAttention-2,
// arXiv:2307.08691; the online softmax of Milakov and Gimelshein, arXiv:1805.02867).
//
//     p = e^(z - lse),  out = sum_s sum_j p v,  mass_s = sum_{j in s} p = e^(lse_s - lse)
//
// Grid: one axis of tiles * Hq * B, the tiles of a head fastest and the last rows first (under a causal mask they have
// the most to do). A block owns kRows rows of one head, a warp 16 kFragments of them; every source is walked in tiles
// of kColumns columns:
//
//     rows     source 0      source 1
//      |     # # # # # .     # # .        # full: nothing is looked at     . masked     blank: not visited
//      v     # # # # # .     # # .
//
// K and V have one buffer each: V of a tile lands while Q K^T is computed, K of the next during the softmax and P V.
#pragma once

#include "../core/logits.cuh"
#include "launch.h"
#include "tile.cuh"

namespace attnfuse::sm80 {

template <int D>
struct ForwardTile {
    static constexpr int kWarps = 4;
    // Two fragments of rows a warp halve what is read from shared memory for a product; at 256 they do not fit
    // registers.
    static constexpr int kFragments = D <= 128 ? 2 : 1;
    static constexpr int kRows = 16 * kFragments * kWarps;
    // 64 columns at 96 and 128 would leave the loop a few registers short.
    static constexpr int kColumns = D == 96 || D == 128 ? 48 : 64;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kQueryBytes = kRows * D * 2;
    static constexpr int kKeyBytes = kColumns * D * 2;
    static constexpr int kSharedBytes = kQueryBytes + 2 * kKeyBytes;
};

// The running softmax of a thread's rows: row r of fragment m is 16 m + lane / 4 + 8 r of its warp's.
template <int M>
struct OnlineSoftmax {
    float largest[M][2];  // of all sources so far
    float sum[M][2];      // of this source, this thread's columns only
    // The finished sources' sum relative to their largest; lane 2 m + r of the four that share a row holds it.
    float finished_sum = 0.0f;
    float finished_largest = -infinity();

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                largest[m][r] = -infinity();
                sum[m][r] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ static bool holds(int m, int r) { return lane_index() % 4 == 2 * m + r; }

    // Fragment m of one tile from x to p, unnormalised; its part of out is brought to the new maximum.
    template <int N, int DN>
    __device__ __forceinline__ void add_tile(int m, float (&x)[N][4], float (&out)[DN][4], float unit, float bias) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = -infinity();
#pragma unroll
            for (int n = 0; n < N; ++n) {
                highest = maximum(highest, maximum(x[n][2 * r], x[n][2 * r + 1]));
            }
            const float now = maximum(largest[m][r], multiply_add(row_maximum(highest), unit, bias));
            // A row that has seen nothing yet: e^(-inf - 0) = 0 rather than e^(-inf + inf).
            const float from = now == -infinity() ? 0.0f : now;
            const float shrink = exp2_approx(largest[m][r] - from);
            largest[m][r] = now;
            sum[m][r] *= shrink;
            // Most tiles raise no row's maximum.
            if (ballot(shrink != 1.0f) != 0) {
#pragma unroll
                for (int n = 0; n < DN; ++n) {
                    out[n][2 * r] *= shrink;
                    out[n][2 * r + 1] *= shrink;
                }
            }
            const float shift = bias - from;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 2 * r; c < 2 * r + 2; ++c) {
                    x[n][c] = exp2_approx(multiply_add(x[n][c], unit, shift));
                    sum[m][r] += x[n][c];
                }
            }
        }
    }

    // The source has been walked: returns its own sum in row (m, r), in all columns.
    __device__ __forceinline__ float finish_source(int m, int r) {
        const float own = row_sum(sum[m][r]);
        sum[m][r] = 0.0f;
        if (holds(m, r) && own > 0.0f) {
            finished_sum = multiply_add(finished_sum, exp2_approx(finished_largest - largest[m][r]), own);
            finished_largest = largest[m][r];
        }
        return own;
    }

    // The sum over all sources, relative to the largest: whichever source raised it has finished since.
    __device__ __forceinline__ float total(int m, int r) const { return row_sum(holds(m, r) ? finished_sum : 0.0f); }
};

// What of a thread's rows goes to memory beside `out`, addressed by (m, r) as in OnlineSoftmax.
template <int M>
struct RowOutputs {
    const ForwardParams& p;
    int tiles;  // of a head
    int first;  // the block's first row

    // Of the B Hq. Divided out again where a source ends, rather than kept in a register all along.
    __device__ __forceinline__ int head() const { return recomputed(block_index()) / tiles; }

    __device__ __forceinline__ int row(int m, int r) const {
        return first + (warp_index() * M + m) * 16 + r * 8 + lane_index() / 4;
    }
    // Source s belongs to one of the four lanes that share a row; it alone writes and reads it.
    __device__ __forceinline__ bool owns(int m, int r, int s) const {
        return p.mass != nullptr && row(m, r) < p.shape.rows && lane_index() % 4 == s % 4;
    }
    __device__ __forceinline__ int64_t at(int m, int r) const { return stride_by(head(), p.shape.rows) + row(m, r); }
    __device__ __forceinline__ float* mass(int m, int r, int s) const {
        return p.mass + at(m, r) * p.shape.source_count + s;
    }
};

// Every source's place in mass to lse_s = -inf, for those that will not be visited.
template <int M>
__device__ __forceinline__ void clear_mass(const RowOutputs<M>& to) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            for (int s = 0; s < to.p.shape.source_count; ++s) {
                if (to.owns(m, r, s)) {
                    store_global(to.mass(m, r, s), -infinity());
                }
            }
        }
    }
}

// Source s has been walked: lse_s, in log2 units, waits in mass's place until lse is known.
template <int M>
__device__ __forceinline__ void finish_source(OnlineSoftmax<M>& softmax, const RowOutputs<M>& to, int s) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = softmax.finish_source(m, r);
            if (to.owns(m, r, s)) {
                store_global(to.mass(m, r, s), sum == 0.0f ? -infinity() : softmax.largest[m][r] + log2_exact(sum));
            }
        }
    }
}

// lse, mass, and `out` divided by the sum of its row: 0 in rows that saw nothing.
template <int M, int N>
__device__ __forceinline__ void finish_rows(
    const OnlineSoftmax<M>& softmax, float (&out)[M][N][4], const RowOutputs<M>& to) {
    const ForwardParams& p = to.p;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = softmax.largest[m][r], sum = softmax.total(m, r), shrink = 1.0f;
            const bool lives = sum > 0.0f;
            if (p.sinks != nullptr && lives) {
                const float sink = load_global(p.sinks + to.head() % p.shape.heads) * kLog2e;
                const float now = maximum(largest, sink);
                shrink = exp2_approx(largest - now);
                sum = multiply_add(sum, shrink, exp2_approx(sink - now));
                largest = now;
            }
            const float lse = lives ? largest + log2_exact(sum) : -infinity();
            const float factor = lives ? shrink / sum : 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                out[m][n][2 * r] *= factor;
                out[m][n][2 * r + 1] *= factor;
            }
            if (to.row(m, r) < p.shape.rows && lane_index() % 4 == 0) {
                store_global(p.lse + to.at(m, r), lse * kLn2);
            }
            for (int s = 0; s < p.shape.source_count; ++s) {
                if (to.owns(m, r, s)) {
                    const float part = load_global(static_cast<const float*>(to.mass(m, r, s)));
                    store_global(to.mass(m, r, s), lives ? exp2_approx(part - lse) : 0.0f);
                }
            }
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(ForwardTile<D>::kThreads, D <= 128 ? 2 : 1)
    attn_fwd_kernel(const __grid_constant__ ForwardParams p) {
    using Tile = ForwardTile<D>;
    constexpr int kM = Tile::kFragments, kN = Tile::kColumns / 8, kDN = D / 8;
    const int tiles = (p.shape.rows + Tile::kRows - 1) / Tile::kRows;
    const int first = (tiles - 1 - block_index() % tiles) * Tile::kRows;
    const int last = least(first + Tile::kRows, p.shape.rows) - 1;
    const int h = block_index() / tiles % p.shape.heads;
    const int b = block_index() / tiles / p.shape.heads;
    const int key_head = h / p.shape.group;
    const int warp_row = warp_index() * 16 * kM;
    const SharedAddress query = shared_base();             // (kRows, D), later `out`
    const SharedAddress keys = query + Tile::kQueryBytes;  // (kColumns, D)
    const SharedAddress values = keys + Tile::kKeyBytes;   // (kColumns, D)
    const RowOutputs<kM> outputs{p, tiles, first};

    const auto load_keys = [&](const ColumnTiles<Tile::kColumns>& tile) {
        load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(
            keys, p.sources[tile.source].key, b, key_head, tile.start, p.shape.dim,
            [&](int j) { return tile.seen >> j & 1; });
    };

    clear_mass(outputs);
    ColumnTiles<Tile::kColumns> tile;
    tile.advance(p, b, first, last);
    if (tile.valid(p)) {
        load_tile<Tile::kRows, D, Tile::kThreads, bf16>(
            query, p.query, b, h, first, p.shape.dim, [&](int row) { return first + row <= last; });
        load_keys(tile);
        cp_async_commit();
    }

    float out[kM][kDN][4];
    clear(out);
    OnlineSoftmax<kM> softmax;
    float bias = tile.valid(p) ? source_bias(p.sources[tile.source], b, h) : 0.0f;
    while (tile.valid(p)) {
        const SourceParams& source = p.sources[tile.source];
        cp_async_wait<0>();
        barrier();  // K is there; nobody reads the last V any more
        load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(
            values, source.value, b, key_head, tile.start, p.shape.value_dim,
            [&](int j) { return tile.seen >> j & 1; });
        cp_async_commit();

        ColumnTiles<Tile::kColumns> next = tile;
        next.advance(p, b, first, last);
        float scores[kM][kN][4];
        clear(scores);
        multiply_rows<T, kM, kN, D>(scores, query, warp_row, keys, 0);

        cp_async_wait<0>();
        barrier();  // V is there; nobody reads K any more
        if (next.valid(p)) {
            load_keys(next);
        }
        cp_async_commit();

        const bool full = tile.full(source, b, first, last);
        uint32_t weights[kM][kN / 2][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            prepare(scores[m], p.shape.logits);
            if (!full) {
                mask_fragment(
                    scores[m], tile.seen_by(source, b, outputs.row(m, 0)), tile.seen_by(source, b, outputs.row(m, 1)));
            }
            softmax.add_tile(m, scores[m], out[m], p.shape.logits.unit, bias);
            pack_fragment<T>(weights[m], scores[m]);
        }
        multiply_columns<T, kM, kDN, kN / 2, D>(out, weights, values);
        if (next.source != tile.source) {
            finish_source(softmax, outputs, tile.source);
            bias = next.valid(p) ? source_bias(p.sources[next.source], b, outputs.head() % p.shape.heads) : 0.0f;
        }
        tile = next;
    }
    finish_rows(softmax, out, outputs);
    store_fragments<T, kM, D>(out, query, warp_row, p.out, b, h, first, p.shape.rows, p.shape.value_dim);
}

template <typename T, int D>
void attn_fwd(const ForwardParams& p, void* stream) {
    using Tile = ForwardTile<D>;
    const int64_t tiles = (p.shape.rows + Tile::kRows - 1) / Tile::kRows;
    launch(attn_fwd_kernel<T, D>, tiles * p.shape.heads * p.shape.batch, Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <int D>
std::vector<TileShape> attn_fwd_tiles() {
    using Tile = ForwardTile<D>;
    return {{"attn_fwd", Tile::kRows, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes}};
}

}  // namespace attnfuse::sm80
