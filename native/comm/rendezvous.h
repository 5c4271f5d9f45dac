// How ranks of one node find each other: every rank listens on one abstract Unix socket named after the job's nonce, connects to
// every other rank's, and hands over the descriptor of its arena and its own pidfd. Both ends check the user id of the other;
// that a peer is on this node is proved by the descriptor received. Each further arena goes the same way.
//
// One Rendezvous serves all groups of a rank: what arrives early for another group is kept until that group asks.
#pragma once
#include <sched.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "comm/arena.h"
#include "comm/communicator.h"
#include "comm/sync.h"
#include "status.h"

namespace tilerank {

// Of the messages and of what lies in an arena: ranks of different versions must not meet.
constexpr uint32_t kProtocolVersion = 5;

/// Binds and listens on "\0tilerank/<nonce>/<rank>". kMismatch when that rank of that job has a socket already.
Status BindRankSocket(const std::string& nonce, int rank, UniqueFd* fd);

/// Connects to such a socket; none (errno says why) when nobody listens or the queue is full. *is_stranger: its owner is another user.
UniqueFd ConnectRankSocket(const std::string& nonce, int rank, pid_t* pid, bool* is_stranger);
/// True when the process at the other end runs under this user; *pid is that process.
bool IsSameUser(int socket, pid_t* pid);
/// One message with descriptors beside it; both return what sendmsg and recvmsg do. Descriptors that come are close-on-exec.
ssize_t SendDescriptors(int socket, const void* data, size_t nbytes, const int* fds, size_t count);
ssize_t ReceiveDescriptors(int socket, void* data, size_t nbytes, UniqueFd* fds, size_t count);

class Rendezvous {
 public:
  struct Config {
    std::string nonce;   // 32 hex digits, the same on all ranks of the job, secret to other users
    int rank = 0;
    int world_size = 1;
    int socket_fd = -1;  // inherited from the launcher; -1: bind now
  };
  /// What a rank shows its peers of one arena. Ranks must agree on `terms`, word by word.
  struct Offer {
    uint64_t group = 0;
    uint32_t arena = 0;   // 0: control page and slots; then one number an alloc
    size_t nbytes = 0;
    std::string terms;    // at most 191 characters
    std::string operation;  // for messages
    std::vector<int> members;  // ranks of the job that take part, this one among them; empty: all
    std::vector<int> names;    // [members] what messages call them; empty: as the job does
    std::vector<int> pidfds;   // [members] borrowed, -1: not known; who ends before it comes is a loss at once. Empty: none is known
  };
  struct Answer {
    UniqueFd arena;
    UniqueFd pidfd;       // of the peer
    pid_t pid = 0;
    cpu_set_t cpus;       // that the peer may run on
    std::string terms;
  };

  static Status Create(const Config& config, std::shared_ptr<Rendezvous>* rendezvous);

  const Config& config() const { return config_; }
  /// Numbers of groups. Those that all ranks make in the same order count from 0; one that a rank gives out for others to take over is
  /// its own: no two groups of a job ever have the same, however many each process has made before.
  uint64_t NextGroup() { return next_group_.fetch_add(1); }
  uint64_t NextOwnGroup() { return static_cast<uint64_t>(config_.rank + 1) << 32 | next_own_group_.fetch_add(1); }
  /// Lets go of what has come for a group that is closed here, or was given up, and of what still may.
  void Forget(uint64_t group);
  /// Connections refused so far because they came from another user or another job.
  uint64_t strangers() const { return strangers_.load(); }

  /// Sends to every other member, without waiting for any to take it; waits only for sockets that do not stand yet.
  Status Send(const Offer& offer, int arena_fd, const Deadline& deadline, const std::atomic<bool>& is_cancelled);
  /// Waits for the same arena of every other member; answers by rank of the job, own and strangers' stay empty.
  Status Collect(const Offer& offer, const Deadline& deadline, const std::atomic<bool>& is_cancelled, std::vector<Answer>* answers);

 private:
  explicit Rendezvous(const Config& config) : config_(config) {}
  Status SendTo(int peer, const Offer& offer, int arena_fd, int own_pidfd);
  void Pump(int timeout_ms);
  void TakeMessage(int connection);
  std::vector<int> PeersOf(const Offer& offer) const;
  Status TimedOut(const Offer& offer, const Deadline& deadline, const std::string& late, const std::string& details) const;
  Status CheckArrived(const Offer& offer);
  void LetGo();

  using Key = std::pair<uint64_t, uint32_t>;  // group, arena
  const Config config_;
  UniqueFd socket_;
  std::atomic<uint32_t> next_group_{0}, next_own_group_{0};
  std::atomic<uint64_t> strangers_{0};
  std::mutex mutex_;  // guards what follows
  std::vector<UniqueFd> connections_;  // accepted, nothing read yet
  std::map<Key, std::vector<std::optional<Answer>>> arrived_;
  Status failure_;    // of the job as a whole: a rank that disagrees on version, size or rank
  std::mutex forgotten_mutex_;   // guards what follows; may be taken with mutex_ held
  std::set<uint64_t> forgotten_;
  std::deque<uint64_t> forgotten_order_;
  std::vector<uint64_t> leaving_;  // forgotten, but not yet let go of
};

struct GroupOptions {
  int lanes = 1;
  size_t slot_bytes = 0;
  int spin_us = -1;             // -1: by the cores of all ranks
  std::vector<int> nodes;       // NUMA nodes to bind the arena to
  std::vector<int> members;     // ranks of the job that share the group's memory, in its order; empty: all
  std::vector<int> names;       // what the group calls them; empty: as the job does
  std::string terms;            // whatever else ranks must agree on
  std::vector<int> pidfds;      // [members] of the ranks, borrowed, where they are known before; empty: none is
  std::string operation = "createGroup";  // for messages
};

/// Creates this rank's arena of the group, exchanges it and returns the communicator.
Status ConnectGroup(Rendezvous& rendezvous, uint64_t group, const GroupOptions& options, const Deadline& deadline,
                    const std::atomic<bool>& is_cancelled, std::unique_ptr<Communicator>* communicator, std::string* warning);
/// A group of one.
Status CreateSoloGroup(const GroupOptions& options, std::unique_ptr<Communicator>* communicator);

}  // namespace tilerank
