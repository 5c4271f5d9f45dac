#include "comm/reduce_scatter.h"

#include "comm/parts.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, static_cast<int>(operation.reduce_op) << 8); }

}  // namespace

uint64_t ReduceScatterSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, CellBytes(operation, world_size)); }

void ReduceScatterStart(const OperationContext& context, const Operation& operation) { PublishCells(context, operation, 0, TagOf(operation)); }

Status ReduceScatterFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  const OpTag tag = TagOf(operation);
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  const size_t cell = CellBytes(operation, world_size), own = PartOf(operation, comm.rank(), world_size).begin;
  const uint64_t pieces = ReduceScatterSequences(operation, world_size);
  const size_t part_bytes = PartBytes(operation, world_size);
  std::byte* tensors[kMaxWorldSize];
  const void* sources[kMaxWorldSize];
  bool some_are_tensors = false, all_are_tensors = false;
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    if (!all_are_tensors) {
      if (piece > 0) PublishCells(context, operation, piece, TagOf(operation));
      if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;
    }
    if (piece == 0) {
      Status s = FindSources(context, operation, part_bytes, deadline, tensors, &some_are_tensors, &all_are_tensors);
      if (!s.ok()) [[unlikely]] return s;
    }
    const Part mine = PieceOf(operation, comm.rank(), world_size, piece, cell);
    if (mine.nbytes == 0) continue;
    for (int rank = 0; rank < world_size; rank++) {
      sources[rank] = rank == comm.rank()        ? operation.data + mine.begin
                      : tensors[rank] != nullptr ? tensors[rank] + mine.begin
                                                 : CellOf(context, operation, rank, sequence);
    }
    context.reduce(operation.output + (mine.begin - own), sources, world_size, operation.dtype, operation.reduce_op, mine.nbytes / element);
  }
  return some_are_tensors ? EndSources(context, operation, part_bytes, operation.sequence + pieces - 1, deadline) : Status::Ok();
}

}  // namespace tilerank
