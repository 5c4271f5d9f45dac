// The runner and its pool, with the ranks of a small model as threads of one process, so that the thread sanitizer sees every thread
// of every rank, and the address sanitizer all that a step touches. One thread stands for the JavaScript of all ranks: it loads made-up
// weights, posts steps of every shape that the runner treats differently, and looks at statistics meanwhile. Ranks must end with the
// same hash, any number of threads must give the same bits, and whoever aborts or closes in the middle ends everybody's work.
// Built and run by native.test.ts: test_runner [ROUNDS]
#include <sched.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "kernels/dispatch.h"
#include "runner/runner.h"

using namespace tilerank;

namespace {

constexpr int kWorldSize = 2;
// Of a rank: two query heads on one KV head, a width that ends within a panel, and two blocks of sums of squares, so that two
// threads share the columns of a single token.
constexpr int kLayers = 2, kHidden = 288, kHeads = 2, kHeadDim = 16, kInner = 27, kVocab = 80;
constexpr int kInnerPadded = (kInner + kPanel - 1) / kPanel * kPanel;

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::_Exit(1);
}
void Require(bool holds, const std::string& what) {
  if (!holds) Die(what);
}
void Require(const Status& status, const std::string& what) {
  if (!status.ok()) Die(what + ": " + status.message());
}

enum Weight : int32_t { kEmbed, kInputNorm, kQkv, kO, kOBias, kPostNorm, kGateUp, kDown, kHead };
enum Buffer : int32_t { kX, kQkvRows, kAttn, kMlp, kHeadInput, kLogits };

// What tp/program.ts makes of a Llama layer with biases in attention.
Program MakeProgram(int rank, DType dtype) {
  Program p{};
  p.rank = rank;
  p.world_size = kWorldSize;
  p.dtype = dtype;
  p.num_layers = kLayers;
  p.hidden_size = kHidden;
  p.vocab_size = kVocab * kWorldSize;
  p.norm_eps = 1e-5f;
  p.num_heads = kHeads;
  p.num_kv_heads = 1;
  p.head_dim = p.rotary_dims = kHeadDim;
  p.buffers = {{"x", dtype, false, kHidden},       {"qkv", dtype, false, (kHeads + 2) * kHeadDim}, {"attn", dtype, false, kHeads * kHeadDim},
               {"mlp", dtype, false, kInner}, {"headInput", dtype, true, kHidden},            {"logits", DType::kF32, true, kVocab}};
  p.weights = {{"embed", true, false, dtype, kVocab, kHidden, 1},
               {"inputNorm", false, false, DType::kF32, kHidden, 1, kLayers + 1},
               {"qkv", true, true, dtype, (kHeads + 2) * kHeadDim, kHidden, kLayers},
               {"o", true, false, dtype, kHidden, kHeads * kHeadDim, kLayers},
               {"oBias", false, false, DType::kF32, kHidden, 1, kLayers},
               {"postNorm", false, false, DType::kF32, kHidden, 1, kLayers},
               {"gateUp", true, false, dtype, 2 * kInnerPadded, kHidden, kLayers},
               {"down", true, false, dtype, kHidden, kInner, kLayers},
               {"head", true, false, dtype, kVocab, kHidden, 1}};
  const auto line = [](Op op) {
    Line made{};
    made.op = op;
    return made;
  };
  const auto linear = [&](int32_t weight, int32_t x, int32_t y, Activation activation = Activation::kNone) {
    Line made = line(Op::kLinear);
    made.weight = weight;
    made.x = x;
    made.y = y;
    made.activation = activation;
    return made;
  };
  const auto reduce = [&](bool add_residual, int32_t bias, int32_t gamma, int32_t gamma_layer) {
    Line made = line(Op::kAllReduceResidualNorm);
    made.add_residual = add_residual;
    made.bias = bias;
    made.gamma = gamma;
    made.gamma_layer = gamma_layer;
    made.y = kX;
    return made;
  };
  Line embed = line(Op::kEmbed), rope = line(Op::kRopeKvWrite), attention = line(Op::kAttention), select = line(Op::kSelectRows), logits = line(Op::kLogits);
  embed.weight = kEmbed;
  embed.vocab_start = logits.vocab_start = rank * kVocab;
  logits.vocab_count = kVocab;
  rope.x = attention.x = kQkvRows;
  attention.y = kAttn;
  attention.scale = 0.17f;
  attention.groups = {{0, 0, kHeads}};
  select.x = kX;
  select.y = kHeadInput;
  logits.x = kLogits;
  p.before = {embed, reduce(false, -1, kInputNorm, 0)};
  p.layer = {linear(kQkv, kX, kQkvRows),
             rope,
             attention,
             linear(kO, kAttn, kSlot),
             reduce(true, kOBias, kPostNorm, 0),
             linear(kGateUp, kX, kMlp, Activation::kSiluMul),
             linear(kDown, kMlp, kSlot),
             reduce(true, -1, kInputNorm, 1)};
  p.after = {select, linear(kHead, kHeadInput, kLogits), logits};
  return p;
}

std::vector<LoadPart> PartsOf(int rank, DType dtype) {
  std::vector<LoadPart> parts;
  // Rows [row0, row0 + rows) and columns [column0, column0 + columns) of tensor `tensor` of layer `copy`.
  const auto add = [&](int32_t weight, int32_t copy, uint64_t tensor, int64_t row0, int64_t rows, int64_t column0, int64_t columns, int64_t tensor_columns,
                       int32_t output, int32_t interleave = 1, int32_t phase = 0, bool is_bias = false) {
    const DType source = columns == 1 ? DType::kF32 : dtype;
    parts.push_back({weight, copy, is_bias, -1, tensor * 100 + static_cast<uint64_t>(copy), 0, tensor_columns, source, row0, rows, column0, columns, output,
                     interleave, phase});
  };
  const int64_t q = kHeads * kHeadDim;
  add(kEmbed, 0, 1, rank * kVocab, kVocab, 0, kHidden, kHidden, 0);
  add(kHead, 0, 2, rank * kVocab, kVocab, 0, kHidden, kHidden, 0);
  for (int32_t l = 0; l <= kLayers; l++) add(kInputNorm, l, 3, 0, kHidden, 0, 1, 1, 0);
  for (int32_t l = 0; l < kLayers; l++) {
    for (const bool is_bias : {false, true}) {
      const int64_t columns = is_bias ? 1 : kHidden;
      const uint64_t tensor = is_bias ? 30 : 4;
      add(kQkv, l, tensor, rank * q, q, 0, columns, columns, 0, 1, 0, is_bias);
      add(kQkv, l, tensor + 1, rank * kHeadDim, kHeadDim, 0, columns, columns, static_cast<int32_t>(q), 1, 0, is_bias);
      add(kQkv, l, tensor + 2, rank * kHeadDim, kHeadDim, 0, columns, columns, static_cast<int32_t>(q) + kHeadDim, 1, 0, is_bias);
    }
    add(kO, l, 7, 0, kHidden, rank * q, q, q * kWorldSize, 0);
    add(kOBias, l, 8, 0, kHidden, 0, 1, 1, 0);
    add(kPostNorm, l, 9, 0, kHidden, 0, 1, 1, 0);
    add(kGateUp, l, 10, rank * kInner, kInner, 0, kHidden, kHidden, 0, 2, 0);
    add(kGateUp, l, 11, rank * kInner, kInner, 0, kHidden, kHidden, 0, 2, 1);
    add(kDown, l, 12, 0, kHidden, rank * kInner, kInner, kInner * kWorldSize, 0);
  }
  return parts;
}

// ---- messages, as step.h lays them out -----------------------------------------------------------------------------------

int32_t BitsOf(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

void Append(std::vector<int32_t>& to, std::initializer_list<int32_t> words) {
  for (const int32_t word : words) to.push_back(word);
}

struct Message {
  int32_t tokens = 0, num_runs = 0, num_rows = 0, num_deltas = 0, ahead = 0;
  std::vector<int32_t> runs, ids, deltas, rows, stops;

  // `tokens` more of the sequence in `slot`; blocks 32 * slot .. hold it. The ids depend on their positions alone.
  Message& Run(int32_t slot, int32_t count, int32_t position0, bool is_new) {
    Append(runs, {slot, count, position0, is_new ? 1 : 0});
    num_runs++;
    for (int32_t i = 0; i < count; i++) ids.push_back((position0 + i) * 37 % (kVocab * kWorldSize));
    for (int32_t b = 0; is_new && b < 32; b++, num_deltas++) Append(deltas, {slot, b, 32 * slot + b});
    tokens += count;
    return *this;
  }
  // The last token so far has its logits looked at.
  Message& Row(int32_t slot, int32_t flags, int32_t candidates, float temperature, float penalty = 1, float top_p = 1) {
    Append(rows, {tokens - 1, slot, flags, candidates, 0, BitsOf(temperature), BitsOf(penalty), BitsOf(top_p)});
    num_rows++;
    return *this;
  }
  std::vector<int32_t> words() const {
    std::vector<int32_t> all = {kStepMagic, static_cast<int32_t>(MessageKind::kStep), 0, tokens, num_runs, num_rows, num_deltas, 0, ahead,
                                static_cast<int32_t>(stops.size())};
    for (const auto* part : {&runs, &ids, &deltas, &rows, &stops}) all.insert(all.end(), part->begin(), part->end());
    all[2] = static_cast<int32_t>(all.size());
    return all;
  }
};

// ---- ranks ----------------------------------------------------------------------------------------------------------------

/// Answers of jobs, in the order in which they came.
class Answers {
 public:
  Runner::Done Next() {
    return [this](Status status, StepResult result) {
      std::lock_guard lock(mutex_);
      statuses_.push_back(std::move(status));
      result_ = std::move(result);
      came_.notify_all();
    };
  }
  /// Waits for `count` answers in all.
  std::vector<Status> Await(size_t count) {
    std::unique_lock lock(mutex_);
    while (statuses_.size() < count) came_.wait(lock);
    return statuses_;
  }
  StepResult last() {
    std::lock_guard lock(mutex_);
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable came_;
  std::vector<Status> statuses_;
  StepResult result_;
};

struct Setup {
  DType dtype;
  const Kernels* kernels;
  int threads, spin_us;
  bool profile, is_pinnable;
};

class Ranks {
 public:
  explicit Ranks(const Setup& setup) : setup_(setup) {
    RunnerOptions options{};
    options.cores = CoresFor(setup);
    options.spin_us = setup.spin_us;
    options.timeout_ms = 120'000;
    options.max_tokens = 480;
    options.max_logit_rows = 4;
    options.max_sequences = 2;
    options.max_positions = 1024;
    options.num_blocks = 64;
    options.profile = setup.profile;
    for (int i = 0; i < kHeadDim / 2; i++) options.frequencies.push_back(1.0 / (1 + i * i));
    CommConfig config;
    config.world_size = kWorldSize;
    config.slot_bytes = Runner::SlotBytes(MakeProgram(0, setup.dtype), options, kVocab);
    config.spin_us = setup.spin_us;
    for (Arena& arena : arenas_) Require(Arena::CreateLocal(Communicator::ArenaBytes(config), &arena), "an arena");
    for (int rank = 0; rank < kWorldSize; rank++) {
      config.rank = rank;
      std::vector<Arena> views;
      for (const Arena& arena : arenas_) views.push_back(Arena::View(arena));
      std::unique_ptr<Communicator> communicator;
      Require(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(kWorldSize), &communicator), "a communicator");
      communicators_[rank] = std::move(communicator);
      Require(Runner::Create(MakeProgram(rank, setup.dtype), options, *setup.kernels, communicators_[rank], &runners_[rank]), "a runner");
      // As JavaScript may at any time.
      const std::string warning = runners_[rank]->pin_warning();
      Require(warning.empty() || !setup.is_pinnable, warning);
      answers_[rank] = std::make_unique<Answers>();
      runners_[rank]->PostLoad(PartsOf(rank, setup.dtype), answers_[rank]->Next());
    }
    for (int rank = 0; rank < kWorldSize; rank++) {
      while (runners_[rank]->loaded_bytes() == 0) std::this_thread::yield();
      Require(answers_[rank]->Await(1)[0], "loading");
    }
    runners_[1]->PostServe(
        [this](std::vector<int32_t> words) {
          std::lock_guard lock(bytes_mutex_);
          bytes_ = std::move(words);
        },
        answers_[1]->Next());
  }
  ~Ranks() {
    for (auto& runner : runners_) runner.reset();
    for (auto& communicator : communicators_) communicator->Close();
  }

  Runner& runner(int rank) { return *runners_[rank]; }
  Communicator& communicator(int rank) { return *communicators_[rank]; }
  Answers& answers(int rank) { return *answers_[rank]; }
  void Close(int rank) { runners_[rank].reset(); }
  std::vector<int32_t> bytes() {
    std::lock_guard lock(bytes_mutex_);
    return bytes_;
  }

  void Post(std::vector<int32_t> words) {
    posted_++;
    {
      std::lock_guard lock(ahead_mutex_);
      ahead_ = {};
    }
    runners_[0]->PostStep(
        std::move(words),
        [this](AheadTokens tokens) {
          std::lock_guard lock(ahead_mutex_);
          ahead_.ids.insert(ahead_.ids.end(), tokens.ids.begin(), tokens.ids.end());
          ahead_.end_ms.insert(ahead_.end_ms.end(), tokens.end_ms.begin(), tokens.end_ms.end());
        },
        answers_[0]->Next());
  }
  /// With all that came ahead, early or with the answer.
  StepResult Step(const Message& message) {
    Post(message.words());
    for (int rank = 0; rank < kWorldSize; rank++) (void)runners_[rank]->stats();
    Require(answers_[0]->Await(posted_).back(), "a step");
    StepResult result = answers_[0]->last();
    std::lock_guard lock(ahead_mutex_);
    result.ahead.ids.insert(result.ahead.ids.begin(), ahead_.ids.begin(), ahead_.ids.end());
    result.ahead.end_ms.insert(result.ahead.end_ms.begin(), ahead_.end_ms.begin(), ahead_.end_ms.end());
    return result;
  }
  size_t posted() const { return posted_; }

 private:
  static std::vector<int> CoresFor(const Setup& setup) {
    cpu_set_t allowed;
    Require(sched_getaffinity(0, sizeof allowed, &allowed) == 0, "the affinity");
    std::vector<int> cores, usable;
    for (int core = 0; core < CPU_SETSIZE; core++) {
      if (CPU_ISSET(core, &allowed)) usable.push_back(core);
    }
    for (int t = 0; t < setup.threads; t++) {
      // No kernel has been given the last processor of the set; its refusal is a warning.
      cores.push_back(setup.is_pinnable ? usable[static_cast<size_t>(t) % usable.size()] : CPU_SETSIZE - 1);
    }
    return cores;
  }

  const Setup setup_;
  size_t posted_ = 1;  // answers of rank 0 to come, loading included
  std::mutex bytes_mutex_;
  std::vector<int32_t> bytes_;
  std::mutex ahead_mutex_;
  AheadTokens ahead_;
  std::array<Arena, kWorldSize> arenas_;
  std::array<std::shared_ptr<Communicator>, kWorldSize> communicators_;
  std::array<std::unique_ptr<Answers>, kWorldSize> answers_;
  std::array<std::unique_ptr<Runner>, kWorldSize> runners_;
};

void Add(std::vector<uint32_t>& words, const std::vector<float>& values) {
  for (const float value : values) words.push_back(static_cast<uint32_t>(BitsOf(value)));
}

/// Decodes two sequences ahead: steps posted one by one must choose the same, and a stop id must end it.
void DecodeAhead(Ranks& ranks, int32_t position0, int32_t position1) {
  const auto step = [&](int32_t number, const std::vector<int32_t>& ids, int32_t ahead, std::vector<int32_t> stops) {
    Message message = Message().Run(0, 1, position0 + number, false).Row(0, 0, 1, 0).Run(1, 1, position1 + number, false).Row(1, 0, 1, 0);
    message.ids = ids;
    message.ahead = ahead;
    message.stops = std::move(stops);
    return ranks.Step(message);
  };
  const std::vector<int32_t> first = {3, 4};
  constexpr int32_t kAhead = 6;
  const StepResult result = step(0, first, kAhead, {});
  Require(result.ahead.ids.size() == 2 * kAhead && result.ahead.end_ms.size() == kAhead, "another number of tokens ahead");
  std::vector<int32_t> chosen = result.ahead.ids, ids = first;
  for (const RowResult& row : result.rows) chosen.push_back(row.ids.at(0));
  for (size_t i = 0; i < chosen.size(); i += 2) {
    const StepResult alone = step(static_cast<int32_t>(i / 2), ids, 0, {});
    ids = {chosen[i], chosen[i + 1]};
    Require(alone.ahead.ids.empty() && ids == std::vector<int32_t>({alone.rows.at(0).ids.at(0), alone.rows.at(1).ids.at(0)}), "a step ahead chose otherwise");
  }
  Require(step(0, first, kAhead, {kVocab * kWorldSize - 1, chosen[1]}).ahead.ids.empty(), "a stop id did not end decoding ahead");
}

/// All that a rank's steps answered and the hash of its hidden states, as words: the same for any number of threads.
std::vector<uint32_t> RunSteps(const Setup& setup) {
  Ranks ranks(setup);
  std::vector<uint32_t> words;
  const auto keep = [&](const StepResult& result) {
    for (const RowResult& row : result.rows) {
      Add(words, {row.max, row.sum_exp});
      words.insert(words.end(), row.ids.begin(), row.ids.end());
      Add(words, row.values);
      Add(words, row.raw_logits);
    }
  };
  ranks.Post({kStepMagic, static_cast<int32_t>(MessageKind::kBytes), 7, 8, 9});
  // Long enough that ranks share out the rows.
  const int32_t prompt = setup.dtype == DType::kF32 ? 231 : 461;
  keep(ranks.Step(Message().Run(0, prompt, 0, true).Row(0, 0, 8, 0)));
  // A second sequence far on in its positions, whose keys are split, beside one that decodes; every way to look at a row.
  keep(ranks.Step(Message().Run(0, 1, prompt, false).Row(0, kPenalty, 16, 0.8f, 1.3f, 0.9f).Run(1, 3, 640, true).Row(1, kWantLogits | kWholeRow, 1, 1)));
  keep(ranks.Step(Message().Run(1, 5, 643, false).Row(1, kWantLogits, 2 * kVocab, 0.5f)));
  for (int32_t i = 1; i < 5; i++) keep(ranks.Step(Message().Run(0, 1, prompt + i, false).Row(0, 0, 1, 0)));
  keep(ranks.Step(Message().Run(1, 2, 648, false)));  // nothing is looked at
  const uint64_t hash = ranks.runner(0).stats().state_hash;
  words.push_back(static_cast<uint32_t>(hash));
  words.push_back(static_cast<uint32_t>(hash >> 32));

  DecodeAhead(ranks, prompt + 5, 650);
  Message message = Message().Run(0, 1, prompt + 5, false).Row(0, 0, 1, 0).Run(1, 1, 650, false).Row(1, kPenalty, 4, 0, 1.1f);
  message.ahead = 20;
  ranks.Post(message.words());
  ranks.runner(0).Interrupt();
  Require(ranks.answers(0).Await(ranks.posted()).back(), "decoding ahead");
  ranks.Post({kStepMagic, static_cast<int32_t>(MessageKind::kShutdown)});
  Require(ranks.answers(0).Await(ranks.posted()).back(), "the shutdown");
  Require(ranks.answers(1).Await(2)[1], "serving");
  Require(ranks.bytes() == std::vector<int32_t>({7, 8, 9}), "bytes did not arrive");
  const RunnerStats stats[] = {ranks.runner(0).stats(), ranks.runner(1).stats()};
  Require(stats[0].state_hash == stats[1].state_hash && stats[0].steps == stats[1].steps && stats[0].steps >= 9, "the ranks have parted");
  Require(stats[0].whole_rows > 0, "no row was gathered whole");
  return words;
}

enum class End { kAbortOfLeader, kAbortOfFollower, kCloseOfLeader, kCloseOfFollower };

// Many steps are waiting when one rank ends. Each is answered once; after the first failure all fail; the other rank is told why.
void EndInTheMiddle(const Setup& setup, End end, uint32_t after_us) {
  Ranks ranks(setup);
  ranks.Step(Message().Run(0, 40, 0, true).Row(0, 0, 4, 0));
  constexpr int kSteps = 60;
  for (int32_t i = 0; i < kSteps; i++) ranks.Post(Message().Run(0, 1 + i % 3, 40 + 3 * i, false).Row(0, i % 2 == 0 ? 0 : kWholeRow, 4, 1).words());
  const size_t answered = ranks.posted() - kSteps;
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::microseconds(after_us));
    switch (end) {
      case End::kAbortOfLeader: return ranks.communicator(0).Abort(Status(Code::kAborted, "on purpose"));
      case End::kAbortOfFollower: return ranks.communicator(1).Abort(Status(Code::kAborted, "on purpose"));
      case End::kCloseOfLeader: return ranks.Close(0);
      case End::kCloseOfFollower: return ranks.Close(1);
    }
  });
  const std::vector<Status> statuses = ranks.answers(0).Await(ranks.posted());
  other.join();
  bool has_failed = false;
  for (size_t i = answered; i < statuses.size(); i++) {
    const Status& status = statuses[i];
    Require(!has_failed || !status.ok(), "a step went well after one that failed");
    has_failed = has_failed || !status.ok();
    if (status.ok() || status.code() == Code::kClosed) continue;
    Require(status.code() == Code::kAborted, "a step failed for another reason: " + status.message());
  }
  const bool is_abort = end == End::kAbortOfLeader || end == End::kAbortOfFollower;
  // A leader that closes between two steps tells nobody; the other rank serves on.
  if (end == End::kCloseOfLeader && !ranks.communicator(0).failed()) ranks.communicator(0).Abort(Status(Code::kAborted, "on purpose"));
  const Status served = ranks.answers(1).Await(2)[1];
  Require(served.code() == Code::kAborted, "serving ended with: " + served.message());
  if (is_abort) Require(served.message().find("on purpose") != std::string::npos, "the reason was not told: " + served.message());
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  std::mt19937 random(11);
  int ends = 0;
  for (const TierReport& report : ReportTiers()) {
    const Kernels* kernels = nullptr;
    if (!report.available || !SelectKernels(report.name + "!", &kernels).ok()) continue;
    for (const DType dtype : {DType::kBf16, DType::kF32}) {
      const std::vector<uint32_t> alone = RunSteps({dtype, kernels, 1, 0, false, true});
      Require(alone == RunSteps({dtype, kernels, 2, 0, true, false}), "two threads compute other bits than one");
      if (rounds > 1) Require(alone == RunSteps({dtype, kernels, 3, 30, false, true}), "three threads compute other bits than one");
      for (int round = 0; round < rounds; round++) {
        for (const End end : {End::kAbortOfLeader, End::kAbortOfFollower, End::kCloseOfLeader, End::kCloseOfFollower}) {
          EndInTheMiddle({dtype, kernels, 2, round % 2 == 0 ? 0 : 20, false, true}, end, random() % 20'000);
          ends++;
        }
      }
    }
  }
  std::printf("ok, %d ends in the middle\n", ends);
}
