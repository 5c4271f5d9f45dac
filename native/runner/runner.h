// Runs the Program of one rank: a whole step - every layer, every collective, the exchange of logits - in one job of the rank's
// pinned threads, so that JavaScript is crossed once a step. The only place where kernels and collectives meet.
//
// Jobs are taken by the leader thread in the order in which they were posted. Rank 0 posts steps, which it broadcasts through
// its slot; the other ranks post one Serve job, which waits for rank 0's messages until the shutdown message.
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "runner/memory.h"
#include "runner/node_exchange.h"
#include "runner/pool.h"
#include "runner/program.h"
#include "runner/sampling.h"
#include "runner/step.h"
#include "runner/weights.h"
#include "status.h"

namespace tilerank {

struct RunnerOptions {
  std::vector<int> cores;                  // one thread each
  int spin_us;                             // of team threads at a barrier and between jobs
  int64_t timeout_ms;                      // of one collective
  int32_t max_tokens, max_logit_rows;      // of one step
  int32_t max_sequences, max_positions;    // sequence slots, and positions of each
  int32_t num_blocks;                      // KV blocks, of 32 tokens each, in each layer
  std::vector<double> frequencies;         // [rotary_dims / 2] radians a position
  bool profile = false;                    // RunnerStats::kernel_us, at the price of two clock reads a line and thread; of all ranks
};

/// What steps before the last one chose, where a step decodes ahead.
struct AheadTokens {
  std::vector<int32_t> ids;    // [steps, rows]
  std::vector<double> end_ms;  // of each step, on the monotonic clock
};

struct StepResult {
  std::vector<RowResult> rows;  // of the last step
  AheadTokens ahead;            // as far as OnAhead did not have them
  double end_ms = 0;            // of the last step, on the monotonic clock
  int64_t whole_rows = 0;  // rows that candidates did not decide
  double elapsed_us = 0;
};

struct RunnerStats {
  std::array<double, static_cast<size_t>(Phase::kCount)> phase_us{};  // of thread 0, since creation
  // With `profile`, waits left out: the longest kernel time of a thread in each line, added up between two exchanges, of that the longest
  // of all ranks, added up since creation. What a step takes beyond it is overhead.
  double kernel_us = 0;
  int64_t steps = 0, collectives = 0, whole_rows = 0;
  uint64_t state_hash = 0;  // of every row that went into the head, in order: equal on all ranks, or they have parted
  size_t weight_bytes = 0, kv_bytes = 0, scratch_bytes = 0;
};

class Runner {
 public:
  /// Bytes that one slot of the communicator must have for this program and these limits.
  static size_t SlotBytes(const Program& program, const RunnerOptions& options, int32_t max_vocab_count);

  /// `nodes`: where the communicator's ranks are not all of the program's, null where they are.
  static Status Create(Program program, RunnerOptions options, const Kernels& kernels, std::shared_ptr<Communicator> communicator,
                       std::unique_ptr<Runner>* runner, std::unique_ptr<NodeExchange> nodes = nullptr);
  /// Waits for the running job; pending ones are answered with kClosed.
  ~Runner();

  using Done = std::function<void(Status, StepResult)>;
  using OnBytes = std::function<void(std::vector<int32_t>)>;
  using OnAhead = std::function<void(AheadTokens)>;
  void PostLoad(std::vector<LoadPart> parts, Done done);
  /// Rank 0: broadcasts the message and runs it. `words` as step.h lays out. What it decodes ahead is handed to on_ahead on the leader
  /// thread as it comes, the rest to done.
  void PostStep(std::vector<int32_t> words, OnAhead on_ahead, Done done);
  /// Rank 0: a step that decodes ahead ends with the token it is at. Called on the thread that posts.
  void Interrupt() { is_interrupted_.store(true, std::memory_order_relaxed); }
  /// Other ranks: obeys rank 0 until its shutdown message. kBytes messages are handed to on_bytes on the leader thread.
  void PostServe(OnBytes on_bytes, Done done);

  uint64_t loaded_bytes() const { return weights_->loaded_bytes(); }
  RunnerStats stats() const;
  std::string pin_warning() const { return pool_.pin_warning(); }

 private:
  // The runner's threads speak through one lane: a step has a barrier before every exchange anyway, and ranks may have unequal
  // numbers of threads.
  static constexpr int kLane = 0;
  static constexpr size_t kCacheLine = 64;
  // Runs of at most this many tokens split their keys, so that one long sequence can use all threads. The rule looks at the sequence
  // alone, never at the number of threads or its neighbours: the same sums on any machine.
  static constexpr int32_t kSplitRows = 4;
  static constexpr int32_t kSplitKeys = 512;

  struct Job {
    std::function<void()> run;
    Done done;
  };
  struct Buffer {
    std::byte* data;
    DType dtype;
    int64_t ld;  // elements
  };
  // One call of the attention kernel (or one of its key ranges): see BuildAttentionItems.
  struct AttentionItem {
    int32_t run, group, row0, rows, key0, key1;
    int64_t partial;  // offset in partials_, or -1
  };
  struct MergeItem {
    int32_t run, group, splits;
    int64_t partial, split_stride;
  };
  // State of one thread within a step. The sequence is the same on all threads of all ranks.
  struct Thread {
    int index;
    uint64_t sequence;
    Phase phase_of_line;
    double collective_us;  // in exchanges, of thread 0
    double wait_us;        // in exchanges and barriers inside the line; with `profile` only
    // With `profile`, of thread 0: this rank's kernel time since the last exchange, and RunnerStats::kernel_us of this step so far.
    double own_us, kernel_us;
  };

  Runner(Program program, RunnerOptions options, const Kernels& kernels, std::shared_ptr<Communicator> communicator,
         std::unique_ptr<NodeExchange> nodes);
  Status Allocate();
  void Post(Job job);
  void LeaderMain();

  struct Listeners {
    OnAhead on_ahead;  // either may be empty
    OnBytes on_bytes;
  };
  Status RunMessage(const std::vector<int32_t>& words, const Listeners& listeners, StepResult* result, bool* is_shutdown);
  Status Broadcast(const std::vector<int32_t>& words);
  Status Receive(std::vector<int32_t>* words);
  Status Relay(std::vector<int32_t>* words);
  Status ApplyStep();
  void BuildAttentionItems();
  Status RunStep(StepResult* result);
  bool FeedBack(StepResult* result);

  Status RunLine(const Line& line, int32_t layer, Thread& thread, StepResult* result);
  void Embed(const Line& line, Thread& thread);
  void Linear(const Line& line, int32_t layer, Thread& thread);
  Status AllReduceResidualNorm(const Line& line, int32_t layer, Thread& thread);
  void RopeKvWrite(const Line& line, int32_t layer, Thread& thread);
  Status Attention(const Line& line, int32_t layer, Thread& thread);
  void SelectRows(const Line& line, Thread& thread);
  Status Logits(const Line& line, Thread& thread, StepResult* result);
  Status CheckHashes(uint64_t sequence);
  Status GatherRow(const Line& line, int32_t row, Thread& thread, std::vector<float>* values);

  // One all-to-all point: publishes this thread's next sequence, with a payload for all, and waits for every peer's. `shown`: what of this rank's
  // slot the others read, or what each of them does; it counts where they are on other nodes.
  Status Exchange(Thread& thread, CollectiveOp op, uint64_t count, std::span<const SlotRange> shown, FlagPayload payload = {});
  // Inside a line. False when another thread has failed.
  bool Barrier(Thread& thread);
  std::byte* SlotOf(int rank, uint64_t sequence) const {
    return nodes_ == nullptr ? communicator_->Slot(rank, sequence) : nodes_->Slot(rank, sequence);
  }
  FlagPayload PayloadOf(int rank, uint64_t sequence) const {
    return nodes_ == nullptr ? communicator_->PayloadOf(rank, kLane, sequence) : nodes_->PayloadOf(rank, kLane, sequence);
  }
  // Of one rank.
  size_t slot_bytes() const { return nodes_ == nullptr ? communicator_->slot_bytes() : nodes_->slot_bytes(); }
  int32_t RowsOf(const BufferSpec& spec) const;
  uint64_t* SeenOf(int32_t slot);

  const Program program_;
  const RunnerOptions options_;
  const Kernels& kernels_;
  const std::shared_ptr<Communicator> communicator_;
  const std::unique_ptr<NodeExchange> nodes_;
  Pool pool_;
  std::unique_ptr<Weights> weights_;
  MappedMemory kv_, activations_;
  std::vector<Buffer> buffers_;
  float* residual_ = nullptr;       // [max_tokens, ld_residual_]
  float* sum_squares_ = nullptr;    // [max_tokens, ld_sum_]
  float* cos_sin_ = nullptr;        // [max_tokens, rotary_dims]
  float* partials_ = nullptr;
  int64_t partial_capacity_ = 0;    // floats
  std::vector<std::byte*> scratch_;  // one a thread
  int64_t ld_residual_ = 0, ld_sum_ = 0, ld_slot_ = 0;
  // kv_ is [layer][KV head][block]: what one item of attention reads is one run where a sequence's blocks are neighbours.
  size_t kv_block_bytes_ = 0, kv_head_bytes_ = 0, kv_layer_bytes_ = 0;
  int32_t table_length_ = 0;

  // Sequence slots.
  std::vector<int64_t> block_offset_;     // [max_sequences, table_length]; -1: no block
  std::vector<double> frequencies_;       // [max_sequences, rotary_dims / 2]
  std::vector<uint64_t> seen_;            // [max_sequences, seen_words_]: ids of this rank's vocabulary slice
  int32_t seen_words_ = 0, vocab_start_ = 0, vocab_count_ = 0;

  // The step that runs.
  StepMessage step_;
  uint32_t step_number_ = 0;              // steps so far
  uint64_t sequence_ = 0;                 // of the last finished all-to-all or broadcast
  std::vector<int32_t> local_ids_, position_, slot_of_, kv_lane_;
  std::vector<int64_t> kv_offset_;
  std::vector<AttentionItem> items_;
  std::vector<MergeItem> merges_;
  const std::vector<HeadGroup>* items_groups_ = nullptr;
  std::array<std::atomic<int32_t>, 2> next_item_{};
  std::vector<int32_t> undecided_;
  std::atomic<bool> is_interrupted_{false};
  bool goes_on_ = false;                  // rank 0's word on decoding ahead, as it came with the candidates
  bool is_row_sharded_ = false;           // two-shot in this step: each rank reduces a share of the rows
  std::vector<SlotRange> row_shares_;     // then, of each rank
  std::mutex failure_mutex_;
  Status failure_;

  // With `profile`: kernel time of each thread in the current line, a cache line apart. Two of them by parity, as a thread may be in
  // the next line while thread 0 still reads.
  struct alignas(64) KernelTime {
    std::array<double, 2> us;
  };
  std::vector<KernelTime> kernel_times_;

  // Written by thread 0 of a step, read by stats().
  mutable std::mutex stats_mutex_;
  RunnerStats stats_;
  uint64_t state_hash_ = 0xcbf29ce484222325u;
  uint64_t input_hash_ = 0xcbf29ce484222325u;  // FNV-1a over all tokens and their places

  std::mutex jobs_mutex_;
  std::deque<Job> jobs_;
  bool closing_ = false, is_busy_ = false;
  WaitWord jobs_posted_;
};

}  // namespace tilerank
