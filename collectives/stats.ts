// What a group has done so far, as programs and people see it: counts for each operation and size, latencies where they were asked for, and for
// which ranks this one waited. Native code counts (native/comm/statistics.h); percentiles are computed here.

import type { NativeStatistics } from './communicator.js'

/** Set to 1: groups count latencies, and print all of it when they close. */
export const statsVariable = 'TILERANK_STATS'

export interface Latency {
  /** Within a sixteenth of the true value; maxUs is at least it. */
  readonly p50Us: number
  readonly p90Us: number
  readonly p99Us: number
  readonly maxUs: number
}

/** Calls of one operation whose data has from `fromBytes` to `toBytes` bytes. Of operations on parts that is all parts together. */
export interface OperationStats {
  readonly operation: string
  readonly fromBytes: number
  readonly toBytes: number
  readonly calls: number
  readonly bytes: number
  /** From the call to its end, its time in a queue included. With { stats: true } or TILERANK_STATS=1. */
  readonly latency?: Latency
}

/** What this rank waited for another of its node, by waits that took more than about 3 us. */
export interface PeerStats {
  readonly rank: number
  readonly waitedMs: number
  readonly waits: number
  /** How often it was the one for which this rank waited last: the latest of all. */
  readonly late: number
}

export interface GroupStats {
  readonly rank: number
  readonly worldSize: number
  /** Which of the job's groups: they count from 0 in the order of their creation. */
  readonly group: number
  /** Since the group was made, or since the last reset. */
  readonly elapsedMs: number
  readonly operations: readonly OperationStats[]
  readonly peers: readonly PeerStats[]
}

const subBuckets = 16

/** Where bucket `i` of native Histogram begins and ends, in ticks. */
function bucketRange(i: number): [number, number] {
  if (i < 2 * subBuckets) return [i, i]
  const width = 2 ** (Math.floor(i / subBuckets) - 1)
  const lowest = (subBuckets + (i % subBuckets)) * width
  return [lowest, lowest + width - 1]
}

export function latencyOf(counts: Uint32Array, usPerTick: number): Latency | undefined {
  const total = counts.reduce((sum, count) => sum + count, 0)
  if (total === 0) return undefined
  const at = (share: number): [number, number] => {
    let left = Math.max(1, Math.ceil(share * total))
    return bucketRange(counts.findIndex((count) => (left -= count) <= 0))
  }
  const middle = (share: number): number => {
    const [lowest, highest] = at(share)
    return ((lowest + highest) / 2) * usPerTick
  }
  return { p50Us: middle(0.5), p90Us: middle(0.9), p99Us: middle(0.99), maxUs: at(1)[1] * usPerTick }
}

/** What happened between two looks. */
export function statsBetween(
  before: NativeStatistics | undefined,
  after: NativeStatistics,
): Pick<GroupStats, 'operations' | 'peers'> {
  const operations = after.tallies.flatMap(([operation, size, calls, bytes, latency]): OperationStats[] => {
    const old = before?.tallies.find(([name, ofSize]) => name === operation && ofSize === size)
    if (calls === old?.[2]) return []
    const oldCounts = old?.[4]
    const counts = latency?.map((count, i) => count - (oldCounts?.[i] ?? 0))
    const measured = counts === undefined ? undefined : latencyOf(counts, after.nsPerTick / 1e3)
    return [
      {
        operation,
        fromBytes: size === 0 ? 0 : 2 ** (size - 1),
        toBytes: size === 0 ? 0 : 2 ** size - 1,
        calls: calls - (old?.[2] ?? 0),
        bytes: bytes - (old?.[3] ?? 0),
        ...(measured === undefined ? {} : { latency: measured }),
      },
    ]
  })
  const peers = after.waits.map(([rank, waits, ticks, late]): PeerStats => {
    const old = before?.waits.find((one) => one[0] === rank)
    return {
      rank,
      waitedMs: ((ticks - (old?.[2] ?? 0)) * after.nsPerTick) / 1e6,
      waits: waits - (old?.[1] ?? 0),
      late: late - (old?.[3] ?? 0),
    }
  })
  return { operations, peers }
}

function table(rows: readonly (readonly string[])[]): string[] {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? []
  return rows.map((row) =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join('  '),
  )
}

function size(bytes: number): string {
  const [unit, name] =
    bytes >= 2 ** 30 ? [2 ** 30, 'G'] : bytes >= 2 ** 20 ? [2 ** 20, 'M'] : bytes >= 2 ** 10 ? [2 ** 10, 'K'] : [1, '']
  return `${String(Math.round((bytes / unit) * 10) / 10)}${name}`
}

const us = (value: number): string => (value < 100 ? value.toFixed(2) : value.toFixed(0))

/** Lines of two tables: what was called, and who was waited for. */
export function formatStats(stats: GroupStats): string[] {
  const { operations, peers } = stats
  const hasLatency = operations.some(({ latency }) => latency !== undefined)
  const called = [
    ['operation', 'from bytes', 'calls', 'bytes', ...(hasLatency ? ['p50 us', 'p90 us', 'p99 us', 'max us'] : [])],
    ...operations.map(({ operation, fromBytes, calls, bytes, latency }) => [
      operation,
      size(fromBytes),
      String(calls),
      size(bytes),
      ...(latency === undefined ? [] : [latency.p50Us, latency.p90Us, latency.p99Us, latency.maxUs].map(us)),
    ]),
  ]
  const waited = [
    ['waited for', 'ms', '% of time', 'waits', 'last to come'],
    ...peers.map(({ rank, waitedMs, waits, late }) => [
      `rank ${String(rank)}`,
      waitedMs.toFixed(3),
      ((100 * waitedMs) / Math.max(stats.elapsedMs, 1e-3)).toFixed(1),
      String(waits),
      String(late),
    ]),
  ]
  return [
    `rank ${String(stats.rank)} of ${String(stats.worldSize)}, group ${String(stats.group)}: ${(stats.elapsedMs / 1e3).toFixed(3)} s`,
    ...(operations.length === 0 ? ['nothing was called'] : table(called)),
    ...(peers.length === 0 ? [] : table(waited)),
  ]
}
