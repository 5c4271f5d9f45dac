#include "comm/mailbox.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm/communicator.h"

namespace tilerank {

namespace {

constexpr uint32_t kMagic = 0x464b5254;
constexpr uint16_t kVersion = 1;
enum Kind : uint16_t { kData = 1, kTaken = 2, kFailure = 3, kLeave = 4, kProbe = 5, kGoodbye = 6, kGoodbyeSeen = 7, kShown = 8, kHeldUp = 9 };

// Streams that peers may speak on before this rank has opened them: a split's members do not come back from it at one time.
constexpr size_t kEarlyStreams = 64;
// A wait that lasts asks the peer what it is doing: ranks that called different operations may each wait for the other.
constexpr int64_t kProbeAfterNs = 30'000'000, kProbeEveryNs = 100'000'000;
// The answer says whom the peer waits for itself. Of one that stands still none comes any more.
constexpr int64_t kAnswerNs = 3 * kProbeEveryNs;

uint32_t CheckOf(const FrameHeader& header) {
  uint64_t words[10] = {};
  static_assert(offsetof(FrameHeader, check) <= sizeof words);
  std::memcpy(words, &header, offsetof(FrameHeader, check));
  uint64_t hash = 0x9e3779b97f4a7c15ull;
  for (uint64_t word : words) {
    hash = (hash ^ word) * 0xbf58476d1ce4e5b9ull;
    hash ^= hash >> 29;
  }
  return static_cast<uint32_t>(hash >> 32);
}

Code CodeOf(int32_t code) {
  switch (static_cast<Code>(code)) {
    case Code::kTimeout:
    case Code::kPeerLost:
    case Code::kMismatch:
    case Code::kNoMemory:
    case Code::kIo: return static_cast<Code>(code);
    default: return Code::kAborted;
  }
}

template <size_t N>
std::string TextOf(const char (&text)[N]) {
  return std::string(text, strnlen(text, N));
}

const char* OperationOf(const std::string& name) {
  for (int op = 1; op < 32; op++) {
    const char* known = NameOf(static_cast<CollectiveOp>(op));
    if (name == known) return known;
  }
  return "none";
}

}  // namespace

Mailbox::Ring::~Ring() {
  if (data != nullptr) munmap(data, nbytes);
}

Status Mailbox::Open(uint64_t id, std::vector<int> members, int rank, OnFailure on_failure, std::shared_ptr<Stream>* opened) {
  std::shared_ptr<Stream> stream(new Stream(shared_from_this(), id, std::move(members), rank, std::move(on_failure)));
  std::vector<std::pair<int, Loss>> lost;
  // What came early goes first: until nothing is left of it, newer frames join it.
  for (;;) {
    std::vector<Early> early;
    {
      std::lock_guard lock(mutex_);
      if (const auto known = streams_.find(id); known != streams_.end() && !known->second.expired()) {
        return Status(Code::kInternal, "stream " + std::to_string(id) + " of the network is open already");
      }
      if (const auto found = early_.find(id); found != early_.end()) {
        early = std::move(found->second);
        early_.erase(found);
      } else {
        streams_[id] = stream;
        lost.assign(lost_.begin(), lost_.end());
        break;
      }
    }
    for (const Early& one : early) {
      if (DeliverTo(stream, one.header, one.payload, one.keep)) continue;
      std::lock_guard lock(mutex_);
      released_.push_back(one.keep);
    }
  }
  *opened = std::move(stream);
  for (const auto& [peer, loss] : lost) Lost(peer, loss);
  return Status::Ok();
}

void Mailbox::CarryBy(std::shared_ptr<Carrier> carrier) {
  std::lock_guard lock(mutex_);
  carrier_.swap(carrier);
}

void Mailbox::Keep(std::shared_ptr<void> memory) {
  std::lock_guard lock(mutex_);
  memory_ = std::move(memory);
}

std::shared_ptr<Mailbox::Carrier> Mailbox::carrier() {
  std::lock_guard lock(mutex_);
  return carrier_;
}

void Mailbox::Sent(const Outgoing& outgoing) {
  if (outgoing.ring == nullptr) return;
  outgoing.ring->sent.fetch_add(1, std::memory_order_release);
  SignalArrival();
}

void Mailbox::Serve(std::function<void()> wake) {
  {
    std::lock_guard lock(mutex_);
    wake_ = std::move(wake);
    is_awake_ = wake_ != nullptr && !outgoing_.empty();
    if (!is_awake_) return;
  }
  Wake();
}

bool Mailbox::Enqueue(Outgoing outgoing) {
  outgoing_.push_back(std::move(outgoing));
  if (is_awake_ || wake_ == nullptr) return false;
  return is_awake_ = true;
}

void Mailbox::Wake() {
  std::function<void()> wake;
  {
    std::lock_guard lock(mutex_);
    wake = wake_;
  }
  if (wake) wake();
}

bool Mailbox::Take(Outgoing* outgoing) {
  std::lock_guard lock(mutex_);
  if (outgoing_.empty()) {
    is_awake_ = false;
    return false;
  }
  *outgoing = std::move(outgoing_.front());
  outgoing_.pop_front();
  return true;
}

void Mailbox::TakeReleased(std::vector<uint64_t>* keeps) {
  std::lock_guard lock(mutex_);
  keeps->swap(released_);
  released_.clear();
}

// Either the waiter sees the raised count of arrivals, or this sees the waiter: both are seq_cst.
void Mailbox::SignalArrival() {
  arrivals_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) FutexWakeAll(arrivals_);
}

void Mailbox::SleepUntilArrival(uint64_t seen, int64_t most_ns) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  if (!HasArrived(seen)) FutexWait(arrivals_, seen, most_ns);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void Mailbox::RouseAll() {
  SignalArrival();
  if (const std::shared_ptr<Carrier> carrying = carrier()) carrying->Rouse();
}

FrameHeader Mailbox::HeaderFor(uint16_t kind, uint64_t stream) const {
  FrameHeader header = {};
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = kind;
  header.job = config_.job;
  header.stream = stream;
  header.source = static_cast<uint32_t>(config_.rank);
  return header;
}

bool Mailbox::Deliver(const std::byte* message, size_t nbytes, uint64_t keep) {
  FrameHeader header;
  if (nbytes < sizeof header || nbytes > message_bytes()) return Refuse(), false;
  std::memcpy(&header, message, sizeof header);
  if (header.magic != kMagic || header.version != kVersion || header.job != config_.job || header.check != CheckOf(header) ||
      header.nbytes != nbytes - sizeof header || header.source >= static_cast<uint32_t>(config_.world_size) ||
      header.source == static_cast<uint32_t>(config_.rank) || header.kind < kData || header.kind > kHeldUp) {
    return Refuse(), false;
  }
  if (header.kind == kGoodbye || header.kind == kGoodbyeSeen) {
    const int peer = static_cast<int>(header.source);
    bool must_wake = false;
    {
      std::lock_guard lock(mutex_);
      if (header.kind == kGoodbyeSeen) parted_.insert(peer);
      else must_wake = Enqueue(Bare(kGoodbyeSeen, peer));
    }
    if (must_wake) Wake();
    return false;
  }
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard lock(mutex_);
    if (const auto found = streams_.find(header.stream); found != streams_.end()) {
      stream = found->second.lock();
      if (stream == nullptr) return false;  // closed here: whatever still comes is of no use
    } else {
      std::vector<Early>* early = nullptr;
      if (const auto known = early_.find(header.stream); known != early_.end()) early = &known->second;
      if (early == nullptr && early_.size() < kEarlyStreams) early = &early_[header.stream];
      const size_t most = static_cast<size_t>(config_.world_size) * static_cast<size_t>(config_.window + 8);
      if (early == nullptr || early->size() >= most) return Refuse(), false;
      early->push_back({header, message + sizeof header, keep});
      return true;
    }
  }
  return DeliverTo(stream, header, message + sizeof header, keep);
}

Mailbox::Outgoing Mailbox::Bare(uint16_t kind, int peer) const {
  FrameHeader header = HeaderFor(kind, 0);
  header.check = CheckOf(header);
  return Message(peer, header, nullptr);
}

Mailbox::Outgoing Mailbox::Message(int peer, const FrameHeader& header, const void* payload) {
  Outgoing outgoing;
  outgoing.peer = peer;
  outgoing.nbytes = sizeof header + header.nbytes;
  outgoing.bytes.resize(outgoing.nbytes);
  std::memcpy(outgoing.bytes.data(), &header, sizeof header);
  if (header.nbytes > 0) std::memcpy(outgoing.bytes.data() + sizeof header, payload, header.nbytes);
  return outgoing;
}

void Mailbox::SayGoodbye(int peer) {
  bool must_wake;
  {
    std::lock_guard lock(mutex_);
    must_wake = Enqueue(Bare(kGoodbye, peer));
  }
  if (must_wake) Wake();
}

bool Mailbox::HasParted(int peer) {
  std::lock_guard lock(mutex_);
  return parted_.contains(peer);
}

bool Mailbox::DeliverTo(const std::shared_ptr<Stream>& stream, const FrameHeader& header, const std::byte* payload, uint64_t keep) {
  const int rank = stream->MemberOf(static_cast<int>(header.source));
  if (rank < 0) return Refuse(), false;
  bool is_kept = false;
  Status failure;
  int culprit = rank;
  std::string operation;
  uint64_t sequence = header.operation;
  std::function<int()> held_up_by;
  {
    std::lock_guard lock(mutex_);
    Stream::Peer& peer = stream->peers_[static_cast<size_t>(rank)];
    if (header.taken > peer.taken && header.taken <= peer.posted) peer.taken = header.taken;
    switch (header.kind) {
      case kData: {
        const bool is_next = header.number == peer.received + 1 && peer.received - peer.released < static_cast<uint64_t>(config_.window);
        if (!is_next) {
          failure = Status(Code::kIo, "the network lost or repeated frames of rank " + std::to_string(rank) + ": number " + std::to_string(header.number) +
                                          " came where " + std::to_string(peer.received + 1) + " was due")
                        .Number("rank", rank);
          break;
        }
        peer.received++;
        peer.held_up_by = -1;
        FrameTag tag;
        tag.operation = header.operation;
        tag.tag = OpTag::FromBits(header.tag, header.count);
        tag.part = header.part;
        peer.incoming.push_back({tag, payload, header.nbytes, keep});
        is_kept = true;
        break;
      }
      case kTaken: break;
      case kLeave: peer.has_left = true; break;
      case kShown: peer.shown.assign(payload, payload + header.nbytes); break;
      case kProbe: {
        const FrameTag& mine = stream->entered_[header.operation % Stream::kRemembered];
        const bool is_other = mine.operation == header.operation && header.operation != 0 && (mine.tag.Bits() != header.tag || mine.tag.count != header.count);
        if (!is_other) {
          held_up_by = stream->held_up_by_;
          break;
        }
        const OpTag theirs = OpTag::FromBits(header.tag, header.count);
        operation = NameOf(mine.tag.op);
        failure = Status(Code::kMismatch, "ranks called different operations: number " + std::to_string(header.operation) + " of rank " + std::to_string(stream->rank_) +
                                              " is " + mine.tag.Describe() + ", of rank " + std::to_string(rank) + " it is " + theirs.Describe())
                      .Number("rank", stream->rank_)
                      .Number("peer", rank)
                      .Number("sequence", static_cast<double>(header.operation))
                      .Text("operation", NameOf(mine.tag.op))
                      .Text("mine", mine.tag.Describe())
                      .Text("theirs", theirs.Describe());
        break;
      }
      case kHeldUp: {
        int32_t by;
        if (header.nbytes != sizeof by) {
          Refuse();
          break;
        }
        std::memcpy(&by, payload, sizeof by);
        peer.held_up_by = by >= 0 && static_cast<size_t>(by) < stream->peers_.size() && by != stream->rank_ ? by : -1;
        peer.held_up_ns = NowNs();
        break;
      }
      case kFailure: {
        FailureNote note;
        if (header.nbytes != sizeof note) {
          Refuse();
          break;
        }
        std::memcpy(&note, payload, sizeof note);
        const Code code = CodeOf(note.code);
        operation = TextOf(note.operation);
        sequence = note.sequence;
        culprit = note.subject >= 0 && static_cast<size_t>(note.subject) < stream->peers_.size() ? note.subject : -1;
        std::string text = TextOf(note.text);
        if (text.find(" (reported by rank ") == std::string::npos) text += " (reported by rank " + std::to_string(rank) + ")";
        failure = Status(code, std::move(text)).Number("reportedBy", rank).Number("sequence", static_cast<double>(note.sequence)).Text("operation", operation);
        if (culprit >= 0) {
          std::move(failure).Number("rank", code == Code::kTimeout ? rank : culprit);
          if (code == Code::kTimeout) std::move(failure).Text("lateRanks", std::to_string(culprit));
        }
        if (note.pid != 0) std::move(failure).Number("pid", static_cast<double>(note.pid));
        if (note.signal != 0) std::move(failure).Number("signal", note.signal);
        if (note.host[0] != '\0') std::move(failure).Text("host", TextOf(note.host));
        break;
      }
      default: break;
    }
  }
  if (held_up_by) {
    const int32_t by = held_up_by();
    bool must_wake = false;
    {
      std::lock_guard lock(mutex_);
      if (!stream->is_over_) must_wake = Enqueue(stream->Control(kHeldUp, rank, FrameTag(), &by, sizeof by));
    }
    if (must_wake) Wake();
  }
  if (!failure.ok()) stream->on_failure_(std::move(failure), culprit, OperationOf(operation), sequence);
  SignalArrival();
  return is_kept;
}

void Mailbox::Stop() {
  Serve(nullptr);
  // `all`: the last to hold a stream must not let it go with the lock held, which its end takes.
  std::vector<std::shared_ptr<Stream>> all, streams;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [id, stream] : streams_) {
      std::shared_ptr<Stream> open = stream.lock();
      if (open == nullptr) continue;
      if (!open->is_over_) streams.push_back(open);
      all.push_back(std::move(open));
    }
  }
  for (const std::shared_ptr<Stream>& stream : streams) {
    stream->on_failure_(Status(Code::kPeerLost, "rank " + std::to_string(stream->rank_) + " (pid " + std::to_string(getpid()) + " on " + HostName() + ") ended with the group open")
                            .Number("rank", stream->rank_)
                            .Number("pid", getpid())
                            .Text("host", HostName()),
                        stream->rank_, "none", 0);
  }
  RouseAll();
  // Whoever is reading a frame is through with it soon; one who gave up in between never says so.
  constexpr int kLooks = 200;
  for (int look = 0; look < kLooks; look++) {
    bool is_read = false;
    {
      std::lock_guard lock(mutex_);
      for (const std::shared_ptr<Stream>& stream : streams) {
        for (const Stream::Peer& peer : stream->peers_) is_read |= peer.is_read;
      }
    }
    if (!is_read) return;
    const timespec pause = {0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
}

void Mailbox::Lost(int job_rank, const Loss& loss) {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    std::lock_guard lock(mutex_);
    lost_.emplace(job_rank, loss);
    for (const auto& [id, stream] : streams_) {
      if (std::shared_ptr<Stream> open = stream.lock()) streams.push_back(std::move(open));
    }
  }
  for (const std::shared_ptr<Stream>& stream : streams) {
    const int rank = stream->MemberOf(job_rank);
    if (rank < 0) continue;
    FrameTag last;
    {
      std::lock_guard lock(mutex_);
      if (stream->is_over_ || stream->peers_[static_cast<size_t>(rank)].has_left) continue;
      last = stream->last_;
    }
    const char* operation = last.operation == 0 ? "none" : NameOf(last.tag.op);
    Status reason = Status(Code::kPeerLost, "rank " + std::to_string(rank) + ": " + loss.why + "; rank " + std::to_string(stream->rank_) + " was at number " +
                                                std::to_string(last.operation) + " (" + operation + ")")
                        .Number("rank", rank)
                        .Number("reportedBy", stream->rank_)
                        .Number("sequence", static_cast<double>(last.operation))
                        .Text("operation", operation);
    if (!loss.host.empty()) std::move(reason).Text("host", loss.host);
    if (loss.pid != 0) std::move(reason).Number("pid", static_cast<double>(loss.pid));
    stream->on_failure_(std::move(reason), rank, operation, last.operation);
  }
  RouseAll();
}

bool Mailbox::IsLost(int job_rank) {
  std::lock_guard lock(mutex_);
  return lost_.contains(job_rank);
}

Mailbox::Stream::Stream(std::shared_ptr<Mailbox> mailbox, uint64_t id, std::vector<int> members, int rank, OnFailure on_failure)
    : mailbox_(std::move(mailbox)), id_(id), rank_(rank), on_failure_(std::move(on_failure)), peers_(members.size()) {
  for (size_t r = 0; r < members.size(); r++) peers_[r].job_rank = members[r];
}

Mailbox::Stream::~Stream() {
  std::lock_guard lock(mailbox_->mutex_);
  for (Peer& peer : peers_) {
    for (const Incoming& frame : peer.incoming) mailbox_->released_.push_back(frame.keep);
  }
}

int Mailbox::Stream::MemberOf(int job_rank) const {
  for (size_t r = 0; r < peers_.size(); r++) {
    if (peers_[r].job_rank == job_rank) return static_cast<int>(r);
  }
  return -1;
}

void Mailbox::Stream::Enter(const FrameTag& tag) {
  std::lock_guard lock(mailbox_->mutex_);
  entered_[tag.operation % kRemembered] = last_ = tag;
}

std::byte* Mailbox::Stream::Reserve(int rank) {
  std::lock_guard lock(mailbox_->mutex_);
  Peer& peer = peers_[static_cast<size_t>(rank)];
  const auto window = static_cast<uint64_t>(mailbox_->config_.window);
  // The peer's word is not the carrier's: it may have the frame before the carrier is through with its memory.
  const bool is_sending = mailbox_->carrier_ != nullptr && mailbox_->carrier_->TellsSent() && peer.ring != nullptr && peer.posted - peer.ring->sent.load(std::memory_order_acquire) >= window;
  peer.waiting[1].seen = mailbox_->arrivals_.load(std::memory_order_seq_cst);
  if (peer.posted - peer.taken >= window || is_sending) return nullptr;
  if (peer.ring == nullptr) {
    const size_t nbytes = stride() * window;
    void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // Without memory there is never room: the deadline says so.
    if (memory == MAP_FAILED) return nullptr;
    peer.ring = std::make_shared<Ring>();
    peer.ring->data = static_cast<std::byte*>(memory);
    peer.ring->nbytes = nbytes;
  }
  peer.waiting[1].start_ns = 0;
  return peer.ring->data + peer.posted % window * stride() + kHeadBytes;
}

void Mailbox::Stream::Post(int rank, const FrameTag& tag, size_t nbytes) {
  bool must_wake;
  {
    std::lock_guard lock(mailbox_->mutex_);
    Peer& peer = peers_[static_cast<size_t>(rank)];
    const auto window = static_cast<uint64_t>(mailbox_->config_.window);
    const size_t begin = peer.posted % window * stride() + kHeadBytes - sizeof(FrameHeader);
    const FrameHeader header = HeaderTo(peer, kData, tag, nbytes, ++peer.posted);
    std::memcpy(peer.ring->data + begin, &header, sizeof header);
    Outgoing outgoing;
    outgoing.peer = peer.job_rank;
    outgoing.ring = peer.ring;
    outgoing.begin = begin;
    outgoing.nbytes = sizeof header + nbytes;
    must_wake = mailbox_->Enqueue(std::move(outgoing));
  }
  if (must_wake) mailbox_->Wake();
}

bool Mailbox::Stream::Poll(int rank, Frame* frame) {
  std::lock_guard lock(mailbox_->mutex_);
  Peer& peer = peers_[static_cast<size_t>(rank)];
  if (peer.incoming.empty()) {
    peer.waiting[0].seen = mailbox_->arrivals_.load(std::memory_order_seq_cst);
    return false;
  }
  const Incoming& first = peer.incoming.front();
  frame->tag = first.tag;
  frame->data = first.payload;
  frame->nbytes = first.nbytes;
  peer.is_read = true;
  peer.waiting[0].start_ns = 0;
  return true;
}

void Mailbox::Stream::Release(int rank) {
  bool must_wake = false;
  {
    std::lock_guard lock(mailbox_->mutex_);
    Peer& peer = peers_[static_cast<size_t>(rank)];
    mailbox_->released_.push_back(peer.incoming.front().keep);
    peer.incoming.pop_front();
    peer.is_read = false;
    peer.released++;
    // What flows back tells it by the way; without that, half a window is told in time for the peer not to stand still.
    if (peer.released - peer.told >= static_cast<uint64_t>(mailbox_->config_.window / 2)) {
      must_wake = mailbox_->Enqueue(Control(kTaken, rank, FrameTag(), nullptr, 0));
    }
  }
  if (must_wake) mailbox_->Wake();
}

bool Mailbox::Stream::HasLeft(int rank) const {
  std::lock_guard lock(mailbox_->mutex_);
  const Peer& peer = peers_[static_cast<size_t>(rank)];
  return peer.has_left || !peer.shown.empty();
}

bool Mailbox::Stream::IsRenewing(int rank) const {
  std::lock_guard lock(mailbox_->mutex_);
  const Peer& peer = peers_[static_cast<size_t>(rank)];
  return !peer.has_left && !peer.shown.empty();
}

void Mailbox::Stream::TellHeldUp(std::function<int()> held_up_by) {
  std::lock_guard lock(mailbox_->mutex_);
  held_up_by_ = std::move(held_up_by);
}

int Mailbox::Stream::HeldUpBy(int rank) const {
  std::lock_guard lock(mailbox_->mutex_);
  const Peer& peer = peers_[static_cast<size_t>(rank)];
  return peer.held_up_by >= 0 && NowNs() - peer.held_up_ns < kAnswerNs ? peer.held_up_by : rank;
}

void Mailbox::Stream::Wait(int rank, bool is_for_room, const FrameTag& awaited, int64_t slice_ns) {
  Peer::Waiting& waiting = peers_[static_cast<size_t>(rank)].waiting[is_for_room ? 1 : 0];
  const int64_t now = NowNs();
  if (waiting.start_ns == 0) waiting.start_ns = now;
  if (awaited.operation != 0 && now - waiting.start_ns > kProbeAfterNs && now - waiting.probed_ns > kProbeEveryNs) {
    waiting.probed_ns = now;
    bool must_wake;
    {
      std::lock_guard lock(mailbox_->mutex_);
      must_wake = mailbox_->Enqueue(Control(kProbe, rank, awaited, nullptr, 0));
    }
    if (must_wake) mailbox_->Wake();
  }
  if (const std::shared_ptr<Carrier> carrier = mailbox_->carrier()) carrier->Await(waiting.seen, now - waiting.start_ns, slice_ns);
  else mailbox_->SleepUntilArrival(waiting.seen, slice_ns);
}

void Mailbox::Stream::Settle() {
  if (const std::shared_ptr<Carrier> carrier = mailbox_->carrier()) carrier->Settle();
}

// With the mailbox's mutex held: whatever goes to a peer tells it by the way what was taken.
FrameHeader Mailbox::Stream::HeaderTo(Peer& peer, uint16_t kind, const FrameTag& tag, size_t nbytes, uint64_t number) const {
  FrameHeader header = mailbox_->HeaderFor(kind, id_);
  header.number = number;
  header.taken = peer.told = peer.released;
  header.tag = tag.tag.Bits();
  header.count = tag.tag.count;
  header.operation = tag.operation;
  header.part = tag.part;
  header.nbytes = static_cast<uint32_t>(nbytes);
  header.check = CheckOf(header);
  return header;
}

// Likewise.
Mailbox::Outgoing Mailbox::Stream::Control(uint16_t kind, int rank, const FrameTag& tag, const void* payload, size_t nbytes) {
  Peer& peer = peers_[static_cast<size_t>(rank)];
  return Message(peer.job_rank, HeaderTo(peer, kind, tag, nbytes, 0), payload);
}

void Mailbox::Stream::TellAll(uint16_t kind, const void* payload, size_t nbytes) {
  bool must_wake = false;
  {
    std::lock_guard lock(mailbox_->mutex_);
    if (is_over_) return;
    is_over_ = true;
    for (size_t rank = 0; rank < peers_.size(); rank++) {
      if (peers_[rank].job_rank < 0) continue;
      must_wake |= mailbox_->Enqueue(Control(kind, static_cast<int>(rank), FrameTag(), payload, nbytes));
    }
  }
  if (must_wake) mailbox_->Wake();
}

void Mailbox::Stream::TellFailure(const Status& reason) {
  FailureNote note = {};
  note.code = static_cast<int32_t>(reason.code());
  note.subject = -1;
  for (const auto& [key, value] : reason.numbers()) {
    if (std::strcmp(key, "rank") == 0 && note.subject < 0) note.subject = static_cast<int32_t>(value);
    if (std::strcmp(key, "pid") == 0) note.pid = static_cast<int64_t>(value);
    if (std::strcmp(key, "signal") == 0) note.signal = static_cast<int32_t>(value);
    if (std::strcmp(key, "sequence") == 0) note.sequence = static_cast<uint64_t>(value);
  }
  for (const auto& [key, value] : reason.texts()) {
    if (std::strcmp(key, "lateRanks") == 0) note.subject = std::atoi(value.c_str());  // the first of them
    if (std::strcmp(key, "host") == 0) std::snprintf(note.host, sizeof note.host, "%s", value.c_str());
    if (std::strcmp(key, "operation") == 0) std::snprintf(note.operation, sizeof note.operation, "%s", value.c_str());
  }
  std::snprintf(note.text, sizeof note.text, "%s", reason.message().c_str());
  TellAll(kFailure, &note, sizeof note);
  mailbox_->RouseAll();  // who waits here for a peer waits no longer
}

void Mailbox::Stream::Show(const void* note, size_t nbytes) {
  bool must_wake = false;
  {
    std::lock_guard lock(mailbox_->mutex_);
    for (size_t rank = 0; rank < peers_.size(); rank++) {
      if (peers_[rank].job_rank < 0 || mailbox_->lost_.contains(peers_[rank].job_rank)) continue;
      must_wake |= mailbox_->Enqueue(Control(kShown, static_cast<int>(rank), FrameTag(), note, nbytes));
    }
  }
  if (must_wake) mailbox_->Wake();
}

bool Mailbox::Stream::ShownBy(int rank, void* note, size_t nbytes) const {
  std::lock_guard lock(mailbox_->mutex_);
  const std::vector<std::byte>& shown = peers_[static_cast<size_t>(rank)].shown;
  if (shown.size() != nbytes) return false;
  std::memcpy(note, shown.data(), nbytes);
  return true;
}

void Mailbox::Stream::Leave() { TellAll(kLeave, nullptr, 0); }

}  // namespace tilerank
