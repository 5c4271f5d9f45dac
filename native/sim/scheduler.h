// A virtual clock for virtual ranks: each is a fiber with a clock of its own, and whatever has the lowest clock goes on. So a run is a function
// of its input alone. One thread, no locks: a fiber gives way only in Settle and Block.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

#include "status.h"

namespace tilerank {

/// Picoseconds: whole numbers, so that no sum depends on its order; 100 days fit.
using SimTime = int64_t;

class Scheduler {
 public:
  using OnEvent = std::function<void(SimTime at, uint32_t kind, uint64_t id)>;

  explicit Scheduler(OnEvent on_event) : on_event_(std::move(on_event)) {}
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// body(i) runs on fiber i, from time 0. Returns when all have ended. `on_stuck` is called when none of those left can go on; it must wake one.
  Status Run(int fibers, std::function<void(int)> body, std::function<void()> on_stuck);

  // Of the fiber that runs.

  int current() const { return current_; }
  SimTime now() const { return fibers_[static_cast<size_t>(current_)].clock; }
  void AdvanceTo(SimTime time) {
    Fiber& fiber = fibers_[static_cast<size_t>(current_)];
    if (time > fiber.clock) fiber.clock = time;
  }
  /// Lets everything go first that is earlier: what this fiber then takes - a link, a core - nobody wanted sooner. True: something went.
  bool Settle();
  /// Until Wake.
  void Block();

  // Of anybody.

  bool IsBlocked(int fiber) const { return fibers_[static_cast<size_t>(fiber)].is_blocked; }
  /// A blocked fiber goes on, not before `time`.
  void Wake(int fiber, SimTime time);
  /// on_event(time, kind, id) when everything before has happened.
  void At(SimTime time, uint32_t kind, uint64_t id);

 private:
  struct Fiber {
    ucontext_t context;
    SimTime clock = 0;
    bool is_blocked = false;
  };
  struct Event {
    SimTime time;
    uint64_t order;  // of two at one time the first that was asked for comes first
    int32_t fiber;   // that goes on, or -1
    uint32_t kind;
    uint64_t id;
    bool operator<(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
  };
  static void Enter(uint32_t high, uint32_t low);
  void Main();
  void SwitchToMain();

  const OnEvent on_event_;
  std::function<void(int)> body_;
  std::vector<Fiber> fibers_;
  std::priority_queue<Event> events_;
  uint64_t order_ = 0;
  int current_ = -1;
  int running_ = 0;  // fibers that have not ended
  ucontext_t main_;
  std::byte* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
};

}  // namespace tilerank
