// The words that all layers share. No import from here: everything else may import this file.

export type DType = 'f32' | 'bf16'

/** Element types of collectives. */
export type CollectiveDType = SourceDType | 'f64' | 'i8' | 'u8' | 'i32' | 'u32' | 'i64' | 'u64'

/** Element types that a checkpoint may store and a packed weight may be made from. */
export type SourceDType = 'f32' | 'bf16' | 'f16'

/** [rows, columns] or fewer or more dimensions, outermost first. */
export type Shape = readonly number[]

export const elementBytes: Readonly<Record<CollectiveDType, number>> = {
  f32: 4,
  bf16: 2,
  f16: 2,
  f64: 8,
  i8: 1,
  u8: 1,
  i32: 4,
  u32: 4,
  i64: 8,
  u64: 8,
}
