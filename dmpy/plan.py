"""Where the bytes of a device really are: segments, and who is on them.

A table is loaded in lines and used in segments. A linear line stands for the segments of the
device below it, so that a stack of any depth costs one look-up; every other target stays a layer
of its own, and its legs point through linear devices in the same way. What is passed over like
this is noted in the segment's lane: when the device that was passed over is suspended, whoever
passed over it gets a new plan, and the requests that are still on the old lanes are waited for.

A request (1) picks a segment of the current plan, (2) enters its lane, (3) checks that the plan
is still the current one and begins anew otherwise, (4) moves bytes, (5) leaves. So after a plan
has been replaced nobody new moves bytes by it, and once its lanes are empty nobody does.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from dmpy.device import BlockDevice, Buffers, Extent
from dmpy.errors import DeviceError

__all__ = [
    "Gate",
    "Lane",
    "Plan",
    "Requeue",
    "Segment",
    "beyond_the_end",
    "drain",
    "rest_until",
    "segments_of",
]

_FOREVER = 1 << 64

# Lanes, and the figures that devices keep, are counted without locks; see Lane.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise ImportError("dmpy counts requests under Python's global lock, which this Python lacks")


class Lane:
    """Counts the requests under way on segments that pass over the same devices.

    Whoever uses such a segment does `lane.entered += 1` before, and `lane.left += 1` after, also
    when it failed. That is safe without a lock: CPython lets another thread run at calls and at
    backward jumps, and there is none between loading and storing the number of a slot. A lock would
    cost 350 ns a request, an atomic itertools.count 70 ns, this 30 ns.

    Attributes:
        passed: the mapped devices that are passed over.
        entered: requests that ever entered.
        left: requests that ever left.
    """

    __slots__ = ("entered", "left", "passed")

    def __init__(self, passed: frozenset[BlockDevice] = frozenset()) -> None:
        self.passed = passed
        self.entered = 0
        self.left = 0

    @property
    def in_flight(self) -> int:
        """Requests that entered and have not left."""
        # In this order: were the lane read as empty, it was empty when `left` was read.
        left = self.left
        return self.entered - left


class Segment:
    """Bytes begin .. end-1 of a device are bytes begin+skew .. end+skew-1 of the one below.

    Attributes:
        begin: bytes from the start of the device above.
        end: bytes from the start of the device above.
        device: a leaf, a target, or a mapped device that cannot be passed over.
        skew: bytes to add to an offset to get the offset on `device`.
        lane: the lane to be on while using the segment.
        fd: as the device has it.
    """

    __slots__ = (
        "begin",
        "device",
        "end",
        "fd",
        "lane",
        "preadv",
        "pwritev",
        "read_spot",
        "skew",
        "write_spot",
    )

    def __init__(
        self, begin: int, end: int, device: BlockDevice, skew: int, lane: Lane
    ) -> None:
        self.begin = begin
        self.end = end
        self.device = device
        self.skew = skew
        self.lane = lane
        self.fd = device.fd
        # Bound once, for the request path.
        self.preadv = device.preadv
        self.pwritev = device.pwritev
        self.read_spot = device.read_spot
        self.write_spot = device.write_spot

    def __repr__(self) -> str:
        return f"Segment({self.begin}, {self.end}, {self.device.name}, {self.skew})"


class Plan(Lane):
    """The segments of a device, in order and without gaps, compiled for look-up.

    It is itself a lane, for requests that use it and never wait for a suspended device on the way:
    whoever is on it may be on any of its segments, and on the legs of their targets.

    Args:
        owner: the device.
        segments: all of it; neighbours that are one stretch below become one segment.

    Attributes:
        first_end: the end of the first segment if that leads to a file descriptor, else 0: many
            devices are one such segment, which is found here without a look-up.
        first_fd: its descriptor.
        first_skew: its skew.
        writable: the device is.
        segments: the segments, then one more that refuses whatever lies beyond the end.
        ends: the end of each segment but that last one, for bisect.
        lanes: all lanes that requests may be on.
        size: bytes.
        running: requests may go on; False for a Gate.
    """

    __slots__ = (
        "_flushes",
        "ends",
        "first_end",
        "first_fd",
        "first_skew",
        "lanes",
        "segments",
        "size",
        "writable",
    )

    running = True

    def __init__(self, owner: BlockDevice, segments: list[Segment]) -> None:
        segments = _merged(segments)
        self.size = segments[-1].end if segments else 0
        self.ends = [segment.end for segment in segments]
        self.segments = segments
        segments.append(Segment(self.size, _FOREVER, _Beyond(owner), 0, Lane()))
        self.lanes = {segment.lane for segment in segments}
        legs = [leg for segment in segments for leg in getattr(segment.device, "legs", ())]
        lanes = self.lanes | {leg.segment.lane for leg in legs}
        super().__init__(frozenset().union(*(lane.passed for lane in lanes)))
        first = segments[0]
        self.first_fd = first.fd
        self.first_end = first.end if first.fd >= 0 else 0
        self.first_skew = first.skew
        self.writable = not owner.readonly
        self._flushes: list[tuple[Lane, list[BlockDevice]]] | None = None

    def wait(self) -> None:
        """Wait until requests may go on; called by those who find that the plan has changed."""

    def cut(self, begin: int, end: int) -> Iterator[Segment]:
        """Yield the segments that hold bytes begin .. end-1, whole, the refusing one too."""
        for place in range(bisect_right(self.ends, begin), len(self.segments)):
            segment = self.segments[place]
            if segment.begin >= end:
                break
            yield segment

    def flushes(self) -> list[tuple[Lane, list[BlockDevice]]]:
        """Return every device below once, by the lane to be on for flushing it."""
        if self._flushes is None:
            lanes: dict[BlockDevice, Lane] = {}
            for segment in self.segments:
                lanes.setdefault(segment.device, segment.lane)
            devices: dict[Lane, list[BlockDevice]] = {}
            for device, lane in lanes.items():
                devices.setdefault(lane, []).append(device)
            self._flushes = list(devices.items())
        return self._flushes


# Neighbours that are one stretch below become one segment.
def _merged(segments: list[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if merged:
            last = merged[-1]
            if (
                last.device is segment.device
                and last.skew == segment.skew
                and last.lane is segment.lane
            ):
                last.end = segment.end
                continue
        merged.append(segment)
    return merged


class Gate(Plan):
    """The plan of a device on which requests have to wait; those who do are on it as a lane."""

    __slots__ = ("_opened", "_refusal")

    running = False

    def __init__(self, owner: BlockDevice) -> None:
        super().__init__(owner, [])
        self._opened = threading.Event()
        self._refusal: DeviceError | None = None

    def wait(self) -> None:
        """Wait until the gate is opened: the device has another plan by then.

        Raises:
            OSError: the requests are to fail.
        """
        self.entered += 1
        try:
            self._opened.wait()
        finally:
            self.left += 1
        if self._refusal is not None:
            raise self._refusal.again()

    def open(self) -> None:
        """Let everybody go on, after the device has another plan."""
        self._opened.set()

    def refuse(self, refusal: DeviceError) -> None:
        """Fail everybody who waits or comes later."""
        self._refusal = refusal
        self._opened.set()


class Requeue(DeviceError):
    """A request that a target gives back undone, being suspended without flush.

    Whoever found the target in a plan makes the request again once there is another plan.
    """

    def __init__(self) -> None:
        super().__init__(errno.EAGAIN, "request is given back for the next table")


class _Beyond(BlockDevice):
    """What follows the last byte of a device: every request fails."""

    def __init__(self, owner: BlockDevice) -> None:
        self.name = owner.name
        self.size = 0
        self._owner = owner

    def preadv(self, buffers: Buffers, offset: int) -> None:
        beyond_the_end(self._owner, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        beyond_the_end(self._owner, offset)

    def flush(self) -> None:
        """There is nothing to flush."""

    def discard(self, offset: int, length: int) -> None:
        beyond_the_end(self._owner, offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        beyond_the_end(self._owner, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        beyond_the_end(self._owner, offset)


def beyond_the_end(device: BlockDevice, offset: int) -> NoReturn:
    """Refuse a request that is not inside the device, with EIO as the kernel does."""
    raise DeviceError(
        errno.EIO,
        f"{device.name}: request at byte {offset} is outside the device (size {device.size})",
        device=device.name,
        offset=offset,
    )


def segments_of(
    device: BlockDevice, start: int, length: int, at: int, lanes: dict[frozenset, Lane]
) -> list[Segment]:
    """Find where a window of a device really is.

    Args:
        device: the device that a table names.
        start: bytes, where the window begins on it.
        length: bytes of the window.
        at: bytes, where the window begins on the device above.
        lanes: lanes of the plan being made, by what they pass over; added to.

    Returns:
        Segments that fill bytes at .. at+length-1 of the device above: those of the device below
        where it is a mapped device that can be passed over, else one that leads to it.
    """
    below: Plan | None = getattr(device, "plan_to_pass", None)
    if below is None:
        return [Segment(at, at + length, device, start - at, _lane(lanes, frozenset()))]
    found = []
    passing: dict[Lane, Lane] = {}
    for lower in below.cut(start, start + length):
        lane = passing.get(lower.lane)
        if lane is None:
            lane = _lane(lanes, lower.lane.passed | {device})
            passing[lower.lane] = lane
        begin = max(lower.begin, start)
        end = min(lower.end, start + length)
        shift = at - start
        found.append(
            Segment(begin + shift, end + shift, lower.device, lower.skew - shift, lane)
        )
    return found


# The lane of a plan for segments that pass over the same devices.
def _lane(lanes: dict[frozenset, Lane], passed: frozenset) -> Lane:
    lane = lanes.get(passed)
    if lane is None:
        lane = lanes[passed] = Lane(passed)
    return lane


def drain(lanes: Iterable[Lane]) -> None:
    """Wait until nobody is on the lanes of plans that have been replaced."""
    for lane in lanes:
        # Nobody tells that he leaves, the request path is too short for that.
        rest_until(lambda lane=lane: not lane.in_flight)


def rest_until(true: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of: look again, ever less often."""
    pause = 20e-6
    while not true():
        time.sleep(pause)
        pause = min(pause * 2, 1e-3)
