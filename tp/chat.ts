// Messages -> the prompt text that a chat model was trained on, by the Jinja template that comes with it. A template is a program
// of a stranger, but a harmless one: @huggingface/jinja interprets it and gives it nothing but these variables.

import { Template } from '@huggingface/jinja'

import { InferenceError, shown } from './errors.js'

export interface ChatMessage {
  readonly role: string
  readonly content: string
}

export interface ChatOptions {
  /** End with the beginning of the model's answer. Default true. */
  readonly addGenerationPrompt?: boolean
}

export class ChatTemplate {
  readonly #template: Template
  readonly #directory: string
  readonly #tokens: Readonly<Record<string, string>>

  /** `tokens`: bos_token, eos_token, ... as text, which templates name. */
  constructor(template: string, tokens: Readonly<Record<string, string>>, directory: string) {
    this.#tokens = tokens
    this.#directory = directory
    try {
      this.#template = new Template(template)
    } catch (error) {
      throw new InferenceError(
        'ERR_BAD_CONFIG',
        `${directory}: the chat template cannot be parsed: ${messageOf(error)}`,
        { directory },
      )
    }
  }

  /** The template writes the special tokens itself: encode its text with addSpecialTokens false. */
  render(messages: readonly ChatMessage[], options: ChatOptions = {}): string {
    checkMessages(messages)
    try {
      return this.#template.render({
        ...this.#tokens,
        messages: messages.map(({ role, content }) => ({ role, content })),
        add_generation_prompt: options.addGenerationPrompt ?? true,
        tools: null,
        documents: null,
      })
    } catch (error) {
      // Templates raise where they refuse an order of roles.
      throw new InferenceError(
        'ERR_BAD_CHAT',
        `the chat template of ${this.#directory} refuses these messages: ${messageOf(error)}`,
        {
          directory: this.#directory,
        },
      )
    }
  }
}

/** For calls that need a template: the error says what can be done without. */
export function requireChatTemplate(template: ChatTemplate | null, directory: string): ChatTemplate {
  if (template !== null) return template
  throw new InferenceError(
    'ERR_NO_CHAT_TEMPLATE',
    `${directory}: the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): ` +
      'pass a prompt instead of messages, or add the template if this is a chat model',
    { directory },
  )
}

function checkMessages(messages: readonly ChatMessage[]): void {
  const wrong = (what: string): InferenceError =>
    new InferenceError('ERR_BAD_CHAT', `${what}; allowed is a list of { role, content }, both strings`)
  if (!Array.isArray(messages) || messages.length === 0) throw wrong(`messages is ${shown(messages)}`)
  messages.forEach((message: unknown, index) => {
    if (typeof message !== 'object' || message === null) throw wrong(`messages[${index}] is ${shown(message)}`)
    const unknown = Object.keys(message).find((key) => key !== 'role' && key !== 'content')
    if (unknown !== undefined) throw wrong(`messages[${index}] has the unknown key ${shown(unknown)}`)
    for (const key of ['role', 'content'] as const) {
      const value = key in message ? (message as Record<string, unknown>)[key] : undefined
      if (typeof value !== 'string' || (key === 'role' && value === ''))
        throw wrong(`messages[${index}].${key} is ${shown(value ?? null)}`)
    }
  })
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))
