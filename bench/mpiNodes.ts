// Our allReduce over transport 'mpi' beside MPI_Allreduce of the very same MPI: two nodes in network namespaces, joined by a veth pair, TCP
// between them. Trials alternate, each a fresh mpirun with one rank a core; the input is rewritten before every sample, and there is no barrier
// between samples (bench/mpi_collectives.c, bench/collectivesRank.ts).

import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { createLab, labObstacle, type Lab } from './lab.js'
import { runMpi } from '../test/net/mpi.js'
import { argumentsOf, buildMpis, median, type Mpi, type RankOrder } from './collectives.js'

export interface MpiNodesOptions {
  readonly bytes?: readonly number[]
  /** On each of the two nodes. */
  readonly ranksPerNode: number
  /** Of each of the two; each figure is the median of the trials' medians. */
  readonly trials: number
}

export interface MpiNodesRow {
  readonly mpi: Mpi['name']
  readonly ranks: number
  readonly bytes: number
  readonly oursUs: number
  readonly mpiUs: number
  /** oursUs / mpiUs */
  readonly ratio: number
  /** Samples of a trial. */
  readonly samples: number
}

const defaultBytes: readonly number[] = [8, 512, 4096, 32768, 131072, 524288, 2097152, 8388608, 33554432]

function samplesOf(bytes: number): number {
  return bytes <= 64 << 10 ? 1000 : bytes <= 1 << 20 ? 200 : bytes <= 8 << 20 ? 40 : 15
}

async function trial(lab: Lab, mpi: Mpi, options: MpiNodesOptions, isOurs: boolean): Promise<Map<number, number>> {
  const sizes = (options.bytes ?? defaultBytes).map((bytes) => ({
    bytes,
    warmUps: Math.ceil(samplesOf(bytes) / 10),
    samples: samplesOf(bytes),
  }))
  const order: RankOrder = { op: 'allReduce', dtype: 'f32', paths: ['sync'], sizes, checksAll: false }
  const [program, args] = isOurs
    ? [process.execPath, [fileURLToPath(new URL('./collectivesRank.js', import.meta.url)), JSON.stringify(order)]]
    : [mpi.program, argumentsOf(order)]
  const { code, stdout, stderr } = await runMpi({
    lab,
    implementation: mpi.name === 'Open MPI' ? 'openmpi' : 'mpich',
    program,
    args,
    ranksPerNode: options.ranksPerNode,
    env: { ...process.env, TILERANK_TRANSPORT: 'mpi' },
  })
  const lines = stdout
    .trim()
    .split('\n')
    .map((text) => text.split(' ').map(Number))
  const figures = new Map(lines.map(([bytes = NaN, p50 = NaN]) => [bytes, p50]))
  if (!sizes.every(({ bytes }) => figures.has(bytes)) || code !== 0)
    throw new Error(`${mpi.mpirun} failed (${String(code)}): ${stderr}`)
  return figures
}

/** @throws Error where namespaces are not permitted, or no MPI is installed */
export async function benchMpiNodes(options: MpiNodesOptions): Promise<MpiNodesRow[]> {
  const obstacle = labObstacle()
  if (obstacle !== undefined) throw new Error(obstacle)
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-bench-'))
  try {
    await using lab = await createLab()
    const rows: MpiNodesRow[] = []
    for (const mpi of buildMpis(folder)) {
      const ours: Map<number, number>[] = []
      const theirs: Map<number, number>[] = []
      for (let turn = 0; turn < options.trials; turn++) {
        theirs.push(await trial(lab, mpi, options, false))
        ours.push(await trial(lab, mpi, options, true))
      }
      for (const bytes of options.bytes ?? defaultBytes) {
        const oursUs = median(ours.map((figures) => figures.get(bytes) ?? NaN))
        const mpiUs = median(theirs.map((figures) => figures.get(bytes) ?? NaN))
        const ranks = 2 * options.ranksPerNode
        rows.push({ mpi: mpi.name, ranks, bytes, oursUs, mpiUs, ratio: oursUs / mpiUs, samples: samplesOf(bytes) })
      }
    }
    return rows
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

export function formatMpiNodes(rows: readonly MpiNodesRow[]): string {
  const header = ['MPI', 'ranks', 'bytes', 'ours p50 us', 'MPI_Allreduce p50 us', 'ratio', 'samples']
  const body = rows.map((row) => [
    row.mpi,
    String(row.ranks),
    String(row.bytes),
    row.oursUs.toFixed(1),
    row.mpiUs.toFixed(1),
    row.ratio.toFixed(2),
    String(row.samples),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  return table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  ')).join('\n')
}
