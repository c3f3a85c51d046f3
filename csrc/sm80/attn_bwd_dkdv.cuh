// Backward, key-stationary: grad_key and grad_value of every source in one launch, and dQ if it is wanted here too.
//
//     p = e^(z - lse),  dz = p (dout . v - delta_s),  ds = dz (1 - tanh^2)
//     dv = sum_i p dout,  dk = scale sum_i ds q,  dq_sum += sum_j ds k      over all query heads of the key head
//
// Grid: one axis of tiles * Hkv * B, the tiles of all sources of a head side by side. A block owns kColumns keys of one
// source, a warp 16 of them, and walks the rows that see them; scores are transposed, (keys, rows), so that p and ds
// leave the registers of one product as the left operand of the next:
//
//               rows ->                    . masked     # full, nothing is looked at     blank: not visited
//      keys   # # # # # .                  rows past Nq and dead rows are read as 0 with lse +inf, so that p = 0
//       |     . # # # # .
//       v       . # # # .
//
// Only ds goes through shared memory, for dQ, which is added up by atomics (Dao, FlashAttention-2, arXiv:2307.08691).
// At a head dim of 256 dk and dv together do not fit the registers: each has a launch of its own.
#pragma once

#include "../core/key_tiles.cuh"
#include "attn_bwd_rows.cuh"

namespace attnfuse::sm80 {

// kSmall: for cards whose blocks have 99 KB of shared memory.
template <int D, bool kSmall>
struct KeyTile {
    static constexpr int kWarps = D == 64 || (D == 128 && !kSmall) ? 8 : 4;
    // 64 rows at 128 would leave the loop a few registers short.
    static constexpr int kRows = D <= 96 ? 64 : D == 128 ? 32 : 16;
    static constexpr int kColumns = 16 * kWarps;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kKeyBytes = kColumns * D * 2;
    static constexpr int kRowBytes = kRows * D * 2;
    static constexpr int kStateBytes = kRows * 4;
    static constexpr int kStageBytes = 2 * kRowBytes + 2 * kStateBytes;
    static constexpr int kGradBytes = kColumns * kRows * 2;
    static constexpr int shared_bytes(Wanted wanted) {
        return wanted == Wanted::kValue ? kKeyBytes + 2 * kStageBytes : 2 * kKeyBytes + 2 * kStageBytes + kGradBytes;
    }
};

// x of one tile to p (packed, the left operand of dv) and dz = p (dz - delta). lse and delta of the tile's rows stand
// at `state`, side by side.
template <typename T, int N>
__device__ __forceinline__ void weigh(
    uint32_t (&weights)[N / 2][4], float (&dz)[N][4], const float (&x)[N][4], SharedAddress state, float unit,
    float bias) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const SharedAddress at = state + (8 * n + lane_index() % 4 * 2) * 4;
        float lse[2], delta[2], p[4];
        load_shared_pair(lse[0], lse[1], at);
        load_shared_pair(delta[0], delta[1], at + N * 8 * 4);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            p[c] = exp2_approx(multiply_add(x[n][c], unit, bias - lse[c % 2]));
            dz[n][c] = p[c] * (dz[n][c] - delta[c % 2]);
        }
        weights[n / 2][n % 2 * 2] = pack<T>(p[0], p[1]);
        weights[n / 2][n % 2 * 2 + 1] = pack<T>(p[2], p[3]);
    }
}

// A packed fragment (16, COLUMNS) to rows own and own + 8 of a tile (., COLUMNS).
template <int COLUMNS>
__device__ __forceinline__ void store_packed(SharedAddress tile, int own, const uint32_t (&ds)[COLUMNS / 16][4]) {
    const SharedAddress row = chunk_address<COLUMNS>(tile, own, 0) + lane_index() % 4 * 4;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        store_shared_32(to_the_right<COLUMNS>(row, n), ds[n / 2][n % 2 * 2]);
        store_shared_32(to_the_right<COLUMNS>(row, n) + 8 * (COLUMNS * 2), ds[n / 2][n % 2 * 2 + 1]);
    }
}

template <typename T, int D, bool kSmall, Wanted WANTED>
__global__ void __launch_bounds__(KeyTile<D, kSmall>::kThreads, 1)
    attn_bwd_dkdv_kernel(const __grid_constant__ BackwardParams p) {
    using Tile = KeyTile<D, kSmall>;
    constexpr bool kKey = WANTED != Wanted::kValue, kValue = WANTED != Wanted::kKey;
    constexpr int kN = Tile::kRows / 8, kDN = D / 8;
    const auto mine = OwnedKeys<Tile::kColumns>::template own<WANTED>(p);
    const BackwardSource& source = p.sources[mine.source];
    const int b = mine.b, key_head = mine.key_head, first = mine.first;
    const int offset = mine.offset, first_head = mine.first_head(p);
    const int warp_row = warp_index() * 16, own = warp_row + lane_index() / 4;  // this lane's keys: own and own + 8
    const SharedAddress keys = shared_base();                                   // (kColumns, D), later grad_key
    const SharedAddress values = kKey ? keys + Tile::kKeyBytes : keys;          // (kColumns, D), later grad_value
    const SharedAddress stages = values + Tile::kKeyBytes;                      // two of: Q, dO (kRows, D), lse, delta
    const SharedAddress grads = stages + 2 * Tile::kStageBytes;                 // ds (kColumns, kRows)

    const auto is_seen = [&](int j) { return mine.sees(j); };
    const bool upper_seen = is_seen(own), lower_seen = is_seen(own + 8);

    const auto load_rows = [&](const RowTiles<Tile::kRows>& tile, SharedAddress stage) {
        const int h = key_head * p.shape.group + tile.head;
        const auto lives = [&](int r) { return tile.live >> r & 1; };
        load_tile<Tile::kRows, D, Tile::kThreads, bf16>(stage, p.query, b, h, tile.start, p.shape.dim, lives);
        load_tile<Tile::kRows, D, Tile::kThreads, bf16>(
            stage + Tile::kRowBytes, p.grad_out, b, h, tile.start, p.shape.value_dim, lives);
        const SharedAddress state = stage + 2 * Tile::kRowBytes;
        const int thread = recomputed(thread_index()), r = thread % Tile::kRows;
        const int64_t at = int64_t{first_head + tile.head} * p.rows_padded + tile.start + r;
        if (thread < Tile::kRows) {
            cp_async_4(state + r * 4, p.lse2 + at);
        } else if (thread < 2 * Tile::kRows) {
            cp_async_4(state + Tile::kStateBytes + r * 4, p.delta + mine.source * p.delta_source + at);
        }
        cp_async_commit();
    };

    RowTiles<Tile::kRows> tile;
    tile.advance(p, first_head, mine.row_begin, mine.row_end);
    if (tile.valid(p)) {
        load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(keys, source.key, b, key_head, first, p.shape.dim, is_seen);
        if constexpr (kKey) {
            load_tile<Tile::kColumns, D, Tile::kThreads, bf16>(
                values, source.value, b, key_head, first, p.shape.value_dim, is_seen);
        }
        load_rows(tile, stages);
    }

    float dk[1][kDN][4], dv[1][kDN][4];
    clear(dk);
    clear(dv);
    for (int stage_index = 0; tile.valid(p); stage_index ^= 1) {
        const SharedAddress stage = stages + stage_index * Tile::kStageBytes, grad_out = stage + Tile::kRowBytes;
        cp_async_wait<0>();
        barrier();  // the tile is there; nobody reads the other stage or ds any more
        RowTiles<Tile::kRows> next = tile;
        next.advance(p, first_head, mine.row_begin, mine.row_end);
        if (next.valid(p)) {
            load_rows(next, stages + (stage_index ^ 1) * Tile::kStageBytes);
        }
        const float bias = source_bias(source, b, key_head * p.shape.group + tile.head);
        float x[1][kN][4], dz[1][kN][4];
        clear(x);
        clear(dz);
        multiply_rows<T, 1, kN, D>(x, keys, warp_row, stage, 0);
        if constexpr (kKey) {
            multiply_rows<T, 1, kN, D>(dz, values, warp_row, grad_out, 0);
        }
        prepare(x[0], p.shape.logits);
        if (!(mine.all_seen && tile.full(source, offset, first, first + Tile::kColumns - 1, p.shape.rows))) {
            const Word upper = upper_seen ? tile.seeing(source, offset, first + own) : 0;
            const Word lower = lower_seen ? tile.seeing(source, offset, first + own + 8) : 0;
            mask_fragment(x[0], upper, lower);
        }
        uint32_t weights[1][kN / 2][4];
        weigh<T>(weights[0], dz[0], x[0], stage + 2 * Tile::kRowBytes, p.shape.logits.unit, bias);
        if constexpr (kValue) {
            multiply_columns<T, 1, kDN, kN / 2, D>(dv, weights, grad_out);
        }
        if constexpr (kKey) {
            through_cap(dz[0], x[0], p.shape.logits);
            uint32_t ds[1][kN / 2][4];
            pack_fragment<T>(ds[0], dz[0]);
            multiply_columns<T, 1, kDN, kN / 2, D>(dk, ds, stage);
            if (p.dq_sum != nullptr) {
                store_packed<Tile::kRows>(grads, own, ds[0]);
                barrier();  // ds is there
                // The warps share the tile of dQ out: 16 rows each, and of its columns the part that is left.
                constexpr int kParts = Tile::kWarps / (Tile::kRows / 16), kPartN = kDN / kParts;
                const int row = warp_index() / kParts * 16, chunk = warp_index() % kParts * kPartN;
                float dq[1][kPartN][4];
                clear(dq);
                multiply_transposed<T, kPartN, Tile::kColumns, Tile::kRows, D>(dq, grads, row, keys, chunk);
                float* sum =
                    p.dq_sum + fragment_offset(p, first_head + tile.head, tile.start + row, 8 * chunk) + lane_index();
#pragma unroll
                for (int n = 0; n < kPartN; ++n) {
                    if (8 * (chunk + n) < p.shape.dim) {
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            add_global(sum + n * 128 + c * 32, dq[0][n][c]);
                        }
                    }
                }
            }
        }
        tile = next;
    }

    barrier();  // nobody reads K any more
    if (kKey && source.grad_key.data != nullptr) {
#pragma unroll
        for (int n = 0; n < kDN; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                dk[0][n][c] *= p.shape.scale;
            }
        }
        store_fragments<T, 1, D>(dk, keys, warp_row, source.grad_key, b, key_head, first, source.columns, p.shape.dim);
    }
    if (kValue && source.grad_value.data != nullptr) {
        store_fragments<T, 1, D>(
            dv, values, warp_row, source.grad_value, b, key_head, first, source.columns, p.shape.value_dim);
    }
}

template <typename T, int D, bool kSmall, Wanted WANTED>
void launch_dkdv(const BackwardParams& p, void* stream) {
    using Tile = KeyTile<D, kSmall>;
    const int64_t tiles = all_key_tiles<Tile::kColumns, WANTED>(p);
    launch(
        attn_bwd_dkdv_kernel<T, D, kSmall, WANTED>, tiles * p.shape.key_heads * p.shape.batch, Tile::kThreads,
        Tile::shared_bytes(WANTED), stream, p);
}

template <typename T, int D>
void attn_bwd_dkdv(const BackwardParams& p, void* stream) {
    if constexpr (D == 256) {
        launch_dkdv<T, D, false, Wanted::kValue>(p, stream);
        launch_dkdv<T, D, false, Wanted::kKey>(p, stream);
    } else if (D == 128 && shared_memory_limit(p.shape.device) < KeyTile<D, false>::shared_bytes(Wanted::kBoth)) {
        launch_dkdv<T, D, D == 128, Wanted::kBoth>(p, stream);
    } else {
        launch_dkdv<T, D, false, Wanted::kBoth>(p, stream);
    }
}

template <int D, bool kSmall>
TileShape key_tile_shape(Wanted wanted) {
    using Tile = KeyTile<D, kSmall>;
    return {"attn_bwd_dkdv", Tile::kRows, Tile::kColumns, Tile::kThreads, Tile::shared_bytes(wanted)};
}

// In the order of preference, or of launch.
template <int D>
std::vector<TileShape> attn_bwd_dkdv_tiles() {
    if constexpr (D == 256) {
        return {key_tile_shape<D, false>(Wanted::kValue), key_tile_shape<D, false>(Wanted::kKey)};
    } else if constexpr (D == 128) {
        return {key_tile_shape<D, false>(Wanted::kBoth), key_tile_shape<D, true>(Wanted::kBoth)};
    } else {
        return {key_tile_shape<D, false>(Wanted::kBoth)};
    }
}

}  // namespace attnfuse::sm80
