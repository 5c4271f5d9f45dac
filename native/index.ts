// The addons' only door: finds build/Release/tilerank.node under the package root and loads it, once per thread (the module cache
// keeps it); likewise the one of an MPI, where it was built. Loading is lazy, so that everything pure (plan, --help, fixtures) works where no addon can be built.
// Callers get `unknown` and parse what they use into types of their own.

import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export type { DType, Shape, SourceDType } from './types.js'
export { elementBytes } from './types.js'

export type AddonErrorCode = 'ERR_UNSUPPORTED_PLATFORM' | 'ERR_ADDON_MISSING' | 'ERR_ADDON_BROKEN'

/** The addon cannot be had here. `tried` names every path that was looked at. */
export class AddonError extends Error {
  override readonly name = 'AddonError'
  readonly code: AddonErrorCode
  readonly tried: readonly string[]

  constructor(code: AddonErrorCode, message: string, tried: readonly string[] = [], options?: ErrorOptions) {
    super(message, options)
    this.code = code
    this.tried = tried
  }
}

/** The nearest folder above this file whose package.json is ours: above dist/native in a package as in a checkout. */
function findPackageRoot(): string {
  const start = dirname(fileURLToPath(import.meta.url))
  for (let folder = start; ; folder = dirname(folder)) {
    const manifest = join(folder, 'package.json')
    if (existsSync(manifest)) {
      const parsed: unknown = JSON.parse(readFileSync(manifest, 'utf8'))
      if (typeof parsed === 'object' && parsed !== null && 'name' in parsed && parsed.name === 'tilerank') return folder
    }
    if (folder === dirname(folder)) return dirname(dirname(start))
  }
}

/** The folder that holds package.json, models/, native/ and build/. */
export const packageRoot: string = findPackageRoot()

/** Where the addon is looked for, in order. TILERANK_ADDON replaces the search: a wrong path there is an error, not a detour. */
export function addonPaths(env: NodeJS.ProcessEnv = process.env): readonly string[] {
  const override = env['TILERANK_ADDON']
  if (override !== undefined && override !== '') return [override]
  return [join(packageRoot, 'build', 'Release', 'tilerank.node')]
}

export function isSupportedPlatform(platform: string = process.platform, arch: string = process.arch): boolean {
  return platform === 'linux' && (arch === 'x64' || arch === 'arm64')
}

/** The addon's exports. Throws AddonError when there is none, with the way out. */
export function nativeAddon(): unknown {
  if (!isSupportedPlatform()) {
    throw new AddonError(
      'ERR_UNSUPPORTED_PLATFORM',
      `no addon for ${process.platform} ${process.arch}: ranks run on Linux x64 or arm64; here only plan, --dry-run and --help work`,
    )
  }
  return load(addonPaths(), 'the native addon has not been built: run `npx tilerank build`')
}

export type MpiName = 'openmpi' | 'mpich'

/** The exports of the addon that is linked with an MPI. Throws AddonError when there is none, with the way out. */
export function mpiAddon(mpi: MpiName): unknown {
  const folder = dirname(addonPaths()[0] ?? '')
  return load(
    [join(folder, `tilerank-${mpi}.node`)],
    `the addon for ${mpi} has not been built: install its compiler, mpicxx (Debian: lib${mpi}-dev), and run \`npx tilerank build --force\``,
  )
}

function load(tried: readonly string[], missing: string): unknown {
  const path = tried.find((candidate) => existsSync(candidate))
  if (path === undefined)
    throw new AddonError('ERR_ADDON_MISSING', `${missing} (looked for ${tried.join(', ')})`, tried)
  if (!path.endsWith('.node')) {
    throw new AddonError('ERR_ADDON_BROKEN', `TILERANK_ADDON=${path} is no addon: its name must end in .node`, tried)
  }
  try {
    const addon: unknown = createRequire(import.meta.url)(path)
    return addon
  } catch (cause) {
    throw new AddonError(
      'ERR_ADDON_BROKEN',
      `${path} cannot be loaded: ${cause instanceof Error ? cause.message : String(cause)}; run \`npx tilerank build --force\``,
      tried,
      { cause },
    )
  }
}
