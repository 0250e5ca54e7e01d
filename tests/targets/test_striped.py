"""striped: chunks dealt out in turn, compared with a model that places one sector at a time."""

import errno

import pytest

from dmpy.device import BlockSize
from dmpy.errors import TableError
from dmpy.table import Table
from dmpy.target import Leg, find_target
from dmpy.targets.striped import Striped
from dmpy.testing import Fault, FaultyDevice, PatternDevice
from dmpy.testing.conformance import TargetTests

SECTOR = 512


def parse(text, *, sizes=(2048, 2048), opener=None):
    devices = {f"d{n}": PatternDevice(size * SECTOR, f"d{n}") for n, size in enumerate(sizes)}
    return Table.parse(text, opener or devices.__getitem__).lines[0].target


class StripedTests(TargetTests):
    """What all shapes share: `starts`, `chunk` and `leg_sectors` are sectors."""

    starts = (0,)
    chunk = 8
    leg_sectors = 64

    def build(self, devices):
        legs = [
            Leg(device, start * SECTOR, self.leg_sectors * SECTOR)
            for device, start in zip(devices, self.starts)
        ]
        return Striped(self.chunk * SECTOR, legs)

    def oracle(self, sector):
        legs = len(self.starts)
        chunk, within = sector // self.chunk, sector % self.chunk
        leg = chunk % legs
        return leg, self.starts[leg] + chunk // legs * self.chunk + within


class TestThreeLegs(StripedTests):
    leg_sizes = (100 * SECTOR, 80 * SECTOR, 99 * SECTOR)
    starts = (10, 0, 35)
    status_text = "3 leg0 leg1 leg2 1 AAA"

    def test_its_table_names_legs_and_starts(self):
        assert self.target.table() == "3 8 leg0 10 leg1 0 leg2 35"

    def test_a_request_over_many_chunks_is_one_call_a_leg(self):
        self.read(0, self.target.size)
        assert [len(device.log) for device in self.devices] == [1, 1, 1]
        self.write(self.expected(), 0)
        assert [len(device.log) for device in self.devices] == [2, 2, 2]

    def test_a_discard_over_many_chunks_is_one_call_a_leg(self):
        self.target.discard(0, self.target.size)
        assert [len(device.log) for device in self.devices] == [1, 1, 1]

    def test_a_leg_that_failed_is_dead_in_the_status(self):
        devices = [self.devices[0], FaultyDevice(self.devices[1], Fault(1)), self.devices[2]]
        target = self.build(devices)
        with pytest.raises(OSError):
            target.preadv([memoryview(bytearray(target.size))], 0)
        assert target.status() == "3 leg0 leg1 leg2 1 ADA"

    def test_a_leg_that_failed_a_small_request_is_dead_in_the_status(self):
        devices = [self.devices[0], self.devices[1], FaultyDevice(self.devices[2], Fault(1))]
        target = self.build(devices)
        with pytest.raises(OSError):
            target.pwritev([memoryview(bytes(SECTOR))], 16 * SECTOR)
        assert target.status() == "3 leg0 leg1 leg2 1 AAD"

    @pytest.mark.parametrize("op", ["write", "flush", "discard", "zero"])
    def test_any_operation_that_fails_on_a_leg_kills_it_in_the_status(self, op):
        """stripe_end_io() sees all of them."""
        devices = list(self.devices)
        devices[1] = FaultyDevice(devices[1], Fault(1, ops=[op]))
        target = self.build(devices)
        calls = {
            "write": lambda: target.pwritev([memoryview(bytes(target.size))], 0),
            "flush": target.flush,
            "discard": lambda: target.discard(0, target.size),
            "zero": lambda: target.write_zeroes(0, target.size),
        }
        with pytest.raises(OSError):
            calls[op]()
        assert target.status() == "3 leg0 leg1 leg2 1 ADA"

    @pytest.mark.parametrize("op", ["read", "discard", "zero"])
    def test_an_operation_that_is_not_supported_kills_no_leg(self, op):
        fault = Fault(1, error=errno.EOPNOTSUPP, forever=True)
        target = self.build([FaultyDevice(device, fault) for device in self.devices])
        calls = {
            "read": lambda: target.preadv([memoryview(bytearray(SECTOR))], 0),
            "discard": lambda: target.discard(0, SECTOR),
            "zero": lambda: target.write_zeroes(0, SECTOR, fast_only=True),
        }
        with pytest.raises(OSError):
            calls[op]()
        assert target.status() == "3 leg0 leg1 leg2 1 AAA"

    def test_only_the_first_14_errors_are_events(self):
        """DM_IO_ERROR_THRESHOLD is 15, and the event is for counts below it."""
        target = self.build([FaultyDevice(d, Fault(1, forever=True)) for d in self.devices])
        events = []
        target.event = lambda: events.append(1)
        for _ in range(30):
            with pytest.raises(OSError):
                target.preadv([memoryview(bytearray(SECTOR))], 0)
        assert len(events) == 14


class TestOneLeg(StripedTests):
    leg_sizes = (70 * SECTOR,)
    starts = (3,)
    status_text = "1 leg0 1 A"


class TestTwoLegsPowerOfTwo(StripedTests):
    leg_sizes = (64 * SECTOR,) * 2
    starts = (0, 0)
    chunk = 16


class TestChunkOfOneSector(StripedTests):
    leg_sizes = (40 * SECTOR,) * 5
    starts = (0, 1, 2, 3, 4)
    chunk = 1
    leg_sectors = 30


class TestChunkThatIsNoPowerOfTwo(StripedTests):
    leg_sizes = (40 * SECTOR,) * 2
    starts = (1, 2)
    chunk = 3
    leg_sectors = 33


class TestChunkAsLongAsALeg(StripedTests):
    leg_sizes = (64 * SECTOR,) * 3
    starts = (0, 0, 0)
    chunk = 64


class TestTwoLegsOnOneDevice(TargetTests):
    """The kernel lets legs share a device; a flush goes there once."""

    leg_sizes = (100 * SECTOR,)
    status_text = "2 leg0 leg0 1 AA"

    def build(self, devices):
        legs = [Leg(devices[0], start * SECTOR, 40 * SECTOR) for start in (0, 50)]
        return Striped(8 * SECTOR, legs)

    def oracle(self, sector):
        chunk, within = sector // 8, sector % 8
        return 0, (chunk % 2) * 50 + chunk // 2 * 8 + within

    def test_an_error_kills_all_legs_on_the_device(self):
        """stripe_end_io() counts the error for every stripe on the device that failed."""
        target = self.build([FaultyDevice(self.devices[0], Fault(1))])
        with pytest.raises(OSError):
            target.preadv([memoryview(bytearray(SECTOR))], 0)
        assert target.status() == "2 leg0 leg0 1 DD"


def test_its_word_finds_it():
    assert find_target("striped") is Striped


def test_version_is_the_kernels():
    assert Striped.version == (1, 6, 0)


def test_a_row_that_fills_the_length_is_accepted():
    assert parse("0 24 striped 2 3 d0 0 d1 0").size == 24 * SECTOR


@pytest.mark.parametrize("length, why", [(25, "number of legs"), (26, "chunk size")])
def test_a_length_that_is_no_whole_number_of_rows_is_refused(length, why):
    with pytest.raises(TableError, match=why):
        parse(f"0 {length} striped 2 3 d0 0 d1 0")


@pytest.mark.parametrize("chunk", ["3", "03", "+3", "12", "1"])
def test_chunk_sizes_that_the_kernel_takes_are_accepted(chunk):
    target = parse(f"0 24 striped 2 {chunk} d0 0 d1 0")
    assert target.chunk_size == int(chunk) * SECTOR
    assert target.table() == f"2 {int(chunk)} d0 0 d1 0"


@pytest.mark.parametrize("chunk", ["0", "-3", "0x3", "3x", "", "4294967299", "4294967296", "1e3"])
def test_chunk_sizes_that_the_kernel_refuses_are_refused(chunk):
    with pytest.raises(TableError):
        parse(f"0 24 striped 2 {chunk} d0 0 d1 0")


def test_the_largest_chunk_size_is_accepted():
    devices = {"big": PatternDevice(1 << 60, "big")}
    length = (1 << 32) - 1
    target = parse(f"0 {length} striped 1 {length} big 0", opener=devices.__getitem__)
    assert target.chunk_size == length * SECTOR
    data = bytearray(SECTOR)
    target.preadv([memoryview(data)], target.size - SECTOR)


def test_a_chunk_size_above_the_limit_is_refused():
    devices = {"big": PatternDevice(1 << 60, "big")}
    length = 1 << 32
    with pytest.raises(TableError, match="at most 4294967295"):
        parse(f"0 {length} striped 1 {length} big 0", opener=devices.__getitem__)


@pytest.mark.parametrize("count", ["2", "+2", "02"])
def test_numbers_of_legs_that_the_kernel_takes_are_accepted(count):
    assert parse(f"0 24 striped {count} 3 d0 0 d1 0").table() == "2 3 d0 0 d1 0"


@pytest.mark.parametrize("count", ["0", "-2", "2x", "4294967298", "x"])
def test_numbers_of_legs_that_the_kernel_refuses_are_refused(count):
    with pytest.raises(TableError):
        parse(f"0 24 striped {count} 3 d0 0 d1 0")


@pytest.mark.parametrize("legs", ["", "d0", "d0 0", "d0 0 d1", "d0 0 d1 0 7", "d0 0 d1 0 d0 0"])
def test_any_but_two_arguments_a_leg_are_refused(legs):
    with pytest.raises(TableError, match="line 1, striped: "):
        parse(f"0 24 striped 2 3 {legs}")


@pytest.mark.parametrize("text", ["0 24 striped", "0 24 striped 2"])
def test_missing_arguments_are_refused(text):
    with pytest.raises(TableError, match="line 1, striped: .*missing"):
        parse(text)


def test_a_huge_number_of_legs_is_refused_at_once():
    with pytest.raises(TableError):
        parse("0 4294967295 striped 4294967295 1 d0 0")


def test_legs_that_fit_to_the_last_sector_are_accepted():
    assert parse("0 4096 striped 2 8 d0 0 d1 0").size == 4096 * SECTOR


def test_a_leg_that_is_too_short_is_refused_and_named():
    with pytest.raises(TableError) as caught:
        parse("0 4096 striped 2 8 d0 0 d1 8")
    assert str(caught.value) == (
        "line 1, striped: leg d1 has 2048 sectors, the line needs 2048 from sector 8"
    )


@pytest.mark.parametrize("start", ["-1", "+1", "0x10", "1x"])
def test_starts_that_the_kernel_refuses_are_refused(start):
    with pytest.raises(TableError, match="must be a number"):
        parse(f"0 24 striped 2 3 d0 0 d1 {start}")


def test_a_chunk_smaller_than_a_block_of_a_leg_is_refused():
    devices = {
        f"d{n}": PatternDevice(1 << 20, f"d{n}", block_size=BlockSize(4096)) for n in range(2)
    }
    with pytest.raises(TableError, match="4096|8 sectors"):
        parse("0 48 striped 2 3 d0 0 d1 0", opener=devices.__getitem__)
