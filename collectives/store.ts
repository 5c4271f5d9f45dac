// A key-value store of the ranks of a job: one process serves it, all set keys and wait for those of others. By it they find each other
// (meet.ts), and programs may use it for themselves. It is reached over ZeroMQ, encrypted, by whoever has the job's secret and by nobody else.

import { Dealer } from 'zeromq'
import { CollectiveError, invalid } from './errors.js'
import { deriveKeys, type KeyPair } from './secret.js'
import { SocketThread } from './socketThread.js'
import {
  maxKeyBytes,
  maxValueBytes,
  storeOps,
  storeStatus,
  type FromStoreThread,
  type StoreSetup,
  type ToStoreThread,
} from './storeProtocol.js'

export interface StoreAccess {
  /** The job's secret, 32 bytes; undefined: nothing is encrypted and nobody is asked who he is. */
  readonly secret: Uint8Array | undefined
}

export interface StoreServer {
  readonly address: string
  /** The kernel's choice where 0 was asked for. */
  readonly port: number
  close(): Promise<void>
}

export interface Store {
  /** @param options.isNew ERR_MISMATCH, with the value that stands as `theirs`, if there is one */
  set(key: string, value: Uint8Array, options?: { readonly isNew?: boolean }): Promise<void>
  /** Waits until the key is set. */
  get(key: string, options?: { readonly timeoutMs?: number }): Promise<Uint8Array>
  delete(key: string): Promise<void>
  close(): Promise<void>
}

/** The key of the server, and the one that all ranks share to reach it. */
const keysOf = (secret: Uint8Array): { readonly server: KeyPair; readonly client: KeyPair } => ({
  server: deriveKeys(secret, 'store server'),
  client: deriveKeys(secret, 'store client'),
})

export const tcpEndpoint = (address: string, port: number | '*'): string =>
  `tcp://${address.includes(':') ? `[${address}]` : address}:${port}`

function checkPort(port: number, lowest: number): number {
  if (Number.isInteger(port) && port >= lowest && port <= 65535) return port
  throw invalid(`port is ${String(port)}, expected is an integer from ${lowest} to 65535`)
}

/**
 * Serves a store in a thread of its own, so that a busy event loop keeps nobody waiting.
 * @param options.address the only one that is bound; options.port 0: the kernel chooses
 * @throws CollectiveError ERR_IO: the address is not of this machine, or the port is taken
 */
export async function serveStore(
  options: { readonly address: string; readonly port: number } & StoreAccess,
): Promise<StoreServer> {
  const port = checkPort(options.port, 0)
  const keys = options.secret === undefined ? undefined : keysOf(options.secret)
  const setup: Omit<StoreSetup, 'ended'> = {
    endpoint: tcpEndpoint(options.address, port === 0 ? '*' : port),
    keys: keys?.server,
    admitted: keys?.client.publicKey,
  }
  const url = new URL('./storeThread.js', import.meta.url)
  const thread = new SocketThread<ToStoreThread, FromStoreThread>(url, setup, `the store at ${options.address}:${port}`)
  const { endpoint } = await thread.reply('bound')
  return {
    address: options.address,
    port: Number(/:(\d+)$/.exec(endpoint)?.[1]),
    close: async () => thread.close({ kind: 'end' }),
  }
}

interface Pending {
  readonly key: string
  resolve(value: Buffer): void
  reject(error: Error): void
}

/**
 * Connects to a store, which may come up later.
 * @param options.timeoutMs of each call that names none
 */
export function connectStore(
  options: { readonly address: string; readonly port: number; readonly timeoutMs: number } & StoreAccess,
): Store {
  const where = `${options.address}:${checkPort(options.port, 1)}`
  const keys = options.secret === undefined ? undefined : keysOf(options.secret)
  const socket = new Dealer({
    linger: 0,
    reconnectInterval: 50,
    reconnectMaxInterval: 500,
    heartbeatInterval: 1000,
    heartbeatTimeout: 4000,
    maxMessageSize: maxValueBytes + 1024,
    ...(keys === undefined
      ? {}
      : {
          curveServerKey: keys.server.publicKey,
          curvePublicKey: keys.client.publicKey,
          curveSecretKey: keys.client.secretKey,
        }),
  })
  const pending = new Map<number, Pending>()
  let next = 1
  let failure: CollectiveError | undefined
  let isConnected = false
  let isClosed = false
  const fail = (error: CollectiveError): void => {
    failure ??= error
    for (const { reject } of pending.values()) reject(error)
    pending.clear()
  }
  socket.events.on('handshake', () => {
    isConnected = true
  })
  for (const type of ['handshake:error:auth', 'handshake:error:protocol'] as const) {
    socket.events.on(type, () => {
      fail(
        new CollectiveError(
          'ERR_MISMATCH',
          `the store at ${where} refused this process: it has another secret, or the other encryption`,
        ),
      )
    })
  }
  socket.connect(tcpEndpoint(options.address, options.port))

  const receive = async (): Promise<void> => {
    for await (const [head, value] of socket) {
      if (head?.length !== 5) continue
      const asked = pending.get(head.readUInt32LE(0))
      if (asked === undefined) continue
      pending.delete(head.readUInt32LE(0))
      const status = head[4]
      if (status === storeStatus.done) asked.resolve(value ?? Buffer.alloc(0))
      else if (status === storeStatus.exists) {
        const theirs = (value ?? Buffer.alloc(0)).toString('utf8')
        asked.reject(new CollectiveError('ERR_MISMATCH', `the store has ${asked.key} already`, { theirs }))
      } else {
        asked.reject(
          new CollectiveError(
            'ERR_IO',
            `the store at ${where} took no more: it is full, or the call was not understood`,
          ),
        )
      }
    }
  }
  receive().catch((error: unknown) => {
    if (!isClosed) fail(new CollectiveError('ERR_IO', `the store at ${where}: ${String(error)}`))
  })

  // zeromq takes one send at a time.
  let sent: Promise<void> = Promise.resolve()
  const post = (frames: readonly (Buffer | Uint8Array | string)[]): void => {
    sent = sent.then(async () => socket.send([...frames])).catch(() => undefined)
  }
  const headOf = (id: number, op: number): Buffer => {
    const head = Buffer.alloc(5)
    head.writeUInt32LE(id, 0)
    head[4] = op
    return head
  }

  const call = async (op: number, key: string, value: Uint8Array, timeoutMs: number): Promise<Buffer> => {
    if (isClosed) throw new CollectiveError('ERR_CLOSED', 'the store has been closed')
    const length = Buffer.byteLength(key)
    if (length === 0 || length > maxKeyBytes) throw invalid(`a key has 1 to ${maxKeyBytes} bytes, not ${length}`)
    if (value.length > maxValueBytes) throw invalid(`a value has at most ${maxValueBytes} bytes, not ${value.length}`)
    if (failure !== undefined) throw failure
    const id = next++ >>> 0
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        pending.delete(id)
        post([headOf(id, storeOps.cancel), key, ''])
        const why = isConnected ? `nobody set ${key}` : `nothing answered, or not with the same secret`
        reject(
          new CollectiveError('ERR_TIMEOUT', `the store at ${where}: ${why} within ${timeoutMs} ms`, {
            elapsedMs: timeoutMs,
          }),
        )
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
      post([headOf(id, op), key, value])
    })
  }
  const none = new Uint8Array()
  return {
    set: async (key, value, { isNew = false } = {}) => {
      // A copy: zeromq sends from the memory it was given, later.
      await call(isNew ? storeOps.setNew : storeOps.set, key, Uint8Array.from(value), options.timeoutMs)
    },
    get: async (key, { timeoutMs = options.timeoutMs } = {}) => call(storeOps.get, key, none, timeoutMs),
    delete: async (key) => {
      await call(storeOps.delete, key, none, options.timeoutMs)
    },
    close: async () => {
      if (isClosed) return
      isClosed = true
      fail(new CollectiveError('ERR_CLOSED', 'the store has been closed'))
      await sent
      socket.close()
    },
  }
}
