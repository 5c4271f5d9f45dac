// Batches of collectives between real processes: the bits of the single calls, whatever their mix, and one exchange for many.

import assert from 'node:assert/strict'
import { createGroup, type Batch, type Group } from '../../collectives/index.js'
import { rounds } from '../rounds.js'
import { ranksValues, runRanks } from '../ranks.js'

const cases = new URL('./batchCases.js', import.meta.url)

describe('batches', function () {
  this.timeout(60_000)

  for (const worldSize of [1, 2, 3, 5]) {
    for (const [length, most] of [
      [12, 40],
      [20, 700],
    ] as const) {
      it(`of ${String(length)} operations of up to ${String(most)} elements give what these give alone, with ${String(worldSize)} ranks`, async () => {
        const args = { seed: 7 + worldSize, batches: rounds({ quick: 30, long: 500 }), length, most }
        const values = await ranksValues(cases, 'random', {
          worldSize,
          args,
          timeoutMs: rounds({ quick: 30_000, long: 300_000 }),
        })
        for (const value of values) assert.ok((value as number) >= args.batches * length)
      }).timeout(rounds({ quick: 60_000, long: 310_000 }))
    }
  }

  for (const kind of ['count', 'dtype', 'op', 'root', 'order', 'large', 'length']) {
    it(`that differ in ${kind} are ERR_MISMATCH on all ranks`, async () => {
      const outcomes = await runRanks(cases, 'disagree', { worldSize: 3, args: { kind } })
      for (const outcome of outcomes) {
        assert.ok('value' in outcome, JSON.stringify(outcome))
        const { failure } = outcome.value as { failure: { code: string; message: string } }
        assert.equal(failure.code, 'ERR_MISMATCH', failure.message)
        assert.match(failure.message, /rank \d called batch of \d+ u8.*rank \d called batch of \d+ u8/)
      }
    })
  }

  it('of typed arrays cost less than their operations one by one', async () => {
    const [first] = (await ranksValues(cases, 'cost', { worldSize: 2 })) as { alone: number; batch: number }[]
    assert.ok(first !== undefined)
    const { alone, batch } = first
    if (this.ctx.test) this.ctx.test.title += `: ${batch.toFixed(1)} us, one by one ${alone.toFixed(1)} us`
    assert.ok(
      batch < alone,
      `32 allReduces of 64 bytes: ${String(batch)} us in a batch, ${String(alone)} us one by one`,
    )
  })

  describe('in a group of one', () => {
    let group: Group
    before(async () => (group = await createGroup({ env: {} })))
    after(async () => group.close())

    it('are refused where they make no sense, and then nothing of them has happened', async () => {
      const data = new Float32Array(8).fill(1)
      const refused = async (record: (b: Batch) => unknown, message: RegExp): Promise<void> => {
        const error = { code: 'ERR_INVALID_ARGUMENT', message }
        assert.throws(() => group.batchSync(record), error)
        await assert.rejects(group.batch(record), error)
      }
      await refused((b) => b.allReduce(data, { op: 'mean' as 'sum' }), /op is 'mean'/)
      await refused((b) => b.allReduce(data, { timeoutMs: 5 } as object), /no timeoutMs: say it to batch/)
      await refused((b) => b.allToAll(data, data, { counts: [8] } as object), /no option 'counts'/)
      await refused((b) => b.broadcast(data, { root: 1 }), /root is 1/)
      await refused((b) => b.allGather(data, new Float32Array(9)), /operation 0 of the batch: output must hold 8/)
      await refused((b) => b.allReduce(new Uint16Array(4)), /say \{ dtype/)
      await refused((b) => {
        b.broadcast(new Float32Array(1))
        b.allReduce(data.subarray(0, 5))
        b.allReduce(data.subarray(4))
      }, /operations 1 and 2 of the batch share memory that one of them writes/)
      await refused((b) => {
        b.allReduce(data, { output: new Float32Array(8) })
        b.allGather(new Float32Array(8), data)
      }, /operations 0 and 1 of the batch share memory/)
      await refused(async (b) => {
        b.allReduce(data)
        await Promise.resolve()
      }, /awaits nothing/)
      assert.throws(() => group.batchSync(() => undefined, { dtype: 'f32' } as object), {
        message: /no option 'dtype'/,
      })
      let kept: Batch | undefined
      group.batchSync((b) => (kept = b))
      assert.throws(() => kept?.barrier(), { code: 'ERR_INVALID_ARGUMENT', message: /under way/ })
      assert.deepEqual(data, new Float32Array(8).fill(1))
    })

    it('may be empty, and may read the same memory twice', async () => {
      await group.batch(() => undefined)
      const data = Float32Array.of(1, 2)
      const outputs = [new Float32Array(2), new Float32Array(2)] as const
      group.batchSync((b) => {
        b.allReduce(data, { output: outputs[0] })
        b.allGather(data, outputs[1])
      })
      assert.deepEqual(outputs, [data, data])
    })
  })
})
