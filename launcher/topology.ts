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

/** Of setrlimit; Infinity where there is none. */
export interface ProcessLimits {
  readonly addressSpaceBytes: number
  /** The limit without what this process has mapped; a rank starts with about the same. */
  readonly addressSpaceLeft: number
  readonly dataBytes: number
  readonly dataLeft: number
  readonly openFiles: number
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
  /** Files that decide the three above. */
  readonly decidedBy: {
    readonly cpu: string | undefined
    readonly memoryLimit: string | undefined
    readonly memoryAvailable: string
  }
  readonly processLimits: ProcessLimits
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
  const { cpu, memory: memoryLimit, memoryLeft } = readCgroupLimits(files)
  const available = least(memoryLeft, { value: memory.available, file: '/proc/meminfo (MemAvailable)' })
  return {
    allowedCpus,
    onlineCpus,
    cores: readCores(allowedCpus, nodes, text, list),
    nodes,
    cpuLimit: cpu?.value,
    memoryLimitBytes: memoryLimit?.value,
    memoryAvailableBytes: available.value,
    memoryTotalBytes: memory.total,
    decidedBy: { cpu: cpu?.file, memoryLimit: memoryLimit?.file, memoryAvailable: available.file },
    processLimits: readProcessLimits(files),
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

interface Mount {
  /** What part of the hierarchy is mounted, and where, without the leading slash. */
  readonly root: string
  readonly at: string
  /** Of a version 1 hierarchy; undefined: version 2. */
  readonly controllers: readonly string[] | undefined
}

/** The cgroup hierarchies as this process sees them: the places differ between systems, and inside containers. */
function readCgroupMounts(mountinfo: string): Mount[] {
  const unescape = (path: string): string =>
    path.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)))
  return mountinfo.split('\n').flatMap((line): Mount[] => {
    const match = /^\S+ \S+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)/.exec(line)
    if (match === null) return []
    const [root = '/', at = '/', type, options = ''] = match.slice(1)
    const controllers = type === 'cgroup2' ? undefined : options.split(',')
    return [{ root: unescape(root), at: unescape(at).slice(1), controllers }]
  })
}

/** Folders of a cgroup and of all above it that can be seen. A path outside of what is mounted leaves the mount's own root. */
function foldersUp({ root, at }: Mount, path: string): string[] {
  const below = root === '/' ? path : path === root || path.startsWith(`${root}/`) ? path.slice(root.length) : '/'
  const folders: string[] = []
  for (let folder = below.split('/').includes('..') ? '/' : join('/', below); ; folder = dirname(folder)) {
    folders.push(folder === '/' ? at : join(at, folder))
    if (folder === '/') return folders
  }
}

/** A limit and the file that sets it. */
export interface Limit {
  readonly value: number
  readonly file: string
}

interface CgroupLimits {
  readonly cpu: Limit | undefined
  readonly memory: Limit | undefined
  readonly memoryLeft: Limit | undefined
}

const least = (a: Limit | undefined, b: Limit): Limit => (a === undefined || b.value < a.value ? b : a)

/** The tightest limits from this process's cgroup up to the root, in version 2 and version 1 hierarchies. */
function readCgroupLimits({ text }: MachineFiles): CgroupLimits {
  let cpu: Limit | undefined
  let memory: Limit | undefined
  let memoryLeft: Limit | undefined
  const number = (path: string): number | undefined => {
    const found = text(path)?.trim()
    return found === undefined || !/^-?[0-9]+$/.test(found) ? undefined : Number(found)
  }
  const limitMemory = (folder: string, limitName: string, usageName: string, prefix: string): void => {
    const file = `${folder}/${limitName}`
    const limit = number(file)
    // Version 1 writes "no limit" as the largest page-aligned number.
    if (limit === undefined || limit > 2 ** 60) return
    // Files that were read count as usage, but go as soon as memory is wanted: a model that was loaded once fits again.
    const stat = text(`${folder}/memory.stat`) ?? ''
    const field = (name: string): number => Number(new RegExp(`^${prefix}${name} ([0-9]+)$`, 'm').exec(stat)?.[1] ?? 0)
    const used = Math.max(0, (number(`${folder}/${usageName}`) ?? 0) - field('inactive_file') - field('active_file'))
    memory = least(memory, { value: limit, file: `/${file}` })
    memoryLeft = least(memoryLeft, { value: Math.max(0, limit - used), file: `/${file}` })
  }
  // "No limit" is `max` in version 2, which is no number, and -1 in version 1.
  const limitCpu = (quota = 0, period = 0, file: string): void => {
    if (!(quota > 0 && period > 0)) return
    cpu = least(cpu, { value: quota / period, file: `/${file}` })
  }
  const mounts = readCgroupMounts(text('proc/self/mountinfo') ?? '')
  for (const line of (text('proc/self/cgroup') ?? '').split('\n')) {
    const match = /^[0-9]+:([^:]*):(\/.*)$/.exec(line)
    if (match === null) continue
    const [names = '', path = '/'] = match.slice(1)
    const isVersion2 = names === ''
    for (const mount of mounts) {
      const isOurs = isVersion2
        ? mount.controllers === undefined
        : names.split(',').some((name) => mount.controllers?.includes(name))
      if (!isOurs) continue
      for (const folder of foldersUp(mount, path)) {
        if (isVersion2) {
          const [quota, period] = (text(`${folder}/cpu.max`) ?? 'max').trim().split(/\s+/).map(Number)
          limitCpu(quota, period, `${folder}/cpu.max`)
          // Beyond memory.high nobody is killed, but all are throttled to a crawl.
          for (const name of ['memory.max', 'memory.high']) limitMemory(folder, name, 'memory.current', '')
        } else {
          const file = `${folder}/cpu.cfs_quota_us`
          limitCpu(number(file), number(`${folder}/cpu.cfs_period_us`), file)
          limitMemory(folder, 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_')
        }
      }
    }
  }
  return { cpu, memory, memoryLeft }
}

/** What setrlimit (ulimit) leaves this process; what it starts inherits the limits. */
function readProcessLimits({ text }: MachineFiles): ProcessLimits {
  const limits = text('proc/self/limits') ?? ''
  const status = text('proc/self/status') ?? ''
  const soft = (name: string): number =>
    Number(new RegExp(`^${name} +([0-9]+) `, 'm').exec(limits)?.[1] ?? Number.POSITIVE_INFINITY)
  const used = (name: string): number =>
    1024 * Number(new RegExp(`^${name}:\\s*([0-9]+) kB`, 'm').exec(status)?.[1] ?? 0)
  return {
    addressSpaceBytes: soft('Max address space'),
    addressSpaceLeft: soft('Max address space') - used('VmSize'),
    dataBytes: soft('Max data size'),
    dataLeft: soft('Max data size') - used('VmData'),
    openFiles: soft('Max open files'),
  }
}
