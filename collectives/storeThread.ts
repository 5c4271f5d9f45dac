// The thread that serves a store (store.ts): keys and values in memory, and the gets that wait for keys. Whatever is not a request is
// dropped; nothing that comes in makes it grow beyond its limits.

import { parentPort, workerData } from 'node:worker_threads'
import { Context, Router } from 'zeromq'
import { markEnded } from './socketThread.js'
import {
  headBytes,
  maxEntries,
  maxKeyBytes,
  maxValueBytes,
  storeOps,
  storeStatus,
  type FromStoreThread,
  type StoreSetup,
} from './storeProtocol.js'
import { openGate, zapDomain } from './zap.js'

const port = parentPort
if (port === null) throw new Error('storeThread.js is the entry of a worker thread')
const { endpoint, keys, admitted, ended } = workerData as StoreSetup
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
let numWaiters = 0

type Answer = [peer: Buffer, head: Buffer, value: Buffer]
const none = Buffer.alloc(0)

function answer({ peer, head }: Waiter, status: number, value: Buffer = none): Answer {
  const reply = Buffer.from(head)
  reply[headBytes - 1] = status
  return [peer, reply, value]
}

/** What a request makes this store say, to whomever. */
function handle(peer: Buffer, head: Buffer, key: string, value: Buffer): Answer[] {
  const asker = { peer, head }
  const id = head.readUInt32LE(0)
  switch (head[headBytes - 1]) {
    case storeOps.set:
    case storeOps.setNew: {
      const known = values.get(key)
      if (known !== undefined && head[headBytes - 1] === storeOps.setNew)
        return [answer(asker, storeStatus.exists, known)]
      if (known === undefined && values.size >= maxEntries) return [answer(asker, storeStatus.refused)]
      values.set(key, Buffer.from(value))
      const woken = waiters.get(key) ?? []
      waiters.delete(key)
      numWaiters -= woken.length
      return [answer(asker, storeStatus.done), ...woken.map((waiter) => answer(waiter, storeStatus.done, value))]
    }
    case storeOps.get: {
      const known = values.get(key)
      if (known !== undefined) return [answer(asker, storeStatus.done, known)]
      if (numWaiters >= maxEntries) return [answer(asker, storeStatus.refused)]
      numWaiters++
      waiters.set(key, [...(waiters.get(key) ?? []), asker])
      return []
    }
    case storeOps.cancel: {
      const left = (waiters.get(key) ?? []).filter(
        (waiter) => !waiter.peer.equals(peer) || waiter.head.readUInt32LE(0) !== id,
      )
      numWaiters -= (waiters.get(key)?.length ?? 0) - left.length
      if (left.length > 0) waiters.set(key, left)
      else waiters.delete(key)
      return []
    }
    case storeOps.delete:
      values.delete(key)
      return [answer(asker, storeStatus.done)]
    default:
      return [answer(asker, storeStatus.refused)]
  }
}

const context = new Context()
markEnded(ended)
const gate = keys === undefined ? undefined : await openGate(context, failed)
gate?.admit(admitted === undefined ? [] : [admitted])
const socket = new Router({
  context,
  linger: 0,
  ipv6: endpoint.includes('['),
  maxMessageSize: maxValueBytes + 1024,
  handshakeInterval: 5000,
  heartbeatInterval: 2000,
  heartbeatTimeout: 8000,
  ...(keys === undefined
    ? {}
    : {
        curveServer: true,
        curvePublicKey: keys.publicKey,
        curveSecretKey: keys.secretKey,
        zapDomain,
        zapEnforceDomain: true,
      }),
})
let isEnding = false
port.on('message', () => {
  isEnding = true
  gate?.close()
  socket.close()
  port.close()
})
try {
  await socket.bind(endpoint)
  tell({ kind: 'bound', endpoint: socket.lastEndpoint ?? '' })
  for await (const [peer, head, key, value] of socket) {
    if (peer === undefined || head?.length !== headBytes || key === undefined || value === undefined) continue
    if (key.length === 0 || key.length > maxKeyBytes || value.length > maxValueBytes) continue
    for (const reply of handle(peer, head, key.toString('utf8'), value)) await socket.send(reply)
  }
} catch (error) {
  // One that could not be bound is closed all the same: a thread never ends with an open socket.
  if (!isEnding) failed(error)
}
