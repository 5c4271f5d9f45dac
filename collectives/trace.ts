// What ranks did, in the Trace Event Format that Perfetto (ui.perfetto.dev) and chrome://tracing read. pid is the rank and tid the group, times are
// CLOCK_MONOTONIC, which all ranks of a node share: so traces of several ranks lie beside each other when their events are put into one list.

import { mkdirSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { dirname, join, parse } from 'node:path'
import type { TracedCall } from './communicator.js'
import type { RankRecording, RecordedOperation, Recording } from './recorder.js'

/** Names a folder: every group writes its trace into it. */
export const traceVariable = 'TILERANK_TRACE'

/** A complete event (X), an instant (i) or a name (M). Times in microseconds. */
export interface TraceEvent {
  readonly name: string
  readonly cat?: string
  readonly ph: 'X' | 'i' | 'M'
  readonly ts: number
  readonly dur?: number
  readonly pid: number
  readonly tid: number
  /** Of an instant: how far its line reaches. */
  readonly s?: 't'
  readonly args: Readonly<Record<string, string | number | boolean>>
}

export interface Trace {
  readonly traceEvents: readonly TraceEvent[]
  readonly displayTimeUnit: 'ns'
  readonly otherData: Readonly<Record<string, string | number>>
}

function names(rank: number, group: number, process: string): TraceEvent[] {
  const base = { ph: 'M', ts: 0, pid: rank, tid: group } as const
  return [
    { ...base, name: 'process_name', args: { name: process } },
    { ...base, name: 'process_sort_index', args: { sort_index: rank } },
    { ...base, name: 'thread_name', args: { name: `group ${String(group)}` } },
  ]
}

/** The sequences of the flight recorder, not beyond their frame: their clock is coarse unless the group was traced. */
function sequences(
  rows: readonly RecordedOperation[],
  place: { readonly pid: number; readonly tid: number },
  fromNs: number,
  toNs: number,
): TraceEvent[] {
  let after = fromNs
  return rows.flatMap((row): TraceEvent[] => {
    const args = { sequence: row.sequence, dtype: row.dtype, count: row.count, variant: row.variant }
    const begin = Math.min(Math.max(row.publishedNs === 0 ? row.completedNs : row.publishedNs, after), toNs)
    const base = { name: `${row.operation} ${String(row.sequence)}`, cat: 'sequence', ts: begin / 1e3, ...place, args }
    if (row.completedNs === 0)
      return row.publishedNs === 0 ? [] : [{ ...base, name: `${base.name} waits`, ph: 'i', s: 't' }]
    const end = Math.min(Math.max(row.completedNs, begin), toNs)
    after = end
    return [{ ...base, ph: 'X', dur: (end - begin) / 1e3 }]
  })
}

/** All calls of one rank that were kept, and in each that took several sequences (chunks, phases) those that the recorder still has. */
export function traceOfCalls(
  own: { readonly rank: number; readonly group: number; readonly pid: number },
  traced: { readonly dropped: number; readonly calls: readonly TracedCall[] },
  rows: readonly RecordedOperation[],
): Trace {
  const place = { pid: own.rank, tid: own.group }
  const bySequence = new Map(rows.map((row) => [row.sequence, row]))
  const events = traced.calls.flatMap((call): TraceEvent[] => {
    const inside =
      call.sequences < 2
        ? []
        : Array.from({ length: Math.min(call.sequences, rows.length) }, (_, i) =>
            bySequence.get(call.sequence + i),
          ).filter((row) => row !== undefined)
    const outer: TraceEvent = {
      name: call.operation,
      cat: 'collective',
      ph: 'X',
      ts: call.beginNs / 1e3,
      dur: (call.endNs - call.beginNs) / 1e3,
      ...place,
      args: {
        bytes: call.bytes,
        dtype: call.dtype,
        count: call.count,
        sequence: call.sequence,
        waitUs: call.waitedNs / 1e3,
        queuedUs: (call.beginNs - call.calledNs) / 1e3,
        ...(call.hasFailed ? { failed: true } : {}),
      },
    }
    return [outer, ...sequences(inside, place, call.beginNs, call.endNs)]
  })
  return {
    traceEvents: [
      ...names(own.rank, own.group, `rank ${String(own.rank)} (pid ${String(own.pid)} on ${hostname()})`),
      // Of a group that a runner works on: it makes no calls.
      ...(events.length === 0 ? sequences(rows, place, 0, Infinity) : events),
    ],
    displayTimeUnit: 'ns',
    otherData: { droppedCalls: traced.dropped },
  }
}

/** The same of a flight recorder's rows: nothing had to be asked for, and ranks that are dead are in it. */
export function traceOfRecording(recording: Recording): Trace {
  const traceEvents = recording.flatMap(({ rank, group, pid, rows }: RankRecording) => [
    ...names(rank, group, `rank ${String(rank)} (pid ${String(pid)})`),
    ...sequences(rows, { pid: rank, tid: group }, 0, Infinity),
  ])
  return { traceEvents, displayTimeUnit: 'ns', otherData: {} }
}

/** FILE.json of the option is FILE.RANK.json; a folder of the variable gets a file for each rank and group. */
export function tracePath(
  place: { readonly file: string } | { readonly folder: string },
  rank: number,
  group: number,
): string {
  if ('folder' in place) return join(place.folder, `rank-${String(rank)}-group-${String(group)}.json`)
  const { dir, name, ext } = parse(place.file)
  return join(dir, `${name}.${String(rank)}${ext}`)
}

export function writeTrace(path: string, trace: Trace): void {
  mkdirSync(dirname(path), { recursive: true })
  const { traceEvents, ...rest } = trace
  const lines = traceEvents.map((event) => JSON.stringify(event)).join(',\n')
  writeFileSync(path, `{"traceEvents": [\n${lines}\n],\n${JSON.stringify(rest).slice(1)}\n`)
}
