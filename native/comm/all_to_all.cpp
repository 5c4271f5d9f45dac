#include "comm/all_to_all.h"

#include "comm/parts.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, 0); }

// What comes from a rank, as a range of output.
Part OutputPartOf(const Operation& operation, int rank, int world_size) {
  if (operation.output_offsets == nullptr) return PartOf(operation, rank, world_size);
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  const uint64_t* at = operation.output_offsets + rank;
  return {at[0] * element, (at[1] - at[0]) * element};
}

}  // namespace

uint64_t AllToAllSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, CellBytes(operation, world_size)); }

void AllToAllStart(const OperationContext& context, const Operation& operation) { PublishCells(context, operation, 0, TagOf(operation)); }

Status AllToAllFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  const OpTag tag = TagOf(operation);
  const size_t cell = CellBytes(operation, world_size);
  const uint64_t pieces = AllToAllSequences(operation, world_size);
  const Part own = PartOf(operation, comm.rank(), world_size);
  if (own.nbytes > 0 && operation.output != operation.data) {
    context.copy(operation.output + OutputPartOf(operation, comm.rank(), world_size).begin, operation.data + own.begin, own.nbytes);
  }
  const size_t part_bytes = PartBytes(operation, world_size);
  std::byte* tensors[kMaxWorldSize];
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
    for (int step = 1; step < world_size; step++) {
      const int peer = (comm.rank() + step) % world_size;
      const Part theirs = PieceOf(OutputPartOf(operation, peer, world_size), piece, cell);
      const std::byte* from =
          tensors[peer] != nullptr ? tensors[peer] + own.begin + piece * cell : CellOf(context, operation, peer, sequence);
      if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, from, theirs.nbytes);
    }
  }
  return some_are_tensors ? EndSources(context, operation, part_bytes, operation.sequence + pieces - 1, deadline) : Status::Ok();
}

}  // namespace tilerank
