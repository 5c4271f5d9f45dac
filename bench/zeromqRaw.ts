// What ZeroMQ itself takes for the bytes of an allReduce between two ranks: a raw exchange of the same bytes both ways with
// zeromq.js, each side sending and then receiving. The peer of our collectives across nodes, and the least they can take.
//
// One process in each of two nodes, rank r bound to the r-th allowed core; sockets are owned by worker threads. PAIR and
// DEALER/ROUTER take their samples in turn, in the same processes; the faster one makes the row of a size.

import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { curveKeyPair } from 'zeromq'
import { readTopology } from '../launcher/index.js'
import type { Lab } from '../test/net/lab.js'
import type { RawOrder, RawReport, RawSockets, RawTimes } from './zeromqRawRank.js'

export interface RawExchangeOptions {
  /** The first two nodes are used. */
  readonly lab: Lab
  readonly nbytes: readonly number[]
  /** Encrypted, or plain. */
  readonly curve: boolean
  /** Of each size and kind of sockets, after a tenth of it to warm up; default by size. */
  readonly samples?: (nbytes: number) => number
}

export interface RawExchangeRow {
  readonly nbytes: number
  readonly curve: boolean
  /** The faster sockets, whose figures the row has. */
  readonly sockets: RawSockets
  readonly p50Us: number
  readonly minUs: number
  readonly p99Us: number
  /** Of the others. */
  readonly otherP50Us: number
  readonly samples: number
  /** nbytes / p50: of each direction. */
  readonly gbPerS: number
}

export const rawExchangeBytes: readonly number[] = [8, 64, 512, 4096, 32768, 262144, 1048576, 8388608, 33554432]

function samplesOf(nbytes: number): number {
  return nbytes <= 64 << 10 ? 2000 : nbytes <= 1 << 20 ? 300 : nbytes <= 8 << 20 ? 50 : 15
}

const at = (sorted: Float64Array, share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? NaN

/** One trial: a fresh pair of processes. */
export async function rawExchange(options: RawExchangeOptions): Promise<RawExchangeRow[]> {
  const { lab, curve } = options
  const [first, second] = lab.nodes
  if (first === undefined || second === undefined) throw new Error('an exchange needs two nodes')
  const order: Omit<RawOrder, 'rank'> = {
    address: first.address,
    sizes: options.nbytes.map((nbytes) => ({ nbytes, samples: (options.samples ?? samplesOf)(nbytes) })),
    ...(curve ? { keys: [curveKeyPair(), curveKeyPair()] as const } : {}),
  }
  const cores = readTopology().cores.map((core) => core.cpu)
  const sides = [first, second].map((place, rank) =>
    place.run(process.execPath, [fileURLToPath(new URL('./zeromqRawRank.js', import.meta.url))], {
      cores: [cores[rank % cores.length] ?? 0],
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
      serialization: 'advanced',
    }),
  )
  const [server, client] = sides as [ChildProcess, ChildProcess]
  const reports: RawTimes[][] = [[], []]
  for (const [rank, side] of sides.entries()) {
    side.on('message', (report: RawReport) => {
      if (report.kind === 'endpoints') client.send({ ...order, rank: 1, endpoints: report.endpoints })
      else reports[rank]?.push(report)
    })
  }
  server.send({ ...order, rank: 0 })
  // The first that fails says why on stderr; the other would wait for it.
  const ended = sides.map(async (side, rank) => {
    const [code, signal] = (await once(side, 'close')) as [number | null, NodeJS.Signals | null]
    if (code !== 0) throw new Error(`rank ${rank} of the raw exchange failed (${String(code ?? signal)})`)
  })
  try {
    await Promise.all(ended)
  } finally {
    for (const side of sides) side.kill('SIGKILL')
    await Promise.allSettled(ended)
  }
  return order.sizes.map(({ nbytes, samples }) => {
    const [best, other] = (['PAIR', 'DEALER/ROUTER'] as const)
      .map((sockets) => {
        // An exchange has taken what it took the rank that started first: the other one found the bytes there already.
        const [mine, theirs] = reports.map((list) => list.find((r) => r.nbytes === nbytes && r.sockets === sockets)?.us)
        if (mine === undefined || theirs === undefined) throw new Error(`no figures of ${nbytes} bytes`)
        const sorted = mine.map((us, sample) => Math.max(us, theirs[sample] ?? NaN)).sort()
        return { sockets, p50Us: at(sorted, 0.5), minUs: at(sorted, 0), p99Us: at(sorted, 0.99) }
      })
      .sort((a, b) => a.p50Us - b.p50Us)
    if (best === undefined || other === undefined) throw new Error('unreachable')
    return { nbytes, curve, ...best, otherP50Us: other.p50Us, samples, gbPerS: nbytes / best.p50Us / 1e3 }
  })
}

export function formatRawExchange(rows: readonly RawExchangeRow[]): string {
  const header = ['bytes', 'encryption', 'sockets', 'p50 us', 'min us', 'p99 us', 'others p50', 'samples', 'GB/s']
  const body = rows.map((row) => [
    String(row.nbytes),
    row.curve ? 'CURVE' : 'none',
    row.sockets,
    row.p50Us.toFixed(1),
    row.minUs.toFixed(1),
    row.p99Us.toFixed(1),
    row.otherP50Us.toFixed(1),
    String(row.samples),
    row.gbPerS.toFixed(3),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  const lines = table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  '))
  return [
    ...lines,
    'GB/s = bytes / p50, of each direction; both directions at once. Two nodes of a lab on this machine.',
  ].join('\n')
}
