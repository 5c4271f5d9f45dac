#include "comm/reduce.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root | static_cast<int>(operation.reduce_op) << 8); }

// What a rank other than the root does at one sequence. It reads nothing, so it is through with the generation at once.
void PublishChunk(const OperationContext& context, const Operation& operation, uint64_t chunk) {
  Fabric& comm = *context.fabric;
  const uint64_t sequence = operation.sequence + chunk;
  const size_t nbytes = operation.ChunkBytes(chunk);
  if (nbytes > 0) context.copy(comm.Slot(comm.rank(), sequence), operation.data + chunk * operation.chunk_bytes, nbytes);
  comm.Publish(context.lane, sequence, TagOf(operation));
  comm.Consumed(context.lane, sequence);
  comm.Complete(context.lane, sequence);
}

}  // namespace

uint64_t ReduceSequences(const Operation& operation) { return operation.chunks(); }

void ReduceStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() != operation.root) PublishChunk(context, operation, 0);
}

Status ReduceFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const uint64_t chunks = operation.chunks();
  if (comm.rank() != operation.root) {
    for (uint64_t chunk = 1; chunk < chunks; chunk++) {
      if (Status s = comm.Acquire(context.lane, operation.sequence + chunk, deadline); !s.ok()) [[unlikely]] return s;
      PublishChunk(context, operation, chunk);
    }
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  const OpTag tag = TagOf(operation);
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  const void* sources[kMaxWorldSize];
  for (uint64_t chunk = 0; chunk < chunks; chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    const size_t offset = chunk * operation.chunk_bytes, nbytes = operation.ChunkBytes(chunk);
    for (int rank = 0; rank < comm.world_size(); rank++) {
      if (rank == comm.rank()) continue;
      if (Status s = comm.AwaitSame(context.lane, sequence, rank, tag, deadline); !s.ok()) [[unlikely]] return s;
      sources[rank] = comm.Slot(rank, sequence);
    }
    sources[comm.rank()] = operation.data + offset;
    if (nbytes > 0) context.reduce(operation.result() + offset, sources, comm.world_size(), operation.dtype, operation.reduce_op, nbytes / element);
    comm.Consumed(context.lane, sequence);
  }
  return Status::Ok();
}

}  // namespace tilerank
