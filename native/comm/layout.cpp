#include <algorithm>

#include "comm/transport.h"

namespace tilerank {

Status Layout::Create(int rank, std::vector<std::vector<int>> nodes, Layout* layout) {
  Layout made;
  size_t world_size = 0, fewest = SIZE_MAX;
  for (const std::vector<int>& ranks : nodes) {
    world_size += ranks.size();
    fewest = std::min(fewest, ranks.size());
  }
  if (nodes.empty() || fewest == 0 || world_size > static_cast<size_t>(kMaxWorldSize)) {
    return Status(Code::kInvalidArgument, "a group has 1 to " + std::to_string(kMaxWorldSize) + " ranks, and one or more on each of its nodes");
  }
  made.node_of.assign(world_size, -1);
  made.local_of.assign(world_size, 0);
  for (size_t node = 0; node < nodes.size(); node++) {
    for (size_t local = 0; local < nodes[node].size(); local++) {
      const int r = nodes[node][local];
      if (r < 0 || static_cast<size_t>(r) >= world_size || made.node_of[static_cast<size_t>(r)] >= 0) {
        return Status(Code::kInvalidArgument, "rank " + std::to_string(r) + " is on two nodes, or on none");
      }
      made.node_of[static_cast<size_t>(r)] = static_cast<int>(node);
      made.local_of[static_cast<size_t>(r)] = static_cast<int>(local);
    }
    const bool is_sorted = std::is_sorted(nodes[node].begin(), nodes[node].end());
    if (!is_sorted || (node > 0 && nodes[node][0] < nodes[node - 1][0])) {
      return Status(Code::kInvalidArgument, "the ranks of a node must rise, and nodes stand in the order of their lowest rank");
    }
  }
  if (rank < 0 || static_cast<size_t>(rank) >= world_size) return Status(Code::kInvalidArgument, "rank " + std::to_string(rank) + " is on no node");
  made.nodes = std::move(nodes);
  made.held.resize(world_size);
  for (int r = 0; r < static_cast<int>(world_size); r++) {
    for (int node = 0; node < made.num_nodes(); node++) {
      if (node != made.node_of[static_cast<size_t>(r)]) made.held[static_cast<size_t>(made.TwinOf(r, node))].push_back(r);
    }
  }
  made.rank = rank;
  made.node = made.node_of[static_cast<size_t>(rank)];
  made.local = made.local_of[static_cast<size_t>(rank)];
  made.rails_ = static_cast<int>(fewest);
  *layout = std::move(made);
  return Status::Ok();
}

}  // namespace tilerank
