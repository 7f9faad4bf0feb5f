// Every instruction and intrinsic that plain C++ has no name for, one function each. The kernels
// use nothing of CUDA but these, threadIdx, blockIdx, blockDim and gridDim, so that the same kernel
// files can be compiled for another machine: a build that defines GAN_EMULATOR brings its own
// versions of all names below.
#pragma once

#ifdef GAN_EMULATOR
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define GAN_DEVICE __device__ __forceinline__
// One set of registers for all kernels: two blocks of 512 threads fit on an SM, so that the next
// kernel of the stream can be launched early (PDL), and one of 1024 does.
#define GAN_KERNEL __global__ void __launch_bounds__(1024, 1)
#define GAN_KERNEL_PARAMETER const __grid_constant__

namespace gan {

inline constexpr uint32_t kWarpLanes = 32;
inline constexpr uint32_t kFullWarp = 0xffffffffu;

// ---- arithmetic: each one IEEE operation, rounded to nearest even, never contracted to an FMA
// ----
GAN_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
GAN_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
GAN_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
GAN_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
GAN_DEVICE float reciprocal_rn(float a) { return __frcp_rn(a); }
GAN_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}  // a * b + c, rounded once
// 1 / sqrt(a) within a few units of the last place, for normal a. To start from, never to end with.
GAN_DEVICE float rsqrt_approximately(float a) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
GAN_DEVICE bool is_nan(float a) { return a != a; }

// For the compiler: where it should not put the code in the way of the rest. Instructions are
// fetched in lines, most of them once a launch.
#define GAN_UNLIKELY(condition) __builtin_expect((condition), false)

GAN_DEVICE uint32_t bits_of(float a) { return __float_as_uint(a); }
GAN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Two 16-bit values in a word, the one at the lower address in the lower half.
GAN_DEVICE float2 floats_of_bf16x2(uint32_t word) {
  return {float_of(word << 16), float_of(word & 0xffff0000u)};
}
GAN_DEVICE uint32_t bf16x2_rn(float2 value) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(value.x, value.y);
  return reinterpret_cast<const uint32_t&>(pair);
}
GAN_DEVICE float2 floats_of_fp16x2(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
GAN_DEVICE uint32_t fp16x2_rn(float2 value) {
  const __half2 pair = __floats2half2_rn(value.x, value.y);
  return reinterpret_cast<const uint32_t&>(pair);
}

// a + b of each of the two, rounded once: the bits of an fp32 sum that is rounded, since fp32 has
// twice their digits and two more (docs/differences.md).
GAN_DEVICE uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 sum = __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a),
                                        reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}
GAN_DEVICE uint32_t add_fp16x2(uint32_t a, uint32_t b) {
  const __half2 sum =
      __hadd2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}

// For the compiler, which would compute a value where it is used: it is computed here.
GAN_DEVICE float computed(float value) {
  asm volatile("" : "+f"(value));
  return value;
}
template <class T>
GAN_DEVICE T* computed(T* value) {
  asm volatile("" : "+l"(value));
  return value;
}

// ---- memory ----
// Ordinary memory, ordered by kernel boundaries: inputs and outputs. Not the read-only path:
// outputs may alias inputs.
GAN_DEVICE uint4 load(const uint4* from) { return *from; }
GAN_DEVICE void store(uint4* to, uint4 value) { *to = value; }
// Brings what will be loaded nearer, into the L2, and takes no register.
GAN_DEVICE void prefetch(const uint4* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Memory that other ranks write or read while this kernel runs. Relaxed: each word arrives by
// itself, in no order; the protocol (exchange.cuh) needs nothing more. A 16-byte access is four
// accesses of a word.
GAN_DEVICE uint4 load_relaxed_sys(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
GAN_DEVICE void store_relaxed_sys(uint4* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
GAN_DEVICE uint64_t load_relaxed_sys(const uint64_t* from) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}
GAN_DEVICE void store_relaxed_sys(uint64_t* to, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(v) : "memory");
}
// What this thread saw and did before is seen by threads of any rank that learn of something it
// does after.
GAN_DEVICE void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// The same among this rank's own threads.
GAN_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Words that only this rank's own kernels touch, from any of its SMs.
GAN_DEVICE uint2 load_relaxed_gpu(const uint2* from) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from)
               : "memory");
  return v;
}
GAN_DEVICE uint32_t load_relaxed_gpu(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
GAN_DEVICE void store_relaxed_gpu(uint32_t* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
// True for the one caller that changes *word from 0 to 1.
GAN_DEVICE bool claim_once(uint32_t* word) { return atomicCAS(word, 0u, 1u) == 0u; }

// Returns what was there before.
GAN_DEVICE uint32_t add_gpu(uint32_t* word, uint32_t value) { return atomicAdd(word, value); }

GAN_DEVICE uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}

// ---- warps and blocks ----
GAN_DEVICE float shuffle_xor(float value, uint32_t mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}
// Unlike a shuffle, it also orders memory among the lanes.
GAN_DEVICE void warp_sync() { __syncwarp(); }
GAN_DEVICE void block_sync() { __syncthreads(); }

// The block's one S. Not initialised.
template <typename S>
GAN_DEVICE S& block_shared() {
  __shared__ S shared;
  return shared;
}

// The block's dynamic shared memory, whose size is given at launch.
template <typename T>
GAN_DEVICE T* block_dynamic_shared() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

// ---- clusters ----

// Blocks that run at the same time and reach each other's shared memory (sm_90 and newer).
struct Cluster {
  uint32_t index, count;   // which cluster of the grid, of how many
  uint32_t block, blocks;  // which block of it, of how many
};
// Counts the bytes that store_counted brings to this block's shared memory; waited for phase after
// phase.
using ByteCounter = uint64_t;

#if __CUDA_ARCH__ >= 900
GAN_DEVICE Cluster this_cluster() {
  Cluster c;
  asm volatile("mov.u32 %0, %clusterid.x;" : "=r"(c.index));
  asm volatile("mov.u32 %0, %nclusterid.x;" : "=r"(c.count));
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(c.block));
  asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(c.blocks));
  return c;
}
// At the start of a kernel, with all threads: all blocks of the cluster run now, with their byte
// counters set, so that their shared memory can be written. It orders nothing else.
GAN_DEVICE void cluster_start() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

namespace detail {
GAN_DEVICE uint32_t shared_address(const void* own) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(own));
}
// Of what lies in another block's shared memory where `own` lies in this block's.
GAN_DEVICE uint32_t shared_address_in(uint32_t block, const void* own) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(own)), "r"(block));
  return there;
}
}  // namespace detail

// By one thread, before cluster_start.
GAN_DEVICE void init_byte_counter(ByteCounter* own) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(detail::shared_address(own))
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Stores a word in another block, where `own` lies in this one, and has that block's counter count
// its 4 bytes.
GAN_DEVICE void store_counted(uint32_t block, float* own, float value, ByteCounter* own_counter) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
          detail::shared_address_in(block, own)),
      "r"(bits_of(value)), "r"(detail::shared_address_in(block, own_counter))
      : "memory");
}
// By one thread of the block, once a phase: the phase ends when so many bytes have come.
GAN_DEVICE void expect_bytes(ByteCounter* own, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(own)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity (0 for the first, 1 for the second, ...) has ended; what was
// counted in it is seen.
GAN_DEVICE void wait_for_bytes(ByteCounter* own, uint32_t parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{ .reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended; }"
        : "=r"(ended)
        : "r"(detail::shared_address(own)), "r"(parity)
        : "memory");
  }
}
#else
// There is one block in every cluster: launch.cu sees to it.
GAN_DEVICE Cluster this_cluster() { return {blockIdx.x, gridDim.x, 0, 1}; }
GAN_DEVICE void cluster_start() {}
GAN_DEVICE void init_byte_counter(ByteCounter*) {}
GAN_DEVICE void store_counted(uint32_t, float*, float, ByteCounter*) {}
GAN_DEVICE void expect_bytes(ByteCounter*, uint32_t) {}
GAN_DEVICE void wait_for_bytes(ByteCounter*, uint32_t) {}
#endif

// ---- programmatic dependent launch (sm_90 and newer; elsewhere kernels never overlap) ----

// Returns when the stream's earlier kernels have completed and what they wrote is visible. The
// addresses, not all null, are computed before, while there is time: the compiler would compute
// each where it is used, from parameters that come through a cache and are not in it yet.
template <class... Pointers>
GAN_DEVICE void grid_dependency_wait(Pointers... addresses) {
#if __CUDA_ARCH__ >= 900
  const uint64_t any = (... | reinterpret_cast<uint64_t>(addresses));
  asm volatile("{ .reg .pred any; setp.ne.u64 any, %0, 0; @any griddepcontrol.wait; }" ::"l"(any)
               : "memory");
#endif
}
// Lets the stream's next kernel start; it still waits, above, for this one to complete.
GAN_DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace gan
#endif  // GAN_EMULATOR
