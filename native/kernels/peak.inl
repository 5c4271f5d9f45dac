// The peak loops of peak.h. Twelve accumulators cover the latency of either instruction; they are named registers, so that
// no compiler can spill, merge or drop them. The operands are zeros, whose speed is that of normal numbers.

#define TILERANK_TWELVE(op)                                                                                            \
  op " %%zmm30, %%zmm31, %%zmm0\n" op " %%zmm30, %%zmm31, %%zmm1\n" op " %%zmm30, %%zmm31, %%zmm2\n"                   \
  op " %%zmm30, %%zmm31, %%zmm3\n" op " %%zmm30, %%zmm31, %%zmm4\n" op " %%zmm30, %%zmm31, %%zmm5\n"                   \
  op " %%zmm30, %%zmm31, %%zmm6\n" op " %%zmm30, %%zmm31, %%zmm7\n" op " %%zmm30, %%zmm31, %%zmm8\n"                   \
  op " %%zmm30, %%zmm31, %%zmm9\n" op " %%zmm30, %%zmm31, %%zmm10\n" op " %%zmm30, %%zmm31, %%zmm11\n"
#define TILERANK_CLEAR(n) "vpxord %%zmm" n ", %%zmm" n ", %%zmm" n "\n"
#define TILERANK_PEAK_LOOP(op)                                                                                         \
  asm volatile(TILERANK_CLEAR("0") TILERANK_CLEAR("1") TILERANK_CLEAR("2") TILERANK_CLEAR("3") TILERANK_CLEAR("4")     \
                   TILERANK_CLEAR("5") TILERANK_CLEAR("6") TILERANK_CLEAR("7") TILERANK_CLEAR("8") TILERANK_CLEAR("9") \
                       TILERANK_CLEAR("10") TILERANK_CLEAR("11") TILERANK_CLEAR("30") TILERANK_CLEAR("31")             \
               "1:\n" TILERANK_TWELVE(op) "dec %0\n jnz 1b\n"                                                         \
               : "+r"(left)::"cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",     \
                 "zmm10", "zmm11", "zmm30", "zmm31")

uint64_t RunMultiplyAdds(DType dtype, uint64_t rounds) {
  if (rounds == 0) return 0;
  uint64_t left = rounds;
  if (dtype == DType::kBf16) {
    TILERANK_PEAK_LOOP("vdpbf16ps");
    return rounds * 12 * 64;  // 32 products and 32 additions each
  }
  TILERANK_PEAK_LOOP("vfmadd231ps");
  return rounds * 12 * 32;
}

#undef TILERANK_PEAK_LOOP
#undef TILERANK_CLEAR
#undef TILERANK_TWELVE
