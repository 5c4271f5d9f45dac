// Checkpoints for tests: where the ones of this package are, and how to write a bad one, byte by byte.

import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** The package's root: tests run from dist/test/tp, or from a build elsewhere with the root as working directory. */
export const packageRoot =
  [fileURLToPath(new URL('../../..', import.meta.url)), process.cwd()].find((path) =>
    existsSync(join(path, 'models', 'demo-stories')),
  ) ?? process.cwd()

export const demoModel = join(packageRoot, 'models', 'demo-stories')
export const testModel = (name: string): string => join(packageRoot, 'test', 'models', name)
/** Further models that may lie beside a working copy of the project; null when they do not. */
export function siblingModel(name: string): string | null {
  const path = join(packageRoot, '..', 'shared', 'models', name)
  return existsSync(path) ? path : null
}

/** A directory that ends with the test. */
export class Scratch implements Disposable {
  readonly path = mkdtempSync(join(tmpdir(), 'tilerank-test-'))

  write(name: string, content: string | Uint8Array): string {
    const path = join(this.path, name)
    writeFileSync(path, content)
    return path
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true })
  }
}

/** A safetensors file from the text of its header and its data. */
export function safetensors(header: string | Uint8Array, data: Uint8Array | number = 0): Buffer {
  const text = Buffer.from(header)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(text.length))
  return Buffer.concat([length, text, typeof data === 'number' ? Buffer.alloc(data) : data])
}

export interface TensorSketch {
  readonly dtype?: unknown
  readonly shape?: unknown
  readonly offsets?: unknown
}

/** {"name": {"dtype", "shape", "data_offsets"}, ...}; default: F32 [2, 2] at [0, 16]. */
export function headerOf(tensors: Readonly<Record<string, TensorSketch>>): string {
  const entries = Object.entries(tensors).map(([name, { dtype = 'F32', shape = [2, 2], offsets = [0, 16] }]) => [
    name,
    { dtype, shape, data_offsets: offsets },
  ])
  return JSON.stringify(Object.fromEntries(entries))
}

/** The smallest Llama configuration that is accepted; the values given replace or, if undefined, remove. */
export function llamaConfig(changes: Readonly<Record<string, unknown>> = {}): string {
  return JSON.stringify({
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: 64,
    intermediate_size: 172,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    vocab_size: 320,
    max_position_embeddings: 256,
    bos_token_id: 1,
    eos_token_id: 2,
    ...changes,
  })
}
