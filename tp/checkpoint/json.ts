// A pull reader for JSON that comes from strangers: strict RFC 8259, duplicate keys refused (JSON.parse keeps the last and says
// nothing), depth and counts bounded, numbers handed over with their spelling so that "1e3" is no integer. Objects become Maps,
// so that "__proto__" is a key like any other. First stop of the walk checkpoint -> ArchSpec; linear in the text, recursion
// bounded by the depth.

/** What is wrong with a text; whoever knows the file makes an InferenceError of it. */
export class JsonError extends Error {
  override readonly name = 'JsonError'
}

/** A number and how it was spelled. */
export class JsonNumber {
  constructor(
    readonly value: number,
    readonly text: string,
  ) {}
}

export type JsonValue = null | boolean | string | JsonNumber | readonly JsonValue[] | JsonObject
export type JsonObject = ReadonlyMap<string, JsonValue>

export const isJsonObject = (value: JsonValue | undefined): value is JsonObject => value instanceof Map
export const isJsonArray = (value: JsonValue | undefined): value is readonly JsonValue[] => Array.isArray(value)

export interface JsonLimits {
  readonly maxDepth: number
  /** Of keys in one object and of elements in one array. */
  readonly maxEntries: number
  /** Of one string, in UTF-16 units. */
  readonly maxStringLength: number
}

/** A plain non-negative integer that a double holds exactly: digits only, no sign, no fraction, no exponent. */
export function countOf(value: JsonValue | undefined): number | null {
  if (!(value instanceof JsonNumber) || !/^(0|[1-9][0-9]{0,15})$/.test(value.text)) return null
  return Number.isSafeInteger(value.value) ? value.value : null
}

const numberForm = (): RegExp => /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y
export class JsonReader {
  #position = 0
  #depth = 0
  readonly #numberForm = numberForm()

  constructor(
    private readonly text: string,
    private readonly limits: JsonLimits,
  ) {}

  /** The whole text as one value. */
  document(): JsonValue {
    const value = this.value()
    this.end()
    return value
  }

  /** Nothing but white space may follow. */
  end(): void {
    this.#skipSpace()
    if (this.#position < this.text.length) this.#fail('something follows the end of the JSON value')
  }

  value(): JsonValue {
    this.#skipSpace()
    switch (this.text[this.#position]) {
      case '{': {
        const object = new Map<string, JsonValue>()
        this.object((key) => object.set(key, this.value()))
        return object
      }
      case '[': {
        const array: JsonValue[] = []
        this.array(() => array.push(this.value()))
        return array
      }
      case '"':
        return this.string()
      case 't':
        return this.#word('true', true)
      case 'f':
        return this.#word('false', false)
      case 'n':
        return this.#word('null', null)
      default:
        return this.#number()
    }
  }

  /** Calls `member` for every key, with the reader before the key's value, which it must read. */
  object(member: (key: string) => void): void {
    this.#open('{', 'an object')
    // A set costs more than reading a tensor's three keys, so few keys are looked through one by one.
    const few: string[] = []
    const many = new Set<string>()
    if (this.#take('}')) {
      this.#close()
      return
    }
    do {
      this.#skipSpace()
      const key = this.string()
      if (few.includes(key) || many.has(key))
        this.#fail(`the key ${JSON.stringify(key.slice(0, 100))} stands twice in one object`)
      if (few.length < 8) few.push(key)
      else many.add(key)
      if (few.length + many.size > this.limits.maxEntries)
        this.#fail(`an object has more than ${this.limits.maxEntries} keys`)
      if (!this.#take(':')) this.#fail('a colon is missing')
      member(key)
    } while (this.#take(','))
    if (!this.#take('}')) this.#fail('a comma or a closing brace is missing')
    this.#close()
  }

  /** Calls `element` for every element, with the reader before it. */
  array(element: () => void): void {
    this.#open('[', 'an array')
    if (this.#take(']')) {
      this.#close()
      return
    }
    let count = 0
    do {
      if (++count > this.limits.maxEntries) this.#fail(`an array has more than ${this.limits.maxEntries} elements`)
      element()
    } while (this.#take(','))
    if (!this.#take(']')) this.#fail('a comma or a closing bracket is missing')
    this.#close()
  }

  string(): string {
    this.#skipSpace()
    if (this.text[this.#position] !== '"') this.#fail('a string is missing')
    const start = this.#position++
    let hasEscape = false
    for (;;) {
      const code = this.text.charCodeAt(this.#position) // NaN past the end
      if (code === 0x22) break
      if (!(code >= 0x20)) this.#fail('a string is not closed, or holds a raw control character')
      hasEscape ||= code === 0x5c
      this.#position += code === 0x5c ? 2 : 1
    }
    this.#position++
    const quoted = this.text.slice(start, this.#position)
    const whole = hasEscape ? this.#unescape(quoted) : quoted.slice(1, -1)
    if (whole.length > this.limits.maxStringLength) {
      this.#fail(`a string is longer than ${this.limits.maxStringLength} characters`)
    }
    return whole
  }

  /** One string with its quotes. Left to JSON.parse: millions of escapes put together one by one would take gigabytes. */
  #unescape(quoted: string): string {
    try {
      return String(JSON.parse(quoted))
    } catch {
      return this.#fail('a string has an unknown escape')
    }
  }

  #number(): JsonNumber {
    this.#numberForm.lastIndex = this.#position
    const text = this.#numberForm.exec(this.text)?.[0]
    if (text === undefined) return this.#fail('a value is missing')
    if (text.length > 400) this.#fail('a number has more than 400 characters')
    this.#position += text.length
    return new JsonNumber(Number(text), text)
  }

  #word<T>(word: string, value: T): T {
    if (!this.text.startsWith(word, this.#position)) this.#fail('a value is missing')
    this.#position += word.length
    return value
  }

  #open(bracket: string, what: string): void {
    if (!this.#take(bracket)) this.#fail(`${what} is missing`)
    if (++this.#depth > this.limits.maxDepth) this.#fail(`values are nested deeper than ${this.limits.maxDepth}`)
  }

  #close(): void {
    this.#depth--
  }

  #take(character: string): boolean {
    this.#skipSpace()
    if (this.text[this.#position] !== character) return false
    this.#position++
    return true
  }

  #skipSpace(): void {
    for (;;) {
      const code = this.text.charCodeAt(this.#position)
      if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) return
      this.#position++
    }
  }

  #fail(what: string): never {
    throw new JsonError(`${what} (at character ${this.#position})`)
  }
}

/** Bytes as UTF-8, nothing repaired: a byte order mark stays and is then no JSON. */
export function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw new JsonError('the text is not valid UTF-8')
  }
}
