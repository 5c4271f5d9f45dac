// How much a test does: some have a long form, for soaks, faults and sanitizers, that `npm run test:long` runs. It takes every test
// file that imports this one.

export const isLong = process.env['TILERANK_TEST'] === 'long'

export function rounds<T>({ quick, long }: { readonly quick: T; readonly long: T }): T {
  return isLong ? long : quick
}
