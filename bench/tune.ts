// `tilerank tune collectives`: where one algorithm of allReduce begins to beat the other on this machine, and which chunks are best, as
// rules for createGroup. Choices of a size are timed in turns in the same processes; each trial is a fresh set of them. A default stays
// unless something else is clearly better, so that noise writes no rules.

import { fileURLToPath } from 'node:url'
import type { AlgorithmRule, MemoryKind, TunedTable } from '../collectives/index.js'
import { tunedFor } from '../collectives/index.js'
import { readTopology, spawnRanks } from '../launcher/index.js'
import type { TuneCase, TuneTimes } from './tuneRank.js'

export interface TuneOptions {
  /** Default 2. */
  readonly ranks?: number
  /** Fresh sets of processes; default 3. Each figure is the median of theirs. */
  readonly trials?: number
}

export interface TuneRow {
  readonly memory: MemoryKind
  readonly bytes: number
  readonly choice: string
  readonly us: number
  readonly isDefault: boolean
  /** By the rules that come of it. */
  readonly isChosen: boolean
}

export interface Tuned {
  readonly table: TunedTable
  readonly rows: readonly TuneRow[]
}

const sweeps = [
  { memory: 'tensor', sizes: [512, 1024, 2048, 4096, 8192, 16_384, 65_536], large: 'twoShotInPlace' },
  { memory: 'array', sizes: [4096, 16_384, 32_768, 65_536, 131_072, 524_288], large: 'twoShot' },
] as const
const chunkSizes = [64 << 10, 256 << 10, 1 << 20] as const
const chunkedBytes = 4 << 20
/** Sum over the sizes of a sweep of the logarithm of the times' ratio: what a table must win over the defaults. */
const leastGain = 0.1

const cases: readonly TuneCase[] = [
  ...sweeps.flatMap(({ memory, sizes, large }) =>
    sizes.map((bytes): TuneCase => ({ memory, bytes, choices: [{ algorithm: 'oneShot' }, { algorithm: large }] })),
  ),
  {
    memory: 'array',
    bytes: chunkedBytes,
    choices: chunkSizes.map((chunkBytes) => ({ algorithm: 'auto', chunkBytes })),
  },
]

const isTimes = (message: unknown): message is TuneTimes =>
  typeof message === 'object' && message !== null && 'index' in message && 'us' in message

async function trial(ranks: number): Promise<TuneTimes[]> {
  const cores = readTopology().cores.map((core) => core.cpu)
  const set = await spawnRanks({
    entry: fileURLToPath(new URL('./tuneRank.js', import.meta.url)),
    args: [JSON.stringify(cases)],
    worldSize: ranks,
    // More ranks than cores share them in turn.
    cores: Array.from({ length: ranks }, (_, rank) => [cores[rank % cores.length] ?? 0]),
    stdout: 'inherit',
    stderr: 'inherit',
    ipc: true,
  })
  const all: TuneTimes[] = []
  set.ranks[0]?.child.on('message', (message: unknown) => {
    if (isTimes(message)) all.push(message)
  })
  const failure = await set.done
  if (failure !== undefined)
    throw new Error(
      `rank ${failure.rank} of the measurement failed (exit ${String(failure.exitCode ?? failure.signal)})`,
    )
  return all
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? NaN

/** How many of the sizes, from the smallest, the first choice should have; `before`: by the defaults, which win ties. */
export function bestSplit(us: readonly (readonly number[])[], before: number): number {
  const costOf = (split: number): number =>
    us.reduce((sum, times, i) => sum + Math.log(times[i < split ? 0 : 1] ?? NaN), 0)
  let best = before
  for (let split = 0; split <= us.length; split++) {
    if (costOf(split) < costOf(best)) best = split
  }
  return costOf(before) - costOf(best) < leastGain ? before : best
}

export async function tuneCollectives(options: TuneOptions = {}): Promise<Tuned> {
  const ranks = options.ranks ?? 2
  const trials: TuneTimes[][] = []
  for (let turn = 0; turn < (options.trials ?? 3); turn++) trials.push(await trial(ranks))
  const usOf = (index: number): number[] =>
    (cases[index]?.choices ?? []).map((_, choice) =>
      median(trials.map((one) => one.find((times) => times.index === index)?.us[choice] ?? NaN)),
    )
  const defaultOf = (index: number): TuneTimes | undefined => trials[0]?.find((times) => times.index === index)
  const rules: AlgorithmRule[] = []
  const rows: TuneRow[] = []
  const key = { ranks: [ranks, ranks], nodes: [1, 1] } as const
  let first = 0
  for (const { memory, sizes, large } of sweeps) {
    const all = sizes.map((_, i) => usOf(first + i))
    const isSmall = sizes.map((_, i) => defaultOf(first + i)?.algorithm === 'oneShot')
    const before = isSmall.includes(false) ? isSmall.indexOf(false) : sizes.length
    const split = bestSplit(all, before)
    for (const [i, bytes] of sizes.entries()) {
      for (const [choice, name] of ['oneShot', large].entries()) {
        const us = all[i]?.[choice] ?? NaN
        rows.push({
          memory,
          bytes,
          choice: name,
          us,
          isDefault: i < before === (choice === 0),
          isChosen: i < split === (choice === 0),
        })
      }
    }
    if (split !== before) {
      const said = sizes.map((bytes, i) => `${bytes}: ${(all[i] ?? []).map((us) => us.toFixed(2)).join(' / ')}`)
      const why = `measured, p50 us oneShot / ${large}: ${said.join(', ')}`
      const limit = sizes[split - 1]
      const rule = { operation: 'allReduce', memory, ...key, why } as const
      if (limit !== undefined)
        rules.push({ ...rule, bytes: split === sizes.length ? [0] : [0, limit], algorithm: 'oneShot' })
      if (split < sizes.length) rules.push({ ...rule, algorithm: large })
    }
    first += sizes.length
  }
  const chunkUs = usOf(first)
  const before = defaultOf(first)?.chunkBytes
  const [best] = chunkSizes.map((size, i) => ({ size, us: chunkUs[i] ?? NaN })).sort((a, b) => a.us - b.us)
  const beforeUs = chunkUs[chunkSizes.findIndex((size) => size === before)] ?? NaN
  const chosen = best !== undefined && Math.log(beforeUs / best.us) >= leastGain ? best.size : before
  for (const [i, size] of chunkSizes.entries()) {
    const us = chunkUs[i] ?? NaN
    rows.push({
      memory: 'array',
      bytes: chunkedBytes,
      choice: `chunks of ${size}`,
      us,
      isDefault: size === before,
      isChosen: size === chosen,
    })
  }
  if (chosen !== undefined && chosen !== before) {
    const said = chunkSizes.map((size, i) => `${size}: ${(chunkUs[i] ?? NaN).toFixed(0)}`)
    rules.push({
      operation: '*',
      ...key,
      chunkBytes: chosen,
      why: `measured, p50 us of ${chunkedBytes} bytes: ${said.join(', ')}`,
    })
  }
  return { table: { ...tunedFor(ranks), measured: new Date().toISOString(), rules }, rows }
}

export function formatTuned(rows: readonly TuneRow[]): string {
  const table = [
    ['memory', 'bytes', 'choice', 'p50 us', 'default', 'chosen'],
    ...rows.map((row) => [
      row.memory,
      String(row.bytes),
      row.choice,
      row.us.toFixed(2),
      row.isDefault ? '*' : '',
      row.isChosen ? '*' : '',
    ]),
  ]
  const widths = table[0]?.map((_, column) => Math.max(...table.map((cells) => cells[column]?.length ?? 0))) ?? []
  return table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  ')).join('\n')
}
