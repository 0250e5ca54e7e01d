"""linear: one section of one device."""

import pytest

from dmpy.errors import TableError
from dmpy.target import Args, Leg, find_target
from dmpy.targets.linear import Linear
from dmpy.testing import PatternDevice, expect_equal, pattern
from dmpy.testing.conformance import TargetTests


def parse(words, length=8 * 512, size=2048 * 512):
    devices = {"disk": PatternDevice(size, "disk")}
    args = Args(words.split(), devices.__getitem__, line=3, target="linear")
    target = Linear.parse(args, length)
    args.end()
    return target


class TestLinear(TargetTests):
    """A section with a guard zone on both sides."""

    leg_sizes = (2048 * 512,)
    status_text = ""

    def build(self, devices):
        return Linear(Leg(devices[0], 100 * 512, 300 * 512))

    def oracle(self, sector):
        return 0, sector + 100

    def test_its_table_is_device_and_start_sector(self):
        assert self.target.table() == "leg0 100"

    def test_a_request_is_one_call_on_the_leg(self):
        self.target.preadv([memoryview(bytearray(512))] * 3, 512)
        assert self.devices[0].log == [("read", 101 * 512, 3 * 512)]


class TestLinearOfTheWholeDevice(TargetTests):
    leg_sizes = (64 * 512,)

    def build(self, devices):
        return Linear(Leg(devices[0], 0, 64 * 512))

    def oracle(self, sector):
        return 0, sector


def test_its_word_finds_it():
    assert find_target("linear") is Linear


def test_version_is_the_kernels():
    assert Linear.version == (1, 4, 0)


def test_the_last_sectors_of_a_device_are_accepted():
    target = parse("disk 2040")
    assert (target.legs[0].start, target.legs[0].length) == (2040 * 512, 8 * 512)
    data = bytearray(512)
    target.preadv([memoryview(data)], 7 * 512)
    expect_equal(memoryview(data), pattern(2047 * 512, 512), 0)


def test_one_sector_beyond_the_end_of_a_device_is_refused():
    with pytest.raises(TableError) as caught:
        parse("disk 2041")
    assert str(caught.value) == (
        "line 3, linear: leg disk has 2048 sectors, the line needs 8 from sector 2041"
    )
    assert (caught.value.line, caught.value.target) == (3, "linear")


@pytest.mark.parametrize("start", ["2048", "36028797018963967", "36028797018963968", str(2**64)])
def test_a_start_far_beyond_the_end_is_refused(start):
    with pytest.raises(TableError):
        parse(f"disk {start}")


def test_a_start_with_leading_zeroes_is_decimal_as_in_the_kernel():
    assert parse("disk 010").legs[0].start == 10 * 512


@pytest.mark.parametrize(
    "start", ["0x10", "-1", "+1", "1x", "1.5", "1K", "abc", "1_0", "\u0663", "1\u00b2", "''"]
)
def test_a_start_that_is_no_decimal_number_is_refused(start):
    with pytest.raises(TableError, match="must be a number"):
        parse(f"disk {start}")


@pytest.mark.parametrize("words", ["", "disk", "disk 0 0", "disk 0 disk 0"])
def test_any_but_two_arguments_are_refused(words):
    with pytest.raises(TableError, match="line 3, linear: "):
        parse(words)


def test_a_device_that_cannot_be_opened_is_named():
    def refuse(word):
        raise OSError(19, "No such device")

    with pytest.raises(TableError) as caught:
        Linear.parse(Args(["gone", "0"], refuse, line=2, target="linear"), 512)
    assert "gone" in str(caught.value)
    assert "No such device" in str(caught.value)
    assert caught.value.line == 2


def test_a_start_inside_a_block_of_the_device_is_refused():
    device = PatternDevice(1 << 20, "disk", block_size=(4096, 4096, 1 << 20))
    device.block_size = type(device).block_size._replace(minimum=4096)
    args = Args(["disk", "4"], {"disk": device}.__getitem__, target="linear")
    with pytest.raises(TableError, match="4096"):
        Linear.parse(args, 8 * 512)
