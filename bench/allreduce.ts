// Latency of allReduce between bound processes, from the rewritten input to the finished private output, with no barrier between
// samples: as the runner does it (natively, input written in place), from JavaScript in both forms, and an MPI beside them if asked
// for. Each trial is a fresh set of processes, rank r on the r-th allowed core; trials of the two libraries alternate.

import { execFile, execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { readTopology, spawnRanks } from '../launcher/index.js'
import { packageRoot } from '../native/index.js'
import type { DType } from '../native/types.js'
import type { RankOrder, RankTimes } from './allreduceRank.js'

export interface AllReduceBenchOptions {
  /** Default 2. */
  readonly ranks?: number
  readonly dtype?: DType
  readonly bytes?: readonly number[]
  readonly paths?: readonly ('runner' | 'sync' | 'async')[]
  /** Fresh sets of processes; default 5. Each figure is the median of the trials' figures, the minimum their least. */
  readonly trials?: number
  /** Times every MPI that is installed (f32) beside it; the better one makes the row of a size. */
  readonly mpi?: boolean
}

export interface Row {
  readonly ranks: number
  readonly dtype: DType
  readonly bytes: number
  readonly path: 'runner' | 'sync' | 'async' | 'mpi'
  readonly p50Us: number
  readonly minUs: number
  readonly p99Us: number
  readonly samples: number
  /** bytes / p50, of one rank. */
  readonly gbPerS: number
  /** Of path mpi: whose figures these are. */
  readonly mpi?: Mpi['name']
}

interface Figures {
  readonly path: Row['path']
  readonly mpi?: Mpi['name']
  readonly bytes: number
  readonly p50: number
  readonly min: number
  readonly p99: number
}

const defaultBytes: readonly number[] = [64, 512, 2048, 8192, 32768, 131072, 524288, 2097152, 33554432]

function samplesOf(bytes: number): number {
  return bytes <= 16 << 10 ? 20_000 : bytes <= 256 << 10 ? 4000 : bytes <= 4 << 20 ? 500 : 40
}

const at = (sorted: Float64Array, share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? NaN

const isTimes = (message: unknown): message is RankTimes =>
  typeof message === 'object' && message !== null && 'us' in message && message.us instanceof Float64Array

async function trial(ranks: number, order: RankOrder): Promise<Figures[]> {
  const cores = readTopology().cores.map((core) => core.cpu)
  const figures: Figures[] = []
  const set = await spawnRanks({
    entry: fileURLToPath(new URL('./allreduceRank.js', import.meta.url)),
    args: [JSON.stringify(order)],
    worldSize: ranks,
    // More ranks than cores share them in turn.
    cores: Array.from({ length: ranks }, (_, rank) => [cores[rank % cores.length] ?? 0]),
    stdout: 'inherit',
    stderr: 'inherit',
    ipc: true,
  })
  set.ranks[0]?.child.on('message', (message: unknown) => {
    if (!isTimes(message)) return
    const sorted = message.us.toSorted()
    figures.push({
      path: message.path,
      bytes: message.bytes,
      p50: at(sorted, 0.5),
      min: at(sorted, 0),
      p99: at(sorted, 0.99),
    })
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
    const program = join(folder, `mpi_allreduce${suffix}`)
    try {
      execFileSync(`mpicc${suffix}`, ['-O2', '-o', program, join(packageRoot, 'bench', 'mpi_allreduce.c')], {
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

async function mpiTrial(mpi: Mpi, ranks: number, bytes: readonly number[]): Promise<Figures[]> {
  const isRoot = process.getuid?.() === 0
  const flags =
    mpi.name === 'Open MPI'
      ? [
          '--bind-to',
          'core',
          ...(ranks > availableParallelism() ? ['--oversubscribe'] : []),
          ...(isRoot ? ['--allow-run-as-root'] : []),
        ]
      : ['-bind-to', 'core']
  const sizes = bytes.flatMap((size) => [String(samplesOf(size)), String(size)])
  const { stdout } = await promisify(execFile)(mpi.mpirun, [...flags, '-np', String(ranks), mpi.program, ...sizes], {
    timeout: 300_000,
  })
  return stdout
    .trim()
    .split('\n')
    .map((line) => {
      const [size = NaN, p50 = NaN, min = NaN, p99 = NaN] = line.split(' ').map(Number)
      return { path: 'mpi' as const, mpi: mpi.name, bytes: size, p50, min, p99 }
    })
}

export const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[values.length >> 1] ?? NaN

export async function benchAllReduce(options: AllReduceBenchOptions = {}): Promise<Row[]> {
  const ranks = options.ranks ?? 2
  const dtype = options.dtype ?? 'bf16'
  const bytes = options.bytes ?? defaultBytes
  const paths = options.paths ?? ['runner', 'sync', 'async']
  const trials = options.trials ?? 5
  if (!Number.isInteger(ranks) || ranks < 1)
    throw new Error(`ranks is ${String(ranks)}, expected is a positive integer`)
  if (!Number.isInteger(trials) || trials < 1)
    throw new Error(`trials is ${String(trials)}, expected is a positive integer`)
  for (const size of bytes) {
    if (!Number.isSafeInteger(size) || size < 4 || size % 4 !== 0)
      throw new Error(`${String(size)} bytes: sizes are multiples of 4`)
  }
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-bench-'))
  try {
    const mpis = options.mpi === true ? buildMpis(folder) : []
    const all: Figures[] = []
    for (let turn = 0; turn < trials; turn++) {
      all.push(
        ...(await trial(ranks, {
          dtype,
          sizes: bytes.map((size) => ({ bytes: size, samples: samplesOf(size) })),
          paths,
        })),
      )
      for (const mpi of mpis) all.push(...(await mpiTrial(mpi, ranks, bytes)))
    }
    const rowOf = (path: Row['path'], size: number, mpi?: Mpi['name']): Row => {
      const figures = all.filter((f) => f.path === path && f.bytes === size && f.mpi === mpi)
      const p50Us = median(figures.map(({ p50 }) => p50))
      return {
        ranks,
        dtype: path === 'mpi' ? 'f32' : dtype,
        bytes: size,
        path,
        p50Us,
        minUs: Math.min(...figures.map(({ min }) => min)),
        p99Us: median(figures.map(({ p99 }) => p99)),
        samples: samplesOf(size) * trials,
        gbPerS: size / p50Us / 1e3,
        ...(mpi === undefined ? {} : { mpi }),
      }
    }
    return bytes.flatMap((size) => [
      ...paths.map((path) => rowOf(path, size)),
      ...mpis
        .map(({ name }) => rowOf('mpi', size, name))
        .sort((a, b) => a.p50Us - b.p50Us)
        .slice(0, 1),
    ])
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

export function formatAllReduce(rows: readonly Row[]): string {
  const header = ['ranks', 'dtype', 'bytes', 'path', 'p50 us', 'min us', 'p99 us', 'samples', 'GB/s']
  const body = rows.map((row) => [
    String(row.ranks),
    row.dtype,
    String(row.bytes),
    row.mpi ?? row.path,
    row.p50Us.toFixed(2),
    row.minUs.toFixed(2),
    row.p99Us.toFixed(2),
    String(row.samples),
    row.gbPerS.toFixed(2),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  const lines = table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  '))
  return [
    ...lines,
    'GB/s = bytes of one rank / p50. Latency from the rewritten input to the finished private output, no barrier between samples.',
  ].join('\n')
}
