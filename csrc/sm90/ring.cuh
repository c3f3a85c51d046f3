// How the copying warp and the computing warps of a block hand buffers to each other: rings of stages, each with a
// barrier for full and one for empty.
#pragma once

#include "mbarrier.h"
#include "thread.h"

namespace attnfuse::sm90 {

// Tiles so far, as a place in the ring: the stage, and the parity of the phase in which it is full.
template <int STAGES>
struct Ring {
    int count = 0;

    __device__ __forceinline__ int stage() const { return static_cast<uint32_t>(count) % STAGES; }
    __device__ __forceinline__ int parity() const { return static_cast<uint32_t>(count) / STAGES % 2; }
    __device__ __forceinline__ Ring before() const { return {count - 1}; }
    __device__ __forceinline__ Ring after() const { return {count + 1}; }
};

// By all lanes, of which one goes on to copy: none is left behind by a whole phase.
__device__ __forceinline__ void wait_together(SharedAddress barrier, int parity) {
    mbarrier_wait(barrier, parity);
    warp_sync();
}

// This warp no longer reads what the barrier guards: its products are complete.
__device__ __forceinline__ void release(SharedAddress barrier) {
    if (lane_index() == 0) {
        mbarrier_arrive(barrier);
    }
}

}  // namespace attnfuse::sm90
