// Linear layers on one rank: weights packed for the kernels, y = x W^T, embedding rows, conversions. For programs, tests and
// benchmarks; the runner calls the same kernels without passing here. Shapes are checked, then exactly one native call is made.
// bf16 and f16 values are the bits in a Uint16Array.

import { nativeAddon } from '../native/index.js'
import { elementBytes, type DType, type SourceDType } from '../native/types.js'
import { callKernel, KernelError } from './errors.js'

/** A kernel tier by name: 'scalar', 'avx512_bf16', ... Which of them run here: tiers(). */
export type TierName = string

export interface TierReport {
  readonly name: TierName
  readonly available: boolean
  /** What the processor has or lacks, or that this version was built without the tier. */
  readonly reason: string
}

type WeightHandle = { readonly brand: 'packed weight' }
type AnyArray = Float32Array | Uint16Array | Uint8Array

/** What native/addon_linear.cpp exports. */
export interface LinearAddon {
  tiers(): readonly TierReport[]
  selectTier(cap: string): TierName
  createPacked(args: { dtype: DType; n: number; k: number }): WeightHandle
  closePacked(args: { weight: WeightHandle }): void
  setBias(args: { weight: WeightHandle; bias: Float32Array }): void
  pack(args: {
    tier: TierName
    weight: WeightHandle
    source: AnyArray
    sourceDType: SourceDType
    sourceLd: number
    byteOffset: number
    rows: number
    n0: number
    interleave: 1 | 2
    phase: 0 | 1
  }): void
  unpack(args: { tier: TierName; weight: WeightHandle; n0: number; rows: number; out: Float32Array; ld: number }): void
  embed(args: {
    tier: TierName
    weight: WeightHandle
    ids: Int32Array
    rows: number
    y: AnyArray
    yDType: DType
    ldy: number
  }): void
  linear(args: {
    tier: TierName
    weight: WeightHandle
    x: AnyArray
    ldx: number
    m: number
    y: AnyArray
    yDType: DType
    ldy: number
    activation: 0 | 1
    panel0: number
    panel1: number
  }): void
  convert(args: {
    tier: TierName
    out: AnyArray
    outDType: DType
    in: AnyArray
    inDType: SourceDType
    count: number
  }): void
  streamRead(args: { tier: TierName; data: AnyArray }): bigint
  misalignment(args: { data: AnyArray }): number
  machineLimits(args: { threads: number; megabytes: number; seconds: number }): {
    readonly bf16Flops: number
    readonly f32Flops: number
    readonly readBytes: number
  }
  timeGemm(args: {
    tier: TierName
    dtype: DType
    m: number
    n: number
    k: number
    threads: number
    seconds: number
    coldMegabytes: number
  }): {
    readonly medianSeconds: number
    readonly bestSeconds: number
    readonly repetitions: number
    readonly weightBytes: number
  }
}

/** The addon as this folder's linear part sees it. */
export function linearAddon(): LinearAddon {
  return nativeAddon() as LinearAddon
}

/** Every tier this version knows, best first, with the reason for each that cannot run here. */
export function tiers(): readonly TierReport[] {
  return callKernel(() => linearAddon().tiers())
}

/**
 * The best tier that runs here at or below `cap`; 'name!' demands that very tier. Without a cap the variable TILERANK_ISA is
 * asked, and without that there is none.
 */
export function selectTier(cap = ''): TierName {
  return callKernel(() => linearAddon().selectTier(cap))
}

/** The tier that calls without a `tier` use. */
export function selectedTier(): TierName {
  return selectTier()
}

export interface TierOption {
  /** Exactly this tier, or ERR_UNSUPPORTED. Default: selectedTier(). */
  readonly tier?: TierName
}

const panelOutputs = 16
const roundUp = (value: number, step: number): number => Math.ceil(value / step) * step

function fail(message: string): never {
  throw new KernelError('ERR_INVALID_ARGUMENT', message)
}

function checkExtent(name: string, value: number, low = 1): void {
  if (!Number.isInteger(value) || value < low || value > 2 ** 30) {
    fail(`${name} is ${value}; it must be an integer from ${low} to 2^30`)
  }
}

/** Plain JavaScript callers have no compiler to tell them. */
function checkChoice(name: string, value: string, allowed: readonly string[]): void {
  if (!allowed.includes(value)) fail(`${name} '${value}' is none of: ${allowed.join(', ')}`)
}

function checkArray(name: string, array: AnyArray, dtype: SourceDType): void {
  const isRight = dtype === 'f32' ? array instanceof Float32Array : array instanceof Uint16Array
  if (!isRight) fail(`${name} is ${dtype} and must be a ${dtype === 'f32' ? 'Float32Array' : 'Uint16Array (the bits)'}`)
}

/** Row-major [rows, columns] of dtype; row r starts at element r * ld. Columns from `columns` up to ld hold zeros. */
export interface Matrix {
  readonly data: Float32Array | Uint16Array
  readonly dtype: DType
  readonly rows: number
  readonly columns: number
  readonly ld: number
}

/**
 * A matrix as linear() takes it: rows on 64-byte boundaries, columns rounded up to 32 with zeros. `values`, row-major without
 * gaps, are rounded to dtype. An ld that is a multiple of 4 KiB is widened, since such rows compete for one cache set.
 */
export function matrix(dtype: DType, rows: number, columns: number, values?: ArrayLike<number>): Matrix {
  checkExtent('rows', rows)
  checkExtent('columns', columns)
  if (values !== undefined && values.length !== rows * columns) {
    fail(`values holds ${values.length} numbers; [${rows}, ${columns}] takes ${rows * columns}`)
  }
  const padded = roundUp(columns, 32)
  const bytes = elementBytes[dtype]
  const ld = (padded * bytes) % 4096 === 0 ? padded + 32 : padded
  const memory = new ArrayBuffer(rows * ld * bytes + 64)
  const start = callKernel(() => linearAddon().misalignment({ data: new Uint8Array(memory) }))
  const data = dtype === 'f32' ? new Float32Array(memory, start, rows * ld) : new Uint16Array(memory, start, rows * ld)
  if (values !== undefined) {
    const tight = Float32Array.from(values)
    for (let row = 0; row < rows; row++) {
      const from = tight.subarray(row * columns, (row + 1) * columns)
      convert(data.subarray(row * ld, row * ld + columns), dtype, from, 'f32')
    }
  }
  return { data, dtype, rows, columns, ld }
}

/** The matrix's values as f32, row-major without gaps. */
export function values(m: Matrix): Float32Array {
  checkMatrix('matrix', m)
  const out = new Float32Array(m.rows * m.columns)
  for (let row = 0; row < m.rows; row++) {
    const from = m.data.subarray(row * m.ld, row * m.ld + m.columns)
    convert(out.subarray(row * m.columns, (row + 1) * m.columns), 'f32', from, m.dtype)
  }
  return out
}

function checkMatrix(name: string, m: Matrix): void {
  checkArray(`${name}.data`, m.data, m.dtype)
  checkExtent(`${name}.rows`, m.rows)
  checkExtent(`${name}.columns`, m.columns)
  checkExtent(`${name}.ld`, m.ld)
  if (m.ld < m.columns) fail(`${name}.ld is ${m.ld}, less than its ${m.columns} columns`)
  const needed = (m.rows - 1) * m.ld + m.columns
  if (m.data.length < needed) fail(`${name}.data has ${m.data.length} elements; its shape takes ${needed}`)
}

/**
 * W [n, k] in the layout of the kernels: panels of 16 outputs, n and k padded with zeros (native/kernels/kernels.h). Memory is
 * native, in huge pages where the system has them; close() gives it back, as does collection.
 */
export class PackedWeight {
  readonly dtype: DType
  /** Outputs in packed order; with gate and up halves, both halves rounded up to 16. */
  readonly n: number
  readonly k: number
  readonly panels: number
  /** Panels alternate gate, up: what linear() needs for activation 'siluMul'. */
  readonly isGateUp: boolean
  readonly #handle: WeightHandle
  #isClosed = false

  constructor(options: { readonly dtype: DType; readonly n: number; readonly k: number; readonly isGateUp?: boolean }) {
    const { dtype, n, k, isGateUp = false } = options
    checkChoice('dtype', dtype, ['f32', 'bf16'])
    checkExtent('n', n)
    checkExtent('k', k)
    if (isGateUp && n % 32 !== 0) fail(`n is ${n}; gate and up panels alternate, so it must be a multiple of 32`)
    this.dtype = dtype
    this.n = n
    this.k = k
    this.panels = Math.ceil(n / panelOutputs)
    this.isGateUp = isGateUp
    this.#handle = callKernel(() => linearAddon().createPacked({ dtype, n, k }))
  }

  /** For the native calls of this folder. */
  get handle(): WeightHandle {
    if (this.#isClosed) throw new KernelError('ERR_CLOSED', 'the packed weight has been closed')
    return this.#handle
  }

  /** Gives the memory back. Later uses throw ERR_CLOSED; closing twice is fine. */
  close(): void {
    if (this.#isClosed) return
    this.#isClosed = true
    callKernel(() => linearAddon().closePacked({ weight: this.#handle }))
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.close()
    return Promise.resolve()
  }
}

/** Rows of a checkpoint tensor: f32, or the bits of bf16 or f16, or raw bytes at any alignment. */
export interface WeightSource {
  readonly data: Float32Array | Uint16Array | Uint8Array
  readonly dtype: SourceDType
  /** Elements between rows; default k. */
  readonly ld?: number
  /** Byte in `data` at which row 0 starts; default 0. */
  readonly byteOffset?: number
}

/**
 * Packs `rows` rows of `source`, [rows, k], into outputs output .. output + rows - 1, rounding to the weight's dtype. For fused
 * weights (q, k and v one after the other). With `half`, outputs are counted within the gate or the up half.
 */
export function packInto(
  weight: PackedWeight,
  source: WeightSource,
  options: { readonly rows: number; readonly output?: number; readonly half?: 'gate' | 'up' } & TierOption,
): void {
  const { rows, output = 0, half } = options
  const { ld = weight.k, byteOffset = 0 } = source
  if (!(source.data instanceof Uint8Array)) checkArray('source', source.data, source.dtype)
  checkExtent('rows', rows)
  checkExtent('output', output, 0)
  checkExtent('source.ld', ld)
  if (ld < weight.k) fail(`source.ld is ${ld}, less than the ${weight.k} inputs of a row`)
  if ((half !== undefined) !== weight.isGateUp) {
    fail(
      weight.isGateUp
        ? "this weight has gate and up halves: say half 'gate' or 'up'"
        : 'this weight has no gate and up halves',
    )
  }
  const outputs = weight.isGateUp ? weight.n / 2 : weight.n
  if (output + rows > outputs) fail(`rows end at output ${output + rows} of ${outputs}`)
  const available = source.data.byteLength - byteOffset
  const needed = ((rows - 1) * ld + weight.k) * elementBytes[source.dtype]
  if (!Number.isInteger(byteOffset) || byteOffset < 0 || available < needed) {
    fail(`source has ${source.data.byteLength} bytes; rows from byte ${byteOffset} take ${needed}`)
  }
  callKernel(() =>
    linearAddon().pack({
      tier: options.tier ?? selectedTier(),
      weight: weight.handle,
      source: source.data,
      sourceDType: source.dtype,
      sourceLd: ld,
      byteOffset,
      rows,
      n0: output,
      interleave: half === undefined ? 1 : 2,
      phase: half === 'up' ? 1 : 0,
    }),
  )
}

export interface PackOptions extends TierOption {
  readonly n: number
  readonly k: number
  /** Of the packed weight; default bf16. */
  readonly dtype?: DType
  /** Of the source; default by its array: f32 for a Float32Array, bf16 for a Uint16Array. */
  readonly sourceDType?: SourceDType
  /** [n], added to every row of y in f32. */
  readonly bias?: Float32Array
}

/** W [n, k], row-major without gaps, as a packed weight. */
export function pack(source: Float32Array | Uint16Array, options: PackOptions): PackedWeight {
  const { n, k, dtype = 'bf16', bias } = options
  if (bias !== undefined && bias.length !== n) fail(`bias holds ${bias.length} numbers for ${n} outputs`)
  const weight = new PackedWeight({ dtype, n, k })
  try {
    packInto(weight, { data: source, dtype: sourceDTypeOf(source, options) }, { ...options, rows: n })
    if (bias !== undefined) setBias(weight, bias)
  } catch (error) {
    weight.close()
    throw error
  }
  return weight
}

/** Gate [n, k] and up [n, k] as one weight of alternating panels, for linear() with activation 'siluMul'. No bias. */
export function packGateUp(
  gate: Float32Array | Uint16Array,
  up: Float32Array | Uint16Array,
  options: Omit<PackOptions, 'bias'>,
): PackedWeight {
  const { n, k, dtype = 'bf16' } = options
  checkExtent('n', n)
  const weight = new PackedWeight({ dtype, n: 2 * roundUp(n, panelOutputs), k, isGateUp: true })
  try {
    const tier = options.tier === undefined ? {} : { tier: options.tier }
    packInto(weight, { data: gate, dtype: sourceDTypeOf(gate, options) }, { ...tier, rows: n, half: 'gate' })
    packInto(weight, { data: up, dtype: sourceDTypeOf(up, options) }, { ...tier, rows: n, half: 'up' })
  } catch (error) {
    weight.close()
    throw error
  }
  return weight
}

function sourceDTypeOf(
  source: Float32Array | Uint16Array,
  options: { readonly sourceDType?: SourceDType },
): SourceDType {
  return options.sourceDType ?? (source instanceof Float32Array ? 'f32' : 'bf16')
}

/** Bias of the outputs in packed order, [n]; y gets it in f32 before activation and rounding. */
export function setBias(weight: PackedWeight, bias: Float32Array): void {
  checkArray('bias', bias, 'f32')
  if (bias.length !== weight.n) fail(`bias holds ${bias.length} numbers for ${weight.n} outputs`)
  const padded = new Float32Array(weight.panels * panelOutputs)
  padded.set(bias)
  callKernel(() => linearAddon().setBias({ weight: weight.handle, bias: padded }))
}

/** Rows [output, output + rows) of W as the kernels see them, [rows, k] f32. */
export function unpack(
  weight: PackedWeight,
  options: { readonly output?: number; readonly rows?: number } & TierOption = {},
): Float32Array {
  const { output = 0, rows = weight.n - output } = options
  checkExtent('output', output, 0)
  checkExtent('rows', rows, 0)
  if (output + rows > weight.n) fail(`rows end at output ${output + rows} of ${weight.n}`)
  const out = new Float32Array(rows * weight.k)
  const tier = options.tier ?? selectedTier()
  callKernel(() => linearAddon().unpack({ tier, weight: weight.handle, n0: output, rows, out, ld: weight.k }))
  return out
}

/** y[i] = row ids[i] of W [n, k]; an id outside [0, n) gives a row of zeros. y is [at least ids.length, k]. */
export function embed(y: Matrix, ids: Int32Array, weight: PackedWeight, options: TierOption = {}): void {
  checkMatrix('y', y)
  if (!(ids instanceof Int32Array)) fail('ids must be an Int32Array')
  if (y.rows < ids.length) fail(`y has ${y.rows} rows for ${ids.length} ids`)
  if (y.columns !== weight.k) fail(`y has ${y.columns} columns; rows of the weight have ${weight.k}`)
  const tier = options.tier ?? selectedTier()
  callKernel(() =>
    linearAddon().embed({
      tier,
      weight: weight.handle,
      ids,
      rows: ids.length,
      y: y.data,
      yDType: y.dtype,
      ldy: y.ld,
    }),
  )
}

export interface LinearOptions extends TierOption {
  /** 'siluMul': y = silu(gate) * up, for a weight of packGateUp. */
  readonly activation?: 'none' | 'siluMul'
  /** Panels [start, end) of 16 outputs to compute, even bounds with 'siluMul'; default all. */
  readonly panels?: readonly [start: number, end: number]
}

/**
 * y[m, n] = x[m, k] W^T (+ bias) (+ activation), summed in f32 and rounded once to y's dtype. x has the weight's dtype and the
 * alignment and zero columns that matrix() gives. Whole panels are written: y's rows need room for n rounded up to 16 (half of
 * the packed n with 'siluMul'), and the columns past n become zeros. The same row of x gives the same bits whatever m is and
 * whatever panels a call covers.
 */
export function linear(y: Matrix, x: Matrix, weight: PackedWeight, options: LinearOptions = {}): void {
  const { activation = 'none', panels = [0, weight.panels] } = options
  checkMatrix('x', x)
  checkMatrix('y', y)
  checkChoice('activation', activation, ['none', 'siluMul'])
  if (x.dtype !== weight.dtype) fail(`x is ${x.dtype} and the weight ${weight.dtype}; convert x`)
  if (x.columns !== weight.k) fail(`x has ${x.columns} columns; the weight takes ${weight.k}`)
  if (y.rows < x.rows) fail(`y has ${y.rows} rows for the ${x.rows} of x`)
  const isSilu = activation === 'siluMul'
  if (isSilu && !weight.isGateUp) fail("activation 'siluMul' takes a weight of packGateUp")
  const [panel0, panel1] = panels
  if (
    !Number.isInteger(panel0) ||
    !Number.isInteger(panel1) ||
    panel0 < 0 ||
    panel0 > panel1 ||
    panel1 > weight.panels
  ) {
    fail(`panels [${panel0}, ${panel1}) lie outside [0, ${weight.panels})`)
  }
  if (isSilu && (panel0 % 2 !== 0 || panel1 % 2 !== 0)) fail('siluMul takes pairs of panels: both bounds must be even')
  const written = (panel1 * panelOutputs) / (isSilu ? 2 : 1)
  if (y.ld < written) fail(`rows of y are ${y.ld} apart, and ${written} columns are written (whole panels of 16)`)
  const tier = options.tier ?? selectedTier()
  callKernel(() =>
    linearAddon().linear({
      tier,
      weight: weight.handle,
      x: x.data,
      ldx: x.ld,
      m: x.rows,
      y: y.data,
      yDType: y.dtype,
      ldy: y.ld,
      activation: isSilu ? 1 : 0,
      panel0,
      panel1,
    }),
  )
}

/** out[i] = in[i] as outDType, rounded to nearest even; NaN stays NaN, denormals are kept. Both arrays have one length. */
export function convert(
  out: Float32Array | Uint16Array,
  outDType: DType,
  input: Float32Array | Uint16Array,
  inDType: SourceDType,
  options: TierOption = {},
): void {
  checkChoice('outDType', outDType, ['f32', 'bf16'])
  checkArray('out', out, outDType)
  checkArray('input', input, inDType)
  if (out.length !== input.length) fail(`out holds ${out.length} elements and input ${input.length}`)
  const tier = options.tier ?? selectedTier()
  callKernel(() => linearAddon().convert({ tier, out, outDType, in: input, inDType, count: out.length }))
}

/** Reads data (a multiple of 512 bytes) in one stream; the xor of its 64-bit words. */
export function streamRead(data: Uint8Array, options: TierOption = {}): bigint {
  const tier = options.tier ?? selectedTier()
  return callKernel(() => linearAddon().streamRead({ tier, data }))
}
