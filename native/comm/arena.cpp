#include "comm/arena.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

namespace tilerank {

namespace {

constexpr size_t kHugeBytes = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr int kRequiredSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::string Megabytes(size_t nbytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(nbytes) / (1 << 20));
  return text;
}

Status IoError(const std::string& what) {
  const int error = errno;
  return Status(Code::kIo, what + ": " + std::strerror(error)).Text("systemError", std::strerror(error));
}

// A file of one number; "max", a missing file and anything else give `fallback`.
size_t ReadNumber(const std::string& path, size_t fallback) {
  std::ifstream file(path);
  unsigned long long value = 0;
  if (file >> value) return static_cast<size_t>(value);
  return fallback;
}

// The number behind a name in a file of "name number" lines, or 0.
size_t ReadField(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string key;
  for (size_t value; file >> key >> value;) {
    if (key == name) return value;
  }
  return 0;
}

// mountinfo writes blanks and backslashes as \ooo.
std::string Unescape(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      plain += static_cast<char>(std::strtol(text.substr(i + 1, 3).c_str(), nullptr, 8));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

struct CgroupMount {
  std::string root, at;    // what part of the hierarchy is mounted, and where
  std::string controllers;  // of a version 1 hierarchy, between commas; empty: version 2
};

std::vector<CgroupMount> ReadCgroupMounts(const std::string& root) {
  std::vector<CgroupMount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream head(line), tail(line.substr(dash + 3));
    std::string skip, from, at, type, source, options;
    if (!(head >> skip >> skip >> skip >> from >> at) || !(tail >> type >> source >> options)) continue;
    if (type != "cgroup" && type != "cgroup2") continue;
    mounts.push_back({Unescape(from), root + Unescape(at), type == "cgroup" ? "," + options + "," : ""});
  }
  return mounts;
}

// One limit of one cgroup. Files that were read count as usage, but go as soon as memory is wanted.
void LookAtLimit(const std::string& folder, const char* limit_name, const char* usage_name, const std::string& prefix, size_t* room,
                 std::string* what) {
  const size_t limit = ReadNumber(folder + "/" + limit_name, SIZE_MAX);
  if (limit > (size_t{1} << 60)) return;  // version 1 writes "no limit" as the largest page-aligned number
  const std::string stat = folder + "/memory.stat";
  const size_t cache = ReadField(stat, prefix + "inactive_file") + ReadField(stat, prefix + "active_file");
  const size_t usage = ReadNumber(folder + "/" + usage_name, 0);
  const size_t used = usage > cache ? usage - cache : 0;
  const size_t left = limit > used ? limit - used : 0;
  if (left < *room) {
    *room = left;
    *what = folder + "/" + limit_name;
  }
}

// Walks from a cgroup to the root of its mount and keeps the smallest room.
void WalkMemoryGroups(const CgroupMount& mount, std::string path, size_t* room, std::string* what) {
  if (mount.root != "/") {
    // A path outside of what is mounted here leaves the mount's own root.
    const bool is_below = path == mount.root || path.compare(0, mount.root.size() + 1, mount.root + "/") == 0;
    path = is_below ? path.substr(mount.root.size()) : "";
  }
  if ((path + "/").find("/../") != std::string::npos || path == "/") path.clear();
  for (;;) {
    const std::string folder = mount.at + path;
    if (mount.controllers.empty()) {
      // Beyond memory.high nobody is killed, but all are throttled to a crawl.
      for (const char* name : {"memory.max", "memory.high"}) LookAtLimit(folder, name, "memory.current", "", room, what);
    } else {
      LookAtLimit(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_", room, what);
    }
    if (path.empty()) return;
    path.resize(path.find_last_of('/'));
  }
}

// An address range whose start is a multiple of 2 MiB, so that huge pages fit; small arenas need none.
void* Reserve(size_t nbytes, size_t* reserved, void** raw) {
  const size_t slack = nbytes >= kHugeBytes ? kHugeBytes : 0;
  *reserved = nbytes + slack;
  *raw = mmap(nullptr, *reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*raw == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(*raw);
  const uintptr_t aligned = slack == 0 ? start : (start + kHugeBytes - 1) & ~(kHugeBytes - 1);
  if (aligned > start) munmap(*raw, aligned - start);
  const uintptr_t end = start + *reserved;
  if (end > aligned + nbytes) munmap(reinterpret_cast<void*>(aligned + nbytes), end - aligned - nbytes);
  return reinterpret_cast<void*>(aligned);
}

int NodesOfMachine() {
  std::ifstream file("/sys/devices/system/node/possible");
  std::string text;
  if (!(file >> text)) return 1;
  const size_t dash = text.find_last_of("-,");
  return dash == std::string::npos ? 1 : std::atoi(text.c_str() + dash + 1) + 1;
}

// Binds the pages of the mapping, and with them the file's, to the caller's nodes. A container may forbid it: a warning.
std::string BindTo(const std::vector<int>& nodes, void* data, size_t nbytes) {
  if (nodes.empty() || NodesOfMachine() <= 1) return {};
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  unsigned long mask[1024 / kBits] = {};
  for (int node : nodes) {
    if (node >= 0 && node < 1024) mask[static_cast<size_t>(node) / kBits] |= 1ul << (static_cast<size_t>(node) % kBits);
  }
  if (syscall(SYS_mbind, data, nbytes, MPOL_BIND, mask, 1024ul + 1, MPOL_MF_STRICT | MPOL_MF_MOVE) == 0) return {};
  return std::string("shared memory could not be bound to the rank's NUMA nodes (mbind: ") + std::strerror(errno) +
         "); it stays where the kernel puts it; in a container add CAP_SYS_NICE, or allow that system call in its seccomp profile";
}

}  // namespace

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) close(fd_);
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      is_owner_(std::exchange(other.is_owner_, false)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(is_owner_, other.is_owner_);
  return *this;
}

Arena::~Arena() {
  if (is_owner_ && data_ != nullptr) munmap(data_, size_);
}

Arena Arena::View(const Arena& other, size_t offset) { return Arena(other.data_ + offset, other.size_ - offset, false); }

Status Arena::Map(int fd, size_t nbytes, bool is_populated, Arena* arena) {
  size_t reserved;
  void* raw;
  void* address = Reserve(nbytes, &reserved, &raw);
  if (address == nullptr) return IoError("no address space for " + Megabytes(nbytes));
  const int flags = (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_FIXED | (is_populated ? MAP_POPULATE : 0);
  if (mmap(address, nbytes, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
    Status status = IoError("mapping " + Megabytes(nbytes) + " failed");
    munmap(address, nbytes);
    return status;
  }
  *arena = Arena(static_cast<std::byte*>(address), nbytes, true);
  // Advice only: where huge pages of shared memory are switched off, small pages serve.
  if (nbytes >= kHugeBytes) madvise(address, nbytes, MADV_HUGEPAGE);
  return Status::Ok();
}

Status Arena::Create(const ArenaOptions& options, Arena* arena, UniqueFd* fd, std::string* warning) {
  const size_t nbytes = (options.nbytes + kPage - 1) & ~(kPage - 1);
  if (nbytes == 0 || nbytes < options.nbytes || nbytes > static_cast<size_t>(LLONG_MAX)) {
    return Status(Code::kInvalidArgument, options.purpose + ": " + std::to_string(options.nbytes) + " bytes of shared memory are not possible");
  }
  std::string limit;
  const size_t available = AvailableMemory("", &limit);
  if (nbytes > available) {
    return Status(Code::kNoMemory, options.purpose + " needs " + Megabytes(nbytes) + " of shared memory, but " + limit + " leaves " +
                                       Megabytes(available) + "; ask for less, end other programs, or raise the limit")
        .Number("nbytes", static_cast<double>(nbytes))
        .Number("availableBytes", static_cast<double>(available));
  }
  UniqueFd file(memfd_create("tilerank", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return IoError("memfd_create failed");
  if (ftruncate(file.get(), static_cast<off_t>(nbytes)) != 0) return IoError("sizing shared memory to " + Megabytes(nbytes) + " failed");
  {
    // The policy of a shared mapping belongs to the file, so it must stand before the pages are reserved.
    Arena unreserved;
    if (Status s = Map(file.get(), nbytes, false, &unreserved); !s.ok()) return s;
    *warning = BindTo(options.nodes, unreserved.data(), nbytes);
  }
  if (fallocate(file.get(), 0, 0, static_cast<off_t>(nbytes)) != 0) {
    const int error = errno;
    return Status(Code::kNoMemory, options.purpose + ": reserving " + Megabytes(nbytes) + " of shared memory failed (" +
                                       std::strerror(error) + "); " + Megabytes(available) + " seemed to be available")
        .Number("nbytes", static_cast<double>(nbytes))
        .Number("availableBytes", static_cast<double>(available));
  }
  if (fcntl(file.get(), F_ADD_SEALS, kRequiredSeals) != 0) return IoError("sealing shared memory failed");
  if (Status s = Map(file.get(), nbytes, true, arena); !s.ok()) return s;
  fd->Swap(file);
  return Status::Ok();
}

Status Arena::Receive(const UniqueFd& fd, size_t nbytes, const std::string& purpose, Arena* arena) {
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kRequiredSeals) != kRequiredSeals) {
    return Status(Code::kMismatch, purpose + ": a peer sent shared memory that is not sealed");
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return IoError("fstat of a peer's shared memory failed");
  const size_t padded = (nbytes + kPage - 1) & ~(kPage - 1);
  if (info.st_size < 0 || static_cast<size_t>(info.st_size) != padded) {
    return Status(Code::kMismatch, purpose + ": a peer's shared memory has " + std::to_string(info.st_size) + " bytes, expected are " +
                                       std::to_string(padded));
  }
  return Map(fd.get(), padded, true, arena);
}

Status Arena::ReceiveHead(const UniqueFd& fd, size_t nbytes, Arena* arena) {
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  struct stat info;
  if (seals < 0 || (seals & kRequiredSeals) != kRequiredSeals || fstat(fd.get(), &info) != 0 || info.st_size < static_cast<off_t>(nbytes)) {
    return Status(Code::kMismatch, "not a sealed arena of " + std::to_string(nbytes) + " bytes or more");
  }
  void* address = mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED) return IoError("mapping " + Megabytes(nbytes) + " failed");
  *arena = Arena(static_cast<std::byte*>(address), nbytes, true);
  return Status::Ok();
}

Status Arena::CreateLocal(size_t nbytes, Arena* arena) { return Map(-1, (nbytes + kPage - 1) & ~(kPage - 1), true, arena); }

size_t AvailableMemory(const std::string& root, std::string* what) {
  size_t room = SIZE_MAX;
  *what = "the address space";
  std::ifstream meminfo(root + "/proc/meminfo");
  std::string key, unit;
  for (size_t value; meminfo >> key >> value; std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") {
      room = value * 1024;
      *what = "/proc/meminfo (MemAvailable)";
      break;
    }
  }
  // Lines are id:controllers:path. No controllers: the unified tree; "memory": the older one.
  const std::vector<CgroupMount> mounts = ReadCgroupMounts(root);
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    const bool is_unified = controllers.empty();
    if (path.empty() || path[0] != '/') continue;
    if (!is_unified && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    for (const CgroupMount& mount : mounts) {
      if (is_unified ? mount.controllers.empty() : mount.controllers.find(",memory,") != std::string::npos) {
        WalkMemoryGroups(mount, path, &room, what);
      }
    }
  }
  return room;
}

}  // namespace tilerank
