// What the operations on parts share: a part passes through a slot in pieces, one a sequence; every rank's piece number p at the same
// one. Where a slot carries parts for several ranks it is cut into a cell for each.
#pragma once
#include <algorithm>

#include "comm/operation.h"
#include "comm/source.h"

namespace tilerank {

constexpr size_t kCellLine = 64;

/// Bytes of a slot that are one rank's; at least a line, as chunks of a group are at least a line a rank.
inline size_t CellBytes(const Operation& operation, int world_size) {
  return operation.chunk_bytes / static_cast<size_t>(world_size) / kCellLine * kCellLine;
}

/// Pieces of the largest part; empty parts take one as well, which is how ranks agree on them.
inline uint64_t PiecesOf(const Operation& operation, int world_size, size_t piece_bytes) {
  size_t largest = std::max(size_t{1}, operation.largest_part);
  for (int rank = 0; rank < world_size; rank++) largest = std::max(largest, PartOf(operation, rank, world_size).nbytes);
  return (largest + piece_bytes - 1) / piece_bytes;
}

/// Piece number `piece` of a part, as a range of the whole array.
inline Part PieceOf(const Part& part, uint64_t piece, size_t piece_bytes) {
  const size_t begin = std::min(part.nbytes, static_cast<size_t>(piece) * piece_bytes);
  return {part.begin + begin, std::min(piece_bytes, part.nbytes - begin)};
}
inline Part PieceOf(const Operation& operation, int rank, int world_size, uint64_t piece, size_t piece_bytes) {
  return PieceOf(PartOf(operation, rank, world_size), piece, piece_bytes);
}

/// Of gather and allGather: a piece of the rank's own part to its place in output, where it may lie already.
inline void MoveOwnPiece(const OperationContext& context, const Operation& operation, int rank, int world_size, uint64_t piece) {
  const Part mine = PieceOf(operation, rank, world_size, piece, operation.chunk_bytes);
  const std::byte* from = operation.data + (mine.begin - PartOf(operation, rank, world_size).begin);
  if (mine.nbytes > 0 && operation.output + mine.begin != from) context.copy(operation.output + mine.begin, from, mine.nbytes);
}

/// Of one rank's part, on the average: what the ranks compare with limits.
inline size_t PartBytes(const Operation& operation, int world_size) {
  return operation.largest_part > 0 ? operation.largest_part : operation.nbytes() / static_cast<size_t>(world_size);
}

/// Puts a piece of every other rank's part into its cell of this rank's slot.
inline void CopyCells(const OperationContext& context, const Operation& operation, uint64_t piece) {
  Fabric& comm = *context.fabric;
  const uint64_t sequence = operation.sequence + piece;
  const size_t cell = CellBytes(operation, comm.world_size());
  std::byte* slot = comm.Slot(comm.rank(), sequence);
  for (int peer = 0; peer < comm.world_size(); peer++) {
    const Part theirs = PieceOf(operation, peer, comm.world_size(), piece, cell);
    if (peer != comm.rank() && theirs.nbytes > 0) context.copy(slot + static_cast<size_t>(peer) * cell, operation.data + theirs.begin, theirs.nbytes);
  }
}

/// Takes part in a sequence: with the cells, or where the others read from the tensor with the flag alone.
inline void PublishCells(const OperationContext& context, const Operation& operation, uint64_t piece, const OpTag& tag) {
  const size_t part_bytes = PartBytes(operation, context.fabric->world_size());
  if (!IsFromTensor(context, operation, part_bytes)) CopyCells(context, operation, piece);
  if (piece == 0) PublishSource(context, operation, part_bytes, tag);
  else context.fabric->Publish(context.lane, operation.sequence + piece, tag);
}

/// This rank's cell of a peer's slot.
inline const std::byte* CellOf(const OperationContext& context, const Operation& operation, int peer, uint64_t sequence) {
  const Fabric& comm = *context.fabric;
  return comm.Slot(peer, sequence) + static_cast<size_t>(comm.rank()) * CellBytes(operation, comm.world_size());
}

}  // namespace tilerank
