import assert from 'node:assert/strict'
import { rawExchange } from '../../bench/zeromqRaw.js'
import { pause } from '../launcher/processes.js'
import { unavailable } from '../unavailable.js'
import { createLab, labObstacle } from './lab.js'

describe('the raw exchange of zeromq.js, which ours is measured against', () => {
  beforeEach(function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) unavailable(this, obstacle)
  })

  it('times every size, plain and encrypted, and names the faster sockets', async () => {
    await using lab = await createLab()
    for (const curve of [false, true]) {
      const rows = await rawExchange({
        lab,
        nbytes: [1, 100_000],
        curve,
        samples: (nbytes) => (nbytes === 1 ? 20 : 10),
      })
      assert.deepEqual(
        rows.map(({ nbytes, samples, curve }) => ({ nbytes, samples, curve })),
        [
          { nbytes: 1, samples: 20, curve },
          { nbytes: 100_000, samples: 10, curve },
        ],
      )
      for (const row of rows) {
        assert.match(row.sockets, /^(PAIR|DEALER\/ROUTER)$/)
        assert(row.minUs > 0 && row.minUs <= row.p50Us && row.p50Us <= row.p99Us && row.p50Us <= row.otherP50Us)
      }
    }
  })

  it('fails when a side is lost', async () => {
    const lab = await createLab()
    try {
      const lost = rawExchange({ lab, nbytes: [8], curve: false, samples: () => 1e6 })
      const rejects = assert.rejects(lost, /rank [01] of the raw exchange failed \(SIGKILL\)/)
      await pause(300)
      await lab.close()
      await rejects
    } finally {
      await lab.close()
    }
  })
})
