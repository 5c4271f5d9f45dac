// Attention over a paged KV cache on one rank: KvCache owns a pool of blocks of 32 tokens, packed for the kernels at
// write time, and hands out block ids; a sequence is a list of them in any order. The engine's cache has the same
// layout and pages but lives in the runner's memory; this one is for tests, benchmarks and programs of one rank.

import { nativeAddon } from '../native/index.js'
import { elementBytes, type DType } from '../native/types.js'
import { callKernel, KernelError } from './errors.js'
import type { Elements, KernelTier } from './rows.js'

/** Tokens of a KV block. */
export const kvBlockTokens = 32

export interface KvCacheOptions {
  readonly tier: KernelTier
  readonly dtype: DType
  readonly numKvHeads: number
  /** Even, at most 1024. */
  readonly headDim: number
  readonly numBlocks: number
}

export interface KvWriteOptions {
  /** [tokens, (numHeads + 2 numKvHeads) * headDim] of the cache's dtype: q heads are rotated in place. */
  readonly qkv: Elements
  readonly numHeads: number
  /** Blocks of the sequence, the first holding positions 0 .. 31. */
  readonly blocks: readonly number[]
  /** Position of the first token in its sequence. */
  readonly position0: number
  readonly tokens: number
  /** [tokens, rotaryDims]: cosines of rotaryDims / 2 pairs, then their sines. */
  readonly cosSin: Float32Array
  /** Even; dimensions from here on are not rotated. */
  readonly rotaryDims: number
  /** Elements between tokens; default the width of qkv. */
  readonly ldQkv?: number
}

export interface AttentionOptions {
  /** [tokens, ldq] of the cache's dtype, numHeads heads of headDim from the start of a row. */
  readonly q: Elements
  readonly numHeads: number
  readonly blocks: readonly number[]
  /** Token i stands at position0 + i and sees keys 0 .. position0 + i. */
  readonly position0: number
  readonly tokens: number
  /** Factor of the scores; default 1 / sqrt(headDim). */
  readonly scale?: number
  /** [tokens, ldo], same heads as q. */
  readonly out: Elements
  readonly ldq?: number
  readonly ldo?: number
  /** Keys from here on are seen by nobody; default position0 + tokens. */
  readonly keys?: number
  /** n >= 1: n key ranges computed apart and joined, as the runner splits long contexts; default 0, undivided. */
  readonly splits?: number
  /** Default: the cache's. All tiers read the same layout. */
  readonly tier?: KernelTier
}

interface AttentionAddon {
  ropeKvWrite(options: Record<string, unknown>): void
  attention(options: Record<string, unknown>): void
  kvMemory(nbytes: number): ArrayBuffer
  readonly attentionScratchBytes: number
}

function addon(): AttentionAddon {
  return nativeAddon() as AttentionAddon
}

function invalid(message: string): KernelError {
  return new KernelError('ERR_INVALID_ARGUMENT', message)
}

function checkCount(name: string, value: number, low: number, high: number): void {
  if (!Number.isInteger(value) || value < low || value > high) {
    throw invalid(`${name} must be an integer from ${low} to ${high}, not ${value}`)
  }
}

/**
 * Bytes of one block of one KV head: K part [headDim / 2][32][2] and V part [16][headDim][2] of bf16, or [headDim][32]
 * and [32][headDim] of f32.
 */
export function kvBlockBytes(dtype: DType, headDim: number): number {
  return 2 * kvBlockTokens * headDim * elementBytes[dtype]
}

export class KvCache {
  readonly options: KvCacheOptions
  /** [numKvHeads][numBlocks][kvBlockBytes] on huge pages; lanes of tokens that were never written hold zeros. */
  readonly data: Uint8Array
  readonly #scratch: Uint8Array
  readonly #free: number[]
  readonly #isUsed: boolean[]

  constructor(options: KvCacheOptions) {
    checkCount('numKvHeads', options.numKvHeads, 1, 65536)
    checkCount('headDim', options.headDim, 2, 1024)
    if (options.headDim % 2 !== 0) throw invalid(`headDim must be even, not ${options.headDim}`)
    checkCount('numBlocks', options.numBlocks, 1, 2 ** 31 - 1)
    this.options = options
    const nbytes = options.numBlocks * options.numKvHeads * kvBlockBytes(options.dtype, options.headDim)
    this.data = new Uint8Array(callKernel(() => addon().kvMemory(nbytes)))
    this.#scratch = new Uint8Array(addon().attentionScratchBytes)
    this.#free = Array.from({ length: options.numBlocks }, (_, i) => options.numBlocks - 1 - i)
    this.#isUsed = new Array<boolean>(options.numBlocks).fill(false)
  }

  /** Ids of `count` free blocks, enough for count * 32 tokens. */
  allocate(count: number): number[] {
    checkCount('count', count, 0, 2 ** 31 - 1)
    if (count > this.#free.length) {
      throw new KernelError(
        'ERR_NO_MEMORY',
        `${count} KV blocks are needed and ${this.#free.length} of ${this.options.numBlocks} are free`,
      )
    }
    const blocks = this.#free.splice(this.#free.length - count, count).reverse()
    for (const block of blocks) this.#isUsed[block] = true
    return blocks
  }

  /** Gives blocks back. What they hold stays there, masked, until it is overwritten. */
  release(blocks: readonly number[]): void {
    for (const block of blocks) {
      if (this.#isUsed[block] !== true) throw invalid(`KV block ${block} is not allocated`)
      this.#isUsed[block] = false
      this.#free.push(block)
    }
  }

  /** Rotates q in place, and writes rotated k and v of consecutive tokens of one sequence. */
  write(options: KvWriteOptions): void {
    const { dtype, numKvHeads, headDim, tier } = this.options
    const { tokens, position0, blocks } = options
    checkCount('tokens', tokens, 0, 2 ** 24)
    checkCount('position0', position0, 0, 2 ** 30)
    this.#checkBlocks(blocks, position0 + tokens)
    const blockOf = new Int32Array(tokens)
    const lanes = new Int32Array(tokens)
    for (let i = 0; i < tokens; i++) {
      blockOf[i] = blocks[Math.floor((position0 + i) / kvBlockTokens)] ?? -1
      lanes[i] = (position0 + i) % kvBlockTokens
    }
    const native = {
      tier,
      dtype,
      qkv: options.qkv,
      ldQkv: options.ldQkv ?? (options.numHeads + 2 * numKvHeads) * headDim,
      rows: tokens,
      numHeads: options.numHeads,
      numKvHeads,
      headDim,
      rotaryDims: options.rotaryDims,
      cosSin: options.cosSin,
      kv: this.data,
      blocks: blockOf,
      lanes,
    }
    callKernel(() => addon().ropeKvWrite(native))
  }

  /**
   * out = softmax(q K^T * scale, causal) V for consecutive tokens of one sequence; query heads share KV heads evenly.
   */
  attention(options: AttentionOptions): void {
    const { dtype, numKvHeads, headDim } = this.options
    const { tokens, position0, blocks, numHeads } = options
    checkCount('tokens', tokens, 0, 2 ** 24)
    checkCount('position0', position0, 0, 2 ** 30)
    const keys = options.keys ?? position0 + tokens
    this.#checkBlocks(blocks, keys)
    const native = {
      tier: options.tier ?? this.options.tier,
      dtype,
      q: options.q,
      ldq: options.ldq ?? numHeads * headDim,
      rows: tokens,
      numHeads,
      numKvHeads,
      headDim,
      kv: this.data,
      blocks: Int32Array.from(blocks),
      position0,
      keys,
      scale: options.scale ?? 1 / Math.sqrt(headDim),
      splits: options.splits ?? 0,
      out: options.out,
      ldo: options.ldo ?? numHeads * headDim,
      scratch: this.#scratch,
    }
    callKernel(() => addon().attention(native))
  }

  #checkBlocks(blocks: readonly number[], tokens: number): void {
    if (blocks.length * kvBlockTokens < tokens) {
      throw invalid(
        `${tokens} tokens need ${Math.ceil(tokens / kvBlockTokens)} KV blocks, and the sequence has ${blocks.length}`,
      )
    }
    for (const block of blocks) {
      if (this.#isUsed[block] !== true) throw invalid(`KV block ${block} is not allocated`)
    }
  }
}
