// What bench/tune.ts times on every rank: the choices of a case in turns, in the same processes.

import { createGroup, type AllReduceAlgorithm, type Group, type MemoryKind } from '../collectives/index.js'

/** What can be chosen for one size: an algorithm, or a size of chunks. */
export interface TuneCase {
  readonly memory: MemoryKind
  readonly dtype: 'f32' | 'bf16'
  readonly bytes: number
  /** Calls of each turn. */
  readonly samples: number
  readonly choices: readonly { readonly algorithm: AllReduceAlgorithm; readonly chunkBytes?: number }[]
}

export interface TuneTimes {
  /** Index of the case; microseconds of each of its choices. */
  readonly index: number
  readonly us: readonly number[]
  /** What the defaults choose. */
  readonly algorithm: string
  readonly chunkBytes: number
}

const turns = 5

export const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[values.length >> 1] ?? NaN

function time({ memory, dtype, bytes, samples, choices }: TuneCase, groups: ReadonlyMap<number, Group>): number[] {
  const count = bytes / (dtype === 'f32' ? 4 : 2)
  const make = dtype === 'f32' ? () => new Float32Array(count) : () => new Uint16Array(count)
  const worked = choices.map(({ algorithm, chunkBytes = 0 }) => {
    const group = groups.get(chunkBytes)
    if (group === undefined) throw new Error(`no group has chunks of ${chunkBytes}`)
    const data = memory === 'tensor' ? group.alloc(dtype, [count]) : make()
    return { group, algorithm, data, view: 'group' in data ? data.data : data, us: [] as number[] }
  })
  const bitsOf = (value: number): number =>
    dtype === 'f32' ? value : (new Uint32Array(Float32Array.of(value).buffer)[0] ?? 0) >>> 16
  const input = make().fill(bitsOf(1))
  for (let turn = 0; turn < turns; turn++) {
    for (const { group, algorithm, data, view, us } of worked) {
      const sum = bitsOf(group.worldSize)
      for (let i = -Math.ceil(samples / 8); i < samples; i++) {
        view.set(input)
        const start = performance.now()
        group.allReduceSync(data, { algorithm, dtype })
        if (i >= 0) us.push((performance.now() - start) * 1000)
      }
      if (!view.every((value) => value === sum)) throw new Error('a timed allReduce gave a wrong sum')
    }
  }
  return worked.map(({ us }) => median(us))
}

/** On every rank alike. @param defaults a group that follows the defaults */
export async function timeCases(
  cases: readonly TuneCase[],
  defaults: Group,
  onTimes: (times: TuneTimes) => void,
): Promise<void> {
  const groups = new Map([[0, defaults]])
  try {
    for (const { chunkBytes } of cases.flatMap(({ choices }) => choices)) {
      if (chunkBytes !== undefined && !groups.has(chunkBytes))
        groups.set(chunkBytes, await createGroup({ algorithms: 'default', chunkBytes }))
    }
    for (const [index, one] of cases.entries()) {
      const us = time(one, groups)
      const { algorithm, chunkBytes } = defaults.explain('allReduce', one.bytes, one.memory)
      onTimes({ index, us, algorithm, chunkBytes })
    }
  } finally {
    for (const group of groups.values()) if (group !== defaults) await group.close()
  }
}
