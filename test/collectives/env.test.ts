import assert from 'node:assert/strict'
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { defaultTimeoutMs, readRankEnvironment, type RankEnvironment } from '../../collectives/index.js'

type Variables = Record<string, string | undefined>

const job = '0123456789abcdef0123456789abcdef'
const whole = {
  RANK: '1',
  WORLD_SIZE: '2',
  LOCAL_RANK: '1',
  LOCAL_WORLD_SIZE: '2',
  LOCAL_SIZE: '2',
  MASTER_ADDR: 'localhost',
  MASTER_PORT: '29500',
  TILERANK_JOB: job,
  TILERANK_SOCKET_FD: '5',
}

// What the launchers set, all that speaks of the job: dumps of Open MPI, MPICH and Slurm 22.05 (its numbers made larger), torchrun's after its
// documentation.

const torchrun = {
  RANK: '1',
  WORLD_SIZE: '2',
  LOCAL_RANK: '1',
  LOCAL_WORLD_SIZE: '2',
  GROUP_RANK: '0',
  GROUP_WORLD_SIZE: '1',
  ROLE_RANK: '1',
  ROLE_WORLD_SIZE: '2',
  ROLE_NAME: 'default',
  MASTER_ADDR: 'localhost',
  MASTER_PORT: '29400',
  TORCHELASTIC_RESTART_COUNT: '0',
  TORCHELASTIC_MAX_RESTARTS: '0',
  TORCHELASTIC_RUN_ID: 'none',
  TORCHELASTIC_USE_AGENT_STORE: 'True',
}

/** Open MPI 4.1.4: mpirun -n 3 */
const openmpi4 = {
  OMPI_APP_CTX_NUM_PROCS: '3',
  OMPI_COMM_WORLD_LOCAL_RANK: '1',
  OMPI_COMM_WORLD_LOCAL_SIZE: '3',
  OMPI_COMM_WORLD_NODE_RANK: '1',
  OMPI_COMM_WORLD_RANK: '1',
  OMPI_COMM_WORLD_SIZE: '3',
  OMPI_MCA_ess_base_jobid: '1806106625',
  OMPI_MCA_ess_base_vpid: '1',
  OMPI_MCA_orte_ess_node_rank: '1',
  OMPI_MCA_orte_ess_num_procs: '3',
  OMPI_MCA_orte_hnp_uri: '1806106624.0;tcp://192.0.2.2:42975;tcp6://[fd00::2]:60939',
  OMPI_MCA_orte_num_nodes: '1',
  OMPI_UNIVERSE_SIZE: '2',
  PMIX_HOSTNAME: 'node0',
  PMIX_ID: '1806106625.1',
  PMIX_NAMESPACE: '1806106625',
  PMIX_RANK: '1',
  PMIX_SERVER_URI2: '1806106624.0;tcp4://127.0.0.1:46815',
  PMIX_SERVER_URI41: '1806106624.0;tcp4://127.0.0.1:46815',
}

/** MPICH 4.0.2: mpiexec -n 3 */
const mpich = {
  GFORTRAN_UNBUFFERED_PRECONNECTED: 'y',
  HYDI_CONTROL_FD: '7',
  MPIR_CVAR_CH3_INTERFACE_HOSTNAME: 'node0',
  MPI_LOCALNRANKS: '3',
  MPI_LOCALRANKID: '1',
  PMI_FD: '8',
  PMI_RANK: '1',
  PMI_SIZE: '3',
}

/** srun -N 3 -n 11, the second task of the second node */
const srun = {
  SLURM_CLUSTER_NAME: 'cluster',
  SLURM_GTIDS: '4,5,6,7',
  SLURM_JOB_ID: '200505',
  SLURM_JOB_NODELIST: 'n[08-11]',
  SLURM_LOCALID: '1',
  SLURM_NNODES: '3',
  SLURM_NODEID: '1',
  SLURM_NTASKS: '11',
  SLURM_PROCID: '5',
  SLURM_STEP_ID: '2',
  SLURM_STEP_NODELIST: 'n[08-10]',
  SLURM_STEP_NUM_NODES: '3',
  SLURM_STEP_NUM_TASKS: '11',
  SLURM_STEP_TASKS_PER_NODE: '4(x2),3',
  SLURM_TASKS_PER_NODE: '4(x2),3',
}

/** srun -n 3 on one node */
const srunHere = {
  ...srun,
  SLURM_LOCALID: '2',
  SLURM_NNODES: '1',
  SLURM_NODEID: '0',
  SLURM_NTASKS: '3',
  SLURM_PROCID: '2',
  SLURM_STEP_NODELIST: 'n08',
  SLURM_STEP_NUM_NODES: '1',
  SLURM_STEP_NUM_TASKS: '3',
  SLURM_STEP_TASKS_PER_NODE: '3',
  SLURM_TASKS_PER_NODE: '3',
}

/** The script of sbatch -N 4 --ntasks-per-node 1 */
const sbatch = {
  SLURM_JOB_ID: '200505',
  SLURM_JOB_NODELIST: 'n[08-11]',
  SLURM_LOCALID: '0',
  SLURM_NNODES: '4',
  SLURM_NODEID: '0',
  SLURM_NTASKS: '4',
  SLURM_PROCID: '0',
  SLURM_TASKS_PER_NODE: '1(x4)',
}

/** A shell of salloc -n 8 where it is a step of its own */
const salloc = {
  ...sbatch,
  SLURM_NNODES: '1',
  SLURM_NTASKS: '8',
  SLURM_TASKS_PER_NODE: '8',
  SLURM_STEP_ID: '4294967290',
  SLURM_STEP_NODELIST: 'n08',
  SLURM_STEP_NUM_NODES: '1',
  SLURM_STEP_NUM_TASKS: '1',
  SLURM_STEP_TASKS_PER_NODE: '1',
}

function refused(env: Variables, ...variables: readonly string[]): void {
  assert.throws(
    () => readRankEnvironment(env),
    (error: Error & { code?: string; variables?: readonly string[] }) => {
      assert.equal(error.code, 'ERR_ENVIRONMENT', error.message)
      for (const variable of variables) {
        assert.ok(error.variables?.includes(variable), `${error.message} names ${variable}`)
        assert.match(error.message, new RegExp(variable))
      }
      return true
    },
  )
}

/** Nothing of the nonce, which has tests of its own. */
function place(env: Variables): Partial<RankEnvironment> | undefined {
  const read = readRankEnvironment({ TILERANK_JOB: job, ...env })
  if (read === undefined) return undefined
  const { source, rank, worldSize, localRank, localSize, store } = read
  return { source, rank, worldSize, localRank, localSize, store }
}

describe('the variables of a rank', () => {
  it('make a process without any of them a group of one', () => {
    assert.equal(readRankEnvironment({}), undefined)
    assert.equal(readRankEnvironment({ MASTER_ADDR: 'a', MASTER_PORT: '1', TILERANK_TIMEOUT_MS: '5' }), undefined)
    assert.equal(readRankEnvironment({ RANK: '', WORLD_SIZE: '' }), undefined)
    assert.equal(readRankEnvironment({ NODE_RANK: '3', MPI_LOCALRANKID: '1', MPI_LOCALNRANKS: '2' }), undefined)
  })

  it('are read', () => {
    assert.deepEqual(readRankEnvironment(whole), {
      source: 'tp-launch',
      rank: 1,
      worldSize: 2,
      localRank: 1,
      localSize: 2,
      job,
      socketFd: 5,
      store: undefined,
    })
    const few = readRankEnvironment({ RANK: '0', WORLD_SIZE: '3', TILERANK_JOB: job })
    assert.deepEqual(few, {
      source: 'tp-launch',
      rank: 0,
      worldSize: 3,
      localRank: 0,
      localSize: 3,
      job,
      socketFd: -1,
      store: undefined,
    })
    assert.equal(readRankEnvironment({ RANK: '0', WORLD_SIZE: '1' })?.worldSize, 1)
  })

  const one = { rank: 1, worldSize: 3, localRank: 1, localSize: 3, store: undefined }
  for (const [launcher, env, expected] of [
    ['torchrun', torchrun, { ...one, source: 'torchrun', worldSize: 2, localSize: 2 }],
    ['Open MPI', openmpi4, { ...one, source: 'openmpi' }],
    ['MPICH', mpich, { ...one, source: 'pmi' }],
    ['a PMI that says no more', { PMI_RANK: '1', PMI_SIZE: '3' }, { ...one, source: 'pmi' }],
    ['srun', srunHere, { ...one, source: 'slurm', rank: 2, localRank: 2 }],
    [
      'srun --mpi=pmi2',
      { ...srunHere, PMI_RANK: '2', PMI_SIZE: '3', PMI_FD: '9' },
      { ...one, source: 'pmi', rank: 2, localRank: 2 },
    ],
    [
      'srun --mpi=pmix',
      { ...srunHere, PMIX_RANK: '2', PMIX_NAMESPACE: 'slurm.pmix.200505.2' },
      { ...one, source: 'pmi', rank: 2, localRank: 2 },
    ],
  ] as const) {
    it(`are those of ${launcher}`, () => {
      const given = launcher === 'torchrun' ? readRankEnvironment(env)?.source : place(env)?.source
      assert.deepEqual({ ...place(env), source: given }, expected)
    })
  }

  it('tell of several nodes, whose ranks need not be neighbours', () => {
    const many = { OMPI_COMM_WORLD_SIZE: '6', OMPI_COMM_WORLD_RANK: '2', PMIX_RANK: '2' }
    assert.deepEqual(place({ ...openmpi4, ...many, TILERANK_STORE: '10.1.0.1:29600' }), {
      source: 'openmpi',
      rank: 2,
      worldSize: 6,
      localRank: 1,
      localSize: 3,
      store: '10.1.0.1:29600',
    })
    const slurm = { source: 'slurm', rank: 5, worldSize: 11, localRank: 1, localSize: 4, store: 'n08' } as const
    assert.deepEqual(place(srun), slurm)
    assert.deepEqual(place({ ...srun, MASTER_ADDR: 'a' }), { ...slurm, store: 'a' })
    assert.equal(place({ ...srun, SLURM_NODEID: '2', SLURM_LOCALID: '0' })?.localSize, 3)
    const elastic = { ...torchrun, WORLD_SIZE: '4', RANK: '2', LOCAL_RANK: '0', GROUP_RANK: '1', GROUP_WORLD_SIZE: '2' }
    assert.equal(place(elastic)?.store, 'localhost')
    assert.equal(place({ ...elastic, MASTER_ADDR: 'fd00::1' })?.store, '[fd00::1]')
    refused({ ...openmpi4, ...many }, 'TILERANK_STORE', 'OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_SIZE')
    refused({ ...openmpi4, ...many, OMPI_COMM_WORLD_LOCAL_RANK: '' }, 'OMPI_COMM_WORLD_LOCAL_RANK')
    // Where a store is named, ranks of one node find out there that they are.
    assert.equal(place({ RANK: '1', WORLD_SIZE: '2', NODE_RANK: '1', TILERANK_STORE: 'a:1' })?.localSize, 2)
    refused({ RANK: '1', WORLD_SIZE: '2', NODE_RANK: '1' }, 'LOCAL_WORLD_SIZE')
  })

  it('give the first host of a list', () => {
    for (const [list, first] of [
      ['n08', 'n08'],
      ['n[01-03,7],m2', 'n01'],
      ['n[7,01-03]-ib.x', 'n7-ib.x'],
      ['r[1-2]n[03-04],a', 'r1n03'],
      ['a,n[1-2]', 'a'],
      ['10.0.0.1,10.0.0.2', '10.0.0.1'],
    ] as const)
      assert.equal(place({ ...srun, SLURM_STEP_NODELIST: list })?.store, first)
    for (const list of ['n[1-2', 'n[]', ',a', 'n[1-a]', 'a b', '[[1]]', '$(id)'])
      refused({ ...srun, SLURM_STEP_NODELIST: list }, 'SLURM_STEP_NODELIST')
  })

  it('are refused when one is missing, which is named', () => {
    refused({ ...whole, RANK: undefined }, 'RANK')
    refused({ ...whole, WORLD_SIZE: undefined }, 'WORLD_SIZE')
    refused({ ...whole, TILERANK_JOB: undefined }, 'TILERANK_JOB')
    refused({ TILERANK_JOB: job }, 'WORLD_SIZE')
    refused({ LOCAL_RANK: '0' }, 'WORLD_SIZE')
    refused({ OMPI_COMM_WORLD_RANK: '0' }, 'OMPI_COMM_WORLD_SIZE')
    refused({ OMPI_COMM_WORLD_SIZE: '2' }, 'OMPI_COMM_WORLD_RANK')
    refused({ PMI_RANK: '0' }, 'PMI_SIZE')
    refused({ PMIX_RANK: '0' }, 'PMI_SIZE')
    refused({ ...srun, SLURM_STEP_TASKS_PER_NODE: undefined }, 'SLURM_STEP_TASKS_PER_NODE')
    refused({ ...srun, SLURM_NODEID: undefined }, 'SLURM_NODEID')
    refused({ ...srun, SLURM_LOCALID: undefined }, 'SLURM_LOCALID')
    refused({ ...srun, SLURM_STEP_NUM_TASKS: '', SLURM_NTASKS: '' }, 'SLURM_STEP_NUM_TASKS')
  })

  it('are refused when they contradict each other or are no numbers', () => {
    refused({ ...whole, RANK: '2' }, 'RANK', 'WORLD_SIZE')
    refused({ ...whole, LOCAL_SIZE: '1' }, 'LOCAL_SIZE', 'LOCAL_WORLD_SIZE')
    refused({ ...whole, LOCAL_RANK: '0' }, 'LOCAL_RANK', 'RANK')
    refused({ ...whole, LOCAL_RANK: '2' }, 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
    refused({ ...whole, LOCAL_WORLD_SIZE: '4', LOCAL_SIZE: '4' }, 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')
    refused({ ...whole, NODE_RANK: '1' }, 'NODE_RANK', 'LOCAL_WORLD_SIZE')
    refused({ ...whole, GROUP_RANK: '0', NODE_RANK: '1' }, 'GROUP_RANK', 'NODE_RANK')
    for (const text of ['-1', '1.5', 'one', '0x1', '99999999999', ' 1']) {
      refused({ ...whole, RANK: text }, 'RANK')
      refused({ ...openmpi4, OMPI_COMM_WORLD_RANK: text }, 'OMPI_COMM_WORLD_RANK')
      refused({ ...mpich, PMI_SIZE: text }, 'PMI_SIZE')
      refused({ ...srun, SLURM_PROCID: text }, 'SLURM_PROCID')
    }
    refused({ ...whole, TILERANK_JOB: job.toUpperCase() }, 'TILERANK_JOB')
    refused({ ...whole, TILERANK_SOCKET_FD: 'x' }, 'TILERANK_SOCKET_FD')
    refused({ ...whole, MASTER_PORT: '70000' }, 'MASTER_PORT')
    refused({ ...srun, SLURM_NODEID: '3' }, 'SLURM_NODEID', 'SLURM_STEP_TASKS_PER_NODE')
    refused({ ...srun, SLURM_STEP_NUM_TASKS: '12' }, 'SLURM_STEP_NUM_TASKS', 'SLURM_STEP_TASKS_PER_NODE')
    for (const text of ['4(x', '4x2', ',4', '4(x2)3', 'a', '-1', '4(x99999999999)', '4(x99)'])
      refused({ ...srun, SLURM_STEP_TASKS_PER_NODE: text }, 'SLURM_STEP_TASKS_PER_NODE')
  })

  it('of two launchers must agree: a process may have inherited those of another job', () => {
    const agreeing = { ...openmpi4, RANK: '1', WORLD_SIZE: '3' }
    assert.equal(place(agreeing)?.source, 'tp-launch')
    assert.equal(readRankEnvironment(agreeing)?.source, 'torchrun')
    // Names of one place beside another launcher's whole.
    assert.equal(place({ ...openmpi4, LOCAL_RANK: '1' })?.source, 'openmpi')
    refused({ ...openmpi4, LOCAL_RANK: '2' }, 'LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK')
    // A child of an MPI job starts one of its own, with another launcher or the same words.
    refused({ ...openmpi4, PMI_RANK: '0', PMI_SIZE: '3' }, 'OMPI_COMM_WORLD_RANK', 'PMI_RANK')
    refused({ ...openmpi4, PMI_RANK: '1', PMI_SIZE: '2' }, 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')
    refused({ ...torchrun, PMI_RANK: '0', PMI_SIZE: '2' }, 'RANK', 'PMI_RANK')
    refused({ ...whole, OMPI_COMM_WORLD_RANK: '0', OMPI_COMM_WORLD_SIZE: '1' }, 'WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE')
    refused({ ...mpich, PMIX_RANK: '0' }, 'PMI_RANK', 'PMIX_RANK')
    refused({ ...mpich, ...srunHere }, 'PMI_RANK', 'SLURM_PROCID')
    refused({ ...mpich, ...srun }, 'PMI_SIZE', 'SLURM_STEP_NUM_TASKS')
  })

  it('of a Slurm allocation, without a step, say nothing', () => {
    assert.equal(readRankEnvironment(sbatch), undefined)
    assert.equal(readRankEnvironment({ ...srun, SLURM_PROCID: undefined }), undefined)
    assert.deepEqual(place({ ...openmpi4, ...sbatch }), { ...one, source: 'openmpi' })
  })

  it('of a Slurm step of one task say something only where a nonce does too: it may be a shell', () => {
    assert.equal(readRankEnvironment(salloc), undefined)
    assert.equal(place(salloc)?.worldSize, 1)
    assert.deepEqual(place({ ...mpich, ...salloc }), { ...one, source: 'pmi' })
  })

  it('of a Slurm step of one task a node are those of the daemons that started the ranks', () => {
    const daemons = {
      ...srun,
      SLURM_NODEID: '2',
      SLURM_LOCALID: '0',
      SLURM_PROCID: '2',
      SLURM_NTASKS: '3',
      SLURM_STEP_NUM_TASKS: '3',
      SLURM_STEP_TASKS_PER_NODE: '1(x3)',
    }
    assert.equal(place(daemons)?.rank, 2)
    const inner = { ...torchrun, RANK: '5', WORLD_SIZE: '6', GROUP_RANK: '2' }
    assert.deepEqual(place({ ...inner, ...daemons }), {
      source: 'tp-launch',
      rank: 5,
      worldSize: 6,
      localRank: 1,
      localSize: 2,
      store: 'localhost',
    })
    refused({ ...inner, ...daemons, WORLD_SIZE: '3', RANK: '1', LOCAL_RANK: '0' }, 'RANK', 'SLURM_PROCID')
  })

  it('set the deadline', () => {
    assert.equal(defaultTimeoutMs({}), 60_000)
    assert.equal(defaultTimeoutMs({ TILERANK_TIMEOUT_MS: '1500' }), 1500)
    assert.throws(() => defaultTimeoutMs({ TILERANK_TIMEOUT_MS: '0' }), { code: 'ERR_ENVIRONMENT' })
  })
})

describe("a job's nonce without TILERANK_JOB", () => {
  const nonce = (env: Variables, proc?: string): string => readRankEnvironment(env, proc)?.job ?? ''

  const other = (env: Variables, rank: string): Variables =>
    Object.fromEntries(
      Object.entries(env).map(([name, value]) => [
        name,
        /(_|^)(RANK|LOCAL_RANK|NODE_RANK|PROCID|LOCALID|LOCALRANKID|vpid)$/.test(name) && name !== 'GROUP_RANK'
          ? rank
          : name === 'PMIX_ID'
            ? value?.replace(/\d$/, rank)
            : value,
      ]),
    )

  for (const [launcher, env, changes] of [
    ['torchrun', torchrun, ['MASTER_ADDR', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT']],
    ['Open MPI', openmpi4, ['PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid', 'OMPI_MCA_orte_hnp_uri', 'PMIX_SERVER_URI41']],
    ['srun', srunHere, ['SLURM_JOB_ID', 'SLURM_STEP_ID', 'SLURM_CLUSTER_NAME']],
  ] as const) {
    it(`is the same on all ranks of ${launcher}, and of no other job`, () => {
      const mine = nonce(env)
      assert.match(mine, /^[0-9a-f]{32}$/)
      assert.equal(nonce(other(env, '0')), mine)
      assert.equal(readRankEnvironment(other(env, '0'))?.rank, 0)
      const jobs = changes.map((name) => nonce({ ...env, [name]: '77' }))
      assert.equal(new Set([mine, ...jobs]).size, changes.length + 1)
    })
  }

  it('of Open MPI needs a name of the job', () => {
    assert.match(nonce({ ...openmpi4, PMIX_NAMESPACE: undefined }), /^[0-9a-f]{32}$/)
    refused({ ...openmpi4, PMIX_NAMESPACE: '', OMPI_MCA_ess_base_jobid: '' }, 'TILERANK_JOB')
  })

  it('is not made from a port that another job may use too', () => {
    refused({ ...torchrun, TORCHELASTIC_RUN_ID: undefined }, 'TILERANK_JOB')
    refused({ RANK: '0', WORLD_SIZE: '2', MASTER_ADDR: 'localhost', MASTER_PORT: '29500' }, 'TILERANK_JOB')
  })

  it('of srun serves its PMI too', () => {
    const env = { ...srunHere, PMI_RANK: '2', PMI_SIZE: '3' }
    assert.equal(nonce(env), nonce(srunHere))
  })

  it('of MPICH is the nearest hydra_pmi_proxy above the process, whatever lies between', () => {
    const proc = mkdtempSync(join(tmpdir(), 'tilerank-proc-'))
    const process = (pid: string, comm: string, parent: string, start: string, name = pid): void => {
      mkdirSync(join(proc, name, 'ns'), { recursive: true })
      const [before, after] = [Array(17).fill('0').join(' '), '1 2 3']
      writeFileSync(join(proc, name, 'stat'), `${pid} (${comm}) S ${parent} ${before} ${start} ${after}\n`)
    }
    const namespace = (name: string): void => {
      rmSync(join(proc, 'self/ns/pid'), { force: true })
      symlinkSync(name, join(proc, 'self/ns/pid'))
    }
    try {
      process('50', 'node', '49', '900', 'self')
      process('49', 'npm (run) x', '40', '800')
      process('40', 'hydra_pmi_proxy', '30', '700')
      process('30', 'mpiexec.hydra', '20', '600')
      process('20', 'hydra_pmi_proxy', '1', '500')
      process('1', 'init', '0', '1')
      namespace('pid:[4026531836]')
      const mine = nonce(mpich, proc)
      assert.match(mine, /^[0-9a-f]{32}$/)

      process('51', 'node', '40', '901', 'self') // another rank, without npm
      namespace('pid:[4026531836]')
      assert.equal(nonce(mpich, proc), mine)

      namespace('pid:[4026532000]') // another container of this network
      assert.notEqual(nonce(mpich, proc), mine)
      namespace('pid:[4026531836]')
      process('40', 'hydra_pmi_proxy', '30', '701') // the number has come again
      assert.notEqual(nonce(mpich, proc), mine)
      process('40', 'bash', '30', '700') // the job around it
      assert.notEqual(nonce(mpich, proc), mine)
      assert.match(nonce(mpich, proc), /^[0-9a-f]{32}$/)

      process('20', 'bash', '1', '500')
      assert.throws(() => nonce(mpich, proc), { code: 'ERR_ENVIRONMENT', message: /TILERANK_JOB/ })
      rmSync(join(proc, '30'), { recursive: true })
      assert.throws(() => nonce(mpich, proc), { code: 'ERR_ENVIRONMENT', message: /TILERANK_JOB/ })
    } finally {
      rmSync(proc, { recursive: true })
    }
  })
})
