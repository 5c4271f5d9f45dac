// Ranks that another launcher started, really: mpirun of Open MPI and of MPICH.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Ended, node, run, start, type Started, tpLaunch } from '../launcher/processes.js'
import { unavailable } from '../unavailable.js'

const collectives = new URL('../../collectives/index.js', import.meta.url)

/** Joins, says so, waits for the file argv[3], and adds argv[2] over all ranks, many times. */
const program = `
import { existsSync } from 'node:fs'
import { createGroup, readRankEnvironment } from ${JSON.stringify(collectives.href)}
const [, , value = '1', go] = process.argv
try {
  const group = await createGroup({ timeoutMs: 20_000 })
  process.stdout.write('joined\\n')
  for (const end = Date.now() + 20_000; go !== undefined && !existsSync(go) && Date.now() < end; )
    await new Promise((resolve) => setTimeout(resolve, 10))
  const sums = new Set()
  for (let i = 0; i < 100; i++) sums.add((await group.allReduce(new Float64Array([Number(value)])))[0])
  process.stdout.write('rank ' + group.rank + ' of ' + group.worldSize + ' by ' + readRankEnvironment()?.source + ': ' + [...sums] + '\\n')
  await group.close()
} catch (error) {
  process.stdout.write(error.code + ' ' + error.variables + '\\n')
  process.exitCode = 1
}`

const linesOf = ({ stdout }: Ended): string[] =>
  stdout
    .trim()
    .split('\n')
    .filter((line) => line !== 'joined')
    .sort()

const ranks = (source: string, sum: number): string[] =>
  [0, 1, 2].map((rank) => `rank ${rank} of 3 by ${source}: ${sum}`)

const exists = (command: string): boolean => spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0

const openmpi = ['mpirun.openmpi', '--allow-run-as-root', '--oversubscribe']
const mpich = ['mpiexec.mpich']

for (const [name, [command = '', ...options], source, packageName] of [
  ['Open MPI', openmpi, 'openmpi', 'openmpi-bin'],
  ['MPICH', mpich, 'pmi', 'mpich'],
] as const) {
  describe(`ranks that ${name} starts`, () => {
    const directory = mkdtempSync(join(tmpdir(), 'tilerank-launchers-'))
    const app = join(directory, 'app.mjs')
    const jobs: Started[] = []
    const begin = (...args: readonly string[]): Started => {
      const job = start(command, [...options, '-n', '3', ...args], { cwd: directory })
      jobs.push(job)
      return job
    }

    before(function () {
      if (!exists(command)) unavailable(this, `no ${command}: install ${packageName}`)
      writeFileSync(app, program)
      writeFileSync(
        join(directory, 'package.json'),
        JSON.stringify({ scripts: { app: `"${node}" app.mjs 2 && true` } }),
      )
    })
    after(() => {
      for (const { child } of jobs) if (child.exitCode === null) child.kill('SIGKILL')
      rmSync(directory, { recursive: true })
    })

    it('find each other', async () => {
      const ended = await begin(node, app, '2').ended
      assert.deepEqual(linesOf(ended), ranks(source, 6), ended.stderr)
      assert.equal(ended.code, 0)
    })

    it('find each other behind a shell and behind npm', async () => {
      const shell = await begin('bash', '-c', `"${node}" app.mjs 2; exit $?`).ended
      assert.deepEqual(linesOf(shell), ranks(source, 6), shell.stderr)
      const npm = await begin('npm', 'run', '--silent', 'app').ended
      assert.deepEqual(linesOf(npm), ranks(source, 6), npm.stderr)
    })

    it('do not meet those of a job beside them', async () => {
      const go = join(directory, 'go')
      const both = [begin(node, app, '2', go), begin(node, app, '10', go)]
      await Promise.all(both.map(({ saw }) => saw(/(joined\n){3}/)))
      writeFileSync(go, '')
      const [first, second] = await Promise.all(both.map(({ ended }) => ended))
      assert.ok(first && second)
      assert.deepEqual(linesOf(first), ranks(source, 6), first.stderr)
      assert.deepEqual(linesOf(second), ranks(source, 30), second.stderr)
    })

    it('may be launchers themselves: tp-launch counts its own', async () => {
      const ended = await run(
        command,
        [...options, '-n', '1', node, tpLaunch, '-n', '3', '--oversubscribe', app, '2'],
        { cwd: directory },
      )
      assert.deepEqual(linesOf(ended), ranks('tp-launch', 6), ended.stderr)
    })
  })
}

describe('ranks that an MPI starts within a job of another', () => {
  it('are refused: the variables of both are there', async function () {
    for (const command of [openmpi, mpich])
      if (!exists(command[0] ?? '')) unavailable(this, `no ${command[0] ?? ''}: install openmpi-bin and mpich`)
    const directory = mkdtempSync(join(tmpdir(), 'tilerank-launchers-'))
    try {
      const app = join(directory, 'app.mjs')
      writeFileSync(app, program)
      for (const [outer, inner] of [
        [openmpi, mpich],
        [mpich, openmpi],
      ] as const) {
        const [command = '', ...options] = outer
        const ended = await run(command, [...options, '-n', '1', ...inner, '-n', '2', node, app])
        // The first to say so may end the others before they have begun.
        assert.match(ended.stdout, /^ERR_ENVIRONMENT OMPI_COMM_WORLD_SIZE,PMI_SIZE$/m, ended.stderr)
        assert.doesNotMatch(ended.stdout, /joined/)
      }
    } finally {
      rmSync(directory, { recursive: true })
    }
  })
})
