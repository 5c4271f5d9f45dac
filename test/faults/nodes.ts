// One fault in a job on several nodes of a laboratory, of a rank or of the network between them, and whether what followed was right.

import { randomBytes } from 'node:crypto'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { node as nodeCommand, pause, survivors } from '../launcher/processes.js'
import type { Lab, LabNode } from '../../bench/lab.js'
import { startRelay, type Directions, type Relay } from '../net/relay.js'
import { newNonce, runRanks } from '../ranks.js'
import type { NodesSeen } from './nodesPrograms.js'
import { pullPort, relayPort } from './relayHook.js'
import { promisedMs, randomFrom, strikeAt, tooSlow, variables, wrongWith, type Fault, type Outcome } from './strike.js'

const programs = new URL('./nodesPrograms.js', import.meta.url)
const relayHook = new URL('./relayHook.js', import.meta.url).href
const stranger = fileURLToPath(new URL('./stranger.js', import.meta.url))
const firstStore = 29_650
const nextStore = 29_651

export interface NodesOutcome extends Outcome {
  /** A stopped rank, and an error that names one which itself waits for it (docs/reliability.md). */
  readonly isMisnamed?: boolean
}

/** Leaders of both nodes, of which 0 serves the store, and the others. */
export const victims = [0, 1, 2, 3] as const
const twoByTwo = [
  [0, 2],
  [1, 3],
] as const

async function inFolder<T>(use: (secretFile: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-faults-'))
  try {
    const file = join(folder, 'secret')
    writeFileSync(file, randomBytes(32).toString('hex'), { mode: 0o600 })
    return await use(file)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

const placeOf = (lab: Lab, shape: readonly (readonly number[])[], rank: number): LabNode => {
  const found = lab.nodes[shape.findIndex((ranks) => ranks.includes(rank))]
  if (found === undefined) throw new Error(`rank ${rank} has no node`)
  return found
}

async function textOf(place: LabNode, file: string): Promise<string> {
  const child = place.run('cat', [file], { stdio: ['ignore', 'pipe', 'inherit'] })
  let text = ''
  child.stdout?.setEncoding('utf8').on('data', (part: string) => (text += part))
  await once(child, 'close')
  return text
}

/** Processes, sockets that listen (TCP's state 0A) and sockets of the job. */
async function left(lab: Lab, pids: readonly number[], nonce: string): Promise<string[]> {
  const alive = await survivors(pids, 1000)
  const sockets: string[] = []
  for (const place of lab.nodes) {
    const tcp = await textOf(place, '/proc/net/tcp')
    if (tcp.split('\n').some((line) => line.trim().split(/\s+/)[3] === '0A')) sockets.push(`a port of ${place.name}`)
    if ((await textOf(place, '/proc/net/unix')).includes(nonce)) sockets.push(`a socket of job ${nonce}`)
  }
  return [...alive.map((pid) => `process ${pid}`), ...sockets]
}

/** Strikes a rank of 2 x 2 at a random moment of a mix of operations. */
export async function strikeNodes(
  lab: Lab,
  { victim, fault, seed }: { victim: number; fault: Fault; seed: number },
): Promise<NodesOutcome> {
  const random = randomFrom(seed)
  const isBrief = fault === 'SIGSTOP, SIGCONT'
  // Shorter than the silence that makes a peer lost.
  const timeoutMs = fault === 'SIGSTOP' ? 1500 : 20_000
  const nonce = newNonce()
  let struckMs = 0
  let numReady = 0
  let numThrough = 0
  const onSay = (rank: number, message: unknown, processes: readonly (ChildProcess | undefined)[]): void => {
    const child = processes[victim]
    if (message === 'ready' && ++numReady === 4) {
      setTimeout(() => (struckMs = strikeAt(child?.pid ?? -1, fault)), random(150))
    }
    if (message === 'through' && rank !== victim && ++numThrough === 3 && !isBrief) child?.kill('SIGKILL')
  }
  const outcomes = await inFolder(async (secretFile) =>
    runRanks(programs, 'operate', {
      worldSize: 4,
      nonce,
      on: (rank) => placeOf(lab, twoByTwo, rank),
      args: {
        timeoutMs,
        rounds: isBrief ? 40 : 1_000_000,
        victim: isBrief ? -1 : victim,
        stores: victims.map((rank) => `${placeOf(lab, twoByTwo, rank).address}:${nextStore}`),
      },
      env: () => ({
        ...variables(fault),
        TILERANK_STORE: `${lab.nodes[0]?.address ?? ''}:${firstStore}`,
        TILERANK_SECRET_FILE: secretFile,
        TILERANK_JOB: undefined,
      }),
      onSay,
      timeoutMs: 60_000,
    }),
  )
  const wrong: string[] = struckMs === 0 ? ['the ranks had ended before the strike'] : []
  let isMisnamed = false
  let detectionMs: number | undefined
  for (const outcome of outcomes) {
    if (outcome.rank === victim && !isBrief) continue
    const seen = outcome.value as NodesSeen | undefined
    if (seen === undefined) {
      wrong.push(`rank ${outcome.rank} gave no account: ${JSON.stringify(outcome)}`)
      continue
    }
    if (seen.again !== (isBrief ? 4 : 3)) wrong.push(`rank ${outcome.rank}: the next group gave ${String(seen.again)}`)
    if (seen.mapped !== 0) wrong.push(`rank ${outcome.rank}: ${seen.mapped} mappings are left`)
    if (isBrief) {
      if (seen.failure['code'] !== 'none')
        wrong.push(`rank ${outcome.rank}: ${JSON.stringify({ ...seen.failure, recorder: undefined })}`)
      continue
    }
    const pid = outcomes[victim]?.pid ?? -1
    const host = placeOf(lab, twoByTwo, victim).name
    const problems = wrongWith(seen.failure, { fault, victim, pid, host })
    if (fault === 'SIGSTOP' && seen.failure['code'] === 'ERR_TIMEOUT' && problems.length > 0) isMisnamed = true
    else wrong.push(...problems)
    const tookMs = Math.max(0, seen.atMs - struckMs - (seen.failure['code'] === 'ERR_TIMEOUT' ? timeoutMs : 0))
    detectionMs = Math.max(detectionMs ?? 0, tookMs)
    wrong.push(...tooSlow(`rank ${outcome.rank}`, tookMs, promisedMs))
  }
  const leftovers = await left(
    lab,
    outcomes.map(({ pid }) => pid),
    nonce,
  )
  return { wrong, leftovers, isMisnamed, ...(detectionMs === undefined ? {} : { detectionMs }) }
}

interface NetworkFault {
  /** Of the bytes to rank 1 from the moment on; none: the stranger. */
  readonly faults?: Directions
  /** The group goes on, and all results are right. */
  readonly isHarmless: boolean
  /** After which it is found: silence only by heartbeats. */
  readonly withinMs: number
}

export const networkFaults: Readonly<Record<string, NetworkFault>> = {
  'delay of 20 ms': { faults: { forward: { delayMs: 20 }, backward: { delayMs: 20 } }, isHarmless: true, withinMs: 0 },
  'cut, RST': { faults: { forward: { cut: { at: 5000, by: 'RST' } } }, isHarmless: false, withinMs: 1000 },
  'cut, FIN': { faults: { forward: { cut: { at: 5000, by: 'FIN' } } }, isHarmless: false, withinMs: 1000 },
  'a flipped bit': { faults: { forward: { flipBitAt: 5000 } }, isHarmless: false, withinMs: 6000 },
  'lost bytes': { faults: { forward: { drop: { at: 5000, nbytes: 100 } } }, isHarmless: false, withinMs: 6000 },
  'swapped bytes': { faults: { forward: { swap: { at: 5000, nbytes: 100 } } }, isHarmless: false, withinMs: 6000 },
  silence: {
    faults: { forward: { isStalled: true }, backward: { isStalled: true } },
    isHarmless: false,
    withinMs: 6000,
  },
  'a stranger at the port': { isHarmless: true, withinMs: 0 },
}

/** Strikes the network in front of rank 1, of two ranks on two nodes. */
export async function strikeNetwork(lab: Lab, name: string): Promise<NodesOutcome> {
  const what = networkFaults[name]
  const shape = [[0], [1]]
  const target = placeOf(lab, shape, 1)
  if (what === undefined) throw new Error(`no such fault: ${name}`)
  const nonce = newNonce()
  const relays: Relay[] = []
  let struckMs = 0
  let numReady = 0
  let striking: Promise<void> | undefined
  try {
    for (const rank of [0, 1]) {
      const on = placeOf(lab, shape, rank)
      relays.push(await startRelay({ on, port: relayPort, target: { host: on.address, port: pullPort } }))
    }
    const strike = async (): Promise<void> => {
      await pause(50)
      struckMs = Number(process.hrtime.bigint() / 1000n) / 1000
      if (what.faults !== undefined) return relays[1]?.set(what.faults)
      const child = lab.nodes[0]?.run(nodeCommand, [stranger, `tcp://${target.address}:${pullPort}`], {
        stdio: 'inherit',
      })
      if (child !== undefined) await once(child, 'close')
    }
    const outcomes = await inFolder(async (secretFile) =>
      runRanks(programs, 'operate', {
        worldSize: 2,
        nonce,
        on: (rank) => placeOf(lab, shape, rank),
        // Another group follows at once where nobody was lost.
        args: {
          timeoutMs: 20_000,
          rounds: what.isHarmless ? 60 : 1_000_000,
          victim: -1,
          stores: shape.map(() => `${lab.nodes[0]?.address ?? ''}:${nextStore}`),
        },
        env: () => ({
          NODE_OPTIONS: `--import=${relayHook}`,
          TILERANK_TEST_RELAY: '1',
          TILERANK_STORE: `${lab.nodes[0]?.address ?? ''}:${firstStore}`,
          TILERANK_SECRET_FILE: secretFile,
          TILERANK_JOB: undefined,
        }),
        onSay: (_, message) => {
          if (message === 'ready' && ++numReady === 2) striking = strike()
          // What comes after is another network.
          if (message === 'through') void relays[1]?.set({ forward: {}, backward: {} })
        },
        timeoutMs: 60_000,
      }),
    )
    await striking
    const wrong: string[] = []
    let detectionMs: number | undefined
    for (const { rank, pid, value, ...rest } of outcomes) {
      const seen = value as NodesSeen | undefined
      if (seen === undefined) {
        wrong.push(`rank ${rank} gave no account: ${JSON.stringify(rest)}`)
        continue
      }
      if (seen.again !== 2) wrong.push(`rank ${rank}: the next group gave ${String(seen.again)}`)
      const said = JSON.stringify({ ...seen.failure, recorder: undefined })
      if (seen.failure['code'] !== (what.isHarmless ? 'none' : 'ERR_PEER_LOST'))
        wrong.push(`rank ${rank} (pid ${pid}): ${said}`)
      if (what.isHarmless) continue
      const tookMs = Math.max(0, seen.atMs - struckMs)
      detectionMs = Math.max(detectionMs ?? 0, tookMs)
      wrong.push(...tooSlow(`rank ${rank}`, tookMs, what.withinMs))
    }
    for (const relay of relays.splice(0)) {
      if ((await relay.counts()).connections === 0) wrong.push(`nobody came through the relay at ${relay.host}`)
      await relay.close()
    }
    const leftovers = await left(
      lab,
      outcomes.map(({ pid }) => pid),
      nonce,
    )
    return { wrong, leftovers, ...(detectionMs === undefined ? {} : { detectionMs }) }
  } finally {
    for (const relay of relays) await relay.close()
  }
}
