// Which ranks a group of a group has: agreed on in one exchange among the ranks of the first. Each shows what it asked for, and a number
// that no group of the job has yet; the new group takes that of its own first rank, so that several may come out of one exchange, and
// exchanges of several groups may cross.

import { CollectiveError, invalid } from './errors.js'
import type { Exchange } from './objects.js'

export interface SplitChoice {
  /** Ranks of the same color are one group; undefined: this rank is in none. */
  readonly color: number | undefined
  /** Order in the new group, where it is not that of the ranks. */
  readonly key?: number
}

export type Wish =
  | { readonly verb: 'split'; readonly color: number | undefined; readonly key: number }
  | { readonly verb: 'subgroup'; readonly ranks: readonly number[] }

export interface Agreement {
  /** Number of the new group. */
  readonly group: number
  /** In its order: ranks of the group that it is made of. */
  readonly ranks: readonly number[]
}

const verbs = ['split', 'subgroup'] as const
const none = -1

export function checkSplit({ color, key = 0 }: SplitChoice): Wish {
  if (color !== undefined && !(Number.isSafeInteger(color) && color >= 0))
    throw invalid(`color is ${String(color)}, expected is an integer from 0, or undefined`)
  if (!Number.isSafeInteger(key)) throw invalid(`key is ${String(key)}, expected is an integer`)
  return { verb: 'split', color, key }
}

export function checkSubgroup(ranks: readonly number[], worldSize: number): Wish {
  const given: unknown = ranks
  const isRank = (rank: unknown): boolean => Number.isInteger(rank) && Number(rank) >= 0 && Number(rank) < worldSize
  if (!Array.isArray(given) || given.length === 0 || !given.every(isRank) || new Set(given).size !== given.length)
    throw invalid(
      `ranks are ${JSON.stringify(ranks)}, expected is a list of one or more ranks below ${String(worldSize)}, each once`,
    )
  return { verb: 'subgroup', ranks: [...ranks] }
}

// [verb, number, color and key, or ranks]: as long for one verb as for the other, so that ranks that called different ones can say so.
function toWords(wish: Wish, number: number, worldSize: number): Float64Array {
  const words = new Float64Array(2 + Math.max(2, worldSize)).fill(none)
  words.set([verbs.indexOf(wish.verb), number])
  words.set(wish.verb === 'split' ? [wish.color ?? none, wish.key] : wish.ranks, 2)
  return words
}

function toWish(words: Float64Array): Wish {
  const [verb, , color = none, key = 0] = words
  return verb === verbs.indexOf('split')
    ? { verb: 'split', color: color === none ? undefined : color, key }
    : { verb: 'subgroup', ranks: [...words.subarray(2)].filter((rank) => rank !== none) }
}

const describe = (wish: Wish): string => (wish.verb === 'split' ? 'split' : `subgroup([${wish.ranks.join(', ')}])`)

/**
 * @param nextGroup gives a number that no group of the job has
 * @returns undefined: this rank is in none of the new groups
 * @throws CollectiveError ERR_MISMATCH on all ranks alike; their group stays whole
 */
export function* agreeOnRanks(
  { rank, worldSize }: { readonly rank: number; readonly worldSize: number },
  wish: Wish,
  nextGroup: () => number,
): Generator<Exchange, Agreement | undefined, undefined> {
  const mine = toWords(wish, nextGroup(), worldSize)
  const all = new Float64Array(mine.length * worldSize)
  yield ['allGather', mine, all]
  const wishes = Array.from({ length: worldSize }, (_, of) =>
    toWish(all.subarray(of * mine.length, (of + 1) * mine.length)),
  )
  // Every rank sees the same two sides: the first rank's, and the first that differs from it.
  const [first] = wishes
  const other = wishes.findIndex((theirs) => first === undefined || describe(theirs) !== describe(first))
  if (first !== undefined && other !== -1) {
    const theirs = wishes[other] ?? first
    const isFirst = describe(wish) === describe(first)
    throw new CollectiveError(
      'ERR_MISMATCH',
      `ranks disagree: rank 0 called ${describe(first)}, rank ${String(other)} called ${describe(theirs)}`,
      {
        rank,
        peer: isFirst ? other : 0,
        operation: wish.verb,
        mine: describe(wish),
        theirs: describe(isFirst ? theirs : first),
      },
    )
  }
  const ranks = wish.verb === 'subgroup' ? wish.ranks : ranksOfColor(wishes, wish.color)
  const [leader] = ranks
  if (leader === undefined || !ranks.includes(rank)) return undefined
  return { group: all[leader * mine.length + 1] ?? 0, ranks }
}

function ranksOfColor(wishes: readonly Wish[], color: number | undefined): number[] {
  if (color === undefined) return []
  return wishes
    .flatMap((wish, rank) => (wish.verb === 'split' && wish.color === color ? [{ rank, key: wish.key }] : []))
    .sort((a, b) => a.key - b.key || a.rank - b.rank)
    .map(({ rank }) => rank)
}
