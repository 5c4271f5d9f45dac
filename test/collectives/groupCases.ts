// What the ranks of the tests of groups of groups, and of groups after a failure, run. Every function checks its own results against a
// closed form.

import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { CollectiveError, createGroup, type Group } from '../../collectives/index.js'

function say(value: unknown): void {
  process.send?.({ kind: 'say', value })
}

function randomFrom(seed: number): (below: number) => number {
  let state = seed >>> 0
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
}

export interface Failed {
  readonly code: string
  readonly message: string
  readonly tookMs: number
  readonly facts: Readonly<Record<string, unknown>>
}

export async function failureOf(act: () => unknown): Promise<Failed> {
  const start = performance.now()
  try {
    await act()
  } catch (error) {
    if (!(error instanceof CollectiveError)) throw error
    const { code, message } = error
    return {
      code,
      message,
      tookMs: performance.now() - start,
      facts: { ...error, recorder: undefined, cause: undefined },
    }
  }
  throw new Error('nothing failed')
}

function same(actual: ArrayLike<number>, expected: readonly number[], what: string): void {
  const got = Array.from(actual)
  if (got.length !== expected.length || got.some((value, i) => value !== expected[i]))
    throw new Error(`${what}: [${got.join(', ')}], expected is [${expected.join(', ')}]`)
}

/** One operation of a group, chosen by a number that its ranks share, checked against the ranks of the job that take part. */
async function operate(group: Group, choice: number, count: number, isSync: boolean): Promise<void> {
  const { members, rank, worldSize } = group
  const what = `operation ${String(choice)} of ${String(count)} among ${members.join(', ')}`
  const value = (of: number, i: number): number => (members[of] ?? 0) * 100 + (i % 7) + count
  const sum = (i: number): number => members.reduce((total, _, of) => total + value(of, i), 0)
  const mine = Float64Array.from({ length: count }, (_, i) => value(rank, i))
  const root = choice % worldSize
  const indexes = [...mine.keys()]
  switch (choice % 6) {
    case 0: {
      if (isSync) group.allReduceSync(mine)
      else await group.allReduce(mine)
      same(mine, indexes.map(sum), what)
      return
    }
    case 1: {
      if (isSync) group.broadcastSync(mine, { root })
      else await group.broadcast(mine, { root })
      same(
        mine,
        indexes.map((i) => value(root, i)),
        what,
      )
      return
    }
    case 2: {
      const all = new Float64Array(count * worldSize)
      if (isSync) group.allGatherSync(mine, all)
      else await group.allGather(mine, all)
      same(
        all,
        members.flatMap((_, of) => indexes.map((i) => value(of, i))),
        what,
      )
      return
    }
    case 3: {
      const counts = members.map((_, of) => of + (count % 3))
      const whole = Float64Array.from({ length: counts.reduce((a, b) => a + b, 0) }, (_, i) => value(rank, i))
      const part = new Float64Array(counts[rank] ?? 0)
      if (isSync) group.reduceScatterSync(whole, part, { counts })
      else await group.reduceScatter(whole, part, { counts })
      const begin = counts.slice(0, rank).reduce((a, b) => a + b, 0)
      same(
        part,
        [...part.keys()].map((i) => sum(begin + i)),
        what,
      )
      return
    }
    case 4: {
      const objects = await group.allGatherObject({ rank: members[rank], count })
      same(
        objects.map((one) => one.rank ?? -1),
        members,
        what,
      )
      return
    }
    default:
      if (isSync) group.barrierSync()
      else await group.barrier()
  }
}

/** Rows, columns and the whole of a grid of ranks, and groups of these, at the same time, in random mixes. */
export async function grid(args: { rows: number; columns: number; rounds: number; seed: number }): Promise<unknown> {
  const whole = await createGroup({ timeoutMs: 20_000, slotBytes: 16_384 })
  const y = Math.floor(whole.rank / args.columns)
  const x = whole.rank % args.columns
  // Ranks have made different numbers of groups before.
  const alone = await whole.subgroup([0], { slotBytes: 4096 })
  const row = await whole.split({ color: y })
  const column = await whole.split({ color: x, key: -y })
  const even = await whole.split({ color: whole.rank % 2 === 0 ? 7 : undefined })
  if (row === undefined || column === undefined) throw new Error('no row or no column')
  same(
    row.members,
    Array.from({ length: args.columns }, (_, i) => y * args.columns + i),
    'row',
  )
  same(
    column.members,
    Array.from({ length: args.rows }, (_, i) => (args.rows - 1 - i) * args.columns + x),
    'column',
  )
  same([row.rank, column.rank], [x, args.rows - 1 - y], 'ranks')
  if ((alone === undefined) !== (whole.rank !== 0) || (even === undefined) !== (whole.rank % 2 === 1))
    throw new Error('in a group that it is not in')
  // A group of a group of a group: the row's ranks in reverse, then its first.
  const reversed = await row.subgroup(row.members.map((_, i) => row.worldSize - 1 - i))
  const first = await reversed?.subgroup([0])
  if (reversed === undefined || (first === undefined) !== (reversed.rank !== 0)) throw new Error('not reversed')
  // In the same order on all ranks.
  const groups = [whole, row, column, even, reversed, first, alone]
  const random = randomFrom(args.seed)
  const own = randomFrom(args.seed + whole.rank)
  const pending: Promise<void>[] = []
  for (let round = 0; round < args.rounds; round++) {
    const isSync = random(4) === 0
    for (const group of groups) {
      const choice = random(60)
      const count = random(9) === 0 ? 3000 : random(50)
      if (group === undefined) continue
      if (isSync) {
        await Promise.all(pending.splice(0))
        await operate(group, choice, count, true)
      } else {
        pending.push(operate(group, choice, count, false))
      }
      if (own(20) === 0) await sleep(own(4))
    }
  }
  await Promise.all(pending)
  // The parent first, the others go on; or the children first.
  if (args.seed % 2 === 0) await whole.close()
  for (const [turn, group] of [row, column, reversed].entries()) await operate(group, turn, 10, true)
  for (const group of [first, reversed, even, column, row, alone, whole]) await group?.close()
  return groups.length
}

/** Splits of two groups that cross: some ranks ask for one first, some for the other, none waits in between. */
export async function crossing(args: { rounds: number }): Promise<number> {
  const a = await createGroup({ slotBytes: 4096 })
  const b = await createGroup({ slotBytes: 4096 })
  // Numbers that ranks propose differ from here on.
  for (let i = 0; i < a.rank; i++) await (await createGroup({ env: {} })).close()
  const odd = await a.split({ color: a.rank % 2 === 1 ? 0 : undefined })
  await odd?.close()
  for (let round = 0; round < args.rounds; round++) {
    const ask = [
      () => a.split({ color: a.rank % 2 }),
      () => b.split({ color: b.rank >> 1 }),
      () => a.subgroup([1, 0]),
      () => b.split({ color: 0, key: -b.rank }),
    ]
    const order = a.rank % 2 === 0 ? [0, 1, 2, 3] : [1, 3, 0, 2]
    const made: (Group | undefined)[] = []
    await Promise.all(
      order.map(async (which) => {
        made[which] = await ask[which]?.()
      }),
    )
    const expected = [
      a.members.filter((rank) => rank % 2 === a.rank % 2),
      a.members.filter((rank) => rank >> 1 === a.rank >> 1),
      a.rank < 2 ? [1, 0] : undefined,
      [...a.members].reverse(),
    ]
    expected.forEach((members, which) => {
      if (members === undefined) return
      same(made[which]?.members ?? [], members, `group ${String(which)}`)
    })
    await Promise.all(
      made.flatMap((group, which) => (group === undefined ? [] : [operate(group, which + round, 20, false)])),
    )
    await Promise.all(made.map(async (group) => group?.close()))
  }
  await a.close()
  await b.close()
  return args.rounds
}

/** What goes wrong in one rank's arguments, or between ranks, leaves the group whole. */
export async function misuse(): Promise<Record<string, Failed>> {
  const group = await createGroup({ slotBytes: 4096, timeoutMs: 10_000 })
  const { rank } = group
  const failures: Record<string, Failed> = {}
  const fail = async (name: string, act: () => unknown): Promise<void> => {
    failures[name] = await failureOf(act)
    group.allReduceSync(Float32Array.of(1))
  }
  await fail('color', () => group.split({ color: -1 }))
  await fail('key', () => group.split({ color: 1, key: 0.5 }))
  await fail('option', () => group.split({ color: 1, colour: 2 } as { color: number }))
  await fail('empty', () => group.subgroup([]))
  await fail('twice', () => group.subgroup([0, 0]))
  await fail('beyond', () => group.subgroup([0, 9]))
  await fail('no list', () => group.subgroup('01' as unknown as number[]))
  await fail('slots', () => group.split({ color: 0, slotBytes: 100 }))
  await fail('lists', () => group.subgroup(rank === 1 ? [1, 0] : [0, 1]))
  await fail('verbs', () => (rank === 2 ? group.subgroup([0, 1, 2]) : group.split({ color: 0 })))
  await fail('sizes', () => group.split({ color: 0, slotBytes: rank === 1 ? 8192 : 4096 }))
  const child = await group.subgroup([2, 1, 0])
  if (child === undefined) throw new Error('no child')
  const tensor = child.alloc('f32', [4])
  await fail('tensor', () => group.allReduceSync(tensor))
  await fail('root', () => child.broadcastSync(tensor, { root: 3 }))
  tensor.data.fill(child.rank)
  child.broadcastSync(tensor, { root: 2 })
  same(tensor.data, [2, 2, 2, 2], 'broadcast of rank 0 of the job')
  const pending = group.split({ color: 0 })
  failures['busy'] = await failureOf(() => {
    group.barrierSync()
  })
  const late = await pending
  await group.close()
  failures['closed'] = await failureOf(() => group.split({ color: 0 }))
  failures['closed too'] = await failureOf(() => group.recreate())
  if (late === undefined) throw new Error('no late group')
  same(late.allReduceSync(Float32Array.of(1)), [3], 'of a child of a closed group')
  await late.close()
  await child.close()
  return failures
}

/** In pairs, the last rank of all is killed while its partner waits for it; then the others wait for it in the whole, and go on without. */
export async function lossInPair(): Promise<unknown> {
  const group = await createGroup({ timeoutMs: 20_000 })
  const { rank, worldSize } = group
  const victim = worldSize - 1
  const pair = await group.split({ color: rank >> 1 })
  if (pair === undefined) throw new Error('no pair')
  pair.barrierSync()
  if (rank === victim) {
    say('ready')
    await sleep(30_000)
  }
  const ofPair =
    rank >> 1 === victim >> 1
      ? await failureOf(() => {
          pair.allReduceSync(new Float32Array(10))
        })
      : undefined
  if (ofPair === undefined) await operate(pair, 0, 10, true)
  const ofWhole = await failureOf(() => group.barrier())
  // A group of two of which one is left.
  const left = rank >> 1 === victim >> 1 ? await pair.shrink() : pair
  const smaller = await group.shrink()
  for (let choice = 0; choice < 12; choice++) {
    await operate(smaller, choice, 100, choice % 2 === 0)
    await operate(left, choice, 100, choice % 2 === 1)
  }
  const again = await smaller.split({ color: 0, key: -rank })
  if (again === undefined) throw new Error('no group of the smaller')
  await operate(again, 0, 10, true)
  const result = {
    ofPair,
    ofWhole,
    members: smaller.members,
    rank: smaller.rank,
    left: left.members,
    again: again.members,
  }
  for (const one of [group, smaller, left, again]) await one.close()
  return result
}

export interface Held {
  readonly descriptors: number
  readonly threads: number
  readonly mappings: number
  readonly residentKb: number
}

/** What this process holds, once what it has let go of is gone: tensors' memory goes with their views. */
export async function resources(): Promise<Held> {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  for (let i = 0; i < 3; i++) {
    collect()
    await sleep(5)
  }
  const status = readFileSync('/proc/self/status', 'utf8')
  return {
    descriptors: readdirSync('/proc/self/fd').length,
    threads: readdirSync('/proc/self/task').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('memfd:tilerank').length - 1,
    residentKb: Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1] ?? NaN),
  }
}

/** Breaks and recreates a group again and again, a child of it too; what a process holds must not grow. */
export async function again(args: { rounds: number; lateMs?: number }): Promise<unknown> {
  let group = await createGroup({ timeoutMs: 10_000, slotBytes: 65_536 })
  const { rank, worldSize } = group
  let child = await group.subgroup([2, 0, 1])
  const codes = new Set<string>()
  let before: Held | undefined
  for (let round = 0; round < args.rounds; round++) {
    if (child === undefined) throw new Error('no child')
    const unused = group.alloc('f32', [1000])
    const used = child.alloc('f32', [1000])
    child.allReduceSync(used)
    const how = round % 3
    const culprit = round % worldSize
    const failure = await failureOf(async () => {
      if (how === 0) {
        if (rank === culprit) group.abort('on purpose')
        await group.allReduce(unused)
        await group.barrier()
      } else if (how === 1) {
        if (rank === culprit) await group.barrier()
        else group.allReduceSync(unused)
      } else {
        // The culprit comes when the others have given up.
        if (rank === culprit) await sleep(args.lateMs ?? 60)
        await group.allReduce(Float32Array.of(1), { timeoutMs: rank === culprit ? 10_000 : 30 })
        await group.barrier()
      }
    })
    codes.add(failure.code)
    group = round % 2 === 0 ? await group.recreate() : await group.shrink()
    same(group.members, [0, 1, 2], 'members')
    await operate(group, round, 100, round % 4 < 2)
    // The child did not break: it may be made anew all the same.
    if (round % 5 === 0) child = await child.recreate()
    await operate(child, round, 100, round % 4 >= 2)
    if (unused.data.length !== 0) throw new Error('the tensor of the broken group is still there')
    if (round === 9) before = await resources()
  }
  const after = await resources()
  await group.close()
  await child?.close()
  return { codes: [...codes].sort(), before, after }
}

/** Ranks that do not all want the same. */
export async function discord(): Promise<unknown> {
  let group = await createGroup({ timeoutMs: 10_000 })
  const turns = await createGroup({ timeoutMs: 10_000 })
  const { rank } = group
  const failures: Record<string, Failed> = {}
  if (rank === 2) group.abort('on purpose')
  await failureOf(() => group.barrier())
  // One does not come: it lives, so neither may go on without it.
  for (const kind of ['recreate', 'shrink'] as const) {
    if (rank !== 1) failures[`absent of ${kind}`] = await failureOf(() => group[kind]({ timeoutMs: 300 }))
    await turns.barrier()
  }
  // What was tried before is forgotten.
  failures['kinds'] = await failureOf(() =>
    rank === 2 ? group.recreate({ timeoutMs: 1000 }) : group.shrink({ timeoutMs: 1000 }),
  )
  await turns.barrier()
  failures['sizes'] = await failureOf(() => group.recreate({ slotBytes: rank === 0 ? 4096 : 8192 }))
  await turns.barrier()
  failures['option'] = await failureOf(() => group.recreate({ env: {} } as object))
  const pending = group.shrink()
  failures['twice'] = await failureOf(() => group.shrink())
  const next = await pending
  failures['old'] = await failureOf(() => group.barrier())
  group = next
  await operate(group, 0, 10, true)
  await turns.barrier()
  // Nothing is broken, but one goes on to make it anew while the others wait for it.
  failures['whole'] = await failureOf(async () => {
    if (rank !== 0) await group.barrier()
    else await group.recreate({ timeoutMs: 1000 })
  })
  await turns.barrier()
  await operate((group = await group.recreate()), 2, 10, true)
  // One closes it instead.
  if (rank === 0) await group.close()
  else failures['closed'] = await failureOf(() => group.recreate())
  await group.close()
  await turns.close()
  return failures
}

/**
 * Makes a group anew until a rank of it is killed, which may be at any moment; then without that one. The others must stay together: whatever
 * one got from a call, a group or an error, the others got too, or they could not meet in the next.
 */
export async function lossMeanwhile(args: { kind: 'recreate' | 'shrink'; victim: number }): Promise<unknown> {
  let group = await createGroup({ timeoutMs: 10_000, slotBytes: 4096, chunkBytes: 4096 })
  if (group.rank === 0) group.abort('on purpose')
  await failureOf(() => group.barrier())
  say('broken')
  let { kind } = args
  let calls = 0
  let lostMs = 0
  while (group.members.includes(args.victim)) {
    try {
      calls++
      group = await group[kind]()
    } catch (error) {
      if (!(error instanceof CollectiveError) || error.code !== 'ERR_PEER_LOST' || kind === 'shrink') throw error
      lostMs = performance.now()
      kind = 'shrink'
      continue
    }
    try {
      await operate(group, 0, 10, true)
    } catch (error) {
      if (!(error instanceof CollectiveError) || error.code !== 'ERR_PEER_LOST') throw error
    }
  }
  await operate(group, 2, 100, true)
  const { members } = group
  await group.close()
  return { members, calls, tookMs: lostMs === 0 ? 0 : performance.now() - lostMs }
}
