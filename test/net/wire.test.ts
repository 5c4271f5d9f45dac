// wire: 'q8': sums that travel between nodes in groups of 32 with a scale, against a reference that is written apart from the kernels.

import assert from 'node:assert/strict'
import { ranksValues, runRanks } from '../ranks.js'
import { isLong } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle, type Lab, type LabNode } from '../../bench/lab.js'

const cases = new URL('./wireCases.js', import.meta.url)
const storePort = 29_613
const secret = 'a5'.repeat(32)

describe("wire 'q8'", function () {
  this.timeout(60_000)

  it('leaves a group on one node exact, and is refused where it has no meaning', async () => {
    await ranksValues(cases, 'onOneNode', { worldSize: 2 })
  })

  it('must be the same on all ranks of a node too', async () => {
    for (const outcome of await runRanks(cases, 'disagrees', { worldSize: 2, args: { options: {} } })) {
      const { code, message } = outcome.value as { code: string; message: string }
      assert.equal(code, 'ERR_MISMATCH')
      assert.match(message, /wire q8/)
    }
  })

  describe('across nodes', () => {
    let lab: Lab
    before(async function () {
      const obstacle = labObstacle()
      if (obstacle !== undefined) return unavailable(this, obstacle)
      lab = await createLab({ nodes: 3 })
    })
    after(async () => {
      await (lab as Lab | undefined)?.close()
    })

    /** shape: [nodes][ranks] */
    const place = (shape: readonly (readonly number[])[], nodes = lab.nodes) => ({
      worldSize: shape.flat().length,
      on: (rank: number): LabNode => {
        const node = nodes[shape.findIndex((ranks) => ranks.includes(rank))]
        assert.ok(node !== undefined)
        return node
      },
      env: () => ({
        TILERANK_STORE: `${nodes[0]?.address ?? ''}:${storePort}`,
        TILERANK_SECRET_FILE: undefined,
        TILERANK_JOB: undefined,
        TILERANK_ALGORITHM: undefined,
      }),
    })

    for (const shape of [
      [[0], [1]],
      [
        [0, 2],
        [1, 3],
      ],
      [[0, 1], [2], [3]],
    ]) {
      it(`gives the bits of its definition on every rank of ${JSON.stringify(shape)}`, async () => {
        const args = { counts: isLong ? [449, 1000, 4096, 10_007, 70_001] : [449, 10_007], secret }
        const values = (await ranksValues(cases, 'quantised', { ...place(shape), args })) as {
          digests: string[]
          wire: string
        }[]
        const [first] = values
        assert.equal(first?.wire, 'q8')
        for (const value of values) assert.deepEqual(value, first)
        const of = (algorithm: string): string[] =>
          first.digests.filter((one) => one.includes(algorithm)).map((one) => one.replace(algorithm, ''))
        assert.deepEqual(of('leader'), of('splitRail'), 'one rounding more is that of twoStep alone')
        assert.notDeepEqual(of('leader'), of('twoStep'))
      })
    }

    for (const [what, options] of [
      ['calls', {}],
      ['options', { 1: { wire: 'q8' } }],
    ] as const) {
      it(`ranks whose ${what} differ get ERR_MISMATCH`, async () => {
        const outcomes = await runRanks(cases, 'disagrees', { ...place([[0], [1]]), args: { options, secret } })
        for (const outcome of outcomes) {
          const { code, message } = outcome.value as { code: string; message: string }
          assert.equal(code, 'ERR_MISMATCH', message)
          assert.match(message, /wire q8/)
        }
      })
    }
  })
})
