// What a block of sm_90 has in flight, and who has seen what of whom where barriers are no longer the whole block's.
//
// A thread has a clock: its own time, and the latest time of every other thread that it knows to be over. What it
// releases (an arrival at an mbarrier or a named barrier) carries its clock, and whoever waits for that takes it over.
// A thread's own time goes on at each release. So an access at time t of thread u is over for all whose clock has at
// least t at u. Landed copies are the deeds of an agent for each mbarrier, which has a place in the clocks too.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "memory.h"

namespace attnfuse::emulation {

struct Block;
struct Thread;
struct Warp;

// Places for threads, then for the agents of so many mbarriers.
using Clock = std::vector<uint32_t>;
constexpr int kMbarriers = 64;
// Both are of one length, or `from` is empty.
void join(Clock& into, const Clock& from);

struct Mbarrier {
    uint32_t address = 0;
    int index = 0;  // in the block
    int expected = 0;
    int pending = 0;
    int64_t bytes = 0;  // announced and not landed
    int64_t phase = 0;  // completed ones
    uint32_t landed = 0;
    Access made;
    Where where;
    Clock arriving, completed;
    std::vector<Thread*> waiting;
};

struct NamedBarrier {
    int threads = 0;  // 0 = nobody has come
    Clock clock;
    std::vector<Thread*> arrived;
    std::vector<Thread*> waiting;
};

// Eight numbers of a tensor map, as the emulation keeps them in its 128 bytes.
struct TensorMapFields {
    unsigned char* data;
    uint64_t sizes[4];
    uint64_t strides[3];
    uint32_t box_rows;
    uint32_t magic;
};

struct Box {
    TensorMapFields map;
    int at[4];  // column, row, head, batch
};

// Bytes in a row.
struct Stretch {
    unsigned char* begin;
    uint32_t bytes;
};

// What a bulk copy moves of global memory (tma.cpp).
using Region = std::variant<Box, Stretch>;

struct BulkCopy {
    uint32_t to = 0;
    Region region;
    int mbarrier = 0;
    int64_t phase = 0;  // of the mbarrier when it was begun
    Where where;
};

struct BulkStore {
    uint32_t from = 0;
    Region region;
    bool adds = false;  // float32 numbers, to what is there
    bool committed = false;
    std::shared_ptr<AsyncDone> done;
    Where where;
};

// A stretch of a thread's registers that a wgmma_fence has named, and what they held.
struct FencedRegisters {
    const void* begin;
    std::size_t bytes;
    uint64_t hash;
};

// The 32 lanes' registers d of a product, from the first product that adds to them to the wait that names them.
struct Accumulators {
    float* lanes[32];
    int count = 0;  // floats a lane
    std::vector<float> values;
    int products = 0;  // not yet executed
    Where where;
};

// Where A is, and which way rows in shared memory run if not along K.
struct ProductForm {
    bool a_in_registers = false;
    bool a_along_m = false;
    bool b_along_n = false;
    bool operator==(const ProductForm&) const = default;
};

struct Product {
    std::shared_ptr<Accumulators> to;
    bool accumulate = false;
    ProductForm form;
    bool is_bf16 = false;
    uint64_t a = 0, b = 0;
    const uint32_t* lanes[32] = {};  // A's registers
    std::vector<uint32_t> values;    // and what they held
    std::shared_ptr<AsyncDone> done;
    Where where;
};

struct WarpProducts {
    std::deque<Product> issued;
    std::deque<int> groups;
    int uncommitted = 0;
    std::vector<std::shared_ptr<Accumulators>> accumulators;
    int64_t count = 0;  // of all products so far
};

// The products that the four warps of a warpgroup have issued: all the same ones.
struct WarpgroupLog {
    struct Entry {
        uint64_t a, b;
        int columns;
        ProductForm form;
        bool accumulate;
        Where where;
    };
    std::deque<Entry> entries;
    int64_t first = 0;  // the number of entries[0]
};

void start_asynchronous(Block& block);
void check_thread_end(Thread& thread);
void check_block_end(Block& block);
// One copy in flight, drawn from the seed, lands; false if there is none.
bool land_some_copy(Block& block);
// The same now and then.
void maybe_land_copy(Block& block);
// What a deadlock's report says of mbarriers that somebody waits for.
std::string mbarrier_states(const Block& block);

}  // namespace attnfuse::emulation
