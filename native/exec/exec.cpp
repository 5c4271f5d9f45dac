// tilerank-exec: the last step before a rank's command. Whatever must hold before the command has its first thread is done here and
// survives exec: affinity, memory policy, process group, death with the parent. Any command can be a rank, not only Node.
//
//   tilerank-exec PARENT_PID CPUS NODES -- COMMAND ARGS...     CPUS and NODES are lists such as 0-3,8 or '-' for none
//
// Exit codes as a shell's: 127 command not found, 126 not executable; 125 for processors that cannot be had; the reason is on
// stderr. Where a sandbox forbids binding itself, rank 0 says so for the whole job, and the work goes on unbound.
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kFailed = 125;
constexpr long kMaxId = 65535;  // more CPUs or nodes than any kernel is built for

[[noreturn]] void Fail(int code, const char* what, const char* subject) {
  fprintf(stderr, "tilerank-exec: %s '%s': %s\n", what, subject, strerror(errno));
  _exit(code);
}

/// Ranks of a job live under the same rules: one of them speaks for all.
bool IsFirstRank() {
  const char* rank = getenv("RANK");
  return rank == nullptr || strcmp(rank, "0") == 0;
}

/// A system call that a sandbox forbids, as opposed to one that was asked for the impossible.
bool IsForbidden(int error) { return error == EPERM || error == EACCES || error == ENOSYS; }

/// Bits of a list such as "0-3,8", as the kernel takes masks: an array of longs.
std::vector<unsigned long> ParseMask(const char* list) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(1);
  const char* at = list;
  for (;;) {
    char* end = nullptr;
    errno = EINVAL;
    if (*at < '0' || *at > '9') Fail(kFailed, "not a list of numbers", list);
    const long first = strtol(at, &end, 10);
    long last = first;
    if (*end == '-') {
      at = end + 1;
      if (*at < '0' || *at > '9') Fail(kFailed, "not a list of numbers", list);
      last = strtol(at, &end, 10);
    }
    errno = EINVAL;
    if (first > last || last > kMaxId) Fail(kFailed, "not a list of numbers", list);
    if (mask.size() <= last / kBits) mask.resize(last / kBits + 1);
    for (long id = first; id <= last; id++) mask[id / kBits] |= 1ul << (id % kBits);
    if (*end == '\0') return mask;
    if (*end != ',') Fail(kFailed, "not a list of numbers", list);
    at = end + 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6 || strcmp(argv[4], "--") != 0) {
    fputs("usage: tilerank-exec PARENT_PID CPUS NODES -- COMMAND ARGS...\n", stderr);
    return kFailed;
  }
  // Order matters: the parent may have died before the request stood, so it is looked at afterwards.
  const long parent = strtol(argv[1], nullptr, 10);
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) Fail(kFailed, "cannot ask to end with", "the parent");
  if (getppid() != parent) _exit(kFailed);

  // A group, not a session: signals reach everything that the rank starts, and its share of the processor stays as it was.
  if (setpgid(0, 0) != 0) Fail(kFailed, "cannot make a", "process group");

  if (strcmp(argv[2], "-") != 0) {
    const std::vector<unsigned long> mask = ParseMask(argv[2]);
    const size_t bytes = mask.size() * sizeof(unsigned long);
    if (sched_setaffinity(0, bytes, reinterpret_cast<const cpu_set_t*>(mask.data())) == 0) {
      // The kernel drops forbidden processors without a word: read back what was granted.
      std::vector<unsigned long> granted(8192 / sizeof(unsigned long));
      const long length = syscall(SYS_sched_getaffinity, 0, granted.size() * sizeof(unsigned long), granted.data());
      errno = EINVAL;
      if (length < 0 || static_cast<size_t>(length) < bytes || memcmp(granted.data(), mask.data(), bytes) != 0) {
        Fail(kFailed, "not all processors were granted of", argv[2]);
      }
    } else if (!IsForbidden(errno)) {
      Fail(kFailed, "cannot bind to the processors", argv[2]);
    } else if (IsFirstRank()) {
      fprintf(stderr,
              "tilerank-exec: ranks are not bound to processors (sched_setaffinity: %s) and may disturb each other; allow that system "
              "call in the container's seccomp profile, or ask for no binding (--no-bind)\n",
              strerror(errno));
    }
  }
  if (strcmp(argv[3], "-") != 0) {
    const std::vector<unsigned long> mask = ParseMask(argv[3]);
    // Preferred, not bound: a full node then spills over instead of ending the job. Containers may refuse; first touch remains.
    constexpr int kPreferredMany = 5;  // MPOL_PREFERRED_MANY, Linux 5.15; older headers lack the name
    const unsigned long bits = mask.size() * sizeof(unsigned long) * 8 + 1;
    if (syscall(SYS_set_mempolicy, kPreferredMany, mask.data(), bits) != 0 && IsFirstRank()) {
      fprintf(stderr,
              "tilerank-exec: memory is not bound to NUMA nodes (set_mempolicy: %s): pages go where they are first touched; in a "
              "container add CAP_SYS_NICE, or allow that system call in its seccomp profile\n",
              strerror(errno));
    }
  }

  // Node ignores none of these, but a launcher under nohup may: a rank starts with defaults and an empty mask.
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE}) signal(number, SIG_DFL);

  execvp(argv[5], argv + 5);
  Fail(errno == ENOENT ? 127 : 126, "cannot run", argv[5]);
}
