// native/emulator.h with threads that change places without the operating system: glibc's swapcontext asks it to keep the signals, at each of millions of changes.
#pragma once

#include <ucontext.h>

#ifdef __x86_64__
// Keeps the registers that a call preserves, and where to go on (System V ABI for AMD64, 3.2.1), where glibc has them in a ucontext_t: getcontext, makecontext
// and setcontext read them there.
extern "C" void change_places(ucontext_t* from, const ucontext_t* to);
asm(R"(
  .pushsection .text
  .local change_places
  .type change_places, @function
change_places:
  movq (%rsp), %rax
  leaq 8(%rsp), %rcx
  movq %r12, 72(%rdi)
  movq %r13, 80(%rdi)
  movq %r14, 88(%rdi)
  movq %r15, 96(%rdi)
  movq %rbp, 120(%rdi)
  movq %rbx, 128(%rdi)
  movq %rcx, 160(%rdi)
  movq %rax, 168(%rdi)
  movq 72(%rsi), %r12
  movq 80(%rsi), %r13
  movq 88(%rsi), %r14
  movq 96(%rsi), %r15
  movq 120(%rsi), %rbp
  movq 128(%rsi), %rbx
  movq 160(%rsi), %rsp
  jmp *168(%rsi)
  .popsection
)");

inline void changed_context(ucontext_t* from, const ucontext_t* to) {
  if (!from->uc_mcontext.fpregs) getcontext(from);  // setcontext, at a thread's end, wants all of it
  change_places(from, to);
}
#define swapcontext changed_context
#endif

#include "emulator.h"
