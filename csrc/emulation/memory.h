// The memories of an emulated launch, and what is known of each word: who touched it last, and what is in flight to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace attnfuse::emulation {

struct Block;
struct Thread;
// The line of a kernel's source that called; every function of csrc/device/ has it as a last, defaulted argument.
using Where = std::source_location;

// Not 0, so that an address without its base is out of range.
constexpr uint32_t kSharedBase = 1024;

// A thread at a line in a stretch of time. block_epoch changes at every barrier and is never used twice, warp_epoch
// changes at every warp_sync; two threads are ordered where the epoch they share has changed between them, or where
// the later one's clock has reached the earlier one's time (asynchronous.h).
struct Access {
    uint32_t block_epoch = 0;
    uint32_t time = 0;
    uint16_t warp_epoch = 0;
    uint16_t thread = 0;  // from kAgents on, the copies that count for an mbarrier of the block
    uint16_t line = 0;    // by line_id(); 0 = no access
};
constexpr uint16_t kAgents = 0x8000;

// Something that reads shared memory by itself. Over when complete, for those whose clock has reached one of the times
// at which threads first_thread on have waited for it.
struct AsyncDone {
    bool complete = false;
    int first_thread = 0;
    std::vector<uint32_t> times;
};

// The address with its 16-byte chunk where a swizzle of 128 bytes puts it.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

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

    // The same of bulk copies, which write behind threads' backs: what threads have written there must be fenced.
    void begin_bulk_copy(const Thread& thread, uint32_t to, uint32_t bytes, Where where);
    void land_bulk_copy(const Block& block, uint32_t to, uint32_t bytes, int mbarrier, uint32_t time, Where where);
    // From here until `done` nobody may write to the bytes; all that was written to them is there, and fenced.
    void begin_async_read(
        const Thread& thread, uint32_t from, uint32_t bytes, const std::shared_ptr<AsyncDone>& done, Where where);
    // The bytes of an mbarrier, which nothing else may touch.
    Access reserve(const Thread& thread, uint32_t address, uint32_t bytes, Where where);
    // Whether nothing orders the access before what this thread does now, and whether a proxy_fence came between.
    bool unseen(const Thread& thread, const Access& before) const;
    bool fenced(const Thread& thread, const Access& before) const;
    // Unchecked.
    unsigned char* bytes_at(uint32_t address) { return memory_.get() + (address - kSharedBase); }

  private:
    // The latest reader of a warp, and another of its lanes in the same warp epoch: a writer is at most one of them.
    struct Reader {
        Access last;
        uint16_t other_thread = 0;
        uint16_t other_line = 0;
        uint32_t other_time = 0;
    };
    // Two bytes.
    struct Granule {
        Access writer;
        uint16_t copy_thread = 0;  // kReserved: an mbarrier
        uint16_t copy_line = 0;
    };
    // Of a granule, of two warps, the latest first: a writer is in at most one of them.
    struct Readers {
        Reader of[2];
    };
    struct AsyncRead {
        uint32_t begin, end;  // granules
        std::shared_ptr<AsyncDone> done;
        uint16_t line;
    };
    static constexpr uint16_t kReserved = 0xffff;

    // The number of the first granule.
    uint32_t check(
        const Thread& thread, uint32_t address, uint32_t bytes, uint32_t alignment, const char* verb,
        Where where) const;
    void check_written(const Thread& thread, const Access& me, uint32_t granule, const char* verb, bool fenced) const;
    void check_write(const Thread& thread, const Access& me, uint32_t granule, bool fenced) const;
    void check_async_reads(const Thread& thread, uint32_t begin, uint32_t end, const char* verb, Where where);
    [[noreturn]] void race(
        const Thread& thread, uint32_t granule, const Access& first, const char* first_verb, const Access& second,
        const char* second_verb, const char* missing) const;
    void note_reader(uint32_t granule, const Access& me);

    std::unique_ptr<unsigned char[]> memory_;
    int bytes_ = -1;
    std::vector<Granule> granules_;
    std::vector<Readers> readers_;
    std::vector<AsyncRead> async_reads_;
    std::vector<uint32_t> reserved_;
};

// Who wrote what of global memory in this launch, by 4-byte words or smaller elements. Blocks have no order, so that
// an address is one thread's to store or everybody's to add to, and nobody's to load in another block.
class GlobalWrites {
  public:
    void clear();
    void load(const Thread& thread, const void* from, std::size_t bytes, Where where);
    // by_copy: by a bulk copy, which is waited for only until it has read shared memory: when the numbers are in global
    // memory, nothing in the launch tells.
    void store(const Thread& thread, const void* to, std::size_t bytes, Where where, bool by_copy = false);
    void add(const Thread& thread, const void* to, Where where, bool by_copy = false);

  private:
    struct Entry {
        uintptr_t address = 0;
        uint32_t launch = 0;  // an entry of an earlier launch is free
        int32_t block = 0;
        Access writer;
        bool stored = false;
        bool by_copy = false;
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
