// Random numbers without state: the number for (seed, request, position) is a function of these three, so a token's draw is the
// same at every number of ranks, in every batch and after a restart. Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3; it passes BigCrush, and its published vectors are in the test.

type Words4 = readonly [number, number, number, number]

/** High and low half of a 32 x 32 bit product. */
function multiply(a: number, b: number): readonly [high: number, low: number] {
  const aLow = a & 0xffff
  const aHigh = a >>> 16
  const bLow = b & 0xffff
  const bHigh = b >>> 16
  // The sum of the middle terms has at most 34 bits, so doubles are exact.
  const middle = aHigh * bLow + Math.floor((aLow * bLow) / 0x10000)
  const middleLow = aLow * bHigh + (middle % 0x10000)
  return [(aHigh * bHigh + Math.floor(middle / 0x10000) + Math.floor(middleLow / 0x10000)) >>> 0, Math.imul(a, b) >>> 0]
}

export function philox4x32(counter: Words4, key: readonly [number, number]): Words4 {
  let [c0, c1, c2, c3] = counter
  let [k0, k1] = key
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = multiply(0xd2511f53, c0)
    const [high1, low1] = multiply(0xcd9e8d57, c2)
    c0 = (high1 ^ c1 ^ k0) >>> 0
    c1 = low1
    c2 = (high0 ^ c3 ^ k1) >>> 0
    c3 = low0
    // The Weyl constants: the golden ratio and the square root of 3 less 1.
    k0 = (k0 + 0x9e3779b9) >>> 0
    k1 = (k1 + 0xbb67ae85) >>> 0
  }
  return [c0, c1, c2, c3]
}

/** A double in [0, 1), a multiple of 2^-53. All three are integers from 0 to 2^53 - 1. */
export function drawAt(seed: number, request: number, position: number): number {
  for (const [name, value] of Object.entries({ seed, request, position })) {
    if (!Number.isSafeInteger(value) || value < 0)
      throw new RangeError(`${name} is ${value}; allowed is an integer from 0 to 2^53 - 1`)
  }
  const [a, b] = philox4x32([...halves(position), ...halves(request)], halves(seed))
  return ((a >>> 5) * 2 ** 26 + (b >>> 6)) / 2 ** 53
}

const halves = (value: number): readonly [low: number, high: number] => [value >>> 0, Math.floor(value / 2 ** 32)]
