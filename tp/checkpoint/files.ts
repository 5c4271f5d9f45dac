// Reading of a checkpoint's files: regular files only, whatever a name may stand for, and never more bytes than were asked about
// before. Used by safetensors.ts, config.ts and tokens.ts.

import { constants, type Stats } from 'node:fs'
import { type FileHandle, open, realpath, stat } from 'node:fs/promises'

export interface RegularFile {
  readonly handle: FileHandle
  /** Absolute, with symbolic links resolved. */
  readonly path: string
  readonly nbytes: number
  readonly mtimeMs: number
}

/** Why a path cannot be read as a file. `isMissing`: there is nothing there. */
export class FileError extends Error {
  override readonly name = 'FileError'
  constructor(
    message: string,
    readonly isMissing: boolean,
  ) {
    super(message)
  }
}

/**
 * Opens a regular file, or what a chain of symbolic links ends in, for the Hugging Face cache is made of links. A FIFO, a device
 * or a directory is refused before it is opened (opening a FIFO waits for a writer), and again by the descriptor.
 */
export async function openRegularFile(path: string): Promise<RegularFile> {
  const kindOf = (s: Stats): string =>
    s.isDirectory() ? 'a directory' : s.isFIFO() ? 'a FIFO' : s.isSocket() ? 'a socket' : 'a device'
  let handle: FileHandle | undefined
  try {
    const resolved = await realpath(path)
    const before = await stat(resolved)
    if (!before.isFile()) throw new FileError(`it is ${kindOf(before)}, not a regular file`, false)
    handle = await open(resolved, constants.O_RDONLY | constants.O_NONBLOCK)
    const now = await handle.stat()
    if (!now.isFile()) throw new FileError(`it is ${kindOf(now)}, not a regular file`, false)
    return { handle, path: resolved, nbytes: now.size, mtimeMs: now.mtimeMs }
  } catch (error) {
    await handle?.close()
    if (error instanceof FileError) throw error
    const code = error instanceof Error && 'code' in error ? String(error.code) : String(error)
    const why: Readonly<Record<string, string>> = {
      ENOENT: 'there is no such file',
      ENOTDIR: 'a part of its path is no directory',
      ELOOP: 'its symbolic links form a loop',
      EACCES: 'this user may not read it',
      EPERM: 'this user may not read it',
    }
    throw new FileError(why[code] ?? `it cannot be read (${code})`, code === 'ENOENT' || code === 'ENOTDIR')
  }
}

/** Exactly `nbytes` bytes from `position`; the caller has compared both with the size of the file. */
export async function readExactly(file: RegularFile, position: number, nbytes: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(nbytes)
  let done = 0
  while (done < nbytes) {
    const { bytesRead } = await file.handle.read(buffer, done, nbytes - done, position + done)
    if (bytesRead === 0) throw new FileError('it became shorter while it was read', false)
    done += bytesRead
  }
  return buffer
}

/** A small file as a whole. */
export async function readSmallFile(path: string, maxBytes: number): Promise<Buffer> {
  const file = await openRegularFile(path)
  try {
    if (file.nbytes > maxBytes) throw new FileError(`it has ${file.nbytes} bytes; at most ${maxBytes} are read`, false)
    return await readExactly(file, 0, file.nbytes)
  } finally {
    await file.handle.close()
  }
}
