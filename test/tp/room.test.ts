// Whether a job fits is known before it starts: what is counted is what ranks then take, and each limit refuses with the numbers,
// its name and the way out.

import assert from 'node:assert/strict'
import { join } from 'node:path'
import type { Topology } from '../../launcher/index.js'
import { initInference } from '../../tp/index.js'
import { checkRoom, jobBytes } from '../../tp/memory.js'
import { resolveInference } from '../../tp/options.js'
import { limitsOf, openModel } from '../../tp/rank.js'
import { buildSandbox, withCgroup, type Prefix, noCgroup, noCompiler } from '../launcher/confine.js'
import { unavailable } from '../unavailable.js'
import { node, run, tpLaunch, type Ended } from '../launcher/processes.js'
import { demoModel, packageRoot, testModel } from './files.js'

const mib = 2 ** 20
const main = join(packageRoot, 'dist/cli/main.js')
const story = ['generate', '--model', demoModel, '--prompt', 'Once', '--max-new-tokens', '4', '--quiet', '--tp']

const tilerank = (prefix: Prefix, words: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Ended> => {
  const [command = node, ...rest] = [...prefix, node, main, ...words]
  return run(command, rest, { env })
}

function assertTold(ended: Ended): void {
  assert.deepEqual([ended.code, ended.stdout], [0, 'Once upon a time,\n'], ended.stderr)
}

describe('room for a job', function () {
  this.timeout(120_000)

  it('is counted as what the ranks then take, whatever the sizes', async () => {
    // More memory in this process than a rank is counted with: it must not show in theirs.
    const ballast = Buffer.alloc(2 ** 28, 1)
    for (const [size, options] of [
      [1, { model: testModel('llama'), dtype: 'f32' }],
      [2, { model: testModel('llama'), maxSequences: 3, contextLength: 100, kvCacheTokens: 777, maxStepTokens: 33 }],
      [2, { model: demoModel, maxSequences: 64 }],
      [3, { model: testModel('llama-gqa-odd'), maxStepTokens: 2, maxSequences: 40 }],
    ] as const) {
      const checkpoint = await openModel({ model: { directory: options.model } })
      const config = resolveInference(options, size, checkpoint.arch.maxPositions)
      const engine = await initInference({ ...options, tensorParallel: { size } })
      const reports = await engine.reports()
      await engine.close()
      const threads = Math.max(...reports.map(({ cores }) => cores.length))
      const counted = jobBytes(checkpoint, config, limitsOf(config, checkpoint), threads)
      const sum = (of: (report: (typeof reports)[number]) => number): number => reports.reduce((n, r) => n + of(r), 0)
      assert.deepEqual(
        [counted.weights, counted.kv, counted.scratch],
        [sum((r) => r.weightBytes), sum((r) => r.kvBytes), sum((r) => r.scratchBytes)],
        `${String(size)} ranks of ${options.model}`,
      )
      assert.equal(
        counted.arena,
        sum((r) => r.arenaBytes),
        `shared memory of ${String(size)} ranks`,
      )
      const rss = sum((r) => r.peakRssBytes)
      assert.ok(rss <= counted.total, `${String(rss / mib)} MiB were used, ${String(counted.total / mib)} counted`)
    }
    assert.equal(ballast.at(-1), 1)
  })

  describe('is refused on one side of a limit and granted on the other', () => {
    const sizeUp = async () => {
      const options = { model: demoModel }
      const checkpoint = await openModel({ model: { directory: demoModel } })
      const config = resolveInference(options, 2, checkpoint.arch.maxPositions)
      return { checkpoint, config, limits: limitsOf(config, checkpoint) }
    }
    const ample: Pick<Topology, 'memoryAvailableBytes' | 'decidedBy' | 'processLimits'> = {
      memoryAvailableBytes: 2 ** 40,
      decidedBy: { cpu: undefined, memoryLimit: undefined, memoryAvailable: '/the/limit' },
      processLimits: {
        addressSpaceBytes: Infinity,
        addressSpaceLeft: Infinity,
        dataBytes: Infinity,
        dataLeft: Infinity,
        openFiles: 4096,
      },
    }
    const refusal = (code: string, text: RegExp) => (error: unknown) => {
      const { code: found, message } = error as { code?: unknown; message: string }
      assert.equal(found, code)
      assert.match(message, text)
      return true
    }

    it('of memory, for all ranks together', async () => {
      const { checkpoint, config, limits } = await sizeUp()
      const { total } = jobBytes(checkpoint, config, limits, 1)
      const check = (bytes: number, threads = 1) => {
        checkRoom(checkpoint, config, limits, threads, { ...ample, memoryAvailableBytes: bytes })
      }
      check(total)
      assert.throws(
        () => {
          check(total - 1)
        },
        refusal(
          'ERR_NO_MEMORY',
          /2 ranks together need [\d.]+ \w+ \(weights .* KV cache .* for \d+ tokens, activations .* shared memory .* processes .*\) and .* are available by \/the\/limit; use fewer/,
        ),
      )
      // Each thread has scratch of its own.
      assert.throws(
        () => {
          check(total, 2)
        },
        refusal('ERR_NO_MEMORY', /together/),
      )
    })

    it('of what a process may map', async () => {
      const { checkpoint, config, limits } = await sizeUp()
      const { largestRank, arena } = jobBytes(checkpoint, config, limits, 1)
      const check = (left: Partial<Topology['processLimits']>) => {
        checkRoom(checkpoint, config, limits, 1, { ...ample, processLimits: { ...ample.processLimits, ...left } })
      }
      const thread = 72 * mib
      check({ addressSpaceLeft: largestRank + arena + thread, dataLeft: largestRank + thread })
      assert.throws(
        () => {
          check({ addressSpaceLeft: largestRank + arena + thread - 1 })
        },
        refusal('ERR_NO_MEMORY', /limit of address space leaves .*ulimit -v unlimited/),
      )
      assert.throws(
        () => {
          check({ dataLeft: largestRank + thread - 1 })
        },
        refusal('ERR_NO_MEMORY', /limit of data leaves .*ulimit -d unlimited/),
      )
      check({ openFiles: 40 + 1 + 8 })
      assert.throws(
        () => {
          check({ openFiles: 40 + 1 + 7 })
        },
        refusal('ERR_LIMIT', /may open 48 files, and a rank may need 49 .*ulimit -n 1024/),
      )
    })

    it('of a real cgroup, from a script and under the launcher', async function () {
      const limit = (bytes: number) => ({
        version1: { 'memory.limit_in_bytes': bytes },
        version2: { 'memory.max': String(bytes) },
      })
      const isDone = await withCgroup('memory', limit(100 * mib), async (prefix, folder) => {
        const { code, stdout, stderr } = await tilerank(prefix, [...story, '2'])
        assert.deepEqual([code, stdout], [1, ''])
        assert.match(stderr, /2 ranks together need .*ERR_NO_MEMORY/)
        assert.ok(stderr.includes(`available by ${folder}/memory.`))
        const ranks = await run(prefix[0] ?? '', [...prefix.slice(1), node, tpLaunch, '-n', '1', main, ...story, '1'])
        assert.equal(ranks.code, 1)
        assert.match(ranks.stderr, /ERR_NO_MEMORY/)
      })
      if (!isDone) return unavailable(this, noCgroup)
      await withCgroup('memory', limit(600 * mib), async (prefix) => {
        assertTold(await tilerank(prefix, [...story, '2']))
        const doctor = await tilerank(prefix, ['doctor'])
        assert.match(doctor.stdout, /memory limit +0.6 GiB \(.*tilerank-test/)
        assert.match(doctor.stdout, /warning: only 0\.\d GiB of memory are free by .*tilerank-test/)
      })
    })

    it('of setrlimit', async () => {
      const limited = (option: string, value: number): Prefix => [
        'sh',
        '-c',
        `ulimit ${option} ${String(value)} && exec "$@"`,
        'sh',
      ]
      // Node alone maps about 1 GiB; a cache of 4 GiB does not fit into 3 more.
      const large = [...story, '2', '--kv-cache-tokens', '4000000']
      const mapped = await tilerank(limited('-v', 4 * 2 ** 20), large)
      assert.equal(mapped.code, 1)
      assert.match(mapped.stderr, /a rank maps .* address space leaves .*ulimit -v unlimited.*ERR_NO_MEMORY/)
      assertTold(await tilerank(limited('-v', 4 * 2 ** 20), [...story, '2']))
      const data = await tilerank(limited('-d', 3 * 2 ** 20), large)
      assert.match(data.stderr, /limit of data leaves .*ERR_NO_MEMORY/)
      const files = await tilerank(limited('-n', 47), [...story, '2'])
      assert.equal(files.code, 1)
      assert.match(files.stderr, /may open 47 files, and a rank may need 49.*ulimit -n.*ERR_LIMIT/)
      assertTold(await tilerank(limited('-n', 64), [...story, '2']))
      assertTold(await tilerank(limited('-l', 0), [...story, '2']))
      const doctor = await tilerank(limited('-n', 128), ['doctor'])
      assert.match(doctor.stdout, /open files 128; locked memory is not used/)
      assert.match(doctor.stdout, /warning: a process may open 128 files.*\n +to mend: ulimit -n 1024/)
    })
  })

  it('needs no huge pages, no binding and no home', async function () {
    const sandbox = buildSandbox()
    if (sandbox === undefined) return unavailable(this, noCompiler)
    try {
      const { deny } = sandbox
      const home = { HOME: '/nowhere' }
      assertTold(await tilerank(deny('nothp', 'mbind', 'set_mempolicy'), [...story, '2'], home))
      const words = story.filter((word) => word !== '--quiet')
      const { code, stderr } = await tilerank(deny('sched_setaffinity'), [...words, '2'])
      assert.equal(code, 0)
      // Once from what starts the ranks, once in the table of the ranks, with the remedy.
      assert.equal(stderr.match(/ranks are not bound to processors .*seccomp profile/g)?.length, 1)
      assert.equal(stderr.match(/all ranks: compute threads are not bound to their cores/g)?.length, 1)
    } finally {
      sandbox.end()
    }
  })
})
