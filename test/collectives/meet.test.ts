// How ranks on several nodes learn of each other: cards in a store, who is on which node, and which address a rank listens on.

import assert from 'node:assert/strict'
import { hostname } from 'node:os'
import { Packr } from 'msgpackr'
import { connectStore, serveStore, type Store, type StoreServer } from '../../collectives/index.js'
import { chooseAddress, localAddresses, selectAddress } from '../../collectives/interfaces.js'
import { meet, nodeIdentity, nodesOf, parseCard, type Card } from '../../collectives/meet.js'

interface Failure extends Error {
  readonly code?: string
  readonly peer?: number
  readonly mine?: string
  readonly theirs?: string
  readonly lateRanks?: readonly number[]
  readonly variables?: readonly string[]
}

async function failureOf(work: Promise<unknown>): Promise<Failure> {
  const error: unknown = await work.then(
    () => assert.fail('an error is expected'),
    (reason: unknown) => reason,
  )
  assert.ok(error instanceof Error)
  return error
}

describe('ranks that meet in a store', function () {
  this.timeout(60_000)
  const address = '127.0.0.1'
  let server: StoreServer
  let groups = 0
  const stores: Store[] = []
  before(async () => (server = await serveStore({ address, port: 0, encryption: 'none' })))
  after(async () => server.close())
  afterEach(async () => {
    await Promise.all(stores.splice(0).map(async (store) => store.close()))
  })

  const store = (): Store => {
    const made = connectStore({ address, port: server.port, encryption: 'none', timeoutMs: 30_000 })
    stores.push(made)
    return made
  }
  type Own = Omit<Card, 'host' | 'pid'>
  const own = (rank: number, worldSize: number, changes: Partial<Own> = {}): Own => ({
    rank,
    worldSize,
    version: '1.0.0',
    terms: 'slots of 64',
    node: `node ${rank % 2}`,
    endpoint: `tcp://127.0.0.1:${1000 + rank}`,
    publicKey: '',
    tuned: '',
    ...changes,
  })

  it('get the cards of all, in whatever order they come', async () => {
    const prefix = `group/${groups++}`
    const met = await Promise.all(
      [2, 0, 3, 1].map(async (rank, i) => {
        await new Promise((resolve) => setTimeout(resolve, 30 * i))
        return meet(store(), prefix, own(rank, 4), 30_000)
      }),
    )
    for (const cards of met) {
      assert.deepEqual(
        cards,
        [0, 1, 2, 3].map((rank) => ({ ...own(rank, 4), host: hostname(), pid: process.pid })),
      )
      assert.deepEqual(nodesOf(cards), [
        [0, 2],
        [1, 3],
      ])
    }
  })

  for (const [field, value] of [
    ['version', '1.0.1'],
    ['terms', 'slots of 128'],
    ['worldSize', 4],
  ] as const) {
    it(`that were started with another ${field} see both sides, long before the deadline`, async () => {
      const prefix = `group/${groups++}`
      const begin = performance.now()
      // Rank 2 never comes.
      const [a, b] = await Promise.all([
        failureOf(meet(store(), prefix, own(0, 3), 30_000)),
        failureOf(meet(store(), prefix, own(1, 3, { [field]: value }), 30_000)),
      ])
      assert.ok(performance.now() - begin < 15_000)
      const expected = String(own(0, 3)[field])
      for (const [error, mine, theirs, peer] of [
        [a, expected, String(value), 1],
        [b, String(value), expected, 0],
      ] as const) {
        assert.equal(error.code, 'ERR_MISMATCH', error.message)
        assert.deepEqual([error.mine, error.theirs, error.peer], [mine, theirs, peer])
        assert.ok(error.message.includes(`rank 0 (pid ${process.pid} on ${hostname()})`), error.message)
        assert.ok(error.message.includes(`rank 1 (pid ${process.pid} on ${hostname()})`), error.message)
      }
    })
  }

  it('are late by name', async () => {
    const prefix = `group/${groups++}`
    for (const error of await Promise.all([
      failureOf(meet(store(), prefix, own(0, 4), 500)),
      failureOf(meet(store(), prefix, own(2, 4), 500)),
    ])) {
      assert.equal(error.code, 'ERR_TIMEOUT')
      assert.deepEqual(error.lateRanks, [1, 3])
      assert.match(error.message, /rank 1, 3 of 4/)
    }
  })

  it('cannot be two of the same number', async () => {
    const prefix = `group/${groups++}`
    const first = failureOf(meet(store(), prefix, own(0, 2), 1000))
    await store().get(`${prefix}/rank/0`)
    const error = await failureOf(meet(store(), prefix, own(0, 2), 1000))
    assert.equal(error.code, 'ERR_MISMATCH')
    const claim = `pid ${process.pid} on ${hostname()}`
    assert.ok(error.message.includes(`rank 0 of this job: ${claim} and ${claim}`), error.message)
    assert.deepEqual((await first).lateRanks, [1])
  })

  it('take nothing for a card that is none', async () => {
    const packr = new Packr({ useRecords: false })
    const card = { ...own(1, 2), host: 'host', pid: 5 }
    assert.deepEqual(parseCard(packr.pack({ ...card, more: 1 }), 1), card)
    assert.ok(parseCard(packr.pack({ ...card, endpoint: 'tcp://[fd00::1]:5' }), 1))
    const wrong: unknown[] = [
      null,
      7,
      'text',
      [],
      [card],
      ...Object.keys(card).map((key) => ({ ...card, [key]: undefined })),
      { ...card, rank: 0 },
      { ...card, worldSize: 0 },
      { ...card, pid: -1 },
      { ...card, pid: 1.5 },
      { ...card, terms: 5 },
      { ...card, endpoint: 'tcp://*:5' },
      { ...card, endpoint: 'ipc:///tmp/x' },
      { ...card, endpoint: 'tcp://10.0.0.1;10.0.0.2:5' },
      { ...card, endpoint: 'tcp://host:5' },
      { ...card, publicKey: 'short' },
      { ...card, publicKey: '~'.repeat(40) },
    ]
    const bytes = [
      ...wrong.map((value) => packr.pack(value)),
      Buffer.alloc(0),
      packr.pack(card).subarray(0, -3),
      Buffer.alloc(60_000, 0x91), // lists in lists
      Buffer.from([0xdf, 0xff, 0xff, 0xff, 0xff]), // a map of 2^32 entries
    ]
    for (const [i, each] of bytes.entries())
      assert.throws(() => parseCard(each, 1), { code: 'ERR_MISMATCH' }, `case ${i}`)
    const prefix = `group/${groups++}`
    await store().set(`${prefix}/rank/1`, Buffer.from('nonsense'))
    const error = await failureOf(meet(store(), prefix, own(0, 2), 30_000))
    assert.equal(error.code, 'ERR_MISMATCH')
    assert.equal(error.peer, 1)
    assert.match(error.message, /rank 1 is no card/)
  })

  it('are on the nodes that they say, in the order of their lowest ranks', () => {
    const cards = ['b', 'a', 'b', 'c', 'a', 'b'].map((node, rank) => ({ rank, node }))
    const nodes = [[0, 2, 5], [1, 4], [3]]
    assert.deepEqual(nodesOf(cards), nodes)
    assert.deepEqual(nodesOf([...cards].reverse()), nodes)
    assert.deepEqual(nodesOf([]), [])
  })

  it('are on one node in all processes of it, unless TILERANK_NODE says otherwise', () => {
    const node = nodeIdentity({})
    assert.match(node, /^[0-9a-f]{32}$/)
    assert.equal(nodeIdentity({ RANK: '1' }), node)
    assert.notEqual(nodeIdentity({ TILERANK_NODE: 'a' }), node)
    assert.notEqual(nodeIdentity({ TILERANK_NODE: 'a' }), nodeIdentity({ TILERANK_NODE: 'b' }))
  })
})

describe('the address that a rank listens on', () => {
  const machine = [
    { interface: 'lo', address: '127.0.0.1' },
    { interface: 'lo', address: '::1' },
    { interface: 'eth0', address: '10.1.2.3' },
    { interface: 'eth0', address: 'fd00:1::3' },
    { interface: 'eth1', address: '10.2.2.3' },
    { interface: 'ib0', address: '192.168.7.3' },
    { interface: 'ib0', address: '192.168.8.3' },
    { interface: 'six', address: 'fd00:6::3' },
  ]

  it('is named by interface, address or network', () => {
    for (const [selector, address] of [
      ['eth0', '10.1.2.3'],
      ['six', 'fd00:6::3'],
      ['10.2.2.3', '10.2.2.3'],
      ['::1', '::1'],
      ['10.1.0.0/16', '10.1.2.3'],
      ['10.1.2.3/32', '10.1.2.3'],
      ['192.168.8.0/24', '192.168.8.3'],
      ['fd00:1::/32', 'fd00:1::3'],
    ] as const)
      assert.equal(selectAddress(selector, machine).address, address, selector)
  })

  it('is an error where several fit, or none, with all that there are', () => {
    for (const [selector, pattern] of [
      ['ib0', /several addresses fit the interface 'ib0': ib0 192\.168\.7\.3, ib0 192\.168\.8\.3/],
      ['10.0.0.0/8', /several.*eth0 10\.1\.2\.3, eth1 10\.2\.2\.3/],
      ['0.0.0.0/0', /several.*lo 127\.0\.0\.1, eth0 10\.1\.2\.3/],
      ['eth9', /no address.*'eth9'.*lo 127\.0\.0\.1.*eth0 fd00:1::3.*ib0 192\.168\.8\.3/],
      ['172.16.0.0/12', /no address/],
      ['0.0.0.0', /no address/],
      ['*', /no address/],
      ['10.1.0.0/33', /no network/],
      ['10.1.0.0/', /no network/],
      ['eth0/24', /no network/],
      ['fd00::/129', /no network/],
    ] as const) {
      assert.throws(
        () => selectAddress(selector, machine),
        (error: Failure) => {
          assert.equal(error.code, 'ERR_ENVIRONMENT')
          assert.deepEqual(error.variables, ['TILERANK_INTERFACE'])
          assert.match(error.message, pattern)
          return true
        },
        selector,
      )
    }
  })

  it('is the one from which the way to the others goes, where none is named', async () => {
    assert.equal((await chooseAddress(undefined, '127.0.0.1')).address, '127.0.0.1')
    assert.deepEqual(await chooseAddress('', '127.0.0.9'), { interface: 'lo', address: '127.0.0.1' })
    // To an address of this machine itself, whichever it has.
    for (const local of localAddresses()) {
      const chosen = await chooseAddress(undefined, local.address)
      assert.equal(chosen.address, local.address)
    }
    assert.equal((await chooseAddress('lo', '127.0.0.1')).address, '127.0.0.1')
  })
})
