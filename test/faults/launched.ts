// A rank's script under tp-launch for the fault tests: the same requests on all ranks until one fails; what it saw is one line of
// standard output. TERM is answered only after that line, as a script does that cleans up.

import { initInference } from '../../tp/index.js'

const [moment = 'decode', model = '', timeoutMs = '60000', rounds = '1000000'] = process.argv.slice(2)
const monotonicMs = (): number => Number(process.hrtime.bigint() / 1000n) / 1000
const write = (text: string): void => void process.stdout.write(`${text}\n`)

process.on('SIGTERM', () => setTimeout(() => process.exit(1), 1500).unref())
write(`up=${process.env['RANK']}:${process.pid}:${process.env['TILERANK_JOB']}`)
try {
  const engine = await initInference(
    moment === 'load'
      ? { shape: 'tinyllama-1.1b', layers: 2, contextLength: 128, timeoutMs: Number(timeoutMs) }
      : { model, dtype: 'f32', timeoutMs: Number(timeoutMs), maxStepTokens: 16 },
  )
  write(`ready=${process.env['RANK']}`)
  if (moment === 'idle') await new Promise((resolve) => setTimeout(resolve, 300))
  const ids = Array.from({ length: moment === 'prompt' ? 200 : 3 }, (_, i) => 3 + ((i * 37) % 300))
  const maxNewTokens = moment === 'prompt' ? 1 : 100
  let first = ''
  for (let i = 0; i < Number(rounds); i++) {
    const given = (await engine.complete({ ids }, { maxNewTokens, temperature: 0, ignoreEos: true })).ids.join(' ')
    if (first === '') first = given
    if (given !== first) throw new Error('a later run gave other tokens')
  }
  write(`closing=${process.env['RANK']}`)
  await engine.close()
} catch (error) {
  const atMs = monotonicMs()
  const facts =
    error instanceof Error ? { ...error, message: error.message, cause: undefined } : { message: String(error) }
  process.exitCode = 1
  write(`outcome=${JSON.stringify({ rank: Number(process.env['RANK']), atMs, failure: facts })}`)
}
