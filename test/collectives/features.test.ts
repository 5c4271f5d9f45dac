// docs/collectives.md says what there is, and which test shows it: every test that it names must exist.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'

const read = (path: string): string => readFileSync(new URL(`../../../${path}`, import.meta.url), 'utf8')

describe('the table of features', () => {
  const table = read('docs/collectives.md').split('## Features')[1] ?? ''
  const rows = table
    .split('\n')
    .filter((line) => line.startsWith('| '))
    .slice(1)
    .map((line) => line.split('|').map((cell) => cell.trim()))

  it('names a test for each thing that there is', () => {
    assert.ok(rows.length >= 20)
    for (const [, what, , , , , ours, shown] of rows) {
      if (ours === 'not yet') assert.equal(shown, '', what)
      else assert.match(shown ?? '', /^\w+\/\w+: `[^`]+`$/, what)
    }
  })

  for (const [, what, , , , , , shown = ''] of rows) {
    const [, file, words = ''] = /^(\S+): `([^`]+)`$/.exec(shown) ?? []
    if (file === undefined) continue
    it(`${what ?? ''}: test/${file} has a test of that name`, () => {
      const source = read(`test/${file}.test.ts`)
      const names = [...source.matchAll(/(?:it|describe)\(\s*(['`"])([\s\S]*?)\1,/g)].map(([, , name = '']) => name)
      // A name with a placeholder stands for several: its other words are compared.
      const fits = (name: string): boolean => {
        const [before = '', ...after] = name.split(/\$\{[^}]*\}/)
        return name.includes(words) || (after.length > 0 && words.startsWith(before) && before.length > 8)
      }
      const isValue = new RegExp(`how: '${words.replace(/[^A-Za-z]/g, '')}'`).test(source)
      assert.ok(names.some(fits) || isValue, `${words} is in none of: ${names.join('; ')}`)
    })
  }
})
