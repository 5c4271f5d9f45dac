// Groups of the ranks of a group, and groups that take the place of one that broke. The ranks check their results themselves
// (groupCases.ts); here is what they must have seen.

import assert from 'node:assert/strict'
import { isLong, rounds } from '../rounds.js'
import { ranksValues, runRanks, type RankOutcome } from '../ranks.js'
import type { Failed } from './groupCases.js'

const cases = new URL('./groupCases.js', import.meta.url)

function valueOf(outcome: RankOutcome | undefined): unknown {
  assert.ok(outcome !== undefined && 'value' in outcome, JSON.stringify(outcome))
  return outcome.value
}

const codesOf = (failures: Record<string, Failed>): Record<string, string> =>
  Object.fromEntries(Object.entries(failures).map(([name, { code }]) => [name, code]))

describe('groups of a group', function () {
  this.timeout(60_000)

  for (const [rows, columns] of [
    [2, 2],
    [2, 3],
  ] as const) {
    const seeds = rounds({ quick: [1, 2], long: Array.from({ length: 20 }, (_, i) => i) })
    it(`rows, columns and parts of a grid of ${String(rows)} x ${String(columns)} work at the same time, in any mix`, async () => {
      for (const seed of seeds) {
        const args = { rows, columns, rounds: rounds({ quick: 25, long: 100 }), seed }
        const values = await ranksValues(cases, 'grid', { worldSize: rows * columns, args })
        assert.equal(values.length, rows * columns)
      }
    })
  }

  it('may be made of two groups in different orders on different ranks, which have made different numbers of groups before', async () => {
    const args = { rounds: rounds({ quick: 5, long: 100 }) }
    const values = await ranksValues(cases, 'crossing', { worldSize: 4, args })
    assert.deepEqual(values, [args.rounds, args.rounds, args.rounds, args.rounds])
  })

  it('are refused where ranks or arguments make no sense, and the group stays whole', async () => {
    const values = await ranksValues(cases, 'misuse', { worldSize: 3 })
    for (const [rank, failures] of (values as Record<string, Failed>[]).entries()) {
      const { lists, verbs, sizes, busy, closed, 'closed too': closedToo, ...others } = failures
      for (const [name, { code, message }] of Object.entries(others))
        assert.equal(code, 'ERR_INVALID_ARGUMENT', `${name}: ${message}`)
      for (const { code, message } of [lists, verbs, sizes].flatMap((one) => one ?? []))
        assert.equal(code, 'ERR_MISMATCH', message)
      assert.equal(lists?.message, 'ranks disagree: rank 0 called subgroup([0, 1]), rank 1 called subgroup([1, 0])')
      assert.equal(verbs?.message, 'ranks disagree: rank 0 called split, rank 2 called subgroup([0, 1, 2])')
      assert.deepEqual(
        [verbs.facts['mine'], verbs.facts['theirs']],
        rank === 2 ? ['subgroup([0, 1, 2])', 'split'] : ['split', 'subgroup([0, 1, 2])'],
      )
      assert.match(sizes?.message ?? '', /4096.*8192|8192.*4096/)
      assert.deepEqual([busy?.code, closed?.code, closedToo?.code], ['ERR_BUSY', 'ERR_CLOSED', 'ERR_CLOSED'])
    }
  })

  for (const worldSize of [2, 4]) {
    it(`of which a rank is killed name it by their own ranks; the others of ${String(worldSize)} go on without it`, async () => {
      const outcomes = await runRanks(cases, 'lossInPair', {
        worldSize,
        onSay: (rank, _, processes) => setTimeout(() => processes[rank]?.kill('SIGKILL'), 100),
      })
      const victim = worldSize - 1
      const others = Array.from({ length: victim }, (_, i) => i)
      for (const rank of others) {
        const value = valueOf(outcomes[rank]) as {
          ofPair?: Failed
          ofWhole: Failed
          members: number[]
          left: number[]
        }
        if (rank === victim - 1) {
          assert.equal(value.ofPair?.code, 'ERR_PEER_LOST')
          assert.equal(value.ofPair.facts['rank'], 1)
          assert.equal(value.ofPair.facts['pid'], outcomes[victim]?.pid)
          assert.ok(value.ofPair.tookMs < 2500)
          if (worldSize === 4) assert.match(value.ofPair.message, /\(in the job, rank 0 is rank 2, rank 1 is rank 3\)$/)
        }
        assert.equal(value.ofWhole.code, 'ERR_PEER_LOST', value.ofWhole.message)
        assert.equal(value.ofWhole.facts['rank'], victim)
        assert.deepEqual(value.members, others)
        assert.deepEqual(value.left, worldSize === 4 && rank < 2 ? [0, 1] : [victim - 1])
      }
    })
  }
})

describe('a group after a failure', function () {
  this.timeout(60_000)

  it('is made anew again and again, and nothing that a process holds grows', async () => {
    const args = { rounds: rounds({ quick: 50, long: 1000 }) }
    const values = await ranksValues(cases, 'again', { worldSize: 3, args, timeoutMs: 240_000 })
    interface Held {
      readonly descriptors: number
      readonly threads: number
      readonly mappings: number
      readonly residentKb: number
    }
    for (const { codes, before, after } of values as { codes: string[]; before: Held; after: Held }[]) {
      assert.deepEqual(codes, ['ERR_ABORTED', 'ERR_MISMATCH', 'ERR_TIMEOUT'])
      const { residentKb, ...counted } = after
      const { residentKb: residentBefore, ...countedBefore } = before
      assert.deepEqual(counted, countedBefore)
      // A group of these has 3 x 0.3 MB mapped.
      assert.ok(
        residentKb < residentBefore + 20_000,
        `${String(residentBefore)} kB before, ${String(residentKb)} after`,
      )
    }
  }).timeout(isLong ? 300_000 : 60_000)

  it('is made anew by all of its ranks in the same way, or by none', async () => {
    const outcomes = await runRanks(cases, 'discord', { worldSize: 3 })
    const kinds: (string | undefined)[] = []
    for (const rank of [0, 1, 2]) {
      const failures = valueOf(outcomes[rank]) as Record<string, Failed>
      const { 'absent of recreate': recreate, 'absent of shrink': shrink } = failures
      if (rank !== 1) {
        for (const failed of [recreate, shrink]) {
          assert.equal(failed?.code, 'ERR_TIMEOUT', failed?.message)
          assert.deepEqual(failed.facts['lateRanks'], [1])
          assert.ok(failed.tookMs < 2500)
        }
      }
      const codes = codesOf(failures)
      delete codes['absent of recreate']
      delete codes['absent of shrink']
      kinds.push(codes['kinds'])
      delete codes['kinds']
      assert.deepEqual(codes, {
        sizes: 'ERR_MISMATCH',
        option: 'ERR_INVALID_ARGUMENT',
        twice: 'ERR_BUSY',
        old: 'ERR_CLOSED',
        whole: rank === 0 ? 'ERR_TIMEOUT' : 'ERR_ABORTED',
        ...(rank === 0 ? {} : { closed: 'ERR_PEER_LOST' }),
      })
      if (rank !== 0) assert.equal(failures['closed']?.facts['rank'], 0)
    }
    // One of the two that called shrink may have come when the others knew already.
    assert.equal(kinds[2], 'ERR_MISMATCH')
    assert.ok(kinds.slice(0, 2).includes('ERR_MISMATCH'))
    for (const code of kinds) assert.match(code ?? '', /ERR_MISMATCH|ERR_TIMEOUT/)
  })

  for (const kind of ['recreate', 'shrink'] as const) {
    const count = rounds({ quick: 6, long: 100 })
    it(`loses a rank at any moment of ${kind}, ${String(count)} times, and the others stay together`, async function () {
      this.timeout(count * 10_000)
      for (let i = 0; i < count; i++) {
        const victim = i % 4
        const said = new Set<number>()
        const outcomes = await runRanks(cases, 'lossMeanwhile', {
          worldSize: 4,
          args: { kind, victim },
          onSay: (rank, _, processes) => {
            said.add(rank)
            if (said.size === 4) setTimeout(() => processes[victim]?.kill('SIGKILL'), 5 + ((i * 7.3) % 60))
          },
        })
        for (const outcome of outcomes) {
          if (outcome.rank === victim) continue
          const { members } = valueOf(outcome) as { members: number[] }
          assert.deepEqual(
            members,
            [0, 1, 2, 3].filter((rank) => rank !== victim),
          )
        }
      }
    })
  }
})
