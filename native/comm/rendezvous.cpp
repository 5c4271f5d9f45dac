#include "comm/rendezvous.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "comm/archive.h"

namespace tilerank {

namespace {

constexpr uint32_t kMagic = 0x544c524b;
constexpr size_t kNonceDigits = 32;
constexpr int kPumpMs = 5;

struct Hello {
  uint32_t magic, version;
  char nonce[kNonceDigits];
  int32_t rank, world_size;
  uint64_t group;
  uint32_t arena;
  uint64_t nbytes;
  cpu_set_t cpus;
  char terms[192];  // zero-terminated
};

Status IoError(const std::string& what, int error) {
  return Status(Code::kIo, what + ": " + std::strerror(error)).Text("systemError", std::strerror(error));
}

bool IsNonce(const std::string& nonce) {
  return nonce.size() == kNonceDigits && nonce.find_first_not_of("0123456789abcdef") == std::string::npos;
}

socklen_t NameOf(const std::string& nonce, int rank, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  const std::string name = "tilerank/" + nonce + "/" + std::to_string(rank);
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

Status Cancelled(const std::string& operation) {
  return Status(Code::kAborted, operation + " was given up before all ranks had come").Text("operation", operation);
}

// So that ranks with different ideas of who is in a group never meet.
std::string DigestOf(const std::vector<int>& members) {
  uint64_t hash = members.size();
  for (int member : members) {
    hash = (hash ^ static_cast<uint64_t>(member)) * 0xbf58476d1ce4e5b9ull;
    hash ^= hash >> 29;
  }
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

void SleepMs(int ms) {
  const timespec pause = {0, ms * 1'000'000};
  nanosleep(&pause, nullptr);
}

// What messages call a rank of the job.
int NameIn(const Rendezvous::Offer& offer, int rank) {
  const auto at = std::find(offer.members.begin(), offer.members.end(), rank) - offer.members.begin();
  return static_cast<size_t>(at) < offer.names.size() ? offer.names[static_cast<size_t>(at)] : rank;
}

// A rank that gives up while it joins leaves the reason in its arena, as it does later: it is not the cause that others look for. One that
// gives up since its process ends has none; the others see that it ends.
void TellFailure(const Arena& own, const Status& status, const std::string& operation) {
  if (status.code() == Code::kAborted) return;
  AbortRecord& record = reinterpret_cast<ControlPage*>(own.data())->abort;
  record.code = static_cast<int32_t>(status.code());
  record.subject = -1;
  for (const auto& [key, value] : status.texts()) {
    if (std::strcmp(key, "lateRanks") == 0) record.subject = std::atoi(value.c_str());  // the first of them
    if (std::strcmp(key, "host") == 0) std::snprintf(record.host, sizeof record.host, "%s", value.c_str());
  }
  for (const auto& [key, value] : status.numbers()) {
    const bool is_subject = std::strcmp(key, status.code() == Code::kMismatch ? "peer" : "rank") == 0;
    if (is_subject && status.code() != Code::kTimeout) record.subject = static_cast<int>(value);
    if (std::strcmp(key, "pid") == 0) record.pid = static_cast<int64_t>(value);
  }
  std::snprintf(record.operation, sizeof record.operation, "%s", operation.c_str());
  std::snprintf(record.text, sizeof record.text, "%s", status.message().c_str());
  record.state.store(1, std::memory_order_seq_cst);
}

// Whether the owner of a group's arena closed or failed the group.
bool HasLeft(const UniqueFd& arena) {
  Arena head;
  if (!Arena::ReceiveHead(arena, kPageBytes, &head).ok()) return false;
  const ControlPage& control = *reinterpret_cast<const ControlPage*>(head.data());
  return control.left.load(std::memory_order_acquire) != 0 || control.abort.state.load(std::memory_order_acquire) != 0;
}

// Why the owner of a group's arena gave up joining it, as a failure here. `owner`: what messages call it.
Status ReadFailure(const UniqueFd& arena, int owner) {
  Arena head;
  if (!Arena::ReceiveHead(arena, kPageBytes, &head).ok()) return Status::Ok();
  const ControlPage& control = *reinterpret_cast<const ControlPage*>(head.data());
  const AbortRecord& record = control.abort;
  // One that broke the group later had joined it, as this rank still can.
  if (record.state.load(std::memory_order_acquire) == 0 || control.start_ns.load(std::memory_order_relaxed) != 0) return Status::Ok();
  return ToStatus(record, owner);
}

void Append(std::string* list, const std::string& item) {
  if (!list->empty()) *list += ",";
  *list += item;
}

}  // namespace

bool IsSameUser(int socket, pid_t* pid) {
  ucred credentials = {};
  socklen_t size = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return false;
  *pid = credentials.pid;
  return credentials.uid == geteuid();
}

// Closed groups that are known as such; of older ones no message is on its way any more.
constexpr size_t kMostForgotten = 4096;
// Descriptors that one message carries at most.
constexpr size_t kMostDescriptors = 2;

UniqueFd ConnectRankSocket(const std::string& nonce, int rank, pid_t* pid, bool* is_stranger) {
  UniqueFd connection(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!connection) return connection;
  sockaddr_un address;
  const socklen_t size = NameOf(nonce, rank, &address);
  if (connect(connection.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) return {};
  *is_stranger = !IsSameUser(connection.get(), pid);
  return connection;
}

ssize_t SendDescriptors(int socket, const void* data, size_t nbytes, const int* fds, size_t count) {
  iovec part = {const_cast<void*>(data), nbytes};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(count * sizeof(int));
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(count * sizeof(int));
  std::memcpy(CMSG_DATA(header), fds, count * sizeof(int));
  return sendmsg(socket, &message, MSG_NOSIGNAL);
}

ssize_t ReceiveDescriptors(int socket, void* data, size_t nbytes, UniqueFd* fds, size_t count) {
  iovec part = {data, nbytes};
  int received[kMostDescriptors] = {-1, -1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof received)] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t length = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (length < 0) return length;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t come = std::min<size_t>((header->cmsg_len - CMSG_LEN(0)) / sizeof(int), kMostDescriptors);
    std::memcpy(received, CMSG_DATA(header), come * sizeof(int));
  }
  // What was not asked for is closed again.
  for (size_t i = 0; i < kMostDescriptors; i++) {
    UniqueFd owned(received[i]);
    if (i < count) fds[i] = std::move(owned);
  }
  return length;
}

Status BindRankSocket(const std::string& nonce, int rank, UniqueFd* fd) {
  if (!IsNonce(nonce)) return Status(Code::kInvalidArgument, "a job's nonce is 32 hexadecimal digits in lower case");
  if (rank < 0) return Status(Code::kInvalidArgument, "rank " + std::to_string(rank) + " is negative");
  UniqueFd made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made) return IoError("socket failed", errno);
  sockaddr_un address;
  const socklen_t size = NameOf(nonce, rank, &address);
  if (bind(made.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    if (errno == EADDRINUSE) {
      return Status(Code::kMismatch, "rank " + std::to_string(rank) + " of this job is running already: two processes were given RANK=" +
                                         std::to_string(rank))
          .Number("rank", rank);
    }
    return IoError("binding the socket of rank " + std::to_string(rank) + " failed", errno);
  }
  if (listen(made.get(), SOMAXCONN) != 0) return IoError("listen failed", errno);
  fd->Swap(made);
  return Status::Ok();
}

Status Rendezvous::Create(const Config& config, std::shared_ptr<Rendezvous>* rendezvous) {
  if (!IsNonce(config.nonce)) return Status(Code::kInvalidArgument, "a job's nonce is 32 hexadecimal digits in lower case");
  if (config.rank < 0 || config.rank >= config.world_size) {
    return Status(Code::kInvalidArgument, "rank " + std::to_string(config.rank) + " is not below the world size " + std::to_string(config.world_size));
  }
  std::shared_ptr<Rendezvous> made(new Rendezvous(config));
  if (config.socket_fd < 0) {
    if (Status s = BindRankSocket(config.nonce, config.rank, &made->socket_); !s.ok()) return s;
  } else {
    // Inherited: it must be the very socket of this rank, or the launcher and this process disagree.
    sockaddr_un expected, actual = {};
    const socklen_t expected_size = NameOf(config.nonce, config.rank, &expected);
    socklen_t size = sizeof actual;
    if (getsockname(config.socket_fd, reinterpret_cast<sockaddr*>(&actual), &size) != 0 || size != expected_size ||
        std::memcmp(&actual, &expected, size) != 0) {
      return Status(Code::kMismatch, "descriptor " + std::to_string(config.socket_fd) + " is not the socket of rank " +
                                         std::to_string(config.rank) + " of this job: was it inherited through a process that is not a rank?")
          .Number("rank", config.rank);
    }
    const int own = fcntl(config.socket_fd, F_DUPFD_CLOEXEC, 3);
    if (own < 0) return IoError("duplicating the rank's socket failed", errno);
    made->socket_ = UniqueFd(own);
    fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK);
    fcntl(config.socket_fd, F_SETFD, FD_CLOEXEC);
  }
  *rendezvous = std::move(made);
  return Status::Ok();
}

// The other members, the next higher rank first, so that not all turn to rank 0 at once.
std::vector<int> Rendezvous::PeersOf(const Offer& offer) const {
  std::vector<int> peers;
  for (int step = 1; step < config_.world_size; step++) {
    const int peer = (config_.rank + step) % config_.world_size;
    if (offer.members.empty() || std::find(offer.members.begin(), offer.members.end(), peer) != offer.members.end()) peers.push_back(peer);
  }
  return peers;
}

Status Rendezvous::TimedOut(const Offer& offer, const Deadline& deadline, const std::string& late, const std::string& details) const {
  return Status(Code::kTimeout, offer.operation + ": rank " + late + " of " + std::to_string(PeersOf(offer).size() + 1) + " did not come within " +
                                    std::to_string(deadline.timeout_ms()) + " ms" + details)
      .Number("rank", NameIn(offer, config_.rank))
      .Text("lateRanks", late)
      .Number("elapsedMs", static_cast<double>(deadline.ElapsedNs(NowNs())) / 1e6)
      .Text("operation", offer.operation);
}

Status Rendezvous::Send(const Offer& offer, int arena_fd, const Deadline& deadline, const std::atomic<bool>& is_cancelled) {
  UniqueFd own_pidfd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  if (!own_pidfd) {
    if (errno == ENOSYS) return Status(Code::kUnsupported, "this kernel has no pidfd_open: Linux 5.3 or later is needed");
    return IoError("pidfd_open failed", errno);
  }
  deadline.ElapsedNs(NowNs());
  std::vector<int> waiting = PeersOf(offer);
  // One pass over all that are not reached yet, so that one rank that is late does not keep this one from the others.
  while (!waiting.empty()) {
    std::vector<int> still;
    for (int peer : waiting) {
      Status s = SendTo(peer, offer, arena_fd, own_pidfd.get());
      if (s.code() == Code::kBusy) {
        still.push_back(peer);
      } else if (!s.ok()) {
        return s;
      }
    }
    waiting.swap(still);
    if (waiting.empty()) break;
    if (is_cancelled.load()) return Cancelled(offer.operation);
    if (deadline.IsOver(NowNs())) {
      std::string late;
      for (int peer : waiting) Append(&late, std::to_string(NameIn(offer, peer)));
      return TimedOut(offer, deadline, late, "");
    }
    {
      std::lock_guard lock(mutex_);
      if (!failure_.ok()) return failure_;
      Pump(0);
      if (offer.arena == 0) {
        if (Status s = CheckArrived(offer); !s.ok()) return s;
      }
    }
    SleepMs(1);
  }
  return Status::Ok();
}

// kBusy: the peer's socket does not stand yet, or its queue is full.
Status Rendezvous::SendTo(int peer, const Offer& offer, int arena_fd, int own_pidfd) {
  pid_t pid;
  bool is_stranger = false;
  UniqueFd connection = ConnectRankSocket(config_.nonce, peer, &pid, &is_stranger);
  if (!connection) {
    if (errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR || errno == ENOENT) return Status(Code::kBusy, "");
    return IoError("connecting to rank " + std::to_string(peer) + " failed", errno);
  }
  if (is_stranger) {
    return Status(Code::kMismatch, "the socket of rank " + std::to_string(peer) + " belongs to another user; nothing was sent to it").Number("peer", peer);
  }
  Hello hello = {};
  hello.magic = kMagic;
  hello.version = kProtocolVersion;
  std::memcpy(hello.nonce, config_.nonce.data(), kNonceDigits);
  hello.rank = config_.rank;
  hello.world_size = config_.world_size;
  hello.group = offer.group;
  hello.arena = offer.arena;
  hello.nbytes = offer.nbytes;
  sched_getaffinity(0, sizeof hello.cpus, &hello.cpus);
  if (offer.terms.size() >= sizeof hello.terms) return Status(Code::kInternal, "the terms of a group are too long: " + offer.terms);
  std::memcpy(hello.terms, offer.terms.data(), offer.terms.size());

  const int fds[2] = {arena_fd, own_pidfd};
  if (SendDescriptors(connection.get(), &hello, sizeof hello, fds, 2) == static_cast<ssize_t>(sizeof hello)) return Status::Ok();
  // The peer may end, or its listener be replaced, between connect and here: the deadline or the watch decides.
  if (errno == EPIPE || errno == ECONNRESET || errno == EAGAIN || errno == EINTR || errno == ETOOMANYREFS) return Status(Code::kBusy, "");
  return IoError("sending shared memory to rank " + std::to_string(peer) + " failed", errno);
}

void Rendezvous::Forget(uint64_t group) {
  {
    std::lock_guard lock(forgotten_mutex_);
    if (!forgotten_.insert(group).second) return;
    forgotten_order_.push_back(group);
    leaving_.push_back(group);
    if (forgotten_order_.size() > kMostForgotten) {
      forgotten_.erase(forgotten_order_.front());
      forgotten_order_.pop_front();
    }
  }
  // Whoever holds the lock may be waiting for ranks of another group: the next Pump does it.
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock.owns_lock()) LetGo();
}

// With mutex_ held.
void Rendezvous::LetGo() {
  std::vector<uint64_t> leaving;
  {
    std::lock_guard lock(forgotten_mutex_);
    leaving.swap(leaving_);
  }
  for (uint64_t group : leaving) arrived_.erase(arrived_.lower_bound({group, 0}), arrived_.lower_bound({group + 1, 0}));
}

// With mutex_ held: accepts and reads whatever stands, waiting at most timeout_ms for the first.
void Rendezvous::Pump(int timeout_ms) {
  LetGo();
  std::vector<pollfd> watched = {{socket_.get(), POLLIN, 0}};
  for (const UniqueFd& connection : connections_) watched.push_back({connection.get(), POLLIN, 0});
  if (poll(watched.data(), watched.size(), timeout_ms) <= 0) return;
  std::vector<UniqueFd> silent;
  for (size_t i = 1; i < watched.size(); i++) {
    UniqueFd& connection = connections_[i - 1];
    if (watched[i].revents != 0) {
      TakeMessage(connection.get());
    } else {
      silent.push_back(std::move(connection));
    }
  }
  connections_.swap(silent);
  while (true) {
    UniqueFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!connection) break;
    pid_t pid;
    // A process of this user that connects and says nothing costs a descriptor until the group stands; not more than these.
    if (!IsSameUser(connection.get(), &pid) || connections_.size() > 4096) {
      strangers_++;
      continue;
    }
    pollfd look = {connection.get(), POLLIN, 0};
    if (poll(&look, 1, 0) > 0) {
      TakeMessage(connection.get());
    } else {
      connections_.push_back(std::move(connection));
    }
  }
}

void Rendezvous::TakeMessage(int connection) {
  Hello hello;
  UniqueFd fds[2];
  const ssize_t length = ReceiveDescriptors(connection, &hello, sizeof hello, fds, 2);
  Answer answer;
  answer.arena = std::move(fds[0]);
  answer.pidfd = std::move(fds[1]);
  if (!IsSameUser(connection, &answer.pid) || length < static_cast<ssize_t>(offsetof(Hello, rank)) || hello.magic != kMagic ||
      std::memcmp(hello.nonce, config_.nonce.data(), kNonceDigits) != 0) {
    strangers_++;
    return;
  }
  if (!failure_.ok()) return;
  if (hello.version != kProtocolVersion || length != static_cast<ssize_t>(sizeof hello)) {
    failure_ = Status(Code::kMismatch, "a rank of this job (pid " + std::to_string(answer.pid) + ") speaks version " + std::to_string(hello.version) +
                                           " of the shared-memory protocol, rank " + std::to_string(config_.rank) + " speaks version " +
                                           std::to_string(kProtocolVersion) + ": all ranks must run the same release");
    return;
  }
  if (hello.world_size != config_.world_size || hello.rank < 0 || hello.rank >= config_.world_size) {
    failure_ = Status(Code::kMismatch, "rank " + std::to_string(hello.rank) + " (pid " + std::to_string(answer.pid) + ") counts " +
                                           std::to_string(hello.world_size) + " ranks, rank " + std::to_string(config_.rank) + " counts " +
                                           std::to_string(config_.world_size))
                   .Number("rank", config_.rank)
                   .Number("peer", hello.rank);
    return;
  }
  {
    std::lock_guard lock(forgotten_mutex_);
    if (forgotten_.count(hello.group) != 0) return;
  }
  std::vector<std::optional<Answer>>& arrived = arrived_[{hello.group, hello.arena}];
  arrived.resize(static_cast<size_t>(config_.world_size));
  std::optional<Answer>& place = arrived[static_cast<size_t>(hello.rank)];
  if (hello.rank == config_.rank || place.has_value()) {
    const std::string first = std::to_string(place.has_value() ? place->pid : getpid());
    failure_ = Status(Code::kMismatch, "two processes (pid " + first + " and pid " + std::to_string(answer.pid) + ") claim to be rank " +
                                           std::to_string(hello.rank) + " of this job")
                   .Number("rank", config_.rank)
                   .Number("peer", hello.rank);
    return;
  }
  hello.terms[sizeof hello.terms - 1] = '\0';
  answer.terms = std::string(hello.terms) + ", " + std::to_string(hello.nbytes) + " bytes";
  answer.cpus = hello.cpus;
  place = std::move(answer);
}

// With mutex_ held: why the group cannot come to stand any more, as far as is known here.
Status Rendezvous::CheckArrived(const Offer& offer) {
  std::vector<int> peers = PeersOf(offer);
  std::sort(peers.begin(), peers.end());
  std::vector<std::optional<Answer>>& arrived = arrived_[{offer.group, offer.arena}];
  arrived.resize(static_cast<size_t>(config_.world_size));
  const auto has_ended = [](int pidfd) {
    pollfd look = {pidfd, POLLIN, 0};
    return pidfd >= 0 && poll(&look, 1, 0) > 0;
  };
  std::string late;
  for (int peer : peers) {
    if (!arrived[static_cast<size_t>(peer)].has_value()) Append(&late, std::to_string(NameIn(offer, peer)));
  }
  for (int peer : peers) {
    const std::optional<Answer>& answer = arrived[static_cast<size_t>(peer)];
    const int name = NameIn(offer, peer);
    std::string text;
    if (answer.has_value()) {
      // One that gave up while it joined: its reason is everybody's, as the group needs all of them.
      if (Status s = ReadFailure(answer->arena, name); !s.ok()) return s;
      // A rank that has come may end while another is still missing: a loss, unless it closed the group first, as a rank does that was
      // through before this one.
      if (!has_ended(answer->pidfd.get()) || HasLeft(answer->arena)) continue;
      text = "ended while rank " + late + " had not come yet";
    } else {
      const auto at = std::find(offer.members.begin(), offer.members.end(), peer) - offer.members.begin();
      if (offer.pidfds.empty() || !has_ended(offer.pidfds[static_cast<size_t>(at)])) continue;
      Pump(0);  // what it sent before it ended still counts
      if (answer.has_value()) continue;
      text = "ended before it came";
    }
    const std::string pid = answer.has_value() ? " (pid " + std::to_string(answer->pid) + ")" : "";
    Status status = Status(Code::kPeerLost, offer.operation + ": rank " + std::to_string(name) + pid + " " + text)
                        .Number("rank", name)
                        .Number("reportedBy", NameIn(offer, config_.rank))
                        .Number("sequence", 0)
                        .Text("host", HostName())
                        .Text("operation", offer.operation);
    if (answer.has_value()) std::move(status).Number("pid", answer->pid);
    return status;
  }
  return Status::Ok();
}

Status Rendezvous::Collect(const Offer& offer, const Deadline& deadline, const std::atomic<bool>& is_cancelled, std::vector<Answer>* answers) {
  deadline.ElapsedNs(NowNs());
  std::vector<int> peers = PeersOf(offer);
  std::sort(peers.begin(), peers.end());
  const std::string terms = offer.terms + ", " + std::to_string(offer.nbytes) + " bytes";
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      std::vector<std::optional<Answer>>& arrived = arrived_[{offer.group, offer.arena}];
      arrived.resize(static_cast<size_t>(config_.world_size));
      std::string late;
      for (int peer : peers) {
        const std::optional<Answer>& answer = arrived[static_cast<size_t>(peer)];
        if (!answer.has_value()) {
          Append(&late, std::to_string(NameIn(offer, peer)));
          continue;
        }
        if (answer->terms != terms) {
          const int own = NameIn(offer, config_.rank), other = NameIn(offer, peer);
          return Status(Code::kMismatch, offer.operation + ": ranks disagree: rank " + std::to_string(own) + " has " + terms + "; rank " +
                                             std::to_string(other) + " has " + answer->terms)
              .Number("rank", own)
              .Number("peer", other)
              .Text("operation", offer.operation)
              .Text("mine", terms)
              .Text("theirs", answer->terms);
        }
      }
      if (late.empty()) {
        answers->clear();
        answers->resize(static_cast<size_t>(config_.world_size));
        for (int peer : peers) (*answers)[static_cast<size_t>(peer)] = std::move(*arrived[static_cast<size_t>(peer)]);
        arrived_.erase({offer.group, offer.arena});
        return Status::Ok();
      }
      if (!failure_.ok()) return failure_;
      // For further arenas the group's own watch finds losses: is_cancelled.
      if (offer.arena == 0) {
        if (Status s = CheckArrived(offer); !s.ok()) return s;
      }
      if (is_cancelled.load()) return Cancelled(offer.operation);
      if (deadline.IsOver(NowNs())) {
        const uint64_t strangers = strangers_.load();
        return TimedOut(offer, deadline, late, strangers == 0 ? "" : "; " + std::to_string(strangers) + " connections of strangers were refused");
      }
      Pump(kPumpMs);
    }
    sched_yield();  // lets another group's waiter have the mutex
  }
}

Status ConnectGroup(Rendezvous& rendezvous, uint64_t group, const GroupOptions& options, const Deadline& deadline,
                    const std::atomic<bool>& is_cancelled, std::unique_ptr<Communicator>* communicator, std::string* warning) {
  const Rendezvous::Config& job = rendezvous.config();
  std::vector<int> members = options.members;
  for (int rank = 0; options.members.empty() && rank < job.world_size; rank++) members.push_back(rank);
  const size_t size = members.size();
  const auto own = static_cast<size_t>(std::find(members.begin(), members.end(), job.rank) - members.begin());
  if (own == size) return Status(Code::kInternal, "rank " + std::to_string(job.rank) + " is no member of the group that it connects");
  CommConfig config;
  config.rank = static_cast<int>(own);
  config.world_size = static_cast<int>(size);
  config.lanes = options.lanes;
  config.slot_bytes = options.slot_bytes;
  config.names = options.names.empty() ? options.members : options.names;
  Rendezvous::Offer offer;
  offer.group = group;
  offer.members = members;
  offer.names = config.names;
  offer.pidfds = options.pidfds;
  offer.nbytes = Communicator::ArenaBytes(config);
  offer.terms = std::to_string(options.lanes) + " lanes, slots of " + std::to_string(options.slot_bytes) + " bytes";
  if (!options.terms.empty()) offer.terms += ", " + options.terms;
  const bool is_whole = size == static_cast<size_t>(job.world_size) && std::is_sorted(members.begin(), members.end());
  if (!is_whole) offer.terms += ", members " + DigestOf(members);
  offer.operation = options.operation;

  std::vector<Arena> arenas(size);
  std::vector<PeerProcess> peers(size);
  cpu_set_t all;
  {
    UniqueFd fd;
    const ArenaOptions arena = {offer.nbytes, "the communicator of rank " + std::to_string(job.rank), options.nodes};
    if (Status s = Arena::Create(arena, &arenas[own], &fd, warning); !s.ok()) return s;
    OfferToArchive(job.nonce, job.rank, group, fd.get());
    Status s = rendezvous.Send(offer, fd.get(), deadline, is_cancelled);
    if (!s.ok()) {
      TellFailure(arenas[own], s, offer.operation);
      return s;
    }
  }
  std::vector<Rendezvous::Answer> answers;
  if (Status s = rendezvous.Collect(offer, deadline, is_cancelled, &answers); !s.ok()) {
    TellFailure(arenas[own], s, offer.operation);
    return s;
  }
  sched_getaffinity(0, sizeof all, &all);
  bool has_cores = CPU_COUNT(&all) >= options.lanes;
  for (size_t index = 0; index < size; index++) {
    if (index == own) continue;
    Rendezvous::Answer& answer = answers[static_cast<size_t>(members[index])];
    Status s = Arena::Receive(answer.arena, offer.nbytes, "the communicator of rank " + std::to_string(members[index]), &arenas[index]);
    if (!s.ok()) return s;
    peers[index] = {answer.pid, std::move(answer.pidfd)};
    has_cores &= CPU_COUNT(&answer.cpus) >= options.lanes;
    CPU_OR(&all, &all, &answer.cpus);
  }
  // Spinning for somebody who waits for the same core only delays him.
  has_cores &= CPU_COUNT(&all) >= options.lanes * static_cast<int>(size);
  config.spin_us = options.spin_us >= 0 ? options.spin_us : has_cores ? -1 : 0;
  return Communicator::Create(config, std::move(arenas), std::move(peers), communicator);
}

Status CreateSoloGroup(const GroupOptions& options, std::unique_ptr<Communicator>* communicator) {
  CommConfig config;
  config.lanes = options.lanes;
  config.slot_bytes = options.slot_bytes;
  config.spin_us = options.spin_us;
  std::vector<Arena> arenas(1);
  if (Status s = Arena::CreateLocal(Communicator::ArenaBytes(config), &arenas[0]); !s.ok()) return s;
  return Communicator::Create(config, std::move(arenas), std::vector<PeerProcess>(1), communicator);
}

}  // namespace tilerank
