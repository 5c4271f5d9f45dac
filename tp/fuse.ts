// Rewrites of a sharded graph into the forms that the kernels run: linears that share an input become one (q|k|v, gate|up with the
// SwiGLU as its epilogue), rotation and cache write become one pass, and every allReduce becomes one pass of reduce, residual, bias
// and the norm that follows. The norm at the head of a layer moves to the end of the layer before it, so its weights form a stack
// of numLayers + 1 vectors whose last entry is the final norm. Pure; next step of the walk: lower() in program.ts.

import { InferenceError } from './errors.js'
import type { AllReduceNode, ShardedGraph, ShardedNode } from './autotp.js'
import { type Node, type Section, inputsOf } from './graph.js'

export interface FusedWeight {
  readonly name: string
  /** Graph weights in the order of their outputs. Interleaved: gate, up. */
  readonly parts: readonly { readonly weight: string; readonly bias?: string }[]
  readonly layout: 'stacked' | 'interleaved'
}

/** Vectors over layers: one graph weight, and for a rotated norm the vector that follows the last layer's. */
export interface FusedVector {
  readonly name: string
  readonly weight: string
  readonly last?: string
}

export type FusedNode =
  | { readonly op: 'embed'; readonly weight: string; readonly y: string }
  | {
      readonly op: 'linear'
      readonly weight: string
      readonly x: string
      readonly y: string
      readonly activation: 'none' | 'siluMul'
    }
  | {
      readonly op: 'allReduceResidualNorm'
      /** The partial sums. */
      readonly x: string
      readonly addResidual: boolean
      readonly bias?: string
      readonly gamma: string
      readonly gammaLayer: number
      readonly y: string
    }
  /** qkv names the fused output; the graph's attention node has the heads. */
  | { readonly op: 'ropeKvWrite'; readonly qkv: string }
  | {
      readonly op: 'attention'
      readonly qkv: string
      readonly node: Extract<Node, { op: 'attention' }>
      readonly y: string
    }
  | { readonly op: 'selectRows'; readonly x: string; readonly y: string }
  | { readonly op: 'logits'; readonly x: string }

export interface FusedGraph {
  readonly sharded: ShardedGraph
  readonly nodes: Readonly<Record<Section, readonly FusedNode[]>>
  /** By the name that the nodes use. */
  readonly weights: ReadonlyMap<string, FusedWeight>
  readonly vectors: ReadonlyMap<string, FusedVector>
  readonly normEps: number
  readonly rotaryDims: number
  readonly attention: Extract<Node, { op: 'attention' }>
}

type NodeOf<Op extends ShardedNode['op']> = Extract<ShardedNode, { op: Op }>

function unsupported(message: string): InferenceError {
  return new InferenceError('ERR_INTERNAL', `this graph has no fused form: ${message}`)
}

export function fuse(sharded: ShardedGraph): FusedGraph {
  return new Fuser(sharded).run()
}

class Fuser {
  readonly #sharded: ShardedGraph
  readonly #nodes: Record<Section, FusedNode[]> = { before: [], layer: [], after: [] }
  readonly #weights = new Map<string, FusedWeight>()
  readonly #vectors = new Map<string, FusedVector>()
  /** Nodes that an earlier fused node has taken over. */
  readonly #done = new Set<ShardedNode>()
  /** Value -> what stands for it after fusion. */
  readonly #alias = new Map<string, string>()
  /** The value that the running residual holds. */
  #residual: string | null = null

  constructor(sharded: ShardedGraph) {
    this.#sharded = sharded
  }

  run(): FusedGraph {
    const { carried } = this.#sharded
    const layer = this.#soleNorm('layer', carried.current)
    const final = this.#soleNorm('after', carried.current)
    const attention = this.#sole('attention')
    const rotated = this.#sharded.nodes.layer.filter((node): node is NodeOf<'rope'> => node.op === 'rope')
    const epsilons = new Set(this.#all().flatMap((node) => (node.op === 'rmsNorm' ? [node.eps] : [])))
    const [normEps] = epsilons
    if (normEps === undefined || epsilons.size !== 1) throw unsupported('its norms have different epsilons')
    const [rotaryDims] = rotated.map((node) => node.rotaryDims)
    if (rotaryDims === undefined) throw unsupported('its attention has no rotary positions')

    // The carried value itself is never stored: the residual holds it, and `x` holds its norm.
    this.#vectors.set(layer.name, { name: layer.name, weight: layer.gamma, last: final.gamma })
    for (const norm of [layer, final]) {
      this.#done.add(norm)
      this.#alias.set(norm.y, layer.y)
    }
    const entryOf = (reduced: string, gammaLayer: number) => ({ reduced, gamma: layer.name, gammaLayer, y: layer.y })
    this.#section('before', entryOf(carried.initial, 0))
    this.#residual = carried.current
    this.#section('layer', entryOf(carried.next, 1))
    this.#residual = carried.current
    this.#section('after', null)
    return {
      sharded: this.#sharded,
      nodes: this.#nodes,
      weights: this.#weights,
      vectors: this.#vectors,
      normEps,
      rotaryDims,
      attention,
    }
  }

  #section(
    section: Section,
    end: { readonly reduced: string; readonly gamma: string; readonly gammaLayer: number; readonly y: string } | null,
  ): void {
    for (const node of this.#sharded.nodes[section]) {
      if (this.#done.has(node)) continue
      if (node.op === 'allReduce') this.#fuseReduce(section, node, end?.reduced === node.y ? end : null)
      else this.#fuseNode(section, node)
    }
  }

  #fuseReduce(
    section: Section,
    node: AllReduceNode,
    end: { readonly gamma: string; readonly gammaLayer: number; readonly y: string } | null,
  ): void {
    if (node.biases.length > 1) throw unsupported(`'${node.name}' adds ${node.biases.length} biases in one reduce`)
    if (node.addends.some((addend) => addend !== this.#residual) || node.addends.length > 1) {
      throw unsupported(`'${node.name}' adds ${node.addends.join(' and ')}, and the residual is ${this.#residual}`)
    }
    const [biasTensor] = node.biases
    let bias: string | undefined
    if (biasTensor !== undefined) {
      bias = `${node.source}Bias`
      this.#vectors.set(bias, { name: bias, weight: biasTensor })
    }
    let norm = end
    if (norm === null) {
      const consumer = this.#soleNorm(section, node.y)
      this.#done.add(consumer)
      this.#vectors.set(consumer.name, { name: consumer.name, weight: consumer.gamma })
      norm = { gamma: consumer.name, gammaLayer: 0, y: consumer.y }
    }
    this.#nodes[section].push({
      op: 'allReduceResidualNorm',
      x: node.source,
      addResidual: node.addends.length === 1,
      ...(bias === undefined ? {} : { bias }),
      gamma: norm.gamma,
      gammaLayer: norm.gammaLayer,
      y: norm.y,
    })
    this.#residual = node.y
  }

  #fuseNode(section: Section, node: Exclude<ShardedNode, AllReduceNode>): void {
    const emit = (fused: FusedNode): void => {
      this.#nodes[section].push(fused)
    }
    switch (node.op) {
      case 'embedding':
        this.#weights.set(node.name, { name: node.name, parts: [{ weight: node.weight }], layout: 'stacked' })
        emit({ op: 'embed', weight: node.name, y: node.y })
        return
      case 'linear':
        this.#fuseLinear(section, node)
        return
      case 'attention': {
        const qkv = this.#read(node.q)
        if (this.#read(node.k) !== qkv || this.#read(node.v) !== qkv) throw unsupported('q, k and v share no input')
        emit({ op: 'ropeKvWrite', qkv })
        emit({ op: 'attention', qkv, node, y: node.y })
        return
      }
      case 'selectRows':
        emit({ op: 'selectRows', x: this.#read(node.x), y: node.y })
        return
      case 'logits':
        emit({ op: 'logits', x: this.#read(node.x) })
        return
      case 'rope':
      case 'siluMul':
      case 'add':
      case 'rmsNorm':
        throw unsupported(`'${node.name}' (${node.op}) stands where no kernel takes it`)
      default: {
        const unknown: never = node
        return unknown
      }
    }
  }

  #fuseLinear(section: Section, node: NodeOf<'linear'>): void {
    const { nodes } = this.#sharded
    const siluMul = nodes[section].find(
      (other) => other.op === 'siluMul' && (other.gate === node.y || other.up === node.y),
    )
    if (siluMul?.op === 'siluMul') {
      this.#fusePair(section, siluMul)
      return
    }
    const attention = nodes[section].find((other) => other.op === 'attention')
    const heads = attention?.op === 'attention' ? this.#linearsOf(section, attention) : []
    if (heads.some(({ linear }) => linear === node)) {
      this.#fuseHeads(section, heads)
      return
    }
    this.#weights.set(node.name, { name: node.name, parts: [partOf(node)], layout: 'stacked' })
    this.#nodes[section].push({ op: 'linear', weight: node.name, x: this.#read(node.x), y: node.y, activation: 'none' })
  }

  /** gate and up, read by the product alone: one linear of alternating panels. */
  #fusePair(section: Section, siluMul: NodeOf<'siluMul'>): void {
    const [gate, up] = [siluMul.gate, siluMul.up].map((value) => this.#linearFor(section, value))
    if (gate === undefined || up === undefined || gate.x !== up.x) throw unsupported('gate and up share no input')
    if ((gate.bias === undefined) !== (up.bias === undefined)) throw unsupported('only one of gate and up has a bias')
    const name = `${gate.name}${up.name.charAt(0).toUpperCase()}${up.name.slice(1)}`
    this.#weights.set(name, { name, parts: [partOf(gate), partOf(up)], layout: 'interleaved' })
    for (const node of [gate, up, siluMul]) this.#done.add(node)
    this.#nodes[section].push({
      op: 'linear',
      weight: name,
      x: this.#read(gate.x),
      y: siluMul.y,
      activation: 'siluMul',
    })
  }

  /** q, k and v, with the rotations on the way to the attention: q heads | k heads | v heads of the rank in one linear. */
  #fuseHeads(section: Section, heads: readonly { linear: NodeOf<'linear'>; rope: NodeOf<'rope'> | undefined }[]): void {
    const linears = heads.map(({ linear }) => linear)
    const [first] = linears
    if (first === undefined || linears.some(({ x }) => x !== first.x)) throw unsupported('q, k and v share no input')
    const [q, k, v] = heads
    if (
      q?.rope === undefined ||
      k?.rope === undefined ||
      v?.rope !== undefined ||
      q.rope.rotaryDims !== k.rope.rotaryDims
    ) {
      throw unsupported('q and k are rotated, v is not: nothing else has a kernel')
    }
    if (linears.some(({ bias }) => (bias === undefined) !== (first.bias === undefined))) {
      throw unsupported('only some of q, k and v have a bias')
    }
    const name = linears.map((linear) => linear.name).join('')
    this.#weights.set(name, { name, parts: linears.map(partOf), layout: 'stacked' })
    for (const { linear, rope } of heads) {
      this.#done.add(linear)
      this.#alias.set(linear.y, name)
      if (rope === undefined) continue
      this.#done.add(rope)
      this.#alias.set(rope.y, name)
    }
    this.#nodes[section].push({ op: 'linear', weight: name, x: this.#read(first.x), y: name, activation: 'none' })
  }

  #linearsOf(section: Section, attention: NodeOf<'attention'>) {
    return [attention.q, attention.k, attention.v].map((value) => {
      const rope = this.#sharded.nodes[section].find(
        (node): node is NodeOf<'rope'> => node.op === 'rope' && node.y === value,
      )
      return { linear: this.#linearFor(section, rope?.x ?? value), rope }
    })
  }

  /** The linear that makes a value which nothing but one operation reads. */
  #linearFor(section: Section, value: string): NodeOf<'linear'> {
    const linear = this.#sharded.nodes[section].find(
      (node): node is NodeOf<'linear'> => node.op === 'linear' && node.y === value,
    )
    if (linear === undefined) throw unsupported(`'${value}' is made by no linear`)
    if (this.#readers(value).length !== 1) throw unsupported(`'${value}' is read more than once`)
    return linear
  }

  #soleNorm(section: Section, value: string): NodeOf<'rmsNorm'> {
    const readers = this.#sharded.nodes[section].filter((node) => valuesReadBy(node).includes(value))
    const norms = readers.filter((node): node is NodeOf<'rmsNorm'> => node.op === 'rmsNorm')
    const [norm] = norms
    // What adds the value to later sums reads the residual, which outlives the norm.
    if (norm === undefined || norms.length !== 1 || readers.some((node) => node !== norm && node.op !== 'allReduce')) {
      throw unsupported(`'${value}' is not read by exactly one norm`)
    }
    return norm
  }

  #sole<Op extends 'attention'>(op: Op): NodeOf<Op> {
    const found = this.#all().filter((node): node is NodeOf<Op> => node.op === op)
    const [node] = found
    if (node === undefined || found.length !== 1) throw unsupported(`a layer has ${found.length} operations '${op}'`)
    return node
  }

  #all(): readonly ShardedNode[] {
    const { before, layer, after } = this.#sharded.nodes
    return [...before, ...layer, ...after]
  }

  #readers(value: string): readonly ShardedNode[] {
    return this.#all().filter((node) => valuesReadBy(node).includes(value))
  }

  #read(value: string): string {
    return this.#alias.get(value) ?? value
  }
}

const partOf = (node: NodeOf<'linear'>): { weight: string; bias?: string } =>
  node.bias === undefined ? { weight: node.weight } : { weight: node.weight, bias: node.bias }

const valuesReadBy = (node: ShardedNode): readonly string[] =>
  node.op === 'allReduce' ? [node.source, ...node.addends] : inputsOf(node)
