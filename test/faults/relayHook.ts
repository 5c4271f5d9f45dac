// Loaded into every rank of the relay's tests by NODE_OPTIONS=--import, and so into its network thread: gives sockets known ports, and has
// peers connect to the relay in front of them (nodes.ts).

import { isMainThread, workerData } from 'node:worker_threads'
import { Pull, Push } from 'zeromq'

export const pullPort = 41_000
export const relayPort = 42_000

const isNetwork = typeof workerData === 'object' && workerData !== null && 'mailboxId' in workerData
if (!isMainThread && isNetwork && process.env['TILERANK_TEST_RELAY'] === '1') {
  // Their own are natives that cannot be assigned to.
  const replace = (prototype: object, name: string, rewrite: (endpoint: string) => string): void => {
    const original = Reflect.get(prototype, name) as (endpoint: string) => unknown
    const value = function (this: unknown, endpoint: string): unknown {
      return Reflect.apply(original, this, [rewrite(endpoint)])
    }
    Object.defineProperty(prototype, name, { value })
  }
  replace(Pull.prototype, 'bind', (endpoint) => endpoint.replace(/:\*$/, `:${pullPort}`))
  replace(Push.prototype, 'connect', (endpoint) => endpoint.replace(`:${pullPort}`, `:${relayPort}`))
}
