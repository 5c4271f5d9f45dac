// Rank 0's scheduler alone, over a runner that is a function: what each step holds, who waits, what an abort gives back. The words
// are read here by the layout of native/runner/step.h, and every step is checked for what the runner would refuse or confuse.

import assert from 'node:assert/strict'
import type { AheadTokens, StepResult } from '../../tp/runner.js'
import { Scheduler, type EngineLimits, type Request, type TokenEvent } from '../../tp/scheduler.js'
import { tinyArch } from './interpret.js'

const arch = tinyArch({
  numHeads: 2,
  numKvHeads: 2,
  headDim: 8,
  hiddenSize: 16,
  intermediateSize: 32,
  vocabSize: 1000,
  numLayers: 1,
})
const greedy = { doSample: false, temperature: 1, topK: 0, topP: 1, repetitionPenalty: 1, seed: 0 }

interface Run {
  readonly slot: number
  readonly position0: number
  readonly isNew: boolean
  readonly ids: readonly number[]
}

/** Answers each row with the id after the last one of its sequence, and holds the caller to the rules of the runner. */
class Model {
  readonly steps: Run[][] = []
  readonly rows: number[][] = []
  readonly #limits: EngineLimits
  readonly #slots = new Map<number, { ids: number[]; blocks: Map<number, number> }>()
  /** Steps ahead that this runner is willing to do in one go. */
  willing = 0
  interrupts = 0
  /** Lets a test look between steps, or fail one. */
  beforeStep: () => void | Promise<void> = () => undefined

  constructor(limits: EngineLimits) {
    this.#limits = limits
  }

  readonly step = async (words: Int32Array, onAhead: (tokens: AheadTokens) => void): Promise<StepResult> => {
    await this.beforeStep()
    const at = (i: number): number => {
      const word = words[i]
      assert.ok(word !== undefined)
      return word
    }
    const [tokens, runCount, rowCount, deltas] = [at(3), at(4), at(5), at(6)]
    assert.ok(tokens >= 1 && tokens <= this.#limits.maxTokens, `${String(tokens)} tokens`)
    assert.ok(runCount <= this.#limits.maxSequences)
    let idAt = 10 + 4 * runCount
    const runs = Array.from({ length: runCount }, (_, r): Run => {
      const [slot, count, position0, isNew] = [0, 1, 2, 3].map((i) => at(10 + 4 * r + i))
      assert.ok(slot !== undefined && count !== undefined && position0 !== undefined)
      const ids = [...words.subarray(idAt, (idAt += count))]
      return { slot, position0, isNew: isNew === 1, ids }
    })
    assert.equal(new Set(runs.map(({ slot }) => slot)).size, runCount, 'a slot stands in two runs')
    for (const { slot, position0, isNew, ids } of runs) {
      if (isNew) this.#slots.set(slot, { ids: [], blocks: new Map() })
      const known = this.#slots.get(slot)
      assert.ok(known)
      assert.equal(known.ids.length, position0, 'a position was left out or written twice')
      known.ids.push(...ids)
    }
    for (let d = 0; d < deltas; d++) {
      const slot = at(idAt + 3 * d)
      const block = at(idAt + 3 * d + 2)
      assert.ok(block < this.#limits.numBlocks)
      for (const run of runs) {
        const other = this.#slots.get(run.slot)
        if (run.slot !== slot)
          assert.ok(![...(other?.blocks.values() ?? [])].includes(block), 'two sequences share a block')
      }
      this.#slots.get(slot)?.blocks.set(at(idAt + 3 * d + 1), block)
    }
    for (const { slot } of runs) {
      const { ids, blocks } = this.#slots.get(slot) ?? { ids: [], blocks: new Map() }
      assert.ok(blocks.size >= Math.ceil((ids.length + at(8)) / 32), 'a position has no block')
    }
    const rowAt = idAt + 3 * deltas
    const owners = Array.from({ length: rowCount }, (_, i) => at(rowAt + 8 * i + 1))
    this.steps.push(runs)
    this.rows.push(owners)
    const chosen = (): number[] => owners.map((slot) => ((this.#slots.get(slot)?.ids.at(-1) ?? 0) + 1) % arch.vocabSize)
    const stops = words.subarray(words.length - at(9))
    const ahead: number[] = []
    if (at(8) > 0) assert.ok(runCount === rowCount && tokens === runCount, 'only steps that decode may go ahead')
    for (let done = 0; done < Math.min(this.willing, at(8)); done++) {
      const ids = chosen()
      if (ids.some((id) => stops.includes(id))) break
      ahead.push(...ids)
      owners.forEach((slot, i) => this.#slots.get(slot)?.ids.push(ids[i] ?? NaN))
    }
    const rows = chosen().map((id) => {
      return { ids: Int32Array.of(id), values: Float32Array.of(1), max: 1, sumExp: 2, complete: true, whole: false }
    })
    // Half is handed out before the step ends.
    const stepsAhead = ahead.length / Math.max(1, rowCount)
    const early = stepsAhead >> 1
    const part = (from: number, to: number): AheadTokens => ({
      ids: Int32Array.from(ahead.slice(from * rowCount, to * rowCount)),
      endMs: Float64Array.from({ length: to - from }, (_, i) => from + i),
    })
    if (early > 0) onAhead(part(0, early))
    return { rows, ahead: part(early, stepsAhead), endMs: stepsAhead, elapsedUs: 1 }
  }

  readonly interrupt = (): void => {
    this.interrupts++
  }
}

const limitsOf = (changes: Partial<EngineLimits> = {}): EngineLimits => ({
  maxTokens: 8,
  maxSequences: 3,
  maxPositions: 64,
  numBlocks: 4,
  ...changes,
})

function requestOf(ids: readonly number[], maxNewTokens: number, changes: Partial<Request> = {}): Request {
  return { ids, maxNewTokens, eosIds: [], sampling: greedy, drawKey: 0, wantLogits: false, ...changes }
}

interface Asked {
  readonly events: TokenEvent[]
  readonly ended: Promise<TokenEvent>
  readonly abort: () => void
}

function ask(scheduler: Scheduler, request: Request, onEvent: (event: TokenEvent) => void = () => undefined): Asked {
  const events: TokenEvent[] = []
  let abort = (): void => undefined
  const ended = new Promise<TokenEvent>((resolve, reject) => {
    const handle = scheduler.submit(request, {
      token: (event) => {
        events.push(event)
        onEvent(event)
        if (event.finishReason) resolve(event)
      },
      fail: (error) => {
        reject(error instanceof Error ? error : new Error(String(error)))
      },
    })
    abort = () => {
      handle.abort()
    }
  })
  return { events, ended, abort }
}

const range = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i)

describe('the scheduler', () => {
  it('cuts a prompt into chunks and then feeds one token a step', async () => {
    const model = new Model(limitsOf())
    const { events, ended } = ask(new Scheduler(arch, limitsOf(), model), requestOf(range(100, 19), 3))
    await ended
    assert.deepEqual(
      model.steps.map((runs) => runs[0]?.ids.length),
      [8, 8, 3, 1, 1],
    )
    assert.deepEqual(
      model.rows.map((rows) => rows.length),
      [0, 0, 1, 1, 1],
    )
    assert.deepEqual(
      events.map(({ id }) => id),
      [119, 120, 121],
    )
    assert.deepEqual(
      events.map(({ finishReason }) => finishReason),
      [null, null, 'length'],
    )
  })

  it('gives decoding sequences their token first, and prompts what is left', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf(), model)
    const short = ask(scheduler, requestOf([5], 6))
    const long = ask(scheduler, requestOf(range(200, 30), 1))
    await Promise.all([short.ended, long.ended])
    const counts = model.steps.map((runs) => runs.map(({ ids }) => ids.length))
    assert.deepEqual(counts, [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2], [1]])
    assert.deepEqual(
      short.events.map(({ id }) => id),
      range(6, 6),
    )
    assert.deepEqual(
      long.events.map(({ id }) => id),
      [230],
    )
  })

  it('lets requests wait in order for slots and for blocks', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf(), model)
    const order: number[] = []
    const all = [40, 60, 1, 2, 3, 33].map((length, i) => {
      const asked = ask(scheduler, requestOf(range(10 * i, length), 4))
      void asked.ended.then(() => order.push(i))
      return asked
    })
    await Promise.all(all.map(({ ended }) => ended))
    for (const [i, { events }] of all.entries()) assert.equal(events.length, 4, `request ${String(i)}`)
    // 2 + 2 blocks are all there are: the rest waits for the first to end, though there is a slot.
    assert.ok(order.indexOf(2) > order.indexOf(0))
    const most = Math.max(...model.steps.map((runs) => runs.length))
    assert.ok(most > 1 && most <= 3)
  })

  it('stops at an end token, which is the last id', async () => {
    const model = new Model(limitsOf())
    const { events, ended } = ask(new Scheduler(arch, limitsOf(), model), requestOf([5], 50, { eosIds: [3, 8] }))
    assert.equal((await ended).finishReason, 'stop')
    assert.deepEqual(
      events.map(({ id }) => id),
      [6, 7, 8],
    )
  })

  it('takes a request that comes while the last one ends', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf(), model)
    // After 0, 1, 2, ... turns of the microtask queue: one of them lies between the loop's last look and its end.
    for (let turns = 0; turns < 12; turns++) {
      await ask(scheduler, requestOf([5], 1)).ended
      for (let i = 0; i < turns; i++) await Promise.resolve()
      const next = ask(scheduler, requestOf([6], 1)).ended
      const late = new Promise<string>((resolve) => setTimeout(resolve, 500, 'it hangs'))
      assert.notEqual(await Promise.race([next, late]), 'it hangs', `after ${String(turns)} turns`)
      await scheduler.idle()
    }
  })

  it('ends what is aborted - waiting, in its prompt, in its tokens - and gives slot and blocks back', async () => {
    const limits = limitsOf({ maxSequences: 1 })
    const model = new Model(limits)
    const scheduler = new Scheduler(arch, limits, model)
    for (let i = 0; i < 30; i++) {
      const running: Asked = ask(scheduler, requestOf(range(0, 20), 40), () => {
        if (i % 3 === 2) running.abort()
      })
      const waiting = ask(scheduler, requestOf([7], 2))
      waiting.abort()
      if (i % 3 === 0) running.abort()
      if (i % 3 === 1) {
        const steps = model.steps.length
        model.beforeStep = () => {
          if (model.steps.length === steps + 1) running.abort()
        }
      }
      for (const { ended } of [waiting, running]) {
        const { id, finishReason } = await ended
        assert.deepEqual({ id, finishReason }, { id: null, finishReason: 'aborted' })
      }
      running.abort()
      model.beforeStep = () => undefined
    }
    assert.equal((await ask(scheduler, requestOf(range(0, 60), 4)).ended).finishReason, 'length')
  })

  it('gives the same tokens however far the runner decodes ahead, and never past an end', async () => {
    let plainSteps = Infinity
    const run = async (willing: number): Promise<TokenEvent[][]> => {
      const model = new Model(limitsOf())
      model.willing = willing
      const scheduler = new Scheduler(arch, limitsOf(), model)
      // 20 prompt tokens: 3 steps before all decode; the second ends at id 209, the third waits for a place.
      const asked = [
        ask(scheduler, requestOf(range(100, 20), 12)),
        ask(scheduler, requestOf([200], 15, { eosIds: [209] })),
        ask(scheduler, requestOf(range(300, 40), 20)),
      ]
      for (const { ended } of asked) await ended
      if (willing === 0) plainSteps = model.steps.length
      else assert.ok(model.steps.length < plainSteps, `${String(model.steps.length)} steps`)
      return asked.map(({ events }) => events)
    }
    const plain = (all: TokenEvent[][]): unknown => all.map((events) => events.map((e) => [e.id, e.finishReason]))
    const one = plain(await run(0))
    for (const willing of [1, 2, 5, 100]) assert.deepEqual(plain(await run(willing)), one)
  })

  it('asks for no step ahead of a prompt, of sampling, or of the last token', async () => {
    const model = new Model(limitsOf())
    model.willing = 100
    const scheduler = new Scheduler(arch, limitsOf(), model)
    await ask(scheduler, requestOf([1, 2], 1)).ended
    assert.equal(model.steps.length, 1)
    await ask(scheduler, requestOf([1, 2], 3)).ended
    assert.equal(model.steps.length, 1 + 2) // the prompt's and one for both later tokens
    await ask(scheduler, requestOf([1, 2], 4, { sampling: { ...greedy, doSample: true } })).ended
    assert.equal(model.steps.length, 3 + 4)
  })

  it('interrupts what runs ahead when a request comes or goes', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf(), model)
    const first = ask(scheduler, requestOf([1], 5))
    assert.equal(model.interrupts, 0)
    const second = ask(scheduler, requestOf([1], 5))
    assert.equal(model.interrupts, 1)
    second.abort()
    assert.equal(model.interrupts, 2)
    await first.ended
  })

  it('tells every request of a failed step, running or waiting, and refuses later ones', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf(), model)
    model.beforeStep = () => {
      if (model.steps.length === 2) throw Object.assign(new Error('rank 1 is gone'), { code: 'ERR_PEER_LOST' })
    }
    const all = range(0, 5).map((i) => ask(scheduler, requestOf(range(i, 20), 4)))
    for (const { ended } of all) await assert.rejects(ended, { code: 'ERR_PEER_LOST' })
    assert.throws(() => scheduler.submit(requestOf([1], 1), { token: () => undefined, fail: () => undefined }), {
      code: 'ERR_PEER_LOST',
    })
    await assert.rejects(scheduler.idle(), { code: 'ERR_PEER_LOST' })
  })

  it('refuses what can never run, before anything is queued', async () => {
    const model = new Model(limitsOf())
    const scheduler = new Scheduler(arch, limitsOf({ numBlocks: 1 }), model)
    const wrong: [Request, string][] = [
      [requestOf([], 1), 'ERR_EMPTY_PROMPT'],
      [requestOf([1000], 1), 'ERR_TOKEN_OUT_OF_RANGE'],
      [requestOf([-1], 1), 'ERR_TOKEN_OUT_OF_RANGE'],
      [requestOf([NaN], 1), 'ERR_TOKEN_OUT_OF_RANGE'],
      [requestOf([1], -1), 'ERR_INVALID_OPTION'],
      [requestOf([1], 64), 'ERR_CONTEXT_LENGTH'],
      [requestOf([1], 32), 'ERR_CONTEXT_LENGTH'],
    ]
    for (const [request, code] of wrong) {
      assert.throws(() => scheduler.submit(request, { token: () => undefined, fail: () => undefined }), { code })
    }
    await scheduler.idle()
    assert.equal(model.steps.length, 0)
  })
})
