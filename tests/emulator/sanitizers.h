// What the engine tells ThreadSanitizer and AddressSanitizer of its fibers.
//
// ThreadSanitizer sees the kernels, each fiber a thread of its own, and is told what orders them.
// The engine is built without it (GAN_EMULATOR_TSAN says that the kernels are built with it), and
// Quiet hides what little of the engine's memory it would see, in malloc for one.
#pragma once
#include <cstddef>

#ifdef GAN_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_write4(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gan::emulator {

#ifdef GAN_EMULATOR_TSAN
inline void begin_quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void end_quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
// What this fiber did before release(x) is ordered before what another does after acquire(x).
inline void acquire(const void* what) { __tsan_acquire(const_cast<void*>(what)); }
inline void release(const void* what) { __tsan_release(const_cast<void*>(what)); }
// This fiber, which is Quiet, writes a word by the hand of the engine.
inline void write_word(const void* word) {
  end_quiet();
  __tsan_write4(const_cast<void*>(word));
  begin_quiet();
}
#else
inline void begin_quiet() {}
inline void end_quiet() {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void write_word(const void*) {}
#endif

struct Quiet {
  Quiet() { begin_quiet(); }
  ~Quiet() { end_quiet(); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

}  // namespace gan::emulator
