// Groups on several nodes of a lab after a failure: made anew by all of their ranks, or by those that are left. What holds on one node
// (test/collectives/groups.test.ts) holds here, and cables are pulled besides.

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Failed } from '../collectives/groupCases.js'
import { ranksValues, runRanks, type RanksOptions } from '../ranks.js'
import { isLong, rounds } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle, type Lab, type LabNode } from '../../bench/lab.js'

const cases = new URL('./renewalCases.js', import.meta.url)
const groupCases = new URL('../collectives/groupCases.js', import.meta.url)
const storePort = 29_617

/** [nodes][ranks] */
type Shape = readonly (readonly number[])[]
const two: Shape = [
  [0, 2],
  [1, 3],
]
const three: Shape = [[0], [1], [2]]

interface Told {
  readonly code: string
  readonly message: string
}

interface Made {
  readonly members: readonly number[]
  readonly rank: number
  readonly nodes: Shape
  readonly digests: readonly string[]
}

describe('a group on several nodes after a failure', function () {
  this.timeout(60_000)
  let lab: Lab
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-renewal-'))
  const secretFile = join(folder, 'secret')
  writeFileSync(secretFile, randomBytes(32).toString('hex'), { mode: 0o600 })

  before(async function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) return unavailable(this, obstacle)
    lab = await createLab({ nodes: 3 })
  })
  after(async () => {
    rmSync(folder, { recursive: true })
    await (lab as Lab | undefined)?.close()
  })

  const on = (shape: Shape): Pick<RanksOptions, 'worldSize' | 'on' | 'env'> => ({
    worldSize: shape.flat().length,
    on: (rank: number): LabNode => {
      const node = lab.nodes[shape.findIndex((ranks) => ranks.includes(rank))]
      assert.ok(node !== undefined)
      return node
    },
    env: () => ({
      TILERANK_STORE: `${lab.nodes[0]?.address ?? ''}:${storePort}`,
      TILERANK_SECRET_FILE: secretFile,
      TILERANK_JOB: undefined,
    }),
  })

  /** Of those that made one group: the same members, and the same bits. */
  const checkMade = (values: readonly unknown[], members: readonly number[], nodes: number): void => {
    const [first] = values as Made[]
    assert.equal(values.length, members.length)
    for (const [rank, made] of (values as Made[]).entries()) {
      assert.deepEqual(made.members, members)
      assert.equal(made.rank, rank)
      assert.equal(made.nodes.length, nodes)
      assert.equal(new Set(made.digests).size, 3, 'one result for each dtype')
      assert.deepEqual(made.digests, first?.digests)
    }
  }

  for (const shape of [[[0, 2], [1]], ...(isLong ? [three] : [])]) {
    it(`is made anew again and again on ${JSON.stringify(shape)}, whatever broke it, and nothing that a process holds grows`, async () => {
      const args = { rounds: rounds({ quick: 15, long: 200 }), lateMs: 250 }
      const values = await ranksValues(groupCases, 'again', { ...on(shape), args, timeoutMs: 240_000 })
      interface Held {
        readonly descriptors: number
        readonly threads: number
        readonly mappings: number
      }
      for (const { codes, before, after } of values as { codes: string[]; before: Held; after: Held }[]) {
        assert.deepEqual(codes, ['ERR_ABORTED', 'ERR_MISMATCH', 'ERR_TIMEOUT'])
        // Sockets of the store may go meanwhile.
        assert.ok(after.descriptors <= before.descriptors, `${before.descriptors} before, ${after.descriptors} after`)
        assert.deepEqual([after.threads, after.mappings], [before.threads, before.mappings])
      }
    }).timeout(isLong ? 300_000 : 60_000)
  }

  it('is made anew by all of its ranks in the same way, or by none', async () => {
    const outcomes = await runRanks(groupCases, 'discord', on([[0, 1], [2]]))
    for (const { rank, value, ...rest } of outcomes) {
      assert.ok(value !== undefined, JSON.stringify(rest))
      const failures = value as Record<string, Failed>
      for (const name of ['absent of recreate', 'absent of shrink']) {
        if (rank === 1) continue
        assert.equal(failures[name]?.code, 'ERR_TIMEOUT')
        assert.deepEqual(failures[name].facts['lateRanks'], [1])
        assert.ok(failures[name].tookMs < 2500)
      }
      assert.equal(failures['kinds']?.code, 'ERR_MISMATCH')
      assert.equal(failures['sizes']?.code, 'ERR_MISMATCH')
      assert.equal(failures['whole']?.code, rank === 0 ? 'ERR_TIMEOUT' : 'ERR_ABORTED')
      if (rank !== 0) {
        assert.equal(failures['closed']?.code, 'ERR_PEER_LOST')
        assert.equal(failures['closed'].facts['rank'], 0)
      }
    }
  })

  for (const { shape, victims, left, nodes } of [
    { shape: two, victims: [1, 3], left: [0, 2], nodes: 1 }, // a whole node
    { shape: two, victims: [3, 0], left: [1, 2], nodes: 2 }, // one after the other; rank 0 is the store's home
    { shape: three, victims: [0], left: [1, 2], nodes: 2 },
    ...(isLong
      ? [
          { shape: two, victims: [3], left: [0, 1, 2], nodes: 2 },
          { shape: two, victims: [0], left: [1, 2, 3], nodes: 2 },
        ]
      : []),
  ]) {
    it(`of ${JSON.stringify(shape)} goes on without the ranks ${victims.join(', ')}, which are killed`, async () => {
      const said = new Set<number>()
      const outcomes = await runRanks(cases, 'goOn', {
        ...on(shape),
        args: { victims },
        onSay: (rank, _, processes) => {
          said.add(rank)
          if (said.size < processes.length) return
          // A later one may end at any moment of the others' shrink.
          for (const [turn, victim] of victims.entries())
            setTimeout(() => processes[victim]?.kill('SIGKILL'), 20 + turn * (5 + 40 * Math.random()))
        },
      })
      const living = outcomes.filter(({ rank }) => !victims.includes(rank))
      for (const outcome of living) assert.ok(outcome.value !== undefined, JSON.stringify(outcome))
      checkMade(
        living.map(({ value }) => value),
        left,
        nodes,
      )
    })
  }

  for (const kind of ['recreate', 'shrink'] as const) {
    const count = rounds({ quick: 1, long: 60 })
    it(`loses a rank at any moment of ${kind}, ${String(count)} times, and the others stay together`, async function () {
      this.timeout(Math.max(30_000, count * 10_000))
      for (let i = 0; i < count; i++) {
        const victim = i % 4
        const said = new Set<number>()
        const outcomes = await runRanks(groupCases, 'lossMeanwhile', {
          ...on(two),
          args: { kind, victim },
          onSay: (rank, _, processes) => {
            said.add(rank)
            if (said.size === 4) setTimeout(() => processes[victim]?.kill('SIGKILL'), 5 + ((i * 7.3) % 60))
          },
        })
        for (const outcome of outcomes) {
          if (outcome.rank === victim) continue
          const value = outcome.value as { members: number[] } | undefined
          assert.deepEqual(
            value?.members,
            [0, 1, 2, 3].filter((rank) => rank !== victim),
            JSON.stringify(outcome),
          )
        }
      }
    })
  }

  it('does not go on without a rank that is stopped, and is made anew when that one goes on', async () => {
    const victim = 3
    const said = new Set<number>()
    const values = await ranksValues(cases, 'stopped', {
      ...on(two),
      args: { victim },
      onSay: (rank, _, processes) => {
        said.add(rank)
        if (said.size === 3) processes[victim]?.kill('SIGCONT')
      },
    })
    for (const [rank, value] of values.entries()) {
      const { broken, shrunk } = value as { broken: string; shrunk?: Failed }
      assert.equal(broken, 'ERR_TIMEOUT')
      if (rank === victim) continue
      assert.equal(shrunk?.code, 'ERR_TIMEOUT', shrunk?.message)
      assert.deepEqual(shrunk.facts['lateRanks'], [victim])
      assert.ok(shrunk.tookMs < 2000)
    }
    checkMade(values, [0, 1, 2, 3], 2)
  })

  it('whose node with the lowest rank is lost does not go on with half of its ranks', async () => {
    const said = new Set<number>()
    const outcomes = await runRanks(cases, 'part', {
      ...on(two),
      args: { isCut: false },
      onSay: (rank, _, processes) => {
        said.add(rank)
        if (said.size === 4) for (const victim of [0, 2]) processes[victim]?.kill('SIGKILL')
      },
    })
    const messages: string[] = []
    for (const outcome of [outcomes[1], outcomes[3]]) {
      const { broken, shrunk } = outcome?.value as { broken: Told; shrunk: Told }
      assert.equal(broken.code, 'ERR_PEER_LOST', broken.message)
      assert.equal(shrunk.code, 'ERR_PEER_LOST', shrunk.message)
      messages.push(shrunk.message)
    }
    // One finds it out, the other too, or from that one.
    assert.match(messages.join('\n'), /rank 0.* cannot be reached, and may live: .* 2 of 4 ranks/)
  })

  for (const { shape, cut, winners, nodes } of [
    { shape: two, cut: 1, winners: [0, 2], nodes: 1 },
    ...(isLong ? [{ shape: three, cut: 0, winners: [1, 2], nodes: 2 }] : []),
  ]) {
    it(`whose node ${String(cut)} of ${JSON.stringify(shape)} loses its cable goes on as one group, never as two`, async () => {
      const said = new Map<unknown, number>()
      const values = (await ranksValues(cases, 'part', {
        ...on(shape),
        args: { isCut: true },
        timeoutMs: 60_000,
        onSay: (_, what, processes) => {
          said.set(what, (said.get(what) ?? 0) + 1)
          if (said.get(what) !== processes.length) return
          if (what === 'ready') void lab.linkDown(cut)
          else void lab.linkUp(cut).then(() => processes.forEach((process) => process?.send('up')))
        },
      })) as { broken: Told; recreated: Told; shrunk: Partial<Told>; again: Partial<Told> }[]
      for (const value of values) {
        assert.equal(value.broken.code, 'ERR_PEER_LOST', value.broken.message)
        assert.equal(value.recreated.code, 'ERR_PEER_LOST', value.recreated.message)
      }
      checkMade(
        winners.map((rank) => values[rank]?.shrunk),
        winners,
        nodes,
      )
      checkMade(
        winners.map((rank) => values[rank]?.again),
        winners,
        nodes,
      )
      for (const [rank, { shrunk, again }] of values.entries()) {
        if (winners.includes(rank)) continue
        assert.deepEqual([shrunk.code, again.code], ['ERR_PEER_LOST', 'ERR_PEER_LOST'], JSON.stringify([shrunk, again]))
      }
    })
  }
})
