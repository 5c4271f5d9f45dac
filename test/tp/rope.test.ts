// Rotary positions and the other choices of a Llama checkpoint, end to end: made-up checkpoints on disk, whole engines, and beside
// them a forward pass in float64 that is written from the papers and shares no code with the engine.

import assert from 'node:assert/strict'
import { initInference, type InferenceOptions } from '../../tp/index.js'
import { largestDifference } from './golden.js'
import { headerOf, safetensors, Scratch } from './files.js'
import { randomFrom } from './interpret.js'

const hidden = 64
const inner = 96
const layers = 2
const vocabulary = 160

type Config = Readonly<Record<string, unknown>>
type Weights = ReadonlyMap<string, { readonly shape: readonly number[]; readonly data: Float64Array }>

const base: Config = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: hidden,
  intermediate_size: inner,
  num_hidden_layers: layers,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: vocabulary,
  max_position_embeddings: 64,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  hidden_act: 'silu',
  bos_token_id: 1,
  eos_token_id: 2,
}

interface Shape {
  readonly heads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly rotaryDims: number
  readonly isTied: boolean
  readonly eps: number
}

function shapeOf(config: Config): Shape {
  const heads = Number(config['num_attention_heads'])
  const headDim = Number(config['head_dim'] ?? hidden / heads)
  const part = Number(config['partial_rotary_factor'] ?? 1)
  return {
    heads,
    kvHeads: Number(config['num_key_value_heads']),
    headDim,
    rotaryDims: headDim * part,
    isTied: config['tie_word_embeddings'] === true,
    eps: Number(config['rms_norm_eps']),
  }
}

/** Multiples of 1/128 below 2: exact in f16, bf16 and f32. */
function inventWeights(config: Config): Weights {
  const random = randomFrom(7)
  const weights = new Map<string, { shape: number[]; data: Float64Array }>()
  const { heads, kvHeads, headDim, isTied } = shapeOf(config)
  const add = (name: string, shape: number[], scale: number, offset = 0): void => {
    const count = shape.reduce((a, b) => a * b, 1)
    const value = (): number => Math.round(128 * (offset + (2 * random() - 1) * scale)) / 128
    weights.set(name, { shape, data: Float64Array.from({ length: count }, value) })
  }
  const linear = (name: string, outputs: number, inputs: number, hasBias: boolean): void => {
    add(`${name}.weight`, [outputs, inputs], 2 / Math.sqrt(inputs))
    if (hasBias) add(`${name}.bias`, [outputs], 0.5)
  }
  add('model.embed_tokens.weight', [vocabulary, hidden], 1)
  for (let layer = 0; layer < layers; layer++) {
    const at = `model.layers.${String(layer)}`
    add(`${at}.input_layernorm.weight`, [hidden], 0.5, 1)
    add(`${at}.post_attention_layernorm.weight`, [hidden], 0.5, 1)
    const isBiased = config['attention_bias'] === true
    linear(`${at}.self_attn.q_proj`, heads * headDim, hidden, isBiased)
    linear(`${at}.self_attn.k_proj`, kvHeads * headDim, hidden, isBiased)
    linear(`${at}.self_attn.v_proj`, kvHeads * headDim, hidden, isBiased)
    linear(`${at}.self_attn.o_proj`, hidden, heads * headDim, isBiased)
    for (const [name, outputs, inputs] of [
      ['gate', inner, hidden],
      ['up', inner, hidden],
      ['down', hidden, inner],
    ] as const) {
      linear(`${at}.mlp.${name}_proj`, outputs, inputs, config['mlp_bias'] === true)
    }
  }
  add('model.norm.weight', [hidden], 0.5, 1)
  if (!isTied) add('lm_head.weight', [vocabulary, hidden], 0.3)
  return weights
}

/** Bits of a value that binary16 holds exactly and as a normal number, or 0. */
function halfBits(value: number): number {
  if (value === 0) return 0
  const exponent = Math.floor(Math.log2(Math.abs(value)))
  const fraction = (Math.abs(value) / 2 ** exponent - 1) * 1024
  assert.ok(Number.isInteger(fraction) && exponent >= -14)
  return (value < 0 ? 0x8000 : 0) | ((exponent + 15) << 10) | fraction
}

function encode(data: Float64Array, dtype: string): Buffer {
  const bytes = Buffer.alloc(data.length * (dtype === 'F32' ? 4 : 2))
  for (const [i, value] of data.entries()) {
    if (dtype === 'F32') bytes.writeFloatLE(value, 4 * i)
    else if (dtype === 'F16') bytes.writeUInt16LE(halfBits(value), 2 * i)
    else {
      const word = Buffer.alloc(4)
      word.writeFloatLE(value)
      bytes.writeUInt16LE(word.readUInt16LE(2), 2 * i)
    }
  }
  return bytes
}

function writeModel(folder: Scratch, config: Config, weights: Weights, dtype: string): void {
  let at = 0
  const sketches: Record<string, { dtype: string; shape: readonly number[]; offsets: number[] }> = {}
  const parts: Buffer[] = []
  for (const [name, { shape, data }] of weights) {
    const bytes = encode(data, dtype)
    sketches[name] = { dtype, shape, offsets: [at, (at += bytes.length)] }
    parts.push(bytes)
  }
  folder.write('config.json', JSON.stringify(config))
  folder.write('model.safetensors', safetensors(headerOf(sketches), Buffer.concat(parts)))
}

/**
 * Takes ids one by one and gives the logits after each; position p turns by `frequenciesAt(p)`, in the query as in the key that
 * stays in the cache.
 */
function reference(
  config: Config,
  weights: Weights,
  frequenciesAt: (position: number) => readonly number[],
): (id: number) => Float32Array {
  const { heads, kvHeads, headDim, rotaryDims, isTied, eps } = shapeOf(config)
  const tensor = (name: string): Float64Array => {
    const found = weights.get(name)
    if (!found) throw new RangeError(name)
    return found.data
  }
  const at = (values: ArrayLike<number>, i: number): number => values[i] ?? NaN
  const linear = (name: string, x: Float64Array): Float64Array => {
    const w = tensor(`${name}.weight`)
    const bias = weights.get(`${name}.bias`)?.data
    return Float64Array.from({ length: w.length / x.length }, (_, o) =>
      x.reduce((sum, value, i) => sum + value * at(w, o * x.length + i), bias ? at(bias, o) : 0),
    )
  }
  const norm = (name: string, x: Float64Array): Float64Array => {
    const gamma = tensor(name)
    const root = Math.sqrt(x.reduce((sum, value) => sum + value * value, 0) / x.length + eps)
    return x.map((value, i) => (value / root) * at(gamma, i))
  }
  const turn = (x: Float64Array, position: number): void => {
    const half = rotaryDims / 2
    const frequencies = frequenciesAt(position)
    for (let start = 0; start < x.length; start += headDim) {
      for (let i = 0; i < half; i++) {
        const angle = position * at(frequencies, i)
        const [a, b] = [at(x, start + i), at(x, start + half + i)]
        x[start + i] = a * Math.cos(angle) - b * Math.sin(angle)
        x[start + half + i] = b * Math.cos(angle) + a * Math.sin(angle)
      }
    }
  }
  const embedding = tensor('model.embed_tokens.weight')
  const keys: Float64Array[][] = Array.from({ length: layers }, () => [])
  const values: Float64Array[][] = Array.from({ length: layers }, () => [])
  let length = 0
  return (id) => {
    const position = length++
    let x = embedding.slice(id * hidden, (id + 1) * hidden)
    for (let layer = 0; layer < layers; layer++) {
      const name = `model.layers.${String(layer)}`
      const y = norm(`${name}.input_layernorm.weight`, x)
      const q = linear(`${name}.self_attn.q_proj`, y)
      const k = linear(`${name}.self_attn.k_proj`, y)
      turn(q, position)
      turn(k, position)
      keys[layer]?.push(k)
      values[layer]?.push(linear(`${name}.self_attn.v_proj`, y))
      const out = new Float64Array(heads * headDim)
      for (let head = 0; head < heads; head++) {
        const kv = Math.floor(head / (heads / kvHeads)) * headDim
        const dot = (key: Float64Array): number => {
          let sum = 0
          for (let i = 0; i < headDim; i++) sum += at(q, head * headDim + i) * at(key, kv + i)
          return sum / Math.sqrt(headDim)
        }
        const scores = (keys[layer] ?? []).map(dot)
        const largest = Math.max(...scores)
        const weightsOf = scores.map((score) => Math.exp(score - largest))
        const total = weightsOf.reduce((a, b) => a + b, 0)
        for (const [p, value] of (values[layer] ?? []).entries()) {
          for (let i = 0; i < headDim; i++) {
            out[head * headDim + i] = at(out, head * headDim + i) + (at(weightsOf, p) / total) * at(value, kv + i)
          }
        }
      }
      const o = linear(`${name}.self_attn.o_proj`, out)
      const middle = x.map((value, i) => value + at(o, i))
      const z = norm(`${name}.post_attention_layernorm.weight`, middle)
      const gate = linear(`${name}.mlp.gate_proj`, z)
      const up = linear(`${name}.mlp.up_proj`, z)
      const down = linear(
        `${name}.mlp.down_proj`,
        gate.map((g, i) => (g / (1 + Math.exp(-g))) * at(up, i)),
      )
      x = middle.map((value, i) => value + at(down, i))
    }
    return Float32Array.from(linear(isTied ? 'model.embed_tokens' : 'lm_head', norm('model.norm.weight', x)))
  }
}

const inverse = (dims: number, theta = 10000): number[] =>
  Array.from({ length: dims / 2 }, (_, i) => 1 / theta ** ((2 * i) / dims))

/** Hugging Face's dynamic NTK: the base for a sequence of `length` positions. */
function dynamicTheta(length: number, original: number, factor: number, dims: number, theta = 10000): number {
  if (length <= original) return theta
  return theta * ((factor * length) / original - (factor - 1)) ** (dims / (dims - 2))
}

function llama3(frequencies: number[], factor: number, low: number, high: number, original: number): number[] {
  return frequencies.map((f) => {
    const turns = (original * f) / (2 * Math.PI)
    const kept = Math.min(1, Math.max(0, (turns - low) / (high - low)))
    return f * (kept + (1 - kept) / factor)
  })
}

interface Case {
  readonly config: Config
  /** Frequencies of one position, of a prompt of `promptLength` and what follows it. */
  readonly frequencies: (position: number, promptLength: number) => number[]
  /** Prompts; 10 tokens more are decoded. */
  readonly lengths: readonly number[]
  readonly dtype?: string
}

const plain = (): number[] => inverse(16)
const dynamic =
  (original: number, factor: number) =>
  (position: number, promptLength: number): number[] =>
    inverse(16, dynamicTheta(Math.max(position + 1, promptLength), original, factor, 16))

const cases: Readonly<Record<string, Case>> = {
  'no scaling': { config: {}, frequencies: plain, lengths: [1, 40] },
  'another base': { config: { rope_theta: 500 }, frequencies: () => inverse(16, 500), lengths: [30] },
  'linear scaling, old spelling': {
    config: { rope_scaling: { type: 'linear', factor: 2.5 } },
    frequencies: () => inverse(16).map((f) => f / 2.5),
    lengths: [40, 100],
  },
  'linear scaling, new spelling': {
    config: { rope_scaling: { rope_type: 'linear', factor: 4 } },
    frequencies: () => inverse(16).map((f) => f / 4),
    lengths: [40],
  },
  'linear scaling in rope_parameters': {
    config: { rope_theta: undefined, rope_parameters: { rope_type: 'linear', factor: 2, rope_theta: 777 } },
    frequencies: () => inverse(16, 777).map((f) => f / 2),
    lengths: [40],
  },
  // Below the original context, growing past it while tokens are written, and beyond it from the start.
  'dynamic scaling': {
    config: { max_position_embeddings: 32, rope_scaling: { type: 'dynamic', factor: 4 } },
    frequencies: dynamic(32, 4),
    lengths: [10, 28, 32, 33, 60, 100],
  },
  'dynamic scaling with a stated original context': {
    config: {
      max_position_embeddings: 128,
      rope_scaling: { rope_type: 'dynamic', factor: 4, original_max_position_embeddings: 40 },
    },
    frequencies: dynamic(40, 4),
    lengths: [36, 90],
  },
  'llama3 scaling': {
    config: {
      max_position_embeddings: 128,
      rope_scaling: {
        rope_type: 'llama3',
        factor: 8,
        low_freq_factor: 1,
        high_freq_factor: 4,
        original_max_position_embeddings: 64,
      },
    },
    frequencies: () => llama3(inverse(16), 8, 1, 4, 64),
    lengths: [20, 100],
  },
  'half of each head turned': {
    config: { partial_rotary_factor: 0.5 },
    frequencies: () => inverse(8),
    lengths: [30],
  },
  'biases in attention and MLP': {
    config: { attention_bias: true, mlp_bias: true },
    frequencies: plain,
    lengths: [1, 30],
  },
  'biases in attention alone': { config: { attention_bias: true }, frequencies: plain, lengths: [30] },
  'heads wider than the model says': { config: { head_dim: 24 }, frequencies: () => inverse(24), lengths: [30] },
  'one KV head for all': { config: { num_key_value_heads: 1 }, frequencies: plain, lengths: [30] },
  'a tied head': { config: { tie_word_embeddings: true }, frequencies: plain, lengths: [30] },
  'weights stored in f16': { config: {}, frequencies: plain, lengths: [30], dtype: 'F16' },
  'weights stored in bf16': { config: { attention_bias: true }, frequencies: plain, lengths: [30], dtype: 'BF16' },
}

describe('engine: what a Llama checkpoint can ask for', function () {
  this.timeout(60_000)
  for (const [name, { config: changes, frequencies, lengths, dtype = 'F32' }] of Object.entries(cases)) {
    it(`computes ${name} as the float64 reference does`, async () => {
      const folder = new Scratch()
      try {
        const config: Config = { ...base, ...changes }
        const weights = inventWeights(config)
        writeModel(folder, config, weights, dtype)
        const given = { ...base, ...JSON.parse(JSON.stringify(config)) } as Config
        const prompts = lengths.map((length, s) =>
          Array.from({ length }, (_, i) => 3 + ((i * 41 + s * 13 + i * i) % 150)),
        )
        const expected = prompts.map((prompt) => {
          const next = reference(given, weights, (position) => frequencies(position, prompt.length))
          const first = prompt.map(next).at(-1) ?? new Float32Array()
          const chosen: number[] = []
          let row = first
          let margin = Infinity
          for (let i = 0; i < 10; i++) {
            const sorted = [...row].sort((a, b) => b - a)
            margin = Math.min(margin, (sorted[0] ?? NaN) - (sorted[1] ?? NaN))
            const best = row.indexOf(sorted[0] ?? NaN)
            // As far as the choice is clear, the tokens must agree.
            if (margin > 1e-3) chosen.push(best)
            row = next(best)
          }
          return { first, chosen }
        })
        assert.ok(
          expected.some(({ chosen }) => chosen.length > 3),
          'no token is clear enough to be checked',
        )
        const runs: InferenceOptions[] = [
          { tensorParallel: { size: 1 }, maxSequences: 1, maxStepTokens: 1 },
          { tensorParallel: { size: 1 } },
          { tensorParallel: { size: 2 }, maxSequences: 2, maxStepTokens: 13 },
        ]
        for (const options of runs) {
          const engine = await initInference({ model: folder.path, dtype: 'f32', ...options })
          try {
            // Twice: slots and blocks of the first round are used again in another order.
            for (const order of [prompts.keys(), [...prompts.keys()].reverse()]) {
              await Promise.all(
                [...order].map(async (p) => {
                  const { ids, logits } = await engine.complete(
                    { ids: prompts[p] ?? [] },
                    { maxNewTokens: 10, temperature: 0, ignoreEos: true, wantLogits: true },
                  )
                  assert.ok(logits)
                  const { first = new Float32Array(), chosen = [] } = expected[p] ?? {}
                  const difference = largestDifference(logits, first)
                  const what = `prompt of ${String(lengths[p])}, ${JSON.stringify(options)}`
                  assert.ok(difference <= 2e-4, `${what}: logits are off by ${String(difference)}`)
                  assert.deepEqual(ids.slice(0, chosen.length), chosen, what)
                }),
              )
            }
          } finally {
            await engine.close()
          }
        }
      } finally {
        folder[Symbol.dispose]()
      }
    })
  }
})
