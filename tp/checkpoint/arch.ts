// What a model is, whatever its checkpoint called things. Produced by config.ts from hostile input, consumed by the builders in
// tp/models; every number in it has been checked.

import type { SourceDType } from '../../native/types.js'

export type RopeScaling =
  | { readonly kind: 'default' }
  | { readonly kind: 'linear'; readonly factor: number }
  /** NTK-aware: the base grows once a sequence is longer than the original context. */
  | { readonly kind: 'dynamic'; readonly factor: number; readonly originalMaxPositions: number }
  | {
      readonly kind: 'llama3'
      readonly factor: number
      readonly lowFreqFactor: number
      readonly highFreqFactor: number
      readonly originalMaxPositions: number
    }

export interface ArchSpec {
  /** Which builder of tp/models makes the graph. */
  readonly family: 'llama'
  readonly modelType: string
  readonly hiddenSize: number
  readonly intermediateSize: number
  readonly numLayers: number
  readonly numHeads: number
  readonly numKvHeads: number
  readonly headDim: number
  readonly vocabSize: number
  /** Longest sequence, prompt and new tokens together. */
  readonly maxPositions: number
  readonly normEps: number
  readonly activation: 'silu'
  readonly attentionBias: boolean
  readonly mlpBias: boolean
  readonly tiedHead: boolean
  readonly rope: { readonly theta: number; readonly rotaryDims: number; readonly scaling: RopeScaling }
}

/** One tensor of a checkpoint: where its bytes are. Row-major, little-endian. */
export interface TensorInfo {
  readonly name: string
  readonly dtype: SourceDType
  readonly shape: readonly number[]
  /** Absolute path of the safetensors file; '' for a weight that is made up natively (inventCheckpoint). */
  readonly file: string
  /** Of the first byte, from the start of the file. */
  readonly byteOffset: number
  readonly nbytes: number
}

/** A tensor as its file describes it: any dtype of the format, spelled as there (F32, I64, F8_E4M3, ...). */
export interface StoredTensor extends Omit<TensorInfo, 'dtype'> {
  readonly dtype: string
}

/** A file as it was when its header was read. */
export interface StoredFile {
  /** Absolute, with symbolic links resolved. */
  readonly path: string
  readonly nbytes: number
  readonly mtimeMs: number
}

/** Defaults from generation_config.json (and config.json where that is silent). */
export interface GenerationDefaults {
  readonly bosTokenId: number | null
  readonly eosTokenIds: readonly number[]
  readonly doSample: boolean
  readonly temperature: number
  readonly topK: number
  readonly topP: number
  readonly repetitionPenalty: number
  readonly maxNewTokens: number | null
}

export interface Checkpoint {
  readonly directory: string
  readonly arch: ArchSpec
  readonly tensors: ReadonlyMap<string, TensorInfo>
  /** Tensors that no weight can be made from (integer buffers, f64, f8): an error about one can say how it is stored. */
  readonly otherTensors?: ReadonlyMap<string, StoredTensor>
  /** The weight files, for checkUnchanged() after they were read. */
  readonly files?: readonly StoredFile[]
  readonly generation: GenerationDefaults
  /** Widest dtype among the stored linear weights. */
  readonly storedDType: SourceDType
  /** Of config, generation config and all headers: equal on all ranks or they refuse each other. */
  readonly fingerprint: string
}
