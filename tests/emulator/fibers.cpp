// Stacks, and the switch between them; what AddressSanitizer and ThreadSanitizer are to know of it.
#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) && !defined(GAN_EMULATOR_UCONTEXT)
#define GAN_EMULATOR_UCONTEXT
#endif

#ifdef GAN_EMULATOR_UCONTEXT
#include <ucontext.h>
#else
// Saves what a function must preserve, and where it stopped, in *from; goes on where `to` stopped.
extern "C" void gan_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl gan_emulator_switch
.type gan_emulator_switch, @function
gan_emulator_switch:
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
.size gan_emulator_switch, . - gan_emulator_switch
)");
#endif

namespace gan::emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

#ifdef GAN_EMULATOR_TSAN
// Whether a switch orders what was done before it before what is done after.
constexpr unsigned kOrders = 0, kOrdersNothing = 1;
#endif

#ifdef __SANITIZE_ADDRESS__
// Whose stack is being left, for arrive to learn its bounds where it is main's.
Fiber* departed = nullptr;
#endif

std::vector<std::unique_ptr<Fiber>>& pool() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  return fibers;
}

}  // namespace

Fiber::Fiber(bool has_stack) : has_stack_(has_stack) {
  if (has_stack_) {
    constexpr size_t kColours = 61, kColourBytes = 192;
    static size_t made = 0;
    colour_ = made++ % kColours * kColourBytes;
    stack_bytes_ = kStackBytes;
    void* memory = mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
  }
#ifdef GAN_EMULATOR_UCONTEXT
  context_ = new ucontext_t;
#endif
#ifdef GAN_EMULATOR_TSAN
  void* creator = __tsan_get_current_fiber();
  sanitizer_thread_ = creator;
  if (!has_stack_) return;
  // What the creator has done is ordered before all that the fiber will do: so it is main.
  __tsan_switch_to_fiber(main().sanitizer_thread_, kOrdersNothing);
  sanitizer_thread_ = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(creator, kOrdersNothing);
#endif
}

Fiber::Fiber() : Fiber(true) {}

Fiber::~Fiber() {
#ifdef GAN_EMULATOR_UCONTEXT
  delete static_cast<ucontext_t*>(context_);
#endif
  if (!has_stack_) return;
#ifdef GAN_EMULATOR_TSAN
  __tsan_destroy_fiber(sanitizer_thread_);
#endif
  munmap(stack_, stack_bytes_);
}

Fiber& Fiber::main() {
  static Fiber fiber(false);
  return fiber;
}

void Fiber::prepare(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_, stack_bytes_);
  fake_stack_ = nullptr;
#endif
#ifdef GAN_EMULATOR_UCONTEXT
  auto* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = stack_bytes_ - colour_;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#else
  constexpr size_t kSavedRegisters = 6;
  // A function expects the stack 16-byte aligned before the call that pushed its return address.
  auto* top = reinterpret_cast<void**>(stack_ + stack_bytes_ - colour_ - 64);
  *--top = nullptr;  // entry's return address: it does not return
  *--top = reinterpret_cast<void*>(entry);
  for (size_t i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context_ = top;
#endif
}

void Fiber::switch_between(Fiber& from, Fiber& to, bool from_has_ended) {
#ifdef __SANITIZE_ADDRESS__
  departed = &from;
  __sanitizer_start_switch_fiber(from_has_ended ? nullptr : &from.fake_stack_, to.stack_,
                                 to.stack_bytes_);
#else
  (void)from_has_ended;
#endif
#ifdef GAN_EMULATOR_TSAN
  if (from_has_ended) end_quiet();
  __tsan_switch_to_fiber(to.sanitizer_thread_, kOrdersNothing);
#endif
#ifdef GAN_EMULATOR_UCONTEXT
  swapcontext(static_cast<ucontext_t*>(from.context_), static_cast<ucontext_t*>(to.context_));
#else
  gan_emulator_switch(&from.context_, to.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(from.fake_stack_, &bottom, &bytes);
#endif
}

void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!departed->has_stack_) {
    departed->stack_ = static_cast<char*>(const_cast<void*>(bottom));
    departed->stack_bytes_ = bytes;
  }
#endif
}

void Fiber::visit(bool ends) {
#ifdef GAN_EMULATOR_TSAN
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_thread_, kOrders);
  if (ends) end_quiet();
  __tsan_switch_to_fiber(caller, kOrders);
#else
  (void)ends;
#endif
}

Fiber* FiberPool::take() {
  if (pool().empty()) return new Fiber;
  Fiber* fiber = pool().back().release();
  pool().pop_back();
  return fiber;
}

void FiberPool::give_back(Fiber* fiber, bool unfinished) {
  std::unique_ptr<Fiber> owner(fiber);
  if (unfinished) {
    // Its stack could serve again, but ThreadSanitizer still has the calls it was in.
    owner->visit(true);
  } else {
    pool().push_back(std::move(owner));
  }
}

}  // namespace gan::emulator
