// The single-rank form of a model: named operations on matrices [rows, columns], written by the builders in tp/models as in the
// paper, with no word about ranks. Rows are symbols (tokens of the step, or the rows whose logits are wanted); columns are numbers.
// Layers stand once and are repeated; `{layer}` in the name of a checkpoint tensor is the layer's index.
// Read by autotp.ts. Plain data: a Graph can be printed and compared.

/** Rows of a value: all tokens of the step, or only those whose logits are wanted. */
export type Rows = 'tokens' | 'logitRows'

export interface Value {
  readonly name: string
  readonly rows: Rows
  readonly columns: number
}

/** A tensor of the checkpoint: [outputs, inputs], or [n] for a vector. */
export interface GraphWeight {
  /** As in the checkpoint, with `{layer}` for the layer's index. */
  readonly tensor: string
  readonly shape: readonly [number] | readonly [number, number]
  readonly isPerLayer: boolean
}

/** x, y, ... name values; weight, bias, gamma name tensors. */
export type Node =
  /** y = rows of the table [vocabulary, columns] chosen by the step's ids. */
  | { readonly op: 'embedding'; readonly name: string; readonly weight: string; readonly y: string }
  /** y = x W^T (+ bias) */
  | {
      readonly op: 'linear'
      readonly name: string
      readonly x: string
      readonly weight: string
      readonly bias?: string
      readonly y: string
    }
  | {
      readonly op: 'rmsNorm'
      readonly name: string
      readonly x: string
      readonly gamma: string
      readonly eps: number
      readonly y: string
    }
  /** Rotates the first rotaryDims of every head by the token's position. */
  | {
      readonly op: 'rope'
      readonly name: string
      readonly x: string
      readonly headDim: number
      readonly rotaryDims: number
      readonly y: string
    }
  /** y = softmax(q K^T scale, causal) V over all keys of the sequence; query head h reads KV head h / (numHeads / numKvHeads). */
  | {
      readonly op: 'attention'
      readonly name: string
      readonly q: string
      readonly k: string
      readonly v: string
      readonly numHeads: number
      readonly numKvHeads: number
      readonly headDim: number
      readonly scale: number
      readonly y: string
    }
  /** y = silu(gate) * up */
  | { readonly op: 'siluMul'; readonly name: string; readonly gate: string; readonly up: string; readonly y: string }
  | { readonly op: 'add'; readonly name: string; readonly a: string; readonly b: string; readonly y: string }
  /** The rows whose logits are wanted. */
  | { readonly op: 'selectRows'; readonly name: string; readonly x: string; readonly y: string }
  /** The end: x is one row of scores over the vocabulary. */
  | { readonly op: 'logits'; readonly name: string; readonly x: string }

export type Section = 'before' | 'layer' | 'after'
export const sections: readonly Section[] = ['before', 'layer', 'after']

export interface Graph {
  readonly numLayers: number
  readonly nodes: Readonly<Record<Section, readonly Node[]>>
  readonly values: ReadonlyMap<string, Value>
  readonly weights: ReadonlyMap<string, GraphWeight>
  /**
   * What goes from layer to layer: `current` is the layer's input, and `after` reads it too; it starts as `initial`, and becomes
   * `next` at the end of each layer.
   */
  readonly carried: { readonly initial: string; readonly current: string; readonly next: string }
  /** Tensors that checkpoints of this family may hold and that are not needed: a reason for each pattern. */
  readonly harmless: readonly { readonly pattern: RegExp; readonly why: string }[]
}

/** The checkpoint's name of a weight in one layer. */
export function tensorName(weight: GraphWeight, layer: number): string {
  return weight.isPerLayer ? weight.tensor.replaceAll('{layer}', String(layer)) : weight.tensor
}

/** The values that a node reads. */
export function inputsOf(node: Node): readonly string[] {
  switch (node.op) {
    case 'embedding':
      return []
    case 'attention':
      return [node.q, node.k, node.v]
    case 'siluMul':
      return [node.gate, node.up]
    case 'add':
      return [node.a, node.b]
    case 'linear':
    case 'rmsNorm':
    case 'rope':
    case 'selectRows':
    case 'logits':
      return [node.x]
    default: {
      const unknown: never = node
      return unknown
    }
  }
}

type LinearOptions = { readonly weight: string; readonly outputs: number; readonly bias?: string | undefined }

/** Collects nodes in the order in which a builder calls it. Shapes are inferred; a builder whose shapes disagree is a bug. */
export class GraphBuilder {
  readonly #nodes: Record<Section, Node[]> = { before: [], layer: [], after: [] }
  readonly #values = new Map<string, Value>()
  readonly #weights = new Map<string, GraphWeight>()
  #section: Section = 'before'
  #numLayers = 0
  #carried = { initial: '', current: '', next: '' }

  embedding(name: string, weight: string, vocabSize: number, columns: number): string {
    this.#useWeight(weight, [vocabSize, columns])
    return this.#push({ op: 'embedding', name, weight, y: name }, { rows: 'tokens', columns })
  }

  linear(name: string, x: string, { weight, outputs, bias }: LinearOptions): string {
    const { rows, columns } = this.#value(x)
    this.#useWeight(weight, [outputs, columns])
    if (bias !== undefined) this.#useWeight(bias, [outputs])
    const withBias = bias === undefined ? {} : { bias }
    return this.#push({ op: 'linear', name, x, weight, ...withBias, y: name }, { rows, columns: outputs })
  }

  rmsNorm(name: string, x: string, gamma: string, eps: number): string {
    const value = this.#value(x)
    this.#useWeight(gamma, [value.columns])
    return this.#push({ op: 'rmsNorm', name, x, gamma, eps, y: name }, value)
  }

  rope(name: string, x: string, headDim: number, rotaryDims: number): string {
    const value = this.#value(x)
    this.#must(value.columns % headDim === 0 && rotaryDims <= headDim && rotaryDims % 2 === 0, name)
    return this.#push({ op: 'rope', name, x, headDim, rotaryDims, y: name }, value)
  }

  attention(
    name: string,
    { q, k, v }: { readonly q: string; readonly k: string; readonly v: string },
    heads: { readonly numHeads: number; readonly numKvHeads: number; readonly headDim: number; readonly scale: number },
  ): string {
    const query = this.#value(q)
    this.#must(heads.numHeads % heads.numKvHeads === 0, name)
    this.#must(query.columns === heads.numHeads * heads.headDim, name)
    for (const operand of [k, v]) this.#must(this.#value(operand).columns === heads.numKvHeads * heads.headDim, name)
    return this.#push({ op: 'attention', name, q, k, v, ...heads, y: name }, query)
  }

  siluMul(name: string, gate: string, up: string): string {
    const value = this.#value(gate)
    this.#must(value.columns === this.#value(up).columns, name)
    return this.#push({ op: 'siluMul', name, gate, up, y: name }, value)
  }

  add(name: string, a: string, b: string): string {
    const value = this.#value(a)
    this.#must(value.columns === this.#value(b).columns, name)
    return this.#push({ op: 'add', name, a, b, y: name }, value)
  }

  selectRows(name: string, x: string): string {
    return this.#push({ op: 'selectRows', name, x, y: name }, { rows: 'logitRows', columns: this.#value(x).columns })
  }

  logits(x: string): void {
    this.#must(this.#value(x).rows === 'logitRows', 'logits')
    this.#nodes[this.#section].push({ op: 'logits', name: 'logits', x })
  }

  /** `body` maps the layer's input to its output; the result is what the last layer gave. Once a graph. */
  repeat(name: string, numLayers: number, initial: string, body: (current: string) => string): string {
    this.#must(this.#section === 'before' && numLayers >= 1, name)
    const value = this.#value(initial)
    this.#values.set(name, { ...value, name })
    this.#numLayers = numLayers
    this.#section = 'layer'
    const next = body(name)
    this.#must(this.#value(next).columns === value.columns, name)
    this.#carried = { initial, current: name, next }
    this.#section = 'after'
    return name
  }

  build(harmless: Graph['harmless']): Graph {
    this.#must(this.#section === 'after', 'build')
    const { before, layer, after } = this.#nodes
    return {
      numLayers: this.#numLayers,
      nodes: { before, layer, after },
      values: this.#values,
      weights: this.#weights,
      carried: this.#carried,
      harmless,
    }
  }

  #push(node: Exclude<Node, { op: 'logits' }>, shape: { rows: Rows; columns: number }): string {
    this.#must(!this.#values.has(node.y), node.y)
    this.#nodes[this.#section].push(node)
    this.#values.set(node.y, { name: node.y, rows: shape.rows, columns: shape.columns })
    return node.y
  }

  #value(name: string): Value {
    const value = this.#values.get(name)
    if (value === undefined) throw new TypeError(`graph: value '${name}' is read before it is made`)
    return value
  }

  #useWeight(tensor: string, shape: readonly [number] | readonly [number, number]): void {
    const known = this.#weights.get(tensor)
    this.#must(known === undefined || known.shape.join() === shape.join(), tensor)
    const isPerLayer = this.#section === 'layer'
    this.#must(tensor.includes('{layer}') === isPerLayer, tensor)
    this.#weights.set(tensor, { tensor, shape, isPerLayer })
  }

  #must(condition: boolean, name: string): void {
    if (!condition) throw new TypeError(`graph: shapes or order at '${name}' are not those of a model`)
  }
}
