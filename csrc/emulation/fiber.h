// Fibers: call stacks that are left and resumed by hand. Every emulated CUDA thread runs on one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(ATTNFUSE_UCONTEXT)
#define ATTNFUSE_FIBERS_BY_UCONTEXT 1
#include <ucontext.h>
#endif

namespace attnfuse::emulation {

struct Fiber {
#ifdef ATTNFUSE_FIBERS_BY_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    // What the address sanitizer asks for at a switch.
    const void* stack_bottom = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;
};

// One mapping for all stacks, kept from launch to launch; a page that may not be touched ends each of them.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks();
    // At least `count` stacks; what ran on them before is over.
    void reserve(int count);
    // The fiber calls `entry`, which must not return, when it is first switched to, on stack `index`.
    void prepare(Fiber& fiber, int index, void (*entry)());

  private:
    void release();

    unsigned char* mapping_ = nullptr;
    std::size_t mapping_bytes_ = 0;
    int count_ = 0;
};

void switch_fiber(Fiber& from, Fiber& to);
// The same for a fiber that will not be resumed.
void leave_fiber(Fiber& from, Fiber& to);

}  // namespace attnfuse::emulation
