// The engine as a script uses it: streams, batches, sampling, aborts, ends, and what it leaves behind.

import assert from 'node:assert/strict'
import { readFileSync, readdirSync } from 'node:fs'
import {
  initInference,
  type Completion,
  type Engine,
  type GenerateOptions,
  type InferenceOptions,
} from '../../tp/index.js'
import { drawAt } from '../../tp/random.js'
import { chooseToken, penalise, resolveSampling, wholeRow } from '../../tp/sampling.js'
import { cpuMs, pause, survivors } from '../launcher/processes.js'
import { demoModel, testModel } from './files.js'
import { largestDifference } from './golden.js'

const llama = testModel('llama')
const greedy = { temperature: 0, ignoreEos: true } as const

/** Ids of the 'llama' model's vocabulary (320), different for each seed. */
const promptOf = (length: number, seed = 0): number[] =>
  Array.from({ length }, (_, i) => 3 + ((i * 37 + seed * 101 + i * i) % 317))

async function withEngine<T>(options: InferenceOptions, use: (engine: Engine) => Promise<T>): Promise<T> {
  const engine = await initInference(options)
  try {
    return await use(engine)
  } finally {
    await engine.close()
  }
}

const hasCode = (code: string) => (error: unknown) => (error as { code?: unknown }).code === code

/** Processes that this one has started and not yet reaped. */
const children = (): number[] =>
  readdirSync('/proc/self/task').flatMap((task) =>
    readFileSync(`/proc/self/task/${task}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number),
  )
const descriptors = (): number => readdirSync('/proc/self/fd').length
const sharedMemory = (): string[] => readdirSync('/dev/shm').filter((name) => name.includes('tilerank'))

describe('engine: text', function () {
  this.timeout(60_000)
  let engine: Engine
  before(async () => {
    engine = await initInference({ model: demoModel, dtype: 'f32', tensorParallel: { size: 2 } })
  })
  after(() => engine.close())

  it('streams pieces that joined are what complete() gives, one id each, the reason with the last', async () => {
    const asked = { maxNewTokens: 40, ...greedy }
    const whole = await engine.complete('Once upon a time', asked)
    const pieces = []
    for await (const piece of engine.generate('Once upon a time', asked)) pieces.push(piece)
    assert.equal(pieces.length, 40)
    assert.ok((whole.text ?? '').length > 40)
    assert.equal(pieces.map(({ text }) => text).join(''), whole.text)
    assert.deepEqual(
      pieces.flatMap(({ ids }) => ids),
      whole.ids,
    )
    assert.deepEqual(
      pieces.map(({ finishReason }) => finishReason),
      [...Array<null>(39).fill(null), 'length'],
    )
    assert.equal(whole.tokenMs.length, 39)
    assert.ok(whole.promptMs > 0)
  })

  it('never yields half of a character', async () => {
    // At a high temperature byte tokens come up, which make up characters or the sign of a broken one, but only whole.
    const asked = { maxNewTokens: 150, temperature: 100, topK: 0, seed: 5, ignoreEos: true }
    const { ids, text } = await engine.complete('A', asked)
    const pieces: string[] = []
    for await (const piece of engine.generate({ ids: [...engine.encode('A')] }, asked)) pieces.push(piece.text)
    for (const piece of pieces) assert.equal(Buffer.from(piece).toString(), piece)
    assert.ok(ids.length === 150 && text !== null)
    const euro = engine.encode('€ 5, ü, 漢').length
    assert.ok(euro > 7, 'characters outside the vocabulary are bytes')
  })

  it('gives the same from text and from its ids', async () => {
    const fromText = await engine.complete('One day', { maxNewTokens: 8, ...greedy })
    const fromIds = await engine.complete({ ids: engine.encode('One day') }, { maxNewTokens: 8, ...greedy })
    assert.deepEqual({ ...fromIds, promptMs: 0, tokenMs: [] }, { ...fromText, promptMs: 0, tokenMs: [] })
  })

  it('ends at an end token of the caller, and goes on past it when told to', async () => {
    const { ids } = await engine.complete('Once upon a time', { maxNewTokens: 20, ...greedy })
    const end = ids[6] ?? -1
    const at = ids.indexOf(end)
    const stopped = await engine.complete('Once upon a time', {
      maxNewTokens: 20,
      temperature: 0,
      eosIds: [9999, end, 4],
    })
    assert.equal(stopped.finishReason, 'stop')
    assert.deepEqual(stopped.ids, ids.slice(0, at + 1))
    const without = await engine.complete('Once upon a time', {
      maxNewTokens: 20,
      temperature: 0,
      eosIds: [end],
      ignoreEos: true,
    })
    assert.deepEqual(without.ids, ids)
    const none = await engine.complete('Once upon a time', { maxNewTokens: 20, temperature: 0, eosIds: [] })
    assert.deepEqual(none.ids, ids)
    assert.equal(none.finishReason, 'length')
    // The end token's text is no part of the text.
    const before = await engine.complete('Once upon a time', { maxNewTokens: at, ...greedy })
    assert.equal(stopped.text?.trimEnd(), before.text?.trimEnd())
  })

  it('gives no token for maxNewTokens 0, and one for 1', async () => {
    const none = await engine.complete('Hello', { maxNewTokens: 0 })
    assert.deepEqual([none.ids, none.text, none.finishReason, none.logits], [[], '', 'length', undefined])
    const logits = (await engine.complete('Hello', { maxNewTokens: 0, wantLogits: true })).logits
    assert.ok(logits)
    assert.ok(logits.every(Number.isFinite))
    const one = await engine.complete('Hello', { maxNewTokens: 1, ...greedy, wantLogits: true })
    assert.equal(one.ids.length, 1)
    assert.equal(one.finishReason, 'length')
    assert.deepEqual(one.logits, logits)
    assert.equal(one.ids[0], wholeRow(logits, 1).ids[0])
  })
})

describe('engine: batches and chunks', function () {
  this.timeout(60_000)
  const lengths = [1, 5, 31, 32, 33, 64, 100, 7, 2, 17, 90, 3]
  const alone: Completion[] = []
  before(async () => {
    await withEngine({ model: llama, dtype: 'f32' }, async (engine) => {
      for (const [i, length] of lengths.entries()) {
        alone.push(
          await engine.complete({ ids: promptOf(length, i) }, { maxNewTokens: 12, ...greedy, wantLogits: true }),
        )
      }
    })
  })

  // 7 tokens: prompts in many chunks, and decode rows of some beside prompt chunks of others. 160 tokens of cache: they queue for it.
  for (const size of [1, 2, 3]) {
    for (const [name, options] of Object.entries({
      'all at once': { maxSequences: 16, kvCacheTokens: 4096 },
      'more requests than sequences': { maxSequences: 3 },
      'chunks of 7 tokens': { maxSequences: 5, maxStepTokens: 7 },
      'too little cache for all': { maxSequences: 12, kvCacheTokens: 160, maxStepTokens: 48 },
    })) {
      if (size === 3 && name !== 'chunks of 7 tokens') continue
      it(`gives each request of a batch what it gets alone, on ${String(size)} rank(s): ${name}`, async () => {
        await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size }, ...options }, async (engine) => {
          const batch = await Promise.all(
            lengths.map((length, i) =>
              engine.complete({ ids: promptOf(length, i) }, { maxNewTokens: 12, ...greedy, wantLogits: true }),
            ),
          )
          for (const [i, { ids, logits }] of batch.entries()) {
            assert.deepEqual(ids, alone[i]?.ids, `request ${String(i)}`)
            const expected = alone[i]?.logits
            assert.ok(logits)
            assert.ok(expected)
            const difference = largestDifference(logits, expected)
            assert.ok(difference <= 1e-4, `request ${String(i)}: logits differ by ${String(difference)}`)
          }
        })
      })
    }
  }

  it('admits requests while others run', async () => {
    await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size: 2 }, maxStepTokens: 16 }, async (engine) => {
      const running: Promise<Completion>[] = []
      for (const [i, length] of lengths.entries()) {
        running.push(engine.complete({ ids: promptOf(length, i) }, { maxNewTokens: 12, ...greedy }))
        await pause(i % 3)
      }
      for (const [i, { ids }] of (await Promise.all(running)).entries()) assert.deepEqual(ids, alone[i]?.ids)
    })
  })

  it('fills the context to its last position, and refuses one more', async () => {
    await withEngine({ model: llama, dtype: 'f32', maxStepTokens: 50 }, async (engine) => {
      const { ids, finishReason } = await engine.complete({ ids: promptOf(250) }, { maxNewTokens: 6, ...greedy })
      assert.deepEqual([ids.length, finishReason], [6, 'length'])
      const rest = await engine.complete({ ids: promptOf(250) }, greedy)
      assert.deepEqual(rest.ids, ids, 'by default it goes on to the end of the context')
      assert.deepEqual((await engine.complete({ ids: promptOf(256) })).ids, [])
      await assert.rejects(engine.complete({ ids: promptOf(250) }, { maxNewTokens: 7 }), hasCode('ERR_CONTEXT_LENGTH'))
      await assert.rejects(engine.complete({ ids: promptOf(257) }), hasCode('ERR_CONTEXT_LENGTH'))
    })
  })

  it('stays inside a cache that is smaller than the context', async () => {
    await withEngine({ model: llama, kvCacheTokens: 64 }, async (engine) => {
      assert.equal((await engine.complete({ ids: promptOf(10) }, greedy)).ids.length, 54)
      await assert.rejects(engine.complete({ ids: promptOf(65) }), hasCode('ERR_CONTEXT_LENGTH'))
      await assert.rejects(engine.complete({ ids: promptOf(10) }, { maxNewTokens: 60 }), hasCode('ERR_CONTEXT_LENGTH'))
    })
  })
})

describe('engine: sampling', function () {
  this.timeout(90_000)

  const cases: Readonly<Record<string, { options: GenerateOptions; isGathered?: boolean }>> = {
    'plain sampling': { options: { temperature: 0.8, topK: 0 } },
    'top-k 5': { options: { temperature: 1.2, topK: 5 } },
    'top-k 255 and a flat distribution': { options: { temperature: 5, topK: 255 } },
    'top-k 319, the last that ranks offer candidates for': { options: { temperature: 20, topK: 319 } },
    'top-k 320': { options: { temperature: 20, topK: 320 }, isGathered: true },
    'a top-k as large as the vocabulary': { options: { temperature: 1, topK: 1024 }, isGathered: true },
    'a top-k beyond the vocabulary': { options: { temperature: 1, topK: 5000 }, isGathered: true },
    'top-p': { options: { temperature: 1, topK: 0, topP: 0.7 } },
    'top-p over a flat distribution': { options: { temperature: 100, topK: 0, topP: 0.98 }, isGathered: true },
    'top-k and top-p': { options: { temperature: 1.5, topK: 40, topP: 0.9 } },
    'a penalty, greedy': { options: { temperature: 0, repetitionPenalty: 1.5 } },
    'a penalty below 1 with sampling': { options: { temperature: 1, topK: 50, repetitionPenalty: 0.8 } },
    'everything at once': { options: { temperature: 2, topK: 100, topP: 0.95, repetitionPenalty: 1.3 } },
  }
  for (const size of [2, 3]) {
    it(`chooses on ${String(size)} ranks what the whole rows of logits say`, async () => {
      // A vocabulary of 1024: a rank's shard is larger than what it offers.
      await withEngine({ model: demoModel, dtype: 'f32', tensorParallel: { size } }, async (engine) => {
        let requests = 0
        for (const [name, { options, isGathered }] of Object.entries(cases)) {
          const prompt = promptOf(9, requests)
          const drawKey = requests++
          const gathered = async (): Promise<number> => (await engine.reports())[0]?.wholeRows ?? NaN
          const before = await gathered()
          const { ids } = await engine.complete(
            { ids: prompt },
            { ...options, seed: 11, maxNewTokens: 8, ignoreEos: true },
          )
          if (isGathered) assert.ok((await gathered()) >= before + 8, `${name}: rows were not gathered`)
          const sampling = resolveSampling(
            {
              temperature: options.temperature,
              topK: options.topK,
              topP: options.topP,
              repetitionPenalty: options.repetitionPenalty,
              seed: 11,
            },
            { doSample: false, temperature: 1, topK: 50, topP: 1, repetitionPenalty: 1 },
          )
          for (const [i, id] of ids.entries()) {
            const sequence = [...prompt, ...ids.slice(0, i)]
            requests++
            const { logits } = await engine.complete({ ids: sequence }, { maxNewTokens: 0, wantLogits: true })
            assert.ok(logits)
            penalise(logits, sequence, sampling.repetitionPenalty)
            const draw = drawAt(11, drawKey, sequence.length)
            const expected = chooseToken(wholeRow(logits, sampling.temperature), sampling, draw)
            assert.equal(id, expected.id, `${name}, token ${String(i)}`)
          }
          assert.equal(ids.length, 8)
        }
      })
    })
  }

  it('takes a vocabulary that is smaller than top-k, and than the candidates of top-p', async () => {
    await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } }, async (engine) => {
      const cases = [{ topK: 319 }, { topK: 320 }, { topK: 321 }, { topK: 100_000 }, { topK: 0, topP: 0.9 }]
      for (const [drawKey, options] of cases.entries()) {
        const { ids, logits } = await engine.complete(
          { ids: promptOf(5) },
          { ...options, temperature: 4, seed: 3, maxNewTokens: 1, ignoreEos: true, wantLogits: true },
        )
        assert.ok(logits)
        const sampling = { doSample: true, temperature: 4, topP: 1, repetitionPenalty: 1, seed: 3, ...options }
        assert.equal(
          ids[0],
          chooseToken(wholeRow(logits, 4), sampling, drawAt(3, drawKey, 5)).id,
          JSON.stringify(options),
        )
      }
    })
  })

  it('draws the same from one seed on 1, 2 and 3 ranks and in a second run, and differs without', async () => {
    const asked = { temperature: 0.9, topK: 20, seed: 1234, maxNewTokens: 24, ignoreEos: true }
    const runs: (readonly number[])[] = []
    for (const size of [1, 2, 3, 2]) {
      await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size } }, async (engine) => {
        runs.push((await engine.complete({ ids: promptOf(6) }, asked)).ids)
        if (runs.length < 4) return
        const unseeded = { ...asked, seed: undefined, temperature: 5, topK: 0 }
        const [a, b] = await Promise.all([1, 2].map(() => engine.complete({ ids: promptOf(6) }, unseeded)))
        assert.notDeepEqual(a?.ids, b?.ids)
      })
    }
    for (const ids of runs) assert.deepEqual(ids, runs[0])
  })

  it('returns the row of logits as it was before penalty and temperature', async () => {
    await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } }, async (engine) => {
      const plain = await engine.complete({ ids: promptOf(6) }, { maxNewTokens: 1, ...greedy, wantLogits: true })
      const bent = await engine.complete(
        { ids: promptOf(6) },
        { maxNewTokens: 2, temperature: 2, repetitionPenalty: 3, seed: 1, wantLogits: true },
      )
      assert.equal(plain.logits?.length, 320)
      assert.deepEqual(bent.logits, plain.logits)
    })
  })
})

describe('engine: refusals', function () {
  this.timeout(60_000)
  let engine: Engine
  before(async () => {
    engine = await initInference({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } })
  })
  after(() => engine.close())

  const bad: Readonly<Record<string, [unknown, unknown, string]>> = {
    'an empty prompt': [{ ids: [] }, {}, 'ERR_EMPTY_PROMPT'],
    'an id that is the size of the vocabulary': [{ ids: [1, 320] }, {}, 'ERR_TOKEN_OUT_OF_RANGE'],
    'a negative id': [{ ids: [-1] }, {}, 'ERR_TOKEN_OUT_OF_RANGE'],
    'an id with a fraction': [{ ids: [1.5] }, {}, 'ERR_TOKEN_OUT_OF_RANGE'],
    'an id that is text': [{ ids: ['1'] }, {}, 'ERR_TOKEN_OUT_OF_RANGE'],
    'ids that are no list': [{ ids: '1,2' }, {}, 'ERR_INVALID_OPTION'],
    'a prompt that is a number': [5, {}, 'ERR_INVALID_OPTION'],
    'no prompt': [undefined, {}, 'ERR_INVALID_OPTION'],
    null: [null, {}, 'ERR_INVALID_OPTION'],
    'a list of ids without its name': [[1, 2], {}, 'ERR_INVALID_OPTION'],
    'text without a tokenizer': ['hello', {}, 'ERR_NO_TOKENIZER'],
    'a misspelt option': [{ ids: [1] }, { maxTokens: 5 }, 'ERR_INVALID_OPTION'],
    'a negative length': [{ ids: [1] }, { maxNewTokens: -1 }, 'ERR_INVALID_OPTION'],
    'a length with a fraction': [{ ids: [1] }, { maxNewTokens: 1.5 }, 'ERR_INVALID_OPTION'],
    'a negative temperature': [{ ids: [1] }, { temperature: -1 }, 'ERR_INVALID_OPTION'],
    'a temperature that is no number': [{ ids: [1] }, { temperature: NaN }, 'ERR_INVALID_OPTION'],
    'a top-p of 0': [{ ids: [1] }, { topP: 0 }, 'ERR_INVALID_OPTION'],
    'a top-k with a fraction': [{ ids: [1] }, { topK: 1.5 }, 'ERR_INVALID_OPTION'],
    'a penalty of 0': [{ ids: [1] }, { repetitionPenalty: 0 }, 'ERR_INVALID_OPTION'],
    'a signal that is none': [{ ids: [1] }, { signal: {} }, 'ERR_INVALID_OPTION'],
  }
  for (const [name, [prompt, options, code]] of Object.entries(bad)) {
    it(`refuses ${name}, and goes on`, async () => {
      await assert.rejects(engine.complete(prompt as { ids: number[] }, options as GenerateOptions), hasCode(code))
      assert.equal((await engine.complete({ ids: [1] }, { maxNewTokens: 1 })).ids.length, 1)
    })
  }

  it('refuses options that initInference does not have or that contradict each other', async () => {
    const wrong: Readonly<Record<string, unknown>>[] = [
      { model: llama, tensorparallel: { size: 2 } },
      { model: llama, tensorParallel: 2 },
      { model: llama, tensorParallel: { size: 0 } },
      { model: llama, dtype: 'f16' },
      { model: llama, shape: 'llama2-7b' },
      { model: llama, layers: 2 },
      { model: llama, contextLength: 257 },
      { model: llama, threadsPerRank: 1000 },
      { model: '' },
      {},
    ]
    for (const options of wrong) {
      await assert.rejects(initInference(options), hasCode('ERR_INVALID_OPTION'), JSON.stringify(options))
    }
    await assert.rejects(initInference({ model: llama, tensorParallel: { size: 5 } }), hasCode('ERR_TP_TOO_LARGE'))
  })
})

describe('engine: aborts', function () {
  this.timeout(60_000)
  let engine: Engine
  const full = { ids: promptOf(200) }
  let answer: readonly number[] = []
  before(async () => {
    // Cache for one full-size request: one block or slot that is not given back is one too few.
    engine = await initInference({
      model: llama,
      dtype: 'f32',
      tensorParallel: { size: 2 },
      kvCacheTokens: 256,
      maxSequences: 2,
      maxStepTokens: 16,
    })
    answer = (await engine.complete(full, { maxNewTokens: 56, ...greedy })).ids
    assert.equal(answer.length, 56)
  })
  after(() => engine.close())

  it('rejects with the reason before anything runs', async () => {
    const reason = new Error('no')
    await assert.rejects(engine.complete(full, { signal: AbortSignal.abort(reason) }), (error) => error === reason)
  })

  it('rejects with the reason while it waits, reads the prompt or writes, and gives everything back, 200 times', async () => {
    let late = 0
    for (let i = 0; i < 200; i++) {
      const reason = { number: i }
      const controller = new AbortController()
      const other = i % 4 === 3 ? engine.complete({ ids: promptOf(3) }, { maxNewTokens: 3, ...greedy }) : null
      const run = async (): Promise<void> => {
        let tokens = 0
        for await (const piece of engine.generate(full, { maxNewTokens: 50, ...greedy, signal: controller.signal })) {
          tokens += piece.ids.length
          // In the middle of its tokens.
          if (i % 3 === 2 && tokens === 2) controller.abort(reason)
        }
      }
      const running = run().then(
        () => 'finished',
        (error: unknown) => error,
      )
      if (i % 3 === 0) controller.abort(reason)
      if (i % 3 === 1) setTimeout(() => controller.abort(reason), i % 5)
      const outcome = await running
      // Only a timer may come too late, where this process was held up.
      if (i % 3 === 1 && outcome === 'finished') late++
      else assert.equal(outcome, reason)
      if (other) assert.equal((await other).ids.length, 3)
    }
    assert.ok(late < 50, `${String(late)} of 67 timers came too late`)
    assert.deepEqual((await engine.complete(full, { maxNewTokens: 56, ...greedy })).ids, answer)
  })

  it('rejects with whatever the reason is', async () => {
    for (const reason of [0, '', null, false, 'enough', { code: 1 }]) {
      const controller = new AbortController()
      const run = async (): Promise<void> => {
        for await (const piece of engine.generate(full, { maxNewTokens: 50, ...greedy, signal: controller.signal })) {
          if (piece.ids.length > 0) controller.abort(reason)
        }
      }
      const given = await run().then(
        () => 'done',
        (error: unknown) => ({ error }),
      )
      assert.deepEqual(given, { error: reason })
    }
  })

  it('ends a generation whose loop is left, 50 times', async () => {
    for (let i = 0; i < 50; i++) {
      for await (const piece of engine.generate(full, { maxNewTokens: 56, ...greedy })) {
        assert.equal(piece.ids[0], answer[0])
        break
      }
    }
    assert.deepEqual((await engine.complete(full, { maxNewTokens: 56, ...greedy })).ids, answer)
  })

  it('leaves no listener on a signal that outlives its requests', async () => {
    const controller = new AbortController()
    const warnings: Error[] = []
    const onWarning = (warning: Error): void => void warnings.push(warning)
    process.on('warning', onWarning)
    for (let i = 0; i < 20; i++) await engine.complete({ ids: [1] }, { maxNewTokens: 1, signal: controller.signal })
    await pause(1)
    process.off('warning', onWarning)
    assert.deepEqual(warnings, [])
  })
})

describe('engine: life and end', function () {
  this.timeout(120_000)

  it('lets what runs finish when it is closed, and refuses what comes later', async () => {
    const engine = await initInference({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } })
    const running = [1, 2, 3].map((seed) =>
      engine.complete({ ids: promptOf(20, seed) }, { maxNewTokens: 100, ...greedy }),
    )
    await pause(5)
    const pids = (await engine.reports()).map(({ pid }) => pid)
    assert.equal(pids.length, 2)
    const closing = engine.close()
    await assert.rejects(engine.complete({ ids: [1] }), hasCode('ERR_CLOSED'))
    await assert.rejects(engine.reports(), hasCode('ERR_CLOSED'))
    for (const { ids } of await Promise.all(running)) assert.equal(ids.length, 100)
    await closing
    await engine.close()
    assert.deepEqual(await survivors(pids, 0), [])
    await assert.rejects(engine.complete({ ids: [1] }), hasCode('ERR_CLOSED'))
    await assert.rejects(engine.serve(), hasCode('ERR_INVALID_OPTION'))
  })

  it('runs two engines in one process', async () => {
    await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } }, async (first) => {
      const expected = await first.complete({ ids: promptOf(8) }, { maxNewTokens: 10, ...greedy })
      await withEngine({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } }, async (second) => {
        const both = await Promise.all(
          [first, second].map((e) => e.complete({ ids: promptOf(8) }, { maxNewTokens: 10, ...greedy })),
        )
        for (const { ids } of both) assert.deepEqual(ids, expected.ids)
      })
      assert.equal((await first.complete({ ids: [1] }, { maxNewTokens: 2, ...greedy })).ids.length, 2)
    })
  })

  it('stops loading when its signal says so', async () => {
    const before = children()
    await assert.rejects(initInference({ model: llama, signal: AbortSignal.abort(new Error('early')) }), /early/)
    const controller = new AbortController()
    const loading = initInference({ shape: 'tinyllama-1.1b', layers: 6, signal: controller.signal, contextLength: 128 })
    setTimeout(() => controller.abort(new Error('late')), 150)
    await assert.rejects(loading, /late/)
    assert.deepEqual(
      children().filter((pid) => !before.includes(pid)),
      [],
    )
  })

  it('leaves no process, descriptor or shared memory behind in 20 lives', async () => {
    const live = async (): Promise<void> => {
      await withEngine({ model: llama, tensorParallel: { size: 2 } }, (engine) =>
        engine.complete({ ids: [1] }, { maxNewTokens: 1 }),
      )
    }
    await live()
    const before = { children: children().length, descriptors: descriptors(), sharedMemory: sharedMemory() }
    for (let i = 0; i < 20; i++) await live()
    assert.deepEqual({ children: children().length, descriptors: descriptors(), sharedMemory: sharedMemory() }, before)
  })

  it('takes no processor time while it has nothing to do', async () => {
    await withEngine({ model: llama, tensorParallel: { size: 2 } }, async (engine) => {
      await engine.complete({ ids: [1] }, { maxNewTokens: 4 })
      const pids = (await engine.reports()).map(({ pid }) => pid)
      await pause(300)
      const before = pids.map(cpuMs)
      await pause(1500)
      for (const [i, pid] of pids.entries()) {
        const used = cpuMs(pid) - (before[i] ?? 0)
        assert.ok(used <= 30, `rank ${String(i)} used ${String(used)} ms in 1500 ms`)
      }
    })
  })
})

describe('engine: a rank that dies', function () {
  this.timeout(60_000)
  const isLost = (rank: number, pid: number) => (error: unknown) => {
    const facts = error as { code?: unknown; fields?: Record<string, unknown>; message: string }
    assert.equal(facts.code, 'ERR_PEER_LOST')
    assert.equal(facts.fields?.['rank'], rank)
    assert.equal(facts.fields['pid'], pid)
    assert.equal(facts.fields['signal'], 'SIGKILL')
    assert.match(facts.message, new RegExp(`rank ${String(rank)} .*SIGKILL.*${String(pid)}`))
    return true
  }
  for (const victim of [0, 1, 2]) {
    it(`rejects everything in under a second when rank ${String(victim)} of 3 is killed, and a new engine works`, async () => {
      const engine = await initInference({ model: llama, dtype: 'f32', tensorParallel: { size: 3 } })
      try {
        const pids = (await engine.reports()).map(({ pid }) => pid)
        const pid = pids[victim] ?? -1
        let killed = 0
        const run = async (seed: number): Promise<void> => {
          let tokens = 0
          for await (const piece of engine.generate({ ids: promptOf(10, seed) }, { maxNewTokens: 240, ...greedy })) {
            tokens += piece.ids.length
            if (tokens !== 5 || killed !== 0) continue
            process.kill(pid, 'SIGKILL')
            killed = performance.now()
          }
        }
        const runs = [1, 2].map((seed) => assert.rejects(run(seed), isLost(victim, pid)))
        await Promise.all(runs)
        const elapsed = performance.now() - killed
        assert.ok(killed > 0 && elapsed < 1000, `it took ${String(elapsed)} ms`)
        assert.deepEqual(await survivors(pids, 1000), [])
        await assert.rejects(engine.complete({ ids: [1] }), hasCode('ERR_PEER_LOST'))
        await assert.rejects(engine.reports(), hasCode('ERR_PEER_LOST'))
      } finally {
        await engine.close()
      }
      await withEngine({ model: llama, tensorParallel: { size: 3 } }, (again) =>
        again.complete({ ids: [1] }, { maxNewTokens: 1 }),
      )
    })
  }

  it('rejects when a rank is killed while nothing runs, at the next request', async () => {
    const engine = await initInference({ model: llama, tensorParallel: { size: 2 } })
    const pids = (await engine.reports()).map(({ pid }) => pid)
    process.kill(pids[1] ?? -1, 'SIGKILL')
    await pause(300)
    await assert.rejects(engine.complete({ ids: [1] }), hasCode('ERR_PEER_LOST'))
    assert.deepEqual(await survivors(pids, 1000), [])
    await engine.close()
  })

  it('rejects when a rank is killed while it loads', async () => {
    const before = new Set(children())
    let killed = 0
    const loading = initInference({
      shape: 'tinyllama-1.1b',
      layers: 6,
      tensorParallel: { size: 2 },
      contextLength: 128,
      onProgress: ({ loadedBytes }) => {
        if (killed !== 0 || loadedBytes === 0) return
        const started = children().filter((pid) => !before.has(pid))
        process.kill(started[1] ?? -1, 'SIGKILL')
        killed = performance.now()
      },
    })
    await assert.rejects(loading, hasCode('ERR_PEER_LOST'))
    assert.ok(killed > 0 && performance.now() - killed < 1500)
    assert.deepEqual(
      children().filter((pid) => !before.has(pid)),
      [],
    )
  })

  it('gives up on a rank that stands still, naming it', async () => {
    const engine = await initInference({ model: llama, tensorParallel: { size: 2 }, timeoutMs: 500 })
    const pids = (await engine.reports()).map(({ pid }) => pid)
    process.kill(pids[1] ?? -1, 'SIGSTOP')
    const start = performance.now()
    await assert.rejects(engine.complete({ ids: [1] }, { maxNewTokens: 200, ...greedy }), (error: Error) => {
      assert.equal((error as { code?: unknown }).code, 'ERR_TIMEOUT')
      assert.match(error.message, /rank 1|late.*1/)
      return true
    })
    assert.ok(performance.now() - start < 3000)
    await engine.close()
    assert.deepEqual(await survivors(pids, 100), [])
  })
})
