// The native programs of this folder: collectives, groups across nodes and runner with ranks as threads, kernels with guarded operands. Each
// plain, and under the sanitizers that can see it. Build folders stay in build/, so that a second run compiles what has changed.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { unavailable } from '../unavailable.js'
import { packageRoot } from '../../native/index.js'
import { rounds } from '../rounds.js'

interface Program {
  readonly name: 'collectives' | 'kernels' | 'mailbox' | 'network' | 'runner'
  readonly title: string
  readonly rounds: number
}

interface Variant {
  /** In build/; with the sanitizers' flags. Without: the build of the addon, whose objects are tested as they ship. */
  readonly sanitized?: { readonly folder: string; readonly flags: string }
  /** What probe.cpp is told to do, and what must be said of it. */
  readonly faults: Readonly<Record<string, RegExp>>
  readonly programs: readonly Program[]
  /** What the program of groups across nodes breaks on purpose, and what must be said of it. */
  readonly networkFaults: Readonly<Record<string, RegExp>>
}

const collectives = (turns: { quick: number; long: number }): Program => ({
  name: 'collectives',
  title: 'collectives of ranks as threads give exact sums and end in order',
  rounds: rounds(turns),
})
const kernels = (cases: { quick: number; long: number }): Program => ({
  name: 'kernels',
  title: 'every kernel of every tier stays within its operands and agrees with its scalar twin',
  rounds: rounds(cases),
})
const mailbox = (turns: { quick: number; long: number }): Program => ({
  name: 'mailbox',
  title: 'a mailbox refuses what is no frame of its job, and forged frames break groups at most',
  rounds: rounds(turns),
})
const network = (turns: { quick: number; long: number }): Program => ({
  name: 'network',
  title: 'groups across nodes, with ranks as threads, give the same bits as one rank would, and break for all alike',
  rounds: rounds(turns),
})
const runner = (ends: { quick: number; long: number }): Program => ({
  name: 'runner',
  title: 'runners of ranks as threads agree, whatever the number of threads, and end together',
  rounds: rounds(ends),
})

const variants: Readonly<Record<string, Variant>> = {
  'without a sanitizer': {
    faults: {},
    programs: [
      collectives({ quick: 300, long: 3000 }),
      kernels({ quick: 200, long: 5000 }),
      runner({ quick: 3, long: 100 }),
      mailbox({ quick: 20, long: 1000 }),
      network({ quick: 60, long: 1000 }),
    ],
    networkFaults: { 'sums in another order': /a result of \w+ is wrong/ },
  },
  'under ThreadSanitizer': {
    sanitized: { folder: 'thread', flags: '-fsanitize=thread' },
    faults: { 'data race': /WARNING: ThreadSanitizer: data race/ },
    programs: [
      collectives({ quick: 60, long: 1000 }),
      runner({ quick: 1, long: 20 }),
      network({ quick: 15, long: 400 }),
    ],
    networkFaults: {
      'a rank of the node that is not waited for': /ThreadSanitizer: data race/,
      'a frame that is written after it was posted': /ThreadSanitizer: data race/,
    },
  },
  'under AddressSanitizer and UndefinedBehaviorSanitizer': {
    sanitized: { folder: 'address', flags: '-fsanitize=address,undefined -fno-sanitize-recover=all' },
    faults: {
      'read past an end': /ERROR: AddressSanitizer: heap-buffer-overflow/,
      'integer overflow': /runtime error: signed integer overflow/,
    },
    programs: [
      collectives({ quick: 60, long: 1000 }),
      kernels({ quick: 60, long: 1000 }),
      runner({ quick: 1, long: 20 }),
      mailbox({ quick: 5, long: 300 }),
      network({ quick: 15, long: 400 }),
    ],
    networkFaults: { 'a frame that is read after its release': /AddressSanitizer: heap-use-after-free/ },
  },
}

const env = { ...process.env, TSAN_OPTIONS: 'halt_on_error=1 exitcode=66', ASAN_OPTIONS: '', UBSAN_OPTIONS: '' }

function runCommand(command: readonly string[]): { status: number | null; text: string; stdout: string } {
  const [file = '', ...args] = command
  const run = spawnSync(file, args, { encoding: 'utf8', env, timeout: rounds({ quick: 300_000, long: 1_500_000 }) })
  return {
    status: run.status,
    text: `${run.error?.message ?? ''}${run.stderr}${run.stdout}`.slice(-8000),
    stdout: run.stdout,
  }
}

class Build {
  readonly folder: string

  constructor(readonly variant: Variant) {
    const { sanitized } = variant
    this.folder = join(packageRoot, 'build', ...(sanitized === undefined ? [] : ['sanitized', sanitized.folder]))
  }

  /** Compiles programs, one process at a time in a folder. What was wrong, or empty. */
  compile(names: readonly string[]): string {
    mkdirSync(this.folder, { recursive: true })
    const { sanitized } = this.variant
    const locked = ['flock', join(this.folder, '.test-lock'), 'cmake']
    if (sanitized !== undefined) {
      const configured = runCommand([
        ...[...locked, '-S', packageRoot, '-B', this.folder, '-DCMAKE_BUILD_TYPE=None', '-DTILERANK_LAST_FLAGS=-O0'],
        `-DCMAKE_CXX_FLAGS=-g1 -fno-omit-frame-pointer ${sanitized.flags}`,
      ])
      if (configured.status !== 0) return configured.text
    }
    const targets = names.map((name) => `test_${name}`)
    const jobs = String(availableParallelism())
    const built = runCommand([...locked, '--build', this.folder, '--parallel', jobs, '--target', ...targets])
    return built.status === 0 ? '' : built.text
  }

  program(name: string): string {
    return join(this.folder, 'test', 'native', `test_${name}`)
  }
}

for (const [title, variant] of Object.entries(variants)) {
  describe(`native code ${title}`, function () {
    this.timeout(rounds({ quick: 600_000, long: 1_600_000 }))
    const build = new Build(variant)
    // ThreadSanitizer needs its places in the address space, which more random bits than it knows of may take.
    let prefix: readonly string[] = []

    before(function () {
      if (variant.sanitized !== undefined) {
        const missing = build.compile(['probe'])
        if (missing !== '') {
          return unavailable(this, `no sanitizers here: install the full g++ package, which brings them: ${missing}`)
        }
        if (runCommand([build.program('probe')]).status !== 0) prefix = ['setarch', '-R']
      }
      assert.equal(build.compile(variant.programs.map(({ name }) => name)), '')
    })

    for (const [fault, report] of Object.entries(variant.faults)) {
      it(`a planted ${fault} is found`, () => {
        const run = runCommand([...prefix, build.program('probe'), fault])
        assert.match(run.text, report)
        assert.notEqual(run.status, 0)
      })
    }

    for (const [fault, report] of Object.entries(variant.networkFaults)) {
      it(`across nodes, ${fault}: found`, () => {
        const run = runCommand([...prefix, build.program('network'), '--fault', fault])
        assert.match(run.text, report)
        assert.notEqual(run.status, 0)
      })
    }

    for (const { name, title, rounds } of variant.programs) {
      it(title, () => {
        const run = runCommand([...prefix, build.program(name), String(rounds)])
        assert.equal(run.status, 0, run.text)
        assert.match(run.stdout, /^ok, [1-9]/)
      })
    }

    if (variant.sanitized?.folder === 'address') {
      it('a kernel that reads between two rows, where no guard can stand, is found', () => {
        const run = runCommand([build.program('kernels'), '--stray'])
        assert.match(run.text, /ERROR: AddressSanitizer: use-after-poison/)
        assert.notEqual(run.status, 0)
      })
    }
  })
}
