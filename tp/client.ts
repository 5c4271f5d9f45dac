// The engine of an ordinary script: starts the ranks as child processes, each bound to its cores, and talks ids with rank 0. This
// process is no rank, is not bound, and holds no weights. A rank that dies or fails ends them all; what had been asked rejects with the first cause.

import { hostname } from 'node:os'
import { excerptOf, isBetweenRanks, recorderVariable, writeRecording, type Recording } from '../collectives/index.js'
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
// From the close message to TERM, at most. Nothing runs any more by then.
const closeGraceMs = 10_000
// How often a rank is asked for a sign of life while something is pending, at least; four times within the deadline.
const pingMs = 5_000
// A rank that loads may be busy for longer than a short deadline: starting Node, compiling the program.
const loadSilenceMs = 10_000
// Answers that stand in this process's queue are read before a rank is given up.
const secondLookMs = 100

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
  const client = new Client(ranks, checkpoint, limits, config.timeoutMs, options.onProgress)
  await client.open(config, plan.isOversubscribed ? 0 : 50, options.signal)
  return client
}

class Client implements Backend {
  readonly #ranks: RankSet
  readonly #checkpoint: Checkpoint
  readonly #limits: EngineLimits
  readonly #timeoutMs: number
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
  /** Since when a rank owes an answer to a ping. */
  readonly #owedSince = new Map<number, number>()
  #pinging: NodeJS.Timeout | undefined

  constructor(
    ranks: RankSet,
    checkpoint: Checkpoint,
    limits: EngineLimits,
    timeoutMs: number,
    onProgress: InferenceOptions['onProgress'],
  ) {
    this.#timeoutMs = timeoutMs
    this.#ranks = ranks
    this.#checkpoint = checkpoint
    this.#limits = limits
    this.#onProgress = onProgress
    for (const { rank, child } of ranks.ranks) {
      child.on('message', (message) => {
        this.#receive(rank, message as FromRank)
      })
      child.on('error', () => undefined) // a channel that broke: the exit tells why
      // Before close() no end is in order, whatever its exit code: the others' reports come with it.
      child.once('exit', () => {
        if (!this.#isClosing) this.#judgeSoon()
      })
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
    this.#watch()
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

  /** Something is pending that only ranks can end. */
  get #isWaiting(): boolean {
    return this.#ready.size < this.#ranks.ranks.length || this.#sinks.size > 0 || this.#reports.size > 0
  }

  /**
   * Ranks that wait for each other have deadlines. One that stands still between two steps, or while it loads, is found out here: by
   * its silence, as long as something is pending. An idle engine is left alone.
   */
  #watch(): void {
    if (this.#pinging !== undefined) return
    const look = (isSecond: boolean): void => {
      this.#pinging = undefined
      if (this.#failure || this.#isClosing || !this.#isWaiting) {
        this.#owedSince.clear()
        return
      }
      const now = performance.now()
      const isLoading = this.#ready.size < this.#ranks.ranks.length
      const limit = isLoading ? Math.max(this.#timeoutMs, loadSilenceMs) : this.#timeoutMs
      const late = [...this.#owedSince].filter(([, since]) => now - since >= limit).map(([rank]) => rank)
      if (late.length > 0 && isSecond) {
        this.#giveUp(late, limit)
        return
      }
      for (const { rank } of this.#ranks.ranks) {
        if (this.#owedSince.has(rank)) continue
        this.#owedSince.set(rank, now)
        this.#send(rank, { type: 'ping' })
      }
      const next = late.length > 0 ? secondLookMs : Math.min(pingMs, this.#timeoutMs / 4)
      this.#pinging = setTimeout(look, next, late.length > 0).unref()
    }
    look(false)
  }

  #giveUp(lateRanks: readonly number[], elapsedMs: number): void {
    const recording = this.#ranks.recording()
    const stood = lateRanks.map((rank) => {
      const last = recording.find((one) => one.rank === rank)?.rows.at(-1)
      const where = last ? ` after sequence ${String(last.sequence)} (${last.operation})` : ''
      return `rank ${String(rank)} (process ${String(this.#ranks.ranks[rank]?.pid)} on ${hostname()})${where}`
    })
    const text = `no sign of life for ${String(elapsedMs)} ms from ${stood.join(', ')}`
    this.#fail(new InferenceError('ERR_TIMEOUT', text, { lateRanks, elapsedMs }), recording)
  }

  #send(rank: number, message: ToRank): void {
    const child = this.#ranks.ranks[rank]?.child
    if (child?.connected) child.send(message, () => undefined) // a rank that is gone is found out by its exit
  }

  #receive(rank: number, message: FromRank): void {
    this.#owedSince.delete(rank)
    switch (message.type) {
      case 'pong':
        return
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
        this.#judgeSoon()
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

  #judgeSoon(): void {
    if (this.#failure) return
    this.#judging ??= setTimeout(() => {
      this.#judge()
    }, judgeAfterMs)
  }

  /** One cause for all: a death by signal, else a failure that is not the echo of another's, else whatever came first. */
  #judge(exit: RankExit | undefined = this.#ranks.exits.find((e) => e.exitCode !== 0) ?? this.#ranks.exits[0]): void {
    if (this.#failure) return
    const recording = this.#ranks.recording()
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
      // What it did last, where its arena tells.
      const last = recording.find(({ rank }) => rank === exit?.rank)?.rows.at(-1)
      const error = new InferenceError(
        'ERR_PEER_LOST',
        `rank ${String(exit?.rank ?? '?')} ${how} (process ${String(exit?.pid ?? '?')}) on ${hostname()}` +
          (last ? ` at sequence ${String(last.sequence)} (${last.operation})` : ''),
        {
          rank: exit?.rank,
          host: hostname(),
          pid: exit?.pid,
          signal: exit?.signal,
          exitCode: exit?.exitCode,
          ...(last ? { operation: last.operation, sequence: last.sequence, step: last.step } : {}),
        },
        { cause: this.#failures[0]?.error },
      )
      this.#fail(error, recording)
    } else {
      const { rank = first.rank } = first.error as { rank?: unknown }
      this.#fail(Object.assign(first.error, { rank }), recording)
    }
  }

  #fail(error: unknown, recording: Recording = []): void {
    if (this.#failure) return
    this.#failure = { error }
    if (error instanceof Error && 'code' in error && isBetweenRanks(error.code) && recording.length > 0) {
      Object.assign(error, { recorder: excerptOf(recording) })
      this.#write(recording)
    }
    clearTimeout(this.#judging)
    clearTimeout(this.#pinging)
    this.#ranks.stop()
    this.#onFailure?.(error)
    for (const sink of this.#sinks.values()) sink.fail(error)
    for (const { reject } of this.#reports.values()) reject(error)
    this.#sinks.clear()
    this.#reports.clear()
    this.#onIdle?.()
  }

  /** The whole recording, where the user names a file for it. */
  #write(recording: Recording): void {
    const path = process.env[recorderVariable] ?? ''
    if (path === '') return
    try {
      writeRecording(path, recording)
    } catch (error) {
      process.emitWarning(`${recorderVariable}: ${error instanceof Error ? error.message : String(error)}`)
    }
  }

  submit(request: Request, sink: TokenSink): RequestHandle {
    if (this.#failure) throw this.#failure.error
    checkRequest(request, this.#checkpoint.arch, this.#limits)
    const number = this.#requests++
    this.#sinks.set(number, sink)
    this.#send(0, { type: 'submit', request: number, asked: request })
    this.#watch()
    return {
      abort: () => {
        if (this.#sinks.has(number)) this.#send(0, { type: 'abort', request: number })
      },
    }
  }

  async reports(): Promise<readonly RankReport[]> {
    if (this.#failure) throw this.#failure.error
    const reports = Promise.all(
      this.#ranks.ranks.map(
        ({ rank }) =>
          new Promise<RankReport>((resolve, reject) => {
            const call = this.#calls++
            this.#reports.set(call, { resolve, reject })
            this.#send(rank, { type: 'report', call })
          }),
      ),
    )
    this.#watch()
    return await reports
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
    clearTimeout(this.#pinging)
    for (const { rank } of this.#ranks.ranks) this.#send(rank, { type: 'close' })
    const timer = setTimeout(
      () => {
        this.#ranks.stop()
      },
      Math.min(closeGraceMs, this.#timeoutMs),
    )
    if (this.#ranks.isAlive) await this.#ranks.done
    clearTimeout(timer)
    const exit = this.#ranks.exits.find((e) => e.exitCode !== 0)
    if (exit) this.#judge(exit)
  }
}
