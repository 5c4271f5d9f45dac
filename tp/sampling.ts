// One row of logits -> one token. Last step of the walk of a token: the ranks have applied the repetition penalty to their shards
// of the vocabulary and handed over either the best candidates or the whole row; the choice is made here, the same for both.
// Order and meaning are those of Hugging Face transformers' generate(): repetition penalty, temperature, top-k, top-p, draw.
// Arithmetic is float64 on float32 logits; ties go to the lower id, so the choice does not depend on the number of ranks.

import { randomInt } from 'node:crypto'

import { InferenceError, shown } from './errors.js'

/** What a request asks for; all of it optional, the rest comes from generation_config.json. */
export interface SamplingOptions {
  /** Without it: true if temperature, topK or topP are given, else as the model's generation_config.json says. */
  readonly doSample?: boolean | undefined
  /** 0 means greedy. */
  readonly temperature?: number | undefined
  /** 0 means all. */
  readonly topK?: number | undefined
  readonly topP?: number | undefined
  readonly repetitionPenalty?: number | undefined
  /** Without it a random one is taken; the resolved parameters tell which. */
  readonly seed?: number | undefined
}

/** Resolved and checked. Greedy (doSample false) always has temperature 1, topK 0, topP 1: there is one form of it. */
export interface SamplingParams {
  readonly doSample: boolean
  /** Above 0. */
  readonly temperature: number
  /** 0: all. */
  readonly topK: number
  /** Above 0, at most 1; 1: all. */
  readonly topP: number
  readonly repetitionPenalty: number
  readonly seed: number
}

/** What generation_config.json contributes (GenerationDefaults of tp/checkpoint has these and more). */
export type SamplingDefaults = Omit<SamplingParams, 'seed'>

/**
 * The best of a row of logits, penalty applied, temperature not. Sorted by value descending, then id ascending, and a true
 * prefix of the whole row in that order: no token left out stands before one that is here.
 */
export interface RowCandidates {
  readonly ids: Int32Array
  readonly values: Float32Array
  /** Over the whole vocabulary. */
  readonly max: number
  /** Over the whole vocabulary: sum of exp((x - max) / temperature), with the temperature of SamplingParams (1 if greedy). */
  readonly sumExp: number
  /** ids and values hold the whole vocabulary. */
  readonly complete: boolean
}

export interface Choice {
  readonly id: number
  /** Of the whole distribution after penalty and temperature, before top-k and top-p. */
  readonly logProb: number
}

const optionRules = {
  doSample: { allowed: 'true or false', isAllowed: (v: unknown) => typeof v === 'boolean' },
  // Below 1e-4 differences of logits overflow the exponential for no use: 0 says greedy.
  temperature: {
    allowed: '0 (greedy) or a number from 0.0001 to 100',
    isAllowed: (v: unknown) => v === 0 || isWithin(v, 1e-4, 100),
  },
  topK: {
    allowed: 'an integer from 0 (all) to 2^21',
    isAllowed: (v: unknown) => Number.isInteger(v) && isWithin(v, 0, 2 ** 21),
  },
  topP: {
    allowed: 'a number above 0 and at most 1 (all)',
    isAllowed: (v: unknown) => isWithin(v, Number.MIN_VALUE, 1),
  },
  repetitionPenalty: {
    allowed: 'a number from 0.01 to 100 (1: none)',
    isAllowed: (v: unknown) => isWithin(v, 0.01, 100),
  },
  seed: {
    allowed: 'an integer from 0 to 2^53 - 1',
    isAllowed: (v: unknown) => Number.isSafeInteger(v) && isWithin(v, 0, 2 ** 53),
  },
} as const satisfies Readonly<
  Record<keyof SamplingOptions, { allowed: string; isAllowed: (value: unknown) => boolean }>
>

function isWithin(value: unknown, min: number, max: number): boolean {
  return typeof value === 'number' && value >= min && value <= max
}

export function resolveSampling(options: SamplingOptions, defaults: SamplingDefaults): SamplingParams {
  checkOptions(options)
  const asksToSample = (options.temperature ?? options.topK ?? options.topP) !== undefined
  const temperature = options.temperature ?? defaults.temperature
  const repetitionPenalty = options.repetitionPenalty ?? defaults.repetitionPenalty
  const seed = options.seed ?? randomInt(2 ** 48 - 1)
  const doSample = options.doSample ?? (asksToSample || defaults.doSample)
  if (!doSample || temperature === 0)
    return { doSample: false, temperature: 1, topK: 0, topP: 1, repetitionPenalty, seed }
  const params = {
    doSample,
    temperature,
    topK: options.topK ?? defaults.topK,
    topP: options.topP ?? defaults.topP,
    repetitionPenalty,
    seed,
  }
  checkOptions(params)
  return params
}

function checkOptions(options: unknown): void {
  if (typeof options !== 'object' || options === null) {
    throw new InferenceError('ERR_INVALID_OPTION', `sampling options are ${shown(options)}; allowed is an object`)
  }
  const entries: readonly (readonly [string, unknown])[] = Object.entries(options)
  for (const [key, value] of entries) {
    if (!isOption(key)) {
      const known = Object.keys(optionRules).join(', ')
      throw new InferenceError('ERR_INVALID_OPTION', `${shown(key)} is no sampling option; known are ${known}`, {
        option: key,
        value,
      })
    }
    const rule = optionRules[key]
    if (value !== undefined && !rule.isAllowed(value)) {
      throw new InferenceError('ERR_INVALID_OPTION', `${key} is ${shown(value)}; allowed is ${rule.allowed}`, {
        option: key,
        value,
      })
    }
  }
}

const isOption = (key: string): key is keyof SamplingOptions => Object.hasOwn(optionRules, key)

/**
 * Whether the candidates give exactly what the whole row would give. `draw` makes plain sampling (no top-k, no top-p)
 * decidable, too: it walks down the sorted row and needs only what stands before the draw.
 */
export function isDecided(row: RowCandidates, sampling: SamplingParams, draw?: number): boolean {
  const { values } = row
  const last = values[values.length - 1]
  if (last === undefined) return false
  if (isWhole(row) || !sampling.doSample) return true
  if (sampling.topK > 0) {
    // All that tie with the k-th stay; a candidate below it proves that none of them is missing.
    const threshold = values[sampling.topK - 1]
    return threshold !== undefined && last < threshold
  }
  const mass = massOf(row, values.length, sampling.temperature)
  if (sampling.topP < 1) return mass >= sampling.topP * row.sumExp
  return draw !== undefined && draw * row.sumExp < mass
}

/** The token for a `draw` in [0, 1). The row must be decided: isDecided(row, sampling, draw). */
export function chooseToken(row: RowCandidates, sampling: SamplingParams, draw: number): Choice {
  checkRow(row)
  if (!(draw >= 0 && draw < 1))
    throw new InferenceError('ERR_INVALID_OPTION', `draw is ${draw}; allowed is [0, 1)`, { draw })
  if (!isDecided(row, sampling, draw)) {
    throw new InferenceError(
      'ERR_INTERNAL',
      `${row.ids.length} candidates do not decide this row; gather the whole row first`,
    )
  }
  const { values, sumExp } = row
  const { temperature } = sampling
  if (!sampling.doSample) return choiceAt(row, 0, temperature)

  // Kept by top-k: all that are not below the k-th value, so ties at the threshold stay.
  let kept = values.length
  if (sampling.topK > 0 && sampling.topK < kept) {
    const threshold = values[sampling.topK - 1] ?? -Infinity
    kept = sampling.topK
    while (kept < values.length && (values[kept] ?? -Infinity) === threshold) kept++
  }
  // Kept by top-p: each token whose betters have together less than topP of what top-k left; at least the first.
  let total = sampling.topK > 0 ? massOf(row, kept, temperature) : sumExp
  if (sampling.topP < 1) {
    let before = 0
    let count = 0
    const limit = sampling.topP * total
    while (count < kept && before < limit) before += weightAt(row, count++, temperature)
    kept = Math.max(1, count)
    total = before
  }
  // Inverse of the cumulative distribution over what is kept, best first.
  const target = draw * total
  let cumulative = 0
  let chosen = 0
  for (let index = 0; index < kept; index++) {
    const weight = weightAt(row, index, temperature)
    if (weight === 0) break // sorted: nothing but zeros follows, and a token of probability 0 is never drawn
    cumulative += weight
    chosen = index
    if (cumulative > target) break
  }
  return choiceAt(row, chosen, temperature)
}

/**
 * What the ranks do to their shards, for rows that come without it: every id of the sequence, prompt included, once, however
 * often it stands there (Keskar et al. 2019, "CTRL", section 4.1, with the sign rule of transformers).
 */
export function penalise(logits: Float32Array, sequence: Iterable<number>, penalty: number): void {
  if (penalty === 1) return
  for (const id of new Set(sequence)) {
    const score = logits[id]
    if (score === undefined)
      throw new InferenceError('ERR_TOKEN_OUT_OF_RANGE', `id ${id} is not below ${logits.length}`, { id })
    logits[id] = score < 0 ? score * penalty : score / penalty
  }
}

/**
 * A whole row from logits in the order of the vocabulary, penalty applied: what RowCandidates is when `complete`. Sorting
 * 128,000 logits takes some 20 to 30 ms on one core, which is why ranks send candidates first.
 */
export function wholeRow(logits: Float32Array, temperature: number): RowCandidates {
  const count = logits.length
  const idBits = 2 ** 21
  if (count > idBits) throw new RangeError(`a row has ${count} logits; at most ${idBits} are sorted`)
  // A float32 whose bits are mapped so that larger values come first, times 2^21, plus the id: 53 bits, exact in a double, and
  // Float64Array sorts them natively.
  const words = new Uint32Array(new Float32Array(logits).buffer)
  const keys = new Float64Array(count)
  for (let id = 0; id < count; id++) {
    const word = words[id] ?? 0
    // Negative numbers grow with their bits already; -0 is made a 0.
    keys[id] = (word > 0x80000000 ? word : 0x7fffffff - (word & 0x7fffffff)) * idBits + id
  }
  keys.sort()
  const ids = new Int32Array(count)
  for (let index = 0; index < count; index++) ids[index] = (keys[index] ?? 0) % idBits
  const values = new Float32Array(count)
  for (let index = 0; index < count; index++) values[index] = logits[ids[index] ?? 0] ?? NaN
  // A NaN is somewhere else than first, but makes the sum NaN.
  const max = values[0] ?? -Infinity
  let sumExp = 0
  for (let index = 0; index < count; index++) sumExp += Math.exp(((values[index] ?? NaN) - max) / temperature)
  return { ids, values, max, sumExp, complete: true }
}

/** Whatever is left out has probability 0 where the last candidate has. */
function isWhole({ values, complete }: RowCandidates): boolean {
  return complete || values[values.length - 1] === -Infinity
}

function weightAt(row: RowCandidates, index: number, temperature: number): number {
  return Math.exp(((row.values[index] ?? -Infinity) - row.max) / temperature)
}

function massOf(row: RowCandidates, count: number, temperature: number): number {
  let mass = 0
  for (let index = 0; index < count; index++) mass += weightAt(row, index, temperature)
  return mass
}

function choiceAt(row: RowCandidates, index: number, temperature: number): Choice {
  const logProb = ((row.values[index] ?? -Infinity) - row.max) / temperature - Math.log(row.sumExp)
  return { id: row.ids[index] ?? -1, logProb }
}

/** NaN anywhere in the vocabulary shows in max or in sumExp. */
function checkRow({ ids, values, max, sumExp }: RowCandidates): void {
  const fault =
    ids.length === 0 || ids.length !== values.length
      ? `there are ${ids.length} ids and ${values.length} values`
      : max === -Infinity
        ? 'all logits are -Infinity: every token was banned or the weights are damaged'
        : !Number.isFinite(max) || !Number.isFinite(sumExp) || sumExp <= 0
          ? `a logit is NaN or infinite (max ${max}, sum of exponentials ${sumExp}): the weights are damaged or overflowed`
          : values.some(Number.isNaN)
            ? 'a logit is NaN: the weights are damaged or overflowed'
            : null
  if (fault !== null) throw new InferenceError('ERR_BAD_LOGITS', `no token can be chosen: ${fault}`, { max, sumExp })
}
