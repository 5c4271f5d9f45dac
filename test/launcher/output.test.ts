// How the output of several ranks becomes one stream: whole lines, in pieces of any size.

import assert from 'node:assert/strict'
import { PassThrough } from 'node:stream'
import * as fc from 'fast-check'
import { OutputMux } from '../../launcher/output.js'

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

function collect(isTagged: boolean, isTerminal = false) {
  const target = new PassThrough({ highWaterMark: 1 << 24 })
  let text = ''
  target.setEncoding('utf8').on('data', (part: string) => (text += part))
  const mux = new OutputMux(target, { isTagged, isTerminal })
  const sources = [0, 1, 2].map((rank) => {
    const stream = new PassThrough()
    mux.add(rank, stream)
    return stream
  })
  const say = async (rank: number, part: string): Promise<void> => {
    sources[rank]?.write(part)
    await turn()
  }
  const end = async (rank: number): Promise<void> => {
    sources[rank]?.end()
    await turn()
    await turn()
  }
  return { mux, say, end, text: () => text }
}

describe('tp-launch: joined output', () => {
  it('lets others wait for the end of an open line', async () => {
    const { say, text } = collect(false)
    await say(0, 'one ')
    await say(1, 'second\nthird')
    assert.equal(text(), 'one ')
    await say(0, 'line\n')
    assert.equal(text(), 'one line\nsecond\nthird')
  })

  it('closes the open line of a rank that has ended, and only then', async () => {
    const { say, end, text } = collect(false)
    await say(0, 'open')
    await say(1, 'last words')
    await end(1)
    assert.equal(text(), 'open')
    await end(0)
    assert.equal(text(), 'open\nlast words')
  })

  it('keeps the bytes of a single writer', async () => {
    const { mux, say, end, text } = collect(false)
    await say(2, 'a\n\nb')
    await end(2)
    mux.end()
    assert.equal(text(), 'a\n\nb')
  })

  it('lets an idle line yield on a terminal', async () => {
    const { say, text } = collect(false, true)
    await say(0, 'working ...')
    await say(1, 'warning\n')
    assert.equal(text(), 'working ...')
    await new Promise((resolve) => setTimeout(resolve, 400))
    assert.equal(text(), 'working ...\nwarning\n')
  })

  it('does not hold lines back for ever, nor an endless one', async () => {
    const { say, text } = collect(false)
    await say(0, 'open')
    await say(1, `${'x'.repeat(1 << 20)}y`)
    assert.match(text(), /^open\nx+y$/)
    const tagged = collect(true)
    await tagged.say(1, `${'x'.repeat(1 << 20)}y`)
    await turn()
    assert.match(tagged.text(), /^\[1\] x+y\n$/)
  })

  it('remembers the last lines of each rank', async () => {
    const { mux, say } = collect(true)
    for (let i = 0; i < 30; i++) await say(1, `line ${i}\n`)
    assert.deepEqual(mux.tail(1).at(-1), 'line 29')
    assert.equal(mux.tail(1).length, 12)
    assert.deepEqual(mux.tail(0), [])
  })

  it('writes every line of every rank whole and in its order, whatever the pieces', async () => {
    const piece = fc.tuple(fc.integer({ min: 0, max: 2 }), fc.constantFrom('a', 'bc', '\n', 'd\n', 'e\nf', '\n\n'))
    await fc.assert(
      fc.asyncProperty(fc.array(piece, { maxLength: 40 }), fc.boolean(), async (pieces, isTagged) => {
        const { mux, say, end, text } = collect(isTagged)
        const said = ['', '', '']
        for (const [rank, part] of pieces) {
          const marked = part.replaceAll(/[a-f]+/g, (letters) => `${letters}${rank}`)
          said[rank] = (said[rank] ?? '') + marked
          await say(rank, marked)
        }
        for (const rank of [0, 1, 2]) await end(rank)
        mux.end()
        const lines = text().replace(/\n$/, '').split('\n')
        said.forEach((all, rank) => {
          const expected = all
            .replace(/\n$/, '')
            .split('\n')
            .filter((line) => line !== '')
          const mine = isTagged
            ? lines
                .filter((line) => line.startsWith(`[${rank}] `))
                .map((line) => line.slice(4))
                .filter((line) => line !== '')
            : lines.filter((line) => line.includes(String(rank)))
          assert.deepEqual(mine, expected)
        })
      }),
      { numRuns: 200 },
    )
  })
})
