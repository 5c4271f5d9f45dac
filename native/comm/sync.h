// How ranks of one node wait for each other: sequence flags in shared memory, a bounded spin, then a shared futex. What lies
// where in an arena's control pages is defined here; who waits for what is communicator.cpp's. No algorithm, no arithmetic.
//
// Every word has one writer (the owner of the arena), except `sleepers`, which the waiters count up and down.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <climits>
#include <cstddef>
#include <cstdint>

namespace tilerank {

static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint64_t>) == 8);
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
static_assert(std::endian::native == std::endian::little, "the futex is the low half of a sequence: its first four bytes");

constexpr size_t kPageBytes = 4096;
constexpr int kPayloadWords = 4;

/// What a (rank, lane) shows of one collective: two such lines, used by sequence parity.
struct alignas(64) FlagLine {
  std::atomic<uint64_t> sequence;               // stored last, seq_cst: publishes the rest of the line and the slot
  std::atomic<uint64_t> tag;                    // op, dtype, variant, detail (OpTag::Bits)
  std::atomic<uint64_t> count;                  // elements
  std::atomic<uint64_t> payload[kPayloadWords];  // free for the caller: partial sums, small messages
};
static_assert(sizeof(FlagLine) == 64);

struct alignas(64) ConsumedLine {
  std::atomic<uint64_t> sequence;  // all generations up to this one have been read by this (rank, lane)
};

/// Written by waiters of other ranks, seldom; read by the owner after each publish, so it stays in the owner's cache.
struct alignas(64) SleepersLine {
  std::atomic<uint32_t> flag[2];   // waiters asleep on flag[parity].sequence
  std::atomic<uint32_t> consumed;  // waiters asleep on consumed.sequence
};

struct LaneControl {
  FlagLine flag[2];
  ConsumedLine consumed;
  SleepersLine sleepers;
};
static_assert(sizeof(LaneControl) == 256);

/// Why a rank broke the group, for its peers. Fields are plain: written before `state`, read after it.
struct alignas(64) AbortRecord {
  std::atomic<uint32_t> state;  // 0: none; 1: the fields stand
  int32_t code;                 // Code
  int32_t subject;              // the rank that is to blame, or -1
  int32_t signal;               // that ended it, or 0
  int64_t pid;                  // of subject, or 0
  char operation[24];
  uint64_t sequence;
  char host[64];                // of subject, zero-terminated
  char text[352];               // for people, zero-terminated
};
static_assert(sizeof(AbortRecord) == 512);

constexpr size_t kMostMembers = 256;

/// What a rank shows of its calls that make a broken group anew; read by the others, see renewal.h. It stays readable when its owner is dead.
struct alignas(64) RenewalRecord {
  std::atomic<uint32_t> ticket;  // while a call waits for the others: its round << 2 | Renewal; else 0
  std::atomic<uint32_t> round;   // of the last call
  std::atomic<uint32_t> failed;  // the last round in which a call of this rank failed, for the reason that follows: stored after it
  std::atomic<int32_t> code;     // Code
  std::atomic<uint64_t> late[kMostMembers / 64];  // bits of the ranks that it names
  // The decision of a rank that leads: odd while it is being written.
  alignas(64) std::atomic<uint32_t> version;
  std::atomic<uint64_t> group;   // number of the new group
  std::atomic<uint32_t> tickets[kMostMembers];  // of its ranks, 0: not in it
};

/// The same of a group on several nodes, for the ranks of this one: see network_renewal.h.
struct alignas(64) ShownRecord {
  std::atomic<uint64_t> version;  // odd while it is being written; 0: nothing was
  std::atomic<uint64_t> words[47];
};

/// First page of an arena; zero pages from the kernel are its valid initial state.
struct ControlPage {
  AbortRecord abort;
  alignas(64) std::atomic<uint32_t> left;  // 1: the owner closed the group in order
  // One moment on both clocks, from which readers of the flight recorder turn ticks into time.
  alignas(64) std::atomic<uint64_t> start_ticks;
  std::atomic<int64_t> start_ns;
  RenewalRecord renewal;
  // Of the group's first rank: whether a group that is confirmed (renewal.h) stands. Set once, by any rank of it.
  alignas(64) std::atomic<uint32_t> outcome;
  // 1 + the rank that the owner has been waiting for, as users know it, and when it last looked; 0: none. Read when a deadline has passed.
  alignas(64) std::atomic<int32_t> held_up_by;
  std::atomic<int64_t> held_up_ns;
  ShownRecord shown;
};
static_assert(sizeof(ControlPage) <= kPageBytes);

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t NowNs() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

/// Sleeps while the low half of `word` equals that of `seen`, for at most slice_ns. Wakes early without a reason now and then.
inline void FutexWait(const std::atomic<uint64_t>& word, uint64_t seen, int64_t slice_ns) {
  const timespec slice = {slice_ns / 1'000'000'000, slice_ns % 1'000'000'000};
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT, static_cast<uint32_t>(seen), &slice, nullptr, 0);
}

inline void FutexWakeAll(const std::atomic<uint64_t>& word) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

/// How long one operation may wait. The clock is first read when a wait becomes slow, so that a fast operation never reads it;
/// an operation of several waits passes the same object to all of them. Not shared between threads.
class Deadline {
 public:
  static Deadline AfterMs(int64_t timeout_ms) { return Deadline(timeout_ms); }
  /// No end but abort and the loss of a peer: for the wait between steps.
  static Deadline Idle() { return Deadline(-1); }

  /// The same, for a wait that another rank's verdict should come before: it ends so much later.
  Deadline Later(int64_t ms) const {
    Deadline later = *this;
    later.grace_ms_ += ms;
    return later;
  }

  bool is_idle() const { return timeout_ms_ < 0; }
  int64_t timeout_ms() const { return timeout_ms_; }
  int64_t ElapsedNs(int64_t now_ns) const {
    if (start_ns_ == 0) start_ns_ = now_ns;
    return now_ns - start_ns_;
  }
  bool IsOver(int64_t now_ns) const { return !is_idle() && ElapsedNs(now_ns) >= (timeout_ms_ + grace_ms_) * 1'000'000; }
  int64_t RemainingNs(int64_t now_ns) const {
    return is_idle() ? INT64_MAX : (timeout_ms_ + grace_ms_) * 1'000'000 - ElapsedNs(now_ns);
  }

 private:
  explicit Deadline(int64_t timeout_ms) : timeout_ms_(timeout_ms) {}
  int64_t timeout_ms_;
  int64_t grace_ms_ = 0;
  mutable int64_t start_ns_ = 0;
};

}  // namespace tilerank
