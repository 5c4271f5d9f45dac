// Where this rank runs, as its launcher said in the environment.

import { readRankEnvironment } from '../collectives/index.js'
import { parseCpuList } from '../launcher/index.js'
import { InferenceError } from './errors.js'

export interface Place {
  readonly rank: number
  readonly worldSize: number
  /** Cores of this rank's threads; empty: one thread that is not bound. */
  readonly cores: readonly number[]
}

/** @throws CollectiveError naming a launcher variable that is missing or contradicts another */
export function placeFromEnvironment(env: NodeJS.ProcessEnv = process.env): Place {
  const place = readRankEnvironment(env)
  const text = env['TILERANK_CORES'] ?? ''
  const cores = parseCpuList(text)
  if (!cores)
    throw new InferenceError('ERR_INVALID_OPTION', `TILERANK_CORES is '${text}'; a list such as 0-3,8 is expected`)
  return { rank: place?.rank ?? 0, worldSize: place?.worldSize ?? 1, cores }
}
