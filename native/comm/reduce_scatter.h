// ReduceScatter inside a node: output of rank r = part r of what allReduce of data gives, with the same bits. Every rank writes the
// others' parts into its slot, a cell each, and combines its own part from all; one sync a piece.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t ReduceScatterSequences(const Operation& operation, int world_size);
void ReduceScatterStart(const OperationContext& context, const Operation& operation);
Status ReduceScatterFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
