"""md's partial parity log against what Linux wrote while it wrote stripes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import md_ppl
from dmpy.formats.md_ppl import (
    PPL_HDR_MAX_ENTRIES,
    PPLEntry,
    PPLHeader,
    crc32c,
    newest,
    signature_of,
)
from dmpy.formats.md_superblock import find
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why, records

GOLDEN = {
    name: disk for name, disk in golden().items() if name.startswith("ppl-") and "log" in name
}


def area(name):
    """A disk with a log, where that begins, how long it is, and what signs it."""
    disk = GOLDEN[name]
    superblock = find(disk.read, disk.sectors)[0].superblock
    at = (superblock.super_offset + superblock.ppl_offset) * 512
    return disk, at, superblock.ppl_size * 512, signature_of(superblock.set_uuid)


def found_in(name):
    disk, at, size, signature = area(name)
    return newest(disk.read, size, signature=signature, device=name, byte=at)


def headers():
    """Every header that lies in an area, by its place, newest or not."""
    result = {}
    for name in GOLDEN:
        disk, at, size, _ = area(name)
        for offset in range(0, size, 4096):
            data = disk.read(at + offset, 4096)
            if data[:512] == b"\xff" * 512 and any(data[512:]):
                result[name, at + offset] = data
    return result


HEADERS = headers()
SOUND = next(data for data in HEADERS.values() if PPLHeader.decode(data).entries)


@pytest.mark.parametrize(("kind", "first"), [(PPLHeader, "reserved"), (PPLEntry, "data_sector")])
def test_the_tables_of_the_page_are_the_layout(kind, first):
    rows = pages.layout("md_ppl", first)
    assert [(row[0], row[3]) for row in rows] == [(at, name) for name, at in kind.offsets.items()]
    assert rows[-1][0] + rows[-1][1] == kind.SIZE


def test_the_example_of_the_page_holds():
    data = pages.example("md_ppl").ljust(4096, b"\0")
    header = PPLHeader.decode(data)
    for field, value in pages.said("md_ppl").items():
        assert getattr(header, field) == int(value, 0), field
    assert header.encode() == data


def test_all_headers_that_linux_wrote_are_written_again_byte_for_byte():
    assert len(HEADERS) > 10
    for data in HEADERS.values():
        assert PPLHeader.decode(data).encode() == data


def test_all_partial_parity_that_linux_wrote_has_the_checksum_of_its_entry():
    checked = 0
    for (name, place), data in HEADERS.items():
        at = place + md_ppl.PPL_HEADER_SIZE
        for entry in PPLHeader.decode(data).entries:
            assert crc32c(GOLDEN[name].read(at, entry.pp_size)) == entry.checksum
            at += entry.pp_size
            checked += entry.pp_size > 0
    assert checked > 10


def test_the_newest_log_has_the_highest_generation():
    for name in GOLDEN:
        generations = [
            PPLHeader.decode(data).generation for (disk, _), data in HEADERS.items() if disk == name
        ]
        assert found_in(name).header.generation == max(generations), name


def test_a_log_that_was_never_written_is_empty():
    for name in ("ppl-1.0-log", "ppl-1.2-log-ubdb"):
        found = found_in(name)
        assert (found.offset, found.header.entries, found.header.generation) == (0, [], 0)


def test_entries_name_the_member_that_has_the_parity():
    assert {entry.parity_disk for entry in found_in("ppl-1.2-log-ubda").header.entries} == {0}
    assert {entry.parity_disk for entry in found_in("ppl-1.2-log-ubdc").header.entries} == {2}


def test_a_log_of_another_array_is_not_one():
    disk, at, size, signature = area("ppl-1.2-log-ubda")
    assert newest(disk.read, size, signature=signature ^ 1, byte=at) is None


def log_of(*headers):
    """A reader of an area with these headers, one behind the other."""
    data = bytearray()
    for header in headers:
        data += header.encode() + bytes(header.pp_size)
    data = data.ljust(1 << 20, b"\0")
    return lambda offset, length: data[offset : offset + length]


def header(generation, pp_size=4096, signature=5):
    entry = PPLEntry(data_sector=8, pp_size=pp_size, data_size=4096, parity_disk=1)
    return PPLHeader(signature=signature, generation=generation, entries=[entry])


@pytest.mark.parametrize(
    ("generations", "offset"),
    [
        ([1], 0), ([1, 2], 8192), ([1, 2, 3], 16384), ([4, 2, 3], 0), ([4, 5, 3], 8192),
        ([2, 2], 8192),
    ],
)  # fmt: skip
def test_the_walk_ends_where_a_log_is_older(generations, offset):
    """The ring has come round: what follows the newest is what is left of the last round."""
    found = newest(log_of(*map(header, generations)), 1 << 20, signature=5)
    assert (found.offset, found.header.generation) == (offset, max(generations))


def test_the_walk_ends_at_the_end_of_the_area():
    found = newest(log_of(header(1), header(2)), 8192 + 4096, signature=5)
    assert found.offset == 0
    assert newest(log_of(header(1)), 4096, signature=5) is None


def test_the_walk_ends_where_a_header_is_torn():
    read = log_of(header(1), header(2))

    def torn(offset, length):
        data = read(offset, length)
        return data[:520] + bytes(len(data) - 520) if offset == 8192 else data

    assert newest(torn, 1 << 20, signature=5).offset == 0


ENTRIES = st.lists(
    records(
        PPLEntry,
        pp_size=st.integers(0, 1 << 22).map(lambda sectors: sectors * 512),
        data_size=st.integers(0, 1 << 22).map(lambda sectors: sectors * 512),
    ),
    max_size=6,
)


@given(records(PPLHeader, entries=ENTRIES))
def test_any_header_comes_back(ours):
    packed = ours.encode()
    assert len(packed) == 4096
    assert PPLHeader.decode(packed) == ours
    assert ours.entries_count == len(ours.entries)


def test_148_entries_are_accepted():
    ours = PPLHeader(entries=[PPLEntry() for _ in range(PPL_HDR_MAX_ENTRIES)])
    assert PPLHeader.decode(ours.encode()) == ours


def sealed(data):
    data = bytearray(data)
    data[532:536] = bytes(4)
    data[532:536] = crc32c(data).to_bytes(4, "little")
    return bytes(data)


def test_149_entries_are_refused():
    data = bytearray(SOUND)
    data[528:532] = (149).to_bytes(4, "little")
    with pytest.raises(FormatError) as caught:
        PPLHeader.decode(sealed(data), device="sda", byte=8192)
    assert str(caught.value) == (
        "sda: byte 8720: partial parity log: entries_count is 149, expected at most 148"
    )


@pytest.mark.parametrize("field", ["pp_size", "data_size"])
def test_an_entry_that_is_not_made_of_sectors_is_refused(field):
    ours = PPLHeader(entries=[PPLEntry(), dataclasses.replace(PPLEntry(), **{field: 100})])
    with pytest.raises(AssertionError, match=f"entry 1: {field} is 100"):
        ours.encode()


def test_a_wrong_checksum_is_refused():
    data = bytearray(SOUND)
    data[4095] ^= 1
    with pytest.raises(FormatError, match="sda: byte 8724: partial parity log: checksum is 0x"):
        PPLHeader.decode(data, device="sda", byte=8192)


@given(damaged(SOUND))
def test_damaged_bytes_never_crash(data):
    decodes_or_says_why(PPLHeader.decode, data, byte=8192)


@given(damaged(SOUND))
def test_damaged_bytes_with_a_right_checksum_never_crash(data):
    if len(data) >= 4096:
        ours = decodes_or_says_why(PPLHeader.decode, sealed(data), byte=8192)
        if ours is not None:
            newest(lambda offset, length: sealed(data), 1 << 20, signature=ours.signature)


# The checksum.


def bit_by_bit(data, crc=0xFFFFFFFF):
    for value in data:
        crc ^= value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_has_the_vectors_of_rfc_3720(data, crc):
    """Appendix B.4, its bytes read as a little-endian number."""
    assert crc32c(data) == crc


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_crc32c_is_the_one_computed_bit_by_bit_and_goes_on_anywhere(data, cut):
    assert crc32c(data) == bit_by_bit(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == bit_by_bit(data)
