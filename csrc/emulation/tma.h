// Bulk copies: csrc/device/tma.h. Loads land at a moment drawn from the seed before their mbarrier's phase completes;
// stores and additions happen as late as they may, when they are waited for.
#pragma once

#include <cstdint>

#include "machine.h"
#include "mbarrier.h"
#include "shared.h"
#include "tensor_map.h"

namespace attnfuse {
namespace emulation {

// A box of a tensor, and a stretch of bytes.
Region region_of(const TensorMap& map, const int (&at)[4], Where where);
Region region_of(const void* begin, int bytes, Where where);
void begin_bulk_copy(SharedAddress to, const Region& region, SharedAddress barrier, Where where);
void begin_bulk_store(SharedAddress from, const Region& region, bool adds, Where where);
void commit_bulk_stores();
void wait_for_bulk_stores();

}  // namespace emulation

inline void tma_load(
    SharedAddress to, const TensorMap& map, SharedAddress barrier, int column, int row, int head, int batch,
    emulation::Where where = emulation::Where::current()) {
    emulation::begin_bulk_copy(to, emulation::region_of(map, {column, row, head, batch}, where), barrier, where);
}
inline void bulk_load(
    SharedAddress to, const void* from, int bytes, SharedAddress barrier,
    emulation::Where where = emulation::Where::current()) {
    emulation::begin_bulk_copy(to, emulation::region_of(from, bytes, where), barrier, where);
}
inline void tma_store(
    SharedAddress from, const TensorMap& map, int column, int row, int head, int batch,
    emulation::Where where = emulation::Where::current()) {
    emulation::begin_bulk_store(from, emulation::region_of(map, {column, row, head, batch}, where), false, where);
}
inline void bulk_add(float* to, SharedAddress from, int bytes, emulation::Where where = emulation::Where::current()) {
    emulation::begin_bulk_store(from, emulation::region_of(to, bytes, where), true, where);
}
inline void tma_commit() { emulation::commit_bulk_stores(); }
inline void tma_wait_read() { emulation::wait_for_bulk_stores(); }

}  // namespace attnfuse
