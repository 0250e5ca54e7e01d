"""md: the target of an assembled array, and its grammar."""

import json
import os

import pytest

from dmpy.backing import open_leaf
from dmpy.errors import TableError
from dmpy.mapper import Mapper
from dmpy.md.assemble import assemble, open_disks, table_text
from dmpy.md.create import Recipe, create
from dmpy.table import Table
from dmpy.target import Leg
from dmpy.targets.md import MD
from dmpy.testing.conformance import TargetTests

SECTOR = 512
MIB = 1 << 20
UUID = bytes(range(16))
UUID_TEXT = "00010203:04050607:08090a0b:0c0d0e0f"


class Twinned(MD):
    """An array whose superblocks are elsewhere."""

    twins = ()

    def look(self):
        disks = open_disks(self.twins)
        self._disks = {id(leg): disk for leg, disk in zip(self.devices, disks)}
        return disks or [None]


class TestRaid0(TargetTests):
    """An array without redundancy writes nothing but its data, and fails like striped."""

    leg_sizes = (128 * SECTOR, 128 * SECTOR, 128 * SECTOR)
    status_text = (
        "raid0 clean 3 3 UUU 0/0 idle 0 0 - 3 leg0 0 A leg1 1 A leg2 2 A"
    )

    def build(self, devices):
        # The superblocks are on twins, so that all requests that the suite sees are for data.
        twins = [open_leaf(f"mem:{device.size}") for device in devices]
        create(twins, [], Recipe(0, chunk_size=4096, data_offset=32, uuid=UUID))
        target = Twinned(UUID_TEXT, [Leg(each, 0, each.size) for each in devices], 288 * SECTOR)
        target.twins = twins
        target.resume()
        return target

    def oracle(self, sector):
        chunk, within = sector // 8, sector % 8
        return chunk % 3, 32 + chunk // 3 * 8 + within


def make(folder, count, recipe, *, spares=0, mib=8, missing=()):
    """Make an array of files; returns their paths and its table."""
    paths = [folder / f"{n}.img" for n in range(count + spares)]
    for path in paths:
        path.touch()
        os.truncate(path, mib * MIB)
    leaves = [None if n in missing else open_leaf(str(p)) for n, p in enumerate(paths)]
    try:
        create(leaves[:count], leaves[count:], recipe)
        return paths, table_text(assemble(open_disks([each for each in leaves if each])))
    finally:
        for leaf in leaves:
            if leaf is not None:
                leaf.close()


def settle(device):
    target = device.live.lines[0].target
    assert target.syncer.wait_idle(20)
    return target


def write(device, data, offset=0):
    device.pwritev([memoryview(data)], offset)


def read(device, length, offset=0):
    back = bytearray(length)
    device.preadv([memoryview(back)], offset)
    return back


def detail(device):
    return json.loads(device.message(0, "detail"))


def refusal(text, devices):
    with pytest.raises(TableError) as caught:
        Table.parse(text, devices.__getitem__)
    return str(caught.value)


def test_a_device_without_the_arrays_superblock_only_makes_no_array():
    devices = {"a": open_leaf("mem:1M")}
    assert refusal(f"0 8 md {UUID_TEXT} 1 a", devices) == (
        f"line 1, md: no device has a superblock of array {UUID_TEXT}"
    )


def test_too_few_words_are_refused():
    assert "2 devices need as many words (got 1)" in refusal(f"0 8 md {UUID_TEXT} 2 a", {})


def test_a_device_named_twice_is_refused():
    devices = {"a": open_leaf("mem:1M")}
    assert "one device is named twice" in refusal(f"0 8 md {UUID_TEXT} 2 a a", devices)


def test_an_array_of_no_device_is_refused():
    assert "an array needs a device" in refusal(f"0 8 md {UUID_TEXT} 2 - -", {})


def test_its_table_is_what_was_loaded(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, uuid=UUID))
    with Mapper() as dm:
        device = dm.create("r", table)
        assert device.table_text() == f"0 14336 md {UUID_TEXT} 2 {paths[0]} {paths[1]}"


def test_a_table_longer_than_the_array_is_refused(tmp_path):
    _, table = make(tmp_path, 2, Recipe(1, uuid=UUID))
    with Mapper() as dm, pytest.raises(OSError) as caught:
        dm.create("r", table.replace("14336", "14337"))
    assert str(caught.value) == "md: the array has 14336 sectors, the table needs 14337"


def test_a_spare_takes_over_by_itself(tmp_path):
    paths, table = make(tmp_path, 3, Recipe(5, chunk_size=4096), spares=1)
    data = os.urandom(MIB)
    with Mapper() as dm:
        device = dm.create("r", table)
        settle(device)
        write(device, data)
        dm.message("r", 0, f"fail {paths[1]}")
        settle(device)
        assert detail(device)["health"] == "UUU"
        states = [(each["place"], each["state"]) for each in detail(device)["devices"]]
        assert states == [(0, "in_sync"), (None, "unused"), (2, "in_sync"), (1, "in_sync")]
        dm.message("r", 0, "check")
        assert settle(device).array.mismatches == 0
        assert read(device, MIB) == data
    with Mapper() as dm:
        again = dm.create("r", table)
        assert detail(again)["health"] == "UUU"
        assert "it is stale" in detail(again)["devices"][1]["reason"]
        assert read(again, MIB) == data


def test_re_add_with_a_bitmap_syncs_only_what_was_written(tmp_path):
    recipe = Recipe(1, bitmap=True, bitmap_chunk=64 << 10)
    paths, table = make(tmp_path, 2, recipe, mib=16)
    with Mapper() as dm:
        device = dm.create("r", table)
        target = settle(device)
        target.array.clean_up(0)
        dm.message("r", 0, f"fail {paths[1]}")
        dm.message("r", 0, f"remove {paths[1]}")
        write(device, b"x" * 4096, 5 * MIB)
        before = paths[1].read_bytes()
        windows = []
        sync_window = target.array.sync_window

        def noted(action, begin, end):
            windows.append((action, begin, end))
            return sync_window(action, begin, end)

        target.array.sync_window = noted
        dm.message("r", 0, f"re-add {paths[1]}")
        settle(device)
        assert detail(device)["health"] == "UU"
        assert {action for action, _, _ in windows} == {"recover"}
        assert sum(end - begin for _, begin, end in windows) <= MIB
        after = paths[1].read_bytes()
        assert after != before and b"x" * 4096 in after
        dm.message("r", 0, "check")
        assert settle(device).array.mismatches == 0


def test_re_add_without_a_bitmap_is_refused(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    with Mapper() as dm:
        dm.create("r", table)
        dm.message("r", 0, f"fail {paths[1]}")
        with pytest.raises(OSError) as caught:
            dm.message("r", 0, f"re-add {paths[1]}")
        assert "no write-intent bitmap" in str(caught.value)


def test_a_failed_member_is_added_again_and_rebuilt(tmp_path):
    paths, table = make(tmp_path, 3, Recipe(5, chunk_size=4096, assume_clean=True))
    data = os.urandom(MIB)
    with Mapper() as dm:
        device = dm.create("r", table)
        dm.message("r", 0, f"fail {paths[0]}")
        write(device, data)
        dm.message("r", 0, f"add {paths[0]}")
        settle(device)
        assert detail(device)["degraded"] == 0
        dm.message("r", 0, f"fail {paths[2]}")
        assert read(device, MIB) == data


def test_a_new_device_joins_after_its_table_names_it(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    new = tmp_path / "new.img"
    new.touch()
    os.truncate(new, 8 * MIB)
    with Mapper() as dm:
        device = dm.create("r", table)
        write(device, b"y" * 4096)
        dm.message("r", 0, f"fail {paths[0]}")
        dm.load("r", table.replace(" 2 ", " 3 ") + f" {new}")
        dm.resume("r")
        dm.message("r", 0, f"add {new}")
        settle(device)
        assert detail(device)["health"] == "UU"
    assert b"y" * 4096 in new.read_bytes()


def test_the_last_good_member_cannot_be_failed(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    with Mapper() as dm:
        device = dm.create("r", table)
        dm.message("r", 0, f"fail {paths[0]}")
        with pytest.raises(OSError) as caught:
            dm.message("r", 0, f"fail {paths[1]}")
        assert "cannot do without it" in str(caught.value)
        assert detail(device)["health"] == "FU"


def test_a_member_in_use_cannot_be_removed(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    with Mapper() as dm:
        dm.create("r", table)
        with pytest.raises(OSError) as caught:
            dm.message("r", 0, f"remove {paths[1]}")
        assert "has to be failed first" in str(caught.value)


def test_a_message_of_other_words_is_refused(tmp_path):
    _, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    with Mapper() as dm:
        dm.create("r", table)
        for words in ("nonsense", "fail", "fail a b", "grow", "grow members x", "add x y"):
            with pytest.raises(OSError):
                dm.message("r", 0, words)


def test_a_raid1_gets_more_members(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True), spares=1)
    with Mapper() as dm:
        device = dm.create("r", table)
        write(device, b"z" * 4096)
        dm.message("r", 0, "grow members 3")
        dm.load("r", table)
        dm.resume("r")
        settle(device)
        assert detail(device)["health"] == "UUU"
    assert b"z" * 4096 in paths[2].read_bytes()


@pytest.mark.parametrize("level", [1, 5, 6, 10])
def test_members_that_are_larger_are_used(tmp_path, level):
    recipe = Recipe(level, chunk_size=0 if level == 1 else 4096, size=2 * MIB, assume_clean=True)
    paths, table = make(tmp_path, 4, recipe)
    data = os.urandom(MIB)
    with Mapper() as dm:
        device = dm.create("r", table)
        write(device, data)
        size = device.size
        dm.message("r", 0, "grow size 8192")
        dm.load("r", table.replace(f"0 {size >> 9} ", f"0 {2 * size >> 9} "))
        dm.resume("r")
        assert device.size == 2 * size
        settle(device)
        assert read(device, MIB) == data
        write(device, data, 2 * size - MIB)
        dm.message("r", 0, "check")
        assert settle(device).array.mismatches == 0


def test_an_array_of_readonly_devices_is_read_and_not_written(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True))
    before = [path.read_bytes() for path in paths]
    with Mapper() as dm:
        device = dm.create("r", table, readonly=True)
        assert detail(device)["state"] == "read-only"
        read(device, MIB)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("level", [1, 5, 10])
def test_a_member_is_replaced_without_a_time_of_less_redundancy(tmp_path, level):
    recipe = Recipe(level, chunk_size=0 if level == 1 else 4096, assume_clean=True)
    paths, table = make(tmp_path, 4, recipe, spares=1)
    data = os.urandom(MIB)
    with Mapper() as dm:
        device = dm.create("r", table)
        write(device, data)
        dm.message("r", 0, f"replace {paths[1]} {paths[4]}")
        dm.suspend("r")
        dm.resume("r")
        target = device.live.lines[0].target
        for _ in range(1000):
            if target._wanted_copy is None:
                break
            assert detail(device)["degraded"] == 0
            write(device, data[:4096], 3 * MIB)
        states = {each["device"]: each["place"] for each in detail(device)["devices"]}
        assert (states[str(paths[1])], states[str(paths[4])]) == (None, 1)
        dm.message("r", 0, "check")
        assert settle(device).array.mismatches == 0
        assert read(device, MIB) == data
    with Mapper() as dm:
        again = dm.create("r", table)
        assert detail(again)["devices"][4]["place"] == 1
        assert read(again, MIB) == data


def test_only_a_member_is_replaced_and_only_by_a_spare(tmp_path):
    paths, table = make(tmp_path, 2, Recipe(1, assume_clean=True), spares=1)
    with Mapper() as dm:
        dm.create("r", table)
        for old, new, sentence in ((2, 1, "no member in sync"), (0, 1, "is no spare")):
            with pytest.raises(OSError) as caught:
                dm.message("r", 0, f"replace {paths[old]} {paths[new]}")
            assert sentence in str(caught.value)


@pytest.mark.parametrize("bitmap", [False, True])
def test_writes_after_a_suspend_are_known_to_the_superblocks(tmp_path, bitmap):
    recipe = Recipe(1, bitmap=bitmap, assume_clean=True)
    paths, table = make(tmp_path, 2, recipe)
    with Mapper() as dm:
        device = dm.create("r", table)
        write(device, b"1" * 4096)
        dm.suspend("r")
        dm.resume("r")
        assert detail(device)["state"] == "clean"
        write(device, b"2" * 4096)
        assert detail(device)["state"] == "active"


def test_syncing_keeps_to_its_speed_limit_and_can_be_paused(tmp_path):
    _, table = make(tmp_path, 2, Recipe(1), mib=16)
    with Mapper() as dm:
        device = dm.create("r", table)
        target = settle(device)
        # A window of 1 MiB, and then a rest of more than any test has patience for.
        dm.message("r", 0, "sync_speed_max 1")
        dm.message("r", 0, "repair")
        assert detail(device)["due"]
        with pytest.raises(OSError, match="is going on"):
            for _ in range(100_000):
                dm.message("r", 0, "check")
        dm.message("r", 0, "frozen")
        assert target.syncer.wait_idle(5)
        assert detail(device)["action"] == "frozen"
        dm.message("r", 0, "sync_speed_max 0")
        dm.message("r", 0, "check")
        assert settle(device).array.mismatches == 0


def test_a_member_whose_superblock_is_damaged_is_left_out(tmp_path):
    paths, table = make(tmp_path, 3, Recipe(5, chunk_size=4096, assume_clean=True))
    block = bytearray(paths[1].read_bytes())
    block[4096 + 100] ^= 1
    paths[1].write_bytes(block)
    with Mapper() as dm:
        device = dm.create("r", table)
        assert detail(device)["health"] == "U_U"
        assert "sb_csum" in detail(device)["devices"][1]["reason"]
    assert paths[1].read_bytes() == block
