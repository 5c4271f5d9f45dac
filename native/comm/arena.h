// RAII over shared memory without a name: a sealed memfd and its mapping. The owner checks the memory limits, binds and reserves
// every page before the descriptor leaves the process, so that neither side can meet SIGBUS; a receiver proves seals and size
// before it maps. Descriptors are close-on-exec and closed once every peer has its own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "status.h"

namespace tilerank {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  /// The descriptor, which is the caller's to close from now on.
  int Release() { return std::exchange(fd_, -1); }
  void Swap(UniqueFd& other) { std::swap(fd_, other.fd_); }

 private:
  int fd_ = -1;
};

struct ArenaOptions {
  size_t nbytes = 0;
  std::string purpose;        // for messages: what the memory is for
  std::vector<int> nodes;     // NUMA nodes of the caller; bound to them when the machine has others too
};

class Arena {
 public:
  Arena() = default;
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  /// Makes, binds, reserves, seals and maps. *warning receives a sentence when the binding was refused.
  static Status Create(const ArenaOptions& options, Arena* arena, UniqueFd* fd, std::string* warning);
  /// Maps a peer's arena after checking that it is sealed and has exactly this size.
  static Status Receive(const UniqueFd& fd, size_t nbytes, const std::string& purpose, Arena* arena);
  /// A read-only view of the first nbytes of a peer's arena, which is sealed and at least that long.
  static Status ReceiveHead(const UniqueFd& fd, size_t nbytes, Arena* arena);
  /// Private to this process: ranks that are threads, and groups of one.
  static Status CreateLocal(size_t nbytes, Arena* arena);
  /// A second view of a mapping that outlives it, from an offset on; unmaps nothing.
  static Arena View(const Arena& other, size_t offset = 0);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Arena(std::byte* data, size_t size, bool is_owner) : data_(data), size_(size), is_owner_(is_owner) {}
  static Status Map(int fd, size_t nbytes, bool is_populated, Arena* arena);
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  bool is_owner_ = false;
};

/// Bytes that this process may still take: the least of MemAvailable and (limit - usage) of every memory cgroup above it.
/// `what` names the file that decides. The files are looked for below `root`, "" for this machine. launcher/topology.ts reads the
/// same, and more; a test holds the two against each other.
size_t AvailableMemory(const std::string& root, std::string* what);

}  // namespace tilerank
