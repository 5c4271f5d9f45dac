// The words of a step against the layout that native/runner/step.h describes, number by number.

import assert from 'node:assert/strict'
import { decodeBytes, encodeBytes, encodeShutdown, encodeStep, logitFlags } from '../../tp/step.js'

const magic = 0x544b5231

describe('the words of a step', () => {
  it('stand in the order of the native header', () => {
    const words = encodeStep({
      runs: [
        { slot: 3, position0: 0, isNew: true, ids: [10, 11, 12] },
        { slot: 1, position0: 40, isNew: false, ids: [20] },
      ],
      rows: [
        {
          token: 3,
          slot: 1,
          flags: logitFlags.wantLogits | logitFlags.penalty,
          candidates: 7,
          topK: 6,
          temperature: 0.5,
          penalty: 1.5,
          topP: 0.25,
        },
      ],
      blockDeltas: [{ slot: 3, index: 0, block: 9 }],
      frequencySets: [{ slot: 1, frequencies: Float64Array.of(1, 0.1) }],
      ahead: 6,
      stopIds: [2, 77],
    })
    const frequencies = new Int32Array(Float64Array.of(1, 0.1).buffer)
    const floats = new Int32Array(Float32Array.of(0.5, 1.5, 0.25).buffer)
    assert.deepEqual(
      [...words],
      [
        ...[magic, 1, words.length, 4, 2, 1, 1, 1, 6, 2],
        ...[3, 3, 0, 1],
        ...[1, 1, 40, 0],
        ...[10, 11, 12, 20],
        ...[3, 0, 9],
        ...[1, ...frequencies],
        ...[3, 1, 5, 7, 6, ...floats],
        ...[2, 77],
      ],
    )
  })

  it('carry bytes of any length, and a shutdown', () => {
    assert.deepEqual([...encodeShutdown()], [magic, 3])
    for (const length of [0, 1, 3, 4, 5, 4000]) {
      const bytes = Uint8Array.from({ length }, (_, i) => (i * 7 + 1) % 256)
      const words = encodeBytes(bytes)
      assert.deepEqual([...words.subarray(0, 2)], [magic, 2])
      assert.deepEqual([...decodeBytes(words.slice(2))], [...bytes])
      // A view into something longer, as a callback may get it.
      assert.deepEqual([...decodeBytes(words.subarray(2))], [...bytes])
    }
  })
})
