// The emulated machine: blocks of threads, each thread a fiber, run in an order drawn from a seed on one OS thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "keywords.h"
#include "memory.h"

namespace attnfuse::emulation {

// Settings: of every launch that follows.
inline uint64_t seed = 1;
inline int resident_blocks = 2;
inline int shared_memory_bytes = 163 * 1024;

// Rows that ldmatrix had to read one after another since the process began.
inline int64_t bank_conflicts = 0;

inline void set_seed(uint64_t value) { seed = value; }
// How many blocks run at a time, their threads interleaved.
inline void set_resident_blocks(int count) { resident_blocks = count; }
inline void set_shared_memory_limit(int bytes) { shared_memory_bytes = bytes; }

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
};

struct Warp {
    Thread* threads = nullptr;
    uint16_t epoch = 0;
    int arrived = 0;
    int first_arrived = 0;     // its lane
    void* arguments[32] = {};  // of each lane
};

struct Block {
    int index = 0;
    uint32_t epoch = 0;
    int running = 0;  // threads that neither wait nor have returned
    int unreturned = 0;
    int at_barrier = 0;
    SharedMemory shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
};

// The thread that runs.
inline Thread* current = nullptr;
inline GlobalWrites global_writes;

[[noreturn]] void fail(const std::string& sentence);
// "block 3, thread 5"
std::string who(const Thread& thread);

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
