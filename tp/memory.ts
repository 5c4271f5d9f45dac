// Whether all ranks of a job fit into this machine, before any of them starts.

import type { Checkpoint } from './checkpoint/index.js'
import { InferenceError } from './errors.js'
import { blocksFor, kvBlockTokens } from './kvBlocks.js'
import { planModel } from './plan.js'
import type { RankConfig } from './rank.js'
import type { EngineLimits } from './scheduler.js'

// A Node process, its heap, the addon and its libraries.
const processBytes = 80 * 2 ** 20

const inGiB = (nbytes: number): string => `${(nbytes / 2 ** 30).toFixed(2)} GiB`

/** Bytes of all ranks together: weights, KV cache, scratch, shared memory. */
export function jobBytes(
  checkpoint: Checkpoint,
  config: RankConfig,
  limits: EngineLimits,
): { weights: number; kv: number; rest: number; total: number } {
  const plan = planModel(checkpoint, {
    worldSize: config.worldSize,
    dtype: config.dtype,
    maxTokens: limits.maxPositions,
    stepTokens: limits.maxTokens,
    batch: 1,
  })
  const weights = plan.total.weightBytes
  const kv = (plan.total.kvBytes / blocksFor(limits.maxPositions)) * limits.numBlocks
  const rest = plan.total.scratchBytes + plan.total.arenaBytes + config.worldSize * processBytes
  return { weights, kv, rest, total: weights + kv + rest }
}

/** @throws InferenceError ERR_NO_MEMORY, naming what is needed and what there is */
export function checkMemory(
  checkpoint: Checkpoint,
  config: RankConfig,
  limits: EngineLimits,
  availableBytes: number,
): void {
  const { weights, kv, rest, total } = jobBytes(checkpoint, config, limits)
  if (total <= availableBytes) return
  throw new InferenceError(
    'ERR_NO_MEMORY',
    `the model does not fit: ${inGiB(total)} are needed (weights ${inGiB(weights)}, KV cache ${inGiB(kv)} for ${String(limits.numBlocks * kvBlockTokens)} tokens, ` +
      `rest ${inGiB(rest)}) and ${inGiB(availableBytes)} are available; use fewer kvCacheTokens, a smaller model, or more memory`,
    { neededBytes: total, availableBytes, weightBytes: weights, kvBytes: kv },
  )
}
