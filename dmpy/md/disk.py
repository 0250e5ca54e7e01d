"""A disk of an MD array, in words that are the same for superblocks of every version.

Source: Linux v6.1 drivers/md/md.c, super_1_load(), super_1_validate(), super_1_sync(),
super_90_validate(), super_90_sync().
"""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dmpy.device import Buffers
from dmpy.errors import DeviceError, FormatError
from dmpy.formats.md_bitmap import BitmapSuper
from dmpy.formats.md_superblock import (
    BITMAP_DEFAULT_OFFSET_090,
    MAX_SECTOR,
    MD_DISK_ACTIVE,
    MD_DISK_FAULTY,
    MD_DISK_REMOVED,
    MD_DISK_ROLE_FAULTY,
    MD_DISK_ROLE_JOURNAL,
    MD_DISK_ROLE_MAX,
    MD_DISK_ROLE_SPARE,
    MD_DISK_SYNC,
    MD_DISK_WRITEMOSTLY,
    MD_SB_BITMAP_PRESENT,
    MD_SB_CLEAN,
    MD_SB_DISKS,
    DiskDescriptor,
    Superblock1,
    Superblock090,
    find,
    where,
)
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE

__all__ = [
    "FAULTY",
    "JOURNAL",
    "Medium",
    "SPARE",
    "ArrayState",
    "Disk",
    "Disk1",
    "Disk090",
    "Place",
    "open_disk",
    "read_bytes",
    "uuid_text",
]

# Roles that are no place in the array.
SPARE = "spare"
FAULTY = "faulty"
JOURNAL = "journal"

Role = int | str


class Medium(Protocol):
    """What superblocks are read from and written to: a device, or a leg that is all of one."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as BlockDevice.preadv() does."""

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as BlockDevice.pwritev() does."""

    def flush(self) -> None:
        """Flush as BlockDevice.flush() does."""


def read_bytes(medium: Medium, offset: int, length: int) -> bytearray:
    """Read a piece of a device."""
    data = bytearray(length)
    medium.preadv([memoryview(data)], offset)
    return data


def uuid_text(octets: bytes) -> str:
    """Return a UUID of 16 bytes as mdadm prints those of 1.x superblocks."""
    text = octets.hex()
    return ":".join(text[i : i + 8] for i in range(0, 32, 8))


@dataclass
class Place:
    """What an array knows of one of its disks.

    Attributes:
        number: of the disk, which never changes in 1.x.
        role: its place in the array, or SPARE, FAULTY, JOURNAL.
        in_sync: all of its data is right.
        recovery_offset: bytes of its data that are right, when not in sync.
        by_bitmap: the bitmap says which of the others are not.
        write_mostly: read it only when nothing else can be.
        corrected: read errors that were mended.
    """

    number: int
    role: Role
    in_sync: bool = True
    recovery_offset: int = 0
    by_bitmap: bool = False
    write_mostly: bool = False
    corrected: int = 0


@dataclass
class ArrayState:
    """What all superblocks of an array say alike, and what changes while it is in use.

    Attributes:
        events: counts updates of the superblocks.
        resync_offset: bytes of each member on which all agree; None when they agree everywhere.
        clean: nothing is being written; otherwise a restart finds that nothing can be relied on.
        size: bytes of each member that the array uses; 0 where each is used whole.
        raid_disks: places in the array.
        bitmap: there is a write-intent bitmap.
        ppl: the partial parity logs of those that have some count again.
        places: of all disks, by number.
        utime: seconds.
    """

    events: int
    resync_offset: int | None
    clean: bool
    size: int
    raid_disks: int
    bitmap: bool
    places: dict[int, Place] = field(default_factory=dict)
    utime: int = 0
    ppl: bool = False


def _resync_sectors(state: ArrayState) -> int:
    # What goes into the superblock: all is well, or how far all is well, or nothing is.
    if not state.clean:
        return 0
    return MAX_SECTOR if state.resync_offset is None else state.resync_offset >> SECTOR_SHIFT


class Disk(ABC):
    """A device with a superblock of MD.

    Args:
        medium: what to write superblocks to.
        name: what people call the device.
        size: bytes of the device.
        version: of the superblock: "0.90", "1.0", "1.1" or "1.2".
        superblock: the superblock, checked.
        sector: where it lies.

    Attributes:
        events, level, layout, raid_disks: as the superblock has them.
        uuid: the array's, as mdadm prints it.
        label: the array's name, empty in 0.90.
        chunk_size: bytes.
        array_size: bytes of each member that the array uses, 0 where each is used whole.
        data_offset, data_size: bytes.
        resync_offset: bytes of each member on which all agree, None when they agree everywhere.
        number: the disk's.
        bitmap_offset: bytes from the start of the device, None without a bitmap.
    """

    level: int
    layout: int
    raid_disks: int
    events: int
    uuid: str
    label: str
    chunk_size: int
    array_size: int
    data_offset: int
    data_size: int
    resync_offset: int | None
    number: int
    bitmap_offset: int | None

    def __init__(
        self, medium: Medium, name: str, size: int, version: str, superblock, sector: int
    ) -> None:
        self.medium = medium
        self.name = name
        self.size = size
        self.version = version
        self.superblock = superblock
        self.sector = sector
        self.load()
        # The feature that says that it has a partial parity log, which is not there while in use.
        self.ppl_feature = next(
            (name for name in self.features if name in ("PPL", "MULTIPLE_PPLS")), None
        )

    def __repr__(self) -> str:
        return f"<Disk {self.name} {self.version} {self.role} events {self.events}>"

    @property
    @abstractmethod
    def set_uuid(self) -> bytes:
        """The array's UUID, 16 bytes."""

    @property
    @abstractmethod
    def features(self) -> list[str]:
        """Names of features, as md names the bits of 1.x."""

    @abstractmethod
    def load(self) -> None:
        """Take the attributes from the superblock."""

    @abstractmethod
    def role_of(self, number: int) -> Role:
        """Return which role this superblock says that a disk has, by its number."""

    @property
    def role(self) -> Role:
        """The role that the disk gives itself."""
        return self.role_of(self.number)

    @property
    @abstractmethod
    def place(self) -> Place:
        """What the disk says of itself."""

    @abstractmethod
    def numbers(self) -> Mapping[int, Role]:
        """Return the roles of all disks that this superblock knows, by number; no spares in 1.x."""

    @abstractmethod
    def keep(self, state: ArrayState, number: int) -> bytearray:
        """Change the superblock to say what the array's state is, and return its bytes."""

    @property
    @abstractmethod
    def room(self) -> int:
        """Bytes of data that the device has room for."""

    @abstractmethod
    def use(self, size: int) -> None:
        """Have room for so many bytes of data from the next update on."""

    @property
    def clean(self) -> bool:
        """Whether the array was stopped in order and all members agree."""
        return self.resync_offset is None

    @property
    def byte(self) -> int:
        """Where the superblock lies, in bytes."""
        return self.sector << SECTOR_SHIFT

    def write(self, state: ArrayState, number: int) -> None:
        """Write the superblock of a disk with a number; durable on return."""
        data = self.keep(state, number)
        self.medium.pwritev([memoryview(data)], self.byte)
        self.medium.flush()
        self.load()

    def read_bitmap(self) -> tuple[BitmapSuper, bytearray]:
        """Return the bitmap's header, and all bytes from it on.

        Raises:
            FormatError: it is not one, or it is another array's.
        """
        offset = self.bitmap_offset
        head = read_bytes(self.medium, offset, min(BitmapSuper.SIZE, self.size - offset))
        header = BitmapSuper.decode(head, device=self.name, byte=offset)
        header.check_array(self.set_uuid, device=self.name, byte=offset)
        if header.clustered:
            raise FormatError(
                "bitmap belongs to a cluster", device=self.name, byte=offset,
                field="version", found=header.version, expected="3 or 4",
            )
        header.check_space(self.size - offset, device=self.name, byte=offset)
        return header, read_bytes(self.medium, offset, header.size)


class Disk1(Disk):
    """A disk with a superblock of version 1.0, 1.1 or 1.2."""

    superblock: Superblock1

    @property
    def set_uuid(self) -> bytes:
        """The array's UUID, 16 bytes."""
        return self.superblock.set_uuid

    @property
    def features(self) -> list[str]:
        """Names of the feature bits that are set."""
        return self.superblock.features

    def load(self) -> None:
        """Take the attributes from the superblock."""
        sb = self.superblock
        self.uuid, self.label = sb.uuid, sb.name
        self.level, self.layout, self.raid_disks = sb.level, sb.layout, sb.raid_disks
        self.events, self.number = sb.events, sb.dev_number
        self.chunk_size = sb.chunksize << SECTOR_SHIFT
        self.array_size = sb.size << SECTOR_SHIFT
        self.data_offset = sb.data_offset << SECTOR_SHIFT
        self.data_size = sb.data_size << SECTOR_SHIFT
        resync = sb.resync_offset
        self.resync_offset = None if resync == MAX_SECTOR else resync << SECTOR_SHIFT
        self.bitmap_offset = None
        if sb.has("BITMAP_OFFSET"):
            self.bitmap_offset = (self.sector + sb.bitmap_offset) << SECTOR_SHIFT

    def role_of(self, number: int) -> Role:
        """Return which role this superblock says that a disk has, by its number."""
        roles = self.superblock.dev_roles
        role = roles[number] if number < len(roles) else MD_DISK_ROLE_SPARE
        names = {MD_DISK_ROLE_SPARE: SPARE, MD_DISK_ROLE_JOURNAL: JOURNAL}
        return role if role < MD_DISK_ROLE_MAX else names.get(role, FAULTY)

    def numbers(self) -> Mapping[int, Role]:
        """Return the roles of all disks but spares, by number."""
        roles = {number: self.role_of(number) for number in range(len(self.superblock.dev_roles))}
        return {number: role for number, role in roles.items() if role != SPARE}

    @property
    def place(self) -> Place:
        """What the disk says of itself."""
        sb = self.superblock
        recovering = sb.has("RECOVERY_OFFSET")
        return Place(
            self.number,
            self.role,
            isinstance(self.role, int) and not recovering,
            sb.recovery_offset << SECTOR_SHIFT if recovering else 0,
            sb.has("RECOVERY_BITMAP"),
            sb.write_mostly,
            sb.cnt_corrected_read,
        )

    @property
    def room(self) -> int:
        """Bytes of data that the device has room for."""
        if self.version == "1.0":
            return self.data_size
        return self.size - self.data_offset

    def use(self, size: int) -> None:
        """Have room for so many bytes of data from the next update on."""
        sb = self.superblock
        sb.data_size = max(sb.data_size, size >> SECTOR_SHIFT)

    def keep(self, state: ArrayState, number: int) -> bytearray:
        """Change the superblock to say what the array's state is, and return its bytes."""
        sb = self.superblock
        place = state.places[number]
        sb.dev_number = number
        sb.events, sb.utime = state.events, state.utime or int(time.time())
        sb.resync_offset = _resync_sectors(state)
        sb.raid_disks, sb.size = state.raid_disks, state.size >> SECTOR_SHIFT
        sb.set_feature("BITMAP_OFFSET", state.bitmap)
        sb.set_feature("REPLACEMENT", False)
        if self.ppl_feature is not None:
            sb.set_feature(self.ppl_feature, state.ppl)
        recovering = isinstance(place.role, int) and not place.in_sync
        sb.set_feature("RECOVERY_OFFSET", recovering)
        sb.set_feature("RECOVERY_BITMAP", recovering and place.by_bitmap)
        sb.recovery_offset = place.recovery_offset >> SECTOR_SHIFT if recovering else 0
        sb.write_mostly = place.write_mostly
        sb.cnt_corrected_read = place.corrected
        roles = [MD_DISK_ROLE_SPARE] * max(len(sb.dev_roles), max(state.places) + 1)
        names = {FAULTY: MD_DISK_ROLE_FAULTY, JOURNAL: MD_DISK_ROLE_JOURNAL}
        for each in state.places.values():
            if isinstance(each.role, int):
                roles[each.number] = each.role
            else:
                roles[each.number] = names.get(each.role, MD_DISK_ROLE_SPARE)
        sb.dev_roles = roles
        return sb.encode()


class Disk090(Disk):
    """A disk with a superblock of version 0.90."""

    superblock: Superblock090

    @property
    def set_uuid(self) -> bytes:
        """The array's UUID, 16 bytes."""
        return self.superblock.set_uuid

    @property
    def features(self) -> list[str]:
        """Names of those features that 0.90 has too."""
        names = [("RESHAPE_ACTIVE", self.superblock.reshaping)]
        names += [("BITMAP_OFFSET", self.superblock.has_bitmap)]
        return [name for name, there in names if there]

    def load(self) -> None:
        """Take the attributes from the superblock."""
        sb = self.superblock
        self.uuid, self.label = sb.uuid, ""
        self.level, self.layout, self.raid_disks = sb.level, sb.layout, sb.raid_disks
        self.events, self.number = sb.events, sb.this_disk.number
        self.chunk_size = sb.chunk_size
        self.array_size = sb.size << 10 if sb.level else 0
        self.data_offset = 0
        self.data_size = self.byte
        resync = sb.resync_offset
        self.resync_offset = None if resync == MAX_SECTOR else resync << SECTOR_SHIFT
        self.bitmap_offset = None
        if sb.has_bitmap:
            self.bitmap_offset = (self.sector + BITMAP_DEFAULT_OFFSET_090) << SECTOR_SHIFT

    def role_of(self, number: int) -> Role:
        """Return which role this superblock says that a disk has, by its number."""
        if number >= MD_SB_DISKS:
            return SPARE
        descriptor = self.superblock.disks[number]
        if descriptor.is_set(MD_DISK_FAULTY) or descriptor.is_set(MD_DISK_REMOVED):
            return FAULTY
        if descriptor.is_set(MD_DISK_ACTIVE) and descriptor.raid_disk < self.raid_disks:
            return descriptor.raid_disk
        return SPARE

    def numbers(self) -> Mapping[int, Role]:
        """Return the roles of all disks, by number."""
        return {n: self.role_of(n) for n in range(MD_SB_DISKS) if self.role_of(n) != SPARE}

    @property
    def place(self) -> Place:
        """What the disk says of itself."""
        descriptor = self.superblock.this_disk
        in_sync = isinstance(self.role, int) and descriptor.is_set(MD_DISK_SYNC)
        mostly = descriptor.is_set(MD_DISK_WRITEMOSTLY)
        return Place(self.number, self.role, in_sync, write_mostly=mostly)

    @property
    def room(self) -> int:
        """Bytes of data that the device has room for."""
        return self.byte

    def use(self, size: int) -> None:
        """Have room for so many bytes of data: it has, if the data ends before the superblock."""
        assert size <= self.room

    def keep(self, state: ArrayState, number: int) -> bytearray:
        """Change the superblock to say what the array's state is, and return its bytes.

        0.90 numbers disks by their places, and those that are not in sync behind them; how far a
        disk is rebuilt has no room in it.
        """
        sb = self.superblock
        old = {each.number: each for each in sb.disks}
        sb.events = state.events
        sb.utime = (state.utime or int(time.time())) & 0xFFFFFFFF
        sb.raid_disks = state.raid_disks
        if sb.level:
            sb.size = state.size >> 10
        sb.state = (1 << MD_SB_BITMAP_PRESENT) if state.bitmap else 0
        resync = _resync_sectors(state)
        if resync == MAX_SECTOR:
            sb.state |= 1 << MD_SB_CLEAN
        # The field has 32 bits; what is left out is done once more.
        sb.recovery_cp = min(resync, 0xFFFFFFFF)
        sb.cp_events = state.events if state.clean else 0
        sb.disks = [DiskDescriptor() for _ in range(MD_SB_DISKS)]
        mine = self._descriptors(state, old, number)
        removed = 1 << MD_DISK_REMOVED
        failed = 0
        for index in range(state.raid_disks):
            if not sb.disks[index].state and not sb.disks[index].number:
                faulty = removed | 1 << MD_DISK_FAULTY
                sb.disks[index] = DiskDescriptor(index, raid_disk=index, state=faulty)
                failed += 1
        sb.failed_disks = failed
        sb.this_disk = sb.disks[mine]
        return sb.encode()

    # Fill in a descriptor for each disk and count them; returns the index of one of them.
    def _descriptors(
        self, state: ArrayState, old: Mapping[int, DiskDescriptor], number: int
    ) -> int:
        sb = self.superblock
        sb.nr_disks = sb.active_disks = sb.working_disks = sb.spare_disks = 0
        sb.disks[0].state = 1 << MD_DISK_REMOVED
        behind, mine = state.raid_disks, 0
        for place in sorted(state.places.values(), key=lambda each: each.number):
            active = isinstance(place.role, int) and place.in_sync
            index = place.role if active else behind
            behind += not active
            if index >= MD_SB_DISKS:
                raise DeviceError(
                    errno.ENOSPC, f"{self.name}: a superblock of version 0.90 has no room for "
                    f"more than {MD_SB_DISKS} disks"
                )
            known = old.get(place.number, DiskDescriptor())
            bits = 1 << MD_DISK_WRITEMOSTLY if place.write_mostly else 0
            if place.role == FAULTY:
                bits |= 1 << MD_DISK_FAULTY
            elif active:
                bits |= 1 << MD_DISK_ACTIVE | 1 << MD_DISK_SYNC
            sb.disks[index] = DiskDescriptor(
                index, known.major, known.minor, place.role if active else index, bits
            )
            sb.nr_disks += 1
            sb.active_disks += active
            sb.working_disks += place.role != FAULTY
            sb.spare_disks += not active and place.role != FAULTY
            if place.number == number:
                mine = index
        return mine


def open_disk(
    medium: Medium,
    name: str,
    size: int,
    *,
    prefer: Callable[[Disk], bool] | None = None,
) -> Disk | None:
    """Look for a superblock of MD on a device.

    Args:
        medium: the device, or a leg that is all of it.
        name: what people call it.
        size: bytes.
        prefer: of several superblocks, take the first for which this holds, if there is one.

    Returns:
        The disk with the newest superblock that can be used; None when there is none at all.

    Raises:
        FormatError: there is a superblock, and it is damaged or not one that can be used.
    """
    sectors = size >> SECTOR_SHIFT
    found = find(lambda at, length: read_bytes(medium, at, length), sectors, device=name)
    if not found:
        return None
    disks = []
    for each in found:
        if each.superblock is not None:
            kind = Disk090 if each.version == "0.90" else Disk1
            disks.append(kind(medium, name, size, each.version, each.superblock, each.sector))
    if not disks:
        raise found[0].error
    return next(filter(prefer, disks), disks[0]) if prefer is not None else disks[0]


assert where("1.2", 1 << 20) << SECTOR_SHIFT == 8 * SECTOR_SIZE
