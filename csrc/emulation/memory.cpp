// Checks of accesses to shared and global memory: bounds, alignment, copies in flight and races.
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "machine.h"

namespace attnfuse::emulation {
namespace {

// Lines by number, so that a granule's history stays small. Numbers are kept for good: call sites are finite.
constexpr uint32_t kLines = 1 << 14;
Where lines[kLines];

uint16_t line_id(Where where) {
    const auto file = reinterpret_cast<uintptr_t>(where.file_name());
    const uint64_t hash = (file ^ static_cast<uint64_t>(where.line()) << 32) * 0x9e3779b97f4a7c15u;
    uint32_t id = static_cast<uint32_t>(hash >> 50);
    for (uint32_t tries = 0; tries < kLines; ++tries, ++id) {
        id &= kLines - 1;
        if (id == 0) {  // stands for no access
            continue;
        }
        if (lines[id].line() == where.line() && lines[id].file_name() == where.file_name()) {
            return static_cast<uint16_t>(id);
        }
        if (lines[id].line() == 0) {
            lines[id] = where;
            return static_cast<uint16_t>(id);
        }
    }
    fail("the emulated kernels have more lines than the emulation can number");
}

Access stamp(const Thread& thread, Where where) {
    return {
        thread.block->epoch, thread.block->clocked ? thread.clock[thread.index] : 0, thread.warp->epoch,
        static_cast<uint16_t>(thread.index), line_id(where)};
}

bool same_warp(const Access& a, const Access& b) { return a.thread / 32 == b.thread / 32; }

// Whether nothing orders `before` and `me`, which `thread` does now. Of one block.
bool unordered(const Access& before, const Access& me, const Thread& thread) {
    const Block& block = *thread.block;
    if (before.thread >= kAgents) {
        return before.block_epoch == block.first_epoch &&
               thread.clock[block.threads.size() + (before.thread - kAgents)] < before.time;
    }
    if (before.block_epoch != me.block_epoch || before.thread == me.thread ||
        (same_warp(before, me) && before.warp_epoch != me.warp_epoch)) {
        return false;
    }
    // What came before the clocks began is over at its thread's first release.
    return !block.clocked || thread.clock[before.thread] < std::max(before.time, 1u);
}

}  // namespace

std::string place(Where where) {
    std::string_view file = where.file_name();
    file.remove_prefix(file.rfind('/') + 1);
    return std::string(file) + ":" + std::to_string(where.line());
}

void SharedMemory::reset(int bytes) {
    if (bytes != bytes_) {
        memory_ = std::make_unique_for_overwrite<unsigned char[]>(bytes);
        bytes_ = bytes;
        granules_.resize((bytes + 1) / 2);
        readers_.resize(granules_.size());
    }
    for (const uint32_t granule : reserved_) {
        if (granule < granules_.size()) {
            granules_[granule].copy_line = 0;
        }
    }
    reserved_.clear();
    async_reads_.clear();
    std::memset(memory_.get(), 0xff, bytes);
}

uint32_t SharedMemory::check(
    const Thread& thread, uint32_t address, uint32_t bytes, uint32_t alignment, const char* verb, Where where) const {
    const int64_t begin = static_cast<int64_t>(address) - kSharedBase;
    const auto fail_with = [&](const std::string& what) {
        fail(
            who(thread) + " at " + place(where) + " " + verb + " " + std::to_string(bytes) +
            " bytes of shared memory at byte " + std::to_string(begin) + ", " + what);
    };
    if (begin < 0 || begin + bytes > bytes_) {
        fail_with("outside the block's " + std::to_string(bytes_));
    }
    if (begin % alignment != 0) {
        fail_with("which is not a multiple of " + std::to_string(alignment));
    }
    const auto first = static_cast<uint32_t>(begin / 2);
    for (uint32_t i = first; i < first + bytes / 2; ++i) {
        const Granule& granule = granules_[i];
        if (granule.copy_line != 0 && granule.copy_thread == kReserved) {
            fail_with("where an mbarrier is that was made at " + place(lines[granule.copy_line]));
        }
        if (granule.copy_line != 0) {
            fail_with(
                "where a copy is in flight that thread " + std::to_string(granule.copy_thread) + " began at " +
                place(lines[granule.copy_line]));
        }
    }
    return first;
}

void SharedMemory::race(
    const Thread& thread, uint32_t granule, const Access& first, const char* first_verb, const Access& second,
    const char* second_verb, const char* missing) const {
    const auto side = [](const char* verb, const Access& access) {
        return std::string(verb) + " by " +
               (access.thread >= kAgents ? std::string("the copy begun") : "thread " + std::to_string(access.thread)) +
               " at " + place(lines[access.line]);
    };
    fail(
        "race in block " + std::to_string(thread.block->index) + " on shared memory at byte " +
        std::to_string(2 * granule) + ": " + side(first_verb, first) + ", " + side(second_verb, second) + ", with no " +
        missing + " between them");
}

void SharedMemory::note_reader(uint32_t granule, const Access& me) {
    Reader& latest = readers_[granule].of[0];
    if (latest.last.block_epoch != me.block_epoch) {
        latest = {me};
    } else if (!same_warp(latest.last, me)) {
        readers_[granule].of[1] = latest;
        latest = {me};
    } else if (latest.last.warp_epoch != me.warp_epoch) {
        latest = {me};
    } else if (latest.last.thread != me.thread) {
        latest = {me, latest.last.thread, latest.last.line, latest.last.time};
    } else {
        latest.last.line = me.line;
        latest.last.time = me.time;
    }
}

bool SharedMemory::unseen(const Thread& thread, const Access& before) const {
    return unordered(before, stamp(thread, Where::current()), thread);
}

bool SharedMemory::fenced(const Thread& thread, const Access& before) const {
    const Block& block = *thread.block;
    if (before.line == 0 || before.thread >= kAgents || before.block_epoch < block.first_epoch) {
        return true;
    }
    // Its thread's first fence after the access must itself be over for this thread.
    const std::vector<uint32_t>& fences = block.threads[before.thread].proxy_fences;
    const auto fence = std::lower_bound(fences.begin(), fences.end(), before.time);
    return fence != fences.end() && thread.clock[before.thread] >= *fence;
}

void SharedMemory::check_written(
    const Thread& thread, const Access& me, uint32_t granule, const char* verb, bool is_async) const {
    const Access& writer = granules_[granule].writer;
    if (unordered(writer, me, thread)) {
        race(thread, granule, writer, "written", me, verb, "barrier");
    }
    if (is_async && !fenced(thread, writer)) {
        race(thread, granule, writer, "written", me, verb, "proxy_fence");
    }
}

const unsigned char* SharedMemory::read(const Thread& thread, uint32_t address, uint32_t bytes, Where where) {
    const uint32_t first = check(thread, address, bytes, bytes, "reads", where);
    const Access me = stamp(thread, where);
    for (uint32_t i = first; i < first + bytes / 2; ++i) {
        check_written(thread, me, i, "read", false);
        note_reader(i, me);
    }
    return memory_.get() + (address - kSharedBase);
}

void SharedMemory::check_write(const Thread& thread, const Access& me, uint32_t granule, bool is_async) const {
    check_written(thread, me, granule, "written", is_async);
    for (const Reader& reader : readers_[granule].of) {
        if (unordered(reader.last, me, thread)) {
            race(thread, granule, reader.last, "read", me, "written", "barrier");
        }
        Access other = reader.last;
        other.thread = reader.other_thread;
        other.line = reader.other_line;
        other.time = reader.other_time;
        if (other.line != 0 && unordered(other, me, thread)) {
            race(thread, granule, other, "read", me, "written", "barrier");
        }
    }
}

void SharedMemory::check_async_reads(
    const Thread& thread, uint32_t begin, uint32_t end, const char* verb, Where where) {
    for (const AsyncRead& read : async_reads_) {
        if (read.end <= begin || read.begin >= end) {
            continue;
        }
        const AsyncDone& done = *read.done;
        bool over = false;
        for (std::size_t i = 0; i < done.times.size() && done.complete; ++i) {
            over |= thread.clock[done.first_thread + i] >= done.times[i];
        }
        if (!over) {
            fail(
                who(thread) + " at " + place(where) + " " + verb + " shared memory at byte " +
                std::to_string(2 * std::max(begin, read.begin)) + ", which what thread " +
                std::to_string(done.first_thread) + " issued at " + place(lines[read.line]) +
                (done.complete ? " has read, with no barrier between them" : " is still to read"));
        }
    }
}

unsigned char* SharedMemory::write(const Thread& thread, uint32_t address, uint32_t bytes, Where where) {
    const uint32_t first = check(thread, address, bytes, bytes, "writes", where);
    const Access me = stamp(thread, where);
    check_async_reads(thread, first, first + bytes / 2, "writes", where);
    for (uint32_t i = first; i < first + bytes / 2; ++i) {
        check_write(thread, me, i, false);
        granules_[i].writer = me;
    }
    return memory_.get() + (address - kSharedBase);
}

void SharedMemory::begin_copy(const Thread& thread, const Copy& copy) {
    const uint32_t first = check(thread, copy.to, copy.bytes, copy.bytes, "begins a copy to", copy.where);
    const Access me = stamp(thread, copy.where);
    check_async_reads(thread, first, first + copy.bytes / 2, "begins a copy to", copy.where);
    for (uint32_t i = first; i < first + copy.bytes / 2; ++i) {
        check_write(thread, me, i, false);
        granules_[i].copy_thread = me.thread;
        granules_[i].copy_line = me.line;
    }
}

unsigned char* SharedMemory::land(const Thread& thread, const Copy& copy) {
    const uint32_t begin = copy.to - kSharedBase;
    const Access me = stamp(thread, copy.where);
    for (uint32_t i = begin / 2; i < (begin + copy.bytes) / 2; ++i) {
        granules_[i].copy_line = 0;
        granules_[i].writer = me;
    }
    return memory_.get() + begin;
}

void SharedMemory::begin_bulk_copy(const Thread& thread, uint32_t to, uint32_t bytes, Where where) {
    const uint32_t first = check(thread, to, bytes, 16, "begins a copy to", where), end = first + bytes / 2;
    const Access me = stamp(thread, where);
    check_async_reads(thread, first, end, "begins a copy to", where);
    for (uint32_t i = first; i < end; ++i) {
        check_write(thread, me, i, true);
        granules_[i].copy_thread = me.thread;
        granules_[i].copy_line = me.line;
    }
    // All that has been read there is over for this thread, and through it for whoever comes later.
    std::erase_if(async_reads_, [&](const AsyncRead& read) { return read.begin >= first && read.end <= end; });
}

void SharedMemory::land_bulk_copy(
    const Block& block, uint32_t to, uint32_t bytes, int mbarrier, uint32_t time, Where where) {
    const Access writer{block.first_epoch, time, 0, static_cast<uint16_t>(kAgents + mbarrier), line_id(where)};
    for (uint32_t i = (to - kSharedBase) / 2; i < (to - kSharedBase + bytes) / 2; ++i) {
        granules_[i].copy_line = 0;
        granules_[i].writer = writer;
    }
}

void SharedMemory::begin_async_read(
    const Thread& thread, uint32_t from, uint32_t bytes, const std::shared_ptr<AsyncDone>& done, Where where) {
    const uint32_t first = check(thread, from, bytes, 16, "issues a read of", where), end = first + bytes / 2;
    const Access me = stamp(thread, where);
    Access last;
    for (uint32_t i = first; i < end; ++i) {
        // Neighbours mostly have one writer.
        if (std::memcmp(&granules_[i].writer, &last, sizeof last) != 0) {
            last = granules_[i].writer;
            check_written(thread, me, i, "read", true);
        }
    }
    for (AsyncRead& read : async_reads_) {
        if (read.begin == first && read.end == end && read.done->complete &&
            read.done->first_thread == done->first_thread) {
            read = {first, end, done, me.line};
            return;
        }
    }
    async_reads_.push_back({first, end, done, me.line});
}

Access SharedMemory::reserve(const Thread& thread, uint32_t address, uint32_t bytes, Where where) {
    const uint32_t first = check(thread, address, bytes, bytes, "makes an mbarrier of", where);
    const Access me = stamp(thread, where);
    for (uint32_t i = first; i < first + bytes / 2; ++i) {
        granules_[i].copy_thread = kReserved;
        granules_[i].copy_line = me.line;
        reserved_.push_back(i);
    }
    return me;
}

void GlobalWrites::clear() {
    ++launch_;
    used_ = 0;
    if (entries_.empty()) {
        entries_.resize(1 << 12);
    }
}

// The address's entry, or the free one where it would stand.
GlobalWrites::Entry& GlobalWrites::find(uintptr_t address) {
    const std::size_t mask = entries_.size() - 1;
    std::size_t at = (address * 0x9e3779b97f4a7c15u) >> 32 & mask;
    while (entries_[at].launch == launch_ && entries_[at].address != address) {
        at = (at + 1) & mask;
    }
    return entries_[at];
}

// The same with room for one more.
GlobalWrites::Entry& GlobalWrites::insert(uintptr_t address) {
    if (2 * (used_ + 1) > entries_.size()) {
        std::vector<Entry> old(2 * entries_.size());
        old.swap(entries_);
        for (const Entry& entry : old) {
            if (entry.launch == launch_) {
                find(entry.address) = entry;
            }
        }
    }
    return find(address);
}

void GlobalWrites::fail_after(const Entry& entry, const Thread& thread, const char* verb, Where where) {
    fail(
        who(thread) + " at " + place(where) + " " + verb + " a global address that block " +
        std::to_string(entry.block) + ", thread " + std::to_string(entry.writer.thread) +
        (entry.stored ? " stored to at " : " added to at ") + place(lines[entry.writer.line]) +
        (entry.many_blocks ? " after other blocks" : "") + ", and nothing in the launch orders the two");
}

void GlobalWrites::load(const Thread& thread, const void* from, std::size_t bytes, Where where) {
    if (used_ == 0) {
        return;
    }
    for (std::size_t i = 0; i < bytes; i += 4) {
        const Entry& entry = find(reinterpret_cast<uintptr_t>(from) + i);
        if (entry.launch == launch_ && (entry.many_blocks || entry.by_copy || entry.block != thread.block->index ||
                                        unordered(entry.writer, stamp(thread, where), thread))) {
            fail_after(entry, thread, "loads", where);
        }
    }
}

void GlobalWrites::store(const Thread& thread, const void* to, std::size_t bytes, Where where, bool by_copy) {
    const Access me = stamp(thread, where);
    const int32_t block = thread.block->index;
    for (std::size_t i = 0; i < bytes; i += 4) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(to) + i;
        Entry& entry = insert(address);
        if (entry.launch == launch_) {
            if (entry.many_threads || entry.by_copy || entry.block != block || entry.writer.thread != me.thread) {
                fail_after(entry, thread, "stores to", where);
            }
        } else {
            ++used_;
        }
        entry = {address, launch_, block, me, true, by_copy, false, false};
    }
}

void GlobalWrites::add(const Thread& thread, const void* to, Where where, bool by_copy) {
    const Access me = stamp(thread, where);
    const int32_t block = thread.block->index;
    const auto address = reinterpret_cast<uintptr_t>(to);
    Entry& entry = insert(address);
    if (entry.launch != launch_) {
        ++used_;
        entry = {address, launch_, block, me, false, by_copy, false, false};
        return;
    }
    const bool other_block = entry.block != block;
    const bool other_thread = other_block || entry.writer.thread != me.thread;
    if (entry.stored && (other_thread || entry.by_copy || by_copy)) {
        fail_after(entry, thread, "adds to", where);
    }
    entry.many_blocks |= other_block;
    entry.many_threads |= other_thread;
    entry.by_copy |= by_copy;
    entry.block = block;
    entry.writer = me;
}

}  // namespace attnfuse::emulation
