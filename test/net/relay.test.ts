import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { node, pause } from '../launcher/processes.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle } from '../../bench/lab.js'
import { startRelay, type Directions, type Relay } from './relay.js'

/** Byte i is i modulo 251, a prime: no two blocks of a test look alike. */
const period = Buffer.from(Array.from({ length: 251 }, (_, i) => i))
const pattern = (nbytes: number): Buffer => Buffer.alloc(nbytes, period)

/** What a socket has heard so far, and how it ended: its end, or an error's code. */
interface Heard {
  readonly bytes: () => Buffer
  readonly atLeast: (nbytes: number) => Promise<void>
  readonly ended: Promise<string>
}

function hear(socket: Socket): Heard {
  const pieces: Buffer[] = []
  socket.on('data', (piece: Buffer) => pieces.push(piece))
  const bytes = (): Buffer => Buffer.concat(pieces)
  return {
    bytes,
    atLeast: async (nbytes) => {
      while (bytes().length < nbytes) await pause(5)
    },
    ended: new Promise((resolve) => {
      socket.once('end', () => resolve('end'))
      socket.once('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? error.message))
    }),
  }
}

describe('the relay between two ranks', () => {
  let server: Server
  let relay: Relay | undefined
  let sockets: Socket[] = []

  beforeEach(async () => {
    server = createServer({ allowHalfOpen: true })
    await once(server.listen(0, '127.0.0.1'), 'listening')
  })

  afterEach(async () => {
    for (const socket of sockets) socket.destroy()
    sockets = []
    server.close()
    await relay?.close()
    await relay?.close()
    relay = undefined
  })

  /** One connection through a fresh relay: the side that connected, the side that listened. */
  async function join(faults: Directions = {}): Promise<readonly [client: Socket, listener: Socket, relay: Relay]> {
    const { port } = server.address() as AddressInfo
    relay ??= await startRelay({ target: { host: '127.0.0.1', port }, faults })
    const accepted = once(server, 'connection')
    const client = connect({ port: relay.port, host: relay.host, allowHalfOpen: true })
    const [listener] = (await accepted) as [Socket]
    for (const socket of [client, listener]) socket.on('error', () => undefined) // a test that cares hears it
    sockets.push(client, listener)
    return [client, listener, relay]
  }

  it('passes everything on, both ways, and each end on its own', async () => {
    const [client, listener, { counts }] = await join()
    const there = hear(listener)
    const back = hear(client)
    const data = pattern(3_000_000)
    client.end(data)
    assert.equal(await there.ended, 'end')
    assert(there.bytes().equals(data))
    listener.end(data.subarray(0, 1_000_001))
    assert.equal(await back.ended, 'end')
    assert(back.bytes().equals(data.subarray(0, 1_000_001)))
    assert.deepEqual(await counts(), { connections: 1, forwardBytes: 3_000_000, backwardBytes: 1_000_001 })
  })

  it('delays one direction and not the other, as asked for at the moment', async () => {
    const [client, listener, { set }] = await join()
    const there = hear(listener)
    const back = hear(client)
    const timed = async (from: Socket, to: Heard): Promise<number> => {
      const start = performance.now()
      from.write('x')
      await to.atLeast(to.bytes().length + 1)
      return performance.now() - start
    }
    await set({ forward: { delayMs: 1200 } })
    const [slow, quick] = await Promise.all([timed(client, there), timed(listener, back)])
    assert(slow >= 1190, `${slow} ms`)
    assert(quick < slow - 500, `${quick} of ${slow} ms`)
    await set({ forward: {}, backward: { delayMs: 200 } })
    assert((await timed(listener, back)) >= 195)
  })

  it('keeps the order when a delay is shortened', async () => {
    const [client, listener, { set, counts }] = await join({ forward: { delayMs: 300 } })
    const there = hear(listener)
    client.write('first ')
    while ((await counts()).forwardBytes < 6) await pause(5)
    await set({ forward: {} })
    client.write('second')
    await there.atLeast(12)
    assert.equal(there.bytes().toString(), 'first second')
  })

  it('limits the rate', async () => {
    const [client, listener] = await join({ forward: { bytesPerS: 100_000 } })
    const there = hear(listener)
    const start = performance.now()
    const data = pattern(60_000)
    client.write(data)
    await there.atLeast(data.length)
    const ms = performance.now() - start
    assert(ms > 550, `60 KB took ${ms} ms at 100 KB/s`)
    assert(there.bytes().equals(data))
  })

  it('stalls until told otherwise: the sender is held up, nothing is lost', async () => {
    const [client, listener, { set, counts }] = await join({ forward: { isStalled: true } })
    const there = hear(listener)
    const data = pattern(20_000_000) // more than the kernel keeps for a reader that does not read
    let isWritten = false
    client.write(data, () => (isWritten = true))
    await pause(300)
    assert.deepEqual([there.bytes().length, isWritten, (await counts()).forwardBytes], [0, false, 0])
    await set({ forward: {} })
    await there.atLeast(data.length)
    assert(there.bytes().equals(data))
    await set({ forward: { isStalled: true } })
    client.write('y')
    await pause(100)
    assert.equal(there.bytes().length, data.length)
  })

  for (const at of [0, 1000]) {
    it(`cuts with FIN after ${at} bytes`, async () => {
      const [client, listener] = await join({ forward: { cut: { at, by: 'FIN' } } })
      const there = hear(listener)
      const back = hear(client)
      client.write(pattern(5000))
      assert.equal(await there.ended, 'end')
      assert.equal(await back.ended, 'end')
      assert(there.bytes().equals(pattern(at)))
    })

    it(`cuts with RST after ${at} bytes`, async () => {
      const [client, listener] = await join({ backward: { cut: { at, by: 'RST' } } })
      const there = hear(listener)
      const back = hear(client)
      listener.write(pattern(5000))
      assert.equal(await back.ended, 'ECONNRESET')
      assert.match(await there.ended, /ECONNRESET|EPIPE/)
      assert(back.bytes().equals(pattern(at).subarray(0, back.bytes().length)))
    })
  }

  it('cuts an idle connection when told to, and one whose reader does not read', async () => {
    const [client, , { set }] = await join()
    const idle = hear(client)
    await set({ forward: { cut: { at: 0, by: 'RST' } } })
    assert.equal(await idle.ended, 'ECONNRESET')
    await set({ forward: {} })
    const [second, deaf, { set: setAgain }] = await join()
    deaf.pause()
    const blocked = hear(second)
    second.write(pattern(20_000_000))
    await pause(200)
    await setAgain({ forward: { cut: { at: 0, by: 'RST' } } })
    assert.match(await blocked.ended, /ECONNRESET|EPIPE/)
  })

  it('flips one bit, once, counted from where it was asked for', async () => {
    const [client, listener, { set, counts }] = await join({ forward: { flipBitAt: 70_000 } })
    const there = hear(listener)
    const data = pattern(100_000)
    const expected = Buffer.concat([data, data])
    client.write(data)
    await there.atLeast(data.length)
    assert.equal((await counts()).forwardBytes, data.length)
    await set({ forward: { flipBitAt: 3 } })
    client.write(data)
    await there.atLeast(expected.length)
    for (const at of [70_000, 100_003]) expected[at] = (expected[at] ?? 0) ^ 1
    assert(there.bytes().equals(expected))
  })

  it('drops bytes in the middle, or all from some byte on', async () => {
    const [client, listener, { set }] = await join({ forward: { drop: { at: 10, nbytes: 5 } } })
    const there = hear(listener)
    client.write(pattern(100))
    await there.atLeast(95)
    assert(there.bytes().equals(Buffer.concat([pattern(10), pattern(100).subarray(15)])))
    await set({ forward: { drop: { at: 2, nbytes: Infinity } } })
    client.end('abcdef')
    assert.equal(await there.ended, 'end')
    assert.equal(there.bytes().subarray(95).toString(), 'ab')
  })

  it('swaps two blocks, also when the bytes come one by one', async () => {
    const [client, listener, { set }] = await join({ forward: { swap: { at: 3, nbytes: 4 } } })
    const there = hear(listener)
    client.setNoDelay()
    for (const letter of 'abcDEFGhijklm') {
      client.write(letter)
      await pause(2)
    }
    await there.atLeast(13)
    assert.equal(there.bytes().toString(), 'abchijkDEFGlm')
    // An end before both blocks are there loses nothing.
    await set({ forward: { swap: { at: 0, nbytes: 3 } } })
    client.end('nopq')
    assert.equal(await there.ended, 'end')
    assert.equal(there.bytes().toString(), 'abchijkDEFGlmqnop')
  })

  it('refuses at once what its target refuses, and hands a reset on', async () => {
    const [client, listener, { port, host }] = await join()
    const back = hear(client)
    listener.resetAndDestroy()
    assert.equal(await back.ended, 'ECONNRESET')
    server.close()
    const refused = connect(port, host)
    sockets.push(refused)
    assert.equal(await hear(refused).ended, 'ECONNRESET')
  })

  it('says so when it cannot listen', async () => {
    const { port } = server.address() as AddressInfo
    await assert.rejects(startRelay({ target: { host: '127.0.0.1', port }, port }), /EADDRINUSE/)
  })

  it('stands in a node of a lab', async function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) unavailable(this, obstacle)
    await using lab = await createLab({ nodes: 3 })
    const [first, second, third] = lab.nodes
    assert(first !== undefined && second !== undefined && third !== undefined)
    const listens = first.run(node, [
      '-e',
      `require('node:net').createServer((s) => s.end(s.remoteAddress)).listen(0, '${first.address}', function () {
        console.log(this.address().port) })`,
    ])
    const [text] = (await once(listens.stdout ?? listens, 'data')) as [Buffer]
    await using between = await startRelay({ on: third, target: { host: first.address, port: Number(String(text)) } })
    const asks = second.run(node, [
      '-e',
      `require('node:net').connect(${between.port}, '${between.host}').pipe(process.stdout)`,
    ])
    const [heard] = (await once(asks.stdout ?? asks, 'data')) as [Buffer]
    assert.equal(String(heard), third.address)
  })
})
