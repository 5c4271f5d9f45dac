// Builds the native addon, and a small one for each MPI that is found, into build/Release: npm's `install` script, `tilerank build`, and the
// first half of `npm run build`. Nothing to do when the stamp fits. `--force` builds from nothing, and looks for MPIs again. In a checkout and
// on request a failure stops npm; as a dependency it leaves a notice, since plans and dry runs work without the addon and `npx tilerank build`
// can follow.
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { hashInputs, isCheckout, isCurrent, listFiles, root, withLock } from './stamp.mjs'

const isForced = process.argv.includes('--force')
const isStrict = isCheckout || process.argv.includes('--strict')
const output = join(root, 'build', 'Release')
const outputs = [join(output, 'tilerank.node'), join(output, 'tilerank-exec')]
const stampFile = join(output, '.stamp')

function finish(problem) {
  console.error(`tilerank: ${problem}`)
  if (!isStrict) {
    console.error(
      'tilerank: installed without the native addon: `tilerank plan` works; for the rest run `npx tilerank build`',
    )
  }
  process.exit(isStrict ? 1 : 0)
}

/** True when the tool starts at all. */
function has(command) {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0
}

/** What is missing before a build can start, as a sentence; undefined: nothing. */
function missingTools() {
  const missing = []
  if (!(process.env.CXX ? has(process.env.CXX.split(' ')[0]) : has('c++') || has('g++') || has('clang++'))) {
    missing.push('a C++20 compiler')
  }
  if (!has('make') && !has('ninja')) missing.push('make')
  if (!has('cmake')) missing.push('CMake 3.20 or newer')
  if (missing.length === 0) return undefined
  return `building the native addon needs ${missing.join(' and ')}: on Debian or Ubuntu run \`apt-get install build-essential cmake\``
}

function inputsHash() {
  const sources = listFiles(join(root, 'native'), (name) => /\.(cpp|h|inl)$/.test(name))
  return hashInputs(
    [join(root, 'CMakeLists.txt'), ...sources],
    process.platform,
    process.arch,
    process.env.CXX,
    process.env.CXXFLAGS,
  )
}

function build(hash) {
  const missing = missingTools()
  if (missing !== undefined) finish(missing)
  const require = createRequire(join(root, 'package.json'))
  const cmakeJs = join(dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js')
  rmSync(stampFile, { force: true })
  // Headers come from two npm packages (binary.napi_versions switches cmake-js to that): nothing is downloaded.
  const jobs = String(Math.max(1, availableParallelism()))
  const command = isForced ? 'rebuild' : 'build' // not 'compile': it builds all again after a failure
  const args = [cmakeJs, command, '--directory', root, '--config', 'Release', '--parallel', jobs, '--log-level', 'warn']
  const { status, signal } = spawnSync(process.execPath, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] })
  if (status !== 0)
    finish(`building the native addon failed (${signal ?? `exit code ${status}`}); the compiler's words stand above`)
  mkdirSync(output, { recursive: true })
  writeFileSync(stampFile, hash)
}

if (process.platform !== 'linux' || !['x64', 'arm64'].includes(process.arch)) {
  const { name } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  console.error(
    `${name}: no native addon for ${process.platform} ${process.arch}; plans, dry runs and --help work, ranks need Linux`,
  )
} else if (isForced || !isCurrent(stampFile, inputsHash(), outputs)) {
  withLock('native', () => {
    const hash = inputsHash() // again: another process may have built while this one waited
    if (isForced || !isCurrent(stampFile, hash, outputs)) build(hash)
  })
}
