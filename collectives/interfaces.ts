// Which address of this machine a rank listens on: named, or the one from which the way to the others goes. Never all of them by itself, and never
// a guess: where several fit, the caller says which.

import { createSocket } from 'node:dgram'
import { BlockList, isIP, isIPv6 } from 'node:net'
import { networkInterfaces } from 'node:os'
import { CollectiveError } from './errors.js'

export interface InterfaceAddress {
  readonly interface: string
  readonly address: string
}

/** All addresses of this machine but IPv6 link-local ones, which need a scope. */
export function localAddresses(interfaces = networkInterfaces()): InterfaceAddress[] {
  return Object.entries(interfaces).flatMap(([name, addresses = []]) =>
    addresses.filter(({ address }) => !/^fe80:/i.test(address)).map(({ address }) => ({ interface: name, address })),
  )
}

const listed = (addresses: readonly InterfaceAddress[]): string =>
  addresses.map(({ interface: name, address }) => `${name} ${address}`).join(', ')

const unfit = (message: string): CollectiveError =>
  new CollectiveError('ERR_ENVIRONMENT', message, { variables: ['TILERANK_INTERFACE'] })

/**
 * @param selector an interface, an address or a network such as 10.1.0.0/16
 * @throws CollectiveError ERR_ENVIRONMENT: nothing fits, or several do
 */
export function selectAddress(
  selector: string,
  addresses: readonly InterfaceAddress[] = localAddresses(),
): InterfaceAddress {
  const [network = '', prefix] = selector.split('/')
  const fits = (candidate: InterfaceAddress): boolean => {
    if (prefix === undefined) return candidate.interface === selector || candidate.address === selector
    const family = isIPv6(network) ? 'ipv6' : 'ipv4'
    if (isIPv6(candidate.address) !== (family === 'ipv6')) return false
    const block = new BlockList()
    block.addSubnet(network, Number(prefix), family)
    return block.check(candidate.address, family)
  }
  if (
    prefix !== undefined &&
    (isIP(network) === 0 || !/^\d{1,3}$/.test(prefix) || Number(prefix) > (isIPv6(network) ? 128 : 32))
  )
    throw unfit(`the interface '${selector}' is no network such as 10.1.0.0/16`)
  const found = addresses.filter(fits)
  // An interface with both kinds of address: the older kind, unless only the other is there.
  const preferred = found.filter(({ address }) => !isIPv6(address))
  const [first, second] = preferred.length > 0 ? preferred : found
  if (first === undefined)
    throw unfit(`no address of this machine fits the interface '${selector}': there are ${listed(addresses)}`)
  if (second !== undefined) throw unfit(`several addresses fit the interface '${selector}': ${listed(found)}; name one`)
  return first
}

/** The local address of packets to `host`: the kernel's routing decides, and nothing is sent. */
async function addressTowards(host: string): Promise<string> {
  const socket = createSocket(isIPv6(host) ? 'udp6' : 'udp4')
  try {
    await new Promise<void>((resolve, reject) => {
      socket.once('error', reject)
      socket.connect(9, host, resolve)
    })
    return socket.address().address
  } catch (cause) {
    throw unfit(`there is no way to ${host}: ${cause instanceof Error ? cause.message : String(cause)}`)
  } finally {
    socket.close()
  }
}

/**
 * The address to listen on.
 * @param towards an address of another rank
 */
export async function chooseAddress(selector: string | undefined, towards: string): Promise<InterfaceAddress> {
  if (selector !== undefined && selector !== '') return selectAddress(selector)
  const address = await addressTowards(towards)
  return localAddresses().find((candidate) => candidate.address === address) ?? { interface: '', address }
}
