// One rank struck at every step of every algorithm, by test/native/faults.cpp: builds it, runs it, and reads what it says.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../../native/index.js'

/** One algorithm and fault, at all steps of all ranks. */
export interface StepsRow {
  readonly world: 'node' | 'nodes'
  readonly job: string
  readonly fault: string
  readonly times: number
  readonly right: number
  /** ERR_TIMEOUT that names a rank which itself waits for the one that stands still: docs/reliability.md. */
  readonly misnamed: number
  readonly left: number
  /** From the strike, or the deadline, to the last survivor's error. */
  readonly medianMs?: number
  readonly worstMs?: number
}

async function run(
  command: string,
  args: readonly string[],
): Promise<{ code: unknown; stdout: string; stderr: string }> {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text))
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const [code] = (await once(child, 'close')) as [number | null]
  return { code, stdout, stderr }
}

/** @param every takes each so-many-th case; first: the number of the first one. `problems`: empty where all was right. */
export async function strikeSteps(every: number, first = 0): Promise<{ rows: StepsRow[]; problems: string }> {
  const build = join(packageRoot, 'build')
  const jobs = String(availableParallelism())
  const locked = [join(build, '.test-lock'), 'cmake', '--build', build, '--parallel', jobs, '--target', 'test_faults']
  const built = await run('flock', locked)
  if (built.code !== 0) throw new Error(`test_faults was not built: ${built.stderr}${built.stdout}`)
  const ended = await run(join(build, 'test', 'native', 'test_faults'), [String(every), String(first)])
  const rows = ended.stdout
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as StepsRow)
  return { rows, problems: ended.code === 0 ? '' : ended.stderr || `test_faults ended with ${String(ended.code)}` }
}
