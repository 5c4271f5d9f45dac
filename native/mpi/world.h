// What an MPI looks like from the addon, which is linked with none: a table of functions that tilerank-openmpi.node or tilerank-mpich.node
// (mpi.cpp, one source, built against each) hands over as an External. Plain C types: the two addons may come from different compilers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tilerank {

constexpr uint32_t kMpiWorldVersion = 1;
/// Of the External that holds it.
constexpr uint64_t kMpiWorldTag[2] = {0x5ae13c0794d248f6, 0xb86f02d95c714ea3};

/// An MPI_Request, whatever that is there.
struct MpiRequest {
  uint64_t bits;
};

/// A request that has ended.
struct MpiDone {
  uint32_t index;
  int32_t error;  // 0, or for explain
  uint64_t nbytes;
};

/// All ranks that mpirun started with this one, over a communicator of its own. No function is thread-safe but lock and try_lock: all others
/// are called between them and unlock. Those that return an int return 0, or an error for explain.
struct MpiWorld {
  uint32_t version, nbytes;  // kMpiWorldVersion and sizeof, of whoever made it
  int32_t rank, size;
  int32_t tags;  // 0 <= tag < tags
  MpiRequest none;
  void (*lock)();
  int (*try_lock)();
  void (*unlock)();
  /// data stays as it is until the request has ended.
  int (*send)(const void* data, size_t nbytes, int peer, int tag, MpiRequest* request);
  int (*receive)(void* data, size_t nbytes, int peer, int tag, MpiRequest* request);
  int (*cancel)(MpiRequest* request);
  /// Lets the MPI work, and sets requests that have ended to none. done: [count]
  int (*test)(MpiRequest* requests, size_t count, MpiDone* done, size_t* ended);
  void (*explain)(int error, char* text, size_t nbytes);
  /// A rank is lost: the end of this process waits for nobody.
  void (*give_up)();
};

}  // namespace tilerank
