// What gpu.cuh promises, for GAN_EMULATOR: the kernels then run in a World (engine.h) on the CPU.
// gpu.cuh says what each function does.
//
// Memory is accessed here and not in the engine, so that ThreadSanitizer sees it.
#pragma once
#include <cstdint>

#include "arithmetic.h"
#include "engine.h"
#include "vectors.h"

// The kernels leave a pack alone that is not in the row, which g++ cannot follow.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define GAN_KERNEL inline void
#define GAN_KERNEL_PARAMETER const

namespace gan {

inline constexpr uint32_t kWarpLanes = 32;
inline constexpr uint32_t kFullWarp = 0xffffffffu;

namespace emulator {

template <typename Word, uint32_t kWords>
void load_relaxed(Scope scope, const Word* from, Word (&to)[kWords], Site site) {
  const Handling handling =
      begin_access(Access::kRelaxedLoad, scope, from, kWords, sizeof(Word), site);
  for (uint32_t i = 0; i < kWords; ++i) {
    const uint32_t word = handling.torn ? next_word(i) : i;
    if (handling.modelled) {
      to[word] = static_cast<Word>(modelled_load(from + word, sizeof(Word)));
    } else {
      to[word] = __atomic_load_n(from + word, __ATOMIC_RELAXED);
    }
  }
}

template <typename Word, uint32_t kWords>
void store_relaxed(Scope scope, Word* to, const Word (&from)[kWords], Site site) {
  const Handling handling =
      begin_access(Access::kRelaxedStore, scope, to, kWords, sizeof(Word), site);
  for (uint32_t i = 0; i < kWords; ++i) {
    const uint32_t word = handling.torn ? next_word(i) : i;
    if (handling.modelled) {
      modelled_store(to + word, sizeof(Word), from[word]);
    } else {
      __atomic_store_n(to + word, from[word], __ATOMIC_RELAXED);
    }
  }
}

}  // namespace emulator

// ---- memory ----

inline uint4 load(const uint4* from, emulator::Site site = emulator::Site::here()) {
  emulator::begin_access(emulator::Access::kLoad, emulator::Scope::kSystem, from, 4, 4, site);
  return *from;
}
inline void store(uint4* to, uint4 value, emulator::Site site = emulator::Site::here()) {
  emulator::begin_access(emulator::Access::kStore, emulator::Scope::kSystem, to, 4, 4, site);
  *to = value;
}

// Nobody can tell whether it was made, or when.
inline void prefetch(const uint4*) {}

inline uint4 load_relaxed_sys(const uint4* from, emulator::Site site = emulator::Site::here()) {
  uint32_t words[4];
  emulator::load_relaxed(emulator::Scope::kSystem, reinterpret_cast<const uint32_t*>(from), words,
                         site);
  return {words[0], words[1], words[2], words[3]};
}
inline void store_relaxed_sys(uint4* to, uint4 value,
                              emulator::Site site = emulator::Site::here()) {
  const uint32_t words[] = {value.x, value.y, value.z, value.w};
  emulator::store_relaxed(emulator::Scope::kSystem, reinterpret_cast<uint32_t*>(to), words, site);
}
inline uint64_t load_relaxed_sys(const uint64_t* from,
                                 emulator::Site site = emulator::Site::here()) {
  uint64_t words[1];
  emulator::load_relaxed(emulator::Scope::kSystem, from, words, site);
  return words[0];
}
inline void store_relaxed_sys(uint64_t* to, uint64_t value,
                              emulator::Site site = emulator::Site::here()) {
  const uint64_t words[] = {value};
  emulator::store_relaxed(emulator::Scope::kSystem, to, words, site);
}

inline uint2 load_relaxed_gpu(const uint2* from, emulator::Site site = emulator::Site::here()) {
  uint32_t words[2];
  emulator::load_relaxed(emulator::Scope::kGpu, reinterpret_cast<const uint32_t*>(from), words,
                         site);
  return {words[0], words[1]};
}
inline uint32_t load_relaxed_gpu(const uint32_t* from,
                                 emulator::Site site = emulator::Site::here()) {
  uint32_t words[1];
  emulator::load_relaxed(emulator::Scope::kGpu, from, words, site);
  return words[0];
}
inline void store_relaxed_gpu(uint32_t* to, uint32_t value,
                              emulator::Site site = emulator::Site::here()) {
  const uint32_t words[] = {value};
  emulator::store_relaxed(emulator::Scope::kGpu, to, words, site);
}
inline bool claim_once(uint32_t* word, emulator::Site site = emulator::Site::here()) {
  const emulator::Handling handling = emulator::begin_access(
      emulator::Access::kReadModifyWrite, emulator::Scope::kGpu, word, 1, 4, site);
  if (handling.modelled) return emulator::modelled_claim(word);
  uint32_t expected = 0;
  return __atomic_compare_exchange_n(word, &expected, 1u, false, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED);
}

inline uint32_t add_gpu(uint32_t* word, uint32_t value,
                        emulator::Site site = emulator::Site::here()) {
  const emulator::Handling handling = emulator::begin_access(
      emulator::Access::kReadModifyWrite, emulator::Scope::kGpu, word, 1, 4, site);
  if (handling.modelled) return emulator::modelled_add(word, value);
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}

inline void fence_sys() { emulator::fence(emulator::Scope::kSystem); }
inline void fence_gpu() { emulator::fence(emulator::Scope::kGpu); }
inline uint64_t clock_ns() { return emulator::read_clock(); }

// ---- warps and blocks ----

inline float shuffle_xor(float value, uint32_t mask, emulator::Site site = emulator::Site::here()) {
  return float_of(emulator::exchange_in_warp(bits_of(value), mask, site));
}
inline void warp_sync(emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(site);
}
inline void block_sync(emulator::Site site = emulator::Site::here()) {
  emulator::block_barrier(site);
}
template <typename S>
S& block_shared() {
  static const uint32_t slot = emulator::new_shared_slot();
  return *static_cast<S*>(emulator::shared_memory(slot, sizeof(S)));
}
template <typename T>
T* block_dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory(0, 0));
}

// ---- clusters ----

struct Cluster {
  uint32_t index, count;
  uint32_t block, blocks;
};
using ByteCounter = uint64_t;

inline Cluster this_cluster() {
  const emulator::ClusterPlace place = emulator::place_in_cluster();
  return {place.index, place.count, place.block, place.blocks};
}
inline void cluster_start(emulator::Site site = emulator::Site::here()) {
  emulator::cluster_barrier(site);
}
inline void init_byte_counter(ByteCounter* own, emulator::Site site = emulator::Site::here()) {
  emulator::init_counter(own, site);
}
inline void store_counted(uint32_t block, float* own, float value, ByteCounter* own_counter,
                          emulator::Site site = emulator::Site::here()) {
  emulator::send_counted(block, reinterpret_cast<uint32_t*>(own), bits_of(value), own_counter,
                         site);
}
inline void expect_bytes(ByteCounter* own, uint32_t bytes,
                         emulator::Site site = emulator::Site::here()) {
  emulator::expect_counted(own, bytes, site);
}
inline void wait_for_bytes(ByteCounter* own, uint32_t parity,
                           emulator::Site site = emulator::Site::here()) {
  emulator::wait_for_counted(own, parity, site);
}

// ---- programmatic dependent launch ----

namespace emulator {
// Takes any pointer, and knows where it has been given: no default argument can follow a pack.
struct AddressHere {
  AddressHere(const void*, Site given_at = Site::here()) : site(given_at) {}
  Site site;
};
}  // namespace emulator

inline void grid_dependency_wait(emulator::Site site = emulator::Site::here()) {
  emulator::wait_for_earlier_grids(site);
}
template <typename... Pointers>
void grid_dependency_wait(emulator::AddressHere first, Pointers...) {
  emulator::wait_for_earlier_grids(first.site);
}
inline void grid_launch_dependents() { emulator::let_next_grid_start(); }

}  // namespace gan
