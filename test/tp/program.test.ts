// Programs of all ranks: that their parts cover each tensor exactly, that they are legal, that they compute the model whatever the
// number of ranks (run in float64 against an independent forward pass and against stored logits), and that mistakes are refused.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

import * as fc from 'fast-check'

import type { ArchSpec, Checkpoint, StoredTensor } from '../../tp/checkpoint/arch.js'
import { openCheckpoint } from '../../tp/checkpoint/index.js'
import { InferenceError } from '../../tp/errors.js'
import { type Line, type Program, checkProgram, compileProgram, describeProgram } from '../../tp/program.js'
import {
  Interpreter,
  type Tensor,
  at,
  largestDifference,
  promptOf,
  randomFrom,
  readTensors,
  reference,
  shapesOf,
  tinyArch,
  tinyCheckpoint,
  tinyTensors,
} from './interpret.js'

const compileAll = (checkpoint: Checkpoint, worldSize: number, shares?: readonly number[]): Program[] =>
  Array.from({ length: worldSize }, (_, rank) =>
    compileProgram(checkpoint, { worldSize, rank, dtype: 'f32', ...(shares === undefined ? {} : { shares }) }),
  )

const refuses = (code: string, ...texts: string[]) => {
  return (error: unknown): boolean => {
    assert.ok(error instanceof InferenceError)
    assert.equal(error.code, code, error.message)
    for (const text of texts) assert.ok(error.message.includes(text), `'${error.message}' does not say '${text}'`)
    return true
  }
}

const anyArch = (limits: {
  readonly heads: number
  readonly width: number
  readonly layers: number
}): fc.Arbitrary<ArchSpec> =>
  fc
    .record({
      numKvHeads: fc.integer({ min: 1, max: limits.heads }),
      groupSize: fc.integer({ min: 1, max: limits.heads }),
      headDim: fc.integer({ min: 1, max: 4 }).map((half) => 2 * half),
      hiddenSize: fc.integer({ min: 1, max: limits.width }),
      intermediateSize: fc.integer({ min: limits.heads, max: 4 * limits.width }),
      vocabSize: fc.integer({ min: limits.heads, max: 4 * limits.width }),
      numLayers: fc.integer({ min: 1, max: limits.layers }),
      attentionBias: fc.boolean(),
      mlpBias: fc.boolean(),
      tiedHead: fc.boolean(),
    })
    .filter(({ numKvHeads, groupSize }) => numKvHeads * groupSize <= limits.heads)
    .map(({ groupSize, ...rest }) => tinyArch({ ...rest, numHeads: rest.numKvHeads * groupSize }))

/** How often each element of a tensor stands on some rank; rectangles are [rows] x [columns]. */
function coverage(programs: readonly Program[], tensor: string, shape: readonly number[]): number[][] {
  const [rows, columns] = [at(shape, 0), shape.length === 1 ? 1 : at(shape, 1)]
  const counts = Array.from({ length: rows }, () => new Array<number>(columns).fill(0))
  for (const { weights } of programs) {
    const parts = weights
      .flatMap((weight) => [...weight.parts, ...(weight.kind === 'linear' ? (weight.bias ?? []) : [])])
      .flat()
    for (const part of parts) {
      if (part.tensor !== tensor) continue
      for (let row = part.rows[0]; row < part.rows[0] + part.rows[1]; row++) {
        for (let column = part.columns[0]; column < part.columns[0] + part.columns[1]; column++) {
          const line = counts[row]
          assert.ok(line !== undefined && column < columns, `${tensor}: [${row}, ${column}] is outside`)
          line[column] = at(line, column) + 1
        }
      }
    }
  }
  return counts
}

describe('compiled programs', () => {
  it('cover every tensor exactly, and hold whole heads, for any configuration and number of ranks', () => {
    fc.assert(
      fc.property(anyArch({ heads: 12, width: 24, layers: 2 }), fc.nat(), (arch, choice) => {
        const worldSize = 1 + (choice % arch.numHeads)
        const programs = compileAll(tinyCheckpoint(arch), worldSize)
        for (const [tensor, shape] of shapesOf(arch)) {
          const counts = new Set(coverage(programs, tensor, shape).flat())
          if (/norm|(o|down)_proj\.bias/.test(tensor))
            assert.deepEqual([...counts], [worldSize], `${tensor} is on every rank`)
          else if (/[kv]_proj/.test(tensor)) assert.ok(!counts.has(0), `${tensor} has a gap`)
          else assert.deepEqual([...counts], [1], `${tensor} is covered once`)
          if (worldSize === 1) assert.deepEqual([...counts], [1])
        }
        const heads = programs.reduce((sum, { numHeads }) => sum + numHeads, 0)
        assert.equal(heads, arch.numHeads)
        for (const { numHeads } of programs) assert.ok(numHeads >= 1)
      }),
      { numRuns: 150 },
    )
  })

  it('stay legal up to 40 heads, and balanced within one head or one group', () => {
    fc.assert(
      fc.property(anyArch({ heads: 40, width: 200, layers: 2 }), fc.nat(), (arch, choice) => {
        const worldSize = 1 + (choice % arch.numHeads)
        const programs = compileAll(tinyCheckpoint(arch), worldSize)
        programs.forEach(checkProgram)
        const counts = programs.map(({ numHeads }) => numHeads)
        const step = worldSize <= arch.numKvHeads ? arch.numHeads / arch.numKvHeads : 1
        assert.ok(Math.max(...counts) - Math.min(...counts) <= step)
      }),
      { numRuns: 150 },
    )
  })

  it('put every query head beside its own KV head: found out by weights filled with head numbers', () => {
    fc.assert(
      fc.property(anyArch({ heads: 40, width: 40, layers: 1 }), fc.nat(), (arch, choice) => {
        const worldSize = 1 + (choice % arch.numHeads)
        const { headDim, numHeads, numKvHeads } = arch
        const seen: number[] = []
        for (const program of compileAll(tinyCheckpoint(arch), worldSize)) {
          // Row r of a packed weight holds the number of the head of the whole model that it came from.
          const rows: string[] = []
          const qkv = program.weights.find(({ name }) => name === 'qkv')
          for (const part of qkv?.parts[0] ?? []) {
            const kind = part.tensor.charAt(part.tensor.indexOf('_proj') - 1)
            for (let row = 0; row < part.rows[1]; row++) {
              rows[part.output + row] = `${kind}${Math.floor((part.rows[0] + row) / headDim)}`
            }
          }
          const head = (index: number): string => {
            const names = new Set(rows.slice(index * headDim, (index + 1) * headDim))
            assert.equal(names.size, 1, `head ${index} is made of ${[...names].join()}`)
            return [...names].join()
          }
          assert.equal(rows.length, (program.numHeads + 2 * program.numKvHeads) * headDim)
          const attention = program.lines.layer.find((line) => line.op === 'attention')
          assert.ok(attention?.op === 'attention')
          for (const { kvHead, firstHead, numHeads: count } of attention.groups) {
            for (let local = firstHead; local < firstHead + count; local++) {
              const query = Number(head(local).slice(1))
              const expected = Math.floor(query / (numHeads / numKvHeads))
              assert.equal(head(local), `q${query}`)
              assert.equal(head(program.numHeads + kvHead), `k${expected}`)
              assert.equal(head(program.numHeads + program.numKvHeads + kvHead), `v${expected}`)
              seen.push(query)
            }
          }
        }
        assert.deepEqual(
          seen,
          Array.from({ length: numHeads }, (_, index) => index),
        )
      }),
      { numRuns: 100 },
    )
  })

  it('compute the model: logits of any number of ranks are those of one, and of a plain forward pass', () => {
    let mostRanks = 0
    fc.assert(
      fc.property(anyArch({ heads: 8, width: 20, layers: 2 }), fc.nat(), (arch, seed) => {
        const tensors = tinyTensors(arch, seed)
        const random = randomFrom(seed + 1)
        const ids = Array.from({ length: 4 }, () => Math.floor(random() * arch.vocabSize))
        const expected = reference(arch, tensors, ids)
        const checkpoint = tinyCheckpoint(arch)
        for (const worldSize of new Set([1, 2, 1 + (seed % arch.numHeads), arch.numHeads])) {
          if (worldSize > arch.numHeads) continue
          mostRanks = Math.max(mostRanks, worldSize)
          const [logits] = new Interpreter(compileAll(checkpoint, worldSize), tensors, arch.rope.theta).step(
            promptOf(ids),
          )
          assert.ok(logits !== undefined && largestDifference(logits, expected) < 1e-9, `${worldSize} ranks`)
        }
      }),
      { numRuns: 40 },
    )
    assert.ok(mostRanks >= 4)
  })

  it('compute the same for mixed steps: two sequences, a prompt in two chunks, then one token', () => {
    const arch = tinyArch({
      numHeads: 7,
      numKvHeads: 1,
      headDim: 4,
      hiddenSize: 18,
      intermediateSize: 45,
      vocabSize: 50,
      numLayers: 2,
    })
    const tensors = tinyTensors(arch, 5)
    const run = new Interpreter(compileAll(tinyCheckpoint(arch), 3), tensors, arch.rope.theta)
    const [a, b] = [
      [3, 1, 4, 1, 5],
      [9, 2, 6],
    ]
    const token = (sequence: number, ids: readonly number[], position: number, wantsLogits: boolean) => ({
      sequence,
      position,
      id: at(ids, position),
      wantsLogits,
    })
    run.step([token(0, a, 0, false), token(1, b, 0, false), token(0, a, 1, false)])
    const [middle] = run.step([token(1, b, 1, false), token(0, a, 2, true), token(0, a, 3, false)])
    const [lastB, lastA] = run.step([token(1, b, 2, true), token(0, a, 4, true)])
    assert.ok(middle !== undefined && lastA !== undefined && lastB !== undefined)
    assert.ok(largestDifference(middle, reference(arch, tensors, a.slice(0, 3))) < 1e-9)
    assert.ok(largestDifference(lastA, reference(arch, tensors, a)) < 1e-9)
    assert.ok(largestDifference(lastB, reference(arch, tensors, b)) < 1e-9)
  })

  it('follow unequal shares without changing the result', () => {
    const arch = tinyArch({
      numHeads: 8,
      numKvHeads: 2,
      headDim: 4,
      hiddenSize: 20,
      intermediateSize: 77,
      vocabSize: 90,
      numLayers: 2,
    })
    const tensors = tinyTensors(arch, 6)
    const programs = compileAll(tinyCheckpoint(arch), 3, [5, 1, 2])
    assert.deepEqual(
      programs.map(({ numHeads }) => numHeads),
      [5, 1, 2],
    )
    const [logits] = new Interpreter(programs, tensors, arch.rope.theta).step(promptOf([7, 8, 9]))
    assert.ok(logits !== undefined && largestDifference(logits, reference(arch, tensors, [7, 8, 9])) < 1e-9)
  })

  it('add each bias once: zero weights and distinct biases give the same logits at every number of ranks', () => {
    const arch = tinyArch({
      numHeads: 6,
      numKvHeads: 3,
      headDim: 4,
      hiddenSize: 20,
      intermediateSize: 40,
      vocabSize: 60,
      numLayers: 2,
      attentionBias: true,
      mlpBias: true,
    })
    const tensors = new Map<string, Tensor>()
    let salt = 0
    for (const [name, { shape, data }] of tinyTensors(arch, 7)) {
      salt++
      const isKept = name.endsWith('.bias') || name.includes('norm') || name.startsWith('lm_head')
      tensors.set(name, { shape, data: isKept ? data.map((_, index) => salt / 7 + index / 100) : data.map(() => 0) })
    }
    const expected = reference(arch, tensors, [1, 2])
    assert.ok(new Set(expected).size > 1, 'the logits tell something')
    for (let worldSize = 1; worldSize <= 6; worldSize++) {
      const [logits] = new Interpreter(compileAll(tinyCheckpoint(arch), worldSize), tensors, 10000).step(
        promptOf([1, 2]),
      )
      assert.ok(logits !== undefined && largestDifference(logits, expected) < 1e-9, `${worldSize} ranks`)
    }
  })

  it('are the lines that a Llama layer should be', () => {
    const arch = tinyArch({
      numHeads: 4,
      numKvHeads: 2,
      headDim: 4,
      hiddenSize: 16,
      intermediateSize: 40,
      vocabSize: 64,
      numLayers: 3,
    })
    const program = compileProgram(tinyCheckpoint(arch), { worldSize: 2, rank: 1, dtype: 'bf16' })
    const short = (line: Line): string =>
      [
        line.op,
        ...Object.entries(line).flatMap(([key, value]) =>
          ['weight', 'x', 'y', 'gamma'].includes(key) ? [String(value)] : [],
        ),
      ].join(' ')
    assert.deepEqual(program.lines.before.map(short), ['embed embed', 'allReduceResidualNorm inputNorm x'])
    assert.deepEqual(program.lines.layer.map(short), [
      'linear qkv x qkv',
      'ropeKvWrite',
      'attention',
      'linear o attn slot',
      'allReduceResidualNorm postNorm x',
      'linear gateUp x mlp',
      'linear down mlp slot',
      'allReduceResidualNorm inputNorm x',
    ])
    assert.deepEqual(program.lines.after.map(short), [
      'selectRows x headInput',
      'linear head headInput logits',
      'logits logits',
    ])
    const norm = program.weights.find(({ name }) => name === 'inputNorm')
    assert.deepEqual(
      norm?.parts.map(([part]) => part?.tensor),
      [0, 1, 2].map((layer) => `model.layers.${layer}.input_layernorm.weight`).concat('model.norm.weight'),
    )
    assert.equal(
      program.weights.find(({ name }) => name === 'gateUp')?.n,
      64,
      'two halves of 24 true outputs, in whole panels',
    )
    assert.deepEqual(
      program.buffers.map(({ name, dtype, rows, columns }) => `${name} ${dtype} ${rows} ${columns}`),
      [
        'x bf16 tokens 16',
        'qkv bf16 tokens 16',
        'attn bf16 tokens 8',
        'mlp bf16 tokens 24',
        'headInput bf16 logitRows 16',
        'logits f32 logitRows 32',
      ],
    )
    assert.deepEqual(JSON.parse(JSON.stringify(program)), program, 'a Program is plain data')
  })

  it('use one packed table for a tied head', () => {
    const arch = tinyArch({
      numHeads: 2,
      numKvHeads: 1,
      headDim: 4,
      hiddenSize: 16,
      intermediateSize: 32,
      vocabSize: 64,
      numLayers: 1,
      tiedHead: true,
    })
    const { weights, lines } = compileProgram(tinyCheckpoint(arch), { worldSize: 2, rank: 0, dtype: 'f32' })
    const head = lines.after.find((line) => line.op === 'linear')
    assert.ok(head?.op === 'linear')
    assert.equal(head.weight, 'embed')
    assert.equal(
      weights.filter(({ parts }) => parts.flat().some(({ tensor }) => tensor === 'model.embed_tokens.weight')).length,
      1,
    )
  })

  it('read as text, with every weight, buffer and line', () => {
    const arch = tinyArch({
      numHeads: 4,
      numKvHeads: 2,
      headDim: 4,
      hiddenSize: 16,
      intermediateSize: 40,
      vocabSize: 64,
      numLayers: 3,
    })
    const program = compileProgram(tinyCheckpoint(arch), { worldSize: 2, rank: 1, dtype: 'bf16' })
    const text = describeProgram(program)
    for (const { name } of [...program.weights, ...program.buffers]) assert.ok(text.includes(`  ${name} `), name)
    const lines = Object.values(program.lines).reduce((sum, section) => sum + section.length, 0)
    assert.equal(text.split('\n').length, 1 + 1 + program.buffers.length + 1 + program.weights.length + 11 + 3 + lines)
    assert.match(text, /16\.\.19 of up|0\.\.23 of up <- model\.layers\.0\.mlp\.up_proj\.weight\[16\.\.39, 0\.\.15\]/)
  })
})

describe('compiled programs of stored checkpoints', () => {
  const models = fileURLToPath(new URL('../../../test/models/', import.meta.url))
  for (const model of ['llama', 'llama-gqa-odd']) {
    it(`give the stored logits of ${model} on 1 to 4 ranks`, async () => {
      const checkpoint = await openCheckpoint(`${models}${model}`)
      const tensors = readTensors(checkpoint)
      const golden = parseGolden(JSON.parse(readFileSync(`${models}${model}/golden.json`, 'utf8')))
      assert.ok(golden.length >= 2)
      for (let worldSize = 1; worldSize <= 4; worldSize++) {
        const run = new Interpreter(compileAll(checkpoint, worldSize), tensors, checkpoint.arch.rope.theta)
        golden.forEach(({ ids, logits: expected }, sequence) => {
          const [logits] = run.step(promptOf(ids, sequence))
          const difference = logits === undefined ? Infinity : largestDifference(logits, expected)
          assert.ok(difference <= 5e-4, `prompt ${sequence} on ${worldSize} ranks is off by ${difference}`)
        })
      }
    })
  }
})

function parseGolden(value: unknown): { ids: number[]; logits: Float64Array }[] {
  assert.ok(typeof value === 'object' && value !== null && 'prompts' in value && Array.isArray(value.prompts))
  return value.prompts.map((prompt: { ids: number[]; last_logits: { f32: string } }) => {
    const bytes = Buffer.from(prompt.last_logits.f32, 'base64')
    return {
      ids: prompt.ids,
      logits: Float64Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index)),
    }
  })
}

describe('compileProgram refuses', () => {
  const arch = tinyArch({
    numHeads: 4,
    numKvHeads: 2,
    headDim: 4,
    hiddenSize: 16,
    intermediateSize: 40,
    vocabSize: 64,
    numLayers: 2,
  })
  const compile = (
    shapes: Map<string, readonly number[]>,
    changes: { worldSize?: number; rank?: number } = {},
  ): Program => compileProgram(tinyCheckpoint(arch, shapes), { worldSize: 2, rank: 0, dtype: 'f32', ...changes })

  it('a tensor that nothing uses, naming it, but takes known harmless buffers', () => {
    const shapes = shapesOf(arch)
    shapes.set('model.layers.1.self_attn.rotary_emb.inv_freq', [2])
    compile(shapes)
    shapes.set('model.layers.1.self_attn.q_norm.weight', [4])
    assert.throws(
      () => compile(shapes),
      refuses('ERR_UNCOVERED_WEIGHT', 'model.layers.1.self_attn.q_norm.weight', '[4]'),
    )
  })

  it('weights in a dtype that none can be made from, but takes integer buffers that nothing uses', () => {
    const name = 'model.layers.0.self_attn.q_proj.weight'
    const stored = (tensor: string, dtype: string, shape: number[]) =>
      [tensor, { name: tensor, dtype, shape, file: '', byteOffset: 0, nbytes: 0 }] as const
    const withOthers = (
      shapes: Map<string, readonly number[]>,
      ...others: (readonly [string, StoredTensor])[]
    ): Program => {
      const checkpoint = { ...tinyCheckpoint(arch, shapes), otherTensors: new Map(others) }
      return compileProgram(checkpoint, { worldSize: 2, rank: 0, dtype: 'f32' })
    }
    withOthers(shapesOf(arch), stored('model.position_ids', 'I64', [64]), stored('model.mask', 'BOOL', [8, 8]))
    assert.throws(
      () => withOthers(shapesOf(arch), stored('model.scales', 'F8_E4M3', [8])),
      refuses('ERR_UNCOVERED_WEIGHT', 'model.scales'),
    )
    const shapes = shapesOf(arch)
    shapes.delete(name)
    assert.throws(
      () => withOthers(shapes, stored(name, 'F8_E4M3', [16, 16])),
      refuses('ERR_UNSUPPORTED_MODEL', name, 'F8_E4M3', 'convert'),
    )
  })

  it('layers that the configuration does not count', () => {
    const shapes = shapesOf({ ...arch, numLayers: 3 })
    assert.throws(() => compile(shapes), refuses('ERR_UNCOVERED_WEIGHT', 'model.layers.2.'))
  })

  it('a missing tensor, naming it and its shape', () => {
    for (const name of shapesOf(arch).keys()) {
      const shapes = shapesOf(arch)
      shapes.delete(name)
      assert.throws(() => compile(shapes), refuses('ERR_SHAPE_MISMATCH', name, 'has none of that name'))
    }
  })

  it('a shape that the configuration does not imply, naming both', () => {
    for (const [name, shape] of shapesOf(arch)) {
      for (const wrong of [[...shape, 1], shape.map((size) => size + 1), []]) {
        const shapes = shapesOf(arch)
        shapes.set(name, wrong)
        assert.throws(
          () => compile(shapes),
          refuses('ERR_SHAPE_MISMATCH', name, `[${shape.join(', ')}]`, `[${wrong.join(', ')}]`),
        )
      }
    }
  })

  it('a dtype that has no kernels', () => {
    const options = { worldSize: 1, rank: 0, dtype: 'int8' as 'f32' }
    assert.throws(() => compileProgram(tinyCheckpoint(arch), options), refuses('ERR_INVALID_OPTION', '"int8"'))
  })

  it('ranks that are none of the world, and worlds that are none', () => {
    for (const rank of [-1, 2, 0.5, Number.NaN])
      assert.throws(() => compile(shapesOf(arch), { rank }), refuses('ERR_INVALID_OPTION'))
    assert.throws(() => compile(shapesOf(arch), { worldSize: 0 }), refuses('ERR_INVALID_OPTION', 'worldSize'))
    assert.throws(
      () => compile(shapesOf(arch), { worldSize: 5 }),
      refuses('ERR_TP_TOO_LARGE', '5 ranks', '4 query heads'),
    )
  })
})

describe('checkProgram refuses', () => {
  const arch = tinyArch({
    numHeads: 4,
    numKvHeads: 2,
    headDim: 4,
    hiddenSize: 16,
    intermediateSize: 40,
    vocabSize: 64,
    numLayers: 2,
  })
  const good = compileProgram(tinyCheckpoint(arch), { worldSize: 2, rank: 0, dtype: 'f32' })
  const withLayer = (change: (lines: Line[]) => Line[]): Program => ({
    ...good,
    lines: { ...good.lines, layer: change([...good.lines.layer]) },
  })
  const without = (op: Line['op']): Program => withLayer((lines) => lines.filter((line) => line.op !== op))
  const changed = (op: Line['op'], change: Partial<Record<string, unknown>>): Program =>
    withLayer((lines) => lines.map((line) => (line.op === op ? { ...line, ...change } : line)))

  const cases: readonly (readonly [what: string, program: Program, ...texts: string[]])[] = [
    ['partial sums over partial sums', without('allReduceResidualNorm'), 'not reduced yet'],
    [
      'a reduce of nothing',
      { ...good, lines: { ...good.lines, before: good.lines.before.slice(1) } },
      'no partial sums',
    ],
    ['attention without rotated keys in the cache', without('ropeKvWrite'), 'not rotated'],
    ['a buffer that is not written', without('attention'), "'attn' is read before it is written"],
    ['a buffer that does not exist', changed('attention', { out: 'nowhere' }), "no buffer 'nowhere'"],
    ['a gap in the heads', changed('attention', { groups: [{ kvHead: 0, firstHead: 1, numHeads: 1 }] }), 'gap'],
    [
      'heads left out',
      changed('attention', { groups: [{ kvHead: 0, firstHead: 0, numHeads: 1 }] }),
      '1 of 2 query heads',
    ],
    [
      'a KV head of another rank',
      changed('attention', { groups: [{ kvHead: 1, firstHead: 0, numHeads: 2 }] }),
      'KV head 1',
    ],
    ['a scale that is no number', changed('attention', { scale: Number.NaN }), 'scale'],
    ['a norm beyond the stack', changed('allReduceResidualNorm', { gamma: 'inputNorm', gammaLayer: 2 }), 'no entry 3'],
    ['a vector in the place of a matrix', changed('linear', { weight: 'postNorm' }), "no linear weight 'postNorm'"],
    ['plain outputs of gate and up', changed('linear', { activation: 'none' }), 'siluMul'],
    [
      'cache lines outside the layers',
      { ...good, lines: { ...good.lines, after: [...good.lines.layer.slice(1, 2), ...good.lines.after] } },
      'KV blocks',
    ],
    ['a program without logits', { ...good, lines: { ...good.lines, after: good.lines.after.slice(0, -1) } }, 'logits'],
    ['two buffers of one name', { ...good, buffers: [...good.buffers, ...good.buffers.slice(0, 1)] }, 'twice'],
    [
      'a buffer of another width',
      { ...good, buffers: good.buffers.map((b) => (b.name === 'mlp' ? { ...b, columns: 17 } : b)) },
      "'mlp'",
    ],
    ['layers without weights', { ...good, numLayers: 3 }, 'layers'],
    [
      'weights with a gap',
      {
        ...good,
        weights: good.weights.map((w) => (w.name === 'qkv' ? { ...w, parts: w.parts.map((p) => p.slice(1)) } : w)),
      },
      'starts at output',
    ],
    [
      'other ids to look up than to score',
      {
        ...good,
        lines: {
          ...good.lines,
          before: good.lines.before.map((line) => (line.op === 'embed' ? { ...line, vocabStart: 16 } : line)),
        },
      },
      'different ranges of the vocabulary',
    ],
    ['a world without the rank', { ...good, rank: 2 }, 'rank is 2 of 2'],
    ['an odd rotation', { ...good, rotaryDims: 3 }, 'rotaryDims'],
  ]
  it('nothing of a good program', () => {
    checkProgram(good)
  })
  for (const [what, program, ...texts] of cases) {
    it(what, () => {
      assert.throws(() => checkProgram(program), refuses('ERR_INTERNAL', ...texts))
    })
  }
})
