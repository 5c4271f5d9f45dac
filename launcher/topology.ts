// The machine as ranks see it: allowed physical cores, NUMA nodes, limits of the cgroups above this process. All of it is text in
// /proc and /sys, read through MachineFiles, so that fixtures stand in for machines that are not here. Words as in hwloc.
// What to do with it is decided in binding.ts, which is pure.

import { readFileSync, readdirSync } from 'node:fs'
import { availableParallelism, freemem, totalmem } from 'node:os'
import { dirname, join } from 'node:path'

/** A physical core of which this process may use at least one hardware thread. */
export interface Core {
  /** The lowest allowed hardware thread: what a compute thread is pinned to. */
  readonly cpu: number
  /** All allowed hardware threads of the core, ascending; cpu comes first. */
  readonly cpus: readonly number[]
  readonly package: number
  /** NUMA node of its processors. */
  readonly node: number
  /** Lowest processor that shares the last-level cache: cores with equal numbers share one. */
  readonly cache: number
}

export interface NumaNode {
  readonly node: number
  readonly cpus: readonly number[]
  readonly memoryBytes: number
  readonly freeBytes: number
  /** Distance to each node, in the order of `Topology.nodes`; 10 is the node itself. */
  readonly distances: readonly number[]
}

export interface HugePages {
  /** 'always', 'madvise', 'never', or 'unknown'. */
  readonly transparent: string
  readonly transparentShared: string
  readonly reserved: number
  readonly free: number
  readonly pageBytes: number
}

export interface Topology {
  readonly allowedCpus: readonly number[]
  readonly onlineCpus: readonly number[]
  /** Ordered by package, node, cache, processor: neighbours in the list are neighbours in the machine. */
  readonly cores: readonly Core[]
  readonly nodes: readonly NumaNode[]
  /** Processors' worth of time that the cgroups allow; undefined: no limit. */
  readonly cpuLimit: number | undefined
  /** The lowest memory limit of the cgroups; undefined: none. */
  readonly memoryLimitBytes: number | undefined
  /** What may still be allocated: MemAvailable, or less where a cgroup leaves less. */
  readonly memoryAvailableBytes: number
  readonly memoryTotalBytes: number
  readonly hugePages: HugePages
}

/** `0-3,8` -> [0, 1, 2, 3, 8]; undefined when it is no such list. Ascending or not, repeats or not: the caller judges. */
export function parseCpuList(text: string): number[] | undefined {
  const cpus: number[] = []
  if (text.trim() === '') return cpus
  for (const item of text.trim().split(',')) {
    const match = /^ *([0-9]{1,5})(?:-([0-9]{1,5})(?::([0-9]{1,5}))?)? *$/.exec(item)
    if (match === null) return undefined
    const first = Number(match[1])
    const last = match[2] === undefined ? first : Number(match[2])
    const step = match[3] === undefined ? 1 : Number(match[3])
    if (last < first || step < 1) return undefined
    for (let cpu = first; cpu <= last; cpu += step) cpus.push(cpu)
  }
  return cpus
}

/** [0, 1, 2, 3, 8] -> `0-3,8`. */
export function formatCpuList(cpus: readonly number[]): string {
  const sorted = [...new Set(cpus)].sort((a, b) => a - b)
  const runs: [number, number][] = []
  for (const cpu of sorted) {
    const run = runs.at(-1)
    if (run !== undefined && run[1] === cpu - 1) run[1] = cpu
    else runs.push([cpu, cpu])
  }
  return runs.map(([first, last]) => (first === last ? String(first) : `${first}-${last}`)).join(',')
}

/** The files that describe a machine. */
export interface MachineFiles {
  /** Content, or undefined where there is no such file. */
  readonly text: (path: string) => string | undefined
  /** Names in a folder; none where there is no such folder. */
  readonly names: (folder: string) => readonly string[]
}

/** This machine's; or those of another one, copied below `root`. */
export function filesBelow(root: string): MachineFiles {
  const orElse = <T, U>(read: () => T, otherwise: U): T | U => {
    try {
      return read()
    } catch {
      return otherwise
    }
  }
  return {
    text: (path) => orElse(() => readFileSync(join(root, path), 'utf8'), undefined),
    names: (folder) => orElse(() => readdirSync(join(root, folder)), []),
  }
}

/** The machine as it is for the process `/proc/self`. Missing files mean a simpler machine, never an error. */
export function readTopology(files: MachineFiles = filesBelow('/')): Topology {
  const { text } = files
  const list = (path: string): number[] | undefined => {
    const found = text(path)
    return found === undefined ? undefined : parseCpuList(found)
  }

  const everyCpu = Array.from({ length: availableParallelism() }, (_, cpu) => cpu)
  const status = /^Cpus_allowed_list:\s*(.*)$/m.exec(text('proc/self/status') ?? '')?.[1]
  const allowed = (status === undefined ? undefined : parseCpuList(status)) ?? everyCpu
  const onlineCpus = list('sys/devices/system/cpu/online') ?? allowed
  const online = new Set(onlineCpus)
  const allowedCpus = allowed.filter((cpu) => online.has(cpu))

  const memory = readMeminfo(text('proc/meminfo'))
  const nodes = readNodes(files, list) ?? [
    { node: 0, cpus: onlineCpus, memoryBytes: memory.total, freeBytes: memory.free, distances: [10] },
  ]
  const limits = readLimits(files)
  return {
    allowedCpus,
    onlineCpus,
    cores: readCores(allowedCpus, nodes, text, list),
    nodes,
    cpuLimit: limits.cpu,
    memoryLimitBytes: limits.memory,
    memoryAvailableBytes: Math.min(memory.available, limits.memoryLeft),
    memoryTotalBytes: memory.total,
    hugePages: {
      transparent: selected(text('sys/kernel/mm/transparent_hugepage/enabled')),
      transparentShared: selected(text('sys/kernel/mm/transparent_hugepage/shmem_enabled')),
      reserved: memory.hugeTotal,
      free: memory.hugeFree,
      pageBytes: memory.hugePage,
    },
  }
}

/** `always [madvise] never` -> 'madvise'. */
function selected(text: string | undefined): string {
  return /\[(\w+)\]/.exec(text ?? '')?.[1] ?? 'unknown'
}

function readMeminfo(text: string | undefined) {
  const field = (name: string): number | undefined => {
    const found = new RegExp(`^${name}:\\s*([0-9]+)( kB)?`, 'm').exec(text ?? '')
    return found === null ? undefined : Number(found[1]) * (found[2] === undefined ? 1 : 1024)
  }
  const free = field('MemFree') ?? freemem()
  return {
    total: field('MemTotal') ?? totalmem(),
    free,
    available: field('MemAvailable') ?? free,
    hugeTotal: field('HugePages_Total') ?? 0,
    hugeFree: field('HugePages_Free') ?? 0,
    hugePage: field('Hugepagesize') ?? 0,
  }
}

type ReadText = MachineFiles['text']
type ReadList = (path: string) => number[] | undefined

/** Node numbers may have holes (0 and 8), so the folder is listed and not counted. */
function readNodes({ text, names }: MachineFiles, list: ReadList): NumaNode[] | undefined {
  const folder = 'sys/devices/system/node'
  const nodes: NumaNode[] = []
  const numbers = names(folder)
    .flatMap((name) => /^node([0-9]+)$/.exec(name)?.[1] ?? [])
    .map(Number)
    .sort((a, b) => a - b)
  for (const node of numbers) {
    const cpus = list(`${folder}/node${node}/cpulist`)
    if (cpus === undefined) continue
    const meminfo = text(`${folder}/node${node}/meminfo`) ?? ''
    const bytes = (name: string) => Number(new RegExp(`${name}:\\s*([0-9]+) kB`).exec(meminfo)?.[1] ?? 0) * 1024
    const distances = (text(`${folder}/node${node}/distance`) ?? '').trim().split(/\s+/).filter(Boolean).map(Number)
    nodes.push({ node, cpus, memoryBytes: bytes('MemTotal'), freeBytes: bytes('MemFree'), distances })
  }
  return nodes.length === 0 ? undefined : nodes
}

function readCores(allowedCpus: readonly number[], nodes: readonly NumaNode[], text: ReadText, list: ReadList): Core[] {
  const allowed = new Set(allowedCpus)
  const nodeOf = new Map<number, number>()
  for (const { node, cpus } of nodes) for (const cpu of cpus) if (!nodeOf.has(cpu)) nodeOf.set(cpu, node)
  const cores: Core[] = []
  const taken = new Set<number>()
  for (const cpu of [...allowedCpus].sort((a, b) => a - b)) {
    if (taken.has(cpu)) continue
    const folder = `sys/devices/system/cpu/cpu${cpu}`
    const siblings = list(`${folder}/topology/core_cpus_list`) ??
      list(`${folder}/topology/thread_siblings_list`) ?? [cpu]
    const cpus = siblings.filter((sibling) => allowed.has(sibling))
    if (!cpus.includes(cpu)) cpus.push(cpu)
    cpus.sort((a, b) => a - b)
    for (const sibling of cpus) taken.add(sibling)
    cores.push({
      cpu,
      cpus,
      package: Number(text(`${folder}/topology/physical_package_id`) ?? 0),
      node: nodeOf.get(cpu) ?? nodes[0]?.node ?? 0,
      cache: Math.min(...(list(`${folder}/cache/index3/shared_cpu_list`) ?? [cpu])),
    })
  }
  return cores.sort((a, b) => a.package - b.package || a.node - b.node || a.cache - b.cache || a.cpu - b.cpu)
}

interface Limits {
  readonly cpu: number | undefined
  readonly memory: number | undefined
  /** Infinity without a limit. */
  readonly memoryLeft: number
}

/** The tightest limits from this process's cgroup up to the root, in version 2 and version 1 hierarchies. */
function readLimits({ text }: MachineFiles): Limits {
  let cpu = Infinity
  let memory = Infinity
  let memoryLeft = Infinity
  const number = (path: string): number | undefined => {
    const found = text(path)?.trim()
    return found === undefined || !/^-?[0-9]+$/.test(found) ? undefined : Number(found)
  }
  const limitMemory = (limit: number | undefined, used: number | undefined): void => {
    // Version 1 writes "no limit" as the largest page-aligned number.
    if (limit === undefined || limit > 2 ** 60) return
    memory = Math.min(memory, limit)
    memoryLeft = Math.min(memoryLeft, Math.max(0, limit - (used ?? 0)))
  }
  for (const line of (text('proc/self/cgroup') ?? '').split('\n')) {
    const match = /^[0-9]+:([^:]*):(\/.*)$/.exec(line)
    if (match === null) continue
    const [controllers = '', path = '/'] = match.slice(1)
    const isVersion2 = controllers === ''
    const mounts = isVersion2 ? ['sys/fs/cgroup', 'sys/fs/cgroup/unified'] : [`sys/fs/cgroup/${controllers}`]
    for (const mount of mounts) {
      // Inside a container the path may name folders that are not mounted here: then only the upper ones are found.
      for (let folder = path; ; folder = dirname(folder)) {
        const at = join(mount, folder)
        if (isVersion2) {
          const [quota, period] = (text(join(at, 'cpu.max')) ?? 'max 1').trim().split(/\s+/)
          if (quota !== undefined && quota !== 'max') cpu = Math.min(cpu, Number(quota) / Number(period ?? 100_000))
          limitMemory(number(join(at, 'memory.max')), number(join(at, 'memory.current')))
        } else if (controllers.split(',').includes('cpu')) {
          const quota = number(join(at, 'cpu.cfs_quota_us')) ?? -1
          const period = number(join(at, 'cpu.cfs_period_us')) ?? 100_000
          if (quota > 0) cpu = Math.min(cpu, quota / period)
        } else if (controllers === 'memory') {
          limitMemory(number(join(at, 'memory.limit_in_bytes')), number(join(at, 'memory.usage_in_bytes')))
        }
        if (folder === '/') break
      }
    }
  }
  return { cpu: cpu === Infinity ? undefined : cpu, memory: memory === Infinity ? undefined : memory, memoryLeft }
}
