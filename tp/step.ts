// The words of one step, as rank 0 broadcasts them: the writer of the layout that native/runner/step.h describes and checks.

const magic = 0x544b5231
const kinds = { step: 1, bytes: 2, shutdown: 3 } as const
const headerWords = 10

/** End tokens that a step which decodes ahead can carry; native/runner/step.h says the same. */
export const maxStopIds = 64

export const logitFlags = { wantLogits: 1, wholeRow: 2, penalty: 4 } as const

/** Consecutive tokens of one sequence. */
export interface StepRun {
  readonly slot: number
  readonly position0: number
  readonly isNew: boolean
  readonly ids: readonly number[]
}

/** A row whose next token is wanted; `token` counts rows of the step. */
export interface StepRow {
  readonly token: number
  readonly slot: number
  readonly flags: number
  readonly candidates: number
  readonly topK: number
  /** 0: greedy. */
  readonly temperature: number
  readonly penalty: number
  readonly topP: number
}

export interface StepInput {
  readonly runs: readonly StepRun[]
  readonly rows: readonly StepRow[]
  readonly blockDeltas: readonly { readonly slot: number; readonly index: number; readonly block: number }[]
  readonly frequencySets: readonly { readonly slot: number; readonly frequencies: Float64Array }[]
  /** Further steps that the ranks may do by themselves, feeding back what they choose; only where every run is one greedy token. */
  readonly ahead: number
  /** Ids that end decoding ahead, at most maxStopIds. */
  readonly stopIds: readonly number[]
}

const scratchFloat = new Float32Array(1)
const scratchWord = new Int32Array(scratchFloat.buffer)
function floatBits(value: number): number {
  scratchFloat[0] = value
  return scratchWord[0] ?? 0
}

export function encodeStep(input: StepInput): Int32Array {
  const tokens = input.runs.reduce((sum, run) => sum + run.ids.length, 0)
  const setWords = input.frequencySets.reduce((sum, set) => sum + 1 + 2 * set.frequencies.length, 0)
  const words = new Int32Array(
    headerWords +
      4 * input.runs.length +
      tokens +
      3 * input.blockDeltas.length +
      setWords +
      8 * input.rows.length +
      input.stopIds.length,
  )
  let at = 0
  const put = (...values: number[]): void => {
    for (const value of values) words[at++] = value
  }
  put(magic, kinds.step, words.length, tokens)
  put(input.runs.length, input.rows.length, input.blockDeltas.length, input.frequencySets.length)
  put(input.ahead, input.stopIds.length)
  for (const run of input.runs) put(run.slot, run.ids.length, run.position0, run.isNew ? 1 : 0)
  for (const run of input.runs) {
    words.set(run.ids, at)
    at += run.ids.length
  }
  for (const delta of input.blockDeltas) put(delta.slot, delta.index, delta.block)
  for (const set of input.frequencySets) {
    put(set.slot)
    // Copied by bytes: a Float64Array view would need an 8-byte boundary.
    new Uint8Array(words.buffer, at * 4, set.frequencies.byteLength).set(
      new Uint8Array(set.frequencies.buffer, set.frequencies.byteOffset, set.frequencies.byteLength),
    )
    at += 2 * set.frequencies.length
  }
  for (const row of input.rows) {
    put(row.token, row.slot, row.flags, row.candidates, row.topK)
    put(floatBits(row.temperature), floatBits(row.penalty), floatBits(row.topP))
  }
  put(...input.stopIds)
  return words
}

export function encodeShutdown(): Int32Array {
  return Int32Array.of(magic, kinds.shutdown)
}

/** An opaque message from rank 0's JavaScript to the others': length in bytes, then the bytes, padded to words. */
export function encodeBytes(bytes: Uint8Array): Int32Array {
  const words = new Int32Array(3 + Math.ceil(bytes.length / 4))
  words.set([magic, kinds.bytes, bytes.length])
  new Uint8Array(words.buffer, 12).set(bytes)
  return words
}

/** Of the words behind the kind, as Runner.serve() delivers them. */
export function decodeBytes(words: Int32Array): Uint8Array {
  return new Uint8Array(words.buffer, words.byteOffset + 4, words[0] ?? 0)
}
