"""md's write-intent bitmap: one bit for each region that may differ between members.

The same on the members of md arrays and on dm-raid's metadata devices.

Source: Linux v6.1 drivers/md/md-bitmap.h, bitmap_super_s; md-bitmap.c, md_bitmap_read_sb(),
md_bitmap_update_sb(), md_bitmap_init_from_disk(), md_bitmap_file_set_bit(), md_bitmap_resize().
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dmpy.errors import FormatError
from dmpy.formats._bits import Bits as AnyBits
from dmpy.formats._record import Record, hexadecimal, octets, record, u32, u64
from dmpy.units import SECTOR_SIZE, ceil_div, round_up

__all__ = [
    "BITMAP_MAGIC",
    "BITMAP_MAJOR_CLUSTERED",
    "BITMAP_MAJOR_HI",
    "BITMAP_MAJOR_HOSTENDIAN",
    "BITMAP_STALE",
    "BITMAP_WRITE_ERROR",
    "Bits",
    "BitmapSuper",
]

BITMAP_MAGIC = 0x6D746962  # "bitm"
BITMAP_MAJOR_HOSTENDIAN = 3
BITMAP_MAJOR_HI = 4
BITMAP_MAJOR_CLUSTERED = 5

# In `state`.
BITMAP_STALE = 1 << 1  # out of date: every bit counts as set
BITMAP_WRITE_ERROR = 1 << 2

_LONGEST_SLEEP = 0x7FFFFFFF  # seconds; the kernel's limit depends on its clock
_MOST_WRITE_BEHIND = 16383  # COUNTER_MAX: the counters have 14 bits
_LARGEST_CHUNK = 1 << 31
_PAGE = 4096


@record
class BitmapSuper(Record):
    """Fields of bitmap_super_s, which the bits follow at once.

    Attributes:
        uuid: that of the array.
        events: the array's event count when this was written; a bitmap with fewer is stale.
        events_cleared: the count when bits were last cleared. A member that has at least that many
            events can be brought up by this bitmap alone.
        sync_size: sectors that the bits stand for: of each member, for raid10 of the array.
        chunksize: bytes for each bit.
        daemon_sleep: seconds between clearings.
        write_behind: most writes under way to write-mostly members; 0 for none.
        sectors_reserved: sectors that are reserved for the bitmap; 0 when that is not said.
        nodes: nodes of the cluster, each with a bitmap of its own.
    """

    magic: int = u32(BITMAP_MAGIC)
    version: int = u32(BITMAP_MAJOR_HI)
    uuid: bytes = octets(16)
    events: int = u64()
    events_cleared: int = u64()
    sync_size: int = u64()
    state: int = u32()
    chunksize: int = u32()
    daemon_sleep: int = u32(5)
    write_behind: int = u32()
    sectors_reserved: int = u32()
    nodes: int = u32()
    cluster_name: bytes = octets(64)
    pad: bytes = octets(120)

    @property
    def stale(self) -> bool:
        """Whether every bit counts as set."""
        return bool(self.state & BITMAP_STALE)

    @property
    def clustered(self) -> bool:
        """Whether it belongs to a cluster, one bitmap for each node."""
        return self.version == BITMAP_MAJOR_CLUSTERED

    @property
    def bits(self) -> int:
        """How many bits stand for the sectors."""
        return ceil_div(self.sync_size * SECTOR_SIZE, self.chunksize)

    @property
    def size(self) -> int:
        """Bytes of this record and its bits."""
        return self.SIZE + ceil_div(self.bits, 8)

    @property
    def area(self) -> int:
        """Bytes that a bitmap takes on a disk: whole pages."""
        return round_up(self.size, _PAGE)

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where the kernel would not use it."""

        def wrong(field: str, found: object, expected: object) -> FormatError:
            reason = "not an md bitmap" if field == "magic" else "md bitmap"
            return self.wrong(reason, field, found, expected, device=device, byte=byte)

        if self.magic != BITMAP_MAGIC:
            raise wrong("magic", hexadecimal(self.magic), hexadecimal(BITMAP_MAGIC))
        if not BITMAP_MAJOR_HOSTENDIAN <= self.version <= BITMAP_MAJOR_CLUSTERED:
            raise wrong("version", self.version, "3, 4 or 5")
        if not SECTOR_SIZE <= self.chunksize <= _LARGEST_CHUNK:
            raise wrong("chunksize", self.chunksize, f"{SECTOR_SIZE} to {_LARGEST_CHUNK}")
        if self.chunksize & (self.chunksize - 1):
            raise wrong("chunksize", self.chunksize, "a power of 2")
        if not 1 <= self.daemon_sleep <= _LONGEST_SLEEP:
            raise wrong("daemon_sleep", self.daemon_sleep, f"1 to {_LONGEST_SLEEP}")
        if self.write_behind > _MOST_WRITE_BEHIND:
            raise wrong("write_behind", self.write_behind, f"0 to {_MOST_WRITE_BEHIND}")

    def check_array(self, uuid: bytes, *, device: str, byte: int) -> None:
        """Raise FormatError where the bitmap belongs to another array.

        Args:
            uuid: 16 bytes, the array's.
            device: name for messages.
            byte: where the bitmap begins on the device.
        """
        if self.uuid != uuid:
            raise self.wrong(
                "bitmap of another array",
                "uuid",
                self.uuid.hex(),
                uuid.hex(),
                device=device,
                byte=byte,
            )

    def check_space(self, space: int, *, device: str, byte: int) -> None:
        """Raise FormatError where the bits do not fit in `space` bytes from the record's begin."""
        if self.size > space:
            raise self.wrong(
                f"bitmap needs {self.size} bytes where {space} are free",
                "sync_size",
                self.sync_size,
                f"at most {max(0, space - self.SIZE) * 8 * self.chunksize // SECTOR_SIZE}",
                device=device,
                byte=byte,
            )

    @classmethod
    def choose_chunksize(cls, sync_size: int, space: int, *, smallest: int = 64 << 20) -> int:
        """Return the bytes a bit that mdadm takes when none are asked for.

        Args:
            sync_size: sectors that the bits stand for.
            space: bytes of the area.
            smallest: bytes; mdadm takes no less than 64 MiB by itself, 4096 when asked.

        Raises:
            ValueError: not even the largest chunks make the bits few enough.
        """
        room = (space - cls.SIZE) * 8
        chunksize, bits = 4096, sync_size * SECTOR_SIZE // 4096 + 1
        while bits > room and chunksize < _LARGEST_CHUNK:
            chunksize, bits = chunksize * 2, ceil_div(bits, 2)
        if bits > room:
            raise ValueError(f"no bitmap for {sync_size} sectors fits in {space} bytes")
        return max(chunksize, smallest)


class Bits(AnyBits):
    """The bits behind a BitmapSuper, as on the disk.

    Version 3 is in words of the host that wrote it, which on a little-endian host is the same; on
    another it cannot be told from the disk.

    Args:
        count: number of bits.
        data: uint8[ceil(count / 8)], kept, not copied; None for all clear.
    """

    @classmethod
    def decode(
        cls, header: BitmapSuper, view: Any, *, device: str = "data", byte: int = 0
    ) -> Bits:
        """Copy the bits out of a view that begins with the header.

        Args:
            header: a checked one. When it is stale all bits are set.
            view: bytes from the header on.
            device: name for messages.
            byte: where the header begins on the device.

        Raises:
            FormatError: the view ends within the bits, or they are in another byte order.
        """
        view = memoryview(view).cast("B")
        header.check_space(len(view), device=device, byte=byte)
        if header.version == BITMAP_MAJOR_HOSTENDIAN and sys.byteorder != "little":
            raise header.wrong(
                "bits are in the words of a host",
                "version",
                header.version,
                "4",
                device=device,
                byte=byte,
            )
        bits = cls(header.bits, np.frombuffer(view[header.SIZE : header.size], np.uint8).copy())
        if header.stale:
            bits.fill(True)
        return bits

    def encode(self, header: BitmapSuper) -> bytearray:
        """Return header and bits and zeroes up to a whole page, for the disk."""
        assert header.bits == self.count, f"{self.count} bits for a header of {header.bits}"
        area = bytearray(header.area)
        area[: header.SIZE] = header.encode()
        area[header.SIZE : header.size] = self.data.data
        return area


assert BitmapSuper.SIZE == 256
