// topology/* and the report of kernels/dispatch.* for JavaScript: getAffinity, setAffinity, setMemoryPolicy,
// dieWithParent, reap, availableMemory, tiers.
#include <sys/wait.h>
#include <unistd.h>

#include "addon.h"
#include "comm/arena.h"
#include "kernels/dispatch.h"
#include "topology/topology.h"

namespace tilerank {
namespace {

/// An array of small integers, or a thrown TypeError and false.
bool ReadIds(const Napi::CallbackInfo& info, size_t index, const char* name, std::vector<int32_t>* ids) {
  Napi::Env env = info.Env();
  const auto fail = [&] {
    ToError(env, Status(Code::kInvalidArgument, std::string(name) + " must be an array of integers")).ThrowAsJavaScriptException();
    return false;
  };
  if (info.Length() <= index || !info[index].IsArray()) return fail();
  const Napi::Array array = info[index].As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Value value = array.Get(i);
    if (!value.IsNumber()) return fail();
    const double number = value.As<Napi::Number>().DoubleValue();
    if (number != static_cast<double>(static_cast<int32_t>(number))) return fail();
    ids->push_back(static_cast<int32_t>(number));
  }
  return true;
}

bool ReadPid(const Napi::CallbackInfo& info, size_t index, int32_t* pid) {
  if (info.Length() > index && info[index].IsNumber()) {
    *pid = info[index].As<Napi::Number>().Int32Value();
    if (*pid >= 0) return true;
  }
  ToError(info.Env(), Status(Code::kInvalidArgument, "pid must be a process or thread id, or 0 for the calling thread"))
      .ThrowAsJavaScriptException();
  return false;
}

/// getAffinity(pid) -> number[]
Napi::Value GetAffinityJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int32_t pid;
  if (!ReadPid(info, 0, &pid)) return env.Undefined();
  std::vector<int32_t> cpus;
  if (Status s = GetAffinity(pid, &cpus); !s.ok()) {
    ToError(env, s).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  Napi::Array array = Napi::Array::New(env, cpus.size());
  for (size_t i = 0; i < cpus.size(); i++) array.Set(static_cast<uint32_t>(i), cpus[i]);
  return array;
}

/// setAffinity(pid, cpus)
Napi::Value SetAffinityJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int32_t pid;
  std::vector<int32_t> cpus;
  if (!ReadPid(info, 0, &pid) || !ReadIds(info, 1, "cpus", &cpus)) return env.Undefined();
  if (Status s = SetAffinity(pid, cpus); !s.ok()) ToError(env, s).ThrowAsJavaScriptException();
  return env.Undefined();
}

/// setMemoryPolicy(nodes) -> warning, empty when all is well
Napi::Value SetMemoryPolicyJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::vector<int32_t> nodes;
  if (!ReadIds(info, 0, "nodes", &nodes)) return env.Undefined();
  std::string warning;
  if (Status s = SetMemoryPolicy(nodes, &warning); !s.ok()) {
    ToError(env, s).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  return Napi::String::New(env, warning);
}

/// dieWithParent(parentPid)
Napi::Value DieWithParentJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int32_t pid;
  if (!ReadPid(info, 0, &pid)) return env.Undefined();
  if (Status s = DieWithParent(pid); !s.ok()) ToError(env, s).ThrowAsJavaScriptException();
  return env.Undefined();
}

/// tiers() -> [{ name, available, reason }], best first
Napi::Value TiersJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const std::vector<TierReport> tiers = ReportTiers();
  Napi::Array array = Napi::Array::New(env, tiers.size());
  for (size_t i = 0; i < tiers.size(); i++) {
    Napi::Object tier = Napi::Object::New(env);
    tier.Set("name", tiers[i].name);
    tier.Set("available", tiers[i].available);
    tier.Set("reason", tiers[i].reason);
    array.Set(static_cast<uint32_t>(i), tier);
  }
  return array;
}

/// availableMemory(root) -> { bytes, file }
Napi::Value AvailableMemoryJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string file;
  const std::string root = info.Length() > 0 && info[0].IsString() ? info[0].As<Napi::String>().Utf8Value() : "";
  const size_t bytes = AvailableMemory(root, &file);
  Napi::Object result = Napi::Object::New(env);
  result.Set("bytes", static_cast<double>(bytes));
  result.Set("file", file);
  return result;
}

/// reap(pid) -> whether a child that has ended is gone from the list of processes now
Napi::Value ReapJs(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int32_t pid;
  if (!ReadPid(info, 0, &pid)) return env.Undefined();
  return Napi::Boolean::New(env, pid > 0 && waitpid(pid, nullptr, WNOHANG) == pid);
}

}  // namespace

void RegisterTopology(Napi::Env env, Napi::Object exports) {
  exports.Set("getAffinity", Napi::Function::New(env, GetAffinityJs, "getAffinity"));
  exports.Set("setAffinity", Napi::Function::New(env, SetAffinityJs, "setAffinity"));
  exports.Set("setMemoryPolicy", Napi::Function::New(env, SetMemoryPolicyJs, "setMemoryPolicy"));
  exports.Set("dieWithParent", Napi::Function::New(env, DieWithParentJs, "dieWithParent"));
  exports.Set("availableMemory", Napi::Function::New(env, AvailableMemoryJs, "availableMemory"));
  exports.Set("reap", Napi::Function::New(env, ReapJs, "reap"));
  exports.Set("tiers", Napi::Function::New(env, TiersJs, "tiers"));
  exports.Set("pageSize", static_cast<double>(sysconf(_SC_PAGESIZE)));
}

}  // namespace tilerank
