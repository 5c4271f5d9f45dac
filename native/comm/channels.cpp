#include "comm/channels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "comm/leg.h"

namespace tilerank {

namespace {

// Large enough to hide a chunk's flag, small enough for two of them to stay in the cache that sender and receiver share, and for a rank to
// afford a channel to each other rank.
constexpr size_t kSlotBytes = 256 << 10;
constexpr int64_t kSliceMs = 50;
// Numbers of the arenas of channels, above those of tensors.
constexpr uint32_t kFirstArena = uint32_t{1} << 31;

// A failure of one communicator becomes another's, with what it says of its cause.
void Relay(const Status& failure, Communicator& to) {
  int culprit = -1;
  uint64_t sequence = 0;
  const char* operation = "message";
  for (const auto& [key, value] : failure.numbers()) {
    if (std::strcmp(key, "rank") == 0) culprit = static_cast<int>(value);
    if (std::strcmp(key, "sequence") == 0) sequence = static_cast<uint64_t>(value);
  }
  for (const auto& [key, value] : failure.texts()) {
    if (std::strcmp(key, "lateRanks") == 0) culprit = std::atoi(value.c_str());
    if (std::strcmp(key, "operation") == 0) operation = value.c_str();
  }
  (void)to.Break(failure, culprit, operation, sequence);
}

}  // namespace

Channels::Channels(Config config) : config_(std::move(config)) {
  channels_.resize(2 * config_.members.size());
  config_.communicator->OnFailure([connected = connected_, weak = std::weak_ptr(config_.communicator)] {
    const std::shared_ptr<Communicator> group = weak.lock();
    std::vector<std::shared_ptr<Communicator>> all;
    {
      std::lock_guard lock(connected->mutex);
      all = connected->communicators;
    }
    for (const std::shared_ptr<Communicator>& one : all) {
      if (group != nullptr) Relay(group->failure(), *one);
    }
  });
}

Channels::Channel& Channels::Of(int peer, bool is_sender) {
  std::unique_ptr<Channel>& channel = channels_[2 * static_cast<size_t>(peer) + (is_sender ? 1 : 0)];
  if (channel == nullptr) {
    channel = std::make_unique<Channel>();
    channel->peer = peer;
    channel->is_sender = is_sender;
  }
  return *channel;
}

Channels::Channel& Channels::OfRemote(int rank, bool is_sender) {
  std::unique_ptr<Channel>& channel = remote_[{rank, is_sender}];
  if (channel == nullptr) {
    channel = std::make_unique<Channel>();
    channel->peer = rank;
    channel->is_sender = is_sender;
    channel->is_remote = true;
  }
  return *channel;
}

Channels::Message Channels::Take(Channel& channel, DType dtype, std::byte* data, size_t count) const {
  Message message;
  message.channel = &channel;
  Operation& operation = message.operation;
  operation.op = CollectiveOp::kMessage;
  operation.dtype = dtype;
  operation.data = data;
  operation.count = count;
  operation.chunk_bytes = std::min(kSlotBytes, config_.chunk_bytes);
  if (channel.is_remote) {
    message.number = channel.next_message++;
    return message;
  }
  operation.sequence = channel.next_sequence;
  channel.next_sequence += SequencesOf(operation, 2);
  return message;
}

OperationContext Channels::ContextOf(const Message& message) const { return {message.channel->communicator.get(), nullptr, config_.copy, 0}; }

void Channels::TryStart(Message* message) const {
  if (!message->channel->is_remote && message->channel->is_connected.load()) message->has_started = tilerank::TryStart(ContextOf(*message), message->operation);
}

bool Channels::IsReady(const Message& message) const {
  return message.has_started && tilerank::IsReady(ContextOf(message), message.operation);
}

// Frame by frame; an empty message is one frame as well.
Status Channels::RunRemote(const Message& message, const Deadline& deadline) {
  const Operation& operation = message.operation;
  const int peer = message.channel->peer;
  const size_t frame = config_.transport->frame_bytes(), nbytes = operation.nbytes();
  Leg leg(*config_.communicator, *config_.transport, config_.rank, {message.number, MakeTag(operation, 0), 0}, deadline);
  for (uint64_t part = 0; part == 0 || part * frame < nbytes; part++) {
    std::byte* data = operation.data + part * frame;
    const size_t size = std::min(frame, nbytes - part * frame);
    if (message.channel->is_sender) {
      std::byte* room;
      if (Status s = leg.Room(peer, part, &room); !s.ok()) return s;
      if (size > 0) config_.copy(room, data, size);
      leg.Post(peer, part, size);
    } else {
      const std::byte* from;
      if (Status s = leg.Receive(peer, part, size, &from); !s.ok()) return s;
      if (size > 0) config_.copy(data, from, size);
      leg.Release(peer);
    }
  }
  config_.transport->Settle();
  return Status::Ok();
}

Status Channels::Run(const Message& message, const Deadline& deadline) {
  Channel& channel = *message.channel;
  if (channel.is_remote) return RunRemote(message, deadline);
  if (!channel.is_connected.load()) {
    if (Status s = Connect(channel, deadline); !s.ok()) {
      Relay(s, *config_.communicator);
      return config_.communicator->failure();
    }
  }
  Status status = Finish(ContextOf(message), message.operation, message.has_started, deadline);
  // The group's failure is this one, or was there before.
  return status.ok() || !config_.communicator->failed() ? status : config_.communicator->failure();
}

Status Channels::Connect(Channel& channel, const Deadline& deadline) {
  const int own = config_.communicator->rank();
  const int sender = channel.is_sender ? own : channel.peer, receiver = channel.is_sender ? channel.peer : own;
  CommConfig config;
  config.rank = channel.is_sender ? 0 : 1;
  config.world_size = 2;
  config.slot_bytes = std::min(kSlotBytes, config_.chunk_bytes);
  config.spin_us = config_.communicator->spin_us();
  config.names = {NameOfRank(sender), NameOfRank(receiver)};
  config.has_left = [group = std::weak_ptr(config_.communicator), peer = channel.peer] {
    const std::shared_ptr<Communicator> whole = group.lock();
    if (whole == nullptr) return false;
    (void)whole->CheckAborts();  // a failure comes back here
    return whole->HasLeft(peer);
  };
  // The receiver's head, then the sender's and its slots. The receiver publishes nothing: its slots, which would lie over the sender's head,
  // are none.
  const size_t nbytes = Communicator::ArenaBytes(config), head = Communicator::HeadBytes(config);
  Rendezvous::Offer offer;
  offer.group = config_.group;
  offer.arena = kFirstArena + static_cast<uint32_t>(sender * kMaxWorldSize + receiver);
  offer.nbytes = head + nbytes;
  offer.terms = "messages from rank " + std::to_string(NameOfRank(sender)) + " to rank " + std::to_string(NameOfRank(receiver));
  offer.operation = "message";
  offer.members = {config_.members[static_cast<size_t>(sender)], config_.members[static_cast<size_t>(receiver)]};
  offer.names = config.names;
  std::vector<Arena> arenas(2);
  if (channel.is_sender) {
    UniqueFd fd;
    std::string warning;  // the group's arena gave the same one
    if (Status s = Arena::Create({offer.nbytes, offer.terms, config_.nodes}, &arenas[1], &fd, &warning); !s.ok()) return s;
    const auto send = [&](const Deadline& slice) { return config_.rendezvous->Send(offer, fd.get(), slice, *config_.is_cancelled); };
    if (Status s = Reach(channel, deadline, send); !s.ok()) return s;
  } else {
    std::vector<Rendezvous::Answer> answers;
    const auto collect = [&](const Deadline& slice) { return config_.rendezvous->Collect(offer, slice, *config_.is_cancelled, &answers); };
    if (Status s = Reach(channel, deadline, collect); !s.ok()) return s;
    const UniqueFd& fd = answers[static_cast<size_t>(offer.members[0])].arena;
    if (Status s = Arena::Receive(fd, offer.nbytes, offer.terms, &arenas[1]); !s.ok()) return s;
  }
  arenas[0] = Arena::View(arenas[1], head);
  std::unique_ptr<Communicator> made;
  // Without their processes' descriptors: the group watches them.
  if (Status s = Communicator::Create(config, std::move(arenas), std::vector<PeerProcess>(2), &made); !s.ok()) return s;
  channel.communicator = std::move(made);
  channel.communicator->OnFailure([group = std::weak_ptr(config_.communicator), weak = std::weak_ptr(channel.communicator)] {
    const std::shared_ptr<Communicator> whole = group.lock(), one = weak.lock();
    if (whole != nullptr && one != nullptr) Relay(one->failure(), *whole);
  });
  {
    std::lock_guard lock(connected_->mutex);
    connected_->communicators.push_back(channel.communicator);
  }
  channel.is_connected.store(true);
  // The group may have failed before this channel stood in the list.
  return config_.communicator->failed() ? config_.communicator->failure() : Status::Ok();
}

// In slices, so that a rank that has left or failed is not waited for.
Status Channels::Reach(const Channel& channel, const Deadline& deadline, const std::function<Status(const Deadline&)>& exchange) const {
  Communicator& group = *config_.communicator;
  const std::string own = std::to_string(NameOfRank(group.rank())), peer = std::to_string(NameOfRank(channel.peer));
  deadline.ElapsedNs(NowNs());
  for (;;) {
    const Status status = exchange(Deadline::AfterMs(std::min(kSliceMs, deadline.timeout_ms())));
    if (Status s = group.CheckAborts(); !s.ok()) return s;
    if (status.code() != Code::kTimeout) return status;
    if (group.HasLeft(channel.peer)) {
      return Status(Code::kPeerLost, "rank " + peer + " closed the group, while rank " + own + (channel.is_sender ? " sends a message to it" : " waits for a message from it"))
          .Number("rank", NameOfRank(channel.peer))
          .Number("reportedBy", NameOfRank(group.rank()))
          .Text("host", HostName())
          .Text("operation", "message");
    }
    if (!deadline.IsOver(NowNs())) continue;
    return Status(Code::kTimeout, "rank " + own + (channel.is_sender ? " could not reach rank " : " had no message from rank ") + peer + " within " +
                                      std::to_string(deadline.timeout_ms()) + " ms")
        .Number("rank", NameOfRank(group.rank()))
        .Number("elapsedMs", static_cast<double>(deadline.ElapsedNs(NowNs())) / 1e6)
        .Text("lateRanks", peer)
        .Text("operation", "message");
  }
}

void Channels::Stop() {
  std::lock_guard lock(connected_->mutex);
  for (const std::shared_ptr<Communicator>& one : connected_->communicators) one->Stop();
}

void Channels::Close() {
  for (const std::unique_ptr<Channel>& channel : channels_) {
    if (channel != nullptr) channel->worker.Stop();
  }
  for (const auto& [key, channel] : remote_) channel->worker.Stop();
  std::vector<std::shared_ptr<Communicator>> all;
  {
    std::lock_guard lock(connected_->mutex);
    all.swap(connected_->communicators);
  }
  for (const std::shared_ptr<Communicator>& one : all) one->Close();
}

}  // namespace tilerank
