// Which algorithm a call uses: rows by size, resolved in collectives/algorithms.ts for the numbers of this group, the same on all ranks.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/fabric.h"

namespace tilerank {

struct AlgorithmRow {
  size_t up_to = SIZE_MAX;   // bytes of the whole data
  uint16_t algorithm = 0;    // AllReduceAlgorithm; 0 where there is one only
  size_t chunk_bytes = 0;
};

class AlgorithmTable {
 public:
  static constexpr size_t kOperations = static_cast<size_t>(CollectiveOp::kAllToAll) + 1;

  /// Rows of one kind come by rising up_to.
  void Add(CollectiveOp op, bool is_tensor, const AlgorithmRow& row) { rows_[Index(op, is_tensor)].push_back(row); }
  /// True when every operation has an answer for every size.
  bool IsWhole() const {
    for (size_t op = 1; op < kOperations; op++) {
      if (op == static_cast<size_t>(CollectiveOp::kExchange)) continue;
      for (bool is_tensor : {false, true}) {
        const std::vector<AlgorithmRow>& rows = rows_[Index(static_cast<CollectiveOp>(op), is_tensor)];
        if (rows.empty() || rows.back().up_to != SIZE_MAX) return false;
      }
    }
    return true;
  }
  const AlgorithmRow& Choose(CollectiveOp op, bool is_tensor, size_t nbytes) const {
    const AlgorithmRow* row = rows_[Index(op, is_tensor)].data();
    while (nbytes > row->up_to) row++;
    return *row;
  }

 private:
  static size_t Index(CollectiveOp op, bool is_tensor) { return 2 * static_cast<size_t>(op) + (is_tensor ? 1 : 0); }
  std::array<std::vector<AlgorithmRow>, 2 * kOperations> rows_;
};

}  // namespace tilerank
