import assert from 'node:assert/strict'

import fc from 'fast-check'

import { drawAt, philox4x32 } from '../../tp/random.js'
import {
  chooseToken,
  isDecided,
  penalise,
  resolveSampling,
  type RowCandidates,
  type SamplingDefaults,
  type SamplingParams,
  wholeRow,
} from '../../tp/sampling.js'

const defaults: SamplingDefaults = { doSample: false, temperature: 1, topK: 50, topP: 1, repetitionPenalty: 1 }
const params = (changes: Partial<SamplingParams>): SamplingParams => ({
  doSample: true,
  temperature: 1,
  topK: 0,
  topP: 1,
  repetitionPenalty: 1,
  seed: 0,
  ...changes,
})

/**
 * The definitions of transformers' logits processors, step by step over whole rows in the order of the vocabulary: scores divided
 * by the temperature; scores below the k-th largest to -Infinity; ascending cumulative probabilities at most 1 - topP to
 * -Infinity, the best kept; softmax.
 */
function referenceProbabilities(logits: readonly number[], { temperature, topK, topP }: SamplingParams): number[] {
  let scores = logits.map((logit) => logit / temperature)
  if (topK > 0) {
    const threshold = [...scores].sort((a, b) => b - a)[Math.min(topK, scores.length) - 1] ?? NaN
    scores = scores.map((score) => (score < threshold ? -Infinity : score))
  }
  if (topP < 1) {
    const probabilities = softmax(scores)
    // Ascending; among equals the lower id is the better one.
    const ascending = scores.map((_, id) => id).sort((a, b) => (scores[a] ?? 0) - (scores[b] ?? 0) || b - a || 0)
    let cumulative = 0
    for (const id of ascending.slice(0, -1)) {
      cumulative += probabilities[id] ?? 0
      if (cumulative <= 1 - topP) scores[id] = -Infinity
    }
  }
  return softmax(scores)
}

function softmax(scores: readonly number[]): number[] {
  const max = Math.max(...scores)
  const weights = scores.map((score) => Math.exp(score - max))
  const sum = weights.reduce((total, weight) => total + weight, 0)
  return weights.map((weight) => weight / sum)
}

/** The first `count` of a whole row, with the statistics of all of it. */
const bestOf = (row: RowCandidates, count: number): RowCandidates => ({
  ...row,
  ids: row.ids.slice(0, count),
  values: row.values.slice(0, count),
  complete: count === row.ids.length,
})

/** Values on a coarse grid, so that ties are common; some are banned. */
const anyLogits = fc.array(fc.oneof({ weight: 9, arbitrary: fc.integer({ min: -24, max: 24 }).map((n) => n / 8) }, { weight: 1, arbitrary: fc.constant(-Infinity) }), {
  minLength: 1,
  maxLength: 40,
}).filter((logits) => logits.some((logit) => logit > -Infinity)) // prettier-ignore
const anyParams = fc
  .record({
    temperature: fc.constantFrom(0.3, 0.7, 1, 1.5, 4),
    topK: fc.constantFrom(0, 0, 1, 2, 3, 5, 10, 39, 50),
    // No multiples of simple probabilities: at an exact boundary rounding would decide, here and in the reference.
    topP: fc.constantFrom(1, 1, 0.0137, 0.317, 0.5031, 0.9071, 0.99013),
  })
  .map(params)
const anyDraw = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })

describe('the choice of a token', () => {
  it('has the probabilities that the definitions of transformers give', function () {
    this.timeout(20_000)
    let filtered = 0
    fc.assert(
      fc.property(anyLogits, anyParams, (logits, sampling) => {
        const row = wholeRow(Float32Array.from(logits), sampling.temperature)
        const expected = referenceProbabilities(logits, sampling)
        if (expected.some((p, id) => p === 0 && (logits[id] ?? 0) > -Infinity)) filtered++
        // The chosen token is a step function of the draw, best token first: look on both sides of each expected step.
        let before = 0
        for (const id of row.ids) {
          const probability = expected[id] ?? 0
          if (probability > 1e-9) {
            for (const part of [1e-6, 0.5, 1 - 1e-6]) {
              assert.equal(chooseToken(row, sampling, before + part * probability).id, id)
            }
          }
          before += probability
        }
        assert.ok(Math.abs(before - 1) < 1e-9)
      }),
      { numRuns: 2000, seed: 11 },
    )
    assert.ok(filtered > 500, `${filtered} rows of 2000 had something cut off`)
  })

  it('is the same from candidates as from the whole row whenever they decide', function () {
    this.timeout(20_000)
    const decided = { greedy: 0, topK: 0, topP: 0, draw: 0 }
    let undecided = 0
    const anySampling = fc.oneof(
      { weight: 4, arbitrary: anyParams },
      { weight: 1, arbitrary: fc.constant(params({ doSample: false })) },
    )
    fc.assert(
      fc.property(anyLogits, anySampling, anyDraw, fc.nat(39), (logits, sampling, draw, some) => {
        const row = wholeRow(Float32Array.from(logits), sampling.temperature)
        const best = bestOf(row, 1 + (some % logits.length))
        if (!isDecided(best, sampling, draw)) {
          undecided++
          assert.throws(() => chooseToken(best, sampling, draw), { code: 'ERR_INTERNAL' })
          return
        }
        if (!best.complete)
          decided[!sampling.doSample ? 'greedy' : sampling.topK > 0 ? 'topK' : sampling.topP < 1 ? 'topP' : 'draw']++
        assert.deepEqual(chooseToken(best, sampling, draw), chooseToken(row, sampling, draw))
      }),
      { numRuns: 5000, seed: 12 },
    )
    for (const [kind, count] of Object.entries({ ...decided, undecided })) assert.ok(count > 100, `${kind}: ${count}`)
  })

  it('needs one candidate below the k-th value for top-k, since equals of the k-th stay', () => {
    const row = wholeRow(Float32Array.of(5, 3, 3, 3, 1), 1)
    const sampling = params({ topK: 2 })
    assert.deepEqual(
      [1, 2, 3, 4, 5].map((count) => isDecided(bestOf(row, count), sampling)),
      [false, false, false, false, true],
    )
    assert.equal(chooseToken(row, sampling, 0.999999).id, 3)
  })

  it('needs the mass of top-p in the candidates, and the best alone where it has that mass', () => {
    const row = wholeRow(Float32Array.from([0.6, 0.3, 0.1], Math.log), 1)
    assert.deepEqual(
      [1, 2, 3].map((count) => isDecided(bestOf(row, count), params({ topP: 0.7 }))),
      [false, true, true],
    )
    assert.equal(isDecided(bestOf(row, 1), params({ topP: 0.55 })), true)
    assert.equal(chooseToken(bestOf(row, 1), params({ topP: 0.55 }), 0.999).id, 0)
    assert.equal(isDecided(bestOf(row, 2), params({})), false)
    assert.equal(isDecided(bestOf(row, 2), params({}), 0.89), true)
    assert.equal(isDecided(bestOf(row, 2), params({}), 0.91), false)
    assert.equal(isDecided(bestOf(row, 0), params({ doSample: false })), false)
  })

  it('is the lowest id among equals when greedy, for zeros of both signs, too', () => {
    const greedy = params({ doSample: false })
    assert.equal(chooseToken(wholeRow(Float32Array.of(1, 7, 3, 7, 7), 1), greedy, 0).id, 1)
    assert.equal(chooseToken(wholeRow(Float32Array.of(-1, -0, 0, -0), 1), greedy, 0.9).id, 1)
    assert.equal(chooseToken(wholeRow(Float32Array.of(-8), 1), greedy, 0).id, 0)
  })

  it('tells the log-probability in the whole distribution after temperature', () => {
    const logits = [1, 2, 3, 4]
    const sampling = params({ temperature: 0.5, topK: 2 })
    const { id, logProb } = chooseToken(wholeRow(Float32Array.from(logits), 0.5), sampling, 0.99)
    assert.equal(id, 2)
    const expected = Math.log(softmax(logits.map((logit) => logit / 0.5))[2] ?? NaN)
    assert.ok(Math.abs(logProb - expected) < 1e-12)
  })

  it('never draws a token of probability 0', () => {
    const row = wholeRow(Float32Array.of(-Infinity, 0, -Infinity, -2000), 1)
    for (const draw of [0, 0.5, 1 - 2 ** -53]) assert.equal(chooseToken(row, params({}), draw).id, 1)
  })

  it('sorts a row by value, then id', function () {
    this.timeout(20_000)
    fc.assert(
      fc.property(fc.array(fc.float({ noNaN: true }), { minLength: 1, maxLength: 60 }), (values) => {
        const expected = values
          .map((_, id) => id)
          .sort((a, b) => {
            const [x = 0, y = 0] = [values[a], values[b]]
            return x === y ? a - b : y - x
          })
        assert.deepEqual([...wholeRow(Float32Array.from(values), 1).ids], expected)
      }),
      { numRuns: 1000, seed: 13 },
    )
  })

  it('sorts rows up to the largest vocabulary that a configuration may have, and no larger ones', () => {
    const row = wholeRow(new Float32Array(2 ** 21), 1)
    assert.deepEqual([row.ids[0], row.ids.at(-1), row.sumExp], [0, 2 ** 21 - 1, 2 ** 21])
    assert.throws(() => wholeRow(new Float32Array(2 ** 21 + 1), 1), RangeError)
  })

  it('refuses NaN, infinities and rows in which everything is banned', () => {
    const bad = { name: 'InferenceError', code: 'ERR_BAD_LOGITS' }
    for (const logits of [[NaN, 1], [1, NaN], [Infinity, 1], [-Infinity, -Infinity], []]) {
      for (const sampling of [params({}), params({ doSample: false }), params({ topK: 1 }), params({ topP: 0.5 })]) {
        assert.throws(() => chooseToken(wholeRow(Float32Array.from(logits), 1), sampling, 0.5), bad, String(logits))
      }
    }
    const row = wholeRow(Float32Array.of(1, 2), 1)
    assert.throws(() => chooseToken({ ...row, sumExp: NaN }, params({}), 0), bad)
    assert.throws(() => chooseToken({ ...row, values: row.values.slice(1) }, params({}), 0), bad)
    for (const draw of [1, -0.1, NaN])
      assert.throws(() => chooseToken(row, params({}), draw), { code: 'ERR_INVALID_OPTION' })
  })

  it('follows the distribution: chi-square of 200,000 draws with a fixed seed', function () {
    this.timeout(20_000)
    const logits = [2, 1.5, 1.5, 0.3, 0, -0.2, -1, -1.7, -3, -9]
    for (const sampling of [
      params({}),
      params({ temperature: 0.7, topK: 6 }),
      params({ temperature: 1.3, topP: 0.83 }),
    ]) {
      const row = wholeRow(Float32Array.from(logits), sampling.temperature)
      const expected = referenceProbabilities([...Float32Array.from(logits)], sampling)
      const counts = logits.map(() => 0)
      const draws = 200_000
      for (let position = 0; position < draws; position++) {
        const { id } = chooseToken(row, sampling, drawAt(20260101, 7, position))
        counts[id] = (counts[id] ?? 0) + 1
      }
      let chiSquare = 0
      let degrees = -1
      counts.forEach((count, id) => {
        const mean = draws * (expected[id] ?? 0)
        if (mean === 0) {
          assert.equal(count, 0)
          return
        }
        chiSquare += (count - mean) ** 2 / mean
        degrees++
      })
      // Mean: degrees; standard deviation: sqrt(2 degrees). Four of them leave out less than one seed in a thousand.
      assert.ok(chiSquare < degrees + 4 * Math.sqrt(2 * degrees), `${chiSquare} with ${degrees} degrees of freedom`)
      assert.ok(degrees >= 3)
    }
  })
})

describe('the repetition penalty', () => {
  it('moves every id of the sequence away from being chosen, once, by the sign of its score', () => {
    const logits = Float32Array.of(2, -2, 4, 0, 1)
    penalise(logits, [0, 1, 0, 3, 0], 2)
    assert.deepEqual([...logits], [1, -4, 4, 0, 1])
    penalise(logits, [0, 1, 2], 1)
    assert.deepEqual([...logits], [1, -4, 4, 0, 1])
    penalise(logits, [2], 0.5)
    assert.deepEqual([...logits], [1, -4, 8, 0, 1])
  })

  it('refuses ids outside the vocabulary', () => {
    for (const id of [5, -1, 0.5]) {
      assert.throws(() => penalise(new Float32Array(5), [id], 1.1), { code: 'ERR_TOKEN_OUT_OF_RANGE' })
    }
  })
})

describe('random numbers', () => {
  it('are those that the authors of Philox published', () => {
    const hex = (words: readonly number[]): string => words.map((word) => word.toString(16).padStart(8, '0')).join(' ')
    const ones = 0xffffffff
    assert.equal(hex(philox4x32([0, 0, 0, 0], [0, 0])), '6627e8d5 e169c58d bc57ac4c 9b00dbd8')
    assert.equal(hex(philox4x32([ones, ones, ones, ones], [ones, ones])), '408f276d 41c83b0e a20bc7c6 6d5451fd')
    const pi = philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])
    assert.equal(hex(pi), 'd16cfe09 94fdcceb 5001e420 24126ea1')
  })

  it('lie in [0, 1), depend on each of seed, request and position, and on nothing else', () => {
    const large = 2 ** 53 - 1
    const keys = [0, 1, 2, 2 ** 31, 2 ** 32, 2 ** 32 + 1, large]
    const draws = keys.flatMap((seed) =>
      keys.flatMap((request) => keys.map((position) => drawAt(seed, request, position))),
    )
    assert.equal(new Set(draws).size, keys.length ** 3)
    assert.ok(draws.every((draw) => draw >= 0 && draw < 1))
    assert.equal(drawAt(1, 2, 3), drawAt(1, 2, 3))
  })

  it('refuse keys that are no counts', () => {
    for (const wrong of [-1, 0.5, 2 ** 53, NaN]) {
      assert.throws(() => drawAt(wrong, 0, 0), RangeError)
      assert.throws(() => drawAt(0, wrong, 0), RangeError)
      assert.throws(() => drawAt(0, 0, wrong), RangeError)
    }
  })
})

describe('sampling options', () => {
  it('come from the request, else from the model', () => {
    const model = { doSample: true, temperature: 0.6, topK: 40, topP: 0.9, repetitionPenalty: 1.1 }
    assert.deepEqual(resolveSampling({ seed: 3 }, model), { ...model, seed: 3 })
    assert.deepEqual(resolveSampling({ seed: 3, topK: 0, temperature: 2 }, model), {
      ...model,
      topK: 0,
      temperature: 2,
      seed: 3,
    })
  })

  it('are greedy in one form only: by the model, by doSample false, by temperature 0', () => {
    const greedy = { doSample: false, temperature: 1, topK: 0, topP: 1, repetitionPenalty: 1, seed: 9 }
    assert.deepEqual(resolveSampling({ seed: 9 }, defaults), greedy)
    assert.deepEqual(resolveSampling({ seed: 9, temperature: 0 }, { ...defaults, doSample: true }), greedy)
    assert.deepEqual(resolveSampling({ seed: 9, doSample: true, temperature: 0 }, defaults), greedy)
    assert.deepEqual(resolveSampling({ seed: 9, doSample: false, temperature: 0.7, topP: 0.5 }, defaults), greedy)
    assert.equal(resolveSampling({ repetitionPenalty: 1.2 }, defaults).repetitionPenalty, 1.2)
  })

  it('ask for sampling where they say how to sample', () => {
    assert.equal(resolveSampling({ temperature: 0.7 }, defaults).doSample, true)
    assert.equal(resolveSampling({ topK: 5 }, defaults).doSample, true)
    assert.equal(resolveSampling({ topP: 0.5 }, defaults).doSample, true)
    assert.equal(resolveSampling({ repetitionPenalty: 2, seed: 1 }, defaults).doSample, false)
  })

  it('get a seed when they have none, and not always the same', () => {
    const seeds = new Set(Array.from({ length: 8 }, () => resolveSampling({}, defaults).seed))
    assert.ok(seeds.size > 1)
    assert.ok([...seeds].every((seed) => Number.isSafeInteger(seed) && seed >= 0))
  })

  const wrong: readonly (readonly [string, unknown])[] = [
    ['temperature', -1], ['temperature', NaN], ['temperature', Infinity], ['temperature', '1'], ['temperature', 1e-5], ['temperature', 101],
    ['topK', -1], ['topK', 2.5], ['topK', 2 ** 25], ['topP', 0], ['topP', 1.01], ['topP', NaN],
    ['repetitionPenalty', 0], ['repetitionPenalty', -2], ['repetitionPenalty', 1000],
    ['seed', -1], ['seed', 0.5], ['seed', 2 ** 53], ['doSample', 1], ['top_k', 5], ['__proto__x', 1],
  ] // prettier-ignore
  for (const [option, value] of wrong) {
    it(`refuse ${option}: ${String(value)} by name`, () => {
      const expected = { code: 'ERR_INVALID_OPTION', message: new RegExp(option), fields: { option, value } }
      assert.throws(() => resolveSampling({ [option]: value }, defaults), expected)
    })
  }

  it('refuse what is no object', () => {
    for (const value of [null, 7, 'greedy']) {
      assert.throws(() => Reflect.apply(resolveSampling, undefined, [value, defaults]), { code: 'ERR_INVALID_OPTION' })
    }
  })
})
