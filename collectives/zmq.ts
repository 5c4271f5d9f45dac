// The ZeroMQ leg of a group across nodes: a mailbox, and the courier that empties and fills it (native/comm/zmq_courier.h), with the libzmq of
// the zeromq package.

import 'zeromq' // loads the library that the courier uses
import { nativeAddon } from '../native/index.js'
import { CollectiveError, fromNative } from './errors.js'
import { createMailbox, type MailboxOptions, type NativeMailbox } from './mailbox.js'
import { tcpEndpoint } from './store.js'

/** A rank of another node. */
export interface NetworkPeer {
  /** In the job. */
  readonly rank: number
  readonly host: string
  readonly pid: number
  /** tcp://address:port */
  readonly endpoint: string
  /** CURVE, Z85; empty where nothing is encrypted. */
  readonly publicKey: string
}

interface ZmqCourier {
  readonly endpoint: string
  readonly publicKey: string
  connect(peers: readonly NetworkPeer[], timeoutMs: number): Promise<void>
  close(): Promise<void>
}

interface ZmqAddon {
  readonly ZmqCourier: new (mailbox: NativeMailbox, endpoint: string, isEncrypted: boolean) => ZmqCourier
}

function zmqAddon(): ZmqAddon {
  const addon = nativeAddon()
  if (typeof addon === 'object' && addon !== null && 'ZmqCourier' in addon) return addon as ZmqAddon
  throw new CollectiveError(
    'ERR_INTERNAL',
    'the native addon has no ZmqCourier: it is of another version; run `npx tilerank build`',
  )
}

/** This rank's end of the network. */
export class Network {
  readonly #courier: ZmqCourier
  #closing: Promise<void> | undefined

  private constructor(
    courier: ZmqCourier,
    readonly mailbox: NativeMailbox,
  ) {
    this.#courier = courier
    this.endpoint = courier.endpoint
    this.publicKey = courier.publicKey
  }

  /** Where the ranks of other nodes reach this one. */
  readonly endpoint: string
  /** Made for this group; its secret half never leaves the courier. */
  readonly publicKey: string

  /**
   * Binds a port of `address` that the kernel chooses.
   * @throws CollectiveError ERR_IO, ERR_UNSUPPORTED where the zeromq package hides its libzmq
   */
  static open(options: MailboxOptions & { readonly address: string; readonly isEncrypted: boolean }): Network {
    const { address, isEncrypted } = options
    const { ZmqCourier } = zmqAddon()
    const mailbox = createMailbox(options)
    try {
      return new Network(new ZmqCourier(mailbox, tcpEndpoint(address, '*'), isEncrypted), mailbox)
    } catch (error) {
      throw fromNative(error)
    }
  }

  /**
   * Admits these peers, and connects to all of them.
   * @throws CollectiveError ERR_IO naming the peer, ERR_TIMEOUT likewise
   */
  async connect(peers: readonly NetworkPeer[], timeoutMs: number): Promise<void> {
    const bare = peers.map(({ rank, host, pid, endpoint, publicKey }) => ({ rank, host, pid, endpoint, publicKey }))
    await this.#courier.connect(bare, timeoutMs).catch((error: unknown) => {
      throw fromNative(error)
    })
  }

  /** What was sent still goes out. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#courier.close()
    return this.#closing
  }
}
