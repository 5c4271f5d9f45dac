import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readFileSync, symlinkSync, utimesSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'

import fc from 'fast-check'

import type { JsonValue } from '../../tp/checkpoint/json.js'
import { countOf, isJsonArray, isJsonObject, JsonError, JsonNumber, JsonReader } from '../../tp/checkpoint/json.js'
import { checkUnchanged, parseWeightIndex, readSafetensorsFile, readWeights } from '../../tp/checkpoint/safetensors.js'
import { demoModel, headerOf, safetensors, Scratch, siblingModel, testModel } from './files.js'

const badCheckpoint = (message: RegExp) => ({ name: 'InferenceError', code: 'ERR_BAD_CHECKPOINT', message })

async function refuses(content: Uint8Array, message: RegExp): Promise<void> {
  using scratch = new Scratch()
  const path = scratch.write('model.safetensors', content)
  await assert.rejects(readSafetensorsFile(path), badCheckpoint(message))
}

describe('safetensors headers', () => {
  it('place every tensor of the package models exactly, and cover the file', async () => {
    for (const directory of [demoModel, testModel('llama'), testModel('llama-gqa-odd')]) {
      const { tensors, files } = await readWeights(directory)
      assert.ok(tensors.size >= 30)
      for (const { path, nbytes } of files) {
        const own = [...tensors.values()]
          .filter((tensor) => tensor.file === path)
          .sort((a, b) => a.byteOffset - b.byteOffset)
        const [first] = own
        assert.ok(first !== undefined)
        const header = readFileSync(path).readBigUInt64LE(0)
        assert.equal(first.byteOffset, 8 + Number(header))
        assert.equal(
          own.reduce((sum, tensor) => sum + tensor.nbytes, first.byteOffset),
          nbytes,
        )
      }
    }
  })

  it('give the offsets that the format means, not only consistent ones', async () => {
    using scratch = new Scratch()
    const data = Buffer.alloc(24)
    data.writeFloatLE(1.5, 0)
    data.writeFloatLE(-2, 16)
    const header = headerOf({ second: { shape: [2], offsets: [16, 24] }, first: { offsets: [0, 16] } })
    const path = scratch.write('model.safetensors', safetensors(header, data))
    const { tensors } = await readWeights(scratch.path)
    const bytes = readFileSync(path)
    assert.equal(bytes.readFloatLE(tensors.get('first')?.byteOffset), 1.5)
    assert.equal(bytes.readFloatLE(tensors.get('second')?.byteOffset), -2)
    assert.deepEqual(tensors.get('second')?.shape, [2])
  })

  it('may be padded with spaces, empty of tensors, and hold scalars and empty tensors anywhere', async () => {
    using scratch = new Scratch()
    const header = headerOf({
      scalar: { dtype: 'BF16', shape: [], offsets: [0, 2] },
      emptyInside: { shape: [4, 0, 7], offsets: [2, 2] },
      two: { dtype: 'F16', shape: [1], offsets: [2, 4] },
      emptyAtEnd: { shape: [0], offsets: [4, 4] },
    })
    const { tensors } = await readSafetensorsFile(scratch.write('a.safetensors', safetensors(`${header}   `, 4)))
    assert.deepEqual(tensors.map(({ name }) => name).sort(), ['emptyAtEnd', 'emptyInside', 'scalar', 'two'])
    assert.deepEqual((await readSafetensorsFile(scratch.write('b.safetensors', safetensors('{}')))).tensors, [])
    const withMetadata = '{"__metadata__":{"format":"pt","a":"b"}}'
    assert.deepEqual((await readSafetensorsFile(scratch.write('c.safetensors', safetensors(withMetadata)))).tensors, [])
  })

  it('keep tensors of other dtypes readable, apart from the weights', async () => {
    using scratch = new Scratch()
    const header = headerOf({
      weight: { offsets: [0, 16] },
      buffer: { dtype: 'I64', shape: [2], offsets: [16, 32] },
      packed: { dtype: 'F4', shape: [3, 2], offsets: [32, 35] },
    })
    scratch.write('model.safetensors', safetensors(header, 35))
    const { tensors, otherTensors } = await readWeights(scratch.path)
    assert.deepEqual([...tensors.keys()], ['weight'])
    assert.deepEqual(
      [...otherTensors.values()].map(({ name, dtype }) => [name, dtype]),
      [
        ['buffer', 'I64'],
        ['packed', 'F4'],
      ],
    )
  })

  it('take __proto__ and constructor as names like any other', async () => {
    using scratch = new Scratch()
    const header =
      '{"__proto__":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"constructor":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    scratch.write('model.safetensors', safetensors(header, 8))
    assert.deepEqual([...(await readWeights(scratch.path)).tensors.keys()], ['__proto__', 'constructor'])
  })
})

describe('hostile safetensors files', () => {
  const one = (sketch: Parameters<typeof headerOf>[0][string], data = 16): Buffer =>
    safetensors(headerOf({ w: sketch }), data)
  const raw = (length: bigint, rest = ''): Buffer => {
    const bytes = Buffer.alloc(8)
    bytes.writeBigUInt64LE(length)
    return Buffer.concat([bytes, Buffer.from(rest)])
  }
  const cases: Readonly<Record<string, readonly [Buffer, RegExp]>> = {
    'an empty file': [Buffer.alloc(0), /has 0 bytes/],
    'seven bytes': [Buffer.alloc(7), /has 7 bytes/],
    'a header longer than allowed': [raw(100_000_001n, '{}'), /claims a header of 100000001 bytes/],
    'a header of 2^64 - 1 bytes': [raw(2n ** 64n - 1n, '{}'), /claims a header of 18446744073709551615 bytes/],
    'a header longer than the file': [raw(60n, '{"test": {"dtype": "I32"'), /cut off/],
    'a header of no bytes': [raw(0n), /does not begin with "\{"/],
    'a header that is no UTF-8': [Buffer.concat([raw(3n), Buffer.from([0x7b, 0xff, 0x7d])]), /not valid UTF-8/],
    'a byte order mark': [safetensors('\ufeff{}'), /does not begin/],
    'a space before the header': [safetensors(' {}'), /does not begin/],
    'a list as header': [safetensors('[]'), /does not begin/],
    'a header that is not closed': [safetensors('{'), /a string is missing/],
    'text behind the header': [safetensors('{} x'), /something follows/],
    'a NUL behind the header': [safetensors('{}\0'), /something follows/],
    'a second object behind the header': [safetensors('{}{}'), /something follows/],
    'a comment': [safetensors('{/**/}'), /a string is missing/],
    'a trailing comma': [safetensors('{"__metadata__":{},}'), /a string is missing/],
    'a raw line break in a name': [safetensors('{"a\nb":1}'), /raw control character/],
    'a tensor twice': [
      safetensors(
        '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
      ),
      /"w" stands twice/,
    ],
    'a tensor twice in two spellings': [
      safetensors(
        '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0077":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
      ),
      /"w" stands twice/,
    ],
    'a key twice in a tensor': [
      safetensors('{"w":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', 1),
      /"dtype" stands twice/,
    ],
    'metadata twice': [safetensors('{"__metadata__":{},"__metadata__":{}}'), /"__metadata__" stands twice/],
    'metadata that is no object': [safetensors('{"__metadata__":"x"}'), /an object is missing/],
    'metadata of numbers': [safetensors('{"__metadata__":{"n":1}}'), /strings only/],
    'metadata of objects': [safetensors('{"__metadata__":{"n":{}}}'), /strings only/],
    'deep nesting': [safetensors(`{"__metadata__":{"a":${'['.repeat(50_000)}`), /nested deeper than 8/],
    'a tensor that is no object': [safetensors('{"w":7}'), /an object is missing/],
    'an unknown key in a tensor': [
      safetensors('{"w":{"dtype":"U8","shape":[],"data_offsets":[0,1],"file":"x"}}', 1),
      /unknown key "file"/,
    ],
    'an unknown dtype': [one({ dtype: 'F31' }), /dtype "F31" is unknown/],
    'a dtype named as a method': [one({ dtype: 'toString' }), /is unknown/],
    'a dtype that is a number': [one({ dtype: 32 }), /a string is missing/],
    'no dtype': [safetensors('{"w":{"shape":[1],"data_offsets":[0,4]}}', 4), /dtype "" is unknown/],
    'no shape': [safetensors('{"w":{"dtype":"F32","data_offsets":[0,4]}}', 4), /shape is missing/],
    'no offsets': [safetensors('{"w":{"dtype":"F32","shape":[1]}}', 4), /data_offsets must be/],
    'a negative dimension': [one({ shape: [-2, -2] }), /shape has an element that is no plain integer/],
    'a fractional dimension': [one({ shape: [2.5, 2] }), /shape has an element/],
    'a dimension with an exponent': [
      safetensors('{"w":{"dtype":"U8","shape":[1e3],"data_offsets":[0,1000]}}', 1000),
      /shape has an element/,
    ],
    'a dimension written 1.0': [
      safetensors('{"w":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', 1),
      /shape has an element/,
    ],
    'a dimension with a leading zero': [
      safetensors('{"w":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', 1),
      /comma or a closing bracket/,
    ],
    'a dimension that is a string': [one({ shape: ['2', 2] }), /shape has an element/],
    'a dimension above 2^53': [
      safetensors('{"w":{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,1]}}', 1),
      /shape has an element/,
    ],
    'a shape whose product overflows 64 bits': [
      one({ dtype: 'U8', shape: [2 ** 32, 2 ** 32], offsets: [0, 0] }, 0),
      /18446744073709551616 bytes, but/,
    ],
    'a shape whose product overflows to the right size': [
      one({ shape: [2 ** 32, 2 ** 32, 4] }, 16),
      /bytes, but data_offsets give 16/,
    ],
    'many dimensions': [
      one({ shape: Array.from({ length: 33 }, () => 1), offsets: [0, 4] }, 4),
      /more than 32 dimensions/,
    ],
    'offsets that are negative': [one({ offsets: [-16, 0] }), /data_offsets has an element/],
    'offsets above 2^53': [
      safetensors('{"w":{"dtype":"U8","shape":[1],"data_offsets":[9007199254740992,9007199254740993]}}', 1),
      /data_offsets has/,
    ],
    'offsets with an exponent': [
      safetensors('{"w":{"dtype":"U8","shape":[1000],"data_offsets":[0,1e3]}}', 1000),
      /data_offsets has an element/,
    ],
    'offsets that are strings': [one({ offsets: ['0', '16'] }), /data_offsets has an element/],
    'offsets backwards': [one({ offsets: [16, 0] }), /do not lie in/],
    'offsets beyond the file': [one({ shape: [2, 3], offsets: [0, 24] }, 16), /do not lie in the 16 bytes/],
    'one offset': [one({ offsets: [16] }), /must be \[begin, end\]/],
    'three offsets': [one({ offsets: [0, 8, 16] }), /more than two/],
    'a size that shape and dtype do not have': [one({ shape: [2, 3] }, 16), /has 24 bytes, but data_offsets give 16/],
    'elements that do not fill bytes': [
      one({ dtype: 'F4', shape: [3], offsets: [0, 2] }, 2),
      /do not fill whole bytes/,
    ],
    'a hole': [safetensors(headerOf({ a: {}, b: { offsets: [20, 36] } }), 36), /leave a hole/],
    'a hole at the start': [one({ offsets: [4, 20] }, 20), /leave a hole/],
    'an overlap': [safetensors(headerOf({ a: {}, b: { offsets: [12, 28] } }), 28), /overlap/],
    'two names for the same bytes': [safetensors(headerOf({ a: {}, b: {} }), 16), /overlap/],
    'bytes behind the last tensor (a polyglot tail)': [one({}, 17), /end at byte 16 of the data, but there are 17/],
    'data without tensors': [safetensors('{}', 5), /end at byte 0 of the data, but there are 5/],
    'a name with a NUL': [safetensors(headerOf({ 'a\0b': {} }), 16), /holds a NUL/],
    'a name of 5000 bytes': [safetensors(headerOf({ ['x'.repeat(5000)]: {} }), 16), /longer than 4096 bytes/],
  }
  for (const [name, [content, message]] of Object.entries(cases)) {
    it(`refuse ${name}`, () => refuses(content, message))
  }

  it('refuse every strict beginning of a good file', async function () {
    this.timeout(20_000)
    const good = safetensors(headerOf({ a: {}, b: { dtype: 'U8', shape: [3], offsets: [16, 19] } }), 19)
    using scratch = new Scratch()
    for (let length = 0; length < good.length; length++) {
      const path = scratch.write('model.safetensors', good.subarray(0, length))
      await assert.rejects(readSafetensorsFile(path), { code: 'ERR_BAD_CHECKPOINT' }, `length ${length}`)
    }
    await readSafetensorsFile(scratch.write('model.safetensors', good))
  })

  it('never fail otherwise than by refusal, whatever byte is changed', async function () {
    this.timeout(20_000)
    const good = safetensors(headerOf({ a: {}, b: { dtype: 'U8', shape: [3], offsets: [16, 19] } }), 19)
    using scratch = new Scratch()
    await fc.assert(
      fc.asyncProperty(fc.nat(good.length - 1), fc.nat(255), async (at, byte) => {
        const changed = Buffer.from(good)
        changed[at] = byte
        const path = scratch.write('model.safetensors', changed)
        const read = await readSafetensorsFile(path).catch((error: unknown) => error)
        if (read instanceof Error) assert.equal('code' in read ? read.code : read, 'ERR_BAD_CHECKPOINT')
      }),
      { numRuns: 500, seed: 1 },
    )
  })

  it('refuse more than a million tensors, and many overlapping ones, in seconds and without running out of memory', async function () {
    this.timeout(60_000)
    const entries = (count: number, size: number): string =>
      `{${Array.from({ length: count }, (_, i) => `"t${i}":{"dtype":"U8","shape":[${size}],"data_offsets":[0,${size}]}`).join(',')}}`
    const started = process.cpuUsage()
    await refuses(safetensors(entries(1_000_001, 0)), /more than 1000000 tensors/)
    await refuses(safetensors(entries(300_000, 1), 1), /overlap/)
    const { user, system } = process.cpuUsage(started)
    assert.ok((user + system) / 1e6 < 30, `${(user + system) / 1e6} s of processor time`)
  })

  it('are not opened when they are no regular files: a directory, a FIFO, a device, a socket', async function () {
    this.timeout(10_000)
    using scratch = new Scratch()
    mkdirSync(join(scratch.path, 'directory'))
    execFileSync('mkfifo', [join(scratch.path, 'fifo')])
    const server = createServer().listen(join(scratch.path, 'socket'))
    await new Promise((resolve) => server.once('listening', resolve))
    symlinkSync('/dev/zero', join(scratch.path, 'device'))
    symlinkSync('fifo', join(scratch.path, 'linkToFifo'))
    symlinkSync('loop', join(scratch.path, 'loop'))
    try {
      const kinds = {
        directory: /a directory/,
        fifo: /a FIFO/,
        socket: /a socket/,
        device: /a device/,
        linkToFifo: /a FIFO/,
        loop: /loop/,
      }
      for (const [name, message] of Object.entries(kinds)) {
        await assert.rejects(readSafetensorsFile(join(scratch.path, name)), badCheckpoint(message))
      }
    } finally {
      await new Promise((resolve) => server.close(resolve))
    }
  })

  it('may be symbolic links to regular files, as in the cache of the Hugging Face hub', async () => {
    using blobs = new Scratch()
    using snapshot = new Scratch()
    const blob = blobs.write('0123abcd', safetensors(headerOf({ w: {} }), 16))
    symlinkSync(blob, join(snapshot.path, 'model.safetensors'))
    assert.equal((await readWeights(snapshot.path)).tensors.get('w')?.file, blob)
  })

  it('are found out when they change after their header was read', async () => {
    using scratch = new Scratch()
    const path = scratch.write('model.safetensors', safetensors(headerOf({ w: {} }), 16))
    const { files } = await readWeights(scratch.path)
    await checkUnchanged(files)
    utimesSync(path, 1, 1)
    await assert.rejects(checkUnchanged(files), badCheckpoint(/was changed while/))
    const { files: again } = await readWeights(scratch.path)
    scratch.write('model.safetensors', safetensors(headerOf({ w: { shape: [8], offsets: [0, 32] } }), 32))
    utimesSync(path, 1, 1)
    await assert.rejects(checkUnchanged(again), badCheckpoint(/was changed while/))
  })
})

describe('the index of shards', () => {
  const shard = (...names: readonly string[]): Buffer =>
    safetensors(
      headerOf(Object.fromEntries(names.map((name, i) => [name, { offsets: [16 * i, 16 * i + 16] }]))),
      16 * names.length,
    )
  const index = (map: unknown): string => JSON.stringify({ metadata: { total_size: 32 }, weight_map: map })

  it('leads to every shard', async () => {
    using scratch = new Scratch()
    scratch.write('model.safetensors.index.json', index({ a: 'x-1.safetensors', b: 'x-2.safetensors' }))
    scratch.write('x-1.safetensors', shard('a'))
    scratch.write('x-2.safetensors', shard('b'))
    const { tensors, files, headers } = await readWeights(scratch.path)
    assert.deepEqual(
      [...tensors.values()].map((tensor) => tensor.file),
      files.map((file) => file.path),
    )
    assert.equal(headers.length, 2)
  })

  const names = [
    '../x.safetensors',
    '/etc/passwd',
    'a\0b.safetensors',
    'sub/dir.safetensors',
    '..',
    '.',
    '',
    'a\\b.safetensors',
    'model.bin',
    7,
    null,
    ['a.safetensors'],
  ]
  for (const name of names) {
    it(`refuses ${JSON.stringify(name)} as the name of a shard`, async () => {
      using scratch = new Scratch()
      scratch.write('model.safetensors.index.json', index({ a: name }))
      await assert.rejects(readWeights(scratch.path), badCheckpoint(/allowed is the plain name/))
    })
  }

  const broken: Readonly<Record<string, readonly [string, RegExp]>> = {
    'a list': ['[]', /not a JSON object/],
    'no weight_map': ['{"metadata":{}}', /no weight_map/],
    'a weight_map that is a list': [index(['a.safetensors']), /no weight_map that is an object/],
    'an empty weight_map': [index({}), /lists no tensor/],
    'a tensor twice': ['{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', /"a" stands twice/],
    'no JSON': ['weights', /a value is missing/],
  }
  for (const [name, [text, message]] of Object.entries(broken)) {
    it(`refuses ${name}`, () => {
      assert.throws(() => parseWeightIndex(Buffer.from(text), 'index.json'), badCheckpoint(message))
    })
  }

  it('refuses shards that are missing, hold less, or hold what belongs elsewhere', async () => {
    using scratch = new Scratch()
    scratch.write('model.safetensors.index.json', index({ a: 'x.safetensors', b: 'y.safetensors' }))
    scratch.write('x.safetensors', shard('a'))
    await assert.rejects(
      readWeights(scratch.path),
      badCheckpoint(/lists the shard "y\.safetensors", but there is no such file/),
    )
    scratch.write('y.safetensors', shard('c'))
    await assert.rejects(readWeights(scratch.path), badCheckpoint(/places the tensor "b" here/))
    scratch.write('y.safetensors', shard('b', 'a'))
    await assert.rejects(
      readWeights(scratch.path),
      badCheckpoint(/holds the tensor "a", which the index places in "x\.safetensors"/),
    )
    scratch.write('x.safetensors', shard('a', 'z'))
    scratch.write('y.safetensors', shard('b', 'z'))
    await assert.rejects(readWeights(scratch.path), badCheckpoint(/the tensor "z" stands in .* too/))
  })

  it('says what was looked for, and what is there instead, when there are no weights', async () => {
    using scratch = new Scratch()
    scratch.write('pytorch_model.bin', '')
    const expected = {
      code: 'ERR_MODEL_NOT_FOUND',
      message: /looked for model\.safetensors .*found but pytorch_model\.bin.*convert/,
    }
    await assert.rejects(readWeights(scratch.path), expected)
  })
})

describe('the JSON reader', () => {
  const limits = { maxDepth: 16, maxEntries: 1000, maxStringLength: 1000 }
  const plain = (value: JsonValue): unknown => {
    if (value instanceof JsonNumber) return value.value
    if (isJsonArray(value)) return value.map(plain)
    if (!isJsonObject(value)) return value
    const object = Object.create(null) as Record<string, unknown>
    for (const [key, item] of value) object[key] = plain(item)
    return object
  }

  it('reads what JSON.parse reads, and the same', function () {
    this.timeout(20_000)
    fc.assert(
      fc.property(fc.json({ maxDepth: 5 }), fc.constantFrom(undefined, 1), (text, indent) => {
        const expected: unknown = JSON.parse(text)
        const spelled = JSON.stringify(expected, undefined, indent)
        assert.equal(JSON.stringify(plain(new JsonReader(spelled, limits).document())), JSON.stringify(expected))
      }),
      { numRuns: 300, seed: 2 },
    )
  })

  it('refuses what JSON.parse refuses', function () {
    this.timeout(20_000)
    let refused = 0
    fc.assert(
      fc.property(
        fc.string({ unit: fc.constantFrom(...Array.from('{}[]",:0123-+.eE\\u truefalsn\n\t\0')), maxLength: 12 }),
        (text) => {
          let isJson = true
          try {
            JSON.parse(text)
          } catch {
            isJson = false
          }
          if (isJson) return
          refused++
          assert.throws(() => new JsonReader(text, limits).document(), JsonError, text)
        },
      ),
      { numRuns: 5000, seed: 3 },
    )
    assert.ok(refused > 1000)
  })

  it('counts in plain digits only', () => {
    const count = (text: string): number | null => countOf(new JsonReader(text, limits).document())
    assert.deepEqual(['0', '17', '9007199254740991'].map(count), [0, 17, 9007199254740991])
    for (const text of [
      '-0',
      '-1',
      '1.0',
      '1e3',
      '1E0',
      '9007199254740992',
      '99999999999999999999',
      '"1"',
      'true',
      'null',
      '[1]',
    ]) {
      assert.equal(count(text), null, text)
    }
  })

  it('finds a key that stands twice, wherever it stands among few or many, and only in the same object', () => {
    const keys = Array.from({ length: 20 }, (_, i) => `"k${i}":0`)
    const read = (members: readonly string[]): JsonValue => new JsonReader(`{${members.join(',')}}`, limits).document()
    assert.ok(isJsonObject(read(keys)))
    for (let at = 0; at < keys.length; at++) assert.throws(() => read([...keys, `"k${at}":1`]), JsonError)
    assert.ok(isJsonObject(read(['"a":{"a":{"a":1},"b":{"a":2}}', '"b":{"a":1}'])))
  })

  it('reads millions of escapes in one string', function () {
    this.timeout(20_000)
    const count = 3_000_000
    const text = `"${'\\n'.repeat(count)}\\u00e9"`
    assert.equal(new JsonReader(text, { ...limits, maxStringLength: count + 1 }).string().length, count + 1)
    for (const wrong of ['"\\x"', '"\\u12"', '"\\', '"\\"', '"\\u00e"']) {
      assert.throws(() => new JsonReader(wrong, limits).string(), JsonError, wrong)
    }
  })

  it('keeps to its limits', () => {
    const tooMuch = [
      `${'['.repeat(17)}${']'.repeat(17)}`,
      JSON.stringify(Array.from({ length: 1001 }, () => 0)),
      `"${'x'.repeat(1001)}"`,
    ]
    for (const text of tooMuch) assert.throws(() => new JsonReader(text, limits).document(), JsonError)
  })
})

describe('every model of the collection', () => {
  const stories = siblingModel('stories260K')
  const title = 'reads the shared collection of other families as safetensors'
  if (stories === null) it.skip(`${title} (it is not beside this working copy)`)
  else {
    it(title, async () => {
      for (const name of ['bloom', 'falcon', 'gpt-j', 'gpt-neox', 'mistral', 'opt', 'phi3', 'qwen2', 'stories260K']) {
        const { headers, tensors } = await readWeights(join(stories, '..', name))
        assert.ok(tensors.size > 10, name)
        assert.equal(
          new Set(headers.map((header) => createHash('sha256').update(header).digest('hex'))).size,
          headers.length,
        )
      }
    })
  }
})
