// The launcher's side of the flight recorder: a read-only view of every arena that the ranks of its job make, which outlives them. Ranks
// offer their arena to one more socket of the job; where none listens, they have no archive. A thread of its own takes the offers,
// so that nothing queues up and the launcher's event loop has no part in it.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/arena.h"
#include "comm/recorder.h"
#include "status.h"

namespace tilerank {

/// Called by a rank: hands the arena to its launcher, if that keeps an archive. Waits for nothing.
void OfferToArchive(const std::string& nonce, int rank, uint64_t group, int arena_fd);

class Archive {
 public:
  static Status Open(const std::string& nonce, int world_size, std::unique_ptr<Archive>* archive);
  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  /// Of all groups that not every rank has closed in order.
  std::vector<RankRecording> Read(size_t limit);

 private:
  struct Kept {
    int rank;
    uint64_t group;
    pid_t pid;
    Arena arena;  // its first pages: control and recorder
  };
  Archive(std::string nonce, int world_size) : nonce_(std::move(nonce)), world_size_(world_size) {}
  void Main();
  void Take(int connection);
  void Prune();

  const std::string nonce_;
  const int world_size_;
  UniqueFd socket_, stop_;
  std::mutex mutex_;  // guards kept_
  std::vector<Kept> kept_;
  std::thread thread_;
};

}  // namespace tilerank
