// Barriers of some of a block's warps, and its registers.
#include "warpgroup.h"

#include <algorithm>
#include <utility>

namespace attnfuse::emulation {
namespace {

constexpr Collective kSync{"named_barrier_sync", nullptr};
constexpr Collective kRegisters{"take_registers", nullptr};

struct Wanted {
    int count;
    Where where;
};

void execute_set_registers(Warp& warp) {
    const auto& first = *static_cast<Wanted*>(warp.arguments[0]);
    for (int lane = 1; lane < 32; ++lane) {
        const auto& mine = *static_cast<Wanted*>(warp.arguments[lane]);
        if (mine.count != first.count) {
            fail(
                who(warp.threads[lane]) + " at " + place(mine.where) + " sets registers to have " +
                std::to_string(mine.count) + ", and thread " + std::to_string(warp.threads[0].index) +
                " of its warp to have " + std::to_string(first.count));
        }
    }
}
constexpr Collective kGive{"give_registers", execute_set_registers};
constexpr Collective kTake{"take_registers", execute_set_registers};

// The running thread arrives. True if it was the last, and those that waited have been released.
bool arrive(int id, int threads, const char* verb, Where where) {
    Thread& thread = *current;
    Block& block = *thread.block;
    start_clocks(block);
    const auto complain = [&](const std::string& what) {
        fail(who(thread) + " at " + place(where) + " " + verb + " named barrier " + std::to_string(id) + what);
    };
    if (id < 1 || id > 15) {
        complain(", of which there are 1 to 15");
    }
    if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(block.threads.size())) {
        complain(" for " + std::to_string(threads) + " threads of a block of " + std::to_string(block.threads.size()));
    }
    NamedBarrier& barrier = block.named_barriers[id];
    if (barrier.threads == 0) {
        barrier.threads = threads;
    } else if (barrier.threads != threads) {
        complain(
            " for " + std::to_string(threads) + " threads, where others have come for " +
            std::to_string(barrier.threads));
    }
    if (std::find(barrier.arrived.begin(), barrier.arrived.end(), &thread) != barrier.arrived.end()) {
        complain(" a second time before it has opened");
    }
    barrier.arrived.push_back(&thread);
    join(barrier.clock, thread.clock);
    ++thread.clock[thread.index];
    if (static_cast<int>(barrier.arrived.size()) < threads) {
        return false;
    }
    for (Thread* waiting : barrier.waiting) {
        join(waiting->clock, barrier.clock);
        release(*waiting);
    }
    return true;
}

}  // namespace

void sync_named_barrier(int id, int threads, Where where) {
    maybe_yield();
    Thread& thread = *current;
    const bool opened = arrive(id, threads, "syncs at", where);
    NamedBarrier& barrier = thread.block->named_barriers[id];
    if (opened) {
        join(thread.clock, barrier.clock);
        barrier = {};
        return;
    }
    barrier.waiting.push_back(&thread);
    wait(kSync, where);
}

void arrive_named_barrier(int id, int threads, Where where) {
    maybe_yield();
    if (arrive(id, threads, "arrives at", where)) {
        current->block->named_barriers[id] = {};
    }
}

void set_registers(int count, bool gives, Where where) {
    Thread& thread = *current;
    Block& block = *thread.block;
    Wanted wanted{count, where};
    meet(gives ? kGive : kTake, &wanted, where);
    const auto complain = [&](const std::string& what) {
        fail(
            who(thread) + " at " + place(where) + (gives ? " gives" : " takes") + " registers to have " +
            std::to_string(count) + ", " + what);
    };
    if (count < 24 || count > 256 || count % 8 != 0) {
        complain("which must be 24 to 256 and a multiple of 8");
    }
    if (gives ? count > thread.registers : count < thread.registers) {
        complain("but it has " + std::to_string(thread.registers));
    }
    while (count - thread.registers > block.free_registers) {
        block.want_registers.push_back(&thread);
        wait(kRegisters, where);
    }
    block.free_registers -= count - thread.registers;
    thread.registers = count;
    if (gives) {
        for (Thread* waiting : std::exchange(block.want_registers, {})) {
            release(*waiting);
        }
    }
}

void fence_proxy() {
    maybe_yield();
    Thread& thread = *current;
    if (!thread.block->clocked) {
        start_clocks(*thread.block);
    }
    thread.proxy_fences.push_back(thread.clock[thread.index]);
    ++thread.clock[thread.index];
}

}  // namespace attnfuse::emulation
