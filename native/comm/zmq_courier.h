// Carries the messages of a mailbox by ZeroMQ. Whoever posts a frame sends it, whoever waits for one receives it, in its own thread and without
// JavaScript: between two ranks' threads stand only libzmq's, one on each side. Frames, numbers, credits, failure notes and farewells are the
// mailbox's; here are sockets.
//
// Sockets: one Pull, bound, on which all peers of other nodes send; one Push a peer. Heartbeats are libzmq's own, on its I/O thread. A connection
// that is lost is the end of the group, never a silent reconnect; what a peer sent before stays valid.
//
// With CURVE alone everybody who knows a server's public key is let in: who may come is asked by ZAP (ZeroMQ RFC 27), answered here.
//
// A thread of the courier's own looks after connections and authentication, and receives while no rank's thread does: for ranks that compute while
// others wait for them, and for groups that are idle. It sleeps without a time limit when all is quiet.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "comm/mailbox.h"
#include "comm/sync.h"
#include "comm/zmq_library.h"

namespace tilerank {

class ZmqCourier final : public Mailbox::Carrier {
 public:
  /// A rank of another node.
  struct Peer {
    int rank = 0;  // of the job
    std::string host;
    int64_t pid = 0;
    std::string endpoint;    // tcp://address:port
    std::string public_key;  // Z85; empty where nothing is encrypted
  };

  /// Listens at `endpoint`, with * for a port that the kernel chooses. kIo: it cannot; kUnsupported: no libzmq, or one without CURVE.
  static Status Open(std::shared_ptr<Mailbox> mailbox, const std::string& endpoint, bool is_encrypted, std::shared_ptr<ZmqCourier>* opened);
  ~ZmqCourier() override;
  /// Where the others reach this rank, and the key that they know it by: made for this courier, its secret half stays in it.
  const std::string& endpoint() const { return endpoint_; }
  const std::string& public_key() const { return public_key_; }
  /// Admits these peers, and connects to all of them. Once.
  void Connect(std::vector<Peer> peers);
  /// Until all of that stands. kIo: names the peer; kTimeout likewise.
  Status AwaitConnected(const Deadline& deadline);
  void Await(uint64_t seen, int64_t waited_ns, int64_t most_ns) override;
  void Rouse() override;
  /// Groups that are still open break. `is_orderly`: first every peer gets what was sent, and says so. Idempotent.
  void Close(bool is_orderly);

 private:
  struct SocketCloser {
    const ZmqLibrary* library;
    void operator()(void* socket) const { library->close(socket); }
  };
  using Socket = std::unique_ptr<void, SocketCloser>;
  /// A peer, as seen from here.
  struct Line {
    Peer peer;
    Socket push, monitor;
    enum { kConnecting, kUp, kLost } state = kConnecting;
  };
  /// Where messages lie that have come; the mailbox keeps it, for collectives that still read when the courier is gone.
  struct Messages {
    const ZmqLibrary& library;
    std::vector<std::unique_ptr<ZmqMessage>> all;
    ~Messages();
    ZmqMessage* Add();
  };
  /// A file descriptor that wakes whoever polls it.
  class Bell {
   public:
    Bell();
    ~Bell();
    Bell(const Bell&) = delete;
    Bell& operator=(const Bell&) = delete;
    int fd() const { return fd_; }
    void Ring();
    void Silence();

   private:
    int fd_;
  };

  ZmqCourier(const ZmqLibrary& library, std::shared_ptr<Mailbox> mailbox);
  Status Listen(const std::string& endpoint, bool is_encrypted);
  Socket Create(int type);
  void Set(const Socket& socket, int option, int value);
  void Set(const Socket& socket, int option, const std::string& value);
  int FdOf(const Socket& socket);
  std::string Explain() const { return z_.explain(z_.last_error()); }
  /// What a socket of ours sends to itself, or libzmq to it: all parts of one message; false: none has come.
  bool ReceiveParts(const Socket& socket, std::vector<std::string>* parts);

  // On the courier's thread.
  void Run();
  bool Dial();
  void AnswerGate();
  void Watch(Line& line);
  void Lose(Line& line, std::string why);

  /// All that has come; false: another thread is at it.
  bool ReceiveAll();

  // On any thread.
  void SendAll();
  // With receiver_.
  bool ReceiveOne();
  void DropReleased();
  /// Sleeps until something may be read.
  void SleepOnSocket(uint64_t seen, int64_t most_ns);

  const ZmqLibrary& z_;
  const std::shared_ptr<Mailbox> mailbox_;
  struct ContextCloser {
    const ZmqLibrary* library;
    void operator()(void* context) const { library->ctx_term(context); }
  };
  std::unique_ptr<void, ContextCloser> context_;
  std::string endpoint_, public_key_, secret_key_;

  std::mutex receiver_;  // held by the thread that receives, also in its sleep; guards what follows
  Socket pull_;
  int pull_fd_ = -1;
  const std::shared_ptr<Messages> messages_;
  std::vector<ZmqMessage*> spare_;  // of those
  std::vector<uint64_t> released_;

  std::atomic<int> waiting_{0};         // threads in Await
  std::atomic<int64_t> last_await_ns_{0};
  std::atomic<bool> is_alone_{false};   // the courier's own thread sleeps until the socket says that something has come, which it does
                                        // only if nothing was left in it
  std::atomic<bool> is_asleep_{false};  // the one of them that sleeps on the socket
  Bell receiver_bell_;

  std::mutex sender_;  // guards what follows; taken inside of no other lock
  std::vector<Line*> line_of_;  // [ranks of the job], null before Connect and after Close

  std::mutex state_;  // guards what follows; taken inside of no other lock
  std::condition_variable changed_;
  std::vector<Peer> asked_;
  bool is_asked_ = false, is_dialled_ = false;
  std::set<int> up_;  // ranks whose connection stands
  std::string problem_;  // the first, while connecting
  bool is_parting_ = false, is_closed_ = false;
  std::atomic<bool> is_stopping_{false};

  // The thread's own, and of Close after it.
  Socket gate_;
  std::set<std::string> admitted_;  // keys, [32]
  std::vector<std::unique_ptr<Line>> lines_;
  Bell bell_;
  std::thread thread_;
};

}  // namespace tilerank
