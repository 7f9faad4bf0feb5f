// Two views of memory that need vector clocks: which accesses race, and which old values a relaxed
// load may still give.
//
// Both look at words: word i of granule g (memory_map.h) is number 4 * g + i.
#pragma once
#include <cstdint>
#include <vector>

#include "engine.h"
#include "random.h"
#include "vector_clock.h"

namespace gan::emulator {

inline constexpr uint32_t kWordsAGranule = 4;

// For each word, the accesses that a later one could race with: no later access knows of them that
// is as strong, where a store is stronger than a load, and an ordinary access than a relaxed one.
class RaceDetector {
 public:
  struct Accessed {
    uint32_t thread, epoch;
    bool stores, ordinary;
    Site site;
  };

  // A conflict of an access with an earlier one that nothing orders before it.
  struct Conflict {
    uint32_t words = 0;    // of the granule, bit i for word i
    bool is_race = false;  // one of the two is ordinary
    Accessed other = {};   // the first found; one of a race, where there is one
  };
  // `words`: of the granule, those that are accessed.
  Conflict access(const VectorClock& clock, uint32_t granule, uint32_t words, bool stores,
                  bool ordinary, Site site);
  void forget_all();

 private:
  static constexpr uint32_t kNone = 0;
  struct Node {
    Accessed accessed;
    uint32_t next;
  };

  uint32_t first_spare_ = kNone;
  std::vector<Node> nodes_ = std::vector<Node>(1);  // [kNone] is none
  std::vector<uint32_t> first_of_word_;
};

// Knowledge that fences hand on. Released: to threads of the own rank by any fence, to those of
// others by a fence of .sys scope. Acquired: from the own rank, which any fence takes, and from
// others, which a fence of .sys scope takes as well.
struct ByScope {
  Knowledge gpu, system;
};

// What relaxed loads may give. Ordinary accesses see the newest value: where they could not, they
// race.
class MemoryModel {
 public:
  explicit MemoryModel(Random& random) : random_(random) {}

  struct Loaded {
    uint64_t value;
    bool is_old;
  };
  struct Reader {
    const VectorClock& clock;
    uint32_t rank;
    ByScope& acquired;  // learns what a fence would have the reader know
  };
  // `newest` is what memory has.
  Loaded load(const Reader& reader, uint32_t word, uint64_t newest);
  // As the first half of an atomic read-modify-write.
  void load_newest(const Reader& reader, uint32_t word, uint64_t newest);

  struct Store {
    uint64_t value;
    uint32_t rank;
    const ByScope* released;
    bool reads_newest;  // an atomic read-modify-write
  };
  // False: nothing orders the store after another one.
  bool store(const VectorClock& clock, uint32_t word, uint64_t newest, const Store& store);
  void forget(uint32_t word);
  void forget_all() { locations_.clear(); }

 private:
  static constexpr size_t kMostMessages = 8;
  struct Message {
    uint64_t value;
    uint32_t sequence;
    uint32_t rank, writer, epoch;  // epoch 0: was there before
    ByScope released;
  };
  struct Read {
    uint32_t reader, epoch, sequence;
  };
  // What has been stored in a word, the newest last, and who has read what.
  struct Location {
    std::vector<Message> messages;
    std::vector<Read> reads;
    uint32_t next_sequence = 0;
  };

  Location& location(uint32_t word, uint64_t newest);
  static void read(Location& location, const Message& message, const Reader& reader);
  // The oldest message that the thread may read.
  static uint32_t oldest_sequence(const Location& location, const VectorClock& clock);

  Random& random_;
  std::vector<Location> locations_;
};

}  // namespace gan::emulator
