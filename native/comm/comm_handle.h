// A group for JavaScript: the Communicator, the sequence numbers of calls, the tensors that all ranks map, and one thread that
// finishes what a call could not finish at once. Everything but that thread's work runs on the thread of its environment. The
// runner takes the Communicator out of it and then owns the sequence.
#pragma once
#include <napi.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/algorithm_table.h"
#include "comm/all_reduce.h"
#include "comm/batch.h"
#include "comm/breaker.h"
#include "comm/channels.h"
#include "comm/communicator.h"
#include "comm/hierarchical.h"
#include "comm/mailbox.h"
#include "comm/network_renewal.h"
#include "comm/operation.h"
#include "comm/rendezvous.h"
#include "comm/statistics.h"
#include "comm/worker.h"

namespace tilerank {

/// Rendezvous of this environment by job and rank: groups made one after the other share the rank's socket, until
/// leaveJob.
struct CommState {
  std::map<std::string, std::shared_ptr<Rendezvous>> rendezvous;
};

/// A tensor of the group: the same shape on all ranks, its memory mapped by all of them.
struct GroupTensor {
  uint32_t id = 0;
  DType dtype = DType::kF32;
  size_t count = 0;
  Rendezvous::Offer offer;
  std::vector<Arena> arenas;         // own at once, peers' once complete
  std::vector<std::byte*> parts;     // arenas' data
  bool is_complete = false;
};

/// Numbers of algorithms from here on are NetworkAlgorithm's, those below AllReduceAlgorithm's.
constexpr uint16_t kNetworkAlgorithms = 16;
// Added to the number of an algorithm: wire q8.
constexpr int64_t kQ8Wire = 0x100;

class CommHandle : public Napi::ObjectWrap<CommHandle>, private Tensors {
 public:
  static Napi::Function Define(Napi::Env env, CommState* state);
  explicit CommHandle(const Napi::CallbackInfo& info);
  ~CommHandle();

  /// Null before connect() has ended and after close().
  std::shared_ptr<Communicator> communicator() const { return communicator_; }
  /// Of a group on several nodes, else null.
  std::shared_ptr<Transport> transport() const { return stream_; }
  const Layout& layout() const { return layout_; }

 private:
  // One promise: work runs on a worker's thread, settle on the environment's.
  struct Job {
    std::function<Status()> work;
    Status result;
    napi_deferred deferred = nullptr;
    bool is_connect = false;
    TimedCall timed;                          // where calls are timed
    std::function<Napi::Value(Napi::Env)> value;  // of the promise; none: undefined
    std::vector<Napi::ObjectReference> kept;  // arrays in use
    CommHandle* owner = nullptr;
    int* pending = nullptr;  // counted down when it is settled
  };
  struct Memory {
    std::byte* data = nullptr;
    size_t count = 0;
    bool is_given = false;
    std::shared_ptr<GroupTensor> tensor;
  };
  struct Call {
    Operation operation;
    Memory data, output;
    uint64_t number = 0;                  // of a group on several nodes
    std::shared_ptr<GroupTensor> tensor;  // of data, if it is one
    std::shared_ptr<GroupTensor> output_tensor;  // of output, where the operation reaches into that of all ranks
    std::shared_ptr<std::vector<uint64_t>> offsets, output_offsets;
    std::shared_ptr<Batch> batch;
    std::vector<Call> calls;  // of the batch
    bool IsComplete() const {
      return (tensor == nullptr || tensor->is_complete) && (output_tensor == nullptr || output_tensor->is_complete) &&
             std::all_of(calls.begin(), calls.end(), [](const Call& call) { return call.IsComplete(); });
    }
    int64_t timeout_ms = 0;
  };
  struct Plan {
    CommHandle* owner;
    Call call;
  };
  static void Settle(Napi::Env env, Napi::Function, std::nullptr_t*, Job* job);
  using Settler = Napi::TypedThreadSafeFunction<std::nullptr_t, Job, &CommHandle::Settle>;

  Napi::Value Connect(const Napi::CallbackInfo& info);
  Napi::Value Run(const Napi::CallbackInfo& info);
  Napi::Value RunSync(const Napi::CallbackInfo& info);
  Napi::Value RunBatch(const Napi::CallbackInfo& info);
  Napi::Value RunBatchSync(const Napi::CallbackInfo& info);
  Napi::Value RunSoon(Napi::Env env, Call& call, const std::vector<Napi::Value>& kept);
  Napi::Value MakePlan(const Napi::CallbackInfo& info);
  static napi_value RunPlan(napi_env env, napi_callback_info info);
  Napi::Value Alloc(const Napi::CallbackInfo& info);
  Napi::Value AbortJs(const Napi::CallbackInfo& info);
  Napi::Value CloseJs(const Napi::CallbackInfo& info);
  Napi::Value GiveUp(const Napi::CallbackInfo& info);
  Napi::Value Recording(const Napi::CallbackInfo& info);
  Napi::Value TimeAllReduce(const Napi::CallbackInfo& info);
  Napi::Value Message(const Napi::CallbackInfo& info);
  Napi::Value MessageSync(const Napi::CallbackInfo& info);
  Napi::Value SendRecv(const Napi::CallbackInfo& info);
  Napi::Value SendRecvSync(const Napi::CallbackInfo& info);
  Napi::Value HasFailed(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(info.Env(), communicator_ != nullptr && communicator_->failed());
  }
  Napi::Value StatisticsJs(const Napi::CallbackInfo& info);  // addon_statistics.cpp
  Napi::Value Traced(const Napi::CallbackInfo& info);
  Napi::Value NextGroup(const Napi::CallbackInfo& info);
  Napi::Value Renew(const Napi::CallbackInfo& info);

  Napi::Value RunNow(Napi::Env env, Call& call, int64_t timeout_ms);
  // What a collective is called with.
  struct Given {
    int64_t op, dtype, root, algorithm, reduce_op;
    Napi::Value data, output, offsets;
  };
  static bool Overlap(const Memory& a, const Memory& b, DType dtype);
  Status ReadCall(const Napi::CallbackInfo& info, Call* call) const;
  Status ReadGiven(const Given& given, Call* call) const;
  Status ReadBatch(const Napi::CallbackInfo& info, Call* call) const;
  Status ReadReduction(const Memory& data, const Memory& output, int64_t algorithm, Call* call) const;
  Status ReadMatrix(const Napi::BigUint64Array& matrix, Call* call) const;
  Status ReadMemory(const Napi::Value& value, DType dtype, const char* name, Memory* memory) const;
  Status ReadParts(const Napi::Value& offsets, const Memory& data, const Memory& output, Call* call) const;
  void ChooseAllReduce(Call* call, AllReduceAlgorithm fixed, bool is_mapped) const {
    Operation& operation = call->operation;
    const AlgorithmRow& row = table_.Choose(CollectiveOp::kAllReduce, is_mapped, operation.nbytes());
    operation.chunk_bytes = row.chunk_bytes;
    operation.algorithm = fixed == AllReduceAlgorithm::kAuto ? row.algorithm : static_cast<uint16_t>(fixed);
    if (operation.algorithm == static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace)) {
      operation.tensor = call->tensor->id;
      operation.parts = &call->tensor->parts;
    } else if (operation.nbytes() > row.chunk_bytes) {
      // A tensor here and an array there, both of one fixed algorithm, may have chunks of different sizes.
      operation.layout = static_cast<uint32_t>(row.chunk_bytes >> 6);
    }
  }
  Status Usable() const;
  Status TooNarrow(const Operation& operation) const;
  Status ChooseNetwork(int64_t algorithm, Operation* operation) const;
  Status ReadPlace(const Napi::Object& options);
  Status ReadNetwork(const Napi::Object& options);
  Status ExecuteNow(Call& call, int64_t timeout_ms);
  TimedCall BeginTimed(const Call& call, uint64_t called) const;
  Status EndTimed(TimedCall* timed, Status status) const;
  Status ReadParent(const Napi::Object& options);
  // Takes the call's place in the order of the group.
  void Take(Call* call);
  Status Find(uint32_t id, int rank, const Deadline& deadline, std::byte** data) override;
  Status Complete(GroupTensor& tensor, const Deadline& deadline);
  Status CompleteAll(const Call& call, const Deadline& deadline);
  Status Execute(const Call& call, bool has_started, const Deadline& deadline);
  // Of messages: what a call has read, before any of it takes its place.
  struct MessageCall {
    int rank = 0;  // the other one, of the group
    Channels::Channel* channel = nullptr;
    DType dtype = DType::kF32;
    Memory memory;
    Napi::Value kept;
    int64_t timeout_ms = 0;
  };
  Status ReadPeer(const Napi::Value& peer, bool is_sender, MessageCall* call);
  Status ReadMessage(const Napi::CallbackInfo& info, MessageCall* call);
  Status ReadSendRecv(const Napi::CallbackInfo& info, MessageCall* send, MessageCall* receive, bool* is_copy);
  Napi::Value Post(Napi::Env env, const MessageCall& call);
  Napi::Value Enqueue(Napi::Env env, std::unique_ptr<Job> job, Worker* worker, int* pending);
  void Shutdown();
  static void AtExit(void* self) { static_cast<CommHandle*>(self)->Shutdown(); }

  CommState* state_;
  Rendezvous::Config job_;           // rank and size of the job
  int rank_ = 0, world_size_ = 1;    // of the group
  Layout layout_;                    // of the group
  std::shared_ptr<Mailbox> mailbox_; // of a group on several nodes
  std::shared_ptr<Mailbox::Stream> stream_, messages_;  // frames of collectives, and of messages
  const std::shared_ptr<Breaker> breaker_ = std::make_shared<Breaker>();
  std::vector<int> members_;         // ranks of the job
  std::unique_ptr<NetworkContext> network_;  // likewise; set when connected
  GroupOptions options_;
  Statistics statistics_;
  const TickClock clock_;
  AlgorithmTable table_;
  int64_t timeout_ms_ = 0;
  int64_t given_group_ = -1;  // its number, where the ranks have agreed on one
  const Kernels* kernels_ = nullptr;
  std::shared_ptr<Rendezvous> rendezvous_;
  uint64_t group_ = 0;
  std::shared_ptr<Communicator> parent_;  // of a group that was made of another's ranks, until it is connected: it knows their processes
  bool is_confirmed_ = false;             // connect ends with ConfirmSuccessor, or that of `succeeded_`
  std::shared_ptr<NetworkRenewal> renewal_, succeeded_;  // of a group on several nodes; of the one whose place this group takes, until it stands
  std::string warning_;

  std::shared_ptr<Communicator> communicator_;      // set when connect's job is settled
  std::unique_ptr<Communicator> connecting_;        // written by the thread in connect's job
  OperationContext context_{};
  uint64_t next_sequence_ = 1;
  uint64_t next_number_ = 1;  // of calls, in a group on several nodes
  uint32_t history_ = 0;  // digest of all calls so far
  uint32_t next_tensor_ = 1;
  std::map<uint32_t, std::shared_ptr<GroupTensor>> tensors_;
  std::mutex tensors_mutex_;  // between this thread, which alone writes them, and the group's
  std::deque<Plan> plans_;  // functions of JavaScript point to them
  std::vector<Napi::Reference<Napi::ArrayBuffer>> views_;
  int unresolved_ = 0;  // promises that are not settled yet
  int pending_ = 0;     // of these, collectives and connect
  bool is_closed_ = false;
  std::atomic<bool> is_closing_{false};  // waits that outlive a broken group end

  // Set when waiting for ranks to come has lost its sense; shared with the communicator, which the runner may keep longer.
  const std::shared_ptr<std::atomic<bool>> is_cancelled_ = std::make_shared<std::atomic<bool>>(false);
  Worker worker_;
  std::unique_ptr<Channels> channels_;  // from the first message on
  Settler settler_;
  bool has_settler_ = false;
};

}  // namespace tilerank
