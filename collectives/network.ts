// A job on several nodes, up to the first collective: the store, the cards of all ranks, the sockets between them. What the group needs of it
// is a layout and a mailbox; a job that turns out to be on one node needs neither.

import { createHash } from 'node:crypto'
import { lookup } from 'node:dns/promises'
import { debuglog } from 'node:util'
import { readFileSync } from 'node:fs'
import type { Environment } from './env.js'
import { CollectiveError, invalid } from './errors.js'
import { chooseAddress, localAddresses } from './interfaces.js'
import type { NativeMailbox } from './mailbox.js'
import { meet, nodeIdentity, nodesOf } from './meet.js'
import { readEncryption, readSecret, type Encryption } from './secret.js'
import { connectStore, serveStore, type StoreServer } from './store.js'
import { Network } from './zmq.js'

const debug = debuglog('tilerank')

export type TransportName = 'zeromq' | 'mpi'

export interface NetworkOptions {
  /**
   * What carries bytes between nodes: 'zeromq' for ranks however started, 'mpi' for those of mpirun or srun. TILERANK_TRANSPORT when left
   * out, else 'zeromq'.
   */
  readonly transport?: TransportName
  /** Where the ranks find each other: host:port. Rank 0 serves it, on that very address. TILERANK_STORE when left out. */
  readonly store?: string
  /** Which address this rank listens on: an interface, an address or a network such as 10.1.0.0/16. TILERANK_INTERFACE when left out. */
  readonly interface?: string
  /** 'none' must be said by name. TILERANK_ENCRYPTION when left out, else 'curve'. */
  readonly encryption?: Encryption
  /** 64 hexadecimal digits. TILERANK_SECRET_FILE or TILERANK_SECRET_FD when left out. */
  readonly secret?: string
  /** Bytes of data in a frame between nodes, a multiple of 64. */
  readonly frameBytes?: number
}

export interface Joined {
  readonly transport: TransportName
  /** Of the ranks of this node. */
  readonly nonce: string
  /** [nodes][ranks] */
  readonly layout: readonly (readonly number[])[]
  /** Where there are several nodes. */
  readonly mailbox: NativeMailbox | undefined
  /** Of rank 0's card. */
  readonly tuned: string
  close(): Promise<void>
}

const defaultPort = 29600
/** Large enough that a frame's way through four threads counts little, small enough that several fit a cache. */
export const defaultFrameBytes = 256 << 10
/** How long rank 0, with which the store ends, waits after the others have given up. */
const partingMs = 500
/** Frames to one peer under way. */
export const frameWindow = 8

export const version = (
  JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }
).version

// The sockets of this process that outlive a group: rank 0 may be asked for the next group before it makes one itself.
const servers = new Map<string, Promise<StoreServer>>()
const groupsOf = new Map<string, number>()

/** host:port, [v6]:port, or a host alone. */
export function parseStore(text: string): { readonly host: string; readonly port: number } {
  const [, v6, plain, port] = /^(?:\[([0-9a-fA-F:.]+)\]|([^:\s]+))(?::(\d{1,5}))?$/.exec(text) ?? []
  const host = v6 ?? plain
  const number = port === undefined ? defaultPort : Number(port)
  if (host === undefined || number < 1 || number > 65535) throw invalid(`the store '${text}' is no host:port`)
  return { host, port: number }
}

/**
 * @param terms all that ranks must agree on
 * @param tuned for rank 0's card
 * @throws CollectiveError ERR_ENVIRONMENT, ERR_TIMEOUT naming the missing ranks, ERR_MISMATCH, ERR_IO
 */
export async function joinNetwork(
  place: { readonly rank: number; readonly worldSize: number },
  options: NetworkOptions,
  store: string,
  env: Environment,
  terms: string,
  tuned: string,
  timeoutMs: number,
): Promise<Joined> {
  const { rank, worldSize } = place
  const started = Date.now()
  const left = (): number => Math.max(1, timeoutMs - (Date.now() - started))
  const encryption = readEncryption(options.encryption, env)
  const access =
    encryption === 'none' ? ({ encryption } as const) : ({ secret: readSecret(options.secret, env) } as const)
  const { host, port } = parseStore(store)
  const { address } = await lookup(host).catch((cause: unknown) => {
    throw new CollectiveError('ERR_ENVIRONMENT', `the store's host ${host} is not known: ${String(cause)}`, {
      variables: ['TILERANK_STORE'],
    })
  })
  if (rank === 0) {
    if (!localAddresses().some((local) => local.address === address)) {
      throw new CollectiveError(
        'ERR_ENVIRONMENT',
        `rank 0 serves the store, but ${host} (${address}) is no address of its host: name one of ${localAddresses()
          .map((local) => local.address)
          .join(', ')}`,
        { variables: ['TILERANK_STORE'] },
      )
    }
    const key = `${address} ${port}`
    const serving = servers.get(key) ?? serveStore({ address, port, ...access })
    servers.set(key, serving)
    await serving.catch((error: unknown) => {
      servers.delete(key)
      throw error
    })
  }
  const local = await chooseAddress(options.interface ?? env['TILERANK_INTERFACE'], address)
  const client = connectStore({ address, port, timeoutMs, ...access })
  const number = groupsOf.get(store) ?? 0
  groupsOf.set(store, number + 1)
  const prefix = `group/${number}`
  debug(
    'rank %d of %d: store %s:%d, group %d, listens on %s %s, encryption %s',
    rank,
    worldSize,
    address,
    port,
    number,
    local.interface,
    local.address,
    encryption,
  )
  let network: Network | undefined
  try {
    // Chosen by rank 0, and known to nobody outside: the ranks of a node meet by it, and frames of other jobs and groups lack it.
    if (rank === 0) await client.set(`${prefix}/job`, crypto.getRandomValues(new Uint8Array(16)), { isNew: true })
    const job = await waitForRank0(async () => client.get(`${prefix}/job`, { timeoutMs: left() }), worldSize, timeoutMs)
    const nonce = Buffer.from(job).toString('hex')
    network = Network.open({
      address: local.address,
      isEncrypted: encryption === 'curve',
      job: createHash('sha256').update(job).digest().readBigUInt64LE(),
      rank,
      worldSize,
      frameBytes: options.frameBytes ?? defaultFrameBytes,
      window: frameWindow,
    })
    const { endpoint, publicKey } = network
    const card = {
      rank,
      worldSize,
      version,
      terms: `${terms}, frames of ${options.frameBytes ?? defaultFrameBytes}, encryption ${encryption}`,
      node: nodeIdentity(env),
      endpoint,
      publicKey,
      tuned: rank === 0 ? tuned : '',
    }
    // The store ends with rank 0: the others get to their deadlines first, and learn who is late.
    const cards = await meet(client, prefix, card, left() + (rank === 0 ? partingMs : 0))
    const layout = nodesOf(cards)
    const chosen = { transport: 'zeromq' as const, tuned: cards[0]?.tuned ?? '' }
    debug('rank %d: nodes %s', rank, JSON.stringify(layout))
    if (layout.length === 1) {
      await network.close()
      return { ...chosen, nonce, layout: [], mailbox: undefined, close: async () => Promise.resolve() }
    }
    await network.connect(
      cards.filter(({ node }) => node !== card.node),
      left(),
    )
    const open = network
    return { ...chosen, nonce, layout, mailbox: open.mailbox, close: async () => open.close() }
  } catch (error) {
    await network?.close()
    throw error
  } finally {
    await client.close()
  }
}

async function waitForRank0<T>(work: () => Promise<T>, worldSize: number, timeoutMs: number): Promise<T> {
  try {
    return await work()
  } catch (error) {
    if (!(error instanceof CollectiveError) || error.code !== 'ERR_TIMEOUT') throw error
    throw new CollectiveError(
      'ERR_TIMEOUT',
      `createGroup: rank 0 of ${worldSize} did not come within ${timeoutMs} ms (${error.message})`,
      { lateRanks: [0], elapsedMs: timeoutMs, operation: 'createGroup' },
    )
  }
}
