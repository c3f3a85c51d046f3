// Backward for few queries and long keys, query-stationary: K and V are read once, grad_key and grad_value written
// once.
//
//     p = e^(z - lse),  dz = p (dout . v - delta_s),  ds = dz (1 - tanh^2)
//     dv = sum_i p dout,  dk = scale sum_i ds q,  dq = scale sum_s sum_j ds k      over all query heads of the key head
//
// All rows of a key head (packed.cuh) fit one tile: Q and dO stay in shared memory and dq in registers while the keys
// stream by; each tile's dk and dv hold all rows, are final and stored at once. Nothing is added with atomics: the same
// bits every time. Grids, each one axis:
//
//     attn_bwd_few         splits * Hkv * B, splits fastest. A block owns one split's run of column tiles in all
//                          sources, and writes zeros to every splits-th of the tiles that no row sees
//
//               keys ->  split 0  | split 1 |
//        rows   # # # # # # # # # # # . . . o o o      # full     . masked     o seen by no row: dk = dv = 0
//         |     # # # # # # # # # # # # . . o o o      rows past the last, and dead rows (lse -inf), are read as 0
//         v     # # # # # # # # # # # # # . o o o      with lse +inf, so that p = 0
//
//     attn_bwd_few_reduce  B Hq Nq, a block a row: dq = scale times the sum over splits, in order
//
// A tile takes two steps. Scores: warps share out rows and keys, and leave p and ds in shared memory. Products: they
// share out dv and dk by keys and columns, dq by rows and columns.
#pragma once

#include "../core/logits.cuh"
#include "launch.h"
#include "packed.cuh"

namespace attnfuse::sm80 {

// Of the widest tile.
template <int D>
constexpr int kMostRows = D == 256 ? 64 : 128;

template <int D, int ROWS>
struct FewTile {
    // 64 would leave room for one block of a multiprocessor at (128, 64), and for none at 256.
    static constexpr int kColumns = D == 256 || (D == 128 && ROWS == 64) ? 32 : 64;
    static constexpr int kWarps = ROWS == 16 ? 4 : 8;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRowGroups = ROWS / 16, kKeyGroups = kColumns / 16;
    // Shares of a warp: 16 rows by a part of the keys; 16 keys by a part of the columns of dk and dv; 16 rows by a part
    // of the columns of dq.
    static constexpr int kKeyParts = kWarps / kRowGroups < kKeyGroups ? kWarps / kRowGroups : kKeyGroups;
    static constexpr int kPairParts = kWarps / kKeyGroups;
    static constexpr int kQueryParts = kWarps / kRowGroups;
    static constexpr int kRowBytes = ROWS * D * 2;
    static constexpr int kKeyBytes = kColumns * D * 2;
    static constexpr int kScoreBytes = ROWS * kColumns * 2;
    static constexpr int kBlocks = ROWS == 128 || (D == 256 && ROWS == 64) ? 1 : 2;  // of a multiprocessor
    static constexpr int kSharedBytes = 2 * kRowBytes + 4 * kKeyBytes + 2 * kScoreBytes;
};

// A packed fragment (16, 8 N) to rows own and own + 8 of a tile (., COLUMNS), columns from 8 `chunk` on.
template <int COLUMNS, int N>
__device__ __forceinline__ void store_scores(SharedAddress tile, int own, int chunk, const uint32_t (&x)[N / 2][4]) {
    const SharedAddress row = chunk_address<COLUMNS>(tile, own, chunk) + lane_index() % 4 * 4;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        store_shared_32(to_the_right<COLUMNS>(row, n), x[n / 2][n % 2 * 2]);
        store_shared_32(to_the_right<COLUMNS>(row, n) + 8 * (COLUMNS * 2), x[n / 2][n % 2 * 2 + 1]);
    }
}

// acc (16, 8 N) += scores^T rows: of a tile of scores (ROWS, COLUMNS) columns key .. + 16, of a tile of rows (ROWS, D)
// columns from 8 `chunk` on, of both as many rows as there are, in sixteens.
template <typename T, int ROWS, int COLUMNS, int D, int N>
__device__ __forceinline__ void sum_over_rows(
    float (&acc)[1][N][4], SharedAddress scores, int key, SharedAddress rows, int chunk, int count) {
#pragma unroll
    for (int first = 0; first < ROWS; first += 16) {
        if (first < count) {
            multiply_transposed<T, N, 16, COLUMNS, D>(
                acc, scores + first * (COLUMNS * 2), key, rows + first * (D * 2), chunk);
        }
    }
}

// A warp's fragment (16, 8 N), times factor, to rows first + tile_row .. + 16 of `out` (limit, dim) from column
// 8 `chunk` on, by way of the same place of a tile (., D) that nobody else reads any more.
template <typename T, int D, int N>
__device__ __forceinline__ void store_keys(
    const float (&x)[N][4], float factor, SharedAddress tile, int tile_row, int chunk, const Rows& out, int b, int h,
    int first, int limit, int dim) {
    const int lane = lane_index();
    const SharedAddress own = chunk_address<D>(tile, tile_row + lane / 4, chunk) + lane % 4 * 4;
    warp_sync();  // what stood here has been stored
#pragma unroll
    for (int n = 0; n < N; ++n) {
        store_shared_32(to_the_right<D>(own, n), pack<T>(x[n][0] * factor, x[n][1] * factor));
        store_shared_32(to_the_right<D>(own, n) + 8 * (D * 2), pack<T>(x[n][2] * factor, x[n][3] * factor));
    }
    warp_sync();
    T* base = head_base<T>(out, b, h);
    if (out.aligned) {
#pragma unroll
        for (int at = lane; at < 16 * N; at += 32) {
            const int row = tile_row + at / N, c = chunk + at % N;
            if (first + row < limit && c * 8 < dim) {
                store_global_128(
                    base + stride_by(first + row, out.row) + c * 8, load_shared_128(chunk_address<D>(tile, row, c)));
            }
        }
    } else {
        for (int at = lane; at < 16 * 8 * N; at += 32) {
            const int row = tile_row + at / (8 * N), d = 8 * chunk + at % (8 * N);
            if (first + row < limit && d < dim) {
                store_global(
                    base + stride_by(first + row, out.row) + d,
                    T{load_shared_16(chunk_address<D>(tile, row, d / 8) + d % 8 * 2)});
            }
        }
    }
}

// Zeros to rows first .. last - 1 of x (., dim), by all threads of the block.
template <int THREADS>
__device__ __forceinline__ void store_zeros(const Rows& x, int b, int h, int first, int last, int dim) {
    bf16* base = head_base<bf16>(x, b, h);  // zero is the same in both formats
    const int step = x.aligned ? 8 : 1, across = (dim + step - 1) / step;
    for (int at = thread_index(); at < (last - first) * across; at += THREADS) {
        bf16* to = base + stride_by(first + at / across, x.row) + at % across * step;
        if (x.aligned) {
            store_global_128(to, Words4{0, 0, 0, 0});
        } else {
            store_global(to, bf16{0});
        }
    }
}

// What a block owns of which (batch, key head), and this lane's rows in it: own and own + 8.
template <typename Tile>
struct FewBlock {
    const FewParams& p;
    const int packed = p.shape.group * p.shape.rows;
    const int split = block_index() % p.splits;
    const int key_head = block_index() / p.splits % p.shape.key_heads;
    const int b = block_index() / p.splits / p.shape.key_heads;
    const QuerySpan span{p.shape, 0, packed - 1};
    const int warp_row = warp_index() % Tile::kRowGroups * 16;
    const int own = warp_row + lane_index() / 4;
    const int part = warp_index() / Tile::kRowGroups;  // of the keys, then of the columns of dq
    const PackedRow rows[2] = {PackedRow(p.shape, own), PackedRow(p.shape, own + 8)};

    __device__ __forceinline__ bool has(int r) const { return own + 8 * r < packed; }
    __device__ __forceinline__ int head(int r) const { return key_head * p.shape.group + rows[r].head; }
    // In (B, Hq, rows_padded).
    __device__ __forceinline__ int64_t padded_at(int h, int i) const {
        return stride_by(b * p.shape.heads + h, p.rows_padded) + i;
    }
    // Row r in the n-th of several (B, Hq, Nq).
    __device__ __forceinline__ int64_t at(int n, int r) const {
        return n * all_rows(p.shape) + stride_by(b * p.shape.heads + head(r), p.shape.rows) + rows[r].i;
    }

    // Zeros for the keys of a tile, which no row sees.
    __device__ __forceinline__ void clear_keys(const BackwardSource& source, int start) const {
        const int end = least(start + Tile::kColumns, source.columns);
        if (source.grad_key.data != nullptr) {
            store_zeros<Tile::kThreads>(source.grad_key, b, key_head, start, end, p.shape.dim);
        }
        if (source.grad_value.data != nullptr) {
            store_zeros<Tile::kThreads>(source.grad_value, b, key_head, start, end, p.shape.value_dim);
        }
    }
    // The block's part of the tiles that are in nobody's share.
    __device__ __forceinline__ void clear_unseen() const {
        for (int s = 0; s < p.shape.source_count; ++s) {
            const BackwardSource& source = p.sources[s];
            int begin, end;
            const int visible = ShareOfTiles<Tile::kColumns>::visible(source, b, span, begin, end);
            const int from = visible == 0 ? 0 : begin / Tile::kColumns;
            for (int tile = split; tile * Tile::kColumns < source.columns; tile += p.splits) {
                if (tile < from || tile >= from + visible) {
                    clear_keys(source, tile * Tile::kColumns);
                }
            }
        }
    }
};

// dz and p of this lane's rows, summed over the columns it has seen of one source.
struct FewSums {
    float dz[2] = {0.0f, 0.0f};
    float p[2] = {0.0f, 0.0f};

    // To the part of the sums (., B, Hq, Nq, S, 2) that is this warp's, and on to the next source.
    template <typename Tile>
    __device__ __forceinline__ void store(const FewBlock<Tile>& block, int s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const FloatPair both{row_sum(dz[r]), row_sum(p[r])};
            if (block.has(r) && block.part < Tile::kKeyParts && lane_index() % 4 == 0) {
                const int64_t row = block.at(block.split * Tile::kKeyParts + block.part, r);
                store_global(reinterpret_cast<FloatPair*>(block.p.sums) + row * block.p.shape.source_count + s, both);
            }
            dz[r] = 0.0f;
            p[r] = 0.0f;
        }
    }
};

// p and ds of a warp's 16 rows and its part of a tile's keys, to shared memory; dz and p into `sums`.
template <typename T, int D, typename Tile>
__device__ __forceinline__ void score(
    const FewBlock<Tile>& block, const ShareOfTiles<Tile::kColumns>& tile, const float (&lse)[2], FewSums& sums,
    SharedAddress query, SharedAddress grad_out, SharedAddress keys, SharedAddress values, SharedAddress weights,
    SharedAddress grads) {
    constexpr int kColumns = Tile::kColumns, kN = kColumns / 8 / Tile::kKeyParts;
    const FewParams& p = block.p;
    const BackwardSource& source = p.sources[tile.source];
    const int key = block.part * 8 * kN;
    float x[1][kN][4], dz[1][kN][4], weight[kN][4];
    clear(x);
    clear(dz);
    multiply_rows<T, 1, kN, D>(x, query, block.warp_row, keys, key);
    multiply_rows<T, 1, kN, D>(dz, grad_out, block.warp_row, values, key);
    prepare(x[0], p.shape.logits);
    if (!tile.full(source, block.b, block.span.first, block.span.last)) {
        mask_fragment(
            x[0], tile.seen_by(source, block.b, block.rows[0].i) >> key,
            tile.seen_by(source, block.b, block.rows[1].i) >> key);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float shift = source_bias(source, block.b, block.head(r)) - lse[r];
        const float delta =
            load_global(p.delta + tile.source * p.delta_source + block.padded_at(block.head(r), block.rows[r].i));
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 2 * r; c < 2 * r + 2; ++c) {
                weight[n][c] = exp2_approx(multiply_add(x[0][n][c], p.shape.logits.unit, shift));
                dz[0][n][c] = weight[n][c] * (dz[0][n][c] - delta);
                sums.p[r] += weight[n][c];
                sums.dz[r] += dz[0][n][c];
            }
        }
    }
    uint32_t packed[kN / 2][4];
    pack_fragment<T>(packed, weight);
    store_scores<kColumns, kN>(weights, block.own, key / 8, packed);
    through_cap(dz[0], x[0], p.shape.logits);
    pack_fragment<T>(packed, dz[0]);
    store_scores<kColumns, kN>(grads, block.own, key / 8, packed);
}

template <typename T, int D, int ROWS>
__global__ void __launch_bounds__(FewTile<D, ROWS>::kThreads, FewTile<D, ROWS>::kBlocks)
    attn_bwd_few_kernel(const __grid_constant__ FewParams p) {
    using Tile = FewTile<D, ROWS>;
    constexpr int kColumns = Tile::kColumns, kThreads = Tile::kThreads;
    constexpr int kPairN = D / 8 / Tile::kPairParts, kQueryN = D / 8 / Tile::kQueryParts;
    const Shape& shape = p.shape;
    const FewBlock<Tile> block{p};
    const int b = block.b, key_head = block.key_head;
    const bool works = block.warp_row < block.packed;
    const SharedAddress query = shared_base();                  // (ROWS, D)
    const SharedAddress grad_out = query + Tile::kRowBytes;     // (ROWS, D)
    const SharedAddress pairs = grad_out + Tile::kRowBytes;     // two of K, V (kColumns, D)
    const SharedAddress weights = pairs + 4 * Tile::kKeyBytes;  // p (ROWS, kColumns)
    const SharedAddress grads = weights + Tile::kScoreBytes;    // ds (ROWS, kColumns)

    block.clear_unseen();
    FewSums sums;
    if (p.sums != nullptr) {
        for (int s = 0; s < shape.source_count; ++s) {
            sums.store(block, s);
        }
    }
    const auto skip = [&](const ShareOfTiles<kColumns>& tile) { block.clear_keys(p.sources[tile.source], tile.start); };
    const auto load_pair = [&](const ShareOfTiles<kColumns>& tile, SharedAddress to) {
        if (tile.valid(p)) {
            const BackwardSource& source = p.sources[tile.source];
            const auto seen = [&](int j) { return tile.seen >> j & 1; };
            load_tile<kColumns, D, kThreads, bf16>(to, source.key, b, key_head, tile.start, shape.dim, seen);
            load_tile<kColumns, D, kThreads, bf16>(
                to + Tile::kKeyBytes, source.value, b, key_head, tile.start, shape.value_dim, seen);
        }
        cp_async_commit();
    };
    ShareOfTiles<kColumns> tile(p, b, block.span, block.split);
    tile.find_seen(p, b, block.span, skip);
    float lse[2] = {infinity(), infinity()};
    if (tile.valid(p)) {
        const auto lives = [&](int h, int i) {
            const float lse2 = load_global(p.lse2 + block.padded_at(key_head * shape.group + h, i));
            return lse2 != infinity();
        };
        load_packed<ROWS, D, kThreads, bf16>(query, p.query, shape, b, key_head, 0, shape.dim, lives);
        load_packed<ROWS, D, kThreads, bf16>(grad_out, p.grad_out, shape, b, key_head, 0, shape.value_dim, lives);
        load_pair(tile, pairs);
        // Rows of warps that have none stay like this.
        for (int at = thread_index(); at < 2 * Tile::kScoreBytes / 16; at += kThreads) {
            store_shared_128(weights + at * 16, Words4{0, 0, 0, 0});
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (block.has(r)) {
                lse[r] = load_global(p.lse2 + block.padded_at(block.head(r), block.rows[r].i));
            }
        }
    }

    float dq[1][kQueryN][4];
    clear(dq);
    for (int stage = 0; tile.valid(p); stage ^= 1) {
        const BackwardSource& source = p.sources[tile.source];
        const SharedAddress keys = pairs + stage * 2 * Tile::kKeyBytes, values = keys + Tile::kKeyBytes;
        cp_async_wait<0>();
        barrier();  // K and V are there; nobody reads those before, p and ds any more
        ShareOfTiles<kColumns> next = tile;
        next.step(p, b, block.span);
        next.find_seen(p, b, block.span, skip);
        load_pair(next, pairs + (stage ^ 1) * 2 * Tile::kKeyBytes);

        if (works && block.part < Tile::kKeyParts) {
            score<T, D>(block, tile, lse, sums, query, grad_out, keys, values, weights, grads);
        }
        barrier();  // p and ds are there; nobody reads V any more

        const int key = warp_index() % Tile::kKeyGroups * 16;
        const int chunk = warp_index() / Tile::kKeyGroups * kPairN;
        if (source.grad_value.data != nullptr && 8 * chunk < shape.value_dim) {
            float dv[1][kPairN][4];
            clear(dv);
            sum_over_rows<T, ROWS, kColumns, D>(dv, weights, key, grad_out, chunk, block.packed);
            store_keys<T, D>(
                dv[0], 1.0f, values, key, chunk, source.grad_value, b, key_head, tile.start, source.columns,
                shape.value_dim);
        }
        if (source.grad_key.data != nullptr && 8 * chunk < shape.dim) {
            float dk[1][kPairN][4];
            clear(dk);
            sum_over_rows<T, ROWS, kColumns, D>(dk, grads, key, query, chunk, block.packed);
            store_keys<T, D>(
                dk[0], shape.scale, values, key, chunk, source.grad_key, b, key_head, tile.start, source.columns,
                shape.dim);
        }
        if (p.partial != nullptr && works) {
            uint32_t ds[1][kColumns / 16][4];
            const int lane = recomputed(lane_index());
            const SharedAddress from = chunk_address<kColumns>(grads, block.warp_row + lane % 16, lane / 16);
#pragma unroll
            for (int k = 0; k < kColumns / 16; ++k) {
                ldmatrix_x4(ds[0][k], to_the_right<kColumns>(from, 2 * k));
            }
            multiply_columns<T, 1, kQueryN, kColumns / 16, D>(dq, ds, keys, block.part * kQueryN);
        }
        if (p.sums != nullptr && next.source != tile.source) {
            sums.store(block, tile.source);
        }
        tile = next;
    }
    if (p.partial != nullptr) {
        const int width = partial_width(shape.dim);
        float* to[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            to[r] = block.has(r) ? p.partial + block.at(block.split, r) * width : nullptr;
        }
        store_partial(dq[0], to, block.part * kQueryN * 8, width);
    }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) attn_bwd_few_reduce_kernel(const __grid_constant__ FewParams p) {
    merge_partials<T>(p.partial, p.shape, p.splits, block_index(), p.grad_query, p.shape.dim, p.shape.scale, [](int) {
        return 1.0f;
    });
}

template <typename T, int D, int ROWS>
void launch_few(const FewParams& p, void* stream) {
    using Tile = FewTile<D, ROWS>;
    launch(
        attn_bwd_few_kernel<T, D, ROWS>, int64_t{p.splits} * p.shape.key_heads * p.shape.batch, Tile::kThreads,
        Tile::kSharedBytes, stream, p);
}

template <typename T, int D>
void attn_bwd_few(const FewParams& p, void* stream) {
    const int packed = p.shape.group * p.shape.rows;
    if (packed <= 16) {
        launch_few<T, D, 16>(p, stream);
    } else if (packed <= 64) {
        launch_few<T, D, 64>(p, stream);
    } else {
        launch_few<T, D, kMostRows<D>>(p, stream);
    }
}

template <typename T>
void attn_bwd_few_reduce(const FewParams& p, void* stream) {
    launch(attn_bwd_few_reduce_kernel<T>, all_rows(p.shape), kMergeThreads, kMergeBytes, stream, p);
}

template <int D, int ROWS>
TileShape few_tile_shape() {
    using Tile = FewTile<D, ROWS>;
    return {"attn_bwd_few", ROWS, Tile::kColumns, Tile::kThreads, Tile::kSharedBytes, "query-stationary, mma.sync"};
}

// By how many rows they take.
template <int D>
std::vector<TileShape> attn_bwd_few_tiles() {
    std::vector<TileShape> tiles{few_tile_shape<D, 16>(), few_tile_shape<D, 64>()};
    if constexpr (kMostRows<D> > 64) {
        tiles.push_back(few_tile_shape<D, kMostRows<D>>());
    }
    return tiles;
}

// In how many parts the row sums of a split come, with the same order.
template <int D>
std::vector<int> attn_bwd_few_sum_parts() {
    return {FewTile<D, 16>::kKeyParts, FewTile<D, 64>::kKeyParts, FewTile<D, kMostRows<D>>::kKeyParts};
}

}  // namespace attnfuse::sm80
