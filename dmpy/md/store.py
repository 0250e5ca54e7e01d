"""The state of an MD array that is in use, on its disks: superblocks, bitmap, bad-block log.

Order of what is written:
1. Before the first write after a time of rest: superblocks that say that the array is in use.
2. Before a write to a region that was clean: its bit, on all members.
3. After a failure: superblocks without the member, before the write is acknowledged.
4. At rest: cleared bits, then superblocks that say that all is well.

Source: Linux v6.1 drivers/md/md.c, md_write_start(), md_update_sb(), md_allow_write(), __md_stop();
md-bitmap.c, md_bitmap_startwrite(), md_bitmap_endwrite(), md_bitmap_daemon_work().
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dmpy.errors import DeviceError
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from dmpy.md.assemble import Assembly
from dmpy.md.disk import FAULTY as FAULTY_ROLE
from dmpy.md.disk import SPARE as SPARE_ROLE
from dmpy.md.disk import ArrayState, Disk, Place
from dmpy.raid.array import FAULTY, IN_SYNC, REBUILDING, Array, Store
from dmpy.target import Leg
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE, round_down

__all__ = ["MDStore"]

_log = logging.getLogger("dmpy.raid")


class MDStore(Store):
    """Superblocks and the internal bitmap on the disks of an array.

    Args:
        assembly: the array as it was found.
        disks: the disk behind each leg that may be a member, by the leg's id().

    Attributes:
        events: how often the superblocks have been written.
    """

    def __init__(self, assembly: Assembly, disks: Mapping[int, Disk]) -> None:
        newest = assembly.newest
        self.events = newest.events
        self.size = newest.array_size
        self.raid_disks = newest.raid_disks
        self._disks = dict(disks)
        self._numbers = _numbers(assembly)
        self._array: Array | None = None
        # The superblocks say that the array is being written.
        self._active = assembly.resync_offset is not None and assembly.bitmap is not None
        # Members may disagree since the last time, and that is not mended yet.
        self._crashed = self._active
        # The array is being left: what was switched off while in use is switched on again.
        self._leaving = False
        self._header: BitmapSuper | None = assembly.bitmap
        self._area = bytearray()
        self._bits: Bits | None = None
        if assembly.bitmap is not None:
            self._area = bytearray(assembly.bitmap.area)
            self._use_bits(assembly.bitmap, assembly.bits)
        # Without a bitmap: the regions that are being written, which only memory knows.
        self._regions: set[int] = set()

    # Keep the bits in the bytes that are written.
    def _use_bits(self, header: BitmapSuper, bits: Bits) -> None:
        self._area[header.SIZE : header.size] = bits.data.data
        view = np.frombuffer(self._area, np.uint8)[header.SIZE : header.size]
        self._bits = Bits(header.bits, view)

    def add_disk(self, leg: Leg, disk: Disk, number: int | None = None) -> int:
        """Take a further disk in, under a number of its own; returns the number."""
        self._disks[id(leg)] = disk
        if number is None or number in self._numbers.values():
            taken = set(self._numbers.values())
            number = next(n for n in range(len(taken) + 1) if n not in taken)
        self._numbers[id(disk)] = number
        return number

    def drop_disk(self, leg: Leg) -> None:
        """Forget a disk."""
        disk = self._disks.pop(id(leg), None)
        if disk is not None:
            self._numbers.pop(id(disk), None)

    def alias(self, leg: object, known: Leg) -> None:
        """Take a leg for another one, whose disk it stands for."""
        self._disks[id(leg)] = self._disks[id(known)]

    def forget(self, leg: object) -> None:
        """Undo alias()."""
        self._disks.pop(id(leg), None)

    def disk_of(self, leg: Leg | None) -> Disk | None:
        """Return the disk behind a leg."""
        return self._disks.get(id(leg)) if leg is not None else None

    @property
    def events_cleared(self) -> int | None:
        """The event count when bits were last cleared; None without a bitmap."""
        return self._header.events_cleared if self._header is not None else None

    @property
    def active(self) -> bool:
        """Whether the superblocks say that the array is being written."""
        return self._active

    def number_of(self, disk: Disk) -> int | None:
        """Return the number of a disk in this array, None where it has none."""
        return self._numbers.get(id(disk))

    # Superblocks

    def update(self, array: Array) -> None:
        """Write the superblock of every disk that works; one that fails is left out.

        Raises:
            OSError: EIO, there is no member left to write to.
        """
        self._array = array
        waits = array.unsynced or array.crashed or array.degraded or array.resync_offset
        if self._crashed and not waits:
            # What a crash may have left is mended.
            self._crashed = False
        while True:
            self.events += 1
            state = self._state(array)
            bad = self._write(array, state)
            if not bad:
                return
            if not any(member.writable for member in array.members):
                raise DeviceError(errno.EIO, f"{array.name}: no superblock can be written")

    # The state as the array has it.
    def _state(self, array: Array) -> ArrayState:
        places: dict[int, Place] = {}
        for member in array.members:
            disk = self.disk_of(member.leg)
            if disk is None:
                continue
            number = self._numbers[id(disk)]
            place = Place(number, member.index, write_mostly=member.write_mostly)
            place.corrected = member.errors
            if member.state == REBUILDING:
                place.in_sync = False
                place.recovery_offset = member.recovery_offset
                place.by_bitmap = member.only_unsynced and self._bits is not None
            elif member.state != IN_SYNC:
                place.role = FAULTY_ROLE
            places[number] = place
        for leg in array.spares:
            number = self._numbers[id(self._disks[id(leg)])]
            places[number] = Place(number, SPARE_ROLE, False)
        clean = not self._active
        return ArrayState(
            self.events, array.resync_offset, clean, self.size, self.raid_disks,
            self._bits is not None, places,
            ppl=self._leaving and clean and array.resync_offset is None,
        )

    # Write bitmaps' headers and superblocks; returns whether one failed and was left out.
    def _write(self, array: Array, state: ArrayState) -> bool:
        bad = False
        for member in array.members:
            disk = self.disk_of(member.leg)
            if disk is not None and member.writable and not self._write_disk(disk, state):
                member.state = FAULTY
                bad = True
        for leg in list(array.spares):
            if not self._write_disk(self._disks[id(leg)], state):
                array.spares.remove(leg)
                bad = True
        return bad

    def _write_disk(self, disk: Disk, state: ArrayState) -> bool:
        try:
            if self._header is not None:
                self._header.events = self.events
                self._put_header()
                disk.medium.pwritev(
                    [memoryview(self._area)[:SECTOR_SIZE]], disk.bitmap_offset, fua=True
                )
            disk.write(state, self._numbers[id(disk)])
        except OSError as error:
            _log.error("%s: superblock cannot be written: %s", disk.name, error)
            return False
        return True

    # The write-intent bitmap

    def _put_header(self) -> None:
        self._area[: BitmapSuper.SIZE] = self._header.encode()

    def mark_dirty(self, regions: Iterable[int]) -> None:
        """Keep that regions are about to be written: in the superblocks, then in the bitmap."""
        regions = list(regions)
        if not self._active:
            self._active = True
            self._regions.update(regions)
            self.update(self._array)
        self._regions.update(regions)
        if self._bits is not None:
            changed = self._bits.set(regions)
            if changed:
                self._write_bits(changed, fua=True)

    def mark_clean(self, regions: Iterable[int]) -> None:
        """Keep that all members agree on regions; with the last of them the array is at rest."""
        regions = list(regions)
        array = self._array
        self._regions.difference_update(regions)
        if self._bits is not None:
            if not array.degraded and self._header.events_cleared < self.events:
                # First that older members cannot be brought up by what is left, then less is left.
                self._header.events_cleared = self.events
                self._put_header()
                self._write_area(0, SECTOR_SIZE, fua=True)
            changed = self._bits.clear(regions)
            if changed:
                self._write_bits(changed, fua=False)
        at_rest = not self._regions and not (self._crashed and self.dirty_regions())
        if self._active and at_rest:
            self._active = self._crashed = False
            self.update(array)

    # Write the sectors that hold some bytes of the bits.
    def _write_bits(self, changed: set[int], *, fua: bool) -> None:
        sectors = sorted({round_down(BitmapSuper.SIZE + at, SECTOR_SIZE) for at in changed})
        begin = end = sectors[0]
        for sector in [*sectors, -1]:
            if sector != end:
                self._write_area(begin, end, fua=fua)
                begin = sector
            end = sector + SECTOR_SIZE

    # Write a piece of the bitmap to all members. One that fails it is left out.
    def _write_area(self, begin: int, end: int, *, fua: bool) -> None:
        array = self._array
        for member in array.members:
            disk = self.disk_of(member.leg)
            if disk is None or not member.writable:
                continue
            view = memoryview(self._area)[begin:end]
            try:
                disk.medium.pwritev([view], disk.bitmap_offset + begin, fua=fua)
            except OSError as error:
                array.fail(member.index, f"bitmap: {error.strerror or error}")

    def write_bitmap(self, disk: Disk) -> None:
        """Write the whole bitmap to a disk that joins.

        Raises:
            OSError: it could not be written.
        """
        if self._header is not None:
            self._put_header()
            disk.medium.pwritev([memoryview(self._area)], disk.bitmap_offset, fua=True)

    def dirty_regions(self) -> set[int]:
        """Return the regions whose bit is set, or without a bitmap those that are being written."""
        if self._bits is None:
            return set(self._regions)
        return set(self._bits.regions().tolist())

    def flush(self) -> None:
        """Make what was kept durable, clean marks too."""
        array = self._array
        for member in array.members if array is not None else ():
            disk = self.disk_of(member.leg)
            if disk is not None and member.writable:
                try:
                    disk.medium.flush()
                except OSError as error:
                    array.fail(member.index, f"flush: {error.strerror or error}")

    # Growing

    def grow_members(self, array: Array, count: int) -> None:
        """Keep that the array has more places, which are empty.

        Raises:
            OSError: EINVAL, the level or the superblocks do not allow that.
        """
        if array.geometry.level.number != 1:
            raise DeviceError(errno.EOPNOTSUPP, f"{array.name}: only a RAID 1 gets more members")
        if not self.raid_disks <= count <= 1920:
            raise DeviceError(
                errno.EINVAL,
                f"{array.name}: number of members must be at least {self.raid_disks} (got {count})",
            )
        self.raid_disks = count
        self.update(array)

    def grow_size(self, array: Array, size: int) -> None:
        """Keep that the array uses more of each member; what is new has to be synced.

        Args:
            array: the array.
            size: bytes, 0 for all that every member has.

        Raises:
            OSError: EINVAL, ENOSPC, there is no room.
        """
        disks = [self.disk_of(member.leg) for member in array.members]
        disks += [self._disks[id(leg)] for leg in array.spares]
        room = min(disk.room for disk in disks)
        chunk = array.geometry.chunk_size or 1024
        size = round_down(size or room, chunk)
        if size > room:
            raise DeviceError(
                errno.ENOSPC,
                f"{array.name}: the smallest member has {room} bytes of data (got {size})",
            )
        if size < self.size:
            raise DeviceError(
                errno.EINVAL, f"{array.name}: has {self.size} bytes of each member (got {size})"
            )
        if size == self.size:
            return
        old = array.sync_size
        if self._bits is not None:
            self._grow_bitmap(array, size)
        for disk in disks:
            disk.use(size)
        self.size = size
        array.resync_offset = old
        self._active = self._crashed = False
        self.update(array)

    # Make the bitmap stand for larger members, where it lies; the bits of what is new are set.
    def _grow_bitmap(self, array: Array, size: int) -> None:
        if array.geometry.level.number == 10:
            raise DeviceError(
                errno.EOPNOTSUPP, f"{array.name}: the bitmap of a RAID 10 cannot grow here"
            )
        header = replace(self._header, sync_size=size >> SECTOR_SHIFT)
        if header.area > len(self._area):
            raise DeviceError(errno.ENOSPC, f"{array.name}: the bitmap has no room to grow")
        bits = Bits(header.bits)
        bits.set(self._bits.regions().tolist())
        bits.set(range(self._bits.count, header.bits))
        self._header = header
        self._use_bits(header, bits)
        self._put_header()
        self._write_area(0, len(self._area), fua=True)

    # Life

    def start(self, array: Array) -> None:
        """Take up an array: what is known from the last time, and superblocks that say it is here.

        Raises:
            OSError: no superblock could be written.
        """
        self._array = array
        self._leaving = False
        if self._crashed and not self.dirty_regions():
            self._active = self._crashed = False
            array.resync_offset = None
        elif self._crashed:
            # The bitmap says what may differ, so not all of the array has to be synced.
            array.resync_offset = None
        if self._bits is not None:
            if self._crashed or array.degraded:
                array.unsynced = self.dirty_regions() if array.degraded else set()
                array.crashed = self.dirty_regions() if self._crashed else set()
            else:
                self.update(array)
                self.mark_clean(self.dirty_regions())
                return
        self.update(array)

    def stop(self, array: Array) -> None:
        """Leave an array, nothing of which is being written: what is on the disks says so.

        Raises:
            OSError: no superblock could be written.
        """
        if array.failed:
            return
        array.flush()
        array.nobody_writes()
        if not array.degraded and not self._crashed and self._bits is not None:
            self.mark_clean(self.dirty_regions() - array.unsynced - array.crashed)
        self._regions.clear()
        if self._active and not self._crashed:
            self._active = False
        self._leaving = True
        self.update(array)
        self._leaving = False
        self.flush()


# The number of each disk, by the disk's id(): its own, or a free one where two have the same.
def _numbers(assembly: Assembly) -> dict[int, int]:
    numbers: dict[int, int] = {}
    taken: set[int] = set()
    disks: Sequence[Disk] = assembly.disks
    for disk in disks:
        number = disk.number
        if number in taken:
            free = range(len(disks) + len(taken) + 1)
            number = next(n for n in free if n not in taken)
        taken.add(number)
        numbers[id(disk)] = number
    return numbers

