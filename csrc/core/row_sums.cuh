// The sums of dz and p over each row that the gradients of bias and sinks need, added up a source at a time.
#pragma once

#include "../attention.h"
#include "fragment.cuh"
#include "global.h"

namespace attnfuse {

// The two rows of this lane in its warp's fragment: row r is lane / 4 + 8 r.
struct RowSums {
    float dz[2] = {0.0f, 0.0f};
    float p[2] = {0.0f, 0.0f};

    // To sums (B, Hq, Nq, S, 2) of source s, and on to the next source.
    __device__ __forceinline__ void store(const BackwardParams& p_, int head, int row, int s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float both[2] = {row_sum(dz[r]), row_sum(p[r])};
            const int i = row + 8 * r;
            if (i < p_.shape.rows && lane_index() % 4 < 2) {
                float* to = p_.sums + ((int64_t{head} * p_.shape.rows + i) * p_.shape.source_count + s) * 2;
                store_global(to + lane_index() % 4, lane_index() % 4 == 0 ? both[0] : both[1]);
            }
            dz[r] = 0.0f;
            p[r] = 0.0f;
        }
    }
};

}  // namespace attnfuse
