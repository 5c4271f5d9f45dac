// Which cores each rank gets: a pure function of the topology and the wishes, so that every machine's plan can be tested, printed
// and compared without the machine. Compute threads get one hardware thread of each physical core; the siblings stay in the rank's
// mask, for its JavaScript. All ranks get the same number of cores: shards are equal, and the slowest rank sets the pace.

import { LauncherError } from './errors.js'
import { type Core, type Topology, formatCpuList, parseCpuList } from './topology.js'

export interface RankBinding {
  /** One processor for each compute thread. */
  readonly cores: readonly number[]
  /** The process's mask: cores and their allowed siblings. */
  readonly cpus: readonly number[]
  /** NUMA nodes whose memory is preferred; empty on a machine with one node. */
  readonly nodes: readonly number[]
}

export interface BindingPlan {
  readonly ranks: readonly RankBinding[]
  /** Ranks share cores: spinning is pointless then. */
  readonly isOversubscribed: boolean
  /** What a reader of the plan should know: idle cores, limits, nodes that are crossed. */
  readonly notes: readonly string[]
}

export interface BindingOptions {
  readonly ranks: number
  readonly topology: Topology
  /** Let ranks share cores when there are too few, instead of an error. */
  readonly oversubscribe?: boolean
  /** Explicit cores: `0-3,8-11` cut evenly, or one list a rank, `0-3|8-11`. */
  readonly coreList?: string | undefined
}

/** One rank per NUMA node that has usable cores. */
export function defaultRanks(topology: Topology): number {
  return Math.max(1, new Set(topology.cores.map((core) => core.node)).size)
}

export function planBinding(options: BindingOptions): BindingPlan {
  const { ranks, topology, coreList } = options
  if (!Number.isSafeInteger(ranks) || ranks < 1) {
    throw new LauncherError('ERR_INVALID_OPTION', `the number of ranks must be a positive integer, not ${ranks}`, {
      ranks,
    })
  }
  const notes: string[] = []
  const { cores } = topology
  const limit = threadLimit(topology) ?? cores.length
  if (coreList !== undefined) {
    const bindings = explicit(ranks, topology, coreList, notes)
    return { ranks: bindings, isOversubscribed: exceedsQuota(bindings, options, notes), notes }
  }
  if (ranks > Math.min(cores.length, limit)) return share(options, limit)

  const parts = split(ranks, cores)
  const smallest = Math.min(...parts.map((part) => part.length))
  const allowance = Math.floor(limit / ranks)
  const count = Math.min(smallest, allowance)
  if (allowance < smallest) {
    notes.push(`${quotaOf(topology)}: ${count} of ${smallest} cores a rank are used`)
  } else if (count * ranks < cores.length) {
    notes.push(`${cores.length - count * ranks} of ${cores.length} cores stay idle: all ranks get the same number`)
  }
  if (cores.some((core) => core.cpus.length > 1)) {
    notes.push(
      'one hardware thread of each core computes; its siblings are left to JavaScript and the system on purpose',
    )
  }
  const bindings = parts.map((part, rank) => {
    const binding = bind(part.slice(0, count), topology)
    const crossed = new Set(part.slice(0, count).map((core) => core.node))
    if (ranks >= defaultRanks(topology) && crossed.size > 1)
      notes.push(`rank ${rank} spans nodes ${[...crossed].join(', ')}`)
    return binding
  })
  return { ranks: bindings, isOversubscribed: false, notes }
}

/** Compute threads that the cgroups leave time for; undefined: no limit. A quota of a little less than a whole one counts as that. */
export function threadLimit({ cpuLimit }: Topology): number | undefined {
  return cpuLimit === undefined ? undefined : Math.max(1, Math.floor(cpuLimit + 0.05))
}

const quotaOf = ({ cpuLimit, decidedBy }: Topology): string =>
  `${decidedBy.cpu ?? 'the cgroup'} allows ${cpuLimit} processors of time`

/** Threads beyond the quota would be stopped in the middle of what the others wait for: an error, unless it is asked for. */
function exceedsQuota(
  bindings: readonly RankBinding[],
  { topology, coreList, oversubscribe }: BindingOptions,
  notes: string[],
): boolean {
  const threads = bindings.reduce((sum, { cores }) => sum + cores.length, 0)
  const limit = threadLimit(topology)
  if (limit === undefined || threads <= limit) return false
  if (oversubscribe !== true) {
    throw new LauncherError(
      'ERR_TOO_FEW_CORES',
      `'${coreList}' names cores for ${threads} threads, and ${quotaOf(topology)}. Name fewer cores, raise the limit, or add --oversubscribe`,
      { threads, cpuLimit: topology.cpuLimit, coreList },
    )
  }
  notes.push(`${quotaOf(topology)}, and ${threads} threads share it: expect correct results, not speed`)
  return true
}

/** Too few cores for the ranks: round robin if asked for. */
function share({ ranks, topology, oversubscribe }: BindingOptions, limit: number): BindingPlan {
  const { cores } = topology
  const usable = cores.slice(0, Math.max(1, limit))
  if (oversubscribe !== true || cores.length === 0) {
    const why = limit < cores.length ? `; ${quotaOf(topology)}` : ''
    throw new LauncherError(
      'ERR_TOO_FEW_CORES',
      `${ranks} ranks need ${ranks} physical cores, and this process may use ${usable.length}` +
        ` (processors ${formatCpuList(topology.allowedCpus)}${why}). Start fewer ranks${limit < cores.length ? ', raise the limit' : ''}, or let them share cores with --oversubscribe`,
      { ranks, cores: usable.length, allowed: formatCpuList(topology.allowedCpus) },
    )
  }
  const bindings = Array.from({ length: ranks }, (_, rank) => {
    const core = usable[rank % usable.length]
    return bind(core === undefined ? [] : [core], topology)
  })
  const notes = [
    `${ranks} ranks share ${usable.length} ${usable.length === 1 ? 'core' : 'cores'}: expect correct results, not speed`,
  ]
  return { ranks: bindings, isOversubscribed: true, notes }
}

/**
 * Cores in machine order, cut into one run a rank. Fewer ranks than nodes: whole neighbouring nodes. Otherwise ranks go to nodes in
 * proportion to their cores (largest remainder), and each node's cores are cut evenly, so that no rank crosses a node.
 */
function split(ranks: number, cores: readonly Core[]): Core[][] {
  const byNode = new Map<number, Core[]>()
  for (const core of cores) byNode.set(core.node, [...(byNode.get(core.node) ?? []), core])
  const nodes = [...byNode.values()]
  if (ranks <= nodes.length) {
    return Array.from({ length: ranks }, (_, rank) =>
      nodes.slice(Math.floor((rank * nodes.length) / ranks), Math.floor(((rank + 1) * nodes.length) / ranks)).flat(),
    )
  }
  const quotas = nodes.map((node) => (node.length * ranks) / cores.length)
  const counts = quotas.map(Math.floor)
  const order = quotas
    .map((quota, i) => ({ i, rest: quota - Math.floor(quota) }))
    .sort((a, b) => b.rest - a.rest || a.i - b.i)
  const missing = ranks - counts.reduce((sum, count) => sum + count, 0)
  for (const { i } of order.slice(0, missing)) counts[i] = (counts[i] ?? 0) + 1
  return nodes.flatMap((node, i) => {
    const count = counts[i] ?? 0
    const each = count === 0 ? 0 : Math.floor(node.length / count)
    return Array.from({ length: count }, (_, part) => node.slice(part * each, (part + 1) * each))
  })
}

function bind(cores: readonly Core[], topology: Topology): RankBinding {
  return {
    cores: cores.map((core) => core.cpu),
    cpus: cores.flatMap((core) => core.cpus).sort((a, b) => a - b),
    nodes: memoryNodes(cores, topology),
  }
}

/** Nodes that hold the cores' memory: their own, or the nearest with memory where theirs has none. */
function memoryNodes(cores: readonly Core[], { nodes }: Topology): number[] {
  const withMemory = nodes.filter((node) => node.memoryBytes > 0)
  if (withMemory.length < 2) return []
  const wanted = new Set<number>()
  for (const { cpu } of cores) {
    const own = nodes.filter((node) => node.cpus.includes(cpu))
    const local = own.filter((node) => node.memoryBytes > 0)
    for (const { node } of local) wanted.add(node)
    if (local.length > 0) continue
    const distance = (to: number) => own[0]?.distances[to] ?? Infinity
    const nearest = withMemory.reduce((best, node) =>
      distance(nodes.indexOf(node)) < distance(nodes.indexOf(best)) ? node : best,
    )
    wanted.add(nearest.node)
  }
  return [...wanted].sort((a, b) => a - b)
}

function explicit(ranks: number, topology: Topology, coreList: string, notes: string[]): RankBinding[] {
  const bad = (message: string) => new LauncherError('ERR_BAD_CORE_LIST', message, { coreList })
  const lists = coreList.split('|').map((text) => {
    const cpus = parseCpuList(text)
    if (cpus === undefined || cpus.length === 0) {
      throw bad(
        `'${text}' is no list of cores: write 0-3,8 for one list that is cut evenly, or 0-3|8-11 for one list a rank`,
      )
    }
    return cpus
  })
  if (lists.length > 1 && lists.length !== ranks)
    throw bad(`${lists.length} lists of cores for ${ranks} ranks: '${coreList}'`)
  const all = lists.flat()
  const repeated = all.find((cpu, i) => all.indexOf(cpu) !== i)
  if (repeated !== undefined) throw bad(`core ${repeated} is named twice in '${coreList}'`)
  const allowed = new Set(topology.allowedCpus)
  const refused = all.filter((cpu) => !allowed.has(cpu))
  if (refused.length > 0) {
    const online = new Set(topology.onlineCpus)
    const reason = refused.some((cpu) => online.has(cpu)) ? 'not allowed for this process' : 'not online'
    throw bad(`core ${formatCpuList(refused)} is ${reason}; allowed: ${formatCpuList(topology.allowedCpus)}`)
  }
  if (all.length < ranks) throw bad(`${all.length} cores for ${ranks} ranks: '${coreList}'`)
  const each = Math.floor(all.length / ranks)
  if (lists.length === 1 && each * ranks < all.length)
    notes.push(`${all.length - each * ranks} of ${all.length} listed cores stay idle`)
  const flat = [...all].sort((a, b) => a - b)
  const parts =
    lists.length > 1 || ranks === 1
      ? lists
      : Array.from({ length: ranks }, (_, rank) => flat.slice(rank * each, (rank + 1) * each))
  return parts.map((cpus, rank) => {
    const cores = topology.cores.filter((core) => core.cpus.some((cpu) => cpus.includes(cpu)))
    if (cores.length < cpus.length)
      notes.push(`rank ${rank} computes on both hardware threads of a core (${formatCpuList(cpus)})`)
    const nodes = new Set(cores.map((core) => core.node))
    if (nodes.size > 1) notes.push(`rank ${rank} spans nodes ${[...nodes].join(', ')}`)
    const mask = new Set([...cpus, ...cores.flatMap((core) => core.cpus).filter((cpu) => !all.includes(cpu))])
    return { cores: cpus, cpus: [...mask].sort((a, b) => a - b), nodes: memoryNodes(cores, topology) }
  })
}
