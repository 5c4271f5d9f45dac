// Scalar tier, rows: residual sums, RMSNorm, RoPE with the KV write, reductions. These define the meaning, and for all
// but max_sum_exp also the bits: every tier adds the same values in the same order and rounds at the same places.
// Included by scalar.cpp inside an anonymous namespace.

inline uint32_t RowBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float RowFromBits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// To nearest even by integers; every NaN becomes 0x7fc0, because the payload of a sum of two NaNs depends on the order
// in which a compiler places the operands.
inline uint16_t RowToBf16(float x) {
  const uint32_t bits = RowBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Element i of a buffer of any alignment.
inline float RowLoad(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kF32) {
    float x;
    memcpy(&x, static_cast<const char*>(data) + 4 * i, 4);
    return x;
  }
  uint16_t x;
  memcpy(&x, static_cast<const char*>(data) + 2 * i, 2);
  return RowFromBits(static_cast<uint32_t>(x) << 16);
}

inline void RowStore(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kF32) {
    memcpy(static_cast<char*>(data) + 4 * i, &x, 4);
    return;
  }
  const uint16_t half = RowToBf16(x);
  memcpy(static_cast<char*>(data) + 2 * i, &half, 2);
}

// Sum of 16 lanes as a tree: lane i takes i + 8, then i + 4, i + 2, i + 1.
inline float RowSumLanes(float* lanes) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// new = old + ((slot 0 + slot 1 + ...) + bias). Squares of a block of 256 are added into 16 lanes (element c into lane
// c % 16), then as a tree; a short last block counts as if padded with zeros.
void ReduceResidual(const ReduceResidualArgs& a) {
  for (int32_t row = 0; row < a.rows; ++row) {
    float* residual = a.residual + row * a.ld_residual;
    float* sum_squares = a.sum_squares + row * a.ld_sum;
    for (int32_t block = a.column0; block < a.column1; block += kSumBlock) {
      const int32_t end = a.column1 - block < kSumBlock ? a.column1 : block + kSumBlock;
      float lanes[16] = {};
      for (int32_t c = block; c < end; ++c) {
        float sum = a.num_slots > 0 ? RowLoad(a.slots[0], a.slot_dtype, row * a.ld_slot + c) : 0.0f;
        for (int32_t s = 1; s < a.num_slots; ++s) sum += RowLoad(a.slots[s], a.slot_dtype, row * a.ld_slot + c);
        if (a.bias != nullptr) sum += a.bias[c];
        if (a.add_residual) sum = residual[c] + sum;
        residual[c] = sum;
        lanes[c % 16] += sum * sum;
      }
      sum_squares[block / kSumBlock] = RowSumLanes(lanes);
    }
  }
}

// y = (x * r) * gamma with r = 1 / sqrt(mean + eps), each operation rounded to f32.
void RmsNorm(const RmsNormArgs& a) {
  const int32_t blocks = (a.columns + kSumBlock - 1) / kSumBlock;
  for (int32_t row = 0; row < a.rows; ++row) {
    const float* sum_squares = a.sum_squares + row * a.ld_sum;
    float sum = 0.0f;
    for (int32_t b = 0; b < blocks; ++b) sum += sum_squares[b];
    const float r = 1.0f / sqrtf(sum / static_cast<float>(a.columns) + a.eps);
    for (int32_t c = a.column0; c < a.column1; ++c) {
      RowStore(a.y, a.y_dtype, row * a.ldy + c, a.x[row * a.ldx + c] * r * a.gamma[c]);
    }
  }
}

// Element d of a head after rotation: pairs (i, i + rotary_dims / 2); dimensions from rotary_dims on pass through.
inline float RowRotated(const void* qkv, DType dtype, int64_t head, int32_t d, int32_t rotary_dims,
                        const float* cos_sin) {
  const int32_t half = rotary_dims / 2;
  const float x = RowLoad(qkv, dtype, head + d);
  if (d < half) return x * cos_sin[d] - RowLoad(qkv, dtype, head + d + half) * cos_sin[half + d];
  if (d < rotary_dims) return x * cos_sin[d - half] + RowLoad(qkv, dtype, head + d - half) * cos_sin[d];
  return x;
}

void RopeKvWrite(const RopeKvWriteArgs& a) {
  const int32_t d = a.head_dim, half = a.rotary_dims / 2;
  for (int32_t row = 0; row < a.rows; ++row) {
    const float* cos_sin = a.cos_sin + static_cast<int64_t>(row) * a.rotary_dims;
    const int64_t token = row * a.ld_qkv;
    for (int32_t h = 0; h < a.num_heads; ++h) {
      const int64_t head = token + static_cast<int64_t>(h) * d;
      for (int32_t i = 0; i < half; ++i) {
        const float low = RowRotated(a.qkv, a.dtype, head, i, a.rotary_dims, cos_sin);
        const float high = RowRotated(a.qkv, a.dtype, head, i + half, a.rotary_dims, cos_sin);
        RowStore(a.qkv, a.dtype, head + i, low);
        RowStore(a.qkv, a.dtype, head + i + half, high);
      }
    }
    const int64_t lane = a.kv_lane[row];
    for (int32_t h = 0; h < a.num_kv_heads; ++h) {
      const int64_t k_head = token + static_cast<int64_t>(a.num_heads + h) * d;
      const int64_t v_head = k_head + static_cast<int64_t>(a.num_kv_heads) * d;
      char* k_part = static_cast<char*>(a.kv_base) + a.kv_offset[row] + h * a.kv_head_stride;
      char* v_part = k_part + static_cast<int64_t>(kKvBlockTokens) * d * ElementBytes(a.dtype);
      for (int32_t i = 0; i < d; ++i) {
        const bool is_f32 = a.dtype == DType::kF32;
        const int64_t k_at = is_f32 ? i * kKvBlockTokens + lane : (i / 2 * kKvBlockTokens + lane) * 2 + i % 2;
        const int64_t v_at = is_f32 ? lane * d + i : (lane / 2 * d + i) * 2 + lane % 2;
        RowStore(k_part, a.dtype, k_at, RowRotated(a.qkv, a.dtype, k_head, i, a.rotary_dims, cos_sin));
        RowStore(v_part, a.dtype, v_at, RowLoad(a.qkv, a.dtype, v_head + i));
      }
    }
  }
}

void Copy(void* out, const void* in, size_t nbytes) { memcpy(out, in, nbytes); }

// NaN and -inf add nothing to the sum; what equals the maximum adds exactly 1, also where the maximum is +inf. Where
// nothing is above -inf: max = -inf, argmax = 0 (-1 when n is 0), sum_exp = 0, so that a rank without candidates weighs
// nothing in a join.
void MaxSumExp(const float* x, int32_t n, float scale, float* max, int32_t* argmax, float* sum_exp) {
  float best = -INFINITY;
  int32_t at = n > 0 ? 0 : -1;
  for (int32_t i = 0; i < n; ++i) {
    if (x[i] > best) {
      best = x[i];
      at = i;
    }
  }
  double sum = 0.0;  // f64, so that the reference does not lose the many small terms of a large vocabulary
  for (int32_t i = 0; i < n; ++i) {
    if (!(x[i] > -INFINITY)) continue;
    sum +=
        x[i] == best ? 1.0 : exp(static_cast<double>(scale) * (static_cast<double>(x[i]) - static_cast<double>(best)));
  }
  *max = best;
  *argmax = at;
  *sum_exp = static_cast<float>(sum);
}
