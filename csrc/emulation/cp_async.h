// Asynchronous copies: csrc/device/cp_async.h, landing at the latest moment allowed, when their group is waited for.
#pragma once

#include <cstdint>

#include "machine.h"
#include "shared.h"

namespace attnfuse {
namespace emulation {

void begin_copy(SharedAddress to, const void* from, uint32_t bytes, bool valid, Where where);
void commit_copies();
void wait_for_copies(std::size_t pending);

}  // namespace emulation

inline void cp_async_16(
    SharedAddress to, const void* from, bool valid, emulation::Where where = emulation::Where::current()) {
    emulation::begin_copy(to, from, 16, valid, where);
}
inline void cp_async_4(SharedAddress to, const void* from, emulation::Where where = emulation::Where::current()) {
    emulation::begin_copy(to, from, 4, true, where);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int Pending>
inline void cp_async_wait() {
    emulation::wait_for_copies(Pending);
}

}  // namespace attnfuse
