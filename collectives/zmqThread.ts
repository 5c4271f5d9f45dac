// The thread of a rank that owns its sockets: moves frames between ZeroMQ and the mailbox (native/comm/mailbox.h), and nothing else. Whatever the
// rank's main thread does, sockets, authentication and heartbeats live on here. A connection that is lost is the end of the group, never a
// silent reconnect; what a peer sent before stays valid.
//
// Sockets: one Pull, bound, on which all peers of other nodes send; one Push a peer. Heartbeats are libzmq's own, on its I/O thread.

import { setTimeout as pause } from 'node:timers/promises'
import { parentPort, workerData } from 'node:worker_threads'
import PQueue from 'p-queue'
import { Context, curveKeyPair, Pull, Push } from 'zeromq'
import { openMailboxServer } from './mailbox.js'
import { endThread, markEnded, type End } from './socketThread.js'
import { clientSecurity, openGate, serverSecurity } from './zap.js'
import {
  heartbeatMs,
  type FromNetworkThread,
  type NetworkPeer,
  type NetworkSetup,
  type ToNetworkThread,
} from './zmq.js'

/** Handshakes under way at one time. */
const connectConcurrency = 16
/** How long a rank that closes waits for its peers to have what it sent. */
const partingMs = 5000
const lostMs = 4 * heartbeatMs
/** What CURVE adds to a message (ZeroMQ RFC 26): command, nonce, flags, authentication; with room. */
const curveOverhead = 64

const port = parentPort
if (port === null) throw new Error('zmqThread.js is the entry of a worker thread')
const { mailboxId, endpoint, isEncrypted, ended } = workerData as NetworkSetup
const server = openMailboxServer(mailboxId)
const context = new Context()
markEnded(ended)
const keys = isEncrypted ? curveKeyPair() : undefined

const tell = (message: FromNetworkThread): void => {
  port.postMessage(message)
}
const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))

/** Sends to one peer, in order; zeromq takes one send at a time. */
class Outlet {
  /** The connection is lost, or never stood: nothing that is sent arrives. */
  isLost = false
  readonly #waiting: Uint8Array[] = []
  #sending: Promise<void> | undefined
  constructor(
    readonly socket: Push,
    readonly peer: NetworkPeer,
  ) {}

  send(bytes: Uint8Array): void {
    this.#waiting.push(bytes)
    this.#sending ??= this.#pump()
  }

  async #pump(): Promise<void> {
    try {
      for (let bytes = this.#waiting.shift(); bytes !== undefined; bytes = this.#waiting.shift())
        await this.socket.send(bytes)
    } catch (error) {
      server.lost(this.peer.rank, this.peer.host, this.peer.pid, `sending to it failed: ${messageOf(error)}`)
    } finally {
      this.#sending = undefined
    }
  }
}

const outlets = new Map<number, Outlet>()
let isClosing = false

const drain = (): void => {
  for (let next = server.take(); next !== undefined; next = server.take()) outlets.get(next[0])?.send(next[1])
}

async function receive(pull: Pull): Promise<void> {
  for await (const [message] of pull) {
    if (message !== undefined) server.deliver(message)
  }
}

async function connect(peer: NetworkPeer): Promise<void> {
  const socket = new Push({
    context,
    linger: 0,
    ipv6: peer.endpoint.includes('['),
    sendHighWaterMark: 0, // the mailbox's window bounds what is under way
    heartbeatInterval: heartbeatMs,
    heartbeatTimeout: lostMs,
    ...clientSecurity(keys, peer.publicKey),
  })
  const outlet = new Outlet(socket, peer)
  outlets.set(peer.rank, outlet)
  await new Promise<void>((resolve, reject) => {
    let isUp = false
    const lost = (why: string): void => {
      outlet.isLost = true
      if (!isUp) reject(new Error(`rank ${peer.rank} on ${peer.host} at ${peer.endpoint}: ${why}`))
      else if (!isClosing) server.lost(peer.rank, peer.host, peer.pid, why)
    }
    socket.events.on('handshake', () => {
      isUp = true
      resolve()
    })
    socket.events.on('handshake:error:auth', () => {
      lost('it refused the key of this rank: it is not of this job')
    })
    socket.events.on('handshake:error:protocol', () => {
      lost('what listens there does not speak ZeroMQ as ranks do')
    })
    socket.events.on('handshake:error:other', () => {
      lost('the connection broke while keys were exchanged')
    })
    socket.events.on('disconnect', () => {
      if (isUp) lost(`the connection to ${peer.host} at ${peer.endpoint} was lost`)
    })
    socket.connect(peer.endpoint)
  })
}

async function main(): Promise<void> {
  // Before any socket is bound: libzmq asks nobody where nobody listens. Until the peers are known, whoever connects waits.
  const gate =
    keys === undefined
      ? undefined
      : await openGate(context, (message) => {
          tell({ kind: 'failed', message })
        })
  const pull = new Pull({
    context,
    linger: 0,
    ipv6: endpoint.includes('['),
    receiveHighWaterMark: 0,
    maxMessageSize: server.messageBytes + curveOverhead,
    handshakeInterval: 5000,
    heartbeatTimeToLive: lostMs,
    ...serverSecurity(keys),
  })
  await pull.bind(endpoint)
  if (keys !== undefined && pull.securityMechanism !== 'curve') throw new Error('this build of ZeroMQ has no CURVE')
  void receive(pull).catch((error: unknown) => {
    if (!isClosing) tell({ kind: 'failed', message: `receiving ended: ${messageOf(error)}` })
  })
  server.serve(drain)
  tell({ kind: 'bound', endpoint: pull.lastEndpoint ?? '', publicKey: keys?.publicKey ?? '' })

  // What was sent goes out first: a peer may still wait for it.
  const part = async (): Promise<void> => {
    isClosing = true
    for (const { peer } of outlets.values()) server.sayGoodbye(peer.rank)
    drain()
    const until = Date.now() + partingMs
    const isOpen = ({ isLost, peer }: Outlet): boolean => !isLost && !server.hasParted(peer.rank)
    while ([...outlets.values()].some(isOpen) && Date.now() < until) await pause(1)
  }

  const end = (): void => {
    isClosing = true
    server.close()
    pull.close()
    gate?.close()
    for (const { socket } of outlets.values()) socket.close()
    if (port !== null) endThread(port)
  }

  port?.on('message', (message: ToNetworkThread | End) => {
    if (message.kind === 'close') {
      void part().then(end)
      return
    }
    if (message.kind === 'end') {
      end()
      return
    }
    gate?.admit(message.peers.map((peer) => peer.publicKey))
    const queue = new PQueue({ concurrency: connectConcurrency })
    queue.addAll(message.peers.map((peer) => async () => connect(peer))).then(
      () => {
        tell({ kind: 'connected' })
      },
      (error: unknown) => {
        tell({ kind: 'failed', message: messageOf(error) })
      },
    )
  })
}

void main().catch((error: unknown) => {
  tell({ kind: 'failed', message: messageOf(error) })
})
