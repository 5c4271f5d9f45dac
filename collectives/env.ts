// The variables by which a launcher tells a rank who it is: read and checked in this one place. Without any of them a process is
// a group of one. Whatever is set must be complete and agree, or is an error that names the variables: a process that inherited
// another job's variables must not take that rank's place.

import { createHash } from 'node:crypto'
import { readFileSync, readlinkSync } from 'node:fs'
import { isIPv6 } from 'node:net'
import { CollectiveError } from './errors.js'

/**
 * Whose variables named the rank, the first in this order. 'tp-launch' is anyone who hands out TILERANK_JOB beside RANK and WORLD_SIZE;
 * 'torchrun' those who set the same words without it (DeepSpeed too); 'pmi' MPICH, Intel MPI and relatives.
 */
export type RankSource = 'tp-launch' | 'torchrun' | 'openmpi' | 'pmi' | 'slurm'

export interface RankEnvironment {
  readonly source: RankSource
  readonly rank: number
  readonly worldSize: number
  readonly localRank: number
  /** Below worldSize in a job of several nodes; the ranks of a node need not be neighbours then. */
  readonly localSize: number
  /**
   * The job's nonce, 32 hexadecimal digits: TILERANK_JOB, else made from what the ranks of this job on this node have in common, and
   * then no secret. Empty in a job of one rank that has none, and where there is a store.
   */
  readonly job: string
  /** Descriptor of this rank's listening socket, if the launcher bound it; -1: the rank binds it. */
  readonly socketFd: number
  /**
   * Host, or host:port, where the ranks of several nodes find each other: TILERANK_STORE, else MASTER_ADDR, else the first host of Slurm's step.
   * undefined: all are on this node.
   */
  readonly store: string | undefined
}

export type Environment = Readonly<Record<string, string | undefined>>

type Field = 'rank' | 'worldSize' | 'localRank' | 'localSize' | 'nodeRank'
type Launcher = 'torchrun' | 'openmpi' | 'pmi' | 'slurm'

/** Who says what by which names, in the order in which they are asked. */
const names = {
  torchrun: {
    rank: ['RANK'],
    worldSize: ['WORLD_SIZE'],
    localRank: ['LOCAL_RANK'],
    localSize: ['LOCAL_WORLD_SIZE', 'LOCAL_SIZE'], // the second is DeepSpeed's
    nodeRank: ['GROUP_RANK', 'NODE_RANK'],
  },
  openmpi: {
    rank: ['OMPI_COMM_WORLD_RANK'],
    worldSize: ['OMPI_COMM_WORLD_SIZE'],
    localRank: ['OMPI_COMM_WORLD_LOCAL_RANK'],
    localSize: ['OMPI_COMM_WORLD_LOCAL_SIZE'],
    nodeRank: [], // OMPI_COMM_WORLD_NODE_RANK numbers the processes of a node
  },
  pmi: {
    rank: ['PMI_RANK', 'PMIX_RANK'],
    worldSize: ['PMI_SIZE'],
    localRank: ['MPI_LOCALRANKID'],
    localSize: ['MPI_LOCALNRANKS'],
    nodeRank: [],
  },
  slurm: {
    rank: ['SLURM_PROCID'],
    worldSize: ['SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS'],
    localRank: ['SLURM_LOCALID'],
    localSize: ['SLURM_STEP_TASKS_PER_NODE'],
    nodeRank: ['SLURM_NODEID'],
  },
} as const satisfies Record<Launcher, Record<Field, readonly string[]>>

/** What names a rank, for launchers that must keep those of another from their ranks. */
export const placeVariables = Object.values<Record<Field, readonly string[]>>(names).flatMap((fields) =>
  Object.values(fields).flat(),
)

/** Those that make a process a rank; LOCAL_RANK alone is somebody's mistake, MPI_LOCALRANKID alone is nothing. */
const decisive = {
  torchrun: ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'LOCAL_SIZE', 'TILERANK_SOCKET_FD'],
  openmpi: ['OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'],
  pmi: ['PMI_RANK', 'PMI_SIZE', 'PMIX_RANK'],
} as const

/** One variable that says something. */
interface Claim {
  readonly launcher: Launcher
  readonly field: Field
  readonly name: string
  readonly value: number
}

const maxWorldSize = 256

/** [lowest, highest] */
const limits = {
  rank: [0, maxWorldSize - 1],
  worldSize: [1, maxWorldSize],
  localRank: [0, maxWorldSize - 1],
  localSize: [1, maxWorldSize],
  nodeRank: [0, maxWorldSize - 1],
} as const satisfies Record<Field, readonly [number, number]>

const fail = (message: string, ...variables: readonly string[]): CollectiveError =>
  new CollectiveError('ERR_ENVIRONMENT', message, { variables })

const valueOf = (env: Environment, name: string): string | undefined => {
  const text = env[name]
  return text === '' ? undefined : text
}

const isSet = (env: Environment, name: string): boolean => valueOf(env, name) !== undefined

function integer(env: Environment, name: string, lowest: number, highest: number): number | undefined {
  const text = valueOf(env, name)
  if (text === undefined) return undefined
  const value = /^\d{1,10}$/.test(text) ? Number(text) : NaN
  if (!(value >= lowest && value <= highest)) {
    throw fail(`${name} is '${text}', expected is an integer from ${String(lowest)} to ${String(highest)}`, name)
  }
  return value
}

function fieldOf(env: Environment, name: string, field: Field): number | undefined {
  const [lowest, highest] = limits[field]
  return integer(env, name, lowest, highest)
}

function claimsOf(env: Environment, launcher: Exclude<Launcher, 'slurm'>): Claim[] {
  return (Object.keys(limits) as Field[]).flatMap((field) =>
    names[launcher][field].flatMap((name): Claim[] => {
      const value = fieldOf(env, name, field)
      return value === undefined ? [] : [{ launcher, field, name, value }]
    }),
  )
}

/** [nodes] tasks of each, from 4(x2),3 */
function tasksPerNode(text: string): number[] {
  return text.split(',').flatMap((part) => {
    const [, tasks, times] = /^(\d{1,5})(?:\(x(\d{1,4})\))?$/.exec(part) ?? []
    if (tasks === undefined)
      throw fail(
        `SLURM_STEP_TASKS_PER_NODE is '${text}', expected is a list such as 4(x2),3`,
        'SLURM_STEP_TASKS_PER_NODE',
      )
    return Array<number>(Number(times ?? 1)).fill(Number(tasks))
  })
}

/**
 * What srun says to the tasks of a step. Variables of an allocation (salloc, the script of sbatch) have no step, and stay set for whatever
 * else runs there; a shell or a daemon under srun is a step too.
 * @param otherSize size of the job that other variables tell of
 */
function slurmClaims(env: Environment, otherSize: number | undefined): Claim[] {
  if (!isSet(env, 'SLURM_STEP_ID') || !isSet(env, 'SLURM_PROCID')) return []
  // In an interactive step SLURM_NTASKS is the allocation's.
  const sizeName = names.slurm.worldSize.find((name) => isSet(env, name))
  const perNode = valueOf(env, 'SLURM_STEP_TASKS_PER_NODE')
  const nodeRank = fieldOf(env, 'SLURM_NODEID', 'nodeRank')
  if (sizeName === undefined) throw missing('slurm', 'worldSize', ['SLURM_PROCID'])
  if (perNode === undefined) throw missing('slurm', 'localSize', ['SLURM_PROCID'])
  if (nodeRank === undefined) throw missing('slurm', 'nodeRank', ['SLURM_PROCID'])
  const tasks = tasksPerNode(perNode)
  const total = tasks.reduce((sum, count) => sum + count, 0)
  const localSize = tasks[nodeRank]
  const isOnePerNode = tasks.every((count) => count === 1)
  // One task, and nobody else says anything: `srun --pty bash`, or the shell of salloc. A nonce shows that ranks are meant.
  if (total === 1 && otherSize === undefined && !isSet(env, 'TILERANK_JOB')) return []
  // One task a node: the daemons of mpirun, or torchrun, or tp-launch, which have started this process.
  if (isOnePerNode && otherSize !== undefined && otherSize !== total) return []
  const worldSize = fieldOf(env, sizeName, 'worldSize') ?? 0
  if (worldSize !== total) {
    throw fail(
      `${sizeName} is ${String(worldSize)}, but SLURM_STEP_TASKS_PER_NODE is '${perNode}'`,
      sizeName,
      'SLURM_STEP_TASKS_PER_NODE',
    )
  }
  if (localSize === undefined) {
    throw fail(
      `SLURM_NODEID is ${String(nodeRank)}, but SLURM_STEP_TASKS_PER_NODE is '${perNode}'`,
      'SLURM_NODEID',
      'SLURM_STEP_TASKS_PER_NODE',
    )
  }
  const claim = (field: Field, name: string, value: number): Claim => ({ launcher: 'slurm', field, name, value })
  const localRank = fieldOf(env, 'SLURM_LOCALID', 'localRank')
  return [
    claim('rank', 'SLURM_PROCID', fieldOf(env, 'SLURM_PROCID', 'rank') ?? 0),
    claim('worldSize', sizeName, worldSize),
    ...(localRank === undefined ? [] : [claim('localRank', 'SLURM_LOCALID', localRank)]),
    claim('localSize', 'SLURM_STEP_TASKS_PER_NODE', localSize),
    claim('nodeRank', 'SLURM_NODEID', nodeRank),
  ]
}

function missing(launcher: Launcher, field: Field, present: readonly string[]): CollectiveError {
  const name = names[launcher][field][0] ?? field
  return fail(
    `${name} is missing, while ${present.join(', ')} ${present.length === 1 ? 'is' : 'are'} set: a launcher sets all of them`,
    name,
  )
}

/** What all that speak of the field say. */
function agreed(claims: readonly Claim[], field: Field): Claim | undefined {
  const [first, ...others] = claims.filter((claim) => claim.field === field)
  const other = others.find(({ value }) => value !== first?.value)
  if (first === undefined || other === undefined) return first
  const advice =
    first.launcher === other.launcher
      ? ''
      : ': one of them was inherited from another job; unset the variables of that one'
  throw fail(
    `${first.name} is ${String(first.value)}, but ${other.name} is ${String(other.value)}${advice}`,
    first.name,
    other.name,
  )
}

/** Of two claims, the first of which must not be `what` it is beside the second. */
const contradiction = (first: Claim, second: Claim, where = ''): CollectiveError =>
  fail(
    `${first.name} is ${String(first.value)}, but ${second.name} is ${String(second.value)}${where}`,
    first.name,
    second.name,
  )

/**
 * Who this process is, or undefined when no launcher said anything.
 * @param proc where the ancestors of this process are read, which tell one job of MPICH from another
 * @throws CollectiveError ERR_ENVIRONMENT naming the variables that are missing or contradict each other
 */
export function readRankEnvironment(env: Environment = process.env, proc = '/proc'): RankEnvironment | undefined {
  const speaking = (['torchrun', 'openmpi', 'pmi'] as const).filter((launcher) =>
    decisive[launcher].some((name) => isSet(env, name)),
  )
  const others = speaking.flatMap((launcher) => claimsOf(env, launcher))
  const claims = [...others, ...slurmClaims(env, agreed(others, 'worldSize')?.value)]
  const launchers = [...new Set<Launcher>([...speaking, ...claims.map((claim) => claim.launcher)])]
  const [launcher] = launchers
  if (launcher === undefined) {
    if (isSet(env, 'TILERANK_JOB')) throw missing('torchrun', 'worldSize', ['TILERANK_JOB'])
    return undefined
  }
  const present = [...new Set([...claims.map(({ name }) => name), 'TILERANK_JOB', 'TILERANK_SOCKET_FD'])]
  const required = (field: Field): Claim => {
    const claim = agreed(claims, field)
    if (claim !== undefined) return claim
    throw missing(
      launcher,
      field,
      present.filter((name) => isSet(env, name)),
    )
  }

  const worldSize = required('worldSize')
  const rank = required('rank')
  if (rank.value >= worldSize.value) throw contradiction(rank, worldSize)
  integer(env, 'MASTER_PORT', 1, 65535)
  const nodeRank = agreed(claims, 'nodeRank')
  const isElsewhere = nodeRank !== undefined && nodeRank.value > 0
  const saidStore = valueOf(env, 'TILERANK_STORE')
  // Without a store all ranks are here, unless the launcher says otherwise: a node that is not the first is such a word.
  const localSize =
    isElsewhere && saidStore === undefined ? required('localSize') : (agreed(claims, 'localSize') ?? worldSize)
  const isOneNode = localSize.value === worldSize.value
  const localRank = isOneNode ? (agreed(claims, 'localRank') ?? rank) : required('localRank')
  if (localRank.value >= localSize.value) throw contradiction(localRank, localSize)
  if (localSize.value > worldSize.value) throw contradiction(localSize, worldSize)
  const place = {
    source: rank.launcher === 'torchrun' && isSet(env, 'TILERANK_JOB') ? 'tp-launch' : rank.launcher,
    rank: rank.value,
    worldSize: worldSize.value,
    localRank: localRank.value,
    localSize: localSize.value,
  } as const

  const store = saidStore ?? (isOneNode ? undefined : hostOfRank0(env, launchers))
  if (store !== undefined) return { ...place, job: '', socketFd: -1, store }
  if (!isOneNode) {
    throw fail(
      `${localSize.name} is ${String(localSize.value)}, but ${worldSize.name} is ${String(worldSize.value)}: where ranks are on several nodes, ` +
        'TILERANK_STORE says where they find each other (host:port, of rank 0)',
      'TILERANK_STORE',
      localSize.name,
      worldSize.name,
    )
  }
  if (localRank.value !== rank.value) throw contradiction(localRank, rank, ' in a job of one node')
  if (isElsewhere) throw contradiction(nodeRank, localSize, ', all ranks of the job')

  const job = valueOf(env, 'TILERANK_JOB')
  if (job !== undefined && !/^[0-9a-f]{32}$/.test(job)) {
    throw fail('TILERANK_JOB is not 32 hexadecimal digits in lower case', 'TILERANK_JOB')
  }
  return {
    ...place,
    job: job ?? (worldSize.value === 1 ? '' : jobNonce(env, launchers, worldSize, proc)),
    socketFd: integer(env, 'TILERANK_SOCKET_FD', 0, 2 ** 31 - 1) ?? -1,
    store: undefined,
  }
}

function hostOfRank0(env: Environment, launchers: readonly Launcher[]): string | undefined {
  const address = valueOf(env, 'MASTER_ADDR')
  if (address !== undefined) return isIPv6(address) ? `[${address}]` : address
  return launchers.includes('slurm') ? firstHost(env, 'SLURM_STEP_NODELIST') : undefined
}

/** The first host of such a list: n01 of n[01-03,7],m2 */
function firstHost(env: Environment, name: string): string | undefined {
  const text = valueOf(env, name)
  if (text === undefined) return undefined
  const [, first = ''] = /^((?:[^,[\]]|\[[^[\]]*\])*)(?:,|$)/.exec(text) ?? []
  const host = first.replace(/\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]/g, '$1')
  if (!/^[\w.-]+$/.test(host)) throw fail(`${name} is '${text}', expected is a list such as n[01-03,7],m2`, name)
  return host
}

/**
 * 32 hexadecimal digits that all ranks of this job on this node can work out, and no other job that runs at the same time. Not
 * secret: ranks of one node check each other's user besides.
 */
function jobNonce(env: Environment, launchers: readonly Launcher[], worldSize: Claim, proc: string): string {
  for (const launcher of launchers) {
    const identity = jobIdentity(env, launcher, proc)
    if (identity === undefined) continue
    const words = JSON.stringify([process.getuid?.() ?? -1, launcher, ...identity])
    return createHash('sha256').update(words).digest('hex').slice(0, 32)
  }
  throw fail(
    `TILERANK_JOB is missing, while ${worldSize.name} is ${String(worldSize.value)}, and nothing else tells this job from others: start the ` +
      'ranks with tp-launch, mpirun, srun or torchrun, or set it to the same 32 random hexadecimal digits on all of them',
    'TILERANK_JOB',
  )
}

/** What the launcher calls this job, and where it listens: names that are numbers of processes are not alone on a host of containers. */
function jobIdentity(env: Environment, launcher: Launcher, proc: string): readonly string[] | undefined {
  const values = (...variables: readonly string[]): string[] => variables.map((name) => env[name] ?? '')
  switch (launcher) {
    case 'torchrun':
      // Its agent listens on MASTER_PORT while the job runs. Others hand out a port that nobody may have taken.
      if (!isSet(env, 'TORCHELASTIC_RUN_ID') || !isSet(env, 'MASTER_PORT')) return undefined
      return values('MASTER_ADDR', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT')
    case 'openmpi': {
      const job = values('PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid')
      const servers = Object.keys(env).filter((name) => /^PMIX_SERVER_URI\d*$/.test(name))
      return job.join('') === '' ? undefined : [...job, ...values('OMPI_MCA_orte_hnp_uri', ...servers.sort())]
    }
    case 'pmi':
      return hydraProxy(proc)
    case 'slurm':
      if (!isSet(env, 'SLURM_JOB_ID')) return undefined
      return values('SLURM_CLUSTER_NAME', 'SLURM_JOB_ID', 'SLURM_STEP_ID', 'SLURM_RESTART_COUNT')
  }
}

/** The process of mpiexec that has started all ranks of a job on this node: the nearest above this one. It says nothing in variables. */
function hydraProxy(proc: string): readonly string[] | undefined {
  try {
    for (let pid = 'self'; ;) {
      const stat = readFileSync(`${proc}/${pid}/stat`, 'utf8') // proc_pid_stat(5): pid (comm) state ppid ... 22 starttime
      const [, own = '', comm = '', rest = ''] = /^(\d+) \((.*)\) (.*)$/s.exec(stat) ?? []
      const fields = rest.split(' ')
      const [parent = '0', start = ''] = [fields[1], fields[19]]
      if (comm === 'hydra_pmi_proxy') return [readlinkSync(`${proc}/self/ns/pid`), own, start]
      if (parent === '0') return undefined
      pid = parent
    }
  } catch {
    return undefined // an ancestor that ended, or cannot be seen: the caller asks for TILERANK_JOB
  }
}

/** How long an operation may be pending when the caller does not say: TILERANK_TIMEOUT_MS, else 60 s. */
export function defaultTimeoutMs(env: Environment = process.env): number {
  return integer(env, 'TILERANK_TIMEOUT_MS', 1, 2 ** 31 - 1) ?? 60_000
}
