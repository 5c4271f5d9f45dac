#include "comm/communicator.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace tilerank {

namespace {

// Long enough to cover the skew of ranks that run the same program, short enough to hurt nobody who shares the core: a wake-up
// costs 5 us on a busy core and 50 us on one that went idle.
constexpr int kDefaultSpinUs = 100;
// Where ranks outnumber cores, the one that is awaited may be waiting for this very core. Handing it over is dearer than a look and much
// cheaper than a sleep and a wake: four ranks on two cores, the demo model, 0.09 ms a token, without 0.25.
constexpr int kDefaultYields = 8;
constexpr int64_t kSliceNs = 10'000'000;
// A wait that lasts shows whom it is for.
constexpr int64_t kShownAfterNs = 5'000'000;
// Whoever has not looked for so long, which it does once a slice, is taken for one that stands still.
constexpr int64_t kLookedNs = 250'000'000;
// The wait between steps looks at nothing but the futex: abort and loss wake it, and a wake-up that falls between its last look
// and its sleep costs at most one such slice.
constexpr int64_t kIdleSliceNs = 100'000'000;
constexpr int kLooksPerClock = 64;

size_t RoundToPages(size_t nbytes) { return (nbytes + kPageBytes - 1) & ~(kPageBytes - 1); }

// The signal that ended a process which is not our child. The kernel tells since 6.15, through PIDFD_GET_INFO; 0 where it does not.
int SignalOf(int pidfd) {
  struct {
    uint64_t mask, cgroup_id;
    uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
  } info = {};
  static_assert(sizeof info >= 64);
  constexpr uint64_t kExitInfo = 1 << 3;
  // Exit information stands once the parent has reaped the process: a matter of milliseconds, if it does at all.
  for (int look = 0; look < 20; look++) {
    info.mask = kExitInfo;
    if (ioctl(pidfd, _IOC(_IOC_READ | _IOC_WRITE, 0xFF, 11, sizeof info), &info) == 0 && (info.mask & kExitInfo) != 0) {
      return WIFSIGNALED(info.exit_code) ? WTERMSIG(info.exit_code) : 0;
    }
    if (errno == ENOTTY || errno == EINVAL) return 0;
    const timespec pause = {0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  return 0;
}

}  // namespace

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

const char* NameOf(DType dtype) {
  static constexpr const char* kNames[kDTypes] = {"f32", "bf16", "f16", "f64", "i8", "u8", "i32", "u32", "i64", "u64"};
  const auto i = static_cast<size_t>(dtype);
  return i < std::size(kNames) ? kNames[i] : "?";
}

const char* NameOf(ReduceOp op) {
  static constexpr const char* kNames[kReduceOps] = {"sum", "prod", "min", "max", "avg", "band", "bor", "bxor"};
  const auto i = static_cast<size_t>(op);
  return i < std::size(kNames) ? kNames[i] : "?";
}

const char* NameOf(CollectiveOp op) {
  switch (op) {
    case CollectiveOp::kBarrier: return "barrier";
    case CollectiveOp::kAllReduce: return "allReduce";
    case CollectiveOp::kAllGather: return "allGather";
    case CollectiveOp::kBroadcast: return "broadcast";
    case CollectiveOp::kReduceScatter: return "reduceScatter";
    case CollectiveOp::kExchange: return "exchange";
    case CollectiveOp::kReduce: return "reduce";
    case CollectiveOp::kGather: return "gather";
    case CollectiveOp::kScatter: return "scatter";
    case CollectiveOp::kAllToAll: return "allToAll";
    case CollectiveOp::kMessage: return "message";
    case CollectiveOp::kBatch: return "batch";
  }
  return "unknown operation";
}

OpTag OpTag::FromBits(uint64_t bits, uint64_t count) {
  OpTag tag;
  tag.op = static_cast<CollectiveOp>(bits & 0xff);
  tag.dtype = static_cast<DType>(bits >> 8 & 0xff);
  tag.variant = static_cast<uint16_t>(bits >> 16);
  tag.detail = static_cast<uint32_t>(bits >> 32);
  tag.count = count;
  return tag;
}

std::string OpTag::Describe() const {
  std::string text = NameOf(op);
  if (op != CollectiveOp::kBarrier) text += " of " + std::to_string(count) + " " + NameOf(dtype);
  if (const int reduction = variant >> 8 & 0x7; reduction != 0) text += std::string(", ") + NameOf(static_cast<ReduceOp>(reduction));
  if ((variant & kQ8Variant) != 0) text += ", wire q8";
  if (const int rest = variant & 0xff; rest != 0) text += ", variant " + std::to_string(rest);
  if (detail != 0) {
    char digest[32];
    std::snprintf(digest, sizeof digest, ", history %08x", detail);
    text += digest;
  }
  return text;
}

size_t Communicator::HeadBytes(const CommConfig& config) {
  return kLanesOffset + RoundToPages(sizeof(LaneControl) * static_cast<size_t>(config.lanes));
}

size_t Communicator::ArenaBytes(const CommConfig& config) { return HeadBytes(config) + 2 * RoundToPages(config.slot_bytes); }

Communicator::Communicator(const CommConfig& config) : Fabric(config.rank, config.world_size), config_(config), waits_(static_cast<size_t>(config.world_size)) {
  slots_offset_ = HeadBytes(config);
  slot_stride_ = RoundToPages(config.slot_bytes);
  settled_.resize(static_cast<size_t>(config.lanes));
}

Status Communicator::Create(const CommConfig& config, std::vector<Arena> arenas, std::vector<PeerProcess> peers,
                            std::unique_ptr<Communicator>* communicator) {
  if (config.world_size < 1 || config.rank < 0 || config.rank >= config.world_size) {
    return Status(Code::kInvalidArgument, "rank " + std::to_string(config.rank) + " is not in a group of " + std::to_string(config.world_size));
  }
  if (config.world_size > kMaxWorldSize) {
    return Status(Code::kInvalidArgument, "a group has at most " + std::to_string(kMaxWorldSize) + " ranks, not " + std::to_string(config.world_size));
  }
  if (config.lanes < 1 || config.lanes > 4096) {
    return Status(Code::kInvalidArgument, "a group has 1 to 4096 lanes, not " + std::to_string(config.lanes));
  }
  const size_t size = static_cast<size_t>(config.world_size);
  if (arenas.size() != size || peers.size() != size) return Status(Code::kInternal, "one arena and one process a rank are needed");
  for (const Arena& arena : arenas) {
    if (arena.size() < ArenaBytes(config)) return Status(Code::kInternal, "an arena is smaller than its group's layout");
  }
  std::unique_ptr<Communicator> made(new Communicator(config));
  made->arenas_ = std::move(arenas);
  made->peers_ = std::move(peers);
  ControlPage& control = made->Control(config.rank);
  control.start_ns.store(NowNs(), std::memory_order_relaxed);
  made->now_ = Ticks();
  control.start_ticks.store(made->now_, std::memory_order_relaxed);
  made->spin_ns_ = 1000 * static_cast<int64_t>(config.spin_us >= 0 ? config.spin_us : kDefaultSpinUs);
  made->yields_ = made->spin_ns_ > 0 ? 0 : config.yields >= 0 ? config.yields : kDefaultYields;
  bool is_watched = false;
  for (const PeerProcess& peer : made->peers_) is_watched |= static_cast<bool>(peer.pidfd);
  if (is_watched) {
    made->stop_watch_ = UniqueFd(eventfd(0, EFD_CLOEXEC));
    if (!made->stop_watch_) return Status(Code::kIo, std::string("eventfd failed: ") + std::strerror(errno));
    Communicator* self = made.get();
    made->watch_ = std::thread([self] { self->Watch(); });
  }
  *communicator = std::move(made);
  return Status::Ok();
}

Communicator::~Communicator() { Close(); }

void Communicator::Close() {
  if (is_closed_) return;
  is_closed_ = true;
  // A rank that told why it failed has said more than `left` would.
  std::unique_lock lock(failure_mutex_);
  if (!has_told_) Control(config_.rank).left.store(1, std::memory_order_seq_cst);
  lock.unlock();
  if (watch_.joinable()) {
    const uint64_t one = 1;
    while (write(stop_watch_.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
    watch_.join();
  }
  WakeAll();
}

bool Communicator::HasEnded(int rank) const {
  pollfd look = {pidfd(rank), POLLIN, 0};
  return look.fd >= 0 && poll(&look, 1, 0) > 0;
}

void Communicator::Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload& payload) {
  FlagLine& line = Lane(config_.rank, lane).flag[sequence & 1];
  for (int i = 0; i < kPayloadWords; i++) line.payload[i].store(payload.words[i], std::memory_order_relaxed);
  PublishLine(lane, sequence, tag, line);
}

FlagPayload Communicator::PayloadOf(int rank, int lane, uint64_t sequence) const {
  const FlagLine& line = Lane(rank, lane).flag[sequence & 1];
  FlagPayload payload;
  for (int i = 0; i < kPayloadWords; i++) payload.words[i] = line.payload[i].load(std::memory_order_relaxed);
  return payload;
}

bool Communicator::IsReady(int lane, uint64_t sequence) const {
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank) continue;
    if (Lane(peer, lane).flag[sequence & 1].sequence.load(std::memory_order_acquire) < sequence) return false;
  }
  return true;
}

Status Communicator::Await(int lane, uint64_t sequence, const OpTag& tag, const Deadline& deadline) {
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank) continue;
    LaneControl& theirs = Lane(peer, lane);
    FlagLine& line = theirs.flag[sequence & 1];
    // Acquire; pairs with the store in PublishLine: the peer's slot of this generation is readable afterwards.
    if (line.sequence.load(std::memory_order_acquire) < sequence) {
      Status s = WaitFor(line.sequence, theirs.sleepers.flag[sequence & 1], {peer, lane, sequence, NameOf(tag.op), &tag}, deadline);
      if (!s.ok()) [[unlikely]] return s;
    }
    if (line.tag.load(std::memory_order_relaxed) != tag.Bits() || line.count.load(std::memory_order_relaxed) != tag.count ||
        line.sequence.load(std::memory_order_relaxed) != sequence) [[unlikely]] {
      return CheckTag(peer, lane, sequence, tag);
    }
  }
  if (failed()) [[unlikely]] return failure();
  if (lane == 0) {
    const bool was_slow = std::exchange(was_slow_, false);
    // Whoever was waited for after the others had come.
    if (was_slow) NoteLate();
    Completed(sequence, was_slow);
  }
  HeardOfAll(lane, sequence);
  return Status::Ok();
}

Status Communicator::AwaitFrom(int lane, uint64_t sequence, int peer, OpTag* tag, const Deadline& deadline) {
  LaneControl& theirs = Lane(peer, lane);
  FlagLine& line = theirs.flag[sequence & 1];
  if (line.sequence.load(std::memory_order_acquire) < sequence) {
    const char* what = deadline.is_idle() ? "idle" : "broadcast";
    if (Status s = WaitFor(line.sequence, theirs.sleepers.flag[sequence & 1], {peer, lane, sequence, what, nullptr}, deadline); !s.ok()) return s;
  }
  const uint64_t seen = line.sequence.load(std::memory_order_relaxed);
  *tag = OpTag::FromBits(line.tag.load(std::memory_order_relaxed), line.count.load(std::memory_order_relaxed));
  if (seen != sequence) return CheckTag(peer, lane, sequence, *tag);
  if (failed()) return failure();
  if (lane == 0) Received(sequence, *tag);
  return Status::Ok();
}

Status Communicator::AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) {
  LaneControl& theirs = Lane(peer, lane);
  FlagLine& line = theirs.flag[sequence & 1];
  if (line.sequence.load(std::memory_order_acquire) < sequence) {
    const Awaited awaited = {peer, lane, sequence, NameOf(tag.op), &tag};
    if (Status s = WaitFor(line.sequence, theirs.sleepers.flag[sequence & 1], awaited, deadline); !s.ok()) return s;
  }
  if (line.tag.load(std::memory_order_relaxed) != tag.Bits() || line.count.load(std::memory_order_relaxed) != tag.count ||
      line.sequence.load(std::memory_order_relaxed) != sequence) {
    return CheckTag(peer, lane, sequence, tag);
  }
  if (failed()) return failure();
  if (lane == 0) Received(sequence, tag);
  if (config_.world_size == 2) HeardOfAll(lane, sequence);
  return Status::Ok();
}

Status Communicator::CheckTag(int peer, int lane, uint64_t sequence, const OpTag& mine) {
  const FlagLine& line = Lane(peer, lane).flag[sequence & 1];
  const uint64_t seen = line.sequence.load(std::memory_order_acquire);
  const OpTag theirs = OpTag::FromBits(line.tag.load(std::memory_order_relaxed), line.count.load(std::memory_order_relaxed));
  std::string text = "ranks called different operations at sequence " + std::to_string(sequence) + ": rank " +
                     std::to_string(NameOfRank(config_.rank)) + " called " + mine.Describe() + ", rank " + std::to_string(NameOfRank(peer));
  text += seen == sequence ? " called " + theirs.Describe()
                           : " is ahead at sequence " + std::to_string(seen) + " with " + theirs.Describe();
  Status status = Status(Code::kMismatch, std::move(text))
                      .Number("rank", NameOfRank(config_.rank))
                      .Number("peer", NameOfRank(peer))
                      .Number("sequence", static_cast<double>(sequence))
                      .Text("operation", NameOf(mine.op))
                      .Text("mine", mine.Describe())
                      .Text("theirs", theirs.Describe());
  return Fail(std::move(status), NameOfRank(peer), 0, 0, NameOf(mine.op), sequence);
}

void Communicator::Consumed(int lane, uint64_t sequence) {
  LaneControl& mine = Lane(config_.rank, lane);
  mine.consumed.sequence.store(sequence, std::memory_order_seq_cst);
  if (mine.sleepers.consumed.load(std::memory_order_seq_cst) != 0) FutexWakeAll(mine.consumed.sequence);
}

bool Communicator::HasConsumed(int peer, int lane, uint64_t sequence) const {
  const LaneControl& theirs = Lane(peer, lane);
  if (theirs.consumed.sequence.load(std::memory_order_acquire) >= sequence) return true;
  // A peer that has published a later generation is through with this one, whether it said so or not.
  if (theirs.flag[0].sequence.load(std::memory_order_acquire) > sequence) return true;
  return theirs.flag[1].sequence.load(std::memory_order_acquire) > sequence;
}

bool Communicator::HaveConsumed(int lane, uint64_t sequence) const {
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer != config_.rank && !HasConsumed(peer, lane, sequence)) return false;
  }
  return true;
}

Status Communicator::AwaitConsumed(int lane, uint64_t sequence, const Deadline& deadline) {
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank) continue;
    if (Status s = AwaitConsumedBy(lane, sequence, peer, "consume", deadline); !s.ok()) return s;
  }
  uint64_t& settled = settled_[static_cast<size_t>(lane)].sequence;
  settled = std::max(settled, sequence);
  return Status::Ok();
}

Status Communicator::AwaitConsumedBy(int lane, uint64_t sequence, int peer, const char* what, const Deadline& deadline) {
  if (HasConsumed(peer, lane, sequence)) return Status::Ok();
  LaneControl& theirs = Lane(peer, lane);
  return WaitFor(theirs.consumed.sequence, theirs.sleepers.consumed, {peer, lane, sequence, what, nullptr, true}, deadline);
}

Status Communicator::WaitFor(const std::atomic<uint64_t>& word, std::atomic<uint32_t>& sleepers, const Awaited& awaited,
                             const Deadline& deadline) {
  // The first looks read no clock: a peer that is a microsecond behind costs nothing more than its delay.
  if (spin_ns_ > 0) {
    for (int look = 0; look < kLooksPerClock; look++) {
      if (word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
      Pause();
    }
  }
  Status status = WaitSlowly(word, sleepers, awaited, deadline);
  // WaitSlowly read the clock when it began. Where that stands still, in the flag check, nothing is counted: it would tell states apart that
  // differ in nothing else.
  const uint64_t ticks = awaited.lane == 0 && !deadline.is_idle() ? Ticks() - now_ : 0;
  if (ticks > 0) {
    late_peer_ = awaited.peer;
    PeerCounters& peer = waits_[static_cast<size_t>(awaited.peer)];
    Add(peer.waits, 1);
    Add(peer.ticks, ticks);
    Add(waited_ticks_, ticks);
  }
  return status;
}

/// Shows what this rank waits for, as long as it does.
class HeldUpGuard {
 public:
  explicit HeldUpGuard(Communicator& communicator) : communicator_(communicator) {}
  ~HeldUpGuard() {
    if (is_shown_) communicator_.ShowHeldUp(-1, 0);
  }
  void Show(int by, int64_t now_ns) {
    is_shown_ = true;
    communicator_.ShowHeldUp(by, now_ns);
  }

 private:
  Communicator& communicator_;
  bool is_shown_ = false;
};

Status Communicator::WaitSlowly(const std::atomic<uint64_t>& word, std::atomic<uint32_t>& sleepers, const Awaited& awaited,
                                const Deadline& deadline) {
  int64_t now = NowNs();
  const int64_t start = now;
  deadline.ElapsedNs(now);
  if (awaited.lane == 0) now_ = Ticks();
  if (awaited.lane == 0 && !awaited.is_consumed) {
    was_slow_ = true;
    // The moment from which this rank waits; one that publishes nothing here still shows what it waits for.
    Record& record = RecordOf(awaited.sequence);
    const uint64_t recorded = record.sequence.load(std::memory_order_relaxed);
    if (recorded < awaited.sequence) {
      const OpTag tag = awaited.tag != nullptr ? *awaited.tag : OpTag{.op = CollectiveOp::kBroadcast};
      Note(awaited.sequence, tag.Bits(), tag.count, 0);
    } else if (recorded == awaited.sequence && record.published.load(std::memory_order_relaxed) != 0 &&
               record.completed.load(std::memory_order_relaxed) == 0) {
      record.published.store(now_, std::memory_order_relaxed);
    }
  }
  for (int look = 0; look < yields_; look++) {
    sched_yield();
    if (word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
  }
  const int64_t spin_end = now + spin_ns_;
  while (now < spin_end) {
    for (int look = 0; look < kLooksPerClock; look++) {
      if (word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
      Pause();
    }
    if (failed()) return failure();
    if (deadline.IsOver(now)) break;
    now = NowNs();
  }
  HeldUpGuard shown(*this);
  for (;;) {
    if (Status s = CheckPeers(awaited); !s.ok()) {
      // What the peer published before it failed or left still counts.
      if (!failed() && word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
      return s;
    }
    now = NowNs();
    if (deadline.IsOver(now)) {
      if (word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
      return TimedOut(awaited, deadline);
    }
    if (awaited.lane == 0 && now - start > kShownAfterNs) shown.Show(NameOfRank(awaited.peer), now);
    // Either the publisher sees the raised count, or this look sees its sequence: both are seq_cst.
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t seen = word.load(std::memory_order_seq_cst);
    if (seen < awaited.sequence && !failed()) {
      FutexWait(word, seen, std::min(deadline.is_idle() ? kIdleSliceNs : kSliceNs, deadline.RemainingNs(now)));
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (word.load(std::memory_order_acquire) >= awaited.sequence) return Status::Ok();
  }
}

Status ToStatus(const AbortRecord& record, int owner) {
  std::string text = record.text;
  if (text.find(" (reported by rank ") == std::string::npos) text += " (reported by rank " + std::to_string(owner) + ")";
  Status status = Status(static_cast<Code>(record.code), std::move(text)).Number("reportedBy", owner).Text("operation", record.operation);
  if (record.subject >= 0) {
    const bool is_late = static_cast<Code>(record.code) == Code::kTimeout;
    if (is_late) std::move(status).Text("lateRanks", std::to_string(record.subject));
    std::move(status).Number("rank", is_late ? owner : record.subject);
  }
  if (static_cast<Code>(record.code) == Code::kPeerLost) std::move(status).Text("host", record.host);
  if (record.pid != 0) std::move(status).Number("pid", static_cast<double>(record.pid));
  if (record.signal != 0) std::move(status).Number("signal", record.signal);
  std::move(status).Number("sequence", static_cast<double>(record.sequence));
  return status;
}

Status Communicator::CheckAborts() {
  if (failed()) return failure();
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank) continue;
    const AbortRecord& theirs = Control(peer).abort;
    // Acquire; pairs with the store in Fail: the record's plain fields stand.
    if (theirs.state.load(std::memory_order_acquire) == 0) continue;
    return Fail(ToStatus(theirs, NameOfRank(peer)), theirs.subject, theirs.pid, theirs.signal, theirs.operation, theirs.sequence);
  }
  return Status::Ok();
}

Status Communicator::CheckPeers(const Awaited& awaited) {
  const bool has_left_elsewhere = config_.has_left && config_.has_left();
  if (Status s = CheckAborts(); !s.ok()) return s;
  if (awaited.tag != nullptr) {
    // A peer that is not the one waited for may show already that the ranks have parted.
    for (int peer = 0; peer < config_.world_size; peer++) {
      if (peer == config_.rank) continue;
      const FlagLine& line = Lane(peer, awaited.lane).flag[awaited.sequence & 1];
      if (line.sequence.load(std::memory_order_acquire) != awaited.sequence) continue;
      if (line.tag.load(std::memory_order_relaxed) != awaited.tag->Bits() || line.count.load(std::memory_order_relaxed) != awaited.tag->count) {
        return CheckTag(peer, awaited.lane, awaited.sequence, *awaited.tag);
      }
    }
  }
  const bool is_renewing = Renewal(awaited.peer).ticket.load(std::memory_order_acquire) != 0;
  if (HasLeft(awaited.peer) || has_left_elsewhere || is_renewing) {
    // Both are stored after the peer's last publish: look again before calling it a loss.
    const LaneControl& theirs = Lane(awaited.peer, awaited.lane);
    const uint64_t last = std::max(theirs.flag[0].sequence.load(std::memory_order_acquire), theirs.flag[1].sequence.load(std::memory_order_acquire));
    const bool has_come = awaited.is_consumed ? HasConsumed(awaited.peer, awaited.lane, awaited.sequence)
                                              : std::max(last, theirs.consumed.sequence.load(std::memory_order_acquire)) >= awaited.sequence;
    if (has_come) return Status::Ok();
    const pid_t pid = peers_[static_cast<size_t>(awaited.peer)].pid;
    const char* how = is_renewing ? ") went on to make the group anew after sequence " : ") closed the group after sequence ";
    const Code code = is_renewing ? Code::kAborted : Code::kPeerLost;
    Status status = Status(code, "rank " + std::to_string(NameOfRank(awaited.peer)) + " (pid " + std::to_string(pid) + " on " + HostName() + how +
                                                std::to_string(last) + ", while rank " + std::to_string(NameOfRank(config_.rank)) + " waits for it in " +
                                                awaited.what + " at sequence " + std::to_string(awaited.sequence))
                        .Number("rank", NameOfRank(awaited.peer))
                        .Number("pid", pid)
                        .Number("reportedBy", NameOfRank(config_.rank))
                        .Number("sequence", static_cast<double>(awaited.sequence))
                        .Text("host", HostName())
                        .Text("operation", awaited.what);
    return Fail(std::move(status), NameOfRank(awaited.peer), pid, 0, awaited.what, awaited.sequence);
  }
  return Status::Ok();
}

int Communicator::LocalOf(int name) const {
  int local = 0;
  while (local < config_.world_size && NameOfRank(local) != name) local++;
  return local;
}

int Communicator::HolderOf(int peer, int64_t fresh_ns) const {
  const int64_t now = NowNs();
  for (int hop = 0; hop < config_.world_size; hop++) {
    const ControlPage& control = Control(peer);
    const int by = control.held_up_by.load(std::memory_order_relaxed) - 1;
    if (by < 0 || by == NameOfRank(config_.rank) || now - control.held_up_ns.load(std::memory_order_relaxed) > fresh_ns) break;
    const int local = LocalOf(by);
    if (local == config_.world_size) return by;  // of another node
    peer = local;
  }
  return NameOfRank(peer);
}

int Communicator::HeldUpBy() const {
  const int by = Control(config_.rank).held_up_by.load(std::memory_order_relaxed) - 1;
  const int local = by < 0 ? config_.world_size : LocalOf(by);
  return local == config_.world_size ? by : HolderOf(local, kLookedNs);
}

Status Communicator::TimedOut(const Awaited& awaited, const Deadline& deadline) {
  std::string late, details;
  // Where one rank gives to all others, these publish nothing: they are not late.
  const bool is_from_one = !awaited.is_consumed && (awaited.tag == nullptr || awaited.tag->op == CollectiveOp::kBroadcast ||
                                                    awaited.tag->op == CollectiveOp::kScatter || awaited.tag->op == CollectiveOp::kMessage);
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank || (is_from_one && peer != awaited.peer)) continue;
    const LaneControl& theirs = Lane(peer, awaited.lane);
    const uint64_t last = std::max(theirs.flag[0].sequence.load(std::memory_order_acquire), theirs.flag[1].sequence.load(std::memory_order_acquire));
    if (last >= awaited.sequence || (awaited.is_consumed && HasConsumed(peer, awaited.lane, awaited.sequence))) continue;
    const int named = LateFor(peer, deadline);
    const std::string name = std::to_string(named);
    const bool is_named = ("," + late + ",").find("," + name + ",") != std::string::npos;
    if (!is_named) late += (late.empty() ? "" : ",") + name;
    details += (details.empty() ? "rank " : ", rank ") + std::to_string(NameOfRank(peer)) + " (pid " + std::to_string(peers_[static_cast<size_t>(peer)].pid) +
               ") got to sequence " + std::to_string(last);
    if (named != NameOfRank(peer)) details += ", waiting for rank " + name;
  }
  if (late.empty()) {  // the peer published but has not consumed
    late = std::to_string(LateFor(awaited.peer, deadline));
    details = "rank " + late + " has not read its input";
  }
  const double elapsed_ms = static_cast<double>(deadline.ElapsedNs(NowNs())) / 1e6;
  Status status = Status(Code::kTimeout, std::string(awaited.what) + " at sequence " + std::to_string(awaited.sequence) + " did not end within " +
                                             std::to_string(deadline.timeout_ms()) + " ms on rank " + std::to_string(NameOfRank(config_.rank)) + ": " + details)
                      .Number("rank", NameOfRank(config_.rank))
                      .Text("lateRanks", late)
                      .Number("sequence", static_cast<double>(awaited.sequence))
                      .Number("elapsedMs", elapsed_ms)
                      .Text("operation", awaited.what);
  return Fail(std::move(status), std::atoi(late.c_str()), 0, 0, awaited.what, awaited.sequence);
}

Status Communicator::Fail(Status status, int subject, int64_t pid, int signal, const char* operation, uint64_t sequence) {
  std::vector<std::function<void()>> callbacks;
  {
    std::lock_guard lock(failure_mutex_);
    if (failed()) return failure_;
    if (const Record& record = RecordOf(sequence); record.sequence.load(std::memory_order_acquire) == sequence) {
      const uint64_t step = record.place.load(std::memory_order_relaxed) >> 32;
      if (step != 0) std::move(status).Number("step", static_cast<double>(step));
    }
    failure_ = std::move(status);
    AbortRecord& mine = Control(config_.rank).abort;
    mine.code = static_cast<int32_t>(failure_.code());
    mine.subject = subject;
    mine.signal = signal;
    mine.pid = pid;
    mine.sequence = sequence;
    std::snprintf(mine.operation, sizeof mine.operation, "%s", operation);
    for (const auto& [key, value] : failure_.texts()) {
      if (std::strcmp(key, "host") == 0) std::snprintf(mine.host, sizeof mine.host, "%s", value.c_str());
    }
    std::snprintf(mine.text, sizeof mine.text, "%s", failure_.message().c_str());
    mine.state.store(1, std::memory_order_seq_cst);
    has_told_ = true;
    failed_.store(true, std::memory_order_seq_cst);
    callbacks = on_failure_;
  }
  WakeAll();
  for (const std::function<void()>& callback : callbacks) callback();
  std::lock_guard lock(failure_mutex_);
  return failure_;
}

void Communicator::Stop() {
  std::vector<std::function<void()>> callbacks;
  const std::string name = std::to_string(NameOfRank(config_.rank));
  if (FailHere(Status(Code::kClosed, "the group was closed on rank " + name).Number("rank", NameOfRank(config_.rank)), &callbacks)) WakeAll();
}

void Communicator::Stop(Status reason) {
  std::vector<std::function<void()>> callbacks;
  if (!FailHere(std::move(reason), &callbacks)) return;
  WakeAll();
  for (const std::function<void()>& callback : callbacks) callback();
}

bool Communicator::FailHere(Status reason, std::vector<std::function<void()>>* callbacks) {
  std::lock_guard lock(failure_mutex_);
  if (failed()) return false;
  failure_ = std::move(reason);
  failed_.store(true, std::memory_order_seq_cst);
  *callbacks = on_failure_;
  return true;
}

void Communicator::Abort(const Status& reason) {
  // Called on any thread: the operation is what this rank's own flags say that it published last.
  const FlagLine* flags = Lane(config_.rank, 0).flag;
  const FlagLine& last = flags[flags[1].sequence.load(std::memory_order_acquire) > flags[0].sequence.load(std::memory_order_acquire) ? 1 : 0];
  const uint64_t bits = last.tag.load(std::memory_order_relaxed);
  const CollectiveOp op = bits == 0 ? CollectiveOp::kBarrier : OpTag::FromBits(bits, 0).op;
  (void)Fail(reason, NameOfRank(config_.rank), getpid(), 0, NameOf(op), 0);
}

Status Communicator::Break(Status reason, int culprit, const char* operation, uint64_t sequence) {
  int64_t pid = 0;
  int signal = 0;
  for (const auto& [key, value] : reason.numbers()) {
    if (std::strcmp(key, "pid") == 0) pid = static_cast<int64_t>(value);
    if (std::strcmp(key, "signal") == 0) signal = static_cast<int>(value);
  }
  // Another node may tell first of a rank that has ended on this one, whose kernel knows more.
  for (int rank = 0; rank < config_.world_size && reason.code() == Code::kPeerLost && signal == 0; rank++) {
    if (NameOfRank(rank) != culprit || rank == config_.rank || !HasEnded(rank)) continue;
    signal = SignalOf(pidfd(rank));
    if (signal != 0) std::move(reason).Number("signal", signal);
  }
  return Fail(std::move(reason), culprit, pid, signal, operation, sequence);
}

void Communicator::GiveUp(int late, int64_t waited_ms) {
  const LaneControl& theirs = Lane(late, 0);
  const uint64_t last = std::max(theirs.flag[0].sequence.load(std::memory_order_acquire), theirs.flag[1].sequence.load(std::memory_order_acquire));
  Status status = Status(Code::kTimeout, "rank " + std::to_string(NameOfRank(config_.rank)) + " waited " + std::to_string(waited_ms) + " ms for rank " +
                                             std::to_string(NameOfRank(late)) + " (pid " + std::to_string(peers_[static_cast<size_t>(late)].pid) +
                                             "), which got to sequence " + std::to_string(last))
                      .Number("rank", NameOfRank(config_.rank))
                      .Text("lateRanks", std::to_string(NameOfRank(late)))
                      .Number("sequence", static_cast<double>(last))
                      .Number("elapsedMs", static_cast<double>(waited_ms))
                      .Text("operation", "idle");
  (void)Fail(std::move(status), NameOfRank(late), 0, 0, "idle", last);
}

Status Communicator::failure() const {
  std::lock_guard lock(failure_mutex_);
  return failure_;
}

void Communicator::OnFailure(std::function<void()> callback) {
  bool is_late;
  {
    std::lock_guard lock(failure_mutex_);
    is_late = failed();
    if (!is_late) on_failure_.push_back(callback);
  }
  if (is_late) callback();
}

std::vector<PeerWaits> Communicator::Waits() const {
  std::vector<PeerWaits> all;
  for (int peer = 0; peer < config_.world_size; peer++) {
    if (peer == config_.rank) continue;
    const PeerCounters& counters = waits_[static_cast<size_t>(peer)];
    all.push_back({NameOfRank(peer), counters.waits.load(std::memory_order_relaxed), counters.ticks.load(std::memory_order_relaxed),
                   counters.late.load(std::memory_order_relaxed)});
  }
  return all;
}

std::vector<RankRecording> Communicator::Recording(size_t limit) const {
  std::vector<RankRecording> all;
  for (int rank = 0; rank < config_.world_size; rank++) {
    const pid_t pid = rank == config_.rank ? getpid() : peers_[static_cast<size_t>(rank)].pid;
    all.push_back({NameOfRank(rank), 0, pid, ReadRecorder(arenas_[static_cast<size_t>(rank)].data(), limit)});
  }
  return all;
}

void Communicator::WakeAll() {
  // Own waiters sleep on words in the peers' arenas, theirs on words in this one.
  for (int rank = 0; rank < config_.world_size; rank++) {
    for (int lane = 0; lane < config_.lanes; lane++) {
      LaneControl& control = Lane(rank, lane);
      for (int parity = 0; parity < 2; parity++) {
        if (control.sleepers.flag[parity].load(std::memory_order_seq_cst) != 0) FutexWakeAll(control.flag[parity].sequence);
      }
      if (control.sleepers.consumed.load(std::memory_order_seq_cst) != 0) FutexWakeAll(control.consumed.sequence);
    }
  }
}

// Sleeps in poll until a peer's process ends or Close() says so; it looks at nothing in between.
void Communicator::Watch() {
  std::vector<pollfd> watched = {{stop_watch_.get(), POLLIN, 0}};
  std::vector<int> ranks = {-1};
  for (int peer = 0; peer < config_.world_size; peer++) {
    const PeerProcess& process = peers_[static_cast<size_t>(peer)];
    if (!process.pidfd) continue;
    watched.push_back({process.pidfd.get(), POLLIN, 0});
    ranks.push_back(peer);
  }
  for (;;) {
    if (poll(watched.data(), watched.size(), -1) < 0) {
      if (errno == EINTR) continue;
      (void)Fail(Status(Code::kIo, std::string("watching the other ranks failed: ") + std::strerror(errno)), -1, 0, 0, "watch", 0);
      return;
    }
    if (watched[0].revents != 0) return;
    for (size_t i = 1; i < watched.size(); i++) {
      if (watched[i].revents == 0) continue;
      const int peer = ranks[i];
      watched[i].fd = -1;  // seen: poll skips it from now on
      watched[i].revents = 0;
      ControlPage& theirs = Control(peer);
      if (theirs.left.load(std::memory_order_acquire) != 0) {
        WakeAll();  // an orderly end; whoever still waits for that rank finds out by `left`
        continue;
      }
      // A rank that failed and then ended is not the cause: its record names that.
      if (theirs.abort.state.load(std::memory_order_acquire) != 0) {
        (void)CheckPeers({peer, 0, 0, "watch", nullptr});
        continue;
      }
      const PeerProcess& process = peers_[static_cast<size_t>(peer)];
      const int signal = SignalOf(process.pidfd.get());
      const LaneControl& lane = Lane(peer, 0);
      const uint64_t last = std::max(lane.flag[0].sequence.load(std::memory_order_acquire), lane.flag[1].sequence.load(std::memory_order_acquire));
      const LaneControl& own = Lane(config_.rank, 0);
      const int parity = own.flag[0].sequence.load(std::memory_order_acquire) > own.flag[1].sequence.load(std::memory_order_acquire) ? 0 : 1;
      const uint64_t sequence = own.flag[parity].sequence.load(std::memory_order_acquire);
      const char* operation =
          sequence == 0 ? "none" : NameOf(OpTag::FromBits(own.flag[parity].tag.load(std::memory_order_relaxed), 0).op);
      std::string text = "rank " + std::to_string(NameOfRank(peer)) + " (pid " + std::to_string(process.pid) + " on " + HostName() + ") ended";
      if (signal != 0) text += " by signal " + std::to_string(signal);
      text += " at sequence " + std::to_string(last) + "; rank " + std::to_string(NameOfRank(config_.rank)) + " was at sequence " +
              std::to_string(sequence) + " (" + operation + ")";
      Status status = Status(Code::kPeerLost, std::move(text))
                          .Number("rank", NameOfRank(peer))
                          .Number("pid", process.pid)
                          .Number("reportedBy", NameOfRank(config_.rank))
                          .Number("sequence", static_cast<double>(sequence))
                          .Text("host", HostName())
                          .Text("operation", operation);
      if (signal != 0) std::move(status).Number("signal", signal);
      (void)Fail(std::move(status), NameOfRank(peer), process.pid, signal, operation, sequence);
    }
  }
}

}  // namespace tilerank
