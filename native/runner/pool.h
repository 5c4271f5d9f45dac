// The pinned threads of one rank. Thread 0 is the leader: it takes jobs, one at a time, and starts the team on each; the others
// spin a little and then sleep until it does. Inside a job the team meets at barriers. A wait never burns a core for long:
// bounded pause-spin, then a futex.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "status.h"

namespace tilerank {

/// A counter that threads of this process wait on. The poster enters the kernel only when somebody sleeps.
struct alignas(64) WaitWord {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  void Post();
  /// Returns once value differs from `seen`, now and then earlier: callers loop. No slices: an idle team must not wake, so whoever
  /// changes another condition of a waiter posts as well.
  void Wait(uint32_t seen, int spin_us);
};

class Pool {
 public:
  /// cores[t] is where thread t is pinned; an empty list leaves one thread unpinned. spin_us: how long an idle team thread and a
  /// thread at a barrier look before they sleep (0 where threads outnumber cores).
  Pool(std::vector<int> cores, int spin_us);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(team_size_); }

  /// Called on the leader only: runs body(thread) on every thread of the team, the leader included, and returns when all are done.
  template <class Body>
  void Run(Body&& body) {
    if (team_size_ == 1) return body(0);
    context_ = &body;
    invoke_ = [](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); };
    Start();
    body(0);
    Finish();
  }

  /// Every thread of the team calls it; returns when all have. Returns early, with false, once stop() was called: the threads of
  /// a failed step leave it wherever they are.
  bool Barrier(int thread);

  /// The running job has failed: barriers let go. Reset by the next Run.
  void Stop() {
    stopped_.store(true, std::memory_order_seq_cst);
    phase_.Post();
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  /// Starts the leader with `main`; it runs there until it returns. Joined by the destructor.
  template <class Main>
  void StartLeader(Main main) {
    leader_ = std::thread([this, main] {
      Pin(0);
      main();
    });
  }
  void JoinLeader() {
    if (leader_.joinable()) leader_.join();
  }
  /// What the kernel said when it refused to pin the leader, or empty. Called on any thread.
  std::string pin_warning() const;

 private:
  void Pin(int thread);
  void WorkerMain(int thread);
  void Start();
  void Finish();

  const std::vector<int> cores_;
  const size_t team_size_;
  const int spin_us_;
  std::atomic<int> pin_error_{0};                 // errno of the leader's refused pinning
  std::thread leader_;
  std::vector<std::thread> workers_;

  void* context_ = nullptr;                      // published by epoch_
  void (*invoke_)(void*, int) = nullptr;         // likewise
  std::atomic<bool> quitting_{false};
  std::atomic<bool> stopped_{false};
  WaitWord epoch_;                                // leader -> workers: a job stands
  WaitWord done_;                                 // workers -> leader: counts finished threads
  WaitWord phase_;                                // counts barriers; the last to arrive moves it, and so does Stop
  alignas(64) std::atomic<uint32_t> arrived_{0};  // at the current barrier
};

}  // namespace tilerank
