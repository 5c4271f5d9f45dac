// `tilerank simulate`: what collectives would take on a machine that is not here, by their own code on virtual ranks, and whether the rules
// that choose algorithms would choose well there.

import process from 'node:process'
import { InvalidArgumentError, Option, type Command } from 'commander'
import {
  compareAlgorithms,
  defaultMachine,
  linkPresets,
  operationNames,
  type Comparison,
  type LinkPreset,
  type Machine,
  type OperationName,
  type Wire,
} from '../collectives/index.js'
import { InferenceError } from '../tp/errors.js'
import { positiveNumber, realNumber, wholeNumber } from './options.js'

const defaultBytes: readonly number[] = [1024, 8192, 65536, 524288, 4194304]

const isOperation = (name: string): name is OperationName => operationNames.some((known) => known === name)

function operationList(text: string): OperationName[] {
  if (text === 'all') return [...operationNames]
  return text.split(',').map((name) => {
    if (!isOperation(name))
      throw new InvalidArgumentError(`One or more of ${operationNames.join(', ')} are needed, or all.`)
    return name
  })
}

function positiveReal(text: string): number {
  const value = realNumber(text)
  if (value <= 0) throw new InvalidArgumentError('A number above 0 is needed.')
  return value
}

function realFrom0(text: string): number {
  const value = realNumber(text)
  if (value < 0) throw new InvalidArgumentError('A number of at least 0 is needed.')
  return value
}

interface Flags {
  readonly nodes: number
  readonly ranks: number[]
  readonly sockets: number
  readonly cores?: number
  readonly link: LinkPreset
  readonly latencyUs?: number
  readonly gbps?: number
  readonly frameUs: number
  readonly callNs: number
  readonly coreNs: number
  readonly socketNs: number
  readonly memoryGbs: number
  readonly socketGbs: number
  readonly switchUs: number
  readonly op: OperationName[]
  readonly bytes: number[]
  readonly dtype: 'f32' | 'bf16'
  readonly algorithm: string
  readonly wire: Wire
  readonly chunk?: number
  readonly root: number
  readonly calls: number
  readonly memory?: number
  readonly json?: boolean
}

function machineOf(flags: Flags): Machine {
  const { ranks, nodes } = flags
  if (ranks.length > 1 && ranks.length !== nodes && nodes !== 1)
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `--ranks names ${String(ranks.length)} nodes, --nodes ${String(nodes)}`,
    )
  const link = linkPresets[flags.link]
  return {
    ranks: ranks.length > 1 ? ranks : Array.from({ length: nodes }, () => ranks[0] ?? 1),
    sockets: flags.sockets,
    cores: flags.cores ?? 0,
    switchNs: flags.switchUs * 1000,
    callNs: flags.callNs,
    coreNs: flags.coreNs,
    socketNs: flags.socketNs,
    memoryNsPerByte: 1 / flags.memoryGbs,
    socketNsPerByte: 1 / flags.socketGbs,
    linkNs: flags.latencyUs === undefined ? link.linkNs : flags.latencyUs * 1000,
    linkNsPerByte: flags.gbps === undefined ? link.linkNsPerByte : 8 / flags.gbps,
    frameNs: flags.frameUs * 1000,
  }
}

const decimal = (value: number): string => value.toPrecision(4).replace(/\.0*$/, '')
const sized = (bytes: number): string =>
  bytes < 1000
    ? decimal(bytes)
    : bytes < 1e6
      ? `${decimal(bytes / 1e3)}k`
      : bytes < 1e9
        ? `${decimal(bytes / 1e6)}M`
        : `${decimal(bytes / 1e9)}G`

/** `name` of the algorithms that are `key` for some kind of memory. */
function marksOf(comparison: Comparison, algorithm: string, key: 'fastest' | 'chosen'): string {
  const kinds = comparison.verdicts.filter((verdict) => verdict[key] === algorithm).map(({ memory }) => memory)
  if (kinds.length === 0) return ''
  return kinds.length === comparison.verdicts.length ? 'yes' : kinds.join(',')
}

/** A choice that takes more than this much longer than the fastest is pointed out. */
const tolerated = 1.02

export function formatSimulated(machine: Machine, comparisons: readonly Comparison[]): string {
  const isNetwork = machine.ranks.length > 1
  const header = [
    'operation',
    'bytes',
    'algorithm',
    'us',
    'syncs',
    'hops',
    'frames',
    'sent/rank',
    'NIC',
    'network',
    'memory/rank',
    'sockets',
    'fastest',
    'chosen',
    '',
  ]
  const body = comparisons.flatMap((comparison) => [
    ...comparison.rows.map((row) => {
      const late = comparison.verdicts.filter(
        ({ chosen, ratio }) => chosen === row.algorithm && (ratio ?? 1) > tolerated,
      )
      return [
        row.operation,
        String(row.bytes),
        row.algorithm,
        decimal(row.us),
        decimal(row.syncs),
        decimal(row.hops),
        decimal(row.frames),
        sized(row.rankBytes),
        sized(row.nicBytes),
        sized(row.networkBytes),
        sized(row.memoryBytes),
        sized(row.socketBytes),
        marksOf(comparison, row.algorithm, 'fastest'),
        marksOf(comparison, row.algorithm, 'chosen'),
        late
          .map(
            ({ memory, ratio, fastest }) =>
              `! ${(ratio ?? 1).toFixed(2)}x of ${fastest}${memory === 'any' ? '' : ` (${memory})`}`,
          )
          .join(', '),
      ]
    }),
    ...comparison.tooLarge.map((algorithm) => [
      comparison.operation,
      String(comparison.bytes),
      algorithm,
      ...header.slice(3, -1).map(() => '-'),
      'needs more memory here (--memory)',
    ]),
  ])
  const isShown = header.map(
    (name, column) =>
      column < 3 ||
      name === '' ||
      (isNetwork && name !== 'sockets') ||
      (machine.sockets > 1 && name === 'sockets') ||
      ['us', 'syncs', 'memory/rank', 'fastest', 'chosen'].includes(name),
  )
  const table = [header, ...body].map((cells) => cells.filter((_, column) => isShown[column]))
  const widths = (table[0] ?? []).map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? '').length)))
  const last = widths.length - 1
  return table
    .map((cells) =>
      cells
        .map((cell, column) =>
          column === 0 || column === 2 || column === last
            ? cell.padEnd(widths[column] ?? 0)
            : cell.padStart(widths[column] ?? 0),
        )
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

function describe(machine: Machine): string {
  const { ranks } = machine
  const isEven = new Set(ranks).size === 1
  const parts = [
    isEven
      ? `${String(ranks.length)} node${ranks.length === 1 ? '' : 's'} x ${String(ranks[0] ?? 0)} ranks`
      : `nodes of ${ranks.join(', ')} ranks`,
  ]
  parts.push(`flags ${decimal(machine.coreNs)} ns`, `memory ${decimal(1 / machine.memoryNsPerByte)} GB/s a rank`)
  if (machine.sockets > 1)
    parts.push(
      `${String(machine.sockets)} sockets: flags ${decimal(machine.socketNs)} ns, ${decimal(1 / machine.socketNsPerByte)} GB/s each way`,
    )
  if (machine.cores > 0)
    parts.push(`${String(machine.cores)} cores a node, ${decimal(machine.switchNs / 1000)} us to switch`)
  if (ranks.length > 1) {
    parts.push(`link ${decimal(machine.linkNs / 1000)} us, ${decimal(8 / machine.linkNsPerByte)} Gbit/s`)
    if (machine.frameNs > 0) parts.push(`${decimal(machine.frameNs / 1000)} us a frame`)
  }
  return parts.join('; ')
}

export function registerSimulate(program: Command): void {
  const list = (text: string): number[] => text.split(',').map(positiveNumber)
  program
    .command('simulate')
    .description(
      'run the code of the collectives on virtual ranks with a virtual clock: predicted time, steps and bytes of each algorithm, the fastest, and what the rules choose',
    )
    .option('--nodes <count>', 'nodes', positiveNumber, 1)
    .option('--ranks <list>', 'ranks of a node, or of each one by one, such as 2,1,2', list, [2])
    .option('--sockets <count>', 'of a node', positiveNumber, 1)
    .option('--cores <count>', 'of a node, where its ranks share them (default: one a rank)', positiveNumber)
    .addOption(new Option('--link <name>', 'between nodes').choices(Object.keys(linkPresets)).default('10gbe'))
    .option('--latency-us <us>', 'one way between nodes, in place of the link’s', realFrom0)
    .option('--gbps <number>', 'Gbit/s of a node’s NIC each way, in place of the link’s', positiveReal)
    .option(
      '--frame-us <us>',
      'that a rank’s network thread takes for a frame',
      realFrom0,
      defaultMachine.frameNs / 1000,
    )
    .option('--call-ns <ns>', 'that a call takes besides', realFrom0, defaultMachine.callNs)
    .option('--core-ns <ns>', 'until a flag is seen on the same socket', realFrom0, defaultMachine.coreNs)
    .option('--socket-ns <ns>', 'until a flag is seen on another socket', realFrom0, defaultMachine.socketNs)
    .option(
      '--memory-gbs <number>',
      'GB/s that a rank reads and writes',
      positiveReal,
      1 / defaultMachine.memoryNsPerByte,
    )
    .option(
      '--socket-gbs <number>',
      'GB/s between two sockets each way',
      positiveReal,
      1 / defaultMachine.socketNsPerByte,
    )
    .option('--switch-us <us>', 'until a core works for another rank', realFrom0, defaultMachine.switchNs / 1000)
    .option('--op <list>', `${operationNames.join(', ')}, or all`, operationList, ['allReduce'])
    .option('--bytes <list>', 'of the whole data, such as 8192,131072', list, defaultBytes)
    .addOption(new Option('--dtype <dtype>', 'of the elements').choices(['f32', 'bf16']).default('bf16'))
    .option('--algorithm <list>', 'of allReduce, or all', 'all')
    .addOption(
      new Option('--wire <wire>', 'how the sums of allReduce travel between nodes')
        .choices(['exact', 'q8'])
        .default('exact'),
    )
    .option('--chunk <bytes>', 'bytes that move at a time (default: by the rules)', positiveNumber)
    .option('--root <rank>', 'of the operations that have one', wholeNumber, 0)
    .option('--calls <count>', 'back to back; figures are those of one', positiveNumber, 1)
    .option('--memory <gib>', 'GiB that the simulation may take', positiveReal)
    .option('--json', 'one object an operation and size')
    .action((flags: Flags) => {
      const machine = machineOf(flags)
      const comparisons: Comparison[] = []
      for (const operation of flags.op) {
        for (const bytes of operation === 'barrier' ? [0] : flags.bytes) {
          const comparison = compareAlgorithms(machine, {
            operation,
            bytes,
            dtype: flags.dtype,
            root: flags.root,
            calls: flags.calls,
            ...(flags.algorithm === 'all' || operation !== 'allReduce'
              ? {}
              : { algorithms: flags.algorithm.split(',') }),
            ...(operation === 'allReduce' ? { wire: flags.wire } : {}),
            ...(flags.chunk === undefined ? {} : { chunkBytes: flags.chunk }),
            ...(flags.memory === undefined ? {} : { memoryBytes: Math.floor(flags.memory * 2 ** 30) }),
          })
          comparisons.push(comparison)
          if (flags.json === true) process.stdout.write(`${JSON.stringify(comparison)}\n`)
        }
      }
      if (flags.json === true) return
      process.stdout.write(
        `${describe(machine)}\n\n${formatSimulated(machine, comparisons)}\n\nAll results are right on all ranks. us: until the last rank has its result; the rest is the most that a rank or a node has.\n`,
      )
    })
}
