// What the addon_*.cpp files of class Communicator share: reading what JavaScript hands over, and looking before waiting.
#pragma once
#include <napi.h>

#include <string>

#include "addon.h"
#include "comm/algorithm_table.h"
#include "comm/communicator.h"
#include "comm/sync.h"
#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

/// How long an asynchronous call may hold the event loop in the hope of ending at once: about what handing over costs.
constexpr int64_t kLookNs = 20'000;
/// Above this, the work alone takes longer than that.
constexpr size_t kInlineBytes = 128 << 10;

/// True as soon as it is ready. Where ranks outnumber cores it looks once.
template <class IsReady>
bool LookUntil(int64_t end_ns, const Communicator& communicator, IsReady is_ready) {
  while (!is_ready()) {
    if (communicator.spin_us() == 0 || NowNs() >= end_ns) return false;
    Pause();
  }
  return true;
}

inline Napi::Value Throw(Napi::Env env, const Status& status) {
  ToError(env, status).ThrowAsJavaScriptException();
  return env.Undefined();
}

inline Status Bad(const std::string& what) { return Status(Code::kInvalidArgument, what); }

/// Reads fields of an options object; the first wrong one sticks.
struct Options {
  Napi::Object object;
  Status status;
  int64_t Integer(const char* key, int64_t lowest, int64_t highest) {
    const Napi::Value value = object.Get(key);
    const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1e300;
    if (number >= static_cast<double>(lowest) && number <= static_cast<double>(highest)) return static_cast<int64_t>(number);
    if (status.ok()) status = Bad(std::string("option ") + key + " must be an integer from " + std::to_string(lowest) + " to " + std::to_string(highest));
    return lowest;
  }
  std::string Text(const char* key) {
    const Napi::Value value = object.Get(key);
    if (value.IsString()) return value.As<Napi::String>().Utf8Value();
    if (status.ok()) status = Bad(std::string("option ") + key + " must be a string");
    return {};
  }
};

inline int64_t Int64(const Napi::Value& value) { return value.As<Napi::Number>().Int64Value(); }

inline bool IsDType(int64_t dtype) { return dtype >= 0 && dtype < kDTypes; }

/// [rows][operation, is a tensor, up to bytes, algorithm, chunk bytes], as AlgorithmTable of collectives/algorithms.ts makes it.
Status ReadTable(const Napi::Value& value, size_t slot_bytes, AlgorithmTable* table);

}  // namespace tilerank
