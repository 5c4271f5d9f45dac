// What one core can multiply and add at best: the limit that benchmarks hold the kernels against.
#pragma once
#include "kernels.h"

namespace tilerank {

#if defined(__x86_64__)
/// Runs `rounds` rounds of 12 independent vector multiply-adds of the dtype on the calling thread (kBf16: vdpbf16ps,
/// kF32: vfmadd231ps, 512 bits each) and returns the floating-point operations done. Needs the tier avx512_bf16.
uint64_t RunMultiplyAdds(DType dtype, uint64_t rounds);
#endif

}  // namespace tilerank
