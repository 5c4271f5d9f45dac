// send, recv and sendRecv between real processes: in order, whatever else is pending, and with an end for whoever waits in vain.

import assert from 'node:assert/strict'
import { createGroup, type CollectiveFailure, type Group } from '../../collectives/index.js'
import { ranksValues, runRanks, type RankOutcome } from '../ranks.js'

const cases = new URL('./messageCases.js', import.meta.url)

interface Failure extends CollectiveFailure {
  readonly code: string
  readonly message: string
  readonly tookMs: number
}

function failureOf(outcome: RankOutcome | undefined, key = 'failure'): Failure {
  assert.ok(outcome !== undefined && 'value' in outcome, JSON.stringify(outcome))
  const failure = (outcome.value as Record<string, Failure>)[key]
  assert.ok(failure !== undefined, JSON.stringify(outcome))
  return failure
}

describe('messages between two ranks', function () {
  this.timeout(60_000)

  for (const worldSize of [1, 2, 3, 5]) {
    it(`arrive whole, in every form, with ${String(worldSize)} ranks`, async () => {
      const counts = worldSize === 5 ? [0, 7, 3000] : [0, 1, 64, 1023, 1024, 1025, 3000, 10_000]
      const dtypes = ['f32', 'bf16', 'u8', 'i64']
      const values = await ranksValues(cases, 'pairs', { worldSize, args: { counts, dtypes } })
      for (const value of values) assert.equal(value, dtypes.length * counts.length * (2 + 4 * (worldSize - 1)))
    })
  }

  for (const worldSize of [2, 3]) {
    it(`keep their order among collectives, several pending each way, with ${String(worldSize)} ranks`, async () => {
      const values = await ranksValues(cases, 'mixed', { worldSize, args: { count: 60 } })
      for (const value of values) assert.equal(value, 60 * (worldSize - 1))
    })
  }

  it('that are long may cross, in every pairing of calls', async () => {
    assert.deepEqual(await ranksValues(cases, 'crossing', { worldSize: 2, args: { count: 1 << 20 } }), [true, true])
  })

  it('that are short wait for no receiver', async () => {
    const [, values] = await ranksValues(cases, 'eager', { worldSize: 2 })
    assert.deepEqual(values, [0, 7, 0.5, 1, 7, 1.5, 2, 7, 2.5, 42])
  })

  for (const kind of ['count', 'dtype'] as const) {
    it(`whose ${kind} differs are ERR_MISMATCH, with both sides, on all ranks`, async () => {
      const outcomes = await runRanks(cases, 'disagree', { worldSize: 3, args: { kind } })
      for (const outcome of outcomes) {
        const failure = failureOf(outcome)
        assert.equal(failure.code, 'ERR_MISMATCH', failure.message)
        assert.match(failure.message, /rank 1 called message of \d .*rank 0 called message of 4 f32/)
      }
    })
  }

  for (const [how, form] of [
    ['recv', 'sync'],
    ['recv', 'async'],
    ['send', 'sync'],
    ['send', 'async'],
  ] as const) {
    it(`with a killed rank (${how}, ${form}) name it to all who wait, within a second`, async () => {
      const outcomes = await runRanks(cases, 'lost', {
        worldSize: 3,
        args: { how, form },
        onSay: (rank, _, processes) => {
          setTimeout(() => processes[rank]?.kill('SIGKILL'), 200)
        },
      })
      for (const rank of [0, 2]) {
        const failure = failureOf(outcomes[rank])
        assert.equal(failure.code, 'ERR_PEER_LOST', failure.message)
        assert.equal(failure.rank, 1)
        assert.equal(failure.pid, outcomes[1]?.pid)
        assert.ok(failure.tookMs < 1200, `${String(failure.tookMs)} ms`)
        assert.equal(failureOf(outcomes[rank], 'next').code, 'ERR_PEER_LOST')
      }
    })
  }

  for (const how of ['recv', 'send'] as const) {
    for (const isKnown of [true, false]) {
      it(`with a rank that has closed the group (${how}, ${isKnown ? 'known' : 'never met'}) are a loss that names it`, async () => {
        const [outcome] = await runRanks(cases, 'left', { worldSize: 2, args: { how, isKnown } })
        const failure = failureOf(outcome)
        assert.equal(failure.code, 'ERR_PEER_LOST', failure.message)
        assert.equal(failure.rank, 1)
        assert.match(failure.message, /closed the group/)
        assert.ok(failure.tookMs < 2000, `${String(failure.tookMs)} ms`)
      })
    }
  }

  for (const isKnown of [true, false]) {
    it(`that do not come (from a rank ${isKnown ? 'known' : 'never met'}) are ERR_TIMEOUT, which breaks the group`, async () => {
      const outcomes = await runRanks(cases, 'late', { worldSize: 3, args: { isKnown } })
      for (const outcome of outcomes) {
        for (const key of ['failure', 'next']) {
          const failure = failureOf(outcome, key)
          assert.equal(failure.code, 'ERR_TIMEOUT', failure.message)
          assert.deepEqual(failure.lateRanks, [1])
        }
      }
      assert.ok(failureOf(outcomes[0]).tookMs > 300)
    })
  }

  for (const how of ['signal', 'abort'] as const) {
    it(`are given up by ${how} here, and as ERR_ABORTED on all who wait`, async () => {
      const outcomes = await runRanks(cases, 'given', { worldSize: 3, args: { how } })
      assert.equal(
        (outcomes[0]?.value as { isReason: boolean }).isReason,
        how === 'signal',
        JSON.stringify(outcomes[0]),
      )
      for (const rank of how === 'signal' ? [1, 2] : [0, 1, 2]) {
        const failure = failureOf(outcomes[rank])
        assert.equal(failure.code, 'ERR_ABORTED', failure.message)
        assert.match(failure.message, how === 'signal' ? /the user pressed stop/ : /enough/)
        assert.equal(failure.rank, 0)
      }
    })
  }

  it('that are pending keep only ...Sync calls of their own direction from being made', async () => {
    const [zero, one] = await ranksValues(cases, 'pending', { worldSize: 3 })
    assert.deepEqual(zero, ['ERR_BUSY', 'ERR_BUSY', 'nothing thrown', 'nothing thrown', 9])
    assert.deepEqual(one, [3])
  })

  it('that are on their way when close() is called arrive', async () => {
    const values = await ranksValues(cases, 'closing', { worldSize: 2 })
    for (const value of values) assert.deepEqual(value, [0, 0, 'ERR_CLOSED'])
  })

  if (process.env['TILERANK_TEST'] === 'long') {
    it('of more than 2 GiB arrive whole', async () => {
      const options = { worldSize: 2, args: { nbytes: 2 ** 31 + 4097 }, timeoutMs: 120_000 }
      assert.deepEqual(await ranksValues(cases, 'huge', options), [true, true])
    }).timeout(150_000)
  }

  describe('in a group of one', () => {
    let group: Group
    before(async () => (group = await createGroup({ env: {} })))
    after(async () => group.close())

    it('are copies, by sendRecv alone', async () => {
      const data = Float32Array.of(1, 2, 3)
      const output = new Float32Array(3)
      assert.equal(group.sendRecvSync(data, output, { to: 0, from: 0 }), output)
      assert.deepEqual(output, data)
      assert.equal(await group.sendRecv(output, data, { to: 0, from: 0 }), data)
      const itself = { code: 'ERR_INVALID_ARGUMENT', message: /sendRecv, which copies/ }
      assert.throws(() => group.sendSync(data, { to: 0 }), itself)
      await assert.rejects(group.recv(data, { from: 0 }), itself)
    })

    it('are refused where they make no sense', async () => {
      const data = new Float32Array(4)
      const bad = (message: RegExp): object => ({ code: 'ERR_INVALID_ARGUMENT', message })
      assert.throws(
        () => group.sendSync(data, {} as { to: number }),
        bad(/^to is undefined, expected is a rank below 1/),
      )
      assert.throws(() => group.recvSync(data, { from: 1 }), bad(/^from is 1,/))
      await assert.rejects(group.send(data, { to: -1 }), bad(/^to is -1,/))
      assert.throws(() => group.sendSync(data, { to: 0, from: 0 } as { to: number }), bad(/send has no option 'from'/))
      assert.throws(() => group.sendSync(new Uint16Array(4), { to: 0 }), bad(/say \{ dtype/))
      assert.throws(() => group.sendRecvSync(data, data, { to: 0, from: 0 }), bad(/data overlaps output/))
      assert.throws(() => group.sendRecvSync(data, new Float32Array(3), { to: 0, from: 0 }), bad(/output must hold 4/))
      assert.throws(() => group.sendRecvSync(data, new Int32Array(4), { to: 0, from: 0 }), bad(/data holds f32/))
    })
  })
})
