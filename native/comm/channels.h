// Messages between two ranks: send and recv. Every ordered pair of ranks that has one gets a communicator of two, rank 0 the sender, rank 1
// the receiver; a message is a broadcast there (broadcast.cpp), so a sender runs up to two chunks ahead. Both ranks' flags lie in one arena that
// the sender makes, so that it waits for nobody: the receiver maps it when it first wants a message. Channels know nothing of each
// other, nor of the group's collectives; but a failure of one is a failure of the group, and the other way round.
//
// A rank of another node is reached by frames of a stream of their own: the window of its transport is what a sender may be ahead.
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "comm/operation.h"
#include "comm/rendezvous.h"
#include "comm/transport.h"
#include "comm/worker.h"

namespace tilerank {

/// All channels of one rank of a group. Its functions, but Run, belong to the thread that makes the calls.
class Channels {
 public:
  struct Config {
    std::shared_ptr<Rendezvous> rendezvous;
    std::shared_ptr<Communicator> communicator;  // of the group
    std::shared_ptr<std::atomic<bool>> is_cancelled;
    Copy copy = nullptr;
    uint64_t group = 0;
    std::vector<int> members;  // the job's rank of each rank of communicator
    std::vector<int> names;    // what users call them
    std::vector<int> nodes;    // NUMA nodes to bind memory to
    size_t chunk_bytes = 0;    // of the group's collectives; the same on all ranks
    int rank = 0;              // what users call this rank
    std::shared_ptr<Transport> transport;  // to the ranks of other nodes, which have no place in members
  };

  /// From or to one other rank.
  struct Channel {
    int peer = 0;                    // rank of the group's communicator, or of the group where it is on another node
    bool is_remote = false;
    uint64_t next_message = 1;       // of those to or from another node
    bool is_sender = false;
    uint64_t next_sequence = 1;
    std::shared_ptr<Communicator> communicator;
    std::atomic<bool> is_connected{false};  // publishes the communicator to the thread that makes the calls
    int pending = 0;                 // asynchronous messages, for the caller to count
    Worker worker;                   // of asynchronous messages that do not end at once
  };
  struct Message {
    Channel* channel = nullptr;
    Operation operation;
    uint64_t number = 0;             // where the channel goes to another node
    bool has_started = false;
  };

  explicit Channels(Config config);
  ~Channels() { Close(); }

  /// `peer`: a rank of the group's communicator, another than this one.
  Channel& Of(int peer, bool is_sender);
  /// `rank`: of the group, on another node.
  Channel& OfRemote(int rank, bool is_sender);
  /// Gives a message its place in the order of its channel.
  Message Take(Channel& channel, DType dtype, std::byte* data, size_t count) const;
  /// Sends as far as that needs no waiting. Only with nothing pending on the channel.
  void TryStart(Message* message) const;
  /// True when Run, on a message that TryStart has seen, would not wait. Only with nothing pending on the channel.
  bool IsReady(const Message& message) const;
  /// Does the rest, on whatever thread, one message of a channel after the other.
  Status Run(const Message& message, const Deadline& deadline);

  /// Ends all waits.
  void Stop();
  /// Joins the threads and tells the peers. Idempotent.
  void Close();

 private:
  struct Connected {
    std::mutex mutex;
    std::vector<std::shared_ptr<Communicator>> communicators;
  };
  OperationContext ContextOf(const Message& message) const;
  Status Connect(Channel& channel, const Deadline& deadline);
  Status RunRemote(const Message& message, const Deadline& deadline);
  Status Reach(const Channel& channel, const Deadline& deadline, const std::function<Status(const Deadline&)>& exchange) const;
  int NameOfRank(int rank) const { return config_.names[static_cast<size_t>(rank)]; }

  const Config config_;
  std::vector<std::unique_ptr<Channel>> channels_;  // [ranks][2]
  std::map<std::pair<int, bool>, std::unique_ptr<Channel>> remote_;
  // What fails with the group; shared with its communicator, which may live longer.
  const std::shared_ptr<Connected> connected_ = std::make_shared<Connected>();
};

}  // namespace tilerank
