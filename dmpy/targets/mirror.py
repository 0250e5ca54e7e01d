"""mirror: each leg has all of the data; a log of regions says where legs may differ.

Table: begin len mirror log_type #log_args [log_arg]... #legs [device start_sector]...
[#features [feature]...]

Source: Linux v6.1 drivers/md/dm-raid1.c, dm-log.c, dm-region-hash.c.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic

import numpy as np

from dmpy import background
from dmpy.background import Job
from dmpy.device import DATA, BlockDevice, Buffers, Extent, slices, total
from dmpy.errors import DeviceError, FormatError
from dmpy.formats.mirror_log import BITS_OFFSET, Bits, LogHeader, MirrorLog, log_size
from dmpy.plan import Requeue
from dmpy.target import Args, Leg, Target
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE, ceil_div, exact_div, round_down, round_up

__all__ = ["CoreLog", "DiskLog", "Mirror"]

_logger = logging.getLogger("dmpy")

_MOST_LEGS = 9  # MAX_NR_MIRRORS
_MOST_REGIONS = (1 << 32) - 1
_FEATURES = ("handle_errors", "keep_log")

# What a leg did not do, the worst first: device_status_char().
_FLUSH, _WRITE, _SYNC, _READ = "FDSR"

# Bytes that are copied at once when legs are made equal.
_PIECE = 1 << 20
# A region is called clean in the log when it has not been written to for so many seconds.
_IDLE = 1.0
# Bits are kept in words of 64, as the kernel keeps them on machines of 64 bits.
_BITS_UNIT = 64

# Writes, zeroes or discards a piece of a leg: (leg, offset on the leg, length).
_Act = Callable[[Leg, int, int], None]


class CoreLog:
    """Which regions are in sync, in memory: all legs have to be made equal at each start.

    A log is used under its mirror's lock, but for load(), commit() and write().

    Args:
        region_size: bytes, a power of two.
        count: regions.
        sync: "sync" to make all equal anyway, "nosync" to take them as equal, or "".

    Attributes:
        sync_count: regions in sync.
    """

    kind = "core"
    durable = False

    def __init__(self, region_size: int, count: int, sync: str = "") -> None:
        self.region_size = region_size
        self.count = count
        self.sync = sync
        size = round_up(count, _BITS_UNIT) >> 3
        self._sync = bytearray(b"\xff" * size if sync == "nosync" else size)
        self.sync_count = count if sync == "nosync" else 0

    def bind(self, lock: threading.Condition, event: Callable[[], None]) -> None:
        """Take the mirror's lock, and what tells of a failed log."""

    def table(self) -> str:
        """Return the log's words in the table."""
        words = [str(exact_div(self.region_size, SECTOR_SIZE))]
        words += [self.sync] * bool(self.sync)
        words[:0] = self._device_words()
        return f"{self.kind} {len(words)} {' '.join(words)}"

    # The device, for logs that have one.
    def _device_words(self) -> list[str]:
        return []

    def status(self) -> str:
        """Return the log's words in the status."""
        return f"1 {self.kind}"

    def load(self) -> None:
        """Get ready for requests, at each resume."""

    def in_sync(self, region: int) -> bool:
        """Say whether all legs have the same in a region."""
        return bool(self._sync[region >> 3] >> (region & 7) & 1)

    def set_sync(self, region: int, in_sync: bool) -> None:
        """Say so."""
        if self.in_sync(region) != in_sync:
            self._sync[region >> 3] ^= 1 << (region & 7)
            self.sync_count += 1 if in_sync else -1

    def next_out_of_sync(self, region: int) -> int:
        """Return the first region from this one on that is not in sync, or `count`."""
        while region & 7 and region < self.count:
            if not self.in_sync(region):
                return region
            region += 1
        if region >= self.count:
            return self.count
        wholes = np.frombuffer(self._sync, np.uint8)
        step = 1 << 16
        for begin in range(region >> 3, len(wholes), step):
            window = wholes[begin : begin + step] != 0xFF
            if window.any():
                byte = begin + int(window.argmax())
                bits = self._sync[byte]
                return min(self.count, byte * 8 + next(n for n in range(8) if not bits >> n & 1))
        return self.count

    def mark(self, region: int) -> None:
        """Note that a region is going to be written to; durable after commit()."""

    def commit(self) -> bool:
        """Make marks durable; says whether that worked."""
        return True

    def clean(self, region: int) -> None:
        """Note that what was written to a region is durable on all legs."""

    def distrust(self) -> None:
        """Call no region clean any more: what legs were given may not be there."""

    def write(self, *, flush: bool = False) -> bool:
        """Write what is new in the log, durably with `flush`; says whether that worked."""
        return True


class DiskLog(CoreLog):
    """The same on a device: after a crash only regions that were written to are made equal.

    Args:
        device: has the log from its first byte on.
        region_size: bytes, a power of two.
        count: regions.
        sync: as for a CoreLog.
    """

    kind = "disk"
    durable = True

    def __init__(
        self, device: BlockDevice, region_size: int, count: int, sync: str = ""
    ) -> None:
        super().__init__(region_size, count, sync)
        self.device = device
        self._block = max(SECTOR_SIZE, device.block_size.minimum)
        self._image = bytearray(self.bytes_needed(device, count))
        # A bit is set where the region is clean. `sync` has the bits as they were, and what has
        # become of them; here a region is not clean while it is being written to.
        self._clean = memoryview(self._image)[BITS_OFFSET : BITS_OFFSET + len(self._sync)]
        self._clean[:] = b"\xff" * len(self._clean)
        self._failed = ""
        self._distrusted = False
        # The log is of a version that is not known, and is left alone.
        self._foreign = False
        # One thread at a time writes. Taken before the mirror's lock, never under it.
        self._writing = threading.Lock()
        # Under the mirror's lock: how often a bit has been cleared, and how many of those times
        # are durable; the bytes of the image that are new.
        self._marks = 0
        self._durable = 0
        self._new: tuple[int, int] | None = None

    @staticmethod
    def bytes_needed(device: BlockDevice, count: int) -> int:
        """Return how many bytes of a device a log of so many regions needs."""
        return log_size(count, max(SECTOR_SIZE, device.block_size.minimum))

    def bind(self, lock: threading.Condition, event: Callable[[], None]) -> None:
        """Take the mirror's lock, and what tells of a failed log."""
        self._lock = lock
        self._event = event

    def _device_words(self) -> list[str]:
        return [self.device.table_name]

    def status(self) -> str:
        return f"3 {self.kind} {self.device.table_name} {self._failed or 'A'}"

    def load(self) -> None:
        """Read the log, fit it to the number of regions, and write it back.

        A log that cannot be read makes every region count as written to.
        """
        known = self._read()
        used = ceil_div(self.count, 8)
        bits = Bits(self.count, np.frombuffer(self._clean[:used], np.uint8))
        if self.sync == "nosync":
            bits.set_range(known, self.count)
        else:
            bits.clear_range(known, self.count)
        self._clean[used:] = bytearray(len(self._clean) - used)
        self._sync[:] = self._clean
        self.sync_count = bits.total()
        self._image[:BITS_OFFSET] = bytearray(BITS_OFFSET)
        header = LogHeader(nr_regions=self.count).encode()
        self._image[: len(header)] = header
        with self._lock:
            self._marks += 1
            self._touch(0, len(self._image))
        if not self.device.readonly:
            self.commit()

    # Read the image; returns how many regions it knows.
    def _read(self) -> int:
        self._foreign = False
        try:
            self.device.preadv([memoryview(self._image)], 0)
            if self.sync or not MirrorLog.is_there(self._image):
                return 0
            header = LogHeader.decode(self._image, device=self.device.name)
        except FormatError as error:
            self._foreign = True
            self._fail("D", error)
            return 0
        except OSError as error:
            self._fail("D", error)
            return 0
        return min(header.nr_regions, self.count)

    def mark(self, region: int) -> None:
        """Note that a region is going to be written to; durable after commit()."""
        byte, bit = region >> 3, 1 << (region & 7)
        if self._clean[byte] & bit:
            self._clean[byte] ^= bit
            self._marks += 1
            self._touch(BITS_OFFSET + byte, 1)

    def clean(self, region: int) -> None:
        """Note that what was written to a region is durable on all legs."""
        byte, bit = region >> 3, 1 << (region & 7)
        if not self._distrusted and not self._clean[byte] & bit:
            self._clean[byte] |= bit
            self._touch(BITS_OFFSET + byte, 1)

    def distrust(self) -> None:
        """Call no region clean any more: what legs were given may not be there."""
        self._distrusted = True
        self._clean[:] = bytearray(len(self._clean))
        self._marks += 1
        self._touch(BITS_OFFSET, len(self._clean))

    # Note what the next write has to write, under the lock.
    def _touch(self, offset: int, length: int) -> None:
        begin = round_down(offset, self._block)
        end = round_up(offset + length, self._block)
        if self._new is not None:
            begin, end = min(begin, self._new[0]), max(end, self._new[1])
        self._new = begin, end

    def commit(self) -> bool:
        """Make marks durable; says whether that worked."""
        # Fast path: the regions are being written to already.
        return self._durable >= self._marks or self.write()

    def write(self, *, flush: bool = False) -> bool:
        """Write what is new in the log, durably with `flush`; says whether that worked."""
        # Who comes while another one writes finds his marks written then, or writes himself.
        with self._writing:
            with self._lock:
                marks, new = self._marks, self._new
                if new is None:
                    return True
                self._new = None
                begin, end = new
                # copy: bits change while the write is under way
                image = bytes(memoryview(self._image)[begin:end])
            failed = "D"
            try:
                if self._foreign:
                    raise DeviceError(errno.EIO, "log of an unknown version is left alone")
                self.device.pwritev([memoryview(image)], begin)
                failed = "F"
                if flush or marks > self._durable:
                    self.device.flush()
            except OSError as error:
                with self._lock:
                    self._touch(begin, end - begin)
                self._fail(failed, error)
                return False
            self._durable = marks
            return True

    # Note that the log's device failed; the first time is an event. A failed flush is the worse.
    def _fail(self, failed: str, error: Exception) -> None:
        news = not self._failed
        if self._failed != "F":
            self._failed = failed
        if news:
            _logger.error("mirror: log %s: %s", self.device.name, error)
            self._event()


# Zeroes cannot be had as fast as was asked, and nothing has happened: no failure of a leg.
class _Unsupported(Exception):
    pass


class Mirror(Target):
    """All data on every leg.

    A region that is in sync is written to on all legs, and read from the default leg, or from
    another one when that has failed. One that is not is read from and written to on the default
    leg only, until a job in the background has copied it to the others; writes to it wait for so
    long.

    Args:
        log: which regions are in sync.
        legs: sections of equal length.
        handle_errors: a write that fails on a leg is held back until the device is suspended, and
            another default leg is chosen when that one fails.
        keep_log: such a write succeeds instead, and the log keeps the region.

    Attributes:
        default: index of the leg that is read from.
        errors: how often each leg failed, since all were last in sync.
    """

    type_name = "mirror"
    version = (1, 14, 0)

    def __init__(
        self,
        log: CoreLog,
        legs: Sequence[Leg],
        *,
        handle_errors: bool = False,
        keep_log: bool = False,
    ) -> None:
        super().__init__(legs[0].length, legs)
        self.log = log
        self.handle_errors = handle_errors
        self.keep_log = keep_log
        self.default = 0
        self.errors = [0] * len(self.legs)
        self._kinds: list[set[str]] = [set() for _ in self.legs]
        # Protects all below, the two above and the log's bits; signalled when a region's writes
        # have ended, when a region is no longer being copied, and when the target is suspended.
        # Nothing else is taken under it, no I/O is done.
        self._lock = threading.Condition(threading.Lock())
        self._in_sync = log.sync == "nosync"
        self._leg_failed = False
        self._log_failed = False
        self._flush_failed = False
        self._suspending = False
        # Writes under way, by region.
        self._pending: dict[int, int] = {}
        # Regions that nobody writes to but that the log does not call clean: since when.
        self._idle: dict[int, float] = {}
        # Regions written to since the legs were last flushed.
        self._unflushed: set[int] = set()
        # The region being copied, or -1, and the one to look at next.
        self._recovering = -1
        self._next = 0
        self._job: Job | None = None
        log.bind(self._lock, lambda: self.event())

    # Table and status

    @classmethod
    def parse(cls, args: Args, length: int) -> Mirror:
        """Read `log_type #log_args log_args #legs [device start]... [#features features]`."""
        log = _parse_log(args, length)
        count = args.integer("number of legs", 2, _MOST_LEGS)
        if args.remaining < 2 * count:
            args.fail(
                f"{count} legs need {2 * count} arguments, device and start sector each "
                f"(got {args.remaining})",
                "legs",
            )
        legs = [args.leg(length) for _ in range(count)]
        features = _parse_features(args)
        args.end()
        mirror = cls(
            log,
            legs,
            handle_errors="handle_errors" in features,
            keep_log="keep_log" in features,
        )
        if log.region_size % mirror.block_size.minimum:
            args.fail(
                f"region size must be a multiple of the legs' blocks of "
                f"{mirror.block_size.minimum} bytes "
                f"(got {log.region_size >> SECTOR_SHIFT} sectors)",
                "region size in sectors",
            )
        return mirror

    def table(self) -> str:
        """Return the arguments, features in the kernel's order."""
        legs = " ".join(leg.table() for leg in self.legs)
        features = [name for name in _FEATURES if getattr(self, name)]
        words = [self.log.table(), str(len(self.legs)), legs]
        if features:
            words += [str(len(features)), *features]
        return " ".join(words)

    def status(self) -> str:
        """Return `legs [device]... in_sync/regions 1 health log_status`."""
        devices = " ".join(leg.device.table_name for leg in self.legs)
        log = self.log
        return (
            f"{len(self.legs)} {devices} {log.sync_count}/{log.count} 1 {self.health} "
            f"{log.status()}"
        )

    @property
    def health(self) -> str:
        """A letter for each leg: A alive; failed: F a flush, D a write, S a copy, R a read."""
        return "".join(
            next((kind for kind in (_FLUSH, _WRITE, _SYNC, _READ) if kind in kinds), "U")
            if errors
            else "A"
            for errors, kinds in zip(self.errors, self._kinds)
        )

    # Life

    def presuspend(self) -> None:
        """Fail writes that are held back, and stop copying."""
        job = self._job
        if job is not None:
            job.ask_to_stop()
        with self._lock:
            self._suspending = True
            self._lock.notify_all()
        if job is not None:
            job.stop()
            self._job = None

    def postsuspend(self) -> None:
        """Leave a log that calls all regions clean where legs are equal."""
        if self._writable:
            self._clean_regions(monotonic(), last=True)
            self.log.commit()

    def resume(self) -> None:
        """Read the log, and begin to copy what is not in sync."""
        self.log.load()
        with self._lock:
            self._suspending = False
            self._next = 0
            self._idle.clear()
            if self.log.durable:
                # The log on disk says that they are not clean; those that are in sync are not
                # there any more.
                self._unflushed.clear()
            complete = self._is_complete()
        if complete:
            self.event()
        wanted = self._writable and (self.log.durable or self.log.sync_count < self.log.count)
        if wanted and self._job is None:
            self._job = background.start(self._work, "mirror")

    # Whether there is nothing here that may only be read.
    @property
    def _writable(self) -> bool:
        devices = [leg.device for leg in self.legs]
        if isinstance(self.log, DiskLog):
            devices.append(self.log.device)
        return not any(device.readonly for device in devices)

    # Note, under the lock, that all regions have come into sync: failures are forgotten then.
    # Returns True when that is news: an event.
    def _is_complete(self) -> bool:
        if self._in_sync or self.log.sync_count < self.log.count:
            return False
        self._in_sync = True
        self._leg_failed = False
        self.errors = [0] * len(self.legs)
        self._kinds = [set() for _ in self.legs]
        return True

    # Failures

    # Note that a leg failed; the first failure of a kind is an event, if errors are handled.
    def _fail_leg(self, index: int, kind: str, error: OSError) -> None:
        with self._lock:
            self._leg_failed = True
            self.errors[index] += 1
            if kind in self._kinds[index]:
                return
            self._kinds[index].add(kind)
            # Where not all is in sync no other leg has all of the data: better no answer than a
            # wrong one.
            if (
                self.handle_errors
                and index == self.default
                and (self._in_sync or self.keep_log)
                and 0 in self.errors
            ):
                self.default = self.errors.index(0)
        leg = self.legs[index].device.name
        _logger.error("mirror: leg %s: %s", leg, error.strerror or error)
        if self.handle_errors:
            self.event()

    # What becomes of a write that is not on all legs: do_failures(). `lost` are the regions whose
    # legs differ now.
    def _after_failure(self, lost: Iterable[int], error: OSError | None) -> None:
        with self._lock:
            if not self._log_failed:
                self._in_sync = False
                for region in lost:
                    self.log.set_sync(region, False)
                    if region == self._recovering:
                        self._recovering = -1
                        self._lock.notify_all()
            if 0 not in self.errors or (self.keep_log and self._log_failed):
                raise error or self._no_leg()
            if self.handle_errors and not self.keep_log:
                self._lock.wait_for(lambda: self._suspending)
                if self.noflush:
                    raise Requeue
                raise DeviceError(errno.EIO, "mirror: suspended while a failed write was held")

    # The error where no leg is left to ask.
    def _no_leg(self) -> DeviceError:
        return DeviceError(errno.EIO, "mirror: no leg has the data")

    # Reads

    # The leg to read from where all have the same, or -1: choose_mirror() looks downward.
    def _choose(self) -> int:
        count = len(self.errors)
        for step in range(count):
            index = (self.default - step) % count
            if not self.errors[index]:
                return index
        return -1

    def read_spot(self, offset: int, length: int) -> tuple[int, int]:
        default = self.default
        if self.errors[default]:
            return -1, 0
        segment = self.legs[default].segment
        if segment.fd < 0:
            return -1, 0
        return segment.fd, offset + segment.skew

    def preadv(self, buffers: Buffers, offset: int) -> None:
        default = self.default
        # Fast path: the default leg has everything, unless it has failed.
        if not self.errors[default]:
            try:
                self.legs[default].preadv(buffers, offset)
                return
            except OSError as error:
                self._read_failed(default, offset, error)
        done = 0
        for begin, size, _, _, in_sync in self._stretches(offset, total(buffers)):
            self._read(slices(buffers, done, size), begin, in_sync)
            done += size

    # Read a stretch from one leg after the other until one can.
    def _read(self, views: Buffers, offset: int, in_sync: bool) -> None:
        while True:
            index = self._choose() if in_sync else self.default
            if index < 0 or self.errors[index]:
                raise self._no_leg()
            try:
                self.legs[index].preadv(views, offset)
                return
            except OSError as error:
                self._read_failed(index, offset, error)

    # Note a failed read; raises where there is no other leg to try.
    def _read_failed(self, index: int, offset: int, error: OSError) -> None:
        if error.errno == errno.EOPNOTSUPP:
            raise error
        self._fail_leg(index, _READ, error)
        with self._lock:
            in_sync = self.log.in_sync(offset // self.log.region_size)
        if self.errors[self.default] and not (in_sync and self._choose() >= 0):
            raise error

    # Cut a request where regions that are in sync meet those that are not.
    # Returns (offset, length, first region, last region, in sync) of each piece.
    def _stretches(self, offset: int, length: int) -> list[tuple[int, int, int, int, bool]]:
        with self._lock:
            return self._cut(offset, length)

    def _cut(self, offset: int, length: int) -> list[tuple[int, int, int, int, bool]]:
        log = self.log
        size = log.region_size
        first, last = offset // size, (offset + length - 1) // size
        # Fast path: all is in sync.
        if log.sync_count == log.count:
            return [(offset, length, first, last, True)]
        pieces = []
        end = offset + length
        while offset < end:
            region = first = offset // size
            in_sync = log.in_sync(region)
            while region < last and log.in_sync(region + 1) == in_sync:
                region += 1
            piece = min(end, (region + 1) * size) - offset
            pieces.append((offset, piece, first, region, in_sync))
            offset += piece
        return pieces

    # Writes

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        length = total(buffers)

        def write(leg: Leg, place: int, size: int) -> None:
            views = buffers if size == length else slices(buffers, place - offset, size)
            leg.pwritev(views, place, fua=fua)

        self._write(offset, length, write)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        begun = False

        def zero(leg: Leg, place: int, size: int) -> None:
            nonlocal begun
            try:
                # Once a leg has them the others get theirs, fast or not.
                leg.write_zeroes(
                    place, size, may_unmap=may_unmap, fast_only=fast_only and not begun
                )
            except OSError as error:
                if fast_only and not begun and error.errno == errno.EOPNOTSUPP:
                    raise _Unsupported from error
                raise
            begun = True

        try:
            self._write(offset, length, zero)
        except _Unsupported as refusal:
            assert isinstance(refusal.__cause__, OSError)
            raise refusal.__cause__ from None

    def discard(self, offset: int, length: int) -> None:
        """Discard on all legs; where one cannot, no leg fails for it (EOPNOTSUPP)."""
        first: list[OSError] = []

        def discard(leg: Leg, place: int, size: int) -> None:
            for other in self.legs:
                try:
                    other.discard(place, size)
                except OSError as error:
                    first.append(error)

        # In regions that are not in sync as well: all that is there may go.
        self._write(offset, length, discard, once=True)
        if first:
            raise DeviceError(errno.EOPNOTSUPP, f"mirror: discard: {first[0].strerror}")

    # Write a piece: mark its regions, durably, then write.
    def _write(self, offset: int, length: int, act: _Act, *, once: bool = False) -> None:
        if not length:
            return
        size = self.log.region_size
        regions = range(offset // size, (offset + length - 1) // size + 1)
        pieces = self._begin(offset, length, regions)
        try:
            if not self.log.commit():
                self._log_failed = True
            if once:
                act(self.legs[0], offset, length)
                return
            for begin, piece, first, last, in_sync in pieces:
                if in_sync:
                    self._write_all(begin, piece, range(first, last + 1), act)
                else:
                    self._write_default(begin, piece, range(first, last + 1), act)
        finally:
            self._end(regions)

    # Wait for regions that are being copied, then keep all of them from being copied.
    def _begin(
        self, offset: int, length: int, regions: range
    ) -> list[tuple[int, int, int, int, bool]]:
        log, pending, idle = self.log, self._pending, self._idle
        with self._lock:
            while self._recovering in regions:
                self._lock.wait()
            for region in regions:
                pending[region] = pending.get(region, 0) + 1
            pieces = self._cut(offset, length)
            if log.durable:
                for _, _, first, last, in_sync in pieces:
                    for region in range(first, last + 1) if in_sync else ():
                        idle.pop(region, None)
                        log.mark(region)
            complete = not self._in_sync and self._is_complete()
        if complete:
            self.event()
        return pieces

    # Let go of regions again.
    def _end(self, regions: range) -> None:
        log, pending = self.log, self._pending
        with self._lock:
            self._unflushed.update(regions)
            for region in regions:
                left = pending[region] - 1
                if left:
                    pending[region] = left
                    continue
                del pending[region]
                if region == self._recovering:
                    self._lock.notify_all()
                elif self._flush_failed:
                    # Once a flush has failed, nobody knows what a leg has: dm_rh_dec().
                    log.set_sync(region, False)
                elif log.durable and log.in_sync(region):
                    self._idle[region] = monotonic()

    # Write to all legs, also to those that have failed.
    def _write_all(self, offset: int, length: int, regions: range, act: _Act) -> None:
        if self._log_failed and self.handle_errors:
            self._after_failure((), None)
            return
        first: OSError | None = None
        for index, leg in enumerate(self.legs):
            try:
                act(leg, offset, length)
            except OSError as error:
                first = first or error
                self._fail_leg(index, _WRITE, error)
        if first is not None:
            self._after_failure(regions, first)

    # Write where legs are not in sync.
    def _write_default(self, offset: int, length: int, regions: range, act: _Act) -> None:
        if self._leg_failed and self.handle_errors and not self.keep_log:
            self._after_failure(regions, None)
            return
        act(self.legs[self.default], offset, length)

    # Flushes

    def flush(self) -> None:
        """Flush every leg; one that fails is treated as in a write."""
        if self._log_failed and self.handle_errors:
            self._after_failure((), None)
            return
        with self._lock:
            doubtful, self._unflushed = self._unflushed, set()
        failed = self._flush_legs()
        if not failed:
            return
        for index, error in failed.items():
            self._fail_leg(index, _WRITE, error)
        with self._lock:
            self._flush_failed = True
            doubtful |= self._pending.keys()
        self._after_failure(doubtful, next(iter(failed.values())))

    # Flush every leg's device once; returns errors by leg.
    def _flush_legs(self) -> dict[int, OSError]:
        failed: dict[int, OSError] = {}
        by_device: dict[int, int] = {}
        for index, leg in enumerate(self.legs):
            first = by_device.setdefault(id(leg.device), index)
            if first != index:
                if first in failed:
                    failed[index] = failed[first]
                continue
            try:
                leg.flush()
            except OSError as error:
                failed[index] = error
        return failed

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say what the default leg has, or that there is data where that one has failed."""
        if self.errors[self.default]:
            yield Extent(offset, length, DATA)
        else:
            yield from self.legs[self.default].extents(offset, length)

    # The background

    # The job: copies what is not in sync, then calls regions clean that nobody writes to.
    def _work(self, job: Job) -> None:
        scratch = memoryview(mmap.mmap(-1, _PIECE))
        copying = True
        last = monotonic()
        while job.go_on(0.0 if copying else _IDLE):
            copying = copying and self._recover_next(job, scratch)
            now = monotonic()
            if self.log.durable and now - last >= _IDLE:
                self._clean_regions(now - _IDLE)
                last = now
            if not copying and not self.log.durable:
                return

    # Copy one region; False when there is none left to copy.
    def _recover_next(self, job: Job, scratch: memoryview) -> bool:
        with self._lock:
            region = self.log.next_out_of_sync(self._next)
            if region >= self.log.count:
                return False
            self._next = region + 1
            # New writes to it wait from now on; a write that fails ends it.
            self._recovering = region
            self._lock.wait_for(
                lambda: region not in self._pending
                or self._recovering != region
                or job.stopping
            )
            ready = self._recovering == region and not job.stopping
        copied = ready and self._copy(job, region, scratch)
        with self._lock:
            self._recovering = -1
            if copied:
                self.log.set_sync(region, True)
                self._unflushed.add(region)
                if self.log.durable:
                    self._idle[region] = monotonic()
            complete = self._is_complete()
            self._lock.notify_all()
        if complete:
            self.event()
        return True

    # Copy a region from the default leg to all others; says whether all of it is there.
    def _copy(self, job: Job, region: int, scratch: memoryview) -> bool:
        source = self.default
        offset = region * self.log.region_size
        end = min(self.size, offset + self.log.region_size)
        whole = True
        while offset < end and whole:
            if job.stopping:
                return False
            views = [scratch[: min(len(scratch), end - offset)]]
            try:
                self.legs[source].preadv(views, offset)
            except OSError as error:
                self._fail_leg(source, _SYNC, error)
                return False
            for index, leg in enumerate(self.legs):
                if index == source:
                    continue
                try:
                    leg.pwritev(views, offset)
                except OSError as error:
                    self._fail_leg(index, _SYNC, error)
                    whole = False
            offset += len(views[0])
        return whole

    # Call regions clean that have been idle since before a moment, once legs are flushed.
    def _clean_regions(self, before: float, *, last: bool = False) -> None:
        with self._lock:
            if self._flush_failed:
                return
            chosen = {region: since for region, since in self._idle.items() if since <= before}
        if not chosen:
            return
        failed = self._flush_legs()
        for index, error in failed.items():
            self._fail_leg(index, _FLUSH, error)
        with self._lock:
            if failed:
                self.log.distrust()
                self._idle.clear()
                chosen = {}
            for region, since in chosen.items():
                # Not those that have been written to meanwhile.
                if self._idle.get(region) == since:
                    del self._idle[region]
                    self.log.clean(region)
        self.log.write(flush=last)


# Read `log_type #log_args log_args`.
def _parse_log(args: Args, length: int) -> CoreLog:
    kind = args.choice("log type", ("core", "disk"))
    count = args.integer("number of log arguments", 0, _MOST_REGIONS)
    fewest = 1 + (kind == "disk")
    if not fewest <= count <= fewest + 1 or count > args.remaining:
        args.fail(
            f"{kind} log takes {fewest} or {fewest + 1} arguments "
            f"(got {min(count, args.remaining)})",
            "number of log arguments",
        )
    device = args.device("log device") if kind == "disk" else None
    length_sectors = length >> SECTOR_SHIFT
    region_sectors = args.integer("region size in sectors", 2, min(length_sectors, (1 << 32) - 1))
    if region_sectors & (region_sectors - 1):
        args.fail(
            f"region size in sectors must be a power of two (got {region_sectors})",
            "region size in sectors",
        )
    sync = args.choice("sync argument", ("sync", "nosync")) if count > fewest else ""
    regions = ceil_div(length_sectors, region_sectors)
    if regions > _MOST_REGIONS:
        args.fail(
            f"there must be at most {_MOST_REGIONS} regions (got {regions})",
            "region size in sectors",
        )
    region_size = region_sectors << SECTOR_SHIFT
    if device is None:
        return CoreLog(region_size, regions, sync)
    needed = DiskLog.bytes_needed(device, regions)
    if needed > device.size:
        args.fail(
            f"log device {device.name} has {device.size} bytes, the log needs {needed}",
            "log device",
        )
    return DiskLog(device, region_size, regions, sync)


# Read `[#features features]`.
def _parse_features(args: Args) -> set[str]:
    if not args.remaining:
        return set()
    count = args.integer("number of features", 0, _MOST_REGIONS)
    if count > args.remaining:
        args.fail(f"{count} features need as many words (got {args.remaining})", "features")
    features = {args.choice("feature", _FEATURES) for _ in range(count)}
    if features == {"keep_log"}:
        args.fail("feature keep_log needs handle_errors too", "features")
    return features
