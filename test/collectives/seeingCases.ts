// What the ranks of seeing.test.ts run.

import { setTimeout as sleep } from 'node:timers/promises'
import { createGroup, type GroupStats } from '../../collectives/index.js'

/** Rank `late` comes 5 ms after the others, every time. */
export async function lateRank(args: { late: number; rounds: number }): Promise<GroupStats[]> {
  const group = await createGroup({ timeoutMs: 20_000 })
  try {
    const tensor = group.alloc('f32', [16])
    group.allReduceSync(tensor)
    group.barrierSync()
    const before = group.stats({ reset: true })
    for (let round = 0; round < args.rounds; round++) {
      if (group.rank === args.late) await sleep(20)
      group.allReduceSync(tensor)
      await group.allReduce(new Float32Array(1000))
    }
    group.broadcastSync(new Uint8Array(0))
    return [before, group.stats()]
  } finally {
    await group.close()
  }
}

/** Calls of each form, some of several chunks, some queued behind others. */
export async function calls(args: { trace?: string; stats?: boolean; fails?: boolean }): Promise<GroupStats | string> {
  const group = await createGroup({
    slotBytes: 4096,
    timeoutMs: 20_000,
    ...(args.stats === undefined ? {} : { stats: args.stats }),
    ...(args.trace === undefined ? {} : { trace: args.trace }),
  })
  try {
    const tensor = group.alloc('bf16', [5000])
    for (let i = 0; i < 10; i++) {
      group.allReduceSync(tensor)
      group.allReduceSync(new Float32Array(3000))
      await Promise.all([group.allReduce(tensor), group.broadcast(new Int32Array(2500)), group.barrier()])
      group.allGatherSync(new Float64Array(7), new Float64Array(7 * group.worldSize))
    }
    if (args.fails === true) {
      if (group.rank === 1) {
        // Not before the other waits: a call that has begun is in the trace of a failure.
        await sleep(50)
        group.abort('on purpose')
      } else {
        await group.barrier()
      }
      return 'no failure'
    }
  } catch (error) {
    // Before close(): the file is there as soon as the call has failed.
    return error instanceof Error && 'code' in error ? String(error.code) : String(error)
  } finally {
    if (args.fails !== true) await group.close()
  }
  return group.stats()
}
