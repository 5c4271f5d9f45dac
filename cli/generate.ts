// `tilerank generate`: text from a checkpoint, streamed; or one JSON object for scripts. Only the text, or only the JSON, goes to
// stdout; progress and the closing table go to stderr.

import { readFileSync } from 'node:fs'
import process from 'node:process'
import { SingleBar } from 'cli-progress'
import { Option, type Command } from 'commander'
import { inventedShapes, type InventedShape } from '../tp/checkpoint/index.js'
import type { ChatMessage } from '../tp/chat.js'
import { InferenceError } from '../tp/errors.js'
import { initInference, timesOf, type Completion, type Engine, type Prompt } from '../tp/engine.js'
import { monotonicMs } from '../tp/scheduler.js'
import type { GenerateOptions, InferenceOptions } from '../tp/options.js'
import { collected, idList, positiveNumber, realNumber, wholeNumber } from './options.js'
import { formatReport, tokenStatistics, type Timing } from './report.js'

interface GenerateFlags {
  readonly model?: string
  readonly shape?: InventedShape
  readonly layers?: number
  readonly prompt?: string
  readonly chat?: boolean
  readonly messages?: string
  readonly ids?: number[][]
  readonly tp: number
  readonly dtype?: 'bf16' | 'f32'
  readonly threads?: number
  readonly isa?: string
  readonly maxNewTokens?: number
  readonly temperature?: number
  readonly topK?: number
  readonly topP?: number
  readonly repetitionPenalty?: number
  readonly seed?: number
  readonly eosIds?: number[]
  readonly ignoreEos?: boolean
  readonly logits?: boolean
  readonly json?: boolean
  readonly quiet?: boolean
  readonly contextLength?: number
  readonly kvCacheTokens?: number
  readonly stepTokens?: number
  readonly timeoutMs?: number
}

export function registerGenerate(program: Command): void {
  program
    .command('generate')
    .description('write text with a model, split over ranks of this machine')
    .option('--model <directory>', 'a checkpoint in the Hugging Face layout')
    .addOption(
      new Option('--shape <name>', 'made-up weights in a well-known shape instead of a checkpoint')
        .choices(inventedShapes)
        .conflicts('model'),
    )
    .option('--layers <count>', 'with --shape: fewer layers', positiveNumber)
    .option('--prompt <text>', 'the text to go on from')
    .option('--chat', "put the prompt into the model's chat template, as a user's message")
    .option('--messages <file>', 'a JSON array of {role, content}, for the chat template')
    .option('--ids <list>', 'token ids instead of text, such as 1,5,9; repeat for a batch', collected(idList))
    .option('--tp <ranks>', 'ranks to split the model over', positiveNumber, 1)
    .addOption(
      new Option('--dtype <dtype>', 'of weights, KV cache and exchanged sums').choices(['bf16', 'f32']).default('bf16'),
    )
    .option('--threads <count>', 'threads of each rank (default: the allowed cores, shared out)', positiveNumber)
    .option('--isa <tier>', 'highest ISA tier to use; see tilerank doctor')
    .option('--max-new-tokens <count>', 'new tokens at most', wholeNumber)
    .option('--temperature <number>', '0: always the most likely token', realNumber)
    .option('--top-k <count>', 'choose among the k most likely; 0: all', wholeNumber)
    .option('--top-p <number>', 'choose among the most likely that make up this probability', realNumber)
    .option('--repetition-penalty <number>', 'above 1: tokens seen already become less likely', realNumber)
    .option('--seed <number>', 'equal seeds give equal texts', wholeNumber)
    .option('--eos-ids <list>', "ids that end the text, instead of the model's", idList)
    .option('--ignore-eos', 'go on past end tokens')
    .option('--logits', 'with --json: the logits after the last prompt token')
    .option('--context-length <tokens>', "longest sequence (default: the model's, at most 8192)", positiveNumber)
    .option('--kv-cache-tokens <tokens>', 'size of the KV cache, all sequences together', positiveNumber)
    .option('--step-tokens <tokens>', 'length of a prompt chunk (default: 512)', positiveNumber)
    .option('--timeout-ms <milliseconds>', 'how long one collective may wait for its peers', positiveNumber)
    .option('--json', 'print one JSON object: ids, text, logits, timing, ranks')
    .option('--quiet', 'no progress bar, no table')
    .action(async (flags: GenerateFlags) => {
      await generate(flags)
    })
}

function usage(message: string): InferenceError {
  return new InferenceError('ERR_INVALID_OPTION', message)
}

/** One prompt, or several for a batch of ids. */
function promptsOf(flags: GenerateFlags): Prompt[] {
  const given = [flags.prompt !== undefined, flags.messages !== undefined, flags.ids !== undefined].filter(
    Boolean,
  ).length
  if (given !== 1) throw usage('give one of --prompt, --messages and --ids')
  if (flags.ids) return flags.ids.map((ids) => ({ ids }))
  if (flags.messages !== undefined) return [{ messages: readMessages(flags.messages) }]
  const prompt = flags.prompt ?? ''
  return [flags.chat ? { messages: [{ role: 'user', content: prompt }] } : prompt]
}

function readMessages(file: string): ChatMessage[] {
  let parsed: unknown
  try {
    parsed = JSON.parse(readFileSync(file, 'utf8'))
  } catch (error) {
    throw usage(`--messages ${file}: ${error instanceof Error ? error.message : String(error)}`)
  }
  if (!Array.isArray(parsed)) throw usage(`--messages ${file}: a JSON array of {role, content} is expected`)
  return parsed as ChatMessage[] // each message is checked by the chat template
}

/** Options of the engine from flags; `prompts` decide how many sequences run at once. */
export function engineOptions(
  flags: GenerateFlags,
  prompts: number,
  onProgress?: InferenceOptions['onProgress'],
): InferenceOptions {
  if (flags.model === undefined && flags.shape === undefined)
    throw usage('give --model DIRECTORY (or --shape NAME for made-up weights)')
  return {
    ...(flags.shape === undefined ? { model: flags.model ?? '' } : { shape: flags.shape }),
    ...(flags.layers === undefined ? {} : { layers: flags.layers }),
    tensorParallel: { size: flags.tp },
    dtype: flags.dtype ?? 'bf16',
    ...(flags.threads === undefined ? {} : { threadsPerRank: flags.threads }),
    ...(flags.isa === undefined ? {} : { isa: flags.isa }),
    ...(flags.contextLength === undefined ? {} : { contextLength: flags.contextLength }),
    ...(flags.kvCacheTokens === undefined ? {} : { kvCacheTokens: flags.kvCacheTokens }),
    ...(flags.stepTokens === undefined ? {} : { maxStepTokens: flags.stepTokens }),
    ...(flags.timeoutMs === undefined ? {} : { timeoutMs: flags.timeoutMs }),
    maxSequences: Math.max(1, prompts),
    ...(onProgress ? { onProgress } : {}),
  }
}

/** A bar on a terminal's stderr; nothing elsewhere. */
export function progressBar(isQuiet: boolean): { onProgress?: InferenceOptions['onProgress']; stop: () => void } {
  if (isQuiet || !process.stderr.isTTY) return { stop: () => undefined }
  const bar = new SingleBar({
    stream: process.stderr,
    format: 'loading {bar} {percentage} % of {totalMiB} MiB',
    barCompleteChar: '█',
    barIncompleteChar: '░',
    hideCursor: true,
    clearOnComplete: true,
  })
  let isStarted = false
  return {
    onProgress: ({ loadedBytes, totalBytes }) => {
      const payload = { totalMiB: (totalBytes / 2 ** 20).toFixed(0) }
      if (!isStarted) bar.start(totalBytes, loadedBytes, payload)
      isStarted = true
      bar.setTotal(totalBytes)
      bar.update(loadedBytes, payload)
    },
    stop: () => {
      if (isStarted) bar.stop()
    },
  }
}

/** Opens an engine with a progress bar, and closes it whatever `use` does. Ctrl-C aborts the signal. */
export async function withEngine<T>(
  options: InferenceOptions,
  isQuiet: boolean,
  use: (engine: Engine, signal: AbortSignal, loadMs: number) => Promise<T>,
): Promise<T> {
  const interrupt = new AbortController()
  const onSignal = (): void => {
    interrupt.abort(new InferenceError('ERR_ABORTED', 'interrupted'))
  }
  process.once('SIGINT', onSignal)
  process.once('SIGTERM', onSignal)
  const bar = progressBar(isQuiet)
  const start = performance.now()
  try {
    const engine = await initInference({
      ...options,
      signal: interrupt.signal,
      ...(bar.onProgress ? { onProgress: bar.onProgress } : {}),
    }).finally(bar.stop)
    try {
      return await use(engine, interrupt.signal, performance.now() - start)
    } finally {
      interrupt.abort() // when one of a batch fails, the others need not run to their end
      await engine.close()
    }
  } finally {
    process.removeListener('SIGINT', onSignal)
    process.removeListener('SIGTERM', onSignal)
  }
}

async function generate(flags: GenerateFlags): Promise<void> {
  const prompts = promptsOf(flags)
  if (flags.chat && flags.prompt === undefined) throw usage('--chat goes with --prompt')
  if (flags.logits && !flags.json) throw usage('--logits goes with --json')
  const isQuiet = flags.quiet ?? flags.json ?? false
  const asked: GenerateOptions = {
    maxNewTokens: flags.maxNewTokens,
    temperature: flags.temperature,
    topK: flags.topK,
    topP: flags.topP,
    repetitionPenalty: flags.repetitionPenalty,
    seed: flags.seed,
    eosIds: flags.eosIds,
    ignoreEos: flags.ignoreEos,
    wantLogits: flags.logits,
  }
  await withEngine(engineOptions(flags, prompts.length), isQuiet, async (engine, signal, loadMs) => {
    if (flags.json || prompts.length > 1) {
      const done = await Promise.all(prompts.map((prompt) => engine.complete(prompt, { ...asked, signal })))
      if (flags.json) process.stdout.write(`${JSON.stringify(await jsonOf(engine, done, loadMs))}\n`)
      else for (const { text, ids } of done) process.stdout.write(`${text ?? ids.join(',')}\n`)
      return
    }
    const [prompt] = prompts
    if (prompt === undefined) return
    const { timing, newTokens } = await stream(engine, prompt, { ...asked, signal }, loadMs)
    if (!isQuiet) process.stderr.write(`\n${formatReport(await engine.reports(), timing, newTokens)}\n`)
  })
}

/** Writes the prompt (where it is text) and what follows to stdout, as it comes; nothing when the request is refused. */
export async function stream(
  engine: Engine,
  prompt: Prompt,
  options: GenerateOptions,
  loadMs: number,
): Promise<{ timing: Timing; newTokens: number }> {
  const times: number[] = []
  const start = monotonicMs()
  for await (const { text, ids, atMs } of engine.generate(prompt, options)) {
    if (times.push(atMs) === 1 && typeof prompt === 'string') process.stdout.write(prompt)
    process.stdout.write(engine.tokenizer ? text : `${ids.join(',')} `)
  }
  process.stdout.write('\n')
  const { promptMs, tokenMs } = timesOf(start, times)
  return { timing: { loadMs, promptMs, tokenMs: tokenStatistics(tokenMs) }, newTokens: times.length }
}

const base64 = (values: Float32Array): string =>
  Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString('base64')

/** The object of --json: plain values for one prompt, arrays for a batch. */
async function jsonOf(engine: Engine, done: readonly Completion[], loadMs: number): Promise<object> {
  const each = <T>(of: (completion: Completion) => T): T | T[] => {
    const [only] = done
    return done.length === 1 && only ? of(only) : done.map(of)
  }
  const hasLogits = done.some((completion) => completion.logits)
  return {
    ids: each((c) => c.ids),
    text: each((c) => c.text),
    finishReason: each((c) => c.finishReason),
    ...(hasLogits ? { logits: each((c) => (c.logits ? base64(c.logits) : null)) } : {}),
    timing: {
      loadMs,
      promptMs: each((c) => c.promptMs),
      tokenMs: each((c) => tokenStatistics(c.tokenMs)),
    },
    ranks: await engine.reports(),
  }
}
