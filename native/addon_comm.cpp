// Collectives for JavaScript: class Communicator (comm/comm_handle.h) and bindRankSocket. Arguments are unpacked here, a Status
// becomes an error; order is fixed on the calling thread, waiting that would hold it longer than 20 us is the group's thread's.
#include <algorithm>
#include <cstring>

#include "addon.h"
#include "comm/all_reduce.h"
#include "comm/comm_handle.h"
#include "kernels/dispatch.h"

namespace tilerank {

namespace {

// How long an asynchronous call may hold the event loop in the hope of ending at once: about what handing over costs.
constexpr int64_t kLookNs = 20'000;
// Above this, the work alone takes longer than that.
constexpr size_t kInlineBytes = 128 << 10;

Napi::Value Throw(Napi::Env env, const Status& status) {
  ToError(env, status).ThrowAsJavaScriptException();
  return env.Undefined();
}

Status Busy() {
  return Status(Code::kBusy, "an asynchronous operation of this group is still pending: await it before a ...Sync call");
}

Status Bad(const std::string& what) { return Status(Code::kInvalidArgument, what); }

// Reads fields of the options object; the first wrong one sticks.
struct Options {
  Napi::Object object;
  Status status;
  int64_t Integer(const char* key, int64_t lowest, int64_t highest) {
    const Napi::Value value = object.Get(key);
    const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1e300;
    if (number >= static_cast<double>(lowest) && number <= static_cast<double>(highest)) return static_cast<int64_t>(number);
    if (status.ok()) status = Bad(std::string("option ") + key + " must be an integer from " + std::to_string(lowest) + " to " + std::to_string(highest));
    return lowest;
  }
  std::string Text(const char* key) {
    const Napi::Value value = object.Get(key);
    if (value.IsString()) return value.As<Napi::String>().Utf8Value();
    if (status.ok()) status = Bad(std::string("option ") + key + " must be a string");
    return {};
  }
};

int64_t Int64(const Napi::Value& value) { return value.As<Napi::Number>().Int64Value(); }

bool IsDType(int64_t dtype) { return dtype >= 0 && dtype < kDTypes; }

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

}  // namespace

Napi::Function CommHandle::Define(Napi::Env env, CommState* state) {
  return DefineClass(env, "Communicator",
                     {InstanceMethod("connect", &CommHandle::Connect), InstanceMethod("run", &CommHandle::Run),
                      InstanceMethod("runSync", &CommHandle::RunSync),
                      InstanceMethod("allReduceTensorSync", &CommHandle::AllReduceTensorSync),
                      InstanceMethod("alloc", &CommHandle::Alloc),
                      InstanceMethod("abort", &CommHandle::AbortJs), InstanceMethod("close", &CommHandle::CloseJs),
                      InstanceMethod("giveUp", &CommHandle::GiveUp), InstanceMethod("recording", &CommHandle::Recording), InstanceMethod("timeAllReduce", &CommHandle::TimeAllReduce)},
                     state);
}

/// new Communicator({ nonce, rank, worldSize, socketFd, lanes, slotBytes, spinUs, chunkBytes, timeoutMs, terms, nodes }).
/// A worldSize of 1 needs no nonce. The group's number is taken here: groups are told apart by the order of these calls.
CommHandle::CommHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<CommHandle>(info), state_(static_cast<CommState*>(info.Data())) {
  const Napi::Env env = info.Env();
  if (info.Length() < 1 || !info[0].IsObject()) {
    Throw(env, Bad("Communicator takes one object of options"));
    return;
  }
  Options given{info[0].As<Napi::Object>(), {}};
  job_.world_size = static_cast<int>(given.Integer("worldSize", 1, kMaxWorldSize));
  job_.rank = static_cast<int>(given.Integer("rank", 0, kMaxWorldSize - 1));
  job_.nonce = given.Text("nonce");
  job_.socket_fd = static_cast<int>(given.Integer("socketFd", -1, INT32_MAX));
  options_.lanes = static_cast<int>(given.Integer("lanes", 1, 4096));
  options_.slot_bytes = static_cast<size_t>(given.Integer("slotBytes", 64, int64_t{1} << 40));
  options_.spin_us = static_cast<int>(given.Integer("spinUs", -1, 1'000'000));
  options_.terms = given.Text("terms");
  chunk_bytes_ = static_cast<size_t>(given.Integer("chunkBytes", 0, int64_t{1} << 40));
  timeout_ms_ = given.Integer("timeoutMs", 1, INT32_MAX);
  if (const Napi::Value nodes = given.object.Get("nodes"); nodes.IsArray()) {
    const Napi::Array list = nodes.As<Napi::Array>();
    for (uint32_t i = 0; i < list.Length(); i++) options_.nodes.push_back(list.Get(i).ToNumber().Int32Value());
  }
  if (given.status.ok() && job_.rank >= job_.world_size) {
    given.status = Bad("rank " + std::to_string(job_.rank) + " is not below the world size " + std::to_string(job_.world_size));
  }
  if (given.status.ok() && options_.terms.size() > 100) given.status = Bad("option terms is longer than 100 characters");
  if (chunk_bytes_ == 0) chunk_bytes_ = ChooseChunkBytes(options_.slot_bytes);
  if (given.status.ok() && (chunk_bytes_ % 64 != 0 || chunk_bytes_ > options_.slot_bytes)) {
    given.status = Bad("option chunkBytes must be a multiple of 64 and at most slotBytes (" + std::to_string(options_.slot_bytes) + ")");
  }
  if (!given.status.ok()) {
    Throw(env, given.status);
    return;
  }
  const Kernels* kernels = nullptr;
  if (Status s = SelectKernels("", &kernels); !s.ok()) {
    Throw(env, s);
    return;
  }
  kernels_ = kernels;
  if (job_.world_size > 1) {
    std::shared_ptr<Rendezvous>& known = state_->rendezvous[job_.nonce + "/" + std::to_string(job_.rank)];
    if (known == nullptr) {
      if (Status s = Rendezvous::Create(job_, &known); !s.ok()) {
        state_->rendezvous.erase(job_.nonce + "/" + std::to_string(job_.rank));
        Throw(env, s);
        return;
      }
    } else if (known->config().world_size != job_.world_size) {
      Throw(env, Bad("this process joined the job with " + std::to_string(known->config().world_size) + " ranks before, not " +
                     std::to_string(job_.world_size)));
      return;
    }
    rendezvous_ = known;
    group_ = rendezvous_->NextGroup();
  }
  settler_ = Settler::New(env, "tilerank.Communicator", 0, 1);
  settler_.Unref(env);
  has_settler_ = true;
  // After the settler's own hook, so that it runs before it: a process that ends without close() still joins the thread.
  napi_add_env_cleanup_hook(env, &CommHandle::AtExit, this);
  thread_ = std::thread([this] { ThreadMain(); });
}

CommHandle::~CommHandle() {
  if (!has_settler_) return;
  napi_remove_env_cleanup_hook(Env(), &CommHandle::AtExit, this);
  Shutdown();
}

// Ends the thread and tells the peers. Uses no JavaScript: it also runs while the environment goes down.
void CommHandle::Shutdown() {
  if (!has_settler_) return;
  is_cancelled_->store(true);
  if (communicator_ != nullptr) communicator_->Stop();
  {
    std::lock_guard lock(mutex_);
    is_quitting_ = true;
  }
  posted_.notify_one();
  if (thread_.joinable()) thread_.join();
  settler_.Release();
  has_settler_ = false;
  connecting_.reset();
  if (communicator_ != nullptr) communicator_->Close();
  communicator_.reset();
  tensors_.clear();
  last_tensor_.reset();
  is_closed_ = true;
}

void CommHandle::ThreadMain() {
  for (;;) {
    std::unique_ptr<Job> job;
    {
      std::unique_lock lock(mutex_);
      posted_.wait(lock, [this] { return is_quitting_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job->result = job->work();
    job->work = nullptr;
    Job* raw = job.release();
    if (settler_.NonBlockingCall(raw) != napi_ok) {
      for (Napi::ObjectReference& kept : raw->kept) kept.SuppressDestruct();
      delete raw;
    }
  }
}

Napi::Value CommHandle::Enqueue(Napi::Env env, std::unique_ptr<Job> job) {
  napi_value promise;
  if (napi_create_promise(env, &job->deferred, &promise) != napi_ok) return Throw(env, Status(Code::kInternal, "a promise could not be made"));
  job->owner = this;
  if (unresolved_++ == 0) {
    Ref();  // neither collected nor outlived by the event loop while a promise is open
    settler_.Ref(env);
  }
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  posted_.notify_one();
  return Napi::Value(env, promise);
}

void CommHandle::Settle(Napi::Env env, Napi::Function, std::nullptr_t*, Job* raw) {
  std::unique_ptr<Job> job(raw);
  if (env == nullptr) {  // the environment is gone, and with it the promise
    for (Napi::ObjectReference& kept : job->kept) kept.SuppressDestruct();
    return;
  }
  CommHandle& self = *job->owner;
  Napi::HandleScope scope(env);
  if (job->is_connect && job->result.ok()) {
    self.communicator_ = std::move(self.connecting_);
    self.communicator_->OnFailure([flag = self.is_cancelled_] { flag->store(true); });
    self.context_ = {self.communicator_.get(), self.kernels_->reduce, self.kernels_->copy, 0};
  }
  if (job->result.ok()) {
    Napi::Value value = env.Undefined();
    if (job->is_connect) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("group", self.group_);
      object.Set("warning", self.warning_);
      object.Set("spinUs", self.communicator_->spin_us());
      object.Set("arenaBytes", static_cast<double>(self.communicator_->arena_bytes()));
      value = object;
    }
    napi_resolve_deferred(env, job->deferred, value);
  } else {
    napi_reject_deferred(env, job->deferred, ToError(env, job->result).Value());
  }
  job->kept.clear();
  if (--self.unresolved_ == 0 && self.has_settler_) {
    self.settler_.Unref(env);
    if (self.is_closed_) {
      napi_remove_env_cleanup_hook(env, &CommHandle::AtExit, &self);
      self.Shutdown();
    }
    self.Unref();
  }
}

/// connect() -> Promise<{ group, warning, spinUs, arenaBytes }>: resolves when every rank has come.
Napi::Value CommHandle::Connect(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (is_closed_ || !has_settler_) return Throw(env, Status(Code::kClosed, "the group has been closed"));
  if (communicator_ != nullptr || unresolved_ > 0) return Throw(env, Bad("connect() is called once"));
  auto job = std::make_unique<Job>();
  job->is_connect = true;
  job->work = [this]() -> Status {
    if (rendezvous_ == nullptr) return CreateSoloGroup(options_, &connecting_);
    GroupOptions options = options_;
    options.terms = "chunks of " + std::to_string(chunk_bytes_) + (options.terms.empty() ? "" : ", " + options.terms);
    return ConnectGroup(*rendezvous_, group_, options, Deadline::AfterMs(timeout_ms_), *is_cancelled_, &connecting_, &warning_);
  };
  return Enqueue(env, std::move(job));
}

Status CommHandle::Usable() const {
  if (is_closed_) return Status(Code::kClosed, "the group has been closed");
  if (communicator_ == nullptr) return Status(Code::kInvalidArgument, "the group is not connected yet");
  if (communicator_->failed()) return communicator_->failure();
  return Status::Ok();
}

Status CommHandle::ReadMemory(const Napi::Value& value, DType dtype, const char* name, Memory* memory) const {
  if (value.IsUndefined()) return Status::Ok();
  memory->is_given = true;
  if (value.IsNumber()) {
    const auto found = tensors_.find(value.As<Napi::Number>().Uint32Value());
    if (found == tensors_.end()) return Bad(std::string(name) + " is not a tensor of this group");
    memory->tensor = found->second;
    if (memory->tensor->dtype != dtype) return Bad("dtype is not the tensor's");
    memory->data = memory->tensor->parts[static_cast<size_t>(job_.rank)];
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

// Of the operations on parts: which memory is the whole array and which a part, whether they fit, and whether they lie apart.
Status CommHandle::ReadParts(const Napi::Value& offsets, const Memory& data, const Memory& output, Call* call) const {
  Operation& operation = call->operation;
  const auto ranks = static_cast<size_t>(job_.world_size);
  const bool is_root = operation.root == job_.rank;
  const bool is_data_part = operation.op == CollectiveOp::kGather || operation.op == CollectiveOp::kAllGather;
  const bool is_output_part = operation.op == CollectiveOp::kScatter || operation.op == CollectiveOp::kReduceScatter;
  const bool has_data = is_root || operation.op != CollectiveOp::kScatter;
  const bool has_output = is_root || operation.op != CollectiveOp::kGather;
  const std::string name = NameOf(operation.op);
  if (has_data != data.is_given) return Bad(name + (has_data ? " needs data" : " takes data on its root only"));
  if (has_output != output.is_given) return Bad(name + (has_output ? " needs an output" : " takes an output on its root only"));
  if (!is_data_part && chunk_bytes_ < ranks * 64) {
    return Bad(name + " of " + std::to_string(ranks) + " ranks needs chunks of at least " + std::to_string(64 * ranks) + " bytes; this group's have " +
               std::to_string(chunk_bytes_));
  }
  if (offsets.IsTypedArray() && offsets.As<Napi::TypedArray>().TypedArrayType() == napi_biguint64_array) {
    const Napi::BigUint64Array list = offsets.As<Napi::BigUint64Array>();
    if (list.ElementLength() != ranks + 1) return Bad("there must be a count for each rank");
    call->offsets = std::make_shared<std::vector<uint64_t>>(list.Data(), list.Data() + list.ElementLength());
    uint64_t digest = 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < ranks; i++) {
      const uint64_t count = (*call->offsets)[i + 1] - (*call->offsets)[i];
      if ((*call->offsets)[0] != 0 || count > uint64_t{1} << 48 || (*call->offsets)[i + 1] > uint64_t{1} << 48) return Bad("counts are out of range");
      digest = (digest ^ count) * 0xbf58476d1ce4e5b9ull;
      digest ^= digest >> 31;
    }
    operation.offsets = call->offsets->data();
    operation.layout = static_cast<uint32_t>(digest >> 32);
    operation.count = call->offsets->back();
  } else if (!is_data_part && !is_output_part) {
    if (data.count % ranks != 0) return Bad(name + " takes as many elements for each of the " + std::to_string(ranks) + " ranks, not " + std::to_string(data.count) + " in all");
    operation.count = data.count;
  } else {
    operation.count = (is_data_part ? data.count : output.count) * ranks;
  }
  const Part own = PartOf(operation, job_.rank, job_.world_size);
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
    const std::byte *data_end = data.data + data.count * element, *output_end = output.data + output.count * element;
    if (!is_in_place && data.data < output_end && output.data < data_end) return Bad("data overlaps output elsewhere than in this rank's own part");
  }
  operation.data = data.data;
  operation.output = output.data;
  return Status::Ok();
}

// (op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets): data and output are a tensor's id, a typed array or
// undefined, offsets a BigUint64Array or undefined.
Status CommHandle::ReadCall(const Napi::CallbackInfo& info, Call* call) {
  if (info.Length() < 9) return Bad("run takes (op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets)");
  for (size_t i : {size_t{0}, size_t{1}, size_t{4}, size_t{5}, size_t{6}, size_t{7}}) {
    if (!info[i].IsNumber()) return Bad("argument " + std::to_string(i) + " of run must be a number");
  }
  if (Status s = Usable(); !s.ok()) return s;
  Operation& operation = call->operation;
  const int64_t op = Int64(info[0]), dtype = Int64(info[1]), root = Int64(info[4]), algorithm = Int64(info[5]), reduce_op = Int64(info[7]);
  if (op < static_cast<int64_t>(CollectiveOp::kBarrier) || op > static_cast<int64_t>(CollectiveOp::kAllToAll) ||
      op == static_cast<int64_t>(CollectiveOp::kExchange)) {
    return Bad("no such operation");
  }
  if (!IsDType(dtype)) return Bad("no such dtype");
  if (reduce_op < 0 || reduce_op >= kReduceOps) return Bad("no such reduction");
  if (reduce_op >= static_cast<int64_t>(ReduceOp::kBand) && IsFloat(static_cast<DType>(dtype))) {
    return Bad(std::string(NameOf(static_cast<ReduceOp>(reduce_op))) + " is for integers, not for " + NameOf(static_cast<DType>(dtype)));
  }
  if (root < 0 || root >= job_.world_size) return Bad("root " + std::to_string(root) + " is not a rank of this group");
  if (algorithm < 0 || algorithm > static_cast<int64_t>(AllReduceAlgorithm::kTwoShotInPlace)) return Bad("no such algorithm");
  call->timeout_ms = Int64(info[6]);
  if (call->timeout_ms < 1 || call->timeout_ms > INT32_MAX) return Bad("timeoutMs must be at least 1");
  operation.op = static_cast<CollectiveOp>(op);
  operation.dtype = static_cast<DType>(dtype);
  operation.reduce_op = static_cast<ReduceOp>(reduce_op);
  operation.root = static_cast<int>(root);
  operation.chunk_bytes = chunk_bytes_;
  operation.history = history_;
  if (operation.op == CollectiveOp::kBarrier) return Status::Ok();

  Memory data, output;
  if (Status s = ReadMemory(info[2], operation.dtype, "data", &data); !s.ok()) return s;
  if (Status s = ReadMemory(info[3], operation.dtype, "output", &output); !s.ok()) return s;
  call->tensor = data.tensor;
  switch (operation.op) {
    case CollectiveOp::kAllReduce:
    case CollectiveOp::kReduce:
    case CollectiveOp::kBroadcast: break;
    default: return ReadParts(info[8], data, output, call);
  }
  if (!data.is_given) return Bad(std::string(NameOf(operation.op)) + " needs data");
  operation.data = data.data;
  operation.count = data.count;
  if (operation.op == CollectiveOp::kAllReduce) {
    AllReduceAlgorithm chosen = static_cast<AllReduceAlgorithm>(algorithm);
    if (chosen == AllReduceAlgorithm::kAuto) chosen = ChooseAllReduce(job_.world_size, operation.nbytes(), call->tensor != nullptr);
    if (chosen == AllReduceAlgorithm::kTwoShotInPlace) {
      if (call->tensor == nullptr) return Bad("the in-place algorithm needs a tensor of this group (group.alloc)");
      operation.tensor = call->tensor->id;
      operation.parts = &call->tensor->parts;
    }
    operation.algorithm = static_cast<uint16_t>(chosen);
  }
  return Status::Ok();
}

// The peers' parts of a tensor are fetched by its first use, so that alloc waits for nobody.
Status CommHandle::Complete(GroupTensor& tensor, const Deadline& deadline) {
  std::vector<Rendezvous::Answer> answers;
  Status status = rendezvous_->Collect(tensor.offer, deadline, *is_cancelled_, &answers);
  for (int peer = 0; peer < job_.world_size && status.ok(); peer++) {
    if (peer == job_.rank) continue;
    const size_t index = static_cast<size_t>(peer);
    status = Arena::Receive(answers[index].arena, tensor.offer.nbytes, "a tensor of rank " + std::to_string(peer), &tensor.arenas[index]);
    tensor.parts[index] = tensor.arenas[index].data();
  }
  if (!status.ok()) {
    communicator_->Abort(status);
    return communicator_->failure();
  }
  tensor.is_complete = true;
  return Status::Ok();
}

Status CommHandle::Execute(const Call& call, bool has_started, const Deadline& deadline) {
  if (call.tensor != nullptr && !call.tensor->is_complete) {
    if (Status s = Complete(*call.tensor, deadline); !s.ok()) return s;
  }
  return Finish(context_, call.operation, has_started, deadline);
}

/// allReduceTensorSync(id, timeoutMs): runSync for the commonest call, with two arguments to unpack instead of nine.
Napi::Value CommHandle::AllReduceTensorSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  uint32_t id = 0;
  int64_t timeout_ms = 0;
  if (info.Length() < 2 || napi_get_value_uint32(env, info[0], &id) != napi_ok || napi_get_value_int64(env, info[1], &timeout_ms) != napi_ok ||
      timeout_ms < 1 || timeout_ms > INT32_MAX) {
    return Throw(env, Bad("allReduceTensorSync takes (id, timeoutMs)"));
  }
  if (Status s = Usable(); !s.ok()) [[unlikely]] return Throw(env, s);
  if (unresolved_ > 0) [[unlikely]] return Throw(env, Busy());
  if (last_tensor_ == nullptr || last_tensor_->id != id) {
    const auto found = tensors_.find(id);
    if (found == tensors_.end()) return Throw(env, Bad("data is not a tensor of this group"));
    last_tensor_ = found->second;
  }
  Call call;
  call.tensor = last_tensor_;
  Operation& operation = call.operation;
  operation.op = CollectiveOp::kAllReduce;
  operation.dtype = last_tensor_->dtype;
  operation.count = last_tensor_->count;
  operation.data = last_tensor_->parts[static_cast<size_t>(job_.rank)];
  operation.chunk_bytes = chunk_bytes_;
  operation.history = history_;
  const AllReduceAlgorithm chosen = ChooseAllReduce(job_.world_size, operation.nbytes(), true);
  if (chosen == AllReduceAlgorithm::kTwoShotInPlace) {
    operation.tensor = id;
    operation.parts = &last_tensor_->parts;
  }
  operation.algorithm = static_cast<uint16_t>(chosen);
  return RunNow(env, call, timeout_ms);
}

// Takes the sequence, and blocks until the operation is done.
Napi::Value CommHandle::RunNow(Napi::Env env, Call& call, int64_t timeout_ms) {
  call.operation.sequence = next_sequence_;
  next_sequence_ += SequencesOf(call.operation, job_.world_size);
  history_ = HistoryAfter(call.operation);
  const Deadline deadline = Deadline::AfterMs(timeout_ms);
  const bool is_complete = call.tensor == nullptr || call.tensor->is_complete;
  const bool has_started = is_complete && TryStart(context_, call.operation);
  if (Status s = Execute(call, has_started, deadline); !s.ok()) [[unlikely]] return Throw(env, s);
  return {};  // undefined, without asking the engine for it
}

/// runSync(op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets): blocks the caller until it is done.
Napi::Value CommHandle::RunSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Call call;
  if (Status s = ReadCall(info, &call); !s.ok()) [[unlikely]] return Throw(env, s);
  if (unresolved_ > 0) [[unlikely]] return Throw(env, Busy());
  return RunNow(env, call, call.timeout_ms);
}

/// run(...), as runSync: undefined when it ended at once, else a promise.
Napi::Value CommHandle::Run(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Call call;
  if (Status s = ReadCall(info, &call); !s.ok()) return Throw(env, s);
  call.operation.sequence = next_sequence_;
  next_sequence_ += SequencesOf(call.operation, job_.world_size);
  history_ = HistoryAfter(call.operation);
  Deadline deadline = Deadline::AfterMs(call.timeout_ms);
  bool has_started = false;
  // With others pending, this one's turn comes on the thread, after them; so does the first use of a tensor.
  if (unresolved_ == 0 && (call.tensor == nullptr || call.tensor->is_complete)) {
    has_started = TryStart(context_, call.operation);
    // Algorithms with waits in their middle are the thread's; of the one in place the middle is done below.
    const bool is_in_place = static_cast<AllReduceAlgorithm>(call.operation.algorithm) == AllReduceAlgorithm::kTwoShotInPlace;
    const bool has_one_wait = is_in_place || SequencesOf(call.operation, job_.world_size) == 1;
    if (has_started && call.operation.nbytes() <= kInlineBytes && has_one_wait) {
      const int64_t look_end = NowNs() + kLookNs;
      const auto look = [&](auto is_ready) {
        while (!is_ready()) {
          if (communicator_->spin_us() == 0 || NowNs() >= look_end) return false;
          Pause();
        }
        return true;
      };
      bool is_ready = look([&] { return IsReady(context_, call.operation); });
      if (is_ready && is_in_place) {
        if (Status s = AllReduceSlice(context_, call.operation, deadline); !s.ok()) return Throw(env, s);
        call.operation.is_reduced = true;
        is_ready = look([&] { return communicator_->IsReady(0, call.operation.sequence + 1); });
      }
      if (is_ready) {
        if (Status s = Execute(call, true, deadline); !s.ok()) return Throw(env, s);
        return env.Undefined();
      }
    }
  }
  deadline.ElapsedNs(NowNs());  // the time counts from the call
  auto job = std::make_unique<Job>();
  for (size_t i : {size_t{2}, size_t{3}}) {
    if (info[i].IsObject()) job->kept.push_back(Napi::Persistent(info[i].As<Napi::Object>()));
  }
  job->work = [this, call, has_started, deadline] { return Execute(call, has_started, deadline); };
  return Enqueue(env, std::move(job));
}

/// alloc(dtype, count, description) -> { id, buffer }. Every rank calls it with the same arguments; it waits for nobody.
Napi::Value CommHandle::Alloc(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 3 || !info[0].IsNumber() || !info[1].IsNumber() || !info[2].IsString()) {
    return Throw(env, Bad("alloc takes (dtype, count, description)"));
  }
  if (Status s = Usable(); !s.ok()) return Throw(env, s);
  const int64_t dtype = Int64(info[0]), count = Int64(info[1]);
  if (!IsDType(dtype)) return Throw(env, Bad("no such dtype"));
  if (count < 0 || count > int64_t{1} << 40) return Throw(env, Bad("a tensor has 0 to 2^40 elements, not " + std::to_string(count)));
  auto tensor = std::make_shared<GroupTensor>();
  tensor->id = next_tensor_;
  tensor->dtype = static_cast<DType>(dtype);
  tensor->count = static_cast<size_t>(count);
  const size_t nbytes = tensor->count * static_cast<size_t>(ElementBytes(tensor->dtype));
  tensor->offer.group = group_;
  tensor->offer.arena = tensor->id;
  tensor->offer.nbytes = std::max(nbytes, size_t{1});
  tensor->offer.terms = "tensor " + std::to_string(tensor->id) + " of " + info[2].As<Napi::String>().Utf8Value().substr(0, 100);
  tensor->offer.operation = "alloc";
  tensor->arenas.resize(static_cast<size_t>(job_.world_size));
  tensor->parts.resize(static_cast<size_t>(job_.world_size));
  Arena& own = tensor->arenas[static_cast<size_t>(job_.rank)];
  Status status;
  if (job_.world_size == 1) {
    status = Arena::CreateLocal(tensor->offer.nbytes, &own);
    tensor->is_complete = true;
  } else {
    UniqueFd fd;
    std::string warning;  // the communicator's arena gave the same one
    status = Arena::Create({tensor->offer.nbytes, tensor->offer.terms, options_.nodes}, &own, &fd, &warning);
    if (status.ok()) {
      next_tensor_++;
      status = rendezvous_->Send(tensor->offer, fd.get(), Deadline::AfterMs(timeout_ms_), *is_cancelled_);
    }
  }
  if (!status.ok()) return Throw(env, communicator_->failed() ? communicator_->failure() : status);
  if (job_.world_size == 1) next_tensor_++;
  tensor->parts[static_cast<size_t>(job_.rank)] = own.data();

  Napi::ArrayBuffer buffer;
  if (nbytes == 0) {
    buffer = Napi::ArrayBuffer::New(env, 0);
  } else {
    // The view keeps the mapping, so that nothing dangles however long JavaScript holds it; close() detaches it.
    auto* keep = new std::shared_ptr<GroupTensor>(tensor);
    napi_value value;
    const napi_status made = napi_create_external_arraybuffer(
        env, own.data(), nbytes, [](napi_env, void*, void* hint) { delete static_cast<std::shared_ptr<GroupTensor>*>(hint); }, keep, &value);
    if (made != napi_ok) {
      delete keep;
      return Throw(env, Status(Code::kUnsupported, "this runtime forbids ArrayBuffers over shared memory: use Node.js itself, or plain typed arrays"));
    }
    buffer = Napi::ArrayBuffer(env, value);
    views_.push_back(Napi::Persistent(buffer));
  }
  tensors_.emplace(tensor->id, tensor);
  Napi::Object result = Napi::Object::New(env);
  result.Set("id", tensor->id);
  result.Set("buffer", buffer);
  return result;
}

/// abort(reason): breaks the group here and, as ERR_ABORTED, on all peers.
Napi::Value CommHandle::AbortJs(const Napi::CallbackInfo& info) {
  const std::string reason = info.Length() > 0 && info[0].IsString() ? info[0].As<Napi::String>().Utf8Value() : "no reason was given";
  is_cancelled_->store(true);  // a connect that waits gives up
  if (communicator_ != nullptr) {
    communicator_->Abort(Status(Code::kAborted, "rank " + std::to_string(job_.rank) + " aborted the group: " + reason).Number("rank", job_.rank));
  }
  return info.Env().Undefined();
}

/// close(): detaches all views, tells the peers, unmaps. Promises that are open settle first where the caller awaits them.
Napi::Value CommHandle::CloseJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!has_settler_ || is_closed_) return env.Undefined();
  is_closed_ = true;
  for (Napi::Reference<Napi::ArrayBuffer>& view : views_) {
    Napi::ArrayBuffer buffer = view.Value();
    if (!buffer.IsEmpty() && !buffer.IsDetached()) buffer.Detach();
  }
  views_.clear();
  const bool has_pending = unresolved_ > 0;
  if (has_pending) {
    // The thread's last settlements still arrive; only then may the object go.
    is_cancelled_->store(true);
    if (communicator_ != nullptr) communicator_->Stop();
    return env.Undefined();
  }
  napi_remove_env_cleanup_hook(env, &CommHandle::AtExit, this);
  Shutdown();
  return env.Undefined();
}

/// giveUp(rank, waitedMs): breaks the group here and on all peers, as ERR_TIMEOUT of that rank.
Napi::Value CommHandle::GiveUp(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 2 || !info[0].IsNumber() || !info[1].IsNumber()) return Throw(env, Bad("giveUp takes (rank, waitedMs)"));
  const int64_t late = Int64(info[0]);
  if (late < 0 || late >= job_.world_size || late == job_.rank) return Throw(env, Bad("giveUp is about another rank of the group"));
  if (communicator_ != nullptr) communicator_->GiveUp(static_cast<int>(late), Int64(info[1]));
  return env.Undefined();
}

/// recording(limit) -> [{ rank, group, pid, rows }]: the last operations of every rank, also of those that are dead.
Napi::Value CommHandle::Recording(const Napi::CallbackInfo& info) {
  const size_t limit = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().Uint32Value() : kRecords;
  std::vector<RankRecording> all;
  if (communicator_ != nullptr) all = communicator_->Recording(limit);
  for (RankRecording& one : all) one.group = group_;
  return ToArray(info.Env(), all);
}

/// timeAllReduce(dtype, count, samples, startedUs) -> Float64Array of microseconds: how the runner uses the slots. Each sample
/// rewrites this rank's slot, then: publish, await, sum all slots into private memory. Checked after the last sample.
Napi::Value CommHandle::TimeAllReduce(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 3 || !info[0].IsNumber() || !info[1].IsNumber() || !info[2].IsNumber()) {
    return Throw(env, Bad("timeAllReduce takes (dtype, count, samples)"));
  }
  if (Status s = Usable(); !s.ok()) return Throw(env, s);
  if (unresolved_ > 0) return Throw(env, Busy());
  const DType dtype = static_cast<DType>(Int64(info[0]));
  const int64_t count = Int64(info[1]), samples = Int64(info[2]);
  if ((dtype != DType::kF32 && dtype != DType::kBf16) || count < 1 || samples < 1 || samples > 10'000'000) {
    return Throw(env, Bad("dtype, count or samples are out of range"));
  }
  const size_t nbytes = static_cast<size_t>(count) * static_cast<size_t>(ElementBytes(dtype));
  Communicator& comm = *communicator_;
  if (nbytes > comm.slot_bytes()) return Throw(env, Bad("the slots of this group hold " + std::to_string(comm.slot_bytes()) + " bytes"));
  Arena output;
  if (Status s = Arena::CreateLocal(nbytes, &output); !s.ok()) return Throw(env, s);
  Napi::Float64Array times = Napi::Float64Array::New(env, static_cast<size_t>(samples));
  double* us = times.Data();
  OpTag tag;
  tag.op = CollectiveOp::kAllReduce;
  tag.dtype = dtype;
  tag.count = static_cast<uint64_t>(count);
  const void* sources[kMaxWorldSize];
  // Small integers, exact in both dtypes: element i of sample k is (i + k + rank) % 8.
  uint8_t pattern[16 * 4 * 2];
  for (int64_t sample = 0; sample < samples; sample++) {
    const uint64_t sequence = next_sequence_++;
    const Deadline deadline = Deadline::AfterMs(timeout_ms_);
    if (Status s = comm.Acquire(0, sequence, deadline); !s.ok()) return Throw(env, s);
    for (int i = 0; i < 16; i++) {
      const float value = static_cast<float>((i + sample + comm.rank()) % 8);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::kF32) std::memcpy(pattern + 4 * i, &bits, 4);
      else std::memcpy(pattern + 2 * i, &half, 2);
    }
    const size_t period = dtype == DType::kF32 ? 64 : 32;
    std::memcpy(pattern + period, pattern, std::min(period, size_t{64}));
    std::byte* slot = comm.Slot(comm.rank(), sequence);
    for (size_t at = 0; at < nbytes; at += 64) std::memcpy(slot + at, pattern, std::min<size_t>(64, nbytes - at));
    const int64_t start = NowNs();
    comm.Publish(0, sequence, tag);
    if (Status s = comm.Await(0, sequence, tag, deadline); !s.ok()) return Throw(env, s);
    for (int rank = 0; rank < comm.world_size(); rank++) sources[rank] = comm.Slot(rank, sequence);
    kernels_->reduce(output.data(), sources, comm.world_size(), dtype, ReduceOp::kSum, static_cast<size_t>(count));
    us[sample] = static_cast<double>(NowNs() - start) / 1e3;
  }
  for (int64_t i = 0; i < count; i++) {
    float expected = 0, actual;
    for (int rank = 0; rank < comm.world_size(); rank++) expected += static_cast<float>((i % 16 + samples - 1 + rank) % 8);
    uint32_t bits = 0;
    if (dtype == DType::kF32) {
      std::memcpy(&bits, output.data() + 4 * i, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, output.data() + 2 * i, 2);
      bits = static_cast<uint32_t>(half) << 16;
    }
    std::memcpy(&actual, &bits, sizeof actual);
    if (actual != expected) return Throw(env, Status(Code::kInternal, "a timed allReduce gave a wrong sum at element " + std::to_string(i)));
  }
  return times;
}

/// bindRankSocket(nonce, rank) -> descriptor, close-on-exec: for the launcher, which hands it to the rank as an inherited one.
static Napi::Value BindRankSocketJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 2 || !info[0].IsString() || !info[1].IsNumber()) return Throw(env, Bad("bindRankSocket takes (nonce, rank)"));
  UniqueFd fd;
  if (Status s = BindRankSocket(info[0].As<Napi::String>().Utf8Value(), info[1].As<Napi::Number>().Int32Value(), &fd); !s.ok()) return Throw(env, s);
  return Napi::Number::New(env, fd.Release());
}

void RegisterComm(Napi::Env env, Napi::Object exports) {
  auto* state = new CommState();
  exports.Set("Communicator", CommHandle::Define(env, state));
  exports.Set("bindRankSocket", Napi::Function::New(env, BindRankSocketJs, "bindRankSocket"));
  napi_add_env_cleanup_hook(env, [](void* data) { delete static_cast<CommState*>(data); }, state);
}

}  // namespace tilerank
