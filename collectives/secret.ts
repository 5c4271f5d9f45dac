// The secret of a job on several nodes, and the keys that follow from it: whoever has it may join, nobody else. It comes by file, descriptor or
// option, never by argument list, and leaves this process never.

import { createPrivateKey, createPublicKey, hkdfSync } from 'node:crypto'
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs'
import type { Environment } from './env.js'
import { CollectiveError, invalid } from './errors.js'

/** A CURVE key pair in Z85. */
export interface KeyPair {
  readonly publicKey: string
  readonly secretKey: string
}

/** 'curve' unless 'none' is said by name. */
export type Encryption = 'curve' | 'none'

export const secretBytes = 32
const howTo =
  "make one with `openssl rand -hex 32 > FILE && chmod 600 FILE`, copy it to all nodes and set TILERANK_SECRET_FILE; or say encryption: 'none' (TILERANK_ENCRYPTION=none) on a network that you trust"

const digits = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#'

/** ZeroMQ RFC 32: five digits of base 85 for four bytes. */
export function z85Encode(bytes: Uint8Array): string {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
  let text = ''
  for (let at = 0; at < view.length; at += 4) {
    let value = view.readUInt32BE(at)
    let group = ''
    for (let digit = 0; digit < 5; digit++) {
      group = (digits[value % 85] ?? '') + group
      value = Math.floor(value / 85)
    }
    text += group
  }
  return text
}

/** undefined: not the Z85 of 32 bytes. */
export function z85Decode(text: string): Buffer | undefined {
  if (text.length !== 40) return undefined
  const bytes = Buffer.alloc(32)
  for (let group = 0; group < 8; group++) {
    let value = 0
    for (const character of text.slice(5 * group, 5 * group + 5)) {
      const digit = digits.indexOf(character)
      if (digit < 0) return undefined
      value = value * 85 + digit
    }
    if (value >= 2 ** 32) return undefined
    bytes.writeUInt32BE(value, 4 * group)
  }
  return bytes
}

// RFC 8410: an X25519 private key is these bytes, then the key itself.
const pkcs8Head = Buffer.from('302e020100300506032b656e04220420', 'hex')

/** The key pair that this secret gives for a purpose, the same in every process. */
export function deriveKeys(secret: Uint8Array, purpose: string): KeyPair {
  const raw = Buffer.from(hkdfSync('sha256', secret, 'tilerank', purpose, 32))
  const key = createPrivateKey({ key: Buffer.concat([pkcs8Head, raw]), format: 'der', type: 'pkcs8' })
  const spki = createPublicKey(key).export({ format: 'der', type: 'spki' })
  return { publicKey: z85Encode(spki.subarray(spki.length - 32)), secretKey: z85Encode(raw) }
}

export function readEncryption(option: string | undefined, env: Environment): Encryption {
  const variable = env['TILERANK_ENCRYPTION'] ?? ''
  const said = option ?? (variable === '' ? 'curve' : variable)
  if (said === 'curve' || said === 'none') return said
  if (option !== undefined) throw invalid(`encryption is '${said}'; there are curve and none`)
  throw wrong(`TILERANK_ENCRYPTION is '${said}'; there are curve and none`, 'TILERANK_ENCRYPTION')
}

/**
 * The job's secret: the option, or what TILERANK_SECRET_FILE or TILERANK_SECRET_FD names.
 * @throws CollectiveError ERR_ENVIRONMENT: none, one that others may read, or one that is no secret
 */
export function readSecret(option: string | undefined, env: Environment): Buffer {
  if (option !== undefined) {
    const secret = decode(option)
    if (secret === undefined) throw invalid(`the option secret is not ${2 * secretBytes} hexadecimal digits: ${howTo}`)
    return secret
  }
  const file = env['TILERANK_SECRET_FILE'] ?? ''
  const descriptor = env['TILERANK_SECRET_FD'] ?? ''
  if (file !== '' && descriptor !== '')
    throw wrong(
      'TILERANK_SECRET_FILE and TILERANK_SECRET_FD are both set',
      'TILERANK_SECRET_FILE',
      'TILERANK_SECRET_FD',
    )
  if (file !== '') return parse(readPrivateFile(file), 'TILERANK_SECRET_FILE')
  if (descriptor !== '') {
    if (!/^\d{1,9}$/.test(descriptor))
      throw wrong(`TILERANK_SECRET_FD is '${descriptor}', expected is a descriptor`, 'TILERANK_SECRET_FD')
    return parse(readDescriptor(Number(descriptor), 'TILERANK_SECRET_FD'), 'TILERANK_SECRET_FD')
  }
  throw wrong(`a group on several nodes needs the job's secret: ${howTo}`, 'TILERANK_SECRET_FILE')
}

const wrong = (message: string, ...variables: readonly string[]): CollectiveError =>
  new CollectiveError('ERR_ENVIRONMENT', message, { variables })

const decode = (text: string): Buffer | undefined => {
  const [, digits] = /^([0-9a-f]{64})(?:\r?\n)?$/i.exec(text) ?? []
  return digits === undefined ? undefined : Buffer.from(digits, 'hex')
}

function parse(text: string, variable: string): Buffer {
  const secret = decode(text)
  if (secret !== undefined) return secret
  // What it holds instead may be a secret too, and is not shown.
  const why = text === '' ? 'is empty (what comes through a pipe is there once)' : 'holds no secret'
  throw wrong(`${variable} ${why}: expected are ${2 * secretBytes} hexadecimal digits; ${howTo}`, variable)
}

function readPrivateFile(path: string): string {
  let descriptor
  try {
    descriptor = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK)
  } catch (cause) {
    throw wrong(
      `TILERANK_SECRET_FILE: ${cause instanceof Error ? cause.message : String(cause)}`,
      'TILERANK_SECRET_FILE',
    )
  }
  try {
    const info = fstatSync(descriptor)
    if (!info.isFile()) throw wrong(`TILERANK_SECRET_FILE ${path} is no regular file`, 'TILERANK_SECRET_FILE')
    if (info.uid !== process.geteuid?.())
      throw wrong(`TILERANK_SECRET_FILE ${path} belongs to another user`, 'TILERANK_SECRET_FILE')
    if ((info.mode & 0o077) !== 0)
      throw wrong(`TILERANK_SECRET_FILE ${path} is open to other users: chmod 600`, 'TILERANK_SECRET_FILE')
    return readDescriptor(descriptor, 'TILERANK_SECRET_FILE')
  } finally {
    closeSync(descriptor)
  }
}

function readDescriptor(descriptor: number, what: string): string {
  let length = 0
  let bytes
  try {
    // A file from its start, so that the next group can read it again: digits, the end of the line, and what is too much. Of a pipe the
    // digits alone: the other end may stay open.
    const isFile = fstatSync(descriptor).isFile()
    bytes = Buffer.alloc(2 * secretBytes + (isFile ? 3 : 0))
    for (let come = -1; come !== 0 && length < bytes.length; length += come) {
      come = readSync(descriptor, bytes, length, bytes.length - length, isFile ? length : null)
    }
  } catch (cause) {
    throw wrong(`${what}: ${cause instanceof Error ? cause.message : String(cause)}`, what)
  }
  return bytes.toString('latin1', 0, length)
}
