"""Legs that honour md's bad-block log: what is in it is not read.

A read that meets a bad range fails, so that the array makes up for it and writes the bytes anew; a
write that covers bad ranges takes them out of the log once it has succeeded.

Source: Linux v6.1 drivers/md/raid1.c, raid1_read_request(), narrow_write_error(); raid5.c,
ops_run_io(); md.c, rdev_clear_badblocks().
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from dmpy.device import Buffers, total
from dmpy.errors import DeviceError
from dmpy.formats.md_badblocks import BadRange, decode, encode
from dmpy.md.disk import Disk1, read_bytes
from dmpy.target import Leg
from dmpy.units import SECTOR_SHIFT, ceil_div

if TYPE_CHECKING:
    from dmpy.device import BlockDevice
    from dmpy.md.disk import Disk

__all__ = ["CarefulLeg", "bad_ranges"]


def bad_ranges(disk: Disk) -> list[BadRange]:
    """Return what a disk's bad-block log holds, in sectors from the start of the device.

    Raises:
        FormatError: the log is damaged.
    """
    if not isinstance(disk, Disk1) or not disk.superblock.has("BAD_BLOCKS"):
        return []
    place = _log_place(disk)
    data = read_bytes(disk.medium, place, disk.superblock.bblog_size << SECTOR_SHIFT)
    return decode(data, shift=disk.superblock.bblog_shift, device=disk.name, byte=place)


def _log_place(disk: Disk1) -> int:
    # Bytes from the start of the device.
    return (disk.sector + disk.superblock.bblog_offset) << SECTOR_SHIFT


class CarefulLeg(Leg):
    """The data of a disk.

    Args:
        device: the device.
        start: bytes from its start to the data.
        length: bytes.
        disk: the disk that the device is.

    Attributes:
        bad: ranges of the log, in sectors from the start of the device.
    """

    __slots__ = ("_disk", "_lock", "bad")

    def __init__(self, device: BlockDevice, start: int, length: int, disk: Disk) -> None:
        super().__init__(device, start, length)
        self._disk = disk
        self.bad = bad_ranges(disk)
        # Protects the log while it is written anew.
        self._lock = threading.Lock()

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read, unless the range is in the log.

        Raises:
            OSError: EIO, it is.
        """
        if self.bad and self._meets(offset, total(buffers)):
            raise DeviceError(
                errno.EIO, f"{self.device.name}: bytes from {offset} are in the bad-block log",
                device=self.device.name, offset=offset,
            )
        super().preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write, and take what was written whole out of the log."""
        super().pwritev(buffers, offset, fua=fua)
        if self.bad and self._meets(offset, total(buffers)):
            self._mended(offset, total(buffers))

    # The sectors of the device that bytes of the data lie in.
    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        begin = self.start + offset
        return begin >> SECTOR_SHIFT, ceil_div(begin + length, 1 << SECTOR_SHIFT)

    def _meets(self, offset: int, length: int) -> bool:
        begin, end = self._sectors(offset, length)
        return any(bad.sector < end and begin < bad.sector + bad.length for bad in self.bad)

    # Take sectors that were written whole out of the log: first the bytes are durable, then it.
    def _mended(self, offset: int, length: int) -> None:
        begin = ceil_div(self.start + offset, 1 << SECTOR_SHIFT)
        end = (self.start + offset + length) >> SECTOR_SHIFT
        with self._lock:
            left = []
            for sector, count in self.bad:
                if sector < begin:
                    left.append(BadRange(sector, min(count, begin - sector)))
                if sector + count > end:
                    first = max(sector, end)
                    left.append(BadRange(first, sector + count - first))
            superblock = self._disk.superblock
            # Entries count in units of 2^shift sectors; what is left of a unit is all of it.
            if superblock.bblog_shift:
                return
            self.flush()
            log = encode(left, superblock.bblog_size)
            self._disk.medium.pwritev([memoryview(log)], _log_place(self._disk), fua=True)
            superblock.set_feature("BAD_BLOCKS", bool(left))
            self.bad = left
