// From the weights of a Program to the list of byte ranges that this rank reads: nothing else of the files is touched.

import { closeSync, openSync } from 'node:fs'
import type { Checkpoint, TensorInfo } from './checkpoint/arch.js'
import { InferenceError } from './errors.js'
import type { Program, WeightPart } from './program.js'
import type { LoadPart, NativeRunner } from './runner.js'

/** FNV-1a: a made-up tensor has the same values on every rank and at every split. */
function seedOf(name: string): number {
  let hash = 0x811c9dc5
  for (const byte of Buffer.from(name)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0
  return hash
}

function planParts(
  program: Program,
  tensors: ReadonlyMap<string, TensorInfo>,
  fdOf: (file: string) => number,
): LoadPart[] {
  const parts: LoadPart[] = []
  const add = (weight: number, copy: number, isBias: boolean, part: WeightPart): void => {
    const tensor = tensors.get(part.tensor)
    if (!tensor)
      throw new InferenceError(
        'ERR_INTERNAL',
        `the program names a tensor '${part.tensor}' that the checkpoint has not`,
      )
    if (part.rows[1] === 0) return
    parts.push({
      weight,
      copy,
      isBias,
      fd: tensor.file === '' ? -1 : fdOf(tensor.file),
      seed: seedOf(tensor.name),
      byteOffset: tensor.byteOffset,
      tensorColumns: tensor.shape.length === 1 ? 1 : (tensor.shape[1] ?? 1),
      dtype: tensor.dtype,
      row0: part.rows[0],
      rows: part.rows[1],
      column0: part.columns[0],
      columns: part.columns[1],
      output: part.output,
      interleave: part.interleave ? 2 : 1,
      phase: part.interleave === 'up' ? 1 : 0,
    })
  }
  // Layer by layer, as the packed memory and the files both stand: reading goes forward.
  const copies = Math.max(...program.weights.map((weight) => weight.parts.length))
  for (let copy = 0; copy < copies; copy++) {
    for (const [index, weight] of program.weights.entries()) {
      for (const part of weight.parts[copy] ?? []) add(index, copy, false, part)
      if (weight.kind === 'linear') for (const part of weight.bias?.[copy] ?? []) add(index, copy, true, part)
    }
  }
  return parts
}

/** Source bytes that this rank reads. */
export function loadBytes(parts: readonly LoadPart[]): number {
  return parts.reduce((sum, part) => sum + part.rows * part.columns * (part.dtype === 'f32' ? 4 : 2), 0)
}

/**
 * Reads and packs this rank's weights. `onProgress` is told the source bytes done and their total, a few times a second.
 * @throws Error with code ERR_IO when a file cannot be read or has shrunk
 */
export async function loadWeights(
  runner: NativeRunner,
  program: Program,
  checkpoint: Checkpoint,
  onProgress?: (loaded: number, total: number) => void,
): Promise<number> {
  const files = new Map<string, number>()
  const fdOf = (file: string): number => {
    const known = files.get(file)
    if (known !== undefined) return known
    const fd = openSync(file, 'r')
    files.set(file, fd)
    return fd
  }
  try {
    const parts = planParts(program, checkpoint.tensors, fdOf)
    const total = loadBytes(parts)
    const timer = onProgress && setInterval(() => onProgress(runner.loadedBytes(), total), 100)
    try {
      await runner.load(parts)
    } finally {
      clearInterval(timer)
    }
    onProgress?.(total, total)
    return total
  } finally {
    for (const fd of files.values()) closeSync(fd)
  }
}
