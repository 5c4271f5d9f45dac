// The public face of the package and of tp/: load a model, split it over ranks, generate; and the plan of it, before anything runs.

export { createGroup, type Group, type Tensor } from '../collectives/index.js'
export type { ChatMessage } from './chat.js'
export {
  inventCheckpoint,
  inventedShapes,
  openCheckpoint,
  type ArchSpec,
  type Checkpoint,
  type InventedShape,
  type TensorInfo,
} from './checkpoint/index.js'
export { Engine, initInference, type Completion, type Piece, type Prompt } from './engine.js'
export { InferenceError, type InferenceErrorCode } from './errors.js'
export type { GenerateOptions, InferenceOptions } from './options.js'
export { formatPlan, planModel, type Plan, type PlanOptions } from './plan.js'
export { checkProgram, compileProgram, describeProgram, type Program } from './program.js'
export type { RankReport } from './rank.js'
export type { SamplingOptions, SamplingParams } from './sampling.js'
export type { FinishReason } from './scheduler.js'
export { StreamDecoder, loadTokenizer, type Tokenizer } from './tokens.js'
