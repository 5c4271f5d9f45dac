// The thread of a rank that owns its sockets: moves frames between ZeroMQ and the mailbox (native/comm/mailbox.h), and nothing else. Whatever the
// rank's main thread does, sockets, authentication and heartbeats live on here. A connection that is lost is the end of the group, never a
// silent reconnect; what a peer sent before stays valid.
//
// Sockets: one Pull, bound, on which all peers of other nodes send; one Push a peer. Heartbeats are libzmq's own, on its I/O thread.

import { parentPort, workerData } from 'node:worker_threads'
import PQueue from 'p-queue'
import { Context, curveKeyPair, Pull, Push, Reply } from 'zeromq'
import { openMailboxServer } from './mailbox.js'
import { curveKey, heartbeatMs, type FromWorker, type NetworkPeer, type NetworkSetup, type ToWorker } from './zmq.js'

const zapDomain = 'tilerank'
/** Handshakes under way at one time. */
const connectConcurrency = 16
/** What has been sent but not yet written when the rank closes still goes out, for so long. */
const lingerMs = 5000
const lostMs = 4 * heartbeatMs
/** What CURVE adds to a message (ZeroMQ RFC 26): command, nonce, flags, authentication; with room. */
const curveOverhead = 64

const port = parentPort
if (port === null) throw new Error('zmqWorker.js is the entry of a worker thread')
const { mailboxId, address, isEncrypted, ended } = workerData as NetworkSetup
const server = openMailboxServer(mailboxId)
const context = new Context()
const keys = isEncrypted ? curveKeyPair() : undefined

const tell = (message: FromWorker): void => {
  port.postMessage(message)
}
const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))

/** Sends to one peer, in order; zeromq takes one send at a time. */
class Outlet {
  readonly #waiting: Uint8Array[] = []
  #sending: Promise<void> | undefined
  constructor(
    readonly socket: Push,
    readonly rank: number,
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
      server.lost(this.rank, `sending to it failed: ${messageOf(error)}`)
    } finally {
      this.#sending = undefined
    }
  }

  async drained(): Promise<void> {
    await this.#sending
  }
}

const outlets = new Map<number, Outlet>()
let isClosing = false

const drain = (): void => {
  for (let next = server.take(); next !== undefined; next = server.take()) outlets.get(next[0])?.send(next[1])
}

/** Admits the keys of this job's ranks. Whoever connects before these are known waits. */
async function authenticate(zap: Reply, admitted: Promise<ReadonlySet<string>>): Promise<void> {
  for await (const [version, id, domain, , , mechanism, key] of zap) {
    const isKnown =
      version?.toString() === '1.0' &&
      domain?.toString() === zapDomain &&
      mechanism?.toString() === 'CURVE' &&
      key?.length === 32 &&
      (await admitted).has(key.toString('hex'))
    await zap.send(['1.0', id ?? '', isKnown ? '200' : '400', isKnown ? 'OK' : 'unknown key', '', ''])
  }
}

async function receive(pull: Pull): Promise<void> {
  for await (const [message] of pull) {
    if (message !== undefined) server.deliver(message)
  }
}

async function connect(peer: NetworkPeer): Promise<void> {
  const socket = new Push({
    context,
    linger: lingerMs,
    sendHighWaterMark: 0, // the mailbox's window bounds what is under way
    heartbeatInterval: heartbeatMs,
    heartbeatTimeout: lostMs,
    ...(keys === undefined
      ? {}
      : {
          curveServerKey: peer.publicKey,
          curvePublicKey: keys.publicKey,
          curveSecretKey: keys.secretKey,
        }),
  })
  outlets.set(peer.rank, new Outlet(socket, peer.rank))
  await new Promise<void>((resolve, reject) => {
    let isUp = false
    const lost = (why: string): void => {
      if (!isUp) reject(new Error(`rank ${String(peer.rank)} at ${peer.endpoint}: ${why}`))
      else if (!isClosing) server.lost(peer.rank, why)
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
      if (isUp) lost(`the connection to ${peer.endpoint} was lost`)
    })
    socket.connect(peer.endpoint)
  })
}

async function main(): Promise<void> {
  let admit: (keys: ReadonlySet<string>) => void = () => undefined
  const admitted = new Promise<ReadonlySet<string>>((resolve) => {
    admit = resolve
  })
  let zap: Reply | undefined
  if (keys !== undefined) {
    // Before any socket is bound: libzmq asks nobody where nobody listens.
    zap = new Reply({ context, linger: 0 })
    await zap.bind('inproc://zeromq.zap.01')
    void authenticate(zap, admitted).catch((error: unknown) => {
      if (!isClosing) tell({ kind: 'failed', message: `authentication ended: ${messageOf(error)}` })
    })
  }
  const pull = new Pull({
    context,
    linger: 0,
    receiveHighWaterMark: 0,
    maxMessageSize: server.messageBytes + curveOverhead,
    handshakeInterval: 5000,
    heartbeatTimeToLive: lostMs,
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
  await pull.bind(`tcp://${address}:*`)
  if (keys !== undefined && pull.securityMechanism !== 'curve') throw new Error('this build of ZeroMQ has no CURVE')
  void receive(pull).catch((error: unknown) => {
    if (!isClosing) tell({ kind: 'failed', message: `receiving ended: ${messageOf(error)}` })
  })
  server.serve(drain)
  tell({ kind: 'bound', endpoint: pull.lastEndpoint ?? '', publicKey: keys?.publicKey ?? '' })

  const end = (): void => {
    isClosing = true
    server.close()
    pull.close()
    zap?.close()
    for (const { socket } of outlets.values()) socket.close()
    Atomics.store(ended, 0, 1)
    Atomics.notify(ended, 0)
    port?.close()
  }

  port?.on('message', (message: ToWorker) => {
    if (message.kind === 'close') {
      isClosing = true
      drain()
      void Promise.all([...outlets.values()].map((outlet) => outlet.drained())).then(end)
      return
    }
    if (message.kind === 'end') {
      for (const { socket } of outlets.values()) socket.linger = 0
      end()
      return
    }
    admit(new Set(message.peers.map((peer) => curveKey(peer.publicKey).toString('hex'))))
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
