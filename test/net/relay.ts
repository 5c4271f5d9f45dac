// A TCP relay to be put between two ranks: it passes bytes on and does to them, while connections are open, what a bad network or
// a bad machine in the middle would: delays, a low rate, silence, a cut, a flipped bit, lost or swapped bytes. It is a process of its
// own, in a node of a lab or on this machine, so that a blocked test does not stop it.

import { fork, type ChildProcess, type ForkOptions } from 'node:child_process'
import { once } from 'node:events'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import type { LabNode } from '../../bench/lab.js'

/**
 * What happens to one direction. An offset counts the bytes of each connection from the moment at which the faults are set (or from
 * its start, if it comes later), and each of these faults happens once to it.
 */
export interface Faults {
  readonly delayMs?: number
  readonly bytesPerS?: number
  /** Nothing more is read: the sender's buffers fill, then it waits. */
  readonly isStalled?: boolean
  /** Both sides are reset (RST), or hear the end (FIN) after `at` bytes; at once with 0. A reset may overtake bytes before it. */
  readonly cut?: { readonly at: number; readonly by: 'RST' | 'FIN' }
  /** The lowest bit of this byte is flipped. */
  readonly flipBitAt?: number
  /** These bytes are swallowed; with nbytes Infinity the stream is truncated there, and stays open. */
  readonly drop?: { readonly at: number; readonly nbytes: number }
  /** The block of `nbytes` at `at` and the one after it change places: what reordering would look like above TCP. */
  readonly swap?: { readonly at: number; readonly nbytes: number }
}

export interface Directions {
  /** From the side that connected to the side that listens. */
  readonly forward?: Faults
  readonly backward?: Faults
}

export interface RelayCounts {
  /** Connections so far. */
  readonly connections: number
  /** Bytes that came in to be passed on, of all connections. */
  readonly forwardBytes: number
  readonly backwardBytes: number
}

export interface RelayOrder {
  readonly listen: { readonly host: string; readonly port: number }
  readonly target: { readonly host: string; readonly port: number }
  readonly faults: Directions
}

export type RelayRequest =
  | { readonly kind: 'start'; readonly order: RelayOrder }
  | { readonly kind: 'set'; readonly faults: Directions }
  | { readonly kind: 'counts' }

export type RelayReply = { readonly port: number } | { readonly counts: RelayCounts } | { readonly error: string }

export interface RelayOptions {
  /** Where bytes go. */
  readonly target: { readonly host: string; readonly port: number }
  /** The node where the relay runs and listens; this machine, at 127.0.0.1, if absent. */
  readonly on?: LabNode
  /** Where it listens; default: any free port. */
  readonly port?: number
  readonly faults?: Directions
}

export interface Relay extends AsyncDisposable {
  /** What to connect to in place of the target. */
  readonly host: string
  readonly port: number
  /** Replaces the faults of the given directions, of open connections and later ones; resolves when they hold. */
  readonly set: (faults: Directions) => Promise<void>
  readonly counts: () => Promise<RelayCounts>
  /** Resets what is open. May be called twice. */
  readonly close: () => Promise<void>
}

export async function startRelay(options: RelayOptions): Promise<Relay> {
  const { on, target } = options
  const host = on?.address ?? '127.0.0.1'
  const main = fileURLToPath(new URL('./relayMain.js', import.meta.url))
  // Infinity is a number here, and none in JSON.
  const how: ForkOptions = { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], serialization: 'advanced' }
  const child: ChildProcess = on?.run(process.execPath, [main], how) ?? fork(main, [], how)
  const ended = once(child, 'close')

  // One request at a time: the next reply is its own.
  let before: Promise<unknown> = Promise.resolve()
  const ask = (request: RelayRequest): Promise<RelayReply> => {
    const reply = before.then(async () => {
      const answer = once(child, 'message')
      child.send(request)
      const [message] = (await Promise.race([answer, ended.then(() => [{ error: 'the relay has ended' }])])) as [
        RelayReply,
      ]
      if ('error' in message) throw new Error(message.error)
      return message
    })
    before = reply.catch(() => undefined)
    return reply
  }
  const close = async (): Promise<void> => {
    child.kill('SIGKILL') // the kernel resets connections with bytes unread, and ends the others
    await ended
  }
  try {
    const order = { listen: { host, port: options.port ?? 0 }, target, faults: options.faults ?? {} }
    const started = await ask({ kind: 'start', order })
    if (!('port' in started)) throw new Error('the relay did not say where it listens')
    return {
      host,
      port: started.port,
      set: async (faults) => {
        await ask({ kind: 'set', faults })
      },
      counts: async () => {
        const reply = await ask({ kind: 'counts' })
        if (!('counts' in reply)) throw new Error('the relay did not count')
        return reply.counts
      },
      close,
      [Symbol.asyncDispose]: close,
    }
  } catch (error) {
    await close()
    throw error
  }
}
