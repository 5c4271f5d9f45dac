// What a rank does with its slice of a row of logits: penalty, statistics, the best candidates; and how the slices of all ranks
// become one answer. The final choice is TypeScript's (tp/sampling.ts); here is decided only whether the candidates suffice for it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "runner/step.h"

namespace tilerank {

struct Candidate {
  int32_t id;
  float value;
};

/// One rank's part of one row, as it stands in the slot; `count` candidates follow, best first.
struct RowRecord {
  float max;           // of the slice
  float sum_exp;       // over the slice of exp((x - max) / temperature); temperature 1 when greedy
  int32_t count;       // candidates that follow
  int32_t slice;       // elements of the slice
};

/// A row as rank 0 hands it to JavaScript.
struct RowResult {
  float max = 0, sum_exp = 0;
  bool is_complete = false;         // the candidates are the whole vocabulary
  bool is_whole = false;            // values holds the whole vocabulary in id order, ids is empty
  std::vector<int32_t> ids;         // else candidates, best first; ties: lowest id first; a true prefix of that order
  std::vector<float> values;
  std::vector<float> raw_logits;    // whole row before the penalty, when asked for
};

inline size_t RecordBytes(int32_t candidates) { return sizeof(RowRecord) + static_cast<size_t>(candidates) * sizeof(Candidate); }

/// score < 0 ? score * penalty : score / penalty for the ids whose bit is set (CTRL, Keskar et al. 2019, section 4.1).
void ApplyPenalty(float* logits, int32_t n, const uint64_t* seen, float penalty);

/// Fills record and its candidates (ids counted from id0). NaN counts as -inf.
void SummariseRow(const Kernels& kernels, const float* logits, int32_t n, int32_t id0, const LogitRow& row, RowRecord* record);

/// Joins the records of all ranks, in rank order; the same bits on every rank. Returns whether the candidates decide the row.
bool MergeRecords(const RowRecord* const* records, int32_t num_records, const LogitRow& row, RowResult* result);

}  // namespace tilerank
