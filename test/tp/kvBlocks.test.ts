// The book of KV blocks: what is reserved, taken and given back never exceeds, and never loses, what there is.

import assert from 'node:assert/strict'
import fc from 'fast-check'
import { KvBlocks, blocksFor, type KvSequence } from '../../tp/kvBlocks.js'

describe('KV blocks', () => {
  it('hold 32 tokens each', () => {
    assert.deepEqual([0, 1, 32, 33, 64, 65].map(blocksFor), [0, 1, 1, 2, 2, 3])
  })

  it('are reserved whole, taken as the sequence grows, and all come back', () => {
    const blocks = new KvBlocks(4)
    const first = blocks.reserve(70)
    assert.ok(first)
    assert.equal(blocks.available, 1)
    assert.equal(blocks.reserve(33), null, 'a refusal takes nothing')
    assert.equal(blocks.available, 1)
    assert.deepEqual(blocks.grow(first, 1), [{ index: 0, block: 0 }])
    assert.deepEqual(blocks.grow(first, 32), [])
    assert.deepEqual(blocks.grow(first, 70), [
      { index: 1, block: 1 },
      { index: 2, block: 2 },
    ])
    assert.throws(() => blocks.grow(first, 97), RangeError)
    blocks.release(first)
    assert.equal(blocks.available, 4)
    blocks.release(first)
    assert.equal(blocks.available, 4, 'a second release gives nothing back')
    assert.ok(blocks.reserve(128))
  })

  it('are neighbours where there are enough of them: the shortest run that holds all, else the longest first', () => {
    const blocks = new KvBlocks(20)
    const sequences = [3, 2, 6, 1, 4, 2].map((count) => blocks.reserve(32 * count) ?? assert.fail('no room'))
    assert.deepEqual(sequences[2]?.blocks, [5, 6, 7, 8, 9, 10])
    for (const [index, sequence] of sequences.entries()) if (index % 2 === 0) blocks.release(sequence)
    // free: 0-2, 5-10, 12-15, 18-19
    assert.deepEqual(blocks.reserve(32 * 4)?.blocks, [12, 13, 14, 15])
    assert.deepEqual(blocks.reserve(32 * 9)?.blocks, [5, 6, 7, 8, 9, 10, 0, 1, 2])
    assert.deepEqual(blocks.reserve(32)?.blocks, [18])
    assert.equal(blocks.available, 1)
    for (const sequence of sequences) blocks.release(sequence)
    assert.equal(blocks.available, 6)
  })

  it('never belong to two sequences, whatever comes in whatever order', () => {
    const action = fc.record({
      kind: fc.constantFrom('reserve', 'grow', 'release'),
      which: fc.nat(5),
      tokens: fc.nat(300),
    })
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 12 }), fc.array(action, { maxLength: 60 }), (count, actions) => {
        const blocks = new KvBlocks(count)
        const held = new Map<number, { sequence: KvSequence; room: number }>()
        for (const { kind, which, tokens } of actions) {
          const mine = held.get(which)
          if (kind === 'reserve' && !mine) {
            const fits = blocksFor(tokens) <= blocks.available
            const sequence = blocks.reserve(tokens)
            assert.equal(sequence !== null, fits)
            if (sequence) held.set(which, { sequence, room: tokens })
          } else if (kind === 'grow' && mine) {
            blocks.grow(mine.sequence, Math.min(tokens, mine.room))
          } else if (kind === 'release' && mine) {
            blocks.release(mine.sequence)
            held.delete(which)
          }
          const all = [...held.values()].flatMap(({ sequence }) => sequence.blocks)
          assert.ok([...held.values()].every(({ sequence }) => sequence.reached <= sequence.blocks.length))
          assert.equal(new Set(all).size, all.length)
          assert.ok(all.every((block) => block >= 0 && block < count))
          const reserved = [...held.values()].reduce((sum, { room }) => sum + blocksFor(room), 0)
          assert.equal(blocks.available, count - reserved)
        }
        for (const { sequence } of held.values()) blocks.release(sequence)
        assert.equal(blocks.available, count)
      }),
    )
  })
})
