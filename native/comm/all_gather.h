// AllGather inside a node: output = part of rank 0, part of rank 1, ... One copy in, N copies out, in pieces; one sync a piece.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t AllGatherSequences(const Operation& operation, int world_size);
void AllGatherStart(const OperationContext& context, const Operation& operation);
Status AllGatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
