// What `tilerank doctor` finds on machines that are not here. How it meets real limits is in test/launcher/limits and test/tp/room.

import assert from 'node:assert/strict'
import { judge } from '../../cli/doctor.js'
import { readTopology, type Topology } from '../../launcher/index.js'

const none = { affinity: '', memoryPolicy: '' }
const core = (cpu: number) => ({ cpu, cpus: [cpu], package: 0, node: 0, cache: 0 })
const healthy: Topology = {
  ...readTopology(),
  allowedCpus: [0, 1],
  onlineCpus: [0, 1],
  cores: [core(0), core(1)],
  nodes: [{ node: 0, cpus: [0, 1], memoryBytes: 2 ** 34, freeBytes: 2 ** 33, distances: [10] }],
  cpuLimit: undefined,
  memoryLimitBytes: undefined,
  memoryAvailableBytes: 2 ** 33,
  memoryTotalBytes: 2 ** 34,
  decidedBy: { cpu: '/c/cpu.max', memoryLimit: undefined, memoryAvailable: '/m/memory.max' },
  processLimits: {
    addressSpaceBytes: Infinity,
    addressSpaceLeft: Infinity,
    dataBytes: Infinity,
    dataLeft: Infinity,
    openFiles: 1024,
  },
  hugePages: { transparent: 'madvise', transparentShared: 'never', reserved: 0, free: 0, pageBytes: 2 ** 21 },
}
const twoNodes = [0, 1].map((node) => ({ node, cpus: [node], memoryBytes: 2 ** 33, freeBytes: 0, distances: [10, 20] }))

describe('tilerank doctor', () => {
  it('finds nothing on a healthy machine, nor where a refusal costs nothing', () => {
    assert.deepEqual(judge(healthy, none), [])
    assert.deepEqual(judge(healthy, { affinity: '', memoryPolicy: 'EPERM' }), [])
    assert.deepEqual(judge({ ...healthy, cpuLimit: 2 }, none), [])
    const reserved = { ...healthy.hugePages, transparent: 'never', reserved: 8, free: 8 }
    assert.deepEqual(judge({ ...healthy, hugePages: reserved }, none), [])
  })

  for (const [name, change, refused, text] of [
    ['a quota', { cpuLimit: 1.5 }, none, /\/c\/cpu.max allows 1.5 processors of time, while 2 cores/],
    ['no processor', { cores: [] }, none, /no processor is allowed/],
    ['a narrow affinity', { allowedCpus: [1] }, none, /may use processors 1 of 0-1/],
    ['little memory', { memoryAvailableBytes: 2 ** 29 }, none, /only 0.5 GiB of memory are free by \/m\/memory.max/],
    ['no huge pages', { hugePages: { ...healthy.hugePages, transparent: 'never' } }, none, /no huge pages/],
    ['refused affinity', {}, { affinity: 'EPERM', memoryPolicy: '' }, /threads cannot be bound to cores: EPERM/],
    [
      'refused memory policy on two nodes',
      { nodes: twoNodes },
      { affinity: '', memoryPolicy: 'EPERM' },
      /memory cannot be bound to NUMA nodes: EPERM/,
    ],
    [
      'an address space limit',
      { processLimits: { ...healthy.processLimits, addressSpaceBytes: 2 ** 32 } },
      none,
      /a process may map 4.0 GiB/,
    ],
    ['few descriptors', { processLimits: { ...healthy.processLimits, openFiles: 255 } }, none, /may open 255 files/],
  ] as const) {
    it(`tells of ${name}, with the remedy`, () => {
      const findings = judge({ ...healthy, ...change }, refused)
      assert.equal(findings.length, 1)
      assert.match(findings[0]?.message ?? '', text)
      assert.ok((findings[0]?.remedy.length ?? 0) > 5)
    })
  }
})
