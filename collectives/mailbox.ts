// The addon's Mailbox, typed: where frames pass between a rank's collectives and the courier that carries them.

import { nativeAddon } from '../native/index.js'
import { CollectiveError } from './errors.js'

export interface NativeMailbox {
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

interface MailboxAddon {
  readonly Mailbox: new (options: MailboxOptions) => NativeMailbox
}

export function createMailbox(options: MailboxOptions): NativeMailbox {
  const addon = nativeAddon()
  if (typeof addon !== 'object' || addon === null || !('Mailbox' in addon)) {
    throw new CollectiveError(
      'ERR_INTERNAL',
      'the native addon has no Mailbox: it is of another version; run `npx tilerank build`',
    )
  }
  const { Mailbox } = addon as MailboxAddon
  return new Mailbox(options)
}
