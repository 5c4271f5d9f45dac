// One rank of bench/tune.ts: times what it is told, the choices of a case in turns, and reports medians to whoever started it.

import process from 'node:process'
import { createGroup, type AllReduceAlgorithm, type Group, type MemoryKind } from '../collectives/index.js'

/** What can be chosen for one size: an algorithm, or a size of chunks. */
export interface TuneCase {
  readonly memory: MemoryKind
  readonly bytes: number
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

const median = (values: number[]): number => values.sort((a, b) => a - b)[values.length >> 1] ?? NaN

function time({ memory, bytes, choices }: TuneCase, groups: ReadonlyMap<number | undefined, Group>): number[] {
  const samples = Math.max(8, Math.min(800, Math.floor((16 << 20) / bytes)))
  const worked = choices.map(({ algorithm, chunkBytes }) => {
    const group = groups.get(chunkBytes)
    if (group === undefined) throw new Error(`no group has chunks of ${String(chunkBytes)}`)
    const data = memory === 'tensor' ? group.alloc('f32', [bytes / 4]) : new Float32Array(bytes / 4)
    const view = data instanceof Float32Array ? data : data.data
    return { group, algorithm, data, view, us: [] as number[] }
  })
  const input = new Float32Array(bytes / 4).fill(1)
  for (let turn = 0; turn < turns; turn++) {
    for (const { group, algorithm, data, view, us } of worked) {
      for (let i = -Math.ceil(samples / 8); i < samples; i++) {
        view.set(input)
        const start = performance.now()
        group.allReduceSync(data, { algorithm })
        if (i >= 0) us.push((performance.now() - start) * 1000)
      }
      if (!view.every((value) => value === group.worldSize)) throw new Error('a timed allReduce gave a wrong sum')
    }
  }
  return worked.map(({ us }) => median(us))
}

async function main(cases: readonly TuneCase[]): Promise<void> {
  const groups = new Map<number | undefined, Group>()
  const defaults = await createGroup({ algorithms: 'default' })
  groups.set(undefined, defaults)
  try {
    for (const { chunkBytes } of cases.flatMap(({ choices }) => choices)) {
      if (!groups.has(chunkBytes))
        groups.set(
          chunkBytes,
          await createGroup({ algorithms: 'default', ...(chunkBytes === undefined ? {} : { chunkBytes }) }),
        )
    }
    for (const [index, one] of cases.entries()) {
      const us = time(one, groups)
      const { algorithm, chunkBytes } = defaults.explain('allReduce', one.bytes, one.memory)
      const times: TuneTimes = { index, us, algorithm, chunkBytes }
      process.send?.(times)
    }
  } finally {
    for (const group of groups.values()) await group.close()
  }
  process.disconnect()
}

await main(JSON.parse(process.argv[2] ?? '') as TuneCase[])
