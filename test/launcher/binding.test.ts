// Plans for machines that are not here: fixtures are small trees of sysfs and procfs, made from a description.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import * as fc from 'fast-check'
import {
  type BindingPlan,
  LauncherError,
  type MachineFiles,
  type Topology,
  defaultRanks,
  formatCpuList,
  parseCpuList,
  planBinding,
  readTopology,
} from '../../launcher/index.js'

interface Machine {
  readonly packages: number
  readonly nodesPerPackage?: number
  readonly coresPerNode: number
  readonly threadsPerCore?: number
  /** Where the siblings are: behind all cores (the usual), or beside each other. */
  readonly numbering?: 'siblingsLast' | 'siblingsAdjacent' | 'alternatingNodes'
  readonly allowed?: string
  readonly online?: string
  readonly nodeNumbers?: readonly number[]
  /** Nodes without memory, and nodes with memory only (cpus: none). */
  readonly emptyMemory?: readonly number[]
  readonly files?: Readonly<Record<string, string>>
}

/** Paths and contents, without the leading slash. */
type Tree = Map<string, string>

const treeFiles = (tree: Tree): MachineFiles => ({
  text: (path) => tree.get(path),
  names: (folder) => [
    ...new Set(
      [...tree.keys()].flatMap((path) =>
        path.startsWith(`${folder}/`) ? (path.slice(folder.length + 1).split('/')[0] ?? []) : [],
      ),
    ),
  ],
})

function fixture(machine: Machine): MachineFiles {
  const tree: Tree = new Map()
  const { packages, nodesPerPackage = 1, coresPerNode, threadsPerCore = 1, numbering = 'siblingsLast' } = machine
  const numNodes = packages * nodesPerPackage
  const numCores = numNodes * coresPerNode
  const cpusOfNode: number[][] = Array.from({ length: numNodes }, () => [])
  for (let node = 0; node < numNodes; node++) {
    for (let i = 0; i < coresPerNode; i++) {
      const core = numbering === 'alternatingNodes' ? i * numNodes + node : node * coresPerNode + i
      const cpus = Array.from({ length: threadsPerCore }, (_, thread) =>
        numbering === 'siblingsAdjacent' ? core * threadsPerCore + thread : core + thread * numCores,
      )
      cpusOfNode[node]?.push(...cpus)
      for (const cpu of cpus) {
        const folder = `sys/devices/system/cpu/cpu${cpu}/topology`
        tree.set(`${folder}/core_cpus_list`, formatCpuList(cpus))
        tree.set(`${folder}/physical_package_id`, String(Math.floor(node / nodesPerPackage)))
      }
    }
  }
  const all = formatCpuList(cpusOfNode.flat())
  tree.set('sys/devices/system/cpu/online', machine.online ?? all)
  tree.set(
    'proc/self/status',
    `Name:\tnode\nCpus_allowed:\tf\nCpus_allowed_list:\t${machine.allowed ?? all}\nMems_allowed:\t1`,
  )
  tree.set('proc/meminfo', 'MemTotal: 1000000 kB\nMemFree: 400000 kB\nMemAvailable: 500000 kB\nHugepagesize: 2048 kB')
  cpusOfNode.forEach((cpus, i) => {
    const node = machine.nodeNumbers?.[i] ?? i
    const kb = machine.emptyMemory?.includes(i) === true ? 0 : 100_000
    tree.set(`sys/devices/system/node/node${node}/cpulist`, formatCpuList(cpus))
    tree.set(
      `sys/devices/system/node/node${node}/meminfo`,
      `Node ${node} MemTotal: ${kb} kB\nNode ${node} MemFree: ${kb} kB`,
    )
    const distances = cpusOfNode.map((_, j) => (i === j ? 10 : Math.floor(i / 2) === Math.floor(j / 2) ? 12 : 21))
    tree.set(`sys/devices/system/node/node${node}/distance`, distances.join(' '))
  })
  for (const [path, text] of Object.entries(machine.files ?? {})) tree.set(path, text)
  return treeFiles(tree)
}

const topologyOf = (machine: Machine): Topology => readTopology(fixture(machine))
const coresOf = (plan: BindingPlan): string[] => plan.ranks.map(({ cores }) => formatCpuList(cores))
const plan = (machine: Machine, ranks: number, more: { coreList?: string; oversubscribe?: boolean } = {}) =>
  planBinding({ ranks, topology: topologyOf(machine), ...more })
const failsWith = (code: string, text?: RegExp) => (error: unknown) =>
  error instanceof LauncherError && error.code === code && (text === undefined || text.test(error.message))

const twoSockets: Machine = { packages: 2, coresPerNode: 56, threadsPerCore: 2 }
const subNuma: Machine = { packages: 2, nodesPerPackage: 4, coresPerNode: 14 }

describe('launcher: which cores each rank gets', () => {
  it('gives each rank a socket, one thread a core, memory of that socket, and leaves siblings in the mask', () => {
    const two = plan(twoSockets, 2)
    assert.deepEqual(coresOf(two), ['0-55', '56-111'])
    assert.deepEqual(
      two.ranks.map(({ cpus }) => formatCpuList(cpus)),
      ['0-55,112-167', '56-111,168-223'],
    )
    assert.deepEqual(
      two.ranks.map(({ nodes }) => nodes),
      [[0], [1]],
    )
    assert.equal(two.isOversubscribed, false)
    assert.equal(defaultRanks(topologyOf(twoSockets)), 2)
  })

  it('cuts sockets evenly for four ranks and gives one rank everything', () => {
    assert.deepEqual(coresOf(plan(twoSockets, 4)), ['0-27', '28-55', '56-83', '84-111'])
    const one = plan(twoSockets, 1)
    assert.deepEqual(coresOf(one), ['0-111'])
    assert.deepEqual(one.ranks[0]?.nodes, [0, 1])
  })

  it('lets no rank cross a socket for three ranks, keeps counts equal, and says that cores are idle', () => {
    const three = plan(twoSockets, 3)
    assert.deepEqual(coresOf(three), ['0-27', '28-55', '56-83'])
    assert.ok(three.notes.some((note) => note.startsWith('28 of 112 cores stay idle')))
  })

  it('gives whole neighbouring sub-NUMA clusters', () => {
    assert.deepEqual(coresOf(plan(subNuma, 2)), ['0-55', '56-111'])
    assert.deepEqual(
      plan(subNuma, 2).ranks.map(({ nodes }) => nodes),
      [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
      ],
    )
    assert.deepEqual(coresOf(plan(subNuma, 8))[7], '98-111')
    assert.equal(defaultRanks(topologyOf(subNuma)), 8)
  })

  it('finds physical cores where siblings have neighbouring numbers', () => {
    const machine: Machine = { packages: 2, coresPerNode: 16, threadsPerCore: 2, numbering: 'siblingsAdjacent' }
    const two = plan(machine, 2)
    assert.deepEqual(
      two.ranks.map(({ cores }) => [cores[0], cores[1], cores.at(-1), cores.length]),
      [
        [0, 2, 30, 16],
        [32, 34, 62, 16],
      ],
    )
  })

  it('follows nodes whose processors alternate', () => {
    const two = plan({ packages: 2, coresPerNode: 4, numbering: 'alternatingNodes' }, 2)
    assert.deepEqual(coresOf(two), ['0,2,4,6', '1,3,5,7'])
    assert.deepEqual(
      two.ranks.map(({ nodes }) => nodes),
      [[0], [1]],
    )
  })

  it('uses only allowed and online processors, second siblings too where only they are allowed', () => {
    assert.deepEqual(coresOf(plan({ ...twoSockets, allowed: '8-15' }, 2)), ['8-11', '12-15'])
    assert.deepEqual(coresOf(plan({ ...twoSockets, allowed: '112-119' }, 2)), ['112-115', '116-119'])
    assert.deepEqual(coresOf(plan({ packages: 1, coresPerNode: 8, online: '0-2,4-7' }, 2)), ['0-2', '4-6'])
    const slurm = plan({ packages: 2, coresPerNode: 24, allowed: '0,4-11,21-26,30-46' }, 2)
    assert.deepEqual(
      slurm.ranks.map(({ cores }) => cores.length),
      [12, 12],
    )
  })

  it('reads node numbers with holes and gives ranks without memory of their own the nearest', () => {
    const holes = plan({ packages: 2, coresPerNode: 4, nodeNumbers: [0, 8] }, 2)
    assert.deepEqual(
      holes.ranks.map(({ nodes }) => nodes),
      [[0], [8]],
    )
    const poor = plan({ packages: 2, nodesPerPackage: 2, coresPerNode: 2, emptyMemory: [2] }, 4)
    assert.deepEqual(
      poor.ranks.map(({ nodes }) => nodes),
      [[0], [1], [3], [3]],
    )
  })

  it('handles more processors than a cpu_set_t holds', () => {
    const eight = plan({ packages: 8, coresPerNode: 256 }, 8)
    assert.deepEqual(coresOf(eight)[7], '1792-2047')
  })

  it('reads this machine', () => {
    const topology = readTopology()
    const allowed = /^Cpus_allowed_list:\s*(.*)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]
    assert.equal(formatCpuList(topology.allowedCpus), allowed)
    assert.deepEqual(
      topology.cores.flatMap(({ cpus }) => cpus).sort((a, b) => a - b),
      topology.allowedCpus,
    )
    assert.ok(topology.memoryAvailableBytes > 0 && topology.memoryAvailableBytes <= topology.memoryTotalBytes)
  })

  it('takes a machine without sysfs for one node whose processors are cores', () => {
    const topology = readTopology(treeFiles(new Map([['proc/self/status', 'Cpus_allowed_list:\t3,5']])))
    assert.deepEqual(
      topology.cores.map(({ cpu }) => cpu),
      [3, 5],
    )
    assert.deepEqual(coresOf(planBinding({ ranks: 2, topology })), ['3', '5'])
  })

  it('refuses more ranks than cores, unless they may share: then round robin', () => {
    const machine: Machine = { packages: 1, coresPerNode: 2 }
    assert.throws(
      () => plan(machine, 3),
      failsWith('ERR_TOO_FEW_CORES', /3 ranks need 3 physical cores.*--oversubscribe/),
    )
    const shared = plan(machine, 5, { oversubscribe: true })
    assert.deepEqual(coresOf(shared), ['0', '1', '0', '1', '0'])
    assert.equal(shared.isOversubscribed, true)
    assert.equal(plan(machine, 2, { oversubscribe: true }).isOversubscribed, false)
    for (const ranks of [0, -1, 1.5, Number.NaN])
      assert.throws(() => plan(machine, ranks), failsWith('ERR_INVALID_OPTION'))
  })

  it('keeps threads within the processor limit of any cgroup above', () => {
    const files = {
      'proc/self/cgroup': '0::/pod/box',
      'proc/self/mountinfo': '31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw',
      'sys/fs/cgroup/pod/cpu.max': '400000 100000',
      'sys/fs/cgroup/pod/box/cpu.max': 'max 100000',
      'sys/fs/cgroup/pod/memory.max': '204800000',
      'sys/fs/cgroup/pod/memory.current': '104800000',
      'sys/fs/cgroup/pod/box/memory.max': 'max',
    }
    const machine: Machine = { packages: 1, coresPerNode: 16, files }
    const topology = topologyOf(machine)
    assert.equal(topology.cpuLimit, 4)
    assert.equal(topology.memoryLimitBytes, 204_800_000)
    assert.equal(topology.memoryAvailableBytes, 100_000_000)
    const two = plan(machine, 2)
    assert.deepEqual(
      two.ranks.map(({ cores }) => cores.length),
      [2, 2],
    )
    assert.ok(two.notes.some((note) => note.includes('/sys/fs/cgroup/pod/cpu.max allows 4 processors')))
    assert.throws(() => plan(machine, 5), failsWith('ERR_TOO_FEW_CORES', /cpu.max allows 4 processors/))
  })

  it('reads limits of version 1 cgroups', () => {
    const topology = topologyOf({
      packages: 1,
      coresPerNode: 4,
      files: {
        'proc/self/cgroup': '4:memory:/a\n3:cpu,cpuacct:/a',
        'proc/self/mountinfo':
          '32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n' +
          '35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory',
        'sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us': '150000',
        'sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us': '100000',
        'sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us': '-1',
        'sys/fs/cgroup/memory/a/memory.limit_in_bytes': '9223372036854771712',
        'sys/fs/cgroup/memory/memory.limit_in_bytes': '1048576',
        'sys/fs/cgroup/memory/memory.usage_in_bytes': '1048575',
      },
    })
    assert.equal(topology.cpuLimit, 1.5)
    assert.equal(topology.memoryLimitBytes, 1_048_576)
    assert.equal(topology.memoryAvailableBytes, 1)
  })

  it('takes explicit lists, even or one a rank', () => {
    const machine: Machine = { packages: 2, coresPerNode: 32 }
    const even = plan(machine, 4, { coreList: '0-27,32-59' })
    assert.deepEqual(coresOf(even), ['0-13', '14-27', '32-45', '46-59'])
    assert.deepEqual(coresOf(plan(machine, 2, { coreList: '0-3,8|32-40:2' })), ['0-3,8', '32,34,36,38,40'])
    const crossing = plan(machine, 2, { coreList: '0-15,32-35' })
    assert.ok(crossing.notes.some((note) => note === 'rank 1 spans nodes 0, 1'))
  })

  it('refuses lists that cannot be, and says which part', () => {
    const machine: Machine = { packages: 1, coresPerNode: 8, allowed: '0-3,5', online: '0-6' }
    const refused = (coreList: string, text: RegExp, ranks = 2) =>
      assert.throws(() => plan(machine, ranks, { coreList }), failsWith('ERR_BAD_CORE_LIST', text), coreList)
    refused('', /'' is no list/)
    refused('a', /'a' is no list/)
    refused('3-1', /no list/)
    refused('0x1', /no list/)
    refused('1-2-3', /no list/)
    refused('0-', /no list/)
    refused('0,,1', /no list/)
    refused('0-1|', /'' is no list/)
    refused('0,1,0', /core 0 is named twice/)
    refused('0-1|1-2', /core 1 is named twice/)
    refused('0,4', /core 4 is not allowed.*allowed: 0-3,5/)
    refused('0,7', /core 7 is not online/)
    refused('0,99999', /not online/)
    refused('0|1|2', /3 lists of cores for 2 ranks/)
    refused('0', /1 cores for 2 ranks/)
  })

  it('says so when a list names both threads of a core', () => {
    const machine: Machine = { packages: 1, coresPerNode: 4, threadsPerCore: 2 }
    const both = plan(machine, 1, { coreList: '0,4' })
    assert.ok(both.notes.some((note) => note.includes('both hardware threads')))
  })

  it('never gives a processor twice, nor one that is not allowed, on any machine', () => {
    const machines = fc.record({
      packages: fc.integer({ min: 1, max: 2 }),
      nodesPerPackage: fc.integer({ min: 1, max: 2 }),
      coresPerNode: fc.integer({ min: 1, max: 4 }),
      threadsPerCore: fc.integer({ min: 1, max: 2 }),
      numbering: fc.constantFrom('siblingsLast' as const, 'siblingsAdjacent' as const, 'alternatingNodes' as const),
    })
    fc.assert(
      fc.property(machines, fc.integer({ min: 1, max: 20 }), (machine, ranks) => {
        const topology = topologyOf(machine)
        if (ranks > topology.cores.length) {
          assert.throws(() => planBinding({ ranks, topology }), failsWith('ERR_TOO_FEW_CORES'))
          return
        }
        const { ranks: bindings } = planBinding({ ranks, topology })
        assert.equal(bindings.length, ranks)
        const used = bindings.flatMap(({ cores }) => cores)
        const masks = bindings.flatMap(({ cpus }) => cpus)
        assert.equal(new Set(used).size, used.length)
        assert.equal(new Set(masks).size, masks.length)
        assert.ok(masks.every((cpu) => topology.allowedCpus.includes(cpu)))
        assert.equal(new Set(bindings.map(({ cores }) => cores.length)).size, 1)
        assert.ok((bindings[0]?.cores.length ?? 0) >= 1)
      }),
      { numRuns: 100 },
    )
  })
})

describe('launcher: lists of processors', () => {
  it('reads what it writes', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.integer({ min: 0, max: 4000 }), { maxLength: 80 }), (cpus) => {
        assert.deepEqual(
          parseCpuList(formatCpuList(cpus)),
          [...cpus].sort((a, b) => a - b),
        )
      }),
    )
    assert.equal(formatCpuList([5, 1, 2, 3]), '1-3,5')
  })

  it('takes nothing else for a list', () => {
    for (const text of ['-1', '1-', 'x', '1;2', '٣', '1e3', '1,-', '999999', '4-2', '0-4:0'])
      assert.equal(parseCpuList(text), undefined, text)
    assert.deepEqual(parseCpuList(' 0-3 , 8\n'), [0, 1, 2, 3, 8])
    assert.deepEqual(parseCpuList(''), [])
  })
})
