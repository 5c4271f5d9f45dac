// What the ranks of the collective tests run. Every function makes its group, checks its own results against a closed form, and
// returns digests, so that the test can hold the ranks against each other bit by bit.

import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { inspect, isDeepStrictEqual } from 'node:util'
import {
  CollectiveError,
  createGroup,
  Tensor,
  type AllReduceAlgorithm,
  type Group,
  type TypedArray,
} from '../../collectives/index.js'
import type { DType } from '../../native/types.js'
import { elements, floatDTypes, floatOps, integerDTypes, integerOps, reduced } from './reductions.js'

const scratch = new Float32Array(1)
const scratchBits = new Uint32Array(scratch.buffer)

/** To nearest even, as the upper half of an f32. */
export function toBf16(value: number): number {
  scratch[0] = value
  const bits = scratchBits[0] ?? 0
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff
}

function fromBf16(bits: number): number {
  scratchBits[0] = bits << 16
  return scratch[0] ?? 0
}

/** Values that round differently in every order of summation: no small integers. */
function input(rank: number, index: number, salt: number): number {
  return Math.fround(Math.sin(index * 0.7 + rank * 1.3 + salt) * 10 ** ((index + rank) % 5))
}

/** The stored number (f32 value or bf16 bits) that a sum over the ranks must give: f32 sums in rank order, one rounding. */
function expected(worldSize: number, index: number, salt: number, dtype: DType): number {
  let sum = 0
  for (let rank = 0; rank < worldSize; rank++) {
    const value = dtype === 'f32' ? input(rank, index, salt) : fromBf16(toBf16(input(rank, index, salt)))
    sum = rank === 0 ? value : Math.fround(sum + value)
  }
  return dtype === 'f32' ? sum : toBf16(sum)
}

function fill(data: Float32Array | Uint16Array, rank: number, salt: number): void {
  for (let i = 0; i < data.length; i++)
    data[i] = data instanceof Float32Array ? input(rank, i, salt) : toBf16(input(rank, i, salt))
}

function check(data: Float32Array | Uint16Array, worldSize: number, salt: number, what: string): void {
  const dtype = data instanceof Float32Array ? 'f32' : 'bf16'
  for (let i = 0; i < data.length; i++) {
    const want = expected(worldSize, i, salt, dtype)
    if (!Object.is(data[i], want))
      throw new Error(`${what}: element ${String(i)} is ${String(data[i])}, expected is ${String(want)}`)
  }
}

const bytesOf = (data: TypedArray): Uint8Array => new Uint8Array(data.buffer, data.byteOffset, data.byteLength)

function digest(data: TypedArray): string {
  return createHash('sha256').update(bytesOf(data)).digest('hex').slice(0, 16)
}

type ModelData = Tensor<DType> | Float32Array | Uint16Array
const viewOf = (data: ModelData): Float32Array | Uint16Array => (data instanceof Tensor ? data.data : data)

/** Canaries on both sides, and an odd offset. */
function plain(dtype: DType, count: number): { view: Float32Array | Uint16Array; isWhole: () => boolean } {
  const all = dtype === 'f32' ? new Float32Array(count + 6) : new Uint16Array(count + 6)
  all.fill(7)
  const view = all.subarray(3, 3 + count)
  return { view, isWhole: () => [0, 1, 2, count + 3, count + 4, count + 5].every((i) => all[i] === 7) }
}

/** The matrix of one world size: returns a digest a case, and how many cases there were. */
export async function matrix(args: {
  slotBytes: number
  chunkBytes: number
  counts: number[]
}): Promise<{ digests: string[] }> {
  const group = await createGroup({ slotBytes: args.slotBytes, chunkBytes: args.chunkBytes, timeoutMs: 20_000 })
  const digests: string[] = []
  let salt = 0
  try {
    for (const dtype of ['f32', 'bf16'] as const) {
      for (const count of args.counts) {
        for (const kind of ['tensor', 'plain'] as const) {
          const choices: AllReduceAlgorithm[] = ['auto', 'oneShot', 'twoShot']
          if (kind === 'tensor') choices.push('twoShotInPlace')
          const memory = plain(dtype, count)
          const data: ModelData = kind === 'tensor' ? group.alloc(dtype, [count]) : memory.view
          for (const algorithm of choices) {
            for (const form of ['sync', 'async'] as const) {
              const what = `${dtype} x ${String(count)} ${kind} ${algorithm} ${form}`
              salt++
              fill(viewOf(data), group.rank, salt)
              const options = { algorithm, dtype }
              const same = form === 'sync' ? group.allReduceSync(data, options) : await group.allReduce(data, options)
              if (same !== data) throw new Error(`${what}: other data came back`)
              check(viewOf(data), group.worldSize, salt, what)
              if (!memory.isWhole()) throw new Error(`${what}: memory beside the data was written`)
              digests.push(digest(viewOf(data)))
            }
          }
        }
      }
    }
  } finally {
    await group.close()
  }
  return { digests }
}

/** The thresholds of 'auto', one element below, at, and above, at the default sizes. */
export async function thresholds(args: { limits: number[] }): Promise<{ digests: string[] }> {
  const group = await createGroup({ timeoutMs: 20_000 })
  const digests: string[] = []
  try {
    for (const limit of args.limits) {
      for (const delta of [-1, 0, 1]) {
        const count = limit / 2 + delta
        const tensor = group.alloc('bf16', [count])
        fill(tensor.data, group.rank, limit)
        group.allReduceSync(tensor)
        check(tensor.data, group.worldSize, limit, `auto at ${String(count)}`)
        digests.push(digest(tensor.data))
      }
    }
  } finally {
    await group.close()
  }
  return { digests }
}

/** Special values: they stay where they are, on every rank alike. */
export async function specials(): Promise<{ values: string[]; bits: number[] }> {
  const group = await createGroup()
  try {
    const data = Float32Array.of(1, group.rank === 0 ? NaN : 1, group.rank === 0 ? Infinity : 1, 2 ** -149, 3e38)
    group.allReduceSync(data)
    const half = Uint16Array.of(toBf16(3.3e38), toBf16(2 ** -133), 0x7fc0, 0x3f80)
    group.allReduceSync(half, { dtype: 'bf16' })
    return { values: [...data].map(String), bits: [...half] }
  } finally {
    await group.close()
  }
}

/** allGather, broadcast and barrier, in place and beside, chunked, mixed with allReduce. */
export async function others(args: { counts: number[] }): Promise<{ digests: string[] }> {
  const group = await createGroup({ slotBytes: 4096, chunkBytes: 256, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  const digests: string[] = []
  try {
    for (const count of args.counts) {
      const part = new Float32Array(count)
      const all = new Float32Array(count * worldSize).fill(-1)
      fill(part, rank, count)
      const isSame = (await group.allGather(part, all)) === all
      if (!isSame) throw new Error('allGather resolved to something else')
      for (let peer = 0; peer < worldSize; peer++) {
        for (let i = 0; i < count; i++) {
          if (all[peer * count + i] !== input(peer, i, count))
            throw new Error(`allGather: rank ${String(peer)} element ${String(i)}`)
        }
      }
      const inPlace = new Uint16Array(count * worldSize)
      const own = inPlace.subarray(rank * count, (rank + 1) * count)
      own.fill(rank + 1)
      group.allGatherSync(own, inPlace, { dtype: 'bf16' })
      if (!inPlace.every((value, i) => value === Math.floor(i / count) + 1)) throw new Error('allGather in place')
      digests.push(digest(all), digest(inPlace))
      // Two generations are reused again and again by roots that wait for nobody.
      for (let turn = 0; turn < 7; turn++) {
        const root = (turn * 3) % worldSize
        const data = new Float32Array(count)
        if (rank === root) fill(data, root, turn)
        if (turn % 2 === 0) group.broadcastSync(data, { root })
        else await group.broadcast(data, { root })
        for (let i = 0; i < count; i++)
          if (data[i] !== input(root, i, turn)) throw new Error(`broadcast ${String(turn)} element ${String(i)}`)
        if (turn === 3) group.barrierSync()
        if (turn === 5) {
          const sum = Float32Array.of(1)
          group.allReduceSync(sum)
          if (sum[0] !== worldSize) throw new Error('allReduce after broadcasts')
        }
      }
      await group.barrier()
    }
  } finally {
    await group.close()
  }
  return { digests }
}

/** Thousands of operations back to back, random ones from one seed, with random pauses of this rank. */
export async function marathon(args: { count: number; seed: number; pauses: boolean }): Promise<{ digest: string }> {
  const group = await createGroup({ slotBytes: 1024, chunkBytes: 128, timeoutMs: 20_000 })
  const hash = createHash('sha256')
  let state = args.seed
  const next = (limit: number): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * limit)
  }
  const tensor = group.alloc('f32', [100])
  const { rank, worldSize } = group
  try {
    for (let turn = 0; turn < args.count; turn++) {
      const kind = next(5)
      const count = next(100)
      const root = next(worldSize)

      if (args.pauses && Math.random() < 0.02) await sleep(Math.random() * 3)
      if (kind === 0) {
        const data = new Float32Array(count)
        fill(data, rank, turn)
        await group.allReduce(data, { algorithm: turn % 2 === 0 ? 'twoShot' : 'oneShot' })
        check(data, worldSize, turn, `turn ${String(turn)}`)
        hash.update(data)
      } else if (kind === 1) {
        fill(tensor.data, rank, turn)
        group.allReduceSync(tensor, { algorithm: turn % 3 === 0 ? 'twoShotInPlace' : 'auto' })
        check(tensor.data, worldSize, turn, `turn ${String(turn)}`)
        hash.update(tensor.data)
      } else if (kind === 2) {
        const data = Float32Array.from({ length: count }, (_, i) => (rank === root ? input(root, i, turn) : NaN))
        group.broadcastSync(data, { root })
        if (!data.every((value, i) => value === input(root, i, turn)))
          throw new Error(`turn ${String(turn)}: broadcast`)
        hash.update(data)
      } else if (kind === 3) {
        const data = Float32Array.of(rank + turn)
        const all = new Float32Array(worldSize)
        group.allGatherSync(data, all)
        if (!all.every((value, i) => value === i + turn)) throw new Error(`turn ${String(turn)}: allGather`)
        hash.update(all)
      } else {
        group.barrierSync()
      }
    }
  } finally {
    await group.close()
  }
  return { digest: hash.digest('hex') }
}

/** Several pending at once, settled in order; a Sync call in between is refused. */
export async function pending(): Promise<{ order: number[]; code: string; values: number[] }> {
  const group = await createGroup()
  if (group.rank === 1) await sleep(150)
  const order: number[] = []
  const arrays = [1, 2, 3, 4].map((value) => new Float32Array(1000).fill(value))
  const all = arrays.map(async (data, i) => {
    await group.allReduce(data)
    order.push(i)
  })
  let code = 'none'
  if (group.rank === 0) {
    try {
      group.barrierSync()
    } catch (error) {
      code = error instanceof CollectiveError ? error.code : String(error)
    }
  }
  let ticks = 0
  const timer = setInterval(() => ticks++, 10)
  await Promise.all(all)
  clearInterval(timer)
  // The event loop went on while rank 1 was late.
  if (group.rank === 0 && ticks < 5) throw new Error(`the event loop was held: ${String(ticks)} ticks`)
  await group.close()
  return { order, code, values: arrays.map((data) => data[999] ?? NaN) }
}

/** Two groups, freely mixed, with operations of one pending in the other's. */
export async function twoGroups(): Promise<{ values: number[] }> {
  const [a, b] = await Promise.all([createGroup(), createGroup({ slotBytes: 4096 })])
  const values: number[] = []
  for (let turn = 0; turn < 50; turn++) {
    const x = Float32Array.of(turn)
    const y = Float32Array.of(turn * 2)
    const first = a.allReduce(x)
    b.allReduceSync(y)
    await first
    values.push(x[0] ?? NaN, y[0] ?? NaN)
  }
  await a.close()
  const z = Float32Array.of(5)
  b.allReduceSync(z)
  await b.close()
  const c = await createGroup()
  c.barrierSync()
  await c.close()
  return { values: [...values, z[0] ?? NaN] }
}

/** Settles what an operation throws into plain data. */
async function failureOf(run: () => unknown): Promise<Record<string, unknown>> {
  const start = performance.now()
  try {
    await run()
  } catch (error) {
    const elapsed = performance.now() - start
    if (error instanceof CollectiveError) return { ...error, cause: undefined, message: error.message, tookMs: elapsed }
    return { code: 'other', message: String(error), tookMs: elapsed }
  }
  return { code: 'nothing thrown' }
}

function say(message: unknown): void {
  process.send?.({ kind: 'say', value: message })
}

/** Rank `victim` says that it is ready and then does nothing; the others wait for it in an operation, and once more after. */
export async function waitForVictim(args: {
  victim: number
  form: 'sync' | 'async'
  timeoutMs: number
}): Promise<{ first: unknown; second: unknown; afterClose: unknown }> {
  const group = await createGroup({ timeoutMs: args.timeoutMs })
  group.barrierSync()
  if (group.rank === args.victim) {
    say('ready')
    await sleep(60_000)
  }
  const data = new Float32Array(10)
  const first = await failureOf(() => (args.form === 'sync' ? group.allReduceSync(data) : group.allReduce(data)))
  const second = await failureOf(() => group.allReduce(data))
  await group.close()
  const afterClose = await failureOf(() => group.barrier())
  return { first, second, afterClose }
}

/** Rank 1 ends in a way of its own while the others wait. */
export async function earlyEnd(args: { how: 'close' | 'exit' | 'throw' }): Promise<{ failure: unknown }> {
  const group = await createGroup()
  group.barrierSync()
  if (group.rank === 1) {
    if (args.how === 'close') {
      await group.close()
      return { failure: 'closed' }
    }
    if (args.how === 'exit') process.exit(0)
    setImmediate(() => {
      throw new Error('on purpose')
    })
    await sleep(10_000)
  }
  const failure = await failureOf(() => group.allReduce(new Float32Array(4)))
  await group.close()
  return { failure }
}

/** An orderly end of one rank hurts nobody who does not wait for it. */
export async function orderlyEnd(): Promise<{ sum: number }> {
  const group = await createGroup()
  const data = Float32Array.of(1)
  group.allReduceSync(data)
  if (group.rank === 0) await sleep(200)
  await group.close()
  await group.close()
  return { sum: data[0] ?? NaN }
}

export async function mismatch(args: { kind: string }): Promise<{ failure: unknown }> {
  const group = await createGroup({ timeoutMs: 5000 })
  const odd = group.rank === group.worldSize - 1
  const run = (): unknown => {
    switch (args.kind) {
      case 'count':
        return group.allReduceSync(new Float32Array(odd ? 3 : 4))
      case 'dtype':
        return odd
          ? group.allReduceSync(new Uint16Array(4), { dtype: 'bf16' })
          : group.allReduceSync(new Float32Array(4))
      case 'operation':
        if (odd) group.barrierSync()
        else group.allReduceSync(new Float32Array(4))
        return undefined
      case 'root':
        return group.broadcastSync(new Float32Array(4), { root: odd ? group.rank : 0 })
      case 'op':
        return group.allReduceSync(new Int32Array(4), { op: odd ? 'max' : 'sum' })
      case 'algorithm':
        return group.allReduceSync(new Float32Array(4), { algorithm: odd ? 'twoShot' : 'oneShot' })
      case 'counts':
        // What rank 0 sends to the last one is not what that one expects; the others could go on.
        return group.allToAllSync(new Float32Array(6), new Float32Array(odd ? 7 : 6), {
          counts: [2, 2, 2],
          outputCounts: odd ? [3, 2, 2] : [2, 2, 2],
        })
      case 'output': {
        const [a, b, c] = [0, 1, 2].map(() => group.alloc('f32', [4096]))
        if (a === undefined || b === undefined || c === undefined) return undefined
        return group.allReduceSync(a, { output: odd ? c : b })
      }
      case 'alloc':
        return group.allReduceSync(group.alloc('f32', odd ? [8] : [4]))
      case 'broadcastAgainstAllReduce':
        return odd ? group.allReduceSync(new Float32Array(4)) : group.broadcastSync(new Float32Array(4), { root: 1 })
      default:
        throw new Error(`no such kind: ${args.kind}`)
    }
  }
  let failure = await failureOf(run)
  // A root of a broadcast, which waits for nobody, learns it by its next call.
  if (failure['code'] === 'nothing thrown') failure = await failureOf(() => group.barrierSync())
  await group.close()
  return { failure }
}

/** Joining alone. */
export async function join(args: { timeoutMs: number; slotBytes?: number[] }): Promise<{ failure: unknown }> {
  const rank = Number(process.env['RANK'])
  const slotBytes = args.slotBytes?.[rank]
  const failure = await failureOf(async () => {
    const group = await createGroup({ timeoutMs: args.timeoutMs, ...(slotBytes === undefined ? {} : { slotBytes }) })
    await group.close()
  })
  return { failure }
}

/** Rank 0 aborts by a signal what it waits for; rank 1 meanwhile waits too, for rank 2, which comes late. */
export async function abortBySignal(args: { isEarly: boolean }): Promise<{ failure: unknown; isReason: boolean }> {
  const group = await createGroup()
  group.barrierSync()
  if (group.rank === group.worldSize - 1) await sleep(600)
  const controller = new AbortController()
  const reason = new Error('the user pressed stop')
  let isReason = false
  const failure = await failureOf(async () => {
    if (group.rank !== 0) return group.allReduce(new Float32Array(100))
    if (args.isEarly) controller.abort(reason)
    else setTimeout(() => controller.abort(reason), 100)
    try {
      return await group.allReduce(new Float32Array(100), { signal: controller.signal })
    } catch (error) {
      isReason = error === reason
      throw error
    }
  })
  await group.close()
  return { failure, isReason }
}

/** Many operations of an oversubscribed group: ranks outnumber cores, so that waits sleep at once. */
export async function crowd(args: { count: number }): Promise<{ spinUs: number; sum: number }> {
  const group: Group = await createGroup()
  const data = new Float32Array(64)
  for (let turn = 0; turn < args.count; turn++) {
    data.fill(1)
    group.allReduceSync(data)
  }
  await group.close()
  return { spinUs: group.spinUs, sum: data[63] ?? NaN }
}

/** Closing detaches; nothing dangles. */
export async function closing(): Promise<{ lengthAfter: number; codes: unknown[]; sharedIsGone: boolean }> {
  const group = await createGroup()
  const tensor = group.alloc('f32', [1 << 16])
  tensor.data.fill(group.rank + 1)
  await group.allReduce(tensor, { algorithm: 'twoShotInPlace' })
  const closes = [group.close(), group.close()]
  const codes = [await failureOf(() => group.barrierSync()).then((f) => f['code'])]
  await Promise.all(closes)
  codes.push((await failureOf(() => group.allReduce(tensor)))['code'])
  codes.push((await failureOf(() => group.alloc('f32', [1])))['code'])
  codes.push((await failureOf(() => tensor.toFloat32()))['code'])
  return { lengthAfter: tensor.data.length, codes, sharedIsGone: tensor.data.buffer.byteLength === 0 }
}

/** Every reduction of every dtype; a digest each. */
export async function reductions(args: { counts: number[] }): Promise<{ digests: string[] }> {
  const group = await createGroup({ slotBytes: 8192, chunkBytes: 4096, timeoutMs: 20_000 })
  const digests: string[] = []
  let seed = 0
  try {
    for (const dtype of [...floatDTypes, ...integerDTypes]) {
      const ops = floatDTypes.includes(dtype as 'f32') ? floatOps : integerOps
      for (const count of args.counts) {
        const tensor = group.alloc(dtype, [count])
        for (const op of ops) {
          for (const kind of ['tensor', 'plain'] as const) {
            seed += 1000
            const sources = Array.from({ length: group.worldSize }, (_, rank) => elements(dtype, count, seed + rank))
            const own = (sources[group.rank] ?? new Uint8Array()).slice()
            const data: TypedArray = kind === 'tensor' ? tensor.data : own
            if (kind === 'tensor') new Uint8Array(tensor.data.buffer).set(new Uint8Array(own.buffer))
            const given = kind === 'tensor' ? tensor : own
            if (seed % 2000 === 0) group.allReduceSync(given, { op, dtype })
            else await group.allReduce(given, { op, dtype })
            const want = bytesOf(reduced(dtype, op, sources))
            const have = bytesOf(data)
            const wrong = have.findIndex((byte, i) => byte !== want[i])
            if (wrong >= 0) {
              const i = Math.floor(wrong / data.BYTES_PER_ELEMENT)
              const all = sources.map((source) => String(source[i])).join(', ')
              throw new Error(
                `${op} of ${String(count)} ${dtype} (${kind}): element ${String(i)} is ${String(data[i])} of ${all}`,
              )
            }
            digests.push(digest(data))
          }
        }
      }
    }
  } finally {
    await group.close()
  }
  return { digests }
}

/** allReduce into an output: tensors and arrays, every algorithm; data stays, and so does what lies beside the output. */
export async function apart(args: { counts: number[] }): Promise<{ digests: string[] }> {
  const group = await createGroup({ slotBytes: 8192, chunkBytes: 4096, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  const digests: string[] = []
  let seed = 0
  try {
    for (const dtype of ['f32', 'bf16', 'i64'] as const) {
      for (const count of args.counts) {
        const tensors = [group.alloc(dtype, [count]), group.alloc(dtype, [count])] as const
        for (const [from, to] of ['tt', 'ta', 'at', 'aa'].map(([a, b]) => [a === 't', b === 't'] as const)) {
          const choices: AllReduceAlgorithm[] = ['auto', 'oneShot', 'twoShot']
          if (from && to) choices.push('twoShotInPlace')
          for (const algorithm of choices) {
            for (const form of ['sync', 'async'] as const) {
              seed += 100
              const what = `${dtype} x ${String(count)} from a ${from ? 'tensor' : 'array'} to a ${to ? 'tensor' : 'array'}, ${algorithm}, ${form}`
              const sources = Array.from({ length: worldSize }, (_, r) => elements(dtype, count, seed + r))
              const own = elements(dtype, count, seed + rank)
              if (from) bytesOf(tensors[0].data).set(bytesOf(own))
              const data = from ? tensors[0] : own
              const around = elements(dtype, count + 2, seed + 50)
              const output = to ? tensors[1] : around.subarray(1, count + 1)
              const op = seed % 300 === 0 ? 'max' : 'sum'
              const options = { algorithm, dtype, op, output } as const
              const same = form === 'sync' ? group.allReduceSync(data, options) : await group.allReduce(data, options)
              // The others are through with this rank's data too: what is written from here on is nobody's input.
              const have = (to ? tensors[1].data : output) as TypedArray
              if (same !== output) throw new Error(`${what}: something else came back`)
              expectSame(what, bytesOf(have), bytesOf(reduced(dtype, op, sources)))
              expectSame(
                `data of ${what}`,
                bytesOf(from ? tensors[0].data : own),
                bytesOf(elements(dtype, count, seed + rank)),
              )
              const beside = elements(dtype, count + 2, seed + 50)
              for (const i of [0, count + 1]) expectSame(`beside the output of ${what}`, around[i], beside[i])
              digests.push(digest(have))
              if (from) bytesOf(tensors[0].data).fill(7)
            }
          }
        }
      }
    }
  } finally {
    await group.close()
  }
  return { digests }
}

/** Every operation on parts, in place and out of it, with parts alike and of any sizes; a digest of what this rank got. */
export async function parts(args: { counts: number[]; chunkBytes: number }): Promise<{ checked: number }> {
  const group = await createGroup({ slotBytes: 8192, chunkBytes: args.chunkBytes, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  let checked = 0
  let seed = 0
  const expect = (what: string, have: TypedArray, want: TypedArray): void => {
    checked++
    if (!Buffer.from(bytesOf(have)).equals(Buffer.from(bytesOf(want))))
      throw new Error(`${what}: other bytes than expected`)
  }
  try {
    for (const dtype of ['f32', 'bf16', 'u8', 'i64'] as const) {
      for (const count of args.counts) {
        for (const isAlike of [true, false]) {
          for (const form of ['sync', 'async'] as const) {
            seed += 100
            const root = seed % worldSize
            const what = `${dtype} x ${String(count)}, ${isAlike ? 'alike' : 'any sizes'}, ${form}`
            const counts = Array.from({ length: worldSize }, (_, r) => (isAlike ? count : (count * (r + 1)) % 97))
            const begins = counts.map((_, r) => counts.slice(0, r).reduce((a, b) => a + b, 0))
            const total = counts.reduce((a, b) => a + b, 0)
            const begin = begins[rank] ?? 0
            const own = counts[rank] ?? 0
            const options = isAlike ? { dtype } : { dtype, counts }
            const isRoot = rank === root
            const wholes = Array.from({ length: worldSize }, (_, r) => elements(dtype, total, seed + r))
            const mine = wholes[rank] ?? new Uint8Array()
            const blank = (length: number): TypedArray => elements(dtype, length, seed + 50)
            const partOf = (r: number): TypedArray =>
              (wholes[r] ?? mine).slice(begins[r], (begins[r] ?? 0) + (counts[r] ?? 0))
            const joined = blank(total)
            for (let r = 0; r < worldSize; r++) joined.set(partOf(r) as never, begins[r])
            const sum = reduced(dtype, 'sum', wholes)

            // gather and allGather, out of place and with the part in its place
            const output = blank(total)
            const gathered = isRoot ? output : undefined
            if (form === 'sync') group.gatherSync(partOf(rank), gathered, { ...options, root })
            else await group.gather(partOf(rank), gathered, { ...options, root })
            if (isRoot) expect(`gather of ${what}`, output, joined)
            else expect(`gather elsewhere of ${what}`, output, blank(total))
            const all = blank(total)
            const place = all.subarray(begin, begin + own)
            place.set(partOf(rank) as never)
            if (form === 'sync') group.allGatherSync(place, all, options)
            else await group.allGather(place, all, options)
            expect(`allGather of ${what}`, all, joined)

            // scatter
            const scattered = blank(own)
            const whole = wholes[root] ?? mine
            if (form === 'sync') group.scatterSync(isRoot ? whole : undefined, scattered, { ...options, root })
            else await group.scatter(isRoot ? whole : undefined, scattered, { ...options, root })
            expect(`scatter of ${what}`, scattered, whole.slice(begin, begin + own))

            // reduceScatter and reduce
            const input = mine.slice()
            const share = seed % 200 === 0 ? blank(own) : input.subarray(begin, begin + own)
            if (form === 'sync') group.reduceScatterSync(input, share, options)
            else await group.reduceScatter(input, share, options)
            expect(`reduceScatter of ${what}`, share, sum.slice(begin, begin + own))
            const data = mine.slice()
            if (form === 'sync') group.reduceSync(data, { dtype, root })
            else await group.reduce(data, { dtype, root })
            expect(`reduce of ${what}`, data, isRoot ? sum : mine)

            const result = blank(total)
            const into = isRoot ? { dtype, root, output: result } : { dtype, root }
            const reducedInto = form === 'sync' ? group.reduceSync(mine, into) : await group.reduce(mine, into)
            if (reducedInto !== (isRoot ? result : mine)) throw new Error('reduce returned something else')
            expect(`reduce into an output of ${what}`, result, isRoot ? sum : blank(total))
            expect(`data of a reduce into an output of ${what}`, mine, elements(dtype, total, seed + rank))

            // allToAll
            if (!isAlike) {
              const sizeOf = (from: number, to: number): number => (count * (from + 2) * (to + 1) + seed) % 97
              const list = (size: (r: number) => number): number[] =>
                Array.from({ length: worldSize }, (_, r) => size(r))
              const sizes = { counts: list((r) => sizeOf(rank, r)), outputCounts: list((r) => sizeOf(r, rank)), dtype }
              const sumOf = (list: readonly number[]): number => list.reduce((a, b) => a + b, 0)
              const wholeOf = (r: number): TypedArray =>
                elements(dtype, sumOf(list((to) => sizeOf(r, to))), seed + 60 + r)
              const want = list((from) => from).map((from) => {
                const begin = sumOf(list((to) => (to < rank ? sizeOf(from, to) : 0)))
                return bytesOf(wholeOf(from).slice(begin, begin + sizeOf(from, rank)))
              })
              const received = blank(sumOf(sizes.outputCounts))
              if (form === 'sync') group.allToAllSync(wholeOf(rank), received, sizes)
              else await group.allToAll(wholeOf(rank), received, sizes)
              expect(`allToAll of ${what}`, received, Buffer.concat(want))
              continue
            }
            const received = seed % 200 === 0 ? blank(total) : mine.slice()
            const sent = seed % 200 === 0 ? mine : received
            if (form === 'sync') group.allToAllSync(sent, received, { dtype })
            else await group.allToAll(sent, received, { dtype })
            const want = blank(total)
            for (let r = 0; r < worldSize; r++)
              want.set((wholes[r] ?? mine).slice(rank * count, (rank + 1) * count) as never, r * count)
            expect(`allToAll of ${what}`, received, want)
          }
        }
      }
    }
  } finally {
    await group.close()
  }
  return { checked }
}

/**
 * Ranks of which some have tensors and others typed arrays, around every size from which data is read where it lies. Inputs are overwritten as
 * soon as a call has ended: whoever still read them would get other values.
 */
export async function fromTensors(args: { counts: number[]; chunkBytes: number }): Promise<{ checked: number }> {
  const group = await createGroup({ slotBytes: 1 << 20, chunkBytes: args.chunkBytes, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  const ranks = Array.from({ length: worldSize }, (_, r) => r)
  const value = (from: number, part: number, turn: number): number => 1 + from + 10 * part + 100 * (turn % 7)
  let checked = 0
  try {
    for (const count of args.counts) {
      const tensors = [1, worldSize].map((parts) => ranks.map(() => group.alloc('f32', [count * parts])))
      const arrays = [1, worldSize].map((parts) => ranks.map(() => new Float32Array(count * parts)))
      let salt = count
      for (let turn = 0; turn < 24; turn++) {
        salt = (Math.imul(salt, 1664525) + 1013904223) >>> 0
        // All tensors, none, or as it comes: every rank draws for all, so that ranks may use different ones.
        const draws = ranks.map((r) => (turn % 3 === 0 ? 3 : turn % 3 === 1 ? 0 : (salt >>> (8 + 2 * r)) & 3))
        const draw = draws[rank] ?? 0
        const isRoot = rank === turn % worldSize
        const root = turn % worldSize
        const op = (['broadcast', 'reduce', 'gather', 'scatter', 'allGather', 'reduceScatter', 'allToAll'] as const)[
          (turn + (salt >>> 28)) % 7
        ]
        const hasWholeData = op === 'scatter' || op === 'reduceScatter' || op === 'allToAll'
        const hasWholeOutput = op === 'gather' || op === 'allGather' || op === 'allToAll'
        const data = (draw & 1 ? tensors : arrays)[hasWholeData ? 1 : 0]?.[0]
        const output = (draw & 2 ? tensors : arrays)[hasWholeOutput ? 1 : 0]?.[1 % worldSize]
        if (data === undefined || output === undefined) throw new Error('no memory')
        const viewOf = (memory: typeof data): Float32Array => (memory instanceof Tensor ? memory.data : memory)
        const [input, out] = [viewOf(data), viewOf(output)]
        for (let part = 0; part < (hasWholeData ? worldSize : 1); part++)
          input.fill(value(rank, part, turn), part * count, (part + 1) * count)
        if (worldSize > 1) out.fill(-1)
        if (op === 'broadcast') group.broadcastSync(data, { root })
        else if (op === 'reduce') group.reduceSync(data, { root })
        else if (op === 'gather') group.gatherSync(data, isRoot ? output : undefined, { root })
        else if (op === 'scatter') group.scatterSync(isRoot ? data : undefined, output, { root })
        else if (op === 'allGather') group.allGatherSync(data, output)
        else if (op === 'reduceScatter') await group.reduceScatter(data, output)
        else if (turn % 2 === 0) group.allToAllSync(data, output)
        else await group.allToAll(data, output)
        const result = (op === 'broadcast' || op === 'reduce' ? input : out).slice()
        input.fill(-2)
        const sum = (part: number): number => ranks.reduce((total, r) => total + value(r, part, turn), 0)
        const expected =
          op === 'broadcast'
            ? [value(root, 0, turn)]
            : op === 'reduce'
              ? [isRoot ? sum(0) : value(rank, 0, turn)]
              : op === 'gather'
                ? isRoot
                  ? ranks.map((r) => value(r, 0, turn))
                  : []
                : op === 'scatter'
                  ? [value(root, rank, turn)]
                  : op === 'allGather'
                    ? ranks.map((r) => value(r, 0, turn))
                    : op === 'reduceScatter'
                      ? [sum(rank)]
                      : ranks.map((r) => value(r, rank, turn))
        expected.forEach((wanted, part) => {
          checked++
          if (!result.subarray(part * count, (part + 1) * count).every((found) => found === wanted))
            throw new Error(`turn ${String(turn)}, ${op ?? ''} of ${String(count)}: part ${String(part)} is wrong`)
        })
      }
    }
  } finally {
    await group.close()
  }
  return { checked }
}

function expectSame(what: string, have: unknown, want: unknown): void {
  if (!isDeepStrictEqual(have, want)) throw new Error(`${what}: ${inspect(have)} instead of ${inspect(want)}`)
}

/** Objects between ranks, with other calls between them that nobody waits for: what comes back must be in order and whole. */
export async function objects(): Promise<unknown> {
  const group = await createGroup({ slotBytes: 4096, chunkBytes: 4096, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  const valueOf = (r: number): unknown => ({
    rank: r,
    text: 'ä'.repeat(r * 5000),
    map: new Map([[1, new Set([r])]]),
    date: new Date(r),
    large: 2n ** 60n + BigInt(r),
    bytes: Uint8Array.of(r, 1),
    nothing: null,
  })
  try {
    const sums: Float32Array[] = []
    const pending: Promise<unknown>[] = []
    const sum = (): void => {
      const data = Float32Array.of(rank + sums.length)
      sums.push(data)
      pending.push(group.allReduce(data))
    }
    const root = worldSize - 1
    sum()
    const all = group.allGatherObject(valueOf(rank))
    sum()
    sum()
    const one = group.broadcastObject(rank === root ? valueOf(root) : undefined, { root })
    const gathered = group.gatherObject(valueOf(rank), { root })
    sum()
    const busy = await failureOf(() => group.barrierSync())
    const results = [await all, await one, await gathered]
    await Promise.all(pending)
    group.barrierSync()
    results.push(group.allGatherObjectSync(valueOf(rank)))
    results.push(group.broadcastObjectSync(rank === root ? valueOf(root) : undefined, { root }))
    results.push(group.gatherObjectSync(valueOf(rank), { root, timeoutMs: 10_000 }))
    const last = group.allGatherObject(undefined)
    await group.close()
    const expected = Array.from({ length: worldSize }, (_, r) => valueOf(r))
    const all3 = [expected, valueOf(root), rank === root ? expected : undefined]
    expectSame('objects', results, [...all3, ...all3])
    expectSame(
      'objects before close()',
      await last,
      expected.map(() => undefined),
    )
    const base = (worldSize * (worldSize - 1)) / 2
    expectSame(
      'the sums between',
      sums.map(([x]) => x),
      sums.map((_, i) => base + worldSize * i),
    )
    return busy['code']
  } finally {
    await group.close()
  }
}
