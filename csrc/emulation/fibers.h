// Fibers: stacks of their own in one OS thread, which give way only where they say so. On x86-64 Linux the switch is
// twelve instructions, since ucontext makes two system calls a switch; elsewhere, and with EMU_UCONTEXT, it is
// ucontext.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) || !defined(__linux__) || defined(EMU_UCONTEXT)
#define EMU_SWITCH_BY_UCONTEXT 1
#include <ucontext.h>
#else
extern "C" void emu_switch(void** save, void* load);
// Saves what a function must preserve, on the stack, and takes up the other stack where it was left.
asm(R"(
    .pushsection .text
    .weak emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
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
    .size emu_switch, . - emu_switch
    .popsection
)");
#endif

namespace emu {

struct Fiber {
    char* stack = nullptr;  // lowest address; null: the OS thread's own stack
    size_t size = 0;
#if defined(EMU_SWITCH_BY_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
#if defined(EMU_ADDRESS_SANITIZER)
    void* fake_stack = nullptr;
#endif
#if defined(EMU_THREAD_SANITIZER)
    void* tsan = nullptr;
#endif
};

// Gives the fiber a stack with a guard page below it. The first switch to it enters `entry`, which never returns.
EMU_QUIET inline void make_fiber(Fiber& fiber, void (*entry)()) {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory) + guard;
    fiber.size = stack_bytes;
#if defined(EMU_THREAD_SANITIZER)
    fiber.tsan = __tsan_create_fiber(0);
#endif
#if defined(EMU_SWITCH_BY_UCONTEXT)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#else
    // Six registers, the address that `ret` goes to, and a word that leaves the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(fiber.stack + fiber.size) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
#endif
}

// Makes `fiber` stand for the OS thread that calls.
EMU_QUIET inline void adopt_thread([[maybe_unused]] Fiber& fiber) {
#if defined(EMU_THREAD_SANITIZER)
    fiber.tsan = __tsan_get_current_fiber();
#endif
}

// To be called first on every arrival: `self` as it left, null on the first. `home` is where fibers come from.
EMU_QUIET inline void arrive([[maybe_unused]] Fiber* self, [[maybe_unused]] Fiber& home) {
#if defined(EMU_ADDRESS_SANITIZER)
    const void* left_stack = nullptr;
    size_t left_size = 0;
    __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &left_stack, &left_size);
    if (self != &home) {
        home.stack = static_cast<char*>(const_cast<void*>(left_stack));
        home.size = left_size;
    }
#endif
}

EMU_QUIET inline void jump(Fiber& from, Fiber& to, [[maybe_unused]] Fiber& home) {
#if defined(EMU_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#if defined(EMU_THREAD_SANITIZER)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);  // a switch orders nothing: barriers do
#endif
#if defined(EMU_SWITCH_BY_UCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    emu_switch(&from.stack_pointer, to.stack_pointer);
#endif
    arrive(&from, home);
}

}  // namespace emu
