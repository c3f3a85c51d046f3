// Backward, query-stationary: grad_query, and the sums of dz over each row that the gradients of bias and sinks need.
//
//     p = e^(z - lse),  dz = p (dout . v - delta_s),  ds = dz (1 - tanh^2),  dq = scale sum_s sum_j ds k
//
// Grid: as the forward's. A block owns 64 rows of one head, a warp 16 of them, and walks the same tiles of columns; it
// alone writes what it writes, so the bits are the same every time.
#pragma once

#include "../core/logits.cuh"
#include "../core/row_sums.cuh"
#include "launch.h"
#include "tile.cuh"

namespace attnfuse::sm80 {

template <int D>
struct QueryTile {
    static constexpr int kWarps = 4;
    static constexpr int kRows = 16 * kWarps;
    static constexpr int kColumns = D <= 128 ? 64 : 32;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRowBytes = kRows * D * 2;
    static constexpr int kKeyBytes = kColumns * D * 2;
    static constexpr int kSharedBytes = 2 * kRowBytes + 2 * kKeyBytes;
};

template <typename T, int D>
__global__ void __launch_bounds__(QueryTile<D>::kThreads, D <= 128 ? 2 : 1)
    attn_bwd_dq_kernel(const __grid_constant__ BackwardParams p) {
    using Tile = QueryTile<D>;
    constexpr int kN = Tile::kColumns / 8, kDN = D / 8;
    const int tiles = (p.shape.rows + Tile::kRows - 1) / Tile::kRows;
    const int first = (tiles - 1 - block_index() % tiles) * Tile::kRows;
    const int last = least(first + Tile::kRows, p.shape.rows) - 1;
    const int head = block_index() / tiles;  // of B Hq
    const int b = head / p.shape.heads, h = head % p.shape.heads;
    const int key_head = h / p.shape.group;
    const int warp_row = warp_index() * 16, row = first + warp_row + lane_index() / 4;
    const SharedAddress query = shared_base();               // (kRows, D), later grad_query
    const SharedAddress grad_out = query + Tile::kRowBytes;  // (kRows, D)
    const SharedAddress keys = grad_out + Tile::kRowBytes;   // (kColumns, D)
    const SharedAddress values = keys + Tile::kKeyBytes;     // (kColumns, D)

    const auto load_source = [&](const ColumnTiles<Tile::kColumns>& tile) {
        const SourceParams& source = p.sources[tile.source];
        const auto seen = [&](int j) { return tile.seen >> j & 1; };
        load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(
            keys, source.key, b, key_head, tile.start, p.shape.dim, seen);
        load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(
            values, source.value, b, key_head, tile.start, p.shape.value_dim, seen);
        cp_async_commit();
    };

    RowSums sums;
    if (p.sums != nullptr) {
        for (int s = 0; s < p.shape.source_count; ++s) {
            sums.store(p, head, row, s);
        }
    }
    ColumnTiles<Tile::kColumns> tile;
    tile.advance(p, b, first, last);
    if (tile.valid(p)) {
        const Word live =
            load_global(static_cast<const Word*>(p.live) + int64_t{head} * (p.rows_padded / 64) + first / 64);
        const auto lives = [&](int r) { return live >> r & 1; };
        load_tile<Tile::kRows, D, Tile::kThreads, bf16>(query, p.query, b, h, first, p.shape.dim, lives);
        load_tile<Tile::kRows, D, Tile::kThreads, bf16>(grad_out, p.grad_out, b, h, first, p.shape.value_dim, lives);
        load_source(tile);
    }

    const float* lse2 = p.lse2 + int64_t{head} * p.rows_padded + row;
    const float lse[2] = {load_global(lse2), load_global(lse2 + 8)};
    float dq[1][kDN][4];
    clear(dq);
    while (tile.valid(p)) {
        const SourceParams& source = p.sources[tile.source];
        cp_async_wait<0>();
        barrier();  // K and V are there
        float x[1][kN][4], dz[1][kN][4];
        clear(x);
        clear(dz);
        multiply_rows<T, 1, kN, D>(x, query, warp_row, keys, 0);
        multiply_rows<T, 1, kN, D>(dz, grad_out, warp_row, values, 0);
        prepare(x[0], p.shape.logits);
        if (!tile.full(source, b, first, last)) {
            mask_fragment(x[0], tile.seen_by(source, b, row), tile.seen_by(source, b, row + 8));
        }
        const float bias = source_bias(source, b, h);
        const float* delta = p.delta + tile.source * p.delta_source + int64_t{head} * p.rows_padded + row;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float shift = bias - lse[r], delta_r = load_global(delta + 8 * r);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int c = 2 * r; c < 2 * r + 2; ++c) {
                    const float weight = exp2_approx(multiply_add(x[0][n][c], p.shape.logits.unit, shift));
                    dz[0][n][c] = weight * (dz[0][n][c] - delta_r);
                    sums.p[r] += weight;
                    sums.dz[r] += dz[0][n][c];
                }
            }
        }
        through_cap(dz[0], x[0], p.shape.logits);
        uint32_t ds[1][kN / 2][4];
        pack_fragment<T>(ds[0], dz[0]);
        multiply_columns<T, 1, kDN, kN / 2, D>(dq, ds, keys);

        ColumnTiles<Tile::kColumns> next = tile;
        next.advance(p, b, first, last);
        if (p.sums != nullptr && next.source != tile.source) {
            sums.store(p, head, row, tile.source);
        }
        barrier();  // nobody reads K and V any more
        if (next.valid(p)) {
            load_source(next);
        }
        tile = next;
    }
    if (p.grad_query.data == nullptr) {
        return;
    }
#pragma unroll
    for (int n = 0; n < kDN; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            dq[0][n][c] *= p.shape.scale;
        }
    }
    store_fragments<T, 1, D>(dq, query, warp_row, p.grad_query, b, h, first, p.shape.rows, p.shape.dim);
}

template <typename T, int D>
void attn_bwd_dq(const BackwardParams& p, void* stream) {
    using Tile = QueryTile<D>;
    const int64_t tiles = (p.shape.rows + Tile::kRows - 1) / Tile::kRows;
    launch(
        attn_bwd_dq_kernel<T, D>, tiles * p.shape.heads * p.shape.batch, Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <int D>
std::vector<TileShape> attn_bwd_dq_tiles() {
    using Tile = QueryTile<D>;
    return {{"attn_bwd_dq", Tile::kRows, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes}};
}

}  // namespace attnfuse::sm80
