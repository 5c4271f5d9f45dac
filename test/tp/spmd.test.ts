// One script on all ranks, started by tp-launch: all ask alike and all get the same, or rank 0 asks and the others serve. What
// differs between ranks is found out, not computed.

import assert from 'node:assert/strict'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { initInference, type Completion } from '../../tp/index.js'
import { launch, node, run, survivors, type Ended } from '../launcher/processes.js'
import { demoModel, testModel } from './files.js'

const face = new URL('../../tp/index.js', import.meta.url).href
const llama = testModel('llama')

interface Outcome {
  readonly pid: number
  readonly value?: unknown
  readonly code?: string
  readonly message?: string
}

describe('engine: one script on all ranks', function () {
  this.timeout(60_000)
  let folder = ''
  let scripts = 0
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'tilerank-spmd-'))
  })
  after(() => {
    rmSync(folder, { recursive: true, force: true })
  })

  /** A script whose `body` (of an async function that knows initInference and rank) gives or throws what is written to a file. */
  function script(body: string): { path: string; outcomeOf: (rank: number) => Outcome } {
    const base = join(folder, String(scripts++))
    const path = `${base}.mjs`
    writeFileSync(
      path,
      `import { writeFileSync } from 'node:fs'
const rank = Number(process.env.RANK ?? -1)
const model = ${JSON.stringify(llama)}
const demo = ${JSON.stringify(demoModel)}
// A rank that fails ends the others by TERM: they are to say first what they saw.
process.on('SIGTERM', () => {})
const { initInference } = await import(${JSON.stringify(face)})
const save = (outcome) => writeFileSync(${JSON.stringify(base)} + '.' + rank, JSON.stringify({ pid: process.pid, ...outcome }))
async function main() { ${body} }
try {
  save({ value: (await main()) ?? null })
} catch (error) {
  save({ code: error.code, message: error.message })
  process.exitCode = 1
}`,
    )
    return { path, outcomeOf: (rank) => JSON.parse(readFileSync(`${base}.${String(rank)}`, 'utf8')) as Outcome }
  }

  async function job(size: number, body: string): Promise<{ ended: Ended; outcomes: Outcome[] }> {
    const { path, outcomeOf } = script(body)
    const ended = await launch(['-n', String(size), '--oversubscribe', path])
    const outcomes = Array.from({ length: size }, (_, rank) => {
      try {
        return outcomeOf(rank)
      } catch {
        throw new Error(`rank ${String(rank)} wrote nothing: ${ended.stderr}`)
      }
    })
    assert.deepEqual(
      await survivors(
        outcomes.map(({ pid }) => pid),
        1000,
      ),
      [],
    )
    return { ended, outcomes }
  }

  async function values(size: number, body: string): Promise<unknown[]> {
    const { ended, outcomes } = await job(size, body)
    assert.equal(ended.code, 0, `${JSON.stringify(outcomes)} ${ended.stderr}`)
    return outcomes.map((outcome) => {
      assert.ok('value' in outcome, outcome.message)
      return outcome.value
    })
  }

  let expected: Completion
  before(async () => {
    const engine = await initInference({ model: demoModel, dtype: 'f32' })
    expected = await engine.complete('Once upon a time', { maxNewTokens: 20, temperature: 0 })
    await engine.close()
  })

  for (const size of [2, 3]) {
    it(`gives the same text on all of ${String(size)} ranks, streamed, whole and in a batch`, async () => {
      const given = await values(
        size,
        `const engine = await initInference({ model: demo, dtype: 'f32' })
        let streamed = ''
        for await (const { text } of engine.generate('Once upon a time', { maxNewTokens: 20, temperature: 0 })) streamed += text
        const batch = await Promise.all(['Once upon a time', 'Tom', 'The sun'].map((prompt) =>
          engine.complete(prompt, { maxNewTokens: 20, temperature: 0 })))
        const { logits } = await engine.complete('Tom', { maxNewTokens: 0, wantLogits: true })
        const reports = await engine.reports()
        await engine.close()
        return { streamed, batch: batch.map(({ text }) => text), logits: [...logits], state: reports[0].stateHash, worldSize: engine.worldSize }`,
      )
      const [first] = given as [{ streamed: string; batch: string[]; worldSize: number; logits: number[] }]
      assert.equal(given.length, size)
      for (const one of given) assert.deepEqual(one, first)
      assert.equal(first.streamed, expected.text)
      assert.equal(first.batch[0], expected.text)
      assert.notEqual(first.batch[1], first.batch[2])
      assert.equal(first.logits.length, 1024)
      assert.equal(first.worldSize, size)
    })
  }

  it('lets rank 0 ask while the others serve, as often as it likes', async () => {
    const given = await values(
      2,
      `const engine = await initInference({ model: demo, dtype: 'f32', tensorParallel: { size: 2 } })
      try {
        if (rank !== 0) { await engine.serve(); return 'served' }
        const texts = []
        for (let i = 0; i < 5; i++) texts.push((await engine.complete('Once upon a time', { maxNewTokens: 20, temperature: 0 })).text)
        for await (const piece of engine.generate('Tom', { maxNewTokens: 50 })) break
        await engine.complete('Tom', { signal: AbortSignal.abort() }).catch(() => texts.push('aborted'))
        return texts
      } finally { await engine.close() }`,
    )
    assert.deepEqual(given, [[...Array<string | null>(5).fill(expected.text), 'aborted'], 'served'])
  })

  it('asks again at the very moment a request ends, a thousand times', async () => {
    // Each next request comes between the end of the last step and the end of rank 0's loop.
    const given = await values(
      2,
      `const engine = await initInference({ model, dtype: 'f32' })
      let tokens = 0
      for (let i = 0; i < 500; i++) {
        for await (const { ids } of engine.generate({ ids: [5, 6] }, { maxNewTokens: 1, temperature: 0 })) tokens += ids.length
        tokens += (await engine.complete({ ids: [7] }, { maxNewTokens: 1, temperature: 0 })).ids.length
      }
      await engine.close()
      return tokens`,
    )
    assert.deepEqual(given, [1000, 1000])
  })

  it('brings more logits to all ranks than one message of a step can hold', async () => {
    const given = await values(
      2,
      `const engine = await initInference({ model: demo, dtype: 'f32', maxStepTokens: 8, maxSequences: 8 })
      const batch = await Promise.all([1, 2, 3, 4, 5, 6, 7, 8].map((id) => engine.complete({ ids: [id] }, { maxNewTokens: 0, wantLogits: true })))
      await engine.close()
      return batch.map(({ logits }) => [logits.length, ...logits.filter((_, i) => i % 128 === 1)])`,
    )
    const [rows] = given as [number[][]]
    assert.equal(rows.length, 8)
    assert.ok(rows.every((row) => row[0] === 1024 && row.length === 9))
    assert.notDeepEqual(rows[0], rows[1])
    assert.deepEqual(given[1], rows)
  })

  it('draws alike on all ranks without a seed, and otherwise in the next job', async () => {
    const body = `const engine = await initInference({ model, dtype: 'f32' })
      const { ids } = await engine.complete({ ids: [5, 6, 7] }, { temperature: 5, topK: 0, maxNewTokens: 20, ignoreEos: true })
      await engine.close()
      return ids`
    const first = await values(2, body)
    const second = await values(2, body)
    assert.deepEqual(first[1], first[0])
    assert.deepEqual(second[1], second[0])
    assert.equal((first[0] as number[]).length, 20)
    assert.notDeepEqual(second[0], first[0])
  })

  it('ends on every rank with the reason of a signal, and goes on', async () => {
    const given = await values(
      2,
      `const engine = await initInference({ model, dtype: 'f32' })
      const controller = new AbortController()
      let seen = 0
      let reason = 'none'
      try {
        for await (const piece of engine.generate({ ids: [5] }, { maxNewTokens: 200, temperature: 0, ignoreEos: true, signal: controller.signal })) {
          if (++seen === 3) controller.abort(new Error('enough'))
        }
      } catch (error) { reason = error.message }
      const after = await engine.complete({ ids: [5] }, { maxNewTokens: 3, temperature: 0, ignoreEos: true })
      await engine.close()
      return [reason, after.ids.length]`,
    )
    assert.deepEqual(given, [
      ['enough', 3],
      ['enough', 3],
    ])
  })

  it('finds out that ranks ask different things', async () => {
    const { ended, outcomes } = await job(
      2,
      `const engine = await initInference({ model, dtype: 'f32' })
      try { return await engine.complete({ ids: [5, 6 + rank] }, { maxNewTokens: 4, temperature: 0 }) } finally { await engine.close() }`,
    )
    assert.equal(outcomes[1]?.code, 'ERR_MISMATCH')
    assert.match(outcomes[1].message ?? '', /request 0 differs between rank 0 and rank 1/)
    assert.equal(ended.code, 1)
  })

  it('finds out with the first token that one rank has read other weights', async () => {
    // The final norm stands on every rank: with one other value there, the ranks go on with other hidden states.
    const other = join(folder, 'other')
    cpSync(llama, other, { recursive: true })
    const path = join(other, 'model.safetensors')
    const bytes = readFileSync(path)
    const headerBytes = Number(bytes.readBigUInt64LE(0))
    const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerBytes)) as Record<string, { data_offsets: number[] }>
    const at = 8 + headerBytes + (header['model.norm.weight']?.data_offsets[0] ?? NaN)
    bytes.writeUInt8(bytes.readUInt8(at + 1) ^ 1, at + 1)
    writeFileSync(path, bytes)
    const { ended, outcomes } = await job(
      2,
      `const engine = await initInference({ model: rank === 1 ? ${JSON.stringify(other)} : model, dtype: 'f32' })
      try { return await engine.complete({ ids: [5, 6] }, { maxNewTokens: 4, temperature: 0 }) } finally { await engine.close().catch(() => {}) }`,
    )
    for (const { code, message } of outcomes) {
      assert.equal(code, 'ERR_MISMATCH', message)
      assert.match(message ?? '', /parted at step 1: the hash of all hidden states so far is [0-9a-f]{16} on rank [01]/)
    }
    assert.equal(ended.code, 1)
  })

  for (const [name, options] of Object.entries({
    dtype: `{ model, dtype: rank === 0 ? 'f32' : 'bf16' }`,
    model: `{ model: rank === 0 ? model : demo }`,
    'number of sequences': `{ model, maxSequences: 4 + rank }`,
    'cache size': `{ model, kvCacheTokens: 512 + 32 * rank }`,
  })) {
    it(`refuses at the start ranks that differ in their ${name}`, async () => {
      const { ended, outcomes } = await job(2, `await initInference(${options})`)
      const codes = outcomes.map(({ code }) => code)
      assert.ok(codes.includes('ERR_MISMATCH'), JSON.stringify(outcomes))
      for (const code of codes) assert.ok(['ERR_MISMATCH', 'ERR_PEER_LOST', 'ERR_ABORTED'].includes(code ?? ''), code)
      assert.equal(ended.code, 1)
      assert.ok(ended.elapsedMs < 10_000)
    })
  }

  it('refuses a size that is not the number of ranks, naming both', async () => {
    // The first to say so may end the other before it has begun.
    const { path, outcomeOf } = script(`await initInference({ model, tensorParallel: { size: 3 } })`)
    const ended = await launch(['-n', '2', '--oversubscribe', path])
    assert.equal(ended.code, 1)
    const failed = Number(/rank (\d) of 2 .* failed first/.exec(ended.stderr)?.[1])
    const { code, message } = outcomeOf(failed)
    assert.equal(code, 'ERR_INVALID_OPTION')
    assert.match(message ?? '', /size is 3.*2 ranks/)
  })

  it('names the variable that a launcher left out', async () => {
    for (const [env, missing] of [
      [{ RANK: '0' }, 'WORLD_SIZE'],
      [{ WORLD_SIZE: '2' }, 'RANK'],
      [{ RANK: '0', WORLD_SIZE: '2' }, 'TILERANK_JOB'],
    ] as const) {
      const { path, outcomeOf } = script(`await initInference({ model })`)
      const ended = await run(node, [path], { env })
      assert.equal(ended.code, 1)
      const { code, message } = outcomeOf(Number('RANK' in env ? env.RANK : -1))
      assert.equal(code, 'ERR_ENVIRONMENT')
      assert.match(message ?? '', new RegExp(`^${missing} is missing`))
    }
  })

  it('needs no launcher to be one rank of one', async () => {
    const { path, outcomeOf } = script(`
      const engine = await initInference({ model, dtype: 'f32' })
      try { return (await engine.complete({ ids: [5] }, { maxNewTokens: 3, temperature: 0, ignoreEos: true })).ids.length } finally { await engine.close() }`)
    const env = { RANK: '0', WORLD_SIZE: '1' }
    const ended = await run(node, [path], { env })
    assert.equal(ended.code, 0, ended.stderr)
    assert.equal(outcomeOf(0).value, 3)
  })

  for (const early of [0, 1]) {
    it(`tells the other rank when rank ${String(early)} leaves early, by whatever way`, async () => {
      const { path, outcomeOf } = script(
        `const engine = await initInference({ model, dtype: 'f32' })
        if (rank === ${String(early)}) { setTimeout(() => process.exit(3), 100); await new Promise(() => {}) }
        try {
          for (;;) await engine.complete({ ids: [5] }, { maxNewTokens: 100, temperature: 0, ignoreEos: true })
        } finally { await engine.close().catch(() => {}) }`,
      )
      const ended = await launch(['-n', '2', '--oversubscribe', path])
      assert.equal(ended.code, 3)
      assert.ok(ended.elapsedMs < 8000, `it took ${String(ended.elapsedMs)} ms`)
      const other = outcomeOf(1 - early)
      assert.equal(other.code, 'ERR_PEER_LOST')
      assert.match(other.message ?? '', new RegExp(`rank ${String(early)}`))
      assert.deepEqual(await survivors([other.pid], 500), [])
    })
  }
})
