// The two cheap ends of the backward: what the passes want to know of each row, and dQ out of its accumulator.
//
//     delta_s = sum_d dout out - dlse - g_s + sum_t mass_t g_t        g = the gradient of mass
//
// attn_bwd_delta   a block owns 64 rows of one head, a warp a row at a time: lse2, delta, live, zeros in dq_sum
// attn_bwd_convert a block owns 64 rows of one head, a warp 16 of them: grad_query = scale dq_sum
//
// dq_sum is not in rows and columns but in the order of fragments (16 rows, 8 columns; see sm80/tile.cuh), element c of
// all 32 lanes side by side, so that the atomics that add it up fall on whole lines:
//
//     ((head * rows_padded / 16 + row / 16) * D_pad / 8 + column / 8) * 128 + c * 32 + lane
#pragma once

#include "../core/logits.cuh"
#include "launch.h"
#include "tile.cuh"

namespace attnfuse::sm80 {

constexpr int kRowsThreads = 128;
constexpr int kRowsBlock = 64;

__device__ __forceinline__ int64_t fragment_offset(const BackwardParams& p, int head, int row, int column) {
    return ((int64_t{head} * (p.rows_padded / 16) + row / 16) * (p.shape.dim_padded / 8) + column / 8) * 128;
}

// This lane's part of the sum over d of out and grad_out in row i.
template <typename T>
__device__ __forceinline__ float lane_product(const BackwardParams& p, int b, int h, int i) {
    const T* out = head_base<const T>(p.out, b, h) + i * p.out.row;
    const T* grad = head_base<const T>(p.grad_out, b, h) + i * p.grad_out.row;
    float sum = 0.0f;
    if (p.out.aligned && p.grad_out.aligned) {
        for (int d = 2 * lane_index(); d < p.shape.value_dim; d += 64) {
            const Pair x = unpack<T>(load_global(reinterpret_cast<const uint32_t*>(out + d)));
            const Pair y = unpack<T>(load_global(reinterpret_cast<const uint32_t*>(grad + d)));
            sum = multiply_add(x.low, y.low, multiply_add(x.high, y.high, sum));
        }
    } else {
        for (int d = lane_index(); d < p.shape.value_dim; d += 32) {
            sum =
                multiply_add(unpack<T>(load_global(out + d).bits).low, unpack<T>(load_global(grad + d).bits).low, sum);
        }
    }
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kRowsThreads) attn_bwd_delta_kernel(const __grid_constant__ BackwardParams p) {
    const int words = p.rows_padded / kRowsBlock;
    const int first = block_index() % words * kRowsBlock;
    const int head = block_index() / words;  // of B Hq
    const int b = head / p.shape.heads, h = head % p.shape.heads;
    const int lane = lane_index();
    const float* lse = p.lse + int64_t{head} * p.shape.rows;
    const auto lives = [&](int i) { return i < p.shape.rows && load_global(lse + i) != -infinity(); };

    if (warp_index() == 0) {
        const Word lower = ballot(lives(first + lane)), upper = ballot(lives(first + 32 + lane));
        if (lane == 0) {
            store_global(p.live + block_index(), lower | upper << 32);
        }
    }
    for (int i = first + warp_index(); i < first + kRowsBlock; i += kRowsThreads / 32) {
        const bool live = lives(i);
        const int64_t at = int64_t{head} * p.shape.rows + i, padded_at = int64_t{head} * p.rows_padded + i;
        // What a dead row holds is never read.
        float delta = live ? lane_product<T>(p, b, h, i) : 0.0f;
        float mass_gradient = 0.0f;
        if (p.grad_mass != nullptr && live && lane < p.shape.source_count) {
            mass_gradient = load_global(p.grad_mass + at * p.shape.source_count + lane);
            delta = multiply_add(mass_gradient, load_global(p.mass + at * p.shape.source_count + lane), delta);
        }
        delta = warp_sum(delta);
        if (p.grad_lse != nullptr && live) {
            delta -= load_global(p.grad_lse + at);
        }
        if (lane == 0) {
            store_global(p.lse2 + padded_at, live ? load_global(lse + i) * kLog2e : infinity());
        }
        if (lane == 0 || (p.delta_source != 0 && lane < p.shape.source_count)) {
            store_global(p.delta + lane * p.delta_source + padded_at, delta - mass_gradient);
        }
    }
    if (p.dq_sum != nullptr) {
        float* sum = p.dq_sum + fragment_offset(p, head, first, 0);
        for (int at = 4 * thread_index(); at < kRowsBlock * p.shape.dim_padded; at += 4 * kRowsThreads) {
            store_global_128(sum + at, Words4{0, 0, 0, 0});
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kRowsThreads) attn_bwd_convert_kernel(const __grid_constant__ BackwardParams p) {
    const int words = p.rows_padded / kRowsBlock;
    const int first = block_index() % words * kRowsBlock + 16 * warp_index();
    const int head = block_index() / words;  // of B Hq
    const int lane = lane_index(), row = first + lane / 4;
    T* out = head_base<T>(p.grad_query, head / p.shape.heads, head % p.shape.heads);
    for (int column = 0; column < p.shape.dim; column += 8) {
        const float* sum = p.dq_sum + fragment_offset(p, head, first, column) + lane;
        const int d = column + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = row + 8 * r;
            const float low = load_global(static_cast<const float*>(sum + 64 * r)) * p.shape.scale;
            const float high = load_global(static_cast<const float*>(sum + 64 * r + 32)) * p.shape.scale;
            const uint32_t packed = pack<T>(low, high);
            if (i < p.shape.rows && p.grad_query.aligned) {
                store_global(reinterpret_cast<uint32_t*>(out + i * p.grad_query.row + d), packed);
            } else if (i < p.shape.rows) {
                if (d < p.shape.dim) {
                    store_global(out + i * p.grad_query.row + d, T{static_cast<uint16_t>(packed)});
                }
                if (d + 1 < p.shape.dim) {
                    store_global(out + i * p.grad_query.row + d + 1, T{static_cast<uint16_t>(packed >> 16)});
                }
            }
        }
    }
}

template <typename T>
void attn_bwd_delta(const BackwardParams& p, void* stream) {
    const int64_t blocks = int64_t{p.shape.batch} * p.shape.heads * (p.rows_padded / kRowsBlock);
    launch(attn_bwd_delta_kernel<T>, blocks, kRowsThreads, 0, stream, p);
}

template <typename T>
void attn_bwd_convert(const BackwardParams& p, void* stream) {
    const int64_t blocks = int64_t{p.shape.batch} * p.shape.heads * (p.rows_padded / kRowsBlock);
    launch(attn_bwd_convert_kernel<T>, blocks, kRowsThreads, 0, stream, p);
}

}  // namespace attnfuse::sm80
