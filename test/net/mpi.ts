// Runs an MPI program over the nodes of a lab, with the mpirun of Open MPI or MPICH in the first node. What ssh would be between
// machines is a script that enters the namespaces of the node it is given; bytes between nodes go over TCP on eth0.

import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { readTopology } from '../../launcher/index.js'
import { type Ended, type Started, start } from '../launcher/processes.js'
import type { Lab } from '../../bench/lab.js'

export type MpiImplementation = 'openmpi' | 'mpich'

export interface MpiRunOptions {
  readonly lab: Lab
  readonly implementation: MpiImplementation
  readonly program: string
  readonly args?: readonly string[]
  /** Default 1; rank r runs on node r / ranksPerNode. */
  readonly ranksPerNode?: number
  /** The processor of a rank; default: rank r has the r-th allowed core, in turn. */
  readonly core?: (rank: number) => number
  /** More words for mpirun, such as --enable-recovery. */
  readonly flags?: readonly string[]
  /** Added to the variables of this process; all ranks have them. */
  readonly env?: NodeJS.ProcessEnv
}

const packages = { openmpi: 'openmpi-bin libopenmpi-dev', mpich: 'mpich libmpich-dev' } as const

// Debian installs several MPIs beside each other, their commands with the implementation's name behind a dot.
export const mpiCommand = (name: 'mpirun' | 'mpicc' | 'mpicxx', implementation: MpiImplementation): string =>
  `${name}.${implementation}`

/** Why programs of an MPI cannot be built and run here, in words for a skipped test; undefined where they can. */
export function mpiObstacle(implementation: MpiImplementation): string | undefined {
  try {
    for (const name of ['mpirun', 'mpicc'] as const)
      execFileSync(mpiCommand(name, implementation), ['--version'], { stdio: 'ignore' })
    return undefined
  } catch {
    return `no ${implementation} here: install ${packages[implementation]}`
  }
}

/** What mpirun calls with a node and a command, like ssh. */
const agentOf = (lab: Lab): string => `#!/bin/sh
node=$1
shift
case "$node" in
${lab.nodes.map(({ name, prefix }) => `${name}) exec ${prefix.join(' ')} sh -c "$*" ;;`).join('\n')}
esac
echo "the lab has no node $node" >&2
exit 1
`

/** The flags of mpirun for one of the two; ranks follow, one application each, so that each has its own core. */
function flagsOf(implementation: MpiImplementation, agent: string, hosts: string, isShared: boolean): string[] {
  switch (implementation) {
    case 'openmpi':
      return [
        '--allow-run-as-root',
        ...['--host', hosts, '--bind-to', 'none', '--mca', 'orte_tmpdir_base', '/dev/shm'],
        ...['--mca', 'plm_rsh_agent', agent, '--mca', 'oob_tcp_if_include', 'eth0'],
        // vader is shared memory, within a node.
        ...['--mca', 'pml', 'ob1', '--mca', 'btl', 'self,vader,tcp', '--mca', 'btl_tcp_if_include', 'eth0'],
        // It cannot see that ranks of other nodes have the same cores.
        ...(isShared ? ['--mca', 'mpi_yield_when_idle', '1'] : []),
      ]
    case 'mpich':
      return ['-launcher', 'rsh', '-launcher-exec', agent, '-iface', 'eth0', '-hosts', hosts]
    default:
      return implementation satisfies never
  }
}

export function startMpi(options: MpiRunOptions): Started {
  const { lab, implementation } = options
  const ranksPerNode = options.ranksPerNode ?? 1
  const worldSize = ranksPerNode * lab.nodes.length
  const cores = readTopology().cores.map((core) => core.cpu)
  const core = options.core ?? ((rank) => cores[rank % cores.length] ?? 0)
  // Daemons look for it on every node, though only the first uses it; in the memory file systems of the nodes it goes with them.
  const agent = `/dev/shm/agent-${randomBytes(4).toString('hex')}`
  for (const { prefix } of lab.nodes) {
    const [program = '', ...words] = prefix
    execFileSync(program, [...words, 'sh', '-c', 'cat >"$0" && chmod 755 "$0"', agent], { input: agentOf(lab) })
  }
  const hosts = lab.nodes.map(({ name }) => `${name}:${ranksPerNode}`).join(',')
  const isShared = new Set(Array.from({ length: worldSize }, (_, rank) => core(rank))).size < worldSize
  const words = [
    mpiCommand('mpirun', implementation),
    ...flagsOf(implementation, agent, hosts, isShared),
    ...(options.flags ?? []),
  ]
  for (let rank = 0; rank < worldSize; rank++) {
    if (rank > 0) words.push(':')
    words.push('-np', '1', 'taskset', '-c', String(core(rank)), options.program, ...(options.args ?? []))
  }
  const [program = '', ...prefix] = lab.nodes[0]?.prefix ?? []
  // UCX carries MPICH's bytes between nodes where it was built with it.
  return start(program, [...prefix, ...words], {
    env: { UCX_TLS: 'tcp,self', UCX_NET_DEVICES: 'eth0', ...options.env },
  })
}

/** To its end; `code` is mpirun's, which is killed after `timeoutMs` (default 120 s). */
export async function runMpi(options: MpiRunOptions & { readonly timeoutMs?: number }): Promise<Ended> {
  const { child, ended } = startMpi(options)
  const timer = setTimeout(() => child.kill('SIGKILL'), options.timeoutMs ?? 120_000)
  try {
    return await ended
  } finally {
    clearTimeout(timer)
  }
}
