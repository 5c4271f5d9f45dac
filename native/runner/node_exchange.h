// The runner's exchanges where its ranks are on several nodes. What a rank shows in its slot goes to one rank of every other node, its twin,
// which keeps it beside its own, where its node reads it. So every rank has the slots of all ranks, and adds them in rank order: a job gives
// the same bits however its ranks are spread over nodes.
//
// Of what a rank shows, S bytes, it sends S to each of the other K - 1 nodes, one hop. Sums of R ranks of a node, in f32, would be 4 S / element
// bytes a node instead of R S: as many with 2 ranks of bf16, and more hops in the node. With more ranks a node this costs bytes for the same bits.
// Large steps share out their rows (runner.h), where a rank sends only the rows that each other one reduces, S / N to each.
#pragma once
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "comm/communicator.h"
#include "comm/transport.h"
#include "status.h"

namespace tilerank {

/// Bytes of a slot that a rank shows.
struct SlotRange {
  size_t begin = 0, nbytes = 0;
};

class NodeExchange {
 public:
  /// `slot_bytes`: the most that one rank shows, the same on all ranks. The communicator's slots have SlotBytes.
  NodeExchange(std::shared_ptr<Communicator> communicator, std::shared_ptr<Transport> transport, Layout layout, size_t slot_bytes,
               decltype(Kernels::copy) copy);
  /// Of a slot that has room for what its rank keeps of other nodes.
  static size_t SlotBytes(const Layout& layout, size_t slot_bytes);

  const Layout& layout() const { return layout_; }
  size_t slot_bytes() const { return slot_bytes_; }
  bool IsHere(int rank) const { return layout_.node_of[static_cast<size_t>(rank)] == layout_.node; }
  /// This rank receives for its node what rank 0 tells.
  bool is_relay() const { return !IsHere(0) && leader_local_ == layout_.local; }
  /// Who publishes on this node what rank 0 tells: its place among the node's ranks.
  int leader_local() const { return leader_local_; }

  /// What a rank shows of a generation; of another node's, readable once this node's ranks have exchanged flags after Share.
  std::byte* Slot(int rank, uint64_t sequence) const;
  FlagPayload PayloadOf(int rank, int lane, uint64_t sequence) const;
  /// Of a rank of another node whose Share had a range for each rank: what it had for this one.
  const std::byte* PartFrom(int rank, uint64_t sequence) const;

  /// Sends what this rank shows, and receives what it keeps; the node's own exchange follows. `shown`: one range of this rank's slot, which all are to
  /// see, or one for each rank.
  Status Share(uint64_t sequence, const OpTag& tag, std::span<const SlotRange> shown, const FlagPayload& payload, const Deadline& deadline);

  /// Rank 0: sends a range of its slot to the relays of the other nodes, which Hear it in Slot(0, sequence). AwaitTold waits for it without a
  /// deadline, and writes nothing.
  Status Tell(uint64_t sequence, const OpTag& tag, SlotRange shown, const Deadline& deadline);
  Status AwaitTold();
  Status Hear(uint64_t sequence, const OpTag& tag, size_t* nbytes, const Deadline& deadline);

 private:
  // In front of the first frame.
  struct Head {
    uint64_t begin, nbytes;
    FlagPayload payload;
    uint64_t unused[2];
  };
  static_assert(sizeof(Head) == 64);
  struct Sending {
    int peer;
    SlotRange range;
    size_t done;
  };
  struct Receiving {
    int peer;
    std::byte* to;  // of byte `begin` of what it shows, or of its part
    bool is_part;
    size_t most;    // bytes behind `to`
    size_t nbytes, done;
    std::byte* head;
  };
  static size_t Kept(const Layout& layout);
  int HolderOf(int rank) const { return holders_[static_cast<size_t>(rank)].local; }
  size_t AreaOf(int rank) const { return slot_bytes_ * (1 + holders_[static_cast<size_t>(rank)].place); }
  size_t HeadOf(int rank) const { return slot_bytes_ * (1 + kept_) + sizeof(Head) * holders_[static_cast<size_t>(rank)].place; }
  std::byte* Own(uint64_t sequence) const { return communicator_->Slot(layout_.local, sequence); }
  void Keep(int rank, uint64_t sequence);
  Status Transfer(uint64_t sequence, const OpTag& tag, const FlagPayload& payload, const Deadline& deadline);

  // Who keeps on this node what a rank of another shows, and in which place of its slot.
  struct Holder {
    int local = 0;
    size_t place = 0;
  };
  const std::shared_ptr<Communicator> communicator_;
  const std::shared_ptr<Transport> transport_;
  const Layout layout_;
  const size_t slot_bytes_, kept_;
  const decltype(Kernels::copy) copy_;
  int leader_local_ = 0;
  std::vector<Holder> holders_;    // [world_size]
  std::vector<size_t> part_;       // [world_size] where parts of ranks of other nodes begin, in parts of the own size
  size_t part_bytes_ = 0;          // of the last Share with a range for each rank
  std::vector<Sending> sending_;   // of the exchange under way
  std::vector<Receiving> receiving_;
};

}  // namespace tilerank
