// Plans: byte counts against sums done by hand, conservation of what is read, the table's width, the command, and misuse.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { fileURLToPath, pathToFileURL } from 'node:url'

import * as fc from 'fast-check'

import { isSupportedPlatform } from '../../native/index.js'
import { inventCheckpoint, openCheckpoint } from '../../tp/checkpoint/index.js'
import { InferenceError } from '../../tp/errors.js'
import { formatPlan, planModel, slotBytes } from '../../tp/plan.js'
import { compileProgram } from '../../tp/program.js'
import { Rank } from '../../tp/rank.js'
import { runnerSlotBytes } from '../../tp/runner.js'
import { at, shapesOf, tinyArch, tinyCheckpoint } from './interpret.js'

const root = fileURLToPath(new URL('../../../', import.meta.url))
const widest = (text: string): number => Math.max(...text.split('\n').map((line) => line.length))

describe('a plan', () => {
  const tinyllama = inventCheckpoint('tinyllama-1.1b')

  it('counts the packed weights of TinyLlama on two ranks as they are by hand', () => {
    const plan = planModel(tinyllama, { worldSize: 2, dtype: 'bf16' })
    const tile = 1024
    // Panels of 16 outputs times tiles of 32 inputs; heads 16 + 2 + 2 of 64 wide, 2816 of 5632 features, 16000 of 32000 tokens.
    const layer = (80 * 64 + 128 * 32 + 352 * 64 + 128 * 88) * tile
    const expected = 22 * layer + 2 * 1000 * 64 * tile + (23 + 22) * 2048 * 4
    assert.deepEqual(
      plan.ranks.map(({ weightBytes }) => weightBytes),
      [expected, expected],
    )
    assert.deepEqual(
      plan.ranks.map(({ heads, kvHeads, vocabulary }) => ({ heads, kvHeads, vocabulary })),
      [
        { heads: [0, 16], kvHeads: [0, 2], vocabulary: [0, 16000] },
        { heads: [16, 16], kvHeads: [2, 2], vocabulary: [16000, 16000] },
      ],
    )
    assert.equal(plan.model.parameters, 1_100_048_384)
    // K and V, bf16, 22 layers, 2 heads of 64 on each rank, 4096 tokens.
    assert.equal(plan.ranks[0]?.kvBytes, 2 * 2 * 22 * 2 * 64 * 4096)
    assert.deepEqual(plan.allReducesPerStep, { count: 45, bytes: 45 * 2048 * 2 })
    assert.equal(plan.total.weightBytes, 2 * expected)
  })

  it('counts the padding of an odd model, and its biases', () => {
    const arch = tinyArch({
      numHeads: 3,
      numKvHeads: 1,
      headDim: 6,
      hiddenSize: 33,
      intermediateSize: 17,
      vocabSize: 35,
      numLayers: 2,
      attentionBias: true,
    })
    const plan = planModel(tinyCheckpoint(arch), { worldSize: 1, dtype: 'f32', maxTokens: 33, batch: 2 })
    const page = 4096
    // f32 tiles take 16 inputs. qkv: 30 outputs, 33 inputs -> 2 panels x 3 tiles; o: 3 x 2; gate and up: 4 x 3; down: 3 x 2.
    // Each starts on a page of 4 tiles; biases and norms take a page each.
    const pages = (tiles: number): number => Math.ceil(tiles / 4) * page
    const layer = pages(6) + page + pages(6) + page + pages(12) + pages(6) + page
    const [rank] = plan.ranks
    assert.ok(rank !== undefined)
    assert.equal(rank.weightBytes, 2 * layer + 2 * pages(9) + 3 * page)
    // 33 tokens take two blocks of 32, and there are two sequences.
    assert.equal(rank.kvBytes, 2 * (2 * 2) * (2 * 32 * 6 * 4))
    assert.deepEqual(plan.collectives, [])
  })

  it('grows the KV cache with batch and length, and nothing that has no tokens in it', () => {
    const [small, large] = [
      { batch: 1, maxTokens: 512 },
      { batch: 3, maxTokens: 1024 },
    ].map((size) => planModel(tinyllama, { worldSize: 2, dtype: 'bf16', ...size }))
    assert.ok(small !== undefined && large !== undefined)
    assert.equal(large.total.kvBytes, 6 * small.total.kvBytes)
    assert.equal(large.total.weightBytes, small.total.weightBytes)
    assert.equal(large.allReducesPerStep.count, small.allReducesPerStep.count)
    assert.equal(large.allReducesPerStep.bytes, 3 * small.allReducesPerStep.bytes)
  })

  it('has every rank read its part, and all ranks the whole: no byte is lost, and only what is on every rank is read again', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 8 }),
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 8, max: 90 }),
        fc.boolean(),
        fc.nat(),
        (numKvHeads, groupSize, size, mlpBias, choice) => {
          const arch = tinyArch({
            numKvHeads,
            numHeads: numKvHeads * groupSize,
            headDim: 4,
            hiddenSize: size,
            intermediateSize: 2 * size + 1,
            vocabSize: size + 3,
            numLayers: 2,
            mlpBias,
          })
          const checkpoint = tinyCheckpoint(arch)
          const worldSize = 1 + (choice % numKvHeads)
          const plan = planModel(checkpoint, { worldSize, dtype: 'bf16' })
          const shapes = [...shapesOf(arch)]
          const bytes = (names: RegExp): number =>
            shapes.reduce(
              (sum, [name, shape]) => (names.test(name) ? sum + 4 * shape.reduce((n, d) => n * d, 1) : sum),
              0,
            )
          assert.equal(plan.total.readBytes, bytes(/./) + (worldSize - 1) * bytes(/norm|down_proj\.bias/))
          assert.equal(
            plan.ranks.reduce((sum, { totalBytes }) => sum + totalBytes, 0),
            plan.total.totalBytes,
          )
        },
      ),
      { numRuns: 60 },
    )
  })

  it('is the same each time, is plain data, and has a rule, a reason and ranges for every tensor', () => {
    const checkpoint = inventCheckpoint('llama2-13b', 3)
    const options = { worldSize: 3, dtype: 'bf16', batch: 4 } as const
    const plan = planModel(checkpoint, options)
    assert.equal(JSON.stringify(planModel(checkpoint, options)), JSON.stringify(plan))
    assert.deepEqual(JSON.parse(JSON.stringify(plan)), plan)
    const named = plan.tensors.flatMap(({ tensor, copies }) =>
      Array.from({ length: copies }, (_, layer) => tensor.replace('{layer}', String(layer))),
    )
    assert.deepEqual([...named].sort(), [...checkpoint.tensors.keys()].sort())
    for (const { why, rule, dim, ranges, shape } of plan.tensors) {
      assert.ok(why !== '')
      assert.equal(dim === null, rule === 'replicated')
      assert.equal(ranges.length, dim === null ? 0 : 3)
      const covered = ranges.flat().reduce((sum, [, count]) => sum + count, 0)
      if (dim !== null) assert.equal(covered, at(shape, dim))
    }
    assert.ok(plan.notes.some((note) => /uneven: 14 on the largest rank, 13 on the smallest/.test(note)))
  })

  it('tells of KV heads that stand on several ranks', () => {
    const plan = planModel(tinyllama, { worldSize: 8, dtype: 'bf16' })
    assert.deepEqual(
      plan.ranks.map(({ kvHeads }) => kvHeads),
      [0, 0, 1, 1, 2, 2, 3, 3].map((head) => [head, 1]),
    )
    assert.ok(plan.notes.some((note) => note.includes('2.00 times its size')))
  })

  it('reads as a table of at most 120 columns, whatever the number of ranks', () => {
    for (const worldSize of [1, 2, 7, 40]) {
      const plan = planModel(inventCheckpoint('llama2-13b'), { worldSize, dtype: 'bf16' })
      const text = formatPlan(plan)
      assert.ok(widest(text) <= 120, `${widest(text)} columns`)
      for (const { tensor, rule } of plan.tensors) {
        assert.ok(text.includes(tensor.replace('model.layers.{layer}.', '')), tensor)
        assert.ok(text.includes(rule))
      }
      assert.match(text, /13\.02 billion parameters, 40 layers/)
      assert.equal(text.includes('none: one rank'), worldSize === 1)
    }
  })

  it('has the slot size that the native runner asks for', function () {
    if (!isSupportedPlatform()) return this.skip()
    for (const [batch, stepTokens, maxTokens] of [
      [1, 1, 64],
      [4, 512, 4096],
      [300, 16, 4096],
    ] as const) {
      const program = compileProgram(tinyllama, { worldSize: 2, rank: 0, dtype: 'bf16' })
      const options = {
        cores: [],
        spinUs: 0,
        timeoutMs: 1000,
        maxTokens: stepTokens,
        maxLogitRows: Math.min(stepTokens, batch),
        maxSequences: batch,
        maxPositions: maxTokens,
        numBlocks: (batch * maxTokens) / 32,
        frequencies: new Float64Array(32),
        profile: false,
      }
      assert.equal(
        slotBytes(program, { batch, stepTokens, maxTokens, threads: 1, numBlocks: options.numBlocks }),
        runnerSlotBytes(program, options, []),
      )
    }
  })

  it('has the bytes that a rank then allocates and reads', async function () {
    if (!isSupportedPlatform()) return this.skip()
    for (const [model, dtype, batch, maxTokens, stepTokens] of [
      ['llama', 'f32', 1, 256, 40],
      ['llama-gqa-odd', 'bf16', 3, 100, 512],
    ] as const) {
      const directory = `${root}test/models/${model}`
      const config = {
        model: { directory },
        worldSize: 1,
        dtype,
        maxTokens: stepTokens,
        maxSequences: batch,
        contextLength: maxTokens,
        kvCacheTokens: batch * 32 * Math.ceil(maxTokens / 32),
        timeoutMs: 10_000,
        isa: '',
        profile: false,
      }
      const rank = await Rank.open(config, { rank: 0, cores: [], spinUs: 0 })
      const { weightBytes, kvBytes, scratchBytes, shardBytes: readBytes } = rank.report()
      await rank.close()
      const plan = planModel(await openCheckpoint(directory), { worldSize: 1, dtype, batch, maxTokens, stepTokens })
      const [planned] = plan.ranks
      assert.ok(planned !== undefined)
      assert.deepEqual(
        { weightBytes, kvBytes, scratchBytes, readBytes },
        {
          weightBytes: planned.weightBytes,
          kvBytes: planned.kvBytes,
          scratchBytes: planned.scratchBytes,
          readBytes: planned.readBytes,
        },
      )
    }
  })

  it('refuses sizes that cannot be, naming them', () => {
    const cases: readonly (readonly [object, string, string])[] = [
      [{ maxTokens: 4097 }, 'ERR_CONTEXT_LENGTH', '4096'],
      [{ maxTokens: 0 }, 'ERR_INVALID_OPTION', 'maxTokens is 0'],
      [{ batch: 1.5 }, 'ERR_INVALID_OPTION', 'batch is 1.5'],
      [{ stepTokens: Number.NaN }, 'ERR_INVALID_OPTION', 'stepTokens'],
      [{ threads: -1 }, 'ERR_INVALID_OPTION', 'threads'],
      [{ worldSize: 33 }, 'ERR_TP_TOO_LARGE', '32 query heads'],
      [{ shares: [1, 2, 3] }, 'ERR_INVALID_OPTION', 'one per rank'],
    ]
    for (const [change, code, text] of cases) {
      assert.throws(
        () => planModel(tinyllama, { worldSize: 2, dtype: 'bf16', ...change }),
        (error) => {
          assert.ok(error instanceof InferenceError && error.message.includes(text), String(error))
          assert.equal(error.code, code)
          return true
        },
      )
    }
  })
})

describe('tilerank plan', () => {
  const command = pathToFileURL(fileURLToPath(new URL('../../cli/plan.js', import.meta.url))).href
  /** The command alone, in a process of its own. */
  const run = (...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> =>
    new Promise((resolve) => {
      const script =
        `import { Command } from 'commander'; import { registerPlan } from '${command}';` +
        `const program = new Command(); registerPlan(program); await program.parseAsync(process.argv.slice(1), { from: 'user' })`
      execFile(
        process.execPath,
        ['--input-type=module', '-e', script, '--', 'plan', ...args],
        { cwd: root },
        (error, stdout, stderr) => {
          resolve({ code: error === null ? 0 : Number(error.code), stdout, stderr })
        },
      )
    })

  it('prints the plan of a checkpoint on disk, in the dtype that it is stored in', async () => {
    const directory = `${root}test/models/llama`
    const { code, stdout, stderr } = await run('--model', directory, '--tp', '3')
    assert.equal(code, 0, stderr)
    assert.match(stdout, /3 ranks of 1 thread, f32; KV cache for 1 x 256 tokens/)
    assert.match(stdout, /self_attn\.o_proj\.weight .* row-parallel/)
    const plan = planModel(await openCheckpoint(directory), { worldSize: 3, dtype: 'f32' })
    assert.equal(stdout, `${formatPlan(plan)}\n`)
  })

  it('prints JSON of a well-known shape', async () => {
    const { code, stdout, stderr } = await run(
      '--shape',
      'tinyllama-1.1b',
      '--tp',
      '2',
      '--batch',
      '4',
      '--max-tokens',
      '100',
      '--json',
    )
    assert.equal(code, 0, stderr)
    const plan = planModel(inventCheckpoint('tinyllama-1.1b'), {
      worldSize: 2,
      dtype: 'bf16',
      batch: 4,
      maxTokens: 100,
    })
    assert.deepEqual(JSON.parse(stdout), plan)
  })

  it('fails on misuse, saying what was wrong', async () => {
    const cases: readonly (readonly [string[], RegExp])[] = [
      [[], /name a checkpoint \(--model DIR\) or a shape/],
      [['--shape', 'nothing'], /Allowed choices are tinyllama-1\.1b/],
      [['--shape', 'llama2-7b', '--model', '.'], /cannot be used with/],
      [['--shape', 'llama2-7b', '--tp', '0'], /at least 1/],
      [['--shape', 'llama2-7b', '--tp', '2x'], /at least 1/],
      [['--shape', 'llama2-7b', '--tp', '33'], /32 query heads/],
      [['--shape', 'llama2-7b', '--tp', '2', '--shares', '1,x'], /Positive numbers/],
      [['--shape', 'llama2-7b', '--dtype', 'int3'], /Allowed choices are bf16, f32/],
      [['--model', `${root}test/nowhere`], /nowhere/],
    ]
    for (const [args, expected] of cases) {
      const { code, stdout, stderr } = await run(...args)
      assert.notEqual(code, 0, args.join(' '))
      assert.equal(stdout, '')
      assert.match(stderr, expected)
    }
  })
})
