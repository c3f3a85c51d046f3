// Shared memory by its 32-bit addresses. Kernels never hold a pointer to it: what reads or writes it, says so here.
#pragma once

#include <cstdint>

namespace attnfuse {

// Bytes; the block's dynamic shared memory begins at shared_base().
using SharedAddress = uint32_t;

struct alignas(16) Words4 {
    uint32_t word[4];
};

__device__ __forceinline__ SharedAddress shared_base() {
    extern __shared__ __align__(128) unsigned char memory[];
    return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
}

__device__ __forceinline__ void store_shared_16(SharedAddress to, uint16_t x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
}
__device__ __forceinline__ void store_shared_32(SharedAddress to, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared_128(SharedAddress to, const Words4& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]),
                 "r"(x.word[3])
                 : "memory");
}
__device__ __forceinline__ uint16_t load_shared_16(SharedAddress from) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    return x;
}
__device__ __forceinline__ uint32_t load_shared_32(SharedAddress from) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}
// Two consecutive floats, on 8 bytes.
__device__ __forceinline__ void store_shared_pair(SharedAddress to, float low, float high) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}
__device__ __forceinline__ void load_shared_pair(float& low, float& high, SharedAddress from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(low), "=f"(high) : "r"(from) : "memory");
}
__device__ __forceinline__ Words4 load_shared_128(SharedAddress from) {
    Words4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(from)
                 : "memory");
    return x;
}

}  // namespace attnfuse
