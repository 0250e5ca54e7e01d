"""The superblocks of md arrays: versions 1.0, 1.1, 1.2 and 0.90, and where on a member they lie.

Source: Linux v6.1 include/uapi/linux/raid/md_p.h, mdp_superblock_1, mdp_super_t;
drivers/md/md.c, super_1_load(), super_1_sync(), calc_sb_1_csum(), super_90_load(),
super_90_sync(), calc_sb_csum(). How a new member is laid out: what mdadm 4.2 does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import numpy as np

from dmpy.errors import FormatError
from dmpy.formats._record import Record, hexadecimal, octets, record, s32, u8, u16, u32, u64
from dmpy.formats.md_bitmap import BitmapSuper
from dmpy.units import SECTOR_SIZE, exact_div, round_down, round_up

__all__ = [
    "BITMAP_DEFAULT_OFFSET_090",
    "BITMAP_SPACE_090",
    "FAIL_FAST_1",
    "LARGEST_DEVICES",
    "MAX_SECTOR",
    "MD_DISK_ACTIVE",
    "MD_DISK_FAILFAST",
    "MD_DISK_FAULTY",
    "MD_DISK_REMOVED",
    "MD_DISK_ROLE_FAULTY",
    "MD_DISK_ROLE_JOURNAL",
    "MD_DISK_ROLE_MAX",
    "MD_DISK_ROLE_SPARE",
    "MD_DISK_SYNC",
    "MD_DISK_WRITEMOSTLY",
    "MD_FEATURES",
    "MD_SB_BITMAP_PRESENT",
    "MD_SB_BYTES",
    "MD_SB_CLEAN",
    "MD_SB_DISKS",
    "MD_SB_ERRORS",
    "MD_SB_MAGIC",
    "PPL_AREA_SECTORS",
    "VERSIONS",
    "WRITE_MOSTLY_1",
    "Candidate",
    "DiskDescriptor",
    "Superblock090",
    "Superblock1",
    "bitmap_space",
    "data_offset_for",
    "find",
    "free_sectors",
    "sb_csum",
    "sb_csum_090",
    "where",
]

MD_SB_MAGIC = 0xA92B4EFC
MD_SB_BYTES = 4096
MD_SB_DISKS = 27  # of 0.90
MAX_SECTOR = (1 << 64) - 1  # md's MaxSector: done, or not under way
LARGEST_DEVICES = (MD_SB_BYTES - 256) // 2  # roles of 1.x in one page
VERSIONS = ("0.90", "1.0", "1.1", "1.2")

MD_DISK_ROLE_SPARE = 0xFFFF
MD_DISK_ROLE_FAULTY = 0xFFFE
MD_DISK_ROLE_JOURNAL = 0xFFFD
MD_DISK_ROLE_MAX = 0xFF00  # roles below are places in the array

# The kernel's names of the bits of feature_map, without MD_FEATURE_, from bit 0 up.
MD_FEATURES = (
    "BITMAP_OFFSET",
    "RECOVERY_OFFSET",
    "RESHAPE_ACTIVE",
    "BAD_BLOCKS",
    "REPLACEMENT",
    "RESHAPE_BACKWARDS",
    "NEW_OFFSET",
    "RECOVERY_BITMAP",
    "CLUSTERED",
    "JOURNAL",
    "PPL",
    "MULTIPLE_PPLS",
    "RAID0_LAYOUT",
)

# In devflags of 1.x.
WRITE_MOSTLY_1 = 1
FAIL_FAST_1 = 2

# Bits of a descriptor's state in 0.90.
MD_DISK_FAULTY, MD_DISK_ACTIVE, MD_DISK_SYNC, MD_DISK_REMOVED = 0, 1, 2, 3
MD_DISK_WRITEMOSTLY, MD_DISK_FAILFAST = 9, 10
# Bits of the superblock's state in 0.90.
MD_SB_CLEAN, MD_SB_ERRORS, MD_SB_BITMAP_PRESENT = 0, 1, 8

# Sectors behind a superblock of 0.90 where its bitmap begins.
BITMAP_DEFAULT_OFFSET_090 = MD_SB_BYTES // SECTOR_SIZE
BITMAP_SPACE_090 = 128 - BITMAP_DEFAULT_OFFSET_090  # sectors

PPL_AREA_SECTORS = 2048  # what mdadm reserves
_BAD_BLOCK_SECTORS = 8
_SMALLEST_DEVICE = {"0.90": 128, "1.0": 24, "1.1": 24, "1.2": 24}  # sectors
_SECONDS = (1 << 40) - 1  # the part of a time that is seconds


def _bit(name: str) -> int:
    return 1 << MD_FEATURES.index(name)


def where(version: str, device_size_sectors: int) -> int:
    """Return the sector where the superblock of a version begins.

    Args:
        version: one of VERSIONS.
        device_size_sectors: size of the member.

    Raises:
        ValueError: the device is too small to have one.
    """
    if device_size_sectors < _SMALLEST_DEVICE[version]:
        raise ValueError(
            f"{device_size_sectors} sectors are too few for a superblock of version {version} "
            f"(expected {_SMALLEST_DEVICE[version]})"
        )
    if version == "0.90":
        return round_down(device_size_sectors, 128) - 128
    if version == "1.0":
        return round_down(device_size_sectors - 16, 8)
    return {"1.1": 0, "1.2": 8}[version]


def sb_csum(packed: Any) -> int:
    """Return the checksum of a packed superblock of 1.x, roles and all.

    Args:
        packed: bytes of 256 and 2 for each role; the checksum in it does not count.
    """
    packed = memoryview(packed).cast("B")
    words = np.frombuffer(packed[: len(packed) // 4 * 4], "<u4")
    total = int(words.sum(dtype=np.uint64)) - int(words[Superblock1.offsets["sb_csum"] // 4])
    if len(packed) % 4:
        total += int.from_bytes(packed[-2:], "little")
    return (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF


def sb_csum_090(packed: Any, byte_order: str = "<") -> int:
    """Return the checksum of a packed superblock of 0.90; the checksum in it does not count."""
    words = np.frombuffer(memoryview(packed)[:MD_SB_BYTES], f"{byte_order}u4")
    total = int(words.sum(dtype=np.uint64)) - int(words[Superblock090.offsets["sb_csum"] // 4])
    return (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF


def _fold(csum: int) -> int:
    # Hosts have summed 0.90 differently; folded to 16 bits they all agree.
    csum = (csum & 0xFFFF) + (csum >> 16)
    return (csum & 0xFFFF) + (csum >> 16)


def _uuid_text(octets_: bytes) -> str:
    # As mdadm prints it.
    text = octets_.hex()
    return ":".join(text[i : i + 8] for i in range(0, 32, 8))


@record
class Superblock1(Record):
    """Fields of mdp_superblock_1; all sectors are of 512 bytes.

    Attributes:
        feature_map: bits, see `features`.
        set_uuid, device_uuid: 16 bytes.
        ctime, utime: seconds in the low 40 bits, microseconds above.
        size: sectors used of each member; 0 for levels that use all of it.
        chunksize: sectors.
        bitmap_offset: sectors from the superblock to the bitmap, may be negative; or ppl_offset
            and ppl_size.
        new_level, reshape_position, delta_disks, new_layout, new_chunk: of a reshape.
        new_offset: sectors added to data_offset in the new layout.
        data_offset, data_size: sectors of the device.
        super_offset: the sector where this superblock lies.
        recovery_offset: sectors from data_offset on that are recovered; or journal_tail.
        dev_number: the device's number, which indexes dev_roles.
        bblog_shift: log2 of sectors in a unit of the bad-block log.
        bblog_size, bblog_offset: sectors of that log, and from the superblock to it.
        events: counts updates.
        resync_offset: sectors from data_offset on that are in sync; MAX_SECTOR when all are.
        sb_csum, max_dev: set by encode.
        dev_roles: by device number: place in the array, or one of MD_DISK_ROLE_*.
    """

    magic: int = u32(MD_SB_MAGIC)
    major_version: int = u32(1)
    feature_map: int = u32()
    pad0: int = u32()
    set_uuid: bytes = octets(16)
    set_name: bytes = octets(32)
    ctime: int = u64()
    level: int = s32()
    layout: int = s32()
    size: int = u64()
    chunksize: int = u32()
    raid_disks: int = u32()
    bitmap_offset: int = s32()
    new_level: int = s32()
    reshape_position: int = u64()
    delta_disks: int = s32()
    new_layout: int = s32()
    new_chunk: int = u32()
    new_offset: int = s32()
    data_offset: int = u64()
    data_size: int = u64()
    super_offset: int = u64()
    recovery_offset: int = u64()
    dev_number: int = u32()
    cnt_corrected_read: int = u32()
    device_uuid: bytes = octets(16)
    devflags: int = u8()
    bblog_shift: int = u8()
    bblog_size: int = u16()
    bblog_offset: int = s32()
    utime: int = u64()
    events: int = u64()
    resync_offset: int = u64()
    sb_csum: int = u32()
    max_dev: int = u32()
    pad3: bytes = octets(32)
    dev_roles: list[int] = dataclasses.field(default_factory=list)

    # What the fields say.

    @property
    def features(self) -> list[str]:
        """Names of the feature bits that are set; one that has none is BIT_n."""
        return [
            MD_FEATURES[bit] if bit < len(MD_FEATURES) else f"BIT_{bit}"
            for bit in range(32)
            if self.feature_map >> bit & 1
        ]

    def has(self, name: str) -> bool:
        """Whether a feature bit is set; `name` is one of MD_FEATURES."""
        return bool(self.feature_map & _bit(name))

    def set_feature(self, name: str, value: bool = True) -> None:
        """Set or clear a feature bit."""
        self.feature_map = self.feature_map & ~_bit(name) | (_bit(name) if value else 0)

    @property
    def uuid(self) -> str:
        """The array's UUID as mdadm prints it."""
        return _uuid_text(self.set_uuid)

    @property
    def name(self) -> str:
        """set_name as text."""
        return self.set_name.split(b"\0")[0].decode("utf-8", "surrogateescape")

    @name.setter
    def name(self, text: str) -> None:
        # Truncated as mdadm does.
        self.set_name = text.encode("utf-8", "surrogateescape")[:31].ljust(32, b"\0")

    @property
    def role(self) -> int:
        """This device's role; that of a spare when it has no number in the list."""
        number = self.dev_number
        return self.dev_roles[number] if number < len(self.dev_roles) else MD_DISK_ROLE_SPARE

    @property
    def clean(self) -> bool:
        """Whether all of the array was in sync and stopped in order."""
        return self.resync_offset == MAX_SECTOR

    @property
    def reshape_backwards(self) -> bool:
        """Whether a reshape goes from the end to the beginning."""
        backwards = self.delta_disks == 0 and self.has("RESHAPE_BACKWARDS")
        return self.has("RESHAPE_ACTIVE") and (self.delta_disks < 0 or backwards)

    @property
    def write_mostly(self) -> bool:
        """Whether reads go elsewhere when they can."""
        return bool(self.devflags & WRITE_MOSTLY_1)

    @write_mostly.setter
    def write_mostly(self, value: bool) -> None:
        # The other flags are kept.
        self.devflags = self.devflags & ~WRITE_MOSTLY_1 | (WRITE_MOSTLY_1 if value else 0)

    @property
    def fail_fast(self) -> bool:
        """Whether errors of the device are to come at once."""
        return bool(self.devflags & FAIL_FAST_1)

    @property
    def has_ppl(self) -> bool:
        """Whether there are partial parity logs, one or several in turn."""
        return self.has("PPL") or self.has("MULTIPLE_PPLS")

    @property
    def ppl_offset(self) -> int:
        """Sectors from the superblock to the partial parity log, signed."""
        low = self.bitmap_offset & 0xFFFF
        return low - 0x10000 if low & 0x8000 else low

    @property
    def ppl_size(self) -> int:
        """Sectors of the partial parity log."""
        return self.bitmap_offset >> 16 & 0xFFFF

    def set_ppl(self, offset: int, size: int) -> None:
        """Set both, in sectors; they lie where bitmap_offset lies."""
        word = (offset & 0xFFFF) | size << 16
        self.bitmap_offset = word - (1 << 32) if word & 1 << 31 else word

    @property
    def journal_tail(self) -> int:
        """For a journal device: where its log begins, in sectors from data_offset."""
        return self.recovery_offset

    # To and from the disk.

    @classmethod
    def decode(
        cls,
        view: Any,
        *,
        device: str = "data",
        byte: int = 0,
        device_size_sectors: int | None = None,
    ) -> Self:
        """Read and check a superblock.

        Args:
            view: bytes from its begin, as many as there are roles; 4096 are always enough.
            device: where it comes from, for messages.
            byte: where it begins on the device; must be where it says it is.
            device_size_sectors: when given, everything must also lie on the device.

        Raises:
            FormatError: no superblock, or one that the kernel would refuse.
        """
        view = memoryview(view).cast("B")
        self = cls.unpack(view, device=device, byte=byte)
        self._check_magic(device, byte)
        end = cls.SIZE + 2 * self.max_dev
        if self.max_dev > LARGEST_DEVICES or end > len(view):
            largest = min(LARGEST_DEVICES, (len(view) - cls.SIZE) // 2)
            raise self._wrong("max_dev", self.max_dev, f"at most {largest}", device, byte)
        csum = sb_csum(view[:end])
        if csum != self.sb_csum:
            raise self._wrong(
                "sb_csum", hexadecimal(self.sb_csum), hexadecimal(csum), device, byte
            )
        self.dev_roles = np.frombuffer(view[cls.SIZE : end], "<u2").tolist()
        if self.super_offset * SECTOR_SIZE != byte:
            raise self._wrong(
                "super_offset", self.super_offset, f"{byte // SECTOR_SIZE}", device, byte
            )
        self.check(device=device, byte=byte)
        if device_size_sectors is not None:
            self.check_places(device_size_sectors, device=device, byte=byte)
        return self

    def _wrong(
        self, field: str, found: object, expected: object, device: str, byte: int
    ) -> FormatError:
        return self.wrong("md superblock", field, found, expected, device=device, byte=byte)

    def _check_magic(self, device: str, byte: int) -> None:
        if self.magic != MD_SB_MAGIC:
            raise self.wrong(
                "not an md superblock",
                "magic",
                hexadecimal(self.magic),
                hexadecimal(MD_SB_MAGIC),
                device=device,
                byte=byte,
            )
        if self.major_version != 1:
            raise self._wrong("major_version", self.major_version, "1", device, byte)

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where the kernel would not take it, wherever it lies."""
        self._check_magic(device, byte)
        unknown = [name for name in self.features if name.startswith("BIT_")]
        if unknown:
            raise self._wrong(
                "feature_map",
                hexadecimal(self.feature_map),
                f"no unknown feature such as {unknown[0]}",
                device,
                byte,
            )
        rules = [
            ("pad0", self.pad0, self.pad0 == 0, "0"),
            ("pad3", self.pad3.hex(), not any(self.pad3), "zeroes"),
            ("data_size", self.data_size, self.data_size >= 10, "at least 10 sectors"),
            ("raid_disks", self.raid_disks, self.raid_disks <= LARGEST_DEVICES, "at most 1920"),
            ("bblog_shift", self.bblog_shift, self.bblog_shift < 64, "below 64"),
        ]
        if self.has("BAD_BLOCKS"):
            rules += [
                ("bblog_size", self.bblog_size, self.bblog_size <= 8, "at most 8 sectors"),
                ("bblog_offset", 0, self.bblog_offset != 0, "not 0"),
            ]
        if self.has("RAID0_LAYOUT"):
            rules += [("level", self.level, self.level == 0, "0 (RAID0_LAYOUT is set)")]
        if self.has_ppl:
            names = [n for n in ("BITMAP_OFFSET", "JOURNAL") if self.has(n)]
            names += ["PPL"] if self.has("PPL") and self.has("MULTIPLE_PPLS") else []
            found = ", ".join(self.features)
            rules += [("feature_map", found, not names, "a partial parity log alone")]
        for field, found, holds, expected in rules:
            if not holds:
                raise self._wrong(field, found, expected, device, byte)

    def check_places(self, device_size_sectors: int, *, device: str, byte: int) -> None:
        """Raise FormatError where something lies beyond the device or on something else.

        Args:
            device_size_sectors: size of the member.
            device: name for messages.
            byte: where the superblock begins.
        """
        begin = self.super_offset
        end = begin + round_up(self.SIZE + 2 * len(self.dev_roles), SECTOR_SIZE) // SECTOR_SIZE
        # mdadm does not take data_offset away from data_size where the superblock lies behind.
        behind = self.data_offset < begin
        room = begin if behind else device_size_sectors - self.data_offset
        if self.data_size > room:
            raise self._wrong("data_size", self.data_size, f"at most {room}", device, byte)
        data_end = self.data_offset + (self.size or self.data_size)
        limit = begin if behind else device_size_sectors
        if data_end > limit:
            expected = f"an end by sector {limit} (from {self.data_offset})"
            raise self._wrong("size", self.size, expected, device, byte)
        if begin <= self.data_offset < end:
            raise self._wrong("data_offset", self.data_offset, f"{end} or more", device, byte)
        if self.has("NEW_OFFSET") and self.has("RESHAPE_ACTIVE"):
            new = self.data_offset + self.new_offset
            if new < 0 or begin <= new < end:
                raise self._wrong("new_offset", self.new_offset, "clear sectors", device, byte)
        for field, offset, length in self._areas():
            first = begin + offset
            last = first + length
            clear = last <= self.data_offset or first >= data_end
            if not clear or first < 0 or last > device_size_sectors or first < end and last > begin:
                expected = f"{length} sectors beside superblock and data"
                raise self._wrong(field, offset, expected, device, byte)

    def _areas(self) -> Iterable[tuple[str, int, int]]:
        # What lies beside the superblock: field, sectors from the superblock, sectors at least.
        if self.has("BITMAP_OFFSET"):
            yield "bitmap_offset", self.bitmap_offset, 1
        if self.has_ppl:
            yield "bitmap_offset", self.ppl_offset, self.ppl_size
        if self.bblog_size and self.bblog_offset:
            yield "bblog_offset", self.bblog_offset, self.bblog_size

    def encode(self, block_size: int = SECTOR_SIZE) -> bytearray:
        """Return the bytes for the disk, whole blocks, with the checksum set.

        Args:
            block_size: bytes of a logical block of the device.
        """
        self.max_dev = len(self.dev_roles)
        self.assert_sound()
        assert self.max_dev <= LARGEST_DEVICES, f"{self.max_dev} roles"
        roles = np.array(self.dev_roles, "<u2").tobytes()
        packed = self.pack() + roles
        self.sb_csum = sb_csum(packed)
        at = self.offsets["sb_csum"]
        packed[at : at + 4] = self.sb_csum.to_bytes(4, "little")
        return packed.ljust(round_up(len(packed), block_size), b"\0")

    # A new member.

    @classmethod
    def fresh(
        cls,
        version: str,
        device_size_sectors: int,
        *,
        data_offset: int,
        bitmap: BitmapSuper | None = None,
        ppl: bool = False,
        bad_blocks: bool = True,
        **fields: Any,
    ) -> Self:
        """Return the superblock of a new member, its places chosen as mdadm does.

        Args:
            version: "1.0", "1.1" or "1.2".
            device_size_sectors: size of the member.
            data_offset: sectors; see `data_offset_for`.
            bitmap: the bitmap that the array is to have, or None.
            ppl: whether to reserve space for a partial parity log (several in turn).
            bad_blocks: whether to reserve space for a bad-block log.
            fields: all others, by name: level, layout, chunksize, raid_disks, size, dev_number,
                dev_roles, set_uuid, device_uuid, set_name and so on.

        Raises:
            ValueError: the device is too small.
        """
        now = int(time.time())
        self = cls(**{"ctime": now, "utime": now, **fields})
        begin = self.super_offset = where(version, device_size_sectors)
        self.data_offset = data_offset
        if not self.dev_roles:
            self.dev_roles = [MD_DISK_ROLE_SPARE] * exact_div(SECTOR_SIZE - cls.SIZE, 2)
        space = bitmap_space(self.size) if bitmap is None else exact_div(bitmap.area, SECTOR_SIZE)
        space = PPL_AREA_SECTORS if ppl else space
        log = _BAD_BLOCK_SECTORS if bad_blocks else 0
        if version == "1.0":
            # From the end: superblock, bad-block log, bitmap, data.
            reserved = min(space + _BAD_BLOCK_SECTORS, max(0, begin - data_offset - self.size))
            self.data_size = begin - data_offset - reserved
            offset = -space - _BAD_BLOCK_SECTORS
            log_offset = -_BAD_BLOCK_SECTORS if reserved >= _BAD_BLOCK_SECTORS else 0
        else:
            # From the begin: superblock, bitmap, bad-block log, headroom, data.
            self.data_size = device_size_sectors - data_offset
            offset = 8
            # Where that leaves no room for the log it lies just before the data, or nowhere.
            fits = data_offset >= begin + offset + space + _BAD_BLOCK_SECTORS
            last = data_offset - begin - _BAD_BLOCK_SECTORS
            log_offset = offset + space if fits else last if last >= 8 else 0
        if ppl:
            self.set_feature("PPL")
            self.set_ppl(offset, PPL_AREA_SECTORS)
        elif bitmap is not None:
            self.set_feature("BITMAP_OFFSET")
            self.bitmap_offset = offset
        if log and log_offset:
            self.bblog_size, self.bblog_offset = log, log_offset
        try:
            self.check(device="new member", byte=begin * SECTOR_SIZE)
            self.check_places(
                device_size_sectors, device="new member", byte=begin * SECTOR_SIZE
            )
        except FormatError as error:
            raise ValueError(str(error)) from error
        return self


assert Superblock1.SIZE == 256


def bitmap_space(device_size_sectors: int) -> int:
    """Return the sectors that mdadm keeps free for a bitmap."""
    if device_size_sectors < 128:
        return 0
    if device_size_sectors - 128 >= 200 << 21:
        return 256
    return 128 if device_size_sectors - 8 > 8 << 21 else 8


def data_offset_for(
    version: str, device_size_sectors: int, *, chunk_size_sectors: int = 0, ppl: bool = False
) -> int:
    """Return the sector where data begins on the members of a new array, as mdadm chooses it.

    mdadm asks this for the first member and takes it for all. About a thousandth of the device, at
    most 128 MiB, is left so that a reshape has somewhere to go; all is rounded up to 1 MiB.
    """
    if version in ("0.90", "1.0"):
        return 0
    headroom = 128 << 11
    while headroom << 10 > device_size_sectors and (
        not chunk_size_sectors or headroom // 2 >= 2 * chunk_size_sectors
    ):
        headroom >>= 1
    space = PPL_AREA_SECTORS if ppl else bitmap_space(device_size_sectors)
    return round_up(24 + space + headroom, 2048)


def free_sectors(
    version: str, device_size_sectors: int, *, data_offset: int, ppl: bool = False
) -> int:
    """Return the sectors of data that a new member has room for; may be 0 or less."""
    if version == "0.90":
        return where("0.90", device_size_sectors)
    if version == "1.0":
        space = PPL_AREA_SECTORS if ppl else bitmap_space(device_size_sectors)
        return round_down(device_size_sectors, 8) - 24 - space - data_offset
    return device_size_sectors - data_offset


@record
class DiskDescriptor(Record):
    """One disk in a superblock of 0.90: mdp_disk_t."""

    number: int = u32()
    major: int = u32()
    minor: int = u32()
    raid_disk: int = u32()
    state: int = u32()
    reserved: list[int] = u32(count=27)

    def is_set(self, bit: int) -> bool:
        """Whether a bit of the state is set, one of MD_DISK_*."""
        return bool(self.state >> bit & 1)


@record
class Superblock090(Record):
    """Fields of mdp_super_t, in the byte order of the host that wrote it.

    Attributes:
        byte_order: "<" or ">".
        size: KiB used of each member, 32 bits: what limits members to 2 TiB and more.
        set_uuid0, set_uuid1, set_uuid2, set_uuid3: the UUID, four words.
        events, cp_events: each two words, low and high in the host's order, read as one.
        recovery_cp: sectors in sync, true when cp_events equals events.
        reshape_position and the new_ fields: of a reshape, when minor_version is 91.
        new_chunk, chunk_size: bytes.
        disks: 27 descriptors; this_disk repeats the one of this member.
    """

    md_magic: int = u32(MD_SB_MAGIC)
    major_version: int = u32()
    minor_version: int = u32(90)
    patch_version: int = u32()
    gvalid_words: int = u32()
    set_uuid0: int = u32()
    ctime: int = u32()
    level: int = s32()
    size: int = u32()
    nr_disks: int = u32()
    raid_disks: int = u32()
    md_minor: int = u32()
    not_persistent: int = u32()
    set_uuid1: int = u32()
    set_uuid2: int = u32()
    set_uuid3: int = u32()
    gstate_creserved: list[int] = u32(count=16)
    utime: int = u32()
    state: int = u32()
    active_disks: int = u32()
    working_disks: int = u32()
    failed_disks: int = u32()
    spare_disks: int = u32()
    sb_csum: int = u32()
    events: int = u64()
    cp_events: int = u64()
    recovery_cp: int = u32()
    reshape_position: int = u64()
    new_level: int = s32()
    delta_disks: int = s32()
    new_layout: int = s32()
    new_chunk: int = u32()
    gstate_sreserved: list[int] = u32(count=14)
    layout: int = s32()
    chunk_size: int = u32()
    root_pv: int = u32()
    root_block: int = u32()
    pstate_reserved: list[int] = u32(count=60)
    disks: list[DiskDescriptor] = dataclasses.field(
        default_factory=lambda: [DiskDescriptor() for _ in range(MD_SB_DISKS)]
    )
    this_disk: DiskDescriptor = dataclasses.field(default_factory=DiskDescriptor)
    byte_order: str = "<"

    @property
    def set_uuid(self) -> bytes:
        """The UUID's 16 bytes as they lie in memory of the host that wrote them."""
        words = (self.set_uuid0, self.set_uuid1, self.set_uuid2, self.set_uuid3)
        order = "little" if self.byte_order == "<" else "big"
        return b"".join(word.to_bytes(4, order) for word in words)

    @set_uuid.setter
    def set_uuid(self, octets_: bytes) -> None:
        # The inverse.
        words = np.frombuffer(octets_, f"{self.byte_order}u4").tolist()
        self.set_uuid0, self.set_uuid1, self.set_uuid2, self.set_uuid3 = words

    @property
    def uuid(self) -> str:
        """The UUID as mdadm prints it."""
        words = (self.set_uuid0, self.set_uuid1, self.set_uuid2, self.set_uuid3)
        return ":".join(f"{word:08x}" for word in words)

    @property
    def clean(self) -> bool:
        """Whether all of the array was in sync and stopped in order."""
        return bool(self.state >> MD_SB_CLEAN & 1)

    @property
    def resync_offset(self) -> int:
        """Sectors of each member that are in sync; MAX_SECTOR when all are."""
        if self.clean:
            return MAX_SECTOR
        return self.recovery_cp if self.cp_events == self.events else 0

    @property
    def has_bitmap(self) -> bool:
        """Whether a bitmap lies behind the superblock."""
        return bool(self.state >> MD_SB_BITMAP_PRESENT & 1)

    @property
    def reshaping(self) -> bool:
        """Whether a reshape was under way."""
        return self.minor_version >= 91

    @classmethod
    def decode(cls, view: Any, *, device: str = "data", byte: int = 0) -> Self:
        """Read and check a superblock in either byte order.

        Raises:
            FormatError: no superblock, or one that the kernel would refuse.
        """
        view = memoryview(view).cast("B")
        swapped = bytes(view[:4]) == MD_SB_MAGIC.to_bytes(4, "big")
        order = ">" if swapped else "<"
        if len(view) < MD_SB_BYTES:
            raise FormatError(
                f"too short: {len(view)} bytes where {MD_SB_BYTES} are needed",
                device=device,
                byte=byte,
            )
        self = cls.unpack(view, device=device, byte=byte, byte_order=order)
        descriptors = [
            DiskDescriptor.unpack(view[at:], device=device, byte=byte + at, byte_order=order)
            for at in range(cls.SIZE, MD_SB_BYTES, DiskDescriptor.SIZE)
        ]
        *self.disks, self.this_disk = descriptors
        self.check(device=device, byte=byte)
        csum = sb_csum_090(view, order)
        if _fold(csum) != _fold(self.sb_csum):
            raise self._wrong(
                "sb_csum", hexadecimal(self.sb_csum), hexadecimal(csum), device, byte
            )
        return self

    def _wrong(
        self, field: str, found: object, expected: object, device: str, byte: int
    ) -> FormatError:
        return self.wrong("md superblock 0.90", field, found, expected, device=device, byte=byte)

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where the kernel would not take it."""
        if self.md_magic != MD_SB_MAGIC:
            raise self.wrong(
                "not an md superblock",
                "md_magic",
                hexadecimal(self.md_magic),
                hexadecimal(MD_SB_MAGIC),
                device=device,
                byte=byte,
            )
        rules = [
            ("major_version", self.major_version, self.major_version == 0, "0"),
            ("minor_version", self.minor_version, self.minor_version in (90, 91), "90 or 91"),
            (
                "raid_disks",
                self.raid_disks,
                1 <= self.raid_disks <= MD_SB_DISKS,
                f"1 to {MD_SB_DISKS}",
            ),
        ]
        for field, found, holds, expected in rules:
            if not holds:
                raise self._wrong(field, found, expected, device, byte)

    def check_places(self, device_size_sectors: int, *, device: str, byte: int) -> None:
        """Raise FormatError where the data would reach into the superblock."""
        if self.level >= 1 and self.size * 2 > where("0.90", device_size_sectors):
            largest = where("0.90", device_size_sectors) // 2
            raise self._wrong("size", f"{self.size} KiB", f"at most {largest} KiB", device, byte)

    def encode(self) -> bytearray:
        """Return the 4096 bytes for the disk, with the checksum set."""
        self.assert_sound()
        assert len(self.disks) == MD_SB_DISKS, f"{len(self.disks)} descriptors"
        packed = self.pack()
        for descriptor in (*self.disks, self.this_disk):
            descriptor.byte_order = self.byte_order
            packed += descriptor.pack()
        assert len(packed) == MD_SB_BYTES, len(packed)
        self.sb_csum = sb_csum_090(packed, self.byte_order)
        at = self.offsets["sb_csum"]
        order = "little" if self.byte_order == "<" else "big"
        packed[at : at + 4] = self.sb_csum.to_bytes(4, order)
        return packed


assert Superblock090.SIZE + (MD_SB_DISKS + 1) * DiskDescriptor.SIZE == MD_SB_BYTES


class Candidate(NamedTuple):
    """A place with md's magic number.

    Attributes:
        version: one of VERSIONS.
        sector: where it lies.
        superblock: what lies there, or None.
        error: why that cannot be used, or None.
    """

    version: str
    sector: int
    superblock: Superblock1 | Superblock090 | None
    error: FormatError | None


def find(
    read: Callable[[int, int], Any], device_size_sectors: int, *, device: str = "data"
) -> list[Candidate]:
    """Look for superblocks in all the places where they may lie.

    Args:
        read: read(offset, length) in bytes returns the bytes of the device.
        device_size_sectors: its size.
        device: its name for messages.

    Returns:
        What has the magic number, newest first: usable ones by ctime as mdadm prefers them, then
        those with an error.
    """
    found = []
    for version in VERSIONS:
        if device_size_sectors < _SMALLEST_DEVICE[version]:
            continue
        sector = where(version, device_size_sectors)
        byte = sector * SECTOR_SIZE
        length = min(MD_SB_BYTES, device_size_sectors * SECTOR_SIZE - byte)
        view = memoryview(read(byte, length)).cast("B")
        magic = bytes(view[:4])
        if magic != MD_SB_MAGIC.to_bytes(4, "little") and (
            version != "0.90" or magic != MD_SB_MAGIC.to_bytes(4, "big")
        ):
            continue
        try:
            if version == "0.90":
                superblock = Superblock090.decode(view, device=device, byte=byte)
                superblock.check_places(device_size_sectors, device=device, byte=byte)
            else:
                superblock = Superblock1.decode(
                    view, device=device, byte=byte, device_size_sectors=device_size_sectors
                )
        except FormatError as error:
            found.append(Candidate(version, sector, None, error))
        else:
            found.append(Candidate(version, sector, superblock, None))
    return sorted(found, key=_age)


def _age(candidate: Candidate) -> int:
    # Sorts the newest first and what cannot be used last.
    superblock = candidate.superblock
    return -(superblock.ctime & _SECONDS) if superblock is not None else 1
