#!/usr/bin/env node
// `tilerank`: each subcommand is one file that registers itself, loaded only when it is called, so that starting costs nothing.
// Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line and their facts; the stack needs --debug.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { inspect } from 'node:util'
import { Command, CommanderError } from 'commander'
import { formatRecording, recorderVariable, type Recording } from '../collectives/index.js'
import { packageRoot } from '../native/index.js'

interface Subcommand {
  readonly description: string
  readonly load: () => Promise<(program: Command) => void>
}

const subcommands: Readonly<Record<string, Subcommand>> = {
  generate: {
    description: 'write text with a model, split over ranks of this machine',
    load: async () => (await import('./generate.js')).registerGenerate,
  },
  demo: {
    description: 'let two ranks write a story with the embedded model',
    load: async () => (await import('./demo.js')).registerDemo,
  },
  plan: {
    description: 'show how a model is split over ranks, and what each rank takes',
    load: async () => (await import('./plan.js')).registerPlan,
  },
  bench: {
    description: 'measure collectives, kernels and generation beside the limits of this machine',
    load: async () => (await import('./bench.js')).registerBench,
  },
  simulate: {
    description: 'predict collectives on machines that are not here, up to 1024 ranks on 128 nodes',
    load: async () => (await import('./simulate.js')).registerSimulate,
  },
  tune: {
    description: 'measure which algorithms are best on this machine, and keep it',
    load: async () => (await import('./tune.js')).registerTune,
  },
  trace: {
    description: 'put the traces of several ranks into one',
    load: async () => (await import('./trace.js')).registerTrace,
  },
  doctor: {
    description: 'show what this machine offers, what is missing, and how to mend it',
    load: async () => (await import('./doctor.js')).registerDoctor,
  },
  build: {
    description: 'build the native addon, where the installation did not',
    load: async () => (await import('./build.js')).registerBuild,
  },
}

const exitCodes = { failed: 1, usage: 2, interrupted: 130 } as const

function readVersion(): string {
  const manifest: unknown = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8'))
  return typeof manifest === 'object' && manifest !== null && 'version' in manifest
    ? String(manifest.version)
    : 'unknown'
}

/** Facts of an error as data: its `fields`, or its own properties (errors of the addon). */
function factsOf(error: Error): [string, unknown][] {
  const facts: object =
    'fields' in error && typeof error.fields === 'object' && error.fields !== null ? error.fields : error
  const known = new Set(['name', 'message', 'stack', 'code', 'cause', 'fields', 'recorder'])
  return Object.entries(facts).filter(([key, value]) => !known.has(key) && value !== undefined)
}

function codeOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined
}

function printError(error: unknown, isDebug: boolean): void {
  const code = codeOf(error)
  const message = error instanceof Error ? error.message : String(error)
  const lines = [`tilerank: ${message}${code === undefined ? '' : ` (${code})`}`]
  if (error instanceof Error) {
    for (const [key, value] of factsOf(error)) {
      const text = typeof value === 'string' ? value : inspect(value, { breakLength: Infinity, depth: 4 })
      lines.push(`  ${key}: ${text.length > 400 ? `${text.slice(0, 397)}...` : text}`)
    }
    const table = 'recorder' in error ? formatRecording(error.recorder as Recording) : []
    if (table.length > 0) {
      lines.push('  the last operations of each rank:', ...table.map((line) => `    ${line}`))
      if ((process.env[recorderVariable] ?? '') === '')
        lines.push(`  ${recorderVariable}=FILE writes the last 1024 of each`)
    }
    if (isDebug) lines.push(error.stack ?? '')
    if (isDebug && error.cause instanceof Error) lines.push(`caused by ${error.cause.stack ?? error.cause.message}`)
  }
  process.stderr.write(`${lines.join('\n')}\n`)
}

function exitCodeOf(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : exitCodes.usage
  switch (codeOf(error)) {
    case 'ERR_ABORTED':
    case 'ABORT_ERR':
      return exitCodes.interrupted
    case 'ERR_INVALID_OPTION':
      return exitCodes.usage
    default:
      return exitCodes.failed
  }
}

async function main(words: readonly string[]): Promise<void> {
  const program = new Command('tilerank')
    .description(
      'Runs large language models on the processors of this machine, split over ranks by tensor parallelism.',
    )
    .version(readVersion(), '-V, --version')
    .option('--debug', 'print the stack of an error')
    .exitOverride()
    .showHelpAfterError('(see tilerank --help)')
  const [first, second] = words.filter((word) => !word.startsWith('-'))
  const called = first === 'help' ? second : first
  for (const [name, { description, load }] of Object.entries(subcommands)) {
    if (name === called) (await load())(program)
    else program.command(name).description(description) // for the list of --help
  }
  // Settings are copied to a subcommand when it is made; those that registered themselves get them here.
  for (const command of program.commands) command.copyInheritedSettings(program)
  if (words.every((word) => word === '--debug')) {
    program.outputHelp({ error: true })
    process.exitCode = exitCodes.usage
    return
  }
  await program.parseAsync([...words], { from: 'user' })
}

const words = process.argv.slice(2)
// `tilerank ... | head` is no failure: the reader had enough.
process.stdout.on('error', (error: NodeJS.ErrnoException) =>
  process.exit(error.code === 'EPIPE' ? 0 : exitCodes.failed),
)
try {
  await main(words)
} catch (error) {
  if (!(error instanceof CommanderError)) printError(error, words.includes('--debug'))
  process.exitCode = exitCodeOf(error)
}
