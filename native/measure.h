// Timing of linear kernels and of the machine's limits, for `tilerank bench gemm`. Threads are made for the call,
// pinned to processors this process may use, and joined before it returns; the caller's own thread is left as it is.
#pragma once
#include <cstdint>

#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

struct MachineLimits {
  double bf16_flops;  // per second, all threads together; 0 where the processor has no AVX512_BF16
  double f32_flops;   // likewise, 512-bit fused multiply-adds
  double read_bytes;  // per second from memory, one stream a thread
};

/// Best of several trials over about `seconds` a limit; `nbytes` (a multiple of 2 MiB) of memory are read by each
/// thread.
Status MeasureLimits(const Kernels& kernels, bool has_bf16, int32_t threads, size_t nbytes, double seconds,
                     MachineLimits* limits);

struct GemmTrial {
  DType dtype;
  int32_t m, n, k, threads;
  double seconds;      // to spend on timed repetitions, at least three of them
  size_t cold_nbytes;  // weights are walked in a ring of copies of at least this many bytes together, so that none
                       // stays cached
};

struct GemmTiming {
  double median_seconds, best_seconds;  // one product of all panels, from first thread's start to last thread's end
  int64_t repetitions;
  int64_t weight_nbytes;  // of one copy: what one repetition reads
};

/// Times y[m, n] = x[m, k] W^T on `threads` threads, each with a contiguous range of panels, and verifies sampled
/// elements of the last y exactly (the operands are small integers).
Status TimeGemm(const Kernels& kernels, const GemmTrial& trial, GemmTiming* timing);

}  // namespace tilerank
