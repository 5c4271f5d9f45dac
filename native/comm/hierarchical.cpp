#include "comm/hierarchical.h"

#include <algorithm>
#include <cstring>

#include "comm/leg.h"
#include "comm/parts.h"

namespace tilerank {

namespace {

// Whoever waits for the culprit itself gives up first and says so: a rank that meets its node before anything has gone over the network.
// These wait for that verdict: at the network, and in the node for a rank that waits at the network.
constexpr int64_t kNetworkGraceMs = 100, kNodeGraceMs = 250;
// Slices are whole lines of the smallest element, so that no line of a slot has two writers.
constexpr size_t kSliceElements = 64;
// Elements that are finished at a time, and for which there is room on the stack: whole groups.
constexpr size_t kFinishBlock = 1024;
static_assert(kFinishBlock % kQ8Group == 0 && kSliceElements % kQ8Group == 0);
// Chunks between the begin of one and its end: while one is on its way the next is reduced.
constexpr uint64_t kLag = 2;

size_t RoundUp(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
size_t RoundDown(size_t value, size_t unit) { return value / unit * unit; }

// min, max and bits of partial results are elements themselves, and so is what a single rank contributes.
bool IsExact(ReduceOp op) { return op != ReduceOp::kSum && op != ReduceOp::kProd && op != ReduceOp::kAvg; }

/// A call under way on this rank.
class Call {
 public:
  Call(NetworkContext& context, const Operation& operation, uint64_t number, const Deadline& deadline)
      : context_(context), operation_(operation), deadline_(deadline), node_deadline_(deadline.Later(kNodeGraceMs)), fabric_(*context.local.fabric), net_(*context.transport),
        at_(*context.layout), element_(static_cast<size_t>(ElementBytes(operation.dtype))),
        leg_(fabric_, net_, at_.rank, {number, MakeTag(operation, Variant(operation) | static_cast<int>(operation.reduce_op) << 8), 0}, deadline.Later(kNetworkGraceMs)) {}

  Status Run() {
    const size_t least = kSliceElements * sizeof(uint64_t) * static_cast<size_t>(at_.rails());
    if (operation_.chunk_bytes < least) {
      return Status(Code::kInvalidArgument, "a group on these nodes needs chunks of at least " + std::to_string(least) + " bytes; this one's have " +
                                                std::to_string(operation_.chunk_bytes));
    }
    net_.Enter(leg_.TagOf(0));
    switch (operation_.op) {
      case CollectiveOp::kAllReduce: return AllReduce();
      case CollectiveOp::kReduce: return Reduce();
      case CollectiveOp::kBroadcast: return Broadcast();
      case CollectiveOp::kAllGather: return AllGather();
      case CollectiveOp::kGather: return Gather();
      case CollectiveOp::kScatter: return Scatter();
      case CollectiveOp::kReduceScatter: return ReduceScatter();
      case CollectiveOp::kAllToAll: return AllToAll();
      case CollectiveOp::kBarrier: return Barrier();
      default: return Status(Code::kUnsupported, std::string(NameOf(operation_.op)) + " is not for groups on several nodes");
    }
  }

 private:
  // Nodes that chose different algorithms are told so.
  static int Variant(const Operation& operation) { return operation.op == CollectiveOp::kAllReduce ? operation.algorithm : operation.root; }

  // A range of elements.
  struct Range {
    size_t begin, count;
  };

  int world() const { return at_.world_size(); }
  int locals() const { return fabric_.world_size(); }
  bool is_alone() const { return locals() == 1; }
  bool IsLocal(int rank) const { return at_.node_of[static_cast<size_t>(rank)] == at_.node; }
  int LocalOf(int rank) const { return at_.local_of[static_cast<size_t>(rank)]; }
  std::byte* output() const { return operation_.output != nullptr ? operation_.output : operation_.data; }

  // ---- the node's stage

  std::byte* NextSlot() { return fabric_.Slot(fabric_.rank(), context_.next_generation); }

  // What was put into NextSlot() stands: waits until the same is true of all ranks of the node. Their slots are readable until the next.
  Status Meet(int phase, uint64_t* generation, bool is_first = false) {
    *generation = context_.next_generation++;
    const OpTag tag = MakeTag(operation_, phase << 12 | static_cast<int>(operation_.reduce_op) << 8 | operation_.root);
    fabric_.Publish(context_.local.lane, *generation, tag);
    return fabric_.Await(context_.local.lane, *generation, tag, is_first ? deadline_ : node_deadline_);
  }

  void Copy(std::byte* to, const std::byte* from, size_t nbytes) const {
    if (nbytes > 0 && to != from) context_.local.copy(to, from, nbytes);
  }

  // ---- the network's stage

  // Chunks and pieces have up to three frames between two ranks.
  static uint64_t PartNumber(uint64_t part, int stage) { return part << 2 | static_cast<uint64_t>(stage); }

  Status Send(int peer, uint64_t part, const std::byte* data, size_t nbytes) {
    std::byte* room;
    if (Status s = leg_.Room(peer, PartNumber(part, 0), &room); !s.ok()) return s;
    Copy(room, data, nbytes);
    leg_.Post(peer, PartNumber(part, 0), nbytes);
    return Status::Ok();
  }

  Status Room(int peer, uint64_t part, std::byte** room) { return leg_.Room(peer, PartNumber(part, 0), room); }
  void Post(int peer, uint64_t part, int stage, size_t nbytes) { leg_.Post(peer, PartNumber(part, stage), nbytes); }
  Status Receive(int peer, uint64_t part, int stage, size_t nbytes, const std::byte** data) {
    return leg_.Receive(peer, PartNumber(part, stage), nbytes, data);
  }

  // ---- reductions

  // What goes over the network of an element: itself where nothing is lost by that, else what stands before the rounding.
  bool is_raw() const { return at_.is_one_rank_a_node() || IsExact(operation_.reduce_op) || PartialBytes(operation_.dtype, operation_.reduce_op) == ElementBytes(operation_.dtype); }
  bool is_q8() const { return operation_.wire == Wire::kQ8; }
  // Of partial results, and of what the second step carries.
  size_t PartialFrameBytes(size_t count) const { return is_q8() ? Q8Bytes(count) : count * WireBytes(); }
  size_t FinalFrameBytes(size_t count) const { return is_q8() ? Q8Bytes(count) : count * element_; }
  size_t WireBytes() const { return is_raw() ? element_ : static_cast<size_t>(PartialBytes(operation_.dtype, operation_.reduce_op)); }

  // Of this node's ranks: sources are elements.
  void ReduceNode(std::byte* to, const void* const* sources, size_t count) const {
    if (count == 0) return;
    if (is_q8()) return context_.reduce_to_q8(to, sources, locals(), operation_.dtype, count);
    const bool is_mean = operation_.reduce_op == ReduceOp::kAvg;
    // The mean of one rank's elements is not taken yet; of more it travels as a partial result or, f32 and f64, as the sum that it is.
    const ReduceOp op = is_mean && is_raw() ? ReduceOp::kSum : operation_.reduce_op;
    const ReduceStage stage = is_raw() ? ReduceStage::kWhole : ReduceStage::kPartial;
    context_.reduce_staged(to, sources, locals(), operation_.dtype, op, stage, 1, count);
  }

  // Of the nodes' results, in node order.
  void ReduceNodes(std::byte* to, const void* const* sources, size_t count) const {
    if (count == 0) return;
    if (is_q8()) return context_.reduce_from_q8(to, sources, at_.num_nodes(), operation_.dtype, Divisor(), count);
    // Elements as partial results, where both are the same; the mean of elements counts sources that are one rank each.
    const bool is_whole = is_raw() && WireBytes() != static_cast<size_t>(PartialBytes(operation_.dtype, operation_.reduce_op));
    context_.reduce_staged(to, sources, at_.num_nodes(), operation_.dtype, operation_.reduce_op, is_whole ? ReduceStage::kWhole : ReduceStage::kFinal, world(), count);
  }

  int32_t Divisor() const { return operation_.reduce_op == ReduceOp::kAvg ? world() : 1; }

  // As ReduceNodes, for the second step.
  void FinishNodes(std::byte* to, const void* const* sources, size_t count) const {
    if (!is_q8()) return ReduceNodes(to, sources, count);
    float sums[kFinishBlock];
    const void *parts[kMaxWorldSize], *whole = sums;
    for (size_t at = 0; at < count; at += kFinishBlock) {
      const size_t n = std::min(kFinishBlock, count - at);
      for (int node = 0; node < at_.num_nodes(); node++) parts[node] = static_cast<const std::byte*>(sources[node]) + Q8Bytes(at);
      context_.reduce_from_q8(sums, parts, at_.num_nodes(), DType::kF32, Divisor(), n);
      context_.reduce_to_q8(to + Q8Bytes(at), &whole, 1, DType::kF32, n);
    }
  }

  // What the second step brought.
  void TakeFinal(std::byte* to, const std::byte* data, size_t count) const {
    const void* source = data;
    if (!is_q8()) return Copy(to, data, count * element_);
    if (count > 0) context_.reduce_from_q8(to, &source, 1, operation_.dtype, 1, count);
  }

  // This node's ranks at an offset of their slots; own elements stand in data as well, which is nearer.
  void NodeSources(const void** sources, uint64_t generation, size_t slot_offset, const std::byte* own) const {
    for (int local = 0; local < locals(); local++) sources[local] = local == fabric_.rank() ? own : fabric_.Slot(local, generation) + slot_offset;
  }

  // ---- allReduce

  struct Slices {
    int rails;
    size_t chunk;   // elements of a whole one
    uint64_t chunks;
    bool is_two_step;
  };

  Slices SlicesOf() const {
    const auto algorithm = static_cast<NetworkAlgorithm>(operation_.algorithm);
    Slices slices;
    slices.rails = algorithm == NetworkAlgorithm::kLeader ? 1 : at_.rails();
    slices.is_two_step = algorithm == NetworkAlgorithm::kTwoStep;
    const auto rails = static_cast<size_t>(slices.rails);
    size_t slice = RoundDown(is_q8() ? net_.frame_bytes() / kQ8GroupBytes * kQ8Group : net_.frame_bytes() / WireBytes(), kSliceElements);
    if (slices.is_two_step) slice *= static_cast<size_t>(at_.num_nodes());
    // Wherever some node has several ranks a chunk fits a slot.
    if (!at_.is_one_rank_a_node()) slice = std::min(slice, RoundDown(operation_.chunk_bytes / element_ / rails, kSliceElements));
    slices.chunk = std::max(slice, kSliceElements) * rails;
    slices.chunks = std::max<uint64_t>(1, (operation_.count + slices.chunk - 1) / slices.chunk);
    return slices;
  }

  Range ChunkOf(const Slices& slices, uint64_t chunk) const {
    const size_t begin = std::min(operation_.count, static_cast<size_t>(chunk) * slices.chunk);
    return {begin, std::min(slices.chunk, operation_.count - begin)};
  }

  // Part `index` of `parts` of a range, in whole lines; the last may be shorter or empty.
  static Range Cut(Range whole, int index, int parts) {
    const size_t share = RoundUp((whole.count + static_cast<size_t>(parts) - 1) / static_cast<size_t>(parts), kSliceElements);
    const size_t begin = std::min(whole.count, static_cast<size_t>(index) * share);
    return {whole.begin + begin, std::min(share, whole.count - begin)};
  }

  bool is_rail(const Slices& slices) const { return at_.local < slices.rails; }
  int Twin(int node) const { return at_.RankOf(node, at_.local); }
  // Own result of the node for one chunk that is under way.
  std::byte* Scratch(uint64_t chunk) {
    const size_t bytes = RoundUp(net_.frame_bytes(), 64);
    if (context_.scratch.size() < (kLag + 1) * bytes) context_.scratch.resize((kLag + 1) * bytes);
    return context_.scratch.data() + chunk % (kLag + 1) * bytes;
  }

  Status AllReduce() {
    const Slices slices = SlicesOf();
    const std::byte *partials[kLag + 1] = {}, *finals[kLag + 1] = {};
    const auto slot = [](uint64_t chunk) { return static_cast<size_t>(chunk % (kLag + 1)); };
    // Chunk c begins while those before it are on their way. What a peer receives is in the order of these very loops.
    const uint64_t lag = slices.is_two_step ? kLag : std::min(kLag, slices.chunks - 1);
    for (uint64_t step = 0; step < slices.chunks + lag; step++) {
      if (step < slices.chunks) {
        if (Status s = Begin(slices, step, &partials[slot(step)]); !s.ok()) return s;
      }
      if (slices.is_two_step && step >= 1 && step - 1 < slices.chunks) {
        if (Status s = Middle(slices, step - 1, partials[slot(step - 1)], &finals[slot(step - 1)]); !s.ok()) return s;
      }
      if (step >= lag) {
        const uint64_t chunk = step - lag;
        if (Status s = End(slices, chunk, partials[slot(chunk)], finals[slot(chunk)]); !s.ok()) return s;
      }
    }
    return Status::Ok();
  }

  // The node's ranks give their elements; each rail reduces its slice and sends it, whole to every node or to each node its part.
  // *partial: what this rank keeps of it.
  Status Begin(const Slices& slices, uint64_t chunk, const std::byte** partial) {
    const Range whole = ChunkOf(slices, chunk);
    const std::byte* mine = operation_.data + whole.begin * element_;
    uint64_t generation = 0;
    if (!is_alone()) Copy(NextSlot(), mine, whole.count * element_);
    if (chunk == 0 || !is_alone()) {
      if (Status s = Meet(1, &generation, chunk == 0); !s.ok()) return s;
    }
    if (!is_rail(slices)) return Status::Ok();
    const Range slice = Cut(whole, at_.local, slices.rails);
    const bool has_own_elements = is_alone() && is_raw() && !is_q8();
    const auto reduce = [&](std::byte* to, Range range) {
      const size_t offset = (range.begin - whole.begin) * element_;
      if (has_own_elements) return Copy(to, mine + offset, range.count * element_);
      const void* sources[kMaxWorldSize];
      NodeSources(sources, generation, offset, mine + offset);
      ReduceNode(to, sources, range.count);
    };
    *partial = has_own_elements ? mine + (slice.begin - whole.begin) * element_ : nullptr;
    for (int step = 1; step < at_.num_nodes(); step++) {
      const int node = (at_.node + step) % at_.num_nodes(), peer = Twin(node);
      const Range range = slices.is_two_step ? Cut(slice, node, at_.num_nodes()) : slice;
      std::byte* room;
      if (Status s = Room(peer, chunk, &room); !s.ok()) return s;
      if (slices.is_two_step || *partial == nullptr) {
        reduce(room, range);
        if (!slices.is_two_step) *partial = room;
      } else {
        Copy(room, *partial, PartialFrameBytes(range.count));
      }
      Post(peer, chunk, 1, PartialFrameBytes(range.count));
    }
    if (slices.is_two_step) {
      const Range own = Cut(slice, at_.node, at_.num_nodes());
      if (has_own_elements) {
        *partial = mine + (own.begin - whole.begin) * element_;
      } else {
        std::byte* kept = Scratch(chunk);
        reduce(kept, own);
        *partial = kept;
      }
    }
    return Status::Ok();
  }

  // Sources of the final reduction of a range: the nodes' results, own among them. Their frames stay until Release.
  Status NodeResults(uint64_t chunk, const std::byte* own, size_t count, const void** sources) {
    for (int node = 0; node < at_.num_nodes(); node++) {
      const std::byte* data = own;
      if (node != at_.node) {
        if (Status s = Receive(Twin(node), chunk, 1, PartialFrameBytes(count), &data); !s.ok()) return s;
      }
      sources[node] = data;
    }
    return Status::Ok();
  }

  void ReleaseTwins() {
    for (int node = 0; node < at_.num_nodes(); node++) {
      if (node != at_.node) net_.Release(Twin(node));
    }
  }

  // Two steps: this node's part of the rail's slice is finished here and goes to all.
  Status Middle(const Slices& slices, uint64_t chunk, const std::byte* partial, const std::byte** final) {
    if (!is_rail(slices)) return Status::Ok();
    const Range own = Cut(Cut(ChunkOf(slices, chunk), at_.local, slices.rails), at_.node, at_.num_nodes());
    const void* sources[kMaxWorldSize];
    if (Status s = NodeResults(chunk, partial, own.count, sources); !s.ok()) return s;
    *final = nullptr;
    for (int step = 1; step < at_.num_nodes(); step++) {
      const int peer = Twin((at_.node + step) % at_.num_nodes());
      std::byte* room;
      if (Status s = Room(peer, chunk, &room); !s.ok()) return s;
      if (*final == nullptr) {
        FinishNodes(room, sources, own.count);
        *final = room;
      } else {
        Copy(room, *final, FinalFrameBytes(own.count));
      }
      Post(peer, chunk, 2, FinalFrameBytes(own.count));
    }
    ReleaseTwins();
    return Status::Ok();
  }

  Status End(const Slices& slices, uint64_t chunk, const std::byte* partial, const std::byte* final) {
    const Range whole = ChunkOf(slices, chunk);
    std::byte* out = output() + whole.begin * element_;
    std::byte* to = is_alone() ? out : NextSlot();
    if (is_rail(slices)) {
      const Range slice = Cut(whole, at_.local, slices.rails);
      if (slices.is_two_step) {
        for (int node = 0; node < at_.num_nodes(); node++) {
          const Range range = Cut(slice, node, at_.num_nodes());
          const std::byte* data = final;
          if (node != at_.node) {
            if (Status s = Receive(Twin(node), chunk, 2, FinalFrameBytes(range.count), &data); !s.ok()) return s;
          }
          TakeFinal(to + (range.begin - whole.begin) * element_, data, range.count);
        }
      } else {
        const void* sources[kMaxWorldSize];
        if (Status s = NodeResults(chunk, partial, slice.count, sources); !s.ok()) return s;
        ReduceNodes(to + (slice.begin - whole.begin) * element_, sources, slice.count);
      }
      ReleaseTwins();
    }
    if (is_alone()) return Status::Ok();
    uint64_t generation;
    if (Status s = Meet(2, &generation); !s.ok()) return s;
    for (int step = 0; step < slices.rails; step++) {
      const int rail = (at_.local + step) % slices.rails;
      const Range slice = Cut(whole, rail, slices.rails);
      const size_t offset = (slice.begin - whole.begin) * element_;
      Copy(out + offset, fabric_.Slot(rail, generation) + offset, slice.count * element_);
    }
    return Status::Ok();
  }

  // ---- the others: the ranks of a node meet, one of them stands for it

  Status Reduce() {
    const size_t chunk = std::max(kSliceElements, RoundDown(std::min(net_.frame_bytes() / WireBytes(), operation_.chunk_bytes / element_), kSliceElements));
    const bool is_root = at_.rank == operation_.root;
    const bool is_holder = is_root || at_.rank == at_.TwinOf(operation_.root, at_.node);
    const bool is_root_node = IsLocal(operation_.root);
    const uint64_t chunks = std::max<uint64_t>(1, (operation_.count + chunk - 1) / chunk);
    for (uint64_t c = 0; c < chunks; c++) {
      const size_t begin = static_cast<size_t>(c) * chunk, count = std::min(chunk, operation_.count - begin);
      const std::byte* mine = operation_.data + begin * element_;
      uint64_t generation = 0;
      if (!is_alone()) Copy(NextSlot(), mine, count * element_);
      if (Status s = Meet(1, &generation, c == 0); !s.ok()) return s;
      if (!(is_root_node ? is_root : is_holder)) continue;
      const void* sources[kMaxWorldSize];
      NodeSources(sources, generation, 0, mine);
      if (!is_root) {
        std::byte* room;
        if (Status s = Room(operation_.root, c, &room); !s.ok()) return s;
        ReduceNode(room, sources, count);
        Post(operation_.root, c, 1, count * WireBytes());
        continue;
      }
      std::byte* own = Scratch(0);
      ReduceNode(own, sources, count);
      for (int node = 0; node < at_.num_nodes(); node++) {
        const std::byte* data = own;
        if (node != at_.node) {
          if (Status s = Receive(at_.TwinOf(operation_.root, node), c, 1, count * WireBytes(), &data); !s.ok()) return s;
        }
        sources[node] = data;
      }
      ReduceNodes(output() + begin * element_, sources, count);
      for (int node = 0; node < at_.num_nodes(); node++) {
        if (node != at_.node) net_.Release(at_.TwinOf(operation_.root, node));
      }
    }
    return Status::Ok();
  }

  Status Broadcast() {
    const size_t chunk = std::min(RoundDown(net_.frame_bytes(), 64), operation_.chunk_bytes), nbytes = operation_.nbytes();
    const uint64_t chunks = std::max<uint64_t>(1, (nbytes + chunk - 1) / chunk);
    const bool is_root = at_.rank == operation_.root;
    const int holder = IsLocal(operation_.root) ? operation_.root : at_.TwinOf(operation_.root, at_.node);
    for (uint64_t c = 0; c < chunks; c++) {
      const size_t begin = static_cast<size_t>(c) * chunk, size = std::min(chunk, nbytes - begin);
      std::byte* mine = operation_.data + begin;
      if (is_root) {
        for (int node = 0; node < at_.num_nodes(); node++) {
          if (node == at_.node) continue;
          if (Status s = Send(at_.TwinOf(operation_.root, node), c, mine, size); !s.ok()) return s;
        }
        if (!is_alone()) Copy(NextSlot(), mine, size);
      } else if (holder == at_.rank) {
        const std::byte* data;
        if (Status s = Receive(operation_.root, c, 0, size, &data); !s.ok()) return s;
        Copy(mine, data, size);
        if (!is_alone()) Copy(NextSlot(), mine, size);
        net_.Release(operation_.root);
      }
      uint64_t generation;
      if (Status s = Meet(1, &generation); !s.ok()) return s;
      if (holder != at_.rank) Copy(mine, fabric_.Slot(LocalOf(holder), generation), size);
    }
    return Status::Ok();
  }

  Status AllGather() {
    size_t cells = 1;
    for (const std::vector<int>& theirs : at_.held) cells = std::max(cells, theirs.size() + 1);
    const size_t cell = RoundDown(operation_.chunk_bytes / cells, kCellLine);
    if (cell == 0) return TooNarrow(cells);
    const size_t piece_bytes = std::min(RoundDown(net_.frame_bytes(), 64), cell);
    const uint64_t pieces = PiecesOf(operation_, world(), piece_bytes);
    const size_t own_begin = PartOf(operation_, at_.rank, world()).begin;
    for (uint64_t piece = 0; piece < pieces; piece++) {
      const Part mine = PieceOf(operation_, at_.rank, world(), piece, piece_bytes);
      const std::byte* from = operation_.data + (mine.begin - own_begin);
      for (int step = 1; step < at_.num_nodes() && mine.nbytes > 0; step++) {
        const int node = (at_.node + step) % at_.num_nodes();
        if (Status s = Send(at_.TwinOf(at_.rank, node), piece, from, mine.nbytes); !s.ok()) return s;
      }
      std::byte* slot = NextSlot();
      if (!is_alone()) Copy(slot, from, mine.nbytes);
      if (mine.nbytes > 0 && operation_.output + mine.begin != from) std::memmove(operation_.output + mine.begin, from, mine.nbytes);
      size_t place = 0;
      for (int rank : at_.held[static_cast<size_t>(at_.rank)]) {
        place++;
        const Part theirs = PieceOf(operation_, rank, world(), piece, piece_bytes);
        if (theirs.nbytes == 0) continue;
        const std::byte* data;
        if (Status s = Receive(rank, piece, 0, theirs.nbytes, &data); !s.ok()) return s;
        Copy(operation_.output + theirs.begin, data, theirs.nbytes);
        if (!is_alone()) Copy(slot + place * cell, data, theirs.nbytes);
        net_.Release(rank);
      }
      uint64_t generation;
      if (Status s = Meet(1, &generation); !s.ok()) return s;
      for (int step = 1; step < locals(); step++) {
        const int local = (fabric_.rank() + step) % locals();
        const std::byte* theirs = fabric_.Slot(local, generation);
        const int peer = at_.RankOf(at_.node, local);
        const Part part = PieceOf(operation_, peer, world(), piece, piece_bytes);
        Copy(operation_.output + part.begin, theirs, part.nbytes);
        size_t index = 0;
        for (int rank : at_.held[static_cast<size_t>(peer)]) {
          index++;
          const Part held_part = PieceOf(operation_, rank, world(), piece, piece_bytes);
          Copy(operation_.output + held_part.begin, theirs + index * cell, held_part.nbytes);
        }
      }
    }
    return Status::Ok();
  }

  Status Gather() {
    const size_t piece_bytes = std::min(RoundDown(net_.frame_bytes(), 64), operation_.chunk_bytes);
    const uint64_t pieces = PiecesOf(operation_, world(), piece_bytes);
    const size_t own_begin = PartOf(operation_, at_.rank, world()).begin;
    const bool is_root = at_.rank == operation_.root, is_root_node = IsLocal(operation_.root);
    for (uint64_t piece = 0; piece < pieces; piece++) {
      const Part mine = PieceOf(operation_, at_.rank, world(), piece, piece_bytes);
      const std::byte* from = operation_.data + (mine.begin - own_begin);
      if (is_root && mine.nbytes > 0 && operation_.output + mine.begin != from) std::memmove(operation_.output + mine.begin, from, mine.nbytes);
      if (!is_root_node) {
        if (mine.nbytes > 0) {
          if (Status s = Send(operation_.root, piece, from, mine.nbytes); !s.ok()) return s;
        }
        continue;
      }
      if (!is_root) Copy(NextSlot(), from, mine.nbytes);
      uint64_t generation;
      if (Status s = Meet(1, &generation); !s.ok()) return s;
      if (!is_root) continue;
      for (int rank = 0; rank < world(); rank++) {
        const Part theirs = PieceOf(operation_, rank, world(), piece, piece_bytes);
        if (rank == at_.rank || theirs.nbytes == 0) continue;
        const std::byte* data = nullptr;
        if (IsLocal(rank)) {
          data = fabric_.Slot(LocalOf(rank), generation);
        } else if (Status s = Receive(rank, piece, 0, theirs.nbytes, &data); !s.ok()) {
          return s;
        }
        Copy(operation_.output + theirs.begin, data, theirs.nbytes);
        if (!IsLocal(rank)) net_.Release(rank);
      }
    }
    return Status::Ok();
  }

  // The slot carries parts for several ranks: a cell for each.
  Status CellsOf(size_t cells, size_t* cell) {
    *cell = RoundDown(operation_.chunk_bytes / cells, kCellLine);
    return *cell == 0 ? TooNarrow(cells) : Status::Ok();
  }
  Status TooNarrow(size_t cells) const {
    return Status(Code::kInvalidArgument, std::string(NameOf(operation_.op)) + " on these nodes needs chunks of at least " + std::to_string(cells * kCellLine) +
                                              " bytes; this group's have " + std::to_string(operation_.chunk_bytes));
  }
  size_t MostLocals() const {
    size_t most = 0;
    for (const std::vector<int>& ranks : at_.nodes) most = std::max(most, ranks.size());
    return most;
  }

  Status Scatter() {
    size_t cell;
    if (Status s = CellsOf(MostLocals(), &cell); !s.ok()) return s;
    const size_t piece_bytes = std::min(RoundDown(net_.frame_bytes(), 64), cell);
    const uint64_t pieces = PiecesOf(operation_, world(), piece_bytes);
    const size_t own_begin = PartOf(operation_, at_.rank, world()).begin;
    const bool is_root = at_.rank == operation_.root, is_root_node = IsLocal(operation_.root);
    for (uint64_t piece = 0; piece < pieces; piece++) {
      const Part mine = PieceOf(operation_, at_.rank, world(), piece, piece_bytes);
      std::byte* to = operation_.output + (mine.begin - own_begin);
      if (is_root) {
        std::byte* slot = NextSlot();
        for (int rank = 0; rank < world(); rank++) {
          const Part theirs = PieceOf(operation_, rank, world(), piece, piece_bytes);
          if (rank == at_.rank || theirs.nbytes == 0) continue;
          if (IsLocal(rank)) {
            Copy(slot + static_cast<size_t>(LocalOf(rank)) * cell, operation_.data + theirs.begin, theirs.nbytes);
          } else if (Status s = Send(rank, piece, operation_.data + theirs.begin, theirs.nbytes); !s.ok()) {
            return s;
          }
        }
        if (mine.nbytes > 0 && operation_.data + mine.begin != to) std::memmove(to, operation_.data + mine.begin, mine.nbytes);
      }
      if (is_root_node) {
        uint64_t generation;
        if (Status s = Meet(1, &generation); !s.ok()) return s;
        if (!is_root) Copy(to, fabric_.Slot(LocalOf(operation_.root), generation) + static_cast<size_t>(fabric_.rank()) * cell, mine.nbytes);
      } else if (mine.nbytes > 0) {
        const std::byte* data;
        if (Status s = Receive(operation_.root, piece, 0, mine.nbytes, &data); !s.ok()) return s;
        Copy(to, data, mine.nbytes);
        net_.Release(operation_.root);
      }
    }
    return Status::Ok();
  }

  Status ReduceScatter() {
    size_t cell;
    if (Status s = CellsOf(static_cast<size_t>(world()), &cell); !s.ok()) return s;
    // Elements of a piece: what fits a cell, and a frame in the form it travels in.
    const size_t piece_elements = RoundDown(std::min(cell / element_, net_.frame_bytes() / WireBytes()), 4);
    if (piece_elements == 0) return TooNarrow(2 * static_cast<size_t>(world()));
    const size_t piece_bytes = piece_elements * element_;
    const uint64_t pieces = PiecesOf(operation_, world(), piece_bytes);
    const size_t own_begin = PartOf(operation_, at_.rank, world()).begin;
    const void* sources[kMaxWorldSize];
    for (uint64_t piece = 0; piece < pieces; piece++) {
      const auto piece_of = [&](int rank) { return PieceOf(operation_, rank, world(), piece, piece_bytes); };
      const auto slot_place = [&](int rank) { return static_cast<size_t>(rank) * cell; };
      if (!is_alone()) {
        std::byte* slot = NextSlot();
        for (int rank = 0; rank < world(); rank++) Copy(slot + slot_place(rank), operation_.data + piece_of(rank).begin, piece_of(rank).nbytes);
      }
      uint64_t generation;
      if (Status s = Meet(1, &generation, piece == 0); !s.ok()) return s;
      for (int rank = 0; rank < world(); rank++) {
        const Part theirs = piece_of(rank);
        if (IsLocal(rank) || at_.TwinOf(rank, at_.node) != at_.rank || theirs.nbytes == 0) continue;
        std::byte* room;
        if (Status s = Room(rank, piece, &room); !s.ok()) return s;
        NodeSources(sources, generation, slot_place(rank), operation_.data + theirs.begin);
        ReduceNode(room, sources, theirs.nbytes / element_);
        Post(rank, piece, 1, theirs.nbytes / element_ * WireBytes());
      }
      const Part mine = piece_of(at_.rank);
      if (mine.nbytes == 0) continue;
      const size_t count = mine.nbytes / element_;
      std::byte* own = Scratch(0);
      NodeSources(sources, generation, slot_place(at_.rank), operation_.data + mine.begin);
      ReduceNode(own, sources, count);
      for (int node = 0; node < at_.num_nodes(); node++) {
        const std::byte* data = own;
        if (node != at_.node) {
          if (Status s = Receive(at_.TwinOf(at_.rank, node), piece, 1, count * WireBytes(), &data); !s.ok()) return s;
        }
        sources[node] = data;
      }
      ReduceNodes(operation_.output + (mine.begin - own_begin), sources, count);
      for (int node = 0; node < at_.num_nodes(); node++) {
        if (node != at_.node) net_.Release(at_.TwinOf(at_.rank, node));
      }
    }
    return Status::Ok();
  }

  Status AllToAll() {
    size_t cell;
    if (Status s = CellsOf(MostLocals(), &cell); !s.ok()) return s;
    const size_t piece_bytes = std::min(RoundDown(net_.frame_bytes(), 64), cell);
    const uint64_t pieces = PiecesOf(operation_, world(), piece_bytes);
    for (uint64_t piece = 0; piece < pieces; piece++) {
      const auto piece_of = [&](int rank) { return PieceOf(operation_, rank, world(), piece, piece_bytes); };
      std::byte* slot = NextSlot();
      for (int step = 1; step < world(); step++) {
        const int rank = (at_.rank + step) % world();
        const Part theirs = piece_of(rank);
        if (theirs.nbytes == 0) continue;
        if (IsLocal(rank)) {
          Copy(slot + static_cast<size_t>(LocalOf(rank)) * cell, operation_.data + theirs.begin, theirs.nbytes);
        } else if (Status s = Send(rank, piece, operation_.data + theirs.begin, theirs.nbytes); !s.ok()) {
          return s;
        }
      }
      const Part mine = piece_of(at_.rank);
      if (mine.nbytes > 0 && operation_.output != operation_.data) std::memmove(operation_.output + mine.begin, operation_.data + mine.begin, mine.nbytes);
      uint64_t generation;
      if (Status s = Meet(1, &generation); !s.ok()) return s;
      for (int step = 1; step < world(); step++) {
        const int rank = (at_.rank + world() - step) % world();
        const Part theirs = piece_of(rank);
        if (theirs.nbytes == 0) continue;
        const std::byte* data;
        if (IsLocal(rank)) {
          data = fabric_.Slot(LocalOf(rank), generation) + static_cast<size_t>(fabric_.rank()) * cell;
        } else if (Status s = Receive(rank, piece, 0, theirs.nbytes, &data); !s.ok()) {
          return s;
        }
        Copy(operation_.output + theirs.begin, data, theirs.nbytes);
        if (!IsLocal(rank)) net_.Release(rank);
      }
    }
    return Status::Ok();
  }

  Status Barrier() {
    uint64_t generation;
    if (Status s = Meet(1, &generation, true); !s.ok()) return s;
    if (at_.local == 0) {
      for (int node = 0; node < at_.num_nodes(); node++) {
        if (node == at_.node) continue;
        if (Status s = Send(at_.RankOf(node, 0), 0, nullptr, 0); !s.ok()) return s;
      }
      for (int node = 0; node < at_.num_nodes(); node++) {
        if (node == at_.node) continue;
        const std::byte* data;
        if (Status s = Receive(at_.RankOf(node, 0), 0, 0, 0, &data); !s.ok()) return s;
        net_.Release(at_.RankOf(node, 0));
      }
    }
    return Meet(2, &generation);
  }

  NetworkContext& context_;
  const Operation& operation_;
  const Deadline deadline_, node_deadline_;
  Fabric& fabric_;
  Transport& net_;
  const Layout& at_;
  const size_t element_;
  Leg leg_;
};

}  // namespace

NetworkAlgorithm ChooseByWidth(const Layout& layout, const Operation& operation) {
  const bool is_wide = operation.wire == Wire::kExact && !layout.is_one_rank_a_node() && !IsExact(operation.reduce_op) &&
                       PartialBytes(operation.dtype, operation.reduce_op) > ElementBytes(operation.dtype);
  return is_wide ? NetworkAlgorithm::kTwoStep : NetworkAlgorithm::kSplitRail;
}

Status RunHierarchical(NetworkContext& context, const Operation& operation, uint64_t number, const Deadline& deadline) {
  Status status = Call(context, operation, number, deadline).Run();
  if (status.ok()) context.transport->Settle();
  return status;
}

}  // namespace tilerank
