"""Runs servers in turns, and the statistics of that.

The machine is never quiet: somebody compiles, a CPU changes its clock. So every round asks every
server once, in another order each time, and two servers are compared within a round. A ratio is
the median of the ratios of the rounds.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from . import fio
from .ground import Server
from .workloads import Workload

__all__ = ["order", "race", "ratio", "summary"]


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: rotated by one each round, backwards every second one."""
    at = number % max(1, len(names))
    turned = [*names[at:], *names[:at]]
    return turned[::-1] if number % 2 else turned


def race(
    servers: Mapping[str, Server],
    workload: Workload,
    rounds: int,
    seconds: float,
    size: int,
    on_sample: Callable[[str, int], None] = lambda name, number: None,
) -> tuple[dict[str, list[fio.Sample]], dict[str, str]]:
    """Drives every server `rounds` times with `workload`, in turns.

    Args:
        seconds: of each run.
        size: bytes of each export.
        on_sample: called before each run with the server's name and the round.

    Returns:
        The samples of each server, in the order of the rounds, and for each server that broke the
        reason; it is left out from then on.
    """
    samples: dict[str, list[fio.Sample]] = {name: [] for name in servers}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name in order(list(servers), number):
            if name in failures:
                continue
            on_sample(name, number)
            try:
                samples[name].append(_sample(servers[name], workload, seconds, size))
            except (fio.BenchmarkError, FileNotFoundError) as error:
                failures[name] = str(error)
    for name in failures:
        del samples[name]
    return samples, failures


# One run of fio, with the CPU time the server's process took meanwhile.
def _sample(server: Server, workload: Workload, seconds: float, size: int) -> fio.Sample:
    before = server.cpu_seconds()
    sample = fio.run(server.uri, workload, seconds, size)
    used = server.cpu_seconds() - before
    return replace(sample, cpu_us=used * 1e6 / sample.requests)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of the rounds that both finished."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def summary(samples: Sequence[fio.Sample]) -> dict:
    """The rounds of one server, with best and median (requests a second, microseconds)."""
    iops = [round(sample.iops, 1) for sample in samples]
    return {
        "iops": iops,
        "best": max(iops),
        "median": statistics.median(iops),
        "p99_us": round(statistics.median(sample.p99_us for sample in samples), 1),
        "cpu_us": round(statistics.median(sample.cpu_us for sample in samples), 2),
    }
