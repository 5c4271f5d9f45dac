#include "measure.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/peak.h"
#include "runner/memory.h"

namespace tilerank {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// All arrive, then all go on. Only benchmark threads, each on a processor of its own, wait here, so it spins (and
// yields in case another process has taken one).
class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}
  void Wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 10000) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

Status CheckThreads(int32_t threads) {
  const size_t cpus = AllowedCpus().size();
  if (threads < 1 || static_cast<size_t>(threads) > cpus) {
    return Status(Code::kInvalidArgument, "threads is " + std::to_string(threads) + ", and this process may use " +
                                              std::to_string(cpus) + " processors: 1 to that many can be measured");
  }
  return Status::Ok();
}

// body(thread) on every thread, thread i pinned to the i-th allowed processor.
void RunPinned(int32_t threads, const std::function<void(int)>& body) {
  const std::vector<int> cpus = AllowedCpus();
  std::vector<std::thread> team;
  for (int i = 0; i < threads; i++) {
    team.emplace_back([&, i] {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[static_cast<size_t>(i)], &set);
      (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: the figure is a little noisier
      body(i);
    });
  }
  for (std::thread& thread : team) thread.join();
}

// Seconds of the fastest repetition of work(thread) by all threads together, over about `seconds` and at least three
// times.
double BestOf(int32_t threads, double seconds, const std::function<void(int)>& work) {
  SpinBarrier barrier(threads);
  std::atomic<bool> is_done{false};
  double best = 1e300;
  RunPinned(threads, [&](int thread) {
    const Clock::time_point begin = Clock::now();
    for (int repetition = 0;; repetition++) {
      barrier.Wait();
      const Clock::time_point start = Clock::now();
      work(thread);
      barrier.Wait();
      if (thread == 0) {
        best = std::min(best, SecondsSince(start));
        is_done.store(repetition >= 2 && SecondsSince(begin) >= seconds, std::memory_order_relaxed);
      }
      barrier.Wait();
      if (is_done.load(std::memory_order_relaxed)) return;
    }
  });
  return best;
}

// A small integer that looks random: -2 .. 2, nonzero for most arguments.
int SmallInteger(uint64_t index) { return static_cast<int>(((index * 0x9e3779b97f4a7c15u) >> 40) % 5) - 2; }

void StoreInteger(void* array, DType dtype, int64_t index, int value) {
  const float number = static_cast<float>(value);
  kScalarKernels.convert(static_cast<char*>(array) + index * ElementBytes(dtype), dtype, &number, DType::kF32, 1);
}

}  // namespace

Status MeasureLimits(const Kernels& kernels, bool has_bf16, int32_t threads, size_t nbytes, double seconds,
                     MachineLimits* limits) {
  if (Status s = CheckThreads(threads); !s.ok()) return s;
  *limits = {};
#if defined(__x86_64__)
  if (has_bf16) {
    constexpr uint64_t kRounds = 400'000;  // 1 to 2 ms: short enough to fall between two interruptions
    for (DType dtype : {DType::kBf16, DType::kF32}) {
      std::atomic<uint64_t> flops{0};
      const double best = BestOf(threads, seconds, [&](int) { flops.store(RunMultiplyAdds(dtype, kRounds)); });
      (dtype == DType::kBf16 ? limits->bf16_flops : limits->f32_flops) = static_cast<double>(flops) * threads / best;
    }
  }
#else
  (void)has_bf16;
#endif
  std::vector<MappedMemory> memory(static_cast<size_t>(threads));
  for (MappedMemory& m : memory) {
    if (Status s = MappedMemory::Allocate(nbytes, "the read limit", &m); !s.ok()) return s;
  }
  RunPinned(threads, [&](int thread) {  // first touch by the thread that reads
    uint64_t* words = reinterpret_cast<uint64_t*>(memory[static_cast<size_t>(thread)].data());
    for (size_t i = 0; i < nbytes / 8; i++) words[i] = i;
  });
  std::atomic<uint64_t> sink{0};
  const double best = BestOf(threads, seconds, [&](int thread) {
    sink.fetch_xor(kernels.stream_read(memory[static_cast<size_t>(thread)].data(), nbytes));
  });
  limits->read_bytes = static_cast<double>(nbytes) * threads / best;
  return Status::Ok();
}

Status TimeGemm(const Kernels& kernels, const GemmTrial& trial, GemmTiming* timing) {
  if (Status s = CheckThreads(trial.threads); !s.ok()) return s;
  const int64_t element_bytes = ElementBytes(trial.dtype);
  const int64_t tile_k = TileK(trial.dtype);
  const int32_t panels = (trial.n + kPanel - 1) / kPanel;
  const int32_t k_tiles = static_cast<int32_t>((trial.k + tile_k - 1) / tile_k);
  const size_t weight_nbytes = static_cast<size_t>(panels) * static_cast<size_t>(k_tiles) * kTileBytes;
  const size_t copies = std::max<size_t>(1, (trial.cold_nbytes + weight_nbytes - 1) / weight_nbytes);
  const int64_t ldx =
      (trial.k + 31) / 32 * 32 + 32;  // rows stay aligned and never a multiple of 4 KiB apart for even k / 32
  const int64_t ldy = static_cast<int64_t>(panels) * kPanel + 16;

  MappedMemory weights, x, y, scratch;
  if (Status s = MappedMemory::Allocate(copies * weight_nbytes, "the weights to time", &weights); !s.ok()) return s;
  if (Status s = MappedMemory::Allocate(static_cast<size_t>(trial.m * ldx * element_bytes), "x", &x); !s.ok()) return s;
  if (Status s = MappedMemory::Allocate(static_cast<size_t>(trial.m * ldy) * 4, "y", &y); !s.ok()) return s;
  if (Status s = MappedMemory::Allocate(kGemmScratchBytes * static_cast<size_t>(trial.threads), "scratch", &scratch);
      !s.ok())
    return s;
  for (int64_t row = 0; row < trial.m; row++) {
    for (int64_t k = 0; k < trial.k; k++) {
      StoreInteger(x.data(), trial.dtype, row * ldx + k, SmallInteger(static_cast<uint64_t>(row * trial.k + k) + 977));
    }
  }
  // Every thread fills, and so places, its own panels of every copy. One pass of integers is made and then repeated:
  // all that the product needs is that k past the end is zero.
  const auto bound = [&](int thread) {
    return static_cast<int32_t>(static_cast<int64_t>(panels) * thread / trial.threads);
  };
  RunPinned(trial.threads, [&](int thread) {
    std::vector<uint16_t> source16(trial.dtype == DType::kBf16 ? static_cast<size_t>(kPanel * trial.k) : 0);
    std::vector<float> source32(trial.dtype == DType::kF32 ? static_cast<size_t>(kPanel * trial.k) : 0);
    void* source =
        trial.dtype == DType::kBf16 ? static_cast<void*>(source16.data()) : static_cast<void*>(source32.data());
    for (int64_t i = 0; i < static_cast<int64_t>(kPanel) * trial.k; i++) {
      StoreInteger(source, trial.dtype, i, SmallInteger(static_cast<uint64_t>(i + 131 * thread)));
    }
    for (size_t copy = 0; copy < copies; copy++) {
      for (int32_t panel = bound(thread); panel < bound(thread + 1); panel++) {
        kernels.pack({weights.data() + copy * weight_nbytes, trial.dtype, k_tiles, source, trial.dtype, trial.k,
                      std::min<int32_t>(kPanel, trial.n - panel * kPanel), trial.k, panel * kPanel, 1, 0});
      }
    }
  });

  SpinBarrier barrier(trial.threads);
  std::atomic<bool> is_done{false};
  std::vector<double> samples;
  size_t last_copy = 0;
  RunPinned(trial.threads, [&](int thread) {
    double total = 0;
    for (int64_t repetition = 0;; repetition++) {
      const size_t copy = static_cast<size_t>(repetition) % copies;
      const PackedWeight weight = {
          weights.data() + copy * weight_nbytes, trial.dtype, trial.n, trial.k, panels, k_tiles, nullptr};
      const GemmArgs args = {&weight,
                             x.data(),
                             ldx,
                             trial.m,
                             bound(thread),
                             bound(thread + 1),
                             Activation::kNone,
                             y.data(),
                             DType::kF32,
                             ldy,
                             scratch.data() + static_cast<size_t>(thread) * kGemmScratchBytes};
      barrier.Wait();
      const Clock::time_point start = Clock::now();
      if (args.panel0 < args.panel1) kernels.gemm(args);
      barrier.Wait();
      if (thread == 0) {
        const double elapsed = SecondsSince(start);
        if (repetition > 0) {  // the first warms up
          samples.push_back(elapsed);
          total += elapsed;
        }
        last_copy = copy;
        is_done.store(samples.size() >= 3 && total >= trial.seconds, std::memory_order_relaxed);
      }
      barrier.Wait();
      if (is_done.load(std::memory_order_relaxed)) return;
    }
  });

  const PackedWeight weight = {
      weights.data() + last_copy * weight_nbytes, trial.dtype, trial.n, trial.k, panels, k_tiles, nullptr};
  std::vector<float> row_of_weight(static_cast<size_t>(trial.k));
  for (int64_t sample = 0; sample < 64; sample++) {
    const int64_t row = sample * 7919 % trial.m, column = sample * 104729 % trial.n;
    kScalarKernels.unpack(weight, static_cast<int32_t>(column), 1, row_of_weight.data(), trial.k);
    double expected = 0;
    for (int64_t k = 0; k < trial.k; k++) {
      expected += static_cast<double>(row_of_weight[static_cast<size_t>(k)]) *
                  SmallInteger(static_cast<uint64_t>(row * trial.k + k) + 977);
    }
    const float got = reinterpret_cast<const float*>(y.data())[row * ldy + column];
    if (static_cast<double>(got) != expected) {
      return Status(Code::kInternal, "the timed product is wrong: y[" + std::to_string(row) + ", " +
                                         std::to_string(column) + "] is " + std::to_string(got) + ", and should be " +
                                         std::to_string(expected));
    }
  }
  std::sort(samples.begin(), samples.end());
  *timing = {samples[samples.size() / 2], samples[0], static_cast<int64_t>(samples.size()),
             static_cast<int64_t>(weight_nbytes)};
  return Status::Ok();
}

}  // namespace tilerank
