"""mirror: all data on every leg, a log of regions, copies in the background, failing legs."""

import errno
import struct
import threading
import time

import numpy as np
import pytest

from dmpy.device import BlockSize
from dmpy.errors import TableError
from dmpy.mapper import Mapper
from dmpy.table import Table
from dmpy.target import Leg, find_target
from dmpy.targets import mirror
from dmpy.targets.mirror import CoreLog, DiskLog, Mirror
from dmpy.testing import Fault, FaultyDevice, PatternDevice
from dmpy.testing.conformance import TargetTests, run_threads
from dmpy.testing.faulty import every_fault
from dmpy.testing.pattern import expect_equal, pattern
from dmpy.testing.powercut import Power

SECTOR = 512
REGION = 8 * SECTOR


def devices_of(sizes=(2048, 2048, 2048, 64)):
    return {f"d{n}": PatternDevice(size * SECTOR, f"d{n}") for n, size in enumerate(sizes)}


def parse(text, devices=None):
    known = devices or devices_of()

    def opened(word):
        if word not in known:
            raise OSError(errno.ENOENT, f"{word}: no such device")
        return known[word]

    return Table.parse(text, opened).lines[0].target


def read(target, offset, length):
    data = bytearray(length)
    target.preadv([memoryview(data)], offset)
    return bytes(data)


def write(target, offset, data, **how):
    target.pwritev([memoryview(data)], offset, **how)


def wait_until(true, what="it"):
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, f"{what} does not happen"
        time.sleep(0.001)


def synced(target):
    return target.log.sync_count == target.log.count


class MirrorTests(TargetTests):
    """What all shapes share. The oracle says where reads come from: the default leg."""

    starts = (0, 0)
    leg_sectors = 64
    features = {}

    def make_log(self):
        return CoreLog(REGION, self.leg_sectors // 8, "nosync")

    def build(self, devices):
        legs = [
            Leg(device, start * SECTOR, self.leg_sectors * SECTOR)
            for device, start in zip(devices, self.starts)
        ]
        return Mirror(self.make_log(), legs, **self.features)

    def oracle(self, sector):
        return 0, self.starts[0] + sector

    def scatter(self, data, contents):
        """All of it is on every leg."""
        after = [content.copy() for content in contents]
        for content, start in zip(after, self.starts):
            content[start * SECTOR : start * SECTOR + len(data)] = data
        return after

    def equal_legs(self):
        data = pattern(0, self.target.size, 0x77)
        self.write(data, 0)
        return data

    # What a mirror does otherwise than targets that need all their legs.

    def test_writes_of_every_alignment_around_each_boundary(self):
        self.equal_legs()
        super().test_writes_of_every_alignment_around_each_boundary()

    def test_random_requests_do_as_a_model_does(self):
        self.equal_legs()
        super().test_random_requests_do_as_a_model_does()

    def test_a_discard_touches_the_sectors_of_its_range_only(self):
        self.equal_legs()
        super().test_a_discard_touches_the_sectors_of_its_range_only()

    @pytest.mark.parametrize("may_unmap", [True, False])
    @pytest.mark.parametrize("fast_only", [True, False])
    def test_zeroes_go_where_the_oracle_says_and_nowhere_else(self, may_unmap, fast_only):
        self.equal_legs()
        super().test_zeroes_go_where_the_oracle_says_and_nowhere_else(may_unmap, fast_only)

    def test_a_flush_that_fails_on_one_leg_fails_and_still_reaches_the_others(self):
        """do_failures(): it does not fail while a leg is left."""
        for bad in range(len(self.devices)):
            devices = [FaultyDevice(device) for device in self.make_devices()]
            devices[bad].fail(ops=["flush"])
            target = self.build(devices)
            target.flush()
            assert all(device.calls["flush"] == 1 for device in devices)

    @pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
    def test_an_error_of_a_leg_surfaces_with_its_errno(self, error):
        """Once all legs have failed; not before."""
        for op in ("read", "write", "flush", "zero"):
            devices = [FaultyDevice(device) for device in self.make_devices()]
            for device in devices:
                device.fail(forever=True, error=error, ops=[op])
            target = self.build(devices)
            calls = {
                "read": lambda: read(target, 0, SECTOR),
                "write": lambda: write(target, 0, bytes(SECTOR)),
                "flush": target.flush,
                "zero": lambda: target.write_zeroes(0, SECTOR),
            }
            with pytest.raises(OSError) as caught:
                calls[op]()
            assert caught.value.errno == error

    def test_a_dead_leg_takes_its_own_sectors_only(self):
        """None at all."""
        data = self.equal_legs()
        for bad in range(len(self.devices)):
            devices = list(self.devices)
            devices[bad] = FaultyDevice(devices[bad], Fault(1, forever=True))
            target = self.build(devices)
            for offset in range(0, self.target.size, SECTOR):
                assert read(target, offset, SECTOR) == data[offset : offset + SECTOR].tobytes()


class TestTwoLegs(MirrorTests):
    leg_sizes = (100 * SECTOR, 64 * SECTOR)
    starts = (10, 0)
    status_text = "2 leg0 leg1 8/8 1 AA 1 core"

    def test_its_table_names_log_legs_and_starts(self):
        assert self.target.table() == "core 2 8 nosync 2 leg0 10 leg1 0"


class TestNineLegs(MirrorTests):
    leg_sizes = (40 * SECTOR,) * 9
    starts = tuple(range(9))
    leg_sectors = 24


class TestFeatures(MirrorTests):
    leg_sizes = (64 * SECTOR,) * 3
    starts = (0, 0, 0)
    features = {"handle_errors": True, "keep_log": True}

    def test_its_table_names_the_features(self):
        assert self.target.table().endswith(" 2 handle_errors keep_log")


class TestDiskLog(MirrorTests):
    """With regions marked and flushed before each write."""

    leg_sizes = (64 * SECTOR,) * 2
    status_text = "2 leg0 leg1 8/8 1 AA 3 disk log A"

    def setup_method(self):
        self.log_device = PatternDevice(8 * SECTOR, "log")
        super().setup_method()

    def make_log(self):
        return DiskLog(self.log_device, REGION, self.leg_sectors // 8, "nosync")

    def build(self, devices):
        target = super().build(devices)
        target.log.load()
        return target

    def test_its_table_parses_to_an_equal_target(self):
        devices = {device.name: device for device in [*self.devices, self.log_device]}
        again = parse(f"0 64 mirror {self.target.table()}", devices)
        assert again == self.target

    def test_it_can_be_suspended_and_resumed(self):
        super().test_it_can_be_suspended_and_resumed()
        self.target.presuspend()


# Tables


def test_its_word_finds_it():
    assert find_target("mirror") is Mirror


def test_version_is_the_kernels():
    assert Mirror.version == (1, 14, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        "core 1 8 2 d0 0 d1 0",
        "core 2 8 sync 2 d0 0 d1 0",
        "core 2 8 nosync 2 d0 0 d1 5",
        "core 1 2 2 d0 0 d1 0",
        "core 1 1024 2 d0 0 d1 0",
        "core 1 8 3 d0 0 d1 0 d2 7",
        "disk 2 d3 8 2 d0 0 d1 0",
        "disk 3 d3 8 nosync 2 d0 0 d1 0",
        "disk 3 d3 8 sync 2 d0 0 d1 0 1 handle_errors",
        "core 1 8 2 d0 0 d1 0 2 handle_errors keep_log",
    ],
)
def test_tables_are_told_as_they_were_given(arguments):
    assert parse(f"0 1024 mirror {arguments}").table() == arguments


@pytest.mark.parametrize(
    "given, told",
    [
        ("core 1 8 2 d0 0 d1 0 0", "core 1 8 2 d0 0 d1 0"),
        ("core 1 08 2 d0 00 d1 0", "core 1 8 2 d0 0 d1 0"),
        (
            "core 1 8 2 d0 0 d1 0 2 keep_log handle_errors",
            "core 1 8 2 d0 0 d1 0 2 handle_errors keep_log",
        ),
        (
            "core 1 8 2 d0 0 d1 0 2 handle_errors handle_errors",
            "core 1 8 2 d0 0 d1 0 1 handle_errors",
        ),
    ],
)
def test_odd_spellings_that_the_kernel_takes_are_accepted(given, told):
    assert parse(f"0 1024 mirror {given}").table() == told


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("", "log type is missing"),
        ("core", "number of log arguments"),
        ("core 0 2 d0 0 d1 0", "core log takes 1 or 2 arguments"),
        ("core 3 8 sync 2 d0 0 d1 0", "core log takes 1 or 2 arguments"),
        ("core 2 8", "core log takes 1 or 2"),
        ("core 2 8 async 2 d0 0 d1 0", "sync argument must be one of"),
        ("disk 1 d3 2 d0 0 d1 0", "disk log takes 2 or 3"),
        ("disk 4 d3 8 sync x 2 d0 0 d1 0", "disk log takes 2 or 3"),
        ("disk 2 nowhere 8 2 d0 0 d1 0", "nowhere"),
        ("userspace 1 8 2 d0 0 d1 0", "log type must be one of core, disk"),
        ("core 1 8", "number of legs"),
        ("core 1 8 2 d0 0 d1", "2 legs need 4"),
        ("core 1 8 2 d0 0 d1 0 1", "1 features need as many words"),
        ("core 1 8 2 d0 0 d1 0 1 be_good", "feature must be one of"),
        ("core 1 8 2 d0 0 d1 0 1 keep_log", "needs handle_errors"),
        ("core 1 8 2 d0 0 d1 0 1 handle_errors 5", "too many"),
        ("core 1 8 2 d0 0 d1 2000", "leg d1 has 2048 sectors"),
        ("core 1 +8 2 d0 0 d1 0", "must be a number"),
        ("core 1 8 2 d0 -1 d1 0", "must be a number"),
    ],
)
def test_tables_that_the_kernel_refuses_are_refused(arguments, why):
    with pytest.raises(TableError, match=why):
        parse(f"0 1024 mirror {arguments}")


@pytest.mark.parametrize("region", [2, 4, 512, 1024])
def test_region_sizes_up_to_the_length_are_accepted(region):
    target = parse(f"0 1030 mirror core 1 {region} 2 d0 0 d1 0")
    assert target.log.region_size == region * SECTOR
    assert target.log.count == -(-1030 // region)


@pytest.mark.parametrize("region", [0, 1, 3, 12, 2048, 4294967304])
def test_other_region_sizes_are_refused(region):
    with pytest.raises(TableError, match="region size in sectors"):
        parse(f"0 1030 mirror core 1 {region} 2 d0 0 d1 0")


@pytest.mark.parametrize("count", [2, 9])
def test_the_fewest_and_the_most_legs_are_accepted(count):
    legs = " ".join(f"d0 {n * 8}" for n in range(count))
    assert len(parse(f"0 8 mirror core 1 8 {count} {legs}").legs) == count


@pytest.mark.parametrize("count", [0, 1, 10])
def test_fewer_and_more_legs_are_refused(count):
    legs = " ".join(f"d0 {n * 8}" for n in range(count))
    with pytest.raises(TableError, match="number of legs must be at"):
        parse(f"0 8 mirror core 1 8 {count} {legs}")


def test_a_log_that_just_fits_its_device_is_accepted():
    """1024 bytes, then a bit a region: 8192 regions are 1024 bytes more."""
    devices = devices_of((16384, 16384, 4, 3))
    assert parse("0 16384 mirror disk 2 d2 2 2 d0 0 d1 0", devices).log.count == 8192
    with pytest.raises(TableError, match="log device d3 has 1536 bytes, the log needs 2048"):
        parse("0 16384 mirror disk 2 d3 2 2 d0 0 d1 0", devices)


def test_regions_smaller_than_a_block_of_a_leg_are_refused():
    devices = {
        f"d{n}": PatternDevice(1 << 20, f"d{n}", block_size=BlockSize(4096)) for n in range(2)
    }
    with pytest.raises(TableError, match="legs' blocks of 4096 bytes"):
        parse("0 1024 mirror core 1 4 2 d0 0 d1 0", devices)


# Legs that fail


class Rig:
    """A mirror on faulty legs, with its events counted."""

    def __init__(self, *, legs=2, log="nosync", start=True, disk=False, **features):
        self.legs = [FaultyDevice(PatternDevice(64 * SECTOR, f"leg{n}")) for n in range(legs)]
        self.log = FaultyDevice(PatternDevice(4 * SECTOR, "log"))
        kept = DiskLog(self.log, REGION, 8, log) if disk else CoreLog(REGION, 8, log)
        self.target = Mirror(kept, [Leg(leg, 0, 64 * SECTOR) for leg in self.legs], **features)
        self.events = []
        self.target.event = lambda: self.events.append(self.target.status())
        if start:
            self.target.resume()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # A test that failed must not hang as well.
        for leg in self.legs:
            leg.release()
        self.target.presuspend()
        self.target.postsuspend()

    @property
    def health(self):
        return self.target.health

    def content(self, leg):
        return self.legs[leg].device.content()


def test_a_read_that_fails_is_answered_by_another_leg():
    with Rig() as rig:
        write(rig.target, 0, b"x" * SECTOR)
        rig.legs[0].fail(forever=True, ops=["read"])
        assert read(rig.target, 0, SECTOR) == b"x" * SECTOR
        assert rig.target.status() == "2 leg0 leg1 8/8 1 RA 1 core"
        assert rig.target.default == 0
        assert rig.events == []


def test_with_handle_errors_another_leg_becomes_the_default_one_and_there_is_an_event():
    with Rig(handle_errors=True) as rig:
        write(rig.target, 0, b"x" * SECTOR)
        rig.legs[0].fail(forever=True, ops=["read"])
        for _ in range(3):
            assert read(rig.target, 0, SECTOR) == b"x" * SECTOR
        assert rig.target.default == 1
        assert rig.events == ["2 leg0 leg1 8/8 1 RA 1 core"]


def test_legs_are_tried_downward_from_the_default_one():
    with Rig(legs=4) as rig:
        write(rig.target, 0, b"x" * SECTOR)
        rig.legs[0].fail(forever=True, ops=["read"])
        read(rig.target, 0, SECTOR)
        assert [leg.calls["read"] for leg in rig.legs] == [1, 0, 0, 1]


@pytest.mark.parametrize("handle_errors", [False, True])
def test_a_read_of_what_is_not_in_sync_is_not_answered_by_another_leg(handle_errors):
    rig = Rig(log="", start=False, handle_errors=handle_errors)
    rig.legs[0].fail(ops=["read"])
    with pytest.raises(OSError) as caught:
        read(rig.target, 0, SECTOR)
    assert caught.value.errno == errno.EIO
    # Better no answer than a wrong one.
    with pytest.raises(OSError):
        read(rig.target, 0, SECTOR)
    assert rig.legs[1].calls["read"] == 0
    assert rig.health == "RA"
    assert rig.target.default == 0


def test_a_write_that_fails_on_a_leg_succeeds_and_its_region_is_not_in_sync():
    with Rig() as rig:
        rig.legs[1].fail(forever=True, ops=["write"])
        write(rig.target, 0, b"x" * SECTOR)
        assert rig.target.status() == "2 leg0 leg1 7/8 1 AD 1 core"
        assert rig.events == []
        # The region lives on the default leg from now on.
        write(rig.target, 0, b"y" * SECTOR)
        assert rig.legs[1].calls["write"] == 1
        assert read(rig.target, 0, SECTOR) == b"y" * SECTOR


def test_a_write_over_regions_puts_all_of_its_regions_out_of_sync():
    with Rig() as rig:
        rig.legs[1].fail(ops=["write"])
        write(rig.target, REGION - 1, b"x" * (REGION + 2))
        assert rig.target.log.sync_count == 5


def test_a_write_that_fails_on_all_legs_fails():
    with Rig() as rig:
        for leg in rig.legs:
            leg.fail(forever=True, error=errno.ENOSPC, ops=["write"])
        with pytest.raises(OSError) as caught:
            write(rig.target, 0, b"x" * SECTOR)
        assert caught.value.errno == errno.ENOSPC
        assert rig.health == "DD"


def test_a_write_that_fails_where_nothing_is_in_sync_fails_with_the_error_of_the_leg():
    rig = Rig(log="", start=False)
    rig.legs[0].fail(error=errno.ENOSPC, ops=["write"])
    with pytest.raises(OSError) as caught:
        write(rig.target, 0, b"x" * SECTOR)
    assert caught.value.errno == errno.ENOSPC
    assert rig.health == "AA"
    assert rig.legs[1].calls["write"] == 0


def test_with_handle_errors_a_failed_write_is_held_until_the_device_is_suspended():
    with Rig(handle_errors=True) as rig:
        rig.legs[1].fail(ops=["write"])
        raised = []

        def run():
            try:
                write(rig.target, 0, b"x" * SECTOR)
            except OSError as error:
                raised.append(error.errno)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: rig.target.log.sync_count == 7, "the failure")
        assert rig.events == ["2 leg0 leg1 8/8 1 AD 1 core"]
        # Reads go on, as do writes elsewhere.
        assert read(rig.target, 0, SECTOR) == b"x" * SECTOR
        write(rig.target, 2 * REGION, b"y" * SECTOR)
        assert thread.is_alive()
        rig.target.presuspend()
        thread.join(10)
        assert raised == [errno.EIO]
        rig.target.resume()


def test_with_keep_log_a_failed_write_succeeds_and_the_default_leg_changes():
    with Rig(handle_errors=True, keep_log=True) as rig:
        rig.legs[0].fail(forever=True, ops=["write"])
        write(rig.target, 0, b"x" * SECTOR)
        assert rig.target.default == 1
        assert rig.events == ["2 leg0 leg1 8/8 1 DA 1 core"]
        assert rig.target.log.sync_count == 7
        write(rig.target, 0, b"y" * SECTOR)
        assert read(rig.target, 0, SECTOR) == b"y" * SECTOR
        assert not rig.content(0)[:SECTOR].tobytes() == b"y" * SECTOR


def test_a_discard_that_fails_fails_no_leg():
    with Rig() as rig:
        rig.legs[1].fail(ops=["discard"])
        with pytest.raises(OSError) as caught:
            rig.target.discard(0, REGION)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert rig.target.status() == "2 leg0 leg1 8/8 1 AA 1 core"


def test_zeroes_that_are_fast_on_the_first_leg_only_are_on_all():
    with Rig() as rig:
        write(rig.target, 0, b"x" * REGION)
        plain = rig.legs[1].write_zeroes

        def slow(offset, length, *, may_unmap=True, fast_only=False):
            if fast_only:
                raise OSError(errno.EOPNOTSUPP, "slow")
            plain(offset, length, may_unmap=may_unmap)

        rig.legs[1].write_zeroes = slow
        rig.target.write_zeroes(0, REGION, fast_only=True)
        assert not rig.content(0)[:REGION].any()
        assert not rig.content(1)[:REGION].any()
        assert rig.health == "AA"


def test_a_flush_that_fails_puts_what_was_written_out_of_sync():
    """Nobody knows what the leg has of it."""
    with Rig() as rig:
        write(rig.target, 0, b"x" * SECTOR)
        write(rig.target, 3 * REGION, b"x" * SECTOR)
        rig.target.flush()
        write(rig.target, 5 * REGION, b"x" * SECTOR)
        rig.legs[1].fail(ops=["flush"])
        rig.target.flush()
        assert rig.target.status() == "2 leg0 leg1 7/8 1 AD 1 core"
        # From now on nothing that is written becomes clean any more.
        write(rig.target, 0, b"y" * SECTOR)
        assert rig.target.log.sync_count == 6


@pytest.mark.parametrize("forever", [False, True])
def test_whatever_call_fails_reads_are_right_and_clean_regions_equal(forever):
    """What a write that was acknowledged has written is read, or nothing is."""
    for fault in every_fault(forever=forever, ops=["read", "write", "flush"]):
        rig = Rig(start=False, disk=True, log="nosync")
        for leg in rig.legs:
            write(leg.device, 0, bytes(64 * SECTOR))
        rig.target.log.load()
        for device in (*rig.legs, rig.log):
            device.fault = fault
        kept = {}
        for n in range(4):
            try:
                write(rig.target, n * REGION, bytes([65 + n]) * REGION)
                kept[n] = bytes([65 + n]) * REGION
                if n % 2:
                    rig.target.flush()
            except OSError as error:
                assert error.errno == errno.EIO
        for n, expected in kept.items():
            try:
                assert read(rig.target, n * REGION, REGION) == expected
            except OSError as error:
                # As in the kernel: the default leg missed a write, and there is no other one
                # that the log vouches for.
                assert error.errno == errno.EIO
                assert rig.health != "AA"
        rig.target.presuspend()
        rig.target.postsuspend()
        a, b = rig.content(0), rig.content(1)
        for region in regions(rig.log.device)[1]:
            # Where the log could not be written it still says what it said before.
            if "disk log A" in rig.target.status():
                piece = slice(region * REGION, (region + 1) * REGION)
                assert (a[piece] == b[piece]).all(), f"{fault}: region {region}"


# Copying


def test_everything_is_copied_from_the_first_leg_when_the_log_is_new():
    with Rig(log="") as rig:
        assert rig.content(0).tobytes() != b""
        wait_until(lambda: synced(rig.target), "the copy")
        assert (rig.content(0) == rig.content(1)).all()
        wait_until(lambda: rig.events, "the event")
        assert rig.events == ["2 leg0 leg1 8/8 1 AA 1 core"]


def test_nosync_copies_nothing():
    with Rig(log="nosync") as rig:
        assert synced(rig.target)
        assert rig.legs[0].calls["read"] == 0
        assert rig.events == []


def test_the_last_region_may_be_short():
    devices = devices_of((30, 30))
    devices["d1"].write_zeroes(0, 30 * SECTOR)
    target = parse("0 27 mirror core 1 8 2 d0 1 d1 2", devices)
    target.resume()
    wait_until(lambda: synced(target), "the copy")
    target.presuspend()
    assert target.status() == "2 d0 d1 4/4 1 AA 1 core"
    expected = devices["d0"].content()[SECTOR : 28 * SECTOR]
    assert (devices["d1"].content()[2 * SECTOR : 29 * SECTOR] == expected).all()
    assert not devices["d1"].content()[29 * SECTOR : 30 * SECTOR].any()


def test_a_region_that_is_being_copied_keeps_writers_out():
    rig = Rig(log="", start=False)
    rig.legs[1].hang(["write"], [(0, REGION)])
    with rig:
        rig.target.resume()
        rig.legs[1].wait_hanging()
        thread = threading.Thread(target=lambda: write(rig.target, 0, b"x" * SECTOR))
        thread.start()
        # Others go on: to the default leg.
        write(rig.target, 4 * REGION, b"y" * SECTOR)
        assert read(rig.target, 4 * REGION, SECTOR) == b"y" * SECTOR
        assert thread.is_alive()
        rig.legs[1].release()
        thread.join(10)
        assert not thread.is_alive()
        wait_until(lambda: synced(rig.target), "the copy")
        assert rig.content(0)[:SECTOR].tobytes() == b"x" * SECTOR
        assert (rig.content(0) == rig.content(1)).all()


def test_a_copy_waits_for_the_writes_to_its_region():
    rig = Rig(log="", start=False)
    rig.legs[0].hang(["write"], [(0, REGION)])
    thread = threading.Thread(target=lambda: write(rig.target, 0, b"x" * SECTOR))
    thread.start()
    rig.legs[0].wait_hanging()
    with rig:
        rig.target.resume()
        wait_until(lambda: rig.target._recovering == 0, "the turn of the region")
        time.sleep(0.01)
        assert rig.legs[0].calls["read"] == 0
        rig.legs[0].release()
        thread.join(10)
        wait_until(lambda: synced(rig.target), "the copy")
    assert rig.content(1)[:SECTOR].tobytes() == b"x" * SECTOR


def test_a_suspend_ends_a_copy_that_waits_for_a_write():
    rig = Rig(log="", start=False)
    rig.legs[0].hang(["write"], [(0, REGION)])
    thread = threading.Thread(target=lambda: write(rig.target, 0, b"x" * SECTOR))
    thread.start()
    rig.legs[0].wait_hanging()
    rig.target.resume()
    wait_until(lambda: rig.target._recovering == 0, "the turn of the region")
    rig.target.presuspend()
    assert not synced(rig.target)
    rig.legs[0].release()
    thread.join(10)
    assert not thread.is_alive()


def test_a_suspend_ends_the_copy_and_resume_goes_on():
    rig = Rig(log="", start=False)
    for leg in rig.legs:
        leg.delay = 0.003
    rig.target.resume()
    wait_until(lambda: rig.target.log.sync_count > 1, "some of the copy")
    rig.target.presuspend()
    rig.target.postsuspend()
    count = rig.target.log.sync_count
    calls = rig.legs[0].calls["read"]
    assert count < 8
    rig.target.resume()
    with rig:
        wait_until(lambda: synced(rig.target), "the rest")
        assert rig.legs[0].calls["read"] - calls == 8 - count


def test_a_copy_that_fails_on_the_leg_it_goes_to_is_told():
    with Rig(log="", start=False, handle_errors=True) as rig:
        rig.legs[1].fail(forever=True, ops=["write"])
        rig.target.resume()
        wait_until(lambda: rig.legs[1].calls["write"] == 8, "the attempt")
        wait_until(lambda: rig.events, "the event")
        assert rig.events == ["2 leg0 leg1 0/8 1 AS 1 core"]


def test_a_copy_that_cannot_be_read_writes_nothing():
    with Rig(log="", start=False) as rig:
        rig.legs[0].fail(forever=True, ops=["read"])
        before = rig.content(1)
        rig.target.resume()
        wait_until(lambda: rig.legs[0].calls["read"] == 8, "the attempt")
        assert rig.health == "SA"
        assert rig.target.log.sync_count == 0
        assert (rig.content(1) == before).all()


def test_failures_are_forgotten_once_all_is_in_sync():
    """reset_ms_flags()."""
    with Rig(log="", start=False) as rig:
        rig.legs[1].fail(ops=["write"])
        rig.target.resume()
        wait_until(lambda: rig.target._next == 8, "one pass")
        wait_until(lambda: rig.target.log.sync_count == 7, "the others")
        assert rig.health == "AS"
        rig.target.presuspend()
        rig.target.resume()
        wait_until(lambda: synced(rig.target), "the last region")
        wait_until(lambda: rig.health == "AA", "the reset")


def test_writes_during_a_copy_leave_legs_equal():
    rig = Rig(log="", start=False, legs=3)
    model = rig.content(0).copy()
    with rig:
        rig.target.resume()
        rng = np.random.default_rng(7)
        for step in range(300):
            offset = int(rng.integers(0, 60)) * SECTOR
            length = int(rng.integers(1, 64 - offset // SECTOR + 1)) * SECTOR
            data = pattern(offset, length, step)
            model[offset : offset + length] = data
            write(rig.target, offset, data)
        wait_until(lambda: synced(rig.target), "the copy")
        for leg in range(3):
            expect_equal(memoryview(rig.content(leg)), model, 0, f"leg{leg}")


def test_writers_readers_and_the_background_do_not_disturb_each_other(monkeypatch):
    """Four writers, each with a share that cuts regions, while everything is copied and cleaned."""
    monkeypatch.setattr(mirror, "_IDLE", 0.0)
    rig = Rig(log="sync", start=False, disk=True, legs=3)
    model = rig.content(0).copy()
    share = 15 * SECTOR
    with rig:
        rig.target.resume()

        def work(number):
            rng = np.random.default_rng(number)
            for step in range(150):
                begin = number * share + int(rng.integers(0, 15)) * SECTOR
                length = int(rng.integers(1, ((number + 1) * share - begin) // SECTOR + 1)) * SECTOR
                piece = slice(begin, begin + length)
                if step % 3:
                    model[piece] = pattern(begin, length, number * 1000 + step)
                    write(rig.target, begin, model[piece].copy())
                else:
                    expect_equal(memoryview(read(rig.target, begin, length)), model[piece], 0)
                if step % 50 == 0:
                    rig.target.flush()

        run_threads(work)
        wait_until(lambda: synced(rig.target), "the copy")
    for leg in range(3):
        expect_equal(memoryview(rig.content(leg)), model, 0, f"leg{leg}")
    assert regions(rig.log.device)[1] == set(range(8))


def test_a_mirror_that_may_only_be_read_changes_nothing(tmp_path):
    for n, name in enumerate(("a", "b", "log")):
        (tmp_path / name).write_bytes(bytes([n]) * 64 * SECTOR)
    before = [(tmp_path / name).read_bytes() for name in ("a", "b", "log")]
    with Mapper() as dm:
        table = f"0 64 mirror disk 2 {tmp_path}/log 8 2 {tmp_path}/a 0 {tmp_path}/b 0"
        device = dm.create("m", table, readonly=True)
        assert read(device, 0, SECTOR) == bytes(SECTOR)
        assert device.status_text().endswith(" 0/8 1 AA 3 disk " + f"{tmp_path}/log A")
        assert device.live.lines[0].target._job is None
    assert [(tmp_path / name).read_bytes() for name in ("a", "b", "log")] == before


# The log on disk


def regions(device, count=8):
    """Return the header of a log and the regions that it calls clean; no code of dmpy used."""
    raw = device.content().tobytes()
    bits = np.unpackbits(np.frombuffer(raw[1024:], np.uint8), bitorder="little")
    return struct.unpack_from("<4sIQ", raw), {n for n in range(count) if bits[n]}


def test_a_region_is_marked_durably_before_it_is_written_to():
    power = Power()
    legs = [power.device(64 * SECTOR, f"leg{n}") for n in range(2)]
    log = power.device(4 * SECTOR, "log")
    seen = []
    plain = legs[0].pwritev

    def spy(buffers, offset, *, fua=False):
        seen.append((regions(log)[1], log.calls["flush"] - flushes))
        plain(buffers, offset, fua=fua)

    legs[0].pwritev = spy
    target = Mirror(DiskLog(log, REGION, 8, "nosync"), [Leg(leg, 0, leg.size) for leg in legs])
    target.log.load()
    assert regions(log) == ((b"rRiM", 2, 8), set(range(8)))
    flushes = log.calls["flush"]
    write(target, 2 * REGION, b"x" * (REGION + 1))
    assert seen == [(set(range(8)) - {2, 3}, 1)]
    # It stays marked while it is written to: no more flushes of the log.
    write(target, 2 * REGION, b"y" * SECTOR)
    assert seen[1] == seen[0]


def test_regions_are_called_clean_after_a_flush_of_the_legs():
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
        assert 2 not in regions(rig.log.device)[1]
        before = rig.legs[1].calls["flush"]
        rig.target._clean_regions(time.monotonic())
        assert rig.legs[1].calls["flush"] == before + 1
        assert regions(rig.log.device)[1] == set(range(8))


def test_a_region_that_is_written_to_during_that_flush_is_not_called_clean():
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
        write(rig.target, 5 * REGION, b"x" * SECTOR)
        plain = rig.legs[0].device.flush
        rig.legs[0].device.flush = lambda: (plain(), write(rig.target, 2 * REGION, b"y" * SECTOR))
        rig.target._clean_regions(time.monotonic())
        assert regions(rig.log.device)[1] == set(range(8)) - {2}
        rig.legs[0].device.flush = plain


def test_a_region_that_is_being_written_to_is_not_called_clean():
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
        rig.legs[1].hang(["write"])
        thread = threading.Thread(target=lambda: write(rig.target, 2 * REGION, b"y" * SECTOR))
        thread.start()
        rig.legs[1].wait_hanging()
        rig.target._clean_regions(time.monotonic())
        assert 2 not in regions(rig.log.device)[1]
        rig.legs[1].release()
        thread.join(10)


def test_once_a_flush_has_failed_no_region_is_called_clean():
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
        rig.legs[1].fail(ops=["flush"])
        rig.target.flush()
        rig.target._clean_regions(time.monotonic())
        assert rig.target.status() == "2 leg0 leg1 7/8 1 AD 3 disk log A"
    assert 2 not in regions(rig.log.device)[1]


def test_a_suspended_mirror_leaves_a_clean_log():
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
    assert regions(rig.log.device)[1] == set(range(8))


def test_a_region_that_is_not_in_sync_stays_marked():
    with Rig(disk=True) as rig:
        rig.legs[1].fail(ops=["write"])
        write(rig.target, 2 * REGION, b"x" * SECTOR)
    assert regions(rig.log.device)[1] == set(range(8)) - {2}


def test_a_flush_of_the_legs_that_fails_leaves_every_region_marked():
    """disk_flush() with a flush_callback_fn that fails; the leg is F."""
    with Rig(disk=True) as rig:
        write(rig.target, 2 * REGION, b"x" * SECTOR)
        rig.legs[1].fail(ops=["flush"])
        rig.target._clean_regions(time.monotonic())
        assert rig.target.status() == "2 leg0 leg1 8/8 1 AF 3 disk log A"
    assert regions(rig.log.device)[1] == set()


def make_log(device, clean, count, *, magic=b"rRiM", version=2):
    raw = bytearray(device.size)
    raw[:16] = struct.pack("<4sIQ", magic, version, count)
    for region in clean:
        raw[1024 + region // 8] |= 1 << region % 8
    device.pwritev([memoryview(raw)], 0)


def opened(clean, count, *, sync="", **header):
    """A mirror that is not resumed but has read such a log."""
    rig = Rig(disk=True, log=sync, start=False)
    make_log(rig.log.device, clean, count, **header)
    rig.target.log.load()
    log = rig.target.log
    return rig, {region for region in range(8) if log.in_sync(region)}


def test_regions_that_are_not_clean_in_the_log_are_not_in_sync():
    rig, in_sync = opened({0, 1, 5}, 8)
    assert in_sync == {0, 1, 5}
    assert rig.target.status() == "2 leg0 leg1 3/8 1 AA 3 disk log A"


def test_regions_that_a_log_does_not_know_are_not_in_sync():
    _, in_sync = opened(range(8), 5)
    assert in_sync == {0, 1, 2, 3, 4}


def test_a_log_of_more_regions_is_cut():
    rig, in_sync = opened(range(20), 20)
    assert in_sync == set(range(8))
    assert rig.target.log.sync_count == 8
    assert regions(rig.log.device, 64) == ((b"rRiM", 2, 8), set(range(8)))


@pytest.mark.parametrize("sync, expected", [("sync", set()), ("nosync", set(range(8)))])
def test_sync_and_nosync_do_not_look_at_the_log(sync, expected):
    _, in_sync = opened({0, 1}, 8, sync=sync)
    assert in_sync == expected


def test_a_device_without_a_log_gets_one_and_nothing_is_in_sync():
    rig, in_sync = opened(range(8), 8, magic=b"junk")
    assert in_sync == set()
    assert regions(rig.log.device) == ((b"rRiM", 2, 8), set())


def test_a_log_of_version_1_is_read_and_becomes_one_of_version_2():
    rig, in_sync = opened({3}, 8, version=1)
    assert in_sync == {3}
    assert regions(rig.log.device)[0] == (b"rRiM", 2, 8)


def test_a_log_of_another_version_has_failed_and_is_not_overwritten():
    rig, in_sync = opened({3}, 8, version=3)
    assert in_sync == set()
    assert rig.target.status() == "2 leg0 leg1 0/8 1 AA 3 disk log D"
    assert regions(rig.log.device) == ((b"rRiM", 3, 8), {3})


def test_a_log_that_cannot_be_read_has_failed_and_nothing_is_in_sync():
    rig = Rig(disk=True, log="", start=False)
    make_log(rig.log.device, range(8), 8)
    rig.log.fail(ops=["read"])
    rig.target.log.load()
    assert rig.target.status() == "2 leg0 leg1 0/8 1 AA 3 disk log D"
    assert len(rig.events) == 1


@pytest.mark.parametrize("op, letter", [("write", "D"), ("flush", "F")])
def test_a_log_that_fails_is_told_once_and_writes_go_on(op, letter):
    with Rig(disk=True) as rig:
        rig.log.fail(forever=True, ops=[op])
        write(rig.target, 0, b"x" * SECTOR)
        write(rig.target, 3 * REGION, b"x" * SECTOR)
        assert rig.target.status() == f"2 leg0 leg1 8/8 1 AA 3 disk log {letter}"
        assert len(rig.events) == 1


def test_with_keep_log_a_write_without_a_log_fails():
    with Rig(disk=True, handle_errors=True, keep_log=True) as rig:
        rig.log.fail(forever=True, ops=["write"])
        with pytest.raises(OSError) as caught:
            write(rig.target, 0, b"x" * SECTOR)
        assert caught.value.errno == errno.EIO
        assert rig.legs[0].calls["write"] == 0


@pytest.mark.parametrize("op", ["write", "flush"])
def test_a_log_that_failed_for_a_moment_is_written_by_the_next_write(op):
    with Rig(disk=True) as rig:
        rig.log.fail(ops=[op])
        write(rig.target, 0, b"x" * SECTOR)
        flushes = rig.log.device.calls["flush"]
        write(rig.target, 0, b"x" * SECTOR)
        assert regions(rig.log.device)[1] == set(range(8)) - {0}
        assert rig.log.device.calls["flush"] == flushes + 1


def test_an_opened_log_has_only_its_dirty_regions_copied():
    rig, _ = opened({0, 1, 2, 3, 4, 6}, 8)
    with rig:
        rig.target.resume()
        wait_until(lambda: synced(rig.target), "the copy")
        assert rig.legs[0].calls["read"] == 2
        a, b = rig.content(0), rig.content(1)
        assert {n for n in range(8) if (a == b)[n * REGION : (n + 1) * REGION].all()} >= {5, 7}
    assert regions(rig.log.device)[1] == set(range(8))


def test_a_log_of_many_regions_finds_what_is_not_in_sync():
    log = CoreLog(REGION, 1_000_003, "nosync")
    for region in (0, 7, 8, 524_289, 1_000_002):
        log.set_sync(region, False)
    found, region = [], 0
    while (region := log.next_out_of_sync(region)) < log.count:
        found.append(region)
        region += 1
    assert found == [0, 7, 8, 524_289, 1_000_002]
    assert log.sync_count == 1_000_003 - 5


# Power cuts


def test_a_power_cut_leaves_only_marked_regions_different_and_loses_nothing():
    power = Power()
    sectors = 64
    first = pattern(0, sectors * SECTOR, 1)
    legs = [power.device(sectors * SECTOR, f"leg{n}", image=first) for n in range(2)]
    log = power.device(4 * SECTOR, "log")
    make_log(log, range(8), 8)
    log.flush()

    def build(legs, log):
        return Mirror(DiskLog(log, REGION, 8), [Leg(leg, 0, leg.size) for leg in legs])

    target = build(legs, log)
    target.log.load()
    begun = power.position
    # What must be there, by position: what was flushed last; and what may be there.
    history = [(power.position, first.copy())]
    model = first.copy()
    rng = np.random.default_rng(5)
    writes = []
    for step in range(24):
        offset = int(rng.integers(0, sectors - 1)) * SECTOR
        length = int(rng.integers(1, min(12, sectors - offset // SECTOR) + 1)) * SECTOR
        data = pattern(offset, length, 100 + step)
        writes.append((power.position, offset, length))
        write(target, offset, data)
        model[offset : offset + length] = data
        if step % 4 == 3:
            target.flush()
            history.append((power.position, model.copy()))
        if step % 6 == 5:
            target._clean_regions(time.monotonic())
    for crash in power.every_crash(seed=3, limit=6):
        if crash.position >= begun:
            check_crash(crash, build, history, writes)


def check_crash(crash, build, history, writes):
    """Every region that differs is marked; what was flushed is read, also after the copy."""
    legs, log = crash.devices[:2], crash.devices[2]
    a, b = (leg.content() for leg in legs)
    _, clean = regions(log)
    for region in clean:
        piece = slice(region * REGION, (region + 1) * REGION)
        assert (a[piece] == b[piece]).all(), f"{crash!r}: region {region} is clean and differs"
    position, flushed = [past for past in history if past[0] <= crash.position][-1]
    certain = np.ones(len(flushed), bool)
    # A write that is under way may have begun before its first event.
    for n, (when, offset, length) in enumerate(writes):
        ended = writes[n + 1][0] if n + 1 < len(writes) else 1 << 60
        if ended > position and when <= crash.position:
            certain[offset : offset + length] = False
    target = build(legs, log)
    target.resume()
    try:
        found = np.frombuffer(read(target, 0, len(flushed)), np.uint8)
        assert (found == flushed)[certain].all(), repr(crash)
        wait_until(lambda: synced(target), "the copy")
        assert legs[0].calls["read"] <= 1 + 8 - len(clean)
        assert (legs[0].content() == legs[1].content()).all(), repr(crash)
        assert (np.frombuffer(read(target, 0, len(flushed)), np.uint8) == found).all()
    finally:
        target.presuspend()


# Held writes and the next table


class Words:
    """Leaves that are devices of ours, by word."""

    def __init__(self, devices):
        self.devices = devices

    def open(self, word, *, readonly, cwd):
        return self.devices[word]

    def release(self, device):
        pass

    def close(self):
        pass


def held_write(device, act):
    """Start a request that the mirror holds back; returns its thread and what it raised."""
    raised = []

    def run():
        try:
            act(device)
        except OSError as error:
            raised.append(error.errno)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


REQUESTS = {
    "write": lambda device: write(device, 3 * SECTOR, b"x" * SECTOR),
    "long write": lambda device: write(device, 60 * SECTOR, b"x" * 8 * SECTOR),
    "zeroes": lambda device: device.write_zeroes(3 * SECTOR, SECTOR),
    "flush": lambda device: device.flush(),
}


ABOVE = {
    "m": "",
    "window": "0 100 linear m 0",
    "striped": "0 128 striped 2 64 m 0 m 64",
    "mirrored": "0 64 mirror core 2 64 nosync 2 m 0 m 64 2 handle_errors keep_log",
}


class Held:
    """A device on a mirror that holds back a request, since one of its legs fails."""

    def __init__(self, top, request):
        self.legs = {name: FaultyDevice(PatternDevice(64 * SECTOR, name)) for name in "abc"}
        self.dm = dm = Mapper(leaves=Words(self.legs))
        kept = "mirror core 2 8 nosync 2 a 0 b 0 1 handle_errors"
        dm.create("m", f"0 64 {kept}\n64 64 linear c 0")
        if ABOVE[top]:
            dm.create(top, ABOVE[top])
        self.legs["b"].fail(forever=True, ops=["write", "zero", "flush"])
        self.thread, self.raised = held_write(dm.device(top), REQUESTS[request])
        wait_until(lambda: dm.device("m").event_nr, "the event")
        assert self.thread.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.legs["b"].heal()
        self.dm.close()


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("top", ABOVE)
def test_what_is_held_back_is_done_by_the_next_table_after_a_suspend_without_flush(
    request_name, top
):
    if (request_name, top) == ("long write", "mirrored"):
        pytest.skip("that device is shorter")
    with Held(top, request_name) as held:
        dm = held.dm
        dm.suspend("m", noflush=True)
        assert held.thread.is_alive()
        dm.load("m", "0 64 linear a 0\n64 64 linear c 0")
        dm.resume("m")
        held.thread.join(10)
        assert not held.thread.is_alive()
        assert held.raised == []
        if "write" in request_name:
            offset = 3 if request_name == "write" else 60
            assert read(dm.device("m"), offset * SECTOR, SECTOR) == b"x" * SECTOR
        assert dm.device(top).stats.errors == 0
        if top == "mirrored":
            assert " 1/1 1 AA " in dm.device(top).status_text()


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("top", ["m", "window"])
@pytest.mark.parametrize("end", ["suspend", "close"])
def test_what_is_held_back_fails_in_any_other_end(request_name, top, end):
    with Held(top, request_name) as held:
        if end == "suspend":
            held.dm.suspend("m")
        else:
            held.legs["b"].heal()
            held.dm.close()
        held.thread.join(10)
        assert not held.thread.is_alive()
        assert held.raised == [errno.EIO]
