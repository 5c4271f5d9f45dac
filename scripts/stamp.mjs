// Up-to-date checks and the lock of the two build steps (install.mjs, prepare.mjs). A stamp is a hash of all inputs, kept beside the
// outputs: equal hash and present outputs mean nothing to do. The lock keeps npm runs that start at once from building twice.
import { createHash, randomBytes } from 'node:crypto'
import {
  closeSync,
  existsSync,
  linkSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))

/** A tarball carries no tsconfig.json: only a checkout compiles TypeScript, and only there a failed build stops npm. */
export const isCheckout = existsSync(join(root, 'tsconfig.json'))

/** All files below `folder` whose name `accept` takes, sorted; a missing folder has none. */
export function listFiles(folder, accept) {
  if (!existsSync(folder)) return []
  const found = []
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name)
    if (entry.isDirectory()) found.push(...listFiles(path, accept))
    else if (accept(entry.name)) found.push(path)
  }
  return found.sort()
}

/** Hash of names and contents, and of whatever else decides the output. */
export function hashInputs(files, ...others) {
  const hash = createHash('sha256')
  for (const other of others) hash.update(`${other}\0`)
  for (const file of files) {
    hash.update(`${relative(root, file)}\0`)
    hash.update(createHash('sha256').update(readFileSync(file)).digest())
  }
  return hash.digest('hex')
}

export function isCurrent(stampFile, hash, outputs) {
  return (
    existsSync(stampFile) && readFileSync(stampFile, 'utf8') === hash && outputs.every((output) => existsSync(output))
  )
}

/** Field 22 of /proc/PID/stat: a pid that was given to another process has another start time. Empty where there is no /proc. */
function startTime(pid) {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]
  } catch {
    return ''
  }
}

function isAlive({ pid, start }) {
  try {
    process.kill(pid, 0)
  } catch (error) {
    return error.code === 'EPERM'
  }
  return start === '' || startTime(pid) === start
}

const sleep = (ms) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)

function readHolder(lock) {
  try {
    return JSON.parse(readFileSync(lock, 'utf8'))
  } catch {
    return undefined // just released
  }
}

/** Removes a dead process's lock. Only one process at a time may look and remove, or it could remove a fresh lock. */
function breakStale(lock, dead) {
  const guard = `${lock}.break`
  try {
    closeSync(openSync(guard, 'wx'))
  } catch {
    // Held for microseconds by somebody else, unless he died in between.
    if (existsSync(guard) && Date.now() - statSync(guard).mtimeMs > 10_000) rmSync(guard, { force: true })
    return
  }
  const holder = readHolder(lock)
  if (holder !== undefined && holder.token === dead.token) rmSync(lock, { force: true })
  rmSync(guard, { force: true })
}

/** Runs `work` while no other process runs work under the same lock. */
export function withLock(name, work) {
  const folder = join(root, 'build')
  mkdirSync(folder, { recursive: true })
  const lock = join(folder, `.${name}.lock`)
  const self = { pid: process.pid, start: startTime(process.pid), token: randomBytes(8).toString('hex') }
  const claim = `${lock}.${self.token}`
  writeFileSync(claim, JSON.stringify(self))
  let announced = false
  try {
    for (;;) {
      try {
        linkSync(claim, lock) // atomic, and the content is there at once
        break
      } catch (error) {
        if (error.code !== 'EEXIST') throw error
      }
      const holder = readHolder(lock)
      if (holder !== undefined && !isAlive(holder)) {
        breakStale(lock, holder)
        continue
      }
      if (!announced && holder !== undefined)
        console.error(`tilerank: waiting for process ${holder.pid}, which is building`)
      announced = true
      sleep(100)
    }
  } finally {
    rmSync(claim, { force: true })
  }
  const release = () => rmSync(lock, { force: true })
  process.once('exit', release) // `work` may end the process
  try {
    return work()
  } finally {
    release()
    process.removeListener('exit', release)
  }
}
