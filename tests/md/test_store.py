"""What is left on the disks of an array by power cuts, failing writes and restarts."""

import random

import pytest

from dmpy.backing import open_leaf
from dmpy.mapper import Mapper
from dmpy.md.assemble import assemble, disk_of, open_disks, table_text
from dmpy.md.create import Recipe, create
from dmpy.testing import FaultyDevice, Power
from dmpy.testing.leaves import GivenLeaves
from dmpy.testing.faulty import every_fault

SECTOR = 512
MIB = 1 << 20
SHAPES = {1: 3, 5: 4, 6: 4, 10: 4}


def recipe_of(level, **more):
    chunk = 0 if level == 1 else 4096
    return Recipe(level, chunk_size=chunk, data_offset=64, **more)


def names_of(level, spares=0):
    return [f"d{n}" for n in range(SHAPES[level] + spares)]


def table_of(devices):
    return table_text(assemble(open_disks(list(devices.values()))))


def settle(device):
    target = device.live.lines[0].target
    assert target.syncer.wait_idle(20)
    return target


def check(dm, device):
    dm.message(device.name, 0, "check")
    assert settle(device).array.mismatches == 0


@pytest.mark.parametrize("level", SHAPES)
@pytest.mark.parametrize("bitmap", [False, True])
def test_after_a_power_cut_flushed_bytes_are_there_and_members_agree(level, bitmap):
    power = Power()
    disks = {name: power.device(MIB // 2, name) for name in names_of(level)}
    chunk = 8192 if bitmap else 0
    recipe = recipe_of(level, bitmap=bitmap, bitmap_chunk=chunk, assume_clean=True)
    create(list(disks.values()), [], recipe)
    table = table_of(disks)
    rng = random.Random(level)
    dm = Mapper(leaves=GivenLeaves(disks))
    device = dm.create("r", table)
    model = bytearray(device.size)
    for _ in range(10):
        offset = rng.randrange(device.size // SECTOR - 40) * SECTOR
        data = rng.randbytes(rng.randint(1, 40) * SECTOR)
        device.pwritev([memoryview(data)], offset)
        model[offset : offset + len(data)] = data
    device.flush()
    flushed = power.position
    touched = set()
    for _ in range(5):
        offset = rng.randrange(device.size // SECTOR - 8) * SECTOR
        device.pwritev([memoryview(rng.randbytes(8 * SECTOR))], offset)
        touched |= set(range(offset // SECTOR, offset // SECTOR + 8))
    device.live.lines[0].target.presuspend()
    cuts = [at for at in power.boundaries if at > flushed]
    for position in [flushed, *cuts[:6], power.position]:
        for crash in power.crashes(position, seed=position, limit=3):
            after = GivenLeaves(dict(zip(disks, crash.devices, strict=True)))
            with Mapper(leaves=after) as again:
                device = again.create("r", table)
                settle(device)
                back = bytearray(device.size)
                device.preadv([memoryview(back)], 0)
                for sector in set(range(device.size // SECTOR)) - touched:
                    place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                    assert back[place] == model[place], (position, sector)
                check(again, device)


@pytest.mark.parametrize("level", SHAPES)
@pytest.mark.parametrize("forever", [False, True])
def test_whichever_request_to_a_member_fails_nothing_is_lost(level, forever):
    """Superblocks and bitmap included: the member is left out, and the others know that."""
    data = random.Random(5).randbytes(9 * 4096 + 512)
    for fault in every_fault(forever=forever, ops=["write", "flush"]):
        disks = {name: open_leaf("mem:512K") for name in names_of(level)}
        recipe = recipe_of(level, bitmap=True, bitmap_chunk=8192, assume_clean=True)
        create(list(disks.values()), [], recipe)
        for name, leaf in disks.items():
            leaf.name = name
        table = table_of(disks)
        wrapped = dict(disks)
        wrapped["d1"] = FaultyDevice(disks["d1"], fault)
        with Mapper(leaves=GivenLeaves(wrapped)) as dm:
            device = dm.create("r", table)
            device.pwritev([memoryview(data)], 1024)
            device.flush()
            device.pwritev([memoryview(data)], 512 * 500)
            device.flush()
        fault.heal()
        with Mapper(leaves=GivenLeaves(disks)) as dm:
            device = dm.create("r", table)
            settle(device)
            for place in (1024, 512 * 500):
                back = bytearray(len(data))
                device.preadv([memoryview(back)], place)
                assert back == data
            check(dm, device)


def test_a_write_is_acknowledged_after_the_superblocks_know_of_the_failure():
    disks = {name: open_leaf("mem:512K") for name in names_of(5)}
    create(list(disks.values()), [], recipe_of(5, assume_clean=True))
    for name, leaf in disks.items():
        leaf.name = name
    wrapped = dict(disks, d1=FaultyDevice(disks["d1"]))
    dm = Mapper(leaves=GivenLeaves(wrapped))
    device = dm.create("r", table_of(disks))
    before = disk_of(disks["d0"]).events
    wrapped["d1"].fail(1, ops=["write"], forever=True)
    device.pwritev([memoryview(b"x" * 65536)], 0)
    # As after kill -9: nothing more is written.
    newest = disk_of(disks["d0"])
    assert newest.events > before
    assert disk_of(disks["d1"]).events < newest.events
    assert newest.role_of(1) == "faulty"
    with pytest.raises(OSError, match="was being written when it stopped"):
        assemble(open_disks(list(disks.values())))


def test_an_array_that_lost_too_many_members_takes_no_writes_and_reads_go_on():
    disks = {name: open_leaf("mem:512K") for name in names_of(5)}
    create(list(disks.values()), [], recipe_of(5, assume_clean=True))
    for name, leaf in disks.items():
        leaf.name = name
    wrapped = {name: FaultyDevice(leaf) for name, leaf in disks.items()}
    dm = Mapper(leaves=GivenLeaves(wrapped))
    device = dm.create("r", table_of(disks))
    device.pwritev([memoryview(b"x" * 65536)], 0)
    for name in ("d1", "d2"):
        wrapped[name].fail(1, ops=["write"], forever=True)
    with pytest.raises(OSError):
        device.pwritev([memoryview(b"y" * 65536)], 0)
    assert " failed " in device.status_text()
    before = disk_of(disks["d0"]).events
    with pytest.raises(OSError):
        device.pwritev([memoryview(b"z" * 4096)], 0)
    assert disk_of(disks["d0"]).events == before
    back = bytearray(4096)
    device.preadv([memoryview(back)], 0)
