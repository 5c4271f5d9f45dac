#include "runner/step.h"

#include <cstring>
#include <string>

namespace tilerank {

namespace {

constexpr size_t kHeaderWords = 10;

Status Bad(const std::string& what, int64_t value, int64_t limit) {
  return Status(Code::kInvalidArgument, "step message: " + what + " is " + std::to_string(value) + ", allowed are 0 to " +
                                            std::to_string(limit));
}

bool Within(int64_t value, int64_t limit) { return value >= 0 && value <= limit; }

float FloatOf(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

Status DecodeStep(const int32_t* words, size_t count, const StepLimits& limits, StepMessage* step) {
  if (count < kHeaderWords || words[0] != kStepMagic || words[2] < 0 || static_cast<size_t>(words[2]) != count) {
    return Status(Code::kMismatch, "not a step message of this version");
  }
  step->kind = static_cast<MessageKind>(words[1]);
  const int32_t tokens = words[3], runs = words[4], rows = words[5], deltas = words[6], sets = words[7], stops = words[9];
  step->ahead = words[8];
  if (!Within(tokens, limits.max_tokens)) return Bad("tokens", tokens, limits.max_tokens);
  if (!Within(runs, limits.max_sequences)) return Bad("runs", runs, limits.max_sequences);
  if (!Within(rows, limits.max_logit_rows)) return Bad("logit rows", rows, limits.max_logit_rows);
  if (!Within(deltas, limits.num_blocks)) return Bad("block deltas", deltas, limits.num_blocks);
  if (!Within(sets, limits.max_sequences)) return Bad("frequency sets", sets, limits.max_sequences);
  if (!Within(step->ahead, limits.max_positions)) return Bad("steps ahead", step->ahead, limits.max_positions);
  if (!Within(stops, kMaxStopIds)) return Bad("stop ids", stops, kMaxStopIds);
  const size_t set_words = 1 + static_cast<size_t>(limits.rotary_dims);
  const size_t expected = kHeaderWords + 4u * static_cast<size_t>(runs) + static_cast<size_t>(tokens) +
                          3u * static_cast<size_t>(deltas) + set_words * static_cast<size_t>(sets) + 8u * static_cast<size_t>(rows) + static_cast<size_t>(stops);
  if (expected != count) return Bad("length in words", static_cast<int64_t>(count), static_cast<int64_t>(expected));

  const int32_t* at = words + kHeaderWords;
  step->tokens = tokens;
  step->runs.clear();
  int32_t token0 = 0;
  for (int32_t i = 0; i < runs; i++, at += 4) {
    Run run{at[0], at[1], at[2], at[3] != 0, token0};
    if (!Within(run.slot, limits.max_sequences - 1)) return Bad("slot", run.slot, limits.max_sequences - 1);
    if (run.tokens < 1 || run.tokens > tokens - token0) return Bad("tokens of a run", run.tokens, tokens - token0);
    if (!Within(run.position0, limits.max_positions - run.tokens)) {
      return Bad("position", run.position0, limits.max_positions - run.tokens);
    }
    token0 += run.tokens;
    step->runs.push_back(run);
  }
  if (token0 != tokens) return Bad("tokens of all runs", token0, tokens);
  step->ids.assign(at, at + tokens);
  at += tokens;
  for (int32_t id : step->ids) {
    if (!Within(id, limits.vocab_size - 1)) return Bad("token id", id, limits.vocab_size - 1);
  }
  step->deltas.clear();
  const int32_t table_length = (limits.max_positions + 31) / 32;
  for (int32_t i = 0; i < deltas; i++, at += 3) {
    if (!Within(at[0], limits.max_sequences - 1)) return Bad("slot of a block delta", at[0], limits.max_sequences - 1);
    if (!Within(at[1], table_length - 1)) return Bad("index of a block delta", at[1], table_length - 1);
    if (!Within(at[2], limits.num_blocks - 1)) return Bad("block", at[2], limits.num_blocks - 1);
    step->deltas.push_back({at[0], at[1], at[2]});
  }
  step->frequency_sets.clear();
  for (int32_t i = 0; i < sets; i++, at += set_words) {
    if (!Within(at[0], limits.max_sequences - 1)) return Bad("slot of a frequency set", at[0], limits.max_sequences - 1);
    FrequencySet set{at[0], std::vector<double>(static_cast<size_t>(limits.rotary_dims / 2))};
    std::memcpy(set.frequencies.data(), at + 1, set.frequencies.size() * sizeof(double));
    step->frequency_sets.push_back(static_cast<FrequencySet&&>(set));
  }
  step->rows.clear();
  for (int32_t i = 0; i < rows; i++, at += 8) {
    LogitRow row{at[0], at[1], at[2], at[3], at[4], FloatOf(at[5]), FloatOf(at[6]), FloatOf(at[7])};
    if (!Within(row.token, tokens - 1)) return Bad("token of a logit row", row.token, tokens - 1);
    if (!Within(row.slot, limits.max_sequences - 1)) return Bad("slot of a logit row", row.slot, limits.max_sequences - 1);
    if (row.candidates < 1 || row.candidates > limits.vocab_size) return Bad("candidates", row.candidates, limits.vocab_size);
    if (!Within(row.top_k, limits.vocab_size)) return Bad("top_k", row.top_k, limits.vocab_size);
    if (!(row.temperature >= 0) || !(row.penalty > 0) || !(row.top_p > 0)) {
      return Status(Code::kInvalidArgument, "step message: sampling parameters of a logit row are not positive numbers");
    }
    step->rows.push_back(row);
  }
  step->stop_ids.assign(at, at + stops);
  if (step->ahead == 0) return Status::Ok();
  bool is_greedy_decode = rows == runs && sets == 0;
  for (int32_t i = 0; i < rows && is_greedy_decode; i++) {
    const Run& run = step->runs[static_cast<size_t>(i)];
    const LogitRow& row = step->rows[static_cast<size_t>(i)];
    if (!Within(run.position0, limits.max_positions - 1 - step->ahead)) {
      return Bad("position ahead", run.position0, limits.max_positions - 1 - step->ahead);
    }
    is_greedy_decode = run.tokens == 1 && row.token == i && row.slot == run.slot && row.temperature == 0 && (row.flags & (kWantLogits | kWholeRow)) == 0;
  }
  if (!is_greedy_decode) return Status(Code::kInvalidArgument, "step message: only a step of one token and one greedy row a sequence can decode ahead");
  return Status::Ok();
}

}  // namespace tilerank
