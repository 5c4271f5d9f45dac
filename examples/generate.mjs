// Two ranks, each on its own core, go on with a story. Run: node examples/generate.mjs [MODEL_DIRECTORY]
import { initInference } from 'tilerank'

const model = process.argv[2] ?? 'models/demo-stories'
const engine = await initInference({ model, tensorParallel: { size: 2 }, dtype: 'bf16' })
try {
  for await (const piece of engine.generate('Once upon a time', { maxNewTokens: 64, temperature: 0 })) {
    process.stdout.write(piece.text)
  }
  console.log()
} finally {
  await engine.close()
}
