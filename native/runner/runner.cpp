#include "runner/runner.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace tilerank {

namespace {

using Clock = std::chrono::steady_clock;

// What decodes ahead answers JavaScript at least this often, so that text streams, aborts act and new requests come in. A token that
// takes longer is answered by itself, as JavaScript costs it nothing: 0.2 ms where ranks share their cores with it.
constexpr double kAheadMs = 10;

double NowMs() { return std::chrono::duration<double, std::milli>(Clock::now().time_since_epoch()).count(); }
double MicrosSince(Clock::time_point start) { return std::chrono::duration<double, std::micro>(Clock::now() - start).count(); }

constexpr size_t kCacheLine = 64;
// Query rows of one attention item: K and V of a block are read once for all of them (and for the heads that share them).
constexpr int32_t kQueryRows = 32;
// Runs of at most this many tokens split their keys, so that one long sequence can use all threads. The rule looks at the sequence
// alone, never at the number of threads or its neighbours: the same sums on any machine.
constexpr int32_t kSplitRows = 4;
constexpr int32_t kSplitKeys = 512;
// From this many bytes of partial sums each rank reduces and normalises only its share of the rows and the others copy the result:
// two exchanges in place of one, but 1/N of the additions. Measured at 2 ranks on one L3.
constexpr int64_t kRowShardBytes = 256 << 10;
// The runner's threads speak through one lane: a step has a barrier before every exchange anyway, and ranks may have unequal
// numbers of threads.
constexpr int kLane = 0;
// Words of an exchange's payload: the candidates' exchange uses the first three, every one the last (with `profile`).
constexpr int kKernelTimeWord = kPayloadWords - 1;

size_t AlignUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Row stride in elements: whole 32-element steps, and not a multiple of a page, so that rows do not fall on the same cache sets.
int64_t RowStride(int32_t columns, DType dtype) {
  int64_t ld = (static_cast<int64_t>(columns) + 31) / 32 * 32;
  if (ld * ElementBytes(dtype) % 4096 == 0) ld += 32;
  return ld;
}

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

OpTag MessageTag(uint64_t words) {
  OpTag tag;
  tag.op = CollectiveOp::kBroadcast;
  tag.count = words;
  return tag;
}

size_t KvBlockBytes(const Program& program) {
  return static_cast<size_t>(kKvBlockTokens) * static_cast<size_t>(program.head_dim) * 2 * static_cast<size_t>(ElementBytes(program.dtype));
}

}  // namespace

size_t Runner::SlotBytes(const Program& program, const RunnerOptions& options, int32_t max_vocab_count) {
  const auto tokens = static_cast<size_t>(options.max_tokens), sequences = static_cast<size_t>(options.max_sequences);
  const size_t partial_sums = tokens * static_cast<size_t>(RowStride(program.hidden_size, program.dtype)) * ElementBytes(program.dtype);
  const size_t row = static_cast<size_t>(max_vocab_count) * sizeof(float) + kCacheLine;
  const size_t candidates = static_cast<size_t>(options.max_logit_rows) * RecordBytes(320);
  const size_t message = 4 * (16 + kMaxStopIds + 4 * sequences + tokens + 3 * static_cast<size_t>(options.num_blocks) +
                              (1 + static_cast<size_t>(program.rotary_dims)) * sequences + 8 * static_cast<size_t>(options.max_logit_rows));
  return AlignUp(std::max({partial_sums, row, candidates, message}), 4096);
}

Status Runner::Create(Program program, RunnerOptions options, const Kernels& kernels, std::shared_ptr<Communicator> communicator,
                      std::unique_ptr<Runner>* out) {
  if (communicator == nullptr || communicator->world_size() != program.world_size || communicator->rank() != program.rank) {
    return Status(Code::kInvalidArgument, "the program was made for another rank or number of ranks than the group has");
  }
  std::unique_ptr<Runner> runner(new Runner(std::move(program), std::move(options), kernels, std::move(communicator)));
  if (Status s = runner->Allocate(); !s.ok()) return s;
  runner->pool_.StartLeader([r = runner.get()] { r->LeaderMain(); });
  *out = std::move(runner);
  return Status::Ok();
}

Runner::Runner(Program program, RunnerOptions options, const Kernels& kernels, std::shared_ptr<Communicator> communicator)
    : program_(std::move(program)),
      options_(std::move(options)),
      kernels_(kernels),
      communicator_(std::move(communicator)),
      pool_(options_.cores, options_.spin_us) {
  if (!options_.profile) return;
  kernel_times_.resize(static_cast<size_t>(pool_.size()));
}

Runner::~Runner() {
  {
    std::lock_guard lock(jobs_mutex_);
    closing_ = true;
    // A job that waits for peers, perhaps without a deadline, must not hold up the end of this process.
    if (is_busy_ && program_.world_size > 1) {
      communicator_->Abort(Status(Code::kAborted, "rank " + std::to_string(program_.rank) + " was closed in the middle of its work"));
    }
  }
  jobs_posted_.Post();
  pool_.JoinLeader();
}

Status Runner::Allocate() {
  if (Status s = Weights::Create(program_, &weights_); !s.ok()) return s;

  const auto tokens = static_cast<size_t>(options_.max_tokens), logit_rows = static_cast<size_t>(options_.max_logit_rows);
  ld_residual_ = RowStride(program_.hidden_size, DType::kF32);
  ld_sum_ = (program_.hidden_size + kSumBlock - 1) / kSumBlock;
  ld_slot_ = RowStride(program_.hidden_size, program_.dtype);

  kv_block_bytes_ = KvBlockBytes(program_);
  kv_layer_bytes_ = kv_block_bytes_ * static_cast<size_t>(program_.num_kv_heads) * static_cast<size_t>(options_.num_blocks);
  if (Status s = MappedMemory::Allocate(kv_layer_bytes_ * static_cast<size_t>(program_.num_layers), "the KV cache", &kv_); !s.ok()) return s;

  // One mapping for everything a step writes; offsets first, then pointers.
  size_t nbytes = 0;
  const auto reserve = [&nbytes](size_t size) {
    const size_t at = nbytes;
    nbytes += AlignUp(size, 4096);
    return at;
  };
  std::vector<size_t> buffer_at;
  for (const BufferSpec& spec : program_.buffers) {
    const size_t rows = spec.is_logit_rows ? logit_rows : tokens;
    buffer_at.push_back(reserve(rows * static_cast<size_t>(RowStride(spec.columns, spec.dtype)) * ElementBytes(spec.dtype)));
  }
  const size_t residual_at = reserve(tokens * static_cast<size_t>(ld_residual_) * sizeof(float));
  const size_t sums_at = reserve(tokens * static_cast<size_t>(ld_sum_) * sizeof(float));
  const size_t cos_at = reserve(tokens * static_cast<size_t>(std::max(2, program_.rotary_dims)) * sizeof(float));
  const int64_t splits = (options_.max_positions + kSplitKeys - 1) / kSplitKeys;
  const int64_t split_rows = std::min<int64_t>(options_.max_tokens, static_cast<int64_t>(options_.max_sequences) * kSplitRows);
  partial_capacity_ = split_rows * splits * program_.num_heads * (program_.head_dim + 2);
  const size_t partials_at = reserve(static_cast<size_t>(partial_capacity_) * sizeof(float));
  const size_t scratch_bytes = AlignUp(std::max(kGemmScratchBytes, kAttentionScratchBytes), 4096);
  const size_t scratch_at = reserve(scratch_bytes * static_cast<size_t>(pool_.size()));
  if (Status s = MappedMemory::Allocate(nbytes, "activations and scratch", &activations_); !s.ok()) return s;
  std::byte* base = activations_.data();
  for (size_t i = 0; i < program_.buffers.size(); i++) {
    const BufferSpec& spec = program_.buffers[i];
    buffers_.push_back({base + buffer_at[i], spec.dtype, RowStride(spec.columns, spec.dtype)});
  }
  residual_ = reinterpret_cast<float*>(base + residual_at);
  sum_squares_ = reinterpret_cast<float*>(base + sums_at);
  cos_sin_ = reinterpret_cast<float*>(base + cos_at);
  partials_ = reinterpret_cast<float*>(base + partials_at);
  for (int t = 0; t < pool_.size(); t++) scratch_.push_back(base + scratch_at + scratch_bytes * static_cast<size_t>(t));

  for (const Line& line : program_.after) {
    if (line.op != Op::kLogits) continue;
    vocab_start_ = line.vocab_start;
    vocab_count_ = line.vocab_count;
  }
  seen_words_ = (vocab_count_ + 63) / 64;
  table_length_ = (options_.max_positions + kKvBlockTokens - 1) / kKvBlockTokens;
  const auto sequences = static_cast<size_t>(options_.max_sequences);
  block_offset_.assign(sequences * static_cast<size_t>(table_length_), -1);
  seen_.assign(sequences * static_cast<size_t>(seen_words_), 0);
  for (size_t s = 0; s < sequences; s++) frequencies_.insert(frequencies_.end(), options_.frequencies.begin(), options_.frequencies.end());
  local_ids_.resize(tokens);
  position_.resize(tokens);
  slot_of_.resize(tokens);
  kv_lane_.resize(tokens);
  kv_offset_.resize(tokens);
  stats_.weight_bytes = weights_->nbytes();
  stats_.kv_bytes = kv_.nbytes();
  stats_.scratch_bytes = activations_.nbytes();

  const size_t needed = SlotBytes(program_, options_, vocab_count_);
  if (program_.world_size > 0 && communicator_->slot_bytes() < needed) {
    return Status(Code::kInvalidArgument, "the group's slots hold " + std::to_string(communicator_->slot_bytes()) + " bytes, " +
                                              std::to_string(needed) + " are needed");
  }
  return Status::Ok();
}

// ---- jobs -----------------------------------------------------------------------------------------------------------------

void Runner::Post(Job job) {
  {
    std::lock_guard lock(jobs_mutex_);
    if (!closing_) {
      jobs_.push_back(std::move(job));
      jobs_posted_.Post();
      return;
    }
  }
  job.done(Status(Code::kClosed, "the runner is closed"), {});
}

void Runner::LeaderMain() {
  for (;;) {
    const uint32_t seen = jobs_posted_.value.load(std::memory_order_acquire);
    Job job;
    {
      std::lock_guard lock(jobs_mutex_);
      if (closing_) break;
      if (!jobs_.empty()) {
        job = std::move(jobs_.front());
        jobs_.pop_front();
        is_busy_ = true;
      }
    }
    if (job.run) {
      job.run();
      std::lock_guard lock(jobs_mutex_);
      is_busy_ = false;
    } else {
      jobs_posted_.Wait(seen, 0);  // the leader shares its core with JavaScript: it sleeps at once
    }
  }
  std::deque<Job> left;
  {
    std::lock_guard lock(jobs_mutex_);
    left.swap(jobs_);
  }
  for (Job& job : left) job.done(Status(Code::kClosed, "the runner was closed before this job began"), {});
}

void Runner::PostLoad(std::vector<LoadPart> parts, Done done) {
  Post({[this, parts = std::move(parts), done] {
          const auto check = [this] { return communicator_->failed() ? communicator_->failure() : Status::Ok(); };
          done(weights_->Load(parts, kernels_, pool_, check), {});
        },
        done});
}

void Runner::PostStep(std::vector<int32_t> words, Done done) {
  is_interrupted_.store(false, std::memory_order_relaxed);
  Post({[this, words = std::move(words), done] {
          const auto start = Clock::now();
          StepResult result;
          Status status = Broadcast(words);
          bool is_shutdown = false;
          if (status.ok()) status = RunMessage(words.data(), words.size(), &result, nullptr, &is_shutdown);
          result.elapsed_us = MicrosSince(start);
          done(std::move(status), std::move(result));
        },
        done});
}

void Runner::PostServe(OnBytes on_bytes, Done done) {
  Post({[this, on_bytes = std::move(on_bytes), done]() mutable {
          std::vector<int32_t> words;
          bool is_shutdown = false;
          Status status;
          while (status.ok() && !is_shutdown) {
            status = Receive(&words);
            StepResult ignored;
            if (status.ok()) status = RunMessage(words.data(), words.size(), &ignored, &on_bytes, &is_shutdown);
          }
          done(std::move(status), {});
        },
        done});
}

Status Runner::RunMessage(const int32_t* words, size_t count, StepResult* result, OnBytes* on_bytes, bool* is_shutdown) {
  const StepLimits limits = {options_.max_tokens,    options_.max_logit_rows, options_.max_sequences, options_.max_positions,
                             options_.num_blocks,    program_.vocab_size,     program_.rotary_dims};
  if (count >= 2 && words[0] == kStepMagic && words[1] == static_cast<int32_t>(MessageKind::kShutdown)) {
    *is_shutdown = true;
    return Status::Ok();
  }
  if (count >= 2 && words[0] == kStepMagic && words[1] == static_cast<int32_t>(MessageKind::kBytes)) {
    if (on_bytes != nullptr) (*on_bytes)(std::vector<int32_t>(words + 2, words + count));
    return Status::Ok();
  }
  if (Status s = DecodeStep(words, count, limits, &step_); !s.ok()) return s;
  step_start_ms_ = NowMs();
  do {
    if (Status s = ApplyStep(); !s.ok()) return s;
    if (Status s = RunStep(result); !s.ok()) return s;
    result->end_ms.push_back(NowMs());
  } while (FeedBack(result));
  return Status::Ok();
}

// Makes the next step of one that decodes ahead; false when it ends here. Every rank comes to the same answer: candidates are the
// same everywhere, and whether to go on was rank 0's word.
bool Runner::FeedBack(StepResult* result) {
  if (step_.ahead == 0 || !goes_on_ || !undecided_.empty()) return false;
  for (const RowResult& row : result->rows) {
    // What is no number is JavaScript's to refuse.
    if (row.ids.empty() || !std::isfinite(row.max)) return false;
    if (std::find(step_.stop_ids.begin(), step_.stop_ids.end(), row.ids[0]) != step_.stop_ids.end()) return false;
  }
  step_.ahead--;
  step_.deltas.clear();
  for (size_t i = 0; i < step_.runs.size(); i++) {
    const int32_t id = result->rows[i].ids[0];
    result->ahead.push_back(id);
    step_.ids[i] = id;
    step_.runs[i].position0++;
    step_.runs[i].is_new = false;
  }
  return true;
}

// A message is the first phase of a step: rank 0 writes it to its slot and publishes; nobody else publishes this generation, so
// receivers mark it consumed, and whoever writes the next one but one looks (Communicator::Acquire).
Status Runner::Broadcast(const std::vector<int32_t>& words) {
  if (program_.world_size == 1) return Status::Ok();
  const size_t nbytes = words.size() * sizeof(int32_t);
  if (nbytes > communicator_->slot_bytes()) {
    return Status(Code::kInvalidArgument, "a message of " + std::to_string(nbytes) + " bytes does not fit a slot of " +
                                              std::to_string(communicator_->slot_bytes()));
  }
  if (Status s = communicator_->Acquire(kLane, sequence_ + 1, Deadline::AfterMs(options_.timeout_ms)); !s.ok()) return s;
  sequence_++;
  std::memcpy(SlotOf(0, sequence_), words.data(), nbytes);
  communicator_->Publish(kLane, sequence_, MessageTag(words.size()));
  communicator_->Consumed(kLane, sequence_);
  communicator_->Complete(kLane, sequence_);
  return Status::Ok();
}

Status Runner::Receive(std::vector<int32_t>* words) {
  sequence_++;
  OpTag tag;
  // The idle wait between steps has no deadline; a lost peer or an abort ends it.
  if (Status s = communicator_->AwaitFrom(kLane, sequence_, 0, &tag, Deadline::Idle()); !s.ok()) return s;
  if (tag.op != CollectiveOp::kBroadcast || tag.count > communicator_->slot_bytes() / sizeof(int32_t)) {
    return Status(Code::kMismatch, "rank 0 sent " + tag.Describe() + " where a step message was expected");
  }
  const auto* from = reinterpret_cast<const int32_t*>(SlotOf(0, sequence_));
  words->assign(from, from + tag.count);
  communicator_->Consumed(kLane, sequence_);
  return Status::Ok();
}

// ---- one step -------------------------------------------------------------------------------------------------------------

uint64_t* Runner::SeenOf(int32_t slot) { return seen_.data() + static_cast<size_t>(slot) * static_cast<size_t>(seen_words_); }

int32_t Runner::RowsOf(const BufferSpec& spec) const {
  return spec.is_logit_rows ? static_cast<int32_t>(step_.rows.size()) : step_.tokens;
}

Status Runner::ApplyStep() {
  const auto hash = [this](int64_t value) { input_hash_ = (input_hash_ ^ static_cast<uint64_t>(value)) * 0x100000001b3u; };
  for (const Run& run : step_.runs) {
    hash(run.slot);
    hash(run.position0);
  }
  for (const int32_t id : step_.ids) hash(id);
  for (const BlockDelta& delta : step_.deltas) {
    block_offset_[static_cast<size_t>(delta.slot) * static_cast<size_t>(table_length_) + static_cast<size_t>(delta.index)] =
        static_cast<int64_t>(delta.block) * static_cast<int64_t>(kv_block_bytes_) * program_.num_kv_heads;
  }
  const size_t half = static_cast<size_t>(program_.rotary_dims / 2);
  for (const Run& run : step_.runs) {
    if (!run.is_new) continue;
    std::fill_n(SeenOf(run.slot), seen_words_, 0);
    std::copy(options_.frequencies.begin(), options_.frequencies.end(), frequencies_.begin() + static_cast<size_t>(run.slot) * half);
  }
  for (const FrequencySet& set : step_.frequency_sets) {
    std::copy(set.frequencies.begin(), set.frequencies.end(), frequencies_.begin() + static_cast<size_t>(set.slot) * half);
  }
  for (const Run& run : step_.runs) {
    const int64_t* table = block_offset_.data() + static_cast<size_t>(run.slot) * static_cast<size_t>(table_length_);
    // Every block up to the last position must be there: attention walks all of them.
    for (int32_t b = 0; b <= (run.position0 + run.tokens - 1) / kKvBlockTokens; b++) {
      if (table[b] < 0) return Status(Code::kInternal, "a sequence has no KV block for positions it uses");
    }
    for (int32_t i = 0; i < run.tokens; i++) {
      const auto row = static_cast<size_t>(run.token0 + i);
      const int32_t position = run.position0 + i;
      position_[row] = position;
      slot_of_[row] = run.slot;
      kv_lane_[row] = position % kKvBlockTokens;
      kv_offset_[row] = table[position / kKvBlockTokens];
      const int32_t local = step_.ids[row] - vocab_start_;
      local_ids_[row] = local;
      if (local >= 0 && local < vocab_count_) SeenOf(run.slot)[local / 64] |= uint64_t{1} << (local % 64);
    }
  }
  items_groups_ = nullptr;
  const int64_t slot_row_bytes = ld_slot_ * ElementBytes(program_.dtype);
  is_row_sharded_ = program_.world_size > 1 && step_.tokens >= 4 * program_.world_size && step_.tokens * slot_row_bytes >= kRowShardBytes;
  return Status::Ok();
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

Status Runner::RunStep(StepResult* result) {
  failure_ = Status();
  undecided_.clear();
  next_item_[0].store(0, std::memory_order_relaxed);
  next_item_[1].store(0, std::memory_order_relaxed);
  for (const Line& line : program_.layer) {
    if (line.op != Op::kAttention) continue;
    items_groups_ = &line.groups;
    BuildAttentionItems();
    if (!merges_.empty() && merges_.back().partial + merges_.back().splits * merges_.back().split_stride > partial_capacity_) {
      return Status(Code::kInternal, "attention partials exceed their buffer");
    }
    break;
  }
  const uint64_t sequence = sequence_;
  uint64_t last = sequence;
  const uint32_t step = ++step_number_;
  // The first line writes the slot whose parity the end of the last step used: a peer may still be reading there.
  if (program_.world_size > 1) {
    if (Status s = communicator_->Acquire(kLane, sequence + 1, Deadline::AfterMs(options_.timeout_ms)); !s.ok()) return s;
  }
  const bool is_profiled = options_.profile;
  pool_.Run([&](int thread) {
    Thread state{thread, sequence, Phase::kRest, 0, 0, 0, 0};
    Status status;
    std::array<double, static_cast<size_t>(Phase::kCount)> phase_us{};
    unsigned parity = 0;
    // One look at the clock a line: the end of one is the start of the next.
    const bool is_timed = thread == 0 || is_profiled;
    auto start = is_timed ? Clock::now() : Clock::time_point();
    const auto run = [&](const std::vector<Line>& lines, int32_t layer) {
      if (thread == 0) communicator_->Mark(step, &lines == &program_.layer ? layer : -1);
      for (const Line& line : lines) {
        if (!status.ok()) return;
        state.collective_us = state.wait_us = 0;
        status = RunLine(line, layer, state, result);
        if (is_profiled) kernel_times_[static_cast<size_t>(thread)].us[parity] = MicrosSince(start) - state.wait_us;
        if (status.ok() && !pool_.Barrier(thread)) status = Status(Code::kAborted, "another thread of this rank failed");
        if (is_timed) {
          const auto end = Clock::now();
          const double us = std::chrono::duration<double, std::micro>(end - start).count();
          start = end;
          if (thread == 0) {
            phase_us[static_cast<size_t>(Phase::kCollective)] += state.collective_us;
            phase_us[static_cast<size_t>(state.phase_of_line)] += us - state.collective_us;
            if (is_profiled) {
              double longest = 0;
              for (const KernelTime& time : kernel_times_) longest = std::max(longest, time.us[parity]);
              state.own_us += longest;
            }
          }
        }
        parity ^= 1;
      }
    };
    run(program_.before, 0);
    for (int32_t layer = 0; layer < program_.num_layers; layer++) run(program_.layer, layer);
    run(program_.after, 0);
    if (!status.ok()) {
      {
        std::lock_guard lock(failure_mutex_);
        if (failure_.ok() || (failure_.code() == Code::kAborted && status.code() != Code::kAborted)) failure_ = std::move(status);
      }
      pool_.Stop();
      return;
    }
    if (thread == 0) {
      // Behind the barrier of the last line: no thread of this rank reads a peer's slot any more.
      if (program_.world_size > 1) communicator_->Consumed(kLane, state.sequence);
      last = state.sequence;
      std::lock_guard lock(stats_mutex_);
      for (size_t i = 0; i < phase_us.size(); i++) stats_.phase_us[i] += phase_us[i];
      stats_.kernel_us += state.kernel_us + state.own_us;
      stats_.steps++;
      stats_.state_hash = state_hash_;
      stats_.collectives += static_cast<int64_t>(state.sequence - sequence);
      stats_.whole_rows += static_cast<int64_t>(undecided_.size());
    }
  });
  if (!failure_.ok()) return std::move(failure_);
  sequence_ = last;
  result->whole_rows = static_cast<int64_t>(undecided_.size());
  return Status::Ok();
}

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

Status Runner::Exchange(Thread& thread, CollectiveOp op, uint64_t count, FlagPayload payload) {
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
    communicator_->Publish(kLane, thread.sequence, tag, payload);
    Status status = communicator_->Await(kLane, thread.sequence, tag, Deadline::AfterMs(options_.timeout_ms));
    const double us = MicrosSince(start);
    thread.collective_us += us;
    thread.wait_us += us;
    if (!status.ok()) return status;
    if (options_.profile) {
      double longest = 0;
      for (int r = 0; r < program_.world_size; r++) {
        longest = std::max(longest, std::bit_cast<double>(communicator_->PayloadOf(r, kLane, thread.sequence).words[kKernelTimeWord]));
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
  if (Status s = Exchange(thread, CollectiveOp::kAllReduce, static_cast<uint64_t>(step_.tokens) * static_cast<uint64_t>(columns)); !s.ok()) {
    return s;
  }
  const Buffer& y = buffers_[static_cast<size_t>(line.y)];
  const int64_t element = ElementBytes(program_.dtype);
  std::vector<const void*> slots(static_cast<size_t>(world));

  ReduceResidualArgs reduce{};
  reduce.slots = slots.data();
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
  const auto set_rows = [&](int32_t row, int32_t rows) {
    for (int r = 0; r < world; r++) slots[static_cast<size_t>(r)] = SlotOf(r, thread.sequence) + row * ld_slot_ * element;
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
    if (Status s = Exchange(thread, CollectiveOp::kAllGather, static_cast<uint64_t>(step_.tokens) * static_cast<uint64_t>(columns)); !s.ok()) {
      return s;
    }
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
  args.kv_head_stride = static_cast<int64_t>(kv_block_bytes_);
  kernels_.rope_kv_write(args);
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
    args.kv_base = base + static_cast<size_t>(group.kv_head) * kv_block_bytes_;
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

// ---- logits ---------------------------------------------------------------------------------------------------------------

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
  if (Status s = Exchange(thread, CollectiveOp::kAllGather, static_cast<uint64_t>(program_.vocab_size)); !s.ok()) return s;
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
    const FlagPayload theirs = communicator_->PayloadOf(peer, kLane, sequence);
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
  if (record_bytes * static_cast<size_t>(num_rows) > communicator_->slot_bytes()) {
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
  const bool wants_on = is_collector && !is_interrupted_.load(std::memory_order_relaxed) && NowMs() - step_start_ms_ < kAheadMs;
  FlagPayload payload;
  payload.words[0] = wants_on ? 1 : 0;
  payload.words[1] = input_hash_;
  payload.words[2] = state_hash_;
  if (Status s = Exchange(thread, CollectiveOp::kAllGather, static_cast<uint64_t>(num_rows) * record_bytes, payload); !s.ok()) return s;
  if (is_collector) {
    if (Status s = CheckHashes(thread.sequence); !s.ok()) return s;
    goes_on_ = program_.rank == 0 ? wants_on : communicator_->PayloadOf(0, kLane, thread.sequence).words[0] != 0;
    undecided_.clear();
    std::vector<const RowRecord*> records(static_cast<size_t>(program_.world_size));
    for (int32_t i = 0; i < num_rows; i++) {
      for (int r = 0; r < program_.world_size; r++) {
        records[static_cast<size_t>(r)] =
            reinterpret_cast<const RowRecord*>(SlotOf(r, thread.sequence) + static_cast<size_t>(i) * record_bytes);
      }
      const LogitRow& row = step_.rows[static_cast<size_t>(i)];
      const bool is_decided = MergeRecords(records.data(), program_.world_size, row, &result->rows[static_cast<size_t>(i)]);
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

RunnerStats Runner::stats() const {
  std::lock_guard lock(stats_mutex_);
  return stats_;
}

}  // namespace tilerank
