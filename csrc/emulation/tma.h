// Copies of boxes: csrc/device/tma.h, landing at a moment drawn from the seed before their mbarrier's phase completes.
#pragma once

#include <cstdint>

#include "machine.h"
#include "mbarrier.h"
#include "shared.h"
#include "tensor_map.h"

namespace attnfuse {
namespace emulation {

void begin_tensor_copy(SharedAddress to, const TensorMap& map, SharedAddress barrier, const int (&at)[4], Where where);
void begin_tensor_store(SharedAddress from, const TensorMap& map, const int (&at)[4], Where where);
void commit_tensor_stores();
void wait_for_tensor_stores();

}  // namespace emulation

inline void tma_load(
    SharedAddress to, const TensorMap& map, SharedAddress barrier, int column, int row, int head, int batch,
    emulation::Where where = emulation::Where::current()) {
    emulation::begin_tensor_copy(to, map, barrier, {column, row, head, batch}, where);
}
inline void tma_store(
    SharedAddress from, const TensorMap& map, int column, int row, int head, int batch,
    emulation::Where where = emulation::Where::current()) {
    emulation::begin_tensor_store(from, map, {column, row, head, batch}, where);
}
inline void tma_commit() { emulation::commit_tensor_stores(); }
inline void tma_wait_read() { emulation::wait_for_tensor_stores(); }

}  // namespace attnfuse
