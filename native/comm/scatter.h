// Scatter inside a node: part r of the root's data becomes output of rank r. The root waits for nobody but for the slot that it is
// about to reuse; the others wait for the root only and read their cell of its slot.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t ScatterSequences(const Operation& operation, int world_size);
void ScatterStart(const OperationContext& context, const Operation& operation);
Status ScatterFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
