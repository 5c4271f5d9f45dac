import assert from 'node:assert/strict'
import {
  KvCache,
  copyBytes,
  maxSumExp,
  reduceResidual,
  reduceSum,
  rmsNorm,
  tiers,
  type KernelTier,
} from '../../kernels/index.js'

// The scalar tier against float64 here, the vector tier against the scalar one: bit for bit where the tiers promise it.
// Tolerances: f32 1e-6, bf16 2^-8 of the value (one rounding), sums of exponentials 1e-5, all relative.

const vectorTier: KernelTier = 'avx512_bf16'
const bits = new Uint32Array(1)
const float = new Float32Array(bits.buffer)

function toBf16(x: number): number {
  float[0] = x
  const b = bits[0] ?? 0
  if (Number.isNaN(x)) return 0x7fc0
  return ((b + 0x7fff + ((b >>> 16) & 1)) >>> 16) & 0xffff
}

function fromBf16(half: number): number {
  bits[0] = half << 16
  return float[0] ?? NaN
}

/** Uniform in [-1, 1), the same at every run. */
function random(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 31 - 1
  }
}

function at(array: ArrayLike<number>, i: number): number {
  const value = array[i]
  assert.notEqual(value, undefined, `index ${i} of ${array.length}`)
  return value ?? NaN
}

/** `floor`: the size of the terms where they may cancel. */
function assertNear(actual: number, expected: number, relative: number, what: string, floor = 1e-3): void {
  const limit = relative * Math.max(Math.abs(expected), floor)
  assert.ok(Math.abs(actual - expected) <= limit, `${what}: ${actual} is not within ${limit} of ${expected}`)
}

function requireVectorTier(context: Mocha.Context): void {
  const report = tiers().find((tier) => tier.name === vectorTier)
  if (report?.available !== true) {
    process.stderr.write(`skipped: ${vectorTier} cannot run here: ${report?.reason ?? 'not in this build'}\n`)
    context.skip()
  }
}

const bothTiers: readonly KernelTier[] = ['scalar', vectorTier]

function forTiers(title: string, run: (tier: KernelTier) => void): void {
  for (const tier of bothTiers) {
    it(`${title} (${tier})`, function () {
      if (tier !== 'scalar') requireVectorTier(this)
      run(tier)
    })
  }
}

/** The f32 bit patterns that rounding, flushing and payloads could tell apart. */
const oddFloats = [
  0, 0x80000000, 1, 0x80000001, 0x7fffff, 0x807fffff, 0x00800000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc12345,
  0x7f812345, 0x7f7fffff, 0xff7fffff, 0x3f800000, 0xbf800000, 0x3f808000, 0x3f818000, 0x3f80ffff, 0x477fe000,
]

describe('copyBytes', () => {
  forTiers('copies 0 .. 700 bytes between any offsets, and writes nothing else', (tier) => {
    const source = Uint8Array.from({ length: 900 }, (_, i) => (i * 31 + (i >> 8)) & 0xff)
    for (let nbytes = 0; nbytes <= 700; nbytes += nbytes < 330 ? 1 : 37) {
      const from = (nbytes * 7) % 64
      const to = (nbytes * 13) % 64
      const whole = new Uint8Array(900).fill(0xa5)
      copyBytes({ tier, out: whole.subarray(to, to + nbytes), in: source.subarray(from, from + nbytes) })
      const expected = new Uint8Array(900).fill(0xa5)
      expected.set(source.subarray(from, from + nbytes), to)
      assert.deepEqual(whole, expected, `${String(nbytes)} bytes from offset ${String(from)} to ${String(to)}`)
    }
  })

  it('rejects arrays that overlap and an out that is too short', () => {
    const bytes = new Uint8Array(100)
    const tier = 'scalar'
    assert.throws(() => {
      copyBytes({ tier, out: bytes.subarray(1, 51), in: bytes.subarray(0, 50) })
    }, /overlaps/)
    assert.throws(() => {
      copyBytes({ tier, out: bytes.subarray(0, 49), in: bytes.subarray(50) })
    }, /shorter/)
    assert.doesNotThrow(() => {
      copyBytes({ tier, out: bytes.subarray(0, 50), in: bytes.subarray(50) })
    })
  })
})

describe('reduceSum', () => {
  for (const dtype of ['bf16', 'f32'] as const) {
    const size = dtype === 'f32' ? 4 : 2
    const fill = (bytes: Uint8Array, byteOffset: number, count: number, next: () => number): void => {
      const view = new DataView(bytes.buffer)
      for (let i = 0; i < count; i++) {
        const isOdd = next() > 0.7
        const pattern = isOdd
          ? at(oddFloats, Math.floor((next() + 1) * 0.5 * oddFloats.length))
          : (float.fill(next() * 2 ** Math.floor(next() * 20)), at(bits, 0))
        if (dtype === 'f32') view.setUint32(byteOffset + i * 4, pattern, true)
        else view.setUint16(byteOffset + i * 2, pattern >>> 16, true)
      }
    }

    forTiers(`adds ${dtype} sources in order, rounds once, and gives NaN one pattern`, (tier) => {
      const next = random(7)
      const count = 333
      const sources = Array.from({ length: 3 }, () => {
        const bytes = new Uint8Array(count * size)
        fill(bytes, 0, count, next)
        return bytes
      })
      const out = new Uint8Array(count * size)
      reduceSum({ tier, out, sources, dtype, count })
      let nans = 0
      for (let i = 0; i < count; i++) {
        let sum = 0
        sources.forEach((source, s) => {
          const view = new DataView(source.buffer)
          const x = dtype === 'f32' ? view.getFloat32(i * 4, true) : fromBf16(view.getUint16(i * 2, true))
          sum = s === 0 ? x : Math.fround(sum + x)
        })
        const view = new DataView(out.buffer)
        if (Number.isNaN(sum)) nans++
        float[0] = sum
        const expected = dtype === 'bf16' ? toBf16(sum) : Number.isNaN(sum) ? 0x7fc00000 : at(bits, 0)
        const actual = dtype === 'f32' ? view.getUint32(i * 4, true) : view.getUint16(i * 2, true)
        assert.equal(actual.toString(16), expected.toString(16), `element ${i}`)
      }
      assert.ok(nans > 5, 'the inputs hold NaN')
    })

    it(`has the same ${dtype} bits on both tiers for counts 0 .. 200 at offsets 0 .. 63 bytes, and writes nothing else`, function () {
      requireVectorTier(this)
      const next = random(11)
      for (let count = 0; count <= 200; count++) {
        const offset = (count * 7) % 64
        const numSources = 1 + (count % 5)
        const sources = Array.from({ length: numSources }, (_, s) => {
          const start = (offset + s * 13) % 64
          const bytes = new Uint8Array(count * size + 128)
          fill(bytes, start, count, next)
          return bytes.subarray(start, start + count * size)
        })
        const results = bothTiers.map((tier) => {
          const whole = new Uint8Array(count * size + 192).fill(0xa5)
          reduceSum({
            tier,
            out: whole.subarray(64 - (offset % 64) + 1, 64 - (offset % 64) + 1 + count * size),
            sources,
            dtype,
            count,
          })
          return Buffer.from(whole)
        })
        assert.ok(
          at(
            results.map((r) => r.length),
            0,
          ) > 0,
        )
        assert.equal(results[0]?.equals(results[1] ?? Buffer.alloc(0)), true, `count ${count} offset ${offset}`)
        const start = 64 - (offset % 64) + 1
        results[1]?.forEach((byte, i) => {
          if (i < start || i >= start + count * size) assert.equal(byte, 0xa5, `byte ${i} outside of count ${count}`)
        })
      }
    })

    it(`may write ${dtype} over any of its sources`, function () {
      requireVectorTier(this)
      for (const count of [5, 64, 129, 1000]) {
        for (let aliased = 0; aliased < 3; aliased++) {
          const make = (): Uint8Array[] => {
            const next = random(count)
            return Array.from({ length: 3 }, () => {
              const bytes = new Uint8Array(count * size)
              fill(bytes, 0, count, next)
              return bytes
            })
          }
          const apart = new Uint8Array(count * size)
          reduceSum({ tier: 'scalar', out: apart, sources: make(), dtype, count })
          for (const tier of bothTiers) {
            const sources = make()
            const out = sources[aliased] ?? apart
            assert.notEqual(out, apart)
            reduceSum({ tier, out, sources, dtype, count })
            assert.deepEqual(out, apart, `${tier} over source ${aliased}`)
          }
        }
      }
    })
  }

  it('rejects arrays that are too short, partial overlap, no sources, and unknown tiers', () => {
    const a = new Uint16Array(8)
    const call = (options: object) => () =>
      reduceSum({ tier: 'scalar', out: new Uint16Array(8), sources: [a, a], dtype: 'bf16', count: 8, ...options })
    assert.doesNotThrow(call({}))
    for (const wrong of [
      { count: 9 },
      { count: -1 },
      { count: 1.5 },
      { sources: [] },
      { sources: [a, new Uint16Array(7)] },
      { sources: [a, [1, 2]] },
      { out: new Uint16Array(7) },
      { out: new Uint16Array(a.buffer, 2, 4), count: 4 },
      { dtype: 'f16' },
      { tier: 7 },
    ]) {
      assert.throws(call(wrong), { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' }, JSON.stringify(wrong))
    }
    assert.throws(call({ tier: 'sse' }), { name: 'KernelError' })
  })
})

describe('reduceResidual and rmsNorm', () => {
  const columns = 1000
  const rows = 5
  const run = (
    tier: KernelTier,
    slotDtype: 'bf16' | 'f32',
    numSlots: number,
    addResidual: boolean,
    withBias: boolean,
    ranges: number[],
  ) => {
    const next = random(numSlots)
    const values = (n: number): Float32Array => Float32Array.from({ length: n }, next)
    const asSlot = (x: Float32Array): Float32Array | Uint16Array =>
      slotDtype === 'f32' ? x : Uint16Array.from(x, toBf16)
    const slots = Array.from({ length: numSlots }, () => asSlot(values(rows * (columns + 24))))
    const before = values(rows * columns)
    const bias = withBias ? values(columns) : undefined
    const gamma = values(columns)
    const residual = addResidual ? before.slice() : new Float32Array(rows * columns).fill(NaN)
    const sumSquares = new Float32Array(rows * 4).fill(NaN)
    const y = { f32: new Float32Array(rows * columns), bf16: new Uint16Array(rows * 1024) }
    let start = 0
    for (const end of ranges) {
      reduceResidual({
        tier,
        slots,
        slotDtype,
        rows,
        columns,
        residual,
        addResidual,
        sumSquares,
        ldSlot: columns + 24,
        range: [start, end],
        ...(bias === undefined ? {} : { bias }),
      })
      start = end
    }
    rmsNorm({ tier, x: residual, sumSquares, gamma, eps: 1e-5, y: y.f32, yDtype: 'f32', rows, columns })
    rmsNorm({
      tier,
      x: residual,
      sumSquares,
      gamma,
      eps: 1e-5,
      y: y.bf16,
      yDtype: 'bf16',
      rows,
      columns,
      ldy: 1024,
      range: [0, 500],
    })
    rmsNorm({
      tier,
      x: residual,
      sumSquares,
      gamma,
      eps: 1e-5,
      y: y.bf16,
      yDtype: 'bf16',
      rows,
      columns,
      ldy: 1024,
      range: [500, 1000],
    })
    return { slots, before, bias, gamma, residual, sumSquares, y }
  }

  for (const [slotDtype, numSlots, addResidual, withBias] of [
    ['bf16', 1, true, false],
    ['bf16', 2, true, true],
    ['f32', 3, false, true],
    ['f32', 8, true, false],
  ] as const) {
    forTiers(
      `agree with float64 for ${numSlots} ${slotDtype} slots, addResidual ${addResidual}, bias ${withBias}`,
      (tier) => {
        const r = run(tier, slotDtype, numSlots, addResidual, withBias, [columns])
        for (let row = 0; row < rows; row++) {
          let square = 0
          for (let c = 0; c < columns; c++) {
            let sum = addResidual ? at(r.before, row * columns + c) : 0
            for (const slot of r.slots) {
              const x = at(slot, row * (columns + 24) + c)
              sum += slotDtype === 'f32' ? x : fromBf16(x)
            }
            if (r.bias !== undefined) sum += at(r.bias, c)
            assert.ok(Math.abs(at(r.residual, row * columns + c) - sum) <= 2e-6, `residual ${row} ${c}`)
            square += sum * sum
          }
          const total = [0, 1, 2, 3].reduce((s, b) => s + at(r.sumSquares, row * 4 + b), 0)
          assertNear(total, square, 1e-5, `sum of squares of row ${row}`)
          for (let c = 0; c < columns; c++) {
            const expected = (at(r.residual, row * columns + c) / Math.sqrt(square / columns + 1e-5)) * at(r.gamma, c)
            assertNear(at(r.y.f32, row * columns + c), expected, 1e-5, `y ${row} ${c}`)
            assertNear(fromBf16(at(r.y.bf16, row * 1024 + c)), expected, 2 ** -8, `bf16 y ${row} ${c}`)
          }
          for (let c = columns; c < 1024; c++) assert.equal(at(r.y.bf16, row * 1024 + c), 0, 'padding stays zero')
        }
      },
    )
  }

  it('has the same bits on both tiers, whole and in column ranges', function () {
    requireVectorTier(this)
    const reference = run('scalar', 'bf16', 3, true, true, [columns])
    for (const tier of bothTiers) {
      for (const ranges of [[columns], [256, columns], [512, 768, columns], [256, 512, 768, columns]]) {
        const r = run(tier, 'bf16', 3, true, true, ranges)
        assert.deepEqual(r.residual, reference.residual)
        assert.deepEqual(r.sumSquares, reference.sumSquares)
        assert.deepEqual(r.y, reference.y)
      }
    }
    assert.ok(reference.y.f32.every((x) => Number.isFinite(x)))
  })

  forTiers('keep a NaN in its row', (tier) => {
    const slot = new Float32Array(3 * 300).fill(1)
    slot[300 + 17] = NaN
    const residual = new Float32Array(3 * 300)
    const sumSquares = new Float32Array(3 * 2)
    const gamma = new Float32Array(300).fill(1)
    const y = new Float32Array(3 * 300)
    reduceResidual({
      tier,
      slots: [slot],
      slotDtype: 'f32',
      rows: 3,
      columns: 300,
      residual,
      addResidual: false,
      sumSquares,
    })
    rmsNorm({ tier, x: residual, sumSquares, gamma, eps: 0, y, yDtype: 'f32', rows: 3, columns: 300 })
    assert.ok(y.subarray(0, 300).every((x) => x === 1))
    assert.ok(y.subarray(300, 600).every((x) => Number.isNaN(x)))
    assert.ok(y.subarray(600).every((x) => x === 1))
  })

  it('reject ranges off the 256 grid and arrays that are too short', () => {
    const call = (options: object) => () =>
      reduceResidual({
        tier: 'scalar',
        slots: [new Float32Array(1000)],
        slotDtype: 'f32',
        rows: 1,
        columns,
        residual: new Float32Array(1000),
        addResidual: true,
        sumSquares: new Float32Array(4),
        ...options,
      })
    assert.doesNotThrow(call({}))
    for (const wrong of [
      { range: [100, 1000] },
      { range: [0, 300] },
      { range: [256, 2000] },
      { rows: 2 },
      { sumSquares: new Float32Array(3) },
      { slots: [new Uint16Array(1000)] },
      { slots: [] },
      { bias: new Float32Array(999) },
      { ldSlot: 999 },
    ]) {
      assert.throws(call(wrong), { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' }, JSON.stringify(wrong))
    }
  })
})

describe('KvCache.write', () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    for (const [headDim, rotaryDims] of [
      [2, 2],
      [8, 8],
      [64, 64],
      [80, 20],
      [96, 96],
      [128, 64],
      [256, 256],
      [12, 0],
    ] as const) {
      forTiers(
        `rotates halves and stores K and V where the layout says: ${dtype}, head_dim ${headDim}, rotary ${rotaryDims}`,
        (tier) => {
          const numHeads = 3
          const numKvHeads = 2
          const tokens = 3
          const position0 = 30
          const cache = new KvCache({ tier, dtype, numKvHeads, headDim, numBlocks: 5 })
          const blocks = cache.allocate(5).reverse()
          const next = random(headDim)
          const width = (numHeads + 2 * numKvHeads) * headDim
          const source = Float32Array.from({ length: tokens * width }, () => fromBf16(toBf16(next())))
          const qkv = dtype === 'f32' ? source.slice() : Uint16Array.from(source, toBf16)
          const cosSin = Float32Array.from({ length: tokens * rotaryDims }, next)
          cache.write({ qkv, numHeads, blocks, position0, tokens, cosSin, rotaryDims })

          const tolerance = dtype === 'f32' ? 3e-7 : 2 ** -8
          const floor = dtype === 'f32' ? 1 : 1e-3
          const read = (array: ArrayLike<number>, i: number): number =>
            dtype === 'f32' ? at(array, i) : fromBf16(at(array, i))
          const data = dtype === 'f32' ? new Float32Array(cache.data.buffer) : new Uint16Array(cache.data.buffer)
          const half = rotaryDims / 2
          const rotated = (i: number, head: number, d: number): number => {
            const x = (dim: number): number => at(source, i * width + head * headDim + dim)
            const cs = (pair: number): number => at(cosSin, i * rotaryDims + pair)
            if (d < half) return x(d) * cs(d) - x(d + half) * cs(half + d)
            if (d < rotaryDims) return x(d) * cs(d - half) + x(d - half) * cs(d)
            return x(d)
          }
          let written = 0
          for (let i = 0; i < tokens; i++) {
            const lane = (position0 + i) % 32
            for (let head = 0; head < numHeads; head++) {
              for (let d = 0; d < headDim; d++) {
                assertNear(
                  read(qkv, i * width + head * headDim + d),
                  rotated(i, head, d),
                  tolerance,
                  `q ${i} ${head} ${d}`,
                  floor,
                )
              }
            }
            for (let h = 0; h < numKvHeads; h++) {
              const block = (h * cache.options.numBlocks + at(blocks, Math.floor((position0 + i) / 32))) * 64 * headDim
              for (let d = 0; d < headDim; d++) {
                const k = block + (dtype === 'f32' ? d * 32 + lane : (Math.floor(d / 2) * 32 + lane) * 2 + (d % 2))
                const v =
                  block +
                  32 * headDim +
                  (dtype === 'f32' ? lane * headDim + d : (Math.floor(lane / 2) * headDim + d) * 2 + (lane % 2))
                assertNear(read(data, k), rotated(i, numHeads + h, d), tolerance, `k ${i} ${h} ${d}`, floor)
                assert.equal(
                  read(data, v),
                  at(source, i * width + (numHeads + numKvHeads + h) * headDim + d),
                  `v ${i} ${h} ${d}`,
                )
                data[k] = 0
                data[v] = 0
                written += 2
              }
            }
          }
          assert.equal(written, tokens * numKvHeads * headDim * 2)
          assert.ok(
            data.every((x) => x === 0),
            'nothing else was written',
          )
        },
      )
    }
  }

  it('gives the same bits on both tiers', function () {
    requireVectorTier(this)
    const results = bothTiers.map((tier) => {
      const cache = new KvCache({ tier, dtype: 'bf16', numKvHeads: 3, headDim: 80, numBlocks: 3 })
      const next = random(5)
      const qkv = Uint16Array.from({ length: 70 * 10 * 80 }, () => toBf16(next()))
      const cosSin = Float32Array.from({ length: 70 * 40 }, next)
      cache.write({ qkv, numHeads: 4, blocks: cache.allocate(3), position0: 0, tokens: 70, cosSin, rotaryDims: 40 })
      return { qkv, data: cache.data }
    })
    assert.ok(results[0]?.data.some((x) => x !== 0))
    assert.deepEqual(results[0], results[1])
  })

  it('rejects blocks that are missing or not allocated, odd rotary dims, short arrays and wrong types', () => {
    const cache = new KvCache({ tier: 'scalar', dtype: 'f32', numKvHeads: 1, headDim: 8, numBlocks: 4 })
    const blocks = cache.allocate(2)
    const call = (options: object) => () =>
      cache.write({
        qkv: new Float32Array(40 * 24),
        numHeads: 1,
        blocks,
        position0: 0,
        tokens: 40,
        cosSin: new Float32Array(40 * 8),
        rotaryDims: 8,
        ...options,
      })
    assert.doesNotThrow(call({}))
    for (const wrong of [
      { position0: 25 },
      { blocks: [at(blocks, 0), 3] },
      { blocks: [at(blocks, 0), 99] },
      { rotaryDims: 7 },
      { rotaryDims: 10 },
      { qkv: new Float32Array(40 * 24 - 1) },
      { qkv: new Uint16Array(40 * 24) },
      { cosSin: new Float32Array(10) },
      { tokens: -1 },
      { numHeads: 0 },
    ]) {
      assert.throws(call(wrong), { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' }, JSON.stringify(wrong))
    }
    assert.throws(() => cache.allocate(3), { name: 'KernelError', code: 'ERR_NO_MEMORY' })
    cache.release(blocks)
    assert.throws(() => cache.release(blocks), { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' })
    assert.equal(cache.allocate(4).length, 4)
  })
})

describe('maxSumExp', () => {
  forTiers('agrees with float64 for sizes around the vector width', (tier) => {
    const next = random(3)
    for (const count of [1, 2, 15, 16, 17, 63, 64, 65, 1000, 32003]) {
      for (const scale of [1, 0.25, 7]) {
        const x = Float32Array.from({ length: count }, () => next() * 12)
        const result = maxSumExp(tier, x, scale)
        const max = x.reduce((a, b) => Math.max(a, b))
        assert.equal(result.max, max)
        assert.equal(result.argmax, x.indexOf(max))
        assertNear(
          result.sumExp,
          x.reduce((s, v) => s + Math.exp(Math.fround(scale) * (v - max)), 0),
          1e-5,
          `${count} x ${scale}`,
        )
      }
    }
  })

  forTiers('takes the first of equal maxima, and counts NaN and -Infinity as nothing', (tier) => {
    const x = new Float32Array(100).fill(-2)
    x[40] = x[41] = x[99] = 3
    x[3] = NaN
    x[98] = -Infinity
    const result = maxSumExp(tier, x)
    assert.deepEqual([result.max, result.argmax], [3, 40])
    assertNear(result.sumExp, 3 + 95 * Math.exp(-5), 1e-6, 'sum')
  })

  forTiers('defines what has no maximum', (tier) => {
    assert.deepEqual(maxSumExp(tier, new Float32Array(0)), { max: -Infinity, argmax: -1, sumExp: 0 })
    assert.deepEqual(maxSumExp(tier, new Float32Array(33).fill(-Infinity)), { max: -Infinity, argmax: 0, sumExp: 0 })
    assert.deepEqual(maxSumExp(tier, new Float32Array(33).fill(NaN)), { max: -Infinity, argmax: 0, sumExp: 0 })
    assert.deepEqual(maxSumExp(tier, Float32Array.of(NaN, Infinity, 5, Infinity)), {
      max: Infinity,
      argmax: 1,
      sumExp: 2,
    })
  })

  it('rejects a scale that is negative or not a number', () => {
    for (const scale of [-1, NaN, Infinity]) {
      assert.throws(() => maxSumExp('scalar', new Float32Array(4), scale), { code: 'ERR_INVALID_ARGUMENT' })
    }
  })
})
