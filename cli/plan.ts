// `tilerank plan`: what a model would take on N ranks, from the headers of its files alone. Runs nothing, reads no weights.

import { type Command, InvalidArgumentError, Option } from 'commander'

import type { DType } from '../native/types.js'
import { type InventedShape, inventCheckpoint, inventedShapes, openCheckpoint } from '../tp/checkpoint/index.js'
import { InferenceError } from '../tp/errors.js'
import { formatPlan, planModel } from '../tp/plan.js'

interface PlanFlags {
  readonly model?: string
  readonly shape?: InventedShape
  readonly tp: number
  readonly dtype?: DType
  readonly maxTokens?: number
  readonly batch: number
  readonly stepTokens: number
  readonly threads: number
  readonly shares?: readonly number[]
  readonly json?: boolean
}

function count(text: string): number {
  const value = Number(text)
  if (!/^\d+$/.test(text) || !Number.isSafeInteger(value) || value < 1) {
    throw new InvalidArgumentError('An integer of at least 1 is needed.')
  }
  return value
}

function shares(text: string): readonly number[] {
  const values = text.split(',').map(Number)
  if (!values.every((value) => Number.isFinite(value) && value > 0)) {
    throw new InvalidArgumentError('Positive numbers are needed, one per rank, with commas between.')
  }
  return values
}

export function registerPlan(program: Command): void {
  program
    .command('plan')
    .description('show how a model is split over ranks, and what each rank takes; runs nothing')
    .option('--model <directory>', 'a checkpoint in the Hugging Face layout')
    .addOption(
      new Option('--shape <name>', 'a well-known shape instead of a checkpoint')
        .choices(inventedShapes)
        .conflicts('model'),
    )
    .option('--tp <ranks>', 'number of ranks', count, 1)
    .addOption(
      new Option(
        '--dtype <dtype>',
        'of weights, KV cache and messages (default: bf16, or f32 for weights stored as f32)',
      ).choices(['bf16', 'f32']),
    )
    .option('--max-tokens <length>', "tokens of a sequence, for the KV cache (default: the model's own)", count)
    .option('--batch <sequences>', 'sequences at once', count, 1)
    .option('--step-tokens <tokens>', 'tokens of one step, the length of a prompt chunk', count, 512)
    .option('--threads <threads>', 'threads of each rank, for their scratch memory', count, 1)
    .option('--shares <numbers>', 'relative speeds of the ranks, such as 3,1 (default: equal)', shares)
    .option('--json', 'the whole plan as JSON')
    .action(async (flags: PlanFlags) => {
      process.stdout.write(`${await plan(flags)}\n`)
    })
}

async function plan(flags: PlanFlags): Promise<string> {
  const { model, shape, tp, maxTokens } = flags
  if (model === undefined && shape === undefined) {
    throw new InferenceError(
      'ERR_INVALID_OPTION',
      `name a checkpoint (--model DIR) or a shape (--shape ${inventedShapes.join(' | ')})`,
    )
  }
  const checkpoint = shape !== undefined ? inventCheckpoint(shape) : await openCheckpoint(model ?? '')
  const result = planModel(checkpoint, {
    worldSize: tp,
    dtype: flags.dtype ?? (checkpoint.storedDType === 'f32' ? 'f32' : 'bf16'),
    ...(maxTokens === undefined ? {} : { maxTokens }),
    batch: flags.batch,
    stepTokens: flags.stepTokens,
    threads: flags.threads,
    ...(flags.shares === undefined ? {} : { shares: flags.shares }),
  })
  return flags.json === true ? JSON.stringify(result, null, 2) : formatPlan(result)
}
