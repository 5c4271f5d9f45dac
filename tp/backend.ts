// What an Engine runs on, in two of its three forms: this process is rank 0 of a launcher's job (LeaderBackend), or another rank of
// it (MirrorBackend). The third, where this process is no rank at all, is client.ts.

import { createHash } from 'node:crypto'
import { Packr } from 'msgpackr'
import { InferenceError } from './errors.js'
import type { Rank, RankReport } from './rank.js'
import {
  Scheduler,
  checkRequest,
  monotonicMs,
  type FinishReason,
  type Request,
  type RequestHandle,
  type TokenSink,
} from './scheduler.js'
import { decodeBytes, encodeBytes, encodeShutdown } from './step.js'

export interface Backend {
  /** Queues a request; see Scheduler.submit. */
  submit(request: Request, sink: TokenSink): RequestHandle
  /** Of every rank that this process can ask. */
  reports(): Promise<readonly RankReport[]>
  /** Resolves at the end of the engine's life on ranks that only obey. */
  serve(): Promise<void>
  close(): Promise<void>
}

// Tokens of one step on their way to the other ranks' JavaScript: which request, what it was asked, what came.
type MirrorEvent = readonly [
  request: number,
  asked: string,
  id: number | null,
  finish: FinishReason | null,
  atMs: number,
  logits: Uint8Array | null,
]

const packr = new Packr({ useRecords: false })

// News travel in the words of a step, which must fit a slot; the smallest slot is one page. The first byte says whether more follows.
const newsBytes = 4000
const newsMarks = { more: 0, last: 1 } as const

function framesOf(news: readonly MirrorEvent[]): Uint8Array[] {
  const bytes = packr.pack(news)
  return Array.from({ length: Math.ceil(bytes.length / newsBytes) }, (_, i) => {
    const part = bytes.subarray(i * newsBytes, (i + 1) * newsBytes)
    const mark = (i + 1) * newsBytes < bytes.length ? newsMarks.more : newsMarks.last
    return Buffer.concat([Uint8Array.of(mark), part])
  })
}

function hashOf(request: Request): string {
  return createHash('sha256').update(packr.pack(request)).digest('base64url').slice(0, 22)
}

/** Rank 0: the scheduler, and under a launcher the news to the other ranks. */
export class LeaderBackend implements Backend {
  readonly #rank: Rank
  readonly #scheduler: Scheduler
  readonly #mirrors: boolean
  #news: MirrorEvent[] = []
  #requests = 0
  #isClosed = false

  /** @param mirrors the other ranks run the same script and want the tokens too */
  constructor(rank: Rank, mirrors: boolean) {
    this.#rank = rank
    this.#mirrors = mirrors && rank.config.worldSize > 1
    this.#scheduler = new Scheduler(rank.checkpoint.arch, rank.limits, {
      step: async (words, onAhead) => {
        await this.#tell()
        return await rank.step(words, onAhead)
      },
      interrupt: () => {
        if (!this.#isClosed) rank.runner.interrupt()
      },
    })
  }

  submit(request: Request, sink: TokenSink): RequestHandle {
    if (!this.#mirrors) return this.#scheduler.submit(request, sink)
    const number = this.#requests
    const asked = hashOf(request)
    const handle = this.#scheduler.submit(request, {
      token: (event) => {
        const logits = event.logits
          ? new Uint8Array(event.logits.buffer, event.logits.byteOffset, event.logits.byteLength)
          : null
        this.#news.push([number, asked, event.id, event.finishReason, event.atMs, logits])
        this.#rank.runner.interrupt() // news go out between steps
        // The last token of all has no step after it that could carry the news.
        if (event.finishReason) {
          void this.#scheduler
            .idle()
            .then(() => this.#tell())
            .catch(() => undefined) // the scheduler has told every sink
        }
        sink.token(event)
      },
      fail: (error) => {
        sink.fail(error)
      },
    })
    this.#requests++
    return handle
  }

  async #tell(): Promise<void> {
    if (this.#news.length === 0 || this.#isClosed) return
    const news = this.#news
    this.#news = []
    // Posted in one go: the runner takes them in this order, and no step comes between.
    await Promise.all(framesOf(news).map((frame) => this.#rank.step(encodeBytes(frame))))
  }

  reports(): Promise<readonly RankReport[]> {
    return Promise.resolve([this.#rank.report()])
  }

  serve(): Promise<void> {
    return Promise.reject(
      new InferenceError('ERR_INVALID_OPTION', 'serve() is for the ranks other than 0; rank 0 calls generate()'),
    )
  }

  async close(): Promise<void> {
    if (this.#isClosed) return
    try {
      await this.#scheduler.idle()
      await this.#tell()
      this.#isClosed = true
      await this.#rank.step(encodeShutdown())
    } finally {
      this.#isClosed = true
      await this.#rank.close()
    }
  }
}

/** Any other rank: obeys rank 0, and gives its own script the same tokens for the same requests. */
export class MirrorBackend implements Backend {
  readonly #rank: Rank
  readonly #served: Promise<void>
  #frames: Uint8Array[] = []
  readonly #early = new Map<number, MirrorEvent[]>()
  readonly #waiting = new Map<number, { readonly asked: string; readonly sink: TokenSink }>()
  #requests = 0
  #isServing = false
  #failure: Error | null = null
  #watching: NodeJS.Timeout | undefined

  constructor(rank: Rank) {
    this.#rank = rank
    this.#served = rank
      .serve((words) => {
        // What is thrown here would be lost in the addon: it ends this rank's requests instead.
        try {
          const frame = decodeBytes(words)
          this.#frames.push(frame.subarray(1))
          if (frame[0] === newsMarks.more) return
          const news = packr.unpack(Buffer.concat(this.#frames)) as MirrorEvent[]
          this.#frames = []
          for (const event of news) this.#take(event)
        } catch (error) {
          this.#fail(error instanceof Error ? error : new Error(String(error)))
        }
      })
      .then(
        () => {
          this.#fail(new InferenceError('ERR_CLOSED', 'rank 0 closed the engine before this request had ended'))
        },
        (error: unknown) => {
          const failure = error instanceof Error ? error : new Error(String(error))
          this.#fail(failure)
          throw failure
        },
      )
    this.#served.catch(() => undefined) // serve() and close() hand it on
  }

  /**
   * Rank 0 obeys nobody, so the wait for its next step has no deadline. As long as a request of this rank is pending there is one here:
   * a leader that shows no progress for that long is given up.
   */
  #watch(): void {
    if (this.#watching !== undefined) return
    const { timeoutMs } = this.#rank.config
    let seen = this.#rank.group.progressOf(0)
    let since = performance.now()
    this.#watching = setInterval(() => {
      if (this.#waiting.size === 0) {
        clearInterval(this.#watching)
        this.#watching = undefined
        return
      }
      const now = this.#rank.group.progressOf(0)
      if (now !== seen) {
        seen = now
        since = performance.now()
      } else if (performance.now() - since >= timeoutMs) {
        clearInterval(this.#watching)
        this.#rank.group.giveUp(0, timeoutMs) // #served rejects
      }
    }, timeoutMs / 4).unref()
  }

  #fail(error: Error): void {
    clearInterval(this.#watching)
    this.#failure ??= error
    const waiting = [...this.#waiting.values()]
    this.#waiting.clear()
    for (const { sink } of waiting) sink.fail(error)
  }

  #take(event: MirrorEvent): void {
    const [request, asked, id, finishReason, atMs, logits] = event
    const waiting = this.#waiting.get(request)
    if (!waiting) {
      if (!this.#isServing) this.#early.set(request, [...(this.#early.get(request) ?? []), event])
      return
    }
    if (waiting.asked !== asked) {
      this.#waiting.delete(request)
      waiting.sink.fail(
        new InferenceError(
          'ERR_MISMATCH',
          `request ${String(request)} differs between rank 0 and rank ${String(this.#rank.program.rank)}: under a launcher every rank asks the same, or rank 0 alone and the others call serve()`,
          { request, rank: this.#rank.program.rank },
        ),
      )
      return
    }
    if (finishReason) this.#waiting.delete(request)
    const copied = logits ? new Float32Array(Uint8Array.from(logits).buffer) : undefined
    waiting.sink.token({ id, finishReason, atMs, ...(copied ? { logits: copied } : {}) })
  }

  submit(request: Request, sink: TokenSink): RequestHandle {
    const early = this.#early.get(this.#requests) ?? []
    // A rank that comes late to the last requests still gets them, even if rank 0 has closed meanwhile.
    if (this.#failure && !early.at(-1)?.[3]) throw this.#failure
    checkRequest(request, this.#rank.checkpoint.arch, this.#rank.limits)
    const number = this.#requests++
    this.#waiting.set(number, { asked: hashOf(request), sink })
    this.#watch()
    this.#early.delete(number)
    if (early.length > 0) {
      queueMicrotask(() => {
        for (const event of early) this.#take(event)
      })
    }
    // Rank 0 decides what runs: aborting here only stops listening.
    return {
      abort: () => {
        if (this.#waiting.delete(number)) sink.token({ id: null, finishReason: 'aborted', atMs: monotonicMs() })
      },
    }
  }

  reports(): Promise<readonly RankReport[]> {
    return Promise.resolve([this.#rank.report()])
  }

  serve(): Promise<void> {
    this.#isServing = true
    this.#early.clear()
    return this.#served
  }

  async close(): Promise<void> {
    try {
      await this.#served
    } finally {
      await this.#rank.close()
    }
  }
}
