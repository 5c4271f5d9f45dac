#include "comm/zmq_courier.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace tilerank {

namespace {

/// Every socket sets it and enforces it: with an empty domain libzmq asks nobody.
constexpr char kDomain[] = "tilerank";
constexpr char kGate[] = "inproc://zeromq.zap.01";
/// A peer that does not answer four heartbeats in a row is lost.
constexpr int kHeartbeatMs = 1000, kLostMs = 4 * kHeartbeatMs;
constexpr int kHandshakeMs = 5000;
/// What CURVE adds to a message (ZeroMQ RFC 26): command, nonce, flags, authentication; with room.
constexpr int64_t kCurveOverhead = 64;
/// How long a rank that closes waits for its peers to have what it sent.
constexpr int64_t kPartingNs = 5'000'000'000;
/// Up to here a copy costs less than telling where the memory may go again.
constexpr size_t kCopiedBytes = 2048;
/// So long after a rank's thread has received, the courier's own leaves it to those threads.
constexpr int64_t kLookedAfterNs = 10'000'000;

}  // namespace

ZmqCourier::Bell::Bell() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

ZmqCourier::Bell::~Bell() {
  if (fd_ >= 0) close(fd_);
}

void ZmqCourier::Bell::Ring() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
}

void ZmqCourier::Bell::Silence() {
  uint64_t count;
  [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
}

ZmqCourier::ZmqCourier(const ZmqLibrary& library, std::shared_ptr<Mailbox> mailbox)
    : z_(library), mailbox_(std::move(mailbox)), context_(library.ctx_new(), {&library}), pull_(nullptr, {&library}), messages_(new Messages{library, {}}), gate_(nullptr, {&library}) {}

Status ZmqCourier::Open(std::shared_ptr<Mailbox> mailbox, const std::string& endpoint, bool is_encrypted, std::shared_ptr<ZmqCourier>* opened) {
  const ZmqLibrary* library;
  if (Status s = ZmqLibrary::Find(&library); !s.ok()) return s;
  if (is_encrypted && library->has("curve") == 0) return Status(Code::kUnsupported, "the libzmq of the zeromq package has no CURVE: reinstall it, or say encryption 'none'");
  std::shared_ptr<ZmqCourier> courier(new ZmqCourier(*library, std::move(mailbox)));
  if (Status s = courier->Listen(endpoint, is_encrypted); !s.ok()) return s;
  courier->thread_ = std::thread([raw = courier.get()] { raw->Run(); });
  courier->mailbox_->CarryBy(courier);
  courier->mailbox_->Serve([weak = std::weak_ptr(courier)] {
    if (const std::shared_ptr<ZmqCourier> self = weak.lock()) self->SendAll();
  });
  courier->mailbox_->Keep(courier->messages_);
  *opened = std::move(courier);
  return Status::Ok();
}

ZmqMessage* ZmqCourier::Messages::Add() {
  all.push_back(std::make_unique<ZmqMessage>());
  library.msg_init(all.back().get());
  return all.back().get();
}

ZmqCourier::Messages::~Messages() {
  for (const auto& message : all) library.msg_close(message.get());
}

ZmqCourier::~ZmqCourier() { Close(false); }

ZmqCourier::Socket ZmqCourier::Create(int type) {
  Socket socket(z_.socket(context_.get(), type), {&z_});
  if (socket != nullptr) Set(socket, ZmqLibrary::kLinger, 0);
  return socket;
}

void ZmqCourier::Set(const Socket& socket, int option, int value) { z_.setsockopt(socket.get(), option, &value, sizeof value); }
void ZmqCourier::Set(const Socket& socket, int option, const std::string& value) { z_.setsockopt(socket.get(), option, value.c_str(), value.size()); }

int ZmqCourier::FdOf(const Socket& socket) {
  int fd = -1;
  size_t nbytes = sizeof fd;
  z_.getsockopt(socket.get(), ZmqLibrary::kFd, &fd, &nbytes);
  return fd;
}

Status ZmqCourier::Listen(const std::string& endpoint, bool is_encrypted) {
  const auto failed = [&] { return Status(Code::kIo, "the network between nodes: cannot listen at " + endpoint + ": " + Explain()); };
  if (context_ == nullptr || bell_.fd() < 0 || receiver_bell_.fd() < 0) return Status(Code::kIo, "the network between nodes: this process may open no more files");
  // Of each peer a Push and the two ends of its monitor.
  const int limit = z_.ctx_get(context_.get(), ZmqLibrary::kSocketLimit);
  z_.ctx_set(context_.get(), ZmqLibrary::kMaxSockets, std::min(limit, 16 + 4 * mailbox_->config().world_size));
  pull_ = Create(ZmqLibrary::kPull);
  if (pull_ == nullptr) return failed();
  const int64_t most = static_cast<int64_t>(mailbox_->message_bytes()) + kCurveOverhead;
  z_.setsockopt(pull_.get(), ZmqLibrary::kMaxMessageSize, &most, sizeof most);
  Set(pull_, ZmqLibrary::kIpv6, endpoint.find('[') != std::string::npos);
  Set(pull_, ZmqLibrary::kReceiveHighWaterMark, 0);
  Set(pull_, ZmqLibrary::kHandshakeInterval, kHandshakeMs);
  Set(pull_, ZmqLibrary::kHeartbeatTimeToLive, kLostMs);
  if (is_encrypted) {
    char public_key[ZmqLibrary::kKeyText], secret_key[ZmqLibrary::kKeyText];
    if (z_.curve_keypair(public_key, secret_key) != 0) return failed();
    public_key_ = public_key;
    secret_key_ = secret_key;
    explicit_bzero(secret_key, sizeof secret_key);
    // Before any socket is bound: libzmq asks nobody where nobody listens. Until the peers are known, whoever connects waits.
    gate_ = Create(ZmqLibrary::kReply);
    if (gate_ == nullptr || z_.bind(gate_.get(), kGate) != 0) return failed();
    Set(pull_, ZmqLibrary::kCurveServer, 1);
    Set(pull_, ZmqLibrary::kCurvePublicKey, public_key_);
    Set(pull_, ZmqLibrary::kCurveSecretKey, secret_key_);
    Set(pull_, ZmqLibrary::kZapDomain, std::string(kDomain));
    Set(pull_, ZmqLibrary::kZapEnforceDomain, 1);
    int is_server = 0, is_enforced = 0;
    size_t nbytes = sizeof(int);
    if (z_.getsockopt(pull_.get(), ZmqLibrary::kCurveServer, &is_server, &nbytes) != 0 || is_server != 1 ||
        z_.getsockopt(pull_.get(), ZmqLibrary::kZapEnforceDomain, &is_enforced, &nbytes) != 0 || is_enforced != 1) {
      return Status(Code::kUnsupported, "the libzmq of the zeromq package cannot enforce authentication");
    }
  }
  if (z_.bind(pull_.get(), endpoint.c_str()) != 0) return failed();
  char bound[256] = "";
  size_t nbytes = sizeof bound;
  if (z_.getsockopt(pull_.get(), ZmqLibrary::kLastEndpoint, bound, &nbytes) != 0) return failed();
  endpoint_ = bound;
  pull_fd_ = FdOf(pull_);
  return Status::Ok();
}

void ZmqCourier::Connect(std::vector<Peer> peers) {
  {
    std::lock_guard lock(state_);
    asked_ = std::move(peers);
    is_asked_ = true;
  }
  bell_.Ring();
}

Status ZmqCourier::AwaitConnected(const Deadline& deadline) {
  std::unique_lock lock(state_);
  for (;;) {
    if (!problem_.empty()) return Status(Code::kIo, "the network between nodes: " + problem_);
    if (is_closed_) return Status(Code::kClosed, "the network between nodes was closed");
    if (is_dialled_ && up_.size() == lines_.size()) return Status::Ok();
    const int64_t now = NowNs();
    if (deadline.IsOver(now)) {
      std::string missing;
      for (const auto& line : lines_) {
        if (line->state == Line::kConnecting) missing += " rank " + std::to_string(line->peer.rank) + " on " + line->peer.host + " at " + line->peer.endpoint + ";";
      }
      return Status(Code::kTimeout, "the network between nodes: no connection within " + std::to_string(deadline.timeout_ms()) + " ms to" + missing +
                                        " does a firewall drop what is sent there?");
    }
    changed_.wait_for(lock, std::chrono::nanoseconds(deadline.RemainingNs(now)));
  }
}

// A Push connects at once and sends what it was given when the handshake is over.
bool ZmqCourier::Dial() {
  std::vector<Peer> peers;
  {
    std::lock_guard lock(state_);
    if (!is_asked_ || is_dialled_) return false;
    peers.swap(asked_);
  }
  std::vector<std::unique_ptr<Line>> lines;
  std::string problem;
  for (Peer& peer : peers) {
    auto line = std::unique_ptr<Line>(new Line{std::move(peer), Create(ZmqLibrary::kPush), Create(ZmqLibrary::kPair)});
    const Peer& to = line->peer;
    const Socket& push = line->push;
    const std::string monitor = "inproc://tilerank.monitor." + std::to_string(to.rank);
    bool is_well = push != nullptr && line->monitor != nullptr;
    if (is_well) {
      Set(push, ZmqLibrary::kIpv6, to.endpoint.find('[') != std::string::npos);
      Set(push, ZmqLibrary::kSendHighWaterMark, 0);  // the mailbox's window bounds what is under way
      Set(push, ZmqLibrary::kHeartbeatInterval, kHeartbeatMs);
      Set(push, ZmqLibrary::kHeartbeatTimeout, kLostMs);
      if (gate_ != nullptr) {
        std::string key(ZmqLibrary::kKeyBytes, '\0');
        if (to.public_key.size() == ZmqLibrary::kKeyText - 1 && z_.z85_decode(reinterpret_cast<uint8_t*>(key.data()), to.public_key.c_str()) != nullptr) admitted_.insert(key);
        Set(push, ZmqLibrary::kCurveServerKey, to.public_key);
        Set(push, ZmqLibrary::kCurvePublicKey, public_key_);
        Set(push, ZmqLibrary::kCurveSecretKey, secret_key_);
        int is_server = 1;
        size_t nbytes = sizeof is_server;
        char key_set[ZmqLibrary::kKeyText] = "";
        size_t key_bytes = sizeof key_set;
        // A key that libzmq did not take would mean a connection that is not encrypted.
        is_well = z_.getsockopt(push.get(), ZmqLibrary::kCurveServer, &is_server, &nbytes) == 0 && is_server == 0 &&
                  z_.getsockopt(push.get(), ZmqLibrary::kCurveServerKey, key_set, &key_bytes) == 0 && to.public_key == key_set;
      }
      const int events = ZmqLibrary::kDisconnected | ZmqLibrary::kHandshakeFailed | ZmqLibrary::kHandshakeSucceeded | ZmqLibrary::kHandshakeProtocol | ZmqLibrary::kHandshakeRefused;
      is_well = is_well && z_.socket_monitor(push.get(), monitor.c_str(), events) == 0 && z_.connect(line->monitor.get(), monitor.c_str()) == 0 &&
                z_.connect(push.get(), to.endpoint.c_str()) == 0;
    }
    if (!is_well && problem.empty()) {
      problem = "rank " + std::to_string(to.rank) + " on " + to.host + " at " + to.endpoint + ": " + (push == nullptr ? Explain() : "no connection can be made with its key and endpoint");
    }
    lines.push_back(std::move(line));
  }
  {
    std::lock_guard lock(sender_);
    line_of_.assign(static_cast<size_t>(mailbox_->config().world_size), nullptr);
    for (const auto& line : lines) line_of_[static_cast<size_t>(line->peer.rank)] = line.get();
  }
  {
    std::lock_guard lock(state_);
    lines_ = std::move(lines);
    problem_ = problem;
    is_dialled_ = true;
  }
  changed_.notify_all();
  SendAll();
  return true;
}

bool ZmqCourier::ReceiveParts(const Socket& socket, std::vector<std::string>* parts) {
  parts->clear();
  for (bool is_more = true; is_more;) {
    ZmqMessage part;
    z_.msg_init(&part);
    if (z_.msg_recv(&part, socket.get(), ZmqLibrary::kDontWait) < 0) {
      z_.msg_close(&part);
      return false;
    }
    parts->emplace_back(static_cast<const char*>(z_.msg_data(&part)), z_.msg_size(&part));
    is_more = z_.msg_more(&part) != 0;
    z_.msg_close(&part);
  }
  return true;
}

// ZeroMQ RFC 27. A request: version, id, domain, address, identity, mechanism, credentials.
void ZmqCourier::AnswerGate() {
  std::vector<std::string> ask;
  while (ReceiveParts(gate_, &ask)) {
    const bool is_known = ask.size() == 7 && ask[0] == "1.0" && ask[2] == kDomain && ask[5] == "CURVE" && admitted_.contains(ask[6]);
    const std::string answer[] = {"1.0", ask.size() > 1 ? ask[1] : "", is_known ? "200" : "400", is_known ? "OK" : "unknown key", "", ""};
    for (const std::string& part : answer) z_.send(gate_.get(), part.data(), part.size(), &part == &answer[5] ? 0 : ZmqLibrary::kSendMore);
  }
}

// A message of a monitor: the event's number (16 bits) and value (32), and the endpoint.
void ZmqCourier::Watch(Line& line) {
  std::vector<std::string> parts;
  while (ReceiveParts(line.monitor, &parts)) {
    if (parts.empty() || parts[0].size() < sizeof(uint16_t)) continue;
    uint16_t event;
    std::memcpy(&event, parts[0].data(), sizeof event);
    switch (event) {
      case ZmqLibrary::kHandshakeSucceeded: {
        std::lock_guard lock(state_);
        if (line.state != Line::kConnecting) break;
        line.state = Line::kUp;
        up_.insert(line.peer.rank);
        changed_.notify_all();
        break;
      }
      case ZmqLibrary::kHandshakeRefused: Lose(line, "it refused the key of this rank: it is not of this job"); break;
      case ZmqLibrary::kHandshakeProtocol: Lose(line, "what listens there does not speak ZeroMQ as ranks do"); break;
      case ZmqLibrary::kHandshakeFailed: Lose(line, "the connection broke while keys were exchanged"); break;
      case ZmqLibrary::kDisconnected:
        if (line.state == Line::kUp) Lose(line, "the connection to " + line.peer.host + " at " + line.peer.endpoint + " was lost");
        break;
      default: break;
    }
  }
}

void ZmqCourier::Lose(Line& line, std::string why) {
  bool is_parting;
  {
    std::lock_guard lock(state_);
    if (line.state == Line::kLost) return;
    if (line.state == Line::kConnecting && problem_.empty()) {
      problem_ = "rank " + std::to_string(line.peer.rank) + " on " + line.peer.host + " at " + line.peer.endpoint + ": " + why;
    }
    line.state = Line::kLost;
    up_.erase(line.peer.rank);
    is_parting = is_parting_;
    changed_.notify_all();
  }
  {
    std::lock_guard lock(sender_);
    line_of_[static_cast<size_t>(line.peer.rank)] = nullptr;
  }
  if (is_parting) return;
  ReceiveAll();  // it may have said why
  mailbox_->Lost(line.peer.rank, {line.peer.host, line.peer.pid, std::move(why)});
}

void ZmqCourier::Run() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  // The descriptor of a ZeroMQ socket tells of changes only: what is there is taken to the last before the thread sleeps.
  std::vector<pollfd> fds = {{bell_.fd(), POLLIN, 0}, {pull_fd_, POLLIN, 0}};
  constexpr size_t kFirstLine = 3;
  while (!is_stopping_.load(std::memory_order_acquire)) {
    if (Dial()) {
      fds.push_back({gate_ != nullptr ? FdOf(gate_) : -1, POLLIN, POLLIN});
      for (const auto& line : lines_) fds.push_back({line->monitor != nullptr ? FdOf(line->monitor) : -1, POLLIN, POLLIN});
    }
    if (fds.size() > 2 && fds[2].fd >= 0 && fds[2].revents != 0) AnswerGate();
    for (size_t i = kFirstLine; i < fds.size(); i++) {
      if (fds[i].fd >= 0 && fds[i].revents != 0) Watch(*lines_[i - kFirstLine]);
    }
    // First said, then taken to the last: who receives after that and leaves something behind, rings.
    is_alone_.store(waiting_.load() == 0 && NowNs() - last_await_ns_.load() >= kLookedAfterNs);
    if (!ReceiveAll()) is_alone_.store(false);
    const bool is_alone = is_alone_.load();
    fds[1].fd = is_alone ? pull_fd_ : -1;
    poll(fds.data(), fds.size(), is_alone ? -1 : static_cast<int>(kLookedAfterNs / 1'000'000));
    if (fds[0].revents != 0) bell_.Silence();
  }
}

bool ZmqCourier::ReceiveAll() {
  if (!receiver_.try_lock()) return false;
  while (ReceiveOne()) {
  }
  receiver_.unlock();
  // A thread that found the receiver taken sleeps until something arrives. It was counted before it looked.
  if (waiting_.load() > 0) mailbox_->RouseAll();
  return true;
}

void ZmqCourier::SendAll() {
  std::vector<Peer> lost;
  std::string why;
  {
    std::lock_guard lock(sender_);
    if (line_of_.empty()) return;
    Mailbox::Outgoing outgoing;
    while (mailbox_->Take(&outgoing)) {
      Line*& line = line_of_[static_cast<size_t>(outgoing.peer)];
      if (line == nullptr) continue;
      std::byte* data = outgoing.ring != nullptr ? outgoing.ring->data + outgoing.begin : outgoing.bytes.data();
      ZmqMessage message;
      int error = 0;
      if (outgoing.ring == nullptr || outgoing.nbytes <= kCopiedBytes) {
        error = z_.msg_init_size(&message, outgoing.nbytes);
        if (error == 0) std::memcpy(z_.msg_data(&message), data, outgoing.nbytes);
      } else {
        // libzmq sends from the ring, on its own thread, and keeps it for as long.
        auto* keep = new std::shared_ptr<Mailbox::Ring>(outgoing.ring);
        error = z_.msg_init_data(&message, data, outgoing.nbytes, [](void*, void* hint) { delete static_cast<std::shared_ptr<Mailbox::Ring>*>(hint); }, keep);
        if (error != 0) delete keep;
      }
      if (error == 0) {
        while ((error = z_.msg_send(&message, line->push.get(), ZmqLibrary::kDontWait)) < 0 && z_.last_error() == EINTR) {
        }
        if (error < 0) {
          why = Explain();
          z_.msg_close(&message);
        }
      } else {
        why = Explain();
      }
      if (error >= 0) continue;
      lost.push_back(line->peer);
      line = nullptr;
    }
  }
  for (const Peer& peer : lost) mailbox_->Lost(peer.rank, {peer.host, peer.pid, "sending to it failed: " + why});
}

bool ZmqCourier::ReceiveOne() {
  if (pull_ == nullptr) return false;
  if (spare_.empty()) spare_.push_back(messages_->Add());
  ZmqMessage* message = spare_.back();
  int nbytes;
  while ((nbytes = z_.msg_recv(message, pull_.get(), ZmqLibrary::kDontWait)) < 0 && z_.last_error() == EINTR) {
  }
  if (nbytes < 0) return false;
  spare_.pop_back();
  const auto keep = reinterpret_cast<uint64_t>(message);
  if (!mailbox_->Deliver(static_cast<const std::byte*>(z_.msg_data(message)), static_cast<size_t>(nbytes), keep)) {
    z_.msg_close(message);
    z_.msg_init(message);
    spare_.push_back(message);
  }
  DropReleased();
  return true;
}

void ZmqCourier::DropReleased() {
  mailbox_->TakeReleased(&released_);
  for (const uint64_t keep : released_) {
    auto* message = reinterpret_cast<ZmqMessage*>(keep);
    z_.msg_close(message);
    z_.msg_init(message);
    spare_.push_back(message);
  }
  released_.clear();
}

void ZmqCourier::SleepOnSocket(uint64_t seen, int64_t most_ns) {
  is_asleep_.store(true);
  if (!mailbox_->HasArrived(seen)) {
    pollfd fds[] = {{pull_fd_, POLLIN, 0}, {receiver_bell_.fd(), POLLIN, 0}};
    const timespec most = {most_ns / 1'000'000'000, most_ns % 1'000'000'000};
    if (ppoll(fds, 2, &most, nullptr) > 0 && fds[1].revents != 0) receiver_bell_.Silence();
  }
  is_asleep_.store(false);
}

void ZmqCourier::Rouse() {
  if (is_asleep_.load()) receiver_bell_.Ring();
}

void ZmqCourier::Await(uint64_t seen, int64_t, int64_t most_ns) {
  waiting_.fetch_add(1);
  const int64_t end = NowNs() + most_ns;
  int64_t now = end - most_ns;
  bool has_received = false, has_left_some = false;
  while (!mailbox_->HasArrived(seen) && now < end) {
    if (!receiver_.try_lock()) {
      mailbox_->SleepUntilArrival(seen, end - now);
    } else if (pull_ == nullptr) {
      receiver_.unlock();
      mailbox_->SleepUntilArrival(seen, end - now);
    } else {
      has_received = true;
      has_left_some = ReceiveOne();
      if (!has_left_some) SleepOnSocket(seen, end - now);
      receiver_.unlock();
    }
    now = NowNs();
  }
  last_await_ns_.store(now);
  if (has_left_some && is_alone_.load()) bell_.Ring();
  if (waiting_.fetch_sub(1) > 1 && has_received) mailbox_->RouseAll();
}

void ZmqCourier::Close(bool is_orderly) {
  std::unique_lock lock(state_);
  if (is_closed_) return;
  const bool parts = is_orderly && !is_parting_ && is_dialled_ && problem_.empty();
  const std::set<int> up = up_;
  is_parting_ = true;
  lock.unlock();
  if (parts) {
    for (const int rank : up) mailbox_->SayGoodbye(rank);
    const auto is_open = [&](int rank) {
      std::lock_guard state(state_);
      return up_.contains(rank) && !mailbox_->HasParted(rank);
    };
    for (const int64_t end = NowNs() + kPartingNs; std::any_of(up.begin(), up.end(), is_open) && NowNs() < end; usleep(200)) {
    }
  }
  lock.lock();
  if (is_closed_) return;
  is_closed_ = true;
  lock.unlock();
  changed_.notify_all();
  is_stopping_.store(true, std::memory_order_release);
  bell_.Ring();
  if (thread_.joinable()) thread_.join();
  mailbox_->Stop();
  mailbox_->CarryBy(nullptr);
  {
    std::lock_guard sending(sender_);
    line_of_.clear();
    for (const auto& line : lines_) {
      if (line->push != nullptr) z_.socket_monitor(line->push.get(), nullptr, 0);
    }
    lines_.clear();
  }
  Rouse();
  {
    std::lock_guard receiving(receiver_);
    pull_.reset();
    gate_.reset();
  }
  mailbox_->RouseAll();
  context_.reset();  // until libzmq's threads have ended
  explicit_bzero(secret_key_.data(), secret_key_.size());
}

}  // namespace tilerank
