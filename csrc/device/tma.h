// Copies of boxes of a tensor between global and shared memory (sm_90), by one thread and a tensor map.
#pragma once

#include <cstdint>

#include "mbarrier.h"
#include "shared.h"
#include "tensor_map.h"

namespace attnfuse {

// The box at (column, row, head, batch) of the tensor into shared memory, on 1024 bytes; its bytes count for `barrier`.
__device__ __forceinline__ void tma_load(
    SharedAddress to, const TensorMap& map, SharedAddress barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}
// The box in shared memory to the tensor, less what is outside of it. Belongs to this thread's next group.
__device__ __forceinline__ void tma_store(
    SharedAddress from, const TensorMap& map, int column, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(from),
                 "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All groups of this thread have read what they store: shared memory may be written again.
__device__ __forceinline__ void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace attnfuse
