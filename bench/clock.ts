// One clock for the ranks of a machine.

import process from 'node:process'

/** What performance.now(), which begins with the process, lacks to CLOCK_MONOTONIC, in ms. */
export function clockOffset(): number {
  let least = Infinity
  let offset = 0
  for (let i = 0; i < 2000; i++) {
    const before = performance.now()
    const now = Number(process.hrtime.bigint()) / 1e6
    const after = performance.now()
    if (after - before < least) {
      least = after - before
      offset = now - (before + after) / 2
    }
  }
  return offset
}
