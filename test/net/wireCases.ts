// What ranks do in wire.test.ts, see test/ranks.ts.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import process from 'node:process'
import { createGroup, type GroupOptions, type Tensor } from '../../collectives/index.js'

const { fround } = Math
const groupLength = 32
const largest = fround(3.4028234663852886e38)

/** To the nearest whole number, ties to even; callers add 0, as int8 has no -0. */
function roundEven(x: number): number {
  const below = Math.floor(x)
  const rest = x - below
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below
}

/** What others see of these f32 values: the definition of Q8, group by group. */
function throughQ8(values: Float32Array): Float32Array {
  const seen = new Float32Array(values.length)
  for (let begin = 0; begin < values.length; begin += groupLength) {
    const group = values.subarray(begin, begin + groupLength)
    const most = Math.max(...group.map(Math.abs))
    // 127 times this is the largest float.
    const scaleMost = fround(8454659 * 2 ** 98)
    const scale = Math.min(scaleMost, Math.max(2 ** -126, fround(most / 127)))
    const inverse = fround(1 / scale)
    group.forEach((x, i) => {
      seen[begin + i] = Number.isFinite(most) ? fround((roundEven(fround(x * inverse)) + 0) * scale) : NaN
    })
  }
  return seen
}

/** f32 sums, one array after the other. */
function added(arrays: readonly Float32Array[]): Float32Array {
  const [first = new Float32Array(), ...rest] = arrays
  const sum = first.slice()
  for (const array of rest) array.forEach((x, i) => (sum[i] = (sum[i] ?? 0) + x))
  return sum
}

/** Values of several magnitudes, and groups of which each is a special case. */
function inputOf(rank: number, length: number): Float32Array {
  let state = (rank + 1) * 2654435761 + 1
  const values = Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state / 2 ** 31 - 1) * 2 ** ((state >>> 3) % 8)
  })
  const fill = (group: number, value: (i: number) => number): void => {
    for (let i = 0; i < groupLength; i++) values[group * groupLength + i] = value(i)
  }
  fill(special.zeros, () => 0)
  fill(special.huge, (i) => (rank === 0 ? (i % 2 === 0 ? largest : -largest / (i + 1)) : 0))
  fill(special.denormal, (i) => i * 2 ** -149)
  fill(special.tiny, (i) => (i - 16) * 2 ** -126)
  if (rank === 1) values[special.nan * groupLength + 7] = NaN
  if (rank === 0) values[special.infinite * groupLength + 31] = -Infinity
  return values
}
const special = { zeros: 3, huge: 5, denormal: 7, tiny: 9, nan: 11, infinite: 13 }

const digestOf = ({ data }: Tensor): string =>
  createHash('sha256')
    .update(Buffer.from(data.buffer, data.byteOffset, data.byteLength))
    .digest('hex')
    .slice(0, 16)

/** Every algorithm, dtype and op against the definition, bit by bit, and sums against float64; what comes out is for the comparison of the ranks. */
export async function quantised(args: {
  counts: number[]
  secret: string
}): Promise<{ digests: string[]; wire: string }> {
  const group = await createGroup({ frameBytes: 4096, slotBytes: 16_384, wire: 'q8', secret: args.secret })
  try {
    const { worldSize, nodes, rank } = group
    const digests: string[] = []
    for (const count of args.counts) {
      for (const dtype of ['f32', 'bf16', 'f16'] as const) {
        const data = group.alloc(dtype, [count])
        const expected = group.alloc(dtype, [count])
        const inputs = Array.from({ length: worldSize }, (_, other) => {
          data.set(inputOf(other, count))
          return data.toFloat32()
        })
        const partials = nodes.map((ranks) => added(ranks.map((other) => inputs[other] ?? new Float32Array())))
        for (const op of ['sum', 'avg'] as const) {
          const sums = added(partials.map(throughQ8))
          const once = op === 'avg' ? sums.map((x) => fround(x / worldSize)) : sums
          for (const algorithm of ['leader', 'splitRail', 'twoStep'] as const) {
            data.set(inputs[rank] ?? new Float32Array())
            await group.allReduce(data, { algorithm, op })
            const result = data.toFloat32()
            expected.set(algorithm === 'twoStep' ? throughQ8(once) : once)
            assert.deepEqual(result, expected.toFloat32(), `${dtype} ${op} ${algorithm} of ${count}`)
            digests.push(`${dtype} ${op} ${algorithm} ${digestOf(data)}`)
            if (dtype === 'f32' && op === 'sum' && algorithm === 'leader') checkError(result, inputs, partials)
            for (const [name, at] of Object.entries(special)) {
              const isNaNWhole = name === 'nan' || name === 'infinite'
              const part = result.slice(at * groupLength, (at + 1) * groupLength)
              // Larger than any finite element of 16 bits.
              if (dtype === 'f32' || name !== 'huge')
                assert.ok(
                  part.every((x) => Number.isNaN(x) === isNaNWhole),
                  name,
                )
              if (name === 'zeros') assert.ok(part.every((x) => x === 0))
            }
            assert.ok(Number.isFinite(result[(special.nan + 1) * groupLength]), 'the next group is whole')
            assert.ok(Number.isFinite(result[special.nan * groupLength - 1]), 'and so is the one before')
          }
        }
      }
      // What q8 is not for travels as it is, and so does what says so.
      const ones = (length: number): Float32Array => new Float32Array(length).fill(1 / 3)
      const exact = await group.allReduce(ones(count), { wire: 'exact' })
      const third = added(nodes.map((ranks) => added(ranks.map(() => Float32Array.of(1 / 3)))))
      assert.ok(exact.every((x) => x === third[0]))
      assert.deepEqual(
        group.allReduceSync(Int32Array.of(rank, 1000)),
        Int32Array.of((worldSize * (worldSize - 1)) / 2, 1000 * worldSize),
      )
      assert.deepEqual(group.allReduceSync(Float32Array.of(rank + 1 / 3), { op: 'min' }), Float32Array.of(1 / 3))
      // A batch may mix both; no elements, one, and a group that is not full; multiples of the scale are exact.
      const mixed = [0, 1, 33].map((length) => new Float32Array(length).fill(127))
      const plain = ones(count)
      await group.batch((b) => {
        for (const one of mixed) b.allReduce(one, { wire: 'q8' })
        b.allReduce(plain, { wire: 'exact' })
      })
      for (const one of mixed) assert.ok(one.every((x) => x === 127 * worldSize))
      assert.ok(plain.every((x) => x === third[0]))
      const parts = group.reduceScatterSync(ones(worldSize), new Float32Array(1))
      assert.deepEqual(parts, third)
    }
    return { digests, wire: group.explain('allReduce', 4096).wire }
  } finally {
    await group.close()
  }
}

/** Half a step of each node's scale, and what f32 sums lose. */
function checkError(result: Float32Array, inputs: readonly Float32Array[], partials: readonly Float32Array[]): void {
  result.forEach((x, i) => {
    const begin = i - (i % groupLength)
    const most = partials.map((partial) =>
      Math.max(...partial.subarray(begin, begin + groupLength).map((one) => Math.abs(one))),
    )
    if (!most.every(Number.isFinite)) return
    const truth = inputs.reduce((sum, input) => sum + (input[i] ?? 0), 0)
    const size = inputs.reduce((sum, input) => sum + Math.abs(input[i] ?? 0), 0)
    const bound =
      most.reduce((sum, one) => sum + Math.max(one / 254, 2 ** -127), 0) * (1 + 2 ** -14) +
      size * inputs.length * 2 ** -23
    assert.ok(Math.abs(x - truth) <= bound, `element ${i}: ${x}, ${truth}, bound ${bound}`)
  })
}

/** On one node: results are exact, and what q8 is not for is refused. */
export async function onOneNode(): Promise<void> {
  const group = await createGroup({ wire: 'q8' })
  try {
    const data = new Float32Array(1000).fill(1 / 3)
    await group.allReduce(data, { wire: 'q8' })
    assert.ok(data.every((x) => x === fround(fround(1 / 3) * group.worldSize)))
    const tensor = group.alloc('bf16', [64])
    for (const wire of ['q8', 'exact', 'q8'] as const) {
      tensor.set(new Float32Array(64).fill(1 + group.rank / 64))
      group.allReduceSync(tensor, { wire })
      assert.equal(tensor.toFloat32()[63], group.worldSize + ((group.worldSize - 1) * group.worldSize) / 128)
    }
    assert.equal(group.explain('allReduce', 4000).wire, 'exact')
    const refused = (call: () => unknown, message: RegExp): void => {
      assert.throws(call, { code: 'ERR_INVALID_ARGUMENT', message })
    }
    refused(() => group.allReduceSync(new Int32Array(4), { wire: 'q8' }), /wire 'q8'.*not for i32/)
    refused(() => group.allReduceSync(new Float64Array(4), { wire: 'q8' }), /wire 'q8'.*not for f64/)
    refused(() => group.allReduceSync(data, { wire: 'q8', op: 'max' }), /wire 'q8'.*not for max/)
    refused(() => group.allReduceSync(data, { wire: 'q8', op: 'prod' }), /wire 'q8'.*not for prod/)
    refused(() => group.allReduceSync(data, { wire: 'q4' as 'q8' }), /wire is 'q4'/)
    refused(() => group.reduceSync(data, { wire: 'q8' } as object), /no option 'wire'/)
    await assert.rejects(createGroup({ wire: 'q4' as 'q8' }), { code: 'ERR_INVALID_ARGUMENT', message: /wire is 'q4'/ })
    group.barrierSync()
  } finally {
    await group.close()
  }
}

/** Ranks that do not say the same. */
export async function disagrees(args: { options: Record<number, GroupOptions>; secret?: string }): Promise<unknown> {
  const rank = Number(process.env['RANK'])
  try {
    const group = await createGroup({
      timeoutMs: 10_000,
      ...(args.secret === undefined ? {} : { secret: args.secret }),
      ...args.options[rank],
    })
    try {
      await group.allReduce(new Float32Array(100), { wire: rank === 1 ? 'q8' : 'exact' })
    } finally {
      await group.close()
    }
  } catch (error) {
    const { code, message } = error as Error & { code: string }
    return { code, message }
  }
  return null
}
