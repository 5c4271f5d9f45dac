// See topology.h. Masks are sized by need: machines with more than the 1024 processors of cpu_set_t exist.
#include "topology/topology.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace tilerank {
namespace {

constexpr size_t kBits = 8 * sizeof(unsigned long);
constexpr size_t kMaxCpus = 65536;     // more than any kernel is built for
constexpr int kPreferredMany = 5;      // MPOL_PREFERRED_MANY, Linux 5.15; older headers lack the name
constexpr int kDefaultPolicy = 0;      // MPOL_DEFAULT

Status BuildMask(const std::vector<int32_t>& ids, const char* what, std::vector<unsigned long>* mask) {
  mask->assign(1, 0);
  for (int32_t id : ids) {
    if (id < 0 || static_cast<size_t>(id) >= kMaxCpus) {
      return Status(Code::kInvalidArgument, std::string(what) + " " + std::to_string(id) + " is out of range").Number("id", id);
    }
    if (mask->size() <= id / kBits) mask->resize(id / kBits + 1);
    (*mask)[id / kBits] |= 1ul << (id % kBits);
  }
  return Status::Ok();
}

std::string Join(const std::vector<int32_t>& ids) {
  std::string text;
  for (int32_t id : ids) text += (text.empty() ? "" : ",") + std::to_string(id);
  return text;
}

}  // namespace

Status GetAffinity(int32_t pid, std::vector<int32_t>* cpus) {
  std::vector<unsigned long> mask(kMaxCpus / kBits);
  const long bytes = syscall(SYS_sched_getaffinity, pid, mask.size() * sizeof(unsigned long), mask.data());
  if (bytes < 0) {
    const int error = errno;
    return Status(Code::kIo, "cannot read the processors of process " + std::to_string(pid) + ": " + strerror(error))
        .Number("pid", pid)
        .Number("errno", error);
  }
  cpus->clear();
  for (size_t id = 0; id < 8 * static_cast<size_t>(bytes); id++) {
    if (mask[id / kBits] >> (id % kBits) & 1) cpus->push_back(static_cast<int32_t>(id));
  }
  return Status::Ok();
}

Status SetAffinity(int32_t pid, const std::vector<int32_t>& cpus) {
  if (cpus.empty()) return Status(Code::kInvalidArgument, "binding to no processor at all");
  std::vector<unsigned long> mask;
  if (Status s = BuildMask(cpus, "processor", &mask); !s.ok()) return s;
  if (syscall(SYS_sched_setaffinity, pid, mask.size() * sizeof(unsigned long), mask.data()) != 0) {
    const int error = errno;
    return Status(Code::kIo, "cannot bind to processors " + Join(cpus) + ": " + strerror(error))
        .Number("pid", pid)
        .Number("errno", error)
        .Text("cpus", Join(cpus));
  }
  std::vector<int32_t> granted;
  if (Status s = GetAffinity(pid, &granted); !s.ok()) return s;
  std::vector<unsigned long> granted_mask;
  if (Status s = BuildMask(granted, "processor", &granted_mask); !s.ok()) return s;
  if (granted_mask != mask) {
    return Status(Code::kIo, "asked for processors " + Join(cpus) + ", granted only " + Join(granted))
        .Number("pid", pid)
        .Text("cpus", Join(cpus))
        .Text("granted", Join(granted));
  }
  return Status::Ok();
}

Status SetMemoryPolicy(const std::vector<int32_t>& nodes, std::string* warning) {
  warning->clear();
  std::vector<unsigned long> mask;
  if (Status s = BuildMask(nodes, "node", &mask); !s.ok()) return s;
  const bool is_default = nodes.empty();
  const long result = syscall(SYS_set_mempolicy, is_default ? kDefaultPolicy : kPreferredMany, is_default ? nullptr : mask.data(),
                              is_default ? 0ul : mask.size() * kBits + 1);
  if (result != 0) {
    *warning = "memory is not bound to node " + Join(nodes) + " (" + strerror(errno) +
               "); pages go where they are first touched. In a container the system call set_mempolicy needs CAP_SYS_NICE";
  }
  return Status::Ok();
}

Status DieWithParent(int32_t parent_pid) {
  // Order matters: the parent may have died before the request stood, so it is looked at afterwards.
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) {
    return Status(Code::kIo, std::string("cannot ask to end with the parent: ") + strerror(errno));
  }
  if (getppid() != parent_pid) {
    return Status(Code::kPeerLost, "the parent process has ended").Number("pid", parent_pid);
  }
  return Status::Ok();
}

}  // namespace tilerank
