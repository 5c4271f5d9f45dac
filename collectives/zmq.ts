// The ZeroMQ leg of a group across nodes, as the rank's main thread sees it: starts the worker thread that owns the sockets (zmqWorker.ts), tells
// it the peers, and ends it in order.

import { Worker } from 'node:worker_threads'
import { CollectiveError } from './errors.js'
import { createMailbox, type MailboxOptions, type NativeMailbox } from './mailbox.js'

/** A rank of another node. */
export interface NetworkPeer {
  /** In the job. */
  readonly rank: number
  /** tcp://address:port */
  readonly endpoint: string
  /** CURVE, Z85; empty where nothing is encrypted. */
  readonly publicKey: string
}

export interface NetworkSetup {
  readonly mailboxId: number
  readonly address: string
  readonly isEncrypted: boolean
  /** [1], becomes 1 when the sockets are closed. */
  readonly ended: Int32Array<SharedArrayBuffer>
}

export type ToWorker =
  | { readonly kind: 'connect'; readonly peers: readonly NetworkPeer[] }
  /** What was sent still goes out. */
  | { readonly kind: 'close' }
  /** At once. */
  | { readonly kind: 'end' }

export type FromWorker =
  | { readonly kind: 'bound'; readonly endpoint: string; readonly publicKey: string }
  | { readonly kind: 'connected' }
  | { readonly kind: 'failed'; readonly message: string }

/** How long the end of the process waits for the sockets to be closed. */
const endMs = 1000

/** A peer that does not answer four of these in a row is lost. */
export const heartbeatMs = 1000

const z85 = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#'

/** The 32 bytes of a key in Z85 (ZeroMQ RFC 32). */
export function curveKey(text: string): Buffer {
  const bytes = Buffer.alloc(32)
  for (let group = 0; group < 8; group++) {
    let value = 0
    for (const digit of text.slice(5 * group, 5 * group + 5)) value = value * 85 + z85.indexOf(digit)
    if (value < 0 || value >= 2 ** 32) return Buffer.alloc(0)
    bytes.writeUInt32BE(value, 4 * group)
  }
  return bytes
}

/** This rank's end of the network: a mailbox and the thread that serves it. */
export class Network {
  readonly mailbox: NativeMailbox
  readonly endpoint: string
  readonly publicKey: string
  readonly #worker: Worker
  readonly #onExit: () => void
  #closing: Promise<void> | undefined

  private constructor(worker: Worker, mailbox: NativeMailbox, endpoint: string, publicKey: string, onExit: () => void) {
    this.#worker = worker
    this.mailbox = mailbox
    this.endpoint = endpoint
    this.publicKey = publicKey
    this.#onExit = onExit
  }

  /**
   * Binds a port of `address` that the kernel chooses, and makes a key pair for it.
   * @throws CollectiveError ERR_IO
   */
  static async open(
    options: MailboxOptions & { readonly address: string; readonly isEncrypted: boolean },
  ): Promise<Network> {
    const mailbox = createMailbox(options)
    const { address, isEncrypted } = options
    const ended = new Int32Array(new SharedArrayBuffer(4))
    const setup: NetworkSetup = { mailboxId: mailbox.id, address, isEncrypted, ended }
    const worker = new Worker(new URL('./zmqWorker.js', import.meta.url), { workerData: setup, env: process.env })
    // A thread that ends with open sockets takes the process with it, exit code and all: also who calls process.exit waits for them.
    const onExit = (): void => {
      worker.postMessage({ kind: 'end' } satisfies ToWorker)
      Atomics.wait(ended, 0, 0, endMs)
    }
    process.once('exit', onExit)
    try {
      const bound = await reply(worker, 'bound')
      worker.unref()
      return new Network(worker, mailbox, bound.endpoint, bound.publicKey, onExit)
    } catch (error) {
      process.off('exit', onExit)
      throw error
    }
  }

  /**
   * Admits these peers, and connects to them all.
   * @throws CollectiveError ERR_IO naming the peer, ERR_TIMEOUT
   */
  async connect(peers: readonly NetworkPeer[], timeoutMs: number): Promise<void> {
    this.#tell({ kind: 'connect', peers })
    await reply(this.#worker, 'connected', timeoutMs)
    this.#worker.unref()
  }

  /** What was sent still goes out. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#end()
    return this.#closing
  }

  async #end(): Promise<void> {
    const ended = new Promise<void>((resolve) => {
      this.#worker.once('exit', () => {
        resolve()
      })
    })
    this.#worker.ref()
    this.#tell({ kind: 'close' })
    await ended
    process.off('exit', this.#onExit)
  }

  #tell(message: ToWorker): void {
    this.#worker.postMessage(message)
  }
}

/** The worker's answer of this kind; anything that ends it first is an error. */
async function reply<K extends FromWorker['kind']>(
  worker: Worker,
  kind: K,
  timeoutMs?: number,
): Promise<FromWorker & { kind: K }> {
  return new Promise((resolve, reject) => {
    worker.ref()
    const fail = (code: 'ERR_IO' | 'ERR_TIMEOUT', message: string): void => {
      settle()
      reject(new CollectiveError(code, message))
    }
    const timer =
      timeoutMs === undefined
        ? undefined
        : setTimeout(() => {
            fail('ERR_TIMEOUT', `the ranks of other nodes did not answer within ${String(timeoutMs)} ms`)
          }, timeoutMs)
    const onMessage = (message: FromWorker): void => {
      if (message.kind === 'failed') fail('ERR_IO', `the network failed: ${message.message}`)
      if (message.kind !== kind) return
      settle()
      resolve(message as FromWorker & { kind: K })
    }
    const onError = (error: Error): void => {
      fail('ERR_IO', `the network's thread ended: ${error.message}`)
    }
    const onExit = (): void => {
      fail('ERR_IO', "the network's thread ended")
    }
    const settle = (): void => {
      clearTimeout(timer)
      worker.off('message', onMessage).off('error', onError).off('exit', onExit)
    }
    worker.on('message', onMessage).on('error', onError).on('exit', onExit)
  })
}
