#include "comm/operation.h"

#include "comm/all_gather.h"
#include "comm/all_reduce.h"
#include "comm/barrier.h"
#include "comm/broadcast.h"

namespace tilerank {

namespace {

void Start(const OperationContext& context, const Operation& operation) {
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceStart(context, operation);
    case CollectiveOp::kAllGather: return AllGatherStart(context, operation);
    case CollectiveOp::kBroadcast: return BroadcastStart(context, operation);
    default: return BarrierStart(context, operation);
  }
}

}  // namespace

uint64_t SequencesOf(const Operation& operation) {
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceSequences(operation);
    case CollectiveOp::kAllGather: return AllGatherSequences(operation);
    case CollectiveOp::kBroadcast: return BroadcastSequences(operation);
    default: return 1;
  }
}

bool TryStart(const OperationContext& context, const Operation& operation) {
  if (!context.communicator->IsAcquirable(context.lane, operation.sequence)) return false;
  Start(context, operation);
  return true;
}

bool IsReady(const OperationContext& context, const Operation& operation) {
  const Communicator& comm = *context.communicator;
  if (operation.op != CollectiveOp::kBroadcast) return comm.IsReady(context.lane, operation.sequence);
  return comm.rank() == operation.root || comm.IsReadyFrom(context.lane, operation.sequence, operation.root);
}

Status Finish(const OperationContext& context, const Operation& operation, bool has_started, const Deadline& deadline) {
  if (!has_started) {
    if (Status s = context.communicator->Acquire(context.lane, operation.sequence, deadline); !s.ok()) return s;
    Start(context, operation);
  }
  switch (operation.op) {
    case CollectiveOp::kAllReduce: return AllReduceFinish(context, operation, deadline);
    case CollectiveOp::kAllGather: return AllGatherFinish(context, operation, deadline);
    case CollectiveOp::kBroadcast: return BroadcastFinish(context, operation, deadline);
    default: return BarrierFinish(context, operation, deadline);
  }
}

}  // namespace tilerank
