// Accesses of memory: turns before each, polls that sleep, races, and old values.
#include <algorithm>
#include <cstring>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

static bool is_relaxed(Access access) { return access >= Access::kRelaxedLoad; }
static bool stores(Access access) {
  return access != Access::kLoad && access != Access::kRelaxedLoad;
}

static Watched* find_watched(Thread& thread, WordSet words) {
  Watched* end = thread.watched + thread.watched_count;
  Watched* found = std::find_if(thread.watched, end, [&](const Watched& watched) {
    return watched.words.granule == words.granule && watched.words.mask == words.mask;
  });
  return found == end ? nullptr : found;
}

Handling begin_access(Access access, Scope scope, const void* address, uint32_t words,
                      uint32_t word_bytes, Site site) {
  const Quiet quiet;
  return running->begin_access(access, scope, address, words, word_bytes, site);
}

Handling World::State::begin_access(Access access, Scope scope, const void* address, uint32_t words,
                                    uint32_t word_bytes, Site site) {
  Thread& thread = *current;
  const uint32_t bytes = words * word_bytes;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail_here("a misaligned address", site);
  thread.site = site;
  count_access(thread);
  const WordSet accessed = words_at(address, bytes);
  check_scope(scope, accessed, site);
  bool is_news = true;
  if (access == Access::kRelaxedLoad) {
    Watched* watched = find_watched(thread, accessed);
    if (watched != nullptr) is_news = poll_again(thread, *watched);
  } else if (stores(access)) {
    thread.watched_count = 0;
  }
  if (options.director == nullptr) {
    give_way();
  } else if (is_news && (granules[accessed.granule].contended_words & accessed.mask) != 0) {
    thread.pending = {thread.number, stores(access), reinterpret_cast<uintptr_t>(address), bytes,
                      &thread.clock};
    choices.push_back(&thread);
    wait(Status::kChoice);
  }
  if (access == Access::kRelaxedLoad) watch(thread, accessed);
  if (keeps_clocks()) detect_races(access, address, accessed, site);
  const bool torn = options.tear && is_relaxed(access) && words > 1 && options.director == nullptr;
  if (torn) {
    for (uint32_t i = 0; i < words; ++i) thread.word_order[i] = static_cast<uint8_t>(i);
    for (uint32_t i = words; i > 1; --i) {
      std::swap(thread.word_order[i - 1], thread.word_order[random.below(i)]);
    }
    thread.torn = accessed;
    thread.tears_store = stores(access);
  } else if (stores(access)) {
    note_store(accessed);
  }
  const bool modelled = options.weak && options.director == nullptr;
  if (modelled && access == Access::kStore) {
    for (uint32_t word = 0; word < kWordsAGranule; ++word) {
      memory_model.forget(accessed.granule * kWordsAGranule + word);
    }
  }
  return {torn, modelled && is_relaxed(access)};
}

uint32_t next_word(uint32_t done) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  world.give_way();
  if (thread.tears_store) world.note_store(thread.torn);
  return thread.word_order[done];
}

WordSet World::State::words_at(const void* address, uint32_t bytes) {
  const uintptr_t granule = MemoryMap::granule_of(address);
  const uint32_t number = memory_map.find_or_add(granule);
  if (number == granules.size()) {
    granules.emplace_back();
    if (options.director != nullptr) {
      granules.back().contended_words = options.director->contended_words(granule);
    }
  }
  const auto first = reinterpret_cast<uintptr_t>(address) % MemoryMap::kGranuleBytes / 4;
  return {number, ((1u << bytes / 4) - 1) << first};
}

// Changes whenever one of the words is written.
uint32_t World::State::version_of(WordSet words) const {
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kWordsAGranule; ++i) {
    if ((words.mask >> i & 1u) != 0) sum += granules[words.granule].versions[i];
  }
  return sum;
}

// ---- polls ----

// A thread that reads again what it has read, and has done nothing else, is in a loop: it sleeps
// until something of it is written, so that a state in which nothing can go on is found at once.
// False: it will read what it read last, although something else that it watches has changed.
bool World::State::poll_again(Thread& thread, Watched& watched) {
  constexpr uint64_t kMostVainPolls = 100'000'000;
  if (++vain_polls > kMostVainPolls) fail("hang: polls without end\n" + hang_report());
  if (!take_news(thread) && !watched.has_news) {
    if (polls_eagerly(thread)) {
      switch_away();
    } else {
      sleep_until_written(thread);
    }
    take_news(thread);
  }
  return watched.has_news;
}

bool World::State::take_news(Thread& thread) {
  bool is_any = false;
  for (uint32_t i = 0; i < thread.watched_count; ++i) {
    Watched& watched = thread.watched[i];
    const uint32_t version = version_of(watched.words);
    if (watched.version == version) continue;
    watched.version = version;
    watched.has_news = is_any = true;
  }
  return is_any;
}

void World::State::sleep_until_written(Thread& thread) {
  for (uint32_t i = 0; i < thread.watched_count; ++i) {
    Watched& watched = thread.watched[i];
    Watched*& first = granules[watched.words.granule].sleepers;
    watched.previous = nullptr;
    watched.next = first;
    if (first != nullptr) first->previous = &watched;
    first = &watched;
  }
  wait(Status::kPolling);
}

// For deadlines that end while others run, some threads poll on without sleep: long enough for two
// looks at the clock (exchange.cuh). Those of the eager rank do so until it is plain that nothing
// but the clock can go on.
bool World::State::polls_eagerly(Thread& thread) {
  constexpr uint32_t kOneThreadIn = 16, kEagerPolls = 192;
  constexpr uint64_t kMostInVain = 1 << 20;
  if (!options.time_passes) return false;
  if (thread.rank() == options.eager_rank) return vain_polls < kMostInVain;
  if (options.one_look_late == 0) return false;
  if (thread.eager_polls == 0 && !random.one_in(kOneThreadIn)) return false;
  if (thread.eager_polls == 0) thread.eager_polls = kEagerPolls;
  return --thread.eager_polls != 0;
}

void World::State::wake(Thread& thread) {
  for (uint32_t i = 0; i < thread.watched_count; ++i) {
    Watched& watched = thread.watched[i];
    if (watched.next != nullptr) watched.next->previous = watched.previous;
    if (watched.previous != nullptr) {
      watched.previous->next = watched.next;
    } else {
      granules[watched.words.granule].sleepers = watched.next;
    }
  }
  make_ready(thread);
}

void World::State::watch(Thread& thread, WordSet words) {
  Watched* watched = find_watched(thread, words);
  if (watched == nullptr) {
    if (thread.watched_count == Thread::kMostWatched) thread.watched_count = 0;
    watched = &thread.watched[thread.watched_count++];
    watched->words = words;
    watched->thread = &thread;
  }
  watched->version = version_of(words);
  watched->has_news = false;
  thread.last_watched = watched;
}

void World::State::note_store(WordSet words) {
  Granule& granule = granules[words.granule];
  for (uint32_t i = 0; i < kWordsAGranule; ++i) granule.versions[i] += words.mask >> i & 1u;
  for (Watched* sleeper = granule.sleepers; sleeper != nullptr;) {
    const bool wakes = (sleeper->words.mask & words.mask) != 0;
    if (wakes) wake(*sleeper->thread);  // which may take others of its from the list
    sleeper = wakes ? granule.sleepers : sleeper->next;
  }
  note_progress();
}

// ---- races and old values ----

// Accesses of .gpu scope are atomic only among threads of one GPU. The model allows some by others
// that fences order, but the kernels have none, so none is let pass.
void World::State::check_scope(Scope scope, WordSet words, Site site) {
  const uint32_t own = 1u << current->rank();
  for (uint32_t i = 0; i < kWordsAGranule; ++i) {
    if ((words.mask >> i & 1u) == 0) continue;
    Users& users = granules[words.granule].users[i];
    users.ranks |= own;
    users.gpu_scope |= scope == Scope::kGpu;
    if (users.gpu_scope && users.ranks != own) fail_here("race: .gpu accesses of two ranks", site);
  }
}

void World::State::detect_races(Access access, const void* address, WordSet words, Site site) {
  const RaceDetector::Conflict conflict = races.access(current->clock, words.granule, words.mask,
                                                       stores(access), !is_relaxed(access), site);
  if (conflict.words == 0) return;
  if (conflict.is_race) {
    fail_here(std::string("race: ") + (stores(access) ? "a store" : "a load") +
                  " that nothing orders after " +
                  (conflict.other.stores ? "the store" : "the load") + " by " +
                  describe_thread(conflict.other.thread) + " at " + describe(conflict.other.site),
              site);
  }
  if (options.director != nullptr) {
    options.director->found_contended(MemoryMap::granule_of(address), conflict.words);
  }
}

static uint32_t word_number(World::State& world, const void* word) {
  const WordSet words = world.words_at(word, 4);
  return words.granule * kWordsAGranule + static_cast<uint32_t>(__builtin_ctz(words.mask));
}

static uint64_t newest_value(const void* word, uint32_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, word, bytes);
  return value;
}

uint64_t modelled_load(const void* word, uint32_t bytes) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  const MemoryModel::Loaded loaded =
      world.memory_model.load({thread.clock, thread.rank(), thread.acquired},
                              word_number(world, word), newest_value(word, bytes));
  thread.last_watched->has_news |= loaded.is_old;
  return loaded.value;
}

void modelled_store(void* word, uint32_t bytes, uint64_t value) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  const bool is_ordered =
      world.memory_model.store(thread.clock, word_number(world, word), newest_value(word, bytes),
                               {value, thread.rank(), &thread.released, false});
  if (world.options.strict && !is_ordered) {
    world.fail_here("race: a relaxed store that nothing orders after another one", thread.site);
  }
  std::memcpy(word, &value, bytes);
}

// An atomic operation reads the newest value.
static uint32_t read_newest(World::State& world, uint32_t number, const uint32_t* word) {
  Thread& thread = *world.current;
  world.memory_model.load_newest({thread.clock, thread.rank(), thread.acquired}, number, *word);
  return *word;
}
static void write_over(World::State& world, uint32_t number, uint32_t* word, uint32_t value) {
  Thread& thread = *world.current;
  world.memory_model.store(thread.clock, number, *word,
                           {value, thread.rank(), &thread.released, true});
  *word = value;
}
bool modelled_claim(uint32_t* word) {
  const Quiet quiet;
  World::State& world = *running;
  const uint32_t number = word_number(world, word);
  if (read_newest(world, number, word) != 0) return false;
  write_over(world, number, word, 1);
  return true;
}
uint32_t modelled_add(uint32_t* word, uint32_t value) {
  const Quiet quiet;
  World::State& world = *running;
  const uint32_t number = word_number(world, word);
  const uint32_t before = read_newest(world, number, word);
  write_over(world, number, word, before + value);
  return before;
}

void fence(Scope scope) {
  const Quiet quiet;
  Thread& thread = *running->current;
  if (!running->keeps_clocks()) return;
  thread.clock.others.learn(thread.acquired.gpu);
  if (scope == Scope::kSystem) thread.clock.others.learn(thread.acquired.system);
  thread.fenced = thread.clock.others;
  thread.fenced.learn(thread.number, thread.clock.epoch++);
  thread.released.gpu = thread.fenced;
  if (scope == Scope::kSystem) thread.released.system = thread.fenced;
}

}  // namespace gan::emulator
