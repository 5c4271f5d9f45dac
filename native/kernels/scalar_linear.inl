// Scalar linear kernels: pack, unpack, embed, gemm, convert, stream_read. Included by scalar.cpp inside its anonymous
// namespace. They define what the entries mean: one product after the other, k ascending, one f32 accumulator an
// element.

inline float LinearFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t LinearToBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float LinearFromBf16(uint16_t value) { return LinearFromBits(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even, by integer arithmetic: denormals are kept, values past the largest bf16 become
// infinite, and a NaN is made quiet so that rounding cannot turn it into an infinity.
inline uint16_t LinearToBf16(float value) {
  const uint32_t bits = LinearToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float LinearFromF16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 0x1fu;
  const uint32_t fraction = value & 0x3ffu;
  if (exponent == 0x1f) {  // infinity, or NaN made quiet as the vector conversion does
    return LinearFromBits(sign | 0x7f800000u | (fraction << 13) | (fraction != 0 ? 0x400000u : 0u));
  }
  if (exponent == 0) {  // zero or denormal: fraction * 2^-24 is exact
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return LinearFromBits(LinearToBits(magnitude) | sign);
  }
  return LinearFromBits(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

// Element `index` of an array of any alignment, as f32.
inline float LinearLoad(const void* array, DType dtype, int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    memcpy(&value, static_cast<const char*>(array) + 4 * index, sizeof value);
    return value;
  }
  uint16_t value;
  memcpy(&value, static_cast<const char*>(array) + 2 * index, sizeof value);
  return dtype == DType::kBf16 ? LinearFromBf16(value) : LinearFromF16(value);
}

// dtype is kF32 or kBf16.
inline void LinearStore(void* array, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    memcpy(static_cast<char*>(array) + 4 * index, &value, sizeof value);
    return;
  }
  const uint16_t rounded = LinearToBf16(value);
  memcpy(static_cast<char*>(array) + 2 * index, &rounded, sizeof rounded);
}

// Byte offset of (output n of the packed order, input k): panel, tile, then [pair][16][2] of bf16 or [k][16] of f32.
inline int64_t LinearOffset(DType dtype, int64_t k_tiles, int64_t n, int64_t k) {
  const int64_t tile_k = TileK(dtype);
  const int64_t tile = (n / kPanel) * k_tiles + k / tile_k;
  const int64_t in_tile = dtype == DType::kF32 ? (k % tile_k) * 64 + (n % kPanel) * 4
                                               : (k % tile_k) / 2 * 64 + (n % kPanel) * 4 + (k % 2) * 2;
  return tile * static_cast<int64_t>(kTileBytes) + in_tile;
}

void Pack(const PackArgs& args) {
  char* packed = static_cast<char*>(args.packed);
  const int64_t padded_k = static_cast<int64_t>(args.k_tiles) * TileK(args.dtype);
  const int64_t source_bytes = ElementBytes(args.source_dtype);
  for (int64_t i = 0; i < args.rows; i++) {
    const char* row = static_cast<const char*>(args.source) + i * args.source_ld * source_bytes;
    int64_t output = args.n0 + i;
    if (args.interleave == 2) output = (output / kPanel * 2 + args.phase) * kPanel + output % kPanel;
    for (int64_t k = 0; k < padded_k; k++) {
      char* to = packed + LinearOffset(args.dtype, args.k_tiles, output, k);
      if (k >= args.k) {
        memset(to, 0, static_cast<size_t>(ElementBytes(args.dtype)));
      } else if (args.dtype == args.source_dtype) {  // bits, NaN payloads included
        memcpy(to, row + k * source_bytes, static_cast<size_t>(source_bytes));
      } else {
        LinearStore(to, args.dtype, 0, LinearLoad(row, args.source_dtype, k));
      }
    }
  }
}

void Unpack(const PackedWeight& weight, int32_t n0, int32_t rows, float* out, int64_t ld) {
  const char* data = static_cast<const char*>(weight.data);
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t k = 0; k < weight.k; k++) {
      out[i * ld + k] = LinearLoad(data + LinearOffset(weight.dtype, weight.k_tiles, n0 + i, k), weight.dtype, 0);
    }
  }
}

void Embed(const PackedWeight& weight, const int32_t* ids, int32_t rows, void* y, DType y_dtype, int64_t ldy) {
  const char* data = static_cast<const char*>(weight.data);
  for (int64_t i = 0; i < rows; i++) {
    char* to = static_cast<char*>(y) + i * ldy * ElementBytes(y_dtype);
    if (ids[i] < 0 || ids[i] >= weight.n) {
      memset(to, 0, static_cast<size_t>(weight.k) * static_cast<size_t>(ElementBytes(y_dtype)));
      continue;
    }
    for (int64_t k = 0; k < weight.k; k++) {
      const char* from = data + LinearOffset(weight.dtype, weight.k_tiles, ids[i], k);
      LinearStore(to, y_dtype, k, LinearLoad(from, weight.dtype, 0));
    }
  }
}

// x * sigmoid(x) through exp(-|x|), which is at most 1 and so never overflows. Of minus infinity it is NaN (inf * 0).
inline float LinearSilu(float x) {
  const float e = expf(-fabsf(x));
  return x * ((x >= 0.0f ? 1.0f : e) / (1.0f + e));
}

// sums[16] = one row of x times one panel.
inline void LinearPanel(const PackedWeight& weight, const void* x_row, int64_t panel, float* sums) {
  const char* tiles = static_cast<const char*>(weight.data) + panel * weight.k_tiles * static_cast<int64_t>(kTileBytes);
  const int64_t lines = static_cast<int64_t>(weight.k_tiles) * 16;
  for (int j = 0; j < kPanel; j++) sums[j] = 0.0f;
  if (weight.dtype == DType::kF32) {
    const float* x = static_cast<const float*>(x_row);
    const float* w = reinterpret_cast<const float*>(tiles);
    for (int64_t k = 0; k < lines; k++) {
      for (int j = 0; j < kPanel; j++) sums[j] += x[k] * w[k * kPanel + j];
    }
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(x_row);
    const uint32_t* w = reinterpret_cast<const uint32_t*>(tiles);  // [pair][16] of two bf16, the even k in the low half
    for (int64_t p = 0; p < lines; p++) {
      const float x0 = LinearFromBf16(x[2 * p]), x1 = LinearFromBf16(x[2 * p + 1]);
      for (int j = 0; j < kPanel; j++) {
        const uint32_t pair = w[p * kPanel + j];
        sums[j] += x0 * LinearFromBits(pair << 16);
        sums[j] += x1 * LinearFromBits(pair & 0xffff0000u);
      }
    }
  }
  if (weight.bias != nullptr) {
    for (int j = 0; j < kPanel; j++) sums[j] += weight.bias[panel * kPanel + j];
  }
}

void Gemm(const GemmArgs& args) {
  const PackedWeight& weight = *args.weight;
  const int64_t x_bytes = args.ldx * ElementBytes(weight.dtype);
  const bool is_silu = args.activation == Activation::kSiluMul;
  for (int64_t panel = args.panel0; panel < args.panel1; panel += is_silu ? 2 : 1) {
    for (int64_t i = 0; i < args.m; i++) {
      const char* x_row = static_cast<const char*>(args.x) + i * x_bytes;
      float sums[kPanel];
      LinearPanel(weight, x_row, panel, sums);
      if (is_silu) {
        float up[kPanel];
        LinearPanel(weight, x_row, panel + 1, up);
        for (int j = 0; j < kPanel; j++) sums[j] = LinearSilu(sums[j]) * up[j];
      }
      const int64_t column = (is_silu ? panel / 2 : panel) * kPanel;
      for (int j = 0; j < kPanel; j++) LinearStore(args.y, args.y_dtype, i * args.ldy + column + j, sums[j]);
    }
  }
}

void Convert(void* out, DType out_dtype, const void* in, DType in_dtype, size_t count) {
  if (out_dtype == in_dtype) {
    memmove(out, in, count * static_cast<size_t>(ElementBytes(in_dtype)));
    return;
  }
  for (size_t i = 0; i < count; i++) {
    const int64_t index = static_cast<int64_t>(i);
    LinearStore(out, out_dtype, index, LinearLoad(in, in_dtype, index));
  }
}

uint64_t StreamRead(const void* data, size_t nbytes) {
  uint64_t lanes[8] = {};
  const char* from = static_cast<const char*>(data);
  for (size_t offset = 0; offset < nbytes; offset += sizeof lanes) {
    uint64_t line[8];
    memcpy(line, from + offset, sizeof line);
    for (int j = 0; j < 8; j++) lanes[j] ^= line[j];
  }
  uint64_t result = 0;
  for (uint64_t lane : lanes) result ^= lane;
  return result;
}
