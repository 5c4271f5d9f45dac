// What the algorithms see of a group's ranks on one node: flags and slots, without a word of how anyone waits. The Communicator is one in
// earnest; the simulator's stands on a virtual clock, so that both run the very same algorithms. What ranks compare of a call is defined here too.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "comm/sync.h"
#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

enum class CollectiveOp : uint8_t { kBarrier = 1, kAllReduce = 2, kAllGather = 3, kBroadcast = 4, kReduceScatter = 5, kExchange = 6, kReduce = 7, kGather = 8, kScatter = 9, kAllToAll = 10, kMessage = 11, kBatch = 12 };
const char* NameOf(CollectiveOp op);
const char* NameOf(DType dtype);  // "?" for what is none
const char* NameOf(ReduceOp op);

/// What ranks must agree on; travels in the flag line. A difference is kMismatch with both sides.
constexpr int kQ8Variant = 1 << 11;

struct OpTag {
  CollectiveOp op = CollectiveOp::kBarrier;
  DType dtype = DType::kF32;
  uint16_t variant = 0;  // algorithm, phase or root, as the operation likes; reductions: ReduceOp in bits 8 to 10, then kQ8Variant
  uint32_t detail = 0;   // whatever else: collectives put a digest of the calls before
  uint64_t count = 0;    // elements

  uint64_t Bits() const {
    return static_cast<uint64_t>(op) | static_cast<uint64_t>(dtype) << 8 | static_cast<uint64_t>(variant) << 16 |
           static_cast<uint64_t>(detail) << 32;
  }
  static OpTag FromBits(uint64_t bits, uint64_t count);
  std::string Describe() const;
};

/// Ranks of one group; what is one a rank then fits the stack. Processes are at most 256 (collectives/env.ts), virtual ranks so many.
constexpr int kMaxWorldSize = 1024;

/// 32 bytes that travel in the flag line.
struct FlagPayload {
  uint64_t words[kPayloadWords] = {};
};

/// See communicator.h for the rules of generations, and for what each of these promises.
class Fabric {
 public:
  Fabric(int rank, int world_size) : rank_(rank), world_size_(world_size) {}
  virtual ~Fabric() = default;
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }

  virtual std::byte* Slot(int rank, uint64_t sequence) const = 0;
  virtual Status Acquire(int lane, uint64_t sequence, const Deadline& deadline) = 0;
  virtual bool IsAcquirable(int lane, uint64_t sequence) const = 0;
  virtual void Publish(int lane, uint64_t sequence, const OpTag& tag) = 0;
  virtual void Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload& payload) = 0;
  virtual FlagPayload PayloadOf(int rank, int lane, uint64_t sequence) const = 0;
  virtual bool IsReady(int lane, uint64_t sequence) const = 0;
  virtual bool IsReadyFrom(int lane, uint64_t sequence, int peer) const = 0;
  virtual Status Await(int lane, uint64_t sequence, const OpTag& tag, const Deadline& deadline) = 0;
  virtual Status AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) = 0;
  virtual void Consumed(int lane, uint64_t sequence) = 0;
  virtual Status AwaitConsumedBy(int lane, uint64_t sequence, int peer, const char* what, const Deadline& deadline) = 0;
  virtual void Complete(int lane, uint64_t sequence) = 0;
  virtual bool failed() const = 0;
  virtual Status failure() const = 0;
  /// This rank, at the network, has looked once more and is held up by that one; -1: it waits no longer. Whoever waits for this rank at its deadline names
  /// that one as late.
  virtual void ShowHeldUp(int /*by*/, int64_t /*now_ns*/) {}
  /// Breaks the group on all its ranks. `culprit`: a rank as users know it, or -1. Returns the failure that stands, which may be an earlier one.
  virtual Status Break(Status reason, int culprit, const char* operation, uint64_t sequence) = 0;

 private:
  const int rank_, world_size_;
};

}  // namespace tilerank
