#include "comm/mpi_courier.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "comm/sync.h"

namespace tilerank {

namespace {

// How often the thread looks: while something is unsent, twice as long each time, and when all is quiet.
constexpr int64_t kHurryNs = 100'000, kMostHurryNs = 2'000'000, kQuietNs = 20'000'000;
// A rank that has all it waits for looks so long after what it sent itself, before the thread does.
constexpr int64_t kSettleNs = 200'000;
// A wait looks so long without a pause, handing its core over in between, and then with pauses that grow.
constexpr int64_t kLookNs = 1'000'000, kLeastNapNs = 20'000, kMostNapNs = 500'000;
// For what was sent, and for receives that were cancelled, when a group is closed.
constexpr int64_t kFlushNs = 500'000'000, kCancelNs = 500'000'000;

class WorldLock {
 public:
  explicit WorldLock(const MpiWorld& world) : world_(world) { world_.lock(); }
  ~WorldLock() { world_.unlock(); }
  WorldLock(const WorldLock&) = delete;
  WorldLock& operator=(const WorldLock&) = delete;

 private:
  const MpiWorld& world_;
};

std::string Explain(const MpiWorld& world, int error) {
  char text[512] = "";
  world.explain(error, text, sizeof text);
  return text;
}

/// Lets the MPI work until these have ended; false: not all of them within the time.
bool EndAll(const MpiWorld& world, std::vector<MpiRequest>* requests, int64_t for_ns) {
  std::vector<MpiDone> done(requests->size());
  const int64_t end = NowNs() + for_ns;
  for (;;) {
    {
      WorldLock lock(world);
      size_t ended;
      if (world.test(requests->data(), requests->size(), done.data(), &ended) != 0) return false;
    }
    if (std::all_of(requests->begin(), requests->end(), [&](const MpiRequest& one) { return one.bits == world.none.bits; })) return true;
    if (NowNs() > end) return false;
    usleep(100);
  }
}

}  // namespace

MpiCourier::MpiCourier(const MpiWorld& world, std::shared_ptr<Mailbox> mailbox, int tag, std::vector<std::pair<int, std::string>> peers)
    : world_(world), mailbox_(std::move(mailbox)), tag_(tag), peers_(peers.size()), peer_of_(static_cast<size_t>(world.size)),
      fronts_(peers.size() * 2, world.none), done_(peers.size() * 2) {
  for (size_t i = 0; i < peers.size(); i++) {
    peers_[i].rank = peers[i].first;
    peers_[i].host = std::move(peers[i].second);
    peer_of_[static_cast<size_t>(peers[i].first)] = &peers_[i];
  }
}

std::shared_ptr<MpiCourier> MpiCourier::Start(const MpiWorld& world, std::shared_ptr<Mailbox> mailbox, int tag, std::vector<std::pair<int, std::string>> peers) {
  std::shared_ptr<MpiCourier> courier(new MpiCourier(world, std::move(mailbox), tag, std::move(peers)));
  {
    WorldLock lock(world);
    for (Peer& peer : courier->peers_) {
      while (!peer.is_lost && peer.receives.size() < kPosted) courier->Post(peer);
    }
  }
  courier->mailbox_->CarryBy(courier);
  courier->mailbox_->Serve([weak = std::weak_ptr(courier)] {
    const std::shared_ptr<MpiCourier> self = weak.lock();
    if (self == nullptr) return;
    WorldLock lock(self->world_);
    self->SendAll();
  });
  courier->thread_ = std::thread([raw = courier.get()] { raw->Run(); });
  return courier;
}

MpiCourier::~MpiCourier() { Close(); }

void MpiCourier::Post(Peer& peer) {
  if (free_.empty()) {
    mailbox_->TakeReleased(&released_);
    for (uint64_t keep : released_) free_.push_back(reinterpret_cast<std::byte*>(keep));
    released_.clear();
    std::lock_guard lock(arrivals_mutex_);
    free_.insert(free_.end(), refused_.begin(), refused_.end());
    refused_.clear();
  }
  if (free_.empty()) {
    // As many as frames may be under way, which the senders see to.
    const size_t nbytes = (kBeforeHeader + mailbox_->message_bytes() + 63) / 64 * 64;
    memory_.emplace_back(static_cast<std::byte*>(std::aligned_alloc(64, nbytes)));
    if (memory_.back() == nullptr) return Lose(peer, 0);
    free_.push_back(memory_.back().get());
  }
  Receive receive = {world_.none, free_.back()};
  free_.pop_back();
  if (int error = world_.receive(message(receive.buffer), mailbox_->message_bytes(), peer.rank, tag_, &receive.request); error != 0) {
    free_.push_back(receive.buffer);
    return Lose(peer, error);
  }
  peer.receives.push_back(receive);
  if (peer.receives.size() == 1) Front(peer, false) = receive.request;
}

void MpiCourier::Lose(Peer& peer, int error) {
  if (peer.is_lost) return;
  peer.is_lost = true;
  world_.give_up();
  Arrival arrival;
  arrival.lost = peer.rank;
  arrival.host = peer.host;
  arrival.why = error == 0 ? "there is no memory for what it sends" : "the MPI has lost the connection to it: " + Explain(world_, error);
  std::lock_guard lock(arrivals_mutex_);
  arrivals_.push_back(std::move(arrival));
}

void MpiCourier::SendAll() {
  Send send;
  while (mailbox_->Take(&send.outgoing)) {
    Peer* peer = peer_of_[static_cast<size_t>(send.outgoing.peer)];
    const Mailbox::Outgoing& outgoing = send.outgoing;
    const std::byte* data = outgoing.ring != nullptr ? outgoing.ring->data + outgoing.begin : outgoing.bytes.data();
    if (peer == nullptr || peer->is_lost) continue;
    if (int error = world_.send(data, outgoing.nbytes, peer->rank, tag_, &send.request); error != 0) {
      Lose(*peer, error);
      continue;
    }
    unsent_.fetch_add(1);
    peer->sends.push_back(std::move(send));
    if (peer->sends.size() == 1) Front(*peer, true) = peer->sends.front().request;
    send = Send();
  }
}

// Once: who waits for more comes again, and a look that finds nothing costs the MPI a system call.
void MpiCourier::TestAll() {
  size_t ended;
  if (int error = world_.test(fronts_.data(), fronts_.size(), done_.data(), &ended); error != 0) {
    for (Peer& peer : peers_) Lose(peer, error);
    return;
  }
  for (size_t i = 0; i < ended; i++) {
    const MpiDone& done = done_[i];
    Peer& peer = peers_[done.index / 2];
    if (done.index % 2 == 1) {
      mailbox_->Sent(peer.sends.front().outgoing);
      peer.sends.pop_front();
      unsent_.fetch_sub(1);
      Front(peer, true) = peer.sends.empty() ? world_.none : peer.sends.front().request;
    } else {
      std::byte* buffer = peer.receives.front().buffer;
      peer.receives.pop_front();
      Front(peer, false) = peer.receives.empty() ? world_.none : peer.receives.front().request;
      if (done.error == 0) {
        Arrival arrival;
        arrival.buffer = buffer;
        arrival.nbytes = done.nbytes;
        {
          std::lock_guard lock(arrivals_mutex_);
          arrivals_.push_back(std::move(arrival));
        }
        if (!peer.is_lost) Post(peer);
      } else {
        free_.push_back(buffer);
      }
    }
    if (done.error != 0) Lose(peer, done.error);
  }
}

// One thread at a time, so that messages stay in order. The mailbox may send while it takes one, and break groups.
void MpiCourier::Deliver() {
  std::unique_lock lock(arrivals_mutex_);
  if (is_delivering_) return;
  is_delivering_ = true;
  while (!arrivals_.empty()) {
    const Arrival arrival = std::move(arrivals_.front());
    arrivals_.pop_front();
    lock.unlock();
    bool is_kept = true;
    if (arrival.lost >= 0) mailbox_->Lost(arrival.lost, {arrival.host, 0, arrival.why});
    else is_kept = mailbox_->Deliver(message(arrival.buffer), arrival.nbytes, reinterpret_cast<uint64_t>(arrival.buffer));
    lock.lock();
    if (!is_kept) refused_.push_back(arrival.buffer);
  }
  is_delivering_ = false;
}

void MpiCourier::Progress() {
  if (world_.try_lock() != 0) {
    TestAll();
    world_.unlock();
  }
  Deliver();
}

void MpiCourier::Await(uint64_t seen, int64_t waited_ns, int64_t most_ns) {
  int64_t nap_ns = kLeastNapNs;
  const int64_t start = NowNs();
  for (int64_t time = start;; time = NowNs()) {
    Progress();
    if (mailbox_->HasArrived(seen) || time - start >= most_ns) return;
    if (waited_ns + time - start < kLookNs) {
      sched_yield();
    } else {
      mailbox_->SleepUntilArrival(seen, nap_ns);
      nap_ns = std::min(2 * nap_ns, kMostNapNs);
    }
  }
}

void MpiCourier::Settle() {
  if (unsent_.load() == 0) return;
  for (const int64_t end = NowNs() + kSettleNs; NowNs() < end;) {
    Progress();
    if (unsent_.load() == 0) return;
    sched_yield();
  }
  {
    std::lock_guard lock(thread_mutex_);
    is_hurried_ = true;
  }
  thread_wake_.notify_one();
}

void MpiCourier::Run() {
  int64_t pause_ns = kQuietNs;
  std::unique_lock lock(thread_mutex_);
  while (!is_stopping_) {
    thread_wake_.wait_for(lock, std::chrono::nanoseconds(pause_ns), [&] { return is_stopping_ || is_hurried_; });
    pause_ns = is_hurried_ ? kHurryNs : std::min(pause_ns * 2, kMostHurryNs);
    is_hurried_ = false;
    lock.unlock();
    Progress();
    lock.lock();
    if (unsent_.load() == 0) pause_ns = kQuietNs;
  }
}

void MpiCourier::Close() {
  {
    std::lock_guard lock(thread_mutex_);
    if (is_stopping_) return;
    is_stopping_ = true;
  }
  thread_wake_.notify_one();
  thread_.join();
  mailbox_->Stop();
  {
    WorldLock lock(world_);
    SendAll();
  }
  for (const int64_t end = NowNs() + kFlushNs; unsent_.load() > 0 && NowNs() < end; usleep(50)) Progress();
  mailbox_->CarryBy(nullptr);
  std::vector<MpiRequest> requests;
  {
    WorldLock lock(world_);
    for (Peer& peer : peers_) {
      for (Receive& receive : peer.receives) {
        world_.cancel(&receive.request);
        requests.push_back(receive.request);
      }
      for (Send& send : peer.sends) requests.push_back(send.request);
    }
  }
  if (requests.empty() || EndAll(world_, &requests, unsent_.load() > 0 ? 0 : kCancelNs)) return;
  // The MPI still has this memory, as a peer has not taken what was sent: it stays for the rest of the process.
  new std::pair(std::move(peers_), std::move(memory_));
}

Status ExchangeCards(const MpiWorld& world, int tag, const std::string& card, const Deadline& deadline, std::vector<std::optional<std::string>>* cards) {
  const auto size = static_cast<size_t>(world.size);
  struct Exchange {
    std::string card;
    std::vector<std::byte> room;
    std::vector<MpiRequest> requests;  // [size] receives, [size] sends
  };
  auto exchange = std::make_unique<Exchange>();
  exchange->card = card;
  exchange->room.resize(size * kMaxCardBytes);
  exchange->requests.resize(2 * size, world.none);
  cards->assign(size, std::nullopt);
  (*cards)[static_cast<size_t>(world.rank)] = card;
  std::vector<MpiRequest>& requests = exchange->requests;
  std::vector<MpiDone> done(2 * size);
  std::string problem;
  {
    WorldLock lock(world);
    for (int peer = 0; peer < world.size; peer++) {
      if (peer == world.rank) continue;
      const auto at = static_cast<size_t>(peer);
      int error = world.receive(exchange->room.data() + at * kMaxCardBytes, kMaxCardBytes, peer, tag, &requests[at]);
      if (error == 0) error = world.send(exchange->card.data(), exchange->card.size(), peer, tag, &requests[size + at]);
      if (error != 0 && problem.empty()) problem = "rank " + std::to_string(peer) + ": " + Explain(world, error);
    }
  }
  const auto is_open = [&](const MpiRequest& request) { return request.bits != world.none.bits; };
  while (problem.empty() && std::any_of(requests.begin(), requests.end(), is_open) && !deadline.IsOver(NowNs())) {
    {
      WorldLock lock(world);
      size_t ended = 0;
      if (int error = world.test(requests.data(), requests.size(), done.data(), &ended); error != 0) problem = Explain(world, error);
      for (size_t i = 0; i < ended; i++) {
        const MpiDone& one = done[i];
        if (one.error != 0) problem = "rank " + std::to_string(one.index % size) + ": " + Explain(world, one.error);
        else if (one.index < size) (*cards)[one.index] = std::string(reinterpret_cast<const char*>(exchange->room.data()) + one.index * kMaxCardBytes, one.nbytes);
      }
    }
    usleep(200);
  }
  if (std::any_of(requests.begin(), requests.end(), is_open)) {
    {
      WorldLock lock(world);
      for (size_t i = 0; i < size; i++) {
        if (is_open(requests[i])) world.cancel(&requests[i]);
      }
    }
    if (!EndAll(world, &requests, kCancelNs)) exchange.release();  // the MPI still has its memory
  }
  return problem.empty() ? Status::Ok() : Status(Code::kIo, "the MPI failed: " + problem);
}

}  // namespace tilerank
