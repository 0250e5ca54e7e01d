"""New arrays: which numbers make one, and the superblocks and bitmaps that say so.

Nothing is written until everything has been checked. Places are mdadm's: see `md_superblock`.

Source: mdadm 4.2 Create.c, Create(); super1.c, init_super1(), add_internal_bitmap1(),
write_init_super1(), write_bitmap1(); super0.c, init_super0().
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dmpy.device import BlockDevice
from dmpy.errors import DeviceError, FormatError
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from dmpy.formats.md_superblock import (
    BITMAP_DEFAULT_OFFSET_090,
    MAX_SECTOR,
    MD_DISK_ROLE_SPARE,
    VERSIONS,
    Superblock1,
    Superblock090,
    bitmap_space,
    data_offset_for,
    free_sectors,
    where,
)
from dmpy.md.disk import SPARE, ArrayState, Disk, Disk1, Disk090, Medium, Place, open_disk
from dmpy.raid.levels import (
    RAID0_ALT_MULTIZONE_LAYOUT,
    RAID0_ORIG_LAYOUT,
    Geometry,
    find_level,
    raid10_layout,
    raid10_parameters,
)
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE, round_down

__all__ = [
    "LAYOUTS",
    "LEVEL_NAMES",
    "Recipe",
    "create",
    "geometry_of",
    "joining_disk",
    "layout_name",
    "layout_number",
    "level_number",
    "what_is_there",
    "zero_superblocks",
]

LEVEL_NAMES = ("raid0", "raid1", "raid4", "raid5", "raid6", "raid10")
_ALIASES = {"stripe": "raid0", "mirror": "raid1"}
# mdadm's words for layouts; the first of those with one number is the one that is printed.
_RAID5 = {
    "left-asymmetric": 0, "right-asymmetric": 1, "left-symmetric": 2, "right-symmetric": 3,
    "parity-first": 4, "parity-last": 5,
    "la": 0, "ra": 1, "ls": 2, "rs": 3,
    "ddf-zero-restart": 1, "ddf-N-restart": 0, "ddf-N-continue": 2,
}
_RAID6 = {
    "left-asymmetric": 0, "right-asymmetric": 1, "left-symmetric": 2, "right-symmetric": 3,
    "parity-first": 4, "parity-last": 5,
    "ddf-zero-restart": 8, "ddf-N-restart": 9, "ddf-N-continue": 10,
    "left-asymmetric-6": 16, "right-asymmetric-6": 17, "left-symmetric-6": 18,
    "right-symmetric-6": 19, "parity-first-6": 20,
    "la": 0, "ra": 1, "ls": 2, "rs": 3,
}
_RAID0 = {"original": RAID0_ORIG_LAYOUT, "alternate": RAID0_ALT_MULTIZONE_LAYOUT}
LAYOUTS = {0: _RAID0, 5: _RAID5, 6: _RAID6}

_DEFAULT_CHUNK = 512 << 10
_DEFAULT_LAYOUT = {0: RAID0_ORIG_LAYOUT, 1: 0, 4: 0, 5: 2, 6: 2, 10: 0x102}
# Superblocks of 0.90 count KiB in 32 bits and have room for so many disks.
_LARGEST_090 = (1 << 32) - 1 << 10
_MOST_090 = 27
_BLKID_SECONDS = 20.0


def _refuse(reason: str, number: int = errno.EINVAL) -> DeviceError:
    return DeviceError(number, reason)


def level_number(word: str) -> int:
    """Return md's number of a level that is named as mdadm does: raid5, 5, mirror.

    Raises:
        OSError: EINVAL, there is no such level.
    """
    name = _ALIASES.get(word, word)
    name = name if name.startswith("raid") else f"raid{name}"
    if name not in LEVEL_NAMES:
        raise _refuse(f"level must be one of {', '.join(LEVEL_NAMES)} (got {word})")
    return int(name.removeprefix("raid"))


def layout_number(level: int, word: str | None) -> int:
    """Return md's number of a layout that is named as mdadm does: left-symmetric, n2, f2, o3.

    Raises:
        OSError: EINVAL, the level has no such layout.
    """
    if word is None:
        return _DEFAULT_LAYOUT[level]
    if level == 10 and word[:1] in ("n", "f", "o") and word[1:].isdecimal():
        copies = int(word[1:])
        if 1 <= copies <= 255:
            if word[0] == "n":
                return raid10_layout(copies, 1)
            return raid10_layout(1, copies, word[0] == "o")
    known = LAYOUTS.get(level, {})
    if word in known:
        return known[word]
    words = ", ".join(known) or ("n2, f2, o2 and the like" if level == 10 else "none")
    raise _refuse(f"layout of raid{level} must be one of {words} (got {word})")


def layout_name(level: int, layout: int) -> str:
    """Return mdadm's word for a layout; empty for levels that have but one."""
    if level == 10:
        numbers = raid10_parameters(layout)
        words = [f"near={numbers['near']}"] if numbers["near"] > 1 else []
        if numbers["far"] > 1:
            words.append(f"{'offset' if numbers['far_offset'] else 'far'}={numbers['far']}")
        return ", ".join(words) or "near=1"
    for word, number in LAYOUTS.get(level, {}).items():
        if number == layout:
            return word
    return ""


def geometry_of(
    level: int, layout: int, raid_disks: int, chunk_size: int, size: int, sizes: Sequence[int] = ()
) -> Geometry:
    """Return the geometry that the numbers of a superblock mean.

    Args:
        level: md's number.
        layout: md's number.
        raid_disks: places.
        chunk_size: bytes.
        size: bytes used of each member.
        sizes: RAID 0: bytes of data of each member.

    Raises:
        OSError: EINVAL, they make no array.
    """
    if level not in _DEFAULT_LAYOUT:
        names = {-1: "linear", -4: "multipath", -5: "faulty"}
        raise _refuse(f"level {names.get(level, level)} is not supported")
    try:
        found = find_level(level, layout)
        more = {}
        if level == 0:
            more = {"sizes": tuple(sizes), "raid0_layout": layout}
            if layout not in (RAID0_ORIG_LAYOUT, RAID0_ALT_MULTIZONE_LAYOUT):
                chunks = {each // chunk_size for each in sizes} if chunk_size else set()
                if len(chunks) > 1:
                    raise ValueError(
                        "RAID 0 of members of several sizes has no known layout "
                        f"(got {layout}, expected 1 or 2)"
                    )
                more["raid0_layout"] = RAID0_ORIG_LAYOUT
        elif level == 10:
            more = raid10_parameters(layout)
        return Geometry(found, raid_disks, chunk_size, member_size=size, **more)
    except ValueError as error:
        raise _refuse(str(error)) from None


@dataclass
class Recipe:
    """What a new array is to be.

    Attributes:
        level: md's number.
        layout: md's number, None for mdadm's choice.
        chunk_size: bytes, 0 for 512 KiB; not for RAID 1.
        version: of the superblocks.
        name: of the array, in the superblocks; 0.90 has none.
        size: bytes to use of each member, 0 for all that there is.
        data_offset: sectors, None for mdadm's choice.
        bitmap: there is to be a write-intent bitmap.
        bitmap_chunk: bytes for each bit, 0 for mdadm's choice.
        assume_clean: the members agree already.
        write_mostly: places of members that are to be read only when nothing else can be.
        uuid: 16 bytes, None for random ones.
    """

    level: int
    layout: int | None = None
    chunk_size: int = 0
    version: str = "1.2"
    name: str = ""
    size: int = 0
    data_offset: int | None = None
    bitmap: bool = False
    bitmap_chunk: int = 0
    assume_clean: bool = False
    write_mostly: frozenset[int] = frozenset()
    uuid: bytes | None = None


def create(
    devices: Sequence[BlockDevice | None],
    spares: Sequence[BlockDevice],
    recipe: Recipe,
    *,
    force: bool = False,
) -> list[Disk]:
    """Make an array: write superblocks and bitmaps.

    Args:
        devices: one for each place, None for one that is missing.
        spares: further devices.
        recipe: what it is to be.
        force: also over what is on the devices already.

    Returns:
        Its disks, members by place and then spares.

    Raises:
        OSError: what is wanted cannot be; nothing has been written. Or a write failed.
    """
    plan = _Plan(devices, spares, recipe)
    there = [*(each for each in devices if each is not None), *spares]
    if len({id(each) for each in there}) != len(there):
        raise _refuse("one device is named twice")
    for device in there:
        found = what_is_there(device)
        if found and not force:
            raise _refuse(f"{device.name} carries {found} (force overwrites it)", errno.EBUSY)
    disks = plan.disks()
    for device in there:
        # Elsewhere too, so that only the new one is found.
        zero_superblocks(device)
    for disk in disks:
        plan.write(disk)
    return disks


# The numbers of a new array, checked.
class _Plan:
    def __init__(
        self, devices: Sequence[BlockDevice | None], spares: Sequence[BlockDevice], recipe: Recipe
    ) -> None:
        self.recipe = recipe
        self.devices = [*devices, *spares]
        self.raid_disks = len(devices)
        there = [each for each in self.devices if each is not None]
        if recipe.version not in VERSIONS:
            raise _refuse(f"version must be one of {', '.join(VERSIONS)} (got {recipe.version})")
        if not [each for each in devices if each is not None]:
            raise _refuse("an array needs a device that is there")
        if recipe.version == "0.90" and len(self.devices) > _MOST_090:
            raise _refuse(f"version 0.90 has room for {_MOST_090} disks (got {len(self.devices)})")
        level = recipe.level
        self.layout = _DEFAULT_LAYOUT[level] if recipe.layout is None else recipe.layout
        self.chunk_size = recipe.chunk_size or (0 if level == 1 else _DEFAULT_CHUNK)
        self._check_chunk()
        if recipe.version == "0.90" and level == 0 and recipe.layout is not None:
            raise _refuse("version 0.90 cannot say which layout a RAID 0 has")
        if level == 0 and (spares or len(there) != len(self.devices)):
            raise _refuse("RAID 0 has neither spares nor missing members")
        if level == 0 and recipe.bitmap:
            raise _refuse("RAID 0 has no write-intent bitmap")
        self.offset = recipe.data_offset
        if self.offset is None:
            self.offset = data_offset_for(
                recipe.version, there[0].size >> SECTOR_SHIFT,
                chunk_size_sectors=self.chunk_size >> SECTOR_SHIFT,
            )
        room = [self._room(each) for each in there]
        self.size = self._member_size(min(room))
        sizes = [round_down(each, self.chunk_size) for each in room] if level == 0 else ()
        self.geometry = geometry_of(
            level, self.layout, self.raid_disks, self.chunk_size, self.size, sizes
        )
        if not self.geometry.size:
            raise _refuse(f"members of {min(room)} bytes have no room for an array")
        present = {place for place, device in enumerate(devices) if device is not None}
        if not self.geometry.enough(present):
            raise _refuse(
                f"{len(devices) - len(present)} members are missing, more than "
                f"raid{level} of {len(devices)} members can do without"
            )
        self.bitmap = self._bitmap() if recipe.bitmap else None
        self.uuid = recipe.uuid or os.urandom(16)

    def _check_chunk(self) -> None:
        if self.recipe.level == 1:
            if self.recipe.chunk_size:
                raise _refuse("RAID 1 has no chunks")
            return
        size = self.chunk_size
        # Parity levels work on pages, and shift; RAID 0 takes any number of pages.
        if size % 4096 or (size & (size - 1) and self.recipe.level != 0):
            kind = "a multiple of 4096" if self.recipe.level == 0 else "a power of 2 from 4096 on"
            raise _refuse(f"chunk size must be {kind} bytes (got {size})")

    # Bytes of data that a device has room for.
    def _room(self, device: BlockDevice) -> int:
        sectors = device.size >> SECTOR_SHIFT
        try:
            free = free_sectors(self.recipe.version, sectors, data_offset=self.offset)
        except ValueError as error:
            raise _refuse(f"{device.name}: {error}") from None
        if free <= 0:
            raise _refuse(
                f"{device.name} is too small for an array (got {sectors} sectors, "
                f"expected more than {sectors - free})", errno.ENOSPC
            )
        return free << SECTOR_SHIFT

    def _member_size(self, room: int) -> int:
        size = self.recipe.size or round_down(room, 1024)
        if size > room:
            raise _refuse(
                f"size must be at most what the smallest member has (got {size} bytes, "
                f"expected {room})", errno.ENOSPC
            )
        if self.recipe.version == "0.90" and size > _LARGEST_090:
            raise _refuse("version 0.90 cannot have members of more than 4 TiB")
        return round_down(size, self.chunk_size) if self.chunk_size else size

    def _bitmap(self) -> BitmapSuper:
        sectors = self.size >> SECTOR_SHIFT
        covered = self.geometry.size >> SECTOR_SHIFT if self.recipe.level == 10 else sectors
        space = bitmap_space(sectors) * SECTOR_SIZE
        if self.recipe.version == "0.90":
            space = (128 - BITMAP_DEFAULT_OFFSET_090) * SECTOR_SIZE
        try:
            chunk = BitmapSuper.choose_chunksize(
                covered, space, smallest=4096 if self.recipe.bitmap_chunk else 64 << 20
            )
        except ValueError as error:
            raise _refuse(str(error)) from None
        wanted = self.recipe.bitmap_chunk or chunk
        if wanted < chunk or wanted & (wanted - 1):
            raise _refuse(
                f"bitmap chunk must be a power of 2 from {chunk} bytes on (got {wanted})"
            )
        return BitmapSuper(sync_size=covered, chunksize=wanted, daemon_sleep=5)

    # How the array begins: parity that has to be made first, or copies that have to agree. With
    # as many members missing as can be, there is nothing that could disagree.
    @property
    def clean(self) -> bool:
        missing = self.devices[: self.raid_disks].count(None)
        parity = self.geometry.level.parity
        return bool(
            self.recipe.assume_clean
            or self.recipe.level == 0
            or self.raid_disks == 1
            or (parity and missing)
        )

    @property
    def state(self) -> ArrayState:
        places = {
            number: Place(
                number,
                number if number < self.raid_disks else SPARE,
                number < self.raid_disks,
                write_mostly=number in self.recipe.write_mostly,
            )
            for number, device in enumerate(self.devices)
            if device is not None
        }
        size = 0 if self.recipe.level == 0 and self.recipe.version != "0.90" else self.size
        resync = None if self.clean else 0
        bitmap = self.bitmap is not None
        return ArrayState(0, resync, True, size, self.raid_disks, bitmap, places)

    def disks(self) -> list[Disk]:
        """Return the disks with their superblocks; nothing is written."""
        make = self._disk090 if self.recipe.version == "0.90" else self._disk1
        state = self.state
        made = [
            make(number, device)
            for number, device in enumerate(self.devices)
            if device is not None
        ]
        for disk, number in zip(made, state.places, strict=True):
            # Asserts that it would be read again, for all of them before the first is written.
            disk.keep(state, number)
        return made

    def _disk1(self, number: int, device: BlockDevice) -> Disk:
        recipe = self.recipe
        sectors = device.size >> SECTOR_SHIFT
        try:
            sb = Superblock1.fresh(
                recipe.version, sectors, data_offset=self.offset, bitmap=self.bitmap,
                level=recipe.level, layout=self.layout, raid_disks=self.raid_disks,
                chunksize=self.chunk_size >> SECTOR_SHIFT, set_uuid=self.uuid,
                device_uuid=os.urandom(16), dev_number=number, resync_offset=MAX_SECTOR,
                size=self.state.size >> SECTOR_SHIFT,
                dev_roles=[MD_DISK_ROLE_SPARE] * 128,
            )
        except ValueError as error:
            raise _refuse(f"{device.name}: {error}") from None
        sb.name = recipe.name
        if recipe.level == 0:
            sb.set_feature("RAID0_LAYOUT")
        sector = where(recipe.version, sectors)
        return Disk1(device, device.name, device.size, recipe.version, sb, sector)

    def _disk090(self, number: int, device: BlockDevice) -> Disk:
        recipe = self.recipe
        now = int(time.time())
        sb = Superblock090(
            minor_version=90, ctime=now, utime=now, level=recipe.level, size=self.size >> 10,
            raid_disks=self.raid_disks, layout=0 if recipe.level == 0 else self.layout,
            chunk_size=self.chunk_size,
        )
        sb.set_uuid = self.uuid
        sector = where("0.90", device.size >> SECTOR_SHIFT)
        return Disk090(device, device.name, device.size, "0.90", sb, sector)

    def write(self, disk: Disk) -> None:
        """Write a disk's bitmap, and then its superblock."""
        device = disk.medium
        number = next(n for n, each in enumerate(self.devices) if each is device)
        disk.keep(self.state, number)
        disk.load()
        if self.bitmap is not None:
            self.bitmap.uuid = disk.set_uuid
            bits = Bits(self.bitmap.bits)
            # As mdadm does: all that has not been synced may differ.
            bits.fill(not self.clean)
            area = bits.encode(self.bitmap)
            device.pwritev([memoryview(area)], disk.bitmap_offset)
        disk.write(self.state, number)


def zero_superblocks(device: BlockDevice) -> list[str]:
    """Overwrite every superblock of MD on a device with zeroes; returns their versions."""
    wiped = []
    for version in VERSIONS:
        try:
            sector = where(version, device.size >> SECTOR_SHIFT)
        except ValueError:
            continue
        head = bytearray(4)
        device.preadv([memoryview(head)], sector << SECTOR_SHIFT)
        if head in (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc"):
            length = min(4096, device.size - (sector << SECTOR_SHIFT))
            device.pwritev([memoryview(bytearray(length))], sector << SECTOR_SHIFT)
            wiped.append(version)
    if wiped:
        device.flush()
    return wiped


def joining_disk(newest: Disk, medium: Medium, device: BlockDevice, size: int) -> Disk:
    """Return a disk that is to join an array, with a superblock that is not written yet.

    Args:
        newest: a disk of the array.
        medium: what to write its superblock to.
        device: the device.
        size: bytes of data that it must have room for.

    Raises:
        OSError: ENOSPC, it is too small.
    """
    sectors = device.size >> SECTOR_SHIFT
    name, version = device.name, newest.version
    try:
        sector = where(version, sectors)
        if version == "0.90":
            sb = copy.deepcopy(newest.superblock)
            disk: Disk = Disk090(medium, name, device.size, version, sb, sector)
        else:
            old = newest.superblock
            bitmap = newest.read_bitmap()[0] if newest.bitmap_offset is not None else None
            fresh = Superblock1.fresh(
                version, sectors, data_offset=old.data_offset, bitmap=bitmap, size=old.size,
                level=old.level, layout=old.layout, raid_disks=old.raid_disks, ctime=old.ctime,
                chunksize=old.chunksize, set_uuid=old.set_uuid, device_uuid=os.urandom(16),
                set_name=old.set_name, dev_roles=list(old.dev_roles),
                ppl=newest.ppl_feature is not None,
            )
            if newest.ppl_feature is not None:
                fresh.set_feature("PPL", False)
                fresh.set_feature(newest.ppl_feature)
            fresh.set_feature("RAID0_LAYOUT", old.has("RAID0_LAYOUT"))
            disk = Disk1(medium, name, device.size, version, fresh, sector)
    except (ValueError, FormatError) as error:
        raise _refuse(f"{name} cannot join the array: {error}", errno.ENOSPC) from None
    if disk.data_size < size:
        raise _refuse(
            f"{name} has room for {disk.data_size} bytes of data, the array needs {size}",
            errno.ENOSPC,
        )
    return disk


def what_is_there(device: BlockDevice) -> str:
    """Say what a device carries: `an ext4 file system`, `a member of array ...`, or nothing.

    An array's superblock is looked for here; everything else is known to `blkid` of util-linux,
    where there is one and the device is a path that it can open.
    """
    try:
        disk = open_disk(device, device.name, device.size)
    except FormatError:
        return "a damaged superblock of an MD array"
    if disk is not None:
        return f"a member of the MD array {disk.label or disk.uuid}"
    blkid = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    path = getattr(device, "path", None) or device.name
    if blkid is None or not os.path.exists(path):
        return ""
    try:
        answer = subprocess.run(
            [blkid, "-p", "-o", "export", path], capture_output=True, text=True, check=False,
            timeout=_BLKID_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _refuse(f"{device.name}: blkid did not answer in {_BLKID_SECONDS:g} s") from None
    return _described(dict(
        line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line
    ), answer.returncode)


# blkid's answer in words. It ends with 8 when it finds several things that contradict each other.
def _described(found: dict[str, str], status: int) -> str:
    kind = found.get("TYPE")
    if kind is not None:
        is_file_system = found.get("USAGE") == "filesystem"
        article = "an" if kind[:1] in "aeiou" else "a"
        return f"{article} {kind} file system" if is_file_system else f"{kind} ({found['USAGE']})"
    if "PTTYPE" in found:
        return f"a {found['PTTYPE']} partition table"
    return "several signatures at once" if status == 8 else ""

