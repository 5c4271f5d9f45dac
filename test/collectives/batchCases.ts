// What the ranks of batch.test.ts run: batches of random operations, each held against its result alone, worked out apart.

import { CollectiveError, createGroup, type Batch, type TypedArray } from '../../collectives/index.js'
import { elements, floatDTypes, floatOps, integerOps, reduced } from './reductions.js'

const bytesOf = (data: TypedArray): Buffer => Buffer.from(data.buffer, data.byteOffset, data.byteLength)

async function failureOf(run: () => unknown): Promise<Record<string, unknown>> {
  try {
    await run()
  } catch (error) {
    if (error instanceof CollectiveError) return { ...error, cause: undefined, message: error.message }
    return { code: 'other', message: String(error) }
  }
  return { code: 'nothing thrown' }
}

/** Batches of `length` operations of up to `most` elements; some are too large to be packed. How many results were compared. */
export async function random(args: { seed: number; batches: number; length: number; most: number }): Promise<number> {
  const group = await createGroup({ slotBytes: 8192, chunkBytes: 4096, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  let state = args.seed
  const next = (limit: number): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * limit)
  }
  const tensors = [group.alloc('f32', [args.most]), group.alloc('f32', [args.most])] as const
  const all = Array.from({ length: worldSize }, (_, r) => r)
  let checked = 0
  try {
    for (let turn = 0; turn < args.batches; turn++) {
      const calls: ((batch: Batch) => void)[] = []
      const checks: (() => void)[] = []
      const expect = (what: string, have: TypedArray, want: TypedArray): void => {
        checks.push(() => {
          checked++
          if (!bytesOf(have).equals(bytesOf(want)))
            throw new Error(`batch ${String(turn)}: ${what} has other bytes than expected`)
        })
      }
      const freeTensors = [...tensors]
      for (let i = 0; i < args.length; i++) {
        const seed = (turn * 1000 + i) * 1000
        const kind = next(9)
        const dtype = (['f32', 'bf16', 'u8', 'i64', 'f64'] as const)[next(5)] ?? 'f32'
        const isFloat = floatDTypes.includes(dtype as 'f32')
        const op = isFloat ? floatOps[next(floatOps.length)] : integerOps[next(integerOps.length)]
        const root = next(worldSize)
        const isRoot = rank === root
        const count = next(args.most + 1)
        const isApart = next(2) === 0
        const counts = all.map(() => next(count + 1))
        const areAlike = next(2) === 0
        const sizes = areAlike ? all.map(() => count) : counts
        const begins = sizes.map((_, r) => sizes.slice(0, r).reduce((a, b) => a + b, 0))
        const total = sizes.reduce((a, b) => a + b, 0)
        const begin = begins[rank] ?? 0
        const own = sizes[rank] ?? 0
        const options = areAlike ? { dtype } : { dtype, counts }
        const input = (r: number, length: number): TypedArray => elements(dtype, length, seed + r)
        const blank = (length: number): TypedArray => elements(dtype, length, seed + 500)
        const what = `operation ${String(i)}, kind ${String(kind)}, ${String(count)} ${dtype}`
        if (kind <= 1) {
          const tensor = kind === 1 ? freeTensors.pop() : undefined
          if (tensor !== undefined) {
            // As much of it as there is: a tensor takes part whole.
            const data = elements('f32', args.most, seed + rank)
            bytesOf(tensor.data).set(bytesOf(data))
            calls.push((b) => b.allReduce(tensor, { op: 'sum' }))
            expect(
              what,
              tensor.data,
              reduced(
                'f32',
                'sum',
                all.map((r) => elements('f32', args.most, seed + r)),
              ),
            )
            continue
          }
          const data = input(rank, count)
          const output = blank(count)
          const want = reduced(
            dtype,
            op ?? 'sum',
            all.map((r) => input(r, count)),
          )
          const choice = { dtype, ...(op === undefined ? {} : { op }) }
          calls.push((b) => b.allReduce(data, isApart ? { ...choice, output } : choice))
          expect(what, isApart ? output : data, want)
          if (isApart) expect(`data of ${what}`, data, input(rank, count))
        } else if (kind === 2) {
          const data = input(rank, count)
          const output = blank(count)
          const want = reduced(
            dtype,
            'sum',
            all.map((r) => input(r, count)),
          )
          calls.push((b) => b.reduce(data, isApart && isRoot ? { dtype, root, output } : { dtype, root }))
          expect(what, isApart && isRoot ? output : data, isRoot ? want : input(rank, count))
        } else if (kind === 3) {
          const data = isRoot ? input(root, count) : blank(count)
          calls.push((b) => b.broadcast(data, { dtype, root }))
          expect(what, data, input(root, count))
        } else if (kind === 4 || kind === 5) {
          const output = blank(total)
          const place = output.subarray(begin, begin + own)
          const data = isApart ? input(rank, own) : place
          if (!isApart) place.set(input(rank, own) as never)
          const untouched = output.slice()
          const want = blank(total)
          for (const r of all) want.set(input(r, sizes[r] ?? 0) as never, begins[r])
          if (kind === 4) calls.push((b) => b.allGather(data, output, options))
          else calls.push((b) => b.gather(data, isRoot ? output : undefined, { ...options, root }))
          expect(what, output, kind === 4 || isRoot ? want : untouched)
        } else if (kind === 6) {
          const output = blank(own)
          const data = isRoot ? input(root, total) : undefined
          calls.push((b) => b.scatter(data, output, { ...options, root }))
          expect(what, output, input(root, total).slice(begin, begin + own))
        } else if (kind === 7) {
          const data = input(rank, total)
          const output = isApart ? blank(own) : data.subarray(begin, begin + own)
          const want = reduced(
            dtype,
            'sum',
            all.map((r) => input(r, total)),
          )
          calls.push((b) => b.reduceScatter(data, output, options))
          expect(what, output, want.slice(begin, begin + own))
        } else {
          const length = count * worldSize
          const data = input(rank, length)
          const output = isApart ? blank(length) : data
          const want = blank(length)
          for (const r of all) want.set(input(r, length).slice(rank * count, (rank + 1) * count) as never, r * count)
          calls.push((b) => b.allToAll(data, output, { dtype }))
          expect(what, output, want)
          calls.push((b) => b.barrier())
        }
      }
      const record = (batch: Batch): void => {
        for (const call of calls) call(batch)
      }
      if (turn % 2 === 0) group.batchSync(record)
      else {
        // Among other calls that nobody waits for.
        const sums = [Float32Array.of(rank), Float32Array.of(rank)] as const
        const pending = [group.allReduce(sums[0]), group.batch(record), group.allReduce(sums[1])]
        await Promise.all(pending)
        for (const [sum] of sums)
          if (sum !== (worldSize * (worldSize - 1)) / 2) throw new Error(`a sum is ${String(sum)}`)
      }
      for (const check of checks) check()
    }
  } finally {
    await group.close()
  }
  return checked
}

export async function disagree(args: { kind: string }): Promise<{ failure: unknown }> {
  const group = await createGroup({ timeoutMs: 5000 })
  const odd = group.rank === group.worldSize - 1
  const failure = await failureOf(() => {
    group.batchSync((b) => {
      b.allReduce(new Float32Array(4))
      if (args.kind === 'count') b.broadcast(new Float32Array(odd ? 5 : 4))
      else if (args.kind === 'dtype') b.allReduce(odd ? new Int32Array(4) : new Float32Array(4))
      else if (args.kind === 'op') b.allReduce(new Float32Array(4), { op: odd ? 'max' : 'sum' })
      else if (args.kind === 'root') b.broadcast(new Float32Array(4), { root: odd ? 1 : 0 })
      else if (args.kind === 'large') b.allReduce(new Float32Array(odd ? 100_001 : 100_000))
      else if (args.kind === 'order') {
        if (odd) b.barrier()
        b.broadcast(new Float32Array(4))
        if (!odd) b.barrier()
      } else if (odd) b.allReduce(new Float32Array(4))
    })
  })
  await group.close()
  return { failure }
}

/** Microseconds of 32 allReduces of 64 bytes, one by one and as a batch: the best of several rounds each. */
export async function cost(): Promise<{ alone: number; batch: number }> {
  const group = await createGroup()
  const arrays = Array.from({ length: 32 }, () => new Float32Array(16))
  const best = { alone: Infinity, batch: Infinity }
  const alone = (): void => {
    for (const data of arrays) group.allReduceSync(data)
  }
  const batch = (): void => {
    group.batchSync((b) => {
      for (const data of arrays) b.allReduce(data)
    })
  }
  for (let round = 0; round < 10; round++) {
    for (const [name, run] of [
      ['alone', alone],
      ['batch', batch],
    ] as const) {
      group.barrierSync()
      const start = performance.now()
      for (let i = 0; i < 20; i++) run()
      best[name] = Math.min(best[name], ((performance.now() - start) * 1000) / 20)
    }
  }
  await group.close()
  return best
}
