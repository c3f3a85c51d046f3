// Micro-programs for what sm_90 does asynchronously: each right once against plain loops, under several seeds, then
// each with one thing wrong that must be reported. Reports are compared with the lines they must name, so nothing may
// move a statement to another line.
// clang-format off
#include <cmath>
#include <numeric>

#include "card.h"
#include "global.h"
#include "mbarrier.h"
#include "selftest.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace attnfuse::selftest {
namespace {

std::string line(int number) { return "selftest_asynchronous.cpp:" + std::to_string(number); }

// What is done wrong.
enum Fault {
    kNone,
    // products
    kNoProductFence, kTouchedAfterFence, kReadEarly, kWrittenEarly, kOperandOverwritten, kLaxWait, kNoWait,
    kUnnamedRegisters, kSharedOverwritten, kCopyOverOperand, kNoSwizzle, kOtherProduct, kWarpLeavesOut, kWrongAtoms,
    kWrongStride, kFarStride, kOtherForm,
    // copies and mbarriers
    kNotWaited, kFewerBytes, kMoreBytes, kWrongParity, kSamePhaseTwice, kNoBarrierAfterInit, kNoFenceAfterInit,
    kTooManyArrivals, kTooFewArrivals, kOffAtom, kNoMap, kNoMbarrier, kOverMbarrier, kLeftInFlight, kLateWaiter,
    // proxies and stores
    kNoProxyFence, kFenceByAnother, kStoreNoFence, kStoreNotRead, kStoreOverwritten,
    // stretches
    kOddBytes, kOddShared, kOddFrom, kOddTo, kOutside, kNotCommitted, kLoadOverStore, kAddedAndLoaded, kStoredAndAdded, kStoredAndLoaded,
};

template <typename Params>
void run(void (*kernel)(Params), int threads, int shared_bytes, const Params& params) {
    launch(kernel, 1, threads, shared_bytes, nullptr, params);
}

// Right under every seed.
void under_seeds(const std::function<void()>& action) {
    for (uint64_t seed = 1; seed <= 8; ++seed) {
        emulation::set_seed(seed);
        action();
    }
    emulation::set_seed(1);
}
// Reported under every seed.
void reported(const std::function<void()>& action, const std::vector<std::string>& parts) {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
        emulation::set_seed(seed);
        expect_error(action, parts);
    }
    emulation::set_seed(1);
}

int a_number(int row, int k) { return (row * 7 + k * 3) % 17 - 8; }
int b_number(int k, int column) { return (k * 5 + column * 11) % 13 - 6; }

// A tensor (batch 1, head 1, rows, columns) of small integers, and its map.
template <typename T>
struct Matrix {
    std::vector<uint16_t> numbers;
    TensorMap map;

    Matrix(int rows, int columns, uint32_t box_rows, int (*number)(int, int)) : numbers(rows * columns) {
        for (int i = 0; i < rows * columns; ++i) {
            numbers[i] = static_cast<uint16_t>(pack<T>(static_cast<float>(number(i / columns, i % columns)), 0.0f));
        }
        const uint64_t sizes[4] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), 1, 1};
        const uint64_t strides[3] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1]};
        map = encode_tensor_map(numbers.data(), sizes, strides, box_rows);
    }
};

struct Products {
    TensorMap a, b;
    float* out;
    Fault fault;
};

constexpr int kDepth = 64;

// Which of the five, and how its operands lie: A (64, 64) with rows along K (kPlain, kTransposed), in registers
// (kRegisters, kRegistersTransposed), or with rows along M, its atoms 2048 bytes apart; B of N columns with rows along
// K, or, of the two transposed, along N in boxes of 64 columns.
enum Form { kPlain, kRegisters, kTransposed, kRegistersTransposed, kLeftTransposed };
constexpr bool b_along_n(Form form) { return form == kTransposed || form == kRegistersTransposed; }
constexpr int a_bytes(Form form) { return form == kLeftTransposed ? 8 * 2048 : 8192; }
constexpr int b_boxes(Form form, int columns) { return b_along_n(form) ? (columns + 63) / 64 : 1; }
constexpr int b_bytes(Form form, int columns) { return b_along_n(form) ? b_boxes(form, columns) * 8192 : columns * 128; }

// out (64, N) = A (64, 64) B in four products, two groups of two. One warp of the first warpgroup copies, the second
// warpgroup multiplies.
constexpr int kProductsLine = __LINE__ + 2;
template <typename T, int N, Form kForm>
void kernel_products(Products p) {
    const SharedAddress a = shared_base(), b = a + a_bytes(kForm), full = b + b_bytes(kForm, N);
    if (thread_index() == 0) {
        mbarrier_init(full, 1);
        if (p.fault != kNoFenceAfterInit) { proxy_fence(); }
    }
    if (p.fault != kNoBarrierAfterInit) { barrier(); }
    if (warp_index() < 4) {
        if (thread_index() != 0) { return; }
        const int bytes = 8192 + b_bytes(kForm, N);
        mbarrier_arrive_expecting(full, bytes - (p.fault == kFewerBytes ? 8192 : p.fault == kMoreBytes ? -16 : 0));
        tma_load(p.fault == kOffAtom ? a + 512 : a, p.fault == kNoMap ? TensorMap{} : p.a, p.fault == kNoMbarrier ? full + 8 : full, 0, 0, 0, 0);
        for (int k = 8; k < (kForm == kLeftTransposed ? 64 : 0); k += 8) { tma_load(a + k / 8 * 2048, p.a, full, 0, k, 0, 0); }
        for (int box = 0; box < b_boxes(kForm, N); ++box) {
            tma_load(b + box * 8192, p.b, full, box * 64, 0, 0, 0);
        }
        return;
    }
    if (p.fault != kNotWaited) { mbarrier_wait(full, p.fault == kWrongParity ? 1 : 0); }
    if (p.fault == kWrongParity) { mbarrier_wait(full, 1); }
    if (p.fault == kOverMbarrier) { store_shared_32(full, 0); }
    const int warp = warp_index() % 4, lane = lane_index(), row = 16 * warp + lane / 4, pair = 2 * (lane % 4);
    float d[N / 8][4];
    uint32_t left[4][4];
    for (auto& group : d) { for (float& x : group) { x = 1000.0f; } }
    for (int k = 0; k < 4; ++k) {
        for (int i = 0; i < 4; ++i) {
            const int r = row + i % 2 * 8, column = 16 * k + pair + i / 2 * 8;
            left[k][i] = pack<T>(a_number(r, column), a_number(r, column + 1));
        }
    }
    if (p.fault != kNoProductFence) { wgmma_fence(d, left); }
    if (p.fault == kTouchedAfterFence) { d[0][0] = 1.0f; }
    for (int k = 0; k < 4; ++k) {
        if (p.fault == kWarpLeavesOut && k == 3 && warp == 2) { break; }
        const int other = p.fault == kOtherProduct && warp == 1 ? 3 - k : k;
        const uint64_t plain = p.fault == kNoSwizzle ? uint64_t{1} << 62 : 0;
        const bool accumulate = k != 0;
        if constexpr (kForm == kRegistersTransposed) {
            wgmma_transposed<T>(d, left[k], matrix_descriptor(b + 2048 * other + (p.fault == kWrongAtoms ? 32 : 0), 8192, 1024) ^ plain, accumulate);
        } else if constexpr (kForm == kLeftTransposed) {
            const MatrixDescriptor left_k = matrix_descriptor(a + 4096 * other + (p.fault == kWrongAtoms ? 32 : 0), 0, p.fault == kWrongStride ? 128 : p.fault == kFarStride ? 0x3f000 : 2048);
            if (p.fault == kOtherForm && warp == 1) { wgmma<T>(d, left_k, matrix_descriptor(b + 32 * k, 0, 1024), accumulate); } else { wgmma_left_transposed<T>(d, left_k, matrix_descriptor(b + 32 * k, 0, 1024) ^ plain, accumulate); }
        } else if constexpr (kForm == kTransposed) {
            wgmma_transposed<T>(d, matrix_descriptor(a + 32 * other, 0, 1024), matrix_descriptor(b + 2048 * other + (p.fault == kWrongAtoms ? 32 : 0), 8192, 1024) ^ plain, accumulate);
        } else if constexpr (kForm == kRegisters) {
            wgmma<T>(d, left[k], matrix_descriptor(b + 32 * other, 0, 1024) ^ plain, accumulate);
        } else {
            wgmma<T>(d, matrix_descriptor(a + 32 * other, 0, 1024), matrix_descriptor(b + 32 * other, 0, 1024) ^ plain, accumulate);
        }
        if (k == 1) { wgmma_commit(); }
    }
    wgmma_commit();
    if (p.fault == kReadEarly) { p.out[0] = d[0][0]; return; }
    if (p.fault == kWrittenEarly) { d[0][0] = 1.0f; }
    if (p.fault == kOperandOverwritten) { left[3][1] = 1; }
    if (p.fault == kSharedOverwritten && thread_index() == 200) { store_shared_32((kForm == kLeftTransposed ? a : b) + 64, 0); }
    if (p.fault == kCopyOverOperand && thread_index() == 200) { mbarrier_arrive_expecting(full, 8192); tma_load(b, p.a, full, 0, 0, 0, 0); }
    if (p.fault == kNoWait) { return; }
    if (p.fault == kLaxWait) { wgmma_wait<1>(d); } else if (p.fault == kUnnamedRegisters) { wgmma_wait<0>(left); } else { wgmma_wait<0>(d); }
    if (p.fault == kUnnamedRegisters) { wgmma_fence(d); wgmma<T>(d, matrix_descriptor(a, 0, 1024), matrix_descriptor(b, 0, 1024), false); }
    for (int n = 0; n < N / 8; ++n) {
        for (int c = 0; c < 4; ++c) {
            store_global(p.out + (row + c / 2 * 8) * N + 8 * n + pair + c % 2, d[n][c]);
        }
    }
}

template <typename T, int N, Form kForm>
void multiply(Fault fault, float* out) {
    static Matrix<T> a(64, 64, kForm == kLeftTransposed ? 8 : 64,
                       kForm == kLeftTransposed ? [](int k, int row) { return a_number(row, k); } : a_number);
    static Matrix<T> b(b_along_n(kForm) ? kDepth : N, b_along_n(kForm) ? N : kDepth, b_along_n(kForm) ? kDepth : N,
                       b_along_n(kForm) ? b_number : [](int column, int k) { return b_number(k, column); });
    run(kernel_products<T, N, kForm>, 256, a_bytes(kForm) + b_bytes(kForm, N) + 64, Products{a.map, b.map, out, fault});
}
template <typename T, int N, Form kForm>
std::vector<float> product(Fault fault) {
    std::vector<float> out(64 * N, -1.0f);
    multiply<T, N, kForm>(fault, out.data());
    return out;
}

template <typename T, int N, Form kForm>
void check_product() {
    under_seeds([] {
        const std::vector<float> out = product<T, N, kForm>(kNone);
        for (int row = 0; row < 64; ++row) {
            for (int column = 0; column < N; ++column) {
                int sum = 0;
                for (int k = 0; k < kDepth; ++k) { sum += a_number(row, k) * b_number(k, column); }
                expect(out[row * N + column] == static_cast<float>(sum), "the exact product");
            }
        }
    });
}

void check_product_faults() {
    const auto wrong = [](Fault fault) { return [fault] { product<bf16, 64, kPlain>(fault); }; };
    const auto wrong_registers = [](Fault fault) { return [fault] { product<fp16, 32, kRegisters>(fault); }; };
    const auto wrong_transposed = [](Fault fault) { return [fault] { product<bf16, 128, kTransposed>(fault); }; };
    const auto wrong_registers_transposed = [](Fault fault) { return [fault] { product<bf16, 128, kRegistersTransposed>(fault); }; };
    reported(wrong(kNoProductFence), {"registers that no wgmma_fence has named since they were last touched"});
    reported(wrong_registers(kNoProductFence), {"a product of registers that no wgmma_fence has named"});
    reported(wrong_transposed(kNoProductFence), {"a product to registers that no wgmma_fence has named"});
    reported(wrong_registers_transposed(kNoProductFence), {"a product of registers that no wgmma_fence has named"});
    reported(wrong(kTouchedAfterFence), {"a product to registers that no wgmma_fence has named"});
    reported(wrong(kReadEarly), {"returned with products in flight"});
    reported(wrong(kNoWait), {"returned with products in flight"});
    reported(wrong(kWrittenEarly), {"whose registers were written to meanwhile"});
    reported(wrong_registers(kOperandOverwritten), {"registers that were written to before it was waited for"});
    reported(wrong_registers(kNoSwizzle), {"descriptor is not of the 128-byte swizzle"});
    reported(wrong_registers_transposed(kOperandOverwritten), {"registers that were written to before it was waited for"});
    reported(wrong(kLaxWait), {"names registers of the product issued at", "which it does not wait for"});
    reported(wrong(kUnnamedRegisters), {"issues a product to registers of the product issued at", "no wgmma_wait has named"});
    reported(wrong(kSharedOverwritten), {"thread 200 at " + line(kProductsLine + 56), "writes shared memory at byte",
                                         "issued at " + line(kProductsLine + 48)});
    reported(wrong(kCopyOverOperand), {"thread 200", "begins a copy to shared memory at byte", "issued at"});
    reported(wrong(kNoSwizzle), {"descriptor is not of the 128-byte swizzle"});
    reported(wrong(kOtherProduct), {"issues another product than the other warps of its warpgroup"});
    reported(wrong(kWarpLeavesOut), {"ended after warp 4 had issued 4 products and warp 6 of its warpgroup 3"});
    reported(wrong_transposed(kWrongAtoms), {"right operand has atoms off 1024 bytes"});
    reported(wrong_transposed(kSharedOverwritten), {"thread 200 at " + line(kProductsLine + 56), "writes shared memory at byte", "issued at " + line(kProductsLine + 44)});
    reported(wrong_registers_transposed(kWrongAtoms), {"right operand has atoms off 1024 bytes"});
    const auto wrong_left = [](Fault fault) { return [fault] { product<fp16, 96, kLeftTransposed>(fault); }; };
    reported(wrong_left(kNoProductFence), {"a product to registers that no wgmma_fence has named"});
    reported(wrong_left(kReadEarly), {"returned with products in flight"});
    reported(wrong_left(kWrittenEarly), {"whose registers were written to meanwhile"});
    reported(wrong_left(kWrongAtoms), {"left operand has atoms off 1024 bytes"});
    reported(wrong_left(kWrongStride), {"left operand has atoms off 1024 bytes"});
    reported(wrong_left(kFarStride), {"issues a read of 1024 bytes of shared memory at byte", "outside the block's"});
    reported(wrong_left(kNoSwizzle), {"descriptor is not of the 128-byte swizzle"});
    reported(wrong_left(kOtherProduct), {"issues another product than the other warps of its warpgroup"});
    reported(wrong_left(kOtherForm), {"issues another product than the other warps of its warpgroup"});
    reported(wrong_left(kSharedOverwritten), {"thread 200 at " + line(kProductsLine + 56), "writes shared memory at byte 64",
                                              "issued at " + line(kProductsLine + 42)});
    reported(wrong_left(kNotWaited), {"shared memory at byte"});
    // What is read of registers before a wait is no number.
    for (const auto& multiply : {multiply<bf16, 64, kPlain>, multiply<fp16, 96, kLeftTransposed>}) {
        float early = 0.0f;
        try { multiply(kReadEarly, &early); } catch (const std::runtime_error&) {}
        expect(std::isnan(early), "NaN in registers that wait");
    }
}

void check_copy_faults() {
    const auto wrong = [](Fault fault) { return [fault] { product<bf16, 64, kPlain>(fault); }; };
    reported(wrong(kNotWaited), {"shared memory at byte"});
    reported(wrong(kFewerBytes), {"completes while the copy begun at", "fewer bytes are expected than are copied"});
    reported(wrong(kMoreBytes), {"deadlock in block 0", "wait at mbarrier_wait", "0 of 1 arrivals and 16 bytes short"});
    reported(wrong(kWrongParity), {"for parity 1, but the next phase it has not waited for is 0"});
    reported(wrong(kNoFenceAfterInit), {"gives a copy the mbarrier made at", "called no proxy_fence"});
    reported(wrong(kOffAtom), {"copies a box at byte 512, which is not a multiple of 1024"});
    reported(wrong(kNoMap), {"uses a tensor map that was never made"});
    reported(wrong(kNoMbarrier), {"uses an mbarrier at byte", "where none was made"});
    reported(wrong(kOverMbarrier), {"writes 4 bytes of shared memory at byte 16384, where an mbarrier is"});
    // Who comes before it is made finds none; who comes after, nothing that orders the two.
    reported(wrong(kNoBarrierAfterInit), {"uses ", "mbarrier", "made"});
}

// Boxes: the corner of a tensor (2, 3, 10, 40) at (row 6, column 24) and beyond its ends, read in the swizzled order.

struct Boxes {
    TensorMap in, out;
    uint16_t* seen;
    int at[4];
    Fault fault;
};

void kernel_boxes(Boxes p) {
    const SharedAddress box = shared_base(), full = box + 2048;
    if (thread_index() == 0) { mbarrier_init(full, 1); proxy_fence(); }
    barrier();
    if (thread_index() == 0) {
        mbarrier_arrive_expecting(full, 1024);
        tma_load(box, p.in, full, p.at[0], p.at[1], p.at[2], p.at[3]);
    }
    if (p.fault == kLeftInFlight) { return; }
    mbarrier_wait(full, 0);
    for (int i = thread_index(); i < 512; i += 32) {
        const int row = i / 64, column = i % 64;
        const SharedAddress from = box + row * 128 + ((column / 8 ^ row) * 16) + column % 8 * 2;
        p.seen[i] = load_shared_16(from);
    }
    warp_sync();
    // every number + 1, and back
    for (int i = thread_index(); i < 512; i += 32) {
        const int row = i / 64, column = i % 64;
        const SharedAddress to = box + row * 128 + ((column / 8 ^ row) * 16) + column % 8 * 2;
        store_shared_16(to, static_cast<uint16_t>(p.seen[i] + 1));
    }
    if (p.fault != kStoreNoFence && (p.fault != kFenceByAnother || thread_index() == 0)) { proxy_fence(); }
    warp_sync();
    if (thread_index() == 0) {
        tma_store(box, p.out, p.at[0], p.at[1], p.at[2], p.at[3]);
        tma_commit();
        if (p.fault != kStoreNotRead && p.fault != kStoreOverwritten) { tma_wait_read(); }
        if (p.fault == kStoreOverwritten) { store_shared_16(box + 6, 0); }
    }
}

void boxes(Fault fault, const int (&at)[4]) {
    const int sizes[4] = {40, 10, 3, 2};
    std::vector<uint16_t> in(40 * 10 * 3 * 2), out(in.size(), 9999), seen(512, 1);
    std::iota(in.begin(), in.end(), uint16_t{1});
    const uint64_t wide[4] = {40, 10, 3, 2}, strides[3] = {3 * 80, 80, 10 * 3 * 80};  // (batch, row, head, column)
    run(kernel_boxes, 32, 4096,
        Boxes{encode_tensor_map(in.data(), wide, strides, 8), encode_tensor_map(out.data(), wide, strides, 8), seen.data(),
              {at[0], at[1], at[2], at[3]}, fault});
    std::vector<uint16_t> expected(in.size(), 9999);
    for (int i = 0; i < 512; ++i) {
        const int place[4] = {at[0] + i % 64, at[1] + i / 64, at[2], at[3]};
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) { inside &= place[axis] >= 0 && place[axis] < sizes[axis]; }
        const int index = ((place[3] * 10 + place[1]) * 3 + place[2]) * 40 + place[0];
        expect(seen[i] == (inside ? in[index] : 0), "the tensor's numbers, and zeros beyond its ends");
        if (inside) { expected[index] = in[index] + 1; }
    }
    expect(out == expected, "what is inside to be stored, and nothing else");
}

void check_boxes() {
    for (const auto& at : {std::array{0, 0, 0, 0}, std::array{24, 6, 2, 1}, std::array{-8, -3, 1, 0}, std::array{64, 0, 0, 0}, std::array{0, 0, 3, 0}}) {
        under_seeds([&] { boxes(kNone, {at[0], at[1], at[2], at[3]}); });
    }
    reported([] { boxes(kLeftInFlight, {0, 0, 0, 0}); }, {"block 0 ended with a copy in flight"});
    reported([] { boxes(kStoreNoFence, {0, 0, 0, 0}); }, {"race in block 0", "written by thread", "read by thread 0", "with no proxy_fence"});
    reported([] { boxes(kFenceByAnother, {0, 0, 0, 0}); }, {"race in block 0", "written by thread", "with no proxy_fence"});
    reported([] { boxes(kStoreNotRead, {0, 0, 0, 0}); }, {"thread 0 returned before the store begun at", "a tma_wait_read is missing"});
    reported([] { boxes(kStoreOverwritten, {0, 0, 0, 0}); }, {"writes shared memory at byte 6", "is still to read"});
    const uint64_t sizes[4] = {8, 1, 1, 1}, odd[3] = {24, 16, 16};
    uint16_t number[16] = {};
    expect_error([&] { encode_tensor_map(number, sizes, odd, 8); }, {"no driver would make one of"});
    const uint64_t even[3] = {16, 16, 16};
    emulation::has_context = false;
    expect_error([&] { encode_tensor_map(number, sizes, even, 8); }, {"has made no device current"});
    make_current(0);
    encode_tensor_map(number, sizes, even, 8);
}

// Stretches: every block loads 96 floats, of which the last 32 come by a copy of their own, and adds their doubles to
// out, its first half by one thread and its second by another.

struct Stretches {
    const float* in;
    float* out;
    Fault fault;
};

constexpr int kFloats = 96, kBytes = 4 * kFloats;
constexpr int kStretchesLine = __LINE__ + 1;
void kernel_stretches(Stretches p) {
    const SharedAddress in = shared_base(), doubles = in + 512, full = in + 1024;
    if (thread_index() == 0) { mbarrier_init(full, 1); if (p.fault != kNoFenceAfterInit) { proxy_fence(); } }
    barrier();
    if (p.fault == kStoredAndLoaded && block_index() == 1) { if (thread_index() == 0) { store_global(const_cast<float*>(p.in), 0.0f); } return; }
    if (thread_index() == 0) {
        mbarrier_arrive_expecting(full, kBytes + (p.fault == kFewerBytes ? -16 : p.fault == kMoreBytes ? 32 : 0));
        bulk_load(in + (p.fault == kOddShared ? 8 : p.fault == kOutside ? 4096 : 0), p.in + (p.fault == kOddFrom ? 2 : 0), p.fault == kOddBytes ? 24 : 256, full);
        bulk_load(in + 256, p.in + 64, kBytes - 256, full);
    }
    if (p.fault != kNotWaited) { mbarrier_wait(full, 0); }
    for (int i = thread_index(); i < kFloats; i += 64) {
        float low, high;
        load_shared_pair(low, high, in + 8 * (i / 2));
        store_shared_32(doubles + 4 * i, std::bit_cast<uint32_t>(2.0f * (i % 2 == 0 ? low : high)));
    }
    if (p.fault != kNoProxyFence && (p.fault != kFenceByAnother || thread_index() < 32)) { proxy_fence(); }
    barrier();
    if (p.fault == kStoredAndAdded && thread_index() == 0) { store_global(p.out + 5, 0.0f); }
    if (lane_index() == 0) {
        const int half = warp_index();
        if (p.fault == kOddTo) { bulk_add(p.out + 1, doubles, 16); }
        bulk_add(p.out + half * kFloats / 2, doubles + half * kBytes / 2, kBytes / 2);
        if (p.fault != kNotCommitted) { tma_commit(); }
        if (p.fault == kStoreOverwritten) { store_shared_32(doubles + half * kBytes / 2 + 12, 0); }
        if (p.fault == kLoadOverStore) { mbarrier_arrive_expecting(full, 16); bulk_load(doubles + half * kBytes / 2 + 16, p.in, 16, full); }
        if (p.fault != kStoreNotRead) { tma_wait_read(); }
        // What has been read may be written again; another's half may not.
        store_shared_32(doubles + half * kBytes / 2, 0);
        if (p.fault == kSharedOverwritten) { store_shared_32(doubles + (1 - half) * kBytes / 2, 0); }
        if (p.fault == kAddedAndLoaded) { load_global(p.out + half * kFloats / 2); }
    }
}

void stretches(Fault fault, int blocks = 5) {
    alignas(16) float in[kFloats], out[kFloats];
    for (int i = 0; i < kFloats; ++i) { in[i] = static_cast<float>(i * 7 % 31 - 15); out[i] = static_cast<float>(i); }
    launch(kernel_stretches, blocks, 64, 1024 + 64, nullptr, Stretches{in, out, fault});
    for (int i = 0; i < kFloats; ++i) { expect(out[i] == static_cast<float>(i) + 10.0f * in[i], "the sum over all blocks"); }
}

void check_stretches() {
    under_seeds([] { stretches(kNone); });
    const auto wrong = [](Fault fault) { return [fault] { stretches(fault); }; };
    const auto at = [](int number) { return line(kStretchesLine + number); };
    reported(wrong(kNotWaited), {"shared memory at byte"});
    reported(wrong(kFewerBytes), {"16 more bytes have landed than were expected, the last of a copy begun at"});
    reported(wrong(kMoreBytes), {"deadlock in block ", "wait at mbarrier_wait", "0 of 1 arrivals and 32 bytes short"});
    reported(wrong(kNoFenceAfterInit), {"at " + at(7) + " gives a copy the mbarrier made at " + at(2), "called no proxy_fence"});
    reported(wrong(kOddBytes), {"thread 0 at " + at(7) + " moves 24 bytes, which is not a positive multiple of 16"});
    reported(wrong(kOddShared), {"at " + at(7) + " begins a copy to 256 bytes of shared memory at byte 8, which is not a multiple of 16"});
    reported(wrong(kOddFrom), {"at " + at(7) + " accesses 16 bytes of global memory at an address that is not a multiple of 16"});
    reported(wrong(kOddTo), {"at " + at(21) + " accesses 16 bytes of global memory at an address that is not a multiple of 16"});
    reported(wrong(kOutside), {"begins a copy to 256 bytes of shared memory at byte 4096, outside the block's 1088"});
    reported(wrong(kNoProxyFence), {"race in block ", "written by thread", at(14), "read by thread", at(22), "with no proxy_fence"});
    reported(wrong(kFenceByAnother), {"race in block ", "written by thread", "with no proxy_fence"});
    reported(wrong(kStoreOverwritten), {"at " + at(24) + " writes shared memory at byte", "issued at " + at(22) + " is still to read"});
    reported(wrong(kLoadOverStore), {"at " + at(25) + " begins a copy to shared memory at byte", "issued at " + at(22) + " is still to read"});
    reported(wrong(kStoreNotRead), {"shared memory at byte", "issued at " + at(22) + " is still to read"});
    reported(wrong(kNotCommitted), {"shared memory at byte", "issued at " + at(22) + " is still to read"});
    // Before the other's addition began, while it is to read, or when it has read: said in three ways.
    reported(wrong(kSharedOverwritten), {"shared memory at byte"});
    reported(wrong(kSharedOverwritten), {at(29)});
    // By one thread, and still in no order.
    reported([] { stretches(kAddedAndLoaded, 1); }, {"loads a global address that block 0", "added to at " + at(22), "nothing in the launch orders the two"});
    reported([] { stretches(kStoredAndAdded, 1); }, {"thread 0 at " + at(22) + " adds to a global address that block 0, thread 0 stored to at " + at(18)});
    // Whether another block's copy comes after the store is the seed's to say.
    bool found = false;
    for (uint64_t seed = 0; seed < 20 && !found; ++seed) {
        emulation::set_seed(seed);
        try { stretches(kStoredAndLoaded); } catch (const std::runtime_error& error) {
            found = std::string(error.what()).find("at " + at(7) + " loads a global address that block 1, thread ") != std::string::npos;
        }
    }
    emulation::set_seed(1);
    expect(found, "a store to what another block's copy reads to be reported");
}

// Five arrays in one fence and one wait: three products of ones, two operands in registers.

void kernel_names(Products p) {
    const SharedAddress b = shared_base();
    for (int i = thread_index(); i < 64 * 32; i += 128) { store_shared_32(b + 4 * i, 0x3f803f80); }
    proxy_fence();
    barrier();
    float d[8][4] = {}, e[8][4] = {}, f[8][4] = {};
    uint32_t left[1][4] = {{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}}, right[1][4] = {{0x40004000, 0x40004000, 0x40004000, 0x40004000}};
    wgmma_fence(d, e, f, left, right);
    wgmma_transposed<bf16>(d, left[0], matrix_descriptor(b, 8192, 1024), true);
    wgmma_transposed<bf16>(e, right[0], matrix_descriptor(b, 8192, 1024), true);
    wgmma<bf16>(f, matrix_descriptor(b, 0, 1024), matrix_descriptor(b, 0, 1024), true);
    wgmma_commit();
    if (p.fault == kUnnamedRegisters) { wgmma_wait<0>(d, e, left, right); } else { wgmma_wait<0>(d, e, f, left, right); }
    store_global(p.out + thread_index(), d[7][3] + 100.0f * e[7][3] + 10000.0f * f[7][3]);
}

void check_names() {
    std::vector<float> out(128);
    run(kernel_names, 128, 8192, Products{{}, {}, out.data(), kNone});
    for (float x : out) { expect(x == 16.0f + 3200.0f + 160000.0f, "all three products"); }
    run(kernel_names, 128, 8192, Products{{}, {}, out.data(), kUnnamedRegisters});
    for (float x : out) { expect(std::isnan(x), "NaN where one was not named"); }
}

// Landing: copies to several mbarriers land in any order, late or soon.

struct Landings {
    TensorMap in;
    int* order;
};

void kernel_landings(Landings p) {
    const SharedAddress boxes = shared_base(), full = boxes + 8 * 1024;
    if (thread_index() == 0) {
        for (int i = 0; i < 8; ++i) { mbarrier_init(full + 8 * i, 1); }
        proxy_fence();
    }
    barrier();
    if (thread_index() == 0) {
        for (int i = 0; i < 8; ++i) {
            mbarrier_arrive_expecting(full + 8 * i, 1024);
            tma_load(boxes + 1024 * i, p.in, full + 8 * i, 0, 0, 0, 0);
        }
    }
    if (lane_index() == 0) {
        mbarrier_wait(full + 8 * warp_index(), 0);
        static int landed;
        if (warp_index() == 0 || landed >= 8) { landed = landed >= 8 ? 0 : landed; }
        p.order[warp_index()] = landed++;
    }
}

void check_landings() {
    static Matrix<bf16> in(8, 64, 8, a_number);
    bool in_order = true;
    for (uint64_t seed = 1; seed <= 8; ++seed) {
        emulation::set_seed(seed);
        std::vector<int> order(8, -1);
        run(kernel_landings, 256, 8 * 1024 + 64, Landings{in.map, order.data()});
        for (int i = 1; i < 8; ++i) { in_order &= order[i] > order[i - 1]; }
    }
    emulation::set_seed(1);
    expect(!in_order, "copies to land in another order than they were begun in");
}

// A ring of two stages that one warp fills and another empties: what is written there is the number of the round.

constexpr int kRounds = 7;
void kernel_ring(Buffers p) {
    const SharedAddress stages = shared_base(), full = stages + 256, empty = full + 16;
    const auto fault = static_cast<Fault>(p.choice);
    if (thread_index() == 0) {
        for (int i = 0; i < 2; ++i) { mbarrier_init(full + 8 * i, 32); mbarrier_init(empty + 8 * i, fault == kTooFewArrivals ? 33 : 32); }
        proxy_fence();
    }
    barrier();
    for (int round = 0; round < kRounds; ++round) {
        const int stage = round % 2, phase = round / 2 % 2, lane = lane_index();
        if (warp_index() == 0) {
            if (fault != kNotWaited) { mbarrier_wait(empty + 8 * stage, 1 - phase); }
            store_shared_32(stages + 128 * stage + 4 * lane, static_cast<uint32_t>(round));
            mbarrier_arrive(full + 8 * stage);
            if (fault == kTooManyArrivals && lane == 3) { mbarrier_arrive(full + 8 * stage); }
        } else {
            if (fault != kSharedOverwritten) { mbarrier_wait(full + 8 * stage, fault == kSamePhaseTwice ? 0 : phase); }
            const SharedAddress other = stages + 128 * stage + 4 * (31 - lane);
            const uint32_t got = load_shared_16(other);
            if (p.out != nullptr) { store_global(static_cast<uint32_t*>(p.out) + 32 * round + lane, got); }
            mbarrier_arrive(empty + 8 * stage);
        }
    }
}

void ring(Fault fault) {
    std::vector<uint32_t> out(32 * kRounds, 99);
    start(kernel_ring, 1, 64, 512, {nullptr, out.data(), fault});
    for (int i = 0; i < 32 * kRounds; ++i) { expect(out[i] == static_cast<uint32_t>(i / 32), "the round's number"); }
}

// One thread arrives twice while another has not yet looked at the first phase.
void kernel_late(Buffers) {
    const SharedAddress done = shared_base();
    if (thread_index() == 0) { mbarrier_init(done, 1); proxy_fence(); }
    barrier();
    if (thread_index() == 0) {
        mbarrier_arrive(done);
        mbarrier_arrive(done);
        named_barrier_arrive(1, 64);
    } else if (warp_index() == 0) {
        named_barrier_arrive(1, 64);
    } else {
        named_barrier_sync(1, 64);
        mbarrier_wait(done, 0);
    }
}

void check_rings() {
    under_seeds([] { ring(kNone); });
    reported([] { ring(kNotWaited); }, {"race in block 0 on shared memory", "with no barrier"});
    reported([] { ring(kSharedOverwritten); }, {"race in block 0 on shared memory", "with no barrier"});
    reported([] { ring(kSamePhaseTwice); }, {"for parity 0, but the next phase it has not waited for is 1"});
    reported([] { ring(kTooFewArrivals); }, {"deadlock in block 0", "1 of 33 arrivals and 0 bytes short"});
    // A thread's second arrival counts for one that has yet to come, which is then too many, or comes to nobody's eyes.
    bool found = false;
    for (uint64_t seed = 0; seed < 10; ++seed) {
        emulation::set_seed(seed);
        try { ring(kTooManyArrivals); } catch (const std::runtime_error&) { found = true; }
    }
    emulation::set_seed(1);
    expect(found, "an arrival too many to be reported");
    reported([] { start(kernel_late, 1, 64, 64); }, {"waits at the mbarrier at byte 0", "for phase 0 when it is already in phase 2"});
}

// Named barriers order the warps that meet in them, and no others.

void kernel_named(Buffers p) {
    const int warp = warp_index();
    if (warp == 0) {
        store_shared_32(shared_base() + 4 * lane_index(), 1);
        if (p.choice == 4) { named_barrier_arrive(3, 64); }
        if (p.choice != 1) { named_barrier_arrive(p.choice == 2 ? 16 : 3, 64); }
    } else if (warp == 1) {
        if (p.choice != 1) { named_barrier_sync(3, p.choice == 3 ? 96 : 64); }
        load_shared_16(shared_base() + 4 * (31 - lane_index()));
    } else if (p.choice == 5) {
        load_shared_16(shared_base() + 4 * lane_index());
    }
}

void check_named_barriers() {
    const auto choice = [](int number) { return [number] { start(kernel_named, 1, 96, 256, {nullptr, nullptr, number}); }; };
    under_seeds(choice(0));
    reported(choice(1), {"race in block 0", "with no barrier between them"});
    reported(choice(2), {"arrives at named barrier 16, of which there are 1 to 15"});
    reported(choice(3), {"named barrier 3 for", "where others have come for"});
    reported(choice(4), {"arrives at named barrier 3 a second time before it has opened"});
    reported(choice(5), {"race in block 0", "with no barrier between them"});
}

// Registers: 384 threads enter with 168.

void kernel_registers(Buffers p) {
    const bool first = warp_index() < 4;
    switch (p.choice) {
        case 0: first ? give_registers<24>() : take_registers<240>(); break;
        case 1: first ? give_registers<40>() : take_registers<240>(); break;
        case 2: first ? give_registers<176>() : take_registers<240>(); break;
        case 3: first ? give_registers<20>() : take_registers<240>(); break;
        case 4: first ? give_registers<24>() : take_registers<160>(); break;
        case 5: lane_index() < 16 ? give_registers<24>() : give_registers<32>(); break;
        default: break;
    }
}

void check_registers() {
    const auto choice = [](int number) { return [number] { start(kernel_registers, 1, 384, 0, {nullptr, nullptr, number}); }; };
    under_seeds(choice(0));
    reported(choice(1), {"deadlock in block 0", "wait at take_registers"});
    reported(choice(2), {"gives registers to have 176, but it has 168"});
    reported(choice(3), {"gives registers to have 20, which must be 24 to 256 and a multiple of 8"});
    reported(choice(4), {"takes registers to have 160, but it has 168"});
    reported(choice(5), {"of its warp to have 24"});
}

// What threads write for a product to read needs a proxy_fence of the thread that wrote, before the barrier.

void kernel_proxy(Products p) {
    const SharedAddress a = shared_base(), b = a + 8192;
    for (int i = thread_index(); i < 2 * 64 * 32; i += 128) { store_shared_32(a + 4 * i, 0x3f803f80); }
    if (p.fault == kNone || (p.fault == kFenceByAnother && thread_index() < 32)) { proxy_fence(); }
    barrier();
    float d[8][4] = {};
    wgmma_fence(d);
    for (int k = 0; k < 4; ++k) {
        wgmma<bf16>(d, matrix_descriptor(a + 32 * k, 0, 1024), matrix_descriptor(b + 32 * k, 0, 1024), true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    store_global(p.out + thread_index(), d[0][0]);
}

void check_proxies() {
    std::vector<float> out(128);
    const auto with = [&](Fault fault) { return [&, fault] { run(kernel_proxy, 128, 16384, Products{{}, {}, out.data(), fault}); }; };
    under_seeds(with(kNone));
    for (float x : out) { expect(x == 64.0f, "sums of ones"); }
    reported(with(kNoProxyFence), {"race in block 0", "written by thread", "with no proxy_fence between them"});
    reported(with(kFenceByAnother), {"race in block 0", "written by thread", "with no proxy_fence between them"});
}

void check_wgmma_and_tma(void (*check)()) {
    emulation::set_architecture(90);
    check();
    emulation::set_architecture(80);
}

template <void (*Check)()>
void on_hopper() { check_wgmma_and_tma(Check); }

}  // namespace

std::vector<Check> asynchronous_checks() {
    return {
        {"wgmma bf16, 32 columns", on_hopper<check_product<bf16, 32, kPlain>>},
        {"wgmma fp16, 48 columns", on_hopper<check_product<fp16, 48, kPlain>>},
        {"wgmma bf16, 64 columns", on_hopper<check_product<bf16, 64, kPlain>>},
        {"wgmma fp16, 64 columns", on_hopper<check_product<fp16, 64, kPlain>>},
        {"wgmma fp16, 80 columns", on_hopper<check_product<fp16, 80, kPlain>>},
        {"wgmma bf16, 96 columns", on_hopper<check_product<bf16, 96, kPlain>>},
        {"wgmma fp16, 112 columns", on_hopper<check_product<fp16, 112, kPlain>>},
        {"wgmma bf16, 128 columns", on_hopper<check_product<bf16, 128, kPlain>>},
        {"wgmma fp16, 256 columns", on_hopper<check_product<fp16, 256, kPlain>>},
        {"wgmma of registers bf16, 32 columns", on_hopper<check_product<bf16, 32, kRegisters>>},
        {"wgmma of registers fp16, 64 columns", on_hopper<check_product<fp16, 64, kRegisters>>},
        {"wgmma of registers fp16, 80 columns", on_hopper<check_product<fp16, 80, kRegisters>>},
        {"wgmma of registers bf16, 128 columns", on_hopper<check_product<bf16, 128, kRegisters>>},
        {"wgmma transposed bf16, 64 columns", on_hopper<check_product<bf16, 64, kTransposed>>},
        {"wgmma transposed fp16, 80 columns", on_hopper<check_product<fp16, 80, kTransposed>>},
        {"wgmma transposed bf16, 128 columns", on_hopper<check_product<bf16, 128, kTransposed>>},
        {"wgmma transposed fp16, 256 columns", on_hopper<check_product<fp16, 256, kTransposed>>},
        {"wgmma transposed of registers fp16, 48 columns", on_hopper<check_product<fp16, 48, kRegistersTransposed>>},
        {"wgmma transposed of registers bf16, 64 columns", on_hopper<check_product<bf16, 64, kRegistersTransposed>>},
        {"wgmma transposed of registers fp16, 64 columns", on_hopper<check_product<fp16, 64, kRegistersTransposed>>},
        {"wgmma transposed of registers fp16, 80 columns", on_hopper<check_product<fp16, 80, kRegistersTransposed>>},
        {"wgmma transposed of registers bf16, 96 columns", on_hopper<check_product<bf16, 96, kRegistersTransposed>>},
        {"wgmma transposed of registers fp16, 112 columns", on_hopper<check_product<fp16, 112, kRegistersTransposed>>},
        {"wgmma transposed of registers bf16, 128 columns", on_hopper<check_product<bf16, 128, kRegistersTransposed>>},
        {"wgmma transposed of registers fp16, 256 columns", on_hopper<check_product<fp16, 256, kRegistersTransposed>>},
        {"wgmma left transposed fp16, 48 columns", on_hopper<check_product<fp16, 48, kLeftTransposed>>},
        {"wgmma left transposed bf16, 64 columns", on_hopper<check_product<bf16, 64, kLeftTransposed>>},
        {"wgmma left transposed fp16, 64 columns", on_hopper<check_product<fp16, 64, kLeftTransposed>>},
        {"wgmma left transposed fp16, 80 columns", on_hopper<check_product<fp16, 80, kLeftTransposed>>},
        {"wgmma left transposed bf16, 96 columns", on_hopper<check_product<bf16, 96, kLeftTransposed>>},
        {"wgmma left transposed fp16, 112 columns", on_hopper<check_product<fp16, 112, kLeftTransposed>>},
        {"wgmma left transposed bf16, 128 columns", on_hopper<check_product<bf16, 128, kLeftTransposed>>},
        {"wgmma left transposed fp16, 256 columns", on_hopper<check_product<fp16, 256, kLeftTransposed>>},
        {"faults with wgmma", on_hopper<check_product_faults>},
        {"faults with copies and mbarriers", on_hopper<check_copy_faults>},
        {"boxes, stores and their faults", on_hopper<check_boxes>},
        {"stretches, additions and their faults", on_hopper<check_stretches>},
        {"more registers than three named", on_hopper<check_names>},
        {"landings in any order", on_hopper<check_landings>},
        {"rings and their faults", on_hopper<check_rings>},
        {"named barriers", on_hopper<check_named_barriers>},
        {"registers", on_hopper<check_registers>},
        {"proxies", on_hopper<check_proxies>},
    };
}

}  // namespace attnfuse::selftest
