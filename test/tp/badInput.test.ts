// Hostile and mistaken input through the whole program: every case is one run of `tilerank generate`, which must say in one line
// what is wrong, print nothing else, exit with an error, and leave nothing behind.

import assert from 'node:assert/strict'
import { cpSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { tilerank } from '../cli/tilerank.js'
import { demoModel, headerOf, safetensors, Scratch, testModel } from './files.js'

const llama = testModel('llama')

type Json = Record<string, unknown>

/** A copy of the model 'llama' that `change` spoils. */
function spoilt(folder: Scratch, change: (path: string) => void, model = llama): string {
  cpSync(model, folder.path, { recursive: true })
  change(folder.path)
  return folder.path
}

const editJson =
  (name: string, change: (json: Json) => void) =>
  (path: string): void => {
    const json = JSON.parse(readFileSync(join(path, name), 'utf8')) as Json
    change(json)
    writeFileSync(join(path, name), JSON.stringify(json))
  }
const config = (changes: Json) => editJson('config.json', (json) => Object.assign(json, changes))

/** Rewrites the header of model.safetensors; the data stays. */
const header =
  (change: (tensors: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>) => void) =>
  (path: string): void => {
    const file = join(path, 'model.safetensors')
    const bytes = readFileSync(file)
    const length = Number(bytes.readBigUInt64LE())
    const tensors = JSON.parse(bytes.toString('utf8', 8, 8 + length)) as Parameters<typeof change>[0]
    change(tensors)
    writeFileSync(file, safetensors(JSON.stringify(tensors), bytes.subarray(8 + length)))
  }

function tensorOf<T>(tensors: Record<string, T>, name: string): T {
  const tensor = tensors[name]
  assert.ok(tensor, name)
  return tensor
}

const query = 'model.layers.0.self_attn.q_proj.weight'

interface Case {
  readonly code: string
  /** What the line must name. */
  readonly says: RegExp
  readonly spoil?: (path: string) => void
  readonly model?: string
  readonly args?: readonly string[]
  readonly exitCode?: number
}

const ids = ['--ids', '1,5,9', '--max-new-tokens', '2']

const cases: Readonly<Record<string, Case>> = {
  'a directory that is not there': { code: 'ERR_MODEL_NOT_FOUND', says: /nowhere/, model: '/nowhere/at/all' },
  'a file where a directory should be': {
    code: 'ERR_MODEL_NOT_FOUND',
    says: /config\.json/,
    model: join(llama, 'config.json'),
  },
  'a directory without weights': {
    code: 'ERR_MODEL_NOT_FOUND',
    says: /safetensors/,
    spoil: (path) => {
      rmSync(join(path, 'model.safetensors'))
    },
  },
  'a file of weights that ends too early': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /model\.safetensors/,
    spoil: (path) => {
      truncateSync(join(path, 'model.safetensors'), 100_000)
    },
  },
  'a file of weights of 4 bytes': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /model\.safetensors/,
    spoil: (path) => {
      truncateSync(join(path, 'model.safetensors'), 4)
    },
  },
  'a header that claims 2^60 bytes': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /header/,
    spoil: (path) => {
      const file = join(path, 'model.safetensors')
      const bytes = readFileSync(file)
      bytes.writeBigUInt64LE(2n ** 60n)
      writeFileSync(file, bytes)
    },
  },
  'a header that is no JSON': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /model\.safetensors.*character 6/,
    spoil: (path) => {
      writeFileSync(join(path, 'model.safetensors'), safetensors('{"a": }', 64))
    },
  },
  'tensors that overlap': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /overlap|data_offsets/,
    spoil: header((tensors) => {
      const q = tensorOf(tensors, query)
      tensorOf(tensors, 'model.layers.1.self_attn.q_proj.weight').data_offsets = q.data_offsets
    }),
  },
  'a tensor beyond the end of the file': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /q_proj/,
    spoil: header((tensors) => {
      const q = tensorOf(tensors, query)
      q.data_offsets = [q.data_offsets[0] + 2 ** 40, q.data_offsets[1] + 2 ** 40]
    }),
  },
  'a tensor whose bytes are not its shape': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /q_proj/,
    spoil: header((tensors) => {
      tensorOf(tensors, query).shape = [64, 65]
    }),
  },
  'a shape that overflows': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /q_proj/,
    spoil: header((tensors) => {
      tensorOf(tensors, query).shape = [2 ** 33, 2 ** 33]
    }),
  },
  'a weight in another shape than the configuration says': {
    code: 'ERR_SHAPE_MISMATCH',
    says: /q_proj/,
    spoil: header((tensors) => {
      tensorOf(tensors, query).shape = [32, 128]
    }),
  },
  'a weight that is missing': {
    code: 'ERR_SHAPE_MISMATCH',
    says: /layers\.3.*none of that name/,
    spoil: config({ num_hidden_layers: 4 }),
  },
  'a weight that no rule covers': {
    code: 'ERR_UNCOVERED_WEIGHT',
    says: /adapter/,
    spoil: header((tensors) => {
      const entries = Object.entries(tensors).filter(([name]) => name !== '__metadata__')
      const end = Math.max(...entries.map(([, { data_offsets }]) => data_offsets[1]))
      tensors['model.layers.0.adapter.weight'] = { dtype: 'F32', shape: [0, 4], data_offsets: [end, end] }
    }),
  },
  'more layers of weights than the configuration says': {
    code: 'ERR_UNCOVERED_WEIGHT',
    says: /model\.layers\.2/,
    spoil: config({ num_hidden_layers: 2 }),
  },
  'an index that names a file outside': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /\.\.\//,
    spoil: editJson('model.safetensors.index.json', (index) => {
      const map = index['weight_map'] as Json
      for (const key of Object.keys(map).slice(0, 1)) map[key] = '../x.safetensors'
    }),
    model: testModel('llama-gqa-odd'),
  },
  'an index that names a missing shard': {
    code: 'ERR_BAD_CHECKPOINT',
    says: /model-00002-of-00002/,
    spoil: (path) => {
      rmSync(join(path, 'model-00002-of-00002.safetensors'))
    },
    model: testModel('llama-gqa-odd'),
  },
  'a link to a file of weights that leads nowhere': {
    code: 'ERR_MODEL_NOT_FOUND',
    says: /model\.safetensors/,
    spoil: (path) => {
      rmSync(join(path, 'model.safetensors'))
      symlinkSync('/nowhere/model.safetensors', join(path, 'model.safetensors'))
    },
  },
  'an unknown architecture': {
    code: 'ERR_UNKNOWN_ARCHITECTURE',
    says: /Mamba/,
    spoil: config({ architectures: ['MambaForCausalLM'], model_type: 'mamba' }),
  },
  'a configuration without hidden_size': {
    code: 'ERR_BAD_CONFIG',
    says: /hidden_size/,
    spoil: config({ hidden_size: null }),
  },
  'a negative number of layers': {
    code: 'ERR_BAD_CONFIG',
    says: /num_hidden_layers/,
    spoil: config({ num_hidden_layers: -1 }),
  },
  'an absurd vocabulary': { code: 'ERR_BAD_CONFIG', says: /vocab_size/, spoil: config({ vocab_size: 1e12 }) },
  'a size that is text': { code: 'ERR_BAD_CONFIG', says: /hidden_size/, spoil: config({ hidden_size: '64' }) },
  'heads that do not divide': {
    code: 'ERR_BAD_CONFIG',
    says: /num_attention_heads/,
    spoil: config({ num_attention_heads: 5 }),
  },
  'KV heads that do not divide': {
    code: 'ERR_BAD_CONFIG',
    says: /num_key_value_heads/,
    spoil: config({ num_key_value_heads: 3 }),
  },
  'an unknown kind of rotary scaling': {
    code: 'ERR_UNSUPPORTED_MODEL',
    says: /yarn/,
    spoil: config({ rope_scaling: { type: 'yarn', factor: 2 } }),
  },
  'a configuration that is no JSON': {
    code: 'ERR_BAD_CONFIG',
    says: /config\.json/,
    spoil: (path) => {
      writeFileSync(join(path, 'config.json'), '{"hidden_size": 64,')
    },
  },
  'an end token outside the vocabulary': {
    code: 'ERR_BAD_CONFIG',
    says: /eos_token_id/,
    spoil: editJson('generation_config.json', (json) => (json['eos_token_id'] = 320)),
  },
  'more ranks than heads': { code: 'ERR_TP_TOO_LARGE', says: /5.*4/, args: [...ids, '--tp', '5'] },
  'an id outside the vocabulary': { code: 'ERR_TOKEN_OUT_OF_RANGE', says: /320/, args: ['--ids', '1,320'] },
  'one bad id in a batch': { code: 'ERR_TOKEN_OUT_OF_RANGE', says: /999/, args: ['--ids', '1', '--ids', '999'] },
  'no ids': { code: 'ERR_EMPTY_PROMPT', says: /no tokens/, args: ['--ids', ''] },
  'a prompt longer than the context': {
    code: 'ERR_CONTEXT_LENGTH',
    says: /257.*256/,
    args: ['--ids', Array(257).fill(5).join(',')],
  },
  'more new tokens than the context has room for': {
    code: 'ERR_CONTEXT_LENGTH',
    says: /256/,
    args: ['--ids', '1', '--max-new-tokens', '256'],
  },
  'a context longer than the model has': {
    code: 'ERR_INVALID_OPTION',
    says: /1000.*256/,
    args: [...ids, '--context-length', '1000'],
    exitCode: 2,
  },
  'text for a model without a tokenizer': { code: 'ERR_NO_TOKENIZER', says: /tokenizer/, args: ['--prompt', 'hello'] },
  'a text that is too long, of which nothing is printed': {
    code: 'ERR_CONTEXT_LENGTH',
    says: /1024/,
    model: demoModel,
    args: ['--prompt', 'Tom ran. '.repeat(600)],
  },
  'a cache that no machine holds': {
    code: 'ERR_NO_MEMORY',
    says: /one rank needs [0-9.]+ GiB.*KV cache [0-9.]+ GiB.*[0-9.]+ GiB are available/,
    args: ['--shape', 'llama2-13b', '--layers', '2', '--ids', '1', '--kv-cache-tokens', '100000000'],
  },
  'a tier that is not there': { code: 'ERR_INVALID_ARGUMENT', says: /z80.*scalar/, args: [...ids, '--isa', 'z80'] },
  'logits without --json': { code: 'ERR_INVALID_OPTION', says: /--json/, args: [...ids, '--logits'], exitCode: 2 },
  'two kinds of prompt': { code: 'ERR_INVALID_OPTION', says: /one of/, args: [...ids, '--prompt', 'x'], exitCode: 2 },
  'no prompt': { code: 'ERR_INVALID_OPTION', says: /one of/, args: [], exitCode: 2 },
  'a chat of ids': { code: 'ERR_INVALID_OPTION', says: /--chat/, args: [...ids, '--chat'], exitCode: 2 },
  'a file of messages that is not there': {
    code: 'ERR_INVALID_OPTION',
    says: /nowhere\.json/,
    args: ['--messages', '/nowhere.json'],
    exitCode: 2,
  },
  'a temperature below 0': {
    code: 'ERR_INVALID_OPTION',
    says: /temperature/,
    args: [...ids, '--temperature', '-1'],
    exitCode: 2,
  },
}

describe('bad input to tilerank generate', function () {
  this.timeout(60_000)
  for (const [name, { code, says, spoil, model = llama, args = ids, exitCode = 1 }] of Object.entries(cases)) {
    it(`is refused: ${name}`, async () => {
      const folder = new Scratch()
      try {
        const from = args.includes('--shape') ? [] : ['--model', spoil ? spoilt(folder, spoil, model) : model]
        const { code: exit, stdout, stderr, left, elapsedMs } = await tilerank(['generate', ...from, ...args])
        const [first = '', ...facts] = stderr.trimEnd().split('\n')
        assert.match(first, new RegExp(`^tilerank: .* \\(${code}\\)$`), stderr)
        assert.match(first, says)
        for (const fact of facts) assert.match(fact, /^ {2}\w+: /, stderr)
        assert.equal(exit, exitCode)
        assert.equal(stdout, '')
        assert.deepEqual(left, [])
        assert.ok(elapsedMs < 10_000)
      } finally {
        folder[Symbol.dispose]()
      }
    })
  }

  it('is refused by the command line itself: junk in lists and numbers, unknown flags', async () => {
    for (const args of [
      ['--ids', '1,x'],
      ['--ids', '1,,2'],
      ['--ids', '1.5'],
      ['--ids', '-1'],
      ['--ids', '1', '--tp', '0'],
      ['--ids', '1', '--tp', 'two'],
      ['--ids', '1', '--dtype', 'f16'],
      ['--ids', '1', '--eos-ids', 'a'],
      ['--ids', '1', '--max-new-tokens', '1e3'],
      ['--ids', '1', '--no-such-flag'],
      ['--ids', '1', '--shape', 'gpt-5'],
    ]) {
      const { code, stdout, stderr, left } = await tilerank(['generate', '--model', llama, ...args])
      assert.equal(code, 2, `${args.join(' ')}: ${stderr}`)
      assert.equal(stdout, '')
      assert.match(stderr, /^error: /, stderr)
      assert.deepEqual(left, [])
    }
  })

  it('does not trust a header that is right in form alone', async () => {
    const folder = new Scratch()
    try {
      const path = spoilt(folder, (at) => {
        writeFileSync(
          join(at, 'model.safetensors'),
          safetensors(headerOf({ [query]: { shape: [64, 64], offsets: [0, 16384] } }), 16384),
        )
      })
      const { code, stderr } = await tilerank(['generate', '--model', path, ...ids])
      assert.equal(code, 1)
      assert.match(stderr, /ERR_SHAPE_MISMATCH/)
    } finally {
      folder[Symbol.dispose]()
    }
  })
})
