// Collectives of a group whose ranks are on several nodes: shared memory inside each node, frames between them. Written once over a Fabric
// (this node's ranks) and a Transport (the others); the simulator runs the same code.
//
// Whatever the algorithm, rail or chunk, an element is combined over the ranks of each node in rank order, these partial results in node
// order, and rounded once: all ranks of all nodes end with the same bits. With Wire::kQ8 a node's partial sum is rounded to Q8 (kernels.h) on its
// way, for its own ranks as well: groups of 32 from the first element on, so that leader and splitRail give the same bits still. twoStep rounds the
// finished sum to Q8 once more.
#pragma once
#include <vector>

#include "comm/operation.h"
#include "comm/transport.h"

namespace tilerank {

enum class NetworkAlgorithm : uint16_t {
  kAuto = 0,
  kLeader = 1,     // one rank of each node exchanges the whole partial result with the others: the fewest frames
  kSplitRail = 2,  // every rail exchanges its slice: (K - 1) S / rails bytes a rank and direction, one hop
  kTwoStep = 3,    // every rail's slice is cut again by nodes, reduced and gathered: 2 (K - 1) / K S / rails bytes, two hops
};

struct NetworkContext {
  OperationContext local;   // its fabric: the ranks of this node, in the order of the layout
  decltype(Kernels::reduce_staged) reduce_staged;
  decltype(Kernels::reduce_to_q8) reduce_to_q8;
  decltype(Kernels::reduce_from_q8) reduce_from_q8;
  Transport* transport;
  const Layout* layout;
  uint64_t next_generation = 1;      // of the fabric's slots: taken while operations run, alike on all ranks of the node
  std::vector<std::byte> scratch;
};

/// Where the table leaves it to the width of partial results (collectives/algorithms.ts): the same on all ranks.
NetworkAlgorithm ChooseByWidth(const Layout& layout, const Operation& operation);

/// Runs one call from its begin to its end. `number`: of the call in the group, the same on all ranks.
Status RunHierarchical(NetworkContext& context, const Operation& operation, uint64_t number, const Deadline& deadline);

}  // namespace tilerank
