// What the machine explores: short programs of calls, on 2 and 3 ranks, through the shipped collectives, communicator and pool. Every
// word that travels says which rank put it there, in which call and where, so a byte of another generation is a wrong result.
// Built and run by ../tso.test.ts:
//   tso quick|long [PART/PARTS]             a set, or a part of it
//   tso group|channel|messages|runner|pool N SCRIPT [OPTION ...]  one scenario, with a shortest trace where it fails. OPTIONs: spin, spurious, unreduced,
//                                           mutant=NUMBER (of the copy that the test has broken on purpose)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <vector>

#include "comm/all_reduce.h"
#include "comm/batch.h"
#include "comm/communicator.h"
#include "comm/operation.h"
#include "runner/pool.h"

using namespace tilerank;

namespace {

constexpr size_t kLine = 64;
constexpr int kMaxRanks = 3, kMaxLines = 2 * kMaxRanks;
// Of each rank's tensor, behind the lines that are reduced in place: the last barrier it came to.
constexpr size_t kMark = kMaxLines * kLine;
// Behind that: as many lines for a result apart from its input.
constexpr size_t kResult = kMark + kLine;

struct Scenario {
  std::string family;  // group, channel, messages, runner, pool
  int size = 2;        // ranks or threads
  std::string script;
  bool spin = false;      // waits look for ever; else they sleep at once
  bool spurious = false;  // sleepers also wake without a reason
  bool unreduced = false;
};

// ---- shared memory --------------------------------------------------------------------------------------------------------

struct World {
  int size;
  CommConfig config;
  std::vector<Arena> arenas, tensors;
  std::vector<std::byte*> parts, output_parts;
};

// As CommHandle finds them: tensor 1 is `parts`, tensor 2 `output_parts`.
struct WorldTensors final : Tensors {
  const World* world;
  explicit WorldTensors(const World* of) : world(of) {}
  Status Find(uint32_t id, int rank, const Deadline&, std::byte** data) override {
    *data = (id == 1 ? world->parts : world->output_parts)[static_cast<size_t>(rank)];
    return Status::Ok();
  }
};

std::string NameOfArenaWord(int rank, size_t offset, size_t slots) {
  const std::string owner = "rank " + std::to_string(rank) + "'s ";
  if (offset >= slots) {
    const size_t at = offset - slots;
    return owner + "slot[" + std::to_string(at / kPageBytes) + "] line " + std::to_string(at % kPageBytes / kLine);
  }
  if (offset < kPageBytes) return owner + (offset == offsetof(ControlPage, left) ? "left" : "abort.state");
  offset -= kRecorderOffset + kRecorderBytes;
  if (offset < offsetof(LaneControl, consumed)) {
    const std::string flag = owner + "flag[" + std::to_string(offset / sizeof(FlagLine)) + "].";
    const size_t field = offset % sizeof(FlagLine) / 8;
    static const char* const kNames[] = {"sequence", "tag", "count"};
    return flag + (field < 3 ? kNames[field] : "payload[" + std::to_string(field - 3) + "]");
  }
  if (offset < offsetof(LaneControl, sleepers)) return owner + "consumed";
  const size_t sleepers = (offset - offsetof(LaneControl, sleepers)) / 4;
  return owner + (sleepers < 2 ? "sleepers.flag[" + std::to_string(sleepers) + "]" : "sleepers.consumed");
}

// A line stands by its first word: copies and sums treat all words of a line alike, between the same two accesses to a flag, so a
// wrong word anywhere is a run in which the first one is wrong.
uint64_t LoadLine(const void* line) {
  uint64_t value;
  if (tso::IsShared(line)) return tso::Load(line, 8);
  std::memcpy(&value, line, 8);
  return value;
}
void StoreLine(void* line, uint64_t value) {
  if (tso::IsShared(line)) return tso::Store(line, value, 8);
  std::memcpy(line, &value, 8);
}
void Copy(void* out, const void* in, size_t nbytes) {
  for (size_t at = 0; at < nbytes; at += kLine) StoreLine(static_cast<std::byte*>(out) + at, LoadLine(static_cast<const std::byte*>(in) + at));
}
void Reduce(void* out, const void* const* sources, int32_t num_sources, DType, ReduceOp, size_t count) {
  for (size_t at = 0; at < count * sizeof(float); at += kLine) {
    uint64_t sum = 0;
    for (int32_t s = 0; s < num_sources; s++) sum += LoadLine(static_cast<const std::byte*>(sources[s]) + at);
    StoreLine(static_cast<std::byte*>(out) + at, sum);
  }
}

// What rank puts into a line in a call: 16 bits of the word are its own, so that a sum still shows every summand.
uint64_t ValueOf(int rank, uint64_t call, size_t line) { return ((call + 1) << 4 | (line + 1)) << (16 * rank); }
uint64_t SumOf(int world_size, uint64_t call, size_t line) {
  uint64_t sum = 0;
  for (int r = 0; r < world_size; r++) sum += ValueOf(r, call, line);
  return sum;
}
void Check(const Status& status) {
  if (!status.ok()) tso::Violate("error", status.message());
}

// ---- the collectives, as CommHandle calls them ------------------------------------------------------------------------------
//
// A script has a letter a call: b barrier; o one-shot, t two-shot, u two-shot of one line (so that some slices are empty), p in place,
// q the same into other tensors; g allGather, a allToAll, v one with two lines for
// lower ranks and one for higher; c reduceScatter; r reduce, h gather to and s scatter from rank 0; x, y, z broadcast from rank 0, 1, 2; m, on
// two ranks, a message from rank 0; k a batch of a one-shot, a broadcast from rank 0 and an allGather. The same of tensors: l allGather,
// n allToAll, 2 reduceScatter, 1 reduce, i gather that reads them, j gather that writes into the root's, f scatter, w broadcast from rank 0;
// d allGather and e gather of which only some ranks give one. A capital has two chunks, or two lines a part, hence two generations and more.

struct Rank {
  int rank = 0;
  World* world = nullptr;
  Communicator* comm = nullptr;
  uint64_t call = 0;
  uint64_t sequence = 1;
  uint32_t history = 0;
  std::byte data[kMaxLines * kLine] = {};
  std::byte output[kMaxRanks * 2 * kLine] = {};
  // Of k and K, whose slot takes two of the three operations, so that there is a second exchange. Planned ahead: fibers allocate nothing.
  Batch batches[2];
  Operation planned[2];
};

void Expect(uint64_t found, uint64_t expected, const char* what, const Rank& me) {
  if (found == expected) return;
  char text[160];
  std::snprintf(text, sizeof text, "%s of call %llu on rank %d is 0x%llx instead of 0x%llx", what, static_cast<unsigned long long>(me.call), me.rank,
                static_cast<unsigned long long>(found), static_cast<unsigned long long>(expected));
  tso::Violate("wrong bytes", text);
}

// Frames of a call are left behind with it, and with them all that might tell equal states apart.
[[gnu::noinline]] void RunCall(Rank& me, char letter) {
  World& world = *me.world;
  const bool has_two_chunks = letter >= 'A' && letter <= 'Z';
  const char small = has_two_chunks ? static_cast<char>(letter - 'A' + 'a') : letter;
  static const char kOfTensors[] = "ln21ijfwde", kOfOthers[] = "gacrhhsxgh";
  const char* of_tensors = std::strchr(kOfTensors, small);
  const char kind = of_tensors == nullptr ? small : kOfOthers[of_tensors - kOfTensors];
  size_t lines = 1;
  Operation operation;
  operation.data = me.data;
  switch (kind) {
    case 'b':
      operation.op = CollectiveOp::kBarrier;
      lines = 0;
      break;
    case 'o':
      operation.op = CollectiveOp::kAllReduce;
      operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kOneShot);
      break;
    case 't':
    case 'u':
      operation.op = CollectiveOp::kAllReduce;
      operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kTwoShot);
      if (kind == 't') lines = static_cast<size_t>(world.size);
      break;
    case 'p':
    case 'q':
      operation.op = CollectiveOp::kAllReduce;
      operation.algorithm = static_cast<uint16_t>(AllReduceAlgorithm::kTwoShotInPlace);
      lines = static_cast<size_t>(world.size);
      operation.parts = &world.parts;
      operation.data = world.parts[static_cast<size_t>(me.rank)];
      if (kind == 'q') operation.output_parts = &world.output_parts, operation.output = world.output_parts[static_cast<size_t>(me.rank)];
      break;
    case 'r': operation.op = CollectiveOp::kReduce; break;
    case 'g': operation.op = CollectiveOp::kAllGather; break;
    case 'h': operation.op = CollectiveOp::kGather; break;
    case 's': operation.op = CollectiveOp::kScatter; break;
    case 'c': operation.op = CollectiveOp::kReduceScatter; break;
    case 'm': operation.op = CollectiveOp::kMessage; break;
    case 'a':
    case 'v': operation.op = CollectiveOp::kAllToAll; break;
    default:
      operation.op = CollectiveOp::kBroadcast;
      operation.root = kind - 'x';
  }
  operation.chunk_bytes = lines == 0 ? kLine : lines * kLine;
  if (has_two_chunks) lines *= 2;
  operation.count = lines * kLine / sizeof(float);
  const size_t part_lines = lines;
  if (std::strchr("ghsca", kind) != nullptr) {
    operation.output = me.output;
    operation.count *= static_cast<size_t>(world.size);
    if (kind == 's' || kind == 'c' || kind == 'a') {
      operation.chunk_bytes *= static_cast<size_t>(world.size);  // a line a cell
      lines *= static_cast<size_t>(world.size);
    }
  }
  const auto sent = [](int from, int to) -> size_t { return from == to ? 0 : from > to ? 2 : 1; };  // lines of v
  uint64_t offsets[kMaxRanks + 1] = {}, output_offsets[kMaxRanks + 1] = {};
  if (kind == 'v') {
    constexpr size_t kFloats = kLine / sizeof(float);
    operation.output = me.output;
    operation.chunk_bytes = static_cast<size_t>(world.size) * kLine;
    operation.count = 0;
    for (int r = 0; r < world.size; r++) {
      offsets[r + 1] = offsets[r] + sent(me.rank, r) * kFloats;
      output_offsets[r + 1] = output_offsets[r] + sent(r, me.rank) * kFloats;
    }
    lines = offsets[world.size] / kFloats;
    operation.offsets = offsets;
    operation.output_offsets = output_offsets;
    operation.largest_part = 2 * kLine;
  }
  WorldTensors tensors(&world);
  OperationContext context = {me.comm, &Reduce, &Copy, 0, &tensors};
  if (of_tensors != nullptr) {
    context.from_tensor_bytes = context.into_tensor_bytes = 1;
    operation.data = world.parts[static_cast<size_t>(me.rank)];
    const bool gives = (small != 'd' || me.rank == 0) && (small != 'e' || me.rank == 1);
    if (gives) operation.source = 1;
    if (small == 'j') {
      operation.target = 2;
      operation.output = world.output_parts[static_cast<size_t>(me.rank)];
    }
  }
  operation.sequence = me.sequence;
  operation.history = me.history;
  me.sequence += SequencesOf(operation, world.size);
  me.history = HistoryAfter(operation);
  const bool is_root = me.rank == operation.root;
  const bool is_broadcast = operation.op == CollectiveOp::kBroadcast || operation.op == CollectiveOp::kMessage;
  const bool has_input = is_root || (!is_broadcast && operation.op != CollectiveOp::kScatter);
  if (kind == 'b') StoreLine(world.parts[static_cast<size_t>(me.rank)] + kMark, me.call + 1);
  for (size_t line = 0; line < lines; line++) StoreLine(operation.data + line * kLine, has_input ? ValueOf(me.rank, me.call, line) : 0);

  const bool has_started = TryStart(context, operation);
  Check(Finish(context, operation, has_started, Deadline::AfterMs(60'000)));

  for (int r = 0; kind == 'b' && r < world.size; r++) {
    if (LoadLine(world.parts[static_cast<size_t>(r)] + kMark) > me.call) continue;
    tso::Violate("barrier", "rank " + std::to_string(me.rank) + " is past it before rank " + std::to_string(r) + " has come");
  }
  const size_t own_line = static_cast<size_t>(me.rank) * part_lines;  // where this rank's part begins in a whole
  switch (operation.op) {
    case CollectiveOp::kBarrier: break;
    case CollectiveOp::kAllReduce:
    case CollectiveOp::kReduce:
    case CollectiveOp::kMessage:
    case CollectiveOp::kBroadcast:
      for (size_t line = 0; line < lines; line++) {
        const uint64_t found = LoadLine(operation.result() + line * kLine);
        if (kind == 'q') Expect(LoadLine(operation.data + line * kLine), ValueOf(me.rank, me.call, line), "what an output leaves alone", me);
        if (is_broadcast) {
          Expect(found, ValueOf(operation.root, me.call, line), "what was broadcast", me);
        } else if (operation.op == CollectiveOp::kAllReduce || is_root) {
          Expect(found, SumOf(world.size, me.call, line), "a sum", me);
        } else {
          Expect(found, ValueOf(me.rank, me.call, line), "what a reduce leaves alone", me);
        }
      }
      break;
    case CollectiveOp::kScatter:
    case CollectiveOp::kReduceScatter:
      for (size_t line = 0; line < part_lines; line++) {
        const bool is_sum = operation.op == CollectiveOp::kReduceScatter;
        Expect(LoadLine(operation.output + line * kLine), is_sum ? SumOf(world.size, me.call, own_line + line) : ValueOf(operation.root, me.call, own_line + line),
               "a scattered part", me);
      }
      break;
    case CollectiveOp::kAllToAll:
      if (kind == 'v') {
        size_t at = 0;
        for (int r = 0; r < world.size; r++) {
          size_t begin = 0;
          for (int to = 0; to < me.rank; to++) begin += sent(r, to);
          for (size_t line = 0; line < sent(r, me.rank); line++) {
            Expect(LoadLine(me.output + at++ * kLine), ValueOf(r, me.call, begin + line), "a part of any size", me);
          }
        }
        break;
      }
      [[fallthrough]];
    default:
      for (int r = 0; r < world.size && (is_root || operation.op != CollectiveOp::kGather); r++) {
        for (size_t line = 0; line < part_lines; line++) {
          const size_t sent = operation.op == CollectiveOp::kAllToAll ? own_line + line : line;
          Expect(LoadLine(operation.output + (static_cast<size_t>(r) * part_lines + line) * kLine), ValueOf(r, me.call, sent), "a part", me);
        }
      }
  }
  // Private results have been looked at: no state need tell them apart.
  std::memset(me.data, 0, sizeof me.data);
  std::memset(me.output, 0, sizeof me.output);
}

enum : size_t { kSum, kBroadcast, kPart };  // the operations of a batch, and their lines of data

void PlanBatches(Rank& me) {
  const World& world = *me.world;
  constexpr CollectiveOp kOps[] = {CollectiveOp::kAllReduce, CollectiveOp::kBroadcast, CollectiveOp::kAllGather};
  for (size_t exchanges : {1, 2}) {
    std::vector<Operation> operations(3);
    for (size_t i = 0; i < operations.size(); i++) {
      operations[i].op = kOps[i];
      operations[i].data = me.data + i * kLine;
      operations[i].count = kLine / sizeof(float) * (i == kPart ? static_cast<size_t>(world.size) : 1);
    }
    operations[kPart].output = me.output;
    PlanBatch(std::move(operations), world.size, (4 - exchanges) * kLine, &me.batches[exchanges - 1], &me.planned[exchanges - 1]);
  }
}

[[gnu::noinline]] void RunBatch(Rank& me, const Operation& planned) {
  const World& world = *me.world;
  for (size_t i : {kSum, kBroadcast, kPart}) StoreLine(me.data + i * kLine, i == kBroadcast && me.rank != 0 ? 0 : ValueOf(me.rank, me.call, i));
  Operation operation = planned;
  operation.sequence = me.sequence;
  operation.history = me.history;
  me.sequence += SequencesOf(operation, world.size);
  me.history = HistoryAfter(operation);
  const OperationContext context = {me.comm, &Reduce, &Copy, 0};
  const bool has_started = TryStart(context, operation);
  Check(Finish(context, operation, has_started, Deadline::AfterMs(60'000)));
  Expect(LoadLine(me.data + kSum * kLine), SumOf(world.size, me.call, kSum), "a sum of a batch", me);
  Expect(LoadLine(me.data + kBroadcast * kLine), ValueOf(0, me.call, kBroadcast), "a broadcast of a batch", me);
  for (int r = 0; r < world.size; r++) {
    Expect(LoadLine(me.output + static_cast<size_t>(r) * kLine), ValueOf(r, me.call, kPart), "a part of a batch", me);
  }
  std::memset(me.data, 0, sizeof me.data);
  std::memset(me.output, 0, sizeof me.output);
}

void GroupProgram(Rank& me, const std::string& script) {
  for (char letter : script) {
    letter == 'k' || letter == 'K' ? RunBatch(me, me.planned[letter == 'K' ? 1 : 0]) : RunCall(me, letter);
    tso::Note(++me.call);
  }
  me.comm->Close();
}

// ---- the runner's use of the communicator ------------------------------------------------------------------------------------
//
// A script has a letter a message: m is no step; 1, 2, 3 a step of so many sums; p a step of a sum and the candidates of the next
// token; a the same, after which all ranks decode one token ahead. The functions are the runner's by name, with the same calls in the same order
// (tso.test.ts compares), on one line of each slot. What goes into generation g is ValueOf(rank, g, 0).

namespace runner {

constexpr int kLane = 0;

OpTag MessageTag(uint64_t words) {
  OpTag tag;
  tag.op = CollectiveOp::kBroadcast;
  tag.count = words;
  return tag;
}

[[gnu::noinline]] void Broadcast(Rank& me) {
  Communicator* communicator_ = me.comm;
  Check(communicator_->Acquire(kLane, me.sequence + 1, Deadline::AfterMs(60'000)));
  me.sequence++;
  StoreLine(communicator_->Slot(0, me.sequence), ValueOf(0, me.sequence, 0));
  communicator_->Publish(kLane, me.sequence, MessageTag(me.sequence));
  communicator_->Consumed(kLane, me.sequence);
  communicator_->Complete(kLane, me.sequence);
}

[[gnu::noinline]] void Receive(Rank& me) {
  Communicator* communicator_ = me.comm;
  me.sequence++;
  OpTag tag;
  Check(communicator_->AwaitFrom(kLane, me.sequence, 0, &tag, Deadline::Idle()));
  Expect(tag.Bits(), MessageTag(0).Bits(), "the tag of a message", me);
  Expect(tag.count, me.sequence, "the count of a message", me);
  Expect(LoadLine(communicator_->Slot(0, me.sequence)), ValueOf(0, me.sequence, 0), "a message", me);
  communicator_->Consumed(kLane, me.sequence);
}

// As with the runner's profile, whose kernel times travel with every exchange.
[[gnu::noinline]] void Exchange(Rank& me, CollectiveOp op, FlagPayload payload = {}) {
  Communicator* communicator_ = me.comm;
  me.sequence++;
  OpTag tag;
  tag.op = op;
  tag.count = me.sequence;
  payload.words[3] = ValueOf(me.rank, me.sequence, 1);
  communicator_->Publish(kLane, me.sequence, tag, payload);
  Check(communicator_->Await(kLane, me.sequence, tag, Deadline::AfterMs(60'000)));
  for (int r = 0; r < me.world->size; r++) {
    Expect(communicator_->PayloadOf(r, kLane, me.sequence).words[3], ValueOf(r, me.sequence, 1), "a kernel time", me);
  }
}

// The end of a row-parallel layer: the line before it has written the slot.
[[gnu::noinline]] void Sum(Rank& me) {
  StoreLine(me.comm->Slot(me.rank, me.sequence + 1), ValueOf(me.rank, me.sequence + 1, 0));
  Exchange(me, CollectiveOp::kAllReduce);
  for (int r = 0; r < me.world->size; r++) Expect(LoadLine(me.comm->Slot(r, me.sequence)), ValueOf(r, me.sequence, 0), "a partial sum", me);
}

void CheckHashes(Rank& me) {
  for (int r = 0; r < me.world->size; r++) {
    if (r != me.rank) Expect(me.comm->PayloadOf(r, kLane, me.sequence).words[1], ValueOf(r, me.sequence, 0), "a hash", me);
  }
}

// True when all go on without another message.
[[gnu::noinline]] bool Logits(Rank& me, bool wants_on) {
  Communicator* communicator_ = me.comm;
  StoreLine(communicator_->Slot(me.rank, me.sequence + 1), ValueOf(me.rank, me.sequence + 1, 0));
  FlagPayload payload;
  payload.words[0] = me.rank == 0 && wants_on ? 1 : 0;
  payload.words[1] = ValueOf(me.rank, me.sequence + 1, 0);
  Exchange(me, CollectiveOp::kAllGather, payload);
  CheckHashes(me);
  const bool goes_on = me.rank == 0 ? wants_on : communicator_->PayloadOf(0, kLane, me.sequence).words[0] != 0;
  for (int r = 0; r < me.world->size; r++) Expect(LoadLine(communicator_->Slot(r, me.sequence)), ValueOf(r, me.sequence, 0), "a candidate", me);
  return goes_on;
}

[[gnu::noinline]] bool RunStep(Rank& me, int sums, bool has_candidates, bool wants_on) {
  Communicator* communicator_ = me.comm;
  Check(communicator_->Acquire(kLane, me.sequence + 1, Deadline::AfterMs(60'000)));
  for (int i = 0; i < sums; i++) Sum(me);
  const bool goes_on = has_candidates && Logits(me, wants_on);
  communicator_->Consumed(kLane, me.sequence);
  return goes_on;
}

void Program(Rank& me, const std::string& script) {
  me.sequence = 0;
  for (char letter : script) {
    me.rank == 0 ? Broadcast(me) : Receive(me);
    if (letter >= '1' && letter <= '3') RunStep(me, letter - '0', false, false);
    if (letter == 'p' || letter == 'a') {
      bool wants_on = letter == 'a';
      while (RunStep(me, 1, true, wants_on)) wants_on = false;
    }
    tso::Note(++me.call);
  }
  me.comm->Close();
}

}  // namespace runner

tso::Report ExploreRanks(const Scenario& scenario, const tso::Options& options) {
  tso::Reset();
  World world;
  world.size = scenario.size;
  world.config.world_size = scenario.size;
  world.config.slot_bytes = kMaxLines * kLine;
  world.config.spin_us = scenario.spin ? 1000 : 0;
  world.config.yields = 0;
  const size_t nbytes = Communicator::ArenaBytes(world.config), slots = nbytes - 2 * kPageBytes;
  world.arenas.resize(static_cast<size_t>(scenario.size));
  world.tensors.resize(static_cast<size_t>(scenario.size));
  world.parts.resize(static_cast<size_t>(scenario.size));
  world.output_parts.resize(static_cast<size_t>(scenario.size));
  const bool is_channel = scenario.family == "channel";
  for (int r = scenario.size - 1; r >= 0; r--) {
    Arena& arena = world.arenas[static_cast<size_t>(r)];
    Arena& tensor = world.tensors[static_cast<size_t>(r)];
    // Both heads of a channel lie in one arena, the receiver's first, as comm/channels.cpp has them.
    if (!is_channel) Check(Arena::CreateLocal(nbytes, &arena));
    else if (r == 1) Check(Arena::CreateLocal(Communicator::HeadBytes(world.config) + nbytes, &arena));
    else arena = Arena::View(world.arenas[1], Communicator::HeadBytes(world.config));
    Check(Arena::CreateLocal(kResult + kMaxLines * kLine, &tensor));
    world.parts[static_cast<size_t>(r)] = tensor.data();
    world.output_parts[static_cast<size_t>(r)] = tensor.data() + kResult;
    tso::Share(arena.data(), is_channel && r == 1 ? Communicator::HeadBytes(world.config) : arena.size(), [=](size_t offset) { return NameOfArenaWord(r, offset, slots); });
    tso::Ignore(arena.data() + kRecorderOffset, kRecorderBytes);
    const auto* control = reinterpret_cast<const ControlPage*>(arena.data());
    tso::Alarm(&control->abort.state, [control] { return std::string(control->abort.text); });
    tso::Share(tensor.data(), tensor.size(), [r](size_t offset) {
      const std::string owner = "rank " + std::to_string(r);
      if (offset >= kResult) return owner + "'s output, line " + std::to_string((offset - kResult) / kLine);
      return owner + (offset == kMark ? "'s last barrier" : "'s tensor, line " + std::to_string(offset / kLine));
    });
  }
  for (int r = 0; r < scenario.size; r++) {
    CommConfig config = world.config;
    config.rank = r;
    Rank* me = nullptr;
    {
      const tso::PrivateHeap heap(r);  // where all of this stays
      std::vector<Arena> views;
      for (const Arena& arena : world.arenas) views.push_back(Arena::View(arena));
      me = new Rank{};
      std::unique_ptr<Communicator> comm;
      Check(Communicator::Create(config, std::move(views), std::vector<PeerProcess>(static_cast<size_t>(scenario.size)), &comm));
      me->rank = r;
      me->world = &world;
      me->comm = comm.release();
      PlanBatches(*me);
    }
    tso::Spawn([me, &scenario] {
      scenario.family == "runner" ? runner::Program(*me, scenario.script) : GroupProgram(*me, scenario.script);
    });
  }
  return tso::Explore(options);
}

// ---- messages that cross --------------------------------------------------------------------------------------------------------
//
// Two ranks call sendRecvSync with each other, as CommHandle does it. A script has two digits a call: the chunks of what rank 0 and rank 1 send. What a send cannot
// do without waiting is the business of its channel's thread: fibers 0 and 1 are the callers, 2 and 3 the threads of what they send. Whoever is
// told that a message is ready must not wait in it: it has a deadline that has passed. Private memory is a fiber's own, so caller and thread
// each have a communicator over the same flags; one knows less than it might, and asks.

namespace messages {

// From a caller to its thread and back: a job of the thread, call << 1 | whether it has started; the jobs that are done.
struct Desk {
  alignas(kLine) uint64_t posted;
  alignas(kLine) uint64_t done;
};
constexpr uint64_t kNoMore = ~uint64_t{0};

struct Fiber {
  Rank rank;  // its comm: the channel to the peer
  Communicator* from = nullptr;
  uint64_t from_sequence = 1;
  Desk* desk = nullptr;
};

uint64_t LoadOther(const uint64_t& word, uint64_t seen) {
  for (;;) {
    const uint64_t value = tso::Load(&word, 8);
    if (value != seen) return value;
    tso::Pause();
  }
}

size_t ChunksOf(const std::string& script, uint64_t call, int sender) { return static_cast<size_t>(script[2 * call + static_cast<size_t>(sender)] - '0'); }

Operation MessageOf(Rank& me, size_t chunks, uint64_t sequence) {
  Operation operation;
  operation.op = CollectiveOp::kMessage;
  operation.data = me.data;
  operation.chunk_bytes = kLine;
  operation.count = chunks * kLine / sizeof(float);
  operation.sequence = sequence;
  return operation;
}

void Fill(Rank& me, size_t chunks) {
  for (size_t line = 0; line < chunks; line++) StoreLine(me.data + line * kLine, ValueOf(me.rank, me.call, line));
}

Deadline DeadlineOf(bool is_ready) { return Deadline::AfterMs(is_ready ? 0 : 60'000); }

[[gnu::noinline]] void SendRecv(Fiber& fiber, const std::string& script) {
  Rank& me = fiber.rank;
  const size_t chunks = ChunksOf(script, me.call, me.rank), chunks_here = ChunksOf(script, me.call, 1 - me.rank);
  const Operation sent = MessageOf(me, chunks, me.sequence), received = MessageOf(me, chunks_here, fiber.from_sequence);
  const OperationContext to = {me.comm, &Reduce, &Copy, 0}, from = {fiber.from, &Reduce, &Copy, 0};
  Fill(me, chunks);
  const bool has_started = TryStart(to, sent);
  const bool is_quick = has_started && IsReady(to, sent);
  if (has_started && !is_quick && chunks == 1) tso::Violate("unready", "a message that lies in its slot is not through");
  const uint64_t job = (me.call + 1) << 1 | (has_started ? 1 : 0);
  if (is_quick) Check(Finish(to, sent, has_started, DeadlineOf(is_quick)));
  else tso::StoreLocked(&fiber.desk->posted, job, 8);
  std::memset(me.data, 0, sizeof me.data);

  const bool is_here = TryStart(from, received);
  Check(Finish(from, received, is_here, DeadlineOf(is_here && IsReady(from, received))));
  for (size_t line = 0; line < chunks_here; line++) Expect(LoadLine(me.data + line * kLine), ValueOf(1 - me.rank, me.call, line), "a message", me);
  if (!is_quick) {
    while (tso::Load(&fiber.desk->done, 8) != job) tso::Pause();
  }
  std::memset(me.data, 0, sizeof me.data);
  me.sequence += chunks;
  fiber.from_sequence += chunks_here;
}

void Caller(Fiber& fiber, const std::string& script) {
  Rank& me = fiber.rank;
  while (2 * me.call < script.size()) {
    SendRecv(fiber, script);
    tso::Note(++me.call);
  }
  tso::StoreLocked(&fiber.desk->posted, kNoMore, 8);
  me.comm->Close();
  fiber.from->Close();
}

void Thread(Fiber& fiber, const std::string& script) {
  Rank& me = fiber.rank;
  uint64_t job = 0;
  while ((job = LoadOther(fiber.desk->posted, job)) != kNoMore) {
    for (; me.call + 1 < job >> 1; me.call++) me.sequence += ChunksOf(script, me.call, me.rank);
    const size_t chunks = ChunksOf(script, me.call, me.rank);
    Fill(me, chunks);
    Check(Finish({me.comm, &Reduce, &Copy, 0}, MessageOf(me, chunks, me.sequence), (job & 1) != 0, DeadlineOf(false)));
    std::memset(me.data, 0, sizeof me.data);
    tso::StoreLocked(&fiber.desk->done, job, 8);
  }
}

tso::Report Explore(const Scenario& scenario, const tso::Options& options) {
  tso::Reset();
  CommConfig config;
  config.world_size = 2;
  config.slot_bytes = kLine;
  config.spin_us = scenario.spin ? 1000 : 0;
  config.yields = 0;
  const size_t nbytes = Communicator::ArenaBytes(config), slots = nbytes - 2 * kPageBytes, head = Communicator::HeadBytes(config);
  Arena arenas[2][2];  // [rank that sends][as its communicator counts], as ExploreRanks has those of a channel
  Desk desks[2] = {};
  for (int sender = 0; sender < 2; sender++) {
    Arena& receivers = arenas[sender][1];
    Check(Arena::CreateLocal(head + nbytes, &receivers));
    arenas[sender][0] = Arena::View(receivers, head);
    for (int r = 1; r >= 0; r--) {
      Arena& arena = arenas[sender][r];
      const std::string channel = "from " + std::to_string(sender) + ": ";
      tso::Share(arena.data(), r == 1 ? head : arena.size(), [=](size_t offset) { return channel + NameOfArenaWord(r, offset, slots); });
      tso::Ignore(arena.data() + kRecorderOffset, kRecorderBytes);
      const auto* control = reinterpret_cast<const ControlPage*>(arena.data());
      tso::Alarm(&control->abort.state, [control] { return std::string(control->abort.text); });
    }
    tso::Share(&desks[sender], sizeof(Desk), [=](size_t offset) { return (offset == 0 ? "a job of rank " : "the jobs done of rank ") + std::to_string(sender); });
  }
  const auto open = [&](int sender, int as, Communicator** opened) {
    CommConfig mine = config;
    mine.rank = as;
    std::vector<Arena> views;
    for (const Arena& arena : arenas[sender]) views.push_back(Arena::View(arena));
    std::unique_ptr<Communicator> made;
    Check(Communicator::Create(mine, std::move(views), std::vector<PeerProcess>(2), &made));
    *opened = made.release();
  };
  for (int f = 0; f < 4; f++) {
    const int rank = f % 2;
    const bool is_caller = f < 2;
    Fiber* fiber = nullptr;
    {
      const tso::PrivateHeap heap(f);
      fiber = new Fiber{};
      fiber->rank.rank = rank;
      fiber->desk = &desks[rank];
      open(rank, 0, &fiber->rank.comm);
      if (is_caller) open(1 - rank, 1, &fiber->from);
    }
    tso::Spawn([fiber, is_caller, &scenario] { is_caller ? Caller(*fiber, scenario.script) : Thread(*fiber, scenario.script); });
  }
  return tso::Explore(options);
}

}  // namespace messages

// ---- the pool ------------------------------------------------------------------------------------------------------------------
//
// A script has a letter a job of the leader: the number of barriers that the team meets at, or s, where the last thread stops the
// job while the others wait at one.

struct Board {
  alignas(64) uint64_t job;                // the leader writes it before Run, all read it
  alignas(64) uint64_t mark[4];            // thread t says how far it is
};

struct Job {
  Board* board;
  Pool* pool;
  const std::string* script;
  void operator()(int thread) const {
    const uint64_t job = tso::Load(&board->job, 8);
    const uint64_t before = tso::Load(&board->mark[thread], 8);
    const std::string name = "thread " + std::to_string(thread);
    if (before / 16 + 1 != job) tso::Violate("wrong job", name + " got job " + std::to_string(job) + " after " + std::to_string(before / 16));
    const char letter = (*script)[job - 1];
    if (letter == 's') {
      tso::Store(&board->mark[thread], job * 16, 8);
      if (thread == pool->size() - 1) return pool->Stop();
      if (pool->Barrier(thread)) tso::Violate("barrier", "a barrier opened though not all had come");
      return;
    }
    const int barriers = letter - '0';
    for (int barrier = 0; barrier <= barriers; barrier++) {
      const uint64_t mine = job * 16 + static_cast<uint64_t>(barrier);
      tso::Store(&board->mark[thread], mine, 8);
      if (barrier == barriers) break;
      if (!pool->Barrier(thread)) tso::Violate("stopped", "a barrier let go though nobody stopped the job");
      for (int other = 0; other < pool->size(); other++) {
        const uint64_t theirs = tso::Load(&board->mark[other], 8);
        if (theirs != mine && theirs != mine + 1) {
          tso::Violate("barrier", name + " is past barrier " + std::to_string(barrier) + " of job " + std::to_string(job) + ", thread " +
                                      std::to_string(other) + " at " + std::to_string(theirs % 16) + " of job " + std::to_string(theirs / 16));
        }
      }
    }
  }
};

std::string NameOfPoolWord(size_t offset) {
  // epoch_, done_, phase_ and arrived_ are its last four lines.
  static const char* const kNames[] = {"epoch", "done", "phase", "arrived"};
  const size_t lines = sizeof(Pool) - 4 * kLine;
  if (offset < lines) return "flag at " + std::to_string(offset) + " of the pool";
  const size_t line = (offset - lines) / kLine;
  return std::string(kNames[line]) + (line == 3 ? "" : offset % kLine == 0 ? ".value" : ".sleepers");
}

tso::Report ExplorePool(const Scenario& scenario, const tso::Options& options) {
  tso::Reset();
  Board board{};
  Job job{&board, nullptr, &scenario.script};
  alignas(64) static std::byte memory[sizeof(Pool)];
  std::memset(memory, 0, sizeof memory);
  tso::Share(memory, sizeof memory, NameOfPoolWord);
  tso::Share(&board, sizeof board, [](size_t offset) {
    return offset < kLine ? std::string("the job") : "mark of thread " + std::to_string((offset - kLine) / 8);
  });
  // Thread 0, the leader, is spawned first; the pool spawns the others.
  tso::Spawn([&] {
    for (int number = 0; number < static_cast<int>(scenario.script.size()); number++) {
      tso::Note(number);
      tso::Store(&board.job, static_cast<uint64_t>(number) + 1, 8);
      job.pool->Run(job);
      const char letter = scenario.script[static_cast<size_t>(number)];
      const uint64_t expected = static_cast<uint64_t>(number + 1) * 16 + static_cast<uint64_t>(letter == 's' ? 0 : letter - '0');
      for (int thread = 0; thread < scenario.size; thread++) {
        if (tso::Load(&board.mark[thread], 8) == expected) continue;
        tso::Violate("unfinished", "Run returned before thread " + std::to_string(thread) + " was done");
      }
    }
    job.pool->~Pool();
  });
  job.pool = new (memory) Pool(std::vector<int>(static_cast<size_t>(scenario.size), 0), scenario.spin ? 1000 : 0);
  return tso::Explore(options);
}

tso::Report Explore(const Scenario& scenario, uint64_t max_states = 1'000'000'000) {
  tso::Options options;
  options.has_spurious_wakes = scenario.spurious;
  options.is_reduced = !scenario.unreduced;
  options.max_states = max_states;
  if (scenario.family == "messages") return messages::Explore(scenario, options);
  return scenario.family == "pool" ? ExplorePool(scenario, options) : ExploreRanks(scenario, options);
}

std::string NameOf(const Scenario& scenario) {
  return scenario.family + " " + std::to_string(scenario.size) + " " + scenario.script + (scenario.spin ? " spin" : "") +
         (scenario.spurious ? " spurious" : "") + (scenario.unreduced ? " unreduced" : "");
}

// ---- sets -----------------------------------------------------------------------------------------------------------------------

struct Block {
  std::string title;
  std::vector<Scenario> scenarios;
  bool is_compared = false;  // with the search that leaves nothing out
};

std::vector<std::string> ScriptsOf(const std::string& letters, int length) {
  std::vector<std::string> scripts = {""};
  for (int i = 0; i < length; i++) {
    std::vector<std::string> longer;
    for (const std::string& script : scripts) {
      for (char letter : letters) longer.push_back(script + letter);
    }
    scripts = std::move(longer);
  }
  return scripts;
}

Block BlockOf(std::string title, const std::string& family, int size, const std::vector<std::string>& scripts, bool spurious = false,
              bool spin = false) {
  Block block{std::move(title), {}};
  for (const std::string& script : scripts) block.scenarios.push_back({family, size, script, spin, spurious});
  return block;
}

// Two generations of slots make what lies two calls apart meet; a broadcast in between is no meeting of all ranks.
std::vector<std::string> Apart(const std::string& letters, const std::string& between) {
  std::vector<std::string> scripts;
  for (char first : letters) {
    for (char middle : between) {
      for (char last : letters) scripts.push_back({first, middle, last});
    }
  }
  return scripts;
}

std::vector<std::string> Beside(const std::string& letters, const std::string& others) {
  std::vector<std::string> scripts;
  for (char letter : letters) {
    for (char other : others) {
      scripts.push_back({letter, other});
      if (others.find(letter) == std::string::npos) scripts.push_back({other, letter});
    }
  }
  return scripts;
}

std::vector<Block> Quick() {
  const std::vector<std::string> mixes = {"hhhhh", "shsrs", "ooooo", "xxxxx", "xyxyx", "otpgb", "xoxtx", "pxpyg", "gTxOy", "bxbyo"};
  std::vector<Block> blocks = {
      BlockOf("2 ranks, every script of 2 calls", "group", 2, ScriptsOf("botpgxyrhscaOTGRHSCA", 2)),
      BlockOf("2 ranks, results apart and parts of any sizes", "group", 2, Apart("qvox", "qvx")),
      BlockOf("2 ranks, batches", "group", 2, Apart("kKox", "kKx")),
      BlockOf("a channel", "channel", 2, {"m", "M", "mmmm", "MmM", "mMMm"}, true),
      BlockOf("messages that cross", "messages", 2, {"11", "21", "22", "41", "51", "1111"}, true),
      BlockOf("2 ranks, calls two apart", "group", 2, Apart("botgxyrhsca", "x")),
      BlockOf("2 ranks, calls two apart, a gather between", "group", 2, Apart("oghsx", "h")),
      BlockOf("2 ranks, every script of 2 calls, tensors first or last", "group", 2, Beside("ln21ijfwdeLNIJFWDE", "bxW")),
      BlockOf("2 ranks, 5 calls of tensors", "group", 2, {"iiiii", "jjjjj", "wwwww", "f1f1f", "ln2ln", "diewj", "xwixj", "IJWLE"}),
      BlockOf("3 ranks, calls of tensors", "group", 3, {"ii", "jj", "ww", "11", "l", "fw", "e", "d"}),
      BlockOf("2 ranks, 5 calls", "group", 2, mixes),
      BlockOf("2 ranks, 5 calls, spurious wake-ups", "group", 2, mixes, true),
      BlockOf("2 ranks, 5 calls, spinning", "group", 2, mixes, false, true),
      BlockOf("3 ranks, 3 calls", "group", 3, {"bbb", "ooo", "ttt", "ppp", "ggg", "xyz", "oxo", "tbp", "hh", "ss", "rr", "ca", "hso", "qq", "v"}),
      BlockOf("the runner on 2 ranks", "runner", 2, {"m1m2", "p1m3", "mmm1mm", "1p2", "aa", "ma1a"}, true),
      BlockOf("the runner on 3 ranks", "runner", 3, {"mmm", "m1m", "p", "a"}),
      BlockOf("the pool, 2 threads, every script of 3 jobs", "pool", 2, ScriptsOf("012s", 3), true),
      BlockOf("the pool, 3 threads", "pool", 3, {"1", "00", "s", "s1"}, true),
  };
  for (Block compared : {BlockOf("2 ranks, with and without reduction", "group", 2, {"oo", "xyx", "tg", "pb"}, true),
                         BlockOf("the runner, the pool and messages, with and without reduction", "runner", 2, {"m1", "p"})}) {
    compared.is_compared = true;
    blocks.push_back(std::move(compared));
  }
  blocks.back().scenarios.push_back({"pool", 2, "12"});
  blocks.back().scenarios.push_back({"messages", 2, "21"});
  blocks.back().scenarios.push_back({"pool", 3, "1"});
  return blocks;
}

std::vector<Block> Long() {
  std::vector<Block> blocks = {
      BlockOf("2 ranks, every script of 3 calls, spurious wake-ups", "group", 2, ScriptsOf("botupgxyOTGXY", 3), true),
      BlockOf("2 ranks, every script of 3 calls on parts, spurious wake-ups", "group", 2, ScriptsOf("rhscaoxHSA", 3), true),
      BlockOf("2 ranks, every script of 3 calls, results apart and parts of any sizes, spurious wake-ups", "group", 2, ScriptsOf("qvpoxh", 3), true),
      BlockOf("2 ranks, every script of 3 calls with batches, spurious wake-ups", "group", 2, ScriptsOf("kKxoh", 3), true),
      BlockOf("a channel, every script of 6 messages, spurious wake-ups", "channel", 2, ScriptsOf("mM", 6), true),
      BlockOf("messages that cross, spurious wake-ups", "messages", 2, {"32", "33", "42", "1221", "2211", "111111"}, true),
      BlockOf("messages that cross", "messages", 2, {"44", "54", "2222", "3131", "4114"}),
      BlockOf("2 ranks, every script of 3 calls of tensors, spurious wake-ups", "group", 2, ScriptsOf("ln21ijfwxE", 3), true),
      BlockOf("2 ranks, every script of 4 calls of tensors", "group", 2, ScriptsOf("ijwxp", 4)),
      BlockOf("3 ranks, every script of 2 calls of tensors", "group", 3, ScriptsOf("1ijfwex", 2)),
      BlockOf("2 ranks, every script of 4 calls", "group", 2, ScriptsOf("botpgxy", 4)),
      BlockOf("2 ranks, every script of 4 calls, spinning", "group", 2, ScriptsOf("botpgxy", 4), false, true),
      BlockOf("2 ranks, 8 calls, spurious wake-ups", "group", 2, {"oxoyoxoy", "tpgbxyto", "xxxxyyyy", "TOGXYbpu", "ppxppypp"}, true),
      BlockOf("3 ranks, every script of 2 calls", "group", 3, ScriptsOf("botupgxzO", 2)),
      BlockOf("3 ranks, every script of 2 calls on parts", "group", 3, ScriptsOf("rhscaox", 2)),
      BlockOf("3 ranks, calls two apart", "group", 3, Apart("opgz", "x")),
      BlockOf("3 ranks, 5 calls", "group", 3, {"ooooo", "bbbbb", "ggggg", "xxxxx", "xyzxy", "xoxox", "oxgyb"}),
      BlockOf("3 ranks, spurious wake-ups", "group", 3, {"oo", "bxb", "xyz", "gxg", "tx", "px"}, true),
      BlockOf("3 ranks, spinning", "group", 3, {"ooooo", "xyzxyzxyz", "oxtyg", "ppxpp", "TxOyG"}, false, true),
      BlockOf("the runner on 2 ranks, every script of 4 messages", "runner", 2, ScriptsOf("m12pa", 4)),
      BlockOf("the runner on 2 ranks, every script of 3 messages, spurious wake-ups", "runner", 2, ScriptsOf("m12pa", 3), true),
      BlockOf("the runner on 3 ranks", "runner", 3, {"mmmmm", "m1m2", "1m1", "2mm1", "pp", "am1"}),
      BlockOf("the pool, 2 threads, every script of 5 jobs", "pool", 2, ScriptsOf("012s", 5), true),
      BlockOf("the pool, 3 threads, every script of 2 jobs", "pool", 3, ScriptsOf("012s", 2)),
      BlockOf("the pool, 3 threads, spurious wake-ups", "pool", 3, {"12", "20", "010", "s2"}, true),
  };
  for (Block compared : {BlockOf("2 ranks, with and without reduction", "group", 2, ScriptsOf("botupgxyOTGXY", 2), true),
                         BlockOf("3 ranks, with and without reduction", "group", 3, {"xyz", "b", "o", "p", "xg"}),
                         BlockOf("the runner, with and without reduction", "runner", 2, ScriptsOf("m12pa", 2), true),
                         BlockOf("the pool, with and without reduction", "pool", 3, ScriptsOf("01s", 2), true)}) {
    compared.is_compared = true;
    blocks.push_back(std::move(compared));
  }
  return blocks;
}

bool RunSet(const std::vector<Block>& blocks, size_t part, size_t parts) {
  size_t number = 0, scenarios = 0;
  uint64_t states = 0;
  for (const Block& block : blocks) {
    const std::clock_t start = std::clock();
    size_t count = 0;
    uint64_t sum = 0, most = 0;
    for (const Scenario& scenario : block.scenarios) {
      if (number++ % parts != part) continue;
      const tso::Report report = Explore(scenario);
      if (!report.is_clean) {
        std::printf("%s\nviolation: %s\n%s", NameOf(scenario).c_str(), report.violation.c_str(), report.trace.c_str());
        return false;
      }
      count++;
      sum += report.states;
      most = std::max(most, report.states);
      if (!block.is_compared) continue;
      Scenario whole = scenario;
      whole.unreduced = true;
      const tso::Report other = Explore(whole);
      sum += other.states;
      // Every transition of every thread must show up in both.
      if (!other.is_clean || other.images != report.images || other.transitions != report.transitions) {
        std::printf("violation: the reduction loses something of %s\n", NameOf(scenario).c_str());
        return false;
      }
    }
    scenarios += count;
    states += sum;
    if (count == 0) continue;
    std::printf("%-66s %5zu scenarios %10llu states, at most %9llu, %6.1f s\n", block.title.c_str(), count, static_cast<unsigned long long>(sum),
                static_cast<unsigned long long>(most), static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    std::fflush(stdout);
  }
  std::printf("ok, %zu scenarios, %llu states\n", scenarios, static_cast<unsigned long long>(states));
  return true;
}

bool RunOne(const Scenario& scenario) {
  tso::Report report = Explore(scenario);
  std::printf("%s: %llu states, %llu steps, %llu images, %llu transitions, %d passes\n", NameOf(scenario).c_str(),
              static_cast<unsigned long long>(report.states), static_cast<unsigned long long>(report.steps),
              static_cast<unsigned long long>(report.images), static_cast<unsigned long long>(report.transitions), report.passes);
  if (report.is_clean) return true;
  // The search that leaves nothing out has the shortest trace, if it is not too large.
  Scenario whole = scenario;
  whole.unreduced = true;
  if (tso::Report other = Explore(whole, 2'000'000); other.violation.find("too large") != 0) report = std::move(other);
  std::printf("violation: %s\n%s", report.violation.c_str(), report.trace.c_str());
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "quick" || what == "long") {
    size_t part = 0, parts = 1;
    if (argc > 2 && (std::sscanf(argv[2], "%zu/%zu", &part, &parts) != 2 || part >= parts)) return 2;
    return RunSet(what == "quick" ? Quick() : Long(), part, parts) ? 0 : 1;
  }
  if (argc < 4) return 2;
  Scenario scenario{what, std::atoi(argv[2]), argv[3]};
  for (int i = 4; i < argc; i++) {
    const std::string option = argv[i];
    if (option == "spin") scenario.spin = true;
    else if (option == "spurious") scenario.spurious = true;
    else if (option == "unreduced") scenario.unreduced = true;
    else if (option.rfind("mutant=", 0) == 0) tso::mutant = std::atoi(option.c_str() + 7);
    else return 2;
  }
  return RunOne(scenario) ? 0 : 1;
}
