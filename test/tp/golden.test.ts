// Whole engines - processes, arena, kernels, scheduler - against answers computed in float64.

import assert from 'node:assert/strict'
import { initInference } from '../../tp/index.js'
import {
  decodeF32,
  largestDifference,
  logitTolerance,
  modelFolders,
  readGolden,
  tokensThatMustAgree,
} from './golden.js'

for (const [name, folder] of Object.entries(modelFolders)) {
  describe(`the model ${name}`, function () {
    this.timeout(120_000)
    if (folder === null) {
      it.skip('is not on this machine')
      return
    }
    const golden = readGolden(folder)
    for (const dtype of ['f32', 'bf16'] as const) {
      for (const size of [1, 2, 3, 4]) {
        it(`gives the golden logits and tokens in ${dtype} on ${String(size)} ranks, alone and in a batch`, async () => {
          const engine = await initInference({ model: folder, dtype, tensorParallel: { size }, maxStepTokens: 64 })
          try {
            const alone: Float32Array[] = []
            for (const [i, prompt] of golden.prompts.entries()) {
              const { logits } = await engine.complete(
                { ids: prompt.ids },
                { maxNewTokens: 1, temperature: 0, wantLogits: true },
              )
              const reference = decodeF32(prompt.last_logits.f32)
              assert.ok(logits)
              alone.push(logits)
              const difference = largestDifference(logits, reference)
              const tolerance = logitTolerance(golden, reference, dtype)
              assert.ok(
                difference <= tolerance,
                `prompt ${String(i)}: off by ${String(difference)}, allowed is ${String(tolerance)}`,
              )
            }
            let checked = 0
            await Promise.all(
              golden.greedy.map(async (greedy) => {
                const count = tokensThatMustAgree(greedy, dtype)
                const { ids } = await engine.complete(
                  { ids: golden.prompts[greedy.prompt]?.ids ?? [] },
                  { maxNewTokens: greedy.max_new_tokens, temperature: 0, eosIds: greedy.eos_token_id },
                )
                assert.deepEqual(
                  ids.slice(0, count),
                  greedy.ids.slice(0, count),
                  `greedy run of prompt ${String(greedy.prompt)}`,
                )
                if (dtype === 'f32' && count > 0) assert.equal(ids.length, greedy.ids.length)
                checked += count
              }),
            )
            assert.ok(checked > 0, 'no greedy run was checked')
            const batch = await Promise.all(
              golden.batch.prompts.map((i) =>
                engine.complete(
                  { ids: golden.prompts[i]?.ids ?? [] },
                  { maxNewTokens: 1, temperature: 0, wantLogits: true },
                ),
              ),
            )
            for (const [row, { logits }] of batch.entries()) {
              const i = golden.batch.prompts[row] ?? -1
              const reference = decodeF32(golden.prompts[i]?.last_logits.f32 ?? '')
              assert.ok(logits)
              assert.ok(
                largestDifference(logits, reference) <= logitTolerance(golden, reference, dtype),
                `batch row ${String(row)}`,
              )
            }
            // A rank may still be leaving the step whose tokens have arrived: wait until all have counted it.
            let reports = await engine.reports()
            while (new Set(reports.map((report) => report.steps)).size > 1) reports = await engine.reports()
            const hashes = new Set(reports.map((report) => report.stateHash))
            assert.equal(hashes.size, 1, 'ranks hold different bits')

            // The same bits again in a run that is alone.
            const [first] = golden.prompts
            const again = await engine.complete(
              { ids: first?.ids ?? [] },
              { maxNewTokens: 1, temperature: 0, wantLogits: true },
            )
            assert.deepEqual(again.logits, alone[0])
          } finally {
            await engine.close()
          }
        })
      }
    }

    const { perplexity } = golden
    if (perplexity) {
      it('gives the golden negative log-probabilities in f32 on 2 ranks', async () => {
        const engine = await initInference({
          model: folder,
          dtype: 'f32',
          tensorParallel: { size: 2 },
          maxSequences: 16,
        })
        try {
          // Each position is a prompt of its own; of a long text every seventh.
          const { ids, nll } = perplexity
          const positions = nll.map((_, i) => i).filter((i) => nll.length <= 200 || i % 7 === 3)
          const given = await Promise.all(
            positions.map(async (i) => {
              const { logits } = await engine.complete(
                { ids: ids.slice(0, i + 1) },
                { maxNewTokens: 0, wantLogits: true },
              )
              assert.ok(logits)
              const max = logits.reduce((a, b) => Math.max(a, b))
              const sum = logits.reduce((total, x) => total + Math.exp(x - max), 0)
              return max + Math.log(sum) - (logits[ids[i + 1] ?? -1] ?? NaN)
            }),
          )
          const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length
          const expected = mean(positions.map((i) => nll[i] ?? NaN))
          assert.ok(positions.length >= 50)
          assert.ok(
            Math.abs(mean(given) - expected) <= 1e-4,
            `mean is ${String(mean(given))}, golden is ${String(expected)}`,
          )
        } finally {
          await engine.close()
        }
      })
    }
  })
}
