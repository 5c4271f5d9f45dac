// One rank of bench/allreduce.ts: times the paths that it is told, size by size, and reports microseconds to whoever started it. Started by
// mpirun, for bench/mpiNodes.ts, rank 0 prints them.

import process from 'node:process'
import { createGroup, type Group } from '../collectives/index.js'
import { elementBytes, type DType } from '../native/types.js'

export interface RankOrder {
  readonly dtype: DType
  readonly sizes: readonly { readonly bytes: number; readonly samples: number }[]
  readonly paths: readonly ('runner' | 'sync' | 'async')[]
}

export interface RankTimes {
  readonly path: 'runner' | 'sync' | 'async'
  readonly bytes: number
  readonly us: Float64Array
}

const isOne = (value: number | undefined, dtype: DType, sum: number): boolean => {
  if (dtype === 'f32') return value === sum
  return value === (new Uint32Array(Float32Array.of(sum).buffer)[0] ?? 0) >>> 16
}

async function time(
  group: Group,
  order: RankOrder,
  path: RankTimes['path'],
  bytes: number,
  samples: number,
): Promise<Float64Array> {
  const { dtype } = order
  const count = bytes / elementBytes[dtype]
  if (path === 'runner') {
    group.timeAllReduce(dtype, count, Math.ceil(samples / 10))
    return group.timeAllReduce(dtype, count, samples)
  }
  const tensor = group.alloc(dtype, [count])
  const input = tensor.data.slice()
  input.fill(dtype === 'f32' ? 1 : 0x3f80)
  const us = new Float64Array(samples)
  for (let i = -Math.ceil(samples / 10); i < samples; i++) {
    tensor.data.set(input)
    const start = performance.now()
    if (path === 'sync') group.allReduceSync(tensor)
    else await group.allReduce(tensor)
    const end = performance.now()
    if (i >= 0) us[i] = (end - start) * 1000
  }
  if (!tensor.data.every((value) => isOne(value, dtype, group.worldSize)))
    throw new Error('a timed allReduce gave a wrong sum')
  return us
}

/** What bench/mpi_allreduce.c prints: bytes, median, minimum, 99th percentile. */
function line({ bytes, us }: RankTimes): string {
  const sorted = us.toSorted()
  const figures = [0.5, 0, 0.99].map((share) => (sorted[Math.floor(sorted.length * share)] ?? NaN).toFixed(3))
  return `${[bytes, ...figures].join(' ')}\n`
}

async function main(order: RankOrder): Promise<void> {
  const largest = Math.max(...order.sizes.map(({ bytes }) => bytes))
  const group = await createGroup(
    order.paths.includes('runner') ? { slotBytes: Math.max(1 << 20, Math.ceil(largest / 64) * 64) } : {},
  )
  try {
    for (const path of order.paths) {
      for (const { bytes, samples } of order.sizes) {
        const us = await time(group, order, path, bytes, samples)
        const times: RankTimes = { path, bytes, us }
        if (process.send !== undefined) process.send(times)
        else if (group.rank === 0) process.stdout.write(line(times))
      }
    }
  } finally {
    await group.close()
  }
  if (process.connected) process.disconnect()
}

await main(JSON.parse(process.argv[2] ?? '') as RankOrder)
