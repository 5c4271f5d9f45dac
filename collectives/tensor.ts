// A tensor that every rank of a group maps: what group.alloc returns. Collectives on it copy nothing, or once.

import { elementBytes, type CollectiveDType, type Shape } from '../native/types.js'
import type { TypedArray } from './communicator.js'
import { invalid } from './errors.js'

const arrays = {
  f32: Float32Array,
  bf16: Uint16Array,
  f16: Uint16Array,
  f64: Float64Array,
  i8: Int8Array,
  u8: Uint8Array,
  i32: Int32Array,
  u32: Uint32Array,
  i64: BigInt64Array,
  u64: BigUint64Array,
} as const

// By the name that a typed array has for itself, whatever class was made of it (Buffer).
const dtypesByTag = new Map<string, Exclude<CollectiveDType, 'bf16' | 'f16'> | 'half'>([
  ['Float32Array', 'f32'],
  ['Float64Array', 'f64'],
  ['Int8Array', 'i8'],
  ['Uint8Array', 'u8'],
  ['Uint16Array', 'half'],
  ['Int32Array', 'i32'],
  ['Uint32Array', 'u32'],
  ['BigInt64Array', 'i64'],
  ['BigUint64Array', 'u64'],
])

/** What a typed array holds; 'half': a Uint16Array, bf16 or f16; undefined: nothing that collectives take. */
export function dtypeOfArray(data: unknown): Exclude<CollectiveDType, 'bf16' | 'f16'> | 'half' | undefined {
  return ArrayBuffer.isView(data) ? dtypesByTag.get((data as unknown as TypedArray)[Symbol.toStringTag]) : undefined
}

/** The typed array that holds a dtype. */
export type ArrayOf<D extends CollectiveDType> = InstanceType<(typeof arrays)[D]>

/** A call on tensors that was checked before: what was given, and a function that does the same again. */
export interface Plan {
  readonly name: string
  readonly data: Tensor | undefined
  readonly output: Tensor | undefined
  /** Option by option; undefined where it was left out. */
  readonly root: number | undefined
  readonly op: string | undefined
  readonly algorithm: string | undefined
  readonly wire: string | undefined
  readonly dtype: string | undefined
  readonly timeoutMs: number | undefined
  /** How many options there were. */
  readonly options: number
  readonly run: () => void
}

export class Tensor<D extends CollectiveDType = CollectiveDType> {
  /** Length 0 once the group is closed. bf16 and f16 by their bits. */
  readonly data: ArrayOf<D>
  /** Elements. */
  readonly count: number
  /** Calls that it is the first memory of. @internal */
  readonly plans: Plan[] = []

  /** @internal use group.alloc */
  constructor(
    /** The group that it belongs to. */
    readonly group: object,
    readonly dtype: D,
    readonly shape: Shape,
    buffer: ArrayBuffer,
    /** The group's number for it. */
    readonly id: number,
  ) {
    this.data = new arrays[dtype](buffer) as ArrayOf<D>
    this.count = this.data.length
  }

  get nbytes(): number {
    return this.count * elementBytes[this.dtype]
  }

  /** A copy of the values. Those that f32 does not hold, such as large integers, are rounded. */
  toFloat32(): Float32Array {
    this.#checkOpen()
    const data: TypedArray = this.data
    if (data instanceof Uint16Array) return this.dtype === 'bf16' ? fromBf16(data) : fromF16(data)
    return data instanceof BigInt64Array || data instanceof BigUint64Array
      ? Float32Array.from(data, Number)
      : Float32Array.from(data)
  }

  /**
   * Writes values, rounded to the tensor's dtype, from element `offset` on; integer tensors take them as a typed array's set() does.
   * @throws CollectiveError ERR_INVALID_ARGUMENT when they do not fit, or are no integers for an i64 or u64 tensor
   */
  set(values: ArrayLike<number | bigint>, offset = 0): this {
    this.#checkOpen()
    if (!Number.isInteger(offset) || offset < 0 || offset + values.length > this.count) {
      throw invalid(
        `${String(values.length)} values at element ${String(offset)} do not fit into a tensor of ${String(this.count)} elements`,
      )
    }
    const data: TypedArray = this.data
    if (data instanceof BigInt64Array || data instanceof BigUint64Array) {
      for (let i = 0; i < values.length; i++) data[offset + i] = toBigInt(values[i] ?? 0)
      return this
    }
    const toBits = this.dtype === 'bf16' ? toBf16 : this.dtype === 'f16' ? toF16 : (value: number) => value
    for (let i = 0; i < values.length; i++) data[offset + i] = toBits(Number(values[i]))
    return this
  }

  #checkOpen(): void {
    if (this.data.length !== this.count) throw invalid('the group of this tensor is closed, and its memory with it')
  }
}

function toBigInt(value: number | bigint): bigint {
  if (typeof value === 'bigint') return value
  if (!Number.isInteger(value)) throw invalid(`${String(value)} is no integer, which this tensor holds`)
  return BigInt(value)
}

const asFloat = new Float32Array(1)
const asBits = new Uint32Array(asFloat.buffer)

function floatOf(bits: number): number {
  asBits[0] = bits
  return asFloat[0] ?? NaN
}

function bitsOf(value: number): number {
  asFloat[0] = value
  return asBits[0] ?? 0
}

function fromBf16(values: Uint16Array): Float32Array {
  const out = new Float32Array(values.length)
  const bits = new Uint32Array(out.buffer)
  for (let i = 0; i < values.length; i++) bits[i] = (values[i] ?? 0) << 16
  return out
}

function fromF16(values: Uint16Array): Float32Array {
  return Float32Array.from(values, (half) => {
    const sign = (half & 0x8000) === 0 ? 1 : -1
    const size = half & 0x7fff
    if (size >= 0x7c00) return size === 0x7c00 ? sign * Infinity : NaN
    return sign * floatOf(size << 13) * 2 ** 112
  })
}

/** To nearest, ties to even; NaN stays NaN. */
function toBf16(value: number): number {
  const word = bitsOf(value)
  const isNaN = (word & 0x7fffffff) > 0x7f800000
  return isNaN ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16
}

/** To nearest, ties to even, of the value as f32; NaN stays NaN. */
function toF16(value: number): number {
  const word = bitsOf(value)
  const sign = (word >>> 16) & 0x8000
  const size = word & 0x7fffffff
  if (size > 0x7f800000) return sign | 0x7e00
  if (size >= 0x477ff000) return sign | 0x7c00
  // Below 2^-14: a unit of 0.5 as f32 is 2^-24, that of denormals; the addition rounds.
  if (size < 0x38800000) return sign | (bitsOf(floatOf(size) + 0.5) - 0x3f000000)
  return sign | ((size - 0x38000000 + 0xfff + ((size >>> 13) & 1)) >>> 13)
}
