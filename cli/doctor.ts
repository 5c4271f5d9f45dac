// `tilerank doctor`: what runs here and why, and what is missing with the way to mend it. Starts no rank and changes nothing.
// Exit code 1 when something essential is missing.

import { existsSync } from 'node:fs'
import type { Command } from 'commander'
import { type Topology, defaultRanks, execHelper, formatCpuList, readTopology } from '../launcher/index.js'
import { AddonError, addonPaths, isSupportedPlatform, nativeAddon } from '../native/index.js'

interface Tier {
  readonly name: string
  readonly available: boolean
  readonly reason: string
}

interface Finding {
  readonly level: 'missing' | 'warning'
  readonly message: string
  readonly remedy: string
}

interface Report {
  readonly node: string
  readonly platform: string
  readonly addon: { readonly path: string; readonly isLoaded: boolean; readonly problem: string | null }
  readonly tiers: readonly Tier[]
  readonly tier: string | null
  readonly topology: Topology
  /** '' where the kernel lets this process bind threads, or memory; else what it says. */
  readonly refused: { readonly affinity: string; readonly memoryPolicy: string }
  readonly ranks: number
  readonly findings: readonly Finding[]
}

const oldestNode = [20, 19] as const

export function registerDoctor(program: Command): void {
  program
    .command('doctor')
    .description('show what this machine offers, what is missing, and how to mend it')
    .option('--json', 'as JSON')
    .action(({ json }: { json?: boolean }) => {
      const report = examine()
      process.stdout.write(json === true ? `${JSON.stringify(report, null, 2)}\n` : format(report))
      if (report.findings.some(({ level }) => level === 'missing')) process.exitCode = 1
    })
}

/** The border to the addon: whatever it says is checked here. */
function readTiers(addon: unknown): Tier[] {
  const tiers: unknown =
    typeof addon === 'object' && addon !== null && 'tiers' in addon && typeof addon.tiers === 'function'
      ? Reflect.apply(addon.tiers, addon, [])
      : undefined
  if (!Array.isArray(tiers))
    throw new AddonError('ERR_ADDON_BROKEN', 'the addon does not fit: run `npx tilerank build --force`')
  return tiers.map((tier: unknown) => {
    const { name, available, reason } = Object(tier) as Record<string, unknown>
    return { name: String(name), available: available === true, reason: String(reason) }
  })
}

/** Asks the kernel for what already is: whether a sandbox forbids binding is known only by trying. */
function tryBinding(addon: unknown): Report['refused'] {
  const call = (name: string, ...args: unknown[]): unknown => {
    const found: unknown = typeof addon === 'object' && addon !== null ? Reflect.get(addon, name) : undefined
    return typeof found === 'function' ? Reflect.apply(found, addon, args) : undefined
  }
  let affinity = ''
  try {
    call('setAffinity', 0, call('getAffinity', 0))
  } catch (error) {
    affinity = error instanceof Error ? error.message : String(error)
  }
  const memoryPolicy = call('setMemoryPolicy', [])
  return { affinity, memoryPolicy: typeof memoryPolicy === 'string' ? memoryPolicy : '' }
}

/** TILERANK_ISA caps the tier: the best one that runs at or below it. */
function chooseTier(tiers: readonly Tier[], cap: string | undefined): string | null {
  const name = cap?.replace(/!$/, '')
  const from = name === undefined || name === '' ? 0 : tiers.findIndex((tier) => tier.name === name)
  return from < 0 ? null : (tiers.slice(from).find(({ available }) => available)?.name ?? null)
}

function examine(): Report {
  const findings: Finding[] = []
  const topology = readTopology()
  const path = addonPaths().find((candidate) => existsSync(candidate)) ?? addonPaths()[0] ?? ''
  let tiers: Tier[] = []
  let problem: string | null = null
  let refused: Report['refused'] = { affinity: '', memoryPolicy: '' }
  try {
    const addon = nativeAddon()
    tiers = readTiers(addon)
    refused = tryBinding(addon)
    execHelper()
  } catch (error) {
    problem = error instanceof Error ? error.message : String(error)
    const remedy = isSupportedPlatform()
      ? 'run `npx tilerank build`'
      : 'use Linux on x64 or arm64; plans and dry runs work here'
    findings.push({ level: 'missing', message: problem, remedy })
  }
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  if (major < oldestNode[0] || (major === oldestNode[0] && minor < oldestNode[1])) {
    findings.push({
      level: 'missing',
      message: `Node ${process.versions.node} is too old`,
      remedy: 'install Node 20.19 or newer',
    })
  }
  const cap = process.env['TILERANK_ISA']
  const tier = chooseTier(tiers, cap)
  if (tiers.length > 0 && tier === null) {
    const remedy = `choose one of ${tiers.map(({ name }) => name).join(', ')}`
    findings.push({ level: 'missing', message: `TILERANK_ISA=${cap ?? ''} names no tier that runs here`, remedy })
  }
  findings.push(...judge(topology, refused))
  return {
    node: process.versions.node,
    platform: `${process.platform} ${process.arch}`,
    addon: { path, isLoaded: problem === null, problem },
    tiers,
    tier,
    topology,
    refused,
    ranks: defaultRanks(topology),
    findings,
  }
}

/** What of the machine and its limits costs speed, or ends a job. */
export function judge(topology: Topology, refused: Report['refused']): Finding[] {
  const { cpuLimit, cores, nodes, hugePages, memoryAvailableBytes, allowedCpus, onlineCpus, decidedBy } = topology
  const { addressSpaceBytes, dataBytes, openFiles } = topology.processLimits
  const findings: Finding[] = []
  const warn = (message: string, remedy: string) => findings.push({ level: 'warning', message, remedy })
  if (cores.length === 0) {
    findings.push({
      level: 'missing',
      message: 'no processor is allowed',
      remedy: 'widen the affinity or the cpuset of this process',
    })
  }
  if (cpuLimit !== undefined && cpuLimit < cores.length) {
    warn(
      `${decidedBy.cpu ?? 'the cgroup'} allows ${cpuLimit} processors of time, while ${cores.length} cores are allowed: threads are limited to it`,
      'raise the limit, or give the container whole processors (cpuset)',
    )
  }
  if (allowedCpus.length < onlineCpus.length) {
    warn(
      `this process may use processors ${formatCpuList(allowedCpus)} of ${formatCpuList(onlineCpus)}`,
      'nothing, if that is meant; else start it without taskset, cpuset or a scheduler that binds it',
    )
  }
  if (refused.affinity !== '') {
    warn(
      `threads cannot be bound to cores: ${refused.affinity}`,
      "allow sched_setaffinity in the container's seccomp profile; without it ranks may disturb each other",
    )
  }
  // With one node there is nothing to choose.
  if (refused.memoryPolicy !== '' && nodes.length > 1) {
    warn(`memory cannot be bound to NUMA nodes: ${refused.memoryPolicy}`, 'start the container with CAP_SYS_NICE')
  }
  if (hugePages.transparent === 'never' && hugePages.free === 0) {
    warn('no huge pages: reading weights is slower', 'echo madvise > /sys/kernel/mm/transparent_hugepage/enabled')
  }
  if (memoryAvailableBytes < 2 ** 30) {
    warn(
      `only ${gib(memoryAvailableBytes)} of memory are free by ${decidedBy.memoryAvailable}`,
      'end other programs, or raise the limit',
    )
  }
  if (Number.isFinite(addressSpaceBytes) || Number.isFinite(dataBytes)) {
    warn(
      `a process may map ${gib(Math.min(addressSpaceBytes, dataBytes))}: a rank whose part of the model is larger does not start`,
      'ulimit -v unlimited; ulimit -d unlimited',
    )
  }
  if (openFiles < 256) {
    warn(`a process may open ${openFiles} files: too few for many ranks or many model files`, 'ulimit -n 1024')
  }
  return findings
}

const gib = (bytes: number): string => (Number.isFinite(bytes) ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : 'no limit')

function format(report: Report): string {
  const { topology, addon, tiers, tier, findings, refused } = report
  const { cores, nodes, hugePages, cpuLimit, memoryLimitBytes, decidedBy, processLimits } = topology
  const by = (file: string | undefined): string => (file === undefined ? '' : ` (${file})`)
  const can = (refusal: string): string => (refusal === '' ? 'yes' : 'refused')
  const rows: [string, string][] = [
    ['node', `${report.node}, ${report.platform}`],
    ['addon', addon.isLoaded ? addon.path : `not loaded: ${addon.path}`],
    ['tier', tier ?? 'none'],
    ...tiers.map(({ name, available, reason }): [string, string] => [
      '',
      `${available ? '+' : '-'} ${name}${reason === '' ? '' : `: ${reason}`}`,
    ]),
    ['processors', `${formatCpuList(topology.allowedCpus)} allowed of ${formatCpuList(topology.onlineCpus)}`],
    ['cores', `${cores.length} physical, compute threads on ${formatCpuList(cores.map(({ cpu }) => cpu))}`],
    ['cpu limit', cpuLimit === undefined ? 'none' : `${cpuLimit} processors${by(decidedBy.cpu)}`],
    ...nodes.map(({ node, cpus, memoryBytes, freeBytes }): [string, string] => [
      `numa ${node}`,
      `processors ${formatCpuList(cpus) || 'none'}, ${gib(memoryBytes)}, ${gib(freeBytes)} free`,
    ]),
    [
      'memory',
      `${gib(topology.memoryAvailableBytes)} available of ${gib(topology.memoryTotalBytes)}, by ${decidedBy.memoryAvailable}`,
    ],
    ['memory limit', memoryLimitBytes === undefined ? 'none' : `${gib(memoryLimitBytes)}${by(decidedBy.memoryLimit)}`],
    ['binding', `threads to cores ${can(refused.affinity)}, memory to nodes ${can(refused.memoryPolicy)}`],
    [
      'a process',
      `address space ${gib(processLimits.addressSpaceBytes)}, data ${gib(processLimits.dataBytes)}, open files ${processLimits.openFiles}; locked memory is not used`,
    ],
    [
      'huge pages',
      `transparent ${hugePages.transparent}, shared ${hugePages.transparentShared}, ${hugePages.free} of ${hugePages.reserved} reserved free`,
    ],
    ['ranks', `${report.ranks} by default: one for each NUMA node`],
  ]
  const width = Math.max(...rows.map(([name]) => name.length))
  const lines = rows.map(([name, value]) => `${name.padEnd(width)}  ${value}`)
  for (const { level, message, remedy } of findings) lines.push('', `${level}: ${message}`, `  to mend: ${remedy}`)
  if (findings.length === 0) lines.push('', 'nothing is missing')
  return `${lines.join('\n')}\n`
}
