// Barrier inside a node: every rank has called before any returns. One publish, N - 1 looks.
#pragma once
#include "comm/operation.h"

namespace tilerank {

inline void BarrierStart(const OperationContext& context, const Operation& operation) {
  context.fabric->Publish(context.lane, operation.sequence, MakeTag(operation, 0));
}

inline Status BarrierFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  return context.fabric->Await(context.lane, operation.sequence, MakeTag(operation, 0), deadline);
}

}  // namespace tilerank
