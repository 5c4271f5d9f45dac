// Reduce inside a node: what allReduce gives, on the root alone. The others wait for nobody but for the slot that they are about to
// reuse; the root waits for all and reads every slot.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t ReduceSequences(const Operation& operation);
void ReduceStart(const OperationContext& context, const Operation& operation);
Status ReduceFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
