// One of the two ranks of bench/wire.ts.

import { readFileSync } from 'node:fs'
import process from 'node:process'
import { createGroup, type Wire } from '../collectives/index.js'

export interface WireOrder {
  readonly sizes: readonly { readonly bytes: number; readonly warmUps: number; readonly samples: number }[]
  readonly secret: string
}

export interface WireTimes {
  readonly bytes: number
  readonly wire: Wire
  /** Of the rank that took longer. */
  readonly us: Float64Array
  /** That left this node for one call, headers and all. */
  readonly sentBytes: number
  /** |result - sum|, at most. */
  readonly error: number
}

/** Sixteenths: their sums are exact in f32. */
const valueOf = (rank: number, i: number): number => (((i * 37 + rank * 11) % 211) - 105) / 16
/** By q8: half a step, of both nodes. */
const mostError = (2 * (105 / 16) * (1 + 2 ** -14)) / 254

/** Of this namespace's own eth0. */
function bytesSent(): number {
  const line = readFileSync('/proc/net/dev', 'utf8')
    .split('\n')
    .find((text) => text.trim().startsWith('eth0:'))
  const sent = Number(line?.split(':')[1]?.trim().split(/\s+/)[8])
  if (!Number.isSafeInteger(sent)) throw new Error('/proc/net/dev has no counter of eth0')
  return sent
}

const order = JSON.parse(process.argv[2] ?? '') as WireOrder
const group = await createGroup({ secret: order.secret })
try {
  for (const { bytes, warmUps, samples } of order.sizes) {
    const data = group.alloc('f32', [bytes / 4])
    const values = data.data as Float32Array
    const input = Float32Array.from(values, (_, i) => valueOf(group.rank, i))
    const wires = (['exact', 'q8'] as const).map((wire) => ({
      wire,
      us: new Float64Array(samples),
      sent: 0,
      error: 0,
    }))
    // In turn, so that both have the same weather.
    for (let sample = -warmUps; sample < samples; sample++) {
      for (const one of wires) {
        values.set(input)
        group.barrierSync()
        const before = bytesSent()
        const start = performance.now()
        group.allReduceSync(data, { wire: one.wire })
        const us = (performance.now() - start) * 1000
        if (sample < 0) continue
        one.us[sample] = us
        one.sent += bytesSent() - before
        if (sample < samples - 1) continue
        const most = one.wire === 'exact' ? 0 : mostError
        values.forEach((x, i) => (one.error = Math.max(one.error, Math.abs(x - valueOf(0, i) - valueOf(1, i)))))
        if (!(one.error <= most)) throw new Error(`${String(bytes)} bytes by ${one.wire}: off by ${String(one.error)}`)
      }
    }
    for (const { wire, us, sent, error } of wires) {
      const later = group.reduceSync(us, { op: 'max' })
      const times: WireTimes = { bytes, wire, us: later, sentBytes: sent / samples, error }
      if (group.rank === 0) process.send?.(times)
    }
  }
} finally {
  await group.close()
}
process.disconnect()
