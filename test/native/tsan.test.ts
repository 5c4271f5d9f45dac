// Compiles tsan_collectives.cpp, plain and with the thread sanitizer, and runs both.

import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { unavailable } from '../unavailable.js'
import { packageRoot } from '../../native/index.js'

const sources = [
  'test/native/tsan_collectives.cpp',
  ...['arena', 'communicator', 'recorder', 'operation', 'all_reduce', 'all_gather', 'broadcast'].map(
    (name) => `native/comm/${name}.cpp`,
  ),
].map((path) => join(packageRoot, path))

describe('the collectives with ranks as threads', function () {
  this.timeout(120_000)
  let folder = ''
  before(() => (folder = mkdtempSync(join(tmpdir(), 'tilerank-tsan-'))))
  after(() => {
    rmSync(folder, { recursive: true, force: true })
  })

  const build = (name: string, flags: readonly string[]): string => {
    const out = join(folder, name)
    execFileSync(
      'g++',
      [
        '-std=c++20',
        '-fno-exceptions',
        '-g',
        '-pthread',
        ...flags,
        '-I',
        join(packageRoot, 'native'),
        '-o',
        out,
        ...sources,
      ],
      {
        stdio: ['ignore', 'inherit', 'inherit'],
      },
    )
    return out
  }

  it('give exact sums and end in order', () => {
    const run = spawnSync(build('plain', ['-O2']), ['300'], { encoding: 'utf8', timeout: 60_000 })
    assert.equal(run.status, 0, run.stderr)
    assert.match(run.stdout, /^ok, 300 turns/)
  })

  it('race nowhere that the thread sanitizer can see', function () {
    const probe = join(folder, 'probe.cpp')
    writeFileSync(probe, 'int main() {}\n')
    const hasSanitizer = spawnSync('g++', ['-fsanitize=thread', '-o', join(folder, 'probe'), probe]).status === 0
    if (!hasSanitizer) {
      return unavailable(this, 'no libtsan here: install libtsan or the full g++ package')
    }
    const run = spawnSync(build('sanitized', ['-O1', '-fsanitize=thread']), ['60'], {
      encoding: 'utf8',
      timeout: 100_000,
      env: { ...process.env, TSAN_OPTIONS: 'halt_on_error=1 exitcode=66' },
    })
    assert.equal(run.status, 0, run.stderr.slice(0, 5000))
    assert.match(run.stdout, /^ok, 60 turns/)
  })
})
