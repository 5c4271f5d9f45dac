// The simulator: results of every operation on many machines, times against closed forms, and what happens when ranks do not come.

import assert from 'node:assert/strict'
import { fileURLToPath } from 'node:url'
import {
  compareAlgorithms,
  defaultMachine,
  linkPresets,
  operationNames,
  simulate,
  type Machine,
  type SimulateOptions,
} from '../../collectives/index.js'
import { node, run, type Ended } from '../launcher/processes.js'
import { isLong, rounds } from '../rounds.js'

const nodes = (count: number, ranks: number): number[] => Array.from({ length: count }, () => ranks)
const shapes: Readonly<Record<string, readonly number[]>> = {
  '1 x 1': [1],
  '1 x 2': [2],
  '1 x 5': [5],
  '2 x 1': nodes(2, 1),
  '2 x 2': nodes(2, 2),
  '2, 1, 3 ranks': [2, 1, 3],
  '3 x 1': nodes(3, 1),
  '4 x 8': nodes(4, 8),
  '16 x 8': nodes(16, 8),
}

/** Memory and flags take no time: what is left is the network. */
const networkOnly = { ...defaultMachine, coreNs: 0, socketNs: 0, memoryNsPerByte: 1e-9 }
const us = (machine: Machine, bytes: number, algorithm: string, more: Partial<SimulateOptions> = {}): number =>
  simulate(machine, { operation: 'allReduce', bytes, algorithm, ...more }).us
const near = (actual: number, expected: number, tolerance: number): void => {
  assert.ok(Math.abs(actual / expected - 1) <= tolerance, `${String(actual)} us, expected are ${String(expected)}`)
}

describe('simulate: results', () => {
  for (const [name, ranks] of Object.entries(shapes)) {
    it(`every operation is right on every rank: ${name}`, () => {
      const machine = { ...defaultMachine, ranks, sockets: ranks[0] === 8 ? 2 : 1 }
      const world = ranks.reduce((a, b) => a + b, 0)
      const isSmall = world < 32 || isLong
      for (const operation of operationNames) {
        for (const dtype of ['f32', 'bf16'] as const) {
          for (const bytes of isSmall ? [0, 4, 5000, 300_000] : [70_000]) {
            const { rows } = compareAlgorithms(machine, {
              operation,
              bytes,
              dtype,
              root: world - 1,
              calls: isSmall ? 3 : 2,
            })
            assert.ok(rows.length >= 1)
          }
        }
      }
    })
  }

  it('pipelines of many chunks and frames are right', () => {
    for (const ranks of [[3], nodes(2, 1), [2, 1, 2]]) {
      for (const operation of operationNames) {
        const call = { operation, bytes: 5 << 20, calls: 2, root: 1 } as const
        assert.ok(compareAlgorithms({ ...defaultMachine, ranks }, call).rows.length >= 1)
        const small = { ...call, bytes: 300_000, chunkBytes: 8192 }
        assert.ok(compareAlgorithms({ ...defaultMachine, ranks }, small).rows.length >= 1)
      }
    }
  })

  it('a wrong result is found, in every operation', () => {
    for (const ranks of [[3], [2, 1]]) {
      for (const operation of operationNames.filter((one) => one !== 'barrier')) {
        assert.throws(() => simulate({ ...defaultMachine, ranks }, { operation, bytes: 3000, spoiled: 1, root: 1 }), {
          code: 'ERR_INTERNAL',
          message: new RegExp(`^${operation} gave a wrong result: rank \\d, element \\d+ of call 0$`),
        })
      }
    }
  })

  it('two runs are the same to the last figure', () => {
    const machine = { ...defaultMachine, ranks: [3, 2, 4], sockets: 2, cores: 2, frameNs: 700 }
    for (const operation of operationNames) {
      const call = { operation, bytes: 700_000, calls: 2 }
      assert.deepEqual(compareAlgorithms(machine, call), compareAlgorithms(machine, call))
    }
  })

  // Half a minute.
  const longIt = isLong ? it : (): void => undefined
  longIt('1024 ranks on 128 nodes', function (this: Mocha.Context) {
    this.timeout(600_000)
    const machine = { ...defaultMachine, ranks: nodes(128, 8) }
    for (const algorithm of ['leader', 'splitRail', 'twoStep']) {
      const row = simulate(machine, { operation: 'allReduce', bytes: 16 << 10, algorithm })
      assert.equal(row.algorithm, algorithm)
    }
    assert.equal(us(machine, 1 << 20, 'twoStep') > 0, true)
  })
})

describe("simulate: wire 'q8'", () => {
  it('is within its bound and the same on all ranks, and sends 36 bytes for 32 elements', () => {
    for (const ranks of [[2], nodes(2, 1), [2, 1, 3], nodes(8, 2), nodes(16, 4)]) {
      for (const dtype of ['f32', 'bf16'] as const) {
        for (const bytes of [0, 4, 124, 4100, 300_000]) {
          const call = { operation: 'allReduce', bytes, dtype, calls: 2, wire: 'q8' } as const
          const { rows } = compareAlgorithms({ ...defaultMachine, ranks }, call)
          assert.equal(rows.length, 3)
        }
      }
    }
    const row = simulate(
      { ...defaultMachine, ranks: nodes(2, 1) },
      { operation: 'allReduce', bytes: 4 * 320, algorithm: 'splitRail', wire: 'q8' },
    )
    assert.equal(row.rankBytes, 360)
  })

  it('a result that is off, and one that differs between ranks, are found', () => {
    for (const algorithm of ['leader', 'splitRail', 'twoStep']) {
      for (const dtype of ['f32', 'bf16'] as const) {
        const call = { operation: 'allReduce', bytes: 4096, algorithm, dtype, wire: 'q8' } as const
        const machine = { ...defaultMachine, ranks: [2, 1] }
        assert.throws(() => simulate(machine, { ...call, spoiled: 1 }), {
          code: 'ERR_INTERNAL',
          message: /^allReduce gave a wrong result: rank \d, element \d+ of call 0$/,
        })
        for (const differing of [0, 1, 2]) {
          assert.throws(() => simulate(machine, { ...call, differing }), {
            code: 'ERR_INTERNAL',
            message: /^ranks have different bits: rank \d and rank \d, call 0$/,
          })
        }
      }
    }
  })

  it('is for allReduce', () => {
    const machine = { ...defaultMachine, ranks: nodes(2, 1) }
    for (const wrong of [
      { operation: 'reduce', bytes: 100, wire: 'q8' },
      { operation: 'allReduce', bytes: 100, wire: 'q4' as 'q8' },
    ] as const)
      assert.throws(() => simulate(machine, wrong), { code: 'ERR_INVALID_ARGUMENT' })
  })
})

describe('simulate: times', () => {
  it('one exchange between nodes takes latency + (K - 1) S per byte, whole or by rails', () => {
    for (const { linkNs, linkNsPerByte } of Object.values(linkPresets)) {
      for (const count of [2, 3, 8]) {
        const bytes = 64 * 4 * 8 * 10
        const expected = (linkNs + (count - 1) * bytes * linkNsPerByte) / 1000
        const machine = { ...networkOnly, linkNs, linkNsPerByte, ranks: nodes(count, 1) }
        near(us(machine, bytes, 'splitRail'), expected, 1e-6)
        near(us(machine, bytes, 'leader'), expected, 1e-6)
        near(us({ ...machine, ranks: nodes(count, 4) }, bytes, 'splitRail'), expected, 1e-6)
      }
    }
  })

  it('two steps take 2 latencies + 2 (K - 1) / K S per byte', () => {
    for (const count of [2, 4, 8]) {
      const bytes = 64 * 4 * count * 4 * 3
      const step = ((count - 1) / count) * bytes * defaultMachine.linkNsPerByte
      const latencies = 2 * defaultMachine.linkNs
      near(us({ ...networkOnly, ranks: nodes(count, 1) }, bytes, 'twoStep'), (latencies + 2 * step) / 1000, 1e-6)
      // Of four rails the first begins its second step when a quarter of the first is through.
      near(us({ ...networkOnly, ranks: nodes(count, 4) }, bytes, 'twoStep'), (latencies + 1.25 * step) / 1000, 1e-6)
    }
  })

  it('what is pipelined runs at the speed of the link', () => {
    const machine = { ...networkOnly, ranks: nodes(2, 1) }
    const bytes = 64 << 20
    near(us(machine, bytes, 'splitRail'), (bytes * machine.linkNsPerByte) / 1000, 0.02)
    near(
      us({ ...networkOnly, ranks: nodes(4, 1) }, bytes, 'twoStep'),
      (1.5 * bytes * machine.linkNsPerByte) / 1000,
      0.02,
    )
  })

  it('a reduce to one node ends when its NIC has taken all', () => {
    const machine = { ...networkOnly, ranks: nodes(9, 1) }
    const bytes = 128 << 10
    const { us: actual } = simulate(machine, { operation: 'reduce', bytes })
    near(actual, (machine.linkNs + 8 * bytes * machine.linkNsPerByte) / 1000, 1e-6)
  })

  it('in a node, bytes that are moved and latencies add up', () => {
    const ranks = 4
    const bytes = 64 << 10
    const machine = { ...defaultMachine, ranks: [ranks] }
    const { coreNs: latency, memoryNsPerByte } = machine
    const whole = bytes * memoryNsPerByte
    const slice = whole / ranks
    near(us(machine, bytes, 'oneShot'), (2 * whole + latency + (ranks + 1) * whole) / 1000, 1e-4)
    const inPlace = 2 * latency + (ranks + 1) * slice + 2 * (ranks - 1) * slice
    near(us(machine, bytes, 'twoShotInPlace'), inPlace / 1000, 1e-4)
    const twoShot = 2 * whole + latency + (ranks + 1) * slice + Math.max(latency, 2 * slice) + 2 * (ranks - 1) * slice
    near(us(machine, bytes, 'twoShot'), twoShot / 1000, 1e-4)
  })

  it('sockets share the link between them', () => {
    const bytes = 64 << 10
    const machine = { ...defaultMachine, ranks: [2], sockets: 2, socketNsPerByte: 1 }
    const row = simulate(machine, { operation: 'allReduce', bytes, algorithm: 'oneShot' })
    assert.equal(row.socketBytes, bytes)
    near(row.us, (2 * bytes * machine.memoryNsPerByte + machine.socketNs + bytes) / 1000, 1e-4)
    // Two ranks of each socket read those of the other, both.
    const four = us({ ...machine, ranks: [4] }, bytes, 'oneShot')
    near(four, (2 * bytes * machine.memoryNsPerByte + machine.socketNs + 4 * bytes) / 1000, 1e-4)
  })

  it('ranks on one core take turns', () => {
    const call = { operation: 'allReduce', bytes: 1 << 20, algorithm: 'oneShot' } as const
    const alone = simulate({ ...defaultMachine, ranks: [4] }, call).us
    const shared = simulate({ ...defaultMachine, ranks: [4], cores: 1, switchNs: 0 }, call).us
    near(shared, 4 * alone, 0.01)
    assert.ok(simulate({ ...defaultMachine, ranks: [4], cores: 1, switchNs: 50_000 }, call).us > shared + 4 * 50)
  })

  it('a network thread that takes time for each frame makes many small frames dear', () => {
    const machine = { ...networkOnly, ranks: nodes(9, 1), frameNs: 3000 }
    // Eight frames out one after the other, the last one then waits for nobody.
    near(us(machine, 0, 'leader'), (machine.linkNs + 9 * 3000) / 1000, 0.15)
    assert.equal(us({ ...machine, frameNs: 0 }, 0, 'leader'), machine.linkNs / 1000)
  })

  it('counts steps, frames and bytes', () => {
    const bytes = 64 * 4 * 8 * 4
    const row = simulate(
      { ...defaultMachine, ranks: nodes(4, 2) },
      { operation: 'allReduce', bytes, algorithm: 'twoStep' },
    )
    assert.deepEqual(
      [row.syncs, row.hops, row.frames, row.rankBytes, row.nicBytes, row.networkBytes],
      [2, 2, 6, (bytes / 2) * 1.5, bytes * 1.5, bytes * 1.5 * 4],
    )
  })
})

describe('simulate: the choice of algorithm', () => {
  it('tells where the rules choose another one than the fastest', () => {
    // A link on which a step takes far longer than the rules reckon with.
    const machine = { ...defaultMachine, ranks: nodes(8, 4), ...linkPresets['100gbe'] }
    const { rows, verdicts } = compareAlgorithms(machine, { operation: 'allReduce', bytes: 16_384 })
    assert.deepEqual(
      rows.map(({ algorithm }) => algorithm),
      ['leader', 'splitRail', 'twoStep'],
    )
    const [verdict] = verdicts
    assert.deepEqual([verdict?.memory, verdict?.fastest, verdict?.chosen], ['any', 'splitRail', 'twoStep'])
    assert.ok((verdict?.ratio ?? 0) > 1.5)
  })

  it('across nodes the defaults are near the fastest, on every link', () => {
    const grid = rounds({
      quick: { nodes: [2, 3, 8, 16], ranks: [1, 4], bytes: [64, 4096, 16_384, 65_536, 524_288], mostBytes: 8 << 20 },
      long: {
        nodes: [2, 3, 4, 8, 16, 32, 64, 128],
        ranks: [1, 2, 4, 8],
        bytes: [64, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 1 << 20, 4 << 20, 16 << 20],
        mostBytes: 128 << 20,
      },
    })
    const ratios: number[] = []
    for (const nodeCount of grid.nodes) {
      for (const ranks of grid.ranks) {
        for (const link of ['10gbe', '100gbe', 'rdma100'] as const) {
          for (const bytes of grid.bytes.filter((size) => size * nodeCount * ranks <= grid.mostBytes)) {
            for (const dtype of ['f32', 'bf16'] as const) {
              const machine = { ...defaultMachine, ranks: nodes(nodeCount, ranks), ...linkPresets[link] }
              const { verdicts } = compareAlgorithms(machine, { operation: 'allReduce', bytes, dtype, env: {} })
              const ratio = verdicts[0]?.ratio ?? NaN
              assert.ok(ratio <= 1.7, `${nodeCount} x ${ranks}, ${link}, ${bytes} bytes, ${dtype}: ${ratio}`)
              ratios.push(ratio)
            }
          }
        }
      }
    }
    const mean = Math.exp(ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / ratios.length)
    assert.ok(mean <= 1.06, `${mean} in the mean`)
  })

  it('knows tensors and arrays in a node, and rules of the environment', () => {
    const call = { operation: 'allReduce', bytes: 1 << 20, env: {} } as const
    const machine = { ...defaultMachine, ranks: [8] }
    assert.deepEqual(compareAlgorithms(machine, call).verdicts, [
      { memory: 'tensor', fastest: 'twoShotInPlace', chosen: 'twoShotInPlace', ratio: 1 },
      { memory: 'array', fastest: 'twoShot', chosen: 'twoShot', ratio: 1 },
    ])
    const ruled = compareAlgorithms(machine, { ...call, env: { TILERANK_ALGORITHM: 'allReduce=oneShot' } })
    assert.deepEqual(
      ruled.verdicts.map(({ chosen }) => chosen),
      ['oneShot', 'oneShot'],
    )
  })
})

describe('simulate: what cannot end', () => {
  it('says who waits for whom when a rank does not call', () => {
    const call = { operation: 'allReduce', bytes: 1000, absent: 2 } as const
    assert.throws(() => simulate({ ...defaultMachine, ranks: [3] }, { ...call, algorithm: 'oneShot' }), {
      code: 'ERR_TIMEOUT',
      lateRanks: [2],
      message:
        'no rank can go on: rank 0 waits for rank 2 in allReduce at sequence 1; rank 1 waits for rank 2 in allReduce at sequence 1; not calling: rank 2',
    })
    assert.throws(() => simulate({ ...defaultMachine, ranks: [2, 2] }, { ...call, algorithm: 'splitRail' }), {
      code: 'ERR_TIMEOUT',
      lateRanks: [2],
      message:
        /rank 0 waits for rank 2 in allReduce number 1; rank 1 waits for rank 3 .*; rank 3 waits for rank 2 in allReduce at sequence 1/,
    })
    for (const operation of operationNames) {
      for (const ranks of [[4], [1, 1, 1], [2, 1, 2]]) {
        assert.throws(
          () =>
            simulate({ ...defaultMachine, ranks }, { operation, bytes: 1 << 20, chunkBytes: 8192, absent: 2, root: 2 }),
          { code: 'ERR_TIMEOUT', lateRanks: [2] },
          `${operation} on ${ranks.join(',')}`,
        )
      }
    }
  })

  it('takes no more memory than it may', () => {
    const machine = { ...defaultMachine, ranks: nodes(8, 4) }
    const call = { operation: 'allReduce', bytes: 1 << 20, memoryBytes: 80 << 20 } as const
    assert.throws(() => simulate(machine, { ...call, memoryBytes: 1 << 20 }), { code: 'ERR_NO_MEMORY' })
    const { rows, tooLarge } = compareAlgorithms(machine, { ...call, memoryBytes: 400 << 20 })
    assert.equal(rows.length + tooLarge.length, 3)
  })

  it('refuses machines and calls that are none', () => {
    const call = { operation: 'allReduce', bytes: 1000 } as const
    const wrong: readonly Partial<Machine>[] = [
      { ranks: [] },
      { ranks: [0] },
      { ranks: [1025] },
      { ranks: nodes(129, 8) },
      { coreNs: -1 },
      { coreNs: NaN },
      { memoryNsPerByte: 0 },
      { linkNsPerByte: Infinity },
      { sockets: 0 },
    ]
    for (const change of wrong)
      assert.throws(
        () => simulate({ ...defaultMachine, ...change }, call),
        { code: 'ERR_INVALID_ARGUMENT' },
        JSON.stringify(change),
      )
    const calls: readonly SimulateOptions[] = [
      { ...call, bytes: -1 },
      { ...call, bytes: 1.5 },
      { ...call, algorithm: 'ring' },
      { ...call, algorithm: 'leader' },
      { ...call, root: 2 },
      { ...call, chunkBytes: 100 },
      { ...call, calls: 0 },
    ]
    for (const wrongCall of calls)
      assert.throws(
        () => simulate(defaultMachine, wrongCall),
        { code: 'ERR_INVALID_ARGUMENT' },
        JSON.stringify(wrongCall),
      )
  })
})

describe('tilerank simulate', () => {
  const main = fileURLToPath(new URL('../../cli/main.js', import.meta.url))
  const tilerank = (...args: readonly string[]): Promise<Ended> => run(node, [main, 'simulate', ...args])

  it('prints a table, and one object an operation and size', async () => {
    const args = ['--nodes', '4', '--ranks', '8', '--link', '100gbe', '--op', 'allReduce,barrier', '--bytes', '32768']
    const { code, stdout } = await tilerank(...args)
    assert.equal(code, 0)
    assert.match(stdout, /^4 nodes x 8 ranks; .* link 40 us, 100 Gbit\/s\n/)
    assert.match(stdout, /^allReduce +32768 +twoStep .* yes +! 1\.\d\dx of splitRail$/m)
    assert.match(stdout, /^barrier +0 +direct /m)
    const json = await tilerank(...args, '--json')
    const lines = json.stdout.trimEnd().split('\n')
    assert.deepEqual(
      lines.map((line) => (JSON.parse(line) as { operation: string }).operation),
      ['allReduce', 'barrier'],
    )
  })

  it('takes wire q8, which the other operations leave out', async () => {
    const args = ['--nodes', '2', '--op', 'allReduce,reduce', '--bytes', '65536', '--wire', 'q8', '--dtype', 'f32']
    const { code, stdout } = await tilerank(...args)
    assert.equal(code, 0)
    assert.match(stdout, /^allReduce +65536 +leader .* 18\.43k /m)
    assert.match(stdout, /^reduce +65536 +direct .* 65\.54k /m)
  })

  it('exits with 2 for wrong usage', async () => {
    for (const args of [
      ['--wire', 'q4'],
      ['--op', 'ring'],
      ['--gbps', '0'],
      ['--link', 'carrier-pigeon'],
      ['--nodes', '3', '--ranks', '1,2'],
    ]) {
      assert.equal((await tilerank(...args)).code, 2, args.join(' '))
    }
  })
})
