// One rank of bench/tune.ts on this machine: times what it is told, and reports medians to whoever started it.

import process from 'node:process'
import { createGroup } from '../collectives/index.js'
import { timeCases, type TuneCase } from './tuneTime.js'

const group = await createGroup({ algorithms: 'default' })
try {
  await timeCases(JSON.parse(process.argv[2] ?? '') as TuneCase[], group, (times) => process.send?.(times))
} finally {
  await group.close()
}
process.disconnect()
