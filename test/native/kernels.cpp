// Every entry of the kernel table on every tier that runs here, over seeded shapes with tails, with operands as guarded.h places
// them: whatever is read or written beyond what kernels.h says faults or shows, and results are held against the scalar twin.
// Run by native.test.ts:
//   test_kernels CASES [SEED]   CASES shapes a kernel
//   test_kernels --stray        one read between rows, which AddressSanitizer must report and nothing else can
#include <cmath>
#include <random>

#include "comm/communicator.h"  // names of dtypes and reductions
#include "guarded.h"
#include "kernels/dispatch.h"

using namespace tilerank;

namespace {

static_assert(sizeof(Kernels) == 16 + 17 * sizeof(void*), "a new entry of the table needs its cases here");

using Rng = std::mt19937;
using Bytes = std::vector<std::byte>;
using Emit = std::function<void(Spec)>;

size_t Size(DType dtype) { return static_cast<size_t>(ElementBytes(dtype)); }

template <class... Args>
std::string Text(const char* format, Args... args) {
  char text[200];
  std::snprintf(text, sizeof text, format, args...);
  return text;
}

int Below(Rng& rng, int n) { return static_cast<int>(rng() % static_cast<uint32_t>(n)); }
bool Coin(Rng& rng) { return rng() % 2 == 0; }
DType AnyDType(Rng& rng) { return Coin(rng) ? DType::kF32 : DType::kBf16; }

/// A size near the borders of vectors, tiles and blocks, at most `most`.
int AnySize(Rng& rng, int most) {
  static constexpr int kSizes[] = {1,  2,  3,  5,  7,  8,  13, 14, 15, 16, 17,  24,  28,  29,  31,  32,  33,  40,
                                   47, 48, 63, 64, 65, 71, 72, 96, 97, 127, 128, 129, 160, 255, 256, 257, 300, 511, 512, 513, 600};
  for (;;) {
    const int size = kSizes[Below(rng, static_cast<int>(std::size(kSizes)))];
    if (size <= most) return size;
  }
}

/// Elements to add to a row's width: none, or some.
int AnyGap(Rng& rng, int unit = 1) { return Coin(rng) ? 0 : unit * (1 + Below(rng, 3)); }

void Put(Bytes& bytes, DType dtype, size_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data() + 4 * i, &bits, 4);
  } else {
    const auto half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
}

float Get(const std::byte* bytes, DType dtype, size_t i) {
  uint32_t bits = 0;
  if (dtype == DType::kF32) {
    std::memcpy(&bits, bytes + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// Multiples of 1/8 in [-1, 1]: exact in bf16, and so are sums of some thousand products, in any order.
Bytes Eighths(Rng& rng, DType dtype, size_t count) {
  Bytes bytes(count * Size(dtype));
  for (size_t i = 0; i < count; i++) Put(bytes, dtype, i, static_cast<float>(Below(rng, 17) - 8) / 8);
  return bytes;
}

/// Finite values of many magnitudes, zeros and denormals among them.
Bytes Floats(Rng& rng, DType dtype, size_t count) {
  Bytes bytes(count * Size(dtype));
  for (size_t i = 0; i < count; i++) {
    const float value = std::ldexp(static_cast<float>(static_cast<int32_t>(rng())), Below(rng, 30) == 0 ? -165 : -31 + Below(rng, 8));
    Put(bytes, dtype, i, Below(rng, 40) == 0 ? 0.0f : value);
  }
  return bytes;
}

/// Any bit patterns.
Bytes Noise(Rng& rng, size_t nbytes) {
  Bytes bytes(nbytes);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  return bytes;
}

/// Any finite halves of f16.
Bytes Halves(Rng& rng, size_t count) {
  Bytes bytes(2 * count);
  for (size_t i = 0; i < count; i++) {
    const auto bits = static_cast<uint16_t>((rng() & 0x83ff) | static_cast<uint32_t>(Below(rng, 31)) << 10);
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
  }
  return bytes;
}

Bytes SourceOf(Rng& rng, DType dtype, size_t count) { return dtype == DType::kF16 ? Halves(rng, count) : Floats(rng, dtype, count); }

template <class T>
Bytes BytesOf(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// |actual - expected| <= absolute + relative * |expected|; NaN only for NaN, infinities the same.
Check Near(DType dtype, float absolute, float relative) {
  return [=](const std::byte* expected, const std::byte* actual, size_t nbytes) -> std::string {
    for (size_t i = 0; i < nbytes / Size(dtype); i++) {
      const float e = Get(expected, dtype, i), a = Get(actual, dtype, i);
      if (a == e || (std::isnan(a) && std::isnan(e))) continue;
      if (!(std::fabs(a - e) <= absolute + relative * std::fabs(e))) return Text("element %zu is %.9g, the scalar twin's %.9g", i, a, e);
    }
    return "";
  };
}

Operand In(const char* name, DType dtype, Bytes content, size_t rows, size_t columns, size_t ld) {
  Operand operand{name, Role::kIn, columns * Size(dtype), rows, ld * Size(dtype)};
  operand.align = Size(dtype);
  operand.content = std::move(content);
  return operand;
}
Operand Out(const char* name, DType dtype, size_t rows, size_t columns, size_t ld) {
  Operand operand{name, Role::kOut, columns * Size(dtype), rows, ld * Size(dtype)};
  operand.align = Size(dtype);
  return operand;
}
template <class T>
Operand Words(const char* name, const std::vector<T>& values) {
  Operand operand{name, Role::kIn, values.size() * sizeof(T)};
  operand.align = alignof(T);
  operand.content = BytesOf(values);
  return operand;
}
Operand Scratch(size_t nbytes) {
  Operand operand{"scratch", Role::kScratch, nbytes};
  operand.align = 64;
  return operand;
}
/// At an address that is `phase` behind a multiple of 64.
Operand Aligned(Operand operand, size_t phase = 0) {
  operand.align = 64;
  operand.phase = phase % 64;
  return operand;
}

/// Where kernels.h asks for no more than `align`: at an edge in half of the cases, else at any such address.
Operand Anywhere(Rng& rng, Operand operand, size_t align) {
  operand.align = Coin(rng) ? align : 64;
  if (operand.align == 64) operand.phase = align * static_cast<size_t>(Below(rng, static_cast<int>(64 / align)));
  return operand;
}

template <class T>
T* As(std::byte* at) {
  return reinterpret_cast<T*>(at);
}

/// An address `nbytes` before what is mapped: of a range whose beginning the call does not touch.
std::byte* Before(std::byte* at, int64_t nbytes) { return reinterpret_cast<std::byte*>(reinterpret_cast<uintptr_t>(at) - static_cast<uintptr_t>(nbytes)); }

// ---- linear ---------------------------------------------------------------------------------------------------------------

struct Shape {
  DType dtype;
  int n, k, panels, k_tiles;
  size_t panel_bytes() const { return static_cast<size_t>(k_tiles) * kTileBytes; }
};
Shape ShapeOf(DType dtype, int n, int k) { return {dtype, n, k, (n + kPanel - 1) / kPanel, (k + TileK(dtype) - 1) / TileK(dtype)}; }

PackedWeight WeightAt(const Shape& shape, const void* data, const float* bias) {
  return {data, shape.dtype, shape.n, shape.k, shape.panels, shape.k_tiles, bias};
}

void PackCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = AnyDType(rng), source_dtype = static_cast<DType>(Below(rng, 3));
    const int rows = AnySize(rng, 65), k = AnySize(rng, 129), n0 = Below(rng, 40), interleave = 1 + Below(rng, 2);
    const int phase = interleave == 2 ? Below(rng, 2) : 0, ld = k + AnyGap(rng);
    const Shape shape = ShapeOf(dtype, 1, k);
    // The call covers outputs n0 .. n0 + rows - 1; what is mapped are the panels from the first to the last of them.
    const auto panel_of = [=](int output) { return interleave == 2 ? output / kPanel * 2 + phase : output / kPanel; };
    const int first = panel_of(n0), last = panel_of(n0 + rows - 1);
    Operand packed{"packed", Role::kInOut, static_cast<size_t>(last - first + 1) * shape.panel_bytes()};
    packed.align = 64;
    packed.content = Noise(rng, packed.row_bytes);
    packed.may_change = [=](size_t, size_t byte) {
      const int panel = first + static_cast<int>(byte / shape.panel_bytes()), column = static_cast<int>(byte % 64 / 4);
      if (interleave == 2 && panel % 2 != phase) return false;
      const int output = (interleave == 2 ? panel / 2 : panel) * kPanel + column;
      return output >= n0 && output < n0 + rows;
    };
    Operand source = In("source", source_dtype, SourceOf(rng, source_dtype, static_cast<size_t>(rows) * static_cast<size_t>(k)),
                        static_cast<size_t>(rows), static_cast<size_t>(k), static_cast<size_t>(ld));
    emit({"pack", Text("%s from %s, rows=%d k=%d ld=%d n0=%d interleave=%d phase=%d", NameOf(dtype), NameOf(source_dtype), rows, k, ld, n0, interleave, phase),
          {packed, Anywhere(rng, source, 1)},
          nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.pack({Before(at[0], first * static_cast<int64_t>(shape.panel_bytes())), dtype, shape.k_tiles, at[1], source_dtype, ld, rows, k, n0,
                          interleave, phase});
          }});
  }
}

void UnpackCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const int n = AnySize(rng, 97), k = AnySize(rng, 129), n0 = Below(rng, n), rows = 1 + Below(rng, n - n0), ld = k + AnyGap(rng);
    const Shape shape = ShapeOf(AnyDType(rng), n, k);
    const int first = n0 / kPanel, last = (n0 + rows - 1) / kPanel;
    const size_t nbytes = static_cast<size_t>(last - first + 1) * shape.panel_bytes();
    Operand weight{"weight", Role::kIn, nbytes};
    weight.content = Floats(rng, shape.dtype, nbytes / Size(shape.dtype));
    emit({"unpack", Text("%s n=%d k=%d n0=%d rows=%d ld=%d", NameOf(shape.dtype), n, k, n0, rows, ld),
          {Aligned(weight), Out("out", DType::kF32, static_cast<size_t>(rows), static_cast<size_t>(k), static_cast<size_t>(ld))},
          nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            const PackedWeight packed = WeightAt(shape, Before(at[0], first * static_cast<int64_t>(shape.panel_bytes())), nullptr);
            kernels.unpack(packed, n0, rows, As<float>(at[1]), ld);
          }});
  }
}

void EmbedCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const int n = AnySize(rng, 97), k = AnySize(rng, 257), rows = AnySize(rng, 17), ld = (k + 31) / 32 * 32 + AnyGap(rng, 32);
    const Shape shape = ShapeOf(AnyDType(rng), n, k);
    const DType y_dtype = AnyDType(rng);
    std::vector<int32_t> ids;
    for (int r = 0; r < rows; r++) ids.push_back(Below(rng, n + 4) - 2);
    if (Coin(rng)) ids.back() = n - 1;
    const size_t nbytes = static_cast<size_t>(shape.panels) * shape.panel_bytes();
    Operand weight{"weight", Role::kIn, nbytes};
    weight.content = Floats(rng, shape.dtype, nbytes / Size(shape.dtype));
    emit({"embed", Text("%s to %s, n=%d k=%d rows=%d ldy=%d", NameOf(shape.dtype), NameOf(y_dtype), n, k, rows, ld),
          {Aligned(weight), Words("ids", ids), Aligned(Out("y", y_dtype, static_cast<size_t>(rows), static_cast<size_t>(k), static_cast<size_t>(ld)))},
          nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.embed(WeightAt(shape, at[0], nullptr), As<const int32_t>(at[1]), rows, at[2], y_dtype, ld);
          }});
  }
}

// Of the weight and the bias only the panels of the call are mapped, of y only their columns. All sums are exact, so that tiers
// agree in every bit but for the exp in silu: 1e-6, and one rounding to bf16.
void GemmCase(Rng& rng, DType dtype, int m, int k, int panels, bool is_silu, const Emit& emit) {
  const int unit = is_silu ? 2 : 1;
  const int panel0 = unit * Below(rng, panels / unit), count = unit * (1 + Below(rng, (panels - panel0) / unit));
  const Shape shape = ShapeOf(dtype, panels * kPanel, k);
  const size_t padded = static_cast<size_t>(shape.k_tiles) * static_cast<size_t>(TileK(dtype));
  const size_t ldx = (static_cast<size_t>(k) + 31) / 32 * 32 + static_cast<size_t>(AnyGap(rng, 32));
  Bytes x(static_cast<size_t>(m) * padded * Size(dtype));
  for (size_t row = 0; row < static_cast<size_t>(m); row++) {
    const Bytes values = Eighths(rng, dtype, static_cast<size_t>(k));
    std::copy(values.begin(), values.end(), x.begin() + static_cast<int64_t>(row * padded * Size(dtype)));
  }
  const size_t nbytes = static_cast<size_t>(count) * shape.panel_bytes();
  Operand weight{"weight", Role::kIn, nbytes};
  weight.content = Eighths(rng, dtype, nbytes / Size(dtype));
  const bool has_bias = Coin(rng);
  const DType y_dtype = AnyDType(rng);
  const int column0 = panel0 / unit * kPanel, columns = count / unit * kPanel;
  const size_t ldy = static_cast<size_t>((panels / unit * kPanel + 31) / 32 * 32 + AnyGap(rng, 32));
  Operand y = Aligned(Out("y", y_dtype, static_cast<size_t>(m), static_cast<size_t>(columns), ldy), static_cast<size_t>(column0) * Size(y_dtype));
  if (is_silu) y.check = Near(y_dtype, 1e-30f, y_dtype == DType::kF32 ? 1e-6f : 0x1p-8f);
  emit({"gemm",
        Text("%s to %s, m=%d k=%d ldx=%zu panels=%d..%d of %d%s%s ldy=%zu", NameOf(dtype), NameOf(y_dtype), m, k, ldx, panel0, panel0 + count, panels,
             is_silu ? " silu" : "", has_bias ? " bias" : "", ldy),
        {Aligned(weight), Aligned(In("x", dtype, std::move(x), static_cast<size_t>(m), padded, ldx)),
         In("bias", DType::kF32, has_bias ? Eighths(rng, DType::kF32, static_cast<size_t>(count * kPanel)) : Bytes(), 1, has_bias ? static_cast<size_t>(count * kPanel) : 0, 0),
         y, Scratch(kGemmScratchBytes)},
        nullptr,
        [=](const Kernels& kernels, std::byte* const* at) {
          const float* bias = has_bias ? As<const float>(Before(at[2], panel0 * kPanel * 4)) : nullptr;
          const PackedWeight packed = WeightAt(shape, Before(at[0], panel0 * static_cast<int64_t>(shape.panel_bytes())), bias);
          kernels.gemm({&packed, at[1], static_cast<int64_t>(ldx), m, panel0, panel0 + count, is_silu ? Activation::kSiluMul : Activation::kNone,
                        Before(at[3], static_cast<int64_t>(column0) * ElementBytes(y_dtype)), y_dtype, static_cast<int64_t>(ldy), at[4]});
        }});
}

void GemmCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const bool is_silu = Below(rng, 3) == 0;
    GemmCase(rng, AnyDType(rng), AnySize(rng, 72), AnySize(rng, 160), (is_silu ? 2 : 1) * (1 + Below(rng, 4)), is_silu, emit);
  }
  // Inputs longer than the run of lines that stays in a cache; long enough that row blocks go by in chunks; and too long for scratch.
  GemmCase(rng, DType::kF32, 17, 2100, 2, false, emit);
  GemmCase(rng, DType::kBf16, 15, 4130, 3, false, emit);
  if (cases < 500) return;
  GemmCase(rng, DType::kBf16, 16, 4097, 4, true, emit);
  GemmCase(rng, DType::kF32, 95, 20000, 1, false, emit);
  GemmCase(rng, DType::kBf16, 6, 131200, 1, false, emit);
  GemmCase(rng, DType::kBf16, 15, 131200, 1, false, emit);
}

void ConvertCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType in_dtype = static_cast<DType>(Below(rng, 3)), out_dtype = Coin(rng) ? in_dtype : AnyDType(rng);
    const size_t count = i < 3 ? 0 : static_cast<size_t>(AnySize(rng, 600));
    Operand in{"in", Role::kIn, count * Size(in_dtype)}, out{"out", Role::kOut, count * Size(out_dtype)};
    in.content = SourceOf(rng, in_dtype, count);
    emit({"convert", Text("%s to %s, count=%zu", NameOf(in_dtype), NameOf(out_dtype), count), {Anywhere(rng, in, 1), Anywhere(rng, out, 1)}, nullptr,
          [=](const Kernels& kernels, std::byte* const* at) { kernels.convert(at[1], out_dtype, at[0], in_dtype, count); }});
  }
}

void StreamReadCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const size_t nbytes = 512 * static_cast<size_t>(Below(rng, 20));
    Operand data{"data", Role::kIn, nbytes};
    data.content = Noise(rng, nbytes);
    Operand result{"result", Role::kOut, 8};
    result.align = 8;
    emit({"stream_read", Text("nbytes=%zu", nbytes), {Anywhere(rng, data, 1), result}, nullptr,
          [=](const Kernels& kernels, std::byte* const* at) { *As<uint64_t>(at[1]) = kernels.stream_read(at[0], nbytes); }});
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------------

// A range of columns [column0, column1), column0 a multiple of 256; only that much of every row is mapped.
struct Columns {
  int column0, column1;
  size_t count() const { return static_cast<size_t>(column1 - column0); }
};
Columns AnyColumns(Rng& rng) {
  const int column0 = kSumBlock * Below(rng, 3);
  return {column0, column0 + AnySize(rng, 600)};
}

void ReduceResidualCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const int num_slots = 1 + Below(rng, 4), rows = 1 + Below(rng, 4);
    const DType dtype = AnyDType(rng);
    const Columns c = AnyColumns(rng);
    const bool is_added = Coin(rng), has_bias = Coin(rng);
    const int ld_slot = c.column1 + AnyGap(rng), ld_residual = c.column1 + AnyGap(rng);
    const size_t blocks = (c.count() + kSumBlock - 1) / kSumBlock, ld_sum = static_cast<size_t>(c.column0 / kSumBlock) + blocks + static_cast<size_t>(AnyGap(rng));
    const size_t r = static_cast<size_t>(rows);
    Operand residual = Out("residual", DType::kF32, r, c.count(), static_cast<size_t>(ld_residual));
    if (is_added) {
      residual.role = Role::kInOut;
      residual.content = Floats(rng, DType::kF32, r * c.count());
    }
    std::vector<Operand> operands = {Words("slots", std::vector<const void*>(static_cast<size_t>(num_slots))), residual,
                                     In("bias", DType::kF32, Floats(rng, DType::kF32, has_bias ? c.count() : 0), 1, has_bias ? c.count() : 0, 0),
                                     Out("sum_squares", DType::kF32, r, blocks, ld_sum)};
    for (int s = 0; s < num_slots; s++) operands.push_back(In("a slot", dtype, Floats(rng, dtype, r * c.count()), r, c.count(), static_cast<size_t>(ld_slot)));
    emit({"reduce_residual",
          Text("%d %s slots, rows=%d columns=%d..%d ld_slot=%d ld_residual=%d%s%s", num_slots, NameOf(dtype), rows, c.column0, c.column1, ld_slot, ld_residual,
               is_added ? " add" : "", has_bias ? " bias" : ""),
          operands,
          [=](std::byte* const* at) {
            for (int s = 0; s < num_slots; s++) As<const void*>(at[0])[s] = Before(at[4 + s], c.column0 * static_cast<int64_t>(Size(dtype)));
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.reduce_residual({As<const void* const>(at[0]), num_slots, dtype, ld_slot, As<float>(Before(at[1], c.column0 * 4)), ld_residual, is_added,
                                     has_bias ? As<const float>(Before(at[2], c.column0 * 4)) : nullptr, As<float>(Before(at[3], c.column0 / kSumBlock * 4)),
                                     static_cast<int64_t>(ld_sum), rows, c.column0, c.column1});
          }});
  }
}

void RmsNormCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const int rows = 1 + Below(rng, 4);
    const size_t r = static_cast<size_t>(rows);
    const DType y_dtype = AnyDType(rng);
    const Columns c = AnyColumns(rng);
    const int columns = c.column1 + AnyGap(rng, 100), ldx = c.column1 + AnyGap(rng), ldy = c.column1 + AnyGap(rng);
    const size_t blocks = static_cast<size_t>((columns + kSumBlock - 1) / kSumBlock), ld_sum = blocks + static_cast<size_t>(AnyGap(rng));
    Bytes sums(r * blocks * 4);
    for (size_t s = 0; s < r * blocks; s++) Put(sums, DType::kF32, s, static_cast<float>(Below(rng, 1000)));
    emit({"rms_norm", Text("to %s, rows=%d columns=%d..%d of %d ldx=%d ldy=%d", NameOf(y_dtype), rows, c.column0, c.column1, columns, ldx, ldy),
          {In("x", DType::kF32, Floats(rng, DType::kF32, r * c.count()), r, c.count(), static_cast<size_t>(ldx)),
           In("sum_squares", DType::kF32, sums, r, blocks, ld_sum), In("gamma", DType::kF32, Floats(rng, DType::kF32, c.count()), 1, c.count(), 0),
           Out("y", y_dtype, r, c.count(), static_cast<size_t>(ldy))},
          nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.rms_norm({As<const float>(Before(at[0], c.column0 * 4)), ldx, As<const float>(at[1]), static_cast<int64_t>(ld_sum),
                              As<const float>(Before(at[2], c.column0 * 4)), 1e-5f, Before(at[3], c.column0 * static_cast<int64_t>(Size(y_dtype))), y_dtype,
                              ldy, rows, columns, c.column0, c.column1});
          }});
  }
}

size_t BlockBytes(DType dtype, int head_dim) { return 2 * static_cast<size_t>(kKvBlockTokens * head_dim) * Size(dtype); }

/// Whether a byte of a block belongs to the key or the value of the token in `lane`.
bool IsOfLane(DType dtype, int head_dim, size_t byte, int lane) {
  const size_t half = BlockBytes(dtype, head_dim) / 2;
  if (byte < half) return static_cast<int>(byte / 4 % kKvBlockTokens) == lane;
  const size_t dword = (byte - half) / 4, d = static_cast<size_t>(head_dim);
  if (dtype == DType::kF32) return static_cast<int>(dword / d) == lane;
  return static_cast<int>(dword / d * 2 + byte % 4 / 2) == lane;
}

void RopeKvWriteCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = AnyDType(rng);
    const int rows = 1 + Below(rng, 5), heads = Below(rng, 5), kv_heads = 1 + Below(rng, 3), head_dim = 2 * AnySize(rng, 72);
    const int rotary_dims = Coin(rng) ? head_dim : 2 * Below(rng, head_dim / 2 + 1);
    const int width = (heads + 2 * kv_heads) * head_dim, ld = width + AnyGap(rng);
    const size_t block_bytes = BlockBytes(dtype, head_dim), head_stride = block_bytes + static_cast<size_t>(AnyGap(rng, 64));
    const size_t r = static_cast<size_t>(rows);
    // Rows go to two blocks, each of all KV heads, in lanes of their own.
    std::vector<int32_t> lanes;
    std::vector<int> block_of;
    for (int row = 0; row < rows; row++) {
      lanes.push_back((row * 7 + i) % kKvBlockTokens);
      block_of.push_back(Below(rng, 2));
    }
    Operand qkv{"qkv", Role::kInOut, static_cast<size_t>(width) * Size(dtype), r, static_cast<size_t>(ld) * Size(dtype)};
    qkv.align = Size(dtype);
    qkv.content = Eighths(rng, dtype, r * static_cast<size_t>(width));
    qkv.may_change = [=](size_t, size_t byte) {
      const size_t element = byte / Size(dtype), d = static_cast<size_t>(head_dim);
      return element < static_cast<size_t>(heads) * d && element % d < static_cast<size_t>(rotary_dims);
    };
    std::vector<Operand> operands = {qkv,
                                     In("cos_sin", DType::kF32, Floats(rng, DType::kF32, r * static_cast<size_t>(rotary_dims)), 1, r * static_cast<size_t>(rotary_dims), 0),
                                     Words("kv_offset", std::vector<int64_t>(r)), Words("kv_lane", lanes)};
    for (int b = 0; b < 2; b++) {
      Operand block{"a KV block", Role::kInOut, block_bytes, static_cast<size_t>(kv_heads), head_stride};
      block.content = Eighths(rng, dtype, static_cast<size_t>(kv_heads) * block_bytes / Size(dtype));
      block.may_change = [=](size_t, size_t byte) {
        for (int row = 0; row < rows; row++) {
          if (block_of[static_cast<size_t>(row)] == b && IsOfLane(dtype, head_dim, byte, lanes[static_cast<size_t>(row)])) return true;
        }
        return false;
      };
      operands.push_back(Anywhere(rng, block, 4));
    }
    emit({"rope_kv_write",
          Text("%s rows=%d heads=%d+%d head_dim=%d rotary=%d ld=%d", NameOf(dtype), rows, heads, kv_heads, head_dim, rotary_dims, ld), operands,
          [=](std::byte* const* at) {
            for (int row = 0; row < rows; row++) As<int64_t>(at[2])[row] = at[4 + block_of[static_cast<size_t>(row)]] - at[4];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.rope_kv_write({at[0], dtype, ld, rows, heads, kv_heads, head_dim, rotary_dims, As<const float>(at[1]), As<const int64_t>(at[2]),
                                   As<const int32_t>(at[3]), at[4], static_cast<int64_t>(head_stride)});
          }});
  }
}

void ReduceCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const auto dtype = static_cast<DType>(Below(rng, kDTypes));
    const auto op = static_cast<ReduceOp>(Below(rng, IsFloat(dtype) ? static_cast<int>(ReduceOp::kBand) : kReduceOps));
    const int num_sources = 1 + Below(rng, 4), target = Below(rng, num_sources + 1);  // out is that source, or another range
    const size_t count = i < 3 ? 0 : static_cast<size_t>(AnySize(rng, 600)), nbytes = count * Size(dtype);
    std::vector<Operand> operands = {Words("sources", std::vector<const void*>(static_cast<size_t>(num_sources)))};
    for (int s = 0; s <= num_sources; s++) {
      const bool is_out = s == target;
      Operand operand{is_out ? "out" : "a source", s == num_sources ? Role::kOut : is_out ? Role::kInOut : Role::kIn, nbytes};
      if (s == num_sources && !is_out) operand.row_bytes = 0;
      // NaN and infinities come out alike everywhere. bf16 noise has them, f32 noise seldom.
      const bool is_model = dtype == DType::kF32 || dtype == DType::kBf16;
      if (s < num_sources) operand.content = !is_model || Coin(rng) ? Noise(rng, nbytes) : Floats(rng, dtype, count);
      operands.push_back(Anywhere(rng, operand, 1));
    }
    emit({"reduce", Text("%s of %d %s sources, count=%zu, into %s", NameOf(op), num_sources, NameOf(dtype), count, target == num_sources ? "its own range" : "a source"), operands,
          [=](std::byte* const* at) {
            for (int s = 0; s < num_sources; s++) As<const void*>(at[0])[s] = at[1 + s];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.reduce(at[1 + target], As<const void* const>(at[0]), num_sources, dtype, op, count);
          }});
  }
}

void ReduceStagedCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const auto stage = static_cast<ReduceStage>(i % 3);
    const bool is_partial = stage == ReduceStage::kPartial;
    // A partial result keeps a NaN as it is: floats are finite there, and of those that Floats knows.
    auto dtype = static_cast<DType>(Below(rng, kDTypes));
    if (is_partial && (dtype == DType::kF16 || dtype == DType::kF64)) dtype = DType::kBf16;
    const auto op = static_cast<ReduceOp>(Below(rng, IsFloat(dtype) ? static_cast<int>(ReduceOp::kBand) : kReduceOps));
    const int num_sources = 1 + Below(rng, 4), divisor = 1 + Below(rng, 9);
    const size_t count = i < 3 ? 0 : static_cast<size_t>(AnySize(rng, 600));
    const auto partial = static_cast<size_t>(PartialBytes(dtype, op));
    const size_t in_bytes = count * (stage == ReduceStage::kFinal ? partial : Size(dtype)), out_bytes = count * (is_partial ? partial : Size(dtype));
    std::vector<Operand> operands = {Words("sources", std::vector<const void*>(static_cast<size_t>(num_sources)))};
    for (int s = 0; s < num_sources; s++) {
      Operand operand{"a source", Role::kIn, in_bytes};
      operand.content = is_partial && IsFloat(dtype) ? Floats(rng, dtype, count) : Noise(rng, in_bytes);
      // Sums of integers that stand before the mean have room to spare: so many ranks there are not.
      const bool is_wide = stage == ReduceStage::kFinal && op == ReduceOp::kAvg && !IsFloat(dtype);
      for (size_t at = partial - 1; is_wide && at < in_bytes; at += partial) operand.content[at] = std::byte{0};
      operands.push_back(Anywhere(rng, operand, 1));
    }
    operands.push_back(Anywhere(rng, Operand{"out", Role::kOut, out_bytes}, 1));
    emit({"reduce_staged", Text("%s of %d %s sources, stage %d, count=%zu", NameOf(op), num_sources, NameOf(dtype), static_cast<int>(stage), count), operands,
          [=](std::byte* const* at) {
            for (int s = 0; s < num_sources; s++) As<const void*>(at[0])[s] = at[1 + s];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.reduce_staged(at[1 + num_sources], As<const void* const>(at[0]), num_sources, dtype, op, stage, divisor, count);
          }});
  }
}

/// f32, bf16 and f16.
DType NarrowDType(Rng& rng) { return static_cast<DType>(Below(rng, 3)); }

void ReduceToQ8Cases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = NarrowDType(rng);
    const int num_sources = 1 + Below(rng, 4);
    const size_t count = i < 3 ? 0 : static_cast<size_t>(AnySize(rng, 600)), nbytes = count * Size(dtype);
    std::vector<Operand> operands = {Words("sources", std::vector<const void*>(static_cast<size_t>(num_sources)))};
    for (int s = 0; s < num_sources; s++) {
      Operand operand{"a source", Role::kIn, nbytes};
      // Noise has infinities, NaN and values near the largest; groups without any must be among the cases too.
      operand.content = Below(rng, 3) == 0 ? Noise(rng, nbytes) : SourceOf(rng, dtype, count);
      operands.push_back(Anywhere(rng, operand, 1));
    }
    operands.push_back(Anywhere(rng, Operand{"out", Role::kOut, Q8Bytes(count)}, 1));
    emit({"reduce_to_q8", Text("%d %s sources, count=%zu", num_sources, NameOf(dtype), count), operands,
          [=](std::byte* const* at) {
            for (int s = 0; s < num_sources; s++) As<const void*>(at[0])[s] = at[1 + s];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.reduce_to_q8(at[1 + num_sources], As<const void* const>(at[0]), num_sources, dtype, count);
          }});
  }
}

void ReduceFromQ8Cases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = NarrowDType(rng);
    const int num_sources = 1 + Below(rng, 4), divisor = Coin(rng) ? 1 : 1 + Below(rng, 9);
    const size_t count = i < 3 ? 0 : static_cast<size_t>(AnySize(rng, 600));
    std::vector<Operand> operands = {Words("sources", std::vector<const void*>(static_cast<size_t>(num_sources)))};
    for (int s = 0; s < num_sources; s++) {
      Operand operand{"a source", Role::kIn, Q8Bytes(count)};
      operand.content = Noise(rng, Q8Bytes(count));
      const Bytes scales = Floats(rng, DType::kF32, count / kQ8Group + 1);
      for (size_t group = 0; group * kQ8Group < count && Below(rng, 4) != 0; group++) std::memcpy(operand.content.data() + group * kQ8GroupBytes, scales.data() + 4 * group, 4);
      operands.push_back(Anywhere(rng, operand, 1));
    }
    operands.push_back(Anywhere(rng, Operand{"out", Role::kOut, count * Size(dtype)}, 1));
    emit({"reduce_from_q8", Text("%d sources, %s, divisor=%d, count=%zu", num_sources, NameOf(dtype), divisor, count), operands,
          [=](std::byte* const* at) {
            for (int s = 0; s < num_sources; s++) As<const void*>(at[0])[s] = at[1 + s];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.reduce_from_q8(at[1 + num_sources], As<const void* const>(at[0]), num_sources, dtype, divisor, count);
          }});
  }
}

void CopyCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const size_t nbytes = i < 300 ? static_cast<size_t>(i) : static_cast<size_t>(Below(rng, 20000));
    Operand out{"out", Role::kOut, nbytes}, in{"in", Role::kIn, nbytes};
    in.content = Noise(rng, nbytes);
    emit({"copy", Text("nbytes=%zu", nbytes), {i < 300 ? out : Anywhere(rng, out, 1), i < 300 ? in : Anywhere(rng, in, 1)}, nullptr,
          [=](const Kernels& kernels, std::byte* const* at) { kernels.copy(at[0], at[1], nbytes); }});
  }
}

void MaxSumExpCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const int n = i == 0 ? 0 : AnySize(rng, 600);
    const float scale = Coin(rng) ? 1.0f : 1.7f;
    Bytes x(static_cast<size_t>(n) * 4);
    for (size_t j = 0; j < static_cast<size_t>(n); j++) {
      const int odd = Below(rng, 50);
      Put(x, DType::kF32, j, odd == 0 ? NAN : odd == 1 ? -INFINITY : static_cast<float>(Below(rng, 2000) - 1000) / 100);
    }
    Operand sum = Out("sum_exp", DType::kF32, 1, 1, 1);
    sum.check = Near(DType::kF32, 0, 1e-5f);
    emit({"max_sum_exp", Text("n=%d scale=%g", n, scale),
          {In("x", DType::kF32, x, 1, static_cast<size_t>(n), 0), Out("max", DType::kF32, 1, 1, 1), Out("argmax", DType::kF32, 1, 1, 1), sum}, nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.max_sum_exp(As<const float>(at[0]), n, scale, As<float>(at[1]), As<int32_t>(at[2]), As<float>(at[3]));
          }});
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------------

// One row of partials: sums, maximum, l. A bf16 tier rounds the weights to bf16 before it sums values.
Check NearPartial(DType dtype, int head_dim) {
  return [=](const std::byte* expected, const std::byte* actual, size_t nbytes) -> std::string {
    const auto d = static_cast<size_t>(head_dim);
    const float l = Get(expected, DType::kF32, d + 1);
    if (std::string s = Near(DType::kF32, (dtype == DType::kF32 ? 1e-5f : 0x1p-8f) * l, 0)(expected, actual, 4 * d); !s.empty()) return "sum: " + s;
    if (std::string s = Near(DType::kF32, 1e-5f, 1e-5f)(expected + 4 * d, actual + 4 * d, nbytes - 4 * d); !s.empty()) return "maximum and l: " + s;
    return "";
  };
}

// Every block of keys stands in a mapping of its own; entries of block_offset before key0 and blocks behind key1 do not exist.
void AttentionCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = AnyDType(rng);
    const int rows = AnySize(rng, 33), group = 1 + Below(rng, i % 10 == 0 ? 71 : 8), head_dim = 2 * AnySize(rng, i % 10 == 1 ? 129 : 64);
    const int position0 = Coin(rng) ? 0 : Below(rng, 400), end = position0 + rows;
    const int key1 = Below(rng, 4) == 0 ? 1 + Below(rng, end) : end, key0 = Coin(rng) ? 0 : Below(rng, key1) / kKvBlockTokens * kKvBlockTokens;
    const int first = key0 / kKvBlockTokens, blocks = (key1 + kKvBlockTokens - 1) / kKvBlockTokens - first;
    const int width = group * head_dim, ldq = width + AnyGap(rng), ldo = width + AnyGap(rng);
    const bool is_partial = Below(rng, 3) == 0;
    const size_t r = static_cast<size_t>(rows);
    Operand out = Out("out", dtype, r, static_cast<size_t>(width), static_cast<size_t>(ldo));
    out.check = Near(dtype, dtype == DType::kF32 ? 1e-5f : 0x1p-7f, 0);
    if (is_partial) {
      out = Out("partial", DType::kF32, r * static_cast<size_t>(group), static_cast<size_t>(head_dim) + 2, static_cast<size_t>(head_dim) + 2);
      out.check = NearPartial(dtype, head_dim);
    }
    std::vector<Operand> operands = {In("q", dtype, Eighths(rng, dtype, r * static_cast<size_t>(width)), r, static_cast<size_t>(width), static_cast<size_t>(ldq)),
                                     Words("block_offset", std::vector<int64_t>(static_cast<size_t>(blocks))), out, Scratch(kAttentionScratchBytes)};
    for (int b = 0; b < blocks; b++) {
      Operand block{"a KV block", Role::kIn, BlockBytes(dtype, head_dim)};
      block.content = Eighths(rng, dtype, block.row_bytes / Size(dtype));
      operands.push_back(Anywhere(rng, block, 4));
    }
    emit({"attention",
          Text("%s rows=%d group=%d head_dim=%d position0=%d keys=%d..%d ldq=%d ldo=%d%s", NameOf(dtype), rows, group, head_dim, position0, key0, key1, ldq, ldo,
               is_partial ? " partial" : ""),
          operands,
          [=](std::byte* const* at) {
            for (int b = 0; b < blocks; b++) As<int64_t>(at[1])[b] = at[4 + b] - at[4];
          },
          [=](const Kernels& kernels, std::byte* const* at) {
            AttentionArgs args{};
            args.q = at[0];
            args.dtype = dtype;
            args.ldq = ldq;
            args.rows = rows;
            args.group = group;
            args.head_dim = head_dim;
            args.kv_base = at[4];
            args.block_offset = As<const int64_t>(Before(at[1], 8 * first));
            args.position0 = position0;
            args.key0 = key0;
            args.key1 = key1;
            args.scale = 1 / std::sqrt(static_cast<float>(head_dim));
            (is_partial ? reinterpret_cast<void*&>(args.partial) : args.out) = at[2];
            args.ldo = ldo;
            args.scratch = at[3];
            kernels.attention(args);
          }});
  }
}

void AttentionMergeCases(Rng& rng, int cases, const Emit& emit) {
  for (int i = 0; i < cases; i++) {
    const DType dtype = AnyDType(rng);
    const int splits = 1 + Below(rng, 5), rows = 1 + Below(rng, 4), group = 1 + Below(rng, 8), head_dim = 2 * AnySize(rng, 129);
    const int width = group * head_dim, ldo = width + AnyGap(rng);
    const size_t d = static_cast<size_t>(head_dim), heads = static_cast<size_t>(rows * group), s = static_cast<size_t>(splits);
    const size_t used = heads * (d + 2), stride = used + static_cast<size_t>(AnyGap(rng));
    Bytes partials(s * used * 4);
    for (size_t head = 0; head < s * heads; head++) {
      const bool sees_nothing = Below(rng, 6) == 0;
      const float l = sees_nothing ? 0 : 1 + static_cast<float>(Below(rng, 100)) / 10;
      for (size_t j = 0; j < d; j++) Put(partials, DType::kF32, head * (d + 2) + j, l * static_cast<float>(Below(rng, 2001) - 1000) / 1000);
      Put(partials, DType::kF32, head * (d + 2) + d, sees_nothing ? -INFINITY : static_cast<float>(Below(rng, 200) - 100) / 10);
      Put(partials, DType::kF32, head * (d + 2) + d + 1, l);
    }
    Operand out = Out("out", dtype, static_cast<size_t>(rows), static_cast<size_t>(width), static_cast<size_t>(ldo));
    out.check = Near(dtype, dtype == DType::kF32 ? 1e-5f : 0x1p-8f, 0);
    emit({"attention_merge", Text("%s splits=%d rows=%d group=%d head_dim=%d stride=%zu ldo=%d", NameOf(dtype), splits, rows, group, head_dim, stride, ldo),
          {In("partials", DType::kF32, partials, s, used, stride), out}, nullptr,
          [=](const Kernels& kernels, std::byte* const* at) {
            kernels.attention_merge({As<const float>(at[0]), static_cast<int64_t>(stride), splits, rows, group, head_dim, at[1], dtype, ldo});
          }});
  }
}

// ---- the test of the test -------------------------------------------------------------------------------------------------

// Kernels that do their work and one thing more. Not instrumented, so that guards and fillings have to find them, whatever the build.
#define UNSEEN __attribute__((no_sanitize("address"), no_sanitize("undefined"), noinline))
UNSEEN void Touch(const void* at) { (void)*static_cast<const volatile unsigned char*>(at); }
UNSEEN void Spoil(void* at) { *static_cast<volatile unsigned char*>(at) = 0x11; }

const std::byte* BytesAt(const void* at, int64_t offset) { return static_cast<const std::byte*>(at) + offset; }
std::byte* BytesAt(void* at, int64_t offset) { return static_cast<std::byte*>(at) + offset; }

struct Fake {
  const char* kernel;
  Side side;
  const char* expected;  // of the message
  void (*replace)(Kernels&);
};

const Fake kFakes[] = {
    {"copy", Side::kEnd, "reads past the end of operand 'in', at byte +0",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Touch(BytesAt(in, static_cast<int64_t>(n))); }; }},
    {"copy", Side::kStart, "reads before the start of operand 'in', at byte -1",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Touch(BytesAt(in, -1)); }; }},
    {"copy", Side::kEnd, "past the end of operand 'out', at byte +63",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Spoil(BytesAt(out, static_cast<int64_t>(n) + 63)); }; }},
    {"copy", Side::kStart, "before the start of operand 'out', at byte -64",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Spoil(BytesAt(out, -64)); }; }},
    {"copy", Side::kEnd, "around the rows of operand 'out', at byte -1",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Spoil(BytesAt(out, -1)); }; }},
    {"copy", Side::kEnd, "writes to input 'in'",
     [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n); Spoil(const_cast<void*>(in)); }; }},
    {"copy", Side::kEnd, "differs in row 0 of operand 'out'", [](Kernels& k) { k.copy = [](void* out, const void* in, size_t n) { kScalarKernels.copy(out, in, n - 1); }; }},
    {"rms_norm", Side::kStart, "between or around the rows of operand 'y'",
     [](Kernels& k) {
       k.rms_norm = [](const RmsNormArgs& a) {
         kScalarKernels.rms_norm(a);
         Spoil(BytesAt(a.y, a.column1 * ElementBytes(a.y_dtype)));
       };
     }},
    {"rope_kv_write", Side::kEnd, "of operand 'a KV block', which is not the call's",
     [](Kernels& k) {
       k.rope_kv_write = [](const RopeKvWriteArgs& a) {
         kScalarKernels.rope_kv_write(a);
         // The first dimension of the key in the next lane.
         Spoil(BytesAt(a.kv_base, a.kv_offset[0] + (a.kv_lane[0] + 1) % kKvBlockTokens * 4));
       };
     }},
    {"attention", Side::kEnd, "differs in row ",
     [](Kernels& k) {
       k.attention = [](const AttentionArgs& a) {
         AttentionArgs other = a;
         other.scale = a.scale * 1.5f;  // weights of another softmax
         kScalarKernels.attention(other);
       };
     }},
    {"gemm", Side::kEnd, "differs in row 0 of operand 'y'",
     [](Kernels& k) {
       k.gemm = [](const GemmArgs& a) {
         GemmArgs other = a;
         other.ldx = 0;  // the first row for all
         other.x = BytesAt(a.x, (a.m - 1) * a.ldx * ElementBytes(a.weight->dtype));
         kScalarKernels.gemm(other);
       };
     }},
};

// ---------------------------------------------------------------------------------------------------------------------------

using Cases = void (*)(Rng&, int, const Emit&);
constexpr Cases kCases[] = {PackCases,      UnpackCases,  EmbedCases,     GemmCases,      ReduceResidualCases, RmsNormCases,        RopeKvWriteCases,
                            ReduceCases, CopyCases,    MaxSumExpCases, ConvertCases,   StreamReadCases,     AttentionCases, AttentionMergeCases,
                            ReduceStagedCases, ReduceToQ8Cases, ReduceFromQ8Cases};

/// Empty, or the first operand and row in which the results differ by more than the kernel's contract allows.
std::string Compare(const Spec& spec, const Results& expected, const Results& actual) {
  for (size_t i = 0; i < spec.operands.size(); i++) {
    const Operand& operand = spec.operands[i];
    if (expected[i].size() != actual[i].size()) return "has no result in operand '" + operand.name + "'";
    for (size_t row = 0; row < (expected[i].empty() ? 0 : operand.used_rows()); row++) {
      const std::byte *e = expected[i].data() + row * operand.row_bytes, *a = actual[i].data() + row * operand.row_bytes;
      std::string what;
      if (operand.check) {
        what = operand.check(e, a, operand.row_bytes);
      } else if (std::memcmp(e, a, operand.row_bytes) != 0) {
        what = "byte " + std::to_string(std::mismatch(e, e + operand.row_bytes, a).first - e);
      }
      if (!what.empty()) return "differs in row " + std::to_string(row) + " of operand '" + operand.name + "': " + what;
    }
  }
  return "";
}

std::string RunAndCompare(World& world, const Spec& spec, const Kernels& kernels, Side side, const Results& expected) {
  Results actual;
  std::string problem = world.Run(spec, kernels, side, &actual);
  if (problem.empty()) problem = Compare(spec, expected, actual);
  return problem.empty() ? problem : spec.kernel + " [" + spec.shape + "], tier " + kernels.name + ", " + NameOf(side) + ": " + problem;
}

Results Reference(World& world, const Spec& spec) {
  Results expected;
  if (const std::string problem = world.Run(spec, kScalarKernels, Side::kLoose, &expected); !problem.empty()) {
    std::fprintf(stderr, "%s [%s], the reference: %s\n", spec.kernel.c_str(), spec.shape.c_str(), problem.c_str());
    std::exit(1);
  }
  return expected;
}

/// A case of the kernel in which rows have gaps and there is more than one of them.
Spec SampleOf(const std::string& kernel) {
  Spec sample;
  Rng rng(1);
  for (Cases cases : kCases) {
    cases(rng, 100, [&](Spec spec) {
      if (spec.kernel != kernel) return;
      const Operand& out = spec.operands[kernel == "gemm" ? 3 : kernel == "rms_norm" ? 3 : 0];
      const bool fits = kernel == "copy" ? out.row_bytes == 99 : kernel == "rms_norm" || kernel == "gemm" ? out.rows > 1 && out.stride >= out.row_bytes + 64 : true;
      const bool has_gap_in_x = kernel != "rms_norm" || spec.operands[0].stride >= spec.operands[0].row_bytes + 8;
      if (fits && (has_gap_in_x || sample.kernel.empty()) && (sample.kernel.empty() || kernel == "rms_norm")) sample = std::move(spec);
    });
  }
  if (sample.kernel.empty()) {
    std::fprintf(stderr, "no case of %s suits the self-test\n", kernel.c_str());
    std::exit(1);
  }
  return sample;
}

int TestFakes(World& world) {
  int missed = 0;
  for (const Fake& fake : kFakes) {
    const Spec spec = SampleOf(fake.kernel);
    const Results expected = Reference(world, spec);
    Kernels kernels = kScalarKernels;
    kernels.name = "fake";
    fake.replace(kernels);
    const std::string problem = RunAndCompare(world, spec, kernels, fake.side, expected);
    const std::string start = std::string(fake.kernel) + " [" + spec.shape + "], tier fake, " + NameOf(fake.side) + ": ";
    if (problem.rfind(start, 0) == 0 && problem.find(fake.expected) != std::string::npos) continue;
    std::fprintf(stderr, "a kernel that strays was not caught as it should: expected '%s%s', got '%s'\n", start.c_str(), fake.expected, problem.c_str());
    missed++;
  }
  return missed;
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  if (argc > 1 && std::string(argv[1]) == "--stray") {
    const Spec spec = SampleOf("rms_norm");
    Kernels kernels = kScalarKernels;
    kernels.rms_norm = [](const RmsNormArgs& a) {
      kScalarKernels.rms_norm(a);
      volatile float sink = a.x[a.column1 + 1];
      (void)sink;
    };
    std::printf("%s\n", RunAndCompare(world, spec, kernels, Side::kStart, Reference(world, spec)).c_str());
    return 0;
  }
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  const auto seed = static_cast<uint32_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  if (const int missed = TestFakes(world); missed > 0) return 1;

  std::vector<const Kernels*> tiers;
  std::string names;
  for (const TierReport& report : ReportTiers()) {
    const Kernels* kernels = nullptr;
    if (!report.available || !SelectKernels(report.name + "!", &kernels).ok()) continue;
    tiers.push_back(kernels);
    names += " " + report.name;
  }
  int problems = 0, calls = 0;
  for (size_t i = 0; i < std::size(kCases); i++) {
    Rng rng(seed * 1000 + static_cast<uint32_t>(i));
    kCases[i](rng, cases, [&](const Spec& spec) {
      const Results expected = Reference(world, spec);
      for (const Kernels* kernels : tiers) {
        for (Side side : {Side::kEnd, Side::kStart}) {
          calls++;
          const std::string problem = RunAndCompare(world, spec, *kernels, side, expected);
          if (problem.empty()) continue;
          if (++problems <= 20) std::fprintf(stderr, "%s\n", problem.c_str());
        }
      }
    });
  }
  if (problems > 0) {
    std::fprintf(stderr, "%d of %d calls are wrong\n", problems, calls);
    return 1;
  }
  std::printf("ok, %d calls, tiers%s\n", calls, names.c_str());
}
