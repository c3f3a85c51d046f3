// Phases, arrivals and bytes of mbarriers.
#include "mbarrier.h"

#include <utility>

namespace attnfuse::emulation {
namespace {

constexpr Collective kWait{"mbarrier_wait", nullptr};
// The hardware's bound on the bytes of a phase.
constexpr int64_t kMostBytes = (1 << 20) - 1;
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr int64_t kNoPhase = -2;

std::string name(const Mbarrier& barrier) {
    return "the mbarrier at byte " + std::to_string(barrier.address - kSharedBase) + " (made at " +
           place(barrier.where) + ")";
}

void complete_if_done(Block& block, Mbarrier& barrier, Where where) {
    if (barrier.pending != 0) {
        return;
    }
    const auto phase = " phase " + std::to_string(barrier.phase) + " of " + name(barrier) + " ";
    if (barrier.bytes < 0) {
        fail(
            "in" + phase + std::to_string(-barrier.bytes) +
            " more bytes have landed than were expected, the last of a copy begun at " + place(where));
    }
    if (barrier.bytes != 0) {
        return;
    }
    for (const BulkCopy& copy : block.bulk_copies) {
        if (copy.mbarrier == barrier.index) {
            fail(
                "with what happened at " + place(where) + phase + "completes while the copy begun at " +
                place(copy.where) + " is in flight: fewer bytes are expected than are copied");
        }
    }
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.completed = barrier.arriving;
    for (Thread* thread : std::exchange(barrier.waiting, {})) {
        release(*thread);
    }
}

}  // namespace

Mbarrier& find_mbarrier(SharedAddress address, Where where) {
    Thread& thread = *current;
    for (Mbarrier& barrier : thread.block->mbarriers) {
        if (barrier.address == address) {
            if (thread.block->shared.unseen(thread, barrier.made)) {
                fail(
                    who(thread) + " at " + place(where) + " uses " + name(barrier) +
                    " with no barrier since it was made by thread " + std::to_string(barrier.made.thread));
            }
            return barrier;
        }
    }
    fail(
        who(thread) + " at " + place(where) + " uses an mbarrier at byte " +
        std::to_string(static_cast<int64_t>(address) - kSharedBase) + ", where none was made");
}

void init_mbarrier(SharedAddress address, int arrivals, Where where) {
    maybe_yield();
    Thread& thread = *current;
    Block& block = *thread.block;
    start_clocks(block);
    if (arrivals < 1 || arrivals > kMostArrivals) {
        fail(who(thread) + " at " + place(where) + " makes an mbarrier for " + std::to_string(arrivals) + " arrivals");
    }
    if (block.mbarriers.size() == kMbarriers) {
        fail("the emulation has room for " + std::to_string(kMbarriers) + " mbarriers a block");
    }
    block.shared.write(thread, address, 8, where);
    Mbarrier barrier;
    barrier.address = address;
    barrier.index = static_cast<int>(block.mbarriers.size());
    barrier.expected = barrier.pending = arrivals;
    barrier.made = block.shared.reserve(thread, address, 8, where);
    barrier.where = where;
    block.mbarriers.push_back(std::move(barrier));
}

void arrive_mbarrier(SharedAddress address, int64_t bytes, Where where) {
    maybe_yield();
    Thread& thread = *current;
    Mbarrier& barrier = find_mbarrier(address, where);
    barrier.bytes += bytes;
    if (bytes < 0 || barrier.bytes > kMostBytes) {
        fail(
            who(thread) + " at " + place(where) + " announces " + std::to_string(bytes) + " bytes at " + name(barrier) +
            ", which takes " + std::to_string(kMostBytes) + " a phase");
    }
    join(barrier.arriving, thread.clock);
    ++thread.clock[thread.index];
    if (barrier.pending == 0) {
        fail(
            who(thread) + " at " + place(where) + " arrives at " + name(barrier) + " where all " +
            std::to_string(barrier.expected) + " have arrived in phase " + std::to_string(barrier.phase) +
            " and bytes are to come");
    }
    --barrier.pending;
    complete_if_done(*thread.block, barrier, where);
}

void bytes_landed(Block& block, Mbarrier& barrier, uint32_t bytes, Where where) {
    barrier.bytes -= bytes;
    if (barrier.arriving.empty()) {
        barrier.arriving.resize(block.threads.size() + kMbarriers);
    }
    barrier.arriving[block.threads.size() + barrier.index] = barrier.landed;
    complete_if_done(block, barrier, where);
}

void wait_mbarrier(SharedAddress address, int parity, Where where) {
    maybe_land_copy(*current->block);
    maybe_yield();
    Thread& thread = *current;
    const int index = find_mbarrier(address, where).index;
    // Others may make mbarriers while this thread waits: no reference is kept.
    const auto barrier = [&]() -> Mbarrier& { return thread.block->mbarriers[index]; };
    if (thread.phases.empty()) {
        thread.phases.assign(kMbarriers, kNoPhase);
    }
    int64_t& seen = thread.phases[index];
    const int64_t wanted = seen == kNoPhase ? (parity == 1 ? -1 : 0) : seen + 1;
    const auto complain = [&](const std::string& what) {
        fail(who(thread) + " at " + place(where) + " waits at " + name(barrier()) + " " + what);
    };
    if (parity != (wanted & 1)) {
        complain(
            "for parity " + std::to_string(parity) + ", but the next phase it has not waited for is " +
            std::to_string(wanted));
    }
    while (barrier().phase <= wanted) {
        barrier().waiting.push_back(&thread);
        wait(kWait, where);
    }
    if (barrier().phase > wanted + 1 && wanted >= 0) {
        complain(
            "for phase " + std::to_string(wanted) + " when it is already in phase " + std::to_string(barrier().phase) +
            ", of which the parity is the same");
    }
    seen = wanted;
    if (wanted >= 0) {
        join(thread.clock, barrier().completed);
    }
}

std::string mbarrier_states(const Block& block) {
    std::string text;
    for (const Mbarrier& barrier : block.mbarriers) {
        if (!barrier.waiting.empty()) {
            text += "; " + name(barrier) + " is in phase " + std::to_string(barrier.phase) + ", " +
                    std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected) + " arrivals and " +
                    std::to_string(barrier.bytes) + " bytes short";
        }
    }
    return text;
}

}  // namespace attnfuse::emulation
