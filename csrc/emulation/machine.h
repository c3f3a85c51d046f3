// The emulated machine: blocks of threads, each thread a fiber, run in an order drawn from a seed on one OS thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "fiber.h"
#include "keywords.h"
#include "memory.h"

namespace attnfuse::emulation {

// Settings: of every launch that follows.
inline uint64_t seed = 1;
inline int resident_blocks = 2;
inline int shared_memory_bytes = 163 * 1024;
// Compute capability, 80 or 90: which kernels the launchers choose.
inline int architecture = 80;
// How many blocks a persistent kernel has.
inline int multiprocessors = 2;

// Whether this thread of the host has made a device current, without which a driver makes no tensor map.
inline thread_local bool has_context = false;

// Rows that ldmatrix had to read, or stmatrix to write, one after another since the process began.
inline int64_t bank_conflicts = 0;

inline void set_seed(uint64_t value) { seed = value; }
// How many blocks run at a time, their threads interleaved.
inline void set_resident_blocks(int count) { resident_blocks = count; }
inline void set_shared_memory_limit(int bytes) { shared_memory_bytes = bytes; }
// A card of this architecture, with the shared memory that its blocks may have.
inline void set_architecture(int value) {
    architecture = value;
    shared_memory_bytes = (value == 90 ? 227 : 163) * 1024;
}
inline void set_multiprocessors(int count) { multiprocessors = count; }

struct Block;
struct Warp;

// What the threads of a warp or a block do together. The last of a warp's lanes to arrive executes it for all.
struct Collective {
    const char* name;
    void (*execute)(Warp& warp);
};

struct Thread {
    Fiber fiber;
    Block* block = nullptr;
    Warp* warp = nullptr;
    int index = 0;
    int lane = 0;
    const Collective* waits_in = nullptr;
    Where where;
    bool returned = false;
    // Issued and not landed, oldest first: the copies of each committed group, then uncommitted ones.
    std::vector<Copy> copies;
    std::vector<int> groups;
    int uncommitted = 0;
    // Where the block has asynchronous barriers: what this thread has seen of the others, its fences and its registers.
    Clock clock;
    std::vector<uint32_t> proxy_fences;  // its own clock at each
    std::vector<int64_t> phases;         // of each mbarrier, the last that it has waited for
    std::vector<FencedRegisters> fenced;
    std::vector<BulkStore> stores;  // not yet known to have been read
    int registers = 0;
};

struct Warp {
    Thread* threads = nullptr;
    uint16_t epoch = 0;
    int arrived = 0;
    int first_arrived = 0;     // its lane
    void* arguments[32] = {};  // of each lane
    WarpProducts products;
};

struct Block {
    int index = 0;
    uint32_t epoch = 0;
    int running = 0;  // threads that neither wait nor have returned
    int unreturned = 0;
    int at_barrier = 0;
    uint32_t first_epoch = 0;
    bool clocked = false;  // whether threads have clocks: from the first asynchronous barrier on
    std::vector<Mbarrier> mbarriers;
    NamedBarrier named_barriers[16];
    std::vector<BulkCopy> bulk_copies;  // in flight
    std::vector<WarpgroupLog> products;
    int free_registers = 0;
    std::vector<Thread*> want_registers;
    SharedMemory shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
};

// The thread that runs, and how many blocks its launch has.
inline Thread* current = nullptr;
inline int launched_blocks = 0;
inline GlobalWrites global_writes;

[[noreturn]] void fail(const std::string& sentence);
// "block 3, thread 5"
std::string who(const Thread& thread);

// 0 to bound - 1, from the seed.
uint32_t random_below(uint64_t bound);

// The running thread waits, until another releases it. The collective only names what for.
void wait(const Collective& collective, Where where);
void release(Thread& thread);
// Threads have clocks from here on.
void start_clocks(Block& block);
// These threads have all seen what each of them has.
void join_clocks(Thread* threads, int count);

void barrier(Where where);
// The 32 lanes of a warp meet, each with arguments of its own. They must call the same collective from the same line.
void meet(const Collective& collective, void* arguments, Where where);
// Another thread may go on first.
void yield();
// The same now and then: where yielding every time would cost too much.
inline int accesses_to_yield = 1;
void yield_and_rearm();
inline void maybe_yield() {
    if (--accesses_to_yield == 0) {
        yield_and_rearm();
    }
}

// Runs body(argument) in every thread; throws std::runtime_error with what was wrong first.
void run(int64_t blocks, int threads, int shared_bytes, void (*body)(const void*), const void* argument);

}  // namespace attnfuse::emulation
