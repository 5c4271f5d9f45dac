#include "comm/leg.h"

namespace tilerank {

Status Leg::Receive(int peer, uint64_t part, size_t nbytes, const std::byte** data) {
  Frame frame;
  if (Status s = Next(peer, part, &frame); !s.ok()) return s;
  if (frame.nbytes != nbytes) return Mismatch(peer, part, frame);
  *data = frame.data;
  return Status::Ok();
}

Status Leg::Next(int peer, uint64_t part, Frame* frame) {
  const FrameTag mine = TagOf(part);
  if (Status s = WaitUntil(peer, mine, false, [&] { return net_.Poll(peer, frame); }); !s.ok()) return s;
  const FrameTag& theirs = frame->tag;
  const bool is_same =
      theirs.operation == mine.operation && theirs.part == mine.part && theirs.tag.Bits() == mine.tag.Bits() && theirs.tag.count == mine.tag.count;
  return is_same ? Status::Ok() : Mismatch(peer, part, *frame);
}

Status Leg::Mismatch(int peer, uint64_t part, const Frame& frame) {
  const FrameTag mine = TagOf(part), &theirs = frame.tag;
  const char* operation = NameOf(mine.tag.op);
  return fabric_.Break(Status(Code::kMismatch, "ranks called different operations: number " + std::to_string(mine.operation) + " of rank " + std::to_string(rank_) +
                                                   " is " + mine.tag.Describe() + ", number " + std::to_string(theirs.operation) + " of rank " +
                                                   std::to_string(peer) + " is " + theirs.tag.Describe())
                           .Number("rank", rank_)
                           .Number("peer", peer)
                           .Number("sequence", static_cast<double>(mine.operation))
                           .Text("operation", operation)
                           .Text("mine", mine.tag.Describe())
                           .Text("theirs", theirs.tag.Describe()),
                       peer, operation, mine.operation);
}

Status Leg::TimedOut(int peer, int64_t now) {
  const char* operation = NameOf(expected_.tag.op);
  const int held_up_by = net_.HeldUpBy(peer);
  const std::string late = std::to_string(held_up_by);
  return fabric_.Break(Status(Code::kTimeout, std::string(operation) + " number " + std::to_string(expected_.operation) + " did not end within " +
                                                  std::to_string(deadline_.timeout_ms()) + " ms on rank " + std::to_string(rank_) + ": rank " + std::to_string(peer) +
                                                  " of another node did not come" + (held_up_by == peer ? "" : ", which waits for rank " + late))
                           .Number("rank", rank_)
                           .Text("lateRanks", late)
                           .Number("sequence", static_cast<double>(expected_.operation))
                           .Number("elapsedMs", static_cast<double>(deadline_.ElapsedNs(now)) / 1e6)
                           .Text("operation", operation),
                       held_up_by, operation, expected_.operation);
}

Status Leg::Left(int peer) {
  const char* operation = NameOf(expected_.tag.op);
  const bool is_renewing = net_.IsRenewing(peer);
  const char* how = is_renewing ? " went on to make the group anew, while rank " : " closed the group, while rank ";
  return fabric_.Break(Status(is_renewing ? Code::kAborted : Code::kPeerLost, "rank " + std::to_string(peer) + how + std::to_string(rank_) + " waits for it in " + operation +
                                                   " number " + std::to_string(expected_.operation))
                           .Number("rank", peer)
                           .Number("reportedBy", rank_)
                           .Number("sequence", static_cast<double>(expected_.operation))
                           .Text("operation", operation),
                       peer, operation, expected_.operation);
}

}  // namespace tilerank
