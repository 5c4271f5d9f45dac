// Groups on several nodes of a lab: results against closed forms, the same bits everywhere, and each way in which a group can break.

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { readTuned, tunedFor, tunedPath, writeTuned } from '../../collectives/index.js'
import type { Held } from '../collectives/groupCases.js'
import { ranksValues, runRanks, type RankOutcome } from '../ranks.js'
import { isLong, rounds } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle, type Lab, type LabNode } from '../../bench/lab.js'

const cases = new URL('./networkCases.js', import.meta.url)
const storePort = 29_611

interface Failure {
  readonly code: string
  readonly message: string
  readonly rank?: number
  readonly host?: string
  readonly lateRanks?: readonly number[]
  readonly variables?: readonly string[]
  readonly tookMs: number
}

const failureOf = (outcome: RankOutcome | undefined): Failure => {
  const value = outcome?.value as { failure: Failure | null } | undefined
  assert.ok(value?.failure, JSON.stringify(outcome))
  return value.failure
}

describe('groups on several nodes', function () {
  this.timeout(60_000)
  let lab: Lab
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-net-'))
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

  /** [nodes][ranks] */
  type Shape = readonly (readonly number[])[]
  const place = (shape: Shape) => ({
    worldSize: shape.flat().length,
    on: (rank: number): LabNode => {
      const node = lab.nodes[shape.findIndex((ranks) => ranks.includes(rank))]
      assert.ok(node !== undefined)
      return node
    },
  })
  const store = (): string => `${lab.nodes[0]?.address ?? ''}:${storePort}`
  const env = (extra: Readonly<Record<string, string | undefined>> = {}) => ({
    TILERANK_STORE: store(),
    TILERANK_SECRET_FILE: secretFile,
    TILERANK_JOB: undefined,
    ...extra,
  })

  const shapes: readonly Shape[] = [
    [[0], [1]],
    [
      [0, 2],
      [1, 3],
    ],
    [[0, 1], [2], [3]],
    ...(isLong
      ? [
          [[0], [1], [2]],
          [[0, 3, 4], [1], [2, 5]],
          [
            [0, 1, 2],
            [3, 4, 5],
          ],
        ]
      : []),
  ]
  for (const shape of shapes) {
    it(`every operation is right on ${JSON.stringify(shape)}`, async () => {
      const counts = isLong ? [0, 1, 3, 64, 1000, 5000, 70_001] : [0, 3, 1000, 9001]
      const args = { counts, slotBytes: 65_536 }
      const values = await ranksValues(cases, 'everyOperation', { ...place(shape), args, env: () => env() })
      for (const value of values) assert.deepEqual(value, { nodes: shape.length })
    })

    it(`every algorithm gives the same bits on ${JSON.stringify(shape)}`, async () => {
      const args = { count: 10_007 }
      const values = (await ranksValues(cases, 'sameBits', { ...place(shape), args, env: () => env() })) as {
        digests: string[]
      }[]
      const [first] = values
      assert.equal(new Set(first?.digests).size, 3, 'one result for each dtype')
      for (const value of values) assert.deepEqual(value.digests, first?.digests)
    })
  }

  for (const shape of [
    [
      [0, 2],
      [1, 3],
    ],
    [[0, 1], [2], [3]],
  ]) {
    it(`groups of a group on ${JSON.stringify(shape)} are on as many nodes as their ranks, and outlive it`, async () => {
      const url = new URL('../collectives/groupCases.js', import.meta.url)
      for (const seed of [1, 2]) {
        const args = { rows: 2, columns: 2, rounds: 10, seed }
        await ranksValues(url, 'grid', { ...place(shape), env: () => env(), args })
      }
    })
  }

  for (const shape of [
    [[0], [1]],
    [[0, 2], [1]],
  ]) {
    it(`is made and closed again and again on ${JSON.stringify(shape)}, and nothing that a process holds grows`, async () => {
      const args = { rounds: rounds({ quick: 10, long: 200 }) }
      const outcomes = await runRanks(cases, 'oneAfterTheOther', {
        ...place(shape),
        args,
        env: () => env(),
        timeoutMs: 240_000,
      })
      for (const { rank, value, ...rest } of outcomes) {
        assert.ok(value !== undefined, `rank ${rank}: ${JSON.stringify(rest)}`)
        const { before, after } = value as { before: Held; after: Held }
        // A socket of the store may go meanwhile.
        assert.ok(after.descriptors <= before.descriptors, `${before.descriptors} before, ${after.descriptors} after`)
        assert.deepEqual([after.threads, after.mappings], [before.threads, before.mappings])
      }
    }).timeout(isLong ? 300_000 : 60_000)
  }

  it('works unencrypted when that is said by name, and with explicit options', async () => {
    const shape = [[0], [1]]
    const options = (rank: number): object => ({ rank, worldSize: 2, store: store(), encryption: 'none' })
    const none = {
      RANK: undefined,
      WORLD_SIZE: undefined,
      LOCAL_RANK: undefined,
      LOCAL_SIZE: undefined,
      LOCAL_WORLD_SIZE: undefined,
    }
    const outcomes = await runRanks(cases, 'join', {
      ...place(shape),
      args: { timeoutMs: 10_000, options: { 0: options(0), 1: options(1) } },
      env: (rank) => ({ ...env(), ...none, RANK: String(rank), WORLD_SIZE: '2', TILERANK_SECRET_FILE: undefined }),
    })
    for (const outcome of outcomes) assert.deepEqual(outcome.value, { failure: null, nodes: { layout: shape, sum: 1 } })
  })

  it('finds out that ranks with different settings are not of one mind', async () => {
    const outcomes = await runRanks(cases, 'join', {
      ...place([[0], [1]]),
      args: { timeoutMs: 8000, options: { 1: { slotBytes: 128 } } },
      env: () => env(),
    })
    for (const outcome of outcomes) {
      const failure = failureOf(outcome)
      assert.equal(failure.code, 'ERR_MISMATCH')
      assert.match(failure.message, /slots of 128/)
    }
  })

  it('chooses as rank 0 has measured, and as all were told alike', async () => {
    const shape = [
      [0, 2],
      [1, 3],
    ]
    const caches = [0, 1, 2, 3].map((rank) => join(folder, `cache${rank}`))
    const key = tunedFor(4)
    for (const [rank, algorithm] of [
      [0, 'twoStep'],
      [1, 'leader'],
    ] as const) {
      const path = tunedPath(key, { XDG_CACHE_HOME: caches[rank] }) ?? assert.fail()
      const rule = { operation: 'allReduce', nodes: [2, 2], bytes: [0, 4096], algorithm, why: 'measured' } as const
      const elsewhere = { operation: 'allReduce', nodes: [1, 1], algorithm: 'twoShot' } as const
      writeTuned(path, { ...key, measured: 'today', rules: [rule, elsewhere] })
    }
    const run = async (algorithms: string[], variable: (rank: number) => string | undefined): Promise<RankOutcome[]> =>
      runRanks(cases, 'chooses', {
        ...place(shape),
        args: { bytes: [4096, 8192, 12_288], algorithms },
        env: (rank) => ({ ...env(), XDG_CACHE_HOME: caches[rank], TILERANK_ALGORITHM: variable(rank) }),
      })
    type Chosen = { explained: { algorithm: string; source: string; why: string }[]; code: string }
    for (const { value } of await run([], () => undefined)) {
      const { explained, code } = value as Chosen
      assert.equal(code, 'ok')
      assert.deepEqual(
        explained.map(({ algorithm, source }) => `${algorithm} ${source}`),
        ['twoStep tuned', 'leader default', 'splitRail default'],
      )
      assert.equal(explained[0]?.why, 'measured')
    }
    for (const { value } of await run([], () => 'default'))
      assert.equal((value as Chosen).explained[0]?.source, 'default')
    // Of a call only the ranks of other nodes can tell.
    for (const { value } of await run(['leader', 'twoStep', 'leader', 'twoStep'], () => undefined))
      assert.equal((value as Chosen).code, 'ERR_MISMATCH')
    const told = await runRanks(cases, 'chooses', {
      ...place([[0], [1]]),
      args: { bytes: [], algorithms: [] },
      env: (rank) => env(rank === 1 ? { TILERANK_ALGORITHM: 'allReduce=leader' } : {}),
    })
    for (const { error } of told) {
      assert.equal(error?.['code'], 'ERR_MISMATCH', JSON.stringify(told))
      assert.match(String(error['message']), /rules .*"leader"/)
    }
  })

  it('is measured by tilerank tune collectives as the ranks of a job, which all keep the result', async () => {
    const shape = [
      [0, 2],
      [1, 3],
    ]
    const main = fileURLToPath(new URL('../../cli/main.js', import.meta.url))
    const caches = [0, 1].map((node) => join(folder, `tuned${node}`))
    const other = { operation: 'allReduce', nodes: [3, 3], algorithm: 'leader' } as const
    const key = tunedFor(4)
    const paths = caches.map((cache) => tunedPath(key, { XDG_CACHE_HOME: cache }) ?? assert.fail())
    writeTuned(paths[0] ?? '', { ...key, measured: 'today', rules: [other] })
    const ends = await Promise.all(
      [0, 1, 2, 3].map(async (rank) => {
        const node = shape.findIndex((ranks) => ranks.includes(rank))
        const child = place(shape)
          .on(rank)
          .run(process.execPath, [main, 'tune', 'collectives', '--bytes', '65536', '--trials', '1'], {
            env: {
              PATH: process.env['PATH'],
              ...env(),
              RANK: `${rank}`,
              WORLD_SIZE: '4',
              XDG_CACHE_HOME: caches[node],
            },
            stdio: ['ignore', 'pipe', 'pipe'],
          })
        let [stdout, stderr] = ['', '']
        child.stdout?.on('data', (text: Buffer) => (stdout += text.toString()))
        child.stderr?.on('data', (text: Buffer) => (stderr += text.toString()))
        const [code] = (await once(child, 'close')) as [number | null]
        return { code, stdout, stderr }
      }),
    )
    for (const [rank, { code, stdout, stderr }] of ends.entries()) {
      assert.equal(code, 0, stderr)
      if (rank > 0) assert.equal(stdout, '')
    }
    for (const name of ['leader', 'splitRail', 'byWidth', 'twoStep'])
      assert.match(ends[0]?.stdout ?? '', new RegExp(`any +65536 +${name} +\\d+\\.\\d\\d`))
    const [first, second] = paths.map((path) => readTuned(path, key))
    assert.ok(first !== undefined && second !== undefined)
    assert.equal(first.measured, second.measured)
    // What was measured on other numbers of nodes stays.
    assert.deepEqual(first.rules, [...second.rules, other])
    for (const { nodes, ranks } of second.rules)
      assert.deepEqual(
        [nodes, ranks],
        [
          [2, 2],
          [4, 4],
        ],
      )
  })

  it('names the rank that never comes', async () => {
    const outcomes = await runRanks(cases, 'join', {
      ...place([[0], [1], [2]]),
      absent: [1],
      args: { timeoutMs: 2500 },
      env: () => env(),
    })
    for (const outcome of outcomes) {
      const failure = failureOf(outcome)
      assert.equal(failure.code, 'ERR_TIMEOUT')
      assert.deepEqual(failure.lateRanks, [1])
      assert.ok(failure.tookMs < 6000)
    }
  })

  it('refuses a rank with another secret, and goes on without it only to its deadline', async () => {
    const other = join(folder, 'other')
    writeFileSync(other, randomBytes(32).toString('hex'), { mode: 0o600 })
    const outcomes = await runRanks(cases, 'join', {
      ...place([[0], [1]]),
      args: { timeoutMs: 2500 },
      env: (rank) => env(rank === 1 ? { TILERANK_SECRET_FILE: other } : {}),
    })
    assert.deepEqual(failureOf(outcomes[0]).lateRanks, [1])
    assert.match(failureOf(outcomes[1]).code, /^ERR_(MISMATCH|TIMEOUT)$/)
    assert.match(failureOf(outcomes[1]).message, /secret/)
  })

  it('takes no secret that others may read, and needs one', async () => {
    const open = join(folder, 'open')
    writeFileSync(open, randomBytes(32).toString('hex'))
    chmodSync(open, 0o644)
    for (const [file, words] of [[open, /chmod 600/] as const, [undefined, /openssl rand/] as const]) {
      const outcomes = await runRanks(cases, 'join', {
        ...place([[0], [1]]),
        absent: [1],
        args: { timeoutMs: 2000 },
        env: () => env({ TILERANK_SECRET_FILE: file }),
      })
      assert.equal(failureOf(outcomes[0]).code, 'ERR_ENVIRONMENT')
      assert.match(failureOf(outcomes[0]).message, words)
    }
  })

  it('tells two processes that claim to be one rank', async () => {
    const outcomes = await runRanks(cases, 'join', {
      ...place([[0], [1], [2]]),
      args: { timeoutMs: 3000 },
      env: (rank) => env(rank === 2 ? { RANK: '1' } : {}),
    })
    const codes = outcomes.map((outcome) => failureOf(outcome).code)
    assert.ok(codes.includes('ERR_MISMATCH'), codes.join())
    assert.ok(outcomes.some((outcome) => failureOf(outcome).message.includes('claim to be rank 1')))
  })

  const two: Shape = [
    [0, 2],
    [1, 3],
  ]
  for (const { how, code, rank = 1 } of [
    { how: 'SIGKILL', code: 'ERR_PEER_LOST' },
    { how: 'exit', code: 'ERR_PEER_LOST' },
    { how: 'close', code: 'ERR_PEER_LOST' },
    { how: 'abort', code: 'ERR_ABORTED' },
    { how: 'SIGSTOP', code: 'ERR_TIMEOUT', rank: null },
    { how: 'op', code: 'ERR_MISMATCH', rank: null },
    { how: 'count', code: 'ERR_MISMATCH', rank: null },
    { how: 'operation', code: 'ERR_MISMATCH', rank: null },
  ]) {
    it(`a rank in trouble (${how}) is ${code} on all others, with its name`, async () => {
      const timeoutMs = 2500
      const outcomes = await runRanks(cases, 'breaks', {
        ...place(two),
        args: { victim: 1, how, timeoutMs },
        env: () => env(),
        timeoutMs: 20_000,
        onSay: (_, __, processes) => {
          // One that was stopped is let go when the others are long through.
          if (how === 'SIGSTOP') setTimeout(() => processes[1]?.kill('SIGKILL'), timeoutMs + 3000)
        },
      })
      for (const outcome of outcomes) {
        if (outcome.rank === 1 && code !== 'ERR_MISMATCH' && code !== 'ERR_ABORTED') continue
        const failure = failureOf(outcome)
        assert.equal(failure.code, code, JSON.stringify(failure))
        if (rank !== null) assert.equal(failure.rank, rank, JSON.stringify(failure))
        if (how === 'SIGSTOP') assert.deepEqual(failure.lateRanks, [1], JSON.stringify(failure))
        assert.ok(failure.tookMs < timeoutMs + 1500, JSON.stringify(failure))
      }
    })
  }

  it('a main thread that is busy for seconds is no lost rank', async () => {
    const outcomes = await runRanks(cases, 'breaks', {
      ...place([[0], [1]]),
      args: { victim: 1, how: 'busy', timeoutMs: 30_000 },
      env: () => env(),
    })
    for (const outcome of outcomes) assert.deepEqual(outcome.value, { failure: null })
  })

  it('a node whose cable is pulled is a loss within seconds', async () => {
    const outcomes = await runRanks(cases, 'breaks', {
      ...place([[0], [1]]),
      args: { victim: 1, how: 'busy', timeoutMs: 30_000 },
      env: () => env(),
      onSay: () => void lab.linkDown(1),
    })
    await lab.linkUp(1)
    for (const outcome of outcomes) {
      assert.equal(failureOf(outcome).code, 'ERR_PEER_LOST')
      assert.ok(failureOf(outcome).tookMs < 9000)
    }
  })
})
