#include "runner/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

namespace tilerank {

namespace {
constexpr size_t kHugePage = 2u << 20;
}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(nbytes_, other.nbytes_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_nbytes_, other.mapping_nbytes_);
  return *this;
}

MappedMemory::~MappedMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_nbytes_);
}

Status MappedMemory::Allocate(size_t nbytes, const char* what, MappedMemory* memory) {
  *memory = MappedMemory();
  if (nbytes == 0) return Status::Ok();
  if (nbytes > SIZE_MAX - 2 * kHugePage) return Status(Code::kNoMemory, std::string(what) + " is larger than any memory");
  // Small ranges need no huge page; a large one is over-reserved by one so that it can start on a boundary.
  const bool is_large = nbytes >= kHugePage;
  const size_t mapping_nbytes = is_large ? ((nbytes + kHugePage - 1) & ~(kHugePage - 1)) + kHugePage : (nbytes + 4095) & ~size_t{4095};
  void* mapping = mmap(nullptr, mapping_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return Status(Code::kNoMemory, std::string("no memory for ") + what + ": " + std::to_string(nbytes) + " bytes were refused (" +
                                       std::strerror(errno) + ")")
        .Number("nbytes", static_cast<double>(nbytes));
  }
  uintptr_t start = reinterpret_cast<uintptr_t>(mapping);
  if (is_large) {
    start = (start + kHugePage - 1) & ~(kHugePage - 1);
    // A refusal only costs speed; `doctor` reports the state of huge pages.
    (void)madvise(reinterpret_cast<void*>(start), (nbytes + kHugePage - 1) & ~(kHugePage - 1), MADV_HUGEPAGE);
  }
  memory->mapping_ = mapping;
  memory->mapping_nbytes_ = mapping_nbytes;
  memory->data_ = reinterpret_cast<std::byte*>(start);
  memory->nbytes_ = nbytes;
  return Status::Ok();
}

size_t MappedMemory::ResidentBytes() const {
  if (data_ == nullptr) return 0;
  const size_t pages = (nbytes_ + 4095) / 4096;
  size_t resident = 0;
  std::vector<unsigned char> map(1 << 16);
  for (size_t first = 0; first < pages; first += map.size()) {
    const size_t count = pages - first < map.size() ? pages - first : map.size();
    if (mincore(data_ + first * 4096, count * 4096, map.data()) != 0) return resident;
    for (size_t i = 0; i < count; i++) resident += (map[i] & 1) * 4096u;
  }
  return resident;
}

}  // namespace tilerank
