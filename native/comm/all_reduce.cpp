#include "comm/all_reduce.h"

#include <algorithm>

namespace tilerank {

namespace {

// Blocks that pass through the nearest cache on their way to several tensors.
constexpr size_t kBlockBytes = 16 << 10;
constexpr size_t kLineBytes = 64;

OpTag TagOf(const Operation& operation, int phase) {
  return MakeTag(operation, operation.algorithm | phase << 4 | static_cast<int>(operation.reduce_op) << 8);
}

// Slice of rank r of S bytes: whole cache lines, so that no line has two writers; the last slices may be shorter or empty.
struct Slice {
  size_t begin, nbytes;
};
Slice SliceOf(size_t nbytes, int rank, int world_size) {
  const size_t lines = (nbytes + kLineBytes - 1) / kLineBytes;
  const size_t share = (lines + static_cast<size_t>(world_size) - 1) / static_cast<size_t>(world_size);
  const size_t begin = std::min(nbytes, static_cast<size_t>(rank) * share * kLineBytes);
  const size_t end = std::min(nbytes, (static_cast<size_t>(rank) + 1) * share * kLineBytes);
  return {begin, end - begin};
}

void CopyIn(const OperationContext& context, const Operation& operation, uint64_t chunk, uint64_t sequence) {
  std::byte* slot = context.fabric->Slot(context.fabric->rank(), sequence);
  if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
    context.copy(slot, operation.data + chunk * operation.chunk_bytes, nbytes);
  }
}

// One-shot, chunk c at sequence s + c. A rank reads generation g before it publishes g + 1, and writes g + 1 before it has read
// g: two generations are enough. Its own input it takes from `data`, which is nearer than its slot.
Status FinishOneShot(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const OpTag tag = TagOf(operation, 0);
  const size_t element = static_cast<size_t>(ElementBytes(operation.dtype));
  const uint64_t chunks = operation.chunks();
  const void* sources[kMaxWorldSize];
  for (uint64_t chunk = 0; chunk < chunks; chunk++) {
    const uint64_t sequence = operation.sequence + chunk;
    if (chunk > 0) {
      CopyIn(context, operation, chunk, sequence);
      comm.Publish(context.lane, sequence, tag);
    }
    if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;
    const size_t begin = chunk * operation.chunk_bytes;
    for (int rank = 0; rank < comm.world_size(); rank++) {
      sources[rank] = rank == comm.rank() ? operation.data + begin : comm.Slot(rank, sequence);
    }
    if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
      context.reduce(operation.result() + begin, sources, comm.world_size(), operation.dtype, operation.reduce_op, nbytes / element);
    }
  }
  return Status::Ok();
}

// Two-shot, chunk c at sequences s + 2c (inputs) and s + 2c + 1 (sums). Sums go into the other generation's slot, not over the
// inputs: so again each generation is read only before the next is published.
Status FinishTwoShot(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const OpTag inputs = TagOf(operation, 0), sums = TagOf(operation, 1);
  const size_t element = static_cast<size_t>(ElementBytes(operation.dtype));
  const int world_size = comm.world_size();
  const uint64_t chunks = operation.chunks();
  const void* sources[kMaxWorldSize];
  for (uint64_t chunk = 0; chunk < chunks; chunk++) {
    const uint64_t sequence = operation.sequence + 2 * chunk;
    const size_t nbytes = operation.ChunkBytes(chunk);
    if (chunk > 0) {
      CopyIn(context, operation, chunk, sequence);
      comm.Publish(context.lane, sequence, inputs);
    }
    if (Status s = comm.Await(context.lane, sequence, inputs, deadline); !s.ok()) [[unlikely]] return s;
    const std::byte* in = operation.data + chunk * operation.chunk_bytes;
    std::byte* out = operation.result() + chunk * operation.chunk_bytes;
    const Slice mine = SliceOf(nbytes, comm.rank(), world_size);
    if (mine.nbytes > 0) {
      for (int rank = 0; rank < world_size; rank++) {
        sources[rank] = (rank == comm.rank() ? in : comm.Slot(rank, sequence)) + mine.begin;
      }
      std::byte* sum = comm.Slot(comm.rank(), sequence + 1) + mine.begin;
      context.reduce(sum, sources, world_size, operation.dtype, operation.reduce_op, mine.nbytes / element);
    }
    comm.Publish(context.lane, sequence + 1, sums);
    if (mine.nbytes > 0) context.copy(out + mine.begin, comm.Slot(comm.rank(), sequence + 1) + mine.begin, mine.nbytes);
    if (Status s = comm.Await(context.lane, sequence + 1, sums, deadline); !s.ok()) [[unlikely]] return s;
    for (int step = 1; step < world_size; step++) {
      const int peer = (comm.rank() + step) % world_size;  // not all from the same peer at once
      const Slice slice = SliceOf(nbytes, peer, world_size);
      if (slice.nbytes > 0) context.copy(out + slice.begin, comm.Slot(peer, sequence + 1) + slice.begin, slice.nbytes);
    }
  }
  return Status::Ok();
}

}  // namespace

// Two-shot on tensors that all ranks have mapped, at sequences s (inputs stand) and s + 1 (sums stand everywhere). Every rank sums
// its slice and stores it into all tensors, or into all tensors of the output; nobody else touches that slice in between.
Status AllReduceSlice(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  if (Status s = comm.Await(context.lane, operation.sequence, TagOf(operation, 0), deadline); !s.ok()) [[unlikely]] return s;
  const std::vector<std::byte*>& parts = *operation.parts;
  const std::vector<std::byte*>& outputs = operation.output_parts != nullptr ? *operation.output_parts : parts;
  const int world_size = comm.world_size();
  const Slice mine = SliceOf(operation.nbytes(), comm.rank(), world_size);
  const size_t element = static_cast<size_t>(ElementBytes(operation.dtype));
  const void* sources[kMaxWorldSize];
  for (size_t at = mine.begin; at < mine.begin + mine.nbytes; at += kBlockBytes) {
    const size_t nbytes = std::min(kBlockBytes, mine.begin + mine.nbytes - at);
    for (int rank = 0; rank < world_size; rank++) sources[rank] = parts[static_cast<size_t>(rank)] + at;
    std::byte* own = outputs[static_cast<size_t>(comm.rank())] + at;
    context.reduce(own, sources, world_size, operation.dtype, operation.reduce_op, nbytes / element);
    for (int rank = 0; rank < world_size; rank++) {
      if (rank != comm.rank()) context.copy(outputs[static_cast<size_t>(rank)] + at, own, nbytes);
    }
  }
  comm.Publish(context.lane, operation.sequence + 1, TagOf(operation, 1));
  return Status::Ok();
}

uint64_t AllReduceSequences(const Operation& operation) {
  switch (static_cast<AllReduceAlgorithm>(operation.algorithm)) {
    case AllReduceAlgorithm::kTwoShot: return 2 * operation.chunks();
    case AllReduceAlgorithm::kTwoShotInPlace: return 2;
    default: return operation.chunks();
  }
}

void AllReduceStart(const OperationContext& context, const Operation& operation) {
  const bool is_in_place = static_cast<AllReduceAlgorithm>(operation.algorithm) == AllReduceAlgorithm::kTwoShotInPlace;
  if (!is_in_place) CopyIn(context, operation, 0, operation.sequence);
  context.fabric->Publish(context.lane, operation.sequence, TagOf(operation, 0));
}

Status AllReduceFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  switch (static_cast<AllReduceAlgorithm>(operation.algorithm)) {
    case AllReduceAlgorithm::kOneShot: return FinishOneShot(context, operation, deadline);
    case AllReduceAlgorithm::kTwoShot: return FinishTwoShot(context, operation, deadline);
    case AllReduceAlgorithm::kTwoShotInPlace: {
      if (!operation.is_reduced) {
        if (Status s = AllReduceSlice(context, operation, deadline); !s.ok()) [[unlikely]] return s;
      }
      return context.fabric->Await(context.lane, operation.sequence + 1, TagOf(operation, 1), deadline);
    }
    default: return Status(Code::kInternal, "an allReduce was started without an algorithm");
  }
}

}  // namespace tilerank
