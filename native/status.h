// What every native function that can fail returns. Exceptions are off; addon*.cpp turns a Status into a JavaScript error
// with the same code. The ok path is one integer compare and allocates nothing.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tilerank {

enum class Code : int32_t {
  kOk = 0,
  kInvalidArgument,  // ERR_INVALID_ARGUMENT: a caller's mistake, found before anything was touched
  kTimeout,          // ERR_TIMEOUT
  kPeerLost,         // ERR_PEER_LOST
  kMismatch,         // ERR_MISMATCH: ranks disagree
  kAborted,          // ERR_ABORTED
  kBusy,             // ERR_BUSY
  kClosed,           // ERR_CLOSED
  kNoMemory,         // ERR_NO_MEMORY
  kIo,               // ERR_IO
  kUnsupported,      // ERR_UNSUPPORTED
  kInternal,         // ERR_INTERNAL: a broken invariant
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}
  static Status Ok() { return {}; }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

  /// A named fact for the error object, for example Number("rank", 1). Chained: `return Status(...).Number("rank", 1)`.
  Status&& Number(const char* key, double value) && {
    numbers_.emplace_back(key, value);
    return std::move(*this);
  }
  Status&& Text(const char* key, std::string value) && {
    texts_.emplace_back(key, std::move(value));
    return std::move(*this);
  }
  const std::vector<std::pair<const char*, double>>& numbers() const { return numbers_; }
  const std::vector<std::pair<const char*, std::string>>& texts() const { return texts_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
  std::vector<std::pair<const char*, double>> numbers_;
  std::vector<std::pair<const char*, std::string>> texts_;
};

}  // namespace tilerank
