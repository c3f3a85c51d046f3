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
    // copies and mbarriers
    kNotWaited, kFewerBytes, kMoreBytes, kWrongParity, kSamePhaseTwice, kNoBarrierAfterInit, kNoFenceAfterInit,
    kTooManyArrivals, kTooFewArrivals, kOffAtom, kNoMap, kNoMbarrier, kOverMbarrier, kLeftInFlight, kLateWaiter,
    // proxies and stores
    kNoProxyFence, kFenceByAnother, kStoreNoFence, kStoreNotRead, kStoreOverwritten,
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

// out (64, N) = A (64, 64) B in four products, two groups of two. A comes from shared memory, or with Transposed from
// registers and B with rows along N. One warp of the first warpgroup copies, the second warpgroup multiplies.
constexpr int kProductsLine = __LINE__ + 2;
template <typename T, int N, bool Transposed>
void kernel_products(Products p) {
    const SharedAddress a = shared_base(), b = a + 8192, full = b + std::max(N, 64) * 128;
    if (thread_index() == 0) {
        mbarrier_init(full, 1);
        if (p.fault != kNoFenceAfterInit) { proxy_fence(); }
    }
    if (p.fault != kNoBarrierAfterInit) { barrier(); }
    if (warp_index() < 4) {
        if (thread_index() != 0) { return; }
        const int bytes = 8192 + std::max(N, 64) * 128;
        mbarrier_arrive_expecting(full, bytes - (p.fault == kFewerBytes ? 8192 : p.fault == kMoreBytes ? -16 : 0));
        tma_load(p.fault == kOffAtom ? a + 512 : a, p.fault == kNoMap ? TensorMap{} : p.a, p.fault == kNoMbarrier ? full + 8 : full, 0, 0, 0, 0);
        for (int box = 0; box < (Transposed ? N / 64 : 1); ++box) {
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
        if constexpr (Transposed) {
            wgmma_transposed<T>(d, left[k], matrix_descriptor(b + 2048 * other + (p.fault == kWrongAtoms ? 32 : 0), 8192, 1024) ^ plain, accumulate);
        } else {
            wgmma<T>(d, matrix_descriptor(a + 32 * other, 0, 1024), matrix_descriptor(b + 32 * other, 0, 1024) ^ plain, accumulate);
        }
        if (k == 1) { wgmma_commit(); }
    }
    wgmma_commit();
    if (p.fault == kReadEarly) { p.out[0] = d[0][0]; return; }
    if (p.fault == kWrittenEarly) { d[0][0] = 1.0f; }
    if (p.fault == kOperandOverwritten) { left[3][1] = 1; }
    if (p.fault == kSharedOverwritten && thread_index() == 200) { store_shared_32(b + 64, 0); }
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

template <typename T, int N, bool Transposed>
std::vector<float> product(Fault fault) {
    static Matrix<T> a(64, 64, 64, a_number);
    static Matrix<T> b(Transposed ? kDepth : N, Transposed ? N : kDepth, Transposed ? kDepth : N,
                       Transposed ? b_number : [](int column, int k) { return b_number(k, column); });
    std::vector<float> out(64 * N, -1.0f);
    run(kernel_products<T, N, Transposed>, 256, 8192 + std::max(N, 64) * 128 + 64, Products{a.map, b.map, out.data(), fault});
    return out;
}

template <typename T, int N, bool Transposed>
void check_product() {
    under_seeds([] {
        const std::vector<float> out = product<T, N, Transposed>(kNone);
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
    const auto wrong = [](Fault fault) { return [fault] { product<bf16, 64, false>(fault); }; };
    const auto wrong_transposed = [](Fault fault) { return [fault] { product<bf16, 128, true>(fault); }; };
    reported(wrong(kNoProductFence), {"registers that no wgmma_fence has named since they were last touched"});
    reported(wrong_transposed(kNoProductFence), {"a product of registers that no wgmma_fence has named"});
    reported(wrong(kTouchedAfterFence), {"a product to registers that no wgmma_fence has named"});
    reported(wrong(kReadEarly), {"returned with products in flight"});
    reported(wrong(kNoWait), {"returned with products in flight"});
    reported(wrong(kWrittenEarly), {"whose registers were written to meanwhile"});
    reported(wrong_transposed(kOperandOverwritten), {"registers that were written to before it was waited for"});
    reported(wrong(kLaxWait), {"names registers of the product issued at", "which it does not wait for"});
    reported(wrong(kUnnamedRegisters), {"issues a product to registers of the product issued at", "no wgmma_wait has named"});
    reported(wrong(kSharedOverwritten), {"thread 200 at " + line(kProductsLine + 48), "writes shared memory at byte",
                                         "issued at " + line(kProductsLine + 40)});
    reported(wrong(kCopyOverOperand), {"thread 200", "begins a copy to shared memory at byte", "issued at"});
    reported(wrong(kNoSwizzle), {"descriptor is not of the 128-byte swizzle"});
    reported(wrong(kOtherProduct), {"issues another product than the other warps of its warpgroup"});
    reported(wrong(kWarpLeavesOut), {"ended after warp 4 had issued 4 products and warp 6 of its warpgroup 3"});
    reported(wrong_transposed(kWrongAtoms), {"right operand has atoms off 1024 bytes"});
    // What is read of registers before a wait is no number.
    float early = 0.0f;
    try {
        static Matrix<bf16> a(64, 64, 64, a_number);
        run(kernel_products<bf16, 64, false>, 256, 8192 * 2 + 64, Products{a.map, a.map, &early, kReadEarly});
    } catch (const std::runtime_error&) {
    }
    expect(std::isnan(early), "NaN in registers that wait");
}

void check_copy_faults() {
    const auto wrong = [](Fault fault) { return [fault] { product<bf16, 64, false>(fault); }; };
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
        {"wgmma bf16, 64 columns", on_hopper<check_product<bf16, 64, false>>},
        {"wgmma fp16, 80 columns", on_hopper<check_product<fp16, 80, false>>},
        {"wgmma bf16, 112 columns", on_hopper<check_product<bf16, 112, false>>},
        {"wgmma fp16, 128 columns", on_hopper<check_product<fp16, 128, false>>},
        {"wgmma transposed bf16, 64 columns", on_hopper<check_product<bf16, 64, true>>},
        {"wgmma transposed fp16, 128 columns", on_hopper<check_product<fp16, 128, true>>},
        {"wgmma transposed bf16, 256 columns", on_hopper<check_product<bf16, 256, true>>},
        {"faults with wgmma", on_hopper<check_product_faults>},
        {"faults with copies and mbarriers", on_hopper<check_copy_faults>},
        {"boxes, stores and their faults", on_hopper<check_boxes>},
        {"landings in any order", on_hopper<check_landings>},
        {"rings and their faults", on_hopper<check_rings>},
        {"named barriers", on_hopper<check_named_barriers>},
        {"registers", on_hopper<check_registers>},
        {"proxies", on_hopper<check_proxies>},
    };
}

}  // namespace attnfuse::selftest
