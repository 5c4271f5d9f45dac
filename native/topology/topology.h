// The calls to the kernel that JavaScript cannot make: affinity, memory policy, death with the parent. Reading the machine (sysfs,
// cgroups) is plain text and done in launcher/topology.ts, where fixtures can stand in.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "status.h"

namespace tilerank {

/// Processors that a process or thread may run on, ascending. 0 is the calling thread.
Status GetAffinity(int32_t pid, std::vector<int32_t>* cpus);

/// Binds one thread (0: the calling one) and reads the mask back: the kernel drops forbidden processors without a word.
Status SetAffinity(int32_t pid, const std::vector<int32_t>& cpus);

/// Prefers the nodes for pages that the calling thread touches first (and for what it starts); none: back to the default. When a
/// container refuses, `warning` says so and the call is ok: first touch remains.
Status SetMemoryPolicy(const std::vector<int32_t>& nodes, std::string* warning);

/// This process ends (SIGKILL) when the thread that started it does. Fails if the parent is no longer `parent_pid`.
Status DieWithParent(int32_t parent_pid);

}  // namespace tilerank
