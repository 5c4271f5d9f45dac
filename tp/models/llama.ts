// Llama 1 to 3 and the models that kept its form (CodeLlama, Vicuna, TinyLlama, Yi, ...), top to bottom as in the papers:
// pre-norm blocks of grouped-query attention with rotary positions (Touvron et al. 2023) and a SwiGLU feed-forward (Shazeer
// 2020). First step of the walk checkpoint -> Program; knows the names of the checkpoint and nothing about ranks.

import type { ArchSpec } from '../checkpoint/arch.js'
import { type Graph, GraphBuilder } from '../graph.js'

export function llamaGraph(arch: ArchSpec): Graph {
  const { hiddenSize, intermediateSize, numHeads, numKvHeads, headDim, vocabSize, normEps, attentionBias, mlpBias } =
    arch
  const { rotaryDims } = arch.rope
  const g = new GraphBuilder()

  const inLayer = (module: string): string => `model.layers.{layer}.${module}`
  const projection = (module: string, outputs: number, hasBias: boolean) => ({
    weight: `${inLayer(module)}.weight`,
    outputs,
    bias: hasBias ? `${inLayer(module)}.bias` : undefined,
  })

  const embedded = g.embedding('embed', 'model.embed_tokens.weight', vocabSize, hiddenSize)

  const stream = g.repeat('stream', arch.numLayers, embedded, (input) => {
    const x = g.rmsNorm('inputNorm', input, inLayer('input_layernorm.weight'), normEps)
    const q = g.linear('q', x, projection('self_attn.q_proj', numHeads * headDim, attentionBias))
    const k = g.linear('k', x, projection('self_attn.k_proj', numKvHeads * headDim, attentionBias))
    const v = g.linear('v', x, projection('self_attn.v_proj', numKvHeads * headDim, attentionBias))
    const attended = g.attention(
      'attn',
      { q: g.rope('qRotated', q, headDim, rotaryDims), k: g.rope('kRotated', k, headDim, rotaryDims), v },
      { numHeads, numKvHeads, headDim, scale: 1 / Math.sqrt(headDim) },
    )
    const o = g.linear('o', attended, projection('self_attn.o_proj', hiddenSize, attentionBias))
    const middle = g.add('middle', input, o)

    const y = g.rmsNorm('postNorm', middle, inLayer('post_attention_layernorm.weight'), normEps)
    const gate = g.linear('gate', y, projection('mlp.gate_proj', intermediateSize, mlpBias))
    const up = g.linear('up', y, projection('mlp.up_proj', intermediateSize, mlpBias))
    const down = g.linear('down', g.siluMul('mlp', gate, up), projection('mlp.down_proj', hiddenSize, mlpBias))
    return g.add('output', middle, down)
  })

  const normed = g.rmsNorm('finalNorm', stream, 'model.norm.weight', normEps)
  const headWeight = arch.tiedHead ? 'model.embed_tokens.weight' : 'lm_head.weight'
  g.logits(g.linear('head', g.selectRows('headInput', normed), { weight: headWeight, outputs: vocabSize }))

  const harmless = [
    { pattern: /(^|\.)rotary_emb\.inv_freq$/, why: 'rotary frequencies are computed from the configuration' },
  ]
  if (arch.tiedHead) harmless.push({ pattern: /^lm_head\.weight$/, why: 'a copy of the tied embedding table' })
  return g.build(harmless)
}
