// Objects between ranks: msgpack bytes, whose lengths go first. Two collectives each, so group.ts lets nothing come between.

import { Packr } from 'msgpackr'
import type { TypedArray } from './communicator.js'

/** One collective of the group. */
export type Exchange = (
  op: 'allGather' | 'broadcast' | 'gather',
  data: TypedArray,
  output?: TypedArray,
  choices?: { readonly root?: number; readonly counts?: readonly number[] },
) => Promise<void>

interface Place {
  readonly rank: number
  readonly worldSize: number
}

const packr = new Packr({ moreTypes: true })

// A copy: the packer goes on to use its buffer.
const pack = (value: unknown): Uint8Array => Uint8Array.from(packr.pack(value))

export async function broadcastObject<T>(exchange: Exchange, { rank }: Place, value: T, root: number): Promise<T> {
  const mine = rank === root ? pack(value) : new Uint8Array()
  const length = Float64Array.of(mine.length)
  await exchange('broadcast', length, undefined, { root })
  const bytes = rank === root ? mine : new Uint8Array(length[0] ?? 0)
  await exchange('broadcast', bytes, undefined, { root })
  return rank === root ? value : (packr.unpack(bytes) as T)
}

/** @param root the only rank that gets them; left out: all */
export async function gatherObjects<T>(
  exchange: Exchange,
  place: Place,
  value: T,
  root: number,
): Promise<T[] | undefined>
export async function gatherObjects<T>(exchange: Exchange, place: Place, value: T): Promise<T[]>
export async function gatherObjects<T>(
  exchange: Exchange,
  { rank, worldSize }: Place,
  value: T,
  root?: number,
): Promise<T[] | undefined> {
  const mine = pack(value)
  const lengths = new Float64Array(worldSize)
  await exchange('allGather', Float64Array.of(mine.length), lengths)
  const counts = [...lengths]
  const hasAll = root === undefined || root === rank
  const bytes = hasAll ? new Uint8Array(counts.reduce((sum, count) => sum + count, 0)) : undefined
  if (root === undefined) await exchange('allGather', mine, bytes, { counts })
  else await exchange('gather', mine, bytes, { root, counts })
  if (bytes === undefined) return undefined
  let end = 0
  return counts.map((count) => packr.unpack(bytes.subarray(end, (end += count))) as T)
}
