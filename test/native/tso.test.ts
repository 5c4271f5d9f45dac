// Compiles the shipped collectives, communicator and pool against the machine in tso/, which runs them in every order that x86-TSO
// allows, and runs a set of scenarios: the quick one, or with TILERANK_TEST=long the whole. Then the same with one line broken on
// purpose, line by line: each must be caught, so that the check is known to see what it is for.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { packageRoot } from '../../native/index.js'

interface Mutant {
  readonly title: string
  readonly file: string
  /** Stands in the file once: whole statements, or an expression where no semicolon ends it. */
  readonly line: string
  readonly broken: string
  /** Where it shows: family, ranks, script. */
  readonly scenario: string
  readonly violation: RegExp
}

const mutants: readonly Mutant[] = [
  {
    title: 'allReduce publishes before its input stands',
    file: 'comm/all_reduce.cpp',
    line: `if (!is_in_place) CopyIn(context, operation, 0, operation.sequence);
  context.fabric->Publish(context.lane, operation.sequence, TagOf(operation, 0));`,
    broken: `context.fabric->Publish(context.lane, operation.sequence, TagOf(operation, 0));
  if (!is_in_place) CopyIn(context, operation, 0, operation.sequence);`,
    scenario: 'group 2 o',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'a publish is a plain store, which the look at `sleepers` overtakes',
    file: 'comm/communicator.h',
    line: 'line.sequence.store(sequence, std::memory_order_seq_cst);',
    broken: 'line.sequence.store(sequence, std::memory_order_release);',
    scenario: 'group 2 bb',
    violation: /^stuck/,
  },
  {
    title: 'the tag is stored after the sequence that publishes it',
    file: 'comm/communicator.h',
    line: `line.tag.store(tag.Bits(), std::memory_order_relaxed);
    line.count.store(tag.count, std::memory_order_relaxed);`,
    broken: `line.sequence.store(sequence, std::memory_order_release);
    line.tag.store(tag.Bits(), std::memory_order_relaxed);
    line.count.store(tag.count, std::memory_order_relaxed);`,
    scenario: 'group 2 o',
    violation: /^error: ranks called different operations/,
  },
  {
    title: 'a payload is stored after the sequence that publishes it',
    file: 'comm/communicator.cpp',
    line: `for (int i = 0; i < kPayloadWords; i++) line.payload[i].store(payload.words[i], std::memory_order_relaxed);
  PublishLine(lane, sequence, tag, line);`,
    broken: `PublishLine(lane, sequence, tag, line);
  for (int i = 0; i < kPayloadWords; i++) line.payload[i].store(payload.words[i], std::memory_order_relaxed);`,
    scenario: 'runner 2 p',
    violation: /^wrong bytes: a kernel time/,
  },
  {
    title: 'a sleeper does not look again after it has raised `sleepers`',
    file: 'comm/communicator.cpp',
    line: 'seen < awaited.sequence && !failed()',
    broken: '!failed()',
    scenario: 'group 2 b',
    violation: /^stuck/,
  },
  {
    title: 'a sleeper does not say that it sleeps',
    file: 'comm/communicator.cpp',
    line: 'sleepers.fetch_add(1, std::memory_order_seq_cst);',
    broken: '',
    scenario: 'group 2 bb',
    violation: /^stuck/,
  },
  {
    title: 'a publisher looks at the sleepers of the other flag line',
    file: 'comm/communicator.h',
    line: 'Lane(config_.rank, lane).sleepers.flag[sequence & 1].load(std::memory_order_seq_cst) != 0',
    broken: 'Lane(config_.rank, lane).sleepers.flag[~sequence & 1].load(std::memory_order_seq_cst) != 0',
    scenario: 'group 2 bb',
    violation: /^stuck/,
  },
  {
    title: 'there is one slot instead of two',
    file: 'comm/communicator.h',
    line: '(sequence & 1) * slot_stride_',
    broken: '0 * slot_stride_',
    scenario: 'group 2 oo',
    violation: /^wrong bytes: a sum/,
  },
  {
    title: 'a call does not acquire its slot after a broadcast',
    file: 'comm/operation.cpp',
    line: '!context.fabric->IsAcquirable(context.lane, operation.sequence)',
    broken: 'false',
    scenario: 'group 2 oxo',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'the root of a broadcast runs ahead of its readers',
    file: 'comm/communicator.h',
    line: 'if (settled_[static_cast<size_t>(lane)].sequence + 2 >= sequence) [[likely]] return Status::Ok();',
    broken: 'if (settled_[static_cast<size_t>(lane)].sequence + 3 >= sequence) return Status::Ok();',
    scenario: 'group 2 xX',
    violation: /^(wrong bytes|error)/,
  },
  {
    title: 'a writer waits for the readers of one generation less',
    file: 'comm/communicator.h',
    line: 'return AwaitConsumed(lane, Overwritten(lane, sequence), deadline);',
    broken: 'return AwaitConsumed(lane, Overwritten(lane, sequence) - 1, deadline);',
    scenario: 'runner 2 mmm',
    violation: /^(wrong bytes|error)/,
  },
  {
    title: 'a reader says that it has read before it has',
    file: 'comm/broadcast.cpp',
    line: `if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
      context.copy(operation.data + chunk * operation.chunk_bytes, comm.Slot(operation.root, sequence), nbytes);
    }
    comm.Consumed(context.lane, sequence);`,
    broken: `comm.Consumed(context.lane, sequence);
    if (size_t nbytes = operation.ChunkBytes(chunk); nbytes > 0) {
      context.copy(operation.data + chunk * operation.chunk_bytes, comm.Slot(operation.root, sequence), nbytes);
    }`,
    scenario: 'group 2 xxx',
    violation: /^wrong bytes: what was broadcast of call 0/,
  },
  {
    title: '`consumed` is a plain store, which the look at `sleepers` overtakes',
    file: 'comm/communicator.cpp',
    line: 'mine.consumed.sequence.store(sequence, std::memory_order_seq_cst);',
    broken: 'mine.consumed.sequence.store(sequence, std::memory_order_release);',
    scenario: 'group 2 xxx',
    violation: /^stuck/,
  },
  {
    title: 'having heard of generation g is taken for all having read g',
    file: 'comm/communicator.h',
    line: 'settled_[static_cast<size_t>(lane)].sequence = sequence - 1;',
    broken: 'settled_[static_cast<size_t>(lane)].sequence = sequence;',
    scenario: 'group 2 oxo',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'having heard of one peer is taken for having heard of all',
    file: 'comm/communicator.cpp',
    line: 'config_.world_size == 2',
    broken: 'true',
    scenario: 'group 3 yxy',
    violation: /^(wrong bytes|error)/,
  },
  {
    title: 'a peer that has published g is taken for one that has read g',
    file: 'comm/communicator.cpp',
    line: 'theirs.flag[1].sequence.load(std::memory_order_acquire) > sequence',
    broken: 'theirs.flag[1].sequence.load(std::memory_order_acquire) >= sequence',
    scenario: 'group 2 oxo',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'a barrier does not wait',
    file: 'comm/barrier.h',
    line: 'return context.fabric->Await(context.lane, operation.sequence, MakeTag(operation, 0), deadline);',
    broken: 'return Status::Ok();',
    scenario: 'group 2 b',
    violation: /^barrier: rank \d is past it/,
  },
  {
    title: 'allGather does not wait',
    file: 'comm/all_gather.cpp',
    line: 'if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 g',
    violation: /^wrong bytes: a part of call 0/,
  },
  {
    title: 'reduceScatter does not wait',
    file: 'comm/reduce_scatter.cpp',
    line: 'if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 c',
    violation: /^wrong bytes: a scattered part of call 0/,
  },
  {
    title: 'allToAll does not wait',
    file: 'comm/all_to_all.cpp',
    line: 'if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 a',
    violation: /^wrong bytes: a part of call 0/,
  },
  {
    title: 'the root of a gather says that it has read before it has',
    file: 'comm/gather.cpp',
    line: 'if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, comm.Slot(peer, sequence), theirs.nbytes);',
    broken: `comm.Consumed(context.lane, sequence);
      if (theirs.nbytes > 0) context.copy(operation.output + theirs.begin, comm.Slot(peer, sequence), theirs.nbytes);`,
    scenario: 'group 2 hhh',
    violation: /^(wrong bytes: a part of call 0|error)/,
  },
  {
    title: 'a scatter is read before its root has published',
    file: 'comm/scatter.cpp',
    line: 'if (Status s = comm.AwaitSame(context.lane, sequence, operation.root, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 s',
    violation: /^wrong bytes: a scattered part of call 0/,
  },
  {
    title: 'the root of a reduce does not wait',
    file: 'comm/reduce.cpp',
    line: 'if (Status s = comm.AwaitSame(context.lane, sequence, rank, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 r',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'the owner of a tensor does not wait for its readers',
    file: 'comm/source.h',
    line: 'IsFromTensor(context, operation, nbytes) && peer < context.fabric->world_size()',
    broken: 'false',
    scenario: 'group 2 ll',
    violation: /^wrong bytes: a part of call 0/,
  },
  {
    title: 'a tensor that was broadcast is given back before it is read',
    file: 'comm/broadcast.cpp',
    line: `context.copy(operation.data, source, operation.nbytes());
        comm.Consumed(context.lane, last);`,
    broken: `comm.Consumed(context.lane, last);
        context.copy(operation.data, source, operation.nbytes());`,
    scenario: 'group 2 ww',
    violation: /^wrong bytes: what was broadcast of call 0/,
  },
  {
    title: 'a rank whose tensor is gathered does not wait for the root',
    file: 'comm/gather.cpp',
    line: 'target != nullptr ? Status::Ok() : comm.AwaitConsumedBy(context.lane, last, operation.root, NameOf(operation.op), deadline)',
    broken: 'Status::Ok()',
    scenario: 'group 2 ded',
    violation: /^wrong bytes: a part of call 1/,
  },
  {
    title: 'the root of a gather does not wait for those who write into its tensor',
    file: 'comm/gather.cpp',
    line: 'if (Status s = comm.AwaitConsumedBy(context.lane, last, peer, NameOf(operation.op), deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 j',
    violation: /^wrong bytes: a part of call 0/,
  },
  {
    title: 'a rank writes into the tensor of a root that has not come yet',
    file: 'comm/gather.cpp',
    line: 'if (Status s = comm.AwaitSame(context.lane, operation.sequence, operation.root, TagOf(operation), deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 jj',
    violation: /^(wrong bytes|stuck)/,
  },
  {
    title: 'a rank whose tensor is reduced does not wait for the root',
    file: 'comm/reduce.cpp',
    line: 'return comm.AwaitConsumedBy(context.lane, operation.sequence + chunks - 1, operation.root, NameOf(operation.op), deadline);',
    broken: 'return Status::Ok();',
    scenario: 'group 2 11',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'two-shot publishes its sums before they stand',
    file: 'comm/all_reduce.cpp',
    line: 'context.reduce(sum, sources, world_size, operation.dtype, operation.reduce_op, mine.nbytes / element);',
    broken: `comm.Publish(context.lane, sequence + 1, sums);
      context.reduce(sum, sources, world_size, operation.dtype, operation.reduce_op, mine.nbytes / element);`,
    scenario: 'group 2 t',
    violation: /^wrong bytes: a sum of call 0/,
  },
  {
    title: 'allReduce in place does not wait for the sums of the others',
    file: 'comm/all_reduce.cpp',
    line: 'return context.fabric->Await(context.lane, operation.sequence + 1, TagOf(operation, 1), deadline);',
    broken: 'return Status::Ok();',
    scenario: 'group 2 p',
    violation: /^wrong bytes: a sum/,
  },
  {
    title: 'allReduce into tensors of an output does not wait for its inputs',
    file: 'comm/all_reduce.cpp',
    line: 'if (Status s = comm.Await(context.lane, operation.sequence, TagOf(operation, 0), deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 q',
    violation: /^wrong bytes: (a sum|what an output leaves alone) of call 0/,
  },
  {
    title: 'a part of any size is read before it stands',
    file: 'comm/all_to_all.cpp',
    line: 'if (piece > 0) PublishCells(context, operation, piece, TagOf(operation));',
    broken: `if (piece > 0) comm.Publish(context.lane, sequence, tag);
    if (piece > 0) PublishCells(context, operation, piece, TagOf(operation));`,
    scenario: 'group 2 v',
    violation: /^wrong bytes: a part of any size of call 0/,
  },
  {
    title: 'a batch is published before all of it stands',
    file: 'comm/batch.cpp',
    line: 'if (nbytes > 0) context.copy(slot + batch.places[i], one.data, nbytes);',
    broken: `if (i + 1 == step.last) comm.Publish(context.lane, sequence, TagOf(operation));
    if (nbytes > 0) context.copy(slot + batch.places[i], one.data, nbytes);`,
    scenario: 'group 2 k',
    violation: /^wrong bytes: a part of a batch of call 0/,
  },
  {
    title: 'a batch does not wait',
    file: 'comm/batch.cpp',
    line: 'if (Status s = comm.Await(context.lane, sequence, tag, deadline); !s.ok()) [[unlikely]] return s;',
    broken: '',
    scenario: 'group 2 k',
    violation: /^wrong bytes: a sum of a batch of call 0/,
  },
  {
    title: 'a sender that looks whether its slot is free looks at the generation before',
    file: 'comm/communicator.h',
    line: 'HaveConsumed(lane, Overwritten(lane, sequence))',
    broken: 'HaveConsumed(lane, Overwritten(lane, sequence) - 1)',
    scenario: 'channel 2 mmmm',
    violation: /^(wrong bytes: what was broadcast|error)/,
  },
  {
    title: 'a message is taken for ready when the last of its chunks finds a free slot',
    file: 'comm/operation.cpp',
    line: 'chunks == 1 || (chunks == 2 && comm.IsAcquirable(context.lane, operation.sequence + 1))',
    broken: 'comm.IsAcquirable(context.lane, operation.sequence + chunks - 1)',
    scenario: 'messages 2 41',
    violation: /^(error: consume at sequence \d did not end|stuck)/,
  },
  {
    title: 'a message that lies in its slot is taken for ready only when it has been read',
    file: 'comm/operation.cpp',
    line: 'chunks == 1 || (chunks == 2 && comm.IsAcquirable(context.lane, operation.sequence + 1))',
    broken: 'comm.IsAcquirable(context.lane, operation.sequence + chunks - 1)',
    scenario: 'messages 2 111111',
    violation: /^unready/,
  },
  {
    title: 'a message of two chunks is taken for ready when its first has come',
    file: 'comm/operation.cpp',
    line: 'chunks == 1 && comm.IsReadyFrom(context.lane, operation.sequence, operation.root)',
    broken: 'comm.IsReadyFrom(context.lane, operation.sequence, operation.root)',
    scenario: 'messages 2 21',
    violation: /^error: message at sequence \d did not end/,
  },
  {
    title: 'a rank that left in order is a loss, whatever it had published',
    file: 'comm/communicator.cpp',
    line: 'std::max(last, theirs.consumed.sequence.load(std::memory_order_acquire)) >= awaited.sequence',
    broken: 'false',
    scenario: 'group 2 b',
    violation: /^error: rank \d \(pid 0 on .*\) closed the group/,
  },
  {
    title: 'a post of the pool looks at the sleepers first',
    file: 'runner/pool.cpp',
    line: `value.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) Futex(value, FUTEX_WAKE, INT_MAX);`,
    broken: `if (sleepers.load(std::memory_order_seq_cst) != 0) Futex(value, FUTEX_WAKE, INT_MAX);
  value.fetch_add(1, std::memory_order_seq_cst);`,
    scenario: 'pool 2 0',
    violation: /^stuck/,
  },
  {
    title: 'a sleeper of the pool does not say that it sleeps',
    file: 'runner/pool.cpp',
    line: 'sleepers.fetch_add(1, std::memory_order_seq_cst);',
    broken: '',
    scenario: 'pool 2 0',
    violation: /^stuck/,
  },
  {
    title: 'whoever stops a job wakes nobody',
    file: 'runner/pool.h',
    line: `stopped_.store(true, std::memory_order_seq_cst);
    phase_.Post();`,
    broken: 'stopped_.store(true, std::memory_order_seq_cst);',
    scenario: 'pool 2 s',
    violation: /^stuck/,
  },
  {
    title: "the pool's barrier opens before it is reset",
    file: 'runner/pool.cpp',
    line: `arrived_.store(0, std::memory_order_relaxed);
    phase_.Post();`,
    broken: `phase_.Post();
    arrived_.store(0, std::memory_order_relaxed);`,
    scenario: 'pool 2 2',
    violation: /^(stuck|barrier)/,
  },
  {
    title: 'a job starts before the count of its end is reset',
    file: 'runner/pool.cpp',
    line: `done_.value.store(0, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  stopped_.store(false, std::memory_order_relaxed);
  epoch_.Post();`,
    broken: `epoch_.Post();
  done_.value.store(0, std::memory_order_relaxed);`,
    scenario: 'pool 2 00',
    violation: /^stuck/,
  },
  {
    title: 'a job ends with the first of its threads',
    file: 'runner/pool.cpp',
    line: 'done == others',
    broken: 'done >= 1',
    scenario: 'pool 3 0',
    violation: /^unfinished/,
  },
]

const isLong = process.env['TILERANK_TEST'] === 'long'
const native = join(packageRoot, 'native')
const machine = join(packageRoot, 'test/native/tso')
const sources = [
  ...[
    'communicator',
    'operation',
    'all_reduce',
    'all_gather',
    'all_to_all',
    'batch',
    'broadcast',
    'gather',
    'reduce',
    'reduce_scatter',
    'scatter',
  ].map((name) => `comm/${name}.cpp`),
  'runner/pool.cpp',
  ...['comm/arena.cpp', 'comm/recorder.cpp'], // of which the communicator is made; no flags in them
  'scenarios.cpp',
]
// Zeroed frames, and no lazy binding, whose first call differs from the later ones: equal states must have equal bytes.
const flags = ['-std=c++20', '-fno-exceptions', '-ftrivial-auto-var-init=zero', '-Wall', '-Wextra', '-Werror']

function run(file: string, args: readonly string[], maxMs: number): Promise<{ code: number; text: string }> {
  return new Promise((resolve, reject) => {
    execFile(file, args, { timeout: maxMs, maxBuffer: 1 << 26 }, (error, stdout, stderr) => {
      const code = error === null ? 0 : error.code
      if (typeof code === 'number') resolve({ code, text: stdout + stderr })
      else reject(new Error(`${file} did not end by itself`, { cause: error }))
    })
  })
}

/** Two at a time. */
async function all<T>(items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  const left = [...items]
  const worker = async (): Promise<void> => {
    for (let item = left.shift(); item !== undefined; item = left.shift()) await work(item)
  }
  await Promise.all([worker(), worker()])
}

async function compile(args: readonly string[]): Promise<void> {
  const { code, text } = await run('g++', [...flags, ...args], 120_000)
  assert.equal(code, 0, text)
}

/** The sources with all broken lines beside the true ones, and a number that chooses. */
function writeMutants(folder: string): void {
  for (const file of new Set(mutants.map((mutant) => mutant.file))) {
    let text = readFileSync(join(native, file), 'utf8')
    mutants.forEach((mutant, index) => {
      if (mutant.file !== file) return
      const parts = text.split(mutant.line)
      assert.equal(parts.length, 2, `${file} should hold this once:\n${mutant.line}`)
      const is = `::tso::mutant == ${index + 1}`
      text = parts.join(
        mutant.line.endsWith(';')
          ? `if (${is}) {\n${mutant.broken}\n} else {\n${mutant.line}\n}`
          : `(${is} ? (${mutant.broken}) : (${mutant.line}))`,
      )
    })
    mkdirSync(dirname(join(folder, file)), { recursive: true })
    writeFileSync(join(folder, file), text)
  }
}

describe('the flags under x86-TSO, every order of steps', function () {
  this.timeout(isLong ? 3_600_000 : 180_000)
  let folder = ''
  const path = (name: string): string => join(folder, name)

  before(async function () {
    if (process.arch !== 'x64') return this.skip()
    folder = mkdtempSync(join(tmpdir(), 'tilerank-tso-'))
    const mutated = path('mutated')
    writeMutants(mutated)
    copyFileSync(join(machine, 'shipped.h'), path('shipped.h'))
    await all(
      [
        ['-O1', '-I', machine, '-x', 'c++-header', '-o', path('shipped.h.gch'), path('shipped.h')],
        ['-O2', '-c', '-o', path('machine.o'), join(machine, 'machine.cpp')],
      ],
      compile,
    )
    // A source, like a header, is the first that stands in one of the folders.
    const objects = (kind: string, folders: readonly string[]): { to: string; args: string[] }[] =>
      sources.map((source) => {
        const from = folders.map((folder) => join(folder, source)).find((file) => existsSync(file)) ?? source
        const to = path(`${kind}-${basename(source)}.o`)
        const includes = ['-include', path('shipped.h'), ...folders.flatMap((folder) => ['-I', folder])]
        return { to, args: ['-O1', ...includes, '-c', '-o', to, from] }
      })
    const binaries = { true: objects('true', [native, machine]), broken: objects('broken', [mutated, native, machine]) }
    await all(Object.values(binaries).flat(), ({ args }) => compile(args))
    for (const [kind, list] of Object.entries(binaries)) {
      await compile(['-pthread', '-Wl,-z,now', '-o', path(kind), path('machine.o'), ...list.map(({ to }) => to)])
    }
  })
  after(() => {
    if (folder !== '') rmSync(folder, { recursive: true, force: true })
  })

  it(`keep every byte and wake every sleeper (${isLong ? 'long' : 'quick'} set)`, async function () {
    let states = 0
    let scenarios = 0
    await all(['0/2', '1/2'], async (part) => {
      const { code, text } = await run(path('true'), [isLong ? 'long' : 'quick', part], 3_500_000)
      assert.equal(code, 0, text)
      const end = /^ok, (\d+) scenarios, (\d+) states$/m.exec(text)
      assert.ok(end, text)
      if (isLong) process.stdout.write(text)
      scenarios += Number(end[1])
      states += Number(end[2])
    })
    assert.ok(isLong ? scenarios > 9_000 && states > 100_000_000 : scenarios > 250 && states > 5_000_000)
    if (this.test) this.test.title += `: ${scenarios} scenarios, ${states} states`
  })

  for (const [index, mutant] of mutants.entries()) {
    it(`would not if ${mutant.title}`, async function () {
      const args = mutant.scenario.split(' ')
      const whole = await run(path('true'), args, 60_000)
      assert.equal(whole.code, 0, whole.text)
      const { code, text } = await run(path('broken'), [...args, `mutant=${index + 1}`], 60_000)
      assert.equal(code, 1, `not caught: ${text}`)
      const [, violation = '', trace = ''] = /^violation: (.*)\n([^]*)$/m.exec(text) ?? []
      assert.match(violation, mutant.violation, text)
      const steps = trace.trimEnd().split('\n').length
      assert.ok(steps > 0 && steps < 120, text)
      if (this.test) this.test.title += `: ${violation.slice(0, 60)} (after ${steps} steps)`
    })
  }

  it('are used by the runner in the order that the scenarios repeat', () => {
    const read = (folder: string, file: string): string => readFileSync(join(folder, file), 'utf8')
    const runner = ['runner', 'lines', 'logits'].map((name) => read(native, `runner/${name}.cpp`)).join('')
    const scenarios = read(machine, 'scenarios.cpp')
    const calls = (text: string, start: RegExp): string[] => {
      assert.match(text, start)
      const from = text.indexOf('{\n', text.search(start))
      return Array.from(
        text
          .slice(from, text.indexOf('\n}\n', from))
          .matchAll(
            /communicator_->(Acquire|Publish|Await\w*|Consumed|PayloadOf)\(|(?<=[ (])(Exchange|CheckHashes|PayloadOf)\(|sequence_?(\+\+)|Slot(?:Of)?\((?:program_\.|me\.)?(rank|r|0),/g,
          ),
        ([, word, line, next]) => word ?? line ?? (next === undefined ? 'slot' : 'next'),
      )
    }
    for (const [name, expected] of [
      ['Broadcast', ['Acquire', 'next', 'slot', 'Publish', 'Consumed']],
      ['Receive', ['next', 'AwaitFrom', 'slot', 'Consumed']],
      ['Exchange', ['next', 'Publish', 'Await', 'PayloadOf']],
      ['Logits', ['slot', 'Exchange', 'CheckHashes', 'PayloadOf', 'slot']],
      ['RunStep', ['Acquire', 'Consumed']],
    ] as const) {
      assert.deepEqual(calls(runner, new RegExp(`^\\w+ Runner::${name}\\(`, 'm')), expected, `Runner::${name}`)
      assert.deepEqual(calls(scenarios, new RegExp(`\\w+ ${name}\\(Rank& me`)), expected, `${name} of the scenarios`)
    }
    // A step that decodes ahead is steps without a message.
    assert.match(runner, /for \(;;\) \{[^}]*RunStep\(result\)[^}]*if \(!FeedBack\(result\)\) return/)
  })
})
