"""Which disks make an array: stale, foreign, doubled, damaged and missing ones."""

import hashlib
import os

import pytest

from dmpy.backing import open_leaf
from dmpy.errors import FormatError
from dmpy.formats.md_superblock import MD_DISK_ROLE_JOURNAL, sb_csum
from dmpy.md.assemble import assemble, disk_of, open_disks, table_text
from dmpy.md.bad_blocks import bad_ranges
from dmpy.md.create import Recipe, create
from dmpy.md.force import force_assembly
from dmpy.mapper import Mapper

MIB = 1 << 20
VERSIONS = ["0.90", "1.0", "1.1", "1.2"]


@pytest.fixture
def make(tmp_path):
    """Makes an array of files and returns its leaves; closes them at the end."""
    opened = []

    def make(count, recipe, *, spares=0, mib=8):
        leaves = []
        for _ in range(count + spares):
            path = tmp_path / f"{len(opened)}.img"
            path.touch()
            os.truncate(path, mib * MIB)
            opened.append(open_leaf(str(path)))
            leaves.append(opened[-1])
        create(leaves[:count], leaves[count:], recipe)
        return leaves

    yield make
    for leaf in opened:
        leaf.close()


def change(leaf, **fields):
    """Change fields of a superblock of 1.x, with a right checksum."""
    disk = disk_of(leaf)
    for name, value in fields.items():
        setattr(disk.superblock, name, value)
    leaf.pwritev([memoryview(disk.superblock.encode())], disk.byte)


def behind(leaf, events):
    """Let a disk have fewer events than the others."""
    disk = disk_of(leaf)
    if disk.version == "0.90":
        disk.superblock.events = disk.superblock.cp_events = events
    else:
        disk.superblock.events = events
    leaf.pwritev([memoryview(disk.superblock.encode())], disk.byte)


def ahead(leaves, events):
    for leaf in leaves:
        behind(leaf, events)


def digest(leaf):
    leaf.flush()
    with open(leaf.name, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def refused(leaves, **options):
    """The sentence of a refusal, which writes nothing."""
    before = [digest(leaf) for leaf in leaves]
    with pytest.raises((OSError, FormatError)) as caught:
        assemble(open_disks(leaves), **options)
    assert [digest(leaf) for leaf in leaves] == before
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence[-1] != "."
    return sentence


CLEAN = {"chunk_size": 4096, "assume_clean": True}


@pytest.mark.parametrize("version", VERSIONS)
def test_disks_come_in_any_order(make, version):
    leaves = make(4, Recipe(5, version=version, **CLEAN), spares=1)
    found = assemble(open_disks([leaves[n] for n in (3, 4, 1, 0, 2)]))
    assert [disk.name for disk in found.slots] == [leaf.name for leaf in leaves[:4]]
    assert [disk.name for disk in found.spares] == [leaves[4].name]
    words = " ".join(leaf.name for leaf in leaves)
    assert table_text(found) == f"0 {found.geometry.size >> 9} md {found.uuid} 5 {words}"
    assert found.warnings() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stale_member_is_left_out(make, version):
    leaves = make(3, Recipe(5, version=version, **CLEAN))
    ahead(leaves[:2], 10)
    behind(leaves[2], 8)
    found = assemble(open_disks(leaves[::-1]))
    assert found.missing == [2]
    assert found.warnings() == [
        f"{leaves[2].name} is left out: it is stale (8 events, {leaves[1].name} has 10)",
        "the array is degraded: no disk for place 2",
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_member_one_event_behind_is_taken(make, version):
    leaves = make(3, Recipe(5, version=version, **CLEAN))
    ahead(leaves[:2], 10)
    behind(leaves[2], 9)
    assert assemble(open_disks(leaves)).missing == []


def test_a_member_that_the_newest_knows_to_have_failed_is_left_out(make):
    """One event behind, its own superblock says that it is fine."""
    leaves = make(3, Recipe(5, **CLEAN))
    for leaf in leaves[:2]:
        change(leaf, events=10, dev_roles=[0, 1, 0xFFFE] + [0xFFFF] * 125)
    change(leaves[2], events=9)
    found = assemble(open_disks(leaves))
    assert found.missing == [2]
    assert "it has failed, as" in found.warnings()[0]


@pytest.mark.parametrize("level", [1, 4, 5, 6, 10])
def test_missing_members_that_can_be_done_without_are_named(make, level):
    recipe = Recipe(level, chunk_size=0 if level == 1 else 4096, assume_clean=True)
    leaves = make(4, recipe)
    found = assemble(open_disks(leaves[:3]))
    assert found.missing == [3]
    assert found.warnings() == ["the array is degraded: no disk for place 3"]
    assert table_text(found).endswith(" -")


@pytest.mark.parametrize(("level", "there"), [(1, 0), (4, 2), (5, 2), (6, 1), (10, 1), (0, 3)])
def test_too_few_members_are_refused(make, level, there):
    chunk = 0 if level == 1 else 4096
    leaves = make(4, Recipe(level, chunk_size=chunk, assume_clean=True))
    if not there:
        with pytest.raises(OSError, match="an array needs a disk"):
            assemble([])
        return
    sentence = refused(leaves[:there])
    assert "place" in sentence and "3" in sentence
    if level:
        assert sentence.startswith(f"too few disks for raid{level} of 4 members")


@pytest.mark.parametrize("level", [4, 5, 6])
def test_a_degraded_array_that_was_being_written_is_refused_unless_forced(make, level):
    leaves = make(4, Recipe(level, chunk_size=4096))
    assert assemble(open_disks(leaves)).resync_offset == 0
    assert "was being written when it stopped" in refused(leaves[:3])
    found = assemble(open_disks(leaves[:3]), force=True)
    assert found.resync_offset is None
    assert found.forced == ["the array is taken for clean although it was being written"]


@pytest.mark.parametrize("level", [1, 10])
def test_degraded_mirrors_that_were_being_written_are_taken(make, level):
    leaves = make(4, Recipe(level, chunk_size=0 if level == 1 else 4096))
    assert assemble(open_disks(leaves[:3])).resync_offset == 0


def test_force_takes_the_newest_of_the_stale(make):
    leaves = make(4, Recipe(5, **CLEAN))
    ahead(leaves[:2], 20)
    behind(leaves[2], 12)
    behind(leaves[3], 15)
    assert "too few disks" in refused(leaves)
    found = assemble(open_disks(leaves), force=True)
    assert found.missing == [2]
    assert found.forced == [
        f"{leaves[3].name} is taken although it is stale (15 events, {leaves[0].name} has 20)"
    ]
    force_assembly(found)
    again = assemble(open_disks(leaves))
    assert again.missing == [2]
    assert again.newest.events == 21


def test_disks_of_two_arrays_are_refused(make):
    first = make(2, Recipe(1, assume_clean=True))
    second = make(2, Recipe(1, assume_clean=True))
    assert f"{second[0].name} belongs to another array than {first[0].name}" in refused(
        [first[0], second[0]]
    )


def test_disks_of_two_versions_are_refused(make):
    first = make(2, Recipe(1, assume_clean=True, uuid=bytes(16), version="1.0"))
    second = make(2, Recipe(1, assume_clean=True, uuid=bytes(16), version="1.1"))
    assert "superblock of another version" in refused([first[0], second[1]])


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_two_members_that_claim_one_place_are_refused(make, version):
    leaves = make(3, Recipe(5, version=version, **CLEAN))
    change(leaves[2], dev_number=1)
    assert refused(leaves) == f"{leaves[1].name} and {leaves[2].name} both claim place 1"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bad_checksum_is_refused(make, version):
    leaves = make(3, Recipe(5, version=version, **CLEAN))
    byte = disk_of(leaves[1]).byte
    data = bytearray(4096)
    leaves[1].preadv([memoryview(data)], byte)
    data[80] ^= 1
    leaves[1].pwritev([memoryview(data)], byte)
    sentence = refused(leaves)
    assert "sb_csum" in sentence and leaves[1].name in sentence


@pytest.mark.parametrize(("fields", "words"), [
    ({"level": -1}, "level linear is not supported"),
    ({"level": 7}, "level 7 is not supported"),
    ({"layout": 77}, "RAID 5 has no layout 77"),
    ({"chunksize": 0}, "chunk size"),
    ({"raid_disks": 0}, "0 places"),
])
def test_numbers_that_make_no_array_are_refused(make, fields, words):
    leaves = make(3, Recipe(5, **CLEAN))
    for leaf in leaves:
        change(leaf, **fields)
    assert words in refused(leaves)


@pytest.mark.parametrize(("feature", "words"), [
    ("RESHAPE_ACTIVE", "a reshape is under way"),
    ("CLUSTERED", "belongs to a cluster"),
    ("JOURNAL", "has a write journal"),
])
def test_features_that_are_not_supported_are_named(make, feature, words):
    leaves = make(3, Recipe(5, **CLEAN))
    for leaf in leaves:
        disk = disk_of(leaf)
        disk.superblock.set_feature(feature)
        leaf.pwritev([memoryview(disk.superblock.encode())], disk.byte)
    sentence = refused(leaves)
    assert words in sentence
    # Force is for members, not for what is not understood.
    assert words in refused(leaves, force=True)


def test_a_feature_bit_that_nobody_knows_is_refused(make):
    leaves = make(3, Recipe(5, **CLEAN))
    disk = disk_of(leaves[0])
    block = bytearray(disk.superblock.encode())
    block[8:12] = (disk.superblock.feature_map | 1 << 20).to_bytes(4, "little")
    end = 256 + 2 * disk.superblock.max_dev
    block[216:220] = sb_csum(block[:end]).to_bytes(4, "little")
    leaves[0].pwritev([memoryview(block)], disk.byte)
    assert "feature_map" in refused(leaves) and "BIT_20" in refused(leaves)


def test_a_journal_device_is_named(make):
    leaves = make(3, Recipe(5, **CLEAN), spares=1)
    change(leaves[3], dev_roles=[0, 1, 2, MD_DISK_ROLE_JOURNAL] + [0xFFFF] * 124)
    assert refused(leaves) == (
        f"the array has a write journal, which is not supported ({leaves[3].name})"
    )


def test_a_member_that_is_too_small_is_refused(make):
    leaves = make(3, Recipe(5, **CLEAN))
    change(leaves[1], data_size=64)
    assert f"{leaves[1].name} has 64 sectors of data, the array needs" in refused(leaves)


def test_a_member_that_was_cut_is_refused(make):
    leaves = make(3, Recipe(5, **CLEAN))
    os.truncate(leaves[1].name, 4 * MIB)
    leaves[1].refresh()
    assert leaves[1].name in refused(leaves)


def test_members_that_disagree_about_the_array_are_refused(make):
    leaves = make(3, Recipe(5, **CLEAN))
    change(leaves[1], chunksize=16)
    assert "has another chunk size than" in refused(leaves)


def test_a_device_without_a_superblock_is_named(make, tmp_path):
    make(2, Recipe(1))
    leaf = open_leaf("mem:1M")
    with pytest.raises(OSError, match="has no superblock of an MD array"):
        open_disks([leaf])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bitmap_of_another_array_is_refused(make, version):
    leaves = make(2, Recipe(1, version=version, bitmap=True))
    offset = disk_of(leaves[1]).bitmap_offset
    leaves[1].pwritev([memoryview(bytes(16))], offset + 8)
    assert "bitmap" in refused(leaves) and leaves[1].name in refused(leaves)


def test_a_bitmap_of_another_size_is_refused(make):
    leaves = make(2, Recipe(1, bitmap=True))
    for leaf in leaves:
        offset = disk_of(leaf).bitmap_offset
        leaf.pwritev([memoryview((8).to_bytes(8, "little"))], offset + 40)
    assert "does not match the array" in refused(leaves)


def test_a_bitmap_older_than_its_superblock_counts_as_set(make):
    leaves = make(2, Recipe(1, bitmap=True, assume_clean=True))
    assert assemble(open_disks(leaves)).bits.total() == 0
    ahead(leaves, 5)
    assert assemble(open_disks(leaves)).bits.total() == 1


def test_the_bad_block_log_is_honoured(make):
    leaves = make(2, Recipe(1, assume_clean=True))
    disk = disk_of(leaves[0])
    sb = disk.superblock
    sb.set_feature("BAD_BLOCKS")
    leaves[0].pwritev([memoryview(sb.encode())], disk.byte)
    first = (disk.data_offset >> 9) + 16
    log = (first << 10 | 8).to_bytes(8, "little").ljust(sb.bblog_size * 512, b"\xff")
    leaves[0].pwritev([memoryview(log)], (disk.sector + sb.bblog_offset) * 512)
    assert bad_ranges(disk_of(leaves[0])) == [(first, 8)]
    leaves[1].pwritev([memoryview(b"g" * 4096)], disk.data_offset + 16 * 512)
    table = table_text(assemble(open_disks(leaves)))
    for leaf in leaves:
        leaf.close()
    with Mapper() as dm:
        device = dm.create("r", table)
        back = bytearray(4096)
        device.preadv([memoryview(back)], 16 * 512)
        assert back == b"g" * 4096
    again = open_leaf(leaves[0].name)
    assert bad_ranges(disk_of(again)) == []
    again.close()
