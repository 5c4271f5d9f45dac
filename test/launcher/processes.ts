// For tests that start processes: run one to its end, and see who is still alive (a zombie is not).

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

export const tpLaunch = fileURLToPath(new URL('../../launcher/cli.js', import.meta.url))
export const node = process.execPath

export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
  readonly elapsedMs: number
}

export interface Started {
  readonly child: ChildProcess
  readonly ended: Promise<Ended>
  /** Resolves as soon as stdout matches. */
  readonly saw: (pattern: RegExp) => Promise<RegExpExecArray>
}

export function start(
  command: string,
  args: readonly string[],
  options: { env?: NodeJS.ProcessEnv; input?: string; cwd?: string } = {},
): Started {
  const begin = Date.now()
  const child = spawn(command, args, {
    env: { ...process.env, ...options.env },
    stdio: ['pipe', 'pipe', 'pipe'],
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  })
  child.stdin.on('error', () => undefined)
  child.stdin.end(options.input ?? '')
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text))
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const ended = once(child, 'close').then(([code, signal]): Ended => {
    return {
      code: code as number | null,
      signal: signal as NodeJS.Signals | null,
      stdout,
      stderr,
      elapsedMs: Date.now() - begin,
    }
  })
  const saw = async (pattern: RegExp): Promise<RegExpExecArray> => {
    for (;;) {
      const found = pattern.exec(stdout)
      if (found !== null) return found
      if (child.exitCode !== null || child.signalCode !== null)
        throw new Error(`ended without ${String(pattern)}: ${stdout}${stderr}`)
      await pause(10)
    }
  }
  return { child, ended, saw }
}

export const run = (command: string, args: readonly string[], options?: Parameters<typeof start>[2]): Promise<Ended> =>
  start(command, args, options).ended

export const launch = (args: readonly string[], options?: Parameters<typeof start>[2]): Promise<Ended> =>
  run(node, [tpLaunch, ...args], options)

export const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

/** Not even a zombie's entry, or only that: where process 1 does not reap, dead processes stay listed. */
export function isAlive(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    return !['Z', 'X'].includes(stat.slice(stat.lastIndexOf(')') + 2, stat.lastIndexOf(')') + 3))
  } catch {
    return false
  }
}

/** Processor time of a process and its threads, in milliseconds (clock ticks are 10 ms). */
export function cpuMs(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return 10 * (Number(fields[11]) + Number(fields[12]))
}

/** Those still alive after `ms`. */
export async function survivors(pids: readonly number[], ms: number): Promise<number[]> {
  const end = Date.now() + ms
  while (pids.some(isAlive) && Date.now() < end) await pause(20)
  return pids.filter(isAlive)
}
