// Which algorithm is chosen and why; that tables are refused where they are wrong, told apart where ranks differ, and change no bit.

import assert from 'node:assert/strict'
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { bestChoices } from '../../bench/tune.js'
import {
  createGroup,
  readTuned,
  tunedFor,
  tunedPath,
  writeTuned,
  type AlgorithmRule,
  type Explanation,
  type GroupOptions,
} from '../../collectives/index.js'
import { tilerank } from '../cli/tilerank.js'
import { ranksValues, runRanks } from '../ranks.js'

const cases = new URL('./algorithmCases.js', import.meta.url)

describe('the choice of algorithm', function () {
  let folder: string
  beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'tilerank-test-'))))
  afterEach(() => rmSync(folder, { recursive: true }))

  async function explained(
    bytes: number,
    options: GroupOptions,
    operation: Parameters<Awaited<ReturnType<typeof createGroup>>['explain']>[0] = 'allReduce',
    memory: 'tensor' | 'array' = 'tensor',
  ): Promise<Explanation> {
    const group = await createGroup({ env: { XDG_CACHE_HOME: folder }, ...options })
    try {
      return group.explain(operation, bytes, memory)
    } finally {
      await group.close()
    }
  }

  function tune(rules: readonly AlgorithmRule[]): string {
    const key = tunedFor(1)
    const path = tunedPath(key, { XDG_CACHE_HOME: folder }) ?? assert.fail('no path')
    writeTuned(path, { ...key, measured: 'today', rules })
    assert.deepEqual(readTuned(path, key)?.rules, rules)
    return path
  }

  it('follows the defaults where nothing else is said', async () => {
    for (const [worldSize, limit] of [
      [1, Infinity],
      [2, Infinity],
      [3, 64 << 10],
      [4, 32 << 10],
      [5, 16 << 10],
    ] as const) {
      const values = (await ranksValues(cases, 'sums', {
        worldSize,
        env: () => ({ XDG_CACHE_HOME: folder }),
      })) as { explained: Explanation[] }[]
      for (const { explained: all } of values) {
        for (const { memory, bytes, algorithm, chunkBytes, source, why } of all) {
          const expected =
            memory === 'tensor'
              ? bytes <= 2048
                ? 'oneShot'
                : 'twoShotInPlace'
              : bytes <= limit
                ? 'oneShot'
                : 'twoShot'
          assert.deepEqual(
            [algorithm, chunkBytes, source],
            [expected, 4096, 'default'],
            `${worldSize} ${memory} ${bytes}`,
          )
          assert.match(why, /us one-shot|computed/)
        }
      }
    }
    const other = await explained(5, {}, 'broadcast')
    assert.deepEqual([other.algorithm, other.chunkBytes], ['direct', 1 << 20])
  })

  it('is an option before a variable before what was measured before the default, field by field', async () => {
    const path = tune([
      { operation: 'allReduce', memory: 'tensor', bytes: [0, 9999], algorithm: 'twoShot', why: 'measured' },
    ])
    const env = { XDG_CACHE_HOME: folder }
    const choice = async (bytes: number, options: GroupOptions): Promise<string> => {
      const { algorithm, chunkBytes, source } = await explained(bytes, options)
      return `${algorithm} ${chunkBytes} ${source}`
    }
    assert.equal(await choice(9999, { env }), 'twoShot 1048576 tuned')
    assert.equal(await choice(10_000, { env }), 'twoShotInPlace 1048576 default')
    const variable = { ...env, TILERANK_ALGORITHM: 'allReduce=oneShot:4K-8K,chunk=64K; *=auto,chunk=32K' }
    assert.equal(await choice(4095, { env: variable }), 'twoShot 32768 tuned')
    assert.equal(await choice(4096, { env: variable }), 'oneShot 65536 environment')
    assert.equal(await choice(8192, { env: variable }), 'oneShot 65536 environment')
    assert.equal(await choice(8193, { env: variable }), 'twoShot 32768 tuned')
    const options: GroupOptions = {
      env: variable,
      algorithms: [{ operation: 'allReduce', ranks: [1], bytes: [5000], algorithm: 'twoShotInPlace' }],
    }
    assert.equal(await choice(4999, options), 'oneShot 65536 environment')
    assert.equal(await choice(5000, options), 'twoShotInPlace 65536 option')
    assert.equal(await choice(5000, { ...options, chunkBytes: 128 }), 'twoShotInPlace 128 option')
    // A rule for others, the tuned table left out, and a slot that is smaller than the chunks.
    assert.equal(
      await choice(1, { env, algorithms: [{ operation: 'allReduce', ranks: [2], algorithm: 'oneShot' }] }),
      'twoShot 1048576 tuned',
    )
    assert.equal(await choice(1, { env, algorithms: 'default' }), 'oneShot 1048576 default')
    assert.equal(await choice(1, { env: { ...env, TILERANK_ALGORITHM: 'default' } }), 'oneShot 1048576 default')
    assert.equal(await choice(1, { env: variable, slotBytes: 128 }), 'twoShot 128 tuned')
    // In place there is nothing for arrays.
    const array = await explained(1, { algorithms: 'allReduce=twoShotInPlace,chunk=128' }, 'allReduce', 'array')
    assert.deepEqual([array.algorithm, array.chunkBytes], ['oneShot', 1 << 20])
    const why = await explained(4096, { env: variable })
    assert.equal(
      why.why,
      "'allReduce=oneShot:4K-8K,chunk=64K'; chunks by environment: 'allReduce=oneShot:4K-8K,chunk=64K'",
    )
    assert.equal(dirname(path), join(folder, 'tilerank'))
    assert.equal(readdirSync(dirname(path)).length, 1)
  })

  it('refuses rules that are wrong, and names place and field', async () => {
    const refused = async (algorithms: unknown, message: RegExp): Promise<void> =>
      assert.rejects(explained(1, { algorithms: algorithms as string }), { code: 'ERR_INVALID_ARGUMENT', message })
    const good = { operation: 'allReduce', algorithm: 'oneShot' }
    await refused(7, /algorithms: 7/)
    await refused([7], /algorithms\[0\]: 7/)
    await refused([good, { ...good, operation: 'allreduce' }], /algorithms\[1\], operation: 'allreduce'/)
    await refused(
      [good, { ...good, algorithm: 'ring' }],
      /algorithms\[1\], algorithm: 'ring', .* oneShot, twoShot, twoShotInPlace/,
    )
    await refused([{ operation: 'broadcast', algorithm: 'oneShot' }], /algorithm: 'oneShot', .*direct/)
    await refused([{ ...good, bytes: [5, 4] }], /bytes: \[5,4\]/)
    await refused([{ ...good, bytes: 5 }], /bytes: 5/)
    await refused([{ ...good, ranks: [-1] }], /ranks: \[-1\]/)
    await refused([{ ...good, chunkBytes: 100 }], /chunkBytes: 100, .*multiple of 64/)
    await refused([{ ...good, memory: 'disk' }], /memory: 'disk'/)
    await refused([{ ...good, memory: 'array', algorithm: 'twoShotInPlace' }], /memory: 'array', .*tensor/)
    await refused([{ operation: 'broadcast', memory: 'array', chunkBytes: 64 }], /memory: .*only allReduce/)
    await refused([{ ...good, size: 5 }], /size: 5, .*no such field/)
    await refused('allReduce', /rule 1 'allReduce'/)
    await refused('allReduce=oneShot; allReduce=ring:0-5', /rule 2 'allReduce=ring:0-5', algorithm: 'ring'/)
    await refused('allReduce=oneShot:x', /bytes: 'x'/)
    await refused('allReduce=oneShot:1-2-3', /bytes: '1-2-3'/)
    await refused('allReduce=oneShot,chunk=many', /chunkBytes: 'many'/)
    await refused('allReduce=oneShot,fast', /'fast'/)
    await assert.rejects(explained(1, { env: { TILERANK_ALGORITHM: '\nbroadcast=ring' } }), {
      code: 'ERR_ENVIRONMENT',
      variables: ['TILERANK_ALGORITHM'],
      message: /TILERANK_ALGORITHM, rule 2 'broadcast=ring', algorithm: 'ring'/,
    })
    const group = await createGroup({ env: {} })
    const wrong = (args: unknown[]): void => {
      assert.throws(() => Reflect.apply(group.explain.bind(group), undefined, args) as unknown, {
        code: 'ERR_INVALID_ARGUMENT',
      })
    }
    wrong(['sum', 1])
    wrong(['allReduce', -1])
    wrong(['allReduce', 1, 'disk'])
    await group.close()
  })

  it('refuses a measured table that is wrong, and names line and field', async () => {
    const path = tune([
      { operation: 'allReduce', algorithm: 'oneShot' },
      { operation: '*', chunkBytes: 128 },
    ])
    const text = readFileSync(path, 'utf8')
    const refused = async (table: string, message: RegExp): Promise<void> => {
      writeFileSync(path, table)
      await assert.rejects(explained(1, {}), (error: Error & { code?: string }) => {
        assert.equal(error.code, 'ERR_ENVIRONMENT')
        assert.match(error.message, message)
        assert.match(error.message, /tune collectives/)
        return true
      })
    }
    await refused(text.replace('128', '100'), /line 9, rules\[1\], chunkBytes: 100/)
    await refused(text.replace('oneShot', 'ring'), /line 8, rules\[0\], algorithm: 'ring'/)
    await refused(text.replace('128}', '128'), /line \d+: /)
    await refused(text.slice(0, text.length / 2), /line \d+: /)
    await refused(text.replace('"ranks": 1', '"ranks": 2'), /ranks: 2, expected is 1/)
    await refused('{}', /version: undefined/)
    await refused(' '.repeat(2 << 20), /2097152 bytes/)
    await refused('[', /line 1: /)
    rmSync(path)
    mkdirSync(path)
    await assert.rejects(explained(1, {}), { code: 'ERR_ENVIRONMENT', message: /EISDIR/ })
    // Of another machine, version or size there is none; nor where the folder is none.
    assert.equal((await explained(1, { env: {} })).source, 'default')
    assert.equal((await explained(1, { env: { XDG_CACHE_HOME: 'relative' } })).source, 'default')
  })

  it('is compared when ranks join: both sides are told, nobody waits', async () => {
    const one = 'allReduce=twoShot:0-8192'
    const outcomes = await runRanks(cases, 'join', {
      worldSize: 2,
      env: (rank) => ({ XDG_CACHE_HOME: folder, TILERANK_ALGORITHM: rank === 0 ? one : undefined }),
    })
    for (const outcome of outcomes) {
      const { code, mine, theirs } = outcome.value as Record<string, string>
      assert.equal(code, 'ERR_MISMATCH', JSON.stringify(outcome))
      assert.match(mine ?? '', /algorithms [0-9a-f]{8}/)
      assert.match(theirs ?? '', /algorithms [0-9a-f]{8}/)
      assert.notEqual(mine, theirs)
    }
    // The same choices from other places are the same.
    const same = await ranksValues(cases, 'join', {
      worldSize: 2,
      env: (rank) => ({
        XDG_CACHE_HOME: folder,
        TILERANK_ALGORITHM:
          rank === 0 ? one : 'allReduce=twoShot:0-4K; allReduce=twoShot:4097-8K,nodes=1; allGather=direct',
      }),
    })
    assert.deepEqual(same, [{ code: 'joined' }, { code: 'joined' }])
  })

  it('changes no bit, whatever the table', async () => {
    const digests = new Set<string>()
    for (const table of [
      'default',
      'allReduce=twoShot',
      'allReduce=oneShot,chunk=64',
      'allReduce=twoShot:64-1K,chunk=192; allReduce=oneShot:1025-3K,tensor,chunk=320; *=auto:2K-,chunk=128',
    ]) {
      const values = (await ranksValues(cases, 'sums', {
        worldSize: 3,
        env: () => ({ XDG_CACHE_HOME: folder, TILERANK_ALGORITHM: table }),
      })) as { digest: string }[]
      for (const { digest } of values) digests.add(digest)
    }
    assert.equal(digests.size, 1)
  })

  it('parts ranks that cut one call into different chunks', async () => {
    const values = (await ranksValues(cases, 'mixed', { worldSize: 2 })) as { code: string }[]
    for (const { code } of values) assert.equal(code, 'ERR_MISMATCH')
  })

  it('is measured: the choices win that cost least, a default unless it is clearly beaten', () => {
    const us = [[1, 2], [2, 2.5], [4, 3], [8, 4]] // prettier-ignore
    for (const before of [
      [1, 1, 1, 1],
      [0, 0, 0, 0],
      [0, 0, 1, 1],
    ])
      // prettier-ignore
      assert.deepEqual(bestChoices(us, before), [0, 0, 1, 1])
    assert.deepEqual(bestChoices([[1, 1.02], [2, 2.02]], [1, 1]), [1, 1]) // prettier-ignore
    assert.deepEqual(bestChoices([[1, 2], [1, 2]], [1, 1]), [0, 0]) // prettier-ignore
    assert.deepEqual(bestChoices([[2, 1], [2, 1]], [0, 0]), [1, 1]) // prettier-ignore
    // Three that follow each other: the last never comes before the first again, whatever one size says.
    const three = [[1, 2, 4], [2, 1, 3], [9, 8, 2], [7, 9, 9], [30, 20, 5]] // prettier-ignore
    assert.deepEqual(bestChoices(three, [0, 0, 0, 0, 0]), [0, 1, 2, 2, 2])
  })

  it('is measured by tilerank tune collectives, which keeps it for this machine', async () => {
    const run = await tilerank(['tune', 'collectives', '--trials', '1'], { XDG_CACHE_HOME: folder })
    assert.equal(run.code, 0, run.stderr)
    assert.deepEqual(run.left, [])
    assert.match(run.stdout, /tensor +2048 +oneShot +\d+\.\d\d/)
    const key = tunedFor(2)
    const path = tunedPath(key, { XDG_CACHE_HOME: folder }) ?? assert.fail('no path')
    assert.ok(run.stdout.includes(path), run.stdout)
    const table = readTuned(path, key)
    assert.ok(table !== undefined)
    const values = await ranksValues(cases, 'join', { worldSize: 2, env: () => ({ XDG_CACHE_HOME: folder }) })
    assert.deepEqual(values, [{ code: 'joined' }, { code: 'joined' }])
    rmSync(path)
    const dry = await tilerank(['tune', 'collectives', '--trials', '1', '--dry-run', '--json'], {
      XDG_CACHE_HOME: folder,
    })
    assert.equal(dry.code, 0, dry.stderr)
    assert.equal((JSON.parse(dry.stdout) as { ranks: number }).ranks, 2)
    assert.deepEqual(readdirSync(dirname(path)), [])
  })
})
