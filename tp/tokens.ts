// Text <-> ids, as the model's own tokenizer.json and tokenizer_config.json say, and text piece by piece while ids arrive. The
// arithmetic is @huggingface/tokenizers; here are the rules around it: which special tokens frame a text, what an empty prompt
// is, and when a piece of text is final. Chat templates are in chat.ts.

import { join } from 'node:path'

import * as tokenizers from '@huggingface/tokenizers'

import { ChatTemplate } from './chat.js'
import { FileError, readSmallFile } from './checkpoint/files.js'
import { decodeUtf8, JsonError } from './checkpoint/json.js'
import { InferenceError, shown } from './errors.js'

// What is used of the library, in words of its own. Its declarations name files without extension, which ESM does not resolve.
interface Vocabulary {
  encode(
    text: string,
    options: { readonly add_special_tokens: boolean },
  ): { readonly ids: readonly (number | undefined)[] }
  decode(ids: readonly number[], options: { readonly clean_up_tokenization_spaces: boolean }): string
  token_to_id(token: string): number | undefined
  id_to_token(id: number): string | undefined
  get_added_tokens_decoder(): ReadonlyMap<number, { readonly special: boolean }>
  get_vocab(withAddedTokens: boolean): ReadonlyMap<string, number>
}
const library = tokenizers as unknown as { readonly Tokenizer: new (tokenizer: object, config: object) => Vocabulary }

/** The largest published tokenizer.json (a vocabulary of 262,144) has 33 MB. */
const maxTokenizerBytes = 256 * 2 ** 20

const modelTypes: readonly unknown[] = ['BPE', 'Unigram', 'WordPiece']

export interface EncodeOptions {
  /** Frame the text with the tokens that the model expects at its ends. Default true; false for a rendered chat. */
  readonly addSpecialTokens?: boolean
}

export class Tokenizer {
  readonly bosTokenId: number | null
  readonly eosTokenId: number | null
  readonly vocabSize: number
  /** null: the model has none. */
  readonly chatTemplate: ChatTemplate | null
  readonly #vocabulary: Vocabulary
  readonly #prefix: readonly number[]
  readonly #suffix: readonly number[]
  /** Ids that decode() leaves out. */
  readonly #specialIds: ReadonlySet<number>
  readonly #isByteFallback: boolean

  /** What the files of a directory hold; loadTokenizer() reads them. */
  constructor(files: TokenizerFiles) {
    const { settings, directory } = files
    const damaged = (error: unknown): InferenceError =>
      new InferenceError(
        'ERR_BAD_CONFIG',
        `${join(directory, 'tokenizer.json')}: it describes no usable tokenizer: ${messageOf(error)}`,
        {
          file: join(directory, 'tokenizer.json'),
        },
      )
    const model = fieldOf(files.tokenizer, 'model')
    const type = fieldOf(model, 'type')
    try {
      // Without a type the library tells the kind by the form, as older files need; with a strange one it guesses.
      if (type !== undefined && !modelTypes.includes(type)) {
        throw new Error(`model.type is ${shown(type)}; supported are ${modelTypes.join(', ')}`)
      }
      // Spaces before punctuation are the model's business: cleaning them up is never on.
      this.#vocabulary = new library.Tokenizer(files.tokenizer, { ...settings, clean_up_tokenization_spaces: false })
      const probe = 'a'
      const bare = this.#vocabulary.encode(probe, { add_special_tokens: false }).ids
      const framed = this.#vocabulary.encode(probe, { add_special_tokens: true }).ids
      const start = placeOf(bare, framed)
      const before = framed.slice(0, start).filter(isId)
      const behind = framed.slice(start + bare.length).filter(isId)
      this.vocabSize = this.#vocabulary.get_vocab(true).size
      this.bosTokenId = this.#idOf(settings['bos_token'])
      this.eosTokenId = this.#idOf(settings['eos_token'])
      this.#prefix = this.#framing(before, 'bos', this.bosTokenId, settings, directory)
      this.#suffix = this.#framing(behind, 'eos', this.eosTokenId, settings, directory)
      const added = [...this.#vocabulary.get_added_tokens_decoder()]
        .filter(([, token]) => token.special)
        .map(([id]) => id)
      const named = stringsOf(settings['additional_special_tokens']).map((token) => this.#idOf(token))
      this.#specialIds = new Set([...added, ...named.filter((id) => id !== null)])
    } catch (error) {
      throw error instanceof InferenceError ? error : damaged(error)
    }
    this.#isByteFallback = fieldOf(model, 'byte_fallback') === true
    this.chatTemplate =
      files.template === null ? null : new ChatTemplate(files.template, specialTexts(settings), directory)
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    if (typeof text !== 'string') {
      throw new InferenceError('ERR_INVALID_OPTION', `the text to encode is ${shown(text)}; allowed is a string`)
    }
    const { ids } = text === '' ? { ids: [] } : this.#vocabulary.encode(text, { add_special_tokens: false })
    // Lone surrogates and characters outside a vocabulary without unknown token give no id.
    if (!ids.every(isId)) {
      throw new InferenceError('ERR_TOKEN_OUT_OF_RANGE', `the vocabulary has no token for a part of ${shown(text)}`, {
        text,
      })
    }
    return options.addSpecialTokens === false ? [...ids] : [...this.#prefix, ...ids, ...this.#suffix]
  }

  /** Ids of a prompt: never empty, since a model continues something. An empty text stands for the start of a text. */
  encodePrompt(text: string, options: EncodeOptions = {}): number[] {
    const ids = this.encode(text, options)
    if (ids.length > 0) return ids
    if (this.bosTokenId !== null) return [this.bosTokenId]
    throw new InferenceError(
      'ERR_EMPTY_PROMPT',
      'the prompt has no token, and the model has no token for the beginning of a text',
    )
  }

  /** Without special tokens; ids that stand for nothing (padded vocabularies) are left out. */
  decode(ids: readonly number[]): string {
    const visible = ids.filter((id) => this.isVisible(id))
    return visible.length === 0 ? '' : this.#vocabulary.decode(visible, { clean_up_tokenization_spaces: false })
  }

  /** Whether decode() makes anything of this id. */
  isVisible(id: number): boolean {
    return !this.#specialIds.has(id) && this.#vocabulary.id_to_token(id) !== undefined
  }

  /** One byte of a character that the vocabulary does not have whole, spelled <0xE2>; a run of them is decoded as a whole. */
  isByteToken(id: number): boolean {
    return this.#isByteFallback && /^<0x[0-9A-Fa-f]{2}>$/.test(this.#vocabulary.id_to_token(id) ?? '')
  }

  /** The token itself, as the vocabulary spells it; null: there is none. */
  tokenOf(id: number): string | null {
    return this.#vocabulary.id_to_token(id) ?? null
  }

  #idOf(token: unknown): number | null {
    const text = textOf(token)
    return text === null ? null : (this.#vocabulary.token_to_id(text) ?? null)
  }

  /**
   * What frames a text at one end: the post-processor's tokens, unless tokenizer_config.json decides with add_bos_token or
   * add_eos_token, which wins in transformers, too. The Llama classes add the first token also where nothing is said.
   */
  #framing(
    processed: readonly number[],
    end: 'bos' | 'eos',
    id: number | null,
    settings: Readonly<Record<string, unknown>>,
    directory: string,
  ): readonly number[] {
    const isLlamaClass = /^(Code)?Llama(TokenizerFast|Tokenizer)$/.test(textOf(settings['tokenizer_class']) ?? '')
    const key = `add_${end}_token`
    const asked = settings[key] ?? (isLlamaClass && end === 'bos' && id !== null ? true : null)
    if (asked === null) return processed
    const file = join(directory, 'tokenizer_config.json')
    if (typeof asked !== 'boolean') {
      throw new InferenceError('ERR_BAD_CONFIG', `${file}: ${key} is ${shown(asked)}; allowed is true or false`, {
        file,
        key,
      })
    }
    if (!asked) return processed.filter((token) => token !== id)
    if (id === null) {
      throw new InferenceError(
        'ERR_BAD_CONFIG',
        `${file}: ${key} is true, but ${end}_token is no token of the vocabulary`,
        { file, key },
      )
    }
    if (processed.includes(id)) return processed
    return end === 'bos' ? [id, ...processed] : [...processed, id]
  }
}

/**
 * Text piece by piece while ids arrive. Joined, the pieces and the flush are exactly what decode() makes of all ids behind the
 * context's text; no piece ends within a character. Held back is what later ids can still change: the end of an incomplete
 * character (it decodes to U+FFFD), and a run of byte tokens, which turns into U+FFFD as a whole if one byte in it is wrong.
 */
export class StreamDecoder {
  readonly #tokenizer: Tokenizer
  /** Where the last piece ended: up to here the text is final. Decoded again with what follows, for decoders treat a first token otherwise. */
  #settled: readonly number[] = []
  #settledText = ''
  /** Visible ids behind it. */
  #tail: number[] = []

  /** `context`: ids before the first (the prompt), so that a leading space survives where text continues and not where it begins. */
  constructor(tokenizer: Tokenizer, context: readonly number[] = []) {
    this.#tokenizer = tokenizer
    const visible = context.filter((id) => tokenizer.isVisible(id))
    // A context that ends within a character needs all of the character's ids; eight hold any, with a token before.
    let start = Math.max(0, visible.length - 8)
    while (start > 0 && tokenizer.isByteToken(visible[start] ?? -1)) start--
    this.#settled = visible.slice(start)
    this.#settledText = tokenizer.decode(this.#settled)
  }

  /** The text that this id makes final; often '' in the middle of a character. */
  push(id: number): string {
    if (!this.#tokenizer.isVisible(id)) return ''
    this.#tail.push(id)
    if (this.#tokenizer.isByteToken(id)) return ''
    const text = this.#decodeAll()
    return text.endsWith('\ufffd') ? '' : this.#settle(text)
  }

  /** What is held back, at the end of the text or where generation stopped. An incomplete character becomes U+FFFD. */
  flush(): string {
    return this.#tail.length === 0 ? '' : this.#settle(this.#decodeAll())
  }

  #decodeAll(): string {
    return this.#tokenizer.decode([...this.#settled, ...this.#tail])
  }

  #settle(text: string): string {
    const piece = text.slice(commonPrefix(this.#settledText, text))
    // One token is context enough for every decoder; it must be one that the piece before it cannot change.
    this.#settled = this.#tail.slice(-1)
    this.#settledText = this.#tokenizer.decode(this.#settled)
    this.#tail = []
    return piece
  }
}

/** Length of the common beginning. Shorter than `a` only where `a` ended within a character that `b` completes. */
function commonPrefix(a: string, b: string): number {
  if (b.startsWith(a)) return a.length
  let length = 0
  while (length < a.length && a[length] === b[length]) length++
  return length
}

export interface TokenizerFiles {
  readonly directory: string
  /** tokenizer.json */
  readonly tokenizer: object
  /** tokenizer_config.json, or {} */
  readonly settings: Readonly<Record<string, unknown>>
  readonly template: string | null
}

/** The tokenizer of a model's directory; null when there is no tokenizer.json (ids only). */
export async function loadTokenizer(directory: string): Promise<Tokenizer | null> {
  const tokenizerPath = join(directory, 'tokenizer.json')
  const settingsPath = join(directory, 'tokenizer_config.json')
  const text = await readText(tokenizerPath)
  if (text === null) return null
  const settingsText = await readText(settingsPath)
  const settings = settingsText === null ? {} : parseObject(settingsText, settingsPath)
  const template =
    (await readText(join(directory, 'chat_template.jinja'))) ?? templateOf(settings['chat_template'], settingsPath)
  return new Tokenizer({ directory, tokenizer: parseObject(text, tokenizerPath), settings, template })
}

/** For calls that need text: the error says what can be done without. */
export function requireTokenizer(tokenizer: Tokenizer | null, directory: string): Tokenizer {
  if (tokenizer !== null) return tokenizer
  throw new InferenceError(
    'ERR_NO_TOKENIZER',
    `${directory}: there is no tokenizer.json; pass token ids instead of text, or put the model's tokenizer.json there ` +
      '(older checkpoints have tokenizer.model only: save the tokenizer again in the current format)',
    { directory },
  )
}

/** A string, or a list of {name, template} of which 'default' is taken. */
function templateOf(value: unknown, file: string): string | null {
  if (value === undefined || value === null) return null
  if (typeof value === 'string') return value
  if (Array.isArray(value)) {
    const entries: readonly unknown[] = value
    const named = entries.find((entry) => fieldOf(entry, 'name') === 'default')
    const template = fieldOf(named, 'template')
    if (typeof template === 'string') return template
  }
  throw new InferenceError(
    'ERR_BAD_CONFIG',
    `${file}: chat_template is ${shown(value)}; allowed is a template, or a list of { name, template } with one named "default"`,
    { file, key: 'chat_template' },
  )
}

async function readText(path: string): Promise<string | null> {
  try {
    return decodeUtf8(await readSmallFile(path, maxTokenizerBytes))
  } catch (error) {
    if (error instanceof FileError && error.isMissing) return null
    if (error instanceof FileError || error instanceof JsonError) {
      throw new InferenceError('ERR_BAD_CONFIG', `${path}: ${error.message}`, { file: path })
    }
    throw error
  }
}

function parseObject(text: string, file: string): Record<string, unknown> {
  const fail = (why: string): never => {
    throw new InferenceError('ERR_BAD_CONFIG', `${file}: ${why}`, { file })
  }
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (error) {
    return fail(messageOf(error))
  }
  return isRecord(value) ? value : fail('it is not a JSON object')
}

/** Where the bare ids stand in the framed ones. */
function placeOf(bare: readonly unknown[], framed: readonly unknown[]): number {
  for (let start = 0; start + bare.length <= framed.length; start++) {
    if (bare.every((id, index) => framed[start + index] === id)) return start
  }
  throw new Error('its post-processor changes the tokens of the text')
}

function specialTexts(settings: Readonly<Record<string, unknown>>): Readonly<Record<string, string>> {
  const names = ['bos_token', 'eos_token', 'unk_token', 'pad_token']
  return Object.fromEntries(names.map((name) => [name, textOf(settings[name]) ?? '']))
}

/** A special token is written as its text, or as an object with its text in `content`. */
function textOf(token: unknown): string | null {
  const text = typeof token === 'string' ? token : fieldOf(token, 'content')
  return typeof text === 'string' ? text : null
}

function stringsOf(value: unknown): readonly string[] {
  return Array.isArray(value) ? value.map(textOf).filter((text) => text !== null) : []
}

const isId = (id: unknown): id is number => Number.isInteger(id)

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

const fieldOf = (value: unknown, key: string): unknown => (isRecord(value) ? value[key] : undefined)

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))
