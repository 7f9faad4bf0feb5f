// What a kernel is given: plain data, the same on the host and on the GPU, without CUDA types.
#pragma once
#include <cstdint>

namespace gan {

inline constexpr uint32_t kMaxRanks = 8;
// Blocks a launch can have: there is one copy of the call number for each.
inline constexpr uint32_t kMaxBlocks = 512;
// What one thread loads at once; kernels read rows and weights in such packs.
inline constexpr uint32_t kPackBytes = 16;
// hidden <= 16384: in fp32 that is 4096 packs, the longest row.
inline constexpr uint32_t kMaxHidden = 16384;
inline constexpr uint32_t kMaxRowPacks = 4096;

// Waiting is measured in ticks of 2^20 ns, about a millisecond, so that 32 bits are enough for 24
// days.
inline constexpr uint32_t kTickBits = 20;
inline constexpr uint32_t kMaxTimeoutTicks = uint32_t{1} << 30;

enum class DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// When a kernel lets the stream's next one start (PDL). Measured, so it is a field of the plan.
enum class Trigger : uint32_t { kNever = 0, kAtStart = 1, kAfterPush = 2 };

// The rows of a call and what is done with each: the epilogue of the contract (row_norm.cuh).
struct RowParams {
  const void* x;            // [rows, hidden] of T: this rank's partial sums
  const void* residual;     // [rows, hidden] of T; null: the plain form
  const void* weight;       // [hidden] of T, or of fp32 where weights_fp32
  const void* post_weight;  // like weight; not null: the sandwich form, which has a residual
  void* norm_out;           // [rows, hidden] of T; may be exactly x or residual
  void* residual_out;       // [rows, hidden] of T; may be exactly x or residual
  uint32_t rows;            // at least 1
  uint32_t row_packs;       // hidden / elements in a pack
  uint32_t packs_a_thread;  // how many a thread has of a row, at most
  float hidden;             // what the sum of squares is divided by
  float hidden_reciprocal;  // 1 / hidden, rounded
  float eps;
  float weight_bias;
  uint32_t zero;          // 0, which the compiler does not know: see held in row_norm.cuh
  uint32_t weights_fp32;  // not 0: weight and post_weight are fp32 although T is not
};

// Where the exchange takes place. What every call reads comes first and close together: parameters
// reach a kernel through a cache whose lines are of 64 bytes, and a line not there yet costs as
// much as a load.
struct ExchangeParams {
  uint8_t* inbox;        // this rank's own
  uint64_t stage_bytes;  // from an address in stage 0 to its like in stage 1
  uint32_t rank;
  // Addresses in stage 0, derived by inbox.h:
  uint8_t* poll;                 // area 0 of this rank's inbox
  uint8_t* push[kMaxRanks - 1];  // [i], i < ranks - 1: this rank's area in the inbox of rank
                                 // (rank + 1 + i) % ranks, as mapped in this process
  // Only where a peer is late:
  uint32_t timeout_ticks;      // how long a call may wait for peers
  uint32_t owner_grace_ticks;  // how much longer for one that may be waiting for another itself
  uint64_t* host_failure;      // pinned host memory: a FailureRecord's bits once a call has failed
  uint8_t* peer_inbox[kMaxRanks];  // [r]: rank r's inbox; beyond the last rank the own one
};

// What two-shot needs besides. The kernel could compute it, but has no registers to keep it in.
struct TwoShotParams {
  uint32_t lead;          // by how many rows a team's pushes are ahead of its sums
  uint32_t slice_strips;  // of the longest slice of a row
  uint64_t hop_bytes;  // from a pack's place on its way to the owner to that on its way from there
};

// What all ranks must have alike in a call. In debug mode they tell each other, each field as a
// word.
enum CallField : uint32_t {
  kFieldRows,
  kFieldHidden,
  kFieldDType,
  kFieldForm,         // 0 plain, 1 residual, 2 sandwich
  kFieldAlgorithm,    // that was asked for: 0 none, else 1 + the Algorithm; kUnfusedCall
  kFieldWeightDType,  // not 0: fp32 although T is not
  kFieldEps,          // the float's bits
  kFieldWeightBias,   // the same
  kCallFields,
};
inline constexpr uint32_t kUnfusedCall = UINT32_MAX;
struct CallSummary {
  uint32_t at[kCallFields];
};

// In pinned host memory: what debug mode has found. calls[r][f]: rank r's field in the lower half.
struct DebugReport {
  uint64_t overlap;  // not 0: two calls of this rank ran at the same time
  uint64_t differs;  // not 0: the ranks' calls were not alike, and are in `calls`
  uint64_t calls[kMaxRanks][kCallFields];
};

// A test that launches the blocks of all ranks at once has its own of the next three, below.
#ifndef GAN_ONE_LAUNCH
// Of all kernels that exchange.
struct FusedParams {
  RowParams row;
  Trigger trigger;
  ExchangeParams exchange;
  TwoShotParams two_shot;
};

// Of enter_call.
struct DebugParams {
  ExchangeParams exchange;
  CallSummary call;
  DebugReport* report;
};

struct LocalNormParams {
  RowParams row;
  Trigger trigger;
};
#endif

}  // namespace gan

#ifdef GAN_ONE_LAUNCH
#include "one_launch_params.h"
#endif
