"""The real kernel takes what dmpy.formats encodes, and does with it what the format says.

One boot: slices of a disk are written here, put together there by mdadm and dmsetup, and looked at
again here. Where a format says that something has to be made equal, only that must have changed.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dmpy.formats import md_badblocks
from dmpy.formats.dm_raid import BITMAP_OFFSET, MAX_SECTOR, DmRaidSuperblock
from dmpy.formats.md_badblocks import BadRange
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from dmpy.formats.md_ppl import PPLEntry, PPLHeader, crc32c, signature_of
from dmpy.formats.md_superblock import (
    MD_DISK_ACTIVE,
    MD_DISK_SYNC,
    DiskDescriptor,
    Superblock090,
    Superblock1,
    data_offset_for,
    find,
    free_sectors,
    where,
)
from dmpy.formats.mirror_log import MirrorLog
from tests import needs
from tests.kernel import guest

pytestmark = pytest.mark.kernel

SECTORS = 8192  # of a slice
CHUNK = 128  # sectors
UUID = bytes(range(100, 116))
REGION = 64  # sectors of a region of the mirror and of dm-raid's bitmap


class Slices:
    """A disk in slices of SECTORS, each a device s0, s1 ... in the guest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        path.touch()

    def new(self, count: int) -> list[int]:
        """Numbers of new slices."""
        first, self.count = self.count, self.count + count
        with self.path.open("r+b") as file:
            file.truncate(self.count * SECTORS * 512)
        return list(range(first, self.count))

    def write(self, number: int, sector: int, data: bytes) -> None:
        """Write at a sector of a slice."""
        with self.path.open("r+b") as file:
            file.seek((number * SECTORS + sector) * 512)
            file.write(data)

    def read(self, number: int, sector: int, sectors: int) -> bytes:
        """Read sectors of a slice."""
        with self.path.open("rb") as file:
            file.seek((number * SECTORS + sector) * 512)
            return file.read(sectors * 512)

    def candidates(self, number: int) -> list:
        """Superblocks that are found on a slice."""
        return find(
            lambda offset, length: self.read(number, offset // 512, length // 512), SECTORS
        )

    def names(self, numbers: list[int]) -> str:
        """Their paths in the guest."""
        return " ".join(f"/dev/mapper/s{number}" for number in numbers)


def _members(slices, version, *, level, bits=None, ppl=False, **fields):
    """Make the members of a new array; return their numbers and superblocks."""
    count = 3 if level == 5 else 2
    offset = data_offset_for(version, SECTORS, ppl=ppl)
    size = free_sectors(version, SECTORS, data_offset=offset, ppl=ppl) // CHUNK * CHUNK
    bitmap = None
    if bits is not None:
        bitmap = BitmapSuper(uuid=UUID, events=5, sync_size=size, chunksize=CHUNK * 512)
    numbers, superblocks = slices.new(count), []
    for place, number in enumerate(numbers):
        superblock = Superblock1.fresh(
            version, SECTORS, data_offset=offset, bitmap=bitmap, ppl=ppl, level=level, size=size,
            layout=2 if level == 5 else 0, chunksize=CHUNK if level == 5 else 0,
            raid_disks=count, dev_number=place, dev_roles=list(range(count)), set_uuid=UUID,
            device_uuid=bytes([number] * 16), events=5, resync_offset=MAX_SECTOR,
        )  # fmt: skip
        for name, value in fields.items():
            setattr(superblock, name, value)
        slices.write(number, superblock.super_offset, superblock.encode())
        if bitmap is not None:
            marked = Bits(bitmap.bits)
            marked.set(bits)
            begin = superblock.super_offset + superblock.bitmap_offset
            slices.write(number, begin, marked.encode(bitmap))
        superblocks.append(superblock)
    return numbers, superblocks


def _fill(slices, numbers, offset, sectors):
    """Other bytes for each member; return them."""
    contents = [random.Random(number).randbytes(sectors * 512) for number in numbers]
    for number, content in zip(numbers, contents, strict=True):
        slices.write(number, offset, content)
    return contents


class Case:
    """What is prepared here, done there and asserted here again."""

    def __init__(self, name: str, script: str, numbers: list[int], **kept: object) -> None:
        self.name = name
        self.script = script
        self.numbers = numbers
        self.kept = kept


_ASSEMBLE = """
mdadm --assemble /dev/md0 --run {names}
mdadm --readwrite /dev/md0
idle
mdadm --detail /dev/md0
"""
_CHECK = """
echo check >/sys/block/md0/md/sync_action
idle
echo mismatches $(cat /sys/block/md0/md/mismatch_cnt)
"""
_STOP = "mdadm --stop /dev/md0\n"


def _plain(slices, version, **kinds):
    numbers, _ = _members(slices, version, level=5, **kinds)
    script = _ASSEMBLE.format(names=slices.names(numbers)) + _CHECK + _STOP
    return Case(f"raid5-{version}", script, numbers)


def _of_090(slices):
    numbers = slices.new(2)
    superblock = Superblock090(
        level=1, size=where("0.90", SECTORS) // 2, nr_disks=2, raid_disks=2, state=1,
        active_disks=2, working_disks=2, ctime=1700000000, utime=1700000000, events=5, cp_events=5,
        recovery_cp=0xFFFFFFFF,
    )  # fmt: skip
    superblock.set_uuid = UUID
    state = 1 << MD_DISK_ACTIVE | 1 << MD_DISK_SYNC
    for place in range(2):
        superblock.disks[place] = DiskDescriptor(number=place, raid_disk=place, state=state)
    for place, number in enumerate(numbers):
        superblock.this_disk = superblock.disks[place]
        slices.write(number, where("0.90", SECTORS), superblock.encode())
    script = _ASSEMBLE.format(names=slices.names(numbers)) + _CHECK + _STOP
    return Case("raid1-0.90", script, numbers)


def _with_bitmap(slices):
    numbers, superblocks = _members(slices, "1.2", level=1, bits={3, 30}, resync_offset=0)
    contents = _fill(slices, numbers, superblocks[0].data_offset, superblocks[0].size)
    script = _ASSEMBLE.format(names=slices.names(numbers)) + _STOP
    return Case("bitmap", script, numbers, contents=contents, superblock=superblocks[0])


def _with_bad_blocks(slices):
    numbers, superblocks = _members(slices, "1.2", level=1)
    bad = superblocks[1]
    bad.set_feature("BAD_BLOCKS")
    slices.write(numbers[1], bad.super_offset, bad.encode())
    log = md_badblocks.encode([BadRange(3000, 8), BadRange(5000, 600)], bad.bblog_size)
    slices.write(numbers[1], bad.super_offset + bad.bblog_offset, log)
    script = _ASSEMBLE.format(names=slices.names(numbers))
    script += "cat /sys/block/md0/md/rd1/bad_blocks\n" + _STOP
    return Case("bad-blocks", script, numbers)


def _with_ppl(slices):
    """Data of the first stripe was written in part; its parity, on the third member, was not."""
    numbers, superblocks = _members(slices, "1.2", level=5, ppl=True, resync_offset=0)
    first = superblocks[0]
    contents = _fill(slices, numbers, first.data_offset, 3 * CHUNK)
    piece = contents[1][4096:8192]
    entry = PPLEntry(data_sector=8, pp_size=4096, data_size=4096, parity_disk=2)
    entry.checksum = crc32c(piece)
    for place, number in enumerate(numbers):
        header = PPLHeader(signature=signature_of(UUID))
        if place == 2:
            header.generation, header.entries = 9, [entry]
        log = header.encode() + (piece if place == 2 else b"")
        slices.write(number, first.super_offset + first.ppl_offset, log)
    script = _ASSEMBLE.format(names=slices.names(numbers)) + _STOP
    return Case("ppl", script, numbers, contents=contents, superblock=first)


_RAID_SECTORS = 4096


def _dm_raid(slices, name, *, failed, bits, resync):
    numbers = slices.new(4)  # metadata and data, twice
    bitmap = BitmapSuper(events=7, sync_size=_RAID_SECTORS, chunksize=REGION * 512)
    for place in range(2):
        superblock = DmRaidSuperblock(
            num_devices=2, array_position=place, events=7, level=1, new_level=1,
            array_sectors=_RAID_SECTORS, sectors=_RAID_SECTORS, array_resync_offset=resync,
        )  # fmt: skip
        superblock.failed = failed
        slices.write(numbers[2 * place], 0, superblock.encode())
        marked = Bits(bitmap.bits)
        marked.set(bits)
        slices.write(numbers[2 * place], BITMAP_OFFSET // 512, marked.encode(bitmap))
    contents = _fill(slices, numbers[1::2], 0, _RAID_SECTORS)
    script = f"""
dmsetup create r --table "0 {_RAID_SECTORS} raid raid1 3 0 region_size {REGION} 2 \
{slices.names(numbers)}"
i=0
while dmsetup status r | grep -q resync && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
sleep 0.3
dmsetup status r
dmsetup remove r
"""
    return Case(name, script, numbers, contents=contents)


def _mirror(slices):
    numbers = slices.new(3)
    log = MirrorLog.new(_RAID_SECTORS // REGION, clean=True)
    log.clean.clear({5, 60})
    slices.write(numbers[0], 0, log.encode())
    contents = _fill(slices, numbers[1:], 0, _RAID_SECTORS)
    paths = slices.names(numbers).split()
    script = f"""
dmsetup create r --table "0 {_RAID_SECTORS} mirror disk 2 {paths[0]} {REGION} 2 \
{paths[1]} 0 {paths[2]} 0"
i=0
while ! dmsetup status r | grep -q ' 64/64 ' && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
dmsetup status r
dmsetup suspend r
dmsetup remove r
"""
    return Case("mirror", script, numbers, contents=contents)


_HEAD = """
idle() {{
    i=0
    while grep -Eq 'resync|recovery|check' /proc/mdstat && [ $i -lt 100 ]; do
        sleep 0.1; i=$((i+1))
    done
}}
i=0
while [ $i -lt {count} ]; do
    dmsetup create s$i --table "0 {sectors} linear {disk} $((i * {sectors}))"
    i=$((i+1))
done
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Name of a case -> the case, what the guest printed, and the slices after it."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("mdadm", package="mdadm")
    needs.tool("dmsetup", package="dmsetup")
    folder = tmp_path_factory.mktemp("formats")
    slices = Slices(folder / "disk.img")
    cases = [
        _plain(slices, "1.0"),
        _plain(slices, "1.1", bits=set()),
        _plain(slices, "1.2", ppl=True),
        _of_090(slices),
        _with_bitmap(slices),
        _with_bad_blocks(slices),
        _with_ppl(slices),
        _dm_raid(slices, "dm-raid", failed=set(), bits={2, 50}, resync=0),
        _dm_raid(slices, "dm-raid-failed", failed={1}, bits=set(), resync=MAX_SECTOR),
        _mirror(slices),
    ]
    # Parity of the plain arrays is right because all of their data is zero.
    script = _HEAD.format(count=slices.count, sectors=SECTORS, disk=guest.ubd(0))
    for case in cases:
        script += f"echo '=== {case.name}'\n{case.script}"
    work = folder / "w"
    work.mkdir()
    modules = ["md-mod", "raid1", "raid456", "dm-mod", "dm-raid", "dm-mirror"]
    result = guest.run(script, work, disks=[slices.path], modules=modules, seconds=120)
    parts = dict(re.findall(r"^=== (\S+)\n(.*?)(?=^=== |\Z)", result.output, re.M | re.S))
    return {case.name: (case, parts[case.name] + result.dmesg, slices) for case in cases}


@pytest.mark.parametrize("name", ["raid5-1.0", "raid5-1.1", "raid5-1.2", "raid1-0.90"])
def test_a_new_array_is_assembled_whole_and_clean(told, name):
    case, output, slices = told[name]
    assert re.search(r"State : (clean|active) *$", output, re.M), output
    assert f"Working Devices : {len(case.numbers)}" in output
    assert f"Version : {name.split('-')[1]}" in output
    assert "mismatches 0" in output
    for number in case.numbers:
        (found,) = slices.candidates(number)
        assert found.error is None and found.superblock.clean
        assert found.superblock.set_uuid == UUID
        assert found.superblock.events > 5


def _changed(slices, number, begin, before):
    """Sectors of a slice, from `begin` on, that are not as before."""
    after = slices.read(number, begin, len(before) // 512)
    places = range(0, len(before), 512)
    return {at // 512 for at in places if after[at : at + 512] != before[at : at + 512]}


def test_an_array_with_a_bitmap_makes_equal_what_is_marked_and_no_more(told):
    case, output, slices = told["bitmap"]
    superblock, (first, second) = case.kept["superblock"], case.kept["contents"]
    begin, numbers = superblock.data_offset, case.numbers
    marked = {*range(3 * CHUNK, 4 * CHUNK), *range(30 * CHUNK, 31 * CHUNK)}
    assert _changed(slices, numbers[0], begin, first) == set(), output
    assert _changed(slices, numbers[1], begin, second) == marked, output
    for sector in marked:
        now = slices.read(numbers[1], begin + sector, 1)
        assert now == first[sector * 512 : sector * 512 + 512]


def test_bad_blocks_are_known_to_the_kernel(told):
    _, output, _ = told["bad-blocks"]
    listed = [(int(a), int(b)) for a, b in re.findall(r"^(\d+) (\d+)$", output, re.M)]
    sectors = {sector for begin, length in listed for sector in range(begin, begin + length)}
    assert sectors == {*range(3000, 3008), *range(5000, 5600)}


def test_a_partial_parity_log_is_replayed_by_the_kernel(told):
    case, output, slices = told["ppl"]
    superblock, contents = case.kept["superblock"], case.kept["contents"]
    begin, numbers = superblock.data_offset, case.numbers
    assert re.search(r"State : (clean|active) *$", output, re.M), output
    for number, content in zip(numbers[:2], contents, strict=False):
        assert _changed(slices, number, begin, content) == set()
    assert _changed(slices, numbers[2], begin, contents[2]) == {*range(8, 16)}, output
    parity = slices.read(numbers[2], begin + 8, 8)
    pairs = zip(contents[0][4096:8192], contents[1][4096:8192], strict=True)
    assert parity == bytes(a ^ b for a, b in pairs)


def test_a_dm_raid_set_makes_equal_what_is_marked_and_no_more(told):
    case, output, slices = told["dm-raid"]
    first, second = case.kept["contents"]
    assert f" raid1 2 AA {_RAID_SECTORS}/{_RAID_SECTORS} idle " in output
    marked = {*range(2 * REGION, 3 * REGION), *range(50 * REGION, 51 * REGION)}
    assert _changed(slices, case.numbers[1], 0, first) == set()
    assert _changed(slices, case.numbers[3], 0, second) == marked


def test_a_device_that_a_dm_raid_superblock_calls_failed_is_failed(told):
    """The set begins without it. A device that can be read again is then taken back and rebuilt."""
    case, output, slices = told["dm-raid-failed"]
    assert "md/raid1:mdX: active with 1 out of 2 mirrors" in output
    assert "md: recovery of RAID array mdX" in output
    assert " raid1 2 AA " in output
    first = DmRaidSuperblock.decode(slices.read(case.numbers[0], 0, 1))
    assert first.failed == set() and first.events > 7


def test_a_mirror_makes_equal_what_is_not_clean_and_no_more(told):
    case, output, slices = told["mirror"]
    first, second = case.kept["contents"]
    dirty = {*range(5 * REGION, 6 * REGION), *range(60 * REGION, 61 * REGION)}
    assert _changed(slices, case.numbers[1], 0, first) == set()
    assert _changed(slices, case.numbers[2], 0, second) == dirty, output
    log = MirrorLog.decode(slices.read(case.numbers[0], 0, 4))
    assert log == MirrorLog.new(_RAID_SECTORS // REGION, clean=True)
