// The table that ends a generation: who ran where, what it took, and where the time went.

import type { RankReport } from '../tp/rank.js'

export interface Timing {
  readonly loadMs: number
  readonly promptMs: number
  readonly tokenMs: { readonly mean: number; readonly p50: number; readonly p90: number; readonly p99: number } | null
}

/** Of the second and later tokens; null when there are none. */
export function tokenStatistics(tokenMs: readonly number[]): Timing['tokenMs'] {
  if (tokenMs.length === 0) return null
  const sorted = [...tokenMs].sort((a, b) => a - b)
  // Nearest rank: the smallest value that at least p of all values do not exceed.
  const at = (p: number): number => sorted[Math.max(0, Math.ceil(p * sorted.length) - 1)] ?? 0
  return { mean: tokenMs.reduce((a, b) => a + b, 0) / tokenMs.length, p50: at(0.5), p90: at(0.9), p99: at(0.99) }
}

const mib = (nbytes: number): string => `${(nbytes / 2 ** 20).toFixed(1)} MiB`
const ms = (value: number): string => (value < 10 ? value.toFixed(2) : value.toFixed(1))

function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? []
  return rows
    .map(
      (row) =>
        `  ${row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join('  ')}`,
    )
    .join('\n')
}

export function formatReport(reports: readonly RankReport[], timing: Timing, newTokens: number): string {
  const { tokenMs } = timing
  const share = (report: RankReport, phase: keyof RankReport['phaseUs']): string => {
    const total = Object.values(report.phaseUs).reduce((a, b) => a + b, 0)
    return total === 0 ? '-' : `${((100 * report.phaseUs[phase]) / total).toFixed(0)} %`
  }
  const rows = [
    ['rank', 'cores', 'tier', 'GEMM', 'attention', 'collectives', 'rest', 'weights', 'KV cache', 'peak RSS'],
    ...reports.map((r) => [
      String(r.rank),
      r.cores.join(',') || 'any',
      r.tier,
      share(r, 'gemm'),
      share(r, 'attention'),
      share(r, 'collective'),
      share(r, 'rest'),
      mib(r.weightBytes),
      mib(r.kvBytes),
      mib(r.peakRssBytes),
    ]),
  ]
  const lines = [
    table(rows),
    '',
    `  load ${ms(timing.loadMs)} ms, prompt ${ms(timing.promptMs)} ms, ${String(newTokens)} new tokens`,
  ]
  if (tokenMs) {
    lines.push(
      `  later tokens: mean ${ms(tokenMs.mean)} ms, p50 ${ms(tokenMs.p50)}, p90 ${ms(tokenMs.p90)}, p99 ${ms(tokenMs.p99)}: ${(1000 / tokenMs.mean).toFixed(1)} tokens/s`,
    )
  }
  // What befalls all ranks alike is said once.
  for (const warning of new Set(reports.flatMap(({ warnings }) => warnings))) {
    const ranks = reports.filter(({ warnings }) => warnings.includes(warning)).map(({ rank }) => rank)
    lines.push(`  ${ranks.length === reports.length ? 'all ranks' : `rank ${ranks.join(', ')}`}: ${warning}`)
  }
  return lines.join('\n')
}
