// AVX-512 tier, rows. Sums, norms and rotations give the scalar tier's bits: multiply and add stay apart and squares
// are added in the same 16 lanes and the same tree. Reads and writes stay inside the ranges of the arguments: tails are
// masked. Included by avx512_bf16.cpp inside an anonymous namespace.

inline __mmask16 RowTail(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1u);
}

inline __m512 RowWiden(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// To nearest even by integers, keeping denormals; every NaN becomes 0x7fc0.
inline __m256i RowNarrow(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(high);
}

template <bool kIsBf16>
inline __m512 RowLoad(const void* data, int64_t i, __mmask16 mask) {
  if constexpr (kIsBf16) {
    return RowWiden(_mm256_maskz_loadu_epi16(mask, static_cast<const char*>(data) + 2 * i));
  } else {
    return _mm512_maskz_loadu_ps(mask, static_cast<const char*>(data) + 4 * i);
  }
}

template <bool kIsBf16>
inline void RowStore(void* data, int64_t i, __mmask16 mask, __m512 x) {
  if constexpr (kIsBf16) {
    _mm256_mask_storeu_epi16(static_cast<char*>(data) + 2 * i, mask, RowNarrow(x));
  } else {
    _mm512_mask_storeu_ps(static_cast<char*>(data) + 4 * i, mask, x);
  }
}

// Lane i takes i + 8, then i + 4, i + 2, i + 1.
inline float RowSumLanes(__m512 x) {
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_shuffle_ps(by2, by2, 1)));
}

// 2^x to 1 ulp of f32 over the whole range, -inf and all below -150 to 0; NaN stays NaN. n = round(x), 2^(x - n) by a
// polynomial of degree 6 (fitted to least relative error on [-1/2, 1/2], 2e-9, with 2^0 exactly 1), scaled by 2^n.
inline __m512 RowExp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // the second operand wins where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336203e-04f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887465e-03f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437359e-03f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471e-02f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472029e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// e^x, likewise: x = n ln2 + r with ln2 in two parts, so that r keeps its last bits however large x is.
inline __m512 RowExp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.384364648e-03f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.374161602e-03f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.166800245e-02f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.666643119e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.999999421e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.000000032e+00f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

template <bool kIsBf16>
void ReduceResidualRows(const ReduceResidualArgs& a) {
  for (int32_t row = 0; row < a.rows; ++row) {
    float* residual = a.residual + row * a.ld_residual;
    float* sum_squares = a.sum_squares + row * a.ld_sum;
    const int64_t slot_row = row * a.ld_slot;
    for (int32_t block = a.column0; block < a.column1; block += kSumBlock) {
      const int32_t end = a.column1 - block < kSumBlock ? a.column1 : block + kSumBlock;
      __m512 squares = _mm512_setzero_ps();
      for (int32_t c = block; c < end; c += 16) {
        const __mmask16 mask = RowTail(end - c);
        __m512 sum = a.num_slots > 0 ? RowLoad<kIsBf16>(a.slots[0], slot_row + c, mask) : _mm512_setzero_ps();
        for (int32_t s = 1; s < a.num_slots; ++s) {
          sum = _mm512_add_ps(sum, RowLoad<kIsBf16>(a.slots[s], slot_row + c, mask));
        }
        if (a.bias != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, a.bias + c));
        if (a.add_residual) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, residual + c), sum);
        _mm512_mask_storeu_ps(residual + c, mask, sum);
        squares = _mm512_mask_add_ps(squares, mask, squares, _mm512_mul_ps(sum, sum));
      }
      sum_squares[block / kSumBlock] = RowSumLanes(squares);
    }
  }
}

void ReduceResidual(const ReduceResidualArgs& a) {
  if (a.slot_dtype == DType::kBf16) {
    ReduceResidualRows<true>(a);
  } else {
    ReduceResidualRows<false>(a);
  }
}

template <bool kIsBf16>
void RmsNormRows(const RmsNormArgs& a) {
  const int32_t blocks = (a.columns + kSumBlock - 1) / kSumBlock;
  for (int32_t row = 0; row < a.rows; ++row) {
    const float* sum_squares = a.sum_squares + row * a.ld_sum;
    float sum = 0.0f;
    for (int32_t b = 0; b < blocks; ++b) sum += sum_squares[b];
    const float mean = sum / static_cast<float>(a.columns) + a.eps;
    const __m512 r = _mm512_set1_ps(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean))));
    const float* x = a.x + row * a.ldx;
    for (int32_t c = a.column0; c < a.column1; c += 16) {
      const __mmask16 mask = RowTail(a.column1 - c);
      const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), r);
      RowStore<kIsBf16>(a.y, row * a.ldy + c, mask, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, a.gamma + c)));
    }
  }
}

void RmsNorm(const RmsNormArgs& a) {
  if (a.y_dtype == DType::kBf16) {
    RmsNormRows<true>(a);
  } else {
    RmsNormRows<false>(a);
  }
}

// to[0, d) = the rotated head; `to` may be the head itself. Both halves of 16 pairs are read before either is written.
template <bool kIsBf16>
inline void RowRotate(const void* from, int64_t head, void* to, int64_t to_head, int32_t rotary_dims,
                      const float* cos_sin) {
  const int32_t half = rotary_dims / 2;
  for (int32_t i = 0; i < half; i += 16) {
    const __mmask16 mask = RowTail(half - i);
    const __m512 cosine = _mm512_maskz_loadu_ps(mask, cos_sin + i);
    const __m512 sine = _mm512_maskz_loadu_ps(mask, cos_sin + half + i);
    const __m512 low = RowLoad<kIsBf16>(from, head + i, mask);
    const __m512 high = RowLoad<kIsBf16>(from, head + half + i, mask);
    RowStore<kIsBf16>(to, to_head + i, mask, _mm512_sub_ps(_mm512_mul_ps(low, cosine), _mm512_mul_ps(high, sine)));
    RowStore<kIsBf16>(to, to_head + half + i, mask,
                      _mm512_add_ps(_mm512_mul_ps(high, cosine), _mm512_mul_ps(low, sine)));
  }
}

// One rotated key into lane `lane` of the K part, in dwords: of a bf16 key pairs of dimensions, of an f32 key single
// ones. `rotated` holds the rotary dims; the rest comes from the row itself.
inline void RowScatterKey(char* k_part, int64_t lane, const char* rotated, int64_t rotated_bytes, const char* key,
                          int64_t nbytes) {
  char* out = k_part + lane * 4;
  for (int64_t at = 0; at < nbytes; at += 4, out += kKvBlockTokens * 4) {
    // rotary_dims is even, so that a pair of bf16 dimensions lies on one side of the border
    memcpy(out, (at < rotated_bytes ? rotated : key) + at, 4);
  }
}

template <bool kIsBf16>
void RopeKvWriteRows(const RopeKvWriteArgs& a) {
  constexpr int64_t kBytes = kIsBf16 ? 2 : 4;
  constexpr int32_t kPiece = 1024;  // rotary dims of the largest head: 4 KiB of stack
  alignas(64) char rotated[kPiece * kBytes];
  const int32_t d = a.head_dim;
  for (int32_t row = 0; row < a.rows; ++row) {
    const float* cos_sin = a.cos_sin + static_cast<int64_t>(row) * a.rotary_dims;
    const int64_t token = row * a.ld_qkv;
    for (int32_t h = 0; h < a.num_heads; ++h) {
      const int64_t head = token + static_cast<int64_t>(h) * d;
      RowRotate<kIsBf16>(a.qkv, head, a.qkv, head, a.rotary_dims, cos_sin);
    }
    const int64_t lane = a.kv_lane[row];
    for (int32_t h = 0; h < a.num_kv_heads; ++h) {
      const int64_t k_head = token + static_cast<int64_t>(a.num_heads + h) * d;
      const int64_t v_head = k_head + static_cast<int64_t>(a.num_kv_heads) * d;
      char* k_part = static_cast<char*>(a.kv_base) + a.kv_offset[row] + h * a.kv_head_stride;
      char* v_part = k_part + kKvBlockTokens * d * kBytes;
      const char* key = static_cast<const char*>(a.qkv) + k_head * kBytes;
      RowRotate<kIsBf16>(a.qkv, k_head, rotated, 0, a.rotary_dims, cos_sin);
      RowScatterKey(k_part, lane, rotated, a.rotary_dims * kBytes, key, d * kBytes);
      const char* value = static_cast<const char*>(a.qkv) + v_head * kBytes;
      if constexpr (kIsBf16) {
        // Masked stores touch this token's halves only: another thread may be writing the other token of the pair.
        const bool is_odd = (lane & 1) != 0;
        const __mmask32 halves = is_odd ? 0xaaaaaaaau : 0x55555555u;
        char* out = v_part + lane / 2 * d * 4;
        for (int32_t i = 0; i < d; i += 16) {
          const __mmask16 mask = RowTail(d - i);
          __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, value + 2 * i));
          if (is_odd) pairs = _mm512_slli_epi32(pairs, 16);
          const __mmask32 inside = d - i >= 16 ? 0xffffffffu : (1u << (2 * (d - i))) - 1u;
          _mm512_mask_storeu_epi16(out + 4 * i, halves & inside, pairs);
        }
      } else {
        memcpy(v_part + lane * d * 4, value, static_cast<size_t>(d) * 4);
      }
    }
  }
}

void RopeKvWrite(const RopeKvWriteArgs& a) {
  if (a.dtype == DType::kBf16) {
    RopeKvWriteRows<true>(a);
  } else {
    RopeKvWriteRows<false>(a);
  }
}

// A vector of 32 bf16 is taken as 16 dwords whose halves are the odd and the even elements: two operations widen 32 of
// them without moving any across lanes. vcvtne2ps2bf16 rounds like the integer form but for denormals (it flushes them)
// and keeps NaN payloads; where a sum is either, the integer form is used for that vector. 8 KB from two sources: 0.15
// us instead of 0.34.
struct RowPairs {
  __m512 even, odd;
};

inline RowPairs RowSplit(__m512i pairs) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(_mm512_and_si512(pairs, high))};
}

inline __m512i RowRoundPart(__m512 x) {  // rounded bf16 in the upper half, the lower half undefined
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline __m512i RowJoin(RowPairs x, __m512i interleave) {
  constexpr int kNanOrDenormal = 0x01 | 0x80 | 0x20;
  const __mmask16 odd_out =
      _mm512_fpclass_ps_mask(x.even, kNanOrDenormal) | _mm512_fpclass_ps_mask(x.odd, kNanOrDenormal);
  if (__builtin_expect(odd_out != 0, 0)) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_or_si512(_mm512_srli_epi32(RowRoundPart(x.even), 16), _mm512_and_si512(RowRoundPart(x.odd), high));
  }
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(x.odd, x.even));
}

// Word 2i of the result is word i (even elements), word 2i + 1 is word 16 + i (odd elements).
inline __m512i RowInterleave() {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
}

// One step of kVectors * 64 bytes: every source is added before anything is stored, so out may be any of the sources.
template <int kVectors>
inline void RowSumBf16(char* out, const void* const* sources, int32_t num_sources, size_t at, __m512i interleave) {
  RowPairs sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = RowSplit(_mm512_loadu_si512(static_cast<const char*>(sources[0]) + at + 64 * v));
  }
  for (int32_t s = 1; s < num_sources; ++s) {
    const char* source = static_cast<const char*>(sources[s]) + at;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const RowPairs x = RowSplit(_mm512_loadu_si512(source + 64 * v));
      sum[v].even = _mm512_add_ps(sum[v].even, x.even);
      sum[v].odd = _mm512_add_ps(sum[v].odd, x.odd);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(out + at + 64 * v, RowJoin(sum[v], interleave));
}

inline __m512 RowCanonical(__m512 x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                            _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

template <int kVectors>
inline void RowSumF32(char* out, const void* const* sources, int32_t num_sources, size_t at) {
  __m512 sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_loadu_ps(static_cast<const char*>(sources[0]) + at + 64 * v);
  for (int32_t s = 1; s < num_sources; ++s) {
    const char* source = static_cast<const char*>(sources[s]) + at;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_add_ps(sum[v], _mm512_loadu_ps(source + 64 * v));
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + at + 64 * v, RowCanonical(sum[v]));
}

// The sums of the model's own dtypes.
void ReduceSum(void* out, const void* const* sources, int32_t num_sources, DType dtype, size_t count) {
  char* to = static_cast<char*>(out);
  const size_t nbytes = count * static_cast<size_t>(ElementBytes(dtype));
  size_t at = 0;
  if (dtype == DType::kF32) {
    for (; at + 256 <= nbytes; at += 256) RowSumF32<4>(to, sources, num_sources, at);
    for (; at + 64 <= nbytes; at += 64) RowSumF32<1>(to, sources, num_sources, at);
    if (at < nbytes) {
      const __mmask16 mask = RowTail(static_cast<int64_t>((nbytes - at) / 4));
      __m512 sum = _mm512_maskz_loadu_ps(mask, static_cast<const char*>(sources[0]) + at);
      for (int32_t s = 1; s < num_sources; ++s) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, static_cast<const char*>(sources[s]) + at));
      }
      _mm512_mask_storeu_ps(to + at, mask, RowCanonical(sum));
    }
    return;
  }
  const __m512i interleave = RowInterleave();
  for (; at + 256 <= nbytes; at += 256) RowSumBf16<4>(to, sources, num_sources, at, interleave);
  for (; at + 64 <= nbytes; at += 64) RowSumBf16<1>(to, sources, num_sources, at, interleave);
  if (at < nbytes) {
    const __mmask32 mask = (1u << ((nbytes - at) / 2)) - 1u;
    RowPairs sum = RowSplit(_mm512_maskz_loadu_epi16(mask, static_cast<const char*>(sources[0]) + at));
    for (int32_t s = 1; s < num_sources; ++s) {
      const RowPairs x = RowSplit(_mm512_maskz_loadu_epi16(mask, static_cast<const char*>(sources[s]) + at));
      sum.even = _mm512_add_ps(sum.even, x.even);
      sum.odd = _mm512_add_ps(sum.odd, x.odd);
    }
    _mm512_mask_storeu_epi16(to + at, mask, RowJoin(sum, interleave));
  }
}

void Reduce(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, size_t count) {
  if (op == ReduceOp::kSum && (dtype == DType::kF32 || dtype == DType::kBf16)) {
    ReduceSum(out, sources, num_sources, dtype, count);
  } else {
    ReduceWhole(out, sources, num_sources, dtype, op, count);
  }
}

// Four lines at a time, all loaded before one is stored; the tail is masked.
void Copy(void* out, const void* in, size_t nbytes) {
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
  size_t at = 0;
  for (; at + 256 <= nbytes; at += 256) {
    const __m512i a = _mm512_loadu_si512(from + at), b = _mm512_loadu_si512(from + at + 64);
    const __m512i c = _mm512_loadu_si512(from + at + 128), d = _mm512_loadu_si512(from + at + 192);
    _mm512_storeu_si512(to + at, a);
    _mm512_storeu_si512(to + at + 64, b);
    _mm512_storeu_si512(to + at + 128, c);
    _mm512_storeu_si512(to + at + 192, d);
  }
  for (; at + 64 <= nbytes; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
  if (at < nbytes) {
    const __mmask64 mask = (1ull << (nbytes - at)) - 1;
    _mm512_mask_storeu_epi8(to + at, mask, _mm512_maskz_loadu_epi8(mask, from + at));
  }
}

// Maximum with its first index, then the sum in 4 x 16 f32 lanes: a lane adds 1/64 of the vocabulary, which keeps the
// rounding of 128 k terms near 1e-6. Meanings of NaN and infinities as in the scalar tier.
void MaxSumExp(const float* x, int32_t n, float scale, float* max, int32_t* argmax, float* sum_exp) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 best = lowest;
  for (int32_t i = 0; i < n; i += 16) {
    // max keeps its second operand where the first is NaN
    best = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, RowTail(n - i), x + i), best);
  }
  const float top = _mm512_reduce_max_ps(best);
  const __m512 tops = _mm512_set1_ps(top);
  *max = top;
  *sum_exp = 0.0f;
  *argmax = n > 0 ? 0 : -1;
  if (!(top > -__builtin_inff())) return;
  for (int32_t i = 0; i < n; i += 16) {
    const __mmask16 hit =
        _mm512_mask_cmp_ps_mask(RowTail(n - i), _mm512_maskz_loadu_ps(RowTail(n - i), x + i), tops, _CMP_EQ_OQ);
    if (hit != 0) {
      *argmax = i + __builtin_ctz(hit);
      break;
    }
  }
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int32_t i = 0; i < n; i += 64) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const int32_t left = n - i - 16 * part;
      const __m512 v =
          _mm512_mask_loadu_ps(lowest, left > 0 ? RowTail(left) : static_cast<__mmask16>(0), x + i + 16 * part);
      const __mmask16 counts = _mm512_cmp_ps_mask(v, lowest, _CMP_GT_OQ);
      const __mmask16 is_top = _mm512_cmp_ps_mask(v, tops, _CMP_EQ_OQ);
      const __m512 e = RowExp(_mm512_mul_ps(scales, _mm512_sub_ps(v, tops)));
      sums[part] = _mm512_mask_add_ps(sums[part], counts, sums[part], _mm512_mask_mov_ps(e, is_top, one));
    }
  }
  *sum_exp = RowSumLanes(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}
