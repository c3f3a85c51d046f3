// Global memory. Loads and stores are functions, so that emulation sees them.
#pragma once

#include <cstdint>

#include "shared.h"

namespace attnfuse {

template <typename X>
__device__ __forceinline__ X load_global(const X* from) {
    return *from;
}
template <typename X>
__device__ __forceinline__ void store_global(X* to, X x) {
    *to = x;
}
// 16 bytes, on 16 bytes.
__device__ __forceinline__ void store_global_128(void* to, const Words4& x) {
    *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
// *to += x, atomic in the device, in no order (red.global.add.f32)
__device__ __forceinline__ void add_global(float* to, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
// The same of four floats, on 16 bytes, atomic each (sm_90). Older cards' kernels include this file too: an inline
// function that nobody calls makes no instruction.
__device__ __forceinline__ void add_global_128(float* to, const float (&x)[4]) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

}  // namespace attnfuse
