#include "sim/scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace tilerank {

namespace {

// Algorithms keep a few pointers a rank there, 8 KB for 1024 ranks; only pages that are touched take memory.
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;

}  // namespace

Scheduler::~Scheduler() {
  if (stacks_ != nullptr) munmap(stacks_, stacks_bytes_);
}

void Scheduler::Enter(uint32_t high, uint32_t low) {
  reinterpret_cast<Scheduler*>(static_cast<uintptr_t>(high) << 32 | low)->Main();
}

void Scheduler::Main() {
  body_(current_);
  running_--;
  SwitchToMain();
}

void Scheduler::SwitchToMain() { swapcontext(&fibers_[static_cast<size_t>(current_)].context, &main_); }

Status Scheduler::Run(int fibers, std::function<void(int)> body, std::function<void()> on_stuck) {
  body_ = std::move(body);
  const size_t stride = kGuardBytes + kStackBytes;
  stacks_bytes_ = stride * static_cast<size_t>(fibers);
  void* memory = mmap(nullptr, stacks_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) return Status(Code::kNoMemory, std::string("stacks of virtual ranks: ") + std::strerror(errno));
  stacks_ = static_cast<std::byte*>(memory);
  fibers_.resize(static_cast<size_t>(fibers));
  for (int i = 0; i < fibers; i++) {
    std::byte* stack = stacks_ + stride * static_cast<size_t>(i);
    if (mprotect(stack, kGuardBytes, PROT_NONE) != 0) return Status(Code::kNoMemory, std::string("guards of stacks: ") + std::strerror(errno));
    ucontext_t& context = fibers_[static_cast<size_t>(i)].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack + kGuardBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Scheduler::Enter), 2, static_cast<uint32_t>(self >> 32), static_cast<uint32_t>(self));
    events_.push({0, order_++, i, 0, 0});
  }
  running_ = fibers;
  while (running_ > 0) {
    if (events_.empty()) {
      on_stuck();
      if (events_.empty()) return Status(Code::kInternal, "virtual ranks are stuck for good");
    }
    const Event event = events_.top();
    events_.pop();
    if (event.fiber < 0) {
      on_event_(event.time, event.kind, event.id);
      continue;
    }
    current_ = event.fiber;
    AdvanceTo(event.time);
    swapcontext(&main_, &fibers_[static_cast<size_t>(current_)].context);
    current_ = -1;
  }
  return Status::Ok();
}

bool Scheduler::Settle() {
  const SimTime clock = now();
  if (events_.empty() || events_.top().time >= clock) return false;
  events_.push({clock, order_++, current_, 0, 0});
  SwitchToMain();
  return true;
}

void Scheduler::Block() {
  fibers_[static_cast<size_t>(current_)].is_blocked = true;
  SwitchToMain();
}

void Scheduler::Wake(int index, SimTime time) {
  Fiber& fiber = fibers_[static_cast<size_t>(index)];
  if (!fiber.is_blocked) return;
  fiber.is_blocked = false;
  events_.push({std::max(fiber.clock, time), order_++, index, 0, 0});
}

void Scheduler::At(SimTime time, uint32_t kind, uint64_t id) { events_.push({time, order_++, -1, kind, id}); }

}  // namespace tilerank
