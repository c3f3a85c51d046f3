// The two 16-bit formats and the functions of numbers: csrc/device/numbers.h on the host, bit for bit but for exp2.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "keywords.h"

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

namespace emulation {

// The NaN that a GPU's conversions give.
constexpr uint16_t kNaN16 = 0x7fff;

template <typename T>
inline float widen(uint16_t bits) {
    if constexpr (std::is_same_v<T, bf16>) {
        return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    } else {
        static_assert(std::is_same_v<T, fp16>);
        const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
        // An exponent field read 112 too low, subnormal or not, is made good by an exact product.
        const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
        const uint32_t finite = std::bit_cast<uint32_t>(scaled), special = magnitude << 13 | 0x7f800000u;
        return std::bit_cast<float>((magnitude < 0x7c00u ? finite : special) | sign);
    }
}

// To nearest, ties to even.
template <typename T>
inline uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return kNaN16;
    }
    if constexpr (std::is_same_v<T, bf16>) {
        return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    } else {
        static_assert(std::is_same_v<T, fp16>);
        uint32_t rounded;
        if (magnitude >= std::bit_cast<uint32_t>(65536.0f)) {
            rounded = 0x7c00u;
        } else if (magnitude < std::bit_cast<uint32_t>(0x1p-14f)) {
            // Subnormal: the last bit of a sum with 0.5 weighs 2^-24, as that of the result.
            rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
        } else {
            rounded = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
        }
        return static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000u));
    }
}

}  // namespace emulation

template <typename T>
inline uint32_t pack(float low, float high) {
    return emulation::narrow<T>(low) | static_cast<uint32_t>(emulation::narrow<T>(high)) << 16;
}
template <typename T>
inline Pair unpack(uint32_t packed) {
    const auto low = static_cast<uint16_t>(packed), high = static_cast<uint16_t>(packed >> 16);
    return {emulation::widen<T>(low), emulation::widen<T>(high)};
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < std::numeric_limits<float>::min() ? 0.0f : y;  // subnormal numbers are flushed
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float log2_exact(float x) { return std::log2(x); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float absolute(float x) { return std::fabs(x); }

}  // namespace attnfuse
