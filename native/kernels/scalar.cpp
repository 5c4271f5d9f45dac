// Tier `scalar`: the obvious twin of every kernel, compiled with baseline flags. It defines what each entry means; the
// tests hold it against float64, and every other tier against it.
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace tilerank {
namespace {

#include "reduce.inl"
#include "quantise.inl"
#include "scalar_linear.inl"
#include "scalar_rows.inl"
#include "scalar_attention.inl"

}  // namespace

const Kernels kScalarKernels = {
    Tier::kScalar, "scalar",  Pack,           Unpack,    Embed,     Gemm,    ReduceResidual, RmsNorm,
    RopeKvWrite,   Attention, AttentionMerge, ReduceWhole, ReduceStaged, Copy, MaxSumExp, Convert, StreamRead,
    ReduceToQ8,    ReduceFromQ8,
};

}  // namespace tilerank
