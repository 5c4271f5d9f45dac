#include "sim/simulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "comm/all_reduce.h"
#include "comm/hierarchical.h"
#include "comm/transport.h"

namespace tilerank {

namespace {

enum Event : uint32_t { kFirstByte = 1, kArrived = 2, kTaken = 3 };

size_t RoundUp(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

/// One piece of memory of equal size for each rank; what nobody touches takes no memory.
class Region {
 public:
  ~Region() {
    if (data_ != nullptr) munmap(data_, nbytes_);
  }
  Status Map(size_t ranks, size_t nbytes, const char* what) {
    stride_ = RoundUp(std::max<size_t>(nbytes, 1), kPageBytes);
    nbytes_ = stride_ * ranks;
    void* memory = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return Status(Code::kNoMemory, std::to_string(nbytes_) + " bytes for " + what + ": " + std::strerror(errno));
    data_ = static_cast<std::byte*>(memory);
    return Status::Ok();
  }
  std::byte* Of(int rank) const { return data_ + stride_ * static_cast<size_t>(rank); }
  /// Whose piece it is; -1: it lies elsewhere.
  int OwnerOf(const void* address) const {
    const std::byte* at = static_cast<const std::byte*>(address);
    return data_ == nullptr || at < data_ || at >= data_ + nbytes_ ? -1 : static_cast<int>(static_cast<size_t>(at - data_) / stride_);
  }

 private:
  std::byte* data_ = nullptr;
  size_t stride_ = 0, nbytes_ = 0;
};

/// Inputs and expected results by closed form: element i of rank r in call c is a small integer that depends on (i + 7 r + 3 c) mod kPeriod, so
/// every input is a piece of one array, and so is what comes out. The period is prime: no shift by whole lines, chunks or parts looks right.
class Patterns {
 public:
  void Create(const Kernels& kernels, const SimCall& call, int world_size) {
    element_ = static_cast<size_t>(ElementBytes(call.dtype));
    const size_t length = call.count + kPeriod;
    std::vector<float> sums(kPeriod);
    std::vector<float>& values = period_;
    values.resize(kPeriod);
    for (size_t i = 0; i < kPeriod; i++) values[i] = static_cast<float>(i * i * 37 % 211) - 105;
    for (size_t i = 0; i < kPeriod; i++) {
      // Whole numbers below 2^24: exact in f32, whatever the order.
      for (int rank = 0; rank < world_size; rank++) sums[i] += values[(i + PhaseOf(rank, 0)) % kPeriod];
    }
    const auto spread = [&](const std::vector<float>& period, std::vector<std::byte>* out) {
      std::vector<float> whole(length);
      for (size_t i = 0; i < length; i++) whole[i] = period[i % kPeriod];
      out->resize(length * element_);
      kernels.convert(out->data(), call.dtype, whole.data(), DType::kF32, length);
    };
    spread(values, &inputs_);
    spread(sums, &sums_);
  }
  /// What sums by Q8 are checked against: the largest |x| of each node's partial sum and of the whole, of each group of kQ8Group that there is.
  void CreateBounds(const SimCall& call, const std::vector<std::vector<int>>& nodes) {
    const float* values = period_.data();
    partials_.assign(nodes.size() + 1, std::vector<float>(kPeriod));
    for (size_t node = 0; node < nodes.size(); node++) {
      for (size_t i = 0; i < kPeriod; i++) {
        for (int rank : nodes[node]) partials_[node][i] += values[(i + PhaseOf(rank, 0)) % kPeriod];
        partials_.back()[i] += partials_[node][i];
      }
    }
    for (size_t i = 0; i < std::min(kPeriod, call.count); i++) groups_.push_back(GroupAt(i, kQ8Group));
  }
  /// |result - exact sum| of element i of a call is at most this: of each node's partial sum half a step, 1/254 of its group's largest |x|; in two
  /// steps of the sum as well; then what f32 and the dtype round.
  double Q8Bound(int call, size_t i, size_t count, DType dtype, bool is_two_step) const {
    const size_t begin = i / kQ8Group * kQ8Group, phase = PhaseOf(0, call) + begin;
    const bool is_whole = begin + kQ8Group <= count;
    const Group group = is_whole && phase % kPeriod < groups_.size() ? groups_[phase % kPeriod] : GroupAt(phase, std::min(kQ8Group, count - begin));
    // A step is a scale and its inverse, rounded to f32 each; so are the products.
    constexpr double kHalfStep = (1 + 0x1p-14) / 254;
    double bound = group.partials * (kHalfStep + static_cast<double>(partials_.size()) * 0x1p-23);
    if (is_two_step) bound += (group.sum + bound) * kHalfStep;
    if (dtype == DType::kBf16) bound += (std::abs(SumOf(call, i)) + bound) * 0x1p-8;
    return bound;
  }
  double SumOf(int call, size_t i) const { return partials_.back()[(PhaseOf(0, call) + i) % kPeriod]; }
  /// What rank has from its element `begin` on.
  const std::byte* Input(int rank, int call, size_t begin) const { return inputs_.data() + (PhaseOf(rank, call) + begin) % kPeriod * element_; }
  const std::byte* Sum(int call, size_t begin) const { return sums_.data() + (PhaseOf(0, call) + begin) % kPeriod * element_; }

 private:
  static constexpr size_t kPeriod = 1031;
  static size_t PhaseOf(int rank, int call) { return (static_cast<size_t>(rank) * 7 + static_cast<size_t>(call) * 3) % kPeriod; }
  // Of a group of elements: the largest |x| of every node's partial sum, added up, and of the sum.
  struct Group {
    double partials = 0, sum = 0;
  };
  Group GroupAt(size_t phase, size_t length) const {
    Group group;
    for (size_t node = 0; node < partials_.size(); node++) {
      double most = 0;
      for (size_t i = 0; i < length; i++) most = std::max<double>(most, std::abs(partials_[node][(phase + i) % kPeriod]));
      (node + 1 < partials_.size() ? group.partials : group.sum) += most;
    }
    return group;
  }
  size_t element_ = 4;
  std::vector<float> period_;
  std::vector<std::byte> inputs_, sums_;
  std::vector<std::vector<float>> partials_;  // [nodes, then the sum][kPeriod]
  std::vector<Group> groups_;                 // by phase
};

class Simulation;
// Kernels are plain functions: this is how those that the algorithms call find their clock. Set while a simulation runs on this thread.
thread_local Simulation* running = nullptr;

/// What a rank waits for.
struct Waiting {
  enum Kind { kNothing, kFlag, kConsumed, kNetwork } kind = kNothing;
  int peer = -1;  // rank of the group
  uint64_t sequence = 0;
  const char* what = "";
};

class SimFabric final : public Fabric {
 public:
  SimFabric(Simulation& sim, int node, int local, int local_size) : Fabric(local, local_size), sim_(sim), node_(node) {}
  std::byte* Slot(int local, uint64_t sequence) const override;
  Status Acquire(int lane, uint64_t sequence, const Deadline& deadline) override;
  bool IsAcquirable(int, uint64_t sequence) const override { return settled_ + 2 >= sequence; }
  void Publish(int lane, uint64_t sequence, const OpTag& tag) override;
  // Virtual ranks have no tensors, and only those travel in a payload.
  void Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload&) override { Publish(lane, sequence, tag); }
  FlagPayload PayloadOf(int, int, uint64_t) const override { return {}; }
  bool IsReady(int lane, uint64_t sequence) const override;
  bool IsReadyFrom(int lane, uint64_t sequence, int peer) const override;
  Status Await(int lane, uint64_t sequence, const OpTag& tag, const Deadline& deadline) override;
  Status AwaitFlag(uint64_t sequence, int peer, const OpTag& tag);
  Status AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) override;
  void Consumed(int lane, uint64_t sequence) override;
  Status AwaitConsumedBy(int, uint64_t, int, const char*, const Deadline&) override { return Status(Code::kInternal, "virtual ranks have no tensors"); }
  void Complete(int, uint64_t) override {}
  bool failed() const override;
  Status failure() const override;
  Status Break(Status reason, int culprit, const char* operation, uint64_t sequence) override;

 private:
  Simulation& sim_;
  const int node_;
  uint64_t settled_ = 0;  // all peers have read the generations up to this one
};

class SimTransport final : public Transport {
 public:
  SimTransport(Simulation& sim, int rank) : sim_(sim), rank_(rank) {}
  void Enter(const FrameTag&) override {}
  size_t frame_bytes() const override;
  int window() const override;
  std::byte* Reserve(int peer) override;
  void Post(int peer, const FrameTag& tag, size_t nbytes) override;
  bool Poll(int peer, Frame* frame) override;
  void Release(int peer) override;
  bool HasLeft(int) const override { return false; }
  void Wait(int for_peer, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) override;
  int64_t Now() const override;

 private:
  friend class Simulation;
  struct Room {
    std::byte* data = nullptr;
    size_t touched = 0;  // bytes that were ever written
  };
  struct Peer {
    std::vector<Room> rooms;              // [window]
    uint64_t posted = 0, taken = 0;       // frames to the peer, and of those the ones that it is known to be through with
    std::deque<uint64_t> incoming;        // frames
    uint64_t released = 0, told = 0;      // frames of the peer, and of those what it was told
  };
  Simulation& sim_;
  const int rank_;
  std::unordered_map<int, Peer> peers_;  // never walked through: its order is nobody's
};

class Simulation {
 public:
  Simulation(const Kernels& kernels, const SimMachine& machine, const SimCall& call)
      : kernels_(kernels), machine_(machine), call_(call), scheduler_([this](SimTime at, uint32_t kind, uint64_t id) { OnEvent(at, kind, id); }) {}

  Status Run(SimReport* report);

 private:
  friend class SimFabric;
  friend class SimTransport;

  struct Line {
    uint64_t sequence = 0;
    SimTime time = 0;
    OpTag tag;
    uint64_t hops = 0;
  };
  struct Rank {
    int node = 0, local = 0, socket = 0;
    size_t core = 0;
    Line flag[2], consumed[2];
    Waiting waiting;
    bool has_ended = false;
    SimTime end = 0, network_free = 0;
    uint64_t syncs = 0, hops = 0, frames = 0, sent_bytes = 0, memory_bytes = 0;
    std::unique_ptr<SimFabric> fabric;
    std::unique_ptr<SimTransport> transport;
    Layout layout;
  };
  struct Node {
    std::vector<int> ranks;
    SimTime sending_free = 0, receiving_free = 0;
    uint64_t sent_bytes = 0, received_bytes = 0;
    std::vector<SimTime> socket_free;    // [from][to]
    std::vector<uint64_t> socket_bytes;  // [from][to]
  };
  struct Core {
    int holder = -1, last = -1;  // ranks
    std::deque<int> queue;
  };
  struct Flight {
    int from = 0, to = 0;
    FrameTag tag;
    const std::byte* data = nullptr;
    size_t nbytes = 0;
    uint64_t taken = 0;  // tells it by the way
    uint64_t hops = 0;
  };

  Rank& At(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  Rank& Me() { return At(scheduler_.current()); }
  Node& NodeOf(const Rank& rank) { return nodes_[static_cast<size_t>(rank.node)]; }
  int RankOf(int node, int local) const { return nodes_[static_cast<size_t>(node)].ranks[static_cast<size_t>(local)]; }
  size_t element() const { return static_cast<size_t>(ElementBytes(call_.dtype)); }
  size_t nbytes() const { return call_.count * element(); }
  bool shares_cores() const { return !cores_.empty(); }
  SimTime LatencyBetween(const Rank& a, const Rank& b) const { return a.socket == b.socket ? machine_.core_latency : machine_.socket_latency; }
  static SimTime TimeOf(size_t nbytes, double rate) { return std::llround(static_cast<double>(nbytes) / rate); }

  Status Prepare();
  void RunRank(int rank);
  Status RunCall(Rank& me, int rank, int call, NetworkContext& context, uint64_t* sequence);
  Operation MakeOperation(const Rank& me, int rank);
  void Fill(int rank, int call);
  Status Check(int rank, int call);
  Status CheckQ8(int rank, int call);
  Status Wrong(int rank, int call, size_t element) const;
  bool is_q8() const { return call_.wire == Wire::kQ8 && nodes_.size() > 1; }
  void OnEvent(SimTime at, uint32_t kind, uint64_t id);
  void OnStuck();

  // Of the rank that runs.
  void Wait(Waiting waiting);
  void Fail(Status reason);
  void TakeCore();
  void LeaveCore();
  void Work(SimTime duration);
  void Move(void* out, size_t out_bytes, const void* const* sources, int num_sources, size_t source_bytes);
  void Control(int from, int to, uint64_t taken);
  std::byte* NewRoom();
  uint64_t NewFlight();

  static void Copy(void* out, const void* in, size_t nbytes) {
    running->kernels_.copy(out, in, nbytes);
    running->Move(out, nbytes, &in, 1, nbytes);
  }
  static void Reduce(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, size_t count) {
    running->kernels_.reduce(out, sources, num_sources, dtype, op, count);
    const size_t nbytes = count * static_cast<size_t>(ElementBytes(dtype));
    running->Move(out, nbytes, sources, num_sources, nbytes);
  }
  static void ReduceStaged(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, ReduceStage stage, int32_t divisor,
                           size_t count) {
    running->kernels_.reduce_staged(out, sources, num_sources, dtype, op, stage, divisor, count);
    const size_t whole = count * static_cast<size_t>(ElementBytes(dtype)), partial = count * static_cast<size_t>(PartialBytes(dtype, op));
    running->Move(out, stage == ReduceStage::kPartial ? partial : whole, sources, num_sources, stage == ReduceStage::kFinal ? partial : whole);
  }

  static void ReduceToQ8(void* out, const void* const* sources, int32_t num_sources, DType dtype, size_t count) {
    running->kernels_.reduce_to_q8(out, sources, num_sources, dtype, count);
    running->Move(out, Q8Bytes(count), sources, num_sources, count * static_cast<size_t>(ElementBytes(dtype)));
  }
  static void ReduceFromQ8(void* out, const void* const* sources, int32_t num_sources, DType dtype, int32_t divisor, size_t count) {
    running->kernels_.reduce_from_q8(out, sources, num_sources, dtype, divisor, count);
    running->Move(out, count * static_cast<size_t>(ElementBytes(dtype)), sources, num_sources, Q8Bytes(count));
  }

  const Kernels& kernels_;
  const SimMachine& machine_;
  const SimCall& call_;
  Scheduler scheduler_;
  Patterns patterns_;
  std::vector<Rank> ranks_;
  std::vector<Node> nodes_;
  std::vector<Core> cores_;  // empty where every rank has one
  Region slots_, data_, output_;
  bool has_output_ = false;
  size_t slot_bytes_ = 0, room_bytes_ = 0;
  std::vector<std::byte*> tensors_;
  std::vector<std::unique_ptr<Region>> room_blocks_;
  size_t rooms_left_ = 0;
  size_t memory_ = 0;        // bytes that the simulation took
  std::vector<Flight> flights_;
  std::vector<uint64_t> landed_;  // of flights_, free again
  uint64_t network_bytes_ = 0;
  uint16_t algorithm_ = 0, chosen_ = 0;
  // Of an allReduce by Q8: what the first rank had, by call, until all were compared with it.
  struct First {
    std::vector<std::byte> result;
    int rank = 0;
    size_t compared = 0;
  };
  std::unordered_map<int, First> firsts_;
  Status failure_;
};

// ---- the fabric

std::byte* SimFabric::Slot(int local, uint64_t sequence) const {
  return sim_.slots_.Of(sim_.RankOf(node_, local)) + (sequence & 1) * sim_.slot_bytes_;
}

bool SimFabric::failed() const { return !sim_.failure_.ok(); }
Status SimFabric::failure() const { return sim_.failure_; }
Status SimFabric::Break(Status reason, int, const char*, uint64_t) {
  sim_.Fail(std::move(reason));
  return sim_.failure_;
}

Status SimFabric::Acquire(int, uint64_t sequence, const Deadline&) {
  if (settled_ + 2 >= sequence) return Status::Ok();
  auto& me = sim_.Me();
  const uint64_t read = me.flag[sequence & 1].sequence;  // what is overwritten
  for (int local = 0; local < world_size(); local++) {
    if (local == rank()) continue;
    const int peer = sim_.RankOf(node_, local);
    const auto& theirs = sim_.At(peer);
    // Whoever has published a later generation is through with this one, whether it said so or not.
    const auto said = [&]() -> const Simulation::Line* {
      for (const Simulation::Line* line : {&theirs.consumed[read & 1], &theirs.consumed[~read & 1], &theirs.flag[~read & 1], &theirs.flag[read & 1]}) {
        const bool is_flag = line == &theirs.flag[0] || line == &theirs.flag[1];
        if (line->sequence >= read + (is_flag ? 1 : 0)) return line;
      }
      return nullptr;
    };
    const Simulation::Line* line;
    while ((line = said()) == nullptr) {
      if (failed()) return failure();
      sim_.Wait({Waiting::kConsumed, peer, read, "a slot that is still read"});
    }
    sim_.scheduler_.AdvanceTo(line->time + sim_.LatencyBetween(me, theirs));
    me.hops = std::max(me.hops, line->hops);
  }
  sim_.TakeCore();
  settled_ = std::max(settled_, read);
  return Status::Ok();
}

void SimFabric::Publish(int, uint64_t sequence, const OpTag& tag) {
  auto& me = sim_.Me();
  sim_.scheduler_.Settle();
  const SimTime now = sim_.scheduler_.now();
  me.syncs++;
  me.flag[sequence & 1] = {sequence, now, tag, me.hops};
  for (int peer : sim_.NodeOf(me).ranks) {
    const auto& theirs = sim_.At(peer);
    const bool is_awaited = theirs.waiting.peer == sim_.scheduler_.current() &&
                            ((theirs.waiting.kind == Waiting::kFlag && theirs.waiting.sequence <= sequence) ||
                             (theirs.waiting.kind == Waiting::kConsumed && theirs.waiting.sequence < sequence));
    if (is_awaited) sim_.scheduler_.Wake(peer, now + sim_.LatencyBetween(me, theirs));
  }
}

void SimFabric::Consumed(int, uint64_t sequence) {
  auto& me = sim_.Me();
  sim_.scheduler_.Settle();
  const SimTime now = sim_.scheduler_.now();
  me.consumed[sequence & 1] = {sequence, now, {}, me.hops};
  for (int peer : sim_.NodeOf(me).ranks) {
    const auto& theirs = sim_.At(peer);
    const bool is_awaited =
        theirs.waiting.peer == sim_.scheduler_.current() && theirs.waiting.kind == Waiting::kConsumed && theirs.waiting.sequence <= sequence;
    if (is_awaited) sim_.scheduler_.Wake(peer, now + sim_.LatencyBetween(me, theirs));
  }
}

bool SimFabric::IsReadyFrom(int, uint64_t sequence, int local) const {
  const auto& theirs = sim_.At(sim_.RankOf(node_, local));
  const Simulation::Line& line = theirs.flag[sequence & 1];
  return line.sequence >= sequence && line.time + sim_.LatencyBetween(sim_.Me(), theirs) <= sim_.scheduler_.now();
}

bool SimFabric::IsReady(int lane, uint64_t sequence) const {
  for (int local = 0; local < world_size(); local++) {
    if (local != rank() && !IsReadyFrom(lane, sequence, local)) return false;
  }
  return true;
}

Status SimFabric::AwaitFlag(uint64_t sequence, int local, const OpTag& tag) {
  const int peer = sim_.RankOf(node_, local);
  auto& me = sim_.Me();
  const auto& theirs = sim_.At(peer);
  const Simulation::Line& line = theirs.flag[sequence & 1];
  while (line.sequence < sequence) {
    if (failed()) return failure();
    sim_.Wait({Waiting::kFlag, peer, sequence, NameOf(tag.op)});
  }
  if (failed()) return failure();
  if (line.sequence != sequence || line.tag.Bits() != tag.Bits() || line.tag.count != tag.count) {
    sim_.Fail(Status(Code::kMismatch, "ranks called different operations at sequence " + std::to_string(sequence) + ": rank " +
                                          std::to_string(sim_.scheduler_.current()) + " called " + tag.Describe() + ", rank " + std::to_string(peer) + " at " +
                                          std::to_string(line.sequence) + " " + line.tag.Describe()));
    return failure();
  }
  sim_.scheduler_.AdvanceTo(line.time + sim_.LatencyBetween(me, theirs));
  me.hops = std::max(me.hops, line.hops);
  return Status::Ok();
}

Status SimFabric::AwaitSame(int, uint64_t sequence, int local, const OpTag& tag, const Deadline&) {
  if (Status s = AwaitFlag(sequence, local, tag); !s.ok()) return s;
  sim_.TakeCore();
  return failed() ? failure() : Status::Ok();
}

Status SimFabric::Await(int, uint64_t sequence, const OpTag& tag, const Deadline&) {
  for (int local = 0; local < world_size(); local++) {
    if (local == rank()) continue;
    if (Status s = AwaitFlag(sequence, local, tag); !s.ok()) return s;
  }
  // A peer published `sequence` after it had read all generations before.
  settled_ = sequence - 1;
  sim_.TakeCore();
  return failed() ? failure() : Status::Ok();
}

// ---- the transport

size_t SimTransport::frame_bytes() const { return sim_.room_bytes_; }
int SimTransport::window() const { return sim_.machine_.window; }
int64_t SimTransport::Now() const { return sim_.scheduler_.now() / 1000; }

std::byte* SimTransport::Reserve(int rank) {
  sim_.scheduler_.Settle();
  Peer& peer = peers_[rank];
  const auto window = static_cast<uint64_t>(sim_.machine_.window);
  if (peer.posted - peer.taken >= window) return nullptr;
  if (peer.rooms.empty()) peer.rooms.resize(window);
  Room& room = peer.rooms[peer.posted % window];
  if (room.data == nullptr) room.data = sim_.NewRoom();
  return room.data;
}

void SimTransport::Post(int rank, const FrameTag& tag, size_t nbytes) {
  sim_.scheduler_.Settle();
  auto& me = sim_.Me();
  auto& node = sim_.NodeOf(me);
  Peer& peer = peers_[rank];
  Room& room = peer.rooms[peer.posted % static_cast<uint64_t>(sim_.machine_.window)];
  if (nbytes > room.touched) {
    sim_.memory_ += nbytes - room.touched;
    room.touched = nbytes;
  }
  peer.posted++;
  peer.told = peer.released;
  me.frames++;
  me.sent_bytes += nbytes;
  node.sent_bytes += nbytes;
  sim_.network_bytes_ += nbytes;
  if (sim_.memory_ > sim_.call_.memory_limit) {
    sim_.Fail(Status(Code::kNoMemory, "the simulation takes more than the " + std::to_string(sim_.call_.memory_limit >> 20) + " MB it may"));
  }
  me.network_free = std::max(sim_.scheduler_.now(), me.network_free) + sim_.machine_.frame_time;
  const SimTime start = std::max(me.network_free, node.sending_free);
  node.sending_free = start + Simulation::TimeOf(nbytes, sim_.machine_.link_rate);
  const uint64_t id = sim_.NewFlight();
  sim_.flights_[id] = {rank_, rank, tag, room.data, nbytes, peer.told, me.hops + 1};
  sim_.scheduler_.At(start + sim_.machine_.link_latency, kFirstByte, id);
}

bool SimTransport::Poll(int rank, Frame* frame) {
  sim_.scheduler_.Settle();
  const Peer& peer = peers_[rank];
  if (peer.incoming.empty()) return false;
  const Simulation::Flight& flight = sim_.flights_[peer.incoming.front()];
  frame->tag = flight.tag;
  frame->data = flight.data;
  frame->nbytes = flight.nbytes;
  auto& me = sim_.Me();
  me.hops = std::max(me.hops, flight.hops);
  return true;
}

void SimTransport::Release(int rank) {
  Peer& peer = peers_[rank];
  sim_.landed_.push_back(peer.incoming.front());
  peer.incoming.pop_front();
  peer.released++;
  // As the mailbox has it: what flows back tells it by the way, else half a window is told.
  if (peer.released - peer.told < static_cast<uint64_t>(sim_.machine_.window / 2)) return;
  peer.told = peer.released;
  sim_.Control(rank_, rank, peer.told);
}

void SimTransport::Wait(int for_peer, bool, const FrameTag& awaited, int64_t) {
  sim_.Wait({Waiting::kNetwork, for_peer, awaited.operation, NameOf(awaited.tag.op)});
  sim_.TakeCore();
}

// ---- the clock

// May come back too early; whoever waits looks again.
void Simulation::Wait(Waiting waiting) {
  Rank& me = Me();
  if (shares_cores()) {
    if (scheduler_.Settle()) return;
    LeaveCore();
  }
  me.waiting = waiting;
  scheduler_.Block();
  me.waiting = {};
}

void Simulation::Fail(Status reason) {
  if (!failure_.ok()) return;
  failure_ = std::move(reason);
  for (size_t rank = 0; rank < ranks_.size(); rank++) scheduler_.Wake(static_cast<int>(rank), 0);
}

// Of ranks that share a core one keeps it until it waits; whoever comes to it after another one waits until it has switched.
void Simulation::TakeCore() {
  if (!shares_cores()) return;
  scheduler_.Settle();
  Core& core = cores_[Me().core];
  const int rank = scheduler_.current();
  if (core.holder == rank || !failure_.ok()) return;
  if (core.holder >= 0) {
    core.queue.push_back(rank);
    return scheduler_.Block();  // LeaveCore makes it the holder
  }
  if (core.last >= 0 && core.last != rank) scheduler_.AdvanceTo(scheduler_.now() + machine_.switch_time);
  core.holder = core.last = rank;
}

void Simulation::LeaveCore() {
  if (!shares_cores()) return;
  Core& core = cores_[Me().core];
  if (core.holder != scheduler_.current()) return;
  core.holder = -1;
  if (core.queue.empty()) return;
  core.holder = core.last = core.queue.front();
  core.queue.pop_front();
  scheduler_.Wake(core.holder, scheduler_.now() + machine_.switch_time);
}

void Simulation::Work(SimTime duration) {
  TakeCore();
  scheduler_.AdvanceTo(scheduler_.now() + duration);
}

void Simulation::Move(void* out, size_t out_bytes, const void* const* sources, int num_sources, size_t source_bytes) {
  Rank& me = Me();
  const size_t total = out_bytes + source_bytes * static_cast<size_t>(num_sources);
  me.memory_bytes += total;
  const SimTime duration = TimeOf(total, machine_.memory_rate);
  if (machine_.sockets == 1) return Work(duration);
  scheduler_.Settle();
  Node& node = NodeOf(me);
  SimTime end = 0;
  const auto cross = [&](const void* address, size_t nbytes, bool is_write) {
    int owner = slots_.OwnerOf(address);
    if (owner < 0) owner = data_.OwnerOf(address);
    if (owner < 0) owner = output_.OwnerOf(address);
    if (owner < 0 || At(owner).socket == me.socket) return;
    const auto [from, to] = is_write ? std::pair(me.socket, At(owner).socket) : std::pair(At(owner).socket, me.socket);
    const auto link = static_cast<size_t>(from * machine_.sockets + to);
    node.socket_bytes[link] += nbytes;
    SimTime& free = node.socket_free[link];
    free = std::max(free, scheduler_.now()) + TimeOf(nbytes, machine_.socket_rate);
    end = std::max(end, free);
  };
  for (int i = 0; i < num_sources; i++) cross(sources[i], source_bytes, false);
  cross(out, out_bytes, true);
  Work(std::max(duration, end - scheduler_.now()));
}

uint64_t Simulation::NewFlight() {
  if (landed_.empty()) {
    flights_.emplace_back();
    return flights_.size() - 1;
  }
  const uint64_t id = landed_.back();
  landed_.pop_back();
  return id;
}

// A message without a payload; it takes none of a link's time.
void Simulation::Control(int from, int to, uint64_t taken) {
  const uint64_t id = NewFlight();
  Flight& flight = flights_[id] = Flight();
  flight.from = from;
  flight.to = to;
  flight.taken = taken;
  scheduler_.At(scheduler_.now() + machine_.link_latency, kTaken, id);
}

void Simulation::OnEvent(SimTime at, uint32_t kind, uint64_t id) {
  Flight& flight = flights_[id];
  Rank& to = At(flight.to);
  Node& node = NodeOf(to);
  const auto learn = [&] {
    SimTransport::Peer& peer = to.transport->peers_[flight.from];
    peer.taken = std::max(peer.taken, flight.taken);
  };
  switch (kind) {
    case kFirstByte: {
      const SimTime end = std::max(at, node.receiving_free) + TimeOf(flight.nbytes, machine_.link_rate);
      node.receiving_free = end;
      node.received_bytes += flight.nbytes;
      to.network_free = std::max(to.network_free, end) + machine_.frame_time;
      scheduler_.At(machine_.frame_time > 0 ? to.network_free : end, kArrived, id);
      return;
    }
    case kArrived:
      to.transport->peers_[flight.from].incoming.push_back(id);
      learn();
      break;
    case kTaken:
      learn();
      landed_.push_back(id);
      break;
    default: break;
  }
  if (to.waiting.kind == Waiting::kNetwork) scheduler_.Wake(flight.to, at);
}

// Nobody can go on: says who waits for whom, the ranks that are waited for and do not wait themselves first.
void Simulation::OnStuck() {
  constexpr int kShown = 8;
  std::string waits, idle;
  int shown = 0, waiting = 0;
  std::vector<bool> is_awaited(ranks_.size());
  for (const Rank& rank : ranks_) {
    if (rank.waiting.kind != Waiting::kNothing) is_awaited[static_cast<size_t>(rank.waiting.peer)] = true;
  }
  for (size_t r = 0; r < ranks_.size(); r++) {
    const Waiting& wait = ranks_[r].waiting;
    if (wait.kind == Waiting::kNothing) {
      if (is_awaited[r]) idle += (idle.empty() ? "" : ",") + std::to_string(r);
      continue;
    }
    waiting++;
    if (shown == kShown) continue;
    shown++;
    waits += (waits.empty() ? "rank " : "; rank ") + std::to_string(r) + " waits for rank " + std::to_string(wait.peer) + " in " + wait.what +
             (wait.kind == Waiting::kNetwork ? " number " : " at sequence ") + std::to_string(wait.sequence);
  }
  if (waiting > shown) waits += "; and " + std::to_string(waiting - shown) + " ranks more";
  Status status(Code::kTimeout, "no rank can go on: " + waits + (idle.empty() ? "" : "; not calling: rank " + idle));
  if (!idle.empty()) std::move(status).Text("lateRanks", idle);
  Fail(std::move(status));
}

// ---- the ranks

std::byte* Simulation::NewRoom() {
  constexpr size_t kRoomsOfBlock = 1024;
  if (rooms_left_ == 0) {
    auto block = std::make_unique<Region>();
    // Without address space there is nothing to go on with; the failure ends every wait.
    if (Status s = block->Map(kRoomsOfBlock, room_bytes_, "frames"); !s.ok()) {
      Fail(std::move(s));
      return nullptr;
    }
    room_blocks_.push_back(std::move(block));
    rooms_left_ = kRoomsOfBlock;
  }
  return room_blocks_.back()->Of(static_cast<int>(kRoomsOfBlock - rooms_left_--));
}

Status Simulation::Prepare() {
  int world_size = 0;
  std::vector<std::vector<int>> layout;
  const auto sockets = static_cast<size_t>(machine_.sockets);
  for (int size : machine_.ranks) {
    Node node;
    for (int i = 0; i < size; i++) node.ranks.push_back(world_size++);
    node.socket_free.resize(sockets * sockets);
    node.socket_bytes.resize(sockets * sockets);
    layout.push_back(node.ranks);
    nodes_.push_back(std::move(node));
  }
  ranks_.resize(static_cast<size_t>(world_size));
  size_t cores = 0;
  bool are_shared = false;
  for (size_t n = 0; n < nodes_.size(); n++) {
    const int size = static_cast<int>(nodes_[n].ranks.size());
    const int used = machine_.cores > 0 ? std::min(machine_.cores, size) : size;
    are_shared |= used < size;
    for (int local = 0; local < size; local++) {
      const int r = nodes_[n].ranks[static_cast<size_t>(local)];
      Rank& rank = At(r);
      rank.node = static_cast<int>(n);
      rank.local = local;
      rank.socket = local * machine_.sockets / size;
      rank.core = cores + static_cast<size_t>(local % used);
      rank.fabric = std::make_unique<SimFabric>(*this, static_cast<int>(n), local, size);
      rank.transport = std::make_unique<SimTransport>(*this, r);
      if (Status s = Layout::Create(r, layout, &rank.layout); !s.ok()) return s;
    }
    cores += static_cast<size_t>(used);
  }
  if (are_shared) cores_.resize(cores);

  const auto world = static_cast<size_t>(world_size);
  has_output_ = call_.op != CollectiveOp::kAllReduce && call_.op != CollectiveOp::kBroadcast && call_.op != CollectiveOp::kBarrier;
  slot_bytes_ = RoundUp(call_.chunk_bytes, kPageBytes);
  // No frame is larger than all elements as partial results; a smaller room leaves every cut of the data where it was.
  room_bytes_ = std::min(machine_.frame_bytes, RoundUp(call_.count * 16 + 4096, 4096));
  if (Status s = slots_.Map(world, 2 * slot_bytes_, "slots"); !s.ok()) return s;
  if (Status s = data_.Map(world, nbytes(), "data"); !s.ok()) return s;
  if (has_output_) {
    if (Status s = output_.Map(world, nbytes(), "outputs"); !s.ok()) return s;
  }
  for (int rank = 0; rank < world_size; rank++) tensors_.push_back(data_.Of(rank));
  memory_ = world * (nbytes() * (has_output_ ? 2 : 1) + std::min(2 * slot_bytes_, 4 * nbytes())) + world * (nodes_.size() > 1 ? 3 * room_bytes_ : 0);
  if (memory_ > call_.memory_limit) {
    return Status(Code::kNoMemory, "the simulation takes " + std::to_string(memory_ >> 20) + " MB and more, and may take " + std::to_string(call_.memory_limit >> 20));
  }
  patterns_.Create(kernels_, call_, world_size);
  if (is_q8()) patterns_.CreateBounds(call_, layout);
  return Status::Ok();
}

Operation Simulation::MakeOperation(const Rank& me, int rank) {
  Operation operation;
  operation.op = call_.op;
  operation.dtype = call_.dtype;
  operation.count = call_.op == CollectiveOp::kBarrier ? 0 : call_.count;
  operation.data = data_.Of(rank);
  if (has_output_) operation.output = output_.Of(rank);
  operation.root = call_.root;
  operation.chunk_bytes = call_.chunk_bytes;
  if (call_.op == CollectiveOp::kAllReduce) {
    operation.algorithm = call_.algorithm;
    operation.wire = call_.wire;
    if (nodes_.size() > 1) chosen_ = static_cast<uint16_t>(ChooseByWidth(me.layout, operation));
    if (nodes_.size() > 1 && call_.algorithm == 0) operation.algorithm = chosen_;
    if (nodes_.size() == 1 && call_.algorithm == static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace)) operation.parts = &tensors_;
  }
  return operation;
}

// The part of the whole that a rank has in the operations on parts, whole otherwise.
void Simulation::Fill(int rank, int call) {
  const auto world = ranks_.size();
  const bool is_part = call_.op == CollectiveOp::kGather || call_.op == CollectiveOp::kAllGather;
  std::memcpy(data_.Of(rank), patterns_.Input(rank, call, 0), is_part ? nbytes() / world : nbytes());
  if (has_output_) std::memset(output_.Of(rank), 0xa5, nbytes());
  // By a bit that is left when sums are rounded to Q8: one of the exponent.
  if (rank == call_.spoiled && nbytes() > 0) data_.Of(rank)[is_q8() ? element() - 1 : 0] ^= std::byte{0x40};
}

Status Simulation::Wrong(int rank, int call, size_t element) const {
  return Status(Code::kInternal, std::string(NameOf(call_.op)) + " gave a wrong result: rank " + std::to_string(rank) + ", element " + std::to_string(element) +
                                     " of call " + std::to_string(call));
}

// Within the bound of the exact sum, and the very bits of the first rank that was checked.
Status Simulation::CheckQ8(int rank, int call) {
  First& first = firsts_[call];
  if (first.compared++ > 0) {
    if (nbytes() > 0 && std::memcmp(data_.Of(rank), first.result.data(), nbytes()) != 0) {
      return Status(Code::kInternal, "ranks have different bits: rank " + std::to_string(rank) + " and rank " + std::to_string(first.rank) + ", call " + std::to_string(call));
    }
    if (first.compared == ranks_.size()) firsts_.erase(call);
    return Status::Ok();
  }
  const std::byte* result = data_.Of(rank);
  first.rank = rank;
  first.result.assign(result, result + nbytes());
  std::vector<float> values(call_.count);
  if (call_.count > 0) kernels_.convert(values.data(), DType::kF32, result, call_.dtype, call_.count);
  const bool is_two_step = algorithm_ == static_cast<uint16_t>(NetworkAlgorithm::kTwoStep);
  for (size_t i = 0; i < call_.count; i++) {
    // Not greater: NaN is wrong.
    if (!(std::abs(static_cast<double>(values[i]) - patterns_.SumOf(call, i)) <= patterns_.Q8Bound(call, i, call_.count, call_.dtype, is_two_step))) return Wrong(rank, call, i);
  }
  return Status::Ok();
}

Status Simulation::Check(int rank, int call) {
  const auto world = ranks_.size();
  const size_t part = call_.count / world;
  const bool is_root = rank == call_.root;
  const auto expect = [&](const std::byte* got, const std::byte* wanted, size_t begin, size_t count) -> Status {
    if (std::memcmp(got, wanted, count * element()) == 0) return Status::Ok();
    size_t i = 0;
    while (std::memcmp(got + i * element(), wanted + i * element(), element()) == 0) i++;
    return Wrong(rank, call, begin + i);
  };
  const auto parts_of = [&](bool is_own_part) -> Status {
    for (size_t p = 0; p < world; p++) {
      const std::byte* wanted = patterns_.Input(static_cast<int>(p), call, is_own_part ? static_cast<size_t>(rank) * part : 0);
      if (Status s = expect(output_.Of(rank) + p * part * element(), wanted, p * part, part); !s.ok()) return s;
    }
    return Status::Ok();
  };
  if (is_q8()) return CheckQ8(rank, call);
  switch (call_.op) {
    case CollectiveOp::kAllReduce: return expect(data_.Of(rank), patterns_.Sum(call, 0), 0, call_.count);
    case CollectiveOp::kReduce: return is_root ? expect(output_.Of(rank), patterns_.Sum(call, 0), 0, call_.count) : Status::Ok();
    case CollectiveOp::kBroadcast: return expect(data_.Of(rank), patterns_.Input(call_.root, call, 0), 0, call_.count);
    case CollectiveOp::kReduceScatter: return expect(output_.Of(rank), patterns_.Sum(call, static_cast<size_t>(rank) * part), static_cast<size_t>(rank) * part, part);
    case CollectiveOp::kScatter: return expect(output_.Of(rank), patterns_.Input(call_.root, call, static_cast<size_t>(rank) * part), static_cast<size_t>(rank) * part, part);
    case CollectiveOp::kGather: return is_root ? parts_of(false) : Status::Ok();
    case CollectiveOp::kAllGather: return parts_of(false);
    case CollectiveOp::kAllToAll: return parts_of(true);
    default: return Status::Ok();
  }
}

Status Simulation::RunCall(Rank& me, int rank, int call, NetworkContext& context, uint64_t* sequence) {
  Operation operation = MakeOperation(me, rank);
  algorithm_ = operation.algorithm;
  // A wait ends by what it waits for, or because nobody can go on: there is no third way, so no deadline either.
  const Deadline deadline = Deadline::Idle();
  Work(machine_.call_time);
  if (nodes_.size() > 1) return RunHierarchical(context, operation, static_cast<uint64_t>(call) + 1, deadline);
  operation.sequence = *sequence;
  *sequence += SequencesOf(operation, static_cast<int>(ranks_.size()));
  const bool has_started = TryStart(context.local, operation);
  return Finish(context.local, operation, has_started, deadline);
}

void Simulation::RunRank(int r) {
  Rank& me = At(r);
  if (r == call_.absent) return;
  NetworkContext context = {};
  context.local = {me.fabric.get(), &Reduce, &Copy, 0};
  context.reduce_staged = &ReduceStaged;
  context.reduce_to_q8 = &ReduceToQ8;
  context.reduce_from_q8 = &ReduceFromQ8;
  context.transport = me.transport.get();
  context.layout = &me.layout;
  context.next_generation = 1;
  uint64_t sequence = 1;
  for (int call = 0; call < call_.calls; call++) {
    Fill(r, call);
    Status s = RunCall(me, r, call, context, &sequence);
    if (r == call_.differing && nbytes() > 0) (has_output_ ? output_ : data_).Of(r)[0] ^= std::byte{1};
    if (s.ok()) s = Check(r, call);
    if (!s.ok()) return Fail(std::move(s));
  }
  me.end = scheduler_.now();
  scheduler_.Settle();
  LeaveCore();
}

Status Simulation::Run(SimReport* report) {
  if (Status s = Prepare(); !s.ok()) return s;
  Status s = scheduler_.Run(
      static_cast<int>(ranks_.size()), [this](int rank) { RunRank(rank); }, [this] { OnStuck(); });
  if (!failure_.ok()) return failure_;
  if (!s.ok()) return s;
  *report = {};
  report->algorithm = algorithm_;
  report->chosen = chosen_;
  report->network_bytes = network_bytes_;
  for (const Rank& rank : ranks_) {
    report->time = std::max(report->time, rank.end);
    report->syncs = std::max(report->syncs, rank.syncs);
    report->hops = std::max(report->hops, rank.hops);
    report->frames = std::max(report->frames, rank.frames);
    report->rank_bytes = std::max(report->rank_bytes, rank.sent_bytes);
    report->memory_bytes = std::max(report->memory_bytes, rank.memory_bytes);
  }
  for (const Node& node : nodes_) {
    report->nic_bytes = std::max({report->nic_bytes, node.sent_bytes, node.received_bytes});
    for (uint64_t nbytes : node.socket_bytes) report->socket_bytes = std::max(report->socket_bytes, nbytes);
  }
  return Status::Ok();
}

}  // namespace

Status Simulate(const Kernels& kernels, const SimMachine& machine, const SimCall& call, SimReport* report) {
  Simulation simulation(kernels, machine, call);
  running = &simulation;
  Status status = simulation.Run(report);
  running = nullptr;
  return status;
}

}  // namespace tilerank
