// wgmma: csrc/device/wgmma.h, executed as late as the hardware may, when its group is waited for.
//
// Operands in shared memory must be there when the product is issued, and nobody may write to them until it is waited
// for. Registers hold NaN from then on until a wait names them; a product takes only registers that a fence has named
// since they were last touched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "numbers.h"
#include "shared.h"

namespace attnfuse {
namespace emulation {

struct Registers {
    void* begin;
    std::size_t bytes;
};

void fence_products(const Registers* registers, int count, Where where);
void commit_products(Where where);
void wait_for_products(int pending, const Registers* registers, int count, Where where);
// A is in its four registers, or where its descriptor says.
struct ProductOperands {
    float* d;
    int columns;
    ProductForm form;
    const uint32_t* a_registers;
    uint64_t a, b;
    bool accumulate;
    bool is_bf16;
};
void issue_product(const ProductOperands& operands, Where where);

// Whether csrc/device/wgmma.h has products of so many columns.
constexpr bool is_width(int columns) {
    for (const int width : {32, 48, 64, 80, 96, 112, 128, 256}) {
        if (columns == width) {
            return true;
        }
    }
    return false;
}

// Registers that were left out: on a GPU any number is named, here up to six, since `where` can stand behind defaulted
// parameters but not behind a pack.
struct None {};
inline None none;
template <typename X>
inline Registers registers_of(X& x) {
    return {&x, sizeof x};
}
template <typename... X>
constexpr int kNamed = (0 + ... + static_cast<int>(!std::is_same_v<X, None>));

}  // namespace emulation

using MatrixDescriptor = uint64_t;
inline MatrixDescriptor matrix_descriptor(SharedAddress start, uint32_t leading, uint32_t stride) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (start >> 4 & 0x3fff);
}

inline MatrixDescriptor further(MatrixDescriptor matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Only a matter of the compiler's on a GPU.
template <typename X, int N>
inline void pin(X (&)[N][4]) {}

template <int N>
inline void forget(float (&x)[N][4]) {
    std::fill(&x[0][0], &x[0][0] + 4 * N, std::numeric_limits<float>::quiet_NaN());
}

template <
    typename X0 = emulation::None, typename X1 = emulation::None, typename X2 = emulation::None,
    typename X3 = emulation::None, typename X4 = emulation::None, typename X5 = emulation::None>
inline void wgmma_fence(
    X0& x0 = emulation::none, X1& x1 = emulation::none, X2& x2 = emulation::none, X3& x3 = emulation::none,
    X4& x4 = emulation::none, X5& x5 = emulation::none, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x0), emulation::registers_of(x1),
                                          emulation::registers_of(x2), emulation::registers_of(x3),
                                          emulation::registers_of(x4), emulation::registers_of(x5)};
    emulation::fence_products(named, emulation::kNamed<X0, X1, X2, X3, X4, X5>, where);
}
inline void wgmma_commit(emulation::Where where = emulation::Where::current()) { emulation::commit_products(where); }
template <
    int Pending, typename X0 = emulation::None, typename X1 = emulation::None, typename X2 = emulation::None,
    typename X3 = emulation::None, typename X4 = emulation::None, typename X5 = emulation::None>
inline void wgmma_wait(
    X0& x0 = emulation::none, X1& x1 = emulation::none, X2& x2 = emulation::none, X3& x3 = emulation::none,
    X4& x4 = emulation::none, X5& x5 = emulation::none, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x0), emulation::registers_of(x1),
                                          emulation::registers_of(x2), emulation::registers_of(x3),
                                          emulation::registers_of(x4), emulation::registers_of(x5)};
    emulation::wait_for_products(Pending, named, emulation::kNamed<X0, X1, X2, X3, X4, X5>, where);
}

template <typename T, int N>
inline void wgmma(
    float (&d)[N][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    static_assert(emulation::is_width(8 * N));
    emulation::issue_product({&d[0][0], 8 * N, {}, nullptr, a, b, accumulate, std::is_same_v<T, bf16>}, where);
}
template <typename T, int N>
inline void wgmma(
    float (&d)[N][4], uint32_t (&a)[4], MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    static_assert(emulation::is_width(8 * N));
    emulation::issue_product(
        {&d[0][0], 8 * N, {.a_in_registers = true}, a, 0, b, accumulate, std::is_same_v<T, bf16>}, where);
}
template <typename T, int N>
inline void wgmma_transposed(
    float (&d)[N][4], uint32_t (&a)[4], MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    static_assert(emulation::is_width(8 * N));
    emulation::issue_product(
        {&d[0][0], 8 * N, {.a_in_registers = true, .b_along_n = true}, a, 0, b, accumulate, std::is_same_v<T, bf16>},
        where);
}
template <typename T, int N>
inline void wgmma_transposed(
    float (&d)[N][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    static_assert(emulation::is_width(8 * N));
    emulation::issue_product(
        {&d[0][0], 8 * N, {.b_along_n = true}, nullptr, a, b, accumulate, std::is_same_v<T, bf16>}, where);
}
template <typename T, int N>
inline void wgmma_left_transposed(
    float (&d)[N][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    static_assert(emulation::is_width(8 * N));
    emulation::issue_product(
        {&d[0][0], 8 * N, {.a_along_m = true}, nullptr, a, b, accumulate, std::is_same_v<T, bf16>}, where);
}

}  // namespace attnfuse
