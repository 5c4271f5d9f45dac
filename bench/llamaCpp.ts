// Times llama.cpp on a GGUF file through node-llama-cpp, which is found in the working directory and is no dependency of this
// package. Arguments: FILE THREADS PROMPT_TOKENS NEW_TOKENS. One warm-up, then one JSON line for each of two runs.

import { createRequire } from 'node:module'
import { join } from 'node:path'
import process from 'node:process'
import { pathToFileURL } from 'node:url'

interface Sequence {
  clearHistory(): Promise<void>
  evaluate(tokens: readonly number[], options: object): AsyncIterable<number>
}
interface Llama {
  loadModel(options: object): Promise<{ createContext(options: object): Promise<{ getSequence(): Sequence }> }>
}
interface Peer {
  readonly getLlama: (options: object) => Promise<Llama>
}

const [file = '', ...numbers] = process.argv.slice(2)
const [threads = 1, promptTokens = 512, newTokens = 32] = numbers.map(Number)
const entry = createRequire(join(process.cwd(), 'package.json')).resolve('node-llama-cpp')
const { getLlama } = (await import(pathToFileURL(entry).href)) as Peer

const llama = await getLlama({ gpu: false, build: 'never', logLevel: 'error', maxThreads: 0 })
const model = await llama.loadModel({ modelPath: file })
const context = await model.createContext({
  contextSize: promptTokens + newTokens + 8,
  batchSize: Math.min(promptTokens, 512),
  threads,
})
const sequence = context.getSequence()
const prompt = Array.from({ length: promptTokens }, (_, i) => 300 + ((i * 7919) % 30000))

for (let run = 0; run < 3; run++) {
  await sequence.clearHistory()
  const start = performance.now()
  const arrivals: number[] = []
  for await (const _token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    arrivals.push(performance.now())
    if (arrivals.length > newTokens) break
  }
  const promptMs = (arrivals[0] ?? start) - start
  const later = arrivals
    .slice(1)
    .map((arrival, i) => arrival - (arrivals[i] ?? arrival))
    .sort((a, b) => a - b)
  const tokenMsP50 = later[later.length >> 1] ?? NaN
  if (run === 0) continue
  process.stdout.write(
    `${JSON.stringify({ promptTokensPerS: (promptTokens / promptMs) * 1e3, tokenMsP50, tokensPerS: 1e3 / tokenMsP50 })}\n`,
  )
}
process.exit(0)
