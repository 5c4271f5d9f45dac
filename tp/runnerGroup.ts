// The group of ranks that an engine owns: flags and slots for the runner, nothing for callers (those have createGroup()).

import { nativeAddon } from '../native/index.js'
import type { RankEnvironment } from './place.js'

export interface RunnerGroup {
  /** The native communicator, for createRunner(). */
  readonly handle: unknown
  readonly arenaBytes: number
  readonly warnings: readonly string[]
  close(): Promise<void>
}

interface NativeCommunicator {
  connect(): Promise<{ readonly warning?: string } | undefined>
  close(): unknown
}

interface CommAddon {
  readonly Communicator: new (options: Readonly<Record<string, unknown>>) => NativeCommunicator
}

/**
 * @param options slotBytes of one generation; terms that all ranks must share to the letter
 * @throws errors of the rendezvous: ERR_TIMEOUT naming the missing ranks, ERR_MISMATCH naming both sides
 */
export async function openRunnerGroup(
  place: RankEnvironment | null,
  options: { readonly slotBytes: number; readonly terms: string; readonly timeoutMs: number },
): Promise<RunnerGroup> {
  const { Communicator } = nativeAddon() as CommAddon
  const handle = new Communicator({
    nonce: place?.nonce ?? '',
    rank: place?.rank ?? 0,
    worldSize: place?.worldSize ?? 1,
    socketFd: place?.socketFd ?? -1,
    lanes: 1,
    spinUs: -1,
    chunkBytes: 0,
    nodes: [],
    ...options,
  })
  try {
    const connected = await handle.connect()
    return {
      handle,
      arenaBytes: 2 * options.slotBytes + 8192,
      warnings: connected?.warning ? [connected.warning] : [],
      close: () => Promise.resolve(handle.close()).then(() => undefined),
    }
  } catch (error) {
    handle.close()
    throw error
  }
}
