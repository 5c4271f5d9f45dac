// What the ranks of algorithms.test.ts run.

import { createHash } from 'node:crypto'
import { CollectiveError, createGroup, type Explanation, type GroupOptions } from '../../collectives/index.js'
import { elements, reduced } from './reductions.js'

const failureOf = (error: unknown): Record<string, unknown> => {
  if (!(error instanceof CollectiveError)) throw error
  return { code: error.code, message: error.message, mine: error.mine, theirs: error.theirs }
}

/** Sums of many sizes by whatever the table says, checked, as one digest; and what the table says of some. */
export async function sums(options: GroupOptions): Promise<{ digest: string; explained: Explanation[] }> {
  const group = await createGroup({ slotBytes: 4096, timeoutMs: 20_000, ...options })
  const hash = createHash('sha256')
  try {
    for (const count of [1, 15, 16, 17, 256, 257, 700, 1024, 3000]) {
      for (const memory of ['tensor', 'array', 'async tensor'] as const) {
        const inputs = Array.from({ length: group.worldSize }, (_, rank) => elements('f32', count, count * 100 + rank))
        const input = inputs[group.rank]
        if (!(input instanceof Float32Array)) throw new Error('f32 is a Float32Array')
        const data = memory === 'array' ? new Float32Array(count) : group.alloc('f32', [count])
        const view = data instanceof Float32Array ? data : data.data
        view.set(input)
        if (memory === 'async tensor') await group.allReduce(data)
        else group.allReduceSync(data)
        const expected = reduced('f32', 'sum', inputs)
        if (!view.every((value, i) => Object.is(value, expected[i]))) throw new Error(`${count} ${memory}: a wrong sum`)
        hash.update(new Uint8Array(view.buffer, view.byteOffset, view.byteLength))
      }
      const shared = new Int32Array(count).fill(group.rank + 1)
      group.broadcastSync(shared, { root: group.worldSize - 1 })
      if (!shared.every((value) => value === group.worldSize)) throw new Error('a wrong broadcast')
    }
    const explained = (['tensor', 'array'] as const).flatMap((memory) =>
      [0, 2048, 2049, 16 << 10, 32 << 10, 64 << 10, (64 << 10) + 1].map((bytes) =>
        group.explain('allReduce', bytes, memory),
      ),
    )
    return { digest: hash.digest('hex'), explained }
  } finally {
    await group.close()
  }
}

/** Joins, and says why not. */
export async function join(options: GroupOptions): Promise<Record<string, unknown>> {
  try {
    const group = await createGroup({ timeoutMs: 10_000, ...options })
    await group.close()
    return { code: 'joined' }
  } catch (error) {
    return failureOf(error)
  }
}

/** Rank 0 hands over a tensor, the others arrays; all fix the algorithm, while the chunks of both kinds differ. */
export async function mixed(): Promise<Record<string, unknown>> {
  const group = await createGroup({ slotBytes: 4096, timeoutMs: 10_000, algorithms: 'allReduce=auto,tensor,chunk=128' })
  try {
    const tensor = group.alloc('f32', [1000])
    const data = group.rank === 0 ? tensor : new Float32Array(1000)
    group.allReduceSync(data, { algorithm: 'oneShot' })
    return { code: 'no error' }
  } catch (error) {
    return failureOf(error)
  } finally {
    await group.close()
  }
}
