// From ArchSpec to Graph: one builder per family, chosen by a table.

import type { ArchSpec } from '../checkpoint/arch.js'
import type { Graph } from '../graph.js'
import { llamaGraph } from './llama.js'

const builders: Readonly<Record<ArchSpec['family'], (arch: ArchSpec) => Graph>> = { llama: llamaGraph }

export function buildGraph(arch: ArchSpec): Graph {
  return builders[arch.family](arch)
}
