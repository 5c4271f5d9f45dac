// What ranks of groups on several nodes do after a failure, in renewal.test.ts, see test/ranks.ts.

import { CollectiveError, createGroup, type Group } from '../../collectives/index.js'
import { failureOf } from '../collectives/groupCases.js'
import { digestsOf } from './networkCases.js'

const say = (value: unknown): void => {
  process.send?.({ kind: 'say', value })
}

/** Resolves with the first message of the test. */
const told = async (): Promise<void> =>
  new Promise((resolve) => {
    // The channel keeps a process alive while somebody listens.
    process.once('message', () => resolve())
  })

const described = async (group: Group): Promise<object> => ({
  members: group.members,
  rank: group.rank,
  nodes: group.nodes,
  digests: await digestsOf(group, 3001),
})

/** Barriers until one fails, as a rank of it is killed or a cable pulled; then shrink until a group without the lost ranks works. */
export async function goOn(args: { victims: number[] }): Promise<object> {
  let group = await createGroup({ timeoutMs: 20_000, frameBytes: 8192 })
  await digestsOf(group, 1000)
  say('ready')
  while (args.victims.some((victim) => group.members.includes(victim))) {
    try {
      for (;;) await group.barrier()
    } catch (error) {
      if (!(error instanceof CollectiveError) || error.code !== 'ERR_PEER_LOST') throw error
    }
    group = await group.shrink()
  }
  const result = await described(group)
  await group.close()
  return result
}

/** As goOn, where some of those that are left must not go on. Each tries again when the test says that the cable is back. */
export async function part(args: { isCut: boolean }): Promise<object> {
  const group = await createGroup({ timeoutMs: 20_000 })
  await group.barrier()
  say('ready')
  const broken = await failureOf(async () => {
    for (;;) await group.barrier()
  })
  let made: Group | undefined
  const tryTo = async (verb: 'recreate' | 'shrink'): Promise<unknown> => {
    try {
      made = await group[verb]()
      return await described(made)
    } catch (error) {
      if (error instanceof CollectiveError) return { code: error.code, message: error.message }
      throw error
    }
  }
  const recreated = args.isCut ? await tryTo('recreate') : undefined
  const shrunk = await tryTo('shrink')
  let again: unknown
  if (args.isCut) {
    const back = told()
    say('tried')
    await back
    again = made === undefined ? await tryTo('shrink') : await described(made)
  }
  await (made ?? group).close()
  return { broken: { code: broken.code, message: broken.message }, recreated, shrunk, again }
}

/** The victim is stopped in the middle, and let go on by the test when the others have tried to shrink. */
export async function stopped(args: { victim: number }): Promise<object> {
  const group = await createGroup({ timeoutMs: 10_000 })
  await group.barrier()
  const isVictim = group.rank === args.victim
  if (isVictim) process.kill(process.pid, 'SIGSTOP')
  const broken = await failureOf(async () => {
    await group.barrier({ timeoutMs: 500 })
    await group.barrier({ timeoutMs: 500 })
  })
  const shrunk = isVictim ? undefined : await failureOf(() => group.shrink({ timeoutMs: 500 }))
  say('tried')
  const next = await group.recreate()
  const result = { broken: broken.code, shrunk, ...(await described(next)) }
  await next.close()
  return result
}
