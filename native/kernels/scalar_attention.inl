// Scalar tier, attention: the obvious online softmax over KV blocks, everything in f32. Defines what every tier means.
// The running maximum m is kept in base 2: m = max over keys of (q.k) * scale * log2(e), and weights are exp2(... - m);
// the partials that attention writes and attention_merge reads carry it so. A row that sees no key has m = -inf, l = 0,
// sums 0, and is written out as zeros. Masked keys are never loaded, so nothing that stands in their lanes can be felt.
// Included by scalar.cpp after scalar_rows.inl, inside an anonymous namespace.

constexpr float kAttnLog2e = 1.4426950408889634f;

inline float AttnKey(const char* block, DType dtype, int32_t d, int32_t lane) {
  if (dtype == DType::kF32) return RowLoad(block, dtype, static_cast<int64_t>(d) * kKvBlockTokens + lane);
  return RowLoad(block, dtype, (static_cast<int64_t>(d / 2) * kKvBlockTokens + lane) * 2 + d % 2);
}

inline float AttnValue(const char* block, DType dtype, int32_t head_dim, int32_t lane, int32_t d) {
  const char* part = block + static_cast<int64_t>(kKvBlockTokens) * head_dim * ElementBytes(dtype);
  if (dtype == DType::kF32) return RowLoad(part, dtype, static_cast<int64_t>(lane) * head_dim + d);
  return RowLoad(part, dtype, (static_cast<int64_t>(lane / 2) * head_dim + d) * 2 + lane % 2);
}

void Attention(const AttentionArgs& a) {
  const int32_t dims = a.head_dim;
  float* sum = static_cast<float*>(a.scratch);  // [head_dim]
  for (int32_t row = 0; row < a.rows; ++row) {
    const int32_t causal = a.position0 + row + 1;
    const int32_t limit = causal < a.key1 ? causal : a.key1;
    for (int32_t g = 0; g < a.group; ++g) {
      const int64_t head = row * a.ldq + static_cast<int64_t>(g) * dims;
      float m = -INFINITY, l = 0.0f;
      for (int32_t d = 0; d < dims; ++d) sum[d] = 0.0f;
      for (int32_t key = a.key0; key < limit; key += kKvBlockTokens) {
        const char* block = static_cast<const char*>(a.kv_base) + a.block_offset[key / kKvBlockTokens];
        const int32_t lanes = limit - key < kKvBlockTokens ? limit - key : kKvBlockTokens;
        float score[kKvBlockTokens];
        float block_max = -INFINITY;
        for (int32_t t = 0; t < lanes; ++t) {
          float dot = 0.0f;
          for (int32_t d = 0; d < dims; ++d) dot += RowLoad(a.q, a.dtype, head + d) * AttnKey(block, a.dtype, d, t);
          score[t] = dot * a.scale * kAttnLog2e;
          if (score[t] > block_max) block_max = score[t];
        }
        const float m_new = block_max > m ? block_max : m;
        const float base = m_new == -INFINITY ? 0.0f : m_new;
        const float alpha = exp2f(m - base);
        l *= alpha;
        for (int32_t d = 0; d < dims; ++d) sum[d] *= alpha;
        for (int32_t t = 0; t < lanes; ++t) {
          const float p = exp2f(score[t] - base);
          l += p;
          for (int32_t d = 0; d < dims; ++d) sum[d] += p * AttnValue(block, a.dtype, dims, t, d);
        }
        m = m_new;
      }
      if (a.partial != nullptr) {
        float* partial = a.partial + (static_cast<int64_t>(row) * a.group + g) * (dims + 2);
        for (int32_t d = 0; d < dims; ++d) partial[d] = sum[d];
        partial[dims] = m;
        partial[dims + 1] = l;
      } else {
        const int64_t out = row * a.ldo + static_cast<int64_t>(g) * dims;
        for (int32_t d = 0; d < dims; ++d) RowStore(a.out, a.dtype, out + d, l == 0.0f ? 0.0f : sum[d] / l);
      }
    }
  }
}

void AttentionMerge(const AttentionMergeArgs& a) {
  const int64_t stride = a.head_dim + 2;
  for (int32_t row = 0; row < a.rows; ++row) {
    for (int32_t g = 0; g < a.group; ++g) {
      const float* first = a.partials + (static_cast<int64_t>(row) * a.group + g) * stride;
      float m = -INFINITY;
      for (int32_t s = 0; s < a.splits; ++s) {
        const float split_max = first[s * a.split_stride + a.head_dim];
        if (split_max > m) m = split_max;
      }
      const float base = m == -INFINITY ? 0.0f : m;
      float l = 0.0f;
      for (int32_t s = 0; s < a.splits; ++s) {
        const float* partial = first + s * a.split_stride;
        l += partial[a.head_dim + 1] * exp2f(partial[a.head_dim] - base);
      }
      const int64_t out = row * a.ldo + static_cast<int64_t>(g) * a.head_dim;
      for (int32_t d = 0; d < a.head_dim; ++d) {
        float sum = 0.0f;
        for (int32_t s = 0; s < a.splits; ++s) {
          const float* partial = first + s * a.split_stride;
          sum += partial[d] * exp2f(partial[a.head_dim] - base);
        }
        RowStore(a.out, a.dtype, out + d, l == 0.0f ? 0.0f : sum / l);
      }
    }
  }
}
