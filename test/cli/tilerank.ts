// Runs `tilerank` as a user does, and sees which of its processes are still there afterwards.

import { readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { isAlive, node, pause, start, type Ended, type Started } from '../launcher/processes.js'

const main = fileURLToPath(new URL('../../cli/main.js', import.meta.url))
const markName = 'TILERANK_TEST_MARK'

/** Living processes whose environment says that they come from this run. */
function processesOf(mark: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        return isAlive(pid) && readFileSync(`/proc/${String(pid)}/environ`, 'utf8').includes(`${markName}=${mark}\0`)
      } catch {
        return false // gone, or another user's
      }
    })
}

export interface TilerankRun extends Started {
  readonly processes: () => readonly number[]
}

export function startTilerank(args: readonly string[], env: NodeJS.ProcessEnv = {}): TilerankRun {
  const mark = `${String(process.pid)}.${String(performance.now())}.${String(Math.random())}`
  const started = start(node, [main, ...args], { env: { ...env, [markName]: mark } })
  return { ...started, processes: () => processesOf(mark) }
}

export interface TilerankEnded extends Ended {
  /** Processes that outlived the command by more than a moment. */
  readonly left: readonly number[]
}

export async function tilerank(args: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<TilerankEnded> {
  const { ended, processes } = startTilerank(args, env)
  const result = await ended
  return { ...result, left: await leftAfter(processes, 500) }
}

/** What is still there after `ms`; returns as soon as nothing is. */
export async function leftAfter(processes: () => readonly number[], ms: number): Promise<readonly number[]> {
  const end = Date.now() + ms
  while (processes().length > 0 && Date.now() < end) await pause(20)
  return processes()
}
