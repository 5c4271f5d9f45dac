// Rotary frequencies: radians a position for each pair of dimensions, theta^(-2i/d), and the scalings of it that Llama checkpoints
// use (RoFormer, Su et al. 2021, section 3.4; position interpolation, Chen et al. 2023; NTK-aware scaling; Llama 3.1).

import type { ArchSpec } from './checkpoint/arch.js'

function baseFrequencies(theta: number, rotaryDims: number): Float64Array {
  return Float64Array.from({ length: rotaryDims / 2 }, (_, i) => theta ** ((-2 * i) / rotaryDims))
}

/** Frequencies [rotaryDims / 2] of a sequence no longer than the original context. */
export function rotaryFrequencies(rope: ArchSpec['rope']): Float64Array {
  const frequencies = baseFrequencies(rope.theta, rope.rotaryDims)
  const scaling = rope.scaling
  switch (scaling.kind) {
    case 'default':
    case 'dynamic':
      return frequencies
    case 'linear':
      return frequencies.map((f) => f / scaling.factor)
    case 'llama3': {
      // Long waves are stretched by the factor, short ones kept, those between blended.
      const longest = scaling.originalMaxPositions / scaling.lowFreqFactor
      const shortest = scaling.originalMaxPositions / scaling.highFreqFactor
      return frequencies.map((f) => {
        const wavelength = (2 * Math.PI) / f
        if (wavelength < shortest) return f
        if (wavelength > longest) return f / scaling.factor
        const smooth =
          (scaling.originalMaxPositions / wavelength - scaling.lowFreqFactor) /
          (scaling.highFreqFactor - scaling.lowFreqFactor)
        return ((1 - smooth) * f) / scaling.factor + smooth * f
      })
    }
    default: {
      const never: never = scaling
      throw new TypeError(`unknown rope scaling ${JSON.stringify(never)}`)
    }
  }
}

/**
 * Frequencies of one sequence of `length` positions where they differ from rotaryFrequencies(), else null: 'dynamic' scaling grows
 * the base with the whole length of a sequence that is longer than the original context. Keys written keep their rotation.
 */
export function rotaryFrequenciesFor(rope: ArchSpec['rope'], length: number): Float64Array | null {
  const scaling = rope.scaling
  if (scaling.kind !== 'dynamic' || length <= scaling.originalMaxPositions) return null
  const growth = (scaling.factor * length) / scaling.originalMaxPositions - (scaling.factor - 1)
  const theta = rope.theta * growth ** (rope.rotaryDims / (rope.rotaryDims - 2))
  return baseFrequencies(theta, rope.rotaryDims)
}
