"""What is asked of every server: request size, direction, depth, connections.

A new workload is one line in `WORKLOADS`; `--only` and the promises know it by its name.
"""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WORKLOADS", "Workload"]

_SIZES = {"4k": 4 << 10, "64k": 64 << 10, "1M": 1 << 20}


@dataclass(frozen=True)
class Workload:
    """One kind of load.

    Attributes:
        size: bytes of a request, in fio's spelling (`4k`, `1M`).
        pattern: fio's `rw`: randread, randwrite, read or write.
        depth: requests in flight on each connection.
        connections: NBD connections (fio jobs).
    """

    size: str
    pattern: str
    depth: int
    connections: int = 1

    @property
    def name(self) -> str:
        """`4k-randread-qd16`, with `-c4` when there are 4 connections."""
        many = f"-c{self.connections}" if self.connections > 1 else ""
        return f"{self.size}-{self.pattern}-qd{self.depth}{many}"

    @property
    def request_size(self) -> int:
        """Bytes of one request."""
        return _SIZES[self.size]

    @property
    def sequential(self) -> bool:
        """Whether the requests follow each other on the device."""
        return not self.pattern.startswith("rand")

    @property
    def in_bytes(self) -> bool:
        """Whether the result is better said in MB/s than in requests a second."""
        return self.request_size >= 64 << 10

    @property
    def title(self) -> str:
        """The workload in words, for tables and charts."""
        pattern = {"randread": "random read", "randwrite": "random write"}.get(self.pattern)
        words = f"{self.size} {pattern or 'sequential ' + self.pattern}, depth {self.depth}"
        return words if self.connections == 1 else f"{words}, {self.connections} connections"


WORKLOADS = [
    *(
        Workload("4k", pattern, depth, connections)
        for connections in (1, 4)
        for pattern in ("randread", "randwrite")
        for depth in (1, 16, 64)
    ),
    *(
        Workload("64k", pattern, 8, connections)
        for connections in (1, 4)
        for pattern in ("randread", "randwrite")
    ),
    *(
        Workload("1M", pattern, 4, connections)
        for connections in (1, 4)
        for pattern in ("read", "write")
    ),
]
