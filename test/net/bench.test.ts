import assert from 'node:assert/strict'
import { createLab, labObstacle } from '../../bench/lab.js'
import { benchNetwork, formatNetwork, rawExchange } from '../../bench/network.js'
import { benchWire, formatWire } from '../../bench/wire.js'
import { pause } from '../launcher/processes.js'
import { unavailable } from '../unavailable.js'

describe('benchmarks between nodes', () => {
  beforeEach(function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) unavailable(this, obstacle)
  })

  it('time allReduce beside a raw exchange of zeromq.js, of every size, encryption and number of ranks', async function () {
    this.timeout(120_000)
    await using lab = await createLab()
    const bytes = [8, 100_000]
    const rows = await benchNetwork({ lab, bytes, ranksPerNode: [1, 2], trials: 1, samples: 20 })
    assert.deepEqual(
      rows.map((row) => [row.encryption, row.bytes, row.ranksPerNode]),
      (['none', 'curve'] as const).flatMap((encryption) =>
        bytes.flatMap((size) => [1, 2].map((ranks) => [encryption, size, ranks])),
      ),
    )
    for (const row of rows) {
      assert(row.oursUs > 0 && row.rawUs > 0)
      assert.equal(row.ratio, row.oursUs / row.rawUs)
      assert.match(row.rawSockets, /^(PAIR|DEALER\/ROUTER)$/)
      if (row.ranksPerNode === 1) assert.equal(row.toFirst, 1)
    }
    assert.equal(formatNetwork(rows).split('\n').length, rows.length + 2)
  })

  it('time wire q8 beside exact sums, and count what leaves the node', async function () {
    this.timeout(60_000)
    await using lab = await createLab({ rateMbit: 1000 })
    const rows = await benchWire({ lab, bytes: [65_536], samples: 3 })
    const [row] = rows
    assert(row !== undefined && rows.length === 1)
    assert(row.exactSentBytes > 65_536 && row.exactSentBytes < 1.2 * 65_536)
    assert(row.q8SentBytes > (65_536 * 36) / 128 && row.q8SentBytes < 1.2 * ((65_536 * 36) / 128))
    assert(row.q8Error > 0 && row.exactUs > 0 && row.q8Us > 0)
    assert.equal(formatWire(rows).split('\n').length, 2)
  })

  it('fail when a side is lost', async () => {
    const lab = await createLab()
    try {
      const lost = rawExchange(lab, [{ bytes: 8, warmUps: 1, samples: 1e6 }], 'none')
      const rejects = assert.rejects(lost, /rank [01] of the raw exchange failed \(SIGKILL\)/)
      await pause(300)
      await lab.close()
      await rejects
    } finally {
      await lab.close()
    }
  })
})
