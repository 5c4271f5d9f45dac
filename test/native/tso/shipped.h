// Included before every shipped source: puts the machine of machine.h in the place of std::atomic, std::thread, the futex, the
// pause and the clocks. All standard headers come first, so that only the shipped code sees the other names.
#include <linux/futex.h>
#include <linux/mempolicy.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

namespace std {

template <class T>
class tso_atomic {
 public:
  static constexpr bool is_always_lock_free = true;
  tso_atomic() = default;
  constexpr tso_atomic(T value) : value_(value) {}
  tso_atomic(const tso_atomic&) = delete;
  tso_atomic& operator=(const tso_atomic&) = delete;

  T load(memory_order = memory_order_seq_cst) const { return static_cast<T>(tso::Load(&value_, sizeof(T))); }
  // What compilers emit: a plain store up to release, a locked exchange for seq_cst.
  void store(T value, memory_order order = memory_order_seq_cst) {
    if (order == memory_order_seq_cst) {
      tso::StoreLocked(&value_, static_cast<uint64_t>(value), sizeof(T));
    } else {
      tso::Store(&value_, static_cast<uint64_t>(value), sizeof(T));
    }
  }
  // Locked whatever the order.
  T fetch_add(T value, memory_order = memory_order_seq_cst) {
    return static_cast<T>(tso::Add(&value_, static_cast<uint64_t>(value), sizeof(T)));
  }
  T fetch_sub(T value, memory_order = memory_order_seq_cst) {
    return static_cast<T>(tso::Add(&value_, ~static_cast<uint64_t>(value) + 1, sizeof(T)));
  }

 private:
  T value_{};
};

class tso_thread {
 public:
  tso_thread() = default;
  template <class Body>
  explicit tso_thread(Body body) : thread_(tso::Spawn(std::move(body))) {}
  tso_thread(tso_thread&& other) noexcept : thread_(exchange(other.thread_, -1)) {}
  tso_thread& operator=(tso_thread&& other) noexcept {
    swap(thread_, other.thread_);
    return *this;
  }
  bool joinable() const { return thread_ >= 0; }
  // Leaves no mark: the object may lie outside of the caller's image.
  void join() { tso::Join(thread_); }

 private:
  int thread_ = -1;
};

namespace chrono {
// Stands still: no spin ends by the clock. A spin that does, and then sleeps, has looked in vain and changed nothing, so it is
// the same as one of no length.
struct tso_clock {
  using duration = nanoseconds;
  using time_point = chrono::time_point<tso_clock, duration>;
  static time_point now() { return time_point(duration(1)); }
};
}  // namespace chrono

}  // namespace std

namespace tso {

// Which of the broken lines is in force, in the copies of the sources that hold them; 0: none.
inline int mutant = 0;

inline long FutexCall(const uint32_t* word, int operation, uint32_t value, const timespec*, const uint32_t*, uint32_t) {
  return Futex(word, operation, value);
}

template <class... Arguments>
long SystemCall(long number, Arguments... arguments) {
  if constexpr (std::is_invocable_v<decltype(FutexCall), Arguments...>) {
    if (number == SYS_futex) return FutexCall(arguments...);
  }
  assert(number != SYS_futex);
  return ::syscall(number, arguments...);
}

inline int GetTime(clockid_t, timespec* time) {
  *time = {0, 1};
  return 0;
}

}  // namespace tso

#define atomic tso_atomic
#define thread tso_thread
#define steady_clock tso_clock
#define syscall ::tso::SystemCall
#define clock_gettime ::tso::GetTime
#define pthread_setaffinity_np(...) 0
#define __builtin_ia32_pause ::tso::Pause
#define __builtin_ia32_rdtsc() uint64_t{1}
