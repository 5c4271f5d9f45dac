// AllToAll inside a node: part p of output of rank r = part r of data of rank p. A slot has a cell for each rank; one sync a piece. data
// and output may be the same array.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t AllToAllSequences(const Operation& operation, int world_size);
void AllToAllStart(const OperationContext& context, const Operation& operation);
Status AllToAllFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
