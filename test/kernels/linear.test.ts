// Linear kernels: the scalar tier against float64 arithmetic done here, every other tier against the same bound and, where
// values are exact, against the scalar bits. A tier that this processor lacks is a skip that names it.

import assert from 'node:assert/strict'
import {
  convert,
  embed,
  KernelError,
  linear,
  matrix,
  pack,
  packGateUp,
  packInto,
  PackedWeight,
  selectTier,
  setBias,
  streamRead,
  tiers,
  unpack,
  values,
  type Matrix,
  type TierName,
} from '../../kernels/index.js'
import type { DType, SourceDType } from '../../native/types.js'

const dtypes: readonly DType[] = ['bf16', 'f32']
const sourceDTypes: readonly SourceDType[] = ['f32', 'bf16', 'f16']
const builtTiers: readonly TierName[] = ['scalar', 'avx512_bf16']

/** describe() for each built tier; where the processor lacks it, one skipped test says so. */
function describeTiers(title: string, body: (tier: TierName) => void): void {
  for (const tier of builtTiers) {
    describe(`${title}, tier ${tier}`, () => {
      const report = tiers().find((r) => r.name === tier)
      assert.ok(report !== undefined, `${tier} is not reported at all`)
      if (report.available) body(tier)
      else it.skip(`needs ${tier}: ${report.reason}`, () => undefined)
    })
  }
}

/** Numbers in [-1, 1) from a linear congruential generator. */
function randomNumbers(count: number, seed: number): Float32Array {
  let state = (seed * 2654435761 + 12345) >>> 0
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return ((state >>> 8) - 2 ** 23) / 2 ** 23
  })
}

function smallIntegers(count: number, seed: number): Float32Array {
  return randomNumbers(count, seed).map((v) => Math.floor(v * 9))
}

const bitsView = new DataView(new ArrayBuffer(8))
function floatOfBits(bits: number): number {
  bitsView.setUint32(0, bits)
  return bitsView.getFloat32(0)
}
function bitsOfFloat(value: number): number {
  bitsView.setFloat32(0, value)
  return bitsView.getUint32(0)
}
const floatOfBf16 = (bits: number): number => floatOfBits(bits * 65536)

/** The nearest bf16 by distances in float64: no bit arithmetic of the kernels is repeated. Not for NaN. */
function nearestBf16(value: number): number {
  const sign = Object.is(value, -0) || value < 0 ? 0x8000 : 0
  const magnitude = Math.abs(value)
  if (magnitude === Infinity) return sign + 0x7f80
  const below = Math.floor(bitsOfFloat(magnitude) / 65536)
  const lower = floatOfBf16(below)
  // One step past the largest finite bf16 counts as 2^128 for rounding, and is infinity.
  const upper = below + 1 === 0x7f80 ? 2 ** 128 : floatOfBf16(below + 1)
  const toLower = magnitude - lower
  const toUpper = upper - magnitude
  if (toLower !== toUpper) return sign + (toLower < toUpper ? below : below + 1)
  return sign + (below % 2 === 0 ? below : below + 1)
}

function floatOfF16(bits: number): number {
  const sign = bits >= 0x8000 ? -1 : 1
  const exponent = Math.floor(bits / 1024) % 32
  const fraction = bits % 1024
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25))
}

const roundTo = (dtype: DType, value: number): number =>
  dtype === 'f32' ? Math.fround(value) : floatOfBf16(nearestBf16(Math.fround(value)))

/** Random source values of a dtype and what they mean. */
function randomSource(
  dtype: SourceDType,
  count: number,
  seed: number,
): { data: Float32Array | Uint16Array; meaning: Float32Array } {
  const numbers = randomNumbers(count, seed)
  if (dtype === 'f32') return { data: numbers, meaning: numbers }
  const data = new Uint16Array(count)
  if (dtype === 'bf16') for (let i = 0; i < count; i++) data[i] = nearestBf16(numbers[i] ?? 0)
  // Any finite half: magnitudes from denormal to 1.
  else
    for (let i = 0; i < count; i++)
      data[i] = Math.floor(Math.abs(numbers[i] ?? 0) * 0x3c00) + (i % 3 === 0 ? 0x8000 : 0)
  return { data, meaning: Float32Array.from(data, dtype === 'bf16' ? floatOfBf16 : floatOfF16) }
}

function sameBits(actual: Float32Array, expected: Float32Array, what: string): void {
  assert.equal(actual.length, expected.length, what)
  const a = new Uint32Array(actual.buffer, actual.byteOffset, actual.length)
  const e = new Uint32Array(expected.buffer, expected.byteOffset, expected.length)
  for (let i = 0; i < a.length; i++) {
    if (a[i] !== e[i]) assert.fail(`${what}: element ${i} is ${actual[i]}, expected ${expected[i]}`)
  }
}

const rounded = (dtype: DType, numbers: Float32Array): Float32Array => numbers.map((v) => roundTo(dtype, v))

/** float64 products of operands that are already rounded, and the sum of magnitudes, which scales the f32 error. */
function reference(
  x: Float32Array,
  w: Float32Array,
  m: number,
  n: number,
  k: number,
): { sums: Float64Array; sizes: Float64Array } {
  const sums = new Float64Array(m * n)
  const sizes = new Float64Array(m * n)
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0
      let size = 0
      for (let c = 0; c < k; c++) {
        const product = (x[i * k + c] ?? NaN) * (w[j * k + c] ?? NaN)
        sum += product
        size += Math.abs(product)
      }
      sums[i * n + j] = sum
      sizes[i * n + j] = size
    }
  }
  return { sums, sizes }
}

/** |y - sum| <= 2^-8 |sum| (bf16 result) or 2^-23 |sum| (f32), plus k 2^-24 sum of |products| for f32 accumulation. */
function checkProduct(y: Matrix, n: number, k: number, expected: ReturnType<typeof reference>, what: string): void {
  const got = values(y)
  let worst = 0
  let where = 0
  for (let i = 0; i < y.rows * n; i++) {
    const row = Math.floor(i / n)
    const actual = got[row * y.columns + (i % n)] ?? NaN
    const sum = expected.sums[i] ?? NaN
    const allowed =
      Math.abs(sum) * (y.dtype === 'bf16' ? 2 ** -8 : 2 ** -23) + k * 2 ** -24 * (expected.sizes[i] ?? NaN) + 1e-30
    const ratio = Math.abs(actual - sum) / allowed
    if (!(ratio <= worst)) {
      worst = ratio
      where = i
    }
    if (!(ratio <= 1)) break
  }
  assert.ok(worst <= 1, `${what}: y[${Math.floor(where / n)}, ${where % n}] is off by ${worst} of what is allowed`)
}

const throwsCode = (call: () => unknown, code: string, message: RegExp): void => {
  assert.throws(call, (error) => {
    assert.ok(error instanceof KernelError, String(error))
    assert.equal(error.code, code)
    assert.match(error.message, message)
    return true
  })
}

describeTiers('conversion', (tier) => {
  it('widens each of the 65536 bf16 and f16 values exactly', () => {
    const all = Uint16Array.from({ length: 65536 }, (_, i) => i)
    const out = new Float32Array(65536)
    convert(out, 'f32', all, 'bf16', { tier })
    assert.deepEqual(
      new Uint32Array(out.buffer),
      Uint32Array.from(all, (bits) => bits * 65536),
    )
    convert(out, 'f32', all, 'f16', { tier })
    for (let i = 0; i < 65536; i++) assert.ok(Object.is(out[i], floatOfF16(i)), `f16 ${i} became ${out[i]}`)
  })

  it('rounds to the nearest bf16, ties to even, from denormals to overflow', () => {
    const random = randomNumbers(20000, 7).map((v, i) => v * 2 ** ((i % 270) - 140))
    const ties = Float32Array.from({ length: 4000 }, (_, i) => floatOfBits(i * 65536 * 8 + 0x8000 + ((i % 3) - 1)))
    const special = [
      0,
      -0,
      Infinity,
      -Infinity,
      2 ** -149,
      -(2 ** -149),
      2 ** -126,
      3.4028234663852886e38,
      3.3895314e38,
      3.3961775e38,
    ]
    const input = Float32Array.from([...random, ...ties.filter((v) => !Number.isNaN(v)), ...special])
    const out = new Uint16Array(input.length)
    convert(out, 'bf16', input, 'f32', { tier })
    for (let i = 0; i < input.length; i++) {
      assert.equal(
        out[i],
        nearestBf16(input[i] ?? NaN),
        `${input[i]} (bits ${bitsOfFloat(input[i] ?? NaN).toString(16)})`,
      )
    }
    assert.ok(out.includes(0x7f80) && out.includes(0x0001), 'the data reach overflow and the smallest denormal')
  })

  it('keeps NaN a NaN, whatever its payload', () => {
    const bits = Uint32Array.of(0x7f800001, 0xff800001, 0x7fffffff, 0xffffffff, 0x7f808000, 0x7fc00000)
    const out = new Uint16Array(bits.length)
    convert(out, 'bf16', new Float32Array(bits.buffer), 'f32', { tier })
    for (const value of out) assert.ok((value & 0x7f80) === 0x7f80 && (value & 0x7f) !== 0, value.toString(16))
  })

  it('writes exactly the elements it is given, at any count and offset', () => {
    for (let count = 0; count <= 40; count++) {
      for (const offset of [0, 1, 5]) {
        const input = randomNumbers(count, count)
        const memory = new Uint16Array(count + offset + 20).fill(0xabcd)
        convert(memory.subarray(offset, offset + count), 'bf16', input, 'f32', { tier })
        const expected = new Uint16Array(memory.length).fill(0xabcd)
        input.forEach((v, i) => (expected[offset + i] = nearestBf16(v)))
        assert.deepEqual(memory, expected)
      }
    }
  })
})

describeTiers('packing', (tier) => {
  for (const dtype of dtypes) {
    it(`unpacks to the rounded source, ${dtype}, from f32, bf16 and f16, for odd sizes`, () => {
      for (const sourceDType of sourceDTypes) {
        for (const n of [1, 15, 16, 17, 32, 45]) {
          for (const k of [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200]) {
            const { data, meaning } = randomSource(sourceDType, n * k, n * 100 + k)
            const weight = pack(data, { n, k, dtype, sourceDType, tier })
            const what = `${sourceDType} [${n}, ${k}]`
            for (const reader of builtTiers.filter((t) => t === tier || t === 'scalar')) {
              sameBits(unpack(weight, { tier: reader }), rounded(dtype, meaning), `${what} read by ${reader}`)
            }
            weight.close()
          }
        }
      }
    })
  }

  it('reads a source at any byte, with any row stride, and nothing outside its rows', () => {
    for (const sourceDType of sourceDTypes) {
      for (const byteOffset of [0, 1, 2, 3, 7, 63]) {
        const [n, k, ld] = [19, 37, 41]
        const { data, meaning } = randomSource(sourceDType, n * ld, 3)
        const raw = new Uint8Array(data.buffer)
        // The last row ends with its k elements: what would be read past it does not exist.
        const lastRow = ((n - 1) * ld + k) * data.BYTES_PER_ELEMENT
        const bytes = new Uint8Array(byteOffset + lastRow)
        bytes.set(raw.subarray(0, lastRow), byteOffset)
        const weight = new PackedWeight({ dtype: 'bf16', n, k })
        packInto(weight, { data: bytes, dtype: sourceDType, ld, byteOffset }, { rows: n, tier })
        const expected = new Float32Array(n * k)
        for (let i = 0; i < n; i++) expected.set(rounded('bf16', meaning.subarray(i * ld, i * ld + k)), i * k)
        sameBits(unpack(weight, { tier: 'scalar' }), expected, `${sourceDType} at byte ${byteOffset}`)
        weight.close()
      }
    }
  })

  it('packs parts that share panels without touching each other, in any order', () => {
    const [n, k] = [53, 70]
    for (const dtype of dtypes) {
      const source = randomNumbers(n * k, 11)
      const weight = new PackedWeight({ dtype, n, k })
      const bounds = [0, 5, 16, 17, 40, 53]
      for (const part of [3, 0, 4, 2, 1]) {
        const first = bounds[part] ?? NaN
        const rows = (bounds[part + 1] ?? NaN) - first
        packInto(
          weight,
          { data: source.subarray(first * k, (first + rows) * k), dtype: 'f32' },
          { rows, output: first, tier },
        )
      }
      sameBits(unpack(weight, { tier: 'scalar' }), rounded(dtype, source), dtype)
      weight.close()
    }
  })

  it('alternates gate and up panels', () => {
    const [n, k] = [21, 33]
    const gate = randomNumbers(n * k, 1)
    const up = randomNumbers(n * k, 2)
    const weight = packGateUp(gate, up, { n, k, dtype: 'f32', tier })
    assert.equal(weight.n, 64)
    const all = unpack(weight, { tier: 'scalar' })
    for (let row = 0; row < 32; row++) {
      for (const [half, source] of [gate, up].entries()) {
        const output = (Math.floor(row / 16) * 2 + half) * 16 + (row % 16)
        const expected = row < n ? source.slice(row * k, (row + 1) * k) : new Float32Array(k)
        sameBits(all.slice(output * k, (output + 1) * k), expected, `row ${row} of half ${half}`)
      }
    }
    weight.close()
  })

  it('keeps special values of a bf16 source bit for bit', () => {
    const source = Uint16Array.of(0x7f80, 0xff80, 0x0001, 0x8000, 0x7f81, 0x7f7f, 0x0080)
    const weight = pack(source, { n: 1, k: 7, tier })
    const bits = new Uint32Array(unpack(weight, { tier }).buffer)
    assert.deepEqual(
      [...bits],
      [...source].map((v) => v * 65536),
    )
    weight.close()
  })
})

describeTiers('embedding rows', (tier) => {
  it('gives the rows asked for and zeros for ids outside, and writes only k columns', () => {
    for (const dtype of dtypes) {
      for (const yDType of dtypes) {
        for (const k of [1, 16, 31, 32, 48, 100]) {
          const n = 37
          const table = rounded(dtype, randomNumbers(n * k, k))
          const weight = pack(table, { n, k, dtype, tier })
          const ids = Int32Array.of(0, 36, 5, -1, 37, 5, 2147483647, -2147483648, 16)
          const ld = k + 3
          const data =
            yDType === 'f32' ? new Float32Array(ids.length * ld).fill(77) : new Uint16Array(ids.length * ld).fill(77)
          embed({ data, dtype: yDType, rows: ids.length, columns: k, ld }, ids, weight, { tier })
          ids.forEach((id, i) => {
            for (let c = 0; c < ld; c++) {
              const value = id >= 0 && id < n ? (table[id * k + c] ?? NaN) : 0
              const wanted = c >= k ? 77 : yDType === 'f32' ? value : nearestBf16(value)
              assert.equal(data[i * ld + c], wanted, `${dtype} to ${yDType}, k ${k}, id ${id}, column ${c}`)
            }
          })
          weight.close()
        }
      }
    }
  })
})

describeTiers('linear', (tier) => {
  const rowCounts = [...Array.from({ length: 33 }, (_, i) => i + 1), 47, 64, 65, 127]

  for (const dtype of dtypes) {
    it(`agrees with float64 for many shapes, ${dtype}`, () => {
      let cases = 0
      const check = (m: number, n: number, k: number): void => {
        const x = rounded(dtype, randomNumbers(m * k, m + 1000 * k))
        const w = rounded(dtype, randomNumbers(n * k, n + 2000 * k))
        const expected = reference(x, w, m, n, k)
        const weight = pack(w, { n, k, dtype, tier })
        const input = matrix(dtype, m, k, x)
        for (const yDType of dtypes) {
          const y = matrix(yDType, m, n)
          linear(y, input, weight, { tier })
          checkProduct(y, n, k, expected, `[${m}, ${k}] x [${n}, ${k}] to ${yDType}`)
          cases++
        }
        weight.close()
      }
      for (const m of rowCounts) for (const k of [1, 31, 33, 65]) check(m, 17, k)
      for (const n of [1, 15, 16, 31, 32, 33, 48, 49]) for (const m of [1, 5, 13, 16, 29]) check(m, n, 64)
      for (const k of [32, 63, 257, 1000, 4096, 4100]) for (const m of [1, 2, 7, 15]) check(m, 19, k)
      check(30, 33, 11008) // bf16: three runs of lines; f32: six
      assert.equal(cases, 2 * (rowCounts.length * 4 + 8 * 5 + 6 * 4 + 1))
    })

    it(`is exact on small integers, ${dtype}`, () => {
      for (const [m, n, k] of [
        [1, 40, 4096],
        [6, 33, 1000],
        [16, 48, 129],
        [31, 17, 4096],
      ] as const) {
        const x = smallIntegers(m * k, m)
        const w = smallIntegers(n * k, n)
        const weight = pack(w, { n, k, dtype, tier })
        const y = matrix('f32', m, n)
        linear(y, matrix(dtype, m, k, x), weight, { tier })
        sameBits(
          values(y),
          Float32Array.from(reference(x, w, m, n, k).sums, (v) => v + 0),
          `[${m}, ${n}, ${k}]`,
        )
        weight.close()
      }
    })

    it(`gives a row the same bits alone, in a batch and over any range of panels, ${dtype}`, () => {
      const [n, k] = [75, 4500]
      const bias = randomNumbers(n, 5)
      const weight = pack(randomNumbers(n * k, 1), { n, k, dtype, bias, tier })
      for (const m of [2, 5, 6, 14, 15, 29, 64]) {
        const x = matrix(dtype, m, k, randomNumbers(m * k, m))
        const whole = matrix('f32', m, n)
        linear(whole, x, weight, { tier })
        const pieces = matrix('f32', m, n)
        for (const panels of [
          [3, 5],
          [0, 1],
          [1, 3],
        ] as const)
          linear(pieces, x, weight, { tier, panels })
        sameBits(values(pieces), values(whole), `m ${m} in pieces`)
        for (let row = 0; row < m; row++) {
          const alone = { ...x, rows: 1, data: x.data.subarray(row * x.ld) }
          const y = matrix('f32', 1, n)
          linear(y, alone, weight, { tier })
          sameBits(values(y), values(whole).slice(row * n, (row + 1) * n), `row ${row} of ${m}`)
        }
      }
      weight.close()
    })

    it(`lets a NaN or infinity in x spoil only its own row, and one in W only its own output, ${dtype}`, () => {
      const [n, k] = [40, 70]
      for (const m of [1, 4, 8, 14, 15, 33]) {
        const clean = randomNumbers(m * k, m)
        const w = randomNumbers(n * k, 9)
        const weight = pack(w, { n, k, dtype, tier })
        const before = matrix('f32', m, n)
        linear(before, matrix(dtype, m, k, clean), weight, { tier })
        for (const bad of new Set([0, m >> 1, m - 1])) {
          const spoilt = clean.slice()
          spoilt[bad * k + k - 1] = NaN
          spoilt[bad * k] = Infinity
          const y = matrix('f32', m, n)
          linear(y, matrix(dtype, m, k, spoilt), weight, { tier })
          const expected = values(before)
          const got = values(y)
          for (let i = 0; i < m; i++) {
            const row = got.slice(i * n, (i + 1) * n)
            if (i === bad) assert.ok(row.every((v) => Number.isNaN(v)))
            else sameBits(row, expected.slice(i * n, (i + 1) * n), `row ${i} beside row ${bad}`)
          }
        }
        weight.close()
        const spoiltWeight = w.slice()
        spoiltWeight[17 * k + 3] = NaN
        const other = pack(spoiltWeight, { n, k, dtype, tier })
        const y = matrix('f32', m, n)
        linear(y, matrix(dtype, m, k, clean), other, { tier })
        values(y).forEach((v, i) => assert.equal(Number.isNaN(v), i % n === 17, `element ${i}`))
        other.close()
      }
    })

    it(`computes silu(gate) * up, with biases, ${dtype}`, () => {
      for (const [m, n, k] of [
        [1, 16, 64],
        [3, 21, 33],
        [14, 40, 100],
        [17, 33, 65],
        [40, 48, 32],
      ] as const) {
        const x = rounded(dtype, randomNumbers(m * k, 1)).map((v) => v * 4)
        const gate = rounded(dtype, randomNumbers(n * k, 2))
        const up = rounded(dtype, randomNumbers(n * k, 3))
        const weight = packGateUp(gate, up, { n, k, dtype, tier })
        const bias = randomNumbers(weight.n, 4)
        setBias(weight, bias)
        const gates = reference(x, gate, m, n, k)
        const ups = reference(x, up, m, n, k)
        const y = matrix('f32', m, n)
        linear(y, matrix(dtype, m, k, x), weight, { tier, activation: 'siluMul' })
        const got = values(y)
        for (let i = 0; i < m * n; i++) {
          const column = i % n
          const output = Math.floor(column / 16) * 32 + (column % 16)
          const g = (gates.sums[i] ?? NaN) + (bias[output] ?? NaN)
          const u = (ups.sums[i] ?? NaN) + (bias[output + 16] ?? NaN)
          const expected = (g / (1 + Math.exp(-g))) * u
          const tolerance = 1e-5 * (1 + Math.abs(g)) * (1 + Math.abs(u))
          assert.ok(Math.abs((got[i] ?? NaN) - expected) <= tolerance, `element ${i}: ${got[i]}, expected ${expected}`)
        }
        weight.close()
      }
    })

    it(`adds the bias in f32 and rounds to bf16 once, ${dtype}`, () => {
      const [m, n, k] = [20, 37, 50]
      const bias = randomNumbers(n, 3)
      const w = randomNumbers(n * k, 4)
      const plain = pack(w, { n, k, dtype, tier })
      const biased = pack(w, { n, k, dtype, bias, tier })
      for (const rows of [1, m]) {
        const x = matrix(dtype, rows, k, randomNumbers(rows * k, 5))
        const [without, withBias, narrow] = [matrix('f32', rows, n), matrix('f32', rows, n), matrix('bf16', rows, n)]
        linear(without, x, plain, { tier })
        linear(withBias, x, biased, { tier })
        linear(narrow, x, biased, { tier })
        const sums = values(without).map((v, i) => v + (bias[i % n] ?? NaN))
        sameBits(values(withBias), sums, 'bias')
        sameBits(values(narrow), rounded('bf16', sums), 'rounding')
      }
      plain.close()
      biased.close()
    })
  }

  it('reads nothing past the rounded width of x and writes nothing outside its panels of y', () => {
    for (const dtype of dtypes) {
      for (const m of [1, 3, 8, 14, 15, 31]) {
        const [n, k] = [33, 45]
        const numbers = randomNumbers(m * k, m)
        const tight = matrix(dtype, m, k, numbers)
        const wide = matrix(dtype, m, 128)
        wide.data.fill(dtype === 'f32' ? NaN : 0x7fc0)
        for (let i = 0; i < m; i++) wide.data.set(tight.data.subarray(i * tight.ld, i * tight.ld + 64), i * wide.ld)
        const weight = pack(randomNumbers(n * k, 2), { n, k, dtype, tier })
        const expected = matrix('f32', m, n)
        linear(expected, tight, weight, { tier })
        const ld = 61
        const data = new Float32Array(m * ld).fill(123)
        linear({ data, dtype: 'f32', rows: m, columns: n, ld }, { ...wide, columns: k }, weight, {
          tier,
          panels: [1, 3],
        })
        for (let i = 0; i < m; i++) {
          for (let c = 0; c < ld; c++) {
            const wanted = c < 16 || c >= 48 ? 123 : c < n ? expected.data[i * expected.ld + c] : 0
            assert.equal(data[i * ld + c], wanted, `${dtype}, m ${m}, row ${i}, column ${c}`)
          }
        }
        weight.close()
      }
    }
  })

  it('computes silu to a few units in the last place from -88 to 88, and stays finite far beyond', () => {
    // k = 1 and x = 1 make gate and up the weights themselves; up = 1.
    const gates = Float32Array.from({ length: 4096 }, (_, i) => (i - 2048) * 0.043 + 0.001)
    const far = Float32Array.of(-1e30, -1000, -150, -104, -90, 90, 104, 1000, 1e30, 0, -0)
    const all = Float32Array.from([...gates, ...far])
    const weight = packGateUp(all, new Float32Array(all.length).fill(1), { n: all.length, k: 1, dtype: 'f32', tier })
    const y = matrix('f32', 1, all.length)
    linear(y, matrix('f32', 1, 1, [1]), weight, { tier, activation: 'siluMul' })
    const got = values(y)
    all.forEach((g, i) => {
      const expected = g >= 0 ? g / (1 + Math.exp(-g)) : (g * Math.exp(g)) / (1 + Math.exp(g))
      const error = Math.abs((got[i] ?? NaN) - expected)
      assert.ok(error <= Math.abs(expected) * 5e-7 + 1e-42, `silu(${g}) is ${got[i]}, expected ${expected}`)
    })
    weight.close()
  })
})

describe('linear across tiers', () => {
  it('packs and embeds to the same bits and agrees in products', function () {
    const vector = tiers().find((t) => t.name === 'avx512_bf16')
    if (vector?.available !== true) return this.skip()
    const [m, n, k] = [9, 50, 333]
    for (const dtype of dtypes) {
      const w = randomNumbers(n * k, 1)
      const a = pack(w, { n, k, dtype, tier: 'scalar' })
      const b = pack(w, { n, k, dtype, tier: 'avx512_bf16' })
      sameBits(unpack(a), unpack(b), 'weights')
      const x = matrix(dtype, m, k, smallIntegers(m * k, 2))
      const [ya, yb] = [matrix('f32', m, n), matrix('f32', m, n)]
      linear(ya, x, a, { tier: 'scalar' })
      linear(yb, x, b, { tier: 'avx512_bf16' })
      const exact = values(ya)
      values(yb).forEach((v, i) => assert.ok(Math.abs(v - (exact[i] ?? NaN)) <= 1e-3, `element ${i}`))
      a.close()
      b.close()
    }
  })

  it('reads a stream to the same xor', () => {
    const data = new Uint8Array(4096).map((_, i) => (i * 37) ^ (i >> 3))
    const words = new BigUint64Array(data.buffer)
    const expected = words.reduce((a, b) => a ^ b, 0n)
    for (const report of tiers().filter((t) => t.available))
      assert.equal(streamRead(data, { tier: report.name }), expected)
    throwsCode(() => streamRead(new Uint8Array(100)), 'ERR_INVALID_ARGUMENT', /multiple of 512/)
  })
})

describe('choice of the tier', () => {
  it('caps at a tier, and falls to the best below it', () => {
    assert.equal(selectTier('scalar'), 'scalar')
    assert.equal(selectTier('scalar!'), 'scalar')
    const best = tiers().find((t) => t.available)
    assert.equal(selectTier('amx'), best?.name)
  })

  it('refuses a name that is no tier and a demanded tier that cannot run, naming those that can', () => {
    throwsCode(() => selectTier('sse9'), 'ERR_INVALID_ARGUMENT', /sse9.*no tier.*scalar/)
    throwsCode(() => selectTier('!'), 'ERR_INVALID_ARGUMENT', /no tier/)
    const absent = tiers().filter((t) => !t.available)
    for (const report of absent) {
      assert.ok(report.reason.length > 10, report.name)
      throwsCode(() => selectTier(`${report.name}!`), 'ERR_UNSUPPORTED', /Tiers that can: .*scalar/)
    }
  })

  it('follows TILERANK_ISA', () => {
    const before = process.env['TILERANK_ISA']
    try {
      process.env['TILERANK_ISA'] = 'scalar'
      assert.equal(selectTier(), 'scalar')
      process.env['TILERANK_ISA'] = 'nonsense'
      throwsCode(() => selectTier(), 'ERR_INVALID_ARGUMENT', /TILERANK_ISA is 'nonsense'/)
    } finally {
      if (before === undefined) delete process.env['TILERANK_ISA']
      else process.env['TILERANK_ISA'] = before
    }
  })
})

describe('misuse of linear kernels', () => {
  const [n, k] = [20, 40]
  const weight = pack(randomNumbers(n * k, 1), { n, k, dtype: 'f32' })
  const gateUp = packGateUp(randomNumbers(n * k, 1), randomNumbers(n * k, 2), { n, k, dtype: 'f32' })
  const x = matrix('f32', 2, k)
  const y = matrix('f32', 2, n)
  const wrong = (call: () => unknown, message: RegExp): void => throwsCode(call, 'ERR_INVALID_ARGUMENT', message)

  it('refuses shapes that do not fit', () => {
    wrong(() => linear(y, matrix('f32', 2, k + 1), weight), /41 columns; the weight takes 40/)
    wrong(() => linear(y, matrix('bf16', 2, k), weight), /x is bf16 and the weight f32/)
    wrong(() => linear(y, matrix('f32', 3, k), weight), /y has 2 rows for the 3 of x/)
    wrong(() => linear({ ...y, ld: 20, columns: 20 }, x, weight), /32 columns are written/)
    wrong(() => linear(y, { ...x, data: x.data.subarray(0, 50) }, weight), /50 elements/)
    wrong(() => linear({ ...y, data: y.data.subarray(0, y.ld + 25) }, x, weight), /y has .* bytes/)
    wrong(() => linear(y, { ...x, ld: 40 }, weight), /at least 64 elements apart/)
    wrong(() => linear(y, { ...x, data: x.data.subarray(1), rows: 1 }, weight), /64-byte boundaries/)
  })

  it('refuses garbage in the padding of x, which would turn into NaN', () => {
    const dirty = matrix('f32', 2, k)
    dirty.data[dirty.ld + k] = NaN
    wrong(() => linear(y, dirty, weight), /columns 40 to 47 of x must be zero/)
  })

  it('refuses panel ranges outside the weight, and halves of a gate and up pair', () => {
    for (const panels of [
      [0, 3],
      [-1, 1],
      [2, 1],
      [0.5, 1],
    ] as const)
      wrong(() => linear(y, x, weight, { panels }), /panels/)
    wrong(() => linear(y, x, gateUp, { activation: 'siluMul', panels: [0, 3] }), /even/)
    wrong(() => linear(y, x, weight, { activation: 'siluMul' }), /packGateUp/)
    wrong(() => linear(y, x, weight, { activation: 'gelu' as 'none' }), /gelu/)
  })

  it('refuses sources that are too short or of another type', () => {
    wrong(() => pack(new Float32Array(n * k - 1), { n, k }), /bytes/)
    wrong(() => pack(new Uint16Array(n * k), { n, k, sourceDType: 'f32' }), /Float32Array/)
    wrong(() => pack(new Float32Array(n * k), { n, k, bias: new Float32Array(3) }), /bias/)
    wrong(() => pack(new Float32Array(4), { n: 0, k: 4 }), /n is 0/)
    wrong(() => pack(new Float32Array(4), { n: 1, k: 2 ** 31 }), /k is/)
    wrong(
      () => packInto(weight, { data: new Float32Array(k), dtype: 'f32' }, { rows: 1, output: n }),
      /output 21 of 20/,
    )
    wrong(
      () => packInto(weight, { data: new Float32Array(k), dtype: 'f32' }, { rows: 1, half: 'up' }),
      /no gate and up/,
    )
    wrong(() => packInto(gateUp, { data: new Float32Array(k), dtype: 'f32' }, { rows: 1 }), /gate and up halves/)
    wrong(() => unpack(weight, { output: 10, rows: 11 }), /21 of 20/)
    wrong(() => embed(y, Int32Array.of(1), weight), /20 columns; rows of the weight have 40/)
    wrong(() => embed(matrix('f32', 1, k), Int32Array.of(1, 2), weight), /1 rows for 2 ids/)
    wrong(() => convert(new Float32Array(3), 'f32', new Uint16Array(2), 'bf16'), /3 elements and input 2/)
    wrong(() => convert(new Uint16Array(3), 'f32', new Uint16Array(3), 'bf16'), /Float32Array/)
    wrong(() => convert(new Uint16Array(1), 'f16' as 'f32', new Float32Array(1), 'f32'), /f16/)
    wrong(() => new PackedWeight({ dtype: 'int8' as 'f32', n: 1, k: 1 }), /int8/)
    wrong(() => matrix('f32', 2, 3, [1, 2]), /2 numbers/)
  })

  it('refuses an unknown tier and a closed weight', () => {
    throwsCode(() => linear(y, x, weight, { tier: 'quantum' }), 'ERR_INVALID_ARGUMENT', /quantum/)
    const closed = pack(new Float32Array(k), { n: 1, k })
    closed.close()
    closed.close()
    throwsCode(() => unpack(closed), 'ERR_CLOSED', /closed/)
  })

  it('refuses weights larger than any memory, before asking for it', () => {
    throwsCode(() => new PackedWeight({ dtype: 'f32', n: 2 ** 30, k: 2 ** 30 }), 'ERR_NO_MEMORY', /would take/)
  })
})
