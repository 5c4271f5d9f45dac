// What store.ts and its thread say to each other. A request is [head, key, value], an answer [head, value]; a head is the call's number (u32,
// little endian) and one byte: what to do, or how it went.

import type { KeyPair } from './secret.js'
import type { ThreadFailure, ThreadSetup } from './socketThread.js'

export const storeOps = { set: 1, setNew: 2, get: 3, cancel: 4, delete: 5 } as const
export const storeStatus = { done: 0, exists: 1, refused: 2 } as const
export const headBytes = 5
export const maxKeyBytes = 256
export const maxValueBytes = 64 << 10
/** A value and what CURVE adds, with room. */
export const maxMessageBytes = maxValueBytes + 1024
/** Keys that stand, and gets that wait, at most. */
export const maxEntries = 1 << 16
/** Of all values together. */
export const maxStoredBytes = 256 << 20
/** Of one client, at a time: as many answers wait for it in the server at most, so that none is ever dropped there. */
export const maxCalls = 4096

export interface StoreSetup extends ThreadSetup {
  readonly endpoint: string
  readonly keys: KeyPair | undefined
  /** The one public key that may come in. */
  readonly admitted: string | undefined
  /** [1] messages that were no request. */
  readonly dropped: Int32Array<SharedArrayBuffer>
}

/** As opposed to End: the port is free when the thread has ended. */
export interface ToStoreThread {
  readonly kind: 'close'
}

export type FromStoreThread = { readonly kind: 'bound'; readonly endpoint: string } | ThreadFailure
