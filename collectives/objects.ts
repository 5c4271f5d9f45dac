// Operations of several collectives, the later of which depend on what the first brought: objects, as msgpack bytes whose lengths go
// first, and an allToAll of parts of any sizes. Each is a generator of its steps, which group.ts runs in the caller or posts one after
// the other; it lets nothing come between.

import { Packr } from 'msgpackr'
import type { CollectiveDType } from '../native/types.js'
import type { GroupData } from './group.js'

/** One collective of the group. */
export type Exchange = readonly [
  op: 'allGather' | 'allToAll' | 'broadcast' | 'gather',
  data: GroupData,
  output?: GroupData | undefined,
  choices?: { readonly root?: number; readonly counts?: readonly number[]; readonly dtype?: CollectiveDType },
  /** Of allToAll: [worldSize, 2, worldSize], what every rank sends to each and expects from each. */
  matrix?: BigUint64Array,
]

interface Place {
  readonly rank: number
  readonly worldSize: number
}

const packr = new Packr({ moreTypes: true })

// A copy: the packer goes on to use its buffer.
const pack = (value: unknown): Uint8Array => Uint8Array.from(packr.pack(value))

export function* broadcastObject<T>({ rank }: Place, value: T, root: number): Generator<Exchange, T, undefined> {
  const mine = rank === root ? pack(value) : new Uint8Array()
  const length = Float64Array.of(mine.length)
  yield ['broadcast', length, undefined, { root }]
  const bytes = rank === root ? mine : new Uint8Array(length[0] ?? 0)
  yield ['broadcast', bytes, undefined, { root }]
  return rank === root ? value : (packr.unpack(bytes) as T)
}

/** @param root the only rank that gets them; left out: all */
export function gatherObjects<T>(place: Place, value: T): Generator<Exchange, T[], undefined>
export function gatherObjects<T>(place: Place, value: T, root: number): Generator<Exchange, T[] | undefined, undefined>
export function* gatherObjects<T>(
  { rank, worldSize }: Place,
  value: T,
  root?: number,
): Generator<Exchange, T[] | undefined, undefined> {
  const mine = pack(value)
  const lengths = new Float64Array(worldSize)
  yield ['allGather', Float64Array.of(mine.length), lengths]
  const counts = [...lengths]
  const hasAll = root === undefined || root === rank
  const bytes = hasAll ? new Uint8Array(counts.reduce((sum, count) => sum + count, 0)) : undefined
  if (root === undefined) yield ['allGather', mine, bytes, { counts }]
  else yield ['gather', mine, bytes, { root, counts }]
  if (bytes === undefined) return undefined
  let end = 0
  return counts.map((count) => packr.unpack(bytes.subarray(end, (end += count))) as T)
}

/** An allToAll in which counts[p] elements go to rank p and outputCounts[p] come from it. */
export function* exchangeCounts(
  { worldSize }: Place,
  data: GroupData,
  output: GroupData,
  counts: readonly number[],
  outputCounts: readonly number[],
  dtype: CollectiveDType | undefined,
): Generator<Exchange, void, undefined> {
  const matrix = new BigUint64Array(2 * worldSize * worldSize)
  yield ['allGather', BigUint64Array.from([...counts, ...outputCounts], BigInt), matrix]
  yield ['allToAll', data, output, dtype === undefined ? {} : { dtype }, matrix]
}
