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
#include "../core/softmax.cuh"
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

    clear_mass<kM>(outputs);
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
            softmax.add_tile(m, scores[m], p.shape.logits.unit, bias, [&](int r, float shrink) {
                // Most tiles raise no row's maximum.
                if (ballot(shrink != 1.0f) != 0) {
#pragma unroll
                    for (int n = 0; n < kDN; ++n) {
                        out[m][n][2 * r] *= shrink;
                        out[m][n][2 * r + 1] *= shrink;
                    }
                }
            });
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
