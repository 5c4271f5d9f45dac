// Which algorithm a call uses, as data: rules, the first that fits decides. Those of createGroup stand before those of the environment,
// before a table that `tilerank tune collectives` measured on this machine, before the defaults below. They are resolved once, when a group
// is made, into rows by size; ranks compare a digest of the rows when they join, and native code looks only at them. No rule
// changes a bit of any result.
//
// An algorithm more: an entry of `algorithmsOf` with its native code, and rules that choose it (by `nodes`, say). A parameter more: an
// entry of `parameters` and of native AlgorithmRow.

import { createHash } from 'node:crypto'
import { closeSync, fstatSync, mkdirSync, openSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { dirname, isAbsolute, join } from 'node:path'
import { packageRoot } from '../native/index.js'
import { algorithms, operations } from './communicator.js'
import type { Environment } from './env.js'
import { CollectiveError, invalid } from './errors.js'

export type OperationName = keyof typeof operations
/** A tensor of group.alloc, which all ranks map, or any other array. */
export type MemoryKind = 'tensor' | 'array'
/** Lowest and highest, both included; null or nothing: no end. */
export type Range = readonly [number, (number | null)?]
export type RuleSource = 'default' | 'tuned' | 'environment' | 'option'

/** An entry says what it fits and what then is chosen; what it leaves open, a later one decides. */
export interface AlgorithmRule {
  readonly operation: OperationName | '*'
  readonly ranks?: Range
  readonly nodes?: Range
  readonly memory?: MemoryKind
  /** Of the whole data of a call. */
  readonly bytes?: Range
  readonly algorithm?: string
  /** Bytes that move at a time, a multiple of 64; never more than a slot. */
  readonly chunkBytes?: number
  /** For people: explain() repeats it. */
  readonly why?: string
}

export interface Explanation {
  readonly operation: OperationName
  readonly bytes: number
  readonly memory: MemoryKind
  readonly algorithm: string
  readonly chunkBytes: number
  readonly why: string
  /** Of the rule that chose the algorithm. */
  readonly source: RuleSource
}

/** How partial sums travel between nodes: as they are, or rounded to groups of 32 with a scale. */
export type Wire = 'exact' | 'q8'

/** Of one operation and kind of memory: what calls of at most `upTo` bytes use, and of more than the row before. */
export interface AlgorithmRow {
  readonly operation: OperationName
  readonly memory: MemoryKind
  readonly upTo: number
  readonly algorithm: string
  readonly chunkBytes: number
  readonly why: string
  readonly source: RuleSource
}

interface Algorithm {
  readonly code: number
  /** Where it needs one. */
  readonly memory?: MemoryKind
  /** How many nodes it is for; any, if not said. */
  readonly nodes?: Range
}

const inNode: Range = [1, 1]
const acrossNodes: Range = [2]

const direct: Readonly<Record<string, Algorithm>> = { direct: { code: algorithms.auto } }
const algorithmsOf: Readonly<Record<OperationName, Readonly<Record<string, Algorithm>>>> = {
  barrier: direct,
  allReduce: {
    oneShot: { code: algorithms.oneShot, nodes: inNode },
    twoShot: { code: algorithms.twoShot, nodes: inNode },
    twoShotInPlace: { code: algorithms.twoShotInPlace, nodes: inNode, memory: 'tensor' },
    leader: { code: algorithms.leader, nodes: acrossNodes },
    splitRail: { code: algorithms.splitRail, nodes: acrossNodes },
    twoStep: { code: algorithms.twoStep, nodes: acrossNodes },
    byWidth: { code: algorithms.auto, nodes: acrossNodes },
  },
  allGather: direct,
  broadcast: direct,
  reduceScatter: direct,
  reduce: direct,
  gather: direct,
  scatter: direct,
  allToAll: direct,
}

/** Those that calls on data of one kind may use; without `byWidth`, which is splitRail or twoStep by their dtype. */
export function algorithmsFor(operation: OperationName, nodes: number, memory: MemoryKind): readonly string[] {
  return Object.entries(algorithmsOf[operation])
    .filter(([name, one]) => name !== 'byWidth' && within(nodes, one.nodes) && (one.memory ?? memory) === memory)
    .map(([name]) => name)
}

/** Numbers of an algorithm: their words in a text, and what they may be. */
const parameters = { chunkBytes: { word: 'chunk', multipleOf: 64 } } as const

const computed = 'computed: one-shot reads (N - 1) S from peers, two-shot 2 (N - 1) / N S'

/**
 * Bytes that one step more must save a node. What its NIC sends in the latency of a step is 50 KB on 10gbe, 62 KB on rdma100 and 500 KB on
 * 100gbe by TCP; `tilerank simulate` on 2 to 128 nodes of 1 to 8 ranks: 64 KB to 96 KB lose least.
 */
const stepBytes = 80 << 10
/** Of the data of all ranks of a node, which one of them reduces: the rails' frames are more than the time that they save. */
const leaderBytes = 16 << 10

/**
 * Across nodes. With K nodes, S bytes and partial results of w bytes for each of an element, splitRail sends (K - 1) w S from a node and
 * twoStep (K - 1) (w + 1) S / K. w is 1, or 2 for sums of 16-bit floats, which stay f32 until they are rounded.
 */
function networkRules({ ranks, nodes }: Pick<Shape, 'ranks' | 'nodes'>): AlgorithmRule[] {
  /** The most of S for which twoStep saves no more than a step costs. */
  const limitFor = (width: number): number => Math.floor(stepBytes / ((nodes - 1) * (width - (width + 1) / nodes)))
  const [narrow, wide] = [limitFor(1), limitFor(2)]
  const common = { operation: 'allReduce', nodes: acrossNodes } as const
  const why = `computed: of ${nodes} nodes each sends ${stepBytes >> 10} KB less in two steps, 2 (K - 1) / K S in place of (K - 1) S`
  return [
    // Two nodes send as much either way.
    ...(narrow === Infinity ? [] : [{ ...common, bytes: [narrow + 1] as const, algorithm: 'twoStep', why }]),
    {
      ...common,
      bytes: [wide + 1],
      algorithm: 'byWidth',
      why: 'twoStep where partial results are wider than elements, such as sums of 16-bit floats: it sends them once; else splitRail',
    },
    {
      ...common,
      bytes: [0, Math.floor((leaderBytes * nodes) / ranks)],
      algorithm: 'leader',
      why: `the fewest frames: one rank reduces at most ${leaderBytes >> 10} KB of its node`,
    },
    { ...common, algorithm: 'splitRail', why: 'one step, and every rank reduces its slice' },
  ]
}

/** Measured on 2 cores of a Zen 4. */
const nodeRules: readonly AlgorithmRule[] = [
  {
    operation: 'allReduce',
    memory: 'tensor',
    bytes: [0, 2 << 10],
    algorithm: 'oneShot',
    // More ranks make the copy into the slot no dearer and the bytes read from peers more, so the limit does not rise with them.
    why: 'one sync; p50 us one-shot / in place: 1 KB 0.7 / 0.8, 2 KB 0.8 / 0.9, 4 KB 1.2 / 1.0',
  },
  {
    operation: 'allReduce',
    memory: 'tensor',
    algorithm: 'twoShotInPlace',
    why: 'nothing is copied; p50 us one-shot / in place: 4 KB 1.2 / 1.0, 8 KB 1.8 / 1.1, 128 KB 19 / 4.3, 2 MB 113 / 56',
  },
  {
    operation: 'allReduce',
    ranks: [1, 2],
    algorithm: 'oneShot',
    why: 'two ranks gain nothing from a second sync; p50 us one-shot / two-shot: 8 KB 1.9 / 1.9, 512 KB 29 / 38, 32 MB 3700 / 4500',
  },
  { operation: 'allReduce', ranks: [3, 3], bytes: [0, 64 << 10], algorithm: 'oneShot', why: computed },
  { operation: 'allReduce', ranks: [4, 4], bytes: [0, 32 << 10], algorithm: 'oneShot', why: computed },
  { operation: 'allReduce', ranks: [5], bytes: [0, 16 << 10], algorithm: 'oneShot', why: computed },
  { operation: 'allReduce', algorithm: 'twoShot', why: computed },
  { operation: '*', algorithm: 'direct', why: 'there is one algorithm' },
  // Two ranks, 2 MB outside of tensors in chunks of 64 KB, 256 KB, 1 MB: 317, 199, 124 us; 32 MB: 5.5, 4.0, 3.7 ms.
  { operation: '*', chunkBytes: 1 << 20 },
]

export const defaultRules = (shape: Pick<Shape, 'ranks' | 'nodes'>): readonly AlgorithmRule[] =>
  shape.nodes > 1 ? [...networkRules(shape), ...nodeRules] : nodeRules

/** What a text or an option may say instead of rules: no tuned table. */
export const onlyDefaults = 'default'
export const algorithmVariable = 'TILERANK_ALGORITHM'

const has = (object: object, key: string): boolean => Object.hasOwn(object, key)
const show = (value: unknown): string => (typeof value === 'string' ? `'${value}'` : JSON.stringify(value))

function isRange(value: unknown): value is Range {
  if (!Array.isArray(value) || value.length < 1 || value.length > 2) return false
  const [lowest, highest] = value as unknown[]
  const isBound = (bound: unknown): bound is number => Number.isSafeInteger(bound) && (bound as number) >= 0
  return isBound(lowest) && (highest === undefined || highest === null || (isBound(highest) && highest >= lowest))
}

/** Throws with `place` and the field that is wrong. */
function checkRule(rule: unknown, place: string, fail: (message: string) => Error): AlgorithmRule {
  if (typeof rule !== 'object' || rule === null || Array.isArray(rule))
    throw fail(`${place}: ${show(rule)}, expected is a rule { operation, ... }`)
  const fields = new Map<string, unknown>(Object.entries(rule))
  const wrong = (field: string, expected: string): Error =>
    fail(`${place}, ${field}: ${show(fields.get(field))}, expected is ${expected}`)
  const operation = fields.get('operation')
  const isOperation = (name: unknown): name is OperationName => typeof name === 'string' && has(operations, name)
  if (operation !== '*' && !isOperation(operation))
    throw wrong('operation', `one of ${Object.keys(operations).join(', ')}, or * for all`)
  for (const [field, value] of fields) {
    if (field === 'operation' || value === undefined) continue
    if (field === 'ranks' || field === 'nodes' || field === 'bytes') {
      if (!isRange(value)) throw wrong(field, '[lowest, highest]')
    } else if (field === 'memory') {
      if (value !== 'tensor' && value !== 'array') throw wrong(field, 'tensor or array')
      // Of the others ranks may pass different kinds.
      if (operation !== 'allReduce') throw wrong(field, 'nothing: only allReduce tells tensors from arrays')
    } else if (field === 'algorithm') {
      const known = operation === '*' ? direct : algorithmsOf[operation]
      if (typeof value !== 'string' || !has(known, value))
        throw wrong(field, `one of ${operation === '*' ? '' : `${operation}'s `}${Object.keys(known).join(', ')}`)
      const needed = known[value]?.memory
      if (needed !== undefined && fields.get('memory') !== undefined && fields.get('memory') !== needed)
        throw wrong('memory', `${needed}, which ${value} needs`)
    } else if (has(parameters, field)) {
      const { multipleOf } = parameters[field as keyof typeof parameters]
      if (!Number.isSafeInteger(value) || (value as number) < 1 || (value as number) % multipleOf !== 0)
        throw wrong(field, `a positive multiple of ${multipleOf}`)
    } else if (field === 'why') {
      if (typeof value !== 'string') throw wrong(field, 'a sentence')
    } else {
      throw wrong(field, `no such field; there are operation, ranks, nodes, memory, bytes, algorithm, chunkBytes, why`)
    }
  }
  return rule as AlgorithmRule
}

const unitBytes: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30 }

/** `5`, `64K`; NaN: neither. */
function parseSize(text: string): number {
  const [, digits = '', unit = ''] = /^(\d{1,15})([KMG]?)$/.exec(text) ?? []
  return digits === '' ? NaN : Number(digits) * (unitBytes[unit] ?? NaN)
}

/** `0-8192`, `1M-`, `64K`. */
function parseRange(text: string): unknown {
  const [lowest = '', highest, ...rest] = text.split('-')
  if (rest.length > 0) return text
  const range = [
    parseSize(lowest),
    highest === undefined ? parseSize(lowest) : highest === '' ? null : parseSize(highest),
  ]
  return range.some(Number.isNaN) ? text : range
}

/**
 * Rules as text, such as `allReduce=twoShot:0-8192; allReduce=oneShot:8193-,tensor; *=auto,chunk=256K`: an operation or `*`, then the
 * algorithm (`auto`: as without this rule), then `:` and bytes, then any of `tensor`, `array`, `ranks=A-B`, `nodes=A-B`, `chunk=BYTES`.
 */
export function parseRules(text: string, what: string, fail: (message: string) => Error): Rules {
  let isDefault = false
  const rules: AlgorithmRule[] = []
  for (const [i, part] of text.split(/[;\n]/).entries()) {
    const written = part.trim()
    if (written === '') continue
    if (written === onlyDefaults) {
      isDefault = true
      continue
    }
    const place = `${what}, rule ${i + 1} '${written}'`
    const [, operation, choice, ...rest] = /^([^=]*)=([^,]*)(?:,(.*))?$/.exec(written) ?? []
    if (operation === undefined || choice === undefined)
      throw fail(`${place}: expected is OPERATION=ALGORITHM:FROM-TO,... or '${onlyDefaults}'`)
    const [algorithm = '', bytes] = choice.split(':')
    const rule: Record<string, unknown> = { operation: operation.trim() }
    if (algorithm.trim() !== 'auto') rule['algorithm'] = algorithm.trim()
    if (bytes !== undefined) rule['bytes'] = parseRange(bytes.trim())
    for (const item of (rest[0] ?? '').split(',').map((one) => one.trim())) {
      const [word = '', value] = item.split('=')
      if (item === '') continue
      else if (value === undefined && (item === 'tensor' || item === 'array')) rule['memory'] = item
      else if ((word === 'ranks' || word === 'nodes') && value !== undefined) rule[word] = parseRange(value)
      else if (word === parameters.chunkBytes.word && value !== undefined)
        rule['chunkBytes'] = Number.isNaN(parseSize(value)) ? value : parseSize(value)
      else throw fail(`${place}, '${item}': expected is tensor, array, ranks=A-B, nodes=A-B or chunk=BYTES`)
    }
    rules.push({ why: `'${written}'`, ...checkRule(rule, place, fail) })
  }
  return { rules, isDefault }
}

export interface Rules {
  readonly rules: readonly AlgorithmRule[]
  /** The machine's tuned table is left out. */
  readonly isDefault: boolean
}

/** Of createGroup: a list of rules, or the same as text. */
export function optionRules(
  given: readonly AlgorithmRule[] | string | undefined,
  chunkBytes: number | undefined,
): Rules {
  const chunks: AlgorithmRule[] = chunkBytes === undefined ? [] : [{ operation: '*', chunkBytes, why: 'chunkBytes' }]
  if (given === undefined) return { rules: chunks, isDefault: false }
  if (typeof given === 'string') {
    const { rules, isDefault } = parseRules(given, 'algorithms', invalid)
    return { rules: [...rules, ...chunks], isDefault }
  }
  if (!Array.isArray(given)) throw invalid(`algorithms: ${show(given)}, expected is a list of rules, or a text`)
  const rules = (given as readonly unknown[]).map((rule, i) => checkRule(rule, `algorithms[${i}]`, invalid))
  return { rules: [...rules, ...chunks], isDefault: false }
}

const environmentError = (message: string): Error =>
  new CollectiveError('ERR_ENVIRONMENT', message, { variables: [algorithmVariable] })

export const environmentRules = (env: Environment): Rules =>
  parseRules(env[algorithmVariable] ?? '', algorithmVariable, environmentError)

/** What a tuned table holds for: it is of no use to another machine, version or number of ranks. */
export interface TunedFor {
  readonly version: string
  readonly processor: string
  readonly cores: number
  readonly ranks: number
}

export interface TunedTable extends TunedFor {
  readonly measured: string
  readonly rules: readonly AlgorithmRule[]
}

const tableBytesLimit = 1 << 20
/** A card of native ExchangeCards has 16 KB. */
const tunedTextLimit = 12 << 10

export function tunedFor(ranks: number): TunedFor {
  const manifest: unknown = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8'))
  const version = typeof manifest === 'object' && manifest !== null && 'version' in manifest ? manifest.version : ''
  // All processors that are online, whatever this process may use of them: ranks are bound to different ones.
  const all = cpus()
  return { version: String(version), processor: all[0]?.model ?? '', cores: all.length, ranks }
}

/** Undefined where the environment names no folder for caches. */
export function tunedPath(key: TunedFor, env: Environment = process.env): string | undefined {
  const { XDG_CACHE_HOME: xdg = '', HOME: home = '' } = env
  const cache = isAbsolute(xdg) ? xdg : isAbsolute(home) ? join(home, '.cache') : undefined
  if (cache === undefined) return undefined
  const machine = createHash('sha256')
    .update(JSON.stringify([key.processor, key.cores]))
    .digest('hex')
    .slice(0, 8)
  return join(cache, 'tilerank', `collectives-${key.version}-${machine}-${key.ranks}ranks.json`)
}

/** The rules of a table that a measurement on `nodes` nodes leaves as they are. */
export function rulesOfOthers(rules: readonly AlgorithmRule[], nodes: number): readonly AlgorithmRule[] {
  return rules.filter((rule) => rule.nodes?.[0] !== nodes || rule.nodes[1] !== nodes)
}

/** Of measured rules, as a card carries them (meet.ts): those that may hold for several nodes. */
export function tunedText(rules: readonly AlgorithmRule[]): string {
  const text = JSON.stringify(rules.filter(({ nodes }) => (nodes?.[1] ?? Infinity) > 1))
  if (text.length <= tunedTextLimit) return text
  throw new CollectiveError(
    'ERR_ENVIRONMENT',
    `the measured rules for several nodes have ${text.length} characters, more than ${tunedTextLimit}`,
    {
      variables: ['XDG_CACHE_HOME'],
    },
  )
}

export function parseTunedText(text: string): readonly AlgorithmRule[] {
  const fail = (message: string): Error => new CollectiveError('ERR_MISMATCH', message, { peer: 0 })
  let rules: unknown
  try {
    rules = text === '' ? [] : JSON.parse(text)
  } catch {
    throw fail("rank 0's measured rules are no JSON")
  }
  if (!Array.isArray(rules)) throw fail("rank 0's measured rules are no list")
  return (rules as unknown[]).map((rule, i) => checkRule(rule, `rank 0's measured rules, rules[${i}]`, fail))
}

/** What was said about algorithms, in words that are the same where it was said alike. */
export function termsOf(...given: readonly Rules[]): string[] {
  if (given.every(({ rules, isDefault }) => rules.length === 0 && !isDefault)) return []
  const text = JSON.stringify(
    given.map(({ rules, isDefault }) => [isDefault, rules.map(({ why: _, ...rule }) => rule)]),
  )
  return [`rules ${text.length <= 300 ? text : createHash('sha256').update(text).digest('hex').slice(0, 16)}`]
}

/** One rule a line, so that errors can name the line. */
export function writeTuned(path: string, table: TunedTable): void {
  const { rules, ...head } = table
  const lines = rules.map((rule) => `\n  ${JSON.stringify(rule)}`).join()
  const text = `${JSON.stringify(head, null, 1).slice(0, -2)},\n "rules": [${lines}\n ]\n}\n`
  mkdirSync(dirname(path), { recursive: true })
  // Ranks that start meanwhile read the old one or the new one.
  const draft = `${path}.${process.pid}`
  writeFileSync(draft, text)
  renameSync(draft, path)
}

/** Undefined: nobody has tuned for `key` here. */
export function readTuned(path: string, key: TunedFor): TunedTable | undefined {
  const fail = (message: string): Error =>
    new CollectiveError(
      'ERR_ENVIRONMENT',
      `${message}; run \`tilerank tune collectives\` again, delete the file, or set ${algorithmVariable}=${onlyDefaults}`,
      { variables: ['XDG_CACHE_HOME', algorithmVariable] },
    )
  let text: string
  try {
    const fd = openSync(path, 'r')
    try {
      const { size } = fstatSync(fd)
      if (size > tableBytesLimit) throw fail(`${path} has ${size} bytes: it is no table of algorithms`)
      text = readFileSync(fd, 'utf8')
    } finally {
      closeSync(fd)
    }
  } catch (error) {
    if (error instanceof CollectiveError) throw error
    const code = error instanceof Error && 'code' in error ? error.code : undefined
    // A HOME that is another user's is none.
    if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'EACCES') return undefined
    throw fail(`${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
  let table: unknown
  try {
    table = JSON.parse(text)
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error)
    const at = /position (\d+)/.exec(message)?.[1]
    const line = at === undefined ? text.split('\n').length : text.slice(0, Number(at)).split('\n').length
    throw fail(`${path}, line ${line}: ${message}`)
  }
  const fields = new Map(Object.entries(Object(table) as Record<string, unknown>))
  for (const [field, expected] of Object.entries(key)) {
    if (fields.get(field) !== expected)
      throw fail(`${path}, ${field}: ${show(fields.get(field))}, expected is ${show(expected)}`)
  }
  const rules = fields.get('rules')
  if (!Array.isArray(rules)) throw fail(`${path}, rules: ${show(rules)}, expected is a list`)
  // Inside of a JSON text, `"operation":` can only be a key: the n-th belongs to the n-th rule that has one.
  const keys = [...text.matchAll(/"operation"\s*:/g)].map(({ index }) => text.slice(0, index).split('\n').length)
  let seen = 0
  return {
    ...key,
    measured: String(fields.get('measured')),
    rules: (rules as unknown[]).map((rule, i) => {
      const hasKey = typeof rule === 'object' && rule !== null && has(rule, 'operation')
      const line = hasKey ? `line ${keys[seen++] ?? '?'}, ` : ''
      return checkRule(rule, `${path}, ${line}rules[${i}]`, fail)
    }),
  }
}

/** What a group's own numbers are. */
export interface Shape {
  readonly ranks: number
  readonly nodes: number
  readonly slotBytes: number
}

type Sourced = AlgorithmRule & { readonly source: RuleSource }

const within = (value: number, range: Range | undefined): boolean =>
  range === undefined || (value >= range[0] && value <= (range[1] ?? Infinity))

/** The rules of a group, one source after the other, as rows by size. */
export class AlgorithmTable {
  readonly rows: readonly AlgorithmRow[]
  /** Of all that ranks must agree on, and of nothing else. */
  readonly digest: string
  readonly #choices: readonly (readonly number[])[]

  constructor(sources: Readonly<Partial<Record<RuleSource, readonly AlgorithmRule[]>>>, shape: Shape) {
    const rules = (['option', 'environment', 'tuned', 'default'] as const).flatMap((source) =>
      (sources[source] ?? [])
        .filter((rule) => within(shape.ranks, rule.ranks) && within(shape.nodes, rule.nodes))
        .map((rule): Sourced => ({ ...rule, source })),
    )
    this.rows = (Object.keys(operations) as OperationName[]).flatMap((operation) =>
      (['array', 'tensor'] as const).flatMap((memory) => rowsOf(rules, operation, memory, shape)),
    )
    this.#choices = choicesOf(this.rows)
    this.digest = createHash('sha256').update(JSON.stringify(this.#choices)).digest('hex').slice(0, 8)
  }

  explain(operation: OperationName, bytes: number, memory: MemoryKind): Explanation {
    const row = this.rows.find((one) => one.operation === operation && one.memory === memory && bytes <= one.upTo)
    if (row === undefined) throw new CollectiveError('ERR_INTERNAL', `the table has no row for ${operation}`)
    const { algorithm, chunkBytes, why, source } = row
    return { operation, bytes, memory, algorithm, chunkBytes, why, source }
  }

  /** [rows][operation, is a tensor, upTo, algorithm, chunkBytes] */
  toNative(): Float64Array {
    return Float64Array.from(this.#choices.flat())
  }
}

function rowsOf(all: readonly Sourced[], operation: OperationName, memory: MemoryKind, shape: Shape): AlgorithmRow[] {
  const known = algorithmsOf[operation]
  const rules = all.filter(({ operation: of, memory: on, algorithm }) => {
    if ((of !== '*' && of !== operation) || (on ?? memory) !== memory) return false
    const chosen: Partial<Algorithm> | undefined =
      algorithm === undefined ? {} : has(known, algorithm) ? known[algorithm] : undefined
    return chosen !== undefined && (chosen.memory ?? memory) === memory && within(shape.nodes, chosen.nodes)
  })
  // Between two of these ends the same rules fit.
  const ends = new Set(rules.flatMap(({ bytes }) => (bytes === undefined ? [] : [bytes[0] - 1, bytes[1] ?? Infinity])))
  return [...[...ends].filter((end) => end >= 0 && end < Infinity).sort((a, b) => a - b), Infinity].map((upTo) => {
    const fitting = rules.filter(({ bytes }) => within(upTo, bytes))
    const chooser = fitting.find((rule) => rule.algorithm !== undefined)
    const chunker = fitting.find((rule) => rule.chunkBytes !== undefined)
    if (chooser?.algorithm === undefined || chunker?.chunkBytes === undefined)
      throw new CollectiveError('ERR_INTERNAL', `no rule fits ${operation} of ${upTo} bytes`)
    const why = chooser.why ?? 'a rule that gives no reason'
    return {
      operation,
      memory,
      upTo,
      algorithm: chooser.algorithm,
      chunkBytes: Math.min(chunker.chunkBytes, shape.slotBytes),
      why: chunker.source === 'default' ? why : `${why}; chunks by ${chunker.source}: ${chunker.why ?? ''}`,
      source: chooser.source,
    }
  })
}

/** Without what only explains. Rows that choose alike are one, so that equal choices have equal digests. */
function choicesOf(rows: readonly AlgorithmRow[]): readonly (readonly number[])[] {
  const choices: number[][] = []
  for (const { operation, memory, upTo, algorithm, chunkBytes } of rows) {
    const choice = [
      operations[operation],
      memory === 'tensor' ? 1 : 0,
      upTo,
      algorithmsOf[operation][algorithm]?.code ?? 0,
      chunkBytes,
    ]
    const last = choices.at(-1)
    if (last?.every((value, i) => i === 2 || value === choice[i]) === true) choices.pop()
    choices.push(choice)
  }
  return choices
}
