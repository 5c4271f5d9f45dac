// Times the linear kernels against what this machine can do at best, measured in the same run: multiply-adds a second for many
// rows, bytes of weights read a second for few. `tilerank bench gemm` prints it. The timed loop, the pinned threads and the check
// of the result are native (native/measure.cpp); weights lie in 2 MiB pages and are read from memory, never from a cache.

import { selectedTier, tiers } from '../kernels/index.js'
import { linearAddon, type TierName } from '../kernels/linear.js'
import type { DType } from '../native/types.js'

export interface GemmBenchOptions {
  readonly tier?: TierName
  readonly m?: readonly number[]
  readonly n?: number
  readonly k?: number
  readonly dtype?: DType
  /** Pinned native threads, each with its own range of panels; default 1. */
  readonly threads?: number
  /** Timed part of each row; default 1. */
  readonly seconds?: number
}

export interface GemmRow {
  readonly tier: TierName
  readonly weights: DType
  readonly m: number
  readonly n: number
  readonly k: number
  readonly threads: number
  /** 2 m n k / median time / 1e9, and the same of the machine's best instruction (null: no AVX-512 with BF16 here). */
  readonly gflops: number
  readonly limitGflops: number | null
  /** Bytes of packed weights / median time / 1e9, and one plain stream a thread over 1 GiB. */
  readonly gbPerS: number
  readonly limitGbPerS: number
}

const defaultShapes: readonly (readonly [n: number, k: number])[] = [
  [4096, 4096],
  [11008, 4096],
  [4096, 11008],
]
const defaultRows: readonly number[] = [1, 4, 16, 32, 128, 512, 2048]
const dtypes: readonly DType[] = ['bf16', 'f32']

/** More than any last-level cache holds of one core's reads; the ring of weight copies is at least this long. */
const coldMegabytes = 1024

/** One row a dtype, shape and m. The process is busy natively while a row runs: its event loop waits. */
export async function benchGemm(options: GemmBenchOptions = {}): Promise<GemmRow[]> {
  const { tier = selectedTier(), threads = 1, seconds = 1, m: rowCounts = defaultRows } = options
  const addon = linearAddon()
  const shapes =
    options.n === undefined && options.k === undefined
      ? defaultShapes
      : [[options.n ?? 4096, options.k ?? 4096] as const]
  const measured: Omit<GemmRow, 'limitGflops' | 'limitGbPerS'>[] = []
  // Clocks and neighbours drift: the limits are measured before and after, and the better counts.
  const limits = [addon.machineLimits({ threads, megabytes: 1024, seconds: 0.3 })]
  for (const weights of options.dtype === undefined ? dtypes : [options.dtype]) {
    for (const [n, k] of shapes) {
      for (const m of rowCounts) {
        const timing = addon.timeGemm({ tier, dtype: weights, m, n, k, threads, seconds, coldMegabytes })
        measured.push({
          tier,
          weights,
          m,
          n,
          k,
          threads,
          gflops: (2 * m * n * k) / timing.medianSeconds / 1e9,
          gbPerS: timing.weightBytes / timing.medianSeconds / 1e9,
        })
        await new Promise((resolve) => setImmediate(resolve))
      }
    }
  }
  limits.push(addon.machineLimits({ threads, megabytes: 1024, seconds: 0.3 }))
  const best = (of: (l: (typeof limits)[number]) => number): number => Math.max(...limits.map(of)) / 1e9
  const flops = { bf16: best((l) => l.bf16Flops), f32: best((l) => l.f32Flops) }
  const hasPeak = tiers().some((t) => t.name === 'avx512_bf16' && t.available)
  return measured.map((row) => ({
    ...row,
    limitGflops: hasPeak ? flops[row.weights] : null,
    limitGbPerS: best((l) => l.readBytes),
  }))
}

/** The rows as a table; the percentage that the kernel's bound decides (the larger of the two) is the one to look at. */
export function formatGemm(rows: readonly GemmRow[]): string {
  const percent = (part: number, whole: number | null): string =>
    whole === null || whole === 0 ? '-' : `${((100 * part) / whole).toFixed(0)} %`
  const header = ['tier', 'weights', 'm', 'n', 'k', 'threads', 'GFLOP/s', 'limit', 'of it', 'GB/s', 'limit', 'of it']
  const lines = rows.map((r) => [
    r.tier,
    r.weights,
    String(r.m),
    String(r.n),
    String(r.k),
    String(r.threads),
    r.gflops.toFixed(1),
    r.limitGflops === null ? '-' : r.limitGflops.toFixed(1),
    percent(r.gflops, r.limitGflops),
    r.gbPerS.toFixed(2),
    r.limitGbPerS.toFixed(2),
    percent(r.gbPerS, r.limitGbPerS),
  ])
  const widths = header.map((_, c) => Math.max(...[header, ...lines].map((line) => (line[c] ?? '').length)))
  const text = [header, ...lines].map((line) =>
    line.map((cell, c) => (c < 2 ? cell.padEnd(widths[c] ?? 0) : cell.padStart(widths[c] ?? 0))).join('  '),
  )
  return [
    ...text,
    'GFLOP/s = 2 m n k / median time; GB/s = bytes of packed weights / median time; every result was checked exactly.',
    'Limits, same run and threads: 512-bit multiply-adds on 12 accumulators; one plain read stream a thread over 1 GiB. Weights',
    'are fetched ahead by software, which a plain stream is not: a little over 100 % is possible.',
  ].join('\n')
}
