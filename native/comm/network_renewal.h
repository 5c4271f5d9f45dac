// How the ranks of a broken group on several nodes agree on its successor; on one node it is renewal.h. Each rank shows all others what it
// knows and where it is: those of its node in its control page, the rest through the sockets of the group, which stand as long as both ends
// do, whatever broke the group. So no store is needed, the one of rank 0 may be lost, and no connection is made anew. Only the last thing that
// a rank showed counts, so nothing waits for room, and what belongs to another round is of no effect.
//
// Who is lost. That a process has ended is certain where a rank of its node says so (pidfd). A connection that is lost says less: the cable
// between two nodes that both live may be cut. So a whole node that cannot be reached is left out only by those who are more than half of
// the ranks that are not known to have ended, or half of them with the lowest: two sides cannot both be that, whatever each knows. A rank whose
// connection is lost while others of its node live, and do not say that it has ended, is an error. Nothing is read from a rank any more once it
// is shown as lost.
//
// 1. Agree. Calls come in rounds, as in a node: one that fails ends its round for all. When all ranks that are not lost wait in the same
//    round, and show the same ranks as lost, the lowest of them decides: a number for the new group, and its members. Whoever sees the
//    decision shows it as well, so that it is not lost with the one who made it.
// 2. Connect. The members make the new group's memory and streams, over the same sockets.
// 3. Confirm. The lowest member that is not lost says that the group stands when all members are ready, or gives it up, which ends the round.
//    One that takes this over from a lost one waits until every member that lives shows all those losses: from then on nobody can hear a
//    late word of them. If one of them has heard that the group stands, it does; if none has, nobody alive ever will, and it is given up.
//
// So all that live end alike, whoever ends when. One case is left, as in any protocol: the rank that decides is stopped in the very moment
// between its word and its sending, for longer than the deadline and kGraceNs. It then holds a group that breaks at its first use.
#pragma once
#include <atomic>
#include <bitset>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/mailbox.h"
#include "comm/renewal.h"
#include "comm/transport.h"

namespace tilerank {

class NetworkRenewal {
 public:
  /// members: [world_size] ranks of the job. Lives at most as long as the group is open here.
  NetworkRenewal(std::shared_ptr<Communicator> broken, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Mailbox::Stream> stream,
                 std::shared_ptr<Mailbox::Stream> messages, Layout layout, std::vector<int> members);

  static constexpr size_t kMostTerms = 111;
  /// Waits for the decision. terms: what ranks must agree on, word by word, at most kMostTerms characters.
  Status Agree(Renewal kind, const std::string& terms, const std::function<uint64_t()>& next_group, int64_t timeout_ms,
               const std::atomic<bool>& is_cancelled, Successor* successor);
  /// Then: the successor stands on all its ranks, or on none. connect makes this rank's part of it, and gives up once *is_cancelled is set.
  /// Errors name ranks of the successor.
  Status Confirm(const std::function<Status(const Deadline&)>& connect, std::atomic<bool>* is_cancelled);
  /// This rank closes the group.
  void Leave();

 private:
  using Ranks = std::bitset<kMostMembers>;
  enum class Phase : uint32_t { kNone, kWaiting, kFollowing, kReady, kStands, kClosed };
  /// What a rank shows. kFollowing and later: with the decision.
  struct Shown {
    uint32_t round = 0;       // of its last call
    Phase phase = Phase::kNone;
    uint32_t kind = 0;        // Renewal
    uint32_t failed = 0;      // the last round that failed here, and why:
    int32_t code = 0;         // Code
    uint32_t is_again = 0;    // by a loss: those that shrink meet again by themselves
    int32_t pid = 0;
    uint32_t timeout_ms = 0;  // of the decision: all give up at one time
    uint64_t group = 0;
    Ranks members;            // of the decision
    Ranks named;              // by the failure
    Ranks ended, lost;        // processes known to have ended; those and whom this rank has no connection to
    char terms[kMostTerms + 1] = {};
  };
  static_assert(sizeof(Shown) % 8 == 0 && sizeof(Shown) <= sizeof(ShownRecord::words));

  bool IsLocal(int rank) const { return layout_.node_of[static_cast<size_t>(rank)] == layout_.node; }
  int LocalOf(int rank) const { return layout_.local_of[static_cast<size_t>(rank)]; }
  Shown& own() { return shown_[static_cast<size_t>(me_)]; }
  const Shown& of(int rank) const { return shown_[static_cast<size_t>(rank)]; }
  bool Read(int rank, Shown* shown) const;
  void Observe();
  void Publish();
  void Begin(Renewal kind, const std::string& terms, int64_t timeout_ms);
  void End(const Status& status, const Ranks& named, bool is_again);
  void Nap() const;

  Status Look(const std::function<uint64_t()>& next_group, bool* is_decided, Ranks* missing, Ranks* named, bool* is_again);
  Status CheckRecreated() const;
  bool IsWaiting(int rank) const { return of(rank).round == of(me_).round && of(rank).phase == Phase::kWaiting; }
  void Follow(const Shown& decision);
  /// Of the ranks that have come: who is lost is known alike and may be left out. Not ok and not final: not yet.
  Status CheckLosses(bool* is_final) const;
  Status CheckConfirmed(const Deadline& deadline, bool* is_settled, Ranks* named);
  bool IsDoomed() const;

  Renewal kind() const { return static_cast<Renewal>(of(me_).kind); }
  // Errors.
  int Number(int rank) const { return names_[static_cast<size_t>(rank)]; }
  std::string Describe(int rank) const;
  std::string List(const Ranks& ranks, bool is_described) const;
  Status Bad(Code code, const std::string& text) const;
  Status Lost(int rank, const std::string& how) const;
  Status Late(const Ranks& late, const std::string& why) const;
  Status FailedOn(int rank, Ranks* named) const;

  const std::shared_ptr<Communicator> broken_;
  const std::shared_ptr<Mailbox> mailbox_;
  const std::shared_ptr<Mailbox::Stream> stream_, messages_;
  const Layout layout_;
  const std::vector<int> members_;
  const int me_, size_;
  std::mutex mutex_;          // one call at a time
  std::atomic<bool> is_leaving_{false};
  Ranks all_;                 // [size_]
  std::vector<Shown> shown_;  // [size_] as last seen; own: as it is to be shown
  Shown told_;                // own, as it was shown last
  std::vector<int> names_;    // [size_] what errors call each rank
  int64_t decided_ns_ = 0;    // when this rank heard the decision
};

}  // namespace tilerank
