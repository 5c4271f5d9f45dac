// What ranks write, joined into one stream without mixing lines. A rank that has begun a line owns the stream until the line ends,
// so that a rank that streams text token by token is seen token by token, while the lines of others wait. Tagged output goes line by
// line. A slow reader slows the ranks down; nothing is dropped and little is held.

import type { Readable, Writable } from 'node:stream'

const newline = 0x0a
/** A line longer than this is cut: no memory limit survives a rank that never ends its line. */
const longestLine = 1 << 20
/** On a terminal, an unfinished line yields to the lines of others when it has not grown for so long. */
const idleMs = 250
const lastLines = 12

interface Source {
  readonly rank: number
  readonly stream: Readable
  /** Not yet written. */
  pending: Buffer
  tail: string
  hasEnded: boolean
}

export class OutputMux {
  readonly #target: Writable
  readonly #isTagged: boolean
  readonly #isTerminal: boolean
  readonly #sources: Source[] = []
  /** Whose line is unfinished at the target. */
  #owner: Source | undefined
  #idleTimer: NodeJS.Timeout | undefined
  #isFull = false

  constructor(target: Writable, options: { readonly isTagged: boolean; readonly isTerminal: boolean }) {
    this.#target = target
    this.#isTagged = options.isTagged
    this.#isTerminal = options.isTerminal
    target.on('drain', () => {
      this.#isFull = false
      for (const { stream } of this.#sources) stream.resume()
    })
  }

  add(rank: number, stream: Readable): void {
    const source: Source = { rank, stream, pending: Buffer.alloc(0), tail: '', hasEnded: false }
    this.#sources.push(source)
    stream.on('data', (chunk: Buffer) => {
      source.tail = (source.tail + chunk.toString('utf8')).slice(-4096)
      source.pending = source.pending.length === 0 ? chunk : Buffer.concat([source.pending, chunk])
      this.#drain()
    })
    stream.on('end', () => {
      source.hasEnded = true
      this.#drain()
    })
    stream.on('error', () => undefined) // the rank is gone: its exit is what counts
  }

  /** The last lines that a rank has written here. */
  tail(rank: number): string[] {
    const source = this.#sources.find((candidate) => candidate.rank === rank)
    const text = source?.tail.trimEnd() ?? ''
    return text === '' ? [] : text.split('\n').slice(-lastLines)
  }

  /** Writes what is held, unfinished lines too. The last line stays open if its rank left it so: a single writer's bytes are kept. */
  end(): void {
    for (const source of this.#sources) source.hasEnded = true
    this.#drain()
    clearTimeout(this.#idleTimer)
  }

  /** Writes all that may be written now: the owner first; then, when no line is open, one source after the other. */
  #drain(): void {
    for (;;) {
      if (this.#owner !== undefined) {
        this.#advance(this.#owner)
        if (this.#isBlocked()) return
      }
      const next = this.#sources.find((source) => this.#canAdvance(source))
      if (next === undefined) return
      this.#advance(next)
    }
  }

  #canAdvance({ pending, hasEnded }: Source): boolean {
    if (pending.length === 0) return false
    return !this.#isTagged || hasEnded || pending.length > longestLine || pending.includes(newline)
  }

  /** True while the owner's line is open and the others have to wait for it. */
  #isBlocked(): boolean {
    const owner = this.#owner
    if (owner === undefined) return false
    const waiting = this.#sources.filter((source) => source !== owner && source.pending.length > 0)
    if (waiting.length === 0) return true
    if (owner.hasEnded || waiting.some((source) => source.pending.length > longestLine)) {
      this.#closeLine()
      return false
    }
    if (this.#isTerminal) {
      clearTimeout(this.#idleTimer)
      this.#idleTimer = setTimeout(() => {
        this.#closeLine()
        this.#drain()
      }, idleMs)
    }
    return true
  }

  #closeLine(): void {
    if (this.#owner === undefined) return
    this.#write(Buffer.from('\n'))
    this.#owner = undefined
  }

  #advance(source: Source): void {
    const { pending, hasEnded } = source
    const end = pending.lastIndexOf(newline) + 1
    if (!this.#isTagged) {
      if (pending.length === 0) return
      this.#write(pending)
      source.pending = Buffer.alloc(0)
      this.#owner = end === pending.length ? undefined : source
    } else if (end < pending.length && (hasEnded || pending.length > longestLine)) {
      this.#writeTagged(source, Buffer.concat([pending, Buffer.from('\n')]))
      source.pending = Buffer.alloc(0)
    } else {
      this.#writeTagged(source, pending.subarray(0, end))
      source.pending = pending.subarray(end)
    }
  }

  #writeTagged(source: Source, lines: Buffer): void {
    const tag = Buffer.from(`[${source.rank}] `)
    const parts: Buffer[] = []
    for (let start = 0; start < lines.length;) {
      const end = lines.indexOf(newline, start) + 1
      parts.push(tag, lines.subarray(start, end))
      start = end
    }
    this.#write(Buffer.concat(parts))
  }

  #write(bytes: Buffer): void {
    if (bytes.length === 0 || this.#target.destroyed) return
    if (this.#target.write(bytes) || this.#isFull) return
    this.#isFull = true
    for (const { stream } of this.#sources) stream.pause()
  }
}
