// What the ranks of messages.test.ts run. What arrives is worked out from the sender's rank and a seed, and compared byte by byte.

import { setTimeout as sleep } from 'node:timers/promises'
import { CollectiveError, createGroup, type Group, type GroupData, type TypedArray } from '../../collectives/index.js'
import { elements } from './reductions.js'

type DType = Parameters<typeof elements>[0]

const bytesOf = (data: TypedArray): Buffer => Buffer.from(data.buffer, data.byteOffset, data.byteLength)

function expectSame(what: string, have: TypedArray, want: TypedArray): void {
  if (!bytesOf(have).equals(bytesOf(want))) throw new Error(`${what}: other bytes than were sent`)
}

async function failureOf(run: () => unknown): Promise<Record<string, unknown>> {
  const start = performance.now()
  try {
    await run()
  } catch (error) {
    const tookMs = performance.now() - start
    if (error instanceof CollectiveError) return { ...error, cause: undefined, message: error.message, tookMs }
    return { code: 'other', message: String(error), tookMs }
  }
  return { code: 'nothing thrown' }
}

/** Every ordered pair, every way to call it, from and to tensors and odd places of arrays. */
export async function pairs(args: { counts: number[]; dtypes: DType[] }): Promise<number> {
  const group = await createGroup({ slotBytes: 8192, chunkBytes: 4096, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  let checked = 0
  let seed = 0
  try {
    for (const dtype of args.dtypes) {
      for (const count of args.counts) {
        const tensor = group.alloc(dtype, [count])
        for (let step = 0; step < worldSize; step++) {
          const to = (rank + step) % worldSize
          const from = (rank - step + worldSize) % worldSize
          for (const form of ['sendRecvSync', 'sendRecv', 'both', 'sync'] as const) {
            if (step === 0 && !form.startsWith('sendRecv')) continue
            seed += 100
            const around = elements(dtype, count + 2, seed + 50)
            const isTensor = form === 'sendRecv'
            const output: GroupData = isTensor ? tensor : around.subarray(1, count + 1)
            const data = elements(dtype, count, seed + rank)
            const options = { dtype, to, from }
            let same: GroupData = output
            if (form === 'sendRecvSync') same = group.sendRecvSync(data, output, options)
            else if (form === 'sendRecv') same = await group.sendRecv(data, output, options)
            else if (form === 'both') {
              await Promise.all([group.recv(output, { dtype, from }), group.send(data, { dtype, to })])
            } else {
              // A ring in which all send first would wait for ever, were the messages long.
              const isFirst = rank < to
              if (isFirst) group.sendSync(data, { dtype, to })
              group.recvSync(output, { dtype, from })
              if (!isFirst) group.sendSync(data, { dtype, to })
            }
            if (same !== output) throw new Error('something else came back')
            const what = `${String(count)} ${dtype} from ${String(from)} by ${form}`
            expectSame(
              what,
              isTensor ? tensor.data : around.subarray(1, count + 1),
              elements(dtype, count, seed + from),
            )
            expectSame(`what was sent as ${what}`, data, elements(dtype, count, seed + rank))
            const beside = elements(dtype, count + 2, seed + 50)
            for (const i of [0, count + 1]) {
              if (!Object.is(around[i], beside[i])) throw new Error(`${what}: memory beside the output was written`)
            }
            checked++
          }
        }
      }
    }
  } finally {
    await group.close()
  }
  return checked
}

/** Messages of all sizes in both directions, posted in any mix of forms, among collectives that nobody waits for: each finds its place. */
export async function mixed(args: { count: number }): Promise<number> {
  const group = await createGroup({ slotBytes: 4096, chunkBytes: 1024, timeoutMs: 20_000 })
  const { rank, worldSize } = group
  let checked = 0
  const lengthOf = (from: number, to: number, i: number): number => (i * 37 + from * 11 + to * 5) % 700
  try {
    const work: Promise<unknown>[] = []
    const sums: Float32Array[] = []
    for (let i = 0; i < args.count; i++) {
      for (let peer = 0; peer < worldSize; peer++) {
        if (peer === rank) continue
        const sent = elements('i32', lengthOf(rank, peer, i), i * 100 + rank * 10 + peer)
        work.push(group.send(sent, { to: peer }))
        const length = lengthOf(peer, rank, i)
        const received = new Int32Array(length)
        work.push(
          group.recv(received, { from: peer }).then(() => {
            expectSame(`message ${String(i)}`, received, elements('i32', length, i * 100 + peer * 10 + rank))
            checked++
          }),
        )
      }
      if (i % 3 === rank % 3) await sleep(1)
      const sum = Float32Array.of(i)
      sums.push(sum)
      // A blocking collective is none of the messages' business.
      if (i % 2 === 0) group.allReduceSync(sum)
      else await group.allReduce(sum)
    }
    await Promise.all(work)
    sums.forEach(([sum], i) => {
      if (sum !== i * worldSize) throw new Error(`sum ${String(i)} is ${String(sum)}`)
    })
  } finally {
    await group.close()
  }
  return checked
}

/** Long messages that cross, in every pairing of calls that MPI allows too. */
export async function crossing(args: { count: number }): Promise<boolean> {
  const group = await createGroup({ timeoutMs: 20_000 })
  const peer = 1 - group.rank
  const data = new Float32Array(args.count).map((_, i) => i * 2 + group.rank)
  try {
    for (let turn = 0; turn < 4; turn++) {
      const output = new Float32Array(args.count)
      if (turn === 0) await Promise.all([group.send(data, { to: peer }), group.recv(output, { from: peer })])
      else if (turn === 1 || (turn === 2 && group.rank === 0))
        group.sendRecvSync(data, output, { to: peer, from: peer })
      else if (turn === 2) {
        group.recvSync(output, { from: peer })
        group.sendSync(data, { to: peer })
      } else {
        const sending = group.send(data, { to: peer })
        group.barrierSync()
        group.recvSync(output, { from: peer })
        await sending
      }
      if (!output.every((value, i) => value === i * 2 + peer)) throw new Error(`turn ${String(turn)}: a wrong element`)
    }
  } finally {
    await group.close()
  }
  return true
}

/** A short message waits for nobody: not even the first, of a pair that has never met. */
export async function eager(): Promise<number[]> {
  const group = await createGroup()
  const values: number[] = []
  for (let turn = 0; turn < 3; turn++) {
    if (group.rank === 0) {
      const data = Float64Array.of(turn, 7)
      group.sendSync(data, { to: 1 })
      data.fill(-1)
      group.sendSync(Float64Array.of(turn + 0.5), { to: 1 })
    }
    group.barrierSync()
    if (group.rank === 1) {
      const data = new Float64Array(2)
      group.recvSync(data, { from: 0 })
      values.push(...data)
      values.push(group.recvSync(new Float64Array(1), { from: 0 })[0] ?? NaN)
    }
  }
  // A message that was sent counts, though its sender has left.
  if (group.rank === 0) group.sendSync(Float64Array.of(42), { to: 1 })
  else await sleep(200)
  if (group.rank === 0) await group.close()
  else values.push(group.recvSync(new Float64Array(1), { from: 0 })[0] ?? NaN)
  await group.close()
  return values
}

export async function disagree(args: { kind: 'count' | 'dtype' }): Promise<{ failure: unknown }> {
  const group = await createGroup({ timeoutMs: 5000 })
  const wrong = args.kind === 'count' ? new Float32Array(5) : new Int32Array(4)
  let failure = await failureOf(() => {
    if (group.rank === 0) group.sendSync(new Float32Array(4), { to: 1 })
    else if (group.rank === 1) group.recvSync(wrong, { from: 0 })
  })
  // A sender, which waits for nobody, learns it by its next call, as does whoever had no part in it.
  if (failure['code'] === 'nothing thrown') failure = await failureOf(() => group.barrierSync())
  await group.close()
  return { failure }
}

function say(value: unknown): void {
  process.send?.({ kind: 'say', value })
}

/** Rank 1 says that it is ready and waits to be killed; rank 0 waits for it, rank 2 for rank 0, which never sends. */
export async function lost(args: {
  how: 'send' | 'recv'
  form: 'sync' | 'async'
}): Promise<{ failure: unknown; next: unknown }> {
  const group = await createGroup({ timeoutMs: 20_000 })
  const data = new Float32Array(1 << 20)
  const isSending = args.how === 'send' && group.rank === 0
  // The channel stands.
  if (group.rank === 0) group.sendRecvSync(Float32Array.of(1), new Float32Array(1), { to: 1, from: 1 })
  if (group.rank === 1) {
    group.sendRecvSync(Float32Array.of(1), new Float32Array(1), { to: 0, from: 0 })
    say('ready')
    await sleep(60_000)
  }
  const failure = await failureOf(() => {
    if (isSending) return args.form === 'sync' ? group.sendSync(data, { to: 1 }) : group.send(data, { to: 1 })
    const from = group.rank === 0 ? 1 : 0
    return args.form === 'sync' ? group.recvSync(data, { from }) : group.recv(data, { from })
  })
  const next = await failureOf(() => group.allReduce(new Float32Array(1)))
  await group.close()
  return { failure, next }
}

/** Rank 1 leaves in order, though rank 0 still has business with it. */
export async function left(args: { how: 'send' | 'recv'; isKnown: boolean }): Promise<{ failure: unknown }> {
  const group = await createGroup({ timeoutMs: 20_000 })
  if (args.isKnown) {
    if (group.rank === 0) group.sendRecvSync(Float32Array.of(1), new Float32Array(1), { to: 1, from: 1 })
    else group.sendRecvSync(Float32Array.of(1), new Float32Array(1), { to: 0, from: 0 })
  }
  group.barrierSync()
  if (group.rank === 1) {
    await group.close()
    await sleep(300)
    return { failure: 'closed' }
  }
  const data = new Float32Array(1 << 20)
  const failure = await failureOf(() =>
    args.how === 'send' ? group.send(data, { to: 1 }) : group.recv(data, { from: 1 }),
  )
  await group.close()
  return { failure }
}

/** Nobody sends: the deadline of a recv breaks the group on all ranks. */
export async function late(args: { isKnown: boolean }): Promise<{ failure: unknown; next: unknown }> {
  const group = await createGroup({ timeoutMs: 5000 })
  if (args.isKnown) {
    if (group.rank === 1) group.sendSync(Float32Array.of(1), { to: 0 })
    if (group.rank === 0) group.recvSync(new Float32Array(1), { from: 1 })
  }
  group.barrierSync()
  const failure = await failureOf(() =>
    group.rank === 0
      ? group.recv(new Float32Array(1), { from: 1, timeoutMs: 400 })
      : group.allReduce(new Float32Array(1)),
  )
  const next = await failureOf(() => group.allReduce(new Float32Array(1)))
  await group.close()
  return { failure, next }
}

/** Rank 0 gives up what it waits for, by a signal or by abort(); the others wait for messages too. */
export async function given(args: { how: 'signal' | 'abort' }): Promise<{ failure: unknown; isReason: boolean }> {
  const group = await createGroup({ timeoutMs: 10_000 })
  const controller = new AbortController()
  const reason = new Error('the user pressed stop')
  let isReason = false
  // Ranks 0 and 2 have met, 0 and 1 have not.
  if (group.rank === 0) group.sendSync(Float32Array.of(1), { to: 2 })
  if (group.rank === 2) group.recvSync(new Float32Array(1), { from: 0 })
  const failure = await failureOf(async () => {
    if (group.rank !== 0) return group.recv(new Float32Array(4), { from: 0 })
    setTimeout(() => (args.how === 'signal' ? controller.abort(reason) : group.abort('enough')), 100)
    try {
      return await group.recv(new Float32Array(4), { from: 1, signal: controller.signal })
    } catch (error) {
      isReason = error === reason
      throw error
    }
  })
  // What the others know, they do not know by the end of this process.
  if (group.rank === 0) await sleep(800)
  if (group.rank !== 0 && Number(failure['tookMs']) > 700) throw new Error(`${String(failure['tookMs'])} ms`)
  await group.close()
  return { failure, isReason }
}

/** Which calls a pending message keeps from being made, and that close() waits for it. */
export async function pending(): Promise<unknown> {
  const group: Group = await createGroup({ timeoutMs: 10_000 })
  const { rank } = group
  const codes: unknown[] = []
  const code = async (run: () => unknown): Promise<unknown> => (await failureOf(run))['code']
  if (rank === 0) {
    const data = new Float32Array(1)
    const waiting = group.recv(data, { from: 1 })
    codes.push(await code(() => group.recvSync(new Float32Array(1), { from: 1 })))
    codes.push(await code(() => group.sendRecvSync(new Float32Array(1), new Float32Array(1), { to: 2, from: 1 })))
    // Other directions, and collectives, are free.
    codes.push(await code(() => group.sendSync(Float32Array.of(3), { to: 1 })))
    codes.push(await code(() => group.recvSync(new Float32Array(1), { from: 2 })))
    group.barrierSync()
    await waiting
    codes.push(data[0])
    return (await group.close(), codes)
  }
  if (rank === 2) group.sendSync(Float32Array.of(5), { to: 0 })
  group.barrierSync()
  if (rank === 2) return (await group.close(), codes)
  const data = new Float32Array(1 << 20)
  group.recvSync(data.subarray(0, 1), { from: 0 })
  group.sendSync(Float32Array.of(9), { to: 0 })
  return (await group.close(), [data[0]])
}

/** close() comes while a long message is on its way, which still arrives. */
export async function closing(): Promise<unknown> {
  const group = await createGroup({ timeoutMs: 10_000 })
  const data = new Float32Array(1 << 20).fill(group.rank)
  if (group.rank === 1) await sleep(200)
  const message = group.rank === 0 ? group.send(data, { to: 1 }) : group.recv(data, { from: 0 })
  await group.close()
  await message
  return [data[0], data.at(-1), (await failureOf(() => group.send(data, { to: 1 })))['code']]
}

/** A message of more than 2 GiB. */
export async function huge(args: { nbytes: number }): Promise<boolean> {
  const group = await createGroup({ timeoutMs: 120_000 })
  const data = new Uint8Array(args.nbytes)
  const marks = [0, 12_345, 2 ** 31 - 1, 2 ** 31, args.nbytes - 1]
  if (group.rank === 0) for (const at of marks) data[at] = (at % 251) + 1
  if (group.rank === 0) await group.send(data, { to: 1 })
  else await group.recv(data, { from: 0 })
  const isWhole = marks.every((at) => data[at] === (at % 251) + 1)
  await group.close()
  return isWhole
}
