// The words that all layers share. No import from here: everything else may import this file.

export type DType = 'f32' | 'bf16'

/** Element types that a checkpoint may store and a packed weight may be made from. */
export type SourceDType = 'f32' | 'bf16' | 'f16'

/** [rows, columns] or fewer or more dimensions, outermost first. */
export type Shape = readonly number[]

export const elementBytes: Readonly<Record<SourceDType, number>> = { f32: 4, bf16: 2, f16: 2 }
