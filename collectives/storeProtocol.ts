// What store.ts and its thread say to each other. A request is [head, key, value], an answer [head, value]; a head is the call's number (u32,
// little endian) and one byte: what to do, or how it went.

import type { KeyPair } from './secret.js'
import type { ThreadFailure, ThreadSetup } from './socketThread.js'

export const storeOps = { set: 1, setNew: 2, get: 3, cancel: 4, delete: 5 } as const
export const storeStatus = { done: 0, exists: 1, refused: 2 } as const
export const headBytes = 5
export const maxKeyBytes = 256
export const maxValueBytes = 64 << 10
/** Keys that stand, and gets that wait, at most. */
export const maxEntries = 1 << 16

export interface StoreSetup extends ThreadSetup {
  readonly endpoint: string
  readonly keys: KeyPair | undefined
  /** The one public key that may come in. */
  readonly admitted: string | undefined
}

export interface ToStoreThread {
  readonly kind: 'end'
}

export type FromStoreThread = { readonly kind: 'bound'; readonly endpoint: string } | ThreadFailure
