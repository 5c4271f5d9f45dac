// The one error class of launcher/. `code` is stable and is what callers and tests match; `fields` hold the facts of the message.

export type LauncherErrorCode =
  | 'ERR_INVALID_OPTION'
  /** A processor that is offline, outside the allowed set, or named twice. */
  | 'ERR_BAD_CORE_LIST'
  /** More ranks than cores, and sharing was not asked for. */
  | 'ERR_TOO_FEW_CORES'
  /** A rank could not be started at all. */
  | 'ERR_SPAWN_FAILED'
  /** A rank ended with a failure; `fields` say which one failed first and how. */
  | 'ERR_RANK_FAILED'
  | 'ERR_CLOSED'
  /** The addon is older or newer than this TypeScript. */
  | 'ERR_ADDON_MISMATCH'

export class LauncherError extends Error {
  override readonly name = 'LauncherError'
  readonly code: LauncherErrorCode
  readonly fields: Readonly<Record<string, unknown>>

  constructor(
    code: LauncherErrorCode,
    message: string,
    fields: Readonly<Record<string, unknown>> = {},
    options?: { readonly cause?: unknown },
  ) {
    super(message, options)
    this.code = code
    this.fields = fields
  }
}
