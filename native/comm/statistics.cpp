#include "comm/statistics.h"

#include <algorithm>

namespace tilerank {

void Statistics::Time(const TimedCall& call) {
  if (has_latency_) {
    std::unique_ptr<Histogram>& latency = TallyOf(call.op, call.nbytes).latency;
    if (latency == nullptr) latency = std::make_unique<Histogram>();
    latency->Add(call.end - std::min(call.called, call.end));
  }
  if (is_traced_) {
    if (ring_.size() < kTraced) ring_.push_back(call);
    else ring_[traced_ % kTraced] = call;
    traced_++;
  }
}

std::vector<TimedCall> Statistics::Traced(uint64_t* dropped) const {
  *dropped = traced_ - ring_.size();
  std::vector<TimedCall> calls = ring_;
  std::rotate(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(*dropped % kTraced), calls.end());
  return calls;
}

}  // namespace tilerank
