// What sets the warps of a block apart (sm_90): barriers of some of them, a share of the registers each, and the fence
// between what threads write and what copies and matrix products read.
#pragma once

#include "thread.h"

namespace attnfuse {

// Barriers 1 to 15 of a block; `threads` counts those that arrive and those that wait, whole warps of both.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of a thread from here on, for all four warps of a warpgroup: fewer, and the rest is given back; or more,
// once others have given back enough.
template <int Count>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// What this thread has written to shared memory before, is seen by copies and products (the async proxy) that come
// after it in the order that barriers make.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace attnfuse
