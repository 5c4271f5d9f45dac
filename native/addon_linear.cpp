// JavaScript face of the linear kernels: packed weights, pack, unpack, embed, gemm, convert, stream_read, the tiers,
// and the timing of bench/gemm.ts. Every function takes one object; every extent is checked against the arrays given
// before memory is touched. Arrays are only borrowed: all calls are synchronous.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "addon.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"
#include "measure.h"
#include "runner/memory.h"

namespace tilerank {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 30;  // rows, columns and strides; products of two stay far inside int64_t
constexpr int64_t kMaxWeightBytes = int64_t{1} << 42;

// Marks our externals, so that a handle of another kind is refused and not misread.
constexpr napi_type_tag kPackedTag = {0x6f1d7a52c3b84e09u, 0xa4c97e01d25b4f6bu};

struct Packed {
  MappedMemory memory;
  std::vector<float> bias;
  PackedWeight weight = {};
  bool is_closed = false;
};

// One gemm scratch an environment: calls are synchronous, so never two at a time.
struct LinearState {
  MappedMemory scratch;
};

struct View {
  char* data = nullptr;
  int64_t nbytes = 0;
};

int64_t RoundUp(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Reads the properties of one argument object. The first thing that is wrong is kept, and what is read after it is
// zero.
class Args {
 public:
  Args(const Napi::CallbackInfo& info, const char* function) : env_(info.Env()), function_(function) {
    if (info.Length() != 1 || !info[0].IsObject()) {
      Fail("takes one object");
      return;
    }
    object_ = info[0].As<Napi::Object>();
  }

  bool ok() const { return status_.ok(); }
  void Fail(const std::string& what) { Fail(Status(Code::kInvalidArgument, what)); }
  void Fail(const Status& status) {
    if (ok()) status_ = Status(status.code(), std::string(function_) + ": " + status.message());
  }
  Napi::Value Throw() {
    if (!env_.IsExceptionPending()) ToError(env_, status_).ThrowAsJavaScriptException();
    return env_.Undefined();
  }

  const Kernels* Tier() {
    const std::string tier = String("tier");
    const Kernels* kernels = nullptr;
    if (ok()) {
      // '!': exactly the tier asked for, or an error that names those that run here.
      if (Status s = SelectKernels(tier + "!", &kernels); !s.ok()) Fail(s);
    }
    return kernels;
  }

  int64_t Integer(const char* name, int64_t low, int64_t high) {
    const Napi::Value value = Get(name);
    if (!ok()) return 0;
    const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
    if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) || number != std::floor(number)) {
      Fail(std::string(name) + " must be an integer from " + std::to_string(low) + " to " + std::to_string(high));
      return 0;
    }
    return static_cast<int64_t>(number);
  }

  double Positive(const char* name) {
    const Napi::Value value = Get(name);
    if (!ok()) return 0;
    const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
    if (!(number > 0 && number <= 3600)) Fail(std::string(name) + " must be above 0 and at most 3600");
    return ok() ? number : 0;
  }

  DType Type(const char* name, bool is_source) {
    const std::string text = String(name);
    if (!ok() || text == "f32") return DType::kF32;
    if (text == "bf16") return DType::kBf16;
    if (text == "f16" && is_source) return DType::kF16;
    Fail(std::string(name) + " '" + text + "' must be f32 or bf16" + (is_source ? " or f16" : ""));
    return DType::kF32;
  }

  View Array(const char* name) {
    const Napi::Value value = Get(name);
    if (!ok()) return {};
    if (!value.IsTypedArray()) {
      Fail(std::string(name) + " must be a typed array");
      return {};
    }
    napi_typedarray_type type;
    size_t length = 0;
    void* data = nullptr;
    if (napi_get_typedarray_info(env_, value, &type, &length, &data, nullptr, nullptr) != napi_ok) {
      Fail(std::string(name) + " cannot be read");
      return {};
    }
    return {static_cast<char*>(data), static_cast<int64_t>(value.As<Napi::TypedArray>().ByteLength())};
  }

  Packed* Weight() {
    const Napi::Value value = Get("weight");
    if (!ok()) return nullptr;
    bool is_ours = false;
    void* data = nullptr;
    if (!value.IsExternal() || napi_check_object_type_tag(env_, value, &kPackedTag, &is_ours) != napi_ok || !is_ours ||
        napi_get_value_external(env_, value, &data) != napi_ok) {
      Fail("weight is no packed weight of this addon");
      return nullptr;
    }
    Packed* packed = static_cast<Packed*>(data);
    if (packed->is_closed) {
      Fail(Status(Code::kClosed, "the weight has been closed"));
      return nullptr;
    }
    return packed;
  }

  /// rows x columns elements with `ld` between rows must lie inside the array.
  void Fits(const char* name, const View& view, int64_t rows, int64_t columns, int64_t ld, int64_t element_bytes) {
    if (!ok() || rows == 0 || columns == 0) return;
    if (rows > 1 && ld < columns) {
      Fail("the stride of " + std::string(name) + " is " + std::to_string(ld) + ", less than the " +
           std::to_string(columns) + " columns that are used");
      return;
    }
    const int64_t needed = ((rows - 1) * ld + columns) * element_bytes;  // below 2^30 * 2^30 * 4 + 2^32: fits int64_t
    if (view.nbytes < needed) {
      Fail(std::string(name) + " has " + std::to_string(view.nbytes) + " bytes, and " + std::to_string(needed) +
           " are used");
    }
  }

 private:
  Napi::Value Get(const char* name) {
    if (!ok()) return env_.Undefined();
    Napi::Value value = object_.Get(name);
    if (env_.IsExceptionPending()) {
      Fail(std::string(name) + " cannot be read");
      return env_.Undefined();
    }
    return value;
  }

  std::string String(const char* name) {
    const Napi::Value value = Get(name);
    if (ok() && !value.IsString()) Fail(std::string(name) + " must be a string");
    return ok() ? value.As<Napi::String>().Utf8Value() : std::string();
  }

  Napi::Env env_;
  const char* function_;
  Napi::Object object_;
  Status status_;
};

Napi::Value CreatePacked(const Napi::CallbackInfo& info) {
  Args args(info, "createPacked");
  const DType dtype = args.Type("dtype", false);
  const int64_t n = args.Integer("n", 1, kMaxExtent), k = args.Integer("k", 1, kMaxExtent);
  if (!args.ok()) return args.Throw();
  auto packed = std::make_unique<Packed>();
  const int64_t panels = RoundUp(n, kPanel) / kPanel, k_tiles = RoundUp(k, TileK(dtype)) / TileK(dtype);
  const int64_t nbytes = panels * k_tiles * static_cast<int64_t>(kTileBytes);
  if (nbytes > kMaxWeightBytes) {
    args.Fail(Status(Code::kNoMemory, "a packed weight of " + std::to_string(n) + " x " + std::to_string(k) +
                                          " would take " + std::to_string(nbytes) + " bytes"));
    return args.Throw();
  }
  if (Status s = MappedMemory::Allocate(static_cast<size_t>(nbytes), "a packed weight", &packed->memory); !s.ok()) {
    args.Fail(s);
    return args.Throw();
  }
  packed->weight = {packed->memory.data(),
                    dtype,
                    static_cast<int32_t>(n),
                    static_cast<int32_t>(k),
                    static_cast<int32_t>(panels),
                    static_cast<int32_t>(k_tiles),
                    nullptr};
  auto external = Napi::External<Packed>::New(info.Env(), packed.get(), [](Napi::Env env, Packed* dead) {
    Napi::MemoryManagement::AdjustExternalMemory(env, -static_cast<int64_t>(dead->memory.nbytes()));
    delete dead;
  });
  if (external.IsEmpty()) return info.Env().Undefined();
  packed.release();
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), nbytes);  // so that collection keeps up with large weights
  if (napi_type_tag_object(info.Env(), external, &kPackedTag) != napi_ok) {
    args.Fail(Status(Code::kInternal, "the weight could not be tagged"));
    return args.Throw();
  }
  return external;
}

Napi::Value ClosePacked(const Napi::CallbackInfo& info) {
  Args args(info, "closePacked");
  Packed* packed = args.Weight();
  if (!args.ok()) return args.Throw();
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), -static_cast<int64_t>(packed->memory.nbytes()));
  packed->memory = MappedMemory();
  packed->weight.data = nullptr;
  packed->is_closed = true;
  return info.Env().Undefined();
}

Napi::Value SetBias(const Napi::CallbackInfo& info) {
  Args args(info, "setBias");
  Packed* packed = args.Weight();
  const View bias = args.Array("bias");
  if (!args.ok()) return args.Throw();
  const size_t count = static_cast<size_t>(packed->weight.panels) * kPanel;
  args.Fits("bias", bias, 1, static_cast<int64_t>(count), 0, 4);
  if (!args.ok()) return args.Throw();
  packed->bias.resize(count);
  std::memcpy(packed->bias.data(), bias.data, count * 4);
  packed->weight.bias = packed->bias.data();
  return info.Env().Undefined();
}

Napi::Value PackRows(const Napi::CallbackInfo& info) {
  Args args(info, "pack");
  const Kernels* kernels = args.Tier();
  Packed* packed = args.Weight();
  const View source = args.Array("source");
  const DType source_dtype = args.Type("sourceDType", true);
  const int64_t ld = args.Integer("sourceLd", 0, kMaxExtent);
  const int64_t byte_offset = args.Integer("byteOffset", 0, int64_t{1} << 52);
  const int64_t rows = args.Integer("rows", 1, kMaxExtent), n0 = args.Integer("n0", 0, kMaxExtent);
  const int64_t interleave = args.Integer("interleave", 1, 2),
                phase = args.Integer("phase", 0, interleave == 2 ? 1 : 0);
  if (!args.ok()) return args.Throw();
  const PackedWeight& weight = packed->weight;
  const int64_t last = n0 + rows - 1;
  const int64_t last_panel = interleave == 2 ? last / kPanel * 2 + phase : last / kPanel;
  if (last_panel >= weight.panels) {
    args.Fail("rows reach panel " + std::to_string(last_panel) + " of a weight with " + std::to_string(weight.panels) +
              " panels");
  } else if (interleave == 1 && last >= weight.n) {
    args.Fail("rows reach output " + std::to_string(last) + " of a weight with " + std::to_string(weight.n) +
              " outputs");
  } else if (byte_offset > source.nbytes) {
    args.Fail("byteOffset lies past the end of source");
  }
  const View used = {source.data + byte_offset, source.nbytes - byte_offset};
  args.Fits("source", used, rows, weight.k, ld, ElementBytes(source_dtype));
  if (!args.ok()) return args.Throw();
  kernels->pack({packed->memory.data(), weight.dtype, weight.k_tiles, used.data, source_dtype, ld,
                 static_cast<int32_t>(rows), weight.k, static_cast<int32_t>(n0), static_cast<int32_t>(interleave),
                 static_cast<int32_t>(phase)});
  return info.Env().Undefined();
}

Napi::Value UnpackRows(const Napi::CallbackInfo& info) {
  Args args(info, "unpack");
  const Kernels* kernels = args.Tier();
  Packed* packed = args.Weight();
  const int64_t n0 = args.Integer("n0", 0, kMaxExtent), rows = args.Integer("rows", 0, kMaxExtent);
  const View out = args.Array("out");
  const int64_t ld = args.Integer("ld", 0, kMaxExtent);
  if (!args.ok()) return args.Throw();
  if (n0 + rows > packed->weight.n)
    args.Fail("rows end past the weight's " + std::to_string(packed->weight.n) + " outputs");
  args.Fits("out", out, rows, packed->weight.k, ld, 4);
  if (!args.ok()) return args.Throw();
  kernels->unpack(packed->weight, static_cast<int32_t>(n0), static_cast<int32_t>(rows),
                  reinterpret_cast<float*>(out.data), ld);
  return info.Env().Undefined();
}

Napi::Value EmbedRows(const Napi::CallbackInfo& info) {
  Args args(info, "embed");
  const Kernels* kernels = args.Tier();
  Packed* packed = args.Weight();
  const View ids = args.Array("ids");
  const int64_t rows = args.Integer("rows", 0, kMaxExtent);
  const View y = args.Array("y");
  const DType y_dtype = args.Type("yDType", false);
  const int64_t ldy = args.Integer("ldy", 0, kMaxExtent);
  if (!args.ok()) return args.Throw();
  args.Fits("ids", ids, 1, rows, 0, 4);
  args.Fits("y", y, rows, packed->weight.k, ldy, ElementBytes(y_dtype));
  if (!args.ok()) return args.Throw();
  kernels->embed(packed->weight, reinterpret_cast<const int32_t*>(ids.data), static_cast<int32_t>(rows), y.data,
                 y_dtype, ldy);
  return info.Env().Undefined();
}

// The kernels have no K tail: columns of x past k meet zero weights, so they must hold zeros, or 0 * NaN would spoil
// the row.
bool HasZeroPadding(const View& x, int64_t rows, int64_t ld, int64_t k, int64_t padded, int64_t element_bytes) {
  for (int64_t row = 0; row < rows; row++) {
    const char* from = x.data + (row * ld + k) * element_bytes;
    for (int64_t i = 0; i < (padded - k) * element_bytes; i++) {
      if (from[i] != 0) return false;
    }
  }
  return true;
}

Napi::Value Multiply(const Napi::CallbackInfo& info) {
  Args args(info, "linear");
  LinearState* state = static_cast<LinearState*>(info.Data());
  const Kernels* kernels = args.Tier();
  Packed* packed = args.Weight();
  const View x = args.Array("x"), y = args.Array("y");
  const int64_t ldx = args.Integer("ldx", 1, kMaxExtent), ldy = args.Integer("ldy", 1, kMaxExtent);
  const int64_t m = args.Integer("m", 1, kMaxExtent);
  const DType y_dtype = args.Type("yDType", false);
  const int64_t activation = args.Integer("activation", 0, 1);
  if (!args.ok()) return args.Throw();
  const PackedWeight& weight = packed->weight;
  const int64_t panel0 = args.Integer("panel0", 0, weight.panels),
                panel1 = args.Integer("panel1", panel0, weight.panels);
  const bool is_silu = activation == static_cast<int64_t>(Activation::kSiluMul);
  if (is_silu && (panel0 % 2 != 0 || panel1 % 2 != 0))
    args.Fail("siluMul takes pairs of panels: both bounds must be even");
  const int64_t element_bytes = ElementBytes(weight.dtype);
  const int64_t padded = RoundUp(weight.k, 32);
  const int64_t used = static_cast<int64_t>(weight.k_tiles) * TileK(weight.dtype);
  const int64_t columns = panel1 * kPanel / (is_silu ? 2 : 1);
  if (args.ok() && ldx < padded) {
    args.Fail("rows of x must be at least " + std::to_string(padded) + " elements apart (k rounded up to 32)");
  }
  if (args.ok() && (reinterpret_cast<uintptr_t>(x.data) % 64 != 0 || ldx * element_bytes % 64 != 0)) {
    args.Fail("rows of x must start on 64-byte boundaries (matrix() makes such arrays)");
  }
  args.Fits("x", x, m, used, ldx, element_bytes);
  args.Fits("y", y, m, columns, ldy, ElementBytes(y_dtype));
  if (args.ok() && !HasZeroPadding(x, m, ldx, weight.k, used, element_bytes)) {
    args.Fail("columns " + std::to_string(weight.k) + " to " + std::to_string(used - 1) + " of x must be zero");
  }
  if (args.ok() && state->scratch.data() == nullptr) {
    if (Status s = MappedMemory::Allocate(kGemmScratchBytes, "gemm scratch", &state->scratch); !s.ok()) args.Fail(s);
  }
  if (!args.ok()) return args.Throw();
  if (panel0 == panel1) return info.Env().Undefined();
  kernels->gemm({&weight, x.data, ldx, static_cast<int32_t>(m), static_cast<int32_t>(panel0),
                 static_cast<int32_t>(panel1), static_cast<Activation>(activation), y.data, y_dtype, ldy,
                 state->scratch.data()});
  return info.Env().Undefined();
}

Napi::Value ConvertArray(const Napi::CallbackInfo& info) {
  Args args(info, "convert");
  const Kernels* kernels = args.Tier();
  const View out = args.Array("out"), in = args.Array("in");
  const DType out_dtype = args.Type("outDType", false), in_dtype = args.Type("inDType", true);
  const int64_t count = args.Integer("count", 0, int64_t{1} << 40);
  args.Fits("out", out, 1, count, 0, ElementBytes(out_dtype));
  args.Fits("in", in, 1, count, 0, ElementBytes(in_dtype));
  if (!args.ok()) return args.Throw();
  kernels->convert(out.data, out_dtype, in.data, in_dtype, static_cast<size_t>(count));
  return info.Env().Undefined();
}

Napi::Value StreamReadArray(const Napi::CallbackInfo& info) {
  Args args(info, "streamRead");
  const Kernels* kernels = args.Tier();
  const View data = args.Array("data");
  if (args.ok() && data.nbytes % 512 != 0) args.Fail("data must be a multiple of 512 bytes long");
  if (!args.ok()) return args.Throw();
  return Napi::BigInt::New(info.Env(), kernels->stream_read(data.data, static_cast<size_t>(data.nbytes)));
}

// Bytes from the start of the array's memory to the next 64-byte boundary.
Napi::Value Misalignment(const Napi::CallbackInfo& info) {
  Args args(info, "misalignment");
  const View data = args.Array("data");
  if (!args.ok()) return args.Throw();
  return Napi::Number::New(info.Env(), static_cast<double>((64 - reinterpret_cast<uintptr_t>(data.data) % 64) % 64));
}

Napi::Value ListTiers(const Napi::CallbackInfo& info) {
  const std::vector<TierReport> reports = ReportTiers();
  Napi::Array list = Napi::Array::New(info.Env(), reports.size());
  for (uint32_t i = 0; i < reports.size(); i++) {
    Napi::Object entry = Napi::Object::New(info.Env());
    entry.Set("name", reports[i].name);
    entry.Set("available", reports[i].available);
    entry.Set("reason", reports[i].reason);
    list.Set(i, entry);
  }
  return list;
}

// The name of the tier that SelectKernels chooses for the argument, a cap ('' for none).
Napi::Value SelectTier(const Napi::CallbackInfo& info) {
  const Kernels* kernels = nullptr;
  if (info.Length() != 1 || !info[0].IsString()) {
    ToError(info.Env(), Status(Code::kInvalidArgument, "selectTier: takes the name of a tier, or ''"))
        .ThrowAsJavaScriptException();
    return info.Env().Undefined();
  }
  if (Status s = SelectKernels(info[0].As<Napi::String>().Utf8Value(), &kernels); !s.ok()) {
    ToError(info.Env(), s).ThrowAsJavaScriptException();
    return info.Env().Undefined();
  }
  return Napi::String::New(info.Env(), kernels->name);
}

bool HasBf16Instructions() {
  for (const TierReport& report : ReportTiers()) {
    if (report.name == "avx512_bf16") return report.available;
  }
  return false;
}

Napi::Value MeasureMachine(const Napi::CallbackInfo& info) {
  Args args(info, "machineLimits");
  const int64_t threads = args.Integer("threads", 1, 4096);
  const int64_t megabytes = args.Integer("megabytes", 2, 1 << 20);
  const double seconds = args.Positive("seconds");
  if (!args.ok()) return args.Throw();
  // The limit is the machine's, whatever tier is measured against it: the best table reads.
  const bool has_bf16 = HasBf16Instructions();
  const Kernels* kernels = &kScalarKernels;
  if (has_bf16) {
    if (Status s = SelectKernels("avx512_bf16!", &kernels); !s.ok()) args.Fail(s);
  }
  MachineLimits limits;
  if (args.ok()) {
    const size_t nbytes = static_cast<size_t>(RoundUp(megabytes, 2)) << 20;
    if (Status s = MeasureLimits(*kernels, has_bf16, static_cast<int32_t>(threads), nbytes, seconds, &limits); !s.ok())
      args.Fail(s);
  }
  if (!args.ok()) return args.Throw();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("bf16Flops", limits.bf16_flops);
  result.Set("f32Flops", limits.f32_flops);
  result.Set("readBytes", limits.read_bytes);
  return result;
}

Napi::Value TimeProduct(const Napi::CallbackInfo& info) {
  Args args(info, "timeGemm");
  const Kernels* kernels = args.Tier();
  GemmTrial trial = {};
  trial.dtype = args.Type("dtype", false);
  trial.m = static_cast<int32_t>(args.Integer("m", 1, 1 << 20));
  trial.n = static_cast<int32_t>(args.Integer("n", 1, 1 << 24));
  trial.k = static_cast<int32_t>(args.Integer("k", 1, 1 << 20));
  trial.threads = static_cast<int32_t>(args.Integer("threads", 1, 4096));
  trial.seconds = args.Positive("seconds");
  trial.cold_nbytes = static_cast<size_t>(args.Integer("coldMegabytes", 0, 1 << 20)) << 20;
  GemmTiming timing = {};
  if (args.ok()) {
    if (Status s = TimeGemm(*kernels, trial, &timing); !s.ok()) args.Fail(s);
  }
  if (!args.ok()) return args.Throw();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("medianSeconds", timing.median_seconds);
  result.Set("bestSeconds", timing.best_seconds);
  result.Set("repetitions", static_cast<double>(timing.repetitions));
  result.Set("weightBytes", static_cast<double>(timing.weight_nbytes));
  return result;
}

}  // namespace

void RegisterLinear(Napi::Env env, Napi::Object exports) {
  auto state = std::make_unique<LinearState>();
  const auto add = [&](const char* name, Napi::Value (*function)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, function, name, state.get()));
  };
  add("tiers", ListTiers);
  add("selectTier", SelectTier);
  add("createPacked", CreatePacked);
  add("closePacked", ClosePacked);
  add("setBias", SetBias);
  add("pack", PackRows);
  add("unpack", UnpackRows);
  add("embed", EmbedRows);
  add("linear", Multiply);
  add("convert", ConvertArray);
  add("streamRead", StreamReadArray);
  add("misalignment", Misalignment);
  add("machineLimits", MeasureMachine);
  add("timeGemm", TimeProduct);
  env.AddCleanupHook([](LinearState* dead) { delete dead; }, state.release());
}

}  // namespace tilerank
