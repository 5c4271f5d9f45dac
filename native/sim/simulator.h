// Runs collectives on a machine that is not here: the very code of comm/operation.h and comm/hierarchical.h on virtual ranks, over a Fabric and
// a Transport that stand on a virtual clock. Data really move, so results are checked; what time they take is the machine description's.
//
// The model. A rank moves memory at a fixed rate, read and written bytes alike; bytes of another socket share that direction of the link between
// both. A published flag is seen one latency later. A frame leaves its node's NIC when those before it have left, its first byte is at the other
// one latency later, and it comes in when those before it have come in: n bytes between idle NICs take latency + n * time per byte.
// What the algorithms do besides, what they move by memmove and what a call costs at all are call_time.
#pragma once
#include <cstdint>
#include <vector>

#include "comm/operation.h"
#include "kernels/kernels.h"
#include "sim/scheduler.h"
#include "status.h"

namespace tilerank {

struct SimMachine {
  std::vector<int> ranks;         // [nodes] of each
  int sockets = 1;                // of a node; its ranks are spread over them in blocks
  int cores = 0;                  // of a node, taken in turn by its ranks; 0: as many as its ranks
  SimTime switch_time = 0;        // until a core works for another rank than before
  SimTime call_time = 0;          // that a call takes besides all else
  SimTime core_latency = 0;       // from a publish until a rank of the socket sees it
  SimTime socket_latency = 0;     // until one of another socket does
  double memory_rate = 1;         // bytes a picosecond that a rank reads and writes
  double socket_rate = 1;         // bytes a picosecond between two sockets, each way
  SimTime link_latency = 0;       // between nodes, software included
  double link_rate = 1;           // bytes a picosecond of a NIC, each way
  SimTime frame_time = 0;         // that a rank's own network thread takes for each frame, at both ends
  size_t frame_bytes = 256 << 10;
  int window = 8;                 // frames to one peer that may be under way
};

struct SimCall {
  CollectiveOp op = CollectiveOp::kAllReduce;
  DType dtype = DType::kF32;
  size_t count = 0;               // elements of the whole
  int root = 0;
  uint16_t algorithm = 0;         // AllReduceAlgorithm on one node, NetworkAlgorithm on several (kAuto: ChooseByWidth)
  Wire wire = Wire::kExact;       // of an allReduce of kF32 or kBf16
  size_t chunk_bytes = 1 << 20;
  int calls = 1;                  // one behind the other, without a pause
  int absent = -1;                // a rank that does not call
  int spoiled = -1;               // a rank whose first element is another than the check expects
  int differing = -1;             // a rank whose result is changed in its lowest bit before it is checked
  size_t memory_limit = SIZE_MAX;  // bytes that the simulation itself may take
};

/// Of all calls together.
struct SimReport {
  uint16_t algorithm = 0;        // the one that ran
  uint16_t chosen = 0;           // NetworkAlgorithm that ChooseByWidth takes; on one node 0
  SimTime time = 0;              // from the common begin until the last rank has its last result
  uint64_t syncs = 0;            // generations that a rank published, at most
  uint64_t hops = 0;             // frames, one after the other, on the longest way
  uint64_t frames = 0;           // that a rank sent, at most
  uint64_t rank_bytes = 0;       // that a rank sent in them, at most
  uint64_t nic_bytes = 0;        // out of or into a node, at most
  uint64_t network_bytes = 0;    // of all frames
  uint64_t memory_bytes = 0;     // that a rank read and wrote, at most
  uint64_t socket_bytes = 0;     // between two sockets one way, at most
};

/// Fails with the first failure in virtual time: a wrong result, ranks that wait for each other for ever, too little memory.
Status Simulate(const Kernels& kernels, const SimMachine& machine, const SimCall& call, SimReport* report);

}  // namespace tilerank
