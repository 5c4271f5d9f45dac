#include "comm/all_gather.h"

#include <cstring>

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) {
  OpTag tag;
  tag.op = CollectiveOp::kAllGather;
  tag.dtype = operation.dtype;
  tag.detail = operation.history;
  tag.count = operation.count;
  return tag;
}

void PublishChunk(const OperationContext& context, const Operation& operation, uint64_t chunk) {
  Communicator& comm = *context.communicator;
  const uint64_t sequence = operation.sequence + chunk;
  if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
    context.copy(comm.Slot(comm.rank(), sequence), operation.data + chunk * operation.chunk_bytes, nbytes);
  }
  comm.Publish(context.lane, sequence, TagOf(operation));
}

}  // namespace

uint64_t AllGatherSequences(const Operation& operation) { return operation.chunks(); }

void AllGatherStart(const OperationContext& context, const Operation& operation) { PublishChunk(context, operation, 0); }

Status AllGatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Communicator& comm = *context.communicator;
  const OpTag tag = TagOf(operation);
  const size_t part = operation.nbytes();
  for (uint64_t chunk = 0; chunk < operation.chunks(); chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    const size_t offset = chunk * operation.chunk_bytes;
    const size_t nbytes = operation.ChunkBytes(chunk);
    if (chunk > 0) PublishChunk(context, operation, chunk);
    // The rank's own part may lie in its place in output already.
    std::byte* own = operation.output + static_cast<size_t>(comm.rank()) * part + offset;
    if (nbytes > 0 && own != operation.data + offset) std::memmove(own, operation.data + offset, nbytes);
    if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;
    if (nbytes == 0) continue;
    for (int step = 1; step < comm.world_size(); step++) {
      const int peer = (comm.rank() + step) % comm.world_size();
      context.copy(operation.output + static_cast<size_t>(peer) * part + offset, comm.Slot(peer, sequence), nbytes);
    }
  }
  return Status::Ok();
}

}  // namespace tilerank
