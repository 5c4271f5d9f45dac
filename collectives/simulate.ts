// Collectives on machines that are not here: the algorithms' own native code on virtual ranks with a virtual clock (native/sim), and what the
// default rules would choose there. Results are checked on every rank; a wrong one is an error.

import { freemem } from 'node:os'
import process from 'node:process'
import { nativeAddon } from '../native/index.js'
import { elementBytes } from '../native/types.js'
import {
  algorithmsFor,
  AlgorithmTable,
  defaultRules,
  environmentRules,
  type MemoryKind,
  type OperationName,
  type Wire,
} from './algorithms.js'
import { algorithms, dtypeCodes, operations, wires } from './communicator.js'
import type { Environment } from './env.js'
import { CollectiveError, fromNative, invalid } from './errors.js'

/** Times in nanoseconds. */
export interface Machine {
  /** [nodes] of each; 1 to 1024 in all. */
  readonly ranks: readonly number[]
  /** Of a node; its ranks are spread over them in blocks. */
  readonly sockets: number
  /** Of a node, taken in turn by its ranks; 0: one a rank. */
  readonly cores: number
  /** Until a core works for another rank than before. */
  readonly switchNs: number
  /** That a call takes besides what is simulated. */
  readonly callNs: number
  /** From a publish until another rank sees it, on the same socket and on another. */
  readonly coreNs: number
  readonly socketNs: number
  /** For each byte that a rank reads or writes; on the link between two sockets one way, which their ranks share. */
  readonly memoryNsPerByte: number
  readonly socketNsPerByte: number
  /** Between nodes, software included; and for each byte of a NIC one way, which the node's ranks share. */
  readonly linkNs: number
  readonly linkNsPerByte: number
  /** That a rank's network thread takes for a frame, at both ends. */
  readonly frameNs: number
}

/** Latency one way and time a byte, as docs/collectives.md has them. */
export const linkPresets = {
  '1gbe': { linkNs: 60_000, linkNsPerByte: 8 },
  '10gbe': { linkNs: 40_000, linkNsPerByte: 0.8 },
  '100gbe': { linkNs: 40_000, linkNsPerByte: 0.08 },
  rdma100: { linkNs: 5000, linkNsPerByte: 0.08 },
} as const
export type LinkPreset = keyof typeof linkPresets

export const defaultMachine: Machine = {
  ranks: [2],
  sockets: 1,
  cores: 0,
  switchNs: 1500,
  callNs: 0,
  coreNs: 150,
  socketNs: 350,
  memoryNsPerByte: 1 / 20,
  socketNsPerByte: 1 / 40,
  ...linkPresets['10gbe'],
  frameNs: 0,
}

export interface SimulateOptions {
  readonly operation: OperationName
  /** Of the whole data; rounded up to what the operation can cut. */
  readonly bytes: number
  readonly dtype?: 'f32' | 'bf16'
  /** Of allReduce; without one that which the rules choose. */
  readonly algorithm?: string
  /** Of allReduce, between nodes: 'q8' results are checked against the bound that docs/collectives.md has, and bit by bit against each other. */
  readonly wire?: Wire
  /** Default: what the rules say. */
  readonly chunkBytes?: number
  readonly root?: number
  /** Back to back; figures are those of one. Default 1. */
  readonly calls?: number
  /** A rank that does not call, to see how that ends. */
  readonly absent?: number
  /** A rank whose input is not what results are checked against, to see that they are. */
  readonly spoiled?: number
  /** A rank whose result is changed in one bit before it is checked, to see that others are compared with it. */
  readonly differing?: number
  /** That the simulation itself may take; default 8 GiB, or less where there is less. */
  readonly memoryBytes?: number
  /** Of which TILERANK_ALGORITHM counts; default: that of the process. */
  readonly env?: Environment
}

/** Of one call. */
export interface Simulated {
  readonly operation: OperationName
  readonly bytes: number
  readonly algorithm: string
  /** What the rule of that name takes for an allReduce across these nodes; else 'direct'. */
  readonly byWidth: string
  /** Until the last rank has its result. */
  readonly us: number
  /** Generations of flags that a rank publishes. */
  readonly syncs: number
  /** Frames one after the other, on the longest way. */
  readonly hops: number
  /** That a rank sends, at most. */
  readonly frames: number
  readonly rankBytes: number
  /** Out of or into the node that has most. */
  readonly nicBytes: number
  readonly networkBytes: number
  /** That a rank reads and writes, at most. */
  readonly memoryBytes: number
  /** Between two sockets one way, at most. */
  readonly socketBytes: number
}

interface NativeReport {
  readonly algorithm: number
  readonly chosen: number
  readonly ns: number
  readonly syncs: number
  readonly hops: number
  readonly frames: number
  readonly rankBytes: number
  readonly nicBytes: number
  readonly networkBytes: number
  readonly memoryBytes: number
  readonly socketBytes: number
}

type NativeSimulate = (options: object) => NativeReport

function runNative(options: object): NativeReport {
  const addon = nativeAddon()
  if (!(typeof addon === 'object' && addon !== null && 'simulate' in addon && typeof addon.simulate === 'function')) {
    throw new CollectiveError(
      'ERR_INTERNAL',
      'the native addon has no simulator: it is of another version; run `npx tilerank build`',
    )
  }
  try {
    return (addon.simulate as NativeSimulate)(options)
  } catch (error) {
    throw fromNative(error)
  }
}

export const operationNames = Object.keys(operations) as readonly OperationName[]

/** As createGroup's defaults. */
const slotBytes = 1 << 20
const frameBytes = 256 << 10
const frameWindow = 8
const mostRanks = 1024
const defaultMemoryBytes = 8 * 2 ** 30

const isKnown = (name: string): name is keyof typeof algorithms => Object.hasOwn(algorithms, name)
const nameOf = (code: number): string =>
  Object.entries(algorithms).find(([name, value]) => value === code && name !== 'auto')?.[0] ?? 'direct'

/** Elements of the whole; each rank's part is as long as any other's. */
function elementsOf({ operation, bytes, dtype = 'f32' }: SimulateOptions, ranks: number): number {
  if (!Number.isSafeInteger(bytes) || bytes < 0) throw invalid(`bytes is ${bytes}, expected is a whole number`)
  const elements = Math.ceil(bytes / elementBytes[dtype])
  switch (operation) {
    case 'barrier':
      return 0
    case 'allReduce':
    case 'reduce':
    case 'broadcast':
      return elements
    default:
      return Math.ceil(elements / ranks) * ranks
  }
}

function worldSizeOf({ ranks }: Machine): number {
  const worldSize = ranks.reduce((a, b) => a + b, 0)
  if (ranks.length === 0 || !ranks.every((size) => Number.isSafeInteger(size) && size >= 1) || worldSize > mostRanks)
    throw invalid(
      `ranks: [${ranks.join(', ')}], expected is a number of at least 1 for each node, ${mostRanks} in all at most`,
    )
  return worldSize
}

function tableFor(machine: Machine, env: Environment): AlgorithmTable {
  const environment = environmentRules(env)
  const shape = { ranks: worldSizeOf(machine), nodes: machine.ranks.length, slotBytes }
  return new AlgorithmTable({ environment: environment.rules, default: defaultRules(shape) }, shape)
}

/** Runs an operation on all ranks of the machine, checks what came out of it, and says what it took. */
export function simulate(machine: Machine, options: SimulateOptions): Simulated {
  const { operation, dtype = 'f32', calls = 1, wire = 'exact' } = options
  if (!Object.hasOwn(wires, wire)) throw invalid(`wire is '${wire}', expected is 'exact' or 'q8'`)
  if (wire !== 'exact' && operation !== 'allReduce') throw invalid(`wire '${wire}': it is not for ${operation}`)
  const elements = elementsOf(options, worldSizeOf(machine))
  const bytes = elements * elementBytes[dtype]
  const chosen = tableFor(machine, options.env ?? process.env).explain(operation, bytes, 'array')
  const algorithm = options.algorithm ?? chosen.algorithm
  const known = algorithmsFor(operation, machine.ranks.length, 'tensor')
  if (!known.includes(algorithm) && algorithm !== 'byWidth')
    throw invalid(`algorithm '${algorithm}': ${operation} on ${machine.ranks.length} nodes has ${known.join(', ')}`)
  const report = runNative({
    ...machine,
    frameBytes,
    window: frameWindow,
    op: operations[operation],
    dtype: dtypeCodes[dtype],
    count: elements,
    algorithm: isKnown(algorithm) ? algorithms[algorithm] : algorithms.auto,
    root: options.root ?? 0,
    chunkBytes: options.chunkBytes ?? chosen.chunkBytes,
    calls,
    absent: options.absent ?? -1,
    wire: wire === 'q8' ? 1 : 0,
    spoiled: options.spoiled ?? -1,
    differing: options.differing ?? -1,
    memoryLimit: options.memoryBytes ?? Math.floor(Math.min(defaultMemoryBytes, 0.7 * freemem())),
  })
  return {
    operation,
    bytes,
    algorithm: operation === 'allReduce' ? nameOf(report.algorithm) : 'direct',
    byWidth: nameOf(report.chosen),
    us: report.ns / 1000 / calls,
    syncs: report.syncs / calls,
    hops: report.hops / calls,
    frames: report.frames / calls,
    rankBytes: report.rankBytes / calls,
    nicBytes: report.nicBytes / calls,
    networkBytes: report.networkBytes / calls,
    memoryBytes: report.memoryBytes / calls,
    socketBytes: report.socketBytes / calls,
  }
}

/** The algorithms of one operation and size beside each other. */
export interface Comparison {
  readonly operation: OperationName
  readonly bytes: number
  readonly rows: readonly Simulated[]
  /** Algorithms that did not fit the memory of this machine. */
  readonly tooLarge: readonly string[]
  /** For tensors of the group and for other arrays, where that makes a difference. */
  readonly verdicts: readonly Verdict[]
}
export interface Verdict {
  readonly memory: MemoryKind | 'any'
  readonly fastest: string
  readonly chosen: string
  /** Time of the chosen one through that of the fastest; null: one of them did not run. */
  readonly ratio: number | null
}

/** @param options.algorithms default: all that there are */
export function compareAlgorithms(
  machine: Machine,
  options: Omit<SimulateOptions, 'algorithm'> & { readonly algorithms?: readonly string[] },
): Comparison {
  const { algorithms: wanted, ...call } = options
  const { operation } = options
  const nodes = machine.ranks.length
  const rows: Simulated[] = []
  const tooLarge: string[] = []
  for (const algorithm of wanted ?? algorithmsFor(operation, nodes, 'tensor')) {
    try {
      rows.push(simulate(machine, { ...call, algorithm }))
    } catch (error) {
      if (!(error instanceof CollectiveError && error.code === 'ERR_NO_MEMORY')) throw error
      tooLarge.push(algorithm)
    }
  }
  const bytes = elementsOf(call, worldSizeOf(machine)) * elementBytes[options.dtype ?? 'f32']
  const table = tableFor(machine, options.env ?? process.env)
  const verdictFor = (memory: MemoryKind): Verdict[] => {
    const possible = rows.filter(({ algorithm }) => algorithmsFor(operation, nodes, memory).includes(algorithm))
    const fastest = possible.toSorted((a, b) => a.us - b.us)[0]
    if (fastest === undefined) return []
    const rule = table.explain(operation, bytes, memory).algorithm
    const chosen = rule === 'byWidth' ? fastest.byWidth : rule
    const us = rows.find((row) => row.algorithm === chosen)?.us
    return [
      {
        memory,
        // Of several that take as long, the chosen one.
        fastest: us === fastest.us ? chosen : fastest.algorithm,
        chosen,
        ratio: us === undefined ? null : us / fastest.us,
      },
    ]
  }
  const isByMemory = operation === 'allReduce' && nodes === 1
  const verdicts = isByMemory
    ? (['tensor', 'array'] as const).flatMap(verdictFor)
    : verdictFor('array').map((verdict): Verdict => ({ ...verdict, memory: 'any' }))
  return { operation, bytes, rows, tooLarge, verdicts }
}
