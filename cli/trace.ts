// `tilerank trace merge`: the traces of several ranks as one, on standard output.

import { readFileSync } from 'node:fs'
import process from 'node:process'
import type { Command } from 'commander'
import { traceOfRecording, type Recording, type Trace } from '../collectives/index.js'
import { InferenceError } from '../tp/errors.js'

/** A trace as ranks write it, or the JSON of a flight recorder. */
function readTrace(path: string): Trace {
  const fail = (why: string): Error => new InferenceError('ERR_INVALID_OPTION', `${path}: ${why}`)
  let parsed: unknown
  try {
    parsed = JSON.parse(readFileSync(path, 'utf8'))
  } catch (error) {
    throw fail(error instanceof Error ? error.message : String(error))
  }
  if (typeof parsed === 'object' && parsed !== null) {
    if ('traceEvents' in parsed && Array.isArray(parsed.traceEvents)) return parsed as Trace
    if ('ranks' in parsed && Array.isArray(parsed.ranks)) return traceOfRecording(parsed.ranks as Recording)
  }
  throw fail('neither a trace nor a recording of the flight recorder')
}

export function registerTrace(program: Command): void {
  const trace = program.command('trace').description('work on traces of collectives (TILERANK_TRACE=DIR writes them)')

  trace
    .command('merge')
    .description('put the traces or recordings of several ranks into one, for ui.perfetto.dev')
    .argument('<files...>', 'what TILERANK_TRACE or TILERANK_RECORDER wrote')
    .action((files: string[]) => {
      const traceEvents = files.flatMap((file) => readTrace(file).traceEvents)
      process.stdout.write(`${JSON.stringify({ traceEvents, displayTimeUnit: 'ns' })}\n`)
    })
}
