// The golden cases of a model folder: reading golden.json, and its tolerances.

import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from '../../native/index.js'

export interface GreedyCase {
  readonly prompt: number
  readonly max_new_tokens: number
  readonly eos_token_id: readonly number[]
  readonly ids: readonly number[]
  readonly min_margin: number
  readonly bf16_agree: number | null
  readonly text?: string
}

export interface Golden {
  readonly prompts: readonly {
    readonly ids: readonly number[]
    readonly text?: string
    readonly last_logits: { readonly f32: string }
  }[]
  readonly batch: { readonly prompts: readonly number[] }
  readonly precision: { readonly bf16: { readonly max_abs: number } }
  readonly greedy: readonly GreedyCase[]
  readonly perplexity?: { readonly ids: readonly number[]; readonly nll: readonly number[]; readonly mean_nll: number }
}

const shared = join(packageRoot, '..', 'shared', 'models')

/** Folders of the cases; null where the machine does not have one (only those that the project may not carry). */
export const modelFolders: Readonly<Record<string, string | null>> = {
  llama: join(packageRoot, 'test', 'models', 'llama'),
  'llama-gqa-odd': join(packageRoot, 'test', 'models', 'llama-gqa-odd'),
  'demo-stories': join(packageRoot, 'models', 'demo-stories'),
  stories260K: existsSync(join(shared, 'stories260K')) ? join(shared, 'stories260K') : null,
  'stories260K-bf16': existsSync(join(shared, 'stories260K-bf16')) ? join(shared, 'stories260K-bf16') : null,
}

export function readGolden(folder: string): Golden {
  return JSON.parse(readFileSync(join(folder, 'golden.json'), 'utf8')) as Golden
}

export function decodeF32(base64: string): Float32Array {
  const bytes = Buffer.from(base64, 'base64')
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength))
}

export function largestDifference(a: Float32Array, b: Float32Array): number {
  if (a.length !== b.length) return Infinity
  // NaN compares as larger than anything.
  return a.reduce((most, x, i) => {
    const d = Math.abs(x - (b[i] ?? NaN))
    return d <= most ? most : Number.isNaN(d) ? Infinity : d
  }, 0)
}

export function logitTolerance(golden: Golden, reference: Float32Array, dtype: 'f32' | 'bf16'): number {
  if (dtype === 'f32') return 5e-4
  const largest = reference.reduce((most, x) => Math.max(most, Math.abs(x)), 1)
  return 3 * golden.precision.bf16.max_abs + 0.02 * largest
}

/** How many leading tokens a correct implementation must give; 0: the case says nothing at this dtype. */
export function tokensThatMustAgree(greedy: GreedyCase, dtype: 'f32' | 'bf16'): number {
  if (dtype === 'f32') return greedy.min_margin > 2e-3 ? greedy.ids.length : 0
  if (greedy.bf16_agree === null) return 0
  return greedy.min_margin > 0.1 ? greedy.bf16_agree : Math.min(4, greedy.bf16_agree)
}
