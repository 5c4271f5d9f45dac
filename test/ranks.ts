// Runs one function on N rank processes and brings their results back. A function stands in a module of its own, is named, takes
// plain data and returns plain data; each rank runs it with the variables that a launcher would set. Bounded in time, and no
// process outlives the call.

import { fork, type ChildProcess, type StdioOptions } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { LabNode } from '../bench/lab.js'

/** How one rank ended. */
export interface RankOutcome {
  readonly rank: number
  readonly pid: number
  /** What the function returned. */
  readonly value?: unknown
  /** What it threw: name, code, message and the error's own fields. */
  readonly error?: Readonly<Record<string, unknown>>
  readonly exitCode: number | null
  readonly signal: NodeJS.Signals | null
  readonly stderr: string
  /** From the start of the run to the rank's report. */
  readonly elapsedMs: number
}

export interface RanksOptions {
  readonly worldSize: number
  readonly args?: unknown
  /** Added to the variables of every rank, or of one; undefined removes a variable. */
  readonly env?: (rank: number) => Readonly<Record<string, string | undefined>>
  /** The node of a lab where a rank runs; its local variables follow. All on this machine if absent. */
  readonly on?: (rank: number) => LabNode
  /** Ranks that are not started. */
  readonly absent?: readonly number[]
  /** A descriptor that the rank inherits, as its number 4. */
  readonly inherit?: (rank: number) => number | undefined
  /** Called with each message that a rank sends by `say`, with all processes. */
  readonly onSay?: (rank: number, message: unknown, processes: readonly (ChildProcess | undefined)[]) => void
  readonly timeoutMs?: number
  readonly nonce?: string
}

export const newNonce = (): string => randomBytes(16).toString('hex')

/** The variables of one rank of a job on this node. */
export function rankEnv(rank: number, worldSize: number, nonce: string): Record<string, string> {
  return {
    RANK: String(rank),
    WORLD_SIZE: String(worldSize),
    LOCAL_RANK: String(rank),
    LOCAL_WORLD_SIZE: String(worldSize),
    LOCAL_SIZE: String(worldSize),
    MASTER_ADDR: '127.0.0.1',
    MASTER_PORT: '29500',
    TILERANK_JOB: nonce,
  }
}

/** What a rank of a lab has instead of the variables of one node. */
function placedEnv(rank: number, places: readonly LabNode[]): Record<string, string> {
  const local = places.flatMap((place, other) => (place === places[rank] ? [other] : []))
  return {
    LOCAL_RANK: String(local.indexOf(rank)),
    LOCAL_WORLD_SIZE: String(local.length),
    LOCAL_SIZE: String(local.length),
    MASTER_ADDR: places[0]?.address ?? '',
  }
}

interface Report {
  readonly kind: 'say' | 'value' | 'error'
  readonly value: unknown
}

const isReport = (message: unknown): message is Report =>
  typeof message === 'object' && message !== null && 'kind' in message && 'value' in message

export async function runRanks(module: URL, name: string, options: RanksOptions): Promise<RankOutcome[]> {
  const nonce = options.nonce ?? newNonce()
  const main = join(dirname(fileURLToPath(import.meta.url)), 'rankMain.js')
  const start = performance.now()
  const processes: (ChildProcess | undefined)[] = []
  const outcomes: Promise<RankOutcome>[] = []
  const { on } = options
  const places = on === undefined ? undefined : Array.from({ length: options.worldSize }, (_, rank) => on(rank))
  for (let rank = 0; rank < options.worldSize; rank++) {
    if (options.absent?.includes(rank) === true) {
      processes.push(undefined)
      continue
    }
    const env = {
      ...process.env,
      ...rankEnv(rank, options.worldSize, nonce),
      ...(places === undefined ? {} : placedEnv(rank, places)),
      ...options.env?.(rank),
    }
    const args = [fileURLToPath(module), name, JSON.stringify(options.args ?? null)]
    const stdio: StdioOptions = ['ignore', 'inherit', 'pipe', 'ipc', options.inherit?.(rank) ?? 'ignore']
    const child =
      places?.[rank]?.run(process.execPath, [...process.execArgv, main, ...args], { env, stdio }) ??
      fork(main, args, { env, stdio })
    processes.push(child)
    outcomes.push(
      new Promise((resolve) => {
        let report: Report | undefined
        let elapsedMs = 0
        let stderr = ''
        child.stderr?.on('data', (text: Buffer) => (stderr += text.toString()))
        child.on('message', (message: unknown) => {
          if (!isReport(message)) return
          if (message.kind === 'say') return options.onSay?.(rank, message.value, processes)
          report = message
          elapsedMs = performance.now() - start
        })
        child.on('close', (exitCode, signal) => {
          const base = { rank, pid: child.pid ?? -1, exitCode, signal, stderr, elapsedMs }
          if (report === undefined) resolve(base)
          else if (report.kind === 'value') resolve({ ...base, value: report.value })
          else resolve({ ...base, error: report.value as Readonly<Record<string, unknown>> })
        })
      }),
    )
  }
  const timer = setTimeout(() => {
    for (const child of processes) child?.kill('SIGKILL')
  }, options.timeoutMs ?? 30_000)
  try {
    return await Promise.all(outcomes)
  } finally {
    clearTimeout(timer)
  }
}

/** Values of all ranks; the first failure of any becomes this call's. */
export async function ranksValues(module: URL, name: string, options: RanksOptions): Promise<unknown[]> {
  const outcomes = await runRanks(module, name, options)
  for (const outcome of outcomes) {
    if (!('value' in outcome))
      throw new Error(`rank ${String(outcome.rank)} of ${name} failed: ${JSON.stringify(outcome)}`)
  }
  return outcomes.map((outcome) => outcome.value)
}
