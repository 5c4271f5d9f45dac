// What a rank's calls amount to: counts for each operation and size, and where times were asked for, latencies and the last calls one by one.
// Touched by the environment's thread alone; what runs on the group's own thread is handed in when it is settled.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/fabric.h"

namespace tilerank {

/// One call, by the processor's counter (recorder.h).
struct TimedCall {
  CollectiveOp op = CollectiveOp::kBarrier;
  DType dtype = DType::kF32;
  bool has_failed = false;
  uint64_t count = 0, nbytes = 0;
  uint64_t sequence = 0, sequences = 0;
  uint64_t called = 0, begin = 0, end = 0;  // begin: its turn had come
  uint64_t waited = 0;                      // for other ranks, in between
};

/// Counts of latencies in buckets that are a sixteenth wide, so that no percentile is off by more.
class Histogram {
 public:
  static constexpr int kSubBits = 4;
  static constexpr size_t kBuckets = (64 - kSubBits + 1) << kSubBits;

  static size_t BucketOf(uint64_t ticks) {
    const int exponent = std::bit_width(ticks) - kSubBits - 1;
    if (exponent <= 0) return static_cast<size_t>(ticks);
    return (static_cast<size_t>(exponent) << kSubBits) + static_cast<size_t>(ticks >> exponent);
  }
  void Add(uint64_t ticks) { counts_[BucketOf(ticks)]++; }
  const std::array<uint32_t, kBuckets>& counts() const { return counts_; }

 private:
  std::array<uint32_t, kBuckets> counts_{};
};

class Statistics {
 public:
  static constexpr size_t kOperations = 32;
  /// Class c > 0 holds calls of 2^(c - 1) bytes and more, below 2^c; class 0 those of none.
  static constexpr size_t kSizes = 65;
  /// Calls that a trace keeps, the last ones: 6 MB.
  static constexpr size_t kTraced = 1 << 16;

  struct Tally {
    uint64_t calls = 0, bytes = 0;
    std::unique_ptr<Histogram> latency;
  };

  void Configure(bool has_latency, bool is_traced) {
    has_latency_ = has_latency;
    is_traced_ = is_traced;
  }
  bool is_timed() const { return has_latency_ || is_traced_; }
  bool is_traced() const { return is_traced_; }

  void Count(CollectiveOp op, size_t nbytes) {
    Tally& tally = TallyOf(op, nbytes);
    tally.calls++;
    tally.bytes += nbytes;
  }
  void Time(const TimedCall& call);

  const Tally& tally(size_t op, size_t size) const { return tallies_[op][size]; }
  /// In the order of their ends; and how many came before that were dropped.
  std::vector<TimedCall> Traced(uint64_t* dropped) const;

 private:
  Tally& TallyOf(CollectiveOp op, size_t nbytes) { return tallies_[static_cast<size_t>(op) % kOperations][std::bit_width(nbytes)]; }

  bool has_latency_ = false, is_traced_ = false;
  std::array<std::array<Tally, kSizes>, kOperations> tallies_;
  std::vector<TimedCall> ring_;
  uint64_t traced_ = 0;
};

}  // namespace tilerank
