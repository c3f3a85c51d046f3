// Named barriers, registers of a warpgroup and the proxy fence: csrc/device/warpgroup.h, checked.
#pragma once

#include "machine.h"
#include "thread.h"

namespace attnfuse {
namespace emulation {

void sync_named_barrier(int barrier, int threads, Where where);
void arrive_named_barrier(int barrier, int threads, Where where);
void set_registers(int count, bool gives, Where where);
void fence_proxy();

}  // namespace emulation

inline void named_barrier_sync(int barrier, int threads, emulation::Where where = emulation::Where::current()) {
    emulation::sync_named_barrier(barrier, threads, where);
}
inline void named_barrier_arrive(int barrier, int threads, emulation::Where where = emulation::Where::current()) {
    emulation::arrive_named_barrier(barrier, threads, where);
}
template <int Count>
inline void give_registers(emulation::Where where = emulation::Where::current()) {
    emulation::set_registers(Count, true, where);
}
template <int Count>
inline void take_registers(emulation::Where where = emulation::Where::current()) {
    emulation::set_registers(Count, false, where);
}
inline void proxy_fence() { emulation::fence_proxy(); }

}  // namespace attnfuse
