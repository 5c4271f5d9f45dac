// What ranks on several nodes do in network.test.ts, see test/ranks.ts.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import process from 'node:process'
import { setTimeout as pause } from 'node:timers/promises'
import { createGroup, type AllReduceAlgorithm, type Group } from '../../collectives/index.js'
import { resources, type Held } from '../collectives/groupCases.js'

const say = (value: unknown): void => {
  process.send?.({ kind: 'say', value })
}

const algorithms: readonly AllReduceAlgorithm[] = ['auto', 'leader', 'splitRail', 'twoStep']

/** Small integers: exact whatever is added first, and different for each rank and place. */
const valueOf = (rank: number, i: number): number => ((i * 7 + rank * 13) % 61) - 30

const filled = (rank: number, length: number): Float32Array => Float32Array.from({ length }, (_, i) => valueOf(rank, i))

/** Every operation, each against its closed form. */
export async function everyOperation(args: { counts: number[]; slotBytes: number }): Promise<{ nodes: number }> {
  const group = await createGroup({ slotBytes: args.slotBytes, frameBytes: 16384 })
  try {
    const { rank, worldSize } = group
    const all = Array.from({ length: worldSize }, (_, other) => other)
    for (const count of args.counts) {
      const sum = (i: number): number => all.reduce((total, other) => total + valueOf(other, i), 0)
      const sums = Float32Array.from({ length: count }, (_, i) => sum(i))
      for (const algorithm of algorithms) {
        assert.deepEqual(await group.allReduce(filled(rank, count), { algorithm }), sums, `${algorithm} ${count}`)
        const output = new Float32Array(count)
        const data = filled(rank, count)
        group.allReduceSync(data, { algorithm, output })
        assert.deepEqual(output, sums)
        assert.deepEqual(data, filled(rank, count), 'data out of place stays')
        const largest = group.allReduceSync(Int32Array.from(filled(rank, count)), { algorithm, op: 'max' })
        assert.deepEqual(
          largest,
          Int32Array.from({ length: count }, (_, i) => Math.max(...all.map((other) => valueOf(other, i)))),
        )
      }
      const whole = Float32Array.from({ length: count * worldSize }, (_, i) =>
        valueOf(Math.floor(i / count), i % count),
      )
      const wide = filled(rank, count * worldSize)
      const partOf = (from: Float32Array): Float32Array => from.slice(rank * count, (rank + 1) * count)
      for (const root of all) {
        assert.deepEqual(await group.broadcast(filled(rank, count), { root }), filled(root, count))
        assert.deepEqual(group.reduceSync(filled(rank, count), { root }), rank === root ? sums : filled(rank, count))
        const gathered = group.gatherSync(
          filled(rank, count),
          rank === root ? new Float32Array(whole.length) : undefined,
          { root },
        )
        if (rank === root) assert.deepEqual(gathered, whole)
        const scattered = await group.scatter(rank === root ? whole : undefined, new Float32Array(count), { root })
        assert.deepEqual(scattered, filled(rank, count))
      }
      assert.deepEqual(group.allGatherSync(filled(rank, count), new Float32Array(whole.length)), whole)
      const wideSums = Float32Array.from({ length: wide.length }, (_, i) => sum(i))
      assert.deepEqual(await group.reduceScatter(wide, new Float32Array(count)), partOf(wideSums))
      assert.deepEqual(
        group.allToAllSync(wide, new Float32Array(wide.length)),
        Float32Array.from({ length: wide.length }, (_, i) =>
          valueOf(Math.floor(i / count), (i % count) + rank * count),
        ),
      )
      const counts = all.map((other) => count + 3 * other)
      const mine = filled(rank, counts[rank] ?? 0)
      const ragged = await group.allGather(mine, new Float32Array(counts.reduce((a, b) => a + b, 0)), { counts })
      assert.deepEqual(ragged, Float32Array.from(all.flatMap((other) => [...filled(other, counts[other] ?? 0)])))
      const to = (rank + 1) % worldSize
      const from = (rank + worldSize - 1) % worldSize
      const received = new Float32Array(count)
      await Promise.all([group.send(filled(rank, count), { to }), group.recv(received, { from }), group.barrier()])
      assert.deepEqual(received, filled(from, count))
      group.barrierSync()
    }
    assert.deepEqual(
      await group.allGatherObject({ rank }),
      all.map((other) => ({ rank: other })),
    )
    return { nodes: group.nodes.length }
  } finally {
    await group.close()
  }
}

const noise = (seed: number, length: number): Float32Array => {
  let state = seed * 2654435761 + 1
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state / 2 ** 31 - 1) * 2 ** ((state >>> 3) % 20)
  })
}

/**
 * Sums that depend on the order: over the ranks of each node, rising, then over the nodes. Every algorithm must give these bits on every rank.
 */
export async function sameBits(args: { count: number }): Promise<{ digests: string[] }> {
  const group = await createGroup({ frameBytes: 8192 })
  try {
    return { digests: await digestsOf(group, args.count) }
  } finally {
    await group.close()
  }
}

export async function digestsOf(group: Group, count: number): Promise<string[]> {
  const inputs = Array.from({ length: group.worldSize }, (_, rank) => noise(rank + 1, count))
  const partials = group.nodes.map((ranks) => {
    const partial = inputs[ranks[0] ?? 0]?.slice() ?? new Float32Array()
    for (const rank of ranks.slice(1)) inputs[rank]?.forEach((x, i) => (partial[i] = (partial[i] ?? 0) + x))
    return partial
  })
  const expected = partials[0]?.slice() ?? new Float32Array()
  for (const partial of partials.slice(1)) partial.forEach((x, i) => (expected[i] = (expected[i] ?? 0) + x))
  const digests: string[] = []
  for (const dtype of ['f32', 'bf16', 'f16'] as const) {
    for (const algorithm of group.nodes.length > 1 ? algorithms : (['auto'] as const)) {
      const data = group.alloc(dtype, [count])
      data.set(inputs[group.rank] ?? new Float32Array())
      await group.allReduce(data, { algorithm })
      if (dtype === 'f32') assert.deepEqual(data.toFloat32(), expected, algorithm)
      const bytes = Buffer.from(data.data.buffer, data.data.byteOffset, data.data.byteLength)
      digests.push(`${dtype} ${createHash('sha256').update(bytes).digest('hex').slice(0, 16)}`)
    }
  }
  return digests
}

/** Joins, and says what came of it. */
export async function join(args: {
  timeoutMs: number
  options?: Record<number, object>
}): Promise<{ failure: unknown; nodes: unknown }> {
  const rank = Number(process.env['RANK'])
  const start = Date.now()
  try {
    const group = await createGroup({ timeoutMs: args.timeoutMs, ...args.options?.[rank] })
    const sum = await group.allReduce(Float32Array.of(rank))
    await group.close()
    return { failure: null, nodes: { layout: group.nodes, sum: sum[0] } }
  } catch (error) {
    return { failure: factsOf(error, start), nodes: null }
  }
}

/** What the group chooses, and how a call ends for which this rank names an algorithm. */
export async function chooses(args: { bytes: number[]; algorithms: AllReduceAlgorithm[] }): Promise<object> {
  const group = await createGroup()
  const explained = args.bytes.map((bytes) => group.explain('allReduce', bytes))
  try {
    await group.allReduce(new Float32Array(5000), { algorithm: args.algorithms[group.rank] ?? 'auto' })
    return { explained, code: 'ok' }
  } catch (error) {
    return { explained, code: (error as { code?: string }).code }
  } finally {
    await group.close()
  }
}

const factsOf = (error: unknown, start: number): object => ({
  ...(error as object),
  recorder: undefined,
  cause: undefined,
  message: (error as Error).message,
  tookMs: Date.now() - start,
})

/** What the victim does in the middle of a row of operations; all others report what they saw. */
export async function breaks(args: {
  victim: number
  how: string
  timeoutMs: number
}): Promise<{ failure: unknown; again?: number }> {
  const group: Group = await createGroup()
  const { rank } = group
  const data = new Float32Array(50_000).fill(1)
  const start = Date.now()
  let failure: object | undefined
  try {
    // A failure may come before this rank is through with its end.
    await group.allReduce(data)
    if (rank === args.victim) {
      say('now')
      if (args.how === 'SIGKILL' || args.how === 'SIGSTOP') {
        process.kill(process.pid, args.how)
        await pause(60_000)
      }
      if (args.how === 'exit') process.exit(0)
      if (args.how === 'abort') group.abort('on purpose')
      if (args.how === 'busy') {
        // A blocked main thread is no lost node: sockets and heartbeats live on.
        const end = Date.now() + 6000
        while (Date.now() < end);
      }
      if (args.how === 'close') {
        await group.close()
        return { failure: null }
      }
    }
    if (rank === args.victim && args.how === 'op') await group.allReduce(data, { op: 'max', timeoutMs: args.timeoutMs })
    else if (rank === args.victim && args.how === 'count')
      await group.allReduce(data.subarray(1), { timeoutMs: args.timeoutMs })
    else if (rank === args.victim && args.how === 'operation')
      await group.allGather(data.subarray(0, 100), new Float32Array(100 * group.worldSize), {
        timeoutMs: args.timeoutMs,
      })
    else await group.allReduce(data, { timeoutMs: args.timeoutMs })
  } catch (error) {
    failure = factsOf(error, start)
  } finally {
    await group.close()
  }
  return { failure: failure ?? null }
}

/** Makes groups one after the other, and says what the process holds after the first and after the last. */
export async function oneAfterTheOther(args: { rounds: number }): Promise<{ before: Held; after: Held }> {
  const round = async (): Promise<void> => {
    const group = await createGroup({ timeoutMs: 20_000 })
    assert.deepEqual(await group.allReduce(Float32Array.of(1)), Float32Array.of(group.worldSize))
    await group.close()
  }
  await round()
  const before = await resources()
  for (let i = 0; i < args.rounds; i++) await round()
  return { before, after: await resources() }
}
