// The flags and slots of a group of ranks on one node: what the collectives and the runner are made of. All of it is an address
// computation, one store, or a look; waiting is a bounded spin, then a shared futex. Sums are the kernels', algorithms are in
// all_reduce.cpp and its neighbours.
//
// Generations. A collective has one sequence number or several, the same on all ranks, counted from 1. Generation g of a slot is
// the bytes a rank puts into Slot(rank, g) before Publish(g). Slots and flag lines alternate by parity, hence the one rule:
//
//   a rank reads generation g only before it publishes g + 1 (or calls Consumed(g)), and
//   nobody writes generation g of a slot or a flag line before all readers of g - 2 are through.
//
// Where every rank awaited every rank at g - 1, that follows: a peer published g - 1 after it had read g - 2. After a broadcast or
// its like it does not, for anyone: so whoever writes calls Acquire(g) first - one compare where it follows, a look at `consumed`
// where it does not.
#pragma once
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/arena.h"
#include "comm/fabric.h"
#include "comm/recorder.h"
#include "comm/sync.h"
#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

/// Of this machine, for errors that name a process.
std::string HostName();

struct CommConfig {
  int rank = 0;
  int world_size = 1;
  int lanes = 1;               // pinned threads of each rank that take part; the same on all ranks
  size_t slot_bytes = 0;       // of one generation; rounded up to pages
  int spin_us = -1;            // of one wait before it sleeps; -1: kDefaultSpinUs, or 0 where threads outnumber cores
  int yields = -1;             // of a wait that does not spin, before it sleeps; -1: kDefaultYields
  std::vector<int> names;      // what messages call each rank, where these are not all ranks of the group; empty: 0, 1, ...
  // Of two ranks that are in another group too: looked at by waits that sleep. True when the other rank has left that group; its failures
  // become this one's.
  std::function<bool()> has_left;
};

/// Waits of this rank for another that outlived their first looks, about 3 us.
struct PeerWaits {
  int rank = 0;
  uint64_t waits = 0;
  uint64_t ticks = 0;  // in all; see recorder.h
  uint64_t late = 0;   // operations whose last rank it was
};

/// A peer as the rendezvous found it. `pidfd` < 0 where ranks are threads of one process.
struct PeerProcess {
  pid_t pid = 0;
  UniqueFd pidfd;
};

/// Why a peer broke the group, as this rank's failure. `owner`: what messages call that peer.
Status ToStatus(const AbortRecord& record, int owner);

class Communicator final : public Fabric {
 public:
  /// Size of a rank's arena for this configuration, and that of its part before the slots.
  static size_t ArenaBytes(const CommConfig& config);
  static size_t HeadBytes(const CommConfig& config);

  /// arenas[r]: rank r's arena as mapped here, fresh (all zeros); peers[r]: its process. Every rank of the node creates one.
  static Status Create(const CommConfig& config, std::vector<Arena> arenas, std::vector<PeerProcess> peers,
                       std::unique_ptr<Communicator>* communicator);
  /// Closes; the threads of all lanes must have come back.
  ~Communicator() override;

  int lanes() const { return config_.lanes; }
  size_t slot_bytes() const { return slot_stride_; }
  size_t arena_bytes() const { return ArenaBytes(config_); }
  int spin_us() const { return static_cast<int>(spin_ns_ / 1000); }

  /// Own slot: writable before Publish. A peer's: readable from Await to the next Publish (or Consumed). Page-aligned.
  std::byte* Slot(int rank, uint64_t sequence) const override {
    return arenas_[static_cast<size_t>(rank)].data() + slots_offset_ + (sequence & 1) * slot_stride_;
  }

  /// To be called before writing generation `sequence` (slot or flag), at least by whoever has not just come from an Await of
  /// sequence - 1. Waits for the readers of what is overwritten: this rank's last generation of that parity. Where it published none for
  /// long, as roots that take turns, they are through with it.
  Status Acquire(int lane, uint64_t sequence, const Deadline& deadline) override {
    if (settled_[static_cast<size_t>(lane)].sequence + 2 >= sequence) [[likely]] return Status::Ok();
    return AwaitConsumed(lane, Overwritten(lane, sequence), deadline);
  }

  /// Data first, then this: one seq_cst store; a syscall only when somebody sleeps.
  void Publish(int lane, uint64_t sequence, const OpTag& tag) override {
    FlagLine& line = Lane(config_.rank, lane).flag[sequence & 1];
    PublishLine(lane, sequence, tag, line);
  }
  void Publish(int lane, uint64_t sequence, const OpTag& tag, const FlagPayload& payload) override;

  /// True when Acquire would not wait: of a next generation of its parity, as Acquire is; of one published already it says whether that is consumed.
  bool IsAcquirable(int lane, uint64_t sequence) const override {
    return settled_[static_cast<size_t>(lane)].sequence + 2 >= sequence || HaveConsumed(lane, Overwritten(lane, sequence));
  }

  /// True when every peer has published `sequence` on this lane. Tags are not looked at: Await must follow.
  bool IsReady(int lane, uint64_t sequence) const override;

  bool IsReadyFrom(int lane, uint64_t sequence, int peer) const override {
    return Lane(peer, lane).flag[sequence & 1].sequence.load(std::memory_order_acquire) >= sequence;
  }

  /// Waits until every peer has published `sequence` with the same tag; then their slots may be read.
  Status Await(int lane, uint64_t sequence, const OpTag& tag, const Deadline& deadline) override;

  /// Waits for one peer, whatever its tag; *tag receives it. With Deadline::Idle() it waits as long as the group lives.
  Status AwaitFrom(int lane, uint64_t sequence, int peer, OpTag* tag, const Deadline& deadline);

  /// The same, but the peer's tag must equal `tag`.
  Status AwaitSame(int lane, uint64_t sequence, int peer, const OpTag& tag, const Deadline& deadline) override;

  /// The payload that came with a published flag.
  FlagPayload PayloadOf(int rank, int lane, uint64_t sequence) const override;

  /// This rank has read all generations up to `sequence`. Needed only where it does not publish sequence + 1 anyway.
  void Consumed(int lane, uint64_t sequence) override;
  /// Waits until every peer has read all generations up to `sequence`.
  Status AwaitConsumed(int lane, uint64_t sequence, const Deadline& deadline);
  /// The same of one peer; `what`: the operation, for messages.
  Status AwaitConsumedBy(int lane, uint64_t sequence, int peer, const char* what, const Deadline& deadline) override;

  /// Breaks the group here and on all peers. The first failure stays.
  void Abort(const Status& reason);
  Status Break(Status reason, int culprit, const char* operation, uint64_t sequence) override;
  /// Breaks it because `late` did nothing that this rank waits for, outside of a wait that has a deadline itself.
  void GiveUp(int late, int64_t waited_ms);
  bool failed() const override { return failed_.load(std::memory_order_acquire); }
  Status failure() const override;

  void ShowHeldUp(int by, int64_t now_ns) override {
    Control(config_.rank).held_up_ns.store(now_ns, std::memory_order_relaxed);
    Control(config_.rank).held_up_by.store(by + 1, std::memory_order_relaxed);
  }
  /// The rank that this one waits for, or that one in turn, as far as can be seen from this node; -1: it waits for none. Any thread.
  int HeldUpBy() const;

  /// Takes over the failure of a peer that tells one: for whoever waits for peers elsewhere.
  Status CheckAborts();
  /// True when that rank has closed the group in order.
  bool HasLeft(int rank) const { return Control(rank).left.load(std::memory_order_acquire) != 0; }

  /// Called on the failing thread after a failure has been recorded, once: wakes whoever waits outside of the flags. There may be several.
  void OnFailure(std::function<void()> callback);

  /// Ends this rank's waits with kClosed; the peers learn of it by Close() or by the end of the process.
  void Stop();
  /// Breaks it here alone, for what every rank finds by itself.
  void Stop(Status reason);

  /// The step and layer that the operations from here on belong to. Called by lane 0's thread.
  void Mark(uint32_t step, int32_t layer) {
    place_ = static_cast<uint64_t>(step) << 32 | static_cast<uint32_t>(layer + 1);
    now_ = Ticks();
  }

  /// Notes in the flight recorder that this rank is through with `sequence`, where neither Await nor Consumed says so.
  void Complete(int lane, uint64_t sequence) override {
    if (lane == 0) Completed(sequence, false);
  }

  /// Of lane 0, the wait between steps apart; for every other rank. Any thread.
  std::vector<PeerWaits> Waits() const;
  /// The ticks of all of them.
  uint64_t waited_ticks() const { return waited_ticks_.load(std::memory_order_relaxed); }
  /// From here on the flight recorder reads the clock for every sequence: 10 ns, twice.
  void RecordExactly() { clock_mask_ = 0; }
  /// Of a peer's process, or -1 where ranks are threads. Open as long as this object.
  int pidfd(int rank) const { return peers_[static_cast<size_t>(rank)].pidfd.get(); }
  pid_t pid(int rank) const { return rank == config_.rank ? getpid() : peers_[static_cast<size_t>(rank)].pid; }
  bool HasEnded(int rank) const;
  /// For making the group anew when it is broken.
  RenewalRecord& Renewal(int rank) const { return Control(rank).renewal; }
  ShownRecord& Shown(int rank) const { return Control(rank).shown; }
  std::atomic<uint32_t>& Outcome() const { return Control(0).outcome; }
  /// What the user knows a rank by.
  int NameOfRank(int rank) const { return config_.names.empty() ? rank : config_.names[static_cast<size_t>(rank)]; }
  /// Another group has taken the place of this one: its end is in order, whatever broke it.
  void Supersede() { Control(config_.rank).left.store(1, std::memory_order_seq_cst); }

  /// The last operations of every rank, as their arenas have them.
  std::vector<RankRecording> Recording(size_t limit) const;

  /// Tells the peers that this end is in order, and ends the watch. Idempotent; no lane may wait any more.
  void Close();

 private:
  // A look at the processor's counter costs 10 ns, the rest of a record 1: fast operations share one look.
  static constexpr uint64_t kSequencesPerClock = 8;
  static constexpr size_t kLanesOffset = kRecorderOffset + kRecorderBytes;
  explicit Communicator(const CommConfig& config);
  LaneControl& Lane(int rank, int lane) const {
    return reinterpret_cast<LaneControl*>(arenas_[static_cast<size_t>(rank)].data() + kLanesOffset)[lane];
  }
  ControlPage& Control(int rank) const { return *reinterpret_cast<ControlPage*>(arenas_[static_cast<size_t>(rank)].data()); }
  void PublishLine(int lane, uint64_t sequence, const OpTag& tag, FlagLine& line) {
    line.tag.store(tag.Bits(), std::memory_order_relaxed);
    line.count.store(tag.count, std::memory_order_relaxed);
    // Pairs with the acquire load in WaitFor. seq_cst: the look at `sleepers` must not pass it (see WaitFor).
    line.sequence.store(sequence, std::memory_order_seq_cst);
    // Behind the publish: these stores pass while the peers' lines are on their way.
    if (lane == 0) {
      if ((sequence & clock_mask_) == 0) now_ = Ticks();
      Note(sequence, tag.Bits(), tag.count, now_);
    }
    if (Lane(config_.rank, lane).sleepers.flag[sequence & 1].load(std::memory_order_seq_cst) != 0) [[unlikely]] {
      FutexWakeAll(line.sequence);
    }
  }

  Record& RecordOf(uint64_t sequence) const {
    return reinterpret_cast<Record*>(arenas_[static_cast<size_t>(config_.rank)].data() + kRecorderOffset)[sequence % kRecords];
  }
  void Note(uint64_t sequence, uint64_t tag, uint64_t count, uint64_t published) {
    Record& record = RecordOf(sequence);
    record.sequence.store(0, std::memory_order_relaxed);  // a reader leaves it out until it is whole
    record.completed.store(0, std::memory_order_relaxed);
    record.tag.store(tag, std::memory_order_relaxed);
    record.count.store(count, std::memory_order_relaxed);
    record.place.store(place_, std::memory_order_relaxed);
    record.published.store(published, std::memory_order_relaxed);
    record.sequence.store(sequence, std::memory_order_release);
  }
  void Completed(uint64_t sequence, bool was_slow) {
    if (was_slow || clock_mask_ == 0) now_ = Ticks();
    RecordOf(sequence).completed.store(now_, std::memory_order_relaxed);
  }
  // Of a generation that this rank does not publish.
  void Received(uint64_t sequence, const OpTag& tag) {
    Note(sequence, tag.Bits(), tag.count, 0);
    const bool was_slow = std::exchange(was_slow_, false);
    if (was_slow) NoteLate();
    Completed(sequence, was_slow);
  }

  struct Awaited {
    int peer;
    int lane;
    uint64_t sequence;
    const char* what;           // operation, for messages
    const OpTag* tag = nullptr;  // of an operation that all ranks publish: compared with whoever has
    bool is_consumed = false;    // awaited is not the peer's flag but that it is through with what it reads
  };
  uint64_t Overwritten(int lane, uint64_t sequence) const { return Lane(config_.rank, lane).flag[sequence & 1].sequence.load(std::memory_order_relaxed); }
  bool HasConsumed(int peer, int lane, uint64_t sequence) const;
  bool HaveConsumed(int lane, uint64_t sequence) const;
  Status WaitFor(const std::atomic<uint64_t>& word, std::atomic<uint32_t>& sleepers, const Awaited& awaited, const Deadline& deadline);
  Status WaitSlowly(const std::atomic<uint64_t>& word, std::atomic<uint32_t>& sleepers, const Awaited& awaited, const Deadline& deadline);
  void NoteLate() {
    if (late_peer_ >= 0) Add(waits_[static_cast<size_t>(std::exchange(late_peer_, -1))].late, 1);
  }
  // One thread at a time writes, others may read.
  static void Add(std::atomic<uint64_t>& counter, uint64_t value) {
    counter.store(counter.load(std::memory_order_relaxed) + value, std::memory_order_relaxed);
  }
  // A peer published `sequence` after it had read all generations before.
  void HeardOfAll(int lane, uint64_t sequence) { settled_[static_cast<size_t>(lane)].sequence = sequence - 1; }
  Status CheckTag(int peer, int lane, uint64_t sequence, const OpTag& mine);
  Status CheckPeers(const Awaited& awaited);
  Status Fail(Status status, int subject, int64_t pid, int signal, const char* operation, uint64_t sequence);
  Status TimedOut(const Awaited& awaited, const Deadline& deadline);
  // The rank to name where `peer` of this node is late: the one that it waits for, and so on. One that has not looked for `fresh_ns` was stopped
  // while it waited, and is at the end.
  int HolderOf(int peer, int64_t fresh_ns) const;
  // The place on this node of the rank that users call `name`; world_size: it is of another.
  int LocalOf(int name) const;
  int LateFor(int peer, const Deadline& deadline) const { return HolderOf(peer, deadline.timeout_ms() * 500'000); }
  void Watch();
  void WakeAll();
  bool FailHere(Status reason, std::vector<std::function<void()>>* callbacks);

  // State of a lane, touched by its thread only; a line each.
  struct alignas(64) Settled {
    uint64_t sequence = 0;  // all peers are known to have read the generations up to this one
  };

  const CommConfig config_;
  // Of the flight recorder, touched by lane 0's thread.
  uint64_t place_ = 0;     // see Mark
  uint64_t now_ = 0;       // ticks when the clock was last read
  bool was_slow_ = false;  // the last wait outlived its first looks
  uint64_t clock_mask_ = kSequencesPerClock - 1;
  // Of the statistics, likewise.
  struct PeerCounters {
    std::atomic<uint64_t> waits{0}, ticks{0}, late{0};
  };
  std::vector<PeerCounters> waits_;
  std::atomic<uint64_t> waited_ticks_{0};
  int late_peer_ = -1;  // whom the last slow wait was for
  std::vector<Arena> arenas_;
  std::vector<PeerProcess> peers_;
  size_t slots_offset_ = 0, slot_stride_ = 0;
  int64_t spin_ns_ = 0;
  int yields_ = 0;
  std::vector<Settled> settled_;

  std::atomic<bool> failed_{false};
  mutable std::mutex failure_mutex_;
  Status failure_;
  std::vector<std::function<void()>> on_failure_;

  UniqueFd stop_watch_;  // eventfd
  std::thread watch_;
  bool has_told_ = false;  // the abort record stands; guarded by failure_mutex_
  bool is_closed_ = false;
};

}  // namespace tilerank
