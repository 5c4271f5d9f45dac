// The MPI leg for JavaScript (comm/mpi_courier.h): exchangeCards and class MpiCourier. The MPI itself is in another addon (mpi/mpi.cpp), whose table
// of functions comes as an External.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "addon.h"
#include "addon_call.h"
#include "addon_mailbox.h"
#include "addon_work.h"
#include "comm/mpi_courier.h"

namespace tilerank {

namespace {

Status ReadWorld(const Napi::Value& value, const MpiWorld** world) {
  const napi_type_tag tag = {kMpiWorldTag[0], kMpiWorldTag[1]};
  if (!value.IsExternal() || !value.As<Napi::External<MpiWorld>>().CheckTypeTag(&tag)) return Bad("world is not what start() of an MPI addon gave");
  const MpiWorld* given = value.As<Napi::External<MpiWorld>>().Data();
  if (given->version != kMpiWorldVersion || given->nbytes != sizeof(MpiWorld)) {
    return Status(Code::kUnsupported, "the MPI addon is of another version than the addon: run `npx tilerank build --force`");
  }
  *world = given;
  return Status::Ok();
}

/// exchangeCards(world, tag, card, timeoutMs) -> Promise<[size] Buffer or undefined>: undefined, where a rank has not come.
Napi::Value ExchangeCardsJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 4 || !info[1].IsNumber() || !info[2].IsTypedArray() || !info[3].IsNumber()) {
    return Throw(env, Bad("exchangeCards takes (world, tag, card, timeoutMs)"));
  }
  const MpiWorld* world;
  if (Status s = ReadWorld(info[0], &world); !s.ok()) return Throw(env, s);
  const int64_t tag = Int64(info[1]), timeout_ms = Int64(info[3]);
  const Napi::Uint8Array card = info[2].As<Napi::Uint8Array>();
  if (tag < 0 || tag >= world->tags || timeout_ms < 1 || card.ByteLength() > kMaxCardBytes) return Throw(env, Bad("tag, card or timeoutMs is out of range"));
  auto cards = std::make_shared<std::vector<std::optional<std::string>>>();
  return Work::Start(
      env,
      [=, text = std::string(reinterpret_cast<const char*>(card.Data()), card.ByteLength())] {
        return ExchangeCards(*world, static_cast<int>(tag), text, Deadline::AfterMs(timeout_ms), cards.get());
      },
      [cards](Napi::Env settled) -> Napi::Value {
        Napi::Array list = Napi::Array::New(settled, cards->size());
        for (uint32_t rank = 0; rank < cards->size(); rank++) {
          const std::optional<std::string>& one = (*cards)[rank];
          list.Set(rank, one.has_value() ? Napi::Value(Napi::Buffer<char>::Copy(settled, one->data(), one->size())) : settled.Undefined());
        }
        return list;
      });
}

class MpiCourierHandle : public Napi::ObjectWrap<MpiCourierHandle> {
 public:
  static Napi::Function Define(Napi::Env env) { return DefineClass(env, "MpiCourier", {InstanceMethod("close", &MpiCourierHandle::CloseJs)}); }

  /// new MpiCourier(world, mailbox, tag, peers, hosts): peers are ranks of the job, on these hosts.
  explicit MpiCourierHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<MpiCourierHandle>(info) {
    const Status status = Open(info);
    if (!status.ok()) Throw(info.Env(), status);
  }
  ~MpiCourierHandle() override {
    if (has_hook_) napi_remove_env_cleanup_hook(Env(), &MpiCourierHandle::AtExit, this);
    AtExit(this);
  }

 private:
  Status Open(const Napi::CallbackInfo& info) {
    if (info.Length() < 5 || !info[2].IsNumber() || !info[3].IsArray() || !info[4].IsArray()) return Bad("MpiCourier takes (world, mailbox, tag, peers, hosts)");
    const MpiWorld* world;
    if (Status s = ReadWorld(info[0], &world); !s.ok()) return s;
    const std::shared_ptr<Mailbox> mailbox = MailboxOf(info[1]);
    const int64_t tag = Int64(info[2]);
    if (mailbox == nullptr || tag < 0 || tag >= world->tags) return Bad("mailbox must be a Mailbox, tag one of the MPI");
    if (mailbox->config().rank != world->rank || mailbox->config().world_size != world->size) return Bad("the mailbox is not of this rank of the MPI");
    std::vector<std::pair<int, std::string>> peers;
    const Napi::Array list = info[3].As<Napi::Array>(), hosts = info[4].As<Napi::Array>();
    for (uint32_t i = 0; i < list.Length(); i++) {
      const int peer = list.Get(i).ToNumber().Int32Value();
      if (peer < 0 || peer >= world->size || peer == world->rank) return Bad("peers must be other ranks of the MPI");
      peers.emplace_back(peer, hosts.Get(i).ToString().Utf8Value());
    }
    courier_ = MpiCourier::Start(*world, mailbox, static_cast<int>(tag), std::move(peers));
    // A process that ends without close() ends the thread, too.
    napi_add_env_cleanup_hook(info.Env(), &MpiCourierHandle::AtExit, this);
    has_hook_ = true;
    return Status::Ok();
  }

  static void AtExit(void* self) {
    std::shared_ptr<MpiCourier>& courier = static_cast<MpiCourierHandle*>(self)->courier_;
    if (courier != nullptr) courier->Close();
    courier.reset();
  }

  /// close() -> Promise: what was sent goes out first.
  Napi::Value CloseJs(const Napi::CallbackInfo& info) {
    return Work::Start(
        info.Env(),
        [courier = std::exchange(courier_, nullptr)] {
          if (courier != nullptr) courier->Close();
          return Status::Ok();
        },
        [](Napi::Env env) -> Napi::Value { return env.Undefined(); });
  }

  std::shared_ptr<MpiCourier> courier_;
  bool has_hook_ = false;
};

}  // namespace

void RegisterMpi(Napi::Env env, Napi::Object exports) {
  exports.Set("MpiCourier", MpiCourierHandle::Define(env));
  exports.Set("exchangeCards", Napi::Function::New(env, ExchangeCardsJs, "exchangeCards"));
}

}  // namespace tilerank
