// Compiles TypeScript to dist/: npm's `prepare` script and the second half of `npm run build`. Nothing to do when the stamp fits,
// and nothing in a package, which brings dist/. Outputs whose source is gone are removed, so that no old test runs on.
import { spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative } from 'node:path'
import { hashInputs, isCheckout, isCurrent, listFiles, root, withLock } from './stamp.mjs'

const dist = join(root, 'dist')
const stampFile = join(dist, '.stamp')
const commands = [join(dist, 'cli', 'main.js'), join(dist, 'launcher', 'cli.js')]
const folders = ['native', 'collectives', 'kernels', 'tp', 'launcher', 'cli', 'bench', 'test']

function inputsHash(require) {
  const sources = folders.flatMap((folder) => listFiles(join(root, folder), (name) => name.endsWith('.ts')))
  return hashInputs([join(root, 'tsconfig.json'), ...sources], require('typescript/package.json').version)
}

function removeOrphans() {
  for (const file of listFiles(dist, (name) => /\.(js|js\.map|d\.ts)$/.test(name))) {
    const source = join(root, relative(dist, file)).replace(/\.(js|js\.map|d\.ts)$/, '.ts')
    if (!existsSync(source)) rmSync(file)
  }
}

if (isCheckout) {
  const require = createRequire(join(root, 'package.json'))
  let tsc
  try {
    tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc')
  } catch {
    // `npm ci --omit=dev` in a checkout: nothing to compile with.
    if (commands.every((command) => existsSync(command))) process.exit(0)
    console.error(
      'tilerank: dist/ is missing and TypeScript is not installed: run `npm ci` (with the development packages) first',
    )
    process.exit(1)
  }
  if (!isCurrent(stampFile, inputsHash(require), commands)) {
    withLock('typescript', () => {
      const hash = inputsHash(require)
      if (isCurrent(stampFile, hash, commands)) return
      mkdirSync(dist, { recursive: true })
      rmSync(stampFile, { force: true })
      removeOrphans()
      const { status } = spawnSync(process.execPath, [tsc, '-p', root], { stdio: ['ignore', 'inherit', 'inherit'] })
      if (status !== 0) process.exit(1)
      for (const command of commands) chmodSync(command, 0o755)
      writeFileSync(stampFile, hash)
    })
  }
}
