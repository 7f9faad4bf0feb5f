// Debug mode: finds calls of a workspace that run at the same time, as replays of two graphs on two
// streams do. Such calls take the same call number, and mix up each other's rows.
//
// Grid: one thread each, before and behind a call's kernels in their stream.
// Memory: the counter in this rank's inbox, and a word of the host's.
// Synchronisation: none; the stream's order is what is checked.
#pragma once
#include "gpu.cuh"
#include "inbox.h"

namespace gan {

GAN_KERNEL enter_call(uint8_t* inbox, uint64_t* host_overlap) {
  if (add_gpu(&reinterpret_cast<InboxHeader*>(inbox)->in_use, 1u) != 0)
    store_relaxed_sys(host_overlap, uint64_t{1});
}

GAN_KERNEL leave_call(uint8_t* inbox) {
  add_gpu(&reinterpret_cast<InboxHeader*>(inbox)->in_use, 0u - 1);
}

}  // namespace gan
