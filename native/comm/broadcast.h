// Broadcast inside a node: data of the root becomes data of every rank. The root waits for nobody but for the slot it is about
// to reuse; the others wait for the root only. One copy in, one copy out, chunked by the slot.
#pragma once
#include "comm/operation.h"

namespace tilerank {

uint64_t BroadcastSequences(const Operation& operation);
/// The root publishes; another rank has nothing to publish.
void BroadcastStart(const OperationContext& context, const Operation& operation);
Status BroadcastFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
