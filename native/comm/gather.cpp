#include "comm/gather.h"

#include "comm/parts.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root); }

// What a rank other than the root does at one sequence. It reads nothing, so it is through with the generation at once.
void PublishPiece(const OperationContext& context, const Operation& operation, uint64_t piece) {
  Fabric& comm = *context.fabric;
  const uint64_t sequence = operation.sequence + piece;
  const Part mine = PieceOf(operation, comm.rank(), comm.world_size(), piece, operation.chunk_bytes);
  const size_t begin = PartOf(operation, comm.rank(), comm.world_size()).begin;
  if (mine.nbytes > 0) context.copy(comm.Slot(comm.rank(), sequence), operation.data + (mine.begin - begin), mine.nbytes);
  comm.Publish(context.lane, sequence, TagOf(operation));
  comm.Consumed(context.lane, sequence);
  comm.Complete(context.lane, sequence);
}

}  // namespace

uint64_t GatherSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, operation.chunk_bytes); }

void GatherStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() != operation.root) PublishPiece(context, operation, 0);
}

Status GatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  const uint64_t pieces = GatherSequences(operation, world_size);
  if (comm.rank() != operation.root) {
    for (uint64_t piece = 1; piece < pieces; piece++) {
      if (Status s = comm.Acquire(context.lane, operation.sequence + piece, deadline); !s.ok()) [[unlikely]] return s;
      PublishPiece(context, operation, piece);
    }
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  const OpTag tag = TagOf(operation);
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    MoveOwnPiece(operation, comm.rank(), world_size, piece);
    for (int step = 1; step < world_size; step++) {
      const int peer = (comm.rank() + step) % world_size;
      if (Status s = comm.AwaitSame(context.lane, sequence, peer, tag, deadline); !s.ok()) [[unlikely]] return s;
      const Part theirs = PieceOf(operation, peer, world_size, piece, operation.chunk_bytes);
      if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, comm.Slot(peer, sequence), theirs.nbytes);
    }
    comm.Consumed(context.lane, sequence);
  }
  return Status::Ok();
}

}  // namespace tilerank
