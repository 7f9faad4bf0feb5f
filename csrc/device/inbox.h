// The layout of an inbox: the memory of a rank that its peers write. Total bytes and every address
// come from here, on the host and on the GPU; no other file knows an offset.
//
//   kHeaderBytes  InboxHeader: error board, farewells, failure claim, copies of the call number,
//                 what debug mode needs
//   stage_bytes   stage 0: an area for each peer, interleaved
//   stage_bytes   stage 1: the same
//
// Call k uses stage k % 2. Area i of a stage takes what one peer pushes. A strip of each area in
// turn, so that what a thread reads of all peers lies at fixed distances from one address. Between
// calls every word of both stages is kEmptyWord (pack.cuh); the header starts as zeros.
//
// In an area, one-shot has the peer's rows, one after the other. Two-shot cuts a row into a slice
// for each rank, and an area has two parts: the peer's rows as far as this rank owns them, a slice
// of each, and then the sums that the peer made, a slice of each row too.
#pragma once
#include <cstddef>
#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define GAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GAN_HOST_DEVICE inline
#endif

namespace gan {

inline constexpr uint64_t kStages = 2;

// A call's number, one copy for each block of a launch, and whether a call of this rank has failed.
struct CallCopy {
  uint32_t number;
  uint32_t failed;
};

struct InboxHeader {
  uint64_t board[kMaxRanks];  // [r]: what rank r reports of a failed call, a FailureRecord's bits;
                              // 0: nothing
  uint64_t farewell[kMaxRanks];  // [r]: not 0 once rank r, closing, has stopped using this inbox
                                 // (host only)
  uint32_t failure_claim;        // 1 once a thread of this rank has taken on reporting the failure
  uint32_t padding[31];
  CallCopy call[kMaxBlocks];
  // Debug mode (debug_mode.cuh):
  uint32_t in_use;                                  // calls of this rank that run now
  uint32_t turn;                                    // how many of its calls have been announced
  uint64_t calls[kStages][kMaxRanks][kCallFields];  // [.][r]: what rank r is about to call
};
inline constexpr uint64_t kHeaderBytes = 8192;
static_assert(sizeof(InboxHeader) <= kHeaderBytes);
// What a warp's packs fill: 32 packs of an area. In shorter ones the stores of a warp went to
// several places, and large calls took a tenth longer (docs/performance.md).
inline constexpr uint32_t kStripBytes = 512;
inline constexpr uint32_t kStripPacks = kStripBytes / kPackBytes;
inline constexpr uint64_t kAreaAlignment = kStripBytes;
// A smaller cudaMalloc shares its 2 MiB page with other allocations, and IPC would export those
// too.
inline constexpr uint64_t kAllocationAlignment = uint64_t{2} << 20;

GAN_HOST_DEVICE uint64_t round_up(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

// ---- the slices of a row, by pack ----

// Each rank has one, of row_packs / ranks packs, rounded up or down.
GAN_HOST_DEVICE uint32_t first_pack_of_slice(uint32_t slice, uint32_t row_packs, uint32_t ranks) {
  return slice * row_packs / ranks;
}
GAN_HOST_DEVICE uint32_t slice_of_pack(uint32_t pack, uint32_t row_packs, uint32_t ranks) {
  return (ranks * (pack + 1) - 1) / row_packs;
}
// Who owns a slice: another rank for each row in turn.
GAN_HOST_DEVICE uint32_t owner_of_slice(uint32_t slice, uint32_t turn, uint32_t ranks) {
  return (slice + turn) % ranks;
}

// ---- places in a stage, in bytes from its beginning: those of area 0 ----

GAN_HOST_DEVICE uint32_t strips_of(uint32_t packs) {
  return (packs + kStripPacks - 1) / kStripPacks;
}
// Of the longest slice of a row.
GAN_HOST_DEVICE uint32_t strips_of_slice(uint32_t row_packs, uint32_t ranks) {
  return strips_of((row_packs + ranks - 1) / ranks);
}
// From there to area i.
GAN_HOST_DEVICE uint64_t area_distance(uint32_t area) { return uint64_t{area} * kStripBytes; }
// Of pack `index` from the beginning of strip `strip`.
GAN_HOST_DEVICE uint64_t place_in_strips(uint64_t strip, uint32_t index, uint32_t areas) {
  return (strip + index / kStripPacks) * areas * kStripBytes + index % kStripPacks * kPackBytes;
}

GAN_HOST_DEVICE uint64_t one_shot_slot(uint32_t row, uint32_t pack, uint32_t row_packs,
                                       uint32_t areas) {
  return place_in_strips(uint64_t{row} * strips_of(row_packs), pack, areas);
}
// On the way to the owner. `index`: of the pack in its slice. slice_strips: strips_of_slice.
GAN_HOST_DEVICE uint64_t two_shot_slot(uint32_t row, uint32_t index, uint32_t slice_strips,
                                       uint32_t areas) {
  return place_in_strips(uint64_t{row} * slice_strips, index, areas);
}
// Between the two parts of an area, which nobody writes. Without it two ranks of which one calls
// one_shot and the other two_shot would fill each other's places exactly, where slices are whole
// strips, and neither would notice.
inline constexpr uint64_t kTwoShotGapBytes = kStripBytes;
// From there to the like on the way from the owner. `rows`: of the launch.
GAN_HOST_DEVICE uint64_t two_shot_hop(uint32_t rows, uint32_t slice_strips, uint32_t areas) {
  return place_in_strips(uint64_t{rows} * slice_strips, 0, areas) + kTwoShotGapBytes * areas;
}

// What of an area a row takes. (Two-shot takes the gap besides.)
GAN_HOST_DEVICE uint64_t one_shot_row_bytes(uint64_t row_bytes) {
  return round_up(row_bytes, kStripBytes);
}
GAN_HOST_DEVICE uint64_t two_shot_row_bytes(uint32_t ranks, uint64_t row_bytes) {
  const uint32_t row_packs = static_cast<uint32_t>(row_bytes / kPackBytes);
  return uint64_t{2} * strips_of_slice(row_packs, ranks) * kStripBytes;
}

// Bytes of an area that takes one-shot calls of one_shot_rows and two-shot calls of two_shot_rows.
GAN_HOST_DEVICE uint64_t bytes_of_area(uint32_t ranks, uint64_t one_shot_rows,
                                       uint64_t two_shot_rows, uint64_t row_bytes) {
  const uint64_t one_shot = one_shot_rows * one_shot_row_bytes(row_bytes);
  const uint64_t two_shot = two_shot_rows * two_shot_row_bytes(ranks, row_bytes) + kTwoShotGapBytes;
  return round_up(one_shot > two_shot ? one_shot : two_shot, kAreaAlignment);
}
// Of a rank's inbox with such areas: 2 * (ranks - 1) of them and the header.
GAN_HOST_DEVICE uint64_t inbox_bytes(uint32_t ranks, uint64_t one_shot_rows, uint64_t two_shot_rows,
                                     uint64_t row_bytes) {
  const uint64_t area = bytes_of_area(ranks, one_shot_rows, two_shot_rows, row_bytes);
  return round_up(kHeaderBytes + kStages * (ranks - 1) * area, kAllocationAlignment);
}

// A rank does not push to itself, so its areas skip it.
GAN_HOST_DEVICE uint32_t area_of_source(uint32_t source, uint32_t reader) {
  return source < reader ? source : source - 1;
}
GAN_HOST_DEVICE uint32_t source_of_area(uint32_t area, uint32_t reader) {
  return area < reader ? area : area + 1;
}

struct InboxLayout {
  uint32_t ranks;
  uint64_t area_bytes, stage_bytes;

  // All of `bytes` is used, so that a workspace made for one row size serves others.
  static InboxLayout of(uint32_t ranks, uint64_t bytes) {
    const uint64_t areas = kStages * (ranks - 1);
    const uint64_t area = (bytes - kHeaderBytes) / areas / kAreaAlignment * kAreaAlignment;
    return {ranks, area, area * (ranks - 1)};
  }
  // Rows of row_bytes that one launch can take.
  uint64_t one_shot_rows(uint64_t row_bytes) const {
    return area_bytes / one_shot_row_bytes(row_bytes);
  }
  uint64_t two_shot_rows(uint64_t row_bytes) const {
    if (area_bytes < kTwoShotGapBytes) return 0;
    return (area_bytes - kTwoShotGapBytes) / two_shot_row_bytes(ranks, row_bytes);
  }
  // Of stage 0.
  uint64_t area_offset(uint32_t area) const { return kHeaderBytes + area_distance(area); }
};

// Who was missing, in which call and row: what a failed call leaves on the error boards and on the
// host, in one word.
struct FailureRecord {
  uint32_t peer, row, call;

  static constexpr uint32_t kRowBits = 27;
  GAN_HOST_DEVICE uint64_t bits() const {
    return uint64_t{1} << 63 | uint64_t{peer} << 59 |
           uint64_t{row & ((uint32_t{1} << kRowBits) - 1)} << 32 | call;
  }
  GAN_HOST_DEVICE static FailureRecord of(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 59) & 15u,
            static_cast<uint32_t>(bits >> 32) & ((uint32_t{1} << kRowBits) - 1),
            static_cast<uint32_t>(bits)};
  }
};

}  // namespace gan
