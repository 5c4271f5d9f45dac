// `tilerank generate` and `tilerank demo` as a user and as a script call them: what goes to stdout, what to stderr, how they end.

import assert from 'node:assert/strict'
import { cpSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { initInference } from '../../tp/index.js'
import { isAlive, pause, survivors } from '../launcher/processes.js'
import { demoModel, Scratch, testModel } from '../tp/files.js'
import { decodeF32, largestDifference } from '../tp/golden.js'
import { leftAfter, startTilerank, tilerank, type TilerankEnded } from './tilerank.js'

const llama = testModel('llama')

interface RankFacts {
  readonly rank: number
  readonly pid: number
  readonly cores: readonly number[]
  readonly tier: string
  readonly weightBytes: number
  readonly kvBytes: number
  readonly peakRssBytes: number
}
interface Answer<T> {
  readonly ids: T extends 'one' ? number[] : number[][]
  readonly text: T extends 'one' ? string | null : (string | null)[]
  readonly logits?: T extends 'one' ? string : string[]
  readonly timing: {
    readonly loadMs: number
    readonly promptMs: T extends 'one' ? number : number[]
    readonly tokenMs: Readonly<Record<string, number>> | null | (Readonly<Record<string, number>> | null)[]
  }
  readonly ranks: readonly RankFacts[]
}

function answerOf<T extends 'one' | 'batch'>({ code, stdout, stderr, left }: TilerankEnded): Answer<T> {
  assert.equal(code, 0, stderr)
  assert.equal(stderr, '')
  assert.deepEqual(left, [])
  assert.equal(stdout.trimEnd().split('\n').length, 1, 'one line of JSON, nothing else')
  return JSON.parse(stdout) as Answer<T>
}

describe('tilerank generate --json', function () {
  this.timeout(60_000)
  const asked = [
    'generate',
    '--model',
    llama,
    '--max-new-tokens',
    '16',
    '--temperature',
    '0',
    '--ignore-eos',
    '--dtype',
    'f32',
    '--json',
  ]

  it('prints the whole answer to one prompt of ids', async () => {
    const { ids, text, logits, timing, ranks } = answerOf<'one'>(
      await tilerank([...asked, '--ids', '1,5,9', '--tp', '2', '--logits']),
    )
    const engine = await initInference({ model: llama, dtype: 'f32', tensorParallel: { size: 2 } })
    const expected = await engine
      .complete({ ids: [1, 5, 9] }, { maxNewTokens: 16, temperature: 0, ignoreEos: true, wantLogits: true })
      .finally(() => engine.close())
    assert.deepEqual(ids, expected.ids)
    assert.equal(ids.length, 16)
    assert.equal(text, null)
    assert.ok(expected.logits)
    assert.deepEqual(decodeF32(logits ?? ''), expected.logits)
    assert.ok(timing.loadMs > 0 && timing.promptMs > 0)
    const { mean, p50, p90, p99, ...more } = timing.tokenMs as Record<string, number>
    assert.deepEqual(more, {})
    assert.ok(mean && p50 && p90 && p99 && p50 <= p90 && p90 <= p99 && mean <= p99)
    assert.deepEqual(
      ranks.map(({ rank }) => rank),
      [0, 1],
    )
    for (const rank of ranks) {
      assert.ok(Array.isArray(rank.cores) && rank.cores.every(Number.isInteger))
      assert.match(rank.tier, /^(scalar|avx2|avx512|avx512_bf16|amx)$/)
      assert.ok(rank.weightBytes > 10_000 && rank.kvBytes > 10_000 && rank.peakRssBytes > 10_000_000)
      assert.equal(isAlive(rank.pid), false)
    }
    assert.deepEqual(answerOf<'one'>(await tilerank([...asked, '--ids', '1,5,9'])).ids, ids, 'one rank agrees')
  })

  it('gives arrays for a batch, each as alone', async () => {
    const lists = ['1,5,9', '7', Array(100).fill(8).join(',')]
    const batch = answerOf<'batch'>(
      await tilerank([
        ...asked,
        ...lists.flatMap((list) => ['--ids', list]),
        '--tp',
        '2',
        '--logits',
        '--step-tokens',
        '32',
      ]),
    )
    assert.deepEqual(
      [batch.ids, batch.text, batch.logits, batch.timing.promptMs, batch.timing.tokenMs].map(
        (a) => (a as unknown[]).length,
      ),
      [3, 3, 3, 3, 3],
    )
    assert.equal(batch.ranks.length, 2)
    for (const [i, list] of lists.entries()) {
      const alone = answerOf<'one'>(await tilerank([...asked, '--ids', list, '--tp', '2', '--logits']))
      assert.deepEqual(batch.ids[i], alone.ids)
      assert.ok(largestDifference(decodeF32(batch.logits?.[i] ?? ''), decodeF32(alone.logits ?? '')) <= 1e-4)
    }
  })

  it('replaces the end tokens of the model, and has no statistics of one token', async () => {
    const { ids } = answerOf<'one'>(await tilerank([...asked, '--ids', '1,5,9']))
    const end = ids[4] ?? -1
    const args = asked.filter((arg) => arg !== '--ignore-eos')
    const ended = answerOf<'one'>(await tilerank([...args, '--ids', '1,5,9', '--eos-ids', `9,${String(end)}`]))
    assert.deepEqual(ended.ids, ids.slice(0, ids.indexOf(end) + 1))
    const one = answerOf<'one'>(await tilerank([...args, '--ids', '1,5,9', '--max-new-tokens', '1']))
    assert.equal(one.ids.length, 1)
    assert.equal(one.timing.tokenMs, null)
    assert.equal(one.logits, undefined)
  })

  it('takes no new token and gives the logits alone', async () => {
    const { ids, logits } = answerOf<'one'>(
      await tilerank([...asked, '--ids', '1,5,9', '--max-new-tokens', '0', '--logits']),
    )
    assert.deepEqual(ids, [])
    assert.equal(decodeF32(logits ?? '').length, 320)
  })

  it('draws the same from the same seed in two jobs at once', async () => {
    const args = [
      'generate',
      '--model',
      demoModel,
      '--prompt',
      'Tom',
      '--max-new-tokens',
      '30',
      '--temperature',
      '1',
      '--json',
      '--tp',
      '2',
    ]
    const [a, b, c] = await Promise.all([7, 7, 8].map((seed) => tilerank([...args, '--seed', String(seed)])))
    assert.ok(a && b && c)
    const texts = [a, b, c].map((ended) => answerOf<'one'>(ended).text ?? '')
    assert.ok((texts[0] ?? '').length > 20)
    assert.equal(texts[1], texts[0])
    assert.notEqual(texts[2], texts[0])
  })
})

describe('tilerank generate, for people', function () {
  this.timeout(60_000)
  const asked = ['generate', '--model', demoModel, '--max-new-tokens', '20', '--temperature', '0', '--tp', '2']

  it('writes the prompt and what follows to stdout, and a table to stderr', async () => {
    const { code, stdout, stderr, left } = await tilerank([...asked, '--prompt', 'Once upon a time'])
    assert.equal(code, 0)
    assert.match(stdout, /^Once upon a time\S* .+\n$/s)
    assert.match(stderr, /rank +cores +tier/)
    assert.match(stderr, /20 new tokens/)
    assert.match(stderr, /tokens\/s/)
    assert.deepEqual(left, [])
    const quiet = await tilerank([...asked, '--prompt', 'Once upon a time', '--quiet'])
    assert.equal(quiet.stdout, stdout)
    assert.equal(quiet.stderr, '')
  })

  it("puts a prompt or a file of messages into the model's chat template", async () => {
    const folder = new Scratch()
    try {
      cpSync(demoModel, folder.path, { recursive: true })
      const file = join(folder.path, 'tokenizer_config.json')
      const settings = JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown>
      settings['chat_template'] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
      writeFileSync(file, JSON.stringify(settings))
      const messages = folder.write(
        'messages.json',
        JSON.stringify([
          { role: 'system', content: 'Once upon' },
          { role: 'user', content: ' a time' },
        ]),
      )
      const args = ['generate', '--model', folder.path, '--max-new-tokens', '8', '--temperature', '0', '--json']
      const chat = answerOf<'one'>(await tilerank([...args, '--chat', '--prompt', 'Once upon a time']))
      const conversation = answerOf<'one'>(await tilerank([...args, '--messages', messages]))
      assert.equal(chat.ids.length, 8)
      assert.deepEqual(conversation.ids, chat.ids)
      const bad = folder.write('bad.json', '{"role": "user"}')
      const refused = await tilerank([...args, '--messages', bad])
      assert.equal(refused.code, 2)
      assert.match(refused.stderr, /bad\.json: a JSON array/)
    } finally {
      folder[Symbol.dispose]()
    }
    const without = await tilerank(['generate', '--model', demoModel, '--chat', '--prompt', 'x'])
    assert.equal(without.code, 1)
    assert.match(without.stderr, /ERR_NO_CHAT_TEMPLATE/)
  })

  it('tells a story with the embedded model', async () => {
    const { code, stdout, left } = await tilerank(['demo', '--max-new-tokens', '25'])
    assert.equal(code, 0)
    assert.match(stdout, /^Once upon a time, there was a /)
    assert.match(stdout, /25 new tokens/)
    assert.deepEqual(left, [])
  })
})

describe('tilerank generate, cut short', function () {
  this.timeout(60_000)
  // 1000 tokens of a small model: seconds, enough to be hit in the middle.
  const long = [
    'generate',
    '--model',
    demoModel,
    '--prompt',
    'Tom',
    '--max-new-tokens',
    '1000',
    '--ignore-eos',
    '--tp',
    '2',
  ]

  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    it(`ends with 130 at ${signal} while it writes, with nothing left`, async () => {
      const { child, ended, saw, processes } = startTilerank(long)
      await saw(/Tom.{10}/s)
      assert.equal(processes().length, 3)
      const start = performance.now()
      child.kill(signal)
      const { code, stderr } = await ended
      assert.equal(code, 130)
      assert.match(stderr, /interrupted/)
      assert.ok(performance.now() - start < 2000)
      assert.deepEqual(await leftAfter(processes, 500), [])
    })
  }

  it('ends with 130 at SIGINT while it loads, and prints nothing', async () => {
    const { child, ended, processes } = startTilerank([
      'generate',
      '--shape',
      'tinyllama-1.1b',
      '--layers',
      '8',
      '--ids',
      '1',
      '--tp',
      '2',
      '--json',
      '--context-length',
      '128',
    ])
    while (processes().length < 3) await pause(10)
    await pause(150)
    child.kill('SIGINT')
    const { code, stdout } = await ended
    assert.equal(code, 130)
    assert.equal(stdout, '')
    assert.deepEqual(await leftAfter(processes, 500), [])
  })

  it('takes its ranks with it when it is killed', async () => {
    const { child, ended, saw, processes } = startTilerank(long)
    await saw(/Tom.{10}/s)
    const ranks = processes().filter((pid) => pid !== child.pid)
    assert.equal(ranks.length, 2)
    child.kill('SIGKILL')
    await ended
    assert.deepEqual(await survivors(ranks, 2000), [])
  })

  it('says which rank was lost, and to what', async () => {
    const { child, ended, saw, processes } = startTilerank(long)
    await saw(/Tom.{10}/s)
    const victim = processes().find((pid) => pid !== child.pid)
    assert.ok(victim)
    process.kill(victim, 'SIGKILL')
    const { code, stderr } = await ended
    assert.equal(code, 1)
    assert.match(
      stderr,
      new RegExp(`^tilerank: rank [01] was ended by SIGKILL \\(process ${String(victim)}\\).*ERR_PEER_LOST`),
    )
    assert.deepEqual(await leftAfter(processes, 500), [])
  })
})
