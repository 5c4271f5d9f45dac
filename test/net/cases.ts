// What ranks do in the tests of the laboratory, see test/ranks.ts.

import { hostname } from 'node:os'
import process from 'node:process'

export function whereAmI(): readonly (string | undefined)[] {
  const { LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR } = process.env
  return [hostname(), LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR]
}
