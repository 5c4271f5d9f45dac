// The one error of collectives/. `code` is stable and is what callers and tests match; the other fields are the facts of the
// message, where they are known. ERR_INVALID_ARGUMENT and ERR_BUSY leave the group whole; the others of a running operation break it.

import { constants } from 'node:os'
import type { Recording } from './recorder.js'

export type CollectiveErrorCode =
  /** A caller's mistake: nothing was touched. */
  | 'ERR_INVALID_ARGUMENT'
  /** The variables that name this rank are incomplete or contradict each other. */
  | 'ERR_ENVIRONMENT'
  /** `lateRanks` did not come within the deadline. */
  | 'ERR_TIMEOUT'
  /** `rank` ended, by `signal` if one is known, or closed the group while others wait for it. */
  | 'ERR_PEER_LOST'
  /** Ranks called different operations, or were started with different settings: `mine` and `theirs`. */
  | 'ERR_MISMATCH'
  /** A rank gave up on purpose. */
  | 'ERR_ABORTED'
  /** A ...Sync call while an asynchronous operation of the group is pending. */
  | 'ERR_BUSY'
  | 'ERR_CLOSED'
  | 'ERR_NO_MEMORY'
  | 'ERR_IO'
  | 'ERR_UNSUPPORTED'
  | 'ERR_INTERNAL'

/** Facts of a failure. Which are there depends on the code. */
export interface CollectiveFailure {
  /** The lost rank of ERR_PEER_LOST; else the rank that reports. */
  readonly rank?: number
  /** The other side of ERR_MISMATCH. */
  readonly peer?: number
  /** The rank that found it first, where that is not this one. */
  readonly reportedBy?: number
  readonly pid?: number
  /** Name of the signal that ended the lost rank, such as SIGKILL, where the kernel tells. */
  readonly signal?: string
  readonly host?: string
  readonly operation?: string
  readonly sequence?: number
  /** The engine's step, counted from 1. */
  readonly step?: number
  readonly elapsedMs?: number
  readonly lateRanks?: readonly number[]
  readonly mine?: string
  readonly theirs?: string
  /** Names of environment variables: ERR_ENVIRONMENT. */
  readonly variables?: readonly string[]
  /** ERR_PEER_LOST, ERR_TIMEOUT, ERR_MISMATCH: the last operations of every rank, and where each stood. */
  readonly recorder?: Recording
}

export class CollectiveError extends Error implements CollectiveFailure {
  override readonly name = 'CollectiveError'
  readonly code: CollectiveErrorCode | (string & {})
  declare readonly rank?: number
  declare readonly peer?: number
  declare readonly reportedBy?: number
  declare readonly pid?: number
  declare readonly signal?: string
  declare readonly host?: string
  declare readonly operation?: string
  declare readonly sequence?: number
  declare readonly step?: number
  declare readonly elapsedMs?: number
  declare readonly lateRanks?: readonly number[]
  declare readonly mine?: string
  declare readonly theirs?: string
  declare readonly variables?: readonly string[]
  declare readonly recorder?: Recording

  constructor(
    code: CollectiveErrorCode | (string & {}),
    message: string,
    failure: CollectiveFailure = {},
    options?: ErrorOptions,
  ) {
    super(message, options)
    this.code = code
    Object.assign(this, failure)
  }
}

export const invalid = (message: string): CollectiveError => new CollectiveError('ERR_INVALID_ARGUMENT', message)

function inJob({ rank, peer, reportedBy, lateRanks = [] }: CollectiveFailure, members: readonly number[]): string {
  const named = [...new Set([rank, peer, reportedBy, ...lateRanks].flatMap((one) => one ?? []))].sort((a, b) => a - b)
  const others = named.filter((one) => (members[one] ?? one) !== one)
  if (others.length === 0) return ''
  return ` (in the job, ${others.map((one) => `rank ${String(one)} is rank ${String(members[one])}`).join(', ')})`
}

/** Failures that say something about other ranks. */
export const isBetweenRanks = (code: unknown): boolean =>
  code === 'ERR_PEER_LOST' || code === 'ERR_TIMEOUT' || code === 'ERR_MISMATCH'

/**
 * The addon's error as ours; anything that is no coded error of the addon passes through.
 * @param record gives the flight recorder's excerpt, asked for where the failure is one between ranks
 * @param members the job's rank of each rank of the group: named beside them where they differ
 */
export function fromNative(error: unknown, record?: () => Recording, members: readonly number[] = []): unknown {
  if (error instanceof CollectiveError || !(error instanceof Error) || !('code' in error)) return error
  const facts: Record<string, unknown> = { ...error }
  const code = facts['code']
  if (typeof code !== 'string') return error
  const failure: { -readonly [K in keyof CollectiveFailure]: CollectiveFailure[K] } = {}
  for (const key of ['rank', 'peer', 'reportedBy', 'pid', 'sequence', 'step', 'elapsedMs'] as const) {
    const value = facts[key]
    if (typeof value === 'number') failure[key] = value
  }
  for (const key of ['host', 'operation', 'mine', 'theirs'] as const) {
    const value = facts[key]
    if (typeof value === 'string') failure[key] = value
  }
  const late = facts['lateRanks']
  if (typeof late === 'string') failure.lateRanks = late.split(',').map(Number)
  const signal = facts['signal']
  if (typeof signal === 'number') {
    failure.signal = Object.entries(constants.signals).find(([, value]) => value === signal)?.[0] ?? String(signal)
  }
  if (record !== undefined && isBetweenRanks(code)) failure.recorder = record()
  return new CollectiveError(code, error.message + inJob(failure, members), failure, { cause: error })
}
