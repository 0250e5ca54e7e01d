"""dm-raid's superblock against what Linux wrote."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import dm_raid
from dmpy.formats.dm_raid import MAX_SECTOR, DmRaidSuperblock
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why, records

GOLDEN = {name: disk for name, disk in golden().items() if name.startswith("dm-raid")}
SOUND = GOLDEN["dm-raid1-0"].read(0, 512)


def decode(name):
    return DmRaidSuperblock.decode(GOLDEN[name].read(0, 512), device=name)


def test_the_table_of_the_page_is_the_layout():
    rows = pages.layout("dm_raid", "magic")
    assert [(row[0], row[3]) for row in rows] == [
        (at, name) for name, at in DmRaidSuperblock.offsets.items()
    ]
    assert rows[-1][0] + rows[-1][1] == DmRaidSuperblock.SIZE


def test_the_example_of_the_page_holds():
    data = pages.example("dm_raid").ljust(512, b"\0")
    superblock = DmRaidSuperblock.decode(data)
    for field, value in pages.said("dm_raid").items():
        assert str(getattr(superblock, field)) == value, field
    assert superblock.encode() == data


@pytest.mark.parametrize("name", GOLDEN)
def test_what_linux_wrote_is_written_again_byte_for_byte(name):
    assert decode(name).encode() == GOLDEN[name].read(0, 512)


@pytest.mark.parametrize(
    ("name", "level", "layout", "chunk", "devices", "position", "sectors"),
    [
        ("dm-raid1-1", 1, 0, 0, 2, 1, 20000),
        ("dm-raid5-failed-2", 5, 2, 64, 3, 2, 10240),
        ("dm-raid6-4", 6, 8, 32, 5, 4, 4096),
        ("dm-raid10-0", 10, 0x50201, 64, 4, 0, 10240),
        ("dm-raid0-1", 0, 0, 64, 2, 1, 10240),
    ],
)
def test_the_geometry_is_that_of_the_table(name, level, layout, chunk, devices, position, sectors):
    superblock = decode(name)
    assert (superblock.level, superblock.layout) == (level, layout)
    assert superblock.stripe_sectors == chunk
    assert (superblock.num_devices, superblock.array_position) == (devices, position)
    assert superblock.sectors == sectors
    assert superblock.extended and not superblock.reshaping


def test_a_reshape_says_where_it_goes():
    superblock = decode("dm-raid5-reshaping-4")
    assert superblock.reshaping
    assert superblock.flags & dm_raid.SB_FLAG_RESHAPE_BACKWARDS
    assert (superblock.stripe_sectors, superblock.new_stripe_sectors) == (64, 32)
    assert (superblock.data_offset, superblock.new_data_offset) == (0, 8192)
    assert superblock.reshape_position != MAX_SECTOR


def test_the_devices_that_work_know_who_has_failed():
    assert decode("dm-raid5-failed-0").failed == {1}
    assert decode("dm-raid5-failed-2").failed == {1}
    assert decode("dm-raid5-failed-0").events == decode("dm-raid5-failed-2").events
    assert decode("dm-raid5-failed-1").events < decode("dm-raid5-failed-0").events


def test_an_idle_set_is_in_sync():
    superblock = decode("dm-raid1-0")
    assert superblock.array_resync_offset == MAX_SECTOR
    assert superblock.disk_recovery_offset == MAX_SECTOR
    assert superblock.reshape_position == MAX_SECTOR


AT_REST = [name for name in GOLDEN if "reshaping" not in name and name != "dm-raid0-1"]


@pytest.mark.parametrize("name", AT_REST)
def test_the_bitmap_lies_behind(name):
    view = GOLDEN[name].read(dm_raid.BITMAP_OFFSET, 8192)
    bitmap = BitmapSuper.decode(view, device=name, byte=dm_raid.BITMAP_OFFSET)
    assert bitmap.uuid == bytes(16)
    assert bitmap.events >= decode(name).events
    assert Bits.decode(bitmap, view).count == bitmap.bits


def test_raid0_has_no_bitmap():
    assert not any(GOLDEN["dm-raid0-1"].read(dm_raid.BITMAP_OFFSET, 8192))


@given(st.sets(st.integers(0, 252)))
def test_failed_devices_are_found_again(failed):
    superblock = DmRaidSuperblock(num_devices=253)
    superblock.failed = failed
    assert DmRaidSuperblock.decode(superblock.encode()).failed == failed


def test_without_the_extension_the_first_64_devices_count():
    superblock = dataclasses.replace(decode("dm-raid1-0"), compat_features=0)
    superblock.failed_devices, superblock.extended_failed_devices = 5, [1, 2, 3]
    assert superblock.failed == {0, 2}


@given(
    records(
        DmRaidSuperblock,
        magic=dm_raid.DM_RAID_MAGIC,
        compat_features=st.integers(0, 1),
        num_devices=st.integers(1, 253),
        array_position=st.integers(-1, 252),
        incompat_features=0,
    ),
    st.sampled_from([512, 1024, 4096]),
)
def test_any_superblock_comes_back(superblock, block_size):
    data = superblock.encode(block_size)
    assert len(data) == block_size
    assert DmRaidSuperblock.decode(data) == superblock


@given(damaged(SOUND))
def test_damaged_bytes_never_crash(data):
    superblock = decodes_or_says_why(DmRaidSuperblock.decode, data)
    if superblock is not None:
        assert superblock.encode()[: superblock.SIZE] == data[: superblock.SIZE]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "magic",
            0,
            "rmeta: byte 0: not a dm-raid superblock: magic is 0x00000000, expected 0x64526d44",
        ),
        (
            "compat_features",
            3,
            "rmeta: byte 4: dm-raid superblock: compat_features is 0x00000003, "
            "expected no bit but FEATURE_FLAG_SUPPORTS_V190",
        ),
        (
            "incompat_features",
            1,
            "rmeta: byte 144: dm-raid superblock: incompat_features is 0x00000001, expected 0",
        ),
        (
            "num_devices",
            254,
            "rmeta: byte 8: dm-raid superblock: num_devices is 254, expected 1 to 253",
        ),
        (
            "array_position",
            253,
            "rmeta: byte 12: dm-raid superblock: array_position is 253, expected -1 to 252",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, sentence):
    superblock = dataclasses.replace(decode("dm-raid1-0"), **{field: value})
    with pytest.raises(FormatError) as caught:
        DmRaidSuperblock.decode(superblock.pack(), device="rmeta")
    assert str(caught.value) == sentence
    assert caught.value.field == field
    with pytest.raises(AssertionError):
        superblock.encode()


def test_253_devices_are_accepted():
    superblock = DmRaidSuperblock(num_devices=253, array_position=252)
    assert DmRaidSuperblock.decode(superblock.encode()) == superblock


def test_a_device_without_the_magic_is_new():
    assert DmRaidSuperblock.is_there(SOUND)
    assert not DmRaidSuperblock.is_there(bytes(512))
