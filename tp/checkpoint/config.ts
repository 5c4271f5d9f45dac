// config.json and generation_config.json -> ArchSpec and GenerationDefaults. Both come from a stranger: every number is checked for
// kind and range, and against the others, before anything is built or allocated from it. An error names the file, the key, the
// value and what is allowed. One table entry per model family; a family that is not in it is refused, not guessed.

import { InferenceError, shown } from '../errors.js'
import type { ArchSpec, GenerationDefaults, RopeScaling } from './arch.js'
import {
  countOf,
  decodeUtf8,
  isJsonArray,
  isJsonObject,
  JsonError,
  JsonNumber,
  type JsonObject,
  JsonReader,
  type JsonValue,
} from './json.js'

/** Far above any model, far below what makes a product of two of them inexact or an allocation absurd. */
const limits = {
  /** hidden_size, intermediate_size, and heads times head_dim. The widest published dense models have 2^17. */
  width: 2 ** 20,
  /** Rows of the embedding table. The largest published vocabularies have 2^18; sampling.ts sorts up to 2^21 ids. */
  vocabulary: 2 ** 21,
  layers: 4096,
  heads: 16384,
  headDim: 4096,
  /** Positions; beyond 2^24 a float32 cannot count them. */
  positions: 2 ** 24,
}

const jsonLimits = { maxDepth: 32, maxEntries: 1_000_000, maxStringLength: 1_000_000 }

/** One JSON object of a configuration, read key by key. null counts as absent, as it does in transformers. */
class Settings {
  constructor(
    private readonly file: string,
    private readonly object: JsonObject,
    /** Where the object stands in the file: '' or 'rope_scaling.'. */
    private readonly prefix = '',
  ) {}

  get(key: string): JsonValue | undefined {
    return this.object.get(key) ?? undefined
  }

  integer(key: string, allowed: { readonly min: number; readonly max: number }): number | undefined {
    const value = this.get(key)
    if (value === undefined) return undefined
    const count = integerOf(value)
    if (count === null || count < allowed.min || count > allowed.max) {
      throw this.wrong(key, `an integer from ${allowed.min} to ${allowed.max}`)
    }
    return count
  }

  number(key: string, what: string, isAllowed: (value: number) => boolean): number | undefined {
    const value = this.get(key)
    if (value === undefined) return undefined
    if (!(value instanceof JsonNumber) || !Number.isFinite(value.value) || !isAllowed(value.value))
      throw this.wrong(key, what)
    return value.value
  }

  boolean(key: string): boolean | undefined {
    const value = this.get(key)
    if (value === undefined || typeof value === 'boolean') return value
    throw this.wrong(key, 'true or false')
  }

  string(key: string): string | undefined {
    const value = this.get(key)
    if (value === undefined || typeof value === 'string') return value
    throw this.wrong(key, 'a string')
  }

  strings(key: string): readonly string[] | undefined {
    const value = this.get(key)
    if (value === undefined) return undefined
    if (isJsonArray(value) && value.every((item) => typeof item === 'string')) return value
    throw this.wrong(key, 'a list of strings')
  }

  section(key: string): Settings | undefined {
    const value = this.get(key)
    if (value === undefined) return undefined
    if (!isJsonObject(value)) throw this.wrong(key, 'an object or null')
    return new Settings(this.file, value, `${this.prefix}${key}.`)
  }

  /** Ids of the vocabulary: one, a list, or none. */
  tokenIds(key: string, vocabSize: number): readonly number[] | undefined {
    const value = this.get(key)
    if (value === undefined) return undefined
    const ids = (isJsonArray(value) ? value : [value]).map(countOf)
    const isId = (id: number | null): id is number => id !== null && id < vocabSize
    if (ids.length > 1024 || !ids.every(isId))
      throw this.wrong(key, `token ids from 0 to ${vocabSize - 1} (vocab_size is ${vocabSize})`)
    return [...new Set(ids)]
  }

  missing(key: string): InferenceError {
    const path = this.prefix + key
    return new InferenceError('ERR_BAD_CONFIG', `${this.file}: ${path} is missing`, { file: this.file, key: path })
  }

  wrong(key: string, allowed: string, why?: string): InferenceError {
    return this.refuse('ERR_BAD_CONFIG', key, `allowed is ${allowed}${why === undefined ? '' : `: ${why}`}`)
  }

  unsupported(key: string, why: string): InferenceError {
    return this.refuse('ERR_UNSUPPORTED_MODEL', key, why)
  }

  private refuse(code: 'ERR_BAD_CONFIG' | 'ERR_UNSUPPORTED_MODEL', key: string, why: string): InferenceError {
    const path = this.prefix + key
    const value = plain(this.get(key))
    return new InferenceError(code, `${this.file}: ${path} is ${shown(value)}; ${why}`, {
      file: this.file,
      key: path,
      value,
    })
  }
}

/** An integer, also where it is written 32.0 or 1e3. */
function integerOf(value: JsonValue): number | null {
  return value instanceof JsonNumber && Number.isSafeInteger(value.value) ? value.value : null
}

/** For messages. */
function plain(value: JsonValue | undefined): unknown {
  if (value instanceof JsonNumber) return Number.isFinite(value.value) ? value.value : value.text
  if (isJsonArray(value)) return value.map(plain)
  if (isJsonObject(value)) return Object.fromEntries([...value].map(([key, item]) => [key, plain(item)]))
  return value
}

function parseSettings(bytes: Uint8Array, file: string): Settings {
  try {
    const root = new JsonReader(decodeUtf8(bytes), jsonLimits).document()
    if (!isJsonObject(root)) throw new JsonError('it is not a JSON object')
    return new Settings(file, root)
  } catch (error) {
    if (!(error instanceof JsonError)) throw error
    throw new InferenceError('ERR_BAD_CONFIG', `${file}: ${error.message}`, { file })
  }
}

interface Family {
  readonly modelType: string
  /** Classes of transformers that this family's builder covers. */
  readonly architectures: readonly string[]
  readonly parse: (config: Settings, modelType: string, hasTensor: (name: string) => boolean) => ArchSpec
}

const families: readonly Family[] = [
  // The second spelling stands in checkpoints converted before transformers 4.28.
  { modelType: 'llama', architectures: ['LlamaForCausalLM', 'LLaMAForCausalLM'], parse: parseLlama },
]

/** What a message offers to somebody whose model is refused. */
export const supportedModelTypes: readonly string[] = families.map((family) => family.modelType)

export interface ParsedConfig {
  readonly arch: ArchSpec
  /** What generation_config.json may leave open. */
  readonly tokens: { readonly bosTokenId: number | null; readonly eosTokenIds: readonly number[] }
}

/** `hasTensor` tells what the weight files hold: only they say whether a tied head was stored all the same. */
export function parseConfig(bytes: Uint8Array, file: string, hasTensor: (name: string) => boolean): ParsedConfig {
  const config = parseSettings(bytes, file)
  const modelType = config.string('model_type')
  const architectures = config.strings('architectures') ?? []
  const family = families.find(
    (entry) =>
      (modelType === undefined || modelType === entry.modelType) &&
      (architectures.length === 0
        ? modelType !== undefined
        : architectures.some((name) => entry.architectures.includes(name))),
  )
  if (family === undefined) {
    const known = families.map((entry) => `${entry.modelType} (${entry.architectures[0] ?? ''})`).join(', ')
    throw new InferenceError(
      'ERR_UNKNOWN_ARCHITECTURE',
      `${file}: model_type ${shown(modelType ?? null)} with architectures ${shown(architectures)} is not supported; supported: ${known}`,
      { file, modelType: modelType ?? null, architectures, supported: supportedModelTypes },
    )
  }
  if (config.get('quantization_config') !== undefined) {
    throw config.unsupported(
      'quantization_config',
      'checkpoints that were quantised beforehand are not read; take the original one in f32, f16 or bf16',
    )
  }
  const arch = family.parse(config, modelType ?? family.modelType, hasTensor)
  return {
    arch,
    tokens: {
      bosTokenId: config.tokenIds('bos_token_id', arch.vocabSize)?.[0] ?? null,
      eosTokenIds: config.tokenIds('eos_token_id', arch.vocabSize) ?? [],
    },
  }
}

/** Llama 1 to 3 and what kept its form. Defaults are those of transformers' LlamaConfig; sizes have none here. */
function parseLlama(config: Settings, modelType: string, hasTensor: (name: string) => boolean): ArchSpec {
  const size = (key: string, max: number): number => {
    const value = config.integer(key, { min: 1, max })
    if (value === undefined) throw config.missing(key)
    return value
  }
  const hiddenSize = size('hidden_size', limits.width)
  const intermediateSize = size('intermediate_size', limits.width)
  const numLayers = size('num_hidden_layers', limits.layers)
  const numHeads = size('num_attention_heads', limits.heads)
  const vocabSize = size('vocab_size', limits.vocabulary)
  const numKvHeads = config.integer('num_key_value_heads', { min: 1, max: numHeads }) ?? numHeads
  if (numHeads % numKvHeads !== 0) {
    throw config.wrong('num_key_value_heads', `a divisor of num_attention_heads (${numHeads})`)
  }

  const givenHeadDim = config.integer('head_dim', { min: 2, max: limits.headDim })
  if (givenHeadDim === undefined && hiddenSize % numHeads !== 0) {
    throw config.wrong('num_attention_heads', `a divisor of hidden_size (${hiddenSize})`, 'there is no head_dim')
  }
  const headDim = givenHeadDim ?? hiddenSize / numHeads
  const headDimKey = givenHeadDim === undefined ? 'hidden_size' : 'head_dim'
  if (headDim % 2 !== 0 || headDim > limits.headDim) {
    const why = 'rotary positions turn pairs of features'
    throw config.wrong(headDimKey, `what gives an even head size up to ${limits.headDim} (here ${headDim})`, why)
  }
  if (numHeads * headDim > limits.width) {
    throw config.wrong(headDimKey, `heads times head size up to ${limits.width} (here ${numHeads} x ${headDim})`)
  }

  const activation = config.string('hidden_act') ?? 'silu'
  // 'swish' is the older name of the same function.
  if (activation !== 'silu' && activation !== 'swish') throw config.unsupported('hidden_act', "supported is 'silu'")

  const storedPositions = config.integer('max_position_embeddings', { min: 1, max: limits.positions }) ?? 2048
  const { rope, maxPositions } = parseRope(config, headDim, storedPositions)
  return {
    family: 'llama',
    modelType,
    hiddenSize,
    intermediateSize,
    numLayers,
    numHeads,
    numKvHeads,
    headDim,
    vocabSize,
    maxPositions,
    normEps: config.number('rms_norm_eps', 'a number above 0 and at most 0.1', (eps) => eps > 0 && eps <= 0.1) ?? 1e-6,
    activation: 'silu',
    attentionBias: config.boolean('attention_bias') ?? false,
    mlpBias: config.boolean('mlp_bias') ?? false,
    tiedHead: (config.boolean('tie_word_embeddings') ?? false) && !hasTensor('lm_head.weight'),
    rope,
  }
}

/**
 * Rotary positions: `rope_theta` beside `rope_scaling`, or all of it in `rope_parameters` as transformers 5 writes. Linear
 * and dynamic scaling stretch max_position_embeddings by their factor, unless original_max_position_embeddings says that it is
 * stretched already; llama3 always states the stretched length.
 */
function parseRope(
  config: Settings,
  headDim: number,
  storedPositions: number,
): { readonly rope: ArchSpec['rope']; readonly maxPositions: number } {
  const parameters = config.section('rope_parameters')
  const scalingSection = config.section('rope_scaling')
  if (parameters !== undefined && scalingSection !== undefined) {
    throw config.wrong('rope_scaling', 'null beside rope_parameters', 'they say the same thing in two spellings')
  }
  const section = parameters ?? scalingSection
  const isBase = (theta: number): boolean => theta > 1 && theta <= 1e15
  const baseOf = (from: Settings | undefined) => from?.number('rope_theta', 'a number above 1 and at most 1e15', isBase)
  const theta = baseOf(parameters) ?? baseOf(config) ?? 10000

  const partIn = parameters?.get('partial_rotary_factor') === undefined ? config : parameters
  const part =
    partIn.number('partial_rotary_factor', 'a number above 0 and at most 1', (value) => value > 0 && value <= 1) ?? 1
  const rotaryDims = Math.trunc(headDim * part)
  if (rotaryDims < 2 || rotaryDims % 2 !== 0) {
    throw partIn.wrong(
      'partial_rotary_factor',
      `what makes an even number of the ${headDim} features of a head, 2 or more`,
    )
  }
  const withScaling = (scaling: RopeScaling, maxPositions: number) => {
    if (maxPositions <= limits.positions) return { rope: { theta, rotaryDims, scaling }, maxPositions }
    throw (section ?? config).wrong('factor', `what stretches max_position_embeddings to ${limits.positions} at most`)
  }
  if (section === undefined) return withScaling({ kind: 'default' }, storedPositions)

  const oldKind = section.string('type')
  const kind = section.string('rope_type') ?? oldKind ?? 'default'
  if (oldKind !== undefined && oldKind !== kind) throw section.wrong('type', `the same as rope_type (${shown(kind)})`)
  const atLeastOne = (key: string): number | undefined =>
    section.number(key, 'a number from 1 to 1e6', (v) => v >= 1 && v <= 1e6)
  const factor = (): number => {
    const value = atLeastOne('factor')
    if (value === undefined) throw section.missing('factor')
    return value
  }
  const range = { min: 1, max: limits.positions }
  const original =
    section.integer('original_max_position_embeddings', range) ??
    config.integer('original_max_position_embeddings', range)
  switch (kind) {
    case 'default':
      return withScaling({ kind: 'default' }, storedPositions)
    case 'linear': {
      const stretch = factor()
      const maxPositions = original === undefined ? Math.floor(storedPositions * stretch) : storedPositions
      return withScaling({ kind: 'linear', factor: stretch }, maxPositions)
    }
    case 'dynamic': {
      const stretch = factor()
      const maxPositions = original === undefined ? Math.floor(storedPositions * stretch) : storedPositions
      return withScaling(
        { kind: 'dynamic', factor: stretch, originalMaxPositions: original ?? storedPositions },
        maxPositions,
      )
    }
    case 'llama3': {
      const frequency = (key: string) =>
        section.number(key, 'a number above 0 and at most 1e6', (v) => v > 0 && v <= 1e6)
      const lowFreqFactor = frequency('low_freq_factor') ?? 1
      const highFreqFactor = frequency('high_freq_factor') ?? 4
      if (lowFreqFactor >= highFreqFactor) {
        throw section.wrong('high_freq_factor', `a number above low_freq_factor (${lowFreqFactor})`)
      }
      const originalMaxPositions = original ?? 8192
      const scaling: RopeScaling = {
        kind: 'llama3',
        factor: atLeastOne('factor') ?? 8,
        lowFreqFactor,
        highFreqFactor,
        originalMaxPositions,
      }
      return withScaling(scaling, storedPositions)
    }
    default: {
      const key = section.get('rope_type') === undefined ? 'type' : 'rope_type'
      throw section.unsupported(key, 'supported are default, linear, dynamic and llama3')
    }
  }
}

/**
 * generation_config.json, with the defaults of transformers where it is silent; `bytes` is null when there is none.
 * max_length is left aside on purpose: it counts the prompt, and its default of 20 is a surprise, not a wish.
 */
export function parseGenerationConfig(
  bytes: Uint8Array | null,
  file: string,
  { arch, tokens }: ParsedConfig,
): GenerationDefaults {
  const settings = bytes === null ? new Settings(file, new Map()) : parseSettings(bytes, file)
  // As tp/sampling.ts allows them to a request.
  const isTemperature = (value: number): boolean => value === 0 || (value >= 1e-4 && value <= 100)
  const isPenalty = (value: number): boolean => value >= 0.01 && value <= 100
  return {
    bosTokenId: settings.tokenIds('bos_token_id', arch.vocabSize)?.[0] ?? tokens.bosTokenId,
    eosTokenIds: settings.tokenIds('eos_token_id', arch.vocabSize) ?? tokens.eosTokenIds,
    doSample: settings.boolean('do_sample') ?? false,
    temperature: settings.number('temperature', '0 (greedy) or a number from 0.0001 to 100', isTemperature) ?? 1,
    topK: settings.integer('top_k', { min: 0, max: limits.vocabulary }) ?? 50,
    topP: settings.number('top_p', 'a number above 0 and at most 1', (value) => value > 0 && value <= 1) ?? 1,
    repetitionPenalty: settings.number('repetition_penalty', 'a number from 0.01 to 100', isPenalty) ?? 1,
    maxNewTokens: settings.integer('max_new_tokens', { min: 1, max: limits.positions }) ?? null,
  }
}
