#include "runner/runner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "runner/clock.h"

namespace tilerank {

namespace {

// From this many bytes of partial sums each rank reduces and normalises only its share of the rows and the others copy the result:
// two exchanges in place of one, but 1/N of the additions. Measured at 2 ranks on one L3.
constexpr int64_t kRowShardBytes = 256 << 10;

// What is decoded ahead is handed to JavaScript at most this often: its code costs a token 0.3 ms where it shares a core with the
// leader and has left the caches.
constexpr double kHandOutMs = 10;

size_t AlignUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Row stride in elements: whole 32-element steps, and not a multiple of a page, so that rows do not fall on the same cache sets.
int64_t RowStride(int32_t columns, DType dtype) {
  int64_t ld = (static_cast<int64_t>(columns) + 31) / 32 * 32;
  if (ld * ElementBytes(dtype) % 4096 == 0) ld += 32;
  return ld;
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
                      std::unique_ptr<Runner>* out, std::unique_ptr<NodeExchange> nodes) {
  const bool is_here = communicator != nullptr && nodes == nullptr;
  const int world_size = is_here ? communicator->world_size() : nodes != nullptr ? nodes->layout().world_size() : 0;
  const int rank = is_here ? communicator->rank() : nodes != nullptr ? nodes->layout().rank : 0;
  if (communicator == nullptr || world_size != program.world_size || rank != program.rank) {
    return Status(Code::kInvalidArgument, "the program was made for another rank or number of ranks than the group has");
  }
  std::unique_ptr<Runner> runner(new Runner(std::move(program), std::move(options), kernels, std::move(communicator), std::move(nodes)));
  if (Status s = runner->Allocate(); !s.ok()) return s;
  runner->pool_.StartLeader([r = runner.get()] { r->LeaderMain(); });
  *out = std::move(runner);
  return Status::Ok();
}

Runner::Runner(Program program, RunnerOptions options, const Kernels& kernels, std::shared_ptr<Communicator> communicator,
               std::unique_ptr<NodeExchange> nodes)
    : program_(std::move(program)),
      options_(std::move(options)),
      kernels_(kernels),
      communicator_(std::move(communicator)),
      nodes_(std::move(nodes)),
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
  kv_head_bytes_ = kv_block_bytes_ * static_cast<size_t>(options_.num_blocks);
  kv_layer_bytes_ = kv_head_bytes_ * static_cast<size_t>(program_.num_kv_heads);
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
  const bool has_room = nodes_ == nullptr || communicator_->slot_bytes() >= NodeExchange::SlotBytes(nodes_->layout(), slot_bytes());
  if (program_.world_size > 0 && (slot_bytes() < needed || !has_room)) {
    return Status(Code::kInvalidArgument, "the group's slots hold " + std::to_string(communicator_->slot_bytes()) + " bytes, " +
                                              std::to_string(needed) + " are needed for each rank whose data they keep");
  }
  if (nodes_ != nullptr) row_shares_.resize(static_cast<size_t>(program_.world_size));
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

void Runner::PostStep(std::vector<int32_t> words, OnAhead on_ahead, Done done) {
  is_interrupted_.store(false, std::memory_order_relaxed);
  Post({[this, words = std::move(words), listeners = Listeners{std::move(on_ahead), {}}, done] {
          const auto start = Clock::now();
          StepResult result;
          Status status = Broadcast(words);
          bool is_shutdown = false;
          if (status.ok()) status = RunMessage(words, listeners, &result, &is_shutdown);
          result.elapsed_us = MicrosSince(start);
          done(std::move(status), std::move(result));
        },
        done});
}

void Runner::PostServe(OnBytes on_bytes, Done done) {
  Post({[this, listeners = Listeners{{}, std::move(on_bytes)}, done] {
          std::vector<int32_t> words;
          bool is_shutdown = false;
          Status status;
          while (status.ok() && !is_shutdown) {
            status = Receive(&words);
            StepResult ignored;
            if (status.ok()) status = RunMessage(words, listeners, &ignored, &is_shutdown);
          }
          done(std::move(status), {});
        },
        done});
}

Status Runner::RunMessage(const std::vector<int32_t>& words, const Listeners& listeners, StepResult* result, bool* is_shutdown) {
  const StepLimits limits = {options_.max_tokens,    options_.max_logit_rows, options_.max_sequences, options_.max_positions,
                             options_.num_blocks,    program_.vocab_size,     program_.rotary_dims};
  const auto is_kind = [&words](MessageKind kind) { return words.size() >= 2 && words[0] == kStepMagic && words[1] == static_cast<int32_t>(kind); };
  if (is_kind(MessageKind::kShutdown)) {
    *is_shutdown = true;
    return Status::Ok();
  }
  if (is_kind(MessageKind::kBytes)) {
    if (listeners.on_bytes) listeners.on_bytes(std::vector<int32_t>(words.begin() + 2, words.end()));
    return Status::Ok();
  }
  if (Status s = DecodeStep(words.data(), words.size(), limits, &step_); !s.ok()) return s;
  double handed_ms = NowMs();
  for (;;) {
    if (Status s = ApplyStep(); !s.ok()) return s;
    if (Status s = RunStep(result); !s.ok()) return s;
    result->end_ms = NowMs();
    if (!FeedBack(result)) return Status::Ok();
    if (result->end_ms - handed_ms < kHandOutMs) continue;
    handed_ms = result->end_ms;
    AheadTokens tokens = std::exchange(result->ahead, {});
    if (listeners.on_ahead) listeners.on_ahead(std::move(tokens));
  }
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
  result->ahead.end_ms.push_back(result->end_ms);
  for (size_t i = 0; i < step_.runs.size(); i++) {
    const int32_t id = result->rows[i].ids[0];
    result->ahead.ids.push_back(id);
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
  if (nbytes > slot_bytes()) {
    return Status(Code::kInvalidArgument, "a message of " + std::to_string(nbytes) + " bytes does not fit a slot of " +
                                              std::to_string(slot_bytes()));
  }
  // A step that failed left sequence_ behind what it had published: this message would land in a slot that peers may still read, and
  // tell them of ranks that disagree in place of why the group broke.
  if (communicator_->failed()) return communicator_->failure();
  if (Status s = communicator_->Acquire(kLane, sequence_ + 1, Deadline::AfterMs(options_.timeout_ms)); !s.ok()) return s;
  sequence_++;
  std::memcpy(SlotOf(0, sequence_), words.data(), nbytes);
  if (nodes_ != nullptr) {
    if (Status s = nodes_->Tell(sequence_, MessageTag(0), {0, nbytes}, Deadline::AfterMs(options_.timeout_ms)); !s.ok()) return s;
  }
  communicator_->Publish(kLane, sequence_, MessageTag(words.size()));
  communicator_->Consumed(kLane, sequence_);
  communicator_->Complete(kLane, sequence_);
  return Status::Ok();
}

Status Runner::Receive(std::vector<int32_t>* words) {
  if (nodes_ != nullptr && nodes_->is_relay()) return Relay(words);
  const int teller = nodes_ == nullptr ? 0 : nodes_->leader_local();
  sequence_++;
  OpTag tag;
  // The idle wait between steps has no deadline; a lost peer or an abort ends it.
  if (Status s = communicator_->AwaitFrom(kLane, sequence_, teller, &tag, Deadline::Idle()); !s.ok()) return s;
  if (tag.op != CollectiveOp::kBroadcast || tag.count > slot_bytes() / sizeof(int32_t)) {
    return Status(Code::kMismatch, "rank 0 sent " + tag.Describe() + " where a step message was expected");
  }
  const auto* from = reinterpret_cast<const int32_t*>(SlotOf(0, sequence_));
  words->assign(from, from + tag.count);
  communicator_->Consumed(kLane, sequence_);
  return Status::Ok();
}

// Of a message from another node, in rank 0's place.
Status Runner::Relay(std::vector<int32_t>* words) {
  if (Status s = nodes_->AwaitTold(); !s.ok()) return s;
  const Deadline deadline = Deadline::AfterMs(options_.timeout_ms);
  if (Status s = communicator_->Acquire(kLane, sequence_ + 1, deadline); !s.ok()) return s;
  sequence_++;
  size_t nbytes = 0;
  if (Status s = nodes_->Hear(sequence_, MessageTag(0), &nbytes, deadline); !s.ok()) return s;
  const size_t count = nbytes / sizeof(int32_t);
  const auto* from = reinterpret_cast<const int32_t*>(SlotOf(0, sequence_));
  communicator_->Publish(kLane, sequence_, MessageTag(count));
  words->assign(from, from + count);
  communicator_->Consumed(kLane, sequence_);
  communicator_->Complete(kLane, sequence_);
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
        static_cast<int64_t>(delta.block) * static_cast<int64_t>(kv_block_bytes_);
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

RunnerStats Runner::stats() const {
  std::lock_guard lock(stats_mutex_);
  return stats_;
}

}  // namespace tilerank
