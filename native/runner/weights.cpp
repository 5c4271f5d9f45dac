#include "runner/weights.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <mutex>

namespace tilerank {

namespace {

constexpr size_t kAlign = 4096;  // of each weight: a panel never straddles more pages than it must
// Bytes of source that one claim of work covers: long enough to hide the claim, short enough to balance threads.
constexpr int64_t kChunkBytes = 1 << 20;

size_t AlignUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

Status ReadFully(int fd, void* to, size_t nbytes, int64_t offset) {
  auto* at = static_cast<char*>(to);
  while (nbytes > 0) {
    const ssize_t got = pread(fd, at, nbytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Status(Code::kIo, std::string("a checkpoint file could not be read: ") + std::strerror(errno));
    if (got == 0) return Status(Code::kIo, "a checkpoint file ended early: it changed after its header was read");
    at += got;
    offset += got;
    nbytes -= static_cast<size_t>(got);
  }
  return Status::Ok();
}

// SplitMix64 (Steele, Lea, Flood 2014): made-up values depend on (seed, row, column) alone, so every split of a tensor agrees.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// About normal with deviation 0.02 (the sum of four 16-bit uniforms), as bf16 bits held in f32.
float MadeUp(uint64_t seed, int64_t row, int64_t column) {
  const uint64_t bits = Mix(seed ^ Mix(static_cast<uint64_t>(row) << 32 ^ static_cast<uint64_t>(column)));
  const int32_t sum = static_cast<int32_t>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48)) - 131070;
  return static_cast<float>(sum) * (0.02f / 37837.0f);  // 37837 = 65535 * sqrt(4 / 12)
}

}  // namespace

Status Weights::Create(const Program& program, std::unique_ptr<Weights>* out) {
  auto weights = std::make_unique<Weights>();
  weights->program_ = &program;
  size_t entries = 0;
  for (const WeightSpec& spec : program.weights) {
    weights->first_.push_back(entries);
    entries += static_cast<size_t>(spec.copies);
  }
  weights->linear_.resize(entries);
  weights->vectors_.resize(entries, nullptr);
  std::vector<size_t> data_offset(entries), vector_offset(entries);

  // Layer by layer, in program order within a layer: a step then reads the mapping once from front to back.
  size_t nbytes = 0;
  int32_t most_copies = 1;
  for (const WeightSpec& spec : program.weights) most_copies = std::max(most_copies, spec.copies);
  for (int32_t copy = 0; copy < most_copies; copy++) {
    for (size_t w = 0; w < program.weights.size(); w++) {
      const WeightSpec& spec = program.weights[w];
      if (copy >= spec.copies) continue;
      const size_t entry = weights->first_[w] + static_cast<size_t>(copy);
      const int32_t panels = (spec.n + kPanel - 1) / kPanel;
      if (spec.is_linear) {
        PackedWeight& packed = weights->linear_[entry];
        packed.dtype = spec.dtype;
        packed.n = spec.n;
        packed.k = spec.k;
        packed.panels = panels;
        packed.k_tiles = (spec.k + TileK(spec.dtype) - 1) / TileK(spec.dtype);
        data_offset[entry] = nbytes;
        nbytes += AlignUp(static_cast<size_t>(panels) * static_cast<size_t>(packed.k_tiles) * kTileBytes, kAlign);
      }
      if (!spec.is_linear || spec.has_bias) {
        vector_offset[entry] = nbytes;
        nbytes += AlignUp(static_cast<size_t>(panels) * kPanel * sizeof(float), 64);
        nbytes = AlignUp(nbytes, kAlign);
      }
    }
  }
  if (Status s = MappedMemory::Allocate(nbytes, "the weights of this rank", &weights->memory_); !s.ok()) return s;
  for (size_t w = 0; w < program.weights.size(); w++) {
    const WeightSpec& spec = program.weights[w];
    for (int32_t copy = 0; copy < spec.copies; copy++) {
      const size_t entry = weights->first_[w] + static_cast<size_t>(copy);
      if (!spec.is_linear || spec.has_bias) {
        weights->vectors_[entry] = reinterpret_cast<float*>(weights->memory_.data() + vector_offset[entry]);
      }
      if (spec.is_linear) {
        weights->linear_[entry].data = weights->memory_.data() + data_offset[entry];
        weights->linear_[entry].bias = spec.has_bias ? weights->vectors_[entry] : nullptr;
      }
    }
  }
  *out = std::move(weights);
  return Status::Ok();
}

Status Weights::LoadChunk(const Chunk& chunk, const Kernels& kernels, std::vector<std::byte>& raw) {
  const LoadPart& part = *chunk.part;
  const WeightSpec& spec = program_->weights[static_cast<size_t>(part.weight)];
  const size_t entry = First(part.weight) + static_cast<size_t>(part.copy);
  const auto element = static_cast<int64_t>(ElementBytes(part.source_dtype));
  const int64_t row_bytes = part.columns * element;
  raw.resize(static_cast<size_t>(chunk.rows * row_bytes));

  const int64_t first_row = part.row0 + chunk.row0;
  if (part.fd < 0) {
    if (part.source_dtype == DType::kF16) return Status(Code::kInternal, "made-up weights are f32 or bf16");
    for (int64_t i = 0; i < chunk.rows; i++) {
      for (int64_t j = 0; j < part.columns; j++) {
        // A vector is a norm's weight: near one. A matrix is centred.
        const float value = MadeUp(part.seed, first_row + i, part.column0 + j) + (spec.is_linear ? 0.0f : 1.0f);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000u;
        std::byte* to = raw.data() + (i * part.columns + j) * element;
        if (part.source_dtype == DType::kF32) {
          std::memcpy(to, &bits, 4);
        } else {
          const auto half = static_cast<uint16_t>(bits >> 16);
          std::memcpy(to, &half, 2);
        }
      }
    }
  } else if (part.columns == part.tensor_columns) {
    if (Status s = ReadFully(part.fd, raw.data(), raw.size(), part.byte_offset + first_row * row_bytes); !s.ok()) return s;
  } else {
    for (int64_t i = 0; i < chunk.rows; i++) {
      const int64_t offset = part.byte_offset + ((first_row + i) * part.tensor_columns + part.column0) * element;
      if (Status s = ReadFully(part.fd, raw.data() + i * row_bytes, static_cast<size_t>(row_bytes), offset); !s.ok()) return s;
    }
  }

  const auto output = static_cast<int32_t>(part.output + chunk.row0);
  if (!spec.is_linear || part.is_bias) {
    // With interleaving, output o of a half stands in panel 2 * (o / 16) + phase, as PackArgs says.
    std::vector<float> values(static_cast<size_t>(chunk.rows));
    kernels.convert(values.data(), DType::kF32, raw.data(), part.source_dtype, values.size());
    for (int64_t i = 0; i < chunk.rows; i++) {
      const int64_t o = output + i;
      const int64_t at = part.interleave == 2 ? (2 * (o / kPanel) + part.phase) * kPanel + o % kPanel : o;
      vectors_[entry][at] = values[static_cast<size_t>(i)];
    }
  } else {
    PackArgs args{};
    args.packed = const_cast<void*>(linear_[entry].data);
    args.dtype = spec.dtype;
    args.k_tiles = linear_[entry].k_tiles;
    args.source = raw.data();
    args.source_dtype = part.source_dtype;
    args.source_ld = part.columns;
    args.rows = static_cast<int32_t>(chunk.rows);
    args.k = static_cast<int32_t>(part.columns);
    args.n0 = output;
    args.interleave = part.interleave;
    args.phase = part.phase;
    kernels.pack(args);
  }
  loaded_bytes_.fetch_add(raw.size(), std::memory_order_relaxed);
  return Status::Ok();
}

Status Weights::Load(const std::vector<LoadPart>& parts, const Kernels& kernels, Pool& pool, const std::function<Status()>& check) {
  std::vector<Chunk> chunks;
  for (const LoadPart& part : parts) {
    const int64_t row_bytes = std::max<int64_t>(1, part.columns * ElementBytes(part.source_dtype));
    // Whole panels where possible, so that two threads seldom write the same lines.
    const int64_t rows = std::max<int64_t>(kPanel, kChunkBytes / row_bytes / kPanel * kPanel);
    for (int64_t row0 = 0; row0 < part.rows; row0 += rows) chunks.push_back({&part, row0, std::min(rows, part.rows - row0)});
  }
  std::atomic<size_t> next{0};
  std::mutex failure_mutex;
  Status failure;
  pool.Run([&](int) {
    std::vector<std::byte> raw;
    for (size_t i = next.fetch_add(1); i < chunks.size(); i = next.fetch_add(1)) {
      Status s = check();
      if (s.ok()) s = LoadChunk(chunks[i], kernels, raw);
      if (!s.ok()) {
        std::lock_guard lock(failure_mutex);
        if (failure.ok()) failure = std::move(s);
        next.store(chunks.size());
      }
    }
  });
  return failure;
}

}  // namespace tilerank
