// Loaded into every rank of the relay's tests by NODE_OPTIONS=--import: gives sockets known ports, and has peers connect to the relay in front
// of them (nodes.ts).

import { nativeAddon } from '../../native/index.js'

export const pullPort = 41_000
export const relayPort = 42_000

type Courier = new (
  mailbox: unknown,
  endpoint: string,
  isEncrypted: boolean,
) => {
  connect(peers: readonly { readonly endpoint: string }[], timeoutMs: number): Promise<void>
}

if (process.env['TILERANK_TEST_RELAY'] === '1') {
  const addon = nativeAddon() as { ZmqCourier: Courier }
  addon.ZmqCourier = class extends addon.ZmqCourier {
    constructor(mailbox: unknown, endpoint: string, isEncrypted: boolean) {
      super(mailbox, endpoint.replace(/:\*$/, `:${pullPort}`), isEncrypted)
    }
    override connect(peers: readonly { readonly endpoint: string }[], timeoutMs: number): Promise<void> {
      const behind = (endpoint: string): string => endpoint.replace(`:${pullPort}`, `:${relayPort}`)
      return super.connect(
        peers.map((peer) => ({ ...peer, endpoint: behind(peer.endpoint) })),
        timeoutMs,
      )
    }
  }
}
