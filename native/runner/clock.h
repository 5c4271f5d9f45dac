// The monotonic clock of the runner: the same in all processes of a machine, and in JavaScript as process.hrtime.
#pragma once
#include <chrono>

namespace tilerank {

using Clock = std::chrono::steady_clock;

inline double NowMs() { return std::chrono::duration<double, std::milli>(Clock::now().time_since_epoch()).count(); }
inline double MicrosSince(Clock::time_point start) { return std::chrono::duration<double, std::micro>(Clock::now() - start).count(); }

}  // namespace tilerank
