// The secret of a job: where it may come from, what is refused, and that no message shows it. That the derived keys are CURVE's is shown by
// the handshakes in store.test.ts.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import {
  chmodSync,
  chownSync,
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { curveKeyPair } from 'zeromq'
import { deriveKeys, readEncryption, readSecret, z85Decode, z85Encode } from '../../collectives/secret.js'
import { unavailable } from '../unavailable.js'

describe("the job's secret", () => {
  const text = randomBytes(32).toString('hex')
  const secret = Buffer.from(text, 'hex')
  let folder = ''
  before(() => (folder = mkdtempSync(join(tmpdir(), 'tilerank-secret-'))))
  after(() => rmSync(folder, { recursive: true, force: true }))

  function fileOf(content: string, mode = 0o600): string {
    const path = join(folder, randomBytes(4).toString('hex'))
    writeFileSync(path, content)
    chmodSync(path, mode)
    return path
  }

  function refused(env: Record<string, string>, pattern: RegExp): void {
    assert.throws(
      () => readSecret(undefined, env),
      (error: Error & { code?: string; variables?: readonly string[] }) => {
        assert.equal(error.code, 'ERR_ENVIRONMENT', error.message)
        assert.match(error.message, pattern)
        assert.ok(error.variables?.every((name) => name.startsWith('TILERANK_SECRET_')))
        assert.ok(!error.message.includes(text.slice(0, 8)), 'the message shows nothing of what was read')
        return true
      },
    )
  }

  it('comes from a private file, a descriptor or the option, which wins', () => {
    const file = fileOf(`${text}\n`)
    const other = 'ab'.repeat(32)
    assert.deepEqual(readSecret(undefined, { TILERANK_SECRET_FILE: file }), secret)
    assert.deepEqual(readSecret(undefined, { TILERANK_SECRET_FILE: fileOf(text, 0o400) }), secret)
    assert.deepEqual(readSecret(other, { TILERANK_SECRET_FILE: file }), Buffer.from(other, 'hex'))
    const fd = openSync(file, 'r')
    try {
      for (let group = 0; group < 2; group++)
        assert.deepEqual(readSecret(undefined, { TILERANK_SECRET_FD: `${fd}` }), secret, 'every group reads it')
    } finally {
      closeSync(fd)
    }
  })

  it('comes through a pipe once, whose other end may stay open', () => {
    const module = new URL('../../collectives/secret.js', import.meta.url).href
    const program = `
      import { readSecret } from ${JSON.stringify(module)}
      const read = () => readSecret(undefined, { TILERANK_SECRET_FD: '0' }).toString('hex')
      console.log(read())
      try { read() } catch (error) { console.log(error.code, error.message) }`
    const command = `(printf %s "$SECRET"; sleep 0.5) | "$NODE" --input-type=module -e "$PROGRAM"`
    const env = { ...process.env, SECRET: text, NODE: process.execPath, PROGRAM: program }
    const lines = execFileSync('sh', ['-c', command], { env, encoding: 'utf8' }).split('\n')
    assert.equal(lines[0], text)
    assert.match(lines[1] ?? '', /^ERR_ENVIRONMENT TILERANK_SECRET_FD is empty/)
  })

  it('is asked for, with the way to make one', () => {
    refused({}, /openssl rand -hex 32.*TILERANK_SECRET_FILE.*encryption: 'none'/)
    refused({ TILERANK_SECRET_FILE: '', TILERANK_SECRET_FD: '' }, /openssl/)
  })

  it('is refused from files that are not private, or not files', () => {
    for (const mode of [0o640, 0o604, 0o660, 0o610, 0o601])
      refused({ TILERANK_SECRET_FILE: fileOf(text, mode) }, /chmod 600/)
    const link = join(folder, 'link')
    symlinkSync(fileOf(text), link)
    refused({ TILERANK_SECRET_FILE: link }, /ELOOP/)
    const directory = join(folder, 'directory')
    mkdirSync(directory, { mode: 0o700 })
    refused({ TILERANK_SECRET_FILE: directory }, /no regular file/)
    const fifo = join(folder, 'fifo')
    execFileSync('mkfifo', ['-m', '600', fifo])
    refused({ TILERANK_SECRET_FILE: fifo }, /no regular file/)
    refused({ TILERANK_SECRET_FILE: '/dev/null' }, /no regular file/)
    refused({ TILERANK_SECRET_FILE: join(folder, 'absent') }, /ENOENT/)
    refused({ TILERANK_SECRET_FILE: fileOf(text), TILERANK_SECRET_FD: '0' }, /both/)
    refused({ TILERANK_SECRET_FD: 'x' }, /expected is a descriptor/)
    refused({ TILERANK_SECRET_FD: '999999' }, /EBADF/)
  })

  it('is refused from files of another user', function () {
    if (process.geteuid?.() !== 0) unavailable(this, 'only root can give a file away')
    const path = fileOf(text)
    chownSync(path, 65534, 65534)
    refused({ TILERANK_SECRET_FILE: path }, /another user/)
  })

  it('is 64 hexadecimal digits and nothing else', () => {
    for (const content of [
      '',
      text.slice(1),
      `${text}0`,
      `${text}\n\n`,
      `${text}\nmore`,
      ` ${text}`,
      text.replace(/./, 'g'),
    ]) {
      refused({ TILERANK_SECRET_FILE: fileOf(content) }, /64 hexadecimal digits/)
      assert.throws(() => readSecret(content, {}), { code: 'ERR_INVALID_ARGUMENT' })
    }
  })

  it('is not needed where encryption is none, which is said by name', () => {
    assert.equal(readEncryption(undefined, {}), 'curve')
    assert.equal(readEncryption(undefined, { TILERANK_ENCRYPTION: '' }), 'curve')
    assert.equal(readEncryption(undefined, { TILERANK_ENCRYPTION: 'none' }), 'none')
    assert.equal(readEncryption('curve', { TILERANK_ENCRYPTION: 'none' }), 'curve')
    assert.throws(() => readEncryption('off', {}), { code: 'ERR_INVALID_ARGUMENT' })
    assert.throws(() => readEncryption(undefined, { TILERANK_ENCRYPTION: 'no' }), { code: 'ERR_ENVIRONMENT' })
  })

  it('gives the same keys in every process, other ones for every purpose and secret', () => {
    const keys = deriveKeys(secret, 'store server')
    assert.deepEqual(deriveKeys(Buffer.from(secret), 'store server'), keys)
    const all = [keys, deriveKeys(secret, 'store client'), deriveKeys(randomBytes(32), 'store server')]
    assert.equal(new Set(all.flatMap((pair) => [pair.publicKey, pair.secretKey])).size, 6)
    for (const key of all.flatMap((pair) => [pair.publicKey, pair.secretKey])) assert.equal(key.length, 40)
  })

  it('is written in Z85 as ZeroMQ writes it', () => {
    // The example of ZeroMQ's RFC 32.
    assert.equal(z85Encode(Buffer.from('864fd26fb559f75b', 'hex')), 'HelloWorld')
    for (let round = 0; round < 100; round++) {
      const { publicKey } = curveKeyPair()
      const bytes = z85Decode(publicKey)
      assert.ok(bytes)
      assert.equal(z85Encode(bytes), publicKey)
    }
    const { publicKey } = curveKeyPair()
    for (const text of [
      '',
      publicKey.slice(1),
      `${publicKey}0`,
      publicKey.replace(/./, '~'),
      publicKey.replace(/^.{5}/, '#####'),
    ])
      assert.equal(z85Decode(text), undefined)
  })
})
