#include "comm/broadcast.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root); }

void PublishChunk(const OperationContext& context, const Operation& operation, uint64_t chunk) {
  Fabric& comm = *context.fabric;
  const uint64_t sequence = operation.sequence + chunk;
  if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
    context.copy(comm.Slot(comm.rank(), sequence), operation.data + chunk * operation.chunk_bytes, nbytes);
  }
  comm.Publish(context.lane, sequence, TagOf(operation));
}

}  // namespace

uint64_t BroadcastSequences(const Operation& operation) { return operation.chunks(); }

void BroadcastStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() == operation.root) PublishChunk(context, operation, 0);
}

Status BroadcastFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const OpTag tag = TagOf(operation);
  const bool is_root = comm.rank() == operation.root;
  for (uint64_t chunk = is_root ? 1 : 0; chunk < operation.chunks(); chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    if (is_root) {
      if (Status s = comm.Acquire(context.lane, sequence, deadline); !s.ok()) [[unlikely]] return s;
      PublishChunk(context, operation, chunk);
      continue;
    }
    if (Status s = comm.AwaitSame(context.lane, sequence, operation.root, tag, deadline); !s.ok()) [[unlikely]] return s;
    if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
      context.copy(operation.data + chunk * operation.chunk_bytes, comm.Slot(operation.root, sequence), nbytes);
    }
    comm.Consumed(context.lane, sequence);
  }
  // The root waits for nobody, so no wait tells the recorder that it is through.
  if (is_root) comm.Complete(context.lane, operation.sequence + operation.chunks() - 1);
  return comm.failed() ? comm.failure() : Status::Ok();
}

}  // namespace tilerank
