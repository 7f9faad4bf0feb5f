#include "harness.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "emulator.h"
#include "host/exchange_setup.h"
#include "kernels.h"

namespace gan::testing {
namespace {

constexpr uint8_t kEmptyByte = 0xff;

RankMemory new_memory(const Case& c) {
  RankMemory memory{GuardedMemory(inbox_bytes_of(c)), GuardedMemory(sizeof(uint64_t)), {}};
  for (const Buffer& buffer : c.buffers) memory.buffers.emplace_back(buffer.bytes);
  return memory;
}

// As a workspace's: see workspace.cpp, DeviceInbox.
void make_empty(const RankMemory& memory, uint32_t first_call) {
  std::memset(memory.inbox.data(), 0, kHeaderBytes);
  std::memset(memory.inbox.data() + kHeaderBytes, kEmptyByte, memory.inbox.bytes() - kHeaderBytes);
  for (CallCopy& copy : memory.header().call) copy.number = first_call;
  std::memset(memory.host_failure.data(), 0, memory.host_failure.bytes());
}

std::string of_rank(uint32_t rank) { return "rank " + std::to_string(rank) + ": "; }

}  // namespace

Harness::Harness(const Case& c, std::vector<uint32_t> world_ranks)
    : case_(c),
      world_ranks_(std::move(world_ranks)),
      layout_(InboxLayout::of(c.ranks, inbox_bytes_of(c))),
      last_stream_(c.ranks, 0),
      wrong_in_repeat_(c.ranks) {
  std::vector<uint8_t*> inboxes;
  for (uint32_t rank = 0; rank < c.ranks; ++rank) {
    memory_.push_back(new_memory(c));
    inboxes.push_back(memory_.back().inbox.data());
  }
  for (uint32_t rank = 0; rank < c.ranks; ++rank) {
    auto* host_failure = reinterpret_cast<uint64_t*>(memory_[rank].host_failure.data());
    exchange_.push_back(
        exchange_params(layout_, rank, inboxes, timeout_ticks_of(kTimeoutNs), host_failure));
  }
  for (uint32_t repeat = 0; repeat < c.repeats; ++repeat) {
    at_start_.push_back(random_contents(c, repeat));
    expected_.push_back(at_start_.back());
    for (const Call& call : c.calls) apply(c, call, expected_.back());
  }
  start_again();
}

void Harness::start_again() {
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    const RankMemory& memory = memory_[rank];
    make_empty(memory, case_.first_call);
    for (size_t i = 0; i < memory.buffers.size(); ++i) {
      const Bytes& contents = at_start_[0][rank][i];
      std::memcpy(memory.buffers[i].data(), contents.data(), contents.size());
    }
    last_stream_[rank] = 0;
    wrong_in_repeat_[rank].clear();
  }
}

// ---- launches ----

// As Workspace::run: calls of several streams are put in order with an event.
void Harness::launch(emulator::World& world, emulator::Launch launch,
                     std::function<void()> kernel) {
  uint32_t& last = last_stream_[launch.rank];
  if (!world_ranks_.empty()) launch.rank = world_ranks_[launch.rank];
  if (last != launch.stream) world.wait_for_stream(launch.rank, launch.stream, last);
  last = launch.stream;
  world.launch(launch, std::move(kernel));
}

void Harness::queue_block(emulator::World& world, uint32_t rank, uint32_t stream, uint32_t threads,
                          std::function<void()> kernel) {
  emulator::Launch launch;
  launch.rank = rank;
  launch.stream = stream;
  launch.blocks = 1;
  launch.threads = threads;
  this->launch(world, launch, std::move(kernel));
}

RowParams Harness::row_params(uint32_t rank, const Call& call, const CallLaunch& launch) const {
  const uint64_t offset = launch.first_row * row_bytes_of(call);
  const auto buffer = [&](uint32_t number) -> uint8_t* {
    return number == kNoBuffer ? nullptr : memory_[rank].buffers[number].data();
  };
  RowParams row{};
  row.x = buffer(call.x) + offset;
  row.residual = call.residual == kNoBuffer ? nullptr : buffer(call.residual) + offset;
  row.weight = buffer(call.weight);
  row.post_weight = buffer(call.post_weight);
  row.norm_out = buffer(call.norm_out) + offset;
  row.residual_out = buffer(call.residual_out) + offset;
  row.rows = static_cast<uint32_t>(launch.rows);
  row.row_packs = call.row_packs;
  row.packs_a_thread = launch.shape.packs_a_thread;
  row.hidden = static_cast<float>(hidden_of(case_, call));
  row.hidden_reciprocal = 1.0f / row.hidden;
  row.eps = case_.eps;
  row.weight_bias = case_.bias;
  row.weights_fp32 = call.weights_fp32;
  return row;
}

void Harness::queue(emulator::World& world, uint32_t rank, const Call& call) {
  for (const CallLaunch& part : launches_of(case_, call)) {
    const RowParams row = row_params(rank, call, part);
    if (!is_possible(part.shape, row)) throw std::logic_error("shape: a possible one is required");
    emulator::Launch launch;
    launch.rank = rank;
    launch.stream = call.stream;
    launch.blocks = part.shape.blocks();
    launch.threads = part.shape.threads;
    launch.cluster_blocks = part.shape.blocks_a_team;
    launch.dynamic_shared_bytes = dynamic_shared_bytes(part.shape);
    launch.starts_early = part.shape.trigger != Trigger::kNever;
    this->launch(
        world, launch,
        kKernels[call.kernel].bind({case_.dtype, case_.ranks, row, part.shape, exchange_[rank]}));
  }
}

void Harness::queue_all(emulator::World& world) {
  for (uint32_t repeat = 0; repeat < case_.repeats; ++repeat) {
    for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
      if (repeat != 0) queue_change_of_repeat(world, rank, repeat);
      for (const Call& call : case_.calls) queue(world, rank, call);
    }
  }
}

// ---- between repeats ----

// As whoever replays a graph does in stream order: takes the results away, brings new inputs.
void Harness::queue_change_of_repeat(emulator::World& world, uint32_t rank, uint32_t repeat) {
  queue_block(world, rank, last_stream_[rank], emulator::Launch{}.threads,
              [this, rank, repeat] { change_repeat(rank, repeat); });
}

void Harness::change_repeat(uint32_t rank, uint32_t repeat) {
  for (uint32_t number = 0; number < case_.buffers.size(); ++number) {
    auto* packs = reinterpret_cast<uint4*>(memory_[rank].buffers[number].data());
    const Bytes& expected = expected_[repeat - 1][rank][number];
    const Bytes& next = at_start_[repeat][rank][number];
    const auto count = static_cast<uint32_t>(next.size() / kPackBytes);
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint4 got = load(packs + i);
      const Bytes pack(&expected[i * kPackBytes], &expected[i * kPackBytes] + kPackBytes);
      const std::string wrong =
          difference(case_, number, reinterpret_cast<const uint8_t*>(&got), pack);
      if (!wrong.empty()) {
        wrong_in_repeat_[rank] =
            "repeat " + std::to_string(repeat - 1) + ", pack " + std::to_string(i) + " of " + wrong;
      }
      uint4 fresh;
      std::memcpy(&fresh, &next[i * kPackBytes], kPackBytes);
      store(packs + i, fresh);
    }
  }
}

// ---- checks ----

std::string Harness::wrong_contents(uint32_t rank, const Contents& expected) const {
  for (uint32_t number = 0; number < case_.buffers.size(); ++number) {
    const std::string wrong =
        difference(case_, number, memory_[rank].buffers[number].data(), expected[rank][number]);
    if (!wrong.empty()) return of_rank(rank) + wrong;
  }
  return "";
}

std::string Harness::wrong_header(uint32_t rank) const {
  const InboxHeader& header = memory_[rank].header();
  if (memory_[rank].failure_bits() != 0) return of_rank(rank) + "host word: a failure is reported";
  if (header.failure_claim != 0) return of_rank(rank) + "claim word: a failure is reported";
  for (const uint64_t record : header.board) {
    if (record != 0) return of_rank(rank) + "error board: a failure is reported";
  }
  const uint32_t number = case_.first_call + exchanges_of(case_);
  for (uint32_t i = 0; i < kMaxBlocks; ++i) {
    const CallCopy& copy = header.call[i];
    if (copy.failed != 0) return of_rank(rank) + "call copies: a failure is reported";
    if (copy.number == number) continue;
    std::ostringstream text;
    text << of_rank(rank) << "call copies: " << i << " is " << copy.number << " instead of "
         << number;
    return text.str();
  }
  return "";
}

std::string Harness::wrong_inbox(uint32_t rank) const {
  const GuardedMemory& inbox = memory_[rank].inbox;
  const uint8_t* begin = inbox.data() + kHeaderBytes;
  const uint8_t* end = inbox.data() + inbox.bytes();
  const uint8_t* full = std::find_if(begin, end, [](uint8_t byte) { return byte != kEmptyByte; });
  if (full == end) return "";
  const auto offset = static_cast<uint64_t>(full - begin);
  const auto area = static_cast<uint32_t>(offset / kStripBytes % (layout_.ranks - 1));
  std::ostringstream text;
  text << of_rank(rank) << "inbox: not empty at byte " << offset % layout_.stage_bytes
       << " of stage " << offset / layout_.stage_bytes << ", in rank " << source_of_area(area, rank)
       << "'s area";
  return text.str();
}

std::string Harness::wrong_guards(uint32_t rank) const {
  const RankMemory& memory = memory_[rank];
  if (!memory.inbox.guards_are_intact()) return of_rank(rank) + "written beyond the inbox";
  if (!memory.host_failure.guards_are_intact())
    return of_rank(rank) + "written beyond the host word";
  for (size_t i = 0; i < memory.buffers.size(); ++i) {
    if (!memory.buffers[i].guards_are_intact())
      return of_rank(rank) + "written beyond buffer " + std::to_string(i);
  }
  return "";
}

std::string Harness::wrong() const {
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (!wrong_in_repeat_[rank].empty()) return of_rank(rank) + wrong_in_repeat_[rank];
    for (const std::string& wrong : {wrong_guards(rank), wrong_contents(rank, expected_.back()),
                                     wrong_header(rank), wrong_inbox(rank)}) {
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

std::string run_once(Harness& harness, const emulator::Options& options) {
  emulator::World world(harness.ranks(), options);
  try {
    harness.queue_all(world);
    world.run();
  } catch (const emulator::Failure& failure) {
    return failure.what();
  }
  return harness.wrong();
}

std::string run_case(const Case& c, const emulator::Options& options) {
  Harness harness(c);
  return run_once(harness, options);
}

}  // namespace gan::testing
