// The other way across nodes: ranks that mpirun or srun started, and an MPI that carries the frames. It knows its ranks already, so that no
// store is needed: they exchange their cards over it. Natively it is a courier of the same mailbox (comm/mpi_courier.h).

import { createHash, randomBytes } from 'node:crypto'
import process from 'node:process'
import { debuglog } from 'node:util'
import { isMainThread } from 'node:worker_threads'
import { AddonError, mpiAddon, nativeAddon, type MpiName } from '../native/index.js'
import type { Environment, RankEnvironment } from './env.js'
import { CollectiveError, invalid } from './errors.js'
import { createMailbox, type NativeMailbox } from './mailbox.js'
import { cardOf, compareCards, nodeIdentity, nodesOf, parseCard } from './meet.js'
import {
  defaultFrameBytes,
  frameWindow,
  version,
  type Joined,
  type NetworkOptions,
  type TransportName,
} from './network.js'

const debug = debuglog('tilerank')

/** @throws CollectiveError ERR_INVALID_ARGUMENT, ERR_ENVIRONMENT */
export function readTransport(option: string | undefined, env: Environment): TransportName {
  const variable = env['TILERANK_TRANSPORT']
  const name = option ?? (variable === undefined || variable === '' ? 'zeromq' : variable)
  if (name === 'zeromq' || name === 'mpi') return name
  if (option !== undefined) throw invalid(`transport is '${name}', expected is 'zeromq' or 'mpi'`)
  throw new CollectiveError('ERR_ENVIRONMENT', `TILERANK_TRANSPORT is '${name}', expected is zeromq or mpi`, {
    variables: ['TILERANK_TRANSPORT'],
  })
}

/** Whose variables a rank has: an MPI must be started by its own launcher. */
const startedBy: readonly (readonly [variable: string, mpi: MpiName])[] = [
  ['OMPI_COMM_WORLD_RANK', 'openmpi'],
  ['PMI_RANK', 'mpich'], // MPICH's mpirun, srun --mpi=pmi2
  ['PMIX_RANK', 'openmpi'], // srun --mpi=pmix
]

interface World {
  readonly rank: number
  readonly size: number
  /** The number of tags that messages may have. */
  readonly tags: number
  /** For the other addon. */
  readonly world: object
}

interface MpiAddon {
  /** Starts the MPI when it is called first. Its end is that of the process. */
  readonly start: (timeoutMs: number) => Promise<World>
}

interface MpiCourierAddon {
  readonly MpiCourier: new (
    world: object,
    mailbox: NativeMailbox,
    tag: number,
    peers: readonly number[],
    hosts: readonly string[],
  ) => { close(): Promise<void> }
  readonly exchangeCards: (
    world: object,
    tag: number,
    card: Uint8Array,
    timeoutMs: number,
  ) => Promise<(Buffer | undefined)[]>
}

/**
 * For UCX, which MPICH brings and Open MPI may use, where the user has not said otherwise. It reads them when it is loaded.
 * - To know of unmapped memory UCX patches the code of mmap, brk and others in libc, then tries it out: sbrk(+4096), sbrk(-4096). Where V8's
 *   code has come to lie right above the heap the first fails, the second does not, and the heap has lost its last page: 1 rank in 100
 *   crashed in V8. Without it UCX keeps no cache of registered memory.
 * - Node.js has a handler for SIGSEGV of its own, for WebAssembly.
 */
const ucxVariables = { UCX_MEM_EVENTS: 'n', UCX_ERROR_SIGNALS: '' } as const

function loadMpi(mpi: MpiName): MpiAddon {
  for (const [name, value] of Object.entries(ucxVariables)) process.env[name] ??= value
  try {
    return mpiAddon(mpi) as MpiAddon
  } catch (error) {
    if (!(error instanceof AddonError)) throw error
    throw new CollectiveError(
      'ERR_UNSUPPORTED',
      `transport 'mpi': ${error.message}, or use transport 'zeromq'`,
      {},
      { cause: error },
    )
  }
}

// Groups of this process so far: tags tell them apart.
let groups = 0

const nonceBytes = 16

/**
 * @param place undefined: nobody said who this rank is
 * @throws CollectiveError ERR_ENVIRONMENT, ERR_UNSUPPORTED, ERR_TIMEOUT naming the missing ranks, ERR_MISMATCH, ERR_IO
 */
export async function joinMpi(
  place: RankEnvironment | undefined,
  options: NetworkOptions,
  env: Environment,
  terms: string,
  tuned: string,
  timeoutMs: number,
): Promise<Joined> {
  const started = Date.now()
  const left = (): number => Math.max(1, timeoutMs - (Date.now() - started))
  for (const name of ['store', 'interface', 'encryption', 'secret'] as const) {
    if (options[name] !== undefined)
      throw invalid(`option ${name} is for transport 'zeromq'; with 'mpi' it is the MPI's`)
  }
  const [, mpi] = startedBy.find(([variable]) => (env[variable] ?? '') !== '') ?? []
  if (mpi === undefined || place === undefined) {
    throw new CollectiveError(
      'ERR_ENVIRONMENT',
      "transport 'mpi' is for ranks that an MPI has started: run `mpirun -n 2 node program.mjs` (or srun --mpi=pmix, --mpi=pmi2), or use transport 'zeromq'",
      { variables: startedBy.map(([variable]) => variable) },
    )
  }
  if (!isMainThread)
    throw new CollectiveError(
      'ERR_UNSUPPORTED',
      "transport 'mpi' is for the main thread: an MPI lives once in a process",
    )
  const { rank, size, tags, world } = await loadMpi(mpi).start(left())
  if (rank !== place.rank || size !== place.worldSize) {
    throw new CollectiveError(
      'ERR_MISMATCH',
      `this is rank ${place.rank} of ${place.worldSize}, but rank ${rank} of ${size} for ${mpi}: were the ranks started by another MPI's mpirun?`,
      { rank: place.rank, mine: `${place.rank} of ${place.worldSize}`, theirs: `${rank} of ${size}` },
    )
  }
  const { MpiCourier, exchangeCards } = nativeAddon() as MpiCourierAddon
  const tag = (2 * groups++) % (tags - 1)
  const frameBytes = options.frameBytes ?? defaultFrameBytes
  const { card, bytes } = cardOf({
    rank,
    worldSize: size,
    version,
    terms: `${terms}, frames of ${frameBytes}, ${mpi}`,
    node: nodeIdentity(env),
    endpoint: '',
    publicKey: '',
    tuned: rank === 0 ? tuned : '',
  })
  const answers = await exchangeCards(world, tag, Buffer.concat([randomBytes(nonceBytes), bytes]), left())
  const theirs = answers.map((answer, other) => answer && parseCard(answer.subarray(nonceBytes), other))
  const cards = compareCards(card, theirs, timeoutMs, 'to createGroup')
  // Rank 0's: the ranks of a node meet by it, and frames of other groups lack it.
  const nonce = answers[0]?.subarray(0, nonceBytes) ?? Buffer.alloc(0)
  const layout = nodesOf(cards)
  debug('rank %d of %d: %s, nodes %s', rank, size, mpi, JSON.stringify(layout))
  const joined = { transport: 'mpi' as const, nonce: nonce.toString('hex'), tuned: cards[0]?.tuned ?? '' }
  if (layout.length === 1) return { ...joined, layout: [], mailbox: undefined, close: async () => Promise.resolve() }
  const mailbox = createMailbox({
    job: createHash('sha256').update(nonce).digest().readBigUInt64LE(),
    rank,
    worldSize: size,
    frameBytes,
    window: frameWindow,
  })
  const others = cards.filter(({ node }) => node !== card.node)
  const [peers, hosts] = [others.map((other) => other.rank), others.map(({ host }) => host)]
  const courier = new MpiCourier(world, mailbox, tag + 1, peers, hosts)
  return { ...joined, layout, mailbox, close: () => courier.close() }
}
