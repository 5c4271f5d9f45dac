// What a batch records: collectives that group.ts checks one by one, and the addon then runs in one exchange.

import type { NativeCall } from './communicator.js'
import { invalid } from './errors.js'
import type {
  AllReduceChoice,
  CountsChoice,
  GroupData,
  OutputChoice,
  ReduceChoice,
  RootChoice,
  SyncOptions,
} from './group.js'

type DTypeChoice = Pick<SyncOptions, 'dtype'>
type Name =
  'allGather' | 'allReduce' | 'allToAll' | 'barrier' | 'broadcast' | 'gather' | 'reduce' | 'reduceScatter' | 'scatter'
type Read = (name: Name, data: GroupData | undefined, output: GroupData | undefined, options: object) => NativeCall

const noOptions = Object.freeze({})

/** As the methods of the group of these names. Memory that one operation writes belongs to no other of the batch. */
export class Batch {
  readonly #numbers: number[] = []
  readonly #values: unknown[] = []
  #read: Read | undefined

  /** @internal use group.batch */
  constructor(read: Read) {
    this.#read = read
  }

  allReduce(data: GroupData, options?: DTypeChoice & AllReduceChoice & OutputChoice<GroupData>): void {
    this.#add('allReduce', data, options?.output, options)
  }

  reduce(data: GroupData, options?: DTypeChoice & ReduceChoice & RootChoice & OutputChoice<GroupData>): void {
    this.#add('reduce', data, options?.output, options)
  }

  broadcast(data: GroupData, options?: DTypeChoice & RootChoice): void {
    this.#add('broadcast', data, undefined, options)
  }

  allGather(data: GroupData, output: GroupData, options?: DTypeChoice & CountsChoice): void {
    this.#add('allGather', data, output, options)
  }

  gather(data: GroupData, output: GroupData | undefined, options?: DTypeChoice & RootChoice & CountsChoice): void {
    this.#add('gather', data, output, options)
  }

  scatter(data: GroupData | undefined, output: GroupData, options?: DTypeChoice & RootChoice & CountsChoice): void {
    this.#add('scatter', data, output, options)
  }

  reduceScatter(data: GroupData, output: GroupData, options?: DTypeChoice & ReduceChoice & CountsChoice): void {
    this.#add('reduceScatter', data, output, options)
  }

  /** Of equal parts. */
  allToAll(data: GroupData, output: GroupData, options?: DTypeChoice): void {
    this.#add('allToAll', data, output, options)
  }

  barrier(): void {
    this.#add('barrier', undefined, undefined, undefined)
  }

  /** What the addon takes; nothing more is recorded. @internal */
  end(): [numbers: Int32Array, values: unknown[]] {
    this.#read = undefined
    return [Int32Array.from(this.#numbers), this.#values]
  }

  #add(name: Name, data: GroupData | undefined, output: GroupData | undefined, options: object = noOptions): void {
    if (this.#read === undefined)
      throw invalid('the batch is under way: operations are recorded before its function returns')
    if ('timeoutMs' in options) throw invalid('operations of a batch have no timeoutMs: say it to batch()')
    const call = this.#read(name, data, output, options)
    const [op, dtype, given, result, root, algorithm, , reduceOp, offsets] = call
    let has = 0
    for (const [bit, value] of [given, result, offsets].entries()) {
      if (value === undefined) continue
      has |= 1 << bit
      this.#values.push(value)
    }
    this.#numbers.push(op, dtype, root, algorithm, reduceOp, has)
  }
}
