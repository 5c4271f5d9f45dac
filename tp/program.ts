// What one rank executes: the last form of a model before it runs. Plain data: printed, dry-run, diffed, costed, checked. Sizes
// are symbols bound at the start of each step, so prompt chunks, decoding and mixed ragged batches run the same Program.
// Made by lower() from a fused, sharded graph; executed line by line by native/runner/runner.cpp.

import { type DType, elementBytes } from '../native/types.js'
import { type ShardedGraph, type Split, headsOf, shard } from './autotp.js'
import type { Checkpoint } from './checkpoint/arch.js'
import { InferenceError, shown } from './errors.js'
import { type FusedGraph, type FusedVector, type FusedWeight, fuse } from './fuse.js'
import { type Graph, type Section, sections, tensorName } from './graph.js'
import { buildGraph } from './models/index.js'

/** Rows of a buffer or a line: all tokens of the step, or only those whose logits are wanted. */
export type Rows = 'tokens' | 'logitRows'

/** A private, zero-initialised row-major buffer. Its row stride is the runner's choice (columns rounded up, padded). */
export interface BufferSpec {
  readonly name: string
  readonly dtype: DType
  readonly rows: Rows
  readonly columns: number
}

/** A rectangle of one checkpoint tensor and the outputs of the packed weight that it fills. */
export interface WeightPart {
  readonly tensor: string
  /** First row and number of rows in the tensor (for a vector: its elements). */
  readonly rows: readonly [start: number, count: number]
  /** First column and number of columns in the tensor; [0, 1] for a vector. */
  readonly columns: readonly [start: number, count: number]
  /** Output of the packed weight (for a vector: element) that the first row fills. */
  readonly output: number
  /** 'gate' and 'up' fill alternate panels of 16 outputs; `output` then counts within the gate or the up half. */
  readonly interleave?: 'gate' | 'up'
}

/** A weight of this rank, once per layer or once. Linear: y[n] = sum over k of W[n, k] x[k]. Vector: f32. */
export type WeightSpec =
  | {
      readonly kind: 'linear'
      readonly name: string
      readonly dtype: DType
      /** Outputs in packed order (gate and up halves each rounded up to panels of 16 when interleaved) and inputs. */
      readonly n: number
      readonly k: number
      /** parts[layer]; length 1 when the weight stands outside the layers. */
      readonly parts: readonly (readonly WeightPart[])[]
      /** Bias of the outputs, in the same output numbering; absent: none. */
      readonly bias?: readonly (readonly WeightPart[])[]
    }
  | {
      readonly kind: 'vector'
      readonly name: string
      readonly n: number
      readonly parts: readonly (readonly WeightPart[])[]
    }

/** Query heads [firstHead, firstHead + numHeads) of this rank read KV head `kvHead` of this rank. */
export interface HeadGroup {
  readonly kvHead: number
  readonly firstHead: number
  readonly numHeads: number
}

/**
 * One kernel call or collective. `slot` is this rank's slot of the arena: partial sums [tokens, hiddenSize] that the next
 * allReduceResidualNorm adds up over ranks. Lines follow each other with a barrier between.
 */
export type Line =
  /** slot = rows of the vocabulary-split embedding; ids outside [vocabStart, vocabStart + n) give zeros. */
  | { readonly op: 'embed'; readonly weight: string; readonly vocabStart: number }
  /** y = x W^T (+ bias) (+ activation). To 'slot' (then the partial sum of a row-parallel weight), or to a buffer. */
  | {
      readonly op: 'linear'
      readonly weight: string
      readonly x: string
      readonly y: string
      readonly activation: 'none' | 'siluMul'
    }
  /**
   * residual = (addResidual ? residual : 0) + sum over ranks of slots (+ bias); y = RMSNorm(residual) * gamma. residual is f32
   * [tokens, hiddenSize] and belongs to the runner. gamma is indexed by layer + gammaLayer.
   */
  | {
      readonly op: 'allReduceResidualNorm'
      readonly addResidual: boolean
      readonly bias?: string
      readonly gamma: string
      readonly gammaLayer: number
      readonly y: string
    }
  /** Rotates q in place, writes rotated k and v of every token into the layer's KV blocks. */
  | { readonly op: 'ropeKvWrite'; readonly qkv: string }
  /** out = softmax(q K^T * scale, causal) V over the layer's KV blocks. */
  | {
      readonly op: 'attention'
      readonly q: string
      readonly out: string
      readonly scale: number
      readonly groups: readonly HeadGroup[]
    }
  /** y[i] = x[row of logit row i]. */
  | { readonly op: 'selectRows'; readonly x: string; readonly y: string }
  /** Exchange of the vocabulary-split logits: local statistics and candidates, whole rows where they do not decide. */
  | { readonly op: 'logits'; readonly x: string; readonly vocabStart: number; readonly vocabCount: number }

export interface Program {
  readonly formatVersion: 1
  readonly rank: number
  readonly worldSize: number
  /** dtype of linear operands, KV cache and slots. */
  readonly dtype: DType
  readonly numLayers: number
  readonly hiddenSize: number
  readonly vocabSize: number
  readonly normEps: number
  /** Heads of this rank. */
  readonly numHeads: number
  readonly numKvHeads: number
  readonly headDim: number
  readonly rotaryDims: number
  readonly buffers: readonly BufferSpec[]
  readonly weights: readonly WeightSpec[]
  /** before: once; layer: numLayers times, with the layer's weights and KV; after: once. */
  readonly lines: { readonly before: readonly Line[]; readonly layer: readonly Line[]; readonly after: readonly Line[] }
}

export interface CompileOptions {
  readonly worldSize: number
  readonly rank: number
  /** Of linear weights, activations, KV cache and slots. */
  readonly dtype: DType
  /** Relative speeds of the ranks; equal if absent. Equal on all ranks. */
  readonly shares?: readonly number[]
}

/** The whole way from a checkpoint's headers to what one rank runs. */
export function compileProgram(checkpoint: Checkpoint, options: CompileOptions): Program {
  const { rank, worldSize, dtype } = options
  const possible: readonly string[] = ['f32', 'bf16'] // plain JavaScript may ask for anything
  if (!possible.includes(dtype)) {
    throw new InferenceError('ERR_INVALID_OPTION', `dtype is ${shown(dtype)}: 'f32' and 'bf16' are possible`, { dtype })
  }
  const sharded = shardCheckpoint(checkpoint, options)
  if (!Number.isSafeInteger(rank) || rank < 0 || rank >= worldSize) {
    throw new InferenceError('ERR_INVALID_OPTION', `rank ${rank} is not one of 0 .. ${worldSize - 1}`, {
      rank,
      worldSize,
    })
  }
  const program = lower(fuse(sharded), rank, dtype)
  checkProgram(program)
  return program
}

/** The part of the way that is the same on every rank: graph, checked against the headers, and its placements. */
export function shardCheckpoint(
  checkpoint: Pick<Checkpoint, 'arch' | 'tensors' | 'otherTensors'>,
  options: { readonly worldSize: number; readonly shares?: readonly number[] },
): ShardedGraph {
  const graph = buildGraph(checkpoint.arch)
  checkCoverage(graph, checkpoint.tensors, checkpoint.otherTensors ?? new Map())
  return shard(graph, options.worldSize, options.shares === undefined ? {} : { shares: options.shares })
}

const shapeText = (shape: readonly number[]): string => `[${shape.join(', ')}]`

type Tensors = ReadonlyMap<string, { readonly shape: readonly number[]; readonly dtype: string }>

/** Every weight of the graph is in the checkpoint with the shape that the configuration implies, and nothing else is. */
function checkCoverage(graph: Graph, tensors: Tensors, otherTensors: Tensors): void {
  const needed = new Set<string>()
  for (const weight of graph.weights.values()) {
    for (let layer = 0; layer < (weight.isPerLayer ? graph.numLayers : 1); layer++) {
      const name = tensorName(weight, layer)
      needed.add(name)
      checkTensor(name, shapeText(weight.shape), tensors, otherTensors)
    }
  }
  for (const [name, { shape, dtype }] of [...tensors, ...otherTensors]) {
    if (needed.has(name) || graph.harmless.some(({ pattern }) => pattern.test(name))) continue
    // Integers and booleans that nothing uses are masks and counters, no weights.
    if (otherTensors.has(name) && !/^f\d/i.test(dtype)) continue
    throw new InferenceError(
      'ERR_UNCOVERED_WEIGHT',
      `${name} ${shapeText(shape)}: no operation of this model uses it, so the results would not be those of the model. ` +
        'Check that config.json belongs to these files (model_type, tie_word_embeddings, biases, number of layers)',
      { tensor: name, shape: shapeText(shape) },
    )
  }
}

function checkTensor(name: string, expected: string, tensors: Tensors, otherTensors: Tensors): void {
  const found = tensors.get(name)
  const other = otherTensors.get(name)
  if (found === undefined && other !== undefined) {
    const message = `${name} is stored as ${other.dtype}, and weights are made from F32, F16 and BF16: convert the checkpoint to one of them`
    throw new InferenceError('ERR_UNSUPPORTED_MODEL', message, { tensor: name, dtype: other.dtype })
  }
  if (found === undefined) {
    const message = `${name}: the configuration needs a tensor of shape ${expected}, and the checkpoint has none of that name`
    throw new InferenceError('ERR_SHAPE_MISMATCH', message, { tensor: name, expected, found: 'none' })
  }
  const shape = shapeText(found.shape)
  if (shape === expected) return
  const message = `${name}: the configuration implies the shape ${expected}, the checkpoint has ${shape}`
  throw new InferenceError('ERR_SHAPE_MISMATCH', message, { tensor: name, expected, found: shape })
}

export const panelOutputs = 16 // outputs of a packed panel: native/kernels/kernels.h
export const kvBlockTokens = 32 // tokens of a KV block, there too

/** The rank's shares of one weight's dimension: where in the tensor. */
function ranges(split: Split, rank: number): Split['segments'][number] {
  const segments = split.segments[rank]
  if (segments === undefined || segments.every(([, count]) => count === 0)) {
    throw new InferenceError('ERR_TP_TOO_LARGE', `rank ${rank} gets nothing of the ${split.size} ${split.unit}`, {
      rank,
    })
  }
  return segments
}

/** One rank's Program of a fused graph. */
export function lower(fused: FusedGraph, rank: number, dtype: DType): Program {
  return new Lowering(fused, rank, dtype).run()
}

class Lowering {
  readonly #fused: FusedGraph
  readonly #sharded: ShardedGraph
  readonly #graph: Graph
  readonly #rank: number
  readonly #dtype: DType
  readonly #buffers = new Map<string, BufferSpec>()
  readonly #weights = new Map<string, WeightSpec>()
  /** Weights by the tensors that they hold: a tied table is stored once. */
  readonly #byTensors = new Map<string, string>()
  /** Value -> its buffer, and buffer -> the value last written to it: reading an overwritten value would be a broken compiler. */
  readonly #holds = new Map<string, string>()
  readonly #held = new Map<string, string>()

  constructor(fused: FusedGraph, rank: number, dtype: DType) {
    this.#fused = fused
    this.#sharded = fused.sharded
    this.#graph = fused.sharded.graph
    this.#rank = rank
    this.#dtype = dtype
  }

  run(): Program {
    const { attention, normEps, rotaryDims } = this.#fused
    const lines: Record<Section, Line[]> = { before: [], layer: [], after: [] }
    for (const section of sections) lines[section] = this.#fused.nodes[section].map((node) => this.#line(node))
    const heads = this.#heads()
    const embedding = this.#graph.nodes.before.find((node) => node.op === 'embedding')
    const table = embedding?.op === 'embedding' ? this.#graph.weights.get(embedding.weight) : undefined
    const [vocabSize, hiddenSize] = table?.shape ?? []
    if (vocabSize === undefined || hiddenSize === undefined) throw broken('a graph without an embedding')
    return {
      formatVersion: 1,
      rank: this.#rank,
      worldSize: this.#sharded.worldSize,
      dtype: this.#dtype,
      numLayers: this.#graph.numLayers,
      hiddenSize,
      vocabSize,
      normEps,
      numHeads: heads.query.length,
      numKvHeads: heads.kv.length,
      headDim: attention.headDim,
      rotaryDims,
      buffers: [...this.#buffers.values()],
      weights: [...this.#weights.values()],
      lines,
    }
  }

  #line(node: FusedGraph['nodes'][Section][number]): Line {
    switch (node.op) {
      case 'embed': {
        const weight = this.#linear(node.weight)
        return { op: 'embed', weight: weight.name, vocabStart: this.#firstRow(weight) }
      }
      case 'linear': {
        const weight = this.#linear(node.weight)
        const isSlot = this.#sharded.values.get(node.y)?.kind === 'partial'
        const columns = node.activation === 'siluMul' ? this.#widthOf(node.y) : weight.n
        const x = this.#bufferOf(node.x)
        const isLogits = this.#graph.nodes.after.some((other) => other.op === 'logits' && other.x === node.y)
        const y = isSlot
          ? 'slot'
          : isLogits
            ? this.#buffer('logits', columns, 'f32', node.y)
            : this.#buffer(node.y, columns, this.#dtype)
        return { op: 'linear', weight: weight.name, x, y, activation: node.activation }
      }
      case 'allReduceResidualNorm':
        return {
          op: 'allReduceResidualNorm',
          addResidual: node.addResidual,
          ...(node.bias === undefined ? {} : { bias: this.#vector(node.bias) }),
          gamma: this.#vector(node.gamma),
          gammaLayer: node.gammaLayer,
          // The outputs of norms follow each other: each is dead when the next is written, so they share a buffer.
          y: this.#buffer('x', this.#widthOf(node.y), this.#dtype, node.y),
        }
      case 'ropeKvWrite':
        return { op: 'ropeKvWrite', qkv: this.#bufferOf(node.qkv) }
      case 'attention': {
        const { query, kv } = this.#heads()
        const { headDim, scale } = node.node
        const out = this.#buffer(node.y, query.length * headDim, this.#dtype)
        return { op: 'attention', q: this.#bufferOf(node.qkv), out, scale, groups: this.#groups(query, kv) }
      }
      case 'selectRows': {
        const x = this.#bufferOf(node.x)
        return { op: 'selectRows', x, y: this.#buffer(node.y, this.#widthOf(node.y), this.#dtype) }
      }
      case 'logits': {
        const placement = this.#sharded.values.get(node.x)
        const size = this.#graph.values.get(node.x)?.columns ?? 0
        const split = placement?.kind === 'sharded' ? placement.split : undefined
        const owned = split === undefined ? [[0, size] as const] : ranges(split, this.#rank)
        const [range] = owned
        if (range === undefined || owned.length !== 1) throw broken('a rank has several ranges of the vocabulary')
        return { op: 'logits', x: this.#bufferOf(node.x), vocabStart: range[0], vocabCount: range[1] }
      }
      default: {
        const unknown: never = node
        return unknown
      }
    }
  }

  #buffer(name: string, columns: number, dtype: DType, value = name): string {
    const rows = this.#graph.values.get(value)?.rows ?? 'tokens'
    const known = this.#buffers.get(name)
    if (known !== undefined && (known.columns !== columns || known.dtype !== dtype || known.rows !== rows)) {
      throw broken(`buffer '${name}' would have two shapes`)
    }
    this.#buffers.set(name, { name, dtype, rows, columns })
    this.#holds.set(value, name)
    this.#held.set(name, value)
    return name
  }

  #bufferOf(value: string): string {
    const name = this.#holds.get(value)
    if (name === undefined || this.#held.get(name) !== value)
      throw broken(`'${value}' is read after it was overwritten`)
    return name
  }

  /** Columns of a value on this rank. */
  #widthOf(value: string): number {
    const placement = this.#sharded.values.get(value)
    if (placement?.kind !== 'sharded') return this.#graph.values.get(value)?.columns ?? 0
    return ranges(placement.split, this.#rank).reduce((sum, [, count]) => sum + count, 0)
  }

  #heads(): { readonly query: readonly number[]; readonly kv: readonly number[] } {
    const { q, k, numHeads, numKvHeads, headDim } = this.#fused.attention
    const local = (value: string, all: number): readonly number[] => {
      const placement = this.#sharded.values.get(value)
      if (placement?.kind === 'sharded') return headsOf(placement.split, this.#rank, headDim)
      return Array.from({ length: all }, (_, head) => head)
    }
    return { query: local(q, numHeads), kv: local(k, numKvHeads) }
  }

  /** Consecutive query heads that read the same KV head. */
  #groups(query: readonly number[], kv: readonly number[]): HeadGroup[] {
    const { numHeads, numKvHeads } = this.#fused.attention
    const groups: { kvHead: number; firstHead: number; numHeads: number }[] = []
    query.forEach((head, firstHead) => {
      const kvHead = kv.indexOf(Math.floor(head / (numHeads / numKvHeads)))
      if (kvHead < 0) throw broken(`query head ${head} without its KV head`)
      const last = groups.at(-1)
      if (last?.kvHead === kvHead) last.numHeads++
      else groups.push({ kvHead, firstHead, numHeads: 1 })
    })
    return groups
  }

  #firstRow(weight: Extract<WeightSpec, { kind: 'linear' }>): number {
    const parts = weight.parts[0] ?? []
    const [part] = parts
    if (part === undefined || parts.length !== 1) throw broken(`'${weight.name}' is no single range of rows`)
    return part.rows[0]
  }

  #linear(name: string): Extract<WeightSpec, { kind: 'linear' }> {
    const fused = this.#fused.weights.get(name)
    if (fused === undefined) throw broken(`no weight '${name}'`)
    const tensors = JSON.stringify([fused.layout, fused.parts])
    const known = this.#weights.get(this.#byTensors.get(tensors) ?? '')
    if (known?.kind === 'linear') return known
    const spec = this.#linearSpec(fused)
    this.#byTensors.set(tensors, name)
    this.#weights.set(name, spec)
    return spec
  }

  #linearSpec(fused: FusedWeight): Extract<WeightSpec, { kind: 'linear' }> {
    const isInterleaved = fused.layout === 'interleaved'
    const phases = ['gate', 'up'] as const
    let output = 0
    let k = 0
    const patterns: { readonly weight: string; readonly part: Omit<WeightPart, 'tensor'> }[] = []
    const biases: typeof patterns = []
    fused.parts.forEach(({ weight, bias }, index) => {
      const { rows, columns } = this.#rectangle(weight)
      const phase = phases[index]
      const interleave = isInterleaved && phase !== undefined ? { interleave: phase } : {}
      k = columns[1]
      if (isInterleaved) output = 0
      for (const segment of rows) {
        patterns.push({ weight, part: { rows: segment, columns, output, ...interleave } })
        if (bias !== undefined)
          biases.push({ weight: bias, part: { rows: segment, columns: [0, 1], output, ...interleave } })
        output += segment[1]
      }
    })
    const n = isInterleaved ? 2 * panelOutputs * Math.ceil(output / panelOutputs) : output
    const parts = this.#perLayer(patterns)
    const withBias = biases.length > 0 ? { bias: this.#perLayer(biases) } : {}
    return { kind: 'linear', name: fused.name, dtype: this.#dtype, n, k, parts, ...withBias }
  }

  /** The rank's rows and columns of a matrix. */
  #rectangle(tensor: string): {
    readonly rows: Split['segments'][number]
    readonly columns: readonly [number, number]
  } {
    const [outputs, inputs] = this.#graph.weights.get(tensor)?.shape ?? []
    const placement = this.#sharded.weights.get(tensor)?.placement
    if (outputs === undefined || inputs === undefined || placement === undefined) throw broken(`no matrix '${tensor}'`)
    if (placement.kind === 'replicated') return { rows: [[0, outputs]], columns: [0, inputs] }
    const segments = ranges(placement.split, this.#rank)
    if (placement.dim === 0) return { rows: segments, columns: [0, inputs] }
    const [columns] = segments
    if (columns === undefined || segments.length !== 1)
      throw broken(`'${tensor}' would be cut into several ranges of inputs`)
    return { rows: [[0, outputs]], columns }
  }

  #perLayer(
    patterns: readonly { readonly weight: string; readonly part: Omit<WeightPart, 'tensor'> }[],
  ): WeightPart[][] {
    const weights = patterns.map(({ weight, part }) => {
      const spec = this.#graph.weights.get(weight)
      if (spec === undefined) throw broken(`no weight '${weight}'`)
      return { spec, part }
    })
    const count = weights.some(({ spec }) => spec.isPerLayer) ? this.#graph.numLayers : 1
    return Array.from({ length: count }, (_, layer) =>
      weights.map(({ spec, part }) => ({ tensor: tensorName(spec, layer), ...part })),
    )
  }

  #vector(name: string): string {
    const vector = this.#fused.vectors.get(name)
    if (vector === undefined) throw broken(`no vector '${name}'`)
    if (!this.#weights.has(name)) this.#weights.set(name, this.#vectorSpec(vector))
    return name
  }

  #vectorSpec({ name, weight, last }: FusedVector): WeightSpec {
    const [n] = this.#graph.weights.get(weight)?.shape ?? []
    if (n === undefined) throw broken(`no vector '${weight}'`)
    const whole = (tensor: string) =>
      this.#perLayer([{ weight: tensor, part: { rows: [0, n], columns: [0, 1], output: 0 } }])
    return { kind: 'vector', name, n, parts: [...whole(weight), ...(last === undefined ? [] : whole(last))] }
  }
}

function broken(message: string): InferenceError {
  return new InferenceError('ERR_INTERNAL', `the compiler broke its own rules: ${message}`)
}

const pageBytes = 4096 // a weight's alignment in the rank's mapping: native/runner/weights.cpp
const pages = (nbytes: number): number => Math.ceil(nbytes / pageBytes) * pageBytes

/** Memory that one copy (one layer) of a weight takes when packed: padding to tiles, bias and alignment included. */
export function packedBytes(weight: WeightSpec): number {
  const panels = Math.ceil(weight.n / panelOutputs)
  const vectorBytes = pages(panels * panelOutputs * elementBytes.f32)
  if (weight.kind === 'vector') return vectorBytes
  const tileInputs = weight.dtype === 'f32' ? 16 : 32
  const tiles = panels * Math.ceil(weight.k / tileInputs)
  return pages(tiles * 1024) + (weight.bias === undefined ? 0 : vectorBytes)
}

/**
 * Proves that a Program can run: every operand exists and has the shape that its line needs, weights are covered exactly and per
 * layer, each partial sum in the slot is reduced before the next is written, nothing is read before it is written - in the first
 * layer, from layer to layer, and after the last. Throws ERR_INTERNAL naming the line.
 */
export function checkProgram(program: Program): void {
  new Checker(program).run()
}

class Checker {
  readonly #program: Program
  readonly #buffers = new Map<string, BufferSpec>()
  readonly #weights = new Map<string, WeightSpec>()
  readonly #written = new Set<string>()
  #isSlotFull = false
  #hasResidual = false
  /** The qkv buffer whose keys stand in the cache and whose queries are rotated. */
  #rotated: string | null = null
  #where = 'program'

  constructor(program: Program) {
    this.#program = program
  }

  run(): void {
    const p = this.#program
    const positive = { ...pick(p), headDim: p.headDim, worldSize: p.worldSize }
    for (const [name, value] of Object.entries(positive)) {
      this.#must(Number.isSafeInteger(value) && value >= 1, `${name} is ${value}`)
    }
    this.#must(
      Number.isSafeInteger(p.rank) && p.rank >= 0 && p.rank < p.worldSize,
      `rank is ${p.rank} of ${p.worldSize}`,
    )
    this.#must(
      p.rotaryDims % 2 === 0 && p.rotaryDims >= 0 && p.rotaryDims <= p.headDim,
      `rotaryDims is ${p.rotaryDims}`,
    )
    this.#must(Number.isFinite(p.normEps) && p.normEps >= 0, `normEps is ${p.normEps}`)
    for (const buffer of p.buffers) {
      this.#must(!this.#buffers.has(buffer.name) && buffer.name !== 'slot', `buffer '${buffer.name}' stands twice`)
      this.#must(Number.isSafeInteger(buffer.columns) && buffer.columns >= 1, `buffer '${buffer.name}' has no columns`)
      this.#buffers.set(buffer.name, buffer)
    }
    for (const weight of p.weights) {
      this.#must(!this.#weights.has(weight.name), `weight '${weight.name}' stands twice`)
      this.#weights.set(weight.name, weight)
      this.#checkWeight(weight)
    }
    this.#section('before')
    const entry = new Set(this.#written)
    this.#section('layer')
    // From layer to layer: the state that a layer leaves must have at least what it found. Buffers stay written, so the slot, the
    // residual and the rotation are what could differ; the slot is checked by going through the layer once more.
    this.#section('layer')
    for (const name of entry) this.#must(this.#written.has(name), `buffer '${name}' is lost in the layers`)
    this.#section('after')
    this.#must(!this.#isSlotFull, 'partial sums are left in the slot at the end')
    const last = p.lines.after.at(-1)
    if (last?.op !== 'logits') throw this.#illegal("the last line is not 'logits'")
    // The runner keeps one vocabulary range: of the ids it looks up, of its logits, and of the ids it has seen.
    const { vocabStart, vocabCount } = last
    for (const line of p.lines.before) {
      if (line.op !== 'embed') continue
      const isSame = line.vocabStart === vocabStart && this.#linear(line.weight, false).n === vocabCount
      this.#must(isSame, 'embedding and logits have different ranges of the vocabulary')
    }
  }

  #section(section: Section): void {
    this.#program.lines[section].forEach((line, index) => {
      this.#where = `${section}[${index}] ${line.op}`
      this.#line(line, section)
    })
    this.#where = 'program'
  }

  #line(line: Line, section: Section): void {
    const { hiddenSize, dtype, numHeads, numKvHeads, headDim, vocabSize, numLayers } = this.#program
    const inLayer = section === 'layer'
    switch (line.op) {
      case 'embed': {
        const weight = this.#linear(line.weight, inLayer)
        this.#must(weight.k === hiddenSize, `table of width ${weight.k}, hiddenSize is ${hiddenSize}`)
        this.#must(line.vocabStart >= 0 && line.vocabStart + weight.n <= vocabSize, 'rows outside the vocabulary')
        this.#fillSlot()
        return
      }
      case 'linear': {
        const weight = this.#linear(line.weight, inLayer)
        const x = this.#read(line.x)
        this.#must(x.columns === weight.k, `'${x.name}' has ${x.columns} columns, '${weight.name}' takes ${weight.k}`)
        this.#must(x.dtype === weight.dtype, `'${x.name}' is ${x.dtype}, '${weight.name}' is ${weight.dtype}`)
        const isPair = weight.parts.every((parts) => parts.some((part) => part.interleave !== undefined))
        this.#must(
          isPair === (line.activation === 'siluMul'),
          'siluMul goes with alternating gate and up panels, and only with them',
        )
        if (line.y === 'slot') {
          this.#must(line.activation === 'none' && weight.n === hiddenSize, `partial sums of width ${weight.n}`)
          this.#must(weight.bias === undefined, 'a bias before the reduce would be added once per rank')
          this.#must(x.rows === 'tokens', 'the slot has one row per token')
          this.#fillSlot()
          return
        }
        const y = this.#write(line.y)
        const columns = isPair ? outputsOf(weight) : weight.n
        this.#must(y.columns === columns, `'${y.name}' has ${y.columns} columns, '${weight.name}' gives ${columns}`)
        this.#must(y.rows === x.rows && line.y !== line.x, `'${y.name}' cannot take what '${x.name}' gives`)
        if (this.#rotated === line.y) this.#rotated = null
        return
      }
      case 'allReduceResidualNorm': {
        this.#must(this.#isSlotFull, 'no partial sums to reduce')
        this.#must(this.#hasResidual || !line.addResidual, 'no residual to add')
        const gamma = this.#vector(line.gamma, hiddenSize)
        const lastGamma = line.gammaLayer + (inLayer ? numLayers - 1 : 0)
        this.#must(line.gammaLayer >= 0 && lastGamma < gamma.parts.length, `'${gamma.name}' has no entry ${lastGamma}`)
        if (line.bias !== undefined) {
          const bias = this.#vector(line.bias, hiddenSize)
          this.#must(bias.parts.length === (inLayer ? numLayers : 1), `'${bias.name}' has ${bias.parts.length} entries`)
        }
        const y = this.#write(line.y)
        this.#must(
          y.columns === hiddenSize && y.rows === 'tokens' && y.dtype === dtype,
          `'${y.name}' is no [tokens, hiddenSize]`,
        )
        this.#isSlotFull = false
        this.#hasResidual = true
        return
      }
      case 'ropeKvWrite': {
        const qkv = this.#read(line.qkv)
        const columns = (numHeads + 2 * numKvHeads) * headDim
        this.#must(inLayer, 'KV blocks belong to a layer')
        this.#must(
          qkv.columns === columns && qkv.rows === 'tokens',
          `'${qkv.name}' has ${qkv.columns} columns, not ${columns}`,
        )
        this.#must(this.#rotated !== line.qkv, `'${qkv.name}' is rotated twice`)
        this.#rotated = line.qkv
        return
      }
      case 'attention': {
        const q = this.#read(line.q)
        this.#must(this.#rotated === line.q, `'${q.name}' is not rotated, or its keys are not in the cache`)
        this.#must(Number.isFinite(line.scale) && line.scale > 0, `scale is ${line.scale}`)
        let head = 0
        for (const group of line.groups) {
          this.#must(group.firstHead === head && group.numHeads >= 1, `query heads have a gap or an overlap at ${head}`)
          this.#must(group.kvHead >= 0 && group.kvHead < numKvHeads, `KV head ${group.kvHead} of ${numKvHeads}`)
          head += group.numHeads
        }
        this.#must(head === numHeads, `${head} of ${numHeads} query heads`)
        const out = this.#write(line.out)
        this.#must(
          out.columns === numHeads * headDim && out.rows === 'tokens',
          `'${out.name}' has ${out.columns} columns`,
        )
        this.#must(q.dtype === dtype && out.dtype === dtype, `'${q.name}' and '${out.name}' are not ${dtype}`)
        return
      }
      case 'selectRows': {
        const x = this.#read(line.x)
        const y = this.#write(line.y)
        const isSame = x.columns === y.columns && x.dtype === y.dtype
        this.#must(
          isSame && x.rows === 'tokens' && y.rows === 'logitRows',
          `'${y.name}' is no choice of rows of '${x.name}'`,
        )
        return
      }
      case 'logits': {
        const x = this.#read(line.x)
        this.#must(x.rows === 'logitRows' && x.dtype === 'f32', `'${x.name}' is no f32 [logitRows, vocabulary]`)
        this.#must(x.columns === line.vocabCount, `'${x.name}' has ${x.columns} columns, not ${line.vocabCount}`)
        this.#must(
          line.vocabStart >= 0 && line.vocabStart + line.vocabCount <= vocabSize,
          'columns outside the vocabulary',
        )
        return
      }
      default: {
        const unknown: never = line
        return unknown
      }
    }
  }

  /** Parts fill the outputs once each: no gap, no overlap, nothing beyond n. */
  #checkWeight(weight: WeightSpec): void {
    this.#must(Number.isSafeInteger(weight.n) && weight.n >= 1, `weight '${weight.name}' has no outputs`)
    this.#must(weight.parts.length >= 1, `weight '${weight.name}' has no parts`)
    const columns = weight.kind === 'linear' ? weight.k : 1
    for (const parts of weight.parts) this.#checkParts(weight, parts, columns)
    if (weight.kind === 'vector' || weight.bias === undefined) return
    this.#must(weight.bias.length === weight.parts.length, `bias of '${weight.name}' has other layers than the weight`)
    for (const parts of weight.bias) this.#checkParts(weight, parts, 1)
  }

  #checkParts(weight: WeightSpec, parts: readonly WeightPart[], columns: number): void {
    const isPair = parts.some((part) => part.interleave !== undefined)
    const ends = (isPair ? (['gate', 'up'] as const) : ([undefined] as const)).map((phase) => {
      let end = 0
      for (const part of parts.filter(({ interleave }) => interleave === phase)) {
        const name = `part ${part.tensor} of '${weight.name}'`
        this.#must(part.output === end, `${name} starts at output ${part.output}, not at ${end}`)
        this.#must(part.rows[0] >= 0 && part.rows[1] >= 1 && part.columns[0] >= 0, `${name} is empty`)
        this.#must(part.columns[1] === columns, `${name} has ${part.columns[1]} columns, not ${columns}`)
        end += part.rows[1]
      }
      return end
    })
    const [first = 0] = ends
    this.#must(
      ends.every((end) => end === first),
      `gate and up of '${weight.name}' differ`,
    )
    this.#must(
      parts.every(({ interleave }) => (interleave !== undefined) === isPair),
      `'${weight.name}' is a pair in part`,
    )
    const n = isPair ? 2 * panelOutputs * Math.ceil(first / panelOutputs) : first
    this.#must(n === weight.n, `parts of '${weight.name}' fill ${n} of ${weight.n} outputs`)
  }

  #fillSlot(): void {
    this.#must(!this.#isSlotFull, 'the partial sums in the slot are not reduced yet')
    this.#isSlotFull = true
  }

  #linear(name: string, inLayer: boolean): Extract<WeightSpec, { kind: 'linear' }> {
    const weight = this.#weights.get(name)
    if (weight?.kind !== 'linear') throw this.#illegal(`no linear weight '${name}'`)
    const layers = inLayer ? this.#program.numLayers : 1
    this.#must(weight.parts.length === layers, `'${name}' has ${weight.parts.length} layers, ${layers} are run`)
    return weight
  }

  #vector(name: string, n: number): Extract<WeightSpec, { kind: 'vector' }> {
    const weight = this.#weights.get(name)
    if (weight?.kind !== 'vector') throw this.#illegal(`no vector '${name}'`)
    this.#must(weight.n === n, `'${name}' has ${weight.n} elements, not ${n}`)
    return weight
  }

  #read(name: string): BufferSpec {
    this.#must(this.#written.has(name) || !this.#buffers.has(name), `'${name}' is read before it is written`)
    return this.#bufferSpec(name)
  }

  #write(name: string): BufferSpec {
    this.#written.add(name)
    return this.#bufferSpec(name)
  }

  #bufferSpec(name: string): BufferSpec {
    const buffer = this.#buffers.get(name)
    if (buffer === undefined) throw this.#illegal(`no buffer '${name}'`)
    return buffer
  }

  #must(condition: boolean, message: string): void {
    if (!condition) throw this.#illegal(message)
  }

  #illegal(message: string): InferenceError {
    return new InferenceError('ERR_INTERNAL', `${this.#where}: ${message}`, { where: this.#where })
  }
}

const pick = ({ numLayers, hiddenSize, vocabSize, numHeads, numKvHeads }: Program) => ({
  numLayers,
  hiddenSize,
  vocabSize,
  numHeads,
  numKvHeads,
})

/** True outputs of a pair of gate and up: columns of their product. */
function outputsOf(weight: Extract<WeightSpec, { kind: 'linear' }>): number {
  const gate = weight.parts[0]?.filter(({ interleave }) => interleave === 'gate') ?? []
  return gate.reduce((sum, { rows }) => sum + rows[1], 0)
}

/** A Program as text: what it runs, line by line, with the weights and buffers that the lines name. */
export function describeProgram(program: Program): string {
  const { rank, worldSize, dtype, numLayers, numHeads, numKvHeads, headDim } = program
  const text = [
    `program v${program.formatVersion}, rank ${rank} of ${worldSize}, ${dtype}: ${numLayers} layers, hidden ${program.hiddenSize}, ` +
      `${numHeads} query heads and ${numKvHeads} KV heads of ${headDim}, vocabulary ${program.vocabSize}`,
  ]
  text.push('buffers')
  for (const { name, dtype: type, rows, columns } of program.buffers)
    text.push(`  ${name.padEnd(12)} [${rows}, ${columns}] ${type}`)
  text.push('weights')
  for (const weight of program.weights) {
    const times = weight.parts.length === 1 ? '' : ` x ${weight.parts.length}`
    const shape = weight.kind === 'vector' ? `[${weight.n}] f32` : `[${weight.n}, ${weight.k}] ${weight.dtype}`
    const bias = weight.kind === 'linear' && weight.bias !== undefined ? ' + bias' : ''
    text.push(
      `  ${weight.name.padEnd(12)} ${shape}${bias}${times}, ${packedBytes(weight)} bytes packed${times === '' ? '' : ' each'}`,
    )
    for (const part of weight.parts[0] ?? []) text.push(`    ${describePart(part)}`)
  }
  for (const section of sections) {
    text.push(section === 'layer' ? `layer (${numLayers} times)` : section)
    for (const line of program.lines[section]) text.push(`  ${describeLine(line)}`)
  }
  return text.join('\n')
}

function describePart({ tensor, rows, columns, output, interleave }: WeightPart): string {
  const to = interleave === undefined ? '' : ` of ${interleave}`
  const range = ([start, count]: readonly [number, number]): string => `${start}..${start + count - 1}`
  return `${output}..${output + rows[1] - 1}${to} <- ${tensor}[${range(rows)}, ${range(columns)}]`
}

function describeLine(line: Line): string {
  switch (line.op) {
    case 'embed':
      return `slot = embed(${line.weight}), ids from ${line.vocabStart}`
    case 'linear':
      return `${line.y} = ${line.activation === 'none' ? 'linear' : `${line.activation} linear`}(${line.x}, ${line.weight})`
    case 'allReduceResidualNorm': {
      const terms = [
        ...(line.addResidual ? ['residual'] : []),
        'allReduce(slot)',
        ...(line.bias === undefined ? [] : [line.bias]),
      ]
      const index = line.gammaLayer === 0 ? 'layer' : `layer + ${line.gammaLayer}`
      return `residual = ${terms.join(' + ')}; ${line.y} = rmsNorm(residual) * ${line.gamma}[${index}]`
    }
    case 'ropeKvWrite':
      return `rotate q in ${line.qkv}; cache = rotated k, v of ${line.qkv}`
    case 'attention': {
      const groups = line.groups.map(
        ({ kvHead, firstHead, numHeads }) => `${firstHead}..${firstHead + numHeads - 1} on ${kvHead}`,
      )
      return `${line.out} = attention(${line.q}, cache), query heads ${groups.join(', ')}`
    }
    case 'selectRows':
      return `${line.y} = rows of ${line.x} whose logits are wanted`
    case 'logits':
      return `logits(${line.x}), ids ${line.vocabStart}..${line.vocabStart + line.vocabCount - 1}`
    default: {
      const unknown: never = line
      return unknown
    }
  }
}
