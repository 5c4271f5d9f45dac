// A worker thread that owns sockets of ZeroMQ. Such a thread must close them before it ends, however the process ends: one that is torn
// down with open sockets takes the process with it, exit code and all. So whoever calls process.exit waits for it.

import { Worker, type MessagePort } from 'node:worker_threads'
import { CollectiveError } from './errors.js'

/** In workerData of every such thread. */
export interface ThreadSetup {
  /** [1], becomes 1 when the thread is at its end. */
  readonly ended: Int32Array<SharedArrayBuffer>
}

/** Sent to every such thread: close at once. */
export interface End {
  readonly kind: 'end'
}

/** What it may say of itself at any time. */
export interface ThreadFailure {
  readonly kind: 'failed'
  readonly message: string
}

/** How long the end of the process waits. */
const endMs = 1000
const lettingGoMs = 30

/** To be called in the thread, once: when its last socket is closed and nothing runs in it any more, whoever waits learns of it. */
export function markEnded(ended: Int32Array<SharedArrayBuffer>): void {
  process.once('exit', () => {
    Atomics.store(ended, 0, 1)
    Atomics.notify(ended, 0)
  })
}

/**
 * Ends the thread, when its sockets have been closed. libzmq lets go of what it was sending a moment after that, in a thread of its own, and
 * what it sends from is this thread's memory.
 */
export function endThread(port: MessagePort): void {
  setTimeout(() => {
    port.close()
  }, lettingGoMs)
}

/** Those of this process. One listener for all of them: Node warns of more than ten. */
const threads = new Set<{ endAtExit(): void; waitForEnd(): void }>()
const endAll = (): void => {
  for (const thread of threads) thread.endAtExit()
  for (const thread of threads) thread.waitForEnd()
}

export class SocketThread<To extends { readonly kind: string }, From extends { readonly kind: string }> {
  readonly #worker: Worker
  readonly #what: string
  readonly #ended: Int32Array<SharedArrayBuffer>
  readonly #exited: Promise<void>
  #closing: Promise<void> | undefined

  /** @param url the thread's entry; data: the rest of its workerData; what: for messages */
  constructor(url: URL, data: object, what: string) {
    this.#ended = new Int32Array(new SharedArrayBuffer(4))
    const workerData = { ...data, ended: this.#ended } satisfies ThreadSetup
    // Options of Node itself are for the program: --input-type, say, is refused in a thread.
    this.#worker = new Worker(url, { workerData, execArgv: [] })
    this.#what = what
    this.#worker.unref()
    if (threads.size === 0) process.on('exit', endAll)
    threads.add(this)
    this.#exited = new Promise((resolve) => {
      this.#worker.once('exit', () => {
        threads.delete(this)
        if (threads.size === 0) process.off('exit', endAll)
        resolve()
      })
    })
  }

  /** @internal */
  endAtExit(): void {
    this.#worker.postMessage({ kind: 'end' } satisfies End)
  }

  /** @internal */
  waitForEnd(): void {
    Atomics.wait(this.#ended, 0, 0, endMs)
  }

  send(message: To | End): void {
    this.#worker.postMessage(message)
  }

  /** Its next message of this kind; what ends it first is an error. */
  async reply<K extends From['kind']>(kind: K, timeoutMs?: number): Promise<From & { kind: K }> {
    return new Promise((resolve, reject) => {
      this.#worker.ref()
      const settle = (): void => {
        clearTimeout(timer)
        this.#worker.off('message', onMessage).off('error', onError).off('exit', onExit)
        this.#worker.unref()
      }
      const fail = (code: 'ERR_IO' | 'ERR_TIMEOUT', message: string): void => {
        settle()
        reject(new CollectiveError(code, `${this.#what}: ${message}`))
      }
      const late = (): void => {
        fail('ERR_TIMEOUT', `no answer within ${timeoutMs} ms`)
      }
      const timer = timeoutMs === undefined ? undefined : setTimeout(late, timeoutMs)
      const onMessage = (message: From | ThreadFailure): void => {
        if (message.kind === 'failed') fail('ERR_IO', (message as ThreadFailure).message)
        if (message.kind !== kind) return
        settle()
        resolve(message as From & { kind: K })
      }
      const onError = (error: Error): void => {
        fail('ERR_IO', error.message)
      }
      const onExit = (): void => {
        fail('ERR_IO', 'its thread ended')
      }
      this.#worker.on('message', onMessage).on('error', onError).on('exit', onExit)
    })
  }

  /** Asks it to close, and waits for that. Idempotent. */
  close(message: To | End): Promise<void> {
    this.#closing ??= this.#close(message)
    return this.#closing
  }

  async #close(message: To | End): Promise<void> {
    this.#worker.ref()
    this.send(message)
    await this.#exited
  }
}
