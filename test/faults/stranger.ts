// A stranger who found the port of a running group: speaks ZMTP without a key, with keys of its own, and no ZMTP at all. Usage: ENDPOINT

import { randomBytes } from 'node:crypto'
import { connect } from 'node:net'
import { setTimeout as pause } from 'node:timers/promises'
import { curveKeyPair, Push } from 'zeromq'

const [endpoint = ''] = process.argv.slice(2)
const { hostname, port } = new URL(endpoint)
const own = curveKeyPair()
const sockets = [
  new Push({ linger: 0, sendTimeout: 0 }),
  new Push({ linger: 0, sendTimeout: 0, plainUsername: 'rank', plainPassword: 'rank' }),
  new Push({
    linger: 0,
    sendTimeout: 0,
    curveServerKey: curveKeyPair().publicKey,
    curvePublicKey: own.publicKey,
    curveSecretKey: own.secretKey,
  }),
]
for (const socket of sockets) socket.connect(endpoint)
for (let i = 0; i < 20; i++) {
  for (const socket of sockets) await socket.send(randomBytes(200_000)).catch(() => undefined)
  const raw = connect({ host: hostname, port: Number(port) })
  raw.on('error', () => undefined)
  raw.write(
    i % 2 === 0 ? randomBytes(1000) : Buffer.concat([Buffer.from('ff00000000000000017f03', 'hex'), randomBytes(500)]),
  )
  await pause(20)
  raw.destroy()
}
for (const socket of sockets) socket.close()
