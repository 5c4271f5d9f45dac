#include "comm/all_gather.h"

#include "comm/parts.h"

namespace tilerank {

namespace {

void PublishPiece(const OperationContext& context, const Operation& operation, uint64_t piece) {
  Fabric& comm = *context.fabric;
  const uint64_t sequence = operation.sequence + piece;
  const size_t part_bytes = PartBytes(operation, comm.world_size());
  const Part mine = PieceOf(operation, comm.rank(), comm.world_size(), piece, operation.chunk_bytes);
  if (mine.nbytes > 0 && !IsFromTensor(context, operation, part_bytes)) {
    const size_t begin = PartOf(operation, comm.rank(), comm.world_size()).begin;
    context.copy(comm.Slot(comm.rank(), sequence), operation.data + (mine.begin - begin), mine.nbytes);
  }
  if (piece == 0) PublishSource(context, operation, part_bytes, MakeTag(operation, 0));
  else comm.Publish(context.lane, sequence, MakeTag(operation, 0));
}

}  // namespace

uint64_t AllGatherSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, operation.chunk_bytes); }

void AllGatherStart(const OperationContext& context, const Operation& operation) { PublishPiece(context, operation, 0); }

Status AllGatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const OpTag tag = MakeTag(operation, 0);
  const int world_size = comm.world_size();
  const uint64_t pieces = AllGatherSequences(operation, world_size);
  const size_t part_bytes = PartBytes(operation, world_size);
  std::byte* tensors[kMaxWorldSize];
  bool some_are_tensors = false, all_are_tensors = false;
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    if (piece > 0 && !all_are_tensors) PublishPiece(context, operation, piece);
    MoveOwnPiece(context, operation, comm.rank(), world_size, piece);
    if (!all_are_tensors) {
      if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;
    }
    if (piece == 0) {
      Status s = FindSources(context, operation, part_bytes, deadline, tensors, &some_are_tensors, &all_are_tensors);
      if (!s.ok()) [[unlikely]] return s;
    }
    for (int step = 1; step < world_size; step++) {
      const int peer = (comm.rank() + step) % world_size;
      const Part theirs = PieceOf(operation, peer, world_size, piece, operation.chunk_bytes);
      const std::byte* from = tensors[peer] != nullptr ? tensors[peer] + piece * operation.chunk_bytes : comm.Slot(peer, sequence);
      if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, from, theirs.nbytes);
    }
  }
  return some_are_tensors ? EndSources(context, operation, part_bytes, operation.sequence + pieces - 1, deadline) : Status::Ok();
}

}  // namespace tilerank
