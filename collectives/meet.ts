// How the ranks of a job on several nodes learn of each other: every rank puts a card into the store and reads those of all others, before
// anything else is sent. Ranks that were started differently find out here, with both sides named.

import { createHash } from 'node:crypto'
import { readFileSync, readlinkSync } from 'node:fs'
import { hostname } from 'node:os'
import { Packr } from 'msgpackr'
import type { Environment } from './env.js'
import { CollectiveError } from './errors.js'
import { z85Decode } from './secret.js'
import type { Store } from './store.js'

/** What a rank says of itself. */
export interface Card {
  readonly rank: number
  readonly worldSize: number
  /** Of the program: ranks of different releases must not meet. */
  readonly version: string
  /** Whatever else all ranks must agree on, word by word. */
  readonly terms: string
  readonly host: string
  readonly pid: number
  /** The same on the ranks that can share memory. */
  readonly node: string
  /** tcp://address:port, where this rank receives frames. */
  readonly endpoint: string
  /** CURVE, Z85; empty where nothing is encrypted. */
  readonly publicKey: string
  /** Rank 0's measured rules, for all (algorithms.ts, tunedText); else empty. */
  readonly tuned: string
}

/**
 * The node that this process is on: this boot of this kernel, and its network namespace, since ranks meet over a socket of that
 * namespace. TILERANK_NODE makes several of one, for experiments.
 */
export function nodeIdentity(env: Environment): string {
  const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
  const namespace = readlinkSync('/proc/self/ns/net')
  return createHash('sha256')
    .update([boot, namespace, env['TILERANK_NODE'] ?? ''].join(' '))
    .digest('hex')
    .slice(0, 32)
}

const packr = new Packr({ useRecords: false })

/** This rank's card, and its bytes. */
export function cardOf(own: Omit<Card, 'host' | 'pid'>): { readonly card: Card; readonly bytes: Uint8Array } {
  const card: Card = { ...own, host: hostname(), pid: process.pid }
  return { card, bytes: packr.pack(card) }
}

const endpointPattern = /^tcp:\/\/(?:[0-9.]+|\[[0-9a-f:.]+(?:%\w+)?\]):\d{1,5}$/i

/** Hostile bytes give an error, never a card that is none: its endpoint is connected to. */
export function parseCard(bytes: Uint8Array, rank: number): Card {
  const given: Partial<Record<keyof Card, unknown>> = {}
  try {
    Object.assign(given, packr.unpack(bytes))
  } catch {
    // Told below, as what is missing.
  }
  const { worldSize, version, terms, host, pid, node, endpoint, publicKey, tuned } = given
  if (
    given.rank !== rank ||
    !isCount(worldSize) ||
    !isCount(pid) ||
    ![version, terms, host, node, tuned].every((text) => typeof text === 'string') ||
    !(endpoint === '' || (typeof endpoint === 'string' && endpointPattern.test(endpoint))) ||
    !(publicKey === '' || (typeof publicKey === 'string' && z85Decode(publicKey) !== undefined))
  )
    throw new CollectiveError('ERR_MISMATCH', `what came of rank ${rank} is no card of a rank`, { peer: rank })
  return { rank, worldSize, version, terms, host, pid, node, endpoint, publicKey, tuned } as Card
}

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && Number(value) > 0

const describe = ({ rank, host, pid }: Card): string => `rank ${rank} (pid ${pid} on ${host})`

/**
 * @param prefix of the keys, the same on all ranks, one for each group
 * @returns the cards of all ranks, by rank
 * @throws CollectiveError ERR_MISMATCH with both sides; ERR_TIMEOUT with `lateRanks`
 */
export async function meet(
  store: Store,
  prefix: string,
  own: Omit<Card, 'host' | 'pid'>,
  timeoutMs: number,
): Promise<Card[]> {
  const { card: mine, bytes } = cardOf(own)
  const keyOf = (rank: number): string => `${prefix}/rank/${rank}`
  try {
    await store.set(keyOf(mine.rank), bytes, { isNew: true })
  } catch (error) {
    if (!(error instanceof CollectiveError) || error.code !== 'ERR_MISMATCH' || error.theirs === undefined) throw error
    const other = parseCard(await store.get(keyOf(mine.rank)), mine.rank)
    throw new CollectiveError(
      'ERR_MISMATCH',
      `two processes claim to be rank ${mine.rank} of this job: pid ${other.pid} on ${other.host} and pid ${mine.pid} on ${mine.host}`,
      { rank: mine.rank },
    )
  }
  const end = performance.now() + timeoutMs
  const ranks = Array.from({ length: mine.worldSize }, (_, rank) => rank)
  const answers = await Promise.all(
    ranks.map(async (rank) => {
      if (rank === mine.rank) return mine
      try {
        const left = Math.max(1, Math.round(end - performance.now()))
        const card = parseCard(await store.get(keyOf(rank), { timeoutMs: left }), rank)
        // At once: who is different may be why others do not come.
        compareCard(mine, card)
        return card
      } catch (error) {
        if (error instanceof CollectiveError && error.code === 'ERR_TIMEOUT') return undefined
        throw error
      }
    }),
  )
  return compareCards(mine, answers, timeoutMs, 'to the store')
}

/**
 * @param answers by rank; undefined: it did not come `where` ranks meet
 * @throws CollectiveError ERR_MISMATCH, ERR_TIMEOUT
 */
export function compareCards(
  mine: Card,
  answers: readonly (Card | undefined)[],
  timeoutMs: number,
  where: string,
): Card[] {
  const cards = answers.filter((card) => card !== undefined)
  // First who is different: that may be why others did not come.
  for (const card of cards) compareCard(mine, card)
  const lateRanks = answers.flatMap((card, rank) => (card === undefined ? [rank] : []))
  if (lateRanks.length > 0) {
    throw new CollectiveError(
      'ERR_TIMEOUT',
      `createGroup: rank ${lateRanks.join(', ')} of ${mine.worldSize} did not come ${where} within ${timeoutMs} ms`,
      { rank: mine.rank, lateRanks, elapsedMs: timeoutMs, operation: 'createGroup' },
    )
  }
  return cards
}

function compareCard(mine: Card, theirs: Card): void {
  for (const field of ['worldSize', 'version', 'terms'] as const) {
    if (theirs[field] === mine[field]) continue
    throw new CollectiveError(
      'ERR_MISMATCH',
      `ranks were started differently: ${describe(mine)} has ${field} ${mine[field]}, ${describe(theirs)} has ${field} ${theirs[field]}`,
      {
        rank: mine.rank,
        peer: theirs.rank,
        operation: 'createGroup',
        mine: `${mine[field]}`,
        theirs: `${theirs[field]}`,
      },
    )
  }
}

/** Ranks by node, rising, the nodes in the order of their lowest rank: the layout that native code takes. */
export function nodesOf(cards: readonly Pick<Card, 'rank' | 'node'>[]): number[][] {
  const nodes = new Map<string, number[]>()
  for (const { rank, node } of [...cards].sort((a, b) => a.rank - b.rank))
    nodes.set(node, [...(nodes.get(node) ?? []), rank])
  return [...nodes.values()]
}
