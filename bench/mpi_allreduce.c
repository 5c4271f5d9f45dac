/* Times MPI_Allreduce (sum of f32, in place) for bench/allreduce.ts. Arguments: samples and bytes of each size, in turn. The input is
   rewritten before every sample; time runs from there to the finished output, and there is no barrier in between. Rank 0 prints
   "bytes p50 min p99" in microseconds. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

int main(int argc, char** argv) {
  int rank, size;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int arg = 1; arg + 1 < argc; arg += 2) {
    const int samples = atoi(argv[arg]);
    const int count = (int)(atoll(argv[arg + 1]) / (long long)sizeof(float));
    float* data = aligned_alloc(4096, ((size_t)count * sizeof(float) + 4095) / 4096 * 4096);
    double* us = malloc((size_t)samples * sizeof(double));
    if (data == NULL || us == NULL) MPI_Abort(MPI_COMM_WORLD, 2);
    for (int sample = -(samples / 10) - 1; sample < samples; sample++) {
      for (int i = 0; i < count; i++) data[i] = 1;
      const double start = MPI_Wtime();
      MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
      if (sample >= 0) us[sample] = (MPI_Wtime() - start) * 1e6;
    }
    if (data[0] != (float)size || data[count - 1] != (float)size) MPI_Abort(MPI_COMM_WORLD, 3);
    qsort(us, (size_t)samples, sizeof(double), compare);
    if (rank == 0) printf("%lld %.3f %.3f %.3f\n", atoll(argv[arg + 1]), us[samples / 2], us[0], us[samples * 99 / 100]);
    free(data);
    free(us);
  }
  /* Figures that stand must not wait for MPI_Finalize: MPICH 4.0 over UCX may hang in it between nodes. */
  fflush(stdout);
#ifdef MPICH_VERSION
  MPI_Barrier(MPI_COMM_WORLD);
  _exit(0);
#endif
  MPI_Finalize();
  return 0;
}
