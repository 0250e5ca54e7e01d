"""What a `raid` target keeps on its metadata devices: a superblock and a write-intent bitmap each.

Source: Linux v6.1 drivers/md/dm-raid.c, super_sync(), super_load(), super_validate(); md-bitmap.c.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import NamedTuple

from dmpy.errors import DeviceError, FormatError
from dmpy.formats.dm_raid import BITMAP_OFFSET, MAX_SECTOR, DmRaidSuperblock
from dmpy.formats.md_bitmap import BitmapSuper, Bits
from dmpy.raid.array import FAULTY, IN_SYNC, MISSING, Array, Store
from dmpy.target import Leg
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE

__all__ = ["DmRaidStore", "Found", "look"]

_log = logging.getLogger("dmpy.raid")

_BLOCK = 4096


class Found(NamedTuple):
    """What the metadata devices say.

    Attributes:
        superblocks: by place; None where there is no metadata device, or nothing on it.
        freshest: the superblock with the most events, or None for a new set.
        unreadable: places whose metadata could not be read.
    """

    superblocks: list[DmRaidSuperblock | None]
    freshest: DmRaidSuperblock | None
    unreadable: set[int]


def look(metas: list[Leg | None]) -> Found:
    """Read the superblocks.

    Args:
        metas: metadata devices by place, None for none.

    Raises:
        FormatError: a superblock is damaged, or not one that we know.
    """
    superblocks: list[DmRaidSuperblock | None] = []
    unreadable = set()
    for place, meta in enumerate(metas):
        superblocks.append(None)
        if meta is None:
            continue
        block = bytearray(_BLOCK)
        try:
            meta.preadv([memoryview(block)], 0)
        except OSError:
            unreadable.add(place)
            continue
        if DmRaidSuperblock.is_there(block):
            found = DmRaidSuperblock.decode(block, device=meta.device.name, byte=0)
            superblocks[place] = found
    known = [found for found in superblocks if found is not None]
    freshest = max(known, key=lambda found: found.events, default=None)
    return Found(superblocks, freshest, unreadable)


class DmRaidStore(Store):
    """Superblocks and bitmaps on the metadata devices of a set.

    Args:
        metas: metadata devices by place, None for none.
        template: a superblock with what is the same on all of them.
        bitmap: the bitmap's header, or None for a set without (raid0).
        new: make a new bitmap rather than reading the one that is there.
        dirty: whether the regions of a new bitmap are dirty.

    Attributes:
        events: how often the state has changed.
    """

    def __init__(
        self,
        metas: list[Leg | None],
        template: DmRaidSuperblock,
        bitmap: BitmapSuper | None,
        *,
        new: bool,
        dirty: bool,
    ) -> None:
        self.events = template.events
        self._metas = metas
        self._template = template
        self._bitmap = bitmap
        self._bits: Bits | None = None
        if bitmap is not None:
            self._bits = Bits(bitmap.bits) if new else self._read_bits(bitmap)
            if new and dirty:
                self._bits.fill(True)

    # The bits of the first bitmap that can be read; all set where there is none.
    def _read_bits(self, wanted: BitmapSuper) -> Bits:
        everything = Bits(wanted.bits)
        everything.fill(True)
        for meta in self._metas:
            if meta is None:
                continue
            area = bytearray(min(wanted.area, meta.length - BITMAP_OFFSET))
            try:
                meta.preadv([memoryview(area)], BITMAP_OFFSET)
                header = BitmapSuper.decode(area, device=meta.device.name, byte=BITMAP_OFFSET)
                header.check(device=meta.device.name, byte=BITMAP_OFFSET)
            except (OSError, FormatError):
                continue  # another device may have one
            if (header.sync_size, header.chunksize) != (wanted.sync_size, wanted.chunksize):
                continue
            if header.events < self.events - 1:
                continue
            self._bitmap.events_cleared = header.events_cleared
            return Bits.decode(header, area, device=meta.device.name, byte=BITMAP_OFFSET)
        return everything

    @property
    def events_cleared(self) -> int:
        """The event count when bits were last cleared."""
        return self._bitmap.events_cleared if self._bitmap is not None else MAX_SECTOR

    def update(self, array: Array) -> None:
        """Write a superblock to every member that works.

        Raises:
            OSError: EIO when none could be written.
        """
        while True:
            self.events += 1
            bad = self._write_superblocks(array)
            if not bad:
                return
            for place in bad:
                array.members[place].state = FAULTY
            if array.failed:
                raise DeviceError(errno.EIO, f"{array.name}: no metadata device can be written")

    # Write them all; returns the places where that failed.
    def _write_superblocks(self, array: Array) -> list[int]:
        failed = {m.index for m in array.members if m.state in (FAULTY, MISSING)}
        bad = []
        for member in array.members:
            meta = self._metas[member.index]
            if meta is None or not member.writable:
                continue
            block = self._template
            block.events = self.events
            block.array_position = member.index
            block.failed = failed
            block.disk_recovery_offset = (
                MAX_SECTOR if member.state == IN_SYNC else member.recovery_offset >> SECTOR_SHIFT
            )
            offset = array.resync_offset
            block.array_resync_offset = MAX_SECTOR if offset is None else offset >> SECTOR_SHIFT
            try:
                meta.pwritev([memoryview(block.encode())], 0, fua=True)
                if self._bitmap is not None:
                    self._bitmap.events = self.events
                    self._write_bitmap(meta, {0})
            except OSError:
                bad.append(member.index)
        return bad

    # Write blocks of the bitmap to a metadata device, durably.
    def _write_bitmap(self, meta: Leg, blocks: Iterable[int], *, fua: bool = True) -> None:
        area = memoryview(self._bits.encode(self._bitmap))
        for block in sorted(blocks):
            meta.pwritev(
                [area[block * _BLOCK : (block + 1) * _BLOCK]],
                BITMAP_OFFSET + block * _BLOCK,
                fua=fua,
            )

    # Write the blocks that hold changed bytes of the bits to every metadata device.
    def _write_changed(self, changed: set[int], *, fua: bool) -> None:
        blocks = {(BitmapSuper.SIZE + at) // _BLOCK for at in changed}
        last: OSError | None = None
        written = 0
        for meta in self._metas:
            if meta is not None and blocks:
                try:
                    self._write_bitmap(meta, blocks, fua=fua)
                    written += 1
                except OSError as error:
                    last = error
        if last is not None and not written:
            raise last

    def mark_dirty(self, regions: Iterable[int]) -> None:
        """Set bits, durably."""
        if self._bits is not None:
            self._write_changed(self._bits.set(regions), fua=True)

    def mark_clean(self, regions: Iterable[int]) -> None:
        """Clear bits."""
        if self._bits is not None:
            self._bitmap.events_cleared = self.events
            self._write_changed(self._bits.clear(regions), fua=False)

    def dirty_regions(self) -> set[int]:
        """Return the regions whose bits are set."""
        return set(self._bits.regions().tolist()) if self._bits is not None else set()

    def create(self, array: Array) -> None:
        """Write everything, for a new set or one with a new bitmap.

        Raises:
            OSError: it could not be written.
        """
        if self._bits is not None:
            blocks = range(self._bitmap.area // _BLOCK)
            for meta in self._metas:
                if meta is not None:
                    self._write_bitmap(meta, blocks)
        self.update(array)

    def flush(self) -> None:
        """Make clean bits durable; all else has been so from the start."""
        for meta in self._metas:
            if meta is not None:
                try:
                    meta.flush()
                except OSError as error:
                    # Bits that stay dirty cost a resync, no more.
                    _log.warning("%s: flush: %s", meta.device.name, error.strerror or error)


assert BITMAP_OFFSET % SECTOR_SIZE == 0
