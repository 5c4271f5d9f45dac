#include "comm/scatter.h"

#include <cstring>

#include "comm/parts.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root); }

}  // namespace

uint64_t ScatterSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, CellBytes(operation, world_size)); }

void ScatterStart(const OperationContext& context, const Operation& operation) {
  if (context.fabric->rank() == operation.root) PublishCells(context, operation, 0, TagOf(operation));
}

Status ScatterFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  const uint64_t pieces = ScatterSequences(operation, world_size);
  const Part own = PartOf(operation, comm.rank(), world_size);
  if (comm.rank() == operation.root) {
    for (uint64_t piece = 1; piece < pieces; piece++) {
      if (Status s = comm.Acquire(context.lane, operation.sequence + piece, deadline); !s.ok()) [[unlikely]] return s;
      PublishCells(context, operation, piece, TagOf(operation));
    }
    if (own.nbytes > 0 && operation.output != operation.data + own.begin) std::memmove(operation.output, operation.data + own.begin, own.nbytes);
    // It waits for nobody, so no wait tells the recorder that it is through.
    comm.Complete(context.lane, operation.sequence + pieces - 1);
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  const OpTag tag = TagOf(operation);
  const size_t cell = CellBytes(operation, world_size);
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    if (Status s = comm.AwaitSame(context.lane, sequence, operation.root, tag, deadline); !s.ok()) [[unlikely]] return s;
    const Part mine = PieceOf(operation, comm.rank(), world_size, piece, cell);
    if (mine.nbytes > 0) {
      context.copy(operation.output + (mine.begin - own.begin), CellOf(context, operation, operation.root, sequence), mine.nbytes);
    }
    comm.Consumed(context.lane, sequence);
  }
  return Status::Ok();
}

}  // namespace tilerank
