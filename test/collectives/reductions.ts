// What every reduction of every dtype must give, worked out apart from the kernels: integers with BigInt, floats one operation after the
// other with rounding by its definition. Elements are handled by their bits, so that -0 and NaN count.

import type { CollectiveDType, ReduceOp, TypedArray } from '../../collectives/index.js'

export const floatDTypes = ['f32', 'f64', 'bf16', 'f16'] as const
export const integerDTypes = ['i8', 'u8', 'i32', 'u32', 'i64', 'u64'] as const
export const floatOps = ['sum', 'prod', 'min', 'max', 'avg'] as const
export const integerOps = [...floatOps, 'band', 'bor', 'bxor'] as const

export const arrayOf = {
  f32: Float32Array,
  f64: Float64Array,
  bf16: Uint16Array,
  f16: Uint16Array,
  i8: Int8Array,
  u8: Uint8Array,
  i32: Int32Array,
  u32: Uint32Array,
  i64: BigInt64Array,
  u64: BigUint64Array,
} as const

type FloatDType = (typeof floatDTypes)[number]
const isFloat = (dtype: CollectiveDType): dtype is FloatDType => floatDTypes.includes(dtype as FloatDType)

/** Digits of the significand, and the exponents of the least normal and the greatest number. */
const formats = { bf16: [8, -126, 127], f16: [11, -14, 15] } as const

/** To nearest, ties to even, in any binary format: exact, as scaling by powers of two is. */
function round(x: number, [digits, least, greatest]: readonly [number, number, number]): number {
  if (!Number.isFinite(x) || x === 0) return x
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(x))), least)
  // log2 may be off by one at a power of two
  const tuned =
    Math.abs(x) >= 2 ** (exponent + 1) ? exponent + 1 : Math.abs(x) < 2 ** exponent ? exponent - 1 : exponent
  const unit = 2 ** (Math.max(tuned, least) - digits + 1)
  const scaled = Math.abs(x) / unit
  const below = Math.floor(scaled)
  const rest = scaled - below
  const whole = rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below
  const size = whole * unit
  return Math.sign(x) * (size > 2 ** (greatest + 1) - 2 ** (greatest - digits + 1) ? Infinity : size)
}

function decode(bits: number, [digits, least]: readonly [number, number, number]): number {
  const sign = (bits & 0x8000) === 0 ? 1 : -1
  const fraction = bits & ((1 << (digits - 1)) - 1)
  const exponent = (bits & 0x7fff) >> (digits - 1)
  const top = 0x7fff >> (digits - 1)
  if (exponent === top) return fraction === 0 ? sign * Infinity : NaN
  if (exponent === 0) return sign * fraction * 2 ** (least - digits + 1)
  return sign * (1 + fraction * 2 ** (1 - digits)) * 2 ** (exponent + least - 1)
}

function encode(x: number, [digits, least]: readonly [number, number, number]): number {
  const top = 0x7fff >> (digits - 1)
  if (Number.isNaN(x)) return (top << (digits - 1)) | (1 << (digits - 2))
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0
  const size = Math.abs(x)
  if (size === Infinity) return sign | (top << (digits - 1))
  if (size < 2 ** least) return sign | (size / 2 ** (least - digits + 1))
  let exponent = Math.floor(Math.log2(size))
  if (size >= 2 ** (exponent + 1)) exponent++
  else if (size < 2 ** exponent) exponent--
  return sign | ((exponent - least + 1) << (digits - 1)) | ((size / 2 ** exponent - 1) * 2 ** (digits - 1))
}

const isBelow = (a: number, b: number): boolean => a < b || (Object.is(a, -0) && Object.is(b, 0))

function combineFloats(values: readonly number[], op: ReduceOp, step: (x: number) => number): number {
  const result = values.reduce((a, b) => {
    if (Number.isNaN(a) || Number.isNaN(b)) return NaN
    if (op === 'min') return isBelow(b, a) ? b : a
    if (op === 'max') return isBelow(a, b) ? b : a
    return step(op === 'prod' ? a * b : a + b)
  })
  const last = op === 'avg' ? step(result / values.length) : result
  return Number.isNaN(last) ? NaN : last // of one bit pattern, whatever came in
}

const truncated = (sum: bigint, count: number): bigint => sum / BigInt(count)

function combineIntegers(values: readonly bigint[], op: ReduceOp): bigint {
  const result = values.reduce((a, b) => {
    switch (op) {
      case 'prod':
        return a * b
      case 'min':
        return a < b ? a : b
      case 'max':
        return a > b ? a : b
      case 'band':
        return a & b
      case 'bor':
        return a | b
      case 'bxor':
        return a ^ b
      default:
        return a + b
    }
  })
  return op === 'avg' ? truncated(result, values.length) : result
}

/** The array that a reduction of these, one of each rank, must leave on all. */
export function reduced(dtype: CollectiveDType, op: ReduceOp, sources: readonly TypedArray[]): TypedArray {
  const count = sources[0]?.length ?? 0
  const column = (i: number): (number | bigint)[] => sources.map((source) => source[i] ?? NaN)
  if (!isFloat(dtype)) {
    const out = new arrayOf[dtype](count)
    const bits = 8 * out.BYTES_PER_ELEMENT
    const wrap = (x: bigint): bigint => (dtype.startsWith('i') ? BigInt.asIntN(bits, x) : BigInt.asUintN(bits, x))
    for (let i = 0; i < count; i++) {
      const value = wrap(combineIntegers(column(i).map(BigInt), op))
      if (out instanceof BigInt64Array || out instanceof BigUint64Array) out[i] = value
      else out[i] = Number(value)
    }
    return out
  }
  const out = new arrayOf[dtype](count)
  for (let i = 0; i < count; i++) {
    const values = column(i).map(Number)
    if (dtype === 'f64') out[i] = combineFloats(values, op, (x) => x)
    else if (dtype === 'f32') out[i] = combineFloats(values, op, Math.fround)
    else {
      const format = formats[dtype]
      const halves = values.map((bits) => decode(bits, format))
      out[i] = encode(round(combineFloats(halves, op, Math.fround), format), format)
    }
  }
  return out
}

/** Any bits, so that NaN, infinities and denormals are among them; in half of the elements numbers that are near each other. */
export function elements(dtype: CollectiveDType, count: number, seed: number): TypedArray {
  const out = new arrayOf[dtype](count)
  const bytes = new Uint8Array(out.buffer)
  let state = seed >>> 0
  const next = (): number => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return (t ^ (t >>> 14)) >>> 0
  }
  for (let i = 0; i < bytes.length; i++) bytes[i] = next() >>> 24
  const special = { f32: [0, -0, NaN, Infinity, -Infinity], f64: [0, -0, NaN, Infinity, -Infinity] } as const
  for (let i = 0; i < count; i += 2) {
    const value = (next() % 2001) / 8 - 125
    if (dtype === 'bf16' || dtype === 'f16') {
      // 0, -0, NaN, infinities; or a number between 2^-3 and 2^2 of either sign
      const one = dtype === 'bf16' ? 0x3f80 : 0x3c00
      const top = dtype === 'bf16' ? 0x7f80 : 0x7c00
      const odd = [0, 0x8000, top | 1, top, top | 0x8000]
      const near = ((next() & 0x8000) | (one - 0x180 + (next() % 0x280))) & 0xffff
      out[i] = next() % 8 === 0 ? (odd[next() % odd.length] ?? 0) : near
    } else if (dtype === 'f32' || dtype === 'f64') {
      out[i] = next() % 8 === 0 ? (special[dtype][next() % 5] ?? 0) : value
    } else if (out instanceof BigInt64Array || out instanceof BigUint64Array) {
      out[i] = BigInt(Math.trunc(value))
    } else {
      out[i] = Math.trunc(value)
    }
  }
  return out
}
