"""The disk log of dm-mirror: which regions are clean, that is, the same on all legs.

Source: Linux v6.1 drivers/md/dm-log.c, struct log_header_disk, create_log_context(), read_header(),
disk_resume().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from dmpy.formats._bits import Bits
from dmpy.formats._record import Record, hexadecimal, record, u32, u64
from dmpy.units import ceil_div, round_up

__all__ = [
    "BITS_OFFSET",
    "LARGEST_REGIONS",
    "MIRROR_DISK_VERSION",
    "MIRROR_MAGIC",
    "Bits",
    "LogHeader",
    "MirrorLog",
    "log_size",
]

MIRROR_MAGIC = 0x4D695272  # "MiRr", in this order when read as a number
MIRROR_DISK_VERSION = 2
BITS_OFFSET = 1024  # bytes from the start of the log device: sector 2
LARGEST_REGIONS = (1 << 32) - 1

_WORD = 8  # bytes: the kernel's bitset is made of longs


def log_size(regions: int, block_size: int = 512) -> int:
    """Return the bytes that a log of so many regions takes.

    Args:
        regions: number of regions.
        block_size: bytes of a logical block of the log device.
    """
    return round_up(BITS_OFFSET + round_up(ceil_div(regions, 8), _WORD), block_size)


@record
class LogHeader(Record):
    """Fields of struct log_header_disk.

    Attributes:
        version: 2; version 1 had the bits in words of the host and is the same on a little-endian
            one, where the kernel makes a 2 of it.
        nr_regions: bits that mean something.
    """

    magic: int = u32(MIRROR_MAGIC)
    version: int = u32(MIRROR_DISK_VERSION)
    nr_regions: int = u64()

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where this is no log, or one of another version."""
        rules = [
            ("magic", hexadecimal(self.magic), self.magic == MIRROR_MAGIC, "0x4d695272"),
            ("version", self.version, self.version in (1, MIRROR_DISK_VERSION), "2"),
            (
                "nr_regions",
                self.nr_regions,
                self.nr_regions <= LARGEST_REGIONS,
                f"at most {LARGEST_REGIONS}",
            ),
        ]
        for field, found, holds, expected in rules:
            if not holds:
                reason = "not a mirror log" if field == "magic" else "mirror log"
                raise self.wrong(reason, field, found, expected, device=device, byte=byte)


@dataclass
class MirrorLog:
    """A log as a whole.

    Attributes:
        clean: a bit for each region, set when the region is the same on all legs.
    """

    clean: Bits

    @classmethod
    def new(cls, regions: int, *, clean: bool) -> Self:
        """Return the log of a new mirror: all regions clean (nosync) or none."""
        bits = Bits(regions)
        bits.fill(clean)
        return cls(bits)

    @classmethod
    def is_there(cls, view: Any) -> bool:
        """Whether the bytes begin with the magic; without it the kernel starts a new log."""
        return bytes(memoryview(view)[:4]) == MIRROR_MAGIC.to_bytes(4, "little")

    @classmethod
    def decode(cls, view: Any, *, device: str = "data", byte: int = 0) -> Self:
        """Read a log.

        Args:
            view: bytes from the start of the log, all of its bits among them.
            device: where they come from, for messages.
            byte: where `view` begins on the device.

        Raises:
            FormatError: no log, another version, or more regions than the view has bits.
        """
        view = memoryview(view).cast("B")
        header = LogHeader.decode(view, device=device, byte=byte)
        size = ceil_div(header.nr_regions, 8)
        if BITS_OFFSET + size > len(view):
            raise header.wrong(
                "mirror log",
                "nr_regions",
                header.nr_regions,
                f"at most {max(0, len(view) - BITS_OFFSET) * 8} in {len(view)} bytes",
                device=device,
                byte=byte,
            )
        data = np.frombuffer(view[BITS_OFFSET : BITS_OFFSET + size], np.uint8).copy()
        return cls(Bits(header.nr_regions, data))

    def resized(self, regions: int, *, clean: bool = False) -> Self:
        """Return the log for another number of regions; those that are new are as said."""
        return type(self)(self.clean.resized(regions, value=clean))

    def encode(self, block_size: int = 512) -> bytearray:
        """Return the bytes for the disk, whole blocks.

        Args:
            block_size: bytes of a logical block of the log device.
        """
        packed = LogHeader(nr_regions=len(self.clean)).encode()
        log = bytearray(log_size(len(self.clean), block_size))
        log[: len(packed)] = packed
        log[BITS_OFFSET : BITS_OFFSET + len(self.clean.data)] = self.clean.data.data
        return log


assert LogHeader.SIZE == 16
