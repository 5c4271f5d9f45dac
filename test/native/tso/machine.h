// An x86-TSO machine that runs the shipped code: every thread is a fiber with a FIFO store buffer of its own, and every order of
// their steps is explored, breadth first, so that a violation comes with a shortest trace. What the code under test calls in place
// of std::atomic, futex and pause is in shipped.h; what is checked is in scenarios.cpp.
//
// The model (Sewell et al., "x86-TSO", CACM 2010): a store enters the thread's buffer; the oldest store leaves it for memory at any
// moment; a load takes the newest buffered store of its own thread, else memory; a locked instruction - a seq_cst store is one -
// waits until the buffer is empty and acts on memory at once. FUTEX_WAIT compares with memory and sleeps in one step.
//
// Between two accesses to shared memory the code is a function of what it has loaded. So a thread is a state machine: its states
// are images of its stack and private memory, taken where it is about to touch shared memory, and each (image, loaded value)
// is executed for real once and remembered. A state of the whole is a tuple of images, buffers and memory parts, all interned:
// two states are the same only if every byte is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace tso {

// ---- for the code under test. In the set-up, outside of all fibers, these act on memory directly ------------------------------

uint64_t Load(const void* address, size_t nbytes);
void Store(void* address, uint64_t value, size_t nbytes);  // buffered
void StoreLocked(void* address, uint64_t value, size_t nbytes);
uint64_t Add(void* address, uint64_t value, size_t nbytes);  // locked
long Futex(const void* address, int operation, uint32_t value);
/// A spinning thread goes on when what it looked at last has changed: looks in between are the same look again.
void Pause();
/// A new thread, in the set-up only.
int Spawn(std::function<void()> body);
void Join(int thread);
bool IsShared(const void* address);

// ---- for scenarios ------------------------------------------------------------------------------------------------------------

/// The calling fiber has found something wrong; does not return. `kind` is what tests look for.
[[noreturn]] void Violate(const char* kind, const std::string& text);
/// Shown in traces: what the fiber is at.
void Note(int step);

/// A range of memory that fibers share. Words are found as they are touched; `name` says what lies at an offset.
void Share(const void* begin, size_t nbytes, std::function<std::string(size_t offset)> name);
/// A part of a range that nobody else looks at: stores vanish there, and loads give 0.
void Ignore(const void* begin, size_t nbytes);
/// A store there is the end: the code under test reports an error, and `text` tells which.
void Alarm(const void* address, std::function<std::string()> text);
/// While it lives, in the set-up, operator new takes from memory that belongs to one thread alone, a part of its image.
class PrivateHeap {
 public:
  explicit PrivateHeap(int thread);
  ~PrivateHeap();
  PrivateHeap(const PrivateHeap&) = delete;
  PrivateHeap& operator=(const PrivateHeap&) = delete;
};

struct Options {
  /// A sleeper may also wake without a reason, at any time. Such wake-ups do not count as progress: a state without another step
  /// is stuck whether they are allowed or not.
  bool has_spurious_wakes = false;
  /// Leaves out orders of steps that commute; false to compare.
  bool is_reduced = true;
  uint64_t max_states = 1'000'000'000;
};

struct Report {
  bool is_clean = false;
  std::string violation;  // "kind: text"
  std::string trace;      // the steps that lead there, a line each
  uint64_t states = 0, steps = 0, images = 0, transitions = 0, ends = 0;
  int passes = 0;
};

/// Explores everything that the threads spawned since Reset can do.
Report Explore(const Options& options);
/// Forgets all threads and ranges.
void Reset();

}  // namespace tso
