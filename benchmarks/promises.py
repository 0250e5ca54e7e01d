"""What dmpy promises about speed, as data. The report prints each beside what was measured.

Ratios and times only: a number of IOPS holds on one machine, a ratio of two servers that ran in
turns holds on most. Add a line to promise more.
"""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROMISES", "LIMITS", "Limit", "Promise"]


@dataclass(frozen=True)
class Promise:
    """On each of `workloads`, `peer` does at least `at_least` times what `over` does.

    `with_trap` replaces `at_least` on CPUs that copy slowly into a buffer a few bytes past the
    start of a page (`dmpy.buffers` finds out).
    """

    peer: str
    over: str
    workloads: tuple[str, ...]
    at_least: float
    with_trap: float | None = None


@dataclass(frozen=True)
class Limit:
    """The timed task `task` (see tasks.py) takes less than `seconds`."""

    task: str
    seconds: float


_RANDOM = ("4k-randread-qd16", "4k-randwrite-qd16")
_READ, _WRITE = ("1M-read-qd4",), ("1M-write-qd4",)

PROMISES = [
    Promise("linear", "file", _RANDOM, 0.90),
    Promise("linear", "qemu-nbd", _RANDOM, 1.3),
    Promise("linear", "file", _READ, 0.95, with_trap=1.5),
    Promise("linear", "file", _WRITE, 0.95),
    Promise("striped", "linear", _RANDOM + _READ + _WRITE, 0.85),
    Promise("ten-layers", "linear", _RANDOM + _READ + _WRITE, 0.95),
    Promise("1000-segments", "linear", _RANDOM + _READ + _WRITE, 0.93),
    Promise("raid0", "striped", _RANDOM[:1] + _READ, 0.9),
    Promise("raid10", "striped", _RANDOM[:1] + _READ, 0.9),
    Promise("raid1", "linear", _RANDOM[:1] + _READ, 0.95),
    # A write to two files takes twice as long as one to a file, so 0.9 of that is 0.45 of linear.
    Promise("raid1", "linear", _RANDOM[1:] + _WRITE, 0.45),
    Promise("raid5", "linear", _WRITE, 0.55),
    Promise("raid5", "linear", _RANDOM[1:], 0.30),
    Promise("raid6", "linear", _WRITE, 0.30),
    Promise("raid5-degraded", "raid5", _RANDOM[:1] + _READ, 0.5),
    Promise("raid6-degraded", "raid6", _RANDOM[:1] + _READ, 0.2),
]

LIMITS = [
    Limit("load-in-process", 3.0),
    Limit("load-through-socket", 3.0),
]
