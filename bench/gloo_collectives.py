"""Times one collective of gloo by torch.distributed (f32, sums) for bench/collectives.ts, as mpi_collectives.c does with an MPI. Arguments: the
operation, 1 to check every result, then bytes, warm-ups and samples of each size, in turn. RANK, WORLD_SIZE, CORE and STORE (a file) come from the
environment. Rank 0 prints "bytes p50 min p99 mean" in microseconds; nothing, where gloo has no such operation."""

import os
import sys
import time

import torch
import torch.distributed as dist

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.sched_setaffinity(0, {int(os.environ["CORE"])})
torch.set_num_threads(1)


def value_of(start, part, sample):
    return float(1 + (start + 2 * part + sample) % 5)


def sum_of(part, sample):
    return sum(value_of(start, part, sample) for start in range(size))


def calls(op, count):
    """Buffers of parts, the call, and what it gives: (data, output, call(root), expected(root, sample))."""
    whole_data = op in ("scatter", "reduceScatter", "allToAll")
    whole_output = op in ("allGather", "gather", "allToAll")
    data = torch.zeros(0 if op == "barrier" else count * (size if whole_data else 1))
    output = torch.zeros(count * (size if whole_output else 1))
    data_parts = list(data.split(count)) if len(data) > 0 else []
    output_parts = list(output.split(count))

    def ring(_):
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, data, (rank + 1) % size), dist.P2POp(dist.irecv, output, (rank - 1) % size)]
        )
        for work in works:
            work.wait()

    def ping_pong(_):
        if rank == 0:
            dist.send(data, 1)
        if rank < 2:
            dist.recv(output, 1 - rank)
        if rank == 1:
            dist.send(data, 0)

    everyone = range(size)
    table = {
        "barrier": (lambda root: dist.barrier(), lambda root, s: []),
        "allReduce": (lambda root: dist.all_reduce(data), lambda root, s: [(data, sum_of(0, s))]),
        "reduce": (lambda root: dist.reduce(data, root), lambda root, s: [(data, sum_of(0, s))] if rank == root else []),
        "reduceScatter": (lambda root: dist.reduce_scatter_tensor(output, data), lambda root, s: [(output, sum_of(rank, s))]),
        "allGather": (
            lambda root: dist.all_gather(output_parts, data),
            lambda root, s: [(output_parts[r], value_of(r, 0, s)) for r in everyone],
        ),
        "gather": (
            lambda root: dist.gather(data, output_parts if rank == root else None, root),
            lambda root, s: [(output_parts[r], value_of(r, 0, s)) for r in everyone] if rank == root else [],
        ),
        "scatter": (
            lambda root: dist.scatter(output, data_parts if rank == root else None, root),
            lambda root, s: [(output, value_of(root, rank, s))],
        ),
        "broadcast": (lambda root: dist.broadcast(data, root), lambda root, s: [(data, value_of(root, 0, s))]),
        "allToAll": (
            lambda root: dist.all_to_all_single(output, data),
            lambda root, s: [(output_parts[r], value_of(r, rank, s)) for r in everyone],
        ),
        "sendRecv": (ring, lambda root, s: [(output, value_of((rank - 1) % size, 0, s))]),
        "pingPong": (ping_pong, lambda root, s: [(output, value_of(1 - rank, 0, s))] if rank < 2 else []),
    }
    return data_parts, *table.get(op, (None, None))


def main():
    op, checks_all = sys.argv[1], sys.argv[2] == "1"
    if calls(op, 1)[1] is None:
        return
    dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=size)
    numbers = [int(text) for text in sys.argv[3:]]
    for bytes_, warm_ups, samples in zip(numbers[0::3], numbers[1::3], numbers[2::3]):
        data_parts, call, expected = calls(op, bytes_ // 4)
        starts, ends = torch.zeros(samples, dtype=torch.float64), torch.zeros(samples, dtype=torch.float64)
        for i in range(warm_ups + samples):
            root = i % size
            if op not in ("broadcast", "scatter") or rank == root:
                for part, to in enumerate(data_parts):
                    to.fill_(value_of(rank, part, i))
            start = time.clock_gettime(time.CLOCK_MONOTONIC)
            call(root)
            end = time.clock_gettime(time.CLOCK_MONOTONIC)
            if i >= warm_ups:
                starts[i - warm_ups], ends[i - warm_ups] = start * 1e6, end * 1e6
            if checks_all or i == warm_ups + samples - 1:
                for found, wanted in expected(root, i):
                    if not bool((found == wanted).all()):
                        sys.exit(f"rank {rank}: {op} of {bytes_} bytes gave {found} instead of {wanted}")
        for times in (starts, ends):
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        us = (ends - starts).sort().values
        if rank == 0:
            p50, p99 = us[samples // 2].item(), us[samples * 99 // 100].item()
            print(bytes_, f"{p50:.3f} {us[0].item():.3f} {p99:.3f} {us.mean().item():.3f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
