#include "runner/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>

namespace tilerank {

namespace {

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long Futex(const std::atomic<uint32_t>& word, int op, uint32_t value) {
  static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);
  return syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), op | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

void WaitWord::Post() {
  // Pairs with Wait: either the sleeper's raised count is seen here, or the sleeper sees the new value before it sleeps.
  value.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) Futex(value, FUTEX_WAKE, INT_MAX);
}

void WaitWord::Wait(uint32_t seen, int spin_us) {
  using Clock = std::chrono::steady_clock;
  if (spin_us > 0) {
    const auto end = Clock::now() + std::chrono::microseconds(spin_us);
    do {
      for (int i = 0; i < 64; i++) {
        if (value.load(std::memory_order_acquire) != seen) return;
        Pause();
      }
    } while (Clock::now() < end);
  }
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (value.load(std::memory_order_seq_cst) == seen) Futex(value, FUTEX_WAIT, seen);
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::Pool(std::vector<int> cores, int spin_us)
    : cores_(std::move(cores)), team_size_(cores_.empty() ? 1 : cores_.size()), spin_us_(spin_us) {
  for (size_t t = 1; t < team_size_; t++) workers_.emplace_back([this, t] { WorkerMain(static_cast<int>(t)); });
}

Pool::~Pool() {
  JoinLeader();
  quitting_.store(true);
  epoch_.Post();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::Pin(int thread) {
  if (cores_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  const int core = cores_[static_cast<size_t>(thread)];
  if (core < 0 || core >= CPU_SETSIZE) return;
  CPU_SET(core, &set);
  if (int error = pthread_setaffinity_np(pthread_self(), sizeof set, &set); error != 0 && thread == 0) {
    pin_error_.store(error, std::memory_order_relaxed);
  }
}

std::string Pool::pin_warning() const {
  const int error = pin_error_.load(std::memory_order_relaxed);
  return error == 0 ? "" : std::string("compute threads are not bound to their cores (sched_setaffinity: ") + std::strerror(error) + ")";
}

void Pool::WorkerMain(int thread) {
  Pin(thread);
  uint32_t seen = 0;
  for (;;) {
    bool is_first = true;
    while (epoch_.value.load(std::memory_order_acquire) == seen) {
      // An idle team looks for a while, then sleeps: only the first look spins.
      epoch_.Wait(seen, is_first ? spin_us_ : 0);
      is_first = false;
    }
    seen++;
    if (quitting_.load(std::memory_order_relaxed)) return;
    invoke_(context_, thread);
    done_.Post();
  }
}

void Pool::Start() {
  done_.value.store(0, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  stopped_.store(false, std::memory_order_relaxed);
  epoch_.Post();  // publishes context_, invoke_ and the resets above
}

void Pool::Finish() {
  const uint32_t others = static_cast<uint32_t>(team_size_ - 1);
  for (;;) {
    const uint32_t done = done_.value.load(std::memory_order_acquire);
    if (done == others) return;
    done_.Wait(done, spin_us_);
  }
}

bool Pool::Barrier(int) {
  if (team_size_ == 1) return true;
  const uint32_t phase = phase_.value.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1) + 1 == team_size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.Post();
    return !stopped();
  }
  while (phase_.value.load(std::memory_order_acquire) == phase) {
    if (stopped()) return false;
    phase_.Wait(phase, spin_us_);
  }
  return !stopped();
}

}  // namespace tilerank
