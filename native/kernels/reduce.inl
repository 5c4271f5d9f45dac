// Reductions of every dtype, written for the compiler to vectorise with the flags of whichever tier includes them. A block of
// accumulators takes the sources one after the other, in index order; what is stored was rounded once. 16-bit floats are combined
// in f32; NaN results are one pattern, so that all tiers and all ranks hold the same bits.

constexpr size_t kReduceBlock = 256;

inline float ReduceFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t ReduceBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// How elements are kept: Element in memory, Acc while they are combined.
template <class T, class Accumulator = T>
struct ReduceInteger {
  using Element = T;
  using Acc = Accumulator;
  static Acc Load(Element x) { return x; }
  static Element Store(Acc x) { return static_cast<Element>(x); }
};
struct ReduceF32 {
  using Element = float;
  using Acc = float;
  static Acc Load(Element x) { return x; }
  static Element Store(Acc x) { return x == x ? x : ReduceFloat(0x7fc00000u); }
};
struct ReduceF64 {
  using Element = double;
  using Acc = double;
  static Acc Load(Element x) { return x; }
  static Element Store(Acc x) { return x == x ? x : static_cast<double>(ReduceFloat(0x7fc00000u)); }
};
struct ReduceBf16 {
  using Element = uint16_t;
  using Acc = float;
  static Acc Load(Element x) { return ReduceFloat(static_cast<uint32_t>(x) << 16); }
  static Element Store(Acc x) {
    const uint32_t bits = ReduceBits(x);
    return static_cast<Element>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u);
  }
};
struct ReduceF16 {
  using Element = uint16_t;
  using Acc = float;
  static Acc Load(Element x) {
    // Exponents move by 112 in one exact product, which makes denormals normal as well.
    const float value = ReduceFloat((x & 0x7fffu) << 13) * ReduceFloat(0x77800000u);
    const uint32_t top = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return ReduceFloat(ReduceBits(value) | top | (x & 0x8000u) << 16);
  }
  static Element Store(Acc x) {
    const uint32_t bits = ReduceBits(x), size = bits & 0x7fffffffu;
    const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    // Below 2^-14: a unit of 0.5f is 2^-24, that of denormals; the addition rounds.
    const uint32_t denormal = ReduceBits(ReduceFloat(size) + 0.5f) - 0x3f000000u;
    const uint32_t finite = size < 0x38800000u ? denormal : size < 0x477ff000u ? normal : 0x7c00u;
    return static_cast<Element>(x == x ? (bits >> 16 & 0x8000u) | finite : 0x7e00u);
  }
};

// Integers wrap; unsigned arithmetic does so by definition.
template <class A>
struct ReduceUnsigned {
  using Type = A;
};
template <>
struct ReduceUnsigned<int8_t> {
  using Type = uint8_t;
};
template <>
struct ReduceUnsigned<int32_t> {
  using Type = uint32_t;
};
template <>
struct ReduceUnsigned<int64_t> {
  using Type = uint64_t;
};

struct ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    using U = typename ReduceUnsigned<A>::Type;
    return static_cast<A>(static_cast<U>(a) + static_cast<U>(b));
  }
  template <class A>
  static A Finish(A a, int32_t) {
    return a;
  }
};
struct ReduceByProd : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    using U = typename ReduceUnsigned<A>::Type;
    return static_cast<A>(static_cast<U>(a) * static_cast<U>(b));
  }
};
// The mean of integers is exact - accumulators are wide enough - and cut towards zero.
struct ReduceByAvg : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return a + b;
  }
  template <class A>
  static A Finish(A a, int32_t num_sources) {
    return a / static_cast<A>(num_sources);
  }
};
// Of floats: NaN if one is, and -0 is below +0.
inline bool ReduceIsNegative(float x) { return (ReduceBits(x) >> 31) != 0; }
inline bool ReduceIsNegative(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return (bits >> 63) != 0;
}
template <class A>
inline bool ReduceIsNegative(A) {
  return false;
}
struct ReduceByMin : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return a != a ? a : a < b ? a : a == b && ReduceIsNegative(a) ? a : b;
  }
};
struct ReduceByMax : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return a != a ? a : a > b ? a : a == b && ReduceIsNegative(b) ? a : b;
  }
};
struct ReduceByAnd : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return static_cast<A>(a & b);
  }
};
struct ReduceByOr : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return static_cast<A>(a | b);
  }
};
struct ReduceByXor : ReduceBySum {
  template <class A>
  static A Combine(A a, A b) {
    return static_cast<A>(a ^ b);
  }
};

struct ReduceCall {
  void* out;
  const void* const* sources;
  int32_t num_sources;
  ReduceStage stage;
  int32_t divisor;  // of the mean
  size_t count;
};

template <class Format, class Op, ReduceStage Stage>
void ReduceAs(const ReduceCall& call) {
  using Acc = typename Format::Acc;
  using Element = typename Format::Element;
  const auto load = [](const void* source, size_t i) {
    if constexpr (Stage == ReduceStage::kFinal) {
      Acc x;
      memcpy(&x, static_cast<const char*>(source) + i * sizeof x, sizeof x);
      return x;
    } else {
      Element x;
      memcpy(&x, static_cast<const char*>(source) + i * sizeof x, sizeof x);
      return Format::Load(x);
    }
  };
  // Copies: what is written could be the call itself, for all the compiler knows, and would be read again for each element.
  const auto [out, sources, num_sources, stage, divisor, count] = call;
  Acc acc[kReduceBlock];
  for (size_t at = 0; at < count; at += kReduceBlock) {
    const size_t n = count - at < kReduceBlock ? count - at : kReduceBlock;
    for (size_t i = 0; i < n; ++i) acc[i] = load(sources[0], at + i);
    for (int32_t s = 1; s < num_sources; ++s) {
      const void* source = sources[s];
      for (size_t i = 0; i < n; ++i) acc[i] = Op::Combine(acc[i], load(source, at + i));
    }
    if constexpr (Stage == ReduceStage::kPartial) {
      memcpy(static_cast<char*>(out) + at * sizeof(Acc), acc, n * sizeof(Acc));
    } else {
      for (size_t i = 0; i < n; ++i) {
        const Element x = Format::Store(Op::Finish(acc[i], divisor));
        memcpy(static_cast<char*>(out) + (at + i) * sizeof x, &x, sizeof x);
      }
    }
  }
}

template <class Format, class Op>
void ReduceAs(const ReduceCall& call) {
  switch (call.stage) {
    case ReduceStage::kWhole: return ReduceAs<Format, Op, ReduceStage::kWhole>(call);
    case ReduceStage::kPartial: return ReduceAs<Format, Op, ReduceStage::kPartial>(call);
    case ReduceStage::kFinal: return ReduceAs<Format, Op, ReduceStage::kFinal>(call);
  }
}

template <class Format>
void ReduceFloats(ReduceOp op, const ReduceCall& call) {
  switch (op) {
    case ReduceOp::kProd: return ReduceAs<Format, ReduceByProd>(call);
    case ReduceOp::kMin: return ReduceAs<Format, ReduceByMin>(call);
    case ReduceOp::kMax: return ReduceAs<Format, ReduceByMax>(call);
    case ReduceOp::kAvg: return ReduceAs<Format, ReduceByAvg>(call);
    default: return ReduceAs<Format, ReduceBySum>(call);
  }
}

template <class T, class Wide>
void ReduceIntegers(ReduceOp op, const ReduceCall& call) {
  using Format = ReduceInteger<T>;
  switch (op) {
    case ReduceOp::kAvg: return ReduceAs<ReduceInteger<T, Wide>, ReduceByAvg>(call);
    case ReduceOp::kBand: return ReduceAs<Format, ReduceByAnd>(call);
    case ReduceOp::kBor: return ReduceAs<Format, ReduceByOr>(call);
    case ReduceOp::kBxor: return ReduceAs<Format, ReduceByXor>(call);
    default: return ReduceFloats<Format>(op, call);
  }
}

void ReduceAny(const ReduceCall& call, DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::kF32: return ReduceFloats<ReduceF32>(op, call);
    case DType::kBf16: return ReduceFloats<ReduceBf16>(op, call);
    case DType::kF16: return ReduceFloats<ReduceF16>(op, call);
    case DType::kF64: return ReduceFloats<ReduceF64>(op, call);
    case DType::kI8: return ReduceIntegers<int8_t, int64_t>(op, call);
    case DType::kU8: return ReduceIntegers<uint8_t, int64_t>(op, call);
    case DType::kI32: return ReduceIntegers<int32_t, int64_t>(op, call);
    case DType::kU32: return ReduceIntegers<uint32_t, int64_t>(op, call);
    case DType::kI64: return ReduceIntegers<int64_t, __int128>(op, call);
    case DType::kU64: return ReduceIntegers<uint64_t, unsigned __int128>(op, call);
  }
}

void ReduceWhole(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, size_t count) {
  ReduceAny({out, sources, num_sources, ReduceStage::kWhole, num_sources, count}, dtype, op);
}

void ReduceStaged(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, ReduceStage stage, int32_t divisor,
                  size_t count) {
  ReduceAny({out, sources, num_sources, stage, divisor, count}, dtype, op);
}
