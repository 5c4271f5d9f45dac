// What a rank runs over a transport, alike under mpirun (main below) and started by the tests themselves.

import { createHash } from 'node:crypto'
import process from 'node:process'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  createGroup,
  type CollectiveError,
  type Group,
  type GroupOptions,
  type TypedArray,
} from '../../collectives/index.js'

const digest = (array: TypedArray): string =>
  createHash('sha256')
    .update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength))
    .digest('hex')
    .slice(0, 16)

/** The same on every run; any two ranks differ. */
function floats(count: number, seed: number): Float32Array {
  const values = new Float32Array(count)
  let state = (seed + 1) * 2654435761
  for (let i = 0; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    values[i] = (state / 2 ** 32 - 0.5) * 2 ** ((state >>> 8) % 20)
  }
  return values
}

function check(isRight: boolean, what: string): void {
  if (!isRight) throw new Error(`${what} is wrong`)
}

async function runOperations(group: Group, results: Record<string, unknown>): Promise<void> {
  const { rank, worldSize } = group
  const total = (worldSize * (worldSize + 1)) / 2
  const note = (name: string, array: TypedArray): void => {
    results[name] = digest(array)
  }
  // One element, the limit of one frame a node, several frames.
  for (const count of [0, 1, 1000, 150_001]) {
    const ones = new Int32Array(count).fill(rank + 1)
    if (count % 2 === 0) group.allReduceSync(ones)
    else await group.allReduce(ones)
    check(
      ones.every((value) => value === total),
      `allReduce of ${count}`,
    )
    const values = floats(count, rank)
    await group.allReduce(values)
    note(`allReduce f32 ${count}`, values)
    const halves = Uint16Array.from(
      floats(count, rank),
      (value) => (new Uint32Array(Float32Array.of(value).buffer)[0] ?? 0) >>> 16,
    )
    await group.allReduce(halves, { dtype: 'bf16', op: 'avg' })
    note(`allReduce bf16 ${count}`, halves)
    const root = floats(count, rank)
    group.broadcastSync(root, { root: worldSize - 1 })
    check(digest(root) === digest(floats(count, worldSize - 1)), `broadcast of ${count}`)
    const whole = new Float32Array(count * worldSize)
    await group.allGather(floats(count, rank), whole)
    for (let from = 0; from < worldSize; from++)
      check(
        digest(whole.slice(from * count, (from + 1) * count)) === digest(floats(count, from)),
        `allGather of ${count}`,
      )
    const part = new Float32Array(count)
    await group.reduceScatter(whole, part)
    note(`reduceScatter ${count} of ${rank}`, part)
    const reduced = floats(count, rank)
    await group.reduce(reduced, { op: 'max', root: 1 })
    if (rank === 1) note(`reduce ${count}`, reduced)
    const gathered = rank === 0 ? new Float32Array(count * worldSize) : undefined
    await group.gather(floats(count, rank), gathered)
    if (gathered !== undefined) check(digest(gathered) === digest(whole), `gather of ${count}`)
    await group.scatter(gathered, part)
    check(digest(part) === digest(floats(count, rank)), `scatter of ${count}`)
    const all = new Float32Array(count * worldSize)
    group.allToAllSync(whole, all)
    for (let from = 0; from < worldSize; from++)
      check(digest(all.slice(from * count, (from + 1) * count)) === digest(floats(count, rank)), `allToAll of ${count}`)
    const next = (rank + 1) % worldSize
    const last = (rank + worldSize - 1) % worldSize
    await group.sendRecv(floats(count, rank), part, { to: next, from: last })
    check(digest(part) === digest(floats(count, last)), `sendRecv of ${count}`)
    await group.barrier()
  }
  check((await group.allGatherObject({ rank })).length === worldSize, 'allGatherObject')
}

export async function operations(options: GroupOptions): Promise<Record<string, unknown>> {
  const results: Record<string, unknown> = {}
  const group = await createGroup(options)
  try {
    results['nodes'] = group.nodes
    await runOperations(group, results)
  } finally {
    await group.close()
  }
  // Another one of the same processes.
  const second = await createGroup(options)
  try {
    const values = floats(1000, second.rank)
    second.allReduceSync(values)
    check(digest(values) === results['allReduce f32 1000'], 'allReduce of the second group')
  } finally {
    await second.close()
  }
  return results
}

/** Small calls without a pause: microseconds of the fastest and of the median. */
export async function latency({
  bytes,
  samples,
  ...options
}: GroupOptions & { bytes: number; samples: number }): Promise<unknown> {
  const group = await createGroup(options)
  try {
    const data = new Float32Array(bytes / 4)
    const us = Float64Array.from({ length: samples }, () => {
      const start = performance.now()
      group.allReduceSync(data)
      return (performance.now() - start) * 1000
    }).sort()
    return { min: us[0], p50: us[samples >> 1] }
  } finally {
    await group.close()
  }
}

/** An error is the result. */
export async function failing(options: GroupOptions): Promise<unknown> {
  try {
    await (await createGroup(options)).close()
    return undefined
  } catch (error) {
    const { code, message } = error as CollectiveError
    return { code, message }
  }
}

/** Rank 1 calls nothing, or ends; the others say how their allReduce failed. */
export async function lost({
  how,
  ...options
}: GroupOptions & { how: 'kill' | 'stop' | 'close' | 'mismatch' }): Promise<unknown> {
  const group = await createGroup(options)
  const data = new Float32Array(1000)
  // Behind the barrier nobody reads any more from what rank 1 sent in the first.
  await group.allReduce(data)
  await group.barrier()
  if (group.rank === 1 && how === 'kill') process.kill(process.pid, 'SIGKILL')
  if (group.rank === 1 && how === 'stop') return sleep(3000)
  if (group.rank === 1 && how === 'close') return group.close()
  const start = performance.now()
  try {
    await group.allReduce(how === 'mismatch' && group.rank === 1 ? new Float32Array(999) : data)
    return 'no error'
  } catch (error) {
    const { code, message, rank, lateRanks } = error as CollectiveError
    return { code, message, rank, lateRanks, elapsedMs: Math.round(performance.now() - start) }
  } finally {
    await group.close()
  }
}

const cases = { operations, latency, failing, lost }

// node mpiCases.js NAME ARGUMENT: one line of JSON.
const [, main, name, argument] = process.argv
if (main?.endsWith('mpiCases.js') === true && name !== undefined && name in cases) {
  const run = cases[name as keyof typeof cases] as (argument: unknown) => Promise<unknown>
  const value = await run(JSON.parse(argument ?? '{}'))
  process.stdout.write(
    `${JSON.stringify({ rank: Number(process.env['OMPI_COMM_WORLD_RANK'] ?? process.env['PMI_RANK'] ?? -1), value })}\n`,
  )
}
