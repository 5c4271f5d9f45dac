// Strikes one rank at every step of every algorithm, in a node and across nodes, and judges what the others see. Ranks are processes that this
// one forks. A Fabric and a Transport stand between the algorithm and the group and count what passes (Stepper); before its k-th step the victim
// strikes itself, for every k, and across nodes before each frame that its carrier moves as well.
//
// After each strike: every survivor has the right error with the victim's name, in time, or a right result where it was through already; it has
// no descriptor and no thread more than before; and it makes another group, without the victim, that sums right.
//
// Frames go through socket pairs here, moved by a thread of each rank. What ZeroMQ, CURVE and real links add
// is struck from outside, at random moments: test/faults.
//
// usage: test_faults [EVERY [FIRST]]: each EVERY-th case from number FIRST on. One line of JSON for each algorithm and fault; what was wrong on stderr.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "comm/all_reduce.h"
#include "comm/batch.h"
#include "comm/communicator.h"
#include "comm/hierarchical.h"
#include "comm/mailbox.h"
#include "comm/operation.h"

using namespace tilerank;

namespace {

constexpr int kMostRanks = 4;
constexpr size_t kSlotBytes = 4096, kNodeChunk = 512, kNetworkChunk = 2048, kFrameBytes = 512, kTensorBytes = 16384;
constexpr int64_t kShortMs = 400, kLongMs = 20'000, kBriefStopNs = 3'000'000;
// The promise is a second; a machine that others use may stand still for two more.
constexpr int64_t kPromisedMs = 3000, kHungMs = 40'000;

enum class Fault { kNone, kKill, kStop, kBrief, kExit, kException, kAbortSignal, kClose, kGiveUp, kCount, kOperation };
const char* NameOf(Fault fault) {
  static constexpr const char* kNames[] = {"none", "SIGKILL", "SIGSTOP", "SIGSTOP, SIGCONT", "exit(0)", "exception", "abort()", "close()", "group.abort()", "another count", "another operation"};
  return kNames[static_cast<int>(fault)];
}
bool IsMismatch(Fault fault) { return fault == Fault::kCount || fault == Fault::kOperation; }
// The victim's process goes on, and belongs to the next group.
bool IsAlive(Fault fault) { return fault == Fault::kNone || fault == Fault::kBrief || fault == Fault::kGiveUp || IsMismatch(fault); }

using Nodes = std::vector<std::vector<int>>;

struct Algorithm {
  const char* name;
  CollectiveOp op;
  uint16_t number = 0;
  DType dtype = DType::kF32;
  bool is_tensor = false;  // data, and where it has one the output, of all ranks
  bool is_ragged = false;
};

const Algorithm kInNode[] = {
    {"barrier", CollectiveOp::kBarrier},
    {"broadcast", CollectiveOp::kBroadcast},
    {"broadcast of a tensor", CollectiveOp::kBroadcast, 0, DType::kF32, true},
    {"message", CollectiveOp::kMessage},
    {"allReduce oneShot", CollectiveOp::kAllReduce, static_cast<uint16_t>(AllReduceAlgorithm::kOneShot)},
    {"allReduce twoShot", CollectiveOp::kAllReduce, static_cast<uint16_t>(AllReduceAlgorithm::kTwoShot)},
    {"allReduce twoShotInPlace", CollectiveOp::kAllReduce, static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace), DType::kF32, true},
    {"reduce", CollectiveOp::kReduce},
    {"reduce of a tensor", CollectiveOp::kReduce, 0, DType::kF32, true},
    {"allGather", CollectiveOp::kAllGather},
    {"allGather, unequal parts", CollectiveOp::kAllGather, 0, DType::kF32, false, true},
    {"allGather of tensors", CollectiveOp::kAllGather, 0, DType::kF32, true},
    {"gather", CollectiveOp::kGather},
    {"gather of tensors", CollectiveOp::kGather, 0, DType::kF32, true},
    {"scatter", CollectiveOp::kScatter},
    {"scatter of a tensor", CollectiveOp::kScatter, 0, DType::kF32, true},
    {"reduceScatter", CollectiveOp::kReduceScatter},
    {"reduceScatter of tensors", CollectiveOp::kReduceScatter, 0, DType::kF32, true},
    {"allToAll", CollectiveOp::kAllToAll},
    {"allToAll of tensors", CollectiveOp::kAllToAll, 0, DType::kF32, true},
    {"allToAll, unequal parts", CollectiveOp::kAllToAll, 0, DType::kF32, false, true},
    {"batch", CollectiveOp::kBatch},
};

const Algorithm kAcrossNodes[] = {
    {"barrier", CollectiveOp::kBarrier},
    {"broadcast", CollectiveOp::kBroadcast},
    {"allReduce leader", CollectiveOp::kAllReduce, static_cast<uint16_t>(NetworkAlgorithm::kLeader)},
    {"allReduce splitRail", CollectiveOp::kAllReduce, static_cast<uint16_t>(NetworkAlgorithm::kSplitRail)},
    {"allReduce twoStep", CollectiveOp::kAllReduce, static_cast<uint16_t>(NetworkAlgorithm::kTwoStep)},
    {"allReduce twoStep, bf16", CollectiveOp::kAllReduce, static_cast<uint16_t>(NetworkAlgorithm::kTwoStep), DType::kBf16},
    {"reduce", CollectiveOp::kReduce},
    {"allGather", CollectiveOp::kAllGather},
    {"allGather, unequal parts", CollectiveOp::kAllGather, 0, DType::kF32, false, true},
    {"gather", CollectiveOp::kGather},
    {"scatter", CollectiveOp::kScatter},
    {"reduceScatter", CollectiveOp::kReduceScatter},
    {"allToAll", CollectiveOp::kAllToAll},
};

struct Case {
  const Nodes* nodes;
  const Algorithm* algorithm;
  Fault fault = Fault::kNone;
  int victim = 0;
  int step = 0;   // of the algorithm, from 1; one more than it has: when the call has ended. 0: not there
  int frame = 0;  // of the victim's carrier, from 1
};

/// Of one case, in memory that the ranks and whoever runs them share.
struct Shared {
  std::atomic<int> ready, go;
  std::atomic<int> has_struck;
  std::atomic<int64_t> struck_ns;
  std::atomic<int> problems, misnamed;
  char step[32];
  char text[2000];
  pid_t pids[kMostRanks];
  int steps[kMostRanks], frames[kMostRanks];
  std::atomic<int64_t> failed_ns[kMostRanks];
  int left[kMostRanks];
};

struct Rank;

[[gnu::format(printf, 2, 3)]] void Wrong(Shared* shared, const char* format, ...) {
  char line[600];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof line, format, args);
  va_end(args);
  if (shared->problems.fetch_add(1) == 0) std::snprintf(shared->text, sizeof shared->text, "%s", line);
}

int WorldSize(const Nodes& nodes) {
  size_t size = 0;
  for (const std::vector<int>& ranks : nodes) size += ranks.size();
  return static_cast<int>(size);
}

class Stepper;
void Strike(Stepper& stepper, const char* step);

/// Counts the steps of a rank while it is armed, and strikes at one of them.
class Stepper {
 public:
  Stepper(Rank& rank, const Case& one, bool is_victim) : rank_(rank), at_step_(is_victim ? one.step : 0), at_frame_(is_victim ? one.frame : 0) {}
  void Arm(bool is_armed) { is_armed_.store(is_armed); }
  void Step(const char* what) {
    if (is_armed_.load() && ++steps_ == at_step_) Strike(*this, what);
  }
  /// On the carrier's thread.
  void Frame(const char* what) {
    if (is_armed_.load() && ++frames_ == at_frame_) Strike(*this, what);
  }
  int steps() const { return steps_; }
  int frames() const { return frames_; }
  Rank& rank() { return rank_; }

 private:
  Rank& rank_;
  const int at_step_, at_frame_;
  std::atomic<bool> is_armed_{false};
  int steps_ = 0, frames_ = 0;
};

class SteppedFabric final : public Fabric {
 public:
  SteppedFabric(Communicator& to, Stepper& stepper) : Fabric(to.rank(), to.world_size()), to_(to), stepper_(stepper) {}
  std::byte* Slot(int rank, uint64_t sequence) const override { return to_.Slot(rank, sequence); }
  Status Acquire(int lane, uint64_t sequence, const Deadline& deadline) override { return stepper_.Step("acquire"), to_.Acquire(lane, sequence, deadline); }
  bool IsAcquirable(int lane, uint64_t sequence) const override { return to_.IsAcquirable(lane, sequence); }
  void Publish(int lane, uint64_t sequence, const OpTag& tag) override { stepper_.Step("publish"), to_.Publish(lane, sequence, tag); }
  void Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload& payload) override { stepper_.Step("publish"), to_.Publish(lane, sequence, tag, payload); }
  FlagPayload PayloadOf(int rank, int lane, uint64_t sequence) const override { return to_.PayloadOf(rank, lane, sequence); }
  bool IsReady(int lane, uint64_t sequence) const override { return to_.IsReady(lane, sequence); }
  bool IsReadyFrom(int lane, uint64_t sequence, int peer) const override { return to_.IsReadyFrom(lane, sequence, peer); }
  Status Await(int lane, uint64_t sequence, const OpTag& tag, const Deadline& deadline) override { return stepper_.Step("await"), to_.Await(lane, sequence, tag, deadline); }
  Status AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) override {
    return stepper_.Step("await"), to_.AwaitSame(lane, sequence, peer, tag, deadline);
  }
  void Consumed(int lane, uint64_t sequence) override { stepper_.Step("consumed"), to_.Consumed(lane, sequence); }
  Status AwaitConsumedBy(int lane, uint64_t sequence, int peer, const char* what, const Deadline& deadline) override {
    return stepper_.Step("await consumed"), to_.AwaitConsumedBy(lane, sequence, peer, what, deadline);
  }
  void Complete(int lane, uint64_t sequence) override { stepper_.Step("complete"), to_.Complete(lane, sequence); }
  void ShowHeldUp(int by, int64_t now_ns) override { to_.ShowHeldUp(by, now_ns); }
  bool failed() const override { return to_.failed(); }
  Status failure() const override { return to_.failure(); }
  Status Break(Status reason, int culprit, const char* operation, uint64_t sequence) override { return to_.Break(std::move(reason), culprit, operation, sequence); }

 private:
  Communicator& to_;
  Stepper& stepper_;
};

class SteppedTransport final : public Transport {
 public:
  SteppedTransport(Transport& to, Stepper& stepper) : to_(to), stepper_(stepper) {}
  void Enter(const FrameTag& tag) override { stepper_.Step("enter"), to_.Enter(tag); }
  size_t frame_bytes() const override { return to_.frame_bytes(); }
  int window() const override { return to_.window(); }
  // A look that finds nothing is no step: how many there are is chance.
  std::byte* Reserve(int peer) override {
    std::byte* room = to_.Reserve(peer);
    if (room != nullptr) stepper_.Step("room");
    return room;
  }
  void Post(int peer, const FrameTag& tag, size_t nbytes) override { stepper_.Step("post"), to_.Post(peer, tag, nbytes); }
  bool Poll(int peer, Frame* frame) override {
    if (!to_.Poll(peer, frame)) return false;
    stepper_.Step("receive");
    return true;
  }
  void Release(int peer) override { stepper_.Step("release"), to_.Release(peer); }
  bool HasLeft(int peer) const override { return to_.HasLeft(peer); }
  void Wait(int peer, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) override { to_.Wait(peer, is_for_room, awaited, slice_ns); }
  int HeldUpBy(int peer) const override { return to_.HeldUpBy(peer); }
  void Settle() override { stepper_.Step("settle"), to_.Settle(); }

 private:
  Transport& to_;
  Stepper& stepper_;
};

/// The thread of a rank that moves frames between its mailbox and a socket for each rank of another node.
class Carrier {
 public:
  Carrier(std::shared_ptr<Mailbox> mailbox, std::map<int, int> sockets, std::map<int, pid_t> pids, Stepper& stepper)
      : mailbox_(std::move(mailbox)), sockets_(std::move(sockets)), pids_(std::move(pids)), stepper_(stepper), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    mailbox_->Serve([this] { Wake(); });
    thread_ = std::thread([this] { Run(); });
  }
  /// What was sent still goes out.
  void Close() {
    if (!thread_.joinable()) return;
    is_closing_.store(true);
    Wake();
    thread_.join();
    mailbox_->Stop();
    for (const auto& [rank, fd] : sockets_) close(fd);
  }
  ~Carrier() { Close(); }

 private:
  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof one);
  }
  void Lose(int rank) {
    if (is_closing_.load() || !lost_.emplace(rank, true).second) return;
    mailbox_->Lost(rank, {HostName(), pids_[rank], "the connection was lost"});
  }
  void Run() {
    std::vector<std::byte> buffer(mailbox_->message_bytes());
    for (;;) {
      const bool is_last = is_closing_.load();
      Mailbox::Outgoing out;
      while (mailbox_->Take(&out)) {
        const bool is_data = out.ring != nullptr;
        if (is_data) stepper_.Frame("send");
        const std::byte* data = is_data ? out.ring->data + out.begin : out.bytes.data();
        // That nobody reads it any more is told by the end of what can be read, which comes after the peer's last word.
        [[maybe_unused]] const ssize_t sent = send(sockets_[out.peer], data, out.nbytes, MSG_NOSIGNAL);
      }
      std::vector<uint64_t> released;
      mailbox_->TakeReleased(&released);
      for (uint64_t keep : released) kept_.erase(keep);
      if (is_last) return;
      std::vector<pollfd> polled = {{wake_.get(), POLLIN, 0}};
      std::vector<int> ranks = {-1};
      for (const auto& [rank, fd] : sockets_) {
        if (!lost_.contains(rank)) polled.push_back({fd, POLLIN, 0}), ranks.push_back(rank);
      }
      poll(polled.data(), polled.size(), -1);
      uint64_t count;
      if (polled[0].revents != 0) [[maybe_unused]] const ssize_t taken = read(wake_.get(), &count, sizeof count);
      for (size_t i = 1; i < polled.size(); i++) {
        if (polled[i].revents != 0) Receive(ranks[i], polled[i].fd, buffer);
      }
    }
  }
  void Receive(int rank, int fd, std::vector<std::byte>& buffer) {
    const ssize_t nbytes = recv(fd, buffer.data(), buffer.size(), MSG_DONTWAIT);
    // A peer that closes with frames unread resets, once; what it sent before still comes, and then the end.
    if (nbytes < 0 && (errno == EAGAIN || errno == ECONNRESET)) return;
    if (nbytes <= 0) return Lose(rank);
    if (nbytes > static_cast<ssize_t>(sizeof(FrameHeader))) stepper_.Frame("deliver");
    const uint64_t keep = ++last_keep_;
    std::vector<std::byte>& message = kept_[keep];
    message.assign(buffer.begin(), buffer.begin() + nbytes);
    if (!mailbox_->Deliver(message.data(), message.size(), keep)) kept_.erase(keep);
  }

  const std::shared_ptr<Mailbox> mailbox_;
  std::map<int, int> sockets_;  // by the rank of the job
  std::map<int, pid_t> pids_;
  std::map<int, bool> lost_;
  Stepper& stepper_;
  UniqueFd wake_;
  std::atomic<bool> is_closing_{false};
  std::map<uint64_t, std::vector<std::byte>> kept_;
  uint64_t last_keep_ = 0;
  std::thread thread_;
};

/// What all ranks of a case have: made before they are forked, for the group that is struck and for the one after it.
struct World {
  std::vector<Arena> arenas[2], tensors[2];       // [ranks]
  int sockets[2][kMostRanks][kMostRanks];         // [a][b]: a's end of its connection to b
};

/// One group on this rank, from its begin to its end.
class Group {
 public:
  Group(World& world, int turn, const Nodes& nodes, const std::vector<int>& members, int rank, const pid_t* pids, Stepper& stepper) : tensors(world, turn, members) {
    const int job_rank = members[static_cast<size_t>(rank)];
    if (Status s = Layout::Create(rank, nodes, &layout); !s.ok()) Fatal(s);
    const std::vector<int>& locals = layout.nodes[static_cast<size_t>(layout.node)];
    CommConfig config;
    config.rank = layout.local;
    config.world_size = static_cast<int>(locals.size());
    config.slot_bytes = kSlotBytes;
    config.names = locals;
    std::vector<Arena> views;
    std::vector<PeerProcess> peers;
    for (int local : locals) {
      const int member = members[static_cast<size_t>(local)];
      views.push_back(Arena::View(world.arenas[turn][static_cast<size_t>(member)]));
      PeerProcess peer;
      peer.pid = pids[member];
      if (member != job_rank) peer.pidfd = UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pids[member], 0)));
      peers.push_back(std::move(peer));
    }
    std::unique_ptr<Communicator> made;
    if (Status s = Communicator::Create(config, std::move(views), std::move(peers), &made); !s.ok()) Fatal(s);
    comm = std::move(made);
    fabric = std::make_unique<SteppedFabric>(*comm, stepper);
    context = {fabric.get(), kScalarKernels.reduce, kScalarKernels.copy, 0, &tensors};
    context.from_tensor_bytes = 256;
    context.into_tensor_bytes = 256;
    if (layout.num_nodes() == 1) return;
    Mailbox::Config mail;
    mail.job = 77;
    mail.rank = rank;
    mail.world_size = layout.world_size();
    mail.frame_bytes = kFrameBytes;
    mailbox = std::make_shared<Mailbox>(mail);
    std::vector<int> remote;
    std::map<int, int> sockets;
    std::map<int, pid_t> processes;
    for (int other = 0; other < layout.world_size(); other++) {
      const bool is_remote = layout.node_of[static_cast<size_t>(other)] != layout.node;
      remote.push_back(is_remote ? other : -1);
      if (!is_remote) continue;
      sockets[other] = world.sockets[turn][job_rank][members[static_cast<size_t>(other)]];
      processes[other] = pids[members[static_cast<size_t>(other)]];
    }
    const auto on_failure = [broken = std::weak_ptr(comm)](Status reason, int culprit, const char* operation, uint64_t sequence) {
      if (const std::shared_ptr<Communicator> group = broken.lock()) (void)group->Break(std::move(reason), culprit, operation, sequence);
    };
    if (Status s = mailbox->Open(2, remote, rank, on_failure, &stream); !s.ok()) Fatal(s);
    stream->TellHeldUp([held = std::weak_ptr(comm)] {
      const std::shared_ptr<Communicator> group = held.lock();
      return group != nullptr ? group->HeldUpBy() : -1;
    });
    comm->OnFailure([told = stream, group = std::weak_ptr(comm)] {
      if (const std::shared_ptr<Communicator> broken = group.lock()) told->TellFailure(broken->failure());
    });
    transport = std::make_unique<SteppedTransport>(*stream, stepper);
    network.reset(new NetworkContext{context, kScalarKernels.reduce_staged, kScalarKernels.reduce_to_q8, kScalarKernels.reduce_from_q8, transport.get(), &layout});
    carrier = std::make_unique<Carrier>(mailbox, std::move(sockets), std::move(processes), stepper);
  }

  Status Run(Operation operation, int64_t timeout_ms) {
    if (comm->failed()) return comm->failure();  // as CommHandle::Usable
    operation.history = history;
    operation.chunk_bytes = network != nullptr ? kNetworkChunk : kNodeChunk;
    const Deadline deadline = Deadline::AfterMs(timeout_ms);
    if (network != nullptr) {
      history = HistoryAfter(operation);
      return RunHierarchical(*network, operation, next_number++, deadline);
    }
    operation.sequence = next_sequence;
    next_sequence += SequencesOf(operation, comm->world_size());
    history = HistoryAfter(operation);
    return Finish(context, operation, TryStart(context, operation), deadline);
  }

  /// As CommHandle::Shutdown does.
  void Close() {
    if (stream != nullptr && !comm->failed()) stream->Leave();
    comm->Stop();
    comm->Close();
    if (carrier != nullptr) carrier->Close();
  }
  ~Group() { Close(); }

  static void Fatal(const Status& status) {
    std::fprintf(stderr, "a group was not made: %s\n", status.message().c_str());
    std::_Exit(3);
  }

  struct RankTensors final : Tensors {
    RankTensors(World& world, int turn, const std::vector<int>& members) {
      for (int member : members) all.push_back(world.tensors[turn][static_cast<size_t>(member)].data());
    }
    Status Find(uint32_t id, int rank, const Deadline&, std::byte** data) override {
      *data = all[static_cast<size_t>(rank)] + (id == 1 ? 0 : kTensorBytes);
      return Status::Ok();
    }
    std::vector<std::byte*> all;  // tensor 1 and behind it tensor 2, of each rank
  };

  RankTensors tensors;
  Layout layout;
  std::shared_ptr<Communicator> comm;
  std::unique_ptr<SteppedFabric> fabric;
  OperationContext context;
  std::shared_ptr<Mailbox> mailbox;
  std::shared_ptr<Mailbox::Stream> stream;
  std::unique_ptr<SteppedTransport> transport;
  std::unique_ptr<NetworkContext> network;
  std::unique_ptr<Carrier> carrier;
  uint64_t next_sequence = 1, next_number = 1;
  uint32_t history = 0;
};

/// One rank's process.
struct Rank {
  Shared* shared;
  const Case& one;
  int rank;
  Group* group = nullptr;
  int64_t timeout_ms;
};

void Strike(Stepper& stepper, const char* step) {
  Rank& rank = stepper.rank();
  std::snprintf(rank.shared->step, sizeof rank.shared->step, "%s", step);
  rank.shared->struck_ns.store(NowNs());
  rank.shared->has_struck.store(1);
  switch (rank.one.fault) {
    case Fault::kKill: kill(getpid(), SIGKILL); break;
    case Fault::kStop:
    case Fault::kBrief: kill(getpid(), SIGSTOP); break;
    case Fault::kExit: std::_Exit(0);
    case Fault::kException: std::_Exit(7);  // as node ends
    case Fault::kAbortSignal: std::abort();
    case Fault::kClose:
      rank.group->Close();
      std::_Exit(0);
    case Fault::kGiveUp: rank.group->comm->Abort(Status(Code::kAborted, "on purpose").Number("rank", rank.rank)); break;
    case Fault::kNone:
    case Fault::kCount:
    case Fault::kOperation: break;
  }
}

// ---- calls and what comes of them

// Small integers: sums of four ranks are exact in bf16.
float Value(int rank, size_t i) { return static_cast<float>((static_cast<size_t>(rank) * 5 + i) % 16); }

void Store(std::byte* data, DType dtype, size_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kF32) std::memcpy(data + 4 * i, &bits, 4);
  else std::memcpy(data + 2 * i, &half, 2);
}

float Load(const std::byte* data, DType dtype, size_t i) {
  uint32_t bits = 0;
  if (dtype == DType::kF32) std::memcpy(&bits, data + 4 * i, 4);
  else std::memcpy(reinterpret_cast<std::byte*>(&bits) + 2, data + 2 * i, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// A call of one algorithm with its memory, and its closed form.
class Call {
 public:
  /// `extra`: elements more than the others say.
  Call(const Algorithm& algorithm, Group& group, size_t extra) : algorithm_(algorithm), world_(group.layout.world_size()), rank_(group.layout.rank) {
    const bool is_network = group.network != nullptr;
    const auto ranks = static_cast<size_t>(world_);
    operation_.op = algorithm.op;
    operation_.dtype = algorithm.dtype;
    operation_.algorithm = algorithm.number;
    operation_.root = algorithm.op == CollectiveOp::kMessage ? 0 : 1;
    std::byte* mine = group.tensors.all[static_cast<size_t>(rank_)];
    data_.resize(kTensorBytes), output_.resize(kTensorBytes);
    operation_.data = algorithm.is_tensor ? mine : data_.data();
    std::byte* output = algorithm.is_tensor ? mine + kTensorBytes : output_.data();
    if (algorithm.is_tensor) operation_.source = 1;
    part_ = (is_network ? 200 : 80) + extra;
    switch (algorithm.op) {
      case CollectiveOp::kBarrier: break;
      case CollectiveOp::kBatch: PlanList(extra); break;
      case CollectiveOp::kBroadcast:
      case CollectiveOp::kMessage:
      case CollectiveOp::kReduce: operation_.count = 300 + extra; break;
      case CollectiveOp::kAllReduce:
        operation_.count = (is_network ? 600 : 300) + extra;
        if (static_cast<AllReduceAlgorithm>(algorithm.number) == AllReduceAlgorithm::kTwoShotInPlace && !is_network) operation_.parts = &group.tensors.all, operation_.tensor = 1;
        break;
      default:
        operation_.count = part_ * ranks;
        operation_.output = output;
        if (algorithm.is_tensor && algorithm.op == CollectiveOp::kGather && rank_ == operation_.root) operation_.target = 2;
        if (algorithm.is_ragged) Unequal();
    }
    for (size_t i = 0; i < kTensorBytes / 4; i++) Store(operation_.data, algorithm.dtype, i, Value(rank_, i));
  }

  const Operation& operation() const { return operation_; }

  /// True when this rank has what the call promises.
  bool IsRight() const {
    const bool is_root = rank_ == operation_.root;
    const auto all = [&](const std::byte* data, size_t count, auto&& expected) {
      for (size_t i = 0; i < count; i++) {
        if (Load(data, algorithm_.dtype, i) != expected(i)) return false;
      }
      return true;
    };
    const auto sum = [&](size_t i) {
      float total = 0;
      for (int r = 0; r < world_; r++) total += Value(r, i);
      return total;
    };
    const auto element = static_cast<size_t>(ElementBytes(algorithm_.dtype));
    const auto from = [&](int r) { return PartOf(operation_, r, world_); };
    switch (algorithm_.op) {
      case CollectiveOp::kAllReduce: return all(operation_.data, operation_.count, sum);
      case CollectiveOp::kReduce: return !is_root || all(operation_.data, operation_.count, sum);
      case CollectiveOp::kBroadcast:
      case CollectiveOp::kMessage: return all(operation_.data, operation_.count, [&](size_t i) { return Value(operation_.root, i); });
      case CollectiveOp::kAllGather:
      case CollectiveOp::kGather:
        for (int r = 0; r < world_ && (is_root || algorithm_.op == CollectiveOp::kAllGather); r++) {
          if (!all(operation_.output + from(r).begin, from(r).nbytes / element, [&](size_t i) { return Value(r, i); })) return false;
        }
        return true;
      case CollectiveOp::kScatter: return all(operation_.output, part_, [&](size_t i) { return Value(operation_.root, static_cast<size_t>(rank_) * part_ + i); });
      case CollectiveOp::kReduceScatter: return all(operation_.output, part_, [&](size_t i) { return sum(static_cast<size_t>(rank_) * part_ + i); });
      case CollectiveOp::kAllToAll:
        for (int r = 0; r < world_; r++) {
          const size_t begin = algorithm_.is_ragged ? output_offsets_[static_cast<size_t>(r)] : static_cast<size_t>(r) * part_;
          const size_t count = algorithm_.is_ragged ? Sent(r, rank_) : part_;
          size_t sent = static_cast<size_t>(rank_) * part_;
          if (algorithm_.is_ragged) {
            sent = 0;
            for (int before = 0; before < rank_; before++) sent += Sent(r, before);
          }
          if (!all(operation_.output + begin * element, count, [&](size_t i) { return Value(r, sent + i); })) return false;
        }
        return true;
      case CollectiveOp::kBatch:
        return all(data_.data(), 40, sum) && all(data_.data() + 400, 30, [&](size_t i) { return Value(1, 100 + i); }) &&
               all(data_.data() + 1200, 300, [&](size_t i) { return sum(300 + i); });
      default: return true;
    }
  }

 private:
  static size_t Sent(int from, int to) { return static_cast<size_t>(40 + 10 * from + 3 * to); }

  void Unequal() {
    const auto ranks = static_cast<size_t>(world_);
    offsets_.assign(ranks + 1, 0), output_offsets_.assign(ranks + 1, 0);
    operation_.layout = 9;
    operation_.offsets = offsets_.data();
    if (algorithm_.op != CollectiveOp::kAllToAll) {
      for (size_t r = 0; r < ranks; r++) offsets_[r + 1] = offsets_[r] + part_ - 13 * r;
      operation_.count = offsets_[ranks];
      return;
    }
    operation_.count = part_ - 80;  // nothing but what was to be said wrongly
    for (int r = 0; r < world_; r++) {
      offsets_[static_cast<size_t>(r) + 1] = offsets_[static_cast<size_t>(r)] + Sent(rank_, r);
      output_offsets_[static_cast<size_t>(r) + 1] = output_offsets_[static_cast<size_t>(r)] + Sent(r, rank_);
      for (int to = 0; to < world_; to++) {
        operation_.count += Sent(r, to);
        operation_.largest_part = std::max(operation_.largest_part, 4 * Sent(r, to));
      }
    }
    operation_.output_offsets = output_offsets_.data();
  }

  // Two that share a slot, and one of several chunks.
  void PlanList(size_t extra) {
    std::vector<Operation> list(3);
    for (Operation& one : list) one.chunk_bytes = kNodeChunk, one.root = 1, one.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kTwoShot);
    list[0].op = CollectiveOp::kAllReduce, list[0].data = data_.data(), list[0].count = 40 + extra;
    list[1].op = CollectiveOp::kBroadcast, list[1].data = data_.data() + 400, list[1].count = 30;
    list[2].op = CollectiveOp::kAllReduce, list[2].data = data_.data() + 1200, list[2].count = 300;
    std::byte* data = operation_.data;
    PlanBatch(std::move(list), world_, kNodeChunk, &batch_, &operation_);
    operation_.data = data;
  }

  const Algorithm& algorithm_;
  const int world_, rank_;
  Operation operation_;
  Batch batch_;
  size_t part_ = 0;
  std::vector<std::byte> data_, output_;
  std::vector<uint64_t> offsets_, output_offsets_;
};

// ---- one rank, and what it must see

int Entries(const char* folder) {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) count++;
  return count;
}

double NumberOf(const Status& status, const char* key) {
  for (const auto& [name, value] : status.numbers()) {
    if (std::strcmp(name, key) == 0) return value;
  }
  return -1;
}
std::string TextOf(const Status& status, const char* key) {
  for (const auto& [name, value] : status.texts()) {
    if (std::strcmp(name, key) == 0) return value;
  }
  return "";
}

/// Empty: the failure is what this fault is to give.
std::string WrongWith(const Status& failure, const Rank& rank) {
  const bool is_victim = rank.rank == rank.one.victim;
  const std::string victim = std::to_string(rank.one.victim);
  Code code = Code::kPeerLost;
  switch (rank.one.fault) {
    case Fault::kStop:
      // Its own deadline was over as well when it went on: whom it names is chance.
      if (is_victim) return failure.code() == Code::kTimeout || failure.code() == Code::kPeerLost ? "" : "the stopped rank has no such error";
      if (failure.code() != Code::kTimeout) return "not ERR_TIMEOUT";
      if (TextOf(failure, "lateRanks") == victim) return "";
      // Known limit: of three ranks or more, one that waits for a rank which itself waits for the stopped one may give up before it has heard of that. Counted.
      if (WorldSize(*rank.one.nodes) > 2 && !TextOf(failure, "lateRanks").empty()) {
        rank.shared->misnamed.store(1);
        return "";
      }
      return "not the victim alone is late";
    case Fault::kGiveUp: code = Code::kAborted; break;
    case Fault::kCount:
    case Fault::kOperation: return failure.code() == Code::kMismatch ? "" : "not ERR_MISMATCH";
    default: break;
  }
  if (failure.code() != code) return "another code";
  if (code == Code::kAborted && is_victim) return "";
  if (NumberOf(failure, "rank") != rank.one.victim) return "another rank is named";
  if (code == Code::kAborted) return "";
  if (TextOf(failure, "operation").empty() || NumberOf(failure, "sequence") < 0) return "no operation or sequence";
  // Across nodes one that closes in order tells neither process nor host, and whoever saw it first tells the others.
  const bool may_lack = rank.one.fault == Fault::kClose && rank.one.nodes->size() > 1;
  const double pid = NumberOf(failure, "pid");
  if (pid != rank.shared->pids[rank.one.victim] && !(may_lack && pid < 0)) return "another process is named";
  const std::string host = TextOf(failure, "host");
  if (host != HostName() && !(may_lack && host.empty())) return "another host is named";
  return "";
}

/// The numbers of the ranks in a group of `members`, node by node.
Nodes Without(const Nodes& nodes, const std::vector<int>& members) {
  Nodes left;
  for (const std::vector<int>& ranks : nodes) {
    std::vector<int> node;
    for (int rank : ranks) {
      const auto at = std::find(members.begin(), members.end(), rank);
      if (at != members.end()) node.push_back(static_cast<int>(at - members.begin()));
    }
    if (!node.empty()) left.push_back(std::move(node));
  }
  std::sort(left.begin(), left.end());
  return left;
}

void RunRank(World& world, Shared* shared, const Case& one, int rank_number) {
  Rank rank{shared, one, rank_number, nullptr, one.fault == Fault::kStop ? kShortMs : kLongMs};
  const int size = WorldSize(*one.nodes);
  for (int turn = 0; turn < 2; turn++) {
    for (int a = 0; a < size; a++) {
      for (int b = 0; b < size; b++) {
        if (a != rank_number && world.sockets[turn][a][b] >= 0) close(world.sockets[turn][a][b]);
      }
    }
  }
  int own_sockets = 0;
  for (int turn = 0; turn < 2; turn++) {
    for (int b = 0; b < size; b++) own_sockets += world.sockets[turn][rank_number][b] >= 0;
  }
  shared->ready.fetch_add(1);
  while (shared->go.load() == 0) sched_yield();
  const int fds = Entries("/proc/self/fd") - own_sockets;

  const bool is_victim = rank_number == one.victim;
  std::vector<int> all;
  for (int r = 0; r < size; r++) all.push_back(r);

  {
    Stepper stepper(rank, one, is_victim);
    Group group(world, 0, *one.nodes, all, rank_number, shared->pids, stepper);
    rank.group = &group;
    const auto note = [&](Status status, const char* what) {
      if (status.ok()) return true;
      shared->failed_ns[rank_number].store(NowNs());
      if (one.fault == Fault::kNone || one.fault == Fault::kBrief || shared->has_struck.load() == 0) {
        Wrong(shared, "rank %d failed in %s: %s", rank_number, what, status.message().c_str());
      } else if (const std::string wrong = WrongWith(status, rank); !wrong.empty()) {
        Wrong(shared, "rank %d, in %s: %s: code %d, rank %g, late '%s', pid %g: %s", rank_number, what, wrong.c_str(), static_cast<int>(status.code()), NumberOf(status, "rank"),
              TextOf(status, "lateRanks").c_str(), NumberOf(status, "pid"), status.message().c_str());
      }
      return false;
    };
    Operation barrier;
    Call call(*one.algorithm, group, is_victim && one.fault == Fault::kCount ? 1 : 0);
    bool is_going = note(group.Run(barrier, rank.timeout_ms), "the barrier before");
    if (is_going) {
      if (is_victim && IsMismatch(one.fault)) shared->has_struck.store(1), shared->struck_ns.store(NowNs());
      stepper.Arm(true);
      if (is_victim && one.fault == Fault::kOperation) {
        Operation other;
        other.op = one.algorithm->op == CollectiveOp::kBarrier ? CollectiveOp::kBroadcast : CollectiveOp::kBarrier;
        other.data = call.operation().data;
        is_going = note(group.Run(other, rank.timeout_ms), "another call");
      } else {
        is_going = note(group.Run(call.operation(), rank.timeout_ms), "the call");
        if (is_going && !call.IsRight() && !(is_victim && IsMismatch(one.fault))) Wrong(shared, "rank %d: a wrong result", rank_number);
      }
      shared->steps[rank_number] = stepper.steps();
      shared->frames[rank_number] = stepper.frames();
      stepper.Step("the end");
      stepper.Arm(false);
    }
    if (is_going) is_going = note(group.Run(barrier, rank.timeout_ms), "the barrier after");
    const bool is_due = shared->has_struck.load() != 0 && one.fault != Fault::kBrief && one.fault != Fault::kNone;
    // What the stopped rank was to read may have stood there already.
    if (is_going && is_due && !(is_victim && one.fault == Fault::kStop)) Wrong(shared, "rank %d: no error", rank_number);
    group.Close();
  }

  // The next group: of all that live.
  const bool is_without = shared->has_struck.load() != 0 && !IsAlive(one.fault);
  if (!(is_without && is_victim)) {
    std::vector<int> members;
    for (int r : all) {
      if (!is_without || r != one.victim) members.push_back(r);
    }
    const auto at = static_cast<int>(std::find(members.begin(), members.end(), rank_number) - members.begin());
    Stepper none(rank, one, false);
    Group group(world, 1, Without(*one.nodes, members), members, at, shared->pids, none);
    const Algorithm sum = {"allReduce", CollectiveOp::kAllReduce, static_cast<uint16_t>(AllReduceAlgorithm::kTwoShot)};
    Call call(sum, group, 0);
    const Status status = group.Run(call.operation(), kLongMs);
    if (!status.ok() || !call.IsRight()) Wrong(shared, "rank %d: the next group does not work: %s", rank_number, status.message().c_str());
  }
  // A group closes the sockets that it used; those of the one who is gone were not.
  int unused = 0;
  for (int b = 0; b < size; b++) {
    const int fd = world.sockets[1][rank_number][b];
    if (fd >= 0 && fcntl(fd, F_GETFD) >= 0) unused++;
  }
  // A thread that was joined may be listed for a moment more.
  int left = 0;
  for (int look = 0; look < 1000; look++) {
    left = Entries("/proc/self/fd") - fds - unused + Entries("/proc/self/task") - 1;
    if (left == 0) break;
    const timespec pause = {0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  shared->left[rank_number] = left;
  if (left != 0) Wrong(shared, "rank %d: %d descriptors or threads are left", rank_number, left);
  std::_Exit(0);
}

/// Forks the ranks of one case and waits for them. Runs in a process of its own.
void RunCase(const Case& one, Shared* shared) {
  const int size = WorldSize(*one.nodes);
  const rlimit no_core = {0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  World world;
  CommConfig config;
  config.slot_bytes = kSlotBytes;
  for (int turn = 0; turn < 2; turn++) {
    for (int r = 0; r < size; r++) {
      for (std::vector<Arena>* into : {&world.arenas[turn], &world.tensors[turn]}) {
        UniqueFd fd;
        std::string warning;
        const size_t nbytes = into == world.tensors + turn ? 2 * kTensorBytes : Communicator::ArenaBytes(config);
        if (Status s = Arena::Create({nbytes, "a rank", {}}, &into->emplace_back(), &fd, &warning); !s.ok()) Group::Fatal(s);
      }
      for (int b = 0; b < size; b++) world.sockets[turn][r][b] = -1;
    }
    for (size_t node = 0; node < one.nodes->size(); node++) {
      for (size_t other = node + 1; other < one.nodes->size(); other++) {
        for (int a : (*one.nodes)[node]) {
          for (int b : (*one.nodes)[other]) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) Group::Fatal(Status(Code::kIo, "no socket pair"));
            world.sockets[turn][a][b] = pair[0];
            world.sockets[turn][b][a] = pair[1];
          }
        }
      }
    }
  }
  for (int r = 0; r < size; r++) {
    const pid_t self = getpid();
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != self) std::_Exit(4);
      RunRank(world, shared, one, r);
    }
    shared->pids[r] = pid;
  }
  for (auto& turn : world.sockets) {
    for (int a = 0; a < size; a++) {
      for (int b = 0; b < size; b++) {
        if (turn[a][b] >= 0) close(turn[a][b]);
      }
    }
  }
  while (shared->ready.load() < size) sched_yield();
  shared->go.store(1);
  const int64_t end_ns = NowNs() + kHungMs * 1'000'000;
  bool has_ended[kMostRanks] = {};
  int num_ended = 0;
  bool is_stopped = false;
  while (num_ended < size) {
    int status;
    const pid_t pid = waitpid(-1, &status, WNOHANG | WUNTRACED);
    if (pid > 0) {
      const int rank = static_cast<int>(std::find(shared->pids, shared->pids + size, pid) - shared->pids);
      if (WIFSTOPPED(status)) {
        if (one.fault == Fault::kBrief) {
          const timespec pause = {0, kBriefStopNs};
          nanosleep(&pause, nullptr);
          kill(pid, SIGCONT);
        } else {
          is_stopped = true;
        }
        continue;
      }
      has_ended[rank] = true;
      num_ended++;
      if (!(rank == one.victim && shared->has_struck.load() != 0 && !IsAlive(one.fault)) && (!WIFEXITED(status) || WEXITSTATUS(status) != 0)) {
        Wrong(shared, "rank %d ended with status %x", rank, status);
      }
      continue;
    }
    // All others are through: the one that was stopped finds out what it has missed.
    if (is_stopped && num_ended == size - 1) {
      kill(shared->pids[one.victim], SIGCONT);
      is_stopped = false;
    }
    if (NowNs() > end_ns) {
      for (int r = 0; r < size; r++) {
        if (has_ended[r]) continue;
        Wrong(shared, "rank %d hangs", r);
        kill(shared->pids[r], SIGKILL);
      }
    }
    const timespec pause = {0, 100'000};
    nanosleep(&pause, nullptr);
  }
  const int64_t due_ns = one.fault == Fault::kStop ? kShortMs * 1'000'000 : 0;
  for (int r = 0; r < size; r++) {
    const int64_t failed = shared->failed_ns[r].load();
    if (failed == 0 || r == one.victim) continue;
    if (failed - shared->struck_ns.load() - due_ns > kPromisedMs * 1'000'000) Wrong(shared, "rank %d learnt it after %lld ms", r, static_cast<long long>((failed - shared->struck_ns.load()) / 1'000'000));
  }
}

std::string Describe(const Nodes& nodes) {
  std::string text;
  for (const std::vector<int>& ranks : nodes) text += (text.empty() ? "" : " + ") + std::to_string(ranks.size());
  return nodes.size() == 1 ? text + " ranks" : text + " ranks on " + std::to_string(nodes.size()) + " nodes";
}

struct Row {
  const char* world;
  std::string job;
  Fault fault;
  int times = 0, right = 0, misnamed = 0, left = 0;
  std::vector<double> ms;
};

/// Cases in processes of their own, so many at a time.
class Runner {
 public:
  explicit Runner(int most) : running_(static_cast<size_t>(most)) {
    for (Running& one : running_) {
      one.shared = static_cast<Shared*>(mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
      if (one.shared == MAP_FAILED) Group::Fatal(Status(Code::kNoMemory, "no shared memory"));
    }
  }
  ~Runner() {
    for (Running& one : running_) munmap(one.shared, sizeof(Shared));
  }

  void Start(const Case& one, Row* row) {
    Running* free = nullptr;
    for (Running& running : running_) {
      if (running.pid == 0) free = &running;
    }
    if (free == nullptr) free = WaitForOne();
    std::memset(static_cast<void*>(free->shared), 0, sizeof(Shared));
    free->one = one;
    free->row = row;
    const pid_t self = getpid();
    free->pid = fork();
    if (free->pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != self) std::_Exit(4);
      RunCase(one, free->shared);
      std::_Exit(0);
    }
  }
  void WaitForAll() {
    while (WaitForOne() != nullptr) {
    }
  }
  /// Of the case that ended last.
  const Shared& last() const { return *last_; }
  int problems() const { return problems_; }

 private:
  struct Running {
    Shared* shared = nullptr;
    pid_t pid = 0;
    Case one{};
    Row* row = nullptr;
  };
  Running* WaitForOne() {
    int status;
    const pid_t pid = waitpid(-1, &status, 0);
    if (pid < 0) return nullptr;
    for (Running& running : running_) {
      if (running.pid != pid) continue;
      running.pid = 0;
      Judge(running, status);
      return &running;
    }
    return nullptr;
  }
  void Judge(const Running& running, int status) {
    Shared& shared = *running.shared;
    last_ = &shared;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) Wrong(&shared, "the case ended with status %x", status);
    const Case& one = running.one;
    if (one.step > 0 && shared.has_struck.load() == 0) Wrong(&shared, "the victim did not come to this step");
    const int problems = shared.problems.load();
    if (problems > 0 && ++problems_ <= 40) {
      std::fprintf(stderr, "%s, %s, %s, rank %d, step %d, frame %d (%s): %d problems: %s\n", Describe(*one.nodes).c_str(), one.algorithm->name, NameOf(one.fault), one.victim, one.step,
                   one.frame, shared.step, problems, shared.text);
    }
    if (running.row == nullptr) return;
    Row& row = *running.row;
    row.times++;
    row.right += problems == 0 && shared.misnamed.load() == 0;
    row.misnamed += shared.misnamed.load();
    int64_t worst_ns = -1;
    for (int r = 0; r < kMostRanks; r++) {
      row.left += std::abs(shared.left[r]);
      if (shared.failed_ns[r].load() != 0 && r != one.victim) worst_ns = std::max(worst_ns, shared.failed_ns[r].load() - shared.struck_ns.load());
    }
    if (worst_ns >= 0) row.ms.push_back(std::max(0.0, static_cast<double>(worst_ns) / 1e6 - (one.fault == Fault::kStop ? static_cast<double>(kShortMs) : 0)));
  }

  std::vector<Running> running_;
  const Shared* last_ = nullptr;
  int problems_ = 0;
};

void Print(Row& row) {
  if (row.times == 0) return;
  std::sort(row.ms.begin(), row.ms.end());
  std::printf("{\"world\":\"%s\",\"job\":\"%s\",\"fault\":\"%s\",\"times\":%d,\"right\":%d,\"misnamed\":%d,\"left\":%d", row.world, row.job.c_str(), NameOf(row.fault), row.times, row.right, row.misnamed, row.left);
  if (!row.ms.empty()) std::printf(",\"medianMs\":%.2f,\"worstMs\":%.2f", row.ms[(row.ms.size() - 1) / 2], row.ms.back());
  std::printf("}\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  int until = argc > 2 ? std::atoi(argv[2]) : 0;
  if (every < 1 || until < 0) return std::fprintf(stderr, "usage: test_faults [EVERY [FIRST]]\n"), 2;
  constexpr Fault kFaults[] = {Fault::kKill, Fault::kStop, Fault::kBrief, Fault::kExit, Fault::kException, Fault::kAbortSignal, Fault::kClose, Fault::kGiveUp, Fault::kCount, Fault::kOperation};
  const Nodes worlds[] = {{{0, 1}}, {{0, 1, 2}}, {{0}, {1}}, {{0, 1}, {2}}, {{0, 2}, {1, 3}}};
  // A stopped rank costs a deadline of sleep: many at a time. The others are timed.
  Runner one_by_one(1), many(12);
  std::map<std::tuple<bool, std::string, Fault>, Row> rows;
  std::vector<std::tuple<bool, std::string, Fault>> order;
  for (const Nodes& nodes : worlds) {
    const bool is_network = nodes.size() > 1;
    const int size = WorldSize(nodes);
    const Algorithm* begin = is_network ? std::begin(kAcrossNodes) : std::begin(kInNode);
    const Algorithm* end = is_network ? std::end(kAcrossNodes) : std::end(kInNode);
    for (const Algorithm* algorithm = begin; algorithm != end; algorithm++) {
      if (algorithm->op == CollectiveOp::kMessage && size != 2) continue;
      one_by_one.Start({&nodes, algorithm}, nullptr);
      one_by_one.WaitForAll();
      int steps[kMostRanks], frames[kMostRanks];
      std::copy_n(one_by_one.last().steps, kMostRanks, steps);
      std::copy_n(one_by_one.last().frames, kMostRanks, frames);
      for (Fault fault : kFaults) {
        const std::tuple key(is_network, algorithm->name, fault);
        const auto [at, is_new] = rows.try_emplace(key);
        if (is_new) at->second.world = is_network ? "nodes" : "node", at->second.job = algorithm->name, at->second.fault = fault, order.push_back(key);
        Runner& runner = fault == Fault::kStop ? many : one_by_one;
        const auto strike = [&](int victim, int step, int frame) {
          if (until-- > 0) return;
          until = every - 1;
          runner.Start({&nodes, algorithm, fault, victim, step, frame}, &at->second);
        };
        for (int victim = 0; victim < size; victim++) {
          if (IsMismatch(fault)) {
            if (fault == Fault::kOperation || algorithm->op != CollectiveOp::kBarrier) strike(victim, 0, 0);
            continue;
          }
          for (int step = 1; step <= steps[victim] + 1; step++) strike(victim, step, 0);
          if (fault == Fault::kClose || fault == Fault::kGiveUp) continue;
          for (int frame = 1; frame <= frames[victim]; frame++) strike(victim, 0, frame);
        }
        runner.WaitForAll();
      }
    }
  }
  for (const auto& key : order) Print(rows.at(key));
  return one_by_one.problems() + many.problems() > 0 ? 1 : 0;
}
