// Private memory of one rank: weights, KV cache, activations, scratch. Anonymous, zeroed by the kernel, aligned to huge pages
// and advised to use them; touched first by the threads that use it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "status.h"

namespace tilerank {

class MappedMemory {
 public:
  MappedMemory() = default;
  MappedMemory(MappedMemory&& other) noexcept { *this = static_cast<MappedMemory&&>(other); }
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;
  ~MappedMemory();

  /// Reserves nbytes (0: nothing) for `what`, which the error names together with the sizes.
  static Status Allocate(size_t nbytes, const char* what, MappedMemory* memory);

  std::byte* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }
  /// Resident bytes of the range, from the kernel.
  size_t ResidentBytes() const;

 private:
  std::byte* data_ = nullptr;
  size_t nbytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_nbytes_ = 0;
};

}  // namespace tilerank
