#!/usr/bin/env node
// tp-launch: starts N ranks of a command on this machine, each bound to its own cores, and ends as they end. Options stop at the
// first word that is none; the command's own words are passed on byte for byte. Exits as the rank that failed first.

import { constants } from 'node:os'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { formatRecording, recorderVariable, writeRecording, type Recording } from '../collectives/index.js'
import { AddonError, packageRoot } from '../native/index.js'
import { type BindingPlan, defaultRanks, planBinding, threadLimit } from './binding.js'
import { LauncherError } from './errors.js'
import { OutputMux } from './output.js'
import { type RankExit, type RankSet, childProcesses, describeExit, reap, shellCode, spawnRanks } from './spawn.js'
import { type Topology, formatCpuList, readTopology } from './topology.js'

const usage = `Usage: tp-launch [options] COMMAND [ARGS...]

Starts ranks of COMMAND on this machine, each bound to its own physical cores.
A COMMAND that ends in .js, .mjs, .cjs, .ts or .mts runs with this Node; any other is looked up in PATH.

  -n, --ranks N       number of ranks; default: one for each NUMA node with usable cores
      --cores LIST    cores to use: 0-27,56-83 is cut evenly, 0-27|56-83 gives each rank its own list
      --no-bind       do not bind ranks to cores
      --oversubscribe let ranks share cores when there are fewer cores than ranks
      --tag-output    begin each line of output with the rank that wrote it
      --grace S       seconds between asking ranks to end and ending them (default 2)
      --dry-run       print which rank would get which cores, and start nothing
      --json          with --dry-run: the plan as JSON
  -h, --help          this text
  -V, --version       the version

Every rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and TILERANK_CORES in its environment.
Standard input goes to rank 0. Interrupt and termination are passed on; a second interrupt ends all ranks at once.

Exit code: 0 when all ranks ended with 0, else that of the rank that failed first (128 + the signal's number when one ended it),
2 for a mistake in the command line.
`

interface Options {
  readonly ranks: number | undefined
  readonly cores: string | undefined
  readonly isBound: boolean
  readonly oversubscribe: boolean
  readonly isTagged: boolean
  readonly graceMs: number
  readonly isDryRun: boolean
  readonly isJson: boolean
  readonly command: readonly string[]
}

const invalid = (message: string) => new LauncherError('ERR_INVALID_OPTION', `${message}; see tp-launch --help`)

/** 'help' and 'version' end the parse: nothing behind them matters. */
function parseOptions(words: readonly string[]): Options | 'help' | 'version' {
  let at = 0
  const flags = new Set<string>()
  const values = new Map<string, string>()
  const longNames = new Map([
    ['-n', '--ranks'],
    ['-np', '--ranks'],
    ['-h', '--help'],
    ['-V', '--version'],
  ])
  const takesValue = new Set(['--ranks', '--cores', '--grace'])
  const isFlag = new Set(['--no-bind', '--oversubscribe', '--tag-output', '--dry-run', '--json', '--help', '--version'])
  for (; at < words.length; at++) {
    const word = words[at] ?? ''
    if (word === '--') {
      at++
      break
    }
    if (!word.startsWith('-') || word === '-') break
    const equals = word.startsWith('--') ? word.indexOf('=') : -1
    const glued = /^-n([0-9]+)$/.exec(word)?.[1]
    const given = glued === undefined ? (equals < 0 ? word : word.slice(0, equals)) : '-n'
    const name = longNames.get(given) ?? given
    if (takesValue.has(name)) {
      const value = glued ?? (equals < 0 ? words[++at] : word.slice(equals + 1))
      if (value === undefined) throw invalid(`${given} needs a value`)
      if (values.has(name)) throw invalid(`${given} is given twice`)
      values.set(name, value)
    } else if (isFlag.has(name) && equals < 0) {
      if (name === '--help') return 'help'
      if (name === '--version') return 'version'
      flags.add(name)
    } else {
      throw invalid(`unknown option '${word}'`)
    }
  }
  const command = words.slice(at)
  const ranks = values.get('--ranks')
  if (ranks !== undefined && !/^[1-9][0-9]{0,4}$/.test(ranks))
    throw invalid(`the number of ranks must be positive, not '${ranks}'`)
  const grace = values.get('--grace') ?? '2'
  if (!/^[0-9]{1,5}(\.[0-9]+)?$/.test(grace)) throw invalid(`--grace takes seconds, not '${grace}'`)
  if (flags.has('--no-bind') && values.has('--cores')) throw invalid('--no-bind and --cores contradict each other')
  if (flags.has('--json') && !flags.has('--dry-run')) throw invalid('--json belongs to --dry-run')
  if (command.length === 0 && !flags.has('--dry-run')) throw invalid('no command given')
  if (command[0] === '') throw invalid('the command is empty')
  return {
    ranks: ranks === undefined ? undefined : Number(ranks),
    cores: values.get('--cores'),
    isBound: !flags.has('--no-bind'),
    oversubscribe: flags.has('--oversubscribe'),
    isTagged: flags.has('--tag-output'),
    graceMs: Number(grace) * 1000,
    isDryRun: flags.has('--dry-run'),
    isJson: flags.has('--json'),
    command,
  }
}

function makePlan(options: Options, topology: Topology): BindingPlan {
  const { cores, oversubscribe } = options
  const ranks = options.ranks ?? (cores?.includes('|') === true ? cores.split('|').length : defaultRanks(topology))
  if (options.isBound) return planBinding({ ranks, topology, oversubscribe, coreList: cores })
  return {
    ranks: Array.from({ length: ranks }, () => ({ cores: [], cpus: [], nodes: [] })),
    isOversubscribed: ranks > Math.min(topology.cores.length, threadLimit(topology) ?? Infinity),
    notes: ['ranks are not bound to cores'],
  }
}

function printPlan(options: Options, plan: BindingPlan, topology: Topology): void {
  if (options.isJson) {
    const { allowedCpus, nodes, cpuLimit = null, memoryAvailableBytes } = topology
    const machine = {
      allowedCpus,
      cores: topology.cores.length,
      nodes: nodes.map(({ node }) => node),
      cpuLimit,
      memoryAvailableBytes,
    }
    process.stdout.write(`${JSON.stringify({ machine, ...plan, command: options.command }, null, 2)}\n`)
    return
  }
  const lines = plan.ranks.map(({ cores, cpus, nodes }, rank) => {
    if (cores.length === 0) return `rank ${rank}: not bound`
    const memory = nodes.length === 0 ? '' : `, memory of node ${formatCpuList(nodes)}`
    return `rank ${rank}: cores ${formatCpuList(cores)} (${cores.length}), processors ${formatCpuList(cpus)}${memory}`
  })
  for (const note of plan.notes) lines.push(`note: ${note}`)
  if (options.command.length > 0)
    lines.push(`command: ${options.command.map((word) => JSON.stringify(word)).join(' ')}`)
  process.stdout.write(`${lines.join('\n')}\n`)
}

/**
 * Signals go on to the ranks; the second one of a kind that a person sends ends them at once. Handlers stand before the ranks do:
 * process 1 of a container has no default ones, and what comes without a handler is lost there. Returns what hands the ranks over.
 */
function forwardSignals(): (ranks: RankSet) => void {
  const early: NodeJS.Signals[] = []
  let ranks: RankSet | undefined
  let count = 0
  const take = (set: RankSet, signal: NodeJS.Signals): void => {
    count++
    if (count === 1) set.stop(signal)
    else if (signal === 'SIGTERM') set.signal(signal)
    else set.kill()
  }
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT'] as const) {
    process.on(signal, () => {
      if (ranks === undefined) early.push(signal)
      else take(ranks, signal)
    })
  }
  return (set) => {
    ranks = set
    for (const signal of early) take(set, signal)
  }
}

/** Process 1 of a container is given every orphan: without this they would stay in its list of processes when they end. */
function reapOrphans(ranks: RankSet): void {
  if (process.pid !== 1) return
  const own = new Set(ranks.ranks.map(({ pid }) => pid))
  process.on('SIGCHLD', () => {
    for (const pid of childProcesses()) if (!own.has(pid)) reap(pid)
  })
}

function report(ranks: RankSet, failure: RankExit, lines: readonly string[]): void {
  const worldSize = ranks.ranks.length
  // No failure by itself, but often the cause of one: the others miss it.
  const ended = ranks.exits.slice(0, Math.max(0, ranks.exits.indexOf(failure))).filter(({ exitCode }) => exitCode === 0)
  const text = [
    ...ended.map(
      ({ rank, pid }) => `tp-launch: rank ${rank} of ${worldSize} (pid ${pid}) had ended before, with exit code 0`,
    ),
    `tp-launch: rank ${failure.rank} of ${worldSize} (pid ${failure.pid}) failed first: ${describeExit(failure)}`,
  ]
  const hint = hints[failure.signal ?? String(failure.exitCode)]
  if (hint !== undefined) text.push(`tp-launch: ${hint}`)
  if (lines.length > 0)
    text.push(`tp-launch: the last lines of its standard error:`, ...lines.map((line) => `  ${line}`))
  process.stderr.write(`${text.join('\n')}\n`)
}

/** Where the ranks of the job's groups stood, and the whole of it into a file where one is named. */
function reportRecording(recording: Recording): void {
  const table = formatRecording(recording)
  if (table.length === 0) return
  const path = process.env[recorderVariable] ?? ''
  const text = [`tp-launch: the last operations of each rank:`, ...table.map((line) => `  ${line}`)]
  try {
    if (path !== '') writeRecording(path, recording)
    text.push(
      path === ''
        ? `tp-launch: ${recorderVariable}=FILE writes the last 1024 of each as JSON`
        : `tp-launch: the last 1024 of each are in ${path}`,
    )
  } catch (error) {
    text.push(`tp-launch: ${recorderVariable}: ${error instanceof Error ? error.message : String(error)}`)
  }
  process.stderr.write(`${text.join('\n')}\n`)
}

const hints: Readonly<Record<string, string>> = {
  SIGKILL: 'ended from outside: by a person, a parent, or the kernel for want of memory (dmesg tells)',
  SIGILL:
    'an instruction that this processor lacks: `tilerank doctor` shows which tier runs here, TILERANK_ISA lowers it',
  SIGBUS: 'memory that could not be delivered: a full tmpfs, or a file that was cut while it was mapped',
  '125': 'the rank could not be bound; the reason stands above',
  '126': 'the command is not executable',
  '127': 'the command was not found',
}

async function run(options: Options): Promise<number> {
  const topology = readTopology()
  const plan = makePlan(options, topology)
  if (options.isDryRun) {
    printPlan(options, plan, topology)
    return 0
  }
  const [entry = '', ...args] = options.command
  const worldSize = plan.ranks.length
  const isJoined = worldSize > 1 || options.isTagged
  const handOver = forwardSignals()
  const ranks = await spawnRanks({
    entry,
    args,
    worldSize,
    cores: options.isBound ? plan.ranks : [],
    // A terminal cannot be read from another process group; a file or a pipe can.
    stdin: process.stdin.isTTY ? 'pipe' : 'inherit',
    stdout: isJoined ? 'pipe' : 'inherit',
    stderr: isJoined ? 'pipe' : 'inherit',
    graceMs: options.graceMs,
  })
  handOver(ranks)
  reapOrphans(ranks)
  const out = new OutputMux(process.stdout, { isTagged: options.isTagged, isTerminal: process.stdout.isTTY })
  const err = new OutputMux(process.stderr, { isTagged: options.isTagged, isTerminal: process.stderr.isTTY })
  const drained: Promise<unknown>[] = []
  for (const { rank, child } of ranks.ranks) {
    for (const [mux, stream] of [
      [out, child.stdout],
      [err, child.stderr],
    ] as const) {
      if (stream === null) continue
      mux.add(rank, stream)
      drained.push(new Promise((resolve) => stream.once('close', resolve)))
    }
    if (child.stdin !== null) {
      child.stdin.on('error', () => undefined) // the rank need not read
      process.stdin.pipe(child.stdin)
    }
  }
  const reader = { isGone: false }
  process.stdout.on('error', () => {
    reader.isGone = true
    ranks.stop('SIGPIPE')
  })
  if (plan.isOversubscribed) process.stderr.write(`tp-launch: ${plan.notes.join('; ')}\n`)

  const failure = await ranks.done
  process.stdin.unpipe()
  process.stdin.pause()
  // Something that a rank has started may keep the pipes open: it does not keep the job.
  await Promise.race([Promise.all(drained), new Promise((resolve) => setTimeout(resolve, 1000))])
  out.end()
  err.end()
  if (reader.isGone) return 141
  if (failure !== undefined) {
    report(ranks, failure, err.tail(failure.rank))
    reportRecording(ranks.recording())
  }
  const worst = failure ?? ranks.exits.find(({ exitCode }) => exitCode !== 0)
  return worst === undefined ? 0 : shellCode(worst, constants.signals)
}

function version(): string {
  const manifest: unknown = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8'))
  return typeof manifest === 'object' && manifest !== null && 'version' in manifest
    ? String(manifest.version)
    : 'unknown'
}

async function main(): Promise<number> {
  try {
    const options = parseOptions(process.argv.slice(2))
    if (options === 'help') process.stdout.write(usage)
    else if (options === 'version') process.stdout.write(`${version()}\n`)
    else return await run(options)
    return 0
  } catch (error) {
    if (!(error instanceof LauncherError || error instanceof AddonError)) throw error
    process.stderr.write(`tp-launch: ${error.message} (${error.code})\n`)
    return error.code === 'ERR_SPAWN_FAILED' || error instanceof AddonError ? 1 : 2
  }
}

const code = await main()
// Output to a pipe is asynchronous: end when it is out.
process.stdout.write('', () => process.stderr.write('', () => process.exit(code)))
