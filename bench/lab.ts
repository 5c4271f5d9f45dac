// Several nodes on one machine: each is a set of Linux namespaces (network, host name, mounts, IPC) of its own, joined by veth pairs
// to a bridge that has a namespace of its own too, so that the host's network is never touched.
//
// Namespaces are held by a keeper, one small shell a namespace, and have no name anywhere: they end with their last process. A
// keeper reads from a pipe; at its end - close(), or the death of whoever made the lab, however it died - it kills what still runs
// in its namespace and ends. So no leftovers exist that a later run would have to find.
//
// /sys is left as it is: a fresh sysfs (as `ip netns exec` mounts it) would hide the cgroups, and with them their limits.

import { type ChildProcess, type SpawnOptions, spawn, spawnSync } from 'node:child_process'
import { randomBytes, randomInt } from 'node:crypto'
import { once } from 'node:events'
import process from 'node:process'
import { execHelper, formatCpuList } from '../launcher/index.js'

export interface LabOptions {
  /** 2 to 4; default 2. */
  readonly nodes?: number
  /** Of each link, in each direction; unlimited if absent. */
  readonly rateMbit?: number
}

export interface RunOptions extends SpawnOptions {
  /** Processors that the command is bound to. */
  readonly cores?: readonly number[]
}

export interface LabNode {
  /** Its host name, which every node's /etc/hosts knows. */
  readonly name: string
  /** IPv4, on the interface eth0. */
  readonly address: string
  /** Words before a command that run it in this node, in the same process (no fork): `spawn(prefix[0], [...prefix.slice(1), ...])`. */
  readonly prefix: readonly string[]
  /**
   * Starts a command in this node, in a process group of its own; it dies with this process. `pid` is the command's own, and `ipc` in
   * stdio works. cwd and env are those given, or this process's.
   */
  readonly run: (command: string, args?: readonly string[], options?: RunOptions) => ChildProcess
}

export interface Lab extends AsyncDisposable {
  readonly nodes: readonly LabNode[]
  /** The subnet, such as 10.37.201.0/24. */
  readonly cidr: string
  /** Pulls the cable of a node: what it sends and what is sent to it vanishes, connections stay open and hear nothing. */
  readonly linkDown: (node: number) => Promise<void>
  readonly linkUp: (node: number) => Promise<void>
  /** Kills what still runs in the nodes and removes them; resolves when nothing is left. May be called twice. */
  readonly close: () => Promise<void>
}

// Dies with its namespace's last command at the latest; the loop is for those that fork while it kills. find reads who is in the
// namespace by the same link that names ours; a zombie has none.
const keep = `
echo ready
read -r end || :
space=$(readlink /proc/self/ns/net | tr '[]' '??')
for round in $(seq 200); do
  found=
  for link in $(find /proc/[0-9]*/ns/net -maxdepth 0 -lname "$space" 2>/dev/null); do
    pid=\${link#/proc/}; pid=\${pid%%/*}
    [ "$pid" = $$ ] || ! kill -KILL "$pid" 2>/dev/null || found=1
  done
  [ -n "$found" ] || exit 0
  sleep 0.01
done
exit 1
`

const keepBridge = `set -e
ip link add bridge type bridge
ip link set bridge up
${keep}`

// The hosts file is mounted and then unlinked: the mount keeps it. TBF holds at least one segment that veth passes unsplit (64 KB).
const keepNode = `set -e
bridge=$1 port=$2 address=$3 name=$4 hosts=$5 rate=$6
echo "$name" >/proc/sys/kernel/hostname
file=$(mktemp)
chmod 644 "$file"
printf '%s' "$hosts" >"$file"
mount --bind "$file" /etc/hosts
rm "$file"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
ip link add eth0 type veth peer name "$port" netns "$bridge"
ip address add "$address/24" dev eth0
ip link set eth0 up
nsenter -t "$bridge" -n ip link set "$port" master bridge up
if [ -n "$rate" ]; then
  tc qdisc add dev eth0 root tbf rate "\${rate}mbit" burst 128kb latency 50ms
  nsenter -t "$bridge" -n tc qdisc add dev "$port" root tbf rate "\${rate}mbit" burst 128kb latency 50ms
fi
${keep}`

interface Keeper {
  readonly pid: number
  readonly end: () => Promise<void>
}

/** Resolves when the namespace stands. */
async function startKeeper(flags: readonly string[], script: string, args: readonly string[]): Promise<Keeper> {
  // A session of its own: Ctrl-C ends us, and only then the keeper, which has to clean up first.
  const child = spawn('unshare', [...flags, 'sh', '-c', script, 'keeper', ...args], {
    stdio: ['pipe', 'pipe', 'pipe'],
    detached: true,
  })
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  child.stdin.on('error', () => undefined) // it may have ended already; `closed` tells how
  const closed = new Promise<string>((resolve) => {
    child.once('error', (error) => resolve(error.message))
    child.once('close', (code, signal) => resolve(code === 0 ? '' : `ended with ${String(code ?? signal)}: ${stderr}`))
  })
  const isReady = await Promise.race([once(child.stdout, 'data').then(() => true), closed.then(() => false)])
  if (!isReady || child.pid === undefined) throw new Error(`the lab's namespace was not made: ${await closed}`)
  return {
    pid: child.pid,
    end: async () => {
      child.stdin.end()
      const failure = await closed
      if (failure !== '') throw new Error(`the lab's namespace was not cleared: ${failure}`)
    },
  }
}

/** What forbids a lab here, in words for a skipped test; undefined where one can be made. */
export function labObstacle(options: Pick<LabOptions, 'rateMbit'> = {}): string | undefined {
  const what = 'namespaces of network, host name, mounts and IPC need root and iproute2'
  const tries = [
    'ip link add probe type veth peer name other',
    'ip link add bridge type bridge',
    'mount -t tmpfs tmpfs /dev/shm',
  ]
  if (options.rateMbit !== undefined) tries.push('tc qdisc add dev lo root tbf rate 1mbit burst 128kb latency 50ms')
  const { status, stderr, error } = spawnSync(
    'unshare',
    ['--net', '--uts', '--mount', '--ipc', 'sh', '-ec', tries.join('\n')],
    { encoding: 'utf8' },
  )
  return status === 0 ? undefined : `${what}: ${(error?.message ?? stderr).trim()}`
}

export async function createLab(options: LabOptions = {}): Promise<Lab> {
  const count = options.nodes ?? 2
  if (!Number.isInteger(count) || count < 2 || count > 4) throw new Error(`${count} nodes: a lab has 2 to 4`)
  const subnet = `10.${randomInt(1, 255)}.${randomInt(256)}`
  const id = randomBytes(3).toString('hex')
  const places = Array.from({ length: count }, (_, index) => ({
    name: `lab-${id}-${index}`,
    address: `${subnet}.${index + 1}`,
  }))
  const hosts = ['127.0.0.1 localhost', ...places.map(({ name, address }) => `${address} ${name}`), ''].join('\n')

  const keepers: Keeper[] = []
  let closing: Promise<void> | undefined
  const close = (): Promise<void> =>
    (closing ??= Promise.all(keepers.map((keeper) => keeper.end())).then(() => undefined))
  const nsenter = (keeper: Keeper): readonly string[] => ['nsenter', `--target=${keeper.pid}`, '--net']

  try {
    const bridge = await startKeeper(['--net'], keepBridge, [])
    keepers.push(bridge)
    const attempts = await Promise.allSettled(
      places.map(({ name, address }, index) =>
        startKeeper(['--net', '--uts', '--mount', '--ipc'], keepNode, [
          String(bridge.pid),
          `port${index}`,
          address,
          name,
          hosts,
          options.rateMbit === undefined ? '' : String(options.rateMbit),
        ]),
      ),
    )
    const nodeKeepers = attempts.flatMap((attempt) => (attempt.status === 'fulfilled' ? [attempt.value] : []))
    keepers.push(...nodeKeepers)
    for (const attempt of attempts) if (attempt.status === 'rejected') throw attempt.reason

    const nodes = nodeKeepers.map((keeper, index): LabNode => {
      const { name, address } = places[index] ?? { name: '', address: '' }
      // Entering the mounts alone would leave the command in their root.
      const prefix = [...nsenter(keeper), '--uts', '--mount', '--ipc', '--wd=.', '--']
      return {
        name,
        address,
        prefix,
        run: (command, args = [], { cores, ...rest } = {}) => {
          if (closing !== undefined) throw new Error(`${name} is closed`)
          const [program = '', ...words] = prefix
          const bound = [execHelper(), String(process.pid), cores === undefined ? '-' : formatCpuList(cores), '-', '--']
          return spawn(program, [...words, ...bound, command, ...args], rest)
        },
      }
    })
    const setPort = async (index: number, state: 'up' | 'down'): Promise<void> => {
      if (nodes[index] === undefined) throw new Error(`the lab has no node ${index}`)
      const [program = '', ...words] = nsenter(bridge)
      const child = spawn(program, [...words, 'ip', 'link', 'set', `port${index}`, state], {
        stdio: ['ignore', 'ignore', 'inherit'],
      })
      const [code] = (await once(child, 'close')) as [number | null]
      if (code !== 0) throw new Error(`the link of node ${index} could not be set ${state}`)
    }
    return {
      nodes,
      cidr: `${subnet}.0/24`,
      linkDown: (index) => setPort(index, 'down'),
      linkUp: (index) => setPort(index, 'up'),
      close,
      [Symbol.asyncDispose]: close,
    }
  } catch (error) {
    await close()
    throw error
  }
}
