// Fibers: threads that one OS thread runs by turns, each on a stack of its own, switching where
// they say so.
#pragma once
#include <cstddef>
#include <vector>

namespace gan::emulator {

class Fiber {
 public:
  Fiber();  // with a stack
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The OS thread itself, which has a stack already.
  static Fiber& main();

  // The next switch to it enters `entry`, which must not return, on the empty stack.
  void prepare(void (*entry)());
  // `from` is what runs now. Returns when something switches back to it; never, where it has ended.
  // All fibers are Quiet when they are switched from.
  static void switch_between(Fiber& from, Fiber& to, bool from_has_ended = false);
  // To be called first thing by `entry`.
  static void arrive();
  // What the fiber did so far is ordered before what the caller does from now on, although it will
  // not run on.
  void order_before_caller() { visit(false); }

 private:
  friend class FiberPool;

  explicit Fiber(bool has_stack);
  // For ThreadSanitizer: to the fiber and back, without running it; what it did is ordered before.
  // `ends`: it is not Quiet any more.
  void visit(bool ends);

  const bool has_stack_;
  size_t colour_ = 0;  // where its stack starts: not all in the same cache set
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* context_ = nullptr;           // where it stopped
  void* fake_stack_ = nullptr;        // AddressSanitizer's
  void* sanitizer_thread_ = nullptr;  // ThreadSanitizer's
};

// Fibers are dear to make, so they are kept.
class FiberPool {
 public:
  static Fiber* take();
  // `unfinished`: it stopped in the middle and will not go on.
  static void give_back(Fiber* fiber, bool unfinished);
};

}  // namespace gan::emulator
