// Who may come in: the authentication that libzmq asks for (ZeroMQ RFC 27). With CURVE alone everybody who knows the server's public key is
// let in; this handler admits only the keys it was given. To be started before any socket of its context is bound.

import { Reply, type Context } from 'zeromq'
import { z85Decode, type KeyPair } from './secret.js'

/** Sockets set it and enforce it: with an empty domain libzmq asks nobody. */
const zapDomain = 'tilerank'

/** Options of a socket that others connect to; without keys it takes anybody, unencrypted. */
export const serverSecurity = (keys: KeyPair | undefined): object =>
  keys === undefined
    ? {}
    : {
        curveServer: true,
        curvePublicKey: keys.publicKey,
        curveSecretKey: keys.secretKey,
        zapDomain,
        zapEnforceDomain: true,
      }

/** Options of a socket that connects to the one whose key this is. */
export const clientSecurity = (keys: KeyPair | undefined, serverKey: string | undefined): object =>
  keys === undefined
    ? {}
    : { curveServerKey: serverKey, curvePublicKey: keys.publicKey, curveSecretKey: keys.secretKey }

export interface Gate {
  /** Admits these keys, Z85, from now on; who asked before waits for it. */
  admit(publicKeys: readonly string[]): void
  close(): void
}

export async function openGate(context: Context, onFailure: (message: string) => void): Promise<Gate> {
  const socket = new Reply({ context, linger: 0 })
  await socket.bind('inproc://zeromq.zap.01')
  let isClosed = false
  let open: (keys: ReadonlySet<string>) => void = () => undefined
  const admitted = new Promise<ReadonlySet<string>>((resolve) => {
    open = resolve
  })
  const serve = async (): Promise<void> => {
    for await (const [version, id, domain, , , mechanism, key] of socket) {
      const isKnown =
        version?.toString() === '1.0' &&
        domain?.toString() === zapDomain &&
        mechanism?.toString() === 'CURVE' &&
        key?.length === 32 &&
        (await admitted).has(key.toString('hex'))
      await socket.send(['1.0', id ?? '', isKnown ? '200' : '400', isKnown ? 'OK' : 'unknown key', '', ''])
    }
  }
  serve().catch((error: unknown) => {
    if (!isClosed) onFailure(`authentication ended: ${error instanceof Error ? error.message : String(error)}`)
  })
  return {
    admit: (publicKeys) => {
      open(new Set(publicKeys.map((key) => z85Decode(key)?.toString('hex') ?? '')))
    },
    close: () => {
      isClosed = true
      socket.close()
    },
  }
}
