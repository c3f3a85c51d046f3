// Bulk copies between global and shared memory (sm_90), begun by one thread: boxes of a tensor by its tensor map, or
// stretches of bytes.
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
// `bytes` in a row, a multiple of 16, both addresses on 16 bytes; they count for `barrier`.
__device__ __forceinline__ void bulk_load(SharedAddress to, const void* from, int bytes, SharedAddress barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// The box in shared memory to the tensor, less what is outside of it. Belongs to this thread's next group.
__device__ __forceinline__ void tma_store(
    SharedAddress from, const TensorMap& map, int column, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(from),
                 "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
// to[i] += the float i in shared memory, for bytes / 4 of them: atomic each, in no order. bytes is a multiple of 16,
// both addresses are on 16 bytes. Belongs to this thread's next group.
__device__ __forceinline__ void bulk_add(float* to, SharedAddress from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All groups of this thread have read what they store or add: shared memory may be written again.
__device__ __forceinline__ void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace attnfuse
