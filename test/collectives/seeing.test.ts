// Statistics, what NODE_DEBUG says, and traces: what they count is held against what was called, and who is late against who was made late.

import assert from 'node:assert/strict'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  createGroup,
  formatStats,
  traceOfRecording,
  type GroupStats,
  type Recording,
  type Trace,
  type TraceEvent,
} from '../../collectives/index.js'
import { tilerank } from '../cli/tilerank.js'
import { ranksValues, runRanks } from '../ranks.js'

const cases = new URL('./seeingCases.js', import.meta.url)

describe('seeing what collectives do', function () {
  let folder: string
  beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'tilerank-test-'))))
  afterEach(() => rmSync(folder, { recursive: true }))

  const callsOf = (stats: GroupStats): string[] =>
    stats.operations.map(
      ({ operation, fromBytes, toBytes, calls, bytes }) => `${operation} ${fromBytes}-${toBytes} ${calls} ${bytes}`,
    )

  it('statistics name the rank that is late, and count every call', async () => {
    const rounds = 20
    const values = (await ranksValues(cases, 'lateRank', { worldSize: 3, args: { late: 1, rounds } })) as GroupStats[][]
    for (const [rank, [before, after]] of values.entries()) {
      assert.ok(before !== undefined && after !== undefined)
      assert.deepEqual(callsOf(before), ['barrier 0-0 1 0', 'allReduce 64-127 1 64'])
      assert.deepEqual(callsOf(after), [
        `allReduce 64-127 ${rounds} ${rounds * 64}`,
        `allReduce 2048-4095 ${rounds} ${rounds * 4000}`,
        'broadcast 0-0 1 0',
      ])
      assert.equal(after.rank, rank)
      assert.deepEqual(
        after.peers.map((peer) => peer.rank),
        [0, 1, 2].filter((peer) => peer !== rank),
      )
      assert.ok(after.operations.every(({ latency }) => latency === undefined))
      if (rank === 1) continue
      const [late, other] = [after.peers.find((peer) => peer.rank === 1), after.peers.find((peer) => peer.rank !== 1)]
      assert.ok(late !== undefined && other !== undefined)
      // Three ranks on two cores, perhaps beside others: another may be later still now and then, but never by as much in all.
      assert.ok(late.late >= rounds / 2 && late.waitedMs > other.waitedMs, JSON.stringify(after))
      assert.ok(late.waitedMs >= rounds * 10 && late.waitedMs <= after.elapsedMs, JSON.stringify(after))
      assert.ok(late.waits >= late.late)
    }
  })

  it('latencies are counted on request, and a table shows all of it', async () => {
    const group = await createGroup({ env: {}, stats: true })
    const data = new Float32Array(100)
    for (let i = 0; i < 500; i++) group.allReduceSync(data)
    for (let i = 0; i < 50; i++) await group.allReduce(data)
    const { operations, elapsedMs } = group.stats({ reset: true })
    const [{ latency, calls } = assert.fail()] = operations
    assert.equal(calls, 550)
    assert.ok(latency !== undefined)
    const { p50Us, p90Us, p99Us, maxUs } = latency
    assert.ok(
      p50Us > 0.01 && p50Us <= p90Us && p90Us <= p99Us && p99Us <= maxUs && maxUs < 2 * elapsedMs * 1e3,
      JSON.stringify(latency),
    )
    assert.deepEqual(group.stats().operations, [])
    group.barrierSync()
    await group.close()
    // The last ones stay.
    const stats = group.stats()
    assert.deepEqual(callsOf(stats), ['barrier 0-0 1 0'])
    const text = formatStats({ ...stats, operations, peers: [{ rank: 1, waitedMs: 1.5, waits: 3, late: 2 }] }).join(
      '\n',
    )
    assert.match(text, /^rank 0 of 1, group 0: \d+\.\d{3} s\noperation +from bytes +calls +bytes +p50 us/)
    assert.match(text, /\nallReduce +256 +550 +214\.8K +\d+\.\d\d /)
    assert.match(text, /\nrank 1 +1\.500 +\d+\.\d +3 +2$/)
    assert.throws(() => group.stats({ clear: true } as object), { code: 'ERR_INVALID_ARGUMENT' })
  })

  it('TILERANK_STATS=1 prints a block a rank when its group closes', async () => {
    const outcomes = await runRanks(cases, 'calls', { worldSize: 2, args: {}, env: () => ({ TILERANK_STATS: '1' }) })
    for (const { rank, stderr } of outcomes) {
      assert.ok(
        stderr.split('\n').every((line) => line === '' || line.startsWith('tilerank stats: ')),
        stderr,
      )
      assert.match(stderr, new RegExp(`^tilerank stats: rank ${rank} of 2, group 0`))
      assert.match(stderr, / p99 us +max us\n.*allReduce +8K +30 /s)
      assert.match(stderr, new RegExp(`\ntilerank stats: rank ${1 - rank} `))
    }
    const silent = await runRanks(cases, 'calls', {
      worldSize: 1,
      args: { stats: true },
      env: () => ({ TILERANK_STATS: '0' }),
    })
    assert.equal(silent[0]?.stderr, '')
  })

  it('NODE_DEBUG=tilerank says what was chosen and what failed', async () => {
    const outcomes = await runRanks(cases, 'calls', {
      worldSize: 2,
      args: { fails: true },
      env: () => ({ NODE_DEBUG: 'tilerank', XDG_CACHE_HOME: folder, TILERANK_ALGORITHM: 'allReduce=twoShot:0-64' }),
    })
    for (const { rank, stderr } of outcomes) {
      assert.match(
        stderr,
        new RegExp(
          `TILERANK \\d+: rank ${rank} of 2 joins, .*slots of 4096 bytes, timeout 20000 ms, algorithms [0-9a-f]{8}`,
        ),
      )
      assert.match(stderr, /allReduce of a tensor up to 64 bytes: twoShot, chunks of 4096 \(environment\)/)
      assert.match(stderr, new RegExp(`rank ${rank} joined group 0 in \\d+ ms: spins \\d+ us, arena of \\d+ bytes`))
    }
    assert.match(
      outcomes[0]?.stderr ?? '',
      /rank 0, group 0 failed: rank 1 aborted the group: on purpose.*\(ERR_ABORTED\)/,
    )
    const silent = await runRanks(cases, 'calls', { worldSize: 1, args: {} })
    assert.equal(silent[0]?.stderr, '')
  })

  /** Fields by the Trace Event Format; events of one thread nest. */
  function check({ traceEvents }: Trace): readonly TraceEvent[] {
    const last = new Map<string, number[]>()
    let before = 0
    for (const event of traceEvents) {
      assert.equal(typeof event.name, 'string')
      assert.ok(Number.isInteger(event.pid) && Number.isInteger(event.tid))
      assert.ok(Number.isFinite(event.ts) && event.ts >= 0)
      assert.equal(typeof event.args, 'object')
      if (event.ph === 'M') {
        assert.match(event.name, /^(process|thread)_(name|sort_index)$/)
        continue
      }
      assert.equal(typeof event.cat, 'string')
      if (event.ph === 'i') {
        assert.equal(event.s, 't')
        continue
      }
      assert.equal(event.ph, 'X')
      const { dur } = event
      assert.ok(dur !== undefined && dur >= 0, JSON.stringify(event))
      // What is open on this thread, by its end; nanoseconds, since microseconds are fractions.
      const key = `${event.pid}.${event.tid}`
      const open = last.get(key) ?? []
      const [begin, end] = [Math.round(event.ts * 1e3), Math.round((event.ts + dur) * 1e3)]
      while (open.length > 0 && (open.at(-1) ?? 0) <= begin + 1) open.pop()
      assert.ok(
        open.length === 0 || end <= (open.at(-1) ?? 0) + 1,
        `${JSON.stringify(event)} is not within what is open`,
      )
      if (event.cat === 'collective') {
        assert.equal(open.length, 0, `${JSON.stringify(event)} lies in another call`)
        assert.ok(begin + 1 >= before || last.size === 0 || !last.has(key), 'calls are in order')
        before = begin
      }
      open.push(end)
      last.set(key, open)
    }
    return traceEvents
  }

  const read = (path: string): Trace => JSON.parse(readFileSync(path, 'utf8')) as Trace

  it('a trace holds every call of each rank, on one clock, and merges', async () => {
    await ranksValues(cases, 'calls', { worldSize: 2, args: { trace: join(folder, 'sub', 'all.json') } })
    const files = [0, 1].map((rank) => join(folder, 'sub', `all.${rank}.json`))
    assert.deepEqual(readdirSync(join(folder, 'sub')).sort(), ['all.0.json', 'all.1.json'])
    const [mine = [], theirs = []] = files.map((file) => check(read(file)))
    for (const [rank, events] of [mine, theirs].entries()) {
      const all = events.filter(({ cat }) => cat === 'collective')
      assert.equal(all.length, 60)
      assert.ok(events.every(({ pid, tid }) => pid === rank && tid === 0))
      const [first] = all
      const { bytes, dtype, count, sequence, waitUs, queuedUs } = first?.args ?? {}
      assert.deepEqual([first?.name, bytes, dtype, count, sequence], ['allReduce', 10_000, 'bf16', 5000, 1])
      for (const time of [waitUs, queuedUs]) assert.ok(typeof time === 'number' && time >= 0 && time < 60e6)
      for (const { dur = 0, args } of all) assert.ok(Number(args['waitUs']) <= dur + 1, JSON.stringify(args))
      // Three chunks of 12 000 bytes, of which the recorder knows each.
      assert.ok(events.filter(({ cat }) => cat === 'sequence').length >= 60)
    }
    // Every rank is in a call before any other can leave it.
    const ends = new Map(
      mine
        .filter(({ cat, name }) => cat === 'collective' && name !== 'broadcast')
        .map((event) => [event.args['sequence'], event]),
    )
    for (const event of theirs) {
      const other = event.cat === 'collective' ? ends.get(event.args['sequence']) : undefined
      if (other === undefined) continue
      assert.ok(
        event.ts <= other.ts + (other.dur ?? 0) + 1 && other.ts <= event.ts + (event.dur ?? 0) + 1,
        JSON.stringify([event, other]),
      )
    }
    const merged = await tilerank(['trace', 'merge', ...files])
    assert.equal(merged.code, 0, merged.stderr)
    const both = check(JSON.parse(merged.stdout) as Trace)
    assert.equal(both.length, mine.length + theirs.length)
  })

  it('a trace is written when a group fails, with the call that failed', async () => {
    const outcomes = await runRanks(cases, 'calls', {
      worldSize: 2,
      args: { fails: true },
      env: () => ({ TILERANK_TRACE: folder }),
    })
    assert.equal(outcomes[0]?.value, 'ERR_ABORTED', JSON.stringify(outcomes))
    const events = check(read(join(folder, 'rank-0-group-0.json'))).filter(({ cat }) => cat === 'collective')
    const last = events.at(-1)
    assert.equal(last?.name, 'barrier')
    assert.equal(last.args['failed'], true)
    assert.ok(Number(last.args['waitUs']) > 10_000, JSON.stringify(last))
    assert.equal(events.filter(({ args }) => args['failed'] === true).length, 1)
  })

  it('a trace is bounded, and says what it dropped', async () => {
    const group = await createGroup({ env: {}, trace: join(folder, 'a.b.json') })
    for (let i = 0; i < 70_000; i++) group.barrierSync()
    await group.close()
    const trace = read(join(folder, 'a.b.0.json'))
    assert.equal(trace.otherData['droppedCalls'], 70_000 - 65_536)
    const events = check(trace).filter(({ cat }) => cat === 'collective')
    assert.deepEqual(
      [events.length, events[0]?.args['sequence'], events.at(-1)?.args['sequence']],
      [65_536, 4465, 70_000],
    )
    await assert.rejects(createGroup({ env: {}, trace: '' }), { code: 'ERR_INVALID_ARGUMENT' })
  })

  it('a flight recording is a trace too, of ranks that are dead as well', async () => {
    const row = {
      sequence: 7,
      operation: 'barrier',
      dtype: 'f32',
      count: 0,
      variant: 0,
      history: 0,
      step: 0,
      layer: -1,
    }
    const recording: Recording = [
      {
        rank: 0,
        group: 0,
        pid: 10,
        rows: [
          { ...row, publishedNs: 1000, completedNs: 3000 },
          { ...row, sequence: 8, publishedNs: 2000, completedNs: 0 },
        ],
      },
      { rank: 1, group: 0, pid: 11, rows: [{ ...row, publishedNs: 0, completedNs: 4000 }] },
    ]
    const events = check(traceOfRecording(recording)).filter(({ ph }) => ph !== 'M')
    assert.deepEqual(
      events.map(({ name, ph, ts, dur, pid }) => [name, ph, ts, dur, pid]),
      [
        ['barrier 7', 'X', 1, 2, 0],
        ['barrier 8 waits', 'i', 3, undefined, 0],
        ['barrier 7', 'X', 4, 0, 1],
      ],
    )
    const file = join(folder, 'recorder.json')
    writeFileSync(file, JSON.stringify({ time: 'now', ranks: recording }))
    const merged = await tilerank(['trace', 'merge', file])
    assert.equal((JSON.parse(merged.stdout) as Trace).traceEvents.length, events.length + 6)
    writeFileSync(file, '{}')
    const wrong = await tilerank(['trace', 'merge', file])
    assert.equal(wrong.code, 2)
    assert.match(wrong.stderr, /recorder\.json: neither a trace nor a recording/)
  })
})
