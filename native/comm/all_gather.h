// AllGather inside a node: output[r] = data of rank r, for all r. One copy in, N copies out, chunked by the slot; one sync a chunk.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t AllGatherSequences(const Operation& operation);
void AllGatherStart(const OperationContext& context, const Operation& operation);
Status AllGatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
