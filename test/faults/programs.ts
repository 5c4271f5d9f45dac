// What ranks of a plain group do while one of them is struck (test/ranks.ts runs it): operations without end, until one fails. Every
// result on the way is checked; what the failure said and when it came is the result.

import { setImmediate as turn } from 'node:timers/promises'
import { createGroup, type Group } from '../../collectives/index.js'

export interface Seen {
  /** The error's code and facts; the code 'none' when the operations that were asked for all ended. */
  readonly failure: Readonly<Record<string, unknown>>
  /** CLOCK_MONOTONIC, milliseconds. */
  readonly atMs: number
}

const monotonicMs = (): number => Number(process.hrtime.bigint() / 1000n) / 1000

function say(message: string): void {
  process.send?.({ kind: 'say', value: message })
}

/** One round of everything, small and large, tensors and arrays. */
async function round(
  group: Group,
  tensor: { fill: () => void; sum: () => void },
  form: 'sync' | 'async',
): Promise<void> {
  const { rank, worldSize } = group
  const expected = (worldSize * (worldSize + 1)) / 2
  const small = new Float32Array(64).fill(rank + 1)
  const large = new Float32Array(20_000).fill(rank + 1)
  const gathered = new Float32Array(16 * worldSize)
  const sent = new Float32Array(300).fill(rank === 1 ? 7 : 0)
  if (form === 'sync') {
    group.allReduceSync(small)
    group.allReduceSync(large)
    group.allGatherSync(small.subarray(0, 16), gathered)
    group.broadcastSync(sent, { root: 1 })
  } else {
    await Promise.all([
      group.allReduce(small),
      group.allReduce(large),
      group.barrier(),
      group.broadcast(sent, { root: 1 }),
    ])
    await group.allGather(small.subarray(0, 16), gathered)
  }
  tensor.fill()
  tensor.sum()
  for (const [name, data, value] of [
    ['small', small, expected],
    ['large', large, expected],
    ['gathered', gathered, expected],
    ['sent', sent, 7],
  ] as const) {
    if (!data.every((element) => element === value)) throw new Error(`wrong values in ${name}`)
  }
}

export async function operate(args: { form: 'sync' | 'async'; timeoutMs: number; rounds: number }): Promise<Seen> {
  say('up')
  let group: Group | undefined
  try {
    group = await createGroup({ timeoutMs: args.timeoutMs, chunkBytes: 16_384 })
    const made = group
    const tensor = made.alloc('bf16', [5000])
    const sum = (made.worldSize * (made.worldSize + 1)) / 2
    const pair = {
      fill: () => tensor.set(new Float32Array(5000).fill(made.rank + 1)),
      sum: () => {
        made.allReduceSync(tensor)
        if (!tensor.toFloat32().every((value) => value === sum)) throw new Error('wrong values in the tensor')
      },
    }
    say('ready')
    for (let i = 0; i < args.rounds; i++) {
      await round(made, pair, args.form)
      await turn()
    }
    say('closing')
    await made.close()
    return { failure: { code: 'none' }, atMs: monotonicMs() }
  } catch (error) {
    const atMs = monotonicMs()
    if (!(error instanceof Error)) throw error
    const failure = { ...error, message: error.message, cause: undefined }
    await group?.close()
    return { failure, atMs }
  }
}
