"""unstriped: one leg picked out of a striped device."""

import pytest

from dmpy.errors import TableError
from dmpy.table import Table
from dmpy.target import Leg, find_target
from dmpy.targets.striped import Striped
from dmpy.targets.unstriped import Unstriped
from dmpy.testing import PatternDevice, expect_equal
from dmpy.testing.conformance import TargetTests

SECTOR = 512


def parse(text, sectors=2048):
    devices = {"disk": PatternDevice(sectors * SECTOR, "disk")}
    return Table.parse(text, devices.__getitem__).lines[0].target


class UnstripedTests(TargetTests):
    """What all shapes share; all numbers are sectors or counts."""

    chunk = 8
    stripes = 3
    stripe = 1
    start = 20
    chunks = 6

    def build(self, devices):
        length = self.chunks * self.chunk * SECTOR
        device = devices[0]
        leg = Leg(device, self.start * SECTOR, device.size - self.start * SECTOR)
        return Unstriped(length, self.stripes, self.chunk * SECTOR, self.stripe, leg)

    def oracle(self, sector):
        chunk, within = sector // self.chunk, sector % self.chunk
        return 0, self.start + (chunk * self.stripes + self.stripe) * self.chunk + within

    def test_its_table_parses_to_an_equal_target(self):
        """By its table: the leg of a parsed one ends with the last chunk that is used."""
        opener = {device.name: device for device in self.devices}.__getitem__
        sectors = self.target.size // SECTOR
        (line,) = Table.parse(f"0 {sectors} unstriped {self.target.table()}", opener).lines
        assert line.target.table() == self.target.table()
        (again,) = Table.parse(f"0 {sectors} unstriped {line.target.table()}", opener).lines
        assert again.target == line.target


class TestMiddleOfThree(UnstripedTests):
    leg_sizes = (200 * SECTOR,)
    status_text = ""

    def test_its_table_is_stripes_chunk_stripe_device_start(self):
        assert self.target.table() == "3 8 1 leg0 20"


class TestFirstOfTwo(UnstripedTests):
    leg_sizes = (200 * SECTOR,)
    stripes = 2
    stripe = 0
    start = 0


class TestLastOfFiveWithOddChunks(UnstripedTests):
    leg_sizes = (250 * SECTOR,)
    stripes = 5
    stripe = 4
    chunk = 3


class TestOneOfOne(UnstripedTests):
    leg_sizes = (100 * SECTOR,)
    stripes = 1
    stripe = 0


class TestChunkOfOneSector(UnstripedTests):
    leg_sizes = (100 * SECTOR,)
    chunk = 1
    chunks = 20


def test_its_word_finds_it():
    assert find_target("unstriped") is Unstriped


def test_it_undoes_striped():
    legs = [PatternDevice(64 * SECTOR, f"leg{n}", salt=n) for n in range(3)]
    whole = Striped(4 * SECTOR, [Leg(leg, 0, leg.size) for leg in legs])
    whole.name = "whole"
    for number, leg in enumerate(legs):
        table = Table.parse(f"0 64 unstriped 3 4 {number} whole 0", {"whole": whole}.__getitem__)
        data = bytearray(64 * SECTOR)
        table.lines[0].target.preadv([memoryview(data)], 0)
        expect_equal(memoryview(data), leg.content(), 0, leg.name)


@pytest.mark.parametrize("stripe", [0, 1])
def test_each_stripe_is_accepted(stripe):
    assert parse(f"0 24 unstriped 2 8 {stripe} disk 0").stripe == stripe


def test_the_number_of_stripes_itself_is_accepted_as_in_the_kernel():
    assert parse("0 24 unstriped 2 8 2 disk 0").stripe == 2


def test_a_stripe_above_the_number_of_stripes_is_refused():
    with pytest.raises(TableError, match="stripe"):
        parse("0 24 unstriped 2 8 3 disk 0")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "2 8 0 disk",
        "2 8 0 disk 0 0",
        "0 8 0 disk 0",
        "2 0 0 disk 0",
        "2 -8 0 disk 0",
        "2 8 -1 disk 0",
        "x 8 0 disk 0",
        "4294967296 8 0 disk 0",
        "2 4294967296 0 disk 0",
        "2 8 0 disk -1",
        "2 8 0 disk +1",
        "2 8 0 disk 1x",
    ],
)
def test_arguments_that_the_kernel_refuses_are_refused(words):
    with pytest.raises(TableError, match="line 1, unstriped: "):
        parse(f"0 24 unstriped {words}")


def test_a_length_of_whole_chunks_is_accepted():
    assert parse("0 24 unstriped 2 8 0 disk 0").size == 24 * SECTOR


def test_a_length_that_is_no_whole_number_of_chunks_is_refused():
    with pytest.raises(TableError, match="multiple of the chunk size"):
        parse("0 25 unstriped 2 8 0 disk 0")


def test_a_device_that_ends_with_the_last_chunk_picked_is_accepted():
    assert parse("0 24 unstriped 2 8 0 disk 0", sectors=40).size == 24 * SECTOR


def test_a_device_that_ends_inside_the_last_chunk_picked_is_refused():
    with pytest.raises(TableError, match="leg disk has 39 sectors, the line needs 40"):
        parse("0 24 unstriped 2 8 0 disk 0", sectors=39)
