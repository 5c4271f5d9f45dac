// The transport of groups across nodes: frames pass here between the threads that run collectives and whoever carries them, which is ZeroMQ
// (zmq_courier.h) or MPI (mpi_courier.h), in the very threads that wait. No socket is touched here; what comes from the network is hostile until it
// was checked.
//
// A frame lies in a ring of its sender, one for each stream and peer, until the peer has said that it took the frame: libzmq and MPI send from
// that very memory, long after their calls have returned. Frames that have come stay in the carrier's memory until the algorithm has read them.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "comm/transport.h"

namespace tilerank {

/// First bytes of every message. Little endian, as on all machines that this runs on.
struct FrameHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t kind;
  uint64_t job;        // digest of the job's nonce and the group: frames of another epoch are dropped
  uint64_t stream;
  uint64_t number;     // of data frames of this stream to this peer, from 1, without a gap
  uint64_t taken;      // data frames of the peer that the source is through with
  uint64_t tag;        // OpTag::Bits
  uint64_t count;
  uint64_t operation;
  uint32_t source;     // rank of the job
  uint32_t part;
  uint32_t nbytes;     // behind the header
  uint32_t check;      // of all fields before, so that a header that was damaged on an unencrypted link is not believed
};
static_assert(sizeof(FrameHeader) == 80);

/// Why a rank broke the group, for ranks of other nodes.
struct FailureNote {
  int32_t code, subject, signal;
  int64_t pid;
  uint64_t sequence;
  char operation[24];
  char host[64];
  char text[352];
};

class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  struct Config {
    uint64_t job = 0;
    int rank = 0, world_size = 1;   // in the job
    size_t frame_bytes = 256 << 10;  // payload of a frame, a multiple of 64
    int window = 8;                  // frames to one peer under way
  };
  /// Memory that frames are sent from.
  struct Ring {
    std::byte* data = nullptr;
    size_t nbytes = 0;
    std::atomic<uint64_t> sent{0};  // frames that a Carrier is through with
    ~Ring();
  };
  /// A message for the socket of `peer`: a range of a ring, or bytes of its own.
  struct Outgoing {
    int peer = 0;  // rank of the job
    std::shared_ptr<Ring> ring;
    size_t begin = 0, nbytes = 0;
    std::vector<std::byte> bytes;
  };
  /// Called on the worker's thread, or on that of a collective, never with a lock held: the group is to be broken.
  using OnFailure = std::function<void(Status reason, int culprit, const char* operation, uint64_t sequence)>;

  /// Moves messages in the threads that wait for them.
  class Carrier {
   public:
    virtual ~Carrier() = default;
    /// Lets messages come until HasArrived(seen), or the time is over. The caller has waited `waited_ns` for the same thing before.
    virtual void Await(uint64_t seen, int64_t waited_ns, int64_t most_ns) = 0;
    /// Ends the sleep of a thread in Await, so that it looks at HasArrived.
    virtual void Rouse() {}
    virtual void Settle() {}  // Transport::Settle
    /// True: memory of a ring may be written again when Sent has said so. False: when the peer has the frame, which is the mailbox's own matter.
    virtual bool TellsSent() const { return false; }
  };

  explicit Mailbox(const Config& config) : config_(config) {}
  const Config& config() const { return config_; }
  size_t message_bytes() const { return sizeof(FrameHeader) + config_.frame_bytes; }

  class Stream;
  /// A stream of a group: members[r] is the job's rank that the group calls r, or -1 where that one is on this node.
  Status Open(uint64_t stream, std::vector<int> members, int rank, OnFailure on_failure, std::shared_ptr<Stream>* opened);

  // For a carrier that is no thread: it calls Sent for each message that it took, in order for each peer.

  /// Before the first stream is opened; null: no more.
  void CarryBy(std::shared_ptr<Carrier> carrier);
  void Sent(const Outgoing& outgoing);
  /// What delivered messages lie in goes with the mailbox: a stream may still hold some when the carrier is gone.
  void Keep(std::shared_ptr<void> memory);
  /// Anything that may end a wait.
  bool HasArrived(uint64_t seen) const { return arrivals_.load(std::memory_order_seq_cst) != seen; }
  void SleepUntilArrival(uint64_t seen, int64_t most_ns);
  /// Whoever waits, in whatever way, looks again.
  void RouseAll();

  // For whoever carries.

  /// `wake` is called on any thread when there is something to take; not again before Take has found nothing.
  void Serve(std::function<void()> wake);
  bool Take(Outgoing* outgoing);
  /// A message from the network. True: `keep` names it in TakeReleased when its memory may go; false: it may go now.
  bool Deliver(const std::byte* message, size_t nbytes, uint64_t keep);
  void TakeReleased(std::vector<uint64_t>* keeps);
  /// Who a rank was, as far as the carrier knows: an empty host and no pid, where MPI does not tell.
  struct Loss {
    std::string host;
    int64_t pid = 0;
    std::string why;
  };
  /// The connection to a rank of the job is lost.
  void Lost(int rank, const Loss& loss);
  /// That was said of it. It never comes back.
  bool IsLost(int rank);
  /// The last message to a peer; it is answered whatever that rank's program does. Then everything before it has arrived as well.
  void SayGoodbye(int peer);
  bool HasParted(int peer);
  /// The sockets go: groups that are still open break, and nobody reads what was delivered any more.
  void Stop();
  /// Messages that were refused so far.
  uint64_t refused() const { return refused_.load(); }

 private:
  friend class Stream;
  struct Early {
    FrameHeader header;
    const std::byte* payload;
    uint64_t keep;
  };
  bool DeliverTo(const std::shared_ptr<Stream>& stream, const FrameHeader& header, const std::byte* payload, uint64_t keep);
  void Refuse() { refused_.fetch_add(1); }
  // With mutex_ held; true: the caller calls Wake() when it has let it go.
  bool Enqueue(Outgoing outgoing);
  void Wake();
  Outgoing Bare(uint16_t kind, int peer) const;
  static Outgoing Message(int peer, const FrameHeader& header, const void* payload);
  FrameHeader HeaderFor(uint16_t kind, uint64_t stream) const;
  /// For what has come: the thread that lets it come is awake.
  void SignalArrival();
  std::shared_ptr<Carrier> carrier();

  const Config config_;
  std::atomic<uint64_t> refused_{0};
  std::atomic<uint64_t> arrivals_{0};   // counts whatever may end a wait; the futex of waiters
  std::atomic<uint32_t> sleepers_{0};
  std::mutex mutex_;  // guards what follows, and the fields of streams
  std::shared_ptr<Carrier> carrier_;
  std::function<void()> wake_;
  bool is_awake_ = false;
  std::deque<Outgoing> outgoing_;
  std::vector<uint64_t> released_;
  std::map<uint64_t, std::weak_ptr<Stream>> streams_;
  std::map<uint64_t, std::vector<Early>> early_;  // for streams that are not open here yet
  std::set<int> parted_;                          // peers that have answered the last message
  std::map<int, Loss> lost_;
  std::shared_ptr<void> memory_;
};

class Mailbox::Stream final : public Transport {
 public:
  ~Stream() override;
  void Enter(const FrameTag& tag) override;
  size_t frame_bytes() const override { return mailbox_->config_.frame_bytes; }
  int window() const override { return mailbox_->config_.window; }
  std::byte* Reserve(int peer) override;
  void Post(int peer, const FrameTag& tag, size_t nbytes) override;
  bool Poll(int peer, Frame* frame) override;
  void Release(int peer) override;
  bool HasLeft(int peer) const override;
  void Wait(int peer, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) override;
  void Settle() override;

  /// Tells all peers that the group is broken, or that this rank leaves it in order. No frame is sent afterwards.
  void TellFailure(const Status& reason);
  void Leave();

  /// What this rank shows of itself to all peers, also when the group is broken (network_renewal.h): the last that came is what counts. Whoever
  /// shows something takes part in no further operation.
  void Show(const void* note, size_t nbytes);
  /// False: nothing has come of that length.
  bool ShownBy(int rank, void* note, size_t nbytes) const;
  bool IsRenewing(int peer) const override;

  /// Who holds this rank up, which it tells peers that wait for it: see Communicator::HeldUpBy. Called on any thread.
  void TellHeldUp(std::function<int()> held_up_by);
  int HeldUpBy(int peer) const override;

 private:
  friend class Mailbox;
  struct Incoming {
    FrameTag tag;
    const std::byte* payload;
    size_t nbytes;
    uint64_t keep;
  };
  struct Peer {
    int job_rank = -1;
    std::shared_ptr<Ring> ring;
    uint64_t posted = 0, taken = 0;       // frames to the peer, and of those the ones that it is through with
    std::deque<Incoming> incoming;
    uint64_t received = 0, released = 0;  // frames of the peer
    uint64_t told = 0;                    // of released, what the peer has been told
    bool is_read = false;                 // the first of incoming
    bool has_left = false;
    std::vector<std::byte> shown;
    int held_up_by = -1;                  // what the peer said last, and when
    int64_t held_up_ns = 0;
    // Of its sender's thread, and its receiver's.
    struct Waiting {
      uint64_t seen = 0;  // arrivals when there was nothing yet
      int64_t start_ns = 0, probed_ns = 0;
    } waiting[2];
  };
  Stream(std::shared_ptr<Mailbox> mailbox, uint64_t id, std::vector<int> members, int rank, OnFailure on_failure);
  size_t stride() const { return kHeadBytes + mailbox_->config_.frame_bytes; }
  int MemberOf(int job_rank) const;
  void TellAll(uint16_t kind, const void* payload, size_t nbytes);
  FrameHeader HeaderTo(Peer& peer, uint16_t kind, const FrameTag& tag, size_t nbytes, uint64_t number) const;
  Outgoing Control(uint16_t kind, int peer, const FrameTag& tag, const void* payload, size_t nbytes);

  // A frame in its ring: the header right before the payload, which is aligned.
  static constexpr size_t kHeadBytes = 128;
  static constexpr size_t kRemembered = 64;

  const std::shared_ptr<Mailbox> mailbox_;
  const uint64_t id_;
  const int rank_;
  const OnFailure on_failure_;
  std::vector<Peer> peers_;               // by rank of the group
  FrameTag entered_[kRemembered];         // the last operations of this rank, by number
  FrameTag last_;                         // the one that it entered last
  bool is_over_ = false;                  // left or failed
  std::function<int()> held_up_by_;
};

}  // namespace tilerank
