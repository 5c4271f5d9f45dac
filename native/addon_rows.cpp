// JavaScript face of the row kernels and attention, for kernels/*.ts, tests and benchmarks; the runner calls the table
// itself. Every function takes one object with an explicit `tier`, checks every extent against the arrays it was given,
// and only then touches memory. Arrays are only borrowed: all calls are synchronous.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "addon.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"
#include "runner/memory.h"

namespace tilerank {
namespace {

constexpr int64_t kMaxInt = INT32_MAX;
constexpr int64_t kMaxHeads = 65536;
constexpr int64_t kMaxRows = 1 << 24;

struct View {
  char* data = nullptr;
  int64_t nbytes = 0;
  napi_typedarray_type type = napi_uint8_array;
};

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
    const std::string tier = String("tier");
    if (!ok()) return;
    // '!': exactly what was asked for, or an error that names the tiers that run here
    Status status = SelectKernels(tier + "!", &kernels_);
    if (!status.ok()) status_ = std::move(status);
  }

  bool ok() const { return status_.ok(); }
  const Kernels& kernels() const { return *kernels_; }

  void Fail(const std::string& what) {
    if (ok()) status_ = Status(Code::kInvalidArgument, std::string(function_) + ": " + what);
  }

  Napi::Value Throw() {
    if (!env_.IsExceptionPending()) ToError(env_, status_).ThrowAsJavaScriptException();
    return env_.Undefined();
  }

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
    Napi::Value value = Get(name);
    if (!ok()) return {};
    if (value.IsString()) return value.As<Napi::String>().Utf8Value();
    Fail(std::string(name) + " must be a string");
    return {};
  }

  double Number(const char* name) {
    Napi::Value value = Get(name);
    if (!ok()) return 0;
    if (value.IsNumber()) return value.As<Napi::Number>().DoubleValue();
    Fail(std::string(name) + " must be a number");
    return 0;
  }

  int64_t Int(const char* name, int64_t low, int64_t high) {
    const double value = Number(name);
    if (!ok()) return 0;
    if (value == std::floor(value) && value >= static_cast<double>(low) && value <= static_cast<double>(high)) {
      return static_cast<int64_t>(value);
    }
    Fail(std::string(name) + " must be an integer from " + std::to_string(low) + " to " + std::to_string(high));
    return 0;
  }

  int32_t Int32(const char* name, int64_t low, int64_t high) { return static_cast<int32_t>(Int(name, low, high)); }

  bool Bool(const char* name) {
    Napi::Value value = Get(name);
    if (!ok()) return false;
    if (value.IsBoolean()) return value.As<Napi::Boolean>().Value();
    Fail(std::string(name) + " must be a boolean");
    return false;
  }

  DType Type(const char* name) {
    const std::string type = String(name);
    if (type == "f32") return DType::kF32;
    if (type == "bf16") return DType::kBf16;
    Fail(std::string(name) + " must be 'f32' or 'bf16'");
    return DType::kF32;
  }

  View ToView(const Napi::Value& value, const char* name) {
    View view;
    if (!ok()) return view;
    if (!value.IsTypedArray()) {
      Fail(std::string(name) + " must be a typed array");
      return view;
    }
    const Napi::TypedArray array = value.As<Napi::TypedArray>();
    void* data = nullptr;
    size_t length = 0;
    if (napi_get_typedarray_info(env_, value, &view.type, &length, &data, nullptr, nullptr) != napi_ok) {
      Fail(std::string(name) + " cannot be read");
      return view;
    }
    view.data = static_cast<char*>(data);
    view.nbytes = static_cast<int64_t>(length * array.ElementSize());
    return view;
  }

  /// Any typed array, by its bytes.
  View Bytes(const char* name) { return ToView(Get(name), name); }

  /// A typed array of `type` that holds at least `count` elements.
  char* Elements(const char* name, const Napi::Value& value, napi_typedarray_type type, const char* type_name,
                 int64_t element_bytes, int64_t count) {
    const View view = ToView(value, name);
    if (!ok()) return nullptr;
    if (view.type != type) {
      Fail(std::string(name) + " must be a " + type_name);
      return nullptr;
    }
    if (view.nbytes < count * element_bytes) {
      Fail(std::string(name) + " holds " + std::to_string(view.nbytes / element_bytes) + " elements where " +
           std::to_string(count) + " are needed");
    }
    return view.data;
  }
  char* Elements(const char* name, DType dtype, int64_t count) { return Elements(name, Get(name), dtype, count); }
  char* Elements(const char* name, const Napi::Value& value, DType dtype, int64_t count) {
    return dtype == DType::kF32 ? Elements(name, value, napi_float32_array, "Float32Array (f32)", 4, count)
                                : Elements(name, value, napi_uint16_array, "Uint16Array (bf16)", 2, count);
  }
  float* Floats(const char* name, int64_t count) {
    return reinterpret_cast<float*>(Elements(name, DType::kF32, count));
  }
  const int32_t* Ints(const char* name, int64_t count) {
    return reinterpret_cast<const int32_t*>(Elements(name, Get(name), napi_int32_array, "Int32Array", 4, count));
  }

  /// Elements that `rows` rows of `columns` at stride `ld` span.
  int64_t Extent(const char* name, int64_t rows, int64_t ld, int64_t columns) {
    if (ld < columns)
      Fail(std::string(name) + " (" + std::to_string(ld) + ") is less than the row's " + std::to_string(columns));
    return rows == 0 ? 0 : (rows - 1) * ld + columns;
  }

 private:
  Napi::Env env_;
  const char* function_;
  Napi::Object object_;
  Status status_;
  const Kernels* kernels_ = nullptr;
};

std::vector<Napi::Value> List(Args& args, const char* name, uint32_t most) {
  std::vector<Napi::Value> items;
  Napi::Value value = args.Get(name);
  if (!args.ok()) return items;
  if (!value.IsArray() || value.As<Napi::Array>().Length() < 1 || value.As<Napi::Array>().Length() > most) {
    args.Fail(std::string(name) + " must be an array of 1 to " + std::to_string(most) + " typed arrays");
    return items;
  }
  const Napi::Array array = value.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); ++i) items.push_back(array.Get(i));
  return items;
}

constexpr uint32_t kMaxSources = 4096;

// reduceSum({ tier, out, sources, dtype, count }): arrays of any element type, taken as bytes.
Napi::Value ReduceSum(const Napi::CallbackInfo& info) {
  Args args(info, "reduceSum");
  const DType dtype = args.Type("dtype");
  const int64_t count = args.Int("count", 0, int64_t{1} << 40);
  const int64_t nbytes = count * ElementBytes(dtype);
  const View out = args.Bytes("out");
  if (args.ok() && out.nbytes < nbytes) args.Fail("out is shorter than count");
  std::vector<const void*> sources;
  for (const Napi::Value& value : List(args, "sources", kMaxSources)) {
    const View source = args.ToView(value, "sources");
    if (!args.ok()) break;
    if (source.nbytes < nbytes) args.Fail("a source is shorter than count");
    const bool is_apart = source.data + nbytes <= out.data || out.data + nbytes <= source.data;
    if (source.data != out.data && !is_apart)
      args.Fail("out overlaps a source in part; it must be the source itself or apart");
    sources.push_back(source.data);
  }
  if (!args.ok()) return args.Throw();
  if (count > 0) {
    args.kernels().reduce(out.data, sources.data(), static_cast<int32_t>(sources.size()), dtype, ReduceOp::kSum,
                          static_cast<size_t>(count));
  }
  return info.Env().Undefined();
}

// copyBytes({ tier, out, in }): arrays of any element type, taken as bytes.
Napi::Value CopyBytes(const Napi::CallbackInfo& info) {
  Args args(info, "copyBytes");
  const View out = args.Bytes("out");
  const View in = args.Bytes("in");
  if (args.ok() && out.nbytes < in.nbytes) args.Fail("out is shorter than in");
  if (args.ok() && !(in.data + in.nbytes <= out.data || out.data + in.nbytes <= in.data)) args.Fail("out overlaps in");
  if (!args.ok()) return args.Throw();
  args.kernels().copy(out.data, in.data, static_cast<size_t>(in.nbytes));
  return info.Env().Undefined();
}

// reduceResidual({ tier, slots, slotDtype, ldSlot, residual, ldResidual, addResidual, bias, sumSquares, ldSum, rows,
// columns, column0, column1 })
Napi::Value ReduceResidual(const Napi::CallbackInfo& info) {
  Args args(info, "reduceResidual");
  ReduceResidualArgs a = {};
  a.rows = args.Int32("rows", 0, kMaxRows);
  const int64_t columns = args.Int("columns", 1, kMaxInt);
  a.column0 = args.Int32("column0", 0, columns);
  a.column1 = args.Int32("column1", a.column0, columns);
  if (a.column0 % kSumBlock != 0) args.Fail("column0 must be a multiple of 256");
  if (a.column1 % kSumBlock != 0 && a.column1 != columns)
    args.Fail("column1 must be a multiple of 256 or the last column");
  a.slot_dtype = args.Type("slotDtype");
  a.ld_slot = args.Int("ldSlot", 0, kMaxInt);
  a.ld_residual = args.Int("ldResidual", 0, kMaxInt);
  a.ld_sum = args.Int("ldSum", 0, kMaxInt);
  a.add_residual = args.Bool("addResidual");
  std::vector<const void*> slots;
  const int64_t slot_extent = args.Extent("ldSlot", a.rows, a.ld_slot, columns);
  for (const Napi::Value& value : List(args, "slots", kMaxSources)) {
    slots.push_back(args.Elements("slots", value, a.slot_dtype, slot_extent));
  }
  a.slots = slots.data();
  a.num_slots = static_cast<int32_t>(slots.size());
  a.residual = args.Floats("residual", args.Extent("ldResidual", a.rows, a.ld_residual, columns));
  a.sum_squares =
      args.Floats("sumSquares", args.Extent("ldSum", a.rows, a.ld_sum, (columns + kSumBlock - 1) / kSumBlock));
  if (!args.Get("bias").IsNull()) a.bias = args.Floats("bias", columns);
  if (!args.ok()) return args.Throw();
  args.kernels().reduce_residual(a);
  return info.Env().Undefined();
}

// rmsNorm({ tier, x, ldx, sumSquares, ldSum, gamma, eps, y, yDtype, ldy, rows, columns, column0, column1 })
Napi::Value RmsNorm(const Napi::CallbackInfo& info) {
  Args args(info, "rmsNorm");
  RmsNormArgs a = {};
  a.rows = args.Int32("rows", 0, kMaxRows);
  a.columns = args.Int32("columns", 1, kMaxInt);
  a.column0 = args.Int32("column0", 0, a.columns);
  a.column1 = args.Int32("column1", a.column0, a.columns);
  a.ldx = args.Int("ldx", 0, kMaxInt);
  a.ld_sum = args.Int("ldSum", 0, kMaxInt);
  a.ldy = args.Int("ldy", 0, kMaxInt);
  a.eps = static_cast<float>(args.Number("eps"));
  if (!(a.eps >= 0)) args.Fail("eps must not be negative");
  a.y_dtype = args.Type("yDtype");
  a.x = args.Floats("x", args.Extent("ldx", a.rows, a.ldx, a.columns));
  a.sum_squares =
      args.Floats("sumSquares", args.Extent("ldSum", a.rows, a.ld_sum, (a.columns + kSumBlock - 1) / kSumBlock));
  a.gamma = args.Floats("gamma", a.columns);
  a.y = args.Elements("y", a.y_dtype, args.Extent("ldy", a.rows, a.ldy, a.columns));
  if (!args.ok()) return args.Throw();
  args.kernels().rms_norm(a);
  return info.Env().Undefined();
}

// A pool of KV blocks as the runner lays out a layer's: [numKvHeads][numBlocks][K part, V part].
struct Pool {
  char* data = nullptr;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;  // one block of one head
  int64_t head_bytes = 0;   // all blocks of one head
};

Pool ReadPool(Args& args, DType dtype, int32_t num_kv_heads, int32_t head_dim) {
  Pool pool;
  const View view = args.Bytes("kv");
  if (!args.ok()) return pool;
  pool.block_bytes = int64_t{2} * kKvBlockTokens * head_dim * ElementBytes(dtype);
  pool.num_blocks = view.nbytes / (pool.block_bytes * num_kv_heads);
  pool.head_bytes = pool.num_blocks * pool.block_bytes;
  pool.data = view.data;
  if (reinterpret_cast<uintptr_t>(view.data) % 4 != 0) args.Fail("kv must start at a multiple of 4 bytes");
  return pool;
}

void CheckBlock(Args& args, const Pool& pool, int32_t block) {
  if (args.ok() && (block < 0 || block >= pool.num_blocks)) {
    args.Fail("block " + std::to_string(block) + " is outside the pool of " + std::to_string(pool.num_blocks));
  }
}

// kvMemory(nbytes) -> ArrayBuffer of zeros on huge pages, as the runner's cache is; it is given back with the view.
Napi::Value KvMemory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const double nbytes = info.Length() == 1 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : 0;
  auto memory = std::make_unique<MappedMemory>();
  Status status;
  if (!(nbytes >= 1 && nbytes <= 9007199254740991.0 && nbytes == std::floor(nbytes))) {
    status = Status(Code::kInvalidArgument, "kvMemory: takes a number of bytes");
  } else {
    status = MappedMemory::Allocate(static_cast<size_t>(nbytes), "the KV cache", memory.get());
  }
  napi_value buffer = nullptr;
  if (status.ok()) {
    const auto free = [](napi_env, void*, void* hint) { delete static_cast<MappedMemory*>(hint); };
    if (napi_create_external_arraybuffer(env, memory->data(), memory->nbytes(), free, memory.get(), &buffer) == napi_ok) {
      (void)memory.release();
      return Napi::Value(env, buffer);
    }
    status = Status(Code::kUnsupported, "this runtime forbids ArrayBuffers over mapped memory: use Node.js itself");
  }
  if (!env.IsExceptionPending()) ToError(env, status).ThrowAsJavaScriptException();
  return env.Undefined();
}

int32_t HeadDim(Args& args) {
  const int32_t head_dim = args.Int32("headDim", 2, kMaxHeadDim);
  if (head_dim % 2 != 0) args.Fail("headDim must be even");
  return head_dim;
}

// ropeKvWrite({ tier, qkv, dtype, ldQkv, rows, numHeads, numKvHeads, headDim, rotaryDims, cosSin, kv, blocks, lanes })
Napi::Value RopeKvWrite(const Napi::CallbackInfo& info) {
  Args args(info, "ropeKvWrite");
  RopeKvWriteArgs a = {};
  a.rows = args.Int32("rows", 0, kMaxRows);
  a.dtype = args.Type("dtype");
  a.num_heads = args.Int32("numHeads", 1, kMaxHeads);
  a.num_kv_heads = args.Int32("numKvHeads", 1, kMaxHeads);
  a.head_dim = HeadDim(args);
  a.rotary_dims = args.Int32("rotaryDims", 0, a.head_dim);
  if (a.rotary_dims % 2 != 0) args.Fail("rotaryDims must be even");
  a.ld_qkv = args.Int("ldQkv", 0, kMaxInt);
  const int64_t width = (int64_t{a.num_heads} + 2 * int64_t{a.num_kv_heads}) * a.head_dim;
  a.qkv = args.Elements("qkv", a.dtype, args.Extent("ldQkv", a.rows, a.ld_qkv, width));
  a.cos_sin = args.Floats("cosSin", int64_t{a.rows} * a.rotary_dims);
  const int32_t* blocks = args.Ints("blocks", a.rows);
  a.kv_lane = args.Ints("lanes", a.rows);
  const Pool pool = ReadPool(args, a.dtype, a.num_kv_heads, a.head_dim);
  std::vector<int64_t> offsets;
  for (int32_t row = 0; row < a.rows && args.ok(); ++row) {
    CheckBlock(args, pool, blocks[row]);
    if (a.kv_lane[row] < 0 || a.kv_lane[row] >= kKvBlockTokens) args.Fail("a lane is outside 0 .. 31");
    offsets.push_back(blocks[row] * pool.block_bytes);
  }
  if (!args.ok()) return args.Throw();
  a.kv_offset = offsets.data();
  a.kv_base = pool.data;
  a.kv_head_stride = pool.head_bytes;
  args.kernels().rope_kv_write(a);
  return info.Env().Undefined();
}

// attention({ tier, dtype, q, ldq, rows, numHeads, numKvHeads, headDim, kv, blocks, position0, keys, scale, splits,
// out, ldo, scratch }): all heads of one sequence, keys 0 .. keys. splits 0 writes out directly; n >= 1 cuts the keys
// into n ranges of whole blocks (some empty when there are fewer blocks), computes each as a partial, and joins them.
Napi::Value Attention(const Napi::CallbackInfo& info) {
  Args args(info, "attention");
  AttentionArgs a = {};
  a.dtype = args.Type("dtype");
  a.rows = args.Int32("rows", 0, kMaxRows);
  const int32_t num_heads = args.Int32("numHeads", 1, kMaxHeads);
  const int32_t num_kv_heads = args.Int32("numKvHeads", 1, kMaxHeads);
  if (args.ok() && num_heads % num_kv_heads != 0) args.Fail("numHeads must be a multiple of numKvHeads");
  a.head_dim = HeadDim(args);
  a.ldq = args.Int("ldq", 0, kMaxInt);
  a.ldo = args.Int("ldo", 0, kMaxInt);
  a.position0 = args.Int32("position0", 0, kMaxInt / 2);
  const int64_t last = int64_t{a.position0} + a.rows;
  const int32_t keys = args.Int32("keys", 0, last);
  a.scale = static_cast<float>(args.Number("scale"));
  if (!(a.scale > 0) || !std::isfinite(a.scale)) args.Fail("scale must be positive and finite");
  const int32_t splits = args.Int32("splits", 0, 4096);
  const int64_t width = int64_t{num_heads} * a.head_dim;
  const char* q = args.Elements("q", a.dtype, args.Extent("ldq", a.rows, a.ldq, width));
  char* out = args.Elements("out", a.dtype, args.Extent("ldo", a.rows, a.ldo, width));
  const int32_t num_blocks = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
  const int32_t* blocks = args.Ints("blocks", num_blocks);
  const Pool pool = ReadPool(args, a.dtype, num_kv_heads, a.head_dim);
  std::vector<int64_t> offsets;
  for (int32_t b = 0; b < num_blocks && args.ok(); ++b) {
    CheckBlock(args, pool, blocks[b]);
    offsets.push_back(blocks[b] * pool.block_bytes);
  }
  const View scratch = args.Bytes("scratch");
  if (args.ok() && scratch.nbytes < static_cast<int64_t>(kAttentionScratchBytes) + 63) {
    args.Fail("scratch must have attentionScratchBytes");
  }
  if (!args.ok()) return args.Throw();

  a.group = num_heads / num_kv_heads;
  a.block_offset = offsets.data();
  a.scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data) + 63) / 64 * 64);
  const int64_t split_stride = int64_t{a.rows} * a.group * (a.head_dim + 2);
  const std::unique_ptr<float, void (*)(void*)> partials(
      static_cast<float*>(splits > 0 ? std::malloc(static_cast<size_t>(split_stride * splits + 1) * sizeof(float))
                                     : nullptr),
      std::free);
  if (splits > 0 && partials == nullptr) {
    ToError(info.Env(), Status(Code::kNoMemory, "attention: no memory for the partials of the splits"))
        .ThrowAsJavaScriptException();
    return info.Env().Undefined();
  }
  const int32_t blocks_per_split = splits > 0 ? (num_blocks + splits - 1) / splits : num_blocks;
  for (int32_t h = 0; h < num_kv_heads; ++h) {
    const int64_t first_head = int64_t{h} * a.group * a.head_dim * ElementBytes(a.dtype);
    a.q = q + first_head;
    a.out = out + first_head;
    a.kv_base = pool.data + h * pool.head_bytes;
    if (splits == 0) {
      a.key0 = 0;
      a.key1 = keys;
      args.kernels().attention(a);
      continue;
    }
    for (int32_t s = 0; s < splits; ++s) {
      const int64_t start = int64_t{s} * blocks_per_split * kKvBlockTokens,
                    end = start + int64_t{blocks_per_split} * kKvBlockTokens;
      a.key0 = static_cast<int32_t>(
          start < int64_t{num_blocks} * kKvBlockTokens ? start : int64_t{num_blocks} * kKvBlockTokens);
      a.key1 = static_cast<int32_t>(end < keys ? end : keys);
      a.partial = partials.get() + s * split_stride;
      args.kernels().attention(a);
    }
    AttentionMergeArgs merge = {};
    merge.partials = partials.get();
    merge.split_stride = split_stride;
    merge.splits = splits;
    merge.rows = a.rows;
    merge.group = a.group;
    merge.head_dim = a.head_dim;
    merge.out = a.out;
    merge.dtype = a.dtype;
    merge.ldo = a.ldo;
    args.kernels().attention_merge(merge);
  }
  return info.Env().Undefined();
}

// maxSumExp({ tier, x, count, scale }) -> { max, argmax, sumExp }
Napi::Value MaxSumExp(const Napi::CallbackInfo& info) {
  Args args(info, "maxSumExp");
  const int32_t count = args.Int32("count", 0, kMaxInt);
  const float scale = static_cast<float>(args.Number("scale"));
  if (!(scale >= 0) || !std::isfinite(scale)) args.Fail("scale must be finite and not negative");
  const float* x = args.Floats("x", count);
  if (!args.ok()) return args.Throw();
  float max = 0, sum_exp = 0;
  int32_t argmax = 0;
  args.kernels().max_sum_exp(x, count, scale, &max, &argmax, &sum_exp);
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("max", max);
  result.Set("argmax", argmax);
  result.Set("sumExp", sum_exp);
  return result;
}

}  // namespace

void RegisterRows(Napi::Env env, Napi::Object exports) {
  exports.Set("copyBytes", Napi::Function::New(env, CopyBytes, "copyBytes"));
  exports.Set("reduceSum", Napi::Function::New(env, ReduceSum, "reduceSum"));
  exports.Set("reduceResidual", Napi::Function::New(env, ReduceResidual, "reduceResidual"));
  exports.Set("rmsNorm", Napi::Function::New(env, RmsNorm, "rmsNorm"));
  exports.Set("ropeKvWrite", Napi::Function::New(env, RopeKvWrite, "ropeKvWrite"));
  exports.Set("attention", Napi::Function::New(env, Attention, "attention"));
  exports.Set("kvMemory", Napi::Function::New(env, KvMemory, "kvMemory"));
  exports.Set("maxSumExp", Napi::Function::New(env, MaxSumExp, "maxSumExp"));
  exports.Set("attentionScratchBytes", Napi::Number::New(env, static_cast<double>(kAttentionScratchBytes) + 63));
}

}  // namespace tilerank
