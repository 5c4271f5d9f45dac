// Reading what JavaScript hands to a Communicator, for addon_comm.cpp and addon_call.cpp.
#pragma once
#include <napi.h>

#include <string>

#include "comm/algorithm_table.h"
#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

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
