"""Which disks make an array: in any order, with stale, foreign and missing ones among them.

Nothing is written here but by `force`. The disk with the highest event count knows best; others may
be one event behind, since the last update may not have reached them.

Source: Linux v6.1 drivers/md/md.c, analyze_sbs(), super_1_validate(), md_run(); raid5.c,
raid5_run(); mdadm 4.2 Assemble.c, select_devices(), load_devices(), start_array().
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dmpy.device import BlockDevice
from dmpy.errors import DeviceError, FormatError
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from dmpy.md.create import geometry_of
from dmpy.md.disk import FAULTY, JOURNAL, SPARE, ArrayState, Disk, Place, open_disk
from dmpy.raid.levels import Geometry
from dmpy.units import SECTOR_SHIFT

__all__ = ["Assembly", "LeftOut", "assemble", "disk_of", "open_disks", "table_text"]

# What one update may have missed.
_MARGIN = 1
_REFUSED_FEATURES = {
    "RESHAPE_ACTIVE": "a reshape is under way",
    "RESHAPE_BACKWARDS": "a reshape is under way",
    "NEW_OFFSET": "a reshape is under way",
    "CLUSTERED": "it belongs to a cluster",
}


def _refuse(reason: str, number: int = errno.EINVAL) -> DeviceError:
    return DeviceError(number, reason)


class LeftOut(NamedTuple):
    """A disk that is of the array and not used, and why."""

    disk: Disk
    reason: str


@dataclass
class Assembly:
    """What some disks make.

    Attributes:
        newest: the disk whose word counts.
        geometry: of the array.
        slots: the disk in each place, or None.
        places: what is known of the disk in each place that has one.
        spares: disks without a place.
        left_out: disks that are stale or have failed.
        resync_offset: bytes of each member on which all agree; None when they agree everywhere.
        bitmap: header of the write-intent bitmap, or None.
        bits: of the bitmap; all set when it is not to be relied on.
        forced: what was overlooked on request, in words.
    """

    newest: Disk
    geometry: Geometry
    slots: list[Disk | None]
    places: dict[int, Place]
    spares: list[Disk] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    resync_offset: int | None = None
    bitmap: BitmapSuper | None = None
    bits: Bits | None = None
    forced: list[str] = field(default_factory=list)

    @property
    def uuid(self) -> str:
        """The array's UUID as mdadm prints it."""
        return self.newest.uuid

    @property
    def has_ppl(self) -> bool:
        """Whether its members have partial parity logs."""
        return self.newest.ppl_feature is not None

    @property
    def missing(self) -> list[int]:
        """The places that no disk has."""
        return [index for index, disk in enumerate(self.slots) if disk is None]

    @property
    def working(self) -> set[int]:
        """The places whose disks have all of their data."""
        return {index for index, place in self.places.items() if place.in_sync}

    @property
    def disks(self) -> list[Disk]:
        """All disks that are used, members by place and then spares."""
        return [*(disk for disk in self.slots if disk is not None), *self.spares]

    def state(self) -> ArrayState:
        """Return the state to keep in the superblocks."""
        newest = self.newest
        places = {place.number: place for place in self.places.values()}
        for disk in self.spares:
            places[disk.number] = Place(disk.number, SPARE, False)
        return ArrayState(
            newest.events, self.resync_offset, True, newest.array_size, newest.raid_disks,
            self.bitmap is not None, places,
        )

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that is not as it should be."""
        found = [f"{disk.name} is left out: {reason}" for disk, reason in self.left_out]
        if self.missing:
            places = ", ".join(map(str, self.missing))
            plural = "s" if len(self.missing) > 1 else ""
            found.append(f"the array is degraded: no disk for place{plural} {places}")
        return found + self.forced


def disk_of(device: BlockDevice, *, uuid: str | None = None) -> Disk:
    """Return the disk that a device is.

    Args:
        device: any device.
        uuid: of several superblocks prefer that of this array.

    Raises:
        FormatError: its superblock is damaged.
        OSError: ENODEV, it has none.
    """
    prefer: Callable[[Disk], bool] | None = None
    if uuid is not None:
        prefer = lambda disk: disk.uuid == uuid  # noqa: E731
    disk = open_disk(device, device.name, device.size, prefer=prefer)
    if disk is None:
        raise _refuse(f"{device.name} has no superblock of an MD array", errno.ENODEV)
    return disk


def open_disks(devices: Sequence[BlockDevice], *, uuid: str | None = None) -> list[Disk]:
    """Return the disks that devices are; see `disk_of`."""
    return [disk_of(device, uuid=uuid) for device in devices]


def table_text(assembly: Assembly, word: Callable[[Disk], str] = lambda disk: disk.name) -> str:
    """Return the table of an array: members by place, `-` for each that is missing, then spares.

    Args:
        assembly: the array.
        word: says what a disk is called in tables.
    """
    words = ["-" if disk is None else word(disk) for disk in assembly.slots]
    words += [word(disk) for disk in assembly.spares]
    sectors = assembly.geometry.size >> SECTOR_SHIFT
    return f"0 {sectors} md {assembly.uuid} {len(words)} {' '.join(words)}"


def assemble(disks: Sequence[Disk], *, force: bool = False) -> Assembly:
    """Decide which disks make an array, and whether it can be used.

    Args:
        disks: in any order.
        force: take stale members where there are too few, and take a degraded array of parity for
            clean although it was being written.

    Raises:
        OSError: they make no array that could be used; the sentence says why.
    """
    if not disks:
        raise _refuse("an array needs a disk")
    _check_same_array(disks)
    newest = _newest(disks)
    _check_features(newest, disks)
    left_out: list[LeftOut] = []
    slots, spares = _sort(disks, newest, left_out)
    _check_alike([disk for disk in slots if disk is not None], newest)
    places = {index: _place(disk, newest) for index, disk in enumerate(slots) if disk is not None}
    geometry = _geometry(newest, slots)
    found = Assembly(newest, geometry, slots, places, spares, left_out)
    found.resync_offset = newest.resync_offset if _can_differ(geometry) else None
    if force:
        _take_stale(found)
    _check_enough(found)
    _check_clean(found, force)
    _read_bitmap(found)
    return found


def _check_same_array(disks: Sequence[Disk]) -> None:
    first = disks[0]
    for disk in disks[1:]:
        if disk.uuid != first.uuid:
            raise _refuse(
                f"{disk.name} belongs to another array than {first.name} "
                f"(got {disk.uuid}, expected {first.uuid})"
            )
        if disk.version != first.version:
            raise _refuse(
                f"{disk.name} has a superblock of another version than {first.name} "
                f"(got {disk.version}, expected {first.version})"
            )
    if len({id(disk.medium) for disk in disks}) != len(disks):
        raise _refuse("one disk is named twice")


# The disk that knows best: the highest event count among those with a place, else among all.
def _newest(disks: Sequence[Disk]) -> Disk:
    members = [disk for disk in disks if isinstance(disk.role, int)]
    return max(members or disks, key=lambda disk: disk.events)


def _check_features(newest: Disk, disks: Sequence[Disk]) -> None:
    journals = [disk.name for disk in disks if disk.role == JOURNAL]
    if journals or "JOURNAL" in newest.features:
        name = journals[0] if journals else "not among these disks"
        raise _refuse(f"the array has a write journal, which is not supported ({name})",
                      errno.EOPNOTSUPP)
    for name, what in _REFUSED_FEATURES.items():
        if name in newest.features:
            raise _refuse(f"the array cannot be used: {what} ({newest.name}: feature {name})",
                          errno.EOPNOTSUPP)
    if newest.ppl_feature is not None and newest.level != 5:
        raise _refuse(f"{newest.name}: a partial parity log is for raid5 (got raid{newest.level})")
    if not 1 <= newest.raid_disks:
        raise _refuse(f"{newest.name}: an array of {newest.raid_disks} places")
    # Refuses levels that are none of ours.
    geometry_of(newest.level, newest.layout, newest.raid_disks, newest.chunk_size or 4096,
                1 << 40, (1 << 40,) * newest.raid_disks)


# What the array says a disk is: its own word counts while it is up to date.
def _role(disk: Disk, newest: Disk):
    return disk.role if disk.events >= newest.events else newest.role_of(disk.number)


# Put disks in their places.
def _sort(
    disks: Sequence[Disk], newest: Disk, left_out: list[LeftOut]
) -> tuple[list[Disk | None], list[Disk]]:
    slots: list[Disk | None] = [None] * newest.raid_disks
    spares = []
    for disk in disks:
        role = _role(disk, newest)
        if "REPLACEMENT" in disk.features:
            left_out.append(LeftOut(disk, "it was to replace a member and is not complete"))
        elif disk.role == SPARE:
            spares.append(disk)
        elif role == FAULTY:
            left_out.append(LeftOut(disk, f"it has failed, as {newest.name} knows"))
        elif disk.events + _MARGIN < newest.events:
            behind = f"it is stale ({disk.events} events, {newest.name} has {newest.events})"
            left_out.append(LeftOut(disk, behind))
        elif role == SPARE:
            left_out.append(LeftOut(disk, f"it is no member any more, as {newest.name} knows"))
        elif not isinstance(role, int) or role >= len(slots):
            left_out.append(LeftOut(disk, f"the array has no place {role}"))
        elif slots[role] is not None:
            raise _refuse(f"{slots[role].name} and {disk.name} both claim place {role}")
        else:
            slots[role] = disk
    return slots, spares


def _place(disk: Disk, newest: Disk) -> Place:
    place = disk.place
    place.role = _role(disk, newest)
    return place


# What all members must say alike.
def _check_alike(members: Sequence[Disk], newest: Disk) -> None:
    for disk in members:
        for field_name in ("level", "layout", "chunk_size", "raid_disks", "array_size"):
            mine, its = getattr(disk, field_name), getattr(newest, field_name)
            if mine != its:
                word = field_name.replace("_", " ")
                raise _refuse(f"{disk.name} has another {word} than {newest.name} "
                              f"(got {mine}, expected {its})")
        if disk.data_size < newest.array_size:
            raise _refuse(
                f"{disk.name} has {disk.data_size >> SECTOR_SHIFT} sectors of data, the array "
                f"needs {newest.array_size >> SECTOR_SHIFT}"
            )
        if disk.data_offset + disk.data_size > disk.size:
            raise _refuse(
                f"{disk.name} has {disk.size >> SECTOR_SHIFT} sectors, its superblock needs "
                f"{disk.data_offset + disk.data_size >> SECTOR_SHIFT}"
            )


def _geometry(newest: Disk, slots: Sequence[Disk | None]) -> Geometry:
    sizes: tuple[int, ...] = ()
    if newest.level == 0:
        absent = [str(index) for index, disk in enumerate(slots) if disk is None]
        if absent:
            raise _refuse(f"RAID 0 cannot do without the disk of place {', '.join(absent)}",
                          errno.ENXIO)
        sizes = tuple(disk.data_size for disk in slots)
    layout = newest.layout
    if newest.level == 0 and "RAID0_LAYOUT" not in newest.features:
        layout = -1
    return geometry_of(newest.level, layout, newest.raid_disks, newest.chunk_size,
                       newest.array_size, sizes)


# Whether members can disagree.
def _can_differ(geometry: Geometry) -> bool:
    return geometry.level.number != 0 and geometry.redundancy > 0


# With force: of disks that were left out as stale, take the newest until there are enough.
def _take_stale(found: Assembly) -> None:
    stale = sorted(found.left_out, key=lambda each: -each.disk.events)
    for each in stale:
        if found.geometry.enough(found.working):
            return
        disk = each.disk
        role = disk.role
        if not isinstance(role, int) or role >= len(found.slots):
            continue
        if found.slots[role] is not None or not disk.place.in_sync:
            continue
        _check_alike([disk], found.newest)
        found.slots[role] = disk
        found.places[role] = disk.place
        found.left_out.remove(each)
        found.forced.append(f"{disk.name} is taken although {each.reason}")


def _check_enough(found: Assembly) -> None:
    if found.geometry.enough(found.working):
        return
    reasons = [f"{disk.name} is left out: {reason}" for disk, reason in found.left_out]
    reasons += [f"no disk for place {index}" for index in found.missing]
    recovering = set(found.places) - found.working
    reasons += [f"{found.slots[index].name} is not rebuilt" for index in sorted(recovering)]
    level, places = found.newest.level, found.newest.raid_disks
    raise _refuse(
        f"too few disks for raid{level} of {places} members, {len(found.working)} can be used "
        f"({'; '.join(reasons)})", errno.ENXIO
    )


# Parity that may be wrong says nothing about a member that is gone.
def _check_clean(found: Assembly, force: bool) -> None:
    parity = found.geometry.level.parity
    if not parity or found.resync_offset is None or len(found.working) == len(found.slots):
        return
    if found.has_ppl:
        # The log makes it right.
        return
    if not force:
        gone = sorted(set(range(len(found.slots))) - found.working)
        raise _refuse(
            f"the array is degraded (place {', '.join(map(str, gone))}) and was being written "
            "when it stopped, so what it would compute may be wrong (force takes it as it is)",
            errno.EIO,
        )
    found.resync_offset = None
    found.forced.append("the array is taken for clean although it was being written")


def _read_bitmap(found: Assembly) -> None:
    newest = found.newest
    if newest.bitmap_offset is None:
        return
    members = [found.slots[index] for index in sorted(found.working)]
    try:
        # Every member has the same one; the newest's is as new as its superblock.
        header, data = newest.read_bitmap()
        for disk in members:
            other, _ = disk.read_bitmap()
            if (other.sync_size, other.chunksize) != (header.sync_size, header.chunksize):
                raise _refuse(
                    f"{disk.name} has another bitmap than {newest.name} "
                    f"(got {other.chunksize} bytes a bit for {other.sync_size} sectors, expected "
                    f"{header.chunksize} for {header.sync_size})"
                )
    except FormatError as error:
        raise _refuse(f"the write-intent bitmap cannot be used: {error}") from None
    covered = found.geometry.size if newest.level == 10 else newest.array_size
    if header.sync_size < covered >> SECTOR_SHIFT:
        raise _refuse(
            f"{newest.name}: the write-intent bitmap does not match the array "
            f"(got {header.sync_size} sectors, expected {covered >> SECTOR_SHIFT})"
        )
    # mdadm counts the chunks of a RAID 10 that are not whole; md does not.
    header = replace(header, sync_size=covered >> SECTOR_SHIFT)
    bits = Bits.decode(header, data, device=newest.name, byte=newest.bitmap_offset)
    if header.events < newest.events:
        bits.fill(True)
    found.bitmap, found.bits = header, bits

