"""The shortest way from a client's request to a system call."""

from __future__ import annotations

import os
from bisect import bisect_right
from time import perf_counter_ns
from typing import Protocol

from dmpy.device import Buffers
from dmpy.plan import Plan
from dmpy.stats import SAMPLE, Counts, Stats

__all__ = ["Openable", "Opening"]

# Bound here because each look-up in `os` is 3 % of a request.
_lseek, _preadv, _pwrite, _SEEK_END = os.lseek, os.preadv, os.pwrite, os.SEEK_END

assert SAMPLE & (SAMPLE - 1) == 0
_UNTIMED = SAMPLE - 1


class Openable(Protocol):
    """What an opening needs of its device."""

    stats: Stats

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as BlockDevice.preadv() does."""

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as BlockDevice.pwritev() does."""

    def add_opening(self, opening: Opening) -> None:
        """Keep an opening's plan that of the device, and its counts among the device's."""

    def drop_opening(self, opening: Opening) -> None:
        """Forget an opening that makes no more requests; what it counted stays counted."""


class Opening(Counts):
    """Somebody who has a mapped device open.

    `read` and `write` do what preadv and pwritev of the device do, for one buffer, where that is
    one request to a file descriptor. All else goes to `read_slowly` and `write_slowly`; so do
    requests that failed or came short, to be made again by the device, which says what is wrong.

    What takes this way never waits for a suspended device, so a plan is the lane for all of it: see
    plan.py for the protocol. The request path touches as few objects as it can: between two
    requests the kernel empties the processor's caches, so each costs more than its instructions.

    Args:
        device: the device; close() ends the opening.
        largest: bytes of the largest request that need not go the slow way; 0 for none.

    Attributes:
        plan: that of the device, which keeps it so.
    """

    __slots__ = ("device", "largest", "plan")

    plan: Plan

    def __init__(self, device: Openable, largest: int) -> None:
        super().__init__()
        self.device = device
        self.largest = largest
        device.add_opening(self)

    def close(self) -> None:
        """Make no more requests."""
        self.device.drop_opening(self)

    def read(self, view: memoryview, offset: int, flags: int = 0) -> None:
        """Fill a view.

        Args:
            view: writable, of bytes.
            offset: bytes from the start of the device, not negative.
            flags: have no meaning.
        """
        plan = self.plan
        plan.entered += 1
        moved = fd = -1
        try:
            length = len(view)
            end = offset + length
            if end <= plan.first_end:
                fd = plan.first_fd
                place = offset + plan.first_skew
            else:
                segment = plan.segments[bisect_right(plan.ends, offset)]
                if end <= segment.end:
                    fd = segment.fd
                    place = offset + segment.skew
                    if fd < 0:
                        fd, place = segment.read_spot(place, length)
            if fd >= 0 and plan is self.plan and length <= self.largest:
                if self.reads & _UNTIMED:
                    moved = _preadv(fd, (view,), place)
                else:
                    begun = perf_counter_ns()
                    moved = _preadv(fd, (view,), place)
                    bucket = (perf_counter_ns() - begun).bit_length()
                    self.device.stats.read_histogram[bucket] += SAMPLE
        except OSError:
            moved = -1  # the device will say what is wrong
        finally:
            plan.left += 1
        if moved == length:
            self.reads += 1
            self.read_bytes += length
        else:
            self.read_slowly(view, offset)

    def write(self, view: memoryview, offset: int, flags: int = 0) -> None:
        """Write a view.

        Args:
            view: of bytes.
            offset: bytes from the start of the device, not negative.
            flags: not 0 when the bytes must be durable on return.
        """
        plan = self.plan
        plan.entered += 1
        moved = fd = -1
        try:
            length = len(view)
            end = offset + length
            if end <= plan.first_end:
                fd = plan.first_fd
                place = offset + plan.first_skew
            else:
                segment = plan.segments[bisect_right(plan.ends, offset)]
                if end <= segment.end:
                    fd = segment.fd
                    place = offset + segment.skew
                    if fd < 0:
                        fd, place = segment.write_spot(place, length)
            if (
                fd >= 0
                and plan is self.plan
                and length <= self.largest
                and not flags
                and plan.writable
                # A write must not make a file longer again that somebody has cut short.
                and _lseek(fd, 0, _SEEK_END) >= place + length
            ):
                if self.writes & _UNTIMED:
                    moved = _pwrite(fd, view, place)
                else:
                    begun = perf_counter_ns()
                    moved = _pwrite(fd, view, place)
                    bucket = (perf_counter_ns() - begun).bit_length()
                    self.device.stats.write_histogram[bucket] += SAMPLE
        except OSError:
            moved = -1  # the device will say what is wrong
        finally:
            plan.left += 1
        if moved == length:
            self.writes += 1
            self.write_bytes += length
        else:
            self.write_slowly(view, offset, flags != 0)

    def read_slowly(self, view: memoryview, offset: int) -> None:
        """Fill a view by the device's own means."""
        self.device.preadv([view], offset)

    def write_slowly(self, view: memoryview, offset: int, fua: bool) -> None:
        """Write a view by the device's own means."""
        self.device.pwritev([view], offset, fua=fua)
