// `npm run faults`: the fault matrix as one table, on one node and across nodes. Exits non-zero where anything was not right.

import assert from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import process from 'node:process'
import { parseArgs } from 'node:util'
import { packageRoot } from '../../native/index.js'
import { createLab, labObstacle } from '../../bench/lab.js'
import { networkFaults, strikeNetwork, strikeNodes, victims, type NodesOutcome } from './nodes.js'
import { strikeSteps } from './steps.js'
import { faults, isDear, run, spots } from './strike.js'

const usage = `npm run faults -- [--times N] [--every N] [--world steps|node|nodes] [--write]
  --times N   strikes of each fault at each moment of jobs (default 1)
  --every N   of the strikes at steps of algorithms only each N-th (default 1: all, about 25000)
  --world W   only these rows; may be repeated
  --write     puts the table into docs/reliability.md too`

interface Line {
  readonly world: string
  readonly job: string
  readonly moment: string
  readonly fault: string
  readonly times: number
  readonly right: number
  readonly misnamed: number
  readonly medianMs: number | undefined
  readonly worstMs: number | undefined
  readonly launcherMs: number | undefined
  readonly left: number
}

const columns = [
  ...['world', 'job', 'moment', 'fault', 'times', 'right', 'misnamed', 'median ms', 'worst ms'],
  ...['tp-launch ended, worst ms', 'left behind'],
]
const head = [`| ${columns.join(' | ')} |`, `|${columns.map(() => '---').join('|')}|`]
const ms = (value: number | undefined): string => (value === undefined ? '-' : value.toFixed(0))
const textOf = (line: Line): string =>
  `| ${[line.world, line.job, line.moment, line.fault, line.times, line.right, line.misnamed, ms(line.medianMs), ms(line.worstMs), ms(line.launcherMs), line.left].join(' | ')} |`

const lines: Line[] = []
let failures = 0
const show = (line: Line): void => {
  lines.push(line)
  console.log(textOf(line))
}
const complain = (what: string): void => {
  failures++
  console.error(what)
}

/** Strikes `times` times, one after the other. */
async function cell(
  place: Pick<Line, 'world' | 'job' | 'moment' | 'fault'>,
  times: number,
  strike: (index: number) => Promise<NodesOutcome>,
): Promise<void> {
  const outcomes: NodesOutcome[] = []
  for (let i = 0; i < times; i++) {
    const outcome = await strike(i)
    outcomes.push(outcome)
    for (const what of [...outcome.wrong, ...outcome.leftovers.map((left) => `left: ${left}`)]) {
      complain(`${Object.values(place).join(', ')}, number ${i}: ${what}`)
    }
  }
  const found = outcomes.flatMap(({ detectionMs }) => detectionMs ?? []).sort((a, b) => a - b)
  const ends = outcomes.flatMap(({ endMs }) => endMs ?? [])
  show({
    ...place,
    times,
    right: outcomes.filter(({ wrong, isMisnamed }) => wrong.length === 0 && isMisnamed !== true).length,
    misnamed: outcomes.filter(({ isMisnamed }) => isMisnamed === true).length,
    medianMs: found[Math.floor((found.length - 1) / 2)],
    worstMs: found.at(-1),
    launcherMs: ends.length === 0 ? undefined : Math.max(...ends),
    left: outcomes.reduce((sum, { leftovers }) => sum + leftovers.length, 0),
  })
}

async function steps(every: number): Promise<void> {
  const { rows, problems } = await strikeSteps(every)
  if (problems !== '') complain(problems)
  for (const { world, job, fault, times, right, misnamed, left, medianMs, worstMs } of rows) {
    const moment = every === 1 ? 'every step' : `each ${every}th step`
    show({ world, job, moment, fault, times, right, misnamed, medianMs, worstMs, launcherMs: undefined, left })
  }
}

async function node(times: number): Promise<void> {
  for (const spot of spots) {
    for (const fault of faults) {
      const seed = spots.indexOf(spot) * 101 + faults.indexOf(fault)
      await cell(
        { world: 'node', job: spot.place, moment: spot.moment, fault },
        isDear({ ...spot, fault }) ? Math.ceil(times / 10) : times,
        async (i) => run({ ...spot, fault, seed: i * 7919 + seed }),
      )
    }
  }
}

async function nodes(times: number): Promise<void> {
  const obstacle = labObstacle()
  if (obstacle !== undefined) {
    complain(`no rows across nodes: ${obstacle}`)
    return
  }
  await using lab = await createLab({ nodes: 2 })
  for (const victim of victims) {
    for (const fault of faults) {
      const place = { world: 'nodes', job: '2 + 2 ranks', moment: `rank ${victim} at work`, fault }
      await cell(place, times, async (i) => strikeNodes(lab, { victim, fault, seed: i * 7919 + victim }))
    }
  }
  for (const name of Object.keys(networkFaults)) {
    const place = { world: 'nodes', job: '1 + 1 ranks', moment: 'network at work', fault: name }
    await cell(place, times, async () => strikeNetwork(lab, name))
  }
}

/** Of the strikes at steps the page has one line for each world and fault. */
function writePage(): void {
  const merged = new Map<string, Line & { readonly jobs: number }>()
  for (const line of lines) {
    const isStep = line.moment.endsWith('step')
    const key = isStep ? `${line.world} ${line.fault}` : `${merged.size}`
    const before = isStep ? merged.get(key) : undefined
    merged.set(key, {
      ...line,
      jobs: (before?.jobs ?? 0) + 1,
      times: (before?.times ?? 0) + line.times,
      right: (before?.right ?? 0) + line.right,
      misnamed: (before?.misnamed ?? 0) + line.misnamed,
      left: (before?.left ?? 0) + line.left,
      medianMs: isStep ? undefined : line.medianMs,
      worstMs:
        Math.max(before?.worstMs ?? -1, line.worstMs ?? -1) < 0
          ? undefined
          : Math.max(before?.worstMs ?? 0, line.worstMs ?? 0),
    })
  }
  const table = [...merged.values()].map((line) =>
    textOf(line.moment.endsWith('step') ? { ...line, job: `${line.jobs} algorithms` } : line),
  )
  const page = join(packageRoot, 'docs', 'reliability.md')
  const marks = ['<!-- faults: begin -->', '<!-- faults: end -->'] as const
  const text = readFileSync(page, 'utf8')
  const [begin, end] = marks.map((mark) => text.indexOf(mark))
  assert.ok(begin !== undefined && end !== undefined && begin >= 0 && end > begin, `${page} has no ${marks.join(' ')}`)
  writeFileSync(
    page,
    `${text.slice(0, begin + marks[0].length)}\n${[...head, ...table].join('\n')}\n${text.slice(end)}`,
  )
}

const count = (text: string, name: string): number => {
  const value = Number(text)
  if (!Number.isSafeInteger(value) || value < 1) throw new Error(`--${name} ${text} is no count\n${usage}`)
  return value
}
const { values } = parseArgs({
  options: {
    times: { type: 'string', default: '1' },
    every: { type: 'string', default: '1' },
    world: { type: 'string', multiple: true, default: ['steps', 'node', 'nodes'] },
    write: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
})
const parts: Readonly<Record<string, () => Promise<void>>> = {
  steps: async () => steps(count(values.every, 'every')),
  node: async () => node(count(values.times, 'times')),
  nodes: async () => nodes(count(values.times, 'times')),
}
if (values.help) {
  console.log(usage)
} else {
  const chosen = values.world.map((name) => {
    const part = parts[name]
    if (part === undefined) throw new Error(`--world ${name}\n${usage}`)
    return part
  })
  console.log(head.join('\n'))
  for (const part of chosen) await part()
  if (values.write) writePage()
  process.exitCode = failures === 0 ? 0 : 1
}
