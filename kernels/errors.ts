// The one error of kernels/. `code` is stable and may be matched; the message names the thing and the way out.

import { AddonError } from '../native/index.js'

export type KernelErrorCode =
  'ERR_INVALID_ARGUMENT' | 'ERR_CLOSED' | 'ERR_NO_MEMORY' | 'ERR_UNSUPPORTED' | 'ERR_INTERNAL'

/** A kernel call that cannot be made; nothing has been written when it is thrown. */
export class KernelError extends Error {
  override readonly name = 'KernelError'
  readonly code: string

  constructor(code: KernelErrorCode | (string & {}), message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }
}

/** Runs one native call; its error becomes a KernelError of the same code. Others pass through. */
export function callKernel<T>(call: () => T): T {
  try {
    return call()
  } catch (error) {
    if (error instanceof Error && !(error instanceof AddonError) && 'code' in error && typeof error.code === 'string') {
      throw new KernelError(error.code, error.message, { cause: error })
    }
    throw error
  }
}
