// Where a thread stands, and how it meets others: csrc/device/thread.h on the emulated machine.
#pragma once

#include <bit>
#include <cstdint>

#include "machine.h"

namespace attnfuse {
namespace emulation {

void warp_sync(Where where);
uint32_t from_lane(uint32_t x, int lane, Where where);
uint32_t ballot(bool vote, Where where);

}  // namespace emulation

inline int thread_index() { return emulation::current->index; }
inline int warp_index() { return emulation::current->index / 32; }
inline int lane_index() { return emulation::current->lane; }
inline int block_index() { return emulation::current->block->index; }
inline int block_count() { return emulation::launched_blocks; }

inline void barrier(emulation::Where where = emulation::Where::current()) { emulation::barrier(where); }
inline void warp_sync(emulation::Where where = emulation::Where::current()) { emulation::warp_sync(where); }
inline float shuffle_xor(float x, int lane_mask, emulation::Where where = emulation::Where::current()) {
    const int lane = emulation::current->lane ^ lane_mask;
    return std::bit_cast<float>(emulation::from_lane(std::bit_cast<uint32_t>(x), lane, where));
}
inline uint32_t ballot(bool vote, emulation::Where where = emulation::Where::current()) {
    return emulation::ballot(vote, where);
}

// Only matters of registers on a GPU.
inline int uniform(int x) { return x; }
inline int recomputed(int x) { return x; }

}  // namespace attnfuse
