// Loaded into every rank of the fault tests by NODE_OPTIONS=--import: makes a signal of the test a fault of the rank's own program.
// In processes that are no ranks (the test, tp-launch) it does nothing.

import { closeSync, openSync } from 'node:fs'

if (process.env['RANK'] !== undefined) {
  process.on('SIGUSR2', () => {
    // What follows prints, on purpose of nobody.
    closeSync(2)
    openSync('/dev/null', 'w')
    switch (process.env['TILERANK_TEST_FAULT']) {
      case 'exit(0)':
        process.exit(0)
        break
      case 'exception':
        throw new Error('on purpose')
      default:
        process.abort()
    }
  })
}
