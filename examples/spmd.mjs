// The same program on every rank: all yield the same text, rank 0 prints it. Run: npx tp-launch -n 2 examples/spmd.mjs
import { createGroup, initInference } from 'tilerank'

const engine = await initInference({ model: 'models/demo-stories' })
const group = await createGroup()
try {
  const { text, ids } = await engine.complete('One sunny morning,', { maxNewTokens: 40, temperature: 0 })
  if (group.rank === 0) console.log(text)

  // Groups and engines live side by side: every rank tells how many tokens it saw.
  const seen = group.allReduceSync(Float32Array.of(ids.length))
  if (group.rank === 0) console.log(`${group.worldSize} ranks, ${seen[0]} tokens in all`)
} finally {
  await engine.close()
  await group.close()
}
