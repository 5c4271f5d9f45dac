// What a model would take on N ranks, from the headers alone: the rule and the reason for every tensor, each rank's ranges, its
// bytes (weights as packed, KV cache, scratch, shared memory, and what it reads from files), and the collectives of a decoding
// step. Plain data, with a table for people. The sizes are those that native/runner allocates; test/tp/plan.test.ts compares.

import { type DType, elementBytes } from '../native/types.js'
import { type Segment, type ShardedGraph, type WeightRule } from './autotp.js'
import type { Checkpoint } from './checkpoint/arch.js'
import { InferenceError } from './errors.js'
import { fuse } from './fuse.js'
import { sections } from './graph.js'
import { type Line, type Program, kvBlockTokens, lower, packedBytes, shardCheckpoint } from './program.js'

export interface PlanOptions {
  readonly worldSize: number
  readonly dtype: DType
  /** Longest sequence, prompt and new tokens together; the model's own if absent. */
  readonly maxTokens?: number
  /** Sequences at once; 1 if absent. */
  readonly batch?: number
  /** Tokens of one step, the length of a prompt chunk; 512 if absent. */
  readonly stepTokens?: number
  /** Tokens that the KV cache holds, all sequences together; batch sequences of maxTokens if absent. */
  readonly kvCacheTokens?: number
  /** Threads of each rank; 1 if absent. */
  readonly threads?: number
  readonly shares?: readonly number[]
}

export interface PlannedTensor {
  /** `{layer}` stands for 0 .. layers - 1. */
  readonly tensor: string
  readonly shape: readonly number[]
  /** How many there are: the number of layers, or 1. */
  readonly copies: number
  readonly rule: WeightRule['rule']
  readonly why: string
  /** The dimension that is cut (0: outputs, 1: inputs), or null. */
  readonly dim: 0 | 1 | null
  /** ranges[rank]: [start, count] in that dimension; empty when nothing is cut. */
  readonly ranges: readonly (readonly Segment[])[]
}

export interface PlannedRank {
  readonly rank: number
  /** Query heads, and the KV heads that they read, numbered in the whole model. */
  readonly heads: readonly [start: number, count: number]
  readonly kvHeads: readonly [start: number, count: number]
  readonly vocabulary: readonly [start: number, count: number]
  readonly weightBytes: number
  readonly kvBytes: number
  /** Activations of the largest step, and the threads' scratch. */
  readonly scratchBytes: number
  /** Shared memory: control pages and two generations of the slot. */
  readonly arenaBytes: number
  readonly totalBytes: number
  /** Asked for from the checkpoint's files. */
  readonly readBytes: number
}

export interface PlannedCollective {
  readonly where: 'step' | 'before' | 'layer' | 'after'
  readonly operation: 'broadcast' | 'allReduce' | 'exchange'
  readonly what: string
  /** Per decoding step of `batch` tokens. */
  readonly count: number
  /** Of one rank's contribution; for 'exchange' at most, where the candidates decide. */
  readonly bytes: number
  readonly why: string
}

export interface Plan {
  readonly formatVersion: 1
  readonly model: {
    readonly directory: string
    readonly modelType: string
    readonly fingerprint: string
    readonly numLayers: number
    readonly numHeads: number
    readonly numKvHeads: number
    readonly headDim: number
    /** Elements of all tensors that the model uses. */
    readonly parameters: number
  }
  readonly options: {
    readonly worldSize: number
    readonly dtype: DType
    readonly maxTokens: number
    readonly batch: number
    readonly stepTokens: number
    readonly threads: number
    readonly shares: readonly number[] | null
  }
  readonly tensors: readonly PlannedTensor[]
  readonly ranks: readonly PlannedRank[]
  readonly collectives: readonly PlannedCollective[]
  /** All-reduces of one decoding step: how many, and the bytes that each rank contributes to them. */
  readonly allReducesPerStep: { readonly count: number; readonly bytes: number }
  readonly total: Omit<PlannedRank, 'rank' | 'heads' | 'kvHeads' | 'vocabulary'>
  /** What a reader should know before choosing this many ranks. */
  readonly notes: readonly string[]
}

const recorderBytes = 64 << 10
const pageBytes = 4096
const pages = (nbytes: number): number => Math.ceil(nbytes / pageBytes) * pageBytes

/** Row stride of a buffer in bytes: native/runner/runner.cpp, RowStride. Never a multiple of a page. */
function rowBytes(columns: number, dtype: DType): number {
  const stride = Math.ceil(columns / 32) * 32
  const nbytes = stride * elementBytes[dtype]
  return nbytes % pageBytes === 0 ? nbytes + 32 * elementBytes[dtype] : nbytes
}

const scratchOfThread = 4 * 2 ** 20 // kGemmScratchBytes and kAttentionScratchBytes, native/kernels/kernels.h
const sumBlock = 256 // kSumBlock, there too
const candidateBytes = 8 // struct Candidate, native/runner/sampling.h
const recordBytes = 16 // struct RowRecord
const mostCandidates = 320

interface Limits {
  readonly maxTokens: number
  readonly batch: number
  readonly stepTokens: number
  readonly threads: number
  readonly numBlocks: number
}

/** Bytes of one generation of the slot: partial sums, or whatever else the runner sends through it. Runner::SlotBytes. */
export function slotBytes(program: Program, { batch, stepTokens, numBlocks }: Limits): number {
  const logitRows = Math.min(stepTokens, batch)
  const partialSums = stepTokens * rowBytes(program.hiddenSize, program.dtype)
  const wholeRow = program.vocabSize * elementBytes.f32 + 64
  const candidates = logitRows * (recordBytes + mostCandidates * candidateBytes)
  const message = 4 * (16 + 4 * batch + stepTokens + 3 * numBlocks + (1 + program.rotaryDims) * batch + 8 * logitRows)
  return pages(Math.max(partialSums, wholeRow, candidates, message))
}

/** What Runner::Allocate reserves for a step and for its threads. */
function scratchBytes(program: Program, { maxTokens, batch, stepTokens, threads }: Limits): number {
  const logitRows = Math.min(stepTokens, batch)
  const { hiddenSize, rotaryDims, numHeads, headDim } = program
  const buffers = program.buffers.map(
    ({ rows, columns, dtype }) => (rows === 'tokens' ? stepTokens : logitRows) * rowBytes(columns, dtype),
  )
  const residual = stepTokens * rowBytes(hiddenSize, 'f32')
  const sumsOfSquares = stepTokens * Math.ceil(hiddenSize / sumBlock) * elementBytes.f32
  const cosSin = stepTokens * Math.max(2, rotaryDims) * elementBytes.f32
  const splitRows = Math.min(stepTokens, batch * 4) // kSplitRows
  const splits = Math.ceil(maxTokens / 512) // kSplitKeys
  const partials = splitRows * splits * numHeads * (headDim + 2) * elementBytes.f32
  const parts = [...buffers, residual, sumsOfSquares, cosSin, partials, threads * scratchOfThread]
  return parts.reduce((sum, nbytes) => sum + pages(nbytes), 0)
}

function kvBytes(program: Program, { numBlocks }: Limits): number {
  const blockBytes = 2 * kvBlockTokens * program.headDim * elementBytes[program.dtype]
  return program.numLayers * program.numKvHeads * numBlocks * blockBytes
}

/** Bytes that one rank asks for from the files. */
function readBytes(program: Program, tensors: Checkpoint['tensors']): number {
  const parts = program.weights.flatMap((weight) => [
    ...weight.parts,
    ...(weight.kind === 'linear' ? (weight.bias ?? []) : []),
  ])
  return parts.flat().reduce((sum, { tensor, rows, columns }) => {
    const dtype = tensors.get(tensor)?.dtype
    return dtype === undefined ? sum : sum + rows[1] * columns[1] * elementBytes[dtype]
  }, 0)
}

function positive(name: string, value: number): number {
  if (Number.isSafeInteger(value) && value >= 1 && value <= 2 ** 31 - 1) return value
  throw new InferenceError('ERR_INVALID_OPTION', `${name} is ${value}: an integer of at least 1 is needed`, {
    name,
    value,
  })
}

/** Plans without running anything. Throws what shard() and the check of the headers throw, and ERR_CONTEXT_LENGTH beyond the model's positions. */
export function planModel(checkpoint: Checkpoint, options: PlanOptions): Plan {
  const { arch, tensors } = checkpoint
  const { worldSize, dtype, shares } = options
  const size = {
    maxTokens: positive('maxTokens', options.maxTokens ?? arch.maxPositions),
    batch: positive('batch', options.batch ?? 1),
    stepTokens: positive('stepTokens', options.stepTokens ?? 512),
    threads: positive('threads', options.threads ?? 1),
  }
  const blocksOf = (tokens: number): number => Math.ceil(tokens / kvBlockTokens)
  const numBlocks =
    options.kvCacheTokens === undefined
      ? size.batch * blocksOf(size.maxTokens)
      : blocksOf(positive('kvCacheTokens', options.kvCacheTokens))
  const limits: Limits = { ...size, numBlocks }
  if (limits.maxTokens > arch.maxPositions) {
    const message = `maxTokens is ${limits.maxTokens}, this model's sequences have at most ${arch.maxPositions} tokens`
    throw new InferenceError('ERR_CONTEXT_LENGTH', message, {
      maxTokens: limits.maxTokens,
      maxPositions: arch.maxPositions,
    })
  }
  const withShares = shares === undefined ? {} : { shares }
  const sharded = shardCheckpoint(checkpoint, { worldSize, ...withShares })
  const fused = fuse(sharded)
  const programs = Array.from({ length: worldSize }, (_, rank) => lower(fused, rank, dtype))
  const ranks = programs.map((program) => planRank(program, sharded, checkpoint, limits))
  const collectives = planCollectives(sharded, programs, limits)
  const reduces = collectives.filter(({ operation }) => operation === 'allReduce')
  const sum = (key: keyof Plan['total']): number => ranks.reduce((total, rank) => total + rank[key], 0)
  const used = planTensors(sharded)
  return {
    formatVersion: 1,
    model: {
      directory: checkpoint.directory,
      modelType: arch.modelType,
      fingerprint: checkpoint.fingerprint,
      numLayers: arch.numLayers,
      numHeads: arch.numHeads,
      numKvHeads: arch.numKvHeads,
      headDim: arch.headDim,
      parameters: used.reduce((total, { shape, copies }) => total + copies * shape.reduce((size, n) => size * n, 1), 0),
    },
    options: { worldSize, dtype, ...size, shares: shares ?? null },
    tensors: used,
    ranks,
    collectives,
    allReducesPerStep: {
      count: reduces.reduce((total, { count }) => total + count, 0),
      bytes: reduces.reduce((total, { count, bytes }) => total + count * bytes, 0),
    },
    total: {
      weightBytes: sum('weightBytes'),
      kvBytes: sum('kvBytes'),
      scratchBytes: sum('scratchBytes'),
      arenaBytes: sum('arenaBytes'),
      totalBytes: sum('totalBytes'),
      readBytes: sum('readBytes'),
    },
    notes: notesOn(arch, ranks, tensors),
  }
}

function planTensors(sharded: ShardedGraph): PlannedTensor[] {
  return [...sharded.weights.values()].map(({ tensor, rule, placement, why }) => {
    const weight = sharded.graph.weights.get(tensor)
    const isCut = placement.kind === 'sharded'
    return {
      tensor,
      shape: weight?.shape ?? [],
      copies: weight?.isPerLayer === true ? sharded.graph.numLayers : 1,
      rule,
      why,
      dim: isCut ? placement.dim : null,
      ranges: isCut ? placement.split.segments : [],
    }
  })
}

/** The rank's part of the first tensor that is cut by `unit`, in units of `size` elements. */
function rangeOf(sharded: ShardedGraph, unit: string, rank: number, size: number): [number, number] | null {
  for (const { placement } of sharded.weights.values()) {
    if (placement.kind !== 'sharded' || placement.split.unit !== unit) continue
    const [segment] = placement.split.segments[rank] ?? []
    if (segment !== undefined) return [segment[0] / size, segment[1] / size]
  }
  return null
}

function planRank(program: Program, sharded: ShardedGraph, checkpoint: Checkpoint, limits: Limits): PlannedRank {
  const { rank, headDim, numHeads, numKvHeads } = program
  const weightBytes = program.weights.reduce((sum, weight) => sum + weight.parts.length * packedBytes(weight), 0)
  // Control page, flight recorder, one lane's flags, two generations.
  const arenaBytes = 2 * pageBytes + recorderBytes + 2 * slotBytes(program, limits)
  const bytes = {
    weightBytes,
    kvBytes: kvBytes(program, limits),
    scratchBytes: scratchBytes(program, limits),
    arenaBytes,
  }
  return {
    rank,
    heads: rangeOf(sharded, 'queryHeads', rank, headDim) ?? [0, numHeads],
    kvHeads: rangeOf(sharded, 'kvHeads', rank, headDim) ?? [0, numKvHeads],
    vocabulary: rangeOf(sharded, 'vocabulary', rank, 1) ?? [0, program.vocabSize],
    ...bytes,
    totalBytes: Object.values(bytes).reduce((sum, nbytes) => sum + nbytes, 0),
    readBytes: readBytes(program, checkpoint.tensors),
  }
}

/** Of a decoding step: one token of each of `batch` sequences. A single rank exchanges nothing. */
function planCollectives(sharded: ShardedGraph, programs: readonly Program[], { batch }: Limits): PlannedCollective[] {
  const [program] = programs
  if (program === undefined || programs.length === 1) return []
  const collectives: PlannedCollective[] = [
    {
      where: 'step',
      operation: 'broadcast',
      what: 'ids, positions, KV blocks, sampling',
      count: 1,
      bytes: 4 * (16 + 4 * batch + batch + 3 * batch + 8 * batch),
      why: 'rank 0 schedules; the input of a step reaches every rank',
    },
  ]
  for (const section of sections) {
    for (const node of sharded.nodes[section]) {
      if (node.op !== 'allReduce') continue
      collectives.push({
        where: section,
        operation: 'allReduce',
        what: `[tokens, ${program.hiddenSize}] ${program.dtype} of '${node.source}'`,
        count: section === 'layer' ? program.numLayers : 1,
        bytes: batch * program.hiddenSize * elementBytes[program.dtype],
        why: node.why,
      })
    }
  }
  const logits = program.lines.after.find((line): line is Extract<Line, { op: 'logits' }> => line.op === 'logits')
  if (logits !== undefined) {
    collectives.push({
      where: 'after',
      operation: 'exchange',
      what: 'maxima, sums and candidates of each row',
      count: 1,
      bytes: batch * (recordBytes + mostCandidates * candidateBytes),
      why: 'the vocabulary is split; a row whose candidates do not decide is gathered whole',
    })
  }
  return collectives
}

function notesOn(arch: Checkpoint['arch'], ranks: readonly PlannedRank[], tensors: Checkpoint['tensors']): string[] {
  const notes: string[] = []
  const kvHeads = ranks.reduce((sum, rank) => sum + rank.kvHeads[1], 0)
  if (kvHeads > arch.numKvHeads) {
    const times = (kvHeads / arch.numKvHeads).toFixed(2)
    notes.push(`some KV heads stand on more than one rank: the KV cache takes ${times} times its size, over all ranks`)
  }
  const counts = ranks.map(({ heads }) => heads[1])
  const [most, least] = [Math.max(...counts), Math.min(...counts)]
  if (most > least)
    notes.push(
      `query heads are uneven: ${most} on the largest rank, ${least} on the smallest; the others wait for the largest`,
    )
  if ([...tensors.values()].every(({ file }) => file === ''))
    notes.push('made-up weights: a stored checkpoint of this shape would be read as shown')
  return notes
}

/** The plan as a text of at most 120 columns. */
export function formatPlan(plan: Plan): string {
  const { model, options, total } = plan
  const text: string[] = []
  const name = model.directory === '' ? model.modelType : model.directory
  text.push(
    ...wrap(
      `${name}: ${model.modelType}, ${billions(model.parameters)} parameters, ${plural(model.numLayers, 'layer')}`,
      2,
    ),
  )
  const { worldSize, dtype, batch, maxTokens, stepTokens, threads } = options
  text.push(
    `${plural(worldSize, 'rank')} of ${plural(threads, 'thread')}, ${dtype}; KV cache for ${batch} x ${maxTokens} tokens, steps of up to ${stepTokens} tokens`,
  )
  const isLayer = ({ copies, tensor }: PlannedTensor): boolean => copies > 1 || tensor.includes('{layer}')
  const prefix = commonPrefix(plan.tensors.filter(isLayer).map(({ tensor }) => tensor))
  text.push('', 'Tensors outside the layers')
  for (const tensor of plan.tensors)
    if (!isLayer(tensor)) text.push(...describeTensor(tensor, tensor.tensor, worldSize))
  text.push('', `Tensors of each layer (${prefix}*, ${plural(model.numLayers, 'layer')})`)
  for (const tensor of plan.tensors) {
    if (isLayer(tensor)) text.push(...describeTensor(tensor, tensor.tensor.slice(prefix.length), worldSize))
  }

  text.push('', 'Ranks (MiB)')
  const range = ([start, count]: readonly [number, number]): string => `${start}..${start + count - 1}`
  const rows = plan.ranks.map((rank) => [
    String(rank.rank),
    range(rank.heads),
    range(rank.kvHeads),
    range(rank.vocabulary),
    ...[rank.weightBytes, rank.kvBytes, rank.scratchBytes, rank.arenaBytes, rank.totalBytes, rank.readBytes].map(
      mebibytes,
    ),
  ])
  const sums = [
    total.weightBytes,
    total.kvBytes,
    total.scratchBytes,
    total.arenaBytes,
    total.totalBytes,
    total.readBytes,
  ]
  rows.push(['all', '', '', '', ...sums.map(mebibytes)])
  const head = [
    'rank',
    'heads',
    'KV heads',
    'vocabulary',
    'weights',
    'KV cache',
    'scratch',
    'shared',
    'total',
    'from files',
  ]
  text.push(...table([head, ...rows]))

  text.push('', `Collectives of a decoding step of ${plural(batch, 'token')} (bytes a rank)`)
  if (plan.collectives.length === 0) text.push('  none: one rank')
  for (const { operation, what, count, bytes, why } of plan.collectives) {
    const most = operation === 'exchange' ? 'up to ' : ''
    text.push(...wrap(`${String(count).padStart(3)} x ${operation} of ${most}${bytes} bytes: ${what}`, 8))
    text.push(...wrap(`      ${why}`, 6))
  }
  if (plan.collectives.length > 0) {
    const { count, bytes } = plan.allReducesPerStep
    text.push(`  all-reduces together: ${count}, ${bytes} bytes`)
  }
  for (const note of plan.notes) text.push('', ...wrap(`Note: ${note}.`, 6))
  return text.join('\n')
}

function describeTensor({ shape, rule, why, dim, ranges }: PlannedTensor, name: string, worldSize: number): string[] {
  const lines = wrap(`  ${name.padEnd(32)} [${shape.join(', ')}]`.padEnd(54) + rule, 6)
  lines.push(...wrap(`      ${why}`, 6))
  if (dim === null) {
    if (worldSize > 1) lines.push('      whole on every rank')
    return lines
  }
  const parts = ranges.map((segments) =>
    segments.map(([start, count]) => `${start}..${start + count - 1}`).join(' and '),
  )
  lines.push(...wrap(`      ${dim === 0 ? 'outputs' : 'inputs'} ${parts.join(' | ')}`, 8))
  return lines
}

const lineWidth = 120

/** Breaks at spaces; a word longer than a line is broken inside, so that no line is too long. */
function wrap(text: string, indent: number): string[] {
  const lines: string[] = []
  let rest = text
  while (rest.length > lineWidth) {
    const space = rest.lastIndexOf(' ', lineWidth)
    const end = space > indent ? space : lineWidth
    lines.push(rest.slice(0, end))
    rest = ' '.repeat(indent) + rest.slice(end).trimStart()
  }
  return [...lines, rest]
}

function table(rows: readonly (readonly string[])[]): string[] {
  const [head = []] = rows
  const widths = head.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)))
  return rows
    .map((row) => row.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  '))
    .map((row) => `  ${row}`)
}

function commonPrefix(names: readonly string[]): string {
  const [first = ''] = names
  let length = first.length
  for (const name of names) while (!name.startsWith(first.slice(0, length))) length--
  return first.slice(0, first.lastIndexOf('.', length - 1) + 1)
}

const plural = (count: number, what: string): string => `${count} ${what}${count === 1 ? '' : 's'}`
const mebibytes = (nbytes: number): string => (nbytes / 2 ** 20).toFixed(1)
const billions = (count: number): string =>
  count >= 1e8 ? `${(count / 1e9).toFixed(2)} billion` : `${(count / 1e6).toFixed(2)} million`
