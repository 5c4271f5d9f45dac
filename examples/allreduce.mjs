// Sums one tensor over all ranks: tp-launch -n 2 examples/allreduce.mjs
import { createGroup } from 'tilerank/collectives'

const group = await createGroup()
try {
  const tensor = group.alloc('f32', [4096])
  tensor.data.fill(group.rank + 1)
  await group.allReduce(tensor)
  console.log(`rank ${group.rank} of ${group.worldSize}: every element is ${tensor.data[0]}`)
} finally {
  await group.close()
}
