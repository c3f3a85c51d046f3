// The switch between fibers: by hand on x86-64, where ucontext's system call a switch would be most of the time spent.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef ATTNFUSE_FIBERS_BY_UCONTEXT
// Keeps what a called function must keep, then goes on where the other stack left off.
extern "C" void attnfuse_switch_stack(void** from, void* to);
asm(R"(
    .text
    .globl attnfuse_switch_stack
    .hidden attnfuse_switch_stack
    .type attnfuse_switch_stack, @function
attnfuse_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size attnfuse_switch_stack, . - attnfuse_switch_stack
)");
#endif

namespace attnfuse::emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif
constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kStride = kStackBytes + kGuardBytes;

// What a fiber that is entered for the first time needs to know; fibers of one OS thread only.
Fiber* switched_from = nullptr;
void (*entered)() = nullptr;

void before_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to, [[maybe_unused]] bool for_good) {
    switched_from = &from;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
}

// The bounds of the stack just left are kept: it is how those of the caller's own stack become known.
void after_switch([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &switched_from->stack_bottom, &switched_from->stack_bytes);
#endif
}

void begin() {
    after_switch(nullptr);
    entered();
    std::abort();
}

void exchange(Fiber& from, Fiber& to) {
#ifdef ATTNFUSE_FIBERS_BY_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    attnfuse_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
    if (mapping_ != nullptr) {
#ifdef __SANITIZE_ADDRESS__
        // Else whoever is given these addresses next, a tensor say, is taken to write into redzones of frames long
        // gone.
        __asan_unpoison_memory_region(mapping_, mapping_bytes_);
#endif
        munmap(mapping_, mapping_bytes_);
        mapping_ = nullptr;
        count_ = 0;
    }
}

void Stacks::reserve(int count) {
    if (count <= count_) {
        return;
    }
    release();
    mapping_bytes_ = count * kStride;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping == MAP_FAILED) {
        throw std::runtime_error("the emulation has no memory for the stacks of its threads");
    }
    mapping_ = static_cast<unsigned char*>(mapping);
    count_ = count;
    for (int i = 0; i < count; ++i) {
        mprotect(mapping_ + i * kStride, kGuardBytes, PROT_NONE);
    }
}

void Stacks::prepare(Fiber& fiber, int index, void (*entry)()) {
    unsigned char* const bottom = mapping_ + index * kStride + kGuardBytes;
    // Tops at one distance from each other would share a few cache sets.
    const std::size_t bytes = kStackBytes - index * 7 % 32 * 128;
    entered = entry;
    fiber.stack_bottom = bottom;
    fiber.stack_bytes = bytes;
    fiber.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    // Whatever ran here last may have been abandoned with its frames marked.
    __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
#ifdef ATTNFUSE_FIBERS_BY_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
#else
    // Six kept registers, the address `ret` goes to, and a null return address where backtraces end.
    constexpr int kWords = 8;
    std::uintptr_t words[kWords] = {0, 0, 0, 0, 0, 0, reinterpret_cast<std::uintptr_t>(&begin), 0};
    // The ABI has the stack 8 past a multiple of 16 when a function is entered: `begin` is, one word from the top.
    unsigned char* const top = bottom + bytes - sizeof(std::uintptr_t) * kWords;
    std::memcpy(top, words, sizeof words);
    fiber.stack_pointer = top;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
    before_switch(from, to, false);
    exchange(from, to);
    after_switch(from.fake_stack);
}

void leave_fiber(Fiber& from, Fiber& to) {
    before_switch(from, to, true);
    exchange(from, to);
}

}  // namespace attnfuse::emulation
