// The ZeroMQ leg for JavaScript (comm/zmq_courier.h): class ZmqCourier.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "addon.h"
#include "addon_call.h"
#include "addon_mailbox.h"
#include "addon_work.h"
#include "comm/zmq_courier.h"

namespace tilerank {

namespace {

class ZmqCourierHandle : public Napi::ObjectWrap<ZmqCourierHandle> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "ZmqCourier",
                       {InstanceMethod("connect", &ZmqCourierHandle::Connect), InstanceMethod("close", &ZmqCourierHandle::CloseJs),
                        InstanceAccessor("endpoint", &ZmqCourierHandle::Endpoint, nullptr), InstanceAccessor("publicKey", &ZmqCourierHandle::PublicKey, nullptr)});
  }

  /// new ZmqCourier(mailbox, endpoint, isEncrypted): listens, with * for a port that the kernel chooses.
  explicit ZmqCourierHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ZmqCourierHandle>(info) {
    const Status status = Open(info);
    if (!status.ok()) Throw(info.Env(), status);
  }
  ~ZmqCourierHandle() override {
    if (has_hook_) napi_remove_env_cleanup_hook(Env(), &ZmqCourierHandle::AtExit, this);
    AtExit(this);
  }

 private:
  Status Open(const Napi::CallbackInfo& info) {
    if (info.Length() < 3 || !info[1].IsString() || !info[2].IsBoolean()) return Bad("ZmqCourier takes (mailbox, endpoint, isEncrypted)");
    const std::shared_ptr<Mailbox> mailbox = MailboxOf(info[0]);
    if (mailbox == nullptr) return Bad("mailbox must be a Mailbox");
    mailbox_ = mailbox;
    if (Status s = ZmqCourier::Open(mailbox, info[1].As<Napi::String>().Utf8Value(), info[2].As<Napi::Boolean>().Value(), &courier_); !s.ok()) return s;
    // A process that ends without close() ends the thread, too.
    napi_add_env_cleanup_hook(info.Env(), &ZmqCourierHandle::AtExit, this);
    has_hook_ = true;
    return Status::Ok();
  }

  static void AtExit(void* self) {
    std::shared_ptr<ZmqCourier>& courier = static_cast<ZmqCourierHandle*>(self)->courier_;
    if (courier != nullptr) courier->Close(false);
    courier.reset();
  }

  Napi::Value Endpoint(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), courier_ != nullptr ? courier_->endpoint() : ""); }
  Napi::Value PublicKey(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), courier_ != nullptr ? courier_->public_key() : ""); }

  /// connect(peers, timeoutMs) -> Promise: peers are { rank, host, pid, endpoint, publicKey }, ranks of the job on other nodes. Once.
  Napi::Value Connect(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 2 || !info[0].IsArray() || !info[1].IsNumber()) return Throw(env, Bad("connect takes (peers, timeoutMs)"));
    if (courier_ == nullptr) return Throw(env, Status(Code::kClosed, "the network between nodes was closed"));
    if (has_peers_) return Throw(env, Bad("connect is called once"));
    const Mailbox::Config& config = mailbox_->config();
    const Napi::Array list = info[0].As<Napi::Array>();
    std::vector<ZmqCourier::Peer> peers;
    for (uint32_t i = 0; i < list.Length(); i++) {
      if (!list.Get(i).IsObject()) return Throw(env, Bad("a peer must be an object"));
      Options given{list.Get(i).As<Napi::Object>(), {}};
      ZmqCourier::Peer peer;
      peer.rank = static_cast<int>(given.Integer("rank", 0, config.world_size - 1));
      peer.host = given.Text("host");
      peer.pid = given.Integer("pid", 0, int64_t{1} << 53);
      peer.endpoint = given.Text("endpoint");
      peer.public_key = given.Text("publicKey");
      for (const ZmqCourier::Peer& other : peers) {
        if (other.rank == peer.rank && given.status.ok()) given.status = Bad("two peers have rank " + std::to_string(peer.rank));
      }
      if (peer.rank == config.rank && given.status.ok()) given.status = Bad("a peer has this rank's number");
      if (!given.status.ok()) return Throw(env, given.status);
      peers.push_back(std::move(peer));
    }
    has_peers_ = true;
    courier_->Connect(std::move(peers));
    const Deadline deadline = Deadline::AfterMs(Int64(info[1]));
    static_cast<void>(deadline.ElapsedNs(NowNs()));  // from now on
    return Work::Start(
        env, [courier = courier_, deadline] { return courier->AwaitConnected(deadline); }, [](Napi::Env settled) -> Napi::Value { return settled.Undefined(); });
  }

  /// close() -> Promise: what was sent goes out first.
  Napi::Value CloseJs(const Napi::CallbackInfo& info) {
    return Work::Start(
        info.Env(),
        [courier = std::exchange(courier_, nullptr)] {
          if (courier != nullptr) courier->Close(true);
          return Status::Ok();
        },
        [](Napi::Env env) -> Napi::Value { return env.Undefined(); });
  }

  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<ZmqCourier> courier_;
  bool has_hook_ = false, has_peers_ = false;
};

}  // namespace

void RegisterZmq(Napi::Env env, Napi::Object exports) { exports.Set("ZmqCourier", ZmqCourierHandle::Define(env)); }

}  // namespace tilerank
