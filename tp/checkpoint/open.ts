// The entry of this folder: a directory in the Hugging Face layout -> Checkpoint. Reads the configuration files and the headers
// of the weight files, a few hundred kilobytes; the weights themselves are read by each rank, its own byte ranges only.

import { createHash } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'

import type { SourceDType } from '../../native/types.js'
import { InferenceError, shown } from '../errors.js'
import type { Checkpoint, TensorInfo } from './arch.js'
import { parseConfig, parseGenerationConfig } from './config.js'
import { FileError, readSmallFile } from './files.js'
import { readWeights, type StoredWeights } from './safetensors.js'

/** The largest published config.json has some hundred kilobytes (label tables). */
const maxConfigBytes = 16 * 2 ** 20

export async function openCheckpoint(directory: string): Promise<Checkpoint> {
  if (typeof directory !== 'string' || directory === '' || directory.includes('\0')) {
    throw new InferenceError('ERR_INVALID_OPTION', `the model's directory is ${shown(directory)}; allowed is a path`, {
      directory,
    })
  }
  const root = resolve(directory)
  if (!(await isDirectory(root))) {
    throw new InferenceError(
      'ERR_MODEL_NOT_FOUND',
      `${root}: no such directory; a model is a directory that holds config.json and model.safetensors (or its shards and index)`,
      { directory: root },
    )
  }
  const configPath = join(root, 'config.json')
  const generationPath = join(root, 'generation_config.json')
  const configBytes = await readConfig(configPath)
  if (configBytes === null) {
    throw new InferenceError(
      'ERR_MODEL_NOT_FOUND',
      `${root}: looked for config.json, and there is none: is this the model's directory?`,
      {
        directory: root,
        lookedFor: ['config.json'],
      },
    )
  }
  const generationBytes = await readConfig(generationPath)
  const weights = await readWeights(root)

  const parsed = parseConfig(
    configBytes,
    configPath,
    (name) => weights.tensors.has(name) || weights.otherTensors.has(name),
  )
  return {
    directory: root,
    arch: parsed.arch,
    tensors: weights.tensors,
    otherTensors: weights.otherTensors,
    files: weights.files,
    generation: parseGenerationConfig(generationBytes, generationPath, parsed),
    storedDType: widestDType([...weights.tensors.values()], root),
    fingerprint: fingerprintOf([configBytes, generationBytes ?? Buffer.alloc(0)], weights),
  }
}

async function isDirectory(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch {
    return false
  }
}

/** null: there is none. */
async function readConfig(path: string): Promise<Buffer | null> {
  try {
    return await readSmallFile(path, maxConfigBytes)
  } catch (error) {
    if (!(error instanceof FileError)) throw error
    if (error.isMissing) return null
    throw new InferenceError('ERR_BAD_CONFIG', `${path}: ${error.message}`, { file: path })
  }
}

/** Of the matrices. f16 and bf16 side by side need f32 to hold both: one has more range, the other more digits. */
function widestDType(tensors: readonly TensorInfo[], directory: string): SourceDType {
  const dtypes = new Set(tensors.filter((tensor) => tensor.shape.length >= 2).map((tensor) => tensor.dtype))
  const [only] = dtypes
  if (only === undefined) {
    throw new InferenceError(
      'ERR_BAD_CHECKPOINT',
      `${directory}: the weight files hold no matrix of dtype F32, F16 or BF16, so no weights of a model`,
      { directory },
    )
  }
  return dtypes.size === 1 ? only : 'f32'
}

/** Each part with its length before it, so that no two lists of parts give the same bytes. The data enter by their size. */
function fingerprintOf(configs: readonly Buffer[], weights: StoredWeights): string {
  const hash = createHash('sha256')
  for (const part of [...configs, ...weights.headers]) hash.update(`${part.length} `).update(part)
  for (const { nbytes } of weights.files) hash.update(`${nbytes} `)
  return hash.digest('hex')
}
