// `tilerank tune X`: measures what is best on this machine or in this job, and keeps it where later runs find it.

import process from 'node:process'
import type { Command } from 'commander'
import {
  CollectiveError,
  createGroup,
  readTuned,
  rulesOfOthers,
  tunedPath,
  writeTuned,
  type TunedTable,
} from '../collectives/index.js'
import type { Tuned } from '../bench/tune.js'
import { InferenceError } from '../tp/errors.js'
import { machineLine } from '../bench/machine.js'
import { positiveNumber } from './options.js'

/** With the rules that stand for other numbers of nodes; a table that cannot be read is replaced, as its error says. */
function withOthers(path: string, table: TunedTable, nodes: number): TunedTable {
  const { rules, measured, ...key } = table
  try {
    return { ...key, measured, rules: [...rules, ...rulesOfOthers(readTuned(path, key)?.rules ?? [], nodes)] }
  } catch (error) {
    if (error instanceof CollectiveError && error.code === 'ERR_ENVIRONMENT') return table
    throw error
  }
}

interface Flags {
  readonly ranks?: number
  readonly bytes?: number[]
  readonly trials: number
  readonly dryRun?: boolean
  readonly json?: boolean
}

export function registerTune(program: Command): void {
  const tune = program.command('tune').description('measure what is best on this machine, and keep it')

  tune
    .command('collectives')
    .description(
      'find the algorithms and chunks of allReduce for a number of ranks, for createGroup to use from then on. ' +
        'As a rank of a job (started by mpirun, srun or torchrun, or with RANK, WORLD_SIZE and TILERANK_STORE set) it measures with the ' +
        'other ranks, across nodes too, and every rank keeps the result',
    )
    .option('--ranks <count>', 'ranks that it starts, one a core (default: 2, outside of a job)', positiveNumber)
    .option('--bytes <list>', 'sizes to measure, rising, in a job', (text) => text.split(',').map(positiveNumber))
    .option('--trials <count>', 'times that all is measured', positiveNumber, 3)
    .option('--dry-run', 'measure, and keep nothing')
    .option('--json', 'the table as it is kept')
    .action(async (flags: Flags) => {
      const { formatTuned, tuneCollectives, tuneJob } = await import('../bench/tune.js')
      // Without a launcher's variables a group of one.
      const group = flags.ranks === undefined ? await createGroup({ algorithms: 'default' }) : undefined
      let tuned: Tuned
      const [rank, nodes] = [group?.rank ?? 0, group?.nodes.length ?? 1]
      try {
        const isJob = group !== undefined && group.worldSize > 1
        if (flags.bytes !== undefined && (!isJob || flags.bytes.some((size) => size % 4 !== 0)))
          throw new InferenceError('ERR_INVALID_OPTION', '--bytes takes multiples of 4, and is for ranks of a job')
        tuned = isJob ? await tuneJob(group, flags) : await tuneCollectives(flags)
      } finally {
        await group?.close()
      }
      const path = tunedPath(tuned.table)
      if (path === undefined && flags.dryRun !== true)
        throw new InferenceError('ERR_INVALID_OPTION', 'no folder for the table: set XDG_CACHE_HOME or HOME')
      const table = path === undefined ? tuned.table : withOthers(path, tuned.table, nodes)
      if (path !== undefined && flags.dryRun !== true) writeTuned(path, table)
      if (rank > 0) return
      if (flags.json === true) {
        process.stdout.write(`${JSON.stringify(table, null, 2)}\n`)
        return
      }
      const outcome =
        tuned.table.rules.length === 0
          ? 'the defaults are as good as anything'
          : `${tuned.table.rules.length} rules beside the defaults`
      const kept = flags.dryRun === true ? 'nothing was written' : `kept in ${path ?? ''}`
      process.stdout.write(`${machineLine()}\n\n${formatTuned(tuned.rows)}\n\n${outcome}; ${kept}\n`)
    })
}
