// Times attention against what this machine can do at best, measured in the same run: one new token over a long context
// against bytes read a second, a whole prompt against multiply-adds a second. One core, the calling thread, pinned.
// `tilerank bench attention` prints it. Keys and values are read from memory in decoding: the sequences together
// outgrow every cache.

import { KvCache, kvBlockBytes, kvBlockTokens, selectedTier, tiers, type KernelTier } from '../kernels/index.js'
import { linearAddon } from '../kernels/linear.js'
import { nativeAddon } from '../native/index.js'
import type { DType } from '../native/types.js'

export interface AttentionBenchOptions {
  readonly dtype?: DType
  readonly numHeads?: number
  readonly numKvHeads?: number
  readonly headDim?: number
  /** Keys that one new token sees; default 4096. */
  readonly context?: number
  /** Tokens of the prompt; default 2048. */
  readonly prompt?: number
  /** A sequence's blocks lie anywhere in the cache, not beside each other. Default false: so the engine gives them out. */
  readonly isScattered?: boolean
  /** Timed passes of each row; default 7. */
  readonly repetitions?: number
}

export interface AttentionRow {
  readonly work: 'decode' | 'prefill'
  readonly tier: KernelTier
  readonly dtype: DType
  readonly heads: string
  readonly headDim: number
  readonly tokens: number
  readonly keys: number
  readonly medianUs: number
  readonly minUs: number
  /** Bytes of K and V of the visible keys / median time. */
  readonly gbPerS: number
  readonly limitGbPerS: number
  /** 4 * headDim * heads * (pairs of token and visible key) / median time. */
  readonly gflops: number
  /** Null: no AVX-512 with BF16 here. */
  readonly limitGflops: number | null
}

interface AffinityAddon {
  getAffinity(pid: number): number[]
  setAffinity(pid: number, cpus: readonly number[]): void
}

/** KV bytes that decoding walks before it comes back to the first: more than a last-level cache holds. */
const coldBytes = 256 * 1024 * 1024

function benchTier(): KernelTier {
  return selectedTier() === 'scalar' ? 'scalar' : 'avx512_bf16'
}

function fill(array: Float32Array | Uint16Array): void {
  let state = 12345
  for (let i = 0; i < array.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    // bf16 of +-[0.5, 1): any sign and mantissa under one exponent
    array[i] =
      array instanceof Float32Array ? state / 2 ** 31 - 1 : 0x3f00 | ((state >>> 24) & 0x7f) | ((state >>> 8) & 0x8000)
  }
}

function shuffle(array: number[]): void {
  let state = 12345
  for (let i = array.length - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    const j = state % (i + 1)
    ;[array[i], array[j]] = [array[j] ?? NaN, array[i] ?? NaN]
  }
}

function toFloat(x: number, dtype: DType): number {
  return dtype === 'f32' ? x : (new Float32Array(Uint32Array.of(x << 16).buffer)[0] ?? NaN)
}

/** Largest distance between two results of the same rows. */
function distance(a: Float32Array | Uint16Array, b: Float32Array | Uint16Array, dtype: DType): number {
  let worst = 0
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs(toFloat(a[i] ?? NaN, dtype) - toFloat(b[i] ?? NaN, dtype))
    if (!(d <= worst)) worst = d
  }
  return worst
}

async function timeRow(
  work: AttentionRow['work'],
  options: AttentionBenchOptions,
): Promise<Omit<AttentionRow, 'limitGbPerS' | 'limitGflops'>> {
  const { dtype = 'bf16', numHeads = 32, numKvHeads = 8, headDim = 128, repetitions = 7 } = options
  const keys = work === 'decode' ? (options.context ?? 4096) : (options.prompt ?? 2048)
  const tokens = work === 'decode' ? 1 : keys
  const tier = benchTier()
  const blocksPerSequence = Math.ceil(keys / kvBlockTokens)
  const sequenceBytes = blocksPerSequence * numKvHeads * kvBlockBytes(dtype, headDim)
  const numSequences = work === 'decode' ? Math.ceil(coldBytes / sequenceBytes) : 1
  const cache = new KvCache({ tier, dtype, numKvHeads, headDim, numBlocks: blocksPerSequence * numSequences })
  fill(dtype === 'f32' ? new Float32Array(cache.data.buffer) : new Uint16Array(cache.data.buffer))
  const all = cache.allocate(blocksPerSequence * numSequences)
  if (options.isScattered === true) shuffle(all)
  const sequences = Array.from({ length: numSequences }, (_, i) =>
    all.slice(i * blocksPerSequence, (i + 1) * blocksPerSequence),
  )
  const make = (rows: number): Float32Array | Uint16Array =>
    dtype === 'f32' ? new Float32Array(rows * numHeads * headDim) : new Uint16Array(rows * numHeads * headDim)
  const q = make(tokens)
  const out = make(tokens)
  fill(q)
  const position0 = keys - tokens
  const times: number[] = []
  for (let pass = 0; pass <= repetitions; pass++) {
    const start = process.hrtime.bigint()
    for (const blocks of sequences) cache.attention({ q, numHeads, blocks, position0, tokens, out })
    const us = Number(process.hrtime.bigint() - start) / 1e3 / numSequences
    if (pass > 0) times.push(us) // the first one warms up
    await new Promise((resolve) => setImmediate(resolve))
  }
  // the last token of the last sequence, by the obvious kernel
  const expected = make(1)
  const width = numHeads * headDim
  const blocks = sequences[numSequences - 1] ?? []
  cache.attention({
    tier: 'scalar',
    q: q.slice(-width),
    numHeads,
    blocks,
    position0: keys - 1,
    tokens: 1,
    out: expected,
  })
  const error = distance(out.slice(-width), expected, dtype)
  if (!(error <= (dtype === 'f32' ? 1e-4 : 2 ** -6))) throw new Error(`attention bench: the result is off by ${error}`)

  times.sort((a, b) => a - b)
  const medianUs = times[times.length >> 1] ?? NaN
  const pairs = tokens * position0 + (tokens * (tokens + 1)) / 2
  return {
    work,
    tier,
    dtype,
    heads: `${numHeads}/${numKvHeads}`,
    headDim,
    tokens,
    keys,
    medianUs,
    minUs: times[0] ?? NaN,
    gbPerS: sequenceBytes / medianUs / 1e3,
    gflops: (4 * headDim * numHeads * pairs) / medianUs / 1e3,
  }
}

/** Decoding and a prompt, in that order, for each dtype. The event loop waits while a pass runs. */
export async function benchAttention(options: AttentionBenchOptions = {}): Promise<AttentionRow[]> {
  const affinity = nativeAddon() as AffinityAddon
  const before = affinity.getAffinity(0)
  affinity.setAffinity(0, before.slice(-1))
  try {
    const addon = linearAddon()
    const limits = [addon.machineLimits({ threads: 1, megabytes: 1024, seconds: 0.3 })]
    const rows: Omit<AttentionRow, 'limitGbPerS' | 'limitGflops'>[] = []
    for (const dtype of options.dtype === undefined ? (['bf16', 'f32'] as const) : [options.dtype]) {
      for (const work of ['decode', 'prefill'] as const) rows.push(await timeRow(work, { ...options, dtype }))
    }
    // Clocks and neighbours drift: the limits are measured before and after, and the better counts.
    limits.push(addon.machineLimits({ threads: 1, megabytes: 1024, seconds: 0.3 }))
    const best = (of: (l: (typeof limits)[number]) => number): number => Math.max(...limits.map(of)) / 1e9
    const flops = { bf16: best((l) => l.bf16Flops), f32: best((l) => l.f32Flops) }
    const hasPeak = tiers().some((t) => t.name === 'avx512_bf16' && t.available)
    const limitGbPerS = best((l) => l.readBytes)
    return rows.map((row) => ({ ...row, limitGbPerS, limitGflops: hasPeak ? flops[row.dtype] : null }))
  } finally {
    affinity.setAffinity(0, before)
  }
}

/** The rows as a table. Decoding is held against the read limit, a prompt against the multiply-add limit. */
export function formatAttention(rows: readonly AttentionRow[]): string {
  const percent = (part: number, whole: number | null): string =>
    whole === null || whole === 0 ? '-' : `${((100 * part) / whole).toFixed(0)} %`
  const header = [
    'work',
    'tier',
    'dtype',
    'heads',
    'd',
    'tokens',
    'keys',
    'min us',
    'p50 us',
    'GB/s',
    'limit',
    'of it',
    'GFLOP/s',
    'limit',
    'of it',
  ]
  const lines = rows.map((r) => [
    r.work,
    r.tier,
    r.dtype,
    r.heads,
    String(r.headDim),
    String(r.tokens),
    String(r.keys),
    r.minUs.toFixed(0),
    r.medianUs.toFixed(0),
    r.work === 'decode' ? r.gbPerS.toFixed(2) : '-',
    r.limitGbPerS.toFixed(2),
    r.work === 'decode' ? percent(r.gbPerS, r.limitGbPerS) : '-',
    r.gflops.toFixed(1),
    r.limitGflops === null ? '-' : r.limitGflops.toFixed(1),
    r.work === 'prefill' ? percent(r.gflops, r.limitGflops) : '-',
  ])
  const widths = header.map((_, c) => Math.max(...[header, ...lines].map((line) => (line[c] ?? '').length)))
  const text = [header, ...lines].map((line) =>
    line.map((cell, c) => (c < 3 ? cell.padEnd(widths[c] ?? 0) : cell.padStart(widths[c] ?? 0))).join('  '),
  )
  return [
    ...text,
    'GB/s = bytes of K and V of the visible keys / median time; GFLOP/s = 4 d heads (pairs of token and visible key) / median time.',
    'One core, all heads of one sequence a call. Limits, same run: one plain read stream over 1 GiB in 2 MiB pages, which the cache',
    'has as well, and 512-bit multiply-adds on 12 accumulators. The last token was checked.',
  ].join('\n')
}
