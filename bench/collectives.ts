// Latency of every collective between bound processes, by size: with tensors of the group and with typed arrays, and an MPI beside them if
// asked for. Each trial is a fresh set of processes, rank r on the r-th allowed core; trials of ours and of each MPI alternate.
//
// One sample is one call in a loop in which each call depends on the one before: inputs are rewritten before it, roots take turns (so that the
// root of a call has ended the call before), and there is no barrier. Its latency is the time from the moment when the last rank calls to the
// moment when the last rank has its result; results are checked outside of it. Only `runner` is another figure: rank 0's own time from
// its published slot to its finished sum, in a native loop, as the runner does it.

import { execFile, execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { GroupOptions } from '../collectives/index.js'
import { readTopology, spawnRanks } from '../launcher/index.js'
import { packageRoot } from '../native/index.js'

export const collectiveOps = [
  'allReduce',
  'allReduceTo',
  'reduce',
  'reduceScatter',
  'reduceScatterV',
  'allGather',
  'allGatherV',
  'gather',
  'scatter',
  'broadcast',
  'allToAll',
  'allToAllV',
  'sendRecv',
  'pingPong',
  'barrier',
] as const
export type CollectiveOp = (typeof collectiveOps)[number]

/** sync and async: a tensor of the group; array: sync with typed arrays; runner: allReduce alone. */
export type Path = 'runner' | 'sync' | 'async' | 'array'

export interface CollectivesBenchOptions {
  readonly ops?: readonly CollectiveOp[]
  /** Default 2. */
  readonly ranks?: number
  readonly dtype?: 'bf16' | 'f32'
  /** The count of the MPI call: bytes of the message, or of one rank's part where the operation has parts. */
  readonly bytes?: readonly number[]
  readonly paths?: readonly Path[]
  /** Fresh sets of processes; default 5. Each figure is the median of the trials' figures, the minimum their least. */
  readonly trials?: number
  /** Times every MPI that is installed (f32) beside it. */
  readonly mpi?: boolean
  /** A Python with torch: times gloo (f32) beside it. */
  readonly gloo?: string
  /** Looks at every result instead of the last one of a size. */
  readonly check?: boolean
}

const peers = ['Open MPI', 'MPICH', 'gloo'] as const
export type Peer = (typeof peers)[number]
const isPeer = (path: string): path is Peer => peers.some((peer) => peer === path)

export interface CollectiveRow {
  readonly op: CollectiveOp
  readonly ranks: number
  readonly dtype: 'bf16' | 'f32'
  readonly bytes: number
  readonly path: Path | Peer
  readonly p50Us: number
  readonly minUs: number
  readonly p99Us: number
  readonly meanUs: number
  readonly samples: number
  /** bytes / p50. */
  readonly gbPerS: number
}

export interface RankOrder {
  readonly op: CollectiveOp
  readonly dtype: 'bf16' | 'f32'
  readonly sizes: readonly { readonly bytes: number; readonly warmUps: number; readonly samples: number }[]
  readonly paths: readonly Path[]
  readonly checksAll: boolean
  /** What its groups are made with. */
  readonly group?: GroupOptions
}

/** What rank 0 has to tell. */
export interface RankTimes {
  readonly path: Path
  readonly bytes: number
  /** [samples] */
  readonly us: Float64Array
}

interface Figures {
  readonly path: CollectiveRow['path']
  readonly bytes: number
  readonly p50: number
  readonly min: number
  readonly p99: number
  readonly mean: number
}

const defaultBytes: readonly number[] = [64, 512, 2048, 8192, 32768, 131072, 524288, 2097152, 8388608, 67108864]

function samplesOf(bytes: number, ranks: number): number {
  const samples =
    bytes <= 16 << 10
      ? 10_000
      : bytes <= 256 << 10
        ? 3000
        : bytes <= 1 << 20
          ? 500
          : bytes <= 8 << 20
            ? 100
            : bytes <= 32 << 20
              ? 20
              : 10
  // Ranks that share a core switch at every call, MPICH's once in 10 ms or so.
  return ranks <= availableParallelism() ? samples : Math.min(samples, bytes <= 256 << 10 ? 200 : 20)
}

export const isTimes = (message: unknown): message is RankTimes =>
  typeof message === 'object' && message !== null && 'us' in message && message.us instanceof Float64Array

function figuresOf({ path, bytes, us }: RankTimes): Figures {
  const sorted = us.toSorted()
  const at = (share: number): number => sorted[Math.min(us.length - 1, Math.floor(us.length * share))] ?? NaN
  return { path, bytes, p50: at(0.5), min: at(0), p99: at(0.99), mean: us.reduce((a, b) => a + b, 0) / us.length }
}

async function trial(ranks: number, order: RankOrder): Promise<Figures[]> {
  const cores = readTopology().cores.map((core) => core.cpu)
  const set = await spawnRanks({
    entry: fileURLToPath(new URL('./collectivesRank.js', import.meta.url)),
    args: [JSON.stringify(order)],
    worldSize: ranks,
    // More ranks than cores share them in turn.
    cores: Array.from({ length: ranks }, (_, rank) => [cores[rank % cores.length] ?? 0]),
    stdout: 'inherit',
    stderr: 'inherit',
    ipc: true,
  })
  const figures: Figures[] = []
  set.ranks[0]?.child.on('message', (message: unknown) => {
    if (isTimes(message)) figures.push(figuresOf(message))
  })
  const failure = await set.done
  if (failure !== undefined)
    throw new Error(
      `rank ${String(failure.rank)} of the benchmark failed (exit ${String(failure.exitCode ?? failure.signal)})`,
    )
  return figures
}

export interface Mpi {
  readonly name: 'Open MPI' | 'MPICH'
  readonly mpirun: string
  readonly program: string
}

/** Compiles the MPI program with every MPI that is installed; throws with the way out when there is none. */
export function buildMpis(folder: string): Mpi[] {
  // Debian installs several beside each other, the wrappers with the library's name behind a dot.
  const found = ['.openmpi', '.mpich', ''].flatMap((suffix): Mpi[] => {
    const program = join(folder, `mpi_collectives${suffix}`)
    try {
      execFileSync(`mpicc${suffix}`, ['-O2', '-o', program, join(packageRoot, 'bench', 'mpi_collectives.c')], {
        stdio: 'ignore',
      })
      const version = execFileSync(`mpirun${suffix}`, ['--version'], { encoding: 'utf8' })
      const name = /open.?mpi|open-rte|openrte/i.test(version) ? 'Open MPI' : 'MPICH'
      return [{ name, mpirun: `mpirun${suffix}`, program }]
    } catch {
      return []
    }
  })
  const mpis = found.filter(({ name }, index) => found.findIndex((other) => other.name === name) === index)
  if (mpis.length === 0)
    throw new Error(
      'no MPI to compare with: mpicc and mpirun did not work (Debian: openmpi-bin libopenmpi-dev, or mpich libmpich-dev)',
    )
  return mpis
}

/** Of mpi_collectives.c. */
export const argumentsOf = ({ op, checksAll, sizes }: RankOrder): string[] => [
  op,
  checksAll ? '1' : '0',
  ...sizes.flatMap(({ bytes, warmUps, samples }) => [bytes, warmUps, samples].map(String)),
]

async function mpiTrial(mpi: Mpi, ranks: number, order: RankOrder): Promise<Figures[]> {
  const isRoot = process.getuid?.() === 0
  const isShared = ranks > availableParallelism()
  // With more ranks than cores, each in its own mode for that: a wait hands its core over.
  const flags =
    mpi.name === 'Open MPI'
      ? [
          ...(isShared
            ? ['--oversubscribe', '--bind-to', 'core:overload-allowed', '--mca', 'mpi_yield_when_idle', '1']
            : ['--bind-to', 'core']),
          ...(isRoot ? ['--allow-run-as-root'] : []),
        ]
      : ['-bind-to', 'core', ...(isShared ? ['-genv', 'MPIR_CVAR_POLLS_BEFORE_YIELD', '1'] : [])]
  const program = [mpi.program, ...argumentsOf(order)]
  const { stdout } = await promisify(execFile)(mpi.mpirun, [...flags, '-np', String(ranks), ...program], {
    timeout: 600_000,
  })
  return printed(mpi.name, stdout)
}

const printed = (path: Peer, stdout: string): Figures[] =>
  stdout
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => {
      const [bytes = NaN, p50 = NaN, min = NaN, p99 = NaN, mean = NaN] = line.split(' ').map(Number)
      return { path, bytes, p50, min, p99, mean }
    })

async function glooTrial(python: string, folder: string, ranks: number, order: RankOrder): Promise<Figures[]> {
  const cores = readTopology().cores.map((core) => core.cpu)
  const program = [join(packageRoot, 'bench', 'gloo_collectives.py'), ...argumentsOf(order)]
  const store = join(mkdtempSync(join(folder, 'gloo-')), 'store')
  const outputs = await Promise.all(
    Array.from({ length: ranks }, async (_, rank) => {
      const place = { RANK: rank, WORLD_SIZE: ranks, CORE: cores[rank % cores.length] ?? 0, STORE: store }
      const set = Object.entries({ ...place, GLOO_SOCKET_IFNAME: 'lo' }).map(([name, value]) => [name, `${value}`])
      const env = { ...process.env, ...(Object.fromEntries(set) as Record<string, string>) }
      return promisify(execFile)(python, program, { timeout: 1_200_000, env })
    }),
  )
  return printed('gloo', outputs[0]?.stdout ?? '')
}

export const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[values.length >> 1] ?? NaN

export async function benchCollectives(options: CollectivesBenchOptions = {}): Promise<CollectiveRow[]> {
  const { ops = collectiveOps, ranks = 2, dtype = 'f32', bytes = defaultBytes, trials = 5 } = options
  const paths = options.paths ?? ['sync', 'async', 'array']
  if (!Number.isInteger(ranks) || ranks < 1)
    throw new Error(`ranks is ${String(ranks)}, expected is a positive integer`)
  if (!Number.isInteger(trials) || trials < 1)
    throw new Error(`trials is ${String(trials)}, expected is a positive integer`)
  for (const size of bytes) {
    if (!Number.isSafeInteger(size) || size < 4 || size % 4 !== 0)
      throw new Error(`${String(size)} bytes: sizes are multiples of 4`)
    if (size % 8 !== 0 && ops.some((op) => op.endsWith('V')))
      throw new Error(`${String(size)} bytes: sizes are multiples of 8 where parts are uneven`)
  }
  const lonely = ops.find((op) => op === 'sendRecv' || op === 'pingPong')
  if (ranks < 2 && lonely !== undefined) throw new Error(`${lonely} needs two ranks`)
  if (paths.includes('runner') && ops.some((op) => op !== 'allReduce'))
    throw new Error('the path of the runner is measured for allReduce only')
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-bench-'))
  try {
    const mpis = options.mpi === true ? buildMpis(folder) : []
    const rows: CollectiveRow[] = []
    for (const op of ops) {
      // Small calls as often before as in the measurement: a JavaScript function has become what it stays after some thousand calls.
      const sizes = (op === 'barrier' ? [0] : bytes).map((size) => {
        const samples = samplesOf(size, ranks)
        return {
          bytes: size,
          warmUps: size <= 16 << 10 && ranks <= availableParallelism() ? samples : Math.ceil(samples / 10),
          samples,
        }
      })
      const order: RankOrder = { op, dtype, sizes, paths, checksAll: options.check === true }
      const all: Figures[] = []
      for (let turn = 0; turn < trials; turn++) {
        all.push(...(await trial(ranks, order)))
        for (const mpi of mpis) all.push(...(await mpiTrial(mpi, ranks, order)))
        if (options.gloo !== undefined) all.push(...(await glooTrial(options.gloo, folder, ranks, order)))
      }
      for (const { bytes: size, samples } of sizes) {
        for (const path of [...paths, ...peers]) {
          const figures = all.filter((f) => f.path === path && f.bytes === size)
          if (figures.length === 0) continue
          const p50Us = median(figures.map(({ p50 }) => p50))
          rows.push({
            op,
            ranks,
            dtype: isPeer(path) ? 'f32' : dtype,
            bytes: size,
            path,
            p50Us,
            minUs: Math.min(...figures.map(({ min }) => min)),
            p99Us: median(figures.map(({ p99 }) => p99)),
            meanUs: median(figures.map(({ mean }) => mean)),
            samples: samples * trials,
            gbPerS: size / p50Us / 1e3,
          })
        }
      }
    }
    return rows
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** What a call may take beside the better MPI: on a core each 1.05 times as long and a tenth of a microsecond, else twice as long. */
export const allowedUs = (mpiUs: number, ranks: number): number =>
  ranks > availableParallelism() ? 2 * mpiUs : 1.05 * mpiUs + 0.1

const digits = (us: number): string => us.toFixed(us < 100 ? 2 : us < 1000 ? 1 : 0)

export function formatCollectives(rows: readonly CollectiveRow[]): string {
  const paths = [...new Set(rows.map(({ path }) => path))]
  const hasMpi = paths.some((path) => path === 'Open MPI' || path === 'MPICH')
  const hasPeer = paths.some(isPeer)
  const judged = paths.includes('sync') ? 'sync' : paths[0]
  const header = ['operation', 'bytes', ...paths, 'GB/s', ...(hasMpi ? [`${judged ?? ''} : MPI`, 'allowed', ''] : [])]
  const keys = [...new Set(rows.map(({ op, bytes }) => `${op} ${String(bytes)}`))]
  const body = keys.map((key) => {
    const ofKey = rows.filter(({ op, bytes }) => `${op} ${String(bytes)}` === key)
    const own = ofKey.find(({ path }) => path === judged)
    const mpiUs = Math.min(
      ...ofKey.filter(({ path }) => path === 'Open MPI' || path === 'MPICH').map(({ p50Us }) => p50Us),
    )
    const allowed = allowedUs(mpiUs, own?.ranks ?? 1)
    return [
      ...key.split(' '),
      ...paths.map((path) => {
        const row = ofKey.find((other) => other.path === path)
        return row === undefined ? '-' : digits(row.p50Us)
      }),
      (own?.gbPerS ?? NaN).toFixed(2),
      ...(hasMpi
        ? [
            ((own?.p50Us ?? NaN) / mpiUs).toFixed(2),
            digits(allowed),
            own !== undefined && own.p50Us <= allowed ? 'ok' : 'SLOWER',
          ]
        : []),
    ]
  })
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  const lines = table.map((cells) =>
    cells
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join('  ')
      .trimEnd(),
  )
  const [first] = rows
  return [
    `${String(first?.ranks ?? 0)} ranks, ${first?.dtype ?? ''}${hasPeer ? ' (peers: f32)' : ''}. us, medians: from the last rank's call to the last rank's result, each call dependent on the one before.`,
    "bytes = the count of the MPI call: the message, or one rank's part (reduceScatter, allGather, gather, scatter, allToAll). GB/s = bytes / us.",
    '...V: parts of half as much and one and a half times as much in turn. allReduceTo: out of place. pingPong: rank 0 to rank 1 and back.',
    '',
    ...lines,
  ].join('\n')
}
