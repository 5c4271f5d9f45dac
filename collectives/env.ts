// The variables by which a launcher tells a rank who it is: read and checked in this one place. Without any of them a process is
// a group of one; a set that is incomplete or contradicts itself is an error that names the variables.

import { CollectiveError } from './errors.js'

export interface RankEnvironment {
  readonly rank: number
  readonly worldSize: number
  readonly localRank: number
  readonly localSize: number
  /** The job's nonce, 32 hexadecimal digits; empty in a job of one rank that has none. */
  readonly job: string
  /** Descriptor of this rank's listening socket, if the launcher bound it; -1: the rank binds it. */
  readonly socketFd: number
  /** host:port where the ranks of several nodes find each other; undefined: all are on this node. */
  readonly store: string | undefined
}

/** The names, for launchers and messages. LOCAL_SIZE is the older word for LOCAL_WORLD_SIZE. */
export const rankVariables = [
  'RANK',
  'WORLD_SIZE',
  'LOCAL_RANK',
  'LOCAL_WORLD_SIZE',
  'LOCAL_SIZE',
  'MASTER_ADDR',
  'MASTER_PORT',
  'TILERANK_JOB',
  'TILERANK_SOCKET_FD',
  'TILERANK_STORE',
  'TILERANK_TIMEOUT_MS',
] as const

export type Environment = Readonly<Record<string, string | undefined>>

/** Those that make a process a rank. MASTER_* and the timeout mean nothing alone. */
const decisive = [
  'RANK',
  'WORLD_SIZE',
  'LOCAL_RANK',
  'LOCAL_WORLD_SIZE',
  'LOCAL_SIZE',
  'TILERANK_JOB',
  'TILERANK_SOCKET_FD',
]

const maxWorldSize = 256

const fail = (message: string, ...variables: readonly string[]): CollectiveError =>
  new CollectiveError('ERR_ENVIRONMENT', message, { variables })

const isSet = (env: Environment, name: string): boolean => (env[name] ?? '') !== ''

function integer(env: Environment, name: string, lowest: number, highest: number): number | undefined {
  const text = env[name]
  if (text === undefined || text === '') return undefined
  const value = /^\d{1,10}$/.test(text) ? Number(text) : NaN
  if (!(value >= lowest && value <= highest)) {
    throw fail(`${name} is '${text}', expected is an integer from ${String(lowest)} to ${String(highest)}`, name)
  }
  return value
}

function required(env: Environment, name: string, lowest: number, highest: number): number {
  const value = integer(env, name, lowest, highest)
  if (value !== undefined) return value
  const present = decisive.filter((other) => isSet(env, other))
  throw fail(
    `${name} is missing, while ${present.join(', ')} ${present.length === 1 ? 'is' : 'are'} set: a launcher sets all of them`,
    name,
  )
}

/**
 * Who this process is, or undefined when no launcher said anything.
 * @throws CollectiveError ERR_ENVIRONMENT naming the variables that are missing or contradict each other;  */
export function readRankEnvironment(env: Environment = process.env): RankEnvironment | undefined {
  if (!decisive.some((name) => isSet(env, name))) return undefined
  const worldSize = required(env, 'WORLD_SIZE', 1, maxWorldSize)
  const rank = required(env, 'RANK', 0, maxWorldSize - 1)
  if (rank >= worldSize)
    throw fail(`RANK is ${String(rank)}, but WORLD_SIZE is ${String(worldSize)}`, 'RANK', 'WORLD_SIZE')
  integer(env, 'MASTER_PORT', 1, 65535)

  const localWorldSize = integer(env, 'LOCAL_WORLD_SIZE', 1, maxWorldSize)
  const otherLocalSize = integer(env, 'LOCAL_SIZE', 1, maxWorldSize)
  if (localWorldSize !== undefined && otherLocalSize !== undefined && localWorldSize !== otherLocalSize) {
    throw fail(
      `LOCAL_WORLD_SIZE is ${String(localWorldSize)}, but LOCAL_SIZE is ${String(otherLocalSize)}`,
      'LOCAL_WORLD_SIZE',
      'LOCAL_SIZE',
    )
  }
  const localSize = localWorldSize ?? otherLocalSize ?? worldSize
  const localRank = integer(env, 'LOCAL_RANK', 0, maxWorldSize - 1) ?? rank
  if (localRank >= localSize) {
    throw fail(
      `LOCAL_RANK is ${String(localRank)}, but LOCAL_WORLD_SIZE is ${String(localSize)}`,
      'LOCAL_RANK',
      'LOCAL_WORLD_SIZE',
    )
  }
  if (localSize > worldSize) {
    throw fail(
      `LOCAL_WORLD_SIZE is ${String(localSize)}, but WORLD_SIZE is ${String(worldSize)}`,
      'LOCAL_WORLD_SIZE',
      'WORLD_SIZE',
    )
  }
  const masterAddress = env['MASTER_ADDR'] ?? ''
  const store =
    (env['TILERANK_STORE'] ?? '') !== ''
      ? env['TILERANK_STORE']
      : localSize < worldSize && masterAddress !== ''
        ? masterAddress
        : undefined
  if (localSize < worldSize && store === undefined) {
    throw fail(
      `LOCAL_WORLD_SIZE is ${String(localSize)}, but WORLD_SIZE is ${String(worldSize)}: where ranks are on several nodes, TILERANK_STORE says ` +
        'where they find each other (host:port, of rank 0)',
      'TILERANK_STORE',
      'LOCAL_WORLD_SIZE',
      'WORLD_SIZE',
    )
  }
  if (store !== undefined) return { rank, worldSize, localRank, localSize, job: '', socketFd: -1, store }
  if (localRank !== rank) {
    throw fail(
      `LOCAL_RANK is ${String(localRank)}, but RANK is ${String(rank)} in a job of one node`,
      'LOCAL_RANK',
      'RANK',
    )
  }

  const job = env['TILERANK_JOB'] ?? ''
  if (job === '' && worldSize > 1) {
    throw fail(
      `TILERANK_JOB is missing, while WORLD_SIZE is ${String(worldSize)}: start the ranks with tp-launch, or set it to the same 32 random ` +
        'hexadecimal digits on all of them',
      'TILERANK_JOB',
    )
  }
  if (job !== '' && !/^[0-9a-f]{32}$/.test(job)) {
    throw fail('TILERANK_JOB is not 32 hexadecimal digits in lower case', 'TILERANK_JOB')
  }
  const socketFd = integer(env, 'TILERANK_SOCKET_FD', 0, 2 ** 31 - 1) ?? -1
  return { rank, worldSize, localRank, localSize, job, socketFd, store: undefined }
}

/** How long an operation may be pending when the caller does not say: TILERANK_TIMEOUT_MS, else 60 s. */
export function defaultTimeoutMs(env: Environment = process.env): number {
  return integer(env, 'TILERANK_TIMEOUT_MS', 1, 2 ** 31 - 1) ?? 60_000
}
