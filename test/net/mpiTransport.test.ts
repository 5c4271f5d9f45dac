import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { addonPaths } from '../../native/index.js'
import { start, type Ended } from '../launcher/processes.js'
import { ranksValues } from '../ranks.js'
import { isLong } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle } from '../../bench/lab.js'
import { mpiCommand, mpiObstacle, runMpi, type MpiImplementation } from './mpi.js'

const cases = new URL('./mpiCases.js', import.meta.url)
const addonOf = (mpi: MpiImplementation): string => join(dirname(addonPaths()[0] ?? ''), `tilerank-${mpi}.node`)

interface RankLine {
  readonly rank: number
  readonly value: unknown
}

/** What ranks have printed, by rank; those that said nothing are left out. */
const linesOf = ({ stdout }: Ended): RankLine[] =>
  stdout
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as RankLine)
    .sort((a, b) => a.rank - b.rank)

/** mpirun on this machine; nodeOf: what TILERANK_NODE says, by the number of the rank, as a term of the shell. */
async function mpirun(
  mpi: MpiImplementation,
  ranks: number,
  words: { name: string; options?: object; nodeOf?: string; flags?: readonly string[]; env?: NodeJS.ProcessEnv },
): Promise<Ended> {
  const isRoot = process.getuid?.() === 0
  const flags =
    mpi === 'openmpi'
      ? [
          ...(isRoot ? ['--allow-run-as-root'] : []),
          '--oversubscribe',
          '--bind-to',
          'none',
          '--mca',
          'mpi_yield_when_idle',
          '1',
        ]
      : []
  const rank = mpi === 'openmpi' ? 'OMPI_COMM_WORLD_RANK' : 'PMI_RANK'
  const script = `TILERANK_NODE=$((${words.nodeOf ?? 'rank'})) exec "$@"`.replace('rank', rank)
  const program = [
    process.execPath,
    fileURLToPath(cases),
    words.name,
    JSON.stringify({ transport: 'mpi', ...words.options }),
  ]
  const { child, ended } = start(
    mpiCommand('mpirun', mpi),
    [...flags, ...(words.flags ?? []), '-np', String(ranks), 'sh', '-c', script, 'sh', ...program],
    { env: { ...process.env, ...words.env } },
  )
  const timer = setTimeout(() => child.kill('SIGKILL'), 60_000)
  try {
    return await ended
  } finally {
    clearTimeout(timer)
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => server.once('listening', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  return typeof address === 'object' && address !== null ? address.port : 0
}

type NodeOf = (rank: number) => number

const nodeOfRank: NodeOf = (rank) => rank
const nodeOfPair: NodeOf = (rank) => rank >> 1
const nodeInTurn: NodeOf = (rank) => rank % 3

const known = new Map<NodeOf, Promise<unknown[]>>()

/** What ZeroMQ gives between the same nodes, once for both MPIs. */
function overZeroMq(worldSize: number, nodeOf: NodeOf): Promise<unknown[]> {
  const values = known.get(nodeOf) ?? runZeroMq(worldSize, nodeOf)
  known.set(nodeOf, values)
  return values
}

async function runZeroMq(worldSize: number, nodeOf: NodeOf): Promise<unknown[]> {
  const store = `127.0.0.1:${await freePort()}`
  return ranksValues(cases, 'operations', {
    worldSize,
    args: { transport: 'zeromq', encryption: 'none' },
    env: (rank) => ({ TILERANK_STORE: store, TILERANK_NODE: String(nodeOf(rank)), TILERANK_JOB: undefined }),
    timeoutMs: 60_000,
  })
}

describe("transport 'mpi'", () => {
  for (const mpi of ['openmpi', 'mpich'] as const) {
    describe(mpi, () => {
      beforeEach(function () {
        const obstacle = mpiObstacle(mpi)
        if (obstacle !== undefined) unavailable(this, obstacle)
        assert(existsSync(addonOf(mpi)), `${addonOf(mpi)} was not built, though the MPI is here`)
      })

      for (const [ranks, nodeOf, term] of [
        [2, nodeOfRank, 'rank'],
        [4, nodeOfPair, 'rank / 2'],
        [4, nodeInTurn, 'rank % 3'],
      ] as const) {
        it(`gives the bits of ZeroMQ: ${ranks} ranks, node of a rank = ${term}`, async () => {
          const ended = await mpirun(mpi, ranks, { name: 'operations', nodeOf: term })
          assert.equal(ended.code, 0, ended.stderr)
          const values = linesOf(ended).map(({ value }) => value)
          assert.equal(values.length, ranks, ended.stdout)
          assert.deepEqual(values, await overZeroMq(ranks, nodeOf))
        })
      }

      it('needs no frames on one node', async () => {
        const ended = await mpirun(mpi, 2, { name: 'operations', nodeOf: 'rank * 0' })
        assert.equal(ended.code, 0, ended.stderr)
        assert.deepEqual(
          linesOf(ended).map(({ value }) => (value as { nodes: unknown }).nodes),
          [[[0, 1]], [[0, 1]]],
        )
      })

      it('runs between namespaces, two ranks in each', async function () {
        const obstacle = labObstacle()
        if (obstacle !== undefined) unavailable(this, obstacle)
        await using lab = await createLab()
        const ended = await runMpi({
          lab,
          implementation: mpi,
          program: process.execPath,
          args: [fileURLToPath(cases), 'operations', '{"transport":"mpi"}'],
          ranksPerNode: 2,
          timeoutMs: 60_000,
        })
        assert.equal(ended.code, 0, ended.stderr)
        const values = linesOf(ended).map(({ value }) => value)
        assert.equal(values.length, 4, ended.stdout)
        assert.deepEqual(values, await overZeroMq(4, nodeOfPair))
      })

      it('names a rank that does not come', async () => {
        const ended = await mpirun(mpi, 2, { name: 'lost', options: { how: 'stop', timeoutMs: 1500 } })
        const [first] = linesOf(ended)
        const { code, lateRanks } = first?.value as { code: string; lateRanks: number[] }
        assert.deepEqual({ code, lateRanks }, { code: 'ERR_TIMEOUT', lateRanks: [1] })
        assert.equal(ended.code, 0, ended.stderr)
      })

      it('tells of a rank that has closed the group', async () => {
        const ended = await mpirun(mpi, 2, { name: 'lost', options: { how: 'close' } })
        const { code, rank } = linesOf(ended)[0]?.value as { code: string; rank: number }
        assert.deepEqual({ code, rank }, { code: 'ERR_PEER_LOST', rank: 1 })
        assert.equal(ended.code, 0, ended.stderr)
      })

      it('tells both sides of a mismatch, of calls and of options', async () => {
        const ended = await mpirun(mpi, 2, { name: 'lost', options: { how: 'mismatch' } })
        assert.deepEqual(
          linesOf(ended).map(({ value }) => (value as { code: string }).code),
          ['ERR_MISMATCH', 'ERR_MISMATCH'],
        )
        assert.equal(ended.code, 0, ended.stderr)
      })

      it('ends with its job where a rank is killed', async () => {
        const ended = await mpirun(mpi, 2, { name: 'lost', options: { how: 'kill' } })
        assert.notEqual(ended.code, 0)
      })

      it('says how to get the addon where it was not built', async () => {
        const folder = mkdtempSync(join(tmpdir(), 'tilerank-addon-'))
        try {
          const alone = join(folder, 'tilerank.node')
          symlinkSync(addonPaths()[0] ?? '', alone)
          const ended = await mpirun(mpi, 2, { name: 'failing', env: { TILERANK_ADDON: alone } })
          for (const { value } of linesOf(ended)) {
            const { code, message } = value as { code: string; message: string }
            assert.equal(code, 'ERR_UNSUPPORTED')
            assert.match(
              message,
              new RegExp(`lib${mpi}-dev.*npx tilerank build --force.*tilerank-${mpi}\\.node.*'zeromq'`),
            )
          }
          assert.equal(linesOf(ended).length, 2, ended.stderr)
        } finally {
          rmSync(folder, { recursive: true, force: true })
        }
      })
    })
  }

  it('lets survivors of Open MPI live with --enable-recovery, who name the lost rank', async function () {
    const obstacle = mpiObstacle('openmpi')
    if (obstacle !== undefined) unavailable(this, obstacle)
    const options = { how: 'kill', timeoutMs: 2000 }
    const ended = await mpirun('openmpi', 3, { name: 'lost', options, flags: ['--enable-recovery'] })
    const lines = linesOf(ended)
    assert.deepEqual(
      lines.map(({ rank }) => rank),
      [0, 2],
      ended.stderr,
    )
    for (const { value } of lines) {
      const { code, rank, lateRanks } = value as { code: string; rank: number; lateRanks?: number[] }
      if (code === 'ERR_PEER_LOST') assert.equal(rank, 1)
      else assert.deepEqual({ code, lateRanks }, { code: 'ERR_TIMEOUT', lateRanks: [1] })
    }
  })

  it('lets survivors of MPICH on other nodes live with -disable-auto-cleanup, who name the lost rank', async function () {
    const obstacle = labObstacle() ?? mpiObstacle('mpich')
    if (obstacle !== undefined) unavailable(this, obstacle)
    await using lab = await createLab({ nodes: 3 })
    const ended = await runMpi({
      lab,
      implementation: 'mpich',
      program: process.execPath,
      args: [fileURLToPath(cases), 'lost', '{"transport":"mpi","how":"kill","timeoutMs":4000}'],
      flags: ['-disable-auto-cleanup'],
      timeoutMs: 60_000,
    })
    const lines = linesOf(ended)
    assert.deepEqual(
      lines.map(({ rank }) => rank),
      [0, 2],
      ended.stderr,
    )
    for (const { value } of lines) {
      const { code, rank, lateRanks } = value as { code: string; rank: number; lateRanks?: number[] }
      if (code === 'ERR_PEER_LOST') assert.equal(rank, 1)
      else assert.deepEqual({ code, lateRanks }, { code: 'ERR_TIMEOUT', lateRanks: [1] })
    }
  })

  const itLong = isLong ? it : undefined
  itLong?.('does not crash ranks under MPICH: 300 jobs of 4', async function () {
    this.timeout(1_200_000)
    const obstacle = mpiObstacle('mpich')
    if (obstacle !== undefined) unavailable(this, obstacle)
    for (let job = 0; job < 300; job++) {
      const nodeOf = job % 2 === 0 ? 'rank / 2' : 'rank % 3'
      const ended = await mpirun('mpich', 4, { name: 'operations', nodeOf })
      assert.equal(ended.code, 0, `job ${job}: ${ended.stderr}`)
    }
  })

  it('is refused outside of mpirun and srun', () => {
    const run = (env: NodeJS.ProcessEnv): { code: string; message: string } => {
      const output = execFileSync(process.execPath, [fileURLToPath(cases), 'failing', '{}'], {
        env: { ...process.env, ...env },
      })
      return (JSON.parse(String(output)) as { value: { code: string; message: string } }).value
    }
    for (const env of [{}, { RANK: '0', WORLD_SIZE: '1', LOCAL_RANK: '0', LOCAL_WORLD_SIZE: '1' }]) {
      const { code, message } = run({ ...env, TILERANK_TRANSPORT: 'mpi' })
      assert.equal(code, 'ERR_ENVIRONMENT')
      assert.match(message, /mpirun -n 2 node program\.mjs.*srun.*'zeromq'/)
    }
    const wrong = run({ TILERANK_TRANSPORT: 'tcp' })
    assert.equal(wrong.code, 'ERR_ENVIRONMENT')
    assert.match(wrong.message, /TILERANK_TRANSPORT is 'tcp', expected is zeromq or mpi/)
  })
})
