// Automatic tensor parallelism: from a single-rank Graph to the same graph over worldSize ranks, by an algebra of placements that
// knows operations and no models. A value is replicated (every rank has it), sharded (every rank has a range of its columns) or
// partial (the ranks' matrices add up to it). What flows into a linear decides what becomes of it: a replicated input is cut by
// outputs where the consumers can work on shards (column-parallel), a sharded input by inputs (row-parallel, giving a partial).
// A partial stays one as long as that is legal: what else is added to it - residual, bias - is remembered and added once, after
// the reduce. Each weight and each collective carries the reason for what was decided. Pure; next step of the walk: fuse.ts.

import { InferenceError } from './errors.js'
import { type Graph, type Node, type Section, inputsOf, sections } from './graph.js'

/** Elements [start, start + count) of a dimension. */
export type Segment = readonly [start: number, count: number]

export interface Split {
  readonly unit: 'queryHeads' | 'kvHeads' | 'features' | 'vocabulary'
  /** Elements of the whole dimension. */
  readonly size: number
  /** segments[rank]. They tile the dimension; only kvHeads may give several ranks the same elements. */
  readonly segments: readonly (readonly Segment[])[]
}

/** dim counts from 0, outermost first: a value is cut in its columns (1), a weight [out, in] in its outputs (0) or inputs (1). */
export type Placement =
  | { readonly kind: 'replicated' }
  | { readonly kind: 'sharded'; readonly dim: 0 | 1; readonly split: Split }
  /** The value is the sum over ranks of `source`, plus the replicated values `addends`, plus the vectors `biases`. */
  | {
      readonly kind: 'partial'
      readonly source: string
      readonly addends: readonly string[]
      readonly biases: readonly string[]
    }

/** What was decided for a weight, and why. */
export interface WeightRule {
  readonly tensor: string
  readonly rule: 'column-parallel' | 'row-parallel' | 'vocabulary-split' | 'replicated' | 'added after the reduce'
  readonly placement: Exclude<Placement, { kind: 'partial' }>
  readonly why: string
}

/** y = sum over ranks of source + addends + biases */
export interface AllReduceNode {
  readonly op: 'allReduce'
  readonly name: string
  readonly source: string
  readonly addends: readonly string[]
  readonly biases: readonly string[]
  readonly y: string
  readonly why: string
}

export type ShardedNode = Node | AllReduceNode

export interface ShardedGraph {
  readonly graph: Graph
  readonly worldSize: number
  /** The graph's nodes with collectives inserted and the additions that they take over left out. */
  readonly nodes: Readonly<Record<Section, readonly ShardedNode[]>>
  readonly values: ReadonlyMap<string, Placement>
  readonly weights: ReadonlyMap<string, WeightRule>
  /** As in the graph, after the reduces. */
  readonly carried: Graph['carried']
}

const panel = 16 // outputs of a packed weight's panel (native/kernels/kernels.h): a finer cut pads every rank's last panel
const grains = [64, 32, panel] // whole k-tiles of any dtype (64 covers int8), then of bf16, then whole panels
const grainsPerRank = 16 // a coarser grain is taken only when it costs less than 1/16 of a share in balance

/**
 * Parts of `units` in proportion to `shares`, by largest remainder; equal remainders go to the low or to the high ranks. A rank of
 * small share may get none.
 */
export function apportion(units: number, shares: readonly number[], favour: 'low' | 'high'): number[] {
  const total = shares.reduce((sum, share) => sum + share, 0)
  const ideal = shares.map((share) => (units * share) / total)
  const counts = ideal.map((value) => Math.floor(value))
  const direction = favour === 'low' ? 1 : -1
  const order = shares.map((_, rank) => rank)
  const remainder = (rank: number): number => (ideal[rank] ?? 0) - (counts[rank] ?? 0)
  order.sort((a, b) => remainder(b) - remainder(a) || direction * (a - b))
  const left = units - counts.reduce((sum, count) => sum + count, 0)
  for (const rank of order.slice(0, left)) counts[rank] = (counts[rank] ?? 0) + 1
  return counts
}

/** The same counts, but for units that ranks without any get from the ranks with most. There must be a unit for every rank. */
function withoutEmpty(counts: readonly number[]): number[] {
  const filled = [...counts]
  for (let empty = filled.indexOf(0); empty >= 0; empty = filled.indexOf(0)) {
    const largest = filled.indexOf(Math.max(...filled))
    filled[largest] = (filled[largest] ?? 0) - 1
    filled[empty] = 1
  }
  return filled
}

function segmentsOf(counts: readonly number[], unit: number, size: number): Segment[][] {
  let start = 0
  return counts.map((count) => {
    const segment: Segment = [Math.min(start, size), Math.min(count * unit, Math.max(size - start, 0))]
    start += count * unit
    return [segment]
  })
}

/** A dimension of features or of the vocabulary, in grains; the incomplete last grain, and what is left over, go to the last ranks. */
function splitFeatures(size: number, unit: 'features' | 'vocabulary', shares: readonly number[]): Split {
  const worldSize = shares.length
  if (size < worldSize) {
    const what = unit === 'features' ? 'feed-forward width' : 'vocabulary'
    throw new InferenceError('ERR_TP_TOO_LARGE', `a ${what} of ${size} cannot be split over ${worldSize} ranks`, {
      worldSize,
      size,
    })
  }
  const candidates = unit === 'features' ? grains : [panel]
  const coarse = candidates.find((grain) => size >= worldSize * grain * grainsPerRank)
  const grain = coarse ?? (Math.ceil(size / panel) >= worldSize ? panel : 1)
  const counts = withoutEmpty(apportion(Math.ceil(size / grain), shares, 'high'))
  return { unit, size, segments: segmentsOf(counts, grain, size) }
}

export interface HeadRange {
  readonly firstHead: number
  readonly numHeads: number
  readonly firstKvHead: number
  readonly numKvHeads: number
}

/**
 * Whole groups (a KV head and the query heads that read it) where they are enough: every rank's share comes to one at least.
 * Otherwise contiguous ranges of query heads; each rank then keeps the KV heads that its query heads read, so that a KV head may
 * stand on several ranks.
 */
export function splitHeads(numHeads: number, numKvHeads: number, shares: readonly number[]): HeadRange[] {
  const worldSize = shares.length
  if (worldSize > numHeads) {
    throw new InferenceError(
      'ERR_TP_TOO_LARGE',
      `${worldSize} ranks are more than the model's ${numHeads} query heads: use at most ${numHeads} ranks`,
      { worldSize, numHeads },
    )
  }
  const groupSize = numHeads / numKvHeads
  const groups = apportion(numKvHeads, shares, 'low') // none is off its share by a whole group
  const isEnough = groups.every((count) => count >= 1)
  const heads = isEnough ? groups.map((count) => count * groupSize) : withoutEmpty(apportion(numHeads, shares, 'low'))
  let firstHead = 0
  return heads.map((count) => {
    const firstKvHead = Math.floor(firstHead / groupSize)
    const lastKvHead = Math.floor((firstHead + count - 1) / groupSize)
    const range = { firstHead, numHeads: count, firstKvHead, numKvHeads: lastKvHead - firstKvHead + 1 }
    firstHead += count
    return range
  })
}

/** What the consumers of a value can work on. */
type Wish = { readonly split: Split; readonly why: string } | { readonly split: null; readonly why: string }

const isEqualSplit = (a: Split, b: Split): boolean =>
  a.size === b.size && JSON.stringify(a.segments) === JSON.stringify(b.segments)

function illegal(message: string): InferenceError {
  return new InferenceError('ERR_INTERNAL', `no legal placement: ${message}`)
}

function checkShares(worldSize: number, shares: readonly number[] | undefined): readonly number[] {
  if (!Number.isSafeInteger(worldSize) || worldSize < 1) {
    throw new InferenceError('ERR_INVALID_OPTION', `worldSize is ${worldSize}: it must be an integer of at least 1`, {
      worldSize,
    })
  }
  if (shares === undefined) return new Array<number>(worldSize).fill(1)
  if (shares.length !== worldSize || !shares.every((share) => Number.isFinite(share) && share > 0)) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `shares [${shares.join(', ')}]: ${worldSize} positive numbers are needed, one per rank`,
      { worldSize },
    )
  }
  return shares
}

/** Shards a graph over ranks. `shares` are the ranks' relative speeds; equal if absent. */
export function shard(
  graph: Graph,
  worldSize: number,
  options: { readonly shares?: readonly number[] } = {},
): ShardedGraph {
  return new Sharder(graph, checkShares(worldSize, options.shares)).run()
}

class Sharder {
  readonly #graph: Graph
  readonly #shares: readonly number[]
  readonly #values = new Map<string, Placement>()
  readonly #weights = new Map<string, WeightRule>()
  readonly #nodes: Record<Section, ShardedNode[]> = { before: [], layer: [], after: [] }
  /** A reduced partial has a new name; whoever reads the old one from then on reads this. */
  readonly #reduced = new Map<string, string>()
  #section: Section = 'before'

  constructor(graph: Graph, shares: readonly number[]) {
    this.#graph = graph
    this.#shares = shares
  }

  run(): ShardedGraph {
    const { nodes, carried } = this.#graph
    // Within layers and after them the carried value must be placed alike on both ways in, from `initial` and from `next`.
    // Replicated is the one placement that every operation takes, so a partial is reduced on either way.
    this.#values.set(carried.current, { kind: 'replicated' })
    const ends: Partial<Record<Section, string>> = { before: carried.initial, layer: carried.next }
    const reducedEnds = new Map<string, string>()
    for (const section of sections) {
      this.#section = section
      for (const node of nodes[section]) this.#place(node)
      const end = ends[section]
      if (end === undefined) continue
      const reduced = this.#needReplicated(
        end,
        section === 'layer' ? 'the next layer reads it' : 'the first layer reads it',
      )
      reducedEnds.set(end, reduced)
    }
    return {
      graph: this.#graph,
      worldSize: this.#shares.length,
      nodes: this.#nodes,
      values: this.#values,
      weights: this.#weights,
      carried: {
        initial: reducedEnds.get(carried.initial) ?? carried.initial,
        current: carried.current,
        next: reducedEnds.get(carried.next) ?? carried.next,
      },
    }
  }

  #place(node: Node): void {
    switch (node.op) {
      case 'embedding': {
        // Ids outside the rank's rows give zeros, so the sum over ranks is the embedding.
        const split = splitFeatures(this.#weightShape(node.weight)[0], 'vocabulary', this.#shares)
        this.#rule(
          node.weight,
          'vocabulary-split',
          { kind: 'sharded', dim: 0, split },
          'a rank looks up its own rows, the sum over ranks is the embedding',
        )
        this.#emit(node, node.y, { kind: 'partial', source: node.y, addends: [], biases: [] })
        return
      }
      case 'linear':
        this.#placeLinear(node)
        return
      case 'rmsNorm': {
        const x = this.#needReplicated(node.x, `'${node.name}' needs whole rows`)
        this.#rule(node.gamma, 'replicated', { kind: 'replicated' }, `'${node.name}' works on whole rows on every rank`)
        this.#emit({ ...node, x }, node.y, { kind: 'replicated' })
        return
      }
      case 'rope': {
        const x = this.#notPartial(node.x, `'${node.name}' rotates whole values`)
        const placement = this.#placement(x)
        if (placement.kind === 'sharded') {
          const isAligned = placement.split.segments
            .flat()
            .every((segment) => segment.every((n) => n % node.headDim === 0))
          if (!isAligned) throw illegal(`'${node.name}' needs whole heads, '${x}' is cut inside one`)
        }
        this.#emit({ ...node, x }, node.y, placement)
        return
      }
      case 'attention':
        this.#placeAttention(node)
        return
      case 'siluMul': {
        const gate = this.#notPartial(node.gate, `'${node.name}' is not linear`)
        const up = this.#notPartial(node.up, `'${node.name}' is not linear`)
        this.#emit({ ...node, gate, up }, node.y, this.#equalPlacement(node.name, gate, up))
        return
      }
      case 'add':
        this.#placeAdd(node)
        return
      case 'selectRows': {
        const x = this.#notPartial(node.x, `'${node.name}' reads finished rows`)
        this.#emit({ ...node, x }, node.y, this.#placement(x))
        return
      }
      case 'logits': {
        const x = this.#notPartial(node.x, 'scores are compared')
        this.#nodes[this.#section].push({ ...node, x })
        return
      }
      default: {
        const unknown: never = node
        return unknown
      }
    }
  }

  #placeLinear(node: Extract<Node, { op: 'linear' }>): void {
    const x = this.#notPartial(node.x, `'${node.name}' would multiply unfinished sums`)
    const input = this.#placement(x)
    if (input.kind === 'sharded') {
      const why = `input '${node.x}' is sharded by ${words[input.split.unit]}, so the outputs are partial sums`
      this.#rule(node.weight, 'row-parallel', { kind: 'sharded', dim: 1, split: input.split }, why)
      const biases = node.bias === undefined ? [] : [node.bias]
      if (node.bias !== undefined) {
        const whyBias = `bias of row-parallel '${node.name}': each rank adds it once, after the reduce`
        this.#rule(node.bias, 'added after the reduce', { kind: 'replicated' }, whyBias)
      }
      const { bias: _, ...unbiased } = node
      this.#emit({ ...unbiased, x }, node.y, { kind: 'partial', source: node.y, addends: [], biases })
      return
    }
    const wish = this.#wish(node.y)
    const isSplit = wish.split !== null
    const placement: WeightRule['placement'] = isSplit
      ? { kind: 'sharded', dim: 0, split: wish.split }
      : { kind: 'replicated' }
    const rule = !isSplit ? 'replicated' : wish.split.unit === 'vocabulary' ? 'vocabulary-split' : 'column-parallel'
    const why = `input '${node.x}' is replicated, ${wish.why}`
    this.#rule(node.weight, rule, placement, why)
    if (node.bias !== undefined) this.#rule(node.bias, rule, placement, `bias of '${node.name}': follows its outputs`)
    this.#emit(
      { ...node, x },
      node.y,
      isSplit ? { kind: 'sharded', dim: 1, split: wish.split } : { kind: 'replicated' },
    )
  }

  #placeAttention(node: Extract<Node, { op: 'attention' }>): void {
    const names = { q: node.q, k: node.k, v: node.v }
    const why = `'${node.name}' is not linear`
    const read = {
      q: this.#notPartial(names.q, why),
      k: this.#notPartial(names.k, why),
      v: this.#notPartial(names.v, why),
    }
    const [q, k, v] = [this.#placement(read.q), this.#placement(read.k), this.#placement(read.v)]
    if (q.kind === 'replicated' && k.kind === 'replicated' && v.kind === 'replicated') {
      this.#emit({ ...node, ...read }, node.y, { kind: 'replicated' })
      return
    }
    if (q.kind !== 'sharded' || k.kind !== 'sharded' || v.kind !== 'sharded' || !isEqualSplit(k.split, v.split)) {
      throw illegal(`'${node.name}' needs q, k and v cut by the same heads`)
    }
    const groupSize = node.numHeads / node.numKvHeads
    for (let rank = 0; rank < this.#shares.length; rank++) {
      const kvHeads = new Set(headsOf(k.split, rank, node.headDim))
      for (const head of headsOf(q.split, rank, node.headDim)) {
        if (kvHeads.has(Math.floor(head / groupSize))) continue
        throw illegal(`'${node.name}': rank ${rank} has query head ${head} without its KV head`)
      }
    }
    this.#emit({ ...node, ...read }, node.y, q)
  }

  #placeAdd(node: Extract<Node, { op: 'add' }>): void {
    const a = this.#latest(node.a)
    const b = this.#latest(node.b)
    const [left, right] = [this.#placement(a), this.#placement(b)]
    if (left.kind !== 'partial' && right.kind !== 'partial') {
      this.#emit({ ...node, a, b }, node.y, this.#equalPlacement(node.name, a, b))
      return
    }
    if (left.kind === 'partial' && right.kind === 'partial') {
      const pending = {
        addends: [...left.addends, ...right.addends],
        biases: [...left.biases, ...right.biases],
      }
      const sum = { ...node, a: left.source, b: right.source }
      this.#emit(sum, node.y, { kind: 'partial', source: node.y, ...pending })
      return
    }
    const [partial, other] = left.kind === 'partial' ? [left, b] : [right, a]
    if (partial.kind !== 'partial' || this.#placement(other).kind !== 'replicated') {
      throw illegal(`'${node.name}' adds a partial and a sharded value`)
    }
    this.#values.set(node.y, { ...partial, addends: [...partial.addends, other] })
  }

  #equalPlacement(name: string, a: string, b: string): Placement {
    const [left, right] = [this.#placement(a), this.#placement(b)]
    const isEqual =
      left.kind === right.kind &&
      (left.kind !== 'sharded' || (right.kind === 'sharded' && isEqualSplit(left.split, right.split)))
    if (!isEqual)
      throw illegal(`'${name}' needs '${a}' and '${b}' placed alike: they are ${left.kind} and ${right.kind}`)
    return left
  }

  /** What the consumers of a value, through operations that keep columns apart, can take: one split that suits all, or whole rows. */
  #wish(name: string): Wish {
    const { carried, nodes } = this.#graph
    if (name === carried.initial || name === carried.next)
      return { split: null, why: `'${name}' goes from layer to layer whole` }
    const wishes = sections.flatMap((section) =>
      nodes[section].flatMap((node) =>
        inputsOf(node).flatMap((input, index) => (input === name ? [this.#wishOf(node, index)] : [])),
      ),
    )
    const [first] = wishes
    if (first === undefined) return { split: null, why: 'nothing reads the output' }
    for (const wish of wishes) {
      if (wish.split === null) return wish
      if (first.split === null || !isEqualSplit(first.split, wish.split)) {
        return { split: null, why: `the consumers of '${name}' want different shards` }
      }
    }
    return first
  }

  #wishOf(node: Node, input: number): Wish {
    switch (node.op) {
      case 'rope':
      case 'siluMul':
      case 'add':
      case 'selectRows':
        return this.#wish(node.y)
      case 'attention':
        return {
          split: this.#headSplit(node, input === 0 ? 'queryHeads' : 'kvHeads'),
          why: `output consumed by '${node.name}' per head`,
        }
      case 'linear': {
        const size = this.#weightShape(node.weight)[1]
        return {
          split: splitFeatures(size ?? 0, 'features', this.#shares),
          why: `output consumed by row-parallel '${node.name}'`,
        }
      }
      case 'logits': {
        const size = this.#graph.values.get(node.x)?.columns ?? 0
        return {
          split: splitFeatures(size, 'vocabulary', this.#shares),
          why: 'output consumed by the sharded choice of tokens',
        }
      }
      case 'rmsNorm':
        return { split: null, why: `output consumed by '${node.name}', which needs whole rows` }
      case 'embedding':
        return { split: null, why: '' }
      default: {
        const unknown: never = node
        return unknown
      }
    }
  }

  #headSplit(node: Extract<Node, { op: 'attention' }>, unit: 'queryHeads' | 'kvHeads'): Split {
    const { headDim } = node
    const ranges = splitHeads(node.numHeads, node.numKvHeads, this.#shares)
    const isQuery = unit === 'queryHeads'
    const segments = ranges.map((range): Segment[] => [
      isQuery
        ? [range.firstHead * headDim, range.numHeads * headDim]
        : [range.firstKvHead * headDim, range.numKvHeads * headDim],
    ])
    return { unit, size: (isQuery ? node.numHeads : node.numKvHeads) * headDim, segments }
  }

  #needReplicated(name: string, why: string): string {
    const latest = this.#notPartial(name, why)
    if (this.#placement(latest).kind !== 'replicated') {
      throw illegal(`${why}, but '${name}' is sharded, and gathering shards is not among the collectives`)
    }
    return latest
  }

  /** The name to read the value by once it is no partial; the reduce is inserted here, the last place where it is legal. */
  #notPartial(name: string, why: string): string {
    const latest = this.#latest(name)
    const placement = this.#placement(latest)
    if (placement.kind !== 'partial') return latest
    const y = `${latest}.reduced`
    const { source, addends, biases } = placement
    const { columns } = this.#graph.values.get(latest) ?? { columns: 0 }
    const reason = `'${latest}' is a partial sum [tokens, ${columns}] and ${why}`
    this.#nodes[this.#section].push({ op: 'allReduce', name: y, source, addends, biases, y, why: reason })
    this.#values.set(y, { kind: 'replicated' })
    this.#reduced.set(latest, y)
    return y
  }

  #latest(name: string): string {
    return this.#reduced.get(name) ?? name
  }

  #placement(name: string): Placement {
    const placement = this.#values.get(name)
    if (placement === undefined) throw illegal(`'${name}' is read before it is made`)
    return placement
  }

  #weightShape(tensor: string): readonly [number, number?] {
    const weight = this.#graph.weights.get(tensor)
    if (weight === undefined) throw illegal(`'${tensor}' is no weight of the graph`)
    return weight.shape
  }

  /** A tensor that serves twice (a tied table) must be cut alike by both. */
  #rule(tensor: string, rule: WeightRule['rule'], placement: WeightRule['placement'], why: string): void {
    const known = this.#weights.get(tensor)
    if (known === undefined) {
      this.#weights.set(tensor, { tensor, rule, placement, why })
      return
    }
    const isEqual =
      known.placement.kind === placement.kind &&
      (known.placement.kind !== 'sharded' ||
        placement.kind !== 'sharded' ||
        (known.placement.dim === placement.dim && isEqualSplit(known.placement.split, placement.split)))
    if (!isEqual) throw illegal(`'${tensor}' serves two operations that cut it differently`)
    this.#weights.set(tensor, { ...known, why: `${known.why}; also ${why}` })
  }

  #emit(node: ShardedNode, y: string, placement: Placement): void {
    this.#nodes[this.#section].push(node)
    this.#values.set(y, placement)
  }
}

const words: Readonly<Record<Split['unit'], string>> = {
  queryHeads: 'query heads',
  kvHeads: 'KV heads',
  features: 'features',
  vocabulary: 'vocabulary',
}

/** Global numbers of the heads of a rank. */
export function headsOf(split: Split, rank: number, headDim: number): number[] {
  const segments = split.segments[rank] ?? []
  return segments.flatMap(([start, count]) => {
    if (start % headDim !== 0 || count % headDim !== 0) throw illegal('attention needs whole heads')
    return Array.from({ length: count / headDim }, (_, index) => start / headDim + index)
  })
}
