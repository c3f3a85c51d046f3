// Fragments: the parts of a matrix product that lie in a thread's registers. 16 rows and 8 N columns are float x[N][4];
// with g = lane / 4 and t = lane % 4,
//
//     x[n][0..1]   row g,     columns 8 n + 2 t, + 1
//     x[n][2..3]   row g + 8, the same columns
#pragma once

#include "masks.cuh"
#include "numbers.h"
#include "thread.h"

namespace attnfuse {

// A fragment (16, 8 N) rounded to T as the left operand of the next product: column pairs become K pairs.
template <typename T, int N>
__device__ __forceinline__ void pack_fragment(uint32_t (&packed)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        packed[n / 2][0] = pack<T>(x[n][0], x[n][1]);
        packed[n / 2][1] = pack<T>(x[n][2], x[n][3]);
        packed[n / 2][2] = pack<T>(x[n + 1][0], x[n + 1][1]);
        packed[n / 2][3] = pack<T>(x[n + 1][2], x[n + 1][3]);
    }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                x[m][n][c] = 0.0f;
            }
        }
    }
}

// -inf where the bit of the fragment's column is not set in the word of its row: g's `upper`, g + 8's `lower`.
// FIRST: the group of eight columns that the words begin with; they hold eight groups, or as many as are left.
template <int FIRST = 0, int N>
__device__ __forceinline__ void mask_fragment(float (&x)[N][4], Word upper, Word lower) {
    upper >>= lane_index() % 4 * 2;
    lower >>= lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < (N - FIRST < 8 ? N - FIRST : 8); ++n) {
        x[FIRST + n][0] = upper >> (8 * n) & 1 ? x[FIRST + n][0] : -infinity();
        x[FIRST + n][1] = upper >> (8 * n + 1) & 1 ? x[FIRST + n][1] : -infinity();
        x[FIRST + n][2] = lower >> (8 * n) & 1 ? x[FIRST + n][2] : -infinity();
        x[FIRST + n][3] = lower >> (8 * n + 1) & 1 ? x[FIRST + n][3] : -infinity();
    }
}

// The sum, or the maximum, over the four lanes that share a fragment's row.
__device__ __forceinline__ float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float row_maximum(float x) {
    x = maximum(x, shuffle_xor(x, 1));
    return maximum(x, shuffle_xor(x, 2));
}

// The same over all lanes of a warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        x += shuffle_xor(x, mask);
    }
    return x;
}
__device__ __forceinline__ float warp_maximum(float x) {
    x = row_maximum(x);
    x = maximum(x, shuffle_xor(x, 4));
    x = maximum(x, shuffle_xor(x, 8));
    return maximum(x, shuffle_xor(x, 16));
}

}  // namespace attnfuse
