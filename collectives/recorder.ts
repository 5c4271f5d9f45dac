// The flight recorder as programs and people see it: what each rank did last and where it stood. The addon reads it out of the
// ranks' shared memory, dead ranks' too; this file says what a row means, and prints it.

import { writeFileSync } from 'node:fs'

/** One generation of one operation on one rank. An operation takes one or more sequences: chunks and phases. */
export interface RecordedOperation {
  readonly sequence: number
  readonly operation: string
  readonly dtype: string
  /** Elements; words of a step message that rank 0 sends. */
  readonly count: number
  /** allReduce: algorithm + 16 * phase; broadcast: the root. */
  readonly variant: number
  /** Digest of the calls before it; 0 in the engine. */
  readonly history: number
  /** The engine's step and layer: 0 and -1 outside of them. */
  readonly step: number
  readonly layer: number
  /**
   * CLOCK_MONOTONIC when this rank's part stood; 0: it had none, and waited for another's. Operations that waited less than 3 us share
   * one look at the clock, eight of a Group or those of a layer: their times are the last look's.
   */
  readonly publishedNs: number
  /** When it was through; 0: it was not. */
  readonly completedNs: number
}

/** The last operations of one rank, in order: at most 1024, in the excerpt of an error 8. */
export interface RankRecording {
  readonly rank: number
  /** Which of the job's groups: those of createGroup count from 0, for others see groupName. */
  readonly group: number
  readonly pid: number
  readonly rows: readonly RecordedOperation[]
}

export type Recording = readonly RankRecording[]

/** Rows of each rank that an error carries. */
export const excerptRows = 8
/** All that a ring holds. */
export const allRows = 1024
/** Names a file that gets all rows as JSON when something fails. */
export const recorderVariable = 'TILERANK_RECORDER'

/** The last rows of each rank. */
export function excerptOf(recording: Recording, rows: number = excerptRows): Recording {
  return recording.map((one) => ({ ...one, rows: one.rows.slice(-rows) }))
}

/** A group as tables show it: 3 is the job's fourth createGroup; 1.2, made of other groups, the third that was numbered by the job's rank 1. */
export function groupName(group: number): string {
  const maker = Math.floor(group / 2 ** 32)
  return maker === 0 ? String(group) : `${String(maker - 1)}.${String(group % 2 ** 32)}`
}

/** All rows as JSON, over what was there. */
export function writeRecording(path: string, recording: Recording): void {
  writeFileSync(path, `${JSON.stringify({ time: new Date().toISOString(), ranks: recording }, null, 1)}\n`)
}

/** Lines of a table: `rows` of each rank, times in milliseconds before the last thing that any rank did. Empty: nothing was recorded. */
export function formatRecording(recording: Recording, rows = 3): string[] {
  const ranks = excerptOf(recording, rows).filter((one) => one.rows.length > 0)
  const latest = Math.max(0, ...ranks.flatMap((one) => one.rows.flatMap((row) => [row.publishedNs, row.completedNs])))
  const before = (ns: number): string => (ns === 0 ? '-' : ((ns - latest) / 1e6).toFixed(3))
  const hasGroups = new Set(ranks.map(({ group }) => group)).size > 1
  const cells = ranks.flatMap((one) =>
    one.rows.map((row, i) => [
      ...(hasGroups ? [groupName(one.group)] : []),
      String(one.rank),
      String(one.pid),
      String(row.sequence),
      row.operation,
      row.operation === 'barrier' ? '-' : `${String(row.count)} ${row.dtype}`,
      String(row.variant),
      row.step === 0 ? '-' : String(row.step),
      row.layer < 0 ? '-' : String(row.layer),
      before(row.publishedNs),
      // A rank goes from one to the next: only its last can be open.
      row.completedNs !== 0 || i < one.rows.length - 1 ? before(row.completedNs) : 'waits',
    ]),
  )
  if (cells.length === 0) return []
  const head = ['rank', 'pid', 'sequence', 'operation', 'of', 'variant', 'step', 'layer', 'published ms', 'done ms']
  const table = [hasGroups ? ['group', ...head] : head, ...cells]
  const widths = table[0]?.map((_, column) => Math.max(...table.map((line) => line[column]?.length ?? 0))) ?? []
  return table.map((line) => line.map((cell, column) => cell.padStart(widths[column] ?? 0)).join('  '))
}
