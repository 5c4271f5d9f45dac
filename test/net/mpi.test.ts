import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { isLong } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle, type LabNode } from '../../bench/lab.js'
import { mpiCommand, mpiObstacle, runMpi, startMpi } from './mpi.js'

/**
 * Prints rank, size, host name, processor and the sum of rank + 1, after 10 sums of a megabyte; fails or waits when told to. MPICH 4.0
 * over UCX may hang in MPI_Finalize (its ranks wait for each other there without progress), so that is left out with it.
 */
const program = `#define _GNU_SOURCE
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static double data[131072];
int main(int argc, char** argv) {
  int rank, size;
  char host[256];
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  gethostname(host, sizeof host);
  for (int turn = 0; turn < 10; turn++) {
    for (int i = 0; i < 131072; i++) data[i] = rank + 1;
    MPI_Allreduce(MPI_IN_PLACE, data, 131072, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  }
  printf("rank %d of %d on %s, core %d, sum %.0f\\n", rank, size, host, sched_getcpu(), data[131071]);
  fflush(stdout);
  if (argc > 1 && strcmp(argv[1], "fail") == 0 && rank == 1) MPI_Abort(MPI_COMM_WORLD, 7);
  if (argc > 1 && strcmp(argv[1], "wait") == 0) for (;;) sleep(1);
#ifdef MPICH_VERSION
  MPI_Barrier(MPI_COMM_WORLD);
  _exit(0);
#endif
  MPI_Finalize();
  return 0;
}`

/** Bytes that the node's interface has received. */
async function receivedBytes(place: LabNode): Promise<number> {
  const child = place.run('sh', ['-c', 'grep eth0 /proc/net/dev'])
  const [text] = (await once(child.stdout ?? child, 'data')) as [Buffer]
  return Number(/eth0:\s*(\d+)/.exec(String(text))?.[1])
}

for (const implementation of ['openmpi', 'mpich'] as const) {
  describe(`${implementation} over the nodes of a lab`, () => {
    let folder = ''

    beforeEach(function () {
      const obstacle = labObstacle() ?? mpiObstacle(implementation)
      if (obstacle !== undefined) unavailable(this, obstacle)
    })
    before(() => {
      folder = mkdtempSync(join(tmpdir(), 'tilerank-mpi-'))
    })
    after(() => {
      rmSync(folder, { recursive: true, force: true })
    })

    function build(): string {
      const source = join(folder, 'program.c')
      const binary = join(folder, 'program')
      writeFileSync(source, program)
      execFileSync(mpiCommand('mpicc', implementation), ['-O1', '-o', binary, source], { stdio: 'pipe' })
      return binary
    }

    const layouts: (readonly [nodes: number, ranksPerNode: number])[] = [
      [2, 1],
      [2, 2],
    ]
    if (isLong) layouts.push([3, 1], [4, 2])
    for (const [nodes, ranksPerNode] of layouts) {
      it(`runs ${ranksPerNode} on each of ${nodes} nodes, bound, over their network`, async () => {
        await using lab = await createLab({ nodes })
        const last = lab.nodes[nodes - 1]
        assert(last !== undefined)
        const before = await receivedBytes(last)
        const ended = await runMpi({ lab, implementation, program: build(), ranksPerNode })
        assert.equal(ended.code, 0, ended.stderr)
        const worldSize = nodes * ranksPerNode
        const cores = Math.min(2, availableParallelism())
        const expected = Array.from({ length: worldSize }, (_, rank) => {
          const host = lab.nodes[Math.floor(rank / ranksPerNode)]?.name ?? ''
          return new RegExp(
            `^rank ${rank} of ${worldSize} on ${host}, core \\d+, sum ${(worldSize * (worldSize + 1)) / 2}$`,
          )
        })
        const lines = ended.stdout.trim().split('\n').sort()
        assert.equal(lines.length, worldSize, ended.stdout)
        for (const [rank, pattern] of expected.entries()) assert.match(lines[rank] ?? '', pattern)
        const used = new Set(lines.map((line) => /core \d+/.exec(line)?.[0]))
        assert(used.size >= cores, ended.stdout)
        // A sum cannot be known without the other node's megabyte, or its half of it.
        assert((await receivedBytes(last)) - before > 10 * 500_000)
      })
    }

    // Open MPI takes four seconds for it.
    const itLong = isLong ? it : undefined
    itLong?.('ends with the code of a rank that fails', async () => {
      await using lab = await createLab()
      const ended = await runMpi({ lab, implementation, program: build(), args: ['fail'] })
      assert.equal(ended.code, 7, ended.stderr)
    })

    it('ends with its lab', async () => {
      const lab = await createLab()
      try {
        const { saw, ended } = startMpi({ lab, implementation, program: build(), args: ['wait'] })
        await saw(/rank 1/)
        await lab.close()
        assert.notEqual((await ended).code, 0) // killed, or aware of ranks that were
      } finally {
        await lab.close()
      }
    })
  })
}
