// `tilerank demo`: two ranks write a short story with the embedded model, so that a newcomer sees the whole way work.

import { join } from 'node:path'
import process from 'node:process'
import type { Command } from 'commander'
import { packageRoot } from '../native/index.js'
import { positiveNumber, wholeNumber } from './options.js'
import { stream, withEngine } from './generate.js'
import { formatReport } from './report.js'

interface DemoFlags {
  readonly tp: number
  readonly prompt: string
  readonly seed?: number
  readonly maxNewTokens: number
}

export function registerDemo(program: Command): void {
  program
    .command('demo')
    .description('let two ranks write a story with the embedded model')
    .option('--tp <ranks>', 'ranks to split the model over', positiveNumber, 2)
    .option('--prompt <text>', 'how the story begins', 'Once upon a time, there was a')
    .option('--seed <number>', 'another story (default: the most likely one)', wholeNumber)
    .option('--max-new-tokens <count>', 'new tokens at most', positiveNumber, 300)
    .action(async ({ tp, prompt, seed, maxNewTokens }: DemoFlags) => {
      const model = join(packageRoot, 'models', 'demo-stories')
      const asked = seed === undefined ? { temperature: 0 } : { temperature: 0.6, topK: 0, seed }
      await withEngine({ model, tensorParallel: { size: tp } }, false, async (engine, signal, loadMs) => {
        const { timing, newTokens } = await stream(engine, prompt, { ...asked, maxNewTokens, signal }, loadMs)
        process.stdout.write(`\n${formatReport(await engine.reports(), timing, newTokens)}\n`)
      })
    })
}
