// The algebra alone: what splits and placements it gives, that they tile, and that it refuses what it cannot place.

import assert from 'node:assert/strict'

import * as fc from 'fast-check'

import { type Split, apportion, shard, splitHeads } from '../../tp/autotp.js'
import type { ArchSpec } from '../../tp/checkpoint/arch.js'
import { InferenceError } from '../../tp/errors.js'
import { fuse } from '../../tp/fuse.js'
import { type Graph, GraphBuilder } from '../../tp/graph.js'
import { buildGraph } from '../../tp/models/index.js'
import { at, tinyArch } from './interpret.js'

const even = (worldSize: number): number[] => new Array<number>(worldSize).fill(1)

const hasCode =
  (code: string, ...texts: string[]) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof InferenceError)
    assert.equal(error.code, code)
    for (const text of texts) assert.ok(error.message.includes(text), `'${error.message}' does not say '${text}'`)
    return true
  }

const llama = (changes: Partial<ArchSpec> = {}): Graph =>
  buildGraph({
    ...tinyArch({
      numHeads: 8,
      numKvHeads: 4,
      headDim: 4,
      hiddenSize: 24,
      intermediateSize: 100,
      vocabSize: 120,
      numLayers: 2,
      attentionBias: true,
      mlpBias: true,
    }),
    ...changes,
  })

/** A graph of one layer whose block is `body`; the head and the carried norms are as usual. */
function graphOf(body: (g: GraphBuilder, input: string) => string): Graph {
  const g = new GraphBuilder()
  const stream = g.repeat('stream', 2, g.embedding('embed', 'table', 64, 32), (input) => body(g, input))
  g.logits(
    g.linear('head', g.selectRows('rows', g.rmsNorm('last', stream, 'lastNorm', 0)), { weight: 'out', outputs: 64 }),
  )
  return g.build([])
}

describe('apportion', () => {
  it('gives every unit to a rank, in proportion to within less than one unit', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 500 }),
        fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1, maxLength: 20 }),
        (units, shares) => {
          const counts = apportion(units, shares, 'low')
          assert.equal(counts.length, shares.length)
          assert.equal(
            counts.reduce((sum, count) => sum + count, 0),
            units,
          )
          const total = shares.reduce((sum, share) => sum + share, 0)
          counts.forEach((count, rank) => {
            const ideal = (units * at(shares, rank)) / total
            assert.ok(Math.abs(count - ideal) < 1, `${count} for ${ideal}`)
          })
        },
      ),
    )
  })

  it('gives what is left over to the low or to the high ranks, as asked', () => {
    assert.deepEqual(apportion(10, even(4), 'low'), [3, 3, 2, 2])
    assert.deepEqual(apportion(10, even(4), 'high'), [2, 2, 3, 3])
    assert.deepEqual(apportion(10, [3, 1, 1], 'low'), [6, 2, 2])
  })
})

describe('splitting heads', () => {
  const ranges = (numHeads: number, numKvHeads: number, worldSize: number): number[][] =>
    splitHeads(numHeads, numKvHeads, even(worldSize)).map((r) => [r.firstHead, r.numHeads, r.firstKvHead, r.numKvHeads])

  it('gives whole groups while there is one for every rank', () => {
    assert.deepEqual(ranges(32, 4, 2), [
      [0, 16, 0, 2],
      [16, 16, 2, 2],
    ])
    assert.deepEqual(ranges(6, 6, 4), [
      [0, 2, 0, 2],
      [2, 2, 2, 2],
      [4, 1, 4, 1],
      [5, 1, 5, 1],
    ])
  })

  it('cuts 71 heads with one KV head into 36 and 35, with the KV head on both ranks', () => {
    assert.deepEqual(ranges(71, 1, 2), [
      [0, 36, 0, 1],
      [36, 35, 0, 1],
    ])
  })

  it('cuts groups when ranks outnumber KV heads, and keeps the KV heads that each range reads', () => {
    assert.deepEqual(ranges(9, 3, 4), [
      [0, 3, 0, 1],
      [3, 2, 1, 1],
      [5, 2, 1, 2],
      [7, 2, 2, 1],
    ])
  })

  it('cuts groups when a rank of small share would be left without one', () => {
    const [large, small] = splitHeads(8, 2, [7, 1])
    assert.deepEqual(large, { firstHead: 0, numHeads: 7, firstKvHead: 0, numKvHeads: 2 })
    assert.deepEqual(small, { firstHead: 7, numHeads: 1, firstKvHead: 1, numKvHeads: 1 })
  })

  it('refuses more ranks than heads and names both', () => {
    assert.throws(() => splitHeads(4, 2, even(5)), hasCode('ERR_TP_TOO_LARGE', '5 ranks', '4 query heads'))
  })
})

describe('placements of Llama', () => {
  const splitOf = (graph: Graph, worldSize: number, tensor: string, shares?: readonly number[]): Split => {
    const rule = shard(graph, worldSize, shares === undefined ? {} : { shares }).weights.get(tensor)
    assert.ok(rule?.placement.kind === 'sharded', `${tensor} is sharded`)
    return rule.placement.split
  }

  it('are derived with a rule and a reason for every weight', () => {
    const { weights } = shard(llama(), 2)
    const rules = Object.fromEntries(
      [...weights.values()].map(({ tensor, rule }) => [tensor.replace('model.layers.{layer}.', ''), rule]),
    )
    assert.deepEqual(rules, {
      'model.embed_tokens.weight': 'vocabulary-split',
      'input_layernorm.weight': 'replicated',
      'self_attn.q_proj.weight': 'column-parallel',
      'self_attn.q_proj.bias': 'column-parallel',
      'self_attn.k_proj.weight': 'column-parallel',
      'self_attn.k_proj.bias': 'column-parallel',
      'self_attn.v_proj.weight': 'column-parallel',
      'self_attn.v_proj.bias': 'column-parallel',
      'self_attn.o_proj.weight': 'row-parallel',
      'self_attn.o_proj.bias': 'added after the reduce',
      'post_attention_layernorm.weight': 'replicated',
      'mlp.gate_proj.weight': 'column-parallel',
      'mlp.gate_proj.bias': 'column-parallel',
      'mlp.up_proj.weight': 'column-parallel',
      'mlp.up_proj.bias': 'column-parallel',
      'mlp.down_proj.weight': 'row-parallel',
      'mlp.down_proj.bias': 'added after the reduce',
      'model.norm.weight': 'replicated',
      'lm_head.weight': 'vocabulary-split',
    })
    for (const { tensor, why } of weights.values()) assert.ok(why.length > 10, `${tensor} has no reason`)
    assert.match(
      weights.get('model.layers.{layer}.self_attn.q_proj.weight')?.why ?? '',
      /^input 'inputNorm' is replicated, output consumed by 'attn' per head$/,
    )
  })

  it('need one reduce before the layers and two in each, with residual and bias added after it', () => {
    const { nodes } = shard(llama(), 3)
    const reduces = (section: keyof typeof nodes) =>
      nodes[section].flatMap((node) => (node.op === 'allReduce' ? [node] : []))
    assert.equal(reduces('before').length, 1)
    assert.equal(reduces('after').length, 0)
    assert.deepEqual(
      reduces('layer').map(({ source, addends, biases }) => ({ source, addends, biases })),
      [
        { source: 'o', addends: ['stream'], biases: ['model.layers.{layer}.self_attn.o_proj.bias'] },
        { source: 'down', addends: ['middle.reduced'], biases: ['model.layers.{layer}.mlp.down_proj.bias'] },
      ],
    )
    assert.ok(nodes.layer.every((node) => node.op !== 'add'))
  })

  it('cut features into grains of 64, 32 or 16 by size, with the tail on the last rank', () => {
    const widths = (intermediateSize: number, worldSize: number): number[] =>
      splitOf(llama({ intermediateSize }), worldSize, 'model.layers.{layer}.mlp.down_proj.weight').segments.map(
        (segments) => segments[0]?.[1] ?? 0,
      )
    assert.deepEqual(widths(5632, 2), [2816, 2816])
    assert.deepEqual(widths(11008, 3), [57 * 64, 57 * 64, 58 * 64])
    assert.deepEqual(widths(1100, 2), [544, 556])
    assert.deepEqual(widths(190, 4), [48, 48, 48, 46])
    assert.deepEqual(widths(7, 4), [1, 2, 2, 2])
  })

  it('cut the vocabulary of 263 into panels of 16, embedding and head alike', () => {
    const graph = llama({ vocabSize: 263 })
    const expected = [[[0, 64]], [[64, 64]], [[128, 64]], [[192, 71]]]
    assert.deepEqual(splitOf(graph, 4, 'model.embed_tokens.weight').segments, expected)
    assert.deepEqual(splitOf(graph, 4, 'lm_head.weight').segments, expected)
  })

  it('store a tied table once, and give it both reasons', () => {
    const { weights } = shard(llama({ tiedHead: true }), 2)
    assert.equal(weights.has('lm_head.weight'), false)
    assert.match(
      weights.get('model.embed_tokens.weight')?.why ?? '',
      /looks up its own rows, .*; also .*choice of tokens/,
    )
  })

  it('follow unequal shares', () => {
    const graph = llama({ intermediateSize: 1024 })
    const { segments } = splitOf(graph, 2, 'model.layers.{layer}.mlp.up_proj.weight', [3, 1])
    assert.deepEqual(segments, [[[0, 768]], [[768, 256]]])
  })

  it('refuse impossible ranks and shares', () => {
    assert.throws(() => shard(llama(), 9), hasCode('ERR_TP_TOO_LARGE', '9 ranks', '8 query heads'))
    assert.throws(() => shard(llama({ intermediateSize: 3 }), 4), hasCode('ERR_TP_TOO_LARGE', 'width of 3', '4 ranks'))
    assert.throws(() => shard(llama({ vocabSize: 3 }), 4), hasCode('ERR_TP_TOO_LARGE', 'vocabulary of 3'))
    for (const worldSize of [0, -1, 1.5, Number.NaN])
      assert.throws(() => shard(llama(), worldSize), hasCode('ERR_INVALID_OPTION'))
    for (const shares of [[1], [1, 0], [1, -1], [1, Number.NaN], [1, Infinity], [1, 1, 1]]) {
      assert.throws(() => shard(llama(), 2, { shares }), hasCode('ERR_INVALID_OPTION', 'one per rank'))
    }
  })
})

describe('the algebra on other graphs', () => {
  const linear = (g: GraphBuilder, name: string, x: string, outputs: number): string =>
    g.linear(name, x, { weight: `{layer}.${name}`, outputs, bias: `{layer}.${name}Bias` })
  const norm = (g: GraphBuilder, name: string, x: string): string => g.rmsNorm(name, x, `{layer}.${name}`, 0)

  it('needs one reduce for parallel blocks, in whatever order they are added', () => {
    const orders: ((g: GraphBuilder, input: string, a: string, b: string) => string)[] = [
      (g, input, a, b) => g.add('sum', g.add('both', a, b), input),
      (g, input, a, b) => g.add('sum', b, g.add('both', input, a)),
    ]
    for (const order of orders) {
      const sharded = shard(
        graphOf((g, input) => {
          const x = norm(g, 'norm', input)
          const branch = (name: string): string => linear(g, `${name}Down`, linear(g, `${name}Up`, x, 128), 32)
          return order(g, input, branch('a'), branch('b'))
        }),
        2,
      )
      const reduces = sharded.nodes.layer.filter((node) => node.op === 'allReduce')
      assert.equal(reduces.length, 1)
      const [reduce] = reduces
      assert.ok(reduce?.op === 'allReduce')
      assert.deepEqual(reduce.addends, ['stream'])
      assert.deepEqual([...reduce.biases].sort(), ['{layer}.aDownBias', '{layer}.bDownBias'])
    }
  })

  it('alternates column- and row-parallel along a chain of linears', () => {
    const { weights } = shard(
      graphOf((g, input) => {
        const up = linear(g, 'up', norm(g, 'norm', input), 128)
        return g.add('sum', input, linear(g, 'down', up, 32))
      }),
      4,
    )
    assert.equal(weights.get('{layer}.up')?.rule, 'column-parallel')
    assert.equal(weights.get('{layer}.down')?.rule, 'row-parallel')
  })

  it('keeps a linear whole where a norm reads its output, and says so', () => {
    const { weights } = shard(
      graphOf((g, input) => {
        const latent = norm(g, 'latentNorm', linear(g, 'latent', norm(g, 'norm', input), 20))
        return g.add('sum', input, linear(g, 'back', linear(g, 'wide', latent, 96), 32))
      }),
      2,
    )
    assert.equal(weights.get('{layer}.latent')?.rule, 'replicated')
    assert.match(weights.get('{layer}.latent')?.why ?? '', /'latentNorm', which needs whole rows/)
    assert.equal(weights.get('{layer}.latentBias')?.rule, 'replicated')
    assert.equal(weights.get('{layer}.back')?.rule, 'row-parallel')
  })

  it('reduces a value once, also when several operations need it whole', () => {
    const { nodes } = shard(
      graphOf((g, input) => {
        const middle = g.add('middle', input, linear(g, 'down', linear(g, 'up', norm(g, 'norm', input), 64), 32))
        const [a, b] = [norm(g, 'normA', middle), norm(g, 'normB', middle)]
        return g.add('sum', middle, g.add('branches', a, b))
      }),
      2,
    )
    const reduces = nodes.layer.filter((node) => node.op === 'allReduce')
    assert.deepEqual(
      reduces.map((node) => node.name),
      ['middle.reduced'],
    )
  })

  it('refuses to multiply gate and up that are cut differently', () => {
    const graph = graphOf((g, input) => {
      const x = norm(g, 'norm', input)
      const whole = linear(g, 'gate', x, 32)
      norm(g, 'reader', whole)
      return g.add('sum', input, linear(g, 'down', g.siluMul('product', whole, linear(g, 'up', x, 32)), 32))
    })
    assert.throws(() => shard(graph, 2), hasCode('ERR_INTERNAL', "'product'", 'placed alike', 'replicated and sharded'))
  })

  it('refuses to fuse what no kernel takes, naming it', () => {
    const graph = graphOf((g, input) =>
      g.add('sum', input, linear(g, 'down', linear(g, 'up', norm(g, 'norm', input), 64), 32)),
    )
    assert.throws(() => fuse(shard(graph, 2)), hasCode('ERR_INTERNAL', "0 operations 'attention'"))
  })

  it('refuses builders whose shapes disagree', () => {
    assert.throws(() => graphOf((g, input) => g.add('sum', input, linear(g, 'up', input, 31))), TypeError)
    assert.throws(() => graphOf((g, input) => g.add('sum', input, 'nothing')), TypeError)
    assert.throws(() => graphOf((g, input) => g.rmsNorm('norm', input, 'shared', 0)), TypeError)
  })
})
