// What a client process (client.ts) and its ranks (rankMain.ts) say to each other over Node's IPC channel. Ids and numbers only:
// text, templates and stop rules live in the client. Tokens of one turn of the event loop travel together.

import type { RankConfig, RankReport } from './rank.js'
import type { FinishReason, Request } from './scheduler.js'

export type ToRank =
  | { readonly type: 'open'; readonly config: RankConfig; readonly spinUs: number }
  | { readonly type: 'submit'; readonly request: number; readonly asked: Request }
  | { readonly type: 'abort'; readonly request: number }
  | { readonly type: 'report'; readonly call: number }
  | { readonly type: 'ping' }
  | { readonly type: 'close' }

export interface TokenMessage {
  readonly request: number
  readonly id: number | null
  readonly finishReason: FinishReason | null
  readonly atMs: number
  readonly logits?: Float32Array
}

/** An error as it crosses processes. */
export interface ErrorMessage {
  readonly name: string
  readonly message: string
  readonly code: string | null
  readonly facts: Readonly<Record<string, unknown>>
}

export type FromRank =
  | { readonly type: 'progress'; readonly loaded: number; readonly total: number }
  | { readonly type: 'ready' }
  | { readonly type: 'pong' }
  | { readonly type: 'tokens'; readonly tokens: readonly TokenMessage[] }
  | { readonly type: 'refused'; readonly request: number; readonly error: ErrorMessage }
  | { readonly type: 'report'; readonly call: number; readonly report: RankReport }
  | { readonly type: 'failed'; readonly error: ErrorMessage }

export function errorToMessage(error: unknown): ErrorMessage {
  if (!(error instanceof Error)) return { name: 'Error', message: String(error), code: null, facts: {} }
  const { code, fields, ...facts } = error as Error & { code?: unknown; fields?: Record<string, unknown> }
  const isPlain = (value: unknown): boolean =>
    Array.isArray(value) ? value.every(isPlain) : ['number', 'string', 'boolean'].includes(typeof value)
  const plain = Object.entries({ ...facts, ...fields }).filter(([, value]) => isPlain(value))
  return {
    name: error.name,
    message: error.message,
    code: typeof code === 'string' ? code : null,
    facts: Object.fromEntries(plain),
  }
}

/** The error of another process, with its code and facts as properties. */
export function errorFromMessage({ name, message, code, facts }: ErrorMessage): Error {
  return Object.assign(new Error(message), { name, ...(code === null ? {} : { code }), ...facts })
}
