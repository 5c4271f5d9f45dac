import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import fc from 'fast-check'

import { type ChatMessage, ChatTemplate, requireChatTemplate } from '../../tp/chat.js'
import { loadTokenizer, requireTokenizer, StreamDecoder, Tokenizer } from '../../tp/tokens.js'
import { demoModel, Scratch, siblingModel, testModel } from './files.js'

interface GoldenRow {
  readonly text: string
  readonly ids: readonly number[]
  readonly decoded?: string
}

/** Rows with text and ids of a golden file: all that says what a text's tokens are. */
function goldenRows(path: string, key?: string): readonly GoldenRow[] {
  const parsed: unknown = JSON.parse(readFileSync(path, 'utf8'))
  const rows: unknown = key === undefined ? parsed : (parsed as Readonly<Record<string, unknown>>)[key]
  assert.ok(Array.isArray(rows) && rows.length > 0)
  return rows as readonly GoldenRow[]
}

async function load(directory: string): Promise<Tokenizer> {
  return requireTokenizer(await loadTokenizer(directory), directory)
}

/** A byte-fallback vocabulary as Llama's: all bytes, a space mark, some letters, and pieces with and without it. */
function llamaLike(changes: { settings?: Readonly<Record<string, unknown>>; postProcessor?: unknown } = {}): Tokenizer {
  const pieces = [
    '<unk>',
    '<s>',
    '</s>',
    ...Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`),
  ]
  pieces.push('▁', 'a', 'b', '▁a', '▁b', 'é', '你', '▁▁', ',', '\ufffd')
  const vocab = Object.fromEntries(pieces.map((piece, id) => [piece, id]))
  const tokenizer = {
    version: '1.0',
    added_tokens: ['<unk>', '<s>', '</s>'].map((content, id) => ({
      id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true,
    })), // prettier-ignore
    normalizer: {
      type: 'Sequence',
      normalizers: [{ type: 'Prepend', prepend: '▁' }, { type: 'Replace', pattern: { String: ' ' }, content: '▁' }],
    },
    pre_tokenizer: null,
    post_processor: changes.postProcessor ?? null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: { type: 'BPE', unk_token: '<unk>', fuse_unk: true, byte_fallback: true, vocab, merges: [['▁', 'a'], ['▁', 'b'], ['▁', '▁']] },
  } // prettier-ignore
  const settings = { bos_token: '<s>', eos_token: '</s>', unk_token: '<unk>', ...changes.settings }
  return new Tokenizer({ directory: '/models/like-llama', tokenizer, settings, template: null })
}

const frame = {
  type: 'TemplateProcessing',
  single: [
    { SpecialToken: { id: '<s>', type_id: 0 } },
    { Sequence: { id: 'A', type_id: 0 } },
    { SpecialToken: { id: '</s>', type_id: 0 } },
  ],
  pair: [],
  special_tokens: {
    '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] },
    '</s>': { id: '</s>', ids: [2], tokens: ['</s>'] },
  },
}

/** Every piece, then the flush. */
function stream(
  tokenizer: Tokenizer,
  ids: readonly number[],
  context: readonly number[] = [],
): { pieces: string[]; end: string } {
  const decoder = new StreamDecoder(tokenizer, context)
  return { pieces: ids.map((id) => decoder.push(id)), end: decoder.flush() }
}

const joined = ({ pieces, end }: { pieces: string[]; end: string }): string => pieces.join('') + end

describe('the tokenizer', () => {
  it('gives the golden ids of demo-stories, and their text back', async () => {
    const tokenizer = await load(demoModel)
    let checked = 0
    for (const key of ['prompts', 'perplexity', 'more_perplexity']) {
      const golden: unknown = JSON.parse(readFileSync(join(demoModel, 'golden.json'), 'utf8'))
      const part = (golden as Readonly<Record<string, unknown>>)[key]
      for (const { text, ids } of (Array.isArray(part) ? part : [part]) as GoldenRow[]) {
        if (typeof text !== 'string') continue
        // Stories of perplexity rows are parted by the end token, which stands in ids and not in text.
        if (!text.includes('<|endoftext|>') && !ids.includes(0)) assert.deepEqual(tokenizer.encode(text), ids)
        assert.equal(tokenizer.decode(ids), text.replaceAll('<|endoftext|>', ''))
        checked++
      }
    }
    assert.ok(checked >= 5)
  })

  it('continues the golden stories of demo-stories to the golden text', async () => {
    const tokenizer = await load(demoModel)
    const prompts = goldenRows(join(demoModel, 'golden.json'), 'prompts')
    const greedy = goldenRows(join(demoModel, 'golden.json'), 'greedy') as readonly (GoldenRow & { prompt: number })[]
    for (const { prompt, ids, text } of greedy) {
      const before = prompts[prompt]
      assert.ok(before !== undefined)
      assert.equal(tokenizer.decode([...before.ids, ...ids]), text)
      assert.equal(before.text + joined(stream(tokenizer, ids, before.ids)), text)
    }
  })

  const stories = siblingModel('stories260K')
  const title = 'gives the golden ids and texts of stories260K'
  if (stories === null) it.skip(`${title} (it is not beside this working copy)`)
  else {
    it(title, async () => {
      const tokenizer = await load(stories)
      for (const { text, ids, decoded } of goldenRows(join(stories, 'tokenizer_golden.json'))) {
        assert.deepEqual(tokenizer.encode(text), ids, JSON.stringify(text))
        assert.equal(tokenizer.decode(ids), decoded, JSON.stringify(text))
        assert.equal(joined(stream(tokenizer, ids)), decoded, JSON.stringify(text))
      }
    })
  }

  it('brings any text back through a byte-level vocabulary', async function () {
    this.timeout(20_000)
    const tokenizer = await load(demoModel)
    const anyText = fc.string({
      unit: fc.oneof(
        fc.string({ unit: 'binary', minLength: 1, maxLength: 1 }),
        fc.constantFrom(' ', 'é', '你', '👩‍👩‍👧', '\n', '\ufffd', ' ,'),
      ),
      maxLength: 20,
    })
    fc.assert(
      fc.property(anyText, (text) => {
        if (/\p{Surrogate}/u.test(text)) return
        assert.equal(tokenizer.decode(tokenizer.encode(text)), text)
      }),
      { numRuns: 500, seed: 21 },
    )
  })

  it('keeps spaces before punctuation', async () => {
    const tokenizer = await load(demoModel)
    assert.equal(tokenizer.decode(tokenizer.encode("hi , there . it 's")), "hi , there . it 's")
  })

  it('leaves out special tokens and ids that stand for nothing', async () => {
    const tokenizer = await load(demoModel)
    const ids = tokenizer.encode('One day')
    assert.equal(tokenizer.decode([0, ...ids, 5000, 0]), 'One day')
    assert.equal(tokenizer.decode([]), '')
    assert.equal(tokenizer.decode([0]), '')
    assert.deepEqual([tokenizer.bosTokenId, tokenizer.eosTokenId, tokenizer.vocabSize], [0, 0, 1024])
    assert.deepEqual([tokenizer.tokenOf(0), tokenizer.tokenOf(99999)], ['<|endoftext|>', null])
  })

  it('frames a text as the post-processor says, unless add_bos_token or add_eos_token decide', () => {
    const [a] = llamaLike().encode('a', { addSpecialTokens: false })
    const framed = (settings: Readonly<Record<string, unknown>>, postProcessor?: unknown): readonly number[] =>
      llamaLike({ settings, postProcessor }).encode('a')
    assert.deepEqual(framed({}), [a])
    assert.deepEqual(framed({}, frame), [1, a, 2])
    assert.deepEqual(framed({ add_bos_token: false }, frame), [a, 2])
    assert.deepEqual(framed({ add_eos_token: false }, frame), [1, a])
    assert.deepEqual(framed({ add_bos_token: true }, frame), [1, a, 2])
    assert.deepEqual(framed({ add_bos_token: true, add_eos_token: true }), [1, a, 2])
    assert.deepEqual(framed({ tokenizer_class: 'LlamaTokenizer' }), [1, a])
    assert.deepEqual(framed({ tokenizer_class: 'LlamaTokenizerFast', add_bos_token: false }), [a])
    assert.deepEqual(framed({ tokenizer_class: 'LlamaTokenizer', add_bos_token: true }, frame), [1, a, 2])
    assert.deepEqual(llamaLike({ postProcessor: frame }).encode('a', { addSpecialTokens: false }), [a])
    assert.deepEqual(framed({ add_bos_token: true, bos_token: { __type: 'AddedToken', content: '<s>' } }), [1, a])
    assert.throws(() => framed({ add_bos_token: 'yes' }), { code: 'ERR_BAD_CONFIG', message: /add_bos_token is "yes"/ })
    assert.throws(() => framed({ add_bos_token: true, bos_token: '<bos>' }), {
      code: 'ERR_BAD_CONFIG',
      message: /no token of the vocabulary/,
    })
  })

  it('makes a prompt of no text from the first token, and an error where there is none', () => {
    assert.deepEqual(llamaLike().encode(''), [])
    assert.deepEqual(llamaLike().encodePrompt(''), [1])
    assert.deepEqual(llamaLike({ settings: { add_bos_token: true } }).encode(''), [1])
    assert.deepEqual(llamaLike({ settings: { add_bos_token: true } }).encodePrompt(''), [1])
    assert.deepEqual(llamaLike().encodePrompt('a'), llamaLike().encode('a'))
    assert.throws(() => llamaLike({ settings: { bos_token: null } }).encodePrompt(''), { code: 'ERR_EMPTY_PROMPT' })
    for (const wrong of [7, null, ['a']]) {
      assert.throws(() => llamaLike().encode(wrong as unknown as string), { code: 'ERR_INVALID_OPTION' })
    }
  })
})

describe('the files of a tokenizer', () => {
  it('may be missing: then there is none, and calls that need one say what to do', async () => {
    assert.equal(await loadTokenizer(testModel('llama')), null)
    assert.throws(() => requireTokenizer(null, '/m'), {
      code: 'ERR_NO_TOKENIZER',
      message: /\/m: there is no tokenizer\.json; pass token ids/,
    })
  })

  it('are refused when damaged, by name', async () => {
    const good = readFileSync(join(demoModel, 'tokenizer.json'), 'utf8')
    const cases: readonly (readonly [string, string | null, RegExp])[] = [
      ['{', null, /tokenizer\.json: .*JSON/],
      ['[]', null, /tokenizer\.json: it is not a JSON object/],
      ['{}', null, /tokenizer\.json: it describes no usable tokenizer/],
      [
        JSON.stringify({ ...(JSON.parse(good) as object), model: { type: 'Mystery', vocab: {} } }),
        null,
        /tokenizer\.json: it describes no usable/,
      ],
      [good, '7', /tokenizer_config\.json: it is not a JSON object/],
      [good, '{"chat_template":7}', /tokenizer_config\.json: chat_template is 7/],
      [good, '{"chat_template":[{"name":"rag","template":"x"}]}', /one named "default"/],
      [good, '{"chat_template":"{% if %}"}', /chat template cannot be parsed/],
    ]
    for (const [tokenizer, settings, message] of cases) {
      using scratch = new Scratch()
      scratch.write('tokenizer.json', tokenizer)
      if (settings !== null) scratch.write('tokenizer_config.json', settings)
      await assert.rejects(loadTokenizer(scratch.path), { code: 'ERR_BAD_CONFIG', message })
    }
  })

  it('need no tokenizer_config.json', async () => {
    using scratch = new Scratch()
    scratch.write('tokenizer.json', readFileSync(join(demoModel, 'tokenizer.json')))
    const tokenizer = await load(scratch.path)
    assert.equal(tokenizer.decode(tokenizer.encode('hi , there')), 'hi , there')
    assert.equal(tokenizer.bosTokenId, null)
  })
})

describe('the stream of text', () => {
  it('joined is the decoding of all ids, whatever the ids, and no piece is part of a character', async function () {
    this.timeout(20_000)
    const byteLevel = await load(demoModel)
    for (const [tokenizer, anyId] of [
      [byteLevel, fc.oneof(fc.nat(1100), fc.integer({ min: 1, max: 256 }))],
      [llamaLike(), fc.oneof(fc.nat(275), fc.integer({ min: 259, max: 268 }))],
    ] as const) {
      fc.assert(
        fc.property(fc.array(anyId, { maxLength: 30 }), (ids) => {
          assert.equal(joined(stream(tokenizer, ids)), tokenizer.decode(ids))
        }),
        { numRuns: 3000, seed: 22 },
      )
    }
  })

  it('holds a split character back until it is whole', async () => {
    const text = 'né 你好 👩‍👩‍👧 ok'
    for (const tokenizer of [await load(demoModel), llamaLike()]) {
      const ids = tokenizer.encode(text, { addSpecialTokens: false })
      assert.ok(ids.length > Array.from(text).length, 'characters are split')
      const { pieces, end } = stream(tokenizer, ids)
      assert.ok(pieces.every((piece) => !piece.includes('\ufffd')))
      assert.ok(pieces.includes(''))
      assert.equal(pieces.join('') + end, text)
    }
  })

  it('sends text as soon as it is final', async () => {
    const tokenizer = await load(demoModel)
    const { pieces, end } = stream(tokenizer, tokenizer.encode('Once upon a time, there was a fox.'))
    assert.ok(pieces.every((piece) => piece.length > 0))
    assert.equal(end, '')
  })

  it('turns an incomplete character at the end into U+FFFD, once', async () => {
    const tokenizer = await load(demoModel)
    const ids = tokenizer.encode('ab你').slice(0, -1)
    const { pieces, end } = stream(tokenizer, ids)
    assert.equal(pieces.join(''), 'ab')
    assert.equal(end, tokenizer.decode(ids).slice(2))
    assert.ok(end.startsWith('\ufffd'))
    const decoder = new StreamDecoder(tokenizer)
    ids.forEach((id) => decoder.push(id))
    decoder.flush()
    assert.equal(decoder.flush(), '')
  })

  it("keeps a leading space where text goes on, and drops the tokenizer's own where it begins", () => {
    const tokenizer = llamaLike()
    const [spaceA = -1] = tokenizer.encode('a')
    assert.equal(tokenizer.tokenOf(spaceA), '▁a')
    assert.equal(joined(stream(tokenizer, [spaceA, spaceA])), 'a a')
    assert.equal(joined(stream(tokenizer, [spaceA], [1])), 'a')
    assert.equal(joined(stream(tokenizer, [spaceA], [1, spaceA])), ' a')
    // A special token between does not make it a beginning.
    assert.equal(joined(stream(tokenizer, [spaceA, 2, 1, spaceA])), 'a a')
    assert.equal(joined(stream(tokenizer, [spaceA], [spaceA, 2])), ' a')
  })

  it('continues a context exactly: its text and the pieces are the text of all', async function () {
    this.timeout(20_000)
    const byteLevel = await load(demoModel)
    const texts = fc.string({ unit: fc.constantFrom('a', 'b', ' ', 'é', '你', '👋', ','), maxLength: 12 })
    for (const tokenizer of [byteLevel, llamaLike()]) {
      fc.assert(
        fc.property(texts, texts, (before, after) => {
          const context = tokenizer.encode(before)
          const ids = tokenizer.encode(after)
          assert.equal(
            tokenizer.decode(context) + joined(stream(tokenizer, ids, context)),
            tokenizer.decode([...context, ...ids]),
          )
        }),
        { numRuns: 1000, seed: 23 },
      )
    }
  })

  it('completes a character that the context began', async () => {
    const tokenizer = await load(demoModel)
    const ids = tokenizer.encode('ab你')
    const { pieces, end } = stream(tokenizer, ids.slice(-1), ids.slice(0, -1))
    assert.equal(pieces.join('') + end, '你')
  })
})

describe('chat templates', () => {
  const source =
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('role ' + m.role) }}" +
    '{% endif %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}'
  const tokens = { bos_token: '<s>', eos_token: '</s>' }
  const user = { role: 'user', content: ' Hi ' }

  it('write messages with special tokens and the beginning of an answer', () => {
    const template = new ChatTemplate(source, tokens, '/m')
    assert.equal(
      template.render([{ role: 'system', content: 'Be brief.' }, user]),
      '<s><|system|>Be brief.</s><|user|>Hi</s><|assistant|>',
    )
    assert.equal(template.render([user], { addGenerationPrompt: false }), '<s><|user|>Hi</s>')
  })

  it('are found in tokenizer_config.json as a string or a list, and first in chat_template.jinja', async () => {
    const rendered = async (settings: object, file?: string): Promise<string | undefined> => {
      using scratch = new Scratch()
      scratch.write('tokenizer.json', readFileSync(join(demoModel, 'tokenizer.json')))
      scratch.write('tokenizer_config.json', JSON.stringify({ bos_token: '<|endoftext|>', ...settings }))
      if (file !== undefined) scratch.write('chat_template.jinja', file)
      return (await load(scratch.path)).chatTemplate?.render([user])
    }
    assert.equal(await rendered({}), undefined)
    assert.equal(await rendered({ chat_template: null }), undefined)
    assert.equal(await rendered({ chat_template: source }), '<|endoftext|><|user|>Hi<|assistant|>')
    const list = [
      { name: 'tool_use', template: 'no' },
      { name: 'default', template: '{{ messages[0].content }}' },
    ]
    assert.equal(await rendered({ chat_template: list }), ' Hi ')
    assert.equal(await rendered({ chat_template: source }, 'file:{{ messages | length }}'), 'file:1')
  })

  it('refuse messages that are none', () => {
    const template = new ChatTemplate(source, tokens, '/m')
    const wrong: readonly (readonly [unknown, RegExp])[] = [
      [[], /messages is \[\]/],
      ['Hi', /messages is "Hi"/],
      [null, /messages is null/],
      [['Hi'], /messages\[0\] is "Hi"/],
      [[user, { role: 'user' }], /messages\[1\]\.content is null/],
      [[{ role: 'user', content: 7 }], /messages\[0\]\.content is 7/],
      [[{ role: '', content: '' }], /messages\[0\]\.role is ""/],
      [[{ ...user, name: 'x' }], /messages\[0\] has the unknown key "name"/],
    ]
    for (const [messages, message] of wrong) {
      assert.throws(() => template.render(messages as readonly ChatMessage[]), { code: 'ERR_BAD_CHAT', message })
    }
  })

  it('pass on what the template itself refuses', () => {
    const template = new ChatTemplate(source, tokens, '/m')
    assert.throws(() => template.render([{ role: 'critic', content: 'x' }]), {
      code: 'ERR_BAD_CHAT',
      message: /\/m refuses these messages: .*role critic/,
    })
  })

  it('reach nothing but their variables', () => {
    for (const text of [
      '{{ process.pid }}',
      '{{ messages.constructor.constructor("return 1")() }}',
      '{{ globalThis }}|{{ require }}',
    ]) {
      let output: string
      try {
        output = new ChatTemplate(text, tokens, '/m').render([user])
      } catch {
        continue
      }
      assert.match(output, /^\|?$/, text)
    }
  })

  it('are asked for with the way out when there is none', () => {
    assert.throws(() => requireChatTemplate(null, '/m'), {
      code: 'ERR_NO_CHAT_TEMPLATE',
      message: /pass a prompt instead of messages/,
    })
  })
})
