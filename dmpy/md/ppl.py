"""Replay of partial parity logs: parity that a crash left in mid-stripe is made right.

A member with the parity of a stripe logs, before the stripe is written, the parity of what the
write leaves alone. After a crash the parity is that and the xor of what was written, whether or not
it all arrived: data that was not written stays what it was even when another member is gone.

While dmpy uses such an array, the superblocks have no log, since none is kept: a crash costs a full
resync. When the array is stopped in order they have it again.

Source: Linux v6.1 drivers/md/raid5-ppl.c, ppl_recover(), ppl_recover_entry(), ppl_init_log().
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmpy.formats.md_ppl import PPL_HEADER_SIZE, PPLEntry, crc32c, newest, signature_of
from dmpy.md.assemble import Assembly
from dmpy.md.disk import Disk1, read_bytes
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE

__all__ = ["Replayed", "replay"]

_BLOCK = 4096


class Replayed(NamedTuple):
    """What a replay found.

    Attributes:
        entries: writes whose parity is right now.
        mismatches: logs or entries that could not be used.
    """

    entries: int
    mismatches: int


def replay(found: Assembly) -> Replayed:
    """Replay the logs of all members of an array that was not stopped in order.

    Args:
        found: the array; its members are written.

    Raises:
        OSError: a member could not be read or written.
    """
    entries = mismatches = 0
    for place, disk in enumerate(found.slots):
        if disk is None or place not in found.working:
            continue
        sb = disk.superblock
        byte = (disk.sector + sb.ppl_offset) << SECTOR_SHIFT
        log = newest(
            lambda at, length, disk=disk: read_bytes(disk.medium, at, length),
            sb.ppl_size << SECTOR_SHIFT,
            signature=signature_of(disk.set_uuid), device=disk.name, byte=byte,
        )
        if log is None:
            mismatches += 1
            continue
        at = byte + log.offset + PPL_HEADER_SIZE
        for entry in log.header.entries:
            partial = read_bytes(disk.medium, at, entry.pp_size)
            at += entry.pp_size
            if crc32c(partial) != entry.checksum or entry.parity_disk != place:
                mismatches += 1
                continue
            _replay_entry(found, place, disk, entry, partial)
            entries += 1
        disk.medium.flush()
    return Replayed(entries, mismatches)


# Write the parity of one logged write, block by block.
def _replay_entry(
    found: Assembly, place: int, disk: Disk1, entry: PPLEntry, partial: bytearray
) -> None:
    geometry = found.geometry
    chunk_size = geometry.chunk_size
    first = entry.data_sector << SECTOR_SHIFT
    if entry.pp_size >= chunk_size:
        strip, columns = chunk_size, geometry.data_members
        end = first + entry.data_size
    else:
        columns = geometry.data_members
        if entry.pp_size:
            columns = entry.data_size // entry.pp_size
        strip = entry.pp_size or entry.data_size // columns
        end = first + (columns - 1) * chunk_size + strip
    block = _BLOCK if not (first % _BLOCK or end % _BLOCK) else SECTOR_SIZE
    for at in range(0, strip, block):
        pieces = [first + at + column * chunk_size for column in range(columns)]
        pieces = [piece for piece in pieces if piece < end]
        blocks = [_read_block(found, piece, block) for piece in pieces]
        if not blocks or any(each is None for each in blocks):
            # Nothing of it is written, or a member is gone: then the parity says what it had.
            continue
        if entry.pp_size:
            blocks.append(partial[at : at + block])
        parity = np.bitwise_xor.reduce([np.frombuffer(each, np.uint8) for each in blocks])
        stripe, _ = geometry.locate((first + at) // chunk_size)
        if geometry.stripe(stripe).p != place:
            continue
        where = disk.data_offset + stripe * chunk_size + (first + at) % chunk_size
        disk.medium.pwritev([memoryview(parity)], where)


# A block of the array from the member that has it, or None when that is not to be had.
def _read_block(found: Assembly, offset: int, block: int) -> bytearray | None:
    chunk_size = found.geometry.chunk_size
    chunk, within = divmod(offset, chunk_size)
    stripe, member = found.geometry.locate(chunk)
    disk, place = found.slots[member], found.places.get(member)
    at = stripe * chunk_size + within
    if disk is None or not (place.in_sync or at < place.recovery_offset):
        return None
    return read_bytes(disk.medium, disk.data_offset + at, block)
