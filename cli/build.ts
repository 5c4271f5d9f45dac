// `tilerank build`: what the install script does, for installations where scripts did not run. Needs a compiler and CMake.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import type { Command } from 'commander'
import { isSupportedPlatform, packageRoot } from '../native/index.js'

export function registerBuild(program: Command): void {
  program
    .command('build')
    .description('build the native addon, where the installation did not')
    .option('--force', 'build everything again')
    .action(async ({ force }: { force?: boolean }) => {
      const script = join(packageRoot, 'scripts', 'install.mjs')
      const args = [script, '--strict', ...(force === true ? ['--force'] : [])]
      const child = spawn(process.execPath, args, { stdio: ['ignore', 'inherit', 'inherit'] })
      const [code] = (await once(child, 'exit')) as [number | null]
      if (code !== 0) process.exitCode = 1
      else if (isSupportedPlatform())
        process.stdout.write(`built ${join(packageRoot, 'build', 'Release', 'tilerank.node')}\n`)
    })
}
