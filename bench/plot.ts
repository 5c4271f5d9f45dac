// Pictures of bench/collectives.ts: latency and bandwidth over size, a frame an operation, ours against each MPI.

import { writeFileSync } from 'node:fs'
import type { TopLevelSpec } from 'vega-lite'
import type { CollectiveRow } from './collectives.js'

const names: Readonly<Record<string, string>> = {
  runner: 'tilerank, runner',
  sync: 'tilerank, tensors, Sync',
  async: 'tilerank, tensors, await',
  array: 'tilerank, typed arrays, Sync',
}

export async function plotCollectives(rows: readonly CollectiveRow[], file: string): Promise<void> {
  // Development dependencies of this package: whoever only uses it has no need of them.
  const [vega, { compile }] = await Promise.all([import('vega'), import('vega-lite')])
  const values = rows
    .filter(({ bytes }) => bytes > 0)
    .map(({ op, bytes, path, p50Us, gbPerS }) => ({ op, bytes, by: names[path] ?? path, us: p50Us, gbPerS }))
  const by = [...new Set(values.map((row) => row.by))]
  const frames = (field: string, title: string) => ({
    facet: { field: 'op', type: 'nominal', title: null, sort: [...new Set(values.map(({ op }) => op))] },
    columns: 4,
    spec: {
      width: 210,
      height: 150,
      mark: { type: 'line', strokeWidth: 1.5 },
      encoding: {
        x: {
          field: 'bytes',
          type: 'quantitative',
          scale: { type: 'log', base: 2 },
          axis: {
            title: 'bytes',
            values: [64, 1024, 16384, 262144, 4194304, 67108864],
            format: '.0s',
            grid: false,
          },
        },
        y: { field, type: 'quantitative', scale: { type: 'log' }, axis: { title } },
        color: { field: 'by', type: 'nominal', title: null, sort: by, legend: { orient: 'top' } },
        strokeDash: {
          field: 'by',
          type: 'nominal',
          title: null,
          scale: { domain: by, range: by.map((name) => (name.startsWith('tilerank') ? [1, 0] : [4, 2])) },
        },
      },
    },
  })
  const spec = {
    data: { values },
    vconcat: [frames('us', 'us'), frames('gbPerS', 'GB/s')],
    config: { background: 'white', font: 'sans-serif' },
  } as TopLevelSpec
  writeFileSync(file, await new vega.View(vega.parse(compile(spec).spec), { renderer: 'none' }).toSVG())
}
