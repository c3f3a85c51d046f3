// How what a warpgroup has computed of its 64 rows leaves: its fragments to shared memory, in boxes of 64 columns as
// tensor copies have them, and by such a copy to the tensor.
#pragma once

#include "numbers.h"
#include "shared.h"
#include "thread.h"
#include "tma.h"

namespace attnfuse::sm90 {

// value(n, c), of the fragments that x[n][c] stand for, to a matrix (64, 8 N) in boxes `box_bytes` apart.
template <typename T, int N, typename Value>
__device__ __forceinline__ void lay_down(SharedAddress matrix, int box_bytes, const Value& value) {
    const int row = warp_index() % 4 * 16 + lane_index() / 4;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const SharedAddress to =
            matrix + n / 8 * box_bytes + row * 128 + ((n % 8 ^ row % 8) * 16) + lane_index() % 4 * 4;
        store_shared_32(to, pack<T>(value(n, 0), value(n, 1)));
        store_shared_32(to + 8 * 128, pack<T>(value(n, 2), value(n, 3)));
    }
}

// By one thread, once all of the matrix is there: its boxes to rows `first` .. + 64 of the map's tensor.
template <int BOXES>
__device__ __forceinline__ void store_boxes(
    SharedAddress matrix, int box_bytes, const TensorMap& map, int first, int h, int b) {
#pragma unroll 1
    for (int box = 0; box < BOXES; ++box) {
        tma_store(matrix + box * box_bytes, map, 64 * box, first, h, b);
    }
    tma_commit();
}

}  // namespace attnfuse::sm90
