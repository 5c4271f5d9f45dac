// AVX-512 tier, attention: one code for prompts and decoding, bf16 (vdpbf16ps) and f32 (fma). Query rows are (token,
// head of the group), token-major, in tiles of kAttnTile; every K and V block that is loaded serves the whole tile.
//
// Keys go by in chunks of kAttnChunkBlocks blocks, counted from key0. For each chunk:
//   scores   S[row][key] = q.k, 8 rows x 32 keys in registers; blocks that a group of 8 rows cannot see are left out
//   softmax  per row: maximum over its visible keys of the chunk, P = exp2(...), in place over S, zero up to its end.
//            bf16: P is rounded to pairs, l sums the unrounded weights. f32: P stays f32.
//   values   O[row] = O[row] * alpha + P V, 6 rows x 64 dims in registers over all blocks of the chunk
// Scores prefetch the chunk's V into L2, values the next chunk's K: decoding is bound by memory, and blocks are too
// short a run for the hardware's own prefetcher (4k context, group 4, one core: 20 GB/s, without 9, with chunks of 8
// blocks 19; reading alone 30). A bf16 pair and an f32 are both one dword, so K (128 bytes a step), V (4 head_dim bytes
// a step), q and P have one geometry, and only the multiply differs. A row's value depends on its keys and key0 alone:
// other rows of the call give it no other order, so one row computed alone has the bits it has among 64.
//
// Masked keys: scores of lanes beyond a row's limit are replaced by -inf whatever they are. Their V lanes meet P = 0,
// which is harmless while they are finite; blocks that some row of the tile sees in part are looked at, and where one
// holds a NaN or an infinity the chunk's values are done row by row with those lanes zeroed. Maximum in base 2 and rows
// without keys: see scalar_attention.inl. Included after avx512_rows.inl; head_dim <= kAttnMaxHeadDim.

constexpr int kAttnTile = 72;        // rows: a multiple of 8 (scores) and of 6 (values); Falcon's 71 heads are one tile
constexpr int kAttnChunkBlocks = 4;  // 128 keys: 32 KiB of K and of V at head_dim 128, both stay in L2
constexpr int kAttnChunkKeys = kAttnChunkBlocks * kKvBlockTokens;
constexpr int kAttnScoreStride = kAttnChunkKeys + 16;  // floats; not a power of two, so that rows do not share L1 sets
constexpr int kAttnMaxHeadDim = kMaxHeadDim;
constexpr float kAttnLog2e = 1.44269504f;

// Working memory of one call, in AttentionArgs::scratch.
struct alignas(64) AttnScratch {
  float scores[kAttnTile * kAttnScoreStride];             // S, then P in place
  float out[kAttnTile * kAttnMaxHeadDim];                 // O [row][head_dim rounded up to 16]
  uint32_t q[kAttnTile * kAttnMaxHeadDim];                // dwords [row / 8][step][8]
  uint32_t value_copy[kKvBlockTokens * kAttnMaxHeadDim];  // a V part with the lanes of masked keys zeroed
  float sums[kAttnTile][16];                              // l, in 16 lanes
  float max[kAttnTile];                                   // m, base 2
  float alpha[kAttnTile];                                 // of this chunk
  int32_t limit[kAttnTile];                               // keys [key0, limit) are visible
};
static_assert(sizeof(AttnScratch) <= kAttentionScratchBytes, "the scratch holds a tile");

template <bool kIsBf16>
inline __m512 AttnDot(__m512 sum, __m512i a, __m512i b) {
  if constexpr (kIsBf16) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  } else {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
}

// S[kRows][32] of one block. `q` is [step][8] dwords, `k` [step][32] dwords. `ahead` (or null) has the size of a K
// part; it is fetched into L2 at the pace of K, which hides memory behind the arithmetic.
template <bool kIsBf16, int kRows>
void AttnScores(const uint32_t* q, const char* k, int steps, float* s, const char* ahead) {
  __m512 sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int step = 0; step < steps; ++step) {
    const __m512i k0 = _mm512_loadu_si512(k + 128 * step);
    const __m512i k1 = _mm512_loadu_si512(k + 128 * step + 64);
    if (ahead != nullptr) {
      _mm_prefetch(ahead + 128 * step, _MM_HINT_T1);
      _mm_prefetch(ahead + 128 * step + 64, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(q[8 * step + r]));
      sum[r][0] = AttnDot<kIsBf16>(sum[r][0], x, k0);
      sum[r][1] = AttnDot<kIsBf16>(sum[r][1], x, k1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(s + r * kAttnScoreStride, sum[r][0]);
    _mm512_storeu_ps(s + r * kAttnScoreStride + 16, sum[r][1]);
  }
}

template <bool kIsBf16>
void AttnScoresOf(int rows, const uint32_t* q, const char* k, int steps, float* s, const char* ahead) {
  switch (rows) {
    case 1:
      return AttnScores<kIsBf16, 1>(q, k, steps, s, ahead);
    case 2:
      return AttnScores<kIsBf16, 2>(q, k, steps, s, ahead);
    case 3:
      return AttnScores<kIsBf16, 3>(q, k, steps, s, ahead);
    case 4:
      return AttnScores<kIsBf16, 4>(q, k, steps, s, ahead);
    case 5:
      return AttnScores<kIsBf16, 5>(q, k, steps, s, ahead);
    case 6:
      return AttnScores<kIsBf16, 6>(q, k, steps, s, ahead);
    case 7:
      return AttnScores<kIsBf16, 7>(q, k, steps, s, ahead);
    default:
      return AttnScores<kIsBf16, 8>(q, k, steps, s, ahead);
  }
}

// O[kRows][16 kCols] = O * alpha + P V over `blocks` blocks. `v` are V parts, `ahead` (or null) places of the same
// geometry.
struct AttnValueArgs {
  const float* p;            // P of the first row
  const char* const* v;      // [blocks], at the first of these columns
  const char* const* ahead;  // [blocks] or null
  int blocks, steps;         // steps of a block: 16 pairs of tokens, or 32 tokens
  int64_t v_stride;          // bytes of a step: 4 head_dim
  int64_t v_column;          // byte offset of the first column in a step
  float* out;
  int64_t out_stride;  // floats
  const float* alpha;  // [kRows]
  __mmask16 last;      // valid dims of the last 16
};

template <bool kIsBf16, int kRows, int kCols>
void AttnValues(const AttnValueArgs& a) {
  __m512 sum[kRows][kCols];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m512 alpha = _mm512_set1_ps(a.alpha[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
      sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(a.out + r * a.out_stride + 16 * c), alpha);
  }
  const int64_t stride = a.v_stride;
  const __mmask16 last = a.last;
  for (int block = 0; block < a.blocks; ++block) {
    const char* v = a.v[block] + a.v_column;
    const char* ahead = a.ahead != nullptr ? a.ahead[block] + a.v_column : nullptr;
    const int* p = reinterpret_cast<const int*>(a.p) + block * a.steps;
    for (int step = 0; step < a.steps; ++step, v += stride) {
      __m512i values[kCols];
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) {
        values[c] = c == kCols - 1 ? _mm512_maskz_loadu_epi32(last, v + 64 * c) : _mm512_loadu_si512(v + 64 * c);
      }
      if (ahead != nullptr) {
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) _mm_prefetch(ahead + 64 * c, _MM_HINT_T1);
        ahead += stride;
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(p[r * kAttnScoreStride + step]);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) sum[r][c] = AttnDot<kIsBf16>(sum[r][c], x, values[c]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) _mm512_storeu_ps(a.out + r * a.out_stride + 16 * c, sum[r][c]);
  }
}

template <bool kIsBf16, int kRows>
void AttnValuesCols(int cols, const AttnValueArgs& a) {
  switch (cols) {
    case 1:
      return AttnValues<kIsBf16, kRows, 1>(a);
    case 2:
      return AttnValues<kIsBf16, kRows, 2>(a);
    case 3:
      return AttnValues<kIsBf16, kRows, 3>(a);
    default:
      return AttnValues<kIsBf16, kRows, 4>(a);
  }
}

template <bool kIsBf16>
void AttnValuesOf(int rows, int cols, const AttnValueArgs& a) {
  switch (rows) {
    case 1:
      return AttnValuesCols<kIsBf16, 1>(cols, a);
    case 2:
      return AttnValuesCols<kIsBf16, 2>(cols, a);
    case 3:
      return AttnValuesCols<kIsBf16, 3>(cols, a);
    case 4:
      return AttnValuesCols<kIsBf16, 4>(cols, a);
    case 5:
      return AttnValuesCols<kIsBf16, 5>(cols, a);
    default:
      return AttnValuesCols<kIsBf16, 6>(cols, a);
  }
}

// One row's softmax over the `keys` keys of the chunk that it sees; `blocks` is the length of the chunk.
// c = scale * log2(e). Afterwards s holds P, zero from `keys` to the end of the chunk.
template <bool kIsBf16>
void AttnSoftmax(float* s, int keys, int blocks, float c, float* max, float* sums, float* alpha) {
  const int used = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
  const int whole = keys / kKvBlockTokens;
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  const int tail = keys - whole * kKvBlockTokens;
  const __mmask16 tail0 = RowTail(tail), tail1 = tail > 16 ? RowTail(tail - 16) : static_cast<__mmask16>(0);
  float m = *max;
  *alpha = 1.0f;
  if (keys > 0) {
    __m512 top0 = lowest, top1 = lowest;
    for (int b = 0; b < whole; ++b) {
      top0 = _mm512_max_ps(top0, _mm512_loadu_ps(s + 32 * b));
      top1 = _mm512_max_ps(top1, _mm512_loadu_ps(s + 32 * b + 16));
    }
    if (tail > 0) {
      top0 = _mm512_mask_max_ps(top0, tail0, top0, _mm512_maskz_loadu_ps(tail0, s + 32 * whole));
      top1 = _mm512_mask_max_ps(top1, tail1, top1, _mm512_maskz_loadu_ps(tail1, s + 32 * whole + 16));
    }
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(top0, top1)) * c;
    const float m_new = top > m ? top : m;  // a NaN score shows in P, not here
    const float base = m_new == -__builtin_inff() ? 0.0f : m_new;
    if (m_new != m) {
      *alpha = _mm512_cvtss_f32(RowExp2(_mm512_set1_ps(m - base)));
      *max = m_new;
    }
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(*alpha));
    const __m512 factor = _mm512_set1_ps(c), bases = _mm512_set1_ps(base);
    for (int b = 0; b < used; ++b) {
      __m512 p0 = RowExp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + 32 * b), factor, bases));
      __m512 p1 = RowExp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + 32 * b + 16), factor, bases));
      if (b == whole) {
        p0 = _mm512_maskz_mov_ps(tail0, p0);
        p1 = _mm512_maskz_mov_ps(tail1, p1);
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
      if constexpr (kIsBf16) {
        _mm512_storeu_si512(s + 16 * b, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));  // behind the reads: 16 b <= 32 b
      } else {
        _mm512_storeu_ps(s + 32 * b, p0);
        _mm512_storeu_ps(s + 32 * b + 16, p1);
      }
    }
    _mm512_storeu_ps(sums, sum);
  }
  constexpr int kStep = kIsBf16 ? 16 : 32;
  for (int b = used * kStep; b < blocks * kStep; b += 16) _mm512_storeu_ps(s + b, _mm512_setzero_ps());
}

// Whether a V part holds a NaN or an infinity.
template <bool kIsBf16>
bool AttnHasNonFinite(const char* v, int64_t nbytes) {
  const __m512i exponent = kIsBf16 ? _mm512_set1_epi16(0x7f80) : _mm512_set1_epi32(0x7f800000);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t at = 0; at < nbytes; at += 64) {  // a V part is 32 tokens of an even number of dims: whole vectors
    const __m512i x = _mm512_and_si512(_mm512_loadu_si512(v + at), exponent);
    largest = kIsBf16 ? _mm512_max_epu16(largest, x) : _mm512_max_epu32(largest, x);
  }
  return (kIsBf16 ? _mm512_cmpeq_epi16_mask(largest, exponent) : _mm512_cmpeq_epi32_mask(largest, exponent)) != 0;
}

// V part with the lanes from `lanes` on zeroed.
template <bool kIsBf16>
void AttnCopyValues(uint32_t* to, const char* v, int head_dim, int lanes) {
  constexpr int kTokens = kIsBf16 ? 2 : 1;  // of a dword
  for (int step = 0; step < kKvBlockTokens / kTokens; ++step) {
    const int valid = lanes - step * kTokens;
    const uint32_t mask = valid >= kTokens ? 0xffffffffu : valid == 1 ? 0x0000ffffu : 0u;
    for (int d = 0; d < head_dim; ++d) {
      uint32_t x;
      memcpy(&x, v + (static_cast<int64_t>(step) * head_dim + d) * 4, 4);
      to[step * head_dim + d] = x & mask;
    }
  }
}

// Splits the 16-wide columns of a head into equal pieces of at most 4.
template <bool kIsBf16>
void AttnValuesRow(int rows, int head_dim, AttnValueArgs a) {
  const int columns = (head_dim + 15) / 16, pieces = (columns + 3) / 4;
  float* out = a.out;
  for (int piece = 0; piece < pieces; ++piece) {
    const int first = columns * piece / pieces, end = columns * (piece + 1) / pieces;
    a.v_column = 64 * first;
    a.out = out + 16 * first;
    a.last = end == columns ? RowTail(head_dim - 16 * (columns - 1)) : static_cast<__mmask16>(0xffff);
    AttnValuesOf<kIsBf16>(rows, end - first, a);
  }
}

template <bool kIsBf16>
void AttnTile(const AttentionArgs& a, AttnScratch& t, int first, int rows) {
  constexpr int kSteps = kIsBf16 ? kKvBlockTokens / 2 : kKvBlockTokens;  // of V in a block
  constexpr int kDims = kIsBf16 ? 2 : 1;                                 // of a dword
  const int head_dim = a.head_dim, steps = head_dim / kDims;
  const int64_t part_bytes = static_cast<int64_t>(steps) * 128;
  const int64_t out_stride = (head_dim + 15) / 16 * 16;
  const float c = a.scale * kAttnLog2e;

  for (int r = 0; r < rows; ++r) {
    const int token = (first + r) / a.group, head = (first + r) % a.group;
    const char* q = static_cast<const char*>(a.q) + (token * a.ldq + static_cast<int64_t>(head) * head_dim) * 4 / kDims;
    uint32_t* to = t.q + static_cast<int64_t>(r / 8) * steps * 8 + r % 8;
    for (int step = 0; step < steps; ++step) memcpy(to + 8 * step, q + 4 * step, 4);
    const int causal = a.position0 + token + 1;
    t.limit[r] = causal < a.key1 ? causal : a.key1;
    t.max[r] = -__builtin_inff();
    memset(t.sums[r], 0, sizeof t.sums[r]);
  }
  memset(t.out, 0, static_cast<size_t>(rows * out_stride) * sizeof(float));

  const int key_end = t.limit[rows - 1];
  const char* base = static_cast<const char*>(a.kv_base);
  const int64_t* blocks_of = a.block_offset;
  for (int chunk = a.key0; chunk < key_end; chunk += kAttnChunkKeys) {
    const int keys = key_end - chunk < kAttnChunkKeys ? key_end - chunk : kAttnChunkKeys;
    const int blocks = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
    const char* k_parts[kAttnChunkBlocks];
    const char* v_parts[kAttnChunkBlocks];
    const char* next_parts[kAttnChunkBlocks];  // K parts of the next chunk, fetched while this one's V is at work
    const int left = (key_end - chunk + kKvBlockTokens - 1) / kKvBlockTokens;
    for (int b = 0; b < blocks; ++b) {
      k_parts[b] = base + blocks_of[chunk / kKvBlockTokens + b];
      v_parts[b] = k_parts[b] + part_bytes;
      const int next = b + kAttnChunkBlocks < left ? b + kAttnChunkBlocks : b;
      next_parts[b] = base + blocks_of[chunk / kKvBlockTokens + next];
    }

    bool is_guarded = false;
    for (int b = 0; b < blocks; ++b) {
      const int key = chunk + b * kKvBlockTokens;
      bool is_ahead = true;
      for (int r = 0; r < rows; r += 8) {
        const int end = r + 8 < rows ? r + 8 : rows;
        if (t.limit[end - 1] <= key) continue;
        AttnScoresOf<kIsBf16>(end - r, t.q + static_cast<int64_t>(r) * steps, k_parts[b], steps,
                              t.scores + r * kAttnScoreStride + b * kKvBlockTokens, is_ahead ? v_parts[b] : nullptr);
        is_ahead = false;
      }
      if (t.limit[0] < key + kKvBlockTokens)
        is_guarded = is_guarded || AttnHasNonFinite<kIsBf16>(v_parts[b], part_bytes);
    }

    for (int r = 0; r < rows; ++r) {
      const int seen = t.limit[r] - chunk;
      AttnSoftmax<kIsBf16>(t.scores + r * kAttnScoreStride,
                           seen < 0      ? 0
                           : seen < keys ? seen
                                         : keys,
                           blocks, c, &t.max[r], t.sums[r], &t.alpha[r]);
    }

    AttnValueArgs v = {};
    v.v = v_parts;
    v.steps = kSteps;
    v.v_stride = static_cast<int64_t>(head_dim) * 4;
    v.out_stride = out_stride;
    const int group_rows = is_guarded ? 1 : 6;
    bool is_ahead = blocks == kAttnChunkBlocks;
    for (int r = 0; r < rows; r += group_rows) {
      const int end = r + group_rows < rows ? r + group_rows : rows;
      const int seen = t.limit[end - 1] - chunk;
      if (seen <= 0) continue;
      v.blocks = seen < keys ? (seen + kKvBlockTokens - 1) / kKvBlockTokens : blocks;
      v.ahead = is_ahead ? next_parts : nullptr;
      is_ahead = false;
      v.p = t.scores + r * kAttnScoreStride;
      v.out = t.out + r * out_stride;
      v.alpha = t.alpha + r;
      const int partly = seen / kKvBlockTokens;  // the block that this row sees in part, if it is one of the chunk's
      const char* original = nullptr;
      if (is_guarded && partly < v.blocks) {
        original = v_parts[partly];
        AttnCopyValues<kIsBf16>(t.value_copy, original, head_dim, seen % kKvBlockTokens);
        v_parts[partly] = reinterpret_cast<const char*>(t.value_copy);
      }
      AttnValuesRow<kIsBf16>(end - r, head_dim, v);
      if (original != nullptr) v_parts[partly] = original;
    }
  }

  for (int r = 0; r < rows; ++r) {
    const int token = (first + r) / a.group, head = (first + r) % a.group;
    const float* o = t.out + r * out_stride;
    const float l = RowSumLanes(_mm512_loadu_ps(t.sums[r]));
    if (a.partial != nullptr) {
      float* partial = a.partial + (static_cast<int64_t>(token) * a.group + head) * (head_dim + 2);
      memcpy(partial, o, static_cast<size_t>(head_dim) * sizeof(float));
      partial[head_dim] = t.max[r];
      partial[head_dim + 1] = l;
      continue;
    }
    const __m512 inverse = _mm512_set1_ps(l == 0.0f ? 0.0f : 1.0f / l);
    const int64_t out = token * a.ldo + static_cast<int64_t>(head) * head_dim;
    for (int d = 0; d < head_dim; d += 16) {
      RowStore<kIsBf16>(a.out, out + d, RowTail(head_dim - d), _mm512_mul_ps(_mm512_loadu_ps(o + d), inverse));
    }
  }
}

void Attention(const AttentionArgs& a) {
  AttnScratch& scratch = *static_cast<AttnScratch*>(a.scratch);
  const int total = a.rows * a.group;
  for (int first = 0; first < total; first += kAttnTile) {
    const int rows = total - first < kAttnTile ? total - first : kAttnTile;
    if (a.dtype == DType::kBf16) {
      AttnTile<true>(a, scratch, first, rows);
    } else {
      AttnTile<false>(a, scratch, first, rows);
    }
  }
}

template <bool kIsBf16>
void AttnMerge(const AttentionMergeArgs& a) {
  const int64_t stride = a.head_dim + 2;
  const int64_t heads = static_cast<int64_t>(a.rows) * a.group;
  for (int64_t i = 0; i < heads; ++i) {
    const float* first = a.partials + i * stride;
    float m = -__builtin_inff();
    for (int32_t s = 0; s < a.splits; ++s) {
      const float split_max = first[s * a.split_stride + a.head_dim];
      if (split_max > m) m = split_max;
    }
    const __m512 base = _mm512_set1_ps(m == -__builtin_inff() ? 0.0f : m);
    const int64_t out = i / a.group * a.ldo + i % a.group * a.head_dim;
    // 64 dims at a time; the weights are computed anew for each, which is cheaper than a place to keep any number of
    // them
    for (int32_t d = 0; d < a.head_dim; d += 64) {
      __m512 l = _mm512_setzero_ps();
      __m512 sum[4] = {l, l, l, l};
      for (int32_t s = 0; s < a.splits; ++s) {
        const float* partial = first + s * a.split_stride;
        const __m512 weight = RowExp2(_mm512_sub_ps(_mm512_set1_ps(partial[a.head_dim]), base));
        l = _mm512_fmadd_ps(_mm512_set1_ps(partial[a.head_dim + 1]), weight, l);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const int32_t left = a.head_dim - d - 16 * c;
          const __mmask16 mask = left > 0 ? RowTail(left) : static_cast<__mmask16>(0);
          sum[c] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, partial + d + 16 * c), weight, sum[c]);
        }
      }
      const float total = _mm512_cvtss_f32(l);
      const __m512 inverse = _mm512_set1_ps(total == 0.0f ? 0.0f : 1.0f / total);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int32_t left = a.head_dim - d - 16 * c;
        if (left > 0) RowStore<kIsBf16>(a.out, out + d + 16 * c, RowTail(left), _mm512_mul_ps(sum[c], inverse));
      }
    }
  }
}

void AttentionMerge(const AttentionMergeArgs& a) {
  if (a.dtype == DType::kBf16) {
    AttnMerge<true>(a);
  } else {
    AttnMerge<false>(a);
  }
}
