#include "comm/operation.h"

#include "comm/all_gather.h"
#include "comm/all_reduce.h"
#include "comm/all_to_all.h"
#include "comm/barrier.h"
#include "comm/batch.h"
#include "comm/broadcast.h"
#include "comm/gather.h"
#include "comm/parts.h"
#include "comm/reduce.h"
#include "comm/reduce_scatter.h"
#include "comm/scatter.h"

namespace tilerank {

namespace {

void Start(const OperationContext& context, const Operation& operation) {
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceStart(context, operation);
    case CollectiveOp::kAllGather: return AllGatherStart(context, operation);
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kMessage: return BroadcastStart(context, operation);
    case CollectiveOp::kReduceScatter: return ReduceScatterStart(context, operation);
    case CollectiveOp::kReduce: return ReduceStart(context, operation);
    case CollectiveOp::kGather: return GatherStart(context, operation);
    case CollectiveOp::kScatter: return ScatterStart(context, operation);
    case CollectiveOp::kAllToAll: return AllToAllStart(context, operation);
    case CollectiveOp::kBatch: return BatchStart(context, operation);
    case CollectiveOp::kBarrier:
    case CollectiveOp::kExchange: return BarrierStart(context, operation);
  }
}

}  // namespace

uint64_t SequencesOf(const Operation& operation, int world_size) {
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceSequences(operation);
    case CollectiveOp::kAllGather: return AllGatherSequences(operation, world_size);
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kMessage: return BroadcastSequences(operation);
    case CollectiveOp::kReduceScatter: return ReduceScatterSequences(operation, world_size);
    case CollectiveOp::kReduce: return ReduceSequences(operation);
    case CollectiveOp::kGather: return GatherSequences(operation, world_size);
    case CollectiveOp::kScatter: return ScatterSequences(operation, world_size);
    case CollectiveOp::kAllToAll: return AllToAllSequences(operation, world_size);
    case CollectiveOp::kBatch: return operation.batch->sequences;
    case CollectiveOp::kBarrier:
    case CollectiveOp::kExchange: return 1;
  }
  return 1;
}

bool TryStart(const OperationContext& context, const Operation& operation) {
  // Who writes nothing at this sequence has nothing to acquire.
  const bool is_root = context.fabric->rank() == operation.root;
  switch (operation.op) {
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kScatter:
      if (!is_root) return true;
      break;
    case CollectiveOp::kReduce:
      if (is_root) return true;
      break;
    case CollectiveOp::kGather:
      if (is_root && !SaysSource(context, PartBytes(operation, context.fabric->world_size()))) return true;
      break;
    default: break;
  }
  if (!context.fabric->IsAcquirable(context.lane, operation.sequence)) return false;
  Start(context, operation);
  return true;
}

bool IsReady(const OperationContext& context, const Operation& operation) {
  const Fabric& comm = *context.fabric;
  const bool is_root = comm.rank() == operation.root;
  switch (operation.op) {
    case CollectiveOp::kMessage: {
      // The first chunk is published; only one more can follow without the reader.
      const uint64_t chunks = operation.chunks();
      if (!is_root) return chunks == 1 && comm.IsReadyFrom(context.lane, operation.sequence, operation.root);
      return chunks == 1 || (chunks == 2 && comm.IsAcquirable(context.lane, operation.sequence + 1));
    }
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kScatter: return is_root || comm.IsReadyFrom(context.lane, operation.sequence, operation.root);
    case CollectiveOp::kReduce:
    case CollectiveOp::kGather: return !is_root || comm.IsReady(context.lane, operation.sequence);
    case CollectiveOp::kBatch: return BatchIsReady(context, operation);
    default: return comm.IsReady(context.lane, operation.sequence);
  }
}

Status Finish(const OperationContext& context, const Operation& operation, bool has_started, const Deadline& deadline) {
  if (!has_started) {
    if (Status s = context.fabric->Acquire(context.lane, operation.sequence, deadline); !s.ok()) return s;
    Start(context, operation);
  }
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceFinish(context, operation, deadline);
    case CollectiveOp::kAllGather: return AllGatherFinish(context, operation, deadline);
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kMessage: return BroadcastFinish(context, operation, deadline);
    case CollectiveOp::kReduceScatter: return ReduceScatterFinish(context, operation, deadline);
    case CollectiveOp::kReduce: return ReduceFinish(context, operation, deadline);
    case CollectiveOp::kGather: return GatherFinish(context, operation, deadline);
    case CollectiveOp::kScatter: return ScatterFinish(context, operation, deadline);
    case CollectiveOp::kAllToAll: return AllToAllFinish(context, operation, deadline);
    case CollectiveOp::kBatch: return BatchFinish(context, operation, deadline);
    case CollectiveOp::kBarrier:
    case CollectiveOp::kExchange: return BarrierFinish(context, operation, deadline);
  }
  return Status(Code::kInternal, "an operation that is none");
}

}  // namespace tilerank
