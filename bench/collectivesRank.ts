// One rank of a benchmark: calls one collective again and again, size by size and path by path. Rank 0 reports how long each call
// took to whoever started it (bench/collectives.ts, bench/network.ts), or, started by mpirun for bench/mpiNodes.ts, prints it. mpi_collectives.c does the same with an MPI.

import process from 'node:process'
import { createGroup, type Group } from '../collectives/index.js'
import { elementBytes } from '../native/types.js'
import { clockOffset } from './clock.js'
import type { Path, RankOrder, RankTimes } from './collectives.js'

type Floats = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>

/** Small integers: exact in bf16, also their sum over 8 ranks and more. */
const valueOf = (from: number, part: number, sample: number): number => 1 + ((from + 2 * part + sample) % 5)

async function time(
  group: Group,
  order: RankOrder,
  path: Path,
  { bytes, warmUps, samples }: RankOrder['sizes'][number],
): Promise<RankTimes> {
  const { op, dtype } = order
  const { rank, worldSize } = group
  const count = bytes / elementBytes[dtype]
  const starts = new Float64Array(samples)
  const ends = new Float64Array(samples)
  if (path === 'runner') {
    group.timeAllReduce(dtype, count, warmUps)
    return { path, bytes, us: group.timeAllReduce(dtype, count, samples) }
  }
  const hasOutput = op !== 'reduce' && op !== 'broadcast' && op !== 'barrier' && op !== 'allReduce'
  const ranks = Array.from({ length: worldSize }, (_, from) => from)
  const uneven = (from: number, to: number): number => ((from + to) % 2 === 0 ? count + count / 2 : count / 2)
  /** Elements of each part of data and output. */
  const [dataCounts, outputCounts]: readonly (readonly number[])[] = ((): number[][] => {
    const parts = ranks.map(() => count)
    switch (op) {
      case 'barrier':
        return [[], []]
      case 'scatter':
      case 'reduceScatter':
        return [parts, [count]]
      case 'allToAll':
        return [parts, parts]
      case 'allGather':
      case 'gather':
        return [[count], parts]
      case 'allGatherV':
        return [[uneven(rank, 0)], ranks.map((from) => uneven(from, 0))]
      case 'reduceScatterV':
        return [ranks.map((to) => uneven(0, to)), [uneven(0, rank)]]
      case 'allToAllV':
        return [ranks.map((to) => uneven(rank, to)), ranks.map((from) => uneven(from, rank))]
      default:
        return [[count], hasOutput ? [count] : []]
    }
  })()
  const sum = (counts: readonly number[] = []): number => counts.reduce((a, b) => a + b, 0)
  const make = (counts: readonly number[] = []) => {
    const length = sum(counts)
    // Tensors are of one shape on all ranks.
    const [most, least] = group.allReduceSync(Float64Array.of(length, -length), { op: 'max' })
    if (path !== 'array' && most === length && least === -length) return group.alloc(dtype, [length])
    return dtype === 'f32' ? new Float32Array(length) : new Uint16Array(length)
  }
  const arrayOf = (memory: ReturnType<typeof make>): Floats => ('group' in memory ? memory.data : memory)
  const partsOf = (memory: ReturnType<typeof make>, counts: readonly number[] = []): Floats[] =>
    counts.map((length, part) => {
      const begin = sum(counts.slice(0, part))
      return arrayOf(memory).subarray(begin, begin + length)
    })
  const data = make(dataCounts)
  const output = make(outputCounts)
  const bits = (value: number): number =>
    dtype === 'f32' ? value : (new Uint32Array(Float32Array.of(value).buffer)[0] ?? 0) >>> 16
  const known = Array.from({ length: 5 * worldSize + 1 }, (_, value) => bits(value))
  const dataParts = partsOf(data, dataCounts)
  const outputParts = partsOf(hasOutput ? output : data, hasOutput ? outputCounts : dataCounts)

  const rewrite = (root: number, sample: number): void => {
    if ((op === 'broadcast' || op === 'scatter') && rank !== root) return
    dataParts.forEach((part, index) => part.fill(known[valueOf(rank, index, sample)] ?? NaN))
  }

  // What allReduce takes by its shortest way takes no options.
  const typed = path === 'array' && dtype === 'bf16' ? ({ dtype } as const) : {}
  const plain = path === 'array' && dtype === 'bf16' ? ([{ dtype }] as const) : ([] as const)
  const rooted = ranks.map((root) => ({ ...typed, root }))
  const uses = {
    output: { ...typed, output },
    allGatherV: { ...typed, counts: outputCounts ?? [] },
    reduceScatterV: { ...typed, counts: dataCounts ?? [] },
    allToAllV: { ...typed, counts: dataCounts ?? [], outputCounts: outputCounts ?? [] },
    ring: { ...typed, to: (rank + 1) % worldSize, from: (rank + worldSize - 1) % worldSize },
    toOther: { ...typed, to: 1 - rank },
    fromOther: { ...typed, from: 1 - rank },
  }
  const callSync = (root: number): unknown => {
    switch (op) {
      case 'barrier':
        group.barrierSync()
        return
      case 'allReduce':
        return group.allReduceSync(data, ...plain)
      case 'allReduceTo':
        return group.allReduceSync(data, uses.output)
      case 'reduce':
        return group.reduceSync(data, rooted[root])
      case 'broadcast':
        return group.broadcastSync(data, rooted[root])
      case 'allGather':
        return group.allGatherSync(data, output, ...plain)
      case 'allGatherV':
        return group.allGatherSync(data, output, uses.allGatherV)
      case 'gather':
        return group.gatherSync(data, rank === root ? output : undefined, rooted[root])
      case 'scatter':
        return group.scatterSync(rank === root ? data : undefined, output, rooted[root])
      case 'reduceScatter':
        return group.reduceScatterSync(data, output, ...plain)
      case 'reduceScatterV':
        return group.reduceScatterSync(data, output, uses.reduceScatterV)
      case 'allToAll':
        return group.allToAllSync(data, output, ...plain)
      case 'allToAllV':
        return group.allToAllSync(data, output, uses.allToAllV)
      case 'sendRecv':
        return group.sendRecvSync(data, output, uses.ring)
      case 'pingPong':
        if (rank === 0) return [group.sendSync(data, uses.toOther), group.recvSync(output, uses.fromOther)]
        return rank === 1 ? [group.recvSync(output, uses.fromOther), group.sendSync(data, uses.toOther)] : undefined
    }
  }
  const call = async (root: number): Promise<unknown> => {
    switch (op) {
      case 'barrier':
        return group.barrier()
      case 'allReduce':
        return group.allReduce(data, ...plain)
      case 'allReduceTo':
        return group.allReduce(data, uses.output)
      case 'reduce':
        return group.reduce(data, rooted[root])
      case 'broadcast':
        return group.broadcast(data, rooted[root])
      case 'allGather':
        return group.allGather(data, output, ...plain)
      case 'allGatherV':
        return group.allGather(data, output, uses.allGatherV)
      case 'gather':
        return group.gather(data, rank === root ? output : undefined, rooted[root])
      case 'scatter':
        return group.scatter(rank === root ? data : undefined, output, rooted[root])
      case 'reduceScatter':
        return group.reduceScatter(data, output, ...plain)
      case 'reduceScatterV':
        return group.reduceScatter(data, output, uses.reduceScatterV)
      case 'allToAll':
        return group.allToAll(data, output, ...plain)
      case 'allToAllV':
        return group.allToAll(data, output, uses.allToAllV)
      case 'sendRecv':
        return group.sendRecv(data, output, uses.ring)
      case 'pingPong':
        if (rank === 0) return [await group.send(data, uses.toOther), await group.recv(output, uses.fromOther)]
        return rank === 1 ? [await group.recv(output, uses.fromOther), await group.send(data, uses.toOther)] : undefined
    }
  }

  const sumOf = (part: number, sample: number): number =>
    ranks.reduce((total, from) => total + valueOf(from, part, sample), 0)
  /** What each part of the result is made of. */
  const expected = (root: number, sample: number): number[] => {
    switch (op) {
      case 'barrier':
        return []
      case 'allReduce':
      case 'allReduceTo':
        return [sumOf(0, sample)]
      case 'reduce':
        return [rank === root ? sumOf(0, sample) : valueOf(rank, 0, sample)]
      case 'broadcast':
        return [valueOf(root, 0, sample)]
      case 'reduceScatter':
      case 'reduceScatterV':
        return [sumOf(rank, sample)]
      case 'scatter':
        return [valueOf(root, rank, sample)]
      case 'allGather':
      case 'allGatherV':
        return ranks.map((from) => valueOf(from, 0, sample))
      case 'gather':
        return rank === root ? ranks.map((from) => valueOf(from, 0, sample)) : []
      case 'allToAll':
      case 'allToAllV':
        return ranks.map((from) => valueOf(from, rank, sample))
      case 'sendRecv':
        return [valueOf(uses.ring.from, 0, sample)]
      case 'pingPong':
        return rank < 2 ? [valueOf(1 - rank, 0, sample)] : []
    }
  }
  const check = (root: number, sample: number): void => {
    expected(root, sample).forEach((value, part) => {
      const wanted = known[value] ?? NaN
      const at = (outputParts[part] ?? []).findIndex((element) => element !== wanted)
      if (at < 0) return
      throw new Error(
        `${op} of ${bytes} bytes (${path}): element ${at} of part ${part} is ${outputParts[part]?.[at]} instead of ${wanted} on rank ${rank}`,
      )
    })
  }

  for (let i = 0; i < warmUps + samples; i++) {
    const root = i % worldSize
    rewrite(root, i)
    const start = performance.now()
    if (path === 'async') await call(root)
    else callSync(root)
    const end = performance.now()
    if (i >= warmUps) {
      starts[i - warmUps] = start
      ends[i - warmUps] = end
    }
    if (order.checksAll || i === warmUps + samples - 1) check(root, i)
  }
  const offset = clockOffset()
  const last = (ms: Float64Array): Float64Array =>
    group.reduceSync(
      ms.map((value) => (value + offset) * 1000),
      { op: 'max' },
    )
  const lastStarts = last(starts)
  return { path, bytes, us: last(ends).map((end, i) => end - (lastStarts[i] ?? NaN)) }
}

/** What mpi_collectives.c prints: bytes, median, minimum, 99th percentile, mean. */
function line({ bytes, us }: RankTimes): string {
  const sorted = us.toSorted()
  const shares = [0.5, 0, 0.99].map((share) => sorted[Math.floor(sorted.length * share)] ?? NaN)
  const mean = us.reduce((a, b) => a + b, 0) / us.length
  return `${[bytes, ...[...shares, mean].map((value) => value.toFixed(3))].join(' ')}\n`
}

async function main(order: RankOrder): Promise<void> {
  for (const size of order.sizes) {
    for (const path of order.paths) {
      // A group each: its tensors live as long as it does.
      const group = await createGroup(
        path === 'runner' ? { slotBytes: Math.max(1 << 20, Math.ceil(size.bytes / 64) * 64) } : (order.group ?? {}),
      )
      try {
        const times = await time(group, order, path, size)
        if (group.rank !== 0) continue
        if (process.send !== undefined) process.send(times)
        else process.stdout.write(line(times))
      } finally {
        await group.close()
      }
    }
  }
  if (process.connected) process.disconnect()
}

await main(JSON.parse(process.argv[2] ?? '') as RankOrder)
