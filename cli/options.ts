// Values of command-line options: parsed once, refused with what is allowed. Shared by the subcommands.

import { InvalidArgumentError } from 'commander'

export function wholeNumber(text: string): number {
  const value = Number(text)
  if (!/^\d+$/.test(text) || !Number.isSafeInteger(value)) throw new InvalidArgumentError('A whole number is needed.')
  return value
}

export function positiveNumber(text: string): number {
  const value = wholeNumber(text)
  if (value < 1) throw new InvalidArgumentError('A whole number of at least 1 is needed.')
  return value
}

export function realNumber(text: string): number {
  const value = Number(text)
  if (text.trim() === '' || !Number.isFinite(value)) throw new InvalidArgumentError('A number is needed.')
  return value
}

/** `1,5,9`; '' is the empty list. */
export function idList(text: string): number[] {
  if (text.trim() === '') return []
  return text.split(',').map((item) => wholeNumber(item.trim()))
}

/** For options that may be given several times. */
export function collected<T>(parse: (text: string) => T): (text: string, before: T[] | undefined) => T[] {
  return (text, before) => [...(before ?? []), parse(text)]
}
