// Barrier inside a node: every rank has called before any returns. One publish, N - 1 looks.
#pragma once
#include "comm/operation.h"

namespace tilerank {

inline OpTag BarrierTag(const Operation& operation) {
  OpTag tag;
  tag.detail = operation.history;
  return tag;
}

inline void BarrierStart(const OperationContext& context, const Operation& operation) {
  context.communicator->Publish(context.lane, operation.sequence, BarrierTag(operation));
}

inline Status BarrierFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  return context.communicator->Await(context.lane, operation.sequence, BarrierTag(operation), deadline);
}

}  // namespace tilerank
