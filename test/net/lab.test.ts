import assert from 'node:assert/strict'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { hostname, networkInterfaces } from 'node:os'
import process from 'node:process'
import { fileURLToPath } from 'node:url'
import { node, pause, start, survivors } from '../launcher/processes.js'
import { ranksValues } from '../ranks.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle, type Lab, type LabNode } from '../../bench/lab.js'

/** Prints its port, and sends back what it gets. */
const echoServer = `
const server = require('node:net').createServer((socket) => socket.on('error', () => undefined).pipe(socket))
server.listen(0, process.argv[1], () => console.log('port ' + server.address().port))`

/** Connects, prints "connected", sends what stands on its standard input, and prints what comes back. */
const echoClient = `
const socket = require('node:net').connect(Number(process.argv[2]), process.argv[1], () => console.log('connected'))
process.stdin.pipe(socket)
socket.pipe(process.stdout)`

/** Sends argv[3] bytes through the echo and prints how many milliseconds it took until all had come back. */
const timedClient = `
const nbytes = Number(process.argv[3])
const socket = require('node:net').connect(Number(process.argv[2]), process.argv[1])
const start = performance.now()
let got = 0
socket.on('data', (data) => {
  got += data.length
  if (got < nbytes) return
  console.log('ms ' + (performance.now() - start))
  process.exit(0)
})
socket.write(Buffer.alloc(nbytes))`

/** A child whose output can be waited for. */
function listen(child: ChildProcess): {
  readonly text: () => string
  readonly saw: (pattern: RegExp) => Promise<string>
} {
  let text = ''
  const closed = once(child, 'close')
  child.stdout?.setEncoding('utf8').on('data', (data: string) => (text += data))
  const saw = async (pattern: RegExp): Promise<string> => {
    for (;;) {
      const found = pattern.exec(text)
      if (found !== null) return found[1] ?? found[0]
      const isClosed = await Promise.race([closed.then(() => true), pause(10)])
      if (isClosed === true && !pattern.test(text)) throw new Error(`ended without ${String(pattern)}: ${text}`)
    }
  }
  return { text: () => text, saw }
}

async function startEcho(place: LabNode): Promise<string> {
  return await listen(place.run(node, ['-e', echoServer, place.address])).saw(/port (\d+)/)
}

const output = async (place: LabNode, script: string): Promise<string> => {
  const child = place.run('sh', ['-c', script])
  let text = ''
  child.stdout?.setEncoding('utf8').on('data', (data: string) => (text += data))
  await once(child, 'close')
  return text.trim()
}

const hostView = (): readonly unknown[] => [
  readFileSync('/proc/self/mountinfo', 'utf8'),
  Object.keys(networkInterfaces()),
  hostname(),
]

describe('the lab: nodes on one machine', () => {
  let lab: Lab | undefined

  const create = async (...[options]: Parameters<typeof createLab>): Promise<readonly [LabNode, LabNode, Lab]> => {
    lab = await createLab(options)
    const [first, second] = lab.nodes
    assert(first !== undefined && second !== undefined)
    return [first, second, lab]
  }

  beforeEach(function () {
    const obstacle = labObstacle({ rateMbit: 1 })
    if (obstacle !== undefined) unavailable(this, obstacle)
  })

  afterEach(async () => {
    await lab?.close()
    lab = undefined
  })

  it('has nodes of their own host name, address, shared memory and abstract sockets, which find each other by name', async () => {
    const [, , { nodes, cidr }] = await create({ nodes: 3 })
    assert.equal(new Set(nodes.map(({ name }) => name)).size, 3)
    for (const place of nodes) {
      assert.equal(await output(place, 'cat /proc/sys/kernel/hostname'), place.name)
      assert.match(await output(place, 'ip -4 -brief address show dev eth0'), new RegExp(` ${place.address}/24`))
      assert.equal(place.address.split('.').slice(0, 3).join('.') + '.0/24', cidr)
      const lookUp = `for (const name of process.argv.slice(1))
        require('node:dns').lookup(name, (error, address) => console.log(error?.code ?? address))`
      const names = nodes.map(({ name }) => name)
      const found = await output(place, `"${node}" -e "${lookUp}" ${names.join(' ')}`)
      assert.deepEqual(found.split('\n').sort(), nodes.map(({ address }) => address).sort())
      assert.equal(await output(place, 'ls /dev/shm; grep -c @ /proc/net/unix; touch /dev/shm/mine'), '0')
    }
  })

  it('carries TCP between the nodes, and adds nothing to the host', async () => {
    const host = hostView()
    const [first, second] = await create()
    const client = second.run(node, ['-e', echoClient, first.name, await startEcho(first)])
    client.stdin?.write('over there\n')
    await listen(client).saw(/over there/)
    assert.deepEqual(hostView(), host)
  })

  it('runs a command as the child itself, bound, with a channel and the folder of the caller', async () => {
    const [, second] = await create()
    const script = `process.send([process.pid, process.cwd(), require('node:fs').readFileSync('/proc/self/status', 'utf8')
      .match(/Cpus_allowed_list:\\s*(.*)/)[1]])`
    const child = second.run(node, ['-e', script], { cores: [0], stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
    const [message] = (await once(child, 'message')) as [unknown]
    assert.deepEqual(message, [child.pid, process.cwd(), '0'])
  })

  it('has ranks in its nodes', async () => {
    const [first, second] = await create()
    const values = await ranksValues(new URL('./cases.js', import.meta.url), 'whereAmI', {
      worldSize: 3,
      on: (rank) => (rank < 2 ? first : second),
    })
    assert.deepEqual(values, [
      [first.name, '0', '2', first.address],
      [first.name, '1', '2', first.address],
      [second.name, '0', '1', first.address],
    ])
  })

  it('goes silent when a link is down, and on when it is up again', async () => {
    const [first, second, { linkDown, linkUp }] = await create()
    const client = second.run(node, ['-e', echoClient, first.address, await startEcho(first)])
    const heard = listen(client)
    client.stdin?.write('before\n')
    await heard.saw(/before/)
    await linkDown(0)
    client.stdin?.write('meanwhile\n')
    await pause(500)
    assert.doesNotMatch(heard.text(), /meanwhile/)
    assert.equal(client.exitCode, null)
    await linkUp(0)
    await heard.saw(/meanwhile/) // sent again by TCP
    await assert.rejects(linkDown(2), /no node 2/)
  })

  it('limits the rate of a link', async () => {
    const [first, second] = await create({ rateMbit: 10 })
    const nbytes = 1_000_000
    const client = second.run(node, ['-e', timedClient, first.address, await startEcho(first), String(nbytes)])
    const ms = Number(await listen(client).saw(/ms (\S+)\n/))
    // What the two buckets on the way hold may pass at once.
    assert(ms > ((nbytes - 2 * 128 * 1024) * 8) / 10e3, `1 MB took ${ms} ms over 10 Mbit/s`)
  })

  it('leaves nothing behind: no process, no mount, no interface', async () => {
    const host = hostView()
    const [first, , { close }] = await create({ nodes: 4 })
    const child = first.run('sh', [
      '-c',
      'setsid sleep 1000 & setsid sleep 1000 & echo "pids $! $$"; trap "" TERM; wait',
    ])
    const inside = (await listen(child).saw(/pids (.*)\n/)).split(' ').map(Number)
    const keepers = [...(lab?.nodes ?? [])].map(({ prefix }) => Number(/--target=(\d+)/.exec(prefix.join(' '))?.[1]))
    assert.deepEqual(await survivors(inside, 0), inside)
    await close()
    await close()
    assert.deepEqual(await survivors([...inside, ...keepers], 0), [])
    assert.deepEqual(hostView(), host)
    assert.throws(() => first.run('true'), /is closed/)
  })

  it('leaves nothing behind either when its maker is killed', async () => {
    const maker = start(node, [
      '--input-type=module',
      '-e',
      `import { createLab } from ${JSON.stringify(fileURLToPath(new URL('../../bench/lab.js', import.meta.url)))}
      const lab = await createLab()
      lab.nodes[1].run('sh', ['-c', 'setsid sleep 1000 & echo "pids $! $$"; wait'], { stdio: ['ignore', 'inherit', 'inherit'] })
      console.log('keepers', ...lab.nodes.map(({ prefix }) => /--target=(\\d+)/.exec(prefix.join(' '))[1]))`,
    ])
    const pids = [(await maker.saw(/pids (.*)\n/))[1], (await maker.saw(/keepers (.*)\n/))[1]]
      .flatMap((list = '') => list.split(' '))
      .map(Number)
    assert.equal(pids.length, 4)
    assert.deepEqual(await survivors(pids, 0), pids)
    maker.child.kill('SIGKILL')
    assert.deepEqual(await survivors(pids, 20_000), [])
  })

  it('refuses one node and five', async () => {
    for (const nodes of [1, 5, 2.5]) await assert.rejects(createLab({ nodes }), /a lab has 2 to 4/)
  })
})
