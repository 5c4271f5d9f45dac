#include "comm/reduce.h"

#include <algorithm>

#include "comm/source.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root | static_cast<int>(operation.reduce_op) << 8); }

void CopyIn(const OperationContext& context, const Operation& operation, uint64_t chunk) {
  Fabric& comm = *context.fabric;
  const size_t nbytes = operation.ChunkBytes(chunk);
  if (nbytes > 0) context.copy(comm.Slot(comm.rank(), operation.sequence + chunk), operation.data + chunk * operation.chunk_bytes, nbytes);
}

// What a rank other than the root does at the end of a sequence that it has published. It reads nothing, so it is through with that generation.
void Through(const OperationContext& context, uint64_t sequence) {
  context.fabric->Consumed(context.lane, sequence);
  context.fabric->Complete(context.lane, sequence);
}

}  // namespace

uint64_t ReduceSequences(const Operation& operation) { return operation.chunks(); }

void ReduceStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() == operation.root) return;
  const bool is_from_tensor = IsFromTensor(context, operation, operation.nbytes());
  if (!is_from_tensor) CopyIn(context, operation, 0);
  PublishSource(context, operation, operation.nbytes(), TagOf(operation));
  context.fabric->Consumed(context.lane, operation.sequence + (is_from_tensor ? operation.chunks() - 1 : 0));
  context.fabric->Complete(context.lane, operation.sequence);
}

Status ReduceFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const uint64_t chunks = operation.chunks();
  const OpTag tag = TagOf(operation);
  if (comm.rank() != operation.root) {
    if (IsFromTensor(context, operation, operation.nbytes())) {
      return comm.AwaitConsumedBy(context.lane, operation.sequence + chunks - 1, operation.root, NameOf(operation.op), deadline);
    }
    for (uint64_t chunk = 1; chunk < chunks; chunk++) {
      const uint64_t sequence = operation.sequence + chunk;
      if (Status s = comm.Acquire(context.lane, sequence, deadline); !s.ok()) [[unlikely]] return s;
      CopyIn(context, operation, chunk);
      comm.Publish(context.lane, sequence, tag);
      Through(context, sequence);
    }
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  std::byte* tensors[kMaxWorldSize];
  std::fill_n(tensors, comm.world_size(), nullptr);
  const void* sources[kMaxWorldSize];
  for (uint64_t chunk = 0; chunk < chunks; chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    const size_t offset = chunk * operation.chunk_bytes, nbytes = operation.ChunkBytes(chunk);
    for (int rank = 0; rank < comm.world_size(); rank++) {
      if (rank == comm.rank()) continue;
      if (tensors[rank] == nullptr) {
        if (Status s = comm.AwaitSame(context.lane, sequence, rank, tag, deadline); !s.ok()) [[unlikely]] return s;
      }
      if (chunk == 0) {
        if (Status s = FindSource(context, operation, operation.nbytes(), rank, deadline, &tensors[rank]); !s.ok()) [[unlikely]] return s;
      }
      sources[rank] = tensors[rank] != nullptr ? tensors[rank] + offset : comm.Slot(rank, sequence);
    }
    sources[comm.rank()] = operation.data + offset;
    if (nbytes > 0) context.reduce(operation.result() + offset, sources, comm.world_size(), operation.dtype, operation.reduce_op, nbytes / element);
    comm.Consumed(context.lane, sequence);
  }
  return Status::Ok();
}

}  // namespace tilerank
