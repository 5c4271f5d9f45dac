// The choice of the kernel table. A tier is available when this build holds it, the processor has its instructions
// (CPUID), and the operating system saves their registers (XCR0); the reason for every refusal is kept for `tilerank
// doctor`.
#include "kernels/dispatch.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tilerank {
namespace {

struct Feature {
  const char* name;
  bool present;
};

struct TierInfo {
  const char* name;
  const Kernels* kernels;         // null: not part of this build
  std::vector<Feature> features;  // what it needs, all of them
};

#if defined(__x86_64__)
struct CpuRegisters {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuRegisters Cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuRegisters r;
  // False for a leaf beyond the highest: all features absent.
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// XCR0: the register sets that the operating system saves. 0 when it saves none of the extended ones.
uint64_t SavedState(bool has_osxsave) {
  if (!has_osxsave) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool Bit(uint64_t value, int bit) { return (value >> bit & 1) != 0; }

std::vector<TierInfo> ReadTiers() {
  const CpuRegisters leaf1 = Cpuid(1, 0), leaf7 = Cpuid(7, 0);
  const CpuRegisters leaf7_1 = leaf7.eax >= 1 ? Cpuid(7, 1) : CpuRegisters{};
  const uint64_t saved = SavedState(Bit(leaf1.ecx, 27));
  const Feature os_avx = {"AVX registers saved by the operating system", (saved & 0x6) == 0x6};
  const Feature os_avx512 = {"AVX-512 registers saved by the operating system", (saved & 0xe6) == 0xe6};
  const Feature os_amx = {"AMX tiles saved by the operating system", (saved & 0x60000) == 0x60000};
  const std::vector<Feature> avx2 = {
      {"avx2", Bit(leaf7.ebx, 5)}, {"fma", Bit(leaf1.ecx, 12)}, {"f16c", Bit(leaf1.ecx, 29)}, os_avx};
  std::vector<Feature> avx512 = avx2;
  for (const Feature& f :
       {Feature{"avx512f", Bit(leaf7.ebx, 16)}, Feature{"avx512bw", Bit(leaf7.ebx, 30)},
        Feature{"avx512dq", Bit(leaf7.ebx, 17)}, Feature{"avx512vl", Bit(leaf7.ebx, 31)}, os_avx512}) {
    avx512.push_back(f);
  }
  std::vector<Feature> avx512_bf16 = avx512;
  avx512_bf16.push_back({"avx512_vnni", Bit(leaf7.ecx, 11)});
  avx512_bf16.push_back({"avx512_bf16", Bit(leaf7_1.eax, 5)});
  std::vector<Feature> amx = avx512_bf16;
  for (const Feature& f : {Feature{"amx_tile", Bit(leaf7.edx, 24)}, Feature{"amx_bf16", Bit(leaf7.edx, 22)}, os_amx}) {
    amx.push_back(f);
  }
  return {{"amx", nullptr, amx},
          {"avx512_bf16", &kAvx512Bf16Kernels, avx512_bf16},
          {"avx512", nullptr, avx512},
          {"avx2", nullptr, avx2},
          {"scalar", &kScalarKernels, {}}};
}
#else
std::vector<TierInfo> ReadTiers() { return {{"scalar", &kScalarKernels, {}}}; }
#endif

// Read once: CPUID leaves the guest on a virtual machine, which costs microseconds.
const std::vector<TierInfo>& Tiers() {
  static const std::vector<TierInfo> tiers = ReadTiers();
  return tiers;
}

std::string Join(const std::vector<std::string>& words) {
  std::string joined;
  for (const std::string& word : words) joined += (joined.empty() ? "" : ", ") + word;
  return joined;
}

TierReport Report(const TierInfo& tier) {
  std::vector<std::string> missing, present;
  for (const Feature& f : tier.features) (f.present ? present : missing).push_back(f.name);
  std::string cpu = tier.features.empty() ? "needs nothing beyond the baseline"
                    : missing.empty()     ? "this processor has " + Join(present)
                                          : "this processor lacks " + Join(missing);
  if (tier.kernels == nullptr) return {tier.name, false, "not built into this version; " + cpu};
  return {tier.name, missing.empty(), cpu};
}

}  // namespace

std::vector<TierReport> ReportTiers() {
  std::vector<TierReport> reports;
  for (const TierInfo& tier : Tiers()) reports.push_back(Report(tier));
  return reports;
}

Status SelectKernels(const std::string& cap, const Kernels** kernels) {
  std::string wanted = cap;
  const char* origin = "the requested tier";
  if (wanted.empty()) {
    const char* variable = std::getenv("TILERANK_ISA");
    if (variable != nullptr) wanted = variable;
    origin = "TILERANK_ISA";
  }
  const bool is_required = !wanted.empty() && wanted.back() == '!';
  if (is_required) wanted.pop_back();

  const std::vector<TierInfo>& tiers = Tiers();
  std::vector<std::string> usable;
  for (const TierInfo& tier : tiers) {
    if (Report(tier).available) usable.push_back(tier.name);
  }
  bool is_below_cap = wanted.empty() && !is_required;
  for (const TierInfo& tier : tiers) {
    const bool is_wanted = wanted == tier.name;
    is_below_cap = is_below_cap || is_wanted;
    if (!is_below_cap) continue;
    const TierReport report = Report(tier);
    if (report.available) {
      *kernels = tier.kernels;
      return Status::Ok();
    }
    if (is_wanted && is_required) {
      return Status(Code::kUnsupported, std::string(origin) + " demands '" + wanted + "', which cannot run here: " +
                                            report.reason + ". Tiers that can: " + Join(usable))
          .Text("tier", wanted);
    }
  }
  return Status(Code::kInvalidArgument, std::string(origin) + " is '" + wanted +
                                            "', which is no tier. Tiers that can run here: " + Join(usable) +
                                            " (append '!' to demand one instead of capping at it)")
      .Text("tier", wanted);
}

}  // namespace tilerank
