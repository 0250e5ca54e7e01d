"""Figures of a mapped device: what it has done since it was created."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SAMPLE", "Counts", "Stats"]

SAMPLE = 16
"""Of so many requests that take the short way, one is timed, and counts as many times."""

_BUCKETS = 65


class Counts:
    """Requests that succeeded and bytes of them.

    Threads add to these without a lock, for the reason that plan.Lane gives.
    """

    __slots__ = ("read_bytes", "reads", "write_bytes", "writes")

    def __init__(self) -> None:
        self.reads = self.writes = self.read_bytes = self.write_bytes = 0


class Stats:
    """All figures of a device.

    Taking the time of a request costs as much as mapping it. So of those that take the short way
    only a sample is timed; the histograms are an estimate there.

    Args:
        in_flight: tells how many requests are under way.

    Attributes:
        counts: requests made on the device itself, and those of clients that have left.
        openings: the counts of those who have the device open.
        flushes: requests that succeeded; also discards, zeroes.
        errors: requests of any kind that failed.
        read_histogram: how many reads took a number of nanoseconds that has as many bits as the
            index says, waiting for a suspended device included; also write_histogram.
    """

    __slots__ = (
        "_in_flight",
        "counts",
        "discards",
        "errors",
        "flushes",
        "openings",
        "read_histogram",
        "write_histogram",
        "zeroes",
    )

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self._in_flight = in_flight
        self.counts = Counts()
        self.openings: set[Counts] = set()
        self.flushes = self.discards = self.zeroes = self.errors = 0
        self.read_histogram = [0] * _BUCKETS
        self.write_histogram = [0] * _BUCKETS

    def fold(self, opening: Counts) -> None:
        """Add the counts of somebody who has left to those of the device."""
        self.openings.discard(opening)
        for name in Counts.__slots__:
            setattr(self.counts, name, getattr(self.counts, name) + getattr(opening, name))

    # The sum of a count over everybody.
    def _sum(self, name: str) -> int:
        return sum(getattr(counts, name) for counts in [self.counts, *list(self.openings)])

    @property
    def reads(self) -> int:
        """Reads that succeeded."""
        return self._sum("reads")

    @property
    def writes(self) -> int:
        """Writes that succeeded."""
        return self._sum("writes")

    @property
    def in_flight(self) -> int:
        """Requests that are under way or wait for the device to be resumed."""
        return self._in_flight()

    def snapshot(self) -> dict[str, int | list[int]]:
        """Return the figures by name."""
        return {
            "reads": self.reads,
            "writes": self.writes,
            "read_bytes": self._sum("read_bytes"),
            "write_bytes": self._sum("write_bytes"),
            "flushes": self.flushes,
            "discards": self.discards,
            "zeroes": self.zeroes,
            "errors": self.errors,
            "in_flight": self.in_flight,
            "read_histogram": list(self.read_histogram),
            "write_histogram": list(self.write_histogram),
        }
