// The public face of inference: initInference() -> Engine. Text in, text out; the tokenizer and the stream decoder live here, the
// model lives in ranks. In an ordinary script this process is a client of ranks that it starts (client.ts); under a launcher it
// is one of them (backend.ts).

import { createHash } from 'node:crypto'
import { readRankEnvironment } from '../collectives/index.js'
import { readTopology } from '../launcher/index.js'
import { LeaderBackend, MirrorBackend, type Backend } from './backend.js'
import { requireChatTemplate, type ChatMessage } from './chat.js'
import type { Checkpoint } from './checkpoint/index.js'
import { startClient } from './client.js'
import { InferenceError, shown } from './errors.js'
import { kvBlockTokens } from './kvBlocks.js'
import { checkRoom } from './memory.js'
import {
  checkGenerateOptions,
  modelOf,
  resolveInference,
  type GenerateOptions,
  type InferenceOptions,
} from './options.js'
import { placeFromEnvironment } from './place.js'
import { Rank, limitsOf, openModel, type RankReport } from './rank.js'
import { resolveSampling } from './sampling.js'
import { monotonicMs, type EngineLimits, type FinishReason, type Request, type TokenEvent } from './scheduler.js'
import { StreamDecoder, loadTokenizer, requireTokenizer, type Tokenizer } from './tokens.js'

/** Text, ids as they are, or a conversation for the model's chat template. */
export type Prompt = string | { readonly ids: readonly number[] } | { readonly messages: readonly ChatMessage[] }

/** One step of one generation. */
export interface Piece {
  /** What this step adds to the text; '' inside a character, or without a tokenizer. */
  readonly text: string
  /** New ids, end token included. */
  readonly ids: readonly number[]
  /** Set on the last piece: 'stop' (end token), 'length', 'aborted'. */
  readonly finishReason: FinishReason | null
  /**
   * When the ranks had it, in milliseconds of the monotonic clock (process.hrtime). Fast models answer several tokens at once, at
   * least every 10 ms, so arrival times say little about the time of a token.
   */
  readonly atMs: number
  /** f32 [vocabSize] after the last prompt token, with the first piece, when asked for. */
  readonly logits?: Float32Array
}

export interface Completion {
  /** null without a tokenizer. */
  readonly text: string | null
  readonly ids: readonly number[]
  readonly promptIds: readonly number[]
  readonly finishReason: FinishReason
  readonly logits?: Float32Array
  /** Milliseconds until the first new token, and of each later one. */
  readonly promptMs: number
  readonly tokenMs: readonly number[]
}

/** From the call and the pieces' atMs: the time to the first token, and of each later one. */
export function timesOf(
  startMs: number,
  times: readonly number[],
): { readonly promptMs: number; readonly tokenMs: number[] } {
  return {
    promptMs: (times[0] ?? startMs) - startMs,
    tokenMs: times.slice(1).map((time, i) => time - (times[i] ?? time)),
  }
}

export class Engine {
  readonly #backend: Backend
  readonly #checkpoint: Checkpoint
  readonly #limits: EngineLimits
  /** null: the model has none; ids only. */
  readonly tokenizer: Tokenizer | null
  /** Number of ranks. */
  readonly worldSize: number
  /** Under a launcher all ranks must ask the same, so a seed cannot be drawn by each of them; null: each request draws its own. */
  readonly #seed: number | null
  #requests = 0
  #closing: Promise<void> | null = null

  /** @internal use initInference() */
  constructor(
    backend: Backend,
    checkpoint: Checkpoint,
    limits: EngineLimits,
    tokenizer: Tokenizer | null,
    worldSize: number,
    seed: number | null,
  ) {
    this.#backend = backend
    this.#checkpoint = checkpoint
    this.#limits = limits
    this.tokenizer = tokenizer
    this.worldSize = worldSize
    this.#seed = seed
  }

  /** Ids of a prompt as the model will see them. */
  encode(prompt: Prompt): readonly number[] {
    const isObject = typeof prompt === 'object' && (prompt as unknown) !== null
    if (isObject && 'ids' in prompt) {
      const ids: unknown = prompt.ids
      // A copy: what the caller does to the list afterwards is no part of the request.
      if (Array.isArray(ids) || ids instanceof Int32Array || ids instanceof Uint32Array) return Array.from<number>(ids)
      throw new InferenceError(
        'ERR_INVALID_OPTION',
        `ids of a prompt are ${shown(ids)}; a list of token ids is expected`,
      )
    }
    if (typeof prompt !== 'string' && !(isObject && 'messages' in prompt)) {
      throw new InferenceError(
        'ERR_INVALID_OPTION',
        `the prompt is ${shown(prompt)}; text, { ids } or { messages } is expected`,
      )
    }
    const tokenizer = requireTokenizer(this.tokenizer, this.#checkpoint.directory)
    if (typeof prompt === 'string') return tokenizer.encodePrompt(prompt)
    const template = requireChatTemplate(tokenizer.chatTemplate, this.#checkpoint.directory)
    return tokenizer.encodePrompt(template.render(prompt.messages), { addSpecialTokens: false })
  }

  /**
   * New text of one prompt, piece by piece. Leaving the loop early ends the generation. Several calls run as one batch.
   * @throws InferenceError before anything runs when prompt or options are wrong; the signal's reason when it is aborted; errors with
   * code ERR_PEER_LOST, ERR_TIMEOUT, ERR_MISMATCH or ERR_ABORTED when a rank is lost or stuck, after which the engine is broken
   */
  async *generate(prompt: Prompt, options: GenerateOptions = {}): AsyncGenerator<Piece, void, void> {
    const { request, promptIds } = this.#request(prompt, options)
    const signal = options.signal
    signal?.throwIfAborted()
    const queue: TokenEvent[] = []
    let failure: { readonly error: unknown } | undefined
    let wake: (() => void) | null = null
    const notify = (): void => {
      wake?.()
      wake = null
    }
    const handle = this.#backend.submit(request, {
      token: (event) => {
        queue.push(event)
        notify()
      },
      fail: (error) => {
        failure = { error }
        notify()
      },
    })
    const onAbort = (): void => {
      failure = { error: signal?.reason }
      handle.abort()
      notify()
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    const decoder = this.tokenizer && new StreamDecoder(this.tokenizer, promptIds)
    let isDone = false
    try {
      for (;;) {
        if (failure) throw failure.error
        const event = queue.shift()
        if (!event) {
          await new Promise<void>((resolve) => {
            wake = resolve
          })
          continue
        }
        const { id, finishReason, atMs, logits } = event
        isDone = finishReason !== null
        const isEnd = finishReason === 'stop'
        let text = decoder && id !== null && !isEnd ? decoder.push(id) : ''
        if (isDone && decoder) text += decoder.flush()
        yield { text, ids: id === null ? [] : [id], finishReason, atMs, ...(logits ? { logits } : {}) }
        if (isDone) return
      }
    } finally {
      signal?.removeEventListener('abort', onAbort)
      if (!isDone) handle.abort()
    }
  }

  /** The whole of generate() at once, with its timing. */
  async complete(prompt: Prompt, options: GenerateOptions = {}): Promise<Completion> {
    const promptIds = this.encode(prompt)
    const ids: number[] = []
    const times: number[] = []
    let text = ''
    let finishReason: FinishReason = 'length'
    let logits: Float32Array | undefined
    const start = monotonicMs()
    for await (const piece of this.generate({ ids: promptIds }, options)) {
      times.push(piece.atMs)
      text += piece.text
      ids.push(...piece.ids)
      logits ??= piece.logits
      finishReason = piece.finishReason ?? finishReason
    }
    return {
      text: this.tokenizer ? text : null,
      ids,
      promptIds,
      finishReason,
      ...(logits ? { logits } : {}),
      ...timesOf(start, times),
    }
  }

  #request(prompt: Prompt, options: GenerateOptions): { request: Request; promptIds: readonly number[] } {
    if (this.#closing) throw closed()
    checkGenerateOptions(options)
    const promptIds = this.encode(prompt)
    const { generation } = this.#checkpoint
    const most = Math.min(this.#limits.maxPositions, this.#limits.numBlocks * kvBlockTokens)
    const left = Math.max(0, most - promptIds.length)
    const maxNewTokens = options.maxNewTokens ?? Math.min(generation.maxNewTokens ?? 256, left)
    const request: Request = {
      ids: promptIds,
      maxNewTokens,
      eosIds: options.ignoreEos ? [] : (options.eosIds ?? generation.eosTokenIds),
      sampling: resolveSampling(
        {
          doSample: options.doSample,
          temperature: options.temperature,
          topK: options.topK,
          topP: options.topP,
          repetitionPenalty: options.repetitionPenalty,
          seed: options.seed ?? this.#seed ?? undefined,
        },
        generation,
      ),
      drawKey: this.#requests++,
      wantLogits: options.wantLogits ?? false,
    }
    return { request, promptIds }
  }

  /** Ids are 0 .. vocabSize - 1. */
  get vocabSize(): number {
    return this.#checkpoint.arch.vocabSize
  }

  /** Cores, tier, bytes and times of the ranks: all of them from a client, this one under a launcher. */
  async reports(): Promise<readonly RankReport[]> {
    if (this.#closing) throw closed()
    return await this.#backend.reports()
  }

  /** Under a launcher, on ranks other than 0: takes part until rank 0 closes its engine. */
  serve(): Promise<void> {
    return this.#backend.serve()
  }

  /** Waits for the requests that run, then ends the ranks; abort them by their signals to have it end at once. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#backend.close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

const closed = (): InferenceError => new InferenceError('ERR_CLOSED', 'the engine is closed')

/**
 * Loads a model and splits it over ranks. Without a launcher `tensorParallel.size` child processes are started, each bound to
 * cores of its own, and this process stays a thin client; under tp-launch, torchrun or the like every rank calls this with equal
 * options, and then either all call generate() alike or rank 0 alone while the others await serve().
 * @throws InferenceError for options and model (ERR_MODEL_NOT_FOUND, ERR_BAD_CONFIG, ERR_TP_TOO_LARGE, ...); CollectiveError when ranks
 * do not find or do not fit each other; ERR_NO_MEMORY with the bytes when the model does not fit
 */
export async function initInference(options: InferenceOptions): Promise<Engine> {
  const model = modelOf(options)
  const { signal } = options
  signal?.throwIfAborted()
  const checkpoint = await openModel({ model })
  const launched = readRankEnvironment(process.env)
  const size = options.tensorParallel?.size ?? launched?.worldSize ?? 1
  const config = resolveInference(options, size, checkpoint.arch.maxPositions)
  const limits = limitsOf(config, checkpoint)
  const tokenizer = checkpoint.directory === '' ? null : await loadTokenizer(checkpoint.directory)
  if (!launched) {
    const backend = await startClient(config, checkpoint, limits, options)
    return new Engine(backend, checkpoint, limits, tokenizer, size, null)
  }
  if (launched.worldSize !== size) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `tensorParallel.size is ${String(size)}, but the launcher started ${String(launched.worldSize)} ranks; leave it out under a launcher`,
      { size, worldSize: launched.worldSize },
    )
  }
  // Before the ranks meet: none of them has taken memory yet, so all see the same.
  const place = placeFromEnvironment()
  // Where the nodes are not known yet, at least this rank must fit.
  const here = launched.store !== undefined && launched.localSize === size ? 1 : launched.localSize
  checkRoom(checkpoint, config, limits, Math.max(1, place.cores.length), readTopology(), here)
  const rank = await Rank.open(config, { ...place, spinUs: 50 }, (loadedBytes, totalBytes) =>
    options.onProgress?.({ loadedBytes, totalBytes }),
  )
  if (signal?.aborted) {
    await rank.close()
    throw signal.reason
  }
  const backend = place.rank === 0 ? new LeaderBackend(rank, true) : new MirrorBackend(rank)
  // The job's nonce is the one thing that all ranks know and that differs from run to run.
  const seed = size > 1 ? createHash('sha256').update(rank.group.nonce).digest().readUIntBE(0, 6) : null
  return new Engine(backend, checkpoint, limits, tokenizer, size, seed)
}
