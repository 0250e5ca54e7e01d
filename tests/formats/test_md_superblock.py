"""md's superblocks against mdadm: what it and Linux wrote, and what it says of what we write."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import md_superblock
from dmpy.formats.md_bitmap import BitmapSuper
from dmpy.formats.md_superblock import (
    MAX_SECTOR,
    MD_DISK_ROLE_FAULTY,
    MD_DISK_ROLE_JOURNAL,
    MD_DISK_ROLE_SPARE,
    MD_SB_MAGIC,
    DiskDescriptor,
    Superblock090,
    Superblock1,
    bitmap_space,
    data_offset_for,
    find,
    free_sectors,
    where,
)
from dmpy.units import parse_size
from tests import needs
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why, records

# mdadm 4.2 made an array of version 1.0 whose data goes over its superblock.
OVERLAPPING = "raid1-1.0-offset"
GOLDEN = {
    name: disk
    for name, disk in golden().items()
    if "examine" in disk.text and name != OVERLAPPING
}
OF_1 = [name for name in GOLDEN if "0.90" not in name]
OF_090 = [name for name in GOLDEN if "0.90" in name]
SOUND = GOLDEN["recovering"].read(4096, 4096)
SOUND_090 = GOLDEN["raid5-0.90"].read(where("0.90", 33000) * 512, 4096)


def candidate(name):
    found = find(GOLDEN[name].read, GOLDEN[name].sectors, device=name)
    assert len(found) == 1 and found[0].error is None, found
    return found[0]


def superblock(name):
    return candidate(name).superblock


def words(text):
    """What `mdadm --examine` prints, by its headings."""
    return dict(re.findall(r"^ *([A-Z][A-Za-z ]*?) : (.*?) *$", text, re.MULTILINE))


def number(text):
    return int(re.match(r"-?\d+", text)[0])


# The page.


@pytest.mark.parametrize(
    ("kind", "first", "rest"),
    [(Superblock1, "magic", ["dev_roles"]), (Superblock090, "md_magic", [])]
    + [(DiskDescriptor, "number", [])],
)
def test_the_tables_of_the_page_are_the_layout(kind, first, rest):
    rows = pages.layout("md_superblock", first)
    assert [(row[0], row[3]) for row in rows] == [(at, name) for name, at in kind.offsets.items()]
    assert rows[-1][0] + rows[-1][1] == kind.SIZE
    assert [field.name for field in dataclasses.fields(kind)][-1:] == rest or not rest


def test_the_example_of_the_page_holds():
    data = pages.example("md_superblock")
    ours = Superblock1.decode(data, byte=4096)
    for field, value in pages.said("md_superblock").items():
        read = getattr(ours, field)
        assert read == (bytes.fromhex(value) if isinstance(read, bytes) else int(value, 0)), field
    assert ours.encode() == data


# What mdadm and Linux wrote.


@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_found_where_mdadm_finds_it(name):
    found, says = candidate(name), words(GOLDEN[name].text["examine"])
    assert says["Version"].removesuffix(".00") == found.version
    if found.version != "0.90":
        assert number(says["Super Offset"]) == found.sector


@pytest.mark.parametrize("name", OF_1)
def test_mdadm_says_the_same_of_version_1(name):
    ours, says = superblock(name), words(GOLDEN[name].text["examine"])
    assert says["Array UUID"] == ours.uuid
    assert says["Name"].split()[0] == ours.name == "golden"
    assert int(says["Feature Map"], 16) == ours.feature_map
    assert says["Raid Level"] == f"raid{ours.level}"
    assert number(says["Raid Devices"]) == ours.raid_disks
    assert number(says["Avail Dev Size"]) == ours.data_size
    if "Used Dev Size" in says:
        assert number(says["Used Dev Size"]) == ours.size
    assert number(says.get("Data Offset", "0")) == ours.data_offset
    assert says["Device UUID"].replace(":", "") == ours.device_uuid.hex()
    assert number(says["Events"]) == ours.events
    assert says["Checksum"] == f"{ours.sb_csum:x} - correct"
    assert (says["State"].split()[0] == "clean") == ours.clean
    if "Chunk Size" in says:
        assert number(says["Chunk Size"]) * 2 == ours.chunksize
    if ours.has("RECOVERY_OFFSET"):
        assert number(says["Recovery Offset"]) == ours.recovery_offset
    if ours.has("BITMAP_OFFSET"):
        assert number(says["Internal Bitmap"]) == ours.bitmap_offset
    if ours.has_ppl:
        size, offset = re.match(r"(\d+) sectors at offset (-?\d+) sectors", says["PPL"]).groups()
        assert (int(offset), int(size)) == (ours.ppl_offset, ours.ppl_size)
    log = re.match(r"(\d+) entries available at offset (-?\d+) sectors", says["Bad Block Log"])
    assert int(log[1]) == ours.bblog_size * 64
    assert int(log[2]) == ours.bblog_offset


@pytest.mark.parametrize("name", OF_1)
def test_mdadm_says_the_same_role(name):
    ours, says = superblock(name), words(GOLDEN[name].text["examine"])["Device Role"]
    kinds = {
        MD_DISK_ROLE_SPARE: "spare",
        MD_DISK_ROLE_JOURNAL: "Journal",
        MD_DISK_ROLE_FAULTY: "faulty",
    }
    kind = "Replacement" if ours.has("REPLACEMENT") else "Active"
    assert says == kinds.get(ours.role, f"{kind} device {ours.role}")


@pytest.mark.parametrize("name", OF_090)
def test_mdadm_says_the_same_of_version_090(name):
    ours, says = superblock(name), words(GOLDEN[name].text["examine"])
    assert says["UUID"].split()[0] == ours.uuid
    assert says["Raid Level"] == f"raid{ours.level}"
    assert number(says["Used Dev Size"]) == ours.size
    assert number(says["Raid Devices"]) == ours.raid_disks
    assert number(says["Total Devices"]) == ours.nr_disks
    assert number(says["Preferred Minor"]) == ours.md_minor
    counts = ("Active", "Working", "Failed", "Spare")
    assert [number(says[f"{count} Devices"]) for count in counts] == [
        ours.active_disks, ours.working_disks, ours.failed_disks, ours.spare_disks,
    ]  # fmt: skip
    assert says["Checksum"] == f"{ours.sb_csum:x} - correct"
    assert number(says["Events"]) == ours.events
    assert (says["State"] == "clean") == ours.clean
    assert ("Internal Bitmap" in says) == ours.has_bitmap
    this = re.search(r"^this +(\d+) +(\d+) +(\d+) +(\d+)", GOLDEN[name].text["examine"], re.M)
    disk = ours.this_disk
    assert [int(word) for word in this.groups()] == [
        disk.number, disk.major, disk.minor, disk.raid_disk,
    ]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_mdadm_exports_the_same(name):
    found = candidate(name)
    says = dict(re.findall(r"^(\w+)=(.*)$", GOLDEN[name].text["export"], re.MULTILINE))
    ours = found.superblock
    assert says["MD_LEVEL"] == f"raid{ours.level}"
    assert says["MD_DEVICES"] == str(ours.raid_disks)
    assert says["MD_UUID"] == ours.uuid
    # Of version 0.90 mdadm 4.2 exports the time of creation under that name.
    assert says["MD_UPDATE_TIME"] == str(ours.ctime if found.version == "0.90" else ours.utime)
    assert says["MD_EVENTS"] == str(ours.events)


@pytest.mark.parametrize("name", OF_1)
def test_what_linux_wrote_is_written_again_byte_for_byte(name):
    ours = superblock(name)
    packed = ours.encode()
    assert packed == GOLDEN[name].read(ours.super_offset * 512, len(packed))


@pytest.mark.parametrize("name", OF_090)
def test_what_linux_wrote_in_090_is_written_again_byte_for_byte(name):
    found = candidate(name)
    assert found.superblock.encode() == GOLDEN[name].read(found.sector * 512, 4096)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("raid1-new", ["BITMAP_OFFSET"]),
        ("raid0-1.2", []),
        ("raid0-unequal", ["RAID0_LAYOUT"]),
        ("recovering", ["BITMAP_OFFSET", "RECOVERY_OFFSET"]),
        ("replacement", ["RECOVERY_OFFSET", "REPLACEMENT"]),
        ("replaced", []),
        ("journal-device", ["JOURNAL"]),
        ("journal-member", ["JOURNAL"]),
        ("badblocks", ["BAD_BLOCKS"]),
        ("ppl-1.2-ubda", ["MULTIPLE_PPLS"]),
        ("reshaping", ["RESHAPE_ACTIVE", "NEW_OFFSET"]),
    ],
)
def test_features_are_named(name, features):
    ours = superblock(name)
    assert ours.features == features
    assert all(ours.has(feature) for feature in features)


def test_a_reshape_says_where_it_goes():
    ours = superblock("reshaping")
    assert (ours.raid_disks, ours.delta_disks, ours.new_level, ours.new_chunk) == (4, 1, 5, 128)
    assert not ours.reshape_backwards
    assert 0 < ours.reshape_position < MAX_SECTOR


def test_flags_of_a_device():
    assert superblock("raid1-stale").write_mostly
    assert not superblock("recovering").write_mostly
    assert superblock("replaced").fail_fast
    ours = superblock("replaced")
    ours.write_mostly = True
    assert ours.devflags == 3


def test_a_member_that_was_thrown_out_is_behind():
    assert superblock("raid1-stale").events < superblock("raid1-degraded").events
    assert superblock("raid1-degraded").dev_roles[0] == MD_DISK_ROLE_FAULTY


def test_a_spare_has_no_place():
    assert superblock("raid5-1.0-spare").role == MD_DISK_ROLE_SPARE
    assert superblock("journal-device").role == MD_DISK_ROLE_JOURNAL
    assert superblock("journal-device").journal_tail >= 0


# Where things lie.


@pytest.mark.parametrize(
    ("version", "sectors", "expected"),
    [
        ("0.90", 128, 0), ("0.90", 255, 0), ("0.90", 256, 128), ("0.90", 33000, 32768),
        ("1.0", 24, 8), ("1.0", 33000, 32984), ("1.0", 33007, 32984), ("1.0", 33008, 32992),
        ("1.1", 24, 0), ("1.2", 24, 8),
    ],
)  # fmt: skip
def test_superblocks_begin_where_linux_has_them(version, sectors, expected):
    assert where(version, sectors) == expected


@pytest.mark.parametrize(("version", "sectors"), [("0.90", 127), ("1.0", 23), ("1.2", 23)])
def test_a_device_that_is_too_small_is_refused(version, sectors):
    with pytest.raises(ValueError, match=f"{sectors} sectors are too few for a superblock"):
        where(version, sectors)


def test_data_begins_where_mdadm_has_it():
    for name in ("raid1-new", "raid5-1.0", "raid6-1.1", "raid0-1.2", "ppl-1.2-ubda", "ppl-1.0"):
        found = candidate(name)
        ours, has_ppl = found.superblock, found.superblock.has_ppl
        chunk = ours.chunksize
        offset = data_offset_for(found.version, 33000, chunk_size_sectors=chunk, ppl=has_ppl)
        assert offset == ours.data_offset, name
        free = free_sectors(found.version, 33000, data_offset=offset, ppl=has_ppl)
        unit = max(chunk, 2 if ours.level else 1)
        assert ours.size in (free // unit * unit, free // 128 * 128) or not ours.size, name


# What mdadm 4.2 made of members of these sizes: version, level, chunk (sectors), whether with PPL;
# then data_offset, data_size and bblog_offset. Level 1 had a bitmap.
PLACES = [
    ("64M", "1.2", 1, 0, False, 2048, 129024, 16),
    ("64M", "1.2", 0, 1024, False, 4096, 126976, 8),
    ("64M", "1.2", 5, 128, False, 2048, 129024, 16),
    ("64M", "1.2", 5, 128, True, 4096, 126976, 2056),
    ("64M", "1.2", 0, 16384, False, 34816, 96256, 8),
    ("64M", "1.0", 1, 0, False, 0, 131040, -8),
    ("1G", "1.2", 1, 0, False, 4096, 2093056, 16),
    ("1G", "1.2", 0, 1024, False, 4096, 2093056, 8),
    ("1G", "1.2", 5, 128, False, 4096, 2093056, 16),
    ("1G", "1.2", 5, 128, True, 6144, 2091008, 2056),
    ("1G", "1.2", 0, 16384, False, 34816, 2062336, 8),
    ("1G", "1.0", 1, 0, False, 0, 2097120, -8),
    ("9G", "1.2", 1, 0, False, 18432, 18855936, 16),
    ("9G", "1.2", 0, 1024, False, 18432, 18855936, 8),
    ("9G", "1.2", 5, 128, False, 18432, 18855936, 136),
    ("9G", "1.2", 5, 128, True, 20480, 18853888, 2056),
    ("9G", "1.2", 0, 16384, False, 34816, 18839552, 8),
    ("9G", "1.0", 1, 0, False, 0, 18874336, -8),
    ("100G", "1.2", 1, 0, False, 133120, 209582080, 16),
    ("100G", "1.2", 0, 1024, False, 133120, 209582080, 8),
    ("100G", "1.2", 5, 128, False, 133120, 209582080, 136),
    ("100G", "1.2", 5, 128, True, 135168, 209580032, 2056),
    ("100G", "1.2", 0, 16384, False, 133120, 209582080, 8),
    ("100G", "1.0", 1, 0, False, 0, 209715168, -8),
    ("250G", "1.2", 1, 0, False, 264192, 524023808, 16),
    ("250G", "1.2", 0, 1024, False, 264192, 524023808, 8),
    ("250G", "1.2", 5, 128, False, 264192, 524023808, 264),
    ("250G", "1.2", 5, 128, True, 266240, 524021760, 2056),
    ("250G", "1.2", 0, 16384, False, 264192, 524023808, 8),
    ("250G", "1.0", 1, 0, False, 0, 524287968, -8),
    ("4T", "1.2", 1, 0, False, 264192, 8589670400, 32),
    ("4T", "1.2", 0, 1024, False, 264192, 8589670400, 8),
    ("4T", "1.2", 5, 128, False, 264192, 8589670400, 264),
    ("4T", "1.2", 5, 128, True, 266240, 8589668352, 2056),
    ("4T", "1.2", 0, 16384, False, 264192, 8589670400, 8),
    ("4T", "1.0", 1, 0, False, 0, 8589934544, -8),
]


@pytest.mark.parametrize(
    ("size", "version", "level", "chunk", "ppl", "data_offset", "data_size", "bblog_offset"), PLACES
)
def test_members_of_all_sizes_are_laid_out_as_mdadm_does(
    size, version, level, chunk, ppl, data_offset, data_size, bblog_offset
):
    sectors = parse_size(size) // 512
    offset = data_offset_for(version, sectors, chunk_size_sectors=chunk, ppl=ppl)
    assert offset == data_offset
    free = free_sectors(version, sectors, data_offset=offset, ppl=ppl)
    used = free // 128 * 128 if level else 0
    bitmap = None
    if level == 1:
        chunksize = BitmapSuper.choose_chunksize(used, bitmap_space(used) * 512)
        assert chunksize == 64 << 20
        bitmap = BitmapSuper(sync_size=used, chunksize=chunksize)
    ours = Superblock1.fresh(
        version, sectors, data_offset=offset, bitmap=bitmap, ppl=ppl, level=level, size=used
    )
    assert (ours.data_size, ours.bblog_offset) == (data_size, bblog_offset)


@pytest.mark.parametrize(
    ("sectors", "space"),
    [(0, 0), (127, 0), (128, 8), (16777224, 8), (16777225, 128), (419430527, 128)]
    + [(419430528, 256)],
)
def test_space_for_a_bitmap_grows_with_the_member(sectors, space):
    assert bitmap_space(sectors) == space


def test_a_new_member_has_its_bad_block_log_where_there_is_room():
    """Before the data; where a bitmap leaves nothing between, none at all of version 1.0."""
    ours = Superblock1.fresh("1.2", 4096, data_offset=24, level=1, size=1000, raid_disks=2)
    assert ours.bblog_offset == 8
    ours = Superblock1.fresh("1.2", 4096, data_offset=20, level=1, size=1000, raid_disks=2)
    assert (ours.bblog_offset, ours.bblog_size) == (0, 0)
    ours = Superblock1.fresh("1.0", 4096, data_offset=0, level=1, size=4072, raid_disks=2)
    assert (ours.data_size, ours.bblog_offset) == (4072, -8)
    ours = Superblock1.fresh("1.0", 4096, data_offset=0, level=1, size=4080, raid_disks=2)
    assert (ours.data_size, ours.bblog_offset, ours.bblog_size) == (4080, 0, 0)


def test_a_bad_block_log_can_be_left_out():
    ours = Superblock1.fresh("1.2", 33000, data_offset=2048, level=1, bad_blocks=False)
    assert (ours.bblog_offset, ours.bblog_size) == (0, 0)


@pytest.mark.parametrize(
    ("delta", "features", "backwards"),
    [
        (0, ["RESHAPE_ACTIVE"], False),
        (0, ["RESHAPE_ACTIVE", "RESHAPE_BACKWARDS"], True),
        (-1, ["RESHAPE_ACTIVE"], True),
        (1, ["RESHAPE_ACTIVE", "RESHAPE_BACKWARDS"], False),
        (-1, [], False),
    ],
)
def test_which_way_a_reshape_goes(delta, features, backwards):
    ours = Superblock1(delta_disks=delta)
    for feature in features:
        ours.set_feature(feature)
    assert ours.reshape_backwards == backwards
    for feature in features:
        ours.set_feature(feature, False)
    assert ours.features == []


@pytest.mark.parametrize(("offset", "holds"), [(-2040, False), (-2039, True), (8, True)])
def test_a_new_place_of_the_data_may_not_be_the_superblock(offset, holds):
    ours = Superblock1.decode(SOUND, byte=4096)
    ours.feature_map, ours.new_offset = 0x44, offset
    place = {"device": "sda", "byte": 4096}
    if holds:
        ours.check_places(33000, **place)
        return
    with pytest.raises(FormatError, match=f"new_offset is {offset}"):
        ours.check_places(33000, **place)


# A new member.


def fresh(version, *, bitmap=False, ppl=False, **fields):
    sectors = 65536 + 77
    offset = data_offset_for(version, sectors, chunk_size_sectors=128, ppl=ppl)
    size = free_sectors(version, sectors, data_offset=offset, ppl=ppl) // 128 * 128
    given_fields = {
        "level": 5, "layout": 2, "chunksize": 128, "raid_disks": 3, "size": size,
        "dev_number": 1, "dev_roles": [0, 1, 2], "set_uuid": bytes(range(16)),
        "device_uuid": bytes(range(16, 32)), "events": 5, **fields,
    }  # fmt: skip
    header = BitmapSuper(sync_size=size, chunksize=1 << 20) if bitmap else None
    ours = Superblock1.fresh(
        version, sectors, data_offset=offset, bitmap=header, ppl=ppl, **given_fields
    )
    return sectors, ours


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
@pytest.mark.parametrize("kind", ["plain", "bitmap", "ppl"])
def test_mdadm_reads_a_new_member(version, kind, tmp_path):
    mdadm = needs.tool("mdadm", package="mdadm")
    sectors, ours = fresh(version, bitmap=kind == "bitmap", ppl=kind == "ppl")
    ours.name = "here:new"
    path = tmp_path / "member"
    with path.open("wb") as file:
        file.truncate(sectors * 512)
        file.seek(ours.super_offset * 512)
        file.write(ours.encode())
        if kind == "bitmap":
            # mdadm takes the feature for gone where there is no bitmap.
            file.seek((ours.super_offset + ours.bitmap_offset) * 512)
            bitmap = BitmapSuper(sync_size=ours.size, chunksize=1 << 20, uuid=ours.set_uuid)
            file.write(bitmap.encode())
    answer = subprocess.run(
        [mdadm, "--examine", path], capture_output=True, text=True, timeout=30, check=True
    )
    says = words(answer.stdout)
    assert says["Version"] == version
    assert says["Array UUID"] == "00010203:04050607:08090a0b:0c0d0e0f"
    assert says["Name"].split()[0] == "here:new"
    assert says["Checksum"].endswith(" - correct")
    assert says["Device Role"] == "Active device 1"
    assert says["Array State"].startswith("AAA ")
    assert says["Layout"] == "left-symmetric"
    assert number(says["Avail Dev Size"]) == ours.data_size >= ours.size
    assert int(says["Feature Map"], 16) == {"plain": 0, "bitmap": 1, "ppl": 1024}[kind]
    assert says["Bad Block Log"].startswith("512 entries available")
    # And we what we wrote.
    with path.open("rb") as file:

        def read(offset, length):
            file.seek(offset)
            return file.read(length)

        (found,) = find(read, sectors)
    assert (found.version, found.superblock) == (version, ours)


@pytest.mark.parametrize(
    ("name", "bitmap"), [("raid1-new", True), ("raid0-1.2", False), ("ppl-1.0", False)]
)
def test_a_new_member_is_laid_out_as_mdadm_does(name, bitmap):
    found = candidate(name)
    theirs = found.superblock
    header = None
    if bitmap:
        at = (theirs.super_offset + theirs.bitmap_offset) * 512
        header = BitmapSuper.decode(GOLDEN[name].read(at, 256), byte=at)
    ours = Superblock1.fresh(
        found.version,
        33000,
        data_offset=theirs.data_offset,
        bitmap=header,
        ppl=theirs.has_ppl,
        level=theirs.level,
        size=theirs.size,
        raid_disks=2,
    )
    for field in ("super_offset", "data_offset", "data_size", "bitmap_offset"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert (ours.bblog_offset, ours.bblog_size) == (theirs.bblog_offset, theirs.bblog_size)
    assert len(ours.dev_roles) == len(theirs.dev_roles)


def test_a_new_member_that_has_no_room_is_refused():
    with pytest.raises(ValueError, match="new member: byte 4.*: md superblock: data_size"):
        Superblock1.fresh("1.2", 2048, data_offset=2048, level=1)


# There and back.


ROLES = st.lists(st.integers(0, 0xFFFF), max_size=200)


@given(
    records(
        Superblock1,
        magic=MD_SB_MAGIC,
        major_version=1,
        feature_map=st.sampled_from([0, 1, 3, 0x10, 0x80, 0x100, 0x200, 0x400, 0x800]),
        pad0=0,
        pad3=bytes(32),
        data_size=st.integers(10, MAX_SECTOR),
        raid_disks=st.integers(0, 1920),
        bblog_shift=st.integers(0, 63),
        super_offset=8,
        dev_roles=ROLES,
    )
)
def test_any_superblock_comes_back(ours):
    packed = ours.encode()
    assert len(packed) % 512 == 0
    assert Superblock1.decode(packed, byte=4096) == ours
    # The checksum, word by word.
    csum = 0
    body = bytearray(packed[: 256 + 2 * ours.max_dev])
    body[216:220] = bytes(4)
    for at in range(0, len(body), 4):
        csum += int.from_bytes(body[at : at + 4], "little")
    assert ours.sb_csum == (csum & 0xFFFFFFFF) + (csum >> 32)


@given(
    records(
        Superblock090,
        md_magic=MD_SB_MAGIC,
        major_version=0,
        minor_version=st.sampled_from([90, 91]),
        raid_disks=st.integers(1, 27),
        byte_order=st.sampled_from(["<", ">"]),
    ),
    records(DiskDescriptor),
)
def test_any_superblock_of_090_comes_back(ours, descriptor):
    ours.disks[5] = ours.this_disk = descriptor
    packed = ours.encode()
    again = Superblock090.decode(packed)
    assert again == ours
    assert (packed[:4] == MD_SB_MAGIC.to_bytes(4, "big")) == (ours.byte_order == ">")
    assert again.set_uuid == ours.set_uuid


def test_a_big_endian_host_has_its_words_swapped():
    ours = Superblock090.decode(SOUND_090)
    swapped = bytearray(SOUND_090)
    for at in range(0, 4096, 4):
        swapped[at : at + 4] = swapped[at : at + 4][::-1]
    # Its 64-bit counts are pairs of words, the high one first.
    for field in ("events", "cp_events", "reshape_position"):
        at = Superblock090.offsets[field]
        swapped[at : at + 8] = swapped[at + 4 : at + 8] + swapped[at : at + 4]
    theirs = Superblock090.decode(swapped)
    assert theirs.byte_order == ">"
    assert theirs.events == ours.events and theirs.uuid == ours.uuid
    assert theirs.disks[1].raid_disk == ours.disks[1].raid_disk


def test_a_uuid_of_090_is_set_and_read_in_both_byte_orders():
    for order in "<>":
        ours = Superblock090(raid_disks=1, byte_order=order)
        ours.set_uuid = bytes(range(16))
        assert ours.set_uuid == bytes(range(16))
        assert Superblock090.decode(ours.encode()).set_uuid == bytes(range(16))


def test_where_the_sync_of_090_has_come_to():
    ours = Superblock090(raid_disks=2, events=7, cp_events=7, recovery_cp=1000)
    assert ours.resync_offset == 1000
    assert dataclasses.replace(ours, cp_events=6).resync_offset == 0
    assert dataclasses.replace(ours, state=1).resync_offset == MAX_SECTOR


@given(damaged(SOUND))
def test_damaged_superblocks_never_crash(data):
    decodes_or_says_why(Superblock1.decode, data, byte=4096)


@given(damaged(SOUND_090))
def test_damaged_superblocks_of_090_never_crash(data):
    decodes_or_says_why(Superblock090.decode, data, byte=4096)


def resealed(ours):
    """The bytes of a superblock that we would not write, its checksum right."""
    ours.max_dev = len(ours.dev_roles)
    packed = ours.pack() + b"".join(role.to_bytes(2, "little") for role in ours.dev_roles)
    packed[216:220] = md_superblock.sb_csum(packed).to_bytes(4, "little")
    return packed


@given(damaged(SOUND))
def test_damaged_superblocks_with_a_right_checksum_never_crash(data):
    """Or nothing behind the checksum would ever be looked at."""
    if len(data) < 1000:
        return
    data = bytearray(data)
    data[220:224] = (128).to_bytes(4, "little")
    data[216:220] = md_superblock.sb_csum(data[:512]).to_bytes(4, "little")
    ours = decodes_or_says_why(
        lambda view, **place: Superblock1.decode(view, device_size_sectors=33000, **place),
        data,
        byte=4096,
    )
    if ours is not None:
        assert ours.encode() == data[:512]


@given(st.data())
def test_damaged_disks_never_crash(data):
    name = data.draw(st.sampled_from(sorted(GOLDEN)))
    sectors = GOLDEN[name].sectors
    places = {where(version, sectors) * 512 for version in md_superblock.VERSIONS}
    sound = [(GOLDEN[name].read(at, 4096), at) for at in sorted(places)]
    disk = {at: data.draw(damaged(view)) for view, at in sound if any(view)}
    found = find(lambda offset, length: disk.get(offset, bytes(length)), sectors, device=name)
    for entry in found:
        assert (entry.superblock is None) != (entry.error is None)
        assert entry.error is None or entry.error.device == name


# What is refused.


@pytest.mark.parametrize(
    ("changes", "byte", "sentence"),
    [
        ({"magic": 1}, 0, "not an md superblock: magic is 0x00000001, expected 0xa92b4efc"),
        ({"major_version": 0}, 4, "md superblock: major_version is 0, expected 1"),
        (
            {"feature_map": 1 << 13},
            8,
            "md superblock: feature_map is 0x00002000, expected no unknown feature such as BIT_13",
        ),
        ({"pad0": 1}, 12, "md superblock: pad0 is 1, expected 0"),
        (
            {"pad3": b"\1" + bytes(31)},
            224,
            f"md superblock: pad3 is 01{'00' * 31}, expected zeroes",
        ),
        ({"data_size": 9}, 136, "md superblock: data_size is 9, expected at least 10 sectors"),
        ({"super_offset": 0}, 144, "md superblock: super_offset is 0, expected 8"),
        ({"raid_disks": 1921}, 92, "md superblock: raid_disks is 1921, expected at most 1920"),
        (
            {"feature_map": 0x1000},
            72,
            "md superblock: level is 1, expected 0 (RAID0_LAYOUT is set)",
        ),
        (
            {"feature_map": 0x401},
            8,
            "md superblock: feature_map is BITMAP_OFFSET, PPL, "
            "expected a partial parity log alone",
        ),
        (
            {"feature_map": 8, "bblog_offset": 0},
            188,
            "md superblock: bblog_offset is 0, expected not 0",
        ),
        (
            {"feature_map": 8, "bblog_size": 9},
            186,
            "md superblock: bblog_size is 9, expected at most 8 sectors",
        ),
        ({"bblog_shift": 64}, 185, "md superblock: bblog_shift is 64, expected below 64"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, byte, sentence):
    ours = dataclasses.replace(Superblock1.decode(SOUND, byte=4096), **changes)
    with pytest.raises(FormatError) as caught:
        Superblock1.decode(resealed(ours), device="sda", byte=4096)
    assert str(caught.value) == f"sda: byte {4096 + byte}: {sentence}"


def test_a_wrong_checksum_is_refused():
    data = bytearray(SOUND)
    data[32] ^= 1
    with pytest.raises(FormatError, match="sda: byte 4312: md superblock: sb_csum is 0x"):
        Superblock1.decode(data, device="sda", byte=4096)


def test_1920_devices_are_accepted():
    ours = dataclasses.replace(Superblock1.decode(SOUND, byte=4096), dev_roles=[0xFFFF] * 1920)
    assert len(ours.encode()) == 4096
    assert Superblock1.decode(ours.encode(), byte=4096) == ours


def test_1921_devices_are_refused():
    data = bytearray(SOUND)
    data[220:224] = (1921).to_bytes(4, "little")
    with pytest.raises(FormatError, match="max_dev is 1921, expected at most 1920"):
        Superblock1.decode(data + bytes(100), byte=4096)


def test_roles_are_not_looked_for_beyond_the_view():
    with pytest.raises(FormatError, match="max_dev is 128, expected at most 127"):
        Superblock1.decode(SOUND[:511], byte=4096)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_size": 33000 - 2048 + 1}, "data_size"),
        ({"data_offset": 8}, "data_offset"),
        ({"data_offset": MAX_SECTOR}, "data_size"),
        ({"bitmap_offset": 2040}, "bitmap_offset"),
        ({"bitmap_offset": 0}, "bitmap_offset"),
        ({"bitmap_offset": -9}, "bitmap_offset"),
        ({"bblog_offset": 2039}, "bblog_offset"),
        ({"bblog_offset": 1 << 30}, "bblog_offset"),
    ],
)
def test_what_lies_beyond_the_device_or_on_something_else_is_refused(changes, field):
    ours = dataclasses.replace(Superblock1.decode(SOUND, byte=4096), **changes)
    with pytest.raises(FormatError) as caught:
        Superblock1.decode(ours.encode(), byte=4096, device_size_sectors=33000)
    assert caught.value.field == field


def test_an_array_that_mdadm_laid_over_its_own_superblock_is_refused():
    disk = golden()[OVERLAPPING]
    (found,) = find(disk.read, disk.sectors, device="sda")
    assert found.superblock is None
    assert str(found.error) == (
        "sda: byte 16887888: md superblock: size is 32896, "
        "expected an end by sector 32984 (from 2048)"
    )


def test_sectors_of_version_10_that_are_not_used_may_reach_over_the_superblock():
    """As mdadm counts them where data does not begin at 0."""
    disk = golden()[OVERLAPPING]
    at = where("1.0", disk.sectors) * 512
    ours = dataclasses.replace(
        Superblock1.decode(disk.read(at, 4096), byte=at), size=30000, data_size=32976
    )
    ours.check_places(disk.sectors, device="sda", byte=at)
    ours.data_size = 32985
    with pytest.raises(FormatError, match="data_size is 32985, expected at most 32984"):
        ours.check_places(disk.sectors, device="sda", byte=at)


def test_a_disk_without_a_superblock_has_none():
    assert find(lambda offset, length: bytes(length), 33000) == []
    assert find(lambda offset, length: bytes(length), 5) == []


def test_the_newest_of_several_superblocks_comes_first():
    disk = bytearray(33000 * 512)
    for version, ctime in [("1.1", 30), ("1.0", 50), ("1.2", 40)]:
        ours = Superblock1.fresh(version, 33000, data_offset=4096, level=1, size=100, ctime=ctime)
        at = ours.super_offset * 512
        packed = ours.encode()
        disk[at : at + len(packed)] = packed
    broken = where("0.90", 33000) * 512
    disk[broken : broken + 4] = MD_SB_MAGIC.to_bytes(4, "big")
    found = find(lambda offset, length: disk[offset : offset + length], 33000, device="sdb")
    assert [entry.version for entry in found] == ["1.0", "1.2", "1.1", "0.90"]
    assert found[3].superblock is None
    assert str(found[3].error).startswith(f"sdb: byte {broken + 8}: md superblock 0.90: minor")


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"minor_version": 92}, "minor_version"), ({"raid_disks": 0}, "raid_disks")]
    + [({"raid_disks": 28}, "raid_disks"), ({"major_version": 1}, "major_version")],
)
def test_what_cannot_be_in_090_is_refused_by_name(changes, field):
    ours = dataclasses.replace(Superblock090.decode(SOUND_090), **changes)
    with pytest.raises(AssertionError):
        ours.encode()
    packed = ours.pack() + SOUND_090[Superblock090.SIZE :]
    with pytest.raises(FormatError) as caught:
        Superblock090.decode(packed)
    assert caught.value.field == field


def test_a_checksum_of_090_is_compared_folded():
    """Hosts have summed differently: only 16 bits of it must agree."""
    ours = Superblock090.decode(SOUND_090)
    folded = (ours.sb_csum & 0xFFFF) + (ours.sb_csum >> 16)
    folded = (folded & 0xFFFF) + (folded >> 16)
    data = bytearray(SOUND_090)
    data[152:156] = folded.to_bytes(4, "little")
    assert Superblock090.decode(data).sb_csum == folded
    data[152:156] = (folded ^ 1).to_bytes(4, "little")
    with pytest.raises(FormatError, match="sb_csum"):
        Superblock090.decode(data)
