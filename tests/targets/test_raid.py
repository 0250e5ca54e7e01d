"""raid: the kernel's grammar, its superblocks over restarts, and what is left after a crash."""

import errno
import random

import pytest

from dmpy.backing import open_leaf
from dmpy.errors import TableError
from dmpy.formats.dm_raid import MAX_SECTOR, DmRaidSuperblock
from dmpy.mapper import Mapper
from dmpy.table import Table
from dmpy.testing import FaultyDevice, Power, every_fault
from dmpy.testing.conformance import TargetTests
from dmpy.testing.leaves import GivenLeaves

SECTOR = 512
DATA_SECTORS = 4096
META_SECTORS = 128


class TestRaid0(TargetTests):
    """RAID 0 is dealt like striped, and fails like it."""

    leg_sizes = (128 * SECTOR, 128 * SECTOR, 128 * SECTOR)
    status_text = "raid0 3 AAA 128/128 idle 0 0 -"

    def build(self, devices):
        by_name = {device.name: device for device in devices}
        line = "0 384 raid raid0 1 8 3 - leg0 - leg1 - leg2"
        target = Table.parse(line, by_name.__getitem__).lines[0].target
        target.resume()
        return target

    def oracle(self, sector):
        chunk, within = sector // 8, sector % 8
        return chunk % 3, chunk // 3 * 8 + within


def devices(count, *, wrap=lambda device: device):
    names = [f"{kind}{place}" for place in range(count) for kind in "md"]
    return {
        name: wrap(open_leaf(f"mem:{(META_SECTORS if name[0] == 'm' else DATA_SECTORS) * SECTOR}"))
        for name in names
    }


def pairs(count, missing=()):
    return " ".join("- -" if place in missing else f"m{place} d{place}" for place in range(count))


def refusal(text, count=5):
    disks = devices(count)
    with pytest.raises(TableError) as caught:
        Table.parse(text, disks.__getitem__)
    return caught.value


WORDS = {
    "raid1": (3, "0", 1),
    "raid4": (3, "8", 2),
    "raid5_ls": (4, "8", 3),
    "raid5_la": (3, "8", 2),
    "raid5_rs": (3, "8", 2),
    "raid5_ra": (3, "8", 2),
    "raid5_n": (3, "8", 2),
    "raid6_zr": (4, "8", 2),
    "raid6_nr": (5, "8", 3),
    "raid6_nc": (4, "8", 2),
    "raid6_ls_6": (4, "8", 2),
    "raid6_rs_6": (4, "8", 2),
    "raid6_la_6": (4, "8", 2),
    "raid6_ra_6": (4, "8", 2),
    "raid6_n_6": (4, "8", 2),
    "raid10": (4, "8", 2),
}


def line(word, params="", missing=()):
    count, chunk, data = WORDS[word]
    given = len(params.split()) + 1
    length = data * DATA_SECTORS
    return f"0 {length} raid {word} {given} {chunk} {params} {count} {pairs(count, missing)}"


def settle(device):
    target = device.live.lines[0].target
    assert target.syncer.wait_idle(20)
    return target


@pytest.mark.parametrize("word", WORDS)
def test_a_new_set_is_synced_and_comes_back_with_its_content(word):
    count = WORDS[word][0]
    leaves = GivenLeaves(devices(count))
    rng = random.Random(word)
    with Mapper(leaves=leaves) as dm:
        device = dm.create("r", line(word))
        target = settle(device)
        total = device.size // SECTOR if word == "raid10" else DATA_SECTORS
        assert device.status_text() == (
            f"0 {device.size // SECTOR} raid {word} {count} {'A' * count} "
            f"{total}/{total} idle 0 0 -"
        )
        data = rng.randbytes(device.size)
        device.pwritev([memoryview(data)], 0)
        dm.message("r", 0, "check")
        settle(device)
        assert target.array.mismatches == 0
    superblock = bytearray(SECTOR)
    leaves.devices["m1"].preadv([memoryview(superblock)], 0)
    kept = DmRaidSuperblock.decode(superblock, device="m1", byte=0)
    assert (kept.array_position, kept.num_devices) == (1, count)
    assert (kept.array_resync_offset, kept.disk_recovery_offset) == (MAX_SECTOR, MAX_SECTOR)
    assert kept.failed == set()
    with Mapper(leaves=leaves) as dm:
        device = dm.create("r", line(word))
        assert device.live.lines[0].target.syncer.action == "idle"
        assert device.live.lines[0].target.array.unsynced == set()
        back = bytearray(device.size)
        device.preadv([memoryview(back)], 0)
        assert back == data


def test_a_device_that_failed_is_known_after_a_restart_and_brought_up_to_date():
    leaves = GivenLeaves(devices(4, wrap=FaultyDevice))
    with Mapper(leaves=leaves) as dm:
        device = dm.create("r", line("raid5_ls"))
        settle(device)
        leaves.devices["d2"].fail(1, ops=["write"], forever=True)
        device.pwritev([memoryview(b"x" * 65536)], 0)
        assert " AADA " in device.status_text()
        assert device.event_nr > 0
    leaves.devices["d2"].heal()
    with Mapper(leaves=leaves) as dm:
        # So slowly that it cannot be done at once.
        device = dm.create("r", line("raid5_ls", "max_recovery_rate 1"))
        target = device.live.lines[0].target
        assert target.array.members[2].only_unsynced
        settle(device)
        assert " AAAA " in device.status_text()
        dm.message("r", 0, "check")
        settle(device)
        assert target.array.mismatches == 0


def test_a_set_works_with_a_device_missing_and_rebuilds_a_new_one():
    leaves = GivenLeaves(devices(4))
    data = random.Random(8).randbytes(3 * DATA_SECTORS * SECTOR)
    with Mapper(leaves=leaves) as dm:
        settle(dm.create("r", line("raid5_ls")))
        dm.device("r").pwritev([memoryview(data)], 0)
    with Mapper(leaves=leaves) as dm:
        device = dm.create("r", line("raid5_ls", missing={1}))
        assert " A-AA " in device.status_text()
        back = bytearray(len(data))
        device.preadv([memoryview(back)], 0)
        assert back == data
    leaves.devices |= {"m1": open_leaf("mem:64K"), "d1": open_leaf("mem:2M")}
    with Mapper(leaves=leaves) as dm:
        with pytest.raises(TableError, match="device 1 is new to the set"):
            dm.create("r", line("raid5_ls"))
        device = dm.create("r", line("raid5_ls", "rebuild 1"))
        settle(device)
        assert " AAAA " in device.status_text()
        device.live.lines[0].target.array.fail(0)
        device.preadv([memoryview(back)], 0)
        assert back == data


@pytest.mark.parametrize("word", ["raid1", "raid5_ls", "raid6_zr", "raid10"])
def test_after_a_power_cut_only_what_was_dirty_is_synced_and_flushed_bytes_are_there(word):
    count = WORDS[word][0]
    for seed in range(6):
        power = Power()
        leaves = GivenLeaves(
            {name: power.device(leaf.size, name) for name, leaf in devices(count).items()}
        )
        rng = random.Random(seed)
        dm = Mapper(leaves=leaves)
        device = dm.create("r", line(word, "daemon_sleep 1"))
        settle(device)
        model = bytearray(device.size)
        for _ in range(12):
            offset = rng.randrange(device.size // SECTOR - 40) * SECTOR
            data = rng.randbytes(rng.randint(1, 40) * SECTOR)
            device.pwritev([memoryview(data)], offset)
            model[offset : offset + len(data)] = data
        device.flush()
        flushed = bytes(model)
        touched = set()
        for _ in range(5):
            offset = rng.randrange(device.size // SECTOR - 8) * SECTOR
            device.pwritev([memoryview(rng.randbytes(8 * SECTOR))], offset)
            touched |= set(range(offset // SECTOR, offset // SECTOR + 8))
        device.live.lines[0].target.presuspend()
        names = list(leaves.devices)
        crash = next(iter(power.crashes(seed=seed, limit=1)))
        after = GivenLeaves(dict(zip(names, crash.devices, strict=True)))
        with Mapper(leaves=after) as again:
            device = again.create("r", line(word))
            settle(device)
            back = bytearray(device.size)
            device.preadv([memoryview(back)], 0)
            for sector in range(device.size // SECTOR):
                if sector not in touched:
                    place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                    assert back[place] == flushed[place], (word, seed, sector)
            again.message("r", 0, "check")
            assert settle(device).array.mismatches == 0


@pytest.mark.parametrize("word", ["raid1", "raid5_ls", "raid6_zr", "raid10"])
@pytest.mark.parametrize("forever", [False, True])
def test_whichever_write_fails_nothing_is_lost_and_the_set_comes_back(word, forever):
    count = WORDS[word][0]
    text = line(word, "daemon_sleep 1")
    for fault in every_fault(limit=12, ops=["write", "flush"], forever=forever):
        bad = random.Random(fault.at).randrange(count)
        disks = devices(count)
        wrapped = {
            name: FaultyDevice(leaf, fault) if name[1] == str(bad) else leaf
            for name, leaf in disks.items()
        }
        data = random.Random(5).randbytes(9 * 4096 + 512)
        fault.at, at = None, fault.at
        with Mapper(leaves=GivenLeaves(wrapped)) as dm:
            device = dm.create("r", text)
            settle(device)
            fault.at = fault.seen + at
            device.pwritev([memoryview(data)], 1024)
            device.flush()
            device.pwritev([memoryview(data)], 512 * 1000)
            device.flush()
        fault.heal()
        with Mapper(leaves=GivenLeaves(disks)) as dm:
            device = dm.create("r", line(word))
            settle(device)
            for place in (1024, 512 * 1000):
                back = bytearray(len(data))
                device.preadv([memoryview(back)], place)
                assert back == data
            dm.message("r", 0, "check")
            assert settle(device).array.mismatches == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("raid7 1 8 3", "raid type must be one of raid0, raid1"),
        ("raid5_ls x 8 3", "number of parameters must be a number (got x)"),
        ("raid5_ls 1 9 3", "chunk size must be a power of 2 (got 9)"),
        ("raid5_ls 1 4 3", "chunk size must be at least 8 (got 4)"),
        ("raid5_ls 1 8 1", "raid5_ls needs at least 2 devices (got 1)"),
        ("raid6_zr 1 8 3", "raid6_zr needs at least 4 devices (got 3)"),
        ("raid5_ls 2 8 bogus 3", "unknown parameter bogus"),
        ("raid5_ls 3 8 sync nosync 3", "sync and nosync exclude each other"),
        ("raid5_ls 4 8 sync rebuild 1 3", "sync and rebuild exclude each other"),
        ("raid5_ls 3 8 rebuild 3 3", "rebuild must be at most 2 (got 3)"),
        ("raid5_ls 3 8 write_mostly 1 3", "write_mostly is for raid1 only"),
        ("raid5_ls 3 8 raid10_format far 3", "raid10_format is for raid10 only"),
        ("raid10 3 8 raid10_format wide 3", "raid10_format must be near, far or offset"),
        ("raid10 3 8 raid10_copies 4 3", "raid10_copies must be at most 3"),
        ("raid5_ls 3 8 region_size 100 3", "region_size must be a power of 2"),
        ("raid5_ls 3 8 journal_dev d0 3", "journal_dev is not supported (got d0)"),
        ("raid5_ls 5 8 min_recovery_rate 9 max_recovery_rate 5 3", "min_recovery_rate must be"),
        ("raid6_zr 2 8 nosync 4", "raid6 must be synced"),
        ("raid0 2 8 sync 3", "raid0 takes no parameters (got sync)"),
    ],
)
def test_bad_parameters_are_refused_by_name(arguments, sentence):
    count = int(arguments.split()[-1])
    error = refusal(f"0 8192 raid {arguments} {pairs(count)}")
    assert sentence in str(error)


def test_lengths_and_devices_that_do_not_fit_are_refused():
    for text, sentence in [
        (f"0 8191 raid raid5_ls 1 8 3 {pairs(3)}", "divisible by the number of data devices"),
        (f"0 20 raid raid5_ls 1 8 3 {pairs(3)}", "length must be whole stripes"),
        (f"0 16384 raid raid5_ls 1 8 3 {pairs(3)}", "data device 0 mem:2097152 has 4096 sectors"),
        ("0 8192 raid raid5_ls 1 8 3 m0 - m1 d1 m2 d2", "data device 0 is -, but it has"),
        (f"0 8192 raid raid5_ls 1 8 3 {pairs(3, {1})}", "a new set needs all of its devices"),
        (f"0 8192 raid raid5_ls 1 8 3 {pairs(2)}", "metadata device 2 is missing"),
    ]:
        assert sentence in str(refusal(text))


def test_a_superblock_of_another_set_is_refused_and_nothing_is_written():
    leaves = GivenLeaves(devices(4))
    with Mapper(leaves=leaves) as dm:
        settle(dm.create("r", line("raid5_ls")))
    def content():
        found = {}
        for name, leaf in leaves.devices.items():
            found[name] = bytearray(leaf.size)
            leaf.preadv([memoryview(found[name])], 0)
        return found

    before = content()
    with Mapper(leaves=leaves) as dm:
        for text, sentence in [
            (line("raid6_zr").replace("8192", "8192"), "superblock has level 5 (expected 6"),
            (line("raid5_ls").replace("1 8  4", "1 16  4"), "stripe_sectors 8 (expected 16"),
            (line("raid5_ls").replace("m0 d0 m1 d1", "m1 d1 m0 d0"), "device 0 has place 1"),
        ]:
            with pytest.raises(TableError) as caught:
                dm.create("r", text)
            assert sentence in str(caught.value)
    assert content() == before


def test_messages_are_the_kernels():
    leaves = GivenLeaves(devices(4))
    with Mapper(leaves=leaves) as dm:
        device = dm.create("r", line("raid5_ls", "max_recovery_rate 1"))
        with pytest.raises(OSError) as refused:
            dm.message("r", 0, "check")
        assert refused.value.errno == errno.EBUSY
        dm.message("r", 0, "FROZEN now")
        device.live.lines[0].target.syncer.wait_idle(5)
        assert " frozen " in device.status_text()
        with pytest.raises(OSError) as refused:
            dm.message("r", 0, "bogus")
        assert refused.value.errno == errno.EINVAL


def test_a_table_is_printed_in_the_kernels_order():
    text = (
        "0 4096 raid raid1 12 64 write_mostly 1 REGION_SIZE 1024 daemon_sleep 7 "
        "max_recovery_rate 9 min_recovery_rate 3 sync 3 m0 d0 m1 d1 m2 d2"
    )
    target = Table.parse(text, devices(3).__getitem__).lines[0].target
    assert target.table().startswith(
        "raid1 12 0 sync daemon_sleep 7 min_recovery_rate 3 max_recovery_rate 9 "
        "write_mostly 1 region_size 1024 3 "
    )


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ("", "raid10"),
        ("raid10_format far", "raid10_far"),
        ("raid10_format offset", "raid10_offset"),
    ],
)
def test_the_status_names_the_layout_of_a_raid10(params, word):
    text = line("raid10", params)
    target = Table.parse(text, devices(4).__getitem__).lines[0].target
    assert target.status().startswith(f"{word} 4 AAAA ")
