// The packed weights of one rank: one contiguous, huge-page mapping in the order in which a step walks them, filled straight from
// byte ranges of the checkpoint files by the rank's own threads (so that pages are local to them).
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "runner/memory.h"
#include "runner/pool.h"
#include "runner/program.h"
#include "status.h"

namespace tilerank {

class Weights {
 public:
  /// Reserves the memory of every weight of the program.
  static Status Create(const Program& program, std::unique_ptr<Weights>* weights);

  /// Reads and packs all parts on the pool's team. Called on the leader. Progress is loaded_bytes().
  /// Gives up between two pieces when `check` fails: a peer that is lost must not be found out minutes later.
  Status Load(const std::vector<LoadPart>& parts, const Kernels& kernels, Pool& pool, const std::function<Status()>& check);

  const PackedWeight& linear(int32_t weight, int32_t copy) const { return linear_[First(weight) + static_cast<size_t>(copy)]; }
  const float* vector(int32_t weight, int32_t copy) const { return vectors_[First(weight) + static_cast<size_t>(copy)]; }
  size_t nbytes() const { return memory_.nbytes(); }
  uint64_t loaded_bytes() const { return loaded_bytes_.load(std::memory_order_relaxed); }

 private:
  size_t First(int32_t weight) const { return first_[static_cast<size_t>(weight)]; }
  struct Chunk {
    const LoadPart* part;
    int64_t row0, rows;  // within the part
  };
  Status LoadChunk(const Chunk& chunk, const Kernels& kernels, std::vector<std::byte>& raw);

  const Program* program_ = nullptr;
  MappedMemory memory_;
  std::vector<size_t> first_;          // weight -> index of its copy 0
  std::vector<PackedWeight> linear_;
  std::vector<float*> vectors_;        // also the biases of linear weights
  std::atomic<uint64_t> loaded_bytes_{0};
};

}  // namespace tilerank
