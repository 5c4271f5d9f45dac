// spawnRanks as the engine uses it: channels, first failures, and nobody left whatever the parent does.

import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { LauncherError, type RankSet, createNonce, spawnRanks } from '../../launcher/index.js'
import { isAlive, node, start, survivors } from './processes.js'

const face = new URL('../../launcher/index.js', import.meta.url).href

describe('launcher: spawnRanks', () => {
  let folder = ''
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'tilerank-spawn-'))
  })
  after(() => {
    rmSync(folder, { recursive: true, force: true })
  })

  const script = (name: string, text: string): URL => {
    const path = join(folder, `${name}.mjs`)
    writeFileSync(path, text)
    return pathToFileURL(path)
  }
  const pidsOf = (ranks: RankSet): number[] => ranks.ranks.map(({ pid }) => pid)

  it('talks to ranks in typed arrays and survives close twice', async () => {
    const entry = script(
      'echo',
      `process.on('message', (m) => process.send({ rank: process.env.RANK, sum: m.reduce((a, b) => a + b, 0n), m }))`,
    )
    const ranks = await spawnRanks({ entry, worldSize: 2, cores: [[], []], ipc: true })
    const answers = await Promise.all(
      ranks.ranks.map(async ({ child }) => {
        child.send(new BigInt64Array([1n, 2n]))
        const [message] = (await once(child, 'message')) as [unknown]
        return message
      }),
    )
    assert.deepEqual(answers, [
      { rank: '0', sum: 3n, m: new BigInt64Array([1n, 2n]) },
      { rank: '1', sum: 3n, m: new BigInt64Array([1n, 2n]) },
    ])
    await Promise.all([ranks.close(), ranks.close()])
    await ranks.close()
    assert.equal(ranks.isAlive, false)
    assert.deepEqual(pidsOf(ranks).filter(isAlive), [])
  })

  it('says who failed first, before the others have ended', async () => {
    const entry = script(
      'fail',
      `process.on('SIGTERM', () => setTimeout(() => process.exit(5), 300)); if (process.env.RANK === '1') process.kill(process.pid, 'SIGKILL'); setInterval(() => {}, 1000)`,
    )
    const ranks = await spawnRanks({ entry, worldSize: 2, cores: [] })
    const failure = await ranks.failed
    assert.deepEqual(failure, { rank: 1, pid: ranks.ranks[1]?.pid, exitCode: null, signal: 'SIGKILL' })
    assert.deepEqual(await ranks.done, failure)
    assert.equal(ranks.exits.length, 2)
    assert.deepEqual(pidsOf(ranks).filter(isAlive), [])
  })

  it('has no failure when all ranks end in order', async () => {
    const ranks = await spawnRanks({ entry: 'true', worldSize: 3, cores: [] })
    assert.equal(await ranks.done, undefined)
    assert.deepEqual(
      ranks.exits.map(({ exitCode }) => exitCode),
      [0, 0, 0],
    )
  })

  it('binds and adds variables for single ranks', async () => {
    const ranks = await spawnRanks({
      entry: 'sh',
      args: ['-c', 'grep Cpus_allowed_list /proc/self/status; echo $EXTRA $TILERANK_CORES $OMP_NUM_THREADS'],
      worldSize: 1,
      cores: [[0]],
      stdout: 'pipe',
      rankEnv: (rank) => ({ EXTRA: `r${rank}` }),
    })
    let text = ''
    ranks.ranks[0]?.child.stdout?.setEncoding('utf8').on('data', (part: string) => (text += part))
    await ranks.done
    assert.equal(text, 'Cpus_allowed_list:\t0\nr0 0 1\n')
  })

  it('ends a rank that cannot be bound, with the reason', async () => {
    const ranks = await spawnRanks({ entry: 'true', worldSize: 1, cores: [[0, 9999]], stderr: 'pipe' })
    let text = ''
    ranks.ranks[0]?.child.stderr?.setEncoding('utf8').on('data', (part: string) => (text += part))
    const failure = await ranks.done
    assert.equal(failure?.exitCode, 125)
    assert.match(text, /not all processors were granted of '0,9999'/)
  })

  it('refuses what cannot be', async () => {
    const code = (expected: string) => (error: unknown) => error instanceof LauncherError && error.code === expected
    for (const worldSize of [0, -1, 1.5]) {
      await assert.rejects(spawnRanks({ entry: 'true', worldSize, cores: [] }), code('ERR_INVALID_OPTION'))
    }
    await assert.rejects(spawnRanks({ entry: 'true', worldSize: 2, cores: [[0]] }), code('ERR_INVALID_OPTION'))
    await assert.rejects(
      spawnRanks({ entry: 'true', worldSize: 1, cores: [], nonce: '../x' }),
      code('ERR_INVALID_OPTION'),
    )
    await assert.rejects(
      spawnRanks({ entry: 'true', worldSize: 1, cores: [], cwd: '/no/such/folder' }),
      code('ERR_SPAWN_FAILED'),
    )
  })

  it('refuses a second job under the same name while the first one lives', async () => {
    const nonce = createNonce()
    const entry = script('stay', 'setInterval(() => {}, 1000)')
    const first = await spawnRanks({ entry, worldSize: 1, cores: [], nonce })
    try {
      await assert.rejects(spawnRanks({ entry, worldSize: 1, cores: [], nonce }), (error: unknown) => {
        assert.ok(error instanceof LauncherError && error.code === 'ERR_SPAWN_FAILED')
        return true
      })
    } finally {
      await first.close()
    }
  })

  for (const [how, text, endsBy] of [
    ['exits', 'process.exit(0)', undefined],
    ['crashes', `setImmediate(() => { throw new Error('crash') })`, undefined],
    ['is killed', 'setInterval(() => {}, 1000)', 'SIGKILL'],
    ['is interrupted without a handler', 'setInterval(() => {}, 1000)', 'SIGINT'],
  ] as const) {
    it(`leaves no rank when the parent ${how}`, async () => {
      const rank = script('rank', 'setInterval(() => {}, 1000)')
      const parent = script(
        'parent',
        `import { spawnRanks } from ${JSON.stringify(face)}
         const ranks = await spawnRanks({ entry: new URL(${JSON.stringify(rank.href)}), worldSize: 3, cores: [], stdout: 'ignore', stderr: 'ignore', ipc: true })
         process.stdout.write(ranks.ranks.map(({ pid }) => pid).join(' ') + '\\n', () => { ${text} })`,
      )
      const started = start(node, [parent.pathname])
      const pids = (await started.saw(/^.*\n/))[0].trim().split(' ').map(Number)
      assert.equal(pids.length, 3)
      if (endsBy !== undefined) started.child.kill(endsBy)
      await started.ended
      assert.deepEqual(await survivors(pids, 2000), [])
    })
  }

  it('starts and ends a hundred jobs without leaving descriptors', async () => {
    const { readdirSync } = await import('node:fs')
    const descriptors = () => readdirSync('/proc/self/fd').length
    const job = async () =>
      (await spawnRanks({ entry: 'true', worldSize: 1, cores: [], stdout: 'ignore', stderr: 'ignore' })).done
    await job()
    const before = descriptors()
    for (let i = 0; i < 100; i++) assert.equal(await job(), undefined)
    assert.ok(descriptors() <= before + 1, `${descriptors()} descriptors after, ${before} before`)
  })
})
