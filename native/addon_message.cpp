// Messages for JavaScript: send, recv and both at once, on the channels of comm/channels.h. As with collectives, order is fixed on the calling
// thread; what would hold it longer than 20 us goes on in the channel's own thread.
#include <algorithm>
#include <cstring>
#include <memory>
#include <semaphore>
#include <string>
#include <utility>

#include "addon.h"
#include "addon_call.h"
#include "comm/comm_handle.h"

namespace tilerank {

namespace {

Status BusyWith(int rank, const Channels::Channel& channel) {
  const std::string what = channel.is_sender ? "a send to rank " : "a recv from rank ";
  return Status(Code::kBusy, what + std::to_string(rank) + " is still pending: await it before a ...Sync call");
}

}  // namespace

Status CommHandle::ReadPeer(const Napi::Value& peer, bool is_sender, MessageCall* call) {
  if (!peer.IsNumber()) return Bad("the other rank must be a number");
  const int64_t rank = Int64(peer);
  if (rank < 0 || rank >= world_size_) return Bad("rank " + std::to_string(rank) + " is not of this group");
  if (rank == rank_) return Bad("a rank has no message to itself but by sendRecv, which copies");
  if (channels_ == nullptr) {
    Channels::Config config;
    config.rendezvous = rendezvous_;
    config.communicator = communicator_;
    config.is_cancelled = is_cancelled_;
    config.copy = kernels_->copy;
    config.group = group_;
    config.members = options_.members;
    config.names = options_.names;
    config.nodes = options_.nodes;
    config.chunk_bytes = table_.Choose(CollectiveOp::kBroadcast, false, SIZE_MAX).chunk_bytes;
    config.rank = rank_;
    config.transport = messages_;
    channels_ = std::make_unique<Channels>(std::move(config));
  }
  call->rank = static_cast<int>(rank);
  const auto local = std::find(options_.names.begin(), options_.names.end(), static_cast<int>(rank));
  call->channel = local == options_.names.end() ? &channels_->OfRemote(static_cast<int>(rank), is_sender)
                                                : &channels_->Of(static_cast<int>(local - options_.names.begin()), is_sender);
  return Status::Ok();
}

// (isSender, dtype, data, peer, timeoutMs): data is a tensor's id or a typed array.
Status CommHandle::ReadMessage(const Napi::CallbackInfo& info, MessageCall* call) {
  if (info.Length() < 5 || !info[0].IsBoolean() || !info[1].IsNumber() || !info[4].IsNumber()) {
    return Bad("message takes (isSender, dtype, data, peer, timeoutMs)");
  }
  if (Status s = Usable(); !s.ok()) return s;
  if (!IsDType(Int64(info[1]))) return Bad("no such dtype");
  call->dtype = static_cast<DType>(Int64(info[1]));
  call->timeout_ms = Int64(info[4]);
  if (call->timeout_ms < 1 || call->timeout_ms > INT32_MAX) return Bad("timeoutMs must be at least 1");
  call->kept = info[2];
  if (Status s = ReadMemory(info[2], call->dtype, "data", &call->memory); !s.ok()) return s;
  if (!call->memory.is_given) return Bad("a message needs data");
  return ReadPeer(info[3], info[0].ToBoolean(), call);
}

// (dtype, data, output, to, from, timeoutMs). *is_copy: to and from this rank itself.
Status CommHandle::ReadSendRecv(const Napi::CallbackInfo& info, MessageCall* send, MessageCall* receive, bool* is_copy) {
  if (info.Length() < 6 || !info[0].IsNumber() || !info[3].IsNumber() || !info[4].IsNumber() || !info[5].IsNumber()) {
    return Bad("sendRecv takes (dtype, data, output, to, from, timeoutMs)");
  }
  if (Status s = Usable(); !s.ok()) return s;
  if (!IsDType(Int64(info[0]))) return Bad("no such dtype");
  send->dtype = receive->dtype = static_cast<DType>(Int64(info[0]));
  send->timeout_ms = receive->timeout_ms = Int64(info[5]);
  if (send->timeout_ms < 1 || send->timeout_ms > INT32_MAX) return Bad("timeoutMs must be at least 1");
  send->kept = info[1];
  receive->kept = info[2];
  if (Status s = ReadMemory(info[1], send->dtype, "data", &send->memory); !s.ok()) return s;
  if (Status s = ReadMemory(info[2], send->dtype, "output", &receive->memory); !s.ok()) return s;
  if (!send->memory.is_given || !receive->memory.is_given) return Bad("sendRecv needs data and output");
  if (Overlap(send->memory, receive->memory, send->dtype)) return Bad("data overlaps output: a rank may receive before it has sent");
  const int64_t to = Int64(info[3]), from = Int64(info[4]);
  *is_copy = to == rank_ && from == rank_;
  if (*is_copy) {
    if (send->memory.count == receive->memory.count) return Status::Ok();
    return Bad("output must hold " + std::to_string(send->memory.count) + " elements, not " + std::to_string(receive->memory.count));
  }
  if (to == rank_ || from == rank_) return Bad("to and from are both this rank, which copies, or neither");
  if (Status s = ReadPeer(info[3], true, send); !s.ok()) return s;
  return ReadPeer(info[4], false, receive);
}

/// message(isSender, dtype, data, peer, timeoutMs): undefined when it ended at once, else a promise.
Napi::Value CommHandle::Message(const Napi::CallbackInfo& info) {
  MessageCall call;
  if (Status s = ReadMessage(info, &call); !s.ok()) return Throw(info.Env(), s);
  return Post(info.Env(), call);
}

Napi::Value CommHandle::Post(Napi::Env env, const MessageCall& call) {
  Channels::Channel& channel = *call.channel;
  Channels::Message message = channels_->Take(channel, call.dtype, call.memory.data, call.memory.count);
  statistics_.Count(CollectiveOp::kMessage, message.operation.nbytes());
  const Deadline deadline = Deadline::AfterMs(call.timeout_ms);
  if (channel.pending == 0) {
    channels_->TryStart(&message);
    const bool is_small = message.operation.nbytes() <= kInlineBytes;
    if (is_small && LookUntil(NowNs() + kLookNs, *communicator_, [&] { return channels_->IsReady(message); })) {
      if (Status s = channels_->Run(message, deadline); !s.ok()) return Throw(env, s);
      return env.Undefined();
    }
  }
  deadline.ElapsedNs(NowNs());  // the time counts from the call
  auto job = std::make_unique<Job>();
  if (call.kept.IsObject()) job->kept.push_back(Napi::Persistent(call.kept.As<Napi::Object>()));
  job->work = [this, message, deadline] { return channels_->Run(message, deadline); };
  return Enqueue(env, std::move(job), &channel.worker, &channel.pending);
}

/// messageSync(...), as message: blocks the caller until it is done.
Napi::Value CommHandle::MessageSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  MessageCall call;
  if (Status s = ReadMessage(info, &call); !s.ok()) return Throw(env, s);
  if (call.channel->pending > 0) return Throw(env, BusyWith(call.rank, *call.channel));
  Channels::Message message = channels_->Take(*call.channel, call.dtype, call.memory.data, call.memory.count);
  statistics_.Count(CollectiveOp::kMessage, message.operation.nbytes());
  channels_->TryStart(&message);
  if (Status s = channels_->Run(message, Deadline::AfterMs(call.timeout_ms)); !s.ok()) return Throw(env, s);
  return {};
}

/// sendRecv(dtype, data, output, to, from, timeoutMs) -> [a promise or undefined of the send, and of the recv].
Napi::Value CommHandle::SendRecv(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  MessageCall send, receive;
  bool is_copy = false;
  if (Status s = ReadSendRecv(info, &send, &receive, &is_copy); !s.ok()) return Throw(env, s);
  Napi::Array both = Napi::Array::New(env, 2);
  if (is_copy) {
    std::memcpy(receive.memory.data, send.memory.data, send.memory.count * static_cast<size_t>(ElementBytes(send.dtype)));
    return both;
  }
  for (uint32_t i = 0; i < 2; i++) {
    const Napi::Value one = Post(env, i == 0 ? send : receive);
    if (!env.IsExceptionPending()) {
      both.Set(i, one);
      continue;
    }
    // The other may be on its way: both settle as promises.
    Napi::Promise::Deferred failed(env);
    failed.Reject(env.GetAndClearPendingException().Value());
    both.Set(i, failed.Promise());
  }
  return both;
}

/// sendRecvSync(...), as sendRecv: blocks the caller until both are done. What the send cannot do without waiting is its channel's thread's.
Napi::Value CommHandle::SendRecvSync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  MessageCall send, receive;
  bool is_copy = false;
  if (Status s = ReadSendRecv(info, &send, &receive, &is_copy); !s.ok()) return Throw(env, s);
  if (is_copy) {
    std::memcpy(receive.memory.data, send.memory.data, send.memory.count * static_cast<size_t>(ElementBytes(send.dtype)));
    return {};
  }
  for (const MessageCall* call : {&send, &receive}) {
    if (call->channel->pending > 0) return Throw(env, BusyWith(call->rank, *call->channel));
  }
  const Deadline deadline = Deadline::AfterMs(send.timeout_ms), deadline_of_send = deadline;
  Channels::Message sent = channels_->Take(*send.channel, send.dtype, send.memory.data, send.memory.count);
  statistics_.Count(CollectiveOp::kMessage, sent.operation.nbytes());
  Channels::Message received = channels_->Take(*receive.channel, receive.dtype, receive.memory.data, receive.memory.count);
  statistics_.Count(CollectiveOp::kMessage, received.operation.nbytes());
  channels_->TryStart(&sent);
  Status send_status;
  std::binary_semaphore is_sent(0);
  const bool is_quick = channels_->IsReady(sent);
  if (is_quick) {
    send_status = channels_->Run(sent, deadline_of_send);
  } else {
    send.channel->worker.Post([&] {
      send_status = channels_->Run(sent, deadline_of_send);
      is_sent.release();
    });
  }
  channels_->TryStart(&received);
  const Status status = channels_->Run(received, deadline);
  if (!is_quick) is_sent.acquire();
  if (!status.ok()) return Throw(env, status);
  if (!send_status.ok()) return Throw(env, send_status);
  return {};
}

}  // namespace tilerank
