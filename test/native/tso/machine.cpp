#include "machine.h"

#include <linux/futex.h>
#include <sys/mman.h>

#include <algorithm>
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace tso {

namespace {

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "the machine itself is at fault: %s\n", what);
  std::_Exit(2);
}
void Require(bool is_so, const char* what) {
  if (!is_so) Die(what);
}

// The thread whose private memory operator new takes; -1: the process's.
int allocating_for = -1;
// While the machine itself works on a fiber's stack.
struct Outside {
  const int before = std::exchange(allocating_for, -1);
  Outside() = default;
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;
  ~Outside() { allocating_for = before; }
};

constexpr int kMaxThreads = 4;
constexpr size_t kMaxWords = 192;
using WordSet = std::bitset<kMaxWords>;
constexpr size_t kHeapBytes = 16 << 10, kStackBytes = 72 << 10;
// Frames that have been left are wiped, so that nothing of the past is in an image. Whatever lies deeper costs states, not truth.
constexpr size_t kWipedBytes = 20 << 10;

enum class Kind : uint8_t { kLoad, kStoreLocked, kAdd, kWait, kWake, kPause, kJoin, kEnd, kViolation };

// What a thread is about to do to shared memory.
struct Action {
  Kind kind = Kind::kEnd;
  uint8_t nbytes = 0;
  uint16_t word = 0;    // kJoin: the thread
  int32_t note = 0;
  uint64_t value = 0;   // operand; kWait: expected; kPause: the value seen
};
static_assert(sizeof(Action) == 16);

struct Word {
  uintptr_t address;
  uint8_t nbytes;
  uint8_t part;        // the shared range it lies in
  uint16_t index;      // in that part
  uint64_t initial;
  std::string name;
  // Of the threads, learned while exploring: who ever writes, who ever sleeps on it. See ChoicesOf.
  uint32_t writers = 0, waiters = 0;
};

struct Range {
  uintptr_t begin, end;
  std::function<std::string(size_t)> name;
  uint16_t num_words = 0;
};

struct Buffered {
  uint64_t word, value;
};

struct Thread {
  std::byte* memory = nullptr;  // heap, then stack
  size_t heap_used = 0;
  void* stack_pointer = nullptr;
  std::function<void()>* body = nullptr;
  Action pending;
  uint64_t result = 0;
  std::vector<Buffered> pushed;  // since it was resumed
  // The last load since it was resumed.
  bool has_looked = false;
  Buffered last_look{};
  int32_t note = 0;
  uint32_t live_image = UINT32_MAX;  // that lies in its memory now

  std::byte* heap() const { return memory; }
  std::byte* stack_end() const { return memory + kHeapBytes + kStackBytes; }
};

// Begins an image.
struct Head {
  void* stack_pointer;
  Action pending;
  size_t heap_used;
};

// Strings of whole 8-byte words <-> small numbers, given in the order of the strings' arrival.
class Interner {
 public:
  /// The number of a string, and whether it is new.
  std::pair<uint32_t, bool> Intern(const void* data, size_t nbytes) {
    if (2 * (size() + 1) > slots_.size()) Grow();
    size_t at = Hash(data, nbytes) & (slots_.size() - 1);
    for (; slots_[at] != UINT32_MAX; at = (at + 1) & (slots_.size() - 1)) {
      const uint32_t id = slots_[at];
      if (this->nbytes(id) == nbytes && (nbytes == 0 || std::memcmp(this->data(id), data, nbytes) == 0)) return {id, false};
    }
    slots_[at] = static_cast<uint32_t>(size());
    words_.resize(words_.size() + nbytes / 8);
    if (nbytes > 0) std::memcpy(&words_[ends_.back()], data, nbytes);
    ends_.push_back(words_.size());
    return {slots_[at], true};
  }
  const uint64_t* data(uint32_t id) const { return words_.data() + ends_[id]; }
  size_t nbytes(uint32_t id) const { return 8 * (ends_[id + 1] - ends_[id]); }
  size_t size() const { return ends_.size() - 1; }

 private:
  static uint64_t Hash(const void* data, size_t nbytes) {
    uint64_t hash = 0x9e3779b97f4a7c15ull ^ nbytes;
    for (size_t at = 0; at < nbytes; at += 8) {
      uint64_t value;
      std::memcpy(&value, static_cast<const std::byte*>(data) + at, 8);
      const unsigned __int128 product = static_cast<unsigned __int128>(hash ^ value) * 0xd6e8feb86659fd93ull;
      hash = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64) ^ 0xa0761d6478bd642full;
    }
    return hash ^ hash >> 32;
  }
  void Grow() {
    slots_.assign(std::max<size_t>(1 << 10, 2 * slots_.size()), UINT32_MAX);
    for (uint32_t id = 0; id < size(); id++) {
      size_t at = Hash(data(id), nbytes(id)) & (slots_.size() - 1);
      while (slots_[at] != UINT32_MAX) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = id;
    }
  }
  std::vector<uint64_t> words_;
  std::vector<size_t> ends_ = {0};
  std::vector<uint32_t> slots_;
};

// The numbers of a state: per thread its image and buffer, per shared range its contents.
constexpr size_t kMaxNumbers = 2 * kMaxThreads + 8;
constexpr uint32_t kAsleep = 1u << 31;
struct State {
  uint32_t numbers[kMaxNumbers];
};
static_assert(kMaxNumbers % 2 == 0);

// The states found so far, in the order in which they were found: at once the queue of the search and the way back.
struct States {
  Interner numbers;
  std::vector<uint32_t> parents;
  std::vector<uint8_t> choices;
};

// A choice is a kind of step and a thread.
enum class Step : uint8_t { kRun, kDrain, kWakeSpuriously };
constexpr uint8_t ChoiceOf(Step step, int thread) { return static_cast<uint8_t>(static_cast<int>(step) * kMaxThreads + thread); }

// What a thread does after it was told a value: its next image, and the stores on the way, which only its buffer sees.
struct Transition {
  uint64_t result;  // the value
  uint32_t image;
  uint32_t pushed;  // of lists_
};

class Machine {
 public:
  // ---- set-up
  int Spawn(std::function<void()> body) {
    Require(running_ < 0, "threads are spawned in the set-up");
    Require(num_threads_ < kMaxThreads, "too many threads");
    const int t = num_threads_++;
    EnsureMemory(t);
    threads_[t].body = new std::function<void()>(std::move(body));
    return t;
  }
  void EnsureMemory(int t) {
    Thread& thread = threads_[t];
    if (thread.memory != nullptr) return;
    void* memory = mmap(nullptr, kHeapBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    Require(memory != MAP_FAILED, "no memory");
    thread.memory = static_cast<std::byte*>(memory);
  }
  void* Allocate(int t, size_t nbytes) {
    EnsureMemory(t);
    Thread& thread = threads_[t];
    const size_t at = (thread.heap_used + 63) & ~size_t{63};
    Require(at + nbytes <= kHeapBytes, "a thread's private memory is used up");
    thread.heap_used = at + nbytes;
    std::memset(thread.heap() + at, 0, nbytes);  // nothing of another image
    return thread.heap() + at;
  }
  /// Outside of the model: private memory, and everything while the set-up runs.
  bool IsDirect(const void* address) const { return running_ < 0 || IsPrivate(address); }
  bool IsPrivate(const void* address) const {
    for (const Thread& thread : threads_) {
      if (thread.memory != nullptr && address >= thread.memory && address < thread.stack_end()) return true;
    }
    return false;
  }
  void Share(const void* begin, size_t nbytes, std::function<std::string(size_t)> name) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    ranges_.push_back({address, address + nbytes, std::move(name)});
    Require(ranges_.size() <= 8, "too many shared ranges");
  }
  int RangeOf(const void* pointer) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    for (size_t i = 0; i < ranges_.size(); i++) {
      if (address >= ranges_[i].begin && address < ranges_[i].end) return static_cast<int>(i);
    }
    return -1;
  }
  void Ignore(const void* begin, size_t nbytes) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    ignored_.push_back({address, address + nbytes});
  }
  bool IsIgnored(const void* pointer) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return std::any_of(ignored_.begin(), ignored_.end(), [&](const auto& range) { return address >= range.first && address < range.second; });
  }
  void Alarm(const void* address, std::function<std::string()> text) {
    alarms_[reinterpret_cast<uintptr_t>(address)] = std::move(text);
  }
  void Reset() {
    for (Thread& thread : threads_) {
      if (thread.memory == nullptr) continue;
      delete thread.body;
      std::memset(thread.memory, 0, kHeapBytes + kStackBytes);
      std::byte* memory = thread.memory;
      thread = Thread();
      thread.memory = memory;
    }
    num_threads_ = 0;
    ranges_.clear();
    ignored_.clear();
    alarms_.clear();
    words_.clear();
    word_at_.clear();
    ClearTables();
  }

  // ---- on fibers
  int running() const { return running_; }
  Thread& current() { return threads_[running_]; }

  /// nbytes 0: a futex, the first half of a word or all of it.
  uint16_t WordOf(const void* pointer, size_t nbytes) {
    Outside outside;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (auto found = word_at_.find(address); found != word_at_.end()) {
      Require(nbytes == 0 || words_[found->second].nbytes == nbytes, "a word is accessed with two sizes");
      return found->second;
    }
    const int part = RangeOf(pointer);
    Require(part >= 0, "an atomic lies in memory that was not declared");
    Word word{};
    word.address = address;
    word.nbytes = static_cast<uint8_t>(nbytes);
    word.part = static_cast<uint8_t>(part);
    word.index = ranges_[static_cast<size_t>(part)].num_words++;
    std::memcpy(&word.initial, pointer, nbytes);
    word.name = ranges_[static_cast<size_t>(part)].name(address - ranges_[static_cast<size_t>(part)].begin);
    words_.push_back(word);
    Require(words_.size() <= kMaxWords, "too many words");
    has_found_ = true;
    const auto number = static_cast<uint16_t>(words_.size() - 1);
    word_at_[address] = number;
    return number;
  }
  void Learn(uint32_t Word::* who, uint16_t word) {
    const uint32_t bit = 1u << running_;
    if ((words_[word].*who & bit) != 0) return;
    words_[word].*who |= bit;
    has_learned_ = true;
  }
  uint64_t Perform(Kind kind, uint16_t word, size_t nbytes, uint64_t value) {
    Thread& thread = current();
    thread.pending = Action{kind, static_cast<uint8_t>(nbytes), word, thread.note, value};
    Leave();
    return thread.result;
  }
  void Push(uint16_t word, uint64_t value) {
    Outside outside;
    current().pushed.push_back({word, value});
  }
  void Leave();
  [[noreturn]] void Violate(const std::string& text) {
    {
      Outside outside;
      violation_.assign(text.data(), text.size());
    }
    Perform(Kind::kViolation, 0, 0, 0);
    Die("a fiber went on after its end");
  }
  uint16_t WordToWrite(const void* address, size_t nbytes) {
    const uint16_t word = WordOf(address, nbytes);
    Learn(&Word::writers, word);
    if (const auto alarm = alarms_.find(words_[word].address); alarm != alarms_.end()) Violate("error: " + alarm->second());
    return word;
  }
  [[noreturn]] void FiberMain() {
    (*current().body)();
    Perform(Kind::kEnd, 0, 0, 0);
    Die("a fiber went on after its end");
  }

  Report Explore(const Options& options);

 private:
  struct Choices {
    uint8_t list[3 * kMaxThreads];
    int count = 0;
    bool has_progress = false;
  };

  struct Future {
    WordSet reads, writes;
  };

  void ClearTables() {
    images_ = lists_ = Interner();
    for (Interner& part : parts_) part = Interner();
    pending_.clear();
    thread_of_image_.clear();
    transitions_.clear();
    for (Thread& thread : threads_) thread.live_image = UINT32_MAX;
  }

  uint32_t& ImageOf(State& state, int t) const { return state.numbers[2 * t]; }
  uint32_t& BufferOf(State& state, int t) const { return state.numbers[2 * t + 1]; }
  uint32_t& PartOf(State& state, size_t part) const { return state.numbers[2 * static_cast<size_t>(num_threads_) + part]; }
  size_t StateBytes() const { return 8 * (static_cast<size_t>(num_threads_) + (ranges_.size() + 1) / 2); }

  uint64_t ValueOf(State& state, uint16_t word) const {
    const Word& it = words_[word];
    return parts_[it.part].data(PartOf(state, it.part))[it.index];
  }
  void SetValue(State& state, uint16_t word, uint64_t value) {
    const Word& it = words_[word];
    Interner& part = parts_[it.part];
    const uint32_t id = PartOf(state, it.part);
    uint64_t contents[256];
    Require(part.nbytes(id) <= sizeof contents, "too many words in a range");
    std::memcpy(contents, part.data(id), part.nbytes(id));
    contents[it.index] = value;
    PartOf(state, it.part) = part.Intern(contents, part.nbytes(id)).first;
  }
  size_t BufferSize(State& state, int t) const { return lists_.nbytes(BufferOf(state, t)) / sizeof(Buffered); }
  const Buffered* Buffer(State& state, int t) const { return reinterpret_cast<const Buffered*>(lists_.data(BufferOf(state, t))); }
  /// What thread t would load.
  uint64_t Look(State& state, int t, uint16_t word) const {
    const Buffered* buffer = Buffer(state, t);
    for (size_t i = BufferSize(state, t); i-- > 0;) {
      if (buffer[i].word == word) return buffer[i].value;
    }
    return ValueOf(state, word);
  }
  const Action& Pending(State& state, int t) const { return pending_[ImageOf(state, t) & ~kAsleep]; }
  bool IsAsleep(State& state, int t) const { return (ImageOf(state, t) & kAsleep) != 0; }

  Choices ChoicesOf(State& state, const Options& options);
  void Take(State& state, uint8_t choice, std::string* text);
  void Advance(State& state, int t, uint64_t result);
  Transition Execute(int t, uint32_t image, uint64_t result, bool is_first);
  const Future& FutureOf(State& state, int t, int frozen, uint32_t view);
  uint32_t ViewOf(State& state, int t);
  bool MayGoAlone(State& state, int t);
  void Audit();
  State Initial();
  void Walk(const State& initial, const Options& options);
  Report Pass(const State& initial, const Options& options);
  std::string TraceOf(const State& initial, const States& states, uint32_t last, int choice);

  Thread threads_[kMaxThreads];
  int num_threads_ = 0;
  int running_ = -1;
  void* scheduler_stack_ = nullptr;
  std::vector<Range> ranges_;
  std::vector<std::pair<uintptr_t, uintptr_t>> ignored_;
  std::map<uintptr_t, std::function<std::string()>> alarms_;
  std::vector<Word> words_;
  std::map<uintptr_t, uint16_t> word_at_;
  bool has_found_ = false;    // a word
  bool has_learned_ = false;  // who writes or sleeps, or a transition
  std::string violation_;

  Interner images_;                       // of all threads
  std::vector<Action> pending_;           // by image
  std::vector<uint8_t> thread_of_image_;
  Interner lists_;                        // of buffered stores
  Interner parts_[8];
  std::vector<std::vector<Transition>> transitions_;  // by image
  std::map<std::pair<uint64_t, uint32_t>, Future> futures_;  // of this pass
  Interner views_;
  std::vector<bool> is_found_;
  std::vector<std::byte> scratch_;
};

Machine machine;
extern "C" void TsoSwitch(void** save, void* load);
// Saves what the callee saves in the System V ABI, changes stacks, restores.
asm(R"(
.text
.globl TsoSwitch
.type TsoSwitch, @function
TsoSwitch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size TsoSwitch, .-TsoSwitch
)");

extern "C" void TsoFiberMain() { machine.FiberMain(); }

void Machine::Leave() { TsoSwitch(&current().stack_pointer, scheduler_stack_); }

// The image: its head, then the live stack and the heap, or the text of a violation.
Transition Machine::Execute(int t, uint32_t image, uint64_t result, bool is_first) {
  Thread& thread = threads_[t];
  std::byte* const end = thread.stack_end();
  if (is_first) {
    // As if TsoSwitch had saved six registers, with the entry as return address; the ABI wants rsp % 16 == 8 there.
    auto* top = reinterpret_cast<void**>(end) - 8;
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(&TsoFiberMain);
    thread.stack_pointer = top;
  } else if (thread.live_image != image) {
    const auto* from = reinterpret_cast<const std::byte*>(images_.data(image));
    Head head;
    std::memcpy(&head, from, sizeof head);
    const auto stack_bytes = static_cast<size_t>(end - static_cast<std::byte*>(head.stack_pointer));
    thread.stack_pointer = head.stack_pointer;
    thread.pending = head.pending;
    thread.note = head.pending.note;
    thread.heap_used = head.heap_used;
    std::memcpy(head.stack_pointer, from + sizeof head, stack_bytes);
    std::memcpy(thread.heap(), from + sizeof head + stack_bytes, head.heap_used);
    std::memset(static_cast<std::byte*>(head.stack_pointer) - kWipedBytes, 0, kWipedBytes);
  }
  thread.result = result;
  thread.pushed.clear();
  thread.has_looked = false;
  running_ = allocating_for = t;
  TsoSwitch(&scheduler_stack_, thread.stack_pointer);
  running_ = allocating_for = -1;

  auto* stack = static_cast<std::byte*>(thread.stack_pointer);
  Require(stack - kWipedBytes >= thread.heap() + kHeapBytes, "a stack is too small");
  std::memset(stack - kWipedBytes, 0, kWipedBytes);
  Head head{};
  head.stack_pointer = stack;
  head.pending = thread.pending;
  head.heap_used = thread.heap_used;
  scratch_.clear();
  const auto append = [this](const void* data, size_t nbytes) {
    const auto* bytes = static_cast<const std::byte*>(data);
    scratch_.insert(scratch_.end(), bytes, bytes + nbytes);
  };
  append(&head, sizeof head);
  if (thread.pending.kind == Kind::kViolation) {
    append(violation_.c_str(), violation_.size() + 1);  // nobody goes on from here
  } else {
    append(stack, static_cast<size_t>(end - stack));
    append(thread.heap(), thread.heap_used);
  }
  scratch_.resize((scratch_.size() + 7) & ~size_t{7});
  const auto [next, is_new] = images_.Intern(scratch_.data(), scratch_.size());
  if (is_new) {
    pending_.push_back(thread.pending);
    thread_of_image_.push_back(static_cast<uint8_t>(t));
    transitions_.emplace_back();
  }
  thread.live_image = next;
  return {result, next, lists_.Intern(thread.pushed.data(), thread.pushed.size() * sizeof(Buffered)).first};
}

// Lets thread t go on with what its pending action gave.
void Machine::Advance(State& state, int t, uint64_t result) {
  const uint32_t image = ImageOf(state, t) & ~kAsleep;
  const auto find = [&] {
    const std::vector<Transition>& known = transitions_[image];
    return std::find_if(known.begin(), known.end(), [&](const Transition& transition) { return transition.result == result; });
  };
  if (find() == transitions_[image].end()) {
    const Transition found = Execute(t, image, result, false);
    transitions_[image].push_back(found);
    has_learned_ = true;
  }
  const Transition transition = *find();
  ImageOf(state, t) = transition.image;
  if (const size_t nbytes = lists_.nbytes(transition.pushed); nbytes > 0) {
    const uint32_t before = BufferOf(state, t);
    std::byte joined[64 * sizeof(Buffered)];
    Require(lists_.nbytes(before) + nbytes <= sizeof joined, "a store buffer is too small");
    std::memcpy(joined, lists_.data(before), lists_.nbytes(before));
    std::memcpy(joined + lists_.nbytes(before), lists_.data(transition.pushed), nbytes);
    BufferOf(state, t) = lists_.Intern(joined, lists_.nbytes(before) + nbytes).first;
  }
}

// The values of the words that only thread t writes.
uint32_t Machine::ViewOf(State& state, int t) {
  uint64_t values[kMaxWords];
  size_t count = 0;
  for (uint16_t word = 0; word < words_.size(); word++) {
    if (words_[word].writers == 1u << t) values[count++] = ValueOf(state, word);
  }
  return views_.Intern(values, 8 * count).first;
}

// What thread t may touch before thread `frozen` writes to memory again: by all transitions known of it, where loads of words that
// only `frozen` writes give what stands there. Memory order does not matter to that, nor do sleeps: whoever sleeps may wake.
const Machine::Future& Machine::FutureOf(State& state, int t, int frozen, uint32_t view) {
  const uint32_t start = ImageOf(state, t) & ~kAsleep;
  const auto [at, is_new] = futures_.try_emplace({static_cast<uint64_t>(start) << 8 | static_cast<uint64_t>(frozen), view});
  Future& future = at->second;
  if (!is_new) return future;
  std::vector<uint32_t> found = {start};
  is_found_.resize(pending_.size());
  is_found_[start] = true;
  for (size_t i = 0; i < found.size(); i++) {
    const uint32_t image = found[i];
    const Action& action = pending_[image];
    bool is_fixed = false;
    uint64_t value = 0;
    switch (action.kind) {
      case Kind::kLoad:
        is_fixed = words_[action.word].writers == 1u << frozen;
        if (is_fixed) value = ValueOf(state, action.word);
        [[fallthrough]];
      case Kind::kPause:
      case Kind::kWait: future.reads.set(action.word); break;
      case Kind::kStoreLocked:
      case Kind::kAdd: future.reads.set(action.word), future.writes.set(action.word); break;
      case Kind::kWake:
      case Kind::kJoin:
      case Kind::kEnd:
      case Kind::kViolation: break;
    }
    for (const Transition& transition : transitions_[image]) {
      if (is_fixed && transition.result != value) continue;
      const auto* pushed = reinterpret_cast<const Buffered*>(lists_.data(transition.pushed));
      for (size_t n = lists_.nbytes(transition.pushed) / sizeof(Buffered); n-- > 0;) future.writes.set(pushed[n].word);
      if (is_found_[transition.image]) continue;
      is_found_[transition.image] = true;
      found.push_back(transition.image);
    }
  }
  for (uint32_t image : found) is_found_[image] = false;
  return future;
}

// True where the next step of thread t - the drain of its oldest store, else its pending access - commutes with all that the others
// can do before t has written to memory, so that no order but "t first" need be looked at: a persistent set of one step (Godefroid,
// "Partial-Order Methods", 1996). Steps of the futex are never taken alone; every cycle has one, so no thread is forgotten for ever.
bool Machine::MayGoAlone(State& state, int t) {
  const bool is_drain = BufferSize(state, t) > 0;
  const Action& action = Pending(state, t);
  uint16_t word = action.word;
  bool is_write = true;
  if (is_drain) {
    word = static_cast<uint16_t>(Buffer(state, t)[0].word);
    if ((words_[word].waiters & 1u << t) != 0) return false;  // its own FUTEX_WAIT would look past its buffer
  } else {
    if (IsAsleep(state, t)) return false;
    if (action.kind == Kind::kLoad) {
      is_write = false;
    } else if (action.kind != Kind::kStoreLocked && action.kind != Kind::kAdd) {
      return false;
    }
  }
  if (!is_write && (words_[word].writers & ~(1u << t)) == 0) return true;
  const uint32_t view = ViewOf(state, t);
  for (int other = 0; other < num_threads_; other++) {
    if (other == t) continue;
    const Future& future = FutureOf(state, other, t, view);
    if (future.writes[word] || (is_write && future.reads[word])) return false;
    const Buffered* buffer = Buffer(state, other);
    for (size_t i = BufferSize(state, other); i-- > 0;) {
      if (buffer[i].word == word) return false;
    }
  }
  return true;
}

// All that can happen next, or one step that may come first in any case. What the threads do later is known from what they did:
// a pass over all states that shows something new is followed by another, so that the last one ran with the whole truth.
Machine::Choices Machine::ChoicesOf(State& state, const Options& options) {
  Choices choices;
  for (int t = 0; t < num_threads_; t++) {
    const bool is_buffering = BufferSize(state, t) > 0;
    if (is_buffering) {
      choices.list[choices.count++] = ChoiceOf(Step::kDrain, t);
      choices.has_progress = true;
    }
    if (options.is_reduced && MayGoAlone(state, t)) return {{ChoiceOf(is_buffering ? Step::kDrain : Step::kRun, t)}, 1, true};
    if (IsAsleep(state, t)) {
      if (options.has_spurious_wakes) choices.list[choices.count++] = ChoiceOf(Step::kWakeSpuriously, t);
      continue;
    }
    const Action& action = Pending(state, t);
    bool is_enabled = true;
    switch (action.kind) {
      case Kind::kStoreLocked:
      case Kind::kAdd: is_enabled = !is_buffering; break;
      case Kind::kPause: is_enabled = Look(state, t, action.word) != action.value; break;
      case Kind::kJoin: is_enabled = Pending(state, action.word).kind == Kind::kEnd; break;
      case Kind::kEnd:
      case Kind::kViolation: is_enabled = false; break;
      case Kind::kLoad:
      case Kind::kWait:
      case Kind::kWake: break;
    }
    if (!is_enabled) continue;
    choices.list[choices.count++] = ChoiceOf(Step::kRun, t);
    choices.has_progress = true;
  }
  return choices;
}

std::string DescribeValue(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, value < 100'000 ? "%lu" : "0x%lx", static_cast<unsigned long>(value));
  return text;
}

void Machine::Take(State& state, uint8_t choice, std::string* text) {
  const auto step = static_cast<Step>(choice / kMaxThreads);
  const int t = choice % kMaxThreads;
  const Action action = Pending(state, t);
  const auto tell = [&](const std::string& what) {
    if (text == nullptr) return;
    char head[48];
    std::snprintf(head, sizeof head, "  thread %d, call %d:  ", t, action.note);
    *text += head + what + "\n";
  };
  if (step == Step::kDrain) {
    const Buffered first = Buffer(state, t)[0];
    const size_t rest = (BufferSize(state, t) - 1) * sizeof(Buffered);
    std::byte copy[64 * sizeof(Buffered)];
    std::memcpy(copy, Buffer(state, t) + 1, rest);
    const auto word = static_cast<uint16_t>(first.word);
    SetValue(state, word, first.value);
    BufferOf(state, t) = lists_.Intern(copy, rest).first;
    tell("its buffered store reaches memory: " + (text ? words_[word].name + " = " + DescribeValue(first.value) : ""));
    return;
  }
  if (step == Step::kWakeSpuriously) {
    tell("wakes for no reason");
    return Advance(state, t, 0);
  }
  const std::string name = text && action.kind != Kind::kJoin ? words_[action.word].name : "";
  switch (action.kind) {
    case Kind::kLoad: {
      const uint64_t value = Look(state, t, action.word);
      tell("loads " + name + ": " + DescribeValue(value));
      return Advance(state, t, value);
    }
    case Kind::kStoreLocked: {
      SetValue(state, action.word, action.value);
      tell("stores, locked: " + name + " = " + DescribeValue(action.value));
      return Advance(state, t, 0);
    }
    case Kind::kAdd: {
      const uint64_t before = ValueOf(state, action.word);
      const uint64_t mask = action.nbytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * action.nbytes) - 1;
      const uint64_t after = (before + action.value) & mask;
      SetValue(state, action.word, after);
      tell("adds, locked: " + name + " = " + DescribeValue(after));
      return Advance(state, t, before);
    }
    case Kind::kWait: {
      // With memory, not with the own buffer.
      const uint64_t value = ValueOf(state, action.word);
      if (static_cast<uint32_t>(value) != static_cast<uint32_t>(action.value)) {
        tell("does not sleep: " + name + " is " + DescribeValue(value));
        return Advance(state, t, 0);
      }
      tell("sleeps on " + name + " = " + DescribeValue(value));
      ImageOf(state, t) |= kAsleep;
      return;
    }
    case Kind::kWake:
      tell("wakes whoever sleeps on " + name);
      for (int other = 0; other < num_threads_; other++) {
        if (!IsAsleep(state, other) || Pending(state, other).word != action.word) continue;
        Advance(state, other, 0);
      }
      return Advance(state, t, 0);
    case Kind::kPause:
      return Advance(state, t, 0);
    case Kind::kJoin:
      tell("joins thread " + std::to_string(action.word));
      return Advance(state, t, 0);
    case Kind::kEnd:
    case Kind::kViolation: Die("a thread that ended was run");
  }
}

State Machine::Initial() {
  State state{};
  // Threads stop before their first access, so their order here does not matter.
  for (int t = 0; t < num_threads_; t++) {
    const Transition first = Execute(t, 0, 0, true);
    ImageOf(state, t) = first.image;
    BufferOf(state, t) = first.pushed;
  }
  for (size_t part = 0; part < ranges_.size(); part++) {
    std::vector<uint64_t> contents(ranges_[part].num_words);
    for (const Word& word : words_) {
      if (word.part == part) contents[word.index] = word.initial;
    }
    PartOf(state, part) = parts_[part].Intern(contents.data(), 8 * contents.size()).first;
  }
  return state;
}

std::string Machine::TraceOf(const State& initial, const States& states, uint32_t last, int choice) {
  std::vector<uint8_t> path;
  if (choice >= 0) path.push_back(static_cast<uint8_t>(choice));
  for (uint32_t id = last; id != 0; id = states.parents[id]) path.push_back(states.choices[id]);
  std::reverse(path.begin(), path.end());
  State state = initial;
  std::string text;
  for (uint8_t step : path) Take(state, step, &text);
  for (int t = 0; t < num_threads_; t++) {
    const Action& action = Pending(state, t);
    if (action.kind == Kind::kEnd || action.kind == Kind::kViolation) continue;
    const bool is_waiting = IsAsleep(state, t) || action.kind == Kind::kPause;
    if (is_waiting) text += "  thread " + std::to_string(t) + (IsAsleep(state, t) ? " sleeps on " : " looks at ") + words_[action.word].name + "\n";
  }
  return text;
}

// Executes everything again in another order. A difference means that a thread knows something which is not in its image.
void Machine::Audit() {
  for (uint32_t image = static_cast<uint32_t>(transitions_.size()); image-- > 0;) {
    for (const Transition& before : transitions_[image]) {
      const Transition again = Execute(thread_of_image_[image], image, before.result, false);
      Require(again.image == before.image && again.pushed == before.pushed, "an image is not all that a thread knows");
    }
  }
}

Report Machine::Explore(const Options& options) {
  // Private memory as the set-up left it.
  std::vector<std::vector<std::byte>> heaps;
  for (int t = 0; t < num_threads_; t++) heaps.emplace_back(threads_[t].heap(), threads_[t].heap() + threads_[t].heap_used);
  // Words are found as they are touched; their first values belong into the first state, so all starts anew.
  for (;;) {
    ClearTables();
    for (int t = 0; t < num_threads_; t++) {
      Thread& thread = threads_[t];
      std::memset(thread.memory, 0, kHeapBytes + kStackBytes);
      std::memcpy(thread.heap(), heaps[static_cast<size_t>(t)].data(), heaps[static_cast<size_t>(t)].size());
      thread.heap_used = heaps[static_cast<size_t>(t)].size();
      thread.note = 0;
    }
    has_found_ = false;
    const State initial = Initial();
    if (options.is_reduced) Walk(initial, options);
    Report report;
    for (int pass = 1; !has_found_; pass++) {
      report = Pass(initial, options);
      report.passes = pass;
      if (!report.violation.empty() || !has_learned_ || !options.is_reduced) break;
    }
    if (has_found_) continue;
    Audit();
    report.is_clean = report.violation.empty();
    Require(!report.is_clean || report.ends > 0, "a search without an end");
    report.images = images_.size();
    for (const auto& known : transitions_) report.transitions += known.size();
    return report;
  }
}

// Random runs from start to end, as long as they show transitions that were not known: it saves passes over all states.
void Machine::Walk(const State& initial, const Options& options) {
  Options all = options;
  all.is_reduced = false;
  uint64_t random = 1;
  for (int in_vain = 0; in_vain < 50 && !has_found_; in_vain++) {
    State state = initial;
    for (;;) {
      const Choices choices = ChoicesOf(state, all);
      if (!choices.has_progress || has_found_) break;
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      has_learned_ = false;
      Take(state, choices.list[(random >> 33) % static_cast<uint64_t>(choices.count)], nullptr);
      if (has_learned_) in_vain = 0;
    }
  }
}

Report Machine::Pass(const State& initial, const Options& options) {
  Report report;
  has_learned_ = false;
  futures_.clear();
  views_ = Interner();
  States states;
  const auto insert = [&](const State& state, uint32_t parent, uint8_t choice) {
    if (!states.numbers.Intern(state.numbers, StateBytes()).second) return false;
    states.parents.push_back(parent);
    states.choices.push_back(choice);
    return true;
  };
  insert(initial, 0, 0);
  for (uint32_t id = 0; id < states.numbers.size(); id++) {
    State state{};
    std::memcpy(state.numbers, states.numbers.data(id), StateBytes());
    const Choices choices = ChoicesOf(state, options);
    if (!choices.has_progress) {
      bool is_end = true;
      for (int t = 0; t < num_threads_; t++) is_end &= Pending(state, t).kind == Kind::kEnd;
      if (is_end) {
        report.ends++;
        continue;
      }
      report.violation = "stuck: no thread can go on";
      report.trace = TraceOf(initial, states, id, -1);
      break;
    }
    for (int i = 0; i < choices.count; i++) {
      State next = state;
      Take(next, choices.list[i], nullptr);
      report.steps++;
      if (has_found_) return report;
      if (!insert(next, id, choices.list[i])) continue;
      for (int t = 0; t < num_threads_; t++) {
        if (Pending(next, t).kind != Kind::kViolation) continue;
        report.violation = reinterpret_cast<const char*>(images_.data(ImageOf(next, t))) + sizeof(Head);
        report.trace = TraceOf(initial, states, id, choices.list[i]);
      }
    }
    if (!report.violation.empty()) break;
    if (states.numbers.size() > options.max_states) {
      report.violation = "too large: more than " + std::to_string(options.max_states) + " states";
      break;
    }
  }
  report.states = states.numbers.size();
  return report;
}

}  // namespace

uint64_t Load(const void* address, size_t nbytes) {
  uint64_t value = 0;
  if (machine.IsDirect(address)) {
    std::memcpy(&value, address, nbytes);
    return value;
  }
  if (machine.IsIgnored(address)) return 0;
  const uint16_t word = machine.WordOf(address, nbytes);
  value = machine.Perform(Kind::kLoad, word, nbytes, 0);
  machine.current().last_look = {word, value};
  machine.current().has_looked = true;
  return value;
}

void Store(void* address, uint64_t value, size_t nbytes) {
  if (machine.IsDirect(address)) {
    std::memcpy(address, &value, nbytes);
  } else if (!machine.IsIgnored(address)) {
    machine.Push(machine.WordToWrite(address, nbytes), value);
  }
}

void StoreLocked(void* address, uint64_t value, size_t nbytes) {
  if (machine.IsDirect(address)) return Store(address, value, nbytes);
  machine.Perform(Kind::kStoreLocked, machine.WordToWrite(address, nbytes), nbytes, value);
}

uint64_t Add(void* address, uint64_t value, size_t nbytes) {
  if (machine.IsDirect(address)) {
    const uint64_t before = Load(address, nbytes);
    Store(address, before + value, nbytes);
    return before;
  }
  return machine.Perform(Kind::kAdd, machine.WordToWrite(address, nbytes), nbytes, value);
}

long Futex(const void* address, int operation, uint32_t value) {
  Require(machine.running() >= 0, "a futex in the set-up");
  const uint16_t word = machine.WordOf(address, 0);
  const int kind = operation & ~FUTEX_PRIVATE_FLAG;
  Require(kind == FUTEX_WAIT || kind == FUTEX_WAKE, "an unknown futex operation");
  if (kind == FUTEX_WAIT) machine.Learn(&Word::waiters, word);
  machine.Perform(kind == FUTEX_WAIT ? Kind::kWait : Kind::kWake, word, 4, value);
  return 0;
}

void Pause() {
  Thread& thread = machine.current();
  Require(thread.has_looked, "a pause that follows no look");
  machine.Perform(Kind::kPause, static_cast<uint16_t>(thread.last_look.word), 0, thread.last_look.value);
}

int Spawn(std::function<void()> body) { return machine.Spawn(std::move(body)); }

void Join(int thread) { machine.Perform(Kind::kJoin, static_cast<uint16_t>(thread), 0, 0); }

bool IsShared(const void* address) { return machine.RangeOf(address) >= 0; }

void Violate(const char* kind, const std::string& text) { machine.Violate(std::string(kind) + ": " + text); }

void Note(int step) { machine.current().note = step; }

void Share(const void* begin, size_t nbytes, std::function<std::string(size_t)> name) { machine.Share(begin, nbytes, std::move(name)); }

void Ignore(const void* begin, size_t nbytes) { machine.Ignore(begin, nbytes); }

void Alarm(const void* address, std::function<std::string()> text) { machine.Alarm(address, std::move(text)); }

Report Explore(const Options& options) { return machine.Explore(options); }

void Reset() { machine.Reset(); }

PrivateHeap::PrivateHeap(int thread) { allocating_for = thread; }
PrivateHeap::~PrivateHeap() { allocating_for = -1; }

}  // namespace tso

// Fibers, and set-up code under a PrivateHeap, allocate from a thread's private memory; it is given back with the image.
// Over-aligned types as well: private memory is aligned to 64 bytes.
[[gnu::noinline]] void* operator new(size_t nbytes) {
  if (tso::allocating_for >= 0) return tso::machine.Allocate(tso::allocating_for, nbytes);
  if (void* memory = std::malloc(nbytes); memory != nullptr) return memory;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  // A fiber's delete is undone with its image; what the set-up made stays.
  if (tso::allocating_for < 0 && !tso::machine.IsPrivate(memory)) std::free(memory);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
void* operator new(size_t nbytes, std::align_val_t alignment) {
  if (tso::allocating_for >= 0) return tso::machine.Allocate(tso::allocating_for, nbytes);
  const auto unit = static_cast<size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (nbytes + unit - 1) / unit * unit); memory != nullptr) return memory;
  std::abort();
}
void operator delete(void* memory, std::align_val_t) noexcept { operator delete(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { operator delete(memory); }
