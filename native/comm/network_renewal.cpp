#include "comm/network_renewal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

namespace tilerank {

namespace {

// Nobody is in a hurry, and who waits may be waited for on the same core.
constexpr int64_t kLookNs = 1'000'000;
// Who decides gives up first; the others learn why in that time.
constexpr int64_t kGraceMs = 2000;

template <class Ranks>
int LowestOf(const Ranks& ranks) {
  for (size_t rank = 0; rank < ranks.size(); rank++) {
    if (ranks[rank]) return static_cast<int>(rank);
  }
  return -1;
}

}  // namespace

NetworkRenewal::NetworkRenewal(std::shared_ptr<Communicator> broken, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Mailbox::Stream> stream,
                               std::shared_ptr<Mailbox::Stream> messages, Layout layout, std::vector<int> members)
    : broken_(std::move(broken)),
      mailbox_(std::move(mailbox)),
      stream_(std::move(stream)),
      messages_(std::move(messages)),
      layout_(std::move(layout)),
      members_(std::move(members)),
      me_(layout_.rank),
      size_(layout_.world_size()),
      shown_(static_cast<size_t>(size_)),
      names_(static_cast<size_t>(size_)) {
  static_assert(std::is_trivially_copyable_v<Shown> && std::has_unique_object_representations_v<Shown>);
  own().pid = getpid();
  for (int rank = 0; rank < size_; rank++) all_.set(static_cast<size_t>(rank));
}

// False: nothing new that is whole.
bool NetworkRenewal::Read(int rank, Shown* shown) const {
  Shown read;
  if (IsLocal(rank)) {
    // As in renewal.cpp: a version that was the same before and after was not written in between.
    const ShownRecord& record = broken_->Shown(LocalOf(rank));
    const uint64_t version = record.version.load(std::memory_order_acquire);
    if (version == 0 || version % 2 != 0) return false;
    uint64_t words[sizeof(Shown) / 8];
    for (size_t i = 0; i < sizeof(Shown) / 8; i++) words[i] = record.words[i].load(std::memory_order_acquire);
    if (record.version.load(std::memory_order_relaxed) != version) return false;
    std::memcpy(static_cast<void*>(&read), words, sizeof read);
  } else if (!stream_->ShownBy(rank, &read, sizeof read)) {
    return false;
  }
  if (read.phase > Phase::kClosed || read.code < 0 || read.code > static_cast<int32_t>(Code::kInternal) || read.terms[sizeof read.terms - 1] != '\0') return false;
  for (Ranks* ranks : {&read.members, &read.named, &read.ended, &read.lost}) *ranks &= all_;
  *shown = read;
  return true;
}

// What is read of a rank before it is marked as lost was said before; nothing is read afterwards.
void NetworkRenewal::Observe() {
  Ranks& ended = own().ended;
  Ranks& lost = own().lost;
  for (int rank = 0; rank < size_; rank++) {
    const auto r = static_cast<size_t>(rank);
    if (rank == me_ || lost[r]) continue;
    const bool has_ended = IsLocal(rank) && broken_->HasEnded(LocalOf(rank));
    const bool is_lost = has_ended || (!IsLocal(rank) && mailbox_->IsLost(members_[r]));
    (void)Read(rank, &shown_[r]);
    if (has_ended) ended.set(r);
    if (is_lost) lost.set(r);
  }
  for (const Shown& shown : shown_) ended |= shown.ended;
  ended.reset(static_cast<size_t>(me_));
  lost |= ended;
}

void NetworkRenewal::Publish() {
  if (std::memcmp(&told_, &own(), sizeof told_) == 0) return;
  std::memcpy(static_cast<void*>(&told_), &own(), sizeof told_);
  ShownRecord& record = broken_->Shown(layout_.local);
  const uint64_t version = record.version.load(std::memory_order_relaxed);
  uint64_t words[sizeof(Shown) / 8];
  std::memcpy(words, &told_, sizeof told_);
  record.version.store(version + 1, std::memory_order_seq_cst);
  for (size_t i = 0; i < sizeof(Shown) / 8; i++) record.words[i].store(words[i], std::memory_order_release);
  record.version.store(version + 2, std::memory_order_release);
  stream_->Show(&told_, sizeof told_);
}

void NetworkRenewal::Nap() const {
  const timespec pause = {0, kLookNs};
  nanosleep(&pause, nullptr);
}

std::string NetworkRenewal::Describe(int rank) const {
  const int pid = IsLocal(rank) ? broken_->pid(LocalOf(rank)) : of(rank).pid;
  return "rank " + std::to_string(Number(rank)) + (pid == 0 ? "" : " (pid " + std::to_string(pid) + ")");
}

std::string NetworkRenewal::List(const Ranks& ranks, bool is_described) const {
  std::string list;
  for (int rank = 0; rank < size_; rank++) {
    if (!ranks[static_cast<size_t>(rank)]) continue;
    list += (list.empty() ? "" : is_described ? ", " : ",") + (is_described ? Describe(rank) : std::to_string(Number(rank)));
  }
  return list;
}

Status NetworkRenewal::Bad(Code code, const std::string& text) const {
  const char* name = NameOf(kind());
  return Status(code, std::string(name) + ": " + text).Number("sequence", 0).Text("operation", name).Number("reportedBy", Number(me_));
}

Status NetworkRenewal::Lost(int rank, const std::string& how) const {
  Status status = Bad(Code::kPeerLost, Describe(rank) + how).Number("rank", Number(rank));
  if (IsLocal(rank)) std::move(status).Number("pid", broken_->pid(LocalOf(rank))).Text("host", HostName());
  return status;
}

Status NetworkRenewal::Late(const Ranks& late, const std::string& why) const {
  return Bad(Code::kTimeout, List(late, true) + " did not come" + why).Number("rank", Number(me_)).Text("lateRanks", List(late, false));
}

// A call of `rank` failed while this one waited for it: all of them have.
Status NetworkRenewal::FailedOn(int rank, Ranks* named_by) const {
  const Shown& theirs = of(rank);
  *named_by = theirs.named;
  const std::string reported = " (reported by rank " + std::to_string(Number(rank)) + ")";
  const int named = LowestOf(theirs.named);
  const auto code = static_cast<Code>(theirs.code);
  if (code == Code::kTimeout && named >= 0) return Late(theirs.named, " in time" + reported);
  if (code == Code::kPeerLost && named >= 0) return Lost(named, " is lost" + reported);
  if (code == Code::kMismatch) {
    return Bad(code, "ranks disagree on what is called, or with which settings" + reported).Number("rank", Number(me_)).Number("peer", Number(rank));
  }
  return Bad(code == Code::kOk || code == Code::kClosed ? Code::kAborted : code, Describe(rank) + " gave it up");
}

void NetworkRenewal::Begin(Renewal kind, const std::string& terms, int64_t timeout_ms) {
  uint32_t round = own().failed;
  for (const Shown& shown : shown_) round = std::max(round, shown.failed);
  Shown& mine = own();
  mine.round = ++round;
  mine.phase = Phase::kWaiting;
  mine.kind = static_cast<uint32_t>(kind);
  mine.timeout_ms = static_cast<uint32_t>(timeout_ms);
  mine.group = 0;
  mine.members.reset();
  std::memset(mine.terms, 0, sizeof mine.terms);
  std::snprintf(mine.terms, sizeof mine.terms, "%s", terms.c_str());
  Publish();
}

void NetworkRenewal::End(const Status& status, const Ranks& named, bool is_again) {
  Shown& mine = own();
  mine.failed = mine.round;
  mine.phase = Phase::kNone;
  mine.code = static_cast<int32_t>(status.code());
  mine.named = named;
  mine.is_again = is_again ? 1 : 0;
  Publish();
}

void NetworkRenewal::Leave() {
  is_leaving_.store(true);
  // Whoever holds it comes back here. That a successor stands is the last word on this group.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || own().phase == Phase::kStands) return;
  if (own().failed < own().round) End(Status(Code::kAborted, ""), {}, false);
  own().phase = Phase::kClosed;
  Publish();
}

void NetworkRenewal::Follow(const Shown& decision) {
  Shown& mine = own();
  mine.phase = Phase::kFollowing;
  mine.group = decision.group;
  mine.members = decision.members;
  mine.timeout_ms = decision.timeout_ms;
  decided_ns_ = NowNs();
}

Status NetworkRenewal::CheckLosses(bool* is_final) const {
  const Shown& mine = of(me_);
  for (int rank = 0; rank < size_; rank++) {
    if (mine.lost[static_cast<size_t>(rank)] || (of(rank).lost == mine.lost && of(rank).ended == mine.ended)) continue;
    const int other = LowestOf((of(rank).lost ^ mine.lost) | (of(rank).ended ^ mine.ended));
    return Lost(other, " is lost to some ranks, and not to others");
  }
  const Ranks unknown = mine.lost & ~mine.ended;
  if (unknown.none()) return Status::Ok();
  for (const std::vector<int>& node : layout_.nodes) {
    const auto is_among = [](const Ranks& ranks) { return [&ranks](int rank) { return ranks[static_cast<size_t>(rank)]; }; };
    const auto first = std::find_if(node.begin(), node.end(), is_among(unknown));
    if (first == node.end() || std::all_of(node.begin(), node.end(), is_among(mine.lost))) continue;
    return Lost(*first, ": the connection to it is lost, but its process has not ended");
  }
  *is_final = true;
  const size_t left = static_cast<size_t>(size_) - mine.lost.count(), all = static_cast<size_t>(size_) - mine.ended.count();
  if (2 * left > all || (2 * left == all && !mine.lost[static_cast<size_t>(LowestOf(all_ & ~mine.ended))])) return Status::Ok();
  return Lost(LowestOf(unknown), " cannot be reached, and may live: those that are left are " + std::to_string(left) + " of " + std::to_string(all) +
                                     " ranks, and another group may go on without them");
}

// A recreate needs all ranks, and the connections between all of them: what one of them has lost never comes back.
Status NetworkRenewal::CheckRecreated() const {
  if (kind() != Renewal::kRecreate) return Status::Ok();
  if (const int lost = LowestOf(of(me_).lost); lost >= 0) {
    const bool has_ended = of(me_).ended[static_cast<size_t>(lost)];
    return Lost(lost, has_ended ? " has ended; shrink() goes on without it" : ": the connection to it is lost; shrink() may go on without its node");
  }
  for (int rank = 0; rank < size_; rank++) {
    const int lost = LowestOf(of(rank).lost);
    if (lost < 0) continue;
    return lost == me_ ? Lost(rank, " has lost its connection to this rank; shrink() may go on without a node")
                       : Lost(lost, ": " + Describe(rank) + " has lost its connection to it; shrink() may go on without its node");
  }
  return Status::Ok();
}

// Looks once, see renewal.cpp. `missing`: ranks that are waited for; `named`: by an error; *is_again: those that shrink meet once more.
Status NetworkRenewal::Look(const std::function<uint64_t()>& next_group, bool* is_decided, Ranks* missing, Ranks* named, bool* is_again) {
  Shown& mine = own();
  missing->reset();
  for (int rank = 0; rank < size_; rank++) {
    const Shown& theirs = of(rank);
    if (rank == me_ || theirs.round != mine.round || theirs.phase < Phase::kFollowing || theirs.phase > Phase::kStands || theirs.kind != mine.kind) continue;
    if (!theirs.members[static_cast<size_t>(me_)]) return Lost(rank, " went on without this rank, which could not be reached");
    Follow(theirs);
    *is_decided = true;
    return Status::Ok();
  }
  if (Status s = CheckRecreated(); !s.ok()) return *named = mine.lost, *is_again = true, s;
  Status mismatch;
  for (int rank = 0; rank < size_; rank++) {
    const Shown& theirs = of(rank);
    if (rank == me_ || mine.lost[static_cast<size_t>(rank)]) continue;
    const bool has_closed = theirs.phase == Phase::kClosed || (theirs.phase == Phase::kStands && theirs.round < mine.round);
    if (kind() == Renewal::kRecreate && has_closed) return Lost(rank, " has closed the group");
    if (theirs.failed >= mine.round) {
      *is_again = theirs.is_again != 0;
      return FailedOn(rank, named);
    }
    // One that is in another round has not noticed yet that its own has failed, or this rank has not.
    if (!IsWaiting(rank)) {
      missing->set(static_cast<size_t>(rank));
      continue;
    }
    const bool is_kind = theirs.kind == mine.kind;
    // With a loss it is no mismatch: the one that recreates will hear of it, and may shrink then.
    if (!is_kind && (mine.lost | theirs.lost).any()) {
      missing->set(static_cast<size_t>(rank));
      continue;
    }
    if (!mismatch.ok() || (is_kind && std::strcmp(theirs.terms, mine.terms) == 0)) continue;
    const std::string ours = is_kind ? mine.terms : NameOf(kind()), other = is_kind ? theirs.terms : NameOf(static_cast<Renewal>(theirs.kind));
    mismatch = Bad(Code::kMismatch, "ranks disagree: rank " + std::to_string(Number(me_)) + (is_kind ? " has " : " called ") + ours + ", " + Describe(rank) +
                                        (is_kind ? " has " : " called ") + other)
                   .Number("rank", Number(me_))
                   .Number("peer", Number(rank))
                   .Text("mine", ours)
                   .Text("theirs", other);
  }
  if (missing->any()) return Status::Ok();
  if (!mismatch.ok()) return mismatch;  // not before all have come: one that came later would wait in vain
  bool is_final = false;
  if (Status s = CheckLosses(&is_final); !s.ok()) {
    *named = mine.lost;
    return is_final ? s : Status::Ok();
  }
  const Ranks alive = all_ & ~mine.lost;
  const int leader = LowestOf(alive);
  if (leader != me_) {
    missing->set(static_cast<size_t>(leader));  // it is there, but has not decided
    return Status::Ok();
  }
  Shown decision = mine;
  decision.group = next_group();
  decision.members = alive;
  Follow(decision);
  *is_decided = true;
  return Status::Ok();
}

Status NetworkRenewal::Agree(Renewal kind, const std::string& terms, const std::function<uint64_t()>& next_group, int64_t timeout_ms,
                             const std::atomic<bool>& is_cancelled, Successor* successor) {
  const std::lock_guard lock(mutex_);
  for (int rank = 0; rank < size_; rank++) names_[static_cast<size_t>(rank)] = rank;
  Observe();
  // Whoever comes again has failed with the round before, if only by the group that was decided on.
  if (own().failed < own().round) End(Status(Code::kAborted, ""), {}, false);
  own().kind = static_cast<uint32_t>(kind);
  // Where it cannot succeed it does not begin: others that go on without the lost ranks already are not disturbed, but hear of the loss.
  if (Status s = CheckRecreated(); !s.ok()) return Publish(), s;
  // Ranks of this node that wait for this one in an operation of the group see it there, those of others by what it shows.
  std::atomic<uint32_t>& ticket = broken_->Renewal(layout_.local).ticket;
  ticket.store(static_cast<uint32_t>(kind), std::memory_order_seq_cst);
  if (messages_ != nullptr) messages_->Show(&kind, sizeof kind);
  const Deadline deadline = Deadline::AfterMs(timeout_ms);
  deadline.ElapsedNs(NowNs());
  Begin(kind, terms, timeout_ms);
  Status status;
  for (;; Nap()) {
    Observe();
    bool is_decided = false, is_again = false, is_final = false;
    Ranks missing, named;
    status = Look(next_group, &is_decided, &missing, &named, &is_again);
    if (is_decided) break;
    const int64_t now = NowNs();
    if (status.ok() && is_cancelled.load()) {
      status = Bad(Code::kClosed, "the group was closed meanwhile");
    } else if (status.ok() && missing.none() && deadline.IsOver(now)) {
      status = CheckLosses(&is_final);
    } else if (status.ok() && missing.any() && deadline.Later(IsWaiting(LowestOf(missing)) ? kGraceMs / 2 : 0).IsOver(now)) {
      named = missing;
      status = Late(missing, " within " + std::to_string(timeout_ms) + " ms").Number("elapsedMs", static_cast<double>(deadline.ElapsedNs(now)) / 1e6);
    }
    if (!status.ok()) {
      End(status, named, is_again);
      if (!is_again || kind != Renewal::kShrink || deadline.IsOver(now)) break;
      Begin(kind, terms, timeout_ms);
    }
    Publish();
  }
  // From here on nobody counts on this rank, but by what it shows.
  Publish();
  ticket.store(0, std::memory_order_seq_cst);
  if (!status.ok()) return status;
  successor->group = own().group;
  for (int rank = 0; rank < size_; rank++) {
    if (own().members[static_cast<size_t>(rank)]) successor->ranks.push_back(rank);
  }
  return Status::Ok();
}

// A member that is lost, or has failed, before it was ready: the group will not stand.
bool NetworkRenewal::IsDoomed() const {
  const Shown& mine = of(me_);
  if ((mine.members & mine.lost).any()) return true;
  for (int rank = 0; rank < size_; rank++) {
    if (rank != me_ && mine.members[static_cast<size_t>(rank)] && of(rank).failed >= mine.round) return true;
  }
  return false;
}

// Looks once. Ok and not settled: not yet.
Status NetworkRenewal::CheckConfirmed(const Deadline& deadline, bool* is_settled, Ranks* named) {
  const Shown& mine = of(me_);
  const auto is_member = [&](int rank) { return mine.members[static_cast<size_t>(rank)]; };
  for (int rank = 0; rank < size_; rank++) {
    const Shown& theirs = of(rank);
    if (!is_member(rank) || theirs.phase != Phase::kStands || theirs.round != mine.round || theirs.group != mine.group) continue;
    *is_settled = true;
    return Status::Ok();
  }
  for (int rank = 0; rank < size_; rank++) {
    if (rank == me_ || !is_member(rank) || of(rank).failed < mine.round) continue;
    return FailedOn(rank, named);
  }
  const Ranks lost = mine.members & mine.lost;
  const int leader = LowestOf(mine.members & ~mine.lost);
  const bool is_over = deadline.IsOver(NowNs());
  if (leader != me_) {
    if (!deadline.Later(kGraceMs).IsOver(NowNs())) return Status::Ok();
    named->set(static_cast<size_t>(leader));
    return Late(*named, ", or did not say that the group stands, within " + std::to_string(deadline.timeout_ms()) + " ms");
  }
  Ranks unready, unaware;
  for (int rank = 0; rank < size_; rank++) {
    if (rank == me_ || !is_member(rank) || lost[static_cast<size_t>(rank)]) continue;
    if (of(rank).round != mine.round || of(rank).phase != Phase::kReady) unready.set(static_cast<size_t>(rank));
    if ((lost & ~of(rank).lost).any()) unaware.set(static_cast<size_t>(rank));
  }
  // Of those that were lost one may have led. Who does not show yet that it has lost them may have heard that the group stands.
  const bool has_taken_over = LowestOf(mine.members) != me_;
  if (lost.any() && (!has_taken_over || unaware.none() || is_over)) {
    *named = lost;
    return Lost(LowestOf(lost), " was lost meanwhile");
  }
  if (lost.none() && unready.none()) *is_settled = true;
  if (*is_settled || !is_over) return Status::Ok();
  *named = unready;
  return Late(unready, " within " + std::to_string(deadline.timeout_ms()) + " ms");
}

Status NetworkRenewal::Confirm(const std::function<Status(const Deadline&)>& connect, std::atomic<bool>* is_cancelled) {
  std::unique_lock lock(mutex_);
  Shown& mine = own();
  int number = 0;
  for (int rank = 0; rank < size_; rank++) names_[static_cast<size_t>(rank)] = mine.members[static_cast<size_t>(rank)] ? number++ : -1;
  // Of all from the same moment, however long a busy thread of JavaScript took to come here.
  const int64_t spent_ms = (NowNs() - decided_ns_) / 1'000'000;
  const Deadline deadline = Deadline::AfterMs(std::max<int64_t>(1, mine.timeout_ms - spent_ms));
  deadline.ElapsedNs(NowNs());
  std::atomic<bool> is_connected{false};
  std::thread guard([&] {
    for (; !is_connected.load(); Nap()) {
      Observe();
      Publish();
      if (IsDoomed()) is_cancelled->store(true);
    }
  });
  Status status = connect(deadline);
  is_connected.store(true);
  guard.join();
  Ranks named;
  if (!status.ok() && IsDoomed()) {
    // It was given up for that, or would have been.
    named = mine.members & mine.lost;
    if (named.any()) status = Lost(LowestOf(named), " was lost meanwhile");
    for (int rank = 0; rank < size_ && named.none(); rank++) {
      if (rank == me_ || !mine.members[static_cast<size_t>(rank)] || of(rank).failed < mine.round) continue;
      status = FailedOn(rank, &named);
      break;
    }
  } else if (status.ok()) {
    mine.phase = Phase::kReady;
    for (bool is_settled = false;; Nap()) {
      Observe();
      status = CheckConfirmed(deadline, &is_settled, &named);
      if (is_settled) mine.phase = Phase::kStands;
      if (is_settled || !status.ok()) break;
      Publish();
    }
  }
  if (status.ok()) Publish();
  else End(status, named, status.code() == Code::kPeerLost);
  lock.unlock();
  if (!status.ok() && is_leaving_.load()) Leave();
  return status;
}

}  // namespace tilerank
