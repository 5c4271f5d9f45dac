// The collectives on real processes: every result against a closed form, all ranks bit by bit against each other, and each way in
// which a group can break.

import assert from 'node:assert/strict'
import { closeSync, readFileSync, readdirSync } from 'node:fs'
import { connect } from 'node:net'
import { hostname } from 'node:os'
import type { Recording } from '../../collectives/index.js'
import { nativeAddon } from '../../native/index.js'
import { newNonce, ranksValues, runRanks, type RankOutcome } from '../ranks.js'

const cases = new URL('./cases.js', import.meta.url)

interface Failure {
  readonly code: string
  readonly message: string
  readonly rank?: number
  readonly peer?: number
  readonly pid?: number
  readonly signal?: string
  readonly operation?: string
  readonly host?: string
  readonly sequence?: number
  readonly recorder?: Recording
  readonly lateRanks?: readonly number[]
  readonly mine?: string
  readonly theirs?: string
  readonly tookMs: number
}

function failureOf(outcome: RankOutcome | undefined, key = 'failure'): Failure {
  assert.ok(outcome !== undefined && 'value' in outcome, JSON.stringify(outcome))
  const failure = (outcome.value as Record<string, Failure>)[key]
  assert.ok(failure !== undefined, JSON.stringify(outcome))
  return failure
}

function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${String(pid)}/status`, 'utf8'))
  } catch {
    return false
  }
}

describe('collectives between processes', function () {
  this.timeout(60_000)
  const shmBefore = readdirSync('/dev/shm').sort()

  for (const worldSize of [1, 2, 3, 4, 5, 7]) {
    it(`allReduce of ${String(worldSize)} ranks gives the rank-ordered sum, with the same bits everywhere`, async () => {
      const counts = worldSize <= 4 ? [0, 1, 3, 16, 33, 127, 1023, 1024, 1025, 2049, 5000] : [0, 1, 6, 65, 1025, 2500]
      const values = await ranksValues(cases, 'matrix', {
        worldSize,
        args: { slotBytes: 8192, chunkBytes: 4096, counts },
      })
      const [first, ...rest] = values as { digests: string[] }[]
      assert.equal(first?.digests.length, 2 * counts.length * (4 + 3) * 2)
      for (const other of rest) assert.deepEqual(other.digests, first.digests)
    })
  }

  for (const worldSize of [2, 3]) {
    it(`the algorithm that is chosen changes no bit at the thresholds, with ${String(worldSize)} ranks`, async () => {
      const limits = [16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20]
      const values = (await ranksValues(cases, 'thresholds', { worldSize, args: { limits } })) as {
        digests: string[]
      }[]
      assert.equal(values[0]?.digests.length, limits.length * 3)
      for (const other of values) assert.deepEqual(other.digests, values[0].digests)
    })
  }

  for (const worldSize of [1, 2, 3, 5]) {
    it(`every reduction of every dtype is what it should be, bit by bit, with ${String(worldSize)} ranks`, async () => {
      const counts = worldSize === 5 ? [1, 261] : [0, 1, 7, 256, 261, 1500]
      const values = (await ranksValues(cases, 'reductions', { worldSize, args: { counts } })) as {
        digests: string[]
      }[]
      assert.equal(values[0]?.digests.length, (4 * 5 + 6 * 8) * counts.length * 2)
      for (const other of values) assert.deepEqual(other.digests, values[0].digests)
    })
  }

  for (const worldSize of [1, 2, 3, 5]) {
    it(`gather, scatter, reduce, reduceScatter and allToAll move every part to its place, with ${String(worldSize)} ranks`, async () => {
      const counts = [0, 1, 7, 64, 333, 1500]
      for (const chunkBytes of [4096, 384]) {
        const values = await ranksValues(cases, 'parts', { worldSize, args: { counts, chunkBytes } })
        for (const value of values)
          assert.equal((value as { checked: number }).checked, 4 * counts.length * 2 * 2 * (6 + 2))
      }
    })
  }

  for (const worldSize of [1, 2, 3, 5]) {
    it(`allReduce into an output leaves its data, with the same bits everywhere, with ${String(worldSize)} ranks`, async () => {
      const counts = worldSize === 5 ? [7, 1500] : [0, 1, 33, 600, 1500]
      const values = (await ranksValues(cases, 'apart', { worldSize, args: { counts } })) as { digests: string[] }[]
      assert.equal(values[0]?.digests.length, 3 * counts.length * (4 * 3 + 1) * 2)
      for (const other of values) assert.deepEqual(other.digests, values[0].digests)
    })
  }

  for (const worldSize of [2, 3]) {
    it(`ranks with tensors and ranks with typed arrays meet in one call, with ${String(worldSize)} ranks`, async () => {
      const counts = [16, 1023, 1024, 1025, 65535, 65536, 90001]
      for (const chunkBytes of [1 << 20, 65536]) {
        const values = await ranksValues(cases, 'fromTensors', { worldSize, args: { counts, chunkBytes } })
        for (const value of values) assert.ok((value as { checked: number }).checked > 100)
      }
    })
  }

  for (const worldSize of [1, 2, 4]) {
    it(`objects come whole and in order among other calls, with ${String(worldSize)} ranks`, async () => {
      const values = await ranksValues(cases, 'objects', { worldSize })
      for (const value of values) assert.equal(value, 'ERR_BUSY')
    })
  }

  it('NaN, infinity, denormals and overflow stay where they belong', async () => {
    const values = (await ranksValues(cases, 'specials', { worldSize: 2 })) as { values: string[]; bits: number[] }[]
    for (const { values: sums, bits } of values) {
      assert.deepEqual(sums, ['2', 'NaN', 'Infinity', String(2 ** -148), 'Infinity'])
      assert.deepEqual(bits, [0x7f80, 2, 0x7fc0, 0x4000])
    }
  })

  for (const worldSize of [1, 2, 3, 5]) {
    it(`allGather, broadcast and barrier work among ${String(worldSize)} ranks, in chunks and mixed`, async () => {
      const counts = [0, 1, 63, 64, 65, 500]
      const values = (await ranksValues(cases, 'others', { worldSize, args: { counts } })) as { digests: string[] }[]
      assert.equal(values[0]?.digests.length, 2 * counts.length)
      for (const other of values) assert.deepEqual(other.digests, values[0].digests)
    })
  }

  it('thousands of random operations back to back leave all ranks with the same bits', async () => {
    for (const [worldSize, count, pauses] of [
      [2, 5000, false],
      [3, 600, true],
    ] as const) {
      const values = (await ranksValues(cases, 'marathon', { worldSize, args: { count, seed: 5, pauses } })) as {
        digest: string
      }[]
      for (const { digest } of values) assert.equal(digest, values[0]?.digest)
    }
  })

  it('ranks that outnumber the cores sleep instead of spinning, and get through', async () => {
    const worldSize = 6
    const values = (await ranksValues(cases, 'crowd', { worldSize, args: { count: 300 } })) as {
      spinUs: number
      sum: number
    }[]
    const cores = readFileSync('/proc/self/status', 'utf8').match(/^Cpus_allowed:\s+(\S+)$/m)?.[1] ?? ''
    const allowed = [...cores.replaceAll(',', '')].reduce(
      (sum, digit) => sum + parseInt(digit, 16).toString(2).replaceAll('0', '').length,
      0,
    )
    for (const { spinUs, sum } of values) {
      assert.equal(sum, worldSize)
      assert.equal(spinUs, allowed < worldSize ? 0 : 100)
    }
  })

  it('asynchronous operations keep their order, several may be pending, and a Sync call is refused meanwhile', async () => {
    const values = (await ranksValues(cases, 'pending', { worldSize: 2 })) as {
      order: number[]
      code: string
      values: number[]
    }[]
    for (const value of values) {
      assert.deepEqual(value.order, [0, 1, 2, 3])
      assert.deepEqual(value.values, [2, 4, 6, 8])
    }
    assert.equal(values[0]?.code, 'ERR_BUSY')
  })

  it('two groups of the same ranks do not disturb each other, and a third may follow', async () => {
    const values = (await ranksValues(cases, 'twoGroups', { worldSize: 2 })) as { values: number[] }[]
    const expected = Array.from({ length: 50 }, (_, turn) => [turn * 2, turn * 4]).flat()
    for (const value of values) assert.deepEqual(value.values, [...expected, 10])
  })

  it('close() detaches the tensors and later calls reject', async () => {
    const values = (await ranksValues(cases, 'closing', { worldSize: 2 })) as Record<string, unknown>[]
    for (const value of values) {
      assert.equal(value['lengthAfter'], 0)
      assert.equal(value['sharedIsGone'], true)
      assert.deepEqual(value['codes'], ['ERR_CLOSED', 'ERR_CLOSED', 'ERR_CLOSED', 'ERR_INVALID_ARGUMENT'])
    }
  })

  it('a rank that closes in order is no loss', async () => {
    const values = (await ranksValues(cases, 'orderlyEnd', { worldSize: 3 })) as { sum: number }[]
    assert.deepEqual(values, [{ sum: 3 }, { sum: 3 }, { sum: 3 }])
  })

  for (const form of ['sync', 'async'] as const) {
    it(`a killed rank is named by all others within a second (${form})`, async () => {
      let killedAt = 0
      const outcomes = await runRanks(cases, 'waitForVictim', {
        worldSize: 3,
        args: { victim: 1, form, timeoutMs: 20_000 },
        onSay: (rank, _, processes) => {
          setTimeout(() => {
            killedAt = performance.now()
            processes[rank]?.kill('SIGKILL')
          }, 200)
        },
      })
      assert.ok(killedAt > 0)
      assert.equal(outcomes[1]?.signal, 'SIGKILL')
      for (const rank of [0, 2]) {
        const first = failureOf(outcomes[rank], 'first')
        assert.equal(first.code, 'ERR_PEER_LOST', first.message)
        assert.equal(first.rank, 1)
        assert.equal(first.pid, outcomes[1].pid)
        assert.equal(first.operation, 'allReduce')
        assert.ok(first.signal === undefined || first.signal === 'SIGKILL', first.signal)
        assert.equal(first.host, hostname())
        assert.ok((first.sequence ?? 0) > 0)
        assert.ok(first.tookMs < 1200, `${String(first.tookMs)} ms`)
        // Where each stood: the victim through with the barrier, the others waiting in the operation after it.
        const last = (first.recorder ?? []).map(({ rows }) => rows.at(-1))
        assert.deepEqual(
          last.map((row) => [row?.sequence, row?.operation, row?.completedNs !== 0]),
          [0, 1, 2].map((r) => (r === 1 ? [1, 'barrier', true] : [2, 'allReduce', false])),
        )
        assert.deepEqual(
          first.recorder?.map(({ rank: r, pid }) => [r, pid]),
          outcomes.map(({ pid }, r) => [r, pid]),
        )
        for (const row of last) assert.ok(row !== undefined && row.publishedNs > 0)
        assert.equal(failureOf(outcomes[rank], 'second').code, 'ERR_PEER_LOST')
        assert.equal(failureOf(outcomes[rank], 'afterClose').code, 'ERR_CLOSED')
      }
    })
  }

  it('a stopped rank is named when the deadline passes, and the group stays broken', async () => {
    const outcomes = await runRanks(cases, 'waitForVictim', {
      worldSize: 3,
      args: { victim: 2, form: 'async', timeoutMs: 700 },
      onSay: (rank, _, processes) => {
        processes[rank]?.kill('SIGSTOP')
        setTimeout(() => processes[rank]?.kill('SIGKILL'), 2500)
      },
    })
    for (const rank of [0, 1]) {
      const first = failureOf(outcomes[rank], 'first')
      assert.equal(first.code, 'ERR_TIMEOUT', first.message)
      assert.deepEqual(first.lateRanks, [2])
      assert.match(first.message, /rank 2/)
      assert.ok(first.tookMs >= 500 && first.tookMs < 2000, `${String(first.tookMs)} ms`)
      assert.equal(failureOf(outcomes[rank], 'second').code, 'ERR_TIMEOUT')
    }
  })

  for (const how of ['close', 'exit', 'throw'] as const) {
    it(`a rank that ends early (${how}) while others wait is a loss that names it`, async () => {
      const outcomes = await runRanks(cases, 'earlyEnd', { worldSize: 3, args: { how } })
      for (const rank of [0, 2]) {
        const failure = failureOf(outcomes[rank])
        assert.equal(failure.code, 'ERR_PEER_LOST', failure.message)
        assert.equal(failure.rank, 1)
        assert.equal(failure.pid, outcomes[1]?.pid)
      }
    })
  }

  for (const kind of [
    ...['count', 'dtype', 'operation', 'root', 'op', 'algorithm', 'alloc', 'broadcastAgainstAllReduce'],
    ...['counts', 'output'],
  ]) {
    it(`ranks that disagree on ${kind} are told both sides`, async () => {
      const outcomes = await runRanks(cases, 'mismatch', { worldSize: 3, args: { kind } })
      for (const outcome of outcomes) {
        const failure = failureOf(outcome)
        assert.equal(failure.code, 'ERR_MISMATCH', failure.message)
        assert.match(failure.message, /rank \d.*rank \d/)
      }
    })
  }

  it('abort by a signal rejects with its reason here and ERR_ABORTED on the others', async () => {
    for (const isEarly of [false, true]) {
      const outcomes = await runRanks(cases, 'abortBySignal', { worldSize: 3, args: { isEarly } })
      assert.equal((outcomes[0]?.value as { isReason: boolean }).isReason, true, JSON.stringify(outcomes[0]))
      for (const rank of [1, 2]) {
        const failure = failureOf(outcomes[rank])
        assert.equal(failure.code, 'ERR_ABORTED', failure.message)
        assert.match(failure.message, /the user pressed stop/)
      }
    }
  })

  it('a rank that never comes is named when joining times out', async () => {
    const outcomes = await runRanks(cases, 'join', { worldSize: 3, absent: [1], args: { timeoutMs: 1200 } })
    assert.equal(outcomes.length, 2)
    for (const outcome of outcomes) {
      const failure = failureOf(outcome)
      assert.equal(failure.code, 'ERR_TIMEOUT', failure.message)
      assert.deepEqual(failure.lateRanks, [1])
    }
  })

  it('ranks with different settings are told both sides when they join', async () => {
    const outcomes = await runRanks(cases, 'join', { worldSize: 2, args: { timeoutMs: 5000, slotBytes: [4096, 8192] } })
    for (const outcome of outcomes) {
      const failure = failureOf(outcome)
      assert.equal(failure.code, 'ERR_MISMATCH', failure.message)
      assert.match(failure.message, /4096/)
      assert.match(failure.message, /8192/)
    }
  })

  it('ranks that count differently many ranks are told so', async () => {
    const outcomes = await runRanks(cases, 'join', {
      worldSize: 2,
      args: { timeoutMs: 3000 },
      env: (rank) => (rank === 0 ? {} : { WORLD_SIZE: '3', LOCAL_WORLD_SIZE: '3', LOCAL_SIZE: '3' }),
    })
    assert.equal(failureOf(outcomes[0]).code, 'ERR_MISMATCH')
    assert.equal(failureOf(outcomes[1]).code, 'ERR_MISMATCH')
  })

  it('a second process with the same rank is refused', async () => {
    const outcomes = await runRanks(cases, 'join', {
      worldSize: 2,
      args: { timeoutMs: 1500 },
      env: () => ({ RANK: '0', LOCAL_RANK: '0' }),
    })
    const codes = outcomes.map((outcome) => failureOf(outcome).code).sort()
    assert.deepEqual(codes, ['ERR_MISMATCH', 'ERR_TIMEOUT'])
  })

  it('a rank of another job, which has another nonce, is not met', async () => {
    const other = newNonce()
    const outcomes = await runRanks(cases, 'join', {
      worldSize: 2,
      args: { timeoutMs: 1000 },
      env: (rank) => (rank === 1 ? { TILERANK_JOB: other } : {}),
    })
    for (const outcome of outcomes) assert.equal(failureOf(outcome).code, 'ERR_TIMEOUT')
  })

  it("strangers that connect to a rank's socket and talk nonsense are ignored", async () => {
    const nonce = newNonce()
    const name = `\0tilerank/${nonce}/0`
    let refused = 0
    const pesterer = setInterval(() => {
      // A stream socket cannot reach a SEQPACKET one: this shows that the wrong kind is refused by the kernel already.
      const socket = connect(name)
      socket.on('error', () => refused++)
    }, 20)
    try {
      const values = await ranksValues(cases, 'orderlyEnd', { worldSize: 2, nonce })
      assert.deepEqual(values, [{ sum: 2 }, { sum: 2 }])
    } finally {
      clearInterval(pesterer)
    }
    assert.ok(refused > 0)
  })

  it('a socket that the launcher bound is inherited, and a wrong descriptor is refused', async () => {
    const wrong = await runRanks(cases, 'join', {
      worldSize: 2,
      args: { timeoutMs: 800 },
      env: () => ({ TILERANK_SOCKET_FD: '2' }),
    })
    for (const outcome of wrong) assert.equal(failureOf(outcome).code, 'ERR_MISMATCH', failureOf(outcome).message)

    const addon = nativeAddon() as { bindRankSocket(nonce: string, rank: number): number }
    const nonce = newNonce()
    const sockets = [0, 1].map((rank) => addon.bindRankSocket(nonce, rank))
    try {
      assert.throws(() => addon.bindRankSocket(nonce, 1), { code: 'ERR_MISMATCH' })
      assert.throws(() => addon.bindRankSocket('short', 1), { code: 'ERR_INVALID_ARGUMENT' })
      const values = await ranksValues(cases, 'orderlyEnd', {
        worldSize: 2,
        nonce,
        inherit: (rank) => sockets[rank],
        env: () => ({ TILERANK_SOCKET_FD: '4' }),
      })
      assert.deepEqual(values, [{ sum: 2 }, { sum: 2 }])
    } finally {
      for (const fd of sockets) closeSync(fd)
    }
  })

  it('leaves no process, no socket and nothing in /dev/shm', async () => {
    const nonce = newNonce()
    const outcomes = await runRanks(cases, 'orderlyEnd', { worldSize: 2, nonce })
    assert.equal(outcomes.length, 2)
    for (const { pid } of outcomes) assert.equal(isAlive(pid), false)
    assert.ok(!readFileSync('/proc/net/unix', 'utf8').includes(nonce))
    assert.deepEqual(readdirSync('/dev/shm').sort(), shmBefore)
  })
})
