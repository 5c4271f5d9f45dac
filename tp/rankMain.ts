// The internal entry of a rank that initInference() started: takes one RankConfig over IPC, then serves until it is told to close or
// its client is gone. Rank 0 schedules; the others obey it natively and only answer questions here.

import process from 'node:process'
import { LeaderBackend } from './backend.js'
import { InferenceError } from './errors.js'
import { errorToMessage, type FromRank, type ToRank, type TokenMessage } from './messages.js'
import { placeFromEnvironment } from './place.js'
import { Rank } from './rank.js'
import type { RequestHandle } from './scheduler.js'

function send(message: FromRank): void {
  // The channel may close at any time; the 'disconnect' handler then ends this process.
  if (process.connected) process.send?.(message, undefined, undefined, () => undefined)
}

function fail(error: unknown): void {
  send({ type: 'failed', error: errorToMessage(error) })
  process.exitCode = 1
  // Time for the message to leave; then nothing may hold this process.
  setTimeout(() => process.exit(1), 200)
}

type Handler = (message: ToRank) => Promise<void>

function serveLeader(rank: Rank): Handler {
  const backend = new LeaderBackend(rank, false)
  const handles = new Map<number, RequestHandle>()
  let outbox: TokenMessage[] = []
  const flush = (): void => {
    const tokens = outbox
    outbox = []
    if (tokens.length > 0) send({ type: 'tokens', tokens })
  }
  return async (message) => {
    switch (message.type) {
      case 'submit': {
        const { request } = message
        try {
          const handle = backend.submit(message.asked, {
            token: (event) => {
              if (outbox.length === 0) setImmediate(flush)
              outbox.push({ request, ...event })
              if (event.finishReason) handles.delete(request)
            },
            fail: (error) => {
              fail(error)
            },
          })
          handles.set(request, handle)
        } catch (error) {
          send({ type: 'refused', request, error: errorToMessage(error) })
        }
        return
      }
      case 'abort':
        handles.get(message.request)?.abort()
        return
      case 'close':
        // The client waits for its requests before it says so.
        for (const handle of handles.values()) handle.abort()
        await backend.close()
        flush()
        process.disconnect()
        return
      case 'open':
      case 'ping':
      case 'report':
        throw new InferenceError('ERR_INTERNAL', `'${message.type}' is no message for the leader`)
      default: {
        const never: never = message
        throw new InferenceError('ERR_INTERNAL', `unknown message ${JSON.stringify(never)}`)
      }
    }
  }
}

function serveFollower(rank: Rank): Handler {
  const served = rank.serve(() => undefined)
  served.catch(fail)
  return async (message) => {
    if (message.type !== 'close') return
    await served
    await rank.close()
    process.disconnect()
  }
}

async function open(message: ToRank & { type: 'open' }): Promise<Handler> {
  const place = placeFromEnvironment()
  let last = 0
  const rank = await Rank.open(message.config, { ...place, spinUs: message.spinUs }, (loaded, total) => {
    if (loaded === last) return
    last = loaded
    send({ type: 'progress', loaded, total })
  })
  const handler = place.rank === 0 ? serveLeader(rank) : serveFollower(rank)
  send({ type: 'ready' })
  return async (later) => {
    if (later.type === 'report') send({ type: 'report', call: later.call, report: rank.report() })
    else await handler(later)
  }
}

let handling: Promise<Handler> | undefined
process.on('message', (message: ToRank) => {
  if (message.type === 'ping') {
    send({ type: 'pong' })
  } else if (message.type === 'open') {
    handling ??= open(message)
    handling.catch(fail)
  } else {
    handling?.then((handle) => handle(message)).catch(fail)
  }
})
// A client that is gone wants nothing any more. Orderly ends disconnect from this side, with exit code 0.
process.on('disconnect', () => process.exit(process.exitCode ?? 0))
