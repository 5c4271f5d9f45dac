// One call of a collective on one lane, split in two: Start takes part without waiting (copy in, publish), Finish does the rest.
// So the asynchronous form fixes its order in the caller and goes on in another thread. Each algorithm stands whole in a file of
// its own and says how many sequences a call takes; a rank gives them out in the order of its calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/fabric.h"
#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

using Reduce = decltype(Kernels::reduce);
using Copy = decltype(Kernels::copy);

/// The tensors of a group.
class Tensors {
 public:
  /// *data: that of a rank, mapped here. `id`: the group's number for the tensor, as that rank has published it.
  virtual Status Find(uint32_t id, int rank, const Deadline& deadline, std::byte** data) = 0;

 protected:
  ~Tensors() = default;
};

/// What all operations of a group share.
struct OperationContext {
  Fabric* fabric;
  Reduce reduce;
  Copy copy;
  int lane = 0;
  Tensors* tensors = nullptr;  // null: no operation has a source
  // What a reader takes from one rank is read from its tensor, if it is one, from this size on; the same on all ranks.
  size_t from_tensor_bytes = 4 << 10;
  // From here on the root of a gather has the others write into its tensor: reading a line that another core has written is faster than
  // writing one that another core has read, until there is more than one core can move.
  size_t into_tensor_bytes = 256 << 10;
};

/// How partial sums of a node go to the others.
enum class Wire : uint8_t { kExact = 0, kQ8 = 1 };

/// A range of bytes of an array.
struct Part {
  size_t begin, nbytes;
};

struct Batch;

/// Of the operations in which every rank has a part of one array - gather, allGather, scatter, reduceScatter, allToAll - `count` is
/// that whole array, the parts laid one after the other.
struct Operation {
  CollectiveOp op = CollectiveOp::kBarrier;
  uint64_t sequence = 0;            // the first of those it takes
  DType dtype = DType::kF32;
  ReduceOp reduce_op = ReduceOp::kSum;
  size_t count = 0;                 // elements
  std::byte* data = nullptr;        // in and, where there is no output, out
  std::byte* output = nullptr;
  const uint64_t* offsets = nullptr;  // [world_size + 1] elements: where the parts begin, if they are not all alike
  const uint64_t* output_offsets = nullptr;  // of an allToAll whose ranks have parts of any sizes: where those of output begin
  size_t largest_part = 0;          // bytes of the largest part that such an allToAll moves between any two ranks
  uint32_t layout = 0;              // digest of the offsets, so that ranks which disagree find out
  int root = 0;
  size_t chunk_bytes = 0;           // at most a slot; the same on all ranks
  uint16_t algorithm = 0;           // AllReduceAlgorithm
  Wire wire = Wire::kExact;         // of an allReduce; in a node it only has to be the same on all ranks
  uint32_t tensor = 0;              // id, where `parts` is set; mixed with that of output
  uint32_t source = 0;              // id of the tensor that data is, if others may read from it meanwhile (source.h)
  uint32_t target = 0;              // gather, on its root: id of the tensor that output is, if others may write into it meanwhile
  bool is_reduced = false;          // AllReduceSlice is done
  uint32_t history = 0;             // digest of all calls before this one, so that ranks which have parted find out
  const std::vector<std::byte*>* parts = nullptr;  // the same tensor of every rank, mapped here
  const std::vector<std::byte*>* output_parts = nullptr;  // the same of output, where there is one
  const Batch* batch = nullptr;     // of kBatch, whose count is the bytes of all its operations

  /// Where a reduction's result goes.
  std::byte* result() const { return output != nullptr ? output : data; }
  size_t nbytes() const { return count * static_cast<size_t>(ElementBytes(dtype)); }
  /// Chunks that nbytes of payload take; an empty operation still takes one, which is how ranks agree on it.
  uint64_t chunks() const { return nbytes() == 0 ? 1 : (nbytes() + chunk_bytes - 1) / chunk_bytes; }
  size_t ChunkBytes(uint64_t chunk) const {
    const size_t offset = chunk * chunk_bytes;
    return nbytes() - offset < chunk_bytes ? nbytes() - offset : chunk_bytes;
  }
};

/// What ranks compare of a call. `variant`: of the operation's own choosing; reductions put their ReduceOp into bits 8 to 10.
inline OpTag MakeTag(const Operation& operation, int variant) {
  OpTag tag;
  tag.op = operation.op;
  tag.dtype = operation.dtype;
  tag.variant = static_cast<uint16_t>(variant | (operation.wire == Wire::kQ8 ? kQ8Variant : 0));
  tag.detail = operation.history ^ operation.layout ^ operation.tensor;
  tag.count = operation.count;
  return tag;
}

inline Part PartOf(const Operation& operation, int rank, int world_size) {
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  if (operation.offsets != nullptr) {
    const uint64_t* at = operation.offsets + rank;
    return {at[0] * element, (at[1] - at[0]) * element};
  }
  const size_t share = operation.count / static_cast<size_t>(world_size) * element;
  return {static_cast<size_t>(rank) * share, share};
}

/// The history after this call: of every fact that ranks must agree on.
inline uint32_t HistoryAfter(const Operation& operation) {
  uint64_t hash = operation.history * 0x9e3779b97f4a7c15ull + operation.count;
  hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9ull + (static_cast<uint64_t>(operation.op) | static_cast<uint64_t>(operation.dtype) << 8 |
                                                        static_cast<uint64_t>(operation.algorithm) << 16 |
                                                        static_cast<uint64_t>(operation.reduce_op) << 24 |
                                                        static_cast<uint64_t>(operation.root) << 32 | static_cast<uint64_t>(operation.wire) << 63);
  hash = (hash ^ hash >> 32) * 0x94d049bb133111ebull + operation.tensor + operation.layout;
  return static_cast<uint32_t>(hash >> 32);
}

/// How many sequences it takes: from the arguments alone, so that all ranks agree.
uint64_t SequencesOf(const Operation& operation, int world_size);
/// Takes part as far as that needs no waiting; false when even the slot is not free yet.
bool TryStart(const OperationContext& context, const Operation& operation);
/// True when, having started, the operation would not wait for the first sequence of any peer; of a message: when Finish would not wait at all.
bool IsReady(const OperationContext& context, const Operation& operation);
/// Ends it. `has_started`: what TryStart returned.
Status Finish(const OperationContext& context, const Operation& operation, bool has_started, const Deadline& deadline);

}  // namespace tilerank
