// A sample of the strikes at every step of every algorithm; all of them with TILERANK_TEST=long.

import assert from 'node:assert/strict'
import { rounds } from '../rounds.js'
import { strikeSteps } from './steps.js'

describe('faults at the steps of algorithms', function () {
  this.timeout(rounds({ quick: 300_000, long: 5_400_000 }))

  it('are the right error on every survivor, leave nothing, and a new group works in the same processes', async () => {
    const every = rounds({ quick: 331, long: 1 })
    const { rows, problems } = await strikeSteps(every)
    assert.equal(problems, '')
    assert.ok(rows.reduce((sum, { times }) => sum + times, 0) >= 50)
    for (const row of rows) {
      assert.equal(row.right + row.misnamed, row.times, JSON.stringify(row))
      assert.equal(row.left, 0, JSON.stringify(row))
      if (row.fault !== 'SIGSTOP') assert.equal(row.misnamed, 0, JSON.stringify(row))
    }
  })
})
