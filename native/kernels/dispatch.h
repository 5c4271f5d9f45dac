// Chooses the kernel table once, by CPUID, XCR0 and (for AMX) arch_prctl, capped by TILERANK_ISA.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "status.h"

namespace tilerank {

struct TierReport {
  std::string name;
  bool available;
  std::string reason;  // why it was refused, or what it needs and has
};

/// Every tier this build knows, best first, with the reason for each that cannot run here.
std::vector<TierReport> ReportTiers();

/// The best tier at or below `cap` (empty: TILERANK_ISA from the environment, else no cap). A name that is not a tier, or one that
/// ends in '!' (required) and cannot run here, is an error that names the tiers that can.
Status SelectKernels(const std::string& cap, const Kernels** kernels);

}  // namespace tilerank
