// Prompt and decode speed of a whole engine on made-up weights in the shape of a well-known model, with llama.cpp beside it on the
// same shape if asked for. Every trial is a fresh set of bound processes; trials of the two engines alternate.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { initInference } from '../tp/index.js'
import type { InventedShape } from '../tp/index.js'

export interface GenerateBenchOptions {
  readonly shape: InventedShape
  readonly layers?: number
  readonly ranks: number
  readonly threadsPerRank: number
  readonly dtype: 'bf16' | 'f32'
  readonly promptTokens: number
  readonly newTokens: number
  readonly trials: number
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
  readonly promptTokens: number
  readonly promptTokensPerS: number
  readonly tokenMsP50: number
  readonly tokensPerS: number
  readonly peakRssBytes: number | null
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
function promptIds(count: number): number[] {
  return Array.from({ length: count }, (_, i) => 300 + ((i * 7919) % 30000))
}

async function runTilerank(options: GenerateBenchOptions): Promise<GenerateRow> {
  const { shape, ranks, threadsPerRank, promptTokens, newTokens } = options
  const length = promptTokens + newTokens + 8
  const engine = await initInference({
    shape,
    ...(options.layers === undefined ? {} : { layers: options.layers }),
    tensorParallel: { size: ranks },
    threadsPerRank,
    dtype: options.dtype,
    contextLength: length,
    kvCacheTokens: length,
    maxSequences: 1,
  })
  try {
    const asked = { temperature: 0, ignoreEos: true }
    // Pages, caches and clocks are warm after one short run of each kind.
    await engine.complete({ ids: promptIds(promptTokens) }, { ...asked, maxNewTokens: 2 })
    const { promptMs, tokenMs } = await engine.complete(
      { ids: promptIds(promptTokens) },
      { ...asked, maxNewTokens: newTokens },
    )
    const reports = await engine.reports()
    const phases = { gemm: 0, attention: 0, collective: 0, rest: 0 }
    for (const { phaseUs } of reports)
      for (const phase of Object.keys(phases) as (keyof typeof phases)[]) phases[phase] += phaseUs[phase]
    const total = Object.values(phases).reduce((a, b) => a + b, 0)
    const tokenMsP50 = median(tokenMs)
    return {
      engine: 'tilerank',
      shape: options.layers === undefined ? shape : `${shape}/${String(options.layers)} layers`,
      weights: options.dtype,
      ranks,
      threadsPerRank,
      beams: 1,
      promptTokens,
      promptTokensPerS: (promptTokens / promptMs) * 1e3,
      tokenMsP50,
      tokensPerS: 1e3 / tokenMsP50,
      peakRssBytes: Math.max(...reports.map((report) => report.peakRssBytes)),
      phases: Object.fromEntries(Object.entries(phases).map(([phase, us]) => [phase, us / total])),
    }
  } finally {
    await engine.close()
  }
}

/** One fresh process of the peer's script, which prints one JSON line a run; the median run counts. */
async function runLlamaCpp(options: GenerateBenchOptions): Promise<GenerateRow> {
  const peer = options.llamaCpp
  if (!peer) throw new Error('llama.cpp was not asked for')
  const threads = options.ranks * options.threadsPerRank
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
    shape: options.shape,
    weights: options.dtype,
    ranks: 1,
    threadsPerRank: threads,
    beams: 1,
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
  const trial = async (run: (o: GenerateBenchOptions) => Promise<GenerateRow>): Promise<void> => {
    const row = await run(options)
    rows.push(row)
    options.onTrial?.(row)
  }
  for (let i = 0; i < options.trials; i++) {
    await trial(runTilerank)
    if (options.llamaCpp) await trial(runLlamaCpp)
  }
  return rows
}

export function formatGenerate(rows: readonly GenerateRow[]): string {
  const lines = [
    'engine     shape             weights  ranks x threads  prompt      tok/s   token ms (p50)   tok/s   peak RSS',
    ...rows.map((row) =>
      [
        row.engine.padEnd(10),
        row.shape.padEnd(17),
        row.weights.padEnd(8),
        `${String(row.ranks)} x ${String(row.threadsPerRank)}`.padEnd(16),
        String(row.promptTokens).padStart(6),
        row.promptTokensPerS.toFixed(1).padStart(10),
        row.tokenMsP50.toFixed(2).padStart(16),
        row.tokensPerS.toFixed(2).padStart(7),
        row.peakRssBytes === null ? '' : `${(row.peakRssBytes / 2 ** 30).toFixed(2)} GiB`.padStart(10),
      ].join(' '),
    ),
  ]
  const of = (engine: GenerateRow['engine'], value: (row: GenerateRow) => number): number =>
    median(rows.filter((row) => row.engine === engine).map(value))
  if (rows.some((row) => row.engine === 'llama.cpp')) {
    const prompt = of('tilerank', (r) => r.promptTokensPerS) / of('llama.cpp', (r) => r.promptTokensPerS)
    const decode = of('tilerank', (r) => r.tokensPerS) / of('llama.cpp', (r) => r.tokensPerS)
    lines.push('', `medians: prompt ${prompt.toFixed(2)}x, decode ${decode.toFixed(2)}x of llama.cpp`)
  }
  return lines.join('\n')
}
