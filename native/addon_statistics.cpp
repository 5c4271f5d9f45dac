// What a Communicator has counted and timed, for JavaScript: collectives/stats.ts and trace.ts make sentences and files of it.
#include <memory>
#include <utility>
#include <vector>

#include "addon.h"
#include "comm/comm_handle.h"

namespace tilerank {

TimedCall CommHandle::BeginTimed(const Call& call, uint64_t called) const {
  TimedCall timed;
  timed.op = call.operation.op;
  timed.dtype = call.operation.dtype;
  timed.count = call.operation.count;
  timed.nbytes = call.operation.nbytes();
  // In a group on several nodes calls are numbered, not their sequences.
  timed.sequence = mailbox_ != nullptr ? call.number : call.operation.sequence;
  timed.sequences = mailbox_ != nullptr ? 1 : SequencesOf(call.operation, world_size_);
  timed.called = called;
  timed.begin = Ticks();
  timed.waited = communicator_->waited_ticks();
  return timed;
}

Status CommHandle::EndTimed(TimedCall* timed, Status status) const {
  timed->waited = communicator_->waited_ticks() - timed->waited;
  timed->end = Ticks();
  timed->has_failed = !status.ok();
  return status;
}

/// statistics() -> { nsPerTick, tallies: [operation, size class, calls, bytes, latencies?][], waits: [rank, waits, ticks, late][] }; latencies:
/// a Uint32Array of the histogram's buckets.
Napi::Value CommHandle::StatisticsJs(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array tallies = Napi::Array::New(env);
  for (size_t op = 0; op < Statistics::kOperations; op++) {
    for (size_t size = 0; size < Statistics::kSizes; size++) {
      const Statistics::Tally& tally = statistics_.tally(op, size);
      if (tally.calls == 0) continue;
      Napi::Array row = Napi::Array::New(env);
      row.Set(0u, NameOf(static_cast<CollectiveOp>(op)));
      row.Set(1u, static_cast<uint32_t>(size));
      row.Set(2u, static_cast<double>(tally.calls));
      row.Set(3u, static_cast<double>(tally.bytes));
      if (tally.latency != nullptr) {
        Napi::Uint32Array counts = Napi::Uint32Array::New(env, Histogram::kBuckets);
        for (size_t i = 0; i < Histogram::kBuckets; i++) counts[i] = tally.latency->counts()[i];
        row.Set(4u, counts);
      }
      tallies.Set(tallies.Length(), row);
    }
  }
  Napi::Array waits = Napi::Array::New(env);
  if (communicator_ != nullptr) {
    for (const PeerWaits& peer : communicator_->Waits()) {
      Napi::Array row = Napi::Array::New(env);
      row.Set(0u, peer.rank);
      row.Set(1u, static_cast<double>(peer.waits));
      row.Set(2u, static_cast<double>(peer.ticks));
      row.Set(3u, static_cast<double>(peer.late));
      waits.Set(waits.Length(), row);
    }
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("nsPerTick", clock_.NsPerTick());
  object.Set("tallies", tallies);
  object.Set("waits", waits);
  return object;
}

/// traced() -> { dropped, calls: { operation, dtype, count, bytes, sequence, sequences, calledNs, beginNs, endNs, waitedNs, hasFailed }[] }
Napi::Value CommHandle::Traced(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  uint64_t dropped = 0;
  const std::vector<TimedCall> calls = statistics_.Traced(&dropped);
  const double rate = clock_.NsPerTick();
  const auto ns_of = [&](uint64_t ticks) {
    return static_cast<double>(clock_.start_ns()) + static_cast<double>(static_cast<int64_t>(ticks - clock_.start_ticks())) * rate;
  };
  Napi::Array rows = Napi::Array::New(env, calls.size());
  for (size_t i = 0; i < calls.size(); i++) {
    Napi::HandleScope scope(env);
    const TimedCall& call = calls[i];
    Napi::Object row = Napi::Object::New(env);
    row.Set("operation", NameOf(call.op));
    row.Set("dtype", NameOf(call.dtype));
    row.Set("count", static_cast<double>(call.count));
    row.Set("bytes", static_cast<double>(call.nbytes));
    row.Set("sequence", static_cast<double>(call.sequence));
    row.Set("sequences", static_cast<double>(call.sequences));
    row.Set("calledNs", ns_of(call.called));
    row.Set("beginNs", ns_of(call.begin));
    row.Set("endNs", ns_of(call.end));
    row.Set("waitedNs", static_cast<double>(call.waited) * rate);
    row.Set("hasFailed", call.has_failed);
    rows.Set(static_cast<uint32_t>(i), row);
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("dropped", static_cast<double>(dropped));
  object.Set("calls", rows);
  return object;
}

}  // namespace tilerank
