// The ZeroMQ leg of a group across nodes, as the rank's main thread sees it: a mailbox, and the thread that owns the sockets (zmqThread.ts).

import { createMailbox, type MailboxOptions, type NativeMailbox } from './mailbox.js'
import { SocketThread, type ThreadFailure, type ThreadSetup } from './socketThread.js'
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

export interface NetworkSetup extends ThreadSetup {
  readonly mailboxId: number
  /** With * for the port. */
  readonly endpoint: string
  readonly isEncrypted: boolean
}

export type ToNetworkThread =
  | { readonly kind: 'connect'; readonly peers: readonly NetworkPeer[] }
  /** What was sent still goes out. */
  | { readonly kind: 'close' }

export type FromNetworkThread =
  | { readonly kind: 'bound'; readonly endpoint: string; readonly publicKey: string }
  | { readonly kind: 'connected' }
  | ThreadFailure

/** A peer that does not answer four of these in a row is lost. */
export const heartbeatMs = 1000

/** This rank's end of the network. */
export class Network {
  readonly #thread: SocketThread<ToNetworkThread, FromNetworkThread>
  #closing: Promise<void> | undefined

  private constructor(
    thread: SocketThread<ToNetworkThread, FromNetworkThread>,
    readonly mailbox: NativeMailbox,
    /** Where the ranks of other nodes reach this one. */
    readonly endpoint: string,
    /** Made for this group; its secret half never leaves the thread. */
    readonly publicKey: string,
  ) {
    this.#thread = thread
  }

  /**
   * Binds a port of `address` that the kernel chooses.
   * @throws CollectiveError ERR_IO
   */
  static async open(
    options: MailboxOptions & { readonly address: string; readonly isEncrypted: boolean },
  ): Promise<Network> {
    const { address, isEncrypted } = options
    const mailbox = createMailbox(options)
    const setup: Omit<NetworkSetup, 'ended'> = {
      mailboxId: mailbox.id,
      endpoint: tcpEndpoint(address, '*'),
      isEncrypted,
    }
    const url = new URL('./zmqThread.js', import.meta.url)
    const thread = new SocketThread<ToNetworkThread, FromNetworkThread>(url, setup, 'the network between nodes')
    const { endpoint, publicKey } = await thread.reply('bound')
    return new Network(thread, mailbox, endpoint, publicKey)
  }

  /**
   * Admits these peers, and connects to all of them.
   * @throws CollectiveError ERR_IO naming the peer, ERR_TIMEOUT
   */
  async connect(peers: readonly NetworkPeer[], timeoutMs: number): Promise<void> {
    this.#thread.send({ kind: 'connect', peers })
    await this.#thread.reply('connected', timeoutMs)
  }

  /** What was sent still goes out. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#thread.close({ kind: 'close' })
    return this.#closing
  }
}
