#include "comm/scatter.h"

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
  const size_t part_bytes = PartBytes(operation, world_size);
  const uint64_t pieces = ScatterSequences(operation, world_size), last = operation.sequence + pieces - 1;
  const Part own = PartOf(operation, comm.rank(), world_size);
  if (comm.rank() == operation.root) {
    const bool is_from_tensor = IsFromTensor(context, operation, part_bytes);
    for (uint64_t piece = 1; piece < pieces && !is_from_tensor; piece++) {
      if (Status s = comm.Acquire(context.lane, operation.sequence + piece, deadline); !s.ok()) [[unlikely]] return s;
      PublishCells(context, operation, piece, TagOf(operation));
    }
    if (own.nbytes > 0 && operation.output != operation.data + own.begin) context.copy(operation.output, operation.data + own.begin, own.nbytes);
    if (is_from_tensor) {
      if (Status s = EndSources(context, operation, part_bytes, last, deadline); !s.ok()) [[unlikely]] return s;
    }
    // It awaits no flag, so none tells the recorder that it is through.
    comm.Complete(context.lane, is_from_tensor ? operation.sequence : last);
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  const OpTag tag = TagOf(operation);
  const size_t cell = CellBytes(operation, world_size);
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    if (Status s = comm.AwaitSame(context.lane, sequence, operation.root, tag, deadline); !s.ok()) [[unlikely]] return s;
    if (piece == 0) {
      std::byte* source = nullptr;
      if (Status s = FindSource(context, operation, part_bytes, operation.root, deadline, &source); !s.ok()) [[unlikely]] return s;
      if (source != nullptr) {
        if (own.nbytes > 0) context.copy(operation.output, source + own.begin, own.nbytes);
        comm.Consumed(context.lane, last);
        break;
      }
    }
    const Part mine = PieceOf(operation, comm.rank(), world_size, piece, cell);
    if (mine.nbytes > 0) {
      context.copy(operation.output + (mine.begin - own.begin), CellOf(context, operation, operation.root, sequence), mine.nbytes);
    }
    comm.Consumed(context.lane, sequence);
  }
  return Status::Ok();
}

}  // namespace tilerank
