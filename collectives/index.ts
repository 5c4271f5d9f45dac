// Ranks talking to ranks: groups, tensors that all ranks map, and the collectives on them.

export {
  algorithmVariable,
  onlyDefaults,
  tunedFor,
  tunedPath,
  readTuned,
  rulesOfOthers,
  writeTuned,
  type AlgorithmRule,
  type Explanation,
  type MemoryKind,
  type Wire,
  type OperationName,
  type TunedTable,
} from './algorithms.js'
export { readRankEnvironment, defaultTimeoutMs, placeVariables, type RankEnvironment, type RankSource } from './env.js'
export { CollectiveError, isBetweenRanks, type CollectiveErrorCode, type CollectiveFailure } from './errors.js'
export {
  createGroup,
  openRunnerGroup,
  type AllReduceAlgorithm,
  type AllReduceChoice,
  type AllToAllChoice,
  type AsyncOptions,
  type CountsChoice,
  type FromChoice,
  type Group,
  type GroupData,
  type GroupOptions,
  type MadeOptions,
  type OutputChoice,
  type ReduceChoice,
  type ReduceOp,
  type RootChoice,
  type RunnerGroup,
  type SyncOptions,
  type ToChoice,
} from './group.js'
export {
  formatRecording,
  writeRecording,
  excerptOf,
  recorderVariable,
  type RankRecording,
  type RecordedOperation,
  type Recording,
} from './recorder.js'
export { connectStore, serveStore, type Store, type StoreAccess, type StoreServer } from './store.js'
export type { NetworkOptions } from './network.js'
export type { Encryption } from './secret.js'
export type { Batch } from './batch.js'
export {
  formatStats,
  statsVariable,
  type GroupStats,
  type Latency,
  type OperationStats,
  type PeerStats,
} from './stats.js'
export { traceOfRecording, traceVariable, type Trace, type TraceEvent } from './trace.js'
export { type SplitChoice } from './subgroups.js'
export { Tensor, type ArrayOf } from './tensor.js'
export type { TypedArray } from './communicator.js'
export type { CollectiveDType, DType, Shape } from '../native/types.js'
export {
  compareAlgorithms,
  defaultMachine,
  linkPresets,
  operationNames,
  simulate,
  type Comparison,
  type LinkPreset,
  type Machine,
  type Simulated,
  type SimulateOptions,
} from './simulate.js'
