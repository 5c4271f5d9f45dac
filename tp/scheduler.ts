// Rank 0's mind: which sequences run, what each step feeds, and which token comes next. One step at a time; every running
// sequence decodes one token in it, and what is left of the token budget goes to prompts, oldest first, in chunks. Nothing here
// knows processes, text or ranks: requests come in as ids, ids go out.

import type { ArchSpec } from './checkpoint/arch.js'
import { InferenceError } from './errors.js'
import { KvBlocks, blocksFor, kvBlockTokens, type KvSequence } from './kvBlocks.js'
import { rotaryFrequenciesFor } from './rope.js'
import { drawAt } from './random.js'
import { chooseToken, wholeRow, type SamplingParams } from './sampling.js'
import { encodeStep, logitFlags, maxStopIds, type StepRow, type StepRun } from './step.js'
import type { AheadTokens, StepResult } from './runner.js'

export interface EngineLimits {
  /** Tokens of one step, all sequences together: the length of a prompt chunk. */
  readonly maxTokens: number
  readonly maxSequences: number
  /** Longest sequence, prompt and new tokens together. */
  readonly maxPositions: number
  /** KV blocks, of kvBlockTokens each. */
  readonly numBlocks: number
}

export interface Request {
  readonly ids: readonly number[]
  readonly maxNewTokens: number
  readonly eosIds: readonly number[]
  readonly sampling: SamplingParams
  /** Numbers the request for its random draws: equal requests with different numbers draw differently. */
  readonly drawKey: number
  /** Ask for the logits after the last prompt token. */
  readonly wantLogits: boolean
}

export type FinishReason = 'stop' | 'length' | 'aborted'

export interface TokenEvent {
  readonly id: number | null
  readonly finishReason: FinishReason | null
  /** When the ranks had it: milliseconds of the monotonic clock (process.hrtime), the same in all processes of a machine. */
  readonly atMs: number
  /** f32 [vocabSize], with the first token, when asked for. */
  readonly logits?: Float32Array
}

/** Where a request's tokens go. fail() ends it instead of a finishReason when the engine breaks. */
export interface TokenSink {
  token(event: TokenEvent): void
  fail(error: unknown): void
}

interface Sequence {
  readonly request: Request
  readonly sink: TokenSink
  readonly slot: number
  readonly kv: KvSequence
  /** Prompt and generated ids; positions below `done` are in the KV cache. */
  readonly ids: number[]
  done: number
  isAborted: boolean
}

interface Waiting {
  readonly request: Request
  readonly sink: TokenSink
  isAborted: boolean
}

export interface RequestHandle {
  abort(): void
}

/** Milliseconds of the clock that native code and all processes of a machine share. */
export const monotonicMs = (): number => Number(process.hrtime.bigint()) / 1e6

// Candidates that each rank offers for a row: one more than top-k needs, so that a tie at its edge is seen.
const candidatesForTopP = 256
const mostCandidates = 320

/** What the scheduler drives: the runner of rank 0. */
export interface StepRunner {
  step(words: Int32Array, onAhead: (tokens: AheadTokens) => void): Promise<StepResult>
  /** A step that decodes ahead shall end with the token it is at. */
  interrupt(): void
}

export class Scheduler {
  readonly #arch: ArchSpec
  readonly #limits: EngineLimits
  readonly #runner: StepRunner
  readonly #blocks: KvBlocks
  readonly #freeSlots: number[]
  readonly #waiting: Waiting[] = []
  #running: Sequence[] = []
  #loop: Promise<void> | null = null
  #failure: Error | null = null

  constructor(arch: ArchSpec, limits: EngineLimits, runner: StepRunner) {
    this.#arch = arch
    this.#limits = limits
    this.#runner = runner
    this.#blocks = new KvBlocks(limits.numBlocks)
    this.#freeSlots = Array.from({ length: limits.maxSequences }, (_, i) => limits.maxSequences - 1 - i)
  }

  /**
   * Queues a request; its sink is told every new token, the last one with a finishReason.
   * @throws InferenceError ERR_TOKEN_OUT_OF_RANGE, ERR_EMPTY_PROMPT, ERR_CONTEXT_LENGTH, ERR_INVALID_OPTION; the engine's failure
   */
  submit(request: Request, sink: TokenSink): RequestHandle {
    if (this.#failure) throw this.#failure
    checkRequest(request, this.#arch, this.#limits)
    const waiting: Waiting = { request, sink, isAborted: false }
    if (request.maxNewTokens === 0 && !request.wantLogits) {
      queueMicrotask(() => {
        sink.token({ id: null, finishReason: 'length', atMs: monotonicMs() })
      })
      return { abort: () => undefined }
    }
    this.#waiting.push(waiting)
    if (this.#loop) this.#runner.interrupt()
    else this.#loop = this.#run()
    return {
      abort: () => {
        waiting.isAborted = true
        const running = this.#running.find((sequence) => sequence.sink === sink)
        if (running) running.isAborted = true
        this.#runner.interrupt()
      },
    }
  }

  /** Resolves when nothing runs any more; rejects when the engine failed. */
  async idle(): Promise<void> {
    await this.#loop
    if (this.#failure) throw this.#failure
  }

  async #run(): Promise<void> {
    // Requests submitted in the same turn of the event loop start together.
    await Promise.resolve()
    try {
      for (;;) {
        this.#dropAborted()
        this.#admit()
        if (this.#running.length === 0) break
        await this.#runStep()
      }
    } catch (error) {
      const failure = error instanceof Error ? error : new Error(String(error))
      this.#failure = failure
      const ended = [...this.#running, ...this.#waiting]
      this.#waiting.length = 0
      this.#running = []
      for (const { sink } of ended) sink.fail(failure)
    }
    // In the same turn as the last look at the queue: a request that comes from now on starts a loop of its own.
    this.#loop = null
  }

  #dropAborted(): void {
    for (const waiting of this.#waiting.filter((w) => w.isAborted)) {
      this.#waiting.splice(this.#waiting.indexOf(waiting), 1)
      waiting.sink.token({ id: null, finishReason: 'aborted', atMs: monotonicMs() })
    }
    for (const sequence of this.#running.filter((s) => s.isAborted))
      this.#finish(sequence, { id: null, finishReason: 'aborted', atMs: monotonicMs() })
  }

  #admit(): void {
    for (let next = this.#waiting[0]; next; next = this.#waiting[0]) {
      const slot = this.#freeSlots.at(-1)
      if (slot === undefined) return
      const kv = this.#blocks.reserve(next.request.ids.length + next.request.maxNewTokens)
      if (!kv) return
      this.#freeSlots.pop()
      this.#waiting.shift()
      this.#running.push({
        request: next.request,
        sink: next.sink,
        slot,
        kv,
        ids: [...next.request.ids],
        done: 0,
        isAborted: false,
      })
    }
  }

  #finish(sequence: Sequence, event: TokenEvent): void {
    this.#running.splice(this.#running.indexOf(sequence), 1)
    this.#blocks.release(sequence.kv)
    this.#freeSlots.push(sequence.slot)
    sequence.sink.token(event)
  }

  async #runStep(): Promise<void> {
    const runs: StepRun[] = []
    const rows: StepRow[] = []
    const rowOwners: Sequence[] = []
    const blockDeltas: { slot: number; index: number; block: number }[] = []
    const frequencySets: { slot: number; frequencies: Float64Array }[] = []
    let budget = this.#limits.maxTokens
    const ahead = this.#stepsAhead()
    const isDecoding = (s: Sequence): boolean => s.done >= s.request.ids.length
    // Decoding first: a long prompt may not make the others stutter.
    const order = [...this.#running.filter(isDecoding), ...this.#running.filter((s) => !isDecoding(s))]
    for (const sequence of order) {
      if (budget === 0) break
      const count = Math.min(budget, sequence.ids.length - sequence.done)
      budget -= count
      const end = sequence.done + count
      for (const { index, block } of this.#blocks.grow(sequence.kv, end + ahead))
        blockDeltas.push({ slot: sequence.slot, index, block })
      const length = Math.max(sequence.request.ids.length, end)
      const frequencies = rotaryFrequenciesFor(this.#arch.rope, length)
      if (frequencies) frequencySets.push({ slot: sequence.slot, frequencies })
      runs.push({
        slot: sequence.slot,
        position0: sequence.done,
        isNew: sequence.done === 0,
        ids: sequence.ids.slice(sequence.done, end),
      })
      if (end === sequence.ids.length) {
        rows.push(rowFor(sequence, this.#limits.maxTokens - budget - 1, this.#arch.vocabSize))
        rowOwners.push(sequence)
      }
      sequence.done = end
    }
    const stopIds = ahead > 0 ? this.#stopIds() : []
    const accept = ({ ids, endMs }: AheadTokens): void => {
      ids.forEach((id, i) => {
        const sequence = rowOwners[i % rows.length]
        if (sequence) this.#accept(sequence, id, endMs[Math.floor(i / rows.length)] ?? NaN)
      })
    }
    const words = encodeStep({ runs, rows, blockDeltas, frequencySets, ahead, stopIds })
    const result = await this.#runner.step(words, accept)
    accept(result.ahead)
    for (const [i, sequence] of rowOwners.entries()) {
      const row = result.rows[i]
      if (!row) throw new InferenceError('ERR_INTERNAL', 'a step gave fewer rows than were asked for')
      this.#advance(sequence, row, result.endMs)
    }
  }

  /**
   * Steps that the ranks may do after this one without asking: none unless every sequence only decodes, greedily and with the same
   * rotary frequencies at every length, and none that could pass a sequence's last token.
   */
  #stepsAhead(): number {
    const left = this.#running.map(({ request, ids, done }) => {
      const isPlain = done >= request.ids.length && !request.sampling.doSample
      return isPlain ? request.maxNewTokens - (ids.length - request.ids.length) - 1 : 0
    })
    const isSteady = rotaryFrequenciesFor(this.#arch.rope, this.#limits.maxPositions) === null
    return isSteady && this.#stopIds().length <= maxStopIds ? Math.min(...left) : 0
  }

  #stopIds(): number[] {
    return [...new Set(this.#running.flatMap(({ request }) => request.eosIds))]
  }

  /** A token that the ranks chose and have fed back by themselves: never a sequence's last. */
  #accept(sequence: Sequence, id: number, atMs: number): void {
    sequence.ids.push(id)
    sequence.done = sequence.ids.length
    sequence.sink.token({ id, finishReason: null, atMs })
  }

  #advance(sequence: Sequence, row: StepResult['rows'][number], atMs: number): void {
    const { request } = sequence
    const generated = sequence.ids.length - request.ids.length
    const logits = row.logits && generated === 0 ? { logits: row.logits } : {}
    if (request.maxNewTokens === 0) {
      this.#finish(sequence, { id: null, finishReason: 'length', atMs, ...logits })
      return
    }
    const draw = drawAt(request.sampling.seed, request.drawKey, sequence.ids.length)
    const { id } = chooseToken(
      row.whole ? wholeRow(row.values, request.sampling.temperature) : row,
      request.sampling,
      draw,
    )
    sequence.ids.push(id)
    const isStop = request.eosIds.includes(id)
    if (isStop || generated + 1 >= request.maxNewTokens) {
      this.#finish(sequence, { id, finishReason: isStop ? 'stop' : 'length', atMs, ...logits })
    } else {
      sequence.sink.token({ id, finishReason: null, atMs, ...logits })
    }
  }
}

function rowFor(sequence: Sequence, token: number, vocabSize: number): StepRow {
  const { sampling, wantLogits, ids } = sequence.request
  const isGreedy = !sampling.doSample
  const wanted = isGreedy ? 1 : sampling.topK > 0 ? sampling.topK + 1 : sampling.topP < 1 ? candidatesForTopP : Infinity
  const needed = Math.min(wanted, vocabSize)
  const isWhole = needed > mostCandidates
  const isFirst = sequence.done < ids.length
  let flags = 0
  if (wantLogits && isFirst) flags |= logitFlags.wantLogits
  if (isWhole) flags |= logitFlags.wholeRow
  if (sampling.repetitionPenalty !== 1) flags |= logitFlags.penalty
  return {
    token,
    slot: sequence.slot,
    flags,
    candidates: isWhole ? 1 : needed,
    topK: isGreedy ? 0 : Math.min(sampling.topK, vocabSize),
    temperature: isGreedy ? 0 : sampling.temperature,
    penalty: sampling.repetitionPenalty,
    topP: isGreedy ? 1 : sampling.topP,
  }
}

/** Everything that can be wrong with a request, before anything is queued or sent. */
export function checkRequest(request: Request, arch: ArchSpec, limits: EngineLimits): void {
  const { ids, maxNewTokens } = request
  if (ids.length === 0) throw new InferenceError('ERR_EMPTY_PROMPT', 'the prompt has no tokens; give at least one')
  for (const [position, id] of ids.entries()) {
    if (!Number.isInteger(id) || id < 0 || id >= arch.vocabSize) {
      throw new InferenceError(
        'ERR_TOKEN_OUT_OF_RANGE',
        `token ${String(id)} at position ${String(position)} is not in the vocabulary of ${String(arch.vocabSize)} (0 to ${String(arch.vocabSize - 1)})`,
        { id, position, vocabSize: arch.vocabSize },
      )
    }
  }
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 0) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `maxNewTokens is ${String(maxNewTokens)}; it must be a whole number, 0 or more`,
    )
  }
  const length = ids.length + maxNewTokens
  if (length > limits.maxPositions) {
    throw new InferenceError(
      'ERR_CONTEXT_LENGTH',
      `a prompt of ${String(ids.length)} tokens and ${String(maxNewTokens)} new ones exceed the context of ${String(limits.maxPositions)}`,
      { promptTokens: ids.length, maxNewTokens, contextLength: limits.maxPositions },
    )
  }
  if (blocksFor(length) > limits.numBlocks) {
    throw new InferenceError(
      'ERR_CONTEXT_LENGTH',
      `a sequence of ${String(length)} tokens does not fit the KV cache of ${String(limits.numBlocks * kvBlockTokens)}; raise kvCacheTokens`,
      { tokens: length, kvCacheTokens: limits.numBlocks * kvBlockTokens },
    )
  }
}
