// Prompt and decode speed of a whole engine, on made-up weights in the shape of a well-known model or on a checkpoint: ranks and threads
// in several layouts, beside a busy process, beside llama.cpp. Every trial is a fresh set of bound processes; trials alternate.

import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { readTopology } from '../launcher/index.js'
import { initInference } from '../tp/index.js'
import type { InventedShape, RankReport } from '../tp/index.js'

/** How the cores are used. */
export interface Layout {
  readonly ranks: number
  readonly threadsPerRank: number
}

export interface GenerateBenchOptions {
  /** A shape with made-up weights, or the directory of a checkpoint. */
  readonly model: { readonly shape: InventedShape; readonly layers?: number } | { readonly directory: string }
  /** Tried in turn, trial after trial. */
  readonly layouts: readonly Layout[]
  readonly dtype: 'bf16' | 'f32'
  readonly promptTokens: number
  readonly newTokens: number
  readonly trials: number
  /** Each trial once more beside a busy process of another session on the last core that the layout uses. */
  readonly neighbour?: boolean
  /** llama.cpp beside it: a folder where node-llama-cpp is installed, and a GGUF file of the same shape. */
  readonly llamaCpp?: { readonly folder: string; readonly gguf: string }
  readonly onTrial?: (row: GenerateRow) => void
}

export interface GenerateRow {
  readonly engine: 'tilerank' | 'llama.cpp'
  readonly shape: string
  readonly weights: string
  readonly ranks: number
  readonly threadsPerRank: number
  readonly beams: 1
  /** A busy process had half of one of the cores. */
  readonly neighbour: boolean
  readonly promptTokens: number
  readonly promptTokensPerS: number
  readonly tokenMsP50: number
  readonly tokensPerS: number
  readonly peakRssBytes: number | null
  /** Of the fullest rank: packed weights and KV cache, which peakRssBytes is held against. */
  readonly weightAndKvBytes?: number
  /** Mean time of a later token minus what it would take if no thread and no rank ever waited (RankReport.kernelUs). */
  readonly overheadUs?: number
  readonly overheadShare?: number
  /** Bytes of the checkpoint packed and ready, a second and core; absent for made-up weights. */
  readonly loadGbPerS?: number
  /** Of all ranks together, in the timed part and the warm-up: share of each kind of work. */
  readonly phases?: Readonly<Record<string, number>>
}

/** Runs in the peer's folder; see its head. */
const llamaCppScript = fileURLToPath(new URL('./llamaCpp.js', import.meta.url))

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[sorted.length >> 1] ?? 0
}

/** Ids that no sampler would like: spread over the vocabulary, the same in both engines. */
function promptIds(count: number, vocabSize: number): number[] {
  return Array.from({ length: count }, (_, i) => (300 + ((i * 7919) % 30000)) % vocabSize)
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

const shapeName = ({ model }: GenerateBenchOptions): string => {
  if ('directory' in model) return basename(resolve(model.directory))
  return model.layers === undefined ? model.shape : `${model.shape}/${String(model.layers)} layers`
}

/** A process of another session that never sleeps, bound to `core`. */
function startNeighbour(core: number): ChildProcess {
  return spawn('taskset', ['-c', String(core), process.execPath, '-e', 'for (;;);'], {
    detached: true,
    stdio: 'ignore',
  })
}

async function runTilerank(options: GenerateBenchOptions, layout: Layout, isDisturbed: boolean): Promise<GenerateRow> {
  const { model, promptTokens, newTokens } = options
  const { ranks, threadsPerRank } = layout
  const length = promptTokens + newTokens + 8
  const neighbour = isDisturbed ? startNeighbour(readTopology().cores[ranks * threadsPerRank - 1]?.cpu ?? 0) : undefined
  try {
    const engine = await initInference({
      ...('directory' in model ? { model: model.directory } : model),
      tensorParallel: { size: ranks },
      threadsPerRank,
      dtype: options.dtype,
      contextLength: length,
      kvCacheTokens: length,
      maxSequences: 1,
      profile: true,
    })
    try {
      const asked = { temperature: 0, ignoreEos: true }
      const run = (count: number, maxNewTokens: number): ReturnType<typeof engine.complete> =>
        engine.complete({ ids: promptIds(count, engine.vocabSize) }, { ...asked, maxNewTokens })
      await run(promptTokens, 2) // pages, caches and clocks are warm then
      const { promptMs, tokenMs } = await run(promptTokens, newTokens)
      // Overhead from a short prompt, whose own step is known well enough to be taken off.
      const shortPrompt = Math.min(promptTokens, 8)
      const start = await engine.reports()
      await run(shortPrompt, 1)
      const one = await engine.reports()
      const later = await run(shortPrompt, newTokens)
      const reports = await engine.reports()
      const kernelUs = (of: readonly RankReport[]): number => of[0]?.kernelUs ?? NaN
      const ownUs = (kernelUs(reports) - 2 * kernelUs(one) + kernelUs(start)) / (newTokens - 1)
      const tokenUs = 1e3 * mean(later.tokenMs)
      const phases = { gemm: 0, attention: 0, collective: 0, rest: 0 }
      for (const { phaseUs } of reports)
        for (const phase of Object.keys(phases) as (keyof typeof phases)[]) phases[phase] += phaseUs[phase]
      const total = Object.values(phases).reduce((a, b) => a + b, 0)
      const tokenMsP50 = median(tokenMs)
      return {
        engine: 'tilerank',
        shape: shapeName(options),
        weights: options.dtype,
        ranks,
        threadsPerRank,
        beams: 1,
        neighbour: isDisturbed,
        promptTokens,
        promptTokensPerS: (promptTokens / promptMs) * 1e3,
        tokenMsP50,
        tokensPerS: 1e3 / tokenMsP50,
        peakRssBytes: Math.max(...reports.map((report) => report.peakRssBytes)),
        weightAndKvBytes: Math.max(...reports.map((report) => report.weightBytes + report.kvBytes)),
        overheadUs: tokenUs - ownUs,
        overheadShare: 1 - ownUs / tokenUs,
        ...('directory' in model
          ? {
              loadGbPerS: median(
                reports.map((report) => report.shardBytes / report.loadMs / 1e6 / Math.max(1, report.cores.length)),
              ),
            }
          : {}),
        phases: Object.fromEntries(Object.entries(phases).map(([phase, us]) => [phase, us / total])),
      }
    } finally {
      await engine.close()
    }
  } finally {
    neighbour?.kill('SIGKILL')
  }
}

/** One fresh process of the peer's script, which prints one JSON line a run; the median run counts. */
async function runLlamaCpp(
  options: GenerateBenchOptions,
  peer: NonNullable<GenerateBenchOptions['llamaCpp']>,
  threads: number,
): Promise<GenerateRow> {
  const cpus = Array.from({ length: threads }, (_, i) => i).join(',')
  const child = spawn(
    'taskset',
    [
      '-c',
      cpus,
      process.execPath,
      llamaCppScript,
      peer.gguf,
      String(threads),
      String(options.promptTokens),
      String(options.newTokens),
    ],
    { cwd: peer.folder, stdio: ['ignore', 'pipe', 'inherit'] },
  )
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text))
  const [code] = (await once(child, 'close')) as [number | null]
  const runs = output
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as { promptTokensPerS: number; tokenMsP50: number; tokensPerS: number })
  const best = runs.at(-1)
  if (code !== 0 || !best) throw new Error(`llama.cpp gave no figures (exit code ${String(code)})`)
  return {
    engine: 'llama.cpp',
    shape: shapeName(options),
    weights: options.dtype,
    ranks: 1,
    threadsPerRank: threads,
    beams: 1,
    neighbour: false,
    promptTokens: options.promptTokens,
    promptTokensPerS: best.promptTokensPerS,
    tokenMsP50: best.tokenMsP50,
    tokensPerS: best.tokensPerS,
    peakRssBytes: null,
  }
}

/** Where the peer can be run from, or what is missing. */
export function findLlamaCpp(folder: string, gguf: string): NonNullable<GenerateBenchOptions['llamaCpp']> {
  const missing = [
    existsSync(join(folder, 'node_modules', 'node-llama-cpp'))
      ? ''
      : `node-llama-cpp in ${folder} (npm i --ignore-scripts node-llama-cpp)`,
    existsSync(gguf) ? '' : `the GGUF file ${gguf}`,
  ].filter((text) => text !== '')
  if (missing.length > 0) throw new Error(`llama.cpp cannot run beside: missing ${missing.join('; ')}`)
  return { folder: resolve(folder), gguf: resolve(gguf) }
}

export async function benchGenerate(options: GenerateBenchOptions): Promise<GenerateRow[]> {
  const rows: GenerateRow[] = []
  const { llamaCpp, layouts, neighbour, trials, onTrial } = options
  const add = (row: GenerateRow): void => {
    rows.push(row)
    onTrial?.(row)
  }
  const threadCounts = [...new Set(layouts.map(({ ranks, threadsPerRank }) => ranks * threadsPerRank))]
  for (let i = 0; i < trials; i++) {
    for (const layout of layouts) {
      add(await runTilerank(options, layout, false))
      if (neighbour === true) add(await runTilerank(options, layout, true))
    }
    if (llamaCpp) for (const threads of threadCounts) add(await runLlamaCpp(options, llamaCpp, threads))
  }
  return rows
}

const kindOf = (row: GenerateRow): string =>
  `${row.engine} ${String(row.ranks)} x ${String(row.threadsPerRank)}${row.neighbour ? ' beside a busy process' : ''}`

export function formatGenerate(rows: readonly GenerateRow[]): string {
  const gib = (nbytes: number | null | undefined): string =>
    nbytes === null || nbytes === undefined ? '-' : `${(nbytes / 2 ** 30).toFixed(2)} GiB`
  const header = [
    'engine, ranks x threads',
    'prompt',
    'tok/s',
    'token ms (p50)',
    'tok/s',
    'overhead',
    'weights + KV',
    'peak RSS',
  ]
  const body = rows.map((row) => [
    kindOf(row),
    String(row.promptTokens),
    row.promptTokensPerS.toFixed(1),
    row.tokenMsP50.toFixed(2),
    row.tokensPerS.toFixed(2),
    row.overheadUs === undefined || row.overheadShare === undefined
      ? '-'
      : `${row.overheadUs.toFixed(0)} us (${(100 * row.overheadShare).toFixed(1)} %)`,
    gib(row.weightAndKvBytes),
    gib(row.peakRssBytes),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  const lines = table.map((cells) =>
    cells
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join('  '),
  )
  const kinds = [...new Set(rows.map(kindOf))]
  const of = (kind: string, value: (row: GenerateRow) => number): number =>
    median(rows.filter((row) => kindOf(row) === kind).map(value))
  const first = kinds[0] ?? ''
  lines.unshift(`${rows[0]?.shape ?? ''}, ${rows[0]?.weights ?? ''}`, '')
  if (kinds.length > 1) {
    lines.push('', `medians, and the first row's as a multiple of the others':`)
    for (const kind of kinds) {
      const prompt = of(kind, (r) => r.promptTokensPerS)
      const decode = of(kind, (r) => r.tokensPerS)
      const times = `${(of(first, (r) => r.promptTokensPerS) / prompt).toFixed(2)}x, ${(of(first, (r) => r.tokensPerS) / decode).toFixed(2)}x`
      lines.push(
        `  ${kind}: prompt ${prompt.toFixed(1)}, decode ${decode.toFixed(2)} tokens/s${kind === first ? '' : ` (${times})`}`,
      )
    }
  }
  const loads = rows.flatMap(({ loadGbPerS }) => (loadGbPerS === undefined ? [] : [loadGbPerS]))
  if (loads.length > 0) lines.push('', `loaded and packed: ${median(loads).toFixed(2)} GB/s of checkpoint a core`)
  lines.push(
    '',
    'overhead = mean time of a later token minus the kernel time of the slowest thread in each line and of the slowest rank between exchanges',
  )
  return lines.join('\n')
}
