// `tilerank bench X`: each benchmark measures its limits in the same run, prints a table, or with --json one object a row.

import { readFileSync } from 'node:fs'
import process from 'node:process'
import { Option, type Command } from 'commander'
import type { CollectiveRow } from '../bench/collectives.js'
import type { GenerateRow, Layout } from '../bench/generate.js'
import type { Lab, LabOptions } from '../bench/lab.js'
import { InferenceError } from '../tp/errors.js'
import { inventedShapes, type InventedShape } from '../tp/checkpoint/index.js'
import { machineLine } from '../bench/machine.js'
import { positiveNumber, realNumber } from './options.js'

/** Rows as JSON lines, or the machine and a table. */
function print<Row>(rows: readonly Row[], format: (rows: readonly Row[]) => string, isJson: boolean | undefined): void {
  process.stdout.write(
    isJson ? rows.map((row) => `${JSON.stringify(row)}\n`).join('') : `${machineLine()}\n\n${format(rows)}\n`,
  )
}

const list = (text: string): number[] => text.split(',').map(positiveNumber)

const layouts = (text: string): Layout[] =>
  text.split(',').map((layout) => {
    const [, ranks = '', threads = ''] = /^(\d+)x(\d+)$/.exec(layout) ?? []
    return { ranks: positiveNumber(ranks), threadsPerRank: positiveNumber(threads) }
  })

interface CollectiveFlags {
  ranks: number
  bytes?: number[]
  dtype: 'bf16' | 'f32'
  trials?: number
  mpi?: boolean
  gloo?: string
  check?: boolean
  json?: boolean
}

function oneOf<T extends string>(choices: readonly T[], name: string): T {
  const found = choices.find((choice) => choice === name)
  if (found === undefined)
    throw new InferenceError('ERR_INVALID_OPTION', `there is no '${name}'; there are ${choices.join(', ')}`)
  return found
}

function needMultiplesOf4(bytes: readonly number[] | undefined): void {
  const odd = bytes?.find((size) => size % 4 !== 0)
  if (odd !== undefined)
    throw new InferenceError('ERR_INVALID_OPTION', `--bytes ${String(odd)}: sizes are multiples of 4`)
}

async function needLab(options: LabOptions): Promise<Lab> {
  const { createLab, labObstacle } = await import('../bench/lab.js')
  const obstacle = labObstacle(options)
  if (obstacle !== undefined) throw new InferenceError('ERR_INVALID_OPTION', obstacle)
  return createLab(options)
}

export function registerBench(program: Command): void {
  const bench = program
    .command('bench')
    .description('measure collectives, kernels and generation beside the limits of this machine')

  const paths = ['runner', 'sync', 'async', 'array'] as const
  const collectives = (name: string, description: string): Command =>
    bench
      .command(name)
      .description(description)
      .option('--ranks <count>', 'ranks, one a core', positiveNumber, 2)
      .option('--bytes <list>', "message sizes, such as 8192,131072; of operations on parts, one rank's", list)
      .option('--trials <count>', 'fresh sets of processes a row', positiveNumber)
      .option('--mpi', 'run each MPI beside it (Debian: openmpi-bin libopenmpi-dev, mpich libmpich-dev)')
      .option('--gloo <python>', 'run gloo beside it, by a Python that has torch')
      .option('--check', 'check every result, not only the last of a size')
      .option('--json', 'one object a row')

  collectives('allreduce', 'latency of allReduce by size, in the runner and from JavaScript')
    .addOption(new Option('--dtype <dtype>', 'of the elements').choices(['bf16', 'f32']).default('bf16'))
    .action(async (flags: CollectiveFlags) => {
      const { benchCollectives, formatCollectives } = await import('../bench/collectives.js')
      const { json, ...options } = flags
      const rows = await benchCollectives({ ...options, ops: ['allReduce'], paths: ['runner', 'sync', 'async'] })
      print(rows, formatCollectives, json)
    })

  collectives('collectives', 'latency of every collective by size')
    .option('--op <list>', 'operations, such as broadcast,allGather, or all', (text) => text.split(','), ['all'])
    .option('--plot <file>', 'draw latency and bandwidth over size, as SVG')
    .option('--from <file>', 'rows of an earlier run with --json, in place of a measurement')
    .option('--paths <list>', 'sync and async on tensors, array: sync on typed arrays', (text) => text.split(','))
    .addOption(new Option('--dtype <dtype>', 'of the elements').choices(['bf16', 'f32']).default('f32'))
    .action(async (flags: CollectiveFlags & { op: string[]; paths?: string[]; plot?: string; from?: string }) => {
      const { benchCollectives, collectiveOps, formatCollectives } = await import('../bench/collectives.js')
      const { json, op, paths: chosen, plot, from, ...options } = flags
      const rows =
        from === undefined
          ? await benchCollectives({
              ...options,
              ops: op.includes('all') ? collectiveOps : op.map((name) => oneOf(collectiveOps, name)),
              ...(chosen === undefined ? {} : { paths: chosen.map((name) => oneOf(paths, name)) }),
            })
          : readFileSync(from, 'utf8')
              .split('\n')
              .filter((line) => line !== '')
              .map((line) => JSON.parse(line) as CollectiveRow)
      if (plot !== undefined) await (await import('../bench/plot.js')).plotCollectives(rows, plot)
      print(rows, formatCollectives, json)
    })

  bench
    .command('mpi')
    .description(
      "transport 'mpi' beside MPI_Allreduce of the same MPI, between network namespaces; in a checkout, as root",
    )
    .option('--bytes <list>', 'message sizes, such as 8,131072', list)
    .option('--ranks-per-node <count>', 'ranks on each of the two nodes', positiveNumber, 1)
    .option('--trials <count>', 'fresh sets of processes, in turn', positiveNumber, 5)
    .option('--json', 'one object a row')
    .action(async (flags: { bytes?: number[]; ranksPerNode: number; trials: number; json?: boolean }) => {
      const { benchMpiNodes, formatMpiNodes } = await import('../bench/mpiNodes.js')
      const { json, ...options } = flags
      print(await benchMpiNodes(options), formatMpiNodes, json)
    })

  bench
    .command('gemm')
    .description('linear layers: multiply-adds and bytes of weights a second')
    .option('--tier <name>', 'ISA tier')
    .option('--m <list>', 'rows of x, such as 1,512', list)
    .option('--n <count>', 'outputs', positiveNumber)
    .option('--k <count>', 'inputs', positiveNumber)
    .addOption(new Option('--dtype <dtype>', 'of the weights').choices(['bf16', 'f32']))
    .option('--threads <count>', 'pinned threads', positiveNumber)
    .option('--seconds <number>', 'timed part of each row', realNumber)
    .option('--json', 'one object a row')
    .action(
      async (flags: {
        tier?: string
        m?: number[]
        n?: number
        k?: number
        dtype?: 'bf16' | 'f32'
        threads?: number
        seconds?: number
        json?: boolean
      }) => {
        const { benchGemm, formatGemm } = await import('../bench/gemm.js')
        const { json, ...options } = flags
        print(await benchGemm(options), formatGemm, json)
      },
    )

  bench
    .command('attention')
    .description('attention over the packed KV cache: decoding at 4096 tokens, a prompt of 2048')
    .addOption(new Option('--dtype <dtype>', 'of q, K and V').choices(['bf16', 'f32']))
    .option('--context <tokens>', 'keys that a new token sees', positiveNumber)
    .option('--prompt <tokens>', 'length of the prompt', positiveNumber)
    .option('--scattered', 'blocks of a sequence anywhere in the cache, not beside each other')
    .option('--repetitions <count>', 'timed passes of each row', positiveNumber)
    .option('--json', 'one object a row')
    .action(
      async (flags: {
        dtype?: 'bf16' | 'f32'
        context?: number
        prompt?: number
        scattered?: boolean
        repetitions?: number
        json?: boolean
      }) => {
        const { benchAttention, formatAttention } = await import('../bench/attention.js')
        const { json, scattered: isScattered = false, ...options } = flags
        print(await benchAttention({ ...options, isScattered }), formatAttention, json)
      },
    )

  bench
    .command('generate')
    .description('prompt and decode speed on made-up weights, with llama.cpp beside it if asked for')
    .addOption(new Option('--shape <name>', 'shape of the model').choices(inventedShapes).default('tinyllama-1.1b'))
    .option('--model <directory>', 'a checkpoint in place of a shape')
    .option('--layers <count>', 'fewer layers', positiveNumber)
    .option('--ranks <count>', 'ranks', positiveNumber, 1)
    .option('--threads <count>', 'threads of each rank', positiveNumber, 1)
    .option('--layouts <list>', 'several ranks x threads in turn, such as 1x1,2x1,1x2', layouts)
    .option('--neighbour', 'each trial again beside a busy process on the last core')
    .addOption(new Option('--dtype <dtype>', 'of the weights').choices(['bf16', 'f32']).default('bf16'))
    .option('--prompt-tokens <count>', 'length of the prompt', positiveNumber, 512)
    .option('--new-tokens <count>', 'tokens after it', positiveNumber, 32)
    .option('--trials <count>', 'fresh sets of processes', positiveNumber, 3)
    .option('--llama-cpp <folder>', 'folder where node-llama-cpp is installed: run llama.cpp in turn')
    .option('--gguf <file>', 'with --llama-cpp: a GGUF file of the same shape')
    .option('--json', 'one object a row')
    .action(
      async (flags: {
        shape: InventedShape
        model?: string
        layers?: number
        ranks: number
        threads: number
        layouts?: Layout[]
        neighbour?: boolean
        dtype: 'bf16' | 'f32'
        promptTokens: number
        newTokens: number
        trials: number
        llamaCpp?: string
        gguf?: string
        json?: boolean
      }) => {
        const { benchGenerate, findLlamaCpp, formatGenerate } = await import('../bench/generate.js')
        const { json, shape, model, layers, ranks, threads, llamaCpp, gguf, ...rest } = flags
        if ((llamaCpp === undefined) !== (gguf === undefined)) {
          throw new InferenceError('ERR_INVALID_OPTION', '--llama-cpp and --gguf go together')
        }
        if (rest.newTokens < 2) {
          throw new InferenceError('ERR_INVALID_OPTION', '--new-tokens must be 2 or more: the later ones are timed')
        }
        const rows = await benchGenerate({
          layouts: [{ ranks, threadsPerRank: threads }],
          ...rest,
          model: model === undefined ? { shape, ...(layers === undefined ? {} : { layers }) } : { directory: model },
          ...(llamaCpp === undefined || gguf === undefined ? {} : { llamaCpp: findLlamaCpp(llamaCpp, gguf) }),
          onTrial: (row: GenerateRow) => {
            if (!json)
              process.stderr.write(
                `${row.engine} ${String(row.ranks)} x ${String(row.threadsPerRank)}${row.neighbour ? ', disturbed' : ''}: prompt ${row.promptTokensPerS.toFixed(1)}, decode ${row.tokensPerS.toFixed(2)} tokens/s\n`,
              )
          },
        })
        print(rows, formatGenerate, json)
      },
    )

  bench
    .command('network')
    .description(
      'allReduce of f32 over ZeroMQ beside a raw exchange of zeromq.js, between two nodes made of network namespaces (as root)',
    )
    .option('--bytes <list>', 'sizes, such as 8192,131072', list)
    .option('--encryption <list>', 'none, curve', (text) => text.split(','))
    .option('--ranks-per-node <list>', 'such as 1,2: beside the first of them, too', list)
    .option('--trials <count>', 'fresh sets of processes, in turn', positiveNumber, 5)
    .option('--samples <count>', 'of each size', positiveNumber)
    .option('--json', 'one object a row')
    .action(
      async (flags: {
        bytes?: number[]
        encryption?: string[]
        ranksPerNode?: number[]
        trials: number
        samples?: number
        json?: boolean
      }) => {
        const { json, encryption, ...options } = flags
        needMultiplesOf4(options.bytes)
        const encryptions = encryption?.map((name) => oneOf(['none', 'curve'] as const, name))
        const { benchNetwork, formatNetwork } = await import('../bench/network.js')
        await using lab = await needLab({})
        const rows = await benchNetwork({ lab, ...options, ...(encryptions === undefined ? {} : { encryptions }) })
        print(rows, formatNetwork, json)
      },
    )

  bench
    .command('wire')
    .description(
      'allReduce of f32, exact and by wire q8, between two nodes made of network namespaces with a slow link (as root)',
    )
    .option('--rate-mbit <number>', 'of each node, each way', positiveNumber, 1000)
    .option('--bytes <list>', 'sizes, such as 8192,131072', list)
    .option('--samples <count>', 'of each size and wire', positiveNumber)
    .option('--json', 'one object a row')
    .action(async (flags: { rateMbit: number; bytes?: number[]; samples?: number; json?: boolean }) => {
      const { rateMbit, json, ...options } = flags
      needMultiplesOf4(options.bytes)
      const { benchWire, formatWire } = await import('../bench/wire.js')
      await using lab = await needLab({ rateMbit })
      print(await benchWire({ lab, ...options }), formatWire, json)
    })
}
