// The addon's class Communicator, typed: the only place of this folder that knows what the addon looks like.

import { nativeAddon } from '../native/index.js'
import type { CollectiveDType } from '../native/types.js'
import { CollectiveError } from './errors.js'
import type { NativeMailbox } from './mailbox.js'
import type { Recording } from './recorder.js'

/** Operations and algorithms by the numbers that addon_comm.cpp takes. */
export const operations = {
  barrier: 1,
  allReduce: 2,
  allGather: 3,
  broadcast: 4,
  reduceScatter: 5,
  reduce: 7,
  gather: 8,
  scatter: 9,
  allToAll: 10,
} as const
export const algorithms = {
  auto: 0,
  oneShot: 1,
  twoShot: 2,
  twoShotInPlace: 3,
  leader: 17,
  splitRail: 18,
  twoStep: 19,
} as const
/** Added to the algorithm's number. */
export const wires = { exact: 0, q8: 0x100 } as const
export const reductions = { sum: 0, prod: 1, min: 2, max: 3, avg: 4, band: 5, bor: 6, bxor: 7 } as const
export const dtypeCodes: Readonly<Record<CollectiveDType, number>> = {
  f32: 0,
  bf16: 1,
  f16: 2,
  f64: 3,
  i8: 4,
  u8: 5,
  i32: 6,
  u32: 7,
  i64: 8,
  u64: 9,
}

/** Arrays whose elements collectives know. */
export type TypedArray =
  | Float32Array
  | Float64Array
  | Int8Array
  | Uint8Array
  | Uint16Array
  | Int32Array
  | Uint32Array
  | BigInt64Array
  | BigUint64Array

export interface CommunicatorOptions {
  readonly nonce: string
  readonly rank: number
  readonly worldSize: number
  readonly socketFd: number
  readonly lanes: number
  readonly slotBytes: number
  /** -1: by the cores of all ranks. */
  readonly spinUs: number
  /** AlgorithmTable.toNative() */
  readonly table: Float64Array
  readonly timeoutMs: number
  readonly terms: string
  readonly nodes: readonly number[]
  /** The group's number, agreed on by its ranks; -1: the next of this process. */
  readonly group: number
  /** [size] the job's rank of each rank of the group; empty: all. */
  readonly members: readonly number[]
  /** [nodes][ranks of the group]; empty: all on this node. */
  readonly layout: readonly (readonly number[])[]
  /** Where there are several nodes. */
  readonly mailbox: NativeMailbox | undefined
  /** 1: every call's latency is counted. */
  readonly hasLatency: 0 | 1
  /** 1: the last calls are kept one by one. */
  readonly isTraced: 0 | 1
  /** The group of whose ranks this one is made: it knows their processes. */
  readonly parent: NativeCommunicator | undefined
  /** For messages. */
  readonly operation: string
  /** The group stands on all ranks, or on none. */
  readonly isConfirmed: boolean
}

/** Kinds of renew(), by their numbers. */
export const renewals = { recreate: 1, shrink: 2 } as const

export interface Connected {
  readonly group: number
  readonly warning: string
  readonly spinUs: number
  readonly arenaBytes: number
}

/** A tensor's id, or a typed array. */
type NativeData = number | TypedArray

/** What runSync and run take; operations, dtypes, algorithms and reductions by their codes. */
export type NativeCall = [
  op: number,
  dtype: number,
  data: NativeData | undefined,
  output: NativeData | undefined,
  root: number,
  /** And wire. */
  algorithm: number,
  timeoutMs: number,
  reduceOp: number,
  /**
   * [worldSize + 1], where the parts of the ranks begin in the whole, if they are not all alike; of allToAll
   * [worldSize, 2, worldSize], what each rank sends to each, then what it expects from each.
   */
  offsets: BigUint64Array | undefined,
]

/** What runBatch takes. */
export type NativeBatch = [
  /** Of each operation op, dtype, root, algorithm, reduceOp and which of data, output and offsets it has: bits 1, 2, 4. */
  numbers: Int32Array,
  /** These, one after the other. */
  values: readonly unknown[],
  timeoutMs: number,
]

/** What message and messageSync take: isSender, the other rank's number. */
export type NativeMessage = [isSender: boolean, dtype: number, data: NativeData, peer: number, timeoutMs: number]

export type NativeSendRecv = [
  dtype: number,
  data: NativeData,
  output: NativeData,
  to: number,
  from: number,
  timeoutMs: number,
]

export interface NativeCommunicator {
  connect(): Promise<Connected>
  runSync(...call: NativeCall): void
  /** runSync of one call on tensors, checked once, to be called again and again: it is sooner. */
  plan(...call: NativeCall): () => void
  /** undefined: it has ended already. */
  run(...call: NativeCall): Promise<void> | undefined
  runBatchSync(...batch: NativeBatch): void
  /** undefined: it has ended already. */
  runBatch(...batch: NativeBatch): Promise<void> | undefined
  messageSync(...message: NativeMessage): void
  /** undefined: it has ended already. */
  message(...message: NativeMessage): Promise<void> | undefined
  sendRecvSync(...message: NativeSendRecv): void
  /** Of the send and of the recv. */
  sendRecv(...message: NativeSendRecv): (Promise<void> | undefined)[]
  alloc(dtype: number, count: number, description: string): { readonly id: number; readonly buffer: ArrayBuffer }
  abort(reason: string): void
  /** @param isSuperseded another group has taken its place: this end is in order, whatever broke it */
  close(isSuperseded?: boolean): void
  /** A number that no other group of the job has. */
  nextGroup(): number
  /**
   * Agrees with the other ranks on the group that takes this one's place; its members are ranks of the job.
   * @param terms what ranks of several nodes must agree on besides
   */
  renew(
    kind: number,
    timeoutMs: number,
    terms: string,
  ): Promise<{ readonly group: number; readonly members: readonly number[] }>
  /** Breaks the group as ERR_TIMEOUT of another rank. */
  giveUp(rank: number, waitedMs: number): void
  /** The last operations of every rank; empty when the group is closed. */
  recording(limit: number): Recording
  /** The group is broken. */
  hasFailed(): boolean
  statistics(): NativeStatistics
  /** The last calls, in the order of their ends, and how many before were dropped. */
  traced(): { readonly dropped: number; readonly calls: readonly TracedCall[] }
  timeAllReduce(dtype: number, count: number, samples: number): Float64Array
}

export interface NativeStatistics {
  /** Of the processor's counter. */
  readonly nsPerTick: number
  /** Size class c > 0: calls of 2^(c - 1) bytes and more, below 2^c. The last: buckets of latencies in ticks, where they are counted. */
  readonly tallies: readonly [operation: string, size: number, calls: number, bytes: number, latency?: Uint32Array][]
  readonly waits: readonly [rank: number, waits: number, ticks: number, late: number][]
}

/** One call of this rank; times on CLOCK_MONOTONIC. */
export interface TracedCall {
  readonly operation: string
  readonly dtype: string
  readonly count: number
  readonly bytes: number
  /** The first that it took, and how many. */
  readonly sequence: number
  readonly sequences: number
  readonly calledNs: number
  /** Its turn had come: later, where others were pending. */
  readonly beginNs: number
  readonly endNs: number
  readonly waitedNs: number
  readonly hasFailed: boolean
}

interface CommAddon {
  readonly Communicator: new (options: CommunicatorOptions) => NativeCommunicator
  leaveJob(nonce: string, rank: number): void
}

function isCommAddon(addon: unknown): addon is CommAddon {
  return (
    typeof addon === 'object' && addon !== null && 'Communicator' in addon && typeof addon.Communicator === 'function'
  )
}

function commAddon(): CommAddon {
  const addon = nativeAddon()
  if (isCommAddon(addon)) return addon
  throw new CollectiveError(
    'ERR_INTERNAL',
    'the native addon has no Communicator: it is of another version; run `npx tilerank build`',
  )
}

export function createCommunicator(options: CommunicatorOptions): NativeCommunicator {
  return new (commAddon().Communicator)(options)
}

/** This process makes no further group of the job: its socket is closed with the last that is open. */
export function leaveJob(nonce: string, rank: number): void {
  commAddon().leaveJob(nonce, rank)
}
