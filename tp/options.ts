// The options of initInference() and generate(), checked once where they come in. Unknown keys are errors: a misspelt option that
// is silently ignored costs its user an afternoon.

import * as v from 'valibot'
import { defaultTimeoutMs } from '../collectives/index.js'
import { inventedShapes, type InventedShape } from './checkpoint/index.js'
import { InferenceError } from './errors.js'
import type { RankConfig } from './rank.js'
import type { SamplingOptions } from './sampling.js'

export interface InferenceOptions {
  /** Directory of a Hugging Face checkpoint. Either this or `shape`. */
  readonly model?: string
  /** Shape of a well-known model with made-up weights, to measure speed without a checkpoint. */
  readonly shape?: InventedShape
  /** With `shape`: fewer layers than the model has. */
  readonly layers?: number
  /** Ranks to split the model over; under a launcher its number of ranks. Default 1. */
  readonly tensorParallel?: { readonly size?: number }
  /** Of linear operands, KV cache and exchanged sums; residual and sums are f32. Default 'bf16'. */
  readonly dtype?: 'bf16' | 'f32'
  /** Threads of each rank, on cores of their own where there are enough. Default: the allowed physical cores, shared out. */
  readonly threadsPerRank?: number
  /** Longest sequence, prompt and new tokens. Default: the model's, at most 8192. */
  readonly contextLength?: number
  /** Tokens that the KV cache holds, all sequences together. Default: twice contextLength. */
  readonly kvCacheTokens?: number
  /** Sequences that run at the same time; further ones wait. Default 8. */
  readonly maxSequences?: number
  /** Tokens of one step, the length of a prompt chunk; at least maxSequences. Default 512. */
  readonly maxStepTokens?: number
  /** Highest ISA tier to use: 'scalar', 'avx512_bf16'; with '!' that one or an error. Default: TILERANK_ISA, else the best. */
  readonly isa?: string
  /** How long one collective may wait for its peers. Default: TILERANK_TIMEOUT_MS, else 60000. */
  readonly timeoutMs?: number
  /** Time every line of a step on every thread: reports() then have kernelUs. Costs two looks at the clock a line. Default false. */
  readonly profile?: boolean
  /** Ends the loading: initInference() rejects with its reason, and no rank is left. */
  readonly signal?: AbortSignal | undefined
  /** Told while weights are read: bytes done and their total, all ranks of this process's job that it can see. */
  readonly onProgress?: (progress: { readonly loadedBytes: number; readonly totalBytes: number }) => void
}

export interface GenerateOptions extends SamplingOptions {
  /** Default: generation_config.json's, else 256, at most what the context leaves. */
  readonly maxNewTokens?: number | undefined
  /** Ids that end the text; [] for none. Default: the model's. */
  readonly eosIds?: readonly number[] | undefined
  /** Go on past end tokens. Default false. */
  readonly ignoreEos?: boolean | undefined
  /** Return the logits after the last prompt token with the first piece. Default false. */
  readonly wantLogits?: boolean | undefined
  readonly signal?: AbortSignal | undefined
}

const positive = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(most))
const callback = v.custom<(...args: never[]) => unknown>(
  (value) => typeof value === 'function',
  'a function is expected',
)

const inferenceSchema = v.strictObject({
  model: v.optional(v.pipe(v.string(), v.nonEmpty())),
  shape: v.optional(v.picklist(inventedShapes)),
  layers: v.optional(positive(4096)),
  tensorParallel: v.optional(v.strictObject({ size: v.optional(positive(4096)) })),
  dtype: v.optional(v.picklist(['bf16', 'f32'])),
  threadsPerRank: v.optional(positive(4096)),
  contextLength: v.optional(positive(2 ** 24)),
  kvCacheTokens: v.optional(positive(2 ** 30)),
  maxSequences: v.optional(positive(65536)),
  maxStepTokens: v.optional(positive(2 ** 20)),
  isa: v.optional(v.string()),
  timeoutMs: v.optional(positive(2 ** 31 - 1)),
  profile: v.optional(v.boolean()),
  signal: v.optional(v.instance(AbortSignal)),
  onProgress: v.optional(callback),
})

const generateSchema = v.strictObject({
  doSample: v.optional(v.boolean()),
  temperature: v.optional(v.number()),
  topK: v.optional(v.number()),
  topP: v.optional(v.number()),
  repetitionPenalty: v.optional(v.number()),
  seed: v.optional(v.pipe(v.number(), v.safeInteger(), v.minValue(0))),
  maxNewTokens: v.optional(v.pipe(v.number(), v.integer(), v.minValue(0))),
  eosIds: v.optional(v.array(v.pipe(v.number(), v.integer(), v.minValue(0)))),
  ignoreEos: v.optional(v.boolean()),
  wantLogits: v.optional(v.boolean()),
  signal: v.optional(v.instance(AbortSignal)),
})

function check(schema: v.GenericSchema, options: unknown, call: string): void {
  const result = v.safeParse(schema, options)
  if (result.success) return
  const [issue] = result.issues
  const path = issue.path?.map((item) => String(item.key)).join('.') ?? 'options'
  throw new InferenceError('ERR_INVALID_OPTION', `${call}: ${path}: ${issue.message}`, { option: path })
}

export function checkGenerateOptions(options: GenerateOptions): void {
  check(generateSchema, options, 'generate')
}

/** Checked options with their defaults; `size` is the number of ranks. */
export function resolveInference(
  options: InferenceOptions,
  size: number,
  maxPositions: number,
  env: NodeJS.ProcessEnv = process.env,
): RankConfig {
  const model = modelOf(options)
  const timeoutMs = options.timeoutMs ?? defaultTimeoutMs(env)
  const contextLength = options.contextLength ?? Math.min(maxPositions, 8192)
  if (contextLength > maxPositions) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `contextLength is ${String(contextLength)}, but the model has ${String(maxPositions)} positions`,
      { contextLength, maxPositions },
    )
  }
  const maxSequences = options.maxSequences ?? 8
  return {
    model,
    worldSize: size,
    dtype: options.dtype ?? 'bf16',
    // Every sequence must be able to decode in one step.
    maxTokens: Math.max(options.maxStepTokens ?? 512, maxSequences),
    maxSequences,
    contextLength,
    kvCacheTokens: options.kvCacheTokens ?? 2 * contextLength,
    timeoutMs,
    isa: options.isa ?? env['TILERANK_ISA'] ?? '',
    profile: options.profile ?? false,
  }
}

export function modelOf(options: InferenceOptions): RankConfig['model'] {
  check(inferenceSchema, options, 'initInference')
  if ((options.model === undefined) === (options.shape === undefined)) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      'initInference: give either model (a directory) or shape (made-up weights)',
    )
  }
  if (options.shape !== undefined) return { shape: options.shape, layers: options.layers ?? null }
  if (options.layers !== undefined)
    throw new InferenceError('ERR_INVALID_OPTION', 'initInference: layers goes with shape only')
  return { directory: options.model ?? '' }
}
