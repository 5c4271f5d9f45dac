// The addon that is linked with an MPI: tilerank-openmpi.node and tilerank-mpich.node. It starts the MPI, once a process, and hands its
// functions to the other addon (world.h); nothing else is here, so that all that thinks is compiled once and tested with both.
//
// One thread of its own starts the MPI and ends it, as the standard wants both from the same one.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <dlfcn.h>
#include <mpi.h>
#include <napi.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "mpi/world.h"

namespace tilerank {

namespace {

using Clock = std::chrono::steady_clock;

/// Of the process, as MPI itself is: it starts once, and not again after its end. Never freed: threads may be in it while the process ends.
struct State {
  std::mutex calls;  // of MPI
  MPI_Comm comm = MPI_COMM_NULL;
  bool has_lost = false;  // guarded by calls
  std::vector<MPI_Request> requests;
  std::vector<MPI_Status> statuses;
  std::vector<int> indices;
  MpiWorld world = {};

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  bool is_started = false, is_ready = false, is_leaving = false, has_left = false;
  std::string problem;
  int64_t timeout_ms = 0;
};
State& The() {
  static State& state = *new State();
  return state;
}

std::string Explain(int error) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  if (MPI_Error_string(error, text, &length) != MPI_SUCCESS) return "MPI error " + std::to_string(error);
  return std::string(text, static_cast<size_t>(length));
}

MpiRequest Pack(MPI_Request request) {
  static_assert(sizeof request <= sizeof(MpiRequest));
  MpiRequest packed = {};
  std::memcpy(&packed, &request, sizeof request);
  return packed;
}

MPI_Request Unpack(const MpiRequest& packed) {
  MPI_Request request;
  std::memcpy(&request, &packed, sizeof request);
  return request;
}

int Send(const void* data, size_t nbytes, int peer, int tag, MpiRequest* request) {
  MPI_Request made = MPI_REQUEST_NULL;
  const int error = MPI_Isend(data, static_cast<int>(nbytes), MPI_BYTE, peer, tag, The().comm, &made);
  *request = Pack(made);
  return error;
}

int Receive(void* data, size_t nbytes, int peer, int tag, MpiRequest* request) {
  MPI_Request made = MPI_REQUEST_NULL;
  const int error = MPI_Irecv(data, static_cast<int>(nbytes), MPI_BYTE, peer, tag, The().comm, &made);
  *request = Pack(made);
  return error;
}

int Cancel(MpiRequest* request) {
  MPI_Request given = Unpack(*request);
  const int error = MPI_Cancel(&given);
  *request = Pack(given);
  return error;
}

int Test(MpiRequest* requests, size_t count, MpiDone* done, size_t* ended) {
  State& state = The();
  *ended = 0;
  if (state.requests.size() < count) {
    state.requests.resize(count);
    state.statuses.resize(count);
    state.indices.resize(count);
  }
  for (size_t i = 0; i < count; i++) state.requests[i] = Unpack(requests[i]);
  int completed = 0;
  const int error = MPI_Testsome(static_cast<int>(count), state.requests.data(), &completed, state.indices.data(), state.statuses.data());
  if (error != MPI_SUCCESS && error != MPI_ERR_IN_STATUS) return error;
  if (completed == MPI_UNDEFINED) return 0;
  for (int i = 0; i < completed; i++) {
    const MPI_Status& status = state.statuses[static_cast<size_t>(i)];
    const auto index = static_cast<size_t>(state.indices[static_cast<size_t>(i)]);
    MpiDone one = {static_cast<uint32_t>(index), error == MPI_SUCCESS ? 0 : status.MPI_ERROR, 0};
    int bytes = 0;
    if (one.error == 0 && MPI_Get_count(&status, MPI_BYTE, &bytes) == MPI_SUCCESS && bytes > 0) one.nbytes = static_cast<uint64_t>(bytes);
    requests[index] = Pack(state.requests[index]);
    done[(*ended)++] = one;
  }
  return 0;
}

/// Empty, or why the MPI cannot be had.
std::string StartMpi(State& state) {
  int is_initialized = 0;
  MPI_Initialized(&is_initialized);
  if (is_initialized != 0) return "something else in this process has started the MPI already";
  int provided = MPI_THREAD_SINGLE;
  if (int error = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided); error != MPI_SUCCESS) return "MPI_Init_thread failed: " + Explain(error);
  if (provided < MPI_THREAD_SERIALIZED) return "this MPI was built without threads (MPI_THREAD_SERIALIZED): use another build of it";
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  if (int error = MPI_Comm_dup(MPI_COMM_WORLD, &state.comm); error != MPI_SUCCESS) return "MPI_Comm_dup failed: " + Explain(error);
  MPI_Comm_set_errhandler(state.comm, MPI_ERRORS_RETURN);
  MpiWorld& world = state.world;
  MPI_Comm_rank(state.comm, &world.rank);
  MPI_Comm_size(state.comm, &world.size);
  void* most = nullptr;
  int has_most = 0;
  MPI_Comm_get_attr(state.comm, MPI_TAG_UB, &most, &has_most);
  world.version = kMpiWorldVersion;
  world.nbytes = sizeof world;
  world.tags = has_most != 0 ? *static_cast<int*>(most) : 32767;
  world.none = Pack(MPI_REQUEST_NULL);
  world.lock = [] { The().calls.lock(); };
  world.try_lock = [] { return The().calls.try_lock() ? 1 : 0; };
  world.unlock = [] { The().calls.unlock(); };
  world.send = Send;
  world.receive = Receive;
  world.cancel = Cancel;
  world.test = Test;
  world.explain = [](int error, char* text, size_t nbytes) { std::snprintf(text, nbytes, "%s", Explain(error).c_str()); };
  world.give_up = [] { The().has_lost = true; };
  return "";
}

/// Takes what nobody reads any more, such as farewells to groups that are closed: their senders may not finalize before.
void Drain(State& state) {
  for (;;) {
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    int is_there = 0, nbytes = 0;
    if (MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, state.comm, &is_there, &message, &status) != MPI_SUCCESS || is_there == 0) return;
    MPI_Get_count(&status, MPI_BYTE, &nbytes);
    std::vector<std::byte> bytes(static_cast<size_t>(nbytes));
    if (MPI_Mrecv(bytes.data(), nbytes, MPI_BYTE, &message, &status) != MPI_SUCCESS) return;
  }
}

/// The descriptor by which ranks end by word to the launcher (PMI-1), not by MPI_Finalize; -1: by MPI_Finalize, as they should. That function
/// of MPICH before 4.2 hangs now and then over UCX: a rank waits in it for all others without letting UCX work (pmodels/mpich#6596), while another
/// one still needs its answers.
int LauncherDescriptor() {
#if defined(MPICH_NUMVERSION) && MPICH_NUMVERSION < 40200000
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(text, &length);
  const char* descriptor = std::getenv("PMI_FD");
  const bool is_pmi1 = descriptor != nullptr && std::getenv("MPI_LOCALNRANKS") != nullptr && std::strstr(text, "--with-pmi=") == nullptr;
  return is_pmi1 && std::strstr(text, "ch4:ucx") != nullptr ? std::atoi(descriptor) : -1;
#else
  return -1;
#endif
}

/// Says a line of PMI-1 to the launcher and lets the MPI work until it has answered; false: by another line than this one, or not in time, or a
/// rank is lost.
bool Ask(State& state, int fd, const std::string& line, const std::string& expected, Clock::time_point deadline) {
  if (write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) return false;
  for (std::string answer; answer.size() <= expected.size();) {
    pollfd waiting = {fd, POLLIN, 0};
    if (poll(&waiting, 1, 1) > 0) {
      char byte = 0;
      if (read(fd, &byte, 1) != 1) return false;
      answer += byte;
      if (byte == '\n') return answer == expected;
      continue;
    }
    std::lock_guard lock(state.calls);
    if (state.has_lost || Clock::now() > deadline) return false;
    Drain(state);
  }
  return false;
}

// Ends the MPI when all ranks have come to their ends, so that none of it is gone while another one still receives. A rank that is left
// without its end makes mpirun fail, and MPICH's kill the ranks that have not ended yet.
void EndMpi(State& state, Clock::time_point deadline) {
  MPI_Request barrier = MPI_REQUEST_NULL;
  {
    std::lock_guard lock(state.calls);
    if (state.has_lost || MPI_Ibarrier(state.comm, &barrier) != MPI_SUCCESS) return;
  }
  for (int is_over = 0; is_over == 0; std::this_thread::sleep_for(std::chrono::microseconds(500))) {
    std::lock_guard lock(state.calls);
    if (state.has_lost || Clock::now() > deadline || MPI_Test(&barrier, &is_over, MPI_STATUS_IGNORE) != MPI_SUCCESS) return;
    Drain(state);
  }
  if (const int fd = LauncherDescriptor(); fd >= 0) {
    const bool are_all_here = Ask(state, fd, "cmd=barrier_in\n", "cmd=barrier_out\n", deadline);
    if (are_all_here) Ask(state, fd, "cmd=finalize\n", "cmd=finalize_ack\n", deadline);
    return;
  }
  state.calls.lock();  // and never let go: nobody calls it any more
  MPI_Finalize();
}

void Run(State& state) {
  std::string problem = StartMpi(state);
  std::unique_lock lock(state.mutex);
  const bool is_usable = problem.empty();
  state.problem = std::move(problem);
  state.is_ready = true;
  state.changed.notify_all();
  state.changed.wait(lock, [&] { return state.is_leaving; });
  const auto deadline = Clock::now() + std::chrono::milliseconds(state.timeout_ms);
  lock.unlock();
  if (is_usable) EndMpi(state, deadline);
  lock.lock();
  state.has_left = true;
  state.changed.notify_all();
}

// At the end of the process: also of one that ends by process.exit(), where Node.js calls no hook of an addon.
void Leave() {
  State& state = The();
  std::unique_lock lock(state.mutex);
  if (!state.is_ready) return;  // still waits for ranks that did not come
  state.is_leaving = true;
  state.changed.notify_all();
  // The thread keeps to the deadline itself, but not inside of the MPI.
  state.changed.wait_for(lock, std::chrono::milliseconds(state.timeout_ms + 5000), [&] { return state.has_left; });
}

class StartWorker : public Napi::AsyncWorker {
 public:
  StartWorker(Napi::Env env, int64_t timeout_ms) : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), timeout_ms_(timeout_ms) {}
  Napi::Promise promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override {
    State& state = The();
    std::unique_lock lock(state.mutex);
    state.timeout_ms = timeout_ms_;
    if (!state.is_started) {
      state.is_started = true;
      std::thread([&state] { Run(state); }).detach();
    }
    const auto is_ready = [&] { return state.is_ready; };
    if (!state.changed.wait_for(lock, std::chrono::milliseconds(timeout_ms_), is_ready)) {
      code_ = "ERR_TIMEOUT";
      SetError("MPI_Init did not end within " + std::to_string(timeout_ms_) + " ms: it waits for all ranks of mpirun to call it");
    } else if (!state.problem.empty()) {
      code_ = "ERR_IO";
      SetError(state.problem);
    }
  }
  void OnOK() override {
    const Napi::Env env = Env();
    MpiWorld& world = The().world;
    Napi::Object result = Napi::Object::New(env);
    Napi::External<MpiWorld> external = Napi::External<MpiWorld>::New(env, &world);
    const napi_type_tag tag = {kMpiWorldTag[0], kMpiWorldTag[1]};
    external.TypeTag(&tag);
    result.Set("rank", world.rank);
    result.Set("size", world.size);
    result.Set("tags", world.tags);
    result.Set("world", external);
    deferred_.Resolve(result);
  }
  void OnError(const Napi::Error& error) override {
    error.Value().Set("code", code_);
    deferred_.Reject(error.Value());
  }

 private:
  Napi::Promise::Deferred deferred_;
  const int64_t timeout_ms_;
  const char* code_ = "ERR_INTERNAL";
};

/// start(timeoutMs) -> Promise<{ rank, size, tags, world }>: starts the MPI, or finds it started.
Napi::Value Start(const Napi::CallbackInfo& info) {
  const int64_t timeout_ms = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().Int64Value() : 0;
  auto* worker = new StartWorker(info.Env(), timeout_ms);
  worker->Queue();
  return worker->promise();
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  static std::once_flag once;
  std::call_once(once, [] {
    // Components that the MPI loads look for its symbols among the global ones, and Node.js loads addons as local. Never unloaded: Leave is in it.
    Dl_info place;
    if (dladdr(reinterpret_cast<void*>(&MPI_Init_thread), &place) != 0) dlopen(place.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
    if (dladdr(reinterpret_cast<void*>(&Leave), &place) != 0) dlopen(place.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    // No handlers of Open MPI for SIGSEGV and others beside those of Node.js.
    setenv("OMPI_MCA_opal_signal", "", 1);
#ifndef OPEN_MPI
    // By which MPICH's launcher tells ranks that one is lost (-disable-auto-cleanup). MPICH counts it and calls the handler before its own, be
    // that SIG_IGN, and that of Node.js opens its debugger.
    std::signal(SIGUSR1, [](int) {});
#endif
    std::atexit(Leave);
  });
  exports.Set("start", Napi::Function::New(env, Start, "start"));
  return exports;
}

}  // namespace

}  // namespace tilerank

static Napi::Object InitAddon(Napi::Env env, Napi::Object exports) { return tilerank::Init(env, exports); }
NODE_API_MODULE(NODE_GYP_MODULE_NAME, InitAddon)
