"""Runs fio's nbd engine once and reads its answer."""
from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

from .workloads import Workload

__all__ = ["BenchmarkError", "Sample", "command", "run"]


class BenchmarkError(Exception):
    """A server or fio did not do what was asked; the text says which and why."""


@dataclass(frozen=True)
class Sample:
    """What one run of fio measured.

    Attributes:
        iops: requests a second.
        requests: requests done.
        p99_us: 99th percentile of the completion latency, microseconds.
        cpu_us: CPU time of the server for one request, microseconds (user and system).
    """

    iops: float
    requests: int
    p99_us: float
    cpu_us: float = 0.0


def command(uri: str, workload: Workload, seconds: float, size: int) -> list[str]:
    """fio's command line.

    Args:
        uri: the export to drive.
        seconds: how long.
        size: bytes of the export. Sequential connections each get a part of their own.
    """
    part = size // workload.connections if workload.sequential else size
    return [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}",
        f"--rw={workload.pattern}", f"--bs={workload.size}", f"--iodepth={workload.depth}",
        f"--numjobs={workload.connections}", f"--size={part}",
        f"--offset_increment={part if workload.sequential else 0}",
        "--time_based", f"--runtime={round(seconds * 1000)}ms",
        "--norandommap", "--randrepeat=1", "--group_reporting", "--output-format=json",
    ]


def run(uri: str, workload: Workload, seconds: float, size: int) -> Sample:
    """Drives `uri` with `workload` and returns what fio saw, without the server's CPU time.

    Raises:
        BenchmarkError: fio failed, hung or did no request.
    """
    argv = command(uri, workload, seconds, size)
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + 30
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"fio: no end after {seconds + 30:g} s: {' '.join(argv)}") from None
    text = done.stdout
    # fio's engine announces each connection on standard output, before the JSON.
    start = text.find("{\n")
    if done.returncode or start < 0:
        said = (done.stderr.strip() or text.strip()).splitlines()[-1:]
        raise BenchmarkError(f"fio: exit status {done.returncode}: {' '.join(said)}")
    job = json.loads(text[start:])["jobs"][0]
    side = job["write" if "write" in workload.pattern else "read"]
    if job["error"] or not side["total_ios"]:
        raise BenchmarkError(f"fio: error {job['error']} after {side['total_ios']} requests")
    p99 = side["clat_ns"].get("percentile", {}).get("99.000000", 0)
    return Sample(side["iops"], side["total_ios"], p99 / 1000)
