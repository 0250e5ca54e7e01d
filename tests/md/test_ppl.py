"""Partial parity logs: what they say is made true after a crash, also with a member gone."""

import random

import pytest

from dmpy.backing import open_leaf
from dmpy.formats.md_ppl import PPLEntry, PPLHeader, crc32c, signature_of
from dmpy.mapper import Mapper
from dmpy.md.assemble import assemble, open_disks, table_text
from dmpy.md.create import Recipe, create
from dmpy.md.disk import read_bytes
from dmpy.testing.leaves import GivenLeaves

CHUNK = 16384
MEMBERS = 3


def xor(*blocks):
    return bytes(a ^ b for a, b in zip(*blocks))


def crashed(bad_checksum=False):
    """An array whose first stripe was torn: D0 is new, D1 old, P older than both; P logs it."""
    disks = {f"d{n}": open_leaf("mem:4M") for n in range(MEMBERS)}
    for name, leaf in disks.items():
        leaf.name = name
    recipe = Recipe(5, chunk_size=CHUNK, data_offset=4096)
    create(list(disks.values()), [], recipe)
    rng = random.Random(3)
    d0, d1, garbage = (rng.randbytes(CHUNK) for _ in range(3))
    # Left-symmetric, three members: stripe 0 is D0, D1, P.
    for name, data in zip(disks, (d0, d1, garbage)):
        disks[name].pwritev([memoryview(data)], 4096 * 512)
    for place, disk in enumerate(open_disks(list(disks.values()))):
        sb = disk.superblock
        sb.bblog_size = sb.bblog_offset = 0
        sb.set_feature("PPL")
        sb.set_ppl(8, 1024)
        disk.medium.pwritev([memoryview(sb.encode())], disk.byte)
        header = PPLHeader(signature=signature_of(disk.set_uuid), generation=1)
        partial = b""
        if place == 2:
            # What the write of D0 leaves alone is D1.
            partial = d1
            check = crc32c(partial) ^ bad_checksum
            header.entries = [PPLEntry(0, CHUNK, CHUNK, 2, check)]
        log = bytes(header.encode()) + partial
        disk.medium.pwritev([memoryview(log)], disk.byte + 8 * 512)
    return disks, d0, d1


def table_of(disks):
    found = assemble(open_disks(list(disks.values())))
    assert found.has_ppl and found.resync_offset == 0
    return table_text(found)


def test_a_torn_stripe_has_right_parity_afterwards():
    disks, d0, d1 = crashed()
    table = table_of(disks)
    with Mapper(leaves=GivenLeaves(disks)) as dm:
        device = dm.create("r", table)
        assert read_bytes(disks["d2"], 4096 * 512, CHUNK) == xor(d0, d1)
        # Nothing is left to be synced, and while in use there is no log.
        assert device.live.lines[0].target.array.resync_offset is None
        assert open_disks([disks["d0"]])[0].features == []
    assert all("PPL" in disk.features for disk in open_disks(list(disks.values())))
    assert assemble(open_disks(list(disks.values()))).resync_offset is None


def test_what_was_not_written_is_computed_right_without_its_member():
    disks, d0, d1 = crashed()
    del disks["d1"]
    table = table_of(disks)
    with Mapper(leaves=GivenLeaves(disks)) as dm:
        device = dm.create("r", table)
        back = bytearray(CHUNK)
        device.preadv([memoryview(back)], 0)
        assert back == d0
        device.preadv([memoryview(back)], CHUNK)
        assert back == d1


def test_a_new_member_has_room_for_a_log_too():
    disks, d0, d1 = crashed()
    del disks["d1"]
    table = table_of(disks)
    disks["new"] = open_leaf("mem:4M")
    disks["new"].name = "new"
    table = table.replace(" 3 ", " 4 ") + " new"
    with Mapper(leaves=GivenLeaves(disks)) as dm:
        device = dm.create("r", table)
        dm.message("r", 0, "add new")
        assert device.live.lines[0].target.syncer.wait_idle(20)
    found = assemble(open_disks(list(disks.values())))
    assert found.missing == [] and all("PPL" in disk.features for disk in found.disks)


def test_a_damaged_log_leaves_the_array_to_be_synced():
    disks, d0, d1 = crashed(bad_checksum=True)
    with Mapper(leaves=GivenLeaves(disks)) as dm:
        device = dm.create("r", table_of(disks))
        target = device.live.lines[0].target
        assert target.syncer.wait_idle(20)
        assert read_bytes(disks["d2"], 4096 * 512, CHUNK) == xor(d0, d1)


def test_a_damaged_log_of_a_degraded_array_is_refused():
    disks, _, _ = crashed(bad_checksum=True)
    del disks["d0"]
    with Mapper(leaves=GivenLeaves(disks)) as dm, pytest.raises(OSError, match="are damaged"):
        dm.create("r", table_of(disks))
