// Groups across nodes with ranks as threads of one process, so that the sanitizers see both ends of every slot and every frame: the algorithms
// of hierarchical.cpp and messages over real communicators and mailboxes. In the place of sockets a thread of each rank carries messages:
// late, in batches, from the ring's own memory, with nonsense among them. Every result is compared, bit by
// bit, with what one rank would compute of all inputs. Then groups break, in every way that a network knows, and where all connections are
// whole they are made anew.
// Built and run by native.test.ts: test_network TURNS, or test_network --fault NAME with something broken on purpose that must be found.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <latch>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/breaker.h"
#include "comm/channels.h"
#include "comm/communicator.h"
#include "comm/hierarchical.h"
#include "comm/mailbox.h"
#include "comm/network_renewal.h"
#include "kernels/kernels.h"

using namespace tilerank;

namespace {

constexpr size_t kSlotBytes = 4096, kFrameBytes = 1024, kMostBytes = 12'000, kMostPart = 300;
constexpr int kGroups = 2;  // at a time, each with threads of its own, over the same mailboxes
constexpr int64_t kLongMs = 120'000;

using Nodes = std::vector<std::vector<int>>;

[[noreturn]] void Die(const std::string& what, int rank, int turn) {
  std::fprintf(stderr, "rank %d, turn %d: %s\n", rank, turn, what.c_str());
  std::_Exit(1);
}

void Check(const Status& status, int rank, int turn) {
  if (!status.ok()) Die(status.message(), rank, turn);
}

void Sleep(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// ---- what is broken on purpose

enum class Fault { kNone, kOrder, kHastyRank, kLateWrite, kHastyRelease };
constexpr std::pair<const char*, Fault> kFaults[] = {
    {"sums in another order", Fault::kOrder},
    {"a rank of the node that is not waited for", Fault::kHastyRank},
    {"a frame that is written after it was posted", Fault::kLateWrite},
    {"a frame that is read after its release", Fault::kHastyRelease},
};
Fault fault = Fault::kNone;

void ReduceStaged(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, ReduceStage stage, int32_t divisor, size_t count) {
  const void* turned[kMaxWorldSize];
  for (int32_t i = 0; i < num_sources; i++) turned[i] = sources[fault == Fault::kOrder ? num_sources - 1 - i : i];
  kScalarKernels.reduce_staged(out, turned, num_sources, dtype, op, stage, divisor, count);
}

/// A communicator whose Await lets time pass instead of looking at flags: the bytes are there, but nothing says so.
class HastyFabric final : public Fabric {
 public:
  explicit HastyFabric(Communicator& comm) : Fabric(comm.rank(), comm.world_size()), comm_(comm) {}
  std::byte* Slot(int rank, uint64_t sequence) const override { return comm_.Slot(rank, sequence); }
  Status Acquire(int lane, uint64_t sequence, const Deadline& deadline) override { return comm_.Acquire(lane, sequence, deadline); }
  bool IsAcquirable(int lane, uint64_t sequence) const override { return comm_.IsAcquirable(lane, sequence); }
  void Publish(int lane, uint64_t sequence, const OpTag& tag) override { comm_.Publish(lane, sequence, tag); }
  void Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload& payload) override { comm_.Publish(lane, sequence, tag, payload); }
  FlagPayload PayloadOf(int rank, int lane, uint64_t sequence) const override { return comm_.PayloadOf(rank, lane, sequence); }
  bool IsReady(int lane, uint64_t sequence) const override { return comm_.IsReady(lane, sequence); }
  bool IsReadyFrom(int lane, uint64_t sequence, int peer) const override { return comm_.IsReadyFrom(lane, sequence, peer); }
  Status Await(int, uint64_t, const OpTag&, const Deadline&) override {
    Sleep(20'000);
    return Status::Ok();
  }
  Status AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) override {
    return comm_.AwaitSame(lane, sequence, peer, tag, deadline);
  }
  void Consumed(int lane, uint64_t sequence) override { comm_.Consumed(lane, sequence); }
  Status AwaitConsumedBy(int lane, uint64_t sequence, int peer, const char* what, const Deadline& deadline) override {
    return comm_.AwaitConsumedBy(lane, sequence, peer, what, deadline);
  }
  void Complete(int lane, uint64_t sequence) override { comm_.Complete(lane, sequence); }
  bool failed() const override { return comm_.failed(); }
  Status failure() const override { return comm_.failure(); }
  Status Break(Status reason, int culprit, const char* operation, uint64_t sequence) override {
    return comm_.Break(std::move(reason), culprit, operation, sequence);
  }

 private:
  Communicator& comm_;
};

/// A stream whose user writes a frame once more after Post, or reads one after Release.
class HastyTransport final : public Transport {
 public:
  explicit HastyTransport(Transport& stream) : stream_(stream) {}
  void Enter(const FrameTag& tag) override { stream_.Enter(tag); }
  size_t frame_bytes() const override { return stream_.frame_bytes(); }
  int window() const override { return stream_.window(); }
  std::byte* Reserve(int peer) override { return room_ = stream_.Reserve(peer); }
  void Post(int peer, const FrameTag& tag, size_t nbytes) override {
    stream_.Post(peer, tag, nbytes);
    if (fault != Fault::kLateWrite) return;
    Sleep(3000);
    if (nbytes > 0) room_[0] ^= std::byte{1};
  }
  bool Poll(int peer, Frame* frame) override {
    if (!stream_.Poll(peer, frame)) return false;
    if (fault == Fault::kHastyRelease) {
      stream_.Release(peer);
      Sleep(3000);
    }
    return true;
  }
  void Release(int peer) override {
    if (fault != Fault::kHastyRelease) stream_.Release(peer);
  }
  bool HasLeft(int peer) const override { return stream_.HasLeft(peer); }
  void Wait(int peer, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) override { stream_.Wait(peer, is_for_room, awaited, slice_ns); }
  void Settle() override { stream_.Settle(); }

 private:
  Transport& stream_;
  std::byte* room_ = nullptr;
};

// ---- the network

/// Carries messages between mailboxes. A message stays in its ring until its receiver's thread copies it, as with a socket that copies nothing.
class Carrier {
 public:
  Carrier(std::vector<std::shared_ptr<Mailbox>> mailboxes, const Nodes& nodes, uint32_t seed) : boxes_(mailboxes.size()), node_of_(mailboxes.size()) {
    for (size_t node = 0; node < nodes.size(); node++) {
      for (int rank : nodes[node]) node_of_[static_cast<size_t>(rank)] = static_cast<int>(node);
    }
    for (size_t rank = 0; rank < boxes_.size(); rank++) {
      Box& box = boxes_[rank];
      box.mailbox = std::move(mailboxes[rank]);
      box.inbox.resize(boxes_.size());
      box.random.seed(seed + static_cast<uint32_t>(rank));
    }
    for (size_t rank = 0; rank < boxes_.size(); rank++) {
      boxes_[rank].mailbox->Serve([this, rank] { Wake(boxes_[rank]); });
      boxes_[rank].thread = std::thread([this, rank] { Run(static_cast<int>(rank)); });
    }
  }
  /// Says goodbye, and joins the threads; streams must be closed.
  ~Carrier() {
    is_parting_.store(true);
    for (Box& box : boxes_) Wake(box);
    for (Box& box : boxes_) box.thread.join();
  }

  /// That rank's thread ends as if its process did, with groups open.
  void End(int rank) { Tell(rank, &Box::must_end); }
  /// The connections to that rank break.
  void Lose(int rank) {
    boxes_[static_cast<size_t>(rank)].is_cut.store(true);
    for (Box& box : boxes_) {
      box.lost.store(rank);
      Wake(box);
    }
  }
  /// The next data frame that the rank sends never comes, or comes twice.
  void Drop(int rank) { Tell(rank, &Box::must_drop); }
  void Repeat(int rank) { Tell(rank, &Box::must_repeat); }

 private:
  struct Box {
    std::shared_ptr<Mailbox> mailbox;
    std::thread thread;
    std::mt19937 random;
    std::mutex mutex;  // guards has_work and inbox
    std::condition_variable wake;
    bool has_work = false;
    std::vector<std::deque<Mailbox::Outgoing>> inbox;  // by sender
    std::atomic<bool> must_end{false}, must_drop{false}, must_repeat{false}, is_cut{false};
    std::atomic<int> lost{-1};
    std::map<uint64_t, std::unique_ptr<std::byte[]>> kept;
    uint64_t next_keep = 1, refused = 0;
  };

  void Tell(int rank, std::atomic<bool> Box::*what) {
    Box& box = boxes_[static_cast<size_t>(rank)];
    (box.*what).store(true);
    Wake(box);
  }
  static void Wake(Box& box) {
    {
      std::lock_guard lock(box.mutex);
      box.has_work = true;
    }
    box.wake.notify_one();
  }

  static bool IsData(const Mailbox::Outgoing& outgoing) { return outgoing.ring != nullptr; }

  void TakeAll(Box& box, int rank) {
    Mailbox::Outgoing outgoing;
    while (box.mailbox->Take(&outgoing)) {
      Box& peer = boxes_[static_cast<size_t>(outgoing.peer)];
      if (box.is_cut.load() || peer.is_cut.load()) continue;
      if (IsData(outgoing) && box.must_drop.exchange(false)) continue;
      const bool is_twice = IsData(outgoing) && box.must_repeat.exchange(false);
      {
        std::lock_guard lock(peer.mutex);
        std::deque<Mailbox::Outgoing>& queue = peer.inbox[static_cast<size_t>(rank)];
        if (is_twice) queue.push_back(outgoing);
        queue.push_back(std::move(outgoing));
        peer.has_work = true;
      }
      peer.wake.notify_one();
      if (box.random() % 16 == 0) Sleep(box.random() % 100);
    }
  }

  // Memory of its very size, at any alignment.
  void Hand(Box& box, const std::byte* data, size_t nbytes, bool is_true) {
    const size_t shift = box.random() % 4;
    auto memory = std::make_unique<std::byte[]>(nbytes + shift);
    std::memcpy(memory.get() + shift, data, nbytes);
    const std::byte* message = memory.get() + shift;
    const uint64_t keep = box.next_keep++;
    box.kept.emplace(keep, std::move(memory));
    const bool is_kept = box.mailbox->Deliver(message, nbytes, keep);
    if (!is_kept) box.kept.erase(keep);
    if (!is_true) {
      box.refused++;
      if (is_kept || box.mailbox->refused() != box.refused) Die("a message that is none was taken", -1, 0);
    }
  }

  void HandNonsense(Box& box, const std::byte* like, size_t nbytes) {
    std::vector<std::byte> nonsense(like, like + nbytes);
    switch (box.random() % 3) {
      case 0: nonsense.resize(box.random() % nbytes); break;
      case 1: nonsense.push_back(std::byte{0}); break;
      default: nonsense[box.random() % sizeof(FrameHeader)] ^= static_cast<std::byte>(1 + box.random() % 255);
    }
    Hand(box, nonsense.data(), nonsense.size(), false);
  }

  void DeliverSome(Box& box) {
    const size_t first = box.random() % boxes_.size();
    for (size_t step = 0; step < boxes_.size(); step++) {
      const size_t from = (first + step) % boxes_.size();
      for (uint32_t batch = 1 + box.random() % 4; batch > 0; batch--) {
        Mailbox::Outgoing outgoing;
        {
          std::lock_guard lock(box.mutex);
          if (box.inbox[from].empty()) break;
          outgoing = std::move(box.inbox[from].front());
          box.inbox[from].pop_front();
          box.has_work = true;  // look again
        }
        if (box.random() % 16 == 0) Sleep(box.random() % 200);
        const std::byte* data = outgoing.ring != nullptr ? outgoing.ring->data + outgoing.begin : outgoing.bytes.data();
        if (box.random() % 32 == 0) HandNonsense(box, data, outgoing.nbytes);
        Hand(box, data, outgoing.nbytes, true);
      }
    }
  }

  void Run(int rank) {
    Box& box = boxes_[static_cast<size_t>(rank)];
    std::vector<uint64_t> keeps;
    bool has_said = false, has_parted = false;
    while (!box.must_end.load() && parted_.load() + ended_.load() < static_cast<int>(boxes_.size())) {
      {
        std::unique_lock lock(box.mutex);
        box.wake.wait_for(lock, std::chrono::milliseconds(1), [&] { return box.has_work; });
        box.has_work = false;
      }
      if (const int lost = box.lost.exchange(-1); lost >= 0 && lost != rank && !IsNeighbour(lost, rank)) {
        box.mailbox->Lost(lost, {"elsewhere", 1, "the connection broke"});
      }
      TakeAll(box, rank);
      DeliverSome(box);
      box.mailbox->TakeReleased(&keeps);
      for (uint64_t keep : keeps) {
        if (box.kept.erase(keep) != 1) Die("a frame was released that was not kept, or twice", rank, 0);
      }
      if (is_parting_.load() && !has_parted) {
        bool is_over = true;
        for (size_t peer = 0; peer < boxes_.size(); peer++) {
          if (IsNeighbour(static_cast<int>(peer), rank) || boxes_[peer].is_cut.load() || boxes_[peer].must_end.load() || box.is_cut.load()) continue;
          if (!has_said) box.mailbox->SayGoodbye(static_cast<int>(peer));
          is_over &= box.mailbox->HasParted(static_cast<int>(peer));
        }
        has_said = true;
        if (is_over) {
          has_parted = true;
          parted_.fetch_add(1);
          for (Box& other : boxes_) Wake(other);
        }
      }
    }
    box.mailbox->Stop();
    TakeAll(box, rank);  // why a group broke still goes out
    if (box.must_end.load()) ended_.fetch_add(has_parted ? 0 : 1);
    box.mailbox->TakeReleased(&keeps);
    for (uint64_t keep : keeps) box.kept.erase(keep);
    if (!box.must_end.load() && !box.kept.empty()) Die(std::to_string(box.kept.size()) + " frames were never released", rank, 0);
  }
  bool IsNeighbour(int one, int other) const { return node_of_[static_cast<size_t>(one)] == node_of_[static_cast<size_t>(other)]; }

  std::deque<Box> boxes_;
  std::vector<int> node_of_;
  std::atomic<bool> is_parting_{false};
  std::atomic<int> parted_{0}, ended_{0};
};

// ---- groups

/// Ranks on nodes, and the network between them.
struct Job {
  Nodes nodes;
  int size = 0;
  std::vector<std::shared_ptr<Mailbox>> mailboxes;
  std::vector<std::vector<Arena>> arenas;  // [groups][ranks]
  std::unique_ptr<Carrier> wire;

  Job(const Nodes& on, uint32_t seed) : nodes(on) {
    for (const std::vector<int>& ranks : nodes) size += static_cast<int>(ranks.size());
    for (int rank = 0; rank < size; rank++) {
      Mailbox::Config config;
      config.job = 0x1234567890abcdefull + seed;
      config.rank = rank;
      config.world_size = size;
      config.frame_bytes = kFrameBytes;
      mailboxes.push_back(std::make_shared<Mailbox>(config));
    }
    arenas.resize(kGroups);
    for (std::vector<Arena>& group : arenas) {
      group.resize(static_cast<size_t>(size));
      for (Arena& arena : group) Check(Arena::CreateLocal(Communicator::ArenaBytes(ConfigOf(1, 0)), &arena), 0, -1);
    }
    wire = std::make_unique<Carrier>(mailboxes, nodes, seed);
  }
  static CommConfig ConfigOf(int locals, int local) {
    CommConfig config;
    config.world_size = locals;
    config.rank = local;
    config.slot_bytes = kSlotBytes;
    return config;
  }
};

/// A rank's place in a group, as CommHandle has it.
class Member {
 public:
  Member(Job& job, uint64_t group, int rank, int spin_us) : mailbox_(job.mailboxes[static_cast<size_t>(rank)]) {
    Check(Layout::Create(rank, job.nodes, &layout_), rank, -1);
    std::vector<int> remote;
    for (int r = 0; r < job.size; r++) remote.push_back(layout_.node_of[static_cast<size_t>(r)] == layout_.node ? -1 : r);
    const auto on_failure = [breaker = breaker_](Status reason, int culprit, const char* operation, uint64_t sequence) {
      breaker->Break(std::move(reason), culprit, operation, sequence);
    };
    Check(mailbox_->Open(2 * group, remote, rank, on_failure, &stream_), rank, -1);
    Check(mailbox_->Open(2 * group + 1, std::move(remote), rank, on_failure, &messages_), rank, -1);
    const std::vector<int>& locals = layout_.nodes[static_cast<size_t>(layout_.node)];
    CommConfig config = Job::ConfigOf(static_cast<int>(locals.size()), layout_.local);
    config.spin_us = spin_us;
    config.names = locals;
    std::vector<Arena> views;
    for (int local : locals) views.push_back(Arena::View(job.arenas[group][static_cast<size_t>(local)]));
    std::unique_ptr<Communicator> made;
    Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(locals.size()), &made), rank, -1);
    comm_ = std::move(made);
    comm_->OnFailure([flag = is_cancelled_, stream = stream_, communicator = std::weak_ptr(comm_)] {
      flag->store(true);
      if (const std::shared_ptr<Communicator> broken = communicator.lock(); broken != nullptr) stream->TellFailure(broken->failure());
    });
    Fabric* fabric = comm_.get();
    if (fault == Fault::kHastyRank) hasty_fabric_ = std::make_unique<HastyFabric>(*comm_), fabric = hasty_fabric_.get();
    Transport* transport = stream_.get();
    if (fault == Fault::kLateWrite || fault == Fault::kHastyRelease) hasty_transport_ = std::make_unique<HastyTransport>(*stream_), transport = hasty_transport_.get();
    const OperationContext context = {fabric, kScalarKernels.reduce, kScalarKernels.copy, 0};
    network_.reset(new NetworkContext{context, &ReduceStaged, kScalarKernels.reduce_to_q8, kScalarKernels.reduce_from_q8, transport, &layout_});
    breaker_->Arm(comm_);
    Channels::Config options;
    options.communicator = comm_;
    options.is_cancelled = is_cancelled_;
    options.copy = kScalarKernels.copy;
    options.members = options.names = locals;
    options.rank = rank;
    options.transport = messages_;
    options.chunk_bytes = kSlotBytes;
    channels_ = std::make_unique<Channels>(options);
  }
  ~Member() {
    if (!comm_->failed()) {
      stream_->Leave();
      messages_->Leave();
    }
    comm_->Stop();
    channels_->Stop();
    channels_->Close();
    comm_->Close();
  }

  Status Run(const Operation& operation, uint64_t number, int64_t timeout_ms) { return RunHierarchical(*network_, operation, number, Deadline::AfterMs(timeout_ms)); }
  std::unique_ptr<NetworkRenewal> Renewed() const {
    stream_->TellFailure(comm_->failure());  // however late the thread that found it
    comm_->Stop();
    std::vector<int> members;
    for (int rank = 0; rank < layout_.world_size(); rank++) members.push_back(rank);
    return std::make_unique<NetworkRenewal>(comm_, mailbox_, stream_, messages_, layout_, std::move(members));
  }
  const Layout& layout() const { return layout_; }
  Communicator& comm() { return *comm_; }
  Channels& channels() { return *channels_; }

 private:
  const std::shared_ptr<Mailbox> mailbox_;
  Layout layout_;
  const std::shared_ptr<Breaker> breaker_ = std::make_shared<Breaker>();
  const std::shared_ptr<std::atomic<bool>> is_cancelled_ = std::make_shared<std::atomic<bool>>(false);
  std::shared_ptr<Mailbox::Stream> stream_, messages_;
  std::shared_ptr<Communicator> comm_;
  std::unique_ptr<HastyFabric> hasty_fabric_;
  std::unique_ptr<HastyTransport> hasty_transport_;
  std::unique_ptr<NetworkContext> network_;
  std::unique_ptr<Channels> channels_;
};

template <class Body>
void OnThreads(int count, Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; i++) threads.emplace_back([&, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

// ---- inputs and what comes of them

uint64_t Hash(uint64_t value) {
  value = (value ^ value >> 31) * 0x9e3779b97f4a7c15ull;
  value = (value ^ value >> 29) * 0xbf58476d1ce4e5b9ull;
  return value ^ value >> 32;
}

// Numbers whose sums depend on their order, with a NaN, an infinity or a zero among them; integers of all bits.
void Fill(std::byte* data, DType dtype, int rank, int turn, size_t count) {
  const auto element = static_cast<size_t>(ElementBytes(dtype));
  for (size_t i = 0; i < count; i++) {
    const uint64_t hash = Hash(static_cast<uint64_t>(rank) << 48 ^ static_cast<uint64_t>(turn) << 32 ^ i);
    uint64_t bits = hash;
    if (IsFloat(dtype)) {
      const double number = static_cast<double>(static_cast<int64_t>(hash % 20'001) - 10'000) / 997;
      const auto single = static_cast<float>(number);
      uint32_t half;
      std::memcpy(&half, &single, sizeof half);
      // Of f16 and f32 and all others the exponent of ones is in another place; a rare value is made of that alone.
      const bool is_rare = hash >> 32 == 0 || (hash >> 32) % 61 == 0;
      if (dtype == DType::kF64) std::memcpy(&bits, &number, sizeof bits);
      if (dtype == DType::kF32) bits = is_rare ? uint64_t{0x7f800000} | (hash >> 40 & 1) << 31 | (hash >> 41 & 1) : half;
      if (dtype == DType::kBf16) bits = is_rare ? uint64_t{0x7f80} | (hash >> 40 & 1) << 15 | (hash >> 41 & 1) : half >> 16;
      if (dtype == DType::kF16) bits = is_rare ? uint64_t{0x8000} : (hash & 0x83ff) | (11 + (hash >> 50) % 8) << 10;
    }
    std::memcpy(data + i * element, &bits, element);
  }
}

/// The same where sums travel as Q8: each node's is rounded to it, and in two steps the finished sum as well.
void ReferenceQ8(std::byte* out, const Nodes& nodes, const std::vector<std::vector<std::byte>>& inputs, const Operation& operation) {
  std::vector<std::vector<std::byte>> partials;
  const void* sources[kMaxWorldSize];
  int32_t world = 0;
  for (const std::vector<int>& ranks : nodes) {
    for (size_t i = 0; i < ranks.size(); i++) sources[i] = inputs[static_cast<size_t>(ranks[i])].data();
    kScalarKernels.reduce_to_q8(partials.emplace_back(Q8Bytes(operation.count) + 1).data(), sources, static_cast<int32_t>(ranks.size()), operation.dtype, operation.count);
    world += static_cast<int32_t>(ranks.size());
  }
  for (size_t node = 0; node < nodes.size(); node++) sources[node] = partials[node].data();
  const int32_t divisor = operation.reduce_op == ReduceOp::kAvg ? world : 1, num_nodes = static_cast<int32_t>(nodes.size());
  if (operation.algorithm != static_cast<uint16_t>(NetworkAlgorithm::kTwoStep)) {
    return kScalarKernels.reduce_from_q8(out, sources, num_nodes, operation.dtype, divisor, operation.count);
  }
  std::vector<float> sums(operation.count + 1);
  kScalarKernels.reduce_from_q8(sums.data(), sources, num_nodes, DType::kF32, divisor, operation.count);
  const void* whole = sums.data();
  std::vector<std::byte> final(Q8Bytes(operation.count) + 1);
  kScalarKernels.reduce_to_q8(final.data(), &whole, 1, DType::kF32, operation.count);
  whole = final.data();
  kScalarKernels.reduce_from_q8(out, &whole, 1, operation.dtype, 1, operation.count);
}

/// Of all ranks' inputs: ranks of a node in order, then nodes, rounded once.
void Reference(std::byte* out, const Nodes& nodes, const std::vector<std::vector<std::byte>>& inputs, const Operation& operation) {
  std::vector<std::vector<std::byte>> partials;
  const void* sources[kMaxWorldSize];
  int world = 0;
  for (const std::vector<int>& ranks : nodes) {
    for (size_t i = 0; i < ranks.size(); i++) sources[i] = inputs[static_cast<size_t>(ranks[i])].data();
    std::vector<std::byte>& partial = partials.emplace_back(operation.count * static_cast<size_t>(PartialBytes(operation.dtype, operation.reduce_op)) + 1);
    kScalarKernels.reduce_staged(partial.data(), sources, static_cast<int32_t>(ranks.size()), operation.dtype, operation.reduce_op, ReduceStage::kPartial, 1, operation.count);
    world += static_cast<int>(ranks.size());
  }
  for (size_t node = 0; node < nodes.size(); node++) sources[node] = partials[node].data();
  kScalarKernels.reduce_staged(out, sources, static_cast<int32_t>(nodes.size()), operation.dtype, operation.reduce_op, ReduceStage::kFinal, world, operation.count);
}

constexpr CollectiveOp kOperations[] = {CollectiveOp::kAllReduce, CollectiveOp::kAllReduce, CollectiveOp::kAllReduce, CollectiveOp::kReduce,
                                        CollectiveOp::kBroadcast, CollectiveOp::kAllGather, CollectiveOp::kGather,    CollectiveOp::kScatter,
                                        CollectiveOp::kReduceScatter, CollectiveOp::kAllToAll, CollectiveOp::kBarrier};

bool HasParts(CollectiveOp op) {
  return op == CollectiveOp::kAllGather || op == CollectiveOp::kGather || op == CollectiveOp::kScatter || op == CollectiveOp::kReduceScatter || op == CollectiveOp::kAllToAll;
}

/// The messages of one turn, of which each rank sends and takes its own while a collective runs.
class Messages {
 public:
  Messages(Member& member, int turn, std::mt19937& shared) : member_(member), turn_(turn) {
    const Layout& layout = member.layout();
    Channels& channels = member.channels();
    for (int from = 0; from < layout.world_size(); from++) {
      for (int to = 0; to < layout.world_size(); to++) {
        const size_t count = shared() % 1500;
        const bool is_left_out = shared() % 3 != 0;
        if (is_left_out || layout.node_of[static_cast<size_t>(from)] == layout.node_of[static_cast<size_t>(to)]) continue;
        if (from != layout.rank && to != layout.rank) continue;
        std::vector<std::byte>& data = data_.emplace_back(4 * count + 1);
        const bool is_sender = from == layout.rank;
        if (is_sender) Fill(data.data(), DType::kU32, from, turn + 1000 * to, count);
        messages_.push_back(channels.Take(channels.OfRemote(is_sender ? to : from, is_sender), DType::kU32, data.data(), count));
      }
    }
    done_.emplace(static_cast<std::ptrdiff_t>(messages_.size()));
    for (Channels::Message& message : messages_) {
      message.channel->worker.Post([this, &message] {
        Check(member_.channels().Run(message, Deadline::AfterMs(kLongMs)), member_.layout().rank, turn_);
        done_->count_down();
      });
    }
  }
  ~Messages() {
    done_->wait();
    for (const Channels::Message& message : messages_) {
      if (message.channel->is_sender) continue;
      std::vector<std::byte> expected(message.operation.nbytes() + 1);
      Fill(expected.data(), DType::kU32, message.channel->peer, turn_ + 1000 * member_.layout().rank, message.operation.count);
      if (std::memcmp(message.operation.data, expected.data(), message.operation.nbytes()) != 0) Die("a message is wrong", member_.layout().rank, turn_);
    }
  }

 private:
  Member& member_;
  const int turn_;
  std::deque<std::vector<std::byte>> data_;
  std::deque<Channels::Message> messages_;
  std::optional<std::latch> done_;
};

void Mix(Job& job, uint64_t group, int rank, int turns, uint32_t seed) {
  std::mt19937 shared(seed), own(seed * 31 + static_cast<uint32_t>(rank));  // the same operations on all ranks
  if (own() % 2 == 0) Sleep(own() % 3000);  // frames come early
  Member member(job, group, rank, own() % 2 == 0 ? 0 : 20);
  const int world = job.size;
  const auto ranks = static_cast<size_t>(world);
  std::vector<uint64_t> offsets(ranks + 1);
  uint32_t history = 0;
  uint64_t number = 1;
  for (int turn = 0; turn < turns; turn++) {
    Operation operation;
    operation.op = kOperations[shared() % std::size(kOperations)];
    operation.dtype = static_cast<DType>(shared() % kDTypes);
    operation.reduce_op = static_cast<ReduceOp>(shared() % (IsFloat(operation.dtype) ? 5 : kReduceOps));
    operation.history = history;
    operation.root = static_cast<int>(shared() % ranks);
    operation.chunk_bytes = shared() % 2 == 0 ? kSlotBytes : 2048;
    const auto element = static_cast<size_t>(ElementBytes(operation.dtype));
    operation.count = shared() % 8 == 0 ? shared() % 3 : shared() % (kMostBytes / element);
    const bool has_parts = HasParts(operation.op);
    if (has_parts) {
      const bool are_alike = shared() % 2 == 0 || operation.op == CollectiveOp::kAllToAll;
      const size_t alike = shared() % (kMostPart + 1);
      for (size_t r = 0; r < ranks; r++) offsets[r + 1] = offsets[r] + (are_alike ? alike : shared() % 4 == 0 ? 0 : shared() % (kMostPart + 1));
      operation.count = offsets[ranks];
      if (!are_alike) operation.offsets = offsets.data(), operation.layout = static_cast<uint32_t>(shared());
    }
    if (operation.op == CollectiveOp::kBarrier) operation.count = 0;
    if (operation.op == CollectiveOp::kAllReduce) {
      operation.algorithm = static_cast<uint16_t>(NetworkAlgorithm::kLeader) + static_cast<uint16_t>(shared() % 3);
      if (shared() % 4 == 0) operation.algorithm = static_cast<uint16_t>(ChooseByWidth(member.layout(), operation));
    }
    if (const bool is_q8 = shared() % 2 == 0; is_q8 && operation.op == CollectiveOp::kAllReduce && IsFloat(operation.dtype) && operation.dtype != DType::kF64) {
      operation.wire = Wire::kQ8;
      if (operation.reduce_op != ReduceOp::kAvg) operation.reduce_op = ReduceOp::kSum;
    }
    const bool is_apart = shared() % 2 == 0;  // the result from its input
    const bool has_messages = shared() % 2 == 0;
    std::optional<Messages> messages;
    if (has_messages) messages.emplace(member, turn, shared);

    // Whole arrays of all ranks, of which the operation gives or takes parts.
    const size_t nbytes = operation.nbytes();
    std::vector<std::vector<std::byte>> inputs(ranks);
    for (size_t r = 0; r < ranks; r++) {
      inputs[r].resize(nbytes + 1);
      Fill(inputs[r].data(), operation.dtype, static_cast<int>(r), turn, operation.count);
    }
    const auto begin_of = [&](int r) { return static_cast<size_t>(offsets[static_cast<size_t>(r)]) * element; };
    const auto bytes_of = [&](int r) { return has_parts ? begin_of(r + 1) - begin_of(r) : 0; };
    const bool is_root = rank == operation.root;
    const std::vector<std::byte>& mine = inputs[static_cast<size_t>(rank)];
    std::vector<std::byte> memory, output(nbytes + 1), expected(nbytes + 1);
    const auto give = [&](const std::byte* from, size_t size) { memory.assign(from, from + size + (size < nbytes + 1 ? 1 : 0)), memory.resize(size + 1); };
    const std::byte* result = nullptr;
    size_t result_bytes = 0;
    switch (operation.op) {
      case CollectiveOp::kAllReduce:
      case CollectiveOp::kReduce:
        give(mine.data(), nbytes);
        (operation.wire == Wire::kQ8 ? ReferenceQ8 : Reference)(expected.data(), job.nodes, inputs, operation);
        if (is_apart && (is_root || operation.op == CollectiveOp::kAllReduce)) operation.output = output.data();
        result_bytes = is_root || operation.op == CollectiveOp::kAllReduce ? nbytes : 0;
        break;
      case CollectiveOp::kBroadcast:
        give(mine.data(), nbytes);
        expected = inputs[static_cast<size_t>(operation.root)];
        result_bytes = nbytes;
        break;
      case CollectiveOp::kAllGather:
      case CollectiveOp::kGather:
        // Each rank's part is what stands there in its whole array.
        for (int r = 0; r < world; r++) std::copy_n(inputs[static_cast<size_t>(r)].data() + begin_of(r), bytes_of(r), expected.data() + begin_of(r));
        give(mine.data() + begin_of(rank), bytes_of(rank));
        operation.output = output.data();
        if (!is_apart) std::copy_n(memory.data(), bytes_of(rank), output.data() + begin_of(rank)), operation.data = output.data() + begin_of(rank);
        result_bytes = is_root || operation.op == CollectiveOp::kAllGather ? nbytes : 0;
        break;
      case CollectiveOp::kScatter:
        give(mine.data(), nbytes);
        operation.output = output.data();
        std::copy_n(inputs[static_cast<size_t>(operation.root)].data() + begin_of(rank), bytes_of(rank), expected.data());
        result_bytes = bytes_of(rank);
        break;
      case CollectiveOp::kReduceScatter: {
        give(mine.data(), nbytes);
        operation.output = output.data();
        std::vector<std::byte> whole(nbytes + 1);
        Reference(whole.data(), job.nodes, inputs, operation);
        std::copy_n(whole.data() + begin_of(rank), bytes_of(rank), expected.data());
        result_bytes = bytes_of(rank);
        break;
      }
      case CollectiveOp::kAllToAll:
        give(mine.data(), nbytes);
        for (int r = 0; r < world; r++) std::copy_n(inputs[static_cast<size_t>(r)].data() + begin_of(rank), bytes_of(r), expected.data() + begin_of(r));
        operation.output = is_apart ? output.data() : memory.data();
        result_bytes = nbytes;
        break;
      default: break;
    }
    if (operation.data == nullptr) operation.data = memory.data();
    if (operation.op == CollectiveOp::kBroadcast && !is_root) std::fill(memory.begin(), memory.end(), std::byte{0xee});
    result = operation.result();
    history = HistoryAfter(operation);
    if (own() % 4 == 0) Sleep(own() % 300);
    Check(member.Run(operation, number++, kLongMs), rank, turn);
    if (result_bytes > 0 && std::memcmp(result, expected.data(), result_bytes) != 0) {
      size_t at = 0;
      while (result[at] == expected[at]) at++;
      Die(std::string("a result of ") + NameOf(operation.op) + " is wrong: " + NameOf(operation.dtype) + " " + NameOf(operation.reduce_op) + ", algorithm " +
              std::to_string(operation.algorithm) + (operation.wire == Wire::kQ8 ? ", q8" : "") + ", byte " + std::to_string(at) + " of " + std::to_string(result_bytes),
          rank, turn);
    }
    if (operation.output != nullptr && operation.data == memory.data() && operation.output != memory.data() && operation.op != CollectiveOp::kAllGather &&
        operation.op != CollectiveOp::kGather && std::memcmp(memory.data(), mine.data(), nbytes) != 0) {
      Die(std::string("the input of ") + NameOf(operation.op) + " changed", rank, turn);
    }
  }
}

void RunMix(const Nodes& nodes, int turns, uint32_t seed) {
  Job job(nodes, seed);
  OnThreads(kGroups * job.size, [&](int i) {
    const auto group = static_cast<uint32_t>(i / job.size);
    Mix(job, group, i % job.size, turns, seed + 1000 * group);
  });
}

// ---- groups that break

enum class End { kAbort, kLost, kEnded, kLeft, kCount, kOperation, kRoot, kDropped, kRepeated, kBeforeOthersCome, kLate };

struct Ending {
  End end;
  const char* title;
  Code code;        // of everyone, the culprit as well where it still looks
  bool is_named;    // it names the culprit
  bool is_whole;    // all ranks and connections are left, and all ranks know
};
constexpr Ending kEndings[] = {
    {End::kAbort, "abort", Code::kAborted, false, true},
    {End::kLost, "a connection breaks", Code::kPeerLost, true, false},
    {End::kEnded, "a rank's network ends while it waits", Code::kPeerLost, true, false},
    {End::kLeft, "a rank leaves", Code::kPeerLost, true, false},
    {End::kCount, "another count", Code::kMismatch, false, true},
    {End::kOperation, "another operation", Code::kMismatch, false, true},
    {End::kRoot, "another root, for which nobody waits", Code::kMismatch, false, true},
    {End::kDropped, "a frame is lost", Code::kIo, false, true},
    {End::kRepeated, "a frame is repeated", Code::kIo, false, true},
    {End::kBeforeOthersCome, "abort before others have come", Code::kAborted, false, true},
    {End::kLate, "a rank is late", Code::kTimeout, false, false},
};

// Every rank makes the broken group anew, the culprit by the wrong call at first: then all fail, and meet again.
void MakeAnew(Job& job, const Member& broken, bool is_culprit) {
  const int rank = broken.layout().rank;
  const std::unique_ptr<NetworkRenewal> renewal = broken.Renewed();
  std::atomic<bool> is_cancelled{false};
  Successor successor;
  const auto next = [] { return uint64_t{1}; };
  const Status status = renewal->Agree(is_culprit ? Renewal::kShrink : Renewal::kRecreate, "as before", next, kLongMs, is_cancelled, &successor);
  if (status.code() != Code::kMismatch) Die("different calls were not found out: " + status.message(), rank, 0);
  Check(renewal->Agree(Renewal::kRecreate, "as before", next, kLongMs, is_cancelled, &successor), rank, 0);
  if (successor.group != 1 || static_cast<int>(successor.ranks.size()) != job.size) Die("is made anew of other ranks", rank, 0);
  std::unique_ptr<Member> made;
  const auto connect = [&](const Deadline&) {
    made = std::make_unique<Member>(job, successor.group, rank, 0);
    return Status::Ok();
  };
  Check(renewal->Confirm(connect, &is_cancelled), rank, 0);
  renewal->Leave();
  std::vector<float> data(300, static_cast<float>(rank));
  Operation operation;
  operation.op = CollectiveOp::kAllReduce;
  operation.algorithm = 1;
  operation.data = reinterpret_cast<std::byte*>(data.data());
  operation.count = data.size();
  operation.chunk_bytes = 2048;
  for (uint64_t number = 1; number <= 3; number++) Check(made->Run(operation, number, kLongMs), rank, 0);
  float expected = 0;
  for (int other = 0; other < job.size; other++) expected += static_cast<float>(other);
  for (int call = 1; call < 3; call++) expected *= static_cast<float>(job.size);
  for (float value : data) {
    if (value != expected) Die("sums of the group that was made anew are wrong", rank, 0);
  }
}

// One rank, or where its calls differ its whole node, goes wrong after some calls. All others call until they learn of it.
void Break(const Nodes& nodes, const Ending& ending, int culprit, uint32_t seed) {
  Job job(nodes, seed);
  Layout layout;
  Check(Layout::Create(culprit, nodes, &layout), culprit, -1);
  const auto is_wrong = [&](int rank) { return layout.node_of[static_cast<size_t>(rank)] == layout.node; };
  std::latch learnt(job.size - 1);
  OnThreads(job.size, [&](int rank) {
    std::mt19937 own(seed * 7 + static_cast<uint32_t>(rank)), shared(seed);
    const bool is_culprit = rank == culprit;
    if (ending.end == End::kBeforeOthersCome && !is_culprit) Sleep(3000 + own() % 10'000);
    Member member(job, 0, rank, own() % 2 == 0 ? 0 : 20);
    const int before = ending.end == End::kBeforeOthersCome ? 0 : static_cast<int>(shared() % 6);
    std::vector<float> data(900);
    Status status;
    for (int call = 0; status.ok(); call++) {
      if (call > 10'000) Die(std::string("did not learn of the end: ") + ending.title, rank, call);
      const bool is_time = call >= before;
      Operation operation;
      operation.op = kOperations[shared() % std::size(kOperations)];
      if (HasParts(operation.op)) operation.op = CollectiveOp::kAllReduce;
      operation.algorithm = static_cast<uint16_t>(1 + shared() % 3);
      operation.root = static_cast<int>(shared() % static_cast<uint32_t>(job.size));
      operation.chunk_bytes = 2048;
      operation.data = reinterpret_cast<std::byte*>(data.data());
      operation.count = operation.op == CollectiveOp::kBarrier ? 0 : 800;
      if (is_time && ending.end == End::kCount && is_wrong(rank)) operation.count++;
      if (is_time && ending.end == End::kOperation) operation.op = is_wrong(rank) ? CollectiveOp::kBarrier : CollectiveOp::kAllReduce;
      if (is_time && ending.end == End::kRoot) {
        // Each root sends, and waits for nobody but room.
        operation.op = CollectiveOp::kBroadcast;
        operation.root = is_wrong(rank) ? culprit : nodes[static_cast<size_t>(layout.node == 0 ? 1 : 0)][0];
      }
      if (is_time && is_culprit) {
        if (ending.end == End::kAbort || ending.end == End::kBeforeOthersCome) member.comm().Abort(Status(Code::kAborted, "on purpose"));
        if (ending.end == End::kLost) job.wire->Lose(rank);
        if (ending.end == End::kEnded && call == before) job.wire->End(rank);
        if (ending.end == End::kDropped && call == before) job.wire->Drop(rank);
        if (ending.end == End::kRepeated && call == before) job.wire->Repeat(rank);
        if (ending.end == End::kLeft) return;
        if (ending.end == End::kLost || ending.end == End::kLate) {  // and calls nothing more
          learnt.wait();
          return;
        }
      }
      if (own() % 8 == 0) Sleep(own() % 200);
      status = member.Run(operation, static_cast<uint64_t>(call) + 1, ending.end == End::kLate ? 200 : kLongMs);
    }
    const std::string said = std::string(ending.title) + ": " + status.message();
    if (status.code() != ending.code) Die("broke with code " + std::to_string(static_cast<int>(status.code())) + " by " + said, rank, 0);
    if (!member.comm().failed()) Die("a failed group does not know it: " + said, rank, 0);
    double named = -1;
    for (const auto& [key, value] : status.numbers()) {
      if (std::strcmp(key, "rank") == 0) named = value;
    }
    if (ending.is_named && named != culprit) Die("named rank " + std::to_string(static_cast<int>(named)) + " by " + said, rank, 0);
    if (ending.code == Code::kAborted && status.message().find("on purpose") == std::string::npos) Die("not the reason: " + said, rank, 0);
    if (!is_culprit) learnt.count_down();
    if (ending.is_whole) MakeAnew(job, member, is_culprit);
  });
}

const Nodes kNodes[] = {{{0}, {1}}, {{0, 1}, {2, 3}}, {{0}, {1}, {2}}, {{0, 2}, {1}}, {{0, 3}, {1, 2}}, {{0, 1, 2}, {3}, {4, 5}}};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "--fault") == 0) {
    for (const auto& [name, one] : kFaults) {
      if (std::strcmp(argv[2], name) == 0) fault = one;
    }
    if (fault == Fault::kNone) return 2;
    RunMix(kNodes[std::size(kNodes) - 1], 30, 1);  // the order of two would change nothing
    return 0;
  }
  const int turns = argc > 1 ? std::atoi(argv[1]) : 40;
  uint32_t seed = 1;
  for (const Nodes& nodes : kNodes) RunMix(nodes, turns, seed++);
  size_t breaks = 0;
  for (int round = 0; round < std::max(1, turns / 40); round++) {
    for (size_t i = 1; i < std::size(kNodes); i++) {
      const Nodes& nodes = kNodes[i];
      int size = 0;
      for (const std::vector<int>& ranks : nodes) size += static_cast<int>(ranks.size());
      for (const Ending& ending : kEndings) {
        Break(nodes, ending, static_cast<int>(seed % static_cast<uint32_t>(size)), seed);
        seed++;
        breaks++;
      }
    }
  }
  std::printf("ok, %d turns a world, %zu groups broken\n", turns, breaks);
}
