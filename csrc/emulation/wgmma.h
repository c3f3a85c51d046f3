// wgmma: csrc/device/wgmma.h, executed as late as the hardware may, when its group is waited for.
//
// Operands in shared memory must be there when the product is issued, and nobody may write to them until it is waited
// for. Registers hold NaN from then on until a wait names them; a product takes only registers that a fence has named
// since they were last touched.
#pragma once

#include <cstdint>
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
template <typename X>
inline Registers registers_of(X& x) {
    return {&x, sizeof x};
}

void fence_products(const Registers* registers, int count, Where where);
void commit_products(Where where);
void wait_for_products(int pending, const Registers* registers, int count, Where where);
// a is a descriptor, or null beside the four registers of A.
struct ProductOperands {
    float* d;
    int columns;
    const uint32_t* a_registers;
    uint64_t a, b;
    bool accumulate;
    bool is_bf16;
};
void issue_product(const ProductOperands& operands, Where where);

}  // namespace emulation

using MatrixDescriptor = uint64_t;
inline MatrixDescriptor matrix_descriptor(SharedAddress start, uint32_t leading, uint32_t stride) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (start >> 4 & 0x3fff);
}

inline MatrixDescriptor further(MatrixDescriptor matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Only a matter of the compiler's on a GPU.
template <int N>
inline void pin(float (&)[N][4]) {}

template <typename X>
inline void wgmma_fence(X& x, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x)};
    emulation::fence_products(named, 1, where);
}
template <typename X, typename Y>
inline void wgmma_fence(X& x, Y& y, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x), emulation::registers_of(y)};
    emulation::fence_products(named, 2, where);
}
template <typename X, typename Y, typename Z>
inline void wgmma_fence(X& x, Y& y, Z& z, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {
        emulation::registers_of(x), emulation::registers_of(y), emulation::registers_of(z)};
    emulation::fence_products(named, 3, where);
}
inline void wgmma_commit(emulation::Where where = emulation::Where::current()) { emulation::commit_products(where); }
template <int Pending, typename X>
inline void wgmma_wait(X& x, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x)};
    emulation::wait_for_products(Pending, named, 1, where);
}
template <int Pending, typename X, typename Y>
inline void wgmma_wait(X& x, Y& y, emulation::Where where = emulation::Where::current()) {
    const emulation::Registers named[] = {emulation::registers_of(x), emulation::registers_of(y)};
    emulation::wait_for_products(Pending, named, 2, where);
}

template <typename T, int N>
inline void wgmma(
    float (&d)[N][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    emulation::issue_product({&d[0][0], 8 * N, nullptr, a, b, accumulate, std::is_same_v<T, bf16>}, where);
}
template <typename T, int N>
inline void wgmma_transposed(
    float (&d)[N][4], uint32_t (&a)[4], MatrixDescriptor b, bool accumulate,
    emulation::Where where = emulation::Where::current()) {
    emulation::issue_product({&d[0][0], 8 * N, a, 0, b, accumulate, std::is_same_v<T, bf16>}, where);
}

}  // namespace attnfuse
