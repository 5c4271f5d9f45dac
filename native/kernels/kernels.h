// The table of kernels: the one face between arithmetic and the rest. Each ISA tier fills one `const Kernels`; dispatch.cpp
// chooses once. Every entry works on a range and runs on the calling thread; threading is the runner's, floats are added
// nowhere else. Plain declarations only: ISA files include this header, intrinsics and .inl bodies, nothing else.
//
// Layouts
//   packed weight   y[M, N] = x[M, K] * W^T with W [N, K] row-major becomes [panels][k_tiles][1 KiB]; a panel is 16 rows of W
//                   (16 outputs), a tile is 16 outputs x 32 k of bf16 as [16 k-pairs][16 n][2], or 16 outputs x 16 k of f32
//                   as [16 k][16 n]. N and K are padded with zeros to whole tiles.
//   activations     row-major, `ld` in elements, >= columns rounded up to 32. Columns between the true width and the rounded
//                   width are zero; producers keep them so, so that no consumer has a K tail. Rows are 64-byte aligned.
//   KV block        32 tokens of one KV head. bf16: K part [d/2][32][2], then V part [16 token pairs][d][2]. f32: K part
//                   [d][32], then V part [32][d]. d is even. Lanes of tokens not yet written hold zeros or old finite values;
//                   they are masked.
//   bf16            uint16_t, the upper half of an f32; conversions round to nearest even by the integer form on every tier
//                   (NaN stays NaN, denormals are kept).
//
// Reach: what a call may touch. test/native/kernels.cpp holds every entry to it with guard pages on both sides of every operand.
//   In general      rows of the columns that the arguments name, and nothing between, before or behind them. Inputs are read only.
//   gemm            reads rows of x up to k_tiles * TileK columns, and of weight and bias only the panels of the call
//   pack, unpack    touch only the panels of their rows; pack changes no other output in them. embed reads any panel
//   rope_kv_write   changes the rotary dims of q, and in the cache the lanes of its tokens; k and v of qkv stay as they are
//   attention       reads all 32 lanes of a block in which some row sees a key; of block_offset the entries of [key0, key1)
//   scratch         is the call's, whole; what it held and holds afterwards means nothing
// Alignment: 64 bytes for packed weights, scratch, and the rows of gemm's x and y and of embed's y; 4 bytes for KV blocks; none for
// the source of pack and for the ranges of reduce, copy, convert, stream_read and the two of Q8; that of its elements for everything else.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tilerank {

// Weights and activations are kF32 or kBf16, sources of packing also kF16; reductions take all.
enum class DType : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2, kF64 = 3, kI8 = 4, kU8 = 5, kI32 = 6, kU32 = 7, kI64 = 8, kU64 = 9 };
constexpr int kDTypes = 10;
enum class ReduceOp : int32_t { kSum = 0, kProd = 1, kMin = 2, kMax = 3, kAvg = 4, kBand = 5, kBor = 6, kBxor = 7 };  // bits: of integers
constexpr int kReduceOps = 8;
// Of a reduction over several levels: elements to element; elements to what stands before the rounding; several of those to element.
enum class ReduceStage : int32_t { kWhole = 0, kPartial = 1, kFinal = 2 };
enum class Tier : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
enum class Activation : int32_t {
  kNone = 0,
  kSiluMul = 1,  // panels alternate gate, up, gate, up ...; y[:, 16 p + j] = silu(gate panel p) * (up panel p)
};

constexpr int kPanel = 16;            // outputs of a panel
constexpr size_t kTileBytes = 1024;   // one packed tile
constexpr int kKvBlockTokens = 32;    // tokens of a KV block
constexpr int kSumBlock = 256;        // elements that one partial sum of squares covers
constexpr int TileK(DType d) { return d == DType::kF32 ? 16 : 32; }
constexpr int8_t kElementBytes[kDTypes] = {4, 2, 2, 8, 1, 1, 4, 4, 8, 8};
constexpr int ElementBytes(DType d) { return kElementBytes[static_cast<int>(d)]; }
// What a reduction holds of an element before it rounds: f32 of 16-bit floats, a wider integer for the exact mean, else the dtype itself.
constexpr int PartialBytes(DType d, ReduceOp op) {
  if (d == DType::kBf16 || d == DType::kF16) return 4;
  if (op != ReduceOp::kAvg || d == DType::kF32 || d == DType::kF64) return ElementBytes(d);
  return d == DType::kI64 || d == DType::kU64 ? 16 : 8;
}
// Q8, how sums may travel between nodes: groups of 32 elements, each its scale (f32) and 32 multiples of it (int8, -127 to 127); the last group
// has as many multiples as elements are left. No byte is between two groups, and a group has no alignment.
constexpr size_t kQ8Group = 32;
constexpr size_t kQ8GroupBytes = sizeof(float) + kQ8Group;
constexpr size_t Q8Bytes(size_t count) { return (count + kQ8Group - 1) / kQ8Group * sizeof(float) + count; }
constexpr bool IsFloat(DType d) { return static_cast<int>(d) < static_cast<int>(DType::kI8); }

struct PackedWeight {
  const void* data;   // [panels][k_tiles][1 KiB], 64-byte aligned
  DType dtype;        // kF32 or kBf16
  int32_t n, k;       // logical
  int32_t panels;     // ceil(n / 16)
  int32_t k_tiles;    // ceil(k / TileK(dtype))
  const float* bias;  // [panels * 16] in packed panel order, or null
};

// Packs rows of a row-major matrix into a packed weight. Outputs and k that no call covers keep the zeros of the allocation,
// so fused weights (q|k|v, gate|up) are packed by one call a part; calls on different outputs may run at the same time.
struct PackArgs {
  void* packed;        // whole weight's data
  DType dtype;         // of the packed weight
  int32_t k_tiles;     // of the packed weight
  const void* source;  // rows of k elements of source_dtype; no alignment is assumed
  DType source_dtype;  // kF32, kBf16, kF16
  int64_t source_ld;   // elements between rows of the source
  int32_t rows;        // rows of source
  int32_t k;           // columns of source; packed columns k .. k_tiles * TileK are zero-filled
  int32_t n0;          // packed output (panel n0 / 16, column n0 % 16) of the first row; row i goes to output n0 + i ...
  int32_t interleave;  // ... unless 2: then outputs are counted in every second panel: o = n0 + i goes to panel 2*(o/16) + phase
  int32_t phase;       // 0 (gate) or 1 (up) with interleave 2, else 0
};

struct GemmArgs {
  const PackedWeight* weight;
  const void* x;        // [m, ldx], weight's dtype (bf16 or f32), zero-padded to k_tiles * TileK
  int64_t ldx;
  int32_t m;            // rows; any m >= 1. The kernel picks its streaming form for small m, its blocked form above
  int32_t panel0, panel1;  // panels to compute; even bounds with kSiluMul
  Activation activation;
  void* y;              // whole panels are written: columns [16 panel0, 16 panel1) (half of that with kSiluMul)
  DType y_dtype;        // kF32 or kBf16
  int64_t ldy;
  void* scratch;        // kGemmScratchBytes of the calling thread, 64-byte aligned
};
constexpr size_t kGemmScratchBytes = 4 << 20;

// residual[row] (+)= sum over slots in index order, all in f32; sum_squares[row][b] = sum of squares of elements [256 b, 256 b + 256)
// of the new residual row. Columns [column0, column1): column0 a multiple of 256.
struct ReduceResidualArgs {
  const void* const* slots;  // [num_slots], each [rows, ld_slot] of slot_dtype
  int32_t num_slots;
  DType slot_dtype;
  int64_t ld_slot;
  float* residual;           // [rows, ld_residual]
  int64_t ld_residual;
  bool add_residual;         // false: the old content of residual is ignored
  const float* bias;         // [columns] added once after the slots, or null
  float* sum_squares;        // [rows, ld_sum]
  int64_t ld_sum;
  int32_t rows, column0, column1;
};

// y[row, c] = x[row, c] * rsqrt(sum(sum_squares[row]) / columns + eps) * gamma[c], sum in index order, for c in [column0, column1)
struct RmsNormArgs {
  const float* x;            // [rows, ldx]
  int64_t ldx;
  const float* sum_squares;  // [rows, ld_sum], ceil(columns / 256) of them
  int64_t ld_sum;
  const float* gamma;        // [columns]
  float eps;
  void* y;                   // [rows, ldy]
  DType y_dtype;
  int64_t ldy;
  int32_t rows, columns, column0, column1;
};

// One row of q|k|v heads a token: rotates q in place and k on its way into the cache (first and second half of rotary_dims are
// the pairs), and stores v. Heads: num_heads, then num_kv_heads, then num_kv_heads, each head_dim wide.
struct RopeKvWriteArgs {
  void* qkv;                   // [rows, ld_qkv] of dtype
  DType dtype;                 // of qkv and of the cache
  int64_t ld_qkv;
  int32_t rows;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t rotary_dims;         // even, <= head_dim
  const float* cos_sin;        // [rows, rotary_dims]: cos of rotary_dims / 2 pairs, then sin
  const int64_t* kv_offset;    // [rows]: byte offset from kv_base of head 0 of the token's block
  const int32_t* kv_lane;      // [rows]: lane of the token in its block, 0 .. 31
  void* kv_base;               // of this layer
  int64_t kv_head_stride;      // bytes between the blocks of two KV heads
};

// One item: query rows [0, rows) of one sequence for one KV head and the query heads that share it. Row i, at position
// position0 + i, sees keys 0 .. position0 + i, of them only [key0, key1).
struct AttentionArgs {
  const void* q;               // [rows, ldq] of dtype, at the first query head of this KV head; heads are head_dim apart
  DType dtype;                 // kF32 or kBf16, of q, cache and out
  int64_t ldq;
  int32_t rows, group;         // query tokens; query heads of this KV head
  int32_t head_dim;            // even, at most kMaxHeadDim
  const void* kv_base;         // of this layer
  const int64_t* block_offset; // [ceil(key1 / 32)]: byte offset of each block of the sequence, of this KV head; from key0 / 32 on
  int32_t position0;
  int32_t key0, key1;          // key0 a multiple of 32; key1 <= position0 + rows
  float scale;                 // above 0
  void* out;                   // [rows, ldo] of dtype, same heads as q: written when partial is null
  int64_t ldo;
  float* partial;              // else [rows, group, head_dim + 2]: unnormalised sum, then the maximum m of the scores in base 2 (score * log2 e), then the
                               // sum l of exp2(score - m)
  void* scratch;               // kAttentionScratchBytes of the calling thread, 64-byte aligned
};
constexpr int kMaxHeadDim = 1024;  // what the scratch is sized for
constexpr size_t kAttentionScratchBytes = 4 << 20;

// Joins the partials of `splits` key ranges, in order, into out. partial of split s stands at partials + s * split_stride.
struct AttentionMergeArgs {
  const float* partials;
  int64_t split_stride;  // floats
  int32_t splits, rows, group, head_dim;
  void* out;
  DType dtype;
  int64_t ldo;
};

struct Kernels {
  Tier tier;
  const char* name;
  void (*pack)(const PackArgs&);
  // rows [n0, n0 + rows) of the logical matrix, f32, [rows, ld]
  void (*unpack)(const PackedWeight&, int32_t n0, int32_t rows, float* out, int64_t ld);
  // y[i] = row ids[i] of the weight (as an [n, k] table) as y_dtype, for i in [0, rows); an id outside [0, n) gives a zero row
  void (*embed)(const PackedWeight&, const int32_t* ids, int32_t rows, void* y, DType y_dtype, int64_t ldy);
  void (*gemm)(const GemmArgs&);
  void (*reduce_residual)(const ReduceResidualArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*rope_kv_write)(const RopeKvWriteArgs&);
  void (*attention)(const AttentionArgs&);
  void (*attention_merge)(const AttentionMergeArgs&);
  // out[i] = sources[0][i] op sources[1][i] op ..., one or more, in index order; out may be one of the sources. Any count. 16-bit floats
  // are combined in f32 and rounded once, to nearest even. Integers wrap; their mean is exact and cut towards zero. The least and
  // the greatest of floats are NaN where one is, and -0 is below +0.
  void (*reduce)(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, size_t count);
  // The same in stages, where the sources do not lie in one place. kPartial: out holds PartialBytes an element. kFinal: the sources do, and
  // the mean divides by `divisor`. out may be a source where both hold elements of one size.
  void (*reduce_staged)(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp op, ReduceStage stage, int32_t divisor,
                        size_t count);
  // out[i] = in[i], byte for byte; the ranges do not overlap. Not the C library's memcpy: from 4 KB or so that one uses `rep movsb`,
  // which falls to 2 GB/s on Zen 4 where source and destination stand near the same offset of their pages, as tensors and slots do.
  void (*copy)(void* out, const void* in, size_t nbytes);
  // Largest value (ties: lowest index; NaN counts as -inf) and the sum over i of exp(scale * (x[i] - max)), in f32.
  void (*max_sum_exp)(const float* x, int32_t n, float scale, float* max, int32_t* argmax, float* sum_exp);
  // out_dtype is kF32, kBf16 or in_dtype; the ranges do not overlap.
  void (*convert)(void* out, DType out_dtype, const void* in, DType in_dtype, size_t count);
  // Reads bytes [0, nbytes) (a multiple of 512) in one stream and returns their xor: the machine's read limit, for benchmarks.
  uint64_t (*stream_read)(const void* data, size_t nbytes);
  // out = Q8 groups of the sums of the sources, which are kF32, kBf16 or kF16 and are added in f32 in index order. The scale is the largest |x| of the
  // group / 127, at least 2^-126, and such that 127 of it are no infinity; x becomes the nearest multiple, ties to even. A group in which one x is not
  // finite is NaN, whole. out overlaps no source.
  void (*reduce_to_q8)(void* out, const void* const* sources, int32_t num_sources, DType dtype, size_t count);
  // out[i] = (sum over the sources, which are Q8 groups, in index order, in f32) / divisor, as kF32, kBf16 or kF16, rounded once. Any alignment; out
  // overlaps no source.
  void (*reduce_from_q8)(void* out, const void* const* sources, int32_t num_sources, DType dtype, int32_t divisor, size_t count);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace tilerank
