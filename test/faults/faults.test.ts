// Ranks that are killed, stopped, or end by themselves, at every moment of a job's life. A sample in the ordinary run; with
// TILERANK_TEST=long over 200 of each fault, 17 at each moment, and the table in docs/reliability.md is written anew.

import assert from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from '../../native/index.js'
import { faults, moments, run, worksAgain, type Fault, type Outcome, type Place, type Strike } from './strike.js'

const isLong = process.env['TILERANK_TEST'] === 'long'
const longCount = Number(process.env['TILERANK_FAULTS'] ?? '17')
const places = Object.keys(moments) as Place[]
const spots = places.flatMap((place) => moments[place].map((moment) => ({ place, moment })))

/** A rank that is stopped while an engine loads is given up after 10 s: a tenth of these is enough. */
const isDear = ({ place, moment, fault }: Omit<Strike, 'seed'>): boolean =>
  fault === 'SIGSTOP' && moment === 'load' && place !== 'group'

const page = join(packageRoot, 'docs', 'reliability.md')
const marks = ['<!-- faults: begin -->', '<!-- faults: end -->'] as const

interface Row {
  readonly place: Place
  readonly moment: string
  readonly fault: Fault
  readonly outcomes: readonly Outcome[]
}

function lineOf({ place, moment, fault, outcomes }: Row): string {
  const times = outcomes.flatMap(({ detectionMs }) => detectionMs ?? []).sort((a, b) => a - b)
  const ends = outcomes.flatMap(({ endMs }) => endMs ?? [])
  const ms = (value: number | undefined): string => (value === undefined ? '-' : value.toFixed(0))
  const right = outcomes.filter(({ wrong }) => wrong.length === 0).length
  const leftovers = outcomes.reduce((sum, outcome) => sum + outcome.leftovers.length, 0)
  const cells = [
    place,
    moment,
    fault,
    String(outcomes.length),
    String(right),
    ms(times[Math.floor((times.length - 1) / 2)]),
    ms(times.at(-1)),
    ends.length === 0 ? '-' : ms(Math.max(...ends)),
    String(leftovers),
  ]
  return `| ${cells.join(' | ')} |`
}

function writeTable(rows: readonly Row[]): void {
  const text = readFileSync(page, 'utf8')
  const [begin, end] = marks.map((mark) => text.indexOf(mark))
  assert.ok(begin !== undefined && end !== undefined && begin >= 0 && end > begin, `${page} has no ${marks.join(' ')}`)
  const head = [
    '| job | moment | fault | times | right | median ms | worst ms | tp-launch ended, worst ms | left behind |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  const table = [...head, ...rows.map(lineOf)].join('\n')
  writeFileSync(page, `${text.slice(0, begin + marks[0].length)}\n${table}\n${text.slice(end)}`)
}

const problems = ({ wrong, leftovers }: Outcome): string[] => [...wrong, ...leftovers.map((what) => `left: ${what}`)]

describe('faults', function () {
  const rows: Row[] = []
  if (isLong) {
    for (const spot of spots) {
      for (const fault of faults) {
        const count = isDear({ ...spot, fault }) ? Math.ceil(longCount / 10) : longCount
        it(`${fault} in ${spot.place}, ${spot.moment}, ${String(count)} times`, async function () {
          this.timeout(count * 30_000)
          const outcomes: Outcome[] = []
          const all: string[] = []
          for (let i = 0; i < count; i++) {
            const seed = i * 7919 + spots.indexOf(spot) * 101 + faults.indexOf(fault)
            const outcome = await run({ ...spot, fault, seed })
            outcomes.push(outcome)
            all.push(...problems(outcome).map((problem) => `seed ${String(seed)}: ${problem}`))
          }
          rows.push({ ...spot, fault, outcomes })
          await worksAgain()
          assert.deepEqual(all, [])
        })
      }
    }
    after(() => {
      if (rows.length > 0) writeTable(rows)
    })
    return
  }

  // Ten of each fault, spread over the moments at which ranks work, at times that follow from the numbers alone. Joining, loading and
  // closing, where the outcome depends on who got how far, are the long run's.
  const steady = spots.filter(({ moment }) => !['join', 'load', 'close'].includes(moment))
  for (const [number, fault] of faults.entries()) {
    const chosen = Array.from({ length: 10 }, (_, i) => steady[(i * 3 + number * 5) % steady.length])
    for (const [i, spot] of chosen.entries()) {
      if (spot === undefined) continue
      it(`${fault}: ${spot.place}, ${spot.moment}`, async function () {
        this.timeout(60_000)
        assert.deepEqual(problems(await run({ ...spot, fault, seed: i * 31 + number })), [])
      })
    }
  }

  it('the process that saw all that can start another engine', async function () {
    this.timeout(60_000)
    await worksAgain()
  })
})
