"""A mapped device: a name, a live and an inactive table, and the requests that go through them.

Source: Linux v6.12 drivers/md/dm.c, dm_suspend(), dm_resume(), dm_swap_table(); dm-ioctl.c,
do_suspend(), do_resume(), table_load().
"""

from __future__ import annotations

import errno
import logging
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic, perf_counter_ns

from dmpy.device import BlockDevice, BlockSize, Buffers, Extent, slices, total
from dmpy.errors import DeviceError
from dmpy.opening import Opening
from dmpy.plan import (
    Gate,
    Lane,
    Plan,
    Requeue,
    Segment,
    beyond_the_end,
    drain,
    rest_until,
    segments_of,
)
from dmpy.stats import Stats
from dmpy.table import Table, no_garbage_collection, split_args
from dmpy.target import Target
from dmpy.units import SECTOR_SHIFT

__all__ = ["MAJOR", "MappedDevice"]

_log = logging.getLogger("dmpy")

MAJOR = 253
"""The major number that mapped devices have, device-mapper's usual one."""


class MappedDevice(BlockDevice):
    """A device made of a table; made by Mapper.create().

    Requests go through the plan that was made of the live table. `load` makes an inactive table,
    `resume` puts it to use, `suspend` holds requests back: those under way come to an end, new ones
    wait until `resume`.

    Locks: `life` lets one thread at a time change this device; `topology`, shared by all devices of
    a mapper, protects plans, tables and holders and may be taken under `life`, never the other way
    round. Of two devices' `life`, that of the upper one is taken first. No I/O is done under
    `topology`.

    Args:
        name: as people call it.
        minor: its number.
        uuid: empty, or unique.
        topology: the lock that all devices of a mapper share.
        release: gives back the devices that a table holds.

    Attributes:
        life: see above.
        holders: the mapped devices whose tables use this one, with how many tables each.
        deferred_remove: it goes when nobody has it open any more.
        on_last_close: called then.
    """

    def __init__(
        self,
        name: str,
        minor: int,
        uuid: str = "",
        *,
        topology: threading.RLock,
        release: Callable[[MappedDevice, Table], None],
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.major = MAJOR
        self.minor = minor
        self.size = 0
        self.live: Table | None = None
        self.inactive: Table | None = None
        self.suspended = False
        self.removed = False
        self.deferred_remove = False
        self.on_last_close: Callable[[MappedDevice], None] | None = None
        self.holders: Counter[MappedDevice] = Counter()
        self.event_nr = 0
        self.stats = Stats(lambda: self.in_flight)
        self._openers = 0
        self._openings: set[Opening] = set()
        self.life = threading.RLock()
        self._topology = topology
        self._release = release
        self._events = threading.Condition()
        self._plan: Plan = Plan(self, [])
        # Lanes of plans that have been replaced, as long as somebody is on them.
        self._retired: set[Lane] = set()
        # Legs whose failure has been logged since the table was put to use.
        self._logged: set[str | None] = set()

    def __repr__(self) -> str:
        return f"<MappedDevice {self.name} {self.table_name}>"

    @property
    def table_name(self) -> str:
        """The device number, as the kernel prints it."""
        return f"{self.major}:{self.minor}"

    # Requests

    def preadv(self, buffers: Buffers, offset: int) -> None:
        begun = perf_counter_ns()
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        segment = self._enter(offset)
        try:
            whole = offset + length <= segment.end and offset >= 0
            if whole:
                segment.preadv(buffers, offset + segment.skew)
        except Requeue:
            whole = None
        except OSError as error:
            self._note_failure(segment, error)
            raise
        finally:
            segment.lane.left += 1
        if whole is None:
            self._rest(segment)
            self.preadv(buffers, offset)
            return
        if not whole:
            self._read_pieces(buffers, offset, length)
        stats = self.stats
        stats.counts.reads += 1
        stats.counts.read_bytes += length
        stats.read_histogram[(perf_counter_ns() - begun).bit_length()] += 1

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        begun = perf_counter_ns()
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        segment = self._enter(offset)
        try:
            if self.readonly:
                self._refuse_write(offset)
            whole = offset + length <= segment.end and offset >= 0
            if whole:
                segment.pwritev(buffers, offset + segment.skew, fua=fua)
        except Requeue:
            whole = None
        except OSError as error:
            self._note_failure(segment, error)
            raise
        finally:
            segment.lane.left += 1
        if whole is None:
            self._rest(segment)
            self.pwritev(buffers, offset, fua=fua)
            return
        if not whole:
            self._write_pieces(buffers, offset, length, fua)
        stats = self.stats
        stats.counts.writes += 1
        stats.counts.write_bytes += length
        stats.write_histogram[(perf_counter_ns() - begun).bit_length()] += 1

    # The segment at an offset, on whose lane the request is from now on.
    def _enter(self, offset: int) -> Segment:
        while True:
            plan = self._plan
            segment = plan.segments[bisect_right(plan.ends, offset)]
            segment.lane.entered += 1
            if plan is self._plan and plan.running:
                return segment
            segment.lane.left += 1
            plan.wait()

    # Wait, after a request was given back, until this segment has been replaced.
    def _rest(self, segment: Segment) -> None:
        rest_until(lambda: segment not in self._plan.segments)

    # A request that is not within one segment.
    def _read_pieces(self, buffers: Buffers, offset: int, length: int) -> None:
        self._each(
            offset,
            length,
            lambda segment, place, done, piece: segment.preadv(
                slices(buffers, done, piece), place
            ),
        )

    def _write_pieces(self, buffers: Buffers, offset: int, length: int, fua: bool) -> None:
        self._each(
            offset,
            length,
            lambda segment, place, done, piece: segment.pwritev(
                slices(buffers, done, piece), place, fua=fua
            ),
        )

    def discard(self, offset: int, length: int) -> None:
        supported: list[bool] = []

        def discard(segment: Segment, place: int, done: int, piece: int) -> None:
            try:
                segment.device.discard(place, piece)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                supported.append(False)
            else:
                supported.append(True)

        self._each(offset, length, discard, writes=True)
        # As in the kernel, a device takes discards when any of its targets does.
        if not any(supported):
            raise DeviceError(errno.EOPNOTSUPP, f"{self.name}: discard is not supported")
        self.stats.discards += 1

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Make the range read as zeroes; where `fast_only` fails, a part of it may already."""
        self._each(
            offset,
            length,
            lambda segment, place, done, piece: segment.device.write_zeroes(
                place, piece, may_unmap=may_unmap, fast_only=fast_only
            ),
            writes=True,
        )
        self.stats.zeroes += 1

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        found: list[Extent] = []

        def look(segment: Segment, place: int, done: int, piece: int) -> None:
            skew = segment.skew
            found.extend(
                Extent(extent.offset - skew, extent.length, extent.kind)
                for extent in segment.device.extents(place, piece)
            )

        self._each(offset, length, look)
        return iter(found)

    def flush(self) -> None:
        self.flush_besides(set())

    def flush_besides(self, flushed: set[BlockDevice]) -> None:
        """Flush, but for what has been flushed already.

        Args:
            flushed: devices below; those that are flushed are added.
        """
        first: OSError | None = None
        plan = None
        while plan is not self._plan and first is None:
            plan = self._plan
            replaced = False
            for lane, devices in plan.flushes():
                lane.entered += 1
                try:
                    # Begin anew with the plan that there is now: it may have other devices.
                    if plan is not self._plan or not plan.running:
                        break
                    first = _flush([each for each in devices if each not in flushed]) or first
                    flushed.update(devices)
                except Requeue:
                    replaced = True
                    break
                finally:
                    lane.left += 1
            if replaced:
                rest_until(lambda plan=plan: self._plan is not plan)
            if first is None:
                plan.wait()
        if first is not None:
            self.stats.errors += 1
            raise first
        self.stats.flushes += 1

    # The slow path of every request: piece by piece, each on its own lane.
    # act(segment, offset on the segment's device, bytes done before, bytes of the piece)
    def _each(
        self,
        offset: int,
        length: int,
        act: Callable[[Segment, int, int, int], None],
        *,
        writes: bool = False,
    ) -> None:
        begin = offset
        end = offset + length
        while offset < end:
            segment = self._enter(offset)
            try:
                if begin < 0 or end > self.size:
                    beyond_the_end(self, begin)
                if writes and self.readonly:
                    self._refuse_write(begin)
                piece = min(end, segment.end) - offset
                act(segment, offset + segment.skew, offset - begin, piece)
                offset += piece
                continue
            except Requeue:
                pass  # made again, when the plan has changed
            except OSError as error:
                self._note_failure(segment, error)
                raise
            finally:
                segment.lane.left += 1
            self._rest(segment)

    # Refuse a write to a read-only device.
    def _refuse_write(self, offset: int) -> None:
        raise DeviceError(
            errno.EROFS, f"{self.name} is read-only", device=self.name, offset=offset
        )

    # Count a failed request, and log a failed leg once.
    def _note_failure(self, segment: Segment, error: OSError) -> None:
        self.stats.errors += 1
        if error.errno in (errno.EOPNOTSUPP, errno.EROFS):
            return
        leg = getattr(error, "device", None) or segment.device.name
        if leg not in self._logged:
            self._logged.add(leg)
            reason = error.strerror or str(error)
            known = reason.startswith(f"{leg}: ")
            _log.error("%s: %s%s", self.name, "" if known else f"{leg}: ", reason)

    @property
    def in_flight(self) -> int:
        """Requests that are under way or wait for the device to be resumed."""
        plan = self._plan
        return sum(lane.in_flight for lane in {plan, *plan.lanes, *self._retired})

    # Tables

    def load(self, table: Table) -> None:
        """Make a table the inactive one; the one that was there is dropped."""
        with self.life:
            self._alive()
            with self._topology:
                old, self.inactive = self.inactive, table
            if old is not None:
                self._release(self, old)

    def clear(self) -> None:
        """Drop the inactive table."""
        with self.life:
            self._alive()
            with self._topology:
                old, self.inactive = self.inactive, None
            if old is not None:
                self._release(self, old)

    def suspend(self, *, noflush: bool = False) -> None:
        """Hold requests back; returns when none is under way.

        As in the kernel nothing is flushed to the devices below: who wants that, flushes first.

        Args:
            noflush: what targets hold back waits for the table that is resumed next, else it fails.
        """
        with self.life:
            self._alive()
            if not self.suspended:
                self._quiesce(noflush)

    def resume(self) -> None:
        """Put the inactive table to use if there is one, and let requests go on.

        Raises:
            OSError: EINVAL when the device is suspended and has no table.
        """
        with self.life:
            self._alive()
            if self.inactive is None and not self.suspended:
                return
            table = self.inactive or self.live
            if table is None:
                raise DeviceError(errno.EINVAL, f"{self.name} has no table to resume")
            if not self.suspended:
                self._quiesce()
            for line in table.lines:
                line.target.event = self.trigger_event
                line.target.resume()
            gate = self._plan
            with self._topology, no_garbage_collection():
                old = self.live
                self.live, self.inactive = table, None
                self.suspended = False
                self.size = table.size
                self.block_size = table.block_size
                self.readonly = table.readonly
                self._logged.clear()
                self._compile()
                for holder in self._holders_upward():
                    holder._compile()
            assert isinstance(gate, Gate)
            gate.open()
            if old is not None and old is not table:
                self._release(self, old)

    # Bring I/O to an end and put up the gate.
    def _quiesce(self, noflush: bool = False) -> None:
        targets = self._targets()
        for target in targets:
            target.noflush = noflush
            target.presuspend()
        with self._topology:
            busy = self._put_up(Gate(self))
        drain(busy)
        self._come_to_rest(targets)

    # After the last request. A target that cannot must not keep the device from being repaired.
    def _come_to_rest(self, targets: list[Target]) -> None:
        for target in targets:
            try:
                target.postsuspend()
            except OSError as error:
                _log.error("%s: %s: %s", self.name, target.name, error.strerror or error)

    # The targets of the live table, under `life`.
    def _targets(self) -> list[Target]:
        return [line.target for line in self.live.lines] if self.live else []

    def presuspend(self) -> None:
        """Let targets end their background work and hold no request back; I/O still flows."""
        with self.life:
            for target in self._targets():
                target.noflush = False
                target.presuspend()

    # Put a gate up, under `topology`; returns the lanes of those who may still be on what is below.
    def _put_up(self, gate: Gate) -> list[Lane]:
        self.suspended = True
        replaced = self._use(gate)
        legs = [leg for line in self.live.lines for leg in line.target.legs] if self.live else []
        self._retire({replaced, *replaced.lanes, *(leg.segment.lane for leg in legs)})
        # Whoever passes over this device has to come through it from now on. Those who are on
        # their way already are waited for.
        holders = self._holders_upward()
        for holder in holders:
            holder._compile()
        return list(self._retired) + [
            lane for holder in holders for lane in holder._retired if self in lane.passed
        ]

    # Remember the lanes of a plan that has been replaced, as long as there is somebody on them.
    def _retire(self, lanes: set[Lane]) -> None:
        self._retired = {lane for lane in self._retired | lanes if lane.in_flight}

    @property
    def plan_to_pass(self) -> Plan | None:
        """The plan, where devices above may use it as theirs: running, and writable."""
        passable = self.live is not None and not self.suspended and not self.readonly
        return self._plan if passable else None

    # Make a plan of the live table, under `topology`, if the device runs.
    def _compile(self) -> None:
        if self.live is None or self.suspended:
            return
        replaced: set[Lane] = set()
        lanes: dict[frozenset, Lane] = {}
        segments: list[Segment] = []
        here = Lane()
        for line in self.live.lines:
            target = line.target
            begin = line.begin << SECTOR_SHIFT
            if target.transparent:
                leg = target.legs[0]
                segments += segments_of(leg.device, leg.start, leg.length, begin, lanes)
                continue
            segments.append(Segment(begin, begin + target.size, target, -begin, here))
            for leg in target.legs:
                found = segments_of(leg.device, leg.start, leg.length, 0, {})
                if len(found) != 1:
                    found = [Segment(0, leg.length, leg.device, leg.start, Lane())]
                replaced.add(leg.segment.lane)
                leg.segment = found[0]
        old = self._use(Plan(self, segments))
        self._retire({old, *old.lanes, *replaced})

    # Take another plan, under `topology`; returns the one that there was.
    def _use(self, plan: Plan) -> Plan:
        old, self._plan = self._plan, plan
        for opening in self._openings:
            opening.plan = plan
        return old

    # All devices above, lower ones first, under `topology`.
    def _holders_upward(self) -> list[MappedDevice]:
        order: list[MappedDevice] = []
        seen = {self}

        def visit(device: MappedDevice) -> None:
            for holder in device.holders:
                if holder not in seen:
                    seen.add(holder)
                    visit(holder)
                    order.append(holder)

        visit(self)
        return order[::-1]

    # Openers and events

    @property
    def open_count(self) -> int:
        """How many have the device open: clients, and tables of devices above."""
        return self._openers + self.holders.total()

    def open(self, *, writable: bool = False) -> None:
        """Count somebody who uses the device, until release().

        Raises:
            OSError: ENXIO when the device has been removed, EROFS when it is read-only.
        """
        with self._topology:
            self._alive()
            if writable and self.readonly:
                raise DeviceError(errno.EROFS, f"{self.name} is read-only", device=self.name)
            self._openers += 1

    def release(self) -> None:
        """Count him out again."""
        with self._topology:
            self._openers -= 1
            assert self._openers >= 0
        self.closed_by_somebody()

    def add_opening(self, opening: Opening) -> None:
        """Keep an opening's plan that of the device, and its counts among the device's."""
        with self._topology:
            self._openings.add(opening)
            self.stats.openings.add(opening)
            opening.plan = self._plan

    def drop_opening(self, opening: Opening) -> None:
        """Forget an opening that makes no more requests; what it counted stays counted."""
        with self._topology:
            self._openings.discard(opening)
            self.stats.fold(opening)

    def closed_by_somebody(self) -> None:
        """Go, if that was wanted and nobody has the device open any more."""
        if self.deferred_remove and not self.open_count and self.on_last_close is not None:
            self.on_last_close(self)

    # Refuse to go on with a device that has been removed.
    def _alive(self) -> None:
        if self.removed:
            raise DeviceError(errno.ENXIO, f"device {self.name} is gone", device=self.name)

    def trigger_event(self) -> None:
        """Wake up whoever waits for the device, dm_table_event()."""
        with self._events:
            self.event_nr += 1
            self._events.notify_all()

    def wait(self, event_nr: int | None = None, timeout: float | None = None) -> int:
        """Wait for an event, or for the device to be removed.

        Args:
            event_nr: return when the event counter is not this; None for the counter as it is.
            timeout: seconds, None for ever.

        Returns:
            The event counter.

        Raises:
            OSError: ETIMEDOUT.
        """
        deadline = None if timeout is None else monotonic() + timeout
        with self._events:
            seen = self.event_nr if event_nr is None else event_nr
            while self.event_nr == seen and not self.removed:
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise DeviceError(
                        errno.ETIMEDOUT, f"{self.name}: no event in {timeout} seconds"
                    )
                self._events.wait(left)
            return self.event_nr

    # What people ask about

    def table_lines(
        self, *, inactive: bool = False, showkeys: bool = False
    ) -> list[tuple[int, int, str, str]]:
        """Return (begin, len, type, arguments) of each line, none without a table."""
        table = self.inactive if inactive else self.live
        return table.table_lines(showkeys=showkeys) if table else []

    def status_lines(
        self, *, inactive: bool = False, noflush: bool = False
    ) -> list[tuple[int, int, str, str]]:
        """Return (begin, len, type, status) of each line, none without a table.

        Args:
            inactive: of the inactive table.
            noflush: do not commit what is pending first; no target here has anything pending.
        """
        table = self.inactive if inactive else self.live
        return table.status_lines() if table else []

    def table_text(self, *, inactive: bool = False, showkeys: bool = False) -> str:
        """Return the table's text, empty without a table."""
        table = self.inactive if inactive else self.live
        return table.text(showkeys=showkeys) if table else ""

    def status_text(self, *, inactive: bool = False, noflush: bool = False) -> str:
        """Return the status text, empty without a table."""
        table = self.inactive if inactive else self.live
        return table.status() if table else ""

    def deps(self, *, inactive: bool = False) -> list[tuple[int | None, int | None, str]]:
        """Return (major, minor, name) of the devices under a table, the last one named first.

        Numbers are None for what has none: files, memory, and devices of other servers.
        """
        table = self.inactive if inactive else self.live
        found: list[tuple[int | None, int | None, str]] = []
        for device in reversed(table.devices) if table else ():
            major, _, minor = device.table_name.partition(":")
            if major.isdecimal() and minor.isdecimal():
                found.append((int(major), int(minor), device.name))
            else:
                found.append((None, None, device.name))
        return found

    def message(self, sector: int, text: str) -> str:
        """Send a message to the target at a sector and return its reply.

        Raises:
            OSError: EINVAL when the message is empty or not known, or nothing is at that sector.
        """
        words = split_args(text)
        if not words:
            raise DeviceError(errno.EINVAL, f"{self.name}: message is empty")
        with self.life:
            self._alive()
            if words[0] == "@cancel_deferred_remove":
                self.deferred_remove = False
                return ""
            if words[0].startswith("@"):
                raise DeviceError(errno.EINVAL, f"{self.name}: unknown message {words[0]}")
            target = self.live.find(sector) if self.live else None
            if target is None:
                raise DeviceError(
                    errno.EINVAL, f"{self.name}: sector {sector} of the message has no target"
                )
            return target.message(*words)

    def info(self) -> dict[str, object]:
        """Return what `dmsetup info` tells, by name."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "major": self.major,
            "minor": self.minor,
            "size_sectors": self.size >> SECTOR_SHIFT,
            "open_count": self.open_count,
            "event_nr": self.event_nr,
            "targets": len(self.live.lines) if self.live else 0,
            "readonly": self.readonly,
            "suspended": self.suspended,
            "live_table": self.live is not None,
            "inactive_table": self.inactive is not None,
            "deferred_remove": self.deferred_remove,
            "block_size": list(self.block_size),
        }

    # End

    def refuse(self, refusal: DeviceError) -> None:
        """Fail those who wait for a suspended device, and whoever comes until it is resumed."""
        with self._topology:
            if isinstance(self._plan, Gate):
                self._plan.refuse(refusal)

    def shut(self, refusal: DeviceError) -> None:
        """Fail every request from now on; returns when none is under way."""
        # First those who wait, for whoever is changing the device may be waiting for them.
        self.refuse(refusal)
        with self.life:
            targets = [] if self.suspended else self._targets()
            for target in targets:
                target.noflush = False
                target.presuspend()
            with self._topology:
                gate = Gate(self)
                gate.refuse(refusal)
                busy = self._put_up(gate)
            drain(busy)
            self._come_to_rest(targets)

    def close(self) -> None:
        """Drop both tables, after shut()."""
        with self.life:
            with self._topology:
                self.removed = True
                tables = [table for table in (self.inactive, self.live) if table is not None]
                self.live = self.inactive = None
                self.size = 0
                self.block_size = BlockSize()
            for table in tables:
                self._release(self, table)
        # Outside the locks: whoever waits finds the device gone.
        self.trigger_event()


# Flush devices, all of them, and return the first error.
def _flush(devices: list[BlockDevice]) -> OSError | None:
    first: OSError | None = None
    for device in devices:
        try:
            device.flush()
        except Requeue:
            raise
        except OSError as error:
            first = first or error
    return first
