// Forward for few queries and long keys: the keys of all sources are split over blocks, then merged.
//
//     split p:  m_p = max_j z_ij,  acc_p = sum_j e^(z_ij - m_p) v_j,  l_ps = sum_{j in s} e^(z_ij - m_ps)
//     merge:    m = max_p m_p (and the sink),  l = sum_p sum_s e^(m_ps - m) l_ps (and e^(sink - m))
//               out = sum_p e^(m_p - m) acc_p / l,  lse = m + log l,  mass_s = sum_p e^(m_ps - m) l_ps / l
//
// where m_ps is the running maximum of the split when source s ended. Grids, each one axis:
//
//     attn_fwd_split     row tiles * splits * Hkv * B, row tiles fastest: those of one split read the same keys. A
//     block
//                        owns ROWS packed rows (packed.cuh) and one split's run of column tiles:
//
//                          columns of source 0 ->    of source 1 ->       . masked: bounds, bands, holes are looked at
//                  rows    # # # #|# # # .           # #|# # # # .        # full: nothing is looked at
//                          split 0|split 1              |split 2          tiles that nobody sees are left out
//
//     attn_fwd_combine   B Hq Nq: a block a row. A row that saw nothing in a split has m_p = -inf there; its acc_p is
//                        neither written nor read.
//
// What bounds the first is how fast K and V arrive. Their tiles come in turns, through a ring: all but the one in use
// are on their way. The second row tile of a split finds them in the second-level cache. A warp has 16 rows. Where rows
// are so few that this makes one warp, four have the same rows: each computes all scores, which costs less than an
// exchange, and its part of the columns of `out`. Splitting the keys of a decoding step: Dao et al. 2023,
// "Flash-Decoding" (pytorch.org/blog/flash-decoding).
#pragma once

#include "../core/logits.cuh"
#include "../core/softmax.cuh"
#include "launch.h"
#include "packed.cuh"

namespace attnfuse::sm80 {

template <int D, int ROWS>
struct SplitTile {
    static constexpr int kColumns = D == 256 ? 32 : 64;
    static constexpr int kRowGroups = ROWS / 16;
    static constexpr int kParts = ROWS == 16 ? 4 : D == 256 ? 2 : 1;  // of the columns of `out`
    static constexpr int kThreads = 32 * kRowGroups * kParts;
    static constexpr int kQueryBytes = ROWS * D * 2;
    static constexpr int kKeyBytes = kColumns * D * 2;
    // 64 KB on their way at most: two blocks of a multiprocessor fit, and one where a block may have 99 KB.
    static constexpr int kSlots = 64 * 1024 / kKeyBytes;
    static constexpr int kSharedBytes = kQueryBytes + kSlots * kKeyBytes;
};

__host__ __device__ __forceinline__ int states(const SplitParams& p) {
    return p.mass == nullptr ? 1 : p.shape.source_count;
}

template <typename T, int D, int ROWS>
__global__ void __launch_bounds__(SplitTile<D, ROWS>::kThreads, SplitTile<D, ROWS>::kThreads == 128 ? 2 : 1)
    attn_fwd_split_kernel(const __grid_constant__ SplitParams p) {
    using Tile = SplitTile<D, ROWS>;
    constexpr int kColumns = Tile::kColumns, kThreads = Tile::kThreads, kN = kColumns / 8;
    constexpr int kPartN = D / 8 / Tile::kParts;
    const Shape& shape = p.shape;
    const int packed = shape.group * shape.rows, tiles = (packed + ROWS - 1) / ROWS;
    const int first = block_index() % tiles * ROWS;
    const int split = block_index() / tiles % p.splits;
    const int key_head = block_index() / tiles / p.splits % shape.key_heads;
    const int b = block_index() / tiles / p.splits / shape.key_heads;
    const QuerySpan span(shape, first, least(first + ROWS, packed) - 1);
    const int warp_row = warp_index() % Tile::kRowGroups * 16, part = warp_index() / Tile::kRowGroups;
    const bool works = first + warp_row < packed;
    const SharedAddress query = shared_base();             // (ROWS, D)
    const SharedAddress ring = query + Tile::kQueryBytes;  // kSlots of (kColumns, D): K and V in turns
    const int own = first + warp_row + lane_index() / 4;   // this lane's rows: own and own + 8
    const PackedRow rows[2] = {PackedRow(shape, own), PackedRow(shape, own + 8)};
    const auto head = [&](int r) { return key_head * shape.group + rows[r].head; };

    // Where this lane's row r is in the split's partial and, a quad's first lane of a row's first warp, state.
    const auto flat = [&](int r) {
        return split * all_rows(shape) + stride_by(b * shape.heads + head(r), shape.rows) + rows[r].i;
    };
    const auto store_state = [&](int r, int s, float largest, float sum) {
        if (part == 0 && own + 8 * r < packed && lane_index() % 4 == 0) {
            store_global(reinterpret_cast<FloatPair*>(p.state) + flat(r) * states(p) + s, FloatPair{largest, sum});
        }
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        for (int s = 0; s < states(p); ++s) {
            store_state(r, s, -infinity(), 0.0f);
        }
    }

    ShareOfTiles<kColumns> tile(p, b, span, split);
    tile.find_seen(p, b, span, [](const auto&) {});
    if (!tile.valid(p)) {
        return;
    }
    // What is loaded next: K, then V of `ahead`, into slot after slot of the ring.
    ShareOfTiles<kColumns> ahead = tile;
    int slot = 0;
    const auto load = [&] {
        const bool is_key = slot % 2 == 0;
        if (ahead.valid(p)) {
            const SourceParams& source = p.sources[ahead.source];
            load_tile<kColumns, D, kThreads, bf16>(
                ring + slot * Tile::kKeyBytes, is_key ? source.key : source.value, b, key_head, ahead.start,
                is_key ? shape.dim : shape.value_dim, [&](int j) { return ahead.seen >> j & 1; });
            if (!is_key) {
                ahead.step(p, b, span);
                ahead.find_seen(p, b, span, [](const auto&) {});
            }
        }
        cp_async_commit();
        slot = (slot + 1) % Tile::kSlots;
    };
    load_packed<ROWS, D, kThreads, bf16>(
        query, p.query, shape, b, key_head, first, shape.dim, [](int, int) { return true; });
#pragma unroll 1
    for (int n = 1; n < Tile::kSlots; ++n) {
        load();
    }

    float out[1][kPartN][4];
    clear(out);
    OnlineSoftmax<1> softmax;
    float bias[2] = {0.0f, 0.0f};
    int biased = -1;  // the source that bias is of
    const SharedAddress last_keys = ring + (Tile::kSlots - 2) * Tile::kKeyBytes;
    for (SharedAddress keys = ring; tile.valid(p); keys = keys == last_keys ? ring : keys + 2 * Tile::kKeyBytes) {
        const SourceParams& source = p.sources[tile.source];
        if (biased != tile.source) {
            biased = tile.source;
            bias[0] = source_bias(source, b, head(0));
            bias[1] = source_bias(source, b, head(1));
        }
        cp_async_wait<Tile::kSlots - 2>();
        barrier();  // K is there; nobody reads the V before any more
        load();
        float scores[1][kN][4];
        uint32_t weights[1][kN / 2][4];
        if (works) {
            clear(scores);
            multiply_rows<T, 1, kN, D>(scores, query, warp_row, keys, 0);
            prepare(scores[0], shape.logits);
            if (!tile.full(source, b, span.first, span.last)) {
                mask_fragment(scores[0], tile.seen_by(source, b, rows[0].i), tile.seen_by(source, b, rows[1].i));
            }
            softmax.add_tile(0, scores[0], shape.logits.unit, bias, [&](int r, float shrink) {
                // Most tiles raise no row's maximum.
                if (ballot(shrink != 1.0f) != 0) {
#pragma unroll
                    for (int n = 0; n < kPartN; ++n) {
                        out[0][n][2 * r] *= shrink;
                        out[0][n][2 * r + 1] *= shrink;
                    }
                }
            });
            pack_fragment<T>(weights[0], scores[0]);
        }
        cp_async_wait<Tile::kSlots - 2>();
        barrier();  // V is there; nobody reads K any more
        load();
        if (works) {
            multiply_columns<T, 1, kPartN, kN / 2, D>(out, weights, keys + Tile::kKeyBytes, part * kPartN);
        }
        const int ended = tile.source;
        tile.step(p, b, span);
        tile.find_seen(p, b, span, [](const auto&) {});
        if (tile.source != ended) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float sum = softmax.finish_source(0, r);
                if (p.mass != nullptr) {
                    store_state(r, ended, softmax.largest[0][r], sum);
                }
            }
        }
    }
    const int width = partial_width(shape.value_dim);
    float* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = softmax.total(0, r);
        if (p.mass == nullptr) {
            store_state(r, 0, softmax.largest[0][r], sum);
        }
        to[r] = own + 8 * r < packed && softmax.largest[0][r] != -infinity() ? p.partial + flat(r) * width : nullptr;
    }
    store_partial(out[0], to, part * kPartN * 8, width);
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) attn_fwd_combine_kernel(const __grid_constant__ SplitParams p) {
    const Shape& shape = p.shape;
    const int row = block_index(), lane = lane_index(), count = states(p);
    const FlatRow flat(shape, row);
    const auto state = [&](int split, int s) {
        return load_global(reinterpret_cast<const FloatPair*>(p.state) + (split * all_rows(shape) + row) * count + s);
    };

    float largest = -infinity();
    for (int split = lane; split < p.splits; split += 32) {
        for (int s = 0; s < count; ++s) {
            largest = maximum(largest, state(split, s).low);
        }
    }
    largest = warp_maximum(largest);
    const bool lives = largest != -infinity();
    float sum = 0.0f;
    if (p.sinks != nullptr) {
        const float sink = load_global(p.sinks + flat.h) * kLog2e;
        largest = lives ? maximum(largest, sink) : largest;
        sum = lives ? exp2_approx(sink - largest) : 0.0f;
    }
    largest = lives ? largest : 0.0f;
    const auto part_of = [&](int s) {
        float part = 0.0f;
        for (int split = lane; split < p.splits; split += 32) {
            const FloatPair x = state(split, s);
            part = multiply_add(x.high, exp2_approx(x.low - largest), part);
        }
        return warp_sum(part);
    };
    for (int s = 0; s < count; ++s) {
        sum += part_of(s);
    }
    if (warp_index() == 0 && lane == 0) {
        store_global(p.lse + row, lives ? (largest + log2_exact(sum)) * kLn2 : -infinity());
    }
    const float factor = lives ? 1.0f / sum : 0.0f;
    if (p.mass != nullptr) {
        for (int s = warp_index(); s < count; s += kMergeWarps) {
            const float part = part_of(s);
            if (lane == 0) {
                store_global(p.mass + int64_t{row} * count + s, part * factor);
            }
        }
    }
    merge_partials<T>(p.partial, shape, p.splits, row, p.out, shape.value_dim, factor, [&](int split) {
        float highest = -infinity();
        for (int s = 0; s < count; ++s) {
            highest = maximum(highest, state(split, s).low);
        }
        return exp2_approx(highest - largest);
    });
}

template <typename T, int D, int ROWS>
void launch_split(const SplitParams& p, void* stream) {
    using Tile = SplitTile<D, ROWS>;
    const int64_t tiles = (int64_t{p.shape.group} * p.shape.rows + ROWS - 1) / ROWS;
    launch(
        attn_fwd_split_kernel<T, D, ROWS>, tiles * p.splits * p.shape.key_heads * p.shape.batch, Tile::kThreads,
        Tile::kSharedBytes, stream, p);
}

template <typename T, int D>
void attn_fwd_split(const SplitParams& p, void* stream) {
    const int packed = p.shape.group * p.shape.rows;
    if (packed <= 16) {
        launch_split<T, D, 16>(p, stream);
    } else {
        launch_split<T, D, 64>(p, stream);
    }
}

template <typename T>
void attn_fwd_combine(const SplitParams& p, void* stream) {
    launch(attn_fwd_combine_kernel<T>, all_rows(p.shape), kMergeThreads, kMergeBytes, stream, p);
}

template <int D, int ROWS>
TileShape split_tile_shape() {
    using Tile = SplitTile<D, ROWS>;
    return {"attn_fwd_split", ROWS, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes, "keys split, mma.sync"};
}

// By how many rows they take.
template <int D>
std::vector<TileShape> attn_fwd_split_tiles() {
    return {split_tile_shape<D, 16>(), split_tile_shape<D, 64>()};
}

}  // namespace attnfuse::sm80
