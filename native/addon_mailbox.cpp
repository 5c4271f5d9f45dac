// Mailbox for JavaScript (comm/mailbox.h): made by it, and handed to a courier and to communicators.
#include "addon_mailbox.h"

#include <memory>
#include <string>

#include "addon.h"
#include "addon_call.h"

namespace tilerank {

namespace {

class MailboxHandle : public Napi::ObjectWrap<MailboxHandle> {
 public:
  static constexpr napi_type_tag kTag = {0x7d0f3c1a52e84b96, 0x91c2a4b7e6d8035f};

  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "Mailbox", {InstanceAccessor("refused", &MailboxHandle::Refused, nullptr)});
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
  }

  std::shared_ptr<Mailbox> mailbox() const { return mailbox_; }

 private:
  Napi::Value Refused(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), static_cast<double>(mailbox_->refused())); }
  std::shared_ptr<Mailbox> mailbox_;
};

}  // namespace

std::shared_ptr<Mailbox> MailboxOf(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&MailboxHandle::kTag)) return nullptr;
  return MailboxHandle::Unwrap(value.As<Napi::Object>())->mailbox();
}

void RegisterMailbox(Napi::Env env, Napi::Object exports) { exports.Set("Mailbox", MailboxHandle::Define(env)); }

}  // namespace tilerank
