// What a test needs and does not find here. Under CI everything but hardware is there, or CI has not installed it: then that is a
// failure. Elsewhere the test is skipped, and its title says why.

import type { Context } from 'mocha'

/** @param what names the thing and how to get it, e.g. 'no libtsan here: install the full g++ package' */
export function unavailable(context: Context, what: string): never {
  if (process.env['CI'] === 'true') throw new Error(`under CI this test may not be skipped: ${what}`)
  const test = context.currentTest ?? context.test // the first in a beforeEach hook
  if (test) test.title += ` (${what})`
  return context.skip()
}
