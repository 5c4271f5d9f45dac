// Checkpoints with made-up weights in the shapes of well-known models, so that speed can be measured where no weights are. Each
// tensor has file '': the loader fills it natively with small random numbers instead of reading.

import { createHash } from 'node:crypto'

import { elementBytes } from '../../native/types.js'
import { InferenceError, shown } from '../errors.js'
import type { ArchSpec, Checkpoint, TensorInfo } from './arch.js'

type Sizes = Pick<ArchSpec, 'hiddenSize' | 'intermediateSize' | 'numLayers' | 'numHeads' | 'numKvHeads'>

/** TinyLlama-1.1B (Zhang et al. 2024); Llama-2-7B and -13B (Touvron et al. 2023, table 1 and the published configurations). */
const sizes = {
  'tinyllama-1.1b': { hiddenSize: 2048, intermediateSize: 5632, numLayers: 22, numHeads: 32, numKvHeads: 4 },
  'llama2-7b': { hiddenSize: 4096, intermediateSize: 11008, numLayers: 32, numHeads: 32, numKvHeads: 32 },
  'llama2-13b': { hiddenSize: 5120, intermediateSize: 13824, numLayers: 40, numHeads: 40, numKvHeads: 40 },
} as const satisfies Readonly<Record<string, Sizes>>

export type InventedShape = keyof typeof sizes
export const inventedShapes: readonly InventedShape[] = ['tinyllama-1.1b', 'llama2-7b', 'llama2-13b']

/** `layers`: fewer (or more) layers than the model has, for a quick run. */
export function inventCheckpoint(shape: InventedShape, layers?: number): Checkpoint {
  if (!Object.hasOwn(sizes, shape)) {
    throw new InferenceError('ERR_INVALID_OPTION', `shape is ${shown(shape)}; known are ${inventedShapes.join(', ')}`, {
      shape,
    })
  }
  if (layers !== undefined && !(Number.isInteger(layers) && layers >= 1 && layers <= 4096)) {
    throw new InferenceError('ERR_INVALID_OPTION', `layers is ${shown(layers)}; allowed is an integer from 1 to 4096`, {
      layers,
    })
  }
  const { hiddenSize, intermediateSize, numHeads, numKvHeads, numLayers: published } = sizes[shape]
  const numLayers = layers ?? published
  const headDim = hiddenSize / numHeads
  const arch: ArchSpec = {
    family: 'llama',
    modelType: 'llama',
    hiddenSize,
    intermediateSize,
    numLayers,
    numHeads,
    numKvHeads,
    headDim,
    vocabSize: 32000,
    maxPositions: 4096,
    normEps: 1e-5,
    activation: 'silu',
    attentionBias: false,
    mlpBias: false,
    tiedHead: false,
    rope: { theta: 10000, rotaryDims: headDim, scaling: { kind: 'default' } },
  }

  const tensors = new Map<string, TensorInfo>()
  const add = (name: string, ...dimensions: readonly number[]): void => {
    const nbytes = dimensions.reduce((product, dimension) => product * dimension, elementBytes.bf16)
    tensors.set(name, { name, dtype: 'bf16', shape: dimensions, file: '', byteOffset: 0, nbytes })
  }
  const kvSize = numKvHeads * headDim
  add('model.embed_tokens.weight', arch.vocabSize, hiddenSize)
  for (let layer = 0; layer < numLayers; layer++) {
    const at = `model.layers.${layer}.`
    add(`${at}input_layernorm.weight`, hiddenSize)
    add(`${at}self_attn.q_proj.weight`, hiddenSize, hiddenSize)
    add(`${at}self_attn.k_proj.weight`, kvSize, hiddenSize)
    add(`${at}self_attn.v_proj.weight`, kvSize, hiddenSize)
    add(`${at}self_attn.o_proj.weight`, hiddenSize, hiddenSize)
    add(`${at}post_attention_layernorm.weight`, hiddenSize)
    add(`${at}mlp.gate_proj.weight`, intermediateSize, hiddenSize)
    add(`${at}mlp.up_proj.weight`, intermediateSize, hiddenSize)
    add(`${at}mlp.down_proj.weight`, hiddenSize, intermediateSize)
  }
  add('model.norm.weight', hiddenSize)
  add('lm_head.weight', arch.vocabSize, hiddenSize)

  return {
    directory: '',
    arch,
    tensors,
    // No end token: a benchmark runs to its length.
    generation: {
      bosTokenId: 1,
      eosTokenIds: [],
      doSample: false,
      temperature: 1,
      topK: 50,
      topP: 1,
      repetitionPenalty: 1,
      maxNewTokens: null,
    },
    storedDType: 'bf16',
    fingerprint: createHash('sha256').update(`invented ${shape} ${numLayers}`).digest('hex'),
  }
}
