// The emulated machine tested by small kernels: each layout against plain loops, each report by a kernel that earns it.
// Prints a line a check, exits with 1 if any failed.
// Reports are compared with the lines they must name, so nothing may move a statement to another line.
// clang-format off
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cp_async.h"
#include "global.h"
#include "launch.h"
#include "ldmatrix.h"
#include "mma.h"
#include "numbers.h"
#include "selftest.h"
#include "shared.h"
#include "thread.h"

namespace {

using namespace attnfuse;
using selftest::expect;
using selftest::expect_error;

std::string line(int number) { return "selftest.cpp:" + std::to_string(number); }

using selftest::Buffers;
using selftest::start;

uint32_t shared_word(SharedAddress from) {
    return load_shared_16(from) | static_cast<uint32_t>(load_shared_16(from + 2)) << 16;
}
float shared_float(SharedAddress from) { return std::bit_cast<float>(shared_word(from)); }

// Where threads stand.

__global__ void __launch_bounds__(96) kernel_indices(const __grid_constant__ Buffers buffers) {
    int* const out = static_cast<int*>(buffers.out) + (block_index() * 96 + thread_index()) * 2;
    store_global(out, warp_index());
    store_global(out + 1, lane_index());
}

void check_indices() {
    std::vector<int> out(5 * 96 * 2, -1);
    start(kernel_indices, 5, 96, 0, {nullptr, out.data()});
    for (int i = 0; i < 5 * 96; ++i) {
        expect(out[2 * i] == i % 96 / 32 && out[2 * i + 1] == i % 32, "every thread of every block to run once");
    }
    start(kernel_indices, 0, 96, 0);
}

// Collectives.

__global__ void kernel_shuffle(Buffers buffers) {
    const int lane = lane_index();
    for (int mask = 0; mask < 32; ++mask) {
        store_global(static_cast<float*>(buffers.out) + mask * 64 + thread_index(), shuffle_xor(thread_index(), mask));
    }
    const uint32_t votes = ballot(lane % 3 == 0 && thread_index() < 32);
    store_global(static_cast<float*>(buffers.out) + 2048 + thread_index(), static_cast<float>(votes));
}

void check_shuffle_and_ballot() {
    std::vector<float> out(2048 + 64);
    start(kernel_shuffle, 1, 64, 0, {nullptr, out.data()});
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; lane += 3) {
        votes |= 1u << lane;
    }
    for (int thread = 0; thread < 64; ++thread) {
        for (int mask = 0; mask < 32; ++mask) {
            expect(out[mask * 64 + thread] == static_cast<float>(thread ^ mask), "the partner's number");
        }
        expect(out[2048 + thread] == (thread < 32 ? static_cast<float>(votes) : 0.0f), "the warp's votes");
    }
}

// Shared memory holds a 16x16 matrix of 256 distinct numbers; lane l's row is l % 16, columns l / 16 * 8 on.
__global__ void kernel_ldmatrix(Buffers buffers) {
    const SharedAddress base = shared_base();
    for (int i = 0; i < 8; ++i) {
        const int at = thread_index() * 8 + i;
        store_shared_16(base + at * 2, static_cast<uint16_t>(at));
    }
    barrier();
    const SharedAddress row = base + (lane_index() % 16 * 16 + lane_index() / 16 * 8) * 2;
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(plain, row);
    ldmatrix_x4_trans(transposed, row);
    uint32_t* const out = static_cast<uint32_t*>(buffers.out) + lane_index() * 8;
    for (int i = 0; i < 4; ++i) {
        store_global(out + i, plain[i]);
        store_global(out + 4 + i, transposed[i]);
    }
}

void check_ldmatrix() {
    std::vector<uint32_t> out(32 * 8);
    start(kernel_ldmatrix, 1, 32, 512, {nullptr, out.data()});
    const auto number = [](int matrix, int row, int column) {
        return static_cast<uint32_t>((matrix % 2 * 8 + row) * 16 + matrix / 2 * 8 + column);
    };
    for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < 4; ++m) {
            const int t = lane % 4, g = lane / 4;
            expect(out[lane * 8 + m] == (number(m, g, 2 * t) | number(m, g, 2 * t + 1) << 16), "ldmatrix's layout");
            expect(out[lane * 8 + 4 + m] == (number(m, 2 * t, g) | number(m, 2 * t + 1, g) << 16),
                   "ldmatrix_trans's layout");
        }
    }
}

// The registers of four matrices of distinct numbers, stored in rows 48 bytes apart: matrix m in columns 8 (m % 2) on of
// rows 8 (m / 2) on. In shared memory a matrix is transposed, and loads as it was by ldmatrix_x4_trans.
constexpr int kStmatrixLine = __LINE__ + 7;
__global__ void kernel_stmatrix(Buffers buffers) {
    const SharedAddress base = shared_base();
    const int lane = lane_index(), g = lane / 4, pair = 2 * (lane % 4);
    uint32_t given[4], back[4];
    for (int m = 0; m < 4; ++m) { given[m] = static_cast<uint32_t>(m * 64 + g * 8 + pair) | static_cast<uint32_t>(m * 64 + g * 8 + pair + 1) << 16; }
    const SharedAddress row = base + (lane / 16 * 8 + lane % 8) * 48 + lane / 8 % 2 * 16;
    stmatrix_x4_trans(buffers.choice == 1 ? row + 8 : buffers.choice == 2 ? base + lane / 2 * 48 : row, given);
    if (buffers.choice == 3 && lane == 9) { store_shared_16(base + 16, 0); }
    if (buffers.choice != 4) { warp_sync(); }
    uint16_t* const out = static_cast<uint16_t*>(buffers.out);
    for (int i = lane; i < 256; i += 32) { store_global(out + i, load_shared_16(base + i / 16 * 48 + i % 16 * 2)); }
    ldmatrix_x4_trans(back, row);
    for (int m = 0; m < 4; ++m) { store_global(static_cast<uint32_t*>(buffers.out) + 128 + lane * 4 + m, back[m] ^ given[m]); }
}

void check_stmatrix() {
    std::vector<uint32_t> out(256, 1);
    const int64_t before = emulation::bank_conflicts;
    start(kernel_stmatrix, 1, 32, 16 * 48, {nullptr, out.data()});
    // Rows 48 bytes apart lie in eight different groups of banks, and are read as they were written.
    expect(emulation::bank_conflicts == before, "no bank conflicts");
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 16; ++column) {
            const uint32_t at = row * 16 + column;
            const uint32_t stored = out[at / 2] >> at % 2 * 16 & 0xffff;
            const int m = row / 8 * 2 + column / 8;
            expect(stored == static_cast<uint32_t>(m * 64 + column % 8 * 8 + row % 8), "stmatrix_trans's layout");
        }
    }
    for (int i = 128; i < 256; ++i) { expect(out[i] == 0, "what was stored to load as it was"); }
    const auto choice = [&](int number) { return [&out, number] { start(kernel_stmatrix, 1, 32, 16 * 48, {nullptr, out.data(), number}); }; };
    const std::string stored = "at " + line(kStmatrixLine);
    expect_error(choice(1), {"block 0, thread 0 " + stored, "writes 16 bytes of shared memory at byte 8, which is not a multiple of 16"});
    expect_error(choice(2), {"race in block 0 on shared memory at byte 0: written by thread 0 " + stored, "written by thread 1 " + stored});
    expect_error(choice(3), {"byte 16: written by thread 8 " + stored, "written by thread 9 at " + line(kStmatrixLine + 1), "no barrier"});
    expect_error(choice(4), {"written by thread ", stored, "read by thread ", "at " + line(kStmatrixLine + 4), "no barrier"});
}

__global__ void kernel_stmatrix_conflicts(Buffers) {
    const uint32_t zeros[4] = {};
    stmatrix_x4_trans(shared_base() + lane_index() * 128, zeros);
}

void check_stmatrix_conflicts() {
    const int64_t before = emulation::bank_conflicts;
    start(kernel_stmatrix_conflicts, 1, 32, 32 * 128);
    expect(emulation::bank_conflicts == before + 4 * 7, "seven of a matrix's eight rows to wait");
}

int a_number(int row, int k) { return (row * 7 + k * 3) % 17 - 8; }
int b_number(int k, int column) { return (k * 5 + column * 11) % 13 - 6; }
int d_number(int row, int column) { return row * 8 + column; }

template <typename T>
__global__ void kernel_mma(Buffers buffers) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
        a[i] = pack<T>(a_number(row, k), a_number(row, k + 1));
        d[i] = d_number(g + i / 2 * 8, 2 * t + i % 2);
    }
    for (int i = 0; i < 2; ++i) {
        b[i] = pack<T>(b_number(2 * t + i * 8, g), b_number(2 * t + i * 8 + 1, g));
    }
    mma_m16n8k16<T>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) {
        store_global(static_cast<float*>(buffers.out) + (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
    }
}

template <typename T>
void check_mma() {
    std::vector<float> out(16 * 8);
    start(kernel_mma<T>, 1, 32, 0, {nullptr, out.data()});
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            int sum = d_number(row, column);
            for (int k = 0; k < 16; ++k) {
                sum += a_number(row, k) * b_number(k, column);
            }
            expect(out[row * 8 + column] == static_cast<float>(sum), "the exact product");
        }
    }
}

// Numbers.

template <typename T>
void check_format(float largest, float past_largest) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const float x = unpack<T>(bits).low;
        const uint32_t back = pack<T>(0.0f, x) >> 16;
        expect(std::isnan(x) ? back == 0x7fff : back == bits, "every 16-bit number to survive float32");
        const float next = unpack<T>(bits + 1).low;
        if (std::isfinite(x) && std::isfinite(next) && bits != 0x7fff) {
            const float middle = static_cast<float>((static_cast<double>(x) + next) / 2);
            expect((pack<T>(middle, 0.0f) & 0xffff) == bits + bits % 2, "a tie to go to the even neighbour");
            const float above = std::nextafter(middle, next);
            expect((pack<T>(above, 0.0f) & 0xffff) == bits + 1, "what is above the middle to be rounded up");
        }
    }
    expect(unpack<T>(pack<T>(largest, past_largest)).low == largest, "the largest number");
    expect(unpack<T>(pack<T>(largest, past_largest)).high == infinity(), "infinity past the largest number");
}

void check_functions() {
    expect(exp2_approx(-infinity()) == 0.0f && exp2_approx(-127.0f) == 0.0f && exp2_approx(-126.0f) == 0x1p-126f,
           "exp2 to flush subnormal numbers");
    expect(exp2_approx(3.0f) == 8.0f && exp2_approx(1e-40f) == 1.0f, "powers of two");
    expect(std::isnan(exp2_approx(NAN)) && maximum(NAN, 2.0f) == 2.0f && maximum(2.0f, NAN) == 2.0f, "NaN's rules");
    expect(multiply_add(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f) == 0x1p-46f, "a fused multiply-add");
}

// Barriers and order.

std::vector<int> arrivals;

// Every thread stores its number, and loads its opposite's after the barrier.
__global__ void kernel_exchange(Buffers buffers) {
    arrivals.push_back(block_index() * 128 + thread_index());
    const SharedAddress base = shared_base();
    store_shared_32(base + thread_index() * 4, static_cast<uint32_t>(thread_index()));
    barrier();
    const uint32_t opposite = shared_word(base + (127 - thread_index()) * 4);
    store_global(static_cast<uint32_t*>(buffers.out) + block_index() * 128 + thread_index(), opposite);
}

void check_seeds() {
    std::vector<std::vector<int>> orders;
    for (uint64_t seed : {0, 1, 2, 1}) {
        emulation::set_seed(seed);
        arrivals.clear();
        std::vector<uint32_t> out(3 * 128);
        start(kernel_exchange, 3, 128, 512, {nullptr, out.data()});
        for (int i = 0; i < 3 * 128; ++i) {
            expect(out[i] == static_cast<uint32_t>(127 - i % 128), "the barrier to hold");
        }
        orders.push_back(arrivals);
    }
    emulation::set_seed(1);
    expect(orders[0] != orders[1] && orders[1] != orders[2], "another order from another seed");
    expect(orders[1] == orders[3], "one order from one seed");
}

__global__ void kernel_atomics(Buffers buffers) {
    arrivals.push_back(block_index());
    for (int i = 0; i < 8; ++i) {
        add_global(static_cast<float*>(buffers.out) + i, 1.0f);
    }
    arrivals.push_back(block_index());
}

void check_atomics() {
    std::vector<float> out(8);
    arrivals.clear();
    start(kernel_atomics, 6, 64, 0, {nullptr, out.data()});
    int changes = 0;
    for (std::size_t i = 1; i < arrivals.size(); ++i) {
        changes += arrivals[i] != arrivals[i - 1];
    }
    expect(changes > 50, "blocks to be interleaved");
    for (float sum : out) {
        expect(sum == 6 * 64, "every addition to be counted");
    }
    emulation::set_resident_blocks(1);
    arrivals.clear();
    start(kernel_atomics, 6, 64, 0, {nullptr, out.data()});
    emulation::set_resident_blocks(2);
    changes = 0;
    for (std::size_t i = 1; i < arrivals.size(); ++i) {
        changes += arrivals[i] != arrivals[i - 1];
    }
    expect(changes == 5, "one block at a time where one is resident");
}

__global__ void kernel_atomics_128(Buffers buffers) {
    const float x[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    float* const to = static_cast<float*>(buffers.out) + thread_index() % 2 * 4;
    if (buffers.choice == 1 && block_index() == 1) { store_global(to, 0.0f); }
    add_global_128(to, x);
}

void check_atomics_128() {
    alignas(16) float out[8] = {};
    start(kernel_atomics_128, 6, 64, 0, {nullptr, out});
    for (int i = 0; i < 8; ++i) { expect(out[i] == static_cast<float>((i % 4 + 1) * 6 * 32), "every addition to be counted"); }
    expect_error([&] { start(kernel_atomics_128, 6, 64, 0, {nullptr, out, 1}); }, {"block ", "a global address that block ", "nothing in the launch orders the two"});
}

__global__ void kernel_uninitialised(Buffers buffers) {
    float low, high;
    load_shared_pair(low, high, shared_base() + thread_index() * 8);
    const uint32_t half = load_shared_16(shared_base() + thread_index() * 2);
    const bool nan = std::isnan(low) && std::isnan(high) && std::isnan(unpack<bf16>(half).low) &&
                     std::isnan(unpack<fp16>(half).low);
    store_global(static_cast<int*>(buffers.out) + block_index() * 32 + thread_index(), static_cast<int>(nan));
    barrier();
    store_shared_32(shared_base() + thread_index() * 4, 0);
}

void check_uninitialised() {
    std::vector<int> out(4 * 32);
    start(kernel_uninitialised, 4, 32, 256, {nullptr, out.data()});
    expect(std::accumulate(out.begin(), out.end(), 0) == 4 * 32, "NaN in every block's shared memory");
}

// Copies.

__global__ void kernel_copy(Buffers buffers) {
    const SharedAddress to = shared_base() + thread_index() * 32;
    const float* const from = static_cast<const float*>(buffers.in) + thread_index() * 4;
    const bool valid = thread_index() % 2 == 0;
    cp_async_16(to, valid ? from : nullptr, valid);
    cp_async_commit();
    cp_async_4(to + 16, from);
    cp_async_commit();
    cp_async_wait<1>();
    const float first = shared_float(to);
    cp_async_wait<0>();
    store_global(static_cast<float*>(buffers.out) + thread_index() * 2, first);
    float second, never_written;
    load_shared_pair(second, never_written, to + 16);
    store_global(static_cast<float*>(buffers.out) + thread_index() * 2 + 1, second);
}

void check_copies() {
    std::vector<float> in(64 * 4), out(64 * 2);
    std::iota(in.begin(), in.end(), 1.0f);
    start(kernel_copy, 1, 64, 2048, {in.data(), out.data()});
    for (int thread = 0; thread < 64; ++thread) {
        expect(out[2 * thread] == (thread % 2 == 0 ? in[4 * thread] : 0.0f), "the copy, or zeros");
        expect(out[2 * thread + 1] == in[4 * thread], "the second group's copy");
    }
}

// The source is read when the copy lands.
__global__ void kernel_late_copy(Buffers buffers) {
    if (thread_index() == 0) {
        cp_async_4(shared_base(), buffers.in);
        cp_async_commit();
        *static_cast<float*>(buffers.out) = 2.0f;
        cp_async_wait<0>();
        *static_cast<float*>(buffers.out) = shared_float(shared_base());
    }
}

void check_late_copy() {
    float x = 1.0f;
    start(kernel_late_copy, 1, 32, 16, {&x, &x});
    expect(x == 2.0f, "the copy to land when it is waited for");
}

constexpr int kCopyLine = __LINE__ + 3;
__global__ void kernel_too_early(Buffers buffers) {
    if (thread_index() == 0) {
        cp_async_16(shared_base(), buffers.in, true);
        cp_async_commit();
        cp_async_16(shared_base() + 16, buffers.in, true);
        cp_async_commit();
        cp_async_wait<1>();
    }
    if (buffers.choice != 3) {
        barrier();
    }
    if (buffers.choice == 0 && thread_index() == 40) {
        load_shared_128(shared_base() + 16);
    } else if (buffers.choice == 1 && thread_index() == 40) {
        store_shared_16(shared_base() + 18, 0);
    } else if (buffers.choice == 2 && thread_index() == 0) {
        cp_async_16(shared_base() + 16, buffers.in, false);
    }
}

void check_too_early() {
    const Words4 in{};
    const std::string began = "began at " + line(kCopyLine + 2);
    const auto launched = [&](int choice) {
        return [&in, choice] { start(kernel_too_early, 1, 64, 64, {&in, nullptr, choice}); };
    };
    expect_error(launched(0), {"block 0, thread 40 at " + line(kCopyLine + 10), "reads", "byte 16", "in flight",
                               "thread 0", began});
    expect_error(launched(1), {"block 0, thread 40 at " + line(kCopyLine + 12), "writes", "in flight", "thread 0",
                               began});
    expect_error(launched(2), {"block 0, thread 0 at " + line(kCopyLine + 14), "copy", "in flight", "thread 0",
                               began});
    expect_error(launched(3), {"block 0, thread 0 returned with copies in flight", line(kCopyLine + 2)});
}

// Races. Which of two threads comes first is the seed's to say, so both orders are looked for among many seeds.

constexpr int kRaceLine = __LINE__ + 4;
__global__ void kernel_race(Buffers buffers) {
    const int other = buffers.choice % 2 == 0 ? 71 : 6;
    if (thread_index() == 5) {
        store_shared_32(shared_base() + 64, 1);
    }
    if (buffers.choice >= 2) {
        warp_sync();
    }
    if (thread_index() == other) {
        load_shared_16(shared_base() + 64);
    }
}

// Every seed reports this race or none; some seed reports it with `first` as the earlier access.
bool some_seed_reports(const std::function<void()>& action, const std::string& first, const std::string& second) {
    bool found = false;
    for (uint64_t seed = 0; seed < 40 && !found; ++seed) {
        emulation::set_seed(seed);
        try {
            action();
        } catch (const std::runtime_error& error) {
            const std::string message = error.what();
            expect(message.find("race in block 0 on shared memory at byte 64") != std::string::npos, message);
            found = message.find(first + ", " + second + ", with no barrier between them") != std::string::npos;
        }
    }
    emulation::set_seed(1);
    return found;
}

void check_races() {
    for (int choice : {0, 1, 2}) {
        const auto action = [&] { start(kernel_race, 1, 96, 128, {nullptr, nullptr, choice}); };
        const std::string written = "written by thread 5 at " + line(kRaceLine);
        const std::string read =
            std::string("read by thread ") + (choice % 2 == 0 ? "71" : "6") + " at " + line(kRaceLine + 6);
        expect(some_seed_reports(action, written, read), "the write, then the read");
        expect(some_seed_reports(action, read, written), "the read, then the write");
    }
    start(kernel_race, 1, 96, 128, {nullptr, nullptr, 3});  // warp_sync orders the lanes of a warp
}

constexpr int kWriteLine = __LINE__ + 3;
__global__ void kernel_write_race(Buffers) {
    if (thread_index() == 3 || thread_index() == 40) {
        store_shared_16(shared_base() + 64, 1);
    }
}

constexpr int kMatrixLine = __LINE__ + 7;
// All lanes' rows are read in common; then a lane of the same warp writes to one: ldmatrix is no fence.
__global__ void kernel_matrix_race(Buffers buffers) {
    store_shared_32(shared_base() + thread_index() * 4, 0);
    barrier();
    uint32_t fragment[4];
    if (thread_index() < 32) {
        ldmatrix_x4(fragment, shared_base() + 64);
    }
    if (buffers.choice == 1) {
        barrier();
    }
    if (thread_index() == 7) {
        store_shared_32(shared_base() + 64, 1);
    }
}

constexpr int kAsyncLine = __LINE__ + 6;
// The copy is issued while another thread may still read what it replaces.
__global__ void kernel_async_race(Buffers buffers) {
    store_shared_32(shared_base() + thread_index() * 4, 0);
    barrier();
    if (thread_index() == 0) {
        load_shared_128(shared_base() + 64);
    }
    uint32_t votes = ballot(true);
    if (thread_index() == 1 && votes != 0) {
        cp_async_16(shared_base() + 64, buffers.in, true);
        cp_async_commit();
        cp_async_wait<0>();
    }
}

// Landed for the thread that waited, and for others only after a barrier.
constexpr int kLandedLine = __LINE__ + 3;
__global__ void kernel_landed_race(Buffers buffers) {
    if (thread_index() == 1) {
        cp_async_16(shared_base() + 64, buffers.in, true);
        cp_async_commit();
        cp_async_wait<0>();
    }
    ballot(true);
    if (thread_index() == 2) {
        load_shared_128(shared_base() + 64);
    }
}

void check_more_races() {
    const std::string write = " at " + line(kWriteLine);
    const auto both_write = [] { start(kernel_write_race, 1, 64, 128); };
    expect(some_seed_reports(both_write, "written by thread 3" + write, "written by thread 40" + write), "two writes");
    expect(some_seed_reports(both_write, "written by thread 40" + write, "written by thread 3" + write), "two writes");
    expect_error([] { start(kernel_matrix_race, 1, 64, 256, {nullptr, nullptr, 0}); },
                 {"race in block 0 on shared memory at byte 64: read by thread", line(kMatrixLine),
                  "written by thread 7 at " + line(kMatrixLine + 6)});
    start(kernel_matrix_race, 1, 64, 256, {nullptr, nullptr, 1});
    const Words4 in{};
    expect_error([&] { start(kernel_async_race, 1, 32, 128, {&in}); },
                 {"byte 64: read by thread 0 at " + line(kAsyncLine),
                  "written by thread 1 at " + line(kAsyncLine + 4)});
    expect_error([&] { start(kernel_landed_race, 1, 32, 128, {&in}); },
                 {"byte 64: written by thread 1 at " + line(kLandedLine),
                  "read by thread 2 at " + line(kLandedLine + 6)});
}

// Bad addresses.

constexpr int kAddressLine = __LINE__ + 5;
__global__ void kernel_address(Buffers buffers) {
    uint32_t fragment[4];
    const SharedAddress base = shared_base();
    switch (buffers.choice) {
        case 0: load_shared_128(base + 96); break;
        case 1: store_shared_32(0, 1); break;
        case 2: ldmatrix_x4(fragment, base + 8); break;
        case 3: load_shared_16(base + 1); break;
        case 4: store_shared_32(base + 2, 0); break;
        case 5: cp_async_16(base + 80, buffers.in, true); break;
        case 6: cp_async_16(base, static_cast<const char*>(buffers.in) + 4, true); break;
        case 7: load_global(reinterpret_cast<const float*>(static_cast<const char*>(buffers.in) + 2)); break;
        case 8: store_global_128(static_cast<char*>(buffers.out) + 8, {}); break;
        case 9: add_global_128(static_cast<float*>(buffers.out) + 2, {0.0f, 0.0f, 0.0f, 0.0f}); break;
        default: break;
    }
}

void check_addresses() {
    Words4 memory[4] = {};
    const std::vector<std::vector<std::string>> parts = {
        {"reads 16 bytes of shared memory at byte 96, outside the block's 90"},
        {"writes 4 bytes of shared memory at byte -1024, outside the block's 90"},
        {"reads 16 bytes of shared memory at byte 8, which is not a multiple of 16"},
        {"reads 2 bytes of shared memory at byte 1, which is not a multiple of 2"},
        {"writes 4 bytes of shared memory at byte 2, which is not a multiple of 4"},
        {"begins a copy to 16 bytes of shared memory at byte 80, outside the block's 90"},
        {"accesses 16 bytes of global memory at an address that is not a multiple of 16"},
        {"accesses 4 bytes of global memory at an address that is not a multiple of 4"},
        {"accesses 16 bytes of global memory at an address that is not a multiple of 16"},
        {"accesses 16 bytes of global memory at an address that is not a multiple of 16"},
    };
    for (int choice = 0; choice < static_cast<int>(parts.size()); ++choice) {
        std::vector<std::string> expected = {"block 0, thread ", line(kAddressLine + choice)};
        expected.push_back(parts[choice][0]);
        expect_error([&] { start(kernel_address, 1, 32, 90, {memory, memory, choice}); }, expected);
    }
}

// Threads that do not meet.

constexpr int kBarrierLine = __LINE__ + 3;
__global__ void kernel_deadlock(Buffers) {
    if (warp_index() != 1) {
        barrier();
    }
}

constexpr int kVoteLine = __LINE__ + 3;
__global__ void kernel_lane_missing(Buffers) {
    if (lane_index() != 9) {
        ballot(true);
    }
}

constexpr int kPlacesLine = __LINE__ + 3;
__global__ void kernel_two_barriers(Buffers) {
    if (warp_index() == 0) {
        barrier();
    } else {
        barrier();
    }
}

constexpr int kDivergentLine = __LINE__ + 3;
__global__ void kernel_divergent(Buffers buffers) {
    if (lane_index() < 16) {
        ballot(true);
    } else if (buffers.choice == 0) {
        shuffle_xor(1.0f, 1);
    } else {
        ballot(true);
    }
}

void check_meetings() {
    for (int blocks : {1, 7}) {
        expect_error([&] { start(kernel_deadlock, blocks, 128, 0); },
                     {"deadlock in block ", ": threads 0-31 and 64-127 wait at barrier " + line(kBarrierLine) +
                                                "; threads 32-63 have returned"});
    }
    expect_error([] { start(kernel_lane_missing, 1, 32, 0); },
                 {"deadlock in block 0: threads 0-8 and 10-31 wait at ballot " + line(kVoteLine) +
                  "; thread 9 has returned"});
    expect_error([] { start(kernel_two_barriers, 1, 64, 0); },
                 {"block 0 meets in different barriers: threads 0-31 wait at barrier " + line(kPlacesLine) +
                  "; threads 32-63 wait at barrier " + line(kPlacesLine + 2)});
    for (int choice : {0, 1}) {
        std::vector<std::string> places = {"block 0, thread ", " calls ", " while thread ", " of its warp waits at "};
        const auto action = [choice] { start(kernel_divergent, 1, 32, 0, {nullptr, nullptr, choice}); };
        expect_error(action, places);
        expect_error(action, {line(kDivergentLine)});
        expect_error(action, {line(kDivergentLine + 2 + 2 * choice)});
    }
}

// Global memory.

void load_if(bool wanted, const float* from, emulation::Where where = emulation::Where::current()) {
    if (wanted) {
        load_global(from, where);
    }
}

constexpr int kGlobalLine = __LINE__ + 5;
__global__ void kernel_global(Buffers buffers) {
    float* const out = static_cast<float*>(buffers.out);
    const int thread = block_index() * 32 + thread_index();
    switch (buffers.choice) {
        case 0: store_global(out + thread / 2, 1.0f); break;
        case 1: store_global(out + thread % 32, 1.0f); break;
        case 2: thread == 0 ? store_global(out, 1.0f) : add_global(out, 1.0f); break;
        case 3: thread == 0 ? store_global(out, 1.0f) : load_if(thread == 40, out); break;
        case 4: thread == 0 ? store_global(out, 1.0f) : load_if(thread == 1, out); break;
        case 5: thread == 0 ? store_global_128(out, {}) : load_if(thread == 33, out + 3); break;
        default: break;
    }
}

// A store and a load of the same block with a barrier between them, and halves of a word by two threads, are right.
__global__ void kernel_global_right(Buffers buffers) {
    uint16_t* const out = static_cast<uint16_t*>(buffers.out) + block_index() * 64;
    store_global(out + thread_index(), static_cast<uint16_t>(thread_index()));
    barrier();
    const uint16_t x = load_global(out + 63 - thread_index());
    barrier();
    store_global(out + thread_index(), static_cast<uint16_t>(x + 1 + load_global(out + thread_index())));
}

void check_global() {
    Words4 memory[64] = {};
    const std::string both[] = {"stores to", "stores to", "", "loads", "loads", "loads"};
    for (int choice = 0; choice < 6; ++choice) {
        // Loads that come first are right: as with any race, some seeds show it.
        bool reported = false;
        for (uint64_t seed = 0; seed < 40 && !reported; ++seed) {
            emulation::set_seed(seed);
            try {
                start(kernel_global, 2, 32, 0, {nullptr, memory, choice});
            } catch (const std::runtime_error& error) {
                const std::string message = error.what();
                const std::string place = line(kGlobalLine + choice);
                reported = message.find("at " + place + " " + both[choice]) != std::string::npos &&
                           message.find("to at " + place) != std::string::npos;
                expect(reported, "both places in \"" + message + "\"");
            }
        }
        emulation::set_seed(1);
        expect(reported, "global choice " + std::to_string(choice) + " to be reported");
    }
    std::vector<uint16_t> out(5 * 64);
    start(kernel_global_right, 5, 64, 0, {nullptr, out.data()});
    for (uint16_t x : out) {
        expect(x == 64, "loads after a barrier to be right");
    }
    // Enough addresses that the table grows.
    std::vector<float> sums(40000);
    const auto adds = [](Buffers buffers) {
        for (int i = thread_index(); i < 40000; i += 32) {
            add_global(static_cast<float*>(buffers.out) + i, 1.0f);
        }
    };
    start(adds, 3, 32, 0, {nullptr, sums.data()});
    for (float sum : sums) {
        expect(sum == 3.0f, "sums over three blocks");
    }
}

// Launches.

void check_launches() {
    expect_error([] { start(kernel_indices, 1, 32, 163 * 1024 + 1); }, {"166913 bytes of shared memory", "166912"});
    emulation::set_shared_memory_limit(100);
    expect(shared_memory_limit(0) == 100, "the limit that was set");
    expect_error([] { start(kernel_indices, 1, 32, 101); }, {"asks for 101 bytes", "has 100"});
    emulation::set_shared_memory_limit(163 * 1024);
    expect_error([] { start(kernel_indices, 1, 33, 0); }, {"a multiple of 32, not 33"});
    expect_error([] { start(kernel_indices, 1 << 30, 1056, 0); }, {"not 1056"});
    // A launch goes on as usual after one that failed.
    check_indices();
}

}  // namespace

int main() {
    make_current(0);
    std::vector<selftest::Check> checks = {
        {"indices", check_indices},
        {"shuffle and ballot", check_shuffle_and_ballot},
        {"ldmatrix", check_ldmatrix},
        {"stmatrix", check_stmatrix},
        {"stmatrix's bank conflicts", check_stmatrix_conflicts},
        {"mma bf16", check_mma<bf16>},
        {"mma fp16", check_mma<fp16>},
        {"bf16", [] { check_format<bf16>(0x1.fep127f, 0x1.ffp127f); }},
        {"fp16", [] { check_format<fp16>(65504.0f, 65520.0f); }},
        {"functions of numbers", check_functions},
        {"barrier and seeds", check_seeds},
        {"atomics over interleaved blocks", check_atomics},
        {"atomics of 16 bytes", check_atomics_128},
        {"uninitialised shared memory", check_uninitialised},
        {"copies and zero fill", check_copies},
        {"copies land late", check_late_copy},
        {"copies in flight", check_too_early},
        {"races", check_races},
        {"races of writes, matrices and copies", check_more_races},
        {"addresses", check_addresses},
        {"deadlock and divergence", check_meetings},
        {"global memory", check_global},
        {"launches", check_launches},
    };
    const std::vector<selftest::Check> more = selftest::asynchronous_checks();
    checks.insert(checks.end(), more.begin(), more.end());
    bool failed = false;
    for (const auto& [name, check] : checks) {
        try {
            check();
            std::printf("%s ok\n", name);
        } catch (const std::exception& error) {
            failed = true;
            std::printf("%s FAILED: %s\n", name, error.what());
        }
    }
    return failed ? 1 : 0;
}
