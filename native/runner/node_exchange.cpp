#include "runner/node_exchange.h"

#include <algorithm>
#include <cstring>

#include "comm/leg.h"

namespace tilerank {

namespace {

// Whoever waits for a late rank on its own node says so first: to the network it is that whole node that is late.
constexpr int64_t kNetworkGraceMs = 150;
// Between steps a rank looks this often whether the group has broken; failures wake it besides.
constexpr int64_t kIdleSliceNs = 1'000'000'000;
// Frames sent before the first is received, so that the network is not idle between two.
constexpr uint64_t kLag = 2;

}  // namespace

NodeExchange::NodeExchange(std::shared_ptr<Communicator> communicator, std::shared_ptr<Transport> transport, Layout layout, size_t slot_bytes,
                           decltype(Kernels::copy) copy)
    : communicator_(std::move(communicator)), transport_(std::move(transport)), layout_(std::move(layout)), slot_bytes_(slot_bytes), kept_(Kept(layout_)), copy_(copy) {
  holders_.resize(static_cast<size_t>(layout_.world_size()));
  for (int local = 0; local < layout_.local_size(layout_.node); local++) {
    const std::vector<int>& held = layout_.held[static_cast<size_t>(layout_.RankOf(layout_.node, local))];
    for (size_t place = 0; place < held.size(); place++) holders_[static_cast<size_t>(held[place])] = {local, place};
  }
  leader_local_ = IsHere(0) ? layout_.local_of[0] : HolderOf(0);
  size_t parts = 0;
  for (int rank = 0; rank < layout_.world_size(); rank++) part_.push_back(IsHere(rank) ? 0 : parts++);
  sending_.reserve(part_.size());
  receiving_.reserve(part_.size());
}

size_t NodeExchange::Kept(const Layout& layout) {
  size_t most = 0;
  for (const std::vector<int>& held : layout.held) most = std::max(most, held.size());
  return most;
}

size_t NodeExchange::SlotBytes(const Layout& layout, size_t slot_bytes) {
  const size_t kept = Kept(layout);
  return slot_bytes * (1 + kept) + sizeof(Head) * kept;
}

std::byte* NodeExchange::Slot(int rank, uint64_t sequence) const {
  if (IsHere(rank)) return communicator_->Slot(layout_.local_of[static_cast<size_t>(rank)], sequence);
  return communicator_->Slot(HolderOf(rank), sequence) + AreaOf(rank);
}

FlagPayload NodeExchange::PayloadOf(int rank, int lane, uint64_t sequence) const {
  if (IsHere(rank)) return communicator_->PayloadOf(layout_.local_of[static_cast<size_t>(rank)], lane, sequence);
  Head head;
  std::memcpy(&head, communicator_->Slot(HolderOf(rank), sequence) + HeadOf(rank), sizeof head);
  return head.payload;
}

const std::byte* NodeExchange::PartFrom(int rank, uint64_t sequence) const {
  return Own(sequence) + slot_bytes_ + part_[static_cast<size_t>(rank)] * part_bytes_;
}

void NodeExchange::Keep(int rank, uint64_t sequence) {
  receiving_.push_back({rank, Own(sequence) + AreaOf(rank), false, slot_bytes_, 0, 0, Own(sequence) + HeadOf(rank)});
}

Status NodeExchange::Share(uint64_t sequence, const OpTag& tag, std::span<const SlotRange> shown, const FlagPayload& payload, const Deadline& deadline) {
  sending_.clear();
  receiving_.clear();
  const int world = layout_.world_size();
  if (shown.size() == 1) {
    for (int step = 1; step < layout_.num_nodes(); step++) {
      sending_.push_back({layout_.TwinOf(layout_.rank, (layout_.node + step) % layout_.num_nodes()), shown[0], 0});
    }
    for (int rank : layout_.held[static_cast<size_t>(layout_.rank)]) Keep(rank, sequence);
    return Transfer(sequence, tag, payload, deadline);
  }
  part_bytes_ = shown[static_cast<size_t>(layout_.rank)].nbytes;
  const size_t room = slot_bytes_ * kept_, parts = static_cast<size_t>(world - layout_.local_size(layout_.node));
  if (parts * part_bytes_ > room) return Status(Code::kInternal, "parts of " + std::to_string(part_bytes_) + " bytes do not fit a slot");
  for (int step = 1; step < world; step++) {
    const int rank = (layout_.rank + step) % world;
    if (IsHere(rank)) continue;
    sending_.push_back({rank, shown[static_cast<size_t>(rank)], 0});
    const bool is_held = HolderOf(rank) == layout_.local;
    receiving_.push_back({rank, Own(sequence) + slot_bytes_ + part_[static_cast<size_t>(rank)] * part_bytes_, true, part_bytes_, 0, 0,
                          is_held ? Own(sequence) + HeadOf(rank) : nullptr});
  }
  return Transfer(sequence, tag, payload, deadline);
}

Status NodeExchange::Tell(uint64_t sequence, const OpTag& tag, SlotRange shown, const Deadline& deadline) {
  sending_.clear();
  receiving_.clear();
  for (int node = 0; node < layout_.num_nodes(); node++) {
    if (node != layout_.node) sending_.push_back({layout_.TwinOf(0, node), shown, 0});
  }
  return Transfer(sequence, tag, {}, deadline);
}

Status NodeExchange::AwaitTold() {
  Frame frame;
  while (!transport_->Poll(0, &frame)) {
    if (communicator_->failed()) return communicator_->failure();
    if (transport_->HasLeft(0) && !transport_->Poll(0, &frame)) {
      return communicator_->Break(Status(Code::kPeerLost, "rank 0 closed the group, while rank " + std::to_string(layout_.rank) + " waits for its next step")
                                      .Number("rank", 0)
                                      .Number("reportedBy", layout_.rank)
                                      .Text("operation", "idle"),
                                  0, "idle", 0);
    }
    transport_->Wait(0, false, {}, kIdleSliceNs);
  }
  return Status::Ok();
}

Status NodeExchange::Hear(uint64_t sequence, const OpTag& tag, size_t* nbytes, const Deadline& deadline) {
  sending_.clear();
  receiving_.clear();
  Keep(0, sequence);
  Status status = Transfer(sequence, tag, {}, deadline);
  *nbytes = receiving_[0].nbytes;
  return status;
}

// All send their first frames before they receive any, so that nobody waits for one who waits; the window is larger than kLag.
Status NodeExchange::Transfer(uint64_t sequence, const OpTag& tag, const FlagPayload& payload, const Deadline& deadline) {
  const FrameTag expected = {sequence, tag, 0};
  transport_->Enter(expected);
  Leg leg(*communicator_, *transport_, layout_.rank, expected, deadline.Later(kNetworkGraceMs));
  const size_t frame_bytes = transport_->frame_bytes();
  const std::byte* own = Own(sequence);
  const auto size_of = [frame_bytes](size_t left, size_t head) { return std::min(left, frame_bytes - head); };
  const auto send = [&](Sending& to, uint64_t part) -> Status {
    const size_t head_bytes = part == 0 ? sizeof(Head) : 0, nbytes = size_of(to.range.nbytes - to.done, head_bytes);
    std::byte* room;
    if (Status s = leg.Room(to.peer, part, &room); !s.ok()) return s;
    const Head head = {to.range.begin, to.range.nbytes, payload, {}};
    std::memcpy(room, &head, head_bytes);
    copy_(room + head_bytes, own + to.range.begin + to.done, nbytes);
    leg.Post(to.peer, part, head_bytes + nbytes);
    to.done += nbytes;
    return Status::Ok();
  };
  const auto receive = [&](Receiving& from, uint64_t part) -> Status {
    Frame frame;
    if (Status s = leg.Next(from.peer, part, &frame); !s.ok()) return s;
    const size_t head_bytes = part == 0 ? sizeof(Head) : 0;
    bool is_sound = frame.nbytes >= head_bytes;
    if (part == 0 && is_sound) {
      Head head;
      std::memcpy(&head, frame.data, sizeof head);
      is_sound = from.is_part ? head.nbytes == from.most : head.begin <= from.most && head.nbytes <= from.most - head.begin;
      if (!from.is_part && is_sound) from.to += head.begin;
      from.nbytes = head.nbytes;
      if (from.head != nullptr) std::memcpy(from.head, &head, sizeof head);
    }
    if (!is_sound || frame.nbytes != head_bytes + size_of(from.nbytes - from.done, head_bytes)) return leg.Mismatch(from.peer, part, frame);
    copy_(from.to + from.done, frame.data + head_bytes, frame.nbytes - head_bytes);
    from.done += frame.nbytes - head_bytes;
    leg.Release(from.peer);
    return Status::Ok();
  };
  bool is_over = false;
  for (uint64_t frame = 0; !is_over; frame++) {
    is_over = frame >= kLag;
    for (Sending& to : sending_) {
      if (frame > 0 && to.done == to.range.nbytes) continue;
      if (Status s = send(to, frame); !s.ok()) return s;
      is_over = false;
    }
    if (frame < kLag) continue;
    for (Receiving& from : receiving_) {
      if (frame > kLag && from.done == from.nbytes) continue;
      if (Status s = receive(from, frame - kLag); !s.ok()) return s;
      is_over = false;
    }
  }
  transport_->Settle();
  return Status::Ok();
}

}  // namespace tilerank
