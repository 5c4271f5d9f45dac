// The headers of safetensors files: where each tensor's bytes are, without reading one of them. The format is eight bytes of
// header length, a JSON header, and the data (github.com/huggingface/safetensors, "Format"). A checkpoint comes from a stranger:
// every number is checked before it sizes, seeks or multiplies anything, and each tensor owns bytes that no other owns.

import { readdir } from 'node:fs/promises'
import { join } from 'node:path'

import type { SourceDType } from '../../native/types.js'
import { InferenceError, shown } from '../errors.js'
import type { StoredFile, StoredTensor, TensorInfo } from './arch.js'
import { FileError, openRegularFile, type RegularFile, readExactly, readSmallFile } from './files.js'
import { countOf, decodeUtf8, isJsonObject, JsonError, JsonReader } from './json.js'

/** As in the reference implementation; a header of this size describes about a million tensors. */
const maxHeaderBytes = 100_000_000
const maxTensors = 1_000_000
const maxNameBytes = 4096
/** Nothing in use has more than 5; the bound keeps products of dimensions short. */
const maxDimensions = 32
/** header > tensor > shape is 3; the reference nests no deeper either. */
const maxDepth = 8

/** Bits of one element. */
const dtypeBits: ReadonlyMap<string, number> = new Map(
  Object.entries({
    F4: 4,
    F6_E2M3: 6,
    F6_E3M2: 6,
    BOOL: 8,
    U8: 8,
    I8: 8,
    F8_E5M2: 8,
    F8_E4M3: 8,
    F8_E8M0: 8,
    I16: 16,
    U16: 16,
    F16: 16,
    BF16: 16,
    I32: 32,
    U32: 32,
    F32: 32,
    I64: 64,
    U64: 64,
    F64: 64,
    C64: 64,
  }),
)
/** Those that a weight can be made from. */
const sourceDTypes: ReadonlyMap<string, SourceDType> = new Map([
  ['F32', 'f32'],
  ['BF16', 'bf16'],
  ['F16', 'f16'],
])

interface HeaderEntry {
  readonly name: string
  readonly dtype: string
  readonly shape: readonly number[]
  /** From the start of the data. */
  readonly begin: number
  readonly end: number
}

export interface SafetensorsFile {
  readonly file: StoredFile
  /** The header's bytes, for the fingerprint. */
  readonly header: Buffer
  readonly tensors: readonly StoredTensor[]
}

export interface StoredWeights {
  readonly tensors: ReadonlyMap<string, TensorInfo>
  /** Tensors of dtypes that no weight can be made from, so that an error can say what they are. */
  readonly otherTensors: ReadonlyMap<string, StoredTensor>
  readonly files: readonly StoredFile[]
  /** In the order of the files' names. */
  readonly headers: readonly Buffer[]
}

/**
 * The weights of a directory: `model.safetensors`, or the shards that `model.safetensors.index.json` lists. A single file
 * wins where both stand, as in Hugging Face transformers.
 */
export async function readWeights(directory: string): Promise<StoredWeights> {
  const single = join(directory, 'model.safetensors')
  const alone = await readSafetensorsFile(single).catch(missingAsNull)
  if (alone !== null) return collect([alone])

  const indexPath = join(directory, 'model.safetensors.index.json')
  const bytes = await readSmallFile(indexPath, maxHeaderBytes).catch((error: unknown) =>
    missingAsNull(asBadFile(error, indexPath)),
  )
  if (bytes === null) throw await noWeights(directory)
  const shardOf = parseWeightIndex(bytes, indexPath)

  const namesOf = new Map<string, string[]>()
  for (const [name, shard] of shardOf) {
    const names = namesOf.get(shard)
    if (names === undefined) namesOf.set(shard, [name])
    else names.push(name)
  }
  const shards: SafetensorsFile[] = []
  for (const [shard, listed] of [...namesOf].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const path = join(directory, shard)
    const read = await readSafetensorsFile(path).catch(missingAsNull)
    if (read === null) {
      throw bad(
        path,
        `the index lists the shard ${shown(shard)}, but there is no such file; download it or repair the index`,
      )
    }
    for (const tensor of read.tensors) {
      const said = shardOf.get(tensor.name)
      if (said !== undefined && said !== shard) {
        throw bad(path, `it holds the tensor ${shown(tensor.name)}, which the index places in ${shown(said)}`, {
          tensor: tensor.name,
        })
      }
    }
    const held = new Set(read.tensors.map((tensor) => tensor.name))
    const absent = listed.find((name) => !held.has(name))
    if (absent !== undefined) {
      throw bad(path, `the index places the tensor ${shown(absent)} here, but the file does not hold it`, {
        tensor: absent,
      })
    }
    shards.push(read)
  }
  return collect(shards)
}

/** weight_map of an index: tensor -> plain name of a file in the same directory. */
export function parseWeightIndex(bytes: Uint8Array, path: string): ReadonlyMap<string, string> {
  const fail = (why: string, fields: Record<string, unknown> = {}): never => {
    throw bad(path, why, fields)
  }
  try {
    const limits = { maxDepth, maxEntries: maxTensors, maxStringLength: maxNameBytes }
    const root = new JsonReader(decodeUtf8(bytes), limits).document()
    if (!isJsonObject(root)) return fail('the index is not a JSON object')
    const map = root.get('weight_map')
    if (!isJsonObject(map)) return fail('the index has no weight_map that is an object')
    if (map.size === 0) return fail('the weight_map lists no tensor')
    const shardOf = new Map<string, string>()
    for (const [tensor, shard] of map) {
      if (typeof shard !== 'string' || !isPlainFileName(shard)) {
        return fail(
          `the weight_map places ${shown(tensor)} in ${shown(shard)}; allowed is the plain name of a .safetensors file beside the index`,
          { tensor, shard },
        )
      }
      shardOf.set(tensor, shard)
    }
    return shardOf
  } catch (error) {
    throw asBadFile(error, path)
  }
}

/** No separator of any system, no NUL, no name of a directory; longer names no file system has. */
function isPlainFileName(name: string): boolean {
  return /^[^/\\\0]+\.safetensors$/.test(name) && !name.startsWith('..') && Buffer.byteLength(name) <= 255
}

/** Reads and checks the header of one file. */
export async function readSafetensorsFile(path: string): Promise<SafetensorsFile> {
  let file: RegularFile | undefined
  try {
    file = await openRegularFile(path)
    if (file.nbytes < 8) throw new FileError(`it has ${file.nbytes} bytes; a safetensors file has at least 8`, false)
    const length = (await readExactly(file, 0, 8)).readBigUInt64LE(0)
    if (length > BigInt(maxHeaderBytes)) {
      throw new FileError(`it claims a header of ${length} bytes; at most ${maxHeaderBytes} are allowed`, false)
    }
    const headerBytes = Number(length)
    if (headerBytes > file.nbytes - 8) {
      throw new FileError(
        `it claims a header of ${headerBytes} bytes, but has ${file.nbytes - 8} after the length: cut off?`,
        false,
      )
    }
    const header = await readExactly(file, 8, headerBytes)
    const dataStart = 8 + headerBytes
    const entries = parseHeader(header, file.nbytes - dataStart)
    const stored = { path: file.path, nbytes: file.nbytes, mtimeMs: file.mtimeMs }
    const tensors = entries.map(({ name, dtype, shape, begin, end }): StoredTensor => ({
      name,
      dtype,
      shape,
      file: stored.path,
      byteOffset: dataStart + begin,
      nbytes: end - begin,
    }))
    return { file: stored, header, tensors }
  } catch (error) {
    throw asBadFile(error, path)
  } finally {
    await file?.handle.close()
  }
}

/** The tensors of a header, in the order of their bytes. Throws JsonError. */
function parseHeader(header: Buffer, dataBytes: number): HeaderEntry[] {
  if (header[0] !== 0x7b) throw new JsonError('the header does not begin with "{"')
  const reader = new JsonReader(decodeUtf8(header), {
    maxDepth,
    maxEntries: maxTensors + 1,
    maxStringLength: maxHeaderBytes,
  })
  const entries: HeaderEntry[] = []
  reader.object((name) => {
    if (name === '__metadata__') {
      reader.object((key) => {
        if (typeof reader.value() !== 'string')
          throw new JsonError(`__metadata__ may hold strings only; ${shown(key)} is none`)
      })
      return
    }
    if (entries.length === maxTensors) throw new JsonError(`it describes more than ${maxTensors} tensors`)
    entries.push(readEntry(name, reader, dataBytes))
  })
  reader.end()

  // Sorted by begin, then end, tensors must follow each other without hole or overlap, and fill the data: so no byte of the
  // file is read twice or never, and nothing hides behind the last tensor. Empty tensors sit between two others.
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end)
  let end = 0
  for (const entry of entries) {
    if (entry.begin !== end) {
      const fault = entry.begin < end ? 'overlap the tensor before' : 'leave a hole after the tensor before'
      throw new JsonError(
        `the bytes of ${shown(entry.name)} begin at ${entry.begin} and ${fault}, which ends at ${end}`,
      )
    }
    end = entry.end
  }
  if (end !== dataBytes)
    throw new JsonError(`the tensors end at byte ${end} of the data, but there are ${dataBytes} bytes`)
  return entries
}

/** {"dtype", "shape", "data_offsets"}, with the reader before it. */
function readEntry(name: string, reader: JsonReader, dataBytes: number): HeaderEntry {
  const fail = (why: string): never => {
    throw new JsonError(`tensor ${shown(name)}: ${why}`)
  }
  const count = (what: string): number => {
    const value = reader.value()
    return countOf(value) ?? fail(`${what} has an element that is no plain integer from 0 to 2^53 - 1`)
  }
  if (Buffer.byteLength(name) > maxNameBytes || name.includes('\0')) {
    fail(`the name is longer than ${maxNameBytes} bytes or holds a NUL`)
  }

  let dtype = ''
  let shape: number[] | undefined
  let offsets: number[] | undefined
  reader.object((key) => {
    if (key === 'dtype') {
      dtype = reader.string()
    } else if (key === 'shape') {
      const dimensions: number[] = []
      reader.array(() => {
        if (dimensions.length === maxDimensions) fail(`it has more than ${maxDimensions} dimensions`)
        dimensions.push(count('shape'))
      })
      shape = dimensions
    } else if (key === 'data_offsets') {
      const pair: number[] = []
      reader.array(() => {
        if (pair.length === 2) fail('data_offsets has more than two elements')
        pair.push(count('data_offsets'))
      })
      offsets = pair
    } else {
      fail(`it has the unknown key ${shown(key)}`)
    }
  })

  const bits = dtypeBits.get(dtype)
  if (bits === undefined) return fail(`the dtype ${shown(dtype)} is unknown`)
  if (shape === undefined) return fail('shape is missing')
  const [begin, end] = offsets ?? []
  if (begin === undefined || end === undefined) return fail('data_offsets must be [begin, end]')
  if (begin > end || end > dataBytes)
    return fail(`data_offsets [${begin}, ${end}] do not lie in the ${dataBytes} bytes of data`)
  const totalBits = shape.reduce((product, dimension) => product * BigInt(dimension), BigInt(bits))
  if (totalBits % 8n !== 0n) return fail('its elements do not fill whole bytes')
  if (totalBits / 8n !== BigInt(end - begin)) {
    return fail(`${dtype} [${shape.join(', ')}] has ${totalBits / 8n} bytes, but data_offsets give ${end - begin}`)
  }
  return { name, dtype, shape, begin, end }
}

function collect(files: readonly SafetensorsFile[]): StoredWeights {
  const tensors = new Map<string, TensorInfo>()
  const otherTensors = new Map<string, StoredTensor>()
  for (const { file, tensors: stored } of files) {
    for (const tensor of stored) {
      const other = tensors.get(tensor.name) ?? otherTensors.get(tensor.name)
      if (other !== undefined)
        throw bad(file.path, `the tensor ${shown(tensor.name)} stands in ${other.file}, too`, { tensor: tensor.name })
      const dtype = sourceDTypes.get(tensor.dtype)
      if (dtype === undefined) otherTensors.set(tensor.name, tensor)
      else tensors.set(tensor.name, { ...tensor, dtype })
    }
  }
  return { tensors, otherTensors, files: files.map(({ file }) => file), headers: files.map(({ header }) => header) }
}

/** Throws when a file is no longer what was opened: its size or its time of modification is another. */
export async function checkUnchanged(files: readonly StoredFile[]): Promise<void> {
  for (const { path, nbytes, mtimeMs } of files) {
    let now: RegularFile | undefined
    try {
      now = await openRegularFile(path)
      if (now.nbytes !== nbytes || now.mtimeMs !== mtimeMs) {
        throw new FileError('it was changed while the model was loaded; load the model again', false)
      }
    } catch (error) {
      throw asBadFile(error, path)
    } finally {
      await now?.handle.close()
    }
  }
}

/** Names what is there instead, for the usual case is a checkpoint in another format. */
async function noWeights(directory: string): Promise<InferenceError> {
  const names = await readdir(directory).catch(() => [])
  const others = names.filter((name) => /\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack)$/.test(name)).sort()
  const there = others.length === 0 ? 'no weights of another format either' : `but ${others.slice(0, 5).join(', ')}`
  return new InferenceError(
    'ERR_MODEL_NOT_FOUND',
    `${directory}: no weights: looked for model.safetensors and model.safetensors.index.json; found ${there}. ` +
      `Only safetensors in the Hugging Face layout are read: download or convert the checkpoint in that format`,
    { directory, lookedFor: ['model.safetensors', 'model.safetensors.index.json'], found: others },
  )
}

function bad(file: string, why: string, fields: Record<string, unknown> = {}): InferenceError {
  return new InferenceError('ERR_BAD_CHECKPOINT', `${file}: ${why}`, { file, ...fields })
}

/** The errors of files.ts and json.ts as ours; anything else is not for here. */
function asBadFile(error: unknown, path: string): unknown {
  if (error instanceof FileError && error.isMissing) {
    return new InferenceError('ERR_MODEL_NOT_FOUND', `${path}: ${error.message}`, { file: path })
  }
  return error instanceof FileError || error instanceof JsonError ? bad(path, error.message) : error
}

function missingAsNull(error: unknown): null {
  if (error instanceof InferenceError && error.code === 'ERR_MODEL_NOT_FOUND') return null
  throw error
}
