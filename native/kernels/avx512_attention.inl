// AVX-512 tier, attention: one code for prompts and decoding, bf16 (vdpbf16ps) and f32 (fma). Query rows are (token,
// head of the group), token-major, in tiles of kAttnTile; every K and V block that is loaded serves the whole tile.
//
// Keys go by in chunks of kAttnChunkBlocks blocks, or of one block where few rows stream through the cache, counted from key0:
//   scores   S[row][key] = q.k, 8 rows x 32 keys in registers; blocks that a group of 8 rows cannot see are left out
//   softmax  4 rows x 1 block: maximum over the visible keys, P = exp2(...), in place over S, zero where a row sees no key.
//            bf16: P is rounded to pairs, l sums the unrounded weights. f32: P stays f32.
//   values   O[row] = O[row] * alpha + P V block by block, 6 rows x 64 dims or 3 x 128 in registers over the chunk
// Decoding is bound by memory. Where the next block is the neighbour of this one, K, V, K, V ... is one ascending stream and the
// hardware's prefetcher is best left alone; elsewhere its lines are fetched into L2 at the pace of this one's (4k context, group 4,
// one core that reads 30 GB/s: neighbours 26, scattered 15, scattered without the fetches 10). A bf16 pair and an f32 are both one
// dword, so K (128 bytes a step), V (4 head_dim bytes a step), q and P have one geometry, and only the multiply differs. A row's
// value depends on its keys and key0 alone: the softmax goes by blocks in either form, and other rows of the call give it no other
// order, so one row computed alone has the bits it has among 64.
//
// Masked keys: scores of lanes beyond a row's limit are replaced by -inf whatever they are. Their V lanes meet P = 0,
// which is harmless while they are finite; blocks that some row of the tile sees in part are looked at, and where one
// holds a NaN or an infinity the chunk's values are done row by row with those lanes zeroed. Maximum in base 2 and rows
// without keys: see scalar_attention.inl. Included after avx512_rows.inl; head_dim <= kAttnMaxHeadDim.

constexpr int kAttnTile = 72;        // rows: a multiple of 8 (scores) and of 6 (values); Falcon's 71 heads are one tile
constexpr int kAttnChunkBlocks = 4;  // of the blocked form: 32 KiB of K and of V at head_dim 128, both stay in L2
constexpr int kAttnStreamRows = 8;   // up to here memory is slower than the arithmetic, and chunks are single blocks
constexpr int kAttnScoreStride = kAttnChunkBlocks * kKvBlockTokens + 16;  // floats; rows do not share L1 sets
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
  float alpha[kAttnChunkBlocks][kAttnTile];               // factor of what stood before each block of the chunk
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

// S[kRows][32] of one block. `q` is [step][8] dwords, `k` [step][32] dwords. `ahead` (or null) is a K part that is fetched
// into L2 at the pace of this one.
template <bool kIsBf16, int kRows>
void AttnScores(const uint32_t* q, const char* k, int steps, float* s, const char* ahead) {
  __m512 sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  const auto walk = [&](auto fetch) {
    for (int step = 0; step < steps; ++step) {
      const __m512i k0 = _mm512_loadu_si512(k + 128 * step);
      const __m512i k1 = _mm512_loadu_si512(k + 128 * step + 64);
      fetch(step);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(q[8 * step + r]));
        sum[r][0] = AttnDot<kIsBf16>(sum[r][0], x, k0);
        sum[r][1] = AttnDot<kIsBf16>(sum[r][1], x, k1);
      }
    }
  };
  if (ahead == nullptr) {
    walk([](int) {});
  } else {
    walk([&](int step) {
      _mm_prefetch(ahead + 128 * step, _MM_HINT_T1);
      _mm_prefetch(ahead + 128 * step + 64, _MM_HINT_T1);
    });
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

// O[kRows][16 kCols] += P V over `blocks` blocks, O times the block's alpha before each.
struct AttnValueArgs {
  const float* p;            // P of the first row
  const char* const* v;      // [blocks] V parts
  const char* const* ahead;  // [blocks] V parts to fetch into L2 at the same pace, each may be null; or null
  int blocks, steps;         // steps of a block: 16 pairs of tokens, or 32 tokens
  int64_t v_stride;          // bytes of a step: 4 head_dim
  int64_t v_column;          // byte offset of the first of these columns in a step
  float* out;
  int64_t out_stride;  // floats
  const float* alpha;  // [blocks][kAttnTile], of the first row
  __mmask16 last;      // valid dims of the last 16
};

template <bool kIsBf16, int kRows, int kCols>
void AttnValues(const AttnValueArgs& a) {
  __m512 sum[kRows][kCols];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) sum[r][c] = _mm512_loadu_ps(a.out + r * a.out_stride + 16 * c);
  }
  const int64_t stride = a.v_stride;
  const __mmask16 last = a.last;
  for (int block = 0; block < a.blocks; ++block) {
    const float* alphas = a.alpha + block * kAttnTile;
    bool is_raised = false;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) is_raised |= alphas[r] != 1.0f;
    if (is_raised) {  // seldom, and a factor of 1 changes no bit
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512 alpha = _mm512_set1_ps(alphas[r]);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) sum[r][c] = _mm512_mul_ps(sum[r][c], alpha);
      }
    }
    const char* v = a.v[block] + a.v_column;
    const int* p = reinterpret_cast<const int*>(a.p) + block * a.steps;
    const auto walk = [&](auto fetch) {
      for (int step = 0; step < a.steps; ++step) {
        fetch(step);
        __m512i x[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) x[r] = _mm512_set1_epi32(p[r * kAttnScoreStride + step]);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) {
          const char* at = v + step * stride + 64 * c;
          const __m512i value = c == kCols - 1 ? _mm512_maskz_loadu_epi32(last, at) : _mm512_loadu_si512(at);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) sum[r][c] = AttnDot<kIsBf16>(sum[r][c], x[r], value);
        }
      }
    };
    if (a.ahead == nullptr || a.ahead[block] == nullptr) {
      walk([](int) {});
    } else {
      const char* ahead = a.ahead[block] + a.v_column;
      walk([&](int step) {
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) _mm_prefetch(ahead + step * stride + 64 * c, _MM_HINT_T1);
      });
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) _mm512_storeu_ps(a.out + r * a.out_stride + 16 * c, sum[r][c]);
  }
}

template <bool kIsBf16, int kRows>
void AttnValuesCols(int cols, const AttnValueArgs& a) {
  if constexpr (kRows <= 3) {
    switch (cols) {
      case 5:
        return AttnValues<kIsBf16, kRows, 5>(a);
      case 6:
        return AttnValues<kIsBf16, kRows, 6>(a);
      case 7:
        return AttnValues<kIsBf16, kRows, 7>(a);
      case 8:
        return AttnValues<kIsBf16, kRows, 8>(a);
    }
  }
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

// Maximum of each of four vectors.
inline __m128 AttnMaxOfFour(const __m512* x) {
  const __m512 by8 = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 to8 = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512 by4 = _mm512_max_ps(_mm512_shuffle_ps(by8, to8, 0x44), _mm512_shuffle_ps(by8, to8, 0xee));
  const __m256 by2 = _mm256_max_ps(_mm512_castps512_ps256(by4), _mm512_extractf32x8_ps(by4, 1));
  return _mm_max_ps(_mm256_castps256_ps128(by2), _mm256_extractf128_ps(by2, 1));
}

// Softmax of the rows [first, first + kRows) over one block of the chunk, whose first key is `key`. c = scale * log2(e).
// Afterwards the block of scores holds P, zero where a row does not see the key. `first` is a multiple of 4.
template <bool kIsBf16, int kRows>
void AttnSoftmax(AttnScratch& t, int first, int block, int key, float c) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff()), factor = _mm512_set1_ps(c);
  __m512 s[kRows][2], top[4] = {lowest, lowest, lowest, lowest};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const int seen = t.limit[first + r] - key;
    const uint32_t mask = seen >= kKvBlockTokens ? ~0u : seen > 0 ? (1u << seen) - 1 : 0u;
    const float* scores = t.scores + (first + r) * kAttnScoreStride + block * kKvBlockTokens;
    s[r][0] = _mm512_mask_loadu_ps(lowest, static_cast<__mmask16>(mask), scores);
    s[r][1] = _mm512_mask_loadu_ps(lowest, static_cast<__mmask16>(mask >> 16), scores + 16);
    top[r] = _mm512_max_ps(s[r][0], s[r][1]);
  }
  const __m128 m = _mm_loadu_ps(t.max + first);
  const __m128 m_new = _mm_max_ps(_mm_mul_ps(AttnMaxOfFour(top), _mm_set1_ps(c)), m);  // m where a score is NaN: P shows it
  const __m128 base = _mm_maskz_mov_ps(_mm_cmp_ps_mask(m_new, _mm512_castps512_ps128(lowest), _CMP_NEQ_UQ), m_new);
  const __m128 alpha = _mm_mask_mov_ps(_mm512_castps512_ps128(RowExp2(_mm512_castps128_ps512(_mm_sub_ps(m, base)))),
                                       _mm_cmp_ps_mask(m_new, m, _CMP_EQ_OQ), _mm_set1_ps(1.0f));
  _mm_storeu_ps(t.max + first, m_new);
  _mm_storeu_ps(t.alpha[block] + first, alpha);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512i lane = _mm512_set1_epi32(r);
    const __m512 bases = _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(base));
    const __m512 alphas = _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(alpha));
    const __m512 p0 = RowExp2(_mm512_fmsub_ps(s[r][0], factor, bases));
    const __m512 p1 = RowExp2(_mm512_fmsub_ps(s[r][1], factor, bases));
    float* sums = t.sums[first + r];
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(sums), alphas), _mm512_add_ps(p0, p1)));
    float* p = t.scores + (first + r) * kAttnScoreStride;
    if constexpr (kIsBf16) {
      _mm512_storeu_si512(p + 16 * block, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));  // behind the reads: 16 b <= 32 b
    } else {
      _mm512_storeu_ps(p + 32 * block, p0);
      _mm512_storeu_ps(p + 32 * block + 16, p1);
    }
  }
}

template <bool kIsBf16>
void AttnSoftmaxOf(int rows, AttnScratch& t, int first, int block, int key, float c) {
  switch (rows) {
    case 1:
      return AttnSoftmax<kIsBf16, 1>(t, first, block, key, c);
    case 2:
      return AttnSoftmax<kIsBf16, 2>(t, first, block, key, c);
    case 3:
      return AttnSoftmax<kIsBf16, 3>(t, first, block, key, c);
    default:
      return AttnSoftmax<kIsBf16, 4>(t, first, block, key, c);
  }
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

// All columns of a head for up to 6 rows: in equal pieces of at most 8 times 16 dims, so that few rows read V in one go, and the
// rows in groups that leave a piece room in the registers: 6 x 4 or 3 x 8.
template <bool kIsBf16>
void AttnValuesRow(int rows, int head_dim, AttnValueArgs a) {
  const int columns = (head_dim + 15) / 16, pieces = (columns + 7) / 8;
  const AttnValueArgs whole = a;
  for (int piece = 0; piece < pieces; ++piece) {
    const int first = columns * piece / pieces, end = columns * (piece + 1) / pieces;
    const int group = end - first > 4 ? 3 : 6;
    a.v_column = 64 * first;
    a.last = end == columns ? RowTail(head_dim - 16 * (columns - 1)) : static_cast<__mmask16>(0xffff);
    for (int r = 0; r < rows; r += group) {
      a.p = whole.p + r * kAttnScoreStride;
      a.out = whole.out + r * a.out_stride + 16 * first;
      a.alpha = whole.alpha + r;
      a.ahead = r == 0 ? whole.ahead : nullptr;
      AttnValuesOf<kIsBf16>(r + group < rows ? group : rows - r, end - first, a);
    }
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

  // The first block begins to come in while q is arranged.
  if (a.key0 < a.key1) {
    const char* start = static_cast<const char*>(a.kv_base) + a.block_offset[a.key0 / kKvBlockTokens];
    for (int64_t at = 0; at < part_bytes && at < 4096; at += 64) _mm_prefetch(start + at, _MM_HINT_T0);
  }
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

  const bool is_stream = rows <= kAttnStreamRows;
  const int chunk_blocks = is_stream ? 1 : kAttnChunkBlocks;
  const int key_end = t.limit[rows - 1];
  const char* base = static_cast<const char*>(a.kv_base);
  for (int chunk = a.key0; chunk < key_end; chunk += chunk_blocks * kKvBlockTokens) {
    const int left = (key_end - chunk + kKvBlockTokens - 1) / kKvBlockTokens;
    const int blocks = left < chunk_blocks ? left : chunk_blocks;
    const int keys = left <= chunk_blocks ? key_end - chunk : chunk_blocks * kKvBlockTokens;
    const char* k_parts[kAttnChunkBlocks];
    const char* v_parts[kAttnChunkBlocks];
    const char* k_ahead[kAttnChunkBlocks];
    const char* v_ahead[kAttnChunkBlocks];
    const int64_t* offsets = a.block_offset + chunk / kKvBlockTokens;
    for (int b = 0; b < blocks; ++b) {
      k_parts[b] = base + offsets[b];
      v_parts[b] = k_parts[b] + part_bytes;
      const int next = b + chunk_blocks;
      const bool is_ahead = next < left && offsets[next] != offsets[b] + 2 * chunk_blocks * part_bytes;
      k_ahead[b] = is_ahead ? base + offsets[next] : nullptr;
      v_ahead[b] = is_ahead ? k_ahead[b] + part_bytes : nullptr;
    }

    bool is_guarded = false;
    for (int b = 0; b < blocks; ++b) {
      const int key = chunk + b * kKvBlockTokens;
      const char* ahead = k_ahead[b];
      for (int r = 0; r < rows; r += 8) {
        const int end = r + 8 < rows ? r + 8 : rows;
        if (t.limit[end - 1] <= key) continue;
        AttnScoresOf<kIsBf16>(end - r, t.q + static_cast<int64_t>(r) * steps, k_parts[b], steps,
                              t.scores + r * kAttnScoreStride + b * kKvBlockTokens, ahead);
        ahead = nullptr;
      }
      if (t.limit[0] < key + kKvBlockTokens)
        is_guarded = is_guarded || AttnHasNonFinite<kIsBf16>(v_parts[b], part_bytes);
    }

    for (int r = 0; r < rows; r += 4) {
      for (int b = 0; b < blocks; ++b) {
        AttnSoftmaxOf<kIsBf16>(rows - r, t, r, b, chunk + b * kKvBlockTokens, c);
      }
    }

    AttnValueArgs v = {};
    v.v = v_parts;
    v.steps = kSteps;
    v.v_stride = static_cast<int64_t>(head_dim) * 4;
    v.out_stride = out_stride;
    const int group_rows = is_guarded ? 1 : 6;
    v.ahead = v_ahead;
    for (int r = 0; r < rows; r += group_rows) {
      const int end = r + group_rows < rows ? r + group_rows : rows;
      const int seen = t.limit[end - 1] - chunk;
      if (seen <= 0) continue;
      v.blocks = seen < keys ? (seen + kKvBlockTokens - 1) / kKvBlockTokens : blocks;
      v.p = t.scores + r * kAttnScoreStride;
      v.out = t.out + r * out_stride;
      v.alpha = t.alpha[0] + r;
      const int partly = seen / kKvBlockTokens;  // the block that this row sees in part, if it is one of the chunk's
      const char* original = nullptr;
      if (is_guarded && partly < v.blocks) {
        original = v_parts[partly];
        AttnCopyValues<kIsBf16>(t.value_copy, original, head_dim, seen % kKvBlockTokens);
        v_parts[partly] = reinterpret_cast<const char*>(t.value_copy);
      }
      AttnValuesRow<kIsBf16>(end - r, head_dim, v);
      v.ahead = nullptr;
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
