// Carries the messages of a mailbox by MPI: whoever waits for a message lets the MPI work. Frames, numbers,
// credits, failure notes and farewells are the mailbox's; here are requests. Knows no MPI but the table of functions (mpi/world.h).
//
// Of each peer a few receives are posted, each with room for the largest message, under a tag that belongs to this mailbox alone: what a peer
// sends before that waits in the MPI. A thread looks after all of it now and then, for ranks that compute while others wait for them.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/mailbox.h"
#include "mpi/world.h"

namespace tilerank {

class MpiCourier final : public Mailbox::Carrier {
 public:
  /// `peers`: ranks of the job that are on other nodes, and their hosts.
  static std::shared_ptr<MpiCourier> Start(const MpiWorld& world, std::shared_ptr<Mailbox> mailbox, int tag, std::vector<std::pair<int, std::string>> peers);
  ~MpiCourier() override;
  void Await(uint64_t seen, int64_t waited_ns, int64_t most_ns) override;
  void Settle() override;
  bool TellsSent() const override { return true; }
  /// Groups that are still open break. What was sent goes out first, unless a peer does not take it. Once.
  void Close();

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  struct Send {
    MpiRequest request;
    Mailbox::Outgoing outgoing;
  };
  struct Receive {
    MpiRequest request;
    std::byte* buffer;
  };
  struct Peer {
    int rank = 0;  // of the job
    std::string host;
    bool is_lost = false;
    std::deque<Send> sends;        // in order, tested one after the other
    std::deque<Receive> receives;  // likewise
  };
  /// For the mailbox: a message, or that a peer is lost.
  struct Arrival {
    int lost = -1;
    std::string host, why;
    std::byte* buffer = nullptr;
    size_t nbytes = 0;
  };

  MpiCourier(const MpiWorld& world, std::shared_ptr<Mailbox> mailbox, int tag, std::vector<std::pair<int, std::string>> peers);
  void Run();
  /// Looks once for what has come and what has gone.
  void Progress();
  // With the world's lock.
  void SendAll();
  void TestAll();
  void Post(Peer& peer);
  void Lose(Peer& peer, int error);
  MpiRequest& Front(const Peer& peer, bool is_send) { return fronts_[static_cast<size_t>(&peer - peers_.data()) * 2 + (is_send ? 1 : 0)]; }
  // Without it.
  void Deliver();
  std::byte* message(std::byte* buffer) const { return buffer + kBeforeHeader; }

  static constexpr size_t kPosted = 4;
  static constexpr size_t kBeforeHeader = 128 - sizeof(FrameHeader);  // so that payloads are aligned

  const MpiWorld& world_;
  const std::shared_ptr<Mailbox> mailbox_;
  const int tag_;
  std::atomic<int> unsent_{0};

  // Guarded by the world's lock.
  std::vector<Peer> peers_;
  std::vector<Peer*> peer_of_;      // [ranks of the job]
  std::vector<MpiRequest> fronts_;  // [peers][the first receive, the first send]
  std::vector<MpiDone> done_;
  std::vector<Memory> memory_;
  std::vector<std::byte*> free_;
  std::vector<uint64_t> released_;

  std::mutex arrivals_mutex_;  // guards what follows; taken inside of the world's lock, never around it
  std::deque<Arrival> arrivals_;
  std::vector<std::byte*> refused_;
  bool is_delivering_ = false;

  std::mutex thread_mutex_;
  std::condition_variable thread_wake_;
  bool is_hurried_ = false, is_stopping_ = false;
  std::thread thread_;
};

/// Gives `card` to all ranks and takes theirs, by rank; those that did not come within the deadline are left out. One by one, where an
/// Allgather would not say who is missing.
Status ExchangeCards(const MpiWorld& world, int tag, const std::string& card, const Deadline& deadline, std::vector<std::optional<std::string>>* cards);
constexpr size_t kMaxCardBytes = 16 << 10;

}  // namespace tilerank
