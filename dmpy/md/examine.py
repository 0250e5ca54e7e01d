"""What the superblock of a disk says: as a dictionary, and as text in the manner of mdadm.

Source: mdadm 4.2 super1.c, examine_super1(); super0.c, examine_super0().
"""

from __future__ import annotations

import time
from typing import Any

from dmpy.errors import FormatError
from dmpy.formats.md_bitmap import Bits
from dmpy.formats.md_superblock import Superblock1
from dmpy.md.bad_blocks import bad_ranges
from dmpy.md.create import layout_name
from dmpy.md.disk import SPARE, Disk
from dmpy.units import SECTOR_SHIFT

__all__ = ["describe", "text"]

_SECONDS = (1 << 40) - 1


def describe(disk: Disk) -> dict[str, Any]:
    """Return all that a disk's superblock, bitmap and bad-block log say; sizes are bytes.

    Raises:
        OSError: the disk cannot be read.
    """
    sb = disk.superblock
    found: dict[str, Any] = {
        "device": disk.name,
        "version": disk.version,
        "features": disk.features,
        "uuid": disk.uuid,
        "name": disk.label,
        "created": sb.ctime & _SECONDS,
        "updated": sb.utime & _SECONDS,
        "level": f"raid{disk.level}" if disk.level >= 0 else str(disk.level),
        "layout": _layout(disk),
        "chunk_size": disk.chunk_size,
        "raid_disks": disk.raid_disks,
        "member_size": disk.array_size,
        "data_offset": disk.data_offset,
        "data_size": disk.data_size,
        "superblock_offset": disk.byte,
        "events": disk.events,
        "state": "clean" if disk.clean else "active",
        "resync_offset": disk.resync_offset,
        "number": disk.number,
        "role": disk.role,
        "places": _places(disk),
        "bitmap": _bitmap(disk),
        "bad_blocks": _bad_blocks(disk),
    }
    if isinstance(sb, Superblock1):
        place = disk.place
        found["device_uuid"] = sb.device_uuid.hex()
        found["recovery_offset"] = None if place.in_sync else place.recovery_offset
        found["write_mostly"] = place.write_mostly
        found["corrected_reads"] = place.corrected
    return found


def _layout(disk: Disk) -> str:
    try:
        return layout_name(disk.level, disk.layout)
    except ValueError:
        return f"{disk.layout:#x}"


# Who is in which place, as this disk knows it: A there, R being rebuilt, . nobody.
def _places(disk: Disk) -> str:
    there = {role for role in disk.numbers().values() if isinstance(role, int)}
    return "".join("A" if place in there else "." for place in range(disk.raid_disks))


def _bitmap(disk: Disk) -> dict[str, Any] | None:
    if disk.bitmap_offset is None:
        return None
    try:
        header, data = disk.read_bitmap()
    except FormatError as error:
        return {"offset": disk.bitmap_offset, "error": str(error)}
    bits = Bits.decode(header, data, device=disk.name, byte=disk.bitmap_offset)
    return {
        "offset": disk.bitmap_offset,
        "chunk_size": header.chunksize,
        "bits": header.bits,
        "dirty": bits.total(),
        "events": header.events,
        "events_cleared": header.events_cleared,
    }


def _bad_blocks(disk: Disk) -> list[dict[str, int]] | str:
    try:
        ranges = bad_ranges(disk)
    except FormatError as error:
        return str(error)
    return [{"sector": sector, "length": length} for sector, length in ranges]


def text(found: dict[str, Any]) -> str:
    """Return what `describe` found, a line a fact."""
    role = found["role"]
    size = found["member_size"]
    facts = [
        ("Version", found["version"]),
        ("Features", ", ".join(found["features"]) or "none"),
        ("Array UUID", found["uuid"]),
        ("Name", found["name"] or "none"),
        ("Created", _date(found["created"])),
        ("Level", found["level"]),
        ("Layout", found["layout"]),
        ("Chunk size", f"{found['chunk_size'] >> 10} KiB" if found["chunk_size"] else ""),
        ("Members", found["raid_disks"]),
        ("Size of a member", f"{size >> SECTOR_SHIFT} sectors" if size else "all of its data"),
        ("Data", f"{found['data_size'] >> SECTOR_SHIFT} sectors from sector "
                 f"{found['data_offset'] >> SECTOR_SHIFT}"),
        ("Superblock", f"sector {found['superblock_offset'] >> SECTOR_SHIFT}"),
        ("State", _state(found)),
        ("Updated", _date(found["updated"])),
        ("Events", found["events"]),
        ("Bitmap", _bitmap_words(found["bitmap"])),
        ("Bad blocks", _bad_words(found["bad_blocks"])),
        ("Role", f"member {role}" if isinstance(role, int) else role),
        ("Members known", f"{found['places']} (A is there, . is missing)"),
    ]
    if found.get("recovery_offset") is not None and role != SPARE:
        sectors = found["recovery_offset"] >> SECTOR_SHIFT
        facts.append(("Rebuilt", f"up to sector {sectors} of the data"))
    lines = [f"{name + ':':<18} {value}" for name, value in facts if value != ""]
    return "\n".join([f"{found['device']}:", *lines])


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _state(found: dict[str, Any]) -> str:
    if found["resync_offset"] is None:
        return "clean"
    return f"active, in agreement up to sector {found['resync_offset'] >> SECTOR_SHIFT}"


def _bitmap_words(bitmap: dict[str, Any] | None) -> str:
    if bitmap is None:
        return "none"
    if "error" in bitmap:
        return bitmap["error"]
    return (
        f"{bitmap['dirty']} of {bitmap['bits']} bits set, {bitmap['chunk_size']} bytes a bit, "
        f"at sector {bitmap['offset'] >> SECTOR_SHIFT}"
    )


def _bad_words(bad: list | str) -> str:
    if isinstance(bad, str):
        return bad
    return ", ".join(f"{each['length']} from sector {each['sector']}" for each in bad) or "none"
