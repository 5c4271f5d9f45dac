// Runner for JavaScript: decodes the Program object of tp/program.ts and the load list, posts jobs, and settles promises from the
// leader thread through one ThreadSafeFunction a runner.
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "addon.h"
#include "comm/comm_handle.h"
#include "kernels/dispatch.h"
#include "runner/runner.h"

namespace tilerank {

namespace {

// Reads fields of a plain object; the first wrong one sticks, so that a decoder is a list of reads and one check.
class Fields {
 public:
  Fields(Napi::Env env, std::string where) : env_(env), where_(std::move(where)) {}
  const Status& status() const { return status_; }
  void Fail(const std::string& what) {
    if (status_.ok()) status_ = Status(Code::kInvalidArgument, where_ + ": " + what);
  }
  double Number(const Napi::Object& object, const char* key, double lowest, double highest) {
    const Napi::Value value = object.Get(key);
    if (!value.IsNumber()) return Fail(std::string(key) + " is not a number"), lowest;
    const double number = value.As<Napi::Number>().DoubleValue();
    if (!(number >= lowest && number <= highest)) return Fail(std::string(key) + " is out of range"), lowest;
    return number;
  }
  int32_t Int(const Napi::Object& object, const char* key, int32_t lowest = 0, int32_t highest = INT32_MAX) {
    return static_cast<int32_t>(Number(object, key, lowest, highest));
  }
  std::string Text(const Napi::Object& object, const char* key) {
    const Napi::Value value = object.Get(key);
    if (!value.IsString()) return Fail(std::string(key) + " is not a string"), std::string();
    return value.As<Napi::String>().Utf8Value();
  }
  bool Flag(const Napi::Object& object, const char* key) {
    const Napi::Value value = object.Get(key);
    if (!value.IsBoolean()) return Fail(std::string(key) + " is not a boolean"), false;
    return value.As<Napi::Boolean>().Value();
  }
  Napi::Object Object(const Napi::Object& object, const char* key) {
    const Napi::Value value = object.Get(key);
    if (!value.IsObject()) return Fail(std::string(key) + " is not an object"), Napi::Object::New(env_);
    return value.As<Napi::Object>();
  }
  std::vector<Napi::Object> List(const Napi::Object& object, const char* key) {
    std::vector<Napi::Object> items;
    const Napi::Value value = object.Get(key);
    if (!value.IsArray()) return Fail(std::string(key) + " is not an array"), items;
    const Napi::Array array = value.As<Napi::Array>();
    for (uint32_t i = 0; i < array.Length(); i++) {
      const Napi::Value item = array.Get(i);
      if (!item.IsObject()) return Fail(std::string(key) + " holds something that is no object"), items;
      items.push_back(item.As<Napi::Object>());
    }
    return items;
  }
  DType Type(const Napi::Object& object, const char* key) {
    const std::string name = Text(object, key);
    if (name == "f32") return DType::kF32;
    if (name == "bf16") return DType::kBf16;
    if (name == "f16") return DType::kF16;
    return Fail(std::string(key) + " is no dtype"), DType::kF32;
  }
  /// Index of a name among those declared before; -1 and an error when there is none.
  int32_t Index(const std::map<std::string, int32_t>& names, const std::string& name, const char* what) {
    const auto found = names.find(name);
    if (found == names.end()) return Fail(std::string("no ") + what + " is named '" + name + "'"), 0;
    return found->second;
  }

 private:
  Napi::Env env_;
  std::string where_;
  Status status_;
};

Line DecodeLine(Fields& fields, const Napi::Object& object, const std::map<std::string, int32_t>& buffers,
                const std::map<std::string, int32_t>& weights) {
  Line line{};
  const std::string op = fields.Text(object, "op");
  const auto buffer = [&](const char* key) { return fields.Index(buffers, fields.Text(object, key), "buffer"); };
  const auto weight = [&](const char* key) { return fields.Index(weights, fields.Text(object, key), "weight"); };
  if (op == "embed") {
    line.op = Op::kEmbed;
    line.weight = weight("weight");
    line.vocab_start = fields.Int(object, "vocabStart");
  } else if (op == "linear") {
    line.op = Op::kLinear;
    line.weight = weight("weight");
    line.x = buffer("x");
    line.y = fields.Text(object, "y") == "slot" ? kSlot : buffer("y");
    line.activation = fields.Text(object, "activation") == "siluMul" ? Activation::kSiluMul : Activation::kNone;
  } else if (op == "allReduceResidualNorm") {
    line.op = Op::kAllReduceResidualNorm;
    line.add_residual = fields.Flag(object, "addResidual");
    line.bias = object.Get("bias").IsUndefined() ? -1 : weight("bias");
    line.gamma = weight("gamma");
    line.gamma_layer = fields.Int(object, "gammaLayer", 0, 1);
    line.y = buffer("y");
  } else if (op == "ropeKvWrite") {
    line.op = Op::kRopeKvWrite;
    line.x = buffer("qkv");
  } else if (op == "attention") {
    line.op = Op::kAttention;
    line.x = buffer("q");
    line.y = buffer("out");
    line.scale = static_cast<float>(fields.Number(object, "scale", 0, 1e6));
    for (const Napi::Object& group : fields.List(object, "groups")) {
      line.groups.push_back({fields.Int(group, "kvHead"), fields.Int(group, "firstHead"), fields.Int(group, "numHeads", 1)});
    }
  } else if (op == "selectRows") {
    line.op = Op::kSelectRows;
    line.x = buffer("x");
    line.y = buffer("y");
  } else if (op == "logits") {
    line.op = Op::kLogits;
    line.x = buffer("x");
    line.vocab_start = fields.Int(object, "vocabStart");
    line.vocab_count = fields.Int(object, "vocabCount");
  } else {
    fields.Fail("unknown operation '" + op + "'");
  }
  return line;
}

// Shapes that the kernels rely on. The compiler's checkProgram says more, and earlier; this keeps memory safe whoever made the object.
void CheckLine(Fields& fields, const Program& program, const Line& line, bool is_layer) {
  const auto buffer = [&](int32_t i) -> const BufferSpec& { return program.buffers[static_cast<size_t>(i)]; };
  const auto weight = [&](int32_t i) -> const WeightSpec& { return program.weights[static_cast<size_t>(i)]; };
  const auto require = [&](bool holds, const char* what) {
    if (!holds) fields.Fail(what);
  };
  const int32_t qkv_columns = (program.num_heads + 2 * program.num_kv_heads) * program.head_dim;
  switch (line.op) {
    case Op::kEmbed:
      require(weight(line.weight).is_linear && weight(line.weight).k == program.hidden_size, "embed needs a table of hiddenSize columns");
      break;
    case Op::kLinear: {
      const WeightSpec& w = weight(line.weight);
      require(w.is_linear && w.k <= buffer(line.x).columns && w.dtype == buffer(line.x).dtype, "linear: input does not fit the weight");
      require(w.copies == 1 || (is_layer && w.copies == program.num_layers), "linear: a weight per layer outside the layers");
      const int32_t outputs = line.activation == Activation::kSiluMul ? w.n / 2 : w.n;
      require(line.activation == Activation::kNone || w.n % 32 == 0, "linear: siluMul needs whole pairs of panels");
      // A row stride is a multiple of 32, so the last panel may write its zero columns behind the true width.
      const auto panels = [](int32_t columns) { return (columns + kPanel - 1) / kPanel; };
      if (line.y == kSlot) {
        require(outputs == program.hidden_size && !buffer(line.x).is_logit_rows, "linear: the slot holds hiddenSize columns a token");
      } else {
        require(panels(outputs) <= panels(buffer(line.y).columns) && buffer(line.y).is_logit_rows == buffer(line.x).is_logit_rows,
                "linear: output does not fit its buffer");
      }
      break;
    }
    case Op::kAllReduceResidualNorm: {
      require(!weight(line.gamma).is_linear && weight(line.gamma).n == program.hidden_size, "norm weight is no vector of hiddenSize");
      const int32_t last = (is_layer ? program.num_layers - 1 : 0) + line.gamma_layer;
      require(weight(line.gamma).copies > last, "norm weight has too few layers");
      if (line.bias >= 0) {
        require(!weight(line.bias).is_linear && weight(line.bias).n == program.hidden_size, "bias is no vector of hiddenSize");
        require(weight(line.bias).copies == 1 || (is_layer && weight(line.bias).copies == program.num_layers), "bias has too few layers");
      }
      require(buffer(line.y).columns == program.hidden_size && !buffer(line.y).is_logit_rows, "norm output is not [tokens, hiddenSize]");
      require(buffer(line.y).dtype == program.dtype, "norm output has another dtype than the program");
      break;
    }
    case Op::kRopeKvWrite:
      require(buffer(line.x).columns >= qkv_columns && buffer(line.x).dtype == program.dtype && !buffer(line.x).is_logit_rows,
              "ropeKvWrite: qkv does not hold the heads");
      break;
    case Op::kAttention:
      require(buffer(line.x).columns >= program.num_heads * program.head_dim && buffer(line.y).columns >= program.num_heads * program.head_dim &&
                  buffer(line.x).dtype == program.dtype && buffer(line.y).dtype == program.dtype,
              "attention: operands do not hold the heads");
      for (const HeadGroup& group : line.groups) {
        require(group.kv_head < program.num_kv_heads && group.first_head + group.num_heads <= program.num_heads, "attention: no such head");
      }
      break;
    case Op::kSelectRows:
      require(buffer(line.x).columns == buffer(line.y).columns && buffer(line.x).dtype == buffer(line.y).dtype &&
                  !buffer(line.x).is_logit_rows && buffer(line.y).is_logit_rows,
              "selectRows: operands differ in shape");
      break;
    case Op::kLogits:
      require(buffer(line.x).dtype == DType::kF32 && buffer(line.x).is_logit_rows && buffer(line.x).columns >= line.vocab_count &&
                  line.vocab_start <= program.vocab_size - line.vocab_count,
              "logits: operand is not f32 [logitRows, vocabCount]");
      break;
  }
}

Status DecodeProgram(Napi::Env env, const Napi::Object& object, Program* program) {
  Fields fields(env, "program");
  constexpr int32_t kMost = 1 << 24;  // of any width: keeps products of two within 64 bits
  if (fields.Int(object, "formatVersion") != 1) fields.Fail("formatVersion is not 1");
  program->rank = fields.Int(object, "rank", 0, 4095);
  program->world_size = fields.Int(object, "worldSize", 1, 4096);
  program->dtype = fields.Type(object, "dtype");
  program->num_layers = fields.Int(object, "numLayers", 1, 65536);
  program->hidden_size = fields.Int(object, "hiddenSize", 1, kMost);
  program->vocab_size = fields.Int(object, "vocabSize", 1, kMost);
  program->norm_eps = static_cast<float>(fields.Number(object, "normEps", 0, 1));
  program->num_heads = fields.Int(object, "numHeads", 0, kMost);
  program->num_kv_heads = fields.Int(object, "numKvHeads", 0, kMost);
  program->head_dim = fields.Int(object, "headDim", 2, kMaxHeadDim);
  program->rotary_dims = fields.Int(object, "rotaryDims", 0, program->head_dim);
  if (program->head_dim % 2 != 0 || program->rotary_dims % 2 != 0) fields.Fail("headDim and rotaryDims must be even");

  std::map<std::string, int32_t> buffer_names, weight_names;
  for (const Napi::Object& item : fields.List(object, "buffers")) {
    BufferSpec spec{fields.Text(item, "name"), fields.Type(item, "dtype"), fields.Text(item, "rows") == "logitRows",
                    fields.Int(item, "columns", 0, kMost)};
    buffer_names[spec.name] = static_cast<int32_t>(program->buffers.size());
    program->buffers.push_back(std::move(spec));
  }
  for (const Napi::Object& item : fields.List(object, "weights")) {
    const bool is_linear = fields.Text(item, "kind") == "linear";
    WeightSpec spec{fields.Text(item, "name"), is_linear,
                    is_linear && !item.Get("bias").IsUndefined(),
                    is_linear ? fields.Type(item, "dtype") : DType::kF32,
                    fields.Int(item, "n", 0, kMost),
                    is_linear ? fields.Int(item, "k", 0, kMost) : 1,
                    0};
    const Napi::Value parts = item.Get("parts");
    if (!parts.IsArray()) {
      fields.Fail("parts is not an array");
    } else {
      spec.copies = static_cast<int32_t>(parts.As<Napi::Array>().Length());
    }
    if (spec.copies < 1) fields.Fail("weight '" + spec.name + "' has no entries");
    weight_names[spec.name] = static_cast<int32_t>(program->weights.size());
    program->weights.push_back(std::move(spec));
  }
  if (!fields.status().ok()) return fields.status();
  const Napi::Object lines = fields.Object(object, "lines");
  const auto decode = [&](const char* key, std::vector<Line>* to, bool is_layer) {
    for (const Napi::Object& item : fields.List(lines, key)) {
      to->push_back(DecodeLine(fields, item, buffer_names, weight_names));
      if (fields.status().ok()) CheckLine(fields, *program, to->back(), is_layer);
    }
  };
  decode("before", &program->before, false);
  decode("layer", &program->layer, true);
  decode("after", &program->after, false);
  return fields.status();
}

Status DecodeParts(Napi::Env env, const Napi::Array& array, const Program& program, std::vector<LoadPart>* parts) {
  Fields fields(env, "load list");
  constexpr double kMost = 9007199254740991.0;
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Object item = array.Get(i).As<Napi::Object>();
    LoadPart part{};
    part.weight = fields.Int(item, "weight", 0, static_cast<int32_t>(program.weights.size()) - 1);
    const WeightSpec& spec = program.weights[static_cast<size_t>(part.weight)];
    part.copy = fields.Int(item, "copy", 0, spec.copies - 1);
    part.is_bias = fields.Flag(item, "isBias");
    part.fd = fields.Int(item, "fd", -1);
    part.seed = static_cast<uint64_t>(fields.Number(item, "seed", 0, kMost));
    part.byte_offset = static_cast<int64_t>(fields.Number(item, "byteOffset", 0, kMost));
    part.tensor_columns = fields.Int(item, "tensorColumns", 1);
    part.source_dtype = fields.Type(item, "dtype");
    part.row0 = fields.Int(item, "row0");
    part.rows = fields.Int(item, "rows");
    part.column0 = fields.Int(item, "column0");
    part.columns = fields.Int(item, "columns");
    part.output = fields.Int(item, "output");
    part.interleave = fields.Int(item, "interleave", 1, 2);
    part.phase = fields.Int(item, "phase", 0, part.interleave - 1);
    // The last output in packed order must exist; the columns must be those of the weight.
    const int64_t last = part.output + part.rows - 1;
    const int64_t packed = part.interleave == 2 ? (2 * (last / kPanel) + part.phase) * kPanel + last % kPanel : last;
    if (part.rows > 0 && packed >= spec.n) fields.Fail("'" + spec.name + "' has no output " + std::to_string(packed));
    if (part.column0 + part.columns > part.tensor_columns) fields.Fail("columns past the end of a tensor's row");
    const bool is_vector = !spec.is_linear || part.is_bias;
    if (part.columns != (is_vector ? 1 : spec.k)) fields.Fail("'" + spec.name + "' has another number of inputs");
    if (part.is_bias && !spec.has_bias) fields.Fail("'" + spec.name + "' has no bias");
    if (!fields.status().ok()) return fields.status();
    parts->push_back(part);
  }
  return Status::Ok();
}

class RunnerHandle : public Napi::ObjectWrap<RunnerHandle> {
 public:
  static void Register(Napi::Env env, Napi::Object exports) {
    exports.Set("Runner", DefineClass(env, "Runner",
                                      {InstanceMethod("load", &RunnerHandle::Load), InstanceMethod("step", &RunnerHandle::Step),
                                       InstanceMethod("interrupt", &RunnerHandle::Interrupt),
                                       InstanceMethod("serve", &RunnerHandle::Serve), InstanceMethod("stats", &RunnerHandle::Stats),
                                       InstanceMethod("loadedBytes", &RunnerHandle::LoadedBytes),
                                       InstanceMethod("close", &RunnerHandle::Close)}));
  }

  /// new Runner(program, options, communicator, tier)
  explicit RunnerHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RunnerHandle>(info), env_(info.Env()) {
    if (Status s = Open(info); !s.ok()) {
      ToError(info.Env(), s).ThrowAsJavaScriptException();
      return;
    }
    settle_ = Napi::ThreadSafeFunction::New(env_, Napi::Function::New(env_, [](const Napi::CallbackInfo&) {}), "tilerank.Runner", 0, 1);
    settle_.Unref(env_);
    // A worker or process that ends without close() still joins the leader thread before the addon's memory goes.
    napi_add_env_cleanup_hook(env_, AtExit, this);
  }

  ~RunnerHandle() override { Stop(); }

 private:
  Status Open(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (info.Length() < 4 || !info[0].IsObject() || !info[1].IsObject() || !info[2].IsObject() || !info[3].IsString()) {
      return Status(Code::kInvalidArgument, "Runner takes (program, options, communicator, tier)");
    }
    Program program;
    if (Status s = DecodeProgram(env, info[0].As<Napi::Object>(), &program); !s.ok()) return s;
    Fields fields(env, "runner options");
    const Napi::Object given = info[1].As<Napi::Object>();
    RunnerOptions options;
    const Napi::Value cores = given.Get("cores");
    if (cores.IsArray()) {
      const Napi::Array list = cores.As<Napi::Array>();
      for (uint32_t i = 0; i < list.Length(); i++) options.cores.push_back(list.Get(i).ToNumber().Int32Value());
    } else {
      fields.Fail("cores is not an array");
    }
    options.spin_us = fields.Int(given, "spinUs", 0, 1'000'000);
    options.profile = fields.Flag(given, "profile");
    options.timeout_ms = fields.Int(given, "timeoutMs", 1);
    options.max_tokens = fields.Int(given, "maxTokens", 1, 1 << 20);
    options.max_logit_rows = fields.Int(given, "maxLogitRows", 1, options.max_tokens);
    options.max_sequences = fields.Int(given, "maxSequences", 1, 1 << 16);
    options.max_positions = fields.Int(given, "maxPositions", 1, 1 << 24);
    options.num_blocks = fields.Int(given, "numBlocks", 1, 1 << 26);
    const Napi::Value frequencies = given.Get("frequencies");
    if (!frequencies.IsTypedArray() || frequencies.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array ||
        frequencies.As<Napi::Float64Array>().ElementLength() != static_cast<size_t>(program.rotary_dims / 2)) {
      fields.Fail("frequencies is no Float64Array of rotaryDims / 2");
    } else {
      const Napi::Float64Array values = frequencies.As<Napi::Float64Array>();
      options.frequencies.assign(values.Data(), values.Data() + values.ElementLength());
    }
    if (!fields.status().ok()) return fields.status();
    const Kernels* kernels = nullptr;
    if (Status s = SelectKernels(info[3].As<Napi::String>().Utf8Value(), &kernels); !s.ok()) return s;
    CommHandle* comm = CommHandle::Unwrap(info[2].As<Napi::Object>());
    if (comm == nullptr) return Status(Code::kInvalidArgument, "the third argument is no communicator");
    program_ = program;
    std::unique_ptr<NodeExchange> nodes;
    if (comm->communicator() != nullptr && comm->transport() != nullptr) {
      const size_t slot_bytes = Runner::SlotBytes(program, options, program.vocab_size);
      nodes = std::make_unique<NodeExchange>(comm->communicator(), comm->transport(), comm->layout(), slot_bytes, kernels->copy);
    }
    return Runner::Create(std::move(program), std::move(options), *kernels, comm->communicator(), &runner_, std::move(nodes));
  }

  static void AtExit(void* handle) { static_cast<RunnerHandle*>(handle)->Stop(); }
  static void Throw(Napi::Env env, const Status& status) { ToError(env, status).ThrowAsJavaScriptException(); }

  void Stop() {
    if (runner_ == nullptr) return;
    napi_remove_env_cleanup_hook(env_, AtExit, this);
    runner_.reset();
    settle_.Release();
  }

  // A promise that `done` settles from the leader thread. The event loop is held open while one is pending.
  Runner::Done Pending(Napi::Env env, Napi::Promise::Deferred deferred, bool has_result) {
    if (pending_++ == 0) {
      settle_.Ref(env);
      Ref();  // the object outlives its promises
    }
    return [this, deferred, has_result](Status status, StepResult result) {
      auto* carried = new Carried{std::move(status), std::move(result), deferred, has_result, this};
      if (settle_.BlockingCall(carried, Settle) != napi_ok) delete carried;
    };
  }
  struct Carried {
    Status status;
    StepResult result;
    Napi::Promise::Deferred deferred;
    bool has_result;
    RunnerHandle* handle;
  };
  static void Settle(Napi::Env env, Napi::Function, Carried* carried) {
    if (env != nullptr) {
      Napi::HandleScope scope(env);
      if (--carried->handle->pending_ == 0) {
        if (carried->handle->runner_ != nullptr) carried->handle->settle_.Unref(env);
        carried->handle->Unref();
      }
      if (!carried->status.ok()) {
        carried->deferred.Reject(ToError(env, carried->status).Value());
      } else if (carried->has_result) {
        carried->deferred.Resolve(ToObject(env, carried->result));
      } else {
        carried->deferred.Resolve(env.Undefined());
      }
    }
    delete carried;
  }

  // Before the step is settled: one queue.
  struct CarriedAhead {
    AheadTokens tokens;
    RunnerHandle* handle;
  };
  static void HandOut(Napi::Env env, Napi::Function, CarriedAhead* carried) {
    if (env != nullptr) {
      Napi::HandleScope scope(env);
      carried->handle->on_ahead_.Call({ToObject(env, carried->tokens)});
    }
    delete carried;
  }

  // Array is the typed array of T.
  template <class Array, class T>
  static Array Copy(Napi::Env env, const std::vector<T>& values) {
    Array array = Array::New(env, values.size());
    std::copy(values.begin(), values.end(), array.Data());
    return array;
  }
  static Napi::Object ToObject(Napi::Env env, const AheadTokens& tokens) {
    Napi::Object object = Napi::Object::New(env);
    object.Set("ids", Copy<Napi::Int32Array>(env, tokens.ids));
    object.Set("endMs", Copy<Napi::Float64Array>(env, tokens.end_ms));
    return object;
  }
  static Napi::Object ToObject(Napi::Env env, const StepResult& result) {
    Napi::Object object = Napi::Object::New(env);
    Napi::Array rows = Napi::Array::New(env, result.rows.size());
    for (size_t i = 0; i < result.rows.size(); i++) {
      const RowResult& row = result.rows[i];
      Napi::Object item = Napi::Object::New(env);
      item.Set("max", row.max);
      item.Set("sumExp", row.sum_exp);
      item.Set("complete", row.is_complete);
      item.Set("whole", row.is_whole);
      item.Set("ids", Copy<Napi::Int32Array>(env, row.ids));
      item.Set("values", Copy<Napi::Float32Array>(env, row.values));
      if (!row.raw_logits.empty()) item.Set("logits", Copy<Napi::Float32Array>(env, row.raw_logits));
      rows.Set(static_cast<uint32_t>(i), item);
    }
    object.Set("rows", rows);
    object.Set("ahead", ToObject(env, result.ahead));
    object.Set("endMs", result.end_ms);
    object.Set("elapsedUs", result.elapsed_us);
    return object;
  }

  bool IsOpen(Napi::Env env) {
    if (runner_ != nullptr) return true;
    Throw(env, Status(Code::kClosed, "the runner is closed"));
    return false;
  }

  Napi::Value Load(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (!IsOpen(env)) return env.Undefined();
    std::vector<LoadPart> parts;
    if (info.Length() < 1 || !info[0].IsArray()) {
      Throw(env, Status(Code::kInvalidArgument, "load takes an array of parts"));
      return env.Undefined();
    }
    if (Status s = DecodeParts(env, info[0].As<Napi::Array>(), program_, &parts); !s.ok()) {
      Throw(env, s);
      return env.Undefined();
    }
    const auto deferred = Napi::Promise::Deferred::New(env);
    runner_->PostLoad(std::move(parts), Pending(env, deferred, false));
    return deferred.Promise();
  }

  /// step(words, onAhead?: (tokens) => void). One step that decodes ahead at a time.
  Napi::Value Step(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (!IsOpen(env)) return env.Undefined();
    if (info.Length() < 1 || !info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) {
      Throw(env, Status(Code::kInvalidArgument, "step takes an Int32Array"));
      return env.Undefined();
    }
    const Napi::Int32Array words = info[0].As<Napi::Int32Array>();
    Runner::OnAhead on_ahead;
    if (info.Length() > 1 && info[1].IsFunction()) {
      on_ahead_ = Napi::Persistent(info[1].As<Napi::Function>());
      on_ahead = [this](AheadTokens tokens) {
        auto* carried = new CarriedAhead{std::move(tokens), this};
        if (settle_.BlockingCall(carried, HandOut) != napi_ok) delete carried;
      };
    }
    const auto deferred = Napi::Promise::Deferred::New(env);
    runner_->PostStep(std::vector<int32_t>(words.Data(), words.Data() + words.ElementLength()), std::move(on_ahead), Pending(env, deferred, true));
    return deferred.Promise();
  }

  /// interrupt(): the running step decodes no further ahead
  Napi::Value Interrupt(const Napi::CallbackInfo& info) {
    if (runner_ != nullptr) runner_->Interrupt();
    return info.Env().Undefined();
  }

  /// serve(onBytes: (words: Int32Array) => void): resolves at rank 0's shutdown message
  Napi::Value Serve(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (!IsOpen(env)) return env.Undefined();
    if (info.Length() < 1 || !info[0].IsFunction()) {
      Throw(env, Status(Code::kInvalidArgument, "serve takes a function"));
      return env.Undefined();
    }
    // One queue for deliveries and the settling behind them: a promise that overtook the last tokens would end their requests.
    auto deliver = std::make_shared<Napi::ThreadSafeFunction>(
        Napi::ThreadSafeFunction::New(env, info[0].As<Napi::Function>(), "tilerank.Runner.serve", 0, 1));
    const auto deferred = Napi::Promise::Deferred::New(env);
    (void)Pending(env, deferred, false);
    runner_->PostServe(
        [deliver](std::vector<int32_t> words) {
          auto* carried = new std::vector<int32_t>(std::move(words));
          const napi_status status = deliver->BlockingCall(carried, [](Napi::Env call_env, Napi::Function callback, std::vector<int32_t>* data) {
            if (call_env != nullptr) {
              Napi::HandleScope scope(call_env);
              Napi::Int32Array array = Napi::Int32Array::New(call_env, data->size());
              std::memcpy(array.Data(), data->data(), data->size() * sizeof(int32_t));
              callback.Call({array});
            }
            delete data;
          });
          if (status != napi_ok) delete carried;
        },
        [this, deliver, deferred](Status status, StepResult result) {
          auto* carried = new Carried{std::move(status), std::move(result), deferred, false, this};
          if (deliver->BlockingCall(carried, Settle) != napi_ok) delete carried;
          deliver->Release();
        });
    return deferred.Promise();
  }

  Napi::Value LoadedBytes(const Napi::CallbackInfo& info) {
    if (!IsOpen(info.Env())) return info.Env().Undefined();
    return Napi::Number::New(info.Env(), static_cast<double>(runner_->loaded_bytes()));
  }

  Napi::Value Stats(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (!IsOpen(env)) return env.Undefined();
    const RunnerStats stats = runner_->stats();
    Napi::Object object = Napi::Object::New(env);
    Napi::Object phases = Napi::Object::New(env);
    static constexpr const char* kNames[] = {"gemm", "attention", "collective", "rest"};
    for (size_t i = 0; i < stats.phase_us.size(); i++) phases.Set(kNames[i], stats.phase_us[i]);
    object.Set("phaseUs", phases);
    object.Set("kernelUs", stats.kernel_us);
    object.Set("steps", static_cast<double>(stats.steps));
    object.Set("collectives", static_cast<double>(stats.collectives));
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(stats.state_hash));
    object.Set("stateHash", std::string(hash));
    object.Set("wholeRows", static_cast<double>(stats.whole_rows));
    object.Set("weightBytes", static_cast<double>(stats.weight_bytes));
    object.Set("kvBytes", static_cast<double>(stats.kv_bytes));
    object.Set("scratchBytes", static_cast<double>(stats.scratch_bytes));
    object.Set("pinWarning", runner_->pin_warning());
    return object;
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    Stop();
    return info.Env().Undefined();
  }

  const Napi::Env env_;
  Program program_;
  std::unique_ptr<Runner> runner_;
  Napi::ThreadSafeFunction settle_;
  Napi::FunctionReference on_ahead_;
  int pending_ = 0;  // promises not settled; on the JavaScript thread only
};

}  // namespace

void RegisterRunner(Napi::Env env, Napi::Object exports) {
  RunnerHandle::Register(env, exports);
  // runnerSlotBytes(program, options, nodes) of the communicator that a runner needs; nodes: [nodes][ranks], empty: one
  exports.Set("runnerSlotBytes", Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                Program program;
                if (info.Length() < 3 || !info[0].IsObject() || !info[1].IsObject() || !info[2].IsArray()) {
                  ToError(info.Env(), Status(Code::kInvalidArgument, "runnerSlotBytes takes (program, options, nodes)")).ThrowAsJavaScriptException();
                  return info.Env().Undefined();
                }
                if (Status s = DecodeProgram(info.Env(), info[0].As<Napi::Object>(), &program); !s.ok()) {
                  ToError(info.Env(), s).ThrowAsJavaScriptException();
                  return info.Env().Undefined();
                }
                Fields fields(info.Env(), "runner options");
                const Napi::Object given = info[1].As<Napi::Object>();
                RunnerOptions options{};
                options.max_tokens = fields.Int(given, "maxTokens", 1, 1 << 20);
                options.max_logit_rows = fields.Int(given, "maxLogitRows", 1, 1 << 20);
                options.max_sequences = fields.Int(given, "maxSequences", 1, 1 << 16);
                options.num_blocks = fields.Int(given, "numBlocks", 1, 1 << 26);
                if (!fields.status().ok()) {
                  ToError(info.Env(), fields.status()).ThrowAsJavaScriptException();
                  return info.Env().Undefined();
                }
                size_t nbytes = Runner::SlotBytes(program, options, program.vocab_size);
                const Napi::Array given_nodes = info[2].As<Napi::Array>();
                if (given_nodes.Length() > 1) {
                  std::vector<std::vector<int>> nodes(given_nodes.Length());
                  for (uint32_t node = 0; node < given_nodes.Length(); node++) {
                    const Napi::Value ranks = given_nodes.Get(node);
                    for (uint32_t i = 0; ranks.IsArray() && i < ranks.As<Napi::Array>().Length(); i++) {
                      nodes[node].push_back(ranks.As<Napi::Array>().Get(i).ToNumber().Int32Value());
                    }
                  }
                  Layout layout;
                  if (Status s = Layout::Create(0, std::move(nodes), &layout); !s.ok()) {
                    ToError(info.Env(), s).ThrowAsJavaScriptException();
                    return info.Env().Undefined();
                  }
                  nbytes = NodeExchange::SlotBytes(layout, nbytes);
                }
                return Napi::Number::New(info.Env(), static_cast<double>(nbytes));
              }));
}

}  // namespace tilerank
