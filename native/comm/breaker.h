// Breaks a group for its network, which may find a reason before the group stands and after it has gone.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace tilerank {

class Breaker {
 public:
  void Arm(const std::shared_ptr<Communicator>& communicator) {
    std::vector<Early> early;
    {
      std::lock_guard lock(mutex_);
      communicator_ = communicator;
      early.swap(early_);
    }
    for (Early& one : early) (void)communicator->Break(std::move(one.reason), one.culprit, one.operation, one.sequence);
  }

  void Break(Status reason, int culprit, const char* operation, uint64_t sequence) {
    std::shared_ptr<Communicator> communicator;
    {
      std::lock_guard lock(mutex_);
      communicator = communicator_.lock();
      if (communicator == nullptr && early_.empty()) early_.push_back({std::move(reason), culprit, operation, sequence});
    }
    if (communicator != nullptr) (void)communicator->Break(std::move(reason), culprit, operation, sequence);
  }

 private:
  struct Early {
    Status reason;
    int culprit;
    const char* operation;
    uint64_t sequence;
  };
  std::mutex mutex_;
  std::weak_ptr<Communicator> communicator_;
  std::vector<Early> early_;  // the first reason, until the group stands
};

}  // namespace tilerank
