// All in-node algorithms with ranks as threads of one process, so that the thread sanitizer sees both sides of every flag and
// slot. Random pauses between calls, every world size and algorithm, mixed operations; sums are checked exactly, so the same
// program is a test without the sanitizer too. Built and run by native.test.ts.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <random>
#include <thread>
#include <vector>

#include "comm/all_reduce.h"
#include "comm/batch.h"
#include "comm/channels.h"
#include "comm/communicator.h"
#include "comm/operation.h"

using namespace tilerank;

namespace {

// The obvious reduction: this program tests flags and slots, the kernels have tests of their own.
void Reduce(void* out, const void* const* sources, int32_t num_sources, DType dtype, ReduceOp, size_t count) {
  for (size_t i = 0; i < count; i++) {
    float sum = 0;
    for (int32_t s = 0; s < num_sources; s++) {
      float value;
      if (dtype == DType::kF32) {
        value = static_cast<const float*>(sources[s])[i];
      } else {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(sources[s])[i]) << 16;
        std::memcpy(&value, &bits, sizeof value);
      }
      sum = s == 0 ? value : sum + value;
    }
    if (dtype == DType::kF32) {
      static_cast<float*>(out)[i] = sum;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &sum, sizeof bits);
      static_cast<uint16_t*>(out)[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  }
}

[[noreturn]] void Die(const char* what, int rank, int turn) {
  std::fprintf(stderr, "rank %d, turn %d: %s\n", rank, turn, what);
  std::_Exit(1);
}

void Check(const Status& status, int rank, int turn) {
  if (!status.ok()) Die(status.message().c_str(), rank, turn);
}

// Small integers: exact in bf16 up to 7 ranks.
float Input(int rank, int turn, size_t i) { return static_cast<float>((static_cast<size_t>(rank) * 5 + static_cast<size_t>(turn) + i) % 16); }

void Store(std::byte* data, DType dtype, size_t i, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(data + 4 * i, &value, 4);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(data + 2 * i, &half, 2);
  }
}

float Load(const std::byte* data, DType dtype, size_t i) {
  float value;
  if (dtype == DType::kF32) {
    std::memcpy(&value, data + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
  }
  return value;
}

// The flight recorder: what a reader gets is ordered and within one ring, whoever writes meanwhile and whatever stands there.
void CheckRecording(const std::vector<RecordRow>& rows, int rank) {
  if (rows.size() > kRecords) Die("a recording is longer than its ring", rank, 0);
  for (size_t i = 1; i < rows.size(); i++) {
    if (rows[i].sequence <= rows[i - 1].sequence) Die("a recording is not ordered", rank, 0);
  }
  if (!rows.empty() && rows.back().sequence - rows.front().sequence >= kRecords) Die("a recording is older than its ring", rank, 0);
  for (const RecordRow& row : rows) {
    if (row.published_ns < 0 || row.published_ns > NowNs() || row.completed_ns < 0 || row.completed_ns > NowNs()) {
      Die("a recorded time is not of this life", rank, 0);
    }
  }
}

struct World {
  int size;
  CommConfig config;
  std::vector<Arena> arenas;                    // of all ranks
  std::vector<Arena> tensors, output_tensors;
  std::vector<std::byte*> parts, output_parts, data, outputs;  // of others' reach: tensor 1 is `data`, tensor 2 `outputs`
};

constexpr size_t kTensorCount = 777;

struct WorldTensors final : Tensors {
  const World* world;
  explicit WorldTensors(const World* of) : world(of) {}
  Status Find(uint32_t id, int rank, const Deadline&, std::byte** data) override {
    *data = (id == 1 ? world->data : world->outputs)[static_cast<size_t>(rank)];
    return Status::Ok();
  }
};

void Rank(World& world, int rank, int turns, uint32_t pause_seed, int spin_us) {
  CommConfig config = world.config;
  config.rank = rank;
  config.spin_us = spin_us;
  std::vector<Arena> views;
  for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
  std::unique_ptr<Communicator> comm;
  Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(world.size)), &comm), rank, -1);
  WorldTensors tensors(&world);
  OperationContext context = {comm.get(), &Reduce, [](void* out, const void* in, size_t nbytes) { std::memcpy(out, in, nbytes); }, 0, &tensors};
  context.from_tensor_bytes = 100;
  context.into_tensor_bytes = 800;

  std::mt19937 shared(7);  // the same operations on all ranks
  std::mt19937 own(pause_seed + static_cast<uint32_t>(rank));
  const auto pause = [&] {
    if (own() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 150));
  };
  uint64_t sequence = 1;
  uint32_t history = 0;
  // Of the operations on parts: parts of any sizes, for half of the calls; memory and output have room for all parts together.
  const auto ranks = static_cast<size_t>(world.size);
  std::vector<std::byte> memory(4 * kTensorCount * ranks), private_output(4 * kTensorCount * ranks);
  std::vector<uint64_t> offsets(ranks + 1);
  std::vector<uint64_t> output_offsets(ranks + 1), sizes(ranks * ranks);  // of an allToAll of any sizes
  for (int turn = 0; turn < turns; turn++) {
    const DType dtype = shared() % 2 == 0 ? DType::kF32 : DType::kBf16;
    const uint32_t kind = shared() % 13;
    Operation operation;
    operation.sequence = sequence;
    operation.history = history;
    operation.dtype = dtype;
    operation.count = shared() % (kTensorCount + 1);
    operation.chunk_bytes = 512;
    operation.root = static_cast<int>(shared() % static_cast<uint32_t>(world.size));
    operation.data = memory.data();
    switch (kind) {
      case 0: operation.op = CollectiveOp::kBarrier; break;
      case 1:
      case 6: operation.op = CollectiveOp::kBroadcast; break;
      case 2: operation.op = CollectiveOp::kAllGather; break;
      case 7: operation.op = CollectiveOp::kReduce; break;
      case 8: operation.op = CollectiveOp::kGather; break;
      case 9: operation.op = CollectiveOp::kScatter; break;
      case 10: operation.op = CollectiveOp::kReduceScatter; break;
      case 11:
      case 12: operation.op = CollectiveOp::kAllToAll; break;
      case 3: operation.op = CollectiveOp::kAllReduce; operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kOneShot); break;
      case 4: operation.op = CollectiveOp::kAllReduce; operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kTwoShot); break;
      default:
        operation.op = CollectiveOp::kAllReduce;
        operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace);
        operation.count = kTensorCount;
        operation.parts = &world.parts;
        operation.data = world.parts[static_cast<size_t>(rank)];
    }
    if (operation.op == CollectiveOp::kBarrier) operation.count = 0;
    // Some ranks have tensors, others not.
    if ((kind < 3 || (kind > 5 && kind < 12)) && own() % 4 != 0) {
      operation.data = world.data[static_cast<size_t>(rank)];
      operation.source = 1;
    }
    std::byte* output = private_output.data();
    if (operation.op == CollectiveOp::kAllReduce && shared() % 2 == 0) {
      operation.output = output;
      if (operation.parts != nullptr) operation.output_parts = &world.output_parts, operation.output = world.output_parts[static_cast<size_t>(rank)];
    }
    if (operation.op == CollectiveOp::kReduce && rank == operation.root && own() % 2 == 0) operation.output = output;
    const bool has_parts = kind == 2 || (kind >= 8 && kind <= 11);
    const auto sent_before = [&](size_t from, size_t to) {
      uint64_t sum = 0;
      for (size_t r = 0; r < to; r++) sum += sizes[from * ranks + r];
      return static_cast<size_t>(sum);
    };
    if (kind == 12) {
      operation.count = 0;
      for (uint64_t& size : sizes) size = shared() % 4 == 0 ? 0 : shared() % (kTensorCount + 1), operation.count += size;
      for (size_t r = 0; r < ranks; r++) {
        offsets[r + 1] = offsets[r] + sizes[static_cast<size_t>(rank) * ranks + r];
        output_offsets[r + 1] = output_offsets[r] + sizes[r * ranks + static_cast<size_t>(rank)];
      }
      for (uint64_t size : sizes) operation.largest_part = std::max(operation.largest_part, static_cast<size_t>(size) * (dtype == DType::kF32 ? 4 : 2));
      operation.offsets = offsets.data(), operation.output_offsets = output_offsets.data(), operation.output = output;
    }
    if (has_parts) {
      if (own() % 2 == 0) {
        output = world.outputs[static_cast<size_t>(rank)];
        if (operation.op == CollectiveOp::kGather && rank == operation.root) operation.target = 2;
      }
      operation.output = output;
      const bool are_alike = shared() % 2 == 0 || kind == 11;
      const size_t alike = operation.count;
      for (size_t r = 0; r < ranks; r++) offsets[r + 1] = offsets[r] + (are_alike ? alike : shared() % (kTensorCount + 1));
      operation.count = offsets[ranks];
      if (!are_alike) operation.offsets = offsets.data(), operation.layout = static_cast<uint32_t>(shared());
    }
    const auto part_of = [&](int r) { return static_cast<size_t>(has_parts ? offsets[static_cast<size_t>(r) + 1] - offsets[static_cast<size_t>(r)] : 0); };
    const bool is_part = kind == 2 || kind == 8;
    const size_t count = is_part ? part_of(rank) : kind == 12 ? static_cast<size_t>(offsets[ranks]) : operation.count;
    for (size_t i = 0; i < count; i++) {
      const bool is_blank = operation.op == CollectiveOp::kBroadcast && rank != operation.root;
      Store(operation.data, dtype, i, is_blank ? -1.0f : Input(rank, turn, i));
    }
    sequence += SequencesOf(operation, world.size);
    history = HistoryAfter(operation);
    pause();
    const bool has_started = TryStart(context, operation);
    pause();
    if (has_started && operation.algorithm == static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace) && own() % 2 == 0) {
      Check(AllReduceSlice(context, operation, Deadline::AfterMs(60'000)), rank, turn);
      operation.is_reduced = true;
      pause();
    }
    Check(Finish(context, operation, has_started, Deadline::AfterMs(60'000)), rank, turn);
    if (turn % 16 == rank && world.size > 1) {
      for (const RankRecording& recording : comm->Recording(kRecords)) CheckRecording(recording.rows, rank);
      const std::vector<RankRecording> mine = comm->Recording(1);
      const RecordRow& last = mine[static_cast<size_t>(rank)].rows.at(0);
      if ((last.sequence >= sequence || last.sequence < operation.sequence) && count > 0) Die("the recorder is not where this rank is", rank, turn);
      if (last.completed_ns == 0) Die("the last operation is recorded as open", rank, turn);
    }
    const bool is_root = rank == operation.root;
    const auto sum_of = [&](size_t i) {
      float sum = 0;
      for (int r = 0; r < world.size; r++) sum += Input(r, turn, i);
      return sum;
    };
    const auto expect = [&](const std::byte* at, size_t i, float value, const char* what) {
      if (Load(at, dtype, i) != value) Die(what, rank, turn);
    };
    const size_t element = dtype == DType::kF32 ? 4 : 2;
    const auto at_part = [&](const std::byte* all, int r) { return all + offsets[static_cast<size_t>(r)] * element; };
    switch (operation.op) {
      case CollectiveOp::kAllReduce:
      case CollectiveOp::kReduce:
        for (size_t i = 0; i < count; i++) {
          const bool has_sum = operation.op == CollectiveOp::kAllReduce || is_root;
          if (operation.output != nullptr) expect(operation.data, i, Input(rank, turn, i), "data changed though there is an output");
          expect(operation.result(), i, has_sum ? sum_of(i) : Input(rank, turn, i), "a sum is wrong");
        }
        break;
      case CollectiveOp::kBroadcast:
        for (size_t i = 0; i < count; i++) expect(operation.data, i, Input(operation.root, turn, i), "a broadcast is wrong");
        break;
      case CollectiveOp::kAllGather:
      case CollectiveOp::kGather:
        for (int r = 0; r < world.size && (is_root || operation.op == CollectiveOp::kAllGather); r++) {
          for (size_t i = 0; i < part_of(r); i++) expect(at_part(output, r), i, Input(r, turn, i), "a gathered part is wrong");
        }
        break;
      case CollectiveOp::kScatter:
      case CollectiveOp::kReduceScatter:
        for (size_t i = 0; i < part_of(rank); i++) {
          const size_t whole = static_cast<size_t>(offsets[static_cast<size_t>(rank)]) + i;
          expect(output, i, operation.op == CollectiveOp::kScatter ? Input(operation.root, turn, whole) : sum_of(whole), "a scattered part is wrong");
        }
        break;
      case CollectiveOp::kAllToAll:
        for (size_t r = 0; r < ranks && kind == 12; r++) {
          const size_t begin = sent_before(r, static_cast<size_t>(rank)), own_begin = static_cast<size_t>(output_offsets[r]);
          for (size_t i = 0; i < sizes[r * ranks + static_cast<size_t>(rank)]; i++) {
            expect(output, own_begin + i, Input(static_cast<int>(r), turn, begin + i), "a part of any size is wrong");
          }
        }
        if (kind == 12) break;
        for (int r = 0; r < world.size; r++) {
          const size_t sent = static_cast<size_t>(offsets[static_cast<size_t>(rank)]);
          for (size_t i = 0; i < part_of(r); i++) expect(at_part(output, r), i, Input(r, turn, sent + i), "a part of allToAll is wrong");
        }
        break;
      default: break;
    }
  }
  comm->Close();
}

// Batches of allReduces, broadcasts and allGathers, some too large to be packed, so that several exchanges and lone operations alternate.
void BatchRank(World& world, int rank, int turns) {
  CommConfig config = world.config;
  config.rank = rank;
  std::vector<Arena> views;
  for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
  std::unique_ptr<Communicator> comm;
  Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(world.size)), &comm), rank, -1);
  const OperationContext context = {comm.get(), &Reduce, [](void* out, const void* in, size_t nbytes) { std::memcpy(out, in, nbytes); }, 0};
  std::mt19937 shared(11), own(static_cast<uint32_t>(rank));
  const auto ranks = static_cast<size_t>(world.size);
  uint64_t sequence = 1;
  uint32_t history = 0;
  for (int turn = 0; turn < turns; turn++) {
    const size_t length = shared() % 12;
    std::vector<std::vector<float>> data(length), output(length);
    std::vector<Operation> operations(length);
    for (size_t i = 0; i < length; i++) {
      Operation& one = operations[i];
      const size_t count = shared() % (shared() % 4 == 0 ? 400 : 40);
      one.op = i % 3 == 0 ? CollectiveOp::kAllReduce : i % 3 == 1 ? CollectiveOp::kBroadcast : CollectiveOp::kAllGather;
      one.algorithm = static_cast<uint16_t>(shared() % 2 == 0 ? AllReduceAlgorithm::kOneShot : AllReduceAlgorithm::kTwoShot);
      one.root = static_cast<int>(shared() % ranks);
      one.chunk_bytes = 512;
      one.count = one.op == CollectiveOp::kAllGather ? count * ranks : count;
      data[i].resize(count + 1);
      output[i].resize(one.count + 1);
      one.data = reinterpret_cast<std::byte*>(data[i].data());
      if (one.op == CollectiveOp::kAllGather) one.output = reinterpret_cast<std::byte*>(output[i].data());
      for (size_t at = 0; at < count; at++) data[i][at] = one.op == CollectiveOp::kBroadcast && rank != one.root ? -1 : Input(rank, turn, at + i);
    }
    Batch batch;
    Operation operation;
    PlanBatch(operations, world.size, 1024, &batch, &operation);
    operation.sequence = sequence;
    operation.history = history;
    sequence += SequencesOf(operation, world.size);
    history = HistoryAfter(operation);
    const bool has_started = TryStart(context, operation);
    if (own() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 100));
    (void)IsReady(context, operation);
    Check(Finish(context, operation, has_started, Deadline::AfterMs(60'000)), rank, turn);
    for (size_t i = 0; i < length; i++) {
      const Operation& one = operations[i];
      const size_t count = data[i].size() - 1;
      for (size_t at = 0; at < count; at++) {
        float sum = 0;
        for (int r = 0; r < world.size; r++) sum += Input(r, turn, at + i);
        if (one.op == CollectiveOp::kAllReduce && data[i][at] != sum) Die("a sum of a batch is wrong", rank, turn);
        if (one.op == CollectiveOp::kBroadcast && data[i][at] != Input(one.root, turn, at + i)) Die("a broadcast of a batch is wrong", rank, turn);
        for (size_t r = 0; r < ranks && one.op == CollectiveOp::kAllGather; r++) {
          if (output[i][r * count + at] != Input(static_cast<int>(r), turn, at + i)) Die("a part of a batch is wrong", rank, turn);
        }
      }
    }
  }
  comm->Close();
}

// Messages between all ranks at once, sent by the channels' threads and received here, among barriers of the group; at the end one rank
// aborts the group while the others wait for messages, from whom they know and from whom they do not.
void ChannelRank(World& world, int rank, int turns, const std::string& nonce) {
  CommConfig config = world.config;
  config.rank = rank;
  std::vector<Arena> views;
  for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
  std::unique_ptr<Communicator> made;
  Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(world.size)), &made), rank, -1);
  const std::shared_ptr<Communicator> comm = std::move(made);
  Channels::Config options;
  Check(Rendezvous::Create({nonce, rank, world.size, -1}, &options.rendezvous), rank, -1);
  options.communicator = comm;
  options.is_cancelled = std::make_shared<std::atomic<bool>>(false);
  options.copy = [](void* out, const void* in, size_t nbytes) { std::memcpy(out, in, nbytes); };
  for (int r = 0; r < world.size; r++) options.members.push_back(r), options.names.push_back(r);
  options.chunk_bytes = 512;
  comm->OnFailure([flag = options.is_cancelled] { flag->store(true); });
  Channels channels(options);
  std::mt19937 shared(5), own(static_cast<uint32_t>(rank));
  const OperationContext context = {comm.get(), nullptr, nullptr, 0};
  uint64_t sequence = 1;
  for (int turn = 0; turn < turns; turn++) {
    std::vector<std::vector<float>> sent;
    std::vector<Channels::Message> messages, awaited;
    std::vector<std::vector<float>> received;
    for (int from = 0; from < world.size; from++) {
      for (int to = 0; to < world.size; to++) {
        const size_t count = shared() % 500;
        // The last two ranks have not met when the group ends.
        if (from == to || shared() % 3 == 0 || (from == world.size - 1 && to == world.size - 2)) continue;
        if (from == rank) {
          std::vector<float>& data = sent.emplace_back(count + 1);
          for (size_t i = 0; i < count; i++) data[i] = Input(rank, turn, i + static_cast<size_t>(to));
          messages.push_back(channels.Take(channels.Of(to, true), DType::kF32, reinterpret_cast<std::byte*>(data.data()), count));
        } else if (to == rank) {
          std::vector<float>& data = received.emplace_back(count + 1);
          awaited.push_back(channels.Take(channels.Of(from, false), DType::kF32, reinterpret_cast<std::byte*>(data.data()), count));
        }
      }
    }
    std::latch done(static_cast<std::ptrdiff_t>(messages.size()));
    for (Channels::Message& message : messages) {
      channels.TryStart(&message);
      message.channel->worker.Post([&] {
        Check(channels.Run(message, Deadline::AfterMs(60'000)), rank, turn);
        done.count_down();
      });
    }
    for (size_t i = 0; i < awaited.size(); i++) {
      Channels::Message& message = awaited[i];
      if (own() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 100));
      channels.TryStart(&message);
      (void)channels.IsReady(message);
      Check(channels.Run(message, Deadline::AfterMs(60'000)), rank, turn);
      for (size_t at = 0; at < message.operation.count; at++) {
        if (received[i][at] != Input(message.channel->peer, turn, at + static_cast<size_t>(rank))) Die("a message is wrong", rank, turn);
      }
    }
    done.wait();
    Operation barrier;
    barrier.sequence = sequence++;
    Check(Finish(context, barrier, TryStart(context, barrier), Deadline::AfterMs(60'000)), rank, turn);
  }
  if (rank == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    comm->Abort(Status(Code::kAborted, "on purpose"));
  } else {
    float value;
    const int from = rank == world.size - 2 ? world.size - 1 : 0;
    const Status status = channels.Run(channels.Take(channels.Of(from, false), DType::kF32, reinterpret_cast<std::byte*>(&value), 1), Deadline::AfterMs(60'000));
    if (status.code() != Code::kAborted || status.message().find("on purpose") == std::string::npos) Die("an abort was not told to a channel", rank, turns);
  }
  channels.Stop();
  channels.Close();
  comm->Close();
}

// The runner's pattern: rank 0 broadcasts through its slot, the others idle for it, then everybody exchanges on several lanes.
void RunnerRank(World& world, int rank, int steps) {
  CommConfig config = world.config;
  config.rank = rank;
  std::vector<Arena> views;
  for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
  std::unique_ptr<Communicator> comm;
  Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(world.size)), &comm), rank, -1);
  std::mt19937 own(static_cast<uint32_t>(rank));
  uint64_t sequence = 0;
  for (int step = 0; step < steps; step++) {
    sequence++;
    OpTag message;
    message.op = CollectiveOp::kBroadcast;
    message.count = static_cast<uint64_t>(step);
    if (rank == 0) {
      if (own() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 2000));
      Check(comm->Acquire(0, sequence, Deadline::AfterMs(60'000)), rank, step);
      std::memcpy(comm->Slot(0, sequence), &step, sizeof step);
      comm->Publish(0, sequence, message);
    } else {
      OpTag seen;
      Check(comm->AwaitFrom(0, sequence, 0, &seen, Deadline::Idle()), rank, step);
      int value;
      std::memcpy(&value, comm->Slot(0, sequence), sizeof value);
      if (value != step || seen.count != static_cast<uint64_t>(step)) Die("a step's message is wrong", rank, step);
    }
    comm->Consumed(0, sequence);
    // Two steps of three are messages only, so that the root reuses slots without having heard of anybody.
    if (step % 3 != 0) continue;
    for (int exchange = 0; exchange < 3; exchange++) {
      sequence++;
      OpTag tag;
      tag.op = CollectiveOp::kExchange;
      tag.count = sequence;
      Check(comm->Acquire(0, sequence, Deadline::AfterMs(60'000)), rank, step);
      const uint64_t mine = sequence * 1000 + static_cast<uint64_t>(rank);
      std::memcpy(comm->Slot(rank, sequence), &mine, sizeof mine);
      FlagPayload payload;
      payload.words[2] = mine + 1;
      comm->Publish(0, sequence, tag, payload);
      Check(comm->Await(0, sequence, tag, Deadline::AfterMs(60'000)), rank, step);
      for (int peer = 0; peer < world.size; peer++) {
        uint64_t theirs;
        std::memcpy(&theirs, comm->Slot(peer, sequence), sizeof theirs);
        if (theirs != sequence * 1000 + static_cast<uint64_t>(peer)) Die("an exchanged word is wrong", rank, step);
        if (comm->PayloadOf(peer, 0, sequence).words[2] != theirs + 1) Die("a payload is wrong", rank, step);
      }
    }
  }
  comm->Close();
}

// One rank fails: everybody's waits end with its reason, wherever they are.
void AbortRank(World& world, int rank) {
  CommConfig config = world.config;
  config.rank = rank;
  std::vector<Arena> views;
  for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
  std::unique_ptr<Communicator> comm;
  Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(world.size)), &comm), rank, -1);
  if (rank == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    comm->Abort(Status(Code::kAborted, "on purpose"));
  } else {
    OpTag tag;
    const Status status = rank % 2 == 0 ? comm->Await(0, 1, tag, Deadline::AfterMs(60'000)) : comm->AwaitFrom(0, 1, 0, &tag, Deadline::Idle());
    if (status.code() != Code::kAborted || status.message().find("on purpose") == std::string::npos) Die("an abort was not told", rank, 0);
    if (!comm->failed()) Die("a failed group does not know it", rank, 0);
  }
  comm->Close();
}

// The same of an arena whose owner writes nonsense.
void HostileRecorder() {
  Arena arena;
  Check(Arena::CreateLocal(kRecorderOffset + kRecorderBytes, &arena), 0, 0);
  if (!ReadRecorder(arena.data(), kRecords).empty()) Die("an empty recorder holds something", 0, 0);
  std::mt19937_64 random(7);
  auto* words = reinterpret_cast<uint64_t*>(arena.data());
  for (int turn = 0; turn < 300; turn++) {
    for (size_t i = 0; i < arena.size() / 8; i++) words[i] = turn % 3 == 0 ? random() : turn % 3 == 1 ? ~uint64_t{0} - random() % 4 : random() % 3000;
    if (turn % 2 == 0) {
      // Right places with wild contents, so that rows are read at all.
      for (uint64_t i = 0; i < kRecords; i++) words[(kRecorderOffset + i * sizeof(Record)) / 8] = (random() >> (turn % 60)) * kRecords + i;
    }
    CheckRecording(ReadRecorder(arena.data(), kRecords), 0);
    if (ReadRecorder(arena.data(), 5).size() > 5) Die("a recording is longer than asked", 0, 0);
  }
}

World MakeWorld(int size) {
  World world;
  world.size = size;
  world.config.world_size = size;
  world.config.lanes = 2;
  world.config.slot_bytes = 4096;
  world.arenas.resize(static_cast<size_t>(size));
  world.tensors.resize(static_cast<size_t>(size));
  world.output_tensors.resize(static_cast<size_t>(size));
  for (int r = 0; r < size; r++) {
    Check(Arena::CreateLocal(Communicator::ArenaBytes(world.config), &world.arenas[static_cast<size_t>(r)]), r, -1);
    const size_t whole = 4 * kTensorCount * static_cast<size_t>(size);
    Check(Arena::CreateLocal(4 * kTensorCount + 2 * whole, &world.tensors[static_cast<size_t>(r)]), r, -1);
    Check(Arena::CreateLocal(4 * kTensorCount, &world.output_tensors[static_cast<size_t>(r)]), r, -1);
    std::byte* data = world.tensors[static_cast<size_t>(r)].data();
    world.data.push_back(data);
    world.outputs.push_back(data + whole);
    world.parts.push_back(data + 2 * whole);
    world.output_parts.push_back(world.output_tensors[static_cast<size_t>(r)].data());
  }
  return world;
}

template <class Body>
void Run(int size, Body body) {
  World world = MakeWorld(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; rank++) threads.emplace_back([&, rank] { body(world, rank); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int turns = argc > 1 ? std::atoi(argv[1]) : 150;
  HostileRecorder();
  for (int size : {1, 2, 3, 4, 7}) {
    for (int spin_us : {0, 20}) {
      Run(size, [&](World& world, int rank) { Rank(world, rank, turns, static_cast<uint32_t>(size * 100 + spin_us), spin_us); });
    }
    Run(size, [&](World& world, int rank) { RunnerRank(world, rank, turns); });
    Run(size, [&](World& world, int rank) { BatchRank(world, rank, turns); });
    if (size > 1) Run(size, [](World& world, int rank) { AbortRank(world, rank); });
    std::string nonce;
    for (std::random_device random; nonce.size() < 32;) nonce += "0123456789abcdef"[random() % 16];
    if (size > 1) Run(size, [&](World& world, int rank) { ChannelRank(world, rank, turns / 2, nonce); });
  }
  std::printf("ok, %d turns a world\n", turns);
}
