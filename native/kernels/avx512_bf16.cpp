// Tier `avx512_bf16`: AVX-512 F/BW/DQ/VL with AVX512_BF16 and VNNI (Zen 4 and 5, Cooper Lake, and every Xeon since
// Sapphire Rapids). Compiled with exactly those flags; nothing here may be inlined into another translation unit.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "peak.h"

// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace tilerank {
namespace {

#include "reduce.inl"
#include "quantise.inl"
#include "avx512_linear.inl"
#include "avx512_rows.inl"
#include "avx512_attention.inl"

}  // namespace

const Kernels kAvx512Bf16Kernels = {
    Tier::kAvx512Bf16, "avx512_bf16", Pack,           Unpack,    Embed,     Gemm,    ReduceResidual, RmsNorm,
    RopeKvWrite,       Attention,     AttentionMerge, Reduce, ReduceStaged, Copy, MaxSumExp, Convert, StreamRead,
    ReduceToQ8,        ReduceFromQ8,
};

#include "peak.inl"

}  // namespace tilerank
