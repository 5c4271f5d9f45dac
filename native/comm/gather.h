// Gather inside a node: output of the root = part of rank 0, part of rank 1, ... The others wait for nobody but for the slot that they
// are about to reuse; the root waits for all. One copy in, one copy out, in pieces.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t GatherSequences(const Operation& operation, int world_size);
void GatherStart(const OperationContext& context, const Operation& operation);
Status GatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
