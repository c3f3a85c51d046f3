// Asynchronous copies from global to shared memory (sm_80): they land some time before their group has been waited for.
#pragma once

#include <cstdint>

#include "shared.h"

namespace attnfuse {

// 16 bytes, both sides on 16 bytes, past L1; zeros in their place where not valid, and `from` is not read.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// 4 bytes.
__device__ __forceinline__ void cp_async_4(SharedAddress to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// This thread's copies since the last commit become a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but this thread's newest `Pending` groups have landed. Other threads see them after a barrier.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace attnfuse
