"""md's partial parity log: what makes a RAID 5 whole again after a crash in mid-stripe.

Source: Linux v6.1 include/uapi/linux/raid/md_p.h, ppl_header; drivers/md/raid5-ppl.c,
ppl_log_stripe(), ppl_submit_iounit(), ppl_load_distributed(), ppl_recover(), ppl_recover_entry(),
ppl_write_empty_header(), ppl_init_log().
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from dmpy.errors import FormatError
from dmpy.formats._crc32c import crc32c
from dmpy.formats._record import Record, hexadecimal, octets, record, u32, u64
from dmpy.units import SECTOR_SIZE

__all__ = [
    "PPL_HDR_MAX_ENTRIES",
    "PPL_HEADER_SIZE",
    "PPL_SPACE_SIZE",
    "PPLEntry",
    "PPLFound",
    "PPLHeader",
    "crc32c",
    "newest",
    "signature_of",
]

PPL_HEADER_SIZE = 4096
PPL_HDR_MAX_ENTRIES = 148
PPL_SPACE_SIZE = 128 << 10  # bytes of partial parity behind one header, in a log of several

_RESERVED = 512
_LARGEST_CHECKED = 1 << 31  # bytes; no entry is nearly as large


def signature_of(set_uuid: bytes) -> int:
    """Return the signature that an array's logs carry.

    Args:
        set_uuid: 16 bytes.
    """
    return crc32c(set_uuid)


@record
class PPLEntry(Record):
    """Fields of struct ppl_header_entry: a write of one or several stripes.

    Attributes:
        data_sector: first sector of the array that is written.
        pp_size: bytes of partial parity; 0 when all data of the stripes is written.
        data_size: bytes of data, on all members together.
        parity_disk: the member with the parity.
        checksum: crc32c of the partial parity.
    """

    data_sector: int = u64()
    pp_size: int = u32()
    data_size: int = u32()
    parity_disk: int = u32()
    checksum: int = u32()


@record
class PPLHeader(Record):
    """Fields of struct ppl_header.

    Attributes:
        reserved: 512 bytes of all ones.
        signature: crc32c of the array's UUID.
        generation: higher is newer; 0 in an empty log.
        entries_count, checksum: set by encode.
        entries: what is logged, its partial parity behind the header in the same order.
    """

    reserved: bytes = octets(_RESERVED, b"\xff" * _RESERVED)
    signature: int = u32()
    padding: int = u32()
    generation: int = u64()
    entries_count: int = u32()
    checksum: int = u32()
    entries: list[PPLEntry] = dataclasses.field(default_factory=list)

    @classmethod
    def decode(cls, view: Any, *, device: str = "data", byte: int = 0) -> Self:
        """Read and check a header.

        Args:
            view: its 4096 bytes.
            device: where it comes from, for messages.
            byte: where it begins on the device.

        Raises:
            FormatError: the checksum is another, or there are more entries than can be.
        """
        view = memoryview(view).cast("B")
        if len(view) < PPL_HEADER_SIZE:
            raise FormatError(
                f"too short: {len(view)} bytes where {PPL_HEADER_SIZE} are needed",
                device=device,
                byte=byte,
            )
        view = view[:PPL_HEADER_SIZE]
        self = cls.unpack(view, device=device, byte=byte)
        csum = _checksum(view)
        if self.checksum != csum:
            found, expected = hexadecimal(self.checksum), hexadecimal(csum)
            raise self._wrong("checksum", found, expected, device, byte)
        if self.entries_count > PPL_HDR_MAX_ENTRIES:
            expected = f"at most {PPL_HDR_MAX_ENTRIES}"
            raise self._wrong("entries_count", self.entries_count, expected, device, byte)
        places = range(cls.SIZE, cls.SIZE + self.entries_count * PPLEntry.SIZE, PPLEntry.SIZE)
        self.entries = [
            PPLEntry.unpack(view[at:], device=device, byte=byte + at) for at in places
        ]
        self.check(device=device, byte=byte)
        return self

    def _wrong(
        self, field: str, found: object, expected: object, device: str, byte: int
    ) -> FormatError:
        return self.wrong("partial parity log", field, found, expected, device=device, byte=byte)

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where an entry is not made of whole sectors."""
        for number, entry in enumerate(self.entries):
            at = byte + self.SIZE + number * PPLEntry.SIZE
            for field in ("pp_size", "data_size"):
                size = getattr(entry, field)
                if size % SECTOR_SIZE or size > _LARGEST_CHECKED:
                    raise entry.wrong(
                        f"partial parity log, entry {number}",
                        field,
                        size,
                        f"a multiple of {SECTOR_SIZE}, {_LARGEST_CHECKED} at most",
                        device=device,
                        byte=at,
                    )

    @property
    def pp_size(self) -> int:
        """Bytes of partial parity behind the header."""
        return sum(entry.pp_size for entry in self.entries)

    def encode(self) -> bytearray:
        """Return the header's 4096 bytes, with count and checksum set."""
        assert len(self.entries) <= PPL_HDR_MAX_ENTRIES, f"{len(self.entries)} entries"
        self.assert_sound()
        self.entries_count = len(self.entries)
        packed = self.pack()
        for entry in self.entries:
            packed += entry.pack()
        packed = packed.ljust(PPL_HEADER_SIZE, b"\0")
        self.checksum = _checksum(packed)
        at = self.offsets["checksum"]
        packed[at : at + 4] = self.checksum.to_bytes(4, "little")
        return packed


assert PPLHeader.SIZE + PPL_HDR_MAX_ENTRIES * PPLEntry.SIZE <= PPL_HEADER_SIZE
assert PPLEntry.SIZE == 24


def _checksum(view: Any) -> int:
    # Of the header with its own checksum as zero.
    at = PPLHeader.offsets["checksum"]
    view = memoryview(view)
    return crc32c(view[at + 4 :], crc32c(b"\0\0\0\0", crc32c(view[:at])))


class PPLFound(NamedTuple):
    """The newest log of a member.

    Attributes:
        offset: bytes from the beginning of the member's log area to the header.
        header: the header.
    """

    offset: int
    header: PPLHeader


def newest(
    read: Callable[[int, int], Any],
    size: int,
    *,
    signature: int,
    device: str = "data",
    byte: int = 0,
) -> PPLFound | None:
    """Find the newest log in a member's area, where several lie one behind the other.

    Args:
        read: read(offset, length) returns bytes of the device; offset counts from its beginning.
        size: bytes of the area (ppl_size).
        signature: the array's; a header with another is not one.
        device: its name for messages.
        byte: where the area begins on the device.

    Returns:
        The log to be replayed, or None when there is none, not even an empty one. The kernel takes
        the first whose successor is older, is no header, or has no room.
    """
    found, offset = None, 0
    while offset < size - PPL_HEADER_SIZE:
        try:
            view = read(byte + offset, PPL_HEADER_SIZE)
            header = PPLHeader.decode(view, device=device, byte=byte + offset)
        except FormatError:
            break  # behind the last one lies anything
        if header.signature != signature:
            break
        if found is not None and found.header.generation > header.generation:
            break
        found = PPLFound(offset, header)
        offset += PPL_HEADER_SIZE + header.pp_size
    return found
