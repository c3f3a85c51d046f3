// Blocks, the scheduler, barriers and the meeting of a warp's lanes.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace attnfuse::emulation {
namespace {

constexpr Collective kBarrier{"barrier", nullptr};
// How many shared stores, copies and atomics pass between two switches of threads: 1 to this.
constexpr uint32_t kAccessesToYield = 64;

Fiber host;
Stacks stacks;
std::vector<Block> slots;
std::vector<Thread*> runnable;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_argument = nullptr;
std::exception_ptr failure;
uint32_t last_epoch = 0;
uint64_t random_state = 1;

// There is one: a block in which nobody can run is a deadlock, reported before.
Thread& take_runnable() {
    Thread*& chosen = runnable[random_below(runnable.size())];
    Thread& thread = *std::exchange(chosen, runnable.back());
    runnable.pop_back();
    return thread;
}

// From the running thread to another, until that one is taken again.
void switch_threads() {
    Thread& from = *current;
    Thread& to = take_runnable();
    if (&from != &to) {
        current = &to;
        switch_fiber(from.fiber, to.fiber);
    }
}

bool same_line(Where a, Where b) {
    return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

bool same_state(const Thread& a, const Thread& b) {
    return a.returned == b.returned && a.waits_in == b.waits_in &&
           (a.waits_in == nullptr || same_line(a.where, b.where));
}

// "threads 0-31 and 64-127 wait at barrier tile.cuh:120; threads 32-63 have returned"
std::string states(const Block& block) {
    std::string text;
    const std::vector<Thread>& threads = block.threads;
    const int count = static_cast<int>(threads.size());
    std::vector<bool> told(count, false);
    for (int first = 0; first < count; ++first) {
        if (told[first]) {
            continue;
        }
        std::vector<std::string> ranges;
        int members = 0;
        for (int begin = first; begin < count; ++begin) {
            if (!same_state(threads[first], threads[begin])) {
                continue;
            }
            int end = begin;
            for (; end < count && same_state(threads[first], threads[end]); ++end) {
                told[end] = true;
            }
            members += end - begin;
            ranges.push_back(std::to_string(begin) + (end - begin > 1 ? "-" + std::to_string(end - 1) : ""));
            begin = end;
        }
        const bool one = members == 1;
        text += (text.empty() ? "" : "; ") + std::string(one ? "thread " : "threads ") + ranges[0];
        for (std::size_t i = 1; i < ranges.size(); ++i) {
            text += (i + 1 < ranges.size() ? ", " : " and ") + ranges[i];
        }
        const Thread& state = threads[first];
        if (state.returned) {
            text += one ? " has returned" : " have returned";
        } else if (state.waits_in == nullptr) {
            text += one ? " runs" : " run";
        } else {
            text += std::string(one ? " waits at " : " wait at ") + state.waits_in->name + " " + place(state.where);
        }
    }
    return text;
}

// Called when a thread has stopped running, for good or to wait. Copies land at last where nobody else can go on.
void check_progress(Block& block) {
    while (block.running == 0 && block.unreturned != 0 && land_some_copy(block)) {
    }
    if (block.running == 0 && block.unreturned != 0) {
        fail("deadlock in block " + std::to_string(block.index) + ": " + states(block) + mbarrier_states(block));
    }
}

void thread_returned(Thread& thread) {
    if (!thread.copies.empty()) {
        fail(
            who(thread) + " returned with copies in flight: the first was begun at " + place(thread.copies[0].where) +
            " and never waited for");
    }
    check_thread_end(thread);
    thread.returned = true;
    --thread.block->running;
    --thread.block->unreturned;
    check_progress(*thread.block);
    if (thread.block->unreturned == 0) {
        check_block_end(*thread.block);
    }
}

// What a fiber runs. A block's last thread goes back to the host, which cannot reuse a stack from on top of it.
void run_thread() {
    Thread& thread = *current;
    try {
        kernel_body(kernel_argument);
        thread_returned(thread);
    } catch (...) {
        failure = std::current_exception();
    }
    if (failure || thread.block->unreturned == 0) {
        leave_fiber(thread.fiber, host);
    }
    current = &take_runnable();
    leave_fiber(thread.fiber, current->fiber);
}

void start_block(Block& block, int index, int shared_bytes) {
    const int count = static_cast<int>(block.threads.size());
    block.index = index;
    block.epoch = ++last_epoch;
    block.first_epoch = block.epoch;
    block.running = count;
    block.unreturned = count;
    block.shared.reset(shared_bytes);
    start_asynchronous(block);
    const int first_stack = static_cast<int>(&block - slots.data()) * count;
    for (Thread& thread : block.threads) {
        thread.returned = false;
        thread.groups.clear();
        stacks.prepare(thread.fiber, first_stack + thread.index, run_thread);
        runnable.push_back(&thread);
    }
}

void shape_slots(int count, int threads) {
    slots.resize(count);
    for (Block& block : slots) {
        block.threads.resize(threads);
        block.warps.resize(threads / 32);
        for (int i = 0; i < threads; ++i) {
            Thread& thread = block.threads[i];
            thread.block = &block;
            thread.warp = &block.warps[i / 32];
            thread.index = i;
            thread.lane = i % 32;
            if (thread.lane == 0) {
                thread.warp->threads = &thread;
            }
        }
    }
}

}  // namespace

// By xorshift.
uint32_t random_below(uint64_t bound) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1du >> 32) * bound >> 32);
}

void wait(const Collective& collective, Where where) {
    Thread& thread = *current;
    thread.waits_in = &collective;
    thread.where = where;
    --thread.block->running;
    check_progress(*thread.block);
    switch_threads();
}

void release(Thread& thread) {
    thread.waits_in = nullptr;
    ++thread.block->running;
    runnable.push_back(&thread);
}

void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

std::string who(const Thread& thread) {
    return "block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index);
}

void yield() {
    runnable.push_back(current);
    switch_threads();
}

void yield_and_rearm() {
    accesses_to_yield = 1 + static_cast<int>(random_below(kAccessesToYield));
    maybe_land_copy(*current->block);
    yield();
}

void barrier(Where where) {
    Block& block = *current->block;
    if (++block.at_barrier < static_cast<int>(block.threads.size())) {
        wait(kBarrier, where);
        return;
    }
    for (const Thread& thread : block.threads) {
        if (&thread != current && !same_line(thread.where, where)) {
            current->waits_in = &kBarrier;
            current->where = where;
            fail("block " + std::to_string(block.index) + " meets in different barriers: " + states(block));
        }
    }
    block.at_barrier = 0;
    block.epoch = ++last_epoch;
    join_clocks(block.threads.data(), static_cast<int>(block.threads.size()));
    for (Thread& thread : block.threads) {
        if (&thread != current) {
            release(thread);
        }
    }
}

void meet(const Collective& collective, void* arguments, Where where) {
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    if (warp.arrived == 0) {
        warp.first_arrived = thread.lane;
    } else {
        const Thread& first = warp.threads[warp.first_arrived];
        if (first.waits_in != &collective || !same_line(first.where, where)) {
            fail(
                who(thread) + " calls " + collective.name + " at " + place(where) + " while thread " +
                std::to_string(first.index) + " of its warp waits at " + first.waits_in->name + " " +
                place(first.where));
        }
    }
    warp.arguments[thread.lane] = arguments;
    if (++warp.arrived < 32) {
        wait(collective, where);
        return;
    }
    collective.execute(warp);
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) {
        if (lane != thread.lane) {
            release(warp.threads[lane]);
        }
    }
}

void run(int64_t blocks, int threads, int shared_bytes, void (*body)(const void*), const void* argument) {
    if (threads <= 0 || threads > 1024 || threads % 32 != 0) {
        fail("a launch takes 32 to 1024 threads a block, a multiple of 32, not " + std::to_string(threads));
    }
    if (shared_bytes < 0 || shared_bytes > shared_memory_bytes) {
        fail(
            "a launch asks for " + std::to_string(shared_bytes) + " bytes of shared memory a block, the device has " +
            std::to_string(shared_memory_bytes));
    }
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    kernel_body = body;
    kernel_argument = argument;
    launched_blocks = static_cast<int>(blocks);
    // Seeds that differ in one bit shall differ in all.
    random_state = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    accesses_to_yield = 1;
    global_writes.clear();

    std::vector<int> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random_below(i)]);
    }
    const int resident = static_cast<int>(std::min<int64_t>(blocks, std::max(resident_blocks, 1)));
    shape_slots(resident, threads);
    stacks.reserve(resident * threads);
    std::size_t started = 0, finished = 0;
    for (Block& block : slots) {
        start_block(block, order[started++], shared_bytes);
    }
    while (finished < order.size()) {
        current = &take_runnable();
        switch_fiber(host, current->fiber);
        if (failure) {
            break;
        }
        ++finished;
        if (started < order.size()) {
            start_block(*current->block, order[started++], shared_bytes);
        }
    }
    current = nullptr;
    if (failure) {
        // The other threads are abandoned where they stand, and all that was known of them.
        runnable.clear();
        slots.clear();
        std::rethrow_exception(std::exchange(failure, nullptr));
    }
}

}  // namespace attnfuse::emulation
