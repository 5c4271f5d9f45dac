// Batch inside a node: a list of small operations in one exchange. What each rank contributes to any of them lies in one slot, side by side;
// one publish and one wait later every rank works out all results by itself, with the bits that the operations give alone. What does
// not fit takes further exchanges, and an operation that is not small is run as it would be alone, in its place in the order.
#pragma once
#include <vector>

#include "comm/operation.h"

namespace tilerank {

/// The same on all ranks, but for memory. Operations write no memory that another one of the list touches.
struct Batch {
  /// Operations [first, last), at `sequence` counted from the batch's own.
  struct Step {
    size_t first = 0, last = 0;
    bool is_packed = true;
    uint64_t sequence = 0;
  };
  std::vector<Operation> operations;
  std::vector<size_t> places;  // [operations] bytes into the slot, of those that are packed
  std::vector<Step> steps;
  uint64_t sequences = 0;
};

/// Puts a list of operations into `batch`, and what ranks compare of it into `operation`. chunk_bytes: what a slot takes; the same on all ranks.
void PlanBatch(std::vector<Operation> operations, int world_size, size_t chunk_bytes, Batch* batch, Operation* operation);

void BatchStart(const OperationContext& context, const Operation& operation);
bool BatchIsReady(const OperationContext& context, const Operation& operation);
Status BatchFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
