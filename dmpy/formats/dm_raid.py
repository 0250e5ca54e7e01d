"""The superblock that dm-raid keeps at the beginning of each metadata device.

The write-intent bitmap lies behind it, at byte 4096, in md's format (md_bitmap), except for raid0.

Source: Linux v6.1 drivers/md/dm-raid.c, struct dm_raid_superblock, super_sync(), super_load(),
super_init_validation(), super_validate().
"""

from __future__ import annotations

from collections.abc import Iterable

from dmpy.formats._record import Record, hexadecimal, record, s32, u32, u64

__all__ = [
    "BITMAP_OFFSET",
    "DM_RAID_MAGIC",
    "FEATURE_FLAG_SUPPORTS_V190",
    "MAX_RAID_DEVICES",
    "MAX_SECTOR",
    "SB_FLAG_RESHAPE_ACTIVE",
    "SB_FLAG_RESHAPE_BACKWARDS",
    "DmRaidSuperblock",
]

DM_RAID_MAGIC = 0x64526D44  # "DmRd"
BITMAP_OFFSET = 4096  # bytes from the start of the metadata device
MAX_RAID_DEVICES = 253
MAX_SECTOR = (1 << 64) - 1  # md's MaxSector: done, or not under way

FEATURE_FLAG_SUPPORTS_V190 = 1  # in compat_features: the fields from `flags` on are there
SB_FLAG_RESHAPE_ACTIVE = 1
SB_FLAG_RESHAPE_BACKWARDS = 2

_LARGEST_BLOCK = 4096  # the kernel writes one logical block, of a page at most


@record
class DmRaidSuperblock(Record):
    """Fields of struct dm_raid_superblock; sectors throughout, as the kernel has it.

    Attributes:
        array_position: the device's place in the set; -1 when it has none any more.
        failed_devices: bit i: device i has failed; devices from 64 on in extended_failed_devices.
        disk_recovery_offset: sectors of this device that are rebuilt; MAX_SECTOR when all are.
        array_resync_offset: sectors of each device that are in sync; MAX_SECTOR when all are.
        level, layout: md's numbers.
        reshape_position: sector of the array, or MAX_SECTOR when no reshape goes on.
    """

    magic: int = u32(DM_RAID_MAGIC)
    compat_features: int = u32(FEATURE_FLAG_SUPPORTS_V190)
    num_devices: int = u32()
    array_position: int = s32()
    events: int = u64()
    failed_devices: int = u64()
    disk_recovery_offset: int = u64(MAX_SECTOR)
    array_resync_offset: int = u64(MAX_SECTOR)
    level: int = s32()
    layout: int = s32()
    stripe_sectors: int = u32()
    flags: int = u32()
    reshape_position: int = u64(MAX_SECTOR)
    new_level: int = s32()
    new_layout: int = s32()
    new_stripe_sectors: int = u32()
    delta_disks: int = s32()
    array_sectors: int = u64()
    data_offset: int = u64()
    new_data_offset: int = u64()
    sectors: int = u64()
    extended_failed_devices: list[int] = u64(count=3)
    incompat_features: int = u32()

    @property
    def extended(self) -> bool:
        """Whether the fields from `flags` on mean anything."""
        return bool(self.compat_features & FEATURE_FLAG_SUPPORTS_V190)

    @property
    def reshaping(self) -> bool:
        """Whether a reshape was under way."""
        return self.extended and bool(self.flags & SB_FLAG_RESHAPE_ACTIVE)

    @property
    def failed(self) -> set[int]:
        """Positions of the devices that have failed."""
        words = [self.failed_devices]
        words += self.extended_failed_devices if self.extended else []
        return {
            64 * number + bit
            for number, word in enumerate(words)
            for bit in range(64)
            if word >> bit & 1
        }

    @failed.setter
    def failed(self, positions: Iterable[int]) -> None:
        # Setting implies the extension, which the kernel writes always.
        words = [0, 0, 0, 0]
        for position in positions:
            assert 0 <= position < MAX_RAID_DEVICES, f"no device {position}"
            words[position // 64] |= 1 << position % 64
        self.failed_devices, *self.extended_failed_devices = words
        self.compat_features |= FEATURE_FLAG_SUPPORTS_V190

    @classmethod
    def is_there(cls, view: object) -> bool:
        """Whether the bytes begin with the magic; a device without it is new to its raid set."""
        return bytes(memoryview(view)[:4]) == DM_RAID_MAGIC.to_bytes(4, "little")

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where the kernel would not use it; what is of no use is zeroed."""

        def wrong(field: str, found: object, expected: object) -> Exception:
            reason = "not a dm-raid superblock" if field == "magic" else "dm-raid superblock"
            return self.wrong(reason, field, found, expected, device=device, byte=byte)

        if self.magic != DM_RAID_MAGIC:
            raise wrong("magic", hexadecimal(self.magic), hexadecimal(DM_RAID_MAGIC))
        if self.compat_features & ~FEATURE_FLAG_SUPPORTS_V190:
            found = hexadecimal(self.compat_features)
            raise wrong("compat_features", found, "no bit but FEATURE_FLAG_SUPPORTS_V190")
        if self.incompat_features:
            raise wrong("incompat_features", hexadecimal(self.incompat_features), "0")
        if not 1 <= self.num_devices <= MAX_RAID_DEVICES:
            raise wrong("num_devices", self.num_devices, f"1 to {MAX_RAID_DEVICES}")
        # A device that a reshape takes away keeps its position beyond the new number.
        if not -1 <= self.array_position < MAX_RAID_DEVICES:
            raise wrong("array_position", self.array_position, f"-1 to {MAX_RAID_DEVICES - 1}")

    def encode(self, block_size: int = 512) -> bytearray:
        """Return what is written: one logical block, zero behind the fields.

        Args:
            block_size: bytes of a logical block of the metadata device.
        """
        assert self.SIZE <= block_size <= _LARGEST_BLOCK, f"blocks of {block_size} bytes"
        return super().encode().ljust(block_size, b"\0")


assert DmRaidSuperblock.SIZE == 148
