#include "comm/renewal.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>

namespace tilerank {

namespace {

// Nobody is in a hurry, and who waits may be waited for on the same core.
constexpr int64_t kLookNs = 1'000'000;
constexpr uint32_t kKindBits = 2;

/// What of a decision concerns one rank.
struct Decision {
  uint64_t group = 0;
  uint32_t tickets[kMostMembers] = {};
};

// False: there is none, or it is being written. A version that was the same before and after was not written in between, as each of its
// words is read with acquire: a newer one would bring the odd version with it.
bool ReadDecision(const RenewalRecord& record, int world_size, Decision* decision) {
  const uint32_t version = record.version.load(std::memory_order_acquire);
  if (version == 0 || version % 2 != 0) return false;
  decision->group = record.group.load(std::memory_order_acquire);
  for (int rank = 0; rank < world_size; rank++) decision->tickets[rank] = record.tickets[rank].load(std::memory_order_acquire);
  return record.version.load(std::memory_order_relaxed) == version;
}

void WriteDecision(RenewalRecord& record, int world_size, const Decision& decision) {
  const uint32_t version = record.version.load(std::memory_order_relaxed);
  record.version.store(version + 1, std::memory_order_seq_cst);
  record.group.store(decision.group, std::memory_order_release);
  for (int rank = 0; rank < world_size; rank++) record.tickets[rank].store(decision.tickets[rank], std::memory_order_release);
  record.version.store(version + 2, std::memory_order_release);
}

Successor SuccessorOf(const Decision& decision, int world_size) {
  Successor successor;
  successor.group = decision.group;
  for (int rank = 0; rank < world_size; rank++) {
    if (decision.tickets[rank] != 0) successor.ranks.push_back(rank);
  }
  return successor;
}

Status Bad(const Communicator& broken, Code code, Renewal kind, const std::string& text) {
  return Status(code, std::string(NameOf(kind)) + ": " + text).Number("sequence", 0).Text("operation", NameOf(kind)).Number("reportedBy", broken.NameOfRank(broken.rank()));
}

std::string Describe(const Communicator& broken, int rank) {
  return "rank " + std::to_string(broken.NameOfRank(rank)) + " (pid " + std::to_string(broken.pid(rank)) + ")";
}

Status Lost(const Communicator& broken, Renewal kind, int rank, const char* how) {
  return Bad(broken, Code::kPeerLost, kind, Describe(broken, rank) + how)
      .Number("rank", broken.NameOfRank(rank))
      .Number("pid", broken.pid(rank))
      .Text("host", HostName());
}

Status Late(const Communicator& broken, Renewal kind, const std::vector<int>& late, const std::string& why) {
  std::string names, list;
  for (int rank : late) {
    names += (names.empty() ? "" : ", ") + Describe(broken, rank);
    list += (list.empty() ? "" : ",") + std::to_string(broken.NameOfRank(rank));
  }
  return Bad(broken, Code::kTimeout, kind, names + " did not come" + why).Number("rank", broken.NameOfRank(broken.rank())).Text("lateRanks", list);
}

// A call of `rank` failed while this one waited for it: all of them have.
Status FailedOn(const Communicator& broken, Renewal kind, int rank) {
  const RenewalRecord& record = broken.Renewal(rank);
  std::vector<int> named;
  for (int other = 0; other < broken.world_size(); other++) {
    if ((record.late[other / 64].load(std::memory_order_relaxed) >> (other % 64) & 1) != 0) named.push_back(other);
  }
  const std::string reported = " (reported by rank " + std::to_string(broken.NameOfRank(rank)) + ")";
  const Code code = static_cast<Code>(record.code.load(std::memory_order_relaxed));
  if (code == Code::kTimeout && !named.empty()) return Late(broken, kind, named, " in time" + reported);
  if (code == Code::kPeerLost && !named.empty()) return Lost(broken, kind, named[0], (" has ended, or closed the group" + reported).c_str());
  if (code == Code::kMismatch) {
    return Bad(broken, code, kind, "some ranks called recreate, some shrink" + reported).Number("rank", broken.NameOfRank(broken.rank())).Number("peer", broken.NameOfRank(rank));
  }
  return Bad(broken, code, kind, Describe(broken, rank) + " gave it up");
}

// Ranks whose process lives. A recreate needs all of them.
Status Living(const Communicator& broken, Renewal kind, std::vector<int>* alive) {
  for (int rank = 0; rank < broken.world_size(); rank++) {
    if (rank == broken.rank() || !broken.HasEnded(rank)) {
      alive->push_back(rank);
    } else if (kind == Renewal::kRecreate) {
      return Lost(broken, kind, rank, " has ended; shrink() goes on without it");
    }
  }
  return Status::Ok();
}

// Looks once. Ok: `successor` has ranks when there is a decision. `missing`: ranks that are waited for.
Status Look(const Communicator& broken, Renewal kind, uint32_t ticket, const std::function<uint64_t()>& next_group, std::vector<int>* missing,
            Successor* successor) {
  const int size = broken.world_size(), me = broken.rank();
  Decision decision;
  for (int rank = 0; rank < size; rank++) {
    if (!ReadDecision(broken.Renewal(rank), size, &decision) || decision.tickets[me] != ticket) continue;
    *successor = SuccessorOf(decision, size);
    return Status::Ok();
  }
  missing->clear();
  std::vector<int> alive;
  if (Status s = Living(broken, kind, &alive); !s.ok()) return s;
  const int leader = alive[0];
  Decision mine;
  for (int rank : alive) {
    const RenewalRecord& record = broken.Renewal(rank);
    mine.tickets[rank] = record.ticket.load(std::memory_order_acquire);
    if (rank == me) continue;
    if (record.failed.load(std::memory_order_acquire) >= ticket >> kKindBits) return FailedOn(broken, kind, rank);
    if (kind == Renewal::kRecreate && broken.HasLeft(rank)) return Lost(broken, kind, rank, " has closed the group");
    const uint32_t theirs = mine.tickets[rank];
    // One that is in another round has not noticed yet that its own has failed, or this rank has not.
    if (theirs >> kKindBits != ticket >> kKindBits) {
      missing->push_back(rank);
    } else if ((theirs & 3) != static_cast<uint32_t>(kind)) {
      const char* other = NameOf(static_cast<Renewal>(theirs & 3));
      return Bad(broken, Code::kMismatch, kind, "ranks disagree: rank " + std::to_string(broken.NameOfRank(me)) + " called " + NameOf(kind) + ", " +
                                                    Describe(broken, rank) + " called " + other)
          .Number("rank", broken.NameOfRank(me))
          .Number("peer", broken.NameOfRank(rank))
          .Text("mine", NameOf(kind))
          .Text("theirs", other);
    }
  }
  if (leader != me) {
    if (missing->empty()) missing->push_back(leader);  // it is there, but has not decided
    return Status::Ok();
  }
  if (!missing->empty()) return Status::Ok();
  for (int rank = 0; rank < size; rank++) {
    if (!ReadDecision(broken.Renewal(rank), size, &decision)) continue;
    for (int other = 0; other < size; other++) {
      if (mine.tickets[other] != 0 && decision.tickets[other] == mine.tickets[other]) missing->push_back(other);
    }
  }
  if (!missing->empty()) return Status::Ok();
  mine.group = next_group();
  WriteDecision(broken.Renewal(me), size, mine);
  *successor = SuccessorOf(mine, size);
  return Status::Ok();
}

void TellFailure(RenewalRecord& record, const Communicator& broken, const Status& status) {
  std::vector<int> names;
  for (const auto& [key, value] : status.numbers()) {
    if (status.code() == Code::kPeerLost && std::strcmp(key, "rank") == 0) names.push_back(static_cast<int>(value));
  }
  for (const auto& [key, value] : status.texts()) {
    if (std::strcmp(key, "lateRanks") != 0) continue;
    std::istringstream list(value);
    for (std::string name; std::getline(list, name, ',');) names.push_back(std::stoi(name));
  }
  uint64_t named[kMostMembers / 64] = {};
  for (int rank = 0; rank < broken.world_size(); rank++) {
    if (std::find(names.begin(), names.end(), broken.NameOfRank(rank)) != names.end()) named[rank / 64] |= uint64_t{1} << (rank % 64);
  }
  for (size_t i = 0; i < std::size(named); i++) record.late[i].store(named[i], std::memory_order_relaxed);
  record.code.store(static_cast<int32_t>(status.code()), std::memory_order_relaxed);
  record.failed.store(record.round.load(std::memory_order_relaxed), std::memory_order_seq_cst);
}

}  // namespace

Status AgreeOnSuccessor(const Communicator& broken, Renewal kind, const std::function<uint64_t()>& next_group, const Deadline& deadline,
                        const std::atomic<bool>& is_cancelled, Successor* successor) {
  // Where it cannot succeed it does not begin: others that go on without the lost ranks already are not disturbed.
  std::vector<int> alive;
  if (Status s = Living(broken, kind, &alive); !s.ok()) return s;
  RenewalRecord& record = broken.Renewal(broken.rank());
  // Whoever comes again has failed with the round before, if only by the group that was decided on.
  const uint32_t last = record.round.load(std::memory_order_relaxed);
  if (record.failed.load(std::memory_order_relaxed) < last) TellFailure(record, broken, Status(Code::kAborted, ""));
  uint32_t round = 0;
  for (int rank = 0; rank < broken.world_size(); rank++) round = std::max(round, broken.Renewal(rank).failed.load(std::memory_order_acquire));
  const uint32_t ticket = ++round << kKindBits | static_cast<uint32_t>(kind);
  record.round.store(round, std::memory_order_relaxed);
  record.ticket.store(ticket, std::memory_order_seq_cst);
  deadline.ElapsedNs(NowNs());
  std::vector<int> missing;
  Status status;
  for (;;) {
    status = Look(broken, kind, ticket, next_group, &missing, successor);
    if (!status.ok() || !successor->ranks.empty()) break;
    if (is_cancelled.load()) {
      status = Bad(broken, Code::kClosed, kind, "the group was closed meanwhile");
      break;
    }
    if (deadline.IsOver(NowNs())) {
      status = Late(broken, kind, missing, " within " + std::to_string(deadline.timeout_ms()) + " ms")
                   .Number("elapsedMs", static_cast<double>(deadline.ElapsedNs(NowNs())) / 1e6);
      break;
    }
    const timespec pause = {0, kLookNs};
    nanosleep(&pause, nullptr);
  }
  if (!status.ok()) TellFailure(record, broken, status);
  // From here on nobody counts on this rank, but by a decision that it has seen.
  record.ticket.store(0, std::memory_order_seq_cst);
  return status;
}

Status ConfirmSuccessor(Communicator& successor, const Deadline& deadline) {
  constexpr uint32_t kStands = 1, kGivenUp = 2;
  const OpTag barrier;
  successor.Publish(0, kConfirmSequences, barrier);
  Status status = successor.Await(0, kConfirmSequences, barrier, deadline);
  const uint32_t seen = successor.IsReady(0, kConfirmSequences) ? kStands : kGivenUp;
  uint32_t outcome = 0;
  if (successor.Outcome().compare_exchange_strong(outcome, seen, std::memory_order_seq_cst)) outcome = seen;
  if (outcome == kStands) return Status::Ok();
  // All have come, but one had given up before: its reason stands, as it was written before the word.
  if (status.ok()) status = successor.CheckAborts();
  return status.ok() ? Status(Code::kInternal, "a group was given up without a reason") : status;
}

}  // namespace tilerank
