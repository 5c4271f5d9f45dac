// Collectives for JavaScript: class Communicator (comm/comm_handle.h) and bindRankSocket. Arguments are unpacked here, a Status
// becomes an error; order is fixed on the calling thread, waiting that would hold it longer than 20 us is the group's thread's.
#include <algorithm>
#include <cstring>

#include "addon.h"
#include "addon_call.h"
#include "addon_mailbox.h"
#include "comm/all_reduce.h"
#include "comm/comm_handle.h"
#include "comm/renewal.h"
#include "kernels/dispatch.h"

namespace tilerank {

namespace {

Status Busy() {
  return Status(Code::kBusy, "an asynchronous operation of this group is still pending: await it before a ...Sync call");
}

/// Of CommState's table.
std::string JobKey(const std::string& nonce, int rank) { return nonce + "/" + std::to_string(rank); }

}  // namespace

Napi::Function CommHandle::Define(Napi::Env env, CommState* state) {
  return DefineClass(env, "Communicator",
                     {InstanceMethod("connect", &CommHandle::Connect), InstanceMethod("run", &CommHandle::Run),
                      InstanceMethod("runSync", &CommHandle::RunSync),
                      InstanceMethod("plan", &CommHandle::MakePlan),
                      InstanceMethod("alloc", &CommHandle::Alloc),
                      InstanceMethod("abort", &CommHandle::AbortJs), InstanceMethod("close", &CommHandle::CloseJs),
                      InstanceMethod("giveUp", &CommHandle::GiveUp), InstanceMethod("recording", &CommHandle::Recording), InstanceMethod("timeAllReduce", &CommHandle::TimeAllReduce),
                      InstanceMethod("runBatch", &CommHandle::RunBatch), InstanceMethod("runBatchSync", &CommHandle::RunBatchSync),
                      InstanceMethod("message", &CommHandle::Message), InstanceMethod("messageSync", &CommHandle::MessageSync),
                      InstanceMethod("sendRecv", &CommHandle::SendRecv), InstanceMethod("sendRecvSync", &CommHandle::SendRecvSync),
                      InstanceMethod("hasFailed", &CommHandle::HasFailed), InstanceMethod("statistics", &CommHandle::StatisticsJs), InstanceMethod("traced", &CommHandle::Traced),
                      InstanceMethod("nextGroup", &CommHandle::NextGroup), InstanceMethod("renew", &CommHandle::Renew)},
                     state);
}

/// new Communicator({ nonce, rank, worldSize, socketFd, lanes, slotBytes, spinUs, table, timeoutMs, terms, nodes, group, members, layout, mailbox,
/// hasLatency, isTraced, parent, operation, isConfirmed }).
/// rank and worldSize are the job's. A worldSize of 1 needs no nonce. group: its number, or -1: the next one, so that groups are told apart by
/// the order of these calls. members: [size] the job's rank of each rank of the group; empty: all. layout: [nodes][ranks of the group];
/// empty: all on this node. mailbox: where there are several nodes. parent: the Communicator of whose ranks this group is made, or undefined.
/// operation: for messages. isConfirmed: the group stands on all ranks, or on none.
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
  timeout_ms_ = given.Integer("timeoutMs", 1, INT32_MAX);
  if (const Napi::Value nodes = given.object.Get("nodes"); nodes.IsArray()) {
    const Napi::Array list = nodes.As<Napi::Array>();
    for (uint32_t i = 0; i < list.Length(); i++) options_.nodes.push_back(list.Get(i).ToNumber().Int32Value());
  }
  if (given.status.ok() && job_.rank >= job_.world_size) {
    given.status = Bad("rank " + std::to_string(job_.rank) + " is not below the world size " + std::to_string(job_.world_size));
  }
  if (given.status.ok() && options_.terms.size() > 100) given.status = Bad("option terms is longer than 100 characters");
  statistics_.Configure(given.Integer("hasLatency", 0, 1) != 0, given.Integer("isTraced", 0, 1) != 0);
  given_group_ = given.Integer("group", -1, int64_t{1} << 52);
  options_.operation = given.Text("operation");
  is_confirmed_ = given.object.Get("isConfirmed").ToBoolean();
  if (given.status.ok()) given.status = ReadPlace(given.object);
  if (given.status.ok()) given.status = ReadNetwork(given.object);
  if (given.status.ok()) given.status = ReadTable(given.object.Get("table"), options_.slot_bytes, &table_);
  if (given.status.ok()) given.status = ReadParent(given.object);
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
    std::shared_ptr<Rendezvous>& known = state_->rendezvous[JobKey(job_.nonce, job_.rank)];
    if (known == nullptr) {
      if (Status s = Rendezvous::Create(job_, &known); !s.ok()) {
        state_->rendezvous.erase(JobKey(job_.nonce, job_.rank));
        Throw(env, s);
        return;
      }
    } else if (known->config().world_size != job_.world_size) {
      Throw(env, Bad("this process joined the job with " + std::to_string(known->config().world_size) + " ranks before, not " +
                     std::to_string(job_.world_size)));
      return;
    }
    rendezvous_ = known;
    group_ = given_group_ < 0 ? rendezvous_->NextGroup() : static_cast<uint64_t>(given_group_);
  }
  settler_ = Settler::New(env, "tilerank.Communicator", 0, 1);
  settler_.Unref(env);
  has_settler_ = true;
  // After the settler's own hook, so that it runs before it: a process that ends without close() still joins the thread.
  napi_add_env_cleanup_hook(env, &CommHandle::AtExit, this);
}

// Who this rank is in the group, and which of its ranks share a node.
Status CommHandle::ReadPlace(const Napi::Object& options) {
  const auto integers = [](const Napi::Value& value, std::vector<int>* list) {
    if (!value.IsArray()) return false;
    const Napi::Array array = value.As<Napi::Array>();
    for (uint32_t i = 0; i < array.Length(); i++) {
      const Napi::Value item = array.Get(i);
      if (!item.IsNumber()) return false;
      list->push_back(item.As<Napi::Number>().Int32Value());
    }
    return true;
  };
  std::vector<int> members;
  if (!integers(options.Get("members"), &members)) return Bad("option members must be a list of ranks");
  if (members.empty()) {
    for (int rank = 0; rank < job_.world_size; rank++) members.push_back(rank);
  }
  const auto own = std::find(members.begin(), members.end(), job_.rank);
  if (own == members.end()) return Bad("this rank is not among the members");
  std::vector<int> sorted = members;
  std::sort(sorted.begin(), sorted.end());
  if (sorted.front() < 0 || sorted.back() >= job_.world_size || std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    return Bad("members must be ranks of the job, each once");
  }
  rank_ = static_cast<int>(own - members.begin());
  world_size_ = static_cast<int>(members.size());
  std::vector<std::vector<int>> nodes;
  const Napi::Value layout = options.Get("layout");
  if (!layout.IsArray()) return Bad("option layout must be a list of lists of ranks");
  for (uint32_t i = 0; i < layout.As<Napi::Array>().Length(); i++) {
    if (!integers(layout.As<Napi::Array>().Get(i), &nodes.emplace_back())) return Bad("option layout must be a list of lists of ranks");
  }
  if (nodes.empty()) {
    nodes.emplace_back();
    for (int rank = 0; rank < world_size_; rank++) nodes[0].push_back(rank);
  }
  if (Status s = Layout::Create(rank_, std::move(nodes), &layout_); !s.ok()) return s;
  if (layout_.world_size() != world_size_) return Bad("layout and members differ in the number of ranks");
  options_.names = layout_.nodes[static_cast<size_t>(layout_.node)];
  for (int rank : options_.names) options_.members.push_back(members[static_cast<size_t>(rank)]);
  members_ = std::move(members);
  return Status::Ok();
}

Status CommHandle::ReadNetwork(const Napi::Object& options) {
  const Napi::Value mailbox = options.Get("mailbox");
  if (mailbox.IsUndefined() != (layout_.num_nodes() == 1)) return Bad("a group on several nodes needs a mailbox, one on a single node none");
  if (mailbox.IsUndefined()) return Status::Ok();
  mailbox_ = MailboxOf(mailbox);
  return mailbox_ != nullptr ? Status::Ok() : Bad("option mailbox must be a Mailbox");
}

// The processes of ranks that are known already, so that one which ends before it comes is a loss at once.
Status CommHandle::ReadParent(const Napi::Object& options) {
  const Napi::Value value = options.Get("parent");
  if (value.IsUndefined()) return Status::Ok();
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(Value().Get("constructor").As<Napi::Function>())) {
    return Bad("option parent must be a Communicator");
  }
  const CommHandle& parent = *Unwrap(value.As<Napi::Object>());
  if (parent.communicator_ == nullptr) return Status(Code::kClosed, "the group has been closed");
  const std::vector<int>& known = parent.options_.members;
  for (int member : options_.members) {
    const auto at = std::find(known.begin(), known.end(), member) - known.begin();
    options_.pidfds.push_back(static_cast<size_t>(at) < known.size() ? parent.communicator_->pidfd(static_cast<int>(at)) : -1);
  }
  parent_ = parent.communicator_;
  if (is_confirmed_) succeeded_ = parent.renewal_;
  return Status::Ok();
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
  is_closing_.store(true);
  if (stream_ != nullptr && communicator_ != nullptr && !communicator_->failed()) {
    stream_->Leave();
    messages_->Leave();
  }
  if (communicator_ != nullptr) communicator_->Stop();
  if (channels_ != nullptr) channels_->Stop();
  worker_.Stop();
  if (channels_ != nullptr) channels_->Close();
  settler_.Release();
  has_settler_ = false;
  connecting_.reset();
  channels_.reset();
  parent_.reset();
  succeeded_.reset();
  if (renewal_ != nullptr) renewal_->Leave();
  renewal_.reset();
  if (communicator_ != nullptr) communicator_->Close();
  communicator_.reset();
  if (rendezvous_ != nullptr) rendezvous_->Forget(group_);
  rendezvous_.reset();
  tensors_.clear();
  for (Plan& plan : plans_) plan.call = {};
  is_closed_ = true;
}

Napi::Value CommHandle::Enqueue(Napi::Env env, std::unique_ptr<Job> job, Worker* worker, int* pending) {
  napi_value promise;
  if (napi_create_promise(env, &job->deferred, &promise) != napi_ok) return Throw(env, Status(Code::kInternal, "a promise could not be made"));
  job->owner = this;
  job->pending = pending;
  ++*pending;
  if (unresolved_++ == 0) {
    Ref();  // neither collected nor outlived by the event loop while a promise is open
    settler_.Ref(env);
  }
  worker->Post([settler = settler_, raw = job.release()]() mutable {
    raw->result = raw->work();
    raw->work = nullptr;
    if (settler.NonBlockingCall(raw) == napi_ok) return;
    for (Napi::ObjectReference& kept : raw->kept) kept.SuppressDestruct();
    delete raw;
  });
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
  const bool has_succeeded = self.succeeded_ != nullptr;
  if (job->is_connect) self.parent_.reset(), self.succeeded_.reset();
  if (job->is_connect && job->result.ok()) {
    if (self.is_confirmed_ && self.rendezvous_ != nullptr && !has_succeeded) self.next_sequence_ = 1 + kConfirmSequences;
    self.communicator_ = std::move(self.connecting_);
    self.context_ = {self.communicator_.get(), self.kernels_->reduce, self.kernels_->copy, 0, &self};
    if (self.statistics_.is_traced()) self.communicator_->RecordExactly();
    self.communicator_->OnFailure([flag = self.is_cancelled_, stream = self.stream_, communicator = std::weak_ptr(self.communicator_)] {
      flag->store(true);
      const std::shared_ptr<Communicator> broken = communicator.lock();
      if (stream != nullptr && broken != nullptr) stream->TellFailure(broken->failure());
    });
    if (self.stream_ != nullptr) {
      self.network_.reset(new NetworkContext{self.context_, self.kernels_->reduce_staged, self.kernels_->reduce_to_q8, self.kernels_->reduce_from_q8, self.stream_.get(), &self.layout_});
      for (const auto& stream : {self.stream_, self.messages_}) {
        stream->TellHeldUp([communicator = std::weak_ptr(self.communicator_)] {
          const std::shared_ptr<Communicator> group = communicator.lock();
          return group != nullptr ? group->HeldUpBy() : -1;
        });
      }
      self.renewal_ = std::make_shared<NetworkRenewal>(self.communicator_, self.mailbox_, self.stream_, self.messages_, self.layout_, self.members_);
      self.breaker_->Arm(self.communicator_);
    }
  }
  if (job->timed.end != 0) self.statistics_.Time(job->timed);
  if (job->result.ok()) {
    Napi::Value value = env.Undefined();
    if (job->is_connect) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("group", static_cast<double>(self.group_));
      object.Set("warning", self.warning_);
      object.Set("spinUs", self.communicator_->spin_us());
      object.Set("arenaBytes", static_cast<double>(self.communicator_->arena_bytes()));
      value = object;
    } else if (job->value) {
      value = job->value(env);
    }
    napi_resolve_deferred(env, job->deferred, value);
  } else {
    napi_reject_deferred(env, job->deferred, ToError(env, job->result).Value());
  }
  job->kept.clear();
  --*job->pending;
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
  const auto connect = [this](const Deadline& deadline) -> Status {
    if (mailbox_ != nullptr) {
      std::vector<int> remote = members_;
      for (int local : layout_.nodes[static_cast<size_t>(layout_.node)]) remote[static_cast<size_t>(local)] = -1;
      const auto on_failure = [breaker = breaker_](Status reason, int culprit, const char* operation, uint64_t sequence) {
        breaker->Break(std::move(reason), culprit, operation, sequence);
      };
      if (Status s = mailbox_->Open(2 * group_, remote, rank_, on_failure, &stream_); !s.ok()) return s;
      if (Status s = mailbox_->Open(2 * group_ + 1, std::move(remote), rank_, on_failure, &messages_); !s.ok()) return s;
    }
    return ConnectGroup(*rendezvous_, group_, options_, deadline, *is_cancelled_, &connecting_, &warning_);
  };
  job->work = [this, connect]() -> Status {
    if (rendezvous_ == nullptr) return CreateSoloGroup(options_, &connecting_);
    if (succeeded_ != nullptr) return succeeded_->Confirm(connect, is_cancelled_.get());
    const Deadline deadline = Deadline::AfterMs(timeout_ms_);
    if (Status s = connect(deadline); !s.ok()) return s;
    return is_confirmed_ ? ConfirmSuccessor(*connecting_, deadline) : Status::Ok();
  };
  return Enqueue(env, std::move(job), &worker_, &pending_);
}

Status CommHandle::Usable() const {
  if (is_closed_) return Status(Code::kClosed, "the group has been closed");
  if (communicator_ == nullptr) return Status(Code::kInvalidArgument, "the group is not connected yet");
  if (communicator_->failed()) return communicator_->failure();
  return Status::Ok();
}

// The peers' parts of a tensor are fetched by its first use, so that alloc waits for nobody.
Status CommHandle::Complete(GroupTensor& tensor, const Deadline& deadline) {
  std::vector<Rendezvous::Answer> answers;
  Status status = rendezvous_->Collect(tensor.offer, deadline, *is_cancelled_, &answers);
  for (size_t index = 0; index < options_.members.size() && status.ok(); index++) {
    const int peer = options_.members[index];
    if (peer == job_.rank) continue;
    status = Arena::Receive(answers[static_cast<size_t>(peer)].arena, tensor.offer.nbytes, "a tensor of rank " + std::to_string(options_.names[index]),
                            &tensor.arenas[index]);
    tensor.parts[index] = tensor.arenas[index].data();
  }
  if (!status.ok()) {
    communicator_->Abort(status);
    return communicator_->failure();
  }
  tensor.is_complete = true;
  return Status::Ok();
}

// Its owner has used it, and so all ranks had allocated it.
Status CommHandle::Find(uint32_t id, int rank, const Deadline& deadline, std::byte** data) {
  std::shared_ptr<GroupTensor> tensor;
  {
    std::lock_guard lock(tensors_mutex_);
    if (const auto found = tensors_.find(id); found != tensors_.end()) tensor = found->second;
  }
  if (tensor == nullptr) return communicator_->Break(Status(Code::kInternal, "rank " + std::to_string(rank) + " gave a tensor that is none here"), -1, "alloc", 0);
  if (!tensor->is_complete) {
    if (Status s = Complete(*tensor, deadline); !s.ok()) return s;
  }
  *data = tensor->parts[static_cast<size_t>(rank)];
  return Status::Ok();
}

Status CommHandle::CompleteAll(const Call& call, const Deadline& deadline) {
  for (GroupTensor* tensor : {call.tensor.get(), call.output_tensor.get()}) {
    if (tensor == nullptr || tensor->is_complete) continue;
    if (Status s = Complete(*tensor, deadline); !s.ok()) return s;
  }
  for (const Call& one : call.calls) {
    if (Status s = CompleteAll(one, deadline); !s.ok()) return s;
  }
  return Status::Ok();
}

Status CommHandle::Execute(const Call& call, bool has_started, const Deadline& deadline) {
  // A call that waited behind one that failed must publish nothing: peers that have not heard yet would take it for a mismatch.
  if (communicator_->failed()) return communicator_->failure();
  if (network_ != nullptr) {
    // Across nodes a batch is its operations, one after the other.
    for (size_t i = 0; i < call.calls.size(); i++) {
      if (Status s = RunHierarchical(*network_, call.calls[i].operation, call.number + i, deadline); !s.ok()) return s;
    }
    return call.batch != nullptr ? Status::Ok() : RunHierarchical(*network_, call.operation, call.number, deadline);
  }
  if (Status s = CompleteAll(call, deadline); !s.ok()) return s;
  return Finish(context_, call.operation, has_started, deadline);
}

/// plan(op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets) -> () => void: runSync of the same call, checked once.
/// data and output are tensors or undefined.
Napi::Value CommHandle::MakePlan(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Plan plan{this, {}};
  if (Status s = ReadCall(info, &plan.call); !s.ok()) return Throw(env, s);
  if (info[2].IsObject() || info[3].IsObject()) return Throw(env, Bad("a plan works on tensors"));
  plans_.push_back(std::move(plan));
  napi_value run = nullptr;
  if (napi_create_function(env, "run", NAPI_AUTO_LENGTH, &CommHandle::RunPlan, &plans_.back(), &run) != napi_ok) {
    return Throw(env, Status(Code::kInternal, "a function could not be made"));
  }
  Napi::Function(env, run).Set("group", info.This());  // whoever holds it holds the group
  return Napi::Value(env, run);
}

napi_value CommHandle::RunPlan(napi_env env, napi_callback_info info) {
  void* data = nullptr;
  napi_get_cb_info(env, info, nullptr, nullptr, nullptr, &data);
  auto& [self, call] = *static_cast<Plan*>(data);
  if (Status s = self->Usable(); !s.ok()) [[unlikely]] return Throw(env, s);
  if (self->pending_ > 0) [[unlikely]] return Throw(env, Busy());
  call.operation.history = self->history_;
  return self->RunNow(env, call, call.timeout_ms);
}

void CommHandle::Take(Call* call) {
  if (mailbox_ != nullptr) {
    call->number = next_number_;
    next_number_ += call->batch != nullptr ? call->calls.size() : 1;
    for (Call& one : call->calls) {
      one.operation.history = history_;
      history_ = HistoryAfter(one.operation);
    }
  } else {
    call->operation.sequence = next_sequence_;
    next_sequence_ += SequencesOf(call->operation, world_size_);
  }
  history_ = HistoryAfter(call->operation);
  statistics_.Count(call->operation.op, call->operation.nbytes());
}

// Takes the call's place, and blocks until the operation is done.
Napi::Value CommHandle::RunNow(Napi::Env env, Call& call, int64_t timeout_ms) {
  Take(&call);
  if (statistics_.is_timed()) [[unlikely]] {
    TimedCall timed = BeginTimed(call, Ticks());
    const Status status = EndTimed(&timed, ExecuteNow(call, timeout_ms));
    statistics_.Time(timed);
    if (!status.ok()) return Throw(env, status);
  } else if (Status s = ExecuteNow(call, timeout_ms); !s.ok()) [[unlikely]] {
    return Throw(env, s);
  }
  return {};  // undefined, without asking the engine for it
}

Status CommHandle::ExecuteNow(Call& call, int64_t timeout_ms) {
  const Deadline deadline = Deadline::AfterMs(timeout_ms);
  const bool has_started = network_ == nullptr && call.IsComplete() && TryStart(context_, call.operation);
  return Execute(call, has_started, deadline);
}

/// runSync(op, dtype, data, output, root, algorithm, timeoutMs, reduceOp, offsets): blocks the caller until it is done.
Napi::Value CommHandle::RunSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Call call;
  if (Status s = ReadCall(info, &call); !s.ok()) [[unlikely]] return Throw(env, s);
  if (pending_ > 0) [[unlikely]] return Throw(env, Busy());
  return RunNow(env, call, call.timeout_ms);
}

/// run(...), as runSync: undefined when it ended at once, else a promise.
Napi::Value CommHandle::Run(const Napi::CallbackInfo& info) {
  Call call;
  if (Status s = ReadCall(info, &call); !s.ok()) return Throw(info.Env(), s);
  return RunSoon(info.Env(), call, {info[2], info[3]});
}

/// runBatchSync(numbers, values, timeoutMs): blocks the caller until all is done.
Napi::Value CommHandle::RunBatchSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Call call;
  if (Status s = ReadBatch(info, &call); !s.ok()) return Throw(env, s);
  if (pending_ > 0) return Throw(env, Busy());
  return RunNow(env, call, call.timeout_ms);
}

/// runBatch(...), as runBatchSync: undefined when it ended at once, else a promise.
Napi::Value CommHandle::RunBatch(const Napi::CallbackInfo& info) {
  Call call;
  if (Status s = ReadBatch(info, &call); !s.ok()) return Throw(info.Env(), s);
  return RunSoon(info.Env(), call, {info[1]});
}

Napi::Value CommHandle::RunSoon(Napi::Env env, Call& call, const std::vector<Napi::Value>& kept) {
  // Who gives or takes a tensor waits for the others: small data is copied once more, so that the call may end here.
  if (call.operation.nbytes() <= kInlineBytes) call.operation.source = call.operation.target = 0;
  Take(&call);
  TimedCall timed;
  if (statistics_.is_timed()) timed = BeginTimed(call, Ticks());
  const auto now = [&](Status status) {
    if (!statistics_.is_timed()) return status;
    status = EndTimed(&timed, std::move(status));
    statistics_.Time(timed);
    return status;
  };
  Deadline deadline = Deadline::AfterMs(call.timeout_ms);
  bool has_started = false;
  // With others pending, this one's turn comes on the thread, after them; so does the first use of a tensor.
  if (network_ == nullptr && pending_ == 0 && call.IsComplete()) {
    has_started = TryStart(context_, call.operation);
    // Algorithms with waits in their middle are the thread's; of the one in place the middle is done below.
    const bool is_in_place = static_cast<AllReduceAlgorithm>(call.operation.algorithm) == AllReduceAlgorithm::kTwoShotInPlace;
    const bool has_one_wait = is_in_place || SequencesOf(call.operation, world_size_) == 1;
    if (has_started && call.operation.nbytes() <= kInlineBytes && has_one_wait) {
      const int64_t look_end = NowNs() + kLookNs;
      const auto look = [&](auto is_ready) { return LookUntil(look_end, *communicator_, is_ready); };
      bool is_ready = look([&] { return IsReady(context_, call.operation); });
      if (is_ready && is_in_place) {
        if (Status s = AllReduceSlice(context_, call.operation, deadline); !s.ok()) return Throw(env, now(std::move(s)));
        call.operation.is_reduced = true;
        is_ready = look([&] { return communicator_->IsReady(0, call.operation.sequence + 1); });
      }
      if (is_ready) {
        if (Status s = now(Execute(call, true, deadline)); !s.ok()) return Throw(env, s);
        return env.Undefined();
      }
    }
  }
  deadline.ElapsedNs(NowNs());  // the time counts from the call
  auto job = std::make_unique<Job>();
  for (const Napi::Value& value : kept) {
    if (value.IsObject()) job->kept.push_back(Napi::Persistent(value.As<Napi::Object>()));
  }
  job->timed = timed;
  job->work = [this, call, has_started, deadline, timed = &job->timed]() -> Status {
    if (!statistics_.is_timed()) return Execute(call, has_started, deadline);
    if (!has_started) *timed = BeginTimed(call, timed->called);  // its turn has come
    return EndTimed(timed, Execute(call, has_started, deadline));
  };
  return Enqueue(env, std::move(job), &worker_, &pending_);
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
  tensor->offer.members = options_.members;
  tensor->offer.names = options_.names;
  tensor->arenas.resize(options_.members.size());
  tensor->parts.resize(options_.members.size());
  Arena& own = tensor->arenas[static_cast<size_t>(layout_.local)];
  Status status;
  const bool is_alone = options_.members.size() == 1;
  if (is_alone) {
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
  if (is_alone) next_tensor_++;
  tensor->parts[static_cast<size_t>(layout_.local)] = own.data();

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
  {
    std::lock_guard lock(tensors_mutex_);
    tensors_.emplace(tensor->id, tensor);
  }
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
    communicator_->Abort(Status(Code::kAborted, "rank " + std::to_string(rank_) + " aborted the group: " + reason).Number("rank", rank_));
  }
  return info.Env().Undefined();
}

/// close(isSuperseded?): detaches all views, tells the peers, unmaps. Promises that are open settle first where the caller awaits them.
Napi::Value CommHandle::CloseJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!has_settler_ || is_closed_) return env.Undefined();
  is_closing_.store(true);
  if (communicator_ != nullptr && info.Length() > 0 && info[0].ToBoolean()) communicator_->Supersede();
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
    if (channels_ != nullptr) channels_->Stop();
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
  if (late < 0 || late >= world_size_ || late == rank_) return Throw(env, Bad("giveUp is about another rank of the group"));
  const int rank = static_cast<int>(late), local = layout_.local_of[static_cast<size_t>(late)];
  if (communicator_ == nullptr) return env.Undefined();
  if (layout_.node_of[static_cast<size_t>(late)] == layout_.node) {
    communicator_->GiveUp(local, Int64(info[1]));
  } else {
    const std::string name = std::to_string(rank), text = "rank " + std::to_string(rank_) + " waited " + std::to_string(Int64(info[1])) + " ms for rank " + name + " of another node";
    (void)communicator_->Break(
        Status(Code::kTimeout, text).Number("rank", rank_).Text("lateRanks", name).Number("elapsedMs", static_cast<double>(Int64(info[1]))).Text("operation", "idle"), rank, "idle", 0);
  }
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

/// nextGroup() -> a number that no other group of the job has: for one whose ranks learn it from this rank.
Napi::Value CommHandle::NextGroup(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), rendezvous_ == nullptr ? 0.0 : static_cast<double>(rendezvous_->NextOwnGroup()));
}

/// renew(kind, timeoutMs, terms) -> Promise<{ group, members }>: agrees with the other ranks on the group that takes this one's place; members
/// are ranks of the job. kind 1: recreate; 2: shrink. terms: what ranks of several nodes must agree on besides. The group need not be broken,
/// but nothing else can be done with it from here on.
Napi::Value CommHandle::Renew(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 3 || !info[0].IsNumber() || !info[1].IsNumber() || !info[2].IsString() || Int64(info[0]) < 1 || Int64(info[0]) > 2) {
    return Throw(env, Bad("renew takes (kind, timeoutMs, terms)"));
  }
  std::string terms = info[2].As<Napi::String>().Utf8Value();
  if (terms.size() > NetworkRenewal::kMostTerms) return Throw(env, Bad("terms are too long"));
  if (is_closed_ || communicator_ == nullptr) return Throw(env, Status(Code::kClosed, "the group has been closed"));
  if (unresolved_ > 0) return Throw(env, Busy());
  // Why it broke comes before what this rank shows from here on, however late the thread that found it.
  if (stream_ != nullptr && communicator_->failed() && communicator_->failure().code() != Code::kClosed) stream_->TellFailure(communicator_->failure());
  communicator_->Stop();
  const auto kind = static_cast<Renewal>(Int64(info[0]));
  const int64_t timeout_ms = Int64(info[1]);
  const auto successor = std::make_shared<Successor>();
  auto job = std::make_unique<Job>();
  job->work = [this, kind, timeout_ms, successor, terms = std::move(terms)] {
    const auto next = [this] { return rendezvous_ == nullptr ? uint64_t{0} : rendezvous_->NextOwnGroup(); };
    if (renewal_ != nullptr) return renewal_->Agree(kind, terms, next, timeout_ms, is_closing_, successor.get());
    return AgreeOnSuccessor(*communicator_, kind, next, Deadline::AfterMs(timeout_ms), is_closing_, successor.get());
  };
  job->value = [this, successor](Napi::Env of) {
    Napi::Array members = Napi::Array::New(of, successor->ranks.size());
    for (size_t i = 0; i < successor->ranks.size(); i++) {
      members.Set(static_cast<uint32_t>(i), members_[static_cast<size_t>(successor->ranks[i])]);
    }
    Napi::Object result = Napi::Object::New(of);
    result.Set("group", static_cast<double>(successor->group));
    result.Set("members", members);
    return result;
  };
  return Enqueue(env, std::move(job), &worker_, &pending_);
}

/// timeAllReduce(dtype, count, samples, startedUs) -> Float64Array of microseconds: how the runner uses the slots. Each sample
/// rewrites this rank's slot, then: publish, await, sum all slots into private memory. Checked after the last sample.
Napi::Value CommHandle::TimeAllReduce(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 3 || !info[0].IsNumber() || !info[1].IsNumber() || !info[2].IsNumber()) {
    return Throw(env, Bad("timeAllReduce takes (dtype, count, samples)"));
  }
  if (Status s = Usable(); !s.ok()) return Throw(env, s);
  if (network_ != nullptr) return Throw(env, Status(Code::kUnsupported, "timeAllReduce is for groups on one node"));
  if (pending_ > 0) return Throw(env, Busy());
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

/// leaveJob(nonce, rank): this process makes no further group of the job; its socket closes with the last that is open.
static void LeaveJob(const Napi::CallbackInfo& info) {
  if (info.Length() < 2 || !info[0].IsString() || !info[1].IsNumber()) {
    Throw(info.Env(), Bad("leaveJob takes (nonce, rank)"));
    return;
  }
  static_cast<CommState*>(info.Data())->rendezvous.erase(JobKey(info[0].As<Napi::String>().Utf8Value(), info[1].As<Napi::Number>().Int32Value()));
}

void RegisterComm(Napi::Env env, Napi::Object exports) {
  auto* state = new CommState();
  exports.Set("leaveJob", Napi::Function::New(env, LeaveJob, "leaveJob", state));
  exports.Set("Communicator", CommHandle::Define(env, state));
  exports.Set("bindRankSocket", Napi::Function::New(env, BindRankSocketJs, "bindRankSocket"));
  napi_add_env_cleanup_hook(env, [](void* data) { delete static_cast<CommState*>(data); }, state);
}

}  // namespace tilerank
