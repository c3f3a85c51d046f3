// Tiles of 16-bit numbers in shared memory and in the fragments of mma.m16n8k16.
//
// In shared memory a row of D numbers is D / 8 chunks of 16 bytes, chunk c of row r standing at c ^ flip(r), so that
// the eight rows that one ldmatrix reads lie in eight different groups of banks. Fragments: ../core/fragment.cuh.
#pragma once

#include "../core/fragment.cuh"
#include "../core/masks.cuh"
#include "cp_async.h"
#include "global.h"
#include "ldmatrix.h"
#include "mma.h"
#include "shared.h"
#include "thread.h"

namespace attnfuse::sm80 {

// Chunks change places within groups of so many. Where rows are shorter than the 128 bytes that the banks span, or no
// multiple of them, several rows share those, and flip together.
template <int D>
constexpr int kFlipGroup = D % 64 == 0 ? 8 : (D < 64 ? D / 8 : 4);

template <int D>
__device__ __forceinline__ int flip(int row) {
    return row / (8 / kFlipGroup<D>) % kFlipGroup<D>;
}

template <int D>
__device__ __forceinline__ SharedAddress chunk_address(SharedAddress tile, int row, int chunk) {
    return tile + row * (D * 2) + ((chunk ^ flip<D>(row)) * 16);
}

// From a chunk's address to that of the one `chunks` to its right. Both numbers must share no bit: within a group the
// sum is then an exclusive or, of the address itself, since tiles and groups of chunks begin on so many bytes.
template <int D>
__device__ __forceinline__ SharedAddress to_the_right(SharedAddress chunk, int chunks) {
    constexpr int kGroup = kFlipGroup<D>;
    return (chunk ^ (chunks % kGroup * 16)) + chunks / kGroup * (kGroup * 16);
}

template <typename T>
__device__ __forceinline__ T* head_base(const Rows& x, int b, int h) {
    return static_cast<T*>(x.data) + stride_by(b, x.batch) + stride_by(h, x.head);
}

// Rows first .. first + ROWS of x (., dim) into a tile (ROWS, D): zeros right of dim and in rows not valid(row), which
// are not read. Lands with the group it is committed to.
template <int ROWS, int D, int THREADS, typename T, typename Valid>
__device__ __forceinline__ void load_tile(
    SharedAddress tile, const Rows& x, int b, int h, int first, int dim, Valid valid) {
    constexpr int kChunks = D / 8;
    const T* base = head_base<const T>(x, b, h);
    const int thread = recomputed(thread_index());
#pragma unroll
    for (int begin = 0; begin < ROWS * kChunks; begin += THREADS) {
        const int row = (begin + thread) / kChunks, d = (begin + thread) % kChunks * 8;
        if (ROWS * kChunks % THREADS != 0 && row >= ROWS) {
            break;
        }
        const bool reads = d < dim && valid(row);
        const T* from = reads ? base + stride_by(first + row, x.row) + d : base;
        const SharedAddress to = chunk_address<D>(tile, row, d / 8);
        if (x.aligned) {
            cp_async_16(to, from, reads);
        } else {
            // Rows that begin anywhere are padded here, in shared memory, one number at a time.
#pragma unroll 1
            for (int e = 0; e < 8; ++e) {
                store_shared_16(to + 2 * e, reads && d + e < dim ? load_global(from + e).bits : uint16_t{0});
            }
        }
    }
}

// acc (16 M, 8 N) += A B^T of two tiles whose rows are K_DIM long: A's rows from a_row on, B's from b_row on.
template <typename T, int M, int N, int K_DIM>
__device__ __forceinline__ void multiply_rows(
    float (&acc)[M][N][4], SharedAddress a, int a_row, SharedAddress b, int b_row) {
    const int lane = recomputed(lane_index());
    const SharedAddress a_lane = chunk_address<K_DIM>(a, a_row + lane % 16, lane / 16);
    const SharedAddress b_lane = chunk_address<K_DIM>(b, b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < K_DIM / 8; k += 2) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ldmatrix_x4(left[m], to_the_right<K_DIM>(a_lane, k) + 16 * m * (K_DIM * 2));
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4(right, to_the_right<K_DIM>(b_lane, k) + 8 * n * (K_DIM * 2));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16<T>(acc[m][n], left[m], right[0], right[1]);
                mma_m16n8k16<T>(acc[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// acc (16 M, 8 N) += A B: A (16 M, 16 K) in fragments of packed pairs, B the first 16 K rows of a tile (., D), its
// columns from 8 b_chunk on.
template <typename T, int M, int N, int K, int D>
__device__ __forceinline__ void multiply_columns(
    float (&acc)[M][N][4], const uint32_t (&a)[M][K][4], SharedAddress b, int b_chunk = 0) {
    const int lane = recomputed(lane_index());
    const SharedAddress b_lane = chunk_address<D>(b, lane % 16, b_chunk + lane / 16);
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, to_the_right<D>(b_lane, n) + 16 * k * (D * 2));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16<T>(acc[m][n], a[m][k], right[0], right[1]);
                mma_m16n8k16<T>(acc[m][n + 1], a[m][k], right[2], right[3]);
            }
        }
    }
}

// acc (16, 8 N) += A^T B: A a tile of K rows and A_D columns, of which a_column .. + 16 are taken; B the first K rows
// of a tile (., D), its columns from 8 b_chunk on.
template <typename T, int N, int K, int A_D, int D>
__device__ __forceinline__ void multiply_transposed(
    float (&acc)[1][N][4], SharedAddress a, int a_column, SharedAddress b, int b_chunk) {
    const int lane = lane_index();
    const SharedAddress a_lane = chunk_address<A_D>(a, lane % 8 + lane / 16 * 8, a_column / 8 + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        uint32_t left[1][1][4];
        ldmatrix_x4_trans(left[0][0], a_lane + 16 * k * (A_D * 2));
        multiply_columns<T, 1, N, 1, D>(acc, left, b + 16 * k * (D * 2), b_chunk);
    }
}

// A warp's fragments (16 M, D) to rows of `out` (limit, dim), by way of its own rows of a tile (., D) from tile_row on,
// which nobody reads any more: a barrier has been passed since. first is the row of `out` that the tile begins with.
template <typename T, int M, int D>
__device__ __forceinline__ void store_fragments(
    const float (&x)[M][D / 8][4], SharedAddress tile, int tile_row, const Rows& out, int b, int h, int first,
    int limit, int dim) {
    constexpr int kChunks = D / 8;
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const SharedAddress row = chunk_address<D>(tile, tile_row + 16 * m + lane / 4, 0) + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            store_shared_32(to_the_right<D>(row, n), pack<T>(x[m][n][0], x[m][n][1]));
            store_shared_32(to_the_right<D>(row, n) + 8 * (D * 2), pack<T>(x[m][n][2], x[m][n][3]));
        }
    }
    warp_sync();
    T* base = head_base<T>(out, b, h);
    if (out.aligned) {
        for (int at = lane; at < 16 * M * kChunks; at += 32) {
            const int row = tile_row + at / kChunks, chunk = at % kChunks;
            if (first + row < limit && chunk * 8 < dim) {
                store_global_128(
                    base + stride_by(first + row, out.row) + chunk * 8,
                    load_shared_128(chunk_address<D>(tile, row, chunk)));
            }
        }
    } else {
        for (int at = lane; at < 16 * M * D; at += 32) {
            const int row = tile_row + at / D, d = at % D;
            if (first + row < limit && d < dim) {
                store_global(
                    base + stride_by(first + row, out.row) + d,
                    T{load_shared_16(chunk_address<D>(tile, row, d / 8) + d % 8 * 2)});
            }
        }
    }
}

}  // namespace attnfuse::sm80
