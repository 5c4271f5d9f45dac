#include "runner/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tilerank {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

bool Better(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

float Ordered(float x) { return std::isnan(x) ? kMinusInfinity : x; }

// The `count` best of n, best first. Few: an insertion into a sorted list, which a random row enters count * ln(n / count) times.
void SelectBest(const float* logits, int32_t n, int32_t id0, int32_t count, Candidate* best) {
  constexpr int32_t kInsertionLimit = 256;
  if (count <= kInsertionLimit) {
    int32_t held = 0;
    for (int32_t i = 0; i < n; i++) {
      const float value = Ordered(logits[i]);
      if (held == count && !(value > best[held - 1].value)) continue;
      int32_t at = held < count ? held++ : count - 1;
      for (; at > 0 && value > best[at - 1].value; at--) best[at] = best[at - 1];
      best[at] = {id0 + i, value};
    }
    return;
  }
  std::vector<Candidate> all(static_cast<size_t>(n));
  for (int32_t i = 0; i < n; i++) all[static_cast<size_t>(i)] = {id0 + i, Ordered(logits[i])};
  std::partial_sort(all.begin(), all.begin() + count, all.end(), Better);
  std::copy(all.begin(), all.begin() + count, best);
}

// Exactness of the choice from candidates alone. Every candidate above `bound` is known to have no unseen rival above it.
bool Decides(const LogitRow& row, const RowResult& result, float bound) {
  if (row.temperature == 0) return true;
  const auto reliable = static_cast<size_t>(
      std::find_if(result.values.begin(), result.values.end(), [bound](float v) { return !(v > bound); }) - result.values.begin());
  // Ties at the top-k threshold stay in, so the threshold itself must be above the bound.
  if (row.top_k > 0) return reliable >= static_cast<size_t>(row.top_k);
  if (row.top_p < 1) {
    // A little more than top_p, so that rounding here can never call a row decided that the chooser finds short.
    const double enough = (static_cast<double>(row.top_p) + 1e-6) * result.sum_exp;
    double mass = 0;
    for (size_t i = 0; i < reliable; i++) {
      mass += std::exp((static_cast<double>(result.values[i]) - result.max) / row.temperature);
      if (mass >= enough) return true;
    }
  }
  return false;
}

}  // namespace

void ApplyPenalty(float* logits, int32_t n, const uint64_t* seen, float penalty) {
  for (int32_t word = 0; word * 64 < n; word++) {
    for (uint64_t bits = seen[word]; bits != 0; bits &= bits - 1) {
      float& x = logits[word * 64 + __builtin_ctzll(bits)];
      x = x < 0 ? x * penalty : x / penalty;
    }
  }
}

void SummariseRow(const Kernels& kernels, const float* logits, int32_t n, int32_t id0, const LogitRow& row, RowRecord* record) {
  auto* best = reinterpret_cast<Candidate*>(record + 1);
  record->slice = n;
  record->count = std::min(row.candidates, n);
  record->max = kMinusInfinity;
  record->sum_exp = 0;
  if (n == 0) return;
  int32_t argmax = 0;
  kernels.max_sum_exp(logits, n, row.temperature > 0 ? 1.0f / row.temperature : 1.0f, &record->max, &argmax, &record->sum_exp);
  if (record->count == 1) {
    best[0] = {id0 + argmax, Ordered(record->max)};
  } else {
    SelectBest(logits, n, id0, record->count, best);
  }
}

bool MergeRecords(const RowRecord* const* records, int32_t num_records, const LogitRow& row, RowResult* result) {
  const double temperature = row.temperature > 0 ? row.temperature : 1;
  float max = kMinusInfinity;
  for (int32_t r = 0; r < num_records; r++) max = std::max(max, Ordered(records[r]->max));
  double sum = 0;
  float bound = kMinusInfinity;
  bool is_truncated = false;
  std::vector<Candidate> all;
  for (int32_t r = 0; r < num_records; r++) {
    const RowRecord& record = *records[r];
    if (record.slice > 0 && max > kMinusInfinity && record.max > kMinusInfinity) {
      sum += record.sum_exp * std::exp((static_cast<double>(record.max) - max) / temperature);
    }
    const auto* best = reinterpret_cast<const Candidate*>(&record + 1);
    all.insert(all.end(), best, best + record.count);
    if (record.count < record.slice) {
      is_truncated = true;
      bound = std::max(bound, best[record.count - 1].value);
    }
  }
  std::sort(all.begin(), all.end(), Better);
  result->max = max;
  result->sum_exp = static_cast<float>(sum);
  result->is_complete = !is_truncated;
  result->is_whole = false;
  result->ids.clear();
  result->values.clear();
  for (const Candidate& candidate : all) {
    // Below the bound a rank may have held back better ones; at the bound the first (lowest id) is still certain.
    if (is_truncated && (candidate.value < bound || (candidate.value == bound && !result->values.empty() && result->values.back() == bound))) {
      break;
    }
    result->ids.push_back(candidate.id);
    result->values.push_back(candidate.value);
  }
  return !is_truncated || Decides(row, *result, bound);
}

}  // namespace tilerank
