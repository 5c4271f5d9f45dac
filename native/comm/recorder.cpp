#include "comm/recorder.h"

#include <algorithm>

namespace tilerank {

std::vector<RecordRow> ReadRecorder(const std::byte* arena, size_t limit) {
  const ControlPage& control = *reinterpret_cast<const ControlPage*>(arena);
  const Record* records = reinterpret_cast<const Record*>(arena + kRecorderOffset);
  const uint64_t ticks0 = control.start_ticks.load(std::memory_order_relaxed), ticks1 = Ticks();
  const int64_t ns0 = control.start_ns.load(std::memory_order_relaxed), ns1 = NowNs();
  // Ticks count evenly: this moment and that of the arena's start give their rate.
  const bool has_clock = ticks0 < ticks1 && ns0 > 0 && ns0 < ns1;
  const double rate = has_clock ? static_cast<double>(ns1 - ns0) / static_cast<double>(ticks1 - ticks0) : 0;
  const auto time_of = [&](uint64_t ticks) -> int64_t {
    if (!has_clock || ticks < ticks0 || ticks > ticks1) return 0;
    return ns0 + static_cast<int64_t>(static_cast<double>(ticks - ticks0) * rate);
  };
  std::vector<RecordRow> rows;
  for (uint64_t i = 0; i < kRecords; i++) {
    const Record& record = records[i];
    RecordRow row;
    row.sequence = record.sequence.load(std::memory_order_acquire);
    if (row.sequence == 0 || row.sequence % kRecords != i) continue;
    row.tag = record.tag.load(std::memory_order_relaxed);
    row.count = record.count.load(std::memory_order_relaxed);
    row.published_ns = time_of(record.published.load(std::memory_order_relaxed));
    row.completed_ns = time_of(record.completed.load(std::memory_order_relaxed));
    const uint64_t place = record.place.load(std::memory_order_relaxed);
    row.step = static_cast<uint32_t>(place >> 32);
    row.layer = static_cast<int32_t>(static_cast<uint32_t>(place)) - 1;
    if (record.sequence.load(std::memory_order_relaxed) == row.sequence) rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end(), [](const RecordRow& a, const RecordRow& b) { return a.sequence < b.sequence; });
  // Older than a whole ring: left over from a writer that skips sequences, or made up.
  if (!rows.empty()) {
    const uint64_t last = rows.back().sequence;
    rows.erase(rows.begin(), std::find_if(rows.begin(), rows.end(), [&](const RecordRow& row) { return last - row.sequence < kRecords; }));
  }
  if (rows.size() > limit) rows.erase(rows.begin(), rows.end() - static_cast<std::ptrdiff_t>(limit));
  return rows;
}

}  // namespace tilerank
