// Clocks, and what must be over when a thread or a block ends.
#include "asynchronous.h"

#include <algorithm>

#include "machine.h"

namespace attnfuse::emulation {

void join(Clock& into, const Clock& from) {
    if (into.size() < from.size()) {
        into.resize(from.size());
    }
    for (std::size_t i = 0; i < from.size(); ++i) {
        into[i] = std::max(into[i], from[i]);
    }
}

void start_clocks(Block& block) {
    if (block.clocked) {
        return;
    }
    block.clocked = true;
    for (Thread& thread : block.threads) {
        thread.clock.assign(block.threads.size() + kMbarriers, 0);
        thread.clock[thread.index] = 1;
    }
}

void join_clocks(Thread* threads, int count) {
    if (!threads->block->clocked) {
        return;
    }
    Clock all;
    for (int i = 0; i < count; ++i) {
        join(all, threads[i].clock);
    }
    for (int i = 0; i < count; ++i) {
        threads[i].clock = all;
        ++threads[i].clock[threads[i].index];
    }
}

void start_asynchronous(Block& block) {
    const int threads = static_cast<int>(block.threads.size());
    block.clocked = false;
    block.mbarriers.clear();
    for (NamedBarrier& barrier : block.named_barriers) {
        barrier = {};
    }
    block.bulk_copies.clear();
    block.products.assign((threads + 127) / 128, {});
    // What launch bounds leave a thread of a block that has a multiprocessor to itself, in steps of 8.
    const int registers = std::min(65536 / threads / 8 * 8, 255);
    block.free_registers = 65536 - registers * threads;
    block.want_registers.clear();
    for (Thread& thread : block.threads) {
        thread.clock.clear();
        thread.proxy_fences.clear();
        thread.phases.clear();
        thread.fenced.clear();
        thread.stores.clear();
        thread.registers = registers;
    }
    for (Warp& warp : block.warps) {
        warp.products = {};
    }
}

void check_thread_end(Thread& thread) {
    if (!thread.stores.empty()) {
        fail(
            who(thread) + " returned before the store begun at " + place(thread.stores[0].where) +
            " had read shared memory: a tma_wait_read is missing");
    }
    const WarpProducts& products = thread.warp->products;
    if (!products.issued.empty()) {
        fail(
            who(thread) + " returned with products in flight: the first was issued at " +
            place(products.issued[0].where) + " and never waited for");
    }
}

void check_block_end(Block& block) {
    const std::string name = "block " + std::to_string(block.index) + " ended ";
    if (!block.bulk_copies.empty()) {
        fail(
            name + "with a copy in flight: it was begun at " + place(block.bulk_copies[0].where) +
            " and never waited for");
    }
    for (const Mbarrier& barrier : block.mbarriers) {
        if (barrier.bytes != 0) {
            fail(
                name + "with the mbarrier made at " + place(barrier.where) + " expecting " +
                std::to_string(barrier.bytes) + " bytes");
        }
    }
    for (std::size_t warp = 0; warp < block.warps.size(); ++warp) {
        const std::size_t first = warp / 4 * 4;
        if (block.warps[warp].products.count != block.warps[first].products.count) {
            fail(
                name + "after warp " + std::to_string(first) + " had issued " +
                std::to_string(block.warps[first].products.count) + " products and warp " + std::to_string(warp) +
                " of its warpgroup " + std::to_string(block.warps[warp].products.count));
        }
    }
}

}  // namespace attnfuse::emulation
