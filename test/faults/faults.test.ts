// Ranks that are killed, stopped, or end by themselves, at every moment of a job's life. A sample in the ordinary run; with
// TILERANK_TEST=long over 200 of each fault, 17 at each moment. `npm run faults` prints the table of docs/reliability.md.

import assert from 'node:assert/strict'
import { faults, isDear, run, spots, worksAgain, type Outcome } from './strike.js'

const isLong = process.env['TILERANK_TEST'] === 'long'
const longCount = Number(process.env['TILERANK_FAULTS'] ?? '17')
const problems = ({ wrong, leftovers }: Outcome): string[] => [...wrong, ...leftovers.map((what) => `left: ${what}`)]

describe('faults', function () {
  if (isLong) {
    for (const spot of spots) {
      for (const fault of faults) {
        const count = isDear({ ...spot, fault }) ? Math.ceil(longCount / 10) : longCount
        it(`${fault} in ${spot.place}, ${spot.moment}, ${String(count)} times`, async function () {
          this.timeout(count * 30_000)
          const all: string[] = []
          for (let i = 0; i < count; i++) {
            const seed = i * 7919 + spots.indexOf(spot) * 101 + faults.indexOf(fault)
            const outcome = await run({ ...spot, fault, seed })
            all.push(...problems(outcome).map((problem) => `seed ${String(seed)}: ${problem}`))
          }
          await worksAgain()
          assert.deepEqual(all, [])
        })
      }
    }
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
