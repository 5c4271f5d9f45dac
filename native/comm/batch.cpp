#include "comm/batch.h"

#include <algorithm>
#include <utility>

#include "comm/parts.h"

namespace tilerank {

namespace {

constexpr size_t kLineBytes = 64;
// Above this an operation has its own exchange, whose algorithm its size deserves.
constexpr size_t kMostPackedBytes = 32 << 10;

OpTag TagOf(const Operation& operation) { return MakeTag(operation, 0); }

// What a rank contributes: the same on all ranks, so that all find it at the same place.
size_t RegionBytes(const Operation& operation, int world_size) {
  switch (operation.op) {
    case CollectiveOp::kGather:
    case CollectiveOp::kAllGather: {
      size_t largest = 0;
      for (int rank = 0; rank < world_size; rank++) largest = std::max(largest, PartOf(operation, rank, world_size).nbytes);
      return largest;
    }
    case CollectiveOp::kBarrier: return 0;
    default: return operation.nbytes();
  }
}

bool Contributes(const Operation& operation, int rank) {
  switch (operation.op) {
    case CollectiveOp::kBroadcast:
    case CollectiveOp::kScatter: return rank == operation.root;
    case CollectiveOp::kReduce:
    case CollectiveOp::kGather: return rank != operation.root;
    default: return true;
  }
}

// A lone step, as if it were called by itself.
Operation LoneOf(const Operation& operation, const Batch::Step& step) {
  Operation lone = operation.batch->operations[step.first];
  lone.sequence = operation.sequence + step.sequence;
  lone.history = operation.history ^ operation.layout;
  return lone;
}

void PublishStep(const OperationContext& context, const Operation& operation, const Batch::Step& step) {
  Fabric& comm = *context.fabric;
  const Batch& batch = *operation.batch;
  const uint64_t sequence = operation.sequence + step.sequence;
  std::byte* slot = comm.Slot(comm.rank(), sequence);
  for (size_t i = step.first; i < step.last; i++) {
    const Operation& one = batch.operations[i];
    if (!Contributes(one, comm.rank())) continue;
    const bool is_part = one.op == CollectiveOp::kGather || one.op == CollectiveOp::kAllGather;
    const size_t nbytes = is_part ? PartOf(one, comm.rank(), comm.world_size()).nbytes : RegionBytes(one, comm.world_size());
    if (nbytes > 0) context.copy(slot + batch.places[i], one.data, nbytes);
  }
  comm.Publish(context.lane, sequence, TagOf(operation));
}

// The result of one operation, of what all ranks have put at `place` of their slots.
void Conclude(const OperationContext& context, const Operation& one, uint64_t sequence, size_t place) {
  Fabric& comm = *context.fabric;
  const int rank = comm.rank(), world_size = comm.world_size();
  const auto element = static_cast<size_t>(ElementBytes(one.dtype));
  const auto at = [&](int peer) -> const std::byte* { return comm.Slot(peer, sequence) + place; };
  const Part own = one.op == CollectiveOp::kBarrier ? Part{} : PartOf(one, rank, world_size);
  const auto copy = [&](std::byte* out, const std::byte* in, size_t nbytes) {
    if (nbytes > 0 && out != in) context.copy(out, in, nbytes);
  };
  // Sums `nbytes` from `begin` on; the own summand is nearer than in the slot.
  const auto reduce = [&](std::byte* out, size_t begin, size_t nbytes) {
    const void* sources[kMaxWorldSize];
    for (int peer = 0; peer < world_size; peer++) sources[peer] = (peer == rank ? one.data : at(peer)) + begin;
    if (nbytes > 0) context.reduce(out, sources, world_size, one.dtype, one.reduce_op, nbytes / element);
  };
  switch (one.op) {
    case CollectiveOp::kAllReduce: return reduce(one.result(), 0, one.nbytes());
    case CollectiveOp::kReduce:
      if (rank == one.root) reduce(one.result(), 0, one.nbytes());
      return;
    case CollectiveOp::kBroadcast:
      if (rank != one.root) copy(one.data, at(one.root), one.nbytes());
      return;
    case CollectiveOp::kReduceScatter: return reduce(one.output, own.begin, own.nbytes);
    case CollectiveOp::kScatter: return copy(one.output, (rank == one.root ? one.data : at(one.root)) + own.begin, own.nbytes);
    case CollectiveOp::kGather:
      if (rank != one.root) return;
      [[fallthrough]];
    case CollectiveOp::kAllGather:
      for (int peer = 0; peer < world_size; peer++) {
        const Part theirs = PartOf(one, peer, world_size);
        copy(one.output + theirs.begin, peer == rank ? one.data : at(peer), theirs.nbytes);
      }
      return;
    case CollectiveOp::kAllToAll:
      for (int peer = 0; peer < world_size; peer++) {
        copy(one.output + PartOf(one, peer, world_size).begin, (peer == rank ? one.data : at(peer)) + own.begin, own.nbytes);
      }
      return;
    default: return;
  }
}

}  // namespace

void PlanBatch(std::vector<Operation> operations, int world_size, size_t chunk_bytes, Batch* batch, Operation* operation) {
  batch->operations = std::move(operations);
  operation->op = CollectiveOp::kBatch;
  operation->dtype = DType::kU8;
  operation->count = 0;
  operation->chunk_bytes = chunk_bytes;
  operation->batch = batch;
  uint32_t digest = static_cast<uint32_t>(batch->operations.size());
  size_t end = 0;
  batch->steps.push_back({});
  for (size_t i = 0; i < batch->operations.size(); i++) {
    Operation one = batch->operations[i];
    const size_t nbytes = RegionBytes(one, world_size);
    const bool is_packed = nbytes <= std::min(chunk_bytes, kMostPackedBytes);
    operation->count += nbytes;
    // Whether memory is a tensor makes no difference where it is packed.
    if (is_packed) one.algorithm = 0, one.tensor = 0;
    one.history = digest;
    digest = HistoryAfter(one);
    Batch::Step* step = &batch->steps.back();
    size_t begin = (end + kLineBytes - 1) / kLineBytes * kLineBytes;
    if (step->first < step->last && (!is_packed || !step->is_packed || begin + nbytes > chunk_bytes)) {
      batch->steps.push_back({i, i, true, 0});
      step = &batch->steps.back();
      begin = 0;
    }
    step->last = i + 1;
    step->is_packed = is_packed;
    batch->places.push_back(begin);
    end = begin + nbytes;
  }
  for (Batch::Step& step : batch->steps) {
    step.sequence = batch->sequences;
    batch->sequences += step.is_packed ? 1 : SequencesOf(batch->operations[step.first], world_size);
  }
  operation->layout = digest;
}

void BatchStart(const OperationContext& context, const Operation& operation) {
  const Batch::Step& step = operation.batch->steps.front();
  if (step.is_packed) return PublishStep(context, operation, step);
  (void)TryStart(context, LoneOf(operation, step));  // its slot is free, as has been seen
}

bool BatchIsReady(const OperationContext& context, const Operation& operation) {
  const Batch::Step& step = operation.batch->steps.front();
  return step.is_packed ? context.fabric->IsReady(context.lane, operation.sequence) : IsReady(context, LoneOf(operation, step));
}

Status BatchFinish(const OperationContext& context, const Operation& operation, const Deadline& deadline) {
  Fabric& comm = *context.fabric;
  const Batch& batch = *operation.batch;
  const OpTag tag = TagOf(operation);
  for (const Batch::Step& step : batch.steps) {
    const bool has_started = &step == &batch.steps.front();
    const uint64_t sequence = operation.sequence + step.sequence;
    if (!step.is_packed) {
      if (Status s = Finish(context, LoneOf(operation, step), has_started, deadline); !s.ok()) return s;
      continue;
    }
    if (!has_started) {
      if (Status s = comm.Acquire(context.lane, sequence, deadline); !s.ok()) [[unlikely]] return s;
      PublishStep(context, operation, step);
    }
    if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;
    for (size_t i = step.first; i < step.last; i++) Conclude(context, batch.operations[i], sequence, batch.places[i]);
  }
  return Status::Ok();
}

}  // namespace tilerank
