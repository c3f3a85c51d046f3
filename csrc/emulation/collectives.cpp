// What the 32 lanes of a warp do together, by the documented layouts of their fragments.
#include <bit>
#include <cstring>

#include "ldmatrix.h"
#include "mma.h"
#include "thread.h"

namespace attnfuse::emulation {
namespace {

template <typename Arguments>
Arguments& arguments_of(Warp& warp, int lane) {
    return *static_cast<Arguments*>(warp.arguments[lane]);
}

struct ShuffleArguments {
    uint32_t given;
    int source;  // lane
    uint32_t received;
};

struct BallotArguments {
    bool vote;
    uint32_t votes;
};

struct LoadArguments {
    uint32_t* fragment;
    SharedAddress row;
    Where where;
};

struct StoreArguments {
    const uint32_t* fragment;
    SharedAddress row;
    Where where;
};

struct ProductArguments {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

void execute_warp_sync(Warp& warp) {
    ++warp.epoch;
    join_clocks(warp.threads, 32);
}

void execute_shuffle(Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = arguments_of<ShuffleArguments>(warp, lane);
        if (mine.source < 0 || mine.source > 31) {
            fail(
                who(warp.threads[lane]) + " asks for what lane " + std::to_string(mine.source) +
                " has, which is not 0 to 31");
        }
        mine.received = arguments_of<ShuffleArguments>(warp, mine.source).given;
    }
}

void execute_ballot(Warp& warp) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
        votes |= static_cast<uint32_t>(arguments_of<BallotArguments>(warp, lane).vote) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
        arguments_of<BallotArguments>(warp, lane).votes = votes;
    }
}

// A matrix's eight rows are read or written at once if they lie in eight different groups of four banks.
template <typename Arguments>
void count_bank_conflicts(Warp& warp) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t groups = 0;
        for (int row = 0; row < 8; ++row) {
            groups |= 1u << (arguments_of<Arguments>(warp, 8 * matrix + row).row / 16 % 8);
        }
        bank_conflicts += 8 - std::popcount(groups);
    }
}

template <bool Transposed>
void execute_ldmatrix(Warp& warp) {
    count_bank_conflicts<LoadArguments>(warp);
    uint16_t rows[4][8][8];  // matrix, row, column
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = arguments_of<LoadArguments>(warp, lane);
        const Thread& thread = warp.threads[lane];
        std::memcpy(rows[lane / 8][lane % 8], thread.block->shared.read(thread, mine.row, 16, mine.where), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t* const fragment = arguments_of<LoadArguments>(warp, lane).fragment;
        const int group = lane / 4, pair = 2 * (lane % 4);
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto& m = rows[matrix];
            const uint32_t low = Transposed ? m[pair][group] : m[group][pair];
            const uint32_t high = Transposed ? m[pair + 1][group] : m[group][pair + 1];
            fragment[matrix] = low | high << 16;
        }
    }
}

void execute_stmatrix_transposed(Warp& warp) {
    count_bank_conflicts<StoreArguments>(warp);
    uint16_t rows[4][8][8];  // matrix, row, column
    for (int lane = 0; lane < 32; ++lane) {
        const uint32_t* const fragment = arguments_of<StoreArguments>(warp, lane).fragment;
        const int group = lane / 4, pair = 2 * (lane % 4);
        for (int matrix = 0; matrix < 4; ++matrix) {
            rows[matrix][pair][group] = static_cast<uint16_t>(fragment[matrix]);
            rows[matrix][pair + 1][group] = static_cast<uint16_t>(fragment[matrix] >> 16);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = arguments_of<StoreArguments>(warp, lane);
        const Thread& thread = warp.threads[lane];
        std::memcpy(thread.block->shared.write(thread, mine.row, 16, mine.where), rows[lane / 8][lane % 8], 16);
    }
}

// Half a row of eight columns. No wider than any x86-64's registers: g++ keeps wider vectors in memory.
using HalfRow = float __attribute__((vector_size(16)));

template <typename T>
void execute_product(Warp& warp) {
    float a[16][16];
    HalfRow b[16][2];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = arguments_of<ProductArguments>(warp, lane);
        const int group = lane / 4, pair = 2 * (lane % 4);
        for (int part = 0; part < 4; ++part) {
            const Pair numbers = unpack<T>(mine.a[part]);
            float* const to = &a[group + part % 2 * 8][pair + part / 2 * 8];
            to[0] = numbers.low;
            to[1] = numbers.high;
        }
        for (int part = 0; part < 2; ++part) {
            const Pair numbers = unpack<T>(mine.b[part]);
            b[pair + part * 8][group / 4][group % 4] = numbers.low;
            b[pair + part * 8 + 1][group / 4][group % 4] = numbers.high;
        }
    }
    for (int row = 0; row < 16; ++row) {
        HalfRow left = a[row][0] * b[0][0], right = a[row][0] * b[0][1];
        for (int k = 1; k < 16; ++k) {
            left += a[row][k] * b[k][0];
            right += a[row][k] * b[k][1];
        }
        for (int t = 0; t < 4; ++t) {
            float* const d = arguments_of<ProductArguments>(warp, row % 8 * 4 + t).d + row / 8 * 2;
            d[0] += t < 2 ? left[2 * t] : right[2 * t - 4];
            d[1] += t < 2 ? left[2 * t + 1] : right[2 * t - 3];
        }
    }
}

constexpr Collective kWarpSync{"warp_sync", execute_warp_sync};
constexpr Collective kShuffle{"shuffle", execute_shuffle};
constexpr Collective kBallot{"ballot", execute_ballot};
constexpr Collective kLoad{"ldmatrix_x4", execute_ldmatrix<false>};
constexpr Collective kLoadTransposed{"ldmatrix_x4_trans", execute_ldmatrix<true>};
constexpr Collective kStoreTransposed{"stmatrix_x4_trans", execute_stmatrix_transposed};
template <typename T>
constexpr Collective kProduct{"mma_m16n8k16", execute_product<T>};

}  // namespace

void warp_sync(Where where) { meet(kWarpSync, nullptr, where); }

uint32_t from_lane(uint32_t x, int lane, Where where) {
    ShuffleArguments arguments{x, lane, 0};
    meet(kShuffle, &arguments, where);
    return arguments.received;
}

uint32_t ballot(bool vote, Where where) {
    BallotArguments arguments{vote, 0};
    meet(kBallot, &arguments, where);
    return arguments.votes;
}

void ldmatrix(uint32_t (&fragment)[4], SharedAddress row, bool transposed, Where where) {
    LoadArguments arguments{fragment, row, where};
    meet(transposed ? kLoadTransposed : kLoad, &arguments, where);
}

void stmatrix_transposed(SharedAddress row, const uint32_t (&fragment)[4], Where where) {
    StoreArguments arguments{fragment, row, where};
    meet(kStoreTransposed, &arguments, where);
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
    ProductArguments arguments{d, a, {b0, b1}};
    meet(kProduct<T>, &arguments, where);
}
template void multiply<bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, Where);
template void multiply<fp16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, Where);

}  // namespace attnfuse::emulation
