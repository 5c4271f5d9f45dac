// Frames from the network are hostile until they were checked: what is none of this job's is refused and counted, and nothing of it is kept.

import assert from 'node:assert/strict'
import { createMailbox, openMailboxServer } from '../../collectives/mailbox.js'
import { rounds } from '../rounds.js'

const headerBytes = 80
const job = 0x1234_5678_9abc_def0n

/** A mailbox of rank 0 of 4, and its server in this thread. */
function open() {
  const mailbox = createMailbox({ job, rank: 0, worldSize: 4, frameBytes: 4096, window: 8 })
  return { mailbox, server: openMailboxServer(mailbox.id) }
}

/** The check of a header (mailbox.cpp): over the 76 bytes before it. */
function checkOf(header: Buffer): number {
  const mask = 2n ** 64n - 1n
  let hash = 0x9e37_79b9_7f4a_7c15n
  const words = Buffer.concat([header.subarray(0, headerBytes - 4), Buffer.alloc(4)])
  for (let at = 0; at < headerBytes; at += 8) {
    hash = ((hash ^ words.readBigUInt64LE(at)) * 0xbf58_476d_1ce4_e5b9n) & mask
    hash ^= hash >> 29n
  }
  return Number(hash >> 32n)
}

/** xorshift32: a failure can be repeated. */
function seeded(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

describe('a mailbox', () => {
  it('refuses whatever is no frame, and counts it', () => {
    const { mailbox, server } = open()
    const random = seeded(7)
    const count = rounds({ quick: 20_000, long: 1_000_000 })
    for (let i = 0; i < count; i++) {
      const message = Buffer.alloc(random(3) === 0 ? random(headerBytes) : random(4300))
      for (let at = 0; at < Math.min(message.length, 96); at++) message[at] = random(256)
      // Half of them look like frames up to some field.
      if (message.length >= headerBytes && random(2) === 0) {
        message.write('TRKF', 0, 'latin1')
        message.writeUInt16LE(1, 4)
        message.writeUInt16LE(random(9), 6)
        if (random(2) === 0) message.writeBigUInt64LE(job, 8)
      }
      server.deliver(message)
    }
    assert.equal(mailbox.refused, count)
    assert.equal(server.take(), undefined)
    server.close()
  })

  it('refuses frames of other jobs, of strangers and of itself, wrong sizes and every flipped bit of a header', () => {
    const { mailbox, server } = open()
    /** A last message of rank 1, which is answered: kind 6. */
    const goodbye = Buffer.alloc(headerBytes)
    // Found by what the mailbox itself sends, so that no layout is assumed here.
    server.sayGoodbye(1)
    const own = server.take()
    assert.ok(own !== undefined)
    assert.equal(own[0], 1)
    assert.equal(own[1].length, headerBytes)
    goodbye.set(own[1])
    server.deliver(Buffer.from(goodbye)) // of this very rank
    assert.equal(mailbox.refused, 1)

    const peer = createMailbox({ job, rank: 1, worldSize: 4, frameBytes: 4096, window: 8 })
    const peerServer = openMailboxServer(peer.id)
    peerServer.sayGoodbye(0)
    const theirs = Buffer.from(peerServer.take()?.[1] ?? [])
    assert.equal(theirs.readUInt32LE(headerBytes - 4), checkOf(theirs), 'the check is over what stands before it')
    for (let bit = 0; bit < 8 * headerBytes; bit++) {
      const damaged = Buffer.from(theirs)
      damaged[bit >> 3] = (damaged[bit >> 3] ?? 0) ^ (1 << (bit & 7))
      server.deliver(damaged)
    }
    assert.equal(mailbox.refused, 1 + 8 * headerBytes)
    server.deliver(Buffer.concat([theirs, Buffer.alloc(1)]))
    server.deliver(theirs.subarray(0, headerBytes - 1))
    assert.equal(mailbox.refused, 3 + 8 * headerBytes)
    assert.equal(server.take(), undefined, 'nothing was answered')

    server.deliver(theirs)
    assert.equal(mailbox.refused, 3 + 8 * headerBytes)
    assert.equal(server.take()?.[0], 1, 'the true one is')
    server.close()
    peerServer.close()
  })
})
