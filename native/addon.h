// Shared by the addon_*.cpp files: registration entries and the one conversion from Status to a JavaScript error.
#pragma once
#include <napi.h>

#include "comm/recorder.h"
#include "status.h"

namespace tilerank {

void RegisterTopology(Napi::Env env, Napi::Object exports);  // addon_topology.cpp: affinity, ISA tiers, memory policy
void RegisterLinear(Napi::Env env, Napi::Object exports);    // addon_linear.cpp: pack, unpack, embed, gemm, convert, stream_read
void RegisterRows(Napi::Env env, Napi::Object exports);      // addon_rows.cpp: norms, RoPE, attention, reductions
void RegisterComm(Napi::Env env, Napi::Object exports);      // addon_comm.cpp: Communicator
void RegisterMailbox(Napi::Env env, Napi::Object exports);   // addon_mailbox.cpp: Mailbox
void RegisterZmq(Napi::Env env, Napi::Object exports);       // addon_zmq.cpp: ZmqCourier
void RegisterMpi(Napi::Env env, Napi::Object exports);       // addon_mpi.cpp: MpiCourier, exchangeCards
void RegisterSimulator(Napi::Env env, Napi::Object exports);  // addon_simulator.cpp: simulate
void RegisterRunner(Napi::Env env, Napi::Object exports);    // addon_runner.cpp: Runner
void RegisterRecorder(Napi::Env env, Napi::Object exports);  // addon_recorder.cpp: Archive

/// Recordings as [{ rank, group, pid, rows }].
Napi::Array ToArray(Napi::Env env, const std::vector<RankRecording>& recordings);

/// Error with `code` (ERR_...) and the status's named facts as properties.
Napi::Error ToError(Napi::Env env, const Status& status);

}  // namespace tilerank
