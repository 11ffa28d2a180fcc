#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if RAZOR_SHIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef RAZOR_SHIM_UCONTEXT

// Saves what a call must preserve on this stack, its pointer in *from, and goes on where the stack `to` was left.
// Rounding mode and the like are the same for all. It ends with a plain return: fibers mostly stand at the same call,
// so the processor, which believes that calls and returns pair up, predicts it right.
extern "C" void razor_shim_swap(void **from, void *to) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .globl razor_shim_swap
    .hidden razor_shim_swap
    .type razor_shim_swap, @function
razor_shim_swap:
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
    .size razor_shim_swap, . - razor_shim_swap
    .section .note.GNU-stack, "", @progbits
    .text
)");
static constexpr int kSaved = 6;   // words below the address where a stack goes on
static constexpr int kResume = 6;  // index of that address
static constexpr int kFrame = 8;   // and one more word: at a function's first instruction sp is 8 mod 16
#else
asm(R"(
    .text
    .p2align 4
    .globl razor_shim_swap
    .hidden razor_shim_swap
    .type razor_shim_swap, %function
razor_shim_swap:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size razor_shim_swap, . - razor_shim_swap
    .section .note.GNU-stack, "", %progbits
    .text
)");
static constexpr int kResume = 11;
static constexpr int kFrame = 20;
#endif

#endif  // RAZOR_SHIM_UCONTEXT

namespace razor_shim {
namespace {

constexpr size_t kStack = RAZOR_SHIM_ASAN ? 256 << 10 : 128 << 10; // sanitized frames are larger

// Below it a page that cannot be touched: a stack that is too small ends the process and does not grow into the next.
char *map_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void *p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) {
        perror("razor shim: no memory for a stack");
        abort();
    }
    return static_cast<char *>(p) + page;
}

}  // namespace

void make_context(Context &context, void (*loop)(), unsigned colour) {
    char *stack = map_stack();
    const size_t bytes = kStack - colour % 32 * 192; // tops of mapped stacks would all compete for one cache set
    context.stack = stack;
    context.stack_bytes = bytes;
#ifdef RAZOR_SHIM_UCONTEXT
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = bytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, loop, 0);
#else
    void **sp = reinterpret_cast<void **>(stack + bytes) - kFrame;
    sp[kResume] = reinterpret_cast<void *>(loop);
    context.stack_pointer = sp;
#endif
}

void arrived_first(Context &from) {
#if RAZOR_SHIM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#else
    (void)from;
#endif
}

void switch_context(Context &from, Context &to) {
#if RAZOR_SHIM_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef RAZOR_SHIM_UCONTEXT
    swapcontext(&from.registers, &to.registers);
#else
    razor_shim_swap(&from.stack_pointer, to.stack_pointer);
#endif
#if RAZOR_SHIM_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace razor_shim
