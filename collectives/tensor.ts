// A tensor that every rank of a group maps: what group.alloc returns. Collectives on it copy nothing, or once.

import { elementBytes, type DType, type Shape } from '../native/types.js'
import { invalid } from './errors.js'

export class Tensor {
  /** Length 0 once the group is closed. bf16: the upper halves of f32 values. */
  readonly data: Float32Array | Uint16Array
  /** Elements. */
  readonly count: number

  /** @internal use group.alloc */
  constructor(
    /** The group that it belongs to. */
    readonly group: object,
    readonly dtype: DType,
    readonly shape: Shape,
    buffer: ArrayBuffer,
    /** The group's number for it. */
    readonly id: number,
  ) {
    this.data = dtype === 'f32' ? new Float32Array(buffer) : new Uint16Array(buffer)
    this.count = this.data.length
  }

  get nbytes(): number {
    return this.count * elementBytes[this.dtype]
  }

  /** A copy of the values. */
  toFloat32(): Float32Array {
    this.#checkOpen()
    return this.data instanceof Float32Array ? this.data.slice() : widen(this.data)
  }

  /** Writes values, rounded to the tensor's dtype, from element `offset` on. */
  set(values: ArrayLike<number>, offset = 0): this {
    this.#checkOpen()
    if (!Number.isInteger(offset) || offset < 0 || offset + values.length > this.count) {
      throw invalid(
        `${String(values.length)} values at element ${String(offset)} do not fit into a tensor of ${String(this.count)} elements`,
      )
    }
    if (this.data instanceof Float32Array) this.data.set(values, offset)
    else narrow(values, this.data, offset)
    return this
  }

  #checkOpen(): void {
    if (this.data.length !== this.count) throw invalid('the group of this tensor is closed, and its memory with it')
  }
}

function widen(values: Uint16Array): Float32Array {
  const out = new Float32Array(values.length)
  const bits = new Uint32Array(out.buffer)
  for (let i = 0; i < values.length; i++) bits[i] = (values[i] ?? 0) << 16
  return out
}

/** To nearest, ties to even; NaN stays NaN. */
function narrow(values: ArrayLike<number>, out: Uint16Array, offset: number): void {
  const value = new Float32Array(1)
  const bits = new Uint32Array(value.buffer)
  for (let i = 0; i < values.length; i++) {
    value[0] = values[i] ?? 0
    const word = bits[0] ?? 0
    const isNaN = (word & 0x7fffffff) > 0x7f800000
    out[offset + i] = isNaN ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16
  }
}
