// More than one engine on a machine, more ranks than cores, and engines and groups that have nothing to do.

import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { readTopology, spawnRanks } from '../../launcher/index.js'
import { initInference, type InferenceOptions } from '../../tp/index.js'
import { cpuMs, node, pause, start, survivors, tpLaunch, type Started } from '../launcher/processes.js'
import { isLong, rounds } from '../rounds.js'
import { demoModel, testModel } from './files.js'

const face = (name: string): string => JSON.stringify(new URL(`../../${name}/index.js`, import.meta.url).href)
const prompt = [5, 9, 30, 77, 120]
const greedy = { temperature: 0, ignoreEos: true } as const
const count = 40

async function tokensOf(options: InferenceOptions): Promise<readonly number[]> {
  const engine = await initInference(options)
  try {
    return (await engine.complete({ ids: prompt }, { maxNewTokens: count, ...greedy })).ids
  } finally {
    await engine.close()
  }
}

describe('side by side', function () {
  this.timeout(rounds({ quick: 60_000, long: 600_000 }))
  let folder = ''
  before(() => (folder = mkdtempSync(join(tmpdir(), 'tilerank-beside-'))))
  after(() => {
    rmSync(folder, { recursive: true, force: true })
  })
  const script = (name: string, text: string): string => {
    const path = join(folder, `${name}.mjs`)
    writeFileSync(path, text)
    return path
  }

  it('gives the right text from two scripts at once, and from one when the other is killed', async () => {
    const models = [testModel('llama'), demoModel]
    const expected = await Promise.all(
      models.map((model) => tokensOf({ model, dtype: 'f32', tensorParallel: { size: 1 } })),
    )
    const path = script(
      'engine',
      `import { initInference } from ${face('tp')}
       const [model, rounds] = process.argv.slice(2)
       const engine = await initInference({ model, dtype: 'f32', tensorParallel: { size: 2 } })
       console.log('pids', ...(await engine.reports()).map(({ pid }) => pid))
       let last = ''
       for (let i = 0; i < Number(rounds); i++) {
         const { ids } = await engine.complete({ ids: ${JSON.stringify(prompt)} }, { maxNewTokens: ${count}, temperature: 0, ignoreEos: true })
         const text = ids.join()
         if (i > 0 && text !== last) throw new Error('round ' + i + ' differs: ' + text)
         if (i === 5) console.log('under way')
         last = text
       }
       console.log('ids', last)
       await engine.close()`,
    )
    const run = (model: string, rounds: number): Started => start(node, [path, model, String(rounds)])
    const both = models.map((model) => run(model, 60))
    for (const [i, { ended }] of both.entries()) {
      const { code, stdout, stderr } = await ended
      assert.equal(code, 0, stderr)
      assert.equal(/^ids (.*)$/m.exec(stdout)?.[1], expected[i]?.join())
    }
    const [stays, dies] = [run(models[0] ?? '', 100), run(models[1] ?? '', 100_000)]
    const pids = (await dies.saw(/pids (.*)\n[^]*under way/))[1]?.split(' ').map(Number) ?? []
    dies.child.kill('SIGKILL')
    const { code, stdout, stderr } = await stays.ended
    assert.equal(code, 0, stderr)
    assert.equal(/^ids (.*)$/m.exec(stdout)?.[1], expected[0]?.join())
    assert.equal(pids.length, 2)
    assert.deepEqual(await survivors(pids, 2000), [])
  })

  it('lets one engine of a script fail without the other', async () => {
    const options = { model: testModel('llama'), dtype: 'f32', tensorParallel: { size: 2 } } as const
    const expected = await tokensOf(options)
    const engines = await Promise.all([initInference(options), initInference(options)])
    const [first, second] = engines
    try {
      const pids = (await second.reports()).map(({ pid }) => pid)
      const lost = assert.rejects(second.complete({ ids: prompt }, { maxNewTokens: 240, ...greedy }), {
        code: 'ERR_PEER_LOST',
      })
      process.kill(pids[1] ?? 0, 'SIGKILL')
      for (let i = 0; i < 10; i++) {
        const { ids } = await first.complete({ ids: prompt }, { maxNewTokens: count, ...greedy })
        assert.deepEqual(ids, expected)
      }
      await lost
    } finally {
      await Promise.all(engines.map((engine) => engine.close()))
    }
  })

  it('lets go of all threads of a rank, wherever they wait for each other, when its peer is lost', async () => {
    const entry = script(
      'threads',
      `import { initInference } from ${face('tp')}
       const engine = await initInference({ model: ${JSON.stringify(testModel('llama'))}, dtype: 'f32' })
       process.on('SIGTERM', () => undefined) // what ends this process is its own failure
       let tokens = 0
       try {
         for await (const { ids } of engine.generate({ ids: [5, 9] }, { maxNewTokens: 240, temperature: 0, ignoreEos: true })) {
           tokens += ids.length
           if (process.env.RANK === '1' && tokens === 9) process.kill(process.pid, 'SIGKILL')
         }
       } catch (error) {
         console.log(error.code)
         await engine.close().catch(() => undefined)
         console.log('closed')
       }`,
    )
    const cores = readTopology().allowedCpus.slice(0, 2)
    for (let round = 0; round < rounds({ quick: 3, long: 100 }); round++) {
      const ranks = await spawnRanks({
        entry: pathToFileURL(entry),
        worldSize: 2,
        cores: [cores, cores],
        stdout: 'pipe',
        stderr: 'ignore',
        graceMs: 5000,
      })
      let text = ''
      ranks.ranks[0]?.child.stdout?.setEncoding('utf8').on('data', (part: string) => (text += part))
      const failure = await ranks.done
      assert.deepEqual([failure?.rank, failure?.signal], [1, 'SIGKILL'])
      assert.match(text, /^ERR_PEER_LOST\nclosed\n$/)
      assert.deepEqual(
        ranks.exits.filter(({ rank }) => rank === 0).map(({ exitCode }) => exitCode),
        [0],
      )
    }
  })

  it('gives the right text from more ranks than cores', async () => {
    const cores = readTopology().cores.length
    const options = { model: demoModel, dtype: 'f32' } as const
    const [alone, shared] = [
      await tokensOf(options),
      await tokensOf({ ...options, tensorParallel: { size: Math.min(8, 2 * cores) } }),
    ]
    assert.deepEqual(shared, alone)
  })

  // A timed claim has no place beside others' tests.
  if (!isLong) return

  it('takes at most 2.5 times as long with twice as many ranks as cores', async () => {
    const cores = Math.min(4, readTopology().cores.length)
    const shapes: Readonly<Record<string, InferenceOptions>> = {
      'the demo model': { model: demoModel },
      'four layers of TinyLlama': { shape: 'tinyllama-1.1b', layers: 4, contextLength: 256, maxSequences: 1 },
    }
    for (const [name, options] of Object.entries(shapes)) {
      const timeOf = async (size: number): Promise<number> => {
        const engine = await initInference({ ...options, tensorParallel: { size } })
        try {
          const times: number[] = []
          for (let i = 0; i < 5; i++) {
            const { tokenMs } = await engine.complete({ ids: prompt }, { maxNewTokens: 100, ...greedy })
            times.push(tokenMs.reduce((a, b) => a + b, 0))
          }
          return Math.min(...times)
        } finally {
          await engine.close()
        }
      }
      const [few, many] = [await timeOf(cores), await timeOf(2 * cores)]
      process.stdout.write(
        `      ${name}: ${String(cores)} ranks ${few.toFixed(1)} ms, twice as many ${many.toFixed(1)} ms\n`,
      )
      assert.ok(many <= 2.5 * few, `${name}: ${String(many)} ms against ${String(few)}`)
    }
  })

  it('takes less than a hundredth of a core while an engine and a group are idle', async () => {
    const seconds = 10
    const group = script(
      'group',
      `import { createGroup } from ${face('collectives')}
       const group = await createGroup()
       const x = group.alloc('f32', [1000])
       group.allReduceSync(x)
       for (let i = 0; i < 50; i++) await group.allReduce(x)
       await Promise.all(Array.from({ length: 8 }, () => group.allReduce(x)))
       console.log('pid=' + process.pid)
       setInterval(() => {}, 100_000)`,
    )
    const launcher = start(node, [tpLaunch, '-n', '2', '--oversubscribe', group])
    const engine = await initInference({ model: testModel('llama'), tensorParallel: { size: 2 } })
    const threads = await initInference({ model: testModel('llama'), tensorParallel: { size: 1 } })
    try {
      const [text] = await launcher.saw(/(pid=\d+\n){2}/)
      const members = [...text.matchAll(/\d+/g)].map(([pid]) => Number(pid))
      for (const each of [engine, threads]) await each.complete({ ids: prompt }, { maxNewTokens: 20, ...greedy })
      const ranks = [...(await engine.reports()), ...(await threads.reports())].map(({ pid }) => pid)
      const pids = [process.pid, launcher.child.pid ?? 0, ...members, ...ranks]
      await pause(1000)
      const before = pids.map(cpuMs)
      await pause(1000 * seconds)
      for (const [i, pid] of pids.entries()) {
        const used = cpuMs(pid) - (before[i] ?? 0)
        assert.ok(
          used < 10 * seconds,
          `process ${String(i)} of ${pids.join()} used ${String(used)} ms in ${String(seconds)} s`,
        )
      }
    } finally {
      launcher.child.kill('SIGTERM')
      await Promise.all([engine.close(), threads.close(), launcher.ended])
    }
  })
})
