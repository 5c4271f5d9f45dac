// The frame of `tilerank`: help, versions, exit codes, errors in one line.

import assert from 'node:assert/strict'
import { fileURLToPath } from 'node:url'
import { type Ended, node, run } from '../launcher/processes.js'

const main = fileURLToPath(new URL('../../cli/main.js', import.meta.url))
const tilerank = (args: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Ended> =>
  run(node, [main, ...args], { env })

describe('tilerank: the frame', () => {
  it('lists its commands and explains each', async () => {
    for (const args of [['--help'], ['help']]) {
      const { code, stdout } = await tilerank(args)
      assert.equal(code, 0)
      for (const name of ['generate', 'demo', 'plan', 'bench', 'simulate', 'tune', 'trace', 'doctor', 'build'])
        assert.match(stdout, new RegExp(`^ {2}${name}`, 'm'))
    }
    for (const args of [
      ['doctor', '--help'],
      ['help', 'doctor'],
    ]) {
      const { code, stdout } = await tilerank(args)
      assert.equal(code, 0)
      assert.match(stdout, /--json/)
    }
    assert.match((await tilerank(['--version'])).stdout, /^[0-9]+\.[0-9]+\.[0-9]+\n$/)
  })

  it('exits with 2 for wrong usage', async () => {
    for (const args of [
      [],
      ['no-such-command'],
      ['doctor', '--no-such-option'],
      ['--no-such-option'],
      ['generate', '--tp', 'two'],
    ]) {
      const { code, stdout, stderr } = await tilerank(args)
      assert.equal(code, 2, args.join(' '))
      assert.equal(stdout, '')
      assert.notEqual(stderr, '')
    }
  })

  it('prints an error as one line with its code, facts below, and the stack only when asked', async () => {
    const args = ['generate', '--model', '/no/such/model', '--prompt', 'x']
    const { code, stdout, stderr } = await tilerank(args)
    assert.equal(code, 1)
    assert.equal(stdout, '')
    const [first = '', ...facts] = stderr.trimEnd().split('\n')
    assert.match(first, /^tilerank: .*\/no\/such\/model.* \(ERR_MODEL_NOT_FOUND\)$/)
    for (const fact of facts) assert.match(fact, /^ {2}\w+: /)
    const debug = await tilerank(['--debug', ...args])
    assert.match(debug.stderr, /\n {4}at /)
  })

  it('stops in peace when its reader does', async () => {
    const { code, stdout } = await run('bash', [
      '-o',
      'pipefail',
      '-c',
      '"$@" | head -n 1',
      'bash',
      node,
      main,
      'doctor',
      '--json',
    ])
    assert.equal(code, 0)
    assert.equal(stdout, '{\n')
  })
})

describe('tilerank doctor', () => {
  it('shows the tier that runs and why others do not, in text and as data', async () => {
    const json = await tilerank(['doctor', '--json'])
    assert.equal(json.code, 0, json.stderr)
    const report = JSON.parse(json.stdout) as {
      tier: string
      tiers: { name: string; available: boolean; reason: string }[]
      topology: { allowedCpus: number[] }
    }
    assert.ok(report.tiers.some(({ name, available }) => name === 'scalar' && available))
    for (const { name, available, reason } of report.tiers) assert.ok(available || reason.length > 0, name)
    assert.equal(report.tier, report.tiers.find(({ available }) => available)?.name)
    assert.ok(report.topology.allowedCpus.length > 0)
    const text = await tilerank(['doctor'])
    assert.equal(text.code, 0)
    assert.match(text.stdout, new RegExp(`^tier +${report.tier}$`, 'm'))
    assert.match(text.stdout, /nothing is missing|warning: /)
  })

  it('respects the cap of TILERANK_ISA and refuses one that does not exist', async () => {
    const capped = await tilerank(['doctor', '--json'], { TILERANK_ISA: 'scalar' })
    assert.equal((JSON.parse(capped.stdout) as { tier: string }).tier, 'scalar')
    const wrong = await tilerank(['doctor'], { TILERANK_ISA: 'sse9' })
    assert.equal(wrong.code, 1)
    assert.match(wrong.stdout, /TILERANK_ISA=sse9/)
  })

  it('names a missing addon, every path tried, and the way out', async () => {
    const { code, stdout } = await tilerank(['doctor'], { TILERANK_ADDON: '/no/such/addon.node' })
    assert.equal(code, 1)
    assert.match(stdout, /missing: .*looked for \/no\/such\/addon.node/)
    assert.match(stdout, /to mend: run `npx tilerank build`/)
  })

  it('names an addon that cannot be loaded', async () => {
    const { code, stdout } = await tilerank(['doctor'], { TILERANK_ADDON: main })
    assert.equal(code, 1)
    assert.match(stdout, /missing: .*main\.js/)
  })
})
