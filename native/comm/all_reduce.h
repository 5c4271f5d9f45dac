// AllReduce (sum) inside a node. Whatever the algorithm, an element is the f32 sum over the ranks in rank order, rounded once to
// its dtype: all ranks end with the same bits, and so does a re-run with another algorithm, chunk or threshold.
#pragma once
#include "comm/operation.h"

namespace tilerank {

enum class AllReduceAlgorithm : uint16_t {
  kAuto = 0,
  kOneShot = 1,         // every rank sums all slots: one sync, (N - 1) S bytes read from peers
  kTwoShot = 2,         // every rank sums its slice, then reads the others' slices: two syncs, 2 (N - 1) / N S bytes from peers
  kTwoShotInPlace = 3,  // the same on mapped tensors, the output's too where there is one: nothing is copied in or out
};

uint64_t AllReduceSequences(const Operation& operation);
void AllReduceStart(const OperationContext& context, const Operation& operation);
/// Of kTwoShotInPlace alone, all but its last wait: a caller that must not be held does it when the first sequence is ready, sets
/// is_reduced, and leaves the rest to Finish.
Status AllReduceSlice(const OperationContext& context, const Operation& operation, const Deadline& deadline);
Status AllReduceFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline);

}  // namespace tilerank
