// Mailbox and MailboxServer for JavaScript (comm/mailbox.h). The server is made in another thread's environment: it finds the mailbox by the
// number that the first one carries.
#include "addon_mailbox.h"

#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "addon.h"
#include "addon_call.h"

namespace tilerank {

namespace {

// The one table that environments of a process share: how a worker gets what its parent has made.
struct Handover {
  std::mutex mutex;
  uint64_t next = 1;
  std::map<uint64_t, std::weak_ptr<Mailbox>> mailboxes;
};
Handover& TheHandover() {
  static Handover handover;
  return handover;
}

class MailboxHandle : public Napi::ObjectWrap<MailboxHandle> {
 public:
  static constexpr napi_type_tag kTag = {0x7d0f3c1a52e84b96, 0x91c2a4b7e6d8035f};

  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "Mailbox", {InstanceAccessor("id", &MailboxHandle::Id, nullptr), InstanceAccessor("refused", &MailboxHandle::Refused, nullptr)});
  }

  /// new Mailbox({ job, rank, worldSize, frameBytes, window }): job is a BigInt, the digest of what frames must carry.
  explicit MailboxHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<MailboxHandle>(info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 1 || !info[0].IsObject()) {
      ToError(env, Bad("Mailbox takes one object of options")).ThrowAsJavaScriptException();
      return;
    }
    Options given{info[0].As<Napi::Object>(), {}};
    Mailbox::Config config;
    config.world_size = static_cast<int>(given.Integer("worldSize", 2, kMaxWorldSize));
    config.rank = static_cast<int>(given.Integer("rank", 0, kMaxWorldSize - 1));
    config.frame_bytes = static_cast<size_t>(given.Integer("frameBytes", 4096, 64 << 20));
    config.window = static_cast<int>(given.Integer("window", 8, 1024));
    const Napi::Value job = given.object.Get("job");
    bool is_lossless = false;
    if (job.IsBigInt()) config.job = job.As<Napi::BigInt>().Uint64Value(&is_lossless);
    if (given.status.ok() && !is_lossless) given.status = Bad("option job must be a BigInt of 64 bits");
    if (given.status.ok() && config.frame_bytes % 64 != 0) given.status = Bad("option frameBytes must be a multiple of 64");
    if (!given.status.ok()) {
      ToError(env, given.status).ThrowAsJavaScriptException();
      return;
    }
    mailbox_ = std::make_shared<Mailbox>(config);
    info.This().As<Napi::Object>().TypeTag(&kTag);
    Handover& handover = TheHandover();
    std::lock_guard lock(handover.mutex);
    id_ = handover.next++;
    handover.mailboxes[id_] = mailbox_;
  }
  ~MailboxHandle() {
    Handover& handover = TheHandover();
    std::lock_guard lock(handover.mutex);
    handover.mailboxes.erase(id_);
  }

  std::shared_ptr<Mailbox> mailbox() const { return mailbox_; }

 private:
  Napi::Value Id(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), static_cast<double>(id_)); }
  Napi::Value Refused(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), static_cast<double>(mailbox_->refused())); }
  std::shared_ptr<Mailbox> mailbox_;
  uint64_t id_ = 0;
};

class MailboxServer : public Napi::ObjectWrap<MailboxServer> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "MailboxServer",
                       {InstanceMethod("serve", &MailboxServer::Serve), InstanceMethod("take", &MailboxServer::Take), InstanceMethod("deliver", &MailboxServer::Deliver),
                        InstanceMethod("released", &MailboxServer::Released), InstanceMethod("lost", &MailboxServer::Lost), InstanceMethod("close", &MailboxServer::CloseJs),
                        InstanceMethod("sayGoodbye", &MailboxServer::SayGoodbye), InstanceMethod("hasParted", &MailboxServer::HasParted),
                        InstanceAccessor("messageBytes", &MailboxServer::MessageBytes, nullptr)});
  }

  /// new MailboxServer(id)
  explicit MailboxServer(const Napi::CallbackInfo& info) : Napi::ObjectWrap<MailboxServer>(info) {
    const int64_t id = info.Length() > 0 && info[0].IsNumber() ? Int64(info[0]) : 0;
    Handover& handover = TheHandover();
    {
      std::lock_guard lock(handover.mutex);
      if (const auto found = handover.mailboxes.find(static_cast<uint64_t>(id)); found != handover.mailboxes.end()) mailbox_ = found->second.lock();
    }
    if (mailbox_ == nullptr) ToError(info.Env(), Bad("there is no mailbox of that number")).ThrowAsJavaScriptException();
  }
  ~MailboxServer() { Stop(); }

 private:
  static void Call(Napi::Env env, Napi::Function callback, std::nullptr_t*, void*) {
    if (env != nullptr) callback.Call({});
  }
  using Waker = Napi::TypedThreadSafeFunction<std::nullptr_t, void, &MailboxServer::Call>;

  /// serve(onWork): onWork runs in this thread when there is something to take.
  Napi::Value Serve(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (waker_ != nullptr || info.Length() < 1 || !info[0].IsFunction()) {
      ToError(env, Bad("serve takes a function, once")).ThrowAsJavaScriptException();
      return env.Undefined();
    }
    // Shared with the mailbox: threads of collectives call it until Stop has taken it away.
    waker_ = std::make_shared<Waker>(Waker::New(env, info[0].As<Napi::Function>(), "tilerank.MailboxServer", 0, 1));
    mailbox_->Serve([waker = waker_] { waker->NonBlockingCall(); });
    return env.Undefined();
  }

  void Stop() {
    if (waker_ == nullptr) return;
    mailbox_->Stop();
    waker_->Release();
    waker_.reset();
  }

  Napi::Value CloseJs(const Napi::CallbackInfo& info) {
    Stop();
    rings_.clear();
    return info.Env().Undefined();
  }

  /// take() -> [rank, bytes] or undefined: the next message for the socket of a rank. The bytes stay until that rank has taken them.
  Napi::Value Take(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Mailbox::Outgoing outgoing;
    if (!mailbox_->Take(&outgoing)) return env.Undefined();
    Napi::Value bytes;
    if (outgoing.ring == nullptr) {
      bytes = Napi::Buffer<std::byte>::Copy(env, outgoing.bytes.data(), outgoing.bytes.size());
    } else {
      auto known = rings_.find(outgoing.ring.get());
      if (known == rings_.end()) {
        auto* keep = new std::shared_ptr<Mailbox::Ring>(outgoing.ring);
        napi_value value;
        const napi_status made = napi_create_external_arraybuffer(
            env, outgoing.ring->data, outgoing.ring->nbytes, [](napi_env, void*, void* hint) { delete static_cast<std::shared_ptr<Mailbox::Ring>*>(hint); }, keep, &value);
        if (made != napi_ok) {
          delete keep;
          ToError(env, Status(Code::kUnsupported, "this runtime forbids ArrayBuffers over native memory: use Node.js itself")).ThrowAsJavaScriptException();
          return env.Undefined();
        }
        known = rings_.emplace(outgoing.ring.get(), Napi::Persistent(Napi::ArrayBuffer(env, value))).first;
      }
      bytes = Napi::Uint8Array::New(env, outgoing.nbytes, known->second.Value(), outgoing.begin);
    }
    Napi::Array result = Napi::Array::New(env, 2);
    result.Set(0u, outgoing.peer);
    result.Set(1u, bytes);
    return result;
  }

  /// deliver(message): its memory is held here as long as a collective may read it.
  Napi::Value Deliver(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 1 || !info[0].IsBuffer()) {
      ToError(env, Bad("deliver takes a Buffer")).ThrowAsJavaScriptException();
      return env.Undefined();
    }
    const Napi::Buffer<std::byte> message = info[0].As<Napi::Buffer<std::byte>>();
    const uint64_t keep = next_keep_++;
    // First kept, then shown: a collective may be through with it before Deliver has returned.
    kept_.emplace(keep, Napi::Persistent(message.As<Napi::Object>()));
    if (!mailbox_->Deliver(message.Data(), message.Length(), keep)) kept_.erase(keep);
    DropReleased();
    return env.Undefined();
  }

  Napi::Value Released(const Napi::CallbackInfo& info) {
    DropReleased();
    return Napi::Number::New(info.Env(), static_cast<double>(kept_.size()));
  }

  void DropReleased() {
    mailbox_->TakeReleased(&keeps_);
    for (uint64_t keep : keeps_) kept_.erase(keep);
    keeps_.clear();
  }

  /// lost(rank, host, pid, why)
  Napi::Value Lost(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 4 || !info[0].IsNumber() || !info[1].IsString() || !info[2].IsNumber() || !info[3].IsString()) {
      ToError(env, Bad("lost takes (rank, host, pid, why)")).ThrowAsJavaScriptException();
      return env.Undefined();
    }
    mailbox_->Lost(static_cast<int>(Int64(info[0])), {info[1].As<Napi::String>().Utf8Value(), Int64(info[2]), info[3].As<Napi::String>().Utf8Value()});
    return env.Undefined();
  }

  /// sayGoodbye(rank): the last message to it. hasParted(rank): it has come, and all before it.
  Napi::Value SayGoodbye(const Napi::CallbackInfo& info) {
    mailbox_->SayGoodbye(info[0].ToNumber().Int32Value());
    return info.Env().Undefined();
  }
  Napi::Value HasParted(const Napi::CallbackInfo& info) { return Napi::Boolean::New(info.Env(), mailbox_->HasParted(info[0].ToNumber().Int32Value())); }

  Napi::Value MessageBytes(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), static_cast<double>(mailbox_->message_bytes())); }

  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<Waker> waker_;
  std::map<const Mailbox::Ring*, Napi::Reference<Napi::ArrayBuffer>> rings_;
  std::unordered_map<uint64_t, Napi::ObjectReference> kept_;
  std::vector<uint64_t> keeps_;
  uint64_t next_keep_ = 1;
};

}  // namespace

std::shared_ptr<Mailbox> MailboxOf(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&MailboxHandle::kTag)) return nullptr;
  return MailboxHandle::Unwrap(value.As<Napi::Object>())->mailbox();
}

void RegisterMailbox(Napi::Env env, Napi::Object exports) {
  exports.Set("Mailbox", MailboxHandle::Define(env));
  exports.Set("MailboxServer", MailboxServer::Define(env));
}

}  // namespace tilerank
