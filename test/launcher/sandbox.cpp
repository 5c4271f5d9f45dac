// Runs a command as a container would that takes something away: system calls that answer EPERM, or huge pages.
//
//   sandbox [set_mempolicy] [mbind] [sched_setaffinity] [nothp] -- COMMAND ARGS...
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

int main(int argc, char** argv) {
  std::vector<unsigned> denied;
  int at = 1;
  for (; at < argc && strcmp(argv[at], "--") != 0; at++) {
    if (strcmp(argv[at], "set_mempolicy") == 0) {
      denied.push_back(SYS_set_mempolicy);
    } else if (strcmp(argv[at], "mbind") == 0) {
      denied.push_back(SYS_mbind);
    } else if (strcmp(argv[at], "sched_setaffinity") == 0) {
      denied.push_back(SYS_sched_setaffinity);
    } else if (strcmp(argv[at], "nothp") == 0) {
      if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) return 99;
    } else {
      return 98;
    }
  }
  if (at + 1 >= argc) return 98;
  std::vector<sock_filter> filter = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (unsigned number : denied) {
    filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1));
    filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));
  }
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog program = {static_cast<unsigned short>(filter.size()), filter.data()};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) return 99;
  execvp(argv[at + 1], argv + at + 1);
  perror("sandbox");
  return 127;
}
