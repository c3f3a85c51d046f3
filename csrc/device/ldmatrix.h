// ldmatrix (sm_75) and stmatrix (sm_90): four 8x8 matrices of 16-bit numbers between shared memory and the fragments of
// a warp.
#pragma once

#include <cstdint>

#include "shared.h"

namespace attnfuse {

// Lane l's address is row l % 8 (16 bytes, on 16 bytes) of matrix l / 8; lane l gets, of every matrix m, columns
// 2 (l % 4) and + 1 of row l / 4, in fragment[m].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}
// The same of the transposed matrices: rows 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}
// The way back (sm_90): lane l gives, of every matrix m, columns 2 (l % 4) and + 1 of row l / 4 in fragment[m]; what
// lies in shared memory is the transposed matrix, of which lane l's address is row l % 8 (16 bytes, on 16 bytes) of
// matrix l / 8.
__device__ __forceinline__ void stmatrix_x4_trans(SharedAddress row, const uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(fragment[0]),
                 "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

}  // namespace attnfuse
