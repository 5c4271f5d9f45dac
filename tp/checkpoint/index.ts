// The public face of tp/checkpoint: what a model on disk is, and where its bytes are.

export type * from './arch.js'
export { supportedModelTypes } from './config.js'
export { inventCheckpoint, type InventedShape, inventedShapes } from './invent.js'
export { openCheckpoint } from './open.js'
export { checkUnchanged } from './safetensors.js'
