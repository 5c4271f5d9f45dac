// A key-value store of the ranks of a job: one process serves it, all set keys and wait for those of others. By it they find each other
// (meet.ts), and programs may use it for themselves. It is reached over ZeroMQ, encrypted, by whoever has the job's secret and by nobody else.

import { isIP } from 'node:net'
import { Dealer } from 'zeromq'
import { CollectiveError, invalid } from './errors.js'
import { deriveKeys, secretBytes, type KeyPair } from './secret.js'
import { SocketThread } from './socketThread.js'
import {
  headBytes,
  maxCalls,
  maxKeyBytes,
  maxMessageBytes,
  maxValueBytes,
  storeOps,
  storeStatus,
  type FromStoreThread,
  type StoreSetup,
  type ToStoreThread,
} from './storeProtocol.js'
import { clientSecurity } from './zap.js'

/** Who may come in: whoever has the job's secret (32 bytes); or, if that is said by name, everybody, and nothing is encrypted. */
export type StoreAccess =
  | { readonly secret: Uint8Array; readonly encryption?: 'curve' }
  | { readonly encryption: 'none'; readonly secret?: undefined }

export interface StoreServer {
  readonly address: string
  /** The kernel's choice where 0 was asked for. */
  readonly port: number
  /** Messages so far that were no request, and were dropped. */
  readonly dropped: number
  /** Idempotent. Clients that are connected see ERR_PEER_LOST. */
  close(): Promise<void>
}

/**
 * Its calls reject with ERR_TIMEOUT naming the key or what is wrong at the other end, ERR_MISMATCH where that has another secret, and
 * ERR_PEER_LOST when the connection breaks, which ends the store: what was set may be gone with it.
 */
export interface Store {
  /**
   * @param key 1 to 256 bytes of UTF-8; value: at most 64 KB
   * @param options.isNew ERR_MISMATCH if the key is set already, with that value as `theirs`
   */
  set(key: string, value: Uint8Array, options?: { readonly isNew?: boolean }): Promise<void>
  /** Waits until the key is set. */
  get(key: string, options?: { readonly timeoutMs?: number }): Promise<Uint8Array>
  delete(key: string): Promise<void>
  /** Idempotent; what is pending rejects with ERR_CLOSED. */
  close(): Promise<void>
}

/**
 * So often in a row a connection is closed while keys are exchanged before it counts as refused: a server with another secret cannot read
 * the client's first message and says nothing. Half a second, as libzmq tries again after 50 ms.
 */
const refusals = 10

/** The key of the server, and the one that all ranks share to reach it. */
function keysOf(access: StoreAccess): { readonly server: KeyPair; readonly client: KeyPair } | undefined {
  const { secret, encryption }: { readonly secret?: unknown; readonly encryption?: unknown } = access
  if (secret === undefined) {
    if (encryption === 'none') return undefined
    throw invalid("a store needs the job's secret, or encryption: 'none' said by name")
  }
  if (!(secret instanceof Uint8Array) || secret.length !== secretBytes)
    throw invalid(`the secret of a store has ${secretBytes} bytes`)
  return { server: deriveKeys(secret, 'store server'), client: deriveKeys(secret, 'store client') }
}

export const tcpEndpoint = (address: string, port: number | '*'): string =>
  `tcp://${address.includes(':') ? `[${address}]` : address}:${port}`

function checkInteger(name: string, value: number, lowest: number, highest: number): number {
  if (Number.isInteger(value) && value >= lowest && value <= highest) return value
  throw invalid(`${name} is ${value}, expected is an integer from ${lowest} to ${highest}`)
}

/**
 * Serves a store in a thread of its own, so that a busy event loop keeps nobody waiting.
 * @param options.address the only one that is bound, of this machine; options.port 0: the kernel chooses
 * @throws CollectiveError ERR_IO: the address is not of this machine, or the port is taken
 */
export async function serveStore(
  options: { readonly address: string; readonly port: number } & StoreAccess,
): Promise<StoreServer> {
  const { address } = options
  const port = checkInteger('port', options.port, 0, 65535)
  // What else libzmq would take: interfaces, and '*' for all of them.
  if (isIP(address) === 0)
    throw invalid(`address is '${address}', expected is an IP address of this machine; 0.0.0.0 or :: are all of them`)
  const keys = keysOf(options)
  const dropped = new Int32Array(new SharedArrayBuffer(4))
  const setup: Omit<StoreSetup, 'ended'> = {
    endpoint: tcpEndpoint(address, port === 0 ? '*' : port),
    keys: keys?.server,
    admitted: keys?.client.publicKey,
    dropped,
  }
  const url = new URL('./storeThread.js', import.meta.url)
  const thread = new SocketThread<ToStoreThread, FromStoreThread>(url, setup, `the store at ${address}:${port}`)
  try {
    const { endpoint } = await thread.reply('bound')
    return {
      address,
      port: Number(/:(\d+)$/.exec(endpoint)?.[1]),
      get dropped() {
        return Atomics.load(dropped, 0)
      },
      close: async () => thread.close({ kind: 'close' }),
    }
  } catch (error) {
    await thread.close({ kind: 'end' })
    throw error
  }
}

interface Pending {
  readonly key: string
  readonly resolve: (value: Buffer) => void
  readonly reject: (error: Error) => void
}

type Frames = (Buffer | Uint8Array | string)[]

/**
 * Connects to a store, which may come up later.
 * @param options.timeoutMs of each call that names none
 */
export function connectStore(
  options: { readonly address: string; readonly port: number; readonly timeoutMs: number } & StoreAccess,
): Store {
  const { address } = options
  const port = checkInteger('port', options.port, 1, 65535)
  const defaultMs = checkTimeout(options.timeoutMs)
  // libzmq would read more into an endpoint, such as the address to come from.
  if (isIP(address) === 0 && !/^[A-Za-z0-9]([A-Za-z0-9._-]*)$/.test(address))
    throw invalid(`address is '${address}', expected is an IP address or the name of a host`)
  const where = `the store at ${address}:${port}`
  const keys = keysOf(options)
  const socket = new Dealer({
    linger: 0,
    ipv6: address.includes(':'),
    // What is not sent yet stays here, where a call that is given up takes it back.
    immediate: true,
    receiveHighWaterMark: 2 * maxCalls,
    reconnectInterval: 50,
    reconnectMaxInterval: 500,
    handshakeInterval: 5000,
    heartbeatInterval: 1000,
    heartbeatTimeout: 4000,
    maxMessageSize: maxMessageBytes,
    ...clientSecurity(keys?.client, keys?.server.publicKey),
  })
  const pending = new Map<number, Pending>()
  /** By the number of the call; what is being sent is out of it. */
  const outbox = new Map<number, Frames>()
  let isSending = false
  let next = 1
  let state: 'unreachable' | 'unanswered' | 'connected' = 'unreachable'
  let refused = 0
  let failure: CollectiveError | undefined

  /** Nothing goes on after that. */
  const end = (error: CollectiveError): void => {
    if (failure !== undefined) return
    failure = error
    for (const { reject } of pending.values()) reject(error)
    pending.clear()
    outbox.clear()
    socket.close()
  }
  const refuse = (why: string): void => {
    end(new CollectiveError('ERR_MISMATCH', `${where} refused this process: ${why}`))
  }
  socket.events.on('connect', () => {
    if (state === 'unreachable') state = 'unanswered'
  })
  socket.events.on('handshake', () => {
    state = 'connected'
  })
  socket.events.on('handshake:error:auth', () => {
    refuse('its key is not of this job')
  })
  socket.events.on('handshake:error:protocol', () => {
    refuse('the one encrypts and the other does not, or it is no store')
  })
  socket.events.on('handshake:error:other', () => {
    if (++refused === refusals) refuse('it has another secret, or it is no store')
  })
  socket.events.on('disconnect', () => {
    if (state !== 'connected') return
    end(new CollectiveError('ERR_PEER_LOST', `${where} ended, or the connection to it was lost`))
  })
  socket.connect(tcpEndpoint(address, port))

  const receive = async (): Promise<void> => {
    for await (const [head, value = Buffer.alloc(0)] of socket) {
      if (head?.length !== headBytes) continue
      const id = head.readUInt32LE(0)
      const asked = pending.get(id)
      if (asked === undefined) continue
      pending.delete(id)
      const status = head[headBytes - 1]
      if (status === storeStatus.done) asked.resolve(value)
      else if (status === storeStatus.exists) {
        const theirs = value.toString('utf8')
        asked.reject(new CollectiveError('ERR_MISMATCH', `${where} has ${asked.key} already`, { theirs }))
      } else {
        asked.reject(new CollectiveError('ERR_NO_MEMORY', `${where} is full: it did not take ${asked.key}`))
      }
    }
  }
  receive().catch((error: unknown) => {
    end(new CollectiveError('ERR_IO', `${where}: ${error instanceof Error ? error.message : String(error)}`))
  })

  // zeromq takes one send at a time.
  const pump = async (): Promise<void> => {
    if (isSending) return
    isSending = true
    try {
      for (const [id, frames] of outbox) {
        outbox.delete(id)
        await socket.send(frames)
      }
    } catch (error) {
      end(new CollectiveError('ERR_IO', `${where}: ${error instanceof Error ? error.message : String(error)}`))
    } finally {
      isSending = false
    }
  }
  const post = (id: number, op: number, key: string, value: Uint8Array): void => {
    const head = Buffer.alloc(headBytes)
    head.writeUInt32LE(id, 0)
    head[headBytes - 1] = op
    outbox.set(id, [head, key, value])
    void pump()
  }

  const late = (id: number, op: number, key: string, timeoutMs: number): CollectiveError => {
    pending.delete(id)
    // A get that was sent waits at the store.
    if (!outbox.delete(id) && op === storeOps.get) post(id, storeOps.cancel, key, none)
    const why = {
      unreachable: 'nothing listened there',
      unanswered: 'what listens there did not answer as a store does',
      connected: op === storeOps.get ? `nobody set ${key}` : `it did not confirm ${key}`,
    }[state]
    return new CollectiveError('ERR_TIMEOUT', `${where}: ${why} within ${timeoutMs} ms`, { elapsedMs: timeoutMs })
  }

  const call = async (op: number, key: string, value: Uint8Array, timeoutMs: number): Promise<Buffer> => {
    const length = Buffer.byteLength(key)
    if (length === 0 || length > maxKeyBytes) throw invalid(`a key has 1 to ${maxKeyBytes} bytes, not ${length}`)
    if (value.length > maxValueBytes) throw invalid(`a value has at most ${maxValueBytes} bytes, not ${value.length}`)
    if (failure !== undefined) throw failure
    if (pending.size >= maxCalls)
      throw new CollectiveError('ERR_BUSY', `${maxCalls} calls of ${where} are pending: await some before others`)
    const id = next
    next = next === 0xffffffff ? 1 : next + 1
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        reject(late(id, op, key, timeoutMs))
      }, timeoutMs)
      pending.set(id, {
        key,
        resolve: (result) => {
          clearTimeout(timer)
          resolve(result)
        },
        reject: (error) => {
          clearTimeout(timer)
          reject(error)
        },
      })
      post(id, op, key, value)
    })
  }
  return {
    set: async (key, value, { isNew = false } = {}) => {
      // A copy: zeromq sends from the memory it was given, later.
      await call(isNew ? storeOps.setNew : storeOps.set, key, Uint8Array.from(value), defaultMs)
    },
    get: async (key, { timeoutMs = defaultMs } = {}) => call(storeOps.get, key, none, checkTimeout(timeoutMs)),
    delete: async (key) => {
      await call(storeOps.delete, key, none, defaultMs)
    },
    close: async () => {
      end(new CollectiveError('ERR_CLOSED', `${where} has been closed`))
      return Promise.resolve()
    },
  }
}

const none = new Uint8Array()
const checkTimeout = (timeoutMs: number): number => checkInteger('timeoutMs', timeoutMs, 1, 2 ** 31 - 1)
