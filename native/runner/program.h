// The Program of tp/program.ts as the runner holds it: names resolved to indices, enums for words. Decoded and checked once, in
// addon_runner.cpp; nothing here is a decision.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace tilerank {

enum class Op : int32_t { kEmbed, kLinear, kAllReduceResidualNorm, kRopeKvWrite, kAttention, kSelectRows, kLogits };

/// Where the time of a step goes, as reported.
enum class Phase : int32_t { kGemm, kAttention, kCollective, kRest, kCount };

struct BufferSpec {
  std::string name;
  DType dtype;
  bool is_logit_rows;  // else one row a token
  int32_t columns;
};

struct WeightSpec {
  std::string name;
  bool is_linear;
  bool has_bias;
  DType dtype;     // linear only; vectors are f32
  int32_t n, k;    // a vector has k = 1
  int32_t copies;  // entries: one a layer, or 1
};

struct HeadGroup {
  int32_t kv_head, first_head, num_heads;
};

constexpr int32_t kSlot = -1;  // an operand that is the arena slot

struct Line {
  Op op;
  int32_t x = 0, y = 0;    // buffers, or kSlot
  int32_t weight = 0;      // embed, linear
  int32_t gamma = 0, gamma_layer = 0;
  int32_t bias = -1;       // vector weight of allReduceResidualNorm, or -1
  bool add_residual = false;
  Activation activation = Activation::kNone;
  float scale = 0;
  int32_t vocab_start = 0, vocab_count = 0;
  std::vector<HeadGroup> groups;
};

struct Program {
  int32_t rank, world_size;
  DType dtype;
  int32_t num_layers, hidden_size, vocab_size;
  float norm_eps;
  int32_t num_heads, num_kv_heads, head_dim, rotary_dims;
  std::vector<BufferSpec> buffers;
  std::vector<WeightSpec> weights;
  std::vector<Line> before, layer, after;
};

/// A rectangle of one checkpoint tensor, read and packed (tp/program.ts: WeightPart, with the file's place resolved).
struct LoadPart {
  int32_t weight, copy;   // WeightSpec index and its entry
  bool is_bias;           // fills the bias of a linear weight
  int fd;                 // open file; -1: values are made up from `seed`
  uint64_t seed;          // of the tensor, same on every rank
  int64_t byte_offset;    // of the tensor in the file
  int64_t tensor_columns; // length of a row of the tensor
  DType source_dtype;
  int64_t row0, rows, column0, columns;
  int32_t output;         // packed output (vector: element) of the first row
  int32_t interleave, phase;
};

}  // namespace tilerank
