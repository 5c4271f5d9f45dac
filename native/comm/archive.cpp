#include "comm/archive.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "comm/rendezvous.h"

namespace tilerank {

namespace {

// No rank has this number: the name of the archive's socket.
constexpr int kArchiveRank = 1 << 20;
constexpr uint32_t kMagic = 0x544c5241;
// Far above what a job has at a time; a process of this user that offers more is not served.
constexpr size_t kMostArenas = 4096;
constexpr int kMessageWaitMs = 100;

struct Offer {
  uint32_t magic, version;
  int32_t rank;
  uint64_t group;
};

}  // namespace

void OfferToArchive(const std::string& nonce, int rank, uint64_t group, int arena_fd) {
  pid_t pid;
  bool is_stranger = false;
  const UniqueFd connection = ConnectRankSocket(nonce, kArchiveRank, &pid, &is_stranger);
  if (!connection || is_stranger) return;
  const Offer offer = {kMagic, kProtocolVersion, rank, group};
  (void)SendDescriptors(connection.get(), &offer, sizeof offer, &arena_fd, 1);
}

Status Archive::Open(const std::string& nonce, int world_size, std::unique_ptr<Archive>* archive) {
  std::unique_ptr<Archive> made(new Archive(nonce, world_size));
  if (Status s = BindRankSocket(nonce, kArchiveRank, &made->socket_); !s.ok()) return s;
  made->stop_ = UniqueFd(eventfd(0, EFD_CLOEXEC));
  if (!made->stop_) return Status(Code::kIo, std::string("eventfd failed: ") + std::strerror(errno));
  made->thread_ = std::thread([self = made.get()] { self->Main(); });
  *archive = std::move(made);
  return Status::Ok();
}

Archive::~Archive() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  while (write(stop_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
  thread_.join();
}

void Archive::Main() {
  pollfd watched[] = {{stop_.get(), POLLIN, 0}, {socket_.get(), POLLIN, 0}};
  for (;;) {
    if (poll(watched, 2, -1) < 0 && errno != EINTR) return;
    if (watched[0].revents != 0) return;
    if (watched[1].revents == 0) continue;
    const UniqueFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (connection) Take(connection.get());
  }
}

void Archive::Take(int connection) {
  pid_t pid;
  if (!IsSameUser(connection, &pid)) return;
  pollfd message = {connection, POLLIN, 0};
  if (poll(&message, 1, kMessageWaitMs) <= 0) return;
  Offer offer = {};
  UniqueFd fd;
  if (ReceiveDescriptors(connection, &offer, sizeof offer, &fd, 1) != static_cast<ssize_t>(sizeof offer)) return;
  if (offer.magic != kMagic || offer.version != kProtocolVersion || offer.rank < 0 || offer.rank >= world_size_) return;
  Arena arena;
  if (!Arena::ReceiveHead(fd, kRecorderOffset + kRecorderBytes, &arena).ok()) return;
  std::lock_guard lock(mutex_);
  Prune();
  if (kept_.size() < kMostArenas) kept_.push_back({offer.rank, offer.group, pid, std::move(arena)});
}

// With mutex_ held: lets go of groups that every rank has closed in order.
void Archive::Prune() {
  const auto has_left = [](const Kept& kept) {
    return reinterpret_cast<const ControlPage*>(kept.arena.data())->left.load(std::memory_order_acquire) != 0;
  };
  std::vector<uint64_t> live;
  for (const Kept& kept : kept_) {
    if (!has_left(kept)) live.push_back(kept.group);
  }
  std::erase_if(kept_, [&](const Kept& kept) { return std::find(live.begin(), live.end(), kept.group) == live.end(); });
}

std::vector<RankRecording> Archive::Read(size_t limit) {
  std::lock_guard lock(mutex_);
  Prune();
  std::vector<RankRecording> all;
  for (const Kept& kept : kept_) all.push_back({kept.rank, kept.group, kept.pid, ReadRecorder(kept.arena.data(), limit)});
  std::sort(all.begin(), all.end(), [](const RankRecording& a, const RankRecording& b) {
    return a.group != b.group ? a.group < b.group : a.rank < b.rank;
  });
  return all;
}

}  // namespace tilerank
