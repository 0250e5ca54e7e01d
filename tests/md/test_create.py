"""New arrays: mdadm reads every one of them, and what cannot be made is refused before a write."""

import hashlib
import os
import re
import subprocess

import pytest

from dmpy.backing import open_leaf
from dmpy.md.assemble import assemble, open_disks
from dmpy.md.create import LAYOUTS, Recipe, create, layout_number, level_number
from dmpy.md.examine import describe, text
from tests import needs

MIB = 1 << 20


@pytest.fixture
def leaves(tmp_path):
    """Makes files of some MiB and opens them."""
    opened = []

    def make(count, mib=16):
        first = len(opened)
        for number in range(first, first + count):
            path = tmp_path / f"{number}.img"
            path.touch()
            os.truncate(path, mib * MIB if isinstance(mib, int) else mib[number - first] * MIB)
            opened.append(open_leaf(str(path)))
        return opened[first:]

    yield make
    for leaf in opened:
        leaf.close()


def examine(leaf):
    mdadm = needs.tool("mdadm")
    leaf.flush()
    answer = subprocess.run(
        [mdadm, "--examine", leaf.name], capture_output=True, text=True, timeout=30, check=False
    )
    assert answer.returncode == 0, answer
    return answer.stdout


def fact(printed, name):
    found = re.search(rf"^ *{re.escape(name)} : (.*)$", printed, re.MULTILINE)
    return found[1] if found else None


SHAPES = [
    (level, layout, version)
    for version in ("0.90", "1.0", "1.1", "1.2")
    for level, layouts in (
        (0, [None]), (1, [None]), (4, [None]),
        (5, list(LAYOUTS[5])[:6]), (6, [w for w in LAYOUTS[6] if len(w) > 2]),
        (10, ["n2", "f2", "o2", "n3"]),
    )
    for layout in layouts
]


@pytest.mark.parametrize(("level", "word", "version"), SHAPES)
def test_mdadm_reads_every_level_layout_and_version(leaves, level, word, version):
    disks = leaves(5)
    layout = None if word is None else layout_number(level, word)
    create(disks, [], Recipe(level, layout, version=version, bitmap=level != 0))
    printed = examine(disks[2])
    assert fact(printed, "Raid Level") == f"raid{level}"
    assert fact(printed, "Raid Devices") == "5"
    assert fact(printed, "Version").startswith(version)
    assert "correct" in fact(printed, "Checksum")
    assert fact(printed, "State") == ("clean" if level == 0 else "active")
    if level in (5, 6):
        assert fact(printed, "Layout") == word
    if level == 10:
        kind = {"n": "near", "f": "far", "o": "offset"}[word[0]]
        assert f"{kind}={word[1]}" in fact(printed, "Layout")
    if level not in (0, 1):
        assert fact(printed, "Chunk Size") == "512K"
    assert ("Internal Bitmap" in printed) == (level != 0)
    if version != "0.90":
        assert fact(printed, "Device Role") == "Active device 2"
        assert "AAAAA" in fact(printed, "Array State")
    found = assemble(open_disks(disks[::-1]))
    assert [disk.name for disk in found.slots] == [leaf.name for leaf in disks]
    size = fact(printed, "Array Size")
    if size is not None:
        # mdadm counts the chunks of a RAID 10 that are not whole.
        more = (int(size.split()[0]) << 10) - found.geometry.size
        assert more == 0 or level == 10 and 0 < more < 5 * (512 << 10)


@pytest.mark.parametrize("chunk_size", [4096, 16 << 10, 64 << 10, 1 << 20, 4 << 20])
@pytest.mark.parametrize("version", ["0.90", "1.2"])
def test_mdadm_reads_every_chunk_size(leaves, chunk_size, version):
    disks = leaves(3, 32)
    create(disks, [], Recipe(5, chunk_size=chunk_size, version=version))
    assert fact(examine(disks[0]), "Chunk Size") == f"{chunk_size >> 10}K"


@pytest.mark.parametrize("mib", [8, 100, 1 << 10, 20 << 10, 300 << 10, 1 << 20])
@pytest.mark.parametrize("version", ["1.0", "1.2"])
def test_places_are_in_order_on_devices_of_all_sizes(leaves, mib, version):
    disks = leaves(2, mib)
    create(disks, [], Recipe(1, version=version, bitmap=True))
    printed = examine(disks[0])
    assert "correct" in fact(printed, "Checksum")
    assert "Internal Bitmap" in printed


def test_spares_and_missing_members_are_known(leaves):
    disks = leaves(4)
    create([disks[0], None, disks[1]], [disks[2], disks[3]], Recipe(5, chunk_size=4096))
    printed = examine(disks[0])
    assert "A.A" in fact(printed, "Array State")
    assert fact(printed, "State") == "clean"
    assert fact(examine(disks[2]), "Device Role") == "spare"
    found = assemble(open_disks(disks))
    assert (found.missing, [disk.name for disk in found.spares]) == (
        [1], [disks[2].name, disks[3].name]
    )


def test_raid0_of_members_of_several_sizes_uses_all_of_them(leaves):
    disks = leaves(3, [8, 16, 24])
    create(disks, [], Recipe(0, chunk_size=64 << 10))
    found = assemble(open_disks(disks))
    assert found.geometry.size == sum(disk.data_size for disk in open_disks(disks))
    assert fact(examine(disks[0]), "Layout") == "original"


def test_examine_says_what_mdadm_says(leaves):
    disks = leaves(3)
    create(disks, [], Recipe(5, bitmap=True, name="box:vault", write_mostly=frozenset()))
    printed = examine(disks[1])
    found = describe(open_disks(disks)[1])
    assert found["uuid"] == fact(printed, "Array UUID")
    assert found["name"] == fact(printed, "Name").split()[0] == "box:vault"
    assert found["data_offset"] >> 9 == int(fact(printed, "Data Offset").split()[0])
    assert found["events"] == int(fact(printed, "Events"))
    assert found["role"] == 1 and found["places"] == "AAA"
    assert found["bitmap"]["dirty"] == found["bitmap"]["bits"]
    assert "left-symmetric" in text(found)


def digests(leaves):
    found = []
    for leaf in leaves:
        leaf.flush()
        with open(leaf.name, "rb") as file:
            found.append(hashlib.sha256(file.read()).hexdigest())
    return found


def refused(leaves, devices, recipe, *, spares=(), sentence, force=False):
    before = digests(leaves)
    with pytest.raises(OSError) as caught:
        create(devices, list(spares), recipe, force=force)
    assert sentence in str(caught.value)
    assert digests(leaves) == before


def test_a_disk_with_a_file_system_is_refused_without_force(leaves):
    mkfs = needs.tool("mkfs.ext4")
    needs.tool("blkid")
    disks = leaves(2)
    subprocess.run([mkfs, "-q", "-F", disks[1].name], check=True, timeout=30)
    refused(disks, disks, Recipe(1), sentence=f"{disks[1].name} carries an ext4 file system")
    create(disks, [], Recipe(1), force=True)
    assert fact(examine(disks[1]), "Raid Level") == "raid1"


def test_a_disk_of_another_array_is_refused_without_force(leaves):
    disks = leaves(2)
    create(disks, [], Recipe(1, version="1.0", name="first"))
    refused(disks, disks, Recipe(5), sentence="carries a member of the MD array first")
    create(disks, [], Recipe(1, version="1.2", name="second"), force=True)
    # Only the new superblock is left.
    assert open_disks(disks)[0].label == "second"
    assert fact(examine(disks[0]), "Version") == "1.2"


@pytest.mark.parametrize(("level", "count", "sentence"), [
    (5, 1, "raid5_ls needs at least 2 members"),
    (6, 3, "raid6_ls needs at least 4 members"),
    (10, 1, "raid10 needs at least 2 members"),
    (4, 1, "needs at least 2 members"),
])
def test_too_few_members_are_refused(leaves, level, count, sentence):
    disks = leaves(count)
    refused(disks, disks, Recipe(level), sentence=sentence)


def test_what_a_level_does_not_have_is_refused(leaves):
    disks = leaves(3)
    refused(disks, disks, Recipe(0, bitmap=True), sentence="RAID 0 has no write-intent bitmap")
    refused(disks, disks[:2], Recipe(0), spares=disks[2:], sentence="neither spares nor missing")
    refused(disks, disks, Recipe(1, chunk_size=4096), sentence="RAID 1 has no chunks")
    refused(disks, disks, Recipe(5, chunk_size=12288), sentence="a power of 2 from 4096 on")
    refused(disks, disks, Recipe(5, chunk_size=2048), sentence="a power of 2 from 4096 on")
    refused(disks, [disks[0], None, None], Recipe(5), sentence="2 members are missing")
    refused(disks, [None, None], Recipe(1), sentence="needs a device that is there")
    refused(disks, [disks[0], disks[0]], Recipe(1), sentence="named twice")
    refused(disks, disks, Recipe(5, version="2.0"), sentence="version must be one of")
    refused(disks, disks, Recipe(5, size=1 << 40), sentence="size must be at most")
    refused(disks, disks, Recipe(5, bitmap=True, bitmap_chunk=12345), sentence="bitmap chunk")


def test_devices_that_are_too_small_are_refused(leaves):
    disks = leaves(2, 1)
    for leaf in disks:
        os.truncate(leaf.name, 64 << 10)
        leaf.refresh()
    refused(disks, disks, Recipe(1), sentence="is too small for an array")


def test_words_for_levels_and_layouts():
    assert [level_number(word) for word in ("5", "raid5", "mirror", "stripe", "10")] == [
        5, 5, 1, 0, 10
    ]
    assert layout_number(10, "f3") == 0x301 and layout_number(10, "o2") == 0x10201
    assert layout_number(6, "ddf-N-continue") == 10
    for level, word in ((5, "n2"), (10, "la"), (1, "x"), (10, "n0"), (10, "n300")):
        with pytest.raises(OSError):
            layout_number(level, word)
    with pytest.raises(OSError, match="level must be one of"):
        level_number("7")
