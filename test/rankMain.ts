// One rank of test/ranks.ts: imports the module, runs the named function with the arguments, reports, and leaves.

import { pathToFileURL } from 'node:url'

const [path = '', name = '', json = 'null'] = process.argv.slice(2)

function report(kind: 'value' | 'error', value: unknown): void {
  // Leaving the channel lets the process end by itself: a handle that was left open shows as a rank that never ends.
  process.send?.({ kind, value }, () => {
    process.disconnect()
  })
}

try {
  const module: unknown = await import(pathToFileURL(path).href)
  const run: unknown =
    typeof module === 'object' && module !== null && name in module ? Reflect.get(module, name) : undefined
  if (typeof run !== 'function') throw new Error(`${path} exports no function ${name}`)
  const args: unknown = JSON.parse(json)
  const value: unknown = await Reflect.apply(run, undefined, [args])
  report('value', value ?? null)
} catch (error) {
  if (error instanceof Error)
    report('error', { ...error, name: error.name, message: error.message, stack: error.stack, cause: undefined })
  else report('error', { name: typeof error, message: String(error) })
}
