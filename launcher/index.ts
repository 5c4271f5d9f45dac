// The public face of launcher/: the machine, the plan, the ranks.

export { type BindingOptions, type BindingPlan, type RankBinding, defaultRanks, planBinding } from './binding.js'
export { LauncherError, type LauncherErrorCode } from './errors.js'
export {
  type RankExit,
  type RankProcess,
  RankSet,
  type SpawnOptions,
  createNonce,
  describeExit,
  execHelper,
  shellCode,
  spawnRanks,
} from './spawn.js'
export {
  type Core,
  type HugePages,
  type MachineFiles,
  type NumaNode,
  type ProcessLimits,
  type Topology,
  filesBelow,
  formatCpuList,
  parseCpuList,
  readTopology,
} from './topology.js'
