// Sums for a narrow network leg: Q8 groups (kernels.h) out of elements, and elements out of Q8 groups. As reduce.inl, whose formats it uses:
// written for the compiler to vectorise, the same operations in the same order on every tier, so that all ranks hold the same bits.

static_assert(kReduceBlock % kQ8Group == 0, "blocks are whole groups");

// Bounds of the scale. Below the lower one its inverse would overflow; what is smaller than half of it becomes 0. 127 times the upper one is the
// largest float, of which a 127th, rounded to nearest, is too much.
constexpr float kQ8Least = 0x1p-126f, kQ8Most = 0x1.020406p+121f;

// One group of up to kQ8Group elements: its scale, then the multiples.
inline void QuantiseGroup(char* out, const float* x, size_t n) {
  uint32_t most = 0;  // the order of floats without sign is that of their bits
  for (size_t i = 0; i < n; ++i) {
    const uint32_t size = ReduceBits(x[i]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  if (most >= 0x7f800000u) {  // an infinity or a NaN: the group is NaN, for all who read it
    const uint32_t nan = 0x7fc00000u;
    memcpy(out, &nan, 4);
    memset(out + 4, 0, n);
    return;
  }
  float scale = ReduceFloat(most) / 127.0f;
  scale = scale < kQ8Least ? kQ8Least : scale > kQ8Most ? kQ8Most : scale;
  const float inverse = 1.0f / scale;
  memcpy(out, &scale, 4);
  // Adding 1.5 * 2^23 rounds to a whole number, ties to even, which then stands in the lowest bits.
  for (size_t i = 0; i < n; ++i) out[4 + i] = static_cast<char>(ReduceBits(x[i] * inverse + 0x1.8p23f));
}

template <class Format>
void ReduceToQ8As(char* out, const void* const* sources, int32_t num_sources, size_t count) {
  float block[kReduceBlock];
  const auto load = [](const void* source, size_t i) {
    typename Format::Element x;
    memcpy(&x, static_cast<const char*>(source) + i * sizeof x, sizeof x);
    return Format::Load(x);
  };
  for (size_t at = 0; at < count; at += kReduceBlock) {
    const size_t n = count - at < kReduceBlock ? count - at : kReduceBlock;
    for (size_t i = 0; i < n; ++i) block[i] = load(sources[0], at + i);
    for (int32_t s = 1; s < num_sources; ++s) {
      const void* source = sources[s];
      for (size_t i = 0; i < n; ++i) block[i] += load(source, at + i);
    }
    for (size_t i = 0; i < n; i += kQ8Group) {
      const size_t left = n - i;
      // A constant length is what the compiler unrolls.
      if (left >= kQ8Group) {
        QuantiseGroup(out, block + i, kQ8Group);
      } else {
        QuantiseGroup(out, block + i, left);
      }
      out += kQ8GroupBytes;
    }
  }
}

void ReduceToQ8(void* out, const void* const* sources, int32_t num_sources, DType dtype, size_t count) {
  char* to = static_cast<char*>(out);
  switch (dtype) {
    case DType::kBf16: return ReduceToQ8As<ReduceBf16>(to, sources, num_sources, count);
    case DType::kF16: return ReduceToQ8As<ReduceF16>(to, sources, num_sources, count);
    default: return ReduceToQ8As<ReduceF32>(to, sources, num_sources, count);
  }
}

template <class Format>
void ReduceFromQ8As(void* out, const void* const* sources, int32_t num_sources, int32_t divisor, size_t count) {
  float block[kQ8Group];
  for (size_t at = 0; at < count; at += kQ8Group) {
    const size_t n = count - at < kQ8Group ? count - at : kQ8Group, place = at / kQ8Group * kQ8GroupBytes;
    for (int32_t s = 0; s < num_sources; ++s) {
      const char* group = static_cast<const char*>(sources[s]) + place;
      float scale;
      int8_t multiples[kQ8Group] = {};
      memcpy(&scale, group, 4);
      if (n == kQ8Group) {
        memcpy(multiples, group + 4, kQ8Group);
      } else {
        memcpy(multiples, group + 4, n);
      }
      for (size_t i = 0; i < kQ8Group; ++i) {
        const float x = static_cast<float>(multiples[i]) * scale;
        block[i] = s == 0 ? x : block[i] + x;
      }
    }
    typename Format::Element results[kQ8Group];
    for (size_t i = 0; i < kQ8Group; ++i) results[i] = Format::Store(divisor == 1 ? block[i] : block[i] / static_cast<float>(divisor));
    memcpy(static_cast<char*>(out) + at * sizeof results[0], results, n * sizeof results[0]);
  }
}

void ReduceFromQ8(void* out, const void* const* sources, int32_t num_sources, DType dtype, int32_t divisor, size_t count) {
  switch (dtype) {
    case DType::kBf16: return ReduceFromQ8As<ReduceBf16>(out, sources, num_sources, divisor, count);
    case DType::kF16: return ReduceFromQ8As<ReduceF16>(out, sources, num_sources, divisor, count);
    default: return ReduceFromQ8As<ReduceF32>(out, sources, num_sources, divisor, count);
  }
}
