// The engine on several nodes of a lab: the bits of one node with as many ranks, the golden cases, and what is seen when a rank is lost.

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { initInference } from '../../tp/index.js'
import { ranksValues, runRanks } from '../ranks.js'
import { isLong } from '../rounds.js'
import { demoModel, testModel } from '../tp/files.js'
import { decodeF32, largestDifference, logitTolerance, readGolden, tokensThatMustAgree } from '../tp/golden.js'
import { unavailable } from '../unavailable.js'
import { answersOf, stepTokens, type Answers } from './engineCases.js'
import { createLab, labObstacle, type Lab, type LabNode } from '../../bench/lab.js'

const cases = new URL('./engineCases.js', import.meta.url)
const storePort = 29_615

type Shape = readonly (readonly number[])[]
const twoByTwo: Shape = [
  [0, 1],
  [2, 3],
]

describe('the engine on several nodes', function () {
  this.timeout(60_000)
  let lab: Lab
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-engine-'))
  const secretFile = join(folder, 'secret')
  writeFileSync(secretFile, randomBytes(32).toString('hex'), { mode: 0o600 })

  before(async function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) return unavailable(this, obstacle)
    lab = await createLab({ nodes: 3 })
  })
  after(async () => {
    rmSync(folder, { recursive: true })
    await (lab as Lab | undefined)?.close()
  })

  const place = (shape: Shape) => ({
    worldSize: shape.flat().length,
    on: (rank: number): LabNode => {
      const node = lab.nodes[shape.findIndex((ranks) => ranks.includes(rank))]
      assert.ok(node !== undefined)
      return node
    },
    env: () => ({
      TILERANK_STORE: `${lab.nodes[0]?.address ?? ''}:${storePort}`,
      TILERANK_SECRET_FILE: secretFile,
      TILERANK_JOB: undefined,
    }),
  })

  for (const { shape, model, dtype, longPrompt = 0 } of [
    { shape: twoByTwo, model: demoModel, dtype: 'bf16', longPrompt: 1000 },
    { shape: [[0], [1]], model: demoModel, dtype: 'f32', longPrompt: 1023 }, // three frames one way, two the other
    { shape: [[0, 1], [2], [3]], model: testModel('llama-gqa-odd'), dtype: 'bf16' },
    ...(isLong
      ? ([
          { shape: twoByTwo, model: testModel('llama'), dtype: 'f32' },
          { shape: [[0], [1], [2]], model: demoModel, dtype: 'f32', longPrompt: 500 },
          { shape: [[0, 3], [1], [2]], model: demoModel, dtype: 'f32', longPrompt: 500 },
          {
            shape: [
              [0, 2],
              [1, 3],
            ],
            model: testModel('llama'),
            dtype: 'f32',
          },
          { shape: [[0], [1, 2, 3]], model: testModel('llama-gqa-odd'), dtype: 'bf16' },
        ] as const)
      : []),
  ] as const) {
    const name = model.split('/').at(-1) ?? ''
    it(`gives the golden answers, with the bits of one node, on ${JSON.stringify(shape)}: ${name} in ${dtype}`, async () => {
      const args = { folder: model, dtype, longPrompt }
      const all = (await ranksValues(cases, 'answers', { ...place(shape), args })) as Answers[]
      const [first] = all
      assert.ok(first)
      for (const one of all) assert.deepEqual(one, first)

      const golden = readGolden(model)
      for (const [i, prompt] of golden.prompts.entries()) {
        const reference = decodeF32(prompt.last_logits.f32)
        const difference = largestDifference(decodeF32(first.logits[i] ?? ''), reference)
        assert.ok(
          difference <= logitTolerance(golden, reference, dtype),
          `prompt ${String(i)}: off by ${String(difference)}`,
        )
      }
      let checked = 0
      for (const [i, greedy] of golden.greedy.entries()) {
        const count = tokensThatMustAgree(greedy, dtype)
        assert.deepEqual(first.greedy[i]?.slice(0, count), greedy.ids.slice(0, count), `greedy run ${String(i)}`)
        checked += count
      }
      assert.ok(checked > 0)

      const engine = await initInference({
        model,
        dtype,
        tensorParallel: { size: shape.flat().length },
        maxStepTokens: stepTokens,
      })
      try {
        assert.deepEqual(await answersOf(engine, args), first)
      } finally {
        await engine.close()
      }
    })
  }

  it('serves rank 0 of another node, and costs nothing while nobody asks', async () => {
    const [first, ...others] = await ranksValues(cases, 'serves', {
      ...place(twoByTwo),
      args: { model: demoModel, idleMs: 1500 },
    })
    const { texts, idleCpu } = first as { texts: string[]; idleCpu: number }
    assert.equal(texts.length, 2)
    assert.equal(texts[0], texts[1])
    assert.ok((texts[0] ?? '').length > 20)
    assert.ok(idleCpu < 0.1, `a rank that idles uses ${String(idleCpu)} of a core`)
    assert.deepEqual(others, ['served', 'served', 'served'])
  })

  for (const { how, victim, code, lateRanks } of [
    { how: 'SIGKILL', victim: 0, code: 'ERR_PEER_LOST' },
    { how: 'SIGSTOP', victim: 3, code: 'ERR_TIMEOUT', lateRanks: [3] },
    ...(isLong
      ? ([
          { how: 'SIGKILL', victim: 3, code: 'ERR_PEER_LOST' },
          { how: 'exit', victim: 2, code: 'ERR_PEER_LOST' },
          { how: 'busy', victim: 0, code: 'ERR_TIMEOUT', lateRanks: [0] },
        ] as const)
      : []),
  ] as const) {
    it(`rank ${String(victim)} in trouble (${how}) is ${code} on all others, with its name`, async () => {
      const timeoutMs = 2500
      const through = new Set<number>()
      const outcomes = await runRanks(cases, 'breaks', {
        ...place(twoByTwo),
        args: { model: demoModel, victim, how, timeoutMs },
        onSay: (rank, message, processes) => {
          // One that was stopped, or is busy, ends when the others are through.
          if (message === 'done') through.add(rank)
          if (through.size === 3) processes[victim]?.kill('SIGKILL')
        },
      })
      for (const outcome of outcomes) {
        if (outcome.rank === victim) continue
        const { failure, closedMs } = (outcome.value ?? {}) as {
          failure?: { code: string; rank: number; host: string; lateRanks: number[]; tookMs: number }
          closedMs: number
        }
        assert.ok(failure, JSON.stringify(outcome))
        const text = JSON.stringify(failure)
        assert.equal(failure.code, code, text)
        if (lateRanks === undefined) {
          assert.equal(failure.rank, victim, text)
          assert.equal(failure.host, place(twoByTwo).on(victim).name, text)
        } else {
          assert.deepEqual(failure.lateRanks, lateRanks, text)
        }
        assert.ok(failure.tookMs < (lateRanks === undefined ? 2000 : timeoutMs + 2500), text)
        assert.ok(closedMs < 5000, `${String(closedMs)} ms to close`)
      }
    })
  }
})
