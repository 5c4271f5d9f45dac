// The addon's Mailbox and MailboxServer, typed: where frames pass between a rank's collectives and the thread that owns its sockets.

import { nativeAddon } from '../native/index.js'
import { CollectiveError } from './errors.js'

export interface NativeMailbox {
  /** By which the worker finds it. */
  readonly id: number
  /** Messages from the network that were none of this job's, or damaged. */
  readonly refused: number
}

export interface MailboxOptions {
  /** What every frame must carry: 64 bits of a digest over the job and the group. */
  readonly job: bigint
  readonly rank: number
  readonly worldSize: number
  /** Payload of a frame, a multiple of 64. */
  readonly frameBytes: number
  /** Frames to one peer that may be under way. */
  readonly window: number
}

export interface MailboxServer {
  readonly messageBytes: number
  /** @param onWork called in this thread when take() has something */
  serve(onWork: () => void): void
  /** The next message, and the rank of the job that it is for. Its memory stays until that rank has taken it. */
  take(): [rank: number, bytes: Uint8Array] | undefined
  deliver(message: Buffer): void
  lost(rank: number, host: string, pid: number, why: string): void
  /** The last message to a rank, which its thread answers. */
  sayGoodbye(rank: number): void
  /** That message has come, and so has all before it. */
  hasParted(rank: number): boolean
  close(): void
}

interface MailboxAddon {
  readonly Mailbox: new (options: MailboxOptions) => NativeMailbox
  readonly MailboxServer: new (id: number) => MailboxServer
}

function mailboxAddon(): MailboxAddon {
  const addon = nativeAddon()
  if (typeof addon === 'object' && addon !== null && 'Mailbox' in addon && 'MailboxServer' in addon)
    return addon as MailboxAddon
  throw new CollectiveError(
    'ERR_INTERNAL',
    'the native addon has no Mailbox: it is of another version; run `npx tilerank build`',
  )
}

export function createMailbox(options: MailboxOptions): NativeMailbox {
  const { Mailbox } = mailboxAddon()
  return new Mailbox(options)
}

export function openMailboxServer(id: number): MailboxServer {
  const { MailboxServer } = mailboxAddon()
  return new MailboxServer(id)
}
