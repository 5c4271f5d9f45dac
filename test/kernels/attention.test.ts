import assert from 'node:assert/strict'
import { KvCache, kvBlockBytes, tiers, type AttentionOptions, type KernelTier } from '../../kernels/index.js'

// The scalar tier against float64 softmax here, the vector tier against the scalar one. The whole pool is poisoned with
// NaN before the keys are written, so that anything that is read and should not be shows. Values are within [-1, 1].
// Tolerances, absolute: f32 1e-5; bf16 2^-7 (weights and result are rounded to bf16 once each). Splits in f32: 1e-6.

const vectorTier: KernelTier = 'avx512_bf16'
const tolerance = { f32: 1e-5, bf16: 2 ** -7 } as const
type DType = 'f32' | 'bf16'
type Elements = Float32Array | Uint16Array

const bits = new Uint32Array(1)
const float = new Float32Array(bits.buffer)

function toBf16(x: number): number {
  float[0] = x
  const b = bits[0] ?? 0
  return Number.isNaN(x) ? 0x7fc0 : ((b + 0x7fff + ((b >>> 16) & 1)) >>> 16) & 0xffff
}

function fromBf16(half: number): number {
  bits[0] = half << 16
  return float[0] ?? NaN
}

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

function toElements(x: Float32Array, dtype: DType): Elements {
  return dtype === 'f32' ? x.slice() : Uint16Array.from(x, toBf16)
}

function toFloats(x: Elements): Float32Array {
  return x instanceof Float32Array ? x : Float32Array.from(x, fromBf16)
}

function hasVectorTier(): boolean {
  const report = tiers().find((tier) => tier.name === vectorTier)
  if (report?.available === true) return true
  process.stderr.write(`skipped: ${vectorTier} cannot run here: ${report?.reason ?? 'not in this build'}\n`)
  return false
}

interface Setup {
  readonly dtype: DType
  readonly numHeads: number
  readonly numKvHeads: number
  readonly headDim: number
  readonly prefix: number
  readonly tokens: number
  readonly seed?: number
  /** Factor of q. */
  readonly qScale?: number
  /** What stands in lanes that were never written: NaN, or zeros. */
  readonly isPoisoned?: boolean
}

/** A poisoned pool with `prefix + tokens` keys in shuffled blocks, and the same keys and values as plain arrays. */
function prepare(tier: KernelTier, setup: Setup) {
  const { dtype, numHeads, numKvHeads, headDim, prefix, tokens } = setup
  const next = random(setup.seed ?? prefix * 131 + tokens)
  const keys = prefix + tokens
  const numBlocks = Math.ceil(keys / 32) + 3
  const cache = new KvCache({ tier, dtype, numKvHeads, headDim, numBlocks })
  if (setup.isPoisoned === false) cache.data.fill(0)
  else if (dtype === 'f32') new Float32Array(cache.data.buffer).fill(NaN)
  else new Uint16Array(cache.data.buffer).fill(0x7fc0)
  const blocks = cache.allocate(numBlocks)
  for (let i = blocks.length - 1; i > 0; i--) {
    const j = Math.floor((next() + 1) * 0.5 * (i + 1))
    const held = at(blocks, i)
    blocks[i] = at(blocks, j)
    blocks[j] = held
  }
  const width = (1 + 2 * numKvHeads) * headDim
  const kv = Float32Array.from({ length: keys * width }, () => (dtype === 'f32' ? next() : fromBf16(toBf16(next()))))
  const write = (qkv: Float32Array, position0: number): void => {
    cache.write({
      qkv: toElements(qkv, dtype),
      numHeads: 1,
      blocks,
      position0,
      tokens: qkv.length / width,
      cosSin: new Float32Array(0),
      rotaryDims: 0,
    })
  }
  write(kv, 0)
  const scaled = setup.qScale ?? 2
  const q = Float32Array.from({ length: tokens * numHeads * headDim }, () => {
    const x = next() * scaled
    return dtype === 'f32' ? x : fromBf16(toBf16(x))
  })
  const run = (options: Partial<AttentionOptions> = {}): Elements => {
    const out = toElements(new Float32Array((options.tokens ?? tokens) * numHeads * headDim).fill(NaN), dtype)
    cache.attention({ q: toElements(q, dtype), numHeads, blocks, position0: prefix, tokens, out, ...options })
    return options.out ?? out
  }
  /** softmax(q k / sqrt(d)) v of one row in float64 over keys [0, limit). */
  const reference = (token: number, head: number, limit: number): Float64Array => {
    const kvHead = Math.floor(head / (numHeads / numKvHeads))
    const scores: number[] = []
    for (let key = 0; key < limit; key++) {
      let dot = 0
      for (let d = 0; d < headDim; d++) {
        dot += at(q, (token * numHeads + head) * headDim + d) * at(kv, key * width + (1 + kvHead) * headDim + d)
      }
      scores.push(dot / Math.sqrt(headDim))
    }
    const max = scores.reduce((a, b) => Math.max(a, b), -Infinity)
    const weights = scores.map((s) => Math.exp(s - max))
    const total = weights.reduce((a, b) => a + b, 0)
    const out = new Float64Array(headDim)
    weights.forEach((w, key) => {
      for (let d = 0; d < headDim; d++)
        out[d] = at(out, d) + (w / total) * at(kv, key * width + (1 + numKvHeads + kvHead) * headDim + d)
    })
    return out
  }
  return { cache, blocks, kv, q, run, reference, write, width, keys }
}

function assertAgree(actual: Elements, expected: Elements, limit: number, what: string): void {
  const a = toFloats(actual)
  const b = toFloats(expected)
  assert.equal(a.length, b.length)
  assert.ok(a.length > 0)
  let worst = 0
  a.forEach((x, i) => {
    const error = Math.abs(x - at(b, i))
    if (!(error <= worst)) worst = error
  })
  assert.ok(worst <= limit, `${what}: differs by ${worst}, more than ${limit}`)
}

function checkAgainstReference(tier: KernelTier, setup: Setup, rowStep: number): void {
  const { dtype, numHeads, headDim, prefix, tokens } = setup
  const p = prepare(tier, setup)
  const out = toFloats(p.run())
  for (let token = 0; token < tokens; token += rowStep) {
    for (let head = 0; head < numHeads; head += Math.max(1, Math.floor(numHeads / 3))) {
      const expected = p.reference(token, head, prefix + token + 1)
      expected.forEach((x, d) => {
        const actual = at(out, (token * numHeads + head) * headDim + d)
        assert.ok(
          Math.abs(actual - x) <= tolerance[dtype],
          `${JSON.stringify(setup)} token ${token} head ${head} dim ${d}: ${actual}, not ${x}`,
        )
      })
    }
  }
}

const headDims = [2, 8, 12, 64, 80, 96, 128, 256]
const groups = [1, 2, 4, 7, 8, 71]
const prefixes = [0, 1, 31, 32, 33, 200]
const tokenCounts = [1, 2, 31, 33, 130]

/** Every pair (head_dim, group), with prefixes and token counts going round, so that all meet many partners. */
function* setups(dtype: DType): Generator<Setup> {
  let i = 0
  for (const headDim of headDims) {
    for (const group of groups) {
      const tokens = group === 71 ? at([1, 3, 9], i % 3) : at(tokenCounts, i % tokenCounts.length)
      const numKvHeads = group >= 8 ? 1 : 2
      yield {
        dtype,
        headDim,
        numKvHeads,
        numHeads: group * numKvHeads,
        prefix: at(prefixes, (i * 5 + Math.floor(i / 6)) % 6),
        tokens,
      }
      i++
    }
  }
}

describe('attention', function () {
  this.timeout(20_000)

  for (const dtype of ['f32', 'bf16'] as const) {
    it(`of the scalar tier agrees with float64 (${dtype})`, () => {
      let checked = 0
      for (const prefix of prefixes) {
        checkAgainstReference('scalar', { dtype, headDim: 12, numKvHeads: 2, numHeads: 4, prefix, tokens: 34 }, 1)
        checkAgainstReference('scalar', { dtype, headDim: 64, numKvHeads: 1, numHeads: 3, prefix, tokens: 2 }, 1)
        checked++
      }
      assert.equal(checked, prefixes.length)
    })

    it(`of the vector tier agrees with float64 for odd shapes (${dtype})`, function () {
      if (!hasVectorTier()) return this.skip()
      for (const prefix of prefixes) {
        checkAgainstReference(vectorTier, { dtype, headDim: 80, numKvHeads: 1, numHeads: 7, prefix, tokens: 40 }, 3)
      }
    })

    it(`of the vector tier agrees with the scalar tier over head_dim x group x prefix x tokens (${dtype})`, function () {
      if (!hasVectorTier()) return this.skip()
      let cases = 0
      for (const setup of setups(dtype)) {
        // the scalar twin is slow: of long prompts with wide heads the last rows only
        const rows = Math.min(setup.tokens, Math.max(1, Math.floor(40_000 / (setup.numHeads * setup.headDim))))
        const short = { tokens: rows, position0: setup.prefix + setup.tokens - rows }
        const scalar = prepare('scalar', setup)
        const vector = prepare(vectorTier, setup)
        assert.deepEqual(scalar.kv, vector.kv)
        const start = (setup.tokens - rows) * setup.numHeads * setup.headDim
        const q = toElements(scalar.q.subarray(start), dtype)
        const what = JSON.stringify(setup)
        assertAgree(vector.run().subarray(start), scalar.run({ ...short, q }), tolerance[dtype], what)
        cases++
      }
      assert.equal(cases, headDims.length * groups.length)
    })

    it(`gives a row the same bits alone and among others (${dtype})`, function () {
      if (!hasVectorTier()) return this.skip()
      for (const [prefix, tokens, group] of [
        [0, 130, 1],
        [33, 40, 4],
        [260, 64, 4],
        [7, 9, 71],
      ] as const) {
        const p = prepare(vectorTier, { dtype, headDim: 80, numKvHeads: 1, numHeads: group, prefix, tokens })
        const together = p.run()
        const width = group * 80
        for (let token = 0; token < tokens; token += 7) {
          const alone = p.run({
            q: toElements(p.q.subarray(token * width, (token + 1) * width), dtype),
            position0: prefix + token,
            tokens: 1,
          })
          assert.deepEqual(alone, together.slice(token * width, (token + 1) * width), `prefix ${prefix} token ${token}`)
        }
      }
    })

    for (const tier of ['scalar', vectorTier] as const) {
      it(`of 1 .. 16 key ranges joined agrees with the undivided (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        for (const [prefix, tokens] of [
          [300, 1],
          [500, 5],
          [3, 2],
        ] as const) {
          const p = prepare(tier, { dtype, headDim: 24, numKvHeads: 2, numHeads: 8, prefix, tokens })
          const whole = p.run()
          for (let splits = 1; splits <= 16; splits++) {
            assertAgree(
              p.run({ splits }),
              whole,
              dtype === 'f32' ? 1e-6 : tolerance.bf16,
              `${splits} splits of ${prefix} + ${tokens}`,
            )
          }
        }
      })

      it(`does not let later tokens of the same prompt be felt, NaN and infinity included (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        for (const group of [1, 4, 8]) {
          const setup = { dtype, headDim: 16, numKvHeads: 1, numHeads: group, prefix: 35, tokens: 60 }
          const p = prepare(tier, setup)
          const before = p.run()
          for (const [bad, value] of [
            [45, NaN],
            [70, Infinity],
          ] as const) {
            // key and value of one position become NaN or infinite: rows before it keep their bits
            p.write(new Float32Array(p.width).fill(value), bad)
            const after = p.run()
            const limit = (bad - setup.prefix) * group * setup.headDim
            if (bad === 45) {
              assert.deepEqual(after.slice(0, limit), before.slice(0, limit), `${value} at ${bad}, group ${group}`)
              const row = toFloats(after.slice(limit, limit + setup.headDim))
              assert.ok(
                row.some((x) => Number.isNaN(x)),
                'the row that sees it is NaN',
              )
            }
            p.write(p.kv.slice(bad * p.width, (bad + 1) * p.width), bad)
          }
          p.write(new Float32Array(p.width).fill(Infinity), 70)
          assert.deepEqual(p.run().slice(0, 35 * group * 16), before.slice(0, 35 * group * 16))
        }
      })

      it(`gives the same bits whatever stands in lanes that were never written (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        for (const [prefix, tokens, group] of [
          [300, 1, 4],
          [0, 50, 8],
          [33, 7, 1],
        ] as const) {
          const setup = { dtype, headDim: 48, numKvHeads: 2, numHeads: 2 * group, prefix, tokens }
          const zeros = prepare(tier, { ...setup, isPoisoned: false }).run()
          assert.ok(toFloats(zeros).every((x) => Number.isFinite(x)))
          assert.deepEqual(prepare(tier, setup).run(), zeros, `prefix ${prefix} tokens ${tokens}`)
        }
      })

      it(`keeps a NaN in q in its own head and token (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        const p = prepare(tier, { dtype, headDim: 16, numKvHeads: 1, numHeads: 4, prefix: 40, tokens: 3 })
        const clean = p.run()
        const q = p.q.slice()
        q[(1 * 4 + 2) * 16 + 5] = NaN
        const out = p.run({ q: toElements(q, dtype) })
        const bad = 6 * 16
        assert.deepEqual(out.slice(0, bad), clean.slice(0, bad))
        assert.deepEqual(out.slice(bad + 16), clean.slice(bad + 16))
        assert.ok(toFloats(out.slice(bad, bad + 16)).every((x) => Number.isNaN(x)))
      })

      it(`stands scores of +-1e4 and takes the winning value (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        const setup = { dtype, headDim: 32, numKvHeads: 1, numHeads: 2, prefix: 64, tokens: 1, qScale: 1 }
        const p = prepare(tier, setup)
        for (const [sign, winner] of [
          [1, 50],
          [-1, 13],
        ] as const) {
          const kv = new Float32Array(p.keys * p.width)
          for (let key = 0; key < p.keys; key++) {
            kv.fill(key === winner ? 100 : -100, key * p.width + 32, key * p.width + 64)
            kv.fill(key, key * p.width + 64, key * p.width + 96)
          }
          p.write(kv, 0)
          const q = new Float32Array(2 * 32).fill(sign * 18)
          const out = toFloats(p.run({ q: toElements(q, dtype) }))
          // sign -1: the winner has the lowest score, all others share the weight evenly
          const others = (p.keys * (p.keys - 1)) / 2 - winner
          const expected = sign === 1 ? winner : others / (p.keys - 1)
          out.forEach((x) => assert.ok(Math.abs(x - expected) <= expected * 2 ** -7, `${x}, not ${expected}`))
        }
      })

      it(`leaves everything outside its rows alone (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        const p = prepare(tier, { dtype, headDim: 10, numKvHeads: 1, numHeads: 3, prefix: 5, tokens: 4 })
        const dense = p.run()
        const ldo = 41
        const out = toElements(new Float32Array(4 * ldo).fill(7), dtype)
        p.run({ out, ldo })
        const seven = at(toElements(Float32Array.of(7), dtype), 0)
        for (let row = 0; row < 4; row++) {
          assert.deepEqual(out.slice(row * ldo, row * ldo + 30), dense.slice(row * 30, row * 30 + 30))
          assert.ok(out.slice(row * ldo + 30, (row + 1) * ldo).every((x) => x === seven))
        }
      })

      it(`sees only the first keys where keys is less than the positions (${tier}, ${dtype})`, function () {
        if (tier !== 'scalar' && !hasVectorTier()) return this.skip()
        const p = prepare(tier, { dtype, headDim: 8, numKvHeads: 1, numHeads: 2, prefix: 90, tokens: 2 })
        for (const keys of [1, 31, 32, 33, 90]) {
          const out = toFloats(p.run({ keys }))
          const expected = p.reference(1, 1, keys)
          expected.forEach((x, d) =>
            assert.ok(Math.abs(at(out, 3 * 8 + d) - x) <= tolerance[dtype], `keys ${keys} dim ${d}`),
          )
        }
        assert.ok(
          p.run({ keys: 0 }).every((x) => x === 0),
          'a row without keys is zero',
        )
      })
    }
  }

  it('rejects wrong shapes, foreign blocks, odd head_dim, uneven heads and scales that are not positive', () => {
    const p = prepare('scalar', { dtype: 'f32', headDim: 8, numKvHeads: 2, numHeads: 4, prefix: 10, tokens: 30 })
    assert.doesNotThrow(() => p.run())
    for (const wrong of [
      { q: new Float32Array(30 * 32 - 1) },
      { q: new Uint16Array(30 * 32) },
      { out: new Float32Array(30 * 32 - 1) },
      { numHeads: 3 },
      { numHeads: 0 },
      { blocks: p.blocks.slice(0, 1) },
      { blocks: [at(p.blocks, 0), 99] },
      { position0: -1 },
      { position0: 0.5 },
      { keys: 41 },
      { keys: -1 },
      { scale: 0 },
      { scale: NaN },
      { splits: -1 },
      { ldq: 31 },
      { ldo: 31 },
    ]) {
      assert.throws(() => p.run(wrong), { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' }, JSON.stringify(wrong))
    }
    for (const wrong of [{ headDim: 7 }, { headDim: 1026 }, { headDim: 0 }, { numBlocks: 0 }, { numKvHeads: 1.5 }]) {
      const options = { tier: 'scalar', dtype: 'f32', numKvHeads: 1, headDim: 8, numBlocks: 1, ...wrong } as const
      assert.throws(
        () => new KvCache(options),
        { name: 'KernelError', code: 'ERR_INVALID_ARGUMENT' },
        JSON.stringify(wrong),
      )
    }
    assert.equal(kvBlockBytes('bf16', 128), 16384)
  })
})
