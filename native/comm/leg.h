// One call's part on the network: room, frames sent and received, each a wait with a deadline that also ends with the group. What comes is
// compared with what was to come, so that ranks which called different things find out.
#pragma once
#include <algorithm>
#include <string>
#include <utility>

#include "comm/transport.h"

namespace tilerank {

class Leg {
 public:
  /// `fabric`: of this node's ranks, broken on every failure. `rank`: this one, in the group. `expected`: the part is each frame's own.
  Leg(Fabric& fabric, Transport& net, int rank, const FrameTag& expected, const Deadline& deadline)
      : fabric_(fabric), net_(net), rank_(rank), expected_(expected), deadline_(deadline) {}

  FrameTag TagOf(uint64_t part) const {
    FrameTag tag = expected_;
    tag.part = static_cast<uint32_t>(part);
    return tag;
  }

  Status Room(int peer, uint64_t part, std::byte** room) {
    return WaitUntil(peer, TagOf(part), true, [&] { return (*room = net_.Reserve(peer)) != nullptr; });
  }
  void Post(int peer, uint64_t part, size_t nbytes) { net_.Post(peer, TagOf(part), nbytes); }
  /// The next frame of `peer`, which must be this one; readable until Release(peer).
  Status Receive(int peer, uint64_t part, size_t nbytes, const std::byte** data);
  /// The same of a frame that says itself how much it has.
  Status Next(int peer, uint64_t part, Frame* frame);
  /// Breaks the group: what came is not what was to come.
  Status Mismatch(int peer, uint64_t part, const Frame& frame);
  void Release(int peer) { net_.Release(peer); }

 private:
  static constexpr int64_t kSliceNs = 10'000'000;
  Status TimedOut(int peer, int64_t now);
  Status Left(int peer);

  template <class Ready>
  Status WaitUntil(int peer, const FrameTag& tag, bool is_for_room, Ready is_ready) {
    bool has_waited = false;
    while (!is_ready()) {
      if (fabric_.failed()) return fabric_.failure();
      if (net_.HasLeft(peer)) return is_ready() ? Status::Ok() : Left(peer);  // what it sent before still counts
      const int64_t now = net_.Now();
      if (deadline_.IsOver(now)) return TimedOut(peer, now);
      has_waited = true;
      fabric_.ShowHeldUp(net_.HeldUpBy(peer), now);
      net_.Wait(peer, is_for_room, tag, std::min(kSliceNs, deadline_.RemainingNs(now)));
    }
    if (has_waited) fabric_.ShowHeldUp(-1, 0);
    return Status::Ok();
  }

  Fabric& fabric_;
  Transport& net_;
  const int rank_;
  const FrameTag expected_;
  const Deadline deadline_;
};

}  // namespace tilerank
