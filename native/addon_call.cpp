// A call of a collective, from the arguments of JavaScript to an Operation: which memory, whether it fits, and what the operation makes
// of it. Nothing here touches shared memory; whatever is wrong leaves the group whole.
#include <memory>
#include <vector>

#include "addon.h"
#include "addon_call.h"
#include "comm/all_reduce.h"
#include "comm/comm_handle.h"

namespace tilerank {

namespace {

/// The typed array that holds a dtype, and its name.
struct ArrayOf {
  napi_typedarray_type type;
  const char* name;
};
ArrayOf ArrayOfDType(DType dtype) {
  static constexpr ArrayOf kArrays[kDTypes] = {{napi_float32_array, "Float32Array"},   {napi_uint16_array, "Uint16Array"},
                                               {napi_uint16_array, "Uint16Array"},     {napi_float64_array, "Float64Array"},
                                               {napi_int8_array, "Int8Array"},         {napi_uint8_array, "Uint8Array"},
                                               {napi_int32_array, "Int32Array"},       {napi_uint32_array, "Uint32Array"},
                                               {napi_bigint64_array, "BigInt64Array"}, {napi_biguint64_array, "BigUint64Array"}};
  return kArrays[static_cast<size_t>(dtype)];
}

uint64_t Digest(const uint64_t* values, size_t count) {
  uint64_t digest = 0x9e3779b97f4a7c15ull;
  for (size_t i = 0; i < count; i++) {
    digest = (digest ^ values[i]) * 0xbf58476d1ce4e5b9ull;
    digest ^= digest >> 31;
  }
  return digest;
}

constexpr uint64_t kMostElements = uint64_t{1} << 48;

}  // namespace

bool CommHandle::Overlap(const Memory& a, const Memory& b, DType dtype) {
  const auto element = static_cast<size_t>(ElementBytes(dtype));
  return a.data < b.data + b.count * element && b.data < a.data + a.count * element;
}

Status ReadTable(const Napi::Value& value, size_t slot_bytes, AlgorithmTable* table) {
  constexpr size_t kColumns = 5;
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array) return Bad("option table must be a Float64Array");
  const Napi::Float64Array cells = value.As<Napi::Float64Array>();
  for (size_t at = 0; at + kColumns <= cells.ElementLength(); at += kColumns) {
    const double op = cells[at], up_to = cells[at + 2], algorithm = cells[at + 3], chunk = cells[at + 4];
    if (!(op >= 1 && op < AlgorithmTable::kOperations && up_to >= 0 && algorithm >= 0 && algorithm <= UINT16_MAX &&
          chunk >= 64 && chunk <= static_cast<double>(slot_bytes) && static_cast<size_t>(chunk) % 64 == 0)) {
      return Bad("row " + std::to_string(at / kColumns) + " of option table is out of range");
    }
    table->Add(static_cast<CollectiveOp>(op), cells[at + 1] != 0,
               {up_to < 9e15 ? static_cast<size_t>(up_to) : SIZE_MAX, static_cast<uint16_t>(algorithm), static_cast<size_t>(chunk)});
  }
  return table->IsWhole() ? Status::Ok() : Bad("option table lacks rows");
}

Status CommHandle::ReadMemory(const Napi::Value& value, DType dtype, const char* name, Memory* memory) const {
  if (value.IsUndefined()) return Status::Ok();
  memory->is_given = true;
  if (value.IsNumber()) {
    const auto found = tensors_.find(value.As<Napi::Number>().Uint32Value());
    if (found == tensors_.end()) return Bad(std::string(name) + " is not a tensor of this group");
    memory->tensor = found->second;
    if (memory->tensor->dtype != dtype) return Bad("dtype is not the tensor's");
    memory->data = memory->tensor->parts[static_cast<size_t>(layout_.local)];
    memory->count = memory->tensor->count;
    return Status::Ok();
  }
  napi_typedarray_type type;
  void* bytes = nullptr;
  napi_value buffer = nullptr;
  if (!value.IsTypedArray() || napi_get_typedarray_info(value.Env(), value, &type, &memory->count, &bytes, &buffer, nullptr) != napi_ok) {
    return Bad(std::string(name) + " is neither a tensor of this group nor a typed array");
  }
  if (const ArrayOf expected = ArrayOfDType(dtype); type != expected.type) {
    return Bad(std::string(name) + " must be a " + expected.name + " (" + NameOf(dtype) + ")");
  }
  bool is_detached = false;
  if (memory->count == 0 && napi_is_detached_arraybuffer(value.Env(), buffer, &is_detached) == napi_ok && is_detached) {
    return Bad(std::string(name) + " is detached: its memory was transferred elsewhere");
  }
  memory->data = static_cast<std::byte*>(bytes);
  return Status::Ok();
}

// Of an allToAll whose parts are of any sizes. Row r of the matrix is what rank r said: what it sends to each rank, then what it expects from
// each. All ranks have all rows, so all come to the same verdict, and need not tell each other.
Status CommHandle::ReadMatrix(const Napi::BigUint64Array& matrix, Call* call) const {
  Operation& operation = call->operation;
  const auto ranks = static_cast<size_t>(world_size_), own = static_cast<size_t>(rank_);
  if (matrix.ElementLength() != 2 * ranks * ranks) return Bad("there must be two counts for each pair of ranks");
  const uint64_t* rows = matrix.Data();
  const auto sent = [&](size_t from, size_t to) { return rows[2 * ranks * from + to]; };
  const auto expected = [&](size_t to, size_t from) { return rows[2 * ranks * to + ranks + from]; };
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  call->offsets = std::make_shared<std::vector<uint64_t>>(1);
  call->output_offsets = std::make_shared<std::vector<uint64_t>>(1);
  for (size_t from = 0; from < ranks; from++) {
    for (size_t to = 0; to < ranks; to++) {
      if (sent(from, to) != expected(to, from)) {
        std::string mine = "rank " + std::to_string(from) + " sends " + std::to_string(sent(from, to)) + " elements to rank " + std::to_string(to);
        std::string theirs = "rank " + std::to_string(to) + " expects " + std::to_string(expected(to, from)) + " from rank " + std::to_string(from);
        std::string text = "the counts of an allToAll do not fit together: " + mine + ", " + theirs;
        if (own == to) mine.swap(theirs);
        Status status = Status(Code::kMismatch, std::move(text))
                            .Number("rank", rank_)
                            .Number("peer", static_cast<double>(own == to ? from : to))
                            .Text("operation", NameOf(operation.op))
                            .Text("mine", mine)
                            .Text("theirs", theirs);
        communicator_->Stop(status);
        return communicator_->failure();
      }
      if (sent(from, to) > kMostElements || operation.count > kMostElements) return Bad("counts are out of range");
      operation.count += sent(from, to);
      operation.largest_part = std::max(operation.largest_part, static_cast<size_t>(sent(from, to)) * element);
      if (from == own) call->offsets->push_back(call->offsets->back() + sent(from, to));
      if (to == own) call->output_offsets->push_back(call->output_offsets->back() + sent(from, to));
    }
  }
  operation.offsets = call->offsets->data();
  operation.output_offsets = call->output_offsets->data();
  operation.layout = static_cast<uint32_t>(Digest(rows, 2 * ranks * ranks) >> 32);
  return Status::Ok();
}

Status CommHandle::TooNarrow(const Operation& operation) const {
  return Bad(std::string(NameOf(operation.op)) + " of " + std::to_string(world_size_) + " ranks needs chunks of at least " + std::to_string(64 * world_size_) +
             " bytes; this group's have " + std::to_string(operation.chunk_bytes));
}

// Of the operations on parts: which memory is the whole array and which a part, whether they fit, and whether they lie apart.
Status CommHandle::ReadParts(const Napi::Value& offsets, const Memory& data, const Memory& output, Call* call) const {
  Operation& operation = call->operation;
  const auto ranks = static_cast<size_t>(world_size_);
  const bool is_root = operation.root == rank_;
  const bool is_data_part = operation.op == CollectiveOp::kGather || operation.op == CollectiveOp::kAllGather;
  const bool is_output_part = operation.op == CollectiveOp::kScatter || operation.op == CollectiveOp::kReduceScatter;
  const bool has_data = is_root || operation.op != CollectiveOp::kScatter;
  const bool has_output = is_root || operation.op != CollectiveOp::kGather;
  const std::string name = NameOf(operation.op);
  if (has_data != data.is_given) return Bad(name + (has_data ? " needs data" : " takes data on its root only"));
  if (has_output != output.is_given) return Bad(name + (has_output ? " needs an output" : " takes an output on its root only"));
  if (operation.op == CollectiveOp::kAllToAll && offsets.IsTypedArray() && offsets.As<Napi::TypedArray>().TypedArrayType() == napi_biguint64_array) {
    if (Status s = ReadMatrix(offsets.As<Napi::BigUint64Array>(), call); !s.ok()) return s;
    const auto expect = [](const char* what, size_t have, uint64_t want) -> Status {
      if (have == want) return Status::Ok();
      return Bad(std::string(what) + " must hold " + std::to_string(want) + " elements, not " + std::to_string(have));
    };
    if (Status s = expect("data", data.count, call->offsets->back()); !s.ok()) return s;
    if (Status s = expect("output", output.count, call->output_offsets->back()); !s.ok()) return s;
    if (Overlap(data, output, operation.dtype)) return Bad("data overlaps output, which an allToAll of parts of any sizes needs apart");
    operation.data = data.data;
    operation.output = output.data;
    operation.source = 0;  // readers do not know where their part begins in it
    operation.chunk_bytes = table_.Choose(operation.op, false, SIZE_MAX).chunk_bytes;
    if (operation.chunk_bytes < ranks * 64) return TooNarrow(operation);
    return Status::Ok();
  }
  if (offsets.IsTypedArray() && offsets.As<Napi::TypedArray>().TypedArrayType() == napi_biguint64_array) {
    const Napi::BigUint64Array list = offsets.As<Napi::BigUint64Array>();
    if (list.ElementLength() != ranks + 1) return Bad("there must be a count for each rank");
    call->offsets = std::make_shared<std::vector<uint64_t>>(list.Data(), list.Data() + list.ElementLength());
    for (size_t i = 0; i < ranks; i++) {
      const uint64_t count = (*call->offsets)[i + 1] - (*call->offsets)[i];
      if ((*call->offsets)[0] != 0 || count > kMostElements || (*call->offsets)[i + 1] > kMostElements) return Bad("counts are out of range");
    }
    operation.offsets = call->offsets->data();
    operation.layout = static_cast<uint32_t>(Digest(operation.offsets, ranks + 1) >> 32);
    operation.count = call->offsets->back();
  } else if (!is_data_part && !is_output_part) {
    if (data.count % ranks != 0) return Bad(name + " takes as many elements for each of the " + std::to_string(ranks) + " ranks, not " + std::to_string(data.count) + " in all");
    operation.count = data.count;
  } else {
    operation.count = (is_data_part ? data.count : output.count) * ranks;
  }
  const Part own = PartOf(operation, rank_, world_size_);
  const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
  const auto fits = [&](const Memory& memory, bool is_part, const char* what) -> Status {
    const size_t expected = is_part ? own.nbytes / element : operation.count;
    if (!memory.is_given || memory.count == expected) return Status::Ok();
    return Bad(std::string(what) + " must hold " + std::to_string(expected) + " elements, not " + std::to_string(memory.count));
  };
  if (Status s = fits(data, is_data_part, "data"); !s.ok()) return s;
  if (Status s = fits(output, is_output_part, "output"); !s.ok()) return s;
  if (data.is_given && output.is_given) {
    // In place: the part is where it belongs in the whole.
    const std::byte* place = is_data_part ? output.data + own.begin : is_output_part ? data.data + own.begin : data.data;
    const bool is_in_place = (is_data_part ? data.data : output.data) == place;
    if (!is_in_place && Overlap(data, output, operation.dtype)) return Bad("data overlaps output elsewhere than in this rank's own part");
  }
  operation.chunk_bytes = table_.Choose(operation.op, false, operation.nbytes()).chunk_bytes;
  if (!is_data_part && operation.chunk_bytes < ranks * 64) {
    return TooNarrow(operation);
  }
  operation.data = data.data;
  operation.output = output.data;
  return Status::Ok();
}

// Of allReduce and reduce, whose output, if any, is as long as their data.
Status CommHandle::ReadReduction(const Memory& data, const Memory& output, int64_t algorithm, Call* call) const {
  Operation& operation = call->operation;
  if (output.is_given) {
    if (operation.op == CollectiveOp::kReduce && operation.root != rank_) return Bad("reduce takes an output on its root only");
    if (output.count != data.count) return Bad("output must hold " + std::to_string(data.count) + " elements, not " + std::to_string(output.count));
    if (output.data != data.data) {
      if (Overlap(data, output, operation.dtype)) return Bad("data overlaps output: it is either the same memory or apart");
      operation.output = output.data;
    }
  }
  if (operation.op == CollectiveOp::kReduce) {
    // Ranks may pass tensors here and arrays there.
    operation.chunk_bytes = table_.Choose(operation.op, false, operation.nbytes()).chunk_bytes;
    return Status::Ok();
  }
  if (mailbox_ != nullptr) return ChooseNetwork(algorithm, &operation);
  if (algorithm >= kNetworkAlgorithms) return Bad("this algorithm is for groups on several nodes");
  const bool is_apart = operation.output != nullptr;
  const bool is_mapped = data.tensor != nullptr && (!is_apart || output.tensor != nullptr);
  const auto fixed = static_cast<AllReduceAlgorithm>(algorithm);
  if (fixed > AllReduceAlgorithm::kTwoShotInPlace) return Bad("no such algorithm");
  if (fixed == AllReduceAlgorithm::kTwoShotInPlace && !is_mapped) return Bad("the in-place algorithm needs a tensor of this group (group.alloc), and one for its output");
  ChooseAllReduce(call, fixed, is_mapped);
  if (operation.parts != nullptr && is_apart) {
    call->output_tensor = output.tensor;
    operation.tensor += output.tensor->id << 16;
    operation.output_parts = &output.tensor->parts;
  }
  return Status::Ok();
}

// Of an allReduce across nodes; 0: by the table.
Status CommHandle::ChooseNetwork(int64_t algorithm, Operation* operation) const {
  if (algorithm != 0 && algorithm < kNetworkAlgorithms) return Bad("this algorithm is for groups on one node");
  const AlgorithmRow& row = table_.Choose(CollectiveOp::kAllReduce, false, operation->nbytes());
  operation->chunk_bytes = row.chunk_bytes;
  if (algorithm == 0) algorithm = row.algorithm;
  const auto chosen = static_cast<NetworkAlgorithm>(algorithm == 0 ? 0 : algorithm - kNetworkAlgorithms);
  if (chosen > NetworkAlgorithm::kTwoStep) return Bad("no such algorithm");
  operation->algorithm = static_cast<uint16_t>(chosen == NetworkAlgorithm::kAuto ? ChooseByWidth(layout_, *operation) : chosen);
  return Status::Ok();
}

// (op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets): data and output are a tensor's id, a typed array or
// undefined, offsets a BigUint64Array or undefined.
Status CommHandle::ReadCall(const Napi::CallbackInfo& info, Call* call) const {
  if (info.Length() < 9) return Bad("run takes (op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets)");
  for (size_t i : {size_t{0}, size_t{1}, size_t{4}, size_t{5}, size_t{6}, size_t{7}}) {
    if (!info[i].IsNumber()) return Bad("argument " + std::to_string(i) + " of run must be a number");
  }
  if (Status s = Usable(); !s.ok()) return s;
  call->timeout_ms = Int64(info[6]);
  if (call->timeout_ms < 1 || call->timeout_ms > INT32_MAX) return Bad("timeoutMs must be at least 1");
  return ReadGiven({Int64(info[0]), Int64(info[1]), Int64(info[4]), Int64(info[5]), Int64(info[7]), info[2], info[3], info[8]}, call);
}

Status CommHandle::ReadGiven(const Given& given, Call* call) const {
  Operation& operation = call->operation;
  const auto [op, dtype, root, algorithm_and_wire, reduce_op, data_value, output_value, offsets] = given;
  const int64_t algorithm = algorithm_and_wire & ~kQ8Wire;
  if (op < static_cast<int64_t>(CollectiveOp::kBarrier) || op > static_cast<int64_t>(CollectiveOp::kAllToAll) ||
      op == static_cast<int64_t>(CollectiveOp::kExchange)) {
    return Bad("no such operation");
  }
  if (!IsDType(dtype)) return Bad("no such dtype");
  if (reduce_op < 0 || reduce_op >= kReduceOps) return Bad("no such reduction");
  if (reduce_op >= static_cast<int64_t>(ReduceOp::kBand) && IsFloat(static_cast<DType>(dtype))) {
    return Bad(std::string(NameOf(static_cast<ReduceOp>(reduce_op))) + " is for integers, not for " + NameOf(static_cast<DType>(dtype)));
  }
  if (root < 0 || root >= world_size_) return Bad("root " + std::to_string(root) + " is not a rank of this group");
  if (algorithm < 0 || algorithm > UINT16_MAX) return Bad("no such algorithm");
  operation.op = static_cast<CollectiveOp>(op);
  operation.dtype = static_cast<DType>(dtype);
  operation.reduce_op = static_cast<ReduceOp>(reduce_op);
  operation.root = static_cast<int>(root);
  if ((algorithm_and_wire & kQ8Wire) != 0) {
    const bool is_sum = operation.reduce_op == ReduceOp::kSum || operation.reduce_op == ReduceOp::kAvg;
    if (operation.op != CollectiveOp::kAllReduce || !is_sum || !IsFloat(operation.dtype) || operation.dtype == DType::kF64) {
      return Bad("wire q8 is for an allReduce of f32, bf16 or f16, by sum or avg");
    }
    operation.wire = Wire::kQ8;
  }
  operation.history = history_;
  if (operation.op == CollectiveOp::kBarrier) {
    operation.chunk_bytes = table_.Choose(operation.op, false, 0).chunk_bytes;
    return Status::Ok();
  }

  Memory &data = call->data, &output = call->output;
  if (Status s = ReadMemory(data_value, operation.dtype, "data", &data); !s.ok()) return s;
  if (Status s = ReadMemory(output_value, operation.dtype, "output", &output); !s.ok()) return s;
  call->tensor = data.tensor;
  // Where the result goes over the data of an allToAll, others cannot read that any more; allReduce has an algorithm of its own for tensors.
  const bool is_overwritten = operation.op == CollectiveOp::kAllToAll && data.data == output.data;
  if (data.tensor != nullptr && operation.op != CollectiveOp::kAllReduce && !is_overwritten) operation.source = data.tensor->id;
  if (operation.op == CollectiveOp::kGather && output.tensor != nullptr) {
    operation.target = output.tensor->id;
    call->tensor = output.tensor;
  }
  switch (operation.op) {
    case CollectiveOp::kAllReduce:
    case CollectiveOp::kReduce:
    case CollectiveOp::kBroadcast: break;
    default: return ReadParts(offsets, data, output, call);
  }
  if (!data.is_given) return Bad(std::string(NameOf(operation.op)) + " needs data");
  operation.data = data.data;
  operation.count = data.count;
  if (operation.op != CollectiveOp::kBroadcast) return ReadReduction(data, output, algorithm, call);
  if (output.is_given) return Bad("broadcast takes no output");
  // Ranks may pass tensors here and arrays there.
  operation.chunk_bytes = table_.Choose(operation.op, false, operation.nbytes()).chunk_bytes;
  return Status::Ok();
}

// (numbers, values, timeoutMs). numbers: of each operation [op, dtype, root, algorithm, reduceOp, which of data, output and offsets it has: bits
// 1, 2, 4]; values: these, one after the other.
Status CommHandle::ReadBatch(const Napi::CallbackInfo& info, Call* call) const {
  constexpr size_t kNumbers = 6;
  if (info.Length() < 3 || !info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_int32_array || !info[1].IsArray() ||
      !info[2].IsNumber()) {
    return Bad("runBatch takes (numbers, values, timeoutMs)");
  }
  if (Status s = Usable(); !s.ok()) return s;
  call->timeout_ms = Int64(info[2]);
  if (call->timeout_ms < 1 || call->timeout_ms > INT32_MAX) return Bad("timeoutMs must be at least 1");
  const Napi::Int32Array numbers = info[0].As<Napi::Int32Array>();
  const Napi::Array values = info[1].As<Napi::Array>();
  const size_t count = numbers.ElementLength() / kNumbers;
  struct Range {
    const std::byte *begin, *end;
    bool is_written;
    size_t number;
  };
  std::vector<Range> ranges;
  std::vector<Operation> operations;
  call->calls.resize(count);
  const Napi::Value none = info.Env().Undefined();
  uint32_t next = 0;
  for (size_t i = 0; i < count; i++) {
    const int32_t* at = numbers.Data() + i * kNumbers;
    const auto value = [&](int bit) { return (at[5] & bit) != 0 ? values.Get(next++) : none; };
    const Napi::Value data_value = value(1), output_value = value(2), offsets = value(4);
    Call& one = call->calls[i];
    if (Status s = ReadGiven({at[0], at[1], at[2], at[3], at[4], data_value, output_value, offsets}, &one); !s.ok()) {
      return Bad("operation " + std::to_string(i) + " of the batch: " + s.message());
    }
    if (one.operation.nbytes() <= kInlineBytes) one.operation.source = one.operation.target = 0;  // as in RunSoon
    operations.push_back(one.operation);
    const bool is_broadcast_in = one.operation.op == CollectiveOp::kBroadcast && rank_ != one.operation.root;
    const bool is_in_place = one.operation.op == CollectiveOp::kAllReduce || (one.operation.op == CollectiveOp::kReduce && rank_ == one.operation.root);
    const auto range = [&](const Memory& memory, bool is_written) {
      const size_t nbytes = memory.count * static_cast<size_t>(ElementBytes(one.operation.dtype));
      if (memory.is_given && nbytes > 0) ranges.push_back({memory.data, memory.data + nbytes, is_written, i});
    };
    range(one.data, is_broadcast_in || (is_in_place && !one.output.is_given));
    range(one.output, true);
  }
  // Results are worked out together, so none may be the input of another, nor share its memory.
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < ranges.size(); i++) {
    for (size_t j = i + 1; j < ranges.size() && ranges[j].begin < ranges[i].end; j++) {
      if (ranges[i].number == ranges[j].number || !(ranges[i].is_written || ranges[j].is_written)) continue;
      return Bad("operations " + std::to_string(std::min(ranges[i].number, ranges[j].number)) + " and " +
                 std::to_string(std::max(ranges[i].number, ranges[j].number)) + " of the batch share memory that one of them writes");
    }
  }
  call->batch = std::make_shared<Batch>();
  PlanBatch(std::move(operations), world_size_, options_.slot_bytes, call->batch.get(), &call->operation);
  call->operation.history = history_;
  return Status::Ok();
}

}  // namespace tilerank
