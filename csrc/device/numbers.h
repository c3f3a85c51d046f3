// The two 16-bit formats, as tags with storage, and the few functions of numbers the kernels need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace attnfuse {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
struct Pair {
    float low, high;
};

// Two numbers rounded to nearest even, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename T>
__device__ __forceinline__ Pair unpack(uint32_t packed);
template <>
__device__ __forceinline__ Pair unpack<bf16>(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
template <>
__device__ __forceinline__ Pair unpack<fp16>(uint32_t packed) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&packed));
    return {both.x, both.y};
}

// 2^x to 2 ulp; 0 for -inf (ex2.approx)
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x to 1 ulp (rcp.approx)
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2 x to 1 ulp
__device__ __forceinline__ float log2_exact(float x) { return log2f(x); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }  // a NaN loses
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }

}  // namespace attnfuse
