// What a caller can do wrong, in a group of one: nothing of it may touch memory or break the group.

import assert from 'node:assert/strict'
import { Worker } from 'node:worker_threads'
import { createGroup, type Group } from '../../collectives/index.js'

/** Arguments that TypeScript would refuse, as plain JavaScript hands them over. */
const untyped = (value: unknown): Float32Array => value as Float32Array

/** TypeScript's library for Node 20 does not know the second argument. */
function resizable(byteLength: number, maxByteLength: number): ArrayBuffer {
  return Reflect.construct(ArrayBuffer, [byteLength, { maxByteLength }]) as ArrayBuffer
}

describe('a group of one', () => {
  let group: Group
  before(async () => (group = await createGroup({ env: {} })))
  after(async () => group.close())
  // Whatever a test did wrong, the group still works.
  afterEach(() => {
    const data = Float32Array.of(3)
    group.allReduceSync(data)
    assert.equal(data[0], 3)
  })

  it('needs no launcher and reduces to its own input', async () => {
    assert.equal(group.rank, 0)
    assert.equal(group.worldSize, 1)
    const data = Float32Array.of(1, 2, 3)
    assert.equal(await group.allReduce(data), data)
    assert.deepEqual([...data], [1, 2, 3])
    const all = new Float32Array(3)
    assert.equal(group.allGatherSync(data, all), all)
    assert.deepEqual([...all], [1, 2, 3])
    group.broadcastSync(data)
    await group.barrier()
  })

  it('makes tensors that hold what they are given, rounded to their dtype', () => {
    const tensor = group.alloc('bf16', [2, 3])
    assert.deepEqual(tensor.shape, [2, 3])
    assert.equal(tensor.count, 6)
    assert.equal(tensor.nbytes, 12)
    tensor.set([1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, NaN, 3.3961775e38, -0])
    assert.deepEqual([...tensor.toFloat32()], [1, 1, 1 + 2 ** -6, NaN, Infinity, -0])
    assert.equal(group.allReduceSync(tensor), tensor)
    assert.equal(group.alloc('f32', [0, 5]).toFloat32().length, 0)
    assert.throws(() => tensor.set([1, 2], 5), { code: 'ERR_INVALID_ARGUMENT' })
  })

  it('refuses memory that is not what it takes', () => {
    const refused = (data: unknown, options: object, pattern: RegExp): void => {
      assert.throws(() => group.allReduceSync(untyped(data), options), {
        code: 'ERR_INVALID_ARGUMENT',
        message: pattern,
      })
    }
    refused(new Int16Array(4), {}, /is a Int16Array; collectives take/)
    refused(new Uint8ClampedArray(4), {}, /Uint8ClampedArray/)
    refused(new DataView(new ArrayBuffer(8)), {}, /DataView/)
    refused([1, 2, 3], {}, /Array/)
    refused(null, {}, /null/)
    refused(undefined, {}, /needs data/)
    refused('text', {}, /string/)
    refused({ data: 1, stride: 2 }, {}, /Object/)
    refused(new Uint16Array(4), {}, /say \{ dtype: 'bf16' \} or \{ dtype: 'f16' \}/)
    refused(new Uint16Array(4), { dtype: 'f32' }, /holds bf16 or f16, but dtype is 'f32'/)
    refused(new Uint8Array(4), { dtype: 'i8' }, /holds u8, but dtype is 'i8'/)
    refused(new Float32Array(4), { op: 'median' }, /op is 'median'; there are sum, prod/)
    refused(new Float32Array(4), { op: 'band' }, /band is for integers, not for f32/)
    refused(new Uint16Array(4), { op: 'bxor', dtype: 'f16' }, /bxor is for integers, not for f16/)
    refused(new Float32Array(4), { dtype: 'bf16' }, /f32/)
    refused(new Float32Array(4), { dtype: 'f16' }, /f16/)
    refused(new Float32Array(new SharedArrayBuffer(16)), {}, /SharedArrayBuffer/)
    refused(new Float32Array(resizable(16, 32)), {}, /resizable/)
    refused(new Float32Array(4), { timeout: 5 }, /no option 'timeout'/)
    refused(new Float32Array(4), { signal: new AbortController().signal }, /no option 'signal'/)
    refused(new Float32Array(4), { timeoutMs: 0 }, /timeoutMs/)
    refused(new Float32Array(4), { timeoutMs: 1.5 }, /timeoutMs/)
    refused(new Float32Array(4), { algorithm: 'ring' }, /ring/)
    refused(new Float32Array(4), { algorithm: 'toString' }, /toString/)
    refused(new Float32Array(4), { algorithm: 'twoShotInPlace' }, /group\.alloc/)
  })

  it('refuses a detached array', async () => {
    const data = new Float32Array(4)
    structuredClone(data.buffer, { transfer: [data.buffer] })
    assert.throws(() => group.allReduceSync(data), { code: 'ERR_INVALID_ARGUMENT', message: /detached/ })
    await assert.rejects(group.allReduce(data), { code: 'ERR_INVALID_ARGUMENT' })
  })

  it('refuses outputs and roots that do not fit', async () => {
    const data = new Float32Array(4)
    assert.throws(() => group.allGatherSync(data, new Float32Array(5)), {
      code: 'ERR_INVALID_ARGUMENT',
      message: /must hold 4 elements, not 5/,
    })
    assert.throws(() => group.allGatherSync(data, new Uint16Array(4)), { code: 'ERR_INVALID_ARGUMENT' })
    assert.throws(() => group.allGatherSync(data, untyped(undefined)), { code: 'ERR_INVALID_ARGUMENT' })
    const big = new Float32Array(8)
    assert.throws(() => group.allGatherSync(big.subarray(0, 4), big.subarray(1, 5)), {
      code: 'ERR_INVALID_ARGUMENT',
      message: /overlaps/,
    })
    assert.throws(() => group.broadcastSync(data, { root: 1 }), { code: 'ERR_INVALID_ARGUMENT', message: /root/ })
    await assert.rejects(group.broadcast(data, { root: -1 }), { code: 'ERR_INVALID_ARGUMENT' })
    await assert.rejects(group.broadcast(data, { root: 0.5 }), { code: 'ERR_INVALID_ARGUMENT' })
  })

  it('refuses parts that do not fit', () => {
    const bad = { code: 'ERR_INVALID_ARGUMENT' }
    const four = new Float32Array(4)
    assert.throws(() => group.gatherSync(four, undefined), { ...bad, message: 'gather needs output on its root' })
    assert.throws(() => group.scatterSync(undefined, four), { ...bad, message: 'scatter needs data on its root' })
    assert.throws(() => group.gatherSync(four, new Float32Array(5)), {
      ...bad,
      message: /output must hold 4 elements, not 5/,
    })
    assert.throws(() => group.gatherSync(four, new Float64Array(4)), {
      ...bad,
      message: 'data holds f32, but output f64',
    })
    assert.throws(() => group.scatterSync(new Float32Array(3), four), {
      ...bad,
      message: /data must hold 4 elements, not 3/,
    })
    assert.throws(() => group.reduceScatterSync(four, untyped(undefined)), { ...bad, message: /needs output/ })
    assert.throws(() => group.allToAllSync(four, new Float32Array(3)), { ...bad, message: /output must hold 4/ })
    for (const counts of [[], [1, 2], [-1], [0.5], '4' as unknown as number[], [2 ** 53]]) {
      assert.throws(() => group.allGatherSync(four, four, { counts }), { ...bad, message: /^counts are/ })
    }
    assert.throws(() => group.allGatherSync(four, four, { counts: [3] }), {
      ...bad,
      message: /data must hold 3 elements/,
    })
    assert.throws(() => group.allGatherSync(four, four, { counts: [2 ** 50] }), { ...bad, message: /out of range/ })
    assert.throws(() => group.allToAllSync(four, new Float32Array(4), { counts: [4] }), {
      ...bad,
      message: /^outputCounts are undefined/,
    })
    const uneven = { counts: [4], outputCounts: [3] }
    assert.throws(() => group.allToAllSync(four, new Float32Array(4), uneven), {
      ...bad,
      message: /output must hold 3/,
    })
    assert.throws(() => group.allToAllSync(new Float32Array(5), new Float32Array(3), uneven), {
      ...bad,
      message: /data must hold 4/,
    })
    assert.throws(() => group.allToAllSync(four, four, { counts: [4], outputCounts: [4] }), {
      ...bad,
      message: /data overlaps output/,
    })
    assert.throws(() => group.allToAllSync(four, four, { matrix: new BigUint64Array(2) } as object), {
      ...bad,
      message: /no option 'matrix'/,
    })
    const six = new Float32Array(6)
    assert.throws(() => group.allGatherSync(six.subarray(0, 4), six.subarray(1, 5)), { ...bad, message: /overlaps/ })
    assert.throws(() => group.allToAllSync(six.subarray(0, 4), six.subarray(2)), { ...bad, message: /overlaps/ })
    assert.equal(group.reduceScatterSync(four, four), four)
    assert.equal(group.gatherSync(four, four, { counts: [4] }), four)
  })

  it('refuses outputs of reductions that do not fit', async () => {
    const bad = { code: 'ERR_INVALID_ARGUMENT' }
    const six = new Float32Array(6)
    const four = six.subarray(0, 4)
    const refused = (output: unknown, message: RegExp): void => {
      assert.throws(() => group.allReduceSync(four, { output: untyped(output) }), { ...bad, message })
      assert.throws(() => group.reduceSync(four, { output: untyped(output) }), { ...bad, message })
    }
    refused(new Float32Array(3), /output must hold 4 elements, not 3/)
    refused(six.subarray(2), /data overlaps output/)
    refused(new Float64Array(4), /data holds f32, but output f64/)
    refused([1, 2, 3, 4], /output is a Array/)
    assert.throws(() => group.allReduceSync(group.alloc('f32', [4]), { output: four, algorithm: 'twoShotInPlace' }), {
      ...bad,
      message: /group\.alloc/,
    })
    await assert.rejects(group.broadcast(four, { output: six } as object), { ...bad, message: /no option 'output'/ })
    assert.equal(group.allReduceSync(four, { output: four }), four)
    const same = six.subarray(0, 4)
    assert.equal(await group.reduce(four, { output: same }), same)
  })

  it('makes tensors of f16 and of integers', () => {
    const half = group.alloc('f16', [8])
    half.set([1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 65519, 65520, 2 ** -24, 2 ** -25, -0])
    assert.deepEqual([...half.toFloat32()], [1, 1, 1 + 2 ** -9, 65504, Infinity, 2 ** -24, 0, -0])
    half.set([NaN, 6.104e-5, -(2 ** -14) * (1 - 2 ** -11)])
    assert.deepEqual([...half.toFloat32()].slice(0, 3), [NaN, 2 ** -14, -(2 ** -14)])
    const large = group.alloc('u64', [2])
    large.set([2n ** 64n - 1n, 3])
    assert.deepEqual([...large.data], [2n ** 64n - 1n, 3n])
    assert.deepEqual([...large.toFloat32()], [2 ** 64, 3])
    assert.throws(() => large.set([0.5]), { code: 'ERR_INVALID_ARGUMENT', message: /0.5 is no integer/ })
    assert.deepEqual([...group.alloc('i8', [3]).set([127, 128, -129]).data], [127, -128, 127])
    assert.equal(group.alloc('f64', [3]).set([0.1]).data[0], 0.1)
  })

  it('refuses shapes and dtypes that are none', () => {
    const refused = (dtype: string, shape: unknown): void => {
      assert.throws(() => group.alloc(dtype as 'f32', shape as number[]), { code: 'ERR_INVALID_ARGUMENT' })
    }
    refused('f128', [1])
    refused('toString', [1])
    refused('f32', [-1])
    refused('f32', [1.5])
    refused('f32', 4)
    refused('f32', [2 ** 40, 2 ** 40])
    refused('f32', ['4'])
  })

  it('says what memory is missing, with sizes', () => {
    assert.throws(
      () => group.alloc('f32', [2 ** 39]),
      (error: Error & { code?: string }) => {
        assert.ok(error.code === 'ERR_NO_MEMORY' || error.code === 'ERR_IO', error.message)
        assert.match(error.message, /MiB/)
        return true
      },
    )
  })

  it("refuses another group's tensor", async () => {
    const other = await createGroup({ env: {} })
    const tensor = other.alloc('f32', [4])
    assert.throws(() => group.allReduceSync(tensor), { code: 'ERR_INVALID_ARGUMENT', message: /another group/ })
    assert.throws(() => group.allReduceSync(tensor, { timeoutMs: 5 }), {
      code: 'ERR_INVALID_ARGUMENT',
      message: /another group/,
    })
    await other.close()
  })

  it('is not created with options that make no sense', async () => {
    const refused = async (options: object): Promise<void> => {
      await assert.rejects(createGroup({ env: {}, ...options }), { code: 'ERR_INVALID_ARGUMENT' })
    }
    await refused({ slotBytes: 100 })
    await refused({ slotBytes: 0 })
    await refused({ slotBytes: 1024, chunkBytes: 2048 })
    await refused({ timeoutMs: -1 })
    await refused({ retries: 3 })
    await refused({ spinUs: 'long' })
  })

  it('can be used as a disposable, closed twice, and not after', async () => {
    let kept: Group
    {
      await using inner = await createGroup({ env: {} })
      kept = inner
      inner.barrierSync()
    }
    await kept.close()
    await kept.close()
    assert.throws(() => kept.barrierSync(), { code: 'ERR_CLOSED' })
    await assert.rejects(kept.barrier(), { code: 'ERR_CLOSED' })
    assert.throws(() => kept.alloc('f32', [1]), { code: 'ERR_CLOSED' })
  })

  it('may be left open by a worker that ends, again and again', async () => {
    const url = new URL('../../collectives/index.js', import.meta.url).href
    const code = `
      import(${JSON.stringify(url)}).then(async ({ createGroup }) => {
        const group = await createGroup({ env: {} })
        const tensor = group.alloc('f32', [1000])
        group.allReduceSync(tensor)
        if (process.argv[2] === 'exit') process.exit(0)
      })`
    for (const how of ['leave', 'exit', 'leave']) {
      const worker = new Worker(code, { eval: true, argv: [how] })
      const exitCode = await new Promise((resolve, reject) => {
        worker.on('exit', resolve)
        worker.on('error', reject)
      })
      assert.equal(exitCode, 0)
    }
  })
})
