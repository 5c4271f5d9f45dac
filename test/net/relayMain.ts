// The process of test/net/relay.ts: the bytes pass here.
//
// Each direction of a connection is a line: bytes come in and are changed by their offset (Line.feed), wait in a queue until their
// time has come (delay, then rate), and go out. Reading pauses while much is queued, so that both ends feel each other's pace.

import { createServer, connect, type Socket } from 'node:net'
import process from 'node:process'
import type { Directions, Faults, RelayReply, RelayRequest } from './relay.js'

/** Reading pauses above; what a delay keeps under way at 100 MB/s for 40 ms. */
const maxQueuedBytes = 4 << 20
/** What passes at once under a rate: a timer's tick of it, or this. */
const minPieceBytes = 256

class Line {
  readonly #source: Socket
  readonly #sink: Socket
  #faults: Faults
  /** Bytes since the faults were set. */
  #offset = 0
  #held: Buffer[] = []
  #isCut = false
  #queue: { readonly due: number; readonly bytes: Buffer | 'end' | 'RST' | 'FIN' }[] = []
  #queuedBytes = 0
  /** When the rate lets the next byte pass. */
  #free = 0
  #timer: NodeJS.Timeout | undefined
  #isWriting = false

  constructor(source: Socket, sink: Socket, faults: Faults, count: (nbytes: number) => void) {
    this.#source = source
    this.#sink = sink
    this.#faults = faults
    source.on('data', (bytes: Buffer) => {
      count(bytes.length)
      this.#feed(bytes)
      this.#pace()
    })
    source.on('end', () => {
      this.#release()
      this.#put('end')
    })
    source.on('error', () => sink.resetAndDestroy())
    sink.on('drain', () => {
      this.#isWriting = false
      this.#pump()
    })
    sink.on('close', () => clearTimeout(this.#timer))
    this.set(faults)
  }

  set(faults: Faults): void {
    this.#release() // of a swap that was not complete
    this.#faults = faults
    this.#offset = 0
    this.#free = 0
    if (faults.cut?.at === 0) {
      // At once: what is queued may wait for a reader that never comes.
      this.#isCut = true
      this.#queue = []
      this.#finish(faults.cut.by)
    }
    this.#pace()
    this.#pump()
  }

  #pace(): void {
    if (this.#isCut || (this.#faults.isStalled !== true && this.#queuedBytes < maxQueuedBytes)) this.#source.resume()
    else this.#source.pause()
  }

  /** Pieces that end where a fault begins or ends have one thing done to them. */
  #feed(bytes: Buffer): void {
    const { cut, drop, swap, flipBitAt } = this.#faults
    const swapEnd = swap === undefined ? NaN : swap.at + 2 * swap.nbytes
    const edges = [cut?.at, drop?.at, drop && drop.at + drop.nbytes, swap?.at, swap && swap.at + swap.nbytes, swapEnd]
    while (bytes.length > 0 && !this.#isCut) {
      const begin = this.#offset
      const size = Math.min(bytes.length, ...edges.flatMap((e) => (e !== undefined && e > begin ? [e - begin] : [])))
      const piece = bytes.subarray(0, size)
      bytes = bytes.subarray(size)
      this.#offset += size
      const flipped = flipBitAt === undefined ? undefined : piece[flipBitAt - begin]
      if (flipBitAt !== undefined && flipped !== undefined) piece[flipBitAt - begin] = flipped ^ 1
      if (drop !== undefined && begin >= drop.at && begin < drop.at + drop.nbytes) continue
      if (swap !== undefined && begin >= swap.at && begin < swap.at + swap.nbytes) this.#held.push(piece)
      else this.#put(piece)
      if (this.#offset === swapEnd) this.#release()
      if (cut !== undefined && this.#offset === cut.at) {
        this.#release()
        this.#isCut = true
        this.#put(cut.by)
      }
    }
  }

  #release(): void {
    for (const piece of this.#held) this.#put(piece)
    this.#held = []
  }

  #put(bytes: Buffer | 'end' | 'RST' | 'FIN'): void {
    const due = Math.max(performance.now() + (this.#faults.delayMs ?? 0), this.#queue.at(-1)?.due ?? 0)
    this.#queue.push({ due, bytes })
    if (typeof bytes !== 'string') this.#queuedBytes += bytes.length
    this.#pump()
  }

  #pump(): void {
    clearTimeout(this.#timer)
    for (;;) {
      const first = this.#queue[0]
      if (first === undefined || this.#isWriting) return
      const wait = Math.max(first.due, this.#free) - performance.now()
      if (wait > 0) {
        this.#timer = setTimeout(() => this.#pump(), wait)
        return
      }
      this.#queue.shift()
      if (typeof first.bytes === 'string') this.#finish(first.bytes)
      else this.#write(first.bytes, first.due)
    }
  }

  #write(bytes: Buffer, due: number): void {
    const { bytesPerS } = this.#faults
    const size = bytesPerS === undefined ? bytes.length : Math.max(minPieceBytes, Math.floor(bytesPerS / 1000))
    const piece = bytes.subarray(0, size)
    if (piece.length < bytes.length) this.#queue.unshift({ due, bytes: bytes.subarray(size) })
    if (bytesPerS !== undefined) {
      this.#free = Math.max(this.#free, performance.now()) + (1000 * piece.length) / bytesPerS
    }
    this.#queuedBytes -= piece.length
    if (this.#sink.writable) this.#isWriting = !this.#sink.write(piece)
    this.#pace()
  }

  #finish(how: 'end' | 'RST' | 'FIN'): void {
    if (how === 'RST') {
      this.#source.resetAndDestroy()
      this.#sink.resetAndDestroy()
      return
    }
    this.#sink.end()
    if (how === 'FIN') this.#source.end()
  }
}

const lines = { forward: new Set<Line>(), backward: new Set<Line>() }
const counts = { connections: 0, forwardBytes: 0, backwardBytes: 0 }
let faults: Directions = {}

function open(direction: 'forward' | 'backward', source: Socket, sink: Socket): void {
  const line = new Line(source, sink, faults[direction] ?? {}, (nbytes) => (counts[`${direction}Bytes`] += nbytes))
  lines[direction].add(line)
  sink.once('close', () => lines[direction].delete(line))
}

function start({ listen, target, faults: first }: Extract<RelayRequest, { kind: 'start' }>['order']): Promise<number> {
  faults = first
  const server = createServer({ allowHalfOpen: true, noDelay: true, pauseOnConnect: true }, (client) => {
    counts.connections++
    const upstream = connect({ ...target, allowHalfOpen: true, noDelay: true })
    upstream.once('error', () => client.resetAndDestroy())
    client.once('error', () => upstream.resetAndDestroy())
    upstream.once('connect', () => {
      open('forward', client, upstream)
      open('backward', upstream, client)
    })
  })
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen(listen.port, listen.host, () => {
      const address = server.address()
      resolve(typeof address === 'object' && address !== null ? address.port : 0)
    })
  })
}

async function answer(request: RelayRequest): Promise<RelayReply> {
  switch (request.kind) {
    case 'start':
      return { port: await start(request.order) }
    case 'set':
      faults = { ...faults, ...request.faults }
      for (const direction of ['forward', 'backward'] as const) {
        const given = request.faults[direction]
        if (given !== undefined) for (const line of lines[direction]) line.set(given)
      }
      return { counts }
    case 'counts':
      return { counts }
    default:
      return request satisfies never
  }
}

process.on('message', (request: RelayRequest) => {
  answer(request).then(
    (reply) => process.send?.(reply),
    (error: unknown) => process.send?.({ error: String(error) } satisfies RelayReply),
  )
})
process.once('disconnect', () => process.exit())
