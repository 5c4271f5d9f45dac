// One line that says where figures come from: processor, cores, ISA tier, versions, load.

import { cpus, loadavg, release } from 'node:os'
import process from 'node:process'
import { selectedTier } from '../kernels/index.js'
import { readTopology } from '../launcher/index.js'

export function machineLine(): string {
  const cores = readTopology().cores.length
  const load = loadavg()[0]?.toFixed(1) ?? '?'
  return `${cpus()[0]?.model ?? 'unknown processor'}, ${String(cores)} cores, tier ${selectedTier()}, Linux ${release()}, Node ${process.versions.node}, load ${load}`
}
