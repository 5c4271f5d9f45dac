// Operands at the edge of the world: each in a mapping of its own between two guards that fault, with its last byte before the one or
// its first byte behind the other, its inputs read-only, and every byte that kernels.h does not give to the call filled and looked at
// again. Under AddressSanitizer those bytes are poisoned besides, so that reads between rows are found too.
// A kernel that strays is caught, not crashed: Run() says which operand, which way and how far. Header of kernels.cpp alone.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tilerank {

enum class Role { kIn, kOut, kInOut, kScratch };
enum class Side { kLoose, kEnd, kStart };  // kLoose: for the reference, nothing is protected

inline const char* NameOf(Side side) { return side == Side::kEnd ? "operands before a guard" : side == Side::kStart ? "operands behind a guard" : "reference"; }

// Empty, or what is wrong with the bytes of a row.
using Check = std::function<std::string(const std::byte* expected, const std::byte* actual, size_t nbytes)>;

/// The bytes that kernels.h gives to a call: `rows` of row_bytes, `stride` apart. All else around is not to be touched.
struct Operand {
  std::string name;
  Role role;
  size_t row_bytes = 0, rows = 1, stride = 0;
  size_t align = 1, phase = 0;     // the first byte stands `phase` behind a multiple of `align`
  std::vector<std::byte> content;  // [rows * row_bytes] at the start; not for kOut
  Check check;                     // kOut, kInOut; null: the reference's bytes
  std::function<bool(size_t row, size_t byte)> may_change;  // kInOut; null: all may

  size_t used_rows() const { return row_bytes == 0 ? 0 : rows; }
  size_t extent() const { return used_rows() == 0 ? 0 : (rows - 1) * stride + row_bytes; }
};

/// One call of one kernel. `at[i]` is the first byte of operand i.
struct Spec {
  std::string kernel, shape;
  std::vector<Operand> operands;
  std::function<void(std::byte* const* at)> link;  // writes pointers and offsets into operands that hold such; or null
  std::function<void(const Kernels& kernels, std::byte* const* at)> call;
};

using Results = std::vector<std::vector<std::byte>>;  // of each operand, rows without what is between; empty unless written

class World {
 public:
  World() {
    struct sigaction action {};
    action.sa_sigaction = &World::OnFault;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(SIGSEGV, &action, nullptr) != 0 || sigaction(SIGBUS, &action, nullptr) != 0) std::abort();
  }

  /// Runs the call once. Empty, or what was done that kernels.h does not allow; *results receives what was written.
  std::string Run(const Spec& spec, const Kernels& kernels, Side side, Results* results) {
    const std::byte fill{static_cast<unsigned char>(side == Side::kLoose ? 0x00 : 0xff)};  // 0xff: NaN in f32, bf16 and f16
    std::vector<std::byte*> at;
    for (size_t i = 0; i < spec.operands.size(); i++) at.push_back(Place(i, spec.operands[i], side, fill));
    if (spec.link) spec.link(at.data());
    if (side != Side::kLoose) Seal(spec, at);
    const bool has_returned = Attempt(spec, kernels, at.data());
    if (side != Side::kLoose) Unseal(spec, at);
    if (!has_returned) return DescribeFault(spec, at);

    results->assign(spec.operands.size(), {});
    for (size_t i = 0; i < spec.operands.size(); i++) {
      const Operand& operand = spec.operands[i];
      if (operand.role == Role::kScratch) continue;
      if (std::string s = CheckAround(i, operand, at[i], fill); !s.empty()) return s;
      if (operand.role == Role::kIn) continue;
      std::vector<std::byte>& written = (*results)[i];
      for (size_t row = 0; row < operand.used_rows(); row++) {
        const std::byte* from = at[i] + row * operand.stride;
        for (size_t b = 0; operand.may_change && b < operand.row_bytes; b++) {
          if (from[b] != operand.content[row * operand.row_bytes + b] && !operand.may_change(row, b)) {
            return "changes byte " + std::to_string(b) + " of row " + std::to_string(row) + " of operand '" + operand.name + "', which is not the call's";
          }
        }
        written.insert(written.end(), from, from + operand.row_bytes);
      }
    }
    return "";
  }

 private:
  static constexpr size_t kGuard = 1 << 20;  // of one side: a stray access further off is found too
  static constexpr size_t kAround = 4096;    // bytes of a mapping before and behind an operand that are filled and checked

  struct Mapping {
    std::byte* begin = nullptr;
    std::byte* end = nullptr;
  };

  struct Fault {
    sigjmp_buf back;
    volatile sig_atomic_t is_expected;
    std::byte* volatile address;
    volatile sig_atomic_t is_write;
  };
  static inline Fault fault_;  // where a signal handler can find it

  static void OnFault(int number, siginfo_t* info, void* context) {
    if (!fault_.is_expected) {
      signal(number, SIG_DFL);  // not the kernel's: the instruction runs again, and the process ends
      return;
    }
    fault_.is_expected = 0;
    fault_.address = static_cast<std::byte*>(info->si_addr);
#if defined(__x86_64__)
    fault_.is_write = (static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#endif
    siglongjmp(fault_.back, 1);
  }

  // Kernels hold nothing that must be destroyed, so that a jump out of one is sound.
  __attribute__((noinline)) static bool Attempt(const Spec& spec, const Kernels& kernels, std::byte* const* at) {
    if (sigsetjmp(fault_.back, 1) != 0) return false;
    fault_.is_expected = 1;
    spec.call(kernels, at);
    fault_.is_expected = 0;
    return true;
  }

  std::byte* Place(size_t index, const Operand& operand, Side side, std::byte fill) {
    if (mappings_.size() <= index) mappings_.resize(index + 1);
    Mapping& mapping = mappings_[index];
    const size_t needed = (operand.extent() + operand.align + operand.phase + 4096) / 4096 * 4096 + (side == Side::kLoose ? 2 * kAround : 0);
    // A scratch is as long as its mapping, so that both its ends are guarded at once.
    if (static_cast<size_t>(mapping.end - mapping.begin) < needed || operand.role == Role::kScratch) Map(mapping, operand.role == Role::kScratch ? operand.extent() : needed);
    std::byte* start = mapping.begin;
    if (operand.role == Role::kScratch) {
      std::memset(start, static_cast<int>(fill), std::min<size_t>(operand.extent(), 1 << 16));
      return start;
    }
    if (side == Side::kLoose) start += kAround;
    if (side == Side::kEnd) {
      start = mapping.end - operand.extent();
      start -= (reinterpret_cast<uintptr_t>(start) - operand.phase) % operand.align;
    } else {
      start += operand.phase;
    }
    const auto [low, high] = Around(mapping, start, operand);
    std::memset(low, static_cast<int>(fill), static_cast<size_t>(high - low));
    if (operand.content.empty()) return start;
    for (size_t row = 0; row < operand.used_rows(); row++) std::memcpy(start + row * operand.stride, operand.content.data() + row * operand.row_bytes, operand.row_bytes);
    return start;
  }

  static void Map(Mapping& mapping, size_t nbytes) {
    if (static_cast<size_t>(mapping.end - mapping.begin) == nbytes) return;
    if (mapping.begin != nullptr) munmap(mapping.begin - kGuard, static_cast<size_t>(mapping.end - mapping.begin) + 2 * kGuard);
    void* whole = mmap(nullptr, nbytes + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) std::abort();
    mapping.begin = static_cast<std::byte*>(whole) + kGuard;
    mapping.end = mapping.begin + nbytes;
    if (mprotect(mapping.begin, nbytes, PROT_READ | PROT_WRITE) != 0) std::abort();
  }

  struct Span {
    std::byte *low, *high;
  };
  static Span Around(const Mapping& mapping, std::byte* start, const Operand& operand) {
    std::byte* end = start + operand.extent();
    return {static_cast<size_t>(start - mapping.begin) > kAround ? start - kAround : mapping.begin,
            static_cast<size_t>(mapping.end - end) > kAround ? end + kAround : mapping.end};
  }

  void Seal(const Spec& spec, const std::vector<std::byte*>& at) {
    for (size_t i = 0; i < at.size(); i++) {
      const Operand& operand = spec.operands[i];
      if (operand.role == Role::kScratch) continue;
#if defined(__SANITIZE_ADDRESS__)
      const auto [low, high] = Around(mappings_[i], at[i], operand);
      ASAN_POISON_MEMORY_REGION(low, static_cast<size_t>(high - low));
      for (size_t row = 0; row < operand.used_rows(); row++) ASAN_UNPOISON_MEMORY_REGION(at[i] + row * operand.stride, operand.row_bytes);
#endif
      if (operand.role == Role::kIn) Protect(i, PROT_READ);
    }
  }

  void Unseal(const Spec& spec, const std::vector<std::byte*>& at) {
    for (size_t i = 0; i < at.size(); i++) {
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(mappings_[i].begin, static_cast<size_t>(mappings_[i].end - mappings_[i].begin));
#endif
      if (spec.operands[i].role == Role::kIn) Protect(i, PROT_READ | PROT_WRITE);
    }
  }

  void Protect(size_t index, int protection) {
    const Mapping& mapping = mappings_[index];
    if (mprotect(mapping.begin, static_cast<size_t>(mapping.end - mapping.begin), protection) != 0) std::abort();
  }

  std::string DescribeFault(const Spec& spec, const std::vector<std::byte*>& at) const {
    std::byte* address = fault_.address;
    const char* does = fault_.is_write ? "writes" : "reads";
    for (size_t i = 0; i < at.size(); i++) {
      if (address < mappings_[i].begin - kGuard || address >= mappings_[i].end + kGuard) continue;
      const Operand& operand = spec.operands[i];
      const std::byte* end = at[i] + operand.extent();
      if (address >= mappings_[i].begin && address < mappings_[i].end) return "writes to input '" + operand.name + "'";
      // The address is the first that faulted, which may stand one access behind the first that was wrong.
      if (address >= end) return std::string(does) + " past the end of operand '" + operand.name + "', at byte +" + std::to_string(address - end);
      return std::string(does) + " before the start of operand '" + operand.name + "', at byte -" + std::to_string(at[i] - address);
    }
    char text[64];
    std::snprintf(text, sizeof text, "%s outside of all operands, at %p", does, static_cast<void*>(address));
    return text;
  }

  std::string CheckAround(size_t index, const Operand& operand, std::byte* start, std::byte fill) const {
    const auto [low, high] = Around(mappings_[index], start, operand);
    std::byte* at = low;
    for (size_t row = 0; row <= operand.used_rows(); row++) {
      std::byte* stop = row < operand.used_rows() ? start + row * operand.stride : high;
      for (; at < stop; at++) {
        if (*at == fill) continue;
        return "writes between or around the rows of operand '" + operand.name + "', at byte " + std::to_string(at - start) + " from its start";
      }
      if (row < operand.used_rows()) at = stop + operand.row_bytes;
    }
    return "";
  }

  std::vector<Mapping> mappings_;  // by operand; the process ends with them
};

}  // namespace tilerank
