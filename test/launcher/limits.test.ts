// Limits around a process, read from fixtures and met in earnest: cgroups, setrlimit, sandboxes, process 1 of a container.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { LauncherError, execHelper, filesBelow, planBinding, readTopology } from '../../launcher/index.js'
import { nativeAddon, packageRoot } from '../../native/index.js'
import { buildSandbox, noCgroup, noCompiler, withCgroup, type Prefix } from './confine.js'
import { unavailable } from '../unavailable.js'
import { node, pause, run, start, survivors, tpLaunch } from './processes.js'

const mib = 2 ** 20
const version2 = (root = '/') => `31 23 0:28 ${root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n`
const version1 = (controllers: string, root = '/', at = `/sys/fs/cgroup/${controllers}`) =>
  `32 31 0:29 ${root} ${at} rw shared:9 - cgroup cgroup rw,${controllers}\n`
const meminfo = 'MemTotal: 8388608 kB\nMemFree: 1000 kB\nMemAvailable: 4194304 kB\n'

interface Fixture {
  readonly files: Readonly<Record<string, string>>
  readonly available: number
  readonly file: string
  readonly cpu?: number
  readonly memory?: number
}

const fixtures: Readonly<Record<string, Fixture>> = {
  'no cgroups at all': { files: {}, available: 4096 * mib, file: '/proc/meminfo (MemAvailable)' },
  'limits at every height of a version 2 tree, the middle one the tightest': {
    files: {
      'proc/self/mountinfo': version2(),
      'proc/self/cgroup': '0::/a/b/c\n',
      'sys/fs/cgroup/a/memory.max': String(900 * mib),
      'sys/fs/cgroup/a/memory.current': String(100 * mib),
      'sys/fs/cgroup/a/b/memory.max': String(500 * mib),
      'sys/fs/cgroup/a/b/memory.current': String(50 * mib),
      'sys/fs/cgroup/a/b/c/memory.max': 'max',
      'sys/fs/cgroup/a/cpu.max': '150000 100000',
      'sys/fs/cgroup/a/b/cpu.max': 'max 100000',
      'sys/fs/cgroup/a/b/c/cpu.max': '1600000 200000',
    },
    available: 450 * mib,
    file: '/sys/fs/cgroup/a/b/memory.max',
    cpu: 1.5,
    memory: 500 * mib,
  },
  'a group above that is full though its own limit is larger': {
    files: {
      'proc/self/mountinfo': version2(),
      'proc/self/cgroup': '0::/a/b\n',
      'sys/fs/cgroup/a/memory.max': String(900 * mib),
      'sys/fs/cgroup/a/memory.current': String(890 * mib),
      'sys/fs/cgroup/a/b/memory.max': String(500 * mib),
      'sys/fs/cgroup/a/b/memory.current': String(50 * mib),
    },
    available: 10 * mib,
    file: '/sys/fs/cgroup/a/memory.max',
    memory: 500 * mib,
  },
  'usage that is mostly files which were read: they make room': {
    files: {
      'proc/self/mountinfo': version2(),
      'proc/self/cgroup': '0::/a\n',
      'sys/fs/cgroup/a/memory.max': String(1000 * mib),
      'sys/fs/cgroup/a/memory.current': String(990 * mib),
      'sys/fs/cgroup/a/memory.stat': `anon 5\nfile 7\ninactive_file ${600 * mib}\nactive_file ${300 * mib}\nslab 3\n`,
    },
    available: 910 * mib,
    file: '/sys/fs/cgroup/a/memory.max',
    memory: 1000 * mib,
  },
  'a limit that throttles below the one that kills': {
    files: {
      'proc/self/mountinfo': version2(),
      'proc/self/cgroup': '0::/\n',
      'sys/fs/cgroup/memory.max': String(1000 * mib),
      'sys/fs/cgroup/memory.high': String(300 * mib),
      'sys/fs/cgroup/memory.current': String(100 * mib),
    },
    available: 200 * mib,
    file: '/sys/fs/cgroup/memory.high',
    memory: 300 * mib,
  },
  'a container that sees only its own part of the tree': {
    files: {
      'proc/self/mountinfo': version2('/docker/box'),
      'proc/self/cgroup': '0::/docker/box/inner\n',
      'sys/fs/cgroup/inner/memory.max': String(64 * mib),
      'sys/fs/cgroup/memory.max': String(80 * mib),
      'sys/fs/cgroup/docker/box/memory.max': '1',
    },
    available: 64 * mib,
    file: '/sys/fs/cgroup/inner/memory.max',
    memory: 64 * mib,
  },
  'a process outside of the part that is mounted': {
    files: {
      'proc/self/mountinfo': version2() + version1('memory', '/docker/box'),
      'proc/self/cgroup': '4:memory:/docker/other\n0::/../up\n',
      'sys/fs/cgroup/memory.max': String(70 * mib),
      'sys/fs/cgroup/memory/memory.limit_in_bytes': String(90 * mib),
    },
    available: 70 * mib,
    file: '/sys/fs/cgroup/memory.max',
    memory: 70 * mib,
  },
  'version 1, hierarchical counts, "no limit" as a number': {
    files: {
      'proc/self/mountinfo': version1('cpu,cpuacct', '/', '/sys/fs/cgroup/cpuacct,cpu') + version1('memory'),
      'proc/self/cgroup': '5:cpu,cpuacct:/x\n4:memory:/x/y\n',
      'sys/fs/cgroup/cpuacct,cpu/x/cpu.cfs_quota_us': '250000',
      'sys/fs/cgroup/cpuacct,cpu/x/cpu.cfs_period_us': '100000',
      'sys/fs/cgroup/cpuacct,cpu/cpu.cfs_quota_us': '-1',
      'sys/fs/cgroup/cpuacct,cpu/cpu.cfs_period_us': '100000',
      'sys/fs/cgroup/memory/x/y/memory.limit_in_bytes': '9223372036854771712',
      'sys/fs/cgroup/memory/x/memory.limit_in_bytes': String(512 * mib),
      'sys/fs/cgroup/memory/x/memory.usage_in_bytes': String(500 * mib),
      'sys/fs/cgroup/memory/x/memory.stat': `inactive_file 1\ntotal_inactive_file ${100 * mib}\ntotal_active_file ${8 * mib}\n`,
    },
    available: 120 * mib,
    file: '/sys/fs/cgroup/memory/x/memory.limit_in_bytes',
    cpu: 2.5,
    memory: 512 * mib,
  },
  'mounts at unusual places, with a blank in their name, and usage beyond the limit': {
    files: {
      'proc/self/mountinfo': '31 23 0:28 / /run/my\\040groups rw - cgroup2 none rw\n',
      'proc/self/cgroup': '0::/\n',
      'run/my groups/memory.max': String(10 * mib),
      'run/my groups/memory.current': String(11 * mib),
    },
    available: 0,
    file: '/run/my groups/memory.max',
    memory: 10 * mib,
  },
}

interface Available {
  readonly bytes: number
  readonly file: string
}
const nativeAvailable = (root: string): Available =>
  (nativeAddon() as { availableMemory(root: string): Available }).availableMemory(root)

describe('limits: what surrounds this process', () => {
  let root = ''
  beforeEach(() => (root = mkdtempSync(join(tmpdir(), 'tilerank-limits-'))))
  afterEach(() => {
    rmSync(root, { recursive: true, force: true })
  })
  const write = (files: Readonly<Record<string, string>>): void => {
    for (const [path, text] of Object.entries({ 'proc/meminfo': meminfo, ...files })) {
      mkdirSync(join(root, dirname(path)), { recursive: true })
      writeFileSync(join(root, path), text)
    }
  }

  for (const [name, { files, available, file, cpu, memory }] of Object.entries(fixtures)) {
    it(`reads ${name}; the launcher and the addon alike`, () => {
      write(files)
      const topology = readTopology(filesBelow(root))
      assert.deepEqual(
        [
          topology.memoryAvailableBytes,
          topology.decidedBy.memoryAvailable,
          topology.cpuLimit,
          topology.memoryLimitBytes,
        ],
        [available, file, cpu, memory],
      )
      const seen = nativeAvailable(root)
      assert.deepEqual([seen.bytes, seen.file.replace(root, '')], [available, file])
    })
  }

  it('reads the limits of the process, and what it has used of them', () => {
    write({
      'proc/self/limits':
        'Limit                     Soft Limit           Hard Limit           Units     \n' +
        'Max data size             unlimited            unlimited            bytes     \n' +
        'Max open files            64                   4096                 files     \n' +
        'Max address space         1073741824           unlimited            bytes     \n',
      'proc/self/status': 'Name:\tnode\nVmPeak:\t  999999 kB\nVmSize:\t  524288 kB\nVmData:\t  1024 kB\n',
    })
    const { processLimits } = readTopology(filesBelow(root))
    assert.deepEqual(processLimits, {
      addressSpaceBytes: 1024 * mib,
      addressSpaceLeft: 512 * mib,
      dataBytes: Infinity,
      dataLeft: Infinity,
      openFiles: 64,
    })
  })

  it('lets named cores use no more time than the cgroup gives, on both sides of the limit', () => {
    const quota = (processors: number) => {
      write({
        'proc/self/mountinfo': version2(),
        'proc/self/cgroup': '0::/\n',
        'proc/self/status': 'Cpus_allowed_list:\t0-7\n',
        'sys/devices/system/cpu/online': '0-7',
        'sys/fs/cgroup/cpu.max': `${processors * 100_000} 100000`,
      })
      return readTopology(filesBelow(root))
    }
    const plan = (processors: number, oversubscribe = false) =>
      planBinding({ ranks: 2, topology: quota(processors), coreList: '0-3', oversubscribe })
    assert.deepEqual([plan(4).isOversubscribed, plan(3.96).isOversubscribed, plan(8).notes], [false, false, []])
    assert.throws(
      () => plan(3.9),
      (error) =>
        error instanceof LauncherError &&
        error.code === 'ERR_TOO_FEW_CORES' &&
        /4 threads, and \/sys\/fs\/cgroup\/cpu.max allows 3.9 processors.*--oversubscribe/.test(error.message),
    )
    const shared = plan(2, true)
    assert.equal(shared.isOversubscribed, true)
    assert.match(shared.notes.join(), /4 threads share it/)
    // A quota below one processor still leaves one thread.
    assert.deepEqual(planBinding({ ranks: 1, topology: quota(0.5) }).ranks[0]?.cores, [0])
  })
})

describe('limits: in earnest', function () {
  this.timeout(60_000)
  const launched = (prefix: Prefix, words: readonly string[]) => {
    const [command = node, ...rest] = [...prefix, node, tpLaunch, ...words]
    return run(command, rest)
  }

  it('starts no more ranks than the quota of a real cgroup allows, unless they may share', async function () {
    const limits = {
      version1: { 'cpu.cfs_period_us': 100_000, 'cpu.cfs_quota_us': 100_000 },
      version2: { 'cpu.max': '100000 100000' },
    }
    const isDone = await withCgroup('cpu', limits, async (prefix, folder) => {
      const refused = await launched(prefix, ['-n', '2', 'true'])
      assert.equal(refused.code, 2)
      assert.ok(refused.stderr.includes(`${folder}/cpu.`) && refused.stderr.includes('allows 1 processors'))
      assert.equal((await launched(prefix, ['-n', '1', 'true'])).code, 0)
      assert.equal((await launched(prefix, ['-n', '2', '--oversubscribe', 'true'])).code, 0)
      const doctor = await run(prefix[0] ?? '', [
        ...prefix.slice(1),
        node,
        join(dirname(tpLaunch), '../cli/main.js'),
        'doctor',
      ])
      assert.match(doctor.stdout, /cpu limit +1 processors \(.*tilerank-test/)
    })
    if (!isDone) unavailable(this, noCgroup)
  })

  it('says once that a sandbox refuses binding, and works', async function () {
    const sandbox = buildSandbox()
    if (sandbox === undefined) return unavailable(this, noCompiler)
    try {
      const { deny } = sandbox
      const unbound = await launched(deny('sched_setaffinity'), ['-n', '2', '--oversubscribe', 'sh', '-c', 'echo ran'])
      assert.deepEqual([unbound.code, unbound.stdout], [0, 'ran\nran\n'])
      assert.equal(unbound.stderr.match(/not bound to processors \(sched_setaffinity: .*seccomp profile/g)?.length, 1)
      const helper = execHelper()
      const policy = (what: Parameters<typeof deny>, rank: string, nodes: string) =>
        spawnSync(
          'sh',
          ['-c', 'exec "$@"', 'sh', ...deny(...what), 'sh', '-c', `"$0" $$ - ${nodes} -- echo ran`, helper],
          {
            encoding: 'utf8',
            env: { ...process.env, RANK: rank },
          },
        )
      const first = policy(['set_mempolicy'], '0', '0')
      assert.deepEqual([first.status, first.stdout], [0, 'ran\n'])
      assert.match(first.stderr, /^tilerank-exec: memory is not bound .*CAP_SYS_NICE.*\n$/)
      for (const quiet of [policy(['set_mempolicy'], '1', '0'), policy([], '0', '-')])
        assert.deepEqual([quiet.status, quiet.stdout, quiet.stderr], [0, 'ran\n', ''])
      const doctor = await run(deny('sched_setaffinity', 'set_mempolicy')[0] ?? '', [
        ...deny('sched_setaffinity', 'set_mempolicy').slice(1),
        node,
        join(dirname(tpLaunch), '../cli/main.js'),
        'doctor',
      ])
      assert.match(doctor.stdout, /binding +threads to cores refused, memory to nodes refused/)
      assert.match(doctor.stdout, /warning: threads cannot be bound to cores: .*not permitted\n +to mend: allow sched_/)
    } finally {
      sandbox.end()
    }
  })

  describe('as process 1 of a container', () => {
    const unshare = ['--pid', '--fork', '--mount-proc', '--kill-child', node, tpLaunch]
    before(function () {
      if (spawnSync('unshare', ['--pid', '--fork', '--mount-proc', 'true']).status !== 0)
        unavailable(this, 'no new process namespace: needs root and unshare of util-linux')
    })
    /** Process 1 as it is called out here. */
    const insideOf = async (outside: number): Promise<number> => {
      for (;;) {
        const [pid] = readFileSync(`/proc/${outside}/task/${outside}/children`, 'utf8').split(' ').filter(Boolean)
        if (pid !== undefined && readFileSync(`/proc/${pid}/comm`, 'utf8').trim() !== 'unshare') return Number(pid)
        await pause(10)
      }
    }
    /** All that descends from a process. */
    const below = (pid: number): number[] =>
      readdirSync(`/proc/${pid}/task`)
        .flatMap((task) => readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').split(' ').filter(Boolean))
        .map(Number)
        .flatMap((child) => [child, ...below(child)])

    it('ends everything when it is asked to', async () => {
      const text = `console.log('ready', process.pid); setInterval(() => {}, 1000)`
      const started = start('unshare', [...unshare, '-n', '2', '--oversubscribe', node, '-e', text])
      await started.saw(/(ready \d+\n){2}/)
      const inside = await insideOf(started.child.pid ?? 0)
      const all = [inside, ...below(inside)]
      assert.equal(all.length, 3)
      process.kill(inside, 'SIGTERM')
      const { code } = await started.ended
      assert.equal(code, 143)
      assert.deepEqual(await survivors(all, 2000), [])
    })

    it('ends a generation and its ranks', async () => {
      const model = join(packageRoot, 'models/demo-stories')
      const words = ['generate', '--model', model, '--prompt', 'Once', '--tp', '2', '--quiet', '--ignore-eos']
      const started = start('unshare', [...unshare.slice(0, -1), join(dirname(tpLaunch), '../cli/main.js'), ...words])
      await started.saw(/Once upon/)
      const inside = await insideOf(started.child.pid ?? 0)
      const all = [inside, ...below(inside)]
      assert.equal(all.length, 3)
      process.kill(inside, 'SIGTERM')
      assert.equal((await started.ended).code, 130)
      assert.deepEqual(await survivors(all, 2000), [])
    })

    it('does not lose a request that comes before its ranks stand', async () => {
      const folder = mkdtempSync(join(tmpdir(), 'tilerank-early-'))
      const early = join(folder, 'early.cjs')
      // The request comes in the middle of starting the first rank.
      writeFileSync(
        early,
        `const processes = require('node:child_process')
         const { spawn } = processes
         processes.spawn = (...words) => { process.kill(process.pid, 'SIGTERM'); return spawn(...words) }
         require('node:module').syncBuiltinESMExports()`,
      )
      try {
        const words = ['--pid', '--fork', '--mount-proc', '--kill-child', node, '--require', early, tpLaunch]
        const { code } = await run('unshare', [...words, '-n', '2', '--oversubscribe', 'sleep', '10'])
        assert.equal(code, 143)
      } finally {
        rmSync(folder, { recursive: true })
      }
    })

    it('keeps no orphan in its list when one ends', async () => {
      const text = `(setsid sh -c 'sleep 0.2; exit' &); sleep 1; cat /proc/[0-9]*/stat | cut -d' ' -f2-4 | grep -c ' Z '`
      const { code, stdout } = await run('unshare', [...unshare, '-n', '1', 'sh', '-c', text])
      assert.deepEqual([code, stdout], [1, '0\n'], 'grep found no zombie')
    })
  })

  it('works where nothing can be written, home least of all', async function () {
    const script =
      'mount --make-rprivate / && mount -o remount,ro,bind / && { ! mountpoint -q /tmp || mount -o remount,ro,bind /tmp; } && ! touch /tmp/x "$HOME/x" 2>/dev/null && exec "$@"'
    const readOnly = ['unshare', ['--mount', 'sh', '-c', script, 'sh']] as const
    const env = { HOME: '/nowhere', XDG_CACHE_HOME: '/nowhere/cache' }
    if (spawnSync(readOnly[0], [...readOnly[1], 'true'], { env: { ...process.env, ...env } }).status !== 0)
      return unavailable(this, 'no read-only mounts: needs root and unshare of util-linux')
    const words = ['-n', '2', '--oversubscribe', node, '-e', 'console.log(1)']
    const { code, stdout } = await run(readOnly[0], [...readOnly[1], node, tpLaunch, ...words], { env })
    assert.deepEqual([code, stdout], [0, '1\n1\n'])
    const model = join(packageRoot, 'models/demo-stories')
    const story = ['generate', '--model', model, '--prompt', 'Once', '--tp', '2', '--max-new-tokens', '2', '--quiet']
    const told = await run(readOnly[0], [...readOnly[1], node, join(dirname(tpLaunch), '../cli/main.js'), ...story], {
      env,
    })
    assert.deepEqual([told.code, told.stderr], [0, ''])
  })
})

describe('limits: a group', function () {
  this.timeout(60_000)

  it('gives slots that the memory allows, and refuses those it does not with the numbers', async function () {
    const limits = { version1: { 'memory.limit_in_bytes': 256 * mib }, version2: { 'memory.max': String(256 * mib) } }
    const face = new URL('../../collectives/index.js', import.meta.url).href
    const text = (slotMib: number) => `
      import { createGroup } from ${JSON.stringify(face)}
      try {
        const group = await createGroup({ slotBytes: ${slotMib} * 2 ** 20, timeoutMs: 20000 })
        await group.barrier()
        await group.close()
        console.log('made')
      } catch ({ code, message }) { console.log(code, message) }`
    const isDone = await withCgroup('memory', limits, async (prefix) => {
      const [command = '', ...rest] = prefix
      const made = (slotMib: number) =>
        run(command, [
          ...rest,
          node,
          tpLaunch,
          '-n',
          '2',
          '--oversubscribe',
          node,
          '--input-type=module',
          '-e',
          text(slotMib),
        ])
      assert.equal((await made(8)).stdout, 'made\nmade\n')
      const refused = await made(200)
      assert.match(
        refused.stdout,
        /ERR_NO_MEMORY the communicator of rank \d needs 400\.\d MiB .*memory\.(max|limit_in_bytes) leaves \d+\.\d MiB.*raise the limit/,
      )
    })
    if (!isDone) unavailable(this, noCgroup)
  })

  it('tells what the addon of this machine sees', () => {
    const { bytes, file } = nativeAvailable('')
    const { memoryAvailableBytes, decidedBy } = readTopology()
    assert.equal(file, decidedBy.memoryAvailable)
    assert.ok(Math.abs(bytes - memoryAvailableBytes) < 2 ** 30)
  })
})
