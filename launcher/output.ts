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
    const source: Source = { rank, stream, pending: Buffer.alloc(0), tail: '' }
    this.#sources.push(source)
    stream.on('data', (chunk: Buffer) => {
      source.tail = (source.tail + chunk.toString('utf8')).slice(-4096)
      source.pending = source.pending.length === 0 ? chunk : Buffer.concat([source.pending, chunk])
      this.#pump()
    })
    stream.on('end', () => this.#flush(source))
    stream.on('error', () => undefined) // the rank is gone: its exit is what counts
  }

  /** The last lines that a rank has written here. */
  tail(rank: number): string[] {
    const source = this.#sources.find((candidate) => candidate.rank === rank)
    const text = source?.tail.trimEnd() ?? ''
    return text === '' ? [] : text.split('\n').slice(-lastLines)
  }

  /** Writes what is held, unfinished lines too. */
  end(): void {
    for (const source of this.#sources) this.#flush(source)
  }

  #pump(): void {
    const before = this.#owner
    let pending: Source[]
    do {
      pending = [...(this.#owner === undefined ? this.#sources : [this.#owner])]
      for (const source of pending) this.#writeOut(source)
    } while (
      this.#owner === undefined &&
      pending.length === 1 &&
      this.#sources.some((source) => source.pending.includes(newline))
    )
    if (before !== this.#owner) clearTimeout(this.#idleTimer)
    this.#armIdle()
  }

  /** Whole lines, and the beginning of one when nobody else's is open. */
  #writeOut(source: Source): void {
    if (this.#owner !== undefined && this.#owner !== source) return
    const end = source.pending.lastIndexOf(newline) + 1
    if (end > 0) {
      this.#writeLines(source, source.pending.subarray(0, end))
      source.pending = source.pending.subarray(end)
      this.#owner = undefined
    }
    if (source.pending.length === 0) return
    if (!this.#isTagged) {
      this.#write(source.pending)
      source.pending = Buffer.alloc(0)
      this.#owner = source
    } else if (source.pending.length > longestLine) {
      this.#flush(source)
    }
  }

  #writeLines(source: Source, lines: Buffer): void {
    if (!this.#isTagged) {
      this.#write(lines)
      return
    }
    const tag = Buffer.from(`[${source.rank}] `)
    const parts: Buffer[] = []
    for (let start = 0; start < lines.length;) {
      const end = lines.indexOf(newline, start) + 1
      parts.push(tag, lines.subarray(start, end))
      start = end
    }
    this.#write(Buffer.concat(parts))
  }

  #flush(source: Source): void {
    this.#pump()
    if (source.pending.length > 0) {
      this.#breakLine()
      this.#writeLines(source, Buffer.concat([source.pending, Buffer.from('\n')]))
      source.pending = Buffer.alloc(0)
    }
    if (this.#owner !== source) return
    // The line stays open where it ends the output (a single writer's bytes are kept); it is closed when another line follows.
    if (this.#sources.some((other) => other !== source && other.pending.length > 0)) this.#breakLine()
    this.#pump()
  }

  #breakLine(): void {
    if (this.#owner === undefined) return
    this.#write(Buffer.from('\n'))
    this.#owner = undefined
  }

  #armIdle(): void {
    const waiting = this.#sources.filter((source) => source !== this.#owner && source.pending.length > 0)
    if (this.#owner === undefined || waiting.length === 0) return
    const hasEnded = this.#owner.stream.readableEnded
    if (hasEnded || waiting.some((source) => source.pending.length > longestLine)) {
      this.#breakLine()
      this.#pump()
    } else if (this.#isTerminal) {
      clearTimeout(this.#idleTimer)
      this.#idleTimer = setTimeout(() => {
        this.#breakLine()
        this.#pump()
      }, idleMs)
      this.#idleTimer.unref()
    }
  }

  #write(bytes: Buffer): void {
    if (bytes.length === 0 || this.#target.destroyed) return
    if (this.#target.write(bytes) || this.#isFull) return
    this.#isFull = true
    for (const { stream } of this.#sources) stream.pause()
  }
}
