// The thread that serves a store (store.ts): keys and values in memory, and the gets that wait for keys. Whatever is not a request is
// dropped and counted; nothing that comes in makes it grow beyond its limits.

import { parentPort, workerData } from 'node:worker_threads'
import { Context, Router } from 'zeromq'
import { endThread, markEnded } from './socketThread.js'
import {
  headBytes,
  maxCalls,
  maxEntries,
  maxKeyBytes,
  maxMessageBytes,
  maxStoredBytes,
  maxValueBytes,
  storeOps,
  storeStatus,
  type FromStoreThread,
  type StoreSetup,
} from './storeProtocol.js'
import { openGate, serverSecurity } from './zap.js'

const port = parentPort
if (port === null) throw new Error('storeThread.js is the entry of a worker thread')
const { endpoint, keys, admitted, dropped, ended } = workerData as StoreSetup
const tell = (message: FromStoreThread): void => {
  port.postMessage(message)
}
const failed = (error: unknown): void => {
  tell({ kind: 'failed', message: error instanceof Error ? error.message : String(error) })
}

interface Waiter {
  readonly peer: Buffer
  readonly head: Buffer
}
const values = new Map<string, Buffer>()
const waiters = new Map<string, Waiter[]>()
let storedBytes = 0
let numWaiters = 0

type Answer = [peer: Buffer, head: Buffer, value: Buffer]
const none = Buffer.alloc(0)

function answer({ peer, head }: Waiter, status: number, value: Buffer = none): Answer {
  const reply = Buffer.from(head)
  reply[headBytes - 1] = status
  return [peer, reply, value]
}

/** What a request makes this store say, to whomever; undefined: it is none. */
function handle([peer, head, key, value, ...more]: readonly Buffer[]): Answer[] | undefined {
  if (peer === undefined || head?.length !== headBytes || key === undefined || value === undefined || more.length > 0)
    return undefined
  if (key.length === 0 || key.length > maxKeyBytes || value.length > maxValueBytes) return undefined
  const asker = { peer, head }
  const name = key.toString('latin1') // byte for byte, whatever they are
  const op = head[headBytes - 1]
  switch (op) {
    case storeOps.set:
    case storeOps.setNew: {
      const known = values.get(name)
      if (known !== undefined && op === storeOps.setNew) return [answer(asker, storeStatus.exists, known)]
      const bytes = storedBytes + value.length - (known?.length ?? 0)
      if ((known === undefined && values.size >= maxEntries) || bytes > maxStoredBytes)
        return [answer(asker, storeStatus.refused)]
      values.set(name, Buffer.from(value))
      storedBytes = bytes
      const woken = waiters.get(name) ?? []
      waiters.delete(name)
      numWaiters -= woken.length
      return [answer(asker, storeStatus.done), ...woken.map((waiter) => answer(waiter, storeStatus.done, value))]
    }
    case storeOps.get: {
      const known = values.get(name)
      if (known !== undefined) return [answer(asker, storeStatus.done, known)]
      if (numWaiters >= maxEntries) return [answer(asker, storeStatus.refused)]
      numWaiters++
      const waiting = waiters.get(name)
      if (waiting === undefined) waiters.set(name, [asker])
      else waiting.push(asker)
      return []
    }
    case storeOps.cancel: {
      const waiting = waiters.get(name) ?? []
      const id = head.readUInt32LE(0)
      const at = waiting.findIndex((waiter) => waiter.peer.equals(peer) && waiter.head.readUInt32LE(0) === id)
      if (at < 0) return []
      numWaiters--
      waiting.splice(at, 1)
      if (waiting.length === 0) waiters.delete(name)
      return []
    }
    case storeOps.delete:
      storedBytes -= values.get(name)?.length ?? 0
      values.delete(name)
      return [answer(asker, storeStatus.done)]
    default:
      return undefined
  }
}

const context = new Context()
markEnded(ended)
const gate = keys === undefined ? undefined : await openGate(context, failed)
gate?.admit(admitted === undefined ? [] : [admitted])
const socket = new Router({
  context,
  linger: 0,
  sendHighWaterMark: 2 * maxCalls,
  ipv6: endpoint.includes('['),
  maxMessageSize: maxMessageBytes,
  handshakeInterval: 5000,
  heartbeatInterval: 2000,
  heartbeatTimeout: 8000,
  ...serverSecurity(keys),
})
const state = { isEnding: false }
const end = (): void => {
  state.isEnding = true
  gate?.close()
  socket.close()
  endThread(port)
}

// Without an unbind before: libzmq may abort the process where a socket is unbound, with connections that end, and closed right after.
port.on('message', end)

try {
  await socket.bind(endpoint)
  tell({ kind: 'bound', endpoint: socket.lastEndpoint ?? '' })
  for await (const request of socket) {
    const answers = handle(request)
    if (answers === undefined) Atomics.add(dropped, 0, 1)
    for (const reply of answers ?? []) await socket.send(reply)
  }
} catch (error) {
  // One that could not be bound is closed all the same: a thread never ends with an open socket.
  if (!state.isEnding) failed(error)
}
