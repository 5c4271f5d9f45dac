// The one error class of tp/. `code` is stable and is what callers and tests match; `fields` hold the facts of the message as
// data (file, key, value, ...), so that a program need not parse prose. The message says what is wrong and the way out.

import type { Recording } from '../collectives/index.js'

export type InferenceErrorCode =
  /** The directory, its config.json or its weights are not there. */
  | 'ERR_MODEL_NOT_FOUND'
  /** A safetensors file or its index breaks the format, or files disagree. */
  | 'ERR_BAD_CHECKPOINT'
  /** config.json, generation_config.json or a tokenizer file holds a value that cannot be. */
  | 'ERR_BAD_CONFIG'
  /** The files are in order, but ask for something that this library does not do. */
  | 'ERR_UNSUPPORTED_MODEL'
  | 'ERR_UNKNOWN_ARCHITECTURE'
  /** A tensor of the checkpoint that no operation of the model uses. */
  | 'ERR_UNCOVERED_WEIGHT'
  /** A tensor that the model needs and the checkpoint has not. */
  | 'ERR_MISSING_WEIGHT'
  | 'ERR_SHAPE_MISMATCH'
  | 'ERR_TP_TOO_LARGE'
  | 'ERR_TOKEN_OUT_OF_RANGE'
  | 'ERR_CONTEXT_LENGTH'
  | 'ERR_EMPTY_PROMPT'
  | 'ERR_NO_TOKENIZER'
  | 'ERR_NO_CHAT_TEMPLATE'
  | 'ERR_BAD_CHAT'
  | 'ERR_INVALID_OPTION'
  /** The model gave NaN, or nothing but minus infinity. */
  | 'ERR_BAD_LOGITS'
  /** An operation on something that close() has ended. */
  | 'ERR_CLOSED'
  | 'ERR_ABORTED'
  /** Ranks were asked for different things. */
  | 'ERR_MISMATCH'
  | 'ERR_NO_MEMORY'
  /** A limit of this process (setrlimit) other than memory is too low. */
  | 'ERR_LIMIT'
  | 'ERR_PEER_LOST'
  /** Ranks that gave no sign of life within the deadline. */
  | 'ERR_TIMEOUT'
  /** A broken invariant of this library. */
  | 'ERR_INTERNAL'

export type ErrorFields = Readonly<Record<string, unknown>>

export class InferenceError extends Error {
  override readonly name = 'InferenceError'
  readonly code: InferenceErrorCode
  readonly fields: ErrorFields
  /** ERR_PEER_LOST, ERR_TIMEOUT, ERR_MISMATCH: the last operations of every rank, and where each stood. */
  declare readonly recorder?: Recording

  constructor(
    code: InferenceErrorCode,
    message: string,
    fields: ErrorFields = {},
    options?: { readonly cause?: unknown },
  ) {
    super(message, options)
    this.code = code
    this.fields = fields
  }
}

/** A value as an error message shows it: short, on one line, without control characters. */
export function shown(value: unknown): string {
  // undefined, functions and symbols have no JSON, whatever the declaration says.
  const json: unknown = JSON.stringify(value)
  const text = typeof json === 'string' ? json : String(value)
  return text.length <= 120 ? text : `${text.slice(0, 117)}...`
}
