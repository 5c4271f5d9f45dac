// What a step is asked to do, as words that rank 0 broadcasts: tp/step.ts writes this layout, step.cpp reads and checks it.
//
//   header   [kMagic, kind, words, tokens, runs, logit_rows, block_deltas, frequency_sets, ahead, stop_ids]
//   runs     [slot, tokens, position0, is_new]            one sequence each; its tokens are consecutive
//   ids      [tokens]
//   deltas   [slot, index, block]                         entry `index` of the slot's block table becomes `block`
//   freqs    [slot, then rotary_dims / 2 float64 as word pairs]   the sequence's own rotary frequencies from now on
//   rows     [token, slot, flags, candidates, top_k, temperature, penalty, top_p]   floats by their bits
//   stops    [stop_ids]
//
// Decoding ahead. A step whose every run is one token with a greedy row may be followed by up to `ahead` more, each fed with what
// the one before chose, with no message in between: all ranks know the choice from the exchange of candidates. It ends early at
// an id in `stops` (an end token of any of the sequences: JavaScript decides what it means), or when rank 0 says so.
#pragma once
#include <cstdint>
#include <vector>

#include "status.h"

namespace tilerank {

constexpr int32_t kStepMagic = 0x544b5231;
enum class MessageKind : int32_t { kStep = 1, kBytes = 2, kShutdown = 3 };

struct StepLimits {
  int32_t max_tokens, max_logit_rows, max_sequences, max_positions, num_blocks, vocab_size, rotary_dims;
};

struct Run {
  int32_t slot, tokens, position0;
  bool is_new;
  int32_t token0;  // first row of its tokens in the step
};

enum LogitFlags : int32_t {
  kWantLogits = 1,   // raw logits of the row are returned
  kWholeRow = 2,     // candidates cannot decide this row: gather it
  kPenalty = 4,      // repetition penalty applies
};

struct LogitRow {
  int32_t token, slot, flags, candidates, top_k;
  float temperature, penalty, top_p;  // temperature 0: greedy
};

struct BlockDelta {
  int32_t slot, index, block;
};

struct FrequencySet {
  int32_t slot;
  std::vector<double> frequencies;
};

constexpr int32_t kMaxStopIds = 64;

struct StepMessage {
  MessageKind kind;
  int32_t ahead = 0;
  std::vector<int32_t> stop_ids;
  int32_t tokens = 0;
  std::vector<Run> runs;
  std::vector<int32_t> ids;
  std::vector<BlockDelta> deltas;
  std::vector<FrequencySet> frequency_sets;
  std::vector<LogitRow> rows;
};

/// Decodes and checks every number against the limits, so that a wrong message touches no memory.
Status DecodeStep(const int32_t* words, size_t count, const StepLimits& limits, StepMessage* step);

}  // namespace tilerank
