// The engine of an ordinary script: starts the ranks as child processes, each bound to its cores, and talks ids with rank 0. This
// process is no rank, is not bound, and holds no weights. A rank that dies or fails ends them all; what had been asked rejects with the first cause.

import { planBinding, readTopology, spawnRanks, type RankExit, type RankSet } from '../launcher/index.js'
import type { Backend } from './backend.js'
import type { Checkpoint } from './checkpoint/index.js'
import { InferenceError } from './errors.js'
import { checkRoom } from './memory.js'
import { errorFromMessage, type FromRank, type ToRank } from './messages.js'
import type { InferenceOptions } from './options.js'
import type { RankConfig, RankReport } from './rank.js'
import { checkRequest, type EngineLimits, type Request, type RequestHandle, type TokenSink } from './scheduler.js'

// A rank's own report of its failure and the exits of the others arrive in any order: the cause is chosen after this long.
const judgeAfterMs = 100
// From the close message to TERM. Nothing runs any more by then.
const closeGraceMs = 10_000

/** Starts the ranks and resolves when all have loaded their weights. */
export async function startClient(
  config: RankConfig,
  checkpoint: Checkpoint,
  limits: EngineLimits,
  options: InferenceOptions,
): Promise<Backend> {
  const topology = readTopology()
  const plan = planBinding({ ranks: config.worldSize, topology, oversubscribe: true })
  const threads = options.threadsPerRank
  const cores = plan.ranks.map((binding) => {
    if (threads === undefined) return binding
    if (threads > binding.cores.length) {
      const { cpuLimit, decidedBy } = topology
      const quota =
        cpuLimit === undefined
          ? ''
          : `, and ${decidedBy.cpu ?? 'a cgroup'} allows ${String(cpuLimit)} processors of time`
      throw new InferenceError(
        'ERR_INVALID_OPTION',
        `threadsPerRank is ${String(threads)}, but a rank has ${String(binding.cores.length)} core(s) of its own here (${String(config.worldSize)} ranks on ${String(topology.cores.length)} cores${quota}); use fewer threads or ranks, or raise the limit`,
        { threadsPerRank: threads, cores: binding.cores.length, cpuLimit },
      )
    }
    return { ...binding, cores: binding.cores.slice(0, threads) }
  })
  const most = Math.max(1, ...cores.map((binding) => binding.cores.length))
  checkRoom(checkpoint, config, limits, most, topology)
  const ranks = await spawnRanks({
    entry: new URL('./rankMain.js', import.meta.url),
    worldSize: config.worldSize,
    cores,
    stdin: 'ignore',
    stdout: 'ignore', // stdout is the caller's: ranks have nothing to say there
    ipc: true,
  })
  const client = new Client(ranks, checkpoint, limits, options.onProgress)
  await client.open(config, plan.isOversubscribed ? 0 : 50, options.signal)
  return client
}

class Client implements Backend {
  readonly #ranks: RankSet
  readonly #checkpoint: Checkpoint
  readonly #limits: EngineLimits
  readonly #onProgress: InferenceOptions['onProgress']
  readonly #progress = new Map<number, { loaded: number; total: number }>()
  readonly #sinks = new Map<number, TokenSink>()
  readonly #reports = new Map<number, { resolve: (report: RankReport) => void; reject: (error: unknown) => void }>()
  readonly #ready = new Set<number>()
  readonly #failures: { rank: number; error: Error }[] = []
  #onReady: (() => void) | null = null
  // unknown: also the reason of a signal that ended the loading
  #failure: { readonly error: unknown } | null = null
  #onFailure: ((error: unknown) => void) | null = null
  #onIdle: (() => void) | null = null
  #requests = 0
  #calls = 0
  #isClosing = false
  #judging: NodeJS.Timeout | undefined

  constructor(
    ranks: RankSet,
    checkpoint: Checkpoint,
    limits: EngineLimits,
    onProgress: InferenceOptions['onProgress'],
  ) {
    this.#ranks = ranks
    this.#checkpoint = checkpoint
    this.#limits = limits
    this.#onProgress = onProgress
    for (const { rank, child } of ranks.ranks) {
      child.on('message', (message) => {
        this.#receive(rank, message as FromRank)
      })
      child.on('error', () => undefined) // a channel that broke: the exit tells why
    }
    void ranks.failed.then((exit) => {
      this.#judge(exit)
    })
    void ranks.done.then(() => {
      if (!this.#isClosing) this.#judge()
    })
  }

  async open(config: RankConfig, spinUs: number, signal: AbortSignal | undefined): Promise<void> {
    for (const { rank } of this.#ranks.ranks) this.#send(rank, { type: 'open', config, spinUs })
    const onAbort = (): void => {
      this.#fail(signal?.reason)
    }
    if (signal?.aborted) onAbort()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      await new Promise<void>((resolve, reject) => {
        this.#onReady = resolve
        this.#onFailure = reject
        if (this.#failure) reject(this.#failure.error)
      })
    } catch (error) {
      await this.#ranks.close()
      throw error
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  #send(rank: number, message: ToRank): void {
    const child = this.#ranks.ranks[rank]?.child
    if (child?.connected) child.send(message, () => undefined) // a rank that is gone is found out by its exit
  }

  #receive(rank: number, message: FromRank): void {
    switch (message.type) {
      case 'progress': {
        this.#progress.set(rank, message)
        const all = [...this.#progress.values()]
        this.#onProgress?.({
          loadedBytes: all.reduce((sum, p) => sum + p.loaded, 0),
          totalBytes: Math.round((all.reduce((sum, p) => sum + p.total, 0) / all.length) * this.#ranks.ranks.length),
        })
        return
      }
      case 'ready':
        this.#ready.add(rank)
        if (this.#ready.size === this.#ranks.ranks.length) this.#onReady?.()
        return
      case 'tokens':
        for (const { request, ...event } of message.tokens) {
          const sink = this.#sinks.get(request)
          if (event.finishReason) this.#forget(request)
          sink?.token(event)
        }
        return
      case 'refused': {
        const sink = this.#sinks.get(message.request)
        this.#forget(message.request)
        sink?.fail(errorFromMessage(message.error))
        return
      }
      case 'report':
        this.#reports.get(message.call)?.resolve(message.report)
        this.#reports.delete(message.call)
        return
      case 'failed':
        this.#failures.push({ rank, error: errorFromMessage(message.error) })
        this.#judging ??= setTimeout(() => {
          this.#judge()
        }, judgeAfterMs)
        return
      default: {
        const never: never = message
        throw new TypeError(`unknown message ${JSON.stringify(never)}`)
      }
    }
  }

  #forget(request: number): void {
    this.#sinks.delete(request)
    if (this.#sinks.size === 0) this.#onIdle?.()
  }

  /** One cause for all: a death by signal, else a failure that is not the echo of another's, else whatever came first. */
  #judge(exit: RankExit | undefined = this.#ranks.exits.find((e) => e.exitCode !== 0)): void {
    if (this.#failure) return
    const echoes = new Set(['ERR_PEER_LOST', 'ERR_ABORTED'])
    const own = this.#failures.find(({ error }) => !echoes.has(String((error as { code?: unknown }).code)))
    const first = own ?? this.#failures[0]
    if (exit?.signal || !first) {
      const how =
        exit === undefined
          ? 'ended'
          : exit.signal
            ? `was ended by ${exit.signal}`
            : `ended with exit code ${String(exit.exitCode)}`
      this.#fail(
        new InferenceError(
          'ERR_PEER_LOST',
          `rank ${String(exit?.rank ?? '?')} ${how} (process ${String(exit?.pid ?? '?')})`,
          { rank: exit?.rank, pid: exit?.pid, signal: exit?.signal, exitCode: exit?.exitCode },
          { cause: this.#failures[0]?.error },
        ),
      )
    } else {
      this.#fail(Object.assign(first.error, { rank: (first.error as { rank?: unknown }).rank ?? first.rank }))
    }
  }

  #fail(error: unknown): void {
    if (this.#failure) return
    this.#failure = { error }
    clearTimeout(this.#judging)
    this.#ranks.stop()
    this.#onFailure?.(error)
    for (const sink of this.#sinks.values()) sink.fail(error)
    for (const { reject } of this.#reports.values()) reject(error)
    this.#sinks.clear()
    this.#reports.clear()
    this.#onIdle?.()
  }

  submit(request: Request, sink: TokenSink): RequestHandle {
    if (this.#failure) throw this.#failure.error
    checkRequest(request, this.#checkpoint.arch, this.#limits)
    const number = this.#requests++
    this.#sinks.set(number, sink)
    this.#send(0, { type: 'submit', request: number, asked: request })
    return {
      abort: () => {
        if (this.#sinks.has(number)) this.#send(0, { type: 'abort', request: number })
      },
    }
  }

  async reports(): Promise<readonly RankReport[]> {
    if (this.#failure) throw this.#failure.error
    return await Promise.all(
      this.#ranks.ranks.map(
        ({ rank }) =>
          new Promise<RankReport>((resolve, reject) => {
            const call = this.#calls++
            this.#reports.set(call, { resolve, reject })
            this.#send(rank, { type: 'report', call })
          }),
      ),
    )
  }

  serve(): Promise<void> {
    return Promise.reject(
      new InferenceError('ERR_INVALID_OPTION', 'serve() is for ranks under a launcher; this process is none'),
    )
  }

  async close(): Promise<void> {
    if (this.#sinks.size > 0) {
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve
      })
    }
    if (this.#failure) {
      await this.#ranks.close()
      return
    }
    this.#isClosing = true
    for (const { rank } of this.#ranks.ranks) this.#send(rank, { type: 'close' })
    const timer = setTimeout(() => {
      this.#ranks.stop()
    }, closeGraceMs)
    if (this.#ranks.isAlive) await this.#ranks.done
    clearTimeout(timer)
    const exit = this.#ranks.exits.find((e) => e.exitCode !== 0)
    if (exit) this.#judge(exit)
  }
}
