// dq_sum, to which the kernel over keys adds its blocks' dQ, and grad_query = scale dq_sum.
#pragma once

#include "../core/masks.cuh"
#include "global.h"
#include "launch.h"
#include "ldmatrix.h"
#include "numbers.h"
#include "shared.h"
#include "thread.h"

namespace attnfuse::sm90 {

// Whether a warpgroup's product is dQ^T rather than dQ.
template <int D>
constexpr bool kQueryTurned = D < 256;

// dq_sum in fragments of 16 d and 8 rows, or of 16 rows and 8 d, element c of a lane side by side: as they leave the
// product.
//
//     dQ^T    ((head * D_pad / 16 + d / 16) * rows_padded / 8 + row / 8) * 128 + lane * 4 + c
//     dQ      ((head * rows_padded / 16 + row / 16) * D_pad / 8 + d / 8) * 128 + lane * 4 + c
template <int D>
__device__ __forceinline__ int64_t fragment_of(const BackwardParams& p, int head, int d, int row) {
    const int dim = p.shape.dim_padded, rows = p.rows_padded;
    return kQueryTurned<D> ? stride_by(stride_by(head, dim / 16) + d / 16, rows / 8) + row / 8
                           : stride_by(stride_by(head, rows / 16) + row / 16, dim / 8) + d / 8;
}

constexpr int kConvertThreads = 128;
constexpr int kConvertRows = 64;

// grad_query = scale dq_sum, out of its fragments. A block owns 64 rows of one head; a warp takes 16 d of 16 rows at a
// time, and turns those of dQ^T around on their way to shared memory.
template <typename T, int D>
__global__ void __launch_bounds__(kConvertThreads) attn_bwd_convert_kernel(const __grid_constant__ BackwardParams p) {
    constexpr int kRowBytes = D * 2;
    const int words = p.rows_padded / kConvertRows;
    const int first = block_index() % words * kConvertRows;
    const int head = block_index() / words;    // of B Hq
    const SharedAddress tile = shared_base();  // (kConvertRows, D), chunk c of row r at c ^ r % 8
    const auto chunk = [&](int row, int c) { return tile + row * kRowBytes + ((c ^ row % 8) * 16); };
    const int matrix = lane_index() / 8, r = lane_index() % 8;
    for (int at = warp_index(); at < D / 16 * (kConvertRows / 16); at += kConvertThreads / 32) {
        const int d = at / (kConvertRows / 16) * 16, row = at % (kConvertRows / 16) * 16;
        if (d >= p.shape.dim) {
            break;
        }
        // Element c of the lane's in two fragments side by side.
        uint32_t packed[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int64_t fragment = kQueryTurned<D> ? fragment_of<D>(p, head, d, first + row + 8 * n)
                                                     : fragment_of<D>(p, head, d + 8 * n, first + row);
            const float* from = p.dq_sum + fragment * 128 + lane_index() * 4;
            const Words4 x = load_global(reinterpret_cast<const Words4*>(from));
            const auto scaled = [&](int c) { return float_of(x.word[c]) * p.shape.scale; };
            packed[2 * n] = pack<T>(scaled(0), scaled(1));
            packed[2 * n + 1] = pack<T>(scaled(2), scaled(3));
        }
        if constexpr (kQueryTurned<D>) {
            stmatrix_x4_trans(chunk(row + matrix / 2 * 8 + r, d / 8 + matrix % 2), packed);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                store_shared_32(
                    chunk(row + i % 2 * 8 + lane_index() / 4, d / 8 + i / 2) + lane_index() % 4 * 4, packed[i]);
            }
        }
    }
    barrier();
    T* const out = static_cast<T*>(p.grad_query.data) + stride_by(head / p.shape.heads, p.grad_query.batch) +
                   stride_by(head % p.shape.heads, p.grad_query.head);
    for (int at = thread_index(); at < kConvertRows * (D / 8); at += kConvertThreads) {
        const int row = at / (D / 8), c = at % (D / 8);
        if (first + row < p.shape.rows && c * 8 < p.shape.dim) {
            store_global_128(out + stride_by(first + row, p.grad_query.row) + c * 8, load_shared_128(chunk(row, c)));
        }
    }
}

template <typename T, int D>
void attn_bwd_convert(const BackwardParams& p, void* stream) {
    const int64_t blocks = int64_t{p.shape.batch} * p.shape.heads * (p.rows_padded / kConvertRows);
    launch(attn_bwd_convert_kernel<T, D>, blocks, kConvertThreads, kConvertRows * D * 2, stream, p);
}

}  // namespace attnfuse::sm90
