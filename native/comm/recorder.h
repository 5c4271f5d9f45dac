// Flight recorder: the last operations of every rank, readable after its death. A ring of cache lines in the rank's own arena,
// right behind the control page; written by its owner behind each publish and await, read by whoever maps the arena - the other
// ranks, and the launcher (archive.h) - when something failed. Readers trust nothing that stands there.
//
// Lane 0 alone is recorded: collectives of a Group and the runner's steps go through it. Record `sequence % kRecords` belongs to
// that sequence, so that no head is needed: whoever reads sorts.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/sync.h"

namespace tilerank {

constexpr uint64_t kRecords = 1024;

/// Written by the owner of the arena alone, with relaxed stores: one line of its own cache, no clock but the counter.
struct alignas(64) Record {
  std::atomic<uint64_t> sequence;   // 0: never used
  std::atomic<uint64_t> tag;        // OpTag::Bits
  std::atomic<uint64_t> count;      // elements
  std::atomic<uint64_t> published;  // ticks; 0: this rank only waits for another's part
  std::atomic<uint64_t> completed;  // ticks; 0: not yet
  std::atomic<uint64_t> place;      // step << 32 | layer + 1, both 0 outside of the runner
};
static_assert(sizeof(Record) == 64);

constexpr size_t kRecorderOffset = kPageBytes;
constexpr size_t kRecorderBytes = kRecords * sizeof(Record);

/// The cheapest clock that all cores share: the processor's counter, about 10 ns, where clock_gettime takes 22.
inline uint64_t Ticks() {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
  uint64_t ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#else
  return static_cast<uint64_t>(NowNs());
#endif
}

/// Turns ticks into CLOCK_MONOTONIC: they count evenly, so that two moments give their rate.
class TickClock {
 public:
  TickClock() : ticks_(Ticks()), ns_(NowNs()) {}
  /// Of one tick, by what has passed since this was made.
  double NsPerTick() const {
    const uint64_t ticks = Ticks() - ticks_;
    return ticks == 0 ? 0 : static_cast<double>(NowNs() - ns_) / static_cast<double>(ticks);
  }
  uint64_t start_ticks() const { return ticks_; }
  int64_t start_ns() const { return ns_; }

 private:
  uint64_t ticks_;
  int64_t ns_;
};

/// One record as read. Times on CLOCK_MONOTONIC in nanoseconds; 0: none, or none that can be.
struct RecordRow {
  uint64_t sequence = 0, tag = 0, count = 0;
  int64_t published_ns = 0, completed_ns = 0;
  uint32_t step = 0;
  int32_t layer = -1;
};

/// What one rank's arena says.
struct RankRecording {
  int rank = 0;
  uint64_t group = 0;
  pid_t pid = 0;
  std::vector<RecordRow> rows;  // by sequence
};

/// The last `limit` records of a mapped arena (at least kRecorderOffset + kRecorderBytes of it), ordered by sequence. A record that
/// is being written, stands in the wrong place or holds impossible times is left out, or its times are.
std::vector<RecordRow> ReadRecorder(const std::byte* arena, size_t limit);

}  // namespace tilerank
