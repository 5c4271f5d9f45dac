// What ranks of an engine on several nodes do in engine.test.ts, see test/ranks.ts. The same functions run on one node, to be compared.

import { createHash } from 'node:crypto'
import process from 'node:process'
import { createGroup } from '../../collectives/index.js'
import { initInference, type Completion, type Engine } from '../../tp/index.js'
import { readGolden } from '../tp/golden.js'

const say = (value: unknown): void => {
  process.send?.({ kind: 'say', value })
}

const base64 = (values: Float32Array | undefined): string =>
  values === undefined ? '' : Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString('base64')

/** Of one step, for prompts whose rows take several frames. */
export const stepTokens = 1024

/** What a run gave, in values that are equal only where all bits are. */
export interface Answers {
  readonly logits: readonly string[]
  readonly greedy: readonly (readonly number[])[]
  readonly sampled: string
  readonly batch: string
  readonly stateHash: string
}

export interface AnswersOptions {
  readonly folder: string
  readonly dtype: 'f32' | 'bf16'
  /** Tokens of a prompt whose rows are shared out between the ranks. */
  readonly longPrompt: number
}

const digestOf = (completions: readonly Completion[]): string => {
  const hash = createHash('sha256')
  for (const { ids, logits } of completions) hash.update(JSON.stringify(ids)).update(base64(logits))
  return hash.digest('hex').slice(0, 16)
}

/** Prompts one after the other, greedy runs, a sampled one, a long one, and a batch. */
export async function answersOf(engine: Engine, { folder, longPrompt }: AnswersOptions): Promise<Answers> {
  const golden = readGolden(folder)
  const promptOf = (i: number): { ids: readonly number[] } => ({ ids: golden.prompts[i]?.ids ?? [] })
  const one = { maxNewTokens: 1, temperature: 0, wantLogits: true }
  const logits: string[] = []
  for (const i of golden.prompts.keys()) logits.push(base64((await engine.complete(promptOf(i), one)).logits))
  const greedy: (readonly number[])[] = []
  for (const { prompt, max_new_tokens: maxNewTokens, eos_token_id: eosIds } of golden.greedy)
    greedy.push((await engine.complete(promptOf(prompt), { maxNewTokens, temperature: 0, eosIds })).ids)
  // At this temperature candidates do not decide: whole rows are gathered.
  const drawn = { maxNewTokens: 8, temperature: 8, topP: 0.999, topK: 0, seed: 7, ignoreEos: true, wantLogits: true }
  const sampled = digestOf([await engine.complete(promptOf(0), drawn)])
  if (longPrompt > 0) {
    const ids = Array.from({ length: longPrompt }, (_, i) => 3 + ((i * 37) % 200))
    logits.push(base64((await engine.complete({ ids }, one)).logits))
  }
  // What a batch's steps are made of depends on when its requests come: this hash is taken before.
  let [report] = await engine.reports()
  const { stateHash = '' } = report ?? {}
  const batch = digestOf(await Promise.all(golden.batch.prompts.map((i) => engine.complete(promptOf(i), one))))
  ;[report] = await engine.reports()
  return { logits, greedy, sampled, batch, stateHash }
}

export async function answers(args: AnswersOptions): Promise<Answers> {
  const engine = await initInference({ model: args.folder, dtype: args.dtype, maxStepTokens: stepTokens })
  try {
    return await answersOf(engine, args)
  } finally {
    await engine.close()
  }
}

/** Rank 0 asks and the others serve; then nobody asks for a while, and somebody does again. */
export async function serves(args: { model: string; idleMs: number }): Promise<unknown> {
  const engine = await initInference({ model: args.model, dtype: 'f32' })
  try {
    if (process.env['RANK'] !== '0') {
      await engine.serve()
      return 'served'
    }
    const texts: (string | null)[] = []
    const ask = async (): Promise<void> => {
      texts.push((await engine.complete('Once upon a time', { maxNewTokens: 20, temperature: 0 })).text)
    }
    await ask()
    const cpu = process.cpuUsage()
    await new Promise((resolve) => setTimeout(resolve, args.idleMs))
    const { user, system } = process.cpuUsage(cpu)
    await ask()
    for await (const piece of engine.generate('Tom', { maxNewTokens: 50 })) if (piece.text !== '') break
    return { texts, idleCpu: (user + system) / 1000 / args.idleMs }
  } finally {
    await engine.close()
  }
}

/** All generate until the victim is in trouble; each reports what it saw, and how long after. */
export async function breaks(args: {
  model: string
  victim: number
  how: string
  timeoutMs: number
}): Promise<unknown> {
  const rank = Number(process.env['RANK'])
  // Until all processes have started: the engine's deadline holds for its ranks' coming together, too.
  const group = await createGroup()
  await group.barrier()
  await group.close()
  const engine = await initInference({ model: args.model, dtype: 'f32', timeoutMs: args.timeoutMs })
  let at = Date.now()
  let failure: unknown = null
  let tokens = 0
  try {
    for (;;) {
      for await (const { ids } of engine.generate('Once upon a time', { maxNewTokens: 100, ignoreEos: true })) {
        tokens += ids.length
        at = Date.now()
        if (rank !== args.victim || tokens < 150) continue
        say('now')
        if (args.how === 'exit') process.exit(0)
        if (args.how === 'busy') for (const end = Date.now() + 60_000; Date.now() < end;);
        process.kill(process.pid, args.how)
      }
    }
  } catch (error) {
    failure = {
      ...(error as object),
      recorder: undefined,
      cause: undefined,
      message: (error as Error).message,
      tookMs: Date.now() - at,
      tokens,
    }
  }
  const closing = Date.now()
  await engine.close().catch(() => undefined)
  say('done')
  return { failure, closedMs: Date.now() - closing }
}
