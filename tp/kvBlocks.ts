// The blocks of the paged KV cache, by number: which are free, which belong to which sequence. A sequence reserves what it can need
// when it is admitted, so that nothing that runs is ever starved, and takes the blocks one by one as it grows.

export const kvBlockTokens = 32

export function blocksFor(tokens: number): number {
  return Math.ceil(tokens / kvBlockTokens)
}

export interface KvSequence {
  /** Blocks held, in order of their positions. */
  readonly blocks: number[]
  /** Blocks that it may still take. */
  reserved: number
}

export class KvBlocks {
  readonly #free: number[]
  #unreserved: number

  constructor(readonly count: number) {
    // Taken from the end: block 0 first.
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i)
    this.#unreserved = count
  }

  /** Blocks that no sequence holds or has reserved. */
  get available(): number {
    return this.#unreserved
  }

  /** Reserves room for `tokens`, or returns null when that much is not there now. */
  reserve(tokens: number): KvSequence | null {
    const needed = blocksFor(tokens)
    if (needed > this.#unreserved) return null
    this.#unreserved -= needed
    return { blocks: [], reserved: needed }
  }

  /** Takes the blocks that positions below `tokens` need and returns the new ones, with their index in the sequence. */
  grow(sequence: KvSequence, tokens: number): { readonly index: number; readonly block: number }[] {
    const added: { index: number; block: number }[] = []
    while (sequence.blocks.length < blocksFor(tokens)) {
      const block = this.#free.pop()
      if (block === undefined || sequence.reserved === 0) throw new RangeError('a sequence outgrew its reservation')
      sequence.reserved--
      added.push({ index: sequence.blocks.length, block })
      sequence.blocks.push(block)
    }
    return added
  }

  release(sequence: KvSequence): void {
    this.#unreserved += sequence.blocks.length + sequence.reserved
    for (const block of sequence.blocks.reverse()) this.#free.push(block)
    sequence.blocks.length = 0
    sequence.reserved = 0
  }
}
