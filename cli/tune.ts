// `tilerank tune X`: measures what is best on this machine, and keeps it where later runs find it.

import process from 'node:process'
import type { Command } from 'commander'
import { tunedPath, writeTuned } from '../collectives/index.js'
import { InferenceError } from '../tp/errors.js'
import { machineLine } from '../bench/machine.js'
import { positiveNumber } from './options.js'

export function registerTune(program: Command): void {
  const tune = program.command('tune').description('measure what is best on this machine, and keep it')

  tune
    .command('collectives')
    .description(
      'find the algorithms and chunks of allReduce for a number of ranks, for createGroup to use from then on',
    )
    .option('--ranks <count>', 'ranks, one a core', positiveNumber, 2)
    .option('--trials <count>', 'fresh sets of processes', positiveNumber, 3)
    .option('--dry-run', 'measure, and keep nothing')
    .option('--json', 'the table as it is kept')
    .action(async (flags: { ranks: number; trials: number; dryRun?: boolean; json?: boolean }) => {
      const { formatTuned, tuneCollectives } = await import('../bench/tune.js')
      const { table, rows } = await tuneCollectives(flags)
      const path = tunedPath(table)
      if (flags.dryRun !== true) {
        if (path === undefined)
          throw new InferenceError('ERR_INVALID_OPTION', 'no folder for the table: set XDG_CACHE_HOME or HOME')
        writeTuned(path, table)
      }
      if (flags.json === true) {
        process.stdout.write(`${JSON.stringify(table, null, 2)}\n`)
        return
      }
      const outcome =
        table.rules.length === 0
          ? 'the defaults are as good as anything'
          : `${table.rules.length} rules beside the defaults`
      const kept = flags.dryRun === true ? 'nothing was written' : `kept in ${path ?? ''}`
      process.stdout.write(`${machineLine()}\n\n${formatTuned(rows)}\n\n${outcome}; ${kept}\n`)
    })
}
