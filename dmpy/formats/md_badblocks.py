"""md's bad-block log: sectors of a member that could not be written.

Source: Linux v6.1 drivers/md/md.c, super_1_load(), super_1_sync(); block/badblocks.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dmpy.errors import FormatError
from dmpy.units import SECTOR_SIZE

__all__ = ["LARGEST_LENGTH", "LARGEST_SECTOR", "BadRange", "capacity", "decode", "encode"]

LARGEST_LENGTH = 512  # sectors in one entry, as the kernel writes them
LARGEST_SECTOR = (1 << 54) - 1

_END = 0xFFFFFFFFFFFFFFFF
_LENGTH_BITS = 10
_LARGEST_LOG = 8  # sectors: the kernel reads one page
_ENTRY = 8  # bytes


class BadRange(NamedTuple):
    """Sectors that hold nothing that can be trusted.

    Attributes:
        sector: the first, counted from the beginning of the member, not of its data.
        length: how many.
    """

    sector: int
    length: int


def capacity(size_sectors: int) -> int:
    """Return how many entries a log of so many sectors (bblog_size) holds."""
    return size_sectors * SECTOR_SIZE // _ENTRY


def decode(view: Any, *, shift: int = 0, device: str = "data", byte: int = 0) -> list[BadRange]:
    """Read a log.

    Args:
        view: the whole log, as long as bblog_size says.
        shift: bblog_shift: entries count in units of 2 ** shift sectors.
        device: where it comes from, for messages.
        byte: where it begins on the device.

    Returns:
        The ranges in the order of the log; the kernel keeps them ascending and apart.

    Raises:
        FormatError: the log is too large, or an entry of it cannot be.
    """
    view = memoryview(view).cast("B")
    if len(view) > _LARGEST_LOG * SECTOR_SIZE or len(view) % _ENTRY:
        raise FormatError(
            "bad-block log",
            device=device,
            byte=byte,
            field="size",
            found=f"{len(view)} bytes",
            expected=f"at most {_LARGEST_LOG * SECTOR_SIZE}, a multiple of {_ENTRY}",
        )
    if not 0 <= shift < 64:
        raise FormatError(
            "bad-block log",
            device=device,
            byte=byte,
            field="shift",
            found=shift,
            expected="0 to 63",
        )
    ranges = []
    for number, entry in enumerate(np.frombuffer(view, "<u8").tolist()):
        if entry == _END:
            break
        length = entry & (1 << _LENGTH_BITS) - 1
        sector, length = entry >> _LENGTH_BITS << shift, length << shift
        if length == 0 or sector + length > LARGEST_SECTOR:
            raise FormatError(
                "bad-block log",
                device=device,
                byte=byte + number * _ENTRY,
                field=f"entry {number}",
                found=f"{length} sectors from {sector}",
                expected="1 or more that can be counted",
            )
        ranges.append(BadRange(sector, length))
    return ranges


def encode(ranges: Iterable[BadRange], size_sectors: int) -> bytearray:
    """Return the log for the disk.

    Args:
        ranges: any, in sectors from the beginning of the member; they are sorted, joined where they
            touch, and cut to entries of at most LARGEST_LENGTH.
        size_sectors: sectors of the log (bblog_size).

    Raises:
        ValueError: there are more entries than the log holds.
    """
    assert 0 < size_sectors <= _LARGEST_LOG, f"a log of {size_sectors} sectors"
    entries = []
    for sector, length in _joined(ranges):
        assert length > 0 and 0 <= sector <= LARGEST_SECTOR - length, (sector, length)
        while length:
            piece = min(length, LARGEST_LENGTH)
            entries.append(sector << _LENGTH_BITS | piece)
            sector, length = sector + piece, length - piece
    # The entry of all ones that ends the list may be missing from a full log.
    if len(entries) > capacity(size_sectors):
        raise ValueError(
            f"{len(entries)} entries do not fit in a bad-block log of {size_sectors} sectors "
            f"({capacity(size_sectors)} entries)"
        )
    log = np.full(capacity(size_sectors), _END, "<u8")
    log[: len(entries)] = entries
    return bytearray(log.tobytes())


def _joined(ranges: Iterable[BadRange]) -> list[BadRange]:
    result: list[BadRange] = []
    for sector, length in sorted(ranges):
        if result and sector <= result[-1].sector + result[-1].length:
            end = max(sector + length, result[-1].sector + result[-1].length)
            result[-1] = BadRange(result[-1].sector, end - result[-1].sector)
        else:
            result.append(BadRange(sector, length))
    return result
