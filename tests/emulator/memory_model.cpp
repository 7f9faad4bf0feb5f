// Races and old values: see memory_model.h.
#include "memory_model.h"

#include <algorithm>

namespace gan::emulator {

// ---- races ----

RaceDetector::Conflict RaceDetector::access(const VectorClock& clock, uint32_t granule,
                                            uint32_t words, bool stores, bool ordinary, Site site) {
  const size_t needed = (size_t{granule} + 1) * kWordsAGranule;
  if (first_of_word_.size() < needed) first_of_word_.resize(needed * 2, kNone);
  Conflict conflict;
  for (uint32_t word = 0; word < kWordsAGranule; ++word) {
    if ((words >> word & 1u) == 0) continue;
    uint32_t* link = &first_of_word_[granule * kWordsAGranule + word];
    while (*link != kNone) {
      Node& node = nodes_[*link];
      const Accessed& other = node.accessed;
      const bool is_known = clock.knows(other.thread, other.epoch);
      if (!is_known && (stores || other.stores)) {
        const bool is_race = ordinary || other.ordinary;
        if (conflict.words == 0 || (is_race && !conflict.is_race)) conflict.other = other;
        conflict.words |= 1u << word;
        conflict.is_race |= is_race;
      }
      if (is_known && stores >= other.stores && ordinary >= other.ordinary) {
        const uint32_t spare = *link;
        *link = node.next;
        node.next = first_spare_;
        first_spare_ = spare;
      } else {
        link = &node.next;
      }
    }
    const Accessed accessed{clock.thread, clock.epoch, stores, ordinary, site};
    if (first_spare_ != kNone) {
      const uint32_t spare = first_spare_;
      *link = spare;
      first_spare_ = nodes_[spare].next;
      nodes_[spare] = {accessed, kNone};
    } else {
      *link = static_cast<uint32_t>(nodes_.size());
      nodes_.push_back({accessed, kNone});
    }
  }
  return conflict;
}

void RaceDetector::forget_all() {
  first_of_word_.clear();
  nodes_.resize(1);
  first_spare_ = kNone;
}

// ---- old values ----

MemoryModel::Location& MemoryModel::location(uint32_t word, uint64_t newest) {
  if (locations_.size() <= word) locations_.resize(size_t{word} * 2 + kWordsAGranule);
  Location& location = locations_[word];
  if (location.messages.empty()) {
    location.messages.push_back({newest, location.next_sequence++, 0, 0, 0, {}});
  }
  return location;
}

uint32_t MemoryModel::oldest_sequence(const Location& location, const VectorClock& clock) {
  uint32_t oldest = location.messages.front().sequence;
  for (const Message& message : location.messages) {
    if (clock.knows(message.writer, message.epoch)) oldest = message.sequence;
  }
  for (const Read& read : location.reads) {
    if (clock.knows(read.reader, read.epoch)) oldest = std::max(oldest, read.sequence);
  }
  return oldest;
}

MemoryModel::Loaded MemoryModel::load(const Reader& reader, uint32_t word, uint64_t newest) {
  Location& here = location(word, newest);
  const uint32_t oldest = oldest_sequence(here, reader.clock);
  const uint32_t latest = here.messages.back().sequence;
  uint32_t chosen = latest;
  if (oldest != latest && random_.one_in(2)) chosen = oldest + random_.below(latest - oldest + 1);
  const Message& message = here.messages[chosen - here.messages.front().sequence];
  read(here, message, reader);
  return {message.value, chosen != latest};
}

void MemoryModel::load_newest(const Reader& reader, uint32_t word, uint64_t newest) {
  Location& here = location(word, newest);
  read(here, here.messages.back(), reader);
}

void MemoryModel::read(Location& location, const Message& message, const Reader& reader) {
  if (message.rank == reader.rank) {
    reader.acquired.gpu.learn(message.released.gpu);
  } else {
    reader.acquired.system.learn(message.released.system);
  }
  // Of several reads of a message by a thread, the first is the one that most others know.
  const bool is_new =
      std::none_of(location.reads.begin(), location.reads.end(), [&](const Read& read) {
        return read.reader == reader.clock.thread && read.sequence == message.sequence;
      });
  if (is_new) location.reads.push_back({reader.clock.thread, reader.clock.epoch, message.sequence});
}

bool MemoryModel::store(const VectorClock& clock, uint32_t word, uint64_t newest,
                        const Store& store) {
  Location& here = location(word, newest);
  bool is_ordered = true;
  for (const Message& message : here.messages) {
    if (clock.knows(message.writer, message.epoch)) continue;
    // A thread that has read the message, and is before this store, puts it before, too.
    is_ordered &= std::any_of(here.reads.begin(), here.reads.end(), [&](const Read& read) {
      return read.sequence >= message.sequence && clock.knows(read.reader, read.epoch);
    });
  }
  Message message{store.value,  here.next_sequence++, store.rank,
                  clock.thread, clock.epoch,          *store.released};
  if (store.reads_newest) {
    const ByScope& before = here.messages.back().released;
    message.released.gpu.learn(before.gpu);
    message.released.system.learn(before.system);
  }
  here.messages.push_back(std::move(message));
  if (here.messages.size() > kMostMessages) {
    here.messages.erase(here.messages.begin());
    const uint32_t oldest = here.messages.front().sequence;
    here.reads.erase(std::remove_if(here.reads.begin(), here.reads.end(),
                                    [&](const Read& read) { return read.sequence <= oldest; }),
                     here.reads.end());
  }
  return is_ordered || store.reads_newest;
}

void MemoryModel::forget(uint32_t word) {
  if (word >= locations_.size()) return;
  locations_[word].messages.clear();
  locations_[word].reads.clear();
}

}  // namespace gan::emulator
