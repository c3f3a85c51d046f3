// Where a thread stands. Blocks are one axis, warps are 32 consecutive threads.
#pragma once

#include <cuda_runtime.h>

namespace attnfuse {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int block_count() { return gridDim.x; }

// Every thread of the block arrives before any goes on; shared memory written before is seen after.
__device__ __forceinline__ void barrier() { __syncthreads(); }
// The same for the 32 threads of a warp.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float x, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
// Bit l is lane l's vote.
__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

// x, which all lanes of the warp have alike: the compiler may then keep it in a register of the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// x, which the compiler must take for a new number here: what is computed from it is not kept in registers over a loop.
__device__ __forceinline__ int recomputed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

}  // namespace attnfuse
