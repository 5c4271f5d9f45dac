// What ranks on several nodes do while one of them, or their network, is struck (test/ranks.ts runs it): operations without end, until one
// fails; then, in the same process, another group of those that are left.

import { readFileSync } from 'node:fs'
import { setImmediate as turn } from 'node:timers/promises'
import { createGroup, type Group } from '../../collectives/index.js'
import type { Seen } from './programs.js'

export interface NodesSeen extends Seen {
  /** Of the second group: the sum of its ranks' ones; null where none was made. */
  readonly again: number | null
  /** Shared memory of groups that is still mapped when they are closed. */
  readonly mapped: number
}

const monotonicMs = (): number => Number(process.hrtime.bigint() / 1000n) / 1000
const say = (value: unknown): void => void process.send?.({ kind: 'say', value })

async function round(group: Group, root: number, timeoutMs: number): Promise<void> {
  const { rank, worldSize } = group
  const sum = (worldSize * (worldSize + 1)) / 2
  const expect = (name: string, data: Float32Array, value: number): void => {
    if (!data.every((element) => element === value)) throw new Error(`wrong values in ${name}`)
  }
  const own = (length: number): Float32Array => new Float32Array(length).fill(rank + 1)
  expect('leader', group.allReduceSync(own(64), { algorithm: 'leader', timeoutMs }), sum)
  const [small, large, sent] = await Promise.all([
    group.allReduce(own(3000), { algorithm: 'splitRail', timeoutMs }),
    group.allReduce(own(40_000), { algorithm: 'twoStep', timeoutMs }),
    group.broadcast(own(20_000), { root, timeoutMs }),
  ])
  expect('splitRail', small, sum)
  expect('twoStep', large, sum)
  expect('broadcast', sent, root + 1)
  const gathered = group.allGatherSync(own(500), new Float32Array(500 * worldSize), { timeoutMs })
  gathered.forEach((value, i) => {
    if (value !== Math.floor(i / 500) + 1) throw new Error('wrong values in allGather')
  })
  expect('reduceScatter', await group.reduceScatter(own(600 * worldSize), new Float32Array(600), { timeoutMs }), sum)
  const received = new Float32Array(2000)
  await Promise.all([
    group.send(own(2000), { to: (rank + 1) % worldSize, timeoutMs }),
    group.recv(received, { from: (rank + worldSize - 1) % worldSize, timeoutMs }),
  ])
  expect('recv', received, ((rank + worldSize - 1) % worldSize) + 1)
  await group.barrier({ timeoutMs })
}

/** @param args.stores by rank: where a second group meets whose lowest rank this one is; victim: who is not in it */
export async function operate(args: {
  timeoutMs: number
  rounds: number
  victim: number
  stores: readonly string[]
}): Promise<NodesSeen> {
  const rank = Number(process.env['RANK'])
  const worldSize = Number(process.env['WORLD_SIZE'])
  let seen: Seen
  let group: Group | undefined
  try {
    group = await createGroup({ timeoutMs: 30_000, frameBytes: 16_384 })
    await group.barrier() // ranks come one after the other
    say('ready')
    for (let i = 0; i < args.rounds; i++) {
      await round(group, i % group.worldSize, args.timeoutMs)
      await turn()
    }
    seen = { failure: { code: 'none' }, atMs: monotonicMs() }
  } catch (error) {
    const atMs = monotonicMs()
    if (!(error instanceof Error)) throw error
    seen = { failure: { ...error, message: error.message, cause: undefined }, atMs }
  }
  say('through')
  await group?.close()
  let again: number | null = null
  const members = Array.from({ length: worldSize }, (_, r) => r).filter((r) => r !== args.victim)
  if (members.includes(rank) && members.length > 1) {
    for (const name of ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_SIZE', 'LOCAL_WORLD_SIZE'])
      Reflect.deleteProperty(process.env, name)
    const store = args.stores[members[0] ?? 0] ?? ''
    const next = await createGroup({ rank: members.indexOf(rank), worldSize: members.length, store, timeoutMs: 20_000 })
    again = (await next.allReduce(Float32Array.of(1)))[0] ?? null
    await next.close()
  }
  return { ...seen, again, mapped: mappings() }
}

const mappings = (): number => readFileSync('/proc/self/maps', 'utf8').split('memfd:tilerank').length - 1
