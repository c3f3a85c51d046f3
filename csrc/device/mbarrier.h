// mbarrier (sm_90): a barrier in shared memory, 8 bytes on 8 bytes, that counts arrivals of threads and bytes of
// copies.
//
// A phase completes when as many threads have arrived as mbarrier_init said and all bytes that were announced have
// landed. What the arriving threads did before, and the copies, are seen by threads that have waited for the phase.
#pragma once

#include <cstdint>

#include "shared.h"

namespace attnfuse {

// By one thread; a proxy_fence by it and a barrier of the block must follow before anyone uses it.
__device__ __forceinline__ void mbarrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Announces that `bytes` more will be copied in this phase, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expecting(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has completed: that of the first is 0, and 1 stands for the one before it, which has.
__device__ __forceinline__ void mbarrier_wait(SharedAddress barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

}  // namespace attnfuse
