// The typed face of the native Runner (native/runner/runner.h): one rank's threads, weights, KV cache and program. Every call but
// stats() returns at once; promises settle when the rank's leader thread is done.

import { nativeAddon } from '../native/index.js'
import type { SourceDType } from '../native/types.js'
import type { Program } from './program.js'
import type { RowCandidates } from './sampling.js'

/** A rectangle of a tensor to read and pack; `weight` counts Program.weights. Columns are elements of a row. */
export interface LoadPart {
  readonly weight: number
  readonly copy: number
  readonly isBias: boolean
  /** Open file, or -1 for values made up from `seed`. */
  readonly fd: number
  readonly seed: number
  readonly byteOffset: number
  readonly tensorColumns: number
  readonly dtype: SourceDType
  readonly row0: number
  readonly rows: number
  readonly column0: number
  readonly columns: number
  readonly output: number
  readonly interleave: 1 | 2
  readonly phase: 0 | 1
}

export interface RunnerOptions {
  /** One pinned thread each; empty: one thread, not pinned. */
  readonly cores: readonly number[]
  readonly spinUs: number
  readonly timeoutMs: number
  readonly maxTokens: number
  readonly maxLogitRows: number
  readonly maxSequences: number
  readonly maxPositions: number
  readonly numBlocks: number
  /** [rotaryDims / 2], radians a position. */
  readonly frequencies: Float64Array
  /** Time every line of a step on every thread: stats() then has kernelUs. */
  readonly profile: boolean
}

export interface StepRowResult extends RowCandidates {
  /** values holds the whole vocabulary in id order (penalty applied), ids is empty. */
  readonly whole: boolean
  /** Raw logits [vocabSize] when asked for. */
  readonly logits?: Float32Array
}

/** What the steps before the last one chose, where a step decodes ahead. */
export interface AheadTokens {
  /** [steps, rows] */
  readonly ids: Int32Array
  /** [steps], when each ended: milliseconds of the monotonic clock (process.hrtime). */
  readonly endMs: Float64Array
}

export interface StepResult {
  /** Of the last step. */
  readonly rows: readonly StepRowResult[]
  /** What came after the last call of onAhead. */
  readonly ahead: AheadTokens
  /** When the last step ended: milliseconds of the monotonic clock. */
  readonly endMs: number
  readonly elapsedUs: number
}

export interface RunnerStats {
  /** Microseconds of thread 0 in each kind of work, since the runner was made. */
  readonly phaseUs: {
    readonly gemm: number
    readonly attention: number
    readonly collective: number
    readonly rest: number
  }
  /**
   * With `profile`, else 0: what a step would take if nobody ever waited. Microseconds of the slowest thread in each line and of the
   * slowest rank between two exchanges, added up since the runner was made.
   */
  readonly kernelUs: number
  readonly steps: number
  readonly collectives: number
  readonly wholeRows: number
  /** 16 hex digits over every row that went into the head: equal on all ranks. */
  readonly stateHash: string
  readonly weightBytes: number
  readonly kvBytes: number
  readonly scratchBytes: number
  readonly pinWarning: string
}

export interface NativeRunner {
  load(parts: readonly LoadPart[]): Promise<void>
  /** @param onAhead told what is decoded ahead, at most every 10 ms, before the promise resolves */
  step(words: Int32Array, onAhead?: (tokens: AheadTokens) => void): Promise<StepResult>
  /** Ends decoding ahead with the token that the running step is at. */
  interrupt(): void
  serve(onBytes: (words: Int32Array) => void): Promise<void>
  loadedBytes(): number
  stats(): RunnerStats
  close(): void
}

interface RunnerAddon {
  readonly Runner: new (program: Program, options: RunnerOptions, communicator: unknown, tier: string) => NativeRunner
  runnerSlotBytes(program: Program, options: RunnerOptions, nodes: readonly (readonly number[])[]): number
}

function runnerAddon(): RunnerAddon {
  return nativeAddon() as RunnerAddon
}

/** @param tier cap of the ISA tier, '' for the best one here */
export function createRunner(
  program: Program,
  options: RunnerOptions,
  communicator: unknown,
  tier: string,
): NativeRunner {
  return new (runnerAddon().Runner)(program, options, communicator, tier)
}

/** Bytes that one slot of the group must have. nodes: [nodes][ranks], empty where all are on one. */
export function runnerSlotBytes(
  program: Program,
  options: RunnerOptions,
  nodes: readonly (readonly number[])[],
): number {
  return runnerAddon().runnerSlotBytes(program, options, nodes)
}
