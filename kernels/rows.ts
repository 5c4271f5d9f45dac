// Row kernels: reductions over sources and slots, RMSNorm, softmax statistics. One native call each; shapes are checked
// first, here and (extents against arrays) at the native border. bf16 values are Uint16Array, the upper halves of f32.
// reduceSum, reduceResidual and rmsNorm give the same bits on every tier.

import { nativeAddon } from '../native/index.js'
import type { DType } from '../native/types.js'
import { callKernel } from './errors.js'

/** Which implementation runs. One that this machine cannot run is an error, never replaced. */
export type KernelTier = 'scalar' | 'avx512_bf16'

/** Elements that one partial sum of squares covers. */
export const sumBlock = 256

export type Elements = Float32Array | Uint16Array
export type Bytes = Elements | Uint8Array

export interface CopyBytesOptions {
  readonly tier: KernelTier
  readonly out: ArrayBufferView
  readonly in: ArrayBufferView
}

export interface ReduceSumOptions {
  readonly tier: KernelTier
  /**
   * May be one of the sources itself, but not overlap one in part. Arrays are taken by their bytes, at any alignment.
   */
  readonly out: Bytes
  readonly sources: readonly Bytes[]
  readonly dtype: DType
  /** Elements. */
  readonly count: number
}

export interface ReduceResidualOptions {
  readonly tier: KernelTier
  /** Each [rows, ldSlot] of slotDtype. */
  readonly slots: readonly Elements[]
  readonly slotDtype: DType
  readonly rows: number
  readonly columns: number
  /** [rows, columns] */
  readonly residual: Float32Array
  /** false: the old content of residual is ignored. */
  readonly addResidual: boolean
  /** [columns], added once after the slots. */
  readonly bias?: Float32Array
  /** [rows, ceil(columns / 256)] */
  readonly sumSquares: Float32Array
  /** Elements between rows of a slot; default columns. */
  readonly ldSlot?: number
  /** Columns [start, end) only, both multiples of 256 or `columns`; default all. */
  readonly range?: readonly [start: number, end: number]
}

export interface RmsNormOptions {
  readonly tier: KernelTier
  /** [rows, columns] */
  readonly x: Float32Array
  /** [rows, ceil(columns / 256)], as reduceResidual leaves them. */
  readonly sumSquares: Float32Array
  /** [columns] */
  readonly gamma: Float32Array
  readonly eps: number
  /** [rows, ldy] of yDtype */
  readonly y: Elements
  readonly yDtype: DType
  readonly rows: number
  readonly columns: number
  readonly ldy?: number
  readonly range?: readonly [start: number, end: number]
}

export interface MaxSumExpResult {
  /** -Infinity when no value is above it. */
  readonly max: number
  /** First index of the largest value; 0 when all are -Infinity or NaN, -1 when there are none. */
  readonly argmax: number
  /** Sum of exp(scale * (x - max)); NaN and -Infinity add nothing. 0 when max is -Infinity. */
  readonly sumExp: number
}

interface RowsAddon {
  copyBytes(options: CopyBytesOptions): void
  reduceSum(options: ReduceSumOptions): void
  reduceResidual(options: Record<string, unknown>): void
  rmsNorm(options: Record<string, unknown>): void
  maxSumExp(options: Record<string, unknown>): MaxSumExpResult
}

function addon(): RowsAddon {
  return nativeAddon() as RowsAddon
}

/** out = in, byte for byte; the two lie apart and out is at least as long. */
export function copyBytes(options: CopyBytesOptions): void {
  callKernel(() => addon().copyBytes(options))
}

/**
 * out[i] = sum of sources[s][i] in the order of s, in f32, rounded once to nearest even. NaN results have one bit
 * pattern.
 */
export function reduceSum(options: ReduceSumOptions): void {
  callKernel(() => addon().reduceSum(options))
}

/**
 * residual = (addResidual ? residual : 0) + (slots in order + bias); sumSquares = squares of the new residual per 256
 * columns.
 */
export function reduceResidual(options: ReduceResidualOptions): void {
  const { range, bias, columns, slots, slotDtype, ...rest } = options
  const native = {
    ...rest,
    slots,
    slotDtype,
    columns,
    bias: bias ?? null,
    ldSlot: options.ldSlot ?? columns,
    ldResidual: columns,
    ldSum: Math.ceil(columns / sumBlock),
    column0: range?.[0] ?? 0,
    column1: range?.[1] ?? columns,
  }
  callKernel(() => addon().reduceResidual(native))
}

/** y = x / sqrt(sum(sumSquares) / columns + eps) * gamma */
export function rmsNorm(options: RmsNormOptions): void {
  const { range, columns, y, yDtype, ...rest } = options
  const native = {
    ...rest,
    y,
    yDtype,
    columns,
    ldx: columns,
    ldSum: Math.ceil(columns / sumBlock),
    ldy: options.ldy ?? columns,
    column0: range?.[0] ?? 0,
    column1: range?.[1] ?? columns,
  }
  callKernel(() => addon().rmsNorm(native))
}

/** Largest value, its first index, and the sum of exponentials that softmax and sampling need. */
export function maxSumExp(tier: KernelTier, x: Float32Array, scale = 1): MaxSumExpResult {
  return callKernel(() => addon().maxSumExp({ tier, x, scale, count: x.length }))
}
