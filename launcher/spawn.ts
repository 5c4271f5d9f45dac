// The one place where ranks are started: for tp-launch and for an engine inside a script. Each rank goes through tilerank-exec, which
// binds it, gives it a process group and ties its life to ours before its first thread exists. Each inherits its own listening
// socket, bound here under the job's nonce. The first failure ends all others: TERM at once to all, KILL after a grace.

import { type ChildProcess, type StdioOptions, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { closeSync, existsSync, readFileSync, readdirSync } from 'node:fs'
import { createServer } from 'node:net'
import { dirname, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { placeVariables, recorderVariable, type Recording } from '../collectives/index.js'
import { AddonError, addonPaths, nativeAddon, packageRoot } from '../native/index.js'
import type { RankBinding } from './binding.js'
import { LauncherError } from './errors.js'
import { formatCpuList } from './topology.js'

export interface SpawnOptions {
  /** A URL, or a path that ends like a script, runs with this Node; any other string is a command, looked up in PATH. */
  readonly entry: string | URL
  readonly args?: readonly string[]
  readonly worldSize: number
  /** Of planBinding().ranks, or only core lists; empty: no rank is bound. */
  readonly cores: readonly (RankBinding | readonly number[])[]
  /** The environment of all ranks, instead of this process's. The variables of a rank are added. */
  readonly env?: NodeJS.ProcessEnv
  /** More variables for one rank. */
  readonly rankEnv?: (rank: number) => NodeJS.ProcessEnv
  /** 32 hex digits that name the job; a random one if absent. */
  readonly nonce?: string
  /** Of rank 0; other ranks have none. */
  readonly stdin?: 'ignore' | 'inherit' | 'pipe'
  readonly stdout?: 'inherit' | 'pipe' | 'ignore'
  readonly stderr?: 'inherit' | 'pipe' | 'ignore'
  /** A channel for process.send() and 'message', with structured clone (typed arrays, Errors, BigInt). Node ranks only. */
  readonly ipc?: boolean
  /** Options of Node itself for script entries. */
  readonly execArgv?: readonly string[]
  readonly cwd?: string
  /** From TERM to KILL. */
  readonly graceMs?: number
}

export interface RankExit {
  readonly rank: number
  readonly pid: number
  readonly exitCode: number | null
  readonly signal: NodeJS.Signals | null
}

export interface RankProcess {
  readonly rank: number
  readonly pid: number
  readonly child: ChildProcess
}

export const defaultGraceMs = 2000

/**
 * Settings of OpenMP runtimes that would move threads away from where the plan puts them; what names a rank of another launcher, which may
 * have started this one; and the name of the file that whoever starts the ranks writes, once.
 */
const removedVariables = new Set([
  'KMP_AFFINITY',
  'GOMP_CPU_AFFINITY',
  'OMP_PLACES',
  'OMP_PROC_BIND',
  ...placeVariables,
  recorderVariable,
])

const noncePattern = /^[0-9a-f]{32}$/
const scriptSuffixes = new Set(['.js', '.mjs', '.cjs', '.ts', '.mts', '.cts'])

export const createNonce = (): string => randomBytes(16).toString('hex')

/** What a shell would report: the exit code, or 128 + the signal's number. */
export function shellCode(
  { exitCode, signal }: Pick<RankExit, 'exitCode' | 'signal'>,
  numbers: Readonly<Record<string, number>>,
): number {
  if (exitCode !== null) return exitCode
  return signal === null ? 1 : 128 + (numbers[signal] ?? 0)
}

/** `exit code 7`, `signal SIGKILL`. */
export function describeExit({ exitCode, signal }: Pick<RankExit, 'exitCode' | 'signal'>): string {
  return signal === null ? `exit code ${exitCode ?? 'unknown'}` : `signal ${signal}`
}

/** The ranks of one job. */
export class RankSet {
  readonly nonce: string
  readonly ranks: readonly RankProcess[]
  /** Settles when all ranks have ended: with the first failure, or undefined if there was none. Never rejects. */
  readonly done: Promise<RankExit | undefined>
  /** Settles at the first failure, before the others have ended; never if there is none. */
  readonly failed: Promise<RankExit>

  readonly #graceMs: number
  readonly #archive: NativeArchive | undefined
  #recording: Recording | undefined
  readonly #alive: Set<RankProcess>
  readonly #events = new EventEmitter()
  readonly #exits: RankExit[] = []
  /** Groups that outlive their rank. */
  readonly #leftovers = new Set<number>()
  #firstFailure: RankExit | undefined
  #isStopping = false
  #isKilling = false
  #killTimer: NodeJS.Timeout | undefined

  /** @internal use spawnRanks */
  constructor(nonce: string, ranks: readonly RankProcess[], graceMs: number, archive: NativeArchive | undefined) {
    this.nonce = nonce
    this.#archive = archive
    this.ranks = ranks
    this.#graceMs = graceMs
    this.#alive = new Set(ranks)
    this.done = once(this.#events, 'done').then(() => this.#firstFailure)
    this.failed = new Promise((resolve) => this.#events.once('failed', resolve))
    for (const rank of ranks) {
      rank.child.once('exit', (exitCode, signal) => this.#ended(rank, exitCode, signal))
    }
  }

  get isAlive(): boolean {
    return this.#alive.size > 0
  }

  /** Exits so far, in the order in which they were seen. */
  get exits(): readonly RankExit[] {
    return this.#exits
  }

  /**
   * The flight recorder of the groups of this job that are not closed: what each rank did last, as it stood at the first failure,
   * or stands now where there was none.
   */
  recording(): Recording {
    return this.#recording ?? this.#archive?.read() ?? []
  }

  /** Sends a signal to every rank that lives, and to whatever it has started. */
  signal(signal: NodeJS.Signals): void {
    for (const { pid, child } of this.#alive) if (!signalGroup(pid, signal)) child.kill(signal)
  }

  /** TERM (or another signal) to all ranks at once, KILL to those left after the grace. */
  stop(signal: NodeJS.Signals = 'SIGTERM'): void {
    if (this.#isStopping || !this.isAlive) return
    this.#isStopping = true
    this.signal(signal)
    this.signal('SIGCONT') // a stopped process acts on a signal only when it goes on
    this.#killTimer = setTimeout(() => this.kill(), this.#graceMs)
  }

  /** KILL, at once. */
  kill(): void {
    this.#isStopping = true
    this.#isKilling = true
    this.signal('SIGKILL')
  }

  /** Ends all ranks, with the grace, and waits until they have. Idempotent. */
  async close(): Promise<void> {
    this.stop()
    if (this.isAlive) await this.done
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }

  #ended(rank: RankProcess, exitCode: number | null, signal: NodeJS.Signals | null): void {
    this.#alive.delete(rank)
    this.#exits.push({ rank: rank.rank, pid: rank.pid, exitCode, signal })
    // Whatever the rank started and left behind is still in its group; an empty group's number may soon be somebody else's.
    if (signalGroup(rank.pid, this.#isKilling ? 'SIGKILL' : 'SIGTERM')) this.#leftovers.add(rank.pid)
    // Deaths that are seen in one turn of the event loop come in rank order, not in time: judge them together.
    if (exitCode !== 0 && !this.#isStopping) setImmediate(() => this.#judge())
    if (this.#alive.size === 0) setImmediate(() => this.#finish())
  }

  /** A rank that a signal ended was the cause of what its peers then reported with an exit code. */
  #judge(): void {
    if (this.#firstFailure !== undefined || this.#isStopping) return
    const failures = this.#exits.filter((exit) => exit.exitCode !== 0)
    this.#firstFailure = failures.find((exit) => exit.signal !== null) ?? failures[0]
    this.#recording = this.#archive?.read() ?? []
    this.#events.emit('failed', this.#firstFailure)
    this.stop()
  }

  #finish(): void {
    clearTimeout(this.#killTimer)
    for (const pid of this.#leftovers) signalGroup(pid, 'SIGKILL')
    this.#leftovers.clear()
    this.#recording ??= this.#archive?.read()
    this.#archive?.close()
    this.#events.emit('done')
  }
}

/** False when the group does not stand yet (the rank has just been forked), or no more. */
function signalGroup(pid: number, signal: NodeJS.Signals): boolean {
  try {
    return process.kill(-pid, signal)
  } catch {
    return false
  }
}

/** Starts `worldSize` ranks; rejects, with none left, when one cannot be started. */
export async function spawnRanks(options: SpawnOptions): Promise<RankSet> {
  const { worldSize, cores, nonce = createNonce() } = options
  if (!Number.isSafeInteger(worldSize) || worldSize < 1) {
    throw new LauncherError('ERR_INVALID_OPTION', `worldSize must be a positive integer, not ${worldSize}`, {
      worldSize,
    })
  }
  if (cores.length !== 0 && cores.length !== worldSize) {
    throw new LauncherError(
      'ERR_INVALID_OPTION',
      `core lists for ${cores.length} ranks, but worldSize is ${worldSize}`,
      { worldSize },
    )
  }
  if (!noncePattern.test(nonce)) throw new LauncherError('ERR_INVALID_OPTION', 'the nonce of a job is 32 hex digits')
  const helper = execHelper()
  const given = Object.entries(options.env ?? process.env)
  const base: NodeJS.ProcessEnv = Object.fromEntries(given.filter(([name]) => !removedVariables.has(name)))
  const masterPort = base['MASTER_PORT'] ?? String(await freePort())

  const ranks: RankProcess[] = []
  let archive: NativeArchive | undefined
  try {
    // A rank alone shares nothing that could be kept.
    if (worldSize > 1) archive = openArchive(nonce, worldSize)
    for (let rank = 0; rank < worldSize; rank++) {
      const binding = cores[rank]
      const socket = bindRankSocket(nonce, rank)
      try {
        const env = {
          ...base,
          ...rankVariables({ rank, worldSize, nonce, masterPort, base, binding }),
          ...options.rankEnv?.(rank),
        }
        ranks.push({ rank, ...startRank(options, helper, rank, binding, socket, env) })
      } finally {
        closeSync(socket) // the rank has its own copy
      }
    }
    await Promise.all(ranks.map(({ child }) => started(child)))
  } catch (cause) {
    archive?.close()
    for (const { child } of ranks) child.kill('SIGKILL')
    if (cause instanceof LauncherError || cause instanceof AddonError) throw cause
    throw new LauncherError(
      'ERR_SPAWN_FAILED',
      `rank ${ranks.length} cannot be started: ${describe(cause)}`,
      {},
      { cause },
    )
  }
  return new RankSet(nonce, ranks, options.graceMs ?? defaultGraceMs, archive)
}

const describe = (cause: unknown): string => (cause instanceof Error ? cause.message : String(cause))

/** Resolves when the process stands; a program that does not exist is found out by tilerank-exec, later (exit code 127). */
async function started(child: ChildProcess): Promise<void> {
  if (child.pid !== undefined) return
  const [error] = (await once(child, 'error')) as [unknown]
  throw error
}

function startRank(
  options: SpawnOptions,
  helper: string,
  rank: number,
  binding: SpawnOptions['cores'][number] | undefined,
  socket: number,
  env: NodeJS.ProcessEnv,
): { pid: number; child: ChildProcess } {
  const {
    entry,
    args = [],
    execArgv = [],
    stdin = 'ignore',
    stdout = 'inherit',
    stderr = 'inherit',
    ipc = false,
  } = options
  const script = entry instanceof URL ? fileURLToPath(entry) : scriptSuffixes.has(extname(entry)) ? entry : undefined
  const command = script === undefined ? [String(entry)] : [process.execPath, ...execArgv, script]
  const { cpus, nodes } = binding === undefined ? { cpus: [], nodes: [] } : maskOf(binding)
  const lists = [cpus, nodes].map((list) => (list.length === 0 ? '-' : formatCpuList(list)))
  const streams: StdioOptions = [
    rank === 0 ? stdin : 'ignore',
    stdout,
    stderr,
    socket,
    ...(ipc ? ['ipc' as const] : []),
  ]
  const child = spawn(helper, [String(process.pid), ...lists, '--', ...command, ...args], {
    env,
    stdio: streams,
    ...(ipc ? { serialization: 'advanced' as const } : {}),
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  })
  return { pid: child.pid ?? -1, child }
}

function maskOf(binding: SpawnOptions['cores'][number]): { cpus: readonly number[]; nodes: readonly number[] } {
  return isBinding(binding) ? binding : { cpus: binding, nodes: [] }
}

const isBinding = (binding: SpawnOptions['cores'][number]): binding is RankBinding => 'cores' in binding

/** Descriptor of the rank's own listening socket: the first behind stdin, stdout and stderr. */
const socketFd = 3

interface RankPlace {
  readonly rank: number
  readonly worldSize: number
  readonly nonce: string
  readonly masterPort: string
  readonly base: NodeJS.ProcessEnv
  readonly binding: SpawnOptions['cores'][number] | undefined
}

/** Ours, and those that Python tools started from a rank expect. The nonce is readable by this user only, as the environment is. */
function rankVariables({ rank, worldSize, nonce, masterPort, base, binding }: RankPlace): NodeJS.ProcessEnv {
  const cores = binding === undefined ? [] : isBinding(binding) ? binding.cores : binding
  return {
    RANK: String(rank),
    WORLD_SIZE: String(worldSize),
    LOCAL_RANK: String(rank),
    LOCAL_WORLD_SIZE: String(worldSize),
    LOCAL_SIZE: String(worldSize),
    MASTER_ADDR: base['MASTER_ADDR'] ?? '127.0.0.1',
    MASTER_PORT: masterPort,
    TILERANK_JOB: nonce,
    TILERANK_SOCKET_FD: String(socketFd),
    ...(cores.length === 0
      ? {}
      : { TILERANK_CORES: formatCpuList(cores), OMP_NUM_THREADS: base['OMP_NUM_THREADS'] ?? String(cores.length) }),
  }
}

/** A port that nobody has now, for tools of the ranks that want MASTER_PORT; our own collectives use none inside a node. */
async function freePort(): Promise<number> {
  const server = createServer()
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  server.close()
  await once(server, 'close')
  return typeof address === 'object' && address !== null ? address.port : 0
}

/** A function of the addon; its result is checked by the caller. */
function addonExport(name: string): (...args: readonly unknown[]) => unknown {
  const addon = nativeAddon()
  const found: unknown = typeof addon === 'object' && addon !== null ? Reflect.get(addon, name) : undefined
  if (typeof found !== 'function') {
    throw new LauncherError(
      'ERR_ADDON_MISMATCH',
      'the addon does not fit this package: run `npx tilerank build --force`',
    )
  }
  return (...args): unknown => Reflect.apply(found, addon, args)
}

function bindRankSocket(nonce: string, rank: number): number {
  const fd = addonExport('bindRankSocket')(nonce, rank)
  if (typeof fd !== 'number') throw new LauncherError('ERR_ADDON_MISMATCH', 'bindRankSocket gave no descriptor')
  return fd
}

/** Takes a child that has ended off the list of processes; one that lives is left alone. */
export function reap(pid: number): void {
  addonExport('reap')(pid)
}

/** Children of this process, those that it has inherited included. */
export function childProcesses(): number[] {
  try {
    return readdirSync('/proc/self/task').flatMap((task) =>
      readFileSync(`/proc/self/task/${task}/children`, 'utf8').split(' ').filter(Boolean).map(Number),
    )
  } catch {
    return [] // a kernel without that list, or a thread that has just ended
  }
}

/** Keeps the arenas of a job's ranks, for the flight recorder. */
interface NativeArchive {
  read(limit?: number): Recording
  close(): void
}

const isArchiveClass = (found: unknown): found is new (nonce: string, worldSize: number) => NativeArchive =>
  typeof found === 'function'

function openArchive(nonce: string, worldSize: number): NativeArchive {
  const addon = nativeAddon()
  const found: unknown = typeof addon === 'object' && addon !== null ? Reflect.get(addon, 'Archive') : undefined
  if (!isArchiveClass(found)) {
    throw new LauncherError('ERR_ADDON_MISMATCH', 'the addon has no Archive: run `npx tilerank build --force`')
  }
  return new found(nonce, worldSize)
}

/** tilerank-exec is built with the addon and stands beside it. */
export function execHelper(): string {
  const candidates = [
    ...addonPaths().map((path) => join(dirname(path), 'tilerank-exec')),
    join(packageRoot, 'build/Release/tilerank-exec'),
  ]
  const found = candidates.find((path) => existsSync(path))
  if (found !== undefined) return found
  throw new AddonError(
    'ERR_ADDON_MISSING',
    `tilerank-exec has not been built: run \`npx tilerank build\` (looked for ${candidates.join(', ')})`,
    candidates,
  )
}
