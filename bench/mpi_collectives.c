/* Times one collective of an MPI (f32, sums) for bench/collectives.ts, which says what the figures mean; collectivesRank.ts does the same with
   ours. Arguments: the operation, 1 to check every result (0: the last), then bytes, warm-ups and samples of each size, in turn. Inputs are
   rewritten before every sample, roots take turns, and there is no barrier in between. Rank 0 prints "bytes p50 min p99 mean" in microseconds. */
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int rank, size;
static float *data, *output;
static int count; /* the argument of the MPI call: elements of the message, or of one rank's part */

static int Compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static double NowUs(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t); /* one for all processes of a machine */
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static float ValueOf(int from, int part, int sample) { return (float)(1 + (from + 2 * part + sample) % 5); }

static float SumOf(int part, int sample) {
  float sum = 0;
  for (int from = 0; from < size; from++) sum += ValueOf(from, part, sample);
  return sum;
}

enum Op {
  kBarrier, kAllReduce, kAllReduceTo, kReduce, kReduceScatter, kReduceScatterV, kAllGather, kAllGatherV, kGather, kScatter, kBroadcast, kAllToAll, kAllToAllV,
  kSendRecv, kPingPong, kOps
};
static const char* const kNames[kOps] = {"barrier", "allReduce", "allReduceTo", "reduce", "reduceScatter", "reduceScatterV", "allGather", "allGatherV", "gather", "scatter",
                                         "broadcast", "allToAll", "allToAllV", "sendRecv", "pingPong"};

/* Parts of data and of output: elements and where they begin. */
static int data_parts, output_parts;
static int *data_counts, *data_begins, *output_counts, *output_begins;

static int Uneven(int from, int to) { return (from + to) % 2 == 0 ? count + count / 2 : count / 2; }

static void Arrange(enum Op op) {
  const int is_whole_data = op == kScatter || op == kReduceScatter || op == kReduceScatterV || op == kAllToAll || op == kAllToAllV;
  const int is_whole_output = op == kAllGather || op == kAllGatherV || op == kGather || op == kAllToAll || op == kAllToAllV;
  data_parts = op == kBarrier ? 0 : is_whole_data ? size : 1;
  output_parts = op == kBarrier ? 0 : is_whole_output ? size : 1;
  for (int part = 0, at = 0; part < data_parts; at += data_counts[part++]) {
    data_counts[part] = op == kAllToAllV ? Uneven(rank, part) : op == kReduceScatterV ? Uneven(0, part) : op == kAllGatherV ? Uneven(rank, 0) : count;
    data_begins[part] = at;
  }
  for (int part = 0, at = 0; part < output_parts; at += output_counts[part++]) {
    output_counts[part] = op == kAllToAllV ? Uneven(part, rank) : op == kAllGatherV ? Uneven(part, 0) : op == kReduceScatterV ? Uneven(0, rank) : count;
    output_begins[part] = at;
  }
}

static void Rewrite(enum Op op, int root, int sample) {
  if ((op == kBroadcast || op == kScatter) && rank != root) return;
  for (int part = 0; part < data_parts; part++) {
    const float value = ValueOf(rank, part, sample);
    for (int i = 0; i < data_counts[part]; i++) data[data_begins[part] + i] = value;
  }
}

static void Expect(const float* found, int length, float expected) {
  for (int i = 0; i < length; i++) {
    if (found[i] == expected) continue;
    fprintf(stderr, "rank %d: element %d is %f instead of %f\n", rank, i, (double)found[i], (double)expected);
    MPI_Abort(MPI_COMM_WORLD, 3);
  }
}

static void Call(enum Op op, int root) {
  switch (op) {
    case kBarrier: MPI_Barrier(MPI_COMM_WORLD); break;
    case kAllReduce: MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
    /* Not in place as ours: MPICH 4.0 crashes in it where the root is not rank 0. */
    case kReduce: MPI_Reduce(data, output, count, MPI_FLOAT, MPI_SUM, root, MPI_COMM_WORLD); break;
    case kReduceScatter: MPI_Reduce_scatter_block(data, output, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
    case kAllGather: MPI_Allgather(data, count, MPI_FLOAT, output, count, MPI_FLOAT, MPI_COMM_WORLD); break;
    case kGather: MPI_Gather(data, count, MPI_FLOAT, output, count, MPI_FLOAT, root, MPI_COMM_WORLD); break;
    case kScatter: MPI_Scatter(data, count, MPI_FLOAT, output, count, MPI_FLOAT, root, MPI_COMM_WORLD); break;
    case kBroadcast: MPI_Bcast(data, count, MPI_FLOAT, root, MPI_COMM_WORLD); break;
    case kAllToAll: MPI_Alltoall(data, count, MPI_FLOAT, output, count, MPI_FLOAT, MPI_COMM_WORLD); break;
    case kAllReduceTo: MPI_Allreduce(data, output, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
    case kReduceScatterV: MPI_Reduce_scatter(data, output, data_counts, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
    case kAllGatherV: MPI_Allgatherv(data, data_counts[0], MPI_FLOAT, output, output_counts, output_begins, MPI_FLOAT, MPI_COMM_WORLD); break;
    case kAllToAllV: MPI_Alltoallv(data, data_counts, data_begins, MPI_FLOAT, output, output_counts, output_begins, MPI_FLOAT, MPI_COMM_WORLD); break;
    case kSendRecv:
      MPI_Sendrecv(data, count, MPI_FLOAT, (rank + 1) % size, 0, output, count, MPI_FLOAT, (rank + size - 1) % size, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      break;
    case kPingPong:
      if (rank == 0) MPI_Send(data, count, MPI_FLOAT, 1, 0, MPI_COMM_WORLD);
      if (rank < 2) MPI_Recv(output, count, MPI_FLOAT, 1 - rank, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      if (rank == 1) MPI_Send(data, count, MPI_FLOAT, 0, 0, MPI_COMM_WORLD);
      break;
    case kOps: break;
  }
}

static void Check(enum Op op, int root, int sample) {
  switch (op) {
    case kAllReduce: Expect(data, count, SumOf(0, sample)); break;
    case kAllReduceTo: Expect(output, count, SumOf(0, sample)); break;
    case kReduce:
      if (rank == root) Expect(output, count, SumOf(0, sample));
      break;
    case kReduceScatter:
    case kReduceScatterV: Expect(output, output_counts[0], SumOf(rank, sample)); break;
    case kScatter: Expect(output, count, ValueOf(root, rank, sample)); break;
    case kBroadcast: Expect(data, count, ValueOf(root, 0, sample)); break;
    case kAllGather:
    case kAllGatherV:
    case kGather:
    case kAllToAll:
    case kAllToAllV:
      for (int from = 0; from < size && (op != kGather || rank == root); from++) {
        Expect(output + output_begins[from], output_counts[from], ValueOf(from, op == kAllToAll || op == kAllToAllV ? rank : 0, sample));
      }
      break;
    case kSendRecv: Expect(output, count, ValueOf((rank + size - 1) % size, 0, sample)); break;
    case kPingPong:
      if (rank < 2) Expect(output, count, ValueOf(1 - rank, 0, sample));
      break;
    case kBarrier:
    case kOps: break;
  }
}

static void* Allocate(size_t nbytes) {
  void* memory = aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096 + 4096);
  if (memory == NULL) MPI_Abort(MPI_COMM_WORLD, 2);
  memset(memory, 0, nbytes);
  return memory;
}

static void EndNow(int number) {
  (void)number;
  _exit(0);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  enum Op op = kBarrier;
  while (op < kOps && (argc < 3 || strcmp(argv[1], kNames[op]) != 0)) op++;
  if (op == kOps) MPI_Abort(MPI_COMM_WORLD, 1);
  const int checks_all = atoi(argv[2]);
  int** const lists[] = {&data_counts, &data_begins, &output_counts, &output_begins};
  for (int i = 0; i < 4; i++) *lists[i] = Allocate(sizeof(int) * (size_t)size);
  for (int arg = 3; arg + 2 < argc; arg += 3) {
    const long long bytes = atoll(argv[arg]);
    const int warm_ups = atoi(argv[arg + 1]), samples = atoi(argv[arg + 2]);
    count = (int)(bytes / (long long)sizeof(float));
    Arrange(op);
    data = Allocate(2 * (size_t)size * (size_t)bytes); /* uneven parts are up to half as long again */
    output = Allocate(2 * (size_t)size * (size_t)bytes);
    double* starts = Allocate(sizeof(double) * (size_t)samples);
    double* ends = Allocate(sizeof(double) * (size_t)samples);
    for (int i = 0; i < warm_ups + samples; i++) {
      const int root = i % size;
      Rewrite(op, root, i);
      const double start = NowUs();
      Call(op, root);
      const double end = NowUs();
      if (i >= warm_ups) starts[i - warm_ups] = start, ends[i - warm_ups] = end;
      if (checks_all || i == warm_ups + samples - 1) Check(op, root, i);
    }
    double* last_starts = Allocate(sizeof(double) * (size_t)samples);
    double* last_ends = Allocate(sizeof(double) * (size_t)samples);
    MPI_Reduce(starts, last_starts, samples, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    MPI_Reduce(ends, last_ends, samples, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (rank == 0) {
      double sum = 0;
      for (int i = 0; i < samples; i++) sum += last_ends[i] -= last_starts[i];
      qsort(last_ends, (size_t)samples, sizeof(double), Compare);
      printf("%lld %.3f %.3f %.3f %.3f\n", bytes, last_ends[samples / 2], last_ends[0], last_ends[samples * 99 / 100], sum / samples);
    }
    free(data);
    free(output);
    free(starts);
    free(ends);
    free(last_starts);
    free(last_ends);
  }
  /* Figures that stand must not wait for MPI_Finalize: MPICH 4.0 over UCX may hang in it between nodes. A rank that ends without it has its
     peers killed, so all of them try first. */
  fflush(stdout);
  signal(SIGALRM, EndNow);
  alarm(5);
  MPI_Finalize();
  return 0;
}
