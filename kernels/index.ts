// The public face of 'tilerank/kernels': arithmetic on one rank.

export * from './errors.js'
export {
  convert,
  embed,
  linear,
  matrix,
  pack,
  packGateUp,
  packInto,
  PackedWeight,
  selectedTier,
  selectTier,
  setBias,
  streamRead,
  tiers,
  unpack,
  values,
} from './linear.js'
export type { LinearOptions, Matrix, PackOptions, TierName, TierOption, TierReport, WeightSource } from './linear.js'
export * from './rows.js'
export * from './attention.js'
