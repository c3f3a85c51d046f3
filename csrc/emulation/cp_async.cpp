// A thread's asynchronous copies, in groups.
#include "cp_async.h"

#include <cstring>

#include "global.h"

namespace attnfuse::emulation {

void begin_copy(SharedAddress to, const void* from, uint32_t bytes, bool valid, Where where) {
    maybe_yield();
    check_aligned(from, bytes, where);
    Thread& thread = *current;
    const Copy copy{to, bytes, valid ? from : nullptr, where};
    thread.block->shared.begin_copy(thread, copy);
    thread.copies.push_back(copy);
    ++thread.uncommitted;
}

void commit_copies() {
    Thread& thread = *current;
    thread.groups.push_back(thread.uncommitted);
    thread.uncommitted = 0;
}

void wait_for_copies(std::size_t pending) {
    yield();
    Thread& thread = *current;
    if (thread.groups.size() <= pending) {
        return;
    }
    const std::size_t landing_groups = thread.groups.size() - pending;
    int landed = 0;
    for (std::size_t group = 0; group < landing_groups; ++group) {
        for (int i = 0; i < thread.groups[group]; ++i, ++landed) {
            const Copy& copy = thread.copies[landed];
            unsigned char* const to = thread.block->shared.land(thread, copy);
            if (copy.from != nullptr) {
                global_writes.load(thread, copy.from, copy.bytes, copy.where);
                std::memcpy(to, copy.from, copy.bytes);
            } else {
                std::memset(to, 0, copy.bytes);
            }
        }
    }
    thread.groups.erase(thread.groups.begin(), thread.groups.begin() + landing_groups);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landed);
}

}  // namespace attnfuse::emulation
