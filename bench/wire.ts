// allReduce between two nodes over a slow link, its sums exact and by wire 'q8' in turn: network namespaces, each link held to a rate by a token
// bucket. A barrier stands before every sample; what left the node is read from its interface.

import type { ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { readTopology } from '../launcher/index.js'
import type { Lab } from './lab.js'
import type { WireOrder, WireTimes } from './wireRank.js'

export interface WireBenchOptions {
  /** The first two nodes are used. */
  readonly lab: Lab
  readonly bytes?: readonly number[]
  /** Of each size and wire; default by size. */
  readonly samples?: number
}

export interface WireRow {
  readonly bytes: number
  readonly exactUs: number
  readonly q8Us: number
  /** exactUs / q8Us: medians. */
  readonly speedup: number
  readonly exactSentBytes: number
  readonly q8SentBytes: number
  /** |result - sum| of q8 at most, of inputs up to 6.6. */
  readonly q8Error: number
  readonly samples: number
}

export const wireBytes: readonly number[] = [8192, 65536, 524288, 4194304, 33554432]
const storePort = 29_614
const samplesOf = (bytes: number): number =>
  bytes <= 64 << 10 ? 200 : bytes <= 1 << 20 ? 50 : bytes <= 8 << 20 ? 15 : 5
const median = (us: Float64Array): number => us.toSorted()[Math.floor(us.length / 2)] ?? NaN

/** One trial: a fresh pair of processes. */
export async function benchWire({ lab, bytes = wireBytes, samples }: WireBenchOptions): Promise<WireRow[]> {
  const [first, second] = lab.nodes
  if (first === undefined || second === undefined) throw new Error('an exchange needs two nodes')
  const order: WireOrder = {
    secret: randomBytes(32).toString('hex'),
    sizes: bytes.map((size) => ({ bytes: size, warmUps: 2, samples: samples ?? samplesOf(size) })),
  }
  const cores = readTopology().cores.map((core) => core.cpu)
  const times: WireTimes[] = []
  const ranks = [first, second].map((node, rank): ChildProcess => {
    const env = { ...process.env, RANK: String(rank), WORLD_SIZE: '2', TILERANK_STORE: `${first.address}:${storePort}` }
    const rest = { cores: [cores[rank % cores.length] ?? 0], env, serialization: 'advanced' } as const
    const program = fileURLToPath(new URL('./wireRank.js', import.meta.url))
    const child = node.run(process.execPath, [program, JSON.stringify(order)], {
      ...rest,
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    })
    child.on('message', (one: WireTimes) => times.push(one))
    return child
  })
  const ended = ranks.map(async (child, rank) => {
    const [code, signal] = (await once(child, 'close')) as [number | null, NodeJS.Signals | null]
    if (code !== 0) throw new Error(`rank ${rank} failed (${String(code ?? signal)})`)
  })
  try {
    await Promise.all(ended)
  } finally {
    for (const child of ranks) child.kill('SIGKILL')
    await Promise.allSettled(ended)
  }
  return order.sizes.map((size) => {
    const [exact, q8] = (['exact', 'q8'] as const).map((wire) =>
      times.find((one) => one.bytes === size.bytes && one.wire === wire),
    )
    if (exact === undefined || q8 === undefined) throw new Error(`no figures of ${size.bytes} bytes`)
    const [exactUs, q8Us] = [median(exact.us), median(q8.us)]
    return {
      bytes: size.bytes,
      exactUs,
      q8Us,
      speedup: exactUs / q8Us,
      exactSentBytes: exact.sentBytes,
      q8SentBytes: q8.sentBytes,
      q8Error: q8.error,
      samples: size.samples,
    }
  })
}

export function formatWire(rows: readonly WireRow[]): string {
  const header = ['bytes', 'exact p50 us', 'q8 p50 us', 'speedup', 'exact sent', 'q8 sent', 'q8 error', 'samples']
  const body = rows.map((row) => [
    String(row.bytes),
    row.exactUs.toFixed(0),
    row.q8Us.toFixed(0),
    row.speedup.toFixed(2),
    row.exactSentBytes.toFixed(0),
    row.q8SentBytes.toFixed(0),
    row.q8Error.toFixed(4),
    String(row.samples),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  return table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  ')).join('\n')
}
