// AVX-512 linear kernels: pack, unpack, embed, gemm, convert, stream_read. Included by avx512_bf16.cpp inside its
// anonymous namespace.
//
// A packed panel is a run of 64-byte lines: 16 outputs times one k of f32 or one pair of k of bf16. A row of x is as
// many four-byte steps as the panel has lines, so both dtypes share all code but one instruction.
//
// The order of every sum is a promise: element (row, output) = (sum over even lines) + (sum over odd lines), each in
// one accumulator with lines ascending, then the bias. It depends on nothing else: not on m, nor on the panel range,
// nor on which of the two forms below ran. So a token gets the same bits alone, in a batch, and under any number of
// threads.

constexpr int kChains = 2;          // accumulators of one element; see above
constexpr int kBlockRows = 14;      // 14 rows x 2 panels = 28 accumulators + 2 lines + 1 broadcast of 32 registers
constexpr int kPackedRowStep = 16;  // steps of 16 rows stand in one 64-byte line of packed x

// Rounds to nearest even in the integer form; the 16 results stand in the low halves.
inline __m512i RoundToBf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40));
}

inline __m256i NarrowToBf16(__m512 value) { return _mm512_cvtepi32_epi16(RoundToBf16(value)); }

inline __m512 WidenBf16(__m256i value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
}

// exp for x <= 0. x = n ln2 + r with |r| <= ln2 / 2; e^r by its Taylor sum to r^7 (truncation 5e-9, under a tenth of an
// ulp). x below -126 counts as -126: e^x is zero in f32 from -104 on. NaN stays NaN.
inline __m512 ExpOfNegative(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // the second operand is returned when x is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);  // upper 15 bits of ln2: n times it is exact
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);      // the rest
  __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// x * sigmoid(x) through exp(-|x|) <= 1: nothing overflows.
inline __m512 Silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = ExpOfNegative(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
  const __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  return _mm512_mul_ps(x, _mm512_div_ps(_mm512_mask_blend_ps(is_positive, e, one), _mm512_add_ps(one, e)));
}

// 16 x 16 four-byte elements: row i of the result is column i of the argument.
inline void Transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + j] holds, in 128-bit lane q, rows 4 g .. 4 g + 3 of column 4 q + j.
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);      // lanes 0, 2 of g = 0, then of g = 1
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);  // lanes 1, 3
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

inline __mmask16 FirstLanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1u);
}

// count (0 .. 16) elements as f32, zeros after them; nothing past them is read.
inline __m512 LoadAsF32(const char* from, DType dtype, int64_t count) {
  const __mmask16 mask = FirstLanes(count);
  if (dtype == DType::kF32) return _mm512_maskz_loadu_ps(mask, from);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
  return dtype == DType::kBf16 ? WidenBf16(half) : _mm512_cvtph_ps(half);
}

// The 16 steps of one row and one packed tile: 32 bf16 or 16 f32, of which `count` exist.
inline __m512i LoadSteps(const char* from, DType source_dtype, DType dtype, int64_t count) {
  if (dtype == DType::kF32) return _mm512_castps_si512(LoadAsF32(from, source_dtype, count));
  if (source_dtype == DType::kBf16) {
    const __mmask32 mask = count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
    return _mm512_maskz_loadu_epi16(mask, from);
  }
  const __m256i low = NarrowToBf16(LoadAsF32(from, source_dtype, count));
  const __m256i high = NarrowToBf16(
      count <= 16 ? _mm512_setzero_ps() : LoadAsF32(from + 16 * ElementBytes(source_dtype), source_dtype, count - 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

void Pack(const PackArgs& args) {
  const int64_t tile_k = TileK(args.dtype);
  const int64_t source_bytes = ElementBytes(args.source_dtype);
  for (int64_t i = 0; i < args.rows;) {
    // Rows i .. i + rows - 1 fill columns column .. of one panel; other columns may belong to a call on another thread.
    const int64_t output = args.n0 + i;
    const int64_t column = output % kPanel;
    const int64_t rows = args.rows - i < kPanel - column ? args.rows - i : kPanel - column;
    const int64_t panel = args.interleave == 2 ? output / kPanel * 2 + args.phase : output / kPanel;
    const __mmask16 columns = static_cast<__mmask16>(((1u << rows) - 1u) << column);
    char* tile = static_cast<char*>(args.packed) + panel * args.k_tiles * static_cast<int64_t>(kTileBytes);
    for (int64_t k = 0; k < args.k_tiles * tile_k; k += tile_k, tile += kTileBytes) {
      __m512i steps[16];
      for (int64_t j = 0; j < 16; j++) {
        const int64_t row = j - column;
        steps[j] =
            row < 0 || row >= rows || k >= args.k
                ? _mm512_setzero_si512()
                : LoadSteps(static_cast<const char*>(args.source) + ((i + row) * args.source_ld + k) * source_bytes,
                            args.source_dtype, args.dtype, args.k - k);
      }
      Transpose16(steps);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) _mm512_mask_storeu_epi32(tile + 64 * j, columns, steps[j]);
    }
    i += rows;
  }
}

// The 16 steps that tile `tile` holds of packed output n.
inline __m512i GatherSteps(const PackedWeight& weight, int64_t n, int64_t tile) {
  const __m512i lines = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  const char* from = static_cast<const char*>(weight.data) +
                     (n / kPanel * weight.k_tiles + tile) * static_cast<int64_t>(kTileBytes) + n % kPanel * 4;
  return _mm512_i32gather_epi32(lines, from, 4);
}

inline void StoreRow(char* to, DType dtype, __m512 value, __mmask16 mask) {
  if (dtype == DType::kF32) {
    _mm512_mask_storeu_ps(to, mask, value);
  } else {
    _mm256_mask_storeu_epi16(to, mask, NarrowToBf16(value));
  }
}

// Columns [0, k) of packed output n as dtype.
inline void CopyRow(const PackedWeight& weight, int64_t n, char* to, DType dtype) {
  const int64_t tile_k = TileK(weight.dtype);
  const int64_t element_bytes = ElementBytes(dtype);
  for (int64_t tile = 0; tile < weight.k_tiles; tile++) {
    const int64_t k = tile * tile_k;
    const int64_t count = weight.k - k;
    const __m512i steps = GatherSteps(weight, n, tile);
    if (weight.dtype == DType::kF32) {
      StoreRow(to + k * element_bytes, dtype, _mm512_castsi512_ps(steps), FirstLanes(count));
    } else if (dtype == DType::kBf16) {
      const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1u;
      _mm512_mask_storeu_epi16(to + k * 2, mask, steps);
    } else {
      StoreRow(to + k * 4, dtype, WidenBf16(_mm512_castsi512_si256(steps)), FirstLanes(count));
      const __m512 rest = WidenBf16(_mm512_extracti64x4_epi64(steps, 1));
      if (count > 16) StoreRow(to + k * 4 + 64, dtype, rest, FirstLanes(count - 16));
    }
  }
}

void Unpack(const PackedWeight& weight, int32_t n0, int32_t rows, float* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i++) CopyRow(weight, n0 + i, reinterpret_cast<char*>(out + i * ld), DType::kF32);
}

void Embed(const PackedWeight& weight, const int32_t* ids, int32_t rows, void* y, DType y_dtype, int64_t ldy) {
  for (int64_t i = 0; i < rows; i++) {
    char* to = static_cast<char*>(y) + i * ldy * ElementBytes(y_dtype);
    if (ids[i] < 0 || ids[i] >= weight.n) {
      memset(to, 0, static_cast<size_t>(weight.k) * static_cast<size_t>(ElementBytes(y_dtype)));
    } else {
      CopyRow(weight, ids[i], to, y_dtype);
    }
  }
}

// sum += line * step of x, step in every lane: one k of f32, or two of bf16.
template <bool kIsBf16>
inline __m512 MultiplyAdd(__m512 sum, __m512i line, __m512i step) {
  if constexpr (kIsBf16) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(line), reinterpret_cast<__m512bh>(step));
  } else {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(line), _mm512_castsi512_ps(step), sum);
  }
}

// Columns [16 panel, 16 panel + 16) of `rows` rows of y; sums [rows] of row_step floats.
inline void FinishPanel(const GemmArgs& args, int64_t panel, int64_t row0, int rows, const float* sums,
                        int64_t row_step) {
  const float* bias = args.weight->bias;
  const __m512 added = bias != nullptr ? _mm512_loadu_ps(bias + panel * kPanel) : _mm512_setzero_ps();
  const int64_t bytes = ElementBytes(args.y_dtype);
  char* to = static_cast<char*>(args.y) + (row0 * args.ldy + panel * kPanel) * bytes;
  for (int i = 0; i < rows; i++, to += args.ldy * bytes) {
    __m512 value = _mm512_loadu_ps(sums + i * row_step);
    if (bias != nullptr) value = _mm512_add_ps(value, added);
    StoreRow(to, args.y_dtype, value, 0xffff);
  }
}

// The gate panel (even) and the up panel after it become one panel of y.
inline void FinishGateUp(const GemmArgs& args, int64_t panel, int64_t row0, int rows, const float* gate,
                         const float* up, int64_t row_step) {
  const float* bias = args.weight->bias;
  const int64_t bytes = ElementBytes(args.y_dtype);
  char* to = static_cast<char*>(args.y) + (row0 * args.ldy + panel / 2 * kPanel) * bytes;
  for (int i = 0; i < rows; i++, to += args.ldy * bytes) {
    __m512 g = _mm512_loadu_ps(gate + i * row_step), u = _mm512_loadu_ps(up + i * row_step);
    if (bias != nullptr) {
      g = _mm512_add_ps(g, _mm512_loadu_ps(bias + panel * kPanel));
      u = _mm512_add_ps(u, _mm512_loadu_ps(bias + (panel + 1) * kPanel));
    }
    StoreRow(to, args.y_dtype, _mm512_mul_ps(Silu(g), u), 0xffff);
  }
}

// Rows (1 .. 14) of x -> [chain][lines / chains][step] four-byte steps (step <= 16); those of rows that do not exist
// are zeros.
inline void PackRows(const char* from, int64_t row_bytes, int rows, int64_t lines, int32_t* to, int64_t step,
                     int64_t chains) {
  const __mmask16 mask = FirstLanes(step);
  for (int64_t l = 0; l < lines; l += 16) {
    __m512i steps[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      steps[i] = i < rows ? _mm512_loadu_si512(from + i * row_bytes + l * 4) : _mm512_setzero_si512();
    }
    Transpose16(steps);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      _mm512_mask_storeu_epi32(to + ((l + i) % chains * (lines / chains) + (l + i) / chains) * step, mask, steps[i]);
    }
  }
}

// ---- Streaming form: few rows. All of x stays in the caches, and the packed weights are read once, in memory order.

constexpr int kStreamRows = kBlockRows;

// Up to 5 rows memory is the limit: one fetch 4 KiB ahead reads it fastest. From 6 rows on both memory and arithmetic
// are near their limits; there lines come first to the second-level cache and then to the first, and x is packed as
// [lines][StreamStep] four-byte steps, for as many rows side by side would compete for the eight ways of a cache set.
// Measured on Zen 4 for [8, 4096] x [4096, 4096] bf16: 155 GFLOP/s without either, 213 with the fetches, 218 with both.
constexpr int kPackedStreamRows = 6;
constexpr int64_t kStreamAhead = 4096;
constexpr int64_t kStreamFarAhead = 8192, kStreamNearAhead = 1024;
constexpr int StreamStep(int rows) { return rows < kPackedStreamRows ? 1 : (rows + 3) / 4 * 4; }

// sums[kRows][16] = kRows rows of x (row_step steps apart) times one panel.
template <bool kIsBf16, int kRows>
void StreamPanel(const char* panel, const int32_t* x, int64_t row_step, int64_t lines, float* sums) {
  constexpr int64_t kLineStep = StreamStep(kRows);
  if (kRows >= kPackedStreamRows) row_step = 1;
  constexpr int kUnroll = kRows == 1 ? 16 : kRows <= 4 ? 4 : 2;  // lines is a multiple of 16
  __m512 acc[kChains][kRows];
#pragma GCC unroll 2
  for (int c = 0; c < kChains; c++) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; i++) acc[c][i] = _mm512_setzero_ps();
  }
  for (int64_t l = 0; l < lines; l += kUnroll) {
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; u++) {
      const char* at = panel + 64 * (l + u);
      if constexpr (kRows >= kPackedStreamRows) {
        _mm_prefetch(at + kStreamFarAhead, _MM_HINT_T1);
        _mm_prefetch(at + kStreamNearAhead, _MM_HINT_T0);
      } else {
        _mm_prefetch(at + kStreamAhead, _MM_HINT_T0);
      }
      const __m512i line = _mm512_load_si512(at);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; i++) {
        acc[u % kChains][i] =
            MultiplyAdd<kIsBf16>(acc[u % kChains][i], line, _mm512_set1_epi32(x[i * row_step + (l + u) * kLineStep]));
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; i++) _mm512_storeu_ps(sums + 16 * i, _mm512_add_ps(acc[0][i], acc[1][i]));
}

template <bool kIsBf16, int kRows>
void StreamRows(const GemmArgs& args, int64_t row0) {
  const PackedWeight& weight = *args.weight;
  const int64_t lines = static_cast<int64_t>(weight.k_tiles) * 16;
  const int64_t row_bytes = args.ldx * (kIsBf16 ? 2 : 4);
  const char* from = static_cast<const char*>(args.x) + row0 * row_bytes;
  const int32_t* x = reinterpret_cast<const int32_t*>(from);
  if constexpr (kRows >= kPackedStreamRows) {
    int32_t* packed = static_cast<int32_t*>(args.scratch);
    PackRows(from, row_bytes, kRows, lines, packed, StreamStep(kRows), 1);
    x = packed;
  }
  const int64_t panel_bytes = lines * 64;
  const char* panel_data = static_cast<const char*>(weight.data) + args.panel0 * panel_bytes;
  alignas(64) float sums[2][kRows * 16];
  for (int64_t p = args.panel0; p < args.panel1; p++, panel_data += panel_bytes) {
    if (args.activation == Activation::kSiluMul) {
      StreamPanel<kIsBf16, kRows>(panel_data, x, row_bytes / 4, lines, sums[p % 2]);
      if (p % 2 == 1) FinishGateUp(args, p - 1, row0, kRows, sums[0], sums[1], 16);
    } else {
      StreamPanel<kIsBf16, kRows>(panel_data, x, row_bytes / 4, lines, sums[0]);
      FinishPanel(args, p, row0, kRows, sums[0], 16);
    }
  }
}

// ---- Blocked form: many rows. x is packed into scratch once a call, in blocks of up to 14 rows: [chain][lines / 2][16
// rows] of four-byte steps, so that the inner loop reads one line of x and one line of each of two panels per 28
// multiply-adds. The two panels (kBlockLines lines of each at a time) stay in the second-level cache while all row
// blocks pass over them.

constexpr int64_t kBlockLines = 2048;  // a multiple of 16: 256 KiB of two panels, a quarter of a 1 MiB cache
constexpr int64_t kBlockAhead = 8;     // steps ahead at which lines are fetched from the second level

// sums[kRows][kPanels][16] (+)= packed x [steps][16] times every second line of kPanels panels. Every step also fetches
// one line of the next pair of panels, so that it has arrived in the second-level cache by the time it is wanted.
template <bool kIsBf16, int kRows, int kPanels>
void BlockPass(const char* b, int64_t panel_bytes, const int32_t* x, int64_t steps, float* sums, bool continues,
               const char* next) {
  __m512 acc[kRows][kPanels];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; p++) {
      acc[i][p] = continues ? _mm512_load_ps(sums + (i * kPanels + p) * 16) : _mm512_setzero_ps();
    }
  }
  for (int64_t s = 0; s < steps; s++) {
    __m512i line[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; p++) {
      line[p] = _mm512_load_si512(b + p * panel_bytes);
      _mm_prefetch(b + p * panel_bytes + kBlockAhead * 64 * kChains, _MM_HINT_T0);
    }
    _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; i++) {
      const __m512i step = _mm512_set1_epi32(x[i]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; p++) acc[i][p] = MultiplyAdd<kIsBf16>(acc[i][p], line[p], step);
    }
    b += 64 * kChains;
    x += kPackedRowStep;
    next += 64;
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; p++) _mm512_store_ps(sums + (i * kPanels + p) * 16, acc[i][p]);
  }
}

using BlockPassFunction = void (*)(const char*, int64_t, const int32_t*, int64_t, float*, bool, const char*);
using StreamRowsFunction = void (*)(const GemmArgs&, int64_t);

template <bool kIsBf16, int... kRows>
struct RowTable {
  static constexpr BlockPassFunction kPass[2][sizeof...(kRows)] = {{BlockPass<kIsBf16, kRows, 1>...},
                                                                   {BlockPass<kIsBf16, kRows, 2>...}};
  static constexpr StreamRowsFunction kStream[sizeof...(kRows)] = {StreamRows<kIsBf16, kRows>...};
};
template <bool kIsBf16>
using Rows = RowTable<kIsBf16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;

template <bool kIsBf16>
void GemmOf(const GemmArgs& args) {
  const PackedWeight& weight = *args.weight;
  const int64_t lines = static_cast<int64_t>(weight.k_tiles) * 16;
  const int64_t block_bytes = lines * 64;                            // packed x of one row block
  constexpr int64_t kPartialFloats = kChains * kBlockRows * 2 * 16;  // sums of one row block between two runs of lines
  const int64_t max_blocks = static_cast<int64_t>(kGemmScratchBytes) / (block_bytes + kPartialFloats * 4);
  // The second: one block of a very long k (from 130,000 of bf16) no longer fits the scratch; then five rows at a time
  // need none.
  if (args.m <= kStreamRows || max_blocks == 0) {
    const int64_t fitting =
        block_bytes <= static_cast<int64_t>(kGemmScratchBytes) ? kStreamRows : kPackedStreamRows - 1;
    for (int64_t row0 = 0; row0 < args.m; row0 += fitting) {
      const int64_t rows = args.m - row0 < fitting ? args.m - row0 : fitting;
      Rows<kIsBf16>::kStream[rows - 1](args, row0);
    }
    return;
  }
  const int64_t row_bytes = args.ldx * (kIsBf16 ? 2 : 4);
  const int64_t panel_bytes = lines * 64;
  const int64_t total_blocks = (args.m + kBlockRows - 1) / kBlockRows;
  const int64_t chunks = (total_blocks + max_blocks - 1) / max_blocks;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    // Rows are dealt evenly to chunks and to blocks: 16 rows are 8 + 8 and not 14 + 2.
    const int64_t first = args.m * chunk / chunks, rows = args.m * (chunk + 1) / chunks - first;
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    int32_t* packed = static_cast<int32_t*>(args.scratch);
    float* partials = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + blocks * block_bytes);
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t row = rows * i / blocks;
      PackRows(static_cast<const char*>(args.x) + (first + row) * row_bytes, row_bytes,
               static_cast<int>(rows * (i + 1) / blocks - row), lines, packed + i * lines * kPackedRowStep,
               kPackedRowStep, kChains);
    }
    for (int64_t panel = args.panel0; panel < args.panel1; panel += 2) {
      const int panels = panel + 1 < args.panel1 ? 2 : 1;
      const char* b = static_cast<const char*>(weight.data) + panel * panel_bytes;
      for (int64_t line0 = 0; line0 < lines; line0 += kBlockLines) {
        const int64_t line1 = line0 + kBlockLines < lines ? line0 + kBlockLines : lines;
        const int64_t steps = (line1 - line0) / kChains;
        for (int64_t i = 0; i < blocks; i++) {
          const int block_rows = static_cast<int>(rows * (i + 1) / blocks - rows * i / blocks);
          float* sums = partials + i * kPartialFloats;
          const int64_t chain_floats = block_rows * panels * 16;
          for (int c = 0; c < kChains; c++) {
            // The lines that this pair wants next: the following run of both panels, or the next pair's first run. A
            // pass has as many steps as a chain has lines, so passes 0 .. 3 fetch the two halves of the two panels.
            const int64_t pass = i * kChains + c;
            const char* next = b + (pass / 2 % 2) * panel_bytes + (line1 < lines ? line1 * 64 : 2 * panel_bytes) +
                               pass % 2 * steps * 64;
            if (pass >= 4) next = b + line0 * 64;  // already there: costs nothing
            Rows<kIsBf16>::kPass[panels - 1][block_rows - 1](
                b + (line0 + c) * 64, panel_bytes,
                packed + (i * lines + c * (lines / kChains) + line0 / kChains) * kPackedRowStep, steps,
                sums + c * chain_floats, line0 > 0, next);
          }
          if (line1 < lines) continue;
          for (int64_t j = 0; j < chain_floats; j += 16) {
            _mm512_store_ps(sums + j, _mm512_add_ps(_mm512_load_ps(sums + j), _mm512_load_ps(sums + chain_floats + j)));
          }
          const int64_t row = first + rows * i / blocks;
          if (args.activation == Activation::kSiluMul) {
            FinishGateUp(args, panel, row, block_rows, sums, sums + 16, 32);
          } else {
            for (int p = 0; p < panels; p++) FinishPanel(args, panel + p, row, block_rows, sums + 16 * p, 16 * panels);
          }
        }
      }
    }
  }
}

void Gemm(const GemmArgs& args) {
  if (args.weight->dtype == DType::kBf16) {
    GemmOf<true>(args);
  } else {
    GemmOf<false>(args);
  }
}

void Convert(void* out, DType out_dtype, const void* in, DType in_dtype, size_t count) {
  if (out_dtype == in_dtype) {
    memmove(out, in, count * static_cast<size_t>(ElementBytes(in_dtype)));
    return;
  }
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  const int64_t in_bytes = ElementBytes(in_dtype), out_bytes = ElementBytes(out_dtype);
  for (int64_t i = 0, n = static_cast<int64_t>(count); i < n; i += 16) {
    StoreRow(to + i * out_bytes, out_dtype, LoadAsF32(from + i * in_bytes, in_dtype, n - i), FirstLanes(n - i));
  }
}

uint64_t StreamRead(const void* data, size_t nbytes) {
  __m512i acc[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc[j] = _mm512_setzero_si512();
  const char* from = static_cast<const char*>(data);
  for (size_t offset = 0; offset < nbytes; offset += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) acc[j] = _mm512_xor_si512(acc[j], _mm512_loadu_si512(from + offset + 64 * j));
  }
  for (int j = 1; j < 8; j++) acc[0] = _mm512_xor_si512(acc[0], acc[j]);
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, acc[0]);
  uint64_t result = 0;
  for (uint64_t lane : lanes) result ^= lane;
  return result;
}
