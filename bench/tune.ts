// `tilerank tune collectives`: where one algorithm of allReduce begins to beat another, and which chunks are best, as rules for createGroup:
// on this machine, with ranks that it starts, or of a job that runs, on one node or several. Choices of a size are timed in turns in
// the same processes; on this machine each trial is a fresh set of them. A default stays unless something else is clearly better, so that
// noise writes no rules.

import { fileURLToPath } from 'node:url'
import type { AlgorithmRule, Group, MemoryKind, TunedTable } from '../collectives/index.js'
import { tunedFor } from '../collectives/index.js'
import { readTopology, spawnRanks } from '../launcher/index.js'
import { median, timeCases, type TuneCase, type TuneTimes } from './tuneTime.js'

export interface TuneOptions {
  /** Default 2. */
  readonly ranks?: number
  /** Default 3. Each figure is the median of theirs. */
  readonly trials?: number
}

export interface TuneRow {
  readonly memory: MemoryKind | 'any'
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

/** Choices of one kind of memory, in the order in which they follow each other as sizes rise. */
interface Sweep {
  readonly memory: MemoryKind | 'any'
  readonly sizes: readonly number[]
  readonly names: readonly string[]
  /** Of a size, the microseconds of each name. */
  readonly usOf: (size: number) => readonly number[]
}

interface Plan {
  readonly cases: readonly TuneCase[]
  readonly sweeps: readonly Sweep[]
}

const nodeSizes = {
  tensor: [512, 1024, 2048, 4096, 8192, 16_384, 65_536],
  array: [4096, 16_384, 32_768, 65_536, 131_072, 524_288],
} as const
const networkSizes = [1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1 << 20]
const chunkSizes = [64 << 10, 256 << 10, 1 << 20] as const
const chunkedBytes = 4 << 20
/** Sum over the sizes of a sweep of the logarithm of the times' ratio: what a table must win over the defaults. */
const leastGain = 0.1

/** @param usOfCase medians of a case's choices */
function planFor(
  {
    nodes,
    ranks,
    bytes,
  }: { readonly nodes: number; readonly ranks: number; readonly bytes?: readonly number[] | undefined },
  usOfCase: (index: number) => readonly number[],
): Plan {
  const samplesOf = (size: number, most: number): number => Math.max(8, Math.min(most, Math.floor((16 << 20) / size)))
  const cases: TuneCase[] = []
  const add = (one: TuneCase): number => cases.push(one) - 1
  if (nodes === 1) {
    const sweeps = (['tensor', 'array'] as const).map((memory): Sweep => {
      const sizes = bytes ?? nodeSizes[memory]
      const names = ['oneShot', memory === 'tensor' ? 'twoShotInPlace' : 'twoShot'] as const
      const choices = names.map((algorithm) => ({ algorithm }))
      const indices = sizes.map((size) =>
        add({ memory, dtype: 'f32', bytes: size, samples: samplesOf(size, 800), choices }),
      )
      return { memory, sizes, names, usOf: (size) => usOfCase(indices[sizes.indexOf(size)] ?? -1) }
    })
    const choices = chunkSizes.map((chunkBytes) => ({ algorithm: 'auto', chunkBytes }) as const)
    add({ memory: 'array', dtype: 'f32', bytes: chunkedBytes, samples: samplesOf(chunkedBytes, 800), choices })
    return { cases, sweeps }
  }
  // With a rank a node there is one rail, its leader, and partial results are elements.
  const isOneRankANode = nodes === ranks
  const algorithms = isOneRankANode
    ? (['splitRail', 'twoStep'] as const)
    : (['leader', 'splitRail', 'twoStep'] as const)
  const choices = algorithms.map((algorithm) => ({ algorithm }))
  const sizes = bytes ?? networkSizes
  const indices = sizes.map((size) =>
    (['f32', 'bf16'] as const).map((dtype) =>
      add({ memory: 'array', dtype, bytes: size, samples: samplesOf(size, 100), choices }),
    ),
  )
  const usOf = (size: number): readonly number[] => {
    const [narrow = [], wide = []] = (indices[sizes.indexOf(size)] ?? []).map(usOfCase)
    const both = (choice: number, wideChoice = choice): number =>
      Math.sqrt((narrow[choice] ?? NaN) * (wide[wideChoice] ?? NaN))
    return isOneRankANode ? [both(0), both(1)] : [both(0), both(1), both(1, 2), both(2)]
  }
  const names = isOneRankANode ? algorithms : ['leader', 'splitRail', 'byWidth', 'twoStep']
  return { cases, sweeps: [{ memory: 'any', sizes, names, usOf }] }
}

const isTimes = (message: unknown): message is TuneTimes =>
  typeof message === 'object' && message !== null && 'index' in message && 'us' in message

async function trial(ranks: number, cases: readonly TuneCase[]): Promise<TuneTimes[]> {
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

/**
 * Which choice each size should have, from the smallest, where choices follow each other in their order; `before`: by the defaults, which win ties.
 * @param us [sizes][choices]
 */
export function bestChoices(us: readonly (readonly number[])[], before: readonly number[]): readonly number[] {
  const costOf = (i: number, choice: number): number => Math.log(us[i]?.[choice] ?? NaN)
  // Of each choice, the cheapest way to it.
  let ways = (us[0] ?? []).map(() => ({ cost: 0, path: [] as readonly number[] }))
  for (const i of us.keys()) {
    ways = ways.map((_, choice) => {
      const from = ways.slice(0, choice + 1).reduce((a, b) => (b.cost < a.cost ? b : a))
      return { cost: from.cost + costOf(i, choice), path: [...from.path, choice] }
    })
  }
  const costBefore = before.reduce((sum, choice, i) => sum + costOf(i, choice), 0)
  const best = ways.reduce((a, b) => (b.cost < a.cost ? b : a), { cost: costBefore - leastGain, path: before })
  return best.path
}

function conclude(
  {
    nodes,
    ranks,
    bytes,
  }: { readonly nodes: number; readonly ranks: number; readonly bytes?: readonly number[] | undefined },
  trials: readonly (readonly TuneTimes[])[],
): Tuned {
  const usOfCase = (index: number): readonly number[] => {
    const all = trials.map((one) => one.find((times) => times.index === index)?.us ?? [])
    return (all[0] ?? []).map((_, choice) => median(all.map((us) => us[choice] ?? NaN)))
  }
  const { cases, sweeps } = planFor({ nodes, ranks, bytes }, usOfCase)
  const defaultOf = (memory: MemoryKind | 'any', size: number): TuneTimes | undefined =>
    trials[0]?.find(({ index }) => {
      const one = cases[index]
      return one?.bytes === size && (memory === 'any' || one.memory === memory)
    })
  const rules: AlgorithmRule[] = []
  const rows: TuneRow[] = []
  const key = { ranks: [ranks, ranks], nodes: [nodes, nodes] } as const
  for (const { memory, sizes, names, usOf } of sweeps) {
    const all = sizes.map(usOf)
    // What is not among the names is the first of them: with a rank a node, leader is splitRail.
    const before = sizes.map((size) => Math.max(0, names.indexOf(defaultOf(memory, size)?.algorithm ?? '')))
    const chosen = bestChoices(all, before)
    for (const [i, size] of sizes.entries()) {
      for (const [choice, name] of names.entries()) {
        const us = all[i]?.[choice] ?? NaN
        const [isDefault, isChosen] = [before[i] === choice, chosen[i] === choice]
        rows.push({ memory, bytes: size, choice: name, us, isDefault, isChosen })
      }
    }
    if (chosen.every((choice, i) => choice === before[i])) continue
    const said = sizes.map((size, i) => `${size}: ${(all[i] ?? []).map((us) => us.toFixed(2)).join(' / ')}`)
    const why = `measured, p50 us ${names.join(' / ')}: ${said.join(', ')}`
    const common = { operation: 'allReduce', ...(memory === 'any' ? {} : { memory }), ...key, why } as const
    for (const [i, size] of sizes.entries()) {
      const algorithm = names[chosen[i] ?? 0] ?? ''
      if (i === sizes.length - 1) rules.push({ ...common, algorithm })
      else if (chosen[i] !== chosen[i + 1]) rules.push({ ...common, bytes: [0, size], algorithm })
    }
  }
  const chunked = cases.findIndex(({ bytes: size }) => size === chunkedBytes)
  if (chunked >= 0) rules.push(...concludeChunks(usOfCase(chunked), trials, chunked, key, rows))
  return { table: { ...tunedFor(ranks), measured: new Date().toISOString(), rules }, rows }
}

function concludeChunks(
  chunkUs: readonly number[],
  trials: readonly (readonly TuneTimes[])[],
  index: number,
  key: Pick<AlgorithmRule, 'ranks' | 'nodes'>,
  rows: TuneRow[],
): AlgorithmRule[] {
  const before = trials[0]?.find((times) => times.index === index)?.chunkBytes
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
  if (chosen === undefined || chosen === before) return []
  const said = chunkSizes.map((size, i) => `${size}: ${(chunkUs[i] ?? NaN).toFixed(0)}`)
  const why = `measured, p50 us of ${chunkedBytes} bytes: ${said.join(', ')}`
  return [{ operation: '*', ...key, chunkBytes: chosen, why }]
}

const unmeasured = (): readonly number[] => []

/** With ranks that it starts on this machine. */
export async function tuneCollectives(options: TuneOptions = {}): Promise<Tuned> {
  const { ranks = 2, trials: count = 3 } = options
  const { cases } = planFor({ nodes: 1, ranks }, unmeasured)
  const trials: TuneTimes[][] = []
  for (let turn = 0; turn < count; turn++) trials.push(await trial(ranks, cases))
  return conclude({ nodes: 1, ranks }, trials)
}

/**
 * With the ranks of a job, of which this is one: rank 0's figures count, and its rules are those of all.
 * @param group follows the defaults
 */
export async function tuneJob(
  group: Group,
  options: { readonly trials?: number; readonly bytes?: readonly number[] | undefined },
): Promise<Tuned> {
  const job = { nodes: group.nodes.length, ranks: group.worldSize, bytes: options.bytes }
  const { cases } = planFor(job, unmeasured)
  const trials: TuneTimes[][] = []
  for (let turn = 0; turn < (options.trials ?? 3); turn++) {
    const all: TuneTimes[] = []
    await timeCases(cases, group, (times) => all.push(times))
    trials.push(all)
  }
  const { rows, table } = conclude(job, await group.broadcastObject<TuneTimes[][]>(trials, { root: 0 }))
  const measured = await group.broadcastObject(table.measured, { root: 0 })
  return { rows, table: { ...table, measured } }
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
