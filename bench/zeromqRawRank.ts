// One side of the raw exchange of bench/network.ts. A worker thread owns the sockets, as a rank's network thread does; the process's main thread
// only passes messages between it and whoever started the process, and sleeps while samples are taken.

import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import { Context, Dealer, Pair, Router, type Socket, type SocketOptions } from 'zeromq'
import { clockOffset } from './clock.js'
import type { RankOrder } from './collectives.js'

export type RawSockets = 'PAIR' | 'DEALER/ROUTER'

export interface CurveKeys {
  readonly publicKey: string
  readonly secretKey: string
}

export interface RawOrder {
  readonly rank: 0 | 1
  /** Of the node of rank 0, which binds. */
  readonly address: string
  readonly sizes: RankOrder['sizes']
  /** Of each rank; not encrypted if absent. */
  readonly keys?: readonly [CurveKeys, CurveKeys]
  /** Where rank 0 has bound; for rank 1. */
  readonly endpoints?: Readonly<Record<RawSockets, string>>
}

/** What a rank reports: rank 0 where it has bound, both the samples of each size. */
export type RawReport =
  { readonly kind: 'endpoints'; readonly endpoints: Readonly<Record<RawSockets, string>> } | RawTimes

export interface RawTimes {
  readonly kind: 'times'
  readonly sockets: RawSockets
  readonly bytes: number
  /** [samples], in us of CLOCK_MONOTONIC. */
  readonly starts: Float64Array
  readonly ends: Float64Array
}

/** A connection to the other side. */
interface Line {
  readonly sockets: RawSockets
  readonly send: (data: Uint8Array) => Promise<void>
  readonly receive: () => Promise<Uint8Array>
  readonly close: () => void
}

const dealerId = 'rank1'

/** The payload: a router puts the sender's identity before it. */
const last = (frames: readonly Uint8Array[]): Uint8Array => frames[frames.length - 1] ?? new Uint8Array()

async function openLines(order: RawOrder, context: Context, tell: (report: RawReport) => void): Promise<Line[]> {
  const { rank, keys } = order
  const options: SocketOptions<Socket> & { sendTimeout: number; receiveTimeout: number } = {
    context,
    linger: 5000, // the other side may still wait for the last message
    sendTimeout: 60_000,
    receiveTimeout: 60_000,
    ...(keys === undefined
      ? {}
      : rank === 0
        ? { curveServer: true, curveSecretKey: keys[0].secretKey }
        : {
            curveServerKey: keys[0].publicKey,
            curvePublicKey: keys[1].publicKey,
            curveSecretKey: keys[1].secretKey,
          }),
  }
  const pair = new Pair(options)
  const other =
    rank === 0 ? new Router({ ...options, mandatory: true }) : new Dealer({ ...options, routingId: dealerId })
  if (order.endpoints === undefined) {
    await pair.bind(`tcp://${order.address}:*`)
    await other.bind(`tcp://${order.address}:*`)
    tell({
      kind: 'endpoints',
      endpoints: { PAIR: pair.lastEndpoint ?? '', 'DEALER/ROUTER': other.lastEndpoint ?? '' },
    })
  } else {
    pair.connect(order.endpoints.PAIR)
    other.connect(order.endpoints['DEALER/ROUTER'])
  }
  const lines: Line[] = [
    {
      sockets: 'PAIR',
      send: (data) => pair.send(data),
      receive: async () => last(await pair.receive()),
      close: () => pair.close(),
    },
    {
      sockets: 'DEALER/ROUTER',
      send: (data) => (other instanceof Router ? other.send([dealerId, data]) : other.send(data)),
      receive: async () => last(await other.receive()),
      close: () => other.close(),
    },
  ]
  // The router can only answer: the dealer speaks first.
  for (const line of lines) {
    if (rank === 1) await line.send(new Uint8Array(1))
    await line.receive()
    if (rank === 0) await line.send(new Uint8Array(1))
  }
  return lines
}

async function exchangeAll(order: RawOrder, tell: (report: RawReport) => void): Promise<void> {
  const context = new Context()
  const lines = await openLines(order, context, tell)
  try {
    await exchangeOver(lines, order, tell)
  } finally {
    for (const line of lines) line.close()
  }
}

async function exchangeOver(lines: readonly Line[], order: RawOrder, tell: (report: RawReport) => void): Promise<void> {
  const token = new Uint8Array(1)
  for (const { bytes, warmUps, samples } of order.sizes) {
    const data = new Uint8Array(bytes).fill(order.rank + 1)
    const times = lines.map(({ sockets }) => ({
      sockets,
      bytes,
      starts: new Float64Array(samples),
      ends: new Float64Array(samples),
    }))
    for (let sample = -warmUps; sample < samples; sample++) {
      for (const [index, line] of lines.entries()) {
        const start = performance.now()
        await line.send(data)
        const reply = await line.receive()
        const end = performance.now()
        if (reply.length !== bytes || reply[bytes - 1] !== 2 - order.rank)
          throw new Error(`${line.sockets} brought ${reply.length} bytes, expected are ${bytes} of the other rank`)
        const all = times[index]
        if (sample < 0 || all === undefined) continue
        all.starts[sample] = start
        all.ends[sample] = end
      }
    }
    const offset = clockOffset()
    const toUs = (ms: number): number => (ms + offset) * 1000
    for (const all of times) tell({ kind: 'times', ...all, starts: all.starts.map(toUs), ends: all.ends.map(toUs) })
  }
  // libzmq sends from this thread's memory, which goes with the thread: it ends when the other side has all of it.
  for (const line of lines) {
    await line.send(token)
    await line.receive()
  }
}

if (!isMainThread) {
  await exchangeAll(workerData as RawOrder, (report) => parentPort?.postMessage(report))
} else {
  process.once('message', (order: RawOrder) => {
    const worker = new Worker(fileURLToPath(import.meta.url), { workerData: order })
    worker.on('message', (report: RawReport) => process.send?.(report))
    worker.on('error', (error) => {
      process.stderr.write(`rank ${order.rank}: ${error.stack ?? error.message}\n`)
      process.exitCode = 1
    })
    worker.on('exit', () => process.disconnect())
  })
}
