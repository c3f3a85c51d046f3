// The memories of an emulated launch, and what is known of each word: who touched it last, and what is in flight to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace attnfuse::emulation {

struct Thread;
// The line of a kernel's source that called; every function of csrc/device/ has it as a last, defaulted argument.
using Where = std::source_location;

// Not 0, so that an address without its base is out of range.
constexpr uint32_t kSharedBase = 1024;

// A thread at a line in a stretch of time. block_epoch changes at every barrier and is never used twice, warp_epoch
// changes at every warp_sync; two threads are ordered where the epoch they share has changed between them.
struct Access {
    uint32_t block_epoch = 0;
    uint16_t warp_epoch = 0;
    uint16_t thread = 0;
    uint16_t line = 0;  // by line_id(); 0 = no access
};

// A copy from global memory that has not been waited for.
struct Copy {
    uint32_t to;
    uint32_t bytes;
    const void* from;  // null = zeros
    Where where;
};

// A block's shared memory. Each function checks one access, all of whose bytes must be in range, aligned to their
// number and landed, and throws std::runtime_error; what it returns points to those bytes.
class SharedMemory {
  public:
    // As a block finds it when it starts: exactly this long, NaN in every format.
    void reset(int bytes);
    const unsigned char* read(const Thread& thread, uint32_t address, uint32_t bytes, Where where);
    unsigned char* write(const Thread& thread, uint32_t address, uint32_t bytes, Where where);
    // From here until land() nobody may touch the bytes.
    void begin_copy(const Thread& thread, const Copy& copy);
    unsigned char* land(const Thread& thread, const Copy& copy);

  private:
    // The latest reader of a warp, and another of its lanes in the same warp epoch: a writer is at most one of them.
    struct Reader {
        Access last;
        uint16_t other_thread = 0;
        uint16_t other_line = 0;
    };
    // Two bytes. readers are of two warps, the latest first: a writer is in at most one of them.
    struct Granule {
        Access writer;
        Reader readers[2];
        uint16_t copy_thread = 0;
        uint16_t copy_line = 0;
    };

    Granule* check(const Thread& thread, uint32_t address, uint32_t bytes, const char* verb, Where where);
    void check_write(const Thread& thread, const Access& me, const Granule& granule) const;
    [[noreturn]] void race(
        const Thread& thread, const Granule& granule, const Access& first, const char* first_verb, const Access& second,
        const char* second_verb) const;
    static void note_reader(Granule& granule, const Access& me);

    std::unique_ptr<unsigned char[]> memory_;
    int bytes_ = -1;
    std::vector<Granule> granules_;
};

// Who wrote what of global memory in this launch, by 4-byte words or smaller elements. Blocks have no order, so that
// an address is one thread's to store or everybody's to add to, and nobody's to load in another block.
class GlobalWrites {
  public:
    void clear();
    void load(const Thread& thread, const void* from, std::size_t bytes, Where where);
    void store(const Thread& thread, const void* to, std::size_t bytes, Where where);
    void add(const Thread& thread, const void* to, Where where);

  private:
    struct Entry {
        uintptr_t address = 0;
        uint32_t launch = 0;  // an entry of an earlier launch is free
        int32_t block = 0;
        Access writer;
        bool stored = false;
        bool many_threads = false;
        bool many_blocks = false;
    };

    Entry& find(uintptr_t address);
    Entry& insert(uintptr_t address);
    [[noreturn]] static void fail_after(const Entry& entry, const Thread& thread, const char* verb, Where where);

    std::vector<Entry> entries_;
    std::size_t used_ = 0;
    uint32_t launch_ = 1;
};

// "tile.cuh:33"
std::string place(Where where);

}  // namespace attnfuse::emulation
