// mbarriers: csrc/device/mbarrier.h with every count checked. A thread waits for the phases in their order: a parity
// that would skip one, or a wait that comes a whole phase too late, is reported where a GPU would go on or hang.
#pragma once

#include <cstdint>

#include "machine.h"
#include "shared.h"

namespace attnfuse {
namespace emulation {

void init_mbarrier(SharedAddress barrier, int arrivals, Where where);
void arrive_mbarrier(SharedAddress barrier, int64_t bytes, Where where);
void wait_mbarrier(SharedAddress barrier, int parity, Where where);
// The block's mbarrier at this address, which must be there and known to the thread that runs.
Mbarrier& find_mbarrier(SharedAddress address, Where where);
// Of a copy begun at `where`.
void bytes_landed(Block& block, Mbarrier& barrier, uint32_t bytes, Where where);

}  // namespace emulation

inline void mbarrier_init(SharedAddress barrier, int arrivals, emulation::Where where = emulation::Where::current()) {
    emulation::init_mbarrier(barrier, arrivals, where);
}
inline void mbarrier_arrive(SharedAddress barrier, emulation::Where where = emulation::Where::current()) {
    emulation::arrive_mbarrier(barrier, 0, where);
}
inline void mbarrier_arrive_expecting(
    SharedAddress barrier, int bytes, emulation::Where where = emulation::Where::current()) {
    emulation::arrive_mbarrier(barrier, bytes, where);
}
inline void mbarrier_wait(SharedAddress barrier, int parity, emulation::Where where = emulation::Where::current()) {
    emulation::wait_mbarrier(barrier, parity, where);
}

}  // namespace attnfuse
