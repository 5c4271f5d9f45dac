import assert from 'node:assert/strict'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'

import fc from 'fast-check'

import { parseConfig, parseGenerationConfig } from '../../tp/checkpoint/config.js'
import { inventCheckpoint, type InventedShape, openCheckpoint } from '../../tp/checkpoint/index.js'
import type { ArchSpec, GenerationDefaults } from '../../tp/checkpoint/index.js'
import { InferenceError } from '../../tp/errors.js'
import { demoModel, headerOf, llamaConfig, safetensors, Scratch, siblingModel, testModel } from './files.js'

const archOf = (
  changes: Readonly<Record<string, unknown>> = {},
  tensors: readonly string[] = ['lm_head.weight'],
): ArchSpec => parseConfig(Buffer.from(llamaConfig(changes)), 'config.json', (name) => tensors.includes(name)).arch

const generationOf = (
  changes: Readonly<Record<string, unknown>> | null,
  config: Readonly<Record<string, unknown>> = {},
): GenerationDefaults => {
  const parsed = parseConfig(Buffer.from(llamaConfig(config)), 'config.json', () => true)
  const bytes = changes === null ? null : Buffer.from(JSON.stringify(changes))
  return parseGenerationConfig(bytes, 'generation_config.json', parsed)
}

describe('config.json', () => {
  it('gives a Llama with the defaults of transformers', () => {
    assert.deepEqual(archOf(), {
      family: 'llama',
      modelType: 'llama',
      hiddenSize: 64,
      intermediateSize: 172,
      numLayers: 2,
      numHeads: 4,
      numKvHeads: 4,
      headDim: 16,
      vocabSize: 320,
      maxPositions: 256,
      normEps: 1e-6,
      activation: 'silu',
      attentionBias: false,
      mlpBias: false,
      tiedHead: false,
      rope: { theta: 10000, rotaryDims: 16, scaling: { kind: 'default' } },
    } satisfies ArchSpec)
    assert.equal(archOf({ max_position_embeddings: undefined }).maxPositions, 2048)
  })

  it('gives what it says where it says something', () => {
    const arch = archOf({
      num_key_value_heads: 2,
      head_dim: 24,
      rms_norm_eps: 1e-5,
      rope_theta: 500000,
      attention_bias: true,
      mlp_bias: true,
      hidden_act: 'silu',
      pretraining_tp: 4,
      partial_rotary_factor: 0.5,
    })
    assert.deepEqual(
      [arch.numKvHeads, arch.headDim, arch.normEps, arch.attentionBias, arch.mlpBias],
      [2, 24, 1e-5, true, true],
    )
    assert.deepEqual(arch.rope, { theta: 500000, rotaryDims: 12, scaling: { kind: 'default' } })
  })

  it('is of the Llama family by model_type, by architectures, or by both', () => {
    assert.equal(archOf({ model_type: undefined }).family, 'llama')
    assert.equal(archOf({ architectures: undefined }).family, 'llama')
    assert.equal(archOf({ architectures: ['LLaMAForCausalLM'] }).family, 'llama')
  })

  const strangers: readonly Readonly<Record<string, unknown>>[] = [
    { model_type: 'gpt5', architectures: ['Gpt5ForCausalLM'] },
    { model_type: 'llama', architectures: ['LlamaForSequenceClassification'] },
    { model_type: 'mistral', architectures: ['LlamaForCausalLM'] },
    { model_type: undefined, architectures: ['MysteryModel'] },
    { model_type: undefined, architectures: undefined },
    { model_type: '__proto__', architectures: undefined },
  ]
  for (const changes of strangers) {
    it(`is refused as ${JSON.stringify(changes)}, with the list of what is supported`, () => {
      assert.throws(() => archOf(changes), {
        code: 'ERR_UNKNOWN_ARCHITECTURE',
        message: /supported: llama \(LlamaForCausalLM\)/,
      })
    })
  }

  it('ties the head where it says so and the files have none of their own', () => {
    assert.equal(archOf({ tie_word_embeddings: true }, []).tiedHead, true)
    assert.equal(archOf({ tie_word_embeddings: true }, ['lm_head.weight']).tiedHead, false)
    assert.equal(archOf({ tie_word_embeddings: false }, []).tiedHead, false)
    assert.equal(archOf({}, []).tiedHead, false)
  })

  describe('rotary positions', () => {
    const ropeOf = (changes: Readonly<Record<string, unknown>>): unknown => {
      const { rope, maxPositions } = archOf(changes)
      return { ...rope, maxPositions }
    }
    const llama3 = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 128 }

    it('scale as either spelling says: rope_scaling with type or rope_type, or rope_parameters', () => {
      const expected = { theta: 10000, rotaryDims: 16, scaling: { kind: 'linear', factor: 4 }, maxPositions: 1024 }
      assert.deepEqual(ropeOf({ rope_scaling: { type: 'linear', factor: 4 } }), expected)
      assert.deepEqual(ropeOf({ rope_scaling: { rope_type: 'linear', factor: 4.0 } }), expected)
      assert.deepEqual(ropeOf({ rope_scaling: { type: 'linear', rope_type: 'linear', factor: 4 } }), expected)
      assert.deepEqual(ropeOf({ rope_parameters: { rope_type: 'linear', factor: 4 } }), expected)
      assert.deepEqual(
        ropeOf({ rope_parameters: { rope_type: 'linear', factor: 4, rope_theta: 5e5 }, rope_theta: 7 }),
        { ...expected, theta: 5e5 },
      )
      assert.deepEqual(
        ropeOf({ rope_parameters: { rope_type: 'default', rope_theta: 1e6, partial_rotary_factor: 0.25 } }),
        {
          theta: 1e6,
          rotaryDims: 4,
          scaling: { kind: 'default' },
          maxPositions: 256,
        },
      )
    })

    it('scale dynamically from the original length', () => {
      const scaling = { kind: 'dynamic', factor: 2, originalMaxPositions: 256 }
      assert.deepEqual(ropeOf({ rope_scaling: { type: 'dynamic', factor: 2 } }), {
        theta: 10000,
        rotaryDims: 16,
        scaling,
        maxPositions: 512,
      })
      const given = { rope_scaling: { type: 'dynamic', factor: 2, original_max_position_embeddings: 128 } }
      assert.deepEqual(ropeOf(given), {
        theta: 10000,
        rotaryDims: 16,
        scaling: { ...scaling, originalMaxPositions: 128 },
        maxPositions: 256,
      })
    })

    it('scale as Llama 3 does, with its published values as defaults', () => {
      const scaling = { kind: 'llama3', factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositions: 128 }
      assert.deepEqual(ropeOf({ rope_scaling: { rope_type: 'llama3', ...llama3 } }), {
        theta: 10000,
        rotaryDims: 16,
        scaling,
        maxPositions: 256,
      })
      assert.deepEqual(archOf({ rope_scaling: { rope_type: 'llama3' } }).rope.scaling, {
        ...scaling,
        originalMaxPositions: 8192,
      })
    })

    const wrong: readonly (readonly [Readonly<Record<string, unknown>>, RegExp, string?])[] = [
      [
        { rope_scaling: { type: 'yarn', factor: 2 } },
        /rope_scaling\.type is "yarn"; supported are default, linear/,
        'ERR_UNSUPPORTED_MODEL',
      ],
      [
        { rope_parameters: { rope_type: 'longrope' } },
        /rope_parameters\.rope_type is "longrope"/,
        'ERR_UNSUPPORTED_MODEL',
      ],
      [{ rope_scaling: { type: 'constructor' } }, /rope_scaling\.type is "constructor"/, 'ERR_UNSUPPORTED_MODEL'],
      [{ rope_scaling: { type: 'linear' } }, /rope_scaling\.factor is missing/],
      [{ rope_scaling: { type: 'linear', factor: 0.5 } }, /rope_scaling\.factor is 0\.5; allowed is a number from 1/],
      [{ rope_scaling: { type: 'linear', factor: '4' } }, /rope_scaling\.factor is "4"/],
      [{ rope_scaling: { type: 'linear', factor: 1e6 } }, /rope_scaling\.factor is 1000000; allowed is what stretches/],
      [
        { rope_scaling: { type: 'linear', rope_type: 'dynamic', factor: 2 } },
        /rope_scaling\.type is "linear"; allowed is the same/,
      ],
      [{ rope_scaling: 'linear' }, /rope_scaling is "linear"; allowed is an object or null/],
      [
        { rope_scaling: { rope_type: 'linear', factor: 2 }, rope_parameters: { rope_type: 'default' } },
        /rope_scaling is .* null beside/,
      ],
      [
        { rope_scaling: { rope_type: 'llama3', ...llama3, high_freq_factor: 1 } },
        /high_freq_factor is 1; allowed is a number above low_freq_factor \(1\)/,
      ],
      [
        { rope_scaling: { rope_type: 'llama3', ...llama3, original_max_position_embeddings: 0 } },
        /original_max_position_embeddings is 0/,
      ],
      [{ rope_theta: 0 }, /rope_theta is 0/],
      [{ rope_theta: -1 }, /rope_theta is -1/],
      [{ rope_theta: '10000' }, /rope_theta is "10000"/],
      [{ partial_rotary_factor: 1.5 }, /partial_rotary_factor is 1\.5/],
      [
        { partial_rotary_factor: 0.01 },
        /partial_rotary_factor is 0\.01; allowed is what makes an even number of the 16/,
      ],
      [{ partial_rotary_factor: 0.4375 }, /partial_rotary_factor is 0\.4375/],
    ]
    for (const [changes, message, code = 'ERR_BAD_CONFIG'] of wrong) {
      it(`refuse ${JSON.stringify(changes)}`, () => assert.throws(() => archOf(changes), { code, message }))
    }
  })

  describe('with hostile values', () => {
    const sizes = ['hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size']
    for (const key of sizes) {
      it(`is refused without ${key}, and with values of it that are no size`, () => {
        assert.throws(() => archOf({ [key]: undefined }), {
          code: 'ERR_BAD_CONFIG',
          message: new RegExp(`^config.json: ${key} is missing$`),
        })
        for (const value of [0, -1, 1.5, 2 ** 31, 1e300, '64', [64], {}, true] as const) {
          const expected = {
            code: 'ERR_BAD_CONFIG',
            message: new RegExp(`^config.json: ${key} is .*; allowed is an integer from 1 to [0-9]+$`),
          }
          assert.throws(() => archOf({ [key]: value }), expected, JSON.stringify(value))
        }
      })
    }

    const wrong: readonly (readonly [Readonly<Record<string, unknown>>, RegExp, string?])[] = [
      [{ num_key_value_heads: 3 }, /num_key_value_heads is 3; allowed is a divisor of num_attention_heads \(4\)/],
      [{ num_key_value_heads: 8 }, /num_key_value_heads is 8; allowed is an integer from 1 to 4/],
      [{ num_key_value_heads: 0 }, /num_key_value_heads is 0/],
      [{ num_attention_heads: 5 }, /num_attention_heads is 5; allowed is a divisor of hidden_size \(64\)/],
      [{ num_attention_heads: 64 }, /hidden_size is 64; allowed is what gives an even head size/],
      [{ head_dim: 15 }, /head_dim is 15; allowed is what gives an even head size/],
      [{ head_dim: 5000 }, /head_dim is 5000; allowed is an integer from 2 to 4096/],
      [{ head_dim: 4096, num_attention_heads: 512 }, /head_dim is 4096; allowed is heads times head size up to/],
      [{ hidden_act: 'gelu' }, /hidden_act is "gelu"; supported is 'silu'/, 'ERR_UNSUPPORTED_MODEL'],
      [{ hidden_act: 7 }, /hidden_act is 7; allowed is a string/],
      [{ rms_norm_eps: 0 }, /rms_norm_eps is 0/],
      [{ rms_norm_eps: -1e-5 }, /rms_norm_eps/],
      [{ rms_norm_eps: 1 }, /rms_norm_eps is 1/],
      [{ max_position_embeddings: 0 }, /max_position_embeddings is 0/],
      [
        { max_position_embeddings: 2 ** 40 },
        /max_position_embeddings is 1099511627776; allowed is an integer from 1 to 16777216/,
      ],
      [{ attention_bias: 'false' }, /attention_bias is "false"; allowed is true or false/],
      [{ mlp_bias: 1 }, /mlp_bias is 1/],
      [{ tie_word_embeddings: 0 }, /tie_word_embeddings is 0/],
      [{ eos_token_id: 320 }, /eos_token_id is 320; allowed is token ids from 0 to 319/],
      [{ eos_token_id: [2, -1] }, /eos_token_id is \[2,-1\]/],
      [{ eos_token_id: '2' }, /eos_token_id is "2"/],
      [{ bos_token_id: 1e9 }, /bos_token_id is 1000000000/],
      [{ architectures: 'LlamaForCausalLM' }, /architectures is "LlamaForCausalLM"; allowed is a list of strings/],
      [{ architectures: [1] }, /architectures/],
      [{ model_type: 3 }, /model_type is 3/],
      [
        { quantization_config: { quant_method: 'gptq' } },
        /quantization_config is .*gptq.*; checkpoints that were quantised/,
        'ERR_UNSUPPORTED_MODEL',
      ],
    ]
    for (const [changes, message, code = 'ERR_BAD_CONFIG'] of wrong) {
      it(`is refused: ${JSON.stringify(changes)}`, () => assert.throws(() => archOf(changes), { code, message }))
    }

    const texts: Readonly<Record<string, readonly [string | Uint8Array, RegExp]>> = {
      nothing: ['', /a value is missing/],
      'a list': ['[]', /not a JSON object/],
      'half an object': ['{"model_type":"llama"', /comma or a closing brace/],
      'bytes that are no UTF-8': [Uint8Array.of(0x7b, 0x80, 0x7d), /not valid UTF-8/],
      'a key twice': ['{"hidden_size":64,"hidden_size":128}', /"hidden_size" stands twice/],
      NaN: ['{"rms_norm_eps":NaN}', /a value is missing/],
      'a number beyond all doubles': [
        llamaConfig().replace('"hidden_size":64', '"hidden_size":1e999'),
        /hidden_size is "1e999"/,
      ],
      'deep nesting': ['{"a":'.repeat(10_000), /nested deeper than 32/],
    }
    for (const [name, [text, message]] of Object.entries(texts)) {
      it(`is refused as ${name}`, () => {
        assert.throws(() => parseConfig(Buffer.from(text), 'config.json', () => true), {
          code: 'ERR_BAD_CONFIG',
          message,
        })
      })
    }

    it('gives checked numbers or a refusal, whatever stands in it', function () {
      this.timeout(20_000)
      const base = Object.keys(
        JSON.parse(llamaConfig({ num_key_value_heads: 2, head_dim: 16, rope_theta: 1, rope_scaling: null })) as object,
      )
      const anyValue = fc.oneof(
        fc.jsonValue({ maxDepth: 2 }),
        fc.integer(),
        fc.double(),
        fc.constantFrom(1, 2, 4, 8, 64),
      )
      let accepted = 0
      fc.assert(
        fc.property(fc.constantFrom(...base), anyValue, (key, value) => {
          try {
            const arch = archOf({ [key]: value })
            const {
              hiddenSize,
              intermediateSize,
              numLayers,
              numHeads,
              numKvHeads,
              headDim,
              vocabSize,
              maxPositions,
              rope,
            } = arch
            const counts = [
              hiddenSize,
              intermediateSize,
              numLayers,
              numHeads,
              numKvHeads,
              headDim,
              vocabSize,
              maxPositions,
              rope.rotaryDims,
            ]
            assert.ok(counts.every((count) => Number.isInteger(count) && count > 0 && count <= 2 ** 24))
            assert.ok(numHeads % numKvHeads === 0 && headDim % 2 === 0 && rope.theta > 1 && arch.normEps > 0)
            accepted++
          } catch (error) {
            if (!(error instanceof InferenceError)) throw error
          }
        }),
        { numRuns: 3000, seed: 4 },
      )
      assert.ok(accepted > 100)
    })
  })
})

describe('generation_config.json', () => {
  it('may be missing or silent: defaults of transformers, ids of config.json', () => {
    const expected: GenerationDefaults = {
      bosTokenId: 1,
      eosTokenIds: [2],
      doSample: false,
      temperature: 1,
      topK: 50,
      topP: 1,
      repetitionPenalty: 1,
      maxNewTokens: null,
    }
    assert.deepEqual(generationOf(null), expected)
    assert.deepEqual(generationOf({}), expected)
    assert.deepEqual(generationOf({ temperature: null, top_k: null, eos_token_id: null, max_length: 20 }), expected)
    const none = generationOf(null, { bos_token_id: undefined, eos_token_id: null })
    assert.deepEqual([none.bosTokenId, none.eosTokenIds], [null, []])
  })

  it('wins over config.json, and lists several end tokens', () => {
    const settings = {
      bos_token_id: 5,
      eos_token_id: [2, 1, 2],
      do_sample: true,
      temperature: 0.6,
      top_k: 0,
      top_p: 0.9,
      repetition_penalty: 1.1,
    }
    assert.deepEqual(generationOf({ ...settings, max_new_tokens: 100 }), {
      bosTokenId: 5,
      eosTokenIds: [2, 1],
      doSample: true,
      temperature: 0.6,
      topK: 0,
      topP: 0.9,
      repetitionPenalty: 1.1,
      maxNewTokens: 100,
    })
  })

  const wrong: readonly (readonly [string, unknown])[] = [
    ['do_sample', 1], ['temperature', -1], ['temperature', 1e9], ['temperature', 'hot'], ['top_k', -1], ['top_k', 1.5], ['top_k', 1e12],
    ['top_p', 0], ['top_p', 2], ['repetition_penalty', 0], ['repetition_penalty', -1], ['max_new_tokens', 0], ['max_new_tokens', 1e15],
    ['eos_token_id', 320], ['eos_token_id', [[2]]], ['eos_token_id', Array.from({ length: 2000 }, () => 2)], ['bos_token_id', -1],
  ] // prettier-ignore
  for (const [key, value] of wrong) {
    it(`is refused with ${key}: ${JSON.stringify(value).slice(0, 20)}`, () => {
      assert.throws(() => generationOf({ [key]: value }), {
        code: 'ERR_BAD_CONFIG',
        message: new RegExp(`^generation_config.json: ${key} is .*; allowed`),
      })
    })
  }
})

describe('openCheckpoint', () => {
  it('opens the models of the package', async () => {
    const demo = await openCheckpoint(demoModel)
    assert.deepEqual(
      [demo.arch.hiddenSize, demo.arch.numLayers, demo.arch.numHeads, demo.arch.numKvHeads],
      [256, 4, 8, 4],
    )
    assert.equal(demo.storedDType, 'bf16')
    assert.equal(demo.generation.bosTokenId, 0)
    const llama = await openCheckpoint(testModel('llama'))
    assert.deepEqual([llama.storedDType, llama.arch.vocabSize, llama.arch.tiedHead], ['f32', 320, false])
    assert.deepEqual(llama.tensors.get('model.layers.2.mlp.down_proj.weight')?.shape, [64, 172])
    const odd = await openCheckpoint(testModel('llama-gqa-odd'))
    assert.deepEqual([odd.arch.numHeads, odd.arch.numKvHeads, odd.arch.headDim, odd.files?.length], [9, 3, 8, 2])
    for (const tensor of odd.tensors.values()) assert.ok(tensor.file.startsWith('/') && tensor.nbytes > 0)
    assert.equal(new Set([demo.fingerprint, llama.fingerprint, odd.fingerprint]).size, 3)
  })

  const stories = siblingModel('stories260K')
  const title = 'ties the head of stories260K'
  if (stories === null) it.skip(`${title} (it is not beside this working copy)`)
  else {
    it(title, async () => {
      const { arch, generation, tensors } = await openCheckpoint(stories)
      assert.deepEqual([arch.tiedHead, generation.eosTokenIds, tensors.has('lm_head.weight')], [true, [2, 1], false])
    })
  }

  const write = (scratch: Scratch, config = llamaConfig(), header = headerOf({ w: {} })): void => {
    scratch.write('config.json', config)
    scratch.write('model.safetensors', safetensors(header, 16))
  }

  it('has a fingerprint that follows config, generation config and headers, and nothing else', async () => {
    const printOf = async (change: (scratch: Scratch) => void): Promise<string> => {
      using scratch = new Scratch()
      write(scratch)
      change(scratch)
      const { fingerprint } = await openCheckpoint(scratch.path)
      assert.match(fingerprint, /^[0-9a-f]{64}$/)
      return fingerprint
    }
    const plain = await printOf(() => undefined)
    assert.equal(await printOf((scratch) => scratch.write('README.md', 'x')), plain)
    const others = await Promise.all([
      printOf((scratch) => write(scratch, llamaConfig({ rope_theta: 5e5 }))),
      printOf((scratch) => scratch.write('generation_config.json', '{"do_sample":true}')),
      printOf((scratch) => write(scratch, llamaConfig(), headerOf({ v: {} }))),
    ])
    assert.equal(new Set([plain, ...others]).size, 4)
  })

  it('tells the dtype that holds every matrix', async () => {
    const dtypeOf = async (first: string, second: string): Promise<string> => {
      using scratch = new Scratch()
      const size: Readonly<Record<string, number>> = { F32: 16, BF16: 8, F16: 8 }
      const [a = 0, b = 0] = [size[first], size[second]]
      scratch.write('config.json', llamaConfig())
      const header = headerOf({
        a: { dtype: first, offsets: [0, a] },
        b: { dtype: second, offsets: [a, a + b] },
        norm: { shape: [1], offsets: [a + b, a + b + 4] },
      })
      scratch.write('model.safetensors', safetensors(header, a + b + 4))
      return (await openCheckpoint(scratch.path)).storedDType
    }
    assert.equal(await dtypeOf('BF16', 'BF16'), 'bf16')
    assert.equal(await dtypeOf('F16', 'F16'), 'f16')
    assert.equal(await dtypeOf('F16', 'F32'), 'f32')
    assert.equal(await dtypeOf('F16', 'BF16'), 'f32')
  })

  it('says what it looked for when something is not there', async () => {
    using scratch = new Scratch()
    const missing = (message: RegExp) => ({ code: 'ERR_MODEL_NOT_FOUND', message })
    await assert.rejects(openCheckpoint(join(scratch.path, 'nowhere')), missing(/nowhere: no such directory/))
    await assert.rejects(openCheckpoint(scratch.write('file', '')), missing(/no such directory/))
    await assert.rejects(openCheckpoint(scratch.path), missing(/looked for config\.json/))
    scratch.write('config.json', llamaConfig())
    await assert.rejects(
      openCheckpoint(scratch.path),
      missing(/looked for model\.safetensors and model\.safetensors\.index\.json/),
    )
    for (const path of ['', 'a\0b']) await assert.rejects(openCheckpoint(path), { code: 'ERR_INVALID_OPTION' })
  })

  it('refuses configuration files that are no regular files or absurdly large, and weights without a matrix', async () => {
    using scratch = new Scratch()
    write(scratch)
    execFileSync('mkfifo', [join(scratch.path, 'generation_config.json')])
    await assert.rejects(openCheckpoint(scratch.path), {
      code: 'ERR_BAD_CONFIG',
      message: /generation_config\.json: it is a FIFO/,
    })

    using large = new Scratch()
    write(large)
    writeFileSync(join(large.path, 'config.json'), Buffer.alloc(17 * 2 ** 20, ' '))
    await assert.rejects(openCheckpoint(large.path), { code: 'ERR_BAD_CONFIG', message: /at most 16777216 are read/ })

    using directory = new Scratch()
    mkdirSync(join(directory.path, 'config.json'))
    await assert.rejects(openCheckpoint(directory.path), {
      code: 'ERR_BAD_CONFIG',
      message: /config\.json: it is a directory/,
    })

    using empty = new Scratch()
    write(empty, llamaConfig(), headerOf({ packed: { dtype: 'I32' } }))
    await assert.rejects(openCheckpoint(empty.path), {
      code: 'ERR_BAD_CHECKPOINT',
      message: /no matrix of dtype F32, F16 or BF16/,
    })
  })
})

describe('inventCheckpoint', () => {
  it('has the shapes of the models it is named after', () => {
    const parameters = (shape: InventedShape): number =>
      [...inventCheckpoint(shape).tensors.values()].reduce((sum, tensor) => sum + tensor.nbytes / 2, 0)
    // Published parameter counts.
    assert.equal(parameters('tinyllama-1.1b'), 1_100_048_384)
    assert.equal(parameters('llama2-7b'), 6_738_415_616)
    assert.equal(parameters('llama2-13b'), 13_015_864_320)
  })

  it('names the tensors as real checkpoints do, all made up', async () => {
    const { tensors, arch } = inventCheckpoint('tinyllama-1.1b', 4)
    assert.equal(arch.numLayers, 4)
    assert.deepEqual([...tensors.keys()].sort(), [...(await openCheckpoint(demoModel)).tensors.keys()].sort())
    assert.ok([...tensors.values()].every((tensor) => tensor.file === '' && tensor.dtype === 'bf16'))
  })

  it('refuses shapes and numbers of layers that do not exist', () => {
    for (const shape of ['llama3-8b', 'toString']) {
      assert.throws(() => Reflect.apply(inventCheckpoint, undefined, [shape]), {
        code: 'ERR_INVALID_OPTION',
        message: /known are tinyllama-1\.1b/,
      })
    }
    for (const layers of [0, -1, 1.5, NaN, 1e9])
      assert.throws(() => inventCheckpoint('llama2-7b', layers), { code: 'ERR_INVALID_OPTION' })
  })
})

describe('the test models', () => {
  it('are complete, so that no test passes for want of them', () => {
    for (const directory of [demoModel, testModel('llama'), testModel('llama-gqa-odd')]) {
      const golden: unknown = JSON.parse(readFileSync(join(directory, 'golden.json'), 'utf8'))
      assert.ok(typeof golden === 'object' && golden !== null && 'greedy' in golden)
    }
  })
})
