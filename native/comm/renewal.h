// How the ranks of a broken group agree on its successor: recreate() needs all of them, shrink() leaves out those whose process has ended.
// What each says stands in the control page of its arena in the old group, which the others map, and which stays readable when it is dead.
//
// Calls come in rounds: one that fails ends its round for all, and whoever comes after that is in the next. So all ranks come back, or none.
// A call shows a ticket, its round and kind. The lowest rank that lives decides once every rank that lives waits in the same round: it
// writes down the number of the new group and the tickets of its ranks, and whoever finds its own ticket in a decision follows it,
// whoever wrote that and whatever happened to him since. A rank never shows the same ticket again, so that nothing of an attempt that
// failed can be taken for this one.
//
// Why all end alike: only a rank that sees all lower ones dead leads, and whether a process has ended is certain (pidfd), so there is one
// leader at a time; one that follows a dead leader sees that one's decisions whole, and leaves out tickets that were used there. When the
// ranks of a successor have met (rendezvous.h), each shows that it is there, and whoever sees all, or gives up waiting, says so in one word
// that is set once: with a rank that died meanwhile the group stands for all, broken, or for none, and these come back with new tickets or
// give up. A rank that lives but does not come is an error for all, never left out.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/communicator.h"
#include "status.h"

namespace tilerank {

enum class Renewal : uint32_t { kRecreate = 1, kShrink = 2 };
constexpr const char* NameOf(Renewal kind) { return kind == Renewal::kRecreate ? "recreate" : "shrink"; }

struct Successor {
  uint64_t group = 0;
  std::vector<int> ranks;  // of the old group, rising
};

/// Waits for the decision. next_group: the number of a group that this rank makes, asked for when it leads.
Status AgreeOnSuccessor(const Communicator& broken, Renewal kind, const std::function<uint64_t()>& next_group, const Deadline& deadline,
                        const std::atomic<bool>& is_cancelled, Successor* successor);

/// Of a group that has just been connected: it stands on all ranks, or on none. Takes the first sequences of lane 0.
Status ConfirmSuccessor(Communicator& successor, const Deadline& deadline);
constexpr uint64_t kConfirmSequences = 1;

}  // namespace tilerank
