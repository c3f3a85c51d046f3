// A left operand that stays the same for all tiles: in shared memory, and as many of its steps of 16 along K as there
// are registers for in those, which spares reading 2 KB a step of a product, however narrow.
#pragma once

#include "ldmatrix.h"
#include "thread.h"
#include "wgmma.h"

namespace attnfuse::sm90 {

template <int STEPS>
using Kept = uint32_t[STEPS > 0 ? STEPS : 1][4];

// Of a matrix (64, 16 STEPS) in boxes of 64 columns, `box_bytes` apart.
template <int STEPS>
__device__ __forceinline__ void keep(Kept<STEPS>& kept, SharedAddress matrix, int box_bytes) {
    const int lane = lane_index(), row = warp_index() % 4 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const int chunk = 2 * (k % 4) + lane / 16;
        ldmatrix_x4(kept[k], matrix + k / 4 * box_bytes + row * 128 + ((chunk ^ row % 8) * 16));
    }
}

// Of the transpose of a matrix (16 STEPS, 64).
template <int STEPS>
__device__ __forceinline__ void keep_turned(Kept<STEPS>& kept, SharedAddress matrix) {
    const int lane = lane_index(), chunk = 2 * (warp_index() % 4) + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const int row = 16 * k + lane / 16 * 8 + lane % 8;
        ldmatrix_x4_trans(kept[k], matrix + row * 128 + ((chunk ^ row % 8) * 16));
    }
}

// acc (64, 8 N) = A B^T, over D: A (64, D), B (8 N, D), both in boxes of 64 columns, so many bytes apart.
template <typename T, int D, int KEPT, int N>
__device__ __forceinline__ void issue_over_d(
    float (&acc)[N][4], Kept<KEPT>& kept, SharedAddress left, int left_box_bytes, SharedAddress right,
    int right_box_bytes) {
    // Made anew for each tile: D / 16 of them are too many to keep.
    const MatrixDescriptor a = matrix_descriptor(recomputed(left), 0, 1024);
    const MatrixDescriptor b = matrix_descriptor(right, 0, 1024);
    if constexpr (KEPT > 0) {
        wgmma_fence(acc, kept);
    } else {
        wgmma_fence(acc);
    }
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const int box = k / 4, at = k % 4 * 32;
        const MatrixDescriptor b_k = further(b, box * right_box_bytes + at);
        if (k < KEPT) {
            wgmma<T>(acc, kept[k], b_k, k != 0);
        } else {
            wgmma<T>(acc, further(a, box * left_box_bytes + at), b_k, k != 0);
        }
    }
    wgmma_commit();
}

}  // namespace attnfuse::sm90
