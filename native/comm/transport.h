// The network leg of a group: frames between ranks of different nodes, in order for each pair of ranks. The mailbox carries
// them in earnest (mailbox.h; by ZeroMQ or MPI), a virtual clock in the simulator. The algorithms (hierarchical.cpp) know only this.
//
// A sender writes into memory of the transport, which keeps it until the peer has taken the frame: nothing is copied twice, and no buffer is
// used again too early. A peer that takes nothing runs the sender out of room, so that memory is bounded on both sides.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/fabric.h"
#include "status.h"

namespace tilerank {

/// What both ends of a frame compare.
struct FrameTag {
  uint64_t operation = 0;  // its number in the group, the same on all ranks
  OpTag tag;
  uint32_t part = 0;       // which piece of it: chunk and stage
};

struct Frame {
  FrameTag tag;
  const std::byte* data = nullptr;  // of any alignment
  size_t nbytes = 0;
};

/// One stream of frames between this rank and each rank of other nodes. Ranks are the group's. Of each peer one thread at a time sends, and
/// one receives.
class Transport {
 public:
  virtual ~Transport() = default;
  /// The operation that this rank is in from here on: what a peer that waits for it compares its own with.
  virtual void Enter(const FrameTag& tag) = 0;
  /// Of one frame's payload, the same on all ranks.
  virtual size_t frame_bytes() const = 0;
  /// Frames to one peer that may be under way; the memory of a frame stays as it was written until that many more were reserved.
  virtual int window() const = 0;
  /// 64-byte aligned room for the next frame to `peer`; null while the peer has not taken enough of those before.
  virtual std::byte* Reserve(int peer) = 0;
  /// Sends the first nbytes of what was reserved.
  virtual void Post(int peer, const FrameTag& tag, size_t nbytes) = 0;
  /// The oldest frame of `peer` that was not released; false: none has come yet.
  virtual bool Poll(int peer, Frame* frame) = 0;
  virtual void Release(int peer) = 0;
  /// True when `peer` has left the group in order; what it sent before may still be polled.
  virtual bool HasLeft(int peer) const = 0;
  /// Of one that has left: it goes on to make the group anew.
  virtual bool IsRenewing(int) const { return false; }
  /// Waits until Reserve (`is_for_room`) or Poll may say something else of `peer`, or the slice is over. `awaited`: what for; without
  /// an operation, for whatever comes.
  virtual void Wait(int peer, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) = 0;
  /// The rank that `peer` says it waits for itself, which holds both up; `peer`, where it has said nothing of late.
  virtual int HeldUpBy(int peer) const { return peer; }
  /// A call has ended well: what it posted goes out even if this rank calls nothing for long.
  virtual void Settle() {}
  /// On any clock that only goes forward.
  virtual int64_t Now() const { return NowNs(); }
};

/// Where the ranks of a group are: the same on all of them.
struct Layout {
  int rank = 0, node = 0, local = 0;     // of this rank: in the group, its node, its place on that node
  std::vector<std::vector<int>> nodes;   // [nodes][ranks of it]: ranks of the group, rising; nodes in the order of their lowest rank
  std::vector<int> node_of, local_of;    // [world_size]
  std::vector<std::vector<int>> held;    // [world_size] ranks of other nodes, rising, that this one stands for on its node: see TwinOf

  static Status Create(int rank, std::vector<std::vector<int>> nodes, Layout* layout);
  int world_size() const { return static_cast<int>(node_of.size()); }
  int num_nodes() const { return static_cast<int>(nodes.size()); }
  int local_size(int node) const { return static_cast<int>(nodes[static_cast<size_t>(node)].size()); }
  int RankOf(int node, int local) const { return nodes[static_cast<size_t>(node)][static_cast<size_t>(local)]; }
  /// The rank of `node` that stands for `rank` of another: it receives what is meant for that node, and sends to `rank` what comes from it.
  int TwinOf(int rank, int node) const { return RankOf(node, local_of[static_cast<size_t>(rank)] % local_size(node)); }
  /// Ranks of each node that have a twin on every other.
  int rails() const { return rails_; }
  bool is_one_rank_a_node() const { return world_size() == num_nodes(); }

 private:
  int rails_ = 1;
};

}  // namespace tilerank
