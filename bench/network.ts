// allReduce between two nodes over ZeroMQ, beside what ZeroMQ itself takes for the same bytes: a raw exchange between two worker threads by
// zeromq.js, each side sending and then receiving. The raw exchange is the least that a sum over the network can take.
//
// Nodes are network namespaces; rank r runs on the r-th allowed core, in turn. Trials alternate, each a fresh set of processes: the raw exchange
// (PAIR and DEALER/ROUTER in turn, the faster one counts), then ours with each number of ranks a node. One sample of either begins when
// the last rank begins and ends when the last rank has its result; calls follow each other without a barrier.

import type { ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { curveKeyPair } from 'zeromq'
import type { Encryption } from '../collectives/index.js'
import { readTopology } from '../launcher/index.js'
import { isTimes, median, type RankOrder } from './collectives.js'
import type { Lab } from './lab.js'
import type { RawOrder, RawReport, RawSockets, RawTimes } from './zeromqRawRank.js'

export interface NetworkBenchOptions {
  /** The first two nodes are used. */
  readonly lab: Lab
  /** Multiples of 4. */
  readonly bytes?: readonly number[]
  readonly encryptions?: readonly Encryption[]
  readonly ranksPerNode?: readonly number[]
  /** Of each; a figure is the median of the trials' medians. Default 5. */
  readonly trials?: number
  /** Of each size; default by size. */
  readonly samples?: number
}

export interface NetworkRow {
  readonly encryption: Encryption
  readonly bytes: number
  readonly ranksPerNode: number
  readonly oursUs: number
  readonly rawUs: number
  readonly rawSockets: RawSockets
  /** oursUs / rawUs. */
  readonly ratio: number
  /** oursUs / oursUs of the first number of ranks a node. */
  readonly toFirst: number
  /** Of a trial. */
  readonly samples: number
  readonly trials: number
}

export const networkBytes: readonly number[] = [8, 64, 1024, 8192, 65536, 262144, 1048576, 8388608, 33554432]
const storePort = 29_615

function samplesOf(bytes: number): number {
  return bytes <= 64 << 10 ? 1000 : bytes <= 1 << 20 ? 200 : bytes <= 8 << 20 ? 40 : 12
}

/** Of a set of processes: resolves when all have ended well; the first that fails ends the others. */
async function endOf(children: readonly ChildProcess[], what: string): Promise<void> {
  const ended = children.map(async (child, rank) => {
    const [code, signal] = (await once(child, 'close')) as [number | null, NodeJS.Signals | null]
    if (code !== 0) throw new Error(`rank ${String(rank)} of ${what} failed (${String(code ?? signal)})`)
  })
  try {
    await Promise.all(ended)
  } finally {
    for (const child of children) child.kill('SIGKILL')
    await Promise.allSettled(ended)
  }
}

const coreOf = (rank: number): number => {
  const { cores } = readTopology()
  return cores[rank % cores.length]?.cpu ?? 0
}

const moduleAt = (name: string): string => fileURLToPath(new URL(name, import.meta.url))
const stdio = ['ignore', 'inherit', 'inherit', 'ipc'] as const

function nodesOf(lab: Lab): readonly [Lab['nodes'][number], Lab['nodes'][number]] {
  const [first, second] = lab.nodes
  if (first === undefined || second === undefined) throw new Error('an exchange needs two nodes')
  return [first, second]
}

/** One trial of the raw exchange: median us by size and sockets. */
export async function rawExchange(
  lab: Lab,
  sizes: RankOrder['sizes'],
  encryption: Encryption,
): Promise<Map<number, Record<RawSockets, number>>> {
  const nodes = nodesOf(lab)
  const order: Omit<RawOrder, 'rank'> = {
    address: nodes[0].address,
    sizes,
    ...(encryption === 'curve' ? { keys: [curveKeyPair(), curveKeyPair()] as const } : {}),
  }
  const sides = nodes.map((place, rank) =>
    place.run(process.execPath, [moduleAt('./zeromqRawRank.js')], {
      cores: [coreOf(rank)],
      stdio: [...stdio],
      serialization: 'advanced',
    }),
  )
  const reports: RawTimes[][] = [[], []]
  for (const [rank, side] of sides.entries()) {
    side.on('message', (report: RawReport) => {
      if (report.kind === 'endpoints') sides[1]?.send({ ...order, rank: 1, endpoints: report.endpoints })
      else reports[rank]?.push(report)
    })
  }
  sides[0]?.send({ ...order, rank: 0 })
  await endOf(sides, 'the raw exchange')
  const usOf = (bytes: number, sockets: RawSockets): number => {
    const [mine, theirs] = reports.map((list) => list.find((one) => one.bytes === bytes && one.sockets === sockets))
    if (mine === undefined || theirs === undefined) throw new Error(`no figures of ${String(bytes)} bytes`)
    return median(
      Array.from(
        mine.ends,
        (end, i) => Math.max(end, theirs.ends[i] ?? NaN) - Math.max(mine.starts[i] ?? NaN, theirs.starts[i] ?? NaN),
      ),
    )
  }
  return new Map(
    sizes.map(({ bytes }) => [bytes, { PAIR: usOf(bytes, 'PAIR'), 'DEALER/ROUTER': usOf(bytes, 'DEALER/ROUTER') }]),
  )
}

/** One trial of ours: median us by size. */
async function allReduces(
  lab: Lab,
  sizes: RankOrder['sizes'],
  encryption: Encryption,
  ranksPerNode: number,
): Promise<Map<number, number>> {
  const nodes = nodesOf(lab)
  const order: RankOrder = {
    op: 'allReduce',
    dtype: 'f32',
    paths: ['sync'],
    sizes,
    checksAll: false,
    group: { encryption, secret: randomBytes(32).toString('hex'), store: `${nodes[0].address}:${String(storePort)}` },
  }
  const worldSize = nodes.length * ranksPerNode
  const children = Array.from({ length: worldSize }, (_, rank) => {
    const node = nodes[rank < ranksPerNode ? 0 : 1]
    return node.run(process.execPath, [moduleAt('./collectivesRank.js'), JSON.stringify(order)], {
      cores: [coreOf(rank)],
      env: { ...process.env, RANK: String(rank), WORLD_SIZE: String(worldSize) },
      stdio: [...stdio],
      serialization: 'advanced',
    })
  })
  const figures = new Map<number, number>()
  children[0]?.on('message', (message: unknown) => {
    if (isTimes(message)) figures.set(message.bytes, median([...message.us]))
  })
  await endOf(children, 'the benchmark')
  return figures
}

/** @throws Error when a rank fails or a result is wrong */
export async function benchNetwork(options: NetworkBenchOptions): Promise<NetworkRow[]> {
  const { lab, bytes = networkBytes, trials = 5 } = options
  const { encryptions = ['none', 'curve'], ranksPerNode = [1] } = options
  const sizes = bytes.map((size) => {
    const samples = options.samples ?? samplesOf(size)
    return { bytes: size, warmUps: Math.ceil(samples / 5), samples }
  })
  const rows: NetworkRow[] = []
  for (const encryption of encryptions) {
    const raw: Map<number, Record<RawSockets, number>>[] = []
    const ours = ranksPerNode.map((): Map<number, number>[] => [])
    for (let turn = 0; turn < trials; turn++) {
      raw.push(await rawExchange(lab, sizes, encryption))
      for (const [index, ranks] of ranksPerNode.entries())
        ours[index]?.push(await allReduces(lab, sizes, encryption, ranks))
    }
    for (const { bytes: size, samples } of sizes) {
      const [pair, dealer] = (['PAIR', 'DEALER/ROUTER'] as const).map((sockets) =>
        median(raw.map((one) => one.get(size)?.[sockets] ?? NaN)),
      ) as [number, number]
      const rawUs = Math.min(pair, dealer)
      const medians = ours.map((list) => median(list.map((one) => one.get(size) ?? NaN)))
      for (const [index, oursUs] of medians.entries()) {
        rows.push({
          encryption,
          bytes: size,
          ranksPerNode: ranksPerNode[index] ?? NaN,
          oursUs,
          rawUs,
          rawSockets: rawUs === pair ? 'PAIR' : 'DEALER/ROUTER',
          ratio: oursUs / rawUs,
          toFirst: oursUs / (medians[0] ?? NaN),
          samples,
          trials,
        })
      }
    }
  }
  return rows
}

export function formatNetwork(rows: readonly NetworkRow[]): string {
  const header = ['bytes', 'encryption', 'ranks', 'ours us', 'raw us', 'raw by', 'ours : raw', 'raw : ours', 'to 1st']
  const body = rows.map((row) => [
    String(row.bytes),
    row.encryption,
    `2 x ${String(row.ranksPerNode)}`,
    row.oursUs.toFixed(1),
    row.rawUs.toFixed(1),
    row.rawSockets,
    row.ratio.toFixed(2),
    `${(100 / row.ratio).toFixed(0)} %`,
    row.toFirst.toFixed(2),
  ])
  const table = [header, ...body]
  const widths = header.map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  return [
    ...table.map((cells) => cells.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  ')),
    'Medians of the trials. raw : ours = throughput of ours as a share of the raw exchange; to 1st = beside the first number of ranks a node.',
  ].join('\n')
}
