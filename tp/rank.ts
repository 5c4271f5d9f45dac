// One rank, whichever process holds it: opens the checkpoint, compiles its Program, joins the group, loads its weights. What it is
// asked to run comes from rank 0's Scheduler (engine.ts); the internal entry of a child process is rankMain.ts.

import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { openRunnerGroup, type RunnerGroup } from '../collectives/index.js'
import { selectTier } from '../kernels/index.js'
import type { DType } from '../native/types.js'
import {
  checkUnchanged,
  inventCheckpoint,
  openCheckpoint,
  type Checkpoint,
  type InventedShape,
} from './checkpoint/index.js'
import { loadWeights } from './load.js'
import { compileProgram, type Program } from './program.js'
import { rotaryFrequencies } from './rope.js'
import {
  createRunner,
  runnerSlotBytes,
  type AheadTokens,
  type NativeRunner,
  type RunnerOptions,
  type StepResult,
} from './runner.js'
import { blocksFor } from './kvBlocks.js'
import type { EngineLimits } from './scheduler.js'

/** What all ranks are told, and must agree on to the byte. Plain data. */
export interface RankConfig {
  /** Directory of the checkpoint, or a shape with made-up weights. */
  readonly model: { readonly directory: string } | { readonly shape: InventedShape; readonly layers: number | null }
  readonly worldSize: number
  readonly dtype: DType
  readonly maxTokens: number
  readonly maxSequences: number
  /** null: the model's own. */
  readonly contextLength: number | null
  /** null: room for two sequences of contextLength. */
  readonly kvCacheTokens: number | null
  readonly timeoutMs: number
  /** Cap of the ISA tier, '' for none. */
  readonly isa: string
  readonly profile: boolean
}

/** What one rank is and has, as reported. */
export interface RankReport {
  readonly rank: number
  readonly pid: number
  readonly cores: readonly number[]
  readonly tier: string
  readonly loadMs: number
  /** Bytes of the checkpoint that are this rank's. */
  readonly shardBytes: number
  /** Bytes that this process asked for while it loaded them, as the kernel counted (0 where it does not say). */
  readonly readBytes: number
  readonly weightBytes: number
  readonly kvBytes: number
  readonly scratchBytes: number
  readonly arenaBytes: number
  readonly peakRssBytes: number
  readonly phaseUs: {
    readonly gemm: number
    readonly attention: number
    readonly collective: number
    readonly rest: number
  }
  /** With the option `profile`, else 0: what the steps would have taken if nobody had ever waited; the same on all ranks. */
  readonly kernelUs: number
  readonly steps: number
  readonly collectives: number
  /** Rows of logits that had to be gathered, since the ranks' best candidates did not decide them. */
  readonly wholeRows: number
  /** Over every row that went into the head: equal on all ranks after the same work. */
  readonly stateHash: string
  readonly warnings: readonly string[]
}

export async function openModel(config: Pick<RankConfig, 'model'>): Promise<Checkpoint> {
  return 'shape' in config.model
    ? inventCheckpoint(config.model.shape, config.model.layers ?? undefined)
    : await openCheckpoint(config.model.directory)
}

/** The limits that follow from the configuration and the model; the same on every rank and in the client. */
export function limitsOf(config: RankConfig, checkpoint: Checkpoint): EngineLimits {
  const maxPositions = Math.min(config.contextLength ?? checkpoint.arch.maxPositions, checkpoint.arch.maxPositions)
  const numBlocks = blocksFor(config.kvCacheTokens ?? 2 * maxPositions)
  return { maxTokens: config.maxTokens, maxSequences: config.maxSequences, maxPositions, numBlocks }
}

/** Bytes that this process has asked read() and its kin for, so far. */
function requestedBytes(): number {
  try {
    return Number(/^rchar: (\d+)$/m.exec(readFileSync('/proc/self/io', 'utf8'))?.[1] ?? 0)
  } catch {
    return 0 // some containers hide it
  }
}

/** Of this program. getrusage() would count what the process was before exec: the parent's memory. */
function peakRssBytes(): number {
  return 1024 * Number(/^VmHWM:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? NaN)
}

export class Rank {
  #loadMs = 0
  #shardBytes = 0
  #readBytes = 0

  private constructor(
    readonly config: RankConfig,
    readonly checkpoint: Checkpoint,
    readonly program: Program,
    readonly limits: EngineLimits,
    readonly runner: NativeRunner,
    readonly group: RunnerGroup,
    readonly cores: readonly number[],
    readonly tier: string,
  ) {}

  /**
   * @param place this rank's number and cores
   * @param onProgress source bytes read so far, and their total
   * @throws InferenceError for the model, CollectiveError for the group, codes of the native runner
   */
  static async open(
    config: RankConfig,
    place: { readonly rank: number; readonly cores: readonly number[]; readonly spinUs: number },
    onProgress?: (loaded: number, total: number) => void,
  ): Promise<Rank> {
    const checkpoint = await openModel(config)
    const program = compileProgram(checkpoint, { worldSize: config.worldSize, rank: place.rank, dtype: config.dtype })
    const limits = limitsOf(config, checkpoint)
    const tier = selectTier(config.isa)
    const options: RunnerOptions = {
      cores: place.cores,
      spinUs: place.spinUs,
      timeoutMs: config.timeoutMs,
      maxTokens: limits.maxTokens,
      maxLogitRows: Math.min(limits.maxTokens, limits.maxSequences),
      maxSequences: limits.maxSequences,
      maxPositions: limits.maxPositions,
      numBlocks: limits.numBlocks,
      frequencies: rotaryFrequencies(checkpoint.arch.rope),
      profile: config.profile,
    }
    // Ranks with another model, other limits or another tier would give other numbers: they refuse each other at the door.
    const agreement = createHash('sha256')
      .update(JSON.stringify([checkpoint.fingerprint, config.worldSize, config.dtype, limits, config.timeoutMs, tier]))
      .digest()
    const group = await openRunnerGroup({
      slotBytesOn: (nodes) => runnerSlotBytes(program, options, nodes),
      configHash: agreement,
      timeoutMs: config.timeoutMs,
    })
    let runner: NativeRunner | undefined
    try {
      runner = createRunner(program, options, group.handle, tier)
      const rank = new Rank(config, checkpoint, program, limits, runner, group, place.cores, tier)
      const start = performance.now()
      const before = requestedBytes()
      rank.#shardBytes = await loadWeights(runner, program, checkpoint, onProgress)
      rank.#readBytes = requestedBytes() - before
      rank.#loadMs = performance.now() - start
      await checkUnchanged(checkpoint.files ?? [])
      return rank
    } catch (error) {
      const explained = group.diagnose(error)
      runner?.close()
      await group.close()
      throw explained
    }
  }

  report(): RankReport {
    const stats = this.runner.stats()
    return {
      rank: this.program.rank,
      pid: process.pid,
      cores: this.cores,
      tier: this.tier,
      loadMs: this.#loadMs,
      shardBytes: this.#shardBytes,
      readBytes: this.#readBytes,
      weightBytes: stats.weightBytes,
      kvBytes: stats.kvBytes,
      scratchBytes: stats.scratchBytes,
      arenaBytes: this.group.arenaBytes,
      peakRssBytes: peakRssBytes(),
      phaseUs: stats.phaseUs,
      kernelUs: stats.kernelUs,
      steps: stats.steps,
      collectives: stats.collectives,
      wholeRows: stats.wholeRows,
      stateHash: stats.stateHash,
      warnings: [stats.pinWarning, ...this.group.warnings].filter((warning) => warning !== ''),
    }
  }

  /** Rank 0: broadcasts a message and runs it; see NativeRunner.step. */
  async step(words: Int32Array, onAhead?: (tokens: AheadTokens) => void): Promise<StepResult> {
    try {
      return await this.runner.step(words, onAhead)
    } catch (error) {
      throw this.group.diagnose(error)
    }
  }

  /** Other ranks: obeys rank 0 until it says that this is the end. */
  async serve(onBytes: (words: Int32Array) => void): Promise<void> {
    try {
      await this.runner.serve(onBytes)
    } catch (error) {
      throw this.group.diagnose(error)
    }
  }

  async close(): Promise<void> {
    this.runner.close()
    await this.group.close()
  }
}
