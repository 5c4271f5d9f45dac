// Many steps with requests that come, go and are aborted. The requests and what becomes of each follow from the seed alone; every
// one that finishes must have the tokens that it has alone, and nothing may grow: memory, descriptors, threads.

import assert from 'node:assert/strict'
import { readFileSync, readdirSync } from 'node:fs'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { initInference, type Engine, type GenerateOptions } from '../../tp/index.js'
import { drawAt } from '../../tp/random.js'
import { pause } from '../launcher/processes.js'
import { rounds } from '../rounds.js'
import { testModel } from './files.js'

const seed = 20_240_607
const vocabSize = 320
const options = {
  model: testModel('llama'),
  dtype: 'f32',
  tensorParallel: { size: 2 },
  // Fewer sequences and less cache than are asked for: requests wait; prompts go in chunks, beside others' tokens.
  maxSequences: 5,
  kvCacheTokens: 512,
  maxStepTokens: 40,
} as const

/** A number of [0, count) that request `number` has for `what`. */
const pick = (number: number, what: number, count: number): number => Math.floor(drawAt(seed, number, what) * count)

interface Asked {
  readonly ids: readonly number[]
  readonly options: GenerateOptions
}

/** So many different requests are asked for again and again; greedy, so that it does not matter when. */
const shapes = 48
function greedyRequest(shape: number): Asked {
  const length = 1 + pick(shape, 0, 90)
  const penalty = pick(shape, 1, 4) === 0 ? { repetitionPenalty: 1.3 } : {}
  return {
    ids: Array.from({ length }, (_, i) => 3 + pick(shape, 10 + i, vocabSize - 3)),
    options: { maxNewTokens: 1 + pick(shape, 2, 60), temperature: 0, ignoreEos: true, ...penalty },
  }
}

const fates = ['finish', 'finish', 'finish', 'finish', 'leave', 'signal', 'signal at once', 'sample'] as const

interface Usage {
  readonly rssMiB: number
  readonly descriptors: number
  readonly threads: number
}
function usageOf(pid: number): Usage {
  const kib = Number(/^VmRSS:\s*(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1])
  return {
    rssMiB: kib / 1024,
    descriptors: readdirSync(`/proc/${pid}/fd`).length,
    threads: readdirSync(`/proc/${pid}/task`).length,
  }
}

// A heap that is collected only when it must be says nothing in an hour: the client's is collected before each look. The ranks'
// heaps are small beside what they map.
setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? NaN

describe('soak', function () {
  const wantedSteps = rounds({ quick: 2000, long: 100_000 })
  this.timeout(rounds({ quick: 60_000, long: 1_800_000 }))

  it(`gives every request its own tokens over ${String(wantedSteps)} steps, and grows in nothing`, async () => {
    const alone: (readonly number[])[] = []
    const single = await initInference(options)
    try {
      for (let shape = 0; shape < shapes; shape++) {
        const { ids, options: asked } = greedyRequest(shape)
        alone.push((await single.complete({ ids }, asked)).ids)
      }
    } finally {
      await single.close()
    }

    const engine = await initInference(options)
    const counts = { finished: 0, aborted: 0, sampled: 0 }
    const sampled: { readonly call: number; readonly shape: number; readonly ids: readonly number[] }[] = []
    let next = 0
    let calls = 0
    let steps = 0
    const useOne = async (number: number): Promise<void> => {
      const shape = pick(number, 3, shapes)
      const fate = fates[pick(number, 4, fates.length)]
      const { ids, options: greedy } = greedyRequest(shape)
      const prompt = { ids }
      const abortAt = 1 + pick(number, 5, greedy.maxNewTokens ?? 1)
      if (pick(number, 6, 40) === 0) await pause(pick(number, 7, 4))
      // As the engine counts: in the order of the calls.
      const call = calls++
      switch (fate) {
        case 'finish':
          assert.deepEqual((await engine.complete(prompt, greedy)).ids, alone[shape], `request ${String(number)}`)
          counts.finished++
          return
        case 'sample': {
          const drawn = await engine.complete(prompt, { ...greedy, ...sampling })
          if (sampled.length < 100) sampled.push({ call, shape, ids: drawn.ids })
          counts.sampled++
          return
        }
        default: {
          const controller = new AbortController()
          const got: number[] = []
          if (fate === 'signal at once') setImmediate(() => controller.abort('enough'))
          try {
            for await (const piece of engine.generate(prompt, { ...greedy, signal: controller.signal })) {
              got.push(...piece.ids)
              if (got.length < abortAt) continue
              if (fate === 'leave') break
              controller.abort('enough')
            }
          } catch (error) {
            assert.equal(error, 'enough')
          }
          // What had come by then was right.
          assert.deepEqual(got, alone[shape]?.slice(0, got.length), `request ${String(number)}, ended early`)
          counts.aborted++
        }
      }
    }
    try {
      const pids = [process.pid, ...(await engine.reports()).map(({ pid }) => pid)]
      const samples: Usage[][] = []
      // Seven at a time, then none: all that a batch took must be back.
      while (steps < wantedSteps) {
        const end = next + 60
        const worker = async (): Promise<void> => {
          while (next < end) await useOne(next++)
        }
        await Promise.all(Array.from({ length: 7 }, worker))
        steps = (await engine.reports())[0]?.steps ?? NaN
        collect()
        samples.push(pids.map(usageOf))
      }
      const reports = await engine.reports()
      assert.equal(new Set(reports.map(({ stateHash }) => stateHash)).size, 1)
      assert.ok(counts.finished > 50 && counts.aborted > 20 && counts.sampled > 5, JSON.stringify(counts))

      // The first third is warm-up: heaps find their size, code is compiled.
      const settled = samples.slice(Math.floor(samples.length / 3))
      const half = Math.ceil(settled.length / 2)
      const growth: number[] = []
      for (const [i, pid] of pids.entries()) {
        const of = (part: readonly Usage[][], key: keyof Usage): number => median(part.map((s) => s[i]?.[key] ?? NaN))
        const [early, late] = [settled.slice(0, half), settled.slice(-half)]
        const whose = i === 0 ? 'the client' : `rank ${String(i - 1)}`
        growth.push(of(late, 'rssMiB') - of(early, 'rssMiB'))
        assert.ok(
          (growth[i] ?? NaN) < rounds({ quick: 24, long: 12 }),
          `${whose} (process ${String(pid)}) grew by ${String(growth[i])} MiB: ${samples.map((s) => s[i]?.rssMiB.toFixed(0)).join(' ')}`,
        )
        for (const key of ['descriptors', 'threads'] as const)
          assert.equal(of(late, key), of(early, key), `${key} of ${whose}`)
      }
      if (rounds({ quick: false, long: true })) {
        process.stdout.write(
          `      ${String(steps)} steps, ${String(next)} requests (${JSON.stringify(counts)}), growth ${growth.map((mib) => mib.toFixed(1)).join(', ')} MiB\n`,
        )
      }
    } finally {
      await engine.close()
    }
    await checkSampled(sampled)
  })
})

const sampling = { temperature: 1.1, topK: 30, seed: 77 } as const

/** Draws depend on which call of the engine it was: the same call in an engine that runs nothing beside it. */
async function checkSampled(
  sampled: readonly { readonly call: number; readonly shape: number; readonly ids: readonly number[] }[],
): Promise<void> {
  const engine: Engine = await initInference(options)
  try {
    let call = 0
    for (const { call: wanted, shape, ids } of [...sampled].sort((a, b) => a.call - b.call)) {
      for (; call < wanted; call++) await engine.complete({ ids: [1] }, { maxNewTokens: 0 })
      const { ids: prompt, options: greedy } = greedyRequest(shape)
      const again = await engine.complete({ ids: prompt }, { ...greedy, ...sampling })
      assert.deepEqual(again.ids, ids, `call ${String(wanted)}, drawn again alone`)
      call++
    }
  } finally {
    await engine.close()
  }
}
