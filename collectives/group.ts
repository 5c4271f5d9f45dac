// Group: the ranks of one job that talk to each other. Arguments are checked here, before any shared memory is touched; then it is
// one native call. The ...Sync verbs block their caller and are the fastest; the others fix their order at the call and never
// hold the event loop. A group belongs to one process; two groups of a process are told apart by the order of their creation.

import { createHash } from 'node:crypto'
import { debuglog } from 'node:util'
import { elementBytes, type CollectiveDType, type DType, type Shape } from '../native/types.js'
import {
  AlgorithmTable,
  defaultRules,
  environmentRules,
  optionRules,
  parseTunedText,
  readTuned,
  termsOf,
  tunedFor,
  tunedPath,
  tunedText,
  type AlgorithmRule,
  type Explanation,
  type MemoryKind,
  type OperationName,
  type Rules,
  type Shape as TableShape,
  type Wire,
} from './algorithms.js'
import {
  algorithms,
  createCommunicator,
  leaveJob,
  dtypeCodes,
  operations,
  reductions,
  renewals,
  wires,
  type Connected,
  type NativeBatch,
  type NativeCall,
  type NativeCommunicator,
  type NativeMessage,
  type NativeSendRecv,
  type NativeStatistics,
  type TypedArray,
} from './communicator.js'
import { defaultTimeoutMs, placeVariables, readRankEnvironment, type Environment, type RankEnvironment } from './env.js'
import { CollectiveError, fromNative, invalid } from './errors.js'
import { joinMpi, readTransport } from './mpi.js'
import { joinNetwork, type Joined, type NetworkOptions } from './network.js'
import { Batch } from './batch.js'
import { broadcastObject, exchangeCounts, gatherObjects, type Exchange } from './objects.js'
import { allRows, excerptOf, recorderVariable, writeRecording, type Recording } from './recorder.js'
import { formatStats, statsBetween, statsVariable, type GroupStats } from './stats.js'
import { traceOfCalls, tracePath, traceVariable, writeTrace } from './trace.js'
import { agreeOnRanks, checkSplit, checkSubgroup, type SplitChoice, type Wish } from './subgroups.js'
import { dtypeOfArray, Tensor, type Plan } from './tensor.js'

/** NODE_DEBUG=tilerank: what was chosen when ranks join, and each failure; never where time counts. */
const debug = debuglog('tilerank')

export type AllReduceAlgorithm = keyof typeof algorithms
export type ReduceOp = keyof typeof reductions

/** Memory that a collective works on: a tensor of the group, or a typed array; a Uint16Array with `dtype`. */
export type GroupData = Tensor | TypedArray

export interface GroupOptions extends NetworkOptions {
  /** Which rank of how many this process is; both, or neither: then the launcher's variables say it. */
  readonly rank?: number
  readonly worldSize?: number
  /** Variables of the rank; process.env when left out. */
  readonly env?: Readonly<Record<string, string | undefined>>
  /** Deadline of joining and of every operation that names none: TILERANK_TIMEOUT_MS, else 60 000. */
  readonly timeoutMs?: number
  /** Bytes of a slot, a multiple of 64; two of them a rank. Large data passes through in chunks. */
  readonly slotBytes?: number
  /** Bytes that data outside of tensors moves at a time, a multiple of 64, at most slotBytes. */
  readonly chunkBytes?: number
  /**
   * How the sums and means that allReduce makes of f32, bf16 and f16 travel between nodes: 'exact', or 'q8', groups of 32 elements with one scale. All
   * else, and whatever stays in a node, is exact. The same on all ranks. 'exact' when left out.
   */
  readonly wire?: Wire
  /** Which algorithm for what, before TILERANK_ALGORITHM and whatever was measured: rules, or such a text. The same on all ranks. */
  readonly algorithms?: readonly AlgorithmRule[] | string
  /** How long a wait looks before it sleeps; 0 where ranks outnumber cores, 100 otherwise. */
  readonly spinUs?: number
  /** Count the latency of every call for stats(): two looks at the processor's counter, 20 ns. Or TILERANK_STATS=1, which prints it at the end. */
  readonly stats?: boolean
  /**
   * Writes a trace for Perfetto when the group closes or fails: FILE.json becomes FILE.RANK.json. The last 65 536 calls, whose times are then read
   * for every sequence: 50 ns a call. Or TILERANK_TRACE=DIR.
   */
  readonly trace?: string
  /** NUMA nodes whose memory this rank's arena and tensors are bound to. */
  readonly numaNodes?: readonly number[]
}

/** Of a group that is made of another's ranks; what is left out is that one's, but for the trace file. */
export type MadeOptions = Pick<GroupOptions, (typeof madeKeys)[number]>

export interface SyncOptions {
  /** bf16 or f16: must be said of a Uint16Array; other types say theirs. */
  readonly dtype?: CollectiveDType
  readonly timeoutMs?: number
}

export interface AsyncOptions extends SyncOptions {
  /** Aborting rejects here with signal.reason, and breaks the group: peers reject with ERR_ABORTED. */
  readonly signal?: AbortSignal
}

type ObjectSyncOptions = Omit<SyncOptions, 'dtype'>
type ObjectOptions = Omit<AsyncOptions, 'dtype'>

export interface ReduceChoice {
  /** 'sum' when left out; the same on all ranks. band, bor and bxor are for integers. */
  readonly op?: ReduceOp
}

export interface AllReduceChoice extends ReduceChoice {
  /** 'auto' is measured; a fixed one must be the same on all ranks. */
  readonly algorithm?: AllReduceAlgorithm
  /** The group's when left out; the same on all ranks. 'q8' is for sum and avg of f32, bf16 and f16. */
  readonly wire?: Wire
}

export interface RootChoice {
  /** The rank that all data comes from, or goes to; 0 when left out. */
  readonly root?: number
}

export interface CountsChoice {
  /** [worldSize] elements of each rank's part, where they are not all alike; the same on all ranks. */
  readonly counts?: readonly number[]
}

export interface OutputChoice<T extends GroupData> {
  /** Takes the result, as long as data, which stays as it is; it may not overlap data, unless it is the same. */
  readonly output?: T | undefined
}

/** Parts of any sizes, for any pair of ranks: both lists, or neither. */
export interface AllToAllChoice {
  /** [worldSize] elements that go to each rank: data holds them one after the other. */
  readonly counts?: readonly number[]
  /** [worldSize] elements that come from each rank. */
  readonly outputCounts?: readonly number[]
}

export interface ToChoice {
  /** The rank that a message goes to. */
  readonly to: number
}

export interface FromChoice {
  /** The rank that a message comes from. */
  readonly from: number
}

interface Choices extends AllReduceChoice, RootChoice, CountsChoice, OutputChoice<GroupData> {}

/** Who passes what - all, the root, none, or whoever likes - and the options beside dtype, timeoutMs and signal. */
const signatures = {
  barrier: { data: 'none', output: 'none', options: [] },
  allReduce: { data: 'all', output: 'any', options: ['op', 'algorithm', 'wire', 'output'] },
  reduce: { data: 'all', output: 'anyRoot', options: ['op', 'root', 'output'] },
  broadcast: { data: 'all', output: 'none', options: ['root'] },
  allGather: { data: 'all', output: 'all', options: ['counts'] },
  gather: { data: 'all', output: 'root', options: ['root', 'counts'] },
  scatter: { data: 'root', output: 'all', options: ['root', 'counts'] },
  reduceScatter: { data: 'all', output: 'all', options: ['op', 'counts'] },
  allToAll: { data: 'all', output: 'all', options: [] },
} as const satisfies Record<keyof typeof operations, object>

const defaultSlotBytes = 1 << 20
const madeKeys = [
  'timeoutMs',
  'slotBytes',
  'chunkBytes',
  'wire',
  'algorithms',
  'spinUs',
  'stats',
  'trace',
  'numaNodes',
] as const

const ranksBelow = (worldSize: number): number[] => Array.from({ length: worldSize }, (_, rank) => rank)

const optionsOf = new Map<string, readonly string[]>(
  Object.entries(signatures).map(([name, { options }]) => [
    name,
    [...(name === 'barrier' ? [] : ['dtype']), 'timeoutMs', ...options],
  ]),
)

function checkKeys(options: object, allowed: readonly string[], what: string, extra: readonly string[] = []): void {
  for (const key of Object.keys(options)) {
    if (allowed.includes(key) || extra.includes(key)) continue
    throw invalid(`${what} has no option '${key}'; it knows ${[...allowed, ...extra].join(', ')}`)
  }
}

function checkGiven(name: string, what: string, who: string, given: unknown, isRoot: boolean): void {
  if (given === undefined) {
    if (who === 'all') throw invalid(`${name} needs ${what}`)
    if (who === 'root' && isRoot) throw invalid(`${name} needs ${what} on its root`)
  } else if (!isRoot && (who === 'root' || who === 'anyRoot')) throw invalid(`${name} takes ${what} on its root only`)
}

function checkTimeout(timeoutMs: number): number {
  if (Number.isInteger(timeoutMs) && timeoutMs >= 1 && timeoutMs < 2 ** 31) return timeoutMs
  throw invalid(`timeoutMs is ${String(timeoutMs)}, expected is an integer from 1 to ${String(2 ** 31 - 1)}`)
}

function checkMultiple(name: string, value: number): number {
  if (Number.isSafeInteger(value) && value >= 64 && value % 64 === 0) return value
  throw invalid(`${name} is ${String(value)}, expected is a positive multiple of 64`)
}

function checkWire(wire: Wire): Wire {
  if (Object.hasOwn(wires, wire)) return wire
  throw invalid(`wire is '${wire}', expected is 'exact' or 'q8'`)
}

/** Why a call cannot travel as q8; undefined: it can. */
function wireObstacle(name: keyof typeof operations, dtype: CollectiveDType, op: ReduceOp): string | undefined {
  if (name !== 'allReduce') return `${name} travels as it is`
  if (dtype !== 'f32' && dtype !== 'bf16' && dtype !== 'f16') return `it is for f32, bf16 and f16, not for ${dtype}`
  return op === 'sum' || op === 'avg' ? undefined : `it is for sum and avg, not for ${op}`
}

/** Of one tensor: a look at one takes a few ns. */
const maxPlans = 64

/** The plan of this very call, option by option: an option more or less is another call. */
function findPlan(
  plans: readonly Plan[],
  name: string,
  data: GroupData | undefined,
  output: GroupData | undefined,
  options: (SyncOptions & Choices) | undefined,
): Plan | undefined {
  let count = 0
  for (const _ in options) count++
  for (const plan of plans) {
    if (plan.name !== name || plan.data !== data || plan.output !== output || plan.options !== count) continue
    if (options === undefined || count === 0) return plan
    const isSame =
      plan.root === options.root &&
      plan.op === options.op &&
      plan.algorithm === options.algorithm &&
      plan.wire === options.wire &&
      plan.dtype === options.dtype &&
      plan.timeoutMs === options.timeoutMs
    if (isSame) return plan
  }
  return undefined
}

/** Checks what TypeScript cannot: kinds of memory, and that a Uint16Array's dtype was said. */
function dtypeOf(data: TypedArray, dtype: CollectiveDType | undefined, what: string): CollectiveDType {
  const given: unknown = data
  const own = dtypeOfArray(given)
  if (own === undefined) {
    const kind = given === null ? 'null' : typeof given === 'object' ? given.constructor.name : typeof given
    throw invalid(
      `${what} is a ${kind}; collectives take a tensor of group.alloc, or a Float32Array, Float64Array, Int8Array, Uint8Array, Int32Array, Uint32Array, BigInt64Array, BigUint64Array, or a Uint16Array with { dtype: 'bf16' } or { dtype: 'f16' }`,
    )
  }
  const buffer: ArrayBufferLike & { readonly resizable?: boolean } = data.buffer
  if (!(buffer instanceof ArrayBuffer)) {
    throw invalid(
      `${what} lies in a SharedArrayBuffer, which other threads may write meanwhile: copy it, or use group.alloc`,
    )
  }
  if (buffer.resizable === true)
    throw invalid(`${what} lies in a resizable ArrayBuffer, which may shrink meanwhile: copy it, or use group.alloc`)
  if (own === 'half') {
    if (dtype === 'bf16' || dtype === 'f16') return dtype
    if (dtype === undefined) throw invalid(`${what} is a Uint16Array: say { dtype: 'bf16' } or { dtype: 'f16' }`)
    throw invalid(`${what} is a Uint16Array, which holds bf16 or f16, but dtype is '${dtype}'`)
  }
  if (dtype !== undefined && dtype !== own) {
    throw invalid(`${what} is a ${data.constructor.name}, which holds ${own}, but dtype is '${dtype}'`)
  }
  return own
}

/** What the addon takes for it. */
const memoryOf = (data: GroupData): number | TypedArray => (data instanceof Tensor ? data.id : data)

/**
 * Joins the ranks of this job; resolves when all have come. Without a launcher's variables it is a group of one.
 * May be called again: every rank makes the same groups in the same order.
 * @throws CollectiveError ERR_ENVIRONMENT, ERR_TIMEOUT naming the missing ranks, ERR_MISMATCH, ERR_NO_MEMORY
 */
export async function createGroup(options: GroupOptions = {}): Promise<Group> {
  checkKeys(
    options,
    ['env', ...madeKeys, 'rank', 'worldSize', 'transport', 'store', 'interface', 'encryption', 'secret', 'frameBytes'],
    'createGroup',
  )
  return openGroup({ ...options, lanes: 1, terms: '', isTabled: true })
}

interface OpenOptions extends GroupOptions {
  readonly lanes: number
  readonly terms: string
  /** Chooses algorithms: the runner has its own. */
  readonly isTabled: boolean
  /** In the place of slotBytes, where it depends on the nodes that ranks turn out to be on. */
  readonly slotBytesOn?: (nodes: readonly (readonly number[])[]) => number
}

function checkSizes(options: GroupOptions): { readonly timeoutMs: number; readonly slotBytes: number } {
  const timeoutMs = checkTimeout(options.timeoutMs ?? defaultTimeoutMs(options.env ?? process.env))
  const slotBytes = checkMultiple('slotBytes', options.slotBytes ?? defaultSlotBytes)
  const { chunkBytes } = options
  if (options.wire !== undefined) checkWire(options.wire)
  if (chunkBytes !== undefined && checkMultiple('chunkBytes', chunkBytes) > slotBytes)
    throw invalid(`chunkBytes is ${chunkBytes}, more than slotBytes, ${slotBytes}`)
  return { timeoutMs, slotBytes }
}

/** Options that ranks must agree on, where they were given. */
function sharedTerms({ chunkBytes, wire = 'exact' }: GroupOptions): string[] {
  return [
    ...(chunkBytes === undefined ? [] : [`chunks of ${chunkBytes}`]),
    ...(wire === 'exact' ? [] : [`wire ${wire}`]),
  ]
}

interface FoundRules {
  readonly option: Rules
  readonly environment: Rules
  readonly tuned: () => readonly AlgorithmRule[]
}

/** What ranks of several nodes must agree on. */
function jobTerms(options: OpenOptions, slotBytes: number, { option, environment }: FoundRules): string {
  const own = options.isTabled ? termsOf(option, environment) : [options.terms]
  return [`slots of ${slotBytes}`, ...sharedTerms(options), ...own].join(', ')
}

/** All that may choose an algorithm, as this process finds it. */
function readRules(options: OpenOptions, env: Environment, ranks: number): FoundRules {
  const option = optionRules(options.algorithms, options.chunkBytes)
  const environment = environmentRules(env)
  const key = tunedFor(ranks)
  const path = option.isDefault || environment.isDefault ? undefined : tunedPath(key, env)
  return { option, environment, tuned: () => (path === undefined ? [] : (readTuned(path, key)?.rules ?? [])) }
}

/** Ranks of a node compare what it comes to; those of several have compared all but the measured rules, which are rank 0's. */
function readTable(options: OpenOptions, env: Environment, shape: TableShape, job: Job): AlgorithmTable {
  const { option, environment, tuned } = readRules(options, env, shape.ranks)
  // Of smaller groups rank 0 has not told any.
  const shared = (): readonly AlgorithmRule[] =>
    shape.ranks === job.worldSize ? parseTunedText(job.joined?.tuned ?? '') : []
  return new AlgorithmTable(
    {
      option: option.rules,
      environment: environment.rules,
      tuned: shape.nodes > 1 ? shared() : tuned(),
      default: defaultRules(shape),
    },
    shape,
  )
}

/** Who this process is: by options, or by the launcher's variables. */
function placeOf(options: GroupOptions, env: Environment): RankEnvironment | undefined {
  const { rank, worldSize, store } = options
  if ((rank === undefined) !== (worldSize === undefined)) throw invalid('rank and worldSize belong together')
  const isSaid = rank !== undefined && worldSize !== undefined
  return readRankEnvironment({
    ...env,
    ...(isSaid ? Object.fromEntries(placeVariables.map((name) => [name, ''])) : {}),
    ...(isSaid ? { RANK: `${rank}`, WORLD_SIZE: `${worldSize}` } : {}),
    ...(store === undefined ? {} : { TILERANK_STORE: store }),
  })
}

/** Who this rank is in its job, which groups that are made of each other share: the last that closes ends its network. */
class Job {
  #users = 0

  constructor(
    readonly nonce: string,
    readonly rank: number,
    readonly worldSize: number,
    readonly socketFd: number,
    readonly joined: Joined | undefined,
  ) {}

  enter(): void {
    this.#users++
  }

  async leave(): Promise<void> {
    if (--this.#users > 0 || this.joined === undefined) return
    leaveJob(this.nonce, this.rank) // the nonce of a job on several nodes is that of one createGroup()
    await this.joined.close()
  }

  /** [nodes][ranks of a group]; members: the job's rank of each. */
  nodesOf(members: readonly number[]): readonly (readonly number[])[] {
    const ranks = [...members.keys()]
    const layout = this.joined?.layout ?? []
    if (layout.length === 0) return [ranks]
    return layout
      .map((node) => ranks.filter((rank) => node.includes(members[rank] ?? -1)))
      .filter((node) => node.length > 0)
      .sort(([a = 0], [b = 0]) => a - b)
  }
}

/** Of a group that is made of another's ranks: what these agreed on. */
interface Descent {
  readonly operation: string
  readonly group: number
  readonly members: readonly number[]
  readonly parent: NativeCommunicator
  readonly isConfirmed: boolean
}

/** What groups that are made of this one start from. */
interface Origin {
  readonly options: OpenOptions
  readonly job: Job
  readonly members: readonly number[]
}

async function openGroup(options: OpenOptions): Promise<Group> {
  const env = options.env ?? process.env
  const isMpi = options.isTabled && readTransport(options.transport, env) === 'mpi' // the runner's frames go by ZeroMQ
  // The MPI knows where its ranks are: no store is asked for.
  const place = placeOf(isMpi ? { ...options, store: 'mpi' } : options, env)
  const { timeoutMs, slotBytes } = checkSizes(options)
  const { rank = 0, worldSize = 1, socketFd = -1, store } = place ?? {}
  let joined: Joined | undefined
  if (isMpi || (place !== undefined && store !== undefined)) {
    const rules = readRules(options, env, worldSize)
    const terms = jobTerms(options, slotBytes, rules)
    const text = rank === 0 && options.isTabled ? tunedText(rules.tuned()) : ''
    try {
      if (isMpi) joined = await joinMpi(place, options, env, terms, text, timeoutMs)
      else if (place !== undefined && store !== undefined)
        joined = await joinNetwork(place, options, store, env, terms, text, timeoutMs)
    } catch (error) {
      throw fromNative(error)
    }
  }
  const { slotBytesOn } = options
  const sized = slotBytesOn === undefined ? options : { ...options, slotBytes: slotBytesOn(joined?.layout ?? []) }
  return connectGroup(sized, new Job(joined?.nonce ?? place?.job ?? '', rank, worldSize, socketFd, joined))
}

/** NODE_DEBUG=tilerank: with what a group is made. */
function tellChoices(options: OpenOptions, job: Job, table: AlgorithmTable, terms: string): void {
  debug(
    'rank %d of %d joins, %s: slots of %d bytes, timeout %d ms, %s%s',
    job.rank,
    job.worldSize,
    job.nonce === '' ? 'without a launcher' : job.socketFd < 0 ? 'on a socket of its own' : `on socket ${job.socketFd}`,
    options.slotBytes ?? defaultSlotBytes,
    options.timeoutMs ?? defaultTimeoutMs(options.env ?? process.env),
    terms,
    options.numaNodes === undefined ? '' : `, memory on NUMA nodes ${options.numaNodes.join()}`,
  )
  for (const { operation, memory, upTo, algorithm, chunkBytes, source } of table.rows) {
    if (source !== 'default' || operation === 'allReduce')
      debug(
        '%s of a%s up to %s: %s, chunks of %d (%s)',
        operation,
        memory === 'tensor' ? ' tensor' : 'n array',
        upTo === Infinity ? 'any size' : `${upTo} bytes`,
        algorithm,
        chunkBytes,
        source,
      )
  }
}

async function connectGroup(options: OpenOptions, job: Job, descent?: Descent): Promise<Group> {
  const { timeoutMs, slotBytes } = checkSizes(options)
  const env = options.env ?? process.env
  const isPrinted = (env[statsVariable] ?? '') !== '' && env[statsVariable] !== '0'
  const folder = env[traceVariable] ?? ''
  const trace = options.trace !== undefined ? { file: options.trace } : folder !== '' ? { folder } : undefined
  if (trace !== undefined && 'file' in trace && (typeof trace.file !== 'string' || trace.file === ''))
    throw invalid('trace is no name of a file')
  const members = descent?.members ?? ranksBelow(job.worldSize)
  const nodes = job.nodesOf(members)
  const shape = { ranks: members.length, nodes: nodes.length, slotBytes }
  job.enter()
  try {
    const table = options.isTabled
      ? readTable(options, env, shape, job)
      : new AlgorithmTable({ default: defaultRules(shape) }, shape)
    // Words first, where there are some: a digest only says that something differs.
    const terms = options.isTabled ? [...sharedTerms(options), `algorithms ${table.digest}`].join(', ') : options.terms
    tellChoices(options, job, table, terms)
    const native = createCommunicator({
      nonce: job.nonce,
      rank: job.rank,
      worldSize: job.worldSize,
      socketFd: job.socketFd,
      lanes: options.lanes,
      slotBytes,
      spinUs: options.spinUs ?? -1,
      table: table.toNative(),
      timeoutMs,
      terms,
      nodes: options.numaNodes ?? [],
      group: descent?.group ?? -1,
      members,
      layout: nodes,
      mailbox: nodes.length > 1 ? job.joined?.mailbox : undefined,
      parent: descent?.parent,
      operation: descent?.operation ?? 'createGroup',
      isConfirmed: descent?.isConfirmed ?? false,
      hasLatency: (options.stats ?? isPrinted) ? 1 : 0,
      isTraced: trace === undefined ? 0 : 1,
    })
    try {
      const start = performance.now()
      const connected = await native.connect()
      debug(
        'rank %d joined group %d in %d ms: spins %d us, arena of %d bytes%s',
        job.rank,
        connected.group,
        Math.round(performance.now() - start),
        connected.spinUs,
        connected.arenaBytes,
        connected.warning === '' ? '' : `; ${connected.warning}`,
      )
      return new Group(native, connected, timeoutMs, table, { options, job, members }, isPrinted, trace)
    } catch (error) {
      native.close()
      throw error
    }
  } catch (error) {
    debug('rank %d did not join: %s', job.rank, error instanceof Error ? error.message : error)
    await job.leave()
    throw fromNative(error, undefined, members)
  }
}

export class Group {
  readonly rank: number
  readonly worldSize: number
  /** The job's rank of each rank of the group. */
  readonly members: readonly number[]
  /** Sentences about what could not be had, such as a refused NUMA binding. */
  readonly warnings: readonly string[]
  /** This rank's shared memory, tensors apart. */
  readonly arenaBytes: number
  /** How long a wait looks before it sleeps. */
  readonly spinUs: number
  /** The group's ranks on each of its nodes. */
  readonly nodes: readonly (readonly number[])[]
  readonly #native: NativeCommunicator
  readonly #timeoutMs: number
  readonly #table: AlgorithmTable
  readonly #number: number
  readonly #isPrinted: boolean
  readonly #tracePath: string | undefined
  #statsFrom = { ms: performance.now(), native: undefined as NativeStatistics | undefined }
  /** What stats() says once the group is closed. */
  #lastStats: GroupStats | undefined
  readonly #origin: Origin
  #last: Promise<unknown> = Promise.resolve()
  /** Messages on their way. */
  readonly #messages = new Set<Promise<unknown>>()
  /** While an operation of several collectives is on its way: settles when the next call may start. */
  #tail: Promise<unknown> | undefined
  #closing: Promise<void> | undefined
  #isRenewing = false
  #isWritten = false
  #hasFailed = false
  /** Of calls without memory. */
  readonly #plans: Plan[] = []

  /** @internal use createGroup */
  constructor(
    native: NativeCommunicator,
    connected: Connected,
    timeoutMs: number,
    table: AlgorithmTable,
    origin: Origin,
    isPrinted: boolean,
    trace: Parameters<typeof tracePath>[0] | undefined,
  ) {
    this.#native = native
    this.#number = connected.group
    this.#isPrinted = isPrinted
    this.#origin = origin
    this.members = origin.members
    this.worldSize = this.members.length
    this.rank = this.members.indexOf(origin.job.rank)
    this.#tracePath = trace === undefined ? undefined : tracePath(trace, origin.job.rank, connected.group)
    this.nodes = origin.job.nodesOf(this.members)
    this.#table = table
    this.#timeoutMs = timeoutMs
    this.warnings = connected.warning === '' ? [] : [connected.warning]
    this.arenaBytes = connected.arenaBytes
    this.spinUs = connected.spinUs
  }

  /** @internal */
  get nonce(): string {
    return this.#origin.job.nonce
  }

  /** The native object, for the runner: whoever takes it owns the group's sequence from then on. */
  get handle(): object {
    return this.#native
  }

  /**
   * A tensor that all ranks map, zero-filled. Every rank calls it in the same order with the same arguments; it waits for nobody.
   * It lives as long as the group.
   */
  alloc<D extends CollectiveDType>(dtype: D, shape: Shape): Tensor<D> {
    this.#checkOpen()
    if (!Object.hasOwn(dtypeCodes, dtype))
      throw invalid(`dtype is '${dtype as string}'; there are ${Object.keys(dtypeCodes).join(', ')}`)
    if (!Array.isArray(shape) || !shape.every((size) => Number.isSafeInteger(size) && size >= 0)) {
      throw invalid(`shape is ${JSON.stringify(shape)}, expected is an array of sizes`)
    }
    const sizes: Shape = [...(shape as Shape)]
    const count = sizes.reduce((product, size) => product * size, 1)
    if (!Number.isSafeInteger(count * elementBytes[dtype]))
      throw invalid(`a tensor of shape [${sizes.join(', ')}] is too large`)
    const made = this.#call(() => this.#native.alloc(dtypeCodes[dtype], count, `${dtype} [${sizes.join(', ')}]`))
    return new Tensor(this, dtype, sizes, made.buffer, made.id)
  }

  /**
   * Sum over all ranks, or another `op`, in rank order: the same bits on every rank. In place, or into `output`, which it then returns.
   * 16-bit floats are combined in f32 and rounded once, to nearest even. Integers wrap; their avg is the exact mean, cut towards zero.
   * min and max of floats are NaN where one is, and -0 is below +0.
   */
  allReduceSync<T extends GroupData>(
    data: GroupData,
    options: SyncOptions & AllReduceChoice & Required<OutputChoice<T>>,
  ): T
  allReduceSync<T extends GroupData>(data: T, options?: SyncOptions & AllReduceChoice): T
  allReduceSync<T extends GroupData>(data: T, options?: SyncOptions & AllReduceChoice & OutputChoice<T>): T {
    this.#runSync('allReduce', data, options?.output, options)
    return options?.output ?? data
  }

  /** As allReduceSync; resolves to the same data, or to the output. */
  allReduce<T extends GroupData>(
    data: GroupData,
    options: AsyncOptions & AllReduceChoice & Required<OutputChoice<T>>,
  ): Promise<T>
  allReduce<T extends GroupData>(data: T, options?: AsyncOptions & AllReduceChoice): Promise<T>
  async allReduce<T extends GroupData>(
    data: T,
    options?: AsyncOptions & AllReduceChoice & OutputChoice<T>,
  ): Promise<T> {
    await this.#run('allReduce', data, options?.output, options)
    return options?.output ?? data
  }

  /** As allReduce, but only data of `root`, or its output, becomes the result; data of the others stays. */
  reduceSync<T extends GroupData>(data: T, options?: SyncOptions & ReduceChoice & RootChoice & OutputChoice<T>): T {
    this.#runSync('reduce', data, options?.output, options)
    return options?.output ?? data
  }

  async reduce<T extends GroupData>(
    data: T,
    options?: AsyncOptions & ReduceChoice & RootChoice & OutputChoice<T>,
  ): Promise<T> {
    await this.#run('reduce', data, options?.output, options)
    return options?.output ?? data
  }

  /** data of `root` becomes data of every rank. */
  broadcastSync<T extends GroupData>(data: T, options?: SyncOptions & RootChoice): T {
    this.#runSync('broadcast', data, undefined, options)
    return data
  }

  async broadcast<T extends GroupData>(data: T, options?: AsyncOptions & RootChoice): Promise<T> {
    await this.#run('broadcast', data, undefined, options)
    return data
  }

  /**
   * output = data of rank 0, then of rank 1, ...: worldSize times as long, or as long as all `counts`. data may be this rank's own part of
   * output.
   */
  allGatherSync<T extends GroupData>(data: GroupData, output: T, options?: SyncOptions & CountsChoice): T {
    this.#runSync('allGather', data, output, options)
    return output
  }

  async allGather<T extends GroupData>(data: GroupData, output: T, options?: AsyncOptions & CountsChoice): Promise<T> {
    await this.#run('allGather', data, output, options)
    return output
  }

  /** As allGather, with an output on `root` alone; the other ranks pass undefined. */
  gatherSync<T extends GroupData | undefined>(
    data: GroupData,
    output: T,
    options?: SyncOptions & RootChoice & CountsChoice,
  ): T {
    this.#runSync('gather', data, output, options)
    return output
  }

  async gather<T extends GroupData | undefined>(
    data: GroupData,
    output: T,
    options?: AsyncOptions & RootChoice & CountsChoice,
  ): Promise<T> {
    await this.#run('gather', data, output, options)
    return output
  }

  /** output = this rank's part of data of `root`; the other ranks pass undefined for data. On the root output may be its own part of data. */
  scatterSync<T extends GroupData>(
    data: GroupData | undefined,
    output: T,
    options?: SyncOptions & RootChoice & CountsChoice,
  ): T {
    this.#runSync('scatter', data, output, options)
    return output
  }

  async scatter<T extends GroupData>(
    data: GroupData | undefined,
    output: T,
    options?: AsyncOptions & RootChoice & CountsChoice,
  ): Promise<T> {
    await this.#run('scatter', data, output, options)
    return output
  }

  /** output = this rank's part of what allReduce of data gives, with the same bits. It may be that very part of data. */
  reduceScatterSync<T extends GroupData>(
    data: GroupData,
    output: T,
    options?: SyncOptions & ReduceChoice & CountsChoice,
  ): T {
    this.#runSync('reduceScatter', data, output, options)
    return output
  }

  async reduceScatter<T extends GroupData>(
    data: GroupData,
    output: T,
    options?: AsyncOptions & ReduceChoice & CountsChoice,
  ): Promise<T> {
    await this.#run('reduceScatter', data, output, options)
    return output
  }

  /**
   * Part p of output = this rank's part of data of rank p. Parts are of equal size, and output may be data itself; or counts[p] elements go
   * to rank p and outputCounts[p] come from it, in two exchanges: counts first, so that ranks whose lists do not fit together find out.
   */
  allToAllSync<T extends GroupData>(data: GroupData, output: T, options: SyncOptions & AllToAllChoice = {}): T {
    if (options.counts === undefined && options.outputCounts === undefined)
      this.#runSync('allToAll', data, output, options)
    else this.#runStepsSync(this.#allToAllParts(data, output, options, []), options)
    return output
  }

  async allToAll<T extends GroupData>(
    data: GroupData,
    output: T,
    options: AsyncOptions & AllToAllChoice = {},
  ): Promise<T> {
    if (options.counts === undefined && options.outputCounts === undefined)
      await this.#run('allToAll', data, output, options)
    else await this.#runSteps(this.#allToAllParts(data, output, options, ['signal']), options)
    return output
  }

  /** The value of `root` on every rank: whatever msgpack knows, Map, Set, Date and BigInt included. */
  async broadcastObject<T>(value: T, options: ObjectOptions & RootChoice = {}): Promise<T> {
    this.#checkObjects('broadcastObject', options, ['root', 'signal'])
    return this.#runSteps(broadcastObject(this, value, options.root ?? 0), options)
  }

  broadcastObjectSync<T>(value: T, options: ObjectSyncOptions & RootChoice = {}): T {
    this.#checkObjects('broadcastObject', options, ['root'])
    return this.#runStepsSync(broadcastObject(this, value, options.root ?? 0), options)
  }

  /** The values of all ranks, on every rank. */
  async allGatherObject<T>(value: T, options: ObjectOptions = {}): Promise<T[]> {
    this.#checkObjects('allGatherObject', options, ['signal'])
    return this.#runSteps(gatherObjects(this, value), options)
  }

  allGatherObjectSync<T>(value: T, options: ObjectSyncOptions = {}): T[] {
    this.#checkObjects('allGatherObject', options, [])
    return this.#runStepsSync(gatherObjects(this, value), options)
  }

  /** The values of all ranks on `root`; undefined on the others. */
  async gatherObject<T>(value: T, options: ObjectOptions & RootChoice = {}): Promise<T[] | undefined> {
    this.#checkObjects('gatherObject', options, ['root', 'signal'])
    return this.#runSteps(gatherObjects(this, value, options.root ?? 0), options)
  }

  gatherObjectSync<T>(value: T, options: ObjectSyncOptions & RootChoice = {}): T[] | undefined {
    this.#checkObjects('gatherObject', options, ['root'])
    return this.#runStepsSync(gatherObjects(this, value, options.root ?? 0), options)
  }

  /** Returns when every rank has called it. */
  barrierSync(options?: Omit<SyncOptions, 'dtype'>): void {
    this.#runSync('barrier', undefined, undefined, options)
  }

  async barrier(options?: Omit<AsyncOptions, 'dtype'>): Promise<void> {
    await this.#run('barrier', undefined, undefined, options)
  }

  /**
   * Many small operations in one exchange, so with one wait: `record` calls them on what it is given, in the same order with the same
   * arguments on every rank. All of them take place; none may write memory that another one touches. The results have the bits that the
   * operations give alone.
   */
  batchSync(record: (batch: Batch) => void, options: Omit<SyncOptions, 'dtype'> = {}): void {
    const batch = this.#batch(record, options, [])
    this.#checkIdle()
    this.#call(() => {
      this.#native.runBatchSync(...batch)
    })
  }

  async batch(record: (batch: Batch) => void, options: Omit<AsyncOptions, 'dtype'> = {}): Promise<void> {
    const batch = this.#batch(record, options, ['signal'])
    const start = (): Promise<void> => this.#post(() => this.#native.runBatch(...batch), options.signal)
    return this.#tail === undefined ? start() : this.#queue(start, false)
  }

  /**
   * A message to rank `to`, which must call recv with as many elements of the same dtype. Messages of a pair of ranks keep their order, and
   * wait for no collective, nor collectives for them. It returns when data may be written again: the other rank need not have come yet.
   */
  sendSync<T extends GroupData>(data: T, options: SyncOptions & ToChoice): T {
    const message = this.#message('send', true, data, options.to, options, ['to'])
    this.#call(() => {
      this.#native.messageSync(...message)
    })
    return data
  }

  async send<T extends GroupData>(data: T, options: AsyncOptions & ToChoice): Promise<T> {
    const message = this.#message('send', true, data, options.to, options, ['to', 'signal'])
    await this.#postMessage(() => [this.#native.message(...message)], options.signal)
    return data
  }

  /** data = the next message from rank `from`. */
  recvSync<T extends GroupData>(data: T, options: SyncOptions & FromChoice): T {
    const message = this.#message('recv', false, data, options.from, options, ['from'])
    this.#call(() => {
      this.#native.messageSync(...message)
    })
    return data
  }

  async recv<T extends GroupData>(data: T, options: AsyncOptions & FromChoice): Promise<T> {
    const message = this.#message('recv', false, data, options.from, options, ['from', 'signal'])
    await this.#postMessage(() => [this.#native.message(...message)], options.signal)
    return data
  }

  /** A send and a recv at once, of one dtype, in memory apart. To and from this very rank it is a copy. */
  sendRecvSync<T extends GroupData>(data: GroupData, output: T, options: SyncOptions & ToChoice & FromChoice): T {
    const messages = this.#sendRecv(data, output, options, [])
    this.#call(() => {
      this.#native.sendRecvSync(...messages)
    })
    return output
  }

  async sendRecv<T extends GroupData>(
    data: GroupData,
    output: T,
    options: AsyncOptions & ToChoice & FromChoice,
  ): Promise<T> {
    const messages = this.#sendRecv(data, output, options, ['signal'])
    await this.#postMessage(() => this.#native.sendRecv(...messages), options.signal)
    return output
  }

  /**
   * Groups of the ranks of this one that say the same color, in the order of key, then of rank. Every rank calls it; one without a color
   * gets undefined. Options that are left out are this group's. The groups live on when this one is closed.
   */
  async split({ color, key, ...options }: SplitChoice & MadeOptions): Promise<Group | undefined> {
    checkKeys(options, madeKeys, 'split')
    return this.#make(checkSplit(key === undefined ? { color } : { color, key }), options)
  }

  /**
   * A group of these ranks of this one, in the order of the list. Every rank of this group calls it with the same list; those that are not in
   * it get undefined.
   */
  async subgroup(ranks: readonly number[], options: MadeOptions = {}): Promise<Group | undefined> {
    checkKeys(options, madeKeys, 'subgroup')
    return this.#make(checkSubgroup(ranks, this.worldSize), options)
  }

  async #make(wish: Wish, options: MadeOptions): Promise<Group | undefined> {
    checkSizes({ ...this.#origin.options, ...options })
    const steps = agreeOnRanks(this, wish, () => this.#native.nextGroup())
    const { timeoutMs } = options
    const limits = timeoutMs === undefined ? {} : { timeoutMs }
    this.#checkOpen()
    // Later operations of this group wait for the exchange, not for the new group to stand.
    const { made } = await this.#queue(async () => {
      const agreed = await this.#takeSteps(steps, limits)
      if (agreed === undefined) return { made: undefined }
      const members = agreed.ranks.map((rank) => this.members[rank] ?? -1)
      // Where ranks outnumber cores they still do when some of them are on their own.
      const spin = options.spinUs === undefined && this.spinUs === 0 ? { spinUs: 0 } : {}
      return { made: this.#connect({ ...options, ...spin }, { operation: wish.verb, group: agreed.group, members }) }
    }, true)
    return made
  }

  /**
   * A new group of the same ranks in the same processes, after a failure: every rank calls it. It takes the place of this one, which is
   * closed. One that does not come is named by ERR_TIMEOUT, one whose process has ended by ERR_PEER_LOST; then it may be called again.
   */
  async recreate(options: MadeOptions = {}): Promise<Group> {
    return this.#renew('recreate', options)
  }

  /**
   * As recreate, without the ranks whose processes have ended: those that are left keep their order and count from 0; `members` says who
   * they were. A rank that lives but does not come is an error, as all must end with the same ranks.
   */
  async shrink(options: MadeOptions = {}): Promise<Group> {
    return this.#renew('shrink', options)
  }

  async #renew(kind: keyof typeof renewals, options: MadeOptions): Promise<Group> {
    checkKeys(options, madeKeys, kind)
    this.#checkOpen()
    if (this.#isRenewing)
      throw new CollectiveError('ERR_BUSY', 'recreate or shrink of this group is still pending: await it')
    const all = { ...this.#origin.options, ...options }
    const { timeoutMs, slotBytes } = checkSizes(all)
    if (this.nodes.length > 1 && this.#origin.job.joined?.transport === 'mpi')
      throw new CollectiveError(
        'ERR_UNSUPPORTED',
        `${kind} across nodes is for transport 'zeromq'; make another group with createGroup`,
      )
    // A caller's mistake throws before others count on this rank.
    const words = jobTerms(all, slotBytes, readRules(all, all.env ?? process.env, this.worldSize))
    const terms =
      words.length <= 100 ? words : `settings ${createHash('sha256').update(words).digest('hex').slice(0, 16)}`
    this.#isRenewing = true
    try {
      await Promise.allSettled([this.#last, ...this.#messages])
      for (;;) {
        this.#checkOpen()
        const agreed = await this.#native.renew(renewals[kind], timeoutMs, terms)
        try {
          const group = await this.#connect(options, { operation: kind, isConfirmed: true, ...agreed })
          this.#closing ??= this.#end(true)
          return group
        } catch (error) {
          // One more has ended meanwhile: those that are left meet again.
          if (kind === 'shrink' && error instanceof CollectiveError && error.code === 'ERR_PEER_LOST') continue
          throw error
        }
      }
    } catch (error) {
      throw fromNative(error, undefined, this.members)
    } finally {
      this.#isRenewing = false
    }
  }

  #connect(
    options: MadeOptions,
    descent: { operation: string; group: number; members: readonly number[]; isConfirmed?: boolean },
  ): Promise<Group> {
    const all = { ...this.#origin.options, ...options }
    // A trace file is one group's: another would write over it.
    if (options.trace === undefined) Reflect.deleteProperty(all, 'trace')
    return connectGroup(all, this.#origin.job, { isConfirmed: false, ...descent, parent: this.#native })
  }

  /** Gives the group up on this rank and, as ERR_ABORTED, on all others. */
  abort(reason: string): void {
    this.#native.abort(reason)
  }

  /**
   * Native loop of the runner's path, for benchmarks: microseconds of `samples` allReduces of `count` elements from this rank's
   * rewritten slot to a finished private output. Every rank calls it alike.
   */
  timeAllReduce(dtype: DType, count: number, samples: number): Float64Array {
    this.#checkOpen()
    return this.#call(() => this.#native.timeAllReduce(dtypeCodes[dtype], count, samples))
  }

  /** Waits for pending operations, detaches the tensors' data and leaves. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= Promise.allSettled([this.#last, ...this.#messages]).then(() => this.#end(false))
    return this.#closing
  }

  async #end(isSuperseded: boolean): Promise<void> {
    this.#lastStats = this.stats()
    this.#writeTrace()
    this.#native.close(isSuperseded)
    debug('rank %d closed group %d', this.rank, this.#number)
    // One write a rank, so that the blocks of several do not mix.
    if (this.#isPrinted)
      process.stderr.write(
        formatStats(this.#lastStats)
          .map((line) => `tilerank stats: ${line}\n`)
          .join(''),
      )
    await this.#origin.job.leave()
  }

  /**
   * What this rank has called so far, and for which ranks of its node it waited; after close() the last of it. `reset`: the next call says
   * what came after this one. Never waits and touches no other rank.
   */
  stats(options: { readonly reset?: boolean } = {}): GroupStats {
    checkKeys(options, ['reset'], 'stats')
    if (this.#lastStats !== undefined) return this.#lastStats
    const now = performance.now()
    const native = this.#native.statistics()
    const { ms, native: before } = this.#statsFrom
    if (options.reset === true) this.#statsFrom = { ms: now, native }
    return {
      rank: this.rank,
      worldSize: this.worldSize,
      group: this.#number,
      elapsedMs: now - ms,
      ...statsBetween(before, native),
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /**
   * Which algorithm a call of `bytes` uses on this group, in which chunks, and why, and how its sums travel between nodes where they may: of a tensor of group.alloc, or of any other 'array'.
   * A call's own `algorithm` and `wire` stand before it.
   */
  explain(
    operation: OperationName,
    bytes: number,
    memory: MemoryKind = 'tensor',
  ): Explanation & { readonly wire: Wire } {
    if (!Object.hasOwn(operations, operation))
      throw invalid(`operation is '${operation as string}'; there are ${Object.keys(operations).join(', ')}`)
    if (!Number.isSafeInteger(bytes) || bytes < 0)
      throw invalid(`bytes is ${String(bytes)}, expected is a number of bytes`)
    if (memory !== 'tensor' && (memory as string) !== 'array')
      throw invalid(`memory is '${memory as string}', expected is tensor or array`)
    const isNarrow = operation === 'allReduce' && this.nodes.length > 1
    const wire = isNarrow ? (this.#origin.options.wire ?? 'exact') : 'exact'
    return { ...this.#table.explain(operation, bytes, memory), wire }
  }

  /** The last operations of every rank, at most 1024 of each, dead ranks included; empty once the group is closed. */
  recording(): Recording {
    return this.#native.recording(allRows)
  }

  /**
   * An error of the native group or of a runner on it, with what each rank did last where that may tell why.
   * @internal
   */
  diagnose(error: unknown): unknown {
    const code = error instanceof Error && 'code' in error ? error.code : undefined
    if (!this.#hasFailed && this.#native.hasFailed()) {
      this.#hasFailed = true
      debug(
        'rank %d, group %d failed: %s (%s)',
        this.rank,
        this.#number,
        error instanceof Error ? error.message : error,
        code,
      )
      this.#writeTrace()
    }
    return fromNative(
      error,
      () => {
        const recording = this.recording()
        const path = process.env[recorderVariable] ?? ''
        if (path !== '' && !this.#isWritten) {
          this.#isWritten = true
          try {
            // Without our launcher, which takes the variable away and writes one file, every survivor writes its own.
            writeRecording(`${path}.${String(this.rank)}`, recording)
          } catch (cause) {
            process.emitWarning(`${recorderVariable}: ${cause instanceof Error ? cause.message : String(cause)}`)
          }
        }
        return excerptOf(recording)
      },
      this.members,
    )
  }

  #writeTrace(): void {
    if (this.#tracePath === undefined) return
    try {
      const own = { rank: this.rank, group: this.#number, pid: process.pid }
      const rows = this.recording().find(({ rank }) => rank === this.rank)?.rows ?? []
      writeTrace(this.#tracePath, traceOfCalls(own, this.#native.traced(), rows))
    } catch (cause) {
      process.emitWarning(`the trace was not written: ${cause instanceof Error ? cause.message : String(cause)}`)
    }
  }

  /** The last sequence that a rank's recorder shows. @internal */
  progressOf(rank: number): number {
    const recordings = this.#native.recording(1)
    // One of another node shows nothing here, but no rank gets further than the others let it.
    const shown = recordings.find((one) => one.rank === rank) ?? recordings.find((one) => one.rank === this.rank)
    return shown?.rows[0]?.sequence ?? 0
  }

  /** Breaks the group on all ranks, as ERR_TIMEOUT of `rank`. @internal */
  giveUp(rank: number, waitedMs: number): void {
    this.#native.giveUp(rank, waitedMs)
  }

  #checkOpen(): void {
    if (this.#closing !== undefined) throw new CollectiveError('ERR_CLOSED', 'the group has been closed')
  }

  #call<T>(call: () => T): T {
    try {
      return call()
    } catch (error) {
      throw this.diagnose(error)
    }
  }

  #arguments(
    name: keyof typeof operations,
    data: GroupData | undefined,
    output: GroupData | undefined,
    options: SyncOptions & Choices,
    extra: readonly string[],
    matrix?: BigUint64Array,
  ): NativeCall {
    const signature = signatures[name]
    checkKeys(options, optionsOf.get(name) ?? [], name, extra)
    const timeoutMs = this.#timeoutOf(options)
    const root = this.#rankOf(options.root ?? 0, 'root')
    const algorithm = options.algorithm ?? 'auto'
    if (!Object.hasOwn(algorithms, algorithm)) {
      throw invalid(`algorithm is '${algorithm}'; there are ${Object.keys(algorithms).join(', ')}`)
    }
    const op = options.op ?? 'sum'
    if (!Object.hasOwn(reductions, op)) throw invalid(`op is '${op}'; there are ${Object.keys(reductions).join(', ')}`)
    const offsets = options.counts === undefined ? matrix : this.#offsetsOf(options.counts)
    const isRoot = this.rank === root
    checkGiven(name, 'data', signature.data, data, isRoot)
    checkGiven(name, 'output', signature.output, output, isRoot)
    const ofData = data === undefined ? undefined : this.#dtypeOf(data, options.dtype, 'data')
    const ofOutput = output === undefined ? undefined : this.#dtypeOf(output, options.dtype, 'output')
    if (ofData !== undefined && ofOutput !== undefined && ofData !== ofOutput)
      throw invalid(`data holds ${ofData}, but output ${ofOutput}`)
    const dtype = ofData ?? ofOutput ?? 'f32'
    const obstacle = wireObstacle(name, dtype, op)
    if (options.wire !== undefined && checkWire(options.wire) === 'q8' && obstacle !== undefined)
      throw invalid(`wire 'q8': ${obstacle}`)
    const wire = obstacle === undefined ? (options.wire ?? this.#origin.options.wire ?? 'exact') : 'exact'
    return [
      operations[name],
      dtypeCodes[dtype],
      data && memoryOf(data),
      output && memoryOf(output),
      root,
      algorithms[algorithm] + wires[wire],
      timeoutMs,
      reductions[op],
      offsets,
    ]
  }

  #batch(record: (batch: Batch) => unknown, options: SyncOptions, extra: readonly string[]): NativeBatch {
    this.#checkOpen()
    checkKeys(options, ['timeoutMs', ...extra], 'batch')
    const timeoutMs = this.#timeoutOf(options)
    const batch = new Batch((name, data, output, choices) => this.#arguments(name, data, output, choices, []))
    const returned = record(batch)
    const calls = batch.end()
    if (returned instanceof Promise) {
      returned.catch(() => undefined)
      throw invalid('a batch is recorded by a function that awaits nothing')
    }
    return [...calls, timeoutMs]
  }

  #message(
    name: string,
    isSender: boolean,
    data: GroupData,
    peer: number,
    options: SyncOptions,
    allowed: readonly string[],
  ): NativeMessage {
    this.#checkOpen()
    checkKeys(options, ['dtype', 'timeoutMs', ...allowed], name)
    const dtype = this.#dtypeOf(data, options.dtype, 'data')
    if (this.#rankOf(peer, isSender ? 'to' : 'from') === this.rank) {
      throw invalid(`rank ${String(peer)} is this rank: a message to oneself is a sendRecv, which copies`)
    }
    return [isSender, dtypeCodes[dtype], memoryOf(data), peer, this.#timeoutOf(options)]
  }

  #sendRecv(
    data: GroupData,
    output: GroupData,
    options: SyncOptions & ToChoice & FromChoice,
    extra: readonly string[],
  ): NativeSendRecv {
    this.#checkOpen()
    checkKeys(options, ['dtype', 'timeoutMs', 'to', 'from', ...extra], 'sendRecv')
    const dtype = this.#dtypeOf(data, options.dtype, 'data')
    const other = this.#dtypeOf(output, options.dtype, 'output')
    if (dtype !== other) throw invalid(`data holds ${dtype}, but output ${other}`)
    const to = this.#rankOf(options.to, 'to')
    const from = this.#rankOf(options.from, 'from')
    return [dtypeCodes[dtype], memoryOf(data), memoryOf(output), to, from, this.#timeoutOf(options)]
  }

  async #postMessage(
    start: () => readonly (Promise<void> | undefined)[],
    signal: AbortSignal | undefined,
  ): Promise<void> {
    this.#checkSignal(signal)
    const pending = this.#call(start).filter((one) => one !== undefined)
    if (pending.length === 0) return
    const all = Promise.all(pending)
    const settled: Promise<unknown> = Promise.allSettled(pending).then(() => this.#messages.delete(settled))
    this.#messages.add(settled)
    await this.#guard(all, signal)
  }

  #dtypeOf(data: GroupData, dtype: CollectiveDType | undefined, what: string): CollectiveDType {
    if (!(data instanceof Tensor)) return dtypeOf(data, dtype, what)
    if (data.group !== this) throw invalid('the tensor belongs to another group')
    if (dtype === undefined || dtype === data.dtype) return data.dtype
    throw invalid(`the tensor holds ${data.dtype}, but dtype is '${dtype}'`)
  }

  #rankOf(rank: number, what: string): number {
    if (Number.isInteger(rank) && rank >= 0 && rank < this.worldSize) return rank
    throw invalid(`${what} is ${String(rank)}, expected is a rank below ${String(this.worldSize)}`)
  }

  #timeoutOf({ timeoutMs }: SyncOptions): number {
    return timeoutMs === undefined ? this.#timeoutMs : checkTimeout(timeoutMs)
  }

  #checkCounts(counts: readonly number[] | undefined, what: string): readonly number[] {
    const given: unknown = counts
    const isList = Array.isArray(given) && given.length === this.worldSize
    if (counts !== undefined && isList && counts.every((count) => Number.isSafeInteger(count) && count >= 0))
      return counts
    throw invalid(
      `${what} are ${JSON.stringify(counts)}, expected is a number of elements for each of ${String(this.worldSize)} ranks`,
    )
  }

  #offsetsOf(counts: readonly number[]): BigUint64Array {
    this.#checkCounts(counts, 'counts')
    const offsets = new BigUint64Array(this.worldSize + 1)
    counts.forEach((count, rank) => {
      offsets[rank + 1] = (offsets[rank] ?? 0n) + BigInt(count)
    })
    return offsets
  }

  #runSync(
    name: keyof typeof operations,
    data: GroupData | undefined,
    output: GroupData | undefined,
    options: (SyncOptions & Choices) | undefined,
  ): void {
    // A look and a native call without arguments: this is the path that is timed in tenths of a microsecond.
    const plans = this.#plansOf(data, output)
    const plan = plans === undefined ? undefined : findPlan(plans, name, data, output, options)
    if (plan !== undefined && this.#tail === undefined && this.#closing === undefined) {
      try {
        plan.run()
      } catch (error) {
        throw this.diagnose(error)
      }
      return
    }
    this.#checkOpen()
    const call = this.#arguments(name, data, output, options ?? {}, [])
    this.#checkIdle()
    this.#call(() => {
      const made = plans === undefined ? undefined : this.#plan(plans, name, data, output, options ?? {}, call)
      if (made === undefined) this.#native.runSync(...call)
      else made.run()
    })
  }

  /** Where plans of a call are kept: undefined where there can be none, as it works on other memory than tensors. */
  #plansOf(data: GroupData | undefined, output: GroupData | undefined): Plan[] | undefined {
    if (data === undefined && output === undefined) return this.#plans
    const first = data ?? output
    if (!(first instanceof Tensor) || first.group !== this) return undefined
    return output === undefined || output instanceof Tensor ? first.plans : undefined
  }

  /** Keeps a call that may come again. */
  #plan(
    plans: Plan[],
    name: keyof typeof operations,
    data: GroupData | undefined,
    output: GroupData | undefined,
    options: SyncOptions & Choices,
    call: NativeCall,
  ): Plan | undefined {
    const isPlain = Object.entries(options).every(
      ([key, value]) => key === 'output' || (value !== undefined && typeof value !== 'object'),
    )
    if (!isPlain || plans.length >= maxPlans) return undefined
    const { root, op, algorithm, wire, dtype, timeoutMs } = options
    const plan = {
      name,
      data: data instanceof Tensor ? data : undefined,
      output: output instanceof Tensor ? output : undefined,
      root,
      op,
      algorithm,
      wire,
      dtype,
      timeoutMs,
      options: Object.keys(options).length,
      run: this.#native.plan(...call),
    }
    plans.push(plan)
    return plan
  }

  #checkIdle(): void {
    if (this.#tail === undefined) return
    throw new CollectiveError(
      'ERR_BUSY',
      'an operation of several exchanges is still pending: await it before a ...Sync call',
    )
  }

  async #run(
    name: keyof typeof operations,
    data: GroupData | undefined,
    output: GroupData | undefined,
    options: (AsyncOptions & Choices) | undefined,
  ): Promise<void> {
    this.#checkOpen()
    const call = this.#arguments(name, data, output, options ?? {}, ['signal'])
    const start = (): Promise<void> => this.#post(() => this.#native.run(...call), options?.signal)
    return this.#tail === undefined ? start() : this.#queue(start, false)
  }

  /** Takes its place in the order of the group now. */
  async #post(run: () => Promise<void> | undefined, signal: AbortSignal | undefined): Promise<void> {
    this.#checkSignal(signal)
    const pending = this.#call(run)
    if (pending === undefined) return
    this.#last = pending.catch(() => undefined)
    await this.#guard(pending, signal)
  }

  #checkSignal(signal: AbortSignal | undefined): void {
    // The others wait for this rank's part, which will not come.
    if (signal?.aborted === true) this.#abortBy(signal)
    signal?.throwIfAborted()
  }

  async #guard(pending: Promise<unknown>, signal: AbortSignal | undefined): Promise<void> {
    const onAbort = (): void => {
      if (signal !== undefined) this.#abortBy(signal)
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      await pending
    } catch (error) {
      signal?.throwIfAborted()
      throw this.diagnose(error)
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /**
   * Starts when its turn has come: at once where nothing is queued. What comes after a compound operation waits for its end, as that one's
   * later collectives are not posted yet; after any other it waits for its start.
   */
  #queue<T>(start: () => Promise<T>, isCompound: boolean): Promise<T> {
    const pending = new Promise<T>((resolve, reject) => {
      const begin = (): Promise<unknown> | undefined => {
        const running = start()
        running.then(resolve, reject)
        return isCompound ? running.catch(() => undefined) : undefined
      }
      const turn = this.#tail === undefined ? Promise.resolve(begin()) : this.#tail.then(begin)
      const tail = turn.then(() => {
        if (this.#tail === tail) this.#tail = undefined
      })
      this.#tail = tail
    })
    this.#last = pending.catch(() => undefined)
    return pending
  }

  #checkObjects(name: string, options: ObjectOptions & RootChoice, allowed: readonly string[]): void {
    checkKeys(options, ['timeoutMs', ...allowed], name)
    this.#rankOf(options.root ?? 0, 'root')
  }

  /** Checks all that one rank can, then the steps of an allToAll whose parts are of any sizes. */
  #allToAllParts(
    data: GroupData,
    output: GroupData,
    { counts, outputCounts, ...options }: SyncOptions & AllToAllChoice,
    extra: readonly string[],
  ): Generator<Exchange, void, undefined> {
    this.#arguments('allToAll', data, output, options, extra)
    const sent = this.#checkCounts(counts, 'counts')
    const expected = this.#checkCounts(outputCounts, 'outputCounts')
    for (const [given, list, what] of [
      [data, sent, 'data'],
      [output, expected, 'output'],
    ] as const) {
      const total = list.reduce((sum, count) => sum + count, 0)
      const length = given instanceof Tensor ? given.count : given.length
      if (length !== total) throw invalid(`${what} must hold ${String(total)} elements, not ${String(length)}`)
    }
    return exchangeCounts(this, data, output, sent, expected, options.dtype)
  }

  #argumentsOf([op, data, output, choices, matrix]: Exchange, timeoutMs?: number): NativeCall {
    const limits = timeoutMs === undefined ? {} : { timeoutMs }
    return this.#arguments(op, data, output, { ...choices, ...limits }, [], matrix)
  }

  /** An operation of several collectives, the later of which depend on what the first brought. */
  async #runSteps<T>(steps: Generator<Exchange, T, undefined>, options: ObjectOptions): Promise<T> {
    this.#checkOpen()
    return this.#queue(() => this.#takeSteps(steps, options), true)
  }

  async #takeSteps<T>(steps: Generator<Exchange, T, undefined>, { timeoutMs, signal }: ObjectOptions): Promise<T> {
    for (;;) {
      const step = steps.next()
      if (step.done === true) return step.value
      const call = this.#argumentsOf(step.value, timeoutMs)
      await this.#post(() => this.#native.run(...call), signal)
    }
  }

  #runStepsSync<T>(steps: Generator<Exchange, T, undefined>, { timeoutMs }: ObjectSyncOptions): T {
    this.#checkOpen()
    this.#checkIdle()
    for (;;) {
      const step = steps.next()
      if (step.done === true) return step.value
      const call = this.#argumentsOf(step.value, timeoutMs)
      this.#call(() => {
        this.#native.runSync(...call)
      })
    }
  }

  #abortBy(signal: AbortSignal): void {
    const reason: unknown = signal.reason
    this.#native.abort(reason instanceof Error ? reason.message : String(reason))
  }
}

/** What the engine keeps of the group that its runner works on. */
export interface RunnerGroup {
  /** Passed to the native Runner, which owns the group's sequence. */
  readonly handle: object
  readonly arenaBytes: number
  readonly warnings: readonly string[]
  /** The runner's error as one of this folder, with the flight recorder's excerpt. */
  diagnose(error: unknown): unknown
  /** The job's, the same on all ranks and another in every run; '' where there is one rank alone. */
  readonly nonce: string
  /** How far a rank has come: the last sequence that its recorder shows. */
  progressOf(rank: number): number
  /** Breaks the group on all ranks, as ERR_TIMEOUT of `rank`. */
  giveUp(rank: number, waitedMs: number): void
  close(): Promise<void>
}

/**
 * A group for the runner alone.
 * @param options.slotBytesOn what the program needs on these nodes, [nodes][ranks], empty: one; configHash: of all that ranks must agree on
 */
export async function openRunnerGroup(options: {
  readonly slotBytesOn: (nodes: readonly (readonly number[])[]) => number
  readonly configHash: Uint8Array
  readonly timeoutMs: number
  readonly lanes?: number
  readonly env?: Readonly<Record<string, string | undefined>>
  readonly numaNodes?: readonly number[]
}): Promise<RunnerGroup> {
  return openGroup({
    ...(options.env === undefined ? {} : { env: options.env }),
    ...(options.numaNodes === undefined ? {} : { numaNodes: options.numaNodes }),
    timeoutMs: options.timeoutMs,
    slotBytes: options.slotBytesOn([]),
    slotBytesOn: options.slotBytesOn,
    lanes: options.lanes ?? 1,
    isTabled: false,
    terms: `configuration ${Buffer.from(options.configHash).toString('hex').slice(0, 64)}`,
  })
}
