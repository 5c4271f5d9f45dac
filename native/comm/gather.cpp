#include "comm/gather.h"

#include "comm/parts.h"

namespace tilerank {

namespace {

OpTag TagOf(const Operation& operation) { return MakeTag(operation, operation.root); }

// Of the root.
uint32_t TargetOf(const OperationContext& context, const Operation& operation) {
  return PartBytes(operation, context.fabric->world_size()) >= context.into_tensor_bytes ? operation.target : 0;
}

void CopyIn(const OperationContext& context, const Operation& operation, uint64_t piece) {
  Fabric& comm = *context.fabric;
  const Part mine = PieceOf(operation, comm.rank(), comm.world_size(), piece, operation.chunk_bytes);
  const size_t begin = PartOf(operation, comm.rank(), comm.world_size()).begin;
  if (mine.nbytes > 0) context.copy(comm.Slot(comm.rank(), operation.sequence + piece), operation.data + (mine.begin - begin), mine.nbytes);
}

// What a rank other than the root does at the end of a sequence that it has published. It reads nothing, so it is through with that generation.
void Through(const OperationContext& context, uint64_t sequence) {
  context.fabric->Consumed(context.lane, sequence);
  context.fabric->Complete(context.lane, sequence);
}

}  // namespace

uint64_t GatherSequences(const Operation& operation, int world_size) { return PiecesOf(operation, world_size, operation.chunk_bytes); }

void GatherStart(const OperationContext& context, const Operation& operation) {
  const int world_size = context.fabric->world_size();
  const size_t part_bytes = PartBytes(operation, world_size);
  if (context.fabric->rank() == operation.root) {
    if (SaysSource(context, part_bytes)) PublishTensor(context, operation, part_bytes, TargetOf(context, operation), TagOf(operation));
    return;
  }
  const bool is_from_tensor = IsFromTensor(context, operation, part_bytes);
  if (!is_from_tensor) CopyIn(context, operation, 0);
  PublishSource(context, operation, part_bytes, TagOf(operation));
  if (!is_from_tensor) Through(context, operation.sequence);
}

namespace {

// A rank with a tensor writes its part into that of the root, while others do the same with theirs; or the root reads it, where the root
// has none.
Status GiveTensor(const OperationContext& context, const Operation& operation, uint64_t last, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  if (Status s = comm.AwaitSame(context.lane, operation.sequence, operation.root, TagOf(operation), deadline); !s.ok()) [[unlikely]] return s;
  std::byte* target = nullptr;
  Status s = FindSource(context, operation, PartBytes(operation, world_size), operation.root, deadline, &target);
  if (!s.ok()) [[unlikely]] return s;
  const Part own = PartOf(operation, comm.rank(), world_size);
  if (target != nullptr && own.nbytes > 0) context.copy(target + own.begin, operation.data, own.nbytes);
  comm.Consumed(context.lane, last);
  return target != nullptr ? Status::Ok() : comm.AwaitConsumedBy(context.lane, last, operation.root, NameOf(operation.op), deadline);
}

}  // namespace

Status GatherFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const int world_size = comm.world_size();
  const size_t part_bytes = PartBytes(operation, world_size);
  const uint64_t pieces = GatherSequences(operation, world_size), last = operation.sequence + pieces - 1;
  const OpTag tag = TagOf(operation);
  if (comm.rank() != operation.root) {
    if (IsFromTensor(context, operation, part_bytes)) return GiveTensor(context, operation, last, deadline);
    for (uint64_t piece = 1; piece < pieces; piece++) {
      const uint64_t sequence = operation.sequence + piece;
      if (Status s = comm.Acquire(context.lane, sequence, deadline); !s.ok()) [[unlikely]] return s;
      CopyIn(context, operation, piece);
      comm.Publish(context.lane, sequence, tag);
      Through(context, sequence);
    }
    return comm.failed() ? comm.failure() : Status::Ok();
  }
  for (uint64_t piece = 0; piece < pieces; piece++) MoveOwnPiece(context, operation, comm.rank(), world_size, piece);
  const bool has_target = TargetOf(context, operation) != 0;
  std::byte* sources[kMaxWorldSize];
  std::fill_n(sources, world_size, nullptr);
  bool all_are_tensors = true;
  for (uint64_t piece = 0; piece < pieces; piece++) {
    const uint64_t sequence = operation.sequence + piece;
    for (int step = 1; step < world_size; step++) {
      const int peer = (comm.rank() + step) % world_size;
      if (sources[peer] != nullptr) continue;
      if (Status s = comm.AwaitSame(context.lane, sequence, peer, tag, deadline); !s.ok()) [[unlikely]] return s;
      if (piece == 0) {
        if (Status s = FindSource(context, operation, part_bytes, peer, deadline, &sources[peer]); !s.ok()) [[unlikely]] return s;
        const Part theirs = PartOf(operation, peer, world_size);
        if (sources[peer] != nullptr) {
          if (!has_target && theirs.nbytes > 0) context.copy(operation.output + theirs.begin, sources[peer], theirs.nbytes);
          continue;
        }
      }
      all_are_tensors = false;
      const Part theirs = PieceOf(operation, peer, world_size, piece, operation.chunk_bytes);
      if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, comm.Slot(peer, sequence), theirs.nbytes);
    }
    const bool is_end = all_are_tensors || piece + 1 == pieces;
    comm.Consumed(context.lane, is_end ? last : sequence);
    if (is_end) break;
  }
  for (int peer = 0; has_target && peer < world_size; peer++) {
    if (sources[peer] == nullptr) continue;
    if (Status s = comm.AwaitConsumedBy(context.lane, last, peer, NameOf(operation.op), deadline); !s.ok()) [[unlikely]] return s;
  }
  return Status::Ok();
}

}  // namespace tilerank
