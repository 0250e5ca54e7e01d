"""Devices that fail, hang or crawl when told to.

A test says which call fails; several devices may share one `Fault`, so that "the n-th call of the
whole stack" has a meaning. `every_fault` walks n upward until nothing fails any more: then every
path through an error has been taken.
"""

from __future__ import annotations

import errno as _errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from dmpy.device import BlockDevice, Buffers, Extent, slices, total
from dmpy.errors import DeviceError

__all__ = ["OPS", "Fault", "FaultyDevice", "every_fault"]

OPS = ("read", "write", "flush", "discard", "zero", "extents")


class Fault:
    """Which call fails, and how; may be shared by several devices.

    Args:
        at: the n-th matching call fails, counted from 1; None never fails.
        forever: every matching call from there on fails too.
        error: errno of the failure.
        ops: names out of `OPS`; only these are counted.
        ranges: pairs (offset, length) in bytes; only calls that touch one of them are counted
            (flush has no range and is counted only without `ranges`).
        partial: a write that fails has moved its first half, as a real disk may.

    Attributes:
        seen: matching calls so far.
        hits: failures so far.
    """

    def __init__(
        self,
        at: int | None = None,
        *,
        forever: bool = False,
        error: int = _errno.EIO,
        ops: Iterable[str] = OPS,
        ranges: Iterable[tuple[int, int]] | None = None,
        partial: bool = False,
    ) -> None:
        self.at = at
        self.forever = forever
        self.error = error
        self.ops = frozenset(ops)
        assert self.ops <= set(OPS), f"unknown operations {sorted(self.ops - set(OPS))}"
        self.ranges = None if ranges is None else list(ranges)
        self.partial = partial
        self.seen = 0
        self.hits = 0
        # Protects the counts; nothing is called while it is held.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        how = "for ever" if self.forever else "once"
        return f"<Fault {_errno.errorcode.get(self.error, self.error)} at call {self.at}, {how}>"

    def strikes(self, op: str, offset: int, length: int) -> bool:
        """Count one call and say whether it fails."""
        if op not in self.ops or not self._touches(offset, length):
            return False
        with self._lock:
            self.seen += 1
            if self.at is None or self.seen < self.at or (self.hits and not self.forever):
                return False
            self.hits += 1
            return True

    def heal(self) -> None:
        """Fail nothing from now on; the counts stay."""
        self.at = None

    # Whether the range of a call overlaps one of ours.
    def _touches(self, offset: int, length: int) -> bool:
        if self.ranges is None:
            return True
        end = offset + length
        return any(offset < at + size and at < end for at, size in self.ranges)


class FaultyDevice(BlockDevice):
    """Passes calls to another device, except those that its `Fault` strikes.

    Args:
        device: the device below.
        fault: shared or own; without one nothing fails until `fail` is called.
        delay: seconds that every call sleeps first.
        name: default: the name of the device below.

    Attributes:
        calls: counts of the calls that arrived, by operation, failed ones too.
    """

    def __init__(
        self,
        device: BlockDevice,
        fault: Fault | None = None,
        *,
        delay: float = 0.0,
        name: str | None = None,
    ) -> None:
        self.device = device
        self.fault = Fault() if fault is None else fault
        self.delay = delay
        self.name = device.name if name is None else name
        self.size = device.size
        self.block_size = device.block_size
        self.readonly = device.readonly
        self.calls: Counter[str] = Counter()
        self._hang_ops: frozenset[str] = frozenset()
        self._hang_ranges: list[tuple[int, int]] | None = None
        self._hanging = 0
        self._releases = 0
        # Protects the four above and `calls`; signalled when a call begins to hang, and when all
        # are let go. Nothing is called while it is held.
        self._changed = threading.Condition()

    @property
    def table_name(self) -> str:
        """The word of the device below, unless this one has a name of its own."""
        return self.device.table_name if self.name == self.device.name else self.name

    def fail(self, at: int = 1, **how: object) -> Fault:
        """Replace the fault: the at-th matching call from now on fails; see `Fault`."""
        self.fault = Fault(at, **how)
        return self.fault

    def heal(self) -> None:
        """Fail nothing from now on."""
        self.fault.heal()

    def hang(
        self, ops: Iterable[str] = OPS, ranges: Iterable[tuple[int, int]] | None = None
    ) -> None:
        """Hold calls of these operations that touch these ranges (bytes) until `release`."""
        with self._changed:
            self._hang_ops = frozenset(ops)
            self._hang_ranges = None if ranges is None else list(ranges)

    def release(self) -> None:
        """Let go of the calls that hang and hold no more."""
        with self._changed:
            self._hang_ops = frozenset()
            self._releases += 1
            self._changed.notify_all()

    @property
    def hanging(self) -> int:
        """The number of calls that hang now."""
        return self._hanging

    def wait_hanging(self, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until at least `count` calls hang.

        Raises:
            TimeoutError: fewer do after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._hanging >= count, timeout):
                raise TimeoutError(f"{self.name}: {self._hanging} calls hang (expected {count})")

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read, unless the fault strikes."""
        self._pass("read", offset, total(buffers))
        self.device.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write, unless the fault strikes; with `partial` half of it then."""
        length = total(buffers)
        try:
            self._pass("write", offset, length)
        except OSError:
            unit = max(512, self.block_size.minimum)
            half = length // 2 // unit * unit
            if self.fault.partial and half:
                self.device.pwritev(slices(buffers, 0, half), offset)
            raise
        self.device.pwritev(buffers, offset, fua=fua)

    def flush(self) -> None:
        """Flush, unless the fault strikes."""
        self._pass("flush", 0, 0)
        self.device.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard, unless the fault strikes."""
        self._pass("discard", offset, length)
        self.device.discard(offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Write zeroes, unless the fault strikes."""
        self._pass("zero", offset, length)
        self.device.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Pass the extents on, unless the fault strikes."""
        self._pass("extents", offset, length)
        return self.device.extents(offset, length)

    def close(self) -> None:
        """Close the device below."""
        self.device.close()

    # What every call does first: count, crawl, hang, fail.
    def _pass(self, op: str, offset: int, length: int) -> None:
        with self._changed:
            self.calls[op] += 1
        if self.delay:
            time.sleep(self.delay)
        with self._changed:
            if self._hangs(op, offset, length):
                self._hanging += 1
                self._changed.notify_all()
                releases = self._releases
                self._changed.wait_for(lambda: self._releases != releases)
                self._hanging -= 1
        if self.fault.strikes(op, offset, length):
            raise DeviceError(
                self.fault.error,
                f"{self.name}: {op} of {length} bytes at {offset}: {os.strerror(self.fault.error)}",
                device=self.name,
                offset=offset,
            )

    # Whether a call of this kind is held at the moment.
    def _hangs(self, op: str, offset: int, length: int) -> bool:
        if op not in self._hang_ops:
            return False
        if self._hang_ranges is None:
            return True
        end = offset + length
        return any(offset < at + size and at < end for at, size in self._hang_ranges)


def every_fault(limit: int = 10_000, **how: object) -> Iterator[Fault]:
    """Walk through every single failure: the first call, the second, ... until none fails.

    The body runs the same work each time, against devices that carry the fault it is given:

        for fault in every_fault(ops=["write", "flush"]):
            device = build(FaultyDevice(leg, fault))
            try:
                work(device)
            except OSError as error:
                assert error.errno == fault.error
            check(leg)

    The last round runs with a fault that is never reached, so the body must also hold without.

    Args:
        limit: rounds, as a guard.
        how: passed to `Fault`; `forever` not given means once and for ever, one after the other.

    Raises:
        AssertionError: something still fails after `limit` rounds.
    """
    for forever in [how.pop("forever")] if "forever" in how else [False, True]:
        for at in range(1, limit + 1):
            fault = Fault(at, forever=forever, **how)
            yield fault
            if not fault.hits:
                break
        else:
            raise AssertionError(f"calls still fail after {limit} rounds")
