// The package as its users get it: packed, installed into an empty project, built there, run there. Needs a compiler and CMake, as
// they do, and the registry for the dependencies.

import assert from 'node:assert/strict'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../../native/index.js'
import { type Ended, run } from '../launcher/processes.js'

// npm's own variables of this run would steer the inner one; the addon must be the installed one.
const env: NodeJS.ProcessEnv = Object.fromEntries(
  Object.keys(process.env)
    .filter((name) => name.startsWith('npm_') || name === 'TILERANK_ADDON' || name === 'NODE_OPTIONS')
    .map((name) => [name, undefined]),
)

async function succeed(command: string, args: readonly string[], cwd: string): Promise<Ended> {
  const ended = await run(command, args, { cwd, env })
  assert.equal(ended.code, 0, `${command} ${args.join(' ')}\n${ended.stdout}${ended.stderr}`)
  return ended
}

describe('the package', function () {
  this.timeout(300_000)
  let folder = ''
  let tarball = ''

  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'tilerank-package-'))
    await succeed('npm', ['pack', '--silent', '--pack-destination', folder], packageRoot)
    tarball = join(folder, readdirSync(folder).find((name) => name.endsWith('.tgz')) ?? '')
  })
  after(() => {
    rmSync(folder, { recursive: true, force: true })
  })

  const project = (name: string): string => {
    const path = join(folder, name)
    mkdirSync(path)
    writeFileSync(join(path, 'package.json'), JSON.stringify({ name, private: true, type: 'module' }))
    return path
  }
  const install = ['install', '--prefer-offline', '--no-audit', '--no-fund', '--no-progress']

  it('holds what an installation needs, and no tests', async () => {
    const { stdout } = await succeed('tar', ['-tzf', tarball], folder)
    const files = stdout.split('\n')
    for (const needed of [
      'dist/cli/main.js',
      'dist/launcher/cli.js',
      'dist/tp/index.d.ts',
      'native/addon.cpp',
      'CMakeLists.txt',
      'scripts/install.mjs',
      'LICENSE',
    ]) {
      assert.ok(files.includes(`package/${needed}`), needed)
    }
    assert.deepEqual(
      files.filter(
        (file) => /^package\/(test|dist\/test|build|node_modules)\//.test(file) || file.endsWith('tsconfig.json'),
      ),
      [],
    )
  })

  it('builds itself on installation and generates on two ranks', async () => {
    const path = project('with-scripts')
    await succeed('npm', [...install, tarball], path)
    const root = join(path, 'node_modules', 'tilerank')
    assert.ok(existsSync(join(root, 'build', 'Release', 'tilerank.node')))
    const doctor = await succeed('npx', ['tilerank', 'doctor', '--json'], path)
    const report = JSON.parse(doctor.stdout) as { addon: { path: string; isLoaded: boolean }; tier: string | null }
    assert.equal(report.addon.path, join(root, 'build', 'Release', 'tilerank.node'))
    assert.equal(report.addon.isLoaded, true)
    assert.notEqual(report.tier, null)
    const { stdout } = await succeed('npx', ['tilerank', 'demo', '--max-new-tokens', '20'], path)
    assert.match(stdout, /^Once upon a time|\w+ \w+ \w+/)
    writeFileSync(
      join(path, 'program.js'),
      `import { spawnRanks } from 'tilerank/launcher'; console.log(typeof spawnRanks)`,
    )
    assert.equal((await succeed('node', ['program.js'], path)).stdout, 'function\n')
    // Sources, and with them the stamp, have not changed.
    const again = await succeed('node', [join(root, 'scripts', 'install.mjs')], path)
    assert.ok(again.elapsedMs < 1000, `took ${again.elapsedMs} ms`)
    assert.equal(again.stdout, '')
  })

  it('says how to build it where scripts did not run, and that way works', async () => {
    const path = project('without-scripts')
    await succeed('npm', [...install, '--ignore-scripts', tarball], path)
    const refused = await run('npx', ['tilerank', 'demo'], { cwd: path, env })
    assert.equal(refused.code, 1)
    assert.match(refused.stderr, /run `npx tilerank build`.*\(ERR_ADDON_MISSING\)/)
    const doctor = await run('npx', ['tilerank', 'doctor'], { cwd: path, env })
    assert.equal(doctor.code, 1)
    assert.match(doctor.stdout, /to mend: run `npx tilerank build`/)
    await succeed('npx', ['tilerank', 'build'], path)
    await succeed('npx', ['tilerank', 'demo', '--max-new-tokens', '5'], path)
  })

  it('names the missing tools in one sentence, and stops an explicit build only', async () => {
    const path = project('without-tools')
    await succeed('npm', [...install, '--ignore-scripts', tarball], path)
    const tools = join(path, 'tools')
    mkdirSync(tools)
    symlinkSync(process.execPath, join(tools, 'node'))
    const script = join(path, 'node_modules', 'tilerank', 'scripts', 'install.mjs')
    const bare: NodeJS.ProcessEnv = { ...env, PATH: tools, CXX: undefined }
    const asDependency = await run(process.execPath, [script], { cwd: path, env: bare })
    assert.equal(asDependency.code, 0)
    assert.match(
      asDependency.stderr,
      /needs a C\+\+20 compiler and make and CMake.*`apt-get install build-essential cmake`/,
    )
    const explicit = await run(process.execPath, [script, '--strict'], { cwd: path, env: bare })
    assert.equal(explicit.code, 1)
  })
})

describe('the checkout', () => {
  it('has nothing to build when nothing has changed', async () => {
    for (const script of ['install.mjs', 'prepare.mjs']) {
      const path = join(packageRoot, 'scripts', script)
      await succeed(process.execPath, [path], packageRoot)
      const second = await succeed(process.execPath, [path], packageRoot)
      assert.ok(second.elapsedMs < 1000, `${script} took ${second.elapsedMs} ms`)
      assert.equal(second.stdout + second.stderr, '')
    }
  })

  it('takes over the lock of a build that was killed, and builds once when asked by many at once', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tilerank-lock-'))
    try {
      mkdirSync(join(folder, 'scripts'))
      mkdirSync(join(folder, 'build'))
      writeFileSync(join(folder, 'build', '.job.lock'), JSON.stringify({ pid: 2 ** 22 + 1, start: '1', token: 'dead' }))
      const { stdout: stamp } = await succeed('cat', [join(packageRoot, 'scripts', 'stamp.mjs')], folder)
      writeFileSync(join(folder, 'scripts', 'stamp.mjs'), stamp)
      const script = join(folder, 'scripts', 'job.mjs')
      writeFileSync(
        script,
        `import { appendFileSync, readFileSync } from 'node:fs'
         import { withLock } from './stamp.mjs'
         const log = ${JSON.stringify(join(folder, 'log'))}
         withLock('job', () => {
           appendFileSync(log, '(')
           Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50)
           appendFileSync(log, ')')
         })`,
      )
      await Promise.all(Array.from({ length: 6 }, () => succeed(process.execPath, [script], folder)))
      const { stdout } = await succeed('cat', [join(folder, 'log')], folder)
      assert.equal(stdout, '()'.repeat(6))
      assert.deepEqual(readdirSync(join(folder, 'build')), [])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })
})
