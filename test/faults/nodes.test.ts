// Faults of ranks on several nodes and of the network between them: a sample in the ordinary run, each fault of each rank in the long one.

import assert from 'node:assert/strict'
import { createLab, labObstacle, type Lab } from '../../bench/lab.js'
import { rounds } from '../rounds.js'
import { unavailable } from '../unavailable.js'
import { networkFaults, strikeNetwork, strikeNodes, victims, type NodesOutcome } from './nodes.js'
import { faults, type Fault } from './strike.js'

const problems = ({ wrong, leftovers }: NodesOutcome): string[] => [
  ...wrong,
  ...leftovers.map((what) => `left: ${what}`),
]

describe('faults across nodes', function () {
  this.timeout(90_000)
  let lab: Lab
  before(async function () {
    const obstacle = labObstacle()
    if (obstacle !== undefined) return unavailable(this, obstacle)
    lab = await createLab({ nodes: 2 })
  })
  after(async () => {
    await (lab as Lab | undefined)?.close()
  })

  const all = faults.flatMap((fault) => victims.map((victim): [Fault, number] => [fault, victim]))
  const sample: [Fault, number][] = [
    ['SIGKILL', 0],
    ['SIGSTOP, SIGCONT', 3],
    ['exception', 2],
  ]
  for (const [i, [fault, victim]] of rounds({ quick: sample, long: all }).entries()) {
    it(`${fault} of rank ${victim}`, async () => {
      assert.deepEqual(problems(await strikeNodes(lab, { victim, fault, seed: i })), [])
    })
  }
  for (const name of rounds({ quick: ['a flipped bit', 'a stranger at the port'], long: Object.keys(networkFaults) })) {
    it(`${name} in the network`, async () => {
      assert.deepEqual(problems(await strikeNetwork(lab, name)), [])
    })
  }
})
