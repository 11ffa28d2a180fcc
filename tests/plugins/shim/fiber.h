// Stacks to switch between. A fiber runs `loop` for ever; whoever leaves it comes back where it left.
#pragma once

#include <stddef.h>

// Whether what runs on the stacks is compiled for the address sanitizer, which must know about switches.
#ifndef RAZOR_SHIM_ASAN
#define RAZOR_SHIM_ASAN 0
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define RAZOR_SHIM_UCONTEXT 1 // may be defined to try it elsewhere
#endif
#ifdef RAZOR_SHIM_UCONTEXT
#include <ucontext.h>
#endif

namespace razor_shim {

struct Context {
    void *stack_pointer = nullptr; // of the stack when it is not running
    const void *stack = nullptr;   // lowest byte; the launching thread's is learned when it is first left
    size_t stack_bytes = 0;
    void *fake_stack = nullptr;    // the address sanitizer's
#ifdef RAZOR_SHIM_UCONTEXT
    ucontext_t registers;
#endif
};

// A stack that begins with loop(), which must not return. `colour` moves the stacks of different fibers to different
// cache sets.
void make_context(Context &context, void (*loop)(), unsigned colour);

// First thing in loop(): `from` is the context that was left.
void arrived_first(Context &from);

void switch_context(Context &from, Context &to);

}  // namespace razor_shim
