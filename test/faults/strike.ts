// One fault at one moment in one kind of job, and whether what followed was right: every survivor's error, the time it took, and what
// was left behind. faults.test.ts runs a sample of these, with TILERANK_TEST=long many of each.

import type { ChildProcess } from 'node:child_process'
import { readFileSync, readdirSync } from 'node:fs'
import { hostname } from 'node:os'
import { fileURLToPath } from 'node:url'
import { initInference, type Engine } from '../../tp/index.js'
import { isAlive, node, pause, start, survivors, tpLaunch } from '../launcher/processes.js'
import { newNonce, runRanks } from '../ranks.js'
import { demoModel, testModel } from '../tp/files.js'
import type { Seen } from './programs.js'

export const faults = ['SIGKILL', 'SIGSTOP', 'SIGSTOP, SIGCONT', 'exit(0)', 'exception', 'abort()'] as const
export type Fault = (typeof faults)[number]
export const moments = {
  group: ['join', 'sync', 'async', 'close'],
  engine: ['load', 'prompt', 'decode', 'idle', 'close'],
  'tp-launch': ['load', 'prompt', 'decode', 'idle', 'close'],
} as const
export type Place = keyof typeof moments

export interface Strike {
  readonly place: Place
  readonly moment: string
  readonly fault: Fault
  /** Of the victim and the time. */
  readonly seed: number
}

const places = Object.keys(moments) as Place[]
export const spots = places.flatMap((place) => moments[place].map((moment) => ({ place, moment })))

/** A rank that is stopped while an engine loads is given up after 10 s: a tenth of these is enough. */
export const isDear = ({ place, moment, fault }: Omit<Strike, 'seed'>): boolean =>
  fault === 'SIGSTOP' && moment === 'load' && place !== 'group'

export interface Outcome {
  /** What was wrong; empty: all was right. */
  readonly wrong: readonly string[]
  /** From the fault to the last survivor's error; beyond the deadline where that decides. Undefined: no error was due. */
  readonly detectionMs?: number
  /** From the fault to the end of tp-launch. */
  readonly endMs?: number
  readonly leftovers: readonly string[]
}

// The promise is a second. The machine that runs the tests is shared and may stand still for that long by itself.
const slackMs = 2000
export const promisedMs = 1000
const endPromisedMs = 5000
const hook = new URL('./hook.js', import.meta.url).href
const launched = fileURLToPath(new URL('./launched.js', import.meta.url))
const programs = new URL('./programs.js', import.meta.url)
const llama = testModel('llama')

/** Short deadlines where a stopped rank is to be found, long ones where a short stop is not. */
const timeoutOf = (fault: Fault): number => (fault === 'SIGSTOP' ? 700 : 20_000)
export const stopMs = 120

const monotonicMs = (): number => Number(process.hrtime.bigint() / 1000n) / 1000

export function randomFrom(seed: number): (below: number) => number {
  let state = seed >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return (((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below
  }
}

export const variables = (fault: Fault): NodeJS.ProcessEnv => ({
  NODE_OPTIONS: `--import=${hook}`,
  TILERANK_TEST_FAULT: fault,
})

/** Strikes, and says when. The programs of exit(0), exception and abort() do it to themselves (hook.ts). */
export function strikeAt(pid: number, fault: Fault): number {
  const atMs = monotonicMs()
  // Stopped, it is there to be continued: it cannot have ended.
  if (fault === 'SIGSTOP, SIGCONT') setTimeout(() => isAlive(pid) && process.kill(pid, 'SIGCONT'), stopMs)
  try {
    if (fault === 'SIGKILL') process.kill(pid, 'SIGKILL')
    else if (fault === 'SIGSTOP' || fault === 'SIGSTOP, SIGCONT') process.kill(pid, 'SIGSTOP')
    else process.kill(pid, 'SIGUSR2')
  } catch {
    // It had ended already: a fault in close() may come too late.
  }
  return atMs
}

interface Expected {
  readonly fault: Fault
  readonly victim: number
  readonly pid: number
  /** Ranks that have not met yet know of a lost one only that it did not come. */
  readonly mayBeLate?: boolean
  /** Of the victim; this one if absent. */
  readonly host?: string
}

/** What is wrong with an error as the account of a fault; empty: nothing. */
export function wrongWith(
  failure: Readonly<Record<string, unknown>>,
  { fault, victim, pid, mayBeLate = false, host = hostname() }: Expected,
): string[] {
  const said = (what: string): string => `${what}: ${JSON.stringify({ ...failure, recorder: undefined })}`
  const isLate = failure['code'] === 'ERR_TIMEOUT'
  if (fault === 'SIGSTOP' || (mayBeLate && isLate)) {
    if (!isLate) return [said('not ERR_TIMEOUT')]
    const late: unknown = failure['lateRanks']
    // While ranks join, one that has joined already sees those that still wait for the victim as late, too.
    return Array.isArray(late) && late.includes(victim) && (mayBeLate || late.length === 1)
      ? []
      : [said(`not rank ${String(victim)} alone is late`)]
  }
  if (failure['code'] !== 'ERR_PEER_LOST') return [said('not ERR_PEER_LOST')]
  const wrong: string[] = []
  if (failure['rank'] !== victim || failure['pid'] !== pid)
    wrong.push(said(`not rank ${String(victim)}, pid ${String(pid)}`))
  if (failure['host'] !== host) wrong.push(said('no host'))
  const isJoined = !mayBeLate
  if (isJoined && typeof failure['operation'] !== 'string') wrong.push(said('no operation'))
  if (isJoined && typeof failure['sequence'] !== 'number') wrong.push(said('no sequence'))
  const signal = failure['signal'] ?? undefined
  // Kernels before 6.15 do not tell who is not the parent.
  const expected = fault === 'SIGKILL' ? 'SIGKILL' : fault === 'abort()' ? 'SIGABRT' : undefined
  // A process that was struck before it could load hook.ts ends by the signal itself.
  const isEarly = mayBeLate && signal === 'SIGUSR2'
  if (signal !== undefined && signal !== expected && !isEarly) wrong.push(said(`signal ${JSON.stringify(signal)}`))
  if (isJoined) {
    const recorder = failure['recorder']
    if (!Array.isArray(recorder) || recorder.length === 0) wrong.push(said('no recorder'))
  }
  return wrong
}

export function tooSlow(what: string, tookMs: number, limitMs: number): string[] {
  return tookMs > limitMs + slackMs ? [`${what} took ${tookMs.toFixed(0)} ms`] : []
}

const socketsOf = (nonce: string): string[] =>
  readFileSync('/proc/net/unix', 'utf8').includes(nonce) ? [`a socket of job ${nonce}`] : []

const sharedMemory = (): string[] => readdirSync('/dev/shm').filter((name) => name.includes('tilerank'))

async function left(pids: readonly number[], nonce: string): Promise<string[]> {
  const alive = await survivors(pids, 1000)
  return [
    ...alive.map((pid) => `process ${String(pid)}`),
    ...socketsOf(nonce),
    ...sharedMemory().map((name) => `/dev/shm/${name}`),
  ]
}

async function strikeGroup({ moment, fault, seed }: Strike): Promise<Outcome> {
  const random = randomFrom(seed)
  const worldSize = 3
  const victim = Math.floor(random(worldSize))
  const nonce = newNonce()
  const timeoutMs = moment === 'join' && fault !== 'SIGSTOP, SIGCONT' ? 4000 : timeoutOf(fault)
  const isBrief = fault === 'SIGSTOP, SIGCONT'
  const begin = { join: 'up', sync: 'ready', async: 'ready', close: 'closing' }[moment] ?? 'ready'
  const delayMs = random({ join: 30, sync: 40, async: 40, close: 3 }[moment] ?? 40)
  let struckMs = 0
  const said = new Set<number>()
  const onSay = (rank: number, message: unknown, processes: readonly (ChildProcess | undefined)[]): void => {
    if (message !== begin) return
    said.add(rank)
    // In close() the first to get there counts; else all have come, but for join, which is about coming.
    if (struckMs !== 0 || (moment === 'close' || moment === 'join' ? rank !== victim : said.size < worldSize)) return
    struckMs = Infinity
    setTimeout(() => {
      struckMs = strikeAt(processes[victim]?.pid ?? -1, fault)
    }, delayMs)
    const others = processes.filter((_, r) => r !== victim)
    let ended = 0
    for (const child of others) {
      child?.once('exit', () => {
        if (++ended === others.length && !isBrief) processes[victim]?.kill('SIGKILL')
      })
    }
  }
  const rounds = isBrief ? 150 : moment === 'close' ? 3 : 1_000_000
  const outcomes = await runRanks(programs, 'operate', {
    worldSize,
    nonce,
    args: { form: moment === 'async' ? 'async' : 'sync', timeoutMs, rounds },
    env: () => variables(fault),
    onSay,
    timeoutMs: 60_000,
  })
  const wrong: string[] = []
  let detectionMs: number | undefined
  for (const outcome of outcomes) {
    if (outcome.rank === victim && !isBrief) continue
    const seen = outcome.value as Seen | undefined
    if (seen === undefined) {
      wrong.push(`rank ${String(outcome.rank)} gave no account: ${JSON.stringify(outcome)}`)
      continue
    }
    if (isBrief || (moment === 'close' && seen.failure['code'] === 'none')) {
      if (seen.failure['code'] !== 'none')
        wrong.push(`rank ${String(outcome.rank)}: ${JSON.stringify({ ...seen.failure, recorder: undefined })}`)
      continue
    }
    const pid = outcomes[victim]?.pid ?? -1
    wrong.push(...wrongWith(seen.failure, { fault, victim, pid, mayBeLate: moment === 'join' }))
    const dueMs = seen.failure['code'] === 'ERR_TIMEOUT' ? timeoutMs : 0
    const tookMs = Math.max(0, seen.atMs - struckMs - dueMs)
    detectionMs = Math.max(detectionMs ?? 0, tookMs)
    wrong.push(...tooSlow(`rank ${String(outcome.rank)}`, tookMs, promisedMs))
  }
  const leftovers = await left(
    outcomes.map(({ pid }) => pid),
    nonce,
  )
  return { wrong, leftovers, ...(detectionMs === undefined ? {} : { detectionMs }) }
}

interface RankOfJob {
  readonly rank: number
  readonly pid: number
  readonly nonce: string
}

/** The ranks that a process has started and that still run, by their own variables. */
function ranksOf(parent: number): RankOfJob[] {
  const pids = readdirSync(`/proc/${String(parent)}/task`).flatMap((task) =>
    readFileSync(`/proc/${String(parent)}/task/${task}/children`, 'utf8')
      .trim()
      .split(' ')
      .filter(Boolean)
      .map(Number),
  )
  return pids.flatMap((pid) => {
    try {
      const environ = readFileSync(`/proc/${String(pid)}/environ`, 'utf8')
      const rank = /(?:^|\0)RANK=(\d+)/.exec(environ)?.[1]
      const nonce = /(?:^|\0)TILERANK_JOB=([0-9a-f]+)/.exec(environ)?.[1]
      return rank === undefined || nonce === undefined || !isAlive(pid) ? [] : [{ rank: Number(rank), pid, nonce }]
    } catch {
      return []
    }
  })
}

const memfds = (): number => readFileSync('/proc/self/maps', 'utf8').split('memfd:tilerank').length - 1
const descriptors = (): number => readdirSync('/proc/self/fd').length

const promptOf = (length: number): { ids: number[] } => ({
  ids: Array.from({ length }, (_, i) => 3 + ((i * 37) % 300)),
})

/** The engine of an ordinary script: this process is the client. */
async function strikeEngine({ moment, fault, seed }: Strike): Promise<Outcome> {
  const random = randomFrom(seed)
  const size = 2
  const victim = Math.floor(random(size))
  const isBrief = fault === 'SIGSTOP, SIGCONT'
  const timeoutMs = timeoutOf(fault)
  const before = { memfds: memfds(), descriptors: descriptors() }
  const started = new Set(ranksOf(process.pid).map(({ pid }) => pid))
  const options =
    moment === 'load' ? ({ shape: 'tinyllama-1.1b', layers: 1, contextLength: 128 } as const) : { model: llama }
  const saved = { ...process.env }
  Object.assign(process.env, variables(fault))
  const opening = initInference({ ...options, dtype: 'f32', tensorParallel: { size }, timeoutMs, maxStepTokens: 16 })
  let ranks: RankOfJob[] = []
  while (ranks.length < size) {
    ranks = ranksOf(process.pid).filter(({ pid }) => !started.has(pid))
    await pause(2)
  }
  for (const name of Object.keys(variables(fault))) process.env[name] = saved[name] ?? ''
  const { pid = -1, nonce = '' } = ranks.find(({ rank }) => rank === victim) ?? {}
  const wrong: string[] = []
  let struckMs = Infinity
  const strikeIn = async (ms: number): Promise<void> => {
    await pause(ms)
    struckMs = strikeAt(pid, fault)
  }
  let engine: Engine | undefined
  let failure: unknown
  let expectedIds = ''
  try {
    if (moment === 'load') void strikeIn(150 + random(250))
    engine = await opening
    const asked = { maxNewTokens: moment === 'prompt' ? 1 : 100, temperature: 0, ignoreEos: true }
    const ask = async (): Promise<string> =>
      (await made.complete(promptOf(moment === 'prompt' ? 200 : 3), asked)).ids.join(' ')
    const made = engine
    expectedIds = await ask()
    if (moment === 'close') {
      void strikeIn(random(4))
      await made.close()
    } else {
      if (moment === 'idle') await strikeIn(random(20))
      else if (moment !== 'load') void strikeIn(random(60))
      if (moment === 'idle' && !isBrief) await pause(random(100))
      const endMs = isBrief ? monotonicMs() + stopMs + 200 : Infinity
      while (monotonicMs() < endMs) if ((await ask()) !== expectedIds) wrong.push('other tokens than before')
    }
  } catch (error) {
    failure = error
  }
  const atMs = monotonicMs()
  let detectionMs: number | undefined
  if (failure === undefined) {
    if (!isBrief && moment !== 'close') wrong.push('no error')
  } else if (isBrief || moment === 'close') {
    wrong.push(`an error: ${failure instanceof Error ? failure.message : JSON.stringify(failure)}`)
  } else {
    const { fields, ...facts } = failure as { fields?: object; message: string }
    const isLoading = engine === undefined
    const all = { ...facts, ...fields, message: (failure as Error).message } as Record<string, unknown>
    wrong.push(...wrongWith(all, { fault, victim, pid, mayBeLate: isLoading }))
    const dueMs = fault !== 'SIGSTOP' ? 0 : isLoading ? 10_000 : timeoutMs
    detectionMs = Math.max(0, atMs - struckMs - dueMs)
    wrong.push(...tooSlow('the error', detectionMs, promisedMs))
  }
  const closingMs = monotonicMs()
  await engine?.close()
  wrong.push(...tooSlow('close()', monotonicMs() - closingMs, endPromisedMs))
  const leftovers = await left(
    ranks.map((rank) => rank.pid),
    nonce,
  )
  // Node closes the channel of a child that is gone a few turns of the event loop after it.
  for (const endMs = monotonicMs() + 1000; descriptors() > before.descriptors && monotonicMs() < endMs;) await pause(10)
  if (memfds() > before.memfds) leftovers.push('mapped shared memory')
  if (descriptors() > before.descriptors) leftovers.push(`${String(descriptors() - before.descriptors)} descriptors`)
  return { wrong, leftovers, ...(detectionMs === undefined ? {} : { detectionMs }) }
}

async function strikeLaunched({ moment, fault, seed }: Strike): Promise<Outcome> {
  const random = randomFrom(seed)
  const worldSize = 2
  const victim = Math.floor(random(worldSize))
  const isBrief = fault === 'SIGSTOP, SIGCONT'
  const timeoutMs = moment === 'load' && !isBrief ? 4000 : timeoutOf(fault)
  const rounds = isBrief ? (moment === 'load' ? 3 : 40) : moment === 'close' ? 3 : 1_000_000
  const job = start(
    node,
    [tpLaunch, '-n', String(worldSize), '--oversubscribe', launched, moment, llama, String(timeoutMs), String(rounds)],
    { env: variables(fault) },
  )
  const ups = await job.saw(/(?:up=.*\n[^]*){2}/)
  const up = [...ups[0].matchAll(/^up=(\d+):(\d+):([0-9a-f]+)$/gm)].map((found) => ({
    rank: Number(found[1]),
    pid: Number(found[2]),
    nonce: found[3] ?? '',
  }))
  const { pid = -1, nonce = '' } = up.find(({ rank }) => rank === victim) ?? {}
  if (moment === 'close') await job.saw(/closing=/)
  else if (moment !== 'load') await job.saw(/ready=[^]*ready=/)
  await pause(random({ load: 300, prompt: 60, decode: 60, idle: 200, close: 2 }[moment] ?? 60))
  const struckMs = strikeAt(pid, fault)
  // Where nothing is pending any more, a rank that stands still is waited for: the job ends when it goes on.
  const isLast = fault === 'SIGSTOP' && moment === 'close'
  if (isLast) setTimeout(() => isAlive(pid) && process.kill(pid, 'SIGCONT'), timeoutMs + 500)
  const ended = await job.ended
  const endMs = monotonicMs() - struckMs
  const wrong: string[] = []
  const outcomes = [...ended.stdout.matchAll(/^outcome=(.*)$/gm)].map(
    (found) => JSON.parse(found[1] ?? '') as { rank: number; atMs: number; failure: Record<string, unknown> },
  )
  let detectionMs: number | undefined
  const isOver = isBrief || (moment === 'close' && outcomes.every(({ rank }) => rank === victim))
  if (isBrief) {
    if (ended.code !== 0) wrong.push(`exit code ${String(ended.code)}: ${ended.stdout} ${ended.stderr}`)
  } else if (!isOver) {
    const seen = outcomes.find(({ rank }) => rank !== victim)
    if (seen === undefined) {
      // One that has not met the victim yet has nothing to tell before tp-launch ends it.
      if (moment !== 'load') wrong.push(`no account of the survivor: ${ended.stdout} ${ended.stderr}`)
      wrong.push(...tooSlow('tp-launch', endMs, endPromisedMs))
    } else {
      const mayBeLate = moment === 'load'
      wrong.push(...wrongWith(seen.failure, { fault, victim, pid, mayBeLate }))
      const dueMs = seen.failure['code'] === 'ERR_TIMEOUT' ? timeoutMs : 0
      detectionMs = Math.max(0, seen.atMs - struckMs - dueMs)
      wrong.push(...tooSlow('the error', detectionMs, promisedMs))
      wrong.push(...tooSlow('tp-launch', endMs - dueMs, endPromisedMs))
    }
    const code = { SIGKILL: 137, 'abort()': 134, SIGSTOP: 1, 'exit(0)': 1, exception: 1 }[fault]
    if (ended.code !== code) wrong.push(`exit code ${String(ended.code)}, not ${String(code)}: ${ended.stderr}`)
    const place = `rank ${String(victim)} of ${String(worldSize)} \\(pid ${String(pid)}\\)`
    const line =
      fault === 'SIGSTOP'
        ? /failed first/
        : new RegExp(fault === 'exit(0)' ? `${place} had ended before, with exit code 0` : `${place} failed first`)
    if (!line.test(ended.stderr)) wrong.push(`tp-launch did not name the first: ${ended.stderr}`)
  }
  const leftovers = await left([...up.map((rank) => rank.pid), job.child.pid ?? -1], nonce)
  return { wrong, leftovers, endMs, ...(detectionMs === undefined ? {} : { detectionMs }) }
}

export async function run(strike: Strike): Promise<Outcome> {
  switch (strike.place) {
    case 'group':
      return strikeGroup(strike)
    case 'engine':
      return strikeEngine(strike)
    case 'tp-launch':
      return strikeLaunched(strike)
    default: {
      const never: never = strike.place
      throw new Error(`no such place: ${String(never)}`)
    }
  }
}

/** The calling process can still do what it could before. */
export async function worksAgain(): Promise<void> {
  const engine = await initInference({ model: demoModel, tensorParallel: { size: 2 } })
  const { ids } = await engine.complete('Once', { maxNewTokens: 3, temperature: 0, ignoreEos: true })
  await engine.close()
  if (ids.length !== 3) throw new Error('a new engine gave no tokens')
}
