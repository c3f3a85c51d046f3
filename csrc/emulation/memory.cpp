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
    return {thread.block->epoch, thread.warp->epoch, static_cast<uint16_t>(thread.index), line_id(where)};
}

bool same_warp(const Access& a, const Access& b) { return a.thread / 32 == b.thread / 32; }

// Of one block.
bool unordered(const Access& before, const Access& me) {
    return before.block_epoch == me.block_epoch && before.thread != me.thread &&
           (!same_warp(before, me) || before.warp_epoch == me.warp_epoch);
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
    }
    std::memset(memory_.get(), 0xff, bytes);
}

SharedMemory::Granule* SharedMemory::check(
    const Thread& thread, uint32_t address, uint32_t bytes, const char* verb, Where where) {
    const int64_t begin = static_cast<int64_t>(address) - kSharedBase;
    const auto fail_with = [&](const std::string& what) {
        fail(
            who(thread) + " at " + place(where) + " " + verb + " " + std::to_string(bytes) +
            " bytes of shared memory at byte " + std::to_string(begin) + ", " + what);
    };
    if (begin < 0 || begin + bytes > bytes_) {
        fail_with("outside the block's " + std::to_string(bytes_));
    }
    if (begin % bytes != 0) {
        fail_with("which is not a multiple of " + std::to_string(bytes));
    }
    Granule* const granules = &granules_[begin / 2];
    for (uint32_t i = 0; i < bytes / 2; ++i) {
        if (granules[i].copy_line != 0) {
            fail_with(
                "where a copy is in flight that thread " + std::to_string(granules[i].copy_thread) + " began at " +
                place(lines[granules[i].copy_line]));
        }
    }
    return granules;
}

void SharedMemory::race(
    const Thread& thread, const Granule& granule, const Access& first, const char* first_verb, const Access& second,
    const char* second_verb) const {
    const auto side = [](const char* verb, const Access& access) {
        return std::string(verb) + " by thread " + std::to_string(access.thread) + " at " + place(lines[access.line]);
    };
    fail(
        "race in block " + std::to_string(thread.block->index) + " on shared memory at byte " +
        std::to_string(2 * (&granule - granules_.data())) + ": " + side(first_verb, first) + ", " +
        side(second_verb, second) + ", with no barrier between them");
}

void SharedMemory::note_reader(Granule& granule, const Access& me) {
    Reader& latest = granule.readers[0];
    if (latest.last.block_epoch != me.block_epoch) {
        latest = {me, 0, 0};
    } else if (!same_warp(latest.last, me)) {
        granule.readers[1] = latest;
        latest = {me, 0, 0};
    } else if (latest.last.warp_epoch != me.warp_epoch) {
        latest = {me, 0, 0};
    } else if (latest.last.thread != me.thread) {
        latest = {me, latest.last.thread, latest.last.line};
    } else {
        latest.last.line = me.line;
    }
}

const unsigned char* SharedMemory::read(const Thread& thread, uint32_t address, uint32_t bytes, Where where) {
    Granule* const granules = check(thread, address, bytes, "reads", where);
    const Access me = stamp(thread, where);
    for (uint32_t i = 0; i < bytes / 2; ++i) {
        if (unordered(granules[i].writer, me)) {
            race(thread, granules[i], granules[i].writer, "written", me, "read");
        }
        note_reader(granules[i], me);
    }
    return memory_.get() + (address - kSharedBase);
}

void SharedMemory::check_write(const Thread& thread, const Access& me, const Granule& granule) const {
    if (unordered(granule.writer, me)) {
        race(thread, granule, granule.writer, "written", me, "written");
    }
    for (const Reader& reader : granule.readers) {
        if (unordered(reader.last, me)) {
            race(thread, granule, reader.last, "read", me, "written");
        }
        Access other = reader.last;
        other.thread = reader.other_thread;
        other.line = reader.other_line;
        if (other.line != 0 && unordered(other, me)) {
            race(thread, granule, other, "read", me, "written");
        }
    }
}

unsigned char* SharedMemory::write(const Thread& thread, uint32_t address, uint32_t bytes, Where where) {
    Granule* const granules = check(thread, address, bytes, "writes", where);
    const Access me = stamp(thread, where);
    for (uint32_t i = 0; i < bytes / 2; ++i) {
        check_write(thread, me, granules[i]);
        granules[i].writer = me;
    }
    return memory_.get() + (address - kSharedBase);
}

void SharedMemory::begin_copy(const Thread& thread, const Copy& copy) {
    Granule* const granules = check(thread, copy.to, copy.bytes, "begins a copy to", copy.where);
    const Access me = stamp(thread, copy.where);
    for (uint32_t i = 0; i < copy.bytes / 2; ++i) {
        check_write(thread, me, granules[i]);
        granules[i].copy_thread = me.thread;
        granules[i].copy_line = me.line;
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
        if (entry.launch == launch_ && (entry.many_blocks || entry.block != thread.block->index ||
                                        unordered(entry.writer, stamp(thread, where)))) {
            fail_after(entry, thread, "loads", where);
        }
    }
}

void GlobalWrites::store(const Thread& thread, const void* to, std::size_t bytes, Where where) {
    const Access me = stamp(thread, where);
    const int32_t block = thread.block->index;
    for (std::size_t i = 0; i < bytes; i += 4) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(to) + i;
        Entry& entry = insert(address);
        if (entry.launch == launch_) {
            if (entry.many_threads || entry.block != block || entry.writer.thread != me.thread) {
                fail_after(entry, thread, "stores to", where);
            }
        } else {
            ++used_;
        }
        entry = {address, launch_, block, me, true, false, false};
    }
}

void GlobalWrites::add(const Thread& thread, const void* to, Where where) {
    const Access me = stamp(thread, where);
    const int32_t block = thread.block->index;
    const auto address = reinterpret_cast<uintptr_t>(to);
    Entry& entry = insert(address);
    if (entry.launch != launch_) {
        ++used_;
        entry = {address, launch_, block, me, false, false, false};
        return;
    }
    const bool other_block = entry.block != block;
    const bool other_thread = other_block || entry.writer.thread != me.thread;
    if (entry.stored && other_thread) {
        fail_after(entry, thread, "adds to", where);
    }
    entry.many_blocks |= other_block;
    entry.many_threads |= other_thread;
    entry.block = block;
    entry.writer = me;
}

}  // namespace attnfuse::emulation
