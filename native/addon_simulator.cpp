// sim/simulator.h for JavaScript: simulate.
#include <cmath>

#include "addon.h"
#include "addon_call.h"
#include "comm/all_reduce.h"
#include "comm/comm_handle.h"
#include "comm/hierarchical.h"
#include "kernels/dispatch.h"
#include "sim/simulator.h"

namespace tilerank {

namespace {

constexpr double kMostNs = 1e12;

// Nanoseconds, of any fraction.
SimTime Time(Options& given, const char* key) {
  const Napi::Value value = given.object.Get(key);
  const double ns = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (ns >= 0 && ns <= kMostNs) return std::llround(ns * 1000);
  if (given.status.ok()) given.status = Bad(std::string("option ") + key + " must be a number of nanoseconds");
  return 0;
}

// Nanoseconds a byte, as bytes a picosecond.
double Rate(Options& given, const char* key) {
  const Napi::Value value = given.object.Get(key);
  const double ns = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (ns >= 1e-9 && ns <= kMostNs) return 1 / (ns * 1000);
  if (given.status.ok()) given.status = Bad(std::string("option ") + key + " must be a positive number of nanoseconds a byte");
  return 1;
}

Status ReadMachine(Options& given, SimMachine* machine, int* world_size) {
  const Napi::Value ranks = given.object.Get("ranks");
  if (!ranks.IsArray()) return Bad("option ranks must be a list with a number for each node");
  const Napi::Array list = ranks.As<Napi::Array>();
  *world_size = 0;
  for (uint32_t node = 0; node < list.Length() && *world_size <= kMaxWorldSize; node++) {
    const Napi::Value size = list.Get(node);
    const double number = size.IsNumber() ? size.As<Napi::Number>().DoubleValue() : 0;
    if (!(number >= 1 && number <= kMaxWorldSize && number == std::floor(number))) return Bad("every node has one rank or more");
    machine->ranks.push_back(static_cast<int>(number));
    *world_size += machine->ranks.back();
  }
  if (*world_size < 1 || *world_size > kMaxWorldSize) return Bad("1 to " + std::to_string(kMaxWorldSize) + " ranks can be simulated");
  machine->sockets = static_cast<int>(given.Integer("sockets", 1, 64));
  machine->cores = static_cast<int>(given.Integer("cores", 0, kMaxWorldSize));
  machine->switch_time = Time(given, "switchNs");
  machine->call_time = Time(given, "callNs");
  machine->core_latency = Time(given, "coreNs");
  machine->socket_latency = Time(given, "socketNs");
  machine->memory_rate = Rate(given, "memoryNsPerByte");
  machine->socket_rate = Rate(given, "socketNsPerByte");
  machine->link_latency = Time(given, "linkNs");
  machine->link_rate = Rate(given, "linkNsPerByte");
  machine->frame_time = Time(given, "frameNs");
  machine->frame_bytes = static_cast<size_t>(given.Integer("frameBytes", 4096, 64 << 20));
  machine->window = static_cast<int>(given.Integer("window", 8, 1024));
  if (given.status.ok() && machine->frame_bytes % 64 != 0) return Bad("option frameBytes must be a multiple of 64");
  return given.status;
}

Status ReadSimCall(Options& given, int world_size, bool has_nodes, SimCall* call) {
  const int64_t op = given.Integer("op", static_cast<int64_t>(CollectiveOp::kBarrier), static_cast<int64_t>(CollectiveOp::kAllToAll));
  const int64_t dtype = given.Integer("dtype", 0, kDTypes - 1);
  const int64_t algorithm = given.Integer("algorithm", 0, UINT16_MAX);
  call->op = static_cast<CollectiveOp>(op);
  call->dtype = static_cast<DType>(dtype);
  call->count = static_cast<size_t>(given.Integer("count", 0, int64_t{1} << 40));
  call->root = static_cast<int>(given.Integer("root", 0, world_size - 1));
  call->chunk_bytes = static_cast<size_t>(given.Integer("chunkBytes", 64, int64_t{1} << 40));
  call->calls = static_cast<int>(given.Integer("calls", 1, 1 << 20));
  call->absent = static_cast<int>(given.Integer("absent", -1, world_size - 1));
  call->spoiled = static_cast<int>(given.Integer("spoiled", -1, world_size - 1));
  call->differing = static_cast<int>(given.Integer("differing", -1, world_size - 1));
  call->wire = static_cast<Wire>(given.Integer("wire", 0, 1));
  call->memory_limit = static_cast<size_t>(given.Integer("memoryLimit", 1, int64_t{1} << 50));
  if (!given.status.ok()) return given.status;
  if (call->op == CollectiveOp::kExchange) return Bad("no such operation");
  if (call->dtype != DType::kF32 && call->dtype != DType::kBf16) return Bad("f32 and bf16 are simulated");
  if (call->chunk_bytes % 64 != 0) return Bad("option chunkBytes must be a multiple of 64");
  const bool is_whole = call->op == CollectiveOp::kAllReduce || call->op == CollectiveOp::kReduce || call->op == CollectiveOp::kBroadcast;
  if (!is_whole && call->count % static_cast<size_t>(world_size) != 0) return Bad("count must be as many elements for each rank");
  if (!is_whole && call->chunk_bytes < static_cast<size_t>(world_size) * 64) return Bad("chunks need 64 bytes for each rank");
  if (call->op == CollectiveOp::kAllReduce) {
    const bool is_of_nodes = algorithm > kNetworkAlgorithms;
    const int64_t last = static_cast<int64_t>(has_nodes ? kNetworkAlgorithms + static_cast<int>(NetworkAlgorithm::kTwoStep) : static_cast<int>(AllReduceAlgorithm::kTwoShotInPlace));
    if (algorithm > last || (algorithm != 0 && is_of_nodes != has_nodes) || (algorithm == 0 && !has_nodes)) return Bad("no such algorithm for that many nodes");
    call->algorithm = static_cast<uint16_t>(is_of_nodes ? algorithm - kNetworkAlgorithms : algorithm);
  }
  return Status::Ok();
}

/// simulate({ ranks, sockets, cores, switchNs, callNs, coreNs, socketNs, memoryNsPerByte, socketNsPerByte, linkNs, linkNsPerByte, frameNs, frameBytes, window,
/// op, dtype, count, algorithm, root, chunkBytes, calls, wire, absent, spoiled, differing, memoryLimit }) -> SimReport
Napi::Value SimulateJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto fail = [&](const Status& status) {
    ToError(env, status).ThrowAsJavaScriptException();
    return env.Undefined();
  };
  if (info.Length() < 1 || !info[0].IsObject()) return fail(Bad("simulate takes one object of options"));
  Options given{info[0].As<Napi::Object>(), {}};
  SimMachine machine;
  SimCall call;
  SimReport report;
  int world_size = 0;
  if (Status s = ReadMachine(given, &machine, &world_size); !s.ok()) return fail(s);
  const bool has_nodes = machine.ranks.size() > 1;
  if (Status s = ReadSimCall(given, world_size, has_nodes, &call); !s.ok()) return fail(s);
  const Kernels* kernels;
  if (Status s = SelectKernels("", &kernels); !s.ok()) return fail(s);
  if (Status s = Simulate(*kernels, machine, call, &report); !s.ok()) return fail(s);
  Napi::Object result = Napi::Object::New(env);
  const auto set = [&](const char* key, uint64_t value) { result.Set(key, static_cast<double>(value)); };
  set("algorithm", report.algorithm == 0 || !has_nodes ? report.algorithm : static_cast<uint64_t>(kNetworkAlgorithms + report.algorithm));
  set("chosen", report.chosen == 0 ? 0 : static_cast<uint64_t>(kNetworkAlgorithms + report.chosen));
  result.Set("ns", static_cast<double>(report.time) / 1000);
  set("syncs", report.syncs);
  set("hops", report.hops);
  set("frames", report.frames);
  set("rankBytes", report.rank_bytes);
  set("nicBytes", report.nic_bytes);
  set("networkBytes", report.network_bytes);
  set("memoryBytes", report.memory_bytes);
  set("socketBytes", report.socket_bytes);
  return result;
}

}  // namespace

void RegisterSimulator(Napi::Env env, Napi::Object exports) { exports.Set("simulate", Napi::Function::New(env, SimulateJs, "simulate")); }

}  // namespace tilerank
