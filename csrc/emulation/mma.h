// mma.sync.m16n8k16: csrc/device/mma.h with exact products, added up in float32 in a fixed order.
#pragma once

#include <cstdint>

#include "machine.h"
#include "numbers.h"

namespace attnfuse {
namespace emulation {

// For bf16 and fp16.
template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where);

}  // namespace emulation

template <typename T>
inline void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
    emulation::Where where = emulation::Where::current()) {
    emulation::multiply<T>(d, a, b0, b1, where);
}

}  // namespace attnfuse
