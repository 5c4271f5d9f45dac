// Waiting for what a transport does, in the addon_*.cpp files of transports.
#pragma once
#include <napi.h>

#include <functional>
#include <utility>

#include "addon.h"
#include "status.h"

namespace tilerank {

/// One piece of work on a thread of libuv, for a promise.
class Work final : public Napi::AsyncWorker {
 public:
  Work(Napi::Env env, std::function<Status()> work, std::function<Napi::Value(Napi::Env)> result)
      : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), result_(std::move(result)) {}
  static Napi::Value Start(Napi::Env env, std::function<Status()> work, std::function<Napi::Value(Napi::Env)> result) {
    auto* worker = new Work(env, std::move(work), std::move(result));
    worker->Queue();
    return worker->deferred_.Promise();
  }

 protected:
  void Execute() override { status_ = work_(); }
  void OnOK() override {
    if (status_.ok()) deferred_.Resolve(result_(Env()));
    else deferred_.Reject(ToError(Env(), status_).Value());
  }

 private:
  Napi::Promise::Deferred deferred_;
  const std::function<Status()> work_;
  const std::function<Napi::Value(Napi::Env)> result_;
  Status status_;
};

}  // namespace tilerank
