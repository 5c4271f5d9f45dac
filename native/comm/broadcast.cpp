#include "comm/broadcast.h"

#include "comm/source.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root); }

void CopyIn(const OperationContext& context, const Operation& operation, uint64_t chunk) {
  Fabric& comm = *context.fabric;
  const size_t nbytes = operation.ChunkBytes(chunk);
  if (nbytes > 0) context.copy(comm.Slot(comm.rank(), operation.sequence + chunk), operation.data + chunk * operation.chunk_bytes, nbytes);
}

}  // namespace

uint64_t BroadcastSequences(const Operation& operation) { return operation.chunks(); }

void BroadcastStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() != operation.root) return;
  if (!IsFromTensor(context, operation, operation.nbytes())) CopyIn(context, operation, 0);
  PublishSource(context, operation, operation.nbytes(), TagOf(operation));
}

Status BroadcastFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const OpTag tag = TagOf(operation);
  const uint64_t last = operation.sequence + operation.chunks() - 1;
  if (comm.rank() == operation.root) {
    uint64_t published = last;  // by this rank
    if (IsFromTensor(context, operation, operation.nbytes())) {
      if (Status s = EndSources(context, operation, operation.nbytes(), last, deadline); !s.ok()) [[unlikely]] return s;
      published = operation.sequence;
    } else {
      for (uint64_t sequence = operation.sequence + 1; sequence <= last; sequence++) {
        if (Status s = comm.Acquire(context.lane, sequence, deadline); !s.ok()) [[unlikely]] return s;
        CopyIn(context, operation, sequence - operation.sequence);
        comm.Publish(context.lane, sequence, tag);
      }
    }
    // It awaits no flag, so none tells the recorder that it is through.
    comm.Complete(context.lane, published);
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  for (uint64_t chunk = 0; chunk < operation.chunks(); chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    if (Status s = comm.AwaitSame(context.lane, sequence, operation.root, tag, deadline); !s.ok()) [[unlikely]] return s;
    if (chunk == 0) {
      std::byte* source = nullptr;
      if (Status s = FindSource(context, operation, operation.nbytes(), operation.root, deadline, &source); !s.ok()) [[unlikely]] return s;
      if (source != nullptr) {
        context.copy(operation.data, source, operation.nbytes());
        comm.Consumed(context.lane, last);
        break;
      }
    }
    if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
      context.copy(operation.data + chunk * operation.chunk_bytes, comm.Slot(operation.root, sequence), nbytes);
    }
    comm.Consumed(context.lane, sequence);
  }
  return comm.failed() ? comm.failure() : Status::Ok();
}

}  // namespace tilerank
