// What each line of the Program does on one thread of one rank: its part of a kernel's work, and the exchanges between ranks. The
// last line of a step, Logits, is in logits.cpp.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "runner/clock.h"
#include "runner/runner.h"

namespace tilerank {

namespace {

// Query rows of one attention item: K and V of a block are read once for all of them (and for the heads that share them).
constexpr int32_t kQueryRows = 32;
// Words of an exchange's payload: the candidates' exchange uses the first three, every one the last (with `profile`).
constexpr int kKernelTimeWord = kPayloadWords - 1;

// Bounds of part `index` of `parts` of `count` things, in units of `unit` (the last takes the remainder).
struct Range {
  int32_t begin, end;
  int32_t size() const { return end - begin; }
};
Range PartOf(int32_t count, int index, int parts, int32_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  const auto at = [&](int64_t i) { return static_cast<int32_t>(std::min<int64_t>(count, units * i / parts * unit)); };
  return {at(index), at(index + 1)};
}

}  // namespace

Status Runner::RunLine(const Line& line, int32_t layer, Thread& thread, StepResult* result) {
  switch (line.op) {
    case Op::kEmbed:
      thread.phase_of_line = Phase::kRest;
      Embed(line, thread);
      return Status::Ok();
    case Op::kLinear:
      thread.phase_of_line = Phase::kGemm;
      Linear(line, layer, thread);
      return Status::Ok();
    case Op::kAllReduceResidualNorm:
      thread.phase_of_line = Phase::kCollective;
      return AllReduceResidualNorm(line, layer, thread);
    case Op::kRopeKvWrite:
      thread.phase_of_line = Phase::kAttention;
      RopeKvWrite(line, layer, thread);
      return Status::Ok();
    case Op::kAttention:
      thread.phase_of_line = Phase::kAttention;
      return Attention(line, layer, thread);
    case Op::kSelectRows:
      thread.phase_of_line = Phase::kRest;
      SelectRows(line, thread);
      return Status::Ok();
    case Op::kLogits:
      thread.phase_of_line = Phase::kRest;
      return Logits(line, thread, result);
  }
  return Status(Code::kInternal, "unknown operation in the program");
}

bool Runner::Barrier(Thread& thread) {
  if (!options_.profile) return pool_.Barrier(thread.index);
  const auto start = Clock::now();
  const bool goes_on = pool_.Barrier(thread.index);
  thread.wait_us += MicrosSince(start);
  return goes_on;
}

Status Runner::Exchange(Thread& thread, CollectiveOp op, uint64_t count, std::span<const SlotRange> shown, FlagPayload payload) {
  thread.sequence++;
  if (program_.world_size == 1) return Status::Ok();
  // The line before ended with a barrier, so thread 0 speaks and listens for all; a second one hands on what it heard.
  if (thread.index == 0) {
    const auto start = Clock::now();
    OpTag tag;
    tag.op = op;
    tag.dtype = program_.dtype;
    tag.count = count;
    payload.words[kKernelTimeWord] = std::bit_cast<uint64_t>(thread.own_us);
    const Deadline deadline = Deadline::AfterMs(options_.timeout_ms);
    Status status;
    if (nodes_ != nullptr) status = nodes_->Share(thread.sequence, tag, shown, payload, deadline);
    if (status.ok()) {
      communicator_->Publish(kLane, thread.sequence, tag, payload);
      status = communicator_->Await(kLane, thread.sequence, tag, deadline);
    }
    const double us = MicrosSince(start);
    thread.collective_us += us;
    thread.wait_us += us;
    if (!status.ok()) return status;
    if (options_.profile) {
      double longest = 0;
      for (int r = 0; r < program_.world_size; r++) {
        longest = std::max(longest, std::bit_cast<double>(PayloadOf(r, thread.sequence).words[kKernelTimeWord]));
      }
      thread.kernel_us += longest;
      thread.own_us = 0;
    }
  }
  return Barrier(thread) ? Status::Ok() : Status(Code::kAborted, "another thread of this rank failed");
}

void Runner::Embed(const Line& line, Thread& thread) {
  const Range rows = PartOf(step_.tokens, thread.index, pool_.size());
  if (rows.size() == 0) return;
  // The rotary angles of the step belong to nobody's line: they are made here, once, for all layers.
  const int32_t half = program_.rotary_dims / 2;
  for (int32_t row = rows.begin; row < rows.end; row++) {
    const auto at = static_cast<size_t>(row);
    const double* frequencies = frequencies_.data() + static_cast<size_t>(slot_of_[at]) * static_cast<size_t>(half);
    float* cos_sin = cos_sin_ + at * static_cast<size_t>(program_.rotary_dims);
    for (int32_t i = 0; i < half; i++) {
      const double angle = position_[at] * frequencies[i];
      cos_sin[i] = static_cast<float>(std::cos(angle));
      cos_sin[half + i] = static_cast<float>(std::sin(angle));
    }
  }
  const int64_t element = ElementBytes(program_.dtype);
  std::byte* y = SlotOf(program_.rank, thread.sequence + 1) + rows.begin * ld_slot_ * element;
  kernels_.embed(weights_->linear(line.weight, 0), local_ids_.data() + rows.begin, rows.size(), y, program_.dtype, ld_slot_);
}

void Runner::Linear(const Line& line, int32_t layer, Thread& thread) {
  const WeightSpec& spec = program_.weights[static_cast<size_t>(line.weight)];
  const PackedWeight& weight = weights_->linear(line.weight, spec.copies > 1 ? layer : 0);
  const Buffer& x = buffers_[static_cast<size_t>(line.x)];
  const int32_t m = RowsOf(program_.buffers[static_cast<size_t>(line.x)]);
  if (m == 0 || weight.panels == 0) return;
  GemmArgs args{};
  args.weight = &weight;
  args.activation = line.activation;
  args.scratch = scratch_[static_cast<size_t>(thread.index)];
  if (line.y == kSlot) {
    args.y = SlotOf(program_.rank, thread.sequence + 1);
    args.y_dtype = program_.dtype;
    args.ldy = ld_slot_;
  } else {
    const Buffer& y = buffers_[static_cast<size_t>(line.y)];
    args.y = y.data;
    args.y_dtype = y.dtype;
    args.ldy = y.ld;
  }
  // A thread owns a fixed slab of panels; a narrow weight and many rows are split along the rows instead.
  const int threads = pool_.size();
  const int32_t unit = line.activation == Activation::kSiluMul ? 2 : 1;
  Range panels{0, weight.panels}, rows{0, m};
  if (weight.panels / threads < 4 && m >= 32 * threads) {
    rows = PartOf(m, thread.index, threads, 16);
  } else {
    panels = PartOf(weight.panels, thread.index, threads, unit);
  }
  if (panels.size() == 0 || rows.size() == 0) return;
  args.x = x.data + rows.begin * x.ld * ElementBytes(x.dtype);
  args.ldx = x.ld;
  args.m = rows.size();
  args.y = static_cast<std::byte*>(args.y) + rows.begin * args.ldy * ElementBytes(args.y_dtype);
  args.panel0 = panels.begin;
  args.panel1 = panels.end;
  kernels_.gemm(args);
}

// The tail of a row-parallel layer: sum of the ranks' slots, residual, norm. One exchange; or, where the message is large, two with
// the rows shared out (reduce-scatter and all-gather over rows). The residual of a row then lives on its owner alone, for the
// whole step. Either way a row's value is the same sum in the same order.
Status Runner::AllReduceResidualNorm(const Line& line, int32_t layer, Thread& thread) {
  const int32_t columns = program_.hidden_size, world = program_.world_size;
  const int threads = pool_.size();
  const Buffer& y = buffers_[static_cast<size_t>(line.y)];
  const int64_t element = ElementBytes(program_.dtype);
  const uint64_t count = static_cast<uint64_t>(step_.tokens) * static_cast<uint64_t>(columns);
  const SlotRange all_rows = {0, static_cast<size_t>(step_.tokens * ld_slot_ * element)};
  const bool has_parts = is_row_sharded_ && nodes_ != nullptr;
  if (has_parts && thread.index == 0) {
    for (int r = 0; r < world; r++) {
      const Range share = PartOf(step_.tokens, r, world);
      row_shares_[static_cast<size_t>(r)] = {static_cast<size_t>(share.begin * ld_slot_ * element), static_cast<size_t>(share.size() * ld_slot_ * element)};
    }
  }
  if (Status s = Exchange(thread, CollectiveOp::kAllReduce, count, has_parts ? std::span<const SlotRange>(row_shares_) : std::span(&all_rows, 1)); !s.ok()) {
    return s;
  }
  const void* slots[kMaxWorldSize];

  ReduceResidualArgs reduce{};
  reduce.slots = slots;
  reduce.num_slots = world;
  reduce.slot_dtype = program_.dtype;
  reduce.ld_slot = ld_slot_;
  reduce.ld_residual = ld_residual_;
  reduce.add_residual = line.add_residual;
  reduce.bias = line.bias >= 0 ? weights_->vector(line.bias, program_.weights[static_cast<size_t>(line.bias)].copies > 1 ? layer : 0) : nullptr;
  reduce.ld_sum = ld_sum_;
  RmsNormArgs norm{};
  norm.ldx = ld_residual_;
  norm.ld_sum = ld_sum_;
  norm.gamma = weights_->vector(line.gamma, layer + line.gamma_layer);
  norm.eps = program_.norm_eps;
  norm.y_dtype = y.dtype;
  norm.columns = columns;
  // Of ranks of other nodes only this rank's share has come.
  const auto partial_sums = [&](int r, int32_t row) -> const std::byte* {
    if (!has_parts || nodes_->IsHere(r)) return SlotOf(r, thread.sequence) + row * ld_slot_ * element;
    return nodes_->PartFrom(r, thread.sequence) + (row - PartOf(step_.tokens, program_.rank, world).begin) * ld_slot_ * element;
  };
  const auto set_rows = [&](int32_t row, int32_t rows) {
    for (int r = 0; r < world; r++) slots[r] = partial_sums(r, row);
    reduce.residual = residual_ + row * ld_residual_;
    reduce.sum_squares = sum_squares_ + row * ld_sum_;
    reduce.rows = rows;
    norm.x = reduce.residual;
    norm.sum_squares = reduce.sum_squares;
    norm.rows = rows;
  };
  // Row by row, so that the norm finds its row in the nearest cache.
  const auto reduce_rows = [&](Range rows, std::byte* to, int64_t ld) {
    reduce.column0 = norm.column0 = 0;
    reduce.column1 = norm.column1 = columns;
    norm.ldy = ld;
    for (int32_t row = rows.begin; row < rows.end; row++) {
      set_rows(row, 1);
      norm.y = to + row * ld * ElementBytes(y.dtype);
      kernels_.reduce_residual(reduce);
      kernels_.rms_norm(norm);
    }
  };

  if (is_row_sharded_) {
    const Range mine = PartOf(step_.tokens, program_.rank, world);
    Range rows = PartOf(mine.size(), thread.index, threads);
    rows = {mine.begin + rows.begin, mine.begin + rows.end};
    // The normalised rows go to the slot of the next generation, from which the other ranks copy them.
    std::byte* share = SlotOf(program_.rank, thread.sequence + 1);
    reduce_rows(rows, share, y.ld);
    const int64_t row_bytes = y.ld * ElementBytes(y.dtype);
    kernels_.copy(y.data + rows.begin * row_bytes, share + rows.begin * row_bytes, static_cast<size_t>(rows.size() * row_bytes));
    if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
    const SlotRange shown = {static_cast<size_t>(mine.begin * row_bytes), static_cast<size_t>(mine.size() * row_bytes)};
    if (Status s = Exchange(thread, CollectiveOp::kAllGather, count, {&shown, 1}); !s.ok()) return s;
    for (int r = 0; r < world; r++) {
      if (r == program_.rank) continue;
      const Range theirs = PartOf(step_.tokens, r, world);
      Range part = PartOf(theirs.size(), thread.index, threads);
      const int64_t begin = (theirs.begin + part.begin) * row_bytes;
      kernels_.copy(y.data + begin, SlotOf(r, thread.sequence) + begin, static_cast<size_t>(part.size() * row_bytes));
    }
    return Status::Ok();
  }
  if (threads == 1 || step_.tokens >= threads) {
    reduce_rows(PartOf(step_.tokens, thread.index, threads), y.data, y.ld);
    return Status::Ok();
  }
  // Fewer rows than threads: each takes a stripe of columns, and the norm waits for all the sums of squares.
  const Range stripe = PartOf(columns, thread.index, threads, kSumBlock);
  reduce.column0 = norm.column0 = stripe.begin;
  reduce.column1 = norm.column1 = stripe.end;
  norm.ldy = y.ld;
  norm.y = y.data;
  set_rows(0, step_.tokens);
  if (stripe.size() > 0) kernels_.reduce_residual(reduce);
  if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
  if (stripe.size() > 0) kernels_.rms_norm(norm);
  return Status::Ok();
}

void Runner::RopeKvWrite(const Line& line, int32_t layer, Thread& thread) {
  const Range rows = PartOf(step_.tokens, thread.index, pool_.size());
  if (rows.size() == 0) return;
  const Buffer& qkv = buffers_[static_cast<size_t>(line.x)];
  RopeKvWriteArgs args{};
  args.qkv = qkv.data + rows.begin * qkv.ld * ElementBytes(qkv.dtype);
  args.dtype = qkv.dtype;
  args.ld_qkv = qkv.ld;
  args.rows = rows.size();
  args.num_heads = program_.num_heads;
  args.num_kv_heads = program_.num_kv_heads;
  args.head_dim = program_.head_dim;
  args.rotary_dims = program_.rotary_dims;
  args.cos_sin = cos_sin_ + static_cast<size_t>(rows.begin) * static_cast<size_t>(program_.rotary_dims);
  args.kv_offset = kv_offset_.data() + rows.begin;
  args.kv_lane = kv_lane_.data() + rows.begin;
  args.kv_base = kv_.data() + static_cast<size_t>(layer) * kv_layer_bytes_;
  args.kv_head_stride = static_cast<int64_t>(kv_head_bytes_);
  kernels_.rope_kv_write(args);
}

// Cuts attention into items that threads claim one by one. Long prompts are cut into query chunks, latest first (they cost most);
// short runs over long contexts are cut along their keys, whose partial results a merge joins in order.
void Runner::BuildAttentionItems() {
  items_.clear();
  merges_.clear();
  int64_t partial = 0;
  for (int32_t r = 0; r < static_cast<int32_t>(step_.runs.size()); r++) {
    const Run& run = step_.runs[static_cast<size_t>(r)];
    const int32_t keys = run.position0 + run.tokens;
    for (int32_t g = 0; g < static_cast<int32_t>(items_groups_->size()); g++) {
      const HeadGroup& group = (*items_groups_)[static_cast<size_t>(g)];
      if (run.tokens <= kSplitRows && keys > kSplitKeys) {
        const int32_t splits = (keys + kSplitKeys - 1) / kSplitKeys;
        const int64_t stride = static_cast<int64_t>(run.tokens) * group.num_heads * (program_.head_dim + 2);
        merges_.push_back({r, g, splits, partial, stride});
        for (int32_t s = 0; s < splits; s++, partial += stride) {
          items_.push_back({r, g, 0, run.tokens, s * kSplitKeys, std::min(keys, (s + 1) * kSplitKeys), partial});
        }
        continue;
      }
      for (int32_t row0 = (run.tokens - 1) / kQueryRows * kQueryRows; row0 >= 0; row0 -= kQueryRows) {
        const int32_t rows = std::min(kQueryRows, run.tokens - row0);
        items_.push_back({r, g, row0, rows, 0, run.position0 + row0 + rows, -1});
      }
    }
  }
  std::stable_sort(items_.begin(), items_.end(), [](const AttentionItem& a, const AttentionItem& b) {
    return static_cast<int64_t>(a.rows) * (a.key1 - a.key0) > static_cast<int64_t>(b.rows) * (b.key1 - b.key0);
  });
}

Status Runner::Attention(const Line& line, int32_t layer, Thread& thread) {
  const Buffer& q = buffers_[static_cast<size_t>(line.x)];
  const Buffer& out = buffers_[static_cast<size_t>(line.y)];
  const int64_t element = ElementBytes(q.dtype);
  // Two counters in turn: the one of the next layer is reset before anybody can pass this line's closing barrier.
  std::atomic<int32_t>& next = next_item_[static_cast<size_t>(layer & 1)];
  if (thread.index == 0) next_item_[static_cast<size_t>(~layer & 1)].store(0, std::memory_order_relaxed);
  AttentionArgs args{};
  args.dtype = q.dtype;
  args.ldq = q.ld;
  args.head_dim = program_.head_dim;
  args.scale = line.scale;
  args.ldo = out.ld;
  args.scratch = scratch_[static_cast<size_t>(thread.index)];
  const std::byte* base = kv_.data() + static_cast<size_t>(layer) * kv_layer_bytes_;
  const auto count = static_cast<int32_t>(items_.size());
  for (int32_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
    const AttentionItem& item = items_[static_cast<size_t>(i)];
    const Run& run = step_.runs[static_cast<size_t>(item.run)];
    const HeadGroup& group = line.groups[static_cast<size_t>(item.group)];
    const int64_t row = run.token0 + item.row0, column = static_cast<int64_t>(group.first_head) * program_.head_dim;
    args.q = q.data + (row * q.ld + column) * element;
    args.rows = item.rows;
    args.group = group.num_heads;
    args.kv_base = base + static_cast<size_t>(group.kv_head) * kv_head_bytes_;
    args.block_offset = block_offset_.data() + static_cast<size_t>(run.slot) * static_cast<size_t>(table_length_);
    args.position0 = run.position0 + item.row0;
    args.key0 = item.key0;
    args.key1 = item.key1;
    args.out = out.data + (row * out.ld + column) * element;
    args.partial = item.partial < 0 ? nullptr : partials_ + item.partial;
    kernels_.attention(args);
  }
  if (merges_.empty()) return Status::Ok();
  if (!Barrier(thread)) return Status(Code::kAborted, "another thread of this rank failed");
  for (size_t i = static_cast<size_t>(thread.index); i < merges_.size(); i += static_cast<size_t>(pool_.size())) {
    const MergeItem& item = merges_[i];
    const Run& run = step_.runs[static_cast<size_t>(item.run)];
    const HeadGroup& group = line.groups[static_cast<size_t>(item.group)];
    AttentionMergeArgs merge{};
    merge.partials = partials_ + item.partial;
    merge.split_stride = item.split_stride;
    merge.splits = item.splits;
    merge.rows = run.tokens;
    merge.group = group.num_heads;
    merge.head_dim = program_.head_dim;
    merge.out = out.data + (run.token0 * out.ld + static_cast<int64_t>(group.first_head) * program_.head_dim) * element;
    merge.dtype = out.dtype;
    merge.ldo = out.ld;
    kernels_.attention_merge(merge);
  }
  return Status::Ok();
}

void Runner::SelectRows(const Line& line, Thread& thread) {
  const Buffer& x = buffers_[static_cast<size_t>(line.x)];
  const Buffer& y = buffers_[static_cast<size_t>(line.y)];
  const int64_t row_bytes = x.ld * ElementBytes(x.dtype);
  if (thread.index == 0) {
    // FNV-1a over 64-bit words. Rows are whole multiples of 64 bytes, their padding is zero.
    for (const LogitRow& row : step_.rows) {
      const std::byte* at = x.data + row.token * row_bytes;
      for (int64_t i = 0; i < row_bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, at + i, 8);
        state_hash_ = (state_hash_ ^ word) * 0x100000001b3u;
      }
    }
  }
  const Range rows = PartOf(static_cast<int32_t>(step_.rows.size()), thread.index, pool_.size());
  for (int32_t i = rows.begin; i < rows.end; i++) {
    std::memcpy(y.data + i * y.ld * ElementBytes(y.dtype), x.data + step_.rows[static_cast<size_t>(i)].token * row_bytes,
                static_cast<size_t>(row_bytes));
  }
}

}  // namespace tilerank
