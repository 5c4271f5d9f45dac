// The blocks of the paged KV cache, by number: which are free, which belong to which sequence. A sequence gets all that it can need
// when it is admitted, so that nothing that runs is ever starved - as one run of neighbours where there is one, since memory reads
// those faster than scattered ones - and reaches them one by one as it grows.

export const kvBlockTokens = 32

export function blocksFor(tokens: number): number {
  return Math.ceil(tokens / kvBlockTokens)
}

export interface KvSequence {
  /** All blocks of the sequence, in order of their positions. */
  readonly blocks: number[]
  /** How many of them its positions have reached. */
  reached: number
}

/** Neighbouring blocks. */
interface Run {
  start: number
  length: number
}

export class KvBlocks {
  /** Free blocks: by start, none empty, no two touching. */
  #free: Run[]
  #available: number

  constructor(readonly count: number) {
    this.#free = count > 0 ? [{ start: 0, length: count }] : []
    this.#available = count
  }

  /** Blocks that belong to no sequence. */
  get available(): number {
    return this.#available
  }

  /** Takes room for `tokens`, or returns null when that much is not there now. */
  reserve(tokens: number): KvSequence | null {
    const needed = blocksFor(tokens)
    if (needed > this.#available) return null
    this.#available -= needed
    const blocks: number[] = []
    while (blocks.length < needed) {
      const run = this.#runFor(needed - blocks.length)
      const length = Math.min(run.length, needed - blocks.length)
      for (let i = 0; i < length; i++) blocks.push(run.start + i)
      run.start += length
      run.length -= length
      if (run.length === 0) this.#free.splice(this.#free.indexOf(run), 1)
    }
    return { blocks, reached: 0 }
  }

  /** The blocks that positions below `tokens` are the first to need, with their index in the sequence. */
  grow(sequence: KvSequence, tokens: number): { readonly index: number; readonly block: number }[] {
    const from = sequence.reached
    const needed = blocksFor(tokens)
    if (needed > sequence.blocks.length) throw new RangeError('a sequence outgrew its reservation')
    sequence.reached = Math.max(from, needed)
    return sequence.blocks.slice(from, needed).map((block, i) => ({ index: from + i, block }))
  }

  release(sequence: KvSequence): void {
    this.#available += sequence.blocks.length
    const runs = [...this.#free, ...sequence.blocks.map((start) => ({ start, length: 1 }))]
    sequence.blocks.length = 0
    sequence.reached = 0
    this.#free = []
    for (const run of runs.sort((a, b) => a.start - b.start)) {
      const last = this.#free.at(-1)
      if (last && last.start + last.length === run.start) last.length += run.length
      else this.#free.push(run)
    }
  }

  /** The shortest run of at least `length`, else the longest. */
  #runFor(length: number): Run {
    return this.#free.reduce((best, run) => {
      const isBetter =
        run.length >= length ? best.length < length || run.length < best.length : run.length > best.length
      return isBetter ? run : best
    })
  }
}
