import assert from 'node:assert/strict'
import { defaultTimeoutMs, readRankEnvironment } from '../../collectives/index.js'

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

function refused(env: Record<string, string | undefined>, code: string, variable: string): void {
  assert.throws(
    () => readRankEnvironment(env),
    (error: Error & { code?: string; variables?: readonly string[] }) => {
      assert.equal(error.code, code)
      assert.ok(error.variables?.includes(variable), `${error.message} names ${variable}`)
      assert.match(error.message, new RegExp(variable))
      return true
    },
  )
}

describe('the variables of a rank', () => {
  it('make a process without any of them a group of one', () => {
    assert.equal(readRankEnvironment({}), undefined)
    assert.equal(readRankEnvironment({ MASTER_ADDR: 'a', MASTER_PORT: '1', TILERANK_TIMEOUT_MS: '5' }), undefined)
    assert.equal(readRankEnvironment({ RANK: '', WORLD_SIZE: '' }), undefined)
  })

  it('are read', () => {
    assert.deepEqual(readRankEnvironment(whole), {
      rank: 1,
      worldSize: 2,
      localRank: 1,
      localSize: 2,
      job,
      socketFd: 5,
    })
    const few = readRankEnvironment({ RANK: '0', WORLD_SIZE: '3', TILERANK_JOB: job })
    assert.deepEqual(few, { rank: 0, worldSize: 3, localRank: 0, localSize: 3, job, socketFd: -1 })
    assert.equal(readRankEnvironment({ RANK: '0', WORLD_SIZE: '1' })?.worldSize, 1)
  })

  it('are refused when one is missing, which is named', () => {
    refused({ ...whole, RANK: undefined }, 'ERR_ENVIRONMENT', 'RANK')
    refused({ ...whole, WORLD_SIZE: undefined }, 'ERR_ENVIRONMENT', 'WORLD_SIZE')
    refused({ ...whole, TILERANK_JOB: undefined }, 'ERR_ENVIRONMENT', 'TILERANK_JOB')
    refused({ TILERANK_JOB: job }, 'ERR_ENVIRONMENT', 'WORLD_SIZE')
  })

  it('are refused when they contradict each other or are no numbers', () => {
    refused({ ...whole, RANK: '2' }, 'ERR_ENVIRONMENT', 'RANK')
    refused({ ...whole, LOCAL_SIZE: '1' }, 'ERR_ENVIRONMENT', 'LOCAL_SIZE')
    refused({ ...whole, LOCAL_RANK: '0' }, 'ERR_ENVIRONMENT', 'LOCAL_RANK')
    refused({ ...whole, LOCAL_WORLD_SIZE: '4', LOCAL_SIZE: '4' }, 'ERR_ENVIRONMENT', 'LOCAL_WORLD_SIZE')
    for (const text of ['-1', '1.5', 'one', '0x1', '99999999999', ' 1'])
      refused({ ...whole, RANK: text }, 'ERR_ENVIRONMENT', 'RANK')
    refused({ ...whole, TILERANK_JOB: job.toUpperCase() }, 'ERR_ENVIRONMENT', 'TILERANK_JOB')
    refused({ ...whole, TILERANK_SOCKET_FD: 'x' }, 'ERR_ENVIRONMENT', 'TILERANK_SOCKET_FD')
    refused({ ...whole, MASTER_PORT: '70000' }, 'ERR_ENVIRONMENT', 'MASTER_PORT')
  })

  it('of a job that spans nodes are not supported', () => {
    refused({ ...whole, WORLD_SIZE: '4' }, 'ERR_UNSUPPORTED', 'LOCAL_WORLD_SIZE')
  })

  it('set the deadline', () => {
    assert.equal(defaultTimeoutMs({}), 60_000)
    assert.equal(defaultTimeoutMs({ TILERANK_TIMEOUT_MS: '1500' }), 1500)
    assert.throws(() => defaultTimeoutMs({ TILERANK_TIMEOUT_MS: '0' }), { code: 'ERR_ENVIRONMENT' })
  })
})
