// Whether all ranks of a job fit into this machine together, before any of them starts or maps anything: memory under every limit
// above this process, and what setrlimit leaves each of them. Sizes are the plan's, which are those that the ranks then allocate.

import type { Topology } from '../launcher/index.js'
import type { Checkpoint } from './checkpoint/index.js'
import { InferenceError } from './errors.js'
import { kvBlockTokens } from './kvBlocks.js'
import { planModel } from './plan.js'
import type { RankConfig } from './rank.js'
import type { EngineLimits } from './scheduler.js'

// A Node process, its heap, the addon and its libraries: 60 to 75 MiB resident once loaded.
const processBytes = 80 * 2 ** 20
// Address space of a thread: its stack, and the heap that the allocator reserves for it.
const threadBytes = 72 * 2 ** 20
// Descriptors of a rank: Node's own and those of the modules that it reads at the same time (47 was the least that 2 ranks started
// with), each peer's arena and process while ranks meet, the files of the checkpoint while they are read.
const processFiles = 40
const filesPerPeer = 4

const inGiB = (nbytes: number): string =>
  nbytes < 2 ** 27 ? `${(nbytes / 2 ** 20).toFixed(1)} MiB` : `${(nbytes / 2 ** 30).toFixed(2)} GiB`

export interface JobBytes {
  readonly weights: number
  readonly kv: number
  /** Activations and scratch. */
  readonly scratch: number
  /** Shared memory. */
  readonly arena: number
  /** Of the processes themselves. */
  readonly processes: number
  readonly total: number
  /** Private memory of the largest rank. */
  readonly largestRank: number
}

/** Bytes of all ranks together, with `threads` threads each; with `here`, of so many of them, the largest. */
export function jobBytes(
  checkpoint: Checkpoint,
  config: RankConfig,
  limits: EngineLimits,
  threads: number,
  here: number = config.worldSize,
): JobBytes {
  const plan = planModel(checkpoint, {
    worldSize: config.worldSize,
    dtype: config.dtype,
    maxTokens: limits.maxPositions,
    stepTokens: limits.maxTokens,
    batch: limits.maxSequences,
    kvCacheTokens: limits.numBlocks * kvBlockTokens,
    threads,
  })
  const ranks = [...plan.ranks].sort((a, b) => b.totalBytes - a.totalBytes).slice(0, here)
  const sum = (key: 'weightBytes' | 'kvBytes' | 'scratchBytes' | 'arenaBytes' | 'totalBytes'): number =>
    ranks.reduce((total, rank) => total + rank[key], 0)
  const processes = here * processBytes
  return {
    weights: sum('weightBytes'),
    kv: sum('kvBytes'),
    scratch: sum('scratchBytes'),
    arena: sum('arenaBytes'),
    processes,
    total: sum('totalBytes') + processes,
    largestRank: Math.max(...ranks.map(({ totalBytes, arenaBytes }) => totalBytes - arenaBytes)),
  }
}

/**
 * To be called before anything of the job stands. `here`: how many of its ranks are to be on this machine.
 * @throws InferenceError ERR_NO_MEMORY or ERR_LIMIT, naming what is needed, what there is, who decides, and the way out
 */
export function checkRoom(
  checkpoint: Checkpoint,
  config: RankConfig,
  limits: EngineLimits,
  threads: number,
  topology: Pick<Topology, 'memoryAvailableBytes' | 'decidedBy' | 'processLimits'>,
  here: number = config.worldSize,
): void {
  const bytes = jobBytes(checkpoint, config, limits, threads, here)
  const { memoryAvailableBytes: available, decidedBy, processLimits } = topology
  const ranks = here === 1 ? 'one rank needs' : `${String(here)} ranks together need`
  const fields = {
    neededBytes: bytes.total,
    availableBytes: available,
    weightBytes: bytes.weights,
    kvBytes: bytes.kv,
    scratchBytes: bytes.scratch,
    arenaBytes: bytes.arena,
    decidedBy: decidedBy.memoryAvailable,
  }
  if (bytes.total > available) {
    throw new InferenceError(
      'ERR_NO_MEMORY',
      `the model does not fit: ${ranks} ${inGiB(bytes.total)} (weights ${inGiB(bytes.weights)}, KV cache ${inGiB(bytes.kv)} for ` +
        `${String(limits.numBlocks * kvBlockTokens)} tokens, activations ${inGiB(bytes.scratch)}, shared memory ${inGiB(bytes.arena)}, ` +
        `processes ${inGiB(bytes.processes)}) and ${inGiB(available)} are available by ${decidedBy.memoryAvailable}; ` +
        'use fewer kvCacheTokens or a smaller model, end other programs, or raise the limit',
      fields,
    )
  }
  const mapped = bytes.largestRank + bytes.arena
  const perProcess: readonly (readonly [what: string, option: string, needed: number, left: number])[] = [
    ['address space', '-v', mapped + threads * threadBytes, processLimits.addressSpaceLeft],
    ['data', '-d', bytes.largestRank + threads * threadBytes, processLimits.dataLeft],
  ]
  for (const [what, option, needed, left] of perProcess) {
    if (needed <= left) continue
    throw new InferenceError(
      'ERR_NO_MEMORY',
      `the model does not fit: a rank maps ${inGiB(needed)}, and the process limit of ${what} leaves ${inGiB(Math.max(0, left))}; raise it (ulimit ${option} unlimited)`,
      { ...fields, neededBytes: needed, availableBytes: left, decidedBy: `ulimit ${option}` },
    )
  }
  const shards = new Set([...checkpoint.tensors.values()].map(({ file }) => file)).size
  const files = processFiles + shards + filesPerPeer * config.worldSize
  if (files > processLimits.openFiles) {
    throw new InferenceError(
      'ERR_LIMIT',
      `a process may open ${String(processLimits.openFiles)} files, and a rank may need ${String(files)} (${String(shards)} of the checkpoint, the rest for itself and its peers); raise the limit (ulimit -n ${String(Math.max(1024, files))})`,
      { neededFiles: files, openFiles: processLimits.openFiles },
    )
  }
}
