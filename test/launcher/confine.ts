// For tests that take something away from a process: a real cgroup with a limit, or a sandbox that refuses system calls.

import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, rmdirSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../../native/index.js'
import { pause } from './processes.js'

export const noCgroup = 'no cgroup can be made: needs root and a writable hierarchy'
export const noCompiler = 'no compiler: install g++'

/** Words to put before a command, so that it runs inside. */
export type Prefix = readonly string[]

/**
 * Runs `use` with a cgroup below this process's own whose files hold what `version1` or `version2` say, whichever is here.
 * False, with nothing done, where none can be made: that needs root and a writable hierarchy.
 */
export async function withCgroup(
  controller: 'cpu' | 'memory',
  limits: { readonly version1: Readonly<Record<string, number>>; readonly version2: Readonly<Record<string, string>> },
  use: (prefix: Prefix, folder: string) => Promise<void>,
): Promise<boolean> {
  const lines = readFileSync('/proc/self/cgroup', 'utf8').split('\n')
  const version1 = lines.find((line) => line.split(':')[1]?.split(',').includes(controller))
  const path = (version1 ?? lines.find((line) => line.startsWith('0::')))?.split(':').slice(2).join(':')
  if (path === undefined) return false
  const mount = version1 === undefined ? '/sys/fs/cgroup' : `/sys/fs/cgroup/${controller}`
  const folder = join(mount, path, `tilerank-test-${String(process.pid)}-${String(Date.now())}`)
  try {
    mkdirSync(folder)
  } catch {
    return false
  }
  try {
    try {
      for (const [name, value] of Object.entries(version1 === undefined ? limits.version2 : limits.version1))
        writeFileSync(join(folder, name), String(value))
    } catch {
      return false // the controller is not handed down to this place
    }
    await use(['sh', '-c', 'echo $$ > "$0/cgroup.procs" && exec "$@"', folder], folder)
    return true
  } finally {
    // A group can go when its last process has been reaped.
    for (let look = 0; look < 100; look++) {
      try {
        rmdirSync(folder)
        break
      } catch {
        await pause(20)
      }
    }
  }
}

export type Denied = 'set_mempolicy' | 'mbind' | 'sched_setaffinity' | 'nothp'

/** Builds sandbox.cpp; undefined where no compiler is. `end` removes it. */
export function buildSandbox(): { readonly deny: (...what: Denied[]) => Prefix; readonly end: () => void } | undefined {
  const folder = mkdtempSync(join(tmpdir(), 'tilerank-sandbox-'))
  const end = (): void => {
    rmSync(folder, { recursive: true, force: true })
  }
  const program = join(folder, 'sandbox')
  try {
    execFileSync('g++', ['-std=c++20', '-o', program, join(packageRoot, 'test/launcher/sandbox.cpp')], {
      stdio: 'pipe',
    })
  } catch {
    end()
    return undefined
  }
  return { deny: (...what) => [program, ...what, '--'], end }
}
