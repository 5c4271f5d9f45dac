// What the tests of the compiler compare: the Programs of all ranks run in lockstep in float64, by nothing but what the Program
// says; and, written from the formulas and not from any graph, a plain forward pass of Llama. Also made-up checkpoints to run.

import { closeSync, openSync, readSync } from 'node:fs'

import type { ArchSpec, Checkpoint, TensorInfo } from '../../tp/checkpoint/arch.js'
import { type Line, type Program, type WeightPart, type WeightSpec } from '../../tp/program.js'

export interface Tensor {
  readonly shape: readonly number[]
  readonly data: Float64Array
}
export type Tensors = ReadonlyMap<string, Tensor>

/** One row of a step. */
export interface Token {
  readonly sequence: number
  readonly position: number
  readonly id: number
  readonly wantsLogits: boolean
}

export function at(values: ArrayLike<number>, index: number): number {
  const value = values[index]
  if (value === undefined) throw new RangeError(`index ${index} of ${values.length}`)
  return value
}

function known<Value>(value: Value | undefined, what: string): Value {
  if (value === undefined) throw new RangeError(`no ${what}`)
  return value
}

const silu = (x: number): number => x / (1 + Math.exp(-x))

/** A weight in the packed order: rows [n][k], gate and up in alternate panels of 16; what no part fills is zero. */
function fill(n: number, k: number, parts: readonly WeightPart[], tensors: Tensors): Float64Array {
  const packed = new Float64Array(n * k)
  for (const part of parts) {
    const tensor = known(tensors.get(part.tensor), part.tensor)
    const stride = tensor.shape.length === 1 ? 1 : at(tensor.shape, 1)
    for (let row = 0; row < part.rows[1]; row++) {
      let output = part.output + row
      if (part.interleave !== undefined) {
        output = 32 * Math.floor(output / 16) + (part.interleave === 'up' ? 16 : 0) + (output % 16)
      }
      for (let column = 0; column < part.columns[1]; column++) {
        packed[output * k + column] = at(tensor.data, (part.rows[0] + row) * stride + part.columns[0] + column)
      }
    }
  }
  return packed
}

interface Packed {
  readonly spec: WeightSpec
  readonly k: number
  readonly layers: readonly Float64Array[]
  readonly bias: readonly Float64Array[]
}

interface RankState {
  readonly program: Program
  readonly weights: ReadonlyMap<string, Packed>
  readonly buffers: Map<string, Float64Array>
  slot: Float64Array
  residual: Float64Array
  /** `${layer}/${sequence}/${position}` -> keys and values of all KV heads. */
  readonly cache: Map<string, { readonly k: Float64Array; readonly v: Float64Array }>
}

/** Runs the Programs of all ranks, line by line side by side. Steps follow each other on one KV cache. */
export class Interpreter {
  readonly #ranks: readonly RankState[]
  readonly #theta: number

  constructor(programs: readonly Program[], tensors: Tensors, theta: number) {
    this.#theta = theta
    this.#ranks = programs.map((program) => ({
      program,
      weights: new Map(
        program.weights.map((spec) => {
          const k = spec.kind === 'linear' ? spec.k : 1
          const bias = spec.kind === 'linear' ? (spec.bias ?? []) : []
          return [
            spec.name,
            {
              spec,
              k,
              layers: spec.parts.map((parts) => fill(spec.n, k, parts, tensors)),
              bias: bias.map((parts) => fill(spec.n, 1, parts, tensors)),
            },
          ]
        }),
      ),
      buffers: new Map<string, Float64Array>(),
      slot: new Float64Array(),
      residual: new Float64Array(),
      cache: new Map<string, { k: Float64Array; v: Float64Array }>(),
    }))
  }

  /** The logits over the whole vocabulary of each row that wants them. */
  step(tokens: readonly Token[]): Float64Array[] {
    const [first] = this.#ranks
    if (first === undefined) return []
    const { lines, numLayers, vocabSize } = first.program
    const logitRows = tokens.filter(({ wantsLogits }) => wantsLogits).length
    const logits = Array.from({ length: logitRows }, () => new Float64Array(vocabSize).fill(Number.NaN))
    lines.before.forEach((_, index) => this.#line('before', index, 0, tokens, logits))
    for (let layer = 0; layer < numLayers; layer++) {
      lines.layer.forEach((_, index) => this.#line('layer', index, layer, tokens, logits))
    }
    lines.after.forEach((_, index) => this.#line('after', index, 0, tokens, logits))
    return logits
  }

  #line(
    section: keyof Program['lines'],
    index: number,
    layer: number,
    tokens: readonly Token[],
    logits: Float64Array[],
  ): void {
    const lines = this.#ranks.map(({ program }) => known(program.lines[section][index], `${section}[${index}]`))
    if (lines.every((line) => line.op === 'allReduceResidualNorm')) {
      this.#reduce(lines, layer, tokens.length)
      return
    }
    this.#ranks.forEach((rank, number) => {
      runLine(rank, known(lines[number], 'line'), layer, tokens, logits, this.#theta)
    })
  }

  #reduce(lines: readonly Extract<Line, { op: 'allReduceResidualNorm' }>[], layer: number, rows: number): void {
    const sum = known(this.#ranks[0], 'rank').slot.map((_, index) =>
      this.#ranks.reduce((total, { slot }) => total + at(slot, index), 0),
    )
    this.#ranks.forEach((rank, number) => {
      const line = known(lines[number], 'line')
      const { hiddenSize, normEps } = rank.program
      const bias = line.bias === undefined ? undefined : known(rank.weights.get(line.bias), line.bias).layers[layer]
      const gamma = known(known(rank.weights.get(line.gamma), line.gamma).layers[layer + line.gammaLayer], line.gamma)
      rank.residual = sum.map(
        (value, index) =>
          value +
          (line.addResidual ? at(rank.residual, index) : 0) +
          (bias === undefined ? 0 : at(bias, index % hiddenSize)),
      )
      const y = new Float64Array(rows * hiddenSize)
      for (let row = 0; row < rows; row++) {
        const values = rank.residual.subarray(row * hiddenSize, (row + 1) * hiddenSize)
        const scale = 1 / Math.sqrt(values.reduce((total, value) => total + value * value, 0) / hiddenSize + normEps)
        values.forEach((value, column) => (y[row * hiddenSize + column] = value * scale * at(gamma, column)))
      }
      rank.buffers.set(line.y, y)
      // What was added may not be added again.
      rank.slot = new Float64Array(sum.length).fill(Number.NaN)
    })
  }
}

function runLine(
  rank: RankState,
  line: Line,
  layer: number,
  tokens: readonly Token[],
  logits: readonly Float64Array[],
  theta: number,
): void {
  const { program, buffers } = rank
  const read = (name: string): Float64Array => known(buffers.get(name), `value in '${name}'`)
  switch (line.op) {
    case 'embed': {
      const { spec, k, layers } = known(rank.weights.get(line.weight), line.weight)
      const table = known(layers[0], line.weight)
      rank.slot = new Float64Array(tokens.length * k)
      tokens.forEach(({ id }, row) => {
        const local = id - line.vocabStart
        if (local >= 0 && local < spec.n) rank.slot.set(table.subarray(local * k, (local + 1) * k), row * k)
      })
      return
    }
    case 'linear': {
      const packed = known(rank.weights.get(line.weight), line.weight)
      const { n } = packed.spec
      const weight = known(packed.layers[layer], line.weight)
      const bias = packed.bias[layer]
      const x = read(line.x)
      const rows = x.length / packed.k
      const y = new Float64Array(rows * n)
      for (let row = 0; row < rows; row++) {
        for (let output = 0; output < n; output++) {
          let sum = bias === undefined ? 0 : at(bias, output)
          for (let k = 0; k < packed.k; k++) sum += at(x, row * packed.k + k) * at(weight, output * packed.k + k)
          y[row * n + output] = sum
        }
      }
      const result = line.activation === 'siluMul' ? siluMul(y, rows, n, columnsOf(program, line.y)) : y
      if (line.y === 'slot') rank.slot = result
      else buffers.set(line.y, result)
      return
    }
    case 'ropeKvWrite': {
      const { numHeads, numKvHeads, headDim, rotaryDims } = program
      const qkv = read(line.qkv)
      const columns = (numHeads + 2 * numKvHeads) * headDim
      tokens.forEach(({ sequence, position }, row) => {
        const values = qkv.subarray(row * columns, (row + 1) * columns)
        for (let head = 0; head < numHeads + numKvHeads; head++) {
          rotate(values.subarray(head * headDim, (head + 1) * headDim), position, rotaryDims, theta)
        }
        const k = values.slice(numHeads * headDim, (numHeads + numKvHeads) * headDim)
        const v = values.slice((numHeads + numKvHeads) * headDim)
        rank.cache.set(`${layer}/${sequence}/${position}`, { k, v })
      })
      return
    }
    case 'attention': {
      const { numHeads, numKvHeads, headDim } = program
      const q = read(line.q)
      const columns = (numHeads + 2 * numKvHeads) * headDim
      const out = new Float64Array(tokens.length * numHeads * headDim).fill(Number.NaN)
      tokens.forEach(({ sequence, position }, row) => {
        const past = Array.from({ length: position + 1 }, (_, key) =>
          known(rank.cache.get(`${layer}/${sequence}/${key}`), `key ${key}`),
        )
        for (const { kvHead, firstHead, numHeads: count } of line.groups) {
          for (let head = firstHead; head < firstHead + count; head++) {
            const query = q.subarray(row * columns + head * headDim, row * columns + (head + 1) * headDim)
            const keys = past.map(({ k }) => k.subarray(kvHead * headDim, (kvHead + 1) * headDim))
            const values = past.map(({ v }) => v.subarray(kvHead * headDim, (kvHead + 1) * headDim))
            out.set(attend(query, keys, values, line.scale), (row * numHeads + head) * headDim)
          }
        }
      })
      buffers.set(line.out, out)
      return
    }
    case 'selectRows': {
      const x = read(line.x)
      const columns = columnsOf(program, line.x)
      const chosen = tokens.flatMap(({ wantsLogits }, row) => (wantsLogits ? [row] : []))
      const y = new Float64Array(chosen.length * columns)
      chosen.forEach((row, index) => y.set(x.subarray(row * columns, (row + 1) * columns), index * columns))
      buffers.set(line.y, y)
      return
    }
    case 'logits': {
      const x = read(line.x)
      logits.forEach((row, index) => {
        row.set(x.subarray(index * line.vocabCount, (index + 1) * line.vocabCount), line.vocabStart)
      })
      return
    }
    case 'allReduceResidualNorm':
      throw new TypeError('ranks run different lines side by side')
    default: {
      const unknown: never = line
      return unknown
    }
  }
}

function columnsOf(program: Program, name: string): number {
  return known(
    program.buffers.find((buffer) => buffer.name === name),
    name,
  ).columns
}

/** Alternate panels gate, up -> their product, cut to its true width; the padding must come out as zero. */
function siluMul(y: Float64Array, rows: number, n: number, columns: number): Float64Array {
  const result = new Float64Array(rows * columns)
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < n / 2; column++) {
      const gate = row * n + 32 * Math.floor(column / 16) + (column % 16)
      const value = silu(at(y, gate)) * at(y, gate + 16)
      if (column < columns) result[row * columns + column] = value
      else if (value !== 0) throw new RangeError(`padding ${column} of ${columns} is ${value}`)
    }
  }
  return result
}

function rotate(head: Float64Array, position: number, rotaryDims: number, theta: number): void {
  const half = rotaryDims / 2
  for (let i = 0; i < half; i++) {
    const angle = position * theta ** ((-2 * i) / rotaryDims)
    const [a, b] = [at(head, i), at(head, i + half)]
    head[i] = a * Math.cos(angle) - b * Math.sin(angle)
    head[i + half] = b * Math.cos(angle) + a * Math.sin(angle)
  }
}

function attend(
  query: Float64Array,
  keys: readonly Float64Array[],
  values: readonly Float64Array[],
  scale: number,
): Float64Array {
  const scores = keys.map((key) => scale * key.reduce((sum, value, index) => sum + value * at(query, index), 0))
  const largest = Math.max(...scores)
  const weights = scores.map((score) => Math.exp(score - largest))
  const total = weights.reduce((sum, weight) => sum + weight, 0)
  const out = new Float64Array(query.length)
  values.forEach((value, key) => {
    value.forEach((element, index) => (out[index] = at(out, index) + (at(weights, key) / total) * element))
  })
  return out
}

/** Logits after the last of `ids`, from the formulas: Touvron et al. 2023, Ainslie et al. 2023 (grouped queries), Su et al. 2021. */
export function reference(arch: ArchSpec, tensors: Tensors, ids: readonly number[]): Float64Array {
  const tensor = (name: string): Tensor => known(tensors.get(name), name)
  const matVec = (name: string, x: Float64Array, bias: boolean): Float64Array => {
    const { shape, data } = tensor(`${name}.weight`)
    const width = at(shape, 1)
    return Float64Array.from({ length: at(shape, 0) }, (_, row) => {
      let sum = bias ? at(tensor(`${name}.bias`).data, row) : 0
      for (let column = 0; column < width; column++) sum += at(data, row * width + column) * at(x, column)
      return sum
    })
  }
  const norm = (name: string, x: Float64Array): Float64Array => {
    const mean = x.reduce((sum, value) => sum + value * value, 0) / x.length
    return x.map((value, index) => (value / Math.sqrt(mean + arch.normEps)) * at(tensor(name).data, index))
  }
  const { hiddenSize, headDim, numHeads, numKvHeads, attentionBias, mlpBias } = arch
  const table = tensor('model.embed_tokens.weight').data
  let hidden = ids.map((id) => table.slice(id * hiddenSize, (id + 1) * hiddenSize))
  for (let layer = 0; layer < arch.numLayers; layer++) {
    const prefix = `model.layers.${layer}`
    const heads = (x: Float64Array, position: number | null): Float64Array[] =>
      Array.from({ length: x.length / headDim }, (_, head) => {
        const values = x.slice(head * headDim, (head + 1) * headDim)
        if (position !== null) rotate(values, position, arch.rope.rotaryDims, arch.rope.theta)
        return values
      })
    const normed = hidden.map((x) => norm(`${prefix}.input_layernorm.weight`, x))
    const project = (name: string): Float64Array[] =>
      normed.map((x) => matVec(`${prefix}.self_attn.${name}`, x, attentionBias))
    const q = project('q_proj').map(heads)
    const k = project('k_proj').map(heads)
    const v = project('v_proj').map((x) => heads(x, null))
    hidden = hidden.map((x, position) => {
      const attended = Array.from({ length: numHeads }, (_, head) => {
        const kvHead = Math.floor((head * numKvHeads) / numHeads)
        const of = (cache: readonly (readonly Float64Array[])[]) =>
          cache.slice(0, position + 1).map((row) => known(row[kvHead], 'KV head'))
        return attend(known(q[position]?.[head], 'query'), of(k), of(v), headDim ** -0.5)
      })
      const joined = Float64Array.from(attended.flatMap((head) => [...head]))
      const o = matVec(`${prefix}.self_attn.o_proj`, joined, attentionBias)
      const middle = x.map((value, index) => value + at(o, index))
      const y = norm(`${prefix}.post_attention_layernorm.weight`, middle)
      const up = matVec(`${prefix}.mlp.up_proj`, y, mlpBias)
      const gated = matVec(`${prefix}.mlp.gate_proj`, y, mlpBias).map((value, index) => silu(value) * at(up, index))
      const down = matVec(`${prefix}.mlp.down_proj`, gated, mlpBias)
      return middle.map((value, index) => value + at(down, index))
    })
  }
  const last = norm('model.norm.weight', known(hidden.at(-1), 'token'))
  return matVec(arch.tiedHead ? 'model.embed_tokens' : 'lm_head', last, false)
}

export type TinyArch = Pick<
  ArchSpec,
  'numHeads' | 'numKvHeads' | 'headDim' | 'hiddenSize' | 'intermediateSize' | 'vocabSize' | 'numLayers'
> &
  Partial<Pick<ArchSpec, 'attentionBias' | 'mlpBias' | 'tiedHead'>>

export function tinyArch(tiny: TinyArch): ArchSpec {
  return {
    family: 'llama',
    modelType: 'llama',
    maxPositions: 64,
    normEps: 1e-5,
    activation: 'silu',
    attentionBias: false,
    mlpBias: false,
    tiedHead: false,
    ...tiny,
    rope: { theta: 10000, rotaryDims: tiny.headDim, scaling: { kind: 'default' } },
  }
}

/** Names and shapes of a Llama checkpoint, by hand. */
export function shapesOf(arch: ArchSpec): Map<string, readonly number[]> {
  const { hiddenSize, intermediateSize, vocabSize, numHeads, numKvHeads, headDim } = arch
  const shapes = new Map<string, readonly number[]>([
    ['model.embed_tokens.weight', [vocabSize, hiddenSize]],
    ['model.norm.weight', [hiddenSize]],
  ])
  if (!arch.tiedHead) shapes.set('lm_head.weight', [vocabSize, hiddenSize])
  for (let layer = 0; layer < arch.numLayers; layer++) {
    const linear = (name: string, outputs: number, inputs: number, hasBias: boolean): void => {
      shapes.set(`model.layers.${layer}.${name}.weight`, [outputs, inputs])
      if (hasBias) shapes.set(`model.layers.${layer}.${name}.bias`, [outputs])
    }
    linear('self_attn.q_proj', numHeads * headDim, hiddenSize, arch.attentionBias)
    linear('self_attn.k_proj', numKvHeads * headDim, hiddenSize, arch.attentionBias)
    linear('self_attn.v_proj', numKvHeads * headDim, hiddenSize, arch.attentionBias)
    linear('self_attn.o_proj', hiddenSize, numHeads * headDim, arch.attentionBias)
    linear('mlp.gate_proj', intermediateSize, hiddenSize, arch.mlpBias)
    linear('mlp.up_proj', intermediateSize, hiddenSize, arch.mlpBias)
    linear('mlp.down_proj', hiddenSize, intermediateSize, arch.mlpBias)
    shapes.set(`model.layers.${layer}.input_layernorm.weight`, [hiddenSize])
    shapes.set(`model.layers.${layer}.post_attention_layernorm.weight`, [hiddenSize])
  }
  return shapes
}

/** A checkpoint without files. */
export function tinyCheckpoint(arch: ArchSpec, shapes = shapesOf(arch)): Checkpoint {
  const tensors = new Map<string, TensorInfo>()
  for (const [name, shape] of shapes) {
    const nbytes = 4 * shape.reduce((product, size) => product * size, 1)
    tensors.set(name, { name, dtype: 'f32', shape, file: '', byteOffset: 0, nbytes })
  }
  return {
    directory: '',
    arch,
    tensors,
    generation: {
      bosTokenId: null,
      eosTokenIds: [],
      doSample: false,
      temperature: 1,
      topK: 50,
      topP: 1,
      repetitionPenalty: 1,
      maxNewTokens: null,
    },
    storedDType: 'f32',
    fingerprint: '',
  }
}

/** Uniform in [0, 1) from an integer state: mulberry32. */
export function randomFrom(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Random weights that let every tensor show in the logits. */
export function tinyTensors(arch: ArchSpec, seed: number): Map<string, Tensor> {
  const random = randomFrom(seed)
  const tensors = new Map<string, Tensor>()
  for (const [name, shape] of shapesOf(arch)) {
    const count = shape.reduce((product, size) => product * size, 1)
    const isNorm = name.includes('norm')
    const scale = shape.length === 2 && !name.includes('embed') ? 1.5 / Math.sqrt(at(shape, 1)) : 1
    const data = Float64Array.from({ length: count }, () => (isNorm ? 0.5 + random() : (2 * random() - 1) * scale))
    tensors.set(name, { shape, data })
  }
  return tensors
}

/** The tensors of a checkpoint's files, widened. */
export function readTensors(checkpoint: Checkpoint): Map<string, Tensor> {
  const tensors = new Map<string, Tensor>()
  for (const info of checkpoint.tensors.values()) {
    const bytes = Buffer.alloc(info.nbytes)
    const file = openSync(info.file, 'r')
    readSync(file, bytes, 0, info.nbytes, info.byteOffset)
    closeSync(file)
    if (info.dtype === 'f16') throw new TypeError(`${info.name} is f16`)
    const size = info.dtype === 'f32' ? 4 : 2
    const bf16 = (offset: number): number => {
      const word = Buffer.alloc(4)
      word.writeUInt16LE(bytes.readUInt16LE(offset), 2)
      return word.readFloatLE(0)
    }
    const data = Float64Array.from({ length: info.nbytes / size }, (_, index) =>
      info.dtype === 'f32' ? bytes.readFloatLE(4 * index) : bf16(2 * index),
    )
    tensors.set(info.name, { shape: info.shape, data })
  }
  return tensors
}

/** One step over one sequence: logits after its last token. */
export function promptOf(ids: readonly number[], sequence = 0): Token[] {
  return ids.map((id, position) => ({ sequence, position, id, wantsLogits: position === ids.length - 1 }))
}

export function largestDifference(a: Float64Array, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY
  // NaN differs from everything, also from NaN: a row that nobody filled may not pass.
  return a.reduce((largest, value, index) => {
    const difference = Math.abs(value - at(b, index))
    return Number.isNaN(difference) ? Number.POSITIVE_INFINITY : Math.max(largest, difference)
  }, 0)
}
