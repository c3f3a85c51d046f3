// Shared memory by its 32-bit addresses: csrc/device/shared.h, every access checked.
#pragma once

#include <cstdint>
#include <cstring>

#include "machine.h"

namespace attnfuse {

using SharedAddress = uint32_t;

struct alignas(16) Words4 {
    uint32_t word[4];
};

namespace emulation {

struct Floats {
    float low, high;
};

template <typename X>
inline X load_shared(SharedAddress from, Where where) {
    X x;
    std::memcpy(&x, current->block->shared.read(*current, from, sizeof x, where), sizeof x);
    return x;
}
template <typename X>
inline void store_shared(SharedAddress to, X x, Where where) {
    maybe_yield();
    std::memcpy(current->block->shared.write(*current, to, sizeof x, where), &x, sizeof x);
}

}  // namespace emulation

inline SharedAddress shared_base() { return emulation::kSharedBase; }

inline void store_shared_16(SharedAddress to, uint16_t x, emulation::Where where = emulation::Where::current()) {
    emulation::store_shared(to, x, where);
}
inline void store_shared_32(SharedAddress to, uint32_t x, emulation::Where where = emulation::Where::current()) {
    emulation::store_shared(to, x, where);
}
inline void store_shared_128(SharedAddress to, const Words4& x, emulation::Where where = emulation::Where::current()) {
    emulation::store_shared(to, x, where);
}
inline uint16_t load_shared_16(SharedAddress from, emulation::Where where = emulation::Where::current()) {
    return emulation::load_shared<uint16_t>(from, where);
}
inline uint32_t load_shared_32(SharedAddress from, emulation::Where where = emulation::Where::current()) {
    return emulation::load_shared<uint32_t>(from, where);
}
inline void store_shared_pair(
    SharedAddress to, float low, float high, emulation::Where where = emulation::Where::current()) {
    emulation::store_shared(to, emulation::Floats{low, high}, where);
}
inline void load_shared_pair(
    float& low, float& high, SharedAddress from, emulation::Where where = emulation::Where::current()) {
    const emulation::Floats floats = emulation::load_shared<emulation::Floats>(from, where);
    low = floats.low;
    high = floats.high;
}
inline Words4 load_shared_128(SharedAddress from, emulation::Where where = emulation::Where::current()) {
    return emulation::load_shared<Words4>(from, where);
}

}  // namespace attnfuse
