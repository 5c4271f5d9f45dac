// The addon's registration. Each addon_*.cpp unpacks arguments for one folder below native/ and turns a Status into a
// JavaScript error; no algorithm lives here. Loads in workers and more than once a process: no mutable global.
#include "addon.h"

namespace tilerank {

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  RegisterTopology(env, exports);
  RegisterLinear(env, exports);
  RegisterRows(env, exports);
  RegisterComm(env, exports);
  RegisterMailbox(env, exports);
  RegisterZmq(env, exports);
  RegisterMpi(env, exports);
  RegisterSimulator(env, exports);
  RegisterRunner(env, exports);
  RegisterRecorder(env, exports);
  return exports;
}

Napi::Error ToError(Napi::Env env, const Status& status) {
  static constexpr const char* kNames[] = {"OK",          "ERR_INVALID_ARGUMENT", "ERR_TIMEOUT",   "ERR_PEER_LOST",
                                           "ERR_MISMATCH", "ERR_ABORTED",         "ERR_BUSY",      "ERR_CLOSED",
                                           "ERR_NO_MEMORY", "ERR_IO",             "ERR_UNSUPPORTED", "ERR_INTERNAL"};
  Napi::Error error = Napi::Error::New(env, status.message());
  Napi::Object object = error.Value();
  object.Set("code", kNames[static_cast<int>(status.code())]);
  for (const auto& [key, value] : status.numbers()) object.Set(key, value);
  for (const auto& [key, value] : status.texts()) object.Set(key, value);
  return error;
}

}  // namespace tilerank

static Napi::Object InitAddon(Napi::Env env, Napi::Object exports) { return tilerank::Init(env, exports); }
NODE_API_MODULE(NODE_GYP_MODULE_NAME, InitAddon)
