// The end of a step: each rank has the logits of its slice of the vocabulary, all exchange what it takes to choose, and with it what
// tells whether the ranks are still one. What a slice is reduced to is sampling.cpp's.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "runner/runner.h"

namespace tilerank {

// Joins one row of the vocabulary-split logits on rank 0: every rank's slice through its slot.
Status Runner::GatherRow(const Line& line, int32_t row, Thread& thread, std::vector<float>* values) {
  const Buffer& x = buffers_[static_cast<size_t>(line.x)];
  const auto* logits = reinterpret_cast<const float*>(x.data) + row * x.ld;
  if (thread.index == 0) {
    auto* slot = reinterpret_cast<int32_t*>(SlotOf(program_.rank, thread.sequence + 1));
    slot[0] = vocab_start_;
    slot[1] = vocab_count_;
    std::memcpy(reinterpret_cast<std::byte*>(slot) + kCacheLine, logits, static_cast<size_t>(vocab_count_) * sizeof(float));
  }
  if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
  const SlotRange shown = {0, kCacheLine + static_cast<size_t>(vocab_count_) * sizeof(float)};
  if (Status s = Exchange(thread, CollectiveOp::kAllGather, static_cast<uint64_t>(program_.vocab_size), {&shown, 1}); !s.ok()) return s;
  if (thread.index != 0 || program_.rank != 0) return Status::Ok();
  values->assign(static_cast<size_t>(program_.vocab_size), 0);
  for (int r = 0; r < program_.world_size; r++) {
    const std::byte* slot = SlotOf(r, thread.sequence);
    int32_t range[2];
    std::memcpy(range, slot, sizeof range);
    if (range[0] < 0 || range[1] < 0 || range[0] > program_.vocab_size - range[1]) {
      return Status(Code::kMismatch, "rank " + std::to_string(r) + " holds a slice outside the vocabulary");
    }
    std::memcpy(values->data() + range[0], slot + kCacheLine, static_cast<size_t>(range[1]) * sizeof(float));
  }
  return Status::Ok();
}

// Ranks that have parted, by a bit of memory or of a file, find out with the next token: every rank shows every other its hash of
// all that it was asked and of all rows that went into its head.
Status Runner::CheckHashes(uint64_t sequence) {
  for (int peer = 0; peer < program_.world_size; peer++) {
    if (peer == program_.rank) continue;
    const FlagPayload theirs = PayloadOf(peer, sequence);
    if (theirs.words[1] == input_hash_ && theirs.words[2] == state_hash_) continue;
    const bool is_input = theirs.words[1] != input_hash_;
    const auto text = [](uint64_t hash) {
      char digits[20];
      std::snprintf(digits, sizeof digits, "%016" PRIx64, hash);
      return std::string(digits);
    };
    const std::string mine = text(is_input ? input_hash_ : state_hash_), other = text(theirs.words[is_input ? 1 : 2]);
    communicator_->Abort(Status(Code::kMismatch, "ranks have parted at step " + std::to_string(step_number_) + ": the hash of all " +
                                                     (is_input ? "tokens" : "hidden states") + " so far is " + mine + " on rank " +
                                                     std::to_string(program_.rank) + ", " + other + " on rank " + std::to_string(peer))
                             .Number("rank", program_.rank)
                             .Number("peer", peer)
                             .Number("step", step_number_)
                             .Number("sequence", static_cast<double>(sequence))
                             .Text("operation", "allGather")
                             .Text("mine", mine)
                             .Text("theirs", other));
    return communicator_->failure();
  }
  return Status::Ok();
}

// Rows whose logits are asked for are gathered first, untouched. Then every rank summarises its slice, all exchange the summaries,
// and all find by the same rule which rows the candidates leave open: those are gathered whole, with the penalty applied.
Status Runner::Logits(const Line& line, Thread& thread, StepResult* result) {
  const auto num_rows = static_cast<int32_t>(step_.rows.size());
  if (num_rows == 0) return Status::Ok();
  const bool is_collector = thread.index == 0;
  if (is_collector) result->rows.assign(static_cast<size_t>(num_rows), RowResult());
  for (int32_t i = 0; i < num_rows; i++) {
    if ((step_.rows[static_cast<size_t>(i)].flags & kWantLogits) == 0) continue;
    std::vector<float> values;
    if (Status s = GatherRow(line, i, thread, &values); !s.ok()) return s;
    if (is_collector) result->rows[static_cast<size_t>(i)].raw_logits = std::move(values);
  }

  const Buffer& x = buffers_[static_cast<size_t>(line.x)];
  int32_t most_candidates = 1;
  for (const LogitRow& row : step_.rows) most_candidates = std::max(most_candidates, std::min(row.candidates, program_.vocab_size));
  const size_t record_bytes = RecordBytes(most_candidates);
  const SlotRange shown = {0, record_bytes * static_cast<size_t>(num_rows)};
  if (shown.nbytes > slot_bytes()) {
    return Status(Code::kInvalidArgument, "the candidates of this step do not fit a slot");
  }
  std::byte* slot = SlotOf(program_.rank, thread.sequence + 1);
  for (int32_t i = thread.index; i < num_rows; i += pool_.size()) {
    const LogitRow& row = step_.rows[static_cast<size_t>(i)];
    float* logits = reinterpret_cast<float*>(x.data) + i * x.ld;
    if ((row.flags & kPenalty) != 0) ApplyPenalty(logits, vocab_count_, SeenOf(row.slot), row.penalty);
    SummariseRow(kernels_, logits, vocab_count_, vocab_start_, row, reinterpret_cast<RowRecord*>(slot + static_cast<size_t>(i) * record_bytes));
  }
  if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
  const bool wants_on = is_collector && !is_interrupted_.load(std::memory_order_relaxed);
  FlagPayload payload;
  payload.words[0] = wants_on ? 1 : 0;
  payload.words[1] = input_hash_;
  payload.words[2] = state_hash_;
  if (Status s = Exchange(thread, CollectiveOp::kAllGather, shown.nbytes, {&shown, 1}, payload); !s.ok()) return s;
  if (is_collector) {
    if (Status s = CheckHashes(thread.sequence); !s.ok()) return s;
    goes_on_ = program_.rank == 0 ? wants_on : PayloadOf(0, thread.sequence).words[0] != 0;
    undecided_.clear();
    const RowRecord* records[kMaxWorldSize];
    for (int32_t i = 0; i < num_rows; i++) {
      for (int r = 0; r < program_.world_size; r++) {
        records[r] =
            reinterpret_cast<const RowRecord*>(SlotOf(r, thread.sequence) + static_cast<size_t>(i) * record_bytes);
      }
      const LogitRow& row = step_.rows[static_cast<size_t>(i)];
      const bool is_decided = MergeRecords(records, program_.world_size, row, &result->rows[static_cast<size_t>(i)]);
      if (!is_decided || (row.flags & kWholeRow) != 0) undecided_.push_back(i);
    }
  }
  if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
  for (int32_t i : undecided_) {
    std::vector<float> values;
    if (Status s = GatherRow(line, i, thread, &values); !s.ok()) return s;
    if (!is_collector) continue;
    RowResult& row = result->rows[static_cast<size_t>(i)];
    row.is_whole = true;
    row.ids.clear();
    row.values = std::move(values);
  }
  return Status::Ok();
}

}  // namespace tilerank
