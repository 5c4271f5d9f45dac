// tp-launch as a user meets it: real processes, more ranks than cores where needed.

import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { formatCpuList, planBinding, readTopology } from '../../launcher/index.js'
import { isAlive, launch, node, pause, run, start, survivors, tpLaunch } from './processes.js'

const many = (ranks: number): string[] => ['-n', String(ranks), '--oversubscribe']
const script = (text: string): string[] => [node, '-e', text]
const pidsIn = (text: string): number[] => [...text.matchAll(/pid=([0-9]+)/g)].map((match) => Number(match[1]))
const sleepForever = 'setInterval(() => {}, 1000)'

describe('tp-launch: starting', () => {
  it('gives every rank its place in the environment', async () => {
    const text = 'const e = process.env; console.log(JSON.stringify(e))'
    const { code, stdout } = await launch([...many(3), ...script(text)], {
      env: { KMP_AFFINITY: 'compact', FROM_OUTSIDE: 'kept\n=' },
    })
    assert.equal(code, 0)
    const ranks = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Record<string, string>)
    ranks.sort((a, b) => Number(a['RANK']) - Number(b['RANK']))
    assert.deepEqual(
      ranks.map((env) => env['RANK']),
      ['0', '1', '2'],
    )
    assert.equal(new Set(ranks.map((env) => env['TILERANK_JOB'])).size, 1)
    ranks.forEach((env, rank) => {
      assert.equal(env['LOCAL_RANK'], String(rank))
      for (const name of ['WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'LOCAL_SIZE']) assert.equal(env[name], '3', name)
      assert.match(env['TILERANK_JOB'] ?? '', /^[0-9a-f]{32}$/)
      assert.equal(env['MASTER_ADDR'], '127.0.0.1')
      assert.match(env['MASTER_PORT'] ?? '', /^[1-9][0-9]+$/)
      assert.match(env['TILERANK_CORES'] ?? '', /^[0-9]+$/)
      assert.equal(env['FROM_OUTSIDE'], 'kept\n=')
      assert.equal(env['KMP_AFFINITY'], undefined)
    })
  })

  it('hands each rank its own listening socket', async () => {
    const text = `
      const { readFileSync, readlinkSync } = require('node:fs')
      const { TILERANK_JOB, TILERANK_SOCKET_FD, RANK } = process.env
      const inode = /socket:.([0-9]+)/.exec(readlinkSync('/proc/self/fd/' + TILERANK_SOCKET_FD))[1]
      const line = readFileSync('/proc/net/unix', 'utf8').split('\\n').find((l) => l.includes(' ' + inode + ' '))
      console.log(RANK, line.trim().split(' ').at(-1) === '@tilerank/' + TILERANK_JOB + '/' + RANK)`
    const { code, stdout } = await launch([...many(2), ...script(text)])
    assert.equal(code, 0)
    assert.deepEqual(stdout.trim().split('\n').sort(), ['0 true', '1 true'])
  })

  it('passes arguments on byte for byte, and takes none of its own options from behind the command', async () => {
    const words = ['-n', '7', '--help', '', ' ', '$HOME', '`id`', '*', 'a\nb', '"\'\\', '--', 'é☃', 'x'.repeat(100_000)]
    const text = 'process.stdout.write(JSON.stringify(process.argv.slice(1)) + "\\n")'
    const { code, stdout } = await launch(['-n', '1', ...script(text), '--', ...words])
    assert.equal(code, 0)
    assert.deepEqual(JSON.parse(stdout), words)
  })

  it('binds each rank to its cores before its first thread exists', async () => {
    const topology = readTopology()
    const ranks = Math.min(2, topology.cores.length)
    const text = `
      const { readFileSync, readdirSync } = require('node:fs')
      const list = (file) => /^Cpus_allowed_list:\\s*(.*)$/m.exec(readFileSync(file, 'utf8'))[1]
      const threads = readdirSync('/proc/self/task').map((id) => list('/proc/self/task/' + id + '/status'))
      console.log(JSON.stringify({ rank: Number(process.env.RANK), cores: process.env.TILERANK_CORES, threads: [...new Set(threads)] }))`
    const { code, stdout } = await launch(['-n', String(ranks), ...script(text)])
    assert.equal(code, 0)
    const plan = planBinding({ ranks, topology })
    const seen = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as { rank: number })
    seen.sort((a, b) => a.rank - b.rank)
    const expected = plan.ranks.map(({ cores, cpus }, rank) => ({
      rank,
      cores: formatCpuList(cores),
      threads: [formatCpuList(cpus)],
    }))
    assert.deepEqual(seen, expected)
  })

  it('leaves ranks where they are when they are not to be bound', async () => {
    const { code, stdout } = await launch(['-n', '2', '--no-bind', 'grep', 'Cpus_allowed_list', '/proc/self/status'])
    assert.equal(code, 0)
    const own = /^Cpus_allowed_list.*$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[0]
    assert.deepEqual(stdout.trim().split('\n'), [own, own])
  })

  it('gives ranks process groups of their own in our session', async () => {
    const { code, stdout } = await launch([...many(2), 'sh', '-c', 'cut -d" " -f1,5,6 /proc/$$/stat'])
    assert.equal(code, 0)
    const own = readFileSync('/proc/self/stat', 'utf8')
    const session = own.slice(own.lastIndexOf(')') + 2).split(' ')[3]
    for (const line of stdout.trim().split('\n')) {
      const [pid, group, sid] = line.split(' ')
      assert.equal(pid, group)
      assert.equal(sid, session)
    }
  })

  it('runs scripts with this Node and gives rank 0 standard input', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tilerank-launch-'))
    try {
      writeFileSync(
        join(folder, 'rank.mjs'),
        'let text = ""; for await (const part of process.stdin) text += part; console.log(process.env.RANK, text, process.version)',
      )
      const { code, stdout } = await launch([...many(2), 'rank.mjs'], { cwd: folder, input: 'hello' })
      assert.equal(code, 0)
      assert.deepEqual(stdout.trim().split('\n').sort(), [`0 hello ${process.version}`, `1  ${process.version}`])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  it('starts 16 ranks on fewer cores', async () => {
    const { code, stdout } = await launch([...many(16), 'sh', '-c', 'echo $RANK'])
    assert.equal(code, 0)
    const ranks = stdout
      .trim()
      .split('\n')
      .map(Number)
      .sort((a, b) => a - b)
    assert.deepEqual(
      ranks,
      Array.from({ length: 16 }, (_, rank) => rank),
    )
  })

  it('starts one rank for each NUMA node when no number is given', async () => {
    const { code, stdout } = await launch(['--dry-run', '--json', 'x'])
    assert.equal(code, 0)
    const topology = readTopology()
    const { ranks } = JSON.parse(stdout) as { ranks: unknown[] }
    assert.equal(ranks.length, new Set(topology.cores.map((core) => core.node)).size)
  })
})

describe('tp-launch: ending', () => {
  it('exits as the rank that failed', async () => {
    for (const [text, code] of [
      ['process.exit(7)', 7],
      ['process.kill(process.pid, "SIGKILL")', 137],
      ['process.kill(process.pid, "SIGSEGV")', 139],
      ['throw new Error("no")', 1],
    ] as const) {
      const ended = await launch([
        ...many(2),
        ...script(`if (process.env.RANK === "1") { ${text} } else ${sleepForever}`),
      ])
      assert.equal(ended.code, code, text)
      assert.match(ended.stderr, /tp-launch: rank 1 of 2 \(pid [0-9]+\) failed first: (exit code|signal) /)
    }
  })

  it('reports the first failure with its last words, and not what followed from it', async () => {
    const text = `
      if (process.env.RANK === '2') { console.error('out of cheese'); process.exit(9) }
      process.on('SIGTERM', () => { console.error('then me'); process.exit(3) })
      ${sleepForever}`
    const { code, stderr } = await launch([...many(3), ...script(text)])
    assert.equal(code, 9)
    assert.match(stderr, /rank 2 of 3 .* failed first: exit code 9/)
    assert.match(stderr, /last lines of its standard error:\n {2}out of cheese\n/)
    assert.doesNotMatch(stderr, /rank [01] of 3/)
  })

  it('says where the ranks of a group stood when one was lost, and writes all of it where it is told to', async () => {
    const face = new URL('../../collectives/index.js', import.meta.url).href
    const folder = mkdtempSync(join(tmpdir(), 'tilerank-recorder-'))
    const file = join(folder, 'recorder.json')
    const text = `
      import(${JSON.stringify(face)}).then(async ({ createGroup }) => {
        const group = await createGroup()
        for (let i = 0; i < 2000; i++) group.barrierSync()
        if (group.rank === 1) process.kill(process.pid, 'SIGKILL')
        await group.allReduce(new Float32Array(100)).catch(() => {})
      })`
    for (const env of [{}, { TILERANK_RECORDER: file }]) {
      const { code, stderr } = await launch([...many(2), ...script(text)], { env })
      assert.equal(code, 137)
      assert.match(stderr, /the last operations of each rank:\n +rank +pid +sequence +operation/)
      assert.match(stderr, /\n +1 +[0-9]+ +2000 +barrier /)
      assert.equal(stderr.includes(file), 'TILERANK_RECORDER' in env)
    }
    const written = readFileSync(file, 'utf8')
    rmSync(folder, { recursive: true })
    const { ranks } = JSON.parse(written) as { ranks: { rank: number; rows: { sequence: number }[] }[] }
    assert.deepEqual(
      ranks.map(({ rank }) => rank),
      [0, 1],
    )
    const sequences = ranks[1]?.rows.map(({ sequence }) => sequence)
    assert.deepEqual(
      sequences,
      Array.from({ length: 1024 }, (_, i) => 977 + i),
    )
  })

  it('ends ranks that ignore the request together after the grace, not one after the other', async () => {
    const text = `process.on('SIGTERM', () => {}); console.log('pid=' + process.pid); ${sleepForever}`
    const started = start(node, [tpLaunch, ...many(4), '--grace', '1', ...script(text)])
    await started.saw(/(pid=[0-9]+\n){4}/)
    const begin = Date.now()
    started.child.kill('SIGTERM')
    const { code, stdout } = await started.ended
    assert.equal(code, 137)
    assert.ok(Date.now() - begin < 3500, `took ${Date.now() - begin} ms`)
    assert.deepEqual(pidsIn(stdout).filter(isAlive), [])
  })

  it('ends a stopped rank too', async () => {
    const started = start(node, [tpLaunch, ...many(2), ...script(`console.log('pid=' + process.pid); ${sleepForever}`)])
    await started.saw(/(pid=[0-9]+\n){2}/)
    const [first = 0] = pidsIn((await started.saw(/(pid=[0-9]+\n){2}/))[0])
    process.kill(first, 'SIGSTOP')
    started.child.kill('SIGTERM')
    const { code, elapsedMs } = await started.ended
    assert.equal(code, 143)
    assert.ok(elapsedMs < 8000)
  })

  it('leaves nothing behind when it is killed', async () => {
    const started = start(node, [tpLaunch, ...many(4), ...script(`console.log('pid=' + process.pid); ${sleepForever}`)])
    const [text] = await started.saw(/(pid=[0-9]+\n){4}/)
    const pids = pidsIn(text)
    assert.equal(pids.filter(isAlive).length, 4)
    started.child.kill('SIGKILL')
    assert.deepEqual(await survivors(pids, 2000), [])
  })

  it('ends what ranks have started, when one fails', async () => {
    const text = `
      sleep 1000 & echo pid=$!
      if [ $RANK = 1 ]; then sleep 0.5; exit 4; fi
      wait`
    const { code, stdout } = await launch([...many(2), 'sh', '-c', text])
    assert.equal(code, 4)
    const pids = pidsIn(stdout)
    assert.equal(pids.length, 2)
    assert.deepEqual(await survivors(pids, 3000), [])
  })

  it('passes interrupts on, and exits with 0 when all ranks end in order', async () => {
    const text = `process.on('SIGINT', () => { console.log('bye'); process.exit(0) }); console.log('ready'); ${sleepForever}`
    const started = start(node, [tpLaunch, ...many(2), ...script(text)])
    await started.saw(/ready\nready\n/)
    started.child.kill('SIGINT')
    const { code, stdout } = await started.ended
    assert.equal(code, 0)
    assert.equal(stdout, 'ready\nready\nbye\nbye\n')
  })

  it('exits as the signal that ended the ranks', async () => {
    for (const [signal, expected] of [
      ['SIGINT', 130],
      ['SIGTERM', 143],
      ['SIGHUP', 129],
    ] as const) {
      const started = start(node, [tpLaunch, ...many(2), ...script(`console.log('ready'); ${sleepForever}`)])
      await started.saw(/ready\nready\n/)
      started.child.kill(signal)
      assert.equal((await started.ended).code, expected, signal)
    }
  })

  it('ends at once at the second interrupt', async () => {
    const text = `process.on('SIGINT', () => console.log('not yet')); console.log('ready'); ${sleepForever}`
    const started = start(node, [tpLaunch, ...many(2), '--grace', '100', ...script(text)])
    await started.saw(/ready\nready\n/)
    started.child.kill('SIGINT')
    await started.saw(/not yet\nnot yet\n/)
    started.child.kill('SIGINT')
    assert.equal((await started.ended).code, 137)
  })

  it('lets one job go on when another is interrupted', async () => {
    const wait = `console.log('ready'); process.on('SIGTERM', () => process.exit(0)); ${sleepForever}`
    const jobs = [
      start(node, [tpLaunch, ...many(2), ...script(wait)]),
      start(node, [tpLaunch, ...many(2), ...script(wait)]),
    ] as const
    for (const job of jobs) await job.saw(/ready\nready\n/)
    jobs[0].child.kill('SIGINT')
    await jobs[0].ended
    await pause(200)
    assert.equal(jobs[1].child.exitCode, null)
    jobs[1].child.kill('SIGTERM')
    assert.equal((await jobs[1].ended).code, 0)
  })

  it('ends with its reader', async () => {
    const text = `setInterval(() => console.log('pid=' + process.pid), 1)`
    const ended = await run('sh', ['-c', '"$@" | head -n 1', 'sh', node, tpLaunch, ...many(2), ...script(text)])
    assert.equal(ended.code, 0)
    assert.equal(pidsIn(ended.stdout).length, 1)
    assert.deepEqual(await survivors(pidsIn(ended.stdout), 3000), [])
  })

  it('does not wait for a stranger who holds the output open', async () => {
    const { code, elapsedMs } = await launch([...many(2), 'sh', '-c', 'setsid sleep 5 & exit 0'])
    assert.equal(code, 0)
    assert.ok(elapsedMs < 4500, `took ${elapsedMs} ms`)
  })
})

describe('tp-launch: output', () => {
  it('keeps lines whole, whatever pieces they come in', async () => {
    const text = `
      const rank = process.env.RANK
      for (let i = 0; i < 200; i++) {
        const line = rank.repeat(50 + i) + ';' + i + '\\n'
        process.stdout.write(line.slice(0, 20)); process.stdout.write(line.slice(20))
      }`
    const { code, stdout } = await launch([...many(4), ...script(text)])
    assert.equal(code, 0)
    const lines = stdout.trimEnd().split('\n')
    assert.equal(lines.length, 800)
    const next = [0, 0, 0, 0]
    for (const line of lines) {
      const rank = Number(line[0])
      const i = next[rank] ?? -1
      assert.equal(line, `${String(rank).repeat(50 + i)};${i}`)
      next[rank] = i + 1
    }
  })

  it('shows text of one rank as it comes, before its line ends', async () => {
    const text = `if (process.env.RANK === '0') process.stdout.write('begun '); ${sleepForever}`
    const started = start(node, [tpLaunch, ...many(2), ...script(text)])
    await started.saw(/^begun $/)
    started.child.kill('SIGTERM')
    assert.equal((await started.ended).code, 143)
  })

  it('tags lines with their rank when asked', async () => {
    const { stdout, stderr } = await launch([
      ...many(2),
      '--tag-output',
      'sh',
      '-c',
      'echo out; printf tail; echo err >&2',
    ])
    assert.deepEqual(stdout.trim().split('\n').sort(), ['[0] out', '[0] tail', '[1] out', '[1] tail'])
    const tagged = stderr.split('\n').filter((line) => line.startsWith('['))
    assert.deepEqual(tagged.sort(), ['[0] err', '[1] err'])
  })

  it('carries a lot without loss, binary bytes and a last line without an end too', async () => {
    const text = `
      const chunk = Buffer.alloc(1 << 16, 0xfe)
      if (process.env.RANK === '0') { for (let i = 0; i < 128; i++) process.stdout.write(chunk) }`
    const started = start(node, [tpLaunch, ...many(2), ...script(text)])
    let bytes = 0
    started.child.stdout?.setEncoding('latin1').on('data', (part: string) => (bytes += part.length))
    const { code } = await started.ended
    assert.equal(code, 0)
    assert.equal(bytes, 128 << 16)
  })
})

describe('tp-launch: mistakes', () => {
  const refused = async (args: readonly string[], text: RegExp, code = 2): Promise<void> => {
    const ended = await launch(args)
    assert.equal(ended.code, code, `${args.join(' ')}: ${ended.stderr}`)
    assert.match(ended.stderr, text)
    assert.equal(ended.stdout, '')
  }

  it('names what is wrong with the command line', async () => {
    await refused([], /no command given.*--help/)
    await refused(['-n', '2'], /no command given/)
    await refused(['-n', '0', 'true'], /must be positive, not '0'/)
    await refused(['-n', '-1', 'true'], /must be positive, not '-1'/)
    await refused(['-n', 'two', 'true'], /must be positive, not 'two'/)
    await refused(['-n'], /-n needs a value/)
    await refused(['-n', '1', '-n', '2', 'true'], /given twice/)
    await refused(['--bind', 'true'], /unknown option '--bind'/)
    await refused(['--dry-run=yes', 'true'], /unknown option/)
    await refused(['--no-bind', '--cores', '0', 'true'], /contradict/)
    await refused(['--json', 'true'], /--json belongs to --dry-run/)
    await refused(['-n', '1', ''], /the command is empty/)
    await refused(['--cores', 'zero', 'true'], /'zero' is no list of cores/)
    await refused(['--cores', '65000', 'true'], /core 65000 is not online/)
    await refused(['-n', '5000', 'true'], /ERR_TOO_FEW_CORES/)
  })

  it('reports a command that does not exist or cannot be run', async () => {
    const missing = await launch(['-n', '1', 'no-such-command-anywhere'])
    assert.equal(missing.code, 127)
    assert.match(missing.stderr, /no-such-command-anywhere/)
    const folder = await launch(['-n', '1', '/tmp'])
    assert.equal(folder.code, 126)
  })

  it('names the version and explains itself', async () => {
    const help = await launch(['--help'])
    assert.equal(help.code, 0)
    assert.match(help.stdout, /Usage: tp-launch/)
    assert.match((await launch(['--version'])).stdout, /^[0-9]+\.[0-9]+\.[0-9]+/)
  })

  it('prints the plan without starting anything', async () => {
    const { code, stdout } = await launch(['-n', '1', '--dry-run', 'no-such-command', 'a b'])
    assert.equal(code, 0)
    assert.match(stdout, /^rank 0: cores [0-9,-]+ \([0-9]+\), processors /)
    assert.match(stdout, /command: "no-such-command" "a b"/)
  })
})
