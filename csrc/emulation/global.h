// Global memory: csrc/device/global.h by real pointers, with a record of who wrote what.
#pragma once

#include <cstdint>

#include "machine.h"
#include "shared.h"

namespace attnfuse {
namespace emulation {

// bytes is a power of two.
inline void check_aligned(const void* address, std::size_t bytes, Where where) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail(
            who(*current) + " at " + place(where) + " accesses " + std::to_string(bytes) +
            " bytes of global memory at an address that is not a multiple of " + std::to_string(bytes));
    }
}

}  // namespace emulation

template <typename X>
inline X load_global(const X* from, emulation::Where where = emulation::Where::current()) {
    emulation::check_aligned(from, sizeof(X), where);
    emulation::global_writes.load(*emulation::current, from, sizeof(X), where);
    return *from;
}
template <typename X>
inline void store_global(X* to, X x, emulation::Where where = emulation::Where::current()) {
    emulation::check_aligned(to, sizeof(X), where);
    emulation::global_writes.store(*emulation::current, to, sizeof(X), where);
    *to = x;
}
inline void store_global_128(void* to, const Words4& x, emulation::Where where = emulation::Where::current()) {
    store_global(static_cast<Words4*>(to), x, where);
}
inline void add_global(float* to, float x, emulation::Where where = emulation::Where::current()) {
    emulation::maybe_yield();
    emulation::check_aligned(to, sizeof(float), where);
    emulation::global_writes.add(*emulation::current, to, where);
    *to += x;
}
inline void add_global_128(float* to, const float (&x)[4], emulation::Where where = emulation::Where::current()) {
    emulation::maybe_yield();
    emulation::check_aligned(to, sizeof x, where);
    for (int i = 0; i < 4; ++i) {
        emulation::global_writes.add(*emulation::current, to + i, where);
        to[i] += x[i];
    }
}

}  // namespace attnfuse
