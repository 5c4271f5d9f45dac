// The store: what it keeps and who waits for it; who is let in; what it does with messages that are none; and that nothing stays of it.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync, readdirSync } from 'node:fs'
import { connect, createServer, type AddressInfo } from 'node:net'
import { curveKeyPair, Dealer } from 'zeromq'
import { connectStore, serveStore, type Store, type StoreAccess, type StoreServer } from '../../collectives/index.js'
import { deriveKeys } from '../../collectives/secret.js'
import { isLong, rounds } from '../rounds.js'

const address = '127.0.0.1'
const secret = randomBytes(32)
const timeoutMs = 20_000
const bytes = (text: string): Buffer => Buffer.from(text)
const pause = async (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

/** zeromq keeps a context that was closed until the process ends, with its event descriptors: docs/collectives.md, Limits. */
const contextDescriptors = 5

interface Failure extends Error {
  readonly code?: string
  readonly theirs?: string
}

async function rejects(work: Promise<unknown>, code: string, pattern: RegExp): Promise<Failure> {
  const error: unknown = await work.then(
    () => assert.fail(`expected is ${code}`),
    (reason: unknown) => reason,
  )
  assert.ok(error instanceof Error)
  assert.equal((error as Failure).code, code, error.message)
  assert.match(error.message, pattern)
  return error
}

describe('a store', function () {
  this.timeout(60_000)
  const open: { close(): Promise<void> }[] = []
  const kept = <T extends { close(): Promise<void> }>(made: T): T => {
    open.push(made)
    return made
  }
  const serve = async (access: StoreAccess = { secret }, at = address): Promise<StoreServer> =>
    kept(await serveStore({ address: at, port: 0, ...access }))
  const client = (server: StoreServer, access: StoreAccess = { secret }, ms = timeoutMs): Store =>
    kept(connectStore({ address: server.address, port: server.port, timeoutMs: ms, ...access }))
  afterEach(async () => {
    await Promise.all(open.splice(0).map(async (each) => each.close()))
  })

  for (const [name, access] of [
    ['encrypted', { secret }],
    ['not encrypted', { encryption: 'none' }],
  ] as const) {
    it(`keeps values, and wakes who waits for them (${name})`, async () => {
      const server = await serve(access)
      const [a, b] = [client(server, access), client(server, access)]
      await a.set('key', bytes('value'))
      assert.equal(Buffer.from(await b.get('key')).toString(), 'value')
      const waiting = [a.get('later'), b.get('later'), b.get('later')]
      await pause(50)
      await b.set('later', bytes('now'))
      for (const value of await Promise.all(waiting)) assert.equal(Buffer.from(value).toString(), 'now')
      await a.set('key', bytes('other'))
      assert.equal(Buffer.from(await b.get('key')).toString(), 'other')
      await a.delete('key')
      await rejects(b.get('key', { timeoutMs: 100 }), 'ERR_TIMEOUT', /nobody set key within 100 ms/)
      await a.delete('key')
      await a.set('key', bytes('again'), { isNew: true })
      const error = await rejects(b.set('key', bytes('mine'), { isNew: true }), 'ERR_MISMATCH', /has key already/)
      assert.equal(error.theirs, 'again')
      assert.equal(Buffer.from(await a.get('key')).toString(), 'again')
      assert.equal(server.dropped, 0)
    })
  }

  it('takes keys and values up to their limits, of any bytes', async () => {
    const server = await serve()
    const store = client(server)
    const largest = randomBytes(64 << 10)
    const key = 'k'.repeat(254) + 'é'
    await store.set(key, largest)
    assert.deepEqual(Buffer.from(await store.get(key)), largest)
    await store.set('empty', new Uint8Array())
    assert.equal((await store.get('empty')).length, 0)
    // A view of a larger array, which is written again before the value can have left.
    const array = new Uint8Array(3000).fill(1)
    const sent = store.set('view', array.subarray(1000, 2000))
    array.fill(2)
    await sent
    assert.deepEqual(Buffer.from(await store.get('view')), Buffer.alloc(1000, 1))
    await rejects(store.set('', largest), 'ERR_INVALID_ARGUMENT', /1 to 256 bytes/)
    await rejects(store.get(key + 'x'), 'ERR_INVALID_ARGUMENT', /not 257/)
    await rejects(store.set('k', new Uint8Array((64 << 10) + 1)), 'ERR_INVALID_ARGUMENT', /65536 bytes, not 65537/)
    for (const wrong of [0, 1.5, NaN, Infinity, 2 ** 31])
      await rejects(store.get('k', { timeoutMs: wrong }), 'ERR_INVALID_ARGUMENT', /timeoutMs/)
    assert.equal(server.dropped, 0)
  })

  it('answers thousands of calls at a time, and refuses more with ERR_BUSY', async () => {
    const server = await serve()
    const [waiter, setter] = [client(server), client(server)]
    const values = Array.from({ length: 4096 }, async () => waiter.get('key'))
    await rejects(waiter.get('one more'), 'ERR_BUSY', /4096 calls/)
    // One set is followed by all answers at once, faster than TCP takes them.
    const value = randomBytes(32 << 10)
    await setter.set('key', value)
    for (const got of await Promise.all(values)) assert.ok(value.equals(got))
    await waiter.set('other', value)
  })

  it('is waited for when it comes up later', async () => {
    const probe = await serve()
    const { port } = probe
    await probe.close()
    const store = kept(connectStore({ address, port, secret, timeoutMs }))
    const set = store.set('key', bytes('early'))
    await rejects(store.get('never', { timeoutMs: 200 }), 'ERR_TIMEOUT', /nothing listened there within 200 ms/)
    const server = kept(await serveStore({ address, port, secret }))
    await set
    assert.equal(Buffer.from(await store.get('key')).toString(), 'early')
    // The get that had been given up never reached the store: a set wakes nobody.
    await store.set('never', bytes('x'))
    assert.equal(server.dropped, 0)
  })

  it('answers while the event loop of its process is blocked', async () => {
    const server = await serve()
    const program = `
      import { connectStore } from ${JSON.stringify(new URL('../../collectives/index.js', import.meta.url).href)}
      const secret = Buffer.from(process.env.SECRET, 'hex')
      const store = connectStore({ address: '${address}', port: ${server.port}, secret, timeoutMs: ${timeoutMs} })
      await store.set('key', Buffer.from('value'))
      process.stdout.write(Buffer.from(await store.get('key')).toString())
      await store.close()`
    // Blocks this process until the other has ended.
    const other = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
      env: { ...process.env, SECRET: secret.toString('hex') },
      encoding: 'utf8',
      timeout: 30_000,
    })
    assert.equal(other.stdout, 'value', other.stderr)
    assert.equal(other.status, 0)
  })

  it('is reached over IPv6', async function () {
    const hasIpv6 = readFileSync('/proc/net/if_inet6', 'utf8').includes('00000000000000000000000000000001')
    if (!hasIpv6) this.skip() // a machine without it has no ::1
    const server = await serve({ secret }, '::1')
    const store = client(server)
    await store.set('key', bytes('six'))
    assert.equal(Buffer.from(await store.get('key')).toString(), 'six')
  })

  it('listens on the given address alone', async () => {
    const listening = (port: number): string[] =>
      ['tcp', 'tcp6']
        .flatMap((family) => readFileSync(`/proc/net/${family}`, 'utf8').split('\n'))
        .map((line) => line.trim().split(/\s+/))
        .filter((fields) => fields[3] === '0A' && Number.parseInt(fields[1]?.split(':')[1] ?? '', 16) === port)
        .map((fields) => fields[1]?.split(':')[0] ?? '')
    const server = await serve()
    assert.deepEqual(listening(server.port), ['0100007F'])
    assert.deepEqual(listening((await serve({ secret }, '0.0.0.0')).port), ['00000000'])
    for (const wrong of ['*', '', 'lo', 'localhost', '127.0.0.1:1', '127.0.0.1;127.0.0.1'])
      await rejects(
        serveStore({ address: wrong, port: 0, secret }),
        'ERR_INVALID_ARGUMENT',
        /expected is an IP address/,
      )
    for (const wrong of ['*', '', '127.0.0.1:1', 'a;b', 'a/b', '-a'])
      assert.throws(() => connectStore({ address: wrong, port: 1, timeoutMs, secret }), {
        code: 'ERR_INVALID_ARGUMENT',
      })
    await rejects(serveStore({ address, port: 65536, secret }), 'ERR_INVALID_ARGUMENT', /port/)
    await rejects(serveStore({ address, port: server.port, secret }), 'ERR_IO', /already in use/)
    // Of a range for documentation.
    await rejects(serveStore({ address: '203.0.113.1', port: 0, secret }), 'ERR_IO', /./)
  })

  it('is never without encryption unless that is said by name', async () => {
    for (const access of [
      {},
      { secret: undefined },
      { encryption: 'curve' },
      { secret: new Uint8Array(31) },
      { secret: 'x' },
    ]) {
      const given = access as unknown as StoreAccess
      await rejects(serveStore({ address, port: 0, ...given }), 'ERR_INVALID_ARGUMENT', /secret/)
      assert.throws(() => connectStore({ address, port: 1, timeoutMs, ...given }), { code: 'ERR_INVALID_ARGUMENT' })
    }
  })

  describe('lets nobody in', () => {
    for (const [name, theirs, ours] of [
      ['with another secret', { secret: randomBytes(32) }, { secret }],
      ['without encryption', { encryption: 'none' }, { secret }],
      ['with encryption, where it has none', { secret }, { encryption: 'none' }],
    ] as const) {
      it(name, async () => {
        const server = await serve(ours)
        const begin = performance.now()
        const stranger = client(server, theirs)
        await rejects(stranger.set('key', bytes('x')), 'ERR_MISMATCH', /refused this process/)
        assert.ok(performance.now() - begin < timeoutMs / 2, 'long before the deadline')
        await rejects(stranger.get('key'), 'ERR_MISMATCH', /refused this process/)
        const store = client(server, ours)
        await rejects(store.get('key', { timeoutMs: 200 }), 'ERR_TIMEOUT', /nobody set key/)
        assert.equal(server.dropped, 0)
      })
    }

    // Whoever knows the public key of the server passes CURVE itself; the handler of its context asks further.
    for (const [name, keys] of [
      ['who has a key of his own', curveKeyPair()],
      ["who has only the server's public key and no name", deriveKeys(randomBytes(32), 'store client')],
      ["who has the server's own key", deriveKeys(secret, 'store server')],
    ] as const) {
      it(name, async () => {
        const server = await serve()
        const stranger = new Dealer({
          linger: 0,
          curveServerKey: deriveKeys(secret, 'store server').publicKey,
          curvePublicKey: keys.publicKey,
          curveSecretKey: keys.secretKey,
        })
        try {
          const denied = new Promise((resolve) => {
            stranger.events.on('handshake:error:auth', resolve)
          })
          stranger.connect(`tcp://${address}:${server.port}`)
          await stranger.send([Buffer.from([1, 0, 0, 0, 1]), 'key', 'x'])
          await denied
          const store = client(server)
          await rejects(store.get('key', { timeoutMs: 200 }), 'ERR_TIMEOUT', /nobody set key/)
        } finally {
          stranger.close()
        }
      })
    }
  })

  it('says what is wrong at the other end when nothing answers', async () => {
    const silent = createServer(() => undefined).listen(0, address)
    await once(silent, 'listening')
    const { port } = silent.address() as AddressInfo
    try {
      const store = kept(connectStore({ address, port, secret, timeoutMs: 300 }))
      await rejects(store.get('key'), 'ERR_TIMEOUT', /did not answer as a store does within 300 ms/)
      await store.close()
    } finally {
      silent.close()
    }
  })

  it('tells its clients when it ends', async () => {
    const server = await serve()
    const store = client(server)
    await store.set('key', bytes('value'))
    const waiting = rejects(store.get('never'), 'ERR_PEER_LOST', /ended, or the connection to it was lost/)
    await server.close()
    await waiting
    await rejects(store.get('key'), 'ERR_PEER_LOST', /./)
    await store.close()
    await rejects(store.get('key'), 'ERR_PEER_LOST', /./)
  })

  it('closes twice, at any time, and nothing stays', async () => {
    const descriptors = (): number => readdirSync('/proc/self/fd').length
    const round = async (): Promise<void> => {
      const server = await serve()
      const store = client(server)
      const pending = rejects(store.get('never'), 'ERR_CLOSED', /closed/)
      const nowhere = client({ ...server, port: 9, dropped: 0 })
      const unsent = Promise.all(
        Array.from({ length: 2000 }, async (_, i) => rejects(nowhere.set(`${i}`, bytes('x')), 'ERR_CLOSED', /closed/)),
      )
      await Promise.all([store.close(), store.close(), nowhere.close()])
      await Promise.all([pending, unsent])
      await rejects(store.set('key', bytes('x')), 'ERR_CLOSED', /closed/)
      await Promise.all([server.close(), server.close()])
      await server.close()
      await rejects(once(connect(server.port, address), 'connect'), 'ECONNREFUSED', /./)
    }
    const warnings: Error[] = []
    const warn = (warning: Error): number => warnings.push(warning)
    process.on('warning', warn)
    await round() // what is opened once and stays: the context of clients
    const most = descriptors() + 3 * contextDescriptors
    for (let i = 0; i < 3; i++) await round()
    // libzmq closes what was closed in a thread of its own.
    for (let wait = 0; descriptors() > most && wait < 100; wait++) await pause(50)
    assert.ok(descriptors() <= most, `${descriptors()} descriptors, at most ${most} are known of`)
    const many = await Promise.all(Array.from({ length: 12 }, async () => serve()))
    await Promise.all(many.map(async (server) => server.close()))
    await pause(0)
    process.off('warning', warn)
    assert.deepEqual(warnings, [])
  })

  it('lets its process end by itself, and by process.exit with its code', () => {
    const module = JSON.stringify(new URL('../../collectives/index.js', import.meta.url).href)
    for (const [end, code] of [
      ['', 0],
      ['process.exit(7)', 7],
    ] as const) {
      const program = `
        import { connectStore, serveStore } from ${module}
        const server = await serveStore({ address: '${address}', port: 0, encryption: 'none' })
        const store = connectStore({ address: '${address}', port: server.port, encryption: 'none', timeoutMs: 5000 })
        await store.set('key', Buffer.from('value'))
        await store.close()
        ${end}`
      const ended = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
        encoding: 'utf8',
        timeout: 20_000,
      })
      assert.equal(ended.status, code, `${String(ended.signal)} ${ended.stderr}`)
    }
  })

  describe('drops and counts what is no request', () => {
    // By the definition in storeProtocol.ts, written once more.
    function isRequest(frames: readonly Buffer[]): boolean {
      const [head, key, value] = frames
      if (frames.length !== 3 || head === undefined || key === undefined || value === undefined) return false
      const op = head[4] ?? 0
      return head.length === 5 && op >= 1 && op <= 5 && key.length >= 1 && key.length <= 256 && value.length <= 65536
    }

    function randomFrom(seed: number): (below: number) => number {
      let state = seed
      return (below) => {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0
        return Math.floor((state / 2 ** 32) * below)
      }
    }

    /** Mostly close to a request: what is far from one ends at the first check. */
    function frame(random: (below: number) => number): Buffer[] {
      const fill = (length: number): Buffer => Buffer.from(Array.from({ length }, () => random(256)))
      const head = fill(random(8) === 0 ? random(9) : 5)
      if (random(8) > 0 && head.length > 4) head[4] = random(7)
      const key = fill(random(10) === 0 ? random(300) : 1 + random(2))
      const value = random(50) === 0 ? Buffer.alloc(random(66_000), random(256)) : fill(random(20))
      const frames = [head, key, value]
      if (random(8) === 0) frames.length = random(3)
      while (random(8) === 0) frames.push(fill(random(4)))
      return frames.length === 0 ? [fill(3)] : frames
    }

    for (const [name, access] of [
      ['encrypted', { secret }],
      ['not encrypted', { encryption: 'none' }],
    ] as const) {
      const count = rounds({ quick: 3000, long: 1_000_000 })
      it(`${count} random messages (${name})`, async function () {
        if (isLong) this.timeout(1_200_000)
        const server = await serve(access)
        const honest = client(server, access)
        await honest.set('a long key that no random one is', bytes('value'))
        const hostile = new Dealer({
          linger: 0,
          sendHighWaterMark: 100,
          ...(access.encryption === 'none'
            ? {}
            : {
                curveServerKey: deriveKeys(secret, 'store server').publicKey,
                curvePublicKey: deriveKeys(secret, 'store client').publicKey,
                curveSecretKey: deriveKeys(secret, 'store client').secretKey,
              }),
        })
        // Answers are thrown away, as they come.
        const reader = (async (): Promise<void> => {
          for await (const _answer of hostile);
        })().catch(() => undefined)
        const seed = 20_260_101
        const random = randomFrom(seed)
        let expected = 0
        try {
          hostile.connect(`tcp://${address}:${server.port}`)
          for (let i = 0; i < count; i++) {
            const frames = frame(random)
            if (!isRequest(frames)) expected++
            await hostile.send(frames)
          }
          for (let wait = 0; server.dropped < expected && wait < 600; wait++) await pause(50)
          await pause(50)
          assert.equal(server.dropped, expected, `seed ${seed}`)
          assert.ok(expected > count / 10 && expected < (9 * count) / 10, 'both kinds')
          assert.equal(Buffer.from(await honest.get('a long key that no random one is')).toString(), 'value')
          await honest.set('still', bytes('here'))
        } finally {
          hostile.close()
          await reader
        }
      })
    }

    it('messages beyond the largest, bytes that are not ZeroMQ, connections that say nothing', async () => {
      const server = await serve({ encryption: 'none' })
      const honest = client(server, { encryption: 'none' })
      await honest.set('key', bytes('value'))
      const hostile = new Dealer({ linger: 0, reconnectInterval: -1 })
      const thrown = new Promise((resolve) => hostile.events.on('disconnect', resolve))
      hostile.connect(`tcp://${address}:${server.port}`)
      await hostile.send([Buffer.from([1, 0, 0, 0, 1]), 'large', Buffer.alloc(1 << 20)])
      await thrown
      hostile.close()
      const random = randomFrom(7)
      const greeting = Buffer.alloc(64)
      greeting.set([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1])
      greeting.write('NULL', 12)
      for (let i = 0; i < 60; i++) {
        const socket = connect(server.port, address)
        socket.on('error', () => undefined)
        await once(socket, 'connect')
        const noise = Buffer.from(Array.from({ length: random(2000) }, () => random(256)))
        // A frame that claims 2^63 bytes, after a proper greeting.
        const bomb = Buffer.concat([greeting, Buffer.from([2, 0x7f, 255, 255, 255, 255, 255, 255, 255]), noise])
        if (i % 3 > 0) socket.write(i % 3 === 1 ? noise : bomb)
        setTimeout(() => socket.destroy(), random(100))
      }
      assert.equal(Buffer.from(await honest.get('key')).toString(), 'value')
      await honest.set('still', bytes('here'))
      await rejects(honest.get('large', { timeoutMs: 200 }), 'ERR_TIMEOUT', /nobody set large/)
    })

    it('values beyond what it stores, with ERR_NO_MEMORY, and takes others when some are deleted', async function () {
      this.timeout(120_000)
      const server = await serve({ encryption: 'none' })
      const store = client(server, { encryption: 'none' })
      const value = new Uint8Array(64 << 10)
      for (let i = 0; i < 4096; i += 64)
        await Promise.all(Array.from({ length: 64 }, async (_, j) => store.set(`${i + j}`, value)))
      await rejects(store.set('more', value), 'ERR_NO_MEMORY', /is full: it did not take more/)
      await store.set('0', value)
      await store.delete('1')
      await store.set('more', value)
    })
  })
})
