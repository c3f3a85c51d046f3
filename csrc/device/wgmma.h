// wgmma (sm_90a): a warpgroup's 64 x 16 times 16 x N product of 16-bit numbers, added up in float32, asynchronously.
//
// d is what tile fragments are everywhere: warp w of the four holds rows 16 w .. + 16, x[n][0..1] of row lane / 4 and
// columns 8 n + 2 (lane % 4), + 1, and x[n][2..3] of the row 8 below. As a left operand from registers, a[0..3] are the
// packed pairs of two neighbouring column groups, as in mma.h.
//
// Registers belong to the products from the fence that names them to the wait that names them: in between they are
// neither read nor written. Naming them keeps the compiler from moving an access across; it costs no instruction.
#pragma once

#include <cstdint>
#include <type_traits>

#include "numbers.h"
#include "shared.h"

namespace attnfuse {

// A matrix in shared memory in rows of 128 bytes, the chunks of which stand as tma_load puts them. Eight rows are an
// atom of 1024 bytes. Rows that run along K (wgmma, and the right operand of wgmma_left_transposed): stride is from one
// atom to the next, leading is not used. Rows that run along N (wgmma_transposed) or M (the left operand of
// wgmma_left_transposed): stride is from eight rows to the next eight, leading from 64 columns to the next 64. M is 64,
// so that there leading is not used.
using MatrixDescriptor = uint64_t;
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(SharedAddress start, uint32_t leading, uint32_t stride) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (start >> 4 & 0x3fff);
}

// The same matrix `bytes` further on.
__device__ __forceinline__ MatrixDescriptor further(MatrixDescriptor matrix, uint32_t bytes) {
    // Addresses end below 2^18: nothing is carried into the upper word, which need not be added to.
    return (matrix & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(matrix) + (bytes >> 4));
}

// What these registers hold is computed here, and not after what follows.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
    }
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+r"(x[n][0]), "+r"(x[n][1]), "+r"(x[n][2]), "+r"(x[n][3])::"memory");
    }
}

// These registers hold nothing of use any more, and may hold anything: the first product to them does not add. Else
// what they held would have to live until then. No instruction.
template <int N>
__device__ __forceinline__ void forget(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "=f"(x[n][0]), "=f"(x[n][1]), "=f"(x[n][2]), "=f"(x[n][3]));
    }
}

// What was done to these registers before is done before products issued from here on use them.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the newest `Pending` groups are complete; these registers were theirs.
template <int Pending, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
    (pin(registers), ...);
}

// One instruction for each N. What differs: the list of d's registers, and the numbers of the operands behind them.
#define WGMMA_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_24 \
    WGMMA_LIST_16     \
    ", "              \
    "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_LIST_32 \
    WGMMA_LIST_24     \
    ", "              \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_40 \
    WGMMA_LIST_32     \
    ", "              \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_LIST_48 \
    WGMMA_LIST_40     \
    ", "              \
    "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST_56 \
    WGMMA_LIST_48     \
    ", "              \
    "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_LIST_64 \
    WGMMA_LIST_56     \
    ", "              \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_128                                                                             \
    WGMMA_LIST_64                                                                                  \
    ", "                                                                                           \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WGMMA_D_2(n) WGMMA_D(n), WGMMA_D(n + 1)
#define WGMMA_D_8(n) WGMMA_D_2(n), WGMMA_D_2(n + 2), WGMMA_D_2(n + 4), WGMMA_D_2(n + 6)
#define WGMMA_D_16 WGMMA_D_2(0), WGMMA_D_2(2)
#define WGMMA_D_24 WGMMA_D_16, WGMMA_D_2(4)
#define WGMMA_D_32 WGMMA_D_24, WGMMA_D_2(6)
#define WGMMA_D_40 WGMMA_D_32, WGMMA_D_2(8)
#define WGMMA_D_48 WGMMA_D_40, WGMMA_D_2(10)
#define WGMMA_D_56 WGMMA_D_48, WGMMA_D_2(12)
#define WGMMA_D_64 WGMMA_D_56, WGMMA_D_2(14)
#define WGMMA_D_128 WGMMA_D_64, WGMMA_D_8(16), WGMMA_D_8(24)

#define WGMMA_PRODUCT(N, TYPES, REGISTERS, A, B, ADD, IMMEDIATES, ...)                                         \
    asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
                 "k16.f32." TYPES " {" WGMMA_LIST_##REGISTERS "}, " A ", " B ", sum, 1, 1, " IMMEDIATES ";\n}" \
                 : WGMMA_D_##REGISTERS                                                                         \
                 : __VA_ARGS__, "r"(static_cast<int>(accumulate)))

// wgmma: d (+)= A B^T with rows along K. wgmma_transposed: d (+)= A B, B with rows along N. Of both A is in shared
// memory, rows along K, or in registers, which belong to the product like d. wgmma_left_transposed: d (+)= A^T B^T, A
// with rows along M and B with rows along K. B is always in shared memory.
#define WGMMA_DECLARE(N, REGISTERS, I0, I1, I2, I3, I4, I5)                                                       \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma(                                                                        \
        float (&d)[N / 8][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {                          \
        if constexpr (std::is_same_v<T, bf16>) {                                                                  \
            WGMMA_PRODUCT(N, "bf16.bf16", REGISTERS, I0, I1, I2, "0, 0", "l"(a), "l"(b));                         \
        } else {                                                                                                  \
            WGMMA_PRODUCT(N, "f16.f16", REGISTERS, I0, I1, I2, "0, 0", "l"(a), "l"(b));                           \
        }                                                                                                         \
    }                                                                                                             \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma_transposed(                                                             \
        float (&d)[N / 8][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {                          \
        if constexpr (std::is_same_v<T, bf16>) {                                                                  \
            WGMMA_PRODUCT(N, "bf16.bf16", REGISTERS, I0, I1, I2, "0, 1", "l"(a), "l"(b));                         \
        } else {                                                                                                  \
            WGMMA_PRODUCT(N, "f16.f16", REGISTERS, I0, I1, I2, "0, 1", "l"(a), "l"(b));                           \
        }                                                                                                         \
    }                                                                                                             \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma_left_transposed(                                                        \
        float (&d)[N / 8][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {                          \
        if constexpr (std::is_same_v<T, bf16>) {                                                                  \
            WGMMA_PRODUCT(N, "bf16.bf16", REGISTERS, I0, I1, I2, "1, 0", "l"(a), "l"(b));                         \
        } else {                                                                                                  \
            WGMMA_PRODUCT(N, "f16.f16", REGISTERS, I0, I1, I2, "1, 0", "l"(a), "l"(b));                           \
        }                                                                                                         \
    }                                                                                                             \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma(                                                                        \
        float (&d)[N / 8][4], uint32_t (&a)[4], MatrixDescriptor b, bool accumulate) {                            \
        if constexpr (std::is_same_v<T, bf16>) {                                                                  \
            WGMMA_PRODUCT(                                                                                        \
                N, "bf16.bf16", REGISTERS, "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, "0", "r"(a[0]), "r"(a[1]), \
                "r"(a[2]), "r"(a[3]), "l"(b));                                                                    \
        } else {                                                                                                  \
            WGMMA_PRODUCT(                                                                                        \
                N, "f16.f16", REGISTERS, "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, "0", "r"(a[0]), "r"(a[1]),   \
                "r"(a[2]), "r"(a[3]), "l"(b));                                                                    \
        }                                                                                                         \
    }                                                                                                             \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma_transposed(                                                             \
        float (&d)[N / 8][4], uint32_t (&a)[4], MatrixDescriptor b, bool accumulate) {                            \
        if constexpr (std::is_same_v<T, bf16>) {                                                                  \
            WGMMA_PRODUCT(                                                                                        \
                N, "bf16.bf16", REGISTERS, "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, "1", "r"(a[0]), "r"(a[1]), \
                "r"(a[2]), "r"(a[3]), "l"(b));                                                                    \
        } else {                                                                                                  \
            WGMMA_PRODUCT(                                                                                        \
                N, "f16.f16", REGISTERS, "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, "1", "r"(a[0]), "r"(a[1]),   \
                "r"(a[2]), "r"(a[3]), "l"(b));                                                                    \
        }                                                                                                         \
    }
WGMMA_DECLARE(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA_DECLARE(48, 24, "%24", "%25", "%26", "%27", "%28", "%29")
WGMMA_DECLARE(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_DECLARE(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
WGMMA_DECLARE(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA_DECLARE(112, 56, "%56", "%57", "%58", "%59", "%60", "%61")
WGMMA_DECLARE(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_DECLARE(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#undef WGMMA_DECLARE
#undef WGMMA_PRODUCT
#undef WGMMA_D_128
#undef WGMMA_D_64
#undef WGMMA_D_56
#undef WGMMA_D_48
#undef WGMMA_D_40
#undef WGMMA_D_32
#undef WGMMA_D_24
#undef WGMMA_D_16
#undef WGMMA_D_8
#undef WGMMA_D_2
#undef WGMMA_D
#undef WGMMA_LIST_128
#undef WGMMA_LIST_64
#undef WGMMA_LIST_56
#undef WGMMA_LIST_48
#undef WGMMA_LIST_40
#undef WGMMA_LIST_32
#undef WGMMA_LIST_24
#undef WGMMA_LIST_16

}  // namespace attnfuse
